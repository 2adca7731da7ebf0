/* drivers/analyze/analysis.h - what every mode of analyze stands on: its options, the models that it is given, the
 * tokens that they read. A new option is one line of ANALYSIS_OPTIONS; a new mode one line of ANALYSIS_MODES and a
 * header of its own.
 *
 *     analysis a = {0};
 *     if (!parse_options(&a, argc, argv) || !add_models(&a)) puts(a.failure);    // and a.exit_code
 *
 * Needs common.h, gated_attention.h, gated_attention_x86.h, device.h, data.h, figures.h, report.h and stb_ds before it.
 */
#ifndef DRIVERS_ANALYSIS_H
#define DRIVERS_ANALYSIS_H

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <time.h>

/* What analyze does: X(mode, option that asks for it, function). Without any such option, COMPARE. */
#define ANALYSIS_MODES(X)               \
    X(COMPARE, models, compare)         \
    X(PROMPT, prompt, prompt_models)    \
    X(DESCRIBE, describe, describe_all) \
    X(EVALUATE, eval, evaluate)         \
    X(DOMAINS, domains, domains)

/* The one list of options: X(kind, modes, name, default, lowest, highest, argument, meaning). modes: those that the option
 * goes with. kinds: TEXT, SIZE, REAL, SEED, FLAG, and LIST, which takes all arguments up to the next option. */
/* clang-format off */
#define ANALYSIS_OPTIONS(X)                                                                                            \
    X(LIST, ANY, models, NULL, 0, 0, "NAME:DIR", "checkpoints or runs of ./train; several are compared; NAME: may be left out") \
    X(TEXT, ANY, data, NULL, 0, 0, "SOURCE", "tokens; without it those the first model was held out from")             \
    X(TEXT, COMPARE, part, NULL, 0, 0, "PART", "all, train or val of SOURCE; default: all of a file, val of a generator") \
    X(SIZE, COMPARE | DOMAINS, num_samples, 0, 1, 1e9, "N", "windows; default 64, or all; all of a domain")            \
    X(SIZE, ANY, seq_len, 0, 1, 16777216, "T", "tokens in a window; default: the models' smallest max_seq_len")        \
    X(TEXT, COMPARE, lengths, NULL, 0, 0, "1k,2k,...", "also accuracy, loss by position and sinks in windows of these lengths") \
    X(REAL, ANY, rope_base, 0, 1, 1e12, "BASE", "base of RoPE in place of the models' own")                             \
    X(REAL, ANY, rope_factor, 0, 1, 1e6, "F", "YaRN by this factor from the models' own length; 1: none")               \
    X(TEXT, ANY, output, NULL, 0, 0, "DIR", "where the report goes; default: reports/<names>")                         \
    X(SIZE, COMPARE | DOMAINS, batch_size, 0, 1, 65536, "B", "windows computed at once; default: about 4096 tokens")             \
    X(TEXT, ANY, device, "auto", 0, 0, "DEVICE", "auto, cpu or cuda")                                                  \
    X(SIZE, ANY, threads, 0, 1, 4096, "N", "OpenMP threads; default: all cores")                                       \
    X(TEXT, ANY, weights, "auto", 0, 0, "HOW", "loaded, mapped (one layer in memory), auto: mapped above 4 GB of float32") \
    X(FLAG, COMPARE, interventions, 0, 0, 0, "", "also the loss with gate scores replaced, heads silenced, ...")          \
    X(TEXT, PROMPT, prompt, NULL, 0, 0, "TEXT", "goes on from TEXT instead of comparing")                              \
    X(SIZE, PROMPT, generate, 64, 0, 1e6, "N", "tokens to generate")                                                   \
    X(REAL, PROMPT, temperature, 0.8, 0, 100, "X", "of the draws; 0: always the most likely token")                    \
    X(SIZE, PROMPT, top_k, 0, 0, 1e9, "K", "draw among the K most likely; 0: all")                                     \
    X(REAL, PROMPT, top_p, 1, 0, 1, "P", "draw among the most likely with P in sum")                                   \
    X(SEED, ANY, seed, 1, 0, 0, "S", "of the draws, and of what a generator of data draws; default: 1, or the run's")  \
    X(FLAG, PROMPT, figures, 0, 0, 0, "", "F-Attn and mean gate score beside each generated token")                    \
    X(FLAG, PROMPT, maps, 0, 0, 0, "", "draw the attention maps of the prompt")                                        \
    X(TEXT, PROMPT, layers, NULL, 0, 0, "L,L,...", "layers of --maps, from 0; default: four of them")                  \
    X(LIST, DESCRIBE, describe, NULL, 0, 0, "DIR", "says what checkpoints hold and what they cost")                    \
    X(LIST, EVALUATE, eval, NULL, 0, 0, "FILE.jsonl", "multiple choice by log-likelihood (drivers/analyze/evaluate.h); several files")\
    X(TEXT, EVALUATE, eval_form, "cloze", 0, 0, "FORM", "cloze: the choices' texts are scored; letters: their letters")\
    X(SIZE, EVALUATE, shots, 0, 0, 1000, "N", "answered questions before each; not scored themselves")                 \
    X(TEXT, EVALUATE, shots_from, NULL, 0, 0, "FILE", "where they come from; default: the file's first")         \
    X(TEXT, EVALUATE, description, NULL, 0, 0, "TEXT", "stands before everything")                                     \
    X(LIST, DOMAINS, domains, NULL, 0, 0, "FILE", "perplexity of each file, a domain: .txt .jsonl .u16 .u32 .bin")     \
    X(FLAG, ANY, help, 0, 0, 0, "", "this text")
/* clang-format on */

enum {
#define X(mode, option, function) ANALYSIS_INDEX_##mode,
    ANALYSIS_MODES(X)
#undef X
        ANALYSIS_MODE_COUNT
};
enum {
#define X(mode, option, function) mode = 1 << ANALYSIS_INDEX_##mode,
    ANALYSIS_MODES(X)
#undef X
        ANY = (1 << ANALYSIS_MODE_COUNT) - 1
};

typedef struct {
#define OPTION_TEXT                                             const char *
#define OPTION_LIST                                             const char **
#define OPTION_SIZE                                             size_t
#define OPTION_REAL                                             double
#define OPTION_SEED                                             uint64_t
#define OPTION_FLAG                                             bool
#define X(kind, modes, name, def, low, high, argument, meaning) OPTION_##kind name;
    ANALYSIS_OPTIONS(X)
#undef X
#define X(kind, modes, name, def, low, high, argument, meaning) bool has_##name;
    ANALYSIS_OPTIONS(X)
#undef X
} options;

typedef struct {
    options options;
    int mode; /* COMPARE, ... */
    report report;
    char **texts;  /* stb_ds array: what is freed at the end */
    bool has_run;  /* the first model's run has a config.cfg */
    ga_config run; /* its keys, else the defaults */
    device_choice device;
    data_stream *stream;
    data_part part;
    data_tokenizer *tokenizer; /* of the model last asked for; NULL: it has none */
    const char *tokenizer_of;  /* where it was read from */
    size_t *lengths;           /* stb_ds array: --lengths */
    int exit_code;
    char failure[2048];
} analysis;

/* ---- small things ------------------------------------------------------------------------------------------------ */

/* fail(a, exit_code, format, ...): notes why the program ends, which main prints, and is false. A macro, since a static
 * analyser does not look into a function of variable arguments: it would take "false" for "perhaps". */
#define fail(...) (note_failure(__VA_ARGS__), false)

GAI_PRINTF(3, 4) static void note_failure(analysis *a, int exit_code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(a->failure, sizeof a->failure, format, arguments);
    va_end(arguments);
    a->exit_code = exit_code;
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

/* Left-aligned by characters, not bytes. */
static void print_padded(const char *text, size_t width) {
    size_t characters = 0;
    for (const char *c = text; *c; c++) characters += ((unsigned char)*c & 0xC0) != 0x80;
    printf("%s%*s", text, characters < width ? (int)(width - characters) : 0, "");
}

/* ---- the command line -------------------------------------------------------------------------------------------- */

static void print_help(void) {
    printf(
        "usage: ./analyze --models NAME:DIR [NAME:DIR ...] --data SOURCE [options]\n"
        "       ./analyze --models NAME:DIR --prompt TEXT [options]\n"
        "       ./analyze --models NAME:DIR --eval FILE.jsonl [FILE.jsonl ...] [options]\n"
        "       ./analyze --models NAME:DIR --domains FILE [FILE ...] [options]\n"
        "       ./analyze --describe DIR [DIR ...]\n\n"
        "Measures attention sinks (F-Attn), massive activations (M-Act), gate scores and loss of models on the same\n"
        "tokens, and writes summary.json, report.html and figures. DIR is a checkpoint or a run of ./train.\n\n");
#define X(kind, modes, name, def, low, high, argument, meaning)                                               \
    printf("  --%s%s%-*s %s\n", #name, *argument ? " " : "", (int)(20 - strlen(#name) - (*argument ? 1 : 0)), \
           argument, meaning);
    ANALYSIS_OPTIONS(X)
#undef X
    printf("\n"
           "A model of bytes, or with a tokenizer.json, takes TEXT as it is; "
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
#define SET_LIST(field, low, high) (arrput(o->field, value), true)
#define SET_SIZE(field, low, high) read_size(value, low, high, &o->field)
#define SET_REAL(field, low, high) read_real(value, low, high, &o->field)
#define SET_SEED(field, low, high) read_seed(value, &o->field)
#define SET_FLAG(field, low, high) (o->field = true)
#define X(kind, modes, field, def, low, high, argument, meaning)                                  \
    if (strcmp(name, #field) == 0) {                                                              \
        if (*argument && !value) return fail(a, 2, "--%s needs %s", #field, argument);            \
        if (!SET_##kind(field, low, high))                                                        \
            return fail(a, 2, "--%s %s: not a value that it takes (%s)", #field, value, meaning); \
        o->has_##field = true;                                                                    \
        return true;                                                                              \
    }
    ANALYSIS_OPTIONS(X)
#undef X
    const char *nearest = "models";
#define X(kind, modes, field, def, low, high, argument, meaning) \
    if (gai_edits(name, #field) < gai_edits(name, nearest)) nearest = #field;
    ANALYSIS_OPTIONS(X)
#undef X
    if (gai_edits(name, nearest) <= strlen(name) / 4)
        return fail(a, 2, "unknown option --%s; is it --%s? (see --help)", name, nearest);
    return fail(a, 2, "unknown option --%s (see --help)", name);
}

/* How many of the arguments behind the option are its own. */
static int count_values(const char *name, int count, char **arguments) {
    enum { TEXT = 1, SIZE = 1, REAL = 1, SEED = 1, FLAG = 0, LIST = INT_MAX };
    int most = 0, n = 0;
#define X(kind, modes, field, def, low, high, argument, meaning) \
    if (strcmp(name, #field) == 0) most = kind;
    ANALYSIS_OPTIONS(X)
#undef X
    while (n < most && n < count && (most == 1 || strncmp(arguments[n], "--", 2))) n++;
    return n;
}

/* The option that asks for one of these modes. */
static const char *asking_option(int modes) {
#define X(mode, option, function) \
    if (modes & (mode)) return #option;
    ANALYSIS_MODES(X)
#undef X
    return "";
}

/* What was asked for, and whether all options go with it. */
static bool choose_mode(analysis *a) {
    const options *o = &a->options;
#define X(name, option, function) \
    if (o->has_##option) a->mode = (name);
    ANALYSIS_MODES(X)
#undef X
#define X(kind, modes, field, def, low, high, argument, meaning)                                    \
    if (o->has_##field && !((modes)&a->mode))                                                       \
        return a->mode == COMPARE ? fail(a, 2, "--%s goes with --%s", #field, asking_option(modes)) \
                                  : fail(a, 2, "--%s does not go with --%s", #field, asking_option(a->mode));
    ANALYSIS_OPTIONS(X)
#undef X
    return true;
}

static void free_lists(options *o) {
#define FREE_TEXT(field)
#define FREE_LIST(field) arrfree(o->field);
#define FREE_SIZE(field)
#define FREE_REAL(field)
#define FREE_SEED(field)
#define FREE_FLAG(field)
#define X(kind, modes, field, def, low, high, argument, meaning) FREE_##kind(field)
    ANALYSIS_OPTIONS(X)
#undef X
}

static bool parse_options(analysis *a, int argc, char **argv) {
    a->options = (options){
#define X(kind, modes, name, def, low, high, argument, meaning) .name = def,
        ANALYSIS_OPTIONS(X)
#undef X
    };
    for (int i = 1; i < argc;) {
        const char *argument = strcmp(argv[i], "-h") ? argv[i] : "--help";
        i++;
        if (strncmp(argument, "--", 2)) return fail(a, 2, "%s: not an option (see --help)", argument);
        const char *equals = strchr(argument, '=');
        const char *name = keep_text(a, "%.*s", equals ? (int)(equals - argument - 2) : 256, argument + 2);
        int values = equals ? 0 : count_values(name, argc - i, argv + i);
        if (values == 0 && !set_option(a, name, equals ? equals + 1 : NULL)) return false;
        for (; values > 0; values--)
            if (!set_option(a, name, argv[i++])) return false;
    }
    const options *o = &a->options;
    if (o->help) return true;
    if (arrlenu(o->models) == 0 && !o->has_describe) return fail(a, 2, "--models NAME:DIR is missing (see --help)");
    if (strcmp(o->weights, "auto") && strcmp(o->weights, "loaded") && strcmp(o->weights, "mapped"))
        return fail(a, 2, "--weights %s: it is loaded, mapped or auto", o->weights);
    if (o->part && strcmp(o->part, "all") && strcmp(o->part, "train") && strcmp(o->part, "val"))
        return fail(a, 2, "--part %s: it is all, train or val", o->part);
    return choose_mode(a);
}

/* ---- models ------------------------------------------------------------------------------------------------------ */

/* Whether anything has this name, be it a pipe or a link to nowhere. */
static bool has_entry(analysis *a, const char *directory, const char *name) {
    struct stat s;
    return lstat(keep_text(a, "%s/%s", directory, name), &s) == 0;
}

/* The checkpoint in a directory: itself, or of a run `best`, else `last`. Where its files are no files, reading them says
 * so. */
static bool find_checkpoint(analysis *a, report_model *m, const char *directory) {
    static const char *const places[] = {"", "/best", "/last"};
    for (size_t i = 0; i < 3; i++) {
        const char *path = keep_text(a, "%s%s", directory, places[i]);
        bool weights = has_entry(a, path, "model.safetensors") || has_entry(a, path, "model.safetensors.index.json");
        if (!weights || !has_entry(a, path, "config.json")) continue;
        m->directory = path;
        return true;
    }
    if (!gai_exists(directory)) return fail(a, 1, "there is no %s", directory);
    if (has_entry(a, directory, "pytorch_model.bin"))
        return fail(a, 1,
                    "%s has its weights as pytorch_model.bin, which is not read: save_pretrained(..., "
                    "safe_serialization=True) writes model.safetensors",
                    directory);
    return fail(a, 1, "%s is not a checkpoint (no config.json with model.safetensors, in best or last neither)",
                directory);
}

/* The gate, and what a model has in its place or beside it. */
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
    bool gate = c->gate_position != GA_NO_GATE;
    size_t used = strlen(text);
    if (gate && c->gate_input_dims > 0)
        used += (size_t)snprintf(text + used, 128 - used, ", first %zu channels", c->gate_input_dims);
    const char *separator = gate ? "; " : "";
    if (!gate && (c->switch_heads != GA_SWITCH_NONE || c->attention_sink != GA_SINK_NONE)) used = 0;
    if (c->switch_heads != GA_SWITCH_NONE) {
        used += (size_t)snprintf(text + used, 128 - used, "%sswitch %s, %zutop%zu", separator,
                                 c->switch_heads == GA_SWITCH_KV ? "kv" : "v", c->switch_experts, c->switch_top_k);
        separator = "; ";
    }
    if (c->attention_sink != GA_SINK_NONE)
        snprintf(text + used, 128 - used, "%s%s sink logit", separator,
                 c->attention_sink == GA_SINK_LEARNED ? "learned" : "fixed");
}

/* "runs/gated/best/": "gated", which tells more than best or last. */
static const char *name_of_directory(analysis *a, const char *directory) {
    char *path = (char *)keep_text(a, "%s", directory), *slash;
    for (;; *slash = 0) {
        while ((slash = strrchr(path, '/')) && !slash[1]) *slash = 0;
        const char *name = slash ? slash + 1 : path;
        if (!slash || (strcmp(name, "best") && strcmp(name, "last"))) return name;
    }
}

/* NAME:DIR, or DIR. The name goes into JSON, HTML and, made safe, into file names. */
static bool add_model(analysis *a, const char *argument) {
    const char *colon = strchr(argument, ':'), *directory = colon ? colon + 1 : argument;
    const char *name =
        colon ? keep_text(a, "%.*s", (int)(colon - argument), argument) : name_of_directory(a, directory);
    if (!*name || !*directory)
        return fail(a, 2, "--models %s: expected NAME:DIR, such as mine:checkpoints/quick", argument);
    report_model m = {.name = name};
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
    if (!find_checkpoint(a, &m, directory)) return false;
    if (data_tokenizer_exists(m.directory)) m.tokenizer = m.directory;
    ga_error e;
    m.config = ga_config_default();
    if (ga_load_config(&m.config, m.directory, false, &e)) return fail(a, 1, "%s: %s", m.name, e.text);
    m.trained_rope_base = m.config.rope_base;
    if (a->options.has_rope_base) m.config.rope_base = a->options.rope_base;
    if (a->options.has_rope_factor) {
        m.config.rope_factor = a->options.rope_factor;
        if (m.config.rope_original_length == 0) m.config.rope_original_length = m.config.max_seq_len;
    }
    describe_gate(&m.config, m.gate);
    arrput(a->report.models, m);
    return true;
}

static bool add_models(analysis *a) {
    for (size_t i = 0; i < arrlenu(a->options.models); i++)
        if (!add_model(a, a->options.models[i])) return false;
    const report_model *first = &a->report.models[0];
    size_t *T = &a->report.seq_len;
    *T = a->options.has_seq_len ? a->options.seq_len : first->config.max_seq_len;
    for (size_t i = 0; i < arrlenu(a->report.models); i++) {
        const report_model *m = &a->report.models[i];
        if (!a->options.has_seq_len && m->config.max_seq_len < *T) *T = m->config.max_seq_len;
        if (a->mode == COMPARE && m->config.vocab_size != first->config.vocab_size)
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
        if (!gai_exists(path)) continue;
        ga_error e;
        if (ga_config_load(&a->run, path, &e)) return fail(a, 1, "%s", e.text);
        a->has_run = true;
    }
    return true;
}

/* Weights that would take more than 4 GB as float32 stay in their files, in their own type. */
static ga_mode choose_weights(const analysis *a, const ga_config *c) {
    ga_summary all;
    if (strcmp(a->options.weights, "auto")) return strcmp(a->options.weights, "mapped") ? GA_INFERENCE : GA_MAPPED;
    return !ga_summarize(c, GA_INFERENCE, &all, NULL) && all.weight_bytes > 4e9 ? GA_MAPPED : GA_INFERENCE;
}

/* Weights and activations for batch_size sequences of seq_len tokens. */
static ga_model *load_model(analysis *a, const report_model *m, size_t batch_size, size_t seq_len) {
    ga_config c = m->config;
    c.batch_size = batch_size;
    c.max_seq_len = seq_len;
    ga_error e;
    ga_model *model = ga_open(&c, &a->device.device, choose_weights(a, &c), m->directory, &e);
    if (!model) note_failure(a, 1, "%s: %s", m->name, e.text);
    return model;
}

static bool open_device(analysis *a) {
    ga_config c = ga_config_default();
    ga_error e;
    if (ga_config_set(&c, "device", a->options.device, &e)) return fail(a, 2, "--device: %s", e.text);
    ga_config_set(&c, "use_amp", "off", &e); /* what is measured is measured in float32 */
    return device_open(&a->device, &c, 0, &e) || fail(a, 2, "%s", e.text);
}

/* ---- tokens ------------------------------------------------------------------------------------------------------ */

static bool is_generator(const char *source) {
    return strncmp(source, "gen:", 4) == 0;
}

/* Redrawn on a terminal. */
static void show_progress(const char *what, double share) {
    static double drawn_at;
    if (!isatty(STDERR_FILENO) || (share < 1 && now() - drawn_at < 0.1)) return;
    drawn_at = now();
    fprintf(stderr, share < 1 ? "\r%s %.0f %%" : "\r\033[K", what, 100 * share);
}

/* a->tokenizer becomes the model's own. */
static bool load_tokenizer(analysis *a, const report_model *m) {
    if (a->tokenizer_of == m->tokenizer) return true;
    data_tokenizer_close(a->tokenizer);
    a->tokenizer = NULL;
    a->tokenizer_of = NULL;
    ga_error e;
    if (m->tokenizer && !(a->tokenizer = data_tokenizer_open(m->tokenizer, &e)))
        return fail(a, 1, "%s: %s", m->name, e.text);
    a->tokenizer_of = m->tokenizer;
    return true;
}

/* With --data window i has the inputs [i T, i T + T) of the file as it stands; without, windows are those that training
 * held out. */
static bool open_data(analysis *a, const report_model *m) {
    const options *o = &a->options;
    report *r = &a->report;
    if (!o->data && !a->has_run)
        return fail(a, 2, "--data SOURCE is missing, and %s has no config.cfg that names one", m->directory);
    r->source = o->data ? o->data : keep_text(a, "%s", a->run.data);
    bool held_out = is_generator(r->source) || (!o->data && a->run.val_fraction > 0);
    const char *part = o->part ? o->part : held_out ? "val" : "all";
    a->part = strcmp(part, "val") == 0 ? DATA_VAL : DATA_TRAIN;
    if (!load_tokenizer(a, m)) return false;
    data_options d = {.source = r->source,
                      .tokenizer = m->tokenizer,
                      .opened = a->tokenizer,
                      .progress = show_progress,
                      .vocab_size = m->config.vocab_size,
                      .seq_len = r->seq_len,
                      .val_fraction = strcmp(part, "all") == 0 ? 0 : a->run.val_fraction,
                      .seed = o->has_seed ? o->seed : a->run.seed,
                      .bos_token = o->data ? -1 : a->run.bos_token};
    char text[1024];
    a->stream = data_open(&d, text, sizeof text);
    if (!a->stream && !o->data && !is_generator(r->source) && !gai_exists(r->source))
        return fail(a, 1, "%s was trained on %s, which is not to be found from here: --data names what to read",
                    m->name, r->source);
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
    if (m->tokenizer) return false;
    if (a->has_run) return ends_with(a->run.data, ".txt") || ends_with(a->run.data, ".jsonl");
    return m->config.vocab_size >= 256 && m->config.vocab_size <= 320;
}

/* Models that are compared on a file read it as the same tokens: their tokenizers are the same. */
static bool check_tokenizers(analysis *a) {
    const report *r = &a->report;
    const char *source = a->options.data ? a->options.data : a->run.data, *name = NULL;
    uint64_t first = 0;
    for (size_t i = 0; i < arrlenu(r->models) && !is_generator(source); i++) {
        if (!load_tokenizer(a, &r->models[i])) return false;
        if (!a->tokenizer) continue;
        if (name && data_tokenizer_hash(a->tokenizer) != first)
            return fail(a, 1, "%s and %s have different tokenizers: they cannot read the same tokens", name,
                        r->models[i].name);
        name = r->models[i].name;
        first = data_tokenizer_hash(a->tokenizer);
    }
    return true;
}

/* Appends the tokens of a text, without special tokens, to an stb_ds array: by the model's tokenizer, or its bytes. */
static bool encode_text(analysis *a, const report_model *m, const char *text, size_t n, int32_t **tokens) {
    ga_error e;
    if (!load_tokenizer(a, m)) return false;
    if (a->tokenizer)
        return data_tokenizer_encode(a->tokenizer, text, n, false, tokens, &e) == GA_OK ||
               fail(a, 1, "%s: %s", m->name, e.text);
    if (!reads_bytes(a, m))
        return fail(a, 1, "%s: %s has no tokenizer.json, and its %zu tokens are no bytes: it cannot read text", m->name,
                    m->directory, m->config.vocab_size);
    for (size_t i = 0; i < n; i++) arrput(*tokens, (unsigned char)text[i]);
    return true;
}

static const char *label_token(const analysis *a, const report_model *m, int32_t token, char label[DATA_LABEL_SIZE]) {
    bool generated = a->stream && a->report.source && is_generator(a->report.source);
    if (a->tokenizer && !generated) return data_tokenizer_label(a->tokenizer, token, label, DATA_LABEL_SIZE);
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

/* A file that is named twice would be one key of the results twice. */
static bool are_different(analysis *a, const char *option, const char **files) {
    for (size_t i = 0; i < arrlenu(files); i++)
        for (size_t k = 0; k < i; k++)
            if (strcmp(files[i], files[k]) == 0) return fail(a, 2, "--%s names %s twice", option, files[i]);
    return true;
}

/* ---- what is printed and where it goes ---------------------------------------------------------------------------- */

static void print_number(int width, const char *format, double x, bool absent) {
    char text[64];
    snprintf(text, sizeof text, format, x);
    printf("  %*s", width, absent ? "-" : text);
}

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

#endif
