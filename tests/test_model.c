/* The model as a whole: configuration, memory, independence of two models, modes, optimiser, generation, sampling.
 *
 *     test_model [PATTERN]
 */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>

/* The header's heap: counted, and made to refuse one call. The size stands before each block. */
enum { HEAP_PREFIX = 16 };

static struct {
    pthread_mutex_t lock;
    size_t calls, blocks, bytes, most_bytes;
    size_t refused; /* number of the call that fails, from 1; 0: none */
} heap = {PTHREAD_MUTEX_INITIALIZER, 0, 0, 0, 0, 0};

static void *counted_malloc(size_t size) {
    pthread_mutex_lock(&heap.lock);
    size_t *block = ++heap.calls == heap.refused ? NULL : (size_t *)malloc(size + HEAP_PREFIX);
    if (block) {
        *block = size;
        heap.blocks++;
        heap.bytes += size;
        if (heap.bytes > heap.most_bytes) heap.most_bytes = heap.bytes;
    }
    pthread_mutex_unlock(&heap.lock);
    return block ? (char *)block + HEAP_PREFIX : NULL;
}

static void counted_free(void *p) {
    if (!p) return;
    size_t *block = (size_t *)(void *)((char *)p - HEAP_PREFIX);
    pthread_mutex_lock(&heap.lock);
    heap.blocks--;
    heap.bytes -= *block;
    pthread_mutex_unlock(&heap.lock);
    free(block);
}

static void reset_heap(size_t refused) {
    heap.calls = 0;
    heap.refused = refused;
    heap.most_bytes = heap.bytes;
}

#define GA_MALLOC(size) counted_malloc(size)
#define GA_FREE(p)      counted_free(p)
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"
#include "testing.h"

static const char *tiny =
    "vocab_size=29 d_model=12 n_layers=2 n_heads=4 n_kv_heads=2 head_dim=6 d_ff=14 max_seq_len=20 "
    "batch_size=2 init_std=0.3 gate_init_std=0.5 seed=7";

static ga_config tiny_config(const char *more) {
    ga_config c = ga_config_default();
    configure(&c, tiny);
    configure(&c, more);
    return c;
}

typedef struct {
    int32_t tokens[64], targets[64];
    size_t B, T;
} batch;

static batch make_batch(const ga_model *m, size_t B, size_t T, uint64_t seed) {
    batch b = {{0}, {0}, B, T};
    assert_true(B * T <= COUNT(b.tokens));
    fill_tokens(b.tokens, B * T, m->sizes.V, &seed);
    fill_tokens(b.targets, B * T, m->sizes.V, &seed);
    return b;
}

static double accumulate(ga_model *m, const batch *b, double scale) {
    double loss;
    ga_error e;
    expect_ok(ga_forward_backward(m, b->tokens, b->targets, b->B, b->T, scale, NULL, &loss, &e), &e);
    return loss;
}

static double evaluate(ga_model *m, const batch *b) {
    double loss;
    ga_error e;
    expect_ok(ga_forward(m, b->tokens, b->targets, b->B, b->T, NULL, &loss, &e), &e);
    return loss;
}

static void update(ga_model *m, double learning_rate) {
    double norm;
    ga_error e;
    expect_ok(ga_update(m, learning_rate, &norm, &e), &e);
    assert_true(norm > 0 && isfinite(norm));
}

static void expect_same(const ga_real *a, const ga_real *b, size_t n, const char *what) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0)
            fail_msg("%s: value %zu is %.9g and %.9g", what, i, (double)a[i], (double)b[i]);
}

static bool has_line(const ga_error *e, const char *part) {
    return strstr(e->text, part) && !strchr(e->text, '\n');
}

/* ---- configuration ------------------------------------------------------------------------------------------------- */

static void test_keys_round_trip(void **state) {
    (void)state;
    const ga_config defaults = ga_config_default();
    size_t n = 0;
    ga_key key;
    for (; ga_config_key(n, &key); n++) {
        char before[GA_TEXT], after[GA_TEXT];
        ga_config c = defaults;
        ga_error e;
        assert_true(key.name && key.group && key.choices && key.meaning && *key.meaning);
        assert_true(ga_config_get(&defaults, key.name, before, sizeof before));
        expect_ok(ga_config_set(&c, key.name, before, &e), &e);
        assert_true(ga_config_get(&c, key.name, after, sizeof after));
        assert_string_equal(before, after);
    }
    assert_true(n > 50);
    assert_false(ga_config_get(&defaults, "no_such_key", (char[8]){0}, 8));
}

static void test_values_round_trip(void **state) {
    (void)state;
    static const char *settings[][2] = {
        {"vocab_size", "152064"},
        {"max_tokens", "1000000000000"},
        {"seed", "18446744073709551615"},
        {"seed", "0"},
        {"bos_token", "-1"},
        {"rope_base", "1e+06"},
        {"norm_eps", "1e-06"},
        {"learning_rate", "0.0053"},
        {"beta2", "0.95"},
        {"gate_position", "none"},
        {"gate_position", "G5"},
        {"gate_type", "headwise"},
        {"gate_activation", "ns-sigmoid"},
        {"gate_input", "scalar"},
        {"device", "cpu"},
        {"data", "gen:backcopy,vocab=64,seed=3"},
        {"output_dir", ""},
        {"qk_norm", "0"},
        {"shuffle", "1"},
    };
    for (size_t i = 0; i < COUNT(settings); i++) {
        ga_config c = ga_config_default();
        char text[GA_TEXT];
        ga_error e;
        expect_ok(ga_config_set(&c, settings[i][0], settings[i][1], &e), &e);
        assert_true(ga_config_get(&c, settings[i][0], text, sizeof text));
        assert_string_equal(text, settings[i][1]);
    }
    /* a real number that is not short comes back to the same bits */
    ga_config c = ga_config_default(), d = ga_config_default();
    char text[GA_TEXT];
    c.learning_rate = 0.1 + 0.2;
    assert_true(ga_config_get(&c, "learning_rate", text, sizeof text));
    expect_ok(ga_config_set(&d, "learning_rate", text, NULL), NULL);
    assert_memory_equal(&c.learning_rate, &d.learning_rate, sizeof c.learning_rate);
}

static void test_bad_values(void **state) {
    (void)state;
    static const char *settings[][2] = {
        {"no_such_key", "1"},
        {"d_mode", "64"},
        {"d_modell", "64"},
        {"", "1"},
        {"d_model", "wide"},
        {"d_model", ""},
        {"d_model", "64x"},
        {"d_model", "6.5"},
        {"d_model", "-64"},
        {"d_model", "0"},
        {"d_model", "99999999"},
        {"d_model", "99999999999999999999999"},
        {"head_dim", "257"},
        {"head_dim", "1"},
        {"norm_eps", "nan"},
        {"learning_rate", "inf"},
        {"learning_rate", "-1"},
        {"learning_rate", "1e-3e"},
        {"learning_rate", ""},
        {"beta1", "1"},
        {"qk_norm", "2"},
        {"qk_norm", "maybe"},
        {"gate_position", "G6"},
        {"gate_position", "g"},
        {"gate_type", "element"},
        {"gate_activation", ""},
        {"seed", "-1"},
        {"seed", "1.5"},
        {"seed", "18446744073709551616"},
        {"bos_token", "-2"},
        {"val_fraction", "0.95"},
        {"rope_factor", "0.5"},
        {"rope_factor", "-4"},
        {"n_experts", "-4"},
        {"n_experts", "1025"},
        {"experts_per_token", "0"},
        {"normalize_top_k", "yes"},
        {"load_balance_coef", "-0.01"},
        {"load_balance_coef", "nan"},
        {"router_z_coef", "-1e-9"},
    };
    for (size_t i = 0; i < COUNT(settings); i++) {
        const char *key = settings[i][0], *value = settings[i][1];
        ga_config c = ga_config_default();
        const ga_config before = c;
        ga_error e = {GA_OK, ""};
        if (ga_config_set(&c, key, value, &e) != GA_ERR_CONFIG) fail_msg("%s = '%s' was taken", key, value);
        assert_int_equal(e.result, GA_ERR_CONFIG);
        if (!has_line(&e, key)) fail_msg("the message does not name %s: %s", key, e.text);
        assert_memory_equal(&c, &before, sizeof c);
        assert_int_equal(ga_config_set(&c, key, value, NULL), GA_ERR_CONFIG);
    }
    char text[GA_TEXT + 10];
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    ga_config c = ga_config_default();
    assert_int_equal(ga_config_set(&c, "data", text, NULL), GA_ERR_CONFIG);
    text[GA_TEXT - 1] = '\0';
    assert_int_equal(ga_config_set(&c, "data", text, NULL), GA_OK);
    assert_string_equal(c.data, text);
}

/* What makes no sense is refused, and the message names what to change. */
static void test_refused_combinations(void **state) {
    (void)state;
    static const struct {
        const char *settings, *named;
    } refused[] = {
        {"n_heads=4 n_kv_heads=3", "n_kv_heads"},
        {"n_heads=2 n_kv_heads=4", "n_kv_heads"},
        {"head_dim=7", "head_dim"},
        {"gate_activation=rmsnorm", "rmsnorm"},
        {"gate_activation=rmsnorm gate_form=additive", "rmsnorm"},
        {"gate_form=self gate_activation=sigmoid", "gate_form"},
        {"gate_form=self gate_activation=identity", "gate_form"},
        {"gate_form=self gate_activation=ns-sigmoid", "gate_form"},
        {"gate_position=G2 gate_form=self gate_activation=silu", "gate_position"},
        {"gate_position=G5 gate_form=self gate_activation=silu", "gate_position"},
        {"gate_position=G5 gate_type=headwise", "headwise"},
        {"gate_position=G5 gate_sharing=shared", "shared"},
        {"gate_form=self gate_activation=silu gate_type=headwise", "gate_type"},
        {"gate_form=self gate_activation=silu gate_sharing=shared", "gate_sharing"},
        {"gate_form=self gate_activation=silu gate_input=none", "gate_input"},
        {"gate_form=self gate_activation=silu gate_frozen=1", "gate_frozen"},
        {"gate_input=scalar gate_type=headwise", "gate_type"},
        {"gate_input=scalar gate_sharing=shared", "gate_sharing"},
        {"gate_frozen=1 gate_input=none", "gate_input"},
        {"gate_frozen=1 gate_input=scalar", "gate_input"},
        {"gate_frozen=1 gate_init_std=0", "gate_init_std"},
        {"gate_position=G3 gate_type=headwise", "qk_norm"},
        {"gate_position=G4 gate_type=headwise", "qk_norm"},
        {"gate_position=G4 gate_input=scalar", "qk_norm"},
        {"gate_input_dims=513", "gate_input_dims"},
        {"gate_input_dims=12 gate_input=none", "gate_input_dims"},
        {"gate_input_dims=12 gate_input=scalar", "gate_input_dims"},
        {"gate_input_dims=12 gate_form=self gate_activation=silu", "gate_input_dims"},
        {"gate_position=none switch_heads=v switch_top_k=5", "switch_top_k"},
        {"gate_position=none switch_heads=kv switch_experts=2 switch_top_k=3", "switch_experts"},
        {"gate_position=G2 switch_heads=v", "gate_position=G2"},
        {"gate_position=G2 gate_type=headwise switch_heads=kv", "gate_position=G2"},
        {"gate_position=G3 switch_heads=kv", "gate_position=G3"},
        {"gate_position=none switch_heads=kv switch_top_k=1", "qk_norm"},
        {"rope_factor=4", "rope_original_length"},
        {"rope_factor=4 rope_original_length=512 rope_beta_fast=1 rope_beta_slow=2", "rope_beta_fast"},
        {"rope_factor=4 rope_original_length=512 rope_base=1", "rope_base"},
        {"learning_rate=1e-5", "min_lr"},
        {"vocab_size=100 bos_token=100", "bos_token"},
        {"n_experts=1 experts_per_token=1", "n_experts"},
        {"n_experts=4 experts_per_token=5", "experts_per_token"},
        {"n_experts=4 experts_per_token=1", "normalize_top_k"},
    };
    for (size_t i = 0; i < COUNT(refused); i++) {
        ga_config c = ga_config_default();
        configure(&c, refused[i].settings);
        ga_error e = {GA_OK, ""};
        if (ga_config_check(&c, &e) != GA_ERR_CONFIG) fail_msg("%s was accepted", refused[i].settings);
        if (!has_line(&e, refused[i].named))
            fail_msg("%s: the message does not name %s: %s", refused[i].settings, refused[i].named, e.text);
        ga_error again = {GA_OK, ""};
        ga_summary s;
        assert_null(ga_create(&c, NULL, GA_INFERENCE, &again));
        assert_string_equal(e.text, again.text);
        assert_int_equal(ga_summarize(&c, GA_TRAINING, &s, NULL), GA_ERR_CONFIG);
    }
}

/* What a program writes to the members itself is held to the same ranges. */
static void test_refused_members(void **state) {
    (void)state;
    ga_config c[9];
    const char *named[] = {"n_kv_heads",   "head_dim",      "n_experts", "bos_token",  "norm_eps",
                           "val_fraction", "gate_position", "gate_type", "max_seq_len"};
    for (size_t i = 0; i < COUNT(c); i++) c[i] = ga_config_default();
    c[0].n_kv_heads = 0;
    c[1].head_dim = GA_MAX_HEAD_DIM + 2;
    c[2].n_experts = GA_MAX_EXPERTS + 1;
    c[3].bos_token = -2;
    c[4].norm_eps = NAN;
    c[5].val_fraction = 0.95;
    c[6].gate_position = GA_G5 + 1;
    c[7].gate_type = -1;
    c[8].max_seq_len = SIZE_MAX;
    for (size_t i = 0; i < COUNT(c); i++) {
        ga_error e = {GA_OK, ""};
        assert_null(ga_create(&c[i], NULL, GA_INFERENCE, &e));
        assert_int_equal(e.result, GA_ERR_CONFIG);
        if (strncmp(e.text, named[i], strlen(named[i])) != 0 || !has_line(&e, "out of range"))
            fail_msg("not about %s: %s", named[i], e.text);
    }
}

/* Every row of Tables 1, 3, 4 and 6, and the controls. */
static void test_paper_combinations(void **state) {
    (void)state;
    static const char *accepted[] = {
        "gate_position=none",
        "gate_position=G1",
        "gate_position=G2",
        "gate_position=G3",
        "gate_position=G4",
        "gate_position=G5",
        "gate_position=G1 gate_type=headwise",
        "gate_position=G2 gate_type=headwise",
        "gate_position=G1 gate_sharing=shared",
        "gate_position=G2 gate_sharing=shared",
        "gate_position=G1 gate_form=additive gate_activation=silu",
        "gate_position=G1 gate_activation=silu",
        "gate_position=G1 gate_form=self gate_activation=rmsnorm",
        "gate_position=G1 gate_form=self gate_activation=silu",
        "gate_position=G1 gate_form=additive gate_activation=identity",
        "gate_position=G1 gate_input=none",
        "gate_position=G1 gate_activation=ns-sigmoid",
        "gate_position=G1 gate_input=scalar",
        "gate_position=G1 gate_frozen=1",
        "gate_position=G1 gate_type=headwise gate_input_dims=3",
        "gate_position=none switch_heads=kv switch_experts=8 switch_top_k=8",
        "gate_position=none switch_heads=kv",
        "gate_position=none switch_heads=v",
        "gate_position=none switch_heads=v switch_experts=8 switch_top_k=2",
        "gate_position=none switch_heads=v switch_experts=1 switch_top_k=1",
    };
    for (size_t i = 0; i < COUNT(accepted); i++) {
        ga_config c = tiny_config(accepted[i]);
        ga_error e;
        expect_ok(ga_config_check(&c, &e), &e);
        ga_model *m = create(&c, GA_TRAINING);
        batch b = make_batch(m, 2, 9, 1);
        double first = accumulate(m, &b, 1);
        update(m, 1e-2);
        if (!(evaluate(m, &b) < first)) fail_msg("%s: a step does not lower the loss", accepted[i]);
        ga_destroy(m);
    }
}

/* ---- configuration files ------------------------------------------------------------------------------------------- */

static void write_text(char *path, size_t size, const char *text) {
    snprintf(path, size, "%s/ga_test_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
}

static void test_config_file(void **state) {
    (void)state;
    char path[256];
    write_text(path, sizeof path,
               "\xEF\xBB\xBF"
               "max_steps = 7\r\n# a comment\n\n  d_model = 96   # another\r\ngate_type=headwise\ndata = "
               "gen:backcopy,vocab=5\n"
               "\tlearning_rate\t=\t2e-3");
    ga_config c = ga_config_default();
    ga_error e;
    expect_ok(ga_config_load(&c, path, &e), &e);
    assert_int_equal(c.max_steps, 7); /* behind a byte order mark */
    assert_int_equal(c.d_model, 96);
    assert_int_equal(c.gate_type, GA_HEADWISE);
    assert_string_equal(c.data, "gen:backcopy,vocab=5");
    assert_true(c.learning_rate == 2e-3);
    unlink(path);
}

static void test_bad_config_files(void **state) {
    (void)state;
    static const struct {
        const char *text, *line, *named;
    } bad[] = {
        {"d_model = 96\nunknown_key = 1\n", ":2:", "unknown_key"},
        {"\n\nd_model = wide\n", ":3:", "d_model"},
        {"d_model = 96\nd_model = 97\n", ":2:", "d_model"},
        {"d_model 96\n", ":1:", "d_model"},
        {"# fine\n= 96\n", ":2:", "key"},
        {"d_model =\n", ":1:", "d_model"},
        {"n_heads = 5000\n", ":1:", "n_heads"},
        {"n_layer = 3\n", ":1:", "unknown key 'n_layer'; is it n_layers?"},
        {"batchsize = 3\n", ":1:", "unknown key 'batchsize'; is it batch_size?"},
        {"learning_rats = 3\n", ":1:", "unknown key 'learning_rats'; is it learning_rate?"},
        {"lernig_arte = 3\n", ":1:", "unknown key 'lernig_arte'"},
    };
    for (size_t i = 0; i < COUNT(bad); i++) {
        char path[256];
        write_text(path, sizeof path, bad[i].text);
        ga_config c = ga_config_default();
        ga_error e = {GA_OK, ""};
        if (ga_config_load(&c, path, &e) != GA_ERR_CONFIG) fail_msg("taken: %s", bad[i].text);
        if (!has_line(&e, path) || !has_line(&e, bad[i].line) || !has_line(&e, bad[i].named))
            fail_msg("the message should have %s, %s and %s: %s", path, bad[i].line, bad[i].named, e.text);
        if (strstr(e.text, "is it") && !strstr(bad[i].named, "is it")) fail_msg("a guess too far: %s", e.text);
        unlink(path);
    }
    ga_config c = ga_config_default();
    ga_error e = {GA_OK, ""};
    assert_int_equal(ga_config_load(&c, "/nowhere/at/all.cfg", &e), GA_ERR_FILE);
    assert_true(has_line(&e, "/nowhere/at/all.cfg"));
    assert_int_not_equal(ga_config_load(&c, "/", &e), GA_OK);
}

/* Files that would be read without end, or by a time that grows with a power of their length. */
static void test_hostile_config_files(void **state) {
    (void)state;
    char path[256], text[4096], line[512];
    const char *name;
    ga_error e = {GA_OK, ""};
    ga_config c = ga_config_default();
    write_text(path, sizeof path, "d_model = 96\ninclude = /dev/zero\n");
    assert_int_equal(ga_config_load(&c, path, &e), GA_ERR_FILE);
    assert_true(has_line(&e, ":2:") && has_line(&e, "/dev/zero is not a regular file"));
    unlink(path);
    assert_int_equal(ga_config_load(&c, "/dev/zero", &e), GA_ERR_CONFIG);
    assert_true(has_line(&e, ":1: the line holds a zero byte"));
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    write_text(path, sizeof path, text);
    assert_int_equal(ga_config_load(&c, path, &e), GA_ERR_CONFIG);
    assert_true(has_line(&e, ":1: the line is too long"));
    unlink(path);
    write_text(path, sizeof path, "");
    name = strrchr(path, '/') + 1;
    snprintf(line, sizeof line, "include = %s\n", name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    for (int i = 0; i < 100; i++) fputs(line, f); /* 100^8 files, if they were all read */
    fclose(f);
    assert_int_equal(ga_config_load(&c, path, &e), GA_ERR_CONFIG);
    snprintf(text, sizeof text, "%s:1: include: %s is this file, or one that includes it", path, path);
    assert_string_equal(e.text, text);
    unlink(path);
    char leaf[256];
    write_text(leaf, sizeof leaf, "d_ff = 5\n");
    snprintf(line, sizeof line, "include = %s\n", strrchr(leaf, '/') + 1);
    write_text(path, sizeof path, "");
    f = fopen(path, "wb");
    assert_non_null(f);
    for (int i = 0; i < 100; i++) fputs(line, f);
    fclose(f);
    assert_int_equal(ga_config_load(&c, path, &e), GA_ERR_CONFIG);
    assert_true(has_line(&e, "more than 64 files"));
    unlink(path);
    unlink(leaf);
}

/* Each file includes the one before it, the first one `innermost`. */
static void write_chain(char paths[][256], size_t n, const char *innermost) {
    char text[512];
    for (size_t i = 0; i < n; i++) {
        snprintf(text, sizeof text, "include = %s\n", i == 0 ? innermost : strrchr(paths[i - 1], '/') + 1);
        write_text(paths[i], sizeof paths[i], text);
    }
}

static void test_chains_of_config_files(void **state) {
    (void)state;
    char paths[9][256], leaf[256], text[1024];
    ga_error e = {GA_OK, ""};
    ga_config c = ga_config_default();
    write_text(leaf, sizeof leaf, "d_ff = 5\n");
    write_chain(paths, 9, strrchr(leaf, '/') + 1);
    assert_int_equal(ga_config_load(&c, paths[7], &e), GA_OK);
    assert_int_equal(c.d_ff, 5);
    assert_int_equal(ga_config_load(&c, paths[8], &e), GA_ERR_CONFIG);
    assert_true(has_line(&e, "more than 8 files deep"));
    for (size_t i = 0; i < 9; i++) unlink(paths[i]);
    write_chain(paths, 2, "no-such.cfg");
    assert_int_equal(ga_config_load(&c, paths[1], &e), GA_ERR_FILE);
    assert_true(has_line(&e, "no-such.cfg: No such file"));
    FILE *f = fopen(paths[0], "wb"); /* a ring of two */
    assert_non_null(f);
    fprintf(f, "include = %s\n", strrchr(paths[1], '/') + 1);
    fclose(f);
    assert_int_equal(ga_config_load(&c, paths[1], &e), GA_ERR_CONFIG);
    snprintf(text, sizeof text, "%s:1: %s:1: include: %s is this file, or one that includes it", paths[1], paths[0],
             paths[1]);
    assert_string_equal(e.text, text);
    unlink(paths[0]), unlink(paths[1]), unlink(leaf);
}

/* ---- input --------------------------------------------------------------------------------------------------------- */

static void test_bad_input(void **state) {
    (void)state;
    ga_config c = tiny_config("");
    ga_model *m = create(&c, GA_TRAINING);
    batch b = make_batch(m, 2, 20, 3);
    const ga_real *weights = m->weights;
    ga_real *before = reals(m->n_weights);
    memcpy(before, weights, m->n_weights * sizeof *before);
    double loss;
    ga_error e;

    static const int32_t bad_tokens[] = {29, -1, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < COUNT(bad_tokens); i++) {
        batch wrong = b;
        wrong.tokens[17] = bad_tokens[i];
        assert_int_equal(ga_forward(m, wrong.tokens, wrong.targets, 2, 20, NULL, &loss, &e), GA_ERR_INPUT);
        assert_true(has_line(&e, "token"));
        assert_int_equal(ga_forward_backward(m, wrong.tokens, wrong.targets, 2, 20, 1, NULL, &loss, NULL),
                         GA_ERR_INPUT);
    }
    batch wrong = b;
    wrong.targets[5] = 29;
    assert_int_equal(ga_forward_backward(m, wrong.tokens, wrong.targets, 2, 20, 1, NULL, &loss, &e), GA_ERR_INPUT);
    assert_int_equal(ga_forward(m, b.tokens, b.targets, 3, 20, NULL, &loss, &e), GA_ERR_INPUT);
    assert_int_equal(ga_forward(m, b.tokens, b.targets, 1, 21, NULL, &loss, &e), GA_ERR_INPUT);
    assert_int_equal(ga_forward(m, b.tokens, b.targets, 0, 20, NULL, &loss, &e), GA_ERR_INPUT);
    assert_int_equal(ga_forward(m, b.tokens, b.targets, 1, 0, NULL, &loss, &e), GA_ERR_INPUT);
    assert_int_equal(ga_forward(m, b.tokens, b.targets, SIZE_MAX / 2, 4, NULL, &loss, &e), GA_ERR_INPUT);
    assert_int_equal(ga_forward(m, b.tokens, b.targets, SIZE_MAX, 20, NULL, &loss, &e), GA_ERR_INPUT);
    assert_int_equal(ga_forward_backward(m, b.tokens, NULL, 2, 20, 1, NULL, &loss, &e), GA_ERR_INPUT);
    assert_true(has_line(&e, "targets"));
    expect_same(m->weights, before, m->n_weights, "weights after refused input");
    for (size_t i = 0; i < m->n_weights; i++) assert_true(m->gradients[i] == 0);

    ga_real row[29];
    expect_ok(ga_forward(m, b.tokens, b.targets, 2, 20, NULL, &loss, &e), &e);
    assert_int_equal(ga_logits(m, 40, 1, row, &e), GA_ERR_INPUT);
    assert_int_equal(ga_logits(m, 1, SIZE_MAX, row, &e), GA_ERR_INPUT);
    expect_ok(ga_logits(m, 39, 1, row, &e), &e);

    /* more and shorter sequences than batch_size fit */
    expect_ok(ga_forward(m, b.tokens, b.targets, 8, 5, NULL, &loss, &e), &e);
    free(before);
    ga_destroy(m);

    ga_model *inference = create(&c, GA_INFERENCE);
    assert_int_equal(ga_forward_backward(inference, b.tokens, b.targets, 2, 20, 1, NULL, &loss, &e), GA_ERR_INPUT);
    assert_int_equal(ga_update(inference, 1e-3, &loss, &e), GA_ERR_INPUT);
    ga_destroy(inference);
}

static void test_ignored_targets(void **state) {
    (void)state;
    ga_config c = tiny_config("");
    ga_model *m = create(&c, GA_TRAINING);
    batch b = make_batch(m, 1, 6, 4);
    /* the mean over one target is that target's loss; the mean over all is the mean of these */
    double sum = 0;
    for (size_t i = 0; i < 6; i++) {
        batch one = b;
        for (size_t j = 0; j < 6; j++)
            if (j != i) one.targets[j] = -1 - (int32_t)j;
        sum += evaluate(m, &one) / 6;
    }
    expect_near(evaluate(m, &b), sum, 1e-6, "mean of the single losses");
    for (size_t j = 0; j < 6; j++) b.targets[j] = -1;
    assert_true(isnan(evaluate(m, &b)));
    double loss;
    ga_error e;
    expect_ok(ga_forward_backward(m, b.tokens, b.targets, 1, 6, 1, NULL, &loss, &e), &e);
    assert_true(isnan(loss));
    for (size_t i = 0; i < m->n_weights; i++) assert_true(m->gradients[i] == 0);
    ga_destroy(m);
}

/* ---- independence, modes ------------------------------------------------------------------------------------------- */

typedef struct {
    ga_config config;
    ga_real *weights; /* after the run */
    double loss;
} training_run;

static void *train_a_little(void *argument) {
    training_run *run = (training_run *)argument;
    ga_model *m = ga_create(&run->config, NULL, GA_TRAINING, NULL);
    if (!m) return NULL;
    uint64_t random = run->config.seed;
    int32_t tokens[40], targets[40];
    for (int step = 0; step < 20; step++) {
        double norm;
        fill_tokens(tokens, 40, m->sizes.V, &random);
        fill_tokens(targets, 40, m->sizes.V, &random);
        if (ga_forward_backward(m, tokens, targets, 2, 20, 1, NULL, &run->loss, NULL) != GA_OK) return NULL;
        if (ga_update(m, 1e-2, &norm, NULL) != GA_OK) return NULL;
    }
    run->weights = (ga_real *)malloc(m->n_weights * sizeof *run->weights);
    if (run->weights) memcpy(run->weights, m->weights, m->n_weights * sizeof *run->weights);
    run->config.vocab_size = m->n_weights; /* how many to compare */
    ga_destroy(m);
    return run;
}

static void test_two_models_at_once(void **state) {
    (void)state;
    static const char *settings[] = {"gate_position=G1",
                                     "gate_position=G2 n_layers=3 seed=8 tied_embeddings=1 recompute=1"};
    training_run alone[2], together[2];
    pthread_t threads[2];
    for (size_t i = 0; i < 2; i++) {
        alone[i] = together[i] = (training_run){tiny_config(settings[i]), NULL, 0};
        assert_non_null(train_a_little(&alone[i]));
    }
    for (size_t i = 0; i < 2; i++) assert_int_equal(pthread_create(&threads[i], NULL, train_a_little, &together[i]), 0);
    for (size_t i = 0; i < 2; i++) {
        void *result;
        assert_int_equal(pthread_join(threads[i], &result), 0);
        assert_non_null(result);
    }
    for (size_t i = 0; i < 2; i++) {
        assert_int_equal(alone[i].config.vocab_size, together[i].config.vocab_size);
        expect_same(alone[i].weights, together[i].weights, alone[i].config.vocab_size, settings[i]);
        assert_true(alone[i].loss == together[i].loss);
        free(alone[i].weights);
        free(together[i].weights);
    }
}

static const char *gates[] = {
    "gate_position=none",
    "gate_position=G1",
    "gate_position=G1 gate_type=headwise gate_sharing=shared",
    "gate_position=G2 gate_type=headwise",
    "gate_position=G2 gate_form=additive gate_activation=silu",
    "gate_position=G3 sandwich_norm=1",
    "gate_position=G4 qk_norm=0 tied_embeddings=1",
    "gate_position=G5 attn_clip=0.2 ffn_clip=0.3",
    "gate_position=G1 gate_form=self gate_activation=rmsnorm",
    "gate_position=G1 gate_input=none",
    "gate_position=G3 gate_input=scalar qk_norm=0",
    "attention_sink=learned",
    "attention_sink=one gate_position=none",
    "gate_input_dims=5",
    "gate_position=none switch_heads=kv switch_experts=3 switch_top_k=2",
    "switch_heads=v tied_embeddings=1",
    "gate_position=G4 gate_sharing=shared gate_input_dims=12",
    "n_experts=6 experts_per_token=2 load_balance_coef=0.5 router_z_coef=0.1",
    "n_experts=9 experts_per_token=1 normalize_top_k=0 sandwich_norm=1 ffn_clip=0.3",
};

static void test_modes_agree(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(gates); i++) {
        ga_config c = tiny_config(gates[i]), lean = c;
        lean.recompute = true;
        ga_model *full = create(&c, GA_TRAINING), *again = create(&lean, GA_TRAINING),
                 *inference = create(&c, GA_INFERENCE);
        batch b = make_batch(full, 2, 20, i), shorter = make_batch(full, 1, 7, i + 50);
        /* a longer batch before, so that stale activations would be seen */
        evaluate(full, &b), evaluate(again, &b), evaluate(inference, &b);
        double loss = evaluate(full, &shorter);
        assert_true(evaluate(inference, &shorter) == loss);
        assert_true(accumulate(full, &shorter, 0.7) == loss);
        assert_true(accumulate(again, &shorter, 0.7) == loss);
        assert_int_equal(full->n_weights, again->n_weights);
        expect_same(full->gradients, again->gradients, full->n_weights, "gradients, recomputed");
        assert_null(inference->gradients);
        assert_null(inference->moment1);
        ga_destroy(full), ga_destroy(again), ga_destroy(inference);
    }
}

/* Two micro-batches at half the scale are one batch of both. */
static void test_accumulation(void **state) {
    (void)state;
    ga_config c = tiny_config("");
    ga_model *m = create(&c, GA_TRAINING);
    batch both = make_batch(m, 2, 10, 5), first = both, second = both;
    first.B = second.B = 1;
    memcpy(second.tokens, both.tokens + 10, 10 * sizeof *both.tokens);
    memcpy(second.targets, both.targets + 10, 10 * sizeof *both.targets);
    double loss = accumulate(m, &both, 1);
    double *expected = (double *)calloc(m->n_weights, sizeof *expected);
    assert_non_null(expected);
    for (size_t i = 0; i < m->n_weights; i++) {
        expected[i] = (double)m->gradients[i];
        m->gradients[i] = 0;
    }
    ga_error e;
    double norm, total = (double)NAN, start = (double)NAN;
    expect_ok(ga_update(m, 0, &norm, &e), &e); /* a new batch of the same weights */
    double mean = accumulate(m, &first, 0.5) / 2 + accumulate(m, &second, 0.5) / 2;
    expect_near(mean, loss, 1e-6, "mean of the losses");
    expect_below(difference(m->gradients, expected, m->n_weights), 1e-6, "accumulated gradient");
    expect_ok(ga_batch_loss(m, &total, &e), &e);
    assert_true(fabs(total - mean) < 1e-15);
    expect_ok(ga_update(m, 0, &norm, &e), &e);
    expect_ok(ga_batch_loss(m, &start, &e), &e);
    assert_true(start == 0);
    free(expected);
    ga_destroy(m);
}

/* A device that knows a pass by heart from its second time on, but plays nothing: what the model asks of it. */
typedef struct {
    char key[64];
    size_t bytes;
    int asked, played, recorded, refused; /* refused: times that `recorded` asks for the operators once more */
} parrot;

static bool parrot_replay(void *state, const void *key, size_t bytes) {
    parrot *p = (parrot *)state;
    assert_true(bytes <= sizeof p->key);
    bool known = p->bytes == bytes && memcmp(p->key, key, bytes) == 0;
    memcpy(p->key, key, bytes), p->bytes = bytes;
    p->asked++, p->played += known;
    return known;
}

static bool parrot_recorded(void *state) {
    parrot *p = (parrot *)state;
    p->recorded++;
    if (p->refused == 0) return true;
    p->refused--, p->bytes = 0;
    return false;
}

static void test_replay(void **state) {
    (void)state;
    ga_config c = tiny_config("");
    parrot p = {.refused = 1};
    ga_device device = ga_device_cpu();
    device.state = &p, device.replay = parrot_replay, device.recorded = parrot_recorded;
    ga_error e;
    ga_model *m = ga_create(&c, &device, GA_TRAINING, &e);
    assert_non_null(m);
    batch b = make_batch(m, 2, 10, 5), shorter = b;
    shorter.T = 9;
    double loss = accumulate(m, &b, 1); /* taken down, and then done */
    assert_true(p.asked == 2 && p.recorded == 2 && p.played == 0);
    assert_true(accumulate(m, &b, 1) == loss && p.played == 1 && p.recorded == 2);
    accumulate(m, &b, 0.5), accumulate(m, &shorter, 0.5); /* other passes */
    assert_true(p.played == 1 && p.recorded == 4);
    ga_statistics *s = ga_statistics_create(m);
    ga_observer observer = {.statistics = s};
    expect_ok(ga_forward_backward(m, b.tokens, b.targets, b.B, b.T, 1, &observer, NULL, &e), &e);
    m->profile = true;
    accumulate(m, &b, 1);
    assert_true(p.asked == 5); /* an observer, or a profile, sees every operator */
    ga_statistics_destroy(s);
    ga_destroy(m);
}

static void test_thread_counts(void **state) {
    (void)state;
    ga_real *first = NULL;
    for (int threads = 1; threads <= 3; threads++) {
        use_threads(threads);
        training_run run = {tiny_config(""), NULL, 0};
        assert_non_null(train_a_little(&run));
        if (first) expect_same(run.weights, first, run.config.vocab_size, "weights with another number of threads");
        if (first)
            free(run.weights);
        else
            first = run.weights;
    }
    free(first);
    use_default_threads();
}

/* ---- tensors, seeds ------------------------------------------------------------------------------------------------ */

static void test_tensors(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(gates); i++) {
        ga_config c = tiny_config(gates[i]);
        ga_model *m = create(&c, GA_TRAINING);
        size_t end = 0;
        for (size_t j = 0; j < m->n_tensors; j++) {
            const ga_tensor *t = &m->tensors[j];
            assert_int_equal(t->offset, end);
            end += t->rows * t->columns;
            if (t->expert == GA_ALL || t->expert == 0) assert_ptr_equal(ga_find_tensor(m, t->id, t->layer), t);
            assert_int_equal(t->decays, t->start == GA_START_MATRIX || t->start == GA_START_GATE);
        }
        assert_int_equal(end, m->n_weights);
        assert_true(!ga_find_tensor(m, GA_TENSOR_head, GA_ALL) == c.tied_embeddings);
        assert_null(ga_find_tensor(m, GA_TENSOR_query, m->sizes.L));
        assert_null(ga_find_tensor(m, GA_TENSOR_COUNT, 0));
        ga_summary s;
        ga_error e;
        expect_ok(ga_summarize(&c, GA_TRAINING, &s, &e), &e);
        assert_int_equal(s.parameters, m->n_weights);
        ga_destroy(m);
    }
}

static void expect_same_tensor(const ga_model *a, const ga_model *b, const ga_tensor *t) {
    const ga_tensor *u = ga_find_tensor(b, t->id, t->layer);
    assert_non_null(u);
    expect_same(a->weights + t->offset, b->weights + u->offset, t->rows * t->columns, t->name);
}

static void test_seeds(void **state) {
    (void)state;
    ga_config c = tiny_config("gate_position=G1"), baseline = tiny_config("gate_position=none");
    ga_config other = tiny_config("gate_position=G1 seed=9");
    ga_model *a = create(&c, GA_TRAINING), *b = create(&c, GA_INFERENCE), *plain = create(&baseline, GA_TRAINING);
    ga_model *different = create(&other, GA_TRAINING);
    expect_same(a->weights, b->weights, a->n_weights, "two models of one seed");
    for (size_t i = 0; i < plain->n_tensors; i++) expect_same_tensor(plain, a, &plain->tensors[i]);
    for (size_t i = 0; i < a->n_tensors; i++) {
        const ga_tensor *t = &a->tensors[i];
        const ga_real *x = a->weights + t->offset;
        size_t n = t->rows * t->columns;
        double std = t->start == GA_START_GATE ? c.gate_init_std : c.init_std, mean = 0;
        if (t->start == GA_START_ONES) {
            for (size_t j = 0; j < n; j++) assert_true(x[j] == 1);
            continue;
        }
        /* every matrix has a stream of its own, with the spread that was asked for */
        assert_memory_not_equal(x, different->weights + t->offset, n * sizeof *x);
        for (size_t j = 0; j < i; j++)
            if (a->tensors[j].start != GA_START_ONES)
                assert_memory_not_equal(x, a->weights + a->tensors[j].offset, 4 * sizeof *x);
        for (size_t j = 0; j < n; j++) mean += (double)x[j] / (double)n;
        expect_below(fabs(mean), 5 * std / sqrt((double)n), "mean of %s", t->name);
        expect_near(norm_of(x, n) / sqrt((double)n) / std, 1, 5 / sqrt(2 * (double)n), t->name);
    }
    ga_destroy(a), ga_destroy(b), ga_destroy(plain), ga_destroy(different);
}

static void test_free_gate_starts_at_zero(void **state) {
    (void)state;
    ga_config c = tiny_config("gate_input=none");
    ga_model *m = create(&c, GA_TRAINING);
    const ga_tensor *t = ga_find_tensor(m, GA_TENSOR_gate_free, 1);
    assert_non_null(t);
    assert_int_equal(t->columns, 24);
    for (size_t i = 0; i < t->columns; i++) assert_true(m->weights[t->offset + i] == 0);
    ga_destroy(m);
}

/* YaRN: pairs that turn often keep their frequency, those that turn seldom are slowed by the factor, the rest lie
 * between; what does not turn is not scaled. */
static void test_yarn(void **state) {
    (void)state;
    ga_config plain = tiny_config("head_dim=64 rope_base=10000"), yarn = plain;
    configure(&yarn, "rope_factor=4 rope_original_length=4096");
    expect_near(ga_rope_scale(&yarn), 0.1 * log(4) + 1, 1e-15, "scale");
    assert_true(ga_rope_scale(&plain) == 1);
    double last = 1;
    for (size_t i = 0; i < 32; i++) {
        double theta = pow(10000, -(double)i / 32), share = ga_rope_frequency(&yarn, i) / theta;
        double turns = 4096 * theta / (2 * 3.141592653589793);
        expect_near(ga_rope_frequency(&plain, i), theta, 1e-15, "frequency");
        if (turns > 33) assert_true(i > 10 || share == 1);
        if (turns < 0.9) expect_near(share, 0.25, 1e-12, "a slow pair");
        /* 32 and 1 turns are pairs 10.47 and 22.51: the ramp goes from 10 to 23. */
        expect_near(share, 1 - 0.75 * fmin(fmax(((double)i - 10) / 13, 0), 1), 1e-12, "the ramp");
        assert_true(share <= last && share >= 0.25 - 1e-12);
        last = share;
    }
    assert_true(last < 0.26);
    yarn.rope_factor = 1;
    for (size_t i = 0; i < 32; i++) assert_true(ga_rope_frequency(&yarn, i) == ga_rope_frequency(&plain, i));
    yarn.rope_factor = 4, yarn.partial_rotary_factor = 0.5;
    assert_true(ga_rope_frequency(&yarn, 15) > 0 && ga_rope_frequency(&yarn, 16) == 0);
    ga_model *m = create(&yarn, GA_INFERENCE);
    assert_true(m->rope[15] == (ga_real)ga_rope_scale(&yarn) && m->rope[16] == 1 && m->rope[64 + 32 + 16] == 0);
    ga_destroy(m);
}

/* ---- optimiser ----------------------------------------------------------------------------------------------------- */

/* With gradients of zero a step only decays, p (1 - rate * decay), and only matrices. */
static void test_decay(void **state) {
    (void)state;
    ga_config c = tiny_config("weight_decay=0.5 sandwich_norm=1");
    ga_model *m = create(&c, GA_TRAINING);
    randomise_weights(m, 1);
    ga_real *before = reals(m->n_weights);
    memcpy(before, m->weights, m->n_weights * sizeof *before);
    double norm = 1;
    ga_error e;
    expect_ok(ga_update(m, 0.1, &norm, &e), &e);
    assert_true(norm == 0);
    for (size_t i = 0; i < m->n_tensors; i++) {
        const ga_tensor *t = &m->tensors[i];
        double factor = t->start == GA_START_ONES ? 1 : 0.95;
        for (size_t j = t->offset; j < t->offset + t->rows * t->columns; j++)
            expect_near((double)m->weights[j], factor * (double)before[j], 1e-6, t->name);
    }
    free(before);
    ga_destroy(m);
}

/* A gate that reads all channels in a product of its own is the gate of the one product. */
static void test_all_channels(void **state) {
    (void)state;
    static const char *positions[] = {"gate_position=G1", "gate_position=G2 gate_type=headwise", "gate_position=G5"};
    for (size_t i = 0; i < COUNT(positions); i++) {
        ga_config c = tiny_config(positions[i]), own = c;
        own.gate_input_dims = own.d_model;
        ga_model *a = create(&c, GA_TRAINING), *b = create(&own, GA_TRAINING); /* the start depends on names alone */
        batch x = make_batch(a, 2, 10, 6);
        expect_near(accumulate(b, &x, 1), accumulate(a, &x, 1), 1e-6, "loss");
        for (size_t j = 0; j < a->n_tensors; j++) {
            const ga_tensor *t = &a->tensors[j];
            bool gate = t->id == GA_TENSOR_gate_weight;
            const ga_tensor *u = ga_find_tensor(b, gate ? GA_TENSOR_gate_channels : t->id, t->layer);
            size_t n = t->rows * t->columns;
            assert_non_null(u);
            assert_memory_equal(a->weights + t->offset, b->weights + u->offset, n * sizeof *a->weights);
            double *expected = (double *)calloc(n, sizeof *expected);
            assert_non_null(expected);
            for (size_t k = 0; k < n; k++) expected[k] = (double)a->gradients[t->offset + k];
            expect_below(difference(b->gradients + u->offset, expected, n), 1e-5, "gradient of %s", t->name);
            free(expected);
        }
        ga_destroy(a), ga_destroy(b);
    }
}

static void test_frozen_gate(void **state) {
    (void)state;
    ga_config c = tiny_config("gate_frozen=1");
    ga_model *m = create(&c, GA_TRAINING), *start = create(&c, GA_INFERENCE);
    batch b = make_batch(m, 2, 10, 6);
    for (int i = 0; i < 3; i++) {
        accumulate(m, &b, 1);
        update(m, 1e-2);
    }
    for (size_t i = 0; i < m->n_tensors; i++) {
        const ga_tensor *t = &m->tensors[i];
        size_t bytes = t->rows * t->columns * sizeof *m->weights;
        bool same = !memcmp(m->weights + t->offset, start->weights + t->offset, bytes);
        if (same != (t->id == GA_TENSOR_gate_weight)) fail_msg("%s %s", t->name, same ? "did not move" : "moved");
        assert_int_equal(t->frozen, t->id == GA_TENSOR_gate_weight);
    }
    ga_destroy(m), ga_destroy(start);
}

/* The first step of AdamW moves each weight by rate * g / (|g| + eps): clipping changes nothing but what eps sees. */
static void test_update(void **state) {
    (void)state;
    ga_config c = tiny_config("weight_decay=0.1 grad_clip=0.5 eps=0.01");
    ga_model *m = create(&c, GA_TRAINING);
    batch b = make_batch(m, 2, 10, 6);
    accumulate(m, &b, 1);
    ga_real *before = reals(m->n_weights), *gradients = reals(m->n_weights);
    memcpy(before, m->weights, m->n_weights * sizeof *before);
    memcpy(gradients, m->gradients, m->n_weights * sizeof *gradients);
    double expected_norm = norm_of(gradients, m->n_weights), norm, rate = 0.05;
    ga_error e;
    expect_ok(ga_update(m, rate, &norm, &e), &e);
    expect_near(norm, expected_norm, 1e-5, "gradient norm");
    assert_true(norm > c.grad_clip);
    assert_int_equal(m->updates, 1);
    for (size_t i = 0; i < m->n_tensors; i++) {
        const ga_tensor *t = &m->tensors[i];
        for (size_t j = t->offset; j < t->offset + t->rows * t->columns; j++) {
            double g = (double)gradients[j] * c.grad_clip / (norm + 1e-6), p = (double)before[j];
            if (t->decays) p -= rate * c.weight_decay * p;
            expect_near((double)m->weights[j], p - rate * g / (fabs(g) + c.eps), 2e-6, t->name);
            assert_true(m->gradients[j] == 0);
        }
    }
    free(before);
    free(gradients);
    ga_destroy(m);
}

static void test_divergence(void **state) {
    (void)state;
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    ga_config c = tiny_config("");
    ga_model *m = create(&c, GA_TRAINING);
    batch b = make_batch(m, 2, 10, 6);
    for (size_t i = 0; i < COUNT(bad); i++) {
        accumulate(m, &b, 1);
        ga_real *before = reals(m->n_weights);
        memcpy(before, m->weights, m->n_weights * sizeof *before);
        m->gradients[m->n_weights / 2] = (ga_real)bad[i];
        double norm;
        ga_error e = {GA_OK, ""};
        assert_int_equal(ga_update(m, 1e-3, &norm, &e), GA_ERR_DIVERGED);
        assert_false(isfinite(norm));
        assert_true(e.text[0] && !strchr(e.text, '\n'));
        expect_same(m->weights, before, m->n_weights, "weights after a refused step");
        memset(m->gradients, 0, m->n_weights * sizeof *m->gradients);
        free(before);
    }
    assert_int_equal(m->updates, 0);
    m->weights[ga_find_tensor(m, GA_TENSOR_final_norm, GA_ALL)->offset] = NAN;
    assert_false(isfinite(evaluate(m, &b)));
    ga_destroy(m);
}

/* Memorises a batch: forward, backward, optimiser and schedule work together. */
static void test_learns(void **state) {
    (void)state;
    ga_config c = tiny_config("warmup_steps=10 learning_rate=0.02 min_lr=0.002 weight_decay=0");
    ga_model *m = create(&c, GA_TRAINING);
    batch b = make_batch(m, 2, 16, 11);
    double first = evaluate(m, &b);
    expect_near(first, log(29.0), 0.35, "first loss");
    for (uint64_t step = 0; step < 150; step++) {
        accumulate(m, &b, 1);
        update(m, ga_learning_rate(&c, step, 150));
    }
    expect_below(evaluate(m, &b), 0.05, "loss on a batch that was learned by heart");
    ga_destroy(m);
}

/* ---- analysis ------------------------------------------------------------------------------------------------------ */

static void set_tensor(ga_model *m, int id, double value) {
    for (size_t layer = 0; layer < m->sizes.L; layer++) {
        const ga_tensor *t = ga_find_tensor(m, id, layer);
        assert_non_null(t);
        for (size_t i = 0; i < t->rows * t->columns; i++) m->weights[t->offset + i] = (ga_real)value;
    }
}

/* Queries of zero spread the attention evenly; gate logits of zero make every score 1/2. */
static void test_statistics(void **state) {
    (void)state;
    ga_config c = tiny_config("qk_norm=0");
    ga_model *m = create(&c, GA_INFERENCE);
    set_tensor(m, GA_TENSOR_query, 0);
    set_tensor(m, GA_TENSOR_gate_weight, 0);
    ga_statistics *s = ga_statistics_create(m);
    assert_non_null(s);
    ga_observer observer = {s, NULL, 0};
    batch b = make_batch(m, 2, 17, 1);
    double loss;
    ga_error e;
    for (int round = 0; round < 2; round++) {
        ga_statistics_reset(s);
        for (int i = 0; i <= round; i++) expect_ok(ga_forward(m, b.tokens, b.targets, 2, 17, &observer, &loss, &e), &e);
        double uniform = 0;
        for (int i = 1; i <= 17; i++) uniform += 1.0 / i / 17;
        expect_near(ga_f_attn_uniform(17), uniform, 1e-12, "uniform F-Attn");
        expect_near(ga_f_attn(s, GA_ALL), uniform, 1e-6, "F-Attn");
        expect_near(ga_f_attn_head(s, 1, 3), uniform, 1e-6, "F-Attn of a head");
        expect_near(ga_gate_mean(s, GA_ALL), 0.5, 1e-12, "gate mean");
        expect_near(ga_gate_std(s, 0), 0, 1e-6, "gate deviation");
        assert_true(ga_gate_below(s, 0, 0.5) == 0 && ga_gate_below(s, 0, 0.1) == 0);
        double shares[GA_BINS];
        ga_gate_histogram(s, GA_ALL, shares);
        assert_true(shares[GA_BINS / 2] == 1);
        assert_true(s->rows == 34 * (round + 1));
    }
    ga_statistics_destroy(s);
    ga_destroy(m);
}

/* Observing does not change what is observed. */
static void test_observer(void **state) {
    (void)state;
    ga_config c = tiny_config("");
    ga_model *m = create(&c, GA_TRAINING);
    batch b = make_batch(m, 2, 13, 1);
    ga_statistics *s = ga_statistics_create(m);
    assert_non_null(s);
    ga_observer observer = {s, NULL, 0};
    double plain = accumulate(m, &b, 1), observed;
    ga_real *gradients = reals(m->n_weights);
    memcpy(gradients, m->gradients, m->n_weights * sizeof *gradients);
    memset(m->gradients, 0, m->n_weights * sizeof *gradients);
    ga_error e;
    expect_ok(ga_forward_backward(m, b.tokens, b.targets, 2, 13, 1, &observer, &observed, &e), &e);
    assert_true(plain == observed);
    expect_same(m->gradients, gradients, m->n_weights, "gradients, observed");
    assert_true(ga_f_attn(s, GA_ALL) > 0 && ga_m_act(s, 0) > 0 && ga_gate_std(s, 0) > 0);
    free(gradients);
    ga_statistics_destroy(s);
    ga_destroy(m);
}

/* ---- generation ---------------------------------------------------------------------------------------------------- */

static void test_generator(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT(gates); i++) {
        ga_config c = tiny_config(gates[i]);
        ga_model *m = create(&c, GA_INFERENCE);
        randomise_weights(m, i);
        size_t T = c.max_seq_len, V = m->sizes.V;
        batch b = make_batch(m, 1, T, i);
        ga_error e;
        ga_statistics *whole = ga_statistics_create(m), *parts = ga_statistics_create(m);
        assert_true(whole && parts);
        ga_observer observer = {whole, NULL, 0};
        expect_ok(ga_forward(m, b.tokens, NULL, 1, T, &observer, NULL, &e), &e);
        ga_real *logits = reals(T * V), *row = reals(V);
        expect_ok(ga_logits(m, 0, T, logits, &e), &e);
        double *expected = (double *)calloc(T * V, sizeof *expected);
        assert_non_null(expected);
        for (size_t j = 0; j < T * V; j++) expected[j] = (double)logits[j];

        static const size_t chunks[] = {1, 3, 7, 20};
        ga_generator *g = ga_generator_create(m, T, &e);
        if (!g) fail_msg("ga_generator_create: %s", e.text);
        ga_generator_observe(g, parts);
        for (size_t j = 0; j < COUNT(chunks); j++) {
            ga_generator_reset(g);
            ga_statistics_reset(parts);
            for (size_t done = 0; done < T;) {
                size_t n = chunks[j] < T - done ? chunks[j] : T - done;
                expect_ok(ga_generator_feed(g, b.tokens + done, n, row, &e), &e);
                done += n;
                expect_below(difference(row, expected + (done - 1) * V, V), 1e-5,
                             "%s: logits after %zu tokens in chunks of %zu", gates[i], done, chunks[j]);
            }
            assert_int_equal(ga_generator_feed(g, b.tokens, 1, row, &e), GA_ERR_INPUT);
            for (size_t l = 0; l < c.n_layers; l++) {
                double a = ga_f_attn(parts, l), expected_a = ga_f_attn(whole, l);
                expect_below(fabs(a - expected_a), 1e-6, "%s: F-Attn of layer %zu in chunks", gates[i], l);
                expect_below(fabs(ga_m_act(parts, l) / ga_m_act(whole, l) - 1), 1e-5, "%s: M-Act", gates[i]);
                if (!whole->has_gate) continue;
                expect_below(fabs(ga_gate_mean(parts, l) - ga_gate_mean(whole, l)), 1e-6, "%s: gate mean", gates[i]);
            }
        }
        ga_statistics_destroy(whole);
        ga_statistics_destroy(parts);
        free(expected);
        free(logits);
        free(row);
        ga_generator_destroy(g);
        ga_destroy(m);
    }
}

static void test_generator_input(void **state) {
    (void)state;
    ga_config c = tiny_config("");
    ga_model *m = create(&c, GA_INFERENCE);
    ga_error e;
    assert_null(ga_generator_create(m, 21, &e));
    assert_int_equal(e.result, GA_ERR_INPUT);
    assert_null(ga_generator_create(m, 0, &e));
    ga_generator *g = ga_generator_create(m, 5, &e);
    assert_non_null(g);
    ga_real *row = reals(29);
    static const int32_t good[] = {1, 2, 3, 4, 5, 6}, bad[] = {3, 29};
    assert_int_equal(ga_generator_feed(g, good, 6, row, &e), GA_ERR_INPUT);
    assert_int_equal(ga_generator_feed(g, bad, 2, row, &e), GA_ERR_INPUT);
    assert_true(has_line(&e, "token"));
    expect_ok(ga_generator_feed(g, good, 5, row, &e), &e);
    assert_int_equal(ga_generator_feed(g, good, 1, row, &e), GA_ERR_INPUT);
    free(row);
    ga_generator_destroy(g);
    ga_destroy(m);
}

/* ---- sampling ------------------------------------------------------------------------------------------------------ */

enum { DRAWS = 60000, CHOICES = 8 };

static const double spread[CHOICES] = {1.2, -0.5, 2.0, 0.1, -1.0, 1.9, 0.6, -3.0};

static int32_t draw(ga_sampling s, uint64_t *random) {
    ga_real logits[CHOICES];
    for (size_t i = 0; i < CHOICES; i++) logits[i] = (ga_real)spread[i];
    return ga_sample(logits, CHOICES, s, random);
}

/* Draws against softmax(spread / temperature) over the `kept` likeliest: chi-square at p = 0.001. */
static void expect_frequencies(ga_sampling s, size_t kept) {
    static const double critical[CHOICES] = {0,     10.83, 13.82, 16.27,
                                             18.47, 20.52, 22.46, 24.32}; /* by degrees of freedom */
    double p[CHOICES], sum = 0, counts[CHOICES] = {0}, chi = 0;
    for (size_t i = 0; i < CHOICES; i++) {
        size_t rank = 0;
        for (size_t j = 0; j < CHOICES; j++) rank += spread[j] > spread[i];
        p[i] = rank < kept ? exp(spread[i] / s.temperature) : 0;
        sum += p[i];
    }
    uint64_t random = 12345;
    for (int i = 0; i < DRAWS; i++) {
        int32_t token = draw(s, &random);
        assert_in_range(token, 0, CHOICES - 1);
        counts[token]++;
    }
    for (size_t i = 0; i < CHOICES; i++) {
        double expected = DRAWS * p[i] / sum;
        if (p[i] == 0)
            assert_true(counts[i] == 0);
        else
            chi += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    expect_below(chi, critical[kept - 1], "chi-square of %zu choices", kept);
}

static void test_sampling(void **state) {
    (void)state;
    static const ga_sampling certain[] = {{0, 0, 1},    {0, 5, 0.5}, {1, 1, 1},    {3, 1, 1},
                                          {1, 0, 1e-9}, {2, 0, 0},   {1e-4, 0, 1}, {1, 2, 0.5}}; /* 0.35 of 0.66 */
    uint64_t random = 1;
    for (size_t i = 0; i < COUNT(certain); i++)
        for (int j = 0; j < 50; j++) assert_int_equal(draw(certain[i], &random), 2);

    expect_frequencies((ga_sampling){1, 0, 1}, CHOICES);
    expect_frequencies((ga_sampling){1, 100, 1}, CHOICES);
    expect_frequencies((ga_sampling){0.5, 0, 1}, CHOICES);
    expect_frequencies((ga_sampling){2, 3, 1}, 3);
    /* softmax(spread): 0.35, 0.31, 0.16 hold 0.82; the three likeliest are the fewest that reach 0.7 */
    expect_frequencies((ga_sampling){1, 0, 0.7}, 3);
    expect_frequencies((ga_sampling){1, 2, 0.99}, 2);

    uint64_t a = 77, b = 77;
    for (int i = 0; i < 100; i++) assert_int_equal(draw((ga_sampling){1, 0, 1}, &a), draw((ga_sampling){1, 0, 1}, &b));
    assert_true(a == b && a != 77);
    ga_real one[1] = {3}, ties[3] = {1, 1, 1};
    assert_int_equal(ga_sample(one, 1, (ga_sampling){1, 0, 1}, &a), 0);
    assert_in_range(ga_sample(ties, 3, (ga_sampling){0, 0, 1}, &a), 0, 2);
}

static void test_random_numbers(void **state) {
    (void)state;
    uint64_t random = 0;
    /* splitmix64 from 0, as published */
    assert_true(ga_random_bits(&random) == UINT64_C(0xe220a8397b1dcdaf));
    assert_true(ga_random_bits(&random) == UINT64_C(0x6e789e6aa1b965f4));
    double sum = 0, squares = 0, cubes = 0, uniform = 0;
    enum { N = 200000 };
    for (int i = 0; i < N; i++) {
        double u = ga_random_uniform(&random), x = ga_random_normal(&random);
        assert_true(u >= 0 && u < 1 && isfinite(x));
        uniform += u / N;
        sum += x / N;
        squares += x * x / N;
        cubes += x * x * x / N;
    }
    expect_near(uniform, 0.5, 0.004, "mean of a uniform number");
    expect_near(sum, 0, 0.012, "mean of a normal number");
    expect_near(squares, 1, 0.02, "variance of a normal number");
    expect_near(cubes, 0, 0.05, "skewness of a normal number");
}

/* ---- costs --------------------------------------------------------------------------------------------------------- */

static const char *dense_28 = "vocab_size=152064 d_model=2048 n_layers=28 n_heads=16 n_kv_heads=8 head_dim=128 "
                              "max_seq_len=4096 tied_embeddings=1";
static const char *seed_model = "vocab_size=32000 d_model=512 n_layers=6 n_heads=8 n_kv_heads=2 head_dim=64 d_ff=1376 "
                                "max_seq_len=512";

static ga_summary summary_of(const char *size, const char *more, ga_mode mode) {
    ga_config c = ga_config_default();
    configure(&c, size);
    configure(&c, more);
    ga_summary s;
    ga_error e;
    expect_ok(ga_summarize(&c, mode, &s, &e), &e);
    return s;
}

static void test_parameter_counts(void **state) {
    (void)state;
    static const struct {
        const char **size, *more;
        size_t parameters, gate, embedding;
    } rows[] = {
        {&dense_28, "gate_position=none d_ff=6144", 1720837120, 0, 311427072},
        {&dense_28, "gate_position=G1 gate_type=headwise d_ff=6144", 1721754624, 917504, 311427072},
        {&dense_28, "gate_position=G1 d_ff=5504", 1728177152, 117440512, 311427072},
        {&seed_model, "gate_position=G1", 50961664, 1572864, 32768000},
        {&seed_model, "gate_position=none", 49388800, 0, 32768000},
        {&seed_model, "gate_position=G2 gate_type=headwise", 49394944, 6144, 32768000},
        {&seed_model, "gate_position=G1 gate_input=none", 49391872, 3072, 32768000},
        {&seed_model, "gate_position=G1 gate_input=scalar", 49388806, 6, 32768000},
        {&seed_model, "gate_position=G5", 50961664, 1572864, 32768000},
        {&seed_model, "gate_position=none switch_heads=v", 50593024, 0, 32768000},
        {&seed_model, "gate_position=none switch_heads=v switch_experts=1 switch_top_k=1", 49394944, 0, 32768000},
        {&seed_model, "gate_position=G1 gate_type=headwise gate_input_dims=12", 49389376, 576, 32768000},
        {&seed_model, "gate_position=none attention_sink=learned", 49388848, 0, 32768000},
        /* 6 layers of 7 more FFNs and a router of 8 x 512 */
        {&seed_model, "gate_position=none n_experts=8", 49388800 + 6 * (7 * 3 * 1376 * 512 + 4096), 0, 32768000},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        ga_summary s = summary_of(*rows[i].size, rows[i].more, GA_TRAINING);
        if (s.parameters != rows[i].parameters || s.gate_parameters != rows[i].gate)
            fail_msg("%s: %zu parameters, %zu of the gate", rows[i].more, s.parameters, s.gate_parameters);
        assert_int_equal(s.embedding_parameters, rows[i].embedding);
        assert_int_equal(s.weight_bytes, s.parameters * sizeof(ga_real));
        assert_int_equal(s.optimizer_bytes, 2 * s.weight_bytes);
    }
}

/* 2 FLOP per weight that multiplies, attention on average over (T + 1) / 2 keys, the backward pass twice the
 * forward. */
static void test_flops(void **state) {
    (void)state;
    ga_summary s = summary_of(seed_model, "gate_position=G1", GA_TRAINING);
    double products = 2.0 * (50961664 - 32000.0 * 512 - 6 * 1152 - 512), attention = 6 * 2 * 2.0 * 512 * 512 / 2;
    expect_near(s.forward_flops / (products + attention), 1, 0.01, "forward FLOP of a token");
    expect_near(s.training_flops / s.forward_flops, 3, 0.2, "training over forward FLOP");
}

/* Cost follows the activated parameters: with 2 of 8 experts of half the width it is that of the dense
 * model and routers. */
static void test_activated(void **state) {
    (void)state;
    ga_summary dense = summary_of(seed_model, "gate_position=G1", GA_TRAINING);
    ga_summary mixture =
        summary_of(seed_model, "gate_position=G1 n_experts=8 experts_per_token=2 d_ff=688", GA_TRAINING);
    size_t routers = 6 * 8 * 512;
    assert_int_equal(dense.activated_parameters, dense.parameters);
    assert_int_equal(mixture.activated_parameters, dense.parameters + routers);
    assert_int_equal(mixture.parameters, mixture.activated_parameters + 6 * 6 * 3 * 688 * 512);
    expect_near(mixture.forward_flops, dense.forward_flops + 2.0 * (double)routers, 1e-12, "forward FLOP of a mixture");
}

/* Counts of the whole step: over its micro-batches, cleared by the update, untouched by evaluations. */
static void test_routing(void **state) {
    (void)state;
    for (int recompute = 0; recompute < 2; recompute++) {
        ga_config c = tiny_config("n_experts=5 experts_per_token=2");
        c.recompute = recompute;
        ga_model *m = create(&c, GA_TRAINING);
        batch a = make_batch(m, 2, 13, 1), b = make_batch(m, 1, 9, 2);
        ga_statistics *s = ga_statistics_create(m);
        assert_non_null(s);
        ga_observer observer = {s, NULL, 0};
        ga_error e;
        assert_true(isnan(ga_routing_of(m, GA_ALL).load_balance));
        expect_ok(ga_forward_backward(m, a.tokens, a.targets, 2, 13, 1, &observer, NULL, &e), &e);
        evaluate(m, &a);
        expect_ok(ga_forward_backward(m, b.tokens, b.targets, 1, 9, 1, &observer, NULL, &e), &e);
        double most = 0, least = 1e9, mean = 0;
        for (size_t l = 0; l < 2; l++) {
            double sum = 0, top = 0, dead = 0;
            for (size_t i = 0; i < 5; i++) {
                int32_t rows = m->expert_counts[l * 5 + i];
                assert_true(rows == (int32_t)ga_expert_rows(s, l, i));
                expect_near(ga_expert_load(s, l, i), rows * 5.0 / (2 * 35), 1e-12, "load of an expert");
                sum += rows, top = fmax(top, rows), dead += rows == 0;
            }
            assert_true(sum == 2 * 35);
            ga_routing r = ga_routing_of(m, l);
            expect_near(r.max_load, top * 5 / 70, 1e-12, "largest load");
            expect_near(r.dead, dead / 5, 1e-12, "share of dead experts");
            expect_near(ga_expert_max_load(s, l), r.max_load, 1e-12, "largest load, observed");
            expect_near(ga_expert_dead(s, l), r.dead, 1e-12, "dead experts, observed");
            assert_true(r.load_balance > 1.5 && r.load_balance < 5); /* 2 when the load is even */
            most = fmax(most, r.router_z), least = fmin(least, r.router_z), mean += r.router_z / 2;
        }
        assert_true(least > 0);
        for (size_t i = 0; i < 5; i++) {
            double rows = ga_expert_rows(s, 0, i) + ga_expert_rows(s, 1, i);
            expect_near(ga_expert_rows(s, GA_ALL, i), rows / 2, 1e-12, "rows of an expert, mean over the layers");
            expect_near(ga_expert_load(s, GA_ALL, i), rows / 2 * 5 / 70, 1e-12, "load, mean over the layers");
        }
        expect_near(ga_routing_of(m, GA_ALL).router_z, mean, 1e-9, "z-loss of all layers");
        update(m, 1e-3);
        for (size_t i = 0; i < 10; i++) assert_true(m->expert_counts[i] == 0);
        assert_true(isnan(ga_routing_of(m, 1).max_load));
        ga_statistics_destroy(s);
        ga_destroy(m);
    }
    ga_config dense = tiny_config("");
    ga_model *m = create(&dense, GA_TRAINING);
    assert_true(isnan(ga_routing_of(m, GA_ALL).dead));
    ga_destroy(m);
}

/* The balancing loss alone evens the load out, and counts over a step of several micro-batches. */
static void test_balancing(void **state) {
    (void)state;
    ga_config c = tiny_config("n_experts=8 experts_per_token=2 n_layers=1 learning_rate=1e-2 init_std=0.5");
    double before = 0, after[2];
    for (int on = 0; on < 2; on++) {
        c.load_balance_coef = on ? 1 : 0;
        ga_model *m = create(&c, GA_TRAINING);
        for (uint64_t step = 0; step < 60; step++) {
            for (uint64_t k = 0; k < 2; k++) {
                batch b = make_batch(m, 2, 20, 2 * (step % 4) + k);
                accumulate(m, &b, 0.5);
            }
            if (step == 0) before = ga_routing_of(m, 0).max_load;
            after[on] = ga_routing_of(m, 0).max_load;
            update(m, 1e-2);
        }
        ga_destroy(m);
    }
    if (!(after[1] < 1.4 && after[1] < after[0] - 0.2)) /* 40 rows an expert: 1.2 by chance */
        fail_msg("largest load %.2f at the start, %.2f without the loss, %.2f with it", before, after[0], after[1]);
}

static void test_memory_figures(void **state) {
    (void)state;
    static const char *settings[] = {
        "",
        "recompute=1",
        "gate_position=none tied_embeddings=1",
        "sandwich_norm=1 attn_clip=1 ffn_clip=1",
        "attention_sink=one",
        "gate_position=G2",
        "gate_position=G2 gate_input_dims=5",
        "n_experts=6 experts_per_token=3",
        "n_experts=6 experts_per_token=3 recompute=1",
        "switch_heads=kv",
        "vocab_size=2000 d_model=64 n_layers=5 max_seq_len=200 head_dim=32",
    };
    for (size_t i = 0; i < COUNT(settings); i++)
        for (int mode = GA_TRAINING; mode <= GA_INFERENCE; mode++) {
            ga_config c = tiny_config(settings[i]);
            ga_summary s;
            ga_error e;
            expect_ok(ga_summarize(&c, (ga_mode)mode, &s, &e), &e);
            reset_heap(0);
            size_t before = heap.bytes;
            ga_model *m = create(&c, (ga_mode)mode);
            if (mode == GA_TRAINING) {
                batch b = make_batch(m, 2, 20, 1);
                accumulate(m, &b, 1);
                update(m, 1e-3);
            }
            size_t taken = heap.most_bytes - before, slack = 16384;
            if (!(s.total_bytes + slack >= taken && s.total_bytes <= taken + slack))
                fail_msg("'%s' mode %d: %zu bytes announced, %zu taken", settings[i], mode, s.total_bytes, taken);
            assert_int_equal(s.total_bytes, s.weight_bytes + s.gradient_bytes + s.optimizer_bytes + s.activation_bytes);
            ga_destroy(m);
            assert_int_equal(heap.bytes, before);
        }
}

/* ---- memory runs out ----------------------------------------------------------------------------------------------- */

/* Everything that allocates, one after the other. */
static ga_result allocate_everything(ga_error *e) {
    ga_config c = tiny_config("");
    ga_result result = GA_ERR_MEMORY;
    ga_generator *g = NULL;
    ga_statistics *s = NULL;
    ga_model *m = ga_create(&c, NULL, GA_TRAINING, e);
    if (!m) return e->result;
    batch b = make_batch(m, 2, 20, 1);
    double loss;
    s = ga_statistics_create(m);
    if (!s) goto done;
    ga_observer observer = {s, NULL, 0};
    result = ga_forward_backward(m, b.tokens, b.targets, 2, 20, 1, &observer, &loss, e);
    if (result != GA_OK) goto done;
    result = ga_update(m, 1e-3, &loss, e);
    if (result != GA_OK) goto done;
    g = ga_generator_create(m, 10, e);
    result = g ? GA_OK : e->result;
    if (!g) goto done;
    ga_real logits[29];
    result = ga_generator_feed(g, b.tokens, 3, logits, e);
done:
    ga_generator_destroy(g);
    ga_statistics_destroy(s);
    ga_destroy(m);
    return result;
}

static void test_memory_runs_out(void **state) {
    (void)state;
    size_t before = heap.blocks, calls;
    ga_error e;
    reset_heap(0);
    assert_int_equal(allocate_everything(&e), GA_OK);
    calls = heap.calls;
    assert_true(calls >= 6);
    for (size_t k = 1; k <= calls; k++) {
        reset_heap(k);
        e.result = GA_OK;
        if (allocate_everything(&e) != GA_ERR_MEMORY) fail_msg("allocation %zu of %zu failed without notice", k, calls);
        if (heap.blocks != before) fail_msg("allocation %zu of %zu: %zu blocks leaked", k, calls, heap.blocks - before);
    }
    reset_heap(0);
    ga_destroy(NULL);
    ga_generator_destroy(NULL);
    ga_statistics_destroy(NULL);
}

/* A device of one's own: every tensor comes from it and goes back to it. */
typedef struct {
    size_t calls, live, refused;
    ga_device cpu;
} shelf;

static void *take(void *state, size_t bytes) {
    shelf *s = (shelf *)state;
    if (++s->calls == s->refused) return NULL;
    s->live++;
    return s->cpu.allocate(s->cpu.state, bytes);
}

static void put_back(void *state, void *p) {
    shelf *s = (shelf *)state;
    if (p) s->live--;
    s->cpu.release(s->cpu.state, p);
}

static void test_device_memory(void **state) {
    (void)state;
    ga_config c = tiny_config("");
    for (size_t refused = 0;; refused++) {
        shelf s = {0, 0, refused, ga_device_cpu()};
        ga_device device = s.cpu;
        device.state = &s;
        device.allocate = take;
        device.release = put_back;
        ga_error e = {GA_OK, ""};
        ga_model *m = ga_create(&c, &device, GA_TRAINING, &e);
        if (!m) assert_int_equal(e.result, GA_ERR_MEMORY);
        bool reached = s.calls >= refused;
        assert_true(!m == (refused > 0 && reached));
        ga_destroy(m);
        assert_int_equal(s.live, 0);
        if (!reached) break;
        assert_true(s.calls > 0);
    }
}

static void test_impossible_size(void **state) {
    (void)state;
    ga_config c = ga_config_default();
    configure(&c,
              "vocab_size=16777216 d_model=65536 n_layers=1024 n_heads=1024 n_kv_heads=1024 head_dim=256 d_ff=1048576 "
              "max_seq_len=16777216 batch_size=65536");
    ga_summary s;
    ga_error e = {GA_OK, ""};
    /* either the sizes fit into size_t and the figures are honest, or it is refused */
    if (ga_summarize(&c, GA_TRAINING, &s, &e) == GA_OK) assert_true(s.total_bytes / 16 > s.parameters / 2);
    assert_null(ga_create(&c, NULL, GA_TRAINING, &e));
    assert_true(e.result == GA_ERR_MEMORY || e.result == GA_ERR_CONFIG);

    /* rows of a mixture are counted in 32 bits */
    c = tiny_config("n_experts=64 experts_per_token=32 batch_size=65536 max_seq_len=1024");
    assert_int_equal(ga_summarize(&c, GA_TRAINING, &s, &e), GA_ERR_CONFIG);
    assert_true(has_line(&e, "experts_per_token"));
    c.experts_per_token = 16;
    assert_int_equal(ga_summarize(&c, GA_TRAINING, &s, &e), GA_OK);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_keys_round_trip),
        cmocka_unit_test(test_values_round_trip),
        cmocka_unit_test(test_bad_values),
        cmocka_unit_test(test_refused_combinations),
        cmocka_unit_test(test_refused_members),
        cmocka_unit_test(test_paper_combinations),
        cmocka_unit_test(test_config_file),
        cmocka_unit_test(test_bad_config_files),
        cmocka_unit_test(test_hostile_config_files),
        cmocka_unit_test(test_chains_of_config_files),
        cmocka_unit_test(test_bad_input),
        cmocka_unit_test(test_ignored_targets),
        cmocka_unit_test(test_two_models_at_once),
        cmocka_unit_test(test_modes_agree),
        cmocka_unit_test(test_accumulation),
        cmocka_unit_test(test_replay),
        cmocka_unit_test(test_thread_counts),
        cmocka_unit_test(test_tensors),
        cmocka_unit_test(test_seeds),
        cmocka_unit_test(test_free_gate_starts_at_zero),
        cmocka_unit_test(test_decay),
        cmocka_unit_test(test_yarn),
        cmocka_unit_test(test_all_channels),
        cmocka_unit_test(test_frozen_gate),
        cmocka_unit_test(test_update),
        cmocka_unit_test(test_divergence),
        cmocka_unit_test(test_learns),
        cmocka_unit_test(test_statistics),
        cmocka_unit_test(test_observer),
        cmocka_unit_test(test_generator),
        cmocka_unit_test(test_generator_input),
        cmocka_unit_test(test_sampling),
        cmocka_unit_test(test_random_numbers),
        cmocka_unit_test(test_parameter_counts),
        cmocka_unit_test(test_flops),
        cmocka_unit_test(test_activated),
        cmocka_unit_test(test_routing),
        cmocka_unit_test(test_balancing),
        cmocka_unit_test(test_memory_figures),
        cmocka_unit_test(test_memory_runs_out),
        cmocka_unit_test(test_device_memory),
        cmocka_unit_test(test_impossible_size),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    use_default_threads();
    return cmocka_run_group_tests_name("model", tests, NULL, NULL);
}
