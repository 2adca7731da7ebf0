/* drivers/train/spikes.h - loss spikes and divergence of a training run, from its losses alone (Table 2, A.6).
 *
 *     spikes s = {0};
 *     spike_kind kind = spikes_add(&s, loss);    // after each step; s.count spikes so far, s.mean of the last steps
 *
 * The state is that of the losses added, rounded as metrics.jsonl has them: a run that goes on adds what stands there.
 */
#ifndef DRIVERS_SPIKES_H
#define DRIVERS_SPIKES_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { SPIKE_WINDOW = 128, SPIKE_FEWEST = 32 }; /* steps that a loss is held against, and how many there must be */

typedef enum { SPIKE_NONE, SPIKE_LOSS, SPIKE_DIVERGED } spike_kind;

typedef struct {
    double losses[SPIKE_WINDOW];
    double mean, deviation; /* of the steps before the last one, SPIKE_WINDOW of them at most */
    double first,
        lowest; /* loss of the first step; least mean of SPIKE_WINDOW steps, or the first where that is less */
    uint64_t steps, count;
} spikes;

/* A spike: the loss lies seven standard deviations above the mean of the last 128 steps (the rule of OLMo's spike
 * score). Divergence, while all is still finite: the mean of 128 steps has come back more than half of the way from its
 * lowest to the first step's loss, and more than one nat. */
static inline spike_kind spikes_add(spikes *s, double loss) {
    char text[32];
    snprintf(text, sizeof text, "%.9g", loss);
    loss = strtod(text, NULL);
    uint64_t n = s->steps < SPIKE_WINDOW ? s->steps : SPIKE_WINDOW;
    double sum = 0, squares = 0;
    for (uint64_t i = 0; i < n; i++) sum += s->losses[i];
    s->mean = n > 0 ? sum / (double)n : loss;
    for (uint64_t i = 0; i < n; i++) squares += (s->losses[i] - s->mean) * (s->losses[i] - s->mean);
    s->deviation = n > 1 ? sqrt(squares / (double)(n - 1)) : 0;
    double least = 1e-3 * fabs(s->mean); /* windows that repeat exactly have no deviation */
    if (s->steps == 0) s->first = s->lowest = loss;
    if (n == SPIKE_WINDOW) s->lowest = fmin(s->lowest, s->mean);
    s->losses[s->steps++ % SPIKE_WINDOW] = loss;
    if (n == SPIKE_WINDOW && s->mean > s->lowest + 1 && s->mean > (s->first + s->lowest) / 2) return SPIKE_DIVERGED;
    if (n < SPIKE_FEWEST || !(loss > s->mean + 7 * fmax(s->deviation, least))) return SPIKE_NONE;
    s->count++;
    return SPIKE_LOSS;
}

#endif
