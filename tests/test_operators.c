/* Every operator alone, in float, at odd sizes: against the formula written out as plain loops in double; the same bits
 * with 1, 2 and 3 threads; NaN in, NaN out. The backward operators' derivatives are test_gradients.c.
 *
 *     test_operators [PATTERN]
 */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"
#include "testing.h"

static const size_t sizes[] = {1, 3, 17, 63, 65, 129};
static const double tolerance = 2e-6; /* norm of the difference over norm, float against double */

static double *doubles(size_t n) {
    double *x = (double *)calloc(n ? n : 1, sizeof *x);
    if (!x) fail_msg("out of memory");
    return x;
}

static void expect_close(const ga_real *a, const double *b, size_t n, const char *what) {
    expect_below(difference(a, b, n), tolerance, "%s, %zu values", what, n);
}

static bool all_nan(const ga_real *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!isnan(x[i])) return false;
    return true;
}

static double sigmoid(double x) {
    return 1 / (1 + exp(-x));
}

/* ---- the exponential ----------------------------------------------------------------------------------------------- */

static void test_exp(void **state) {
    (void)state;
    double worst = 0;
    for (float x = -86.9f; x < 88.6f; x += 0.00137f) worst = fmax(worst, fabs((double)gai_exp(x) / exp((double)x) - 1));
    expect_below(worst, 2.5e-7, "relative error of e^x");
    assert_true(gai_exp(0) == 1);
    assert_true(gai_exp(-1e30f) == 0 && gai_exp(-INFINITY) == 0);
    assert_true(isinf(gai_exp(1000)) && isinf(gai_exp(INFINITY)));
    assert_true(isnan(gai_exp(NAN)));
    assert_true(gai_sigmoid(-200) == 0 && gai_sigmoid(200) == 1 && gai_sigmoid(0) == 0.5f);
}

/* ---- linear -------------------------------------------------------------------------------------------------------- */

static void check_linear(size_t M, size_t O, size_t I) {
    uint64_t random = M * 10007 + O * 101 + I;
    ga_real *x = normal_reals(M * I, 1, &random), *w = normal_reals(O * I, 1, &random);
    ga_real *dy = normal_reals(M * O, 1, &random), *dw = normal_reals(O * I, 1, &random);
    ga_real *y = normal_reals(M * O, 1, &random), *dx = normal_reals(M * I, 1, &random); /* to be overwritten */
    double *ry = doubles(M * O), *rdx = doubles(M * I), *rdw = doubles(O * I);
    for (size_t i = 0; i < O * I; i++) rdw[i] = (double)dw[i];
    for (size_t m = 0; m < M; m++)
        for (size_t o = 0; o < O; o++)
            for (size_t i = 0; i < I; i++) {
                ry[m * O + o] += (double)x[m * I + i] * (double)w[o * I + i];
                rdx[m * I + i] += (double)dy[m * O + o] * (double)w[o * I + i];
                rdw[o * I + i] += (double)dy[m * O + o] * (double)x[m * I + i];
            }
    ga_linear_forward(y, x, w, M, O, I);
    expect_close(y, ry, M * O, "linear y");
    ga_real *again = reals(O * I);
    memcpy(again, dw, O * I * sizeof *dw);
    ga_linear_backward(dx, dw, dy, x, w, M, O, I);
    expect_close(dx, rdx, M * I, "linear dx");
    expect_close(dw, rdw, O * I, "linear dw");
    ga_linear_backward(NULL, again, dy, x, w, M, O, I);
    assert_memory_equal(again, dw, O * I * sizeof *dw);
    free(x), free(w), free(dy), free(dw), free(y), free(dx), free(ry), free(rdx), free(rdw), free(again);
}

static void test_linear(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (size_t j = 0; j < COUNT(sizes); j++)
            for (size_t k = 0; k < COUNT(sizes); k++) check_linear(sizes[i], sizes[j], sizes[k]);
    check_linear(2, 5, 700);
    check_linear(600, 70, 300); /* beyond every block size */
}

static void test_linear_nan(void **state) {
    (void)state;
    uint64_t random = 1;
    enum { M = 19, O = 33, I = 17 };
    ga_real *x = normal_reals(M * I, 1, &random), *w = reals(O * I), *y = reals(M * O); /* 0 * NaN is NaN */
    for (size_t rows = 1; rows <= M; rows += 9) {
        x[(rows - 1) * I + 4] = NAN;
        ga_linear_forward(y, x, w, rows, O, I);
        assert_true(all_nan(y + (rows - 1) * O, O));
        for (size_t i = 0; i < (rows - 1) * O; i++) assert_true(y[i] == 0);
        x[(rows - 1) * I + 4] = 0;
    }
    free(x), free(w), free(y);
}

/* ---- embedding, add, clip ------------------------------------------------------------------------------------------ */

static void test_embedding(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (size_t j = 0; j < COUNT(sizes); j++) {
            size_t N = sizes[i], C = sizes[j], V = 7;
            uint64_t random = N * 1000 + C;
            int32_t tokens[129];
            fill_tokens(tokens, N, V, &random);
            ga_real *w = normal_reals(V * C, 1, &random), *x = reals(N * C);
            ga_real *dx = normal_reals(N * C, 1, &random), *dw = normal_reals(V * C, 1, &random);
            double *rdw = doubles(V * C);
            for (size_t v = 0; v < V * C; v++) rdw[v] = (double)dw[v];
            for (size_t n = 0; n < N * C; n++) rdw[(size_t)tokens[n / C] * C + n % C] += (double)dx[n];
            ga_embedding_forward(x, tokens, w, N, C);
            for (size_t n = 0; n < N * C; n++) assert_true(x[n] == w[(size_t)tokens[n / C] * C + n % C]);
            ga_embedding_backward(dw, tokens, dx, N, C);
            expect_close(dw, rdw, V * C, "embedding dw");
            free(w), free(x), free(dx), free(dw), free(rdw);
        }
}

static void test_add(void **state) {
    (void)state;
    ga_real a[] = {1, -2, NAN, INFINITY}, b[] = {0.5f, 2, 1, 1}, y[4];
    ga_add(y, a, b, 4);
    assert_true(y[0] == 1.5f && y[1] == 0 && isnan(y[2]) && isinf(y[3]));
    ga_add(a, a, b, 2);
    assert_true(a[0] == 1.5f && a[1] == 0);
}

static void test_clip(void **state) {
    (void)state;
    const ga_real x[] = {-3, -2, -1, 0, 1, 2, 3, NAN, INFINITY, -INFINITY}, dy[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    static const ga_real y[] = {-2, -2, -1, 0, 1, 2, 2}, dx[] = {0, 2, 3, 4, 5, 6, 0};
    ga_real out[10], d[10];
    ga_clip_forward(out, x, 10, 2);
    ga_clip_backward(d, dy, x, 10, 2);
    assert_memory_equal(out, y, sizeof y);
    assert_memory_equal(d, dx, sizeof dx);
    assert_true(isnan(out[7]) && out[8] == 2 && out[9] == -2 && d[8] == 0 && d[9] == 0);
}

/* ---- norms --------------------------------------------------------------------------------------------------------- */

static void check_rmsnorm(size_t N, size_t C, double eps) {
    uint64_t random = N * 1000 + C;
    ga_real *x = normal_reals(N * C, 0.1, &random), *w = normal_reals(C, 1, &random),
            *dh = normal_reals(N * C, 1, &random);
    ga_real *h = reals(N * C), *rstd = reals(N), *dx = normal_reals(N * C, 1, &random),
            *dw = normal_reals(C, 1, &random);
    ga_real *sum = reals(N * C);
    double *rh = doubles(N * C), *rr = doubles(N), *rdx = doubles(N * C), *rdw = doubles(C), *rsum = doubles(N * C);
    for (size_t c = 0; c < C; c++) rdw[c] = (double)dw[c];
    for (size_t n = 0; n < N; n++) {
        double square = 0, dot = 0;
        for (size_t c = n * C; c < n * C + C; c++) square += (double)x[c] * (double)x[c] / (double)C;
        rr[n] = 1 / sqrt(square + eps);
        for (size_t c = 0; c < C; c++) dot += (double)w[c] * (double)dh[n * C + c] * (double)x[n * C + c];
        for (size_t c = 0; c < C; c++) {
            size_t i = n * C + c;
            rh[i] = (double)w[c] * (double)x[i] * rr[n];
            rdx[i] = (double)w[c] * (double)dh[i] * rr[n] - (double)x[i] * dot * pow(rr[n], 3) / (double)C;
            rsum[i] = (double)dx[i] + rdx[i];
            rdw[c] += (double)dh[i] * (double)x[i] * rr[n];
        }
    }
    ga_rmsnorm_forward(h, rstd, x, w, N, C, (ga_real)eps);
    expect_close(h, rh, N * C, "rmsnorm h");
    expect_close(rstd, rr, N, "rmsnorm rstd");
    memcpy(sum, dx, N * C * sizeof *dx);
    ga_rmsnorm_backward(sum, dw, dh, x, w, rstd, N, C, true);
    expect_below(difference(sum, rsum, N * C), 1e-5, "rmsnorm dx, added (%zu, %zu)", N, C);
    expect_below(difference(dw, rdw, C), 1e-5, "rmsnorm dw (%zu, %zu)", N, C);
    ga_rmsnorm_backward(dx, dw, dh, x, w, rstd, N, C, false);
    expect_below(difference(dx, rdx, N * C), 1e-5, "rmsnorm dx (%zu, %zu)", N, C);
    /* in place, as the backward pass of the sandwich norm may do */
    ga_rmsnorm_backward(dh, dw, dh, x, w, rstd, N, C, false);
    expect_below(difference(dh, rdx, N * C), 1e-5, "rmsnorm dx over dh (%zu, %zu)", N, C);
    free(x), free(w), free(dh), free(h), free(rstd), free(dx), free(dw), free(sum);
    free(rh), free(rr), free(rdx), free(rdw), free(rsum);
}

static void test_rmsnorm(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (size_t j = 0; j < COUNT(sizes); j++) {
            check_rmsnorm(sizes[i], sizes[j], 1e-2);
            check_rmsnorm(sizes[i], sizes[j] + 1, 1e-6);
        }
    ga_real x[6] = {1, NAN, 2, 1, 2, 3}, w[3] = {1, 1, 1}, h[6], rstd[2];
    ga_rmsnorm_forward(h, rstd, x, w, 2, 3, 1e-6f);
    assert_true(all_nan(h, 3) && isnan(rstd[0]) && isfinite(h[3]) && isfinite(rstd[1]));
}

/* ---- heads: QK-norm and RoPE --------------------------------------------------------------------------------------- */

/* cos and sin of D/2 angles p * base^(-2i/D) for each position. */
static ga_real *rope_table(size_t T, size_t D, double base) {
    ga_real *rope = reals(T * D);
    for (size_t p = 0; p < T; p++)
        for (size_t i = 0; i < D / 2; i++) {
            double angle = (double)p * pow(base, -2.0 * (double)i / (double)D);
            rope[p * D + i] = (ga_real)cos(angle);
            rope[p * D + D / 2 + i] = (ga_real)sin(angle);
        }
    return rope;
}

static void check_heads(size_t B, size_t T, size_t H, size_t D, bool normed, bool turned) {
    uint64_t random = T * 1000 + D * 10 + H;
    size_t N = B * T, stride = H * D + 5;
    double eps = 1e-2;
    ga_real *x = normal_reals(N * stride, 1, &random), *w = normal_reals(D, 1, &random), *y = reals(N * H * D);
    ga_real *rope = rope_table(T, D, 100);
    double *ry = doubles(N * H * D);
    for (size_t n = 0; n < N; n++)
        for (size_t h = 0; h < H; h++) {
            const ga_real *xh = x + n * stride + h * D;
            double square = 0, u[GA_MAX_HEAD_DIM], *yh = ry + (n * H + h) * D;
            for (size_t i = 0; i < D; i++) square += (double)xh[i] * (double)xh[i] / (double)D;
            for (size_t i = 0; i < D; i++)
                u[i] = normed ? (double)w[i] * (double)xh[i] / sqrt(square + eps) : (double)xh[i];
            for (size_t i = 0; i < D / 2; i++) {
                double angle = turned ? (double)(n % T) * pow(100, -2.0 * (double)i / (double)D) : 0;
                yh[i] = u[i] * cos(angle) - u[i + D / 2] * sin(angle);
                yh[i + D / 2] = u[i + D / 2] * cos(angle) + u[i] * sin(angle);
            }
        }
    ga_heads_forward(y, x, stride, normed ? w : NULL, turned ? rope : NULL, B, T, H, D, (ga_real)eps);
    expect_close(y, ry, N * H * D, "heads y");
    free(x), free(w), free(y), free(rope), free(ry);
}

static void test_heads(void **state) {
    (void)state;
    static const size_t dims[] = {2, 6, 64, 130, 256};
    for (size_t i = 0; i < COUNT(dims); i++)
        for (int flags = 0; flags < 4; flags++) {
            check_heads(1, 1, 1, dims[i], flags & 1, flags & 2);
            check_heads(3, 17, 3, dims[i], flags & 1, flags & 2);
        }
    ga_real x[4] = {1, NAN, 2, 1}, w[2] = {1, 1}, y[4];
    ga_heads_forward(y, x, 2, w, NULL, 1, 2, 1, 2, 1e-6f);
    assert_true(all_nan(y, 2) && isfinite(y[2]));
}

/* ---- attention ----------------------------------------------------------------------------------------------------- */

typedef struct {
    ga_shape n;
    ga_real *q, *k, *v, *dy, *sink;             /* sink (HQ), or NULL */
    double *y, *lse, *p, *dq, *dk, *dv, *dsink; /* p (B, HQ, T, S) */
} attention;

static void free_attention(attention *a) {
    free(a->q), free(a->k), free(a->v), free(a->dy), free(a->sink);
    free(a->y), free(a->lse), free(a->p), free(a->dq), free(a->dk), free(a->dv), free(a->dsink);
}

/* The whole matrix of one head, forward and backward. */
static void attend(attention *a, size_t b, size_t h) {
    ga_shape n = a->n;
    size_t kv = h / (n.HQ / n.HK);
    double scale = 1 / sqrt((double)n.D);
    for (size_t i = 0; i < n.T; i++) {
        size_t row = ((b * n.T + i) * n.HQ + h) * n.D, visible = n.S - n.T + i + 1;
        double *p = a->p + ((b * n.HQ + h) * n.T + i) * n.S, sum = 0, delta = 0;
        double sink = a->sink ? (double)a->sink[h] : -INFINITY, top = sink;
        for (size_t j = 0; j < visible; j++) {
            size_t column = ((b * n.S + j) * n.HK + kv) * n.D;
            for (size_t d = 0; d < n.D; d++) p[j] += (double)a->q[row + d] * (double)a->k[column + d] * scale;
            top = fmax(top, p[j]);
        }
        for (size_t j = 0; j < visible; j++) sum += exp(p[j] - top);
        sum += exp(sink - top);
        a->lse[(b * n.HQ + h) * n.T + i] = top + log(sum);
        for (size_t j = 0; j < visible; j++) {
            p[j] = exp(p[j] - top) / sum;
            for (size_t d = 0; d < n.D; d++)
                a->y[row + d] += p[j] * (double)a->v[((b * n.S + j) * n.HK + kv) * n.D + d];
        }
        for (size_t d = 0; d < n.D; d++) delta += (double)a->dy[row + d] * a->y[row + d];
        a->dsink[h] -= exp(sink - top) / sum * delta;
        for (size_t j = 0; j < visible; j++) {
            size_t column = ((b * n.S + j) * n.HK + kv) * n.D;
            double dp = 0;
            for (size_t d = 0; d < n.D; d++) {
                dp += (double)a->dy[row + d] * (double)a->v[column + d];
                a->dv[column + d] += p[j] * (double)a->dy[row + d];
            }
            for (size_t d = 0; d < n.D; d++) {
                a->dq[row + d] += p[j] * (dp - delta) * (double)a->k[column + d] * scale;
                a->dk[column + d] += p[j] * (dp - delta) * (double)a->q[row + d] * scale;
            }
        }
    }
}

static attention make_attention(size_t B, size_t T, size_t S, size_t HQ, size_t HK, size_t D, double spread,
                                bool with_sink) {
    attention a = {.n = {B, T, S, HQ, HK, D}};
    uint64_t random = T * 1000 + S + HQ * 10 + D;
    size_t queries = B * T * HQ * D, keys = B * S * HK * D;
    a.q = normal_reals(queries, spread, &random), a.dy = normal_reals(queries, 1, &random);
    a.k = normal_reals(keys, 1, &random), a.v = normal_reals(keys, 1, &random);
    if (with_sink) a.sink = normal_reals(HQ, 2, &random);
    a.y = doubles(queries), a.dq = doubles(queries), a.dk = doubles(keys), a.dv = doubles(keys), a.dsink = doubles(HQ);
    a.lse = doubles(B * HQ * T), a.p = doubles(B * HQ * T * S);
    for (size_t b = 0; b < B; b++)
        for (size_t h = 0; h < HQ; h++) attend(&a, b, h);
    return a;
}

static void check_columns(const attention *a, const ga_real *lse) {
    ga_shape n = a->n;
    size_t rows = n.B * n.HQ * n.T;
    ga_real *p = reals(rows);
    double largest = 0; /* a float near 400 is exact to 3e-5, and so is its exponential */
    for (size_t row = 0; row < rows; row++) largest = fmax(largest, fabs(a->lse[row]));
    for (size_t j = 0; j < n.S; j += 1 + n.S / 9) {
        ga_sdpa_column(p, a->q, a->k, lse, j, n);
        for (size_t row = 0; row < rows; row++)
            expect_near((double)p[row], a->p[row * n.S + j], 5e-6 + 3e-7 * largest, "attention probability");
    }
    free(p);
}

static void check_sdpa_case(size_t B, size_t T, size_t S, size_t HQ, size_t HK, size_t D, double spread,
                            bool with_sink) {
    attention a = make_attention(B, T, S, HQ, HK, D, spread, with_sink);
    size_t queries = B * T * HQ * D, keys = B * S * HK * D;
    uint64_t random = 1; /* what stands in the outputs before must not matter */
    ga_real *y = normal_reals(queries, 1, &random), *lse = normal_reals(B * HQ * T, 1, &random);
    ga_sdpa_forward(y, lse, a.q, a.k, a.v, a.sink, a.n);
    expect_below(difference(y, a.y, queries), 5e-6, "sdpa y, B %zu T %zu S %zu HQ %zu HK %zu D %zu", B, T, S, HQ, HK,
                 D);
    for (size_t i = 0; i < B * HQ * T; i++) expect_near((double)lse[i], a.lse[i], 5e-6, "sdpa lse");
    check_columns(&a, lse);
    if (S == T) {
        ga_real *dq = normal_reals(queries, 1, &random), *dk = normal_reals(keys, 1, &random);
        ga_real *dv = normal_reals(keys, 1, &random), *scratch = normal_reals(B * HQ * T * (2 * D + 1), 1, &random);
        ga_real *dsink = reals(HQ);
        for (size_t h = 0; h < HQ; h++) dsink[h] = 3; /* it is added to */
        ga_sdpa_backward(dq, dk, dv, dsink, scratch, a.dy, y, lse, a.q, a.k, a.v, a.sink, a.n);
        for (size_t h = 0; h < HQ; h++)
            expect_near((double)dsink[h], 3 + (with_sink ? a.dsink[h] : 0), 2e-5, "sdpa dsink");
        expect_below(difference(dv, a.dv, keys), 5e-6, "sdpa dv, T %zu D %zu", T, D);
        if (T > 1 || with_sink) {
            expect_below(difference(dq, a.dq, queries), 2e-5, "sdpa dq, T %zu D %zu", T, D);
            expect_below(difference(dk, a.dk, keys), 2e-5, "sdpa dk, T %zu D %zu", T, D);
        } else { /* one key: the softmax is constant */
            expect_below(norm_of(dq, queries), 1e-4, "sdpa dq of one position");
            expect_below(norm_of(dk, keys), 1e-4, "sdpa dk of one position");
        }
        free(dq), free(dk), free(dv), free(dsink), free(scratch);
    }
    free(y), free(lse);
    free_attention(&a);
}

static void check_sdpa(size_t B, size_t T, size_t S, size_t HQ, size_t HK, size_t D, double spread) {
    check_sdpa_case(B, T, S, HQ, HK, D, spread, false);
    check_sdpa_case(B, T, S, HQ, HK, D, spread, true);
}

static void test_sdpa(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++) {
        check_sdpa(2, sizes[i], sizes[i], 4, 2, 6, 1);
        check_sdpa(1, sizes[i], sizes[i], 3, 1, 18, 1);
        check_sdpa(1, sizes[i], sizes[i], 2, 2, 64, 8); /* sharp */
    }
    check_sdpa(1, 128, 128, 2, 1, 2, 1);
    check_sdpa(1, 64, 64, 1, 1, 256, 1);
    check_sdpa(1, 70, 70, 1, 1, 130, 40); /* scores of hundreds: the running maximum is needed */
    check_sdpa(2, 300, 300, 2, 1, 10, 1);
}

/* Queries that follow keys from a cache. */
static void test_sdpa_cached(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (size_t j = 0; j < COUNT(sizes); j++)
            if (sizes[j] >= sizes[i]) check_sdpa(1, sizes[i], sizes[j], 4, 2, 8, 1);
    check_sdpa(2, 5, 300, 2, 1, 6, 1);
    check_sdpa(2, 1, 64, 2, 2, 6, 1);
    check_sdpa(1, 64, 128, 2, 1, 6, 1);
}

static void test_sdpa_nan(void **state) {
    (void)state;
    attention a = make_attention(1, 70, 70, 2, 1, 6, 1, false);
    ga_real *y = reals(70 * 12), *lse = reals(140);
    a.q[(66 * 2 + 1) * 6 + 3] = NAN; /* query 66 of head 1 */
    ga_sdpa_forward(y, lse, a.q, a.k, a.v, NULL, a.n);
    for (size_t i = 0; i < 70; i++)
        for (size_t h = 0; h < 2; h++) {
            bool bad = i == 66 && h == 1;
            assert_true(bad ? all_nan(y + (i * 2 + h) * 6, 6) : isfinite(y[(i * 2 + h) * 6]));
            assert_true(isnan(lse[h * 70 + i]) == bad);
        }
    a.q[(66 * 2 + 1) * 6 + 3] = 0;
    a.k[65 * 6] = NAN; /* the second tile: queries 65 on */
    ga_sdpa_forward(y, lse, a.q, a.k, a.v, NULL, a.n);
    for (size_t i = 0; i < 70; i++) assert_true(isnan(lse[i]) == (i >= 65));
    assert_true(all_nan(y + 65 * 12, 5 * 12));
    free(y), free(lse);
    free_attention(&a);
}

/* ---- switch heads --------------------------------------------------------------------------------------------------- */

/* Of three experts two are chosen; of equal ones the first. */
static void test_switch(void **state) {
    (void)state;
    ga_switch w = {1, 2, 3, 2};
    const ga_real x[] = {1, 2, 10, 20, 100, 200}, one[] = {0, -1, 0, 0, 0, 0}, other[] = {0, 0, 0, 0, 0, 0};
    ga_real y[2], dx[6], ds[6], dy[] = {1, 3};
    ga_switch_forward(y, x, one, 6, 1, w);
    expect_near((double)y[0], 50.5, 1e-6, "experts 0 and 2"), expect_near((double)y[1], 101, 1e-6, "experts 0 and 2");
    ga_switch_backward(dx, ds, dy, x, one, 6, 1, w);
    expect_near((double)dx[4], 0.5, 1e-6, "dx"), expect_near((double)dx[5], 1.5, 1e-6, "dx");
    expect_near((double)ds[2], 175, 1e-6, "ds"), expect_near((double)ds[0], 1.75, 1e-6, "ds");
    assert_true(dx[2] == 0 && dx[3] == 0 && ds[1] == 0);
    ga_switch_forward(y, x, other, 6, 1, w);
    expect_near((double)y[0], 5.5, 1e-6, "experts 0 and 1");
}

/* ---- gate ---------------------------------------------------------------------------------------------------------- */

static double activation(double x, ga_gate_activation kind) {
    switch (kind) {
    case GA_SIGMOID:
        return sigmoid(x);
    case GA_SILU:
        return x * sigmoid(x);
    case GA_NS_SIGMOID:
        return 0.5 + 0.5 * sigmoid(x);
    default:
        return x;
    }
}

static size_t logit_index(ga_gate g, size_t h, size_t d) {
    if (g.input == GA_INPUT_SCALAR) return 0;
    return g.type == GA_ELEMENTWISE ? h * g.D + d : h;
}

static double score(const ga_real *s, ga_gate g, size_t h, size_t d) {
    if (g.sharing == GA_SPECIFIC) return activation((double)s[logit_index(g, h, d)], g.activation);
    double sum = 0;
    for (size_t i = 0; i < g.H; i++) sum += activation((double)s[logit_index(g, i, d)], g.activation);
    return sum / (double)g.H;
}

static double modulated(const ga_real *y, const ga_real *s, ga_gate g, size_t h, size_t d) {
    double x = (double)y[h * g.D + d], square = 0;
    if (g.form == GA_MULTIPLICATIVE) return x * score(s, g, h, d);
    if (g.form == GA_ADDITIVE) return x + score(s, g, h, d);
    if (g.activation == GA_SILU) return x * sigmoid(x);
    for (size_t i = 0; i < g.D; i++) square += (double)y[h * g.D + i] * (double)y[h * g.D + i] / (double)g.D;
    return x / sqrt(square + (double)g.eps);
}

/* Calls visit for every gate that has a meaning, with H heads of D values. */
static void for_each_gate(size_t H, size_t D, void (*visit)(ga_gate)) {
    for (int type = GA_ELEMENTWISE; type <= GA_HEADWISE; type++)
        for (int sharing = GA_SPECIFIC; sharing <= GA_SHARED; sharing++)
            for (int form = GA_MULTIPLICATIVE; form <= GA_SELF; form++)
                for (int kind = GA_SIGMOID; kind <= GA_RMSNORM; kind++)
                    for (int input = GA_INPUT_QUERY; input <= GA_INPUT_SCALAR; input++) {
                        ga_config c = ga_config_default();
                        c.n_heads = c.n_kv_heads = H, c.head_dim = D;
                        c.gate_type = type, c.gate_sharing = sharing, c.gate_form = form;
                        c.gate_activation = kind, c.gate_input = input, c.norm_eps = 1e-2;
                        if (ga_config_check(&c, NULL) == GA_OK) visit(ga_gate_of(&c));
                    }
}

enum { GATE_ROWS = 7, GAP = 3 };

static void check_gate_statistics_of_head(const ga_gate_sums *sums, const ga_real *s, size_t s_stride, ga_gate g,
                                          size_t h) {
    size_t values = g.type == GA_HEADWISE || g.input == GA_INPUT_SCALAR ? 1 : g.D;
    double sum = 0, squares = 0, low = 0, half = 0, bins[GA_BINS] = {0}, least = INFINITY, most = -INFINITY;
    for (size_t n = 0; n < GATE_ROWS; n++)
        for (size_t d = 0; d < values; d++) {
            double x = score(s + n * s_stride, g, h, d);
            sum += x, squares += x * x, low += x < 0.1, half += x < 0.5;
            least = fmin(least, x), most = fmax(most, x);
            bins[(size_t)fmax(0, fmin(GA_BINS - 1, floor(x * GA_BINS)))] += 1;
        }
    expect_near(sums->count, (double)(GATE_ROWS * values), 0, "count of scores");
    expect_near(sums->sum, sum, 1e-5, "sum of scores");
    expect_near(sums->sum_of_squares, squares, 1e-5, "sum of squared scores");
    expect_near(sums->below_01, low, 0, "scores below 0.1");
    expect_near(sums->below_05, half, 0, "scores below 0.5");
    expect_near(sums->min, least, 1e-6, "lowest score");
    expect_near(sums->max, most, 1e-6, "highest score");
    for (size_t i = 0; i < GA_BINS; i++) expect_near(sums->bins[i], bins[i], 0, "bin of scores");
}

static void check_gate_statistics(const ga_real *s, size_t s_stride, ga_gate g) {
    size_t heads = g.sharing == GA_SHARED || g.input == GA_INPUT_SCALAR ? 1 : g.H;
    ga_gate_sums *sums = (ga_gate_sums *)calloc(heads, sizeof *sums);
    assert_non_null(sums);
    /* twice, since sums go on over batches */
    ga_gate_statistics(sums, s, s_stride, 3, g);
    ga_gate_statistics(sums, s + 3 * s_stride, s_stride, GATE_ROWS - 3, g);
    for (size_t h = 0; h < heads; h++) check_gate_statistics_of_head(sums + h, s, s_stride, g, h);
    free(sums);
}

static void check_gate(ga_gate g) {
    uint64_t random = g.H * 1000 + g.D;
    size_t width = g.H * g.D, y_stride = width + GAP, s_stride = g.input == GA_INPUT_QUERY ? g.logits + GAP : 0;
    ga_real *y = normal_reals(GATE_ROWS * y_stride, 1, &random), *o = reals(GATE_ROWS * width);
    ga_real *s = normal_reals(GATE_ROWS * s_stride + g.logits, 2, &random);
    double *ro = doubles(GATE_ROWS * width);
    for (size_t n = 0; n < GATE_ROWS; n++)
        for (size_t i = 0; i < width; i++)
            ro[n * width + i] = modulated(y + n * y_stride, s + n * s_stride, g, i / g.D, i % g.D);
    ga_gate_forward(o, y, y_stride, s, s_stride, GATE_ROWS, g);
    expect_below(difference(o, ro, GATE_ROWS * width), tolerance,
                 "gate: type %d sharing %d form %d activation %d input %d", g.type, g.sharing, g.form, g.activation,
                 g.input);
    if (g.form != GA_SELF) check_gate_statistics(s, s_stride, g);
    y[1] = NAN;
    if (g.form != GA_SELF) s[s_stride] = NAN;
    ga_gate_forward(o, y, y_stride, s, s_stride, GATE_ROWS, g);
    assert_true(isnan(o[1]));
    if (g.form != GA_SELF) assert_true(isnan(o[s_stride ? width : 0]));
    free(y), free(o), free(s), free(ro);
}

static void test_gate(void **state) {
    (void)state;
    for_each_gate(3, 6, check_gate);
    for_each_gate(1, 2, check_gate);
    for_each_gate(2, 130, check_gate); /* longer than what is worked on at a time */
    ga_config c = ga_config_default();
    configure(&c, "gate_position=G5 d_model=300");
    check_gate(ga_gate_of(&c));
}

/* ---- SwiGLU, output head ------------------------------------------------------------------------------------------- */

static void test_swiglu(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (size_t j = 0; j < COUNT(sizes); j++) {
            size_t N = sizes[i], F = sizes[j];
            uint64_t random = N * 1000 + F;
            ga_real *u = normal_reals(N * 2 * F, 3, &random), *a = reals(N * F), *du = reals(N * 2 * F);
            ga_real *da = normal_reals(N * F, 1, &random);
            double *ra = doubles(N * F), *rdu = doubles(N * 2 * F);
            for (size_t n = 0; n < N; n++)
                for (size_t f = 0; f < F; f++) {
                    double x = (double)u[n * 2 * F + f], up = (double)u[n * 2 * F + F + f], p = sigmoid(x);
                    double d = (double)da[n * F + f];
                    ra[n * F + f] = x * p * up;
                    rdu[n * 2 * F + f] = d * up * (p + x * p * (1 - p));
                    rdu[n * 2 * F + F + f] = d * x * p;
                }
            ga_swiglu_forward(a, u, N, F);
            ga_swiglu_backward(du, da, u, N, F);
            expect_close(a, ra, N * F, "swiglu a");
            expect_close(du, rdu, N * 2 * F, "swiglu du");
            u[0] = NAN;
            ga_swiglu_forward(a, u, N, F);
            assert_true(isnan(a[0]));
            free(u), free(a), free(du), free(da), free(ra), free(rdu);
        }
}

/* ---- mixture of experts ---------------------------------------------------------------------------------------------- */

static int32_t *indices(size_t n) {
    int32_t *x = (int32_t *)calloc(n, sizeof *x);
    assert_non_null(x);
    return x;
}

/* The router's choice has at its place j what j others exceed, or equal and stand before. */
static void check_route(size_t N, size_t E, size_t K, bool normalize, bool ties) {
    ga_router r = {E, K, normalize};
    uint64_t random = N * 10007 + E * 101 + K;
    ga_real *z = normal_reals(N * E, 2, &random), *p = reals(N * E), *lse = reals(N), *weights = reals(N * K);
    ga_real *sums = normal_reals(E + 1, 1, &random);
    int32_t *experts = indices(N * K), *rows = indices(N * K), *slots = indices(N * K), *offsets = indices(E + 1);
    int32_t *counts = indices(E);
    double *rp = doubles(N * E), *rl = doubles(N), *rw = doubles(N * K), *rs = doubles(E + 1);
    for (size_t i = 0; ties && i < N * E; i++) z[i] = (ga_real)(int)z[i];
    for (size_t e = 0; e <= E; e++) rs[e] = (double)sums[e];
    ga_route_forward(p, lse, weights, experts, z, N, r);
    for (size_t n = 0; n < N; n++) {
        double sum = 0, of_chosen = 0;
        for (size_t e = 0; e < E; e++) sum += exp((double)z[n * E + e]);
        rl[n] = log(sum), rs[E] += rl[n] * rl[n];
        for (size_t e = 0; e < E; e++) rp[n * E + e] = exp((double)z[n * E + e]) / sum, rs[e] += rp[n * E + e];
        for (size_t j = 0; j < K; j++) {
            size_t e = (size_t)experts[n * K + j], before = 0;
            assert_true(e < E);
            for (size_t i = 0; i < E; i++)
                before += z[n * E + i] > z[n * E + e] || (z[n * E + i] == z[n * E + e] && i < e);
            assert_int_equal(before, j);
            of_chosen += rp[n * E + e];
        }
        for (size_t j = 0; j < K; j++)
            rw[n * K + j] = rp[n * E + (size_t)experts[n * K + j]] / (normalize ? of_chosen : 1);
    }
    expect_close(p, rp, N * E, "probabilities");
    expect_close(lse, rl, N, "router lse");
    expect_close(weights, rw, N * K, "weights of the experts");
    ga_route_forward(z, lse, weights, experts, z, N, r);
    assert_memory_equal(z, p, N * E * sizeof *z); /* in place */

    /* every slot has one row, rows of an expert stand together and follow the positions */
    ga_route_rows(rows, slots, offsets, experts, N, r);
    assert_true(offsets[0] == 0 && (size_t)offsets[E] == N * K);
    for (size_t e = 0; e < E; e++)
        for (int32_t i = offsets[e]; i < offsets[e + 1]; i++) {
            assert_int_equal(experts[slots[i]], e);
            assert_int_equal(rows[slots[i]], i);
            if (i > offsets[e]) assert_true(slots[i] > slots[i - 1]);
        }
    counts[E - 1] = 5;
    ga_route_sums(counts, sums, offsets, p, lse, N, r);
    expect_close(sums, rs, E + 1, "sums of the router");
    for (size_t e = 0; e < E; e++) assert_int_equal(counts[e] - (e + 1 == E ? 5 : 0), offsets[e + 1] - offsets[e]);
    free(z), free(p), free(lse), free(weights), free(sums), free(rp), free(rl), free(rw), free(rs);
    free(experts), free(rows), free(slots), free(offsets), free(counts);
}

/* One rank after the other, in each one's eyes. */
static void check_pool(ga_pool pool) {
    uint64_t random = pool.values;
    ga_real *parts = normal_reals(pool.ranks * pool.values, 1, &random), *sums = reals(pool.n_sums);
    int32_t counts[20] = {0}, seen[20], given[20], expected[20];
    double total[21];
    for (size_t i = 0; i < pool.n; i++) expected[i] = counts[i] = (int32_t)(1000 * i);
    for (size_t i = 0; i < pool.n_sums; i++) total[i] = (double)(sums[i] = (ga_real)i);
    for (size_t r = 0; r < pool.ranks; r++) {
        ga_real *part = parts + r * pool.values;
        for (size_t i = 0; i < pool.n; i++) given[i] = (int32_t)((1 << 24) + 10 * i + r + 1); /* no float has it */
        memcpy(part, given, pool.n * sizeof *given);
        for (size_t i = 0; i < pool.n && r <= pool.rank; i++) expected[i] += given[i];
        for (size_t i = 0; i < pool.n_sums; i++) total[i] += (double)part[pool.sums + i];
    }
    ga_route_pool(seen, counts, sums, parts, pool);
    assert_memory_equal(seen, expected, pool.n * sizeof *seen);
    expect_close(sums, total, pool.n_sums, "sums of all ranks");
    for (size_t i = 0; i < pool.n; i++) {
        size_t all = 1000 * i + pool.ranks * ((1 << 24) + 10 * i) + pool.ranks * (pool.ranks + 1) / 2;
        assert_int_equal(counts[i], all);
    }
    free(parts), free(sums);
}

static void test_pool(void **state) {
    (void)state;
    check_pool((ga_pool){0, 2, 48, 22, 20, 21});
    check_pool((ga_pool){2, 4, 32, 7, 7, 9});
    check_pool((ga_pool){1, 3, 16, 5, 5, 6});
}

static void test_route(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (size_t j = 1; j < COUNT(sizes); j++) {
            check_route(sizes[i], sizes[j], 2, true, false);
            check_route(sizes[i], sizes[j], 3, false, true);
        }
    check_route(5, 8, 8, true, true);
    check_route(2, GA_MAX_EXPERTS, 9, false, false);
    /* what is not a number still goes somewhere, and shows */
    ga_real z[] = {NAN, 1, 2, NAN, NAN, NAN, 3, 1, (ga_real)INFINITY}, p[9], lse[3], weights[6];
    int32_t experts[6];
    ga_route_forward(p, lse, weights, experts, z, 3, (ga_router){3, 2, true});
    for (size_t i = 0; i < 6; i++) assert_true(experts[i] >= 0 && experts[i] < 3);
    assert_true(isnan(weights[0]) && isnan(weights[3]) && isnan(weights[4]) && isnan(lse[1]));
}

/* Gathering and summing are each other's transposes: with <x, y> = sum x_i y_i, <gather x, y> = <x, sum y>. */
static void test_rows(void **state) {
    (void)state;
    enum { N = 13, E = 5, K = 3, C = 17 };
    uint64_t random = 3;
    ga_real *z = normal_reals(N * E, 1, &random), *x = normal_reals(N * C, 1, &random);
    ga_real *y = normal_reals(N * K * C, 1, &random), *gathered = reals(N * K * C), *summed = reals(N * C);
    ga_real p[N * E], lse[N], weights[N * K];
    int32_t experts[N * K], rows[N * K], slots[N * K], offsets[E + 1];
    double left = 0, right = 0;
    ga_route_forward(p, lse, weights, experts, z, N, (ga_router){E, K, true});
    ga_route_rows(rows, slots, offsets, experts, N, (ga_router){E, K, true});
    ga_gather_rows(gathered, x, slots, N * K, C, K);
    ga_sum_rows(summed, y, rows, N, C, K);
    for (size_t s = 0; s < N * K; s++)
        assert_memory_equal(gathered + (size_t)rows[s] * C, x + s / K * C, C * sizeof *x);
    for (size_t i = 0; i < N * K * C; i++) left += (double)gathered[i] * (double)y[i];
    for (size_t i = 0; i < N * C; i++) right += (double)x[i] * (double)summed[i];
    expect_near(left, right, 1e-5, "the two products");
    free(z), free(x), free(y), free(gathered), free(summed);
}

/* Each expert is ga_linear on its rows, to the bit where that does not change its way. */
static void check_grouped(size_t rows, size_t O, size_t I) {
    enum { E = 4 };
    uint64_t random = rows * 10007 + O * 101 + I;
    int32_t offsets[E + 1] = {0, (int32_t)rows, (int32_t)rows, (int32_t)(rows + 1), (int32_t)(3 * rows + 1)};
    size_t R = 3 * rows + 1, stride = O * I + 3;
    ga_real *x = normal_reals(R * I, 1, &random), *w = normal_reals(E * stride, 1, &random);
    ga_real *dy = normal_reals(R * O, 1, &random), *dw = normal_reals(E * stride, 1, &random);
    ga_real *y = normal_reals(R * O, 1, &random), *dx = normal_reals(R * I, 1, &random);
    double *ry = doubles(R * O), *rdx = doubles(R * I), *rdw = doubles(E * stride);
    for (size_t i = 0; i < E * stride; i++) rdw[i] = (double)dw[i];
    for (size_t e = 0; e < E; e++)
        for (size_t m = (size_t)offsets[e]; m < (size_t)offsets[e + 1]; m++)
            for (size_t o = 0; o < O; o++)
                for (size_t i = 0; i < I; i++) {
                    ry[m * O + o] += (double)x[m * I + i] * (double)w[e * stride + o * I + i];
                    rdx[m * I + i] += (double)dy[m * O + o] * (double)w[e * stride + o * I + i];
                    rdw[e * stride + o * I + i] += (double)dy[m * O + o] * (double)x[m * I + i];
                }
    ga_grouped_forward(y, x, w, stride, offsets, E, O, I);
    ga_grouped_backward(dx, dw, dy, x, w, stride, offsets, E, O, I);
    expect_close(y, ry, R * O, "grouped y");
    expect_close(dx, rdx, R * I, "grouped dx");
    expect_close(dw, rdw, E * stride, "grouped dw");
    free(x), free(w), free(dy), free(dw), free(y), free(dx), free(ry), free(rdx), free(rdw);
}

static void test_grouped(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (size_t j = 0; j < COUNT(sizes); j += 2) {
            check_grouped(sizes[i], sizes[j], 17);
            check_grouped(sizes[i], 9, sizes[j]);
        }
    check_grouped(600, 70, 33); /* beyond every block size */
    check_grouped(2, 530, 300);
}

static void test_expert_swiglu(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (size_t j = 0; j < COUNT(sizes); j++) {
            size_t R = sizes[i], F = sizes[j];
            uint64_t random = R * 1000 + F;
            ga_real *u = normal_reals(R * 2 * F, 3, &random), *a = reals(R * F), *du = reals(R * 2 * F);
            ga_real *da = normal_reals(R * F, 1, &random), *w = normal_reals(R, 1, &random), *dw = reals(R);
            int32_t *slots = indices(R);
            double *ra = doubles(R * F), *rdu = doubles(R * 2 * F), *rdw = doubles(R);
            for (size_t n = 0; n < R; n++) {
                slots[n] = (int32_t)((n * 7 + 2) % R); /* 7 divides none of the sizes but 63 */
                if (R % 7 == 0) slots[n] = (int32_t)(R - 1 - n);
                size_t s = (size_t)slots[n];
                for (size_t f = 0; f < F; f++) {
                    double x = (double)u[n * 2 * F + f], up = (double)u[n * 2 * F + F + f], q = sigmoid(x);
                    double d = (double)da[n * F + f];
                    ra[n * F + f] = (double)w[s] * x * q * up;
                    rdu[n * 2 * F + f] = (double)w[s] * d * up * (q + x * q * (1 - q));
                    rdu[n * 2 * F + F + f] = (double)w[s] * d * x * q;
                    rdw[s] += d * x * q * up;
                }
            }
            ga_expert_swiglu_forward(a, u, w, slots, R, F);
            ga_expert_swiglu_backward(du, dw, da, u, w, slots, R, F);
            expect_close(a, ra, R * F, "expert swiglu a");
            expect_close(du, rdu, R * 2 * F, "expert swiglu du");
            expect_close(dw, rdw, R, "expert swiglu d weights");
            free(u), free(a), free(du), free(da), free(w), free(dw), free(slots), free(ra), free(rdu), free(rdw);
        }
}

static void check_head_loss(size_t N, size_t C, size_t V) {
    uint64_t random = N * 10007 + C * 101 + V;
    ga_real *x = normal_reals(N * C, 1, &random), *w = normal_reals(V * C, 1, &random),
            *dw = normal_reals(V * C, 1, &random);
    ga_real *losses = normal_reals(N, 1, &random), *again = reals(N), *dx = normal_reals(N * C, 1, &random);
    ga_real *logits = normal_reals(GA_HEAD_ROWS * V, 1, &random);
    double *rl = doubles(N), *rdx = doubles(N * C), *rdw = doubles(V * C), *z = doubles(V), scale = 0.37;
    int32_t *targets = (int32_t *)calloc(N, sizeof *targets);
    assert_non_null(targets);
    fill_tokens(targets, N, V, &random);
    for (size_t n = 2; n < N; n += 5) targets[n] = -1 - (int32_t)(n % 3);
    for (size_t i = 0; i < V * C; i++) rdw[i] = (double)dw[i];
    for (size_t n = 0; n < N; n++) {
        if (targets[n] < 0) continue;
        double top = -INFINITY, sum = 0;
        for (size_t v = 0; v < V; v++) {
            z[v] = 0;
            for (size_t c = 0; c < C; c++) z[v] += (double)x[n * C + c] * (double)w[v * C + c];
            top = fmax(top, z[v]);
        }
        for (size_t v = 0; v < V; v++) sum += exp(z[v] - top);
        rl[n] = top + log(sum) - z[targets[n]];
        for (size_t v = 0; v < V; v++) {
            double d = scale * (exp(z[v] - top) / sum - ((size_t)targets[n] == v));
            for (size_t c = 0; c < C; c++) {
                rdx[n * C + c] += d * (double)w[v * C + c];
                rdw[v * C + c] += d * (double)x[n * C + c];
            }
        }
    }
    ga_head_loss(losses, dx, dw, logits, x, w, targets, N, C, V, (ga_real[]){(ga_real)scale});
    for (size_t n = 0; n < N; n++) expect_near((double)losses[n], rl[n], 1e-5, "cross-entropy");
    if (V > 1) expect_below(difference(dx, rdx, N * C), 1e-5, "head dx (%zu, %zu, %zu)", N, C, V);
    expect_below(difference(dw, rdw, V * C), 1e-5, "head dw (%zu, %zu, %zu)", N, C, V);
    ga_head_loss(again, NULL, NULL, logits, x, w, targets, N, C, V, NULL);
    assert_memory_equal(again, losses, N * sizeof *losses);
    free(x), free(w), free(dw), free(losses), free(again), free(dx), free(logits);
    free(rl), free(rdx), free(rdw), free(z), free(targets);
}

static void test_mean_loss(void **state) {
    (void)state;
    const ga_real losses[4] = {1, 2, 0, 6};
    const int32_t targets[4] = {3, 0, -1, 2}, none[2] = {-1, -1};
    double mean = 7, total = 10;
    ga_mean_loss(&mean, &total, losses, targets, 4, 0.5);
    assert_true(mean == 3 && total == 11.5);
    ga_mean_loss(&mean, NULL, losses, none, 2, 0.5);
    assert_true(isnan(mean));
}

static void test_head_loss(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (size_t j = 0; j < COUNT(sizes); j++)
            for (size_t k = 1; k < COUNT(sizes); k++) check_head_loss(sizes[i], sizes[j], sizes[k]);
    check_head_loss(GA_HEAD_ROWS, 5, 9);
    check_head_loss(3 * GA_HEAD_ROWS + 1, 5, 300);

    enum { C = 2, V = 20 };
    ga_real x[C * 2] = {NAN, 1, 1, 1}, w[V * C] = {0}, losses[2], *logits = reals(GA_HEAD_ROWS * V);
    const int32_t targets[2] = {3, 4};
    ga_head_loss(losses, NULL, NULL, logits, x, w, targets, 2, C, V, NULL);
    assert_true(isnan(losses[0]) && fabs((double)losses[1] - log(V)) < 1e-6);
    free(logits);
}

/* ---- optimiser ----------------------------------------------------------------------------------------------------- */

static void test_adamw(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(sizes); i++) {
        size_t n = sizes[i];
        uint64_t random = n;
        ga_real *p = normal_reals(n, 1, &random), *m = reals(n), *v = reals(n);
        double *rp = doubles(n), *rm = doubles(n), *rv = doubles(n);
        for (size_t j = 0; j < n; j++) rp[j] = (double)p[j];
        ga_adamw_settings a = {3e-2, 0.8, 0.95, 1e-3, 0.1, 0.6, 0};
        for (a.step = 1; a.step <= 30; a.step++) {
            ga_real *g = normal_reals(n, 0.1, &random);
            for (size_t j = 0; j < n; j++) {
                double x = (double)g[j] * a.gradient_scale, t = (double)a.step;
                rp[j] -= a.learning_rate * a.weight_decay * rp[j];
                rm[j] = a.beta1 * rm[j] + (1 - a.beta1) * x;
                rv[j] = a.beta2 * rv[j] + (1 - a.beta2) * x * x;
                double corrected = rm[j] / (1 - pow(a.beta1, t)), root = sqrt(rv[j] / (1 - pow(a.beta2, t)));
                rp[j] -= a.learning_rate * corrected / (root + a.eps);
            }
            ga_adamw(p, g, m, v, n, a);
            free(g);
        }
        expect_below(difference(p, rp, n), 1e-5, "adamw p");
        expect_below(difference(m, rm, n), 1e-5, "adamw m");
        expect_below(difference(v, rv, n), 1e-5, "adamw v");
        free(p), free(m), free(v), free(rp), free(rm), free(rv);
    }
}

static void test_sums(void **state) {
    (void)state;
    static const size_t lengths[] = {0, 1, 3, 17, 63, 64, 65, 129, 1000, 4097};
    for (size_t i = 0; i < COUNT(lengths); i++) {
        size_t n = lengths[i];
        uint64_t random = n;
        ga_real *x = normal_reals(n, 1, &random);
        double squares = 0, most = 0, sum = 2, max = 0;
        for (size_t j = 0; j < n; j++) squares += (double)x[j] * (double)x[j], most = fmax(most, fabs((double)x[j]));
        ga_sum_of_squares(&sum, x, n);
        ga_max_abs(&max, x, n);
        expect_near(sum, 2 + squares, 1e-12, "sum of squares, added");
        assert_true(max == most);
        ga_max_abs(&max, x, n / 2); /* no less than what was seen before */
        assert_true(max == most);
        for (size_t j = 0; j < n; j += 1 + n / 3) {
            ga_real kept = x[j];
            double found = most;
            x[j] = -INFINITY;
            ga_max_abs(&found, x, n);
            assert_true(isinf(found) && found > 0);
            x[j] = NAN;
            ga_sum_of_squares(&sum, x, n);
            ga_max_abs(&found, x, n);
            assert_true(isnan(sum) && isnan(found));
            x[j] = kept;
            ga_max_abs(&found, x, n);
            assert_true(isnan(found)); /* it stays */
        }
        free(x);
    }
    ga_real both[] = {INFINITY, 1, NAN};
    double max = 0;
    ga_max_abs(&max, both, 3);
    assert_true(isnan(max));
}

/* Each index that a sum keeps or sums over: a stride of its own, or 0. */
static void test_accumulate(void **state) {
    (void)state;
    enum { R = 3, G = 5, I = 7 };
    static const size_t strides[][2] = {{1, 0}, {0, 1}, {I + 2, 1}, {1, G + 1}, {0, 0}};
    uint64_t random = 6;
    ga_real *x = normal_reals(R * G * I, 1, &random);
    for (size_t k = 0; k < COUNT(strides); k++) {
        double sums[64], expected[64];
        for (size_t i = 0; i < 64; i++) sums[i] = expected[i] = (double)i;
        for (size_t r = 0; r < R; r++)
            for (size_t g = 0; g < G; g++)
                for (size_t i = 0; i < I; i++)
                    expected[g * strides[k][0] + i * strides[k][1]] += (double)x[(r * G + g) * I + i];
        ga_accumulate(sums, strides[k][0], strides[k][1], x, R, G, I);
        for (size_t i = 0; i < 64; i++) expect_near(sums[i], expected[i], 1e-12, "sum");
    }
    free(x);
}

static void test_counts_of_observers(void **state) {
    (void)state;
    double rows[3] = {1, 2, 3}, shares[2] = {0.5, 0};
    const int32_t offsets[4] = {0, 4, 4, 9};
    ga_route_counts(rows, offsets, 3);
    assert_true(rows[0] == 5 && rows[1] == 2 && rows[2] == 8);
    const ga_real sink[2] = {1, -2}, lse[8] = {1, 2, 3, 4, 0, -1, 2, 2}; /* B 2, HQ 2, T 2 */
    ga_sdpa_sink(shares, sink, lse, 2, 2, 2);
    expect_near(shares[0], 0.5 + 1 + exp(-1) + exp(1) + exp(2), 1e-12, "share of the first head's sink");
    expect_near(shares[1], exp(-5) + exp(-6) + 2 * exp(-4), 1e-12, "share of the second head's sink");
}

/* design: warm-up lr (s+1)/warmup, then min + (lr - min) (1 + cos(pi (s - warmup) / (steps - warmup))) / 2 */
static void test_learning_rate(void **state) {
    (void)state;
    ga_config c = ga_config_default();
    configure(&c, "learning_rate=2e-3 min_lr=3e-5 warmup_steps=10");
    double pi = acos(-1);
    for (uint64_t s = 0; s < 100; s++) {
        double expected =
            s < 10 ? 2e-3 * (double)(s + 1) / 10 : 3e-5 + (2e-3 - 3e-5) * (1 + cos(pi * (double)(s - 10) / 90)) / 2;
        expect_below(fabs(ga_learning_rate(&c, s, 100) - expected), 1e-15, "learning rate of step %d", (int)s);
    }
    expect_below(fabs(ga_learning_rate(&c, 9, 100) - 2e-3), 1e-15, "highest learning rate");
    expect_below(fabs(ga_learning_rate(&c, 100, 100) - 3e-5), 1e-15, "learning rate at the end");
    expect_below(fabs(ga_learning_rate(&c, 1000, 100) - 3e-5), 1e-15, "learning rate beyond the end");
    /* a run that is all warm-up, or shorter than it */
    for (uint64_t steps = 1; steps <= 10; steps++)
        expect_below(fabs(ga_learning_rate(&c, steps - 1, steps) - 2e-4 * (double)steps), 1e-15,
                     "learning rate in warm-up");
    c.warmup_steps = 0;
    expect_below(fabs(ga_learning_rate(&c, 0, 100) - 2e-3), 1e-15, "learning rate without warm-up");
    assert_true(isfinite(ga_learning_rate(&c, 0, 1)) && isfinite(ga_learning_rate(&c, 0, 0)));
}

/* ---- the same bits with any number of threads ---------------------------------------------------------------------- */

enum { WORKSPACE = 1 << 16 };

/* Every operator once, on sizes that do not divide evenly; what they write is in `out`. */
static void run_operators(ga_real *out) {
    enum { N = 150, C = 70, O = 90, HQ = 4, HK = 2, D = 10, T = 75 };
    uint64_t random = 5;
    ga_shape n = {2, T, T, HQ, HK, D};
    ga_real *in = normal_reals(WORKSPACE, 1, &random), *rope = rope_table(T, D, 100), *next = out;
    ga_real *w = in + 20000, *dy = in + 30000;
    double *sums = doubles(2);
    int32_t tokens[N];
    fill_tokens(tokens, N, O, &random);
#define TAKE(count) (next += (count), next - (count))
    ga_linear_forward(TAKE(N * O), in, w, N, O, C);
    ga_linear_forward(TAKE(2 * O), in, w, 2, O, C);
    ga_real *dx = TAKE(N * C), *dw = TAKE(O * C);
    ga_linear_backward(dx, dw, dy, in, w, N, O, C);
    ga_linear_channels_forward(TAKE(N * O), in, C, w, N, O, 12);
    dx = TAKE(N * C), dw = TAKE(O * 12);
    ga_linear_channels_backward(dx, dw, dy, in, C, w, N, O, 12);
    ga_embedding_forward(TAKE(N * C), tokens, w, N, C);
    ga_embedding_backward(TAKE(O * C), tokens, in, N, C);
    ga_real *h = TAKE(N * C), *rstd = TAKE(N);
    ga_rmsnorm_forward(h, rstd, in, w, N, C, 1e-6f);
    dx = TAKE(N * C), dw = TAKE(C);
    ga_rmsnorm_backward(dx, dw, dy, in, w, rstd, N, C, false);
    ga_heads_forward(TAKE(N * HQ * D), in, HQ * D, w, rope, 2, T, HQ, D, 1e-6f);
    dx = TAKE(N * HQ * D), dw = TAKE(D);
    ga_heads_backward(dx, dw, dy, in, HQ * D, HQ * D, w, rope, 2, T, HQ, D, 1e-6f);
    ga_real *y = TAKE(N * HQ * D), *lse = TAKE(N * HQ), *dq = TAKE(N * HQ * D), *dk = TAKE(N * HK * D),
            *dv = TAKE(N * HK * D);
    ga_real *scratch = reals(N * HQ * (2 * D + 1));
    ga_real *dsink = TAKE(HQ);
    ga_sdpa_forward(y, lse, in, w, dy, in + 5, n);
    ga_sdpa_backward(dq, dk, dv, dsink, scratch, in + 7, y, lse, in, w, dy, in + 5, n);
    ga_sdpa_column(TAKE(N * HQ), in, w, lse, 3, n);
    ga_config c = ga_config_default();
    c.n_heads = HQ, c.n_kv_heads = HK, c.head_dim = D, c.gate_sharing = GA_SHARED;
    ga_gate_forward(TAKE(N * HQ * D), in, HQ * D, w, HQ * D, N, ga_gate_of(&c));
    dx = TAKE(N * HQ * D), dw = TAKE(N * HQ * D);
    ga_gate_backward(dx, HQ * D, dw, HQ * D, dy, in, HQ * D, w, HQ * D, N, ga_gate_of(&c));
    ga_switch switched = {HK, D, 3, 2};
    ga_switch_forward(TAKE(N * HK * D), in, w, HK * 3 * D, N, switched);
    dx = TAKE(N * HK * 3 * D), dw = TAKE(N * HK * 3 * D);
    ga_switch_backward(dx, dw, dy, in, w, HK * 3 * D, N, switched);
    ga_swiglu_forward(TAKE(N * C / 2), in, N, C / 2);
    ga_swiglu_backward(TAKE(N * C), dy, in, N, C / 2);
    enum { E = 6, K = 2, R = N * K };
    ga_router r = {E, K, true};
    int32_t experts[R], rows[R], slots[R], offsets[E + 1], counts[E] = {0};
    ga_real *p = TAKE(N * E), *router_lse = TAKE(N), *weights = TAKE(R), *gathered = TAKE(R * O);
    ga_route_forward(p, router_lse, weights, experts, in, N, r);
    ga_route_rows(rows, slots, offsets, experts, N, r);
    ga_route_sums(counts, TAKE(E + 1), offsets, p, router_lse, N, r);
    ga_route_backward(TAKE(N * E), dy, p, router_lse, experts, counts, N, r, 0.1f, 0.1f);
    int32_t seen[E] = {0};
    ga_route_pool(seen, counts, TAKE(E + 1), p, (ga_pool){0, 1, N * E, E, 0, E + 1});
    ga_gather_rows(gathered, in, slots, R, O, K);
    ga_sum_rows(TAKE(N * O), gathered, rows, N, O, K);
    dx = TAKE(R * O), dw = TAKE(E * 20 * O);
    ga_grouped_forward(TAKE(R * 20), gathered, w, 20 * O, offsets, E, 20, O);
    ga_grouped_backward(dx, dw, in, gathered, w, 20 * O, offsets, E, 20, O);
    ga_expert_swiglu_forward(TAKE(R * C / 2), in, weights, slots, R, C / 2);
    dx = TAKE(R * C), dw = TAKE(R);
    ga_expert_swiglu_backward(dx, dw, dy, in, weights, slots, R, C / 2);
    ga_real *losses = TAKE(N), *logits = reals(GA_HEAD_ROWS * O);
    dx = TAKE(N * C), dw = TAKE(O * C);
    ga_head_loss(losses, dx, dw, logits, in, w, tokens, N, C, O, (ga_real[]){0.1f});
    ga_mean_loss(sums, sums + 1, losses, tokens, N, 0.1);
    ga_adamw(w, dy, TAKE(5000), scratch, 5000, (ga_adamw_settings){1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 1});
    ga_sum_of_squares(sums, in, WORKSPACE);
    *TAKE(1) = (ga_real)(sums[0] - WORKSPACE);
#undef TAKE
    assert_true(next - out < 8 * WORKSPACE);
    free(in), free(rope), free(scratch), free(logits), free(sums);
}

static void test_threads(void **state) {
    (void)state;
    ga_real *one = reals(8 * WORKSPACE), *more = reals(8 * WORKSPACE);
    use_threads(1);
    run_operators(one);
    for (int threads = 2; threads <= 3; threads++) {
        use_threads(threads);
        memset(more, 0, 8 * WORKSPACE * sizeof *more);
        run_operators(more);
        for (size_t i = 0; i < 8 * WORKSPACE; i++)
            if (memcmp(&one[i], &more[i], sizeof *one) != 0)
                fail_msg("value %zu is %.9g with 1 thread and %.9g with %d", i, (double)one[i], (double)more[i],
                         threads);
    }
    use_default_threads();
    free(one), free(more);
}

static void test_names(void **state) {
    (void)state;
    assert_string_equal(ga_operator_name(GA_OP_linear_forward), "linear_forward");
    assert_string_equal(ga_operator_name(GA_OP_COUNT - 1), "gate_statistics");
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_linear_nan),
        cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_add),
        cmocka_unit_test(test_clip),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_heads),
        cmocka_unit_test(test_sdpa),
        cmocka_unit_test(test_sdpa_cached),
        cmocka_unit_test(test_sdpa_nan),
        cmocka_unit_test(test_gate),
        cmocka_unit_test(test_switch),
        cmocka_unit_test(test_route),
        cmocka_unit_test(test_pool),
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_grouped),
        cmocka_unit_test(test_expert_swiglu),
        cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_head_loss),
        cmocka_unit_test(test_mean_loss),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_sums),
        cmocka_unit_test(test_accumulate),
        cmocka_unit_test(test_counts_of_observers),
        cmocka_unit_test(test_learning_rate),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_names),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    use_default_threads();
    return cmocka_run_group_tests_name("operators", tests, NULL, NULL);
}
