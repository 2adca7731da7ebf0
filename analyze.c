/* analyze.c - measures trained models: attention sinks, massive activations, gate scores, loss.
 *
 *     ./analyze --models NAME:DIR [NAME:DIR ...] --data SOURCE [...]      compares models on the same tokens
 *     ./analyze --models NAME:DIR --prompt TEXT [--generate N] [--maps]   goes on from a prompt
 *     ./analyze --models NAME:DIR --domains FILE [FILE ...]               perplexity of each file
 *     ./analyze --describe DIR [DIR ...]                                  says what a checkpoint holds, and what it costs
 *     ./analyze --models NAME:DIR --eval FILE.jsonl [--shots N]           multiple choice by log-likelihood
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
#define _POSIX_C_SOURCE   200809L
#define _FILE_OFFSET_BITS 64
#define _DARWIN_C_SOURCE  /* flock, ru_maxrss: on macOS POSIX alone hides them */

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
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

#define STB_DS_IMPLEMENTATION /* included by data/tokenizer.h */
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#define DATA_IMPLEMENTATION
#include "data/data.h"
#include "data/questions.h"
#include "gated_attention_x86.h"
#if defined(GA_CUDA) || defined(GA_CUDA_LIBRARY)
#include "gated_attention_cuda.cuh"
#endif
#include "drivers/common.h"
#include "drivers/analyze/figures.h"
#include "drivers/analyze/gallery.h"
#include "drivers/analyze/lengths.h"
#include "drivers/analyze/report.h"
#include "drivers/device.h"
#include "drivers/analyze/analysis.h"
#include "drivers/analyze/measure.h"
#include "drivers/analyze/interventions.h"
#include "drivers/analyze/measure_lengths.h"
#include "drivers/analyze/compare.h"
#include "drivers/analyze/prompt_maps.h"
#include "drivers/analyze/prompt.h"
#include "drivers/analyze/describe.h"
#include "drivers/analyze/evaluate.h"
#include "drivers/analyze/domains.h"

static void free_analysis(analysis *a) {
    report *r = &a->report;
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        report_model *m = &r->models[i];
        ga_statistics_destroy(m->statistics);
        free(m->window_losses);
        free(m->maps);
        free(m->window_maps);
        arrfree(m->training);
        arrfree(m->held_out);
        arrfree(m->f_attn);
        arrfree(m->changes);
        free_lengths(m);
    }
    arrfree(r->models);
    device_close(&a->device); /* after the statistics */
    arrfree(r->figures);
    free(r->labels);
    data_close(a->stream);
    data_tokenizer_close(a->tokenizer);
    for (size_t i = 0; i < arrlenu(a->texts); i++) free(a->texts[i]);
    arrfree(a->texts);
    arrfree(a->lengths);
    free_lists(&a->options);
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
    if (a->mode != DESCRIBE && (!open_device(a) || !add_models(a))) return false;
#define X(name, option, function) \
    if (a->mode == (name)) return function(a);
    ANALYSIS_MODES(X)
#undef X
    return false;
}

/* Mapped weights are read from their file when they are needed; another program may have cut it short since. */
static void on_bus_error(int number) {
    static const char line[] = "analyze: a file of weights became shorter while it was read\n";
    (void)number;
    ssize_t written = write(STDERR_FILENO, line, sizeof line - 1);
    (void)written;
    _exit(1);
}

int main(int argc, char **argv) {
    static analysis a;
    struct sigaction action = {.sa_handler = on_bus_error};
    sigaction(SIGBUS, &action, NULL);
    bool done = run_all(&a, argc, argv);
    if (fflush(stdout) != 0 && done) done = fail(&a, 1, "cannot write the output: %s", strerror(errno));
    if (!done) print_failure("analyze", a.failure);
    free_analysis(&a);
    return done ? 0 : a.exit_code;
}
