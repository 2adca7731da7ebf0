/* drivers/train/ranks_mpi.h - ga_ranks over MPI, for models on CPUs: the interface of a shared object which
 * drivers/train/ranks.h loads where a launcher of MPI has started several processes (drivers/train/ranks_mpi.c; the
 * Makefile builds it with mpicc). Elsewhere no MPI library is needed, nor its start-up paid.
 */
#ifndef DRIVERS_RANKS_MPI_H
#define DRIVERS_RANKS_MPI_H

#include "../../gated_attention.h"

typedef struct ranks_mpi ranks_mpi;

/* What became of the time: of the exchanges, and of the waiting for them, which is less where they were hidden. */
typedef struct {
    double gradients, gradients_waited, weights, weights_waited; /* seconds */
} ranks_mpi_seconds;

/* X(name, result, parameters): what the object offers, as ranks_mpi_<name>. */
#define RANKS_MPI(X)                                                                                        \
    /* Joins the processes of the launcher; NULL: it cannot. */                                             \
    X(open, ranks_mpi *, (ga_error * e))                                                                    \
    X(table, const ga_ranks *, (const ranks_mpi *r))                                                        \
    /* rank of this process among the *count on its machine */                                              \
    X(local, size_t, (const ranks_mpi *r, size_t *count))                                                   \
    X(library, const char *, (const ranks_mpi *r))                                                          \
    /* Gradients travel as bfloat16 from now on, but for the own ones; sums stay in float32. */             \
    X(round, void, (ranks_mpi * r, bool bf16))                                                              \
    X(times, ranks_mpi_seconds, (const ranks_mpi *r))                                                       \
    /* This rank has failed: whether all others have too, within a second. Then only `close` or `abort`. */ \
    X(all_failed, bool, (ranks_mpi * r))                                                                    \
    /* All ranks end; code: why, after all have failed. */                                                  \
    X(close, void, (ranks_mpi * r, int code))                                                               \
    /* This rank ends them, and does not return. */                                                         \
    X(abort, void, (ranks_mpi * r, int code))

#define RANKS_MPI_X(name, result, parameters) result ranks_mpi_##name parameters;
RANKS_MPI(RANKS_MPI_X)
#undef RANKS_MPI_X

#endif
