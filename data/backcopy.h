/* data/backcopy.h - Bigram-Backcopy: a task on which a small transformer grows an attention sink.
 *
 * There are V tokens; 0..K-1 are triggers, and V itself is <s>, which opens every sequence x_0 x_1 ... x_T:
 *
 *     x_0     = <s>
 *     x_1     uniform over the V-K tokens that are no triggers
 *     x_{t+1} = x_{t-1}                                  if x_t is a trigger
 *     x_{t+1} = each trigger with probability rate / K   if it is not,
 *               else, with 1 - rate, a draw from row x_t of a fixed bigram chain over the V-K others
 *
 * A copied token is never a trigger, since no trigger follows a trigger. Only at a trigger is there anything to look
 * back for, and the token alone says so: elsewhere a head without a gate rests on <s>, and one with a gate can close.
 *
 * Each row of the chain is a symmetric Dirichlet draw with the parameter a/V per token, confined to the others:
 * Dirichlet(a/V, ..., a/V) over V-K tokens. That is a Dirichlet process with concentration a' = a (V-K)/V and a
 * uniform base, so a row is drawn by stick-breaking (Sethuraman 1994) and no V x V matrix is needed:
 *
 *     p = sum_k w_k delta(u_k),   w_k = b_k prod_{j<k} (1 - b_j),   b_k ~ Beta(1, a'),   u_k uniform
 *
 * cut where less than 1e-6 of the stick is left, equal u_k added up, and normalised: what comes out is the row, by
 * definition, and the probabilities below are exact for it. A row depends on (seed, token) only; it is made when first
 * needed and kept (a = 6.4: about 90 atoms, 0.7 KiB).
 *
 *     data_backcopy b = {.vocab = 2048, .triggers = 3, .trigger_rate = 0.1, .concentration = 6.4};
 *     if (!data_backcopy_init(&b)) return no_memory();
 *     data_random random = data_random_at(seed, DATA_RANDOM_TRAIN, window);
 *     data_backcopy_window(&b, &random, T, inputs, targets);
 *     data_backcopy_free(&b);
 *
 * The file that defines DATA_IMPLEMENTATION holds the code.
 */
#ifndef DATA_BACKCOPY_H
#define DATA_BACKCOPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "random.h"

typedef struct {
    int32_t token;
    float weight;
} data_backcopy_atom;

typedef struct {
    double total;   /* of the weights: an atom's probability is weight / total */
    double entropy; /* of the row, in nats */
    size_t count;
    data_backcopy_atom atoms[];
} data_backcopy_row;

typedef struct {
    int32_t vocab;        /* V, and the number of <s> */
    int32_t triggers;     /* K, 0..V-1; 0: a bigram chain, with trigger_rate 0 */
    double trigger_rate;  /* 0..1, below 1 */
    double concentration; /* a, above 0 */
    uint64_t seed;        /* of the chain */

    data_backcopy_row **rows; /* (V) */
    double *weights;          /* (V) zero between two rows */
    int32_t *distinct;        /* (V) */
} data_backcopy;

/* Takes the five parameters as they stand in *b, within the ranges above. False: out of memory. */
bool data_backcopy_init(data_backcopy *b);
void data_backcopy_free(data_backcopy *b);

/* Row of a token that is no trigger; NULL: out of memory. */
const data_backcopy_row *data_backcopy_get_row(data_backcopy *b, int32_t token);

/* What follows a token that is no trigger. -1: out of memory. */
int32_t data_backcopy_draw(data_backcopy *b, data_random *random, int32_t token);

/* inputs (T) = x_0 .. x_{T-1}, targets (T) = x_1 .. x_T. False: out of memory. */
bool data_backcopy_window(data_backcopy *b, data_random *random, size_t T, int32_t *inputs, int32_t *targets);

/* Probability of x_{t+1} = next after x_{t-1} = before and x_t = current. Zero for what cannot happen; NaN: out of
 * memory. */
double data_backcopy_probability(data_backcopy *b, int32_t before, int32_t current, int32_t next);

/* The lowest loss that can be reached on a window, in nats per target: `actual` is the mean of -ln p(target | all
 * before it), as a perfect model would score on these very targets; `expected` is the mean of the entropies of p, what
 * it would score in the mean over all targets that might have followed. Their difference averages to zero. False: out
 * of memory.
 */
bool data_backcopy_loss(data_backcopy *b, size_t T, const int32_t *inputs, const int32_t *targets, double *actual,
                        double *expected);

#endif

#if defined(DATA_IMPLEMENTATION) && !defined(DATA_BACKCOPY_IMPLEMENTED)
#define DATA_BACKCOPY_IMPLEMENTED

#include <math.h>
#include <stdlib.h>

bool data_backcopy_init(data_backcopy *b) {
    size_t V = (size_t)b->vocab;
    b->rows = calloc(V, sizeof *b->rows);
    b->weights = calloc(V, sizeof *b->weights);
    b->distinct = calloc(V, sizeof *b->distinct);
    if (b->rows && b->weights && b->distinct) return true;
    data_backcopy_free(b);
    return false;
}

void data_backcopy_free(data_backcopy *b) {
    for (int32_t i = 0; b->rows && i < b->vocab; i++) free(b->rows[i]);
    free(b->rows);
    free(b->weights);
    free(b->distinct);
    b->rows = NULL;
    b->weights = NULL;
    b->distinct = NULL;
}

/* Breaks the stick: weights[u] for every u drawn, the drawn ones in distinct[0..count). The first atoms are the
 * largest in the mean, which keeps the search in data_backcopy_draw short.
 */
static size_t datai_backcopy_break(data_backcopy *b, int32_t token) {
    data_random random = data_random_at(b->seed, DATA_RANDOM_CHAIN, (uint64_t)token);
    uint32_t others = (uint32_t)(b->vocab - b->triggers);
    double concentration = b->concentration * others / b->vocab, left = 1;
    size_t count = 0;
    while (left > 1e-6) {
        /* If u is uniform, 1 - u^(1/a') is Beta(1, a'). */
        double after = left * exp(log(data_random_uniform(&random)) / concentration), piece = left - after;
        int32_t atom = b->triggers + (int32_t)data_random_below(&random, others);
        if (!(piece > 0)) continue;
        if (b->weights[atom] == 0) b->distinct[count++] = atom;
        b->weights[atom] += piece;
        left = after;
    }
    return count;
}

const data_backcopy_row *data_backcopy_get_row(data_backcopy *b, int32_t token) {
    if (b->rows[token]) return b->rows[token];
    size_t count = datai_backcopy_break(b, token);
    data_backcopy_row *row = malloc(sizeof *row + count * sizeof row->atoms[0]);
    if (row) *row = (data_backcopy_row){.count = count};
    for (size_t i = 0; i < count; i++) {
        double *weight = &b->weights[b->distinct[i]];
        if (row) row->atoms[i] = (data_backcopy_atom){b->distinct[i], (float)*weight};
        *weight = 0;
    }
    if (!row) return NULL;
    for (size_t i = 0; i < count; i++) row->total += row->atoms[i].weight;
    for (size_t i = 0; i < count; i++) {
        double p = row->atoms[i].weight / row->total;
        row->entropy -= p * log(p);
    }
    b->rows[token] = row;
    return row;
}

int32_t data_backcopy_draw(data_backcopy *b, data_random *random, int32_t token) {
    double u = data_random_uniform(random);
    if (u < b->trigger_rate) {
        int32_t trigger = (int32_t)(u / b->trigger_rate * b->triggers);
        return trigger < b->triggers ? trigger : b->triggers - 1;
    }
    const data_backcopy_row *row = data_backcopy_get_row(b, token);
    if (!row) return -1;
    double rest = (u - b->trigger_rate) / (1 - b->trigger_rate) * row->total;
    size_t i = 0;
    while (i + 1 < row->count && (rest -= row->atoms[i].weight) >= 0) i++;
    return row->atoms[i].token;
}

bool data_backcopy_window(data_backcopy *b, data_random *random, size_t T, int32_t *inputs, int32_t *targets) {
    int32_t before = b->vocab, current = b->vocab;
    for (size_t t = 0; t < T; t++) {
        int32_t next = t == 0 ? b->triggers + (int32_t)data_random_below(random, (uint32_t)(b->vocab - b->triggers))
                       : current < b->triggers ? before
                                               : data_backcopy_draw(b, random, current);
        if (next < 0) return false;
        inputs[t] = current;
        targets[t] = next;
        before = current;
        current = next;
    }
    return true;
}

double data_backcopy_probability(data_backcopy *b, int32_t before, int32_t current, int32_t next) {
    int32_t V = b->vocab, K = b->triggers;
    if (current == V) return next >= K && next < V ? 1.0 / (V - K) : 0;
    if (current < K) return next == before;
    if (next < K) return b->trigger_rate / K;
    const data_backcopy_row *row = data_backcopy_get_row(b, current);
    if (!row) return NAN;
    for (size_t i = 0; i < row->count; i++)
        if (row->atoms[i].token == next) return (1 - b->trigger_rate) * row->atoms[i].weight / row->total;
    return 0;
}

/* Entropy of what follows `current`, in nats. With the rate r and the entropy H of the row,
 *
 *     -r ln(r / K) - (1 - r) ln(1 - r) + (1 - r) H
 */
static double datai_backcopy_entropy(data_backcopy *b, int32_t current) {
    if (current == b->vocab) return log(b->vocab - b->triggers);
    if (current < b->triggers) return 0;
    const data_backcopy_row *row = data_backcopy_get_row(b, current);
    if (!row) return NAN;
    double r = b->trigger_rate, from_triggers = r > 0 ? -r * log(r / b->triggers) : 0;
    return from_triggers + (1 - r) * (row->entropy - log(1 - r));
}

bool data_backcopy_loss(data_backcopy *b, size_t T, const int32_t *inputs, const int32_t *targets, double *actual,
                        double *expected) {
    *actual = *expected = 0;
    for (size_t t = 0; t < T; t++) {
        int32_t before = t > 0 ? inputs[t - 1] : b->vocab;
        *actual -= log(data_backcopy_probability(b, before, inputs[t], targets[t])) / (double)T;
        *expected += datai_backcopy_entropy(b, inputs[t]) / (double)T;
    }
    return !isnan(*actual) && !isnan(*expected);
}

#endif
