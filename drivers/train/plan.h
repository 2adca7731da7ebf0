/* drivers/train/plan.h - what a run will do: the stream it reads, how many steps, which windows in which order, which
 * held out.
 *
 *     if (!open_data(r) || !plan_steps(r) || !plan_evaluation(r)) return false;
 *     if (!read_windows(r, DATA_TRAIN, r->state.windows, c->batch_size)) return false;    // into r->inputs, r->targets
 *
 * Needs run.h before it.
 */
#ifndef DRIVERS_PLAN_H
#define DRIVERS_PLAN_H

#include <unistd.h>

/* Now and then a line, or one that is redrawn. */
static void show_progress(const char *what, double share) {
    static double drawn_at;
    bool last = share >= 1;
    if (!last && now() - drawn_at < (on_terminal ? 0.1 : 10)) return;
    drawn_at = now();
    printf("%s%-11s %.0f %%%s", on_terminal ? "\r" : "", what, 100 * share, on_terminal && !last ? "" : "\n");
    fflush(stdout);
}

static bool reads_text(const run *r) {
    return ends_with(r->config.data, ".txt") || ends_with(r->config.data, ".jsonl");
}

/* Text in another encoding is learned as bytes without a meaning. */
static void note_encoding(const run *r) {
    size_t at;
    if (!reads_text(r) || data_text_is_utf8(r->config.data, &at)) return;
    printf("note        %s is no UTF-8 text at byte %zu and perhaps elsewhere: such bytes are learned as they are. "
           "`file` tells the encoding, `iconv -f ENCODING -t UTF-8` changes it\n",
           r->config.data, at);
}

static bool open_data(run *r) {
    const ga_config *c = &r->config;
    data_options options = {.source = c->data,
                            .tokenizer = r->tokenizer,
                            .progress = show_progress,
                            .vocab_size = c->vocab_size,
                            .seq_len = c->max_seq_len,
                            .val_fraction = c->val_fraction,
                            .shuffle = c->shuffle,
                            .seed = c->seed,
                            .bos_token = c->bos_token};
    char text[512];
    if (writes(r)) r->stream = data_open(&options, text, sizeof text); /* which tokenizes a text, for all of them */
    if (!ranks_follow(&r->ranks, &r->error)) return fail_library(r);
    if (!writes(r)) r->stream = data_open(&options, text, sizeof text);
    if (r->stream && writes(r)) note_encoding(r);
    return r->stream || fail(r, 1, "%s", text);
}

/* An epoch is the stream's first max_tokens, or the whole of it; a run with max_steps follows the stream
 * as it goes on. */
static bool plan_steps(run *r) {
    const ga_config *c = &r->config;
    r->steps = c->max_steps;
    if ((double)c->max_steps * (double)step_tokens(c) > MOST_TOKENS)
        return fail(r, 2, "%zu steps of %" PRIu64 " tokens are too many", c->max_steps, step_tokens(c));
    if (c->max_steps > 0) return true;
    uint64_t windows = r->stream ? data_windows(r->stream, DATA_TRAIN) : DATA_ENDLESS;
    uint64_t wanted = (c->max_tokens + c->max_seq_len - 1) / c->max_seq_len;
    if (wanted == 0 && windows == DATA_ENDLESS)
        return fail(r, 2, "max_tokens = 0 takes all of a file, and %s has no end: set max_tokens or max_steps",
                    c->data);
    double epoch = wanted > 0 ? (double)c->max_tokens : (double)windows * (double)c->max_seq_len;
    if (epoch * (double)c->epochs > MOST_TOKENS)
        return fail(r, 2, "%zu epochs of %g tokens are too many", c->epochs, epoch);
    uint64_t tokens = (wanted > 0 ? c->max_tokens : windows * c->max_seq_len) * c->epochs;
    r->steps = (tokens + step_tokens(c) - 1) / step_tokens(c);
    r->epoch_windows = wanted < windows ? wanted : 0;
    return true;
}

/* Which window of the stream is the i-th of the training. */
static uint64_t training_window(const run *r, uint64_t i) {
    uint64_t n = r->epoch_windows;
    if (n == 0 || i < n) return i;
    return r->config.shuffle ? data_permute(i % n, n, r->config.seed, i / n) : i % n;
}

static bool plan_evaluation(run *r) {
    uint64_t held_out = data_windows(r->stream, DATA_VAL);
    r->val_windows = held_out < r->config.eval_windows ? held_out : r->config.eval_windows;
    r->lowest_loss = NAN;
    if (r->val_windows == 0) return true;
    char text[512];
    double expected;
    return data_entropy(r->stream, DATA_VAL, 0, r->val_windows, &r->lowest_loss, &expected, text, sizeof text) ||
           fail(r, 1, "%s", text);
}

static bool read_windows(run *r, data_part part, uint64_t first, size_t count) {
    size_t T = r->config.max_seq_len;
    char text[512];
    for (size_t b = 0; b < count; b++) {
        uint64_t window = part == DATA_TRAIN ? training_window(r, first + b) : first + b;
        if (!data_window(r->stream, part, window, r->inputs + b * T, r->targets + b * T, text, sizeof text))
            return fail(r, 1, "%s", text);
    }
    return true;
}

#endif
