/* drivers/analyze/interventions.h - analyze --interventions: what a part is for, by the loss without it. The gate's
 * scores replaced by their mean, by 1, halved, doubled; the first token's key or value removed; every head silenced in
 * turn.
 *
 *     if (!intervene(&a, &w, &a.report.models[0])) puts(a.failure);     // fills the model's `changes`
 *
 * Every change costs as much as the measurement itself: a pass over the windows. Needs measure.h and
 * gallery.h before it.
 */
#ifndef DRIVERS_INTERVENTIONS_H
#define DRIVERS_INTERVENTIONS_H

enum { MOST_SILENCED = 64 };

static bool measure_change(analysis *a, measuring *w, report_model *m, const char *key, const ga_intervention *change) {
    size_t samples = a->report.samples;
    report_change result = {.key = key, .layer = change->layer, .head = change->head};
    double *losses = malloc(samples * sizeof *losses);
    bool good = losses || fail(a, 1, "%s: out of memory", m->name);
    for (size_t i = 0, count = w->batch_size; good && i < samples; i += count) {
        if (count > samples - i) count = samples - i;
        good = read_windows(a, w, i, count) && run_windows(a, w, m, count, NULL, change, losses + i);
    }
    for (size_t i = 0; good && i < samples; i++) result.loss += losses[i] / (double)samples;
    if (good) arrput(m->changes, result);
    free(losses);
    return good;
}

typedef struct {
    size_t layer, head;
    double f_attn;
} measured_head;

static int largest_sink_first(const void *a, const void *b) {
    const measured_head *x = a, *y = b;
    return x->f_attn < y->f_attn ? 1 : x->f_attn > y->f_attn ? -1 : 0;
}

/* Silences the heads in turn: all, or of many those with the largest sinks. */
static bool silence_heads(analysis *a, measuring *w, report_model *m) {
    const ga_statistics *s = m->statistics;
    bool good = true;
    measured_head *heads = NULL;
    for (size_t i = 0; i < s->L * s->HQ; i++)
        arrput(heads, ((measured_head){i / s->HQ, i % s->HQ, ga_f_attn_head(s, i / s->HQ, i % s->HQ)}));
    if (arrlenu(heads) > MOST_SILENCED) {
        qsort(heads, arrlenu(heads), sizeof *heads, largest_sink_first);
        arrsetlen(heads, MOST_SILENCED);
    }
    for (size_t i = 0; good && i < arrlenu(heads); i++) {
        ga_intervention silence = {GA_SILENCE_HEAD, heads[i].layer, heads[i].head, 0, NULL};
        good = measure_change(a, w, m, NULL, &silence);
        if (isatty(STDERR_FILENO))
            fprintf(stderr, "\r\033[K%s: %zu of %zu heads silenced ", m->name, i + 1, arrlenu(heads));
    }
    arrfree(heads);
    return good;
}

/* Every change of report_changes that the model allows, then the heads. */
static bool intervene(analysis *a, measuring *w, report_model *m) {
    const ga_statistics *s = m->statistics;
    double *means = malloc(s->L * sizeof *means);
    if (!means) return fail(a, 1, "%s: out of memory", m->name);
    bool good = true;
    for (size_t l = 0; l < s->L; l++) means[l] = ga_gate_mean(s, l);
    for (size_t i = 0; good && i < CHANGES; i++) {
        bool mean = isnan(report_changes[i].value), scales = report_changes[i].kind == GA_SCALE_GATE;
        if (!s->has_gate && (scales || report_changes[i].kind == GA_SET_GATE)) continue;
        if (scales && m->config.gate_form != GA_MULTIPLICATIVE) continue;
        ga_intervention change = {report_changes[i].kind, GA_ALL, GA_ALL, report_changes[i].value, mean ? means : NULL};
        good = measure_change(a, w, m, report_changes[i].key, &change);
        if (isatty(STDERR_FILENO)) fprintf(stderr, "\r\033[K%s: %s ", m->name, report_changes[i].what);
    }
    free(means);
    return good && silence_heads(a, w, m);
}

#endif
