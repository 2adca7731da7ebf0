/* Every operator of gated_attention_cuda.cuh against plain C, on odd sizes; whole training steps of each variant. The same
 * file for a GPU and for the CPU by cuda_cpu.h. */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_cuda.cuh"
#include "testing.h"

static ga_device device; /* of the test that runs */

static void open_device(bool bf16) {
    ga_cuda_settings settings = {0, bf16, false};
    ga_error e;
    expect_ok(ga_device_cuda(&device, settings, &e), &e);
}

static void close_device(void) {
    ga_error e;
    expect_ok(device.status(device.state, &e), &e);
    ga_device_cuda_destroy(&device);
}

/* A copy on the device; the host's stays. */
static void *on_device(const void *host, size_t bytes) {
    void *p = device.allocate(device.state, bytes);
    if (!p) fail_msg("no device memory");
    device.copy_in(device.state, p, host, bytes);
    return p;
}
static ga_real *reals_on_device(const ga_real *host, size_t n) {
    return (ga_real *)on_device(host, n * sizeof *host);
}

/* Compares n values on the device with those expected, each tensor on its own scale, and frees them. */
static void expect_on_device(ga_real *p, const ga_real *expected, size_t n, double tolerance, const char *what) {
    ga_real *host = reals(n);
    double *b = (double *)calloc(n, sizeof *b);
    device.copy_out(device.state, host, p, n * sizeof *host);
    for (size_t i = 0; i < n; i++) b[i] = (double)expected[i];
    expect_below(difference(host, b, n), tolerance, "%s", what);
    device.release(device.state, p);
    free(host), free(b);
}

static const size_t odd[] = {1, 3, 17, 64, 129};

static void check_rmsnorm(size_t N, size_t C) {
    uint64_t random = N * 1000 + C;
    ga_real *x = normal_reals(N * C, 3, &random), *w = normal_reals(C, 1, &random), *h = reals(N * C), *rstd = reals(N);
    ga_rmsnorm_forward(h, rstd, x, w, N, C, (ga_real)1e-6);
    ga_real *dx = reals_on_device(x, N * C), *dw = reals_on_device(w, C), *dh = reals_on_device(x, N * C),
            *dr = reals_on_device(rstd, N);
    device.rmsnorm_forward(device.state, dh, dr, dx, dw, N, C, (ga_real)1e-6);
    expect_on_device(dh, h, N * C, 1e-6, "rmsnorm_forward");
    expect_on_device(dr, rstd, N, 1e-6, "rmsnorm_forward, rstd");
    device.release(device.state, dx), device.release(device.state, dw);
    free(x), free(w), free(h), free(rstd);
}

static void test_rmsnorm(void **unused) {
    (void)unused;
    open_device(false);
    for (size_t a = 0; a < COUNT(odd); a++)
        for (size_t b = 0; b < COUNT(odd); b++) check_rmsnorm(odd[a], odd[b]);
    check_rmsnorm(2, 1028);
    close_device();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rmsnorm),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
