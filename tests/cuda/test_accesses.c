/* What the kernels of gated_attention_cuda.cuh cost a GPU's memory, counted on the CPU (cuda_cpu_count.cpp): the
 * 32-byte sectors of each access to global memory, and the turns of each to shared memory, where bank conflicts take
 * more. The models have the proportions of configs/rtx4060.cfg and of the paper's. Prints a table; none may take much
 * more than the fewest that would do. */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_cuda.cuh"
#include "testing.h"
#include "device.h"
#include "cuda_cpu_control.h"

static const char *const SMALL = "vocab_size=1000 d_model=128 n_layers=1 n_heads=4 n_kv_heads=1 head_dim=64 d_ff=344 "
                                 "max_seq_len=128 batch_size=1 gate_type=elementwise";
enum { N = 128 };

/* A step of training, and all that ./analyze measures. */
static void run(bool with_bf16, const char *variant) {
    ga_config c = ga_config_default();
    ga_error e;
    configure(&c, SMALL), configure(&c, variant);
    open_device(with_bf16);
    ga_model *m = ga_create(&c, &device, GA_TRAINING, &e);
    if (!m) fail_msg("ga_create: %s", e.text);
    int32_t tokens[N];
    uint64_t random = 3;
    double loss, norm;
    fill_tokens(tokens, N, c.vocab_size, &random);
    ga_statistics *s = ga_statistics_create_detailed(m);
    ga_observer o = {.statistics = s};
    expect_ok(ga_forward_backward(m, tokens, tokens, 1, N, 1, NULL, &loss, &e), &e);
    expect_ok(ga_forward(m, tokens, NULL, 1, N, &o, NULL, &e), &e);
    expect_ok(ga_update(m, 1e-3, &norm, &e), &e);
    ga_statistics_destroy(s);
    ga_destroy(m);
    close_device();
}

/* Kernels that may take more than others of the fewest: sectors, turns. */
static const struct {
    const char *kernel;
    double sectors, turns;
} allowed[] = {
    {"gai_k_grouped_rows<gai_tensor_tile>", 1.2, 1.1}, /* stores of single values */
    {"gai_k_grouped_weights<gai_tensor_tile>", 1.5, 1.1},
    {"gai_k_plain_backward_kv<1>", 1.2, 1.1}, /* lse and delta of columns */
    {"gai_k_route_rows", 1.3, 1.1},           /* a row for each slot: where it stands is what is looked for */
};

static double of_least(size_t n, size_t least) {
    return least ? (double)n / (double)least : 1;
}
static double each(size_t n, size_t accesses) {
    return accesses ? (double)n / (double)accesses : 0;
}

static void check_kernel(const cucpu_traffic *t) {
    double sectors = of_least(t->sectors, t->least_sectors), turns = of_least(t->wavefronts, t->least_wavefronts);
    double most_sectors = 1.1, most_turns = 1.1;
    printf("| %s | %zu | %.1f | %.2f | %zu | %.1f | %.2f |\n", t->kernel, t->requests, each(t->sectors, t->requests),
           sectors, t->shared_requests, each(t->wavefronts, t->shared_requests), turns);
    for (size_t i = 0; i < COUNT(allowed); i++)
        if (strcmp(t->kernel, allowed[i].kernel) == 0) most_sectors = allowed[i].sectors, most_turns = allowed[i].turns;
    expect_below(sectors, most_sectors, "sectors of %s, of the fewest", t->kernel);
    expect_below(turns, most_turns, "turns of %s, of the fewest", t->kernel);
}

static void test_accesses(void **unused) {
    (void)unused;
    cucpu_traffic all[128];
    cucpu_count(true);
    run(true, ""), run(true, "gate_type=headwise head_dim=128"), run(true, "n_experts=4 experts_per_token=2 d_ff=88");
    run(false, "");
    cucpu_count(false);
    printf("| kernel | accesses | sectors each | of the fewest | to shared memory | turns each | of the fewest |\n"
           "|---|---:|---:|---:|---:|---:|---:|\n");
    size_t n = cucpu_counted(all, COUNT(all));
    if (n < 50) fail_msg("only %zu kernels ran", n);
    for (size_t i = 0; i < n; i++) check_kernel(&all[i]);
}

int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_accesses)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
