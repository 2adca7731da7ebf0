/* data/vocabulary.c - vocabularies and tokens on the command line.
 *
 *     data/vocabulary FILE... [--vocab_size N] [--min_frequency N] [--output FILE]    learns a vocabulary from text
 *     data/vocabulary --tokenizer DIR --encode FILE [--output FILE.u32]               the tokens of a text
 *     data/vocabulary --tokenizer DIR --decode FILE.u32 [--output FILE]               the text of tokens
 *
 * Exit codes: 0 done, 1 a failure, 2 wrong usage, the last two with one line on stderr.
 */
#define _POSIX_C_SOURCE   200809L
#define _FILE_OFFSET_BITS 64
#define _DARWIN_C_SOURCE  /* flock, ru_maxrss: on macOS POSIX alone hides them */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define STB_DS_IMPLEMENTATION /* included by data/tokenizer.h */
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"
#define DATA_IMPLEMENTATION
#include "vocabulary.h"

typedef struct {
    const char **texts; /* stb_ds array */
    const char *tokenizer, *encode, *decode, *output;
    size_t vocab_size, min_frequency;
    ga_error error;
} job;

static const char usage[] =
    "usage: data/vocabulary FILE... [--vocab_size N] [--min_frequency N] [--output FILE]\n"
    "       data/vocabulary --tokenizer DIR --encode FILE [--output FILE]\n"
    "       data/vocabulary --tokenizer DIR --decode FILE [--output FILE]\n"
    "\n"
    "Learns a byte-level BPE vocabulary from .txt and .jsonl files and writes it as a tokenizer.json; or turns a text\n"
    "into raw 32-bit tokens with a tokenizer.json (or the directory it is in), or such tokens into text.\n"
    "\n"
    "  --vocab_size N     tokens, <|endoftext|> and the 256 bytes among them; default 32000\n"
    "  --min_frequency N  pairs that occur less often are not joined; default 2\n"
    "  --output FILE      default: tokenizer.json, or the standard output\n";

static double seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double now(void) {
    return seconds(CLOCK_MONOTONIC);
}

static int fail_usage(const char *problem, const char *what) {
    fprintf(stderr, "vocabulary: %s%s (see --help)\n", what, problem);
    return 2;
}

static int fail(const job *j) {
    fprintf(stderr, "vocabulary: %s\n", j->error.text);
    return 1;
}

static bool read_number(const char *text, size_t *value) {
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && *end == 0 && errno == 0 && *value <= 16777216;
}

static void show_progress(const char *what, double share) {
    static double drawn_at;
    bool terminal = isatty(STDERR_FILENO);
    if (share < 1 && now() - drawn_at < (terminal ? 0.1 : 10)) return;
    drawn_at = now();
    fprintf(stderr, "%s%-10s %3.0f %%%s", terminal ? "\r" : "", what, 100 * share, terminal && share < 1 ? "" : "\n");
}

/* ---- learning ---- */

static int train(job *j) {
    data_vocabulary_options options = {j->vocab_size, j->min_frequency, show_progress};
    const char *output = j->output ? j->output : DATA_TOKENIZER_FILE;
    double begin = now();
    if (data_vocabulary_train(j->texts, arrlenu(j->texts), &options, output, &j->error)) return fail(j);
    data_tokenizer *t = data_tokenizer_open(output, &j->error);
    if (!t) return fail(j);
    printf("%s: %zu tokens, %.1f s\n", output, data_tokenizer_size(t), now() - begin);
    data_tokenizer_close(t);
    return 0;
}

/* ---- encoding and decoding ---- */

typedef struct {
    data_tokenizer *tokenizer;
    FILE *out;
    int32_t *tokens; /* stb_ds array */
    uint64_t bytes, count;
    double busy; /* seconds of the processor */
} stream;

static ga_result write_out(FILE *out, const void *bytes, size_t n, ga_error *e) {
    return fwrite(bytes, 1, n, out) == n ? GA_OK : gai_file_error(e, "write", "the output");
}

static ga_result encode_part(void *context, const char *text, size_t n, bool more, bool end, ga_error *e) {
    stream *s = context;
    (void)end;
    arrsetlen(s->tokens, 0);
    double begin = seconds(CLOCK_PROCESS_CPUTIME_ID);
    ga_result result = more ? data_tokenizer_encode_part(s->tokenizer, text, n, &s->tokens, e)
                            : data_tokenizer_encode(s->tokenizer, text, n, false, &s->tokens, e);
    s->busy += seconds(CLOCK_PROCESS_CPUTIME_ID) - begin;
    s->bytes += n;
    s->count += arrlenu(s->tokens);
    for (size_t i = 0; i < arrlenu(s->tokens) && !result; i++) {
        uint32_t token = (uint32_t)s->tokens[i];
        unsigned char bytes[4] = {(unsigned char)token, (unsigned char)(token >> 8), (unsigned char)(token >> 16),
                                  (unsigned char)(token >> 24)};
        result = write_out(s->out, bytes, sizeof bytes, e);
    }
    return result;
}

static ga_result decode(stream *s, const char *path, ga_error *e) {
    FILE *file = NULL;
    uint64_t size = 0;
    ga_result result = gai_open(path, &file, &size, e);
    if (result) return result;
    unsigned char b[4];
    while (!result && fread(b, 1, sizeof b, file) == sizeof b) {
        int32_t token = (int32_t)(b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24);
        size_t n;
        const char *bytes = data_tokenizer_bytes(s->tokenizer, token, &n);
        result = bytes ? write_out(s->out, bytes, n, e) : gai_fail(e, GA_ERR_INPUT, "%s: %d is no token", path, token);
    }
    if (!result && size % sizeof b)
        result = gai_fail(e, GA_ERR_FORMAT, "%s: is no whole number of 32-bit tokens", path);
    fclose(file);
    return result;
}

static int convert(job *j) {
    stream s = {.tokenizer = data_tokenizer_open(j->tokenizer, &j->error)};
    if (!s.tokenizer) return fail(j);
    s.out = j->output ? fopen(j->output, "wb") : stdout;
    ga_result result = s.out ? GA_OK : gai_file_error(&j->error, "create", j->output);
    if (!result && j->encode)
        result = data_text_visit(j->encode, s.tokenizer, NULL, "", encode_part, &s, &j->error);
    else if (!result)
        result = decode(&s, j->decode, &j->error);
    if (s.out && fflush(s.out) != 0 && !result) result = gai_file_error(&j->error, "write", "the output");
    if (j->output && s.out) fclose(s.out);
    if (!result && j->encode)
        fprintf(stderr, "%llu tokens of %llu bytes, %.1f MB/s on one core\n", (unsigned long long)s.count,
                (unsigned long long)s.bytes, (double)s.bytes / s.busy / 1e6);
    arrfree(s.tokens);
    data_tokenizer_close(s.tokenizer);
    return result ? fail(j) : 0;
}

static int run(job *j, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i];
        if (strcmp(option, "--help") == 0 || strcmp(option, "-h") == 0) return fputs(usage, stdout), 0;
        if (option[0] != '-') {
            arrput(j->texts, option);
            continue;
        }
        if (i + 1 == argc) return fail_usage(" is unknown or needs a value", option);
        const char *value = argv[++i];
        bool good = true;
        if (strcmp(option, "--tokenizer") == 0)
            j->tokenizer = value;
        else if (strcmp(option, "--encode") == 0)
            j->encode = value;
        else if (strcmp(option, "--decode") == 0)
            j->decode = value;
        else if (strcmp(option, "--output") == 0)
            j->output = value;
        else if (strcmp(option, "--vocab_size") == 0)
            good = read_number(value, &j->vocab_size);
        else if (strcmp(option, "--min_frequency") == 0)
            good = read_number(value, &j->min_frequency);
        else
            return fail_usage(" is unknown", option);
        if (!good) return fail_usage(" takes a number", option);
    }
    if (j->tokenizer && !j->encode == !j->decode) return fail_usage(" goes with --encode or --decode", "--tokenizer");
    if (!j->tokenizer && (j->encode || j->decode)) return fail_usage(" needs --tokenizer", "a conversion");
    if (!j->tokenizer && arrlenu(j->texts) == 0) return fail_usage(" is given", "no text");
    return j->tokenizer ? convert(j) : train(j);
}

int main(int argc, char **argv) {
    job j = {.vocab_size = 32000, .min_frequency = 2};
    int exit_code = run(&j, argc, argv);
    arrfree(j.texts);
    return exit_code;
}
