/* What the C tests share: cmocka, numbers that are the same everywhere, comparisons with a message, a configuration
 * from one line. Include it after gated_attention.h. */
#ifndef TESTING_H
#define TESTING_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static inline void use_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

/* One thread, since the sizes are tiny and waiting threads are slow on a busy machine; or OMP_NUM_THREADS. */
static inline void use_default_threads(void) {
    const char *wanted = getenv("OMP_NUM_THREADS");
    int n = wanted ? atoi(wanted) : 1;
    use_threads(n > 0 ? n : 1);
}

static inline ga_real *reals(size_t n) {
    ga_real *x = n < SIZE_MAX / sizeof *x ? (ga_real *)calloc(n ? n : 1, sizeof *x) : NULL;
    if (!x) fail_msg("out of memory");
    return x;
}

/* x as a bfloat16 product reads it: to nearest even. */
static inline float bf16_rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

static inline void fill_normal(ga_real *x, size_t n, double mean, double deviation, uint64_t *random) {
    for (size_t i = 0; i < n; i++) x[i] = (ga_real)(mean + deviation * ga_random_normal(random));
}

static inline ga_real *normal_reals(size_t n, double deviation, uint64_t *random) {
    ga_real *x = reals(n);
    fill_normal(x, n, 0, deviation, random);
    return x;
}

static inline void fill_tokens(int32_t *tokens, size_t n, size_t V, uint64_t *random) {
    for (size_t i = 0; i < n; i++) tokens[i] = (int32_t)(ga_random_bits(random) % V);
}

static inline double norm_of(const ga_real *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

/* ||a - b|| / ||b||; where b is zero, ||a||. */
static inline double difference(const ga_real *a, const double *b, size_t n) {
    double error = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        error += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += b[i] * b[i];
    }
    return size > 0 ? sqrt(error / size) : sqrt(error);
}

/* A negated comparison, so that NaN fails. */
static inline void expect_below(double value, double bound, const char *format, ...) {
    if (value < bound) return;
    char what[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    fail_msg("%s: %.3g, must be below %.3g", what, value, bound);
}

/* Relative to `expected`, and absolute where that is below 1. */
static inline void expect_near(double value, double expected, double tolerance, const char *what) {
    double error = fabs(value - expected);
    if (!(error <= tolerance * fmax(1, fabs(expected)))) fail_msg("%s is %.9g, not %.9g", what, value, expected);
}

static inline void expect_ok(ga_result result, const ga_error *e) {
    if (result != GA_OK) fail_msg("result %d: %s", (int)result, e->text);
}

/* "key=value key=value" on top of what c has. */
static inline void configure(ga_config *c, const char *settings) {
    char text[1024];
    assert_true(strlen(settings) < sizeof text);
    strcpy(text, settings);
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) {
        char *value = strchr(word, '=');
        assert_non_null(value);
        *value++ = '\0';
        ga_error e;
        expect_ok(ga_config_set(c, word, value, &e), &e);
    }
}

static inline ga_model *create(const ga_config *c, ga_mode mode) {
    ga_error e;
    ga_model *m = ga_create(c, NULL, mode, &e);
    if (!m) fail_msg("ga_create: %s", e.text);
    return m;
}

/* Weights far from their start: norms are not 1, free gate parameters not 0, so that no factor hides behind another. */
static inline void randomise_weights(ga_model *m, uint64_t seed) {
    for (size_t i = 0; i < m->n_tensors; i++) {
        const ga_tensor *t = &m->tensors[i];
        uint64_t random = seed * 1000 + i;
        bool vector = t->start == GA_START_ONES;
        double deviation = vector                         ? 0.3
                           : t->id == GA_TENSOR_gate_free ? 0.8
                           : t->id == GA_TENSOR_embed     ? 0.7
                                                          : 1 / sqrt((double)t->columns);
        fill_normal(m->weights + t->offset, t->rows * t->columns, vector ? 1 : 0, deviation, &random);
    }
}

#endif
