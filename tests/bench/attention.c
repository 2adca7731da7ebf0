/* Seconds and bytes of causal attention, forward and backward, over one sequence: 8 heads of 64, as in rtx4060.cfg
 * with as many key-value heads as query heads.
 *
 *     attention float32|bf16 T        prints: seconds bytes
 *
 * Seconds: the median of several passes. Bytes: how much the process grew by inputs, outputs, gradients and scratch.
 * Exit code 3: this processor has no bfloat16 products. */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_x86.h"

#include <sys/resource.h>

enum { HEADS = 8, HEAD_DIM = 64, WARM_UP_T = 64, MOST_PASSES = 64, NO_BF16 = 3 };
static const double MEASURED_SECONDS = 0.5;

typedef struct {
    ga_shape n;
    ga_real *q, *k, *v, *y, *lse, *dy, *dq, *dk, *dv, *scratch;
} attention;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double peak_bytes(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (double)usage.ru_maxrss;
#else
    return 1024 * (double)usage.ru_maxrss;
#endif
}

static ga_real *reals(const ga_device *d, size_t n) {
    ga_real *x = d->allocate(d->state, n * sizeof *x);
    if (x) return x;
    fputs("attention: out of memory\n", stderr);
    exit(1);
}

static ga_real *random_reals(const ga_device *d, size_t n, uint64_t seed) {
    ga_real *x = reals(d, n);
    for (size_t i = 0; i < n; i++) x[i] = (ga_real)ga_random_normal(&seed);
    return x;
}

static attention attention_create(const ga_device *d, size_t T) {
    size_t n = T * HEADS * HEAD_DIM;
    return (attention){.n = {.B = 1, .T = T, .S = T, .HQ = HEADS, .HK = HEADS, .D = HEAD_DIM},
                       .q = random_reals(d, n, 1),
                       .k = random_reals(d, n, 2),
                       .v = random_reals(d, n, 3),
                       .dy = random_reals(d, n, 4),
                       .y = reals(d, n),
                       .lse = reals(d, T * HEADS),
                       .dq = reals(d, n),
                       .dk = reals(d, n),
                       .dv = reals(d, n),
                       .scratch = reals(d, HEADS * T * (2 * HEAD_DIM + 1))};
}

static void attention_destroy(const ga_device *d, attention *a) {
    ga_real *all[] = {a->q, a->k, a->v, a->dy, a->y, a->lse, a->dq, a->dk, a->dv, a->scratch};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) d->release(d->state, all[i]);
}

static double pass(const ga_device *d, attention *a) {
    double begin = now();
    d->sdpa_forward(d->state, a->y, a->lse, a->q, a->k, a->v, NULL, a->n);
    d->sdpa_backward(d->state, a->dq, a->dk, a->dv, NULL, a->scratch, a->dy, a->y, a->lse, a->q, a->k, a->v, NULL,
                     a->n);
    return now() - begin;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_pass(const ga_device *d, attention *a) {
    double seconds[MOST_PASSES], spent = 0;
    size_t n = 0;
    while (n < MOST_PASSES && spent < MEASURED_SECONDS) spent += seconds[n++] = pass(d, a);
    qsort(seconds, n, sizeof seconds[0], ascending);
    return seconds[n / 2];
}

/* Code, threads and buffers that do not depend on T are there before anything is measured. */
static void warm_up(const ga_device *d) {
    attention a = attention_create(d, WARM_UP_T);
    pass(d, &a);
    attention_destroy(d, &a);
}

int main(int argc, char **argv) {
    char *end = NULL;
    size_t T = argc == 3 ? strtoul(argv[2], &end, 10) : 0;
    bool bf16 = argc == 3 && strcmp(argv[1], "bf16") == 0;
    if (T == 0 || T > (1 << 20) || *end || !(bf16 || strcmp(argv[1], "float32") == 0)) {
        fputs("usage: attention float32|bf16 T   (T from 1 to 1048576)\n", stderr);
        return 2;
    }
    ga_device d;
    ga_error e;
    if (ga_device_x86(&d, (ga_x86_settings){.bf16 = bf16}, &e)) {
        fprintf(stderr, "attention: %s\n", e.text);
        return 1;
    }
    if (bf16 && !ga_device_x86_bf16(&d)) return NO_BF16;
    warm_up(&d);
    double before = peak_bytes();
    attention a = attention_create(&d, T);
    double seconds = median_pass(&d, &a);
    printf("%.6f %.0f\n", seconds, peak_bytes() - before);
    attention_destroy(&d, &a);
    ga_device_x86_destroy(&d);
    return 0;
}
