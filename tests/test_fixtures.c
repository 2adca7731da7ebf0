/* Against PyTorch: every tests/fixtures/NAME.safetensors holds a tiny model, a batch, and what Hugging Face's Qwen3
 * with the gate made of them (tests/reference/make_fixtures.py). Logits, loss and each gradient tensor to 1e-5, norm of
 * the difference over norm; the metrics of section 4.2 from full attention matrices and hidden states.
 *
 *     [GA_ISA=c|avx2|avx512|...] test_fixtures [PATTERN [DIRECTORY]]     default: plain C, all in tests/fixtures
 */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"
#include "../gated_attention_x86.h"
#include "testing.h"
#include "fixture.h"
#include <dirent.h>

enum { FEWEST_FIXTURES = 30 };

static const double tolerance = 1e-5;

/* ---- comparison ---------------------------------------------------------------------------------------------------- */

static double relative(const ga_real *a, const float *b, size_t n) {
    double error = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        error += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    return sqrt(error / size);
}

static double float_norm(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sqrt(sum);
}

static void compare_gradients(const ga_model *m, const fixture *f, double *worst) {
    double all = 0;
    for (size_t i = 0; i < m->n_tensors; i++) {
        const ga_tensor *t = &m->tensors[i];
        all = hypot(all, float_norm(of_tensor(f, "grad", t), t->rows * t->columns));
    }
    assert_true(all > 0.01);
    for (size_t i = 0; i < m->n_tensors; i++) {
        const ga_tensor *t = &m->tensors[i];
        const ga_real *a = m->gradients + t->offset;
        const float *b = of_tensor(f, "grad", t);
        size_t n = t->rows * t->columns;
        /* zero but for rounding, as that of the query when there is one position */
        if (float_norm(b, n) < 1e-6 * all) {
            expect_below(norm_of(a, n), 1e-6 * all, "gradient of %s, zero in PyTorch", t->name);
            continue;
        }
        /* One number for a whole layer is a sum over all positions and channels that nearly cancels: PyTorch's own
         * float32 and float64 differ by 2e-5 there. */
        double error = relative(a, b, n);
        expect_below(error, n > 1 ? tolerance : 1e-4, "gradient of %s", t->name);
        if (n > 1) *worst = fmax(*worst, error);
    }
}

/* ga_* against NAME, a value for each layer; all layers together are the mean of the layers, or `all`. */
static void compare_metric(const fixture *f, const char *name, double (*metric)(const ga_statistics *, size_t),
                           const ga_statistics *s) {
    const float *expected = floats(f, name, s->L);
    for (size_t i = 0; i < s->L; i++) {
        double value = metric(s, i);
        if (!(fabs(value - expected[i]) <= tolerance * fmax(0.1, fabs(expected[i]))))
            fail_msg("%s, layer %zu: %.9g, PyTorch %.9g", name, i, value, expected[i]);
    }
}

static double gate_below_01(const ga_statistics *s, size_t layer) {
    return ga_gate_below(s, layer, 0.1);
}
static double gate_below_05(const ga_statistics *s, size_t layer) {
    return ga_gate_below(s, layer, 0.5);
}

static void compare_heads(const fixture *f, const ga_statistics *s) {
    const float *expected = floats(f, "f_attn_by_head", s->L * s->HQ);
    for (size_t i = 0; i < s->L * s->HQ; i++)
        expect_near(ga_f_attn_head(s, i / s->HQ, i % s->HQ), expected[i], tolerance, "f_attn of a head");
}

/* The 50 bins have edges at 0.1 and 0.5, where PyTorch counted. */
static void compare_histogram(const fixture *f, const ga_statistics *s) {
    const float *below_01 = floats(f, "gate_below_0.1_by_layer", s->L);
    const float *below_05 = floats(f, "gate_below_0.5_by_layer", s->L);
    for (size_t layer = 0; layer < s->L; layer++) {
        double shares[GA_BINS], sum = 0, low = 0, half = 0;
        ga_gate_histogram(s, layer, shares);
        for (size_t i = 0; i < GA_BINS; i++) {
            assert_true(shares[i] >= 0);
            if (i < GA_BINS / 10) low += shares[i];
            if (i < GA_BINS / 2) half += shares[i];
            sum += shares[i];
        }
        expect_near(sum, 1, 1e-12, "sum of the histogram");
        expect_near(low, below_01[layer], tolerance, "histogram below 0.1");
        expect_near(half, below_05[layer], tolerance, "histogram below 0.5");
    }
}

static double mean_over_layers(double (*metric)(const ga_statistics *, size_t), const ga_statistics *s) {
    double sum = 0;
    for (size_t i = 0; i < s->L; i++) sum += metric(s, i) / (double)s->L;
    return sum;
}

static void compare_metrics(const fixture *f, const ga_statistics *s) {
    compare_metric(f, "f_attn_by_layer", ga_f_attn, s);
    compare_metric(f, "max_act_by_layer", ga_m_act, s);
    if (s->has_sink)
        compare_metric(f, "sink_share_by_layer", ga_sink_share, s);
    else
        assert_true(isnan(ga_sink_share(s, GA_ALL)));
    compare_heads(f, s);
    expect_near(ga_f_attn(s, GA_ALL), mean_over_layers(ga_f_attn, s), 1e-12, "f_attn of all layers");
    expect_near(ga_m_act(s, GA_ALL), mean_over_layers(ga_m_act, s), 1e-12, "m_act of all layers");
    size_t n;
    if (!find_values(f, "gate_mean_by_layer", "F32", &n)) {
        assert_true(isnan(ga_gate_mean(s, GA_ALL)));
        return;
    }
    compare_metric(f, "gate_mean_by_layer", ga_gate_mean, s);
    compare_metric(f, "gate_std_by_layer", ga_gate_std, s);
    compare_metric(f, "gate_min_by_layer", ga_gate_min, s);
    compare_metric(f, "gate_max_by_layer", ga_gate_max, s);
    compare_metric(f, "gate_below_0.1_by_layer", gate_below_01, s);
    compare_metric(f, "gate_below_0.5_by_layer", gate_below_05, s);
    compare_histogram(f, s);
    expect_near(ga_gate_mean(s, GA_ALL), mean_over_layers(ga_gate_mean, s), 1e-6, "gate mean of all layers");
    assert_true(isnan(ga_gate_below(s, 0, 0.3)));
}

/* What the routers did with the batch: as the training loop asks for it, and as the analysis does. */
static void compare_routing(ga_model *m, const fixture *f, const ga_statistics *s) {
    size_t L = m->sizes.L, E = m->sizes.E;
    const int32_t *rows = integers(f, "expert_rows", L * E);
    const float *balance = floats(f, "load_balance_by_layer", L), *z_loss = floats(f, "router_z_by_layer", L);
    for (size_t l = 0; l < L; l++) {
        ga_routing r = ga_routing_of(m, l);
        double most = 0, all = 0;
        for (size_t i = 0; i < E; i++) {
            expect_near(ga_expert_rows(s, l, i), rows[l * E + i], 0, "rows of an expert");
            most = fmax(most, rows[l * E + i]), all += rows[l * E + i];
        }
        expect_near(r.load_balance, balance[l], tolerance, "load-balancing loss of the whole batch");
        expect_near(r.router_z, z_loss[l], tolerance, "z-loss");
        expect_near(r.max_load, most * (double)E / all, 1e-12, "largest load");
        expect_near(ga_expert_max_load(s, l), r.max_load, 1e-12, "largest load, observed");
    }
}

/* `head` GA_ALL: the mean over heads. attention (B, HQ, T, T) */
static void compare_map(const ga_map *map, const float *attention, size_t B, size_t HQ) {
    size_t T = map->T, first = map->head == GA_ALL ? 0 : map->head, last = map->head == GA_ALL ? HQ : map->head + 1;
    expect_near(map->windows, (double)B, 0, "windows of a map");
    for (size_t i = 0; i < T * T; i++) {
        double expected = 0;
        for (size_t b = 0; b < B; b++)
            for (size_t h = first; h < last; h++) expected += attention[(b * HQ + h) * T * T + i];
        expected /= (double)(B * (last - first));
        double p = map->p[i] / map->windows;
        if (!(fabs(p - expected) < tolerance))
            fail_msg("attention map, query %zu, key %zu: %.9g, PyTorch %.9g", i / T, i % T, p, expected);
    }
}

static void compare_logits(ga_model *m, const fixture *f, size_t rows) {
    size_t V = m->sizes.V;
    ga_real *logits = reals(rows * V);
    ga_error e;
    expect_ok(ga_logits(m, 0, rows, logits, &e), &e);
    const float *expected = floats(f, "logits", rows * V);
    expect_below(relative(logits, expected, rows * V), tolerance, "logits");
    /* a slice from the middle is the same numbers */
    size_t first = rows / 2;
    expect_ok(ga_logits(m, first, rows - first, logits, &e), &e);
    expect_below(relative(logits, expected + first * V, (rows - first) * V), tolerance, "logits from the middle on");
    free(logits);
}

/* ---- the test, once for each file ---------------------------------------------------------------------------------- */

static void test_fixture(void **state) {
    fixture f = read_fixture((const char *)*state);
    size_t B = 0, T = 0;
    ga_config c = read_config(&f, &B, &T);
    ga_device device = fixture_device();
    ga_error e;
    ga_model *m = ga_create(&c, &device, GA_TRAINING, &e);
    if (!m) fail_msg("ga_create: %s", e.text);
    load_weights(m, &f);
    const int32_t *tokens = integers(&f, "tokens", B * T), *targets = integers(&f, "targets", B * T);

    size_t last_head = m->sizes.HQ - 1;
    ga_map maps[] = {{0, GA_ALL, T, NULL, 0}, {0, last_head, T, NULL, 0}};
    for (size_t i = 0; i < COUNT(maps); i++) assert_non_null(maps[i].p = (double *)calloc(T * T, sizeof(double)));
    ga_statistics *s = ga_statistics_create(m);
    assert_non_null(s);
    ga_observer observer = {s, maps, COUNT(maps)};

    double loss = 0, worst = 0;
    size_t parts = m->sizes.E > 0 ? c.gradient_accumulation_steps : 1; /* only routers see more than one micro-batch */
    for (size_t k = 0; k < parts; k++) {
        size_t at = k * B / parts * T;
        double part = NAN;
        expect_ok(
            ga_forward_backward(m, tokens + at, targets + at, B / parts, T, 1 / (double)parts, &observer, &part, &e),
            &e);
        loss += part / (double)parts;
    }
    double expected = floats(&f, "loss", 1)[0];
    expect_below(fabs(loss - expected) / expected, tolerance, "loss %.9g, PyTorch %.9g", loss, expected);
    compare_gradients(m, &f, &worst);
    compare_metrics(&f, s);
    if (m->sizes.E > 0) compare_routing(m, &f, s);
    for (size_t i = 0; i < COUNT(maps); i++)
        compare_map(&maps[i], floats(&f, "attention_layer0", B * m->sizes.HQ * T * T), B, m->sizes.HQ);
    expect_ok(ga_forward(m, tokens, NULL, B, T, NULL, NULL, &e), &e);
    compare_logits(m, &f, B * T);
    print_message("    loss off by %.1e, the worst gradient by %.1e\n", fabs(loss - expected) / expected, worst);

    for (size_t i = 0; i < COUNT(maps); i++) free(maps[i].p);
    ga_statistics_destroy(s);
    ga_destroy(m);
    if (getenv("GA_ISA")) ga_device_x86_destroy(&device);
    free_fixture(&f);
}

/* ---- the list of files --------------------------------------------------------------------------------------------- */

static int by_name(const void *a, const void *b) {
    return strcmp(((const struct CMUnitTest *)a)->name, ((const struct CMUnitTest *)b)->name);
}

static char *joined(const char *directory, const char *name) {
    size_t size = strlen(directory) + strlen(name) + 2;
    char *path = (char *)malloc(size);
    if (path) snprintf(path, size, "%s/%s", directory, name);
    return path;
}

int main(int argc, char **argv) {
    enum { MOST_FIXTURES = 256 };
    static struct CMUnitTest tests[MOST_FIXTURES];
    const char *path = argc > 2 ? argv[2] : "tests/fixtures";
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    use_default_threads();
    DIR *directory = opendir(path);
    size_t n = 0;
    for (struct dirent *entry; directory && n < MOST_FIXTURES && (entry = readdir(directory));) {
        const char *end = strrchr(entry->d_name, '.');
        if (!end || strcmp(end, ".safetensors") != 0) continue;
        char *file = joined(path, entry->d_name);
        if (!file) return 1;
        tests[n++] = (struct CMUnitTest){strrchr(file, '/') + 1, test_fixture, NULL, NULL, file};
    }
    if (directory) closedir(directory);
    if (n < FEWEST_FIXTURES) {
        fprintf(stderr, "%s: %zu fixtures, there should be at least %d\n", path, n, FEWEST_FIXTURES);
        return 1;
    }
    qsort(tests, n, sizeof tests[0], by_name);
    int failed = _cmocka_run_group_tests("fixtures", tests, n, NULL, NULL);
    for (size_t i = 0; i < n; i++) free(tests[i].initial_state);
    return failed;
}
