/* Matrix products of the sizes in rtx4060.cfg against the peak of the processor, which a loop that only touches
 * registers measures in the same run.
 *
 *     cc -std=c11 -O3 -march=native -ffp-contract=fast -fopenmp -I. tests/bench/products.c -o build/products -lm
 *     build/products [M [rounds]]          GA_ISA=... for one instruction set, OMP_NUM_THREADS=1 for one core
 *
 * With one thread the time is that which the processor spent on it, so that other load on the machine
 * disturbs little. */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_x86.h"

enum { MOST = 64 };

static double seconds(void) {
    struct timespec t;
#ifdef _OPENMP
    clock_gettime(omp_get_max_threads() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
#else
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
#endif
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the peak: 24 sums in registers, no memory ------------------------------------------------------------------------ */

#ifdef GAI_X86
#define REGISTER_LOOP(name, targets, vector, one, multiply_add)                                              \
    __attribute__((target(targets))) static float name(size_t n) {                                           \
        vector sum[12], x = one, y = one;                                                                    \
        float out[sizeof(vector) / sizeof(float)];                                                           \
        for (int i = 0; i < 12; i++) sum[i] = one;                                                           \
        for (size_t k = 0; k < n; k++) {                                                                     \
            __asm__ volatile("" : "+v"(x), "+v"(y)); /* not known, so that nothing is left out */            \
            sum[0] = multiply_add(sum[0]), sum[1] = multiply_add(sum[1]), sum[2] = multiply_add(sum[2]);     \
            sum[3] = multiply_add(sum[3]), sum[4] = multiply_add(sum[4]), sum[5] = multiply_add(sum[5]);     \
            sum[6] = multiply_add(sum[6]), sum[7] = multiply_add(sum[7]), sum[8] = multiply_add(sum[8]);     \
            sum[9] = multiply_add(sum[9]), sum[10] = multiply_add(sum[10]), sum[11] = multiply_add(sum[11]); \
        }                                                                                                    \
        for (int i = 1; i < 12; i++) sum[0] += sum[i];                                                       \
        memcpy(out, &sum[0], sizeof out);                                                                    \
        return out[0];                                                                                       \
    }
#define FMA256(s) _mm256_fmadd_ps(x, y, s)
#define FMA512(s) _mm512_fmadd_ps(x, y, s)
#define DOT512(s) _mm512_dpbf16_ps(s, (__m512bh)x, (__m512bh)y)
REGISTER_LOOP(loop_avx2, "avx2,fma", __m256, _mm256_set1_ps(0.1f), FMA256)
REGISTER_LOOP(loop_avx512, "avx512f,fma", __m512, _mm512_set1_ps(0.1f), FMA512)
REGISTER_LOOP(loop_bf16, "avx512f,avx512bf16,fma", __m512, _mm512_set1_ps(0.1f), DOT512)

/* Four tiles of sums, four of operands that are not zero: the processor saves power on zeros. */
__attribute__((target("amx-tile,amx-bf16"))) static float loop_amx(size_t n) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t lines[16];
    } shapes;
    uint16_t operands[1024];
    float out[256];
    uint64_t random = 1;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.lines[i] = 16;
    for (int i = 0; i < 1024; i++) operands[i] = (uint16_t)(0x3c00 | (ga_random_bits(&random) & 0x81ff));
    __asm__ volatile("" : : "r"(&shapes), "r"(operands) : "memory"); /* they are in memory by now */
    _tile_loadconfig(&shapes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, operands, 64);
    _tile_loadd(5, operands + 128, 64);
    _tile_loadd(6, operands + 256, 64);
    _tile_loadd(7, operands + 512, 64);
    for (size_t k = 0; k < n; k++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 64);
    __asm__ volatile("" : : "r"(out) : "memory");
    _tile_release();
    return out[0];
}

/* FLOP/s of all threads. */
static double peak(const ga_device *d) {
    const gai_x86_state *s = (const gai_x86_state *)d->state;
    if (!s) return NAN; /* plain C */
    float (*loop)(size_t) = s->isa == GAI_X86_AVX2 ? loop_avx2 : loop_avx512;
    size_t n = 2000000, threads = gai_x86_threads();
    volatile float sink = 0;
    double per_step = 12 * 2 * (s->isa == GAI_X86_AVX2 ? 8 : 16);
    if (s->bf16) loop = loop_bf16, per_step *= 2;
    if (s->bf16 && s->isa == GAI_X86_AMX) loop = loop_amx, per_step = 4 * 2 * 16 * 16 * 32;
    double start = seconds();
    GAI_PARALLEL_FOR
    for (size_t t = 0; t < threads; t++) sink = loop(n);
    (void)sink;
    return per_step * (double)(n * threads) / (seconds() - start);
}
#else
static double peak(const ga_device *d) {
    (void)d;
    return NAN;
}
#endif

/* ---- the products ------------------------------------------------------------------------------------------------------ */

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *x, size_t n) {
    qsort(x, n, sizeof *x, ascending);
    return x[n / 2];
}

static ga_real *filled(const ga_device *d, size_t n) {
    ga_real *x = (ga_real *)d->allocate(d->state, n * sizeof *x);
    uint64_t random = n;
    if (!x) {
        fputs("products: not enough memory\n", stderr);
        exit(1);
    }
    for (size_t i = 0; i < n; i++) x[i] = (ga_real)(ga_random_uniform(&random) - 0.5);
    return x;
}

/* One layer's three products by turns with the register loop; dX is what linear_backward takes beyond dW. */
static void measure(const ga_device *d, size_t M, size_t O, size_t I, size_t rounds) {
    double forward[MOST], both[MOST], weight[MOST], top[MOST], work = 2e-9 * (double)M * (double)O * (double)I;
    ga_real *x = filled(d, M * I), *w = filled(d, O * I), *y = filled(d, M * O), *dx = filled(d, M * I),
            *dw = filled(d, O * I);
    size_t repeat = (size_t)(2 / work) + 1;
    d->linear_forward(d->state, y, x, w, M, O, I); /* packs what is kept */
    d->linear_backward(d->state, dx, dw, y, x, w, M, O, I);
    for (size_t r = 0; r < rounds; r++) {
        top[r] = peak(d) * 1e-9;
        double start = seconds();
        for (size_t i = 0; i < repeat; i++) d->linear_forward(d->state, y, x, w, M, O, I);
        forward[r] = (seconds() - start) / (double)repeat, start = seconds();
        for (size_t i = 0; i < repeat; i++) d->linear_backward(d->state, NULL, dw, y, x, w, M, O, I);
        weight[r] = (seconds() - start) / (double)repeat, start = seconds();
        for (size_t i = 0; i < repeat; i++) d->linear_backward(d->state, dx, dw, y, x, w, M, O, I);
        both[r] = (seconds() - start) / (double)repeat;
    }
    double f = median(forward, rounds), g = median(weight, rounds), b = median(both, rounds) - g,
           p = median(top, rounds);
    printf("%5zu x %5zu x %4zu %8.0f %5.0f %% %8.0f %5.0f %% %8.0f %5.0f %% %9.0f\n", M, O, I, work / f,
           100 * work / f / p, work / b, 100 * work / b / p, work / g, 100 * work / g / p, p);
    fflush(stdout);
    ga_real *all[] = {x, w, y, dx, dw};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) d->release(d->state, all[i]);
}

int main(int argc, char **argv) {
    static const size_t sizes[][2] = {{1280, 512}, {512, 512}, {2752, 512}, {512, 1376}, {32000, 512}};
    size_t M = argc > 1 ? strtoul(argv[1], NULL, 10) : 512, rounds = argc > 2 ? strtoul(argv[2], NULL, 10) : 7;
    if (M == 0 || M > 65536 || rounds == 0 || rounds > MOST) {
        fprintf(stderr, "usage: %s [M [rounds]]   M from 1 to 65536, rounds from 1 to %d\n", argv[0], MOST);
        return 2;
    }
    for (int bf16 = 0; bf16 < 2; bf16++) {
        ga_x86_settings settings = {NULL, bf16};
        ga_device d;
        ga_error e;
        if (ga_device_x86(&d, settings, &e) != GA_OK) {
            fprintf(stderr, "products: %s\n", e.text);
            return 1;
        }
        if (!bf16 || ga_device_x86_bf16(&d)) {
            printf("%s\n%20s %16s %16s %16s %9s\n", d.name, "M x O x I", "forward GF/s", "dX GF/s", "dW GF/s", "peak");
            for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) measure(&d, M, sizes[i][0], sizes[i][1], rounds);
        }
        ga_device_x86_destroy(&d);
    }
    return 0;
}
