/* Checkpoints: what is written comes back bit for bit; Hugging Face directories give PyTorch's logits; files that are
 * damaged, false or hostile get one clear line; a save that fails, or is killed, loses nothing.
 *
 *     test_checkpoint [PATTERN]
 */
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>

/* The header's heap: blocks are counted, and one call can be refused. */
static struct { size_t calls, blocks, refused; /* refused: number of the call that fails, from 1; 0: none */ } heap;

static void *counted_malloc(size_t size) {
    void *p = ++heap.calls == heap.refused ? NULL : malloc(size);
    heap.blocks += p != NULL;
    return p;
}

static void counted_free(void *p) {
    heap.blocks -= p != NULL;
    free(p);
}

/* Where files cannot be mapped they are read. */
#include <stdbool.h>
#include <sys/mman.h>
static bool refuse_mmap;
#define mmap(at, size, protection, flags, file, offset) \
    (refuse_mmap ? MAP_FAILED : mmap(at, size, protection, flags, file, offset))

#define GA_MALLOC(size) counted_malloc(size)
#define GA_FREE(p)      counted_free(p)
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"
#include "testing.h"
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

static const char *tiny = "vocab_size=13 d_model=12 n_layers=2 n_heads=4 n_kv_heads=2 head_dim=6 d_ff=10 max_seq_len=8 "
                          "batch_size=2 rope_base=1234.5 norm_eps=1e-5";

/* ---- files ---------------------------------------------------------------------------------------------------------- */

static char root[64]; /* everything below is written here */

/* The path of a name below root, which stays valid. */
static const char *in_root(const char *name) {
    static char paths[128][160];
    size_t length = strlen(root), i = 0;
    while (i < COUNT(paths) && paths[i][0] && strcmp(paths[i] + length + 1, name) != 0) i++;
    assert_true(i < COUNT(paths) && length + strlen(name) + 2 <= sizeof paths[i]);
    snprintf(paths[i], sizeof paths[i], "%s/%s", root, name);
    return paths[i];
}

static void remove_tree(const char *path) {
    struct stat s;
    if (lstat(path, &s) != 0) return;
    DIR *d = S_ISDIR(s.st_mode) ? opendir(path) : NULL;
    for (struct dirent *entry; d && (entry = readdir(d)) != NULL;) {
        char inner[1024];
        snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name);
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) remove_tree(inner);
    }
    if (d) closedir(d);
    remove(path);
}

static int make_root(void **state) {
    (void)state;
    const char *temporary = getenv("TMPDIR");
    snprintf(root, sizeof root, "%s/ga-checkpoint-XXXXXX", temporary ? temporary : "/tmp");
    return mkdtemp(root) ? 0 : -1;
}

static int remove_root(void **state) {
    (void)state;
    remove_tree(root);
    return 0;
}

typedef struct {
    unsigned char *bytes; /* a zero byte follows */
    size_t size;
} contents;

static contents read_file(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("cannot open %s", path);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    contents c = {NULL, (size_t)ftell(f)};
    rewind(f);
    c.bytes = (unsigned char *)calloc(1, c.size + 1);
    assert_non_null(c.bytes);
    assert_int_equal(fread(c.bytes, 1, c.size, f), c.size);
    fclose(f);
    return c;
}

/* Removed first: ext4 waits for the disk when a file is overwritten. */
static void write_file(const char *path, const void *bytes, size_t size) {
    remove(path);
    FILE *f = fopen(path, "wb");
    if (!f) fail_msg("cannot create %s", path);
    assert_int_equal(fwrite(bytes, 1, size, f), size);
    assert_int_equal(fclose(f), 0);
}

static void copy_file(const char *from, const char *to) {
    contents c = read_file(from);
    write_file(to, c.bytes, c.size);
    free(c.bytes);
}

static void copy_directory(const char *from, const char *to) {
    remove_tree(to);
    assert_int_equal(mkdir(to, 0777), 0);
    DIR *d = opendir(from);
    if (!d) fail_msg("cannot open %s", from);
    for (struct dirent *entry; (entry = readdir(d)) != NULL;) {
        char a[1024], b[1024];
        if (entry->d_name[0] == '.') continue;
        snprintf(a, sizeof a, "%s/%s", from, entry->d_name);
        snprintf(b, sizeof b, "%s/%s", to, entry->d_name);
        copy_file(a, b);
    }
    closedir(d);
}

static bool exists(const char *path) {
    struct stat s;
    return lstat(path, &s) == 0;
}

static uint64_t little_endian(const unsigned char *p, size_t n) {
    uint64_t x = 0;
    while (n-- > 0) x = x << 8 | p[n];
    return x;
}

/* header and data as a safetensors file */
static void write_tensors(const char *path, const char *header, size_t header_size, const void *data, size_t size) {
    unsigned char *bytes = (unsigned char *)malloc(8 + header_size + size);
    assert_non_null(bytes);
    for (size_t i = 0; i < 8; i++) bytes[i] = (unsigned char)((uint64_t)header_size >> (8 * i));
    memcpy(bytes + 8, header, header_size);
    if (size > 0) memcpy(bytes + 8 + header_size, data, size);
    write_file(path, bytes, 8 + header_size + size);
    free(bytes);
}

/* Replaces the first `old` in a text of *size bytes, which it frees. */
static char *substitute(char *text, size_t *size, const char *old, const char *new_text) {
    char *at = strstr(text, old);
    if (!at) fail_msg("nothing to replace: %s", old);
    size_t before = (size_t)(at - text), gone = strlen(old), come = strlen(new_text);
    char *result = (char *)calloc(1, *size - gone + come + 1);
    assert_non_null(result);
    memcpy(result, text, before);
    memcpy(result + before, new_text, come);
    memcpy(result + before + come, at + gone, *size - before - gone);
    *size += come - gone;
    free(text);
    return result;
}

static void edit_text(const char *path, const char *old, const char *new_text) {
    contents c = read_file(path);
    char *text = substitute((char *)c.bytes, &c.size, old, new_text);
    write_file(path, text, c.size);
    free(text);
}

/* Edits the JSON of a safetensors file; its length and the data follow. */
static void edit_header(const char *path, const char *old, const char *new_text) {
    contents c = read_file(path);
    size_t length = (size_t)little_endian(c.bytes, 8), data = c.size - 8 - length;
    char *header = (char *)calloc(1, length + 1);
    assert_non_null(header);
    memcpy(header, c.bytes + 8, length);
    size_t edited = length;
    header = substitute(header, &edited, old, new_text);
    write_tensors(path, header, edited, c.bytes + 8 + length, data);
    free(header);
    free(c.bytes);
}

/* Appends a tensor whose values are n bytes at `values`. */
static void append_tensor(const char *path, const char *name, const char *dtype, const char *shape, const void *values,
                          size_t n) {
    contents c = read_file(path);
    size_t length = (size_t)little_endian(c.bytes, 8), data = c.size - 8 - length;
    while (c.bytes[8 + length - 1] == ' ') length--;
    char *header = (char *)malloc(length + 512);
    unsigned char *all = (unsigned char *)malloc(data + n);
    assert_true(header && all);
    memcpy(header, c.bytes + 8, length - 1);
    int more = snprintf(header + length - 1, 512, ",\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}}",
                        name, dtype, shape, data, data + n);
    memcpy(all, c.bytes + c.size - data, data);
    memcpy(all + data, values, n);
    write_tensors(path, header, length - 1 + (size_t)more, all, data + n);
    free(header);
    free(all);
    free(c.bytes);
}

/* The bytes of a tensor in a file that was read whole, and the opening of its entry. */
static const unsigned char *find_tensor(const contents *c, const char *name, const char *opening) {
    char entry[256];
    size_t begin = 0, end = 0;
    snprintf(entry, sizeof entry, "\"%s\":{%s", name, opening);
    const char *at = strstr((const char *)c->bytes + 8, entry);
    if (!at) return NULL;
    at = strstr(at, "\"data_offsets\":[");
    assert_non_null(at);
    assert_int_equal(sscanf(at, "\"data_offsets\":[%zu,%zu]", &begin, &end), 2);
    size_t data = 8 + (size_t)little_endian(c->bytes, 8);
    assert_true(begin <= end && end <= c->size - data);
    return c->bytes + data + begin;
}

/* ---- models --------------------------------------------------------------------------------------------------------- */

static ga_model *make_model(const char *settings, ga_mode mode, uint64_t seed) {
    ga_config c = ga_config_default();
    configure(&c, tiny);
    configure(&c, settings);
    ga_model *m = create(&c, mode);
    randomise_weights(m, seed);
    uint64_t random = seed + 99;
    if (mode == GA_TRAINING) {
        fill_normal(m->moment1, m->n_weights, 0, 1e-3, &random);
        fill_normal(m->moment2, m->n_weights, 1e-6, 1e-7, &random);
        m->updates = 4000000000000 + seed;
    }
    return m;
}

static void save(ga_model *m, const char *directory, const ga_training_state *state) {
    ga_error e;
    expect_ok(ga_save(m, directory, state, &e), &e);
}

static ga_model *load(const char *directory, ga_mode mode, ga_training_state *state) {
    ga_error e;
    ga_config c = ga_config_default();
    c.batch_size = 2;
    expect_ok(ga_load_config(&c, directory, false, &e), &e);
    ga_model *m = create(&c, mode);
    expect_ok(ga_load(m, directory, state, &e), &e);
    return m;
}

static void expect_same_model(const ga_model *a, const ga_model *b, bool moments) {
    size_t bytes = a->n_weights * sizeof(ga_real);
    assert_int_equal(a->n_weights, b->n_weights);
    assert_memory_equal(a->weights, b->weights, bytes);
    if (!moments) return;
    assert_memory_equal(a->moment1, b->moment1, bytes);
    assert_memory_equal(a->moment2, b->moment2, bytes);
    assert_true(a->updates == b->updates);
}

static void expect_same_keys(const ga_config *a, const ga_config *b) {
    ga_key key;
    for (size_t i = 0; ga_config_key(i, &key); i++) {
        char x[GA_TEXT], y[GA_TEXT];
        if (strcmp(key.group, "MODEL") != 0 && strcmp(key.group, "GATE") != 0) continue;
        ga_config_get(a, key.name, x, sizeof x);
        ga_config_get(b, key.name, y, sizeof y);
        if (strcmp(x, y) != 0) fail_msg("%s is %s, was %s", key.name, y, x);
    }
}

static const ga_training_state some_state = {123, UINT64_MAX, 9007199254740993, 0xfedcba9876543210, 2.0 / 3};

static void expect_same_state(const ga_training_state *a, const ga_training_state *b) {
    assert_true(a->step == b->step && a->windows == b->windows && a->tokens == b->tokens && a->random == b->random);
    assert_memory_equal(&a->best_val_loss, &b->best_val_loss, sizeof a->best_val_loss);
}

/* One clear line that has `word` in it. */
static void expect_failure(ga_result result, const ga_error *e, ga_result expected, const char *word,
                           const char *what) {
    if (result != expected || e->result != expected || !strstr(e->text, word))
        fail_msg("%s: result %d (%s), expected %d (... %s ...)", what, (int)result, result ? e->text : "",
                 (int)expected, word);
    if (strpbrk(e->text, "\r\n\t\033")) fail_msg("%s: not one line: %s", what, e->text);
}

/* ---- there and back ------------------------------------------------------------------------------------------------- */

static const char *const gates[] = {
    "gate_position=none",
    "gate_type=elementwise",
    "gate_type=headwise",
    "gate_type=elementwise n_kv_heads=4",
    "gate_type=headwise n_kv_heads=1",
    "gate_position=G2 gate_type=elementwise",
    "gate_position=G2 gate_type=headwise gate_form=additive gate_activation=silu",
    "gate_position=G3 gate_sharing=shared",
    "gate_position=G4",
    "gate_position=G5",
    "gate_sharing=shared",
    "gate_activation=ns-sigmoid",
    "gate_form=additive gate_activation=identity",
    "gate_input=none",
    "gate_input=scalar",
    "gate_form=self gate_activation=rmsnorm",
    "n_experts=3 experts_per_token=2 gate_type=headwise",
    "n_experts=4 experts_per_token=1 normalize_top_k=0 load_balance_coef=0.25 router_z_coef=0 gate_position=none",
    "gate_frozen=1 gate_init_std=0.25",
    "tied_embeddings=1 gate_type=headwise",
    "sandwich_norm=1 attn_clip=1.5 ffn_clip=0.1 qk_norm=0",
    "attention_sink=learned",
    "attention_sink=one gate_position=none",
    "gate_input_dims=5",
    "gate_position=none switch_heads=kv switch_experts=3 switch_top_k=2",
    "switch_heads=v",
    "rope_factor=2.5 rope_original_length=3 rope_beta_fast=8 rope_attention_factor=1.5",
};

static void test_round_trip(void **state) {
    (void)state;
    const char *directory = in_root("round/trip/here///");
    int32_t tokens[16];
    uint64_t random = 5;
    fill_tokens(tokens, COUNT(tokens), 13, &random);
    for (size_t i = 0; i < COUNT(gates); i++) {
        ga_error e;
        ga_training_state back;
        ga_model *a = make_model(gates[i], GA_TRAINING, i);
        save(a, directory, &some_state);
        assert_true(ga_checkpoint_exists(directory, true));
        ga_model *b = load(directory, GA_TRAINING, &back);
        expect_same_keys(&a->config, &b->config);
        expect_same_model(a, b, true);
        expect_same_state(&some_state, &back);
        ga_real *x = reals(16 * 13), *y = reals(16 * 13);
        expect_ok(ga_forward(a, tokens, NULL, 2, 8, NULL, NULL, &e), &e);
        expect_ok(ga_forward(b, tokens, NULL, 2, 8, NULL, NULL, &e), &e);
        expect_ok(ga_logits(a, 0, 16, x, &e), &e);
        expect_ok(ga_logits(b, 0, 16, y, &e), &e);
        assert_memory_equal(x, y, 16 * 13 * sizeof *x);
        free(x);
        free(y);
        ga_destroy(a);
        ga_destroy(b);
    }
    assert_false(exists(in_root("round/trip/here.partial")));
    assert_false(exists(in_root("round/trip/here.replaced")));
}

/* Group k of q_proj: the R * D query rows of heads kR .. kR + R-1, then their gate rows. Heads are told
 * apart by value. */
static void check_packing(const char *settings, size_t gate_rows_of_head) {
    const size_t C = 12, D = 6, R = 2, groups = 2;
    const char *directory = in_root("packing");
    ga_model *m = make_model(settings, GA_TRAINING, 3);
    const ga_tensor *q = ga_find_tensor(m, GA_TENSOR_query, 1), *g = ga_find_tensor(m, GA_TENSOR_gate_weight, 1);
    for (size_t i = 0; i < q->rows * C; i++) m->weights[q->offset + i] = (ga_real)(i / C);        /* its own row */
    for (size_t i = 0; i < g->rows * C; i++) m->weights[g->offset + i] = (ga_real)(1000 + i / C); /* 1000 + row */
    save(m, directory, NULL);
    contents c = read_file(in_root("packing/model.safetensors"));
    assert_null(find_tensor(&c, "model.layers.1.self_attn.gate.weight", ""));
    const char *type = sizeof(ga_real) == 8 ? "\"dtype\":\"F64\"" : "\"dtype\":\"F32\"";
    const unsigned char *bytes = find_tensor(&c, "model.layers.1.self_attn.q_proj.weight", type);
    assert_non_null(bytes);
    size_t row = 0;
    for (size_t k = 0; k < groups; k++)
        for (size_t part = 0; part < 2; part++)
            for (size_t h = k * R; h < (k + 1) * R; h++) {
                size_t rows = part == 0 ? D : gate_rows_of_head;
                for (size_t i = 0; i < rows; i++, row++)
                    for (size_t column = 0; column < C; column++) {
                        ga_real value, expected = (ga_real)((part == 0 ? 0 : 1000) + h * rows + i);
                        memcpy(&value, bytes + (row * C + column) * sizeof value, sizeof value);
                        assert_true(value == expected);
                    }
            }
    free(c.bytes);
    ga_destroy(m);
}

static void test_packing(void **state) {
    (void)state;
    check_packing("gate_type=headwise", 1);
    check_packing("gate_type=elementwise", 6);
}

/* Anything that q_proj cannot say keeps a tensor of its own, and both switches are off. */
static void test_other_gates_stay_apart(void **state) {
    (void)state;
    static const char *const others[][2] = {
        {"gate_position=G2", "[12,12]"},   {"gate_activation=silu", "[24,12]"}, {"gate_sharing=shared", "[24,12]"},
        {"gate_form=additive", "[24,12]"}, {"gate_input=none", "[1,24]"},       {"gate_input_dims=5", "[24,5]"},
    };
    for (size_t i = 0; i < COUNT(others); i++) {
        char opening[64];
        ga_model *m = make_model(others[i][0], GA_INFERENCE, 1);
        save(m, in_root("apart"), NULL);
        contents c = read_file(in_root("apart/model.safetensors")), config = read_file(in_root("apart/config.json"));
        snprintf(opening, sizeof opening, "\"dtype\":\"%s\",\"shape\":%s", sizeof(ga_real) == 8 ? "F64" : "F32",
                 others[i][1]);
        assert_non_null(find_tensor(&c, "model.layers.0.self_attn.gate.weight", opening));
        assert_int_equal(little_endian(c.bytes, 8) % 8, 0); /* the values are aligned */
        assert_non_null(strstr((char *)config.bytes, "\"headwise_attn_output_gate\": false"));
        assert_non_null(strstr((char *)config.bytes, "\"elementwise_attn_output_gate\": false"));
        free(c.bytes);
        free(config.bytes);
        ga_destroy(m);
    }
}

static void test_special_values(void **state) {
    (void)state;
    ga_model *m = make_model("", GA_TRAINING, 1);
    const ga_real values[] = {NAN, -NAN, INFINITY, -INFINITY, -0.0, (ga_real)1e-44, (ga_real)3.4e38};
    memcpy(m->weights, values, sizeof values);
    memcpy(m->moment1, values, sizeof values);
    const double losses[] = {INFINITY, NAN, -INFINITY, 0, -1e-300, 1.7976931348623157e308, 4.9e-324};
    for (size_t i = 0; i < COUNT(losses); i++) {
        ga_training_state there = some_state, back;
        there.best_val_loss = losses[i];
        save(m, in_root("special"), &there);
        ga_model *b = load(in_root("special"), GA_TRAINING, &back);
        expect_same_model(m, b, true);
        if (!isfinite(there.best_val_loss)) there.best_val_loss = INFINITY; /* "none yet" */
        expect_same_state(&there, &back);
        ga_destroy(b);
    }
    ga_destroy(m);
}

/* Larger than the buffer through which values pass, and not a multiple of it. */
static void test_large_tensor(void **state) {
    (void)state;
    ga_model *m = make_model("vocab_size=23456", GA_INFERENCE, 1);
    assert_true(ga_find_tensor(m, GA_TENSOR_embed, GA_ALL)->rows * 12 > 2 * GAI_CHUNK);
    save(m, in_root("large"), NULL);
    ga_model *b = load(in_root("large"), GA_INFERENCE, NULL);
    expect_same_model(m, b, false);
    ga_destroy(m);
    ga_destroy(b);
}

/* Mapped weights of more than one chunk, a batch of more rows than are looked up at a time. */
static void test_large_mapped(void **state) {
    (void)state;
    enum { B = 2, T = 256, V = 23456 };
    ga_model *m = make_model("vocab_size=23456 max_seq_len=256 batch_size=2", GA_INFERENCE, 1);
    save(m, in_root("large_mapped"), NULL);
    ga_model *b = load(in_root("large_mapped"), GA_MAPPED, NULL);
    int32_t *tokens = calloc(2 * B * T, sizeof *tokens);
    assert_non_null(tokens);
    for (size_t i = 0; i < 2 * B * T; i++) tokens[i] = (int32_t)(i * 7919 % V);
    double loss[2];
    ga_error e;
    ga_model *models[] = {m, b};
    for (int i = 0; i < 2; i++) expect_ok(ga_forward(models[i], tokens, tokens + B * T, B, T, NULL, &loss[i], &e), &e);
    assert_true(loss[0] == loss[1]);
    for (size_t i = 0; i < B * T; i++) assert_true(m->losses[i] == b->losses[i]);
    free(tokens);
    ga_destroy(m);
    ga_destroy(b);
}

/* ---- mapped weights -------------------------------------------------------------------------------------------------- */

/* Everything that a model computes without gradients: losses, logits, statistics, a map, generated logits. */
typedef struct {
    double loss, f_attn, gate_mean;
    ga_real *logits, *generated;
    double map[64];
} outputs;

static outputs run_model(ga_model *m, const int32_t *tokens) {
    ga_error e;
    size_t V = m->sizes.V;
    outputs o = {.logits = reals(16 * V), .generated = reals(V)};
    int32_t targets[16];
    for (size_t i = 0; i < COUNT(targets); i++) targets[i] = tokens[COUNT(targets) - 1 - i];
    ga_statistics *statistics = ga_statistics_create(m);
    ga_map map = {.layer = m->sizes.L - 1, .head = GA_ALL, .T = 8, .p = o.map};
    ga_observer observer = {.statistics = statistics, .maps = &map, .n_maps = 1};
    expect_ok(ga_forward(m, tokens, targets, 2, 8, &observer, &o.loss, &e), &e);
    expect_ok(ga_logits(m, 0, 16, o.logits, &e), &e);
    o.f_attn = ga_f_attn(statistics, GA_ALL), o.gate_mean = ga_gate_mean(statistics, GA_ALL);
    ga_generator *g = ga_generator_create(m, 8, &e);
    assert_non_null(g);
    expect_ok(ga_generator_feed(g, tokens, 3, NULL, &e), &e);
    expect_ok(ga_generator_feed(g, tokens + 3, 1, o.generated, &e), &e);
    ga_generator_destroy(g);
    ga_statistics_destroy(statistics);
    return o;
}

/* The same bits, whether the weights were loaded, are mapped, or are read into memory in their own type. */
static void check_mapped(const char *directory, const char *what) {
    ga_model *loaded = load(directory, GA_INFERENCE, NULL);
    size_t V = loaded->sizes.V;
    int32_t tokens[16];
    uint64_t random = 7;
    fill_tokens(tokens, COUNT(tokens), V, &random);
    outputs a = run_model(loaded, tokens);
    for (int i = 0; i < 2; i++) {
        refuse_mmap = i == 1;
        ga_model *mapped = load(directory, GA_MAPPED, NULL);
        refuse_mmap = false;
        for (int again = 0; again < 2; again++) {
            outputs b = run_model(mapped, tokens);
            if (memcmp(a.logits, b.logits, 16 * V * sizeof(ga_real)) != 0) fail_msg("%s: logits differ", what);
            if (memcmp(a.generated, b.generated, V * sizeof(ga_real)) != 0) fail_msg("%s: generation differs", what);
            assert_true(a.loss == b.loss && a.f_attn == b.f_attn);
            assert_true(a.gate_mean == b.gate_mean || isnan(a.gate_mean));
            assert_memory_equal(a.map, b.map, sizeof a.map);
            free(b.logits);
            free(b.generated);
        }
        ga_destroy(mapped);
    }
    free(a.logits);
    free(a.generated);
    ga_destroy(loaded);
}

static void test_mapped(void **state) {
    (void)state;
    size_t blocks = heap.blocks;
    for (size_t i = 0; i < COUNT(gates); i++) {
        ga_model *m = make_model(gates[i], GA_INFERENCE, i);
        save(m, in_root("mapped"), NULL);
        ga_destroy(m);
        check_mapped(in_root("mapped"), gates[i]);
    }
    check_mapped("tests/fixtures/hf_baseline", "F16");
    check_mapped("tests/fixtures/hf_headwise", "BF16, tied");
    check_mapped("tests/fixtures/hf_elementwise", "F32, two shards");
    check_mapped("tests/fixtures/outside_qwen3_next", "gate by head");
    check_mapped("tests/fixtures/outside_qwen3_moe", "experts");
    assert_int_equal(heap.blocks, blocks);
}

/* What ga_inspect says, and that it refuses what ga_load does. */
static void test_inspect(void **state) {
    (void)state;
    ga_error e = {GA_OK, ""};
    ga_config c = ga_config_default();
    ga_inventory v;
    size_t blocks = heap.blocks;
    expect_ok(ga_inspect("tests/fixtures/hf_elementwise", &c, &v, &e), &e);
    assert_string_equal(v.family, "qwen3");
    assert_string_equal(v.version, "4.51.3");
    assert_non_null(strstr(v.packing, "key-value group"));
    assert_true(v.files == 2 && v.tensors == 25 && v.values[GAI_F32] == 13832 && v.values[GAI_BF16] == 0);
    assert_true(v.bytes == 36728 + 21120 && c.d_model == 24 && c.gate_position == GA_G1);
    assert_string_equal(v.types[GAI_BF16], "BF16");
    expect_ok(ga_inspect("tests/fixtures/outside_qwen3_next", &c, &v, &e), &e);
    assert_non_null(strstr(v.packing, "each head"));
    ga_model *m = make_model("gate_position=G2", GA_INFERENCE, 1);
    save(m, in_root("inspect"), NULL);
    expect_ok(ga_inspect(in_root("inspect"), &c, &v, &e), &e);
    assert_non_null(strstr(v.packing, "of its own"));
    assert_true(v.files == 1 && v.values[GAI_F32] + v.values[GAI_F64] == m->n_weights);
    edit_text(in_root("inspect/config.json"), "\"gated_attention\",", "\"llama\", \"transformers_version\": \"4\\n\",");
    expect_ok(ga_inspect(in_root("inspect"), &c, &v, &e), &e);
    assert_string_equal(v.version, "4\\n");
    edit_header(in_root("inspect/model.safetensors"), "model.norm.weight", "model.worm.weight");
    expect_failure(ga_inspect(in_root("inspect"), &c, &v, &e), &e, GA_ERR_MISMATCH, "model.norm.weight: is missing",
                   "inspect");
    ga_destroy(m);
    assert_int_equal(heap.blocks, blocks);
}

/* What a mapped model holds, and what it cannot do. */
static void test_mapped_limits(void **state) {
    (void)state;
    ga_error e = {GA_OK, ""};
    ga_summary all, one;
    ga_training_state s = some_state;
    int32_t tokens[8] = {0};
    ga_model *m = make_model("n_layers=7 vocab_size=20", GA_TRAINING, 1);
    save(m, in_root("limits"), &s);
    expect_ok(ga_summarize(&m->config, GA_INFERENCE, &all, &e), &e);
    expect_ok(ga_summarize(&m->config, GA_MAPPED, &one, &e), &e);
    size_t outside = 2 * 20 * 12 + 12; /* embedding, output head, final norm */
    assert_int_equal(one.parameters, all.parameters);
    assert_int_equal(one.weight_bytes, (all.parameters - outside) / 7 * sizeof(ga_real));
    ga_config c = m->config;
    ga_destroy(m);
    m = create(&c, GA_MAPPED);
    expect_failure(ga_forward(m, tokens, NULL, 1, 8, NULL, NULL, &e), &e, GA_ERR_INPUT, "no weights", "before ga_load");
    expect_failure(ga_load(m, in_root("limits"), &s, &e), &e, GA_ERR_INPUT, "inference", "state");
    expect_ok(ga_load(m, in_root("limits"), NULL, &e), &e);
    expect_ok(ga_load(m, in_root("limits"), NULL, &e), &e); /* once more, in place of the first */
    expect_ok(ga_forward(m, tokens, NULL, 1, 8, NULL, NULL, &e), &e);
    expect_failure(ga_save(m, in_root("again"), NULL, &e), &e, GA_ERR_INPUT, "mapped", "save");
    ga_destroy(m);
}

static size_t told;
static const ga_real *told_weights;

static void note_change(void *state, const ga_real *weights, size_t n) {
    (void)state;
    told = n;
    told_weights = weights;
}

static void test_device_is_told(void **state) {
    (void)state;
    ga_error e;
    ga_model *m = make_model("", GA_INFERENCE, 1);
    save(m, in_root("told"), NULL);
    m->device.weights_changed = note_change;
    told = 0;
    expect_ok(ga_load(m, in_root("told"), NULL, &e), &e);
    assert_true(told == m->n_weights && told_weights == m->weights);
    ga_destroy(m);
}

static void test_modes(void **state) {
    (void)state;
    ga_error e;
    ga_training_state s = some_state;
    ga_model *training = make_model("", GA_TRAINING, 1), *inference = make_model("", GA_INFERENCE, 1);
    save(training, in_root("modes"), NULL);
    assert_true(ga_checkpoint_exists(in_root("modes"), false));
    assert_false(ga_checkpoint_exists(in_root("modes"), true));
    expect_failure(ga_load(training, in_root("modes"), &s, &e), &e, GA_ERR_FILE, "training_state.json", "no state");
    expect_failure(ga_load(inference, in_root("modes"), &s, &e), &e, GA_ERR_INPUT, "inference", "load");
    expect_failure(ga_save(inference, in_root("modes"), &s, &e), &e, GA_ERR_INPUT, "inference", "save");
    expect_ok(ga_load(inference, in_root("modes"), NULL, &e), &e);
    save(training, in_root("modes"), &s);
    assert_true(ga_checkpoint_exists(in_root("modes"), true));
    save(training, in_root("modes"), NULL); /* the state of another moment must not stay beside these weights */
    assert_false(ga_checkpoint_exists(in_root("modes"), true));
    ga_destroy(training);
    ga_destroy(inference);
}

static void test_keep_length(void **state) {
    (void)state;
    ga_error e;
    ga_model *m = make_model("", GA_INFERENCE, 1);
    save(m, in_root("length"), NULL);
    ga_config c = ga_config_default();
    c.max_seq_len = 5;
    c.learning_rate = 0.25;
    expect_ok(ga_load_config(&c, in_root("length"), true, &e), &e);
    assert_int_equal(c.max_seq_len, 5);
    assert_true(c.learning_rate == 0.25 && c.d_model == 12);
    expect_ok(ga_load_config(&c, in_root("length"), false, &e), &e);
    assert_int_equal(c.max_seq_len, 8);
    ga_destroy(m);
}

/* Which of m's tensors are, value by value, those of another model with these tensors. */
static bool same_tensor(const ga_model *m, const ga_tensor *t, const ga_model *other) {
    const ga_tensor *u = NULL;
    for (size_t i = 0; i < other->n_tensors && !u; i++)
        if (strcmp(other->tensors[i].name, t->name) == 0) u = &other->tensors[i];
    return u && memcmp(m->weights + t->offset, other->weights + u->offset, t->rows * t->columns * sizeof(ga_real)) == 0;
}

/* A gate is added to a model that has none; with `more` keys that both have. */
static void start_with_gate(const char *directory, const char *more) {
    ga_error e;
    char keys[256], changes[256];
    snprintf(keys, sizeof keys, "gate_position=none %s", more);
    ga_model *ungated = make_model(keys, GA_INFERENCE, 1);
    save(ungated, directory, NULL);

    static const char *const late[] = {"gate_type=headwise", "gate_type=elementwise rope_base=5000", "gate_input=none"};
    for (size_t i = 0; i < COUNT(late); i++) {
        snprintf(keys, sizeof keys, "%s %s", late[i], more);
        ga_model *m = make_model(keys, GA_TRAINING, 2), *fresh = make_model(keys, GA_TRAINING, 2);
        m->device.weights_changed = note_change;
        told = 0;
        expect_ok(ga_start_from(m, directory, changes, sizeof changes, &e), &e);
        assert_true(told == m->n_weights);
        char expected[256];
        snprintf(expected, sizeof expected, "%sit had no gate, whose %zu weights start fresh",
                 i == 1 ? "rope_base was 1234.5; " : "", m->n_weights - ungated->n_weights);
        assert_string_equal(changes, expected);
        for (size_t k = 0; k < m->n_tensors; k++) {
            bool gate = m->tensors[k].id == GA_TENSOR_gate_weight || m->tensors[k].id == GA_TENSOR_gate_free;
            assert_true(same_tensor(m, &m->tensors[k], gate ? fresh : ungated));
        }
        ga_destroy(m);
        ga_destroy(fresh);
    }
    ga_destroy(ungated);
}

static void test_open(void **state) {
    (void)state;
    ga_error e;
    const char *directory = in_root("open");
    ga_model *ungated = make_model("gate_position=none n_experts=3 experts_per_token=2", GA_INFERENCE, 1);
    save(ungated, directory, NULL);
    ga_config c = ungated->config;
    c.seed = 77, c.rope_base = 5000; /* positions are the configuration's */
    ga_model *m = ga_open(&c, NULL, GA_TRAINING, directory, &e);
    if (!m) fail_msg("ga_open: %s", e.text);
    assert_true(m->config.rope_base == 5000);
    for (size_t k = 0; k < m->n_tensors; k++) assert_true(same_tensor(m, &m->tensors[k], ungated));
    ga_destroy(m);

    c.gate_position = GA_G1; /* would be left without weights */
    assert_null(ga_open(&c, NULL, GA_INFERENCE, directory, &e));
    assert_int_equal(e.result, GA_ERR_MISMATCH);
    assert_non_null(strstr(e.text, "without a gate"));
    assert_null(ga_open(&ungated->config, NULL, GA_INFERENCE, in_root("nowhere"), &e));
    assert_int_equal(e.result, GA_ERR_FILE);
    ga_destroy(ungated);
}

static void test_start_from(void **state) {
    (void)state;
    ga_error e;
    char changes[256];
    const char *directory = in_root("start");
    start_with_gate(directory, "n_experts=3 experts_per_token=2");
    start_with_gate(directory, "");
    ga_model *ungated = make_model("gate_position=none", GA_INFERENCE, 1);

    /* Positions alone; a text that is cut short; nothing. */
    ga_model *raised = make_model("gate_position=none rope_base=1e6", GA_INFERENCE, 2);
    expect_failure(ga_load(raised, directory, NULL, &e), &e, GA_ERR_MISMATCH, "rope_base is 1234.5", "load");
    expect_ok(ga_start_from(raised, directory, changes, sizeof changes, &e), &e);
    assert_string_equal(changes, "rope_base was 1234.5");
    assert_true(raised->config.rope_base == 1e6);
    for (size_t k = 0; k < raised->n_tensors; k++) assert_true(same_tensor(raised, &raised->tensors[k], ungated));
    expect_ok(ga_start_from(raised, directory, changes, 6, &e), &e);
    assert_string_equal(changes, "rope_");
    expect_ok(ga_start_from(ungated, directory, changes, sizeof changes, &e), &e);
    assert_string_equal(changes, "");
    ga_destroy(raised);

    /* Whatever else differs stays an error, with a gate that is added and without. */
    static const struct {
        const char *keys, *text;
    } wrong[] = {{"gate_position=none sandwich_norm=1", "sandwich_norm is 0"},
                 {"sandwich_norm=1", "sandwich_norm is 0"},
                 {"qk_norm=0", "qk_norm is 1"},
                 {"d_ff=12", "d_ff is 10"}};
    for (size_t i = 0; i < COUNT(wrong); i++) {
        ga_model *m = make_model(wrong[i].keys, GA_INFERENCE, 2);
        expect_failure(ga_start_from(m, directory, changes, sizeof changes, &e), &e, GA_ERR_MISMATCH, wrong[i].text,
                       wrong[i].keys);
        ga_destroy(m);
    }
    ga_model *gated = make_model("", GA_INFERENCE, 1);
    save(gated, directory, NULL);
    expect_ok(ga_start_from(gated, directory, changes, sizeof changes, &e), &e);
    assert_string_equal(changes, "");
    expect_failure(ga_start_from(ungated, directory, changes, sizeof changes, &e), &e, GA_ERR_MISMATCH,
                   "gate_position is G1", "a gate is not dropped");
    expect_failure(ga_start_from(gated, in_root("nowhere"), changes, sizeof changes, &e), &e, GA_ERR_FILE, "nowhere",
                   "no checkpoint");
    ga_destroy(gated);
    ga_destroy(ungated);
}

/* ---- Hugging Face --------------------------------------------------------------------------------------------------- */

static void check_batch(const char *name, const char *gate_position, const char *gate_type, size_t B, size_t T) {
    enum { V = 37 };
    char directory[128], path[192], text[GA_TEXT];
    ga_error e;
    snprintf(directory, sizeof directory, "tests/fixtures/%s", name);
    snprintf(path, sizeof path, "%s/expected.safetensors", directory);
    assert_true(ga_checkpoint_exists(directory, false));
    ga_model *m = load(directory, GA_INFERENCE, NULL);
    ga_config_get(&m->config, "gate_position", text, sizeof text);
    assert_string_equal(text, gate_position);
    ga_config_get(&m->config, "gate_type", text, sizeof text);
    assert_string_equal(text, gate_type);
    contents c = read_file(path);
    snprintf(text, sizeof text, "\"dtype\":\"I32\",\"shape\":[%zu,%zu]", B, T);
    const unsigned char *t = find_tensor(&c, "tokens", text);
    snprintf(text, sizeof text, "\"dtype\":\"F32\",\"shape\":[%zu,%zu,37]", B, T);
    const unsigned char *l = find_tensor(&c, "logits", text);
    assert_true(t && l);
    int32_t *tokens = (int32_t *)malloc(B * T * sizeof *tokens);
    float *expected = (float *)malloc(B * T * V * sizeof *expected);
    double *wide = (double *)malloc(B * T * V * sizeof *wide);
    assert_true(tokens && expected && wide);
    memcpy(tokens, t, B * T * sizeof *tokens);
    memcpy(expected, l, B * T * V * sizeof *expected);
    ga_real *logits = reals(B * T * V);
    expect_ok(ga_forward(m, tokens, NULL, B, T, NULL, NULL, &e), &e);
    expect_ok(ga_logits(m, 0, B * T, logits, &e), &e);
    for (size_t i = 0; i < B * T * V; i++) {
        wide[i] = (double)expected[i];
        expect_below(fabs((double)logits[i] - wide[i]), 1e-4, "%s: logit %zu", name, i);
    }
    expect_below(difference(logits, wide, B * T * V), 1e-5, "%s: logits", name);
    free(logits), free(tokens), free(expected), free(wide);
    free(c.bytes);
    ga_destroy(m);
}

static void check_logits(const char *name, const char *gate_position, const char *gate_type) {
    check_batch(name, gate_position, gate_type, 2, 11);
}

static void test_hugging_face(void **state) {
    (void)state;
    check_logits("hf_baseline", "none", "elementwise");  /* F16 */
    check_logits("hf_headwise", "G1", "headwise");       /* BF16, tied, three query heads to a group */
    check_logits("hf_elementwise", "G1", "elementwise"); /* F32, two shards */
}

/* Models that transformers built and saved itself. */
static void test_outside_models(void **state) {
    (void)state;
    check_logits("outside_llama", "none", "elementwise");
    check_logits("outside_mistral", "none", "elementwise"); /* one key-value head */
    check_logits("outside_qwen3", "none", "elementwise");   /* tied */
    check_logits("outside_qwen3_moe", "none", "elementwise");
    check_logits("outside_qwen3_next", "G1", "elementwise");
}

/* What is written after reading Qwen3-Next is in our own layout, under a name that no other reader takes for its
 * own. */
static void test_qwen3_next_rewritten(void **state) {
    (void)state;
    ga_model *m = load("tests/fixtures/outside_qwen3_next", GA_INFERENCE, NULL);
    assert_true(m->config.partial_rotary_factor == 0.25 && gai_rotary_pairs(&m->config) == 2);
    save(m, in_root("next"), NULL);
    ga_model *back = load(in_root("next"), GA_INFERENCE, NULL);
    expect_same_keys(&m->config, &back->config);
    expect_same_model(m, back, false);
    contents c = read_file(in_root("next/config.json"));
    assert_non_null(strstr((char *)c.bytes, "\"model_type\": \"gated_attention\""));
    free(c.bytes);
    ga_destroy(m);
    ga_destroy(back);
}

/* Tensor `name` of the shard at `path`, as numbers. */
static ga_real *read_tensor(const char *path, const char *name, size_t *n) {
    ga_error e;
    FILE *file;
    uint64_t size;
    gai_tensor_file f;
    memset(&f, 0, sizeof f);
    snprintf(f.path, sizeof f.path, "%s", path);
    expect_ok(gai_open(path, &file, &size, &e), &e);
    expect_ok(gai_read_header(&f, file, size, &e), &e);
    fclose(file);
    gai_entry *t = gai_find_entry(&f, name);
    ga_real *values = NULL;
    if (t) {
        contents c = read_file(path);
        *n = (size_t)(t->end - t->begin) / gai_dtype_size(t->type);
        values = reals(*n);
        gai_decode(values, c.bytes + t->begin, *n, t->type, 0);
        free(c.bytes);
    }
    GA_FREE(f.header);
    GA_FREE(f.entries);
    return values;
}

/* What ga_save makes of a directory that PyTorch wrote is, tensor for tensor and key for key, what PyTorch
 * wrote: so it loads there again, and has the logits that expected.safetensors has from there. round_trip.py
 * does it with PyTorch. */
static void check_rewritten(const char *directory, const char *family, const char *const *shards) {
    ga_error e;
    char path[256], wanted[64];
    size_t compared = 0, n = 0, m_values = 0;
    ga_model *m = load(directory, GA_INFERENCE, NULL);
    save(m, in_root("rewritten"), NULL);
    for (size_t i = 0; i < m->n_tensors; i++) {
        const char *name = m->tensors[i].name;
        ga_real *there = NULL, *here = read_tensor(in_root("rewritten/model.safetensors"), name, &m_values);
        for (size_t k = 0; !there && shards[k]; k++) {
            snprintf(path, sizeof path, "%s/%s", directory, shards[k]);
            there = read_tensor(path, name, &n);
        }
        assert_true((here != NULL) == (there != NULL)); /* neither, for the gate inside q_proj */
        if (here && (n != m_values || memcmp(here, there, n * sizeof *here) != 0)) fail_msg("%s: %s", directory, name);
        compared += here ? n : 0;
        free(here);
        free(there);
    }
    assert_int_equal(compared, m->n_weights);
    contents c = read_file(in_root("rewritten/config.json"));
    snprintf(wanted, sizeof wanted, "\"model_type\": \"%s\"", family);
    assert_non_null(strstr((char *)c.bytes, wanted));
    free(c.bytes);
    edit_text(in_root("rewritten/config.json"), "\"gated_attention\": {", "\"nothing\": {"); /* as others read it */
    ga_config alone = ga_config_default();
    expect_ok(ga_load_config(&alone, in_root("rewritten"), false, &e), &e);
    expect_same_keys(&m->config, &alone);
    ga_destroy(m);
}

static void test_rewritten(void **state) {
    (void)state;
    static const char *const one[] = {"model.safetensors", NULL};
    static const char *const two[] = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", NULL};
    check_rewritten("tests/fixtures/hf_baseline", "qwen3", one);
    check_rewritten("tests/fixtures/hf_headwise", "qwen3", one);
    check_rewritten("tests/fixtures/hf_elementwise", "qwen3", two);
    check_rewritten("tests/fixtures/hf_yarn", "qwen3", one);
    check_rewritten("tests/fixtures/outside_llama", "llama", one);
    check_rewritten("tests/fixtures/outside_qwen3", "qwen3", one);
}

/* Models that are computed otherwise are refused by what is in the way. */
static void test_refused_models(void **state) {
    (void)state;
    static const char start[] = "\"vocab_size\": 13, \"hidden_size\": 24, \"intermediate_size\": 10, "
                                "\"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_experts\": 0";
    static const struct {
        const char *keys;
        ga_result result;
        const char *word;
    } cases[] = {
        {"\"model_type\": \"qwen2\"", GA_ERR_CONFIG,
         "model_type \"qwen2\" is not supported: its queries, keys and values"},
        {"\"model_type\": \"phi3\"", GA_ERR_CONFIG, "phi3"},
        {"\"model_type\": \"mamba\"", GA_ERR_CONFIG, "model_type \"mamba\" is none that is supported"},
        {"\"model_type\": 3", GA_ERR_CONFIG, "model_type is no string"},
        {"\"model_type\": \"llama\", \"attention_bias\": true", GA_ERR_CONFIG, "attention_bias"},
        {"\"model_type\": \"llama\", \"mlp_bias\": true", GA_ERR_CONFIG, "mlp_bias"},
        {"\"model_type\": \"llama\", \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0}", GA_ERR_CONFIG,
         "rope_scaling of type llama3"},
        {"\"model_type\": \"llama\", \"rope_scaling\": {\"type\": \"linear\", \"factor\": 8.0}", GA_ERR_CONFIG,
         "rope_scaling of type linear"},
        {"\"model_type\": \"llama\", \"rope_parameters\": {\"rope_type\": 1}", GA_ERR_FORMAT, "its type is no string"},
        {"\"model_type\": \"llama\", \"rope_parameters\": []", GA_ERR_FORMAT, "an object is missing"},
        {"\"model_type\": \"llama\", \"partial_rotary_factor\": 0.5", GA_ERR_CONFIG, "partial_rotary_factor"},
        {"\"model_type\": \"mistral\", \"sliding_window\": 4096", GA_ERR_CONFIG, "sliding_window"},
        {"\"model_type\": \"qwen3\", \"layer_types\": [\"full_attention\", \"sliding_attention\"]", GA_ERR_CONFIG,
         "layer_types: a hybrid model"},
        {"\"model_type\": \"qwen3\", \"layer_types\": 1", GA_ERR_CONFIG, "layer_types"},
        {"\"model_type\": \"qwen3_next\"", GA_ERR_CONFIG, "hybrid"},
        {"\"model_type\": \"qwen3_next\", \"full_attention_interval\": 4", GA_ERR_CONFIG, "hybrid"},
        {"\"model_type\": \"qwen3_next\", \"layer_types\": [\"linear_attention\", \"full_attention\"]", GA_ERR_CONFIG,
         "layer_types: a hybrid model"},
        {"\"model_type\": \"qwen3_next\", \"full_attention_interval\": 1, \"headwise_attn_output_gate\": true",
         GA_ERR_FORMAT, "both true"},
        {"\"model_type\": \"qwen3_next\", \"full_attention_interval\": 1, \"partial_rotary_factor\": 1.5",
         GA_ERR_CONFIG, "partial_rotary_factor"},
        {"\"model_type\": \"qwen3_next\", \"full_attention_interval\": 1", GA_OK, ""},
        {"\"model_type\": \"mistral\", \"head_dim\": null, \"sliding_window\": null", GA_OK, ""},
        {"\"model_type\": \"llama\", \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 5e5}", GA_OK,
         ""},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        char text[1024];
        ga_error e = {GA_OK, ""};
        ga_config c = ga_config_default();
        int n = snprintf(text, sizeof text, "{%s, %s}", cases[i].keys, start);
        remove_tree(in_root("refused"));
        assert_int_equal(mkdir(in_root("refused"), 0777), 0);
        write_file(in_root("refused/config.json"), text, (size_t)n);
        expect_failure(ga_load_config(&c, in_root("refused"), false, &e), &e, cases[i].result, cases[i].word,
                       cases[i].keys);
        if (strstr(text, "rope_theta")) assert_true(c.rope_base == 5e5);
    }
    edit_text(in_root("refused/config.json"), "\"num_experts\": 0", "\"num_experts\": 8");
    edit_text(in_root("refused/config.json"), "\"llama\"", "\"qwen3_next\", \"full_attention_interval\": 1");
    ga_error e;
    ga_config c = ga_config_default();
    expect_failure(ga_load_config(&c, in_root("refused"), false, &e), &e, GA_ERR_CONFIG, "shared expert", "experts");
}

/* Qwen3-MoE's names, written and read; what a mixture needs is asked for by name, and dense layers in
 * one are refused. */
static void test_mixture_keys(void **state) {
    (void)state;
    static const char *const written[] = {
        "\"architectures\": [\"Qwen3MoeForCausalLM\"]",
        "\"model_type\": \"qwen3_moe\"",
        "\"num_experts\": 3",
        "\"num_experts_per_tok\": 2",
        "\"moe_intermediate_size\": 10",
        "\"norm_topk_prob\": true",
        "\"router_aux_loss_coef\": 0.25",
        "\"decoder_sparse_step\": 1",
        "\"mlp_only_layers\": []",
    };
    static const struct {
        const char *old, *replacement;
        ga_result result;
        const char *word;
    } cases[] = {
        {"\"decoder_sparse_step\": 1", "\"decoder_sparse_step\": 2", GA_ERR_CONFIG, "decoder_sparse_step"},
        {"\"mlp_only_layers\": []", "\"mlp_only_layers\": [0]", GA_ERR_CONFIG, "mlp_only_layers"},
        {"\"num_experts\"", "\"num_experts_\"", GA_ERR_FORMAT, "num_experts is missing"},
        {"\"moe_intermediate_size\"", "\"moe_size\"", GA_ERR_FORMAT, "moe_intermediate_size is missing"},
        {"\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 1", GA_ERR_FORMAT, "num_experts_per_tok"},
        {"\"num_experts\": 3", "\"num_experts\": 4096", GA_ERR_CONFIG, "num_experts"},
    };
    ga_error e;
    ga_config c;
    ga_model *m = make_model("n_experts=3 experts_per_token=2 d_ff=10 load_balance_coef=0.25", GA_INFERENCE, 1);
    save(m, in_root("experts"), NULL);
    contents text = read_file(in_root("experts/config.json"));
    for (size_t i = 0; i < COUNT(written); i++)
        if (!strstr((char *)text.bytes, written[i])) fail_msg("config.json does not say %s", written[i]);
    free(text.bytes);
    contents tensors = read_file(in_root("experts/model.safetensors"));
    tensors.bytes[tensors.size - 1] = '\0';
    assert_non_null(strstr((char *)tensors.bytes + 8, "\"model.layers.1.mlp.gate.weight\":{\"dtype\""));
    assert_non_null(strstr((char *)tensors.bytes + 8, "\"model.layers.1.mlp.experts.2.down_proj.weight\":{\"dtype\""));
    free(tensors.bytes);
    for (size_t i = 0; i < COUNT(cases); i++) {
        save(m, in_root("experts"), NULL);
        edit_text(in_root("experts/config.json"), cases[i].old, cases[i].replacement);
        c = m->config;
        expect_failure(ga_load_config(&c, in_root("experts"), false, &e), &e, cases[i].result, cases[i].word,
                       cases[i].replacement);
    }
    ga_destroy(m);

    /* a foreign file: Hugging Face's defaults */
    static const char foreign[] =
        "{\"model_type\": \"qwen3_moe\", \"vocab_size\": 13, \"hidden_size\": 24, \"intermediate_size\": 99, "
        "\"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"moe_intermediate_size\": 10, \"num_experts\": 6, "
        "\"num_experts_per_tok\": 3}";
    write_file(in_root("experts/config.json"), foreign, sizeof foreign - 1);
    expect_ok(ga_load_config(&c, in_root("experts"), false, &e), &e);
    ga_config expected = ga_config_default();
    configure(&expected,
              "vocab_size=13 d_model=24 d_ff=10 n_layers=2 n_heads=4 n_kv_heads=4 head_dim=6 qk_norm=1 "
              "gate_position=none n_experts=6 experts_per_token=3 normalize_top_k=0 load_balance_coef=0.001");
    expect_same_keys(&expected, &c);
    /* what a dense model says of experts is passed over */
    edit_text(in_root("experts/config.json"), "qwen3_moe", "qwen3");
    expect_ok(ga_load_config(&c, in_root("experts"), false, &e), &e);
    assert_true(c.n_experts == 0 && c.d_ff == 99);
}

static void test_hugging_face_yarn(void **state) {
    (void)state;
    ga_error e;
    ga_config c = ga_config_default(), back = c;
    check_batch("hf_yarn", "G1", "headwise", 1, 40);
    expect_ok(ga_load_config(&c, "tests/fixtures/hf_yarn", false, &e), &e);
    assert_true(c.rope_factor == 4 && c.rope_original_length == 256 && c.rope_beta_fast == 32 && c.rope_beta_slow == 1);
    assert_true(c.rope_attention_factor == 0 && c.max_seq_len == 1024);

    /* written as it was read */
    ga_model *m = load("tests/fixtures/hf_yarn", GA_INFERENCE, NULL);
    save(m, in_root("yarn"), NULL);
    contents text = read_file(in_root("yarn/config.json"));
    assert_non_null(strstr((char *)text.bytes,
                           "\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, "
                           "\"original_max_position_embeddings\": 256, \"beta_fast\": 32.0, \"beta_slow\": 1.0},"));
    free(text.bytes);
    ga_destroy(m);
    expect_ok(ga_load_config(&back, in_root("yarn"), false, &e), &e);
    expect_same_keys(&c, &back);
}

/* rope_scaling of others, and where it contradicts our own keys. */
static void test_yarn_keys(void **state) {
    (void)state;
    static const struct {
        const char *scaling;
        ga_result result;
        const char *word;
    } cases[] = {
        {"{\"rope_type\": \"yarn\"}", GA_ERR_FORMAT, "factor is missing"},
        {"{\"type\": \"yarn\", \"factor\": 0.5}", GA_ERR_CONFIG, "factor: rope_factor: 0.5 is out of range"},
        {"{\"rope_type\": \"yarn\", \"factor\": \"4\"}", GA_ERR_FORMAT, "factor has a value of the wrong type"},
        {"{\"rope_type\": \"yarn\", \"factor\": 4, \"mscale\": 1}", GA_ERR_CONFIG, "rope_scaling of type yarn: mscale"},
        {"{\"rope_type\": \"yarn\", \"factor\": 4, \"truncate\": false}", GA_ERR_CONFIG, "truncate"},
        {"{\"rope_type\": \"yarn\", \"factor\": 4}", GA_OK, "256"},
        {"{\"type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 128, \"beta_fast\": 16.0, "
         "\"attention_factor\": 1.5, \"beta_slow\": null}",
         GA_OK, "128"},
    };
    static const char form[] = "{\"model_type\": \"llama\", \"vocab_size\": 13, \"hidden_size\": 24, "
                               "\"intermediate_size\": 10, \"num_hidden_layers\": 2, \"num_attention_heads\": 4, "
                               "\"max_position_embeddings\": 256, \"rope_scaling\": %s}";
    ga_error e;
    assert_int_equal(mkdir(in_root("scaling"), 0777), 0);
    for (size_t i = 0; i < COUNT(cases); i++) {
        char text[1024];
        ga_config c = ga_config_default();
        e.text[0] = '\0';
        write_file(in_root("scaling/config.json"), text, (size_t)snprintf(text, sizeof text, form, cases[i].scaling));
        ga_result result = ga_load_config(&c, in_root("scaling"), true, &e);
        if (cases[i].result != GA_OK) {
            expect_failure(result, &e, cases[i].result, cases[i].word, cases[i].scaling);
            continue;
        }
        expect_ok(result, &e);
        assert_int_equal(c.rope_original_length, strtoul(cases[i].word, NULL, 10));
        assert_true(c.rope_factor == 4 && c.rope_beta_slow == 1 && c.max_seq_len == ga_config_default().max_seq_len);
        assert_true(c.rope_beta_fast == (i == COUNT(cases) - 1 ? 16 : 32));
    }

    static const char *const contradictions[][2] = {
        {"\"rope_scaling\": {", "\"rope_scaling\": null, \"before\": {"},
        {"\"factor\": 3.5", "\"factor\": 4.0"},
        {"\"beta_fast\": 32.0", "\"beta_fast\": 31.0"},
        {"\"attention_factor\": 1.25", "\"attention_factor\": 1.5"},
    };
    ga_model *m = make_model("rope_factor=3.5 rope_original_length=2 rope_attention_factor=1.25", GA_INFERENCE, 1);
    for (size_t i = 0; i < COUNT(contradictions); i++) {
        save(m, in_root("scaling"), NULL);
        ga_config c = m->config;
        expect_ok(ga_load_config(&c, in_root("scaling"), false, &e), &e);
        expect_same_keys(&m->config, &c);
        edit_text(in_root("scaling/config.json"), contradictions[i][0], contradictions[i][1]);
        expect_failure(ga_load_config(&c, in_root("scaling"), false, &e), &e, GA_ERR_FORMAT,
                       "contradicts gated_attention", contradictions[i][1]);
    }
    ga_destroy(m);
}

/* Without our own object of keys and without those that have a default. */
static void test_plain_llama(void **state) {
    (void)state;
    static const char text[] = "{\"model_type\": \"llama\", \"vocab_size\": 13, \"hidden_size\": 24, "
                               "\"intermediate_size\": 10, \"num_hidden_layers\": 2, \"num_attention_heads\": 4, "
                               "\"num_key_value_heads\": null, \"rope_scaling\": null, \"torch_dtype\": \"bfloat16\"}";
    ga_error e;
    ga_config c = ga_config_default();
    configure(&c, "gate_position=G4 gate_type=headwise sandwich_norm=1 attn_clip=3");
    assert_int_equal(mkdir(in_root("llama"), 0777), 0);
    write_file(in_root("llama/config.json"), text, sizeof text - 1);
    expect_ok(ga_load_config(&c, in_root("llama"), false, &e), &e);
    ga_config expected = ga_config_default();
    configure(&expected, "vocab_size=13 d_model=24 d_ff=10 n_layers=2 n_heads=4 n_kv_heads=4 head_dim=6 qk_norm=0 "
                         "gate_position=none");
    expect_same_keys(&expected, &c);
    assert_false(ga_checkpoint_exists(in_root("llama"), false));
    edit_text(in_root("llama/config.json"), "24", "2000");
    expect_failure(ga_load_config(&c, in_root("llama"), false, &e), &e, GA_ERR_CONFIG, "head_dim is missing", "wide");
    expect_same_keys(&expected, &c); /* untouched */
}

/* All 65536 values of a type of 16 bits against its definition: a sign, `exponent_bits` of exponent, the
 * rest fraction. */
static void check_decoding(gai_dtype type, int exponent_bits) {
    int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    int largest = (1 << exponent_bits) - 1, one = 1 << fraction_bits;
    for (uint32_t h = 0; h < 65536; h++) {
        unsigned char bytes[2] = {(unsigned char)h, (unsigned char)(h >> 8)};
        ga_real value;
        gai_decode(&value, bytes, 1, type, 0);
        double sign = h >> 15 ? -1 : 1, fraction = (double)(h & (uint32_t)(one - 1)), x = (double)value;
        int exponent = (int)(h >> fraction_bits) & largest, smallest = 1 - bias - fraction_bits;
        double expected = exponent == 0 ? sign * ldexp(fraction, smallest)
                                        : sign * ldexp(one + fraction, exponent - bias - fraction_bits);
        if (exponent == largest) expected = fraction != 0 ? NAN : sign * INFINITY;
        if (isnan(expected) ? !isnan(x) : x != expected || signbit(x) != signbit(expected))
            fail_msg("%04x is %g, not %g", (unsigned)h, x, expected);
    }
}

static void test_half_precision(void **state) {
    (void)state;
    check_decoding(GAI_F16, 5);
}

static void test_bfloat16(void **state) {
    (void)state;
    check_decoding(GAI_BF16, 8);
}

/* What other writers leave in a file and nobody needs. */
static void test_harmless_tensors(void **state) {
    (void)state;
    ga_error e;
    ga_model *m = make_model("tied_embeddings=1", GA_INFERENCE, 1);
    const ga_tensor *embed = ga_find_tensor(m, GA_TENSOR_embed, GA_ALL);
    size_t bytes = embed->rows * embed->columns * sizeof(ga_real);
    const char *path = in_root("harmless/model.safetensors"), *type = sizeof(ga_real) == 8 ? "F64" : "F32";
    save(m, in_root("harmless"), NULL);
    append_tensor(path, "model.layers.1.self_attn.rotary_emb.inv_freq", "F32", "[3]", "abcdefghijkl", 12);
    append_tensor(path, "lm_head.weight", type, "[13,12]", m->weights + embed->offset, bytes);
    ga_model *b = load(in_root("harmless"), GA_INFERENCE, NULL);
    expect_same_model(m, b, false);
    ga_destroy(b);
    contents c = read_file(path);
    c.bytes[c.size - 1] ^= 1;
    write_file(path, c.bytes, c.size);
    expect_failure(ga_load(m, in_root("harmless"), NULL, &e), &e, GA_ERR_MISMATCH, "lm_head.weight", "untied");
    free(c.bytes);
    ga_destroy(m);
}

/* ---- JSON ----------------------------------------------------------------------------------------------------------- */

static bool is_json(const char *text) {
    char copy[1024];
    gai_json j;
    ga_error e;
    assert_true(strlen(text) < sizeof copy);
    strcpy(copy, text);
    return gai_json_open(&j, "text", copy, strlen(copy), &e) == GA_OK;
}

static void test_json_syntax(void **state) {
    (void)state;
    const char *const good[] = {
        "{}",
        " \n\t\r{ } ",
        "{\"a\":1}",
        "{\"a\" : [ ] , \"b\" : { } }",
        "{\"a\":[1,-2,0,-0,3.5,1e9,1E-9,0.5e+10,true,false,null,\"\",[[]],{}]}",
        "{\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\uD83D\\uDE00\":1}",
        "{\"\xC3\xA9\":\"\x7F\"}",
    };
    const char *const bad[] = {
        "",
        " ",
        "[]",
        "1",
        "\"a\"",
        "{",
        "}",
        "{]",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{,\"a\":1}",
        "{\"a\":1 \"b\":2}",
        "{\"a\":1}x",
        "{\"a\":1}{}",
        "{a:1}",
        "{'a':1}",
        "{\"a\":[1,]}",
        "{\"a\":[,1]}",
        "{\"a\":[1 2]}",
        "{\"a\":[1}",
        "{\"a\":[1}}",
        "{\"a\":(1)}",
        "{\"a\":01}",
        "{\"a\":+1}",
        "{\"a\":-}",
        "{\"a\":1.}",
        "{\"a\":.5}",
        "{\"a\":1e}",
        "{\"a\":1e+}",
        "{\"a\":0x10}",
        "{\"a\":NaN}",
        "{\"a\":Infinity}",
        "{\"a\":tru}",
        "{\"a\":True}",
        "{\"a\":nul",
        "{\"a",
        "{\"a\\",
        "{\"a\\\"",
        "{\"\\x\":1}",
        "{\"\\u12\":1}",
        "{\"\\u12g4\":1}",
        "{\"\\u0000\":1}",
        "{\"\\uD83D\":1}",
        "{\"\\uD83Dx\":1}",
        "{\"\\uD83D\\u0041\":1}",
        "{\"\\uD83D\\uD83D\":1}",
        "{\"\\uDE00\":1}",
        "{\"a\nb\":1}",
        "{\"a\tb\":1}",
        "{\"a\":1 /* */}",
        "\xEF\xBB\xBF{}",
    };
    for (size_t i = 0; i < COUNT(good); i++)
        if (!is_json(good[i])) fail_msg("refused: %s", good[i]);
    for (size_t i = 0; i < COUNT(bad); i++)
        if (is_json(bad[i])) fail_msg("accepted: %s", bad[i]);
    char deep[1024];
    for (size_t depth = 62; depth < 80; depth++) { /* arrays in one object */
        strcpy(deep, "{\"a\":");
        for (size_t i = 0; i < depth; i++) strcat(deep, "[");
        for (size_t i = 0; i < depth; i++) strcat(deep, "]");
        strcat(deep, "}");
        assert_true(is_json(deep) == (depth + 1 <= GAI_JSON_DEPTH));
    }
}

static void test_json_strings(void **state) {
    (void)state;
    static const char *const pairs[][2] = {
        {"{\"\\\"\\\\\\/\\b\\f\\n\\r\\t\":1}", "\"\\/\b\f\n\r\t"},
        {"{\"\\u0041\\u00e9\\u20AC\\ud83d\\ude00z\":1}", "A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z"},
        {"{\"\":1}", ""},
    };
    for (size_t i = 0; i < COUNT(pairs); i++) {
        char copy[256], *key;
        gai_json j, value;
        ga_error e;
        strcpy(copy, pairs[i][0]);
        expect_ok(gai_json_open(&j, "text", copy, strlen(copy), &e), &e);
        assert_true(gai_json_next(&j, &key, &value));
        assert_string_equal(key, pairs[i][1]);
        assert_true(gai_json_is(&value, "1"));
        assert_false(gai_json_next(&j, &key, &value));
    }
}

/* ---- damaged files -------------------------------------------------------------------------------------------------- */

/* A safetensors file of this header and so many bytes of data. */
typedef struct {
    const char *header;
    size_t data;
    ga_result result;
    const char *word;
} bad_tensors;

#define ENTRY(name, shape, begin, end) \
    "\"" name "\":{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"

static void test_bad_tensors(void **state) {
    (void)state;
    static const bad_tensors cases[] = {
        {"", 0, GA_ERR_FORMAT, "JSON"},
        {"{}", 0, GA_ERR_MISMATCH, "model.embed_tokens.weight: is missing"},
        {"{}", 1, GA_ERR_FORMAT, "bytes follow"},
        {"[]", 0, GA_ERR_FORMAT, "object"},
        {"{\"a\":1}", 0, GA_ERR_FORMAT, "object"},
        {"{\"__metadata__\":1}", 0, GA_ERR_FORMAT, "__metadata__"},
        {"{\"a\":{}}", 0, GA_ERR_FORMAT, "dtype"},
        {"{\"a\":{\"dtype\":\"F32\"}}", 0, GA_ERR_FORMAT, "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 0, GA_ERR_FORMAT, "data_offsets"},
        {"{\"a\":{\"dtype\":32,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, GA_ERR_FORMAT, "dtype"},
        {"{\"a\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}", 8, GA_ERR_FORMAT, "I64"},
        {"{\"a\":{\"dtype\":\"\\u001b[2J\",\"shape\":[1],\"data_offsets\":[0,8]}}", 8, GA_ERR_FORMAT, "not ASCII"},
        {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, GA_ERR_FORMAT,
         "twice"},
        {"{\"a\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, GA_ERR_FORMAT, "differ in length"},
        {"{" ENTRY("a", "1", "0", "4") "}", 4, GA_ERR_FORMAT, "shape"},
        {"{" ENTRY("a", "[1.0]", "0", "4") "}", 4, GA_ERR_FORMAT, "shape"},
        {"{" ENTRY("a", "[-1]", "0", "4") "}", 4, GA_ERR_FORMAT, "shape"},
        {"{" ENTRY("a", "[1e0]", "0", "4") "}", 4, GA_ERR_FORMAT, "shape"},
        {"{" ENTRY("a", "[\"1\"]", "0", "4") "}", 4, GA_ERR_FORMAT, "shape"},
        {"{" ENTRY("a", "[[1]]", "0", "4") "}", 4, GA_ERR_FORMAT, "shape"},
        {"{" ENTRY("a", "[1,1,1,1,1]", "0", "4") "}", 4, GA_ERR_FORMAT, "shape"},
        {"{" ENTRY("a", "[18446744073709551616]", "0", "4") "}", 4, GA_ERR_FORMAT, "shape"},
        {"{" ENTRY("a", "[99999999999999999999999999999999]", "0", "4") "}", 4, GA_ERR_FORMAT, "shape"},
        {"{" ENTRY("a", "[4294967296,4294967296]", "0", "0") "}", 0, GA_ERR_FORMAT, "shape"},
        {"{" ENTRY("a", "[4611686018427387905]", "0", "4") "}", 4, GA_ERR_FORMAT, "differ in length"},
        {"{" ENTRY("a", "[2]", "0", "4") "}", 4, GA_ERR_FORMAT, "differ in length"},
        {"{" ENTRY("a", "[0]", "0", "4") "}", 4, GA_ERR_FORMAT, "differ in length"},
        {"{" ENTRY("a", "[1]", "0", "5") "}", 5, GA_ERR_FORMAT, "differ in length"},
        {"{" ENTRY("a", "[1]", "4", "0") "}", 4, GA_ERR_FORMAT, "out of order"},
        {"{" ENTRY("a", "[1]", "0", "4") "}", 3, GA_ERR_FORMAT, "beyond the end"},
        {"{" ENTRY("a", "[1]", "18446744073709551612", "18446744073709551615") "}", 4, GA_ERR_FORMAT, "beyond the end"},
        {"{" ENTRY("a", "[1]", "-4", "0") "}", 4, GA_ERR_FORMAT, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, GA_ERR_FORMAT, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 4, GA_ERR_FORMAT, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":{}}}", 4, GA_ERR_FORMAT, "data_offsets"},
        {"{" ENTRY("a", "[1]", "0", "4") "," ENTRY("b", "[1]", "2", "6") "}", 6, GA_ERR_FORMAT, "overlaps"},
        {"{" ENTRY("a", "[1]", "0", "4") "," ENTRY("b", "[1]", "0", "4") "}", 4, GA_ERR_FORMAT, "overlaps"},
        {"{" ENTRY("a", "[1]", "0", "4") "," ENTRY("b", "[1]", "8", "12") "}", 12, GA_ERR_FORMAT, "hole"},
        {"{" ENTRY("a", "[1]", "4", "8") "}", 8, GA_ERR_FORMAT, "hole"},
        {"{" ENTRY("a", "[1]", "0", "4") "}", 8, GA_ERR_FORMAT, "bytes follow"},
        {"{" ENTRY("a", "[1]", "0", "4") "," ENTRY("a", "[1]", "4", "8") "}", 8, GA_ERR_FORMAT, "a: stands twice"},
        {"{" ENTRY("a", "[0]", "0", "0") "," ENTRY("\\u0061", "[0]", "0", "0") "}", 0, GA_ERR_FORMAT,
         "a: stands twice"},
        {"{" ENTRY("a\\n\\u001b", "[9]", "0", "4") "}", 4, GA_ERR_FORMAT, "not ASCII"},
    };
    ga_model *m = make_model("", GA_INFERENCE, 1);
    save(m, in_root("bad"), NULL);
    const char *path = in_root("bad/model.safetensors");
    unsigned char data[16] = {0};
    for (size_t i = 0; i < COUNT(cases); i++) {
        ga_error e = {GA_OK, ""};
        write_tensors(path, cases[i].header, strlen(cases[i].header), data, cases[i].data);
        expect_failure(ga_load(m, in_root("bad"), NULL, &e), &e, cases[i].result, cases[i].word, cases[i].header);
        assert_non_null(strstr(e.text, "model.safetensors"));
    }
    ga_destroy(m);
}

/* The length in the first eight bytes, and files that are no files. */
static void test_bad_lengths(void **state) {
    (void)state;
    ga_error e = {GA_OK, ""};
    ga_model *m = make_model("", GA_INFERENCE, 1);
    const char *directory = in_root("lengths"), *path = in_root("lengths/model.safetensors");
    save(m, directory, NULL);
    contents c = read_file(path);
    uint64_t length = little_endian(c.bytes, 8);
    const uint64_t lengths[] = {0,      1,         length / 2, length + 8,     c.size - 8,        c.size - 7,
                                c.size, 100000001, UINT64_MAX, UINT64_MAX - 7, (uint64_t)1 << 63, (uint64_t)1 << 32};
    for (size_t i = 0; i < COUNT(lengths); i++) {
        for (size_t k = 0; k < 8; k++) c.bytes[k] = (unsigned char)(lengths[i] >> (8 * k));
        write_file(path, c.bytes, c.size);
        expect_failure(ga_load(m, directory, NULL, &e), &e, GA_ERR_FORMAT,
                       lengths[i] > c.size - 8 ? "too long" : "JSON", "false length");
    }
    for (size_t k = 0; k < 8; k++) c.bytes[k] = (unsigned char)(length >> (8 * k));
    for (size_t size = 0; size < c.size; size += size < 8 + length ? 1 : 61) { /* cut anywhere */
        write_file(path, c.bytes, size);
        const char *word = size < 8 ? "too short" : size < 8 + length ? "too long" : "beyond the end";
        expect_failure(ga_load(m, directory, NULL, &e), &e, GA_ERR_FORMAT, word, "cut");
    }
    remove(path);
    expect_failure(ga_load(m, directory, NULL, &e), &e, GA_ERR_FILE, "No such file", "removed");
    assert_int_equal(mkdir(path, 0777), 0);
    expect_failure(ga_load(m, directory, NULL, &e), &e, GA_ERR_FILE, "not a regular file", "directory");
    assert_false(ga_checkpoint_exists(directory, false));
    rmdir(path);
    assert_int_equal(mkfifo(path, 0666), 0);
    expect_failure(ga_load(m, directory, NULL, &e), &e, GA_ERR_FILE, "not a regular file", "pipe");
    remove(path);
    write_file(path, c.bytes, c.size);
    expect_ok(ga_load(m, directory, NULL, &e), &e);
    free(c.bytes);
    ga_destroy(m);
}

/* An edit of a good checkpoint: of JSON, or of the JSON inside a safetensors file. old NULL: the file
 * becomes `new_text`. */
typedef struct {
    const char *file, *old, *new_text;
    ga_result result;
    const char *word;
} edit;

static void check_edits(const char *from, const edit *edits, size_t n, ga_model *m, bool with_state) {
    const char *directory = in_root("edited");
    for (size_t i = 0; i < n; i++) {
        char path[512], what[256];
        ga_error e = {GA_OK, ""};
        ga_training_state state;
        ga_config c = ga_config_default();
        copy_directory(from, directory);
        snprintf(path, sizeof path, "%s/%s", directory, edits[i].file);
        snprintf(what, sizeof what, "%s: %s", edits[i].file, edits[i].new_text);
        if (!edits[i].old)
            write_file(path, edits[i].new_text, strlen(edits[i].new_text));
        else if (strstr(path, ".safetensors") && !strstr(path, ".json"))
            edit_header(path, edits[i].old, edits[i].new_text);
        else
            edit_text(path, edits[i].old, edits[i].new_text);
        ga_result result = ga_load_config(&c, directory, false, &e);
        if (result == GA_OK) result = ga_load(m, directory, with_state ? &state : NULL, &e);
        expect_failure(result, &e, edits[i].result, edits[i].word, what);
    }
}

static void test_bad_config(void **state) {
    (void)state;
    static const edit edits[] = {
        {"config.json", NULL, "", GA_ERR_FORMAT, "JSON at byte 0"},
        {"config.json", NULL, "null", GA_ERR_FORMAT, "object"},
        {"config.json", NULL, "{}", GA_ERR_FORMAT, "vocab_size is missing"},
        {"config.json", NULL, "{\"a\":\"\\ud800\"}", GA_ERR_FORMAT, "JSON at byte"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": 14", GA_ERR_FORMAT, "vocab_size = 14 contradicts"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": 13.5", GA_ERR_CONFIG, "vocab_size"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": -13", GA_ERR_CONFIG, "out of range"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": 1e99", GA_ERR_CONFIG, "vocab_size"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": 18446744073709551629", GA_ERR_CONFIG, "vocab_size"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": \"13\"", GA_ERR_FORMAT,
         "vocab_size has a value of the wrong"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": true", GA_ERR_FORMAT, "wrong type"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": [13]", GA_ERR_FORMAT, "wrong type"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": null", GA_ERR_FORMAT, "vocab_size is missing"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": 13, \"vocab_size\": 13", GA_ERR_FORMAT, "stands twice"},
        {"config.json", "\"vocab_size\": 13", "\"vocab_size\": null, \"vocab_size\": 13", GA_ERR_FORMAT,
         "stands twice"},
        {"config.json", "\"rope_theta\": 1234.5", "\"rope_theta\": 1e999", GA_ERR_CONFIG, "rope_theta"},
        {"config.json", "\"use_qk_norm\": true", "\"use_qk_norm\": 1", GA_ERR_FORMAT, "use_qk_norm"},
        {"config.json", "\"use_qk_norm\": true", "\"use_qk_norm\": false", GA_ERR_FORMAT,
         "use_qk_norm = 0 contradicts"},
        {"config.json", "\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"yarn\"}", GA_ERR_FORMAT,
         "rope_scaling"},
        {"config.json", "\"rope_scaling\": null", "\"rope_parameters\": {\"rope_type\": \"yarn\"}", GA_ERR_FORMAT,
         "rope_parameters"},
        {"config.json", "\"rope_scaling\": null", "\"rope_parameters\": {\"rope_theta\": 1}", GA_ERR_FORMAT,
         "rope_theta = 1 contradicts"},
        {"config.json", "\"attention_bias\": false", "\"attention_bias\": true", GA_ERR_CONFIG, "attention_bias"},
        {"config.json", "\"qkv_bias\": false", "\"qkv_bias\": true", GA_ERR_CONFIG, "qkv_bias"},
        {"config.json", "\"qkv_bias\": false", "\"mlp_bias\": true", GA_ERR_CONFIG, "mlp_bias"},
        {"config.json", "\"use_sliding_window\": false", "\"use_sliding_window\": true", GA_ERR_CONFIG,
         "use_sliding_window"},
        {"config.json", "\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", GA_ERR_CONFIG, "hidden_act"},
        {"config.json", "\"model_type\": \"qwen3\"", "\"model_type\": \"gemma\"", GA_ERR_CONFIG, "model_type"},
        {"config.json", "\"headwise_attn_output_gate\": false", "\"headwise_attn_output_gate\": true", GA_ERR_FORMAT,
         "both"},
        {"config.json", "\"elementwise_attn_output_gate\": true", "\"elementwise_attn_output_gate\": false",
         GA_ERR_FORMAT, "elementwise_attn_output_gate = 0"},
        {"config.json", "\"elementwise_attn_output_gate\": true", "\"elementwise_attn_output_gate\": 1", GA_ERR_FORMAT,
         "elementwise_attn_output_gate is neither"},
        {"config.json", "\"gate_position\": \"G1\"", "\"gate_position\": \"G2\"", GA_ERR_FORMAT, "contradict the gate"},
        {"config.json", "\"gate_type\": \"elementwise\"", "\"gate_type\": \"headwise\"", GA_ERR_FORMAT,
         "contradict the gate"},
        {"config.json", "\"gate_position\": \"G1\"", "\"gate_position\": \"G9\"", GA_ERR_CONFIG, "gate_position"},
        {"config.json", "\"gate_position\": \"G1\"", "\"gate_position\": \"\\u001b\"", GA_ERR_CONFIG, "not ASCII"},
        {"config.json", "\"gate_position\": \"G1\"", "\"gate_position\": 1", GA_ERR_FORMAT, "gate_position"},
        {"config.json", "\"gate_position\": \"G1\"", "\"gate_positron\": 1", GA_ERR_FORMAT, "gate_positron"},
        {"config.json", "\"gate_position\": \"G1\"", "\"learning_rate\": 1", GA_ERR_FORMAT, "learning_rate"},
        {"config.json", "\"gate_position\": \"G1\"", "\"head_dim\": 6", GA_ERR_FORMAT, "head_dim stands twice"},
        {"config.json", "\"gated_attention\": {", "\"gated_attention\": 1, \"x\": {", GA_ERR_FORMAT, "object"},
    };
    ga_model *m = make_model("", GA_INFERENCE, 1);
    save(m, in_root("good"), NULL);
    check_edits(in_root("good"), edits, COUNT(edits), m, false);
    char deep[4096];
    memset(deep, '[', sizeof deep - 1);
    memcpy(deep, "{\"a\":", 5);
    deep[sizeof deep - 1] = '\0';
    const edit last = {"config.json", NULL, deep, GA_ERR_FORMAT, "JSON at byte 68"};
    check_edits(in_root("good"), &last, 1, m, false);
    ga_destroy(m);
}

static void test_mismatch(void **state) {
    (void)state;
    static const edit edits[] = {
        {"model.safetensors", "\"model.norm.weight\"", "\"model.worm.weight\"", GA_ERR_MISMATCH,
         "model.norm.weight: is missing"},
        {"model.safetensors", "\"shape\":[13,12]", "\"shape\":[12,13]", GA_ERR_MISMATCH,
         "model.embed_tokens.weight: has shape [12,13], expected [13,12]"},
        {"model.safetensors", "\"shape\":[12]", "\"shape\":[1,12]", GA_ERR_MISMATCH, "has shape [1,12], expected [12]"},
        {"model.safetensors", "\"shape\":[48,12]", "\"shape\":[24,24]", GA_ERR_MISMATCH,
         "self_attn.q_proj.weight: has shape [24,24], expected [48,12]"},
    };
    ga_error e = {GA_OK, ""};
    ga_model *m = make_model("", GA_INFERENCE, 1);
    save(m, in_root("good"), NULL);
    check_edits(in_root("good"), edits, COUNT(edits), m, false);
    append_tensor(in_root("good/model.safetensors"), "model.layers.0.self_attn.q_proj.bias", "F32", "[1]", "abcd", 4);
    expect_failure(ga_load(m, in_root("good"), NULL, &e), &e, GA_ERR_MISMATCH, "q_proj.bias: biases", "bias");
    append_tensor(in_root("good/model.safetensors"), "lm_head.weight", "F32", "[0]", "", 0);
    expect_failure(ga_load(m, in_root("good"), NULL, &e), &e, GA_ERR_FORMAT, "lm_head.weight: stands twice", "head");
    ga_destroy(m);
    static const char *const others[][2] = {
        {"d_model=14", "d_model is 12 in the checkpoint and 14 in the model"},
        {"gate_activation=silu", "gate_activation"},
        {"gate_position=none", "gate_position"},
        {"rope_base=1000", "rope_base"},
        {"tied_embeddings=1", "tied_embeddings"},
    };
    m = make_model("", GA_INFERENCE, 1);
    save(m, in_root("good"), NULL);
    for (size_t i = 0; i < COUNT(others); i++) {
        ga_model *other = make_model(others[i][0], GA_INFERENCE, 2);
        expect_failure(ga_load(other, in_root("good"), NULL, &e), &e, GA_ERR_MISMATCH, others[i][1], others[i][0]);
        ga_destroy(other);
    }
    ga_model *same = make_model("max_seq_len=4 attn_clip=2 init_std=0.5 gate_frozen=1 seed=8", GA_INFERENCE, 2);
    expect_ok(ga_load(same, in_root("good"), NULL, &e), &e);
    expect_same_model(m, same, false);
    ga_destroy(same);
    ga_destroy(m);
}

#define SHARD_1 "\"model-00001-of-00002.safetensors\""
#define SHARD_2 "\"model-00002-of-00002.safetensors\""

static void test_bad_shards(void **state) {
    (void)state;
    static const char index[] = "model.safetensors.index.json";
    static const edit edits[] = {
        {index, "\"weight_map\"", "\"weight_mat\"", GA_ERR_FORMAT, "weight_map"},
        {index, NULL, "{\"weight_map\": []}", GA_ERR_FORMAT, "weight_map"},
        {index, NULL, "{\"weight_map\": {}}", GA_ERR_FORMAT, "weight_map is empty"},
        {index, SHARD_1, "\"../x\"", GA_ERR_FORMAT, "plain file name"},
        {index, SHARD_1, "\"/etc/passwd\"", GA_ERR_FORMAT, "plain file name"},
        {index, SHARD_1, "\"..\"", GA_ERR_FORMAT, "plain file name"},
        {index, SHARD_1, "\"\"", GA_ERR_FORMAT, "plain file name"},
        {index, SHARD_1, "\"a\\u0001\"", GA_ERR_FORMAT, "plain file name"},
        {index, SHARD_1, "\"\\u002e./x\"", GA_ERR_FORMAT, "plain file name"},
        {index, SHARD_1, "1", GA_ERR_FORMAT, "no string"},
        {index, SHARD_1, "\"model-3.safetensors\"", GA_ERR_FILE, "model-3.safetensors"},
        {index, SHARD_1, SHARD_2, GA_ERR_FORMAT, "not in this shard"},
        {index, "\"lm_head.weight\"", "\"lm_feet.weight\"", GA_ERR_FORMAT, "lm_feet.weight: is not in this shard"},
        {index, "\"lm_head.weight\": " SHARD_2 ",", "", GA_ERR_FORMAT, "lm_head.weight: is not in the index"},
        {index, "\"lm_head.weight\":", "\"lm_head.weight\": " SHARD_2 ", \"lm_head.weight\":", GA_ERR_FORMAT,
         "twice in the"},
        {"model-00001-of-00002.safetensors", "\"model.embed_tokens.weight\"", "\"lm_head.weight\"", GA_ERR_FORMAT,
         "embed"},
        {"model-00002-of-00002.safetensors", NULL, "", GA_ERR_FORMAT, "too short"},
    };
    ga_model *m = load("tests/fixtures/hf_elementwise", GA_INFERENCE, NULL);
    check_edits("tests/fixtures/hf_elementwise", edits, COUNT(edits), m, false);
    ga_error e = {GA_OK, ""};
    copy_directory("tests/fixtures/hf_elementwise", in_root("edited"));
    append_tensor(in_root("edited/model-00001-of-00002.safetensors"), "lm_head.weight", "F32", "[0]", "", 0);
    edit_text(in_root("edited/model.safetensors.index.json"), "\"lm_head",
              "\"lm_head.weight\": " SHARD_1 ", \"lm_head");
    expect_failure(ga_load(m, in_root("edited"), NULL, &e), &e, GA_ERR_FORMAT, "stands in two shards", "two shards");
    ga_destroy(m);
}

static void test_bad_state(void **state) {
    (void)state;
    static const char file[] = "training_state.json", moments[] = "optimizer.safetensors";
    static const edit edits[] = {
        {file, NULL, "", GA_ERR_FORMAT, "JSON"},
        {file, NULL, "{}", GA_ERR_FORMAT, "step"},
        {file, "\"123\"", "123", GA_ERR_FORMAT, "step is no whole number"},
        {file, "\"123\"", "\"\"", GA_ERR_FORMAT, "step"},
        {file, "\"123\"", "\"-1\"", GA_ERR_FORMAT, "step"},
        {file, "\"123\"", "\" 1\"", GA_ERR_FORMAT, "step"},
        {file, "\"123\"", "\"1e3\"", GA_ERR_FORMAT, "step"},
        {file, "18446744073709551615", "18446744073709551616", GA_ERR_FORMAT, "windows"},
        {file, "\"windows\"", "\"step\"", GA_ERR_FORMAT, "step stands twice"},
        {file, "\"updates\"", "\"uptates\"", GA_ERR_FORMAT, "updates"},
        {file, "0.66666666666666663", "1e999", GA_ERR_FORMAT, "best_val_loss"},
        {file, "0.66666666666666663", "\"1\"", GA_ERR_FORMAT, "best_val_loss"},
        {file, "0.66666666666666663", "true", GA_ERR_FORMAT, "best_val_loss"},
        {moments, "\"moment1.model.norm.weight\"", "\"moment3.model.norm.weight\"", GA_ERR_MISMATCH,
         "moment1.model.norm.weight"},
        {moments, "\"shape\":[13,12]", "\"shape\":[12,13]", GA_ERR_MISMATCH, "moment1.model.embed_tokens.weight"},
        {moments, NULL, "", GA_ERR_FORMAT, "optimizer.safetensors: is too short"},
    };
    ga_model *m = make_model("", GA_TRAINING, 1);
    save(m, in_root("good"), &some_state);
    check_edits(in_root("good"), edits, COUNT(edits), m, true);
    ga_destroy(m);
}

/* Bytes changed at random, often to those that mean something in JSON: any result, but no crash, and one line. */
static size_t flip(const char *directory, const char *const *files, size_t n_files, ga_model *m, size_t rounds,
                   uint64_t seed, bool with_state) {
    static const char marks[] = "{}[]\",:0123456789-.eE\\u \n";
    contents original[4], damaged = {NULL, 0};
    char paths[4][512];
    size_t refused = 0;
    for (size_t i = 0; i < n_files; i++) {
        snprintf(paths[i], sizeof paths[i], "%s/%s", directory, files[i]);
        original[i] = read_file(paths[i]);
    }
    for (size_t round = 0; round < rounds; round++) {
        size_t i = ga_random_bits(&seed) % n_files, flips = 1 + ga_random_bits(&seed) % 3;
        size_t header = strstr(paths[i], ".json") ? original[i].size : 8 + (size_t)little_endian(original[i].bytes, 8);
        damaged.bytes = (unsigned char *)malloc(original[i].size);
        assert_non_null(damaged.bytes);
        memcpy(damaged.bytes, original[i].bytes, original[i].size);
        for (size_t k = 0; k < flips; k++) {
            size_t at = ga_random_bits(&seed) % header;
            uint64_t bits = ga_random_bits(&seed);
            damaged.bytes[at] = bits & 1 ? (unsigned char)(damaged.bytes[at] ^ 1u << (bits >> 8) % 8)
                                         : (unsigned char)marks[(bits >> 8) % (sizeof marks - 1)];
        }
        damaged.size = ga_random_bits(&seed) % 8 ? original[i].size : ga_random_bits(&seed) % original[i].size;
        write_file(paths[i], damaged.bytes, damaged.size);
        free(damaged.bytes);
        ga_error e = {GA_OK, ""};
        ga_config c = ga_config_default();
        ga_training_state back;
        ga_result result = ga_load_config(&c, directory, false, &e);
        if (result == GA_OK) result = ga_load(m, directory, with_state ? &back : NULL, &e);
        if (result != GA_OK) expect_failure(result, &e, result, ": ", "flipped");
        refused += result != GA_OK;
        write_file(paths[i], original[i].bytes, original[i].size);
    }
    for (size_t i = 0; i < n_files; i++) free(original[i].bytes);
    return refused;
}

static void test_flipped_bytes(void **state) {
    (void)state;
    static const char *const ours[] = {"config.json", "model.safetensors", "optimizer.safetensors",
                                       "training_state.json"};
    static const char *const shards[] = {"model.safetensors.index.json", "model-00001-of-00002.safetensors",
                                         "model-00002-of-00002.safetensors"};
    ga_model *m = make_model("n_layers=1", GA_TRAINING, 1);
    save(m, in_root("flipped"), &some_state);
    size_t refused = flip(in_root("flipped"), ours, COUNT(ours), m, 3000, 1, true);
    assert_true(refused > 2000);
    ga_destroy(m);
    m = load("tests/fixtures/hf_elementwise", GA_INFERENCE, NULL);
    copy_directory("tests/fixtures/hf_elementwise", in_root("flipped"));
    refused = flip(in_root("flipped"), shards, COUNT(shards), m, 2000, 2, false);
    assert_true(refused > 1500);
    ga_destroy(m);
}

/* A header of many small tensors: time and memory stay in proportion. */
static void test_many_tensors(void **state) {
    (void)state;
    enum { N = 200000 };
    ga_error e = {GA_OK, ""};
    ga_model *m = make_model("", GA_INFERENCE, 1);
    save(m, in_root("many"), NULL);
    char *header = (char *)malloc(N * 80);
    assert_non_null(header);
    size_t used = 0;
    for (size_t i = 0; i < N; i++)
        used += (size_t)sprintf(header + used, "%c" ENTRY("t%zu", "[0]", "0", "0"), i ? ',' : '{', i * 7919 % N);
    header[used++] = '}';
    write_tensors(in_root("many/model.safetensors"), header, used, NULL, 0);
    expect_failure(ga_load(m, in_root("many"), NULL, &e), &e, GA_ERR_MISMATCH, "is missing", "many");
    free(header);
    ga_destroy(m);
}

/* ---- nothing is lost ------------------------------------------------------------------------------------------------ */

/* Files may not grow beyond so many bytes: a full disk, with another word for it. */
static ga_result save_limited(ga_model *m, const char *directory, const ga_training_state *state, size_t limit,
                              ga_error *e) {
    struct rlimit old, low;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    low = old;
    low.rlim_cur = limit;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    ga_result result = ga_save(m, directory, state, e);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    signal(SIGXFSZ, handler);
    return result;
}

static void test_full_disk(void **state) {
    (void)state;
    ga_model *a = make_model("", GA_TRAINING, 1), *b = make_model("", GA_TRAINING, 2);
    const char *directory = in_root("full");
    save(a, directory, &some_state);
    struct stat s;
    assert_int_equal(stat(in_root("full/model.safetensors"), &s), 0);
    size_t model = (size_t)s.st_size;
    const struct {
        size_t limit;
        const char *file;
    } cases[] = {
        {0, "config.json"},
        {100, "config.json"},
        {2000, "model.safetensors"},
        {model / 2, "model.safetensors"},
        {model - 1, "model.safetensors"},
        {model, "optimizer.safetensors"},
        {model + model / 2, "optimizer.safetensors"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        ga_error e = {GA_OK, ""};
        ga_training_state back, other = {9, 9, 9, 9, 9};
        ga_result result = save_limited(b, directory, &other, cases[i].limit, &e);
        expect_failure(result, &e, GA_ERR_FILE, cases[i].file, "full disk");
        expect_failure(result, &e, GA_ERR_FILE, "File too large", "full disk");
        assert_false(exists(in_root("full.partial")));
        assert_false(exists(in_root("full.replaced")));
        ga_model *read = load(directory, GA_TRAINING, &back);
        expect_same_model(a, read, true);
        expect_same_state(&some_state, &back);
        ga_destroy(read);
    }
    ga_destroy(a);
    ga_destroy(b);
}

static void test_no_access(void **state) {
    (void)state;
    ga_error e = {GA_OK, ""};
    ga_model *m = make_model("", GA_INFERENCE, 1);
    write_file(in_root("file"), "x", 1);
    expect_failure(ga_save(m, in_root("file"), NULL, &e), &e, GA_ERR_FILE, "no directory", "over a file");
    expect_failure(ga_save(m, in_root("file/below"), NULL, &e), &e, GA_ERR_FILE, "file", "below a file");
    expect_failure(ga_save(m, "", NULL, &e), &e, GA_ERR_FILE, "empty", "no name");
    assert_true(exists(in_root("file")));
    save(m, in_root("real"), NULL);
    assert_int_equal(symlink("real", in_root("link")), 0);
    expect_failure(ga_save(m, in_root("link"), NULL, &e), &e, GA_ERR_FILE, "no directory", "over a link");
    expect_ok(ga_load(m, in_root("link"), NULL, &e), &e);
    char name[6000];
    memset(name, 'a', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    expect_failure(ga_save(m, name, NULL, &e), &e, GA_ERR_FILE, "too long", "long name");
    expect_failure(ga_load(m, name, NULL, &e), &e, GA_ERR_FILE, "too long", "long name");
    assert_false(ga_checkpoint_exists(name, false));
    expect_failure(ga_load(m, in_root("nowhere"), NULL, &e), &e, GA_ERR_FILE, "nowhere", "missing");
    assert_int_equal(mkdir(in_root("locked"), 0555), 0);
    bool privileged = geteuid() == 0; /* whom no mode stops */
    if (privileged) assert_int_equal(seteuid(65534), 0);
    ga_result result = ga_save(m, in_root("locked/x"), NULL, &e);
    if (privileged) assert_int_equal(seteuid(0), 0);
    expect_failure(result, &e, GA_ERR_FILE, "Permission denied", "locked");
    ga_destroy(m);
}

/* What a save that was killed can leave behind. */
static void test_left_over(void **state) {
    (void)state;
    ga_error e = {GA_OK, ""};
    ga_model *a = make_model("", GA_TRAINING, 1), *b = make_model("", GA_TRAINING, 2);
    const char *directory = in_root("left"), *replaced = in_root("left.replaced"), *partial = in_root("left.partial");
    ga_training_state back;
    save(a, directory, &some_state);
    copy_directory(directory, partial); /* between the two renames */
    assert_int_equal(rename(directory, replaced), 0);
    assert_true(ga_checkpoint_exists(directory, true));
    ga_model *read = load(directory, GA_TRAINING, &back);
    expect_same_model(a, read, true);
    ga_destroy(read);
    expect_failure(save_limited(b, directory, &some_state, 100, &e), &e, GA_ERR_FILE, "config.json", "full disk");
    read = load(directory, GA_TRAINING, &back); /* the next save puts it back before it begins */
    expect_same_model(a, read, true);
    ga_destroy(read);
    assert_false(exists(replaced) || exists(partial));
    copy_directory(directory, replaced); /* after the second rename */
    save(b, directory, &some_state);
    read = load(directory, GA_TRAINING, &back);
    expect_same_model(b, read, true);
    ga_destroy(read);
    assert_false(exists(replaced) || exists(partial));
    ga_destroy(a);
    ga_destroy(b);
}

/* Files that are not ours move along; those of a checkpoint in another form do not. */
static void test_other_files(void **state) {
    (void)state;
    ga_error e = {GA_OK, ""};
    const char *directory = in_root("others");
    copy_directory("tests/fixtures/hf_elementwise", directory);
    ga_model *m = load(directory, GA_INFERENCE, NULL);
    write_file(in_root("others/tokenizer.json"), "{}", 2);
    assert_int_equal(mkdir(in_root("others/notes"), 0777), 0);
    write_file(in_root("others/notes/today"), "x", 1);
    save(m, directory, NULL);
    assert_true(exists(in_root("others/tokenizer.json")) && exists(in_root("others/notes/today")));
    assert_true(exists(in_root("others/expected.safetensors")));
    assert_false(exists(in_root("others/model.safetensors.index.json")));
    assert_false(exists(in_root("others/model-00001-of-00002.safetensors")));
    assert_false(exists(in_root("others.replaced")));
    ga_model *read = load(directory, GA_INFERENCE, NULL);
    expect_same_model(m, read, false);
    ga_destroy(read);
    assert_int_equal(mkdir(in_root("others.partial"), 0777), 0);
    write_file(in_root("others.partial/mine"), "x", 1);
    expect_failure(ga_save(m, directory, NULL, &e), &e, GA_ERR_FILE, "others.partial", "in the way");
    assert_true(exists(in_root("others.partial/mine")));
    ga_destroy(m);
}

/* A process that saves without end is killed at random moments: what is there is whole, one of the two. */
static void test_killed(void **state) {
    (void)state;
    ga_model *models[2] = {make_model("", GA_TRAINING, 1), make_model("", GA_TRAINING, 2)};
    const char *directory = in_root("killed");
    ga_training_state states[2] = {some_state, some_state}, back;
    states[1].step = 124;
    save(models[0], directory, &states[0]);
    uint64_t random = 11;
    for (size_t i = 0; i < 40; i++) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0)
            for (size_t k = 0;; k++)
                if (ga_save(models[k % 2], directory, &states[k % 2], NULL) != GA_OK) _exit(1);
        struct timespec wait = {0, (long)(ga_random_bits(&random) % 20000000)};
        nanosleep(&wait, NULL);
        assert_int_equal(kill(child, SIGKILL), 0);
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status));
        assert_true(ga_checkpoint_exists(directory, true));
        ga_model *read = load(directory, GA_TRAINING, &back);
        size_t which = back.step == 124;
        expect_same_state(&states[which], &back);
        expect_same_model(models[which], read, true);
        ga_destroy(read);
    }
    ga_destroy(models[0]);
    ga_destroy(models[1]);
}

/* Each allocation refused in turn. */
static void test_no_memory(void **state) {
    (void)state;
    ga_model *m = make_model("", GA_TRAINING, 1), *shards = load("tests/fixtures/hf_elementwise", GA_INFERENCE, NULL);
    ga_error e = {GA_OK, ""};
    ga_training_state back;
    const char *directory = in_root("memory");
    save(m, directory, &some_state);
    ga_model *mapped = create(&shards->config, GA_MAPPED);
    size_t blocks = heap.blocks, worked = 0;
    refuse_mmap = true;
    for (size_t call = 1; worked < 4; call++) {
        ga_result results[4];
        worked = 0;
        for (int i = 0; i < 4; i++) {
            heap.calls = 0;
            heap.refused = call;
            results[i] = i == 0   ? ga_save(m, directory, &some_state, &e)
                         : i == 1 ? ga_load(m, directory, &back, &e)
                                  : ga_load(i == 2 ? shards : mapped, "tests/fixtures/hf_elementwise", NULL, &e);
            bool reached = heap.calls >= call;
            heap.refused = 0;
            gai_unmap(mapped->mapped);
            mapped->mapped = NULL;
            assert_int_equal(heap.blocks, blocks);
            if (reached)
                expect_failure(results[i], &e, GA_ERR_MEMORY, "no memory", "refused");
            else
                expect_ok(results[i], &e);
            worked += !reached;
        }
        assert_true(ga_checkpoint_exists(directory, true));
        assert_true(call < 100);
    }
    refuse_mmap = false;
    ga_destroy(m);
    ga_destroy(shards);
    ga_destroy(mapped);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_packing),
        cmocka_unit_test(test_other_gates_stay_apart),
        cmocka_unit_test(test_special_values),
        cmocka_unit_test(test_large_tensor),
        cmocka_unit_test(test_large_mapped),
        cmocka_unit_test(test_mapped),
        cmocka_unit_test(test_mapped_limits),
        cmocka_unit_test(test_inspect),
        cmocka_unit_test(test_device_is_told),
        cmocka_unit_test(test_modes),
        cmocka_unit_test(test_keep_length),
        cmocka_unit_test(test_start_from),
        cmocka_unit_test(test_open),
        cmocka_unit_test(test_hugging_face),
        cmocka_unit_test(test_outside_models),
        cmocka_unit_test(test_mixture_keys),
        cmocka_unit_test(test_qwen3_next_rewritten),
        cmocka_unit_test(test_rewritten),
        cmocka_unit_test(test_refused_models),
        cmocka_unit_test(test_hugging_face_yarn),
        cmocka_unit_test(test_yarn_keys),
        cmocka_unit_test(test_plain_llama),
        cmocka_unit_test(test_half_precision),
        cmocka_unit_test(test_bfloat16),
        cmocka_unit_test(test_harmless_tensors),
        cmocka_unit_test(test_json_syntax),
        cmocka_unit_test(test_json_strings),
        cmocka_unit_test(test_bad_tensors),
        cmocka_unit_test(test_bad_lengths),
        cmocka_unit_test(test_bad_config),
        cmocka_unit_test(test_mismatch),
        cmocka_unit_test(test_bad_shards),
        cmocka_unit_test(test_bad_state),
        cmocka_unit_test(test_flipped_bytes),
        cmocka_unit_test(test_many_tensors),
        cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_no_access),
        cmocka_unit_test(test_left_over),
        cmocka_unit_test(test_other_files),
        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_no_memory),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    use_threads(1);
    return cmocka_run_group_tests_name("checkpoint", tests, make_root, remove_root);
}
