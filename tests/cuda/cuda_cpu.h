/* cuda_cpu.h - CUDA kernels on the CPU, for tests on machines without a GPU: the same source, compiled by g++ or clang++
 * as C++17 against the real CUDA headers, so that types and prototypes cannot drift.
 *
 * One fiber for each CUDA thread, one block at a time, threads and blocks in random order (CUCPU_SEED; 0: in order, 1: in
 * reverse). gated_attention_cuda.cuh includes this file instead of the CUDA runtime when GAI_CUDA_CPU is defined. What a
 * kernel must keep to, so that one source serves nvcc and this:
 *
 *     GAI_LAUNCH(state, kernel, grid, block, shared_bytes, arguments...)     instead of <<< >>>
 *     GAI_SHARED(float, tile, [4][32]);  GAI_DYNAMIC_SHARED(float, name);    instead of __shared__
 *     static kernels; warp operations with full or uniform masks; no return before a barrier; block sizes that are
 *     multiples of 32; every inline PTX instruction in a function of its own that has a version here
 *
 * Not seen by this: fences and weak memory, rounding of fused operations, the operand layout of real PTX, speed. */
#ifndef CUDA_CPU_H
#define CUDA_CPU_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <cuda_runtime.h>
#include <cuda_bf16.h>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__ /* a plain static would hide races between blocks */
#define __shared__ static_assert(false, "use GAI_SHARED or GAI_DYNAMIC_SHARED");

struct cucpu_thread {
    uint3 index;
    int linear, lane, warp;
};
extern cucpu_thread *cucpu_current;
extern uint3 cucpu_block_index;
extern dim3 cucpu_block_size, cucpu_grid_size;
#define threadIdx (cucpu_current->index)
#define blockIdx  cucpu_block_index
#define blockDim  cucpu_block_size
#define gridDim   cucpu_grid_size

/* ---- the scheduler, cuda_cpu.cpp ----------------------------------------------------------------------------------- */

void *cucpu_dynamic_shared();
void *cucpu_shared(const void *key, size_t bytes, size_t align);
void cucpu_barrier(int line);
/* Waits until all lanes of the mask are here; the 32 values they brought. with_memory: also orders memory. The last one
 * to come makes the call for the whole warp. */
const uint64_t *cucpu_warp(uint32_t mask, uint64_t value, int line, bool with_memory,
                           void (*call)(const uint64_t *values) = nullptr);
void cucpu_yield();
/* Stops a kernel that does what is undefined on a GPU. */
__attribute__((noreturn)) void cucpu_fatal(const char *format, int a, int b);
void cucpu_run(const void *kernel, void (*body)(void *), void *argument, dim3 grid, dim3 block, size_t shared_bytes);

/* ---- the runtime, cuda_cpu_runtime.cpp ------------------------------------------------------------------------------ */

/* Puts work into a stream: copies `closure` and calls run, then destroy, when the stream gets there. */
cudaError_t cucpu_enqueue(cudaStream_t stream, void *closure, void (*run)(void *), void (*destroy)(void *));
/* Whether a launch of this shape is allowed. */
cudaError_t cucpu_check_launch(const void *kernel, dim3 grid, dim3 block, size_t shared_bytes);
/* Shared memory that a block of the kernel may have, what its functions declare included. */
size_t cucpu_shared_most(const void *kernel);

template <class F>
static inline cudaError_t cucpu_submit(cudaStream_t stream, F work) {
    return cucpu_enqueue(
        stream, new F(work), [](void *p) { (*(F *)p)(); }, [](void *p) { delete (F *)p; });
}

#ifdef CUCPU_CHECK
void cucpu_check_pointer(const void *p);
template <class T>
static inline void cucpu_check_argument(T value) {
    if constexpr (std::is_pointer<T>::value) cucpu_check_pointer((const void *)value);
    (void)value;
}
#endif

template <class... P, class... A>
static void cucpu_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                         A &&...a) {
    if (cucpu_check_launch((const void *)kernel, grid, block, shared_bytes) != cudaSuccess) return;
    std::tuple<P...> arguments(static_cast<P>(a)...);
#ifdef CUCPU_CHECK
    std::apply([](auto... value) { (cucpu_check_argument(value), ...); }, arguments);
#endif
    cucpu_submit(stream, [=] {
        auto body = [&] { std::apply(kernel, arguments); };
        cucpu_run((const void *)kernel, [](void *p) { (*(decltype(body) *)p)(); }, &body, grid, block, shared_bytes);
    });
}

/* ---- what kernels are written with ---------------------------------------------------------------------------------- */

#define GAI_SHARED(T, name, dimensions) \
    typedef T name##_shared dimensions; \
    static const char name##_key = 0;   \
    name##_shared &name = *(name##_shared *)cucpu_shared(&name##_key, sizeof(name##_shared), alignof(T))
#define GAI_DYNAMIC_SHARED(T, name) T *name = (T *)cucpu_dynamic_shared()
#define GAI_LAUNCH_ON(stream, kernel, grid, block, shared_bytes, ...) \
    cucpu_launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#define GAI_NCCL_LIBRARY nullptr /* the program itself: cuda_cpu_nccl.cpp */
enum { GAI_CUDA_WORKSPACE = 1 << 10, GAI_RANKS_HALVES = 1 << 10 };

#define CUCPU_LINE int line = __builtin_LINE()

static inline void __syncthreads(CUCPU_LINE) {
    cucpu_barrier(line);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, CUCPU_LINE) {
    cucpu_warp(mask, 0, line, true);
}

template <class T>
static inline uint64_t cucpu_pack(T v) {
    static_assert(sizeof v <= 8, "");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    return bits;
}
template <class T>
static inline T cucpu_unpack(uint64_t bits) {
    T v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

template <class T>
static inline T __shfl_xor_sync(unsigned mask, T v, int bits, CUCPU_LINE) {
    int source = cucpu_current->lane ^ bits;
    if (source > 31) cucpu_fatal("shuffle at line %d: %d is no lane", line, source);
    const uint64_t *slots = cucpu_warp(mask, cucpu_pack(v), line, false);
    return cucpu_unpack<T>(mask >> source & 1 ? slots[source] : ~0ull); /* undefined on the GPU: NaN */
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, CUCPU_LINE) {
    const uint64_t *slots = cucpu_warp(mask, predicate != 0, line, false);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) bits |= (unsigned)slots[i] << i;
    return bits;
}

#ifdef CUCPU_CHECK
void cucpu_check_atomic(void *p, int bytes, void *caller), cucpu_check_apart(bool on);
#define CUCPU_APART(on) cucpu_check_apart(on)
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) static T cucpu_update(T *p, F f) {
    cucpu_check_atomic(p, sizeof(T), __builtin_return_address(0));
    T old = *p;
    *p = f(old);
    cucpu_yield();
    return old;
}
#else
#define CUCPU_APART(on) (void)0
template <class T, class F>
static inline T cucpu_update(T *p, F f) { /* fibers share one CPU thread: nothing comes between */
    T old = *p;
    *p = f(old);
    cucpu_yield();
    return old;
}
#endif
template <class T>
static inline T atomicAdd(T *p, T v) {
    return cucpu_update(p, [=](T old) { return old + v; });
}
template <class T>
static inline T atomicMax(T *p, T v) {
    return cucpu_update(p, [=](T old) { return old > v ? old : v; });
}

static inline uint32_t __float_as_uint(float x) {
    return cucpu_unpack<uint32_t>(cucpu_pack(x));
}
static inline float __uint_as_float(uint32_t x) {
    return cucpu_unpack<float>(cucpu_pack(x));
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}

/* Tensor core: D (16, 8) += A (16, 16) B (16, 8), float32 += bfloat16, fragments as in the PTX ISA (mma.m16n8k16). */
struct cucpu_fragments {
    float *d;
    const uint32_t *a, *b;
};
void cucpu_mma(const uint64_t *fragments);
static inline void gai_mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUCPU_LINE) {
    cucpu_fragments mine = {d, a, b};
    cucpu_warp(~0u, (uint64_t)(uintptr_t)&mine, line, false, cucpu_mma);
}

/* Four 8 x 8 matrices from shared memory, as in the PTX ISA (ldmatrix.m8n8.x4): lane l brings the address of row l % 8 of
 * matrix l / 8; it gets values 2 (l % 4), 2 (l % 4) + 1 of row l / 4 of each matrix, or of each transposed matrix. */
void cucpu_aligned_to_16(const uint64_t *addresses);
static inline void cucpu_ldmatrix(uint32_t (&r)[4], const __nv_bfloat16 *row, bool transposed, int line) {
    const uint64_t *rows = cucpu_warp(~0u, (uint64_t)(uintptr_t)row, line, false, cucpu_aligned_to_16);
    int g = cucpu_current->lane / 4, t = 2 * (cucpu_current->lane % 4);
    CUCPU_APART(true); /* one access, not these */
    for (int matrix = 0; matrix < 4; matrix++) {
        const uint64_t *at = rows + 8 * matrix;
        uint16_t two[2];
        for (int i = 0; i < 2; i++)
            two[i] = ((const uint16_t *)(uintptr_t)at[transposed ? t + i : g])[transposed ? g : t + i];
        r[matrix] = two[0] | (uint32_t)two[1] << 16;
    }
    CUCPU_APART(false);
}
static inline void gai_ldmatrix(uint32_t (&r)[4], const __nv_bfloat16 *row, CUCPU_LINE) {
    cucpu_ldmatrix(r, row, false, line);
}
static inline void gai_ldmatrix_transposed(uint32_t (&r)[4], const __nv_bfloat16 *row, CUCPU_LINE) {
    cucpu_ldmatrix(r, row, true, line);
}
/* 16 bytes on their way to shared memory: there when the thread waits, as late as may be; until then NaN. */
void cucpu_copy_async(void *to, const void *from, int line);
void cucpu_copies_wait();
static inline void gai_copy_async(__nv_bfloat16 *to, const __nv_bfloat16 *from, CUCPU_LINE) {
    cucpu_copy_async(to, from, line);
}
static inline void gai_copies_wait() {
    cucpu_copies_wait();
}
#undef CUCPU_LINE

#endif
