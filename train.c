/* train.c - trains a gated transformer as a configuration file says.
 *
 *     ./train CONFIG.cfg [key=value ...] [--help] [--dry-run] [--fresh] [--profile]
 *
 * A run lives in output_dir, by default checkpoints/<name of the configuration file>:
 *
 *     config.cfg      every key as it was resolved
 *     metrics.jsonl   one object a step; locked while a trainer writes the run
 *     last/           the newest checkpoint, with all that is needed to go on
 *     best/           the checkpoint of the lowest held-out loss
 *
 * Training window i is a function of the configuration and of i alone, checkpoints stand between two steps, and every
 * sum has a fixed order. So a run that was stopped or killed goes on from `last` bit for bit as if it had never been.
 *
 * Exit codes: 0 done or stopped by a signal, 1 a failure, 2 wrong usage, the last two with one line on stderr.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <dirent.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#define STB_DS_IMPLEMENTATION
#include <stb/stb_ds.h>
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#define DATA_IMPLEMENTATION
#include "data/data.h"
#include "drivers/common.h"
#include "drivers/spikes.h"
#include "data/vocabulary.h"
#include "gated_attention_x86.h"
#if defined(GA_CUDA) || defined(GA_CUDA_LIBRARY)
#include "gated_attention_cuda.cuh"
#endif
#include "drivers/device.h"
#include "drivers/routing.h"

enum { PATH_SIZE = GA_TEXT + 64, SAMPLE_PROMPT = 8 };

typedef struct {
    const char *config_path;
    bool help, dry_run, fresh, profile;
} command_line;

/* What one step tells; NaN where there is nothing to tell. */
typedef struct {
    double loss, learning_rate, grad_norm, tokens_per_s, val_loss;
    bool diverged;
} measurement;

typedef struct {
    bool terminal;                               /* a bar is redrawn, else lines are printed */
    bool drawn;                                  /* a bar stands on the screen */
    double drawn_at;                             /* time of the last redrawing */
    measurement latest;                          /* each figure as it was last known */
    double f_attn, sink_share, m_act, gate_mean; /* of the training micro-batch last looked at */
    routing routing;                             /* of the latest step */
} progress;

typedef struct {
    ga_config config;
    ga_summary cost;
    char directory[PATH_SIZE], last[PATH_SIZE], best[PATH_SIZE], config_copy[PATH_SIZE], metrics_path[PATH_SIZE];

    char tokenizer[PATH_SIZE]; /* of a text; empty: its bytes are tokens */
    data_stream *stream;
    uint64_t steps;         /* of the whole run */
    uint64_t epoch_windows; /* the stream's first windows that every epoch repeats; 0: the stream's own epochs */
    uint64_t val_windows;   /* seen by an evaluation; 0: none */
    double lowest_loss;     /* that can be reached on them; NaN where nobody knows */

    device_choice device;
    ga_model *model;
    ga_statistics *live, *held_out; /* of the latest training micro-batch looked at; of the latest evaluation */
    int32_t *inputs, *targets;      /* (batch_size, T) */
    FILE *metrics;
    ga_training_state state;
    spikes spikes; /* of the whole run */
    bool saved;    /* `last` holds saved_step */
    uint64_t saved_step;

    progress progress;
    double started;      /* time at which this process began to train */
    uint64_t first_step; /* steps done before it did */
    double step_seconds; /* spent in steps, without evaluations and checkpoints */

    ga_error error; /* of the library's latest call */
    int exit_code;
    char failure[2 * PATH_SIZE + 1024];
} run;

static const measurement nothing_measured = {NAN, NAN, NAN, NAN, NAN, false};
static const double MOST_TOKENS = 1e18; /* of a run: counts of them fit 64 bits */

static volatile sig_atomic_t stop_requested;

/* ---- small things ------------------------------------------------------------------------------------------------- */

/* Notes why the run ends; main prints it. */
static bool fail(run *r, int exit_code, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(r->failure, sizeof r->failure, format, list);
    va_end(list);
    r->exit_code = exit_code;
    return false;
}

static bool fail_library(run *r) {
    return fail(r, r->error.result == GA_ERR_CONFIG ? 2 : 1, "%s", r->error.text);
}

static const char *scaled(double x, const char *unit, char text[32]) {
    static const char *const prefixes[] = {"", "k", "M", "G", "T", "P", "E", "Z", "Y"};
    size_t i = 0;
    for (; x >= 1000 && i + 1 < sizeof prefixes / sizeof prefixes[0]; i++) x /= 1000;
    snprintf(text, 32, "%.3g %s%s", x, prefixes[i], unit);
    return text;
}

static const char *duration(double seconds, char text[32]) {
    if (!(seconds < 1e12))
        snprintf(text, 32, "?");
    else if (seconds < 100)
        snprintf(text, 32, "%.0f s", seconds);
    else if (seconds < 6000)
        snprintf(text, 32, "%.0f min %02.0f s", floor(seconds / 60), floor(fmod(seconds, 60)));
    else if (seconds < 48 * 3600.0)
        snprintf(text, 32, "%.0f h %02.0f min", floor(seconds / 3600), floor(fmod(seconds, 3600) / 60));
    else if (seconds < 730 * 86400.0)
        snprintf(text, 32, "%.1f days", seconds / 86400);
    else
        snprintf(text, 32, "%.1f years", seconds / (365.25 * 86400));
    return text;
}

#define GROUPED(n)        grouped((n), (char[32]){0})
#define SCALED(x, unit)   scaled((x), (unit), (char[32]){0})
#define BYTES(n)          SCALED((double)(n), "B")
#define DURATION(seconds) duration((seconds), (char[32]){0})

static size_t thread_count(const ga_config *c) {
#ifdef _OPENMP
    return c->threads ? c->threads : (size_t)omp_get_max_threads();
#else
    (void)c;
    return 1;
#endif
}

static uint64_t step_tokens(const ga_config *c) {
    return (uint64_t)c->batch_size * c->gradient_accumulation_steps * c->max_seq_len;
}

/* ---- the command line --------------------------------------------------------------------------------------------- */

static void print_help(void) {
    printf("usage: ./train CONFIG.cfg [key=value ...] [--help] [--dry-run] [--fresh] [--profile]\n"
           "\n"
           "Trains as CONFIG.cfg (lines `key = value`) says, with the keys that are given replaced.\n"
           "The same command goes on with a run that was stopped; Ctrl-C saves and stops.\n"
           "\n"
           "  --dry-run  parameters, memory, FLOP per token and an estimate of the time; trains nothing\n"
           "  --fresh    starts over: removes this run's checkpoints and metrics\n"
           "  --profile  at the end, the share of time by operator, tokens per second and peak memory\n");
    ga_config c = ga_config_default();
    ga_key key;
    const char *group = "";
    for (size_t i = 0; ga_config_key(i, &key); i++) {
        char value[GA_TEXT];
        ga_config_get(&c, key.name, value, sizeof value);
        if (strcmp(group, key.group)) printf("\n%s\n", key.group);
        group = key.group;
        printf("  %-28s %-14s %s%s%s%s\n", key.name, value, key.meaning, *key.choices ? " [" : "", key.choices,
               *key.choices ? "]" : "");
    }
    printf("\n");
    data_print_sources(stdout);
}

static bool parse_options(run *r, int argc, char **argv, command_line *a) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)
            a->help = true;
        else if (strcmp(argv[i], "--dry-run") == 0)
            a->dry_run = true;
        else if (strcmp(argv[i], "--fresh") == 0)
            a->fresh = true;
        else if (strcmp(argv[i], "--profile") == 0)
            a->profile = true;
        else if (argv[i][0] == '-')
            return fail(r, 2, "unknown option %s; ./train --help lists them", argv[i]);
        else if (!a->config_path)
            a->config_path = argv[i];
        else if (!strchr(argv[i], '='))
            return fail(r, 2, "%s is not key=value, and the configuration is %s already", argv[i], a->config_path);
    }
    return true;
}

static bool set_keys(run *r, int argc, char **argv, const command_line *a) {
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] == '-' || argv[i] == a->config_path) continue;
        char key[64];
        const char *equals = strchr(argv[i], '=');
        snprintf(key, sizeof key, "%.*s", (int)(equals - argv[i]), argv[i]);
        if (ga_config_set(&r->config, key, equals + 1, &r->error)) return fail_library(r);
    }
    return true;
}

static bool name_run(run *r, const char *config_path) {
    ga_config *c = &r->config;
    if (!*c->output_dir) {
        const char *slash = strrchr(config_path, '/'), *name = slash ? slash + 1 : config_path;
        size_t length = strlen(name) - (ends_with(name, ".cfg") ? 4 : 0);
        if (length == 0 || length > GA_TEXT - 16)
            return fail(r, 2, "%s gives a run no name: set output_dir", config_path);
        snprintf(c->output_dir, sizeof c->output_dir, "checkpoints/%.*s", (int)length, name);
    }
    snprintf(r->directory, sizeof r->directory, "%s", c->output_dir);
    snprintf(r->last, sizeof r->last, "%s/last", c->output_dir);
    snprintf(r->best, sizeof r->best, "%s/best", c->output_dir);
    snprintf(r->config_copy, sizeof r->config_copy, "%s/config.cfg", c->output_dir);
    snprintf(r->metrics_path, sizeof r->metrics_path, "%s/metrics.jsonl", c->output_dir);
    return true;
}

/* A checkpoint that is trained on reads text as it did before. */
static void choose_tokenizer(run *r) {
    const ga_config *c = &r->config;
    bool inherited = !*c->tokenizer && *c->init_from && data_tokenizer_exists(c->init_from);
    const char *chosen = inherited ? c->init_from : c->tokenizer;
    if (strcmp(chosen, "train") == 0)
        snprintf(r->tokenizer, sizeof r->tokenizer, "%s/%s", c->output_dir, DATA_TOKENIZER_FILE);
    else
        snprintf(r->tokenizer, sizeof r->tokenizer, "%s", strcmp(chosen, "bytes") ? chosen : "");
}

/* With init_from, the model's keys that the configuration does not set are the checkpoint's (but for max_seq_len, and for
 * the gate where that has none): those of `last` once the run has begun. */
static bool take_model_keys(run *r, int argc, char **argv, const command_line *a) {
    ga_config *c = &r->config, there = ga_config_default();
    bool begun = !a->fresh && ga_checkpoint_exists(r->last, false);
    if (ga_load_config(&there, begun ? r->last : c->init_from, true, &r->error))
        return fail(r, 1, "init_from: %s", r->error.text);
    *c = ga_config_default();
    ga_key key;
    for (size_t i = 0; ga_config_key(i, &key); i++) {
        char value[GA_TEXT];
        bool gate = strcmp(key.group, "GATE") == 0 && there.gate_position != GA_NO_GATE;
        if (strcmp(key.group, "MODEL") && !gate) continue;
        ga_config_get(&there, key.name, value, sizeof value);
        if (ga_config_set(c, key.name, value, &r->error)) return fail_library(r);
    }
    if (ga_config_load(c, a->config_path, &r->error)) return fail(r, 2, "%s", r->error.text);
    return set_keys(r, argc, argv, a) && name_run(r, a->config_path);
}

static bool configure(run *r, int argc, char **argv, const command_line *a) {
    if (!a->config_path)
        return fail(r, 2, "usage: ./train CONFIG.cfg [key=value ...] [--help] [--dry-run] [--fresh] [--profile]");
    ga_config *c = &r->config;
    *c = ga_config_default();
    if (ga_config_load(c, a->config_path, &r->error)) return fail(r, 2, "%s", r->error.text);
    if (!set_keys(r, argc, argv, a) || !name_run(r, a->config_path)) return false;
    if (*c->init_from && !take_model_keys(r, argc, argv, a)) return false;
    if (ga_config_check(c, &r->error) || ga_summarize(c, GA_TRAINING, &r->cost, &r->error)) return fail_library(r);
    choose_tokenizer(r);
    return true;
}

static bool open_device(run *r) {
#ifdef _OPENMP
    omp_set_num_threads((int)thread_count(&r->config));
#endif
    return device_open(&r->device, &r->config, &r->error) || fail(r, 2, "%s", r->error.text);
}

/* ---- the plan ----------------------------------------------------------------------------------------------------- */

/* Now and then a line, or one that is redrawn. */
static void show_progress(const char *what, double share) {
    static double drawn_at;
    bool terminal = isatty(STDOUT_FILENO), last = share >= 1;
    if (!last && now() - drawn_at < (terminal ? 0.1 : 10)) return;
    drawn_at = now();
    printf("%s%-11s %.0f %%%s", terminal ? "\r" : "", what, 100 * share, terminal && !last ? "" : "\n");
    fflush(stdout);
}

static bool reads_text(const run *r) {
    return ends_with(r->config.data, ".txt") || ends_with(r->config.data, ".jsonl");
}

static bool open_data(run *r) {
    const ga_config *c = &r->config;
    data_options options = {.source = c->data,
                            .tokenizer = r->tokenizer,
                            .progress = show_progress,
                            .vocab_size = c->vocab_size,
                            .seq_len = c->max_seq_len,
                            .val_fraction = c->val_fraction,
                            .shuffle = c->shuffle,
                            .seed = c->seed,
                            .bos_token = c->bos_token};
    char text[512];
    r->stream = data_open(&options, text, sizeof text);
    return r->stream || fail(r, 1, "%s", text);
}

/* An epoch is the stream's first max_tokens, or the whole of it; a run with max_steps follows the stream as it goes on. */
static bool plan_steps(run *r) {
    const ga_config *c = &r->config;
    r->steps = c->max_steps;
    if ((double)c->max_steps * (double)step_tokens(c) > MOST_TOKENS)
        return fail(r, 2, "%zu steps of %" PRIu64 " tokens are too many", c->max_steps, step_tokens(c));
    if (c->max_steps > 0) return true;
    uint64_t windows = r->stream ? data_windows(r->stream, DATA_TRAIN) : DATA_ENDLESS;
    uint64_t wanted = (c->max_tokens + c->max_seq_len - 1) / c->max_seq_len;
    if (wanted == 0 && windows == DATA_ENDLESS)
        return fail(r, 2, "max_tokens = 0 takes all of a file, and %s has no end: set max_tokens or max_steps",
                    c->data);
    double epoch = wanted > 0 ? (double)c->max_tokens : (double)windows * (double)c->max_seq_len;
    if (epoch * (double)c->epochs > MOST_TOKENS)
        return fail(r, 2, "%zu epochs of %g tokens are too many", c->epochs, epoch);
    uint64_t tokens = (wanted > 0 ? c->max_tokens : windows * c->max_seq_len) * c->epochs;
    r->steps = (tokens + step_tokens(c) - 1) / step_tokens(c);
    r->epoch_windows = wanted < windows ? wanted : 0;
    return true;
}

/* Which window of the stream is the i-th of the training. */
static uint64_t training_window(const run *r, uint64_t i) {
    uint64_t n = r->epoch_windows;
    if (n == 0 || i < n) return i;
    return r->config.shuffle ? data_permute(i % n, n, r->config.seed, i / n) : i % n;
}

static bool plan_evaluation(run *r) {
    uint64_t held_out = data_windows(r->stream, DATA_VAL);
    r->val_windows = held_out < r->config.eval_windows ? held_out : r->config.eval_windows;
    r->lowest_loss = NAN;
    if (r->val_windows == 0) return true;
    char text[512];
    double expected;
    return data_entropy(r->stream, DATA_VAL, 0, r->val_windows, &r->lowest_loss, &expected, text, sizeof text) ||
           fail(r, 1, "%s", text);
}

/* ---- what is printed before the first step ------------------------------------------------------------------------ */

static void print_gate(const ga_config *c) {
    static const char *const positions[] = {"none",     "G1 (SDPA output)", "G2 (value)",
                                            "G3 (key)", "G4 (query)",       "G5 (after W_O)"};
    printf("gate        %s", positions[c->gate_position]);
    char activation[32], type[32], sharing[32], form[32];
    ga_config_get(c, "gate_activation", activation, sizeof activation);
    ga_config_get(c, "gate_type", type, sizeof type);
    ga_config_get(c, "gate_sharing", sharing, sizeof sharing);
    ga_config_get(c, "gate_form", form, sizeof form);
    if (c->gate_position != GA_NO_GATE && c->gate_form == GA_SELF)
        printf(", %s of Y itself, without parameters", activation);
    else if (c->gate_position != GA_NO_GATE)
        printf(", %s, head-%s, %s, %s, %s%s", type, sharing, form, activation,
               c->gate_input == GA_INPUT_QUERY  ? "from X"
               : c->gate_input == GA_INPUT_NONE ? "independent of X"
                                                : "one learned number a layer",
               c->gate_frozen ? ", frozen at its random start" : "");
    printf("\n");
}

static void print_model(const run *r) {
    const ga_config *c = &r->config;
    const ga_summary *s = &r->cost;
    printf("model       %zu layers, d_model %zu, %zu query and %zu key-value heads of %zu, d_ff %zu, vocabulary %s\n",
           c->n_layers, c->d_model, c->n_heads, c->n_kv_heads, c->head_dim, c->d_ff, GROUPED(c->vocab_size));
    if (c->n_experts > 0)
        printf("experts     %zu of that d_ff in each layer, %zu for each token, weights %s\n", c->n_experts,
               c->experts_per_token, c->normalize_top_k ? "that add up to 1" : "as the router gives them");
    print_gate(c);
    printf("parameters  %s (embedding %s, gate %s)", GROUPED(s->parameters), GROUPED(s->embedding_parameters),
           GROUPED(s->gate_parameters));
    if (c->n_experts > 0) printf("; %s activated by a token", GROUPED(s->activated_parameters));
    printf("\n");
    const ga_device *d = &r->device.device;
    size_t own = d->own_bytes ? d->own_bytes(d->state, c, GA_TRAINING) : 0;
    printf("memory      %s: weights %s, gradients %s, optimizer %s, activations %s", BYTES(s->total_bytes + own),
           BYTES(s->weight_bytes), BYTES(s->gradient_bytes), BYTES(s->optimizer_bytes), BYTES(s->activation_bytes));
    if (d->own_bytes) printf(", device %s", BYTES(own));
    if (d->free_bytes) printf("; %s are free", BYTES(d->free_bytes(d->state)));
    printf("\n");
    printf("compute     %s a token forward, %s in training\n", SCALED(s->forward_flops, "FLOP"),
           SCALED(s->training_flops, "FLOP"));
    printf("steps       %s of %zu x %zu windows of %zu tokens: %s tokens\n", GROUPED(r->steps),
           c->gradient_accumulation_steps, c->batch_size, c->max_seq_len, GROUPED(r->steps * step_tokens(c)));
}

static void print_device(const run *r) {
    const ga_config *c = &r->config;
    printf("device      %s (%s)", r->device.device.name, r->device.why);
    if (r->device.cuda) {
        printf("\n");
        return;
    }
    printf(", %zu thread%s", thread_count(c), thread_count(c) == 1 ? "" : "s");
#ifdef _OPENMP
    printf(" (%s)\n", c->threads ? "as the key threads says" : "OpenMP's choice");
#else
    printf(" (built without OpenMP)\n");
#endif
}

static void print_data(const run *r) {
    const ga_config *c = &r->config;
    uint64_t windows = data_windows(r->stream, DATA_TRAIN);
    printf("data        %s: ", c->data);
    if (windows == DATA_ENDLESS)
        printf("new windows without end");
    else
        printf("%s windows", GROUPED(windows));
    if (r->epoch_windows > 0) printf(", the first %s in each epoch", GROUPED(r->epoch_windows));
    if (r->val_windows > 0)
        printf("; %s held-out windows evaluated", GROUPED(r->val_windows));
    else
        printf("; nothing is held out, so there are no evaluations and there is no best checkpoint");
    if (!isnan(r->lowest_loss)) printf(", lowest loss there %.4f", r->lowest_loss);
    printf("\n");
}

/* FLOP per second of the device's products at this model's sizes, from about a second of them. Sizes beyond a few
 * thousand are cut: they no longer change the speed, but would need memory. */
static double measure_speed(const run *r) {
    const ga_config *c = &r->config;
    enum { MOST_ROWS = 256, MOST_COLUMNS = 2048 };
    ga_sizes z = ga_sizes_of(c);
    size_t shapes[][2] = {{z.Z, z.C}, {2 * z.F, z.C}, {z.C, z.F}};
    size_t rows = c->batch_size * c->max_seq_len;
    if (rows > MOST_ROWS) rows = MOST_ROWS;
    double flops = 0, seconds = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        size_t O = shapes[i][0] < MOST_COLUMNS ? shapes[i][0] : MOST_COLUMNS;
        size_t I = shapes[i][1] < MOST_COLUMNS ? shapes[i][1] : MOST_COLUMNS;
        const ga_device *d = &r->device.device;
        ga_real *block = d->allocate(d->state, (rows * O + rows * I + O * I) * sizeof *block);
        if (!block) return NAN;
        double begin = now(), spent;
        do {
            d->linear_forward(d->state, block, block + rows * O, block + rows * O + rows * I, rows, O, I);
            if (d->wait) d->wait(d->state);
            flops += 2.0 * (double)rows * (double)O * (double)I;
            spent = now() - begin;
        } while (spent < 0.3);
        seconds += spent;
        d->release(d->state, block);
    }
    return flops / seconds;
}

static bool dry_run(run *r) {
    const ga_config *c = &r->config;
    bool needs_data = c->max_steps == 0 && c->max_tokens == 0;
    if (needs_data && strcmp(c->tokenizer, "train") == 0 && access(r->tokenizer, F_OK) != 0)
        return fail(r, 2,
                    "how long an epoch is will be known when the vocabulary is learned: set max_steps or max_tokens");
    if (needs_data && !open_data(r)) return false;
    if (!plan_steps(r)) return false;
    print_model(r);
    print_device(r);
    double speed = measure_speed(r);
    double tokens = (double)r->steps * (double)step_tokens(c);
    printf("time        about %s on this machine, if all of it ran like its products: %s, %s\n",
           DURATION(tokens * r->cost.training_flops / speed), SCALED(speed, "FLOP/s"),
           SCALED(speed / r->cost.training_flops, "tokens/s"));
    return true;
}

/* ---- the run's directory ------------------------------------------------------------------------------------------ */

static bool make_directory(run *r) {
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s", r->directory);
    for (char *p = path + 1; *p; p++) {
        if (*p != '/') continue;
        *p = 0;
        if (mkdir(path, 0777) && errno != EEXIST) return fail(r, 1, "cannot create %s: %s", path, strerror(errno));
        *p = '/';
    }
    if (mkdir(path, 0777) && errno != EEXIST) return fail(r, 1, "cannot create %s: %s", path, strerror(errno));
    return true;
}

static bool has_checkpoint(const run *r) {
    return access(r->last, F_OK) == 0 || ga_checkpoint_exists(r->last, true);
}

static bool learn_vocabulary(run *r) {
    const ga_config *c = &r->config;
    if (!reads_text(r)) return fail(r, 2, "tokenizer = train goes with data = FILE.txt or FILE.jsonl, not %s", c->data);
    if (!make_directory(r)) return false;
    const char *text = c->data;
    data_vocabulary_options options = {.vocab_size = c->vocab_size, .min_frequency = 2, .progress = show_progress};
    double begin = now();
    if (data_vocabulary_train(&text, 1, &options, r->tokenizer, &r->error)) return fail_library(r);
    printf("vocabulary  %s, learned in %s\n", r->tokenizer, DURATION(now() - begin));
    return true;
}

/* tokenizer = train: a run that has not begun yet learns its vocabulary. */
static bool open_tokenizer(run *r, bool fresh) {
    bool learns = strcmp(r->config.tokenizer, "train") == 0 && (fresh || !has_checkpoint(r));
    return !learns || learn_vocabulary(r);
}

/* The lock falls with the process, however it ends. */
static bool open_metrics(run *r) {
    int fd = open(r->metrics_path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd >= 0) r->metrics = fdopen(fd, "r+");
    if (!r->metrics) return fail(r, 1, "cannot open %s: %s", r->metrics_path, strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) return true;
    if (errno == EWOULDBLOCK) return fail(r, 1, "%s: another trainer is writing this run", r->directory);
    return fail(r, 1, "cannot lock %s: %s", r->metrics_path, strerror(errno));
}

/* Keeps the lines of the steps that the checkpoint has, so that the file goes on as if the run had never stopped. */
static bool cut_metrics(run *r) {
    r->spikes = (spikes){0};
    struct stat status;
    if (fstat(fileno(r->metrics), &status)) return fail(r, 1, "cannot read %s: %s", r->metrics_path, strerror(errno));
    off_t kept = 0;
    char *line = NULL;
    size_t size = 0;
    while (kept < status.st_size) {
        ssize_t length = getline(&line, &size, r->metrics);
        uint64_t step;
        if (length <= 0 || line[length - 1] != '\n') break;
        double loss;
        if (sscanf(line, "{\"step\":%" SCNu64 ",\"loss\":%lf", &step, &loss) != 2 || step > r->state.step) break;
        spikes_add(&r->spikes, loss);
        kept += length;
    }
    free(line);
    if (fseeko(r->metrics, kept, SEEK_SET) == 0 && (kept == status.st_size || ftruncate(fileno(r->metrics), kept) == 0))
        return true;
    return fail(r, 1, "cannot cut %s: %s", r->metrics_path, strerror(errno));
}

static bool remove_directory(run *r, const char *path) {
    DIR *d = opendir(path);
    if (!d) return errno == ENOENT || fail(r, 1, "cannot remove %s: %s", path, strerror(errno));
    bool removed = true;
    for (struct dirent *entry; removed && (entry = readdir(d));) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        removed = unlinkat(dirfd(d), entry->d_name, 0) == 0;
    }
    removed = removed && rmdir(path) == 0;
    if (!removed) fail(r, 1, "cannot remove %s: %s", path, strerror(errno));
    closedir(d);
    return removed;
}

/* With what a ga_save that was killed may have left: the checkpoint before, and half of the new one. */
static bool remove_checkpoint(run *r, const char *directory) {
    char replaced[PATH_SIZE + 16], partial[PATH_SIZE + 16];
    snprintf(replaced, sizeof replaced, "%s.replaced", directory);
    snprintf(partial, sizeof partial, "%s.partial", directory);
    return remove_directory(r, replaced) && remove_directory(r, partial) && remove_directory(r, directory);
}

/* The first key of the groups in `groups` that differs; false: none does. */
static bool find_difference(const ga_config *a, const ga_config *b, const char *groups, ga_key *key, char ours[GA_TEXT],
                            char theirs[GA_TEXT]) {
    for (size_t i = 0; ga_config_key(i, key); i++) {
        if (!strstr(groups, key->group)) continue;
        ga_config_get(a, key->name, ours, GA_TEXT);
        ga_config_get(b, key->name, theirs, GA_TEXT);
        if (strcmp(ours, theirs)) return true;
    }
    return false;
}

static bool write_keys(const ga_config *c, const char *path) {
    FILE *f = fopen(path, "w");
    if (!f) return false;
    fprintf(f, "# Every key of this run.\n");
    ga_key key;
    for (size_t i = 0; ga_config_key(i, &key); i++) {
        char value[GA_TEXT];
        ga_config_get(c, key.name, value, sizeof value);
        fprintf(f, "%s = %s\n", key.name, value);
    }
    bool written = fflush(f) == 0 && !ferror(f) && fsync(fileno(f)) == 0;
    return (fclose(f) == 0) & written;
}

/* Whole or not at all, and only what reads back as it is: a blank at the end of a path would not. */
static bool write_config(run *r) {
    char path[PATH_SIZE + 8], ours[GA_TEXT], theirs[GA_TEXT];
    snprintf(path, sizeof path, "%s.tmp", r->config_copy);
    if (!write_keys(&r->config, path)) return fail(r, 1, "cannot write %s: %s", path, strerror(errno));
    ga_config read = ga_config_default();
    ga_key key;
    if (ga_config_load(&read, path, &r->error)) return fail_library(r);
    if (find_difference(&r->config, &read, "MODEL GATE TRAIN RUN", &key, ours, theirs))
        return fail(r, 2, "%s = '%s' cannot stand in a configuration file, where it is read as '%s'", key.name, ours,
                    theirs);
    return rename(path, r->config_copy) == 0 || fail(r, 1, "cannot write %s: %s", r->config_copy, strerror(errno));
}

/* A run goes on with the keys that it began with; only how long it is to last may change. */
static bool check_same_run(run *r) {
    const ga_config *c = &r->config;
    ga_config begun = ga_config_default();
    if (ga_config_load(&begun, r->config_copy, &r->error))
        return fail(r, 1, "%s; it tells how %s began, and --fresh starts over", r->error.text, r->last);
    if (begun.max_steps != c->max_steps || begun.max_tokens != c->max_tokens || begun.epochs != c->epochs)
        printf("note        the run began with max_steps %zu, max_tokens %zu, epochs %zu; from here on steps and "
               "learning rate follow the new plan\n",
               begun.max_steps, begun.max_tokens, begun.epochs);
    begun.max_steps = c->max_steps;
    begun.max_tokens = c->max_tokens;
    begun.epochs = c->epochs;
    ga_key key;
    char ours[GA_TEXT], theirs[GA_TEXT];
    if (!find_difference(c, &begun, "MODEL GATE TRAIN", &key, ours, theirs)) return true;
    return fail(r, 2, "%s = %s, but the run in %s began with %s: --fresh starts over, output_dir=... begins another",
                key.name, ours, r->directory, theirs);
}

static bool allocate(run *r) {
    size_t rows = r->config.batch_size * r->config.max_seq_len;
    r->model = ga_create(&r->config, &r->device.device, GA_TRAINING, &r->error);
    if (!r->model) return fail_library(r);
    r->inputs = malloc(rows * sizeof *r->inputs);
    r->targets = malloc(rows * sizeof *r->targets);
    r->live = ga_statistics_create(r->model);
    r->held_out = ga_statistics_create(r->model);
    bool routed = routing_create(&r->progress.routing, r->model);
    return (r->inputs && r->targets && r->live && r->held_out && routed) || fail(r, 1, "out of memory");
}

static bool start_from(run *r) {
    const char *directory = r->config.init_from;
    char changes[512];
    if (ga_start_from(r->model, directory, changes, sizeof changes, &r->error))
        return fail(r, 1, "init_from: %s", r->error.text);
    printf("start       from %s%s%s\n", directory, *changes ? ": " : "", changes);
    return true;
}

/* Takes up the run where it stands. What is there is touched only when all else has gone well. */
static bool open_run(run *r, bool fresh) {
    if (!make_directory(r) || !open_metrics(r)) return false;
    bool resumed = !fresh && has_checkpoint(r);
    if (resumed && !check_same_run(r)) return false;
    if (!allocate(r)) return false;
    r->state = (ga_training_state){.random = r->config.seed, .best_val_loss = INFINITY};
    if (resumed && ga_load(r->model, r->last, &r->state, &r->error)) return fail_library(r);
    if (!resumed && *r->config.init_from && !start_from(r)) return false;
    r->saved = resumed;
    r->saved_step = r->state.step;
    if (fresh && (!remove_checkpoint(r, r->last) || !remove_checkpoint(r, r->best))) return false;
    return cut_metrics(r) && write_config(r);
}

static void close_run(run *r) {
    ga_statistics_destroy(r->held_out);
    ga_statistics_destroy(r->live);
    free(r->progress.routing.layers);
    free(r->targets);
    free(r->inputs);
    ga_destroy(r->model);
    device_close(&r->device);
    data_close(r->stream);
    if (r->metrics) fclose(r->metrics);
}

/* ---- metrics.jsonl ------------------------------------------------------------------------------------------------ */

static void write_value(FILE *f, double x) {
    if (isfinite(x))
        fprintf(f, "%.9g", x);
    else
        fprintf(f, "null");
}

static void write_number(FILE *f, const char *name, double x) {
    fprintf(f, ",\"%s\":", name);
    write_value(f, x);
}

/* A figure over all layers, then by layer. */
static void write_figure(FILE *f, const ga_statistics *s, const char *name, const char *name_by_layer,
                         double (*figure)(const ga_statistics *s, size_t layer)) {
    write_number(f, name, figure(s, GA_ALL));
    fprintf(f, ",\"%s\":", name_by_layer);
    if (!isfinite(figure(s, GA_ALL))) {
        fprintf(f, "null");
        return;
    }
    for (size_t i = 0; i < s->L; i++) {
        fprintf(f, i == 0 ? "[" : ",");
        write_value(f, figure(s, i));
    }
    fprintf(f, "]");
}

static bool write_metrics(run *r, uint64_t step, const measurement *m) {
    FILE *f = r->metrics;
    fprintf(f, "{\"step\":%" PRIu64, step);
    write_number(f, "loss", m->loss);
    write_number(f, "lr", m->learning_rate);
    write_number(f, "grad_norm", m->grad_norm);
    write_number(f, "tokens_per_s", m->tokens_per_s);
    fprintf(f, ",\"tokens\":%" PRIu64 ",\"spikes\":%" PRIu64, step * step_tokens(&r->config), r->spikes.count);
    if (!m->diverged) routing_write(f, &r->progress.routing);
    if (isfinite(m->val_loss)) {
        write_number(f, "val_loss", m->val_loss);
        write_figure(f, r->held_out, "f_attn", "f_attn_by_layer", ga_f_attn);
        write_figure(f, r->held_out, "sink_share", "sink_share_by_layer", ga_sink_share);
        write_figure(f, r->held_out, "m_act", "max_act_by_layer", ga_m_act);
        write_figure(f, r->held_out, "gate_mean", "gate_mean_by_layer", ga_gate_mean);
        if (!isnan(r->lowest_loss)) write_number(f, "lowest_loss", r->lowest_loss);
    }
    fprintf(f, "%s}\n", m->diverged ? ",\"diverged\":true" : "");
    if (fflush(f) == 0 && !ferror(f)) return true;
    return fail(r, 1, "cannot write %s: %s", r->metrics_path, strerror(errno));
}

/* ---- progress ----------------------------------------------------------------------------------------------------- */

static size_t terminal_width(void) {
    struct winsize size;
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

static void erase_bar(progress *p) {
    if (p->drawn) printf("\r\033[K\033[1A\033[K");
    p->drawn = false;
}

/* Appends a field, or leaves it out when the line would grow beyond `width`. */
static void add_field(char *line, size_t width, const char *format, ...) {
    char field[128];
    va_list list;
    va_start(list, format);
    vsnprintf(field, sizeof field, format, list);
    va_end(list);
    size_t length = strlen(line);
    if (length + (length > 0) + strlen(field) > width) return;
    if (length > 0) strcat(line, " ");
    strcat(line, field);
}

static void add_number(char *line, size_t width, const char *format, double x) {
    if (!isnan(x)) add_field(line, width, format, x);
}

static void add_figures(const progress *p, char *line, size_t width) {
    add_number(line, width, "loss %.4f", p->latest.loss);
    add_number(line, width, "val %.4f", p->latest.val_loss);
    add_number(line, width, "F-Attn %.3f", p->f_attn);
    add_number(line, width, "sink %.3f", p->sink_share);
    add_number(line, width, "M-Act %.3g", p->m_act);
    add_number(line, width, "gate %.3f", p->gate_mean);
    const routing *r = &p->routing;
    size_t worst = routing_worst(r);
    if (!isnan(r->mean.max_load))
        add_field(line, width, "load %.2f (%.2f in layer %zu)", r->mean.max_load, r->layers[worst].max_load, worst);
    add_number(line, width, "dead %.2g", r->mean.dead);
    add_number(line, width, "balance %.3f", r->mean.load_balance);
    add_number(line, width, "z %.3g", r->mean.router_z);
    add_number(line, width, "|g| %.3g", p->latest.grad_norm);
}

static void add_pace(const run *r, char *line, size_t width, double steps_done) {
    double pace = (now() - r->started) / (steps_done - (double)r->first_step);
    add_field(line, width, "%s left", DURATION(pace * ((double)r->steps - steps_done)));
    add_number(line, width, "%.0f tok/s", r->progress.latest.tokens_per_s);
    add_number(line, width, "lr %.2g", r->progress.latest.learning_rate);
}

static void print_line(run *r) {
    char line[256] = "";
    add_field(line, sizeof line - 1, "step %" PRIu64 "/%" PRIu64, r->state.step, r->steps);
    add_figures(&r->progress, line, sizeof line - 1);
    add_pace(r, line, sizeof line - 1, (double)r->state.step);
    erase_bar(&r->progress);
    printf("%s\n", line);
    fflush(stdout);
}

/* Two lines, neither wider than the terminal, at most ten times a second. steps_done counts a part of a step too. */
static void draw_bar(run *r, double steps_done) {
    progress *p = &r->progress;
    if (!p->terminal || (p->drawn && now() - p->drawn_at < 0.1)) return;
    char line[256] = "", bar[64];
    size_t width = terminal_width() - 1 < sizeof line ? terminal_width() - 1 : sizeof line - 1;
    double share = steps_done / (double)r->steps;
    add_field(line, width, "%" PRIu64 "/%" PRIu64, r->state.step, r->steps);
    add_field(line, width, "%.0f%%", 100 * share);
    add_pace(r, line, width, steps_done);
    size_t cells = width < strlen(line) + 3 ? 0 : width - strlen(line) - 3;
    if (cells >= sizeof bar) cells = sizeof bar - 1;
    for (size_t i = 0; i < cells; i++) bar[i] = (double)i < share * (double)cells ? '#' : '-';
    if (cells > 0) add_field(line, width, "[%.*s]", (int)cells, bar);
    erase_bar(p);
    printf("%s\n", line);
    *line = 0;
    add_figures(p, line, width);
    printf("%s", line);
    fflush(stdout);
    p->drawn = true;
    p->drawn_at = now();
}

static void show_step(run *r, const measurement *m) {
    progress *p = &r->progress;
    double val_loss = isnan(m->val_loss) ? p->latest.val_loss : m->val_loss;
    p->latest = *m;
    p->latest.val_loss = val_loss;
    bool last = r->state.step == r->steps, due_line = last || r->state.step % r->config.log_every == 0;
    if (!isnan(m->val_loss) || (due_line && !p->terminal)) print_line(r);
    if (!last) draw_bar(r, (double)r->state.step);
}

/* ---- training ----------------------------------------------------------------------------------------------------- */

/* Records that loss, gradient or weights are no longer numbers; `last` stays as it was. */
static bool diverge(run *r, uint64_t step, measurement *m, const char *what) {
    m->diverged = true;
    if (!write_metrics(r, step, m)) return false;
    char kept[PATH_SIZE + 64] = "no checkpoint was written before";
    if (r->saved) snprintf(kept, sizeof kept, "%s keeps step %" PRIu64, r->last, r->saved_step);
    return fail(r, 1,
                "step %" PRIu64
                ": %s (loss %g, gradient norm %g): the run diverged; %s; try a lower learning_rate, more warmup_steps, "
                "a smaller grad_clip, the gate (gate_position = G1), or attn_clip and ffn_clip (A.6)",
                step, what, m->loss, m->grad_norm, kept);
}

static bool read_windows(run *r, data_part part, uint64_t first, size_t count) {
    size_t T = r->config.max_seq_len;
    char text[512];
    for (size_t b = 0; b < count; b++) {
        uint64_t window = part == DATA_TRAIN ? training_window(r, first + b) : first + b;
        if (!data_window(r->stream, part, window, r->inputs + b * T, r->targets + b * T, text, sizeof text))
            return fail(r, 1, "%s", text);
    }
    return true;
}

static void look_at_attention(run *r) {
    r->progress.f_attn = ga_f_attn(r->live, GA_ALL);
    r->progress.sink_share = ga_sink_share(r->live, GA_ALL);
    r->progress.m_act = ga_m_act(r->live, GA_ALL);
    r->progress.gate_mean = ga_gate_mean(r->live, GA_ALL);
}

/* Gradients of a whole step, as the mean over its micro-batches. A stop is heeded between two of them: the step is then
 * left out (false, without a failure), and the run goes on from before it. */
static bool accumulate(run *r, measurement *m) {
    const ga_config *c = &r->config;
    const ga_observer observer = {.statistics = r->live};
    uint64_t step = r->state.step + 1;
    bool look = step == r->first_step + 1 || step % c->log_every == 0;
    if (look) ga_statistics_reset(r->live);
    double share = 1.0 / (double)c->gradient_accumulation_steps;
    m->loss = 0;
    for (size_t k = 0; k < c->gradient_accumulation_steps; k++) {
        if (stop_requested) return false;
        if (!read_windows(r, DATA_TRAIN, r->state.windows + k * c->batch_size, c->batch_size)) return false;
        double loss;
        if (ga_forward_backward(r->model, r->inputs, r->targets, c->batch_size, c->max_seq_len, share,
                                look && k == 0 ? &observer : NULL, &loss, &r->error))
            return fail_library(r);
        m->loss += loss * share;
        if (!isfinite(loss)) return diverge(r, step, m, "the loss is not finite");
        if (look && k == 0) look_at_attention(r);
        if (isnan(r->progress.latest.loss)) r->progress.latest.loss = loss;
        draw_bar(r, (double)r->state.step + (double)(k + 1) * share);
    }
    return true;
}

/* Tells of a spike in the loss; ends a run that has unlearned all that it knew, finite as its numbers may be. */
static bool judge_loss(run *r, measurement *m) {
    const spikes *s = &r->spikes;
    spike_kind kind = spikes_add(&r->spikes, m->loss);
    if (kind == SPIKE_NONE) return true;
    if (kind == SPIKE_DIVERGED) {
        char what[160];
        snprintf(what, sizeof what, "the mean loss of %d steps is %.3f, %.3f at its lowest, %.3f at first",
                 SPIKE_WINDOW, s->mean, s->lowest, s->first);
        return diverge(r, r->state.step, m, what);
    }
    erase_bar(&r->progress);
    printf("spike %-5" PRIu64 " step %" PRIu64 ": loss %.4f after a mean of %.4f, standard deviation %.4f\n", s->count,
           r->state.step, m->loss, s->mean, s->deviation);
    return true;
}

/* A step with a finite loss may still have left weights that are none. */
static bool weights_are_finite(const run *r) {
    const ga_model *m = r->model;
    double sum = 0;
    m->device.sum_of_squares(m->device.state, &sum, m->weights, m->n_weights);
    return isfinite(sum);
}

static bool take_step(run *r, measurement *m) {
    const ga_config *c = &r->config;
    double begin = now();
    if (!accumulate(r, m)) return false;
    routing_look(&r->progress.routing, r->model);
    m->learning_rate = ga_learning_rate(c, r->state.step, r->steps);
    ga_result result = ga_update(r->model, m->learning_rate, &m->grad_norm, &r->error);
    if (result == GA_ERR_DIVERGED) return diverge(r, r->state.step + 1, m, "the gradient is not finite");
    if (result) return fail_library(r);
    if (!weights_are_finite(r)) return diverge(r, r->state.step + 1, m, "the weights are not finite");
    r->state.step++;
    r->state.windows += c->batch_size * c->gradient_accumulation_steps;
    r->state.tokens += step_tokens(c);
    double seconds = now() - begin;
    r->step_seconds += seconds;
    m->tokens_per_s = (double)step_tokens(c) / seconds;
    return judge_loss(r, m);
}

static bool evaluate(run *r, double *loss) {
    const ga_config *c = &r->config;
    ga_observer observer = {.statistics = r->held_out};
    ga_statistics_reset(r->held_out);
    *loss = 0;
    for (uint64_t first = 0; first < r->val_windows; first += c->batch_size) {
        size_t count = r->val_windows - first < c->batch_size ? (size_t)(r->val_windows - first) : c->batch_size;
        double mean;
        if (!read_windows(r, DATA_VAL, first, count)) return false;
        if (ga_forward(r->model, r->inputs, r->targets, count, c->max_seq_len, &observer, &mean, &r->error))
            return fail_library(r);
        *loss += mean * (double)count / (double)r->val_windows;
    }
    return true;
}

/* With the tokenizer that the model's tokens are of. */
static bool save_checkpoint(run *r, const char *directory, const ga_training_state *state) {
    if (ga_save(r->model, directory, state, &r->error)) return fail_library(r);
    const data_tokenizer *t = data_stream_tokenizer(r->stream);
    char path[PATH_SIZE + 32];
    snprintf(path, sizeof path, "%s/%s", directory, DATA_TOKENIZER_FILE);
    return !t || data_copy_file(data_tokenizer_path(t), path, &r->error) == GA_OK || fail_library(r);
}

static bool save_best(run *r, double val_loss) {
    if (!(val_loss < r->state.best_val_loss)) return true;
    r->state.best_val_loss = val_loss;
    return save_checkpoint(r, r->best, NULL);
}

static bool save_last(run *r) {
    if (r->saved && r->saved_step == r->state.step) return true;
    if (!save_checkpoint(r, r->last, &r->state)) return false;
    r->saved = true;
    r->saved_step = r->state.step;
    return true;
}

/* Text as it is, but for what would steer a terminal; other tokens by their labels. */
static void print_token(const run *r, int32_t token) {
    const data_tokenizer *t = data_stream_tokenizer(r->stream);
    bool text = t || reads_text(r);
    size_t n = 0;
    const char *bytes = t ? data_tokenizer_bytes(t, token, &n) : NULL;
    for (size_t i = 0; i < n; i++) putchar((unsigned char)bytes[i] < ' ' || bytes[i] == 127 ? ' ' : bytes[i]);
    if (!t)
        printf("%s%s", data_token_text(r->stream, token, (char[DATA_LABEL_SIZE]){0}, DATA_LABEL_SIZE), text ? "" : " ");
}

static bool generate(run *r, ga_generator *g, ga_real *logits, size_t prompt, size_t count) {
    ga_sampling sampling = {.temperature = 0.8, .top_p = 1};
    if (ga_generator_feed(g, r->inputs, prompt, logits, &r->error)) return fail_library(r);
    for (size_t i = 0; i < count; i++) {
        int32_t token = ga_sample(logits, r->config.vocab_size, sampling, &r->state.random);
        print_token(r, token);
        if (i + 1 < count && ga_generator_feed(g, &token, 1, logits, &r->error)) return fail_library(r);
    }
    return true;
}

/* Goes on from the first tokens of a held-out window, another one each time. */
static bool print_sample(run *r) {
    const ga_config *c = &r->config;
    size_t T = c->max_seq_len, prompt = T / 2 < SAMPLE_PROMPT ? T / 2 + T % 2 : SAMPLE_PROMPT;
    size_t count = c->sample_tokens < T - prompt ? c->sample_tokens : T - prompt;
    uint64_t number = r->state.step / c->sample_every;
    bool held_out = r->val_windows > 0;
    if (!read_windows(r, held_out ? DATA_VAL : DATA_TRAIN, held_out ? number % r->val_windows : number, 1))
        return false;
    ga_generator *g = ga_generator_create(r->model, T, &r->error);
    if (!g) return fail_library(r);
    ga_real *logits = malloc(c->vocab_size * sizeof *logits);
    erase_bar(&r->progress);
    printf("sample      ");
    for (size_t i = 0; i < prompt; i++) print_token(r, r->inputs[i]);
    printf("| ");
    bool done = logits ? generate(r, g, logits, prompt, count) : fail(r, 1, "out of memory");
    printf("\n");
    free(logits);
    ga_generator_destroy(g);
    return done;
}

static bool due(uint64_t step, uint64_t every) {
    return every > 0 && step % every == 0;
}

/* What follows a step: evaluation, sample, its line in metrics.jsonl, checkpoints. */
static bool finish_step(run *r, measurement *m) {
    const ga_config *c = &r->config;
    uint64_t step = r->state.step;
    bool last = step == r->steps, evaluated = r->val_windows > 0 && (last || due(step, c->eval_every));
    bool saved = last || due(step, c->save_every);
    if (evaluated && !evaluate(r, &m->val_loss)) return false;
    if (evaluated && !isfinite(m->val_loss)) return diverge(r, step, m, "the held-out loss is not finite");
    if (due(step, c->sample_every) && !print_sample(r)) return false;
    if (!write_metrics(r, step, m)) return false;
    if (evaluated && !save_best(r, m->val_loss)) return false;
    if (saved && !save_last(r)) return false;
    show_step(r, m);
    return true;
}

/* Leaves the loop at the end, at a stop or at a failure (false). */
static bool train(run *r, measurement *m) {
    r->started = now();
    r->first_step = r->state.step;
    while (r->state.step < r->steps && !stop_requested) {
        *m = nothing_measured;
        if (take_step(r, m)) {
            if (!finish_step(r, m)) return false;
        } else if (r->exit_code) {
            return false;
        }
    }
    return r->state.step == r->steps || save_last(r);
}

/* ---- what is printed after the last step -------------------------------------------------------------------------- */

static int by_seconds(const void *a, const void *b) {
    double x = **(double *const *)a, y = **(double *const *)b;
    return (x < y) - (x > y);
}

static void print_profile(const run *r) {
    const ga_model *m = r->model;
    const double *order[GA_OP_COUNT];
    double wall = now() - r->started, inside = 0;
    for (size_t i = 0; i < GA_OP_COUNT; i++) {
        order[i] = &m->seconds[i];
        inside += m->seconds[i];
    }
    qsort(order, GA_OP_COUNT, sizeof order[0], by_seconds);
    printf("\n%-20s %8s %10s %12s\n", "operator", "share", "seconds", "calls");
    for (size_t i = 0; i<GA_OP_COUNT && * order[i]> 0; i++) {
        size_t operator=(size_t)(order[i] - m->seconds);
        printf("%-20s %6.1f %% %10.2f %12s\n", ga_operator_name(operator), 100 * *order[i] / wall, *order[i], GROUPED(m->calls[operator]));
    }
    printf("%-20s %6.1f %% %10.2f\n", "outside", 100 * (wall - inside) / wall, wall - inside);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    double peak = (double)usage.ru_maxrss;
#else
    double peak = 1024.0 * (double)usage.ru_maxrss;
#endif
    double tokens = (double)(r->state.step - r->first_step) * (double)step_tokens(&r->config);
    printf("tokens per second %.0f, peak memory %s\n\n", tokens / r->step_seconds, SCALED(peak, "B"));
}

static void print_end(const run *r, const measurement *m, int argc, char **argv) {
    if (r->state.step < r->steps) {
        printf("stopped at step %s of %s, saved in %s; go on with:", GROUPED(r->state.step), GROUPED(r->steps),
               r->last);
        for (int i = 0; i < argc; i++)
            if (strcmp(argv[i], "--fresh")) printf(" %s", argv[i]);
        printf("\n");
        return;
    }
    bool evaluated = !isnan(m->val_loss);
    printf("done        %s steps, loss %.4f", GROUPED(r->steps), m->loss);
    if (evaluated) printf(", held-out loss %.4f (best %.4f", m->val_loss, r->state.best_val_loss);
    if (evaluated && !isnan(r->lowest_loss)) printf(", lowest possible %.4f", r->lowest_loss);
    printf("%s, ", evaluated ? ")" : "");
    if (r->spikes.count > 0) printf("%s loss spike%s, ", GROUPED(r->spikes.count), r->spikes.count == 1 ? "" : "s");
    printf("%s\n", DURATION(now() - r->started));
    const char *name = strrchr(r->directory, '/');
    printf("kept in     %s%s%s and %s\n", r->last, evaluated ? ", " : "", evaluated ? r->best : "", r->metrics_path);
    printf("next        ./analyze --models %s:%s --data %s\n", name ? name + 1 : r->directory,
           evaluated ? r->best : r->last, r->config.data);
}

/* ---- main --------------------------------------------------------------------------------------------------------- */

/* The first signal asks for a stop, the second one ends the process; what is on disk is whole at any time. */
static void on_signal(int number) {
    (void)number;
    if (stop_requested) _exit(130);
    stop_requested = 1;
}

static bool run_all(run *r, int argc, char **argv) {
    command_line a = {0};
    if (!parse_options(r, argc, argv, &a)) return false;
    if (a.help) {
        print_help();
        return true;
    }
    if (!configure(r, argc, argv, &a) || !open_device(r)) return false;
    if (a.dry_run) return dry_run(r);

    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    if (!open_tokenizer(r, a.fresh) || !open_data(r) || !plan_steps(r) || !plan_evaluation(r) || !open_run(r, a.fresh))
        return false;
    r->model->profile = a.profile;
    print_model(r);
    print_device(r);
    print_data(r);
    if (r->state.step >= r->steps) {
        printf("complete    %s has all %s steps; --fresh starts over\n", r->last, GROUPED(r->steps));
        return true;
    }
    printf("run         %s, %s %s\n", r->directory, r->state.step ? "goes on after step" : "begins at step",
           GROUPED(r->state.step ? r->state.step : 1));
    fflush(stdout);

    measurement m = nothing_measured;
    bool trained = train(r, &m);
    erase_bar(&r->progress);
    if (!trained) return false;
    if (a.profile) print_profile(r);
    print_end(r, &m, argc, argv);
    return true;
}

int main(int argc, char **argv) {
    static run r;
    const char *terminal = getenv("TERM");
    r.progress.terminal = isatty(STDOUT_FILENO) && terminal && strcmp(terminal, "dumb");
    r.progress.latest = nothing_measured;
    r.progress.f_attn = r.progress.sink_share = r.progress.m_act = r.progress.gate_mean = NAN;
    bool done = run_all(&r, argc, argv);
    fflush(stdout);
    close_run(&r);
    if (done) return 0;
    print_failure("train", r.failure);
    return r.exit_code;
}
