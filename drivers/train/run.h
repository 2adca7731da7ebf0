/* drivers/train/run.h - what every part of train stands on: the run and its state, the command line, the keys it means.
 *
 *     run r = {0};
 *     command_line a = {0};
 *     if (!parse_options(&r, argc, argv, &a) || !configure(&r, argc, argv, &a)) puts(r.failure);    // and r.exit_code
 *
 * Needs common.h, gated_attention.h, gated_attention_x86.h, data.h, device.h, ranks.h, routing.h and
 * spikes.h before it.
 */
#ifndef DRIVERS_RUN_H
#define DRIVERS_RUN_H

#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

enum { PATH_SIZE = GA_TEXT + 64 };

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

    ranks ranks; /* the processes of this run */
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
static bool on_terminal; /* standard output; that of a launcher looks like one even where it goes to a file */

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

static size_t thread_count(const run *r) {
    return r->config.threads ? r->config.threads : r->ranks.threads;
}

/* Only rank 0 writes files. */
static bool writes(const run *r) {
    return r->ranks.rank == 0;
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
    printf("\nThe key data is one of\n");
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
        else if (!strchr(argv[i], '=') && a->config_path)
            return fail(r, 2, "%s: a key is set as key=value, without spaces; the configuration is %s already", argv[i],
                        a->config_path);
        else if (!a->config_path)
            a->config_path = argv[i];
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

/* With init_from, the model's keys that the configuration does not set are the checkpoint's (but for max_seq_len, and
 * for the gate where that has none): those of `last` once the run has begun. */
static bool take_model_keys(run *r, int argc, char **argv, const command_line *a) {
    ga_config *c = &r->config, there = ga_config_default();
    bool begun = !a->fresh && ga_checkpoint_exists(r->last, false);
    if (ga_load_config(&there, begun ? r->last : c->init_from, true, &r->error) || ga_config_check(&there, &r->error))
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

/* A configuration that is not there, with the one that was meant where that is to be seen. */
static bool fail_configuration(run *r, const char *path) {
    static const char *const places[] = {"", "configs/", "configs/variants/"};
    struct stat status;
    if (stat(path, &status) == 0 && S_ISDIR(status.st_mode))
        return fail(r, 2, "%s is a directory: ./train takes a configuration, such as configs/quick.cfg", path);
    if (access(path, F_OK) == 0) return fail(r, 2, "%s", r->error.text);
    if (strchr(path, '=')) return fail(r, 2, "no configuration: ./train CONFIG.cfg %s", path);
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        char meant[PATH_SIZE];
        snprintf(meant, sizeof meant, "%s%s%s", places[i], path, ends_with(path, ".cfg") ? "" : ".cfg");
        if (access(meant, R_OK) == 0) return fail(r, 2, "%s; is it %s?", r->error.text, meant);
    }
    return fail(r, 2, "%s", r->error.text);
}

static bool configure(run *r, int argc, char **argv, const command_line *a) {
    if (!a->config_path)
        return fail(r, 2, "usage: ./train CONFIG.cfg [key=value ...] [--help] [--dry-run] [--fresh] [--profile]");
    ga_config *c = &r->config;
    *c = ga_config_default();
    if (ga_config_load(c, a->config_path, &r->error)) return fail_configuration(r, a->config_path);
    if (!set_keys(r, argc, argv, a) || !name_run(r, a->config_path)) return false;
    if (*c->init_from && !take_model_keys(r, argc, argv, a)) return false;
    if (ga_config_check(c, &r->error) || ga_summarize_rank(c, GA_TRAINING, r->ranks.count, &r->cost, &r->error))
        return fail_library(r);
    if (c->gradient_accumulation_steps % r->ranks.count)
        return fail(
            r, 2,
            "gradient_accumulation_steps = %zu cannot be spread over %zu ranks: it counts the micro-batches of all "
            "of them, and must be a multiple of their number",
            c->gradient_accumulation_steps, r->ranks.count);
    choose_tokenizer(r);
    return true;
}

static bool open_device(run *r) {
#ifdef _OPENMP
    omp_set_num_threads((int)thread_count(r));
#endif
    if (!device_open(&r->device, &r->config, ranks_gpu(&r->ranks), &r->error)) return fail(r, 2, "%s", r->error.text);
    return ranks_join(&r->ranks, &r->device, &r->config, &r->error) || fail_library(r);
}

#endif
