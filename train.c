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
#define _POSIX_C_SOURCE   200809L
#define _FILE_OFFSET_BITS 64
#define _DARWIN_C_SOURCE  /* flock, ru_maxrss: on macOS POSIX alone hides them */

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STB_DS_IMPLEMENTATION /* included by data/tokenizer.h */
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#define DATA_IMPLEMENTATION
#include "data/data.h"
#include "data/vocabulary.h"
#include "gated_attention_x86.h"
#if defined(GA_CUDA) || defined(GA_CUDA_LIBRARY)
#include "gated_attention_cuda.cuh"
#endif
#include "drivers/common.h"
#include "drivers/device.h"
#include "drivers/train/rendezvous.h"
#include "drivers/train/ranks.h"
#include "drivers/train/routing.h"
#include "drivers/train/spikes.h"
#include "drivers/train/run.h"
#include "drivers/train/plan.h"
#include "drivers/train/printout.h"
#include "drivers/train/dry_run.h"
#include "drivers/train/run_directory.h"
#include "drivers/train/metrics.h"
#include "drivers/train/progress.h"
#include "drivers/train/sample.h"
#include "drivers/train/training.h"

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
    print_ranks(r);
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
    if (!ranks_find(&r.ranks, &r.error)) return ranks_fail(&r.ranks, "train", r.error.text, 1);
    const char *terminal = getenv("TERM");
    on_terminal = isatty(STDOUT_FILENO) && r.ranks.count == 1;
    r.progress.terminal = on_terminal && terminal && strcmp(terminal, "dumb");
    r.progress.latest = nothing_measured;
    r.progress.f_attn = r.progress.sink_share = r.progress.m_act = r.progress.gate_mean = NAN;
    bool done = run_all(&r, argc, argv);
    fflush(stdout);
    if (done || !r.ranks.table) close_run(&r); /* else exchanges may be under way in what it would free */
    if (!done) device_leave(&r.device, true);
    if (!done) return ranks_fail(&r.ranks, "train", r.failure, r.exit_code);
    ranks_end(&r.ranks);
    return 0;
}
