/* The AMX products of gated_attention_x86.h on any machine with AVX512_BF16: the tile instructions are replaced by
 * plain C that does what they are defined to do, so that packing, tiles and edges are tested where there is no AMX. On
 * a machine that has it, test_x86 tests the instructions themselves. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes)   tile_configure((const unsigned char *)(shapes))
#define _tile_release()            ((void)0)
#define _tile_loadd(t, p, stride)  tile_load(t, (const char *)(p), stride)
#define _tile_stored(t, p, stride) tile_store(t, (char *)(p), stride)
#define _tile_zero(t)              memset(tiles[t], 0, sizeof tiles[t])
#define _tile_dpbf16ps(c, a, b)    tile_multiply(c, a, b)

static float tiles[8][16][16];

static void tile_configure(const unsigned char *shapes) { /* palette 1; 64 bytes and 16 lines for each of eight tiles */
    if (shapes[0] != 1) abort();
    for (int i = 0; i < 8; i++)
        if (shapes[16 + 2 * i] != 64 || shapes[17 + 2 * i] != 0 || shapes[48 + i] != 16) abort();
}
static void tile_load(int t, const char *p, size_t stride) {
    for (size_t i = 0; i < 16; i++) memcpy(tiles[t][i], p + i * stride, 64);
}
static void tile_store(int t, char *p, size_t stride) {
    for (size_t i = 0; i < 16; i++) memcpy(p + i * stride, tiles[t][i], 64);
}
static float bf16_value(const float *words, size_t i) {
    uint16_t half;
    float x;
    memcpy(&half, (const char *)words + 2 * i, 2);
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&x, &bits, 4);
    return x;
}
static void tile_multiply(int c, int a, int b) {
    for (size_t i = 0; i < 16; i++)
        for (size_t k = 0; k < 16; k++)
            for (size_t j = 0; j < 16; j++) {
                tiles[c][i][j] += bf16_value(tiles[a][i], 2 * k) * bf16_value(tiles[b][k], 2 * j);
                tiles[c][i][j] += bf16_value(tiles[a][i], 2 * k + 1) * bf16_value(tiles[b][k], 2 * j + 1);
            }
}
#endif

#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_x86.h"
#include "testing.h"

#ifdef GAI_X86
static ga_real *rounded_reals(size_t n, uint64_t *random) {
    ga_real *x = normal_reals(n, 1, random);
    for (size_t i = 0; i < n; i++) x[i] = bf16_rounded(x[i]);
    return x;
}

static void expect_same(const ga_real *a, const ga_real *b, size_t n, double tolerance, const char *what,
                        const size_t size[3]) {
    double error = 0, norm = norm_of(b, n);
    for (size_t i = 0; i < n; i++) error += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    expect_below(sqrt(error), tolerance * fmax(norm, 1), "%s of %zu x %zu x %zu", what, size[0], size[1], size[2]);
}

static void check(const ga_device *d, size_t M, size_t O, size_t I) {
    uint64_t random = M + O + I;
    size_t size[3] = {M, O, I};
    ga_real *x = rounded_reals(M * I, &random), *dy = rounded_reals(M * O, &random), *w = rounded_reals(O * I, &random);
    ga_real *y = reals(M * O), *dx = reals(M * I), *dw = normal_reals(O * I, 1, &random),
            *logits = reals(GA_HEAD_ROWS * O);
    ga_real *y_expected = reals(M * O), *dx_expected = reals(M * I), *dw_expected = reals(O * I);
    int32_t *targets = (int32_t *)calloc(M, sizeof *targets);
    assert_non_null(targets);
    fill_tokens(targets, M, O, &random);
    memcpy(dw_expected, dw, O * I * sizeof *dw);
    d->linear_forward(d->state, y, x, w, M, O, I);
    ga_linear_forward(y_expected, x, w, M, O, I);
    expect_same(y, y_expected, M * O, 1e-5, "linear_forward", size);
    d->linear_backward(d->state, dx, dw, dy, x, w, M, O, I);
    ga_linear_backward(dx_expected, dw_expected, dy, x, w, M, O, I);
    expect_same(dx, dx_expected, M * I, 1e-5, "dx", size);
    expect_same(dw, dw_expected, O * I, 1e-5, "dw", size);
    d->head_loss(d->state, y, dx, dw, logits, x, w, targets, M, I, O, (ga_real[]){1});
    ga_head_loss(y_expected, dx_expected, dw_expected, logits, x, w, targets, M, I, O, (ga_real[]){1});
    expect_same(y, y_expected, M, 1e-5, "losses", size);
    expect_same(dx, dx_expected, M * I, 3e-2, "dx of the loss", size);
    expect_same(dw, dw_expected, O * I, 3e-2, "dw of the loss", size);
    d->weights_changed(d->state, w, O * I);
    ga_real *all[] = {x, dy, w, y, dx, dw, logits, y_expected, dx_expected, dw_expected};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
    free(targets);
}

static void check_sdpa(const ga_device *d, size_t T, size_t D) {
    ga_shape n = {1, T, T, 2, 1, D};
    size_t q_size = T * 2 * D, k_size = T * D, size[3] = {1, T, D};
    uint64_t random = T + D;
    ga_real *q = rounded_reals(q_size, &random), *k = rounded_reals(k_size, &random),
            *v = rounded_reals(k_size, &random);
    ga_real *dy = rounded_reals(q_size, &random), *y = reals(q_size), *lse = reals(2 * T),
            *scratch = reals(2 * T * (2 * D + 1));
    ga_real *dq = reals(q_size), *dk = reals(k_size), *dv = reals(k_size), *expected = reals(q_size);
    ga_real *dq_expected = reals(q_size), *dk_expected = reals(k_size), *dv_expected = reals(k_size);
    d->sdpa_forward(d->state, y, lse, q, k, v, NULL, n);
    ga_sdpa_forward(expected, lse, q, k, v, NULL, n);
    expect_same(y, expected, q_size, 6e-3, "sdpa_forward", size);
    d->sdpa_backward(d->state, dq, dk, dv, NULL, scratch, dy, expected, lse, q, k, v, NULL, n);
    ga_sdpa_backward(dq_expected, dk_expected, dv_expected, NULL, scratch, dy, expected, lse, q, k, v, NULL, n);
    expect_same(dq, dq_expected, q_size, 6e-3, "dq", size);
    expect_same(dk, dk_expected, k_size, 6e-3, "dk", size);
    expect_same(dv, dv_expected, k_size, 6e-3, "dv", size);
    ga_real *all[] = {q, k, v, dy, y, lse, scratch, dq, dk, dv, expected, dq_expected, dk_expected, dv_expected};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
}

static void test_products(void **unused) {
    (void)unused;
    static const size_t odd[] = {1, 3, 17, 33, 65, 129};
    ga_x86_settings settings = {"avx512bf16", true};
    ga_device d;
    if (ga_device_x86(&d, settings, NULL) != GA_OK) skip();
    ((gai_x86_state *)d.state)->linear = gai_amx_products();
    for (size_t a = 0; a < COUNT(odd); a++)
        for (size_t b = 1; b < COUNT(odd); b++)
            for (size_t c = 0; c < COUNT(odd); c++) check(&d, odd[a], odd[b], odd[c]);
    check(&d, 300, 40, 70);
    check(&d, 5, 40, 1100);
    for (size_t i = 1; i < COUNT(odd); i++) check_sdpa(&d, odd[i], 34), check_sdpa(&d, odd[i], 64);
    ga_device_x86_destroy(&d);
}
#else
static void test_products(void **unused) {
    (void)unused;
    skip();
}
#endif

int main(void) {
    use_threads(1); /* there is one set of tiles */
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_products)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
