/* Data parallel training (ga_ranks): any number of ranks, here threads of one process, computes what one rank does, in
 * double so that nothing but the order of additions differs; checkpoints, statistics, refusals. */
#define _POSIX_C_SOURCE 200809L
#define GA_DOUBLE
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"
#include "testing.h"
#include "ranks.h"

enum { STEPS = 3, MICRO_BATCHES = 12, B = 2, T = 7 };

static const double tolerance = 1e-10;

static ga_config config_of(const char *settings) {
    ga_config c = ga_config_default();
    configure(&c,
              "vocab_size=37 d_model=11 n_layers=3 n_heads=4 n_kv_heads=2 head_dim=4 d_ff=9 batch_size=2 max_seq_len=7 "
              "warmup_steps=2 learning_rate=0.01 grad_clip=0.5 weight_decay=0.2 init_std=0.3 gate_init_std=0.3");
    configure(&c, settings);
    return c;
}

/* What a run of a few steps leaves; on each rank. */
typedef struct {
    ga_config config;
    const char *load, *save; /* or NULL */
    bool early;              /* exchanges begin in the backward pass */
    double losses[STEPS], norms[STEPS];
    ga_routing routing[STEPS];
    size_t n, moments;
    ga_real *weights, *moment1, *moment2;
    ga_result result;
    ga_error e;
} training;

static ga_real *copy_of(const ga_real *x, size_t n) {
    ga_real *y = (ga_real *)malloc(n * sizeof *y);
    if (!y) abort();
    memcpy(y, x, n * sizeof *y);
    return y;
}

static void free_training(training *t) {
    free(t->weights), free(t->moment1), free(t->moment2);
    t->weights = t->moment1 = t->moment2 = NULL;
}

static ga_result take_step(training *t, ga_model *m, const ga_ranks *ranks, uint64_t first, size_t step) {
    size_t count = ranks ? ranks->count : 1, rank = ranks ? ranks->rank : 0;
    for (size_t k = rank; k < MICRO_BATCHES; k += count) {
        int32_t tokens[B * T], targets[B * T];
        uint64_t random = (first + step) * 1000 + k;
        fill_tokens(tokens, B * T, m->sizes.V, &random);
        fill_tokens(targets, B * T, m->sizes.V, &random);
        m->last_of_step = t->early && k + count >= MICRO_BATCHES;
        ga_result result = ga_forward_backward(m, tokens, targets, B, T, 1.0 / MICRO_BATCHES, NULL, NULL, &t->e);
        if (result != GA_OK) return result;
    }
    ga_result result = ga_batch_loss(m, &t->losses[step], &t->e);
    if (result != GA_OK) return result;
    t->routing[step] = ga_routing_of(m, GA_ALL);
    return ga_update(m, ga_learning_rate(&t->config, first + step, 20), &t->norms[step], &t->e);
}

static void train(void *context, const ga_ranks *ranks) {
    training *t = (training *)context;
    ga_device device = ga_device_cpu();
    device.ranks = ranks;
    ga_training_state state = {0, 0, 0, 0, 0};
    ga_model *m = ga_create(&t->config, &device, GA_TRAINING, &t->e);
    t->result = m ? GA_OK : t->e.result;
    if (!m) return;
    if (t->load) t->result = ga_load(m, t->load, &state, &t->e);
    for (size_t s = 0; s < STEPS && t->result == GA_OK; s++) t->result = take_step(t, m, ranks, state.step, s);
    state.step += STEPS;
    if (t->save && t->result == GA_OK) t->result = ga_save(m, t->save, &state, &t->e);
    t->n = m->n_weights;
    t->moments = m->buckets[m->n_buckets] / (ranks ? ranks->count : 1);
    t->weights = copy_of(m->weights, t->n);
    t->moment1 = copy_of(m->moment1, t->moments), t->moment2 = copy_of(m->moment2, t->moments);
    ga_destroy(m);
}

/* The run of `settings` on `count` ranks; 1: without any. Returns how many exchanges there were. */
static size_t run_training(training *runs, size_t count, bool late, const training *like) {
    void *contexts[MOST_RANKS];
    for (size_t i = 0; i < count; i++) runs[i] = *like, contexts[i] = &runs[i];
    size_t exchanges = 0;
    if (count > 1)
        exchanges = run_ranks(count, late, train, contexts);
    else
        train(&runs[0], NULL);
    for (size_t i = 0; i < count; i++) expect_ok(runs[i].result, &runs[i].e);
    return exchanges;
}

static void expect_alike(const training *a, const training *b) {
    assert_int_equal(a->n, b->n);
    for (size_t s = 0; s < STEPS; s++) {
        expect_near(a->losses[s], b->losses[s], tolerance, "loss");
        expect_near(a->norms[s], b->norms[s], tolerance, "gradient norm");
        if (a->config.n_experts == 0) continue;
        expect_near(a->routing[s].load_balance, b->routing[s].load_balance, tolerance, "load balance");
        expect_near(a->routing[s].router_z, b->routing[s].router_z, tolerance, "router z");
        expect_near(a->routing[s].max_load, b->routing[s].max_load, tolerance, "largest load");
        expect_near(a->routing[s].dead, b->routing[s].dead, tolerance, "dead experts");
    }
    expect_below(difference(a->weights, b->weights, a->n), tolerance, "weights");
}

static const char *const variants[] = {
    "gate_position=none",
    "gate_position=G1 tied_embeddings=1",
    "gate_position=G1 gate_frozen=1 sandwich_norm=1 recompute=1",
    "gate_position=G2 gate_input=none attention_sink=learned grad_clip=0",
    "n_experts=5 experts_per_token=2 load_balance_coef=0.5 router_z_coef=0.1",
    "n_experts=3 experts_per_token=1 normalize_top_k=0 load_balance_coef=2 recompute=1 tied_embeddings=1",
    "d_model=3 head_dim=2 d_ff=2 vocab_size=5 n_layers=1", /* fewer values in a layer than one unit of 4 ranks */
};

static void test_same_run(void **state) {
    (void)state;
    for (size_t v = 0; v < COUNT(variants); v++) {
        training like = {.config = config_of(variants[v]), .early = true}, alone, runs[MOST_RANKS];
        run_training(&alone, 1, false, &like);
        for (size_t count = 2; count <= 4; count++) {
            run_training(runs, count, false, &like);
            for (size_t i = 0; i < count; i++) {
                expect_alike(&runs[i], &alone);
                assert_memory_equal(runs[i].weights, runs[0].weights, runs[0].n * sizeof(ga_real));
                assert_memory_equal(runs[i].losses, runs[0].losses, sizeof alone.losses);
                assert_memory_equal(runs[i].norms, runs[0].norms, sizeof alone.norms);
            }
            for (size_t i = 0; i < count; i++) free_training(&runs[i]);
        }
        free_training(&alone);
    }
}

/* Early or late exchanges, begun in the backward pass or by the update: not a bit changes. Nothing is
 * exchanged twice. */
static void test_same_bits(void **state) {
    (void)state;
    for (size_t v = 0; v < COUNT(variants); v++) {
        training like = {.config = config_of(variants[v])}, runs[4][MOST_RANKS];
        size_t exchanges[4];
        for (size_t i = 0; i < 4; i++) {
            like.early = i / 2;
            exchanges[i] = run_training(runs[i], 3, i % 2, &like);
        }
        for (size_t i = 1; i < 4; i++) {
            assert_int_equal(exchanges[i], exchanges[0]);
            assert_memory_equal(runs[i][1].weights, runs[0][1].weights, runs[0][1].n * sizeof(ga_real));
            assert_memory_equal(runs[i][1].moment2, runs[0][1].moment2, runs[0][1].moments * sizeof(ga_real));
        }
        /* of the weights at first, then of gradients and weights in each step; of counts in each round
         * of micro-batches */
        size_t parts = like.config.n_layers + 2, counts = like.config.n_experts > 0 ? MICRO_BATCHES / 3 : 0;
        assert_true(exchanges[0] <= parts * (1 + 2 * STEPS) + counts * STEPS && exchanges[0] > 0);
        for (size_t i = 0; i < 4; i++)
            for (size_t r = 0; r < 3; r++) free_training(&runs[i][r]);
    }
}

/* The moments are spread: what a rank is told that it takes is what it takes. */
static void test_memory(void **state) {
    (void)state;
    ga_error e;
    ga_summary s, whole;
    ga_config c = config_of(variants[1]);
    assert_int_equal(ga_summarize_rank(&c, GA_TRAINING, 0, &s, &e), GA_ERR_INPUT);
    for (size_t count = 1; count <= 4; count++) {
        training like = {.config = c}, runs[MOST_RANKS];
        run_training(runs, count, false, &like);
        expect_ok(ga_summarize_rank(&like.config, GA_TRAINING, count, &s, &e), &e);
        expect_ok(ga_summarize(&like.config, GA_TRAINING, &whole, &e), &e);
        assert_int_equal(s.optimizer_bytes, 2 * runs[0].moments * sizeof(ga_real));
        assert_true(s.weight_bytes >= whole.weight_bytes);
        assert_true(s.weight_bytes < whole.weight_bytes + count * GA_RANK_UNIT * sizeof(ga_real));
        assert_int_equal(s.optimizer_bytes, 2 * s.weight_bytes / count);
        assert_int_equal(s.total_bytes, 2 * s.weight_bytes + s.optimizer_bytes + s.activation_bytes);
        for (size_t i = 0; i < count; i++) free_training(&runs[i]);
    }
}

static void remove_all(const char *directory) {
    char command[600];
    snprintf(command, sizeof command, "rm -rf '%s' '%s.partial' '%s.replaced'", directory, directory, directory);
    assert_int_equal(system(command), 0);
}

/* A checkpoint of any number of ranks is that of one, and goes on with any number. */
static void test_resume(void **state) {
    (void)state;
    char directory[] = "build/test_ranks.XXXXXX", first[64], next[64];
    assert_non_null(mkdtemp(directory));
    snprintf(first, sizeof first, "%s/first", directory), snprintf(next, sizeof next, "%s/next", directory);
    for (size_t v = 0; v < COUNT(variants); v += 2) {
        training begin = {.config = config_of(variants[v]), .save = first, .early = true};
        training go_on = {.config = config_of(variants[v]), .load = first, .save = next, .early = true};
        training alone, runs[MOST_RANKS], again[MOST_RANKS];
        for (size_t count = 2; count <= 4; count += 2) {
            run_training(runs, count, false, &begin);
            run_training(&alone, 1, false, &go_on); /* saves `next`, which several ranks load below */
            run_training(again, 3, true, &go_on);
            expect_alike(&again[2], &alone);
            go_on.load = next, go_on.save = NULL;
            free_training(&alone);
            run_training(&alone, 1, false, &go_on);
            for (size_t i = 0; i < 3; i++) free_training(&again[i]);
            run_training(again, 2, false, &go_on);
            expect_alike(&again[1], &alone);
            go_on.load = first, go_on.save = next;
            free_training(&alone);
            for (size_t i = 0; i < 2; i++) free_training(&again[i]);
            for (size_t i = 0; i < count; i++) free_training(&runs[i]);
        }
    }
    remove_all(directory);
}

/* Every moment in the file is the one that its rank has, in its place: loaded alone, then by ranks that
 * save it again. */
static void test_moments_are_kept(void **state) {
    (void)state;
    char directory[] = "build/test_ranks.XXXXXX", first[64], next[64];
    assert_non_null(mkdtemp(directory));
    snprintf(first, sizeof first, "%s/first", directory), snprintf(next, sizeof next, "%s/next", directory);
    training like = {.config = config_of(variants[1]), .save = first, .early = true}, runs[MOST_RANKS];
    run_training(runs, 3, true, &like);
    ga_device device = ga_device_cpu();
    ga_training_state told;
    ga_error e;
    ga_model *m = ga_create(&like.config, &device, GA_TRAINING, &e);
    assert_non_null(m);
    expect_ok(ga_load(m, first, &told, &e), &e);
    assert_int_equal(told.step, STEPS);
    assert_int_equal(m->updates, STEPS);
    assert_memory_equal(m->weights, runs[0].weights, m->n_weights * sizeof(ga_real));
    size_t L = m->sizes.L, unit = 3 * GA_RANK_UNIT, begin = 0, compared = 0;
    for (size_t b = 0; b < L + 2; b++) { /* part by part, cut as the header says */
        const ga_tensor *t = ga_find_tensor(m, b < L ? GA_TENSOR_attn_norm : GA_TENSOR_final_norm, b < L ? b : GA_ALL);
        size_t cut = b <= L ? t->offset : m->n_weights, end = (cut + unit - 1) / unit * unit, part = (end - begin) / 3;
        for (size_t i = begin; i < end && i < m->n_weights; i++, compared++) {
            size_t rank = (i - begin) / part, at = begin / 3 + (i - begin) % part;
            assert_true(m->moment1[i] == runs[rank].moment1[at] && m->moment2[i] == runs[rank].moment2[at]);
        }
        begin = end;
    }
    assert_int_equal(compared, m->n_weights);
    ga_destroy(m);
    for (size_t i = 0; i < 3; i++) free_training(&runs[i]);
    remove_all(directory);
}

/* Rank 0 cannot write: all ranks are told why, with its words. */
static void test_failed_save(void **state) {
    (void)state;
    char file[] = "build/test_ranks.XXXXXX";
    int fd = mkstemp(file);
    assert_true(fd >= 0);
    close(fd);
    training like = {.config = config_of(variants[0]), .save = file}, runs[MOST_RANKS];
    void *contexts[] = {&runs[0], &runs[1]};
    runs[0] = runs[1] = like;
    run_ranks(2, false, train, contexts);
    for (size_t i = 0; i < 2; i++) {
        assert_int_equal(runs[i].result, GA_ERR_FILE);
        assert_non_null(strstr(runs[i].e.text, file));
        free_training(&runs[i]);
    }
    unlink(file);
}

/* ---- statistics, starts, refusals --------------------------------------------------------------------------------- */

typedef struct {
    ga_config config;
    ga_statistics *s;
    ga_real *weights;
    size_t first, step, end; /* windows: first, first + step, ... */
    ga_error e;
    ga_result result, refused, detailed;
} look;

static void observe(void *context, const ga_ranks *ranks) {
    look *l = (look *)context;
    ga_device device = ga_device_cpu();
    device.ranks = ranks;
    ga_model *m = ga_create(&l->config, &device, GA_TRAINING, &l->e);
    if (!m) abort();
    l->weights = copy_of(m->weights, m->n_weights);
    l->s = ga_statistics_create(m);
    ga_statistics *detailed = ga_statistics_create_detailed(m);
    ga_observer observer = {l->s, NULL, 0};
    for (size_t i = l->first; i < l->end; i += l->step) {
        int32_t tokens[T];
        uint64_t random = i;
        fill_tokens(tokens, T, m->sizes.V, &random);
        l->result = ga_forward(m, tokens, NULL, 1, T, &observer, NULL, &l->e);
    }
    if (ranks) {
        l->result = ga_statistics_merge(l->s, ranks, &l->e);
        l->detailed = ga_statistics_merge(detailed, ranks, NULL);
        int32_t tokens[T] = {0};
        m->last_of_step = true;
        ga_forward_backward(m, tokens, tokens, 1, T, 1, NULL, NULL, NULL);
        l->refused = ga_forward_backward(m, tokens, tokens, 1, T, 1, NULL, NULL, &l->e);
    }
    ga_statistics_destroy(detailed);
    ga_destroy(m);
}

static void test_statistics(void **state) {
    (void)state;
    static const char *const models[] = {"gate_position=G1 attention_sink=learned n_experts=3 experts_per_token=2",
                                         "gate_position=none", "gate_position=G1 gate_type=headwise"};
    for (size_t v = 0; v < COUNT(models); v++)
        for (size_t windows = 1; windows < 8; windows += 5) { /* with one, some ranks have seen nothing */
            look alone = {.config = config_of(models[v]), .step = 1, .end = windows}, looks[3];
            void *contexts[] = {&looks[0], &looks[1], &looks[2]};
            observe(&alone, NULL);
            for (size_t i = 0; i < 3; i++) looks[i] = alone, looks[i].first = i, looks[i].step = 3;
            run_ranks(3, true, observe, contexts);
            for (size_t i = 0; i < 3; i++) {
                ga_statistics *s = looks[i].s;
                expect_ok(looks[i].result, &looks[i].e);
                assert_int_equal(looks[i].detailed, GA_ERR_INPUT);
                assert_int_equal(looks[i].refused, GA_ERR_INPUT);
                assert_non_null(strstr(looks[i].e.text, "ga_update is next"));
                assert_true(s->rows == alone.s->rows);
                for (size_t l = 0; l < s->L; l++) {
                    expect_near(ga_f_attn(s, l), ga_f_attn(alone.s, l), 1e-12, "F-Attn");
                    assert_true(ga_m_act(s, l) == ga_m_act(alone.s, l) && ga_m_act(s, l) > 0);
                    for (size_t k = 0; k < s->E; k++)
                        expect_near(ga_expert_load(s, l, k), ga_expert_load(alone.s, l, k), 1e-12, "load");
                    if (s->has_sink) expect_near(ga_sink_share(s, l), ga_sink_share(alone.s, l), 1e-12, "sink");
                    if (!s->has_gate) continue;
                    double here[GA_BINS], there[GA_BINS];
                    ga_gate_histogram(s, l, here), ga_gate_histogram(alone.s, l, there);
                    for (size_t b = 0; b < GA_BINS; b++) expect_near(here[b], there[b], 1e-12, "bin");
                    expect_near(ga_gate_mean(s, l), ga_gate_mean(alone.s, l), 1e-12, "gate mean");
                    expect_near(ga_gate_std(s, l), ga_gate_std(alone.s, l), 1e-9, "gate deviation");
                    assert_true(ga_gate_min(s, l) == ga_gate_min(alone.s, l));
                    assert_true(ga_gate_max(s, l) == ga_gate_max(alone.s, l));
                    expect_near(ga_gate_below(s, l, 0.5), ga_gate_below(alone.s, l, 0.5), 1e-12, "below 0.5");
                }
                ga_statistics_destroy(s);
                free(looks[i].weights);
            }
            ga_statistics_destroy(alone.s);
            free(alone.weights);
        }
}

/* Ranks whose weights began otherwise (another seed, as another libm might) have the same ones: of each a share. */
static void test_same_start(void **state) {
    (void)state;
    look looks[2] = {{.config = config_of(variants[0]), .step = 1},
                     {.config = config_of("gate_position=none seed=2"), .step = 1}};
    look first = looks[0];
    void *contexts[] = {&looks[0], &looks[1]};
    run_ranks(2, false, observe, contexts);
    observe(&first, NULL);
    ga_model *m = create(&looks[0].config, GA_TRAINING);
    assert_memory_equal(looks[0].weights, looks[1].weights, m->n_weights * sizeof(ga_real));
    assert_true(looks[0].weights[0] == first.weights[0]);
    assert_false(memcmp(looks[0].weights, first.weights, m->n_weights * sizeof(ga_real)) == 0);
    ga_destroy(m);
    for (size_t i = 0; i < 2; i++) ga_statistics_destroy(looks[i].s), free(looks[i].weights);
    ga_statistics_destroy(first.s), free(first.weights);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_run),         cmocka_unit_test(test_same_bits),   cmocka_unit_test(test_memory),
        cmocka_unit_test(test_resume),           cmocka_unit_test(test_statistics),  cmocka_unit_test(test_same_start),
        cmocka_unit_test(test_moments_are_kept), cmocka_unit_test(test_failed_save),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    use_default_threads();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
