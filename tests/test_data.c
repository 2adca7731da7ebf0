/* Tests of the token streams in data/: every format, how windows are cut, split and shuffled, bad input, and the
 * generators against their definition.
 *
 *     cc -std=c11 -O2 -I. tests/test_data.c -o test_data -lcmocka -lm && ./test_data
 */
#define _POSIX_C_SOURCE 200809L
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define STB_DS_IMPLEMENTATION
#define GATED_ATTENTION_IMPLEMENTATION
#define DATA_IMPLEMENTATION
#include "data/data.h"
#include "data/questions.h"
#include "drivers/train/spikes.h"

#include <time.h>

enum { MAX_T = 512 };

static char directory[64];
static char error[512];
static int32_t inputs[MAX_T], targets[MAX_T], again_inputs[MAX_T], again_targets[MAX_T];

/* ---- Helpers ---- */

static const char *path(const char *name) {
    static char full[4][128];
    static unsigned turn;
    char *out = full[turn++ % 4];
    snprintf(out, sizeof full[0], "%s/%s", directory, name);
    return out;
}

static const char *write_file(const char *name, const void *bytes, size_t size) {
    const char *full = path(name);
    FILE *file = fopen(full, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
    return full;
}

static const char *write_text(const char *name, const char *text) {
    return write_file(name, text, strlen(text));
}

static void put_little_endian(unsigned char *out, uint32_t value, unsigned width) {
    for (unsigned i = 0; i < width; i++) out[i] = (unsigned char)(value >> (8 * i));
}

/* A file of count tokens of which the one at position i is token(i), behind a header that may be empty. */
static const char *write_tokens(const char *name, unsigned width, size_t count, uint32_t (*token)(size_t),
                                const void *header, size_t header_size) {
    unsigned char *bytes = malloc(header_size + count * width);
    assert_non_null(bytes);
    if (header_size > 0) memcpy(bytes, header, header_size);
    for (size_t i = 0; i < count; i++) put_little_endian(bytes + header_size + i * width, token(i), width);
    const char *full = write_file(name, bytes, header_size + count * width);
    free(bytes);
    return full;
}

static uint32_t position(size_t i) {
    return (uint32_t)i;
}

static uint32_t scattered(size_t i) {
    return (uint32_t)(i * 40503u % 60000);
}

static data_options options_of(const char *source, size_t vocab_size, size_t T) {
    return (data_options){.source = source, .vocab_size = vocab_size, .seq_len = T, .bos_token = -1};
}

static data_stream *open_good(data_options options) {
    error[0] = '\0';
    data_stream *s = data_open(&options, error, sizeof error);
    if (!s) fail_msg("%s", error);
    return s;
}

static void read_good(data_stream *s, data_part part, uint64_t index) {
    if (!data_window(s, part, index, inputs, targets, error, sizeof error)) fail_msg("%s", error);
}

static void assert_error(const char *part) {
    if (!strstr(error, part)) fail_msg("\"%s\" does not say \"%s\"", error, part);
    assert_null(strchr(error, '\n'));
}

static void open_bad(data_options options, const char *part) {
    error[0] = '\0';
    assert_null(data_open(&options, error, sizeof error));
    assert_error(part);
    assert_null(data_open(&options, NULL, 0));
}

static void source_bad(const char *source, const char *part) {
    open_bad(options_of(source, 1000, 4), part);
}

#define assert_close(a, b, tolerance)                                                                 \
    do {                                                                                              \
        if (!(fabs((a) - (b)) < (tolerance)))                                                         \
            fail_msg("%s = %.9g, %s = %.9g: further apart than %g", #a, (double)(a), #b, (double)(b), \
                     (double)(tolerance));                                                            \
    } while (0)

/* ---- Random numbers ---- */

/* The known answers that come with the Random123 library. */
static void test_philox(void **state) {
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        uint32_t out[4];
        data_philox(out, known[i].counter, known[i].key);
        assert_memory_equal(out, known[i].out, sizeof out);
    }
}

static void test_random_draws(void **state) {
    (void)state;
    enum { N = 100000, BINS = 7 };
    data_random r = data_random_at(3, DATA_RANDOM_TRAIN, 5);
    double mean = 0;
    size_t bins[BINS] = {0};
    for (int i = 0; i < N; i++) {
        double u = data_random_uniform(&r);
        assert_true(u > 0 && u < 1);
        mean += u / N;
        uint32_t b = data_random_below(&r, BINS);
        assert_true(b < BINS);
        bins[b]++;
    }
    assert_close(mean, 0.5, 4 * sqrt(1.0 / 12 / N));
    for (int b = 0; b < BINS; b++) assert_close((double)bins[b] / N, 1.0 / BINS, 4 * sqrt(1.0 / BINS / N));
    assert_int_equal(data_random_below(&r, 1), 0);

    /* Were the surplus kept, half of these would be multiples of three. */
    size_t multiples = 0;
    for (int i = 0; i < N; i++) multiples += data_random_below(&r, 3u << 30) % 3 == 0;
    assert_close((double)multiples / N, 1.0 / 3, 4 * sqrt(2.0 / 9 / N));
}

static void test_permutation(void **state) {
    (void)state;
    for (uint64_t n = 1; n <= 300; n++) {
        unsigned char seen[300] = {0};
        size_t moved = 0, differs = 0;
        for (uint64_t i = 0; i < n; i++) {
            uint64_t to = data_permute(i, n, 9, 0);
            assert_true(to < n);
            assert_false(seen[to]);
            seen[to] = 1;
            moved += to != i;
            differs += to != data_permute(i, n, 9, 1);
        }
        if (n >= 20) assert_true(moved > n / 2 && differs > n / 2);
    }
    for (uint64_t i = 0; i < 1000; i++) assert_true(data_permute(i, UINT64_MAX - 1, 1, 0) < UINT64_MAX - 1);

    /* Over many epochs each of few places is equally likely for each of few windows. */
    enum { N = 5, EPOCHS = 20000 };
    size_t count[N][N] = {{0}};
    for (uint64_t epoch = 0; epoch < EPOCHS; epoch++)
        for (uint64_t i = 0; i < N; i++) count[i][data_permute(i, N, 4, epoch)]++;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) assert_close((double)count[i][j] / EPOCHS, 1.0 / N, 5 * sqrt(0.2 * 0.8 / EPOCHS));
}

/* ---- Windows of files ---- */

static void check_formats(const char *source, size_t vocab_size, size_t count, uint32_t (*token)(size_t)) {
    enum { T = 7 };
    for (int bos = 0; bos < 2; bos++) {
        data_options options = options_of(source, vocab_size, T);
        if (bos) options.bos_token = (long)vocab_size - 1;
        data_stream *s = open_good(options);
        uint64_t windows = (count - (bos ? 0 : 1)) / T;
        assert_int_equal(data_windows(s, DATA_TRAIN), windows);
        assert_int_equal(data_windows(s, DATA_VAL), 0);
        for (uint64_t i = windows; i-- > 0;) { /* backwards: any order will do */
            read_good(s, DATA_TRAIN, i);
            for (size_t t = 0; t < T; t++) {
                size_t at = i * T + t;
                assert_int_equal(targets[t], token(at + !bos));
                assert_int_equal(inputs[t], bos && t == 0 ? vocab_size - 1 : token(at - (bos ? 1 : 0)));
            }
        }
        read_good(s, DATA_TRAIN, windows + 2); /* the next epoch, in order without shuffle */
        assert_int_equal(targets[0], token(2 * T + !bos));
        data_close(s);
    }
}

static uint32_t letter(size_t i) {
    return (uint32_t)("the quick brown fox\n"[i % 20]);
}

static uint32_t large(size_t i) {
    return (uint32_t)(i * 2654435761u % 1000000);
}

static void llm_header(unsigned char header[1024], uint32_t magic, uint32_t version, uint32_t count) {
    memset(header, 0, 1024);
    put_little_endian(header, magic, 4);
    put_little_endian(header + 4, version, 4);
    put_little_endian(header + 8, count, 4);
}

static void test_formats(void **state) {
    (void)state;
    unsigned char header[1024];
    check_formats(write_tokens("a.txt", 1, 1000, letter, NULL, 0), 257, 1000, letter);
    check_formats(write_tokens("a.u16", 2, 1001, scattered, NULL, 0), 60001, 1001, scattered);
    check_formats(write_tokens("a.u32", 4, 1002, large, NULL, 0), 1000001, 1002, large);
    check_formats(write_tokens("nano.bin", 2, 1003, scattered, NULL, 0), 60001, 1003, scattered);
    llm_header(header, 20240520, 1, 1004);
    check_formats(write_tokens("gpt2.bin", 2, 1004, scattered, header, sizeof header), 60001, 1004, scattered);
    llm_header(header, 20240801, 7, 1005);
    check_formats(write_tokens("llama3.bin", 4, 1005, large, header, sizeof header), 1000001, 1005, large);
}

/* The shortest files that hold one window. */
static void test_smallest(void **state) {
    (void)state;
    data_options options = options_of(write_text("four.txt", "abcd"), 256, 3);
    data_stream *s = open_good(options);
    assert_int_equal(data_windows(s, DATA_TRAIN), 1);
    read_good(s, DATA_TRAIN, 0);
    assert_int_equal(targets[2], 'd');
    data_close(s);
    options.seq_len = 4;
    open_bad(options, "4 tokens are fewer than one window (seq_len 4 needs 5)");
    options.bos_token = 0;
    s = open_good(options);
    read_good(s, DATA_TRAIN, 0);
    assert_int_equal(inputs[0], 0);
    assert_int_equal(targets[3], 'd');
    data_close(s);
    options.seq_len = 1;
    options.bos_token = -1;
    s = open_good(options);
    assert_int_equal(data_windows(s, DATA_TRAIN), 3);
    read_good(s, DATA_TRAIN, 2);
    assert_int_equal(inputs[0], 'c');
    assert_int_equal(targets[0], 'd');
    data_close(s);
}

/* Every target of the file is predicted in exactly one window of one part, once per epoch. */
static void check_split(const char *source, size_t count, double fraction, bool bos, uint64_t expected_held_out) {
    enum { T = 8, EPOCHS = 3 };
    data_options options = options_of(source, 65536, T);
    options.val_fraction = fraction;
    options.shuffle = true;
    options.seed = 11;
    options.bos_token = bos ? 65535 : -1;
    data_stream *s = open_good(options);
    uint64_t train = data_windows(s, DATA_TRAIN), held_out = data_windows(s, DATA_VAL);
    assert_int_equal(held_out, expected_held_out);
    assert_int_equal(train + held_out, (count - !bos) / T);
    unsigned char *seen = calloc(count, 1);
    uint64_t *order = calloc(train * EPOCHS, sizeof *order);
    assert_true(seen && order);
    for (uint64_t i = 0; i < train * EPOCHS; i++) {
        read_good(s, DATA_TRAIN, i);
        order[i] = (uint64_t)targets[0];
        for (size_t t = 0; t < T; t++) assert_int_equal(seen[targets[t]]++, i / train);
    }
    for (uint64_t i = 0; i < held_out; i++) {
        read_good(s, DATA_VAL, i);
        for (size_t t = 0; t < T; t++) {
            assert_int_equal(targets[t], (train + i) * T + t + !bos);
            assert_int_equal(seen[targets[t]], 0);
        }
    }
    if (train >= 20) {
        size_t in_place = 0, as_before = 0;
        for (uint64_t i = 0; i < train; i++) in_place += order[i] == i * T + !bos;
        for (uint64_t i = 0; i < train * (EPOCHS - 1); i++) as_before += order[i] == order[i + train];
        assert_true(in_place < train / 2 && as_before < train / 2);
    }
    assert_false(data_window(s, DATA_VAL, held_out, inputs, targets, error, sizeof error));
    assert_error("held-out window");

    /* Another stream, entered in the middle, gives the same window; another seed gives another order. */
    data_stream *other = open_good(options);
    for (uint64_t i = train * EPOCHS; i-- > 0;) {
        read_good(other, DATA_TRAIN, i);
        assert_int_equal(targets[0], order[i]);
    }
    data_close(other);
    options.seed = 12;
    other = open_good(options);
    size_t same = 0;
    for (uint64_t i = 0; i < train; i++) {
        read_good(other, DATA_TRAIN, i);
        same += (uint64_t)targets[0] == order[i];
    }
    if (train >= 20) assert_true(same < train / 2);
    data_close(other);
    free(seen);
    free(order);
    data_close(s);
}

static void test_split_and_shuffle(void **state) {
    (void)state;
    const char *source = write_tokens("split.u16", 2, 2000, position, NULL, 0);
    check_split(source, 2000, 0, false, 0);
    check_split(source, 2000, 0.1, false, 25); /* of 249 */
    check_split(source, 2000, 0.1, true, 25);  /* of 250 */
    check_split(source, 2000, 1e-9, false, 1);
    check_split(source, 2000, 0.999999, true, 249);
    open_bad((data_options){.source = write_tokens("one.u16", 2, 16, position, NULL, 0),
                            .vocab_size = 65536,
                            .seq_len = 8,
                            .val_fraction = 0.5,
                            .bos_token = -1},
             "its only window cannot be split");
}

/* A file of 6 GB, all holes but for its last tokens: 64-bit offsets, and nothing is read that is not asked for. */
static void test_large_file(void **state) {
    (void)state;
    const uint64_t size = UINT64_C(6) << 30;
    const char *source = path("large.u16");
    int fd = open(source, O_CREAT | O_TRUNC | O_WRONLY, 0600);
    unsigned char tail[2 * MAX_T];
    for (size_t i = 0; i < MAX_T; i++) put_little_endian(tail + 2 * i, (uint32_t)i + 100, 2);
    assert_true(fd >= 0);
    bool sparse = ftruncate(fd, (off_t)size) == 0;
    if (sparse) assert_int_equal(pwrite(fd, tail, sizeof tail, (off_t)(size - sizeof tail)), sizeof tail);
    close(fd);
    if (sparse) {
        data_options options = options_of(source, 65536, MAX_T);
        options.bos_token = 1;
        data_stream *s = open_good(options);
        assert_int_equal(data_windows(s, DATA_TRAIN), size / 2 / MAX_T);
        read_good(s, DATA_TRAIN, size / 2 / MAX_T - 1);
        for (int i = 0; i < MAX_T; i++) assert_int_equal(targets[i], i + 100);
        data_close(s);
    }
    unlink(source);
    if (!sparse) skip();
}

/* ---- Bad input ---- */

static void test_bad_files(void **state) {
    (void)state;
    unsigned char header[1024];
    source_bad(path("missing.txt"), "missing.txt: cannot be opened: No such file");
    source_bad(write_text("empty.txt", ""), "empty.txt: is empty");
    source_bad(write_text("empty.jsonl", ""), "empty.jsonl: is empty");
    source_bad(write_text("odd.u16", "abc"), "odd.u16: is cut short: 3 bytes are no whole number of 2-byte tokens");
    source_bad(write_text("odd.bin", "abc"), "odd.bin: is cut short: 3 bytes");
    source_bad(write_text("odd.u32", "abcdefg"), "odd.u32: is cut short: 7 bytes");
    source_bad(write_text("short.u32", "abcdefgh"), "short.u32: 2 tokens are fewer than one window");
    source_bad(write_text("a.csv", "1,2,3,4,5,6"),
               "a.csv: unknown kind of data (known endings: .txt, .jsonl, .u16, .u32, .bin");
    source_bad("txt", "txt: unknown kind of data");
    source_bad(".txt", "unknown kind of data");
    source_bad("", "no data source");
    source_bad(NULL, "no data source");
    assert_int_equal(mkdir(path("folder.txt"), 0700), 0);
    source_bad(path("folder.txt"), "folder.txt: is a directory");
    assert_int_equal(mkfifo(path("pipe.txt"), 0600), 0);
    source_bad(path("pipe.txt"), "pipe.txt: is not a regular file");

    llm_header(header, 20240520, 1, 100);
    source_bad(write_file("false.bin", header, 1024),
               "false.bin: llm.c's header promises 100 tokens of 2 bytes, but 0 bytes follow");
    source_bad(write_tokens("more.bin", 2, 101, position, header, 1024),
               "promises 100 tokens of 2 bytes, but 202 bytes follow");
    source_bad(write_file("cut.bin", header, 1000), "cut.bin: ends within llm.c's header");
    source_bad(write_file("cut4.bin", header, 4), "cut4.bin: ends within llm.c's header");
    llm_header(header, 20240520, 2, 100);
    source_bad(write_tokens("v2.bin", 2, 100, position, header, 1024), "llm.c's header has version 2, known is 1");
    llm_header(header, 20240520, 1, UINT32_MAX);
    source_bad(write_tokens("negative.bin", 2, 100, position, header, 1024), "promises 4294967295 tokens");
    llm_header(header, 20240520, 1, 0);
    source_bad(write_file("none.bin", header, 1024), "0 tokens are fewer than one window");
}

static void test_unreadable(void **state) {
    (void)state;
    const char *source = write_text("secret.txt", "abcdefgh");
    assert_int_equal(chmod(source, 0), 0);
    uid_t user = geteuid();
    if (user == 0) { /* reads everything, so try as somebody else */
        assert_int_equal(chmod(directory, 0755), 0);
        assert_int_equal(seteuid(65534), 0);
    }
    source_bad(source, "secret.txt: cannot be opened: Permission denied");
    assert_int_equal(seteuid(user), 0);
}

static void test_bad_options(void **state) {
    (void)state;
    const char *source = write_text("good.txt", "a good text of some bytes");
    data_options good = options_of(source, 256, 4), bad;
    bad = good, bad.vocab_size = 0, open_bad(bad, "vocab_size 0 is out of range");
    bad = good, bad.vocab_size = (size_t)INT32_MAX + 1, open_bad(bad, "vocab_size 2147483648 is out of range");
    bad = good, bad.seq_len = 0, open_bad(bad, "seq_len 0 is out of range");
    bad = good, bad.seq_len = SIZE_MAX, open_bad(bad, "is out of range");
    bad = good, bad.val_fraction = 1, open_bad(bad, "val_fraction 1 is not");
    bad = good, bad.val_fraction = -0.1, open_bad(bad, "val_fraction -0.1 is not");
    bad = good, bad.val_fraction = NAN, open_bad(bad, "val_fraction");
    bad = good, bad.bos_token = 256, open_bad(bad, "bos_token 256 is neither");
    bad = good, bad.bos_token = -2, open_bad(bad, "bos_token -2 is neither");
}

static void test_token_beyond_vocabulary(void **state) {
    (void)state;
    data_stream *s = open_good(options_of(write_tokens("up.u16", 2, 100, position, NULL, 0), 64, 8));
    read_good(s, DATA_TRAIN, 6);
    assert_false(data_window(s, DATA_TRAIN, 7, inputs, targets, error, sizeof error));
    assert_error("up.u16: token 64 at position 64 is not below vocab_size 64");
    data_close(s);
    unsigned char word[] = {1, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF};
    s = open_good(options_of(write_file("wide.u32", word, sizeof word), INT32_MAX, 1));
    assert_false(data_window(s, DATA_TRAIN, 0, inputs, targets, error, sizeof error));
    assert_error("wide.u32: token 4294967295 at position 1");
    data_close(s);
}

static void test_shrinking_file(void **state) {
    (void)state;
    static const char line[] = "{\"text\": \"0123456789\"}\n";
    char lines[20 * sizeof line] = "";
    for (int i = 0; i < 20; i++) strcat(lines, line);
    const char *sources[] = {write_tokens("shrink.u16", 2, 100, position, NULL, 0), write_text("shrink.jsonl", lines)};
    const off_t cut[] = {190, 19 * (off_t)strlen(line)}; /* within the last window */
    for (int i = 0; i < 2; i++) {
        data_stream *s = open_good(options_of(sources[i], 256, 9));
        uint64_t last = data_windows(s, DATA_TRAIN) - 1;
        read_good(s, DATA_TRAIN, last);
        assert_int_equal(truncate(sources[i], cut[i]), 0);
        assert_false(data_window(s, DATA_TRAIN, last, inputs, targets, error, sizeof error));
        assert_error("became shorter while it was read");
        read_good(s, DATA_TRAIN, 0);
        data_close(s);
    }
    data_stream *s = open_good(options_of(write_text("spoilt.jsonl", lines), 256, 8));
    write_text("spoilt.jsonl", "{\"text\": \"0123\"}\n{");
    assert_false(data_window(s, DATA_TRAIN, 3, inputs, targets, error, sizeof error));
    assert_error("spoilt.jsonl:2: bad JSON");
    data_close(s);
}

/* ---- JSON Lines ---- */

typedef struct {
    unsigned char *bytes; /* stb_ds array */
    char problem[128];
    uint64_t line;
} decoded;

/* Reads in steps of `step` bytes. */
static decoded decode(data_jsonl *j, size_t step) {
    decoded out = {0};
    unsigned char chunk[64];
    size_t n;
    do {
        n = data_jsonl_read(j, chunk, step);
        for (size_t i = 0; i < n; i++) arrput(out.bytes, chunk[i]);
    } while (n == step);
    snprintf(out.problem, sizeof out.problem, "%s", j->problem ? j->problem : "");
    out.line = j->now.line;
    return out;
}

static void check_text(const char *json, const void *expected, size_t size) {
    for (size_t step = 1; step <= 64; step += 7) {
        data_jsonl j;
        data_jsonl_from_memory(&j, json, strlen(json));
        decoded out = decode(&j, step);
        if (out.problem[0]) fail_msg("%s: %s", json, out.problem);
        assert_int_equal(arrlenu(out.bytes), size);
        if (size > 0) assert_memory_equal(out.bytes, expected, size);
        arrfree(out.bytes);
    }
}

#define TEXT(json, expected) check_text(json, expected, sizeof(expected) - 1)

static void test_jsonl_text(void **state) {
    (void)state;
    TEXT("{\"text\": \"hello\"}", "hello");
    TEXT("{\"text\": \"hello\"}\n{\"text\": \"world\"}\n", "hello\nworld");
    TEXT("\n \t\r\n{\"text\":\"a\"}\r\n\n\n  {\"text\" : \"b\" } \r\n\n", "a\nb");
    TEXT("{\"text\": \"\"}\n{\"text\": \"\"}\n{\"text\": \"x\"}", "\n\nx");
    TEXT("{\"text\": \"\"}", "");
    TEXT("\n\n", "");
    TEXT("{\"text\": \"\\\" \\\\ \\/ \\b \\f \\n \\r \\t\"}", "\" \\ / \b \f \n \r \t");
    TEXT("{\"text\": \"\\u0041\\u00e4\\u20AC\\uD83D\\uDE00\\u0000.\"}", "A\xC3\xA4\xE2\x82\xAC\xF0\x9F\x98\x80\0.");
    TEXT("{\"text\": \"\\uFFFF\\uD800\\uDC00\\uDBFF\\uDFFF\\uE000\\u07FF\\u0800\"}",
         "\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF\xEE\x80\x80\xDF\xBF\xE0\xA0\x80");
    TEXT("{\"text\": \"\xC3\xA4\xE2\x82\xAC\x7F\"}", "\xC3\xA4\xE2\x82\xAC\x7F");
    TEXT("{\"\\u0074e\\u0078t\": \"escaped key\"}", "escaped key");
    TEXT("{\"Text\": 1, \"tex\": 2, \"textt\": 3, \"\": 4, \"text\": \"mine\"}", "mine");
    TEXT("{\"meta\": {\"text\": \"not this\", \"a\": [1, [2, {}], [], \"]}\"]}, \"text\": \"this\", \"more\": "
         "{\"text\": null}}",
         "this");
    TEXT("{\"a\": true, \"b\": false, \"c\": null, \"d\": -0.5e+10, \"e\": 0, \"f\": 1E9, \"g\": 12.25, \"text\": "
         "\"v\", \"h\": 0e-0}",
         "v");
}

static void bad_json(const char *json, uint64_t line, const char *part) {
    decoded out[3];
    unsigned char buffer[7];
    const char *source = write_text("bad.jsonl", json);
    for (int i = 0; i < 3; i++) { /* from memory; from a file, through a buffer of one byte and of seven */
        data_jsonl j;
        int fd = open(source, O_RDONLY);
        assert_true(fd >= 0);
        if (i == 0)
            data_jsonl_from_memory(&j, json, strlen(json));
        else
            data_jsonl_from_file(&j, fd, buffer, i == 1 ? 1 : sizeof buffer);
        out[i] = decode(&j, 64);
        close(fd);
        if (!strstr(out[i].problem, part)) fail_msg("%s: \"%s\" does not say \"%s\"", json, out[i].problem, part);
        assert_int_equal(out[i].line, line);
        assert_int_equal(arrlenu(out[i].bytes), arrlenu(out[0].bytes));
        assert_int_equal(data_jsonl_read(&j, NULL, 1), 0);
    }
    for (int i = 0; i < 3; i++) arrfree(out[i].bytes);
    char place[64];
    snprintf(place, sizeof place, "bad.jsonl:%" PRIu64 ": ", line);
    source_bad(source, place);
    assert_error(part);
}

static void test_jsonl_errors(void **state) {
    (void)state;
    bad_json("{\"text\": \"a\"}\n{\"title\": \"b\"}\n", 2, "has no \"text\"");
    bad_json("{\"text\": \"a\"}\n\n\n{}\n", 4, "has no \"text\"");
    bad_json("{\"text\": \"a\", \"text\": \"b\"}", 1, "two members \"text\"");
    static const char *const no_strings[] = {"1", "null", "[\"a\"]", "{\"text\": \"a\"}", "true", ""};
    for (size_t i = 0; i < sizeof no_strings / sizeof no_strings[0]; i++) {
        char line[64];
        snprintf(line, sizeof line, "{\"text\": \"a\"}\n{\"text\": %s}", no_strings[i]);
        bad_json(line, 2, "\"text\" is not a string");
    }
    bad_json("hello", 1, "expected an object");
    bad_json("[\"text\"]", 1, "expected an object");
    bad_json("{\"text\": \"a\"} {\"text\": \"b\"}", 1, "something follows the object");
    bad_json("{\"text\": \"a\"\n}", 1, "expected ',' or '}'");
    bad_json("{\"text\": \"a\"", 1, "expected ',' or '}'");
    bad_json("{\"text\": \"a", 1, "the line ends inside a string");
    bad_json("{\"text\": \"a\n\"}", 1, "the line ends inside a string");
    bad_json("{\"text\": \"a\x1F\"}", 1, "a control character inside a string");
    bad_json("{\"text\": \"a\tb\"}", 1, "a control character inside a string");
    bad_json("{\"text\": \"a\\", 1, "unknown escape");
    bad_json("{\"text\": \"\\x41\"}", 1, "unknown escape");
    bad_json("{\"text\": \"\\u12g4\"}", 1, "four hexadecimal digits");
    bad_json("{\"text\": \"\\u12\"}", 1, "four hexadecimal digits");
    static const char *const surrogates[] = {"\\uD83D",        "\\uD83Dx",       "\\uD83D\\n",    "\\uDE00",
                                             "\\uDE00\\uD83D", "\\uD83D\\u0041", "\\uD83D\\uD83D"};
    for (size_t i = 0; i < sizeof surrogates / sizeof surrogates[0]; i++) {
        char line[64];
        snprintf(line, sizeof line, "{\"text\": \"%s\"}", surrogates[i]);
        bad_json(line, 1, "surrogate");
    }
    static const char *const values[] = {"",         "tru",        "nul",   "truth",     "NaN",   "Infinity",
                                         "+1",       "01",         "-",     "1.",        ".5",    "1e",
                                         "1e+",      "[1,]",       "[1 2]", "[",         "{1:2}", "{\"b\"}",
                                         "{\"b\":}", "{\"b\":1,}", "[1}",   "{\"b\":1]", "'b'",   "\"b"};
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        char line[64];
        snprintf(line, sizeof line, "{\"a\": %s, \"text\": \"b\"}", values[i]);
        bad_json(line, 1, "bad JSON");
        snprintf(line, sizeof line, "{\"text\": \"b\", \"a\": %s}", values[i]);
        bad_json(line, 1, "bad JSON");
    }
    bad_json("{\"a\" 1, \"text\": \"b\"}", 1, "expected ':'");
    bad_json("{a: 1, \"text\": \"b\"}", 1, "expected a key");
    bad_json("{, \"text\": \"b\"}", 1, "expected a key");
    bad_json("{\"text\": \"b\",}", 1, "expected a key");

    static const int depths[] = {1, DATA_JSONL_DEPTH - 1, DATA_JSONL_DEPTH, 100000}; /* beside the line's own object */
    for (size_t i = 0; i < sizeof depths / sizeof depths[0]; i++) {
        int depth = depths[i];
        char *deep = calloc(1, 2 * (size_t)depth + 64);
        assert_non_null(deep);
        strcpy(deep, "{\"a\": ");
        memset(deep + strlen(deep), '[', (size_t)depth);
        memset(deep + strlen(deep), ']', (size_t)depth);
        strcat(deep, ", \"text\": \"b\"}");
        if (depth < DATA_JSONL_DEPTH)
            TEXT(deep, "b");
        else
            bad_json(deep, 1, "nested too deeply");
        free(deep);
    }
}

/* From every point that can be told, reading goes on with what was to come, whatever the buffer. */
static void test_jsonl_points(void **state) {
    (void)state;
    static const char json[] =
        "{\"a\": [1, \"\\u0041\"], \"text\": \"x\\u20acy\\uD83D\\uDE00\\n\", \"b\": {}}\n\n"
        "{\"text\": \"\"}\n  {\"text\": \"\\u00e4\xC3\xA4\", \"c\": \"\\\\\"}\n{\"text\": \"end\"}";
    static const char text[] = "x\xE2\x82\xACy\xF0\x9F\x98\x80\n\n\n\xC3\xA4\xC3\xA4\nend";
    const size_t size = sizeof text - 1;
    const char *source = write_text("points.jsonl", json);
    unsigned char buffer[5];
    int fd = open(source, O_RDONLY);
    assert_true(fd >= 0);
    for (size_t before = 0; before <= size; before++) {
        data_jsonl memory, file;
        data_jsonl_from_memory(&memory, json, sizeof json - 1);
        data_jsonl_from_file(&file, fd, buffer, sizeof buffer);
        assert_int_equal(data_jsonl_read(&memory, NULL, before), before);
        data_jsonl_point point = data_jsonl_tell(&memory);
        assert_true(point.decoded <= before && point.decoded + 4 > before);
        data_jsonl_seek(&file, point);
        decoded rest = decode(&file, 3);
        assert_string_equal(rest.problem, "");
        assert_int_equal(rest.line, 5);
        assert_int_equal(arrlenu(rest.bytes), size - point.decoded);
        if (size > point.decoded) assert_memory_equal(rest.bytes, text + point.decoded, size - point.decoded);
        arrfree(rest.bytes);
        data_jsonl_seek(&memory, point);
        rest = decode(&memory, 64);
        assert_int_equal(arrlenu(rest.bytes), size - point.decoded);
        arrfree(rest.bytes);
    }
    close(fd);
}

/* A file with many points in its index, short and very long documents, and escapes across every boundary. */
static void test_jsonl_stream(void **state) {
    (void)state;
    enum { DOCUMENTS = 300 };
    static const struct {
        const char *json, *text;
    } pieces[] = {{"plain words and more ", "plain words and more "},
                  {"\\u20ac", "\xE2\x82\xAC"},
                  {"\\uD83D\\uDE00", "\xF0\x9F\x98\x80"},
                  {"\\n", "\n"},
                  {"\xC3\xA4", "\xC3\xA4"},
                  {"\\\"quoted\\\" ", "\"quoted\" "}};
    const char *source = path("stream.jsonl");
    FILE *file = fopen(source, "wb");
    unsigned char *text = NULL;
    assert_non_null(file);
    data_random r = data_random_at(1, 100, 0);
    for (int d = 0; d < DOCUMENTS; d++) {
        uint32_t count = d == 10 ? 40000 : data_random_below(&r, 100);
        if (d > 0) arrput(text, '\n');
        fprintf(file, "{\"id\": %d, \"tags\": [\"a\", {\"text\": \"no\"}], \"text\": \"", d);
        while (count-- > 0) {
            uint32_t p = data_random_below(&r, sizeof pieces / sizeof pieces[0]);
            fputs(pieces[p].json, file);
            for (const char *c = pieces[p].text; *c; c++) arrput(text, (unsigned char)*c);
        }
        fprintf(file, "\", \"score\": 0.%d}\n", d);
    }
    assert_int_equal(fclose(file), 0);
    enum { T = 100 };
    data_options options = options_of(source, 256, T);
    options.shuffle = true;
    data_stream *s = open_good(options);
    uint64_t windows = data_windows(s, DATA_TRAIN);
    assert_int_equal(windows, (arrlenu(text) - 1) / T);
    assert_true(arrlenu(text) > 3 * 65536);
    for (uint64_t i = 0; i < windows; i++) {
        uint64_t at = data_permute(i, windows, 0, 0) * T;
        read_good(s, DATA_TRAIN, i);
        for (size_t t = 0; t < T; t++) {
            assert_int_equal(inputs[t], text[at + t]);
            assert_int_equal(targets[t], text[at + t + 1]);
        }
    }
    data_close(s);
    arrfree(text);
}

/* Damaged input must end in text or in a problem, the same whether it comes from memory or byte by byte from a file. */
static void test_jsonl_damaged(void **state) {
    (void)state;
    static const char good[] =
        "{\"a\": [1.5e3, {\"b\": null}], \"text\": \"x\\u20acy\\uD83D\\uDE00\\n\", \"c\": true}\n"
        "{\"text\": \"end\", \"d\": \"\\\\\"}\n";
    static const char spice[] = "\"\\{}[]:,ue0dDtextnull-.+ \n\t\x01\x80\xFF";
    data_random r = data_random_at(2, 100, 0);
    size_t problems = 0, sound = 0;
    for (int round = 0; round < 20000; round++) {
        char json[2 * sizeof good];
        size_t size = sizeof good - 1;
        memcpy(json, good, size);
        for (uint32_t edits = 1 + data_random_below(&r, 3); edits > 0 && size > 0; edits--) {
            size_t at = data_random_below(&r, (uint32_t)size);
            char c = spice[data_random_below(&r, sizeof spice)];
            switch (data_random_below(&r, 4)) {
            case 0:
                json[at] = c;
                break;
            case 1:
                memmove(json + at + 1, json + at, size - at), json[at] = c, size++;
                break;
            case 2:
                memmove(json + at, json + at + 1, size - at - 1), size--;
                break;
            default:
                size = at + 1;
                break;
            }
        }
        char *exact = malloc(size); /* so that a byte read too many is seen by the address sanitizer */
        assert_non_null(exact);
        memcpy(exact, json, size);
        data_jsonl j;
        data_jsonl_from_memory(&j, exact, size);
        decoded whole = decode(&j, 64);
        data_jsonl_from_memory(&j, exact, size);
        decoded bytewise = decode(&j, 1);
        assert_string_equal(whole.problem, bytewise.problem);
        assert_int_equal(arrlenu(whole.bytes), arrlenu(bytewise.bytes));
        *(whole.problem[0] ? &problems : &sound) += 1;
        arrfree(whole.bytes);
        arrfree(bytewise.bytes);
        free(exact);
    }
    assert_true(problems > 5000 && sound > 500);
}

/* ---- Generators ---- */

static void generator_bad(const char *source, const char *part) {
    open_bad(options_of(source, 100, 16), part);
}

static void test_generator_errors(void **state) {
    (void)state;
    generator_bad("gen:", "unknown generator \"gen:\" (known: backcopy, random, niah, vt, cwe, ruler)");
    generator_bad("gen:backcop", "unknown generator \"gen:backcop\"");
    generator_bad("gen:backcopy2,seed=1", "unknown generator \"gen:backcopy2\"");
    generator_bad("gen:backcopy,triggrs=4", "gen:backcopy: unknown key \"triggrs\" (known: vocab, triggers");
    generator_bad("gen:random,triggers=4", "gen:random: unknown key \"triggers\" (known: vocab, windows, seed)");
    generator_bad("gen:backcopy,seed", "\"seed\" is not key=value");
    generator_bad("gen:backcopy,", "\"\" is not key=value");
    generator_bad("gen:backcopy,seed=1,,", "\"\" is not key=value");
    generator_bad("gen:backcopy,=1", "unknown key \"\"");
    generator_bad("gen:backcopy,seed=1,seed=2", "key \"seed\" is given twice");
    generator_bad("gen:backcopy,seed=", "seed= is not a whole number");
    generator_bad("gen:backcopy,seed=-1", "seed=-1 is not a whole number");
    generator_bad("gen:backcopy,seed=1.5", "seed=1.5 is not a whole number");
    generator_bad("gen:backcopy,seed=18446744073709551616", "seed=18446744073709551616 is out of range");
    generator_bad("gen:backcopy,triggers=3x", "triggers=3x is not a whole number");
    generator_bad("gen:backcopy,triggers=0", "triggers=0 is out of range 1..");
    generator_bad("gen:backcopy,vocab=10,triggers=10", "triggers=10 leaves nothing else in a vocabulary of 10");
    generator_bad("gen:backcopy,vocab=100", "vocab=100 and <s> need a model with a vocab_size of 101, not 100");
    generator_bad("gen:backcopy,trigger_rate=1", "trigger_rate=1 is out of range 0..0.99");
    generator_bad("gen:backcopy,trigger_rate=nan", "trigger_rate=nan is not a number");
    generator_bad("gen:backcopy,trigger_rate=1e999", "out of range");
    generator_bad("gen:backcopy,concentration=0", "concentration=0 is out of range");
    generator_bad("gen:random,vocab=101", "vocab=101 is above the model's vocab_size 100");
    generator_bad("gen:random,vocab=0", "vocab=0 is out of range");
    generator_bad("gen:niah,keys=0", "keys=0 is out of range 1..");
    generator_bad("gen:niah,keys=2,queries=3", "queries=3 of keys=2");
    generator_bad("gen:niah,vocab=97", "vocab=97 and 4 marks need a model with a vocab_size of 101, not 100");
    generator_bad("gen:niah,keys=98", "needs 98 different words, and there are 96");
    generator_bad("gen:niah,keys=5", "needs windows of at least 18 tokens, not 16");
    generator_bad("gen:niah,answers_only=2", "answers_only=2 is out of range 0..1");
    generator_bad("gen:vt,chains=1,queries=2", "queries=2 of chains=1");
    generator_bad("gen:vt,variables=50", "needs 102 different words, and there are 96");
    generator_bad("gen:cwe", "common word 3 would stand there 0 times");
    generator_bad("gen:ruler,keys=4", "gen:ruler: unknown key \"keys\" (known: vocab, answers_only, concentration");
    data_options options = options_of("gen:backcopy", 100, 16);
    options.bos_token = 5;
    open_bad(options, "bos_token 5 is not the generator's own <s>, 99");
    options.bos_token = 99;
    data_close(open_good(options));
}

static void read_again(data_stream *s, data_part part, uint64_t index) {
    if (!data_window(s, part, index, again_inputs, again_targets, error, sizeof error)) fail_msg("%s", error);
}

/* Whether the windows last read by read_good and read_again share all targets. */
static bool same_targets(size_t T) {
    return memcmp(targets, again_targets, T * sizeof targets[0]) == 0;
}

static void test_generator_windows(void **state) {
    (void)state;
    enum { T = 64 };
    static const char *const names[] = {"gen:backcopy", "gen:random", "gen:niah", "gen:vt", "gen:cwe", "gen:ruler"};
    for (size_t g = 0; g < sizeof names / sizeof names[0]; g++) {
        data_options options = options_of(names[g], 500, T), seeded = options;
        seeded.seed = 1;
        data_stream *s = open_good(options), *other = open_good(options), *reseeded = open_good(seeded);
        assert_true(data_windows(s, DATA_TRAIN) == DATA_ENDLESS && data_windows(s, DATA_VAL) == DATA_ENDLESS);
        for (uint64_t i = 0; i < 50; i++) {
            read_good(s, DATA_TRAIN, i);
            assert_memory_equal(inputs + 1, targets, (T - 1) * sizeof inputs[0]);
            read_again(other, DATA_TRAIN, i);
            assert_true(same_targets(T));
            assert_memory_equal(inputs, again_inputs, T * sizeof inputs[0]);
            read_again(other, DATA_TRAIN, i + 1);
            assert_false(same_targets(T));
            read_again(other, DATA_VAL, i);
            assert_false(same_targets(T));
            read_again(reseeded, DATA_TRAIN, i);
            assert_false(same_targets(T));
        }
        read_good(s, DATA_TRAIN, UINT64_MAX - 1);
        data_close(s);
        data_close(other);
        data_close(reseeded);

        /* A generator may also give a limited number of training windows, again and again. */
        char source[64];
        snprintf(source, sizeof source, "%s,windows=30,seed=5", names[g]);
        options.source = source;
        options.shuffle = true;
        s = open_good(options);
        options.shuffle = false;
        other = open_good(options);
        assert_int_equal(data_windows(s, DATA_TRAIN), 30);
        for (uint64_t i = 0; i < 60; i++) {
            read_good(s, DATA_TRAIN, i);
            read_again(other, DATA_TRAIN, data_permute(i % 30, 30, 0, i / 30) + 30);
            assert_true(same_targets(T));
        }
        data_close(s);
        data_close(other);
    }
}

static void test_random(void **state) {
    (void)state;
    enum { V = 10, T = 100, WINDOWS = 500 };
    data_options options = options_of("gen:random,vocab=10", 12, T);
    for (int bos = 0; bos < 2; bos++) {
        options.bos_token = bos ? 11 : -1;
        data_stream *s = open_good(options);
        size_t count[V] = {0};
        for (uint64_t i = 0; i < WINDOWS; i++) {
            read_good(s, DATA_TRAIN, i);
            if (bos) assert_int_equal(inputs[0], 11);
            for (int t = 0; t < T; t++) {
                assert_true(targets[t] >= 0 && targets[t] < V);
                count[targets[t]]++;
            }
        }
        for (int v = 0; v < V; v++) assert_close((double)count[v] / (WINDOWS * T), 0.1, 4 * sqrt(0.09 / (WINDOWS * T)));
        double actual, expected;
        assert_true(data_entropy(s, DATA_VAL, 0, 10, &actual, &expected, error, sizeof error));
        assert_close(actual, log(V), 1e-12);
        assert_close(expected, log(V), 1e-12);
        data_close(s);
    }
    data_stream *s = open_good(options_of("gen:random", 12, T)),
                *seeded = open_good(options_of("gen:random,seed=1", 12, T));
    read_good(s, DATA_TRAIN, 0);
    read_again(seeded, DATA_TRAIN, 0);
    assert_false(same_targets(T));
    data_close(s);
    data_close(seeded);
}

static data_backcopy chain_of(int32_t vocab, double concentration, uint64_t seed) {
    data_backcopy b = {
        .vocab = vocab, .triggers = 3, .trigger_rate = 0.1, .concentration = concentration, .seed = seed};
    assert_true(data_backcopy_init(&b));
    return b;
}

/* psi(x), by psi(x) = psi(x + 1) - 1/x and the asymptotic series. */
static double digamma(double x) {
    double sum = 0;
    for (; x < 10; x++) sum -= 1 / x;
    double y = 1 / (x * x);
    return sum + log(x) - 0.5 / x - y * (1.0 / 12 - y * (1.0 / 120 - y / 252));
}

/* Rows of Dirichlet(alpha, ..., alpha) over n tokens, A = n alpha, have
 *
 *     E[sum p^2] = (alpha + 1) / (A + 1),   E[entropy] = psi(A + 1) - psi(alpha + 1),   E[p] = 1/n.
 *
 * Few tokens tell A = a n / V, which is right, from a.
 */
static void test_backcopy_rows(void **state) {
    (void)state;
    static const struct {
        int32_t vocab;
        double concentration;
    } cases[] = {{2048, 6.4}, {2048, 100}, {2048, 0.5}, {5, 6.4}, {8, 1000}, {32000, 6.4}};
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        int32_t V = cases[c].vocab, n = V - 3;
        size_t rows = 0;
        size_t *last_row = calloc((size_t)V, sizeof *last_row); /* that has the token, counted from 1 */
        assert_non_null(last_row);
        double squares = 0, squares2 = 0, entropy = 0, entropy2 = 0, first = 0, first2 = 0;
        for (uint64_t seed = 0; rows < 2000; seed++) {
            data_backcopy b = chain_of(V, cases[c].concentration, seed);
            for (int32_t token = 3; token < V && rows < 4000; token++, rows++) {
                const data_backcopy_row *row = data_backcopy_get_row(&b, token);
                assert_non_null(row);
                assert_true(row->count > 0 && row->count <= (size_t)n);
                double total = 0, square = 0, h = 0, p3 = 0;
                for (size_t i = 0; i < row->count; i++) {
                    double p = row->atoms[i].weight / row->total;
                    assert_true(row->atoms[i].token >= 3 && row->atoms[i].token < V && p > 0);
                    assert_int_not_equal(last_row[row->atoms[i].token], rows + 1);
                    last_row[row->atoms[i].token] = rows + 1;
                    total += p, square += p * p, h -= p * log(p);
                    if (row->atoms[i].token < 3 + n / 2) p3 += p;
                }
                assert_close(total, 1, 1e-12);
                assert_close(h, row->entropy, 1e-12);
                squares += square, squares2 += square * square, entropy += h, entropy2 += h * h, first += p3,
                    first2 += p3 * p3;
            }
            data_backcopy_free(&b);
        }
        free(last_row);
        double N = (double)rows, A = cases[c].concentration * n / V, alpha = A / n;
        squares /= N, entropy /= N, first /= N;
        assert_close(squares, (alpha + 1) / (A + 1), 4 * sqrt((squares2 / N - squares * squares) / N));
        assert_close(entropy, digamma(A + 1) - digamma(alpha + 1),
                     1e-4 + 4 * sqrt((entropy2 / N - entropy * entropy) / N));
        assert_close(first, (double)(n / 2) / n, 4 * sqrt((first2 / N - first * first) / N));
    }
}

/* A row depends on (seed, token), not on which rows were made before. */
static void test_backcopy_rows_in_any_order(void **state) {
    (void)state;
    data_backcopy up = chain_of(300, 6.4, 7), down = chain_of(300, 6.4, 7), other = chain_of(300, 6.4, 8);
    for (int32_t i = 3; i < 300; i++) data_backcopy_get_row(&up, i);
    for (int32_t i = 300; i-- > 3;) {
        const data_backcopy_row *a = data_backcopy_get_row(&up, i), *b = data_backcopy_get_row(&down, i),
                                *c = data_backcopy_get_row(&other, i);
        assert_int_equal(a->count, b->count);
        assert_memory_equal(a->atoms, b->atoms, a->count * sizeof a->atoms[0]);
        assert_true(a->count != c->count || memcmp(a->atoms, c->atoms, a->count * sizeof a->atoms[0]) != 0);
    }
    data_backcopy_free(&up);
    data_backcopy_free(&down);
    data_backcopy_free(&other);
}

/* Probabilities of all that can follow sum to one, and are what the definition says. */
static void test_backcopy_probability(void **state) {
    (void)state;
    enum { V = 50, K = 3 };
    data_backcopy b = chain_of(V, 6.4, 1);
    for (int32_t current = 0; current <= V; current++) {
        double total = 0, entropy = 0, actual, expected;
        for (int32_t next = 0; next <= V; next++) {
            double p = data_backcopy_probability(&b, 17, current, next);
            total += p;
            if (p > 0) entropy -= p * log(p);
            if (current == V) assert_close(p, next >= K && next < V ? 1.0 / (V - K) : 0, 1e-15);
            if (current < K) assert_close(p, next == 17 ? 1 : 0, 1e-15);
            if (current >= K && current < V && next < K) assert_close(p, 0.1 / K, 1e-15);
        }
        assert_close(total, 1, 1e-12);
        int32_t next = current == V || current < K ? 17 : 0;
        assert_true(data_backcopy_loss(&b, 2, (int32_t[]){17, current}, (int32_t[]){0, next}, &actual, &expected));
        double before = 0; /* entropy of what follows 17, from position 0 */
        for (int32_t i = 0; i < V; i++) {
            double p = data_backcopy_probability(&b, V, 17, i);
            if (p > 0) before -= p * log(p);
        }
        assert_close(expected, (before + entropy) / 2, 1e-12);
        assert_close(actual, -(log(0.1 / K) + log(data_backcopy_probability(&b, 17, current, next))) / 2, 1e-12);
    }
    data_backcopy_free(&b);
}

static void test_backcopy_windows(void **state) {
    (void)state;
    enum { V = 200, K = 3, T = 128, WINDOWS = 20000, BINS = 50 };
    data_stream *s = open_good(options_of("gen:backcopy,vocab=200,seed=3", V + 1, T));
    data_backcopy b = chain_of(V, 6.4, 3);
    static uint32_t pairs[V][V];
    memset(pairs, 0, sizeof pairs);
    uint32_t first[V] = {0};
    double drawn = 0, triggers[K] = {0};
    for (uint64_t i = 0; i < WINDOWS; i++) {
        read_good(s, DATA_TRAIN, i);
        assert_int_equal(inputs[0], V);
        assert_memory_equal(inputs + 1, targets, (T - 1) * sizeof inputs[0]);
        assert_true(targets[0] >= K && targets[0] < V);
        first[targets[0]]++;
        for (int t = 1; t < T; t++) {
            assert_true(targets[t] >= 0 && targets[t] < V);
            if (inputs[t] < K) {
                assert_int_equal(targets[t], inputs[t - 1]);
                assert_true(targets[t] >= K);
                continue;
            }
            drawn++;
            if (targets[t] < K) triggers[targets[t]]++;
            pairs[inputs[t]][targets[t]]++;
        }
    }
    for (int k = 0; k < K; k++) assert_close(triggers[k] / drawn, 0.1 / K, 4 * sqrt(0.1 / K / drawn));
    for (int v = K; v < V; v++)
        assert_close((double)first[v] / WINDOWS, 1.0 / (V - K), 5 * sqrt(1.0 / (V - K) / WINDOWS));

    /* Chi-square of each row that was seen often: expectations below five are put together. */
    size_t rows = 0, outliers = 0;
    double chi = 0, freedom = 0;
    for (int32_t from = K; from < V; from++) {
        double n = 0, row_chi = 0, row_freedom = -1, rare = 0, rare_expected = 0;
        for (int32_t to = 0; to < V; to++) n += pairs[from][to];
        if (n < 5000) continue;
        for (int32_t to = 0; to < V; to++) {
            double p = data_backcopy_probability(&b, from, from, to), count = pairs[from][to];
            if (p == 0) assert_true(count == 0);
            if (n * p < 5) {
                rare += count, rare_expected += n * p;
                continue;
            }
            row_chi += (count - n * p) * (count - n * p) / (n * p);
            row_freedom++;
        }
        if (rare_expected > 0)
            row_chi += (rare - rare_expected) * (rare - rare_expected) / rare_expected, row_freedom++;
        outliers += row_chi > row_freedom + 5 * sqrt(2 * row_freedom);
        chi += row_chi, freedom += row_freedom, rows++;
    }
    assert_true(rows > 50);
    assert_int_equal(outliers, 0);
    assert_close(chi, freedom, 4 * sqrt(2 * freedom));
    data_backcopy_free(&b);
    data_close(s);
}

/* What a perfect model scores agrees with the entropy of the process, and with -ln p taken from the rows here. */
static void test_backcopy_lowest_loss(void **state) {
    (void)state;
    enum { V = 2048, T = 64, WINDOWS = 4000 };
    data_stream *s = open_good(options_of("gen:backcopy,vocab=2048", V + 1, T));
    data_backcopy b = chain_of(V, 6.4, 0);
    double difference = 0, square = 0, mean = 0, actual, expected;
    for (uint64_t i = 0; i < WINDOWS; i++) {
        assert_true(data_entropy(s, DATA_VAL, i, 1, &actual, &expected, error, sizeof error));
        difference += actual - expected;
        square += (actual - expected) * (actual - expected);
        mean += actual / WINDOWS;
        if (i % 100 != 0) continue;
        double by_hand = log(V - 3);
        read_good(s, DATA_VAL, i);
        for (int t = 1; t < T; t++) {
            if (inputs[t] < 3) continue;
            double p = targets[t] < 3 ? 0.1 / 3 : 0;
            const data_backcopy_row *row = data_backcopy_get_row(&b, inputs[t]);
            for (size_t k = 0; k < row->count; k++)
                if (row->atoms[k].token == targets[t]) p += 0.9 * row->atoms[k].weight / row->total;
            by_hand -= log(p);
        }
        assert_close(actual, by_hand / T, 1e-9);
    }
    assert_close(difference / WINDOWS, 0, 4 * sqrt(square) / WINDOWS);
    assert_close(square / WINDOWS, 0.03, 0.03); /* so that the line above means something */
    double all_actual, all_expected;
    assert_true(data_entropy(s, DATA_VAL, 0, WINDOWS, &all_actual, &all_expected, error, sizeof error));
    assert_close(all_actual, mean, 1e-12);
    assert_close(all_actual - all_expected, difference / WINDOWS, 1e-12);
    print_message("gen:backcopy,vocab=2048, T = 64: lowest loss %.4f, expected %.4f\n", all_actual, all_expected);
    data_backcopy_free(&b);
    data_close(s);

    data_stream *file = open_good(options_of(write_text("plain.txt", "some text"), 256, 4));
    assert_true(data_entropy(file, DATA_TRAIN, 0, 1, &actual, &expected, error, sizeof error));
    assert_true(isnan(actual) && isnan(expected));
    data_close(file);
}

/* The extremes that the keys allow. */
static void test_backcopy_extremes(void **state) {
    (void)state;
    static const char *const sources[] = {"gen:backcopy,trigger_rate=0",     "gen:backcopy,trigger_rate=0.99",
                                          "gen:backcopy,concentration=0.01", "gen:backcopy,concentration=1000",
                                          "gen:backcopy,vocab=2,triggers=1", "gen:backcopy,vocab=4",
                                          "gen:backcopy,triggers=98"};
    for (size_t i = 0; i < sizeof sources / sizeof sources[0]; i++) {
        double actual, expected;
        data_stream *s = open_good(options_of(sources[i], 100, MAX_T));
        assert_true(data_entropy(s, DATA_TRAIN, 0, 100, &actual, &expected, error, sizeof error));
        assert_true(actual >= 0 && actual < log(100) && expected >= 0 && expected < log(100));
        assert_close(actual, expected, 0.05);
        data_close(s);
    }
}

static void test_backcopy_large(void **state) {
    (void)state;
    data_stream *s = open_good(options_of("gen:backcopy,vocab=32000", 32001, MAX_T));
    clock_t start = clock();
    for (uint64_t i = 0; i < 1000; i++) read_good(s, DATA_TRAIN, i);
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    print_message("gen:backcopy,vocab=32000: 1000 windows of 512 in %.2f s\n", seconds);
    assert_true(seconds < 1);
    data_close(s);
}

/* ---- Retrieval ---- */

enum { RETRIEVAL_V = 60, RETRIEVAL_W = RETRIEVAL_V - 4, SAID = RETRIEVAL_W + 1, ASKED = RETRIEVAL_W + 2 };

/* x_0 .. x_T of the window last read. */
static size_t whole_window(int32_t *x, size_t T) {
    memcpy(x, inputs, T * sizeof *x);
    x[T] = targets[T - 1];
    return T + 1;
}

static size_t find_mark(const int32_t *x, size_t n, size_t from, int32_t mark) {
    while (from < n && x[from] != mark) from++;
    return from;
}

/* What a question wants to hear, found by reading the statements before `end` as a person would. Needles: what was said
 * of the argument, in order. Variables: who got it, and who got it from that one. */
static size_t answer(const int32_t *x, size_t end, int32_t argument, bool chained, size_t value_size, int32_t *out) {
    size_t n = 0;
    for (size_t i = find_mark(x, end, 0, SAID); i < end; i = find_mark(x, end, i + 1, SAID)) {
        if (x[i + 1] != argument) continue;
        for (size_t l = 0; l < value_size; l++) out[n++] = x[i + 2 + l];
        if (chained) argument = x[i + 2];
    }
    return n;
}

/* Every window of a source: one <s>, as many statements and questions as its keys say, a haystack that follows its
 * chain, answers that are right, and data_questions pointing at exactly them. */
static void check_statements(const char *source, size_t T, bool chained, size_t groups, size_t statements,
                             size_t queries, size_t value_size) {
    data_stream *s = open_good(options_of(source, RETRIEVAL_V, T));
    data_backcopy chain = {.vocab = RETRIEVAL_W, .concentration = 6.4, .seed = 3};
    assert_true(data_backcopy_init(&chain));
    int32_t x[MAX_T + 1], expected[MAX_T], question[MAX_T];
    for (uint64_t i = 0; i < 200; i++) {
        read_good(s, DATA_TRAIN, i);
        size_t n = whole_window(x, T), end = find_mark(x, n, 0, ASKED), said = 0, asked = 0, answers = 0;
        assert_int_equal(x[0], RETRIEVAL_W);
        int32_t word = -1;
        for (size_t t = 1; t < end; t++) {
            if (x[t] == SAID) {
                said++, t += 1 + value_size;
                continue;
            }
            assert_true(x[t] >= 0 && x[t] < RETRIEVAL_W);
            if (word >= 0) assert_true(data_backcopy_probability(&chain, 0, word, x[t]) > 0);
            word = x[t];
        }
        assert_int_equal(said, statements);
        assert_int_equal(data_questions(s, inputs, question), queries);
        for (size_t t = 0; t < end + 1; t++) assert_int_equal(question[t], 0);
        for (size_t at = end; at < n; asked++) {
            size_t count = answer(x, end, x[at + 1], chained, value_size, expected);
            assert_true(count > 0);
            assert_int_equal(question[at], 0);
            assert_memory_equal(x + at + 2, expected, count * sizeof *x);
            for (size_t k = 0; k < count; k++) assert_int_equal(question[at + 1 + k], asked + 1);
            at += 2 + count, answers += count;
            assert_true(at == n || x[at] == ASKED);
        }
        assert_int_equal(asked, queries);
        assert_int_equal(answers, queries * (statements / groups) * value_size);
    }
    data_backcopy_free(&chain);
    data_close(s);
}

/* Where a single needle stands is uniform over the haystack; so is its key, over the words. */
static void test_needle_places(void **state) {
    (void)state;
    enum { T = 24, WINDOWS = 20000, PLACES = T + 1 - 1 - 3 - 3 + 1 };
    data_stream *s = open_good(options_of("gen:niah", RETRIEVAL_V, T));
    double places[PLACES] = {0}, keys[RETRIEVAL_W] = {0}, chi_places = 0, chi_keys = 0;
    for (uint64_t i = 0; i < WINDOWS; i++) {
        read_good(s, DATA_VAL, i);
        size_t at = find_mark(inputs, T, 0, SAID);
        assert_true(at >= 1 && at <= PLACES);
        places[at - 1]++;
        keys[inputs[at + 1]]++;
    }
    for (size_t i = 0; i < PLACES; i++)
        chi_places +=
            (places[i] - (double)WINDOWS / PLACES) * (places[i] - (double)WINDOWS / PLACES) * PLACES / WINDOWS;
    for (size_t i = 0; i < RETRIEVAL_W; i++)
        chi_keys += (keys[i] - (double)WINDOWS / RETRIEVAL_W) * (keys[i] - (double)WINDOWS / RETRIEVAL_W) *
                    RETRIEVAL_W / WINDOWS;
    assert_close(chi_places, PLACES - 1, 4 * sqrt(2.0 * (PLACES - 1)));
    assert_close(chi_keys, RETRIEVAL_W - 1, 4 * sqrt(2.0 * (RETRIEVAL_W - 1)));
    data_close(s);
}

/* Of two needles the one that is asked for stands first as often as last. */
static void test_needle_order(void **state) {
    (void)state;
    enum { T = 40, WINDOWS = 4000 };
    data_stream *s = open_good(options_of("gen:niah,keys=2", RETRIEVAL_V, T));
    double first = 0;
    for (uint64_t i = 0; i < WINDOWS; i++) {
        read_good(s, DATA_TRAIN, i);
        first += inputs[find_mark(inputs, T, 0, SAID) + 1] == inputs[T - 1];
    }
    assert_close(first / WINDOWS, 0.5, 4 * sqrt(0.25 / WINDOWS));
    data_close(s);
}

static void test_common_words(void **state) {
    (void)state;
    enum { T = 200, K = 4, LIST = T - K - 2 };
    double halves = 0;
    data_stream *s = open_good(options_of("gen:cwe,common=4,share=0.5", RETRIEVAL_V, T));
    int32_t x[MAX_T + 1], question[MAX_T];
    for (uint64_t i = 0; i < 200; i++) {
        read_good(s, DATA_TRAIN, i);
        size_t n = whole_window(x, T), count[RETRIEVAL_V] = {0}, rank[RETRIEVAL_V] = {0};
        assert_int_equal(find_mark(x, n, 0, ASKED), LIST + 1);
        assert_int_equal(x[LIST + 2], RETRIEVAL_W + 3);
        for (size_t t = 1; t <= LIST; t++) count[x[t]]++;
        for (size_t t = 1; t <= LIST / 2; t++) halves += x[t] == x[LIST + 3];
        for (size_t k = 0; k < K; k++) {
            int32_t word = x[LIST + 3 + k];
            rank[word] = k + 1;
            assert_int_equal(count[word], (size_t)floor(0.5 * LIST * (double)(K - k) / 10));
        }
        for (int32_t w = 0; w < RETRIEVAL_W; w++)
            if (rank[w] == 0) assert_true(count[w] < count[x[n - 1]]);
        assert_int_equal(data_questions(s, inputs, question), 1);
        for (size_t t = 0; t < T; t++) assert_int_equal(question[t], t >= LIST + 2);
    }
    assert_close(halves / (200 * floor(0.2 * LIST)), 0.5, 0.03); /* the list is shuffled */
    data_close(s);
}

static void test_statements(void **state) {
    (void)state;
    check_statements("gen:niah,seed=3", 20, false, 1, 1, 1, 1);
    check_statements("gen:niah,seed=3,keys=5", 40, false, 5, 5, 1, 1);
    check_statements("gen:niah,seed=3,values=6,value_size=2", 60, false, 1, 6, 1, 2);
    check_statements("gen:niah,seed=3,keys=6,queries=3,values=2", MAX_T, false, 6, 12, 3, 1);
    check_statements("gen:niah,seed=3,keys=30,queries=15,value_size=3", MAX_T, false, 30, 30, 15, 3);
    check_statements("gen:vt,seed=3", 40, true, 2, 8, 1, 1);
    check_statements("gen:vt,seed=3,chains=7,variables=6,queries=7", 300, true, 7, 42, 7, 1);
}

/* answers_only hides all other targets and changes nothing else; the mixture asks each of its six kinds of
 * questions. */
static void test_answers_only(void **state) {
    (void)state;
    enum { T = 96, WINDOWS = 6000 };
    data_stream *s = open_good(options_of("gen:ruler", RETRIEVAL_V, T));
    data_stream *masked = open_good(options_of("gen:ruler,answers_only=1", RETRIEVAL_V, T));
    size_t kinds[6] = {0};
    int32_t question[T];
    for (uint64_t i = 0; i < WINDOWS; i++) {
        read_good(s, DATA_TRAIN, i);
        read_again(masked, DATA_TRAIN, i);
        assert_memory_equal(inputs, again_inputs, sizeof question);
        size_t queries = data_questions(s, inputs, question), said = 0, answers = 0;
        for (size_t t = 0; t < T; t++) {
            assert_int_equal(again_targets[t], question[t] > 0 ? targets[t] : -1);
            said += inputs[t] == SAID, answers += question[t] > 0;
        }
        size_t kind = said == 1 ? 0 : said == 8 ? 4 : said == 0 ? 5 : queries == 4 ? 3 : answers == 4 ? 2 : 1;
        assert_int_equal(queries, kind == 3 ? 4 : 1);
        assert_int_equal(answers, kind < 2 ? 1 : kind == 5 ? 3 : 4);
        kinds[kind]++;
    }
    for (size_t k = 0; k < 6; k++) assert_close((double)kinds[k] / WINDOWS, 1.0 / 6, 0.025);
    double actual, expected;
    assert_true(data_entropy(masked, DATA_VAL, 0, 3, &actual, &expected, error, sizeof error));
    assert_true(actual == 0 && expected == 0);
    assert_true(data_entropy(s, DATA_VAL, 0, 3, &actual, &expected, error, sizeof error));
    assert_true(isnan(actual) && isnan(expected));
    data_close(masked);
    data_close(s);
    s = open_good(options_of("gen:backcopy", RETRIEVAL_V, T));
    read_good(s, DATA_TRAIN, 0);
    assert_int_equal(data_questions(s, inputs, question), 0);
    data_close(s);
}

/* ---- Loss spikes ---- */

static double normal(data_random *random) {
    double u = data_random_uniform(random), v = data_random_uniform(random);
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

/* A falling loss with noise has no spikes; what stands out by eight standard deviations is one, six is none, nor is any
 * in the first steps, nor the last digit of a loss that never changes. */
static void test_spikes(void **state) {
    (void)state;
    data_random random = data_random_at(1, 0, 0);
    spikes s = {0};
    for (int i = 0; i < 5000; i++) {
        double loss = 2 + 5 * exp(-i / 300.0) + 0.05 * normal(&random);
        assert_int_equal(spikes_add(&s, loss), SPIKE_NONE);
    }
    assert_close(s.mean, 2, 0.02);
    assert_close(s.deviation, 0.05, 0.015);
    assert_close(s.lowest, 2, 0.02);
    spikes low = s, high = s;
    assert_int_equal(spikes_add(&low, s.mean + 6 * s.deviation), SPIKE_NONE);
    assert_int_equal(spikes_add(&high, s.mean + 8 * s.deviation), SPIKE_LOSS);
    assert_int_equal(low.count, 0);
    assert_int_equal(high.count, 1);

    spikes still = {0};
    for (int i = 0; i < 32; i++) assert_int_equal(spikes_add(&still, 1 + (i == 20)), SPIKE_NONE);
    spikes same = {0};
    for (int i = 0; i < 300; i++) assert_int_equal(spikes_add(&same, 3), SPIKE_NONE);
    assert_int_equal(spikes_add(&same, 3.001), SPIKE_NONE);
    assert_int_equal(spikes_add(&same, 3.03), SPIKE_LOSS);
}

/* Whether losses that fall in 200 steps and stay for 200, then jump, are divergence. */
static bool diverges(double first, double lowest, double later) {
    spikes s = {0};
    for (int i = 0; i < 400; i++) {
        double loss = i < 200 ? first + (lowest - first) * i / 200 : lowest;
        if (spikes_add(&s, loss) == SPIKE_DIVERGED) return true;
    }
    assert_close(s.lowest, lowest, 1e-9);
    for (int i = 0; i < 1000; i++)
        if (spikes_add(&s, later) == SPIKE_DIVERGED) return true;
    return false;
}

static void test_divergence(void **state) {
    (void)state;
    assert_true(diverges(8, 3, 5.6));
    assert_false(diverges(8, 3, 5.4));
    assert_true(diverges(3.2, 3, 4.1));
    assert_false(diverges(3.2, 3, 3.9));
    assert_true(diverges(4, 4, 5.1));
    assert_false(diverges(4, 4, 4.9));
    assert_true(diverges(4, 9, 9));
}

/* ---- Labels and help ---- */

static void label(const data_stream *s, int32_t token, const char *expected) {
    char text[DATA_LABEL_SIZE];
    assert_string_equal(data_token_text(s, token, text, sizeof text), expected);
}

static void test_labels(void **state) {
    (void)state;
    data_options options = options_of(write_text("labels.txt", "some text"), 300, 4);
    options.bos_token = 299;
    data_stream *s = open_good(options);
    label(s, 'a', "a");
    label(s, ' ', " ");
    label(s, '\n', "\\n");
    label(s, '\t', "\\t");
    label(s, 0, "\\x00");
    label(s, 0x7F, "\\x7F");
    label(s, 0xE4, "\\xE4");
    label(s, 299, "<s>");
    label(s, 256, "256");
    data_close(s);
    s = open_good(options_of(write_text("labels.u16", "some text!"), 65536, 4));
    label(s, 65, "65");
    data_close(s);
    s = open_good(options_of("gen:backcopy,vocab=50", 60, 4));
    label(s, 0, "T0");
    label(s, 2, "T2");
    label(s, 3, "t3");
    label(s, 50, "<s>");
    data_close(s);
    s = open_good(options_of("gen:niah,vocab=50", 60, 8));
    label(s, 49, "t49");
    label(s, 50, "<s>");
    label(s, 51, "!");
    label(s, 52, "?");
    label(s, 53, "#");
    label(s, 54, "t54");
    data_close(s);
    s = open_good(options_of("gen:random", 60, 4));
    label(s, 17, "t17");
    label(s, INT32_MIN, "t-2147483648");
    data_close(s);
}

/* ---- Questions ---- */

static void expect_label(const char *line, size_t label) {
    data_question_file f;
    ga_error e;
    if (data_read_questions(&f, write_text("questions.jsonl", line), &e)) fail_msg("%s: %s", line, e.text);
    assert_int_equal(arrlenu(f.questions), 1);
    assert_int_equal(f.questions[0].line, 1);
    assert_string_equal(f.questions[0].context, "a");
    assert_string_equal(f.questions[0].choices[1], "c");
    assert_int_equal(f.questions[0].label, label);
    data_free_questions(&f);
}

static void expect_no_question(const char *line, const char *why) {
    data_question_file f;
    ga_error e = {GA_OK, ""};
    assert_int_equal(data_read_questions(&f, write_text("questions.jsonl", line), &e), GA_ERR_FORMAT);
    if (!strstr(e.text, why)) fail_msg("%s: %s", line, e.text);
    data_free_questions(&f);
}

static void test_questions(void **state) {
    (void)state;
    expect_label("{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"label\": 1}", 1);
    expect_label("{\"ctx\": \"a\", \"endings\": [\"b\", \"c\"], \"gold\": \"1\"}", 1);
    expect_label("{\"query\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": \"B\"}", 1);
    expect_label("{\"question\": \"a\", \"choices\": {\"text\": [\"b\", \"c\"], \"label\": [\"1\", \"2\"]}, "
                 "\"answerKey\": \"1\"}",
                 0);
    static const char choice[] = "of a choice", choices[] = "2 to 26 texts", context[] = "needs one text \"context\"";
    expect_no_question("{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"label\": 2}", choice);
    expect_no_question("{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"label\": \"C\"}", choice);
    expect_no_question("{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"label\": \"2\"}", choice);
    expect_no_question("{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"label\": 0, \"gold\": 0}", choice);
    expect_no_question("{\"context\": \"a\", \"choices\": [\"b\"], \"label\": 0}", choices);
    expect_no_question("{\"context\": \"a\", \"choices\": [\"b\", \"\"], \"label\": 0}", choices);
    expect_no_question("{\"context\": \"a\", \"ctx\": \"a\", \"choices\": [\"b\", \"c\"], \"label\": 0}", context);
    expect_no_question("{\"context\": 1, \"choices\": [\"b\", \"c\"], \"label\": 0}", context);
}

static void test_help(void **state) {
    (void)state;
    char text[8192] = "";
    FILE *file = tmpfile();
    assert_non_null(file);
    data_print_sources(file);
    rewind(file);
    assert_true(fread(text, 1, sizeof text - 1, file) > 0);
    fclose(file);
    static const char *const words[] = {"FILE.txt",   "FILE.jsonl",    "FILE.u16",         "FILE.u32",
                                        "FILE.bin",   "gen:backcopy,", "trigger_rate=0.1", "concentration=6.4",
                                        "triggers=3", "gen:random,",   "gen:niah,",        "gen:ruler,"};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (!strstr(text, words[i])) fail_msg("the help does not mention %s", words[i]);
}

static int make_directory(void **state) {
    (void)state;
    const char *parent = getenv("TMPDIR");
    snprintf(directory, sizeof directory, "%s/test_data.XXXXXX", parent && strlen(parent) < 40 ? parent : "/tmp");
    return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", directory);
    return system(command);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_philox),
        cmocka_unit_test(test_random_draws),
        cmocka_unit_test(test_permutation),
        cmocka_unit_test(test_formats),
        cmocka_unit_test(test_smallest),
        cmocka_unit_test(test_split_and_shuffle),
        cmocka_unit_test(test_large_file),
        cmocka_unit_test(test_bad_files),
        cmocka_unit_test(test_unreadable),
        cmocka_unit_test(test_bad_options),
        cmocka_unit_test(test_token_beyond_vocabulary),
        cmocka_unit_test(test_shrinking_file),
        cmocka_unit_test(test_jsonl_text),
        cmocka_unit_test(test_jsonl_errors),
        cmocka_unit_test(test_jsonl_points),
        cmocka_unit_test(test_jsonl_stream),
        cmocka_unit_test(test_jsonl_damaged),
        cmocka_unit_test(test_generator_errors),
        cmocka_unit_test(test_generator_windows),
        cmocka_unit_test(test_random),
        cmocka_unit_test(test_backcopy_rows),
        cmocka_unit_test(test_backcopy_rows_in_any_order),
        cmocka_unit_test(test_backcopy_probability),
        cmocka_unit_test(test_backcopy_windows),
        cmocka_unit_test(test_backcopy_lowest_loss),
        cmocka_unit_test(test_backcopy_extremes),
        cmocka_unit_test(test_backcopy_large),
        cmocka_unit_test(test_statements),
        cmocka_unit_test(test_needle_places),
        cmocka_unit_test(test_needle_order),
        cmocka_unit_test(test_common_words),
        cmocka_unit_test(test_answers_only),
        cmocka_unit_test(test_spikes),
        cmocka_unit_test(test_divergence),
        cmocka_unit_test(test_labels),
        cmocka_unit_test(test_questions),
        cmocka_unit_test(test_help),
    };
    return cmocka_run_group_tests_name("data", tests, make_directory, remove_directory);
}
