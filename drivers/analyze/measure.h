/* drivers/analyze/measure.h - runs a model over windows of tokens and keeps what analyze reports: losses, statistics,
 * maps.
 *
 *     measuring w = {.model = load_model(&a, m, batch_size, seq_len), .batch_size = batch_size};
 *     allocate_measuring(&a, &w, m) && read_windows(&a, &w, 0, 1) && measure_windows(&a, &w, m, 0, 1)
 *
 * Needs analysis.h before it.
 */
#ifndef DRIVERS_MEASURE_H
#define DRIVERS_MEASURE_H

/* ---- measuring --------------------------------------------------------------------------------------------------- */

typedef struct {
    ga_model *model;
    size_t batch_size;
    int32_t *tokens, *targets; /* (batch_size, T) */
    ga_real *losses;           /* (batch_size, T) */
    ga_map *maps;              /* (L), each (M, M) */
} measuring;

static void free_measuring(measuring *w) {
    for (size_t l = 0; w->maps && l < w->model->sizes.L; l++) free(w->maps[l].p);
    free(w->maps);
    free(w->tokens);
    free(w->losses);
}

static bool allocate_measuring(analysis *a, measuring *w, report_model *m) {
    report *r = &a->report;
    size_t L = w->model->sizes.L, M = r->map_len, rows = w->batch_size * r->seq_len;
    w->tokens = malloc(2 * rows * sizeof *w->tokens);
    w->targets = w->tokens + rows;
    w->losses = malloc(rows * sizeof *w->losses);
    w->maps = calloc(L, sizeof *w->maps);
    m->statistics = ga_statistics_create_detailed(w->model);
    m->window_losses = malloc(r->samples * sizeof *m->window_losses);
    m->maps = malloc(L * M * M * sizeof *m->maps);
    m->window_maps = malloc(L * M * M * sizeof *m->window_maps);
    bool good = w->tokens && w->losses && w->maps && m->statistics && m->window_losses && m->maps && m->window_maps;
    for (size_t l = 0; good && l < L; l++) {
        w->maps[l] = (ga_map){.layer = l, .head = GA_ALL, .T = M, .p = calloc(M * M, sizeof(double))};
        good = w->maps[l].p != NULL;
    }
    return good || fail(a, 1, "%s: out of memory", m->name);
}

static bool read_windows(analysis *a, measuring *w, size_t first, size_t count) {
    char text[1024];
    for (size_t i = 0; i < count; i++)
        if (!data_window(a->stream, a->part, first + i, w->tokens + i * a->report.seq_len,
                         w->targets + i * a->report.seq_len, text, sizeof text))
            return fail(a, 1, "%s", text);
    return true;
}

/* A pass over the `count` windows that were read, with one thing changed if `change` is not NULL; the
 * mean loss of each. */
static bool run_windows(analysis *a, measuring *w, const report_model *m, size_t count, const ga_observer *observer,
                        const ga_intervention *change, double *losses) {
    size_t T = a->report.seq_len;
    ga_error e;
    ga_result result = change ? ga_forward_with(w->model, change, w->tokens, w->targets, count, T, observer, NULL, &e)
                              : ga_forward(w->model, w->tokens, w->targets, count, T, observer, NULL, &e);
    if (result != GA_OK) return fail(a, 1, "%s: %s", m->name, e.text);
    w->model->device.copy_out(w->model->device.state, w->losses, w->model->losses, count * T * sizeof *w->losses);
    for (size_t i = 0; i < count; i++) {
        double sum = 0, counted = 0;
        for (size_t t = 0; t < T; t++) {
            sum += (double)w->losses[i * T + t];
            counted += w->targets[i * T + t] >= 0;
        }
        losses[i] = sum / counted;
    }
    return true;
}

/* Loss and statistics of `count` windows. */
static bool measure_windows(analysis *a, measuring *w, report_model *m, size_t first, size_t count) {
    ga_observer observer = {.statistics = m->statistics};
    if (!run_windows(a, w, m, count, &observer, NULL, m->window_losses + first)) return false;
    for (size_t i = 0; i < count; i++) m->loss += m->window_losses[first + i] / (double)a->report.samples;
    return true;
}

/* Adds the maps of `count` windows. Attention is causal, so the first M positions of a window have the maps that they
 * have within the whole of it. */
static bool map_windows(analysis *a, measuring *w, const report_model *m, size_t count) {
    size_t M = a->report.map_len, T = a->report.seq_len;
    for (size_t i = 1; i < count; i++) memmove(w->tokens + i * M, w->tokens + i * T, M * sizeof *w->tokens);
    ga_observer observer = {.maps = w->maps, .n_maps = w->model->sizes.L};
    ga_error e;
    if (ga_forward(w->model, w->tokens, NULL, count, M, &observer, NULL, &e))
        return fail(a, 1, "%s: %s", m->name, e.text);
    return true;
}

static void copy_maps(const measuring *w, double *maps, size_t M) {
    for (size_t l = 0; w->maps && l < w->model->sizes.L; l++)
        for (size_t i = 0; i < M * M; i++) maps[l * M * M + i] = w->maps[l].p[i] / w->maps[l].windows;
}

/* What follows from the statistics while the model is there: ranks, and which tokens carry the largest activations. */
static bool finish_statistics(analysis *a, measuring *w, report_model *m) {
    ga_error e;
    if (ga_measure_ranks(m->statistics, w->model, &e)) return fail(a, 1, "%s: %s", m->name, e.text);
    for (int stream = 0; stream < GA_STREAMS; stream++) {
        ga_peak peak = ga_activation_peak(m->statistics, (ga_stream)stream, GA_ALL);
        if (peak.token >= 0) label_token(a, m, peak.token, m->peak_labels[stream]);
    }
    return true;
}

#endif
