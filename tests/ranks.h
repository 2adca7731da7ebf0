/* Ranks that are threads of one process: the table of ga_ranks without a library, for tests of what stands on it.
 *
 *     static void work(void *context, const ga_ranks *ranks);    // on each rank
 *     run_ranks(3, late, work, contexts);                        // contexts[i] for rank i; returns when all have
 *
 * late: exchanges are done in `wait`, as late as they may be, else at once, as early: what depends on neither gets the
 * same from both. What the table calls undefined becomes NaN. Include it after gated_attention.h and testing.h. */
#ifndef RANKS_H
#define RANKS_H

#include <pthread.h>

enum { MOST_RANKS = 8, MOST_EXCHANGES = 64 };

typedef struct {
    pthread_barrier_t barrier;
    size_t count;
    bool late;
    void *given[MOST_RANKS];
} rank_group;

typedef struct {
    rank_group *group;
    ga_ranks table;
    struct {
        ga_real *values;
        size_t per_rank;
        bool gather;
    } begun[MOST_EXCHANGES];
    size_t n_begun, exchanges; /* waiting; of the whole run */
    void (*work)(void *context, const ga_ranks *ranks);
    void *context;
    pthread_t thread;
} rank_thread;

/* All ranks' pointers are in given between the two calls. */
static inline void ranks_give(rank_thread *t, void *p) {
    t->group->given[t->table.rank] = p;
    pthread_barrier_wait(&t->group->barrier);
}

static inline void ranks_done(rank_thread *t) {
    pthread_barrier_wait(&t->group->barrier);
}

static inline void ranks_exchange(rank_thread *t, ga_real *values, size_t n, bool gather) {
    size_t rank = t->table.rank, count = t->table.count;
    ga_real *result = reals(n * count);
    ranks_give(t, values);
    for (size_t i = 0; i < n * count; i++) {
        result[i] = gather ? ((ga_real *)t->group->given[i / n])[i] : i / n == rank ? 0 : (ga_real)NAN;
        for (size_t r = 0; !gather && r < count && i / n == rank; r++) result[i] += ((ga_real *)t->group->given[r])[i];
    }
    ranks_done(t);
    memcpy(values, result, n * count * sizeof *values);
    free(result);
}

static inline void ranks_begin(rank_thread *t, ga_real *values, size_t per_rank, bool gather) {
    if (per_rank % GA_RANK_UNIT) abort();
    t->exchanges++;
    if (!t->group->late) {
        ranks_exchange(t, values, per_rank, gather);
        return;
    }
    if (t->n_begun == MOST_EXCHANGES) abort();
    t->begun[t->n_begun].values = values, t->begun[t->n_begun].per_rank = per_rank;
    t->begun[t->n_begun++].gather = gather;
}

static inline void ranks_reduce_scatter(void *state, ga_real *values, size_t per_rank) {
    ranks_begin((rank_thread *)state, values, per_rank, false);
}

static inline void ranks_all_gather(void *state, ga_real *values, size_t per_rank) {
    ranks_begin((rank_thread *)state, values, per_rank, true);
}

static inline void ranks_wait(void *state) {
    rank_thread *t = (rank_thread *)state;
    for (size_t i = 0; i < t->n_begun; i++)
        ranks_exchange(t, t->begun[i].values, t->begun[i].per_rank, t->begun[i].gather);
    t->n_begun = 0;
}

static inline void ranks_sum(void *state, double *values, size_t n) {
    rank_thread *t = (rank_thread *)state;
    double *sums = (double *)calloc(n, sizeof *sums);
    if (!sums) abort();
    ranks_give(t, values);
    for (size_t r = 0; r < t->table.count; r++)
        for (size_t i = 0; i < n; i++) sums[i] += ((double *)t->group->given[r])[i];
    ranks_done(t);
    memcpy(values, sums, n * sizeof *values);
    free(sums);
}

static inline void ranks_broadcast(void *state, void *bytes, size_t n) {
    rank_thread *t = (rank_thread *)state;
    ranks_give(t, bytes);
    if (t->table.rank > 0) memcpy(bytes, t->group->given[0], n);
    ranks_done(t);
}

static inline ga_result ranks_status(void *state, ga_error *e) {
    (void)state, (void)e;
    return GA_OK;
}

static inline void *ranks_run_one(void *argument) {
    rank_thread *t = (rank_thread *)argument;
    use_threads(1);
    t->work(t->context, &t->table);
    return NULL;
}

/* Returns how many exchanges each rank began. */
static inline size_t run_ranks(size_t count, bool late, void (*work)(void *, const ga_ranks *), void *const *contexts) {
    static rank_thread threads[MOST_RANKS];
    rank_group group = {.count = count, .late = late};
    assert_int_equal(pthread_barrier_init(&group.barrier, NULL, (unsigned)count), 0);
    for (size_t i = 0; i < count; i++) {
        rank_thread *t = &threads[i];
        memset(t, 0, sizeof *t);
        t->group = &group, t->work = work, t->context = contexts[i];
        t->table = (ga_ranks){
            i, count, t, ranks_reduce_scatter, ranks_all_gather, ranks_wait, ranks_sum, ranks_broadcast, ranks_status};
        assert_int_equal(pthread_create(&t->thread, NULL, ranks_run_one, t), 0);
    }
    for (size_t i = 0; i < count; i++) pthread_join(threads[i].thread, NULL);
    pthread_barrier_destroy(&group.barrier);
    for (size_t i = 1; i < count; i++) assert_int_equal(threads[i].exchanges, threads[0].exchanges);
    return threads[0].exchanges;
}

#endif
