/* Attention of gated_attention_cuda.cuh against plain C, on tensor cores and in float32: odd sizes, groups of heads, more
 * keys than queries, sinks. The same file for a GPU and for the CPU by cuda_cpu.h.
 *
 * Each value has a bound of its own, from what is rounded on its way. The tensor-core version rounds q, k, v and dy: the
 * expected values are those of the rounded arrays. It then rounds P and dS, each by at most u = 2^-8 of itself, so that
 *
 *     |error of y_i|  <= u sum_j P_ij |v_j|             |error of dq_i| <= u sum_j |dS_ij| |k_j| / sqrt(D)
 *     |error of dv_j| <= u sum_i P_ij |dy_i|            |error of dk_j| <= u sum_i |dS_ij| |q_i| / sqrt(D)
 *
 * cuDNN's (make CUDNN=1) rounds its results as well, and the y that it is given for dy_i . y_i.
 *
 * All else is float32 in both versions: 1e-5 of the same sums, where dS_ij = P_ij (dy_i . v_j - dy_i . y_i) counts with the
 * absolute values of all its terms, since they cancel. */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_cuda.cuh"
#include "testing.h"
#include "device.h"
#if defined(GA_CUDNN) && defined(GAI_CUDA_CPU)
#include "cuda_cpu_control.h"
#endif

static const double FLOAT_ERROR = 1e-5, BF16_ERROR = 0x1p-8;

/* A copy on the device. */
static ga_real *to_device(const ga_real *host, size_t n) {
    ga_real *p = (ga_real *)device.allocate(device.state, n * sizeof *p);
    if (!p) fail_msg("no device memory");
    device.copy_in(device.state, p, host, n * sizeof *p);
    return p;
}

/* Room for a result: NaN, so that what is not written shows. */
static ga_real *result_on_device(size_t n) {
    ga_real *host = reals(n), *p;
    for (size_t i = 0; i < n; i++) host[i] = NAN;
    p = to_device(host, n);
    free(host);
    return p;
}

static void release(ga_real *p) {
    device.release(device.state, p);
}

static ga_real *as_read(const ga_real *x, size_t n, bool flash) {
    ga_real *copy = reals(n);
    for (size_t i = 0; i < n; i++) copy[i] = flash ? bf16_rounded(x[i]) : x[i];
    return copy;
}

/* ---- a problem, what plain C says of it, and how far a result may be from that ---------------------------------------- */

typedef struct {
    ga_shape n;
    bool flash, cudnn;
    size_t queries, keys, rows;
    ga_real *q, *k, *v, *dy, *sink;
    ga_real *y, *lse, *dq, *dk, *dv, *dsink;
    double *y_bound, *lse_bound, *dq_bound, *dk_bound, *dv_bound, *dsink_bound;
    char where[96];
} problem;

static double *doubles(size_t n) {
    double *x = (double *)calloc(n, sizeof *x);
    if (!x) fail_msg("out of memory");
    return x;
}

static double dot(const ga_real *a, const ga_real *b, size_t n, bool absolute) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += absolute ? fabs((double)a[i] * (double)b[i]) : (double)a[i] * (double)b[i];
    return sum;
}

/* Adds to the bounds what one query of one head gives to them; of the gradients too if S is T. */
static void add_bounds(problem *p, const ga_real *q, const ga_real *k, const ga_real *v, const ga_real *dy, size_t b,
                       size_t h, size_t i) {
    ga_shape n = p->n;
    size_t D = n.D, row = (b * n.HQ + h) * n.T + i, qi = ((b * n.T + i) * n.HQ + h) * D;
    double scale = 1 / sqrt((double)D), lse = (double)p->lse[row], u = p->flash ? BF16_ERROR : 0;
    double delta = dot(dy + qi, p->y + qi, D, false), delta_size = dot(dy + qi, p->y + qi, D, true);
    p->lse_bound[row] = FLOAT_ERROR * (1 + fabs(lse));
    if (p->sink) p->dsink_bound[h] += FLOAT_ERROR * exp((double)p->sink[h] - lse) * delta_size;
    for (size_t j = 0; j <= n.S - n.T + i; j++) {
        size_t kj = ((b * n.S + j) * n.HK + h / (n.HQ / n.HK)) * D;
        double P = exp(dot(q + qi, k + kj, D, false) * scale - lse), of_p = P * (u + FLOAT_ERROR);
        double of_ds = (u * P * (fabs(dot(dy + qi, v + kj, D, false) - delta) + (p->cudnn ? delta_size : 0)) +
                        FLOAT_ERROR * P * (dot(dy + qi, v + kj, D, true) + delta_size)) *
                       scale;
        for (size_t d = 0; d < D; d++) {
            p->y_bound[qi + d] += of_p * fabs((double)v[kj + d]);
            p->dv_bound[kj + d] += of_p * fabs((double)dy[qi + d]);
            p->dq_bound[qi + d] += of_ds * fabs((double)k[kj + d]);
            p->dk_bound[kj + d] += of_ds * fabs((double)q[qi + d]);
        }
    }
}

static problem make_problem(ga_shape n, double spread, bool with_sink) {
    problem p;
    memset(&p, 0, sizeof p);
    uint64_t random = n.T * 1000003 + n.S * 1009 + n.HQ * 101 + n.D;
    p.n = n, p.flash = bf16 && n.D <= 128 && n.D % 4 == 0;
    p.cudnn = p.flash && n.S == n.T && n.D % 8 == 0 && !with_sink && strstr(device.name, "cuDNN's attention");
    p.queries = n.B * n.T * n.HQ * n.D, p.keys = n.B * n.S * n.HK * n.D, p.rows = n.B * n.HQ * n.T;
    p.q = normal_reals(p.queries, spread, &random), p.k = normal_reals(p.keys, 1, &random);
    p.v = normal_reals(p.keys, 1, &random), p.dy = normal_reals(p.queries, 1, &random);
    p.sink = with_sink ? normal_reals(n.HQ, 2, &random) : NULL;
    p.y = reals(p.queries), p.lse = reals(p.rows), p.dq = reals(p.queries), p.dk = reals(p.keys), p.dv = reals(p.keys);
    p.dsink = normal_reals(n.HQ, 1, &random); /* it is added to */
    p.y_bound = doubles(p.queries), p.lse_bound = doubles(p.rows), p.dq_bound = doubles(p.queries);
    p.dk_bound = doubles(p.keys), p.dv_bound = doubles(p.keys), p.dsink_bound = doubles(n.HQ);
    snprintf(p.where, sizeof p.where, "%s, B %zu T %zu S %zu HQ %zu HK %zu D %zu%s", p.flash ? "bf16" : "f32", n.B, n.T,
             n.S, n.HQ, n.HK, n.D, with_sink ? ", sink" : "");
    return p;
}

/* Plain C's results, of the values as the products read them. */
static void solve(problem *p, ga_real *dsink) {
    ga_shape n = p->n;
    ga_real *q = as_read(p->q, p->queries, p->flash), *k = as_read(p->k, p->keys, p->flash),
            *v = as_read(p->v, p->keys, p->flash), *dy = as_read(p->dy, p->queries, p->flash),
            *scratch = reals(p->rows * (2 * n.D + 1));
    ga_sdpa_forward(p->y, p->lse, q, k, v, p->sink, n);
    if (n.S == n.T) ga_sdpa_backward(p->dq, p->dk, p->dv, dsink, scratch, dy, p->y, p->lse, q, k, v, p->sink, n);
    for (size_t h = 0; h < n.HQ; h++) p->dsink_bound[h] = FLOAT_ERROR * fabs((double)dsink[h]);
    for (size_t b = 0; b < n.B; b++)
        for (size_t h = 0; h < n.HQ; h++)
            for (size_t i = 0; i < n.T; i++) add_bounds(p, q, k, v, dy, b, h, i);
    double u = p->cudnn ? BF16_ERROR : 0;
    for (size_t i = 0; i < p->queries; i++) {
        p->y_bound[i] += u * fabs((double)p->y[i]);
        p->dq_bound[i] += u * fabs((double)p->dq[i]);
    }
    for (size_t i = 0; i < p->keys; i++) {
        p->dk_bound[i] += u * fabs((double)p->dk[i]);
        p->dv_bound[i] += u * fabs((double)p->dv[i]);
    }
    free(q), free(k), free(v), free(dy), free(scratch);
}

static void free_problem(problem *p) {
    ga_real *all[] = {p->q, p->k, p->v, p->dy, p->sink, p->y, p->lse, p->dq, p->dk, p->dv, p->dsink};
    double *bounds[] = {p->y_bound, p->lse_bound, p->dq_bound, p->dk_bound, p->dv_bound, p->dsink_bound};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
    for (size_t i = 0; i < COUNT(bounds); i++) free(bounds[i]);
}

/* Every value on the device within its bound. Bits that differ from `again`, of a second run, are no rounding. */
static void expect_within(const ga_real *on_device, const ga_real *again, const ga_real *expected, const double *bound,
                          size_t n, const char *what, const char *where) {
    ga_real *got = reals(n), *second = reals(n);
    device.copy_out(device.state, got, on_device, n * sizeof *got);
    device.copy_out(device.state, second, again, n * sizeof *second);
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double error = fabs((double)got[i] - (double)expected[i]) / (bound[i] + 1e-30);
        if (isnan(error) || error > worst) worst = error;
    }
    if (getenv("SDPA_VERBOSE")) printf("%s %s: %.3f of the bound\n", where, what, worst);
    expect_below(worst, 1, "%s of %s, as a share of its bound", what, where);
    if (memcmp(got, second, n * sizeof *got) != 0) fail_msg("%s of %s: other bits in a second run", what, where);
    free(got), free(second);
}

/* ---- the operators ------------------------------------------------------------------------------------------------------ */

typedef struct {
    ga_real *q, *k, *v, *dy, *sink, *y, *lse;
} inputs;

static inputs upload(const problem *p) {
    inputs in = {to_device(p->q, p->queries),
                 to_device(p->k, p->keys),
                 to_device(p->v, p->keys),
                 to_device(p->dy, p->queries),
                 p->sink ? to_device(p->sink, p->n.HQ) : NULL,
                 to_device(p->y, p->queries),
                 to_device(p->lse, p->rows)};
    return in;
}

static void release_inputs(inputs *in) {
    release(in->q), release(in->k), release(in->v), release(in->dy), release(in->sink), release(in->y),
        release(in->lse);
}

static void check_forward(const problem *p, const inputs *in) {
    ga_real *y[2], *lse[2];
    for (int run = 0; run < 2; run++) {
        y[run] = result_on_device(p->queries), lse[run] = result_on_device(p->rows);
        device.sdpa_forward(device.state, y[run], lse[run], in->q, in->k, in->v, in->sink, p->n);
    }
    expect_within(y[0], y[1], p->y, p->y_bound, p->queries, "y", p->where);
    expect_within(lse[0], lse[1], p->lse, p->lse_bound, p->rows, "lse", p->where);
    for (int run = 0; run < 2; run++) release(y[run]), release(lse[run]);
}

static void check_backward(const problem *p, const inputs *in, const ga_real *dsink_expected) {
    ga_real *dq[2], *dk[2], *dv[2], *dsink[2], *scratch[2];
    for (int run = 0; run < 2; run++) {
        dq[run] = result_on_device(p->queries), dk[run] = result_on_device(p->keys),
        dv[run] = result_on_device(p->keys);
        dsink[run] = to_device(p->dsink, p->n.HQ), scratch[run] = result_on_device(p->rows * (2 * p->n.D + 1));
        device.sdpa_backward(device.state, dq[run], dk[run], dv[run], dsink[run], scratch[run], in->dy, in->y, in->lse,
                             in->q, in->k, in->v, in->sink, p->n);
    }
    expect_within(dq[0], dq[1], p->dq, p->dq_bound, p->queries, "dq", p->where);
    expect_within(dk[0], dk[1], p->dk, p->dk_bound, p->keys, "dk", p->where);
    expect_within(dv[0], dv[1], p->dv, p->dv_bound, p->keys, "dv", p->where);
    expect_within(dsink[0], dsink[1], dsink_expected, p->dsink_bound, p->n.HQ, "dsink", p->where);
    for (int run = 0; run < 2; run++)
        release(dq[run]), release(dk[run]), release(dv[run]), release(dsink[run]), release(scratch[run]);
}

static void check_column(const problem *p, const inputs *in, size_t j) {
    ga_real *q = as_read(p->q, p->queries, p->flash), *k = as_read(p->k, p->keys, p->flash), *expected = reals(p->rows);
    double *bound = doubles(p->rows);
    ga_sdpa_column(expected, q, k, p->lse, j, p->n);
    for (size_t i = 0; i < p->rows; i++) bound[i] = 3 * FLOAT_ERROR * (double)expected[i];
    ga_real *column = result_on_device(p->rows);
    device.sdpa_column(device.state, column, in->q, in->k, in->lse, j, p->n);
    expect_within(column, column, expected, bound, p->rows, "column", p->where);
    release(column);
    free(q), free(k), free(expected), free(bound);
}

/* What a model of this shape tells the device when it is made; cuDNN then plans its attention. */
static void announce(ga_shape n) {
    ga_config c = ga_config_default();
    c.vocab_size = 2, c.d_model = 8, c.d_ff = 8, c.n_layers = 1;
    c.batch_size = n.B, c.max_seq_len = n.T, c.n_heads = n.HQ, c.n_kv_heads = n.HK, c.head_dim = n.D;
    device.own_bytes(device.state, &c, GA_TRAINING);
}

static void check(size_t B, size_t T, size_t S, size_t HQ, size_t HK, size_t D, double spread, bool with_sink) {
    ga_shape n = {B, T, S, HQ, HK, D};
    if (S == T && !with_sink) announce(n);
    problem p = make_problem(n, spread, with_sink);
    ga_real *dsink = as_read(p.dsink, HQ, false);
    solve(&p, dsink);
    inputs in = upload(&p);
    check_forward(&p, &in);
    if (S == T) check_backward(&p, &in, dsink);
    check_column(&p, &in, 0), check_column(&p, &in, S / 2), check_column(&p, &in, S - 1);
    release_inputs(&in);
    free(dsink);
    free_problem(&p);
}

static void test_tensor_cores(void **unused) {
    (void)unused;
    open_device(true);
    check(1, 1, 1, 2, 1, 32, 1, false);
    check(2, 3, 3, 2, 2, 16, 1, true);
    check(1, 17, 17, 4, 1, 24, 1, false); /* columns that do not exist */
    check(1, 63, 63, 2, 1, 64, 1, true);
    check(1, 65, 65, 2, 1, 32, 8, false); /* sharp: the largest score moves */
    check(1, 65, 65, 1, 1, 128, 1, true);
    check(1, 70, 70, 2, 1, 96, 1, false);
    check(2, 129, 129, 4, 2, 32, 1, true); /* one block sums a group */
    check(1, 129, 129, 4, 1, 16, 30, true);
    check(1, 200, 200, 4, 1, 64, 1, true); /* blocks of 128 queries */
    check(1, 130, 130, 4, 2, 128, 1, false);
    close_device();
}

static void test_tensor_cores_cached(void **unused) {
    (void)unused;
    open_device(true);
    check(2, 1, 65, 4, 2, 32, 1, true);
    check(1, 17, 74, 2, 1, 64, 1, false);
    check(1, 64, 128, 1, 1, 128, 1, false);
    check(1, 65, 130, 2, 2, 16, 1, true);
    check(1, 131, 150, 4, 2, 48, 1, true);
    close_device();
}

static void test_float(void **unused) {
    (void)unused;
    open_device(false);
    check(1, 1, 1, 2, 1, 32, 1, false);
    check(2, 3, 3, 2, 2, 6, 1, true);
    check(1, 17, 17, 4, 1, 24, 1, false);
    check(1, 63, 63, 2, 1, 64, 1, true);
    check(1, 65, 65, 2, 1, 34, 8, false);
    check(1, 65, 65, 1, 1, 128, 1, true);
    check(2, 129, 129, 4, 2, 16, 1, true);
    check(1, 20, 20, 2, 1, 256, 1, true);
    check(1, 17, 129, 2, 1, 130, 1, true);
    close_device();
}

/* What the tensor-core version does not take: it falls back to float32. */
static void test_other_heads(void **unused) {
    (void)unused;
    open_device(true);
    check(1, 17, 17, 2, 1, 18, 1, true);
    check(1, 5, 5, 2, 2, 132, 1, false);
    close_device();
}

#if defined(GA_CUDNN) && defined(GAI_CUDA_CPU)
/* cuDNN runs what was announced and what it has; the device's name says so. */
static void test_cudnn(void **unused) {
    (void)unused;
    open_device(true);
    assert_null(strstr(device.name, "attention"));
    long runs = cucpu_cudnn_runs();
    check(2, 65, 65, 4, 2, 32, 1, false);
    check(1, 17, 17, 6, 1, 64, 1, false);
    assert_int_equal(cucpu_cudnn_runs() - runs, 2 * 4); /* twice each, forward and backward */
    assert_non_null(strstr(device.name, ", cuDNN's attention"));
    runs = cucpu_cudnn_runs();
    check(1, 17, 17, 6, 1, 64, 1, true); /* a sink */
    check(1, 7, 33, 2, 1, 64, 1, false); /* keys of a cache */
    check(1, 9, 9, 2, 1, 96, 1, false);  /* refused */
    check(1, 9, 9, 2, 1, 12, 1, false);  /* not asked */
    assert_int_equal(cucpu_cudnn_runs() - runs, 0);
    close_device();
    open_device(true);
    check(1, 9, 9, 2, 1, 96, 1, false);
    assert_non_null(strstr(device.name, ", own attention (cuDNN: no engine for head size 96)"));
    close_device();
    open_device(false);
    check(1, 9, 9, 2, 1, 32, 1, false);
    assert_null(strstr(device.name, "attention"));
    close_device();
    assert_int_equal(cucpu_cudnn_runs() - runs, 0);
}

/* Each call fails once: an operator's failure is heard, and without a handle attention is our own. */
static void test_cudnn_failures(void **unused) {
    (void)unused;
    ga_shape n = {1, 9, 9, 2, 1, 32};
    ga_error e;
    long heard = 0, own = 0, calls = 1;
    for (long fail = 0; fail <= calls; fail++) {
        ga_cuda_settings settings = {.bf16 = true};
        cucpu_fail_call(fail);
        if (ga_device_cuda(&device, settings, &e) != GA_OK) continue;
        announce(n);
        ga_real *x = (ga_real *)device.allocate(device.state, 9 * 2 * 32 * sizeof *x);
        if (x) device.sdpa_forward(device.state, x, x, x, x, x, NULL, n);
        if (fail == 0) calls = cucpu_calls();
        heard += device.status(device.state, &e) != GA_OK && strstr(e.text, "plan->graph.execute") != NULL;
        own += strstr(device.name, "own attention (cuDNN: CUDNN_STATUS_NOT_INITIALIZED)") != NULL;
        cucpu_fail_call(0);
        device.release(device.state, x);
        ga_device_cuda_destroy(&device);
    }
    assert_int_equal(heard, 1);
    assert_int_equal(own, 1);
}
#endif

int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tensor_cores),
        cmocka_unit_test(test_tensor_cores_cached),
        cmocka_unit_test(test_float),
        cmocka_unit_test(test_other_heads),
#if defined(GA_CUDNN) && defined(GAI_CUDA_CPU)
        cmocka_unit_test(test_cudnn),
        cmocka_unit_test(test_cudnn_failures),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
