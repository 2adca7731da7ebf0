/* test_ranks.c - exchanges between ranks by gated_attention_cuda.cuh, without a GPU: every rank is a process with an
 * emulated GPU, and NCCL is that of cuda_cpu_nccl.cpp. */
#define _GNU_SOURCE /* MAP_ANONYMOUS */
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_cuda.cuh"
#include "testing.h"
#include "cuda_cpu_control.h"
#include "device.h"
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_RANKS = 4 };

/* Where the processes of a test meet. */
typedef struct {
    volatile int told, taken, gone[MOST_RANKS];
    char word[1 << 17];
} meeting;
static meeting *here;
static ga_ranks ranks;
static size_t rank, count;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void nap(void) {
    const struct timespec t = {0, 1000000};
    nanosleep(&t, NULL);
}

/* In a rank: cmocka's own checks would go on in the wrong process. */
#define CHECK(condition, ...)                                                \
    do {                                                                     \
        if (condition) break;                                                \
        printf("ERROR rank %zu, line %d: %s: ", rank, __LINE__, #condition); \
        printf(__VA_ARGS__), printf("\n"), fflush(stdout), _exit(1);         \
    } while (0)

static bool all_alive(void *state, ga_error *e) {
    (void)state;
    for (size_t i = 0; i < count; i++)
        if (here->gone[i]) {
            snprintf(e->text, sizeof e->text, "rank %zu has ended", i);
            return false;
        }
    return true;
}

/* Rank 0 tells its next word when all have taken the one before. */
static bool share(void *state, void *bytes, size_t n, ga_error *e) {
    static int round;
    CHECK(n <= sizeof here->word, "%zu bytes", n);
    while (rank == 0 ? here->taken < here->told * ((int)count - 1) : here->told == round) {
        if (!all_alive(state, e)) return false;
        nap();
    }
    memcpy(rank == 0 ? here->word : bytes, rank == 0 ? bytes : here->word, n);
    rank == 0 ? here->told++ : __atomic_add_fetch(&here->taken, 1, __ATOMIC_SEQ_CST);
    round++;
    return true;
}

static bool share_nothing(void *state, void *bytes, size_t n, ga_error *e) {
    (void)state, (void)bytes, (void)n;
    snprintf(e->text, sizeof e->text, "nobody is here");
    return false;
}

static ga_cuda_ranks_settings settings_of(bool halves, double timeout) {
    ga_cuda_ranks_settings s = {rank, count, halves, timeout, {NULL, share, all_alive}};
    return s;
}

static void begin(bool halves, double timeout) {
    ga_error e;
    open_device(false);
    ga_cuda_ranks_settings s = settings_of(halves, timeout);
    ga_result result = ga_ranks_cuda(&ranks, &device, &s, &e);
    CHECK(result == GA_OK, "%s", e.text);
    CHECK(ranks.rank == rank && ranks.count == count, "%zu of %zu", ranks.rank, ranks.count);
}

static void end(void) {
    ga_error e;
    CHECK(ranks.status(ranks.state, &e) == GA_OK, "%s", e.text);
    ga_ranks_cuda_destroy(&ranks, false);
    close_device();
    CHECK(cucpu_live_allocations() == 0, "%zu blocks of memory are left", cucpu_live_allocations());
}

/* Runs `body` as `n` ranks; how each of them ended, as waitpid says it. */
static void run_ranks(size_t n, void (*body)(void), int *ends) {
    pid_t children[MOST_RANKS];
    memset(here, 0, sizeof *here);
    fflush(stdout);
    for (size_t i = 0; i < n; i++) {
        children[i] = fork();
        if (children[i]) continue;
        rank = i, count = n;
        body();
        exit(0); /* not _exit: the lines that ran are counted */
    }
    double started = seconds();
    size_t left = n;
    for (size_t i = 0; left > 0; i = (i + 1) % n) {
        if (children[i] && waitpid(children[i], &ends[i], WNOHANG) == children[i]) {
            children[i] = 0, left--;
            if (ends[i]) here->gone[i] = 1;
        }
        if (i == 0) nap();
        if (seconds() < started + 60) continue;
        for (size_t j = 0; j < n; j++)
            if (children[j]) kill(children[j], SIGKILL);
        fail_msg("the ranks wait for ever");
    }
}

static void all_ranks(size_t n, void (*body)(void)) {
    int ends[MOST_RANKS];
    run_ranks(n, body, ends);
    for (size_t i = 0; i < n; i++)
        if (ends[i])
            fail_msg("rank %zu of %zu: exit code %d, signal %d", i, n, WEXITSTATUS(ends[i]), WTERMSIG(ends[i]));
}

/* ---- what is exchanged -------------------------------------------------------------------------------------------- */

/* Value i of a rank: nothing that a sum in another order would hide. */
static float value_of(size_t of, size_t i) {
    uint64_t random = of * 1000003 + i;
    return (float)ga_random_normal(&random);
}

static float *on_device(size_t n) {
    float *x = (float *)device.allocate(device.state, n * sizeof *x), *host = reals(n);
    for (size_t i = 0; i < n; i++) host[i] = value_of(rank, i);
    device.copy_in(device.state, x, host, n * sizeof *x);
    free(host);
    return x;
}

static float *from_device(const float *x, size_t n) {
    float *host = reals(n);
    device.copy_out(device.state, host, x, n * sizeof *x);
    return host;
}

/* In float32, from rank 0 to the last; with bfloat16 the own value first, then the others rounded. */
static float sum_of(size_t i, bool halves) {
    float sum = halves ? value_of(rank, i) : 0;
    for (size_t r = 0; r < count; r++)
        if (!halves)
            sum += value_of(r, i);
        else if (r != rank)
            sum += bf16_rounded(value_of(r, i));
    return sum;
}

static void sums_and_copies(bool halves) {
    static const size_t sizes[] = {16, 48, 1600, 12000, 32};
    begin(halves, 60);
    for (size_t s = 0; s < COUNT(sizes); s++) {
        size_t each = sizes[s], n = each * count;
        float *x = on_device(n);
        ranks.reduce_scatter(ranks.state, x, each);
        ranks.wait(ranks.state);
        float *sums = from_device(x, n);
        for (size_t i = rank * each; i < (rank + 1) * each; i++)
            CHECK(sums[i] == sum_of(i, halves), "sum %zu of %zu is %g, not %g", i, n, sums[i], sum_of(i, halves));
        free(sums);
        device.release(device.state, x);
        x = on_device(n);
        ranks.all_gather(ranks.state, x, each);
        ranks.wait(ranks.state);
        float *all = from_device(x, n);
        for (size_t i = 0; i < n; i++) CHECK(all[i] == value_of(i / each, i), "value %zu of %zu", i, n);
        free(all);
        device.release(device.state, x);
    }
    end();
}

static void sums_in_float32(void) {
    sums_and_copies(false);
}
static void sums_in_bfloat16(void) {
    sums_and_copies(true);
}
static void test_sums(void **unused) {
    (void)unused;
    for (size_t n = 1; n <= MOST_RANKS; n++) all_ranks(n, sums_in_float32);
}
static void test_sums_bf16(void **unused) {
    (void)unused;
    for (size_t n = 1; n <= MOST_RANKS; n++) all_ranks(n, sums_in_bfloat16);
}

/* Operators before, between and after: y = 2 x is exchanged while others compute; then z = sum + sum. */
static void in_order(void) {
    enum { EACH = 160 };
    size_t n = EACH * count;
    begin(false, 60);
    float *x = on_device(n), *other = on_device(n), *y[2], *z = on_device(n);
    y[0] = on_device(n), y[1] = on_device(n);
    for (int round = 0; round < 20; round++) {
        for (int b = 0; b < 2; b++) {
            device.add(device.state, y[b], x, b ? other : x, n);
            ranks.reduce_scatter(ranks.state, y[b], EACH);
            device.add(device.state, other, x, x, n); /* not what is exchanged: the next one is */
        }
        ranks.wait(ranks.state);
        size_t mine = rank * EACH;
        device.add(device.state, z + mine, y[0] + mine, y[1] + mine, EACH);
        ranks.all_gather(ranks.state, z, EACH);
        ranks.wait(ranks.state);
        device.add(device.state, y[0], z, z, n);
        float *host = from_device(y[0], n);
        for (size_t i = 0; i < n; i++) {
            float first = 0, second = 0;
            for (size_t r = 0; r < count; r++) {
                float v = value_of(r, i);
                first += v + v, second += v + (v + v);
            }
            CHECK(host[i] == 2 * (first + second), "round %d, value %zu: %g, not %g", round, i, host[i],
                  2 * (first + second));
        }
        free(host);
    }
    float *blocks[] = {x, other, y[0], y[1], z};
    for (size_t i = 0; i < COUNT(blocks); i++) device.release(device.state, blocks[i]);
    end();
}

static void test_order(void **unused) {
    (void)unused;
    all_ranks(2, in_order);
    all_ranks(3, in_order);
}

/* Host memory, in more pieces than one. */
static void host_values(void) {
    enum { N = 9000 };
    begin(true, 60);
    double *sums = calloc(N, sizeof *sums);
    for (size_t i = 0; i < N; i++) sums[i] = (double)(rank + 1) * 1e10 + (double)i;
    ranks.sum(ranks.state, sums, N);
    for (size_t i = 0; i < N; i++) {
        double expected = (double)(count * (count + 1) / 2) * 1e10 + (double)(count * i);
        CHECK(sums[i] == expected, "sum %zu is %g, not %g", i, sums[i], expected);
    }
    char *bytes = calloc(N, 11); /* rank 0's, to all */
    for (size_t i = 0; i < 11 * N; i++) bytes[i] = (char)(rank == 0 ? i % 101 : 7);
    ranks.broadcast(ranks.state, bytes, 11 * N);
    for (size_t i = 0; i < 11 * N; i++) CHECK(bytes[i] == (char)(i % 101), "byte %zu is %d", i, bytes[i]);
    free(sums), free(bytes);
    end();
}

static void test_host_values(void **unused) {
    (void)unused;
    all_ranks(3, host_values);
}

/* The memory of an exchange in bfloat16 is told of before it is taken, and only then. */
static void memory(void) {
    ga_config c = ga_config_default();
    open_device(false);
    size_t alone = device.own_bytes(device.state, &c, GA_TRAINING);
    close_device();
    for (int halves = 0; halves < 2; halves++) {
        begin(halves, 60);
        size_t told = device.own_bytes(device.state, &c, GA_TRAINING) - alone, before = cucpu_memory_used();
        float *x = on_device(16);
        ranks.reduce_scatter(ranks.state, x, 16);
        CHECK(cucpu_memory_used() - before - 64 == told, "%zu bytes, not %zu", cucpu_memory_used() - before - 64, told);
        CHECK((told > 0) == halves, "%zu", told);
        CHECK(device.own_bytes(device.state, &c, GA_TRAINING) == alone, "it is counted twice");
        device.release(device.state, x);
        end();
    }
}

static void test_memory(void **unused) {
    (void)unused;
    all_ranks(1, memory);
}

/* ---- a whole training --------------------------------------------------------------------------------------------- */

enum { STEPS = 3, MICRO_BATCHES = 6, B = 2, T = 5, MOST_WEIGHTS = 4096 };

typedef struct {
    size_t n;
    double losses[STEPS], norms[STEPS];
    float weights[MOST_WEIGHTS];
} training;

static const char *variant; /* keys of the model */

/* Each rank takes every count-th micro-batch. */
static void train(const ga_ranks *with, training *t) {
    ga_error e;
    ga_config c = ga_config_default();
    configure(&c, "vocab_size=31 d_model=8 n_layers=2 n_heads=2 n_kv_heads=1 head_dim=4 d_ff=12 batch_size=2 "
                  "max_seq_len=5 warmup_steps=2 learning_rate=0.01 grad_clip=0.5 init_std=0.3");
    configure(&c, variant);
    device.ranks = with;
    ga_model *m = ga_create(&c, &device, GA_TRAINING, &e);
    CHECK(m, "%s", e.text);
    size_t first = with ? with->rank : 0, step = with ? with->count : 1;
    for (size_t s = 0; s < STEPS; s++) {
        for (size_t k = first; k < MICRO_BATCHES; k += step) {
            int32_t tokens[B * T], targets[B * T];
            uint64_t random = s * 1000 + k;
            fill_tokens(tokens, B * T, 31, &random), fill_tokens(targets, B * T, 31, &random);
            m->last_of_step = k + step >= MICRO_BATCHES;
            ga_result result = ga_forward_backward(m, tokens, targets, B, T, 1.0 / MICRO_BATCHES, NULL, NULL, &e);
            CHECK(result == GA_OK, "%s", e.text);
        }
        CHECK(ga_batch_loss(m, &t->losses[s], &e) == GA_OK, "%s", e.text);
        CHECK(ga_update(m, ga_learning_rate(&c, s, 20), &t->norms[s], &e) == GA_OK, "%s", e.text);
    }
    t->n = m->n_weights;
    CHECK(t->n <= MOST_WEIGHTS, "%zu", t->n);
    device.copy_out(device.state, t->weights, m->weights, t->n * sizeof(float));
    ga_destroy(m);
    device.ranks = NULL;
}

static void compare_training(bool halves, double tolerance) {
    static training alone, together;
    begin(halves, 60);
    train(NULL, &alone);
    train(&ranks, &together);
    for (size_t s = 0; s < STEPS; s++) {
        double loss = fabs(together.losses[s] - alone.losses[s]), norm = fabs(together.norms[s] - alone.norms[s]);
        CHECK(loss < tolerance && norm < tolerance * alone.norms[s], "step %zu: loss %g and %g, norm %g and %g", s,
              together.losses[s], alone.losses[s], together.norms[s], alone.norms[s]);
    }
    double error = 0, size = 0;
    for (size_t i = 0; i < alone.n; i++) {
        error += pow((double)together.weights[i] - (double)alone.weights[i], 2);
        size += pow((double)alone.weights[i], 2);
    }
    CHECK(sqrt(error / size) < tolerance, "weights differ by %g", sqrt(error / size));
    CHECK(halves == (sqrt(error / size) > 2e-6), "bfloat16 or not: %g", sqrt(error / size));
    training first = together;
    ranks.broadcast(ranks.state, &first, sizeof first);
    CHECK(memcmp(&first, &together, sizeof first) == 0, "not what rank 0 has");
    training again = {0};
    train(&ranks, &again);
    CHECK(memcmp(&again, &together, sizeof again) == 0, "not the same bits again");
    const char *why = ga_device_cuda_unrecorded(&device);
    CHECK(!why, "passes without an exchange are not recorded: %s", why);
    end();
}

static void train_in_float32(void) {
    compare_training(false, 2e-5);
}
static void train_in_bfloat16(void) {
    compare_training(true, 2e-2);
}

static void test_training(void **unused) {
    (void)unused;
    static const char *const variants[] = {"gate_position=G1", "n_experts=3 experts_per_token=2 tied_embeddings=1"};
    for (size_t v = 0; v < COUNT(variants); v++) {
        variant = variants[v];
        all_ranks(2 + v, train_in_float32);
        all_ranks(2, train_in_bfloat16);
    }
}

/* What a step asks of the host, with graphs of the passes that it knows: a pass and an exchange of a mixture's counts
 * are few launches, and only the update waits. */
static void few_launches(void) {
    ga_error e;
    ga_config c = ga_config_default();
    int32_t tokens[B * T] = {0};
    long launches = 0, waits = 0;
    begin(false, 60);
    configure(
        &c, "vocab_size=31 d_model=8 n_layers=5 n_heads=2 n_kv_heads=1 head_dim=4 d_ff=12 batch_size=2 max_seq_len=5");
    configure(&c, variant);
    device.ranks = &ranks;
    ga_model *m = ga_create(&c, &device, GA_TRAINING, &e);
    CHECK(m, "%s", e.text);
    device.wait(device.state);
    for (int k = 0; k < 4; k++) {
        m->last_of_step = k == 3;
        CHECK(ga_forward_backward(m, tokens, tokens, B, T, 0.25, NULL, NULL, &e) == GA_OK, "%s", e.text);
        if (k == 1) launches = cucpu_launches(), waits = cucpu_waits();
        if (k == 2) launches = cucpu_launches() - launches;
    }
    CHECK(launches <= 8, "%ld launches", launches);
    CHECK(cucpu_waits() == waits, "the host waits %ld times for passes", cucpu_waits() - waits);
    CHECK(ga_update(m, 1e-3, NULL, &e) == GA_OK, "%s", e.text);
    CHECK(cucpu_waits() <= waits + 2, "the host waits %ld times for the update", cucpu_waits() - waits);
    CHECK(!ga_device_cuda_unrecorded(&device), "%s", ga_device_cuda_unrecorded(&device));
    ga_destroy(m);
    end();
}

static void test_few_launches(void **unused) {
    (void)unused;
    static const char *const variants[] = {"gate_position=G1", "n_experts=3 experts_per_token=2", "gate_frozen=1"};
    for (size_t v = 0; v < COUNT(variants); v++) {
        variant = variants[v];
        all_ranks(2, few_launches);
    }
}

/* ---- what goes wrong ---------------------------------------------------------------------------------------------- */

/* Until the failure is heard of, as a training step would: by waiting for the GPU. */
static void expect_failure(const char *what) {
    ga_error e = {GA_OK, ""};
    double started = seconds();
    float *x = on_device(16 * count);
    while (device.status(device.state, &e) == GA_OK && seconds() < started + 20) {
        ranks.reduce_scatter(ranks.state, x, 16);
        ranks.wait(ranks.state);
        device.wait(device.state);
    }
    CHECK(e.result == GA_ERR_DEVICE, "nothing has failed");
    CHECK(strstr(e.text, "gated_attention_cuda.cuh:") && strstr(e.text, what), "%s", e.text);
    CHECK(seconds() < started + 20, "it took %g s", seconds() - started);
    double sum = 1;
    ranks.sum(ranks.state, &sum, 1);
    ranks.all_gather(ranks.state, x, 16);
    CHECK(ranks.status(ranks.state, &e) == GA_ERR_DEVICE && strstr(e.text, what), "afterwards: %s", e.text);
    device.release(device.state, x);
    ga_ranks_cuda_destroy(&ranks, true);
    ga_device_cuda_destroy(&device);
}

static void one_dies(void) {
    begin(false, 60);
    if (rank == 1) raise(SIGKILL);
    expect_failure("rank 1 has ended");
}

static void test_dead_rank(void **unused) {
    (void)unused;
    int ends[MOST_RANKS];
    run_ranks(3, one_dies, ends);
    assert_int_equal(WTERMSIG(ends[1]), SIGKILL);
    assert_int_equal(ends[0], 0);
    assert_int_equal(ends[2], 0);
}

static void one_dies_early(void) {
    ga_error e;
    open_device(false);
    if (rank == 1) raise(SIGKILL);
    ga_cuda_ranks_settings s = settings_of(false, 60);
    CHECK(ga_ranks_cuda(&ranks, &device, &s, &e) == GA_ERR_DEVICE, "it began");
    CHECK(strstr(e.text, "rank 1 has ended"), "%s", e.text);
    ga_device_cuda_destroy(&device);
}

static void test_dead_before(void **unused) {
    (void)unused;
    int ends[MOST_RANKS];
    run_ranks(2, one_dies_early, ends);
    assert_int_equal(WTERMSIG(ends[1]), SIGKILL);
    assert_int_equal(ends[0], 0);
}

/* Neither dead nor there: the others end when the time is over, and then it learns of it. */
static void one_is_silent(void) {
    begin(false, rank == 1 ? 60 : 0.5);
    if (rank == 1) {
        while (!here->gone[0]) nap();
        expect_failure("rank 0 has ended");
        return;
    }
    expect_failure("do not answer");
    exit(3);
}

static void test_silent_rank(void **unused) {
    (void)unused;
    int ends[MOST_RANKS];
    run_ranks(2, one_is_silent, ends);
    assert_int_equal(WEXITSTATUS(ends[0]), 3);
    assert_int_equal(ends[1], 0);
}

static void pause_for(double time) {
    for (double end = seconds() + time; seconds() < end;) nap();
}

/* Rank 0 works alone, the others wait for its word; a GPU computes before its exchange: nothing of it is late. */
static void patient(void) {
    double word = 0;
    begin(false, 0.4);
    if (rank == 0) pause_for(1);
    word = (double)rank + 5;
    ranks.broadcast(ranks.state, &word, sizeof word);
    CHECK(word == 5, "%g", word);
    float *x = on_device(16 * count);
    ranks.reduce_scatter(ranks.state, x, 16); /* its stream gets there when it is waited for */
    pause_for(1);
    ranks.wait(ranks.state);
    device.wait(device.state);
    for (int i = 0; i < 300; i++) ranks.sum(ranks.state, &word, 1); /* more marks than there are */
    pause_for(0.6);
    device.release(device.state, x);
    end();
}

static void test_patience(void **unused) {
    (void)unused;
    all_ranks(3, patient);
}

static void never_comes(void) {
    ga_error e;
    if (rank == 1) return;
    open_device(false);
    ga_cuda_ranks_settings s = settings_of(false, 0.3);
    CHECK(ga_ranks_cuda(&ranks, &device, &s, &e) == GA_ERR_DEVICE, "it began");
    CHECK(strstr(e.text, "do not answer"), "%s", e.text);
    s.rendezvous.share = share_nothing;
    CHECK(ga_ranks_cuda(&ranks, &device, &s, &e) == GA_ERR_DEVICE, "it began");
    CHECK(strstr(e.text, "nobody is here"), "%s", e.text);
    close_device();
}

static void test_missing_rank(void **unused) {
    (void)unused;
    all_ranks(2, never_comes);
}

/* The network breaks, so says NCCL. */
static void broken_network(void) {
    begin(false, 60);
    if (rank == 0) cucpu_fail_async();
    if (rank == 0) expect_failure("network error: what the emulated library says");
    if (rank == 0) exit(4);
    expect_failure("rank 0 has ended");
}

static void test_broken_network(void **unused) {
    (void)unused;
    int ends[MOST_RANKS];
    run_ranks(2, broken_network, ends);
    assert_int_equal(WEXITSTATUS(ends[0]), 4);
    assert_int_equal(ends[1], 0);
}

/* Ranks that do not exchange the same are found by the emulation. */
static void disagree(void) {
    begin(false, 60);
    float *x = on_device(32 * count);
    if (rank == 0)
        ranks.reduce_scatter(ranks.state, x, 32);
    else
        ranks.all_gather(ranks.state, x, 16);
    device.wait(device.state);
    ranks.wait(ranks.state);
    device.wait(device.state);
}

static void test_disagreement(void **unused) {
    (void)unused;
    int ends[MOST_RANKS];
    run_ranks(2, disagree, ends);
    assert_true(WEXITSTATUS(ends[0]) == 86 || WEXITSTATUS(ends[1]) == 86);
}

/* A whole life of one rank; each call of the libraries fails once. */
static ga_result use_ranks(ga_error *e, long *before_the_end) {
    ga_cuda_settings gpu = {0, false, false, false};
    ga_cuda_ranks_settings s = settings_of(true, 60);
    double one = 1;
    ga_error first = {GA_OK, ""}, second = {GA_OK, ""};
    if (ga_device_cuda(&device, gpu, e) != GA_OK) return e->result;
    ga_result result = ga_ranks_cuda(&ranks, &device, &s, e);
    if (result == GA_OK) {
        float *x = on_device(16);
        ranks.reduce_scatter(ranks.state, x, 16);
        ranks.all_gather(ranks.state, x, 16);
        ranks.wait(ranks.state);
        ranks.sum(ranks.state, &one, 1);
        ranks.broadcast(ranks.state, &one, sizeof one);
        (void)device.status(device.state, &first);
        (void)ranks.status(ranks.state, &second);
        *e = first.result != GA_OK ? first : second;
        result = e->result;
        *before_the_end = cucpu_calls();
        device.release(device.state, x);
        ga_ranks_cuda_destroy(&ranks, result != GA_OK);
    }
    ga_device_cuda_destroy(&device);
    return result;
}

static void failures(void) {
    ga_error e;
    long calls = 0, unused;
    cucpu_fail_call(0);
    CHECK(use_ranks(&e, &calls) == GA_OK, "%s", e.text);
    for (long n = 1; n <= calls; n++) {
        cucpu_fail_call(n);
        memset(&e, 0, sizeof e);
        CHECK(use_ranks(&e, &unused) != GA_OK, "call %ld of %ld fails, and nobody says so", n, calls);
        CHECK(strstr(e.text, "gated_attention_cuda.cuh:"), "%s", e.text);
    }
    for (long n = calls + 1; n < calls + 4; n++) { /* the end comes whatever fails */
        cucpu_fail_call(n);
        CHECK(use_ranks(&e, &unused) == GA_OK, "%ld of %ld: %s", n, calls, e.text);
    }
    CHECK(calls > 30, "%ld calls", calls);
}

static void test_failures(void **unused) {
    (void)unused;
    all_ranks(1, failures);
}

int main(int argc, char **argv) {
    use_default_threads();
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    if (argc > 2) cmocka_set_skip_filter(argv[2]);
    here = mmap(NULL, sizeof *here, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sums),         cmocka_unit_test(test_sums_bf16),      cmocka_unit_test(test_order),
        cmocka_unit_test(test_host_values),  cmocka_unit_test(test_memory),         cmocka_unit_test(test_training),
        cmocka_unit_test(test_dead_rank),    cmocka_unit_test(test_dead_before),    cmocka_unit_test(test_silent_rank),
        cmocka_unit_test(test_missing_rank), cmocka_unit_test(test_broken_network), cmocka_unit_test(test_disagreement),
        cmocka_unit_test(test_failures),     cmocka_unit_test(test_patience),       cmocka_unit_test(test_few_launches),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
