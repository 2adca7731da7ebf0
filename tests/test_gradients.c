/* Every hand-derived gradient against central differences, in double: each operator alone, then the whole model
 * with each gate that the configuration accepts. The relative error, with sign, stays below 1e-6 for each tensor
 * on its own scale.
 *
 *     test_gradients [PATTERN]
 *
 * f'(0) = (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12 h + O(h^4)
 */
#define _POSIX_C_SOURCE 200809L
#define GA_DOUBLE
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"
#include "testing.h"

static const double tolerance = 1e-6, step = 3e-5;

typedef double (*function)(void *context);

/* The derivative of f when x moves along `direction`; x is left as it was. */
static double derivative(function f, void *context, double *x, const double *direction, size_t n) {
    static const double moves[] = {1, -1, 2, -2}, weights[] = {8, -8, -1, 1};
    double *start = reals(n), sum = 0;
    memcpy(start, x, n * sizeof *x);
    for (size_t k = 0; k < COUNT(moves); k++) {
        for (size_t i = 0; i < n; i++) x[i] = start[i] + moves[k] * step * direction[i];
        sum += weights[k] * f(context);
    }
    memcpy(x, start, n * sizeof *x);
    free(start);
    return sum / (12 * step);
}

static double partial(function f, void *context, double *x) {
    const double one = 1;
    return derivative(f, context, x, &one, 1);
}

static double dot(const double *a, const double *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static size_t largest(const double *x, size_t n) {
    size_t at = 0;
    for (size_t i = 1; i < n; i++)
        if (fabs(x[i]) > fabs(x[at])) at = i;
    return at;
}

/* Along g / |g| + r / |r| with a random r: a wrong sign, scale or entry of g shows, and the derivative is not small. */
static void check_direction(function f, void *context, double *x, const double *g, size_t n, uint64_t *random,
                            const char *name) {
    double *r = normal_reals(n, 1, random), size = norm_of(g, n), spread = norm_of(r, n);
    for (size_t i = 0; i < n; i++) r[i] = n == 1 ? 1 : g[i] / size + r[i] / spread;
    double expected = derivative(f, context, x, r, n), analytic = dot(g, r, n);
    expect_below(fabs(analytic - expected) / fmax(fabs(expected), 0.1 * size), tolerance,
                 "%s: %.12g along a direction, differences give %.12g", name, analytic, expected);
    free(r);
}

static void check_coordinate(function f, void *context, double *x, const double *g, size_t n, size_t i,
                             const char *name) {
    double expected = partial(f, context, x + i);
    expect_below(fabs(g[i] - expected) / fabs(g[largest(g, n)]), tolerance,
                 "%s: entry %zu of %zu is %.12g, differences give %.12g", name, i, n, g[i], expected);
}

static void check_all(function f, void *context, double *x, const double *g, size_t n, const char *name) {
    double *expected = reals(n);
    for (size_t i = 0; i < n; i++) expected[i] = partial(f, context, x + i);
    assert_true(norm_of(expected, n) > 0);
    expect_below(difference(g, expected, n), tolerance, "%s: %zu entries, norm of the difference over norm", name, n);
    free(expected);
}

/* ==== operators ==================================================================================================== */

/* f = sum of weight . output: its gradient with respect to the output is `weight`, which the backward pass is given. */
typedef struct {
    size_t N, C, O, T, H, D, F, V;
    double *x, *w, *s, *out, *extra, *weight;
    const double *rope;
    const int32_t *tokens, *targets;
    double eps, limit;
    ga_shape shape;
    double *q, *k, *v, *sink;
    ga_gate gate;
    ga_switch switched;
    size_t y_stride, s_stride, outputs;
} operands;

static double weighted(const operands *a) {
    return dot(a->weight, a->out, a->outputs);
}

static uint64_t seed_of_operators = 31;

static double *numbers(size_t n) {
    return normal_reals(n, 1, &seed_of_operators);
}

static double embedding(void *context) {
    operands *a = (operands *)context;
    ga_embedding_forward(a->out, a->tokens, a->w, a->N, a->C);
    return weighted(a);
}

static void test_embedding(void **state) {
    (void)state;
    static const int32_t tokens[] = {3, 0, 3, 6, 1, 3};
    operands a = {.N = 6, .C = 5, .V = 7, .tokens = tokens, .outputs = 30};
    a.w = numbers(35), a.out = reals(30), a.weight = numbers(30);
    double *dw = reals(35);
    ga_embedding_backward(dw, tokens, a.weight, a.N, a.C);
    check_all(embedding, &a, a.w, dw, 35, "embedding dw");
    free(a.w), free(a.out), free(a.weight), free(dw);
}

static double linear(void *context) {
    operands *a = (operands *)context;
    ga_linear_forward(a->out, a->x, a->w, a->N, a->O, a->C);
    return weighted(a);
}

static void test_linear(void **state) {
    (void)state;
    for (size_t N = 1; N <= 11; N += 5) {
        operands a = {.N = N, .C = 9, .O = 7, .outputs = N * 7};
        a.x = numbers(N * 9), a.w = numbers(63), a.out = reals(a.outputs), a.weight = numbers(a.outputs);
        double *dx = numbers(N * 9), *dw = reals(63);
        ga_linear_backward(dx, dw, a.weight, a.x, a.w, N, a.O, a.C);
        check_all(linear, &a, a.x, dx, N * 9, "linear dx");
        check_all(linear, &a, a.w, dw, 63, "linear dw");
        free(a.x), free(a.w), free(a.out), free(a.weight), free(dx), free(dw);
    }
}

static double linear_channels(void *context) {
    operands *a = (operands *)context;
    ga_linear_channels_forward(a->out, a->x, a->y_stride, a->w, a->N, a->O, a->C);
    return weighted(a);
}

static void test_linear_channels(void **state) {
    (void)state;
    enum { STRIDE = 9 };
    for (size_t N = 1; N <= 11; N += 5) {
        operands a = {.N = N, .C = 4, .O = 7, .y_stride = STRIDE, .outputs = N * 7};
        a.x = numbers(N * STRIDE), a.w = numbers(28), a.out = reals(a.outputs), a.weight = numbers(a.outputs);
        double *before = numbers(N * STRIDE), *dx = reals(N * STRIDE), *dw = reals(28);
        memcpy(dx, before, N * STRIDE * sizeof *dx); /* both are added to */
        ga_linear_channels_backward(dx, dw, a.weight, a.x, STRIDE, a.w, N, a.O, a.C);
        for (size_t i = 0; i < N * STRIDE; i++) dx[i] -= before[i];
        check_all(linear_channels, &a, a.x, dx, N * STRIDE, "linear_channels dx");
        check_all(linear_channels, &a, a.w, dw, 28, "linear_channels dw");
        free(a.x), free(a.w), free(a.out), free(a.weight), free(before), free(dx), free(dw);
    }
}

static double rmsnorm(void *context) {
    operands *a = (operands *)context;
    ga_rmsnorm_forward(a->out, a->extra, a->x, a->w, a->N, a->C, a->eps);
    return weighted(a);
}

static void test_rmsnorm(void **state) {
    (void)state;
    operands a = {.N = 5, .C = 9, .eps = 0.1, .outputs = 45};
    a.x = numbers(45), a.w = numbers(9), a.out = reals(45), a.extra = reals(5), a.weight = numbers(45);
    double *dx = numbers(45), *dw = reals(9);
    rmsnorm(&a);
    ga_rmsnorm_backward(dx, dw, a.weight, a.x, a.w, a.extra, a.N, a.C, false);
    check_all(rmsnorm, &a, a.x, dx, 45, "rmsnorm dx");
    check_all(rmsnorm, &a, a.w, dw, 9, "rmsnorm dw");
    free(a.x), free(a.w), free(a.out), free(a.extra), free(a.weight), free(dx), free(dw);
}

static double heads(void *context) {
    operands *a = (operands *)context;
    ga_heads_forward(a->out, a->x, a->y_stride, a->w, a->rope, a->N / a->T, a->T, a->H, a->D, a->eps);
    return weighted(a);
}

static void test_heads(void **state) {
    (void)state;
    enum { N = 6, T = 3, H = 2, D = 4, STRIDE = H * D + 3 };
    double rope[T * D];
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < D / 2; i++) {
            rope[t * D + i] = cos((double)t * pow(0.3, (double)i));
            rope[t * D + D / 2 + i] = sin((double)t * pow(0.3, (double)i));
        }
    for (int flags = 0; flags < 4; flags++) {
        operands a = {.N = N, .T = T, .H = H, .D = D, .eps = 0.1, .y_stride = STRIDE, .outputs = N * H * D};
        a.rope = flags & 1 ? rope : NULL;
        double *norm = numbers(D), *dw = reals(D), *dx = reals(N * STRIDE);
        a.w = flags & 2 ? norm : NULL;
        a.x = numbers(N * STRIDE), a.out = reals(a.outputs), a.weight = numbers(a.outputs);
        ga_heads_backward(dx, dw, a.weight, a.x, STRIDE, STRIDE, a.w, a.rope, N / T, T, H, D, a.eps);
        check_all(heads, &a, a.x, dx, N * STRIDE,
                  "heads dx"); /* what lies between the rows has no effect and no gradient */
        if (a.w) check_all(heads, &a, a.w, dw, D, "heads dw");
        free(norm), free(dw), free(dx), free(a.x), free(a.out), free(a.weight);
    }
}

static double sdpa(void *context) {
    operands *a = (operands *)context;
    ga_sdpa_forward(a->out, a->extra, a->q, a->k, a->v, a->sink, a->shape);
    return weighted(a);
}

static void check_sdpa(size_t B, size_t T, size_t HQ, size_t HK, size_t D, bool with_sink) {
    size_t queries = B * T * HQ * D, keys = B * T * HK * D;
    operands a = {.shape = {B, T, T, HQ, HK, D}, .outputs = queries};
    a.q = numbers(queries), a.k = numbers(keys), a.v = numbers(keys);
    a.out = reals(queries), a.extra = reals(B * HQ * T), a.weight = numbers(queries);
    a.sink = with_sink ? numbers(HQ) : NULL;
    double *dsink = reals(HQ);
    double *dq = numbers(queries), *dk = numbers(keys), *dv = numbers(keys),
           *scratch = numbers(B * HQ * T * (2 * D + 1));
    sdpa(&a);
    ga_sdpa_backward(dq, dk, dv, dsink, scratch, a.weight, a.out, a.extra, a.q, a.k, a.v, a.sink, a.shape);
    check_all(sdpa, &a, a.v, dv, keys, "sdpa dv");
    if (with_sink) check_all(sdpa, &a, a.sink, dsink, HQ, "sdpa dsink");
    if (T > 1 || with_sink) {
        check_all(sdpa, &a, a.q, dq, queries, "sdpa dq");
        check_all(sdpa, &a, a.k, dk, keys, "sdpa dk");
    }
    free(a.q), free(a.k), free(a.v), free(a.sink), free(dsink), free(a.out), free(a.extra), free(a.weight);
    free(dq), free(dk), free(dv), free(scratch);
}

static void test_sdpa(void **state) {
    (void)state;
    for (int sink = 0; sink <= 1; sink++) {
        check_sdpa(1, 1, 2, 1, 4, sink);
        check_sdpa(2, 5, 4, 2, 4, sink);
        check_sdpa(1, 6, 3, 1, 2, sink);
        check_sdpa(1, 7, 3, 3, 6, sink);
        check_sdpa(1, 67, 2, 1, 2, sink); /* two tiles */
    }
}

static double gate(void *context) {
    operands *a = (operands *)context;
    ga_gate_forward(a->out, a->x, a->y_stride, a->s, a->s_stride, a->N, a->gate);
    return weighted(a);
}

static void check_gate(const ga_config *c) {
    ga_gate g = ga_gate_of(c);
    size_t width = g.H * g.D, rows = 3, y_stride = width + 2;
    size_t s_stride = g.input == GA_INPUT_QUERY && g.form != GA_SELF ? g.logits + 1 : 0,
           logits = s_stride ? rows * s_stride : g.logits;
    operands a = {.N = rows, .gate = g, .y_stride = y_stride, .s_stride = s_stride, .outputs = rows * width};
    a.x = numbers(rows * y_stride), a.s = numbers(logits), a.out = reals(rows * width),
    a.weight = numbers(rows * width);
    double *dy = reals(rows * y_stride), *ds = reals(logits);
    ga_gate_backward(dy, y_stride, ds, s_stride, a.weight, a.x, y_stride, a.s, s_stride, rows, g);
    check_all(gate, &a, a.x, dy, rows * y_stride, "gate dy");
    if (g.form != GA_SELF) check_all(gate, &a, a.s, ds, logits, "gate ds");
    if (g.form != GA_SELF && s_stride == 0) { /* parameters: added to what is there */
        double *twice = reals(logits);
        memcpy(twice, ds, logits * sizeof *ds);
        ga_gate_backward(dy, y_stride, twice, 0, a.weight, a.x, y_stride, a.s, 0, rows, g);
        for (size_t i = 0; i < logits; i++) ds[i] *= 2;
        expect_below(difference(twice, ds, logits), 1e-12, "gate ds, accumulated");
        free(twice);
    }
    free(a.x), free(a.s), free(a.out), free(a.weight), free(dy), free(ds);
}

/* ==== every gate that there is ===================================================================================== */

typedef void (*visitor)(const ga_config *c, void *argument);

/* Visits what ga_config_check accepts of all values of the gate's keys; returns how many that were. */
static size_t for_each_gate(ga_config c, visitor visit, void *argument) {
    size_t count = 0;
    for (c.gate_position = GA_G1; c.gate_position <= GA_G5; c.gate_position++)
        for (c.gate_type = GA_ELEMENTWISE; c.gate_type <= GA_HEADWISE; c.gate_type++)
            for (c.gate_sharing = GA_SPECIFIC; c.gate_sharing <= GA_SHARED; c.gate_sharing++)
                for (c.gate_form = GA_MULTIPLICATIVE; c.gate_form <= GA_SELF; c.gate_form++)
                    for (c.gate_activation = GA_SIGMOID; c.gate_activation <= GA_RMSNORM; c.gate_activation++)
                        for (c.gate_input = GA_INPUT_QUERY; c.gate_input <= GA_INPUT_SCALAR; c.gate_input++)
                            for (int frozen = 0; frozen <= 1; frozen++) {
                                c.gate_frozen = frozen;
                                if (ga_config_check(&c, NULL) != GA_OK) continue;
                                visit(&c, argument);
                                count++;
                            }
    return count;
}

/* V 13, C 6, D 4, F 7, L 2: head_dim is not d_model / n_heads. The epsilon is large so that its place is seen. */
static ga_config tiny_config(const char *more) {
    ga_config c = ga_config_default();
    configure(&c,
              "vocab_size=13 d_model=6 n_layers=2 n_heads=4 n_kv_heads=2 head_dim=4 d_ff=7 max_seq_len=5 batch_size=2 "
              "norm_eps=0.05 rope_base=100 gate_position=none");
    configure(&c, more);
    return c;
}

static void visit_operator(const ga_config *c, void *argument) {
    (void)argument;
    check_gate(c);
}

static void test_gate(void **state) {
    (void)state;
    size_t count = for_each_gate(tiny_config("qk_norm=0"), visit_operator, NULL);
    assert_true(count > 200);
    ga_config wide =
        tiny_config("gate_position=G1 n_heads=2 head_dim=130"); /* more values than are worked on at a time */
    check_gate(&wide);
    wide.gate_type = GA_HEADWISE;
    check_gate(&wide);
    wide.gate_sharing = GA_SHARED;
    check_gate(&wide);
}

static double switch_heads(void *context) {
    operands *a = (operands *)context;
    ga_switch_forward(a->out, a->x, a->s, a->y_stride, a->N, a->switched);
    return weighted(a);
}

/* Logits that are far enough apart for the choice not to change while they move. */
static void check_switch(size_t H, size_t D, size_t E, size_t K) {
    enum { ROWS = 3 };
    size_t stride = H * E * D + 2;
    operands a = {.N = ROWS, .y_stride = stride, .switched = {H, D, E, K}, .outputs = ROWS * H * D};
    a.x = numbers(ROWS * stride), a.s = reals(ROWS * stride), a.out = reals(a.outputs), a.weight = numbers(a.outputs);
    for (size_t i = 0; i < ROWS * stride; i++) a.s[i] = (double)(i * 7 % 11) / 3 - 2 + (double)(i % stride) / 100;
    double *dx = reals(ROWS * stride), *ds = reals(ROWS * stride);
    ga_switch_backward(dx, ds, a.weight, a.x, a.s, stride, ROWS, a.switched);
    check_all(switch_heads, &a, a.x, dx, ROWS * stride, "switch dx");
    check_all(switch_heads, &a, a.s, ds, ROWS * stride, "switch ds");
    free(a.x), free(a.s), free(a.out), free(a.weight), free(dx), free(ds);
}

static void test_switch(void **state) {
    (void)state;
    check_switch(2, 4, 8, 8);
    check_switch(2, 4, 4, 4);
    check_switch(1, 6, 8, 2);
    check_switch(3, 2, 5, 1);
    check_switch(2, 4, 1, 1);
}

static double swiglu(void *context) {
    operands *a = (operands *)context;
    ga_swiglu_forward(a->out, a->x, a->N, a->F);
    return weighted(a);
}

static void test_swiglu(void **state) {
    (void)state;
    operands a = {.N = 3, .F = 7, .outputs = 21};
    a.x = numbers(42), a.out = reals(21), a.weight = numbers(21);
    double *du = numbers(42);
    ga_swiglu_backward(du, a.weight, a.x, a.N, a.F);
    check_all(swiglu, &a, a.x, du, 42, "swiglu du");
    free(a.x), free(a.out), free(a.weight), free(du);
}

/* ---- mixture of experts ---- */

typedef struct {
    size_t N, F;
    ga_router r;
    double balance, z_loss;
    double *z, *p, *lse, *weights, *weight, *u, *a;
    int32_t *experts, *counts, *rows, *slots, *offsets;
} routing;

static int32_t *indices(size_t n) {
    int32_t *x = (int32_t *)calloc(n, sizeof *x);
    assert_non_null(x);
    return x;
}

/* weight . w + balance L_lb,m + z_loss L_z, the two by their definitions */
static double route(void *context) {
    routing *a = (routing *)context;
    size_t N = a->N, E = a->r.E, K = a->r.K;
    double tokens = 0, balance = 0, squares = 0;
    ga_route_forward(a->p, a->lse, a->weights, a->experts, a->z, N, a->r);
    for (size_t e = 0; e < E; e++) tokens += (double)a->counts[e] / (double)K;
    for (size_t n = 0; n < N; n++) {
        double sum = 0;
        for (size_t e = 0; e < E; e++) sum += exp(a->z[n * E + e]);
        squares += log(sum) * log(sum);
        for (size_t e = 0; e < E; e++) balance += a->counts[e] / tokens * exp(a->z[n * E + e]) / sum;
    }
    return dot(a->weight, a->weights, N * K) + a->balance * (double)E * balance / (double)N +
           a->z_loss * squares / (double)N;
}

static void check_route(size_t N, size_t E, size_t K, bool normalize) {
    routing a = {.N = N, .r = {E, K, normalize}, .balance = 0.7, .z_loss = -0.3};
    a.z = numbers(N * E), a.p = reals(N * E), a.lse = reals(N), a.weights = reals(N * K), a.weight = numbers(N * K);
    a.experts = indices(N * K), a.counts = indices(E);
    for (size_t e = 0; e < E; e++) a.counts[e] = (int32_t)(e * 5 % 7);
    double *dz = numbers(N * E);
    route(&a);
    ga_route_backward(dz, a.weight, a.p, a.lse, a.experts, a.counts, N, a.r, a.balance, a.z_loss);
    check_all(route, &a, a.z, dz, N * E, "router d logits");
    free(a.z), free(a.p), free(a.lse), free(a.weights), free(a.weight), free(a.experts), free(a.counts), free(dz);
}

static void test_route(void **state) {
    (void)state;
    check_route(5, 7, 2, true);
    check_route(5, 7, 2, false);
    check_route(3, 6, 1, false);
    check_route(4, 3, 3, true);
    check_route(1, 130, 8, true);
}

static double expert_swiglu(void *context) {
    routing *a = (routing *)context;
    ga_expert_swiglu_forward(a->a, a->u, a->weights, a->slots, a->N, a->F);
    return dot(a->weight, a->a, a->N * a->F);
}

static void test_expert_swiglu(void **state) {
    (void)state;
    int32_t slots[] = {2, 0, 3, 1};
    routing a = {.N = 4, .F = 19, .slots = slots};
    a.u = numbers(4 * 38), a.weights = numbers(4), a.a = reals(4 * 19), a.weight = numbers(4 * 19);
    double *du = numbers(4 * 38), *d_weights = numbers(4);
    ga_expert_swiglu_backward(du, d_weights, a.weight, a.u, a.weights, slots, 4, 19);
    check_all(expert_swiglu, &a, a.u, du, 4 * 38, "expert swiglu du");
    check_all(expert_swiglu, &a, a.weights, d_weights, 4, "expert swiglu d weights");
    free(a.u), free(a.weights), free(a.a), free(a.weight), free(du), free(d_weights);
}

typedef struct {
    double *x, *w, *y, *weight;
    size_t E, O, I, stride, outputs;
    const int32_t *offsets;
} group;

static double grouped(void *context) {
    group *a = (group *)context;
    ga_grouped_forward(a->y, a->x, a->w, a->stride, a->offsets, a->E, a->O, a->I);
    return dot(a->weight, a->y, a->outputs);
}

static void test_grouped(void **state) {
    (void)state;
    static const int32_t offsets[] = {0, 1, 1, 12, 14}; /* the second expert has no rows */
    enum { E = 4, R = 14, O = 7, I = 9, STRIDE = O * I + 5 };
    group a = {.E = E, .O = O, .I = I, .stride = STRIDE, .outputs = R * O, .offsets = offsets};
    a.x = numbers(R * I), a.w = numbers(E * STRIDE), a.y = reals(R * O), a.weight = numbers(R * O);
    double *dx = numbers(R * I), *dw = reals(E * STRIDE);
    ga_grouped_backward(dx, dw, a.weight, a.x, a.w, STRIDE, offsets, E, O, I);
    check_all(grouped, &a, a.x, dx, R * I, "grouped dx");
    check_all(grouped, &a, a.w, dw, E * STRIDE, "grouped dw"); /* what lies between the experts has no gradient */
    free(a.x), free(a.w), free(a.y), free(a.weight), free(dx), free(dw);
}

static double clip(void *context) {
    operands *a = (operands *)context;
    ga_clip_forward(a->out, a->x, a->N, a->limit);
    return weighted(a);
}

static void test_clip(void **state) {
    (void)state;
    operands a = {.N = 40, .limit = 0.8, .outputs = 40};
    a.x = numbers(40), a.out = reals(40), a.weight = numbers(40);
    for (size_t i = 0; i < 40; i++)
        if (fabs(fabs(a.x[i]) - a.limit) < 4 * step) a.x[i] = 0; /* no derivative there */
    double *dx = numbers(40);
    ga_clip_backward(dx, a.weight, a.x, a.N, a.limit);
    check_all(clip, &a, a.x, dx, 40, "clip dx");
    free(a.x), free(a.out), free(a.weight), free(dx);
}

static double head_loss(void *context) {
    operands *a = (operands *)context;
    ga_head_loss(a->out, NULL, NULL, a->extra, a->x, a->w, a->targets, a->N, a->C, a->V, NULL);
    return weighted(a);
}

static void test_head_loss(void **state) {
    (void)state;
    enum { N = GA_HEAD_ROWS + 2, C = 3, V = 18 };
    int32_t targets[N];
    uint64_t random = 8;
    fill_tokens(targets, N, V, &random);
    targets[1] = targets[N - 1] = -1;
    operands a = {.N = N, .C = C, .V = V, .targets = targets, .outputs = N};
    a.x = numbers(N * C), a.w = numbers(V * C), a.out = reals(N), a.extra = reals(GA_HEAD_ROWS * V),
    a.weight = reals(N);
    double *dx = numbers(N * C), *dw = reals(V * C), scale = -0.6;
    for (size_t i = 0; i < N; i++) a.weight[i] = scale;
    ga_head_loss(a.out, dx, dw, a.extra, a.x, a.w, targets, N, C, V, (ga_real[]){scale});
    check_all(head_loss, &a, a.x, dx, N * C, "head dx");
    check_all(head_loss, &a, a.w, dw, V * C, "head dw");
    free(a.x), free(a.w), free(a.out), free(a.extra), free(a.weight), free(dx), free(dw);
}

/* ==== the model ==================================================================================================== */

typedef struct {
    ga_model *m;
    int32_t tokens[256], targets[256];
    size_t B, T;
} problem;

/* The two losses of a layer's router by their definitions, from the probabilities of the last pass. */
static double router_losses(const problem *p, size_t layer) {
    const ga_config *c = &p->m->config;
    const ga_layer_activations *a = &p->m->layers[layer];
    size_t N = p->B * p->T, E = c->n_experts, K = c->experts_per_token;
    double balance = 0, squares = 0;
    for (size_t e = 0; e < E; e++) {
        double f = 0, P = 0;
        for (size_t s = 0; s < N * K; s++) f += (size_t)a->experts[s] == e;
        for (size_t n = 0; n < N; n++) P += a->router_p[n * E + e];
        balance += (double)E * f / (double)N * P / (double)N;
    }
    for (size_t n = 0; n < N; n++) squares += a->router_lse[n] * a->router_lse[n] / (double)N;
    return (c->load_balance_coef * balance + c->router_z_coef * squares) / (double)c->n_layers;
}

static double loss_of(void *context) {
    problem *p = (problem *)context;
    double loss = NAN;
    ga_error e;
    expect_ok(ga_forward(p->m, p->tokens, p->targets, p->B, p->T, NULL, &loss, &e), &e);
    for (size_t l = 0; p->m->sizes.E > 0 && l < p->m->sizes.L; l++) loss += router_losses(p, l);
    return loss;
}

static problem make_problem(const ga_config *c, size_t B, size_t T, uint64_t seed) {
    problem p = {.m = create(c, GA_TRAINING), .B = B, .T = T};
    assert_true(B * T <= COUNT(p.tokens));
    randomise_weights(p.m, seed);
    fill_tokens(p.tokens, B * T, p.m->sizes.V, &seed);
    fill_tokens(p.targets, B * T, p.m->sizes.V, &seed);
    return p;
}

/* With one position the softmax is 1 whatever the scores are. */
static bool has_no_effect(const problem *p, const ga_tensor *t) {
    if (t->expert != GA_ALL && !p->m->config.recompute) {
        const int32_t *offsets = p->m->layers[t->layer].offsets + t->expert;
        return offsets[0] == offsets[1]; /* no position chose this expert */
    }
    if (p->T > 1 || p->m->config.attention_sink != GA_SINK_NONE) return false;
    bool gate = t->id == GA_TENSOR_gate_weight || t->id == GA_TENSOR_gate_channels || t->id == GA_TENSOR_gate_free;
    bool scores = p->m->gate.position == GA_G3 || p->m->gate.position == GA_G4;
    return t->id == GA_TENSOR_query || t->id == GA_TENSOR_key || t->id == GA_TENSOR_query_norm ||
           t->id == GA_TENSOR_key_norm || (gate && scores);
}

typedef enum { SAMPLED, EVERY_ENTRY } thoroughness;

/* Computes the gradients twice, with scales that add up to 1: they are added to what is there. */
static void check_problem(problem *p, thoroughness how, const char *what) {
    ga_model *m = p->m;
    ga_error e;
    uint64_t random = 99;
    for (int i = 0; i < 2; i++)
        expect_ok(ga_forward_backward(m, p->tokens, p->targets, p->B, p->T, i ? 1.25 : -0.25, NULL, NULL, &e), &e);
    double all = norm_of(m->gradients, m->n_weights);
    for (size_t i = 0; i < m->n_tensors; i++) {
        const ga_tensor *t = &m->tensors[i];
        double *x = m->weights + t->offset;
        const double *g = m->gradients + t->offset;
        size_t n = t->rows * t->columns;
        char name[256];
        snprintf(name, sizeof name, "%s: %s", what, t->name);
        if (has_no_effect(p, t)) {
            expect_below(norm_of(g, n), 1e-12, "%s has no effect", name);
            continue;
        }
        if (!(norm_of(g, n) > 1e-5 * all)) fail_msg("%s: the gradient is as good as zero, %g", name, norm_of(g, n));
        if (how == EVERY_ENTRY) {
            check_all(loss_of, p, x, g, n, name);
            continue;
        }
        check_direction(loss_of, p, x, g, n, &random, name);
        check_coordinate(loss_of, p, x, g, n, largest(g, n), name);
        check_coordinate(loss_of, p, x, g, n, ga_random_bits(&random) % n, name);
    }
}

static void check_model(const char *settings, size_t B, size_t T, thoroughness how) {
    ga_config c = tiny_config(settings);
    problem p = make_problem(&c, B, T, 5);
    check_problem(&p, how, settings);
    ga_destroy(p.m);
}

static void visit_model(const ga_config *c, void *argument) {
    (void)argument;
    static const char *keys[] = {"gate_position",   "gate_type",  "gate_sharing", "gate_form",
                                 "gate_activation", "gate_input", "gate_frozen",  "qk_norm"};
    char what[256] = "", value[32];
    for (size_t i = 0; i < COUNT(keys); i++) {
        assert_true(ga_config_get(c, keys[i], value, sizeof value));
        snprintf(what + strlen(what), sizeof what - strlen(what), "%s%s", i ? " " : "", value);
    }
    problem p = make_problem(c, 1, 5, 3);
    check_problem(&p, SAMPLED, what);
    ga_destroy(p.m);
}

static void test_all_gates(void **state) {
    (void)state;
    size_t normed = for_each_gate(tiny_config("qk_norm=1"), visit_model, NULL);
    size_t plain = for_each_gate(tiny_config("qk_norm=0"), visit_model, NULL);
    size_t channels = for_each_gate(tiny_config("qk_norm=0 gate_input_dims=4 n_layers=1"), visit_model, NULL);
    const char *heads = "qk_norm=0 n_layers=1 attention_sink=learned switch_heads=v switch_experts=3 switch_top_k=2";
    size_t switched = for_each_gate(tiny_config(heads), visit_model, NULL);
    print_message("    %zu gates with QK-norm, %zu without, %zu that read four channels, %zu beside switch heads\n",
                  normed, plain, channels, switched);
    assert_true(normed > 200 && plain > normed && channels > 100 && switched > 100);
}

/* One of each kind, to the last entry. */
static void test_positions(void **state) {
    (void)state;
    check_model("", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G1", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G2 gate_type=headwise", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G3", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G4 gate_sharing=shared", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G5", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G2 gate_form=additive gate_activation=silu gate_sharing=shared", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G1 gate_form=self gate_activation=rmsnorm", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G1 gate_input=none gate_sharing=shared gate_type=headwise", 2, 5, EVERY_ENTRY);
}

static void test_sandwich_and_tied(void **state) {
    (void)state;
    check_model("sandwich_norm=1", 2, 5, EVERY_ENTRY);
    check_model("tied_embeddings=1", 2, 5, EVERY_ENTRY);
    check_model("tied_embeddings=1 gate_position=G5 sandwich_norm=1", 2, 5, EVERY_ENTRY);
    check_model("qk_norm=0", 2, 5, EVERY_ENTRY);
    check_model("qk_norm=0 gate_position=G4 sandwich_norm=1", 2, 5, EVERY_ENTRY);
}

/* GQA ratios n, 1 and 2 (everywhere else). */
static void test_head_ratios(void **state) {
    (void)state;
    check_model("n_kv_heads=4", 2, 5, EVERY_ENTRY);
    check_model("n_kv_heads=1", 2, 5, EVERY_ENTRY);
    check_model("n_kv_heads=4 gate_position=G2", 1, 5, EVERY_ENTRY);
    check_model("n_kv_heads=1 gate_position=G3 gate_sharing=shared", 1, 5, EVERY_ENTRY);
    check_model("n_kv_heads=1 gate_position=G1 gate_type=headwise", 1, 5, EVERY_ENTRY);
    check_model("n_heads=3 n_kv_heads=3 head_dim=2 gate_position=G1", 1, 5, EVERY_ENTRY);
    check_model("n_heads=1 n_kv_heads=1 head_dim=8 d_model=3 gate_position=G2", 1, 5, EVERY_ENTRY);
}

static void test_gate_input_dims(void **state) {
    (void)state;
    check_model("gate_position=G1 gate_input_dims=3", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G1 gate_type=headwise gate_input_dims=1 attention_sink=learned", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G2 gate_input_dims=6 recompute=1", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G3 gate_input_dims=2", 2, 5, EVERY_ENTRY);
    check_model("gate_position=G5 gate_input_dims=5 sandwich_norm=1", 2, 5, EVERY_ENTRY);
}

/* The five rows of Table 6, and switch heads with what they can be combined with. */
static void test_switch_heads(void **state) {
    (void)state;
    check_model("switch_heads=kv switch_experts=8 switch_top_k=8", 1, 5, SAMPLED);
    check_model("switch_heads=kv switch_experts=4 switch_top_k=4", 2, 5, EVERY_ENTRY);
    check_model("switch_heads=v switch_experts=4 switch_top_k=4 recompute=1", 2, 5, EVERY_ENTRY);
    check_model("switch_heads=v switch_experts=8 switch_top_k=2", 2, 5, EVERY_ENTRY);
    check_model("switch_heads=v switch_experts=1 switch_top_k=1", 2, 5, EVERY_ENTRY);
    check_model("qk_norm=0 switch_heads=kv switch_experts=3 switch_top_k=1 n_kv_heads=1 attention_sink=learned", 2, 5,
                EVERY_ENTRY);
    check_model("switch_heads=kv switch_experts=3 switch_top_k=2 gate_position=G4", 2, 5, EVERY_ENTRY);
    check_model("switch_heads=v switch_experts=3 switch_top_k=2 gate_position=G3", 2, 5, EVERY_ENTRY);
    check_model("switch_heads=kv switch_experts=3 switch_top_k=2 gate_position=G1 gate_input_dims=3", 2, 5,
                EVERY_ENTRY);
    check_model("switch_heads=kv switch_experts=1 switch_top_k=1 qk_norm=0 n_kv_heads=4", 2, 5, EVERY_ENTRY);
}

/* Row "v 1top1" of Table 6 is the headwise gate on the values, Table 1 row 11: the same numbers to the last bit. */
static void check_switch_is_value_gate(const char *size) {
    ga_config gated = tiny_config(size), switched = gated;
    configure(&gated, "gate_position=G2 gate_type=headwise");
    configure(&switched, "switch_heads=v switch_experts=1 switch_top_k=1");
    problem g = make_problem(&gated, 2, 5, 5), s = make_problem(&switched, 2, 5, 5);
    assert_int_equal(g.m->n_weights, s.m->n_weights);
    for (size_t i = 0; i < g.m->n_tensors; i++) {
        const ga_tensor *t = &g.m->tensors[i], *u = &s.m->tensors[i];
        assert_int_equal(u->id, t->id == GA_TENSOR_gate_weight ? GA_TENSOR_value_router : t->id);
        assert_true(u->offset == t->offset && u->layer == t->layer && u->decays == t->decays);
    }
    assert_memory_equal(g.m->weights, s.m->weights, g.m->n_weights * sizeof(ga_real));
    double of_gate, of_switch;
    ga_error e;
    expect_ok(ga_forward_backward(g.m, g.tokens, g.targets, 2, 5, 1, NULL, &of_gate, &e), &e);
    expect_ok(ga_forward_backward(s.m, g.tokens, g.targets, 2, 5, 1, NULL, &of_switch, &e), &e);
    assert_true(of_gate == of_switch);
    assert_memory_equal(g.m->gradients, s.m->gradients, g.m->n_weights * sizeof(ga_real));
    ga_destroy(g.m), ga_destroy(s.m);
}

static void test_switch_is_value_gate(void **state) {
    (void)state;
    check_switch_is_value_gate("");
    check_switch_is_value_gate("head_dim=40 n_kv_heads=1 attention_sink=learned");
    check_switch_is_value_gate("head_dim=128 d_model=24 n_kv_heads=4 n_layers=1 recompute=1");
}

static void test_attention_sink(void **state) {
    (void)state;
    check_model("attention_sink=learned", 2, 5, EVERY_ENTRY);
    check_model("attention_sink=one gate_position=G1", 2, 5, EVERY_ENTRY);
    check_model("attention_sink=learned gate_position=G2 gate_type=headwise n_kv_heads=1 recompute=1", 2, 5,
                EVERY_ENTRY);
    check_model("attention_sink=learned gate_position=G1 gate_type=headwise", 2, 1, EVERY_ENTRY);
    check_model("attention_sink=learned max_seq_len=67", 1, 67, SAMPLED);
}

static void test_depths(void **state) {
    (void)state;
    check_model("n_layers=1 gate_position=G1", 1, 5, EVERY_ENTRY);
    check_model("n_layers=3 gate_position=G1 rope_base=1000000", 1, 5, EVERY_ENTRY);
    check_model("gate_position=G1 qk_norm=0 rope_factor=4 rope_original_length=16", 2, 5, EVERY_ENTRY);
    check_model("recompute=1 n_layers=3 gate_position=G1", 1, 5, EVERY_ENTRY);
    check_model("recompute=1 n_layers=3 gate_position=G3 sandwich_norm=1 tied_embeddings=1", 1, 5, EVERY_ENTRY);
}

/* Some values are clipped, some are not, and none is so near to the limit that a difference would cross it. */
static bool clips_clearly(const double *x, size_t n, double limit) {
    size_t over = 0;
    for (size_t i = 0; i < n; i++) {
        over += fabs(x[i]) > limit;
        if (fabs(fabs(x[i]) - limit) < 2e-3) return false;
    }
    return over > 0 && over < n;
}

static bool model_clips_clearly(problem *p) {
    loss_of(p);
    for (size_t l = 0; l < p->m->sizes.L; l++) {
        const ga_layer_activations *a = &p->m->layers[l];
        size_t n = p->B * p->T * p->m->sizes.C;
        if (!clips_clearly(a->o_gated ? a->o_gated : a->o, n, p->m->config.attn_clip)) return false;
        if (!clips_clearly(a->f, n, p->m->config.ffn_clip)) return false;
    }
    return true;
}

static void test_clipped_outputs(void **state) {
    (void)state;
    static const char *settings[] = {"", "sandwich_norm=1 gate_position=G5"};
    for (size_t i = 0; i < COUNT(settings); i++) {
        ga_config c = tiny_config(settings[i]);
        size_t checked = 0;
        for (c.attn_clip = 0.3; c.attn_clip < 0.6 && checked < 2; c.attn_clip += 0.007) {
            c.ffn_clip = 0.9 * c.attn_clip;
            problem p = make_problem(&c, 1, 5, 5);
            if (model_clips_clearly(&p)) {
                check_problem(&p, EVERY_ENTRY, "clipped outputs");
                checked++;
            }
            ga_destroy(p.m);
        }
        assert_int_equal(checked, 2);
    }
}

/* No choice of a router is so close that a difference would change it. */
static bool routes_clearly(problem *p) {
    const ga_config *c = &p->m->config;
    size_t E = c->n_experts, K = c->experts_per_token;
    loss_of(p);
    for (size_t i = 0; i < c->n_layers * p->B * p->T; i++) {
        const ga_layer_activations *a = &p->m->layers[i / (p->B * p->T)];
        const double *prob = a->router_p + i % (p->B * p->T) * E;
        const int32_t *chosen = a->experts + i % (p->B * p->T) * K;
        double least = prob[chosen[K - 1]];
        for (size_t e = 0, j; e < E; e++) {
            for (j = 0; j < K && (size_t)chosen[j] != e; j++) continue;
            if (j == K && !(prob[e] < least * (1 - 5e-3))) return false;
        }
    }
    return true;
}

static void check_mixture(const char *settings, size_t B, size_t T) {
    ga_config c = tiny_config("n_experts=5 experts_per_token=2 load_balance_coef=0.3 router_z_coef=0.2");
    configure(&c, settings);
    for (uint64_t seed = 1; seed < 40; seed++) {
        problem p = make_problem(&c, B, T, seed);
        bool clear = routes_clearly(&p);
        if (clear) check_problem(&p, EVERY_ENTRY, settings);
        ga_destroy(p.m);
        if (clear) return;
    }
    fail_msg("%s: every seed has a choice that is too close", settings);
}

static void test_mixture(void **state) {
    (void)state;
    check_mixture("", 2, 5);
    check_mixture("normalize_top_k=0 gate_position=G1", 2, 5);
    check_mixture("normalize_top_k=0 experts_per_token=1 n_layers=3", 1, 5);
    check_mixture("experts_per_token=5", 1, 4);
    check_mixture("n_experts=20 experts_per_token=3 d_ff=2", 1, 5); /* some have no rows */
    check_mixture("sandwich_norm=1 gate_position=G5 tied_embeddings=1", 2, 4);
    check_mixture("load_balance_coef=0 router_z_coef=0 gate_position=G2", 1, 5);
    check_mixture("n_layers=1 d_ff=1", 1, 1);
}

/* A layer's probabilities do not outlast it here, so that the losses of the routers are left out; and every
 * expert has rows. */
static void test_mixture_recomputed(void **state) {
    (void)state;
    check_model(
        "n_experts=4 experts_per_token=3 load_balance_coef=0 router_z_coef=0 recompute=1 n_layers=3 gate_position=G1",
        1, 5, EVERY_ENTRY);
}

static void test_lengths(void **state) {
    (void)state;
    check_model("gate_position=G1", 2, 1, EVERY_ENTRY);
    check_model("gate_position=G3", 1, 1, EVERY_ENTRY);
    check_model("gate_position=G1", 3, 3, EVERY_ENTRY);
    check_model("gate_position=G2", 1, 4, EVERY_ENTRY);
    check_model("gate_position=G1 max_seq_len=67", 1, 67, SAMPLED); /* two tiles of 64 */
    check_model("gate_position=G4 max_seq_len=130 n_layers=1", 1, 130, SAMPLED);
}

static void test_ignored_targets(void **state) {
    (void)state;
    ga_config c = tiny_config("gate_position=G1");
    problem p = make_problem(&c, 2, 5, 5);
    p.targets[0] = p.targets[3] = -1, p.targets[9] = -100;
    check_problem(&p, EVERY_ENTRY, "ignored targets");
    ga_destroy(p.m);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_linear_channels),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_heads),
        cmocka_unit_test(test_sdpa),
        cmocka_unit_test(test_gate),
        cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_route),
        cmocka_unit_test(test_expert_swiglu),
        cmocka_unit_test(test_grouped),
        cmocka_unit_test(test_clip),
        cmocka_unit_test(test_head_loss),
        cmocka_unit_test(test_positions),
        cmocka_unit_test(test_sandwich_and_tied),
        cmocka_unit_test(test_head_ratios),
        cmocka_unit_test(test_gate_input_dims),
        cmocka_unit_test(test_attention_sink),
        cmocka_unit_test(test_switch),
        cmocka_unit_test(test_switch_heads),
        cmocka_unit_test(test_switch_is_value_gate),
        cmocka_unit_test(test_depths),
        cmocka_unit_test(test_clipped_outputs),
        cmocka_unit_test(test_mixture),
        cmocka_unit_test(test_mixture_recomputed),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_all_gates),
        cmocka_unit_test(test_ignored_targets),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    use_threads(1); /* tiny sizes */
    return cmocka_run_group_tests_name("gradients", tests, NULL, NULL);
}
