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
/* Waits until all lanes of the mask are here; the 32 values they brought. with_memory: also orders memory. */
const uint64_t *cucpu_warp(uint32_t mask, uint64_t value, int line, bool with_memory);
void cucpu_yield();
void cucpu_run(void (*body)(void *), void *argument, dim3 grid, dim3 block, size_t shared_bytes);

/* ---- the runtime, cuda_cpu_runtime.cpp ------------------------------------------------------------------------------ */

/* Puts work into a stream: copies `closure` and calls run, then destroy, when the stream gets there. */
cudaError_t cucpu_enqueue(cudaStream_t stream, void *closure, void (*run)(void *), void (*destroy)(void *));
/* Whether a launch of this shape is allowed. */
cudaError_t cucpu_check_launch(const void *kernel, dim3 grid, dim3 block, size_t shared_bytes);

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
        cucpu_run([](void *p) { (*(decltype(body) *)p)(); }, &body, grid, block, shared_bytes);
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

#define CUCPU_LINE int line = __builtin_LINE()

static inline void __syncthreads(CUCPU_LINE) {
    cucpu_barrier(line);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, CUCPU_LINE) {
    cucpu_warp(mask, 0, line, true);
}
static inline void __threadfence() {}

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

/* source counts within the segment of `width` lanes. */
template <class T>
static inline T cucpu_shuffle(unsigned mask, T v, int source, int width, int line) {
    int base = cucpu_current->lane & ~(width - 1);
    const uint64_t *slots = cucpu_warp(mask, cucpu_pack(v), line, false);
    if (source < 0 || source >= width) return v;
    if (!(mask >> (base + source) & 1)) return cucpu_unpack<T>(~0ull); /* undefined on the GPU: NaN */
    return cucpu_unpack<T>(slots[base + source]);
}
template <class T>
static inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, CUCPU_LINE) {
    return cucpu_shuffle(mask, v, source & (width - 1), width, line);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, CUCPU_LINE) {
    return cucpu_shuffle(mask, v, (cucpu_current->lane & (width - 1)) ^ bits, width, line);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T v, int by, int width = 32, CUCPU_LINE) {
    return cucpu_shuffle(mask, v, (cucpu_current->lane & (width - 1)) + by, width, line);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T v, int by, int width = 32, CUCPU_LINE) {
    return cucpu_shuffle(mask, v, (cucpu_current->lane & (width - 1)) - by, width, line);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, CUCPU_LINE) {
    const uint64_t *slots = cucpu_warp(mask, predicate != 0, line, false);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) bits |= (unsigned)slots[i] << i;
    return bits;
}

#ifdef CUCPU_CHECK
void cucpu_check_atomic(void *p, int bytes, void *caller);
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) static T cucpu_update(T *p, F f) {
    cucpu_check_atomic(p, sizeof(T), __builtin_return_address(0));
    T old = *p;
    *p = f(old);
    cucpu_yield();
    return old;
}
#else
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

template <class T>
static inline T __ldg(const T *p) {
    return *p;
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
static inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
static inline float __fdividef(float a, float b) {
    return a / b;
}
#define __expf(x)  expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x)  logf(x)

/* Tensor core: D (16, 8) += A (16, 16) B (16, 8), float32 += bfloat16, fragments as in the PTX ISA (mma.m16n8k16). */
static inline void gai_mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUCPU_LINE) {
    float A[16][16], B[16][8];
    uint64_t a01[32], a23[32], b01[32];
    memcpy(a01, cucpu_warp(~0u, a[0] | (uint64_t)a[1] << 32, line, false), sizeof a01);
    memcpy(a23, cucpu_warp(~0u, a[2] | (uint64_t)a[3] << 32, line, false), sizeof a23);
    memcpy(b01, cucpu_warp(~0u, b[0] | (uint64_t)b[1] << 32, line, false), sizeof b01);
    auto value = [](uint64_t four, int i) { return __uint_as_float((uint32_t)(four >> 16 * i & 0xffff) << 16); };
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 2; i++) {
            int g = l >> 2, t = 2 * (l & 3) + i;
            A[g][t] = value(a01[l], i), A[g + 8][t] = value(a01[l], 2 + i);
            A[g][t + 8] = value(a23[l], i), A[g + 8][t + 8] = value(a23[l], 2 + i);
            B[t][g] = value(b01[l], i), B[t + 8][g] = value(b01[l], 2 + i);
        }
    int g = cucpu_current->lane >> 2, t = 2 * (cucpu_current->lane & 3);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) d[i] += A[g + 8 * (i >> 1)][k] * B[k][t + (i & 1)];
}
#undef CUCPU_LINE

#endif
