/* gated_attention_cuda.cuh - the operators of gated_attention.h on NVIDIA GPUs, compute capability 7.5 and above.
 *
 * An optional companion. Its declarations are plain C:
 *
 *     #include "gated_attention.h"
 *     #include "gated_attention_cuda.cuh"
 *
 *     ga_cuda_settings settings = {0, true, false};   // the first GPU, bfloat16 products
 *     ga_device device;
 *     if (ga_device_cuda(&device, settings, &e) != GA_OK) ...
 *     ga_model *m = ga_create(&c, &device, GA_TRAINING, &e);
 *     ...
 *     ga_destroy(m);
 *     ga_device_cuda_destroy(&device);
 *
 * The implementation is a unit of its own, compiled by nvcc and linked with cuBLAS:
 *
 *     nvcc -x cu -O3 -DGATED_ATTENTION_CUDA_IMPLEMENTATION -c gated_attention_cuda.cuh -o cuda.o
 *
 * Numbers: all tensors are float32. Products read float32, or float32 rounded to TF32, or operands rounded to bfloat16
 * (weights from a packed copy that is renewed when they change), and add in float32; all else is float32, with sums over
 * a whole tensor in double. The same bits in every run on one device: no floating-point atomics.
 *
 * Errors: operators return nothing, so the first failed call is kept, with file, line and the library's word; operators
 * after it do nothing; the model asks for it at the end of each pass (ga_device.status).
 */
#ifndef GATED_ATTENTION_CUDA_CUH
#define GATED_ATTENTION_CUDA_CUH

#include "gated_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int index; /* of the GPU, as CUDA counts them */
    bool bf16; /* bfloat16 products and attention where the GPU has them (compute capability 8.0) */
    bool tf32; /* float32 products by TF32 */
} ga_cuda_settings;

/* GA_ERR_DEVICE when there is no such GPU, or it is too old. */
ga_result ga_device_cuda(ga_device *device, ga_cuda_settings settings, ga_error *e);
/* After the models that use it. */
void ga_device_cuda_destroy(ga_device *device);
/* Whether its products read bfloat16. */
bool ga_device_cuda_bf16(const ga_device *device);

#ifdef __cplusplus
}
#endif
#endif /* GATED_ATTENTION_CUDA_CUH */

/* ==== implementation ============================================================================================== */

#if defined(GATED_ATTENTION_CUDA_IMPLEMENTATION) && !defined(GATED_ATTENTION_CUDA_IMPLEMENTED)
#define GATED_ATTENTION_CUDA_IMPLEMENTED

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cublas_v2.h>

#ifdef GA_DOUBLE
#error "gated_attention_cuda.cuh computes in float: compile it without GA_DOUBLE"
#endif

/* The few things that nvcc writes in a way of its own. tests/cuda/cuda_cpu.h has them for the CPU. */
#ifdef GAI_CUDA_CPU
#include "cuda_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define GAI_SHARED(T, name, dimensions) __shared__ T name dimensions
#define GAI_DYNAMIC_SHARED(T, name)                                     \
    extern __shared__ __align__(16) unsigned char gai_dynamic_shared[]; \
    T *name = reinterpret_cast<T *>(gai_dynamic_shared)
#define GAI_LAUNCH_ON(stream, kernel, grid, block, shared_bytes, ...) \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

/* Tensor core: D (16, 8) += A (16, 16) B (16, 8), float32 += bfloat16, fragments as in the PTX ISA (mma.m16n8k16). */
static __device__ __forceinline__ void gai_mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}
#endif

/* ---- state, errors, memory ---------------------------------------------------------------------------------------- */

enum { GAI_CUDA_BLOCKS = 16, GAI_CUDA_WORKSPACE = 32 << 20 };

/* A block of weights and its copy in bfloat16. */
typedef struct {
    const float *weights;
    size_t n;
    __nv_bfloat16 *packed;
} gai_cuda_packed;

typedef struct {
    ga_error error; /* the first since it was asked for */
    cudaDeviceProp properties;
    char name[320];
    bool bf16, tf32;
    cudaStream_t stream;
    cublasHandle_t blas;
    void *
        workspace; /* of cuBLAS: its own, so that its choices, and with them the bits, do not depend on anything else */
    gai_cuda_packed packed[GAI_CUDA_BLOCKS];
    char *scratch; /* for the time of one operator */
    size_t scratch_bytes;
} gai_cuda;

static void gai_cuda_fail(gai_cuda *d, ga_result result, const char *file, int line, const char *call,
                          const char *word) {
    if (d->error.result != GA_OK) return;
    const char *name = strrchr(file, '/');
    d->error.result = result;
    snprintf(d->error.text, sizeof d->error.text, "%s:%d: %s: %s", name ? name + 1 : file, line, call, word);
}

static bool gai_cuda_checked(gai_cuda *d, cudaError_t e, const char *file, int line, const char *call) {
    if (e == cudaSuccess) return true;
    (void)cudaGetLastError();
    gai_cuda_fail(d, e == cudaErrorMemoryAllocation ? GA_ERR_MEMORY : GA_ERR_DEVICE, file, line, call,
                  cudaGetErrorString(e));
    return false;
}

static bool gai_cuda_checked(gai_cuda *d, cublasStatus_t e, const char *file, int line, const char *call) {
    if (e == CUBLAS_STATUS_SUCCESS) return true;
    gai_cuda_fail(d, GA_ERR_DEVICE, file, line, call, cublasGetStatusString(e));
    return false;
}

/* Makes a call of CUDA or cuBLAS, unless one has failed before; whether all is well. */
#define GAI_CUDA(d, call) ((d)->error.result == GA_OK && gai_cuda_checked((d), (call), __FILE__, __LINE__, #call))

/* Launches a kernel on the device's stream, unless a call has failed before. The kernel stands in parentheses if it has
 * template arguments. */
#define GAI_LAUNCH(d, kernel, grid, block, shared_bytes, ...)                                \
    do {                                                                                     \
        if ((d)->error.result != GA_OK) break;                                               \
        GAI_LAUNCH_ON((d)->stream, kernel, grid, block, shared_bytes, __VA_ARGS__);          \
        gai_cuda_checked((d), cudaGetLastError(), __FILE__, __LINE__, "launch of " #kernel); \
    } while (0)

static inline size_t gai_cuda_ceil(size_t a, size_t b) {
    return (a + b - 1) / b;
}

/* Memory for the time of one operator, aligned to 256 bytes; NULL after a failure. What is asked for in one call is all
 * that the operator gets. */
static void *gai_cuda_scratch(gai_cuda *d, size_t bytes) {
    if (d->error.result != GA_OK) return NULL;
    if (bytes <= d->scratch_bytes) return d->scratch;
    if (d->scratch && !GAI_CUDA(d, cudaFree(d->scratch))) return NULL;
    d->scratch = NULL, d->scratch_bytes = 0;
    if (!GAI_CUDA(d, cudaMalloc((void **)&d->scratch, bytes))) return NULL;
    d->scratch_bytes = bytes;
    return d->scratch;
}

static void gai_cuda_zero(void *state, void *p, size_t bytes) {
    gai_cuda *d = (gai_cuda *)state;
    if (bytes) (void)GAI_CUDA(d, cudaMemsetAsync(p, 0, bytes, d->stream));
}

static void *gai_cuda_allocate(void *state, size_t bytes) {
    gai_cuda *d = (gai_cuda *)state;
    void *p = NULL;
    if (!GAI_CUDA(d, cudaMalloc(&p, bytes ? bytes : 1))) return NULL;
    gai_cuda_zero(state, p, bytes);
    return p;
}

static void gai_cuda_release(void *state, void *p) {
    gai_cuda *d = (gai_cuda *)state;
    for (int i = 0; i < GAI_CUDA_BLOCKS; i++)
        if (p && d->packed[i].weights == p) {
            (void)cudaFree(d->packed[i].packed); /* on the way out: an earlier error matters more */
            memset(&d->packed[i], 0, sizeof d->packed[i]);
        }
    (void)cudaFree(p);
}

static void gai_cuda_copy_in(void *state, void *to, const void *from_host, size_t bytes) {
    gai_cuda *d = (gai_cuda *)state;
    if (bytes) (void)GAI_CUDA(d, cudaMemcpyAsync(to, from_host, bytes, cudaMemcpyHostToDevice, d->stream));
}

static void gai_cuda_copy_out(void *state, void *to_host, const void *from, size_t bytes) {
    gai_cuda *d = (gai_cuda *)state;
    if (bytes && GAI_CUDA(d, cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDeviceToHost, d->stream)) &&
        GAI_CUDA(d, cudaStreamSynchronize(d->stream)))
        return;
    memset(to_host, 0xff, bytes); /* NaN: nobody takes it for a result */
}

static ga_result gai_cuda_status(void *state, ga_error *e) {
    gai_cuda *d = (gai_cuda *)state;
    ga_result result = d->error.result;
    if (result != GA_OK && e) *e = d->error;
    memset(&d->error, 0, sizeof d->error);
    return result;
}

/* ---- what kernels share ------------------------------------------------------------------------------------------- */

static const unsigned GAI_WARP = 0xffffffffu; /* all lanes */

static __device__ __forceinline__ float gai_warp_sum(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(GAI_WARP, v, o);
    return v;
}

static __device__ __forceinline__ float gai_warp_max(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(GAI_WARP, v, o));
    return v;
}

/* The sum over the block, for every thread; blocks of up to 1024 threads in whole warps. */
static __device__ __forceinline__ float gai_block_sum(float v) {
    GAI_SHARED(float, part, [32]);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    v = gai_warp_sum(v);
    if (lane == 0) part[warp] = v;
    __syncthreads();
    v = gai_warp_sum(lane < warps ? part[lane] : 0.f);
    __syncthreads(); /* part is used again by the next call */
    return v;
}

/* VEC values at once: 16 bytes where sizes and addresses allow it (VEC 4), else one by one. */
template <int VEC>
struct gai_pack {
    float v[VEC];
};

template <int VEC>
static __device__ __forceinline__ gai_pack<VEC> gai_load(const float *p) {
    gai_pack<VEC> x;
    if constexpr (VEC == 4) {
        float4 f = *reinterpret_cast<const float4 *>(p);
        x.v[0] = f.x, x.v[1] = f.y, x.v[2] = f.z, x.v[3] = f.w;
    } else
        x.v[0] = *p;
    return x;
}

template <int VEC>
static __device__ __forceinline__ void gai_store(float *p, const gai_pack<VEC> &x) {
    if constexpr (VEC == 4)
        *reinterpret_cast<float4 *>(p) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    else
        *p = x.v[0];
}

/* Whether 16-byte accesses work: `parts` has one bit or more below 16 where an address or a stride forbids them. */
static inline bool gai_vectors(uintptr_t parts) {
    return parts % 16 == 0;
}
static inline uintptr_t gai_at(const void *p) {
    return (uintptr_t)p;
}

/* ---- RMSNorm ------------------------------------------------------------------------------------------------------ */

/* One block for each row. */
template <int VEC>
static __global__ void __launch_bounds__(256)
    gai_k_rmsnorm_forward(float *h, float *rstd, const float *x, const float *w, size_t C, float eps) {
    const float *xn = x + blockIdx.x * C;
    float *hn = h + blockIdx.x * C, sum = 0;
    for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) {
        gai_pack<VEC> a = gai_load<VEC>(xn + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += a.v[i] * a.v[i];
    }
    float r = 1 / sqrtf(gai_block_sum(sum) / (float)C + eps);
    for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) {
        gai_pack<VEC> a = gai_load<VEC>(xn + c), b = gai_load<VEC>(w + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) a.v[i] = b.v[i] * a.v[i] * r;
        gai_store<VEC>(hn + c, a);
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

/* Threads of a block that works on a row of n packs. */
static inline unsigned gai_row_threads(size_t n) {
    return n >= 256 ? 256 : n <= 32 ? 32 : (unsigned)gai_cuda_ceil(n, 32) * 32;
}

static void gai_cuda_rmsnorm_forward(void *state, float *h, float *rstd, const float *x, const float *w, size_t N,
                                     size_t C, float eps) {
    gai_cuda *d = (gai_cuda *)state;
    if (gai_vectors(gai_at(h) | gai_at(x) | gai_at(w) | C * sizeof *x))
        GAI_LAUNCH(d, gai_k_rmsnorm_forward<4>, (unsigned)N, gai_row_threads(C / 4), 0, h, rstd, x, w, C, eps);
    else
        GAI_LAUNCH(d, gai_k_rmsnorm_forward<1>, (unsigned)N, gai_row_threads(C), 0, h, rstd, x, w, C, eps);
}

/* ==== attention ==================================================================================================== */
/* Flash attention (Dao 2022, 2023): one block of threads owns 64 rows of one head and walks over the other side in tiles,
 * so that no T x T matrix exists in memory. Three kernels,
 *
 *     forward   rows are queries   S = Q K^T    y  += P V          over the keys
 *     dq        rows are queries   S = Q K^T    dq += dS K         over the keys,    with dP = dY V^T
 *     dk, dv    rows are keys      S^T = K Q^T  dv += P^T dY       over the queries, with dP^T = V dY^T
 *                                               dk += dS^T Q
 *
 * in two versions: gai_flash_ on tensor cores, bfloat16 with float32 accumulation, and gai_plain_ in float32. No sum
 * depends on the order in which blocks run, so every run gives the same bits.
 *
 * Rounding of the tensor-core version: q, k, v and dy to bfloat16 as they are loaded, P and dS as they become operands, each
 * to the nearest. Scores, the softmax and its sum, delta, lse and all accumulators are float32.
 *
 * Costs of a head, S = T, counting 2 FLOPs for a multiply-add, side of it below the diagonal (tiles above it are skipped):
 *
 *                  products            FLOPs       float32 values to and from memory, each read once
 *     forward      S, y                2 T^2 D     (4 T D + T) with k and v shared by the group
 *     dq           S, dP, dq           3 T^2 D     5 T D + 2 T
 *     dk, dv       S, dP, dk, dv       4 T^2 D     6 T D + 2 T
 *
 * A tile of 64 rows is read again by each of the T / 64 blocks of its head, T / 128 times on average: from the second-level
 * cache. */

/* Sizes of a launch of attention. */
struct gai_attention {
    int T, S, HQ, HK, D;
    float scale; /* 1 / sqrt(D) */
};

/* Where the rows of one head of one sequence start, and how far apart they are. */
struct gai_head {
    size_t q, kv, row, q_stride, kv_stride; /* row: of lse and delta */
};

static __device__ __forceinline__ gai_head gai_head_at(int b, int h, const gai_attention &n) {
    size_t T = n.T, S = n.S;
    return {(b * T * n.HQ + h) * n.D, (b * S * n.HK + h / (n.HQ / n.HK)) * n.D, ((size_t)b * n.HQ + h) * T,
            (size_t)n.HQ * n.D, (size_t)n.HK * n.D};
}

/* How many keys the last of the queries [i0, i0 + 64) sees. */
static __device__ __forceinline__ int gai_keys_seen(int i0, const gai_attention &n) {
    int keys = n.S - n.T + i0 + 64;
    return keys < n.S ? keys : n.S;
}

/* ---- on tensor cores ------------------------------------------------------------------------------------------------ */

enum { GAI_FLASH_ROWS = 64, GAI_FLASH_THREADS = 128 }; /* 16 rows for each of four warps */

#define GAI_LOG2E 1.44269504f
#define GAI_LN2   0.69314718f

#ifndef GAI_CUDA_CPU
/* Four 8 x 8 matrices of bfloat16 from shared memory: lane l gives the address of row l % 8 of matrix l / 8, and gets
 * values 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each; of each transposed matrix in the second form. */
static __device__ __forceinline__ void gai_ldmatrix(uint32_t (&r)[4], const __nv_bfloat16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
static __device__ __forceinline__ void gai_ldmatrix_transposed(uint32_t (&r)[4], const __nv_bfloat16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
#endif

/* 2^x, to 2 units in the last place. */
static __device__ __forceinline__ float gai_exp2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

/* Two values rounded to bfloat16; the first in the lower side. */
static __device__ __forceinline__ uint32_t gai_pack_bf16(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &two, sizeof bits);
    return bits;
}

/* Rows of a tile on the side that is walked over: fewer where the accumulators take more registers. */
template <int D>
constexpr int gai_flash_step = D <= 64 ? 64 : 32;

/* A tile (ROWS, D) on its way from float32 in global memory to bfloat16 in shared memory, held in the registers of the
 * block: read() early, compute, write() late, and the latency of memory is hidden. Rows and columns that do not exist
 * are zero. A row in shared memory takes an odd number of 16-byte units: the eight rows that ldmatrix reads at a time
 * then lie in different banks. */
template <int ROWS, int D>
struct gai_flash_tile {
    enum { STRIDE = D + 8, VALUES = ROWS * STRIDE, VECTORS = ROWS * D / 4 / GAI_FLASH_THREADS };
    float4 vectors[VECTORS];

    __device__ __forceinline__ void read(const float *from, size_t stride, int rows, int columns) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            int at = threadIdx.x + i * GAI_FLASH_THREADS, row = at / (D / 4), column = at % (D / 4) * 4;
            bool exists = row < rows && column < columns;
            vectors[i] = exists ? *(const float4 *)(from + row * stride + column) : make_float4(0, 0, 0, 0);
        }
    }
    __device__ __forceinline__ void write(__nv_bfloat16 *to) const {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            int at = threadIdx.x + i * GAI_FLASH_THREADS, row = at / (D / 4), column = at % (D / 4) * 4;
            float4 f = vectors[i];
            *(uint2 *)(to + row * STRIDE + column) = make_uint2(gai_pack_bf16(f.x, f.y), gai_pack_bf16(f.z, f.w));
        }
    }
};

/* The operand A (16, 16) at the upper left of a tile. */
template <int STRIDE>
static __device__ __forceinline__ void gai_flash_operand(uint32_t (&a)[4], const __nv_bfloat16 *tile) {
    int lane = threadIdx.x & 31;
    gai_ldmatrix(a, tile + (lane & 15) * STRIDE + (lane >> 4) * 8);
}

/* Two neighbouring accumulators (16, 8) as one operand A (16, 16): their layouts agree lane by lane. */
static __device__ __forceinline__ void gai_flash_operand(uint32_t (&a)[4], const float (&left)[4],
                                                         const float (&right)[4]) {
    a[0] = gai_pack_bf16(left[0], left[1]), a[1] = gai_pack_bf16(left[2], left[3]);
    a[2] = gai_pack_bf16(right[0], right[1]), a[3] = gai_pack_bf16(right[2], right[3]);
}

/* c (16, 8 N) += a (16, 16) b^T with b (8 N, 16) at the upper left of a tile. */
template <int STRIDE, int N>
static __device__ __forceinline__ void gai_flash_rows(float (&c)[N][4], const uint32_t (&a)[4],
                                                      const __nv_bfloat16 *b) {
    int lane = threadIdx.x & 31;
    b += ((lane & 7) + (lane >> 4) * 8) * STRIDE + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t pair[4];
        gai_ldmatrix(pair, b + n * 8 * STRIDE);
        gai_mma_m16n8k16(c[n], a, {pair[0], pair[1]});
        gai_mma_m16n8k16(c[n + 1], a, {pair[2], pair[3]});
    }
}

/* c (16, 8 N) += a (16, 16) b with b (16, 8 N) at the upper left of a tile. */
template <int STRIDE, int N>
static __device__ __forceinline__ void gai_flash_columns(float (&c)[N][4], const uint32_t (&a)[4],
                                                         const __nv_bfloat16 *b) {
    int lane = threadIdx.x & 31;
    b += (lane & 15) * STRIDE + (lane >> 4) * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t pair[4];
        gai_ldmatrix_transposed(pair, b + n * 8);
        gai_mma_m16n8k16(c[n], a, {pair[0], pair[1]});
        gai_mma_m16n8k16(c[n + 1], a, {pair[2], pair[3]});
    }
}

/* c (16, 8 N) = a b^T over D columns: a the 16 rows of this warp, b (8 N, D). */
template <int D, int N>
static __device__ __forceinline__ void gai_flash_scores(float (&c)[N][4], const __nv_bfloat16 *a,
                                                        const __nv_bfloat16 *b) {
    constexpr int STRIDE = D + 8;
#pragma unroll
    for (int n = 0; n < N; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        uint32_t part[4];
        gai_flash_operand<STRIDE>(part, a + d);
        gai_flash_rows<STRIDE>(c, part, b + d);
    }
}

/* Writes factor[side] * c to the 16 rows of this warp that exist. */
template <int N>
static __device__ __forceinline__ void gai_flash_write(float *to, size_t stride, int rows, int columns,
                                                       const float (&c)[N][4], float upper, float lower) {
    int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (8 * n + column >= columns) continue;
        float *at = to + row * stride + 8 * n + column;
        if (row < rows) *(float2 *)at = make_float2(c[n][0] * upper, c[n][1] * upper);
        if (row + 8 < rows) *(float2 *)(at + 8 * stride) = make_float2(c[n][2] * lower, c[n][3] * lower);
    }
}

/* The largest and the sum over the four lanes that hold one row of an accumulator. */
static __device__ __forceinline__ float gai_row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(GAI_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(GAI_WARP, x, 2));
}
static __device__ __forceinline__ float gai_row_sum(float x) {
    x += __shfl_xor_sync(GAI_WARP, x, 1);
    return x + __shfl_xor_sync(GAI_WARP, x, 2);
}

/* Scores of one tile to exp(s - top), with what has been summed before scaled to the new top. Powers of two, so that the
 * factor of exp2 and of 1 / sqrt(D) is one. top, sum: of the rows g and g + 8; sum is this lane's part of it. */
template <int N, int M>
static __device__ __forceinline__ void gai_flash_softmax(float (&s)[N][4], float (&y)[M][4], float (&top)[2],
                                                         float (&sum)[2], float factor) {
#pragma unroll
    for (int side = 0; side < 2; side++) {
        float next = -INFINITY, part = 0;
#pragma unroll
        for (int n = 0; n < N; n++) next = fmaxf(next, fmaxf(s[n][2 * side], s[n][2 * side + 1]));
        next = fmaxf(top[side], gai_row_max(next) * factor);
        float keep = gai_exp2(top[side] - next);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 2 * side; i < 2 * side + 2; i++) part += s[n][i] = gai_exp2(s[n][i] * factor - next);
        top[side] = next, sum[side] = sum[side] * keep + part;
#pragma unroll
        for (int n = 0; n < M; n++) y[n][2 * side] *= keep, y[n][2 * side + 1] *= keep;
    }
}

/* Scores of keys that lie after their query become -infinity. first: key of column 0 less query of row 0 of this warp. */
template <int N>
static __device__ __forceinline__ void gai_flash_mask(float (&s)[N][4], int first) {
    int lane = threadIdx.x & 31, after = first + lane % 4 * 2 - lane / 4;
    if (first + 8 * N - 1 <= 0) return;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (after + 8 * n + (i & 1) - 8 * (i >> 1) > 0) s[n][i] = -INFINITY;
}

/* See ga_sdpa_forward. One block for 64 queries of a head; those with the most keys start first. */
template <int D>
static __global__ void __launch_bounds__(GAI_FLASH_THREADS, 2)
    gai_k_flash_forward(float *y, float *lse, const float *q, const float *k, const float *v, const float *sink,
                        int heads, gai_attention n) {
    constexpr int KEYS = gai_flash_step<D>, STRIDE = D + 8;
    typedef gai_flash_tile<KEYS, D> step;
    GAI_DYNAMIC_SHARED(__nv_bfloat16, k_tile);
    __nv_bfloat16 *v_tile = k_tile + step::VALUES, *q_tile = k_tile; /* q only until it is in registers */
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, h = blockIdx.x % heads % n.HQ;
    int i0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * GAI_FLASH_ROWS, offset = n.S - n.T;
    int keys = gai_keys_seen(i0, n);
    gai_head at = gai_head_at(blockIdx.x % heads / n.HQ, h, n);
    k += at.kv, v += at.kv;

    gai_flash_tile<GAI_FLASH_ROWS, D> rows;
    rows.read(q + at.q + i0 * at.q_stride, at.q_stride, n.T - i0, n.D);
    rows.write(q_tile);
    step moving;
    moving.read(k, at.kv_stride, keys, n.D);
    __syncthreads();
    uint32_t q_part[D / 16][4];
#pragma unroll
    for (int d = 0; d < D / 16; d++) gai_flash_operand<STRIDE>(q_part[d], q_tile + warp * 16 * STRIDE + d * 16);
    __syncthreads();
    moving.write(k_tile);
    __syncthreads();

    float sum_y[D / 8][4] = {}, top[2], sum[2];
    top[0] = top[1] = sink ? sink[h] * GAI_LOG2E : -INFINITY;
    sum[0] = sum[1] = sink && lane % 4 == 0;
    for (int j0 = 0; j0 < keys; j0 += KEYS) {
        bool more = j0 + KEYS < keys;
        moving.read(v + j0 * at.kv_stride, at.kv_stride, keys - j0, n.D);
        float s[KEYS / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; d++) gai_flash_rows<STRIDE>(s, q_part[d], k_tile + d * 16);
        gai_flash_mask(s, j0 - (offset + i0 + warp * 16));
        gai_flash_softmax(s, sum_y, top, sum, n.scale * GAI_LOG2E);
        moving.write(v_tile);
        __syncthreads();
        if (more) moving.read(k + (j0 + KEYS) * at.kv_stride, at.kv_stride, keys - j0 - KEYS, n.D);
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            uint32_t p[4];
            gai_flash_operand(p, s[2 * j], s[2 * j + 1]);
            gai_flash_columns<STRIDE>(sum_y, p, v_tile + j * 16 * STRIDE);
        }
        if (more) moving.write(k_tile);
        __syncthreads();
    }

    float all[2] = {gai_row_sum(sum[0]), gai_row_sum(sum[1])};
    gai_flash_write(y + at.q + i0 * at.q_stride, at.q_stride, n.T - i0, n.D, sum_y, 1 / all[0], 1 / all[1]);
    for (int side = 0; side < 2; side++) {
        int i = i0 + warp * 16 + lane / 4 + 8 * side;
        if (lane % 4 == 0 && i < n.T) lse[at.row + i] = (top[side] + log2f(all[side])) * GAI_LN2;
    }
}

/* dq of ga_sdpa_backward; delta_i = dy_i . y_i. One block for 64 queries of a head. */
template <int D>
static __global__ void __launch_bounds__(GAI_FLASH_THREADS, 2)
    gai_k_flash_backward_q(float *dq, const float *dy, const float *lse, const float *delta, const float *q,
                           const float *k, const float *v, int heads, gai_attention n) {
    constexpr int KEYS = gai_flash_step<D>, STRIDE = D + 8;
    typedef gai_flash_tile<GAI_FLASH_ROWS, D> tile;
    typedef gai_flash_tile<KEYS, D> step;
    GAI_DYNAMIC_SHARED(__nv_bfloat16, q_tile);
    __nv_bfloat16 *dy_tile = q_tile + tile::VALUES, *k_tile = dy_tile + tile::VALUES, *v_tile = k_tile + step::VALUES;
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int i0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * GAI_FLASH_ROWS, offset = n.S - n.T;
    int keys = gai_keys_seen(i0, n);
    gai_head at = gai_head_at(blockIdx.x % heads / n.HQ, blockIdx.x % heads % n.HQ, n);
    k += at.kv, v += at.kv;

    tile rows;
    rows.read(q + at.q + i0 * at.q_stride, at.q_stride, n.T - i0, n.D);
    rows.write(q_tile);
    rows.read(dy + at.q + i0 * at.q_stride, at.q_stride, n.T - i0, n.D);
    rows.write(dy_tile);
    step moving;
    moving.read(k, at.kv_stride, keys, n.D);
    moving.write(k_tile);
    float log_sum[2], row_delta[2];
    for (int side = 0; side < 2; side++) {
        int i = i0 + warp * 16 + lane / 4 + 8 * side;
        log_sum[side] = i < n.T ? lse[at.row + i] * GAI_LOG2E : INFINITY; /* P = 0 */
        row_delta[side] = i < n.T ? delta[at.row + i] : 0;
    }
    __syncthreads();

    float sum_dq[D / 8][4] = {};
    for (int j0 = 0; j0 < keys; j0 += KEYS) {
        bool more = j0 + KEYS < keys;
        moving.read(v + j0 * at.kv_stride, at.kv_stride, keys - j0, n.D);
        float s[KEYS / 8][4], ds[KEYS / 8][4];
        gai_flash_scores<D>(s, q_tile + warp * 16 * STRIDE, k_tile);
        gai_flash_mask(s, j0 - (offset + i0 + warp * 16));
        moving.write(v_tile);
        __syncthreads();
        if (more) moving.read(k + (j0 + KEYS) * at.kv_stride, at.kv_stride, keys - j0 - KEYS, n.D);
        gai_flash_scores<D>(ds, dy_tile + warp * 16 * STRIDE, v_tile);
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                ds[j][i] = gai_exp2(s[j][i] * (n.scale * GAI_LOG2E) - log_sum[i >> 1]) * (ds[j][i] - row_delta[i >> 1]);
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            uint32_t part[4];
            gai_flash_operand(part, ds[2 * j], ds[2 * j + 1]);
            gai_flash_columns<STRIDE>(sum_dq, part, k_tile + j * 16 * STRIDE);
        }
        __syncthreads();
        if (more) moving.write(k_tile);
        __syncthreads();
    }
    gai_flash_write(dq + at.q + i0 * at.q_stride, at.q_stride, n.T - i0, n.D, sum_dq, n.scale, n.scale);
}

/* dk and dv of ga_sdpa_backward, (B, T, HQ / group, D): sums over `group` query heads. One block for 64 keys. */
template <int D>
static __global__ void __launch_bounds__(GAI_FLASH_THREADS, 2)
    gai_k_flash_backward_kv(float *dk, float *dv, const float *dy, const float *lse, const float *delta, const float *q,
                            const float *k, const float *v, int heads, int group, gai_attention n) {
    constexpr int QUERIES = gai_flash_step<D>, STRIDE = D + 8;
    typedef gai_flash_tile<GAI_FLASH_ROWS, D> tile;
    typedef gai_flash_tile<QUERIES, D> step;
    GAI_DYNAMIC_SHARED(__nv_bfloat16, k_tile);
    GAI_SHARED(float, of_rows, [2 * QUERIES]); /* lse, delta */
    __nv_bfloat16 *v_tile = k_tile + tile::VALUES, *q_tile = v_tile + tile::VALUES, *dy_tile = q_tile + step::VALUES;
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, owners = n.HQ / group;
    int b = blockIdx.x % heads / owners, owner = blockIdx.x % heads % owners;
    int j0 = (int)(blockIdx.x / heads) * GAI_FLASH_ROWS, first = j0 / QUERIES * QUERIES;
    int steps = (n.T - first + QUERIES - 1) / QUERIES;
    gai_head at = gai_head_at(b, owner * group, n);

    tile rows;
    rows.read(k + at.kv + j0 * at.kv_stride, at.kv_stride, n.T - j0, n.D);
    rows.write(k_tile);
    rows.read(v + at.kv + j0 * at.kv_stride, at.kv_stride, n.T - j0, n.D);
    rows.write(v_tile);

    /* A turn is 32 or 64 queries of one head; all turns of a head, then those of the next. */
    auto of_turn = [&](int turn, size_t row, size_t head) {
        return turn / steps * head + (first + turn % steps * QUERIES) * row;
    };
    auto rows_of_turn = [&](int turn) { /* of the queries that do not exist P is 0 */
                                        int i = threadIdx.x % QUERIES;
                                        bool exists = first + turn % steps * QUERIES + i < n.T;
                                        const float *from =
                                            (threadIdx.x < QUERIES ? lse : delta) + at.row + of_turn(turn, 1, n.T) + i;
                                        if (threadIdx.x < QUERIES) return exists ? *from * GAI_LOG2E : INFINITY;
                                        return exists ? *from : 0;
    };
    step moving;
    moving.read(q + at.q + of_turn(0, at.q_stride, n.D), at.q_stride, n.T - first, n.D);
    moving.write(q_tile);
    if (threadIdx.x < 2 * QUERIES) of_rows[threadIdx.x] = rows_of_turn(0);
    __syncthreads();

    float sum_dk[D / 8][4] = {}, sum_dv[D / 8][4] = {};
    for (int turn = 0; turn < group * steps; turn++) {
        bool more = turn + 1 < group * steps;
        int i0 = first + turn % steps * QUERIES, next = first + (turn + 1) % steps * QUERIES;
        moving.read(dy + at.q + of_turn(turn, at.q_stride, n.D), at.q_stride, n.T - i0, n.D);
        float p[QUERIES / 8][4], ds[QUERIES / 8][4], next_rows = 0;
        gai_flash_scores<D>(p, k_tile + warp * 16 * STRIDE, q_tile);
        moving.write(dy_tile);
        __syncthreads();
        if (more) moving.read(q + at.q + of_turn(turn + 1, at.q_stride, n.D), at.q_stride, n.T - next, n.D);
        if (more && threadIdx.x < 2 * QUERIES) next_rows = rows_of_turn(turn + 1);
        gai_flash_scores<D>(ds, v_tile + warp * 16 * STRIDE, dy_tile);
#pragma unroll
        for (int i = 0; i < QUERIES / 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int query = 8 * i + lane % 4 * 2 + (e & 1), key = warp * 16 + lane / 4 + 8 * (e >> 1);
                bool visible = j0 + key <= i0 + query;
                p[i][e] = visible ? gai_exp2(p[i][e] * (n.scale * GAI_LOG2E) - of_rows[query]) : 0;
                ds[i][e] = p[i][e] * (ds[i][e] - of_rows[QUERIES + query]);
            }
#pragma unroll
        for (int i = 0; i < QUERIES / 16; i++) {
            uint32_t part[4];
            gai_flash_operand(part, p[2 * i], p[2 * i + 1]);
            gai_flash_columns<STRIDE>(sum_dv, part, dy_tile + i * 16 * STRIDE);
            gai_flash_operand(part, ds[2 * i], ds[2 * i + 1]);
            gai_flash_columns<STRIDE>(sum_dk, part, q_tile + i * 16 * STRIDE);
        }
        __syncthreads();
        if (more) moving.write(q_tile);
        if (more && threadIdx.x < 2 * QUERIES) of_rows[threadIdx.x] = next_rows;
        __syncthreads();
    }
    size_t stride = (size_t)owners * n.D, to = ((size_t)b * n.T + j0) * stride + owner * n.D;
    gai_flash_write(dk + to, stride, n.T - j0, n.D, sum_dk, n.scale, n.scale);
    gai_flash_write(dv + to, stride, n.T - j0, n.D, sum_dv, 1, 1);
}

/* ---- in float32 ----------------------------------------------------------------------------------------------------- */

enum { GAI_PLAIN_THREADS = 256, GAI_PLAIN_PITCH = 68 }; /* 16 x 16 threads, each with 4 x 4 values of a 64 x 64 tile */

typedef float gai_plain_tile[64][GAI_PLAIN_PITCH]; /* rows are aligned to 16 bytes */

/* c (64, 64) += a^T b with a, b (depth, 64) in shared memory. */
static __device__ __forceinline__ void gai_plain_multiply(float (&c)[4][4], const float (*a)[GAI_PLAIN_PITCH],
                                                          const float (*b)[GAI_PLAIN_PITCH], int depth) {
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll 8
    for (int k = 0; k < depth; k++) {
        float4 x = *(const float4 *)&a[k][row], z = *(const float4 *)&b[k][column];
        const float left[4] = {x.x, x.y, x.z, x.w}, right[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) c[i][j] += left[i] * right[j];
    }
}

/* Columns [d, d + 32) of 64 rows, transposed; what does not exist is zero. */
static __device__ void gai_plain_read_transposed(float (*to)[GAI_PLAIN_PITCH], const float *from, size_t stride,
                                                 int rows, int d, int D) {
    for (int at = threadIdx.x; at < 64 * 32; at += GAI_PLAIN_THREADS) {
        int row = at / 32, column = at % 32;
        to[column][row] = row < rows && d + column < D ? from[row * stride + d + column] : 0;
    }
}

/* c (64, 64) = a b^T over D columns; a, b (64, D) in global memory. */
static __device__ void gai_plain_scores(float (&c)[4][4], gai_plain_tile &buffer, const float *a, size_t a_stride,
                                        int a_rows, const float *b, size_t b_stride, int b_rows, int D) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) c[i][j] = 0;
    for (int d = 0; d < D; d += 32) {
        __syncthreads();
        gai_plain_read_transposed(buffer, a, a_stride, a_rows, d, D);
        gai_plain_read_transposed(buffer + 32, b, b_stride, b_rows, d, D);
        __syncthreads();
        gai_plain_multiply(c, buffer, buffer + 32, 32);
    }
}

/* c (64, D) += p^T b; p (64, 64) in shared memory, b (64, D) in global memory. */
template <int CHUNKS>
static __device__ __forceinline__ void gai_plain_accumulate(float (&c)[CHUNKS][4][4], const gai_plain_tile &p,
                                                            gai_plain_tile &buffer, const float *b, size_t stride,
                                                            int rows, int D) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        __syncthreads();
        for (int at = threadIdx.x; at < 64 * 64; at += GAI_PLAIN_THREADS) {
            int row = at / 64, column = at % 64, d = chunk * 64 + column;
            buffer[row][column] = row < rows && d < D ? b[row * stride + d] : 0;
        }
        __syncthreads();
        gai_plain_multiply(c[chunk], p, buffer, 64);
    }
}

/* to = c^T */
static __device__ __forceinline__ void gai_plain_keep(gai_plain_tile &to, const float (&c)[4][4]) {
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
    for (int j = 0; j < 4; j++) *(float4 *)&to[column + j][row] = make_float4(c[0][j], c[1][j], c[2][j], c[3][j]);
}

/* Writes factor[row] * c to the rows and columns that exist. */
template <int CHUNKS>
static __device__ __forceinline__ void gai_plain_write(float *to, size_t stride, int rows, int D,
                                                       const float (&c)[CHUNKS][4][4], const float (&factor)[4]) {
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int d = chunk * 64 + column + j;
                if (row + i < rows && d < D) to[(row + i) * stride + d] = c[chunk][i][j] * factor[i];
            }
}

/* Over the 16 threads that share four rows of a tile. */
static __device__ __forceinline__ float gai_plain_max(float x) {
    for (int lanes = 8; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(GAI_WARP, x, lanes));
    return x;
}
static __device__ __forceinline__ float gai_plain_sum(float x) {
    for (int lanes = 8; lanes > 0; lanes /= 2) x += __shfl_xor_sync(GAI_WARP, x, lanes);
    return x;
}

/* See gai_k_flash_forward. */
template <int CHUNKS>
static __global__ void __launch_bounds__(GAI_PLAIN_THREADS)
    gai_k_plain_forward(float *y, float *lse, const float *q, const float *k, const float *v, const float *sink,
                        int heads, gai_attention n) {
    GAI_SHARED(float4, p_space, [64 * GAI_PLAIN_PITCH / 4]);
    GAI_SHARED(float4, buffer_space, [64 * GAI_PLAIN_PITCH / 4]);
    gai_plain_tile &p = *(gai_plain_tile *)p_space, &buffer = *(gai_plain_tile *)buffer_space;
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4, h = blockIdx.x % heads % n.HQ;
    int i0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * 64, offset = n.S - n.T;
    int keys = gai_keys_seen(i0, n);
    gai_head at = gai_head_at(blockIdx.x % heads / n.HQ, h, n);
    q += at.q + i0 * at.q_stride, y += at.q + i0 * at.q_stride;

    float sum_y[CHUNKS][4][4] = {}, top[4], sum[4], s[4][4];
    for (int i = 0; i < 4; i++) {
        top[i] = sink ? sink[h] : -INFINITY;
        sum[i] = sink && column == 0;
    }
    for (int j0 = 0; j0 < keys; j0 += 64) {
        gai_plain_scores(s, buffer, q, at.q_stride, n.T - i0, k + at.kv + j0 * at.kv_stride, at.kv_stride, keys - j0,
                         n.D);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float next = -INFINITY;
            for (int j = 0; j < 4; j++) {
                s[i][j] = j0 + column + j <= offset + i0 + row + i ? s[i][j] * n.scale : -INFINITY;
                next = fmaxf(next, s[i][j]);
            }
            next = fmaxf(top[i], gai_plain_max(next));
            float keep = expf(top[i] - next);
            top[i] = next, sum[i] *= keep;
            for (int j = 0; j < 4; j++) sum[i] += s[i][j] = expf(s[i][j] - next);
            for (int chunk = 0; chunk < CHUNKS; chunk++)
                for (int j = 0; j < 4; j++) sum_y[chunk][i][j] *= keep;
        }
        gai_plain_keep(p, s);
        gai_plain_accumulate(sum_y, p, buffer, v + at.kv + j0 * at.kv_stride, at.kv_stride, keys - j0, n.D);
    }
    for (int i = 0; i < 4; i++) {
        sum[i] = gai_plain_sum(sum[i]);
        if (column == 0 && i0 + row + i < n.T) lse[at.row + i0 + row + i] = top[i] + logf(sum[i]);
        sum[i] = 1 / sum[i];
    }
    gai_plain_write(y, at.q_stride, n.T - i0, n.D, sum_y, sum);
}

/* See gai_k_flash_backward_q. */
template <int CHUNKS>
static __global__ void __launch_bounds__(GAI_PLAIN_THREADS)
    gai_k_plain_backward_q(float *dq, const float *dy, const float *lse, const float *delta, const float *q,
                           const float *k, const float *v, int heads, gai_attention n) {
    GAI_SHARED(float4, ds_space, [64 * GAI_PLAIN_PITCH / 4]);
    GAI_SHARED(float4, buffer_space, [64 * GAI_PLAIN_PITCH / 4]);
    gai_plain_tile &ds_tile = *(gai_plain_tile *)ds_space, &buffer = *(gai_plain_tile *)buffer_space;
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
    int i0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * 64, offset = n.S - n.T;
    int keys = gai_keys_seen(i0, n);
    gai_head at = gai_head_at(blockIdx.x % heads / n.HQ, blockIdx.x % heads % n.HQ, n);
    q += at.q + i0 * at.q_stride, dy += at.q + i0 * at.q_stride, dq += at.q + i0 * at.q_stride;

    float sum_dq[CHUNKS][4][4] = {}, s[4][4], ds[4][4];
    for (int j0 = 0; j0 < keys; j0 += 64) {
        const float *k0 = k + at.kv + j0 * at.kv_stride, *v0 = v + at.kv + j0 * at.kv_stride;
        gai_plain_scores(s, buffer, q, at.q_stride, n.T - i0, k0, at.kv_stride, keys - j0, n.D);
        gai_plain_scores(ds, buffer, dy, at.q_stride, n.T - i0, v0, at.kv_stride, keys - j0, n.D);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int query = i0 + row + i;
            float log_sum = query < n.T ? lse[at.row + query] : INFINITY,
                  row_delta = query < n.T ? delta[at.row + query] : 0;
            for (int j = 0; j < 4; j++) {
                bool visible = j0 + column + j <= offset + query;
                ds[i][j] = visible ? expf(s[i][j] * n.scale - log_sum) * (ds[i][j] - row_delta) : 0;
            }
        }
        gai_plain_keep(ds_tile, ds);
        gai_plain_accumulate(sum_dq, ds_tile, buffer, k0, at.kv_stride, keys - j0, n.D);
    }
    const float scale[4] = {n.scale, n.scale, n.scale, n.scale};
    gai_plain_write(dq, at.q_stride, n.T - i0, n.D, sum_dq, scale);
}

/* See gai_k_flash_backward_kv. */
template <int CHUNKS>
static __global__ void __launch_bounds__(GAI_PLAIN_THREADS)
    gai_k_plain_backward_kv(float *dk, float *dv, const float *dy, const float *lse, const float *delta, const float *q,
                            const float *k, const float *v, int heads, int group, gai_attention n) {
    GAI_SHARED(float4, p_space, [64 * GAI_PLAIN_PITCH / 4]);
    GAI_SHARED(float4, buffer_space, [64 * GAI_PLAIN_PITCH / 4]);
    gai_plain_tile &p_tile = *(gai_plain_tile *)p_space, &buffer = *(gai_plain_tile *)buffer_space;
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4, owners = n.HQ / group;
    int b = blockIdx.x % heads / owners, owner = blockIdx.x % heads % owners, j0 = (int)(blockIdx.x / heads) * 64;
    gai_head at = gai_head_at(b, owner * group, n);
    k += at.kv + j0 * at.kv_stride, v += at.kv + j0 * at.kv_stride;

    float sum_dk[CHUNKS][4][4] = {}, sum_dv[CHUNKS][4][4] = {}, p[4][4], ds[4][4];
    for (int head = 0; head < group; head++)
        for (int i0 = j0; i0 < n.T; i0 += 64) {
            const float *q0 = q + at.q + head * n.D + i0 * at.q_stride,
                        *dy0 = dy + at.q + head * n.D + i0 * at.q_stride;
            gai_plain_scores(p, buffer, k, at.kv_stride, n.T - j0, q0, at.q_stride, n.T - i0, n.D);
            gai_plain_scores(ds, buffer, v, at.kv_stride, n.T - j0, dy0, at.q_stride, n.T - i0, n.D);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int query = i0 + column + j;
                size_t of_row = at.row + (size_t)head * n.T + query;
                float log_sum = query < n.T ? lse[of_row] : INFINITY, row_delta = query < n.T ? delta[of_row] : 0;
                for (int i = 0; i < 4; i++) {
                    p[i][j] = j0 + row + i <= query ? expf(p[i][j] * n.scale - log_sum) : 0;
                    ds[i][j] = p[i][j] * (ds[i][j] - row_delta);
                }
            }
            gai_plain_keep(p_tile, p);
            gai_plain_accumulate(sum_dv, p_tile, buffer, dy0, at.q_stride, n.T - i0, n.D);
            __syncthreads();
            gai_plain_keep(p_tile, ds);
            gai_plain_accumulate(sum_dk, p_tile, buffer, q0, at.q_stride, n.T - i0, n.D);
        }
    size_t stride = (size_t)owners * n.D, to = ((size_t)b * n.T + j0) * stride + owner * n.D;
    const float scale[4] = {n.scale, n.scale, n.scale, n.scale}, one[4] = {1, 1, 1, 1};
    gai_plain_write(dk + to, stride, n.T - j0, n.D, sum_dk, scale);
    gai_plain_write(dv + to, stride, n.T - j0, n.D, sum_dv, one);
}

/* ---- for both versions ---------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float gai_round_to(float x, bool bf16) {
    return bf16 ? __bfloat162float(__float2bfloat16_rn(x)) : x;
}

/* delta_i = dy_i . y_i, (B, HQ, T), with dy as the products read it. One warp for a row (b, i, h); `rows` of them. */
static __global__ void __launch_bounds__(128)
    gai_k_attention_delta(float *delta, const float *dy, const float *y, size_t rows, bool bf16, gai_attention n) {
    size_t row = blockIdx.x * (size_t)4 + threadIdx.x / 32, bi = row / n.HQ;
    float sum = 0;
    for (int d = threadIdx.x % 32; row < rows && d < n.D; d += 32)
        sum += gai_round_to(dy[row * n.D + d], bf16) * y[row * n.D + d];
    sum = gai_warp_sum(sum);
    if (row < rows && threadIdx.x % 32 == 0) delta[(bi / n.T * n.HQ + row % n.HQ) * n.T + bi % n.T] = sum;
}

/* dsink_h += sum_i exp(s_h - lse_i) (0 - delta_i). One block for a head; the order of the sum is fixed. */
static __global__ void __launch_bounds__(256) gai_k_attention_sink(float *dsink, const float *delta, const float *lse,
                                                                   const float *sink, int B, gai_attention n) {
    int h = blockIdx.x;
    float sum = 0;
    for (int b = 0; b < B; b++)
        for (int i = threadIdx.x; i < n.T; i += 256) {
            size_t at = ((size_t)b * n.HQ + h) * n.T + i;
            sum -= expf(sink[h] - lse[at]) * delta[at];
        }
    sum = gai_block_sum(sum);
    if (threadIdx.x == 0) dsink[h] += sum;
}

/* dk, dv (B, T, HK, D): sums over each group's query heads of dk_heads, dv_heads (B, T, HQ, D). */
static __global__ void __launch_bounds__(256)
    gai_k_attention_sum_heads(float *dk, float *dv, const float *dk_heads, const float *dv_heads, size_t values,
                              int group, int D) {
    size_t at = blockIdx.x * (size_t)256 + threadIdx.x;
    if (at >= values) return;
    size_t from = at / D * group * D + at % D;
    float sum_k = 0, sum_v = 0;
    for (int g = 0; g < group; g++) sum_k += dk_heads[from + (size_t)g * D], sum_v += dv_heads[from + (size_t)g * D];
    dk[at] = sum_k, dv[at] = sum_v;
}

/* See ga_sdpa_column. One warp for a row (b, h, i); q and k as the forward pass read them, so that P is that of its lse. */
static __global__ void __launch_bounds__(128)
    gai_k_attention_column(float *p, const float *q, const float *k, const float *lse, int j, size_t rows, bool bf16,
                           gai_attention n) {
    size_t row = blockIdx.x * (size_t)4 + threadIdx.x / 32, bh = row / n.T;
    int i = (int)(row % n.T);
    float sum = 0;
    if (row < rows) {
        gai_head at = gai_head_at((int)(bh / n.HQ), (int)(bh % n.HQ), n);
        q += at.q + i * at.q_stride, k += at.kv + j * at.kv_stride;
        for (int d = threadIdx.x % 32; d < n.D; d += 32) sum += gai_round_to(q[d], bf16) * gai_round_to(k[d], bf16);
    }
    sum = gai_warp_sum(sum);
    if (row < rows && threadIdx.x % 32 == 0) p[row] = j <= n.S - n.T + i ? expf(sum * n.scale - lse[row]) : 0;
}

/* ---- the operators -------------------------------------------------------------------------------------------------- */

static gai_attention gai_attention_of(ga_shape n) {
    return {(int)n.T, (int)n.S, (int)n.HQ, (int)n.HK, (int)n.D, 1 / sqrtf((float)n.D)};
}

/* Blocks for tiles of 64 rows of `heads` heads of T rows. */
static unsigned gai_attention_blocks(size_t heads, size_t rows) {
    return (unsigned)(heads * gai_cuda_ceil(rows, 64));
}

/* Whether attention of this shape runs on tensor cores; `addresses` as in gai_vectors. */
static bool gai_takes_flash(const gai_cuda *d, ga_shape n, uintptr_t addresses) {
    return d->bf16 && n.D <= 128 && gai_vectors(addresses | n.D * sizeof(float));
}

/* The version of a kernel for heads of n.D values: flash, filled up with zeros to WIDTH, or plain. */
#define GAI_FLASH_KERNEL(name, D) ((D) <= 32 ? name<32> : (D) <= 64 ? name<64> : (D) <= 96 ? name<96> : name<128>)
#define GAI_PLAIN_KERNEL(name, D) ((D) <= 64 ? name<1> : (D) <= 128 ? name<2> : name<4>)

/* Bytes of shared memory for two tiles that are walked over, and two of `stay` rows. */
static size_t gai_flash_shared(size_t D, size_t stay) {
    size_t step = D <= 64 ? gai_flash_step<64> : gai_flash_step<128>;
    return 2 * (stay + step) * (gai_cuda_ceil(D, 32) * 32 + 8) * sizeof(__nv_bfloat16);
}

/* More than 48 KB of shared memory has to be asked for. */
static bool gai_allow_shared(gai_cuda *d, const void *kernel, size_t bytes) {
    return bytes <= (48 << 10) ||
           GAI_CUDA(d, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

static void gai_cuda_sdpa_forward(void *state, float *y, float *lse, const float *q, const float *k, const float *v,
                                  const float *sink, ga_shape n) {
    gai_cuda *d = (gai_cuda *)state;
    gai_attention a = gai_attention_of(n);
    int heads = (int)(n.B * n.HQ);
    unsigned blocks = gai_attention_blocks(heads, n.T);
    if (gai_takes_flash(d, n, gai_at(y) | gai_at(q) | gai_at(k) | gai_at(v))) {
        auto flash = GAI_FLASH_KERNEL(gai_k_flash_forward, n.D);
        GAI_LAUNCH(d, flash, blocks, GAI_FLASH_THREADS, gai_flash_shared(n.D, 0), y, lse, q, k, v, sink, heads, a);
    } else {
        auto plain = GAI_PLAIN_KERNEL(gai_k_plain_forward, n.D);
        GAI_LAUNCH(d, plain, blocks, GAI_PLAIN_THREADS, 0, y, lse, q, k, v, sink, heads, a);
    }
}

/* dk and dv are summed over a group of query heads by one block where that leaves work for all multiprocessors, else by
 * one block for each query head, and then over the group from scratch. */
static void gai_cuda_sdpa_backward(void *state, float *dq, float *dk, float *dv, float *dsink, float *scratch,
                                   const float *dy, const float *y, const float *lse, const float *q, const float *k,
                                   const float *v, const float *sink, ga_shape n) {
    gai_cuda *d = (gai_cuda *)state;
    gai_attention a = gai_attention_of(n);
    size_t rows = n.B * n.T * n.HQ, kv_values = n.B * n.T * n.HK * n.D;
    float *dk_heads = scratch, *dv_heads = dk_heads + rows * n.D, *delta = dv_heads + rows * n.D;
    bool is_flash = gai_takes_flash(
        d, n, gai_at(dq) | gai_at(dk) | gai_at(dv) | gai_at(scratch) | gai_at(dy) | gai_at(q) | gai_at(k) | gai_at(v));
    int group = (int)(n.HQ / n.HK), heads = (int)(n.B * n.HQ), owners = (int)(n.B * n.HK);
    bool by_head = group > 1 && gai_attention_blocks(owners, n.T) < 2 * (unsigned)d->properties.multiProcessorCount;
    if (by_head) group = 1, owners = heads;
    float *dk_to = by_head ? dk_heads : dk, *dv_to = by_head ? dv_heads : dv;
    unsigned q_blocks = gai_attention_blocks(heads, n.T), kv_blocks = gai_attention_blocks(owners, n.T);

    GAI_LAUNCH(d, gai_k_attention_delta, (unsigned)gai_cuda_ceil(rows, 4), 128, 0, delta, dy, y, rows, is_flash, a);
    if (sink && dsink) GAI_LAUNCH(d, gai_k_attention_sink, a.HQ, 256, 0, dsink, delta, lse, sink, (int)n.B, a);
    if (is_flash) {
        auto flash_q = GAI_FLASH_KERNEL(gai_k_flash_backward_q, n.D);
        auto flash_kv = GAI_FLASH_KERNEL(gai_k_flash_backward_kv, n.D);
        size_t bytes = gai_flash_shared(n.D, GAI_FLASH_ROWS);
        if (!gai_allow_shared(d, (const void *)flash_q, bytes) || !gai_allow_shared(d, (const void *)flash_kv, bytes))
            return;
        GAI_LAUNCH(d, flash_q, q_blocks, GAI_FLASH_THREADS, bytes, dq, dy, lse, delta, q, k, v, heads, a);
        GAI_LAUNCH(d, flash_kv, kv_blocks, GAI_FLASH_THREADS, bytes, dk_to, dv_to, dy, lse, delta, q, k, v, owners,
                   group, a);
    } else {
        auto plain_q = GAI_PLAIN_KERNEL(gai_k_plain_backward_q, n.D);
        auto plain_kv = GAI_PLAIN_KERNEL(gai_k_plain_backward_kv, n.D);
        GAI_LAUNCH(d, plain_q, q_blocks, GAI_PLAIN_THREADS, 0, dq, dy, lse, delta, q, k, v, heads, a);
        GAI_LAUNCH(d, plain_kv, kv_blocks, GAI_PLAIN_THREADS, 0, dk_to, dv_to, dy, lse, delta, q, k, v, owners, group,
                   a);
    }
    if (by_head)
        GAI_LAUNCH(d, gai_k_attention_sum_heads, (unsigned)gai_cuda_ceil(kv_values, 256), 256, 0, dk, dv, dk_heads,
                   dv_heads, kv_values, (int)(n.HQ / n.HK), a.D);
}

static void gai_cuda_sdpa_column(void *state, float *p, const float *q, const float *k, const float *lse, size_t j,
                                 ga_shape n) {
    gai_cuda *d = (gai_cuda *)state;
    size_t rows = n.B * n.HQ * n.T;
    GAI_LAUNCH(d, gai_k_attention_column, (unsigned)gai_cuda_ceil(rows, 4), 128, 0, p, q, k, lse, (int)j, rows,
               gai_takes_flash(d, n, gai_at(q) | gai_at(k)), gai_attention_of(n));
}

/* ==== end of attention ============================================================================================= */

/* ---- device ------------------------------------------------------------------------------------------------------- */

static ga_result gai_cuda_open(gai_cuda *d, ga_cuda_settings settings) {
    int count = 0;
    if (!GAI_CUDA(d, cudaGetDeviceCount(&count))) return d->error.result;
    if (settings.index < 0 || settings.index >= count) {
        char word[64];
        snprintf(word, sizeof word, "there are %d", count);
        gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, "no such GPU", word);
        return d->error.result;
    }
    if (!GAI_CUDA(d, cudaSetDevice(settings.index)) ||
        !GAI_CUDA(d, cudaGetDeviceProperties(&d->properties, settings.index)))
        return d->error.result;
    if (d->properties.major * 10 + d->properties.minor < 75) {
        gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, d->properties.name, "compute capability below 7.5");
        return d->error.result;
    }
    d->bf16 = settings.bf16 && d->properties.major >= 8, d->tf32 = settings.tf32 && d->properties.major >= 8;
    snprintf(d->name, sizeof d->name, "cuda, %s, %s products", d->properties.name,
             d->bf16   ? "bfloat16"
             : d->tf32 ? "TF32"
                       : "float32");
    if (GAI_CUDA(d, cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking)) &&
        GAI_CUDA(d, cublasCreate(&d->blas)) && GAI_CUDA(d, cublasSetStream(d->blas, d->stream)) &&
        GAI_CUDA(d, cudaMalloc(&d->workspace, GAI_CUDA_WORKSPACE)) &&
        GAI_CUDA(d, cublasSetWorkspace(d->blas, d->workspace, GAI_CUDA_WORKSPACE)))
        (void)GAI_CUDA(d, cublasSetMathMode(d->blas, d->tf32 ? CUBLAS_TF32_TENSOR_OP_MATH : CUBLAS_DEFAULT_MATH));
    return d->error.result;
}

static void gai_cuda_close(gai_cuda *d) {
    if (d->blas) (void)cublasDestroy(d->blas);
    (void)cudaFree(d->workspace);
    (void)cudaFree(d->scratch);
    if (d->stream) (void)cudaStreamDestroy(d->stream);
    free(d);
}

ga_result ga_device_cuda(ga_device *device, ga_cuda_settings settings, ga_error *e) {
    memset(device, 0, sizeof *device);
    gai_cuda *d = (gai_cuda *)calloc(1, sizeof *d);
    if (!d) {
        ga_error none = {GA_ERR_MEMORY, "no memory for the device"};
        if (e) *e = none;
        return GA_ERR_MEMORY;
    }
    ga_result result = gai_cuda_open(d, settings);
    if (result != GA_OK) {
        if (e) *e = d->error;
        gai_cuda_close(d);
        return result;
    }
    device->name = d->name, device->state = d;
    device->allocate = gai_cuda_allocate, device->release = gai_cuda_release;
    device->copy_in = gai_cuda_copy_in, device->copy_out = gai_cuda_copy_out, device->zero = gai_cuda_zero;
    device->status = gai_cuda_status;
    device->rmsnorm_forward = gai_cuda_rmsnorm_forward;
    device->sdpa_forward = gai_cuda_sdpa_forward, device->sdpa_backward = gai_cuda_sdpa_backward;
    device->sdpa_column = gai_cuda_sdpa_column;
    return GA_OK;
}

void ga_device_cuda_destroy(ga_device *device) {
    if (device->state) gai_cuda_close((gai_cuda *)device->state);
    memset(device, 0, sizeof *device);
}

bool ga_device_cuda_bf16(const ga_device *device) {
    return ((const gai_cuda *)device->state)->bf16;
}

#endif /* GATED_ATTENTION_CUDA_IMPLEMENTATION */
