/* drivers/train/run_directory.h - the directory of a run: its lock, its configuration, its checkpoints, how it is taken
 * up again.
 *
 *     if (!open_tokenizer(r, fresh) || ... || !open_run(r, fresh)) return false;
 *     if (!save_best(r, val_loss) || !save_last(r)) return false;
 *     close_run(r);
 *
 * Needs run.h and plan.h before it.
 */
#ifndef DRIVERS_RUN_DIRECTORY_H
#define DRIVERS_RUN_DIRECTORY_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

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
    if (!reads_text(r))
        return fail(r, 2,
                    "tokenizer = train goes with data = FILE.txt or FILE.jsonl, not %s: text is known by its ending, "
                    "and is one file",
                    c->data);
    if (access(c->data, R_OK)) return fail(r, 1, "data = %s: %s; data=... names your text", c->data, strerror(errno));
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
    bool learns = writes(r) && strcmp(r->config.tokenizer, "train") == 0 && (fresh || !has_checkpoint(r));
    if (learns && !learn_vocabulary(r)) return false;
    return ranks_follow(&r->ranks, &r->error) || fail_library(r);
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

static const char CONFIG_HEAD[] = "# Every key of this run. Its data: ";

/* What a file of data is known by: how many windows it has, and what stands in up to 1024 of them. Generators are known by their
 * key. */
static bool hash_data(run *r, uint64_t *hash) {
    enum { LOOKED_AT = 1024 };
    uint64_t n = data_windows(r->stream, DATA_TRAIN), step = (n + LOOKED_AT - 1) / LOOKED_AT;
    size_t T = r->config.max_seq_len;
    char text[512];
    *hash = n;
    if (n == DATA_ENDLESS || strncmp(r->config.data, "gen:", 4) == 0) return true;
    for (uint64_t i = 0; i < n; i += step) {
        if (!data_window(r->stream, DATA_TRAIN, i, r->inputs, r->targets, text, sizeof text))
            return fail(r, 1, "%s", text);
        *hash = data_hash(r->inputs, T * sizeof *r->inputs, *hash);
    }
    return true;
}

/* A run goes on with the data that it began with, too. Runs of older programs do not tell what theirs was. */
static bool check_same_data(run *r) {
    uint64_t hash, begun;
    char head[sizeof CONFIG_HEAD + 32] = "";
    FILE *f = fopen(r->config_copy, "r");
    if (f && !fgets(head, sizeof head, f)) *head = 0;
    if (f) fclose(f);
    bool told = strncmp(head, CONFIG_HEAD, sizeof CONFIG_HEAD - 1) == 0;
    if (!told || sscanf(head + sizeof CONFIG_HEAD - 1, "%" SCNx64, &begun) != 1) return true;
    if (!hash_data(r, &hash)) return false;
    return hash == begun || fail(r, 1,
                                 "%s is not what the run in %s began with: --fresh starts over, and init_from=%s "
                                 "output_dir=... goes on from its weights",
                                 r->config.data, r->directory, r->last);
}

static bool write_keys(const run *r, const char *path, uint64_t data) {
    FILE *f = fopen(path, "w");
    if (!f) return false;
    fprintf(f, "%s%016" PRIx64 "\n", CONFIG_HEAD, data);
    ga_key key;
    for (size_t i = 0; ga_config_key(i, &key); i++) {
        char value[GA_TEXT];
        ga_config_get(&r->config, key.name, value, sizeof value);
        fprintf(f, "%s = %s\n", key.name, value);
    }
    bool written = fflush(f) == 0 && !ferror(f) && fsync(fileno(f)) == 0;
    return (fclose(f) == 0) & written;
}

/* Whole or not at all, and only what reads back as it is: a blank at the end of a path would not. */
static bool write_config(run *r) {
    char path[PATH_SIZE + 8], ours[GA_TEXT], theirs[GA_TEXT];
    uint64_t data;
    snprintf(path, sizeof path, "%s.tmp", r->config_copy);
    if (!hash_data(r, &data)) return false;
    if (!write_keys(r, path, data)) return fail(r, 1, "cannot write %s: %s", path, strerror(errno));
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
    ga_config planned = begun;
    planned.max_steps = c->max_steps;
    planned.max_tokens = c->max_tokens;
    planned.epochs = c->epochs;
    ga_key key;
    char ours[GA_TEXT], theirs[GA_TEXT];
    if (find_difference(c, &planned, "MODEL GATE TRAIN", &key, ours, theirs))
        return fail(r, 2,
                    "%s = %s, but the run in %s began with %s: --fresh starts over, output_dir=... begins another",
                    key.name, ours, r->directory, theirs);
    if (begun.max_steps != c->max_steps || begun.max_tokens != c->max_tokens || begun.epochs != c->epochs)
        printf("note        the run began with max_steps %zu, max_tokens %zu, epochs %zu; from here on steps and "
               "learning rate follow the new plan\n",
               begun.max_steps, begun.max_tokens, begun.epochs);
    return true;
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
    if (writes(r) && (!make_directory(r) || !open_metrics(r))) return false;
    bool resumed = !fresh && has_checkpoint(r);
    ranks_share(&r->ranks, &resumed, sizeof resumed);
    if (resumed && !check_same_run(r)) return false;
    if (!allocate(r) || (resumed && !check_same_data(r))) return false;
    r->state = (ga_training_state){.random = r->config.seed, .best_val_loss = INFINITY};
    if (resumed && ga_load(r->model, r->last, &r->state, &r->error)) return fail_library(r);
    if (!resumed && *r->config.init_from && !start_from(r)) return false;
    r->saved = resumed;
    r->saved_step = r->state.step;
    if (fresh && writes(r) && (!remove_checkpoint(r, r->last) || !remove_checkpoint(r, r->best))) return false;
    if (writes(r) && (!cut_metrics(r) || !write_config(r))) return false;
    ranks_share(&r->ranks, &r->spikes, sizeof r->spikes);
    return true;
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

/* ---- checkpoints -------------------------------------------------------------------------------------------------- */

/* With the tokenizer that the model's tokens are of. */
static bool save_checkpoint(run *r, const char *directory, const ga_training_state *state) {
    if (ga_save(r->model, directory, state, &r->error)) return fail_library(r);
    if (!writes(r)) return true;
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

#endif
