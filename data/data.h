/* data/data.h - token streams for training, evaluation and analysis.
 *
 * A source is a file, known by its ending, or a generator. It is cut into windows of T inputs and T targets:
 *
 *     data_options options = {.source = "book.txt", .vocab_size = 256, .seq_len = T, .val_fraction = 0.1,
 *                             .shuffle = true, .seed = 1, .bos_token = -1};
 *     char error[256];
 *     data_stream *stream = data_open(&options, error, sizeof error);
 *     if (!stream) return fail(error);
 *     for (uint64_t i = 0; i < 1000; i++)
 *         if (!data_window(stream, DATA_TRAIN, i, inputs, targets, error, sizeof error)) return fail(error);
 *     data_close(stream);
 *
 * Window i depends on (options, part, i) alone, never on what was read before: a run that stopped at window i goes on
 * at window i. Files are read where they are needed and never held in memory, so they may be larger than it. One
 * stream serves one thread at a time; different streams are independent. README.md in this directory has the formats
 * and a drawing of a window.
 *
 * In one .c file, which also holds the implementation of stb_ds:
 *
 *     #define _POSIX_C_SOURCE 200809L      // before any header
 *     #define STB_DS_IMPLEMENTATION        // data.h includes stb_ds.h where that was not done before
 *     #define GATED_ATTENTION_IMPLEMENTATION
 *     #define DATA_IMPLEMENTATION
 *     #include "data/data.h"
 */
#ifndef DATA_H
#define DATA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "text.h"

#define DATA_ENDLESS UINT64_MAX

typedef struct data_stream data_stream;

typedef enum { DATA_TRAIN, DATA_VAL } data_part;

typedef struct {
    const char *source;      /* FILE or gen:NAME,key=value,... */
    size_t vocab_size;       /* of the model: every token lies below it */
    size_t seq_len;          /* T */
    double val_fraction;     /* of a file's windows that are held out, 0..1, below 1; generators ignore it */
    bool shuffle;            /* training windows in another order in each epoch */
    uint64_t seed;           /* of the order, and of what a generator draws */
    const char *tokenizer;   /* of text in .txt and .jsonl: tokenizer.json or its directory; NULL or "": bytes */
    data_tokenizer *opened;  /* the same, opened already: the caller's, until the stream is closed; or NULL */
    data_progress *progress; /* of making tokens from text */
    long bos_token;          /* opens every window; -1: none. gen:backcopy brings its own */
} data_options;

/* NULL on failure, with one line in `error` that names the source and the place in it. */
data_stream *data_open(const data_options *options, char *error, size_t error_size);
void data_close(data_stream *stream);

/* How many different windows a part has. DATA_ENDLESS: a generator without end. 0: nothing is held out. */
uint64_t data_windows(const data_stream *stream, data_part part);

/* Window `index` of a part: inputs (T), targets (T). Training windows beyond the last go on with the next epoch, in
 * another order if `shuffle`; held-out windows end, and are never shuffled. A target of -1 is not to be counted (key
 * answers_only of the retrieval tasks). False on failure, with one line in `error`.
 */
bool data_window(data_stream *stream, data_part part, uint64_t index, int32_t *inputs, int32_t *targets, char *error,
                 size_t error_size);

/* question (T): the number, from 1, of the question in a window's inputs (T) that target t is part of the answer to; 0:
 * of none. Returns how many questions the window asks: 0, with nothing written, where the source is no retrieval task.
 */
size_t data_questions(const data_stream *stream, const int32_t *inputs, int32_t *question);

/* The lowest loss that any model can reach on the windows first .. first+count-1 of a part, in nats per target; NaN
 * where nobody knows it (files). `actual` is the mean of -ln p(target) under the process that drew them, what a
 * perfect model scores on these very targets and the figure to hold beside a measured loss; `expected` is the mean
 * entropy of p, which varies less from window to window. False on failure, with one line in `error`.
 */
bool data_entropy(data_stream *stream, data_part part, uint64_t first, uint64_t count, double *actual, double *expected,
                  char *error, size_t error_size);

/* The tokenizer that made the tokens; NULL: none did. */
data_tokenizer *data_stream_tokenizer(const data_stream *stream);

/* Label of a token in figures: a byte as itself or \n, \t, \xNN; a tokenizer's as data_tokenizer_label; <s>; triggers
 * T0.. and other generated tokens t17; else its number. Returns `text`; DATA_LABEL_SIZE bytes are enough.
 */
enum { DATA_LABEL_SIZE = 32 };
const char *data_token_text(const data_stream *stream, int32_t token, char *text, size_t text_size);

/* The sources with all their keys, for --help. */
void data_print_sources(FILE *out);

#endif

#if defined(DATA_IMPLEMENTATION) && !defined(DATA_IMPLEMENTED)
#define DATA_IMPLEMENTED

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backcopy.h"
#include "jsonl.h"
#include "random.h"
#include "retrieval.h"

/* ---- What a stream is ---- */

typedef enum { DATAI_RAW, DATAI_BIN, DATAI_JSONL } datai_format;

static const struct {
    const char *ending;
    datai_format format;
    unsigned width; /* bytes per token */
    const char *meaning;
} datai_endings[] = {
    {".txt", DATAI_RAW, 1, "text, a token per byte, or by a tokenizer"},
    {".jsonl", DATAI_JSONL, 1,
     "an object with a string \"text\" per line; bytes of UTF-8, documents separated by a newline, or by a tokenizer"},
    {".u16", DATAI_RAW, 2, "raw 16-bit little-endian tokens"},
    {".u32", DATAI_RAW, 4, "raw 32-bit little-endian tokens"},
    {".bin", DATAI_BIN, 2, "llm.c's header and tokens, or nanoGPT's raw 16-bit tokens"},
};

enum { DATAI_RETRIEVAL_TASKS = 6 }; /* that gen:ruler mixes */

typedef struct {
    /* The values of the keys; vocab 0 stands for the default. */
    uint64_t vocab, triggers, seed, windows, keys, values, queries, value_size, chains, variables, common, answers_only;
    double trigger_rate, concentration, share;

    data_backcopy chain;                         /* of backcopy, and the haystack of the retrieval tasks */
    data_retrieval tasks[DATAI_RETRIEVAL_TASKS]; /* one for each kind of window */
    size_t task_count;
} datai_generator;

typedef struct {
    const char *name;
    size_t offset; /* in datai_generator */
    bool whole;    /* uint64_t, else double */
    double usual, low, high;
    const char *meaning;
} datai_key;

typedef struct {
    const char *name, *meaning;
    const datai_key *keys;
    size_t key_count;
    bool (*open)(data_stream *s, char *error, size_t error_size);
    void (*close)(datai_generator *g); /* NULL: nothing to do */
    bool (*window)(data_stream *s, data_part part, uint64_t index, int32_t *inputs, int32_t *targets);
    bool (*loss)(data_stream *s, const int32_t *inputs, const int32_t *targets, double *actual, double *expected);
    void (*label)(const datai_generator *g, int32_t token, char *text, size_t text_size);
    bool retrieval; /* windows ask questions */
} datai_generator_type;

struct data_stream {
    data_options options;             /* options.source is this stream's own copy */
    uint64_t windows[2];              /* by part */
    const datai_generator_type *type; /* NULL: a file */
    datai_generator generator;

    data_tokenizer *tokenizer;
    int fd; /* with a tokenizer, of its tokens */
    datai_format format;
    unsigned width;  /* bytes per token */
    uint64_t header; /* bytes before the first token */
    uint64_t tokens;
    unsigned char *bytes; /* (T + 1, width) a window as it is in the file */
    data_jsonl jsonl;
    unsigned char *jsonl_buffer;
    data_jsonl_point *points; /* stb_ds array: [k] is where byte k * DATAI_POINT_SPACING of the text can be taken up */
};

enum { DATAI_POINT_SPACING = 1 << 16, DATAI_JSONL_BUFFER = 1 << 16 };

static bool datai_fail(char *error, size_t error_size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, error_size, format, arguments);
    va_end(arguments);
    return false;
}

/* ---- Generators ---- */

static bool datai_random_open(data_stream *s, char *error, size_t error_size) {
    datai_generator *g = &s->generator;
    if (g->vocab == 0) g->vocab = s->options.vocab_size;
    if (g->vocab <= s->options.vocab_size) return true;
    return datai_fail(error, error_size, "%s: vocab=%" PRIu64 " is above the model's vocab_size %zu", s->options.source,
                      g->vocab, s->options.vocab_size);
}

/* Windows follow from the run's seed and the generator's; seed=0 leaves the first as it is, since 0 mixes to 0. */
static bool datai_random_window(data_stream *s, data_part part, uint64_t index, int32_t *inputs, int32_t *targets) {
    uint32_t vocab = (uint32_t)s->generator.vocab;
    data_random random = data_random_at(s->options.seed ^ data_mix(s->generator.seed), (uint32_t)part, index);
    bool bos = s->options.bos_token >= 0;
    inputs[0] = bos ? (int32_t)s->options.bos_token : (int32_t)data_random_below(&random, vocab);
    for (size_t t = 0; t < s->options.seq_len; t++) {
        targets[t] = (int32_t)data_random_below(&random, vocab);
        if (t + 1 < s->options.seq_len) inputs[t + 1] = targets[t];
    }
    return true;
}

static bool datai_random_loss(data_stream *s, const int32_t *inputs, const int32_t *targets, double *actual,
                              double *expected) {
    (void)inputs, (void)targets;
    *actual = *expected = log((double)s->generator.vocab);
    return true;
}

static void datai_random_label(const datai_generator *g, int32_t token, char *text, size_t text_size) {
    (void)g;
    snprintf(text, text_size, "t%" PRId32, token);
}

static bool datai_backcopy_open(data_stream *s, char *error, size_t error_size) {
    datai_generator *g = &s->generator;
    const data_options *o = &s->options;
    if (g->vocab == 0) g->vocab = o->vocab_size - 1;
    if (g->vocab >= o->vocab_size)
        return datai_fail(error, error_size,
                          "%s: vocab=%" PRIu64 " and <s> need a model with a vocab_size of %" PRIu64 ", not %zu",
                          o->source, g->vocab, g->vocab + 1, o->vocab_size);
    if (g->triggers >= g->vocab)
        return datai_fail(error, error_size, "%s: triggers=%" PRIu64 " leaves nothing else in a vocabulary of %" PRIu64,
                          o->source, g->triggers, g->vocab);
    if (o->bos_token >= 0 && (uint64_t)o->bos_token != g->vocab)
        return datai_fail(error, error_size,
                          "%s: bos_token %ld is not the generator's own <s>, %" PRIu64 " (leave it out: -1)", o->source,
                          o->bos_token, g->vocab);
    g->chain = (data_backcopy){.vocab = (int32_t)g->vocab,
                               .triggers = (int32_t)g->triggers,
                               .trigger_rate = g->trigger_rate,
                               .concentration = g->concentration,
                               .seed = g->seed};
    if (data_backcopy_init(&g->chain)) return true;
    return datai_fail(error, error_size, "%s: out of memory", o->source);
}

static void datai_backcopy_close(datai_generator *g) {
    data_backcopy_free(&g->chain);
}

static bool datai_backcopy_window(data_stream *s, data_part part, uint64_t index, int32_t *inputs, int32_t *targets) {
    data_random random = data_random_at(s->options.seed, (uint32_t)part, index);
    return data_backcopy_window(&s->generator.chain, &random, s->options.seq_len, inputs, targets);
}

static bool datai_backcopy_loss(data_stream *s, const int32_t *inputs, const int32_t *targets, double *actual,
                                double *expected) {
    return data_backcopy_loss(&s->generator.chain, s->options.seq_len, inputs, targets, actual, expected);
}

static void datai_backcopy_label(const datai_generator *g, int32_t token, char *text, size_t text_size) {
    if (token == g->chain.vocab)
        snprintf(text, text_size, "<s>");
    else
        snprintf(text, text_size, "%c%" PRId32, token < g->chain.triggers ? 'T' : 't', token);
}

/* Words 0..vocab-1, then the four marks of retrieval.h. */
static bool datai_retrieval_open(data_stream *s, char *error, size_t error_size) {
    datai_generator *g = &s->generator;
    const data_options *o = &s->options;
    if (g->vocab == 0 && o->vocab_size > DATA_RETRIEVAL_MARKS) g->vocab = o->vocab_size - DATA_RETRIEVAL_MARKS;
    if (g->vocab == 0 || g->vocab + DATA_RETRIEVAL_MARKS > o->vocab_size)
        return datai_fail(error, error_size,
                          "%s: vocab=%" PRIu64 " and %d marks need a model with a vocab_size of %" PRIu64 ", not %zu",
                          o->source, g->vocab, DATA_RETRIEVAL_MARKS, g->vocab + DATA_RETRIEVAL_MARKS, o->vocab_size);
    if (o->bos_token >= 0 && (uint64_t)o->bos_token != g->vocab)
        return datai_fail(error, error_size,
                          "%s: bos_token %ld is not the generator's own <s>, %" PRIu64 " (leave it out: -1)", o->source,
                          o->bos_token, g->vocab);
    for (size_t i = 0; i < g->task_count; i++) {
        char need[256];
        g->tasks[i].words = (int32_t)g->vocab;
        if (!data_retrieval_fits(&g->tasks[i], o->seq_len, need, sizeof need))
            return datai_fail(error, error_size, "%s: needs %s", o->source, need);
    }
    g->chain = (data_backcopy){.vocab = (int32_t)g->vocab, .concentration = g->concentration, .seed = g->seed};
    return data_backcopy_init(&g->chain) || datai_fail(error, error_size, "%s: out of memory", o->source);
}

static bool datai_niah_open(data_stream *s, char *error, size_t error_size) {
    datai_generator *g = &s->generator;
    if (g->queries > g->keys)
        return datai_fail(error, error_size, "%s: queries=%" PRIu64 " of keys=%" PRIu64, s->options.source, g->queries,
                          g->keys);
    g->tasks[0] =
        (data_retrieval){.groups = g->keys, .members = g->values, .queries = g->queries, .value_size = g->value_size};
    g->task_count = 1;
    return datai_retrieval_open(s, error, error_size);
}

static bool datai_vt_open(data_stream *s, char *error, size_t error_size) {
    datai_generator *g = &s->generator;
    if (g->queries > g->chains)
        return datai_fail(error, error_size, "%s: queries=%" PRIu64 " of chains=%" PRIu64, s->options.source,
                          g->queries, g->chains);
    g->tasks[0] = (data_retrieval){
        .chained = true, .groups = g->chains, .members = g->variables, .queries = g->queries, .value_size = 1};
    g->task_count = 1;
    return datai_retrieval_open(s, error, error_size);
}

static bool datai_cwe_open(data_stream *s, char *error, size_t error_size) {
    datai_generator *g = &s->generator;
    g->tasks[0] = (data_retrieval){.common = g->common, .share = g->share};
    g->task_count = 1;
    return datai_retrieval_open(s, error, error_size);
}

/* The tasks with their defaults: RULER's four kinds of needles, variables, common words. */
static bool datai_ruler_open(data_stream *s, char *error, size_t error_size) {
    static const data_retrieval tasks[DATAI_RETRIEVAL_TASKS] = {
        {.groups = 1, .members = 1, .queries = 1, .value_size = 1},
        {.groups = 4, .members = 1, .queries = 1, .value_size = 1},
        {.groups = 1, .members = 4, .queries = 1, .value_size = 1},
        {.groups = 4, .members = 1, .queries = 4, .value_size = 1},
        {.chained = true, .groups = 2, .members = 4, .queries = 1, .value_size = 1},
        {.common = 3, .share = 0.4},
    };
    memcpy(s->generator.tasks, tasks, sizeof tasks);
    s->generator.task_count = DATAI_RETRIEVAL_TASKS;
    return datai_retrieval_open(s, error, error_size);
}

static bool datai_retrieval_window(data_stream *s, data_part part, uint64_t index, int32_t *inputs, int32_t *targets) {
    datai_generator *g = &s->generator;
    size_t T = s->options.seq_len;
    data_random random = data_random_at(s->options.seed, (uint32_t)part, index);
    const data_retrieval *task = &g->tasks[data_random_below(&random, (uint32_t)g->task_count)];
    if (!data_retrieval_window(task, &g->chain, &random, T, inputs, targets)) return false;
    if (!g->answers_only) return true;
    int32_t *question = malloc(T * sizeof *question);
    if (!question) return false;
    data_retrieval_questions(task->words, T, inputs, question);
    for (size_t t = 0; t < T; t++)
        if (question[t] == 0) targets[t] = -1;
    free(question);
    return true;
}

/* An answer follows from its window; what the rest could be predicted from is not worked out. */
static bool datai_retrieval_loss(data_stream *s, const int32_t *inputs, const int32_t *targets, double *actual,
                                 double *expected) {
    (void)inputs, (void)targets;
    *actual = *expected = s->generator.answers_only ? 0 : NAN;
    return true;
}

static void datai_retrieval_label(const datai_generator *g, int32_t token, char *text, size_t text_size) {
    static const char *const marks[DATA_RETRIEVAL_MARKS] = {"<s>", "!", "?", "#"};
    int64_t mark = token - (int64_t)g->vocab;
    if (mark >= 0 && mark < DATA_RETRIEVAL_MARKS)
        snprintf(text, text_size, "%s", marks[mark]);
    else
        snprintf(text, text_size, "t%" PRId32, token);
}

#define DATAI_WHOLE(name, usual, low, high, meaning) \
    { #name, offsetof(datai_generator, name), true, usual, low, high, meaning }
#define DATAI_REAL(name, usual, low, high, meaning) \
    { #name, offsetof(datai_generator, name), false, usual, low, high, meaning }

static const datai_key datai_random_keys[] = {
    DATAI_WHOLE(vocab, 0, 1, INT32_MAX, "tokens 0..vocab-1; without it the model's vocab_size"),
    DATAI_WHOLE(windows, 0, 0, 0x1p63,
                "this many different training windows, epoch after epoch; 0: new ones without end"),
    DATAI_WHOLE(seed, 0, 0, 0x1p64, "other tokens under the same run seed"),
};

static const datai_key datai_backcopy_keys[] = {
    DATAI_WHOLE(vocab, 0, 2, INT32_MAX - 1, "V, tokens 0..V-1, and V is <s>; without it the model's vocab_size - 1"),
    DATAI_WHOLE(triggers, 3, 1, INT32_MAX - 2, "tokens after which the one before them is copied"),
    DATAI_REAL(trigger_rate, 0.1, 0, 0.99, "probability of a trigger after any other token"),
    DATAI_REAL(concentration, 6.4, 0.01, 1000, "each row of the bigram chain is Dirichlet(concentration / V)"),
    DATAI_WHOLE(windows, 0, 0, 0x1p63,
                "this many different training windows, epoch after epoch; 0: new ones without end"),
    DATAI_WHOLE(seed, 0, 0, 0x1p64, "of the chain"),
};

#define DATAI_RETRIEVAL_KEYS                                                                              \
    DATAI_WHOLE(vocab, 0, 2, INT32_MAX - DATA_RETRIEVAL_MARKS,                                            \
                "words 0..vocab-1, and four marks after them; without it the model's vocab_size - 4"),    \
        DATAI_WHOLE(answers_only, 0, 0, 1, "1: the loss counts the answers only"),                        \
        DATAI_REAL(concentration, 6.4, 0.01, 1000, "of the haystack, a bigram chain as in gen:backcopy"), \
        DATAI_WHOLE(windows, 0, 0, 0x1p63,                                                                \
                    "this many different training windows, epoch after epoch; 0: new ones without end"),  \
        DATAI_WHOLE(seed, 0, 0, 0x1p64, "of the haystack's chain")

static const datai_key datai_niah_keys[] = {
    DATAI_WHOLE(keys, 1, 1, 65536, "different keys in the haystack"),
    DATAI_WHOLE(values, 1, 1, 65536, "values of each key, each a needle of its own; all are asked for"),
    DATAI_WHOLE(queries, 1, 1, 65536, "keys asked for, one after another"),
    DATAI_WHOLE(value_size, 1, 1, 65536, "words of a value"),
    DATAI_RETRIEVAL_KEYS,
};

static const datai_key datai_vt_keys[] = {
    DATAI_WHOLE(chains, 2, 1, 65536, "chains of variables"),
    DATAI_WHOLE(variables, 4, 1, 65536, "variables of a chain, one hop each"),
    DATAI_WHOLE(queries, 1, 1, 65536, "chains asked for"),
    DATAI_RETRIEVAL_KEYS,
};

static const datai_key datai_cwe_keys[] = {
    DATAI_WHOLE(common, 3, 1, 65536, "common words, asked for from the most frequent on"),
    DATAI_REAL(share, 0.4, 0, 1, "of the list that they make up"),
    DATAI_RETRIEVAL_KEYS,
};

static const datai_key datai_ruler_keys[] = {DATAI_RETRIEVAL_KEYS};

#undef DATAI_RETRIEVAL_KEYS
#undef DATAI_WHOLE
#undef DATAI_REAL

#define DATAI_KEYS(keys) keys, sizeof keys / sizeof keys[0]

static const datai_generator_type datai_generators[] = {
    {"backcopy", "Bigram-Backcopy: after a trigger, the token before it; else a bigram chain",
     DATAI_KEYS(datai_backcopy_keys), datai_backcopy_open, datai_backcopy_close, datai_backcopy_window,
     datai_backcopy_loss, datai_backcopy_label, false},
    {"random", "uniform tokens: nothing to learn but ln(vocab)", DATAI_KEYS(datai_random_keys), datai_random_open, NULL,
     datai_random_window, datai_random_loss, datai_random_label, false},
    {"niah", "retrieval: needles in a haystack, keys and values", DATAI_KEYS(datai_niah_keys), datai_niah_open,
     datai_backcopy_close, datai_retrieval_window, datai_retrieval_loss, datai_retrieval_label, true},
    {"vt", "retrieval: variable tracking, chains of copies", DATAI_KEYS(datai_vt_keys), datai_vt_open,
     datai_backcopy_close, datai_retrieval_window, datai_retrieval_loss, datai_retrieval_label, true},
    {"cwe", "retrieval: the most common words of a list", DATAI_KEYS(datai_cwe_keys), datai_cwe_open,
     datai_backcopy_close, datai_retrieval_window, datai_retrieval_loss, datai_retrieval_label, true},
    {"ruler", "retrieval: a mixture of niah (single, multi-key, multi-value, multi-query), vt and cwe",
     DATAI_KEYS(datai_ruler_keys), datai_ruler_open, datai_backcopy_close, datai_retrieval_window, datai_retrieval_loss,
     datai_retrieval_label, true},
};

#undef DATAI_KEYS

enum {
    DATAI_ENDING_COUNT = sizeof datai_endings / sizeof datai_endings[0],
    DATAI_GENERATOR_COUNT = sizeof datai_generators / sizeof datai_generators[0]
};

static void datai_append(char *list, size_t size, const char *word) {
    size_t used = strlen(list);
    snprintf(list + used, size - used, "%s%s", used ? ", " : "", word);
}

/* "key=value" of `length` bytes, into the generator. `seen` has a bit for each key that came before. */
static bool datai_set_key(data_stream *s, const char *setting, size_t length, unsigned *seen, char *error,
                          size_t error_size) {
    const datai_generator_type *type = s->type;
    size_t name_length = strcspn(setting, "=,");
    if (name_length == length)
        return datai_fail(error, error_size, "gen:%s: \"%.*s\" is not key=value", type->name, (int)length, setting);
    size_t k = 0;
    while (k < type->key_count &&
           (strlen(type->keys[k].name) != name_length || memcmp(type->keys[k].name, setting, name_length)))
        k++;
    if (k == type->key_count) {
        char known[128] = "";
        for (k = 0; k < type->key_count; k++) datai_append(known, sizeof known, type->keys[k].name);
        return datai_fail(error, error_size, "gen:%s: unknown key \"%.*s\" (known: %s)", type->name, (int)name_length,
                          setting, known);
    }
    const datai_key *key = &type->keys[k];
    if (*seen & 1u << k)
        return datai_fail(error, error_size, "gen:%s: key \"%s\" is given twice", type->name, key->name);
    *seen |= 1u << k;

    const char *value = setting + name_length + 1;
    void *field = (char *)&s->generator + key->offset;
    char *end = NULL;
    double number = NAN;
    errno = 0;
    if (key->whole && *value >= '0' && *value <= '9') {
        *(uint64_t *)field = strtoull(value, &end, 10);
        number = (double)*(uint64_t *)field;
    } else if (!key->whole && ((*value >= '0' && *value <= '9') || *value == '.')) {
        *(double *)field = number = gai_real_of(value, &end);
    }
    if (end != setting + length)
        return datai_fail(error, error_size, "gen:%s: %.*s is not a %s", type->name, (int)length, setting,
                          key->whole ? "whole number" : "number");
    if (errno == ERANGE || !(number >= key->low && number <= key->high))
        return datai_fail(error, error_size, "gen:%s: %.*s is out of range %.10g..%.10g", type->name, (int)length,
                          setting, key->low, key->high);
    return true;
}

/* gen:NAME,key=value,... */
static bool datai_open_generator(data_stream *s, char *error, size_t error_size) {
    const char *at = s->options.source + strlen("gen:");
    size_t length = strcspn(at, ",");
    for (size_t i = 0; i < DATAI_GENERATOR_COUNT; i++)
        if (strlen(datai_generators[i].name) == length && !memcmp(datai_generators[i].name, at, length))
            s->type = &datai_generators[i];
    if (!s->type) {
        char known[128] = "";
        for (size_t i = 0; i < DATAI_GENERATOR_COUNT; i++) datai_append(known, sizeof known, datai_generators[i].name);
        return datai_fail(error, error_size, "unknown generator \"gen:%.*s\" (known: %s)", (int)length, at, known);
    }
    for (size_t k = 0; k < s->type->key_count; k++) {
        const datai_key *key = &s->type->keys[k];
        void *field = (char *)&s->generator + key->offset;
        if (key->whole)
            *(uint64_t *)field = (uint64_t)key->usual;
        else
            *(double *)field = key->usual;
    }
    unsigned seen = 0;
    for (at += length; *at == ','; at += length) {
        length = strcspn(++at, ",");
        if (!datai_set_key(s, at, length, &seen, error, error_size)) return false;
    }
    s->windows[DATA_TRAIN] = s->generator.windows ? s->generator.windows : DATA_ENDLESS;
    s->windows[DATA_VAL] = DATA_ENDLESS;
    return s->type->open(s, error, error_size);
}

/* ---- Files ---- */

/* Returns how many bytes there were, fewer than n at the end of the file or, with errno set, at an error. */
static size_t datai_read_at(int fd, unsigned char *out, size_t n, uint64_t offset) {
    size_t done = 0;
    errno = 0;
    while (done < n) {
        ssize_t now = pread(fd, out + done, n - done, (off_t)(offset + done));
        if (now < 0 && errno == EINTR) {
            errno = 0;
            continue;
        }
        if (now <= 0) break;
        done += (size_t)now;
    }
    return done;
}

static uint32_t datai_little_endian(const unsigned char *bytes, unsigned width) {
    uint32_t value = 0;
    while (width-- > 0) value = value << 8 | bytes[width];
    return value;
}

static bool datai_read_failed(const data_stream *s, char *error, size_t error_size) {
    const char *source = s->options.source;
    if (s->jsonl.problem)
        return datai_fail(error, error_size, "%s:%" PRIu64 ": %s", source, s->jsonl.now.line, s->jsonl.problem);
    if (errno != 0) return datai_fail(error, error_size, "%s: cannot be read: %s", source, strerror(errno));
    return datai_fail(error, error_size, "%s: became shorter while it was read", source);
}

/* llm.c writes 256 int32: magic, version, number of tokens, zeros. A file that starts otherwise is nanoGPT's and has no
 * header.
 */
static bool datai_read_bin_header(data_stream *s, uint64_t size, char *error, size_t error_size) {
    enum { HEADER = 256 * 4 };
    static const struct {
        uint32_t magic, version;
        unsigned width;
    } known[] = {{20240520, 1, 2} /* GPT-2 */, {20240801, 7, 4} /* Llama 3 */};
    const char *source = s->options.source;
    unsigned char head[12] = {0};
    if (datai_read_at(s->fd, head, sizeof head, 0) < 4) return true;
    uint32_t magic = datai_little_endian(head, 4), version = datai_little_endian(head + 4, 4);
    uint32_t count = datai_little_endian(head + 8, 4);
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (magic != known[i].magic) continue;
        if (size < HEADER)
            return datai_fail(error, error_size, "%s: ends within llm.c's header of %d bytes", source, HEADER);
        if (version != known[i].version)
            return datai_fail(error, error_size, "%s: llm.c's header has version %" PRIu32 ", known is %" PRIu32,
                              source, version, known[i].version);
        s->width = known[i].width;
        s->header = HEADER;
        if (size - HEADER != (uint64_t)count * s->width)
            return datai_fail(error, error_size,
                              "%s: llm.c's header promises %" PRIu32 " tokens of %u bytes, but %" PRIu64
                              " bytes follow",
                              source, count, s->width, size - HEADER);
    }
    return true;
}

/* One pass over the file: checks every line, counts the bytes of text, and notes a point for each 64 KiB of them. */
static bool datai_index_jsonl(data_stream *s, char *error, size_t error_size) {
    s->jsonl_buffer = malloc(DATAI_JSONL_BUFFER);
    if (!s->jsonl_buffer) return datai_fail(error, error_size, "%s: out of memory", s->options.source);
    data_jsonl_from_file(&s->jsonl, s->fd, s->jsonl_buffer, DATAI_JSONL_BUFFER);
    size_t n = DATAI_POINT_SPACING;
    while (n == DATAI_POINT_SPACING) {
        arrput(s->points, data_jsonl_tell(&s->jsonl));
        n = data_jsonl_read(&s->jsonl, NULL, DATAI_POINT_SPACING);
        s->tokens += n;
    }
    return !s->jsonl.problem || datai_read_failed(s, error, error_size);
}

static bool datai_count_windows(data_stream *s, char *error, size_t error_size) {
    const data_options *o = &s->options;
    bool bos = o->bos_token >= 0;
    uint64_t targets = s->tokens > 0 && !bos ? s->tokens - 1 : s->tokens, windows = targets / o->seq_len, held_out = 0;
    if (windows == 0)
        return datai_fail(error, error_size, "%s: %" PRIu64 " tokens are fewer than one window (seq_len %zu needs %zu)",
                          o->source, s->tokens, o->seq_len, o->seq_len + !bos);
    if (o->val_fraction > 0) {
        if (windows == 1)
            return datai_fail(error, error_size, "%s: its only window cannot be split by val_fraction", o->source);
        held_out = (uint64_t)(o->val_fraction * (double)windows + 0.5);
        if (held_out == 0) held_out = 1;
        if (held_out >= windows) held_out = windows - 1;
    }
    s->windows[DATA_TRAIN] = windows - held_out;
    s->windows[DATA_VAL] = held_out;
    return true;
}

/* The tokens of text, which are from then on read like any others. */
static bool datai_open_tokens(data_stream *s, char *error, size_t error_size) {
    const data_options *o = &s->options;
    ga_error e;
    s->tokenizer = o->opened ? o->opened : data_tokenizer_open(o->tokenizer, &e);
    if (!s->tokenizer) return datai_fail(error, error_size, "%s", e.text);
    if (data_tokenizer_size(s->tokenizer) > o->vocab_size)
        return datai_fail(error, error_size, "%s: has tokens up to %zu, beyond the model's vocab_size %zu",
                          data_tokenizer_path(s->tokenizer), data_tokenizer_size(s->tokenizer) - 1, o->vocab_size);
    data_text_layout layout;
    int fd = data_text_tokens(o->source, s->tokenizer, o->progress, &layout, &e);
    if (fd < 0) return datai_fail(error, error_size, "%s", e.text);
    close(s->fd);
    s->fd = fd;
    s->format = DATAI_RAW;
    s->width = layout.width;
    s->header = layout.header;
    s->tokens = layout.tokens;
    return true;
}

static bool datai_open_file(data_stream *s, char *error, size_t error_size) {
    const char *source = s->options.source;
    size_t length = strlen(source), i = 0;
    for (; i < DATAI_ENDING_COUNT; i++) {
        size_t n = strlen(datai_endings[i].ending);
        if (length > n && !strcmp(source + length - n, datai_endings[i].ending)) break;
    }
    if (i == DATAI_ENDING_COUNT) {
        char known[128] = "";
        for (i = 0; i < DATAI_ENDING_COUNT; i++) datai_append(known, sizeof known, datai_endings[i].ending);
        return datai_fail(error, error_size, "%s: unknown kind of data (known endings: %s, and gen:NAME)", source,
                          known);
    }
    s->format = datai_endings[i].format;
    s->width = datai_endings[i].width;

    struct stat status;
    s->fd = open(source, O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* or a FIFO would wait for its writer */
    if (s->fd < 0 || fstat(s->fd, &status) != 0)
        return datai_fail(error, error_size, "%s: cannot be opened: %s", source, strerror(errno));
    if (!S_ISREG(status.st_mode))
        return datai_fail(error, error_size, "%s: is %s", source,
                          S_ISDIR(status.st_mode) ? "a directory" : "not a regular file");
    uint64_t size = (uint64_t)status.st_size;
    if (size == 0) return datai_fail(error, error_size, "%s: is empty", source);

    bool text = s->width == 1;
    if (text && s->options.tokenizer && *s->options.tokenizer) {
        if (!datai_open_tokens(s, error, error_size)) return false;
    } else if (s->format == DATAI_JSONL) {
        if (!datai_index_jsonl(s, error, error_size)) return false;
    } else {
        if (s->format == DATAI_BIN && !datai_read_bin_header(s, size, error, error_size)) return false;
        if ((size - s->header) % s->width != 0)
            return datai_fail(error, error_size,
                              "%s: is cut short: %" PRIu64 " bytes are no whole number of %u-byte tokens", source,
                              size - s->header, s->width);
        s->tokens = (size - s->header) / s->width;
    }
    if (!datai_count_windows(s, error, error_size)) return false;
    s->bytes = malloc((s->options.seq_len + 1) * s->width);
    return s->bytes || datai_fail(error, error_size, "%s: out of memory", source);
}

/* Tokens first .. first+count-1 of the file, as they are there, to s->bytes. */
static bool datai_read_tokens(data_stream *s, uint64_t first, size_t count, char *error, size_t error_size) {
    size_t done;
    if (s->format == DATAI_JSONL) {
        data_jsonl_point point = s->points[first / DATAI_POINT_SPACING];
        size_t ahead = (size_t)(first - point.decoded);
        data_jsonl_seek(&s->jsonl, point);
        done = data_jsonl_read(&s->jsonl, NULL, ahead) == ahead ? data_jsonl_read(&s->jsonl, s->bytes, count) : 0;
        errno = 0; /* what went wrong stands in jsonl.problem */
    } else {
        done = datai_read_at(s->fd, s->bytes, count * s->width, s->header + first * s->width) / s->width;
    }
    return done == count || datai_read_failed(s, error, error_size);
}

static bool datai_file_window(data_stream *s, uint64_t window, int32_t *inputs, int32_t *targets, char *error,
                              size_t error_size) {
    size_t T = s->options.seq_len;
    bool bos = s->options.bos_token >= 0;
    uint64_t first = window * T;
    if (!datai_read_tokens(s, first, T + !bos, error, error_size)) return false;
    for (size_t i = 0; i < T + !bos; i++) {
        uint32_t token = datai_little_endian(s->bytes + i * s->width, s->width);
        if (token >= s->options.vocab_size)
            return datai_fail(error, error_size,
                              "%s: token %" PRIu32 " at position %" PRIu64 " is not below vocab_size %zu",
                              s->options.source, token, first + i, s->options.vocab_size);
        if (i + bos < T) inputs[i + bos] = (int32_t)token;
        if (i + bos > 0) targets[i + bos - 1] = (int32_t)token;
    }
    if (bos) inputs[0] = (int32_t)s->options.bos_token;
    return true;
}

/* ---- Streams ---- */

static bool datai_check_options(const data_options *o, char *error, size_t error_size) {
    if (!o->source || !o->source[0]) return datai_fail(error, error_size, "no data source is given");
    if (o->vocab_size < 1 || o->vocab_size > INT32_MAX)
        return datai_fail(error, error_size, "%s: vocab_size %zu is out of range 1..%d", o->source, o->vocab_size,
                          INT32_MAX);
    if (o->seq_len < 1 || o->seq_len > 1 << 28)
        return datai_fail(error, error_size, "%s: seq_len %zu is out of range 1..%d", o->source, o->seq_len, 1 << 28);
    if (!(o->val_fraction >= 0 && o->val_fraction < 1))
        return datai_fail(error, error_size, "%s: val_fraction %g is not in 0..1, below 1", o->source, o->val_fraction);
    if (o->bos_token < -1 || (o->bos_token >= 0 && (unsigned long)o->bos_token >= o->vocab_size))
        return datai_fail(error, error_size, "%s: bos_token %ld is neither -1 nor below vocab_size %zu", o->source,
                          o->bos_token, o->vocab_size);
    return true;
}

data_stream *data_open(const data_options *options, char *error, size_t error_size) {
    if (!datai_check_options(options, error, error_size)) return NULL;
    data_stream *s = calloc(1, sizeof *s);
    char *source = strdup(options->source);
    if (!s || !source) {
        free(s);
        free(source);
        datai_fail(error, error_size, "%s: out of memory", options->source);
        return NULL;
    }
    s->options = *options;
    s->options.source = source;
    s->fd = -1;
    bool generator = !strncmp(source, "gen:", strlen("gen:"));
    if (generator ? datai_open_generator(s, error, error_size) : datai_open_file(s, error, error_size)) return s;
    data_close(s);
    return NULL;
}

void data_close(data_stream *stream) {
    if (!stream) return;
    if (stream->type && stream->type->close) stream->type->close(&stream->generator);
    if (stream->fd >= 0) close(stream->fd);
    if (stream->tokenizer != stream->options.opened) data_tokenizer_close(stream->tokenizer);
    arrfree(stream->points);
    free(stream->jsonl_buffer);
    free(stream->bytes);
    free((char *)stream->options.source);
    free(stream);
}

uint64_t data_windows(const data_stream *stream, data_part part) {
    return stream->windows[part];
}

bool data_window(data_stream *stream, data_part part, uint64_t index, int32_t *inputs, int32_t *targets, char *error,
                 size_t error_size) {
    const data_options *o = &stream->options;
    uint64_t count = stream->windows[part];
    if (part == DATA_VAL && index >= count)
        return datai_fail(error, error_size, "%s: held-out window %" PRIu64 " was asked for, there are %" PRIu64,
                          o->source, index, count);
    uint64_t epoch = index / count, window = index % count;
    if (part == DATA_TRAIN && o->shuffle && count != DATA_ENDLESS) window = data_permute(window, count, o->seed, epoch);
    if (!stream->type)
        return datai_file_window(stream, part == DATA_VAL ? stream->windows[DATA_TRAIN] + window : window, inputs,
                                 targets, error, error_size);
    return stream->type->window(stream, part, window, inputs, targets) ||
           datai_fail(error, error_size, "%s: out of memory", o->source);
}

size_t data_questions(const data_stream *stream, const int32_t *inputs, int32_t *question) {
    if (!stream->type || !stream->type->retrieval) return 0;
    return data_retrieval_questions((int32_t)stream->generator.vocab, stream->options.seq_len, inputs, question);
}

bool data_entropy(data_stream *stream, data_part part, uint64_t first, uint64_t count, double *actual, double *expected,
                  char *error, size_t error_size) {
    *actual = *expected = NAN;
    if (!stream->type || count == 0) return true;
    size_t T = stream->options.seq_len;
    int32_t *inputs = malloc(2 * T * sizeof *inputs);
    if (!inputs) return datai_fail(error, error_size, "%s: out of memory", stream->options.source);
    int32_t *targets = inputs + T;
    double actual_sum = 0, expected_sum = 0;
    bool good = true;
    for (uint64_t i = 0; i < count && good; i++) {
        double a = 0, e = 0;
        good = data_window(stream, part, first + i, inputs, targets, error, error_size);
        if (good && !stream->type->loss(stream, inputs, targets, &a, &e))
            good = datai_fail(error, error_size, "%s: out of memory", stream->options.source);
        actual_sum += a;
        expected_sum += e;
    }
    free(inputs);
    if (!good) return false;
    *actual = actual_sum / (double)count;
    *expected = expected_sum / (double)count;
    return true;
}

data_tokenizer *data_stream_tokenizer(const data_stream *stream) {
    return stream->tokenizer;
}

static void datai_byte_label(int32_t byte, char *text, size_t text_size) {
    if (byte == '\n')
        snprintf(text, text_size, "\\n");
    else if (byte == '\t')
        snprintf(text, text_size, "\\t");
    else
        snprintf(text, text_size, byte >= 0x20 && byte < 0x7F ? "%c" : "\\x%02X", (int)byte);
}

const char *data_token_text(const data_stream *stream, int32_t token, char *text, size_t text_size) {
    if (stream->options.bos_token >= 0 && token == stream->options.bos_token)
        snprintf(text, text_size, "<s>");
    else if (stream->type)
        stream->type->label(&stream->generator, token, text, text_size);
    else if (stream->tokenizer)
        data_tokenizer_label(stream->tokenizer, token, text, text_size);
    else if (stream->width == 1 && token >= 0 && token <= 0xFF)
        datai_byte_label(token, text, text_size);
    else
        snprintf(text, text_size, "%" PRId32, token);
    return text;
}

void data_print_sources(FILE *out) {
    for (size_t i = 0; i < DATAI_ENDING_COUNT; i++)
        fprintf(out, "  FILE%-8s %s\n", datai_endings[i].ending, datai_endings[i].meaning);
    for (size_t i = 0; i < DATAI_GENERATOR_COUNT; i++) {
        const datai_generator_type *type = &datai_generators[i];
        fprintf(out, "  gen:%s,key=value,...  %s\n", type->name, type->meaning);
        for (size_t k = 0; k < type->key_count; k++) {
            const datai_key *key = &type->keys[k];
            char setting[32];
            if (key->usual < key->low)
                snprintf(setting, sizeof setting, "%s=", key->name);
            else
                snprintf(setting, sizeof setting, "%s=%g", key->name, key->usual);
            fprintf(out, "      %-20s %s\n", setting, key->meaning);
        }
    }
}

#endif
