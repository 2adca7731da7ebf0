/* drivers/train/ranks_mpi.c - ga_ranks over MPI (see ranks_mpi.h).
 *
 * A thread of its own makes all MPI calls, one job after the other, while the trainer's threads compute: no MPI library has to
 * allow more (MPI_THREAD_FUNNELED), and exchanges go on whether or not anybody asks for them. Waiting it sleeps between
 * looks, since a core that spins is one that does not compute.
 *
 * reduce_scatter: each rank sends every other one the piece of its gradients that this owns, and adds up what it gets in the
 * order of the ranks. As much travels as in a ring; the sum is the same in every run whatever the library, and stays in
 * float32 when pieces travel as bfloat16.
 */
#define _POSIX_C_SOURCE 200809L

#include "ranks_mpi.h"

#include <limits.h>
#include <math.h>
#include <mpi.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { JOBS = 64, PIECE = 1 << 18 }; /* waiting at one time; values that travel at one time to each rank */

typedef enum { REDUCE_SCATTER, ALL_GATHER, SUM, BROADCAST, ALL_FAILED, CLOSE, ABORT, KINDS } job_kind;

typedef struct {
    job_kind kind;
    void *data;
    size_t n; /* values of each rank, doubles, bytes; exit code */
} job;

struct ranks_mpi {
    ga_ranks table;
    int rank, count, local, local_count;
    char library[MPI_MAX_LIBRARY_VERSION_STRING];
    MPI_Comm failing; /* where ranks that have failed meet */
    bool bf16;

    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t posted, done;
    job jobs[JOBS];
    size_t first, end;     /* job number i is jobs[i % JOBS]; those before `first` are done */
    bool leaving;          /* this rank has failed: what is under way is given up */
    bool given_up;         /* and something was */
    bool all_failed;       /* the answer */
    double seconds[KINDS]; /* that jobs took */
    double waited[KINDS];  /* that the trainer waited for them */
    job_kind latest;       /* exchange */
    ga_error error;

    float *received, *sums;          /* (count, PIECE), (PIECE) */
    uint16_t *rounded, *got_rounded; /* (count, PIECE) each */
    MPI_Request *requests;           /* 2 count */
    MPI_Status *statuses;            /* 2 count, which nobody reads */
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- on the thread of MPI ----------------------------------------------------------------------------------------- */

static bool is_leaving(ranks_mpi *r) {
    pthread_mutex_lock(&r->lock);
    bool leaving = r->leaving;
    pthread_mutex_unlock(&r->lock);
    return leaving;
}

/* Keeps the first failure. */
static bool failed(ranks_mpi *r, ga_result result, const char *what, const char *why) {
    pthread_mutex_lock(&r->lock);
    if (r->error.result == GA_OK) {
        r->error.result = result;
        snprintf(r->error.text, sizeof r->error.text, "%s: %.400s", what, why);
    }
    pthread_mutex_unlock(&r->lock);
    return false;
}

static bool check(ranks_mpi *r, int code, const char *call) {
    if (code == MPI_SUCCESS) return true;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;
    MPI_Error_string(code, text, &length);
    for (char *c = text; *c; c++)
        if (*c == '\n') *c = ' ';
    return failed(r, GA_ERR_DEVICE, call, text);
}

/* Until all are done, or `seconds` are over, or this rank leaves: then false. Sleeps longer the longer it takes. */
static bool finish(ranks_mpi *r, int n, MPI_Request *requests, double seconds, bool may_leave) {
    struct timespec nap = {0, 0};
    double begin = now();
    for (;;) {
        int done = 0;
        if (!check(r, MPI_Testall(n, requests, &done, r->statuses), "MPI_Testall")) return false;
        if (done) return true;
        if ((may_leave && is_leaving(r)) || now() - begin > seconds) return false;
        nap.tv_nsec = nap.tv_nsec < 200000 ? nap.tv_nsec + 5000 : 200000;
        nanosleep(&nap, NULL);
    }
}

static bool finish_all(ranks_mpi *r, int n) {
    if (finish(r, n, r->requests, INFINITY, true)) return true;
    r->given_up = true;
    return false;
}

/* To the nearest, ties to even; NaN stays NaN. */
static void round_values(uint16_t *to, const float *from, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &from[i], sizeof bits);
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
        to[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
    }
}

static void widen_values(float *to, const uint16_t *from, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(&to[i], &bits, sizeof bits);
    }
}

/* Values [at, at + n) of each part: sent to its owner, and received from all for the own one. */
static bool trade_piece(ranks_mpi *r, const float *values, size_t per_rank, size_t at, size_t n) {
    MPI_Datatype type = r->bf16 ? MPI_UINT16_T : MPI_FLOAT;
    int requests = 0;
    for (int i = 0; i < r->count; i++) {
        if (i == r->rank) continue;
        void *to = r->bf16 ? (void *)(r->got_rounded + (size_t)i * PIECE) : (void *)(r->received + (size_t)i * PIECE);
        if (!check(r, MPI_Irecv(to, (int)n, type, i, 0, MPI_COMM_WORLD, &r->requests[requests++]), "MPI_Irecv"))
            return false;
    }
    for (int i = 0; i < r->count; i++) {
        if (i == r->rank) continue;
        const float *part = values + (size_t)i * per_rank + at;
        uint16_t *rounded = r->rounded + (size_t)i * PIECE;
        if (r->bf16) round_values(rounded, part, n);
        const void *from = r->bf16 ? (const void *)rounded : (const void *)part;
        if (!check(r, MPI_Isend(from, (int)n, type, i, 0, MPI_COMM_WORLD, &r->requests[requests++]), "MPI_Isend"))
            return false;
    }
    return finish_all(r, requests);
}

static void add_piece(ranks_mpi *r, float *own, size_t n) {
    memset(r->sums, 0, n * sizeof *r->sums);
    for (int i = 0; i < r->count; i++) {
        float *addend = i == r->rank ? own : r->received + (size_t)i * PIECE;
        if (r->bf16 && i != r->rank) widen_values(addend, r->got_rounded + (size_t)i * PIECE, n);
        for (size_t k = 0; k < n; k++) r->sums[k] += addend[k];
    }
    memcpy(own, r->sums, n * sizeof *own);
}

static void run_reduce_scatter(ranks_mpi *r, float *values, size_t per_rank) {
    for (size_t at = 0; at < per_rank; at += PIECE) {
        size_t n = per_rank - at < PIECE ? per_rank - at : PIECE;
        if (!trade_piece(r, values, per_rank, at, n)) return;
        add_piece(r, values + (size_t)r->rank * per_rank + at, n);
    }
}

/* Pieces as above, but every rank's own goes to all. */
static void run_all_gather(ranks_mpi *r, float *values, size_t per_rank) {
    for (size_t at = 0; at < per_rank; at += PIECE) {
        int n = (int)(per_rank - at < PIECE ? per_rank - at : PIECE), requests = 0;
        for (int i = 0; i < r->count; i++) {
            float *part = values + (size_t)i * per_rank + at;
            if (i != r->rank &&
                !check(r, MPI_Irecv(part, n, MPI_FLOAT, i, 0, MPI_COMM_WORLD, &r->requests[requests++]), "MPI_Irecv"))
                return;
        }
        const float *own = values + (size_t)r->rank * per_rank + at;
        for (int i = 0; i < r->count; i++)
            if (i != r->rank &&
                !check(r, MPI_Isend(own, n, MPI_FLOAT, i, 0, MPI_COMM_WORLD, &r->requests[requests++]), "MPI_Isend"))
                return;
        if (!finish_all(r, requests)) return;
    }
}

/* Each rank adds up in the order of the ranks: the same bits on all of them and in every run, whatever the library. */
static bool run_sum(ranks_mpi *r, double *values, size_t n) {
    size_t count = (size_t)r->count;
    double *all = malloc(count * n * sizeof *all);
    if (!all) return failed(r, GA_ERR_MEMORY, "sum over the ranks", "no memory");
    if (!check(r, MPI_Iallgather(values, (int)n, MPI_DOUBLE, all, (int)n, MPI_DOUBLE, MPI_COMM_WORLD, r->requests),
               "MPI_Iallgather") ||
        !finish_all(r, 1))
        return false; /* with `all`, into which MPI may still write */
    for (size_t k = 0; k < n; k++) {
        double sum = all[k];
        for (size_t i = 1; i < count; i++) sum += all[i * n + k];
        values[k] = sum;
    }
    free(all);
    return true;
}

static void run_broadcast(ranks_mpi *r, void *bytes, size_t n) {
    if (check(r, MPI_Ibcast(bytes, (int)n, MPI_BYTE, 0, MPI_COMM_WORLD, r->requests), "MPI_Ibcast")) finish_all(r, 1);
}

/* Whether all ranks come here within a second. */
static bool meet(ranks_mpi *r) {
    MPI_Request request;
    return check(r, MPI_Ibarrier(r->failing, &request), "MPI_Ibarrier") && finish(r, 1, &request, 1, false);
}

static void run_job(ranks_mpi *r, const job *j) {
    bool usable = r->error.result == GA_OK && !is_leaving(r);
    if (j->kind == REDUCE_SCATTER && usable) run_reduce_scatter(r, (float *)j->data, j->n);
    if (j->kind == ALL_GATHER && usable) run_all_gather(r, (float *)j->data, j->n);
    if (j->kind == SUM && usable) run_sum(r, (double *)j->data, j->n);
    if (j->kind == BROADCAST && usable) run_broadcast(r, j->data, j->n);
    if (j->kind == ALL_FAILED) r->all_failed = meet(r);
    if (j->kind == CLOSE && is_leaving(r)) meet(r);         /* rank 0 has said why */
    bool pending = r->given_up || r->error.result != GA_OK; /* MPI_Finalize would wait for what is under way */
    if (j->kind == ABORT || (j->kind == CLOSE && pending)) MPI_Abort(MPI_COMM_WORLD, (int)j->n);
    if (j->kind == CLOSE) {
        MPI_Comm_free(&r->failing);
        MPI_Finalize();
    }
}

static bool join(ranks_mpi *r) {
    int provided, length;
    MPI_Comm machine;
    if (!check(r, MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread")) return false;
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &r->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &r->count);
    MPI_Get_library_version(r->library, &length);
    r->library[strcspn(r->library, ",\n")] = '\0'; /* of all that some tell of themselves */
    for (char *c = r->library; *c; c++)
        if (*c == '\t') *c = ' ';
    if (!check(r, MPI_Comm_dup(MPI_COMM_WORLD, &r->failing), "MPI_Comm_dup") ||
        !check(r, MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine),
               "MPI_Comm_split_type"))
        return false;
    MPI_Comm_rank(machine, &r->local);
    MPI_Comm_size(machine, &r->local_count);
    MPI_Comm_free(&machine);
    size_t values = (size_t)r->count * PIECE;
    r->received = (float *)malloc(values * sizeof *r->received), r->sums = (float *)malloc(PIECE * sizeof *r->sums);
    r->rounded = (uint16_t *)malloc(values * sizeof *r->rounded);
    r->got_rounded = (uint16_t *)malloc(values * sizeof *r->got_rounded);
    r->requests = (MPI_Request *)malloc(2 * (size_t)r->count * sizeof(MPI_Request));
    r->statuses = (MPI_Status *)malloc(2 * (size_t)r->count * sizeof(MPI_Status));
    return (r->received && r->sums && r->rounded && r->got_rounded && r->requests && r->statuses) ||
           check(r, MPI_ERR_NO_MEM, "no memory to exchange values");
}

static void *work(void *argument) {
    ranks_mpi *r = (ranks_mpi *)argument;
    bool joined = join(r);
    pthread_mutex_lock(&r->lock);
    r->first = r->end = 0; /* the first job, to join, is done */
    pthread_cond_broadcast(&r->done);
    for (bool ended = !joined; !ended;) {
        while (r->first == r->end) pthread_cond_wait(&r->posted, &r->lock);
        job j = r->jobs[r->first % JOBS];
        pthread_mutex_unlock(&r->lock);
        double begin = now();
        run_job(r, &j);
        pthread_mutex_lock(&r->lock);
        r->seconds[j.kind] += now() - begin;
        r->first++;
        ended = j.kind == CLOSE;
        pthread_cond_broadcast(&r->done);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* ---- on the trainer's thread -------------------------------------------------------------------------------------- */

static void post(ranks_mpi *r, job_kind kind, void *data, size_t n) {
    job j = {kind, data, n};
    pthread_mutex_lock(&r->lock);
    while (r->end - r->first == JOBS) pthread_cond_wait(&r->done, &r->lock);
    r->jobs[r->end++ % JOBS] = j;
    pthread_cond_broadcast(&r->posted);
    pthread_mutex_unlock(&r->lock);
}

static void wait_for_all(ranks_mpi *r, job_kind kind) {
    double begin = now();
    pthread_mutex_lock(&r->lock);
    while (r->first != r->end) pthread_cond_wait(&r->done, &r->lock);
    r->waited[kind] += now() - begin;
    pthread_mutex_unlock(&r->lock);
}

static void begin_reduce_scatter(void *state, ga_real *values, size_t per_rank) {
    ranks_mpi *r = (ranks_mpi *)state;
    r->latest = REDUCE_SCATTER;
    post(r, REDUCE_SCATTER, values, per_rank);
}

static void begin_all_gather(void *state, ga_real *values, size_t per_rank) {
    ranks_mpi *r = (ranks_mpi *)state;
    r->latest = ALL_GATHER;
    post(r, ALL_GATHER, values, per_rank);
}

static void wait_for_exchanges(void *state) {
    ranks_mpi *r = (ranks_mpi *)state;
    wait_for_all(r, r->latest);
}

/* In pieces that MPI can count. Behind the exchanges that are under way: the time until they are done is theirs. */
static void sum(void *state, double *values, size_t n) {
    wait_for_exchanges(state);
    for (size_t at = 0; at < n; at += INT_MAX / 8) {
        post((ranks_mpi *)state, SUM, values + at, n - at < INT_MAX / 8 ? n - at : INT_MAX / 8);
        wait_for_all((ranks_mpi *)state, SUM);
    }
}

static void broadcast(void *state, void *bytes, size_t n) {
    for (size_t at = 0; at < n; at += INT_MAX) {
        post((ranks_mpi *)state, BROADCAST, (char *)bytes + at, n - at < INT_MAX ? n - at : INT_MAX);
        wait_for_all((ranks_mpi *)state, BROADCAST);
    }
}

static ga_result status(void *state, ga_error *e) {
    ranks_mpi *r = (ranks_mpi *)state;
    pthread_mutex_lock(&r->lock);
    ga_error error = r->error;
    pthread_mutex_unlock(&r->lock);
    if (error.result != GA_OK && e) *e = error;
    return error.result;
}

ranks_mpi *ranks_mpi_open(ga_error *e) {
    ranks_mpi *r = (ranks_mpi *)calloc(1, sizeof *r);
    bool started = r && pthread_mutex_init(&r->lock, NULL) == 0 && pthread_cond_init(&r->posted, NULL) == 0 &&
                   pthread_cond_init(&r->done, NULL) == 0;
    if (started) {
        r->end = 1; /* to join */
        started = pthread_create(&r->thread, NULL, work, r) == 0;
    }
    if (!started) {
        e->result = GA_ERR_MEMORY;
        snprintf(e->text, sizeof e->text, "no memory for the thread of MPI");
        return NULL;
    }
    wait_for_all(r, CLOSE);
    if (status(r, e) != GA_OK) return NULL;
    r->table = (ga_ranks){(size_t)r->rank,
                          (size_t)r->count,
                          r,
                          begin_reduce_scatter,
                          begin_all_gather,
                          wait_for_exchanges,
                          sum,
                          broadcast,
                          status};
    return r;
}

const ga_ranks *ranks_mpi_table(const ranks_mpi *r) {
    return &r->table;
}

size_t ranks_mpi_local(const ranks_mpi *r, size_t *count) {
    *count = (size_t)r->local_count;
    return (size_t)r->local;
}

const char *ranks_mpi_library(const ranks_mpi *r) {
    return r->library;
}

void ranks_mpi_round(ranks_mpi *r, bool bf16) {
    r->bf16 = bf16;
}

ranks_mpi_seconds ranks_mpi_times(const ranks_mpi *r) {
    return (ranks_mpi_seconds){r->seconds[REDUCE_SCATTER], r->waited[REDUCE_SCATTER], r->seconds[ALL_GATHER],
                               r->waited[ALL_GATHER]};
}

static void leave(ranks_mpi *r) {
    pthread_mutex_lock(&r->lock);
    r->leaving = true;
    pthread_mutex_unlock(&r->lock);
}

bool ranks_mpi_all_failed(ranks_mpi *r) {
    leave(r);
    post(r, ALL_FAILED, NULL, 0);
    wait_for_all(r, ALL_FAILED);
    return r->all_failed;
}

void ranks_mpi_close(ranks_mpi *r, int code) {
    post(r, CLOSE, NULL, (size_t)code);
    pthread_join(r->thread, NULL);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->posted);
    pthread_cond_destroy(&r->done);
    free(r->statuses);
    free(r->requests);
    free(r->got_rounded);
    free(r->rounded);
    free(r->sums);
    free(r->received);
    free(r);
}

void ranks_mpi_abort(ranks_mpi *r, int code) {
    leave(r);
    post(r, ABORT, NULL, (size_t)code);
    for (;;) pause();
}
