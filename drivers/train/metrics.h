/* drivers/train/metrics.h - metrics.jsonl: one object a step.
 *
 * Needs run.h before it.
 */
#ifndef DRIVERS_METRICS_H
#define DRIVERS_METRICS_H

#include <errno.h>

static void write_value(FILE *f, double x) {
    if (isfinite(x))
        fprintf(f, "%.9g", x);
    else
        fprintf(f, "null");
}

static void write_number(FILE *f, const char *name, double x) {
    fprintf(f, ",\"%s\":", name);
    write_value(f, x);
}

/* A figure over all layers, then by layer. */
static void write_figure(FILE *f, const ga_statistics *s, const char *name, const char *name_by_layer,
                         double (*figure)(const ga_statistics *s, size_t layer)) {
    write_number(f, name, figure(s, GA_ALL));
    fprintf(f, ",\"%s\":", name_by_layer);
    if (!isfinite(figure(s, GA_ALL))) {
        fprintf(f, "null");
        return;
    }
    for (size_t i = 0; i < s->L; i++) {
        fprintf(f, i == 0 ? "[" : ",");
        write_value(f, figure(s, i));
    }
    fprintf(f, "]");
}

static bool write_metrics(run *r, uint64_t step, const measurement *m) {
    FILE *f = r->metrics;
    if (!writes(r)) return true;
    fprintf(f, "{\"step\":%" PRIu64, step);
    write_number(f, "loss", m->loss);
    write_number(f, "lr", m->learning_rate);
    write_number(f, "grad_norm", m->grad_norm);
    write_number(f, "tokens_per_s", m->tokens_per_s);
    fprintf(f, ",\"tokens\":%" PRIu64 ",\"spikes\":%" PRIu64, step * step_tokens(&r->config), r->spikes.count);
    if (!m->diverged) routing_write(f, &r->progress.routing);
    if (isfinite(m->val_loss)) {
        write_number(f, "val_loss", m->val_loss);
        write_figure(f, r->held_out, "f_attn", "f_attn_by_layer", ga_f_attn);
        write_figure(f, r->held_out, "sink_share", "sink_share_by_layer", ga_sink_share);
        write_figure(f, r->held_out, "m_act", "max_act_by_layer", ga_m_act);
        write_figure(f, r->held_out, "gate_mean", "gate_mean_by_layer", ga_gate_mean);
        if (!isnan(r->lowest_loss)) write_number(f, "lowest_loss", r->lowest_loss);
    }
    fprintf(f, "%s}\n", m->diverged ? ",\"diverged\":true" : "");
    if (fflush(f) == 0 && !ferror(f)) return true;
    return fail(r, 1, "cannot write %s: %s", r->metrics_path, strerror(errno));
}

#endif
