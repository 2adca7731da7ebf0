/* Tests of data/tokenizer.h, data/vocabulary.h and data/text.h: what the `tokenizers` library makes of hard texts
 * (tests/fixtures/tokenizers, by tests/reference/make_tokenizers.py), long texts in bounded time, hostile files, a
 * learned vocabulary against the library's, and the tokens that are kept beside a text.
 *
 *     make build/test_tokenizer && build/test_tokenizer
 */
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"

#include "testing.h"

#define STB_DS_IMPLEMENTATION
#define DATA_IMPLEMENTATION
#include "data/data.h"
#include "data/vocabulary.h"

#include <time.h>

#define FIXTURES "tests/fixtures/tokenizers/"

static char directory[64];
static ga_error e;

/* ---- helpers ---- */

static const char *path(const char *name) {
    static char full[4][160];
    static unsigned turn;
    char *out = full[turn++ % 4];
    snprintf(out, sizeof full[0], "%s/%s", directory, name);
    return out;
}

static const char *write_bytes(const char *name, const void *bytes, size_t n) {
    const char *full = path(name);
    FILE *file = fopen(full, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
    return full;
}

static const char *write_text(const char *name, const char *text) {
    return write_bytes(name, text, strlen(text));
}

/* A whole file as an stb_ds array. */
static char *read_file(const char *full) {
    FILE *file = fopen(full, "rb");
    if (!file) fail_msg("%s: cannot be opened", full);
    char *bytes = NULL;
    for (int c; (c = getc(file)) != EOF;) arrput(bytes, (char)c);
    fclose(file);
    return bytes;
}

static data_tokenizer *open_fixture(const char *name) {
    char full[128];
    snprintf(full, sizeof full, FIXTURES "%s.json", name);
    data_tokenizer *t = data_tokenizer_open(full, &e);
    if (!t) fail_msg("%s", e.text);
    return t;
}

static int32_t *encode(data_tokenizer *t, const char *text, size_t n, bool special) {
    int32_t *tokens = NULL;
    expect_ok(data_tokenizer_encode(t, text, n, special, &tokens, &e), &e);
    return tokens;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- cases.json ---- */

/* Hexadecimal in quotes, as an stb_ds array. */
static char *from_hex(gai_json value) {
    char *out = NULL;
    for (const char *p = value.at + 1; p + 1 < value.end; p += 2) {
        unsigned byte;
        assert_int_equal(sscanf(p, "%2x", &byte), 1);
        arrput(out, (char)byte);
    }
    return out;
}

static int32_t *numbers(gai_json array) {
    int32_t *out = NULL;
    gai_json value;
    while (array.at && gai_json_next(&array, NULL, &value)) arrput(out, (int32_t)strtol(value.at, NULL, 10));
    return out;
}

static void expect_tokens(const int32_t *tokens, const int32_t *expected, const char *name, size_t index) {
    size_t n = arrlenu(expected), i = 0;
    while (i < n && i < arrlenu(tokens) && tokens[i] == expected[i]) i++;
    if (i == n && arrlenu(tokens) == n) return;
    fail_msg("%s, text %zu: token %zu of %zu is %d, not %d (of %zu)", name, index, i, arrlenu(tokens),
             i < arrlenu(tokens) ? (int)tokens[i] : -1, i < n ? (int)expected[i] : -1, n);
}

static void expect_bytes(const data_tokenizer *t, const int32_t *tokens, gai_json hex, const char *name, size_t index) {
    if (!hex.at) return;
    char *expected = from_hex(hex), *decoded = NULL;
    for (size_t i = 0; i < arrlenu(tokens); i++) {
        size_t n = 0;
        const char *bytes = data_tokenizer_bytes(t, tokens[i], &n);
        assert_non_null(bytes);
        datai_append_bytes(&decoded, bytes, n);
    }
    if (arrlenu(decoded) != arrlenu(expected) ||
        (arrlenu(decoded) > 0 && memcmp(decoded, expected, arrlenu(decoded)) != 0))
        fail_msg("%s, text %zu: decodes to other bytes", name, index);
    arrfree(expected);
    arrfree(decoded);
}

static void try_case(data_tokenizer *t, const char *name, size_t index, const char *text, gai_json expected) {
    static const char *const names[] = {"ids", "around", "bytes"};
    gai_json v[3];
    expect_ok(gai_json_members(expected, names, 3, v, true), &e);
    int32_t *ids = numbers(v[0]), *around = numbers(v[1]);
    int32_t *tokens = encode(t, text, arrlenu(text), false), *special = encode(t, text, arrlenu(text), true);
    expect_tokens(tokens, ids, name, index);
    expect_bytes(t, tokens, v[2], name, index);
    if (arrlenu(around) > 0) {
        arrins(ids, 0, around[0]);
        arrput(ids, around[1]);
    }
    expect_tokens(special, ids, name, index);
    arrfree(ids);
    arrfree(around);
    arrfree(tokens);
    arrfree(special);
}

/* Each text twice: the second time from the cache of words. */
static void try_fixture(const char *name) {
    const char *const names[] = {"texts", name};
    gai_json cases, v[2], text, expected;
    char *file = NULL;
    expect_ok(gai_json_load(&cases, FIXTURES "cases.json", &file, &e), &e);
    expect_ok(gai_json_members(cases, names, 2, v, false), &e);
    data_tokenizer *t = open_fixture(name);
    size_t count = 0;
    while (gai_json_next(&v[0], NULL, &text)) {
        assert_true(gai_json_next(&v[1], NULL, &expected));
        char *bytes = from_hex(text);
        try_case(t, name, count++, bytes, expected);
        arrfree(bytes);
    }
    assert_true(count > 50);
    data_tokenizer_close(t);
    free(file);
}

static void test_encode_qwen(void **state) {
    (void)state;
    try_fixture("qwen");
}

static void test_encode_chat(void **state) {
    (void)state;
    try_fixture("chat");
}

static void test_encode_gpt2(void **state) {
    (void)state;
    try_fixture("gpt2");
}

static void test_encode_llama(void **state) {
    (void)state;
    try_fixture("llama");
}

static void test_encode_digits(void **state) {
    (void)state;
    try_fixture("digits");
}

static void test_encode_removed(void **state) {
    (void)state;
    try_fixture("removed");
}

static void test_encode_runs(void **state) {
    (void)state;
    try_fixture("runs");
}

/* ---- one tokenizer ---- */

static void test_questions(void **state) {
    (void)state;
    data_tokenizer *t = open_fixture("chat");
    size_t n;
    char label[DATA_LABEL_SIZE];
    assert_int_equal(data_tokenizer_size(t), 425);
    assert_int_equal(data_tokenizer_separator(t), 0);
    assert_int_equal(data_tokenizer_find(t, "<|im_end|>"), 421);
    assert_int_equal(data_tokenizer_find(t, "nothing"), -1);
    assert_true(data_tokenizer_special(t, 420));
    assert_false(data_tokenizer_special(t, data_tokenizer_find(t, "<think>")));
    assert_false(data_tokenizer_special(t, -1));
    assert_null(data_tokenizer_bytes(t, -1, &n));
    assert_null(data_tokenizer_bytes(t, 425, &n));
    assert_memory_equal(data_tokenizer_bytes(t, 420, &n), "<|im_start|>", 12);
    assert_int_equal(n, 12);
    assert_string_equal(data_tokenizer_label(t, 421, label, sizeof label), "<|im_end|>");
    assert_string_equal(data_tokenizer_label(t, 9999, label, sizeof label), "9999");
    assert_string_equal(data_tokenizer_label(t, data_tokenizer_find(t, "\xC4\xA0"), label, sizeof label),
                        "\xE2\x90\xA3");
    assert_string_equal(data_tokenizer_label(t, data_tokenizer_find(t, "\xC4\x8A"), label, sizeof label), "\\n");
    assert_string_equal(data_tokenizer_label(t, data_tokenizer_find(t, "\xC3\xBF"), label, sizeof label), "\\xFF");
    assert_string_equal(data_tokenizer_label(t, 420, label, 8), "<|im\xE2\x80\xA6");
    data_tokenizer_close(t);
    data_tokenizer_close(NULL);
}

/* A text in parts has the tokens of the whole, wherever the pattern lets it be cut. */
static void test_parts(void **state) {
    (void)state;
    static const char *const names[] = {"qwen", "llama", "gpt2"};
    char *text = read_file(FIXTURES "text.txt");
    size_t n = arrlenu(text);
    for (size_t i = 0; i < 3; i++) {
        data_tokenizer *t = open_fixture(names[i]);
        int32_t *whole = encode(t, text, n, false), *parts = NULL;
        size_t done = 0, count = 0;
        for (size_t part; (part = data_tokenizer_part(t, text + done, n - done < 2500 ? n - done : 2500)) > 0;
             count++) {
            assert_true(text[done + part - 1] == '\n');
            expect_ok(data_tokenizer_encode_part(t, text + done, part, &parts, &e), &e);
            done += part;
        }
        assert_true(i == 2 ? count == 0 : count > 0); /* gpt2.json has tokens that strip what is beside them */
        expect_ok(data_tokenizer_encode(t, text + done, n - done, false, &parts, &e), &e);
        expect_tokens(parts, whole, names[i], 0);
        arrfree(whole);
        arrfree(parts);
        data_tokenizer_close(t);
    }
    arrfree(text);
}

static void try_long(data_tokenizer *t, const char *name, const char *unit, const char *end, size_t n) {
    char *text = NULL;
    while (arrlenu(text) < n) datai_append_bytes(&text, unit, strlen(unit));
    datai_append_bytes(&text, end, strlen(end));
    double begin = seconds();
    int32_t *tokens = encode(t, text, arrlenu(text), false);
    expect_below(seconds() - begin, 8, "seconds for %s", name);
    assert_true(arrlenu(tokens) > 0);
    size_t length = 0, bytes = 0;
    for (size_t i = 0; i < arrlenu(tokens); i++) {
        assert_non_null(data_tokenizer_bytes(t, tokens[i], &bytes));
        length += bytes;
    }
    assert_true(length == arrlenu(text) || (unsigned char)unit[1] == 0xCC);
    arrfree(tokens);
    arrfree(text);
}

/* A megabyte that no pattern cuts, and others that invite the square of their length. */
static void test_long(void **state) {
    (void)state;
    enum { MEGABYTE = 1000000 };
    data_tokenizer *t = open_fixture("qwen");
    try_long(t, "one letter", "aa", "", MEGABYTE);
    try_long(t, "letters", "thegatedecidesforeveryheadhowmuch", "", MEGABYTE);
    try_long(t, "spaces", "  ", "x", MEGABYTE);
    try_long(t, "spaces to the end", "  ", "", MEGABYTE);
    try_long(t, "digits", "77", "", MEGABYTE);
    try_long(t, "lines", "\n\n", "x", MEGABYTE);
    try_long(t, "punctuation", "-.", "", MEGABYTE);
    try_long(t, "marks", "\xCC\xA3\xCC\x81", "", MEGABYTE);
    try_long(t, "angle brackets", "<|im_start|", "", MEGABYTE);
    data_tokenizer_close(t);
}

/* More words than the cache keeps. */
static void test_many_words(void **state) {
    (void)state;
    data_tokenizer *t = open_fixture("qwen");
    char *text = NULL;
    uint64_t random = 7;
    for (size_t i = 0; i < 400000; i++) {
        char word[8] = " ";
        for (size_t k = 1; k < 7; k++) word[k] = (char)('a' + ga_random_bits(&random) % 26);
        datai_append_bytes(&text, word, 7);
    }
    int32_t *tokens = encode(t, text, arrlenu(text), false);
    size_t at = 0;
    for (size_t i = 0; i < arrlenu(tokens); i++) {
        size_t n = 0;
        const char *bytes = data_tokenizer_bytes(t, tokens[i], &n);
        assert_memory_equal(text + at, bytes, n);
        at += n;
    }
    assert_int_equal(at, arrlenu(text));
    arrfree(tokens);
    arrfree(text);
    data_tokenizer_close(t);
}

/* ---- files that are not what they should be ---- */

#define MODEL(vocab, merges)                                                                                        \
    "{\"pre_tokenizer\":{\"type\":\"ByteLevel\"},\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\"," \
    "\"vocab\":" vocab ",\"merges\":" merges "}}"
#define WITH(member) \
    "{\"decoder\":{\"type\":\"ByteLevel\"}," member ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]}}"
#define BYTE_LEVEL "\"pre_tokenizer\":{\"type\":\"ByteLevel\"}"

static void test_hostile(void **state) {
    (void)state;
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"", "no valid JSON"},
        {"[]", "holds no JSON object"},
        {"{\"model\":", "no valid JSON"},
        {"{}", "has no model"},
        {"{\"decoder\":null,\"model\":{\"type\":\"BPE\"}}", "a decoder of type \"null\" is not known here"},
        {"{\"decoder\":{\"type\":\"Metaspace\"},\"model\":{}}", "a decoder of type \"Metaspace\""},
        {"{\"decoder\":{\"type\":7},\"model\":{}}", "the decoder has no \"type\""},
        {"{\"decoder\":7,\"model\":{}}", "an object is missing"},
        {"{\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{}}", "has no ByteLevel"},
        {WITH("\"pre_tokenizer\":{\"type\":\"Whitespace\"}"), "a pre_tokenizer of type \"Whitespace\""},
        {WITH("\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"},{\"type\":"
              "\"Digits\"}]}"),
         "ByteLevel is not the last"},
        {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\"}"), "needs pattern and behavior"},
        {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"MergedWithNext\",\"pattern\":{\"String\":\"a\"}}"),
         "\"MergedWithNext\" is not known"},
        {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":{}}"),
         "neither Regex nor String"},
        {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":{\"Regex\":\"(\"}}"),
         "the pattern \"(\""},
        {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":{\"Regex\":\"\\\\C\"}}"),
         "the pattern"},
        {WITH(BYTE_LEVEL ",\"normalizer\":{\"type\":\"Lowercase\"}"), "a normalizer of type \"Lowercase\""},
        {WITH(BYTE_LEVEL ",\"post_processor\":{\"type\":\"BertProcessing\"}"),
         "a post_processor of type \"BertProcessing\""},
        {WITH(BYTE_LEVEL
              ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}]}"),
         "\"x\" is no token"},
        {WITH(BYTE_LEVEL ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{}]}"),
         "no special tokens around"},
        {WITH(BYTE_LEVEL ",\"added_tokens\":[{\"id\":0,\"content\":\"b\"}]"), "has the id 0 of another"},
        {WITH(BYTE_LEVEL ",\"added_tokens\":[{\"id\":1,\"content\":\"a\"}]"), "or another id"},
        {WITH(BYTE_LEVEL ",\"added_tokens\":[{\"id\":-1,\"content\":\"b\"}]"), "needs a number id"},
        {WITH(BYTE_LEVEL ",\"added_tokens\":[{\"id\":1}]"), "needs a number id and a string content"},
        {WITH(BYTE_LEVEL ",\"added_tokens\":[{\"id\":99999999,\"content\":\"b\"}]"), "id 99999999 in a vocabulary of"},
        {WITH(BYTE_LEVEL ",\"added_tokens\":[{\"id\":1,\"content\":\"\xFF\"}]"), "token 1 is no UTF-8"},
        {MODEL("[]", "[]"), "no object vocab"},
        {MODEL("{}", "{}"), "no array merges"},
        {MODEL("{\"a\":0,\"b\":0}", "[]"), "two tokens have the id 0"},
        {MODEL("{\"a\":0,\"a\":1}", "[]"), "\"a\" stands twice"},
        {MODEL("{\"a\":\"0\"}", "[]"), "the id of \"a\" is no number"},
        {MODEL("{\"a\":0.5}", "[]"), "the id of \"a\" is no number"},
        {MODEL("{\"a\":4294967296}", "[]"), "the id of \"a\" is no number"},
        {MODEL("{\"a\":2147483647}", "[]"), "id 2147483647 in a vocabulary of"},
        {MODEL("{\"a\":0,\"b\":1,\"ab\":2}", "[\"a b\",\"a c\"]"), "merge 1 has a part"},
        {MODEL("{\"a\":0,\"b\":1}", "[\"a b\"]"), "merge 0 has a part"},
        {MODEL("{\"a\":0}", "[\"a\"]"), "merge 0 is neither"},
        {MODEL("{\"a\":0}", "[\"a a a\"]"), "merge 0 is neither"},
        {MODEL("{\"a\":0}", "[[\"a\"]]"), "merge 0 is neither"},
        {MODEL("{\"a\":0}", "[[\"a\",\"a\",\"a\"]]"), "merge 0 is neither"},
        {MODEL("{\"a\":0}", "[7]"), "merge 0 is neither"},
        {MODEL("{\"a\":0}", "[],\"type\":\"BPE\""), "type stands twice"},
        {MODEL("{\"a\":0}", "[],\"dropout\":0.1"), "model.dropout is set"},
        {MODEL("{\"a\":0}", "[],\"byte_fallback\":true"), "model.byte_fallback is set"},
        {MODEL("{\"a\":0}", "[],\"continuing_subword_prefix\":\"##\""), "model.continuing_subword_prefix is set"},
        {MODEL("{\"a\":0}", "[],\"unk_token\":\"a\""), "model.unk_token with a vocabulary that lacks the byte 00"},
        {"{" BYTE_LEVEL ",\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"WordPiece\"}}",
         "a model of type \"WordPiece\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        data_tokenizer *t = data_tokenizer_open(write_text("bad.json", cases[i].text), &e);
        if (t) fail_msg("case %zu was read: %s", i, cases[i].text);
        if (!strstr(e.text, cases[i].expected) || !strstr(e.text, "bad.json"))
            fail_msg("case %zu: \"%s\", expected \"%s\"", i, e.text, cases[i].expected);
    }
    assert_null(data_tokenizer_open(path("nothing"), &e));
    assert_int_equal(e.result, GA_ERR_FILE);
    assert_null(data_tokenizer_open(directory, &e));
    assert_non_null(strstr(e.text, "tokenizer.json"));
    assert_null(data_tokenizer_open(path("nothing"), NULL));
    assert_false(data_tokenizer_exists(directory));
}

/* A file that was cut, or has a byte changed, is refused or read, but never harms. */
static void test_damaged(void **state) {
    (void)state;
    char *good = read_file(FIXTURES "chat.json");
    size_t n = arrlenu(good);
    uint64_t random = 3;
    for (size_t i = 0; i < 300; i++) {
        char *bytes = malloc(n);
        assert_non_null(bytes);
        memcpy(bytes, good, n);
        size_t length = i % 3 == 0 ? (size_t)(ga_random_bits(&random) % n) : n;
        if (i % 3 != 0) bytes[ga_random_bits(&random) % (i % 3 == 1 ? 1500 : n)] = (char)ga_random_bits(&random);
        data_tokenizer *t = data_tokenizer_open(write_bytes("bad.json", bytes, length), &e);
        int32_t *tokens = t ? encode(t, "It's 12 caf\xC3\xA9!<|im_end|>\n", 24, true) : NULL;
        arrfree(tokens);
        data_tokenizer_close(t);
        free(bytes);
    }
    arrfree(good);
}

/* Keys that meet in one table are apart in the next. */
static void test_table_seeds(void **state) {
    (void)state;
    data_map maps[2] = {{0}};
    data_pairs pairs[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        assert_true(data_map_put(&maps[i], "gate", 4, 1));
        for (uint32_t k = 0; k < 1000; k++) assert_true(data_pairs_put(&pairs[i], k, k));
        for (uint32_t k = 0; k < 1000; k++) assert_int_equal(data_pairs_get(&pairs[i], k, 7000), k);
    }
    assert_true(maps[0].seed != maps[1].seed && maps[0].entries[0].hash != maps[1].entries[0].hash);
    assert_true(pairs[0].seed != pairs[1].seed);
    for (int i = 0; i < 2; i++) {
        data_map_free(&maps[i]);
        data_pairs_free(&pairs[i]);
    }
}

/* A pattern that needs too long is given up. */
static void test_slow_pattern(void **state) {
    (void)state;
    static const char text[] = WITH(
        "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"behavior\":\"Isolated\","
        "\"pattern\":{\"Regex\":\"(a|a)+[bd]\"}},{\"type\":\"ByteLevel\",\"use_regex\":false}]}");
    data_tokenizer *t = data_tokenizer_open(write_text("slow.json", text), &e);
    if (!t) fail_msg("%s", e.text);
    int32_t *tokens = NULL;
    double begin = seconds();
    assert_int_equal(
        data_tokenizer_encode(t, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac", 52, false, &tokens, &e),
        GA_ERR_FORMAT);
    assert_non_null(strstr(e.text, "pattern cannot split this text"));
    expect_below(seconds() - begin, 20, "seconds");
    arrfree(tokens);
    data_tokenizer_close(t);
}

/* ---- a vocabulary of one's own ---- */

static void expect_same_vocabulary(const data_tokenizer *t, const data_tokenizer *other, size_t size) {
    for (size_t id = 0; id < size; id++) {
        size_t n = 0, m = 0;
        const char *bytes = data_tokenizer_bytes(t, (int32_t)id, &n);
        const char *others = data_tokenizer_bytes(other, (int32_t)id, &m);
        if (!bytes || !others || n != m || memcmp(bytes, others, n) != 0) fail_msg("token %zu differs", id);
    }
}

static void test_vocabulary(void **state) {
    (void)state;
    enum { VOCAB_SIZE = 420 };
    const char *text = FIXTURES "text.txt", *out = path("tokenizer.json");
    data_vocabulary_options options = {.vocab_size = VOCAB_SIZE, .min_frequency = 2};
    expect_ok(data_vocabulary_train(&text, 1, &options, out, &e), &e);
    assert_true(data_tokenizer_exists(directory));
    data_tokenizer *t = data_tokenizer_open(directory, &e), *library = open_fixture("qwen");
    if (!t) fail_msg("%s", e.text);
    assert_int_equal(data_tokenizer_size(t), VOCAB_SIZE);
    expect_same_vocabulary(t, library, VOCAB_SIZE);
    assert_true(arrlenu(t->merged) == VOCAB_SIZE - 257 && arrlenu(library->merged) == VOCAB_SIZE - 257);
    assert_memory_equal(t->merged, library->merged, arrlenu(t->merged) * sizeof *t->merged);
    char *bytes = read_file(text);
    int32_t *tokens = encode(t, bytes, arrlenu(bytes), false),
            *expected = encode(library, bytes, arrlenu(bytes), false);
    expect_tokens(tokens, expected, "learned", 0);
    arrfree(tokens);
    arrfree(expected);
    arrfree(bytes);
    data_tokenizer_close(library);
    data_tokenizer_close(t);
    unlink(out);
}

/* Without an end the whole words remain, and no pair. */
static void test_vocabulary_exhausted(void **state) {
    (void)state;
    const char *text = write_text("few.txt", "low lower lowest low low lower"), *out = path("few.json");
    data_vocabulary_options options = {.vocab_size = 1000};
    expect_ok(data_vocabulary_train(&text, 1, &options, out, &e), &e);
    data_tokenizer *t = data_tokenizer_open(out, &e);
    if (!t) fail_msg("%s", e.text);
    assert_in_range(data_tokenizer_size(t), 260, 275);
    int32_t *tokens = encode(t, "low lower lowest", 16, false);
    assert_int_equal(arrlenu(tokens), 3);
    arrfree(tokens);
    data_tokenizer_close(t);

    options.vocab_size = 256;
    assert_int_equal(data_vocabulary_train(&text, 1, &options, out, &e), GA_ERR_CONFIG);
    assert_non_null(strstr(e.text, "no room for the 256 bytes"));
    options.vocab_size = 300;
    text = path("nothing.txt");
    assert_int_equal(data_vocabulary_train(&text, 1, &options, out, &e), GA_ERR_FILE);
    text = write_text("bad.jsonl", "{\"text\": 7}\n");
    assert_int_equal(data_vocabulary_train(&text, 1, &options, out, &e), GA_ERR_FORMAT);
    assert_non_null(strstr(e.text, "bad.jsonl:1: \"text\" is not a string"));
    text = write_text("empty.txt", "");
    assert_int_equal(data_vocabulary_train(&text, 1, &options, out, &e), GA_ERR_FORMAT);
    assert_non_null(strstr(e.text, "empty.txt: holds no text"));
    text = FIXTURES "text.txt";
    assert_int_equal(data_vocabulary_train(&text, 1, &options, "/nowhere/x.json", &e), GA_ERR_FILE);
}

/* ---- tokens beside a text ---- */

static const char *kept_path(const char *text, const data_tokenizer *t) {
    static char full[256];
    snprintf(full, sizeof full, "%s.%016llx.tokens", text, (unsigned long long)data_tokenizer_hash(t));
    return full;
}

static uint64_t inode_of(const char *full) {
    struct stat status;
    assert_int_equal(stat(full, &status), 0);
    return (uint64_t)status.st_ino;
}

/* The kept tokens of a text are those that encoding it gives. Returns the inode of their file. */
static uint64_t expect_kept(data_tokenizer *t, const char *text, const char *content) {
    data_text_layout layout;
    int fd = data_text_tokens(text, t, NULL, &layout, &e);
    if (fd < 0) fail_msg("%s", e.text);
    int32_t *expected = encode(t, content, strlen(content), false);
    assert_int_equal(layout.width, 2);
    assert_int_equal(layout.tokens, arrlenu(expected));
    for (size_t i = 0; i < arrlenu(expected); i++) {
        unsigned char b[2];
        assert_int_equal(pread(fd, b, 2, (off_t)(layout.header + 2 * i)), 2);
        assert_int_equal(b[0] | b[1] << 8, expected[i]);
    }
    arrfree(expected);
    close(fd);
    return inode_of(kept_path(text, t));
}

static void set_mtime(const char *full, time_t when) {
    const struct timespec times[2] = {{when, 0}, {when, 0}};
    assert_int_equal(utimensat(AT_FDCWD, full, times, 0), 0);
}

static void change_byte(const char *full, long at) {
    FILE *file = fopen(full, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, at, at < 0 ? SEEK_END : SEEK_SET), 0);
    int c = getc(file);
    assert_int_equal(fseek(file, -1, SEEK_CUR), 0);
    putc(c ^ 1, file);
    assert_int_equal(fclose(file), 0);
}

static void test_kept_tokens(void **state) {
    (void)state;
    data_tokenizer *t = open_fixture("qwen"), *other = open_fixture("gpt2");
    const char *text = write_text("book.txt", "The gate decides.\nHow much may pass?\n");
    char *name = strdup(text);
    assert_non_null(name);
    set_mtime(name, 1000000000);
    uint64_t first = expect_kept(t, name, "The gate decides.\nHow much may pass?\n");
    assert_true(expect_kept(t, name, "The gate decides.\nHow much may pass?\n") == first);
    /* another tokenizer has its own */
    assert_true(expect_kept(other, name, "The gate decides.\nHow much may pass?\n") != first);
    assert_true(expect_kept(t, name, "The gate decides.\nHow much may pass?\n") == first);
    /* touched, but the same: kept, and with its new time; then the same size, but another text */
    set_mtime(name, 1000000001);
    assert_true(expect_kept(t, name, "The gate decides.\nHow much may pass?\n") == first);
    write_text("book.txt", "The hate decides.\nHow much may pass?\n");
    set_mtime(name, 1000000002);
    expect_kept(t, name, "The hate decides.\nHow much may pass?\n");
    /* same time, another size */
    write_text("book.txt", "The hate decides.\nHow much may pass??\n");
    set_mtime(name, 1000000002);
    expect_kept(t, name, "The hate decides.\nHow much may pass??\n");
    /* damage anywhere: header, tokens, an end that is missing, a file that is none */
    static const long places[] = {0, 9, 13, 20, 30, 44, 50, 58, 70, 73, -1};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        change_byte(kept_path(name, t), places[i]);
        expect_kept(t, name, "The hate decides.\nHow much may pass??\n");
    }
    assert_int_equal(truncate(kept_path(name, t), 75), 0);
    expect_kept(t, name, "The hate decides.\nHow much may pass??\n");
    assert_int_equal(truncate(kept_path(name, t), 0), 0);
    expect_kept(t, name, "The hate decides.\nHow much may pass??\n");
    assert_int_equal(unlink(kept_path(name, t)), 0);
    assert_int_equal(mkdir(kept_path(name, t), 0777), 0);
    data_text_layout layout;
    assert_true(data_text_tokens(name, t, NULL, &layout, &e) < 0);
    assert_int_equal(e.result, GA_ERR_FILE);
    assert_int_equal(rmdir(kept_path(name, t)), 0);
    assert_true(data_text_tokens(path("nothing.txt"), t, NULL, &layout, &e) < 0);
    free(name);
    data_tokenizer_close(t);
    data_tokenizer_close(other);
}

/* The documents of .jsonl are each followed by the separator, whatever is in them. */
static void test_documents(void **state) {
    (void)state;
    const char *text =
        write_text("docs.jsonl", "{\"text\": \"a\\u00e9 b\\n\", \"x\": [1]}\n\n{\"id\": 1, \"text\": \"\"}\n"
                                 "{\"text\": \"The gate\"}\n");
    data_tokenizer *t = open_fixture("qwen");
    expect_kept(t, text, "a\xC3\xA9 b\n<|endoftext|><|endoftext|>The gate<|endoftext|>");
    data_tokenizer_close(t);
}

/* A text of more than a part, read as a stream: each window is cut from the tokens of the whole. */
static void test_stream(void **state) {
    (void)state;
    enum { T = 64 };
    char *unit = read_file(FIXTURES "text.txt"), *text = NULL, message[512];
    while (arrlenu(text) < 3 * DATAI_TEXT_PART / 2) datai_append_bytes(&text, unit, arrlenu(unit));
    /* the end of the first block of the file lies within a word */
    while (!islower((unsigned char)text[DATAI_TEXT_PART - 1]) || !islower((unsigned char)text[DATAI_TEXT_PART]))
        arrins(text, 0, '.');
    const char *name = write_bytes("long.txt", text, arrlenu(text));
    data_tokenizer *t = open_fixture("qwen");
    int32_t *expected = encode(t, text, arrlenu(text), false), inputs[T], targets[T];
    data_options options = {.source = name, .vocab_size = 421, .seq_len = T, .bos_token = -1};
    options.tokenizer = FIXTURES "qwen.json";
    data_stream *s = data_open(&options, message, sizeof message);
    if (!s) fail_msg("%s", message);
    assert_int_equal(data_windows(s, DATA_TRAIN), (arrlenu(expected) - 1) / T);
    for (uint64_t i = 0; i < data_windows(s, DATA_TRAIN); i++) {
        assert_true(data_window(s, DATA_TRAIN, i, inputs, targets, message, sizeof message));
        assert_memory_equal(inputs, expected + i * T, sizeof inputs);
        assert_memory_equal(targets, expected + i * T + 1, sizeof targets);
    }
    assert_string_equal(data_token_text(s, 0, message, sizeof message), "<|endoftext|>");
    assert_int_equal(data_tokenizer_size(data_stream_tokenizer(s)), 421);
    data_close(s);
    options.vocab_size = 420;
    assert_null(data_open(&options, message, sizeof message));
    assert_non_null(strstr(message, "has tokens up to 420, beyond the model's vocab_size 420"));
    options.tokenizer = "/nowhere";
    assert_null(data_open(&options, message, sizeof message));
    arrfree(unit);
    arrfree(text);
    arrfree(expected);
    data_tokenizer_close(t);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_encode_qwen),
        cmocka_unit_test(test_encode_chat),
        cmocka_unit_test(test_encode_gpt2),
        cmocka_unit_test(test_encode_llama),
        cmocka_unit_test(test_encode_digits),
        cmocka_unit_test(test_encode_removed),
        cmocka_unit_test(test_encode_runs),
        cmocka_unit_test(test_questions),
        cmocka_unit_test(test_parts),
        cmocka_unit_test(test_long),
        cmocka_unit_test(test_many_words),
        cmocka_unit_test(test_hostile),
        cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_table_seeds),
        cmocka_unit_test(test_slow_pattern),
        cmocka_unit_test(test_vocabulary),
        cmocka_unit_test(test_vocabulary_exhausted),
        cmocka_unit_test(test_kept_tokens),
        cmocka_unit_test(test_documents),
        cmocka_unit_test(test_stream),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const char *parent = getenv("TMPDIR");
    snprintf(directory, sizeof directory, "%s/test_tokenizer.XXXXXX", parent && strlen(parent) < 40 ? parent : "/tmp");
    if (!mkdtemp(directory)) return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    char command[96];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    return system(command) ? 1 : failed;
}
