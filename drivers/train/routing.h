/* drivers/train/routing.h - what the routers of a mixture of experts did in an optimiser step, for the progress line
 * and metrics.jsonl.
 *
 *     routing r;
 *     if (!routing_create(&r, model)) ...        // a dense model has no layers here: nothing is looked at or written
 *     routing_look(&r, model);                   // after the step's last micro-batch, before ga_update
 *     routing_write(file, &r);                   // ,"load_balance":2.03,"load_balance_by_layer":[...],...
 *     r.layers[routing_worst(&r)].max_load       // where the load is least even
 *     free(r.layers);
 *
 * Needs gated_attention.h before it.
 */
#ifndef DRIVERS_ROUTING_H
#define DRIVERS_ROUTING_H

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    size_t L;           /* 0: dense */
    ga_routing *layers; /* (L) */
    ga_routing mean;    /* of the layers; NaN before the first look */
} routing;

static inline bool routing_create(routing *r, const ga_model *m) {
    r->L = m->config.n_experts > 0 ? m->config.n_layers : 0;
    r->mean = (ga_routing){NAN, NAN, NAN, NAN};
    r->layers = calloc(r->L + 1, sizeof *r->layers);
    return r->layers != NULL;
}

static inline void routing_look(routing *r, ga_model *m) {
    for (size_t l = 0; l < r->L; l++) r->layers[l] = ga_routing_of(m, l);
    if (r->L > 0) r->mean = ga_routing_of(m, GA_ALL);
}

/* The layer whose busiest expert is furthest above the mean. */
static inline size_t routing_worst(const routing *r) {
    size_t worst = 0;
    for (size_t l = 1; l < r->L; l++)
        if (r->layers[l].max_load > r->layers[worst].max_load) worst = l;
    return worst;
}

static inline void routing_write_value(FILE *f, const char *before, const ga_routing *r, size_t figure) {
    const double figures[] = {r->load_balance, r->router_z, r->max_load, r->dead};
    if (isfinite(figures[figure]))
        fprintf(f, "%s%.9g", before, figures[figure]);
    else
        fprintf(f, "%snull", before);
}

static inline void routing_write(FILE *f, const routing *r) {
    static const char *const names[] = {"load_balance", "router_z", "expert_max_load", "expert_dead"};
    for (size_t i = 0; r->L > 0 && i < sizeof names / sizeof names[0]; i++) {
        fprintf(f, ",\"%s\":", names[i]);
        routing_write_value(f, "", &r->mean, i);
        fprintf(f, ",\"%s_by_layer\":", names[i]);
        for (size_t l = 0; l < r->L; l++) routing_write_value(f, l == 0 ? "[" : ",", &r->layers[l], i);
        fprintf(f, "]");
    }
}

#endif
