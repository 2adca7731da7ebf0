/* gated_attention_x86.h - fast operators for gated_attention.h on x86 processors: AVX2, AVX-512, AVX512_BF16 and AMX.
 *
 * An optional companion. Include it after gated_attention.h, with the same macro in the file that implements:
 *
 *     #define GATED_ATTENTION_IMPLEMENTATION
 *     #include "gated_attention.h"
 *     #include "gated_attention_x86.h"
 *
 *     ga_x86_settings settings = {NULL, true};      // the best instruction set; bfloat16 products if it has them
 *     ga_device device;
 *     if (ga_device_x86(&device, settings, &e) != GA_OK) ...
 *     ga_model *m = ga_create(&c, &device, GA_TRAINING, &e);
 *     ...
 *     ga_destroy(m);
 *     ga_device_x86_destroy(&device);
 *
 * Which instructions are used is decided at run time: the program needs no -march flag. On other processors and
 * compilers than x86-64 with gcc 11 or clang 12 (or later), and with GA_DOUBLE, the device is that of ga_device_cpu().
 * No result depends on the number of threads. A device is used by one thread of the program at a time; it starts its
 * own team.
 *
 * Numbers: float32 differs from plain C only in the order of additions. With bfloat16 the operands of products are
 * rounded to nearest even (denormal values become 0); all else is float32: sums, weights, softmax, norms, losses.
 *
 * SECTIONS: how a fast product is built; the system; products by all threads; linear maps; output head and
 * cross-entropy; attention; elementwise operators; what this machine has. Then "GAX_PASS", for which the file includes
 * itself, once for each instruction set: one text, in which GAX_V is a vector of GAX_LANES words. Packing; the kernel;
 * exponentials; rows of the elementwise operators.
 */
#pragma push_macro("I") /* of <complex.h>; a letter here */
#undef I

#ifndef GAX_PASS

#ifndef GATED_ATTENTION_X86_H
#define GATED_ATTENTION_X86_H

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char *isa; /* c, avx2, avx512, avx512bf16 or amx; NULL: environment variable GA_ISA, else the best there is */
    bool bf16;       /* bfloat16 products where the instruction set has them; weights and sums stay float32 */
} ga_x86_settings;

/* GA_ERR_CONFIG when an instruction set is asked for that does not exist or that this processor lacks. */
GA_API ga_result ga_device_x86(ga_device *device, ga_x86_settings settings, ga_error *e);
/* After the models that use it. */
GA_API void ga_device_x86_destroy(ga_device *device);
/* Whether its products read bfloat16. */
GA_API bool ga_device_x86_bf16(const ga_device *device);

#ifdef __cplusplus
}
#endif
#endif /* GATED_ATTENTION_X86_H */

/* ==== implementation ============================================================================================== */

#if defined(GATED_ATTENTION_IMPLEMENTATION) && !defined(GATED_ATTENTION_X86_IMPLEMENTED)
#define GATED_ATTENTION_X86_IMPLEMENTED

#if defined(__clang__) && __clang_major__ >= 12
#define GAI_X86_COMPILER
#elif defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define GAI_X86_COMPILER
#endif
#if defined(__x86_64__) && defined(GAI_X86_COMPILER) && !defined(GA_DOUBLE)
#define GAI_X86
#include <cpuid.h>
#include <immintrin.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { GAI_X86_C, GAI_X86_AVX2, GAI_X86_AVX512, GAI_X86_BF16, GAI_X86_AMX, GAI_X86_COUNT } gai_x86_isa;

#ifdef GAI_X86

/* ---- how a fast product is built --------------------------------------------------------------------------------- */

/* A core multiplies far faster than it loads, so what is loaded must be used many times. Three measures:
 *
 * 1. Register block. ROWS x COLUMNS values of C stay in registers while the contraction runs over k. Each step loads
 *    one line of B (COLUMNS values) and one of A (ROWS values), and multiplies every one with every other: 14 + 32
 *    values loaded for 448 multiplications with AVX-512.
 *
 * 2. Packing. Both operands are copied into panels, so that the kernel reads memory strictly forwards, whatever the
 *    layout was: a line is what one step of k needs. Rows and columns that do not exist are zeros.
 *
 *            A panel, ROWS wide              B panel, COLUMNS wide
 *            k  +---------+                  k  +------------------+
 *            |  | a a a a |                  |  | b b b b b b b b b|  line k
 *            v  | a a a a |                  v  | b b b b b b b b b|
 *               +---------+                     +------------------+        C[i][j] += A[k][i] B[k][j]
 *
 * 3. Blocks for the caches. The steps of k are cut into parts so that an A panel stays in the first-level cache and the
 *    A panels of one task (GAI_X86_BLOCK rows) in the second-level cache, while each B panel passes along them all.
 *
 *               B   | panel | panel | ...                    task: a block of rows, all panels of B
 *         A         +-------+-------+----
 *        strip      | C     |       |                        for each part of k
 *        strip      |       |       |                            pack the strips of A
 *        ...        |       |       |                            for each panel of B
 *                                                                    for each strip: kernel
 *
 * A word is 32 bits: a float, or two bfloat16 neighbours along k, (2q, 2q+1), for instructions that multiply pairs and
 * add both products to one float32 sum. Beside the multiplication nothing tells them apart: K float32 steps or K/2
 * steps of pairs. bfloat16 is rounded to nearest even while packing; packed weights are kept until the optimiser
 * changes them.
 *
 * The sum over k of one element of C has the same order however many rows, tasks and threads there are. */

enum {
    GAI_X86_BLOCK = 128,      /* rows of a task */
    GAI_X86_STEPS = 512,      /* steps of k whose A panels are packed at a time */
    GAI_X86_SHARED = 8 << 20, /* bytes of B that are packed at a time when they are not kept */
    GAI_X86_LINES = 32,       /* steps of k that are packed at a time where k is not the inner dimension */
    GAI_X86_PAD = 16          /* the steps of a panel are a multiple of this */
};

/* An operand in memory: value k of row i (of column i for B) is p[i * stride + k], or p[k * stride + i] if k_first. */
typedef struct {
    const float *p; /* with `half` bfloat16 values, two in a float */
    size_t stride;
    bool k_first, half;
} gai_x86_matrix;

/* The matrix from row i and value k on. */
GAI_INLINE gai_x86_matrix gai_x86_part(gai_x86_matrix m, size_t i, size_t k) {
    size_t at = m.k_first ? k * m.stride + i : i * m.stride + k;
    m.p = m.half ? (const float *)(const void *)((const uint16_t *)(const void *)m.p + at) : m.p + at;
    return m;
}

/* Packed panels: line k of panel i is p + i * panel + k * line. */
typedef struct {
    const float *p;
    size_t panel, line;
} gai_x86_panels;

/* What differs between instruction sets. The pack functions make one panel of `rows` rows and K values of k. */
typedef struct {
    size_t rows, a_width; /* rows of C in a register block; words in a line of an A panel */
    size_t columns;       /* columns of C in it; words in a line of a B panel */
    size_t word;          /* values of k in a word */
    size_t align;         /* blocks of rows begin at multiples of this */
    void (*pack_a)(float *to, gai_x86_matrix a, size_t rows, size_t K);
    void (*pack_b)(float *to, gai_x86_matrix b, size_t columns, size_t K);
    /* C (M, N) (+)= A B for packed panels, those of A with `unit` rows */
    void (*multiply)(float *c, size_t ldc, gai_x86_panels a, size_t unit, gai_x86_panels b, size_t M, size_t N,
                     size_t steps, bool add);
    /* e_j = exp(min(l_j - reference, 75)) of n logits, stored in this precision unless e is NULL; returns their sum */
    float (*exponentials)(void *e, const float *l, size_t n, float reference);
} gai_x86_products;

enum { GAI_X86_QUERIES = 64, GAI_X86_KEYS = 128 }; /* of a tile of attention */

/* Functions on float32 vectors. */
typedef struct {
    /* Softmax of scores s (keys, QUERIES), a running maximum and sum for each query: s becomes exp(scale s - top),
     * `keep` is what earlier sums and outputs are to be multiplied by */
    void (*softmax)(float *s, float *top, float *sum, float *keep, size_t keys, size_t queries, float scale);
    /* p_j = exp(scale p_j - lse), ds_j = p_j (ds_j - delta) scale for n keys of one query */
    void (*softmax_backward)(float *p, float *ds, size_t n, float scale, float lse, float delta);
    /* One row of the operators of the same name; rmsnorm returns 1 / sqrt(mean(x^2) + eps), dw is added to. */
    float (*rmsnorm)(float *h, const float *x, const float *w, size_t n, float eps);
    void (*rmsnorm_backward)(float *dx, float *dw, const float *dh, const float *x, const float *w, float r, size_t n,
                             bool add);
    void (*head)(float *y, const float *x, const float *w, const float *rope, size_t D, float eps);
    void (*head_backward)(float *dx, float *dw, const float *dy, const float *x, const float *w, const float *rope,
                          size_t D, float eps);
    void (*gate)(float *o, const float *y, const float *s, size_t n); /* o = y sigmoid(s) */
    void (*gate_backward)(float *dy, float *ds, const float *d_o, const float *y, const float *s, size_t n);
    float (*scale)(float *o, const float *y, const float *other, size_t n, float factor); /* o = factor y; y . other */
    void (*swiglu)(float *a, const float *u, size_t F);
    void (*swiglu_backward)(float *du, const float *da, const float *u, size_t F);
    /* For one row or a few, when memory is what takes the time: y_j = x . w_j for rows of w, and y = sum_j p_j v_j */
    void (*dots)(float *y, const float *x, const float *w, size_t stride, size_t rows, size_t n);
    void (*combine)(float *y, const float *p, const float *v, size_t stride, size_t rows, size_t n);
} gai_x86_vectors;

/* Working memory, kept between calls: fresh pages cost more than what is computed on them. */
typedef struct {
    char *p;
    size_t bytes;
} gai_x86_room;

/* A packed weight matrix, kept from one optimiser step to the next. */
typedef struct {
    const float *w;
    size_t O, I;
    bool k_first, stale;
    float *data;
} gai_x86_pack;

typedef struct {
    char name[64];
    gai_x86_isa isa;
    bool bf16;
    gai_x86_products linear, single; /* as the settings want it; always float32 */
    gai_x86_vectors vectors;
    gai_x86_pack *packs;
    size_t n_packs;
    gai_x86_room room, head_room;
} gai_x86_state;

#if !defined(__clang__) /* gcc 12 takes the deliberately undefined operands in its own immintrin.h for mistakes */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define GAX_PASS 1 /* AVX2 */
#include "gated_attention_x86.h"
#define GAX_PASS 2 /* AVX-512 */
#include "gated_attention_x86.h"
#define GAX_PASS 3 /* AVX512_BF16 */
#include "gated_attention_x86.h"
#define GAX_PASS 4 /* AMX */
#include "gated_attention_x86.h"
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

/* ---- the system -------------------------------------------------------------------------------------------------- */

#ifdef __linux__
GAI_FN long gai_x86_syscall(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
#endif

/* Asks for 2 MB pages: panels are read and written with large strides. */
GAI_FN void gai_x86_advise(void *p, size_t bytes) {
#ifdef __linux__
    enum { SYS_MADVISE = 28, HUGEPAGE = 14 };
    gai_x86_syscall(SYS_MADVISE, (long)p, (long)bytes, HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

/* What stands before a block of device memory. */
typedef struct {
    char *raw;
    size_t bytes;
} gai_x86_block;

enum { GAI_X86_PAGE = 2 << 20 };

GAI_FN char *gai_x86_take(size_t bytes) {
    size_t align = bytes >= GAI_X86_PAGE ? GAI_X86_PAGE : 64;
    if (bytes > SIZE_MAX - 2 * GAI_X86_PAGE) return NULL;
    char *raw = (char *)GA_MALLOC(bytes + align + sizeof(gai_x86_block));
    if (!raw) return NULL;
    char *p = raw + sizeof(gai_x86_block);
    p += (align - (uintptr_t)p % align) % align;
    gai_x86_block block = {raw, bytes};
    memcpy(p - sizeof block, &block, sizeof block);
    if (align == GAI_X86_PAGE) gai_x86_advise(p, bytes / GAI_X86_PAGE * GAI_X86_PAGE);
    return p;
}

GAI_FN void gai_x86_give(void *p) {
    gai_x86_block block;
    if (!p) return;
    memcpy(&block, (char *)p - sizeof block, sizeof block);
    GA_FREE(block.raw);
}

GAI_FN void *gai_x86_allocate(void *state, size_t bytes) {
    (void)state;
    char *p = gai_x86_take(bytes);
    if (p) memset(p, 0, bytes);
    return p;
}

/* Working memory for at least n values; NULL when there is none. */
GAI_FN float *gai_x86_reserve(gai_x86_room *room, size_t n) {
    size_t bytes = n * sizeof(float);
    if (bytes > room->bytes) {
        gai_x86_give(room->p);
        room->p = gai_x86_take(bytes);
        room->bytes = room->p ? bytes : 0;
    }
    return (float *)(void *)room->p;
}

GAI_INLINE size_t gai_x86_threads(void) {
#ifdef _OPENMP
    return (size_t)omp_get_max_threads();
#else
    return 1;
#endif
}

GAI_INLINE size_t gai_x86_thread(void) {
#ifdef _OPENMP
    return (size_t)omp_get_thread_num();
#else
    return 0;
#endif
}

/* ---- products by all threads ------------------------------------------------------------------------------------- */

GAI_INLINE size_t gai_x86_round_up(size_t a, size_t b) {
    return gai_ceil_div(a, b) * b;
}

/* Lines of a panel of K values. */
GAI_INLINE size_t gai_x86_lines(const gai_x86_products *p, size_t K) {
    return gai_x86_round_up(gai_ceil_div(K, p->word), GAI_X86_PAD);
}

/* Packs columns 0..N and values 0..K of B, panels of `lines` lines; memory is read in long runs. */
GAI_FN void gai_x86_pack_b(const gai_x86_products *p, float *to, size_t lines, gai_x86_matrix b, size_t N, size_t K) {
    size_t panels = gai_ceil_div(N, p->columns), run = b.k_first ? GAI_X86_LINES * p->word : K;
    size_t runs = gai_ceil_div(K, run), tasks = b.k_first ? runs : panels;
    GAI_PARALLEL_FOR
    for (size_t task = 0; task < tasks; task++)
        for (size_t other = 0; other < (b.k_first ? panels : runs); other++) {
            size_t j = (b.k_first ? other : task) * p->columns, k = (b.k_first ? task : other) * run;
            p->pack_b(to + (j * lines + k / p->word * p->columns), gai_x86_part(b, j, k), gai_min(p->columns, N - j),
                      gai_min(run, K - k));
        }
}

/* One product C (M, N) (+)= A B with a contraction of K values. */
typedef struct {
    float *c;
    size_t ldc;
    gai_x86_matrix a, b;
    size_t M, N, K;
    bool add;
    const float *packed; /* all of B, or NULL */
} gai_x86_product;

/* A part of it: columns j0..j1, contraction k0..k1, with B's panels at hand. */
typedef struct {
    size_t j0, j1, k0, k1;
    const float *panels;
    size_t lines;          /* of a panel */
    size_t blocks, groups; /* tasks: blocks of rows by groups of panels */
} gai_x86_region;

/* Where block number `block` of M rows begins. */
GAI_INLINE size_t gai_x86_begin(const gai_x86_products *p, size_t M, size_t block, size_t blocks) {
    return block == blocks ? M : M * block / blocks / p->align * p->align;
}

/* Rows of a strip of a block: strips of equal height, for a few rows at the end would be slow; but tiles are full. */
GAI_INLINE size_t gai_x86_unit(const gai_x86_products *p, size_t rows) {
    return p->align > 1 ? p->rows : gai_ceil_div(rows, gai_ceil_div(rows, p->rows));
}

/* Packs values 0..K of the rows of a block, on the calling thread. */
GAI_FN gai_x86_panels gai_x86_pack_a(const gai_x86_products *p, float *to, gai_x86_matrix a, size_t rows, size_t K) {
    size_t run = a.k_first ? GAI_X86_LINES * p->word : K, unit = gai_x86_unit(p, rows);
    gai_x86_panels panels = {to, gai_x86_lines(p, K) * p->a_width, p->a_width};
    for (size_t k = 0; k < K; k += run)
        for (size_t i = 0; i < rows; i += unit)
            p->pack_a(to + i / unit * panels.panel + k / p->word * p->a_width, gai_x86_part(a, i, k),
                      gai_min(unit, rows - i), gai_min(run, K - k));
    return panels;
}

GAI_FN void gai_x86_task(const gai_x86_products *p, const gai_x86_product *m, const gai_x86_region *r, size_t task,
                         float *room) {
    size_t block = task % r->blocks, group = task / r->blocks, panels = gai_ceil_div(r->j1 - r->j0, p->columns);
    size_t i0 = gai_x86_begin(p, m->M, block, r->blocks), rows = gai_x86_begin(p, m->M, block + 1, r->blocks) - i0;
    size_t first = panels * group / r->groups, last = panels * (group + 1) / r->groups;
    size_t j = r->j0 + first * p->columns, columns = gai_min(r->j1, r->j0 + last * p->columns) - j;
    size_t steps = gai_ceil_div(r->k1 - r->k0, p->word), parts = gai_ceil_div(steps, GAI_X86_STEPS);
    size_t depth = gai_x86_round_up(gai_ceil_div(steps, parts), GAI_X86_PAD) * p->word;
    for (size_t k = r->k0; rows > 0 && k < r->k1; k += depth) {
        size_t K = gai_min(depth, r->k1 - k);
        gai_x86_panels a = gai_x86_pack_a(p, room, gai_x86_part(m->a, i0, k), rows, K);
        gai_x86_panels b = {r->panels + (first * r->lines + (k - r->k0) / p->word) * p->columns, p->columns * r->lines,
                            p->columns};
        p->multiply(m->c + i0 * m->ldc + j, m->ldc, a, gai_x86_unit(p, rows), b, rows, columns,
                    gai_ceil_div(K, p->word), m->add || k > 0);
    }
}

/* Room for the A panels of a task. */
GAI_INLINE size_t gai_x86_task_words(const gai_x86_products *p) {
    return gai_ceil_div(GAI_X86_BLOCK + p->align, p->rows) * p->a_width * (GAI_X86_STEPS + GAI_X86_PAD);
}

/* false: not enough memory, nothing done. */
GAI_FN bool gai_x86_multiply(gai_x86_state *s, const gai_x86_products *p, gai_x86_product m) {
    size_t lines = gai_x86_lines(p, m.K), j_part = m.N, k_part = m.K, threads = gai_x86_threads();
    size_t most = GAI_X86_SHARED / sizeof(float) / p->columns, panels = gai_ceil_div(m.N, p->columns); /* most lines */
    if (!m.packed && panels * lines > most) {
        k_part = gai_min(m.K, gai_max(most / panels / GAI_X86_STEPS, 1) * GAI_X86_STEPS * p->word);
        j_part = gai_max(most / gai_x86_lines(p, k_part), 1) * p->columns;
    }
    size_t shared = m.packed ? 0 : gai_x86_round_up(gai_min(j_part, m.N), p->columns) * gai_x86_lines(p, k_part);
    float *room = gai_x86_reserve(&s->room, shared + threads * gai_x86_task_words(p));
    if (!room) return false;
    for (size_t j = 0; j < m.N; j += j_part)
        for (size_t k = 0; k < m.K; k += k_part) {
            gai_x86_region r = {j, gai_min(m.N, j + j_part), k, gai_min(m.K, k + k_part), m.packed, lines, 0, 0};
            if (!m.packed) {
                r.panels = room;
                r.lines = gai_x86_lines(p, r.k1 - k);
                gai_x86_pack_b(p, room, r.lines, gai_x86_part(m.b, j, k), r.j1 - j, r.k1 - k);
            }
            r.blocks = gai_ceil_div(m.M, GAI_X86_BLOCK);
            r.groups = gai_min(gai_ceil_div(2 * threads, r.blocks), gai_ceil_div(r.j1 - j, p->columns));
            GAI_PARALLEL_TASKS
            for (size_t task = 0; task < r.blocks * r.groups; task++)
                gai_x86_task(p, &m, &r, task, room + shared + gai_x86_thread() * gai_x86_task_words(p));
        }
    return true;
}

/* ---- linear maps ------------------------------------------------------------------------------------------------- */

/* The weights w (O, I) packed for y = x w^T, or with k_first for dx = dy w. NULL: not kept, because they are float32
 * (as large again as the weights themselves, and packed fast) or because there is no memory. */
GAI_FN const float *gai_x86_packed(gai_x86_state *s, const float *w, size_t O, size_t I, bool k_first) {
    const gai_x86_products *p = &s->linear;
    if (p->word == 1) return NULL;
    size_t at = 0, N = k_first ? I : O, K = k_first ? O : I, lines = gai_x86_lines(p, K);
    for (; at < s->n_packs; at++) {
        const gai_x86_pack *have = &s->packs[at];
        if (have->w == w && have->O == O && have->I == I && have->k_first == k_first) break;
    }
    if (at == s->n_packs) {
        gai_x86_pack *more = (gai_x86_pack *)GA_MALLOC((at + 1) * sizeof *more);
        float *data = (float *)(void *)gai_x86_take(gai_x86_round_up(N, p->columns) * lines * sizeof *data);
        if (!more || !data) {
            GA_FREE(more);
            gai_x86_give(data);
            return NULL;
        }
        if (at > 0) memcpy(more, s->packs, at * sizeof *more);
        GA_FREE(s->packs);
        gai_x86_pack added = {w, O, I, k_first, true, data};
        more[at] = added;
        s->packs = more;
        s->n_packs++;
    }
    if (s->packs[at].stale) {
        gai_x86_matrix b = {w, I, k_first, false};
        gai_x86_pack_b(p, s->packs[at].data, lines, b, N, K);
        s->packs[at].stale = false;
    }
    return s->packs[at].data;
}

/* Drops the packed copies of weights in [from, from + bytes), or marks them as stale. */
GAI_FN void gai_x86_forget(gai_x86_state *s, const void *from, size_t bytes, bool drop) {
    size_t kept = 0;
    for (size_t i = 0; i < s->n_packs; i++) {
        gai_x86_pack *pack = &s->packs[i];
        bool inside = (uintptr_t)pack->w - (uintptr_t)from < bytes;
        if (inside) pack->stale = true;
        if (inside && drop)
            gai_x86_give(pack->data);
        else
            s->packs[kept++] = *pack;
    }
    s->n_packs = kept;
}

GAI_FN void gai_x86_weights_changed(void *state, const ga_real *weights, size_t n) {
    gai_x86_forget((gai_x86_state *)state, weights, n * sizeof *weights, false);
}

GAI_FN void gai_x86_release(void *state, void *p) {
    gai_x86_block block;
    if (!p) return;
    memcpy(&block, (char *)p - sizeof block, sizeof block);
    gai_x86_forget((gai_x86_state *)state, p, block.bytes, true);
    gai_x86_give(p);
}

enum {
    GAI_X86_FEW = 8, /* fewer rows are not worth packing the other operand for */
    GAI_X86_FEW_COLUMNS = 32,
    GAI_X86_MANY = 2048 /* that many rows pay for packing the weights on the way: not worth the memory of a kept copy */
};

GAI_FN void gai_x86_linear_forward(void *state, float *y, const float *x, const float *w, size_t M, size_t O,
                                   size_t I) {
    gai_x86_state *s = (gai_x86_state *)state;
    if (M < GAI_X86_FEW && s->linear.word == 1) {
        GAI_PARALLEL_FOR
        for (size_t o = 0; o < O; o += GAI_X86_FEW_COLUMNS)
            for (size_t m = 0; m < M; m++)
                s->vectors.dots(y + m * O + o, x + m * I, w + o * I, I, gai_min(GAI_X86_FEW_COLUMNS, O - o), I);
        return;
    }
    gai_x86_matrix x_rows = {x, I, false, false}, w_rows = {w, I, false, false};
    gai_x86_product m = {y, O, x_rows, w_rows, M, O, I, false, NULL};
    if (M < GAI_X86_MANY) m.packed = gai_x86_packed(s, w, O, I, false);
    if (!gai_x86_multiply(s, &s->linear, m)) ga_linear_forward(y, x, w, M, O, I);
}

GAI_FN void gai_x86_linear_backward(void *state, float *dx, float *dw, const float *dy, const float *x, const float *w,
                                    size_t M, size_t O, size_t I) {
    gai_x86_state *s = (gai_x86_state *)state;
    gai_x86_matrix dy_columns = {dy, O, true, false}, x_columns = {x, I, true, false};
    gai_x86_matrix dy_rows = {dy, O, false, false}, w_columns = {w, I, true, false};
    gai_x86_product to_w = {dw, I, dy_columns, x_columns, O, I, M, true, NULL};
    if (!gai_x86_multiply(s, &s->linear, to_w)) {
        ga_linear_backward(dx, dw, dy, x, w, M, O, I);
        return;
    }
    if (!dx) return;
    gai_x86_product to_x = {dx, I, dy_rows, w_columns, M, I, O, false, NULL};
    if (M < GAI_X86_MANY) to_x.packed = gai_x86_packed(s, w, O, I, true);
    if (!gai_x86_multiply(s, &s->linear, to_x)) gai_product(dx, I, gai_rows(dy, O), gai_rows(w, I), M, I, O, false);
}

/* Each expert's product is one of those above, on its own rows: contiguous in x, y and w. */
GAI_FN void gai_x86_grouped_forward(void *state, float *y, const float *x, const float *w, size_t w_stride,
                                    const int32_t *offsets, size_t E, size_t O, size_t I) {
    for (size_t e = 0; e < E; e++) {
        size_t first = (size_t)offsets[e], rows = (size_t)offsets[e + 1] - first;
        if (rows > 0) gai_x86_linear_forward(state, y + first * O, x + first * I, w + e * w_stride, rows, O, I);
    }
}

GAI_FN void gai_x86_grouped_backward(void *state, float *dx, float *dw, const float *dy, const float *x, const float *w,
                                     size_t w_stride, const int32_t *offsets, size_t E, size_t O, size_t I) {
    for (size_t e = 0; e < E; e++) {
        size_t first = (size_t)offsets[e], rows = (size_t)offsets[e + 1] - first, at = e * w_stride;
        if (rows > 0)
            gai_x86_linear_backward(state, dx + first * I, dw + at, dy + first * O, x + first * I, w + at, rows, O, I);
    }
}

/* ---- output head and cross-entropy ------------------------------------------------------------------------------- */

/* For a row with target t let e_v = exp(l_v - l_t) for v != t and S = sum e_v. Then
 *
 *     loss = log(1 + S),   d l_v = f e_v,   d l_t = -f S,   f = scale / (1 + S)
 *
 * so that each logit takes one exp, as it leaves the product: the matrix E of e_v is all that is stored, in the
 * precision of the products. f comes in afterwards: dx = f (E w), dw = E^T (f x); the target's own term is added in
 * float32. Where some l_v is so far above l_t that the exp is cut off at e^75, the loss is astronomical and plain C
 * takes over. */
enum { GAI_X86_HEAD_ROWS = 512, GAI_X86_HEAD_COLUMNS = 4096, GAI_X86_HEAD_TILE = 128 };

typedef struct {
    const gai_x86_products *p;
    const float *x;
    const int32_t *targets;
    float *reference; /* (rows) l_t; infinity where there is no target: then every e is 0 */
    float *sums;      /* (parts of the vocabulary, rows) */
    void *e;          /* (rows, stride), or NULL */
    size_t rows, stride, C, blocks;
} gai_x86_head;

/* Logits and exponentials of one block of rows for the columns j0..j1, whose panels are b. */
GAI_FN void gai_x86_head_task(const gai_x86_head *h, gai_x86_panels b, size_t j0, size_t j1, size_t block,
                              float *room) {
    const gai_x86_products *p = h->p;
    size_t i0 = gai_x86_begin(p, h->rows, block, h->blocks);
    size_t rows = gai_x86_begin(p, h->rows, block + 1, h->blocks) - i0;
    if (rows == 0) return;
    gai_x86_matrix x = {h->x + i0 * h->C, h->C, false, false};
    float *tile = room, *sums = h->sums + j0 / GAI_X86_HEAD_COLUMNS * h->rows + i0;
    gai_x86_panels a = gai_x86_pack_a(p, room + (GAI_X86_BLOCK + p->align) * GAI_X86_HEAD_TILE, x, rows, h->C);
    size_t value = p->word == 1 ? sizeof(float) : sizeof(uint16_t);
    memset(sums, 0, rows * sizeof *sums);
    for (size_t j = j0; j < j1; j += GAI_X86_HEAD_TILE, b.p += GAI_X86_HEAD_TILE / p->columns * b.panel) {
        size_t columns = gai_min(GAI_X86_HEAD_TILE, j1 - j);
        p->multiply(tile, GAI_X86_HEAD_TILE, a, gai_x86_unit(p, rows), b, rows, columns, gai_ceil_div(h->C, p->word),
                    false);
        for (size_t i = 0; i < rows; i++) {
            float *l = tile + i * GAI_X86_HEAD_TILE;
            int32_t target = h->targets[i0 + i];
            if (target >= 0 && (size_t)target - j < columns) l[(size_t)target - j] = -(float)INFINITY;
            void *e = h->e ? (char *)h->e + ((i0 + i) * h->stride + j) * value : NULL;
            sums[i] += p->exponentials(e, l, columns, h->reference[i0 + i]);
        }
    }
}

/* E and the sums of one slice of rows; false: not enough memory. */
GAI_FN bool gai_x86_head_exponentials(gai_x86_state *s, const gai_x86_head *h, const float *w, size_t V) {
    const gai_x86_products *p = h->p;
    const float *packed = gai_x86_packed(s, w, V, h->C, false);
    size_t lines = gai_x86_lines(p, h->C), parts = gai_ceil_div(V, GAI_X86_HEAD_COLUMNS), threads = gai_x86_threads();
    size_t shared = packed ? 0 : GAI_X86_HEAD_COLUMNS * lines, at_once = packed ? parts : 1;
    size_t most = GAI_X86_BLOCK + p->align; /* rows of a task */
    size_t each = most * GAI_X86_HEAD_TILE + gai_ceil_div(most, p->rows) * p->a_width * lines;
    float *room = gai_x86_reserve(&s->room, shared + threads * each);
    if (!room) return false;
    for (size_t part = 0; part < parts; part += at_once) {
        size_t first = part * GAI_X86_HEAD_COLUMNS;
        if (!packed) {
            gai_x86_matrix b = {w + first * h->C, h->C, false, false};
            gai_x86_pack_b(p, room, lines, b, gai_min(GAI_X86_HEAD_COLUMNS, V - first), h->C);
        }
        GAI_PARALLEL_TASKS
        for (size_t task = 0; task < h->blocks * at_once; task++) {
            size_t j = first + task / h->blocks * GAI_X86_HEAD_COLUMNS;
            gai_x86_panels b = {packed ? packed + j * lines : room, p->columns * lines, p->columns};
            gai_x86_head_task(h, b, j, gai_min(V, j + GAI_X86_HEAD_COLUMNS), task % h->blocks,
                              room + shared + gai_x86_thread() * each);
        }
    }
    return true;
}

GAI_INLINE float gai_x86_round(float x) { /* to bfloat16, to nearest even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

/* The target's own logit, of operands rounded as in the product. */
GAI_FN float gai_x86_target_logit(const float *x, const float *w, size_t C, bool bf16) {
    float sums[16] = {0}, sum = 0;
    for (size_t c = 0; c < C; c++) {
        float a = bf16 ? gai_x86_round(x[c]) : x[c], b = bf16 ? gai_x86_round(w[c]) : w[c];
        sums[c % 16] += a * b;
    }
    for (size_t i = 0; i < 16; i++) sum += sums[i];
    return sum;
}

/* Gradients of one slice: `factor` holds f for each row, h->reference d l_t. */
GAI_FN bool gai_x86_head_gradients(gai_x86_state *s, const gai_x86_head *h, float *dx, float *dw, float *scaled,
                                   const float *factor, const float *w, size_t V) {
    enum { COLUMNS = 64 };
    bool half = h->p->word == 2;
    size_t C = h->C;
    const float *e = (const float *)h->e;
    gai_x86_matrix e_rows = {e, h->stride, false, half}, w_columns = {w, C, true, false};
    gai_x86_matrix e_columns = {e, h->stride, true, half}, x_columns = {scaled, C, true, false};
    gai_x86_product to_x = {dx, C, e_rows, w_columns, h->rows,
                            C,  V, false,  NULL}; /* a kept copy is not worth it here */
    gai_x86_product to_w = {dw, C, e_columns, x_columns, V, C, h->rows, true, NULL};
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < h->rows; i++)
        for (size_t c = 0; c < C; c++) scaled[i * C + c] = factor[i] * h->x[i * C + c];
    if (!gai_x86_multiply(s, h->p, to_x) || !gai_x86_multiply(s, h->p, to_w)) return false;
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < h->rows; i++) {
        const float *target = w + (h->targets[i] > 0 ? (size_t)h->targets[i] * C : 0);
        for (size_t c = 0; c < C; c++) dx[i * C + c] = factor[i] * dx[i * C + c] + h->reference[i] * target[c];
    }
    /* By columns, so that equal targets add up in the order of the rows. */
    GAI_PARALLEL_FOR
    for (size_t c0 = 0; c0 < C; c0 += COLUMNS)
        for (size_t i = 0; i < h->rows; i++) {
            if (h->targets[i] < 0) continue;
            float *row = dw + (size_t)h->targets[i] * C;
            for (size_t c = c0; c < gai_min(C, c0 + COLUMNS); c++) row[c] += h->reference[i] * h->x[i * C + c];
        }
    return true;
}

/* Losses from the sums; `factor` becomes f and h->reference d l_t. false: a sum was cut off. */
GAI_FN bool gai_x86_head_losses(const gai_x86_head *h, float *losses, float *factor, size_t parts, float scale) {
    for (size_t i = 0; i < h->rows; i++) {
        float sum = 0;
        for (size_t part = 0; part < parts; part++) sum += h->sums[part * h->rows + i];
        if (sum > 1e32f) return false;
        bool counted = h->targets[i] >= 0;
        losses[i] = counted ? log1pf(sum) : 0;
        factor[i] = counted ? scale / (1 + sum) : 0;
        h->reference[i] = -factor[i] * sum;
    }
    return true;
}

/* Losses and, unless dx is NULL, gradients of one slice; false: plain C has to do it. */
GAI_FN bool gai_x86_head_slice(gai_x86_state *s, gai_x86_head *h, float *losses, float *dx, float *dw, float *factor,
                               float *scaled, const float *w, size_t V, float scale) {
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < h->rows; i++) {
        const float *x = h->x + i * h->C;
        bool counted = h->targets[i] >= 0;
        h->reference[i] = (float)INFINITY;
        if (counted) h->reference[i] = gai_x86_target_logit(x, w + (size_t)h->targets[i] * h->C, h->C, s->bf16);
    }
    if (!gai_x86_head_exponentials(s, h, w, V)) return false;
    if (!gai_x86_head_losses(h, losses, factor, gai_ceil_div(V, GAI_X86_HEAD_COLUMNS), scale)) return false;
    return !dx || gai_x86_head_gradients(s, h, dx, dw, scaled, factor, w, V);
}

GAI_FN void gai_x86_head_loss(void *state, float *losses, float *dx, float *dw, float *logits, const float *x,
                              const float *w, const int32_t *targets, size_t N, size_t C, size_t V,
                              const float *scale) {
    gai_x86_state *s = (gai_x86_state *)state;
    size_t most = gai_min(N, GAI_X86_HEAD_ROWS), stride = gai_x86_round_up(V, 32);
    size_t e_words = dx ? most * stride / s->linear.word : 0, scaled_words = dx ? most * C : 0;
    bool lent = e_words <= gai_min(N, GA_HEAD_ROWS) * V; /* the caller's scratch is large enough for E */
    size_t own = lent ? 0 : e_words, parts = gai_ceil_div(V, GAI_X86_HEAD_COLUMNS);
    float *room = gai_x86_reserve(&s->head_room, own + scaled_words + most * (parts + 2));
    for (size_t n = 0; n < N; n += GAI_X86_HEAD_ROWS) {
        size_t rows = gai_min(GAI_X86_HEAD_ROWS, N - n);
        float *dxn = dx ? dx + n * C : NULL;
        bool done = false;
        if (room) {
            float *scaled = room + own, *factor = scaled + scaled_words, *e = lent ? logits : room;
            gai_x86_head h = {&s->linear,
                              x + n * C,
                              targets + n,
                              factor + most,
                              factor + 2 * most,
                              dx ? e : NULL,
                              rows,
                              stride,
                              C,
                              gai_max(gai_ceil_div(rows, GAI_X86_BLOCK), gai_min(rows, gai_x86_threads()))};
            done = gai_x86_head_slice(s, &h, losses + n, dxn, dw, factor, scaled, w, V, dx ? *scale : 0);
        }
        if (!done) ga_head_loss(losses + n, dxn, dw, logits, x + n * C, w, targets + n, rows, C, V, scale);
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* Tiles of GAI_X86_QUERIES queries by GAI_X86_KEYS keys, with the kernels above. The forward pass computes the scores
 * of a tile transposed, (keys, queries): then the softmax of 16 queries is one vector's work, and a tile of
 * probabilities already is an A panel of P v, whose contraction runs over the keys. Masked scores are -infinity. The
 * backward pass knows the log-sum-exp, so its tiles are (queries, keys), which are A panels of dv = P^T dy and dk =
 * dS^T q.
 *
 * A task of the forward pass is a chunk of queries of one head; of the backward pass, a head. */
enum { GAI_X86_CHUNK = 512 };

/* An A panel out of a tile whose lines are already the steps of k: float32 is used as it lies. */
GAI_FN gai_x86_panels gai_x86_tile_panels(const gai_x86_products *p, float *room, const float *tile, size_t line,
                                          size_t rows, size_t K) {
    gai_x86_panels as_it_lies = {tile, gai_x86_unit(p, rows), line};
    gai_x86_matrix m = {tile, line, true, false};
    return p->word == 1 ? as_it_lies : gai_x86_pack_a(p, room, m, rows, K);
}

GAI_FN gai_x86_panels gai_x86_pack_columns(const gai_x86_products *p, float *to, gai_x86_matrix b, size_t N, size_t K) {
    size_t lines = gai_x86_lines(p, K);
    gai_x86_panels panels = {to, lines * p->columns, p->columns};
    for (size_t j = 0; j < N; j += p->columns)
        p->pack_b(to + j * lines, gai_x86_part(b, j, 0), gai_min(p->columns, N - j), K);
    return panels;
}

/* Words that gai_x86_pack_columns and gai_x86_pack_a need. */
GAI_INLINE size_t gai_x86_b_words(const gai_x86_products *p, size_t N, size_t K) {
    return gai_x86_round_up(N, p->columns) * gai_x86_lines(p, K);
}
GAI_INLINE size_t gai_x86_a_words(const gai_x86_products *p, size_t M, size_t K) {
    return gai_ceil_div(M, p->rows) * p->a_width * gai_x86_lines(p, K);
}

/* One head's queries i0..i1: y and lse. sink: its logit, or NULL. */
GAI_FN void gai_x86_sdpa_chunk(const gai_x86_state *s, float *y, float *lse, const float *q, const float *k,
                               const float *v, const float *sink, size_t i0, size_t i1, ga_shape n, float *room) {
    enum { QUERIES = GAI_X86_QUERIES, KEYS = GAI_X86_KEYS };
    const gai_x86_products *p = &s->linear;
    size_t D = n.D, stride = n.HQ * D, kv_stride = n.HK * D;
    size_t offset = n.S - n.T, end = offset + i1; /* keys that are seen */
    size_t q_tile = gai_x86_b_words(p, QUERIES, D);
    float *q_room = room, *k_room = q_room + (size_t)GAI_X86_CHUNK / QUERIES * q_tile;
    float *v_room = k_room + gai_x86_a_words(p, KEYS, D);
    float *p_room = v_room + gai_x86_b_words(p, D, KEYS), *scores = p_room + gai_x86_a_words(p, QUERIES, KEYS);
    float *top = scores + KEYS * QUERIES, *sum = top + GAI_X86_CHUNK;
    float *keep = sum + GAI_X86_CHUNK, scale = 1 / sqrtf((float)D);
    for (size_t i = 0; i < GAI_X86_CHUNK; i++) {
        top[i] = sink ? *sink : -(float)INFINITY;
        sum[i] = sink ? 1 : 0;
    }
    for (size_t i = i0; i < i1; i += QUERIES) {
        gai_x86_matrix columns = {q + i * stride, stride, false, false};
        gai_x86_pack_columns(p, q_room + (i - i0) / QUERIES * q_tile, columns, gai_min(QUERIES, i1 - i), D);
    }
    for (size_t j = 0; j < end; j += KEYS) {
        size_t keys = gai_min(KEYS, end - j);
        gai_x86_matrix k_rows = {k + j * kv_stride, kv_stride, false, false};
        gai_x86_matrix v_rows = {v + j * kv_stride, kv_stride, true, false};
        gai_x86_panels v_panels = gai_x86_pack_columns(p, v_room, v_rows, D, keys);
        gai_x86_panels k_panels = gai_x86_pack_a(p, k_room, k_rows, keys, D);
        size_t unit = gai_x86_unit(p, keys);
        for (size_t i = i0; i < i1; i += QUERIES) {
            size_t rows = gai_min(QUERIES, i1 - i), seen = offset + i + rows, at = i - i0;
            if (seen <= j) continue;
            seen = gai_min(keys, seen - j);
            gai_x86_panels q_panels = {q_room + at / QUERIES * q_tile, q_tile * p->columns / QUERIES, p->columns};
            p->multiply(scores, QUERIES, k_panels, unit, q_panels, seen, gai_x86_round_up(rows, p->columns),
                        gai_ceil_div(D, p->word), false);
            for (size_t key = offset + i > j ? offset + i - j : 0; key < seen; key++) /* keys after the query */
                for (size_t r = 0; r < rows && offset + i + r < j + key; r++)
                    scores[key * QUERIES + r] = -(float)INFINITY;
            s->vectors.softmax(scores, top + at, sum + at, keep, seen, rows, scale);
            if (j > 0)
                for (size_t r = 0; r < rows; r++)
                    for (size_t d = 0; d < D; d++) y[(i + r) * stride + d] *= keep[r];
            gai_x86_panels probabilities = gai_x86_tile_panels(p, p_room, scores, QUERIES, rows, seen);
            p->multiply(y + i * stride, stride, probabilities, gai_x86_unit(p, rows), v_panels, rows, D,
                        gai_ceil_div(seen, p->word), j > 0);
        }
    }
    for (size_t i = i0; i < i1; i++) {
        float r = 1 / sum[i - i0];
        for (size_t d = 0; d < D; d++) y[i * stride + d] *= r;
        lse[i] = top[i - i0] + logf(sum[i - i0]);
    }
}

/* One query, as in generation: each key and value is read once. scores: room for the keys that it sees. */
GAI_FN void gai_x86_sdpa_query(const gai_x86_state *s, float *y, float *lse, const float *q, const float *k,
                               const float *v, const float *sink, size_t keys, ga_shape n, float *scores) {
    float scaled[GA_MAX_HEAD_DIM], scale = 1 / sqrtf((float)n.D), top = sink ? *sink : -(float)INFINITY;
    s->vectors.scale(scaled, q, NULL, n.D, scale);
    s->vectors.dots(scores, scaled, k, n.HK * n.D, keys, n.D);
    for (size_t j = 0; j < keys; j++) top = scores[j] > top ? scores[j] : top;
    float sum = s->single.exponentials(scores, scores, keys, top);
    if (sink) sum += gai_exp(*sink - top);
    s->vectors.combine(y, scores, v, n.HK * n.D, keys, n.D);
    s->vectors.scale(y, y, NULL, n.D, 1 / sum);
    *lse = top + logf(sum);
}

GAI_FN void gai_x86_sdpa_forward(void *state, float *y, float *lse, const float *q, const float *k, const float *v,
                                 const float *sink, ga_shape n) {
    gai_x86_state *s = (gai_x86_state *)state;
    const gai_x86_products *p = &s->linear;
    bool few = n.T < GAI_X86_FEW;
    size_t chunks = gai_ceil_div(n.T, GAI_X86_CHUNK), D = n.D;
    size_t each = gai_x86_b_words(p, GAI_X86_CHUNK, D) + gai_x86_a_words(p, GAI_X86_KEYS, D) +
                  gai_x86_b_words(p, D, GAI_X86_KEYS) + gai_x86_a_words(p, GAI_X86_QUERIES, GAI_X86_KEYS) +
                  GAI_X86_KEYS * GAI_X86_QUERIES + 2 * GAI_X86_CHUNK + GAI_X86_QUERIES;
    if (few) each = gai_x86_round_up(n.S, GAI_X86_PAD);
    float *room = gai_x86_reserve(&s->room, gai_x86_threads() * each);
    if (!room) {
        ga_sdpa_forward(y, lse, q, k, v, sink, n);
        return;
    }
    GAI_PARALLEL_TASKS
    for (size_t task = 0; task < n.B * n.HQ * chunks; task++) {
        size_t bh = task / chunks, i = (chunks - 1 - task % chunks) * GAI_X86_CHUNK; /* the longest first */
        size_t b = bh / n.HQ, h = bh % n.HQ, kv = (b * n.S * n.HK + h / (n.HQ / n.HK)) * D;
        size_t at = (b * n.T * n.HQ + h) * D;
        float *own = room + gai_x86_thread() * each;
        const float *logit = sink ? sink + h : NULL;
        if (!few)
            gai_x86_sdpa_chunk(s, y + at, lse + bh * n.T, q + at, k + kv, v + kv, logit, i,
                               gai_min(n.T, i + GAI_X86_CHUNK), n, own);
        for (size_t t = 0, row = at; few && t < n.T; t++, row += n.HQ * D)
            gai_x86_sdpa_query(s, y + row, lse + bh * n.T + t, q + row, k + kv, v + kv, logit, n.S - n.T + t + 1, n,
                               own);
    }
}

/* Words of the A panels of a backward tile, whichever way it is packed. */
GAI_INLINE size_t gai_x86_backward_words(const gai_x86_products *p, size_t D) {
    return gai_max(gai_x86_a_words(p, GAI_X86_QUERIES, gai_max(D, GAI_X86_KEYS)),
                   gai_x86_a_words(p, GAI_X86_KEYS, GAI_X86_QUERIES));
}

/* One head. dk and dv are its own, (T, D); delta_i = dy_i . y_i. */
GAI_FN void gai_x86_sdpa_head_backward(const gai_x86_state *s, float *dq, float *dk, float *dv, const float *dy,
                                       const float *lse, const float *delta, const float *q, const float *k,
                                       const float *v, ga_shape n, float *room) {
    enum { QUERIES = GAI_X86_QUERIES, KEYS = GAI_X86_KEYS };
    const gai_x86_products *p = &s->linear;
    size_t D = n.D, T = n.T, stride = n.HQ * D, kv_stride = n.HK * D, D_steps = gai_ceil_div(D, p->word);
    size_t b_keys = gai_x86_b_words(p, KEYS, D), b_values = gai_x86_b_words(p, D, KEYS);
    float *k_room = room, *v_room = k_room + b_keys, *kt_room = v_room + b_keys, *b_room = kt_room + b_values;
    float *a_room = b_room + b_values, *scores = a_room + gai_x86_backward_words(p, D), *ds = scores + QUERIES * KEYS;
    float scale = 1 / sqrtf((float)D);
    for (size_t j = 0; j < T; j += KEYS) {
        size_t keys = gai_min(KEYS, T - j);
        gai_x86_matrix k_rows = {k + j * kv_stride, kv_stride, false, false};
        gai_x86_matrix v_rows = {v + j * kv_stride, kv_stride, false, false};
        gai_x86_matrix k_lines = {k + j * kv_stride, kv_stride, true, false};
        gai_x86_panels k_panels = gai_x86_pack_columns(p, k_room, k_rows, keys, D);
        gai_x86_panels v_panels = gai_x86_pack_columns(p, v_room, v_rows, keys, D);
        gai_x86_panels kt_panels = gai_x86_pack_columns(p, kt_room, k_lines, D, keys);
        for (size_t i = j / QUERIES * QUERIES; i < T; i += QUERIES) {
            size_t rows = gai_min(QUERIES, T - i), seen = gai_min(keys, i + rows - j), strip = gai_x86_unit(p, rows);
            size_t columns = gai_x86_round_up(seen, p->columns); /* the panels are padded with zeros */
            gai_x86_matrix q_rows = {q + i * stride, stride, false, false};
            gai_x86_matrix dy_rows = {dy + i * stride, stride, false, false};
            p->multiply(scores, KEYS, gai_x86_pack_a(p, a_room, q_rows, rows, D), strip, k_panels, rows, columns,
                        D_steps, false);
            p->multiply(ds, KEYS, gai_x86_pack_a(p, a_room, dy_rows, rows, D), strip, v_panels, rows, columns, D_steps,
                        false);
            for (size_t r = 0; r < rows; r++) {
                size_t visible = gai_min(seen, i + r + 1 > j ? i + r + 1 - j : 0);
                float *pr = scores + r * KEYS, *dr = ds + r * KEYS;
                s->vectors.softmax_backward(pr, dr, gai_x86_round_up(visible, 16), scale, lse[i + r], delta[i + r]);
                for (size_t key = visible; key < seen; key++) pr[key] = dr[key] = 0;
            }
            size_t seen_unit = gai_x86_unit(p, seen), row_steps = gai_ceil_div(rows, p->word);
            q_rows.k_first = dy_rows.k_first = true;
            gai_x86_matrix ds_rows = {ds, KEYS, false, false};
            p->multiply(dv + j * D, D, gai_x86_tile_panels(p, a_room, scores, KEYS, seen, rows), seen_unit,
                        gai_x86_pack_columns(p, b_room, dy_rows, D, rows), seen, D, row_steps, true);
            p->multiply(dk + j * D, D, gai_x86_tile_panels(p, a_room, ds, KEYS, seen, rows), seen_unit,
                        gai_x86_pack_columns(p, b_room, q_rows, D, rows), seen, D, row_steps, true);
            p->multiply(dq + i * stride, stride, gai_x86_pack_a(p, a_room, ds_rows, rows, seen), strip, kt_panels, rows,
                        D, gai_ceil_div(seen, p->word), true);
        }
    }
}

GAI_FN void gai_x86_sdpa_backward(void *state, float *dq, float *dk, float *dv, float *dsink, float *scratch,
                                  const float *dy, const float *y, const float *lse, const float *q, const float *k,
                                  const float *v, const float *sink, ga_shape n) {
    gai_x86_state *s = (gai_x86_state *)state;
    const gai_x86_products *p = &s->linear;
    size_t T = n.T, D = n.D, heads = n.B * n.HQ, group = n.HQ / n.HK;
    size_t each = 2 * gai_x86_b_words(p, GAI_X86_KEYS, D) + 2 * gai_x86_b_words(p, D, GAI_X86_KEYS) +
                  gai_x86_backward_words(p, D) + 2 * GAI_X86_QUERIES * GAI_X86_KEYS;
    float *dk_heads = scratch, *dv_heads = dk_heads + heads * T * D, *deltas = dv_heads + heads * T * D;
    float *room = gai_x86_reserve(&s->room, gai_x86_threads() * each);
    if (!room) {
        ga_sdpa_backward(dq, dk, dv, dsink, scratch, dy, y, lse, q, k, v, sink, n);
        return;
    }
    GAI_PARALLEL_TASKS
    for (size_t task = 0; task < heads; task++) {
        size_t b = task / n.HQ, h = task % n.HQ, kv = (b * T * n.HK + h / group) * D, q0 = (b * T * n.HQ + h) * D;
        float *dk_head = dk_heads + task * T * D, *dv_head = dv_heads + task * T * D, *delta = deltas + task * T;
        memset(dk_head, 0, T * D * sizeof *dk);
        memset(dv_head, 0, T * D * sizeof *dv);
        for (size_t i = 0; i < T; i++) {
            size_t at = q0 + i * n.HQ * D;
            delta[i] = gai_dot(dy + at, y + at, D);
            memset(dq + at, 0, D * sizeof *dq);
        }
        gai_x86_sdpa_head_backward(s, dq + q0, dk_head, dv_head, dy + q0, lse + task * T, delta, q + q0, k + kv, v + kv,
                                   n, room + gai_x86_thread() * each);
    }
    gai_sum_head_gradients(dk, dv, dk_heads, dv_heads, n);
    if (sink && dsink) gai_sum_sink_gradients(dsink, deltas, lse, sink, n);
}

/* ---- elementwise operators: plain C's, with a row's work in vectors ---------------------------------------------- */

enum { GAI_X86_CHUNKS = 16 }; /* partial sums over rows, added in order */

GAI_FN void gai_x86_rmsnorm_forward(void *state, float *h, float *rstd, const float *x, const float *w, size_t N,
                                    size_t C, float eps) {
    const gai_x86_state *s = (const gai_x86_state *)state;
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) rstd[n] = s->vectors.rmsnorm(h + n * C, x + n * C, w, C, eps);
}

GAI_FN void gai_x86_rmsnorm_backward(void *state, float *dx, float *dw, const float *dh, const float *x, const float *w,
                                     const float *rstd, size_t N, size_t C, bool add) {
    gai_x86_state *s = (gai_x86_state *)state;
    float *partial = gai_x86_reserve(&s->room, GAI_X86_CHUNKS * C);
    if (!partial) {
        ga_rmsnorm_backward(dx, dw, dh, x, w, rstd, N, C, add);
        return;
    }
    memset(partial, 0, GAI_X86_CHUNKS * C * sizeof *partial);
    GAI_PARALLEL_FOR
    for (size_t chunk = 0; chunk < GAI_X86_CHUNKS; chunk++)
        for (size_t n = N * chunk / GAI_X86_CHUNKS; n < N * (chunk + 1) / GAI_X86_CHUNKS; n++)
            s->vectors.rmsnorm_backward(dx + n * C, partial + chunk * C, dh + n * C, x + n * C, w, rstd[n], C, add);
    for (size_t chunk = 0; chunk < GAI_X86_CHUNKS; chunk++)
        for (size_t c = 0; c < C; c++) dw[c] += partial[chunk * C + c];
}

GAI_FN void gai_x86_heads_forward(void *state, float *y, const float *x, size_t x_stride, const float *w,
                                  const float *rope, size_t B, size_t T, size_t H, size_t D, float eps) {
    const gai_x86_state *s = (const gai_x86_state *)state;
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < B * T; n++)
        for (size_t h = 0; h < H; h++)
            s->vectors.head(y + (n * H + h) * D, x + n * x_stride + h * D, w, rope ? rope + n % T * D : NULL, D, eps);
}

GAI_FN void gai_x86_heads_backward(void *state, float *dx, float *dw, const float *dy, const float *x, size_t x_stride,
                                   size_t dx_stride, const float *w, const float *rope, size_t B, size_t T, size_t H,
                                   size_t D, float eps) {
    const gai_x86_state *s = (const gai_x86_state *)state;
    float partial[GAI_X86_CHUNKS][GA_MAX_HEAD_DIM];
    size_t N = B * T;
    memset(partial, 0, sizeof partial);
    GAI_PARALLEL_FOR
    for (size_t chunk = 0; chunk < GAI_X86_CHUNKS; chunk++)
        for (size_t n = N * chunk / GAI_X86_CHUNKS; n < N * (chunk + 1) / GAI_X86_CHUNKS; n++)
            for (size_t h = 0; h < H; h++)
                s->vectors.head_backward(dx + n * dx_stride + h * D, partial[chunk], dy + (n * H + h) * D,
                                         x + n * x_stride + h * D, w, rope ? rope + n % T * D : NULL, D, eps);
    for (size_t chunk = 0; w && chunk < GAI_X86_CHUNKS; chunk++)
        for (size_t d = 0; d < D; d++) dw[d] += partial[chunk][d];
}

/* The gate of Eq. 5 in its usual forms: sigmoid, multiplicative, a score for each value or for each head. The others
 * are plain C's. */
GAI_INLINE bool gai_x86_gate_usual(ga_gate g, size_t s_stride) {
    return g.form == GA_MULTIPLICATIVE && g.activation == GA_SIGMOID && g.sharing == GA_SPECIFIC && s_stride > 0 &&
           g.input != GA_INPUT_SCALAR;
}

GAI_FN void gai_x86_gate_forward(void *state, float *o, const float *y, size_t y_stride, const float *gate,
                                 size_t s_stride, size_t N, ga_gate g) {
    const gai_x86_state *s = (const gai_x86_state *)state;
    size_t width = g.H * g.D;
    if (!gai_x86_gate_usual(g, s_stride)) {
        ga_gate_forward(o, y, y_stride, gate, s_stride, N, g);
        return;
    }
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const float *yn = y + n * y_stride, *logits = gate + n * s_stride;
        if (g.type == GA_ELEMENTWISE)
            s->vectors.gate(o + n * width, yn, logits, width);
        else
            for (size_t h = 0; h < g.H; h++)
                s->vectors.scale(o + n * width + h * g.D, yn + h * g.D, NULL, g.D, gai_sigmoid(logits[h]));
    }
}

GAI_FN void gai_x86_gate_backward(void *state, float *dy, size_t dy_stride, float *ds, size_t ds_stride,
                                  const float *d_o, const float *y, size_t y_stride, const float *gate, size_t s_stride,
                                  size_t N, ga_gate g) {
    const gai_x86_state *s = (const gai_x86_state *)state;
    size_t width = g.H * g.D;
    if (!gai_x86_gate_usual(g, s_stride)) {
        ga_gate_backward(dy, dy_stride, ds, ds_stride, d_o, y, y_stride, gate, s_stride, N, g);
        return;
    }
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const float *yn = y + n * y_stride, *logits = gate + n * s_stride, *dn = d_o + n * width;
        if (g.type == GA_ELEMENTWISE)
            s->vectors.gate_backward(dy + n * dy_stride, ds + n * ds_stride, dn, yn, logits, width);
        else
            for (size_t h = 0; h < g.H; h++) {
                float p = gai_sigmoid(logits[h]);
                ds[n * ds_stride + h] =
                    p * (1 - p) * s->vectors.scale(dy + n * dy_stride + h * g.D, dn + h * g.D, yn + h * g.D, g.D, p);
            }
    }
}

GAI_FN void gai_x86_swiglu_forward(void *state, float *a, const float *u, size_t N, size_t F) {
    const gai_x86_state *s = (const gai_x86_state *)state;
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) s->vectors.swiglu(a + n * F, u + n * 2 * F, F);
}

GAI_FN void gai_x86_swiglu_backward(void *state, float *du, const float *da, const float *u, size_t N, size_t F) {
    const gai_x86_state *s = (const gai_x86_state *)state;
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) s->vectors.swiglu_backward(du + n * 2 * F, da + n * F, u + n * 2 * F, F);
}

GAI_FN void gai_x86_expert_swiglu_forward(void *state, float *a, const float *u, const float *weights,
                                          const int32_t *slots, size_t R, size_t F) {
    const gai_x86_state *s = (const gai_x86_state *)state;
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < R; i++) {
        s->vectors.swiglu(a + i * F, u + i * 2 * F, F);
        s->vectors.scale(a + i * F, a + i * F, NULL, F, weights[slots[i]]);
    }
}

GAI_FN void gai_x86_expert_swiglu_backward(void *state, float *du, float *d_weights, const float *da, const float *u,
                                           const float *weights, const int32_t *slots, size_t R, size_t F) {
    const gai_x86_state *s = (const gai_x86_state *)state;
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < R; i++) {
        float *d_act = du + i * 2 * F, *d_up = d_act + F, weight = weights[slots[i]];
        s->vectors.swiglu_backward(d_act, da + i * F, u + i * 2 * F, F);
        s->vectors.scale(d_act, d_act, NULL, F, weight);
        d_weights[slots[i]] = s->vectors.scale(d_up, d_up, u + i * 2 * F + F, F, weight);
    }
}

/* ---- what this machine has --------------------------------------------------------------------------------------- */

/* The extended control register 0: which registers the system saves. */
GAI_FN uint32_t gai_x86_saved(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* Linux gives the tiles' 8 KB of state to a process only on request, and may refuse. */
GAI_FN bool gai_x86_permitted(void) {
#ifdef __linux__
    enum { SYS_ARCH_PRCTL = 158, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return gai_x86_syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA, 0) == 0;
#else
    return false;
#endif
}

/* The instruction sets of this processor, each with its registers saved by the system; a bit for each gai_x86_isa. */
GAI_FN unsigned gai_x86_available(void) {
    enum { OSXSAVE = 1 << 27, FMA = 1 << 12, AVX2 = 1 << 5, F = 1 << 16, DQ = 1 << 17, BF16 = 1 << 5 };
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    uint32_t a, b, c, d, b7, d7, a71 = 0, unused, bw_vl = (1u << 30) | (1u << 31);
    unsigned found = 1u << GAI_X86_C;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE) || !(c & FMA)) return found;
    if (!__get_cpuid_count(7, 0, &a, &b7, &unused, &d7)) return found;
    if (a > 0) __get_cpuid_count(7, 1, &a71, &unused, &unused, &unused);
    uint32_t saved = gai_x86_saved(); /* registers: 0x06 of AVX, 0xe0 of AVX-512, 0x60000 of AMX */
    if (!(b7 & AVX2) || (saved & 0x06) != 0x06) return found;
    found |= 1u << GAI_X86_AVX2;
    if (!(b7 & F) || !(b7 & DQ) || (b7 & bw_vl) != bw_vl || (saved & 0xe6) != 0xe6) return found;
    found |= 1u << GAI_X86_AVX512;
    if (!(a71 & BF16)) return found;
    found |= 1u << GAI_X86_BF16;
    bool amx = (d7 & AMX_BF16) && (d7 & AMX_TILE) && (saved & 0x60000) == 0x60000;
    if (amx && gai_x86_permitted()) found |= 1u << GAI_X86_AMX;
    return found;
}

#endif /* GAI_X86 */

GAI_FN const char *gai_x86_isa_name(int isa) {
    static const char names[][12] = {"c", "avx2", "avx512", "avx512bf16", "amx"};
    return names[isa];
}

/* The instruction set that is asked for by name; without one the best of those available. -1: an error. */
GAI_FN int gai_x86_choose(const char *name, unsigned available, ga_error *e) {
    int best = 0;
    for (int i = 0; i < GAI_X86_COUNT; i++) {
        bool here = available >> i & 1;
        if (here) best = i;
        if (!name || strcmp(name, gai_x86_isa_name(i)) != 0) continue;
        if (here) return i;
        gai_fail(e, GA_ERR_CONFIG, "GA_ISA = %s: this processor, system or build has no such instructions", name);
        return -1;
    }
    if (!name) return best;
    gai_fail(e, GA_ERR_CONFIG, "GA_ISA = %s is none of: c avx2 avx512 avx512bf16 amx", name);
    return -1;
}

GA_API ga_result ga_device_x86(ga_device *device, ga_x86_settings settings, ga_error *e) {
    const char *name = settings.isa ? settings.isa : getenv("GA_ISA");
    *device = ga_device_cpu();
#ifdef GAI_X86
    int isa = gai_x86_choose(name && *name ? name : NULL, gai_x86_available(), e);
    if (isa < 0) return GA_ERR_CONFIG;
    if (isa == GAI_X86_C) return GA_OK;
    gai_x86_state *s = (gai_x86_state *)GA_MALLOC(sizeof *s);
    if (!s) return gai_fail(e, GA_ERR_MEMORY, "not enough memory for a device");
    memset(s, 0, sizeof *s);
    s->isa = (gai_x86_isa)isa;
    s->bf16 = settings.bf16 && isa >= GAI_X86_BF16;
    s->single = isa == GAI_X86_AVX2 ? gai_avx2_products() : gai_avx512_products();
    s->linear = !s->bf16 ? s->single : isa == GAI_X86_AMX ? gai_amx_products() : gai_bf16_products();
    s->vectors = isa == GAI_X86_AVX2 ? gai_avx2_vectors() : gai_avx512_vectors();
    static const char names[][24] = {"", "AVX2", "AVX-512", "AVX-512", "AVX-512 and AMX"};
    snprintf(s->name, sizeof s->name, "cpu, %s, %s products", names[isa], s->bf16 ? "bfloat16" : "float32");
    device->name = s->name;
    device->state = s;
    device->allocate = gai_x86_allocate;
    device->release = gai_x86_release;
    device->weights_changed = gai_x86_weights_changed;
    device->linear_forward = gai_x86_linear_forward;
    device->linear_backward = gai_x86_linear_backward;
    device->head_loss = gai_x86_head_loss;
    device->sdpa_forward = gai_x86_sdpa_forward;
    device->sdpa_backward = gai_x86_sdpa_backward;
    device->rmsnorm_forward = gai_x86_rmsnorm_forward;
    device->rmsnorm_backward = gai_x86_rmsnorm_backward;
    device->heads_forward = gai_x86_heads_forward;
    device->heads_backward = gai_x86_heads_backward;
    device->gate_forward = gai_x86_gate_forward;
    device->gate_backward = gai_x86_gate_backward;
    device->swiglu_forward = gai_x86_swiglu_forward;
    device->swiglu_backward = gai_x86_swiglu_backward;
    device->grouped_forward = gai_x86_grouped_forward;
    device->grouped_backward = gai_x86_grouped_backward;
    device->expert_swiglu_forward = gai_x86_expert_swiglu_forward;
    device->expert_swiglu_backward = gai_x86_expert_swiglu_backward;
    return GA_OK;
#else
    (void)settings;
    return gai_x86_choose(name && *name ? name : NULL, 1, e) < 0 ? GA_ERR_CONFIG : GA_OK;
#endif
}

GA_API void ga_device_x86_destroy(ga_device *device) {
#ifdef GAI_X86
    gai_x86_state *s = (gai_x86_state *)device->state;
    if (!s) return;
    for (size_t i = 0; i < s->n_packs; i++) gai_x86_give(s->packs[i].data);
    GA_FREE(s->packs);
    gai_x86_give(s->room.p);
    gai_x86_give(s->head_room.p);
    GA_FREE(s);
#endif
    *device = ga_device_cpu();
}

GA_API bool ga_device_x86_bf16(const ga_device *device) {
#ifdef GAI_X86
    const gai_x86_state *s = (const gai_x86_state *)device->state;
    return s && s->bf16;
#else
    (void)device;
    return false;
#endif
}

#ifdef __cplusplus
}
#endif
#endif /* GATED_ATTENTION_X86_IMPLEMENTED */

#else /* ==== GAX_PASS: the part that follows is compiled once for each instruction set ============================= */

/* Vectors of one instruction set: GAX_V of GAX_LANES words, and what is done with them. */
#if GAX_PASS == 1
#define GAX(name)        gai_avx2_##name
#define GAX_TARGET       __attribute__((unused, target("avx2,fma")))
#define GAX_V            __m256
#define GAX_LANES        8
#define GAX_ROWS         6
#define GAX_A_WIDTH      8
#define GAX_LOAD(p)      _mm256_loadu_ps(p)
#define GAX_STORE(p, v)  _mm256_storeu_ps(p, v)
#define GAX_SET(x)       _mm256_set1_ps(x)
#define GAX_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#else
#define GAX_V     __m512
#define GAX_LANES 16
#if GAX_PASS == 4
#define GAX_ROWS    32
#define GAX_A_WIDTH 32
#else
#define GAX_ROWS    14
#define GAX_A_WIDTH 16
#endif
#define GAX_LOAD(p)      _mm512_loadu_ps(p)
#define GAX_STORE(p, v)  _mm512_storeu_ps(p, v)
#define GAX_SET(x)       _mm512_set1_ps(x)
#define GAX_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#endif
#if GAX_PASS == 2
#define GAX(name)  gai_avx512_##name
#define GAX_TARGET __attribute__((unused, target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#elif GAX_PASS == 3
#define GAX(name)  gai_bf16_##name
#define GAX_TARGET __attribute__((unused, target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#elif GAX_PASS == 4
#define GAX(name) gai_amx_##name
#define GAX_TARGET \
    __attribute__((unused, target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16")))
#endif
#define GAX_INLINE GAX_TARGET __attribute__((always_inline)) static inline
#define GAX_FN     GAX_TARGET static
#ifdef __clang__
#define GAX_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GAX_UNROLL _Pragma("GCC unroll 16")
#endif

/* sum + a b for each lane: one product of floats, or two of bfloat16 pairs. */
#if GAX_PASS == 4
#define GAX_WORD 2
#elif GAX_PASS == 3
#define GAX_WORD 2
GAX_INLINE __m512 GAX(multiply_add)(__m512 a, __m512 b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#else
#define GAX_WORD 1
GAX_INLINE GAX_V GAX(multiply_add)(GAX_V a, GAX_V b, GAX_V sum) {
    return GAX_FMA(a, b, sum);
}
#endif

/* ---- packing ----------------------------------------------------------------------------------------------------- */

/* The first n of the values at p, the others 0; no more than n are touched. */
#if GAX_PASS == 1
GAX_INLINE __m256 GAX(load_first)(const float *p, size_t n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)gai_min(n, 8)), lanes));
}
#else
GAX_INLINE __m512 GAX(load_first)(const float *p, size_t n) {
    return _mm512_maskz_loadu_ps((__mmask16)(n < 16 ? (1u << n) - 1 : 0xffff), p);
}
#endif

/* LANES words along k of one row, of which n values exist. */
GAX_INLINE GAX_V GAX(words_of_row)(const float *p, size_t n, bool half) {
#if GAX_WORD == 2
    if (half) return (__m512)_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : 0xffffffffu, p);
    __m512 low = GAX(load_first)(p, n), high = GAX(load_first)(p + 16, n > 16 ? n - 16 : 0);
    return (__m512)_mm512_cvtne2ps_pbh(high, low);
#else
    (void)half;
    return GAX(load_first)(p, n);
#endif
}

/* One word of each of LANES rows, where k is the outer dimension; `rows` of them and n values along k exist. */
GAX_INLINE GAX_V GAX(words_of_step)(const float *p, size_t stride, size_t rows, size_t n, bool half) {
#if GAX_WORD == 2
    if (half) {
        __mmask16 first = (__mmask16)(n > 0 ? (1u << rows) - 1 : 0), second = (__mmask16)(n > 1 ? (1u << rows) - 1 : 0);
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, p));
        __m512i high =
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, (const uint16_t *)(const void *)p + stride));
        return (__m512)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 even = GAX(load_first)(p, n > 0 ? rows : 0), odd = GAX(load_first)(p + stride, n > 1 ? rows : 0);
    return (__m512)_mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
#else
    (void)stride, (void)half;
    return GAX(load_first)(p, n > 0 ? rows : 0);
#endif
}

/* Transposes LANES x LANES words: pairs, then groups of four, then halves change places. */
GAX_INLINE void GAX(transpose)(GAX_V r[GAX_LANES]) {
    GAX_V t[GAX_LANES];
#if GAX_PASS == 1
    GAX_UNROLL
    for (int i = 0; i < 8; i += 2)
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    GAX_UNROLL
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    GAX_UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20), t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#else
    GAX_UNROLL
    for (int i = 0; i < 16; i += 2)
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    GAX_UNROLL
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    GAX_UNROLL
    for (int i = 0; i < 4; i++) {
        GAX_V a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        GAX_V c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88), d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_f32x4(a, c, 0x88), t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88), t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
#endif
    memcpy(r, t, sizeof t);
}

/* Packs one panel, `width` words in a line, LANES x LANES words at a time. `upright`: these words stay together, a line
 * for each row. */
GAX_INLINE void GAX(pack_tiles)(float *to, size_t width, gai_x86_matrix m, size_t rows, size_t K, const bool k_first,
                                const bool half, const bool upright) {
    m.k_first = k_first;
    m.half = half;
    for (size_t k = 0; k < K; k += GAX_LANES * GAX_WORD)
        for (size_t i = 0; i < width; i += GAX_LANES) {
            GAX_V line[GAX_LANES];
            size_t r = rows > i ? gai_min(rows - i, GAX_LANES) : 0, n = K - k;
            GAX_UNROLL
            for (size_t q = 0; q < GAX_LANES; q++) {
                size_t value = q * GAX_WORD;
                if (k_first)
                    line[q] = GAX(words_of_step)(gai_x86_part(m, i, k + value).p, m.stride, r,
                                                 n > value ? n - value : 0, half);
                else
                    line[q] = GAX(words_of_row)(gai_x86_part(m, i + q, k).p, q < r ? n : 0, half);
            }
            if (k_first == upright) GAX(transpose)(line);
            float *tile = upright ? to + k / GAX_WORD * width + i * GAX_LANES : to + k / GAX_WORD * width + i;
            GAX_UNROLL
            for (size_t q = 0; q < GAX_LANES; q++) GAX_STORE(tile + q * (upright ? GAX_LANES : width), line[q]);
        }
}

GAX_INLINE void GAX(pack)(float *to, size_t width, gai_x86_matrix m, size_t rows, size_t K, const bool upright) {
    if (m.half && m.k_first)
        GAX(pack_tiles)(to, width, m, rows, K, true, true, upright);
    else if (m.half)
        GAX(pack_tiles)(to, width, m, rows, K, false, true, upright);
    else if (m.k_first)
        GAX(pack_tiles)(to, width, m, rows, K, true, false, upright);
    else
        GAX(pack_tiles)(to, width, m, rows, K, false, false, upright);
}

GAX_FN void GAX(pack_a)(float *to, gai_x86_matrix a, size_t rows, size_t K) {
    GAX(pack)(to, GAX_A_WIDTH, a, rows, K, GAX_PASS == 4);
}
GAX_FN void GAX(pack_b)(float *to, gai_x86_matrix b, size_t columns, size_t K) {
    GAX(pack)(to, 2 * GAX_LANES, b, columns, K, false);
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

#if GAX_PASS == 4
/* Tiles hold 16 lines of 16 words. Four of them are the sums of 32 x 32 values of C; for each 16 steps of k two tiles
 * of A (line i: the words of row i) and two of B (line k: the words of step k) are loaded and multiplied crosswise:
 *
 *               B 6       B 7
 *         A 4   0 += 46   1 += 47
 *         A 5   2 += 56   3 += 57
 */
/* The tile instructions do not tell gcc what they read: what stands at p must be in memory by now. */
#define GAX_MEMORY(p) __asm__ volatile("" : : "r"(p) : "memory")

GAX_INLINE void GAX(kernel)(float *c, size_t ldc, const float *a, const float *b, size_t b_line, size_t steps,
                            bool add) {
    size_t c_stride = ldc * sizeof *c, b_stride = b_line * sizeof *b;
    GAX_MEMORY(c);
    if (add) {
        _tile_loadd(0, c, c_stride);
        _tile_loadd(1, c + 16, c_stride);
        _tile_loadd(2, c + 16 * ldc, c_stride);
        _tile_loadd(3, c + 16 * ldc + 16, c_stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size_t k = 0; k < steps; k += 16, a += 512, b += 16 * b_line) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, b_stride);
        _tile_loadd(7, b + 16, b_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 256, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (size_t i = k / 8; i < k / 8 + 2 && i < 32; i++) /* lines of C are brought in meanwhile */
            __builtin_prefetch(c + i * ldc, 1), __builtin_prefetch(c + i * ldc + 31, 1);
    }
    _tile_stored(0, c, c_stride);
    _tile_stored(1, c + 16, c_stride);
    _tile_stored(2, c + 16 * ldc, c_stride);
    _tile_stored(3, c + 16 * ldc + 16, c_stride);
    GAX_MEMORY(c);
}

GAX_FN void GAX(multiply)(float *c, size_t ldc, gai_x86_panels a, size_t unit, gai_x86_panels b, size_t M, size_t N,
                          size_t steps, bool add) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t lines[16];
    } shapes; /* what the instruction reads: eight tiles of 16 lines of 64 bytes */
    float edge[32 * 32];
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int i = 0; i < 8; i++) {
        shapes.bytes[i] = 64;
        shapes.lines[i] = 16;
    }
    GAX_MEMORY(&shapes);
    _tile_loadconfig(&shapes);
    for (size_t j = 0; j < N; j += 32, b.p += b.panel)
        for (size_t i = 0; i < M; i += unit) {
            size_t rows = gai_min(unit, M - i), columns = gai_min(32, N - j);
            const float *strip = a.p + i / unit * a.panel;
            float *at = c + i * ldc + j;
            if (rows == 32 && columns == 32) {
                GAX(kernel)(at, ldc, strip, b.p, b.line, steps, add);
                continue;
            }
            GAX(kernel)(edge, 32, strip, b.p, b.line, steps, false);
            for (size_t r = 0; r < rows; r++)
                for (size_t q = 0; q < columns; q++) at[r * ldc + q] = edge[r * 32 + q] + (add ? at[r * ldc + q] : 0);
        }
    _tile_release(); /* else every context switch saves the tiles */
}
#undef GAX_MEMORY
#else

/* C (rows, 2 LANES) (+)= A B: `rows` is a constant wherever this is inlined, so that the block lives in registers. */
GAX_INLINE void GAX(block)(float *c, size_t ldc, const float *a, size_t a_line, const float *b, size_t b_line,
                           size_t steps, const size_t rows, bool add) {
    GAX_V sum[GAX_ROWS][2];
    GAX_UNROLL
    for (size_t i = 0; i < rows; i++) {
        sum[i][0] = sum[i][1] = GAX_SET(0);
        __builtin_prefetch(c + i * ldc, 1), __builtin_prefetch(c + i * ldc + 2 * GAX_LANES - 1, 1);
    }
    for (size_t k = 0; k < steps; k++, a += a_line, b += b_line) {
        GAX_V b0 = GAX_LOAD(b), b1 = GAX_LOAD(b + GAX_LANES);
        GAX_UNROLL
        for (size_t i = 0; i < rows; i++) {
            GAX_V ai = GAX_SET(a[i]);
            sum[i][0] = GAX(multiply_add)(ai, b0, sum[i][0]);
            sum[i][1] = GAX(multiply_add)(ai, b1, sum[i][1]);
        }
    }
    GAX_UNROLL
    for (size_t i = 0; i < rows; i++, c += ldc) {
        if (add) sum[i][0] += GAX_LOAD(c), sum[i][1] += GAX_LOAD(c + GAX_LANES);
        GAX_STORE(c, sum[i][0]), GAX_STORE(c + GAX_LANES, sum[i][1]);
    }
}

#define GAX_CASE(n)                                              \
    case n:                                                      \
        GAX(block)(c, ldc, a, a_line, b, b_line, steps, n, add); \
        break
GAX_FN void GAX(kernel)(float *c, size_t ldc, const float *a, size_t a_line, const float *b, size_t b_line,
                        size_t steps, size_t rows, bool add) {
    switch (rows) {
        GAX_CASE(1);
        GAX_CASE(2);
        GAX_CASE(3);
        GAX_CASE(4);
        GAX_CASE(5);
        GAX_CASE(6);
#if GAX_ROWS > 6
        GAX_CASE(7);
        GAX_CASE(8);
        GAX_CASE(9);
        GAX_CASE(10);
        GAX_CASE(11);
        GAX_CASE(12);
        GAX_CASE(13);
        GAX_CASE(14);
#endif
    }
}
#undef GAX_CASE

GAX_FN void GAX(multiply)(float *c, size_t ldc, gai_x86_panels a, size_t unit, gai_x86_panels b, size_t M, size_t N,
                          size_t steps, bool add) {
    enum { COLUMNS = 2 * GAX_LANES };
    float edge[GAX_ROWS * COLUMNS];
    for (size_t j = 0; j < N; j += COLUMNS, b.p += b.panel)
        for (size_t i = 0; i < M; i += unit) {
            size_t rows = gai_min(unit, M - i), columns = gai_min(COLUMNS, N - j);
            const float *strip = a.p + i / unit * a.panel;
            float *at = c + i * ldc + j;
            if (columns == COLUMNS) {
                GAX(kernel)(at, ldc, strip, a.line, b.p, b.line, steps, rows, add);
                continue;
            }
            GAX(kernel)(edge, COLUMNS, strip, a.line, b.p, b.line, steps, rows, false);
            for (size_t r = 0; r < rows; r++)
                for (size_t q = 0; q < columns; q++)
                    at[r * ldc + q] = edge[r * COLUMNS + q] + (add ? at[r * ldc + q] : 0);
        }
}

#endif

/* ---- exponentials ------------------------------------------------------------------------------------------------ */

/* e^x as gai_exp computes it. min and max return their second operand when one is NaN. */
GAX_INLINE GAX_V GAX(exp)(GAX_V x) {
#if GAX_PASS == 1
    __m256 y = _mm256_max_ps(GAX_SET(-87.3f), _mm256_min_ps(GAX_SET(88.7f), x));
    __m256 n = _mm256_round_ps(y * GAX_SET(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    __m512 y = _mm512_max_ps(GAX_SET(-104), _mm512_min_ps(GAX_SET(89), x));
    __m512 n = _mm512_roundscale_ps(y * GAX_SET(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
    GAX_V r = GAX_FMA(n, GAX_SET(-0.693359375f), y); /* ln 2 in two parts */
    r = GAX_FMA(n, GAX_SET(2.12194440e-4f), r);
    GAX_V p = GAX_SET(1.381446685e-3f);
    p = GAX_FMA(p, r, GAX_SET(8.368780418e-3f));
    p = GAX_FMA(p, r, GAX_SET(4.166839422e-2f));
    p = GAX_FMA(p, r, GAX_SET(1.666652011e-1f));
    p = GAX_FMA(p, r, GAX_SET(4.999999341e-1f));
    p = GAX_FMA(p * r, r, r) + GAX_SET(1);
#if GAX_PASS == 1
    __m256i half = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(126)), 23); /* 2^(n-1) */
    __m256 e = p * _mm256_castsi256_ps(half) * GAX_SET(2);
    e = _mm256_blendv_ps(e, GAX_SET((float)INFINITY), _mm256_cmp_ps(x, GAX_SET(88.7f), _CMP_GT_OQ));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, GAX_SET(-87.3f), _CMP_LT_OQ), e);
#else
    return _mm512_scalef_ps(p, n);
#endif
}

GAX_INLINE GAX_V GAX(max)(GAX_V top, GAX_V x) {
#if GAX_PASS == 1
    return _mm256_max_ps(x, top);
#else
    return _mm512_max_ps(x, top);
#endif
}

GAX_INLINE float GAX(total)(GAX_V x) {
#if GAX_PASS == 1
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
    return _mm512_reduce_add_ps(x);
#endif
}

GAX_FN float GAX(exponentials)(void *e, const float *l, size_t n, float reference) {
    GAX_V sum = GAX_SET(0);
    for (size_t i = 0; i < n; i += GAX_LANES) {
        size_t count = n - i;
        GAX_V x = count >= GAX_LANES ? GAX_LOAD(l + i) : GAX(load_first)(l + i, count);
        x -= GAX_SET(reference);
#if GAX_PASS == 1
        x = GAX(exp)(_mm256_min_ps(GAX_SET(75), x));
#else
        x = GAX(exp)(_mm512_min_ps(GAX_SET(75), x));
#endif
        if (count < GAX_LANES) {
            float lanes[GAX_LANES];
            GAX_STORE(lanes, x);
            x = GAX(load_first)(lanes, count);
        }
        sum += x;
        if (!e) continue;
#if GAX_WORD == 2
        __mmask16 mask = (__mmask16)(count < 16 ? (1u << count) - 1 : 0xffff);
        _mm256_mask_storeu_epi16((uint16_t *)e + i, mask, (__m256i)_mm512_cvtneps_pbh(x));
#else
        if (count >= GAX_LANES)
            GAX_STORE((float *)e + i, x);
        else
            memcpy((float *)e + i, &x, count * sizeof(float));
#endif
    }
    return GAX(total)(sum);
}

#if GAX_WORD == 1
GAX_FN void GAX(softmax)(float *s, float *top, float *sum, float *keep, size_t keys, size_t queries, float scale) {
    for (size_t i = 0; i < queries; i += GAX_LANES) {
        GAX_V before = GAX_LOAD(top + i), most = GAX_LOAD(s + i), total = GAX_SET(0), factor = GAX_SET(scale);
        for (size_t j = 1; j < keys; j++) most = GAX(max)(most, GAX_LOAD(s + j * GAI_X86_QUERIES + i));
        most = GAX(max)(before, most * factor);
        for (size_t j = 0; j < keys; j++) {
            GAX_V p = GAX(exp)(GAX_FMA(GAX_LOAD(s + j * GAI_X86_QUERIES + i), factor, -most));
            GAX_STORE(s + j * GAI_X86_QUERIES + i, p);
            total += p;
        }
        GAX_V k = GAX(exp)(before - most);
        GAX_STORE(keep + i, k);
        GAX_STORE(top + i, most);
        GAX_STORE(sum + i, GAX_FMA(GAX_LOAD(sum + i), k, total));
    }
}

GAX_FN void GAX(softmax_backward)(float *p, float *ds, size_t n, float scale, float lse, float delta) {
    for (size_t j = 0; j < n; j += GAX_LANES) {
        GAX_V e = GAX(exp)(GAX_FMA(GAX_LOAD(p + j), GAX_SET(scale), GAX_SET(-lse)));
        GAX_STORE(p + j, e);
        GAX_STORE(ds + j, e * (GAX_LOAD(ds + j) - GAX_SET(delta)) * GAX_SET(scale));
    }
}

/* ---- rows of the elementwise operators --------------------------------------------------------------------------- */

GAX_INLINE void GAX(store_first)(float *p, GAX_V v, size_t n) {
    if (n >= GAX_LANES) {
        GAX_STORE(p, v);
        return;
    }
    float lanes[GAX_LANES];
    GAX_STORE(lanes, v);
    memcpy(p, lanes, n * sizeof *p);
}

GAX_INLINE GAX_V GAX(sigmoid)(GAX_V x) {
    return GAX_SET(1) / (GAX_SET(1) + GAX(exp)(-x));
}

GAX_INLINE float GAX(dot)(const float *a, const float *b, size_t n) {
    GAX_V sum[4] = {GAX_SET(0), GAX_SET(0), GAX_SET(0), GAX_SET(0)}; /* additions that do not wait for each other */
    size_t i = 0;
    for (; i + 4 * GAX_LANES <= n; i += 4 * GAX_LANES) {
        GAX_UNROLL
        for (size_t q = 0; q < 4; q++)
            sum[q] = GAX_FMA(GAX_LOAD(a + i + q * GAX_LANES), GAX_LOAD(b + i + q * GAX_LANES), sum[q]);
    }
    for (; i < n; i += GAX_LANES)
        sum[0] = GAX_FMA(GAX(load_first)(a + i, n - i), GAX(load_first)(b + i, n - i), sum[0]);
    return GAX(total)((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

GAX_FN float GAX(rmsnorm)(float *h, const float *x, const float *w, size_t n, float eps) {
    float r = 1 / sqrtf(GAX(dot)(x, x, n) / (float)n + eps);
    for (size_t i = 0; i < n; i += GAX_LANES)
        GAX(store_first)(h + i, GAX(load_first)(w + i, n - i) * GAX(load_first)(x + i, n - i) * GAX_SET(r), n - i);
    return r;
}

GAX_FN void GAX(rmsnorm_backward)(float *dx, float *dw, const float *dh, const float *x, const float *w, float r,
                                  size_t n, bool add) {
    GAX_V sum = GAX_SET(0);
    for (size_t i = 0; i < n; i += GAX_LANES) {
        GAX_V product = GAX(load_first)(dh + i, n - i) * GAX(load_first)(x + i, n - i);
        GAX(store_first)(dw + i, GAX_FMA(product, GAX_SET(r), GAX(load_first)(dw + i, n - i)), n - i);
        sum = GAX_FMA(product, GAX(load_first)(w + i, n - i), sum);
    }
    GAX_V along = GAX_SET(r * r * (GAX(total)(sum) / (float)n));
    for (size_t i = 0; i < n; i += GAX_LANES) {
        GAX_V d = GAX(load_first)(w + i, n - i) * GAX(load_first)(dh + i, n - i);
        d = (d - GAX(load_first)(x + i, n - i) * along) * GAX_SET(r);
        if (add) d += GAX(load_first)(dx + i, n - i);
        GAX(store_first)(dx + i, d, n - i);
    }
}

/* Turns the pairs (x_i, x_{i+D/2}) by the angles of rope, or back. */
GAX_INLINE void GAX(rotate)(float *y, const float *x, const float *rope, size_t D, bool back) {
    size_t n = D / 2;
    for (size_t i = 0; i < n; i += GAX_LANES) {
        GAX_V a = GAX(load_first)(x + i, n - i), b = GAX(load_first)(x + n + i, n - i);
        GAX_V cosine = GAX(load_first)(rope + i, n - i), sine = GAX(load_first)(rope + n + i, n - i);
        if (back) sine = -sine;
        GAX(store_first)(y + i, a * cosine - b * sine, n - i);
        GAX(store_first)(y + n + i, b * cosine + a * sine, n - i);
    }
}

GAX_FN void GAX(head)(float *y, const float *x, const float *w, const float *rope, size_t D, float eps) {
    if (w)
        GAX(rmsnorm)(y, x, w, D, eps);
    else
        memcpy(y, x, D * sizeof *y);
    if (rope) GAX(rotate)(y, y, rope, D, false);
}

GAX_FN void GAX(head_backward)(float *dx, float *dw, const float *dy, const float *x, const float *w, const float *rope,
                               size_t D, float eps) {
    if (rope)
        GAX(rotate)(dx, dy, rope, D, true);
    else
        memcpy(dx, dy, D * sizeof *dx);
    if (w) GAX(rmsnorm_backward)(dx, dw, dx, x, w, 1 / sqrtf(GAX(dot)(x, x, D) / (float)D + eps), D, false);
}

GAX_FN void GAX(gate)(float *o, const float *y, const float *s, size_t n) {
    for (size_t i = 0; i < n; i += GAX_LANES)
        GAX(store_first)(o + i, GAX(load_first)(y + i, n - i) * GAX(sigmoid)(GAX(load_first)(s + i, n - i)), n - i);
}

GAX_FN void GAX(gate_backward)(float *dy, float *ds, const float *d_o, const float *y, const float *s, size_t n) {
    for (size_t i = 0; i < n; i += GAX_LANES) {
        GAX_V d = GAX(load_first)(d_o + i, n - i), p = GAX(sigmoid)(GAX(load_first)(s + i, n - i));
        GAX_V slope = d * GAX(load_first)(y + i, n - i) * p * (GAX_SET(1) - p);
        GAX(store_first)(dy + i, d * p, n - i);
        GAX(store_first)(ds + i, slope, n - i);
    }
}

GAX_FN float GAX(scale)(float *o, const float *y, const float *other, size_t n, float factor) {
    float dot = other ? GAX(dot)(y, other, n) : 0;
    for (size_t i = 0; i < n; i += GAX_LANES)
        GAX(store_first)(o + i, GAX(load_first)(y + i, n - i) * GAX_SET(factor), n - i);
    return dot;
}

GAX_FN void GAX(swiglu)(float *a, const float *u, size_t F) {
    for (size_t i = 0; i < F; i += GAX_LANES) {
        GAX_V act = GAX(load_first)(u + i, F - i), up = GAX(load_first)(u + F + i, F - i);
        GAX(store_first)(a + i, act * GAX(sigmoid)(act) * up, F - i);
    }
}

GAX_FN void GAX(swiglu_backward)(float *du, const float *da, const float *u, size_t F) {
    for (size_t i = 0; i < F; i += GAX_LANES) {
        GAX_V act = GAX(load_first)(u + i, F - i), up = GAX(load_first)(u + F + i, F - i);
        GAX_V d = GAX(load_first)(da + i, F - i);
        GAX_V p = GAX(sigmoid)(act), slope = p * GAX_FMA(act, GAX_SET(1) - p, GAX_SET(1));
        GAX(store_first)(du + i, d * up * slope, F - i);
        GAX(store_first)(du + F + i, d * act * p, F - i);
    }
}

GAX_FN void GAX(dots)(float *y, const float *x, const float *w, size_t stride, size_t rows, size_t n) {
    for (size_t j = 0; j < rows; j++) y[j] = GAX(dot)(x, w + j * stride, n);
}

GAX_FN void GAX(combine)(float *y, const float *p, const float *v, size_t stride, size_t rows, size_t n) {
    for (size_t i = 0; i < n; i += GAX_LANES) {
        GAX_V sum = GAX_SET(0);
        for (size_t j = 0; j < rows; j++) sum = GAX_FMA(GAX_SET(p[j]), GAX(load_first)(v + j * stride + i, n - i), sum);
        GAX(store_first)(y + i, sum, n - i);
    }
}

GAI_FN gai_x86_vectors GAX(vectors)(void) {
    gai_x86_vectors v = {GAX(softmax),
                         GAX(softmax_backward),
                         GAX(rmsnorm),
                         GAX(rmsnorm_backward),
                         GAX(head),
                         GAX(head_backward),
                         GAX(gate),
                         GAX(gate_backward),
                         GAX(scale),
                         GAX(swiglu),
                         GAX(swiglu_backward),
                         GAX(dots),
                         GAX(combine)};
    return v;
}
#endif

GAI_FN gai_x86_products GAX(products)(void) {
    gai_x86_products p = {GAX_ROWS,    GAX_A_WIDTH, 2 * GAX_LANES, GAX_WORD,         GAX_PASS == 4 ? GAX_ROWS : 1,
                          GAX(pack_a), GAX(pack_b), GAX(multiply), GAX(exponentials)};
    return p;
}

#undef GAX
#undef GAX_TARGET
#undef GAX_V
#undef GAX_LANES
#undef GAX_ROWS
#undef GAX_A_WIDTH
#undef GAX_WORD
#undef GAX_LOAD
#undef GAX_STORE
#undef GAX_SET
#undef GAX_FMA
#undef GAX_INLINE
#undef GAX_FN
#undef GAX_UNROLL
#undef GAX_PASS
#endif /* GAX_PASS */

#pragma pop_macro("I")
