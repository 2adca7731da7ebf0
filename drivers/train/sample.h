/* drivers/train/sample.h - text that the model writes while it is trained (key sample_every).
 *
 * Needs plan.h and progress.h before it.
 */
#ifndef DRIVERS_SAMPLE_H
#define DRIVERS_SAMPLE_H

enum { SAMPLE_PROMPT = 8 };

/* Text as it is, but for what would steer a terminal; other tokens by their labels. */
static void print_token(const run *r, int32_t token) {
    const data_tokenizer *t = data_stream_tokenizer(r->stream);
    bool text = t || reads_text(r);
    size_t n = 0;
    const char *bytes = t ? data_tokenizer_bytes(t, token, &n) : NULL;
    for (size_t i = 0; i < n; i++) putchar((unsigned char)bytes[i] < ' ' || bytes[i] == 127 ? ' ' : bytes[i]);
    if (!t)
        printf("%s%s", data_token_text(r->stream, token, (char[DATA_LABEL_SIZE]){0}, DATA_LABEL_SIZE), text ? "" : " ");
}

static bool generate(run *r, ga_generator *g, ga_real *logits, size_t prompt, size_t count) {
    ga_sampling sampling = {.temperature = 0.8, .top_p = 1};
    if (ga_generator_feed(g, r->inputs, prompt, logits, &r->error)) return fail_library(r);
    for (size_t i = 0; i < count; i++) {
        int32_t token = ga_sample(logits, r->config.vocab_size, sampling, &r->state.random);
        print_token(r, token);
        if (i + 1 < count && ga_generator_feed(g, &token, 1, logits, &r->error)) return fail_library(r);
    }
    return true;
}

/* Goes on from the first tokens of a held-out window, another one each time. */
static bool print_sample(run *r) {
    const ga_config *c = &r->config;
    size_t T = c->max_seq_len, prompt = T / 2 < SAMPLE_PROMPT ? T / 2 + T % 2 : SAMPLE_PROMPT;
    size_t count = c->sample_tokens < T - prompt ? c->sample_tokens : T - prompt;
    uint64_t number = r->state.step / c->sample_every;
    bool held_out = r->val_windows > 0;
    if (!read_windows(r, held_out ? DATA_VAL : DATA_TRAIN, held_out ? number % r->val_windows : number, 1))
        return false;
    ga_generator *g = ga_generator_create(r->model, T, &r->error);
    if (!g) return fail_library(r);
    ga_real *logits = malloc(c->vocab_size * sizeof *logits);
    erase_bar(&r->progress);
    printf("sample      ");
    for (size_t i = 0; i < prompt; i++) print_token(r, r->inputs[i]);
    printf("| ");
    bool done = logits ? generate(r, g, logits, prompt, count) : fail(r, 1, "out of memory");
    printf("\n");
    free(logits);
    ga_generator_destroy(g);
    return done;
}

#endif
