/* Every operator that gated_attention_x86.h replaces against plain C, on odd sizes, with each instruction set that this
 * processor has; the choice of the instruction set; that threads do not change a bit. */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_x86.h"
#include "testing.h"

static const char *const isas[] = {"avx2", "avx512", "avx512bf16", "amx"};

/* One device after the other: each instruction set, in float32 and in bfloat16 where it has that. */
typedef struct {
    ga_device device;
    bool bf16;
    char what[64];
} subject;

static bool next_subject(subject *s, size_t *at) {
    for (; *at < 2 * COUNT(isas); ++*at) {
        ga_x86_settings settings = {isas[*at / 2], *at % 2 == 1};
        if (ga_device_x86(&s->device, settings, NULL) != GA_OK) continue;
        s->bf16 = ga_device_x86_bf16(&s->device);
        if (s->bf16 == settings.bf16) {
            snprintf(s->what, sizeof s->what, "%s %s", settings.isa, s->bf16 ? "bf16" : "f32");
            ++*at;
            return true;
        }
        ga_device_x86_destroy(&s->device);
    }
    return false;
}

#define EACH_SUBJECT(s) \
    subject s;          \
    for (size_t at_ = 0; next_subject(&s, &at_); ga_device_x86_destroy(&s.device))

static const size_t odd[] = {1, 3, 17, 63, 65, 129};

/* Not inlined: gcc 12 would see a copy of impossible size where n comes from constants. */
__attribute__((noinline)) static ga_real *rounded_copy(const ga_real *x, size_t n, bool bf16) {
    ga_real *copy = reals(n);
    for (size_t i = 0; i < n; i++) copy[i] = bf16 ? bf16_rounded(x[i]) : x[i];
    return copy;
}

/* Random values that bfloat16 holds exactly when the products read that. */
static ga_real *operand(size_t n, double deviation, bool bf16, uint64_t *random) {
    ga_real *x = normal_reals(n, deviation, random);
    for (size_t i = 0; i < n; i++) x[i] = bf16 ? bf16_rounded(x[i]) : x[i];
    return x;
}

static ga_real *copy_of(const ga_real *x, size_t n) {
    return rounded_copy(x, n, false);
}

/* ||a - b|| must be below tolerance ||b||. */
static void expect_same(const ga_real *a, const ga_real *b, size_t n, double tolerance, const char *what,
                        const char *where) {
    double error = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        error += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    expect_below(sqrt(error), tolerance * sqrt(size) + 1e-12, "%s, %s", what, where);
}

/* ---- linear ------------------------------------------------------------------------------------------------------------ */

/* bfloat16 products must be those of the rounded operands: then float32's tolerance holds for them too. */
static void check_linear(const subject *s, size_t M, size_t O, size_t I) {
    const ga_device *d = &s->device;
    uint64_t random = M * 10000 + O * 100 + I;
    ga_real *x = normal_reals(M * I, 1, &random), *dy = normal_reals(M * O, 1, &random);
    ga_real *w = (ga_real *)d->allocate(d->state, O * I * sizeof *w);
    assert_non_null(w);
    fill_normal(w, O * I, 0, 1, &random);
    ga_real *y = reals(M * O), *dx = reals(M * I), *dw = normal_reals(O * I, 1, &random),
            *dw_expected = copy_of(dw, O * I);
    ga_real *xr = rounded_copy(x, M * I, s->bf16), *wr = rounded_copy(w, O * I, s->bf16),
            *dyr = rounded_copy(dy, M * O, s->bf16);
    ga_real *y_expected = reals(M * O), *dx_expected = reals(M * I);
    char where[128];
    snprintf(where, sizeof where, "%s, M %zu O %zu I %zu", s->what, M, O, I);

    d->linear_forward(d->state, y, x, w, M, O, I);
    ga_linear_forward(y_expected, xr, wr, M, O, I);
    expect_same(y, y_expected, M * O, 1e-5, "linear_forward", where);
    d->linear_backward(d->state, dx, dw, dy, x, w, M, O, I);
    ga_linear_backward(dx_expected, dw_expected, dyr, xr, wr, M, O, I);
    expect_same(dx, dx_expected, M * I, 1e-5, "linear_backward, dx", where);
    expect_same(dw, dw_expected, O * I, 1e-5, "linear_backward, dw", where);
    d->linear_backward(d->state, NULL, dw, dy, x, w, M, O, I);
    ga_linear_backward(NULL, dw_expected, dyr, xr, wr, M, O, I);
    expect_same(dw, dw_expected, O * I, 1e-5, "linear_backward without dx", where);

    ga_real *all[] = {x, dy, y, dx, dw, dw_expected, xr, wr, dyr, y_expected, dx_expected};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
    d->release(d->state, w);
}

static void test_linear(void **unused) {
    (void)unused;
    EACH_SUBJECT(s) {
        for (size_t a = 0; a < COUNT(odd); a++)
            for (size_t b = 0; b < COUNT(odd); b++)
                for (size_t c = 0; c < COUNT(odd); c++) check_linear(&s, odd[a], odd[b], odd[c]);
        check_linear(&s, 5, 33, 1051); /* several parts of the contraction */
        check_linear(&s, 1100, 40, 35);
        check_linear(&s, 7, 4500, 550); /* several parts of the columns */
        check_linear(&s, 7, 550, 4500);
    }
}

/* Packed weights follow the weights: after weights_changed, and where memory is released and given out again. */
static void test_changed_weights(void **unused) {
    (void)unused;
    enum { M = 3, O = 20, I = 24 };
    EACH_SUBJECT(s) {
        const ga_device *d = &s.device;
        uint64_t random = 5;
        ga_real *x = normal_reals(M * I, 1, &random), y[M * O], expected[M * O];
        for (int round = 0; round < 4; round++) {
            ga_real *w = (ga_real *)d->allocate(d->state, O * I * sizeof *w);
            for (int change = 0; change < 3; change++) {
                fill_normal(w, O * I, 0, 1, &random);
                d->weights_changed(d->state, w, O * I);
                d->linear_forward(d->state, y, x, w, M, O, I);
                ga_real *xr = rounded_copy(x, M * I, s.bf16), *wr = rounded_copy(w, O * I, s.bf16);
                ga_linear_forward(expected, xr, wr, M, O, I);
                expect_same(y, expected, M * O, 1e-5, "after a change", s.what);
                free(xr), free(wr);
            }
            d->release(d->state, w);
        }
        free(x);
    }
}

/* ---- attention ----------------------------------------------------------------------------------------------------------- */

static void check_sdpa(const subject *s, ga_shape n, bool with_sink) {
    const ga_device *d = &s->device;
    uint64_t random = n.T * 1000 + n.S * 10 + n.D;
    size_t q_size = n.B * n.T * n.HQ * n.D, k_size = n.B * n.S * n.HK * n.D, lse_size = n.B * n.HQ * n.T;
    ga_real *q = operand(q_size, 2, s->bf16, &random), *k = operand(k_size, 2, s->bf16, &random);
    ga_real *v = operand(k_size, 1, s->bf16, &random), *sink = with_sink ? normal_reals(n.HQ, 2, &random) : NULL;
    double tolerance = s->bf16 ? 6e-3 : 1e-5; /* the probabilities are rounded too */
    ga_real *y = reals(q_size), *lse = reals(lse_size), *y_expected = reals(q_size), *lse_expected = reals(lse_size);
    char where[128];
    snprintf(where, sizeof where, "%s, B %zu T %zu S %zu HQ %zu HK %zu D %zu%s", s->what, n.B, n.T, n.S, n.HQ, n.HK,
             n.D, with_sink ? " and a sink" : "");
    d->sdpa_forward(d->state, y, lse, q, k, v, sink, n);
    ga_sdpa_forward(y_expected, lse_expected, q, k, v, sink, n);
    expect_same(y, y_expected, q_size, tolerance, "sdpa_forward, y", where);
    expect_same(lse, lse_expected, lse_size, 1e-6, "sdpa_forward, lse", where);
    if (n.S == n.T) {
        ga_real *dy = operand(q_size, 1, s->bf16, &random), *scratch = reals(lse_size * (2 * n.D + 1));
        ga_real *dq = reals(q_size), *dk = reals(k_size), *dv = reals(k_size);
        ga_real *dq_expected = reals(q_size), *dk_expected = reals(k_size), *dv_expected = reals(k_size);
        ga_real *dsink = reals(n.HQ), *dsink_expected = reals(n.HQ);
        d->sdpa_backward(d->state, dq, dk, dv, dsink, scratch, dy, y_expected, lse_expected, q, k, v, sink, n);
        ga_sdpa_backward(dq_expected, dk_expected, dv_expected, dsink_expected, scratch, dy, y_expected, lse_expected,
                         q, k, v, sink, n);
        expect_same(dsink, dsink_expected, n.HQ, 1e-5, "sdpa_backward, dsink", where);
        if (n.T == 1 && !sink) { /* with one key dq and dk are 0 but for rounding */
            expect_below(norm_of(dq, q_size), 1e-4, "sdpa_backward, dq, %s", where);
            expect_below(norm_of(dk, k_size), 1e-4, "sdpa_backward, dk, %s", where);
        } else {
            expect_same(dq, dq_expected, q_size, tolerance, "sdpa_backward, dq", where);
            expect_same(dk, dk_expected, k_size, tolerance, "sdpa_backward, dk", where);
        }
        expect_same(dv, dv_expected, k_size, tolerance, "sdpa_backward, dv", where);
        ga_real *more[] = {dy, scratch, dq, dk, dv, dsink, dq_expected, dk_expected, dv_expected, dsink_expected};
        for (size_t i = 0; i < COUNT(more); i++) free(more[i]);
    }
    ga_real *all[] = {q, k, v, sink, y, lse, y_expected, lse_expected};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
}

static void test_sdpa(void **unused) {
    (void)unused;
    static const size_t lengths[] = {1, 3, 17, 63, 64, 65, 129, 200}, widths[] = {2, 16, 34, 64, 100};
    EACH_SUBJECT(s) {
        for (size_t t = 0; t < COUNT(lengths); t++)
            for (size_t w = 0; w < COUNT(widths); w++) {
                ga_shape n = {2, lengths[t], lengths[t], 4, 2, widths[w]};
                check_sdpa(&s, n, false);
                check_sdpa(&s, n, true);
            }
        for (size_t past = 1; past < 300; past = past * 2 + 5) /* queries that come after a cache */
            for (size_t t = 0; t < COUNT(lengths); t++) {
                ga_shape n = {1, lengths[t], lengths[t] + past, 2, 1, 32};
                check_sdpa(&s, n, false);
                check_sdpa(&s, n, true);
            }
        ga_shape large = {1, 1100, 1100, 2, 1, 64}, wide = {1, 70, 70, 3, 3, GA_MAX_HEAD_DIM};
        check_sdpa(&s, large, false);
        check_sdpa(&s, large, true);
        check_sdpa(&s, wide, true);
    }
}

/* ---- output head ---------------------------------------------------------------------------------------------------------- */

static void check_head(const subject *s, size_t N, size_t C, size_t V, double deviation) {
    const ga_device *d = &s->device;
    uint64_t random = N * 1000 + C * 10 + V;
    ga_real *x = normal_reals(N * C, deviation, &random), *logits = reals(GA_HEAD_ROWS * V);
    ga_real *w = (ga_real *)d->allocate(d->state, V * C * sizeof *w);
    int32_t *targets = (int32_t *)calloc(N, sizeof *targets);
    assert_non_null(w), assert_non_null(targets);
    fill_normal(w, V * C, 0, 1, &random);
    fill_tokens(targets, N, V, &random);
    for (size_t i = 2; i < N; i += 5) targets[i] = -1;
    bool bf16 = s->bf16 && deviation < 1; /* with astronomical losses plain C takes over, which does not round */
    ga_real *xr = rounded_copy(x, N * C, bf16), *wr = rounded_copy(w, V * C, bf16);
    ga_real *losses = reals(N), *only = reals(N), *dx = reals(N * C), *dw = normal_reals(V * C, 0.1, &random);
    ga_real *losses_expected = reals(N), *dx_expected = reals(N * C), *dw_expected = copy_of(dw, V * C);
    char where[128];
    snprintf(where, sizeof where, "%s, N %zu C %zu V %zu", s->what, N, C, V);
    const ga_real scale = (ga_real)0.125;
    d->head_loss(d->state, losses, dx, dw, logits, x, w, targets, N, C, V, &scale);
    d->head_loss(d->state, only, NULL, NULL, logits, x, w, targets, N, C, V, NULL);
    ga_head_loss(losses_expected, dx_expected, dw_expected, logits, xr, wr, targets, N, C, V, &scale);
    double tolerance = bf16 ? 4e-3 : 1e-5; /* the probabilities are rounded too: 2^-8 */
    expect_same(losses, losses_expected, N, 1e-5, "head_loss, losses", where);
    expect_same(only, losses_expected, N, 1e-5, "head_loss without gradients", where);
    expect_same(dx, dx_expected, N * C, tolerance, "head_loss, dx", where);
    expect_same(dw, dw_expected, V * C, tolerance, "head_loss, dw", where);
    for (size_t i = 2; i < N; i += 5) assert_true(losses[i] == 0 && dx[i * C] == 0);
    ga_real *all[] = {x, logits, xr, wr, losses, only, dx, dw, losses_expected, dx_expected, dw_expected};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
    free(targets);
    d->release(d->state, w);
}

static void test_head(void **unused) {
    (void)unused;
    EACH_SUBJECT(s) {
        for (size_t a = 0; a < COUNT(odd); a++)
            for (size_t b = 0; b < COUNT(odd); b++)
                for (size_t c = 1; c < COUNT(odd); c++) check_head(&s, odd[a], odd[b], odd[c], 0.3);
        check_head(&s, 600, 33, 300, 0.3);   /* two slices of rows */
        check_head(&s, 9, 33, 9001, 0.3);    /* several parts of the vocabulary */
        check_head(&s, 150, 1030, 77, 0.02); /* several parts of the contraction */
        check_head(&s, 20, 65, 129, 30);     /* logits so far apart that an exp of their difference overflows */
    }
}

/* ---- elementwise operators ---------------------------------------------------------------------------------------------------- */

static void check_norms(const subject *s, size_t N, size_t C) {
    const ga_device *d = &s->device;
    uint64_t random = N * 100 + C;
    ga_real *x = normal_reals(N * C, 3, &random), *dh = normal_reals(N * C, 1, &random),
            *w = normal_reals(C, 1, &random);
    ga_real *h = reals(N * C), *rstd = reals(N), *dx = normal_reals(N * C, 1, &random),
            *dw = normal_reals(C, 1, &random);
    ga_real *h_expected = reals(N * C), *rstd_expected = reals(N), *dx_expected = copy_of(dx, N * C),
            *dw_expected = copy_of(dw, C);
    char where[128];
    snprintf(where, sizeof where, "%s, N %zu C %zu", s->what, N, C);
    d->rmsnorm_forward(d->state, h, rstd, x, w, N, C, (ga_real)1e-6);
    ga_rmsnorm_forward(h_expected, rstd_expected, x, w, N, C, (ga_real)1e-6);
    expect_same(h, h_expected, N * C, 1e-6, "rmsnorm_forward", where);
    expect_same(rstd, rstd_expected, N, 1e-6, "rmsnorm_forward, rstd", where);
    for (int add = 1; add >= 0; add--) {
        d->rmsnorm_backward(d->state, dx, dw, dh, x, w, rstd_expected, N, C, add);
        ga_rmsnorm_backward(dx_expected, dw_expected, dh, x, w, rstd_expected, N, C, add);
        if (C > 1)
            expect_same(dx, dx_expected, N * C, 1e-5, add ? "rmsnorm_backward, adding" : "rmsnorm_backward", where);
        expect_same(dw, dw_expected, C, 1e-5, "rmsnorm_backward, dw", where);
    }
    d->rmsnorm_backward(d->state, dh, dw, dh, x, w, rstd_expected, N, C, false); /* in place */
    if (C > 1) expect_same(dh, dx_expected, N * C, 1e-5, "rmsnorm_backward in place", where);
    ga_real *all[] = {x, dh, w, h, rstd, dx, dw, h_expected, rstd_expected, dx_expected, dw_expected};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
}

static void check_heads(const subject *s, size_t T, size_t D, bool norm, bool rotate) {
    enum { B = 2, H = 3, GAP = 5 };
    const ga_device *d = &s->device;
    uint64_t random = T * 100 + D;
    size_t n = B * T * H * D, stride = H * D + GAP;
    ga_real *x = normal_reals(B * T * stride, 2, &random), *dy = normal_reals(n, 1, &random),
            *rope = normal_reals(T * D, 1, &random);
    ga_real *weights = normal_reals(D, 1, &random), *w = norm ? weights : NULL, *angles = rotate ? rope : NULL;
    ga_real *y = reals(n), *y_expected = reals(n), *dx = reals(B * T * stride), *dx_expected = reals(B * T * stride);
    ga_real *dw = normal_reals(D, 1, &random), *dw_expected = copy_of(dw, D);
    char where[128];
    snprintf(where, sizeof where, "%s, T %zu D %zu norm %d rope %d", s->what, T, D, norm, rotate);
    d->heads_forward(d->state, y, x, stride, w, angles, B, T, H, D, (ga_real)1e-6);
    ga_heads_forward(y_expected, x, stride, w, angles, B, T, H, D, (ga_real)1e-6);
    expect_same(y, y_expected, n, 1e-6, "heads_forward", where);
    d->heads_backward(d->state, dx, dw, dy, x, stride, stride, w, angles, B, T, H, D, (ga_real)1e-6);
    ga_heads_backward(dx_expected, dw_expected, dy, x, stride, stride, w, angles, B, T, H, D, (ga_real)1e-6);
    expect_same(dx, dx_expected, B * T * stride, 1e-5, "heads_backward", where);
    expect_same(dw, dw_expected, D, 1e-5, "heads_backward, dw", where);
    ga_real *all[] = {x, dy, rope, weights, y, y_expected, dx, dx_expected, dw, dw_expected};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
}

/* Every form of the gate, also those that are left to plain C. */
static void check_gate(const subject *s, const char *settings, bool free_standing) {
    enum { N = 9, GAP = 3 };
    const ga_device *d = &s->device;
    ga_config c = ga_config_default();
    configure(&c, settings);
    ga_gate g = ga_gate_of(&c);
    uint64_t random = 7;
    size_t width = g.H * g.D, stride = width + GAP, s_stride = free_standing ? 0 : width + 2;
    ga_real *y = normal_reals(N * stride, 1, &random), *logits = normal_reals(N * (width + 2), 2, &random);
    ga_real *d_o = normal_reals(N * width, 1, &random), *o = reals(N * width), *o_expected = reals(N * width);
    ga_real *dy = reals(N * stride), *dy_expected = reals(N * stride), *ds = reals(N * (width + 2)),
            *ds_expected = reals(N * (width + 2));
    char where[256];
    snprintf(where, sizeof where, "%s, %s", s->what, settings);
    d->gate_forward(d->state, o, y, stride, logits, s_stride, N, g);
    ga_gate_forward(o_expected, y, stride, logits, s_stride, N, g);
    expect_same(o, o_expected, N * width, 1e-6, "gate_forward", where);
    d->gate_backward(d->state, dy, stride, ds, s_stride, d_o, y, stride, logits, s_stride, N, g);
    ga_gate_backward(dy_expected, stride, ds_expected, s_stride, d_o, y, stride, logits, s_stride, N, g);
    expect_same(dy, dy_expected, N * stride, 1e-6, "gate_backward, dy", where);
    expect_same(ds, ds_expected, N * (width + 2), 1e-5, "gate_backward, ds", where);
    ga_real *all[] = {y, logits, d_o, o, o_expected, dy, dy_expected, ds, ds_expected};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
}

static void check_swiglu(const subject *s, size_t N, size_t F) {
    const ga_device *d = &s->device;
    uint64_t random = N * 100 + F;
    ga_real *u = normal_reals(N * 2 * F, 3, &random), *da = normal_reals(N * F, 1, &random), *a = reals(N * F);
    ga_real *a_expected = reals(N * F), *du = reals(N * 2 * F), *du_expected = reals(N * 2 * F);
    char where[128];
    snprintf(where, sizeof where, "%s, N %zu F %zu", s->what, N, F);
    u[0] = 200, u[2 * F * N - 1] = -200; /* beyond the range of exp */
    if (F > 1) u[1] = -200;
    d->swiglu_forward(d->state, a, u, N, F);
    ga_swiglu_forward(a_expected, u, N, F);
    expect_same(a, a_expected, N * F, 1e-6, "swiglu_forward", where);
    d->swiglu_backward(d->state, du, da, u, N, F);
    ga_swiglu_backward(du_expected, da, u, N, F);
    expect_same(du, du_expected, N * 2 * F, 1e-6, "swiglu_backward", where);
    ga_real *all[] = {u, da, a, a_expected, du, du_expected};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
}

/* ---- mixture of experts ---- */

/* As check_linear, for each expert; one has no rows. */
static void check_grouped(const subject *s, size_t rows, size_t O, size_t I) {
    enum { E = 4 };
    const ga_device *d = &s->device;
    uint64_t random = rows * 10000 + O * 100 + I;
    int32_t offsets[E + 1] = {0, (int32_t)rows, (int32_t)rows, (int32_t)(rows + 1), (int32_t)(3 * rows + 1)};
    size_t R = 3 * rows + 1, stride = O * I + 3;
    ga_real *x = normal_reals(R * I, 1, &random), *dy = normal_reals(R * O, 1, &random);
    ga_real *w = (ga_real *)d->allocate(d->state, E * stride * sizeof *w);
    assert_non_null(w);
    fill_normal(w, E * stride, 0, 1, &random);
    ga_real *y = reals(R * O), *dx = reals(R * I), *dw = normal_reals(E * stride, 1, &random);
    ga_real *dw_expected = copy_of(dw, E * stride), *y_expected = reals(R * O), *dx_expected = reals(R * I);
    ga_real *xr = rounded_copy(x, R * I, s->bf16), *wr = rounded_copy(w, E * stride, s->bf16),
            *dyr = rounded_copy(dy, R * O, s->bf16);
    char where[128];
    snprintf(where, sizeof where, "%s, %zu rows O %zu I %zu", s->what, rows, O, I);
    d->grouped_forward(d->state, y, x, w, stride, offsets, E, O, I);
    ga_grouped_forward(y_expected, xr, wr, stride, offsets, E, O, I);
    expect_same(y, y_expected, R * O, 1e-5, "grouped_forward", where);
    d->grouped_backward(d->state, dx, dw, dy, x, w, stride, offsets, E, O, I);
    ga_grouped_backward(dx_expected, dw_expected, dyr, xr, wr, stride, offsets, E, O, I);
    expect_same(dx, dx_expected, R * I, 1e-5, "grouped_backward, dx", where);
    expect_same(dw, dw_expected, E * stride, 1e-5, "grouped_backward, dw", where);
    ga_real *all[] = {x, dy, y, dx, dw, dw_expected, y_expected, dx_expected, xr, wr, dyr};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
    d->release(d->state, w);
}

static void check_expert_swiglu(const subject *s, size_t R, size_t F) {
    const ga_device *d = &s->device;
    uint64_t random = R * 100 + F;
    int32_t *slots = (int32_t *)calloc(R, sizeof *slots);
    assert_non_null(slots);
    for (size_t i = 0; i < R; i++) slots[i] = (int32_t)(R - 1 - i);
    ga_real *u = normal_reals(R * 2 * F, 3, &random), *da = normal_reals(R * F, 1, &random), *a = reals(R * F);
    ga_real *w = normal_reals(R, 1, &random), *dw = reals(R), *dw_expected = reals(R);
    ga_real *a_expected = reals(R * F), *du = reals(R * 2 * F), *du_expected = reals(R * 2 * F);
    char where[128];
    snprintf(where, sizeof where, "%s, R %zu F %zu", s->what, R, F);
    d->expert_swiglu_forward(d->state, a, u, w, slots, R, F);
    ga_expert_swiglu_forward(a_expected, u, w, slots, R, F);
    expect_same(a, a_expected, R * F, 1e-6, "expert_swiglu_forward", where);
    d->expert_swiglu_backward(d->state, du, dw, da, u, w, slots, R, F);
    ga_expert_swiglu_backward(du_expected, dw_expected, da, u, w, slots, R, F);
    expect_same(du, du_expected, R * 2 * F, 1e-6, "expert_swiglu_backward", where);
    expect_same(dw, dw_expected, R, 2e-6, "expert_swiglu_backward, d weights", where);
    ga_real *all[] = {u, da, a, w, dw, dw_expected, a_expected, du, du_expected};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
    free(slots);
}

static void test_mixture(void **unused) {
    (void)unused;
    EACH_SUBJECT(s) {
        for (size_t a = 0; a < COUNT(odd); a++)
            for (size_t b = 0; b < COUNT(odd); b++) {
                check_grouped(&s, odd[a], odd[b], 35);
                check_grouped(&s, odd[a], 20, odd[b]);
                check_expert_swiglu(&s, odd[a], odd[b]);
            }
        check_grouped(&s, 5, 33, 1051);
        check_grouped(&s, 300, 40, 35);
    }
}

static void test_elementwise(void **unused) {
    (void)unused;
    static const size_t widths[] = {2, 10, 16, 34, 64, 66, 128, GA_MAX_HEAD_DIM};
    static const char *const gates[] = {
        "",
        "gate_type=headwise",
        "head_dim=18 n_heads=3 n_kv_heads=1",
        "gate_type=headwise head_dim=18 n_heads=3 n_kv_heads=1",
        "gate_form=additive gate_activation=silu",
        "gate_sharing=shared",
        "gate_activation=ns-sigmoid",
        "gate_activation=identity",
        "gate_type=headwise gate_sharing=shared",
        "gate_position=G2",
        "gate_position=G5 d_model=37",
        "gate_form=self gate_activation=rmsnorm",
        "gate_form=self gate_activation=silu",
    };
    EACH_SUBJECT(s) {
        for (size_t a = 0; a < COUNT(odd); a++)
            for (size_t b = 0; b < COUNT(odd); b++) check_norms(&s, odd[a], odd[b]), check_swiglu(&s, odd[a], odd[b]);
        for (size_t t = 0; t < 3; t++)
            for (size_t w = 0; w < COUNT(widths); w++)
                for (int form = 0; form < 4; form++) check_heads(&s, odd[t], widths[w], form & 1, form & 2);
        for (size_t i = 0; i < COUNT(gates); i++) check_gate(&s, gates[i], false);
        check_gate(&s, "gate_input=none", true);
        check_gate(&s, "gate_input=scalar", true);
    }
}

/* ---- values that are not finite ---------------------------------------------------------------------------------------------- */

static void test_not_finite(void **unused) {
    (void)unused;
    enum { M = 20, O = 33, I = 17, T = 70, D = 16 };
    EACH_SUBJECT(s) {
        const ga_device *d = &s.device;
        uint64_t random = 3;
        ga_real *x = normal_reals(M * I, 1, &random), *w = normal_reals(O * I, 1, &random), y[M * O];
        x[5 * I + 3] = NAN, x[7 * I + 2] = (ga_real)INFINITY;
        d->linear_forward(d->state, y, x, w, M, O, I);
        for (size_t i = 0; i < M; i++)
            for (size_t o = 0; o < O; o++) {
                if (i == 5)
                    assert_true(isnan(y[i * O + o]));
                else if (i == 7)
                    assert_false(isfinite(y[i * O + o]));
                else
                    assert_true(isfinite(y[i * O + o]));
            }
        free(x), free(w);

        ga_shape n = {1, T, T, 1, 1, D};
        ga_real *q = normal_reals(3 * T * D, 1, &random), *k = q + T * D, *v = k + T * D, *out = reals(T * D), lse[T];
        q[40 * D] = NAN;
        d->sdpa_forward(d->state, out, lse, q, k, v, NULL, n);
        for (size_t i = 0; i < T; i++) assert_true(isnan(lse[i]) == (i == 40) && isnan(out[i * D]) == (i == 40));
        q[40 * D] = 0, k[30 * D] = NAN;
        d->sdpa_forward(d->state, out, lse, q, k, v, NULL, n);
        for (size_t i = 0; i < T; i++) assert_true(isnan(lse[i]) == (i >= 30) && isnan(out[i * D]) == (i >= 30));
        free(q), free(out);
    }
}

/* ---- threads, choice ----------------------------------------------------------------------------------------------------------- */

/* Loss and gradients of a small model, bit by bit. */
static void check_threads(const char *more) {
    EACH_SUBJECT(s) {
        ga_config c = ga_config_default();
        configure(&c, "vocab_size=301 d_model=72 n_layers=2 n_heads=4 n_kv_heads=2 head_dim=18 d_ff=130 "
                      "max_seq_len=150 batch_size=2");
        configure(&c, more);
        int32_t tokens[300], targets[300];
        uint64_t random = 1;
        fill_tokens(tokens, 300, 301, &random), fill_tokens(targets, 300, 301, &random);
        ga_real *first = NULL;
        double first_loss = 0;
        for (int threads = 1; threads <= 5; threads += 2) {
            ga_error e;
            use_threads(threads);
            ga_model *m = ga_create(&c, &s.device, GA_TRAINING, &e);
            if (!m) fail_msg("%s", e.text);
            double loss;
            expect_ok(ga_forward_backward(m, tokens, targets, 2, 150, 1, NULL, &loss, &e), &e);
            if (!first) first = copy_of(m->gradients, m->n_weights), first_loss = loss;
            assert_true(loss == first_loss);
            assert_memory_equal(first, m->gradients, m->n_weights * sizeof *first);
            ga_destroy(m);
        }
        use_threads(1);
        free(first);
    }
}

static void test_threads(void **unused) {
    (void)unused;
    check_threads("");
    check_threads("n_experts=7 experts_per_token=3 d_ff=50");
}

static void test_choice(void **unused) {
    (void)unused;
    ga_device d;
    ga_error e;
    ga_x86_settings settings = {NULL, true};
    assert_int_equal(setenv("GA_ISA", "c", 1), 0);
    expect_ok(ga_device_x86(&d, settings, &e), &e);
    assert_string_equal(d.name, ga_device_cpu().name);
    assert_false(ga_device_x86_bf16(&d));
    ga_device_x86_destroy(&d);
    assert_int_equal(setenv("GA_ISA", "sse9", 1), 0);
    assert_int_equal(ga_device_x86(&d, settings, &e), GA_ERR_CONFIG);
    assert_non_null(strstr(e.text, "sse9"));
    unsetenv("GA_ISA");
    expect_ok(ga_device_x86(&d, settings, &e), &e);
    ga_device_x86_destroy(&d);
    settings.isa = "nonsense";
    assert_int_equal(ga_device_x86(&d, settings, NULL), GA_ERR_CONFIG);
}

int main(void) {
    use_threads(1); /* tests/run.sh runs on busy machines; test_threads has its own */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear), cmocka_unit_test(test_changed_weights), cmocka_unit_test(test_sdpa),
        cmocka_unit_test(test_head),   cmocka_unit_test(test_not_finite),      cmocka_unit_test(test_threads),
        cmocka_unit_test(test_choice), cmocka_unit_test(test_elementwise),     cmocka_unit_test(test_mixture),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
