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
/* Between these two marks: sdpa_forward, sdpa_backward and sdpa_column, as gai_cuda_sdpa_... with the parameters of
 * GA_OPERATORS after `void *state`. */

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
