/* analyze.c - measures trained models: attention sinks, massive activations, gate scores, loss.
 *
 *     ./analyze --models NAME:DIR [NAME:DIR ...] --data SOURCE [...]      compares models on the same tokens
 *     ./analyze --models NAME:DIR --prompt TEXT [--generate N] [--maps]   goes on from a prompt
 *
 * DIR is a checkpoint (config.json, model.safetensors) or a run of train, of which `best` is taken, else `last`.
 * A comparison prints a table and leaves in --output
 *
 *     summary.json    every figure, an object by model name
 *     report.html     the same with pictures, beside the paper's own figures; needs no network
 *     figures/        each picture as SVG, its data as CSV, and the gnuplot script that draws it
 *
 * Exit codes: 0 done, 1 a failure, 2 wrong usage, the last two with one line on stderr.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#define STB_DS_IMPLEMENTATION
#include <stb/stb_ds.h>
#define DATA_IMPLEMENTATION
#include "data/data.h"
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_x86.h"
#include "data/figures.h"
#include "data/report.h"

/* The one list of options: X(kind, name, default, lowest, highest, argument, meaning). */
#define OPTIONS(X)                                                                                               \
    X(TEXT, data, NULL, 0, 0, "SOURCE", "tokens; without it those the first model was held out from")            \
    X(TEXT, part, NULL, 0, 0, "PART", "all, train or val of SOURCE; default: all of a file, val of a generator") \
    X(SIZE, num_samples, 0, 1, 1e9, "N", "windows; default 64, or all where there are fewer")                    \
    X(SIZE, seq_len, 0, 1, 16777216, "T", "tokens in a window; default: the models' smallest max_seq_len")       \
    X(TEXT, output, NULL, 0, 0, "DIR", "where the report goes; default: reports/<names>")                        \
    X(SIZE, batch_size, 0, 1, 65536, "B", "windows computed at once; default: about 4096 tokens")                \
    X(SIZE, threads, 0, 1, 4096, "N", "OpenMP threads; default: all cores")                                      \
    X(TEXT, prompt, NULL, 0, 0, "TEXT", "goes on from TEXT instead of comparing")                                \
    X(SIZE, generate, 64, 0, 1e6, "N", "tokens to generate")                                                     \
    X(REAL, temperature, 0.8, 0, 100, "X", "of the draws; 0: always the most likely token")                      \
    X(SIZE, top_k, 0, 0, 1e9, "K", "draw among the K most likely; 0: all")                                       \
    X(REAL, top_p, 1, 0, 1, "P", "draw among the most likely with P in sum")                                     \
    X(SEED, seed, 1, 0, 0, "S", "of the draws, and of what a generator of data draws; default: 1, or the run's") \
    X(FLAG, maps, 0, 0, 0, "", "draw the attention maps of the prompt")                                          \
    X(FLAG, help, 0, 0, 0, "", "this text")

typedef struct {
#define OPTION_TEXT                                      const char *
#define OPTION_SIZE                                      size_t
#define OPTION_REAL                                      double
#define OPTION_SEED                                      uint64_t
#define OPTION_FLAG                                      bool
#define X(kind, name, def, low, high, argument, meaning) OPTION_##kind name;
    OPTIONS(X)
#undef X
#define X(kind, name, def, low, high, argument, meaning) bool has_##name;
    OPTIONS(X)
#undef X
} options;

typedef struct {
    options options;
    report report;
    const char **models; /* stb_ds array: NAME:DIR as given */
    char **texts;        /* stb_ds array: what is freed at the end */
    bool has_run;        /* the first model's run has a config.cfg */
    ga_config run;       /* its keys, else the defaults */
    ga_device device;
    data_stream *stream;
    data_part part;
    int exit_code;
    char failure[2048];
} analysis;

/* ---- small things ------------------------------------------------------------------------------------------------ */

/* Notes why the program ends; main prints it. */
static bool fail(analysis *a, int exit_code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(a->failure, sizeof a->failure, format, arguments);
    va_end(arguments);
    a->exit_code = exit_code;
    return false;
}

static const char *keep_text(analysis *a, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    char *text = malloc((size_t)length + 1);
    if (!text) abort();
    va_start(arguments, format);
    vsnprintf(text, (size_t)length + 1, format, arguments);
    va_end(arguments);
    arrput(a->texts, text);
    return text;
}

static bool exists(const char *path) {
    struct stat status;
    return stat(path, &status) == 0;
}

static bool ends_with(const char *text, const char *ending) {
    size_t n = strlen(text), k = strlen(ending);
    return n >= k && strcmp(text + n - k, ending) == 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the command line -------------------------------------------------------------------------------------------- */

static void print_help(void) {
    printf(
        "usage: ./analyze --models NAME:DIR [NAME:DIR ...] --data SOURCE [options]\n"
        "       ./analyze --models NAME:DIR --prompt TEXT [options]\n\n"
        "Measures attention sinks (F-Attn), massive activations (M-Act), gate scores and loss of models on the same\n"
        "tokens, and writes summary.json, report.html and figures. DIR is a checkpoint or a run of ./train.\n\n");
#define X(kind, name, def, low, high, argument, meaning)                                                      \
    printf("  --%s%s%-*s %s\n", #name, *argument ? " " : "", (int)(20 - strlen(#name) - (*argument ? 1 : 0)), \
           argument, meaning);
    OPTIONS(X)
#undef X
    printf("\n"
           "A model of bytes (trained on .txt or .jsonl, or with a vocabulary of 256 to 320) takes TEXT as it is; "
           "others take\ntoken numbers or the labels of their generator: --prompt \"<s> t17 t4 T0\".\n\n"
           "SOURCE is one of\n");
    data_print_sources(stdout);
}

static bool read_size(const char *text, double low, double high, size_t *value) {
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    *value = (size_t)n;
    return *text >= '0' && *text <= '9' && *end == 0 && errno == 0 && (double)n >= low && (double)n <= high;
}

static bool read_seed(const char *text, uint64_t *value) {
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && *end == 0 && errno == 0;
}

static bool read_real(const char *text, double low, double high, double *value) {
    char *end;
    *value = strtod(text, &end);
    return *text && *end == 0 && *value >= low && *value <= high;
}

/* Sets the option `name` (without --); value NULL: none is given. */
static bool set_option(analysis *a, const char *name, const char *value) {
    options *o = &a->options;
#define SET_TEXT(field, low, high) (o->field = value, true)
#define SET_SIZE(field, low, high) read_size(value, low, high, &o->field)
#define SET_REAL(field, low, high) read_real(value, low, high, &o->field)
#define SET_SEED(field, low, high) read_seed(value, &o->field)
#define SET_FLAG(field, low, high) (o->field = true)
#define X(kind, field, def, low, high, argument, meaning)                                         \
    if (strcmp(name, #field) == 0) {                                                              \
        if (*argument && !value) return fail(a, 2, "--%s needs %s", #field, argument);            \
        if (!SET_##kind(field, low, high))                                                        \
            return fail(a, 2, "--%s %s: not a value that it takes (%s)", #field, value, meaning); \
        o->has_##field = true;                                                                    \
        return true;                                                                              \
    }
    OPTIONS(X)
#undef X
    return fail(a, 2, "unknown option --%s (see --help)", name);
}

static bool takes_value(const char *name) {
#define X(kind, field, def, low, high, argument, meaning) \
    if (strcmp(name, #field) == 0) return *argument;
    OPTIONS(X)
#undef X
    return false;
}

static bool parse_options(analysis *a, int argc, char **argv) {
    a->options = (options){
#define X(kind, name, def, low, high, argument, meaning) .name = def,
        OPTIONS(X)
#undef X
    };
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--models") == 0) {
            while (i + 1 < argc && strncmp(argv[i + 1], "--", 2)) arrput(a->models, argv[++i]);
            continue;
        }
        if (strcmp(argv[i], "-h") == 0) argv[i] = "--help";
        if (strncmp(argv[i], "--", 2)) return fail(a, 2, "%s: not an option (see --help)", argv[i]);
        const char *equals = strchr(argv[i], '=');
        const char *name = keep_text(a, "%.*s", equals ? (int)(equals - argv[i] - 2) : 256, argv[i] + 2);
        const char *value = equals ? equals + 1 : takes_value(name) && i + 1 < argc ? argv[++i] : NULL;
        if (!set_option(a, name, value)) return false;
    }
    const options *o = &a->options;
    if (o->help) return true;
    if (arrlenu(a->models) == 0) return fail(a, 2, "--models NAME:DIR is missing (see --help)");
    if (o->part && strcmp(o->part, "all") && strcmp(o->part, "train") && strcmp(o->part, "val"))
        return fail(a, 2, "--part %s: it is all, train or val", o->part);
    if (!o->prompt && (o->has_generate || o->maps))
        return fail(a, 2, "--%s goes with --prompt", o->maps ? "maps" : "generate");
    if (o->prompt && (o->has_num_samples || o->has_part))
        return fail(a, 2, "--%s does not go with --prompt", o->has_part ? "part" : "num_samples");
    return true;
}

/* ---- models ------------------------------------------------------------------------------------------------------ */

/* The checkpoint in a directory: itself, or of a run `best`, else `last`. */
static bool find_checkpoint(analysis *a, report_model *m, const char *directory) {
    static const char *const places[] = {"", "/best", "/last"};
    for (size_t i = 0; i < 3; i++) {
        const char *path = keep_text(a, "%s%s", directory, places[i]);
        if (!ga_checkpoint_exists(path, false)) continue;
        m->directory = path;
        return true;
    }
    if (!exists(directory)) return fail(a, 1, "%s: there is no %s", m->name, directory);
    return fail(a, 1, "%s: %s is not a checkpoint (no config.json with model.safetensors, in best or last neither)",
                m->name, directory);
}

/* "G1 elementwise sigmoid", and what differs from the default of Eq. 5. */
static void describe_gate(const ga_config *c, char text[128]) {
    char position[16], type[16], activation[16]; /* the longest words of these keys have 11 bytes */
    ga_config_get(c, "gate_position", position, sizeof position);
    ga_config_get(c, "gate_type", type, sizeof type);
    ga_config_get(c, "gate_activation", activation, sizeof activation);
    if (c->gate_position == GA_NO_GATE)
        snprintf(text, 128, "none");
    else if (c->gate_form == GA_SELF)
        snprintf(text, 128, "%s %s of the output itself", position, activation);
    else if (c->gate_input == GA_INPUT_SCALAR)
        snprintf(text, 128, "%s learned scalar %s", position, activation);
    else
        snprintf(text, 128, "%s %s %s%s%s%s%s", position, type, activation,
                 c->gate_sharing == GA_SHARED ? ", head-shared" : "", c->gate_form == GA_ADDITIVE ? ", additive" : "",
                 c->gate_input == GA_INPUT_NONE ? ", input-independent" : "", c->gate_frozen ? ", frozen" : "");
}

/* NAME:DIR. The name goes into JSON, HTML and, made safe, into file names. */
static bool add_model(analysis *a, const char *argument) {
    const char *colon = strchr(argument, ':');
    if (!colon || colon == argument || !colon[1]) return fail(a, 2, "--models %s: expected NAME:DIR", argument);
    report_model m = {.name = keep_text(a, "%.*s", (int)(colon - argument), argument)};
    size_t length = strlen(m.name);
    if (length >= 48) return fail(a, 2, "--models %s: the name has %zu bytes, more than 47", argument, length);
    for (const char *c = m.name; *c; c += report_utf8(c))
        if (report_utf8(c) == 0 || (unsigned char)*c < ' ' || *c == 127)
            return fail(a, 2, "--models %s: the name is not plain text in UTF-8", argument);
    for (size_t i = 0; i <= length; i++)
        m.file[i] = !m.name[i] || strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-+.", m.name[i])
                        ? m.name[i]
                        : '_';
    for (size_t i = 0; i < arrlenu(a->report.models); i++) {
        const report_model *other = &a->report.models[i];
        if (strcmp(m.name, other->name) == 0) return fail(a, 2, "two models are named %s", m.name);
        if (strcmp(m.file, other->file) == 0)
            return fail(a, 2, "the names %s and %s would give files the same name", other->name, m.name);
    }
    if (!find_checkpoint(a, &m, colon + 1)) return false;
    ga_error e;
    m.config = ga_config_default();
    if (ga_load_config(&m.config, m.directory, false, &e)) return fail(a, 1, "%s: %s", m.name, e.text);
    describe_gate(&m.config, m.gate);
    arrput(a->report.models, m);
    return true;
}

static bool add_models(analysis *a) {
    for (size_t i = 0; i < arrlenu(a->models); i++)
        if (!add_model(a, a->models[i])) return false;
    const report_model *first = &a->report.models[0];
    size_t *T = &a->report.seq_len;
    *T = a->options.has_seq_len ? a->options.seq_len : first->config.max_seq_len;
    for (size_t i = 0; i < arrlenu(a->report.models); i++) {
        const report_model *m = &a->report.models[i];
        if (!a->options.has_seq_len && m->config.max_seq_len < *T) *T = m->config.max_seq_len;
        if (!a->options.prompt && m->config.vocab_size != first->config.vocab_size)
            return fail(a, 1, "%s has a vocabulary of %zu, but %s one of %zu: they cannot read the same tokens",
                        m->name, m->config.vocab_size, first->name, first->config.vocab_size);
    }
    return true;
}

/* config.cfg of the run that a model's checkpoint belongs to. */
static bool load_run(analysis *a, const report_model *m) {
    a->run = ga_config_default();
    a->has_run = false;
    static const char *const places[] = {"/..", ""};
    for (size_t i = 0; i < 2 && !a->has_run; i++) {
        const char *path = keep_text(a, "%s%s/config.cfg", m->directory, places[i]);
        if (!exists(path)) continue;
        ga_error e;
        if (ga_config_load(&a->run, path, &e)) return fail(a, 1, "%s", e.text);
        a->has_run = true;
    }
    return true;
}

/* Weights and activations for batch_size sequences of seq_len tokens. */
static ga_model *load_model(analysis *a, const report_model *m, size_t batch_size, size_t seq_len) {
    ga_config c = m->config;
    c.batch_size = batch_size;
    c.max_seq_len = seq_len;
    ga_error e;
    ga_model *model = ga_create(&c, &a->device, GA_INFERENCE, &e);
    if (!model) return fail(a, 1, "%s: %s", m->name, e.text), NULL;
    if (ga_load(model, m->directory, NULL, &e) == GA_OK) return model;
    fail(a, 1, "%s: %s", m->name, e.text);
    ga_destroy(model);
    return NULL;
}

/* ---- tokens ------------------------------------------------------------------------------------------------------ */

static bool is_generator(const char *source) {
    return strncmp(source, "gen:", 4) == 0;
}

/* With --data window i has the inputs [i T, i T + T) of the file as it stands; without, windows are those that training
 * held out. */
static bool open_data(analysis *a) {
    const options *o = &a->options;
    report *r = &a->report;
    if (!o->data && !a->has_run)
        return fail(a, 2, "--data SOURCE is missing, and %s has no config.cfg that names one", r->models[0].directory);
    r->source = o->data ? o->data : keep_text(a, "%s", a->run.data);
    bool held_out = is_generator(r->source) || (!o->data && a->run.val_fraction > 0);
    const char *part = o->part ? o->part : held_out ? "val" : "all";
    a->part = strcmp(part, "val") == 0 ? DATA_VAL : DATA_TRAIN;
    data_options d = {.source = r->source,
                      .vocab_size = r->models[0].config.vocab_size,
                      .seq_len = r->seq_len,
                      .val_fraction = strcmp(part, "all") == 0 ? 0 : a->run.val_fraction,
                      .seed = o->has_seed ? o->seed : a->run.seed,
                      .bos_token = o->data ? -1 : a->run.bos_token};
    char text[1024];
    a->stream = data_open(&d, text, sizeof text);
    if (!a->stream) return fail(a, 1, "%s", text);
    r->part = is_generator(r->source) ? (a->part == DATA_VAL ? "fresh sequences" : "its training sequences")
              : a->part == DATA_VAL   ? "the held-out windows"
              : d.val_fraction > 0    ? "its training windows"
              : a->has_run && strcmp(r->source, a->run.data) == 0 ? "from its beginning, so windows of the training too"
                                                                  : "from its beginning";
    uint64_t windows = data_windows(a->stream, a->part);
    r->samples = o->has_num_samples ? o->num_samples : windows < 64 ? (size_t)windows : 64;
    if (windows == 0)
        return fail(a, 1, "%s: nothing is held out (val_fraction 0); --part all takes the whole of it", r->source);
    if (r->samples > windows)
        return fail(a, 1, "%s: has %" PRIu64 " windows of %zu tokens, fewer than --num_samples %zu", r->source, windows,
                    r->seq_len, r->samples);
    double expected;
    if (!data_entropy(a->stream, a->part, 0, r->samples, &r->lowest_loss, &expected, text, sizeof text))
        return fail(a, 1, "%s", text);
    return true;
}

/* A model without a run, or whose data is gone, is known by its vocabulary. */
static bool reads_bytes(const analysis *a, const report_model *m) {
    if (a->has_run) return ends_with(a->run.data, ".txt") || ends_with(a->run.data, ".jsonl");
    return m->config.vocab_size >= 256 && m->config.vocab_size <= 320;
}

static const char *label_token(const analysis *a, const report_model *m, int32_t token, char label[DATA_LABEL_SIZE]) {
    if (a->stream) return data_token_text(a->stream, token, label, DATA_LABEL_SIZE);
    bool printable = reads_bytes(a, m) && token >= ' ' && token < 127;
    snprintf(label, DATA_LABEL_SIZE, printable ? "%c" : "%" PRId32, (int)token);
    return label;
}

/* Labels of the first positions of a window, for the maps. */
static bool label_tokens(analysis *a, const report_model *m, const int32_t *tokens) {
    report *r = &a->report;
    free(r->labels);
    r->labels = malloc(r->map_len * sizeof *r->labels);
    if (!r->labels) return fail(a, 1, "out of memory");
    for (size_t t = 0; t < r->map_len; t++) label_token(a, m, tokens[t], r->labels[t]);
    return true;
}

/* ---- measuring --------------------------------------------------------------------------------------------------- */

typedef struct {
    ga_model *model;
    size_t batch_size;
    int32_t *tokens, *targets; /* (batch_size, T) */
    ga_real *losses;           /* (batch_size, T) */
    ga_map *maps;              /* (L), each (M, M) */
} measuring;

static void free_measuring(measuring *w) {
    for (size_t l = 0; w->maps && l < w->model->sizes.L; l++) free(w->maps[l].p);
    free(w->maps);
    free(w->tokens);
    free(w->losses);
}

static bool allocate_measuring(analysis *a, measuring *w, report_model *m) {
    report *r = &a->report;
    size_t L = w->model->sizes.L, M = r->map_len, rows = w->batch_size * r->seq_len;
    w->tokens = malloc(2 * rows * sizeof *w->tokens);
    w->targets = w->tokens + rows;
    w->losses = malloc(rows * sizeof *w->losses);
    w->maps = calloc(L, sizeof *w->maps);
    m->statistics = ga_statistics_create(w->model);
    m->window_losses = malloc(r->samples * sizeof *m->window_losses);
    m->maps = malloc(L * M * M * sizeof *m->maps);
    m->window_maps = malloc(L * M * M * sizeof *m->window_maps);
    bool good = w->tokens && w->losses && w->maps && m->statistics && m->window_losses && m->maps && m->window_maps;
    for (size_t l = 0; good && l < L; l++) {
        w->maps[l] = (ga_map){.layer = l, .head = GA_ALL, .T = M, .p = calloc(M * M, sizeof(double))};
        good = w->maps[l].p != NULL;
    }
    return good || fail(a, 1, "%s: out of memory", m->name);
}

static bool read_windows(analysis *a, measuring *w, size_t first, size_t count) {
    char text[1024];
    for (size_t i = 0; i < count; i++)
        if (!data_window(a->stream, a->part, first + i, w->tokens + i * a->report.seq_len,
                         w->targets + i * a->report.seq_len, text, sizeof text))
            return fail(a, 1, "%s", text);
    return true;
}

/* Loss and statistics of `count` windows. */
static bool measure_windows(analysis *a, measuring *w, report_model *m, size_t first, size_t count) {
    size_t T = a->report.seq_len;
    ga_observer observer = {.statistics = m->statistics};
    ga_error e;
    if (ga_forward(w->model, w->tokens, w->targets, count, T, &observer, NULL, &e))
        return fail(a, 1, "%s: %s", m->name, e.text);
    w->model->device.copy_out(w->model->device.state, w->losses, w->model->losses, count * T * sizeof *w->losses);
    for (size_t i = 0; i < count; i++) {
        double sum = 0;
        for (size_t t = 0; t < T; t++) sum += (double)w->losses[i * T + t];
        m->window_losses[first + i] = sum / (double)T;
        m->loss += m->window_losses[first + i] / (double)a->report.samples;
    }
    return true;
}

/* Adds the maps of `count` windows. Attention is causal, so the first M positions of a window have the maps that they
 * have within the whole of it. */
static bool map_windows(analysis *a, measuring *w, const report_model *m, size_t count) {
    size_t M = a->report.map_len, T = a->report.seq_len;
    for (size_t i = 1; i < count; i++) memmove(w->tokens + i * M, w->tokens + i * T, M * sizeof *w->tokens);
    ga_observer observer = {.maps = w->maps, .n_maps = w->model->sizes.L};
    ga_error e;
    if (ga_forward(w->model, w->tokens, NULL, count, M, &observer, NULL, &e))
        return fail(a, 1, "%s: %s", m->name, e.text);
    return true;
}

static void copy_maps(const measuring *w, double *maps, size_t M) {
    for (size_t l = 0; l < w->model->sizes.L; l++)
        for (size_t i = 0; i < M * M; i++) maps[l * M * M + i] = w->maps[l].p[i] / w->maps[l].windows;
}

static bool measure_model(analysis *a, report_model *m) {
    report *r = &a->report;
    size_t most = a->options.has_batch_size ? a->options.batch_size : r->seq_len < 4096 ? 4096 / r->seq_len : 1;
    measuring w = {.batch_size = most < r->samples ? most : r->samples};
    w.model = load_model(a, m, w.batch_size, r->seq_len);
    if (!w.model) return false;
    m->parameters = w.model->n_weights;
    bool good = allocate_measuring(a, &w, m), terminal = isatty(STDERR_FILENO);
    /* The first window goes alone, for its own maps. */
    for (size_t i = 0, count = 1; good && i < r->samples; i += count, count = w.batch_size) {
        if (count > r->samples - i) count = r->samples - i;
        good = read_windows(a, &w, i, count) && measure_windows(a, &w, m, i, count);
        if (good && i == 0 && !r->labels) good = label_tokens(a, m, w.tokens);
        good = good && map_windows(a, &w, m, count);
        if (good && i == 0) copy_maps(&w, m->window_maps, r->map_len);
        if (terminal) fprintf(stderr, "\r%s: %zu of %zu windows ", m->name, i + count, r->samples);
    }
    if (terminal) fprintf(stderr, "\r\033[K");
    if (good) copy_maps(&w, m->maps, r->map_len);
    free_measuring(&w);
    ga_destroy(w.model);
    return good;
}

/* ---- what is printed --------------------------------------------------------------------------------------------- */

static void print_number(int width, const char *format, double x, bool absent) {
    char text[64];
    snprintf(text, sizeof text, format, x);
    printf("  %*s", width, absent ? "-" : text);
}

/* Left-aligned by characters, not bytes. */
static void print_padded(const char *text, size_t width) {
    size_t characters = 0;
    for (const char *c = text; *c; c++) characters += ((unsigned char)*c & 0xC0) != 0x80;
    printf("%s%*s", text, characters < width ? (int)(width - characters) : 0, "");
}

static void print_table(const report *r) {
    size_t name_width = 12, gate_width = strlen("G1 input-independent sigmoid");
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        if (strlen(r->models[i].name) > name_width) name_width = strlen(r->models[i].name);
        if (strlen(r->models[i].gate) > gate_width) gate_width = strlen(r->models[i].gate);
    }
    printf("\n%zu windows of %zu tokens of %s (%s)\n", r->samples, r->seq_len, r->source, r->part);
    printf("even attention: F-Attn %.2f %%", 100 * ga_f_attn_uniform(r->seq_len));
    if (isfinite(r->lowest_loss)) printf("; lowest loss that can be reached: %.4f", r->lowest_loss);
    printf("\n\n%-*s  %12s  %-*s  %8s  %8s  %7s  %13s  %7s  %9s  %9s\n", (int)name_width, "model", "parameters",
           (int)gate_width, "gate", "loss", "ppl", "F-Attn", "largest layer", "M-Act", "gate mean", "below 0.1");
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        const report_model *m = &r->models[i];
        const ga_statistics *s = m->statistics;
        size_t sink = report_sink_layer(m);
        char largest[64];
        snprintf(largest, sizeof largest, "%.1f %% (%zu)", 100 * ga_f_attn(s, sink), sink);
        print_padded(m->name, name_width);
        printf("  %12zu  ", m->parameters);
        print_padded(m->gate, gate_width);
        printf("  %8.4f  %8.4g  %5.1f %%  %13s  %7.4g", m->loss, exp(m->loss), 100 * ga_f_attn(s, GA_ALL), largest,
               ga_m_act(s, GA_ALL));
        print_number(9, "%.3f", ga_gate_mean(s, GA_ALL), !s->has_gate);
        print_number(9, "%.1f %%", 100 * ga_gate_below(s, GA_ALL, 0.1), !s->has_gate);
        printf("\n");
    }
    printf("\nthe paper, Table 4 (15B mixture of experts, 400B tokens)\n");
    for (size_t i = 0; i < REPORT_TABLE_4_ROWS; i++) {
        const report_table_4_row *row = &report_table_4[i];
        char gate[96];
        snprintf(gate, sizeof gate, i ? "%s %s" : "none", row->method, row->activation);
        printf("%-*s  %12s  %-*s  %8s  %8.3f  %5.1f %%  %13s  %7.0f", (int)name_width, i ? "" : "baseline", "",
               (int)gate_width, gate, "-", row->ppl, 100 * row->f_attn, "-", row->m_act);
        print_number(9, "%.3f", row->gate_mean, isnan(row->gate_mean));
        printf("  %9s\n", "-");
    }
    size_t base = report_baseline(r);
    for (size_t i = 0; i < arrlenu(r->models) && r->samples > 1; i++) {
        if (i == base) continue;
        double difference, error;
        report_loss_difference(r, base, i, &difference, &error);
        printf("\n%s against %s: loss %+.4f +- %.4f (standard error over the windows)", r->models[i].name,
               r->models[base].name, difference, error);
    }
    printf("\n");
}

/* ---- comparing --------------------------------------------------------------------------------------------------- */

static bool choose_output(analysis *a) {
    const char *names = "reports/";
    for (size_t i = 0; i < arrlenu(a->report.models); i++)
        names = keep_text(a, "%s%s%s", names, i ? "-" : "", a->report.models[i].file);
    a->report.directory = a->options.output ? a->options.output : names;
    return report_make_directory(&a->report, a->report.directory) || fail(a, 1, "%s", a->report.error);
}

static void print_figures(const report *r) {
    if (!r->has_gnuplot)
        printf("gnuplot was not found: the figures are not drawn (data and scripts are in %s/figures)\n", r->directory);
    for (size_t i = 0; r->has_gnuplot && i < arrlenu(r->figures); i++)
        if (!r->figures[i].drawn)
            printf("gnuplot failed on %s/figures/%s.gp: see %s.log beside it\n", r->directory, r->figures[i].stem,
                   r->figures[i].stem);
}

static bool compare(analysis *a) {
    report *r = &a->report;
    if (!load_run(a, &r->models[0]) || !open_data(a) || !choose_output(a)) return false;
    r->map_len = r->seq_len < FIGURE_MAP ? r->seq_len : FIGURE_MAP;
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        printf("%s: %s\n", r->models[i].name, r->models[i].directory);
        fflush(stdout);
        if (!measure_model(a, &r->models[i])) return false;
        report_read_curves(&r->models[i]);
    }
    print_table(r);
    if (!report_write_summary(r) || !figures_write(r) || !report_write_html(r)) return fail(a, 1, "%s", r->error);
    print_figures(r);
    printf("report: %s/report.html, numbers: %s/summary.json\n", r->directory, r->directory);
    return true;
}

/* ---- prompts ----------------------------------------------------------------------------------------------------- */

/* A word of the prompt: a token's number, or its label. */
static int32_t find_token(const analysis *a, const char *word, size_t vocab_size) {
    size_t number;
    if (read_size(word, 0, (double)vocab_size - 1, &number)) return (int32_t)number;
    char label[DATA_LABEL_SIZE];
    for (size_t t = 0; a->stream && t < vocab_size; t++)
        if (strcmp(data_token_text(a->stream, (int32_t)t, label, sizeof label), word) == 0) return (int32_t)t;
    return -1;
}

/* The prompt as tokens, an stb_ds array; a run's first token opens it. */
static bool read_prompt(analysis *a, const report_model *m, int32_t **tokens) {
    const char *prompt = a->options.prompt;
    if (a->has_run && a->run.bos_token >= 0) arrput(*tokens, (int32_t)a->run.bos_token);
    if (reads_bytes(a, m)) {
        for (; *prompt; prompt++) arrput(*tokens, (unsigned char)*prompt);
    } else {
        for (prompt += strspn(prompt, " ,\t\n"); *prompt; prompt += strspn(prompt, " ,\t\n")) {
            size_t length = strcspn(prompt, " ,\t\n");
            const char *word = keep_text(a, "%.*s", (int)(length < 64 ? length : 64), prompt);
            int32_t token = find_token(a, word, m->config.vocab_size);
            if (token < 0)
                return fail(a, 1, "--prompt: \"%s\" is no token of %s, which reads numbers below %zu%s", word, m->name,
                            m->config.vocab_size, a->stream ? " and labels like <s> or t17" : "");
            arrput(*tokens, token);
            prompt += length;
        }
    }
    return arrlenu(*tokens) > 0 || fail(a, 1, "--prompt is empty");
}

/* Bytes as they are, but for those that would steer a terminal; other tokens by their labels. */
static void print_token(const analysis *a, const report_model *m, int32_t token) {
    char label[DATA_LABEL_SIZE];
    if (reads_bytes(a, m) && token < 256 && ((token >= ' ' && token != 127) || token == '\n' || token == '\t'))
        putchar(token);
    else
        printf(reads_bytes(a, m) ? "%s" : "%s ", label_token(a, m, token, label));
    fflush(stdout);
}

static bool generate(analysis *a, const report_model *m, ga_model *model, const int32_t *prompt, size_t length) {
    const options *o = &a->options;
    ga_sampling sampling = {o->temperature, o->top_k, o->top_p};
    uint64_t random = o->seed;
    ga_error e;
    ga_generator *g = ga_generator_create(model, length + o->generate, &e);
    if (!g) return fail(a, 1, "%s: %s", m->name, e.text);
    ga_real *logits = malloc(m->config.vocab_size * sizeof *logits);
    bool good = logits || fail(a, 1, "%s: out of memory", m->name);
    double start = now(), fed = start;
    for (size_t i = 0; good && i < o->generate; i++) {
        int32_t token = 0;
        if (i > 0) token = ga_sample(logits, m->config.vocab_size, sampling, &random);
        if (i > 0) print_token(a, m, token);
        good = !ga_generator_feed(g, i ? &token : prompt, i ? 1 : length, logits, &e) ||
               fail(a, 1, "%s: %s", m->name, e.text);
        if (i == 0) fed = now();
    }
    if (good) print_token(a, m, ga_sample(logits, m->config.vocab_size, sampling, &random));
    printf("\n");
    if (good && o->generate > 1)
        fprintf(stderr, "%zu tokens, %.1f a second; prompt of %zu in %.3f s\n", o->generate,
                (double)(o->generate - 1) / (now() - fed), length, fed - start);
    free(logits);
    ga_generator_destroy(g);
    return good;
}

static bool map_prompt(analysis *a, report_model *m, ga_model *model, const int32_t *prompt, size_t length) {
    enum { LONGEST = 128 };
    report *r = &a->report;
    r->map_len = r->seq_len = length < LONGEST ? length : LONGEST;
    r->samples = 1;
    measuring w = {.model = model, .batch_size = 1};
    bool good = allocate_measuring(a, &w, m) && label_tokens(a, m, prompt);
    if (good) {
        memcpy(w.tokens, prompt, r->map_len * sizeof *prompt);
        good = map_windows(a, &w, m, 1);
    }
    if (good) copy_maps(&w, m->window_maps, r->map_len);
    free_measuring(&w);
    if (!good || !choose_output(a)) return false;
    if (!figures_write_prompt(r, m)) return fail(a, 1, "%s", r->error);
    print_figures(r);
    if (r->has_gnuplot) printf("maps of %s: %s/figures/prompt_maps_%s.svg\n", m->name, r->directory, m->file);
    if (length > LONGEST) printf("(of the first %d tokens of %zu)\n", LONGEST, length);
    return true;
}

static bool prompt_model(analysis *a, report_model *m) {
    options *o = &a->options;
    if (!load_run(a, m)) return false;
    data_options d = {.source = o->data ? o->data : a->run.data,
                      .vocab_size = m->config.vocab_size,
                      .seq_len = 1,
                      .seed = a->run.seed,
                      .bos_token = a->has_run ? a->run.bos_token : -1};
    char text[1024];
    data_close(a->stream);
    a->stream = o->data || a->has_run ? data_open(&d, text, sizeof text) : NULL; /* for labels; numbers will do */
    if (o->data && !a->stream) return fail(a, 1, "%s", text);
    if (o->maps && !o->has_generate) o->generate = 0;
    int32_t *tokens = NULL;
    ga_model *model = NULL;
    bool good = read_prompt(a, m, &tokens);
    size_t length = arrlenu(tokens), needed = length + o->generate;
    size_t longest = o->has_seq_len ? o->seq_len : m->config.max_seq_len;
    if (good && needed > longest)
        good = fail(a, 1, "%s: %zu tokens of the prompt and %zu to generate are more than its %zu positions%s", m->name,
                    length, o->generate, longest, o->has_seq_len ? "" : " (--seq_len raises them)");
    if (good) good = (model = load_model(a, m, 1, needed)) != NULL;
    if (good && arrlenu(a->models) > 1) printf("%s: %s\n", m->name, m->directory);
    if (good && o->generate > 0) {
        for (size_t i = 0; i < length; i++) print_token(a, m, tokens[i]);
        good = generate(a, m, model, tokens, length);
    }
    if (good && o->maps) good = map_prompt(a, m, model, tokens, length);
    ga_destroy(model);
    arrfree(tokens);
    return good;
}

static bool prompt_models(analysis *a) {
    for (size_t i = 0; i < arrlenu(a->report.models); i++)
        if (!prompt_model(a, &a->report.models[i])) return false;
    return true;
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

static void free_analysis(analysis *a) {
    report *r = &a->report;
    if (a->device.name) ga_device_x86_destroy(&a->device);
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        report_model *m = &r->models[i];
        ga_statistics_destroy(m->statistics);
        free(m->window_losses);
        free(m->maps);
        free(m->window_maps);
        arrfree(m->training);
        arrfree(m->held_out);
        arrfree(m->f_attn);
    }
    arrfree(r->models);
    arrfree(r->figures);
    free(r->labels);
    data_close(a->stream);
    for (size_t i = 0; i < arrlenu(a->texts); i++) free(a->texts[i]);
    arrfree(a->texts);
    arrfree(a->models);
}

static bool run_all(analysis *a, int argc, char **argv) {
    if (!parse_options(a, argc, argv)) return false;
    if (a->options.help) {
        print_help();
        return true;
    }
#ifdef _OPENMP
    if (a->options.has_threads) omp_set_num_threads((int)a->options.threads);
#endif
    ga_x86_settings settings = {NULL, false}; /* what is measured is measured in float32 */
    ga_error e;
    if (ga_device_x86(&a->device, settings, &e)) return fail(a, 2, "%s", e.text);
    return add_models(a) && (a->options.prompt ? prompt_models(a) : compare(a));
}

/* Whatever a name holds, the failure is one line. */
static void print_failure(char *text) {
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    fprintf(stderr, "analyze: %s\n", text);
}

int main(int argc, char **argv) {
    static analysis a;
    bool done = run_all(&a, argc, argv);
    if (fflush(stdout) != 0 && done) done = fail(&a, 1, "cannot write the output: %s", strerror(errno));
    if (!done) print_failure(a.failure);
    free_analysis(&a);
    return done ? 0 : a.exit_code;
}
