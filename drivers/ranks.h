/* drivers/ranks.h - the processes that train one model together, of which this is one: found where a launcher has started
 * several, else it trains alone and none of this costs anything.
 *
 *     ranks all;
 *     if (!ranks_find(&all, &e)) return ranks_fail(&all, "train", e.text, 2);    // before anything is printed
 *     device.ranks = ranks_join(&all, &config);                                  // NULL: alone
 *     ranks_share(&all, &decision, sizeof decision);                             // rank 0's word
 *     if (ranks_any(&all, stop_requested)) ...                                   // the same answer on all
 *     ranks_end(&all);
 *
 * Launchers of MPI (mpirun, srun) are known by the variables that they set; the rest is MPI's, in a shared object with the
 * name GA_MPI_LIBRARY, if the program is built with one. Only rank 0 prints: the others' standard output goes nowhere.
 * Needs gated_attention.h and common.h before it.
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
    const ga_ranks *table;                  /* NULL: alone */
    ranks_mpi *mpi;
    ranks_mpi_calls calls;
} ranks;

/* What launchers tell the processes that they start. */
static const struct {
    const char *count, *rank;
} ranks_launchers[] = {
    {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"}, /* Open MPI */
    {"PMI_SIZE", "PMI_RANK"},                         /* MPICH, Intel MPI */
    {"MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"},   /* MVAPICH */
    {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"},         /* srun */
};

static size_t ranks_number(const char *name) {
    const char *text = getenv(name);
    return text ? strtoul(text, NULL, 10) : 0;
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
#define RANKS_MPI_X(name, result, parameters) \
    if (library) *(void **)&calls->name = dlsym(library, "ranks_mpi_" #name);
    RANKS_MPI(RANKS_MPI_X)
#undef RANKS_MPI_X
    if (library) return true;
    e->result = GA_ERR_DEVICE;
    snprintf(e->text, sizeof e->text, "MPI cannot be used: %.400s", dlerror());
    return false;
}

static bool ranks_open_mpi(ranks *r, ga_error *e) {
    if (!ranks_load_mpi(&r->calls, e) || !(r->mpi = r->calls.open(e))) return false;
    const ga_ranks *table = r->calls.table(r->mpi);
    if (table->count != r->count) { /* each process would be a run of its own */
        e->result = GA_ERR_DEVICE;
        snprintf(e->text, sizeof e->text,
                 "the launcher has started %zu processes, of which %.100s knows %zu: it needs its own", r->count,
                 r->calls.library(r->mpi), table->count);
        return false;
    }
    r->table = table, r->rank = table->rank;
    r->local = r->calls.local(r->mpi, &r->local_count);
    return true;
}
#else
static bool ranks_open_mpi(ranks *r, ga_error *e) {
    e->result = GA_ERR_DEVICE;
    snprintf(e->text, sizeof e->text,
             "started as one of %zu processes, but this program is built without MPI: install it (mpicc), then make",
             r->count);
    return false;
}
#endif

/* Threads for this process. A launcher may have bound it to some cores; else the ranks of a machine share what is there. */
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
    if (ranks_launched(r) && !ranks_open_mpi(r, e)) return false;
    ranks_share_cores(r);
    if (r->rank == 0 || freopen("/dev/null", "w", stdout)) return true;
    e->result = GA_ERR_FILE;
    snprintf(e->text, sizeof e->text, "cannot open /dev/null");
    return false;
}

static const ga_ranks *ranks_join(ranks *r, const ga_config *c) {
    char exchange[16];
    ga_config_get(c, "exchange", exchange, sizeof exchange);
    if (r->mpi) r->calls.round(r->mpi, strcmp(exchange, "bfloat16") == 0);
    return r->table;
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

/* Returns when all ranks have come here. */
static void ranks_meet(const ranks *r) {
    ranks_any(r, false);
}

static void ranks_end(ranks *r) {
    if (r->mpi) r->calls.close(r->mpi, 0);
    r->mpi = NULL, r->table = NULL;
}

/* Prints why this process ends, and ends the others: one line, of rank 0 where all ranks fail alike. Returns the exit code. */
static int ranks_fail(ranks *r, const char *program, char *text, int code) {
    char line[4096];
    bool alike = r->mpi && r->calls.all_failed(r->mpi);
    if (!r->mpi && r->rank > 0) sleep(1); /* a launcher ends all when one ends: rank 0's line first */
    if (r->mpi && !alike) snprintf(line, sizeof line, "rank %zu of %zu: %s", r->rank, r->count, text);
    if (r->rank == 0 || (r->mpi && !alike)) print_failure(program, r->mpi && !alike ? line : text);
    if (alike) r->calls.close(r->mpi, code);
    if (r->mpi && !alike) r->calls.abort(r->mpi, code);
    return code;
}

#endif
