/* Every operator of gated_attention_cuda.cuh but attention (test_sdpa.c) against plain C, on odd sizes; whole training
 * steps, statistics and generation of each variant; failures. The same file for a GPU and for the CPU by cuda_cpu.h. */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_cuda.cuh"
#include "testing.h"
#include "device.h"
#ifdef GAI_CUDA_CPU
#include "cuda_cpu_control.h"
#endif

/* ---- numbers that are on both sides ---------------------------------------------------------------------------------- */

typedef struct {
    size_t n;
    ga_real *host, *there;
} pair;

static uint64_t stream = 1; /* of random numbers */

/* The same n values on the host and on the device. */
static pair pair_of(const ga_real *values, size_t n) {
    pair p = {n, reals(n), (ga_real *)device.allocate(device.state, n * sizeof *p.there)};
    if (!p.there) fail_msg("no device memory");
    if (values) memcpy(p.host, values, n * sizeof *values);
    device.copy_in(device.state, p.there, p.host, n * sizeof *p.host);
    return p;
}

static pair normal_pair(size_t n, double deviation) {
    ga_real *x = normal_reals(n, deviation, &stream);
    pair p = pair_of(x, n);
    free(x);
    return p;
}

/* What a product reads: with bfloat16, values that it holds exactly. */
static pair operand_pair(size_t n, double deviation) {
    ga_real *x = normal_reals(n, deviation, &stream);
    for (size_t i = 0; i < n; i++) x[i] = bf16 ? bf16_rounded(x[i]) : x[i];
    pair p = pair_of(x, n);
    free(x);
    return p;
}

static int32_t *ints_on_device(const int32_t *host, size_t n) {
    int32_t *p = (int32_t *)device.allocate(device.state, n * sizeof *p);
    device.copy_in(device.state, p, host, n * sizeof *p);
    return p;
}

/* Both sides agree, on the scale of the host's. */
static void expect_same(pair p, double tolerance, const char *what, const char *where) {
    ga_real *got = reals(p.n);
    double *expected = (double *)calloc(p.n, sizeof *expected);
    device.copy_out(device.state, got, p.there, p.n * sizeof *got);
    for (size_t i = 0; i < p.n; i++) expected[i] = (double)p.host[i];
    expect_below(difference(got, expected, p.n), tolerance, "%s (%s)", what, where);
    free(got), free(expected);
}

static void drop(pair p) {
    free(p.host);
    device.release(device.state, p.there);
}

/* n sums in double on both sides, which grow. */
typedef struct {
    size_t n;
    double *host, *there;
} tally;

static tally zero_sums(size_t n) {
    tally s = {n, (double *)calloc(n, sizeof(double)), (double *)device.allocate(device.state, n * sizeof(double))};
    if (!s.host || !s.there) fail_msg("no memory");
    return s;
}

static double *sums_there(tally s) {
    double *got = (double *)calloc(s.n, sizeof *got);
    device.copy_out(device.state, got, s.there, s.n * sizeof *got);
    return got;
}

static void expect_same_sums(tally s, double tolerance, const char *what, const char *where) {
    double *got = sums_there(s);
    for (size_t i = 0; i < s.n; i++)
        if (!(fabs(got[i] - s.host[i]) <= tolerance * fmax(1, fabs(s.host[i]))))
            fail_msg("%s (%s): sum %zu is %.9g, not %.9g", what, where, i, got[i], s.host[i]);
    free(got);
}

static void drop_sums(tally s) {
    free(s.host);
    device.release(device.state, s.there);
}

#define DROP(...)                                                   \
    do {                                                            \
        pair all_[] = {__VA_ARGS__};                                \
        for (size_t i_ = 0; i_ < COUNT(all_); i_++) drop(all_[i_]); \
    } while (0)

/* Runs an operator here in plain C and there on the device: BOTH(add, (y.S, a.S, b.S, n)), where S is the side. */
#define BOTH(op, here, there)                      \
    do {                                           \
        ga_##op here;                              \
        device.op(device.state, GAI_STRIP(there)); \
    } while (0)

static const size_t odd[] = {1, 3, 17, 64, 129};

static const char *place(const char *format, ...) {
    static char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return text;
}

/* ---- copies ----------------------------------------------------------------------------------------------------------- */

/* The host's memory is free to change when copy_in returns, whatever the device has still to do; long copies come
 * back as they went. */
static void test_copies(void **unused) {
    (void)unused;
    enum { COPIES = 100, EACH = 33 };
    static int32_t value[EACH], got[COPIES * EACH];
    open_device(false);
    int32_t *there = (int32_t *)device.allocate(device.state, sizeof got);
    for (int i = 0; i < COPIES; i++) {
        for (int j = 0; j < EACH; j++) value[j] = i * EACH + j;
        device.copy_in(device.state, there + i * EACH, value, sizeof value);
    }
    device.copy_out(device.state, got, there, sizeof got);
    for (int i = 0; i < COPIES * EACH; i++) assert_int_equal(got[i], i);
    device.release(device.state, there);

    size_t n = (size_t)(11 << 20) + 3; /* more than all slots hold */
    unsigned char *bytes = (unsigned char *)malloc(2 * n);
    assert_non_null(bytes);
    for (size_t i = 0; i < n; i++) bytes[i] = (unsigned char)(i * 2654435761u >> 13);
    void *block = device.allocate(device.state, n);
    device.copy_in(device.state, block, bytes, n);
    device.copy_out(device.state, bytes + n, block, n);
    assert_memory_equal(bytes, bytes + n, n);
    free(bytes);
    device.release(device.state, block);
    close_device();
}

/* ---- operators -------------------------------------------------------------------------------------------------------- */

static void check_rmsnorm(size_t N, size_t C) {
    const char *where = place("N %zu C %zu", N, C);
    ga_real eps = (ga_real)1e-6;
    pair x = normal_pair(N * C, 3), w = normal_pair(C, 1), h = normal_pair(N * C, 1), rstd = normal_pair(N, 1);
    BOTH(rmsnorm_forward, (h.host, rstd.host, x.host, w.host, N, C, eps),
         (h.there, rstd.there, x.there, w.there, N, C, eps));
    expect_same(h, 1e-6, "rmsnorm_forward", where);
    expect_same(rstd, 1e-6, "rmsnorm_forward, rstd", where);
    pair dh = normal_pair(N * C, 1), dx = normal_pair(N * C, 1), dw = normal_pair(C, 1);
    for (int add = 1; add >= 0; add--) {
        BOTH(rmsnorm_backward, (dx.host, dw.host, dh.host, x.host, w.host, rstd.host, N, C, add),
             (dx.there, dw.there, dh.there, x.there, w.there, rstd.there, N, C, add));
        expect_same(dw, C > 1 ? 1e-5 : 1e-3, "rmsnorm_backward, dw", where); /* one sum may nearly cancel */
        if (C > 1) expect_same(dx, 1e-5, add ? "rmsnorm_backward, added" : "rmsnorm_backward", where);
    }
    BOTH(rmsnorm_backward, (dh.host, dw.host, dh.host, x.host, w.host, rstd.host, N, C, false),
         (dh.there, dw.there, dh.there, x.there, w.there, rstd.there, N, C, false));
    if (C > 1) expect_same(dh, 1e-5, "rmsnorm_backward in place", where);
    DROP(x, w, h, rstd, dh, dx, dw);
}

static void test_rmsnorm(void **unused) {
    (void)unused;
    open_device(false);
    for (size_t a = 0; a < COUNT(odd); a++)
        for (size_t b = 0; b < COUNT(odd); b++) check_rmsnorm(odd[a], odd[b]);
    check_rmsnorm(2, 1028), check_rmsnorm(258, 260);
    check_rmsnorm(2, 12288), check_rmsnorm(2, 12800); /* too long for shared memory */
    close_device();
}

static void check_heads(size_t T, size_t D, bool norm, bool turn) {
    enum { B = 2, H = 3 };
    size_t n = B * T * H * D, stride = H * D + (D % 4 ? 3 : 4);
    ga_real eps = (ga_real)1e-6;
    const char *where = place("T %zu D %zu norm %d rope %d", T, D, norm, turn);
    pair x = normal_pair(B * T * stride, 2), dy = normal_pair(n, 1), r = normal_pair(T * D, 1), w = normal_pair(D, 1);
    pair y = normal_pair(n, 1), dx = normal_pair(B * T * stride, 1), dw = normal_pair(D, 1);
    BOTH(heads_forward, (y.host, x.host, stride, norm ? w.host : NULL, turn ? r.host : NULL, B, T, H, D, eps),
         (y.there, x.there, stride, norm ? w.there : NULL, turn ? r.there : NULL, B, T, H, D, eps));
    expect_same(y, 1e-6, "heads_forward", where);
    BOTH(heads_backward,
         (dx.host, norm ? dw.host : NULL, dy.host, x.host, stride, stride, norm ? w.host : NULL, turn ? r.host : NULL,
          B, T, H, D, eps),
         (dx.there, norm ? dw.there : NULL, dy.there, x.there, stride, stride, norm ? w.there : NULL,
          turn ? r.there : NULL, B, T, H, D, eps));
    expect_same(dx, 1e-5, "heads_backward", where);
    expect_same(dw, 1e-5, "heads_backward, dw", where);
    DROP(x, dy, r, w, y, dx, dw);
}

static void test_heads(void **unused) {
    (void)unused;
    static const size_t widths[] = {2, 6, 8, 18, 64, 128, 130, 256};
    open_device(false);
    for (size_t i = 0; i < COUNT(widths); i++)
        for (int form = 0; form < 4; form++) check_heads(5, widths[i], form & 1, form & 2);
    check_heads(170, 4, true, true); /* more batches of heads than blocks */
    close_device();
}

static void check_linear(size_t M, size_t O, size_t I) {
    const char *where = place("M %zu O %zu I %zu", M, O, I);
    pair x = operand_pair(M * I, 1), w = operand_pair(O * I, 1), dy = operand_pair(M * O, 1), y = normal_pair(M * O, 1);
    pair dx = normal_pair(M * I, 1), dw = normal_pair(O * I, 1);
    BOTH(linear_forward, (y.host, x.host, w.host, M, O, I), (y.there, x.there, w.there, M, O, I));
    expect_same(y, 1e-5, "linear_forward", where);
    BOTH(linear_backward, (dx.host, dw.host, dy.host, x.host, w.host, M, O, I),
         (dx.there, dw.there, dy.there, x.there, w.there, M, O, I));
    expect_same(dx, 1e-5, "linear_backward", where);
    expect_same(dw, 1e-5, "linear_backward, dw", where);
    BOTH(linear_backward, (NULL, dw.host, dy.host, x.host, w.host, M, O, I),
         (NULL, dw.there, dy.there, x.there, w.there, M, O, I));
    expect_same(dw, 1e-5, "linear_backward, dw alone", where);
    DROP(x, w, dy, y, dx, dw);
}

static void test_linear(void **unused) {
    (void)unused;
    for (int half = 0; half < 2; half++) {
        open_device(half);
        for (size_t a = 0; a < 3; a++)
            for (size_t b = 0; b < 3; b++)
                check_linear(odd[a], odd[b + 1], odd[2 - a]), check_linear(64, odd[a], odd[b]);
        close_device();
    }
}

/* A product that follows the operator which made its operand reads what that operator has rounded beside it: the same
 * bits, and never what has been written over since. */
enum { BESIDE_N = 6, BESIDE_C = 12, BESIDE_VALUES = BESIDE_N * BESIDE_C };

static void make_beside(int maker, pair h, pair from, pair w) {
    enum { N = BESIDE_N, C = BESIDE_C };
    ga_config c = ga_config_default();
    configure(&c, maker == 2 ? "n_heads=2 n_kv_heads=1 head_dim=6"
                             : "n_heads=2 n_kv_heads=1 head_dim=6 gate_type=headwise");
    void *s = device.state;
    if (maker == 0)
        device.rmsnorm_forward(s, h.there, from.there + 2 * BESIDE_VALUES, from.there, w.there, N, C, (ga_real)1e-6);
    if (maker == 1) device.swiglu_forward(s, h.there, from.there, N, C);
    if (maker == 2 || maker == 3)
        device.gate_forward(s, h.there, from.there, C, from.there + BESIDE_VALUES, C, N, ga_gate_of(&c));
    if (maker == 4) device.swiglu_backward(s, h.there, from.there + BESIDE_VALUES, from.there, N, C / 2);
}

static void overwrite(int writer, pair h, pair from, pair w) {
    void *s = device.state;
    ga_real *zeros = reals(BESIDE_VALUES);
    pair sum = pair_of(NULL, 2);
    if (writer == 1) device.zero(s, h.there, BESIDE_VALUES * sizeof *zeros);
    if (writer == 2) device.copy_in(s, h.there, zeros, BESIDE_VALUES * sizeof *zeros);
    if (writer == 3) device.scale_rows(s, h.there, BESIDE_C, BESIDE_N, BESIDE_C, 3);
    if (writer == 4) device.linear_forward(s, h.there, h.there, w.there, 1, BESIDE_C, BESIDE_C);
    if (writer == 5) device.sum_of_squares(s, (double *)(void *)sum.there, from.there, from.n); /* takes the scratch */
    free(zeros);
    drop(sum);
}

static void test_rounded_beside(void **unused) {
    (void)unused;
    enum { N = BESIDE_N, C = BESIDE_C };
    open_device(true);
    pair from = normal_pair(3 * N * C, 1), w = normal_pair(C * C, 1), h = normal_pair(N * C, 1),
         y = normal_pair(N * C, 1);
    pair dy = normal_pair(N * C, 1), dx = normal_pair(N * C, 1), dw = normal_pair(C * C, 1), other = normal_pair(3, 1);
    for (int maker = 0; maker < 5; maker++)
        for (int writer = 0; writer < 6; writer++) {
            ga_real got[2][2 * N * C + C * C];
            for (int again = 0; again < 2; again++) {
                device.zero(device.state, dw.there, C * C * sizeof *dw.host);
                for (int product = 0; product < 3; product++) {
                    make_beside(maker, h, from, w), overwrite(writer, h, from, w);
                    if (again) { /* rounded anew, after either */
                        device.add(device.state, other.there, other.there, other.there, 3);
                        device.zero(device.state, other.there, 3 * sizeof *other.host);
                    }
                    if (product == 0) device.linear_forward(device.state, y.there, h.there, w.there, N, C, C);
                    if (product == 1)
                        device.linear_backward(device.state, dx.there, dw.there, dy.there, h.there, w.there, N, C, C);
                    if (product == 2)
                        device.linear_backward(device.state, dx.there, dw.there, h.there, dy.there, w.there, N, C, C);
                }
                device.copy_out(device.state, got[again], y.there, N * C * sizeof *y.host);
                device.copy_out(device.state, got[again] + N * C, dx.there, N * C * sizeof *y.host);
                device.copy_out(device.state, got[again] + 2 * N * C, dw.there, C * C * sizeof *y.host);
            }
            if (memcmp(got[0], got[1], sizeof got[0]) != 0) fail_msg("maker %d, writer %d", maker, writer);
        }
    DROP(from, w, h, y, dy, dx, dw, other);
    close_device();
}

/* A packed copy of a block of weights follows what weights_changed says, also for a part of the block. */
static void test_packed_weights(void **unused) {
    (void)unused;
    enum { M = 4, O = 8, I = 12 };
    open_device(true);
    pair x = operand_pair(M * I, 1), block = operand_pair(3 * O * I + 5, 1), y = normal_pair(M * O, 1);
    for (int round = 0; round < 2; round++) {
        device.weights_changed(device.state, block.there, block.n);
        for (size_t at = 0; at < 3 * O * I; at += O * I) {
            BOTH(linear_forward, (y.host, x.host, block.host + at, M, O, I),
                 (y.there, x.there, block.there + at, M, O, I));
            expect_same(y, 1e-6, "packed weights", place("at %zu", at));
        }
        for (size_t i = 0; i < block.n; i++) block.host[i] = -block.host[i] * 2;
        device.copy_in(device.state, block.there, block.host, block.n * sizeof *block.host);
    }
    DROP(x, block, y);
    close_device();
}

static void check_embedding(size_t N, size_t C, size_t V) {
    int32_t *tokens = (int32_t *)calloc(N, sizeof *tokens);
    fill_tokens(tokens, N, V, &stream);
    int32_t *there = ints_on_device(tokens, N);
    const char *where = place("N %zu C %zu V %zu", N, C, V);
    pair w = normal_pair(V * C, 1), x = normal_pair(N * C, 1), dx = normal_pair(N * C, 1), dw = normal_pair(V * C, 1);
    BOTH(embedding_forward, (x.host, tokens, w.host, N, C), (x.there, there, w.there, N, C));
    expect_same(x, 1e-9, "embedding_forward", where);
    BOTH(embedding_backward, (dw.host, tokens, dx.host, N, C), (dw.there, there, dx.there, N, C));
    expect_same(dw, 1e-9, "embedding_backward: the same order of additions", where);
    DROP(w, x, dx, dw);
    free(tokens);
    device.release(device.state, there);
}

static void test_embedding(void **unused) {
    (void)unused;
    open_device(false);
    check_embedding(1, 1, 2), check_embedding(33, 7, 5), check_embedding(300, 12, 9), check_embedding(40, 600, 3),
        check_embedding(17, 129, 2);
    close_device();
}

/* settings: keys of the gate; s_stride 0: its logits are parameters. */
static void check_gate(const char *settings, size_t N, bool free_standing, size_t gap) {
    ga_config c = ga_config_default();
    configure(&c, settings);
    ga_gate g = ga_gate_of(&c);
    size_t width = g.H * g.D, stride = width + gap, s_stride = free_standing ? 0 : g.logits + 2 * gap;
    size_t logits = free_standing ? g.logits : N * s_stride + 1;
    const char *where = place("%s, N %zu gap %zu", settings, N, gap);
    pair y = normal_pair(N * stride, 1), s = normal_pair(logits, 2), d_o = normal_pair(N * width, 1);
    pair o = normal_pair(N * width, 1), dy = normal_pair(N * stride, 1), ds = normal_pair(logits, 1);
    BOTH(gate_forward, (o.host, y.host, stride, s.host, s_stride, N, g),
         (o.there, y.there, stride, s.there, s_stride, N, g));
    expect_same(o, 1e-6, "gate_forward", where);
    BOTH(gate_backward, (dy.host, stride, ds.host, s_stride, d_o.host, y.host, stride, s.host, s_stride, N, g),
         (dy.there, stride, ds.there, s_stride, d_o.there, y.there, stride, s.there, s_stride, N, g));
    expect_same(dy, 1e-5, "gate_backward", where);
    expect_same(ds, 1e-5, "gate_backward, ds", where);
    if (g.form != GA_SELF) {
        size_t heads = g.sharing == GA_SHARED || g.input == GA_INPUT_SCALAR ? 1 : g.H, n = heads * 57;
        assert_int_equal(sizeof(ga_gate_sums), 57 * sizeof(double));
        tally sums = zero_sums(n);
        for (int round = 0; round < 2; round++)
            BOTH(gate_statistics, ((ga_gate_sums *)(void *)sums.host, s.host, s_stride, N, g),
                 ((ga_gate_sums *)(void *)sums.there, s.there, s_stride, N, g));
        double *got = sums_there(sums);
        for (size_t i = 0; i < n; i++) {
            double bound = 1e-5 * fabs(sums.host[i]) + (i % 57 < 3 ? 1e-4 : 0) + (i % 57 == 5 || i % 57 > 5 ? 1 : 0);
            if (!(fabs(got[i] - sums.host[i]) <= (i % 57 == 0 ? 0 : bound)))
                fail_msg("gate_statistics (%s): field %zu is %g, not %g", where, i, got[i], sums.host[i]);
        }
        free(got);
        drop_sums(sums);
    }
    DROP(y, s, d_o, o, dy, ds);
}

static void test_gate(void **unused) {
    (void)unused;
    static const char *const gates[] = {
        "n_heads=3 n_kv_heads=1",
        "n_heads=3 n_kv_heads=1 head_dim=18",
        "gate_type=headwise",
        "gate_type=headwise n_heads=3 n_kv_heads=1 head_dim=18",
        "gate_type=headwise gate_sharing=shared",
        "gate_sharing=shared",
        "gate_sharing=shared n_heads=3 n_kv_heads=1 head_dim=18",
        "gate_form=additive gate_activation=silu",
        "gate_form=additive gate_activation=identity gate_type=headwise",
        "gate_activation=ns-sigmoid",
        "gate_activation=silu gate_type=headwise gate_sharing=shared",
        "gate_position=G2",
        "gate_position=G5 d_model=37",
    };
    open_device(false);
    for (size_t i = 0; i < COUNT(gates); i++)
        for (int free_standing = 0; free_standing < 2; free_standing++)
            check_gate(gates[i], 9, free_standing, i % 2 ? 3 : 4);
    check_gate("gate_input=scalar", 5, true, 4);
    check_gate("gate_input=scalar gate_form=additive head_dim=18 n_heads=3 n_kv_heads=1", 40, true, 3);
    check_gate("gate_form=self gate_activation=rmsnorm", 5, false, 4);
    check_gate("gate_form=self gate_activation=silu head_dim=18 n_heads=3 n_kv_heads=1", 5, false, 3);
    close_device();
}

static void test_elementwise(void **unused) {
    (void)unused;
    open_device(false);
    for (size_t a = 0; a < COUNT(odd); a++)
        for (size_t b = 0; b < COUNT(odd); b++) {
            size_t N = odd[a], F = odd[b], n = N * F;
            const char *where = place("N %zu F %zu", N, F);
            ga_real *values = normal_reals(N * 2 * F, 3, &stream);
            values[0] = 200, values[2 * n - 1] = -200; /* beyond the range of exp */
            pair u = pair_of(values, 2 * n), da = normal_pair(n, 1), y = normal_pair(n, 1), du = normal_pair(2 * n, 1);
            free(values);
            BOTH(swiglu_forward, (y.host, u.host, N, F), (y.there, u.there, N, F));
            expect_same(y, 1e-6, "swiglu_forward", where);
            BOTH(swiglu_backward, (du.host, da.host, u.host, N, F), (du.there, da.there, u.there, N, F));
            expect_same(du, 1e-6, "swiglu_backward", where);
            BOTH(clip_forward, (y.host, u.host, n, 2), (y.there, u.there, n, 2));
            expect_same(y, 1e-9, "clip_forward", where);
            BOTH(clip_backward, (y.host, da.host, u.host, n, 2), (y.there, da.there, u.there, n, 2));
            expect_same(y, 1e-9, "clip_backward", where);
            BOTH(add, (y.host, y.host, da.host, n), (y.there, y.there, da.there, n));
            expect_same(y, 1e-9, "add", where);
            DROP(u, da, y, du);
        }
    close_device();
}

static void check_mean_loss(pair losses, const int32_t *targets, const int32_t *there, const char *where) {
    double start[2] = {7, 10}, here[2] = {7, 10}, got[2];
    double *sums = (double *)device.allocate(device.state, sizeof start);
    device.copy_in(device.state, sums, start, sizeof start);
    BOTH(mean_loss, (here, here + 1, losses.host, targets, losses.n, 0.5),
         (sums, sums + 1, losses.there, there, losses.n, 0.5));
    device.copy_out(device.state, got, sums, sizeof got);
    expect_near(got[0], here[0], 1e-6, where);
    expect_near(got[1], here[1], 1e-6, where);
    device.mean_loss(device.state, sums, NULL, losses.there, there, 0, 1);
    device.copy_out(device.state, got, sums, sizeof got);
    assert_true(isnan(got[0]));
    device.release(device.state, sums);
}

static void check_head(size_t N, size_t C, size_t V) {
    const char *where = place("N %zu C %zu V %zu %s", N, C, V, bf16 ? "bf16" : "f32");
    int32_t *targets = (int32_t *)calloc(N, sizeof *targets);
    fill_tokens(targets, N, V, &stream);
    for (size_t n = 1; n < N; n += 3) targets[n] = -1;
    int32_t *there = ints_on_device(targets, N);
    size_t slice = N < GA_HEAD_ROWS ? N : GA_HEAD_ROWS;
    pair x = operand_pair(N * C, 1), w = operand_pair(V * C, 1), losses = normal_pair(N, 1), dx = normal_pair(N * C, 1);
    pair dw = normal_pair(V * C, 1), logits = normal_pair(slice * V, 1);
    double tolerance = bf16 ? 4e-3 : 1e-5; /* the gradients of the logits become bfloat16 operands */
    pair scale = pair_of((ga_real[]){2}, 1);
    BOTH(head_loss, (losses.host, dx.host, dw.host, logits.host, x.host, w.host, targets, N, C, V, scale.host),
         (losses.there, dx.there, dw.there, logits.there, x.there, w.there, there, N, C, V, scale.there));
    expect_same(losses, 1e-5, "head_loss", where);
    expect_same(dx, tolerance, "head_loss, dx", where);
    expect_same(dw, tolerance, "head_loss, dw", where);
    BOTH(head_loss, (losses.host, NULL, NULL, logits.host, x.host, w.host, targets, N, C, V, NULL),
         (losses.there, NULL, NULL, logits.there, x.there, w.there, there, N, C, V, NULL));
    expect_same(losses, 1e-5, "head_loss without gradients", where);
    check_mean_loss(losses, targets, there, where);
    DROP(x, w, losses, dx, dw, logits, scale);
    free(targets);
    device.release(device.state, there);
}

static void test_head(void **unused) {
    (void)unused;
    for (int half = 0; half < 2; half++) {
        open_device(half);
        check_head(1, 3, 2), check_head(19, 5, 33), check_head(5, 8, 64), check_head(GA_HEAD_ROWS + 3, 2, 7);
        if (!half) check_head(3, 4, 9000); /* a block of 1024 threads */
        close_device();
    }
}

static void test_optimiser(void **unused) {
    (void)unused;
    open_device(false);
    for (size_t i = 0; i < COUNT(odd); i++) {
        size_t n = odd[i] * 20;
        const char *where = place("n %zu", n);
        pair p = normal_pair(n, 1), g = normal_pair(n, 1), m = normal_pair(n, 1), v = normal_pair(n, 1);
        for (size_t j = 0; j < n; j++) v.host[j] *= v.host[j];
        device.copy_in(device.state, v.there, v.host, n * sizeof *v.host);
        ga_adamw_settings a = {1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5, 3};
        BOTH(adamw, (p.host, g.host, m.host, v.host, n, a), (p.there, g.there, m.there, v.there, n, a));
        expect_same(p, 1e-6, "adamw", where);
        expect_same(m, 1e-6, "adamw, first moment", where);
        expect_same(v, 1e-6, "adamw, second moment", where);
        double here = 0, got, *there = (double *)device.allocate(device.state, sizeof here);
        for (int twice = 0; twice < 2; twice++) BOTH(sum_of_squares, (&here, p.host, n), (there, p.there, n));
        device.copy_out(device.state, &got, there, sizeof got);
        expect_near(got, here, 1e-6, "sum_of_squares");
        p.host[n / 2] = NAN;
        device.copy_in(device.state, p.there, p.host, n * sizeof *p.host);
        device.sum_of_squares(device.state, there, p.there, n);
        device.copy_out(device.state, &got, there, sizeof got);
        assert_true(isnan(got));
        device.release(device.state, there);
        DROP(p, g, m, v);
    }
    close_device();
}

/* ---- mixture of experts, switch heads ---------------------------------------------------------------------------------- */

static void expect_same_ints(const int32_t *there, const int32_t *here, size_t n, const char *what, const char *where) {
    int32_t *got = (int32_t *)calloc(n, sizeof *got);
    device.copy_out(device.state, got, there, n * sizeof *got);
    for (size_t i = 0; i < n; i++)
        if (got[i] != here[i]) fail_msg("%s (%s): %d at %zu, not %d", what, where, got[i], i, here[i]);
    free(got);
}

/* Integers on both sides. */
typedef struct {
    int32_t *host, *there;
} ints;

static ints zero_ints(size_t n) {
    int32_t *host = (int32_t *)calloc(n, sizeof *host);
    return (ints){host, ints_on_device(host, n)};
}
static void drop_ints(ints p) {
    free(p.host);
    device.release(device.state, p.there);
}

static void check_mixture(size_t N, size_t E, size_t K, size_t C, size_t F, bool normalize) {
    const char *where = place("N %zu E %zu K %zu C %zu F %zu %s", N, E, K, C, F, bf16 ? "bf16" : "f32");
    ga_router r = {E, K, normalize};
    size_t R = N * K, stride = F * C + 3;
    pair p = normal_pair(N * E, 1), lse = normal_pair(N, 1), weights = normal_pair(R, 1), sums = normal_pair(E + 1, 1);
    ints experts = zero_ints(R), rows = zero_ints(R), slots = zero_ints(R), offsets = zero_ints(E + 1),
         counts = zero_ints(E);
    if (E > 2) { /* equal logits: the first is chosen */
        p.host[1] = p.host[0], p.host[2] = 0, p.host[E - 1] = -(ga_real)0;
        device.copy_in(device.state, p.there, p.host, p.n * sizeof *p.host);
    }
    BOTH(route_forward, (p.host, lse.host, weights.host, experts.host, p.host, N, r),
         (p.there, lse.there, weights.there, experts.there, p.there, N, r));
    expect_same(p, 1e-6, "route_forward, p", where);
    expect_same(lse, 1e-6, "route_forward, lse", where);
    expect_same(weights, 1e-6, "route_forward, weights", where);
    expect_same_ints(experts.there, experts.host, R, "route_forward, experts", where);
    BOTH(route_rows, (rows.host, slots.host, offsets.host, experts.host, N, r),
         (rows.there, slots.there, offsets.there, experts.there, N, r));
    expect_same_ints(rows.there, rows.host, R, "route_rows, rows", where);
    expect_same_ints(slots.there, slots.host, R, "route_rows, slots", where);
    expect_same_ints(offsets.there, offsets.host, E + 1, "route_rows, offsets", where);
    BOTH(route_sums, (counts.host, sums.host, offsets.host, p.host, lse.host, N, r),
         (counts.there, sums.there, offsets.there, p.there, lse.there, N, r));
    expect_same(sums, 1e-5, "route_sums", where);
    expect_same_ints(counts.there, counts.host, E, "route_sums, counts", where);
    ga_pool pool = {1, 3, 2 * E + 3, E, E, E + 1};
    pair parts = normal_pair(pool.ranks * pool.values, 1); /* whose bits are counts as good as any */
    ints seen = zero_ints(E), all = zero_ints(E);
    for (size_t e = 0; e < pool.ranks * pool.values; e++)
        if (e % pool.values < E) parts.host[e] = (ga_real)ldexp(1 + (double)e / 4096, -127 + (int)e % 3);
    device.copy_in(device.state, parts.there, parts.host, parts.n * sizeof *parts.host);
    BOTH(route_pool, (seen.host, all.host, sums.host, parts.host, pool),
         (seen.there, all.there, sums.there, parts.there, pool));
    expect_same(sums, 1e-5, "route_pool, sums", where);
    expect_same_ints(seen.there, seen.host, E, "route_pool, seen", where);
    expect_same_ints(all.there, all.host, E, "route_pool, counts", where);
    drop(parts), drop_ints(seen), drop_ints(all);
    pair d_weights = normal_pair(R, 1), d_logits = normal_pair(N * E, 1);
    BOTH(route_backward,
         (d_logits.host, d_weights.host, p.host, lse.host, experts.host, counts.host, N, r, (ga_real)0.3, (ga_real)0.2),
         (d_logits.there, d_weights.there, p.there, lse.there, experts.there, counts.there, N, r, (ga_real)0.3,
          (ga_real)0.2));
    if (E > 1) expect_same(d_logits, 2e-5, "route_backward", where);

    pair x = operand_pair(N * C, 1), x_rows = normal_pair(R * C, 1), w = operand_pair(E * stride, 1);
    pair u = normal_pair(R * F, 1), du = operand_pair(R * F, 1), dw = normal_pair(E * stride, 1),
         back = normal_pair(N * C, 1);
    BOTH(gather_rows, (x_rows.host, x.host, slots.host, R, C, K), (x_rows.there, x.there, slots.there, R, C, K));
    expect_same(x_rows, 1e-9, "gather_rows", where);
    BOTH(grouped_forward, (u.host, x_rows.host, w.host, stride, offsets.host, E, F, C),
         (u.there, x_rows.there, w.there, stride, offsets.there, E, F, C));
    expect_same(u, 1e-5, "grouped_forward", where);
    pair dx_rows = normal_pair(R * C, 1);
    BOTH(grouped_backward, (dx_rows.host, dw.host, du.host, x_rows.host, w.host, stride, offsets.host, E, F, C),
         (dx_rows.there, dw.there, du.there, x_rows.there, w.there, stride, offsets.there, E, F, C));
    expect_same(dx_rows, 1e-5, "grouped_backward", where);
    expect_same(dw, 1e-5, "grouped_backward, dw", where);
    BOTH(sum_rows, (back.host, dx_rows.host, rows.host, N, C, K), (back.there, dx_rows.there, rows.there, N, C, K));
    expect_same(back, 1e-5, "sum_rows", where);

    pair act = normal_pair(R * 2 * F, 2), a = normal_pair(R * F, 1), d_act = normal_pair(R * 2 * F, 1);
    BOTH(expert_swiglu_forward, (a.host, act.host, weights.host, slots.host, R, F),
         (a.there, act.there, weights.there, slots.there, R, F));
    expect_same(a, 1e-5, "expert_swiglu_forward", where);
    BOTH(expert_swiglu_backward, (d_act.host, d_weights.host, du.host, act.host, weights.host, slots.host, R, F),
         (d_act.there, d_weights.there, du.there, act.there, weights.there, slots.there, R, F));
    expect_same(d_act, 1e-5, "expert_swiglu_backward", where);
    expect_same(d_weights, 2e-5, "expert_swiglu_backward, weights", where);
    DROP(p, lse, weights, sums, d_weights, d_logits, x, x_rows, w, u, du, dw, back, dx_rows, act, a, d_act);
    drop_ints(experts), drop_ints(rows), drop_ints(slots), drop_ints(offsets), drop_ints(counts);
}

static void test_mixture(void **unused) {
    (void)unused;
    for (int half = 0; half < 2; half++) {
        open_device(half);
        check_mixture(1, 1, 1, 3, 5, true);
        check_mixture(37, 5, 2, 8, 12, true);
        check_mixture(19, 40, 3, 35, 67, false); /* most experts without a row or with one */
        check_mixture(150, 2, 2, 65, 4, false);  /* more rows than a tile */
        close_device();
    }
}

static void check_switch(size_t N, ga_switch w) {
    const char *where = place("N %zu H %zu D %zu E %zu K %zu", N, w.H, w.D, w.E, w.K);
    size_t stride = w.H * w.E * (w.D + 1) + 3, n = N * stride;
    pair x = normal_pair(n, 1), y = normal_pair(N * w.H * w.D, 1), dy = normal_pair(N * w.H * w.D, 1);
    pair dx = normal_pair(n, 1);
    size_t s = w.H * w.E * w.D; /* the routers after the experts */
    BOTH(switch_forward, (y.host, x.host, x.host + s, stride, N, w), (y.there, x.there, x.there + s, stride, N, w));
    expect_same(y, 1e-6, "switch_forward", where);
    BOTH(switch_backward, (dx.host, dx.host + s, dy.host, x.host, x.host + s, stride, N, w),
         (dx.there, dx.there + s, dy.there, x.there, x.there + s, stride, N, w));
    expect_same(dx, 1e-5, "switch_backward", where);
    DROP(x, y, dy, dx);
}

static void check_channels(size_t M, size_t O, size_t I, size_t stride) {
    const char *where = place("M %zu O %zu I %zu", M, O, I);
    pair x = operand_pair(M * stride, 1), w = operand_pair(O * I, 1), dy = operand_pair(M * O, 1),
         y = normal_pair(M * O, 1);
    pair dx = normal_pair(M * stride, 1), dw = normal_pair(O * I, 1);
    BOTH(linear_channels_forward, (y.host, x.host, stride, w.host, M, O, I),
         (y.there, x.there, stride, w.there, M, O, I));
    expect_same(y, 1e-5, "linear_channels_forward", where);
    BOTH(linear_channels_backward, (dx.host, dw.host, dy.host, x.host, stride, w.host, M, O, I),
         (dx.there, dw.there, dy.there, x.there, stride, w.there, M, O, I));
    expect_same(dx, 1e-5, "linear_channels_backward", where);
    expect_same(dw, 1e-5, "linear_channels_backward, dw", where);
    DROP(x, w, dy, y, dx, dw);
}

static void test_switch_and_channels(void **unused) {
    (void)unused;
    for (int half = 0; half < 2; half++) {
        open_device(half);
        check_switch(5, (ga_switch){2, 8, 4, 2}), check_switch(3, (ga_switch){3, 33, 40, 7}),
            check_switch(1, (ga_switch){1, 4, 1, 1});
        check_channels(1, 3, 2, 5), check_channels(17, 9, 16, 33), check_channels(64, 4, 7, 7);
        close_device();
    }
}

/* ---- analysis ---------------------------------------------------------------------------------------------------------- */

static void check_rows(size_t N, size_t C) {
    const char *where = place("N %zu C %zu", N, C);
    pair x = normal_pair(N * C, 1), max = normal_pair(N, 1), at = normal_pair(N, 1);
    tally columns = zero_sums(C), top = zero_sums(1), magnitudes = zero_sums(4);
    x.host[N * C - 1] = -9;
    if (C > 2) x.host[1] = 9, x.host[2] = -9; /* the first of equal ones */
    for (int round = 0; round < 3; round++) { /* more, less, NaN: all but the last add to what was there */
        for (size_t i = 0; round == 1 && i < x.n; i++) x.host[i] *= (ga_real)0.5;
        if (round == 2) x.host[N * C / 2] = NAN;
        device.copy_in(device.state, x.there, x.host, x.n * sizeof *x.host);
        BOTH(max_abs, (top.host, x.host, x.n), (top.there, x.there, x.n));
        BOTH(max_abs_columns, (columns.host, x.host, N, C), (columns.there, x.there, N, C));
        if (round == 2) break;
        BOTH(max_abs_rows, (max.host, at.host, x.host, N, C), (max.there, at.there, x.there, N, C));
        expect_same(max, 1e-9, "max_abs_rows", where);
        expect_same(at, 1e-9, "max_abs_rows, at", where);
        expect_same_sums(top, 0, "max_abs", where);
        expect_same_sums(columns, 0, "max_abs_columns", where);
        BOTH(magnitude_statistics, ((ga_magnitude_sums *)(void *)magnitudes.host, x.host, C, N, C, 0.02),
             ((ga_magnitude_sums *)(void *)magnitudes.there, x.there, C, N, C, 0.02));
        expect_same_sums(magnitudes, 1e-9, "magnitude_statistics", where);
        BOTH(row_norms, (max.host, x.host, N, C), (max.there, x.there, N, C));
        expect_same(max, 1e-6, "row_norms", where);
    }
    double *nan[] = {sums_there(top), sums_there(columns)};
    assert_true(isnan(nan[0][0]) && isnan(nan[1][N * C / 2 % C]) && isnan(top.host[0]));
    x.host[N * C / 2] = 0;
    device.copy_in(device.state, x.there, x.host, x.n * sizeof *x.host);
    BOTH(scale_rows, (x.host, C, N, (C + 1) / 2, (ga_real)0.5), (x.there, C, N, (C + 1) / 2, (ga_real)0.5));
    expect_same(x, 1e-9, "scale_rows", where);
    BOTH(scale_rows, (x.host, C, N, C, 0), (x.there, C, N, C, 0));
    expect_same(x, 1e-9, "scale_rows by 0", where);
    free(nan[0]), free(nan[1]);
    drop_sums(columns), drop_sums(top), drop_sums(magnitudes);
    DROP(x, max, at);
}

static void check_accumulate(size_t R, size_t G, size_t I) {
    const size_t strides[][2] = {{1, 0}, {I + 2, 1}, {1, G + 1}, {0, 0}, {0, 1}};
    pair x = normal_pair(R * G * I, 1);
    for (size_t k = 0; k < COUNT(strides); k++) {
        tally s = zero_sums(1 + (G - 1) * strides[k][0] + (I - 1) * strides[k][1]);
        for (int round = 0; round < 2; round++)
            BOTH(accumulate, (s.host, strides[k][0], strides[k][1], x.host, R, G, I),
                 (s.there, strides[k][0], strides[k][1], x.there, R, G, I));
        expect_same_sums(s, 1e-12, "accumulate", place("R %zu G %zu I %zu, strides %zu", R, G, I, k));
        drop_sums(s);
    }
    drop(x);
}

static void check_peaks(size_t B, size_t T) {
    size_t N = B * T;
    const char *where = place("B %zu T %zu", B, T);
    ga_real *values = normal_reals(N, 1, &stream);
    for (size_t n = 0; n < N; n++) values[n] = (ga_real)fabs((double)values[n]);
    values[N - 1] = values[N / 2] = 9; /* the first of equal ones */
    pair max = pair_of(values, N), at = normal_pair(N, 1);
    int32_t *tokens = (int32_t *)calloc(N, sizeof *tokens);
    fill_tokens(tokens, N, 99, &stream);
    for (size_t n = 0; n < N; n++) at.host[n] = (ga_real)(n + 5);
    device.copy_in(device.state, at.there, at.host, N * sizeof *at.host);
    int32_t *tokens_there = ints_on_device(tokens, N);
    tally max_at = zero_sums(T);
    ga_peak here = {0, 0, 0, -1}, got, *there = (ga_peak *)device.allocate(device.state, sizeof *there);
    device.copy_in(device.state, there, &here, sizeof here);
    for (int round = 0; round < 4; round++) { /* new, less, more, NaN, then that stays */
        if (round > 0) max.host[N / 3] = round == 1 ? (ga_real)0.1 : round == 2 ? 11 : (ga_real)NAN;
        device.copy_in(device.state, max.there, max.host, N * sizeof *max.host);
        BOTH(keep_peaks, (max_at.host, &here, max.host, at.host, tokens, N, T),
             (max_at.there, there, max.there, at.there, tokens_there, N, T));
        device.copy_out(device.state, &got, there, sizeof got);
        assert_true(got.position == here.position && got.dimension == here.dimension && got.token == here.token);
        assert_true(got.value == here.value || (isnan(got.value) && isnan(here.value)));
        if (round < 3) expect_same_sums(max_at, 0, "keep_peaks", where);
    }
    double *last = sums_there(max_at);
    assert_true(isnan(last[N / 3 % T]) && isnan(here.value));
    free(values), free(tokens), free(last);
    device.release(device.state, there), device.release(device.state, tokens_there);
    drop_sums(max_at);
    DROP(max, at);
}

static void check_sink_and_counts(void) {
    enum { B = 3, HQ = 4, T = 101, E = 300 };
    pair sink = normal_pair(HQ, 1), lse = normal_pair(B * HQ * T, 1);
    tally shares = zero_sums(HQ), rows = zero_sums(E);
    int32_t offsets[E + 1] = {0};
    for (size_t e = 0; e < E; e++) offsets[e + 1] = offsets[e] + (int32_t)(ga_random_bits(&stream) % 5);
    int32_t *there = ints_on_device(offsets, E + 1);
    for (int round = 0; round < 2; round++) {
        BOTH(sdpa_sink, (shares.host, sink.host, lse.host, B, HQ, T), (shares.there, sink.there, lse.there, B, HQ, T));
        BOTH(route_counts, (rows.host, offsets, E), (rows.there, there, E));
    }
    expect_same_sums(shares, 1e-12, "sdpa_sink", "");
    expect_same_sums(rows, 0, "route_counts", "");
    device.release(device.state, there);
    drop_sums(shares), drop_sums(rows);
    DROP(sink, lse);
}

static void check_head_moments(size_t N, size_t H, size_t D) {
    size_t n = H * D * D;
    pair x = normal_pair(N * H * D, 1);
    tally moments = zero_sums(n);
    for (int round = 0; round < 2; round++)
        BOTH(head_moments, (moments.host, x.host, N, H, D), (moments.there, x.there, N, H, D));
    expect_same_sums(moments, 1e-12, "head_moments", place("N %zu H %zu D %zu", N, H, D));
    drop_sums(moments);
    drop(x);
}

static void check_attention_statistics(ga_shape n) {
    const char *where = place("T %zu S %zu D %zu %s", n.T, n.S, n.D, bf16 ? "bf16" : "f32");
    pair q = operand_pair(n.B * n.T * n.HQ * n.D, 1), k = operand_pair(n.B * n.S * n.HK * n.D, 1);
    pair y = normal_pair(q.n, 1), lse = normal_pair(n.B * n.HQ * n.T, 1);
    pair received = normal_pair(n.B * n.HQ * n.S, 1), entropy = normal_pair(lse.n, 1);
    BOTH(sdpa_forward, (y.host, lse.host, q.host, k.host, k.host, NULL, n),
         (y.there, lse.there, q.there, k.there, k.there, NULL, n));
    BOTH(sdpa_statistics, (received.host, entropy.host, q.host, k.host, lse.host, n),
         (received.there, entropy.there, q.there, k.there, lse.there, n));
    expect_same(received, 1e-5, "sdpa_statistics, received", where);
    expect_same(entropy, 1e-5, "sdpa_statistics, entropy", where);
    DROP(q, k, y, lse, received, entropy);
}

#ifdef GAI_CUDA_CPU
/* More short sequences than a grid has blocks in its second and third dimension. */
static void check_many_sequences(void) {
    ga_shape n = {65536, 2, 2, 2, 1, 4};
    ga_error e;
    cucpu_set_dry(true);
    device.sdpa_statistics(device.state, NULL, NULL, NULL, NULL, NULL, n);
    device.wait(device.state);
    expect_ok(device.status(device.state, &e), &e);
    cucpu_set_dry(false);
}
#endif

static void test_analysis(void **unused) {
    (void)unused;
    for (int half = 0; half < 2; half++) {
        open_device(half);
        check_attention_statistics((ga_shape){2, 19, 19, 4, 2, 8});
        check_attention_statistics((ga_shape){1, 3, 140, 1, 1, 6});
        close_device();
    }
    open_device(false);
    for (size_t a = 0; a < COUNT(odd); a++)
        for (size_t b = 0; b < COUNT(odd); b++) check_rows(odd[a], odd[b]);
    check_head_moments(5, 2, 18), check_head_moments(33, 1, 4);
    check_accumulate(1, 1, 1), check_accumulate(3, 5, 7), check_accumulate(2, 33, 300), check_accumulate(300, 2, 1);
    check_peaks(1, 1), check_peaks(3, 5), check_peaks(2, 300);
    check_sink_and_counts();
#ifdef GAI_CUDA_CPU
    check_many_sequences();
#endif
    close_device();
}

/* ---- models ----------------------------------------------------------------------------------------------------------- */

static const char *const SMALL = "vocab_size=37 d_model=24 n_layers=2 n_heads=4 n_kv_heads=2 head_dim=8 d_ff=20 "
                                 "max_seq_len=19 batch_size=2 grad_clip=0.5 gate_init_std=0.5";

/* Variants, each with what it changes; those that hold for numbers are small and odd. */
static const char *const variants[] = {
    "gate_position=none",
    "gate_type=elementwise",
    "gate_type=headwise",
    "gate_sharing=shared",
    "gate_type=headwise gate_sharing=shared",
    "gate_position=G2",
    "gate_position=G2 gate_type=headwise",
    "gate_position=G3",
    "gate_position=G4 gate_sharing=shared",
    "gate_position=G5 attn_clip=0.5 ffn_clip=0.2",
    "gate_form=additive gate_activation=silu",
    "gate_form=self gate_activation=rmsnorm",
    "gate_form=self gate_activation=silu",
    "gate_activation=ns-sigmoid gate_input=none",
    "gate_input=scalar",
    "sandwich_norm=1 tied_embeddings=1",
    "qk_norm=0 n_kv_heads=4 recompute=1",
    "gate_frozen=1 n_kv_heads=1 head_dim=10 d_model=23 d_ff=13 vocab_size=29",
    "attention_sink=learned gate_position=none",
    "attention_sink=one gate_input_dims=5",
    "switch_heads=v switch_experts=3 switch_top_k=2 gate_position=none",
    "switch_heads=kv switch_experts=2 switch_top_k=2 gate_position=none",
    "n_experts=5 experts_per_token=2",
    "n_experts=3 experts_per_token=1 normalize_top_k=0 recompute=1 partial_rotary_factor=0.5",
};

static ga_model *create_there(const ga_config *c, ga_mode mode) {
    ga_error e;
    ga_model *m = ga_create(c, &device, mode, &e);
    if (!m) fail_msg("ga_create: %s", e.text);
    return m;
}

static void randomise_there(ga_model *m) {
    ga_real *w = normal_reals(m->n_weights, 0.3, &(uint64_t){7});
    device.copy_in(device.state, m->weights, w, m->n_weights * sizeof *w);
    device.weights_changed(device.state, m->weights, m->n_weights);
    free(w);
}

/* Gives both models the same random weights. */
static void copy_weights(ga_model *to, ga_model *from) {
    randomise_weights(from, 5);
    device.copy_in(device.state, to->weights, from->weights, from->n_weights * sizeof *from->weights);
    device.weights_changed(device.state, to->weights, to->n_weights);
}

/* Each tensor of a block, on its own scale. */
static void expect_blocks(const ga_model *m, const ga_real *there, const ga_real *here, double tolerance,
                          const char *what, const char *where) {
    for (size_t i = 0; i < m->n_tensors; i++) {
        const ga_tensor *t = &m->tensors[i];
        size_t n = t->rows * t->columns;
        if (t->frozen) continue;
        ga_real *got = reals(n);
        double *expected = (double *)calloc(n, sizeof *expected);
        device.copy_out(device.state, got, there + t->offset, n * sizeof *got);
        for (size_t j = 0; j < n; j++) expected[j] = (double)here[t->offset + j];
        expect_below(difference(got, expected, n), tolerance, "%s of %s (%s)", what, t->name, where);
        free(got), free(expected);
    }
}

static void expect_figure(double a, double b, double tolerance, const char *what) {
    if (!(isnan(a) && isnan(b))) expect_near(a, b, tolerance, what);
}

/* Figures of both sides; those of a layer and a head, so that none is counted where another belongs. */
static void check_statistics(const ga_statistics *a, const ga_statistics *b, double tolerance) {
    for (size_t l = 0; l < a->L; l++) {
        expect_figure(ga_m_act(a, l), ga_m_act(b, l), tolerance, "M-Act");
        expect_figure(ga_gate_mean(a, l), ga_gate_mean(b, l), tolerance, "gate score");
        for (size_t h = 0; h < a->HQ; h++) {
            expect_figure(ga_f_attn_head(a, l, h), ga_f_attn_head(b, l, h), tolerance, "F-Attn");
            expect_figure(ga_sink_share_head(a, l, h), ga_sink_share_head(b, l, h), tolerance, "share of the sink");
        }
        for (size_t i = 0; i < a->E; i++) expect_figure(ga_expert_load(a, l, i), ga_expert_load(b, l, i), 0, "load");
    }
}

static void check_details(const ga_statistics *a, const ga_statistics *b, double tolerance) {
    for (size_t l = 0; l < a->L; l++) {
        for (int stage = 0; stage < GA_STAGES; stage++)
            expect_figure(ga_output_magnitude(a, (ga_stage)stage, l), ga_output_magnitude(b, (ga_stage)stage, l),
                          tolerance, "magnitude");
        for (int stream_of = 0; stream_of < GA_STREAMS; stream_of++) {
            ga_peak p = ga_activation_peak(a, (ga_stream)stream_of, l),
                    q = ga_activation_peak(b, (ga_stream)stream_of, l);
            assert_true(p.position == q.position && p.dimension == q.dimension && p.token == q.token);
            for (size_t i = 0; i < 19; i++) {
                expect_figure(ga_activation_max_at(a, (ga_stream)stream_of, l, i),
                              ga_activation_max_at(b, (ga_stream)stream_of, l, i), tolerance, "max at a position");
                expect_figure(ga_activation_max_in(a, (ga_stream)stream_of, l, i),
                              ga_activation_max_in(b, (ga_stream)stream_of, l, i), tolerance, "max in a dimension");
            }
        }
        for (size_t h = 0; h < a->HQ; h++) {
            expect_figure(ga_attention_entropy(a, l, h), ga_attention_entropy(b, l, h), tolerance, "entropy");
            for (size_t i = 0; i < 19; i++)
                expect_figure(ga_attention_received(a, l, h, i), ga_attention_received(b, l, h, i), tolerance,
                              "attention received");
            for (int rank = 0; rank < GA_RANKS; rank++)
                expect_figure(ga_effective_rank(a, (ga_rank)rank, l, h), ga_effective_rank(b, (ga_rank)rank, l, h),
                              tolerance, "effective rank");
        }
        for (size_t i = 0; i < 19; i++) {
            expect_figure(ga_value_norm(a, l, 0, i), ga_value_norm(b, l, 0, i), tolerance, "value norm");
            expect_figure(ga_key_norm(a, l, 0, i), ga_key_norm(b, l, 0, i), tolerance, "key norm");
        }
    }
}

static void check_training(const char *variant, double tolerance) {
    ga_config c = ga_config_default();
    configure(&c, SMALL), configure(&c, variant);
    ga_model *here = create(&c, GA_TRAINING), *there = create_there(&c, GA_TRAINING);
    copy_weights(there, here);
    int32_t tokens[38], targets[38];
    ga_statistics *s_here = ga_statistics_create(here), *s_there = ga_statistics_create(there);
    ga_observer o_here = {s_here, NULL, 0}, o_there = {s_there, NULL, 0};
    for (int step = 0; step < 2; step++) {
        double loss_here, loss_there, norm_here, norm_there;
        ga_error e;
        fill_tokens(tokens, 38, c.vocab_size, &stream), fill_tokens(targets, 38, c.vocab_size, &stream);
        targets[3] = -1;
        for (int micro = 0; micro < 2; micro++) {
            expect_ok(ga_forward_backward(here, tokens, targets, 2, 19, 0.5, &o_here, &loss_here, &e), &e);
            expect_ok(ga_forward_backward(there, tokens, targets, 2, 19, 0.5, &o_there, &loss_there, &e), &e);
            expect_near(loss_there, loss_here, tolerance, variant);
        }
        expect_blocks(here, there->gradients, here->gradients, tolerance * 30, "gradient", variant);
        expect_ok(ga_update(here, 1e-3, &norm_here, &e), &e);
        expect_ok(ga_update(there, 1e-3, &norm_there, &e), &e);
        expect_near(norm_there, norm_here, tolerance * 30, "norm");
        expect_blocks(here, there->weights, here->weights, tolerance * 30, "weight", variant);
    }
    check_statistics(s_there, s_here, tolerance * 30);
    ga_statistics_destroy(s_here), ga_statistics_destroy(s_there);
    ga_destroy(here), ga_destroy(there);
}

static void test_training(void **unused) {
    (void)unused;
    open_device(false);
    for (size_t i = 0; i < COUNT(variants); i++) check_training(variants[i], 1e-5);
    close_device();
}

static void test_training_bf16(void **unused) {
    (void)unused;
    open_device(true);
    for (size_t i = 1; i < COUNT(variants); i += 6) /* none that clips or chooses: rounding would move the edges */
        check_training(variants[i], 3e-3);
    close_device();
}

/* Evaluation, and generation position by position with a cache. */
static void test_inference(void **unused) {
    (void)unused;
    open_device(false);
    ga_config c = ga_config_default();
    configure(&c, SMALL);
    ga_model *here = create(&c, GA_INFERENCE), *there = create_there(&c, GA_INFERENCE);
    copy_weights(there, here);
    int32_t tokens[19];
    fill_tokens(tokens, 19, c.vocab_size, &stream);
    double loss_here, loss_there;
    ga_error e;
    expect_ok(ga_forward(here, tokens, tokens, 1, 19, NULL, &loss_here, &e), &e);
    expect_ok(ga_forward(there, tokens, tokens, 1, 19, NULL, &loss_there, &e), &e);
    expect_near(loss_there, loss_here, 1e-5, "loss");
    ga_generator *a = ga_generator_create(here, 19, &e), *b = ga_generator_create(there, 19, &e);
    ga_real logits_here[37], logits_there[37];
    double expected[37];
    for (size_t at = 0, n = 5; at < 19; at += n, n = 7) {
        expect_ok(ga_generator_feed(a, tokens + at, n, logits_here, &e), &e);
        expect_ok(ga_generator_feed(b, tokens + at, n, logits_there, &e), &e);
        for (size_t v = 0; v < 37; v++) expected[v] = (double)logits_here[v];
        expect_below(difference(logits_there, expected, 37), 1e-5, "logits after %zu", at + n);
    }
    ga_generator_destroy(a), ga_generator_destroy(b);
    ga_destroy(here), ga_destroy(there);
    close_device();
}

/* What ./analyze measures, over two passes. */
static void check_measuring(const char *variant) {
    ga_config c = ga_config_default();
    configure(&c, SMALL), configure(&c, variant);
    ga_model *here = create(&c, GA_INFERENCE), *there = create_there(&c, GA_INFERENCE);
    copy_weights(there, here);
    ga_statistics *a = ga_statistics_create_detailed(here), *b = ga_statistics_create_detailed(there);
    ga_observer o_here = {.statistics = a}, o_there = {.statistics = b};
    int32_t tokens[38];
    ga_error e;
    for (int pass = 0; pass < 3; pass++) { /* the first is forgotten */
        if (pass == 1) ga_statistics_reset(a), ga_statistics_reset(b);
        fill_tokens(tokens, 38, c.vocab_size, &stream);
        expect_ok(ga_forward(here, tokens, NULL, 2, 19, &o_here, NULL, &e), &e);
        expect_ok(ga_forward(there, tokens, NULL, 2, 19, &o_there, NULL, &e), &e);
    }
    expect_ok(ga_measure_ranks(a, here, &e), &e), expect_ok(ga_measure_ranks(b, there, &e), &e);
    check_statistics(b, a, 1e-5), check_details(b, a, 1e-4);
    ga_statistics_destroy(a), ga_statistics_destroy(b);
    ga_destroy(here), ga_destroy(there);
}

static void test_measuring(void **unused) {
    (void)unused;
    open_device(false);
    check_measuring("gate_position=none"), check_measuring("gate_type=headwise attention_sink=learned");
    check_measuring("gate_position=G2 n_experts=3 experts_per_token=2"), check_measuring("gate_position=G5");
    close_device();
}

/* The same bits in a second run. */
static void test_repeatable(void **unused) {
    (void)unused;
    ga_config c = ga_config_default();
    configure(&c, SMALL);
    int32_t tokens[38];
    fill_tokens(tokens, 38, c.vocab_size, &stream);
    ga_real *first = NULL, *second = NULL;
    for (int run = 0; run < 2; run++) {
        open_device(true);
        ga_model *m = create_there(&c, GA_TRAINING);
        double loss;
        ga_error e;
        expect_ok(ga_forward_backward(m, tokens, tokens, 2, 19, 1, NULL, &loss, &e), &e);
        ga_real *g = reals(m->n_weights);
        device.copy_out(device.state, g, m->gradients, m->n_weights * sizeof *g);
        if (run == 0)
            first = g;
        else {
            second = g;
            assert_memory_equal(first, second, m->n_weights * sizeof *g);
        }
        ga_destroy(m);
        close_device();
    }
    free(first), free(second);
}

/* ---- passes that repeat ------------------------------------------------------------------------------------------------ */

enum { REPEATS = 9, ROWS = 14 };

/* Passes of two models after each other, with what changes between passes in all ways: tokens, how many targets
 * count, the length, the scale, an update, an observer. The gradients after each pass go to `seen`, REPEATS
 * times both models. */
static ga_real *repeat_passes(const char *variant, size_t *n) {
    ga_real *seen = NULL; /* (2, REPEATS, n): gradients, then the loss */
    for (int round = 0; round < 2; round++) {
        ga_config c = ga_config_default();
        configure(&c, "vocab_size=19 d_model=12 n_layers=1 n_heads=2 n_kv_heads=1 head_dim=8 max_seq_len=7"),
            configure(&c, round ? "batch_size=2 d_ff=8" : "batch_size=2 d_ff=12"), configure(&c, variant);
        ga_model *m = create_there(&c, GA_TRAINING);
        randomise_there(m);
        ga_statistics *s = ga_statistics_create(m);
        ga_observer observer = {.statistics = s};
        if (!seen) seen = reals(2 * REPEATS * (*n = m->n_weights + 1)); /* the second model is smaller */
        uint64_t random = 3;
        ga_model *larger = NULL; /* needs more scratch: a recording must not keep the old one */
        for (size_t i = 0; i < REPEATS; i++) {
            int32_t tokens[ROWS], targets[ROWS];
            ga_error e;
            double loss = 0, norm;
            fill_tokens(tokens, ROWS, c.vocab_size, &random), fill_tokens(targets, ROWS, c.vocab_size, &random);
            for (size_t t = 0; t < i; t++) targets[t] = -1;
            size_t T = i == 4 ? 5 : 7;
            double scale = i >= 6 ? 0.5 : 1;
            expect_ok(ga_forward_backward(m, tokens, targets, 2, T, scale, i == 5 ? &observer : NULL,
                                          i % 2 ? &loss : NULL, &e),
                      &e);
            ga_real *to = seen + ((size_t)round * REPEATS + i) * *n;
            device.copy_out(device.state, to, m->gradients, m->n_weights * sizeof *to);
            to[m->n_weights] = (ga_real)loss;
            if (i == 2) expect_ok(ga_update(m, 1e-2, &norm, &e), &e);
            if (i != 7 || round > 0) continue;
            configure(&c, "batch_size=2048");
            larger = create_there(&c, GA_INFERENCE);
        }
        ga_destroy(larger);
        ga_statistics_destroy(s);
        ga_destroy(m);
    }
    return seen;
}

static void check_repeats(const char *variant, bool half) {
    ga_real *seen[2];
    size_t n = 0;
    for (int recorded = 0; recorded < 2; recorded++) {
        open_device_with((ga_cuda_settings){.bf16 = half, .plain = !recorded});
        seen[recorded] = repeat_passes(variant, &n);
        assert_null(ga_device_cuda_unrecorded(&device));
        close_device();
    }
    for (size_t i = 0; i < 2 * REPEATS; i++)
        if (memcmp(seen[0] + i * n, seen[1] + i * n, n * sizeof(ga_real)) != 0)
            fail_msg("%s: pass %zu of model %zu differs when it is recorded", variant, i % REPEATS, i / REPEATS);
    free(seen[0]), free(seen[1]);
}

/* The same bits with and without graphs. */
static void test_training_recorded(void **unused) {
    (void)unused;
    check_repeats("", true), check_repeats("n_experts=4 experts_per_token=2", false);
    check_repeats("n_layers=2 recompute=1 gate_position=G2 tied_embeddings=1", true);
}

/* ---- memory and failures, on the emulated device ----------------------------------------------------------------------- */

#ifdef GAI_CUDA_CPU

/* A step takes no memory: own_bytes knew what operators need, and ga_create has taken it. */
static void check_no_late_memory(const char *variant, bool half) {
    open_device(half);
    ga_config c = ga_config_default();
    configure(&c, SMALL), configure(&c, variant);
    size_t before = cucpu_memory_used(), rows = c.batch_size * c.max_seq_len;
    ga_summary s;
    ga_error e;
    expect_ok(ga_summarize(&c, GA_TRAINING, &s, &e), &e);
    size_t known = s.total_bytes + device.own_bytes(device.state, &c, GA_TRAINING);
    ga_model *m = create_there(&c, GA_TRAINING);
    assert_true(cucpu_memory_used() - before == known);
    ga_statistics *statistics = ga_statistics_create(m);
    long allocations = cucpu_allocations();
    ga_observer observer = {.statistics = statistics};
    int32_t *tokens = (int32_t *)calloc(rows, sizeof *tokens);
    double loss, norm;
    fill_tokens(tokens, rows, c.vocab_size, &stream);
    expect_ok(ga_forward_backward(m, tokens, tokens, c.batch_size, c.max_seq_len, 1, &observer, &loss, &e), &e);
    expect_ok(ga_update(m, 1e-3, &norm, &e), &e);
    if (cucpu_allocations() != allocations) fail_msg("%s: a step allocates", variant);
    free(tokens);
    ga_statistics_destroy(statistics);
    ga_destroy(m);
    close_device();
}

static void test_no_late_memory(void **unused) {
    (void)unused;
    for (size_t i = 0; i < COUNT(variants); i++) check_no_late_memory(variants[i], i % 2);
    check_no_late_memory("n_layers=1 batch_size=16 d_ff=300", true);       /* the products take the most */
    check_no_late_memory("n_layers=1 batch_size=16 vocab_size=900", true); /* the output head does */
    assert_true(cucpu_live_allocations() == 0);
}

/* Bytes that came to the host since the last call. */
static size_t bytes_out(void) {
    static size_t before;
    size_t bytes = cucpu_bytes_out() - before;
    before += bytes;
    return bytes;
}

/* Only what is asked for comes to the host: of a pass its loss, also where figures are collected; all sums once, when
 * the first figure is asked for. Details ask for a mean gate score in each layer. */
static void check_bytes(const char *variant) {
    ga_config c = ga_config_default();
    configure(&c, SMALL), configure(&c, variant);
    ga_model *m = create_there(&c, GA_TRAINING);
    ga_statistics *live = ga_statistics_create(m), *full = ga_statistics_create_detailed(m);
    ga_observer observer = {.statistics = live}, details = {.statistics = full};
    int32_t tokens[38];
    fill_tokens(tokens, 38, c.vocab_size, &stream);
    double loss, norm;
    ga_error e;
    bytes_out();
    expect_ok(ga_forward_backward(m, tokens, tokens, 2, 19, 1, &observer, &loss, &e), &e);
    assert_int_equal(bytes_out(), sizeof(double));
    expect_ok(ga_update(m, 1e-3, &norm, &e), &e);
    assert_true(bytes_out() <= 8 * sizeof(double)); /* a sum for each run of tensors that are not frozen */
    expect_ok(ga_forward(m, tokens, tokens, 2, 19, &observer, &loss, &e), &e);
    assert_int_equal(bytes_out(), sizeof(double));
    assert_true(ga_f_attn(live, GA_ALL) > 0);
    size_t all = bytes_out(), sums = c.n_layers * (2 * c.n_heads + 1 + c.n_experts) * sizeof(double) +
                                     c.n_layers * live->gate_heads * sizeof(ga_gate_sums);
    assert_in_range(all, sums, sums + 5 * 64);
    assert_true(ga_m_act(live, GA_ALL) > 0 && ga_f_attn(live, 0) > 0 && bytes_out() == 0);
    expect_ok(ga_forward(m, tokens, tokens, 2, 19, &details, &loss, &e), &e);
    size_t scores = full->has_gate ? c.n_layers * full->gate_heads * sizeof(ga_gate_sums) : 0;
    assert_int_equal(bytes_out(), scores + sizeof(double));
    ga_generator *g = ga_generator_create(m, 19, &e);
    ga_generator_observe(g, live);
    ga_real logits[37];
    expect_ok(ga_generator_feed(g, tokens, 5, logits, &e), &e);
    assert_int_equal(bytes_out(), c.vocab_size * sizeof *logits);
    ga_generator_destroy(g);
    ga_statistics_destroy(live), ga_statistics_destroy(full);
    ga_destroy(m);
}

static void test_bytes_to_the_host(void **unused) {
    (void)unused;
    open_device(false);
    for (size_t i = 0; i < COUNT(variants); i++) check_bytes(variants[i]);
    close_device();
}

/* What a model of the open device takes. */
static size_t needed(const ga_config *c) {
    ga_summary s;
    ga_error e;
    expect_ok(ga_summarize(c, GA_TRAINING, &s, &e), &e);
    return s.total_bytes + device.own_bytes(device.state, c, GA_TRAINING);
}

/* Leaves the open device room for so many bytes, and what it leaves to its driver. */
static void leave_room(size_t bytes) {
    enum { MEMORY = 1 << 30 };
    cucpu_set_memory(cucpu_memory_used() + MEMORY);
    size_t of_driver = MEMORY - device.free_bytes(device.state);
    cucpu_set_memory(cucpu_memory_used() + of_driver + bytes);
}

/* A device that is too small: by how much, and the keys that the message names make it fit. */
static void test_too_small(void **unused) {
    (void)unused;
    static const char *const fitting[] = {"batch_size=4 recompute=0", "batch_size=1 recompute=1"};
    ga_config c = ga_config_default();
    configure(&c, SMALL), configure(&c, "batch_size=16 max_seq_len=100 n_layers=4");
    ga_error e;
    for (size_t i = 0; i < 2; i++) {
        open_device(true);
        ga_config less = c;
        configure(&less, fitting[i]);
        leave_room(needed(&less));
        assert_null(ga_create(&c, &device, GA_TRAINING, &e));
        assert_int_equal(e.result, GA_ERR_MEMORY);
        char text[256], *keys = strstr(e.text, "; batch_size=");
        snprintf(text, sizeof text, "; %s takes", fitting[i]);
        if (!keys || strncmp(keys, text, strlen(text)) != 0) fail_msg("not %s: %s", fitting[i], e.text);
        ga_destroy(create_there(&less, GA_TRAINING));
        close_device();
    }
    open_device(true);
    leave_room(1000);
    assert_null(ga_create(&c, &device, GA_TRAINING, &e));
    assert_non_null(strstr(e.text, "no smaller batch_size, nor recompute=1, makes it fit"));
    cucpu_set_memory(cucpu_memory_used());
    assert_null(ga_create(&c, &device, GA_TRAINING, &e));
    assert_non_null(strstr(e.text, "the device has 0.0 MB left"));
    close_device();
    cucpu_set_memory((size_t)8 << 30);
}

static long calls_used; /* of libraries, by use_device, without those that close the device: nobody asks after them */

/* What a program does with a device, up to the first failure. */
static ga_result use_device(ga_error *e) {
    ga_config c = ga_config_default();
    configure(&c, SMALL), configure(&c, "n_layers=1");
    ga_cuda_settings settings = {.bf16 = true, .plain = true};
    ga_result result = ga_device_cuda(&device, settings, e);
    if (result != GA_OK) return result;
    ga_model *m = ga_create(&c, &device, GA_TRAINING, e);
    result = m ? GA_OK : e->result;
    int32_t tokens[19] = {1, 2, 3};
    double loss, norm;
    if (result == GA_OK) result = ga_forward_backward(m, tokens, tokens, 1, 19, 1, NULL, &loss, e);
    if (result == GA_OK) result = ga_update(m, 1e-3, &norm, e);
    if (result == GA_OK) device.wait(device.state), result = device.status(device.state, e);
    calls_used = cucpu_calls();
    ga_destroy(m);
    ga_device_cuda_destroy(&device);
    return result;
}

/* Three passes; the second is captured, and call `fails` since then fails, if that is negative with all after it in the
 * pass. Its gradients, NULL where the pass fails. */
static ga_real *capture_with_failure(long fails, long *calls, char *why) {
    ga_config c = ga_config_default();
    configure(&c, SMALL), configure(&c, "n_layers=1");
    open_device(true);
    ga_model *m = create_there(&c, GA_TRAINING);
    randomise_there(m);
    int32_t tokens[19] = {1, 2, 3};
    double loss;
    ga_error e;
    ga_result result = GA_OK;
    for (int i = 0; i < 3; i++) {
        if (fails < 0 && i == 1)
            cucpu_fail_from(-fails);
        else
            cucpu_fail_call(i == 1 ? fails : 0);
        ga_result here = ga_forward_backward(m, tokens, tokens, 1, 19, 1, NULL, &loss, &e);
        if (i == 1) result = here, *calls = cucpu_calls();
    }
    cucpu_fail_call(0);
    const char *reason = ga_device_cuda_unrecorded(&device);
    strcpy(why, reason ? reason : "");
    ga_real *g = reals(m->n_weights + 1);
    device.copy_out(device.state, g, m->gradients, m->n_weights * sizeof *g);
    g[m->n_weights] = (ga_real)loss;
    if (result != GA_OK) free(g), g = NULL;
    ga_destroy(m);
    close_device();
    return g;
}

/* Whatever call fails while a pass is captured: it and the next run plainly, with the same bits, and one
 * line says why. */
static void test_training_captures_fail(void **unused) {
    (void)unused;
    char why[512];
    long calls, other, heard = 0, plain = 0;
    ga_real *expected = capture_with_failure(0, &calls, why);
    assert_string_equal(why, "");
    for (long n = 1; n <= calls; n += n < 20 || n > calls - 10 ? 1 : 4) {
        ga_real *g = capture_with_failure(n, &other, why);
        if (!g) {
            heard++; /* before the capture or after it */
            continue;
        }
        plain++;
        if (!strstr(why, "gated_attention_cuda.cuh:")) fail_msg("call %ld: \"%s\"", n, why);
        assert_memory_equal(g, expected, 100 * sizeof *g);
        free(g);
    }
    assert_true(plain > 20 && heard < 20);
    free(expected);
}

/* What an update and a generated token cost the host, beside passes; as above. */
static void check_other_launches(ga_model *m) {
    ga_error e;
    int32_t token = 1;
    double norm, nothing = 0;
    ga_real logits[64];
    ga_generator *g = ga_generator_create(m, 8, &e);
    for (int i = 0; i < 16; i++) /* what a dry run's copies bring: zeros, from all slots */
        device.copy_in(device.state, m->loss, &nothing, sizeof nothing);
    expect_ok(ga_generator_feed(g, &token, 1, logits, &e), &e);
    long before = cucpu_launches(), waits = cucpu_waits();
    expect_ok(ga_generator_feed(g, &token, 1, logits, &e), &e);
    long of_token = cucpu_launches() - before;
    before = cucpu_launches();
    expect_ok(ga_update(m, 1e-3, &norm, &e), &e);
    printf("an update: %ld launches; a token: %ld\n", cucpu_launches() - before, of_token);
    assert_true(cucpu_launches() - before <= 50 && of_token <= 96 && cucpu_waits() - waits <= 3);
    ga_generator_destroy(g);
}

/* What a micro-batch of the seed's shape costs the host; the sizes of matrices do not matter for that. */
static void test_launches(void **unused) {
    (void)unused;
    ga_config c = ga_config_default();
    configure(&c, "vocab_size=64 d_model=64 d_ff=64 head_dim=16 batch_size=1"); /* the rest is that of rtx4060.cfg */
    int32_t *tokens = (int32_t *)calloc(c.max_seq_len, sizeof *tokens);
    long launches[2], waits[2];
    for (int recorded = 0; recorded < 2; recorded++) {
        open_device_with((ga_cuda_settings){.bf16 = true, .plain = !recorded});
        cucpu_set_dry(true);
        ga_model *m = create_there(&c, GA_TRAINING);
        device.wait(device.state);
        for (int i = 0; i < 3; i++) {
            ga_error e;
            launches[recorded] = cucpu_launches(), waits[recorded] = cucpu_waits();
            expect_ok(ga_forward_backward(m, tokens, tokens, 1, c.max_seq_len, 1, NULL, NULL, &e), &e);
        }
        launches[recorded] = cucpu_launches() - launches[recorded], waits[recorded] = cucpu_waits() - waits[recorded];
        double loss;
        long before = cucpu_waits();
        expect_ok(ga_batch_loss(m, &loss, &(ga_error){0}), &(ga_error){0});
        assert_true(cucpu_waits() == before + 1);
        if (recorded) check_other_launches(m);
        ga_destroy(m);
        cucpu_set_dry(false);
        close_device();
    }
    printf("a micro-batch of the seed model: %ld launches; as a graph %ld, waits %ld\n", launches[0], launches[1],
           waits[1]);
    assert_true(launches[0] > 200 && launches[1] <= 4 && waits[1] == 0);
    free(tokens);
}

/* Each call of CUDA and cuBLAS fails once: the program hears of it, in one line with file and line, and goes on. */
static void test_failures(void **unused) {
    (void)unused;
    ga_error e;
    cucpu_fail_call(0);
    expect_ok(use_device(&e), &e);
    long calls = calls_used, heard = 0;
    for (long n = 1; n <= calls; n += n < 60 ? 1 : 5) {
        cucpu_fail_call(n);
        memset(&e, 0, sizeof e);
        ga_result result = use_device(&e);
        if (result == GA_OK) fail_msg("call %ld of %ld fails, and nobody says so", n, calls);
        heard++;
        bool where =
            strstr(e.text, "gated_attention_cuda.cuh:") && (strstr(e.text, "launch") || strstr(e.text, "initial"));
        if (!where) fail_msg("call %ld: %s", n, e.text);
    }
    cucpu_fail_call(0);
    assert_true(heard > 50);
}

/* A kernel that goes wrong takes all later calls with it, also those that tidy up: one line, and an end. */
static void test_failures_for_good(void **unused) {
    (void)unused;
    ga_error e;
    cucpu_fail_call(0);
    expect_ok(use_device(&e), &e);
    size_t live = cucpu_live_allocations();
    for (long calls = calls_used, n = 1; n <= calls; n += calls / 20) {
        cucpu_fail_from(n);
        if (use_device(&e) == GA_OK) fail_msg("all calls fail from number %ld of %ld on, and nobody says so", n, calls);
        assert_non_null(strstr(e.text, "gated_attention_cuda.cuh:"));
        assert_true(cucpu_live_allocations() == live);
    }
    cucpu_fail_call(0);
    char why[512];
    long other, calls;
    free(capture_with_failure(0, &calls, why));
    assert_null(capture_with_failure(-calls / 2, &other, why)); /* in a pass that is recorded */
}

/* There is no device for these settings, in one line that says why. */
static void refused(int index, const char *why) {
    ga_error e = {0};
    assert_int_equal(ga_device_cuda(&device, (ga_cuda_settings){.index = index, .bf16 = true}, &e), GA_ERR_DEVICE);
    if (!strstr(e.text, why)) fail_msg("not \"%s\": %s", why, e.text);
}

/* Machines that have no GPU, or none for this program; and one without bfloat16 products. */
static void test_other_machines(void **unused) {
    (void)unused;
    refused(7, "no such GPU: there are 1"), refused(-1, "no such GPU: there are 1");
    cucpu_set_devices(0);
    refused(0, "no CUDA-capable device");
    cucpu_set_devices(1), cucpu_set_driver(0);
    refused(0, "there is no NVIDIA driver");
    cucpu_set_driver(11080);
    refused(0, "the driver knows CUDA 11.8, and this was built with CUDA 1");
    cucpu_set_driver(99000), cucpu_set_capability(70, 0);
    refused(0, "emulated GPU: compute capability below 7.5");
    cucpu_set_capability(90, 0);
    refused(0, "no kernel image is available for execution on the device; make -B CUDA_ARCH=-arch=sm_90 compiles");
    cucpu_set_capability(89, 75); /* compiled on by the driver, without tensor cores */
    refused(0, "kernels were compiled for older GPUs only; make -B CUDA_ARCH=-arch=sm_89 compiles for it");
    cucpu_set_capability(90, 80);
    open_device(true);
    assert_true(bf16);
    close_device();
    cucpu_set_capability(75, 75);
    open_device_with((ga_cuda_settings){.bf16 = true, .tf32 = true});
    assert_true(!bf16 && strstr(device.name, "float32 products"));
    close_device();
    cucpu_set_capability(89, 89);
}
#endif

int main(int argc, char **argv) {
    use_default_threads();
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    if (argc > 2) cmocka_set_skip_filter(argv[2]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copies),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_heads),
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_packed_weights),
        cmocka_unit_test(test_rounded_beside),
        cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_gate),
        cmocka_unit_test(test_elementwise),
        cmocka_unit_test(test_head),
        cmocka_unit_test(test_optimiser),
        cmocka_unit_test(test_mixture),
        cmocka_unit_test(test_switch_and_channels),
        cmocka_unit_test(test_analysis),
        cmocka_unit_test(test_training),
        cmocka_unit_test(test_training_bf16),
        cmocka_unit_test(test_inference),
        cmocka_unit_test(test_measuring),
        cmocka_unit_test(test_repeatable),
        cmocka_unit_test(test_training_recorded),
#ifdef GAI_CUDA_CPU
        cmocka_unit_test(test_no_late_memory),
        cmocka_unit_test(test_bytes_to_the_host),
        cmocka_unit_test(test_too_small),
        cmocka_unit_test(test_failures),
        cmocka_unit_test(test_failures_for_good),
        cmocka_unit_test(test_other_machines),
        cmocka_unit_test(test_training_captures_fail),
        cmocka_unit_test(test_launches),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
