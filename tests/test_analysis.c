/* The analysis of sections 4.2, 4.3 and A.3 to A.5: its operators against plain double loops, its figures against
 * PyTorch, which has them from whole attention matrices, hooks and singular values
 * (tests/reference/analysis_fixtures.py).
 *
 *     [GA_ISA=c|avx2|avx512|...] test_analysis [PATTERN]
 */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"
#include "../gated_attention_x86.h"
#include "testing.h"
#include "fixture.h"

static const double tolerance = 1e-5;

/* ---- operators ----------------------------------------------------------------------------------------------------- */

typedef struct {
    ga_shape n;
    ga_real *q, *k, *v, *y, *lse, *sink;
} attention;

static attention make_attention(ga_shape n, bool with_sink, uint64_t random) {
    attention a = {.n = n, .y = reals(n.B * n.T * n.HQ * n.D), .lse = reals(n.B * n.HQ * n.T)};
    a.q = normal_reals(n.B * n.T * n.HQ * n.D, 1.5, &random);
    a.k = normal_reals(n.B * n.S * n.HK * n.D, 1.5, &random);
    a.v = normal_reals(n.B * n.S * n.HK * n.D, 1, &random);
    a.sink = with_sink ? normal_reals(n.HQ, 1, &random) : NULL;
    ga_sdpa_forward(a.y, a.lse, a.q, a.k, a.v, a.sink, n);
    return a;
}

static void free_attention(attention *a) {
    free(a->q), free(a->k), free(a->v), free(a->y), free(a->lse), free(a->sink);
}

/* P_ij from scratch */
static double probability(const attention *a, size_t b, size_t h, size_t i, size_t j) {
    ga_shape n = a->n;
    size_t seen = n.S - n.T + i + 1;
    double sum = a->sink ? exp((double)a->sink[h]) : 0, wanted = 0;
    for (size_t key = 0; key < seen; key++) {
        double s = 0;
        for (size_t d = 0; d < n.D; d++)
            s += (double)a->q[((b * n.T + i) * n.HQ + h) * n.D + d] *
                 (double)a->k[((b * n.S + key) * n.HK + h / (n.HQ / n.HK)) * n.D + d];
        double e = exp(s / sqrt((double)n.D));
        sum += e;
        if (key == j) wanted = e;
    }
    return wanted / sum;
}

static void check_sdpa_statistics(ga_shape n, bool with_sink) {
    attention a = make_attention(n, with_sink, n.T + n.S);
    ga_real *received = reals(n.B * n.HQ * n.S), *entropy = reals(n.B * n.HQ * n.T);
    ga_sdpa_statistics(received, entropy, a.q, a.k, a.lse, n);
    for (size_t bh = 0; bh < n.B * n.HQ; bh++) {
        double *columns = (double *)calloc(n.S, sizeof *columns);
        assert_non_null(columns);
        for (size_t i = 0; i < n.T; i++) {
            double h = 0;
            for (size_t j = 0; j <= n.S - n.T + i; j++) {
                double p = probability(&a, bh / n.HQ, bh % n.HQ, i, j);
                columns[j] += p, h -= p > 0 ? p * log(p) : 0;
            }
            expect_near((double)entropy[bh * n.T + i], h, 2e-5, "entropy");
        }
        for (size_t j = 0; j < n.S; j++) expect_near((double)received[bh * n.S + j], columns[j], 2e-5, "received");
        free(columns);
    }
    free(received), free(entropy);
    free_attention(&a);
}

static void test_sdpa_statistics(void **state) {
    (void)state;
    check_sdpa_statistics((ga_shape){2, 7, 7, 4, 2, 6}, false);
    check_sdpa_statistics((ga_shape){1, 1, 1, 2, 1, 4}, false);
    check_sdpa_statistics((ga_shape){1, 65, 65, 2, 2, 10}, true);
    check_sdpa_statistics((ga_shape){1, 70, 133, 3, 1, 8}, false);
    check_sdpa_statistics((ga_shape){2, 3, 67, 2, 1, 60}, true);
}

static void test_magnitudes(void **state) {
    (void)state;
    enum { N = 77, W = 9, STRIDE = 13 };
    uint64_t random = 3;
    ga_real *x = normal_reals(N * STRIDE, 0.02, &random);
    ga_magnitude_sums sums = {0};
    ga_magnitude_statistics(&sums, x, STRIDE, 30, W, -0.5);
    ga_magnitude_statistics(&sums, x + 30 * STRIDE, STRIDE, N - 30, W, -0.5);
    double sum = 0, hundredth = 0, thousandth = 0;
    for (size_t n = 0; n < N; n++)
        for (size_t i = 0; i < W; i++) {
            double a = fabs(0.5 * (double)x[n * STRIDE + i]);
            sum += a, hundredth += a < 0.01, thousandth += a < 0.001;
        }
    assert_true(sums.count == N * W && hundredth > 0 && thousandth > 0 && thousandth < hundredth);
    assert_true(sums.below_1e_2 == hundredth && sums.below_1e_3 == thousandth);
    expect_near(sums.sum, sum, 1e-12, "sum of magnitudes");
    free(x);
}

static void test_maxima(void **state) {
    (void)state;
    static const size_t sizes[][2] = {{1, 1}, {1, 5}, {7, 1}, {33, 70}, {150, 17}};
    for (size_t i = 0; i < COUNT(sizes); i++) {
        size_t N = sizes[i][0], C = sizes[i][1];
        uint64_t random = i;
        ga_real *x = normal_reals(N * C, 1, &random), *rows = reals(N), *at = reals(N);
        double *columns = (double *)calloc(C, sizeof *columns);
        assert_non_null(columns);
        ga_max_abs_rows(rows, at, x, N, C);
        ga_max_abs_columns(columns, x, N, C);
        for (size_t n = 0; n < N; n++) {
            ga_real top = 0;
            for (size_t c = 0; c < C; c++) top = fmax(top, fabs((double)x[n * C + c]));
            assert_true(rows[n] == top && fabs((double)x[n * C + (size_t)at[n]]) == (double)top);
        }
        for (size_t c = 0; c < C; c++) {
            ga_real top = 0;
            for (size_t n = 0; n < N; n++) top = fmax(top, fabs((double)x[n * C + c]));
            assert_true(columns[c] == (double)top);
        }
        ga_max_abs_columns(columns, x, 1, C); /* no less than what was seen before */
        for (size_t n = 0; n < N; n++)
            for (size_t c = 0; c < C; c++) assert_true(columns[c] >= fabs((double)x[n * C + c]));
        /* NaN wins over infinity, wherever they stand */
        size_t n = N / 2, c = C / 2;
        x[n * C + C - 1] = -INFINITY, x[n * C + c] = NAN;
        if (N > 1) x[c] = INFINITY;
        ga_max_abs_rows(rows, at, x, N, C);
        ga_max_abs_columns(columns, x, N, C);
        assert_true(isnan(rows[n]) && at[n] == c && isnan(columns[c]));
        if (C > 2) assert_true(isinf(columns[C - 1]) && columns[C - 1] > 0 && (N == 1 || isinf(rows[0])));
        free(x), free(rows), free(at), free(columns);
    }
    /* the first of equal ones */
    ga_real x[] = {1, -3, 3, 2}, top, at;
    ga_max_abs_rows(&top, &at, x, 1, 4);
    assert_true(top == 3 && at == 1);
}

/* Two passes over three positions: the first of equal ones is kept, and NaN once it is there. */
static void test_peaks(void **state) {
    (void)state;
    const ga_real max[6] = {1, 5, 2, 3, 5, 4}, at[6] = {7, 8, 9, 10, 11, 12};
    const int32_t tokens[6] = {70, 80, 90, 100, 110, 120};
    double max_at[3] = {0};
    ga_peak peak = {0, 0, 0, -1};
    ga_keep_peaks(max_at, &peak, max, at, tokens, 6, 3);
    assert_true(max_at[0] == 3 && max_at[1] == 5 && max_at[2] == 4);
    assert_true(peak.value == 5 && peak.position == 1 && peak.dimension == 8 && peak.token == 80);
    const ga_real more[3] = {4, 5, NAN};
    ga_keep_peaks(max_at, &peak, more, at, tokens + 3, 3, 3);
    assert_true(max_at[0] == 4 && max_at[1] == 5 && isnan(max_at[2]));
    assert_true(isnan(peak.value) && peak.position == 2 && peak.dimension == 9 && peak.token == 120);
    ga_keep_peaks(max_at, &peak, max, at, tokens, 3, 3);
    assert_true(isnan(max_at[2]) && isnan(peak.value) && peak.token == 120);
    ga_peak nothing = {0, 0, 0, -1};
    const ga_real zero = 0, first = 2;
    ga_keep_peaks(max_at, &nothing, &zero, &first, tokens, 1, 1);
    assert_true(nothing.value == 0 && nothing.dimension == 2 && nothing.token == 70);
}

static void test_norms_and_moments(void **state) {
    (void)state;
    enum { N = 301, H = 3, D = 10 };
    uint64_t random = 8;
    ga_real *x = normal_reals(N * H * D, 2, &random), *norms = reals(N * H);
    double *moments = (double *)calloc(H * D * D, sizeof *moments);
    assert_non_null(moments);
    ga_row_norms(norms, x, N * H, D);
    for (size_t n = 0; n < N * H; n++) expect_near((double)norms[n], norm_of(x + n * D, D), 1e-6, "norm of a row");
    ga_head_moments(moments, x, 100, H, D);
    ga_head_moments(moments, x + 100 * H * D, N - 100, H, D);
    for (size_t h = 0; h < H; h++)
        for (size_t i = 0; i < D; i++)
            for (size_t j = 0; j < D; j++) {
                double sum = 0;
                for (size_t n = 0; n < N; n++) sum += (double)x[(n * H + h) * D + i] * (double)x[(n * H + h) * D + j];
                expect_near(moments[(h * D + i) * D + j], sum, 1e-12, "moment");
            }
    free(x), free(norms), free(moments);
}

static void test_scale_rows(void **state) {
    (void)state;
    enum { N = 5, W = 3, STRIDE = 7 };
    ga_real x[N * STRIDE];
    for (size_t i = 0; i < COUNT(x); i++) x[i] = (ga_real)i;
    x[STRIDE + 1] = NAN;
    ga_scale_rows(x, STRIDE, N, W, 0);
    for (size_t i = 0; i < COUNT(x); i++) assert_true(x[i] == (i % STRIDE < W ? 0 : (ga_real)i));
    ga_scale_rows(x + W, STRIDE, N, W, -2);
    for (size_t i = 0; i < COUNT(x); i++)
        assert_true(x[i] == (i % STRIDE < W ? 0 : i % STRIDE < 2 * W ? -2 * (ga_real)i : (ga_real)i));
}

/* ---- the same bits with any number of threads ---------------------------------------------------------------------- */

static void run_all(ga_real *out, const attention *a, const ga_real *x) {
    ga_shape n = a->n;
    ga_magnitude_sums sums = {0};
    ga_sdpa_statistics(out, out + 1000, a->q, a->k, a->lse, n);
    ga_magnitude_statistics(&sums, x, 50, 100, 41, 0.1);
    out[2000] = (ga_real)sums.sum, out[2001] = (ga_real)sums.below_1e_2, out[2002] = (ga_real)sums.below_1e_3;
    ga_max_abs_rows(out + 2100, out + 2300, x, 100, 50);
    memset(out + 2500, 0, 1500 * sizeof *out);
    ga_max_abs_columns((double *)(out + 2500), x, 100, 50);
    ga_row_norms(out + 2600, x, 100, 50);
    ga_head_moments((double *)(out + 2800), x, 100, 5, 10);
}

static void test_threads(void **state) {
    (void)state;
    enum { SIZE = 4000 };
    attention a = make_attention((ga_shape){2, 75, 75, 4, 2, 6}, true, 2);
    uint64_t random = 4;
    ga_real *x = normal_reals(5000, 1, &random), *one = reals(SIZE), *more = reals(SIZE);
    use_threads(1);
    run_all(one, &a, x);
    for (int threads = 2; threads <= 3; threads++) {
        use_threads(threads);
        run_all(more, &a, x);
        assert_memory_equal(one, more, SIZE * sizeof *one);
    }
    use_default_threads();
    free(x), free(one), free(more);
    free_attention(&a);
}

/* ---- against PyTorch ----------------------------------------------------------------------------------------------- */

static size_t heads_of_score(const ga_statistics *s) {
    return s->has_gate ? s->gate_heads : 0;
}

/* NAME (L, inner) against a figure of the statistics, each to `bound` of 1 or of itself */
#define COMPARE(f, name, inner, bound, expression)                                          \
    do {                                                                                    \
        const float *expected_ = floats(f, name, s->L * (inner));                           \
        for (size_t l = 0; l < s->L; l++)                                                   \
            for (size_t i = 0; i < (inner); i++)                                            \
                expect_near((expression), (double)expected_[l * (inner) + i], bound, name); \
    } while (0)

static void compare_streams(const fixture *f, const ga_statistics *s, size_t T, size_t C) {
    static const char *const names[] = {"attention_output", "attention_residual", "ffn_output", "ffn_residual"};
    char name[64];
    for (int stream = 0; stream < GA_STREAMS; stream++) {
#define OF(part) (snprintf(name, sizeof name, "%s.%s", names[stream], part), name)
        COMPARE(f, OF("max"), 1, tolerance, ga_activation_max(s, (ga_stream)stream, l));
        COMPARE(f, OF("max_at"), T, tolerance, ga_activation_max_at(s, (ga_stream)stream, l, i));
        COMPARE(f, OF("max_in"), C, tolerance, ga_activation_max_in(s, (ga_stream)stream, l, i));
        const int32_t *position = integers(f, OF("position"), s->L), *dimension = integers(f, OF("dimension"), s->L);
        const int32_t *token = integers(f, OF("token"), s->L);
        for (size_t l = 0; l < s->L; l++) {
            ga_peak peak = ga_activation_peak(s, (ga_stream)stream, l);
            assert_int_equal(peak.position, position[l]);
            assert_int_equal(peak.dimension, dimension[l]);
            assert_int_equal(peak.token, token[l]);
        }
#undef OF
    }
    COMPARE(f, "ffn_residual.max", 1, tolerance, ga_m_act(s, l));
}

static void compare_magnitudes(const fixture *f, const ga_statistics *s) {
    static const char *const names[] = {"before", "after", "mean_gate"};
    char name[64];
    for (int stage = 0; stage < GA_STAGES; stage++) {
        size_t n;
        snprintf(name, sizeof name, "%s.magnitude", names[stage]);
        if (!find_values(f, name, "F32", &n)) {
            assert_true(isnan(ga_output_magnitude(s, (ga_stage)stage, 0)));
            assert_true(isnan(ga_output_below(s, (ga_stage)stage, GA_ALL, 1e-2)));
            continue;
        }
        COMPARE(f, name, 1, tolerance, ga_output_magnitude(s, (ga_stage)stage, l));
        snprintf(name, sizeof name, "%s.below_0.01", names[stage]);
        COMPARE(f, name, 1, 1e-6, ga_output_below(s, (ga_stage)stage, l, 1e-2));
        snprintf(name, sizeof name, "%s.below_0.001", names[stage]);
        COMPARE(f, name, 1, 1e-6, ga_output_below(s, (ga_stage)stage, l, 1e-3));
    }
    assert_true(isnan(ga_output_below(s, GA_BEFORE_GATE, 0, 0.1)));
}

static void compare_details(const fixture *f, const ga_statistics *s, const ga_sizes *z, size_t T) {
    size_t HQ = z->HQ, HK = z->HK, GH = heads_of_score(s);
    COMPARE(f, "received", HQ * T, tolerance, ga_attention_received(s, l, i / T, i % T));
    COMPARE(f, "entropy", HQ, tolerance, ga_attention_entropy(s, l, i));
    COMPARE(f, "value_norm", HK * T, tolerance, ga_value_norm(s, l, i / T, i % T));
    COMPARE(f, "key_norm", HK * T, tolerance, ga_key_norm(s, l, i / T, i % T));
    compare_streams(f, s, T, z->C);
    compare_magnitudes(f, s);
    if (GH > 0) {
        COMPARE(f, "gate_mean_by_head", GH, tolerance, ga_gate_mean_head(s, l, i));
        COMPARE(f, "gate_std_by_head", GH, tolerance, ga_gate_std_head(s, l, i));
        COMPARE(f, "gate_min_by_head", GH, tolerance, ga_gate_min_head(s, l, i));
        COMPARE(f, "gate_max_by_head", GH, tolerance, ga_gate_max_head(s, l, i));
    }
}

static void compare_ranks(const fixture *f, const ga_statistics *s) {
    size_t n;
    COMPARE(f, "rank.weights", s->HQ, tolerance, ga_effective_rank(s, GA_RANK_WEIGHTS, l, i));
    COMPARE(f, "rank.before", s->HQ, tolerance, ga_effective_rank(s, GA_RANK_BEFORE, l, i));
    if (find_values(f, "rank.after", "F32", &n))
        COMPARE(f, "rank.after", s->HQ, tolerance, ga_effective_rank(s, GA_RANK_AFTER, l, i));
    else
        assert_true(isnan(ga_effective_rank(s, GA_RANK_AFTER, 0, 0)));
}

/* What follows from the parts, whatever they are. */
static void check_totals(const ga_statistics *s, size_t HK, size_t T) {
    double received = 0, drain = 0, others = 0;
    size_t sinks = 0;
    for (size_t l = 0; l < s->L; l++)
        for (size_t h = 0; h < s->HQ; h++) {
            expect_near(ga_attention_received(s, l, h, 0), ga_f_attn_head(s, l, h), 1e-6, "F-Attn, received");
            sinks += ga_f_attn_head(s, l, h) > 0.3;
            size_t top = ga_sink_position(s, l, h);
            assert_true(top == 0 || top < (T + 1) / 2);
            for (size_t j = 0; j < (T + 1) / 2; j++)
                assert_true(ga_attention_received(s, l, h, j) <= ga_attention_received(s, l, h, top));
        }
    expect_near(ga_sink_heads(s, GA_ALL, 0.3), (double)sinks / (double)(s->L * s->HQ), 1e-12, "heads with a sink");
    for (size_t j = 0; j < T; j++) received += ga_attention_received(s, 0, GA_ALL, j) * (double)(T - j) / (double)T;
    expect_near(received + (s->has_sink ? ga_sink_share(s, 0) : 0), 1, 1e-5, "all attention");
    for (size_t h = 0; h < HK; h++) {
        drain += ga_value_norm(s, 1, h, 0);
        for (size_t j = 1; j < T; j++) others += ga_value_norm(s, 1, h, j) / (double)(T - 1);
    }
    if (T > 1) expect_near(ga_value_drain(s, 1), drain / others, 1e-6, "value drain");
}

static ga_model *fixture_model(const fixture *f, ga_device *device, ga_mode mode, size_t *B, size_t *T) {
    ga_config c = read_config(f, B, T);
    *device = fixture_device();
    ga_error e;
    ga_model *m = ga_create(&c, device, mode, &e);
    if (!m) fail_msg("ga_create: %s", e.text);
    load_weights(m, f);
    return m;
}

static fixture read_named(const char *folder, const char *name) {
    char path[256];
    snprintf(path, sizeof path, "tests/fixtures/%s%s.safetensors", folder, name);
    return read_fixture(path);
}

static void test_details(void **state) {
    const char *name = (const char *)*state;
    fixture f = read_named("", name), expected = read_named("analysis/", name);
    size_t B = 0, T = 0;
    ga_device device;
    ga_error e;
    for (int mode = GA_TRAINING; mode <= GA_INFERENCE; mode++) {
        ga_model *m = fixture_model(&f, &device, (ga_mode)mode, &B, &T);
        const int32_t *tokens = integers(&f, "tokens", B * T), *targets = integers(&f, "targets", B * T);
        ga_statistics *s = ga_statistics_create_detailed(m);
        assert_non_null(s);
        assert_true(isnan(ga_effective_rank(s, GA_RANK_WEIGHTS, 0, 0)));
        ga_observer observer = {.statistics = s};
        if (mode == GA_TRAINING)
            expect_ok(ga_forward_backward(m, tokens, targets, B, T, 1, &observer, NULL, &e), &e);
        else
            expect_ok(ga_forward(m, tokens, NULL, B, T, &observer, NULL, &e), &e);
        compare_details(&expected, s, &m->sizes, T);
        expect_ok(ga_measure_ranks(s, m, &e), &e);
        compare_ranks(&expected, s);
        check_totals(s, m->sizes.HK, T);
        /* Window by window the same, but for the mean score, which is that of a pass. */
        ga_statistics_reset(s);
        assert_true(isnan(ga_output_magnitude(s, GA_BEFORE_GATE, GA_ALL)) && isnan(ga_value_norm(s, 0, 0, 0)));
        assert_int_equal(ga_activation_peak(s, GA_FFN_RESIDUAL, 0).token, -1);
        for (size_t b = 0; b < B; b++) expect_ok(ga_forward(m, tokens + b * T, NULL, 1, T, &observer, NULL, &e), &e);
        expect_ok(ga_measure_ranks(s, m, &e), &e);
        compare_ranks(&expected, s);
        check_totals(s, m->sizes.HK, T);
        compare_streams(&expected, s, T, m->sizes.C);
        ga_statistics_destroy(s);
        ga_destroy(m);
        if (getenv("GA_ISA")) ga_device_x86_destroy(&device);
    }
    free_fixture(&f);
    free_fixture(&expected);
}

/* Without details nothing of them is there, and what is there is the same. */
static void test_without_details(void **state) {
    (void)state;
    fixture f = read_named("", "g1_headwise");
    size_t B = 0, T = 0;
    ga_device device;
    ga_error e;
    ga_model *m = fixture_model(&f, &device, GA_INFERENCE, &B, &T);
    const int32_t *tokens = integers(&f, "tokens", B * T);
    ga_statistics *plain = ga_statistics_create(m), *full = ga_statistics_create_detailed(m);
    ga_observer observers[] = {{.statistics = plain}, {.statistics = full}};
    for (size_t i = 0; i < 2; i++) expect_ok(ga_forward(m, tokens, NULL, B, T, &observers[i], NULL, &e), &e);
    assert_false(plain->has_details);
    assert_true(ga_f_attn(plain, GA_ALL) == ga_f_attn(full, GA_ALL) && ga_m_act(plain, 1) == ga_m_act(full, 1));
    assert_true(ga_gate_mean(plain, 0) == ga_gate_mean(full, 0));
    assert_true(isnan(ga_output_magnitude(plain, GA_BEFORE_GATE, 0)) && isnan(ga_attention_entropy(plain, 0, 0)));
    assert_true(isnan(ga_attention_received(plain, 0, 0, 0)) && isnan(ga_value_drain(plain, 0)));
    assert_true(isnan(ga_activation_max(plain, GA_FFN_OUTPUT, 0)) &&
                isnan(ga_effective_rank(plain, GA_RANK_BEFORE, 0, 0)));
    assert_int_equal(ga_measure_ranks(plain, m, &e), GA_ERR_INPUT);
    ga_statistics_destroy(plain), ga_statistics_destroy(full);
    ga_destroy(m);
    if (getenv("GA_ISA")) ga_device_x86_destroy(&device);
    free_fixture(&f);
}

/* Mixtures and switch heads, which have their own paths through the layer. */
static void test_other_models(void **state) {
    (void)state;
    static const char *const settings[] = {
        "n_experts=4 experts_per_token=2 gate_position=G1",
        "switch_heads=v switch_experts=2 switch_top_k=1 gate_position=G1 gate_type=headwise",
        "switch_heads=kv switch_experts=4 switch_top_k=2 gate_position=none",
        "switch_heads=v switch_experts=2 switch_top_k=1 gate_position=G3",
    };
    enum { B = 2, T = 13 };
    for (size_t i = 0; i < COUNT(settings); i++) {
        ga_config c = ga_config_default();
        configure(&c, "vocab_size=19 d_model=12 n_layers=2 n_heads=4 n_kv_heads=2 head_dim=6 d_ff=10 max_seq_len=13 "
                      "batch_size=2");
        configure(&c, settings[i]);
        ga_model *m = create(&c, GA_INFERENCE);
        randomise_weights(m, 3);
        ga_statistics *s = ga_statistics_create_detailed(m);
        uint64_t random = 6;
        int32_t tokens[B * T];
        fill_tokens(tokens, B * T, 19, &random);
        ga_observer observer = {.statistics = s};
        ga_error e;
        double loss, without;
        expect_ok(ga_forward(m, tokens, tokens, B, T, &observer, &loss, &e), &e);
        expect_ok(ga_measure_ranks(s, m, &e), &e);
        check_totals(s, 2, T);
        for (size_t l = 0; l < 2; l++) {
            expect_near(ga_activation_max(s, GA_FFN_RESIDUAL, l), ga_m_act(s, l), 1e-12, "residual");
            assert_true(ga_activation_max(s, GA_FFN_OUTPUT, l) > 0);
            assert_true(isnan(ga_effective_rank(s, GA_RANK_WEIGHTS, l, 0)) == (c.switch_heads != GA_SWITCH_NONE));
            assert_true(ga_effective_rank(s, GA_RANK_BEFORE, l, 0) >= 1);
            assert_true(ga_output_magnitude(s, GA_BEFORE_GATE, l) > 0);
        }
        for (int kind = GA_SILENCE_HEAD; kind <= GA_REMOVE_VALUE; kind++) {
            ga_intervention change = {(ga_intervention_kind)kind, 1, 2, 0, NULL};
            expect_ok(ga_forward_with(m, &change, tokens, tokens, B, T, NULL, &without, &e), &e);
            assert_true(fabs(without - loss) > 1e-6);
        }
        ga_statistics_destroy(s);
        ga_destroy(m);
    }
}

/* ---- interventions ------------------------------------------------------------------------------------------------- */

static void compare_intervention(ga_model *m, const fixture *inputs, const fixture *expected, const char *name,
                                 const ga_intervention *change, size_t B, size_t T) {
    const int32_t *tokens = integers(inputs, "tokens", B * T), *targets = integers(inputs, "targets", B * T);
    char entry[64];
    double loss = 0, plain = floats(inputs, "loss", 1)[0];
    size_t n;
    ga_error e;
    snprintf(entry, sizeof entry, "loss.%s", name);
    ga_result result = ga_forward_with(m, change, tokens, targets, B, T, NULL, &loss, &e);
    if (!find_values(expected, entry, "F32", &n)) {
        assert_int_equal(result, GA_ERR_INPUT);
        return;
    }
    expect_ok(result, &e);
    double wanted = floats(expected, entry, 1)[0];
    expect_below(fabs(loss - wanted) / wanted, tolerance, "loss with %s %.9g, PyTorch %.9g", name, loss, wanted);
    /* QK-norm undoes one factor for a whole head, and a mean in the place of equal scores changes nothing. */
    bool at_norm = m->gate.position == GA_G3 || m->gate.position == GA_G4;
    bool same = change->kind <= GA_SCALE_GATE && (at_norm || m->gate.input == GA_INPUT_SCALAR);
    if (T > 1 && !same) assert_true(fabs(wanted - plain) > 1e-4);
    expect_ok(ga_forward(m, tokens, targets, B, T, NULL, &loss, &e), &e); /* nothing of it stays */
    expect_below(fabs(loss - plain) / plain, tolerance, "loss after %s", name);
}

static void test_interventions(void **state) {
    const char *name = (const char *)*state;
    fixture f = read_named("", name), expected = read_named("analysis/", name);
    size_t B = 0, T = 0;
    ga_device device;
    ga_error e;
    for (int mode = GA_TRAINING; mode <= GA_INFERENCE; mode++) {
        ga_model *m = fixture_model(&f, &device, (ga_mode)mode, &B, &T);
        ga_statistics *s = ga_statistics_create(m);
        ga_observer observer = {.statistics = s};
        expect_ok(ga_forward(m, integers(&f, "tokens", B * T), NULL, B, T, &observer, NULL, &e), &e);
        double means[8] = {0};
        for (size_t l = 0; l < s->L; l++) means[l] = ga_gate_mean(s, l);
        const struct {
            const char *name;
            ga_intervention change;
        } cases[] = {
            {"gate_mean", {GA_SET_GATE, GA_ALL, GA_ALL, 0, means}},
            {"gate_one", {GA_SET_GATE, GA_ALL, GA_ALL, 1, NULL}},
            {"gate_half", {GA_SCALE_GATE, GA_ALL, GA_ALL, 0.5, NULL}},
            {"silent_layer0", {GA_SILENCE_HEAD, 0, m->sizes.HQ - 1, 0, NULL}},
            {"silent_all", {GA_SILENCE_HEAD, GA_ALL, GA_ALL, 0, NULL}},
            {"key", {GA_REMOVE_KEY, GA_ALL, GA_ALL, 0, NULL}},
            {"value", {GA_REMOVE_VALUE, GA_ALL, GA_ALL, 0, NULL}},
            {"value_layer1", {GA_REMOVE_VALUE, 1, GA_ALL, 0, NULL}},
        };
        for (size_t i = 0; i < COUNT(cases); i++)
            compare_intervention(m, &f, &expected, cases[i].name, &cases[i].change, B, T);
        ga_intervention nowhere = {GA_SILENCE_HEAD, 0, m->sizes.HQ, 0, NULL};
        assert_int_equal(ga_forward_with(m, &nowhere, NULL, NULL, B, T, NULL, NULL, &e), GA_ERR_INPUT);
        nowhere.layer = m->sizes.L, nowhere.head = 0;
        assert_int_equal(ga_forward_with(m, &nowhere, NULL, NULL, B, T, NULL, NULL, &e), GA_ERR_INPUT);
        ga_statistics_destroy(s);
        ga_destroy(m);
        if (getenv("GA_ISA")) ga_device_x86_destroy(&device);
    }
    free_fixture(&f);
    free_fixture(&expected);
}

/* ---- effective rank ------------------------------------------------------------------------------------------------ */

/* Weights whose W_V W_O has known singular values: one direction of rank 1, then r equal ones. */
static void test_known_ranks(void **state) {
    (void)state;
    ga_config c = ga_config_default();
    configure(&c, "vocab_size=11 d_model=12 n_layers=1 n_heads=2 n_kv_heads=1 head_dim=6 d_ff=8 max_seq_len=4 "
                  "gate_position=none");
    ga_model *m = create(&c, GA_INFERENCE);
    const ga_tensor *v = ga_find_tensor(m, GA_TENSOR_value, 0), *o = ga_find_tensor(m, GA_TENSOR_attn_output, 0);
    ga_statistics *s = ga_statistics_create_detailed(m);
    ga_error e;
    for (size_t r = 1; r <= 6; r++) {
        memset(m->weights + v->offset, 0, 6 * 12 * sizeof(ga_real));
        memset(m->weights + o->offset, 0, 12 * 12 * sizeof(ga_real));
        for (size_t i = 0; i < r; i++) m->weights[v->offset + i * 12 + i] = 2;
        for (size_t i = 0; i < 6; i++) m->weights[o->offset + i * 12 + i] = 3;        /* head 0: all equal */
        for (size_t i = 0; i < 6; i++) m->weights[o->offset + (11 - i) * 12 + 6] = 1; /* head 1: rank 1 */
        expect_ok(ga_measure_ranks(s, m, &e), &e);
        expect_near(ga_effective_rank(s, GA_RANK_WEIGHTS, 0, 0), (double)r, 1e-9, "effective rank of equal values");
        expect_near(ga_effective_rank(s, GA_RANK_WEIGHTS, 0, 1), 1, 1e-6, "effective rank 1");
    }
    m->weights[v->offset] = 6; /* singular values 3 : 1 : 1 : 1 : 1 : 1 */
    expect_ok(ga_measure_ranks(s, m, &e), &e);
    double entropy = -(3. / 8 * log(3. / 8) + 5. / 8 * log(1. / 8));
    expect_near(ga_effective_rank(s, GA_RANK_WEIGHTS, 0, 0), exp(entropy), 1e-9, "effective rank");
    memset(m->weights + v->offset, 0, 6 * 12 * sizeof(ga_real));
    expect_ok(ga_measure_ranks(s, m, &e), &e);
    assert_true(isnan(ga_effective_rank(s, GA_RANK_WEIGHTS, 0, 0)));
    ga_statistics_destroy(s);
    ga_destroy(m);
}

static void test_entropy_uniform(void **state) {
    (void)state;
    expect_near(ga_entropy_uniform(1), 0, 1e-15, "entropy of one key");
    expect_near(ga_entropy_uniform(3), (log(2) + log(3)) / 3, 1e-15, "entropy of even attention");
}

/* -------------------------------------------------------------------------------------------------------------------- */

static char *analysed[] = {"baseline",
                           "g1_elementwise",
                           "g1_headwise",
                           "g2_elementwise",
                           "g3_headwise",
                           "g4_shared",
                           "g1_headwise_shared",
                           "g1_additive_silu",
                           "self_rmsnorm",
                           "g1_scalar",
                           "g5_clip_sandwich_tied",
                           "clip",
                           "gqa_1",
                           "no_qk_norm",
                           "one_position",
                           "long",
                           "sink_learned_g1",
                           "g2_input_independent_headwise"};

int main(int argc, char **argv) {
    enum { PLAIN = 10 };
    struct CMUnitTest tests[PLAIN + 2 * COUNT(analysed)] = {
        cmocka_unit_test(test_sdpa_statistics),
        cmocka_unit_test(test_magnitudes),
        cmocka_unit_test(test_peaks),
        cmocka_unit_test(test_maxima),
        cmocka_unit_test(test_norms_and_moments),
        cmocka_unit_test(test_scale_rows),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_without_details),
        cmocka_unit_test(test_known_ranks),
        cmocka_unit_test(test_entropy_uniform),
        cmocka_unit_test(test_other_models),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    use_default_threads();
    for (size_t i = 0; i < COUNT(analysed); i++) {
        static char names[COUNT(analysed)][64];
        snprintf(names[i], sizeof names[i], "interventions_%s", analysed[i]);
        tests[PLAIN + 2 * i] = (struct CMUnitTest){analysed[i], test_details, NULL, NULL, analysed[i]};
        tests[PLAIN + 2 * i + 1] = (struct CMUnitTest){names[i], test_interventions, NULL, NULL, analysed[i]};
    }
    return _cmocka_run_group_tests("analysis", tests, COUNT(tests), NULL, NULL);
}
