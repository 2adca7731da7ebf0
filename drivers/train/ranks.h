/* drivers/train/ranks.h - the processes that train one model together, of which this is one: found where a launcher has
 * started several, else it trains alone and none of this costs anything.
 *
 *     ranks all;
 *     if (!ranks_find(&all, &e)) return ranks_fail(&all, "train", e.text, 1);    // before anything is printed
 *     if (!ranks_join(&all, &device, &config, &e)) ...                           // sets device.device.ranks
 *     ranks_share(&all, &decision, sizeof decision);                             // rank 0's word
 *     if (!ranks_follow(&all, &e)) ...                                           // rank 0 has done what it does alone
 *     if (ranks_any(&all, stop_requested)) ...                                   // the same answer on all
 *     ranks_end(&all);
 *
 * Launchers of MPI (mpirun, srun) are known by the variables that they set; the rest is MPI's, in a shared object with
 * the name GA_MPI_LIBRARY, if the program is built with one. Without MPI, ranks with a GPU each find each other by
 * RANK, WORLD_SIZE, ... alone (rendezvous.h). GPUs exchange by NCCL either way. Only rank 0 prints: the others'
 * standard output goes nowhere. Needs gated_attention.h, common.h, device.h and rendezvous.h before it.
 */
#ifndef DRIVERS_RANKS_H
#define DRIVERS_RANKS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef GA_MPI_LIBRARY
#include <dlfcn.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "ranks_mpi.h"

typedef struct {
#define RANKS_MPI_X(name, result, parameters) result(*name) parameters;
    RANKS_MPI(RANKS_MPI_X)
#undef RANKS_MPI_X
} ranks_mpi_calls;

typedef struct {
    size_t rank, count, local, local_count; /* local: among those on this machine */
    size_t threads;                         /* for this process, of its own */
    bool bound;                             /* to some of the machine's cores */
    const ga_ranks *table;                  /* NULL: alone, or not joined yet */
    bool by_environment;                    /* started without MPI; */
    rendezvous meeting;                     /* they met here */
    ranks_mpi *mpi;
    ranks_mpi_calls calls;
} ranks;

/* What launchers tell the processes that they start; local: the rank among those on a machine. */
static const struct {
    const char *count, *rank, *local;
} ranks_launchers[] = {
    {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"}, /* Open MPI */
    {"PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"},                                    /* MPICH, Intel MPI */
    {"MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"},    /* MVAPICH */
    {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"},                      /* srun */
};

static size_t ranks_number(const char *name) {
    const char *text = getenv(name);
    return text ? strtoul(text, NULL, 10) : 0;
}

/* Ranks that the environment names without a launcher of MPI, or within one: torchrun under srun inherits srun's
 * variables, which count machines. */
static bool ranks_named(void) {
    return ranks_number("WORLD_SIZE") > 1 && getenv("RANK") && getenv("MASTER_ADDR") && getenv("MASTER_PORT");
}

/* Which of the ranks on this machine: LOCAL_RANK, or what a launcher says that means this rank by its number too; else
 * all are on this one. */
static size_t ranks_local(const rendezvous_place *p) {
    for (size_t i = 0; i < sizeof ranks_launchers / sizeof ranks_launchers[0] && !p->has_local_rank; i++)
        if (getenv(ranks_launchers[i].rank) && ranks_number(ranks_launchers[i].rank) == p->rank &&
            ranks_number(ranks_launchers[i].count) == p->count && getenv(ranks_launchers[i].local))
            return ranks_number(ranks_launchers[i].local);
    return p->local_rank;
}

static bool ranks_launched(ranks *r) {
    for (size_t i = 0; i < sizeof ranks_launchers / sizeof ranks_launchers[0]; i++) {
        size_t count = ranks_number(ranks_launchers[i].count);
        if (count < 2) continue;
        r->count = count, r->rank = ranks_number(ranks_launchers[i].rank);
        return true;
    }
    return false;
}

#ifdef GA_MPI_LIBRARY
/* All symbols at once, and for the plugins of the MPI library too. */
static bool ranks_load_mpi(ranks_mpi_calls *calls, ga_error *e) {
    void *library = dlopen(GA_MPI_LIBRARY, RTLD_NOW | RTLD_GLOBAL);
    bool whole = library != NULL;
#define RANKS_MPI_X(name, result, parameters) \
    whole = whole && (*(void **)&calls->name = dlsym(library, "ranks_mpi_" #name));
    RANKS_MPI(RANKS_MPI_X)
#undef RANKS_MPI_X
    return whole || fail_with(e, GA_ERR_DEVICE, "MPI cannot be used: %.400s", dlerror());
}

static bool ranks_open_mpi(ranks *r, ga_error *e) {
    if (!ranks_load_mpi(&r->calls, e) || !(r->mpi = r->calls.open(e))) return false;
    const ga_ranks *table = r->calls.table(r->mpi);
    if (table->count != r->count) /* each process would be a run of its own */
        return fail_with(e, GA_ERR_DEVICE,
                         "the launcher has started %zu processes, of which %.100s knows %zu: it needs its own",
                         r->count, r->calls.library(r->mpi), table->count);
    r->table = table, r->rank = table->rank;
    r->local = r->calls.local(r->mpi, &r->local_count);
    return true;
}
#else
static bool ranks_open_mpi(ranks *r, ga_error *e) {
    return fail_with(e, GA_ERR_DEVICE,
                     "started as one of %zu processes, but this program is built without MPI: install it (mpicc), then "
                     "make",
                     r->count);
}
#endif

/* Ranks that the environment names, without MPI. They meet at once, so that none waits for one that has failed. */
static bool ranks_open_rendezvous(ranks *r, ga_error *e) {
    rendezvous_place place;
    r->by_environment = true;
    if (!rendezvous_find(&place, e)) return false;
    r->by_environment = place.count > 1;
    if (place.count < 2) return true;
    r->rank = place.rank, r->count = place.count, r->local = ranks_local(&place);
    r->local_count = ranks_number("LOCAL_WORLD_SIZE");
    if (r->local_count == 0) r->local_count = r->count;
    return rendezvous_open(&r->meeting, &place, e);
}

/* The GPU of this process, as CUDA counts those that it sees: where a launcher lets it see only one, that one. */
static size_t ranks_gpu(const ranks *r) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    return visible && *visible && !strchr(visible, ',') ? 0 : r->local;
}

/* Threads for this process. A launcher may have bound it to some cores; else the ranks of a machine share
 * what is there. */
static void ranks_share_cores(ranks *r) {
    r->threads = 1;
#ifdef _OPENMP
    r->threads = (size_t)omp_get_max_threads();
    r->bound = omp_get_num_procs() < sysconf(_SC_NPROCESSORS_ONLN);
    if (!r->bound && !getenv("OMP_NUM_THREADS")) r->threads /= r->local_count;
    if (r->threads == 0) r->threads = 1;
#endif
}

static bool ranks_find(ranks *r, ga_error *e) {
    memset(r, 0, sizeof *r);
    r->count = r->local_count = 1;
    r->meeting.listening = -1;
    bool launched = !ranks_named() && ranks_launched(r);
    if (launched ? !ranks_open_mpi(r, e) : !ranks_open_rendezvous(r, e)) return false;
    ranks_share_cores(r);
    if (r->rank == 0 || freopen("/dev/null", "w", stdout)) return true;
    return fail_with(e, GA_ERR_FILE, "cannot open /dev/null");
}

/* NCCL's way to begin where there is MPI. */
static bool ranks_share_by_mpi(void *state, void *bytes, size_t n, ga_error *e) {
    const ga_ranks *table = (const ga_ranks *)state;
    table->broadcast(table->state, bytes, n);
    return table->status(table->state, e) == GA_OK;
}

/* Whether all ranks have GPUs, or none has; without MPI all must. */
static bool ranks_have_alike(const ranks *r, const device_choice *d, ga_error *e) {
    double gpus = d->cuda;
    if (!r->table)
        return d->cuda ||
               fail_with(e, GA_ERR_DEVICE, "ranks without MPI need a GPU each; this one has none (%.400s)", d->why);
    r->table->sum(r->table->state, &gpus, 1);
    if (r->table->status(r->table->state, e) != GA_OK) return false;
    return gpus == 0 || gpus == (double)r->count ||
           fail_with(e, GA_ERR_DEVICE, "%.0f of %zu ranks have a GPU; device=cpu trains without", gpus, r->count);
}

/* The GPU becomes that of one of `count` ranks, which find each other by the two functions; see ga_cuda_rendezvous. */
static bool ranks_join_gpu(device_choice *d, size_t rank, size_t count, bool bf16, double timeout, void *state,
                           bool (*share)(void *, void *, size_t, ga_error *), bool (*all_alive)(void *, ga_error *),
                           ga_error *e) {
#if defined(GA_CUDA) || defined(GA_CUDA_LIBRARY)
    const ga_cuda_ranks_settings settings = {rank, count, bf16, timeout, {state, share, all_alive}};
    device_cuda cuda;
    if (!device_find_cuda(&cuda, e) || cuda.join(&d->ranks, &d->device, &settings, e) != GA_OK) return false;
    d->leave = cuda.leave, d->device.ranks = &d->ranks;
    return true;
#else
    (void)d, (void)rank, (void)count, (void)bf16, (void)timeout, (void)state, (void)share, (void)all_alive, (void)e;
    return false;
#endif
}

static bool ranks_join(ranks *r, device_choice *d, const ga_config *c, ga_error *e) {
    char exchange[16];
    ga_config_get(c, "exchange", exchange, sizeof exchange);
    bool rounded = strcmp(exchange, "bfloat16") == 0;
    if (r->count == 1) return true;
    if (!ranks_have_alike(r, d, e)) return false;
    if (!d->cuda) {
        r->calls.round(r->mpi, rounded);
        d->device.ranks = r->table;
        return true;
    }
    bool mpi = r->mpi != NULL;
    if (!ranks_join_gpu(d, r->rank, r->count, rounded, rendezvous_timeout(),
                        mpi ? (void *)r->table : (void *)&r->meeting, mpi ? ranks_share_by_mpi : rendezvous_share,
                        mpi ? NULL : rendezvous_all_alive, e))
        return false;
    r->table = d->device.ranks;
    return true;
}

/* The bytes of rank 0. */
static void ranks_share(const ranks *r, void *bytes, size_t n) {
    if (r->table) r->table->broadcast(r->table->state, bytes, n);
}

static bool ranks_any(const ranks *r, bool here) {
    double count = here;
    if (r->table) r->table->sum(r->table->state, &count, 1);
    return count > 0;
}

/* Returns when rank 0 has come here, however long it takes it; false: it never will. */
static bool ranks_follow(const ranks *r, ga_error *e) {
    char word = 0;
    ranks_share(r, &word, sizeof word);
    return !r->table || r->table->status(r->table->state, e) == GA_OK;
}

static void ranks_end(ranks *r) {
    if (r->mpi) r->calls.close(r->mpi, 0);
    rendezvous_close(&r->meeting, true);
    r->mpi = NULL, r->table = NULL;
}

/* Prints why this process ends, and ends the others: one line, of rank 0 where all ranks fail alike. Returns the exit
 * code. */
static int ranks_fail(ranks *r, const char *program, char *text, int code) {
    char line[4096];
    if (r->by_environment) {
        snprintf(line, sizeof line, "rank %zu of %zu: %s", r->rank, r->count, text);
        rendezvous_close(&r->meeting, false);
        print_failure(program, r->count > 1 ? line : text);
        return code;
    }
    bool alike = r->mpi && r->calls.all_failed(r->mpi);
    if (!r->mpi && r->rank > 0) sleep(1); /* a launcher ends all when one ends: rank 0's line first */
    if (r->mpi && !alike) snprintf(line, sizeof line, "rank %zu of %zu: %s", r->rank, r->count, text);
    if (r->rank == 0 || (r->mpi && !alike)) print_failure(program, r->mpi && !alike ? line : text);
    if (alike) r->calls.close(r->mpi, code);
    if (r->mpi && !alike) r->calls.abort(r->mpi, code);
    return code;
}

#endif
