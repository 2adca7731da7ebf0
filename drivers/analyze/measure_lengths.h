/* drivers/analyze/measure_lengths.h - runs the models over windows of rising length, for analyze --lengths.
 *
 *     if (!measure_lengths(&a)) puts(a.failure);     // fills the models' `lengths`
 *
 * Activations grow with the length, attention's time with its square; logits are made in slices, and where only answers
 * count, at the answers alone. Needs lengths.h and measure.h before it.
 */
#ifndef DRIVERS_MEASURE_LENGTHS_H
#define DRIVERS_MEASURE_LENGTHS_H

enum { LENGTH_ROWS = 64 }; /* of logits at one time */

/* "1k,2k,4096": rising, k stands for 1024. */
static bool parse_lengths(analysis *a) {
    const char *text = a->options.lengths;
    for (const char *at = text;; at++) {
        char *end;
        errno = 0;
        unsigned long long n = strtoull(at, &end, 10);
        size_t scale = *end == 'k' ? 1024 : 1;
        if (scale > 1) end++;
        bool number = *at >= '0' && *at <= '9' && errno == 0 && n >= 1 && n <= (16777216 / scale);
        if (!number || (*end && *end != ','))
            return fail(a, 2, "--lengths %s: it takes lengths up to 16384k, such as 512,1k,2k", text);
        if (arrlenu(a->lengths) > 0 && n * scale <= arrlast(a->lengths))
            return fail(a, 2, "--lengths %s: lengths rise from one to the next", text);
        arrput(a->lengths, (size_t)n * scale);
        if (!*end) return true;
        at = end;
    }
}

typedef struct {
    ga_model *model;
    ga_statistics *statistics;
    int32_t *tokens, *targets, *question; /* (rows) */
    ga_real *losses;                      /* (rows) */
    ga_real *logits;                      /* (LENGTH_ROWS, V) */
    double answers, right, questions, exact, answer_loss;
    double loss, targets_counted;
} length_measuring;

static void free_length_measuring(length_measuring *w) {
    ga_statistics_destroy(w->statistics);
    ga_destroy(w->model);
    free(w->tokens);
    free(w->losses);
    free(w->logits);
}

static bool allocate_length_measuring(analysis *a, length_measuring *w, const report_model *m, size_t longest) {
    size_t rows = longest > 4096 ? longest : 4096 / longest * longest;
    w->model = load_model(a, m, rows / longest, longest);
    if (!w->model) return false;
    w->statistics = ga_statistics_create(w->model);
    w->tokens = malloc(3 * rows * sizeof *w->tokens);
    w->targets = w->tokens + rows;
    w->question = w->targets + rows;
    w->losses = malloc(rows * sizeof *w->losses);
    w->logits = malloc(LENGTH_ROWS * m->config.vocab_size * sizeof *w->logits);
    return (w->statistics && w->tokens && w->losses && w->logits) || fail(a, 1, "%s: out of memory", m->name);
}

/* -ln p of the target, and whether it is the most likely token. */
static double length_answer_loss(const ga_real *logits, size_t V, int32_t target, bool *right) {
    size_t best = 0;
    double sum = 0;
    for (size_t v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    for (size_t v = 0; v < V; v++) sum += exp((double)logits[v] - (double)logits[best]);
    *right = best == (size_t)target;
    return log(sum) + (double)logits[best] - (double)logits[target];
}

/* The answers among rows first .. first + T - 1, which one window fills: a question's answer is whole when each of its
 * tokens is the most likely one, which is when greedy decoding gives it. */
static bool measure_answers(analysis *a, length_measuring *w, const report_model *m, size_t first, size_t T) {
    size_t V = m->config.vocab_size;
    int32_t asked = 0;
    bool whole = false;
    for (size_t t = 0; t < T;) {
        size_t n = 0;
        while (t + n < T && n < LENGTH_ROWS && w->question[first + t + n] > 0) n++;
        ga_error e;
        if (n > 0 && ga_logits(w->model, first + t, n, w->logits, &e)) return fail(a, 1, "%s: %s", m->name, e.text);
        for (size_t i = 0; i < n; i++, t++) {
            bool right;
            w->losses[first + t] = (ga_real)length_answer_loss(w->logits + i * V, V, w->targets[first + t], &right);
            w->answer_loss += (double)w->losses[first + t];
            w->answers++;
            w->right += right;
            if (w->question[first + t] != asked) {
                w->exact += whole;
                w->questions++;
                asked = w->question[first + t];
                whole = true;
            }
            whole = whole && right;
        }
        t += n == 0;
    }
    w->exact += whole;
    return true;
}

/* `count` windows of T tokens. When all targets that count are answers, nothing else needs logits. */
static bool measure_length_windows(analysis *a, length_measuring *w, const report_model *m, struct length_result *l,
                                   size_t first, size_t count) {
    size_t T = l->length, questions = 0;
    bool others = false;
    char text[1024];
    for (size_t i = 0; i < count; i++) {
        int32_t *tokens = w->tokens + i * T, *targets = w->targets + i * T, *question = w->question + i * T;
        if (!data_window(a->stream, a->part, first + i, tokens, targets, text, sizeof text))
            return fail(a, 1, "%s", text);
        memset(question, 0, T * sizeof *question);
        questions += data_questions(a->stream, tokens, question);
        for (size_t t = 0; t < T; t++) others = others || (targets[t] >= 0 && question[t] == 0);
    }
    ga_observer observer = {.statistics = w->statistics};
    ga_error e;
    if (ga_forward(w->model, w->tokens, others ? w->targets : NULL, count, T, &observer, NULL, &e))
        return fail(a, 1, "%s: %s", m->name, e.text);
    if (others)
        w->model->device.copy_out(w->model->device.state, w->losses, w->model->losses, count * T * sizeof *w->losses);
    for (size_t i = 0; i < count && questions > 0; i++)
        if (!measure_answers(a, w, m, i * T, T)) return false;
    for (size_t i = 0; i < count; i++)
        for (size_t t = 0, bin = 0; t < T; t++) {
            if (w->targets[i * T + t] < 0) continue;
            while (length_bin_start(bin + 1) <= t) bin++;
            l->bin_loss[bin] += (double)w->losses[i * T + t];
            l->bin_targets[bin]++;
            w->loss += (double)w->losses[i * T + t];
            w->targets_counted++;
        }
    return true;
}

/* How the model reaches positions that it was not trained on, and what was changed for it. */
static void describe_positions(const report_model *m, size_t length, char *text, size_t size) {
    const ga_config *c = &m->config;
    double reach = c->rope_factor * (double)c->rope_original_length;
    if (c->rope_factor > 1)
        snprintf(text, size, "YaRN %g x %zu%s", c->rope_factor, c->rope_original_length,
                 (double)length > reach ? ", extrapolated" : "");
    else
        snprintf(text, size, "%s", length <= c->max_seq_len ? "as trained" : "RoPE extrapolated");
    size_t used = strlen(text);
    if (c->rope_base != m->trained_rope_base)
        snprintf(text + used, size - used, ", base %g in place of %g", c->rope_base, m->trained_rope_base);
}

static bool measure_length(analysis *a, length_measuring *w, report_model *m, size_t length) {
    struct length_result l = {.length = length, .windows = a->report.samples};
    size_t rows = w->model->max_rows / length, L = w->model->sizes.L;
    bool terminal = isatty(STDERR_FILENO);
    describe_positions(m, length, l.positions, sizeof l.positions);
    ga_statistics_reset(w->statistics);
    w->answers = w->right = w->questions = w->exact = w->answer_loss = w->loss = w->targets_counted = 0;
    for (size_t i = 0, count; i < l.windows; i += count) {
        count = rows < l.windows - i ? rows : l.windows - i;
        if (!measure_length_windows(a, w, m, &l, i, count)) return false;
        if (terminal) fprintf(stderr, "\r%s, length %zu: %zu of %zu windows ", m->name, length, i + count, l.windows);
    }
    if (terminal) fprintf(stderr, "\r\033[K");
    for (size_t b = 0; b < LENGTH_BINS; b++) l.bin_loss[b] /= l.bin_targets[b];
    l.loss = w->loss / w->targets_counted;
    l.answer_loss = w->answer_loss / w->answers;
    l.accuracy = w->right / w->answers;
    l.exact = w->exact / w->questions;
    l.f_attn = ga_f_attn(w->statistics, GA_ALL);
    l.f_attn_uniform = ga_f_attn_uniform(length);
    l.sink_share = ga_sink_share(w->statistics, GA_ALL);
    l.m_act = ga_m_act(w->statistics, GA_ALL);
    l.gate_mean = ga_gate_mean(w->statistics, GA_ALL);
    for (size_t i = 0; i < L; i++) arrput(l.f_attn_by_layer, ga_f_attn(w->statistics, i));
    arrput(m->lengths, l);
    return true;
}

/* Every model on the windows of every length; the report's own windows and figures stay as they are. */
static bool measure_lengths(analysis *a) {
    report *r = &a->report, kept = *r;
    data_stream *stream = a->stream;
    const size_t *lengths = a->lengths;
    bool good = arrlenu(lengths) > 0;
    for (size_t i = 0; good && i < arrlenu(r->models); i++) {
        length_measuring w = {0};
        good = allocate_length_measuring(a, &w, &r->models[i], arrlast(lengths));
        for (size_t k = 0; good && k < arrlenu(lengths); k++) {
            r->seq_len = lengths[k];
            a->stream = NULL;
            good = open_data(a, &r->models[0]) && measure_length(a, &w, &r->models[i], lengths[k]);
            data_close(a->stream);
        }
        free_length_measuring(&w);
    }
    a->stream = stream;
    r->seq_len = kept.seq_len;
    r->samples = kept.samples;
    r->lowest_loss = kept.lowest_loss;
    return good;
}

static void print_lengths(const report *r) {
    if (!lengths_asked(r)) return;
    printf("\nby length, %s\n\n%-16s  %8s  %7s  %8s  %8s  %8s  %7s  %8s  %13s  %7s  %s\n", r->source, "model", "length",
           "windows", "accuracy", "whole", "loss", "F-Attn", "uniform", "largest layer", "M-Act", "positions");
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0; k < arrlenu(r->models[i].lengths); k++) {
            const struct length_result *l = &r->models[i].lengths[k];
            char percent[2][16] = {"-", "-"}, largest[64];
            size_t layer;
            double most = length_largest(l, &layer);
            snprintf(largest, sizeof largest, "%.1f %% (%zu)", 100 * most, layer);
            if (isfinite(l->accuracy)) snprintf(percent[0], sizeof percent[0], "%.1f %%", 100 * l->accuracy);
            if (isfinite(l->exact)) snprintf(percent[1], sizeof percent[1], "%.1f %%", 100 * l->exact);
            print_padded(r->models[i].name, 16);
            printf("  %8zu  %7zu  %8s  %8s  %8.4f  %5.1f %%  %6.1f %%  %13s  %7.4g  %s\n", l->length, l->windows,
                   percent[0], percent[1], l->loss, 100 * l->f_attn, 100 * l->f_attn_uniform, largest, l->m_act,
                   l->positions);
        }
}

#endif
