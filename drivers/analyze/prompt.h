/* drivers/analyze/prompt.h - analyze --prompt: models go on from a text, and the attention maps of it.
 *
 * Needs prompt_maps.h before it.
 */
#ifndef DRIVERS_PROMPT_H
#define DRIVERS_PROMPT_H

/* ---- prompts ----------------------------------------------------------------------------------------------------- */

/* A word of the prompt: a token's number, or its label. */
static int32_t find_token(const analysis *a, const char *word, size_t vocab_size) {
    size_t number;
    if (read_size(word, 0, (double)vocab_size - 1, &number)) return (int32_t)number;
    char label[DATA_LABEL_SIZE];
    for (size_t t = 0; a->stream && t < vocab_size; t++)
        if (strcmp(data_token_text(a->stream, (int32_t)t, label, sizeof label), word) == 0) return (int32_t)t;
    return -1;
}

/* "numbers below 2049 and labels: 0 is T0, 17 is t17, 2048 is <s>" */
static const char *describe_tokens(analysis *a, const report_model *m) {
    size_t V = m->config.vocab_size, shown[] = {0, V > 18 ? 17 : V / 2, V - 1};
    const char *text = keep_text(a, "numbers below %zu", V);
    for (size_t i = 0; a->stream && i < 3; i++) {
        char label[DATA_LABEL_SIZE];
        text = keep_text(a, "%s%s %zu is %s", text, i ? "," : " and labels:", shown[i],
                         data_token_text(a->stream, (int32_t)shown[i], label, sizeof label));
    }
    return text;
}

/* The prompt as tokens, an stb_ds array; a run's first token opens it. */
static bool read_prompt(analysis *a, const report_model *m, int32_t **tokens) {
    const char *prompt = a->options.prompt;
    if (a->has_run && a->run.bos_token >= 0) arrput(*tokens, (int32_t)a->run.bos_token);
    if (a->tokenizer || reads_bytes(a, m)) {
        if (!encode_text(a, m, prompt, strlen(prompt), tokens)) return false;
    } else {
        for (prompt += strspn(prompt, " ,\t\n"); *prompt; prompt += strspn(prompt, " ,\t\n")) {
            size_t length = strcspn(prompt, " ,\t\n");
            const char *word = keep_text(a, "%.*s", (int)(length < 64 ? length : 64), prompt);
            int32_t token = find_token(a, word, m->config.vocab_size);
            if (token < 0)
                return fail(a, 1, "--prompt: \"%s\" is no token of %s, which reads %s", word, m->name,
                            describe_tokens(a, m));
            arrput(*tokens, token);
            prompt += length;
        }
    }
    return arrlenu(*tokens) > 0 || fail(a, 1, "--prompt is empty");
}

static bool is_printable(int byte) {
    return ((unsigned char)byte >= ' ' && byte != 127) || byte == '\n' || byte == '\t';
}

/* Text as it is, but for bytes that would steer a terminal; other tokens by their labels. */
static void print_token(const analysis *a, const report_model *m, int32_t token) {
    char label[DATA_LABEL_SIZE];
    size_t n;
    const char *bytes = a->tokenizer ? data_tokenizer_bytes(a->tokenizer, token, &n) : NULL;
    if (bytes)
        for (size_t i = 0; i < n; i++) putchar(is_printable(bytes[i]) ? bytes[i] : '?');
    else if (reads_bytes(a, m) && token < 256 && is_printable(token))
        putchar(token);
    else
        printf(reads_bytes(a, m) ? "%s" : "%s ", label_token(a, m, token, label));
    fflush(stdout);
}

/* --figures: what a token, as a query, leaves on the first one, and the scores of its gates. */
static void print_token_figures(const char *what, ga_statistics *s) {
    printf("%-24s  %5.1f %%", what, 100 * ga_f_attn(s, GA_ALL));
    print_number(9, "%.3f", ga_gate_mean(s, GA_ALL), !s->has_gate);
    printf("\n");
    fflush(stdout);
    ga_statistics_reset(s);
}

/* Logits of the next token; false: a failure, or they are no numbers. */
static bool feed_tokens(analysis *a, const report_model *m, ga_generator *g, const int32_t *tokens, size_t n,
                        ga_real *logits) {
    ga_error e;
    if (ga_generator_feed(g, tokens, n, logits, &e)) return fail(a, 1, "%s: %s", m->name, e.text);
    for (size_t i = 0; i < m->config.vocab_size; i++)
        if (!isfinite(logits[i])) return fail(a, 1, "%s: its logits are not finite", m->name);
    return true;
}

/* Feeds the prompt, then each token that is drawn. The last one is not fed, unless its figures are asked for. */
static bool generate_tokens(analysis *a, const report_model *m, ga_generator *g, ga_real *logits, ga_statistics *s,
                            const int32_t *prompt, size_t length) {
    const options *o = &a->options;
    ga_sampling sampling = {o->temperature, o->top_k, o->top_p};
    uint64_t random = o->seed;
    double start = now();
    if (!feed_tokens(a, m, g, prompt, length, logits)) return false;
    double fed = now();
    if (s) printf("%-24s  %7s  %9s\n", "token", "F-Attn", "gate mean");
    if (s) print_token_figures("the prompt", s);
    for (size_t i = 0; i < o->generate; i++) {
        int32_t token = ga_sample(logits, m->config.vocab_size, sampling, &random);
        bool feed = s || i + 1 < o->generate;
        if (!s) print_token(a, m, token);
        if (feed && !feed_tokens(a, m, g, &token, 1, logits)) return false;
        char label[DATA_LABEL_SIZE];
        if (s) print_token_figures(label_token(a, m, token, label), s);
    }
    printf("\n");
    fflush(stdout);
    if (o->generate > 1)
        fprintf(stderr, "%zu tokens, %.1f a second; prompt of %zu in %.3f s\n", o->generate,
                (double)(o->generate - 1) / (now() - fed), length, fed - start);
    return true;
}

static bool generate(analysis *a, const report_model *m, ga_model *model, const int32_t *prompt, size_t length) {
    ga_error e;
    ga_generator *g = ga_generator_create(model, length + a->options.generate, &e);
    if (!g) return fail(a, 1, "%s: %s", m->name, e.text);
    ga_real *logits = malloc(m->config.vocab_size * sizeof *logits);
    ga_statistics *s = a->options.figures ? ga_statistics_create(model) : NULL;
    ga_generator_observe(g, s);
    bool good = (logits && (s || !a->options.figures)) || fail(a, 1, "%s: out of memory", m->name);
    good = good && generate_tokens(a, m, g, logits, s, prompt, length);
    ga_statistics_destroy(s);
    free(logits);
    ga_generator_destroy(g);
    return good;
}

static bool prompt_model(analysis *a, report_model *m, prompt_maps *all) {
    options *o = &a->options;
    if (!load_run(a, m) || !load_tokenizer(a, m)) return false;
    data_options d = {.source = o->data ? o->data : a->run.data,
                      .vocab_size = m->config.vocab_size,
                      .seq_len = 1,
                      .seed = a->run.seed,
                      .bos_token = a->has_run ? a->run.bos_token : -1};
    char text[1024];
    data_close(a->stream);
    a->stream = !a->tokenizer && (o->data || a->has_run) ? data_open(&d, text, sizeof text)
                                                         : NULL; /* for labels; numbers will do */
    if (o->data && !a->tokenizer && !a->stream) return fail(a, 1, "%s", text);
    if (o->maps && !o->has_generate) o->generate = 0;
    int32_t *tokens = NULL;
    ga_model *model = NULL;
    bool good = read_prompt(a, m, &tokens);
    size_t length = arrlenu(tokens), needed = length + o->generate;
    size_t longest = o->has_seq_len ? o->seq_len : m->config.max_seq_len;
    if (good && needed > longest)
        good = fail(a, 1, "%s: %zu tokens of the prompt and %zu to generate are more than its %zu positions%s", m->name,
                    length, o->generate, longest, o->has_seq_len ? "" : " (--seq_len raises them)");
    if (good) good = (model = load_model(a, m, 1, needed)) != NULL;
    if (good && arrlenu(a->options.models) > 1) printf("%s: %s\n", m->name, m->directory);
    if (good && o->generate > 0) {
        for (size_t i = 0; !o->figures && i < length; i++) print_token(a, m, tokens[i]);
        good = generate(a, m, model, tokens, length);
    }
    if (good && o->maps) good = map_prompt(a, m, model, tokens, length, all);
    ga_destroy(model);
    arrfree(tokens);
    return good;
}

static bool prompt_models(analysis *a) {
    prompt_maps all = {0};
    bool good = true;
    for (size_t i = 0; good && i < arrlenu(a->report.models); i++) good = prompt_model(a, &a->report.models[i], &all);
    if (good && a->options.maps && arrlenu(a->report.models) > 1) good = draw_all_models(a, &all);
    if (good && a->options.maps) print_figures(&a->report);
    arrfree(all.panels);
    free(all.labels);
    return good;
}

#endif
