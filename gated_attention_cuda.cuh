/* gated_attention_cuda.cuh - the operators of gated_attention.h on NVIDIA GPUs, compute capability 7.5 and above.
 *
 * An optional companion. Its declarations are plain C:
 *
 *     #include "gated_attention.h"
 *     #include "gated_attention_cuda.cuh"
 *
 *     ga_cuda_settings settings = {.bf16 = true};   // the first GPU, bfloat16 products
 *     ga_device device;
 *     if (ga_device_cuda(&device, settings, &e) != GA_OK) ...
 *     ga_model *m = ga_create(&c, &device, GA_TRAINING, &e);
 *     ...
 *     ga_destroy(m);
 *     ga_device_cuda_destroy(&device);
 *
 * The implementation is a unit of its own, compiled by nvcc and linked with cuBLASLt:
 *
 *     nvcc -x cu -O3 -DGATED_ATTENTION_CUDA_IMPLEMENTATION -c gated_attention_cuda.cuh -o cuda.o
 *
 * With -DGA_NCCL (it needs nccl.h) several GPUs train one model, a process for each; libnccl.so.2 is loaded when
 * ga_ranks_cuda asks for it.
 * With GA_CUDNN as well, and cuDNN and its header-only frontend (cudnn_frontend.h), attention is cuDNN's where it can
 * be.
 *
 * Numbers: all tensors are float32. Products read float32, or float32 rounded to TF32, or operands rounded to bfloat16
 * (weights from a packed copy that is renewed when they change), and add in float32; all else is float32, with sums
 * over a whole tensor in double. The same bits in every run on one device: no floating-point atomics.
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
    int index;  /* of the GPU, as CUDA counts them */
    bool bf16;  /* bfloat16 products and attention where the GPU has them (compute capability 8.0) */
    bool tf32;  /* float32 products by TF32 */
    bool plain; /* every kernel launched by itself: no CUDA graphs of passes that repeat */
} ga_cuda_settings;

/* GA_ERR_DEVICE when there is no such GPU, or it is too old. */
ga_result ga_device_cuda(ga_device *device, ga_cuda_settings settings, ga_error *e);
/* After the models that use it. */
void ga_device_cuda_destroy(ga_device *device);
/* Whether its products read bfloat16. */
bool ga_device_cuda_bf16(const ga_device *device);
/* Why passes that repeat could not be recorded, and are launched kernel by kernel; NULL: nothing has been in the
 * way. */
const char *ga_device_cuda_unrecorded(const ga_device *device);

/* How the processes of one run find each other: the companion has no transport of its own. */
typedef struct {
    void *state;
    /* Rank 0's n bytes to all ranks, however long it takes rank 0 to come there; false: it will not, and why. */
    bool (*share)(void *state, void *bytes, size_t n, ga_error *e);
    /* False: a rank has ended, and which. A thread beside asks now and then; NULL: nobody knows. */
    bool (*all_alive)(void *state, ga_error *e);
} ga_cuda_rendezvous;

typedef struct {
    size_t rank, count;
    bool bf16;      /* gradients travel in bfloat16: half the bytes, but those of others are rounded to 8 bits */
    double timeout; /* seconds in an exchange without an answer of the other ranks that end the run */
    ga_cuda_rendezvous rendezvous;
} ga_cuda_ranks_settings;

/* The ranks' exchanges over NCCL, on a stream of their own beside the device's; before models are made. A rank that has
 * died, or does not answer in an exchange, is a failure of the table and of the device on all ranks. Only `broadcast`
 * has no limit: it waits by `share`, while rank 0 works alone.
 * GA_ERR_DEVICE when NCCL is not there, or the ranks do not come together. */
ga_result ga_ranks_cuda(ga_ranks *ranks, ga_device *device, const ga_cuda_ranks_settings *settings, ga_error *e);
/* After the models, before ga_device_cuda_destroy. failed: this rank gives up, and does not wait for the others. */
void ga_ranks_cuda_destroy(ga_ranks *ranks, bool failed);

#ifdef __cplusplus
}
#endif
#endif /* GATED_ATTENTION_CUDA_CUH */

/* ==== implementation ============================================================================================== */

#if defined(GATED_ATTENTION_CUDA_IMPLEMENTATION) && !defined(GATED_ATTENTION_CUDA_IMPLEMENTED)
#define GATED_ATTENTION_CUDA_IMPLEMENTED

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cublasLt.h>
#ifdef GA_NCCL
#include <dlfcn.h>
#include <nccl.h>
#include <pthread.h>
#include <time.h>
#endif
#ifdef GA_CUDNN
#include <memory>
#include <unordered_map>
#include <vector>
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>
#endif

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
#define GAI_NCCL_LIBRARY "libnccl.so.2"
enum {
    GAI_CUDA_WORKSPACE = 32 << 20, /* bytes of cuBLAS's own memory */
    GAI_RANKS_HALVES = 16 << 20    /* gradients that travel in bfloat16 at one time */
};

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

/* ---- state, errors, memory --------------------------------------------------------------------------------------- */

enum {
    GAI_CUDA_DRIVER = 64 << 20, /* bytes of the device's memory that are left to the driver */
    GAI_CUDA_BLOCKS = 16,       /* of weights with a packed copy */
    GAI_CUDA_PLANS = 128,       /* shapes of products whose algorithm is kept */
    GAI_CUDA_SHARED = 47 << 10, /* bytes of shared memory that a launch gets without asking: 48 KiB, less what functions
                                   declare beside them */
    GAI_CUDA_SLOTS = 16,        /* of pinned memory, for copies on their way */
    GAI_CUDA_SLOT = 512 << 10,  /* bytes of each */
    GAI_CUDA_PASSES = 4,        /* that are known by heart at a time */
    GAI_CUDA_KEY = 64           /* bytes of a pass's key, at most */
};

/* A block of weights and its copy in bfloat16. */
typedef struct {
    const float *weights;
    size_t n;
    __nv_bfloat16 *packed;
} gai_cuda_packed;

/* What the choice of an algorithm depends on, in columns as cuBLAS sees matrices. Alignments are those of addresses. */
typedef struct {
    cudaDataType type; /* of A and B */
    cublasOperation_t a_form, b_form;
    uint32_t a_align, b_align, c_align;
    size_t m, n, k, lda, ldb, ldc;
} gai_cuda_shape;

typedef struct {
    gai_cuda_shape shape;
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
} gai_cuda_plan;

/* Values that the latest kernel has also left at the start of scratch, rounded for the product that reads them next. */
typedef struct {
    const float *values; /* NULL: something has run since */
    size_t n;
} gai_cuda_rounded;

/* A pass that has run, and from its second time on its graph. */
typedef struct {
    char key[GAI_CUDA_KEY];
    size_t bytes; /* of the key; 0: this place is free */
    cudaGraphExec_t graph;
    uint64_t used; /* when, in passes */
} gai_cuda_pass;

typedef struct {
    ga_error error; /* the first since it was asked for */
    cudaDeviceProp properties;
    int index;
    char name[320];
    bool bf16, tf32;
    cudaStream_t stream;
    cublasLtHandle_t blas;
    gai_cuda_plan plans[GAI_CUDA_PLANS];
    size_t plans_made;
    void *workspace; /* of cuBLAS: given, so that its choices, and with them the bits, depend on nothing else */
    gai_cuda_packed packed[GAI_CUDA_BLOCKS];
    char *slots; /* SLOTS of SLOT bytes of the host's, which the GPU copies from and to by itself */
    cudaEvent_t through[GAI_CUDA_SLOTS]; /* with its latest copy */
    unsigned next_slot;
    char *scratch;                  /* for the time of one operator */
    size_t scratch_bytes, reserved; /* reserved: the most that an operator of the latest model needs */
    gai_cuda_rounded rounded;
    gai_cuda_pass passes[GAI_CUDA_PASSES], *recording; /* recording: the one whose operators are taken down */
    uint64_t passes_asked;
    ga_error unrecorded;          /* why passes are not recorded any more */
    struct gai_cuda_ranks *ranks; /* with whom it exchanges; NULL: it is alone */
#ifdef GA_CUDNN
    struct gai_cudnn *cudnn; /* NULL: attention is our own */
#endif
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
    gai_cuda_fail(d, GA_ERR_DEVICE, file, line, call, cublasLtGetStatusString(e));
    return false;
}

#ifdef GA_CUDNN
static bool gai_cuda_checked(gai_cuda *d, cudnn_frontend::error_t e, const char *file, int line, const char *call) {
    if (e.is_good()) return true;
    gai_cuda_fail(d, GA_ERR_DEVICE, file, line, call, e.get_message().c_str());
    return false;
}
#endif

/* Makes a call of CUDA or one of its libraries, unless one has failed before; whether all is well. */
#define GAI_CUDA(d, call) ((d)->error.result == GA_OK && gai_cuda_checked((d), (call), __FILE__, __LINE__, #call))

/* Launches a kernel on the device's stream, unless a call has failed before. The kernel stands in parentheses if it has
 * template arguments. */
#define GAI_LAUNCH(d, kernel, grid, block, shared_bytes, ...) \
    GAI_LAUNCH_INTO((d)->stream, d, kernel, grid, block, shared_bytes, __VA_ARGS__)
#define GAI_LAUNCH_INTO(stream, d, kernel, grid, block, shared_bytes, ...)                   \
    do {                                                                                     \
        if ((d)->error.result != GA_OK) break;                                               \
        (d)->rounded.values = NULL;                                                          \
        GAI_LAUNCH_ON(stream, kernel, grid, block, shared_bytes, __VA_ARGS__);               \
        gai_cuda_checked((d), cudaGetLastError(), __FILE__, __LINE__, "launch of " #kernel); \
    } while (0)

static inline size_t gai_cuda_ceil(size_t a, size_t b) {
    return (a + b - 1) / b;
}
static inline size_t gai_cuda_min(size_t a, size_t b) {
    return a < b ? a : b;
}
static inline size_t gai_cuda_max(size_t a, size_t b) {
    return a > b ? a : b;
}

/* Kernels of recorded passes read and write where memory was: called when any of it has gone. */
static void gai_cuda_forget_passes(gai_cuda *d) {
    for (int i = 0; i < GAI_CUDA_PASSES; i++)
        if (d->passes[i].graph)
            gai_cuda_checked(d, cudaGraphExecDestroy(d->passes[i].graph), __FILE__, __LINE__, "cudaGraphExecDestroy");
    memset(d->passes, 0, sizeof d->passes);
}

/* Memory for the time of one operator, aligned to 256 bytes; NULL after a failure. What is asked for in one call is all
 * that the operator gets. */
static char *gai_cuda_scratch(gai_cuda *d, size_t bytes) {
    if (d->error.result != GA_OK) return NULL;
    if (bytes <= d->scratch_bytes) return d->scratch;
    if (bytes < d->reserved) bytes = d->reserved;
    if (d->scratch && !GAI_CUDA(d, cudaFree(d->scratch))) return NULL;
    d->scratch = NULL, d->scratch_bytes = 0;
    d->rounded.values = NULL;
    gai_cuda_forget_passes(d); /* of the scratch that was */
    if (!GAI_CUDA(d, cudaMalloc((void **)&d->scratch, bytes))) return NULL;
    d->scratch_bytes = bytes;
    return d->scratch;
}

static void gai_cuda_zero(void *state, void *p, size_t bytes) {
    gai_cuda *d = (gai_cuda *)state;
    d->rounded.values = NULL; /* zeros may have taken their place */
    if (bytes) (void)GAI_CUDA(d, cudaMemsetAsync(p, 0, bytes, d->stream));
}

static void *gai_cuda_allocate(void *state, size_t bytes) {
    gai_cuda *d = (gai_cuda *)state;
    void *p = NULL;
    if (!GAI_CUDA(d, cudaMalloc(&p, bytes ? bytes : 1))) return NULL;
    gai_cuda_zero(state, p, bytes);
    return p;
}

static void gai_cuda_drop_packed(gai_cuda *d, gai_cuda_packed *b) {
    if (b->packed) gai_cuda_checked(d, cudaFree(b->packed), __FILE__, __LINE__, "cudaFree of packed weights");
    memset(b, 0, sizeof *b);
    gai_cuda_forget_passes(d);
}

static void gai_cuda_release(void *state, void *p) {
    gai_cuda *d = (gai_cuda *)state;
    if (!p) return;
    gai_cuda_forget_passes(d); /* of the memory that goes */
    for (int i = 0; i < GAI_CUDA_BLOCKS; i++)
        if (d->packed[i].weights == p) gai_cuda_drop_packed(d, &d->packed[i]);
    gai_cuda_checked(d, cudaFree(p), __FILE__, __LINE__, "cudaFree");
}

/* The next slot, once the GPU is through with it; NULL after a failure. Slots take turns, so that the host goes on
 * while its copies wait for the operators before them. */
static char *gai_cuda_take_slot(gai_cuda *d) {
    if (!GAI_CUDA(d, cudaEventSynchronize(d->through[d->next_slot]))) return NULL;
    return d->slots + (size_t)d->next_slot * GAI_CUDA_SLOT;
}

/* Begins the copy from or to the slot that was taken. */
static bool gai_cuda_begin_copy(gai_cuda *d, void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    cudaEvent_t through = d->through[d->next_slot];
    d->rounded.values = NULL; /* others may have taken their place */
    d->next_slot = (d->next_slot + 1) % GAI_CUDA_SLOTS;
    return GAI_CUDA(d, cudaMemcpyAsync(to, from, bytes, kind, d->stream)) &&
           GAI_CUDA(d, cudaEventRecord(through, d->stream));
}

static void gai_cuda_copy_in(void *state, void *to, const void *from_host, size_t bytes) {
    gai_cuda *d = (gai_cuda *)state;
    for (size_t at = 0, n; at < bytes; at += n) {
        char *slot = gai_cuda_take_slot(d);
        if (!slot) return;
        n = gai_cuda_min(GAI_CUDA_SLOT, bytes - at);
        memcpy(slot, (const char *)from_host + at, n);
        if (!gai_cuda_begin_copy(d, (char *)to + at, slot, n, cudaMemcpyHostToDevice)) return;
    }
}

/* Up to SLOTS pieces are under way while the oldest is handed over. */
static bool gai_cuda_fetch(gai_cuda *d, char *to_host, const char *from, size_t bytes) {
    unsigned oldest = d->next_slot;
    for (size_t begun = 0, here = 0, n; here < bytes; here += n, oldest = (oldest + 1) % GAI_CUDA_SLOTS) {
        for (; begun < bytes && begun - here < (size_t)GAI_CUDA_SLOTS * GAI_CUDA_SLOT; begun += n) {
            char *slot = gai_cuda_take_slot(d);
            n = gai_cuda_min(GAI_CUDA_SLOT, bytes - begun);
            if (!slot || !gai_cuda_begin_copy(d, slot, from + begun, n, cudaMemcpyDeviceToHost)) return false;
        }
        if (!GAI_CUDA(d, cudaEventSynchronize(d->through[oldest]))) return false;
        n = gai_cuda_min(GAI_CUDA_SLOT, bytes - here);
        memcpy(to_host + here, d->slots + (size_t)oldest * GAI_CUDA_SLOT, n);
    }
    return true;
}

static void gai_cuda_copy_out(void *state, void *to_host, const void *from, size_t bytes) {
    if (!gai_cuda_fetch((gai_cuda *)state, (char *)to_host, (const char *)from, bytes))
        memset(to_host, 0xff, bytes); /* NaN: nobody takes it for a result */
}

static void gai_cuda_wait(void *state) {
    gai_cuda *d = (gai_cuda *)state;
    (void)GAI_CUDA(d, cudaStreamSynchronize(d->stream));
}

static void gai_cuda_take_failure(gai_cuda *d);

static ga_result gai_cuda_status(void *state, ga_error *e) {
    gai_cuda *d = (gai_cuda *)state;
    gai_cuda_take_failure(d);
    ga_result result = d->error.result;
    if (result != GA_OK && e) *e = d->error;
    memset(&d->error, 0, sizeof d->error);
    return result;
}

/* ---- passes that repeat ------------------------------------------------------------------------------------------ */

/* The failure so far is why, and no failure of the run. */
static void gai_cuda_record_no_more(gai_cuda *d) {
    d->unrecorded = d->error;
    memset(&d->error, 0, sizeof d->error);
    gai_cuda_forget_passes(d);
}

/* A pass of a small model is hundreds of kernels, each shorter than its launch. One that comes again with the same key
 * is launched as one CUDA graph: the first time it runs as it is, so that scratch has its size and the libraries their
 * kernels; the second time it is captured; from then on the graph is launched. Arguments are part of it, so the key has
 * to hold what they follow from. Where a capture fails, that and all later passes run as they are. */
static bool gai_cuda_replay(void *state, const void *key, size_t bytes) {
    gai_cuda *d = (gai_cuda *)state;
    if (d->error.result != GA_OK || d->unrecorded.result != GA_OK || bytes > GAI_CUDA_KEY) return false;
    d->rounded.values = NULL; /* a graph writes over them, and may not depend on them */
    gai_cuda_pass *oldest = d->passes, *known = NULL;
    for (gai_cuda_pass *p = d->passes; p < d->passes + GAI_CUDA_PASSES; p++) {
        if (p->bytes == bytes && memcmp(p->key, key, bytes) == 0) known = p;
        if (p->used < oldest->used) oldest = p;
    }
    if (!known) { /* its first time */
        if (oldest->graph) (void)GAI_CUDA(d, cudaGraphExecDestroy(oldest->graph));
        memset(oldest, 0, sizeof *oldest);
        memcpy(oldest->key, key, bytes);
        oldest->bytes = bytes, oldest->used = ++d->passes_asked;
        return false;
    }
    known->used = ++d->passes_asked;
    if (known->graph) {
        (void)GAI_CUDA(d, cudaGraphLaunch(known->graph, d->stream));
        return true;
    }
    if (GAI_CUDA(d, cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal)))
        d->recording = known;
    else
        gai_cuda_record_no_more(d);
    return false;
}

static bool gai_cuda_recorded(void *state) {
    gai_cuda *d = (gai_cuda *)state;
    gai_cuda_pass *p = d->recording;
    if (!p) return true;
    d->recording = NULL;
    cudaGraph_t graph = NULL;
    /* Also after a failure: the stream is to run again. */
    gai_cuda_checked(d, cudaStreamEndCapture(d->stream, &graph), __FILE__, __LINE__, "cudaStreamEndCapture");
    (void)GAI_CUDA(d, cudaGraphInstantiateWithFlags(&p->graph, graph, 0));
    if (graph) gai_cuda_checked(d, cudaGraphDestroy(graph), __FILE__, __LINE__, "cudaGraphDestroy");
    if (GAI_CUDA(d, cudaGraphLaunch(p->graph, d->stream))) return true;
    gai_cuda_record_no_more(d);
    return false;
}

/* ---- what kernels share ------------------------------------------------------------------------------------------ */

static const unsigned GAI_WARP = 0xffffffffu; /* all lanes */

enum {
    GAI_CUDA_THREADS = 256, /* of a block, where nothing else is said */
    GAI_CUDA_PARTS = 256    /* most partial sums of a sum over rows; they are added in order */
};

/* Sums over groups of `width` lanes: every lane gets its group's. */
static __device__ __forceinline__ float gai_group_sum(float v, int width) {
    for (int o = width / 2; o > 0; o >>= 1) v += __shfl_xor_sync(GAI_WARP, v, o);
    return v;
}

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

/* Sum and maximum over the block, for every thread; blocks of whole warps. */
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

static __device__ __forceinline__ float gai_block_max(float v) {
    GAI_SHARED(float, part, [32]);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    v = gai_warp_max(v);
    if (lane == 0) part[warp] = v;
    __syncthreads();
    v = gai_warp_max(lane < warps ? part[lane] : -INFINITY);
    __syncthreads();
    return v;
}

/* Sum over the block in double and in a fixed order, for thread 0; once in a kernel of GAI_CUDA_THREADS. */
static __device__ __forceinline__ double gai_block_total(double v) {
    GAI_SHARED(double, part, [GAI_CUDA_THREADS]);
    int t = threadIdx.x;
    part[t] = v;
    __syncthreads();
    if (t < 32) {
        for (int other = t + 32; other < GAI_CUDA_THREADS; other += 32) v += part[other];
        part[t] = v;
        __syncwarp();
        for (int other = 1; t == 0 && other < 32; other++) v += part[other];
    }
    return v;
}

/* VEC neighbours at once: 16 bytes where sizes and addresses allow it (VEC 4), else one by one. */
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

/* The same rounded to bfloat16, to nearest even. */
template <int VEC>
static __device__ __forceinline__ void gai_store(__nv_bfloat16 *p, const gai_pack<VEC> &x) {
    if constexpr (VEC == 4) {
        __nv_bfloat162 two[2] = {__floats2bfloat162_rn(x.v[0], x.v[1]), __floats2bfloat162_rn(x.v[2], x.v[3])};
        uint2 bits;
        memcpy(&bits, two, sizeof bits);
        *reinterpret_cast<uint2 *>(p) = bits;
    } else {
        __nv_bfloat16 one = __float2bfloat16(x.v[0]);
        *p = one; /* a store of its own: the checker sees none of a call's result */
    }
}

#define GAI_EACH(i) _Pragma("unroll") for (int i = 0; i < VEC; i++)

/* The index of the first of this thread's neighbours in an array that the whole grid walks once. */
template <int VEC>
static __device__ __forceinline__ size_t gai_index() {
    return ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
}

/* Whether 16-byte accesses work: bits below 16 in the union of addresses and strides in bytes say that they do not. */
static inline bool gai_aligned(uintptr_t parts) {
    return parts % 16 == 0;
}
static inline uintptr_t gai_bits(const void *p) {
    return (uintptr_t)p;
}
static inline uintptr_t gai_bits(size_t reals) {
    return reals * sizeof(float);
}
template <class A, class B, class... C>
static inline uintptr_t gai_bits(A a, B b, C... c) {
    return gai_bits(a) | gai_bits(b, c...);
}

static inline unsigned gai_blocks(size_t n, size_t each) {
    return (unsigned)gai_cuda_ceil(n, each);
}

/* Threads of a block that walks along a row of n items. */
static inline unsigned gai_row_threads(size_t n) {
    return (unsigned)gai_cuda_min(GAI_CUDA_THREADS, gai_cuda_max(1, gai_cuda_ceil(n, 32)) * 32);
}

/* Launches kernel<4> or kernel<1> over arrays of n values, one pack for each thread. */
#define GAI_LAUNCH_ARRAY(d, four, kernel, n, ...)                                                            \
    do {                                                                                                     \
        if (four)                                                                                            \
            GAI_LAUNCH(d, kernel<4>, gai_blocks(n, 4 * GAI_CUDA_THREADS), GAI_CUDA_THREADS, 0, __VA_ARGS__); \
        else                                                                                                 \
            GAI_LAUNCH(d, kernel<1>, gai_blocks(n, GAI_CUDA_THREADS), GAI_CUDA_THREADS, 0, __VA_ARGS__);     \
    } while (0)

/* Launches kernel<4> or kernel<1> with one block for each of N rows of n values. */
#define GAI_LAUNCH_ROWS(d, four, kernel, N, n, shared_bytes, ...)                                         \
    do {                                                                                                  \
        if (four)                                                                                         \
            GAI_LAUNCH(d, kernel<4>, (unsigned)(N), gai_row_threads((n) / 4), shared_bytes, __VA_ARGS__); \
        else                                                                                              \
            GAI_LAUNCH(d, kernel<1>, (unsigned)(N), gai_row_threads(n), shared_bytes, __VA_ARGS__);       \
    } while (0)

/* sums_i (+)= part_0i + part_1i + ...; blocks of 32 columns by 8 strands of parts. */
static __global__ void __launch_bounds__(256)
    gai_k_add_parts(float *sums, const float *parts, size_t count, size_t n, bool add) {
    GAI_SHARED(float, strand, [8][32]);
    size_t i = (size_t)blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (i < n)
        for (size_t p = threadIdx.y; p < count; p += 8) sum += parts[p * n + i];
    strand[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= n) return;
    for (int s = 1; s < 8; s++) sum += strand[s][threadIdx.x];
    sums[i] = add ? sums[i] + sum : sum;
}

static void gai_cuda_add_parts(gai_cuda *d, float *sums, const float *parts, size_t count, size_t n, bool add) {
    GAI_LAUNCH(d, gai_k_add_parts, gai_blocks(n, 32), dim3(32, 8), 0, sums, parts, count, n, add);
}

static __device__ __forceinline__ float gai_k_sigmoid(float x) {
    return 1 / (1 + expf(-x));
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS) gai_k_to_bf16(__nv_bfloat16 *y, const float *x, size_t n) {
    size_t i = gai_index<VEC>();
    if (i < n) gai_store<VEC>(y + i, gai_load<VEC>(x + i));
}

static void gai_cuda_to_bf16(gai_cuda *d, __nv_bfloat16 *y, const float *x, size_t n) {
    GAI_LAUNCH_ARRAY(d, gai_aligned(gai_bits(x, n)), gai_k_to_bf16, n, y, x, n);
}

/* One pack of values, and the same rounded beside it where that is not NULL. */
template <int VEC>
static __device__ __forceinline__ void gai_store_both(float *y, __nv_bfloat16 *rounded, size_t at,
                                                      const gai_pack<VEC> &x) {
    gai_store<VEC>(y + at, x);
    if (rounded) gai_store<VEC>(rounded + at, x);
}

/* Bytes of n values of an operand in bfloat16, so that the next one is aligned too. */
static size_t gai_cuda_half_bytes(size_t n) {
    return gai_cuda_ceil(n * sizeof(__nv_bfloat16), 256) * 256;
}

/* An operand of a product. */
typedef struct {
    const void *p;
    cudaDataType type;
} gai_cuda_operand;

/* x as products read it: itself, or rounded into memory at *at, which moves on. */
static gai_cuda_operand gai_cuda_operand_of(gai_cuda *d, const float *x, size_t n, char **at) {
    gai_cuda_operand plain = {x, CUDA_R_32F}, rounded = {*at, CUDA_R_16BF};
    if (!d->bf16) return plain;
    bool there = d->rounded.values == x && d->rounded.n == n && *at == d->scratch;
    if (!there) gai_cuda_to_bf16(d, (__nv_bfloat16 *)*at, x, n);
    *at += gai_cuda_half_bytes(n);
    return rounded;
}

static size_t gai_cuda_operand_bytes(const gai_cuda *d, size_t n) {
    return d->bf16 ? gai_cuda_half_bytes(n) : 0;
}

/* Where an operator leaves its n results rounded as well, for a product that follows; NULL: none would read them so. */
static __nv_bfloat16 *gai_cuda_beside(gai_cuda *d, size_t n) {
    return d->bf16 ? (__nv_bfloat16 *)gai_cuda_scratch(d, gai_cuda_half_bytes(n)) : NULL;
}

/* It has left them there. */
static void gai_cuda_are_beside(gai_cuda *d, const float *values, size_t n) {
    d->rounded.values = d->bf16 ? values : NULL, d->rounded.n = n;
}

/* The packed copy of n weights, or NULL. */
static const __nv_bfloat16 *gai_cuda_find_packed(const gai_cuda *d, const float *w, size_t n) {
    for (int i = 0; d->bf16 && i < GAI_CUDA_BLOCKS; i++) {
        const gai_cuda_packed *b = &d->packed[i];
        if (b->weights && w >= b->weights && w + n <= b->weights + b->n) return b->packed + (w - b->weights);
    }
    return NULL;
}

/* Weights as products read them, and the scratch that they take where there is no packed copy. */
static gai_cuda_operand gai_cuda_weights_of(gai_cuda *d, const float *w, size_t n, char **at) {
    gai_cuda_operand packed = {gai_cuda_find_packed(d, w, n), CUDA_R_16BF};
    return packed.p ? packed : gai_cuda_operand_of(d, w, n, at);
}

static size_t gai_cuda_weight_bytes(const gai_cuda *d, const float *w, size_t n) {
    return gai_cuda_find_packed(d, w, n) ? 0 : gai_cuda_operand_bytes(d, n);
}

/* Renews the packed copy of a block of weights. Without room for one the products round the weights each time. */
static void gai_cuda_weights_changed(void *state, const float *weights, size_t n) {
    gai_cuda *d = (gai_cuda *)state;
    (void)gai_cuda_scratch(d, d->reserved);
    if (!d->bf16) return;
    gai_cuda_packed *b = NULL;
    for (int i = GAI_CUDA_BLOCKS; i-- > 0;)
        if (d->packed[i].weights == weights || (!d->packed[i].weights && !b)) b = &d->packed[i];
    if (!b) return;
    if (b->weights == weights && b->n < n) gai_cuda_drop_packed(d, b);
    if (!b->weights) {
        if (!GAI_CUDA(d, cudaMalloc((void **)&b->packed, n * sizeof *b->packed))) return;
        b->weights = weights, b->n = n;
    }
    gai_cuda_to_bf16(d, b->packed, weights, n);
}

/* The largest power of two, up to that of a vector access, that divides the addresses. */
static uint32_t gai_cuda_alignment(const void *p, const void *q) {
    uintptr_t bits = (uintptr_t)p | (uintptr_t)q | 16;
    return (uint32_t)(bits & (~bits + 1));
}

/* Asks cuBLASLt for its first choice: by its rules, not by timing, for a workspace of one size, and without sums that
 * depend on which part of the GPU is done first. The same shape is computed in the same way in every run. */
static bool gai_cuda_make_plan(gai_cuda *d, gai_cuda_plan *p, const gai_cuda_shape *s) {
    bool tf32 = d->tf32 && s->type == CUDA_R_32F, a_turned = s->a_form == CUBLAS_OP_T,
         b_turned = s->b_form == CUBLAS_OP_T;
    size_t workspace = GAI_CUDA_WORKSPACE;
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK & ~CUBLASLT_REDUCTION_SCHEME_INPLACE;
    cublasLtMatmulPreferenceOpaque_t rules;
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
#define GAI_SET(what, of, attribute, value) \
    GAI_CUDA(d, cublasLtMatmul##what##SetAttribute(of, CUBLASLT_MATMUL_##attribute, &(value), sizeof(value)))
    bool made =
        GAI_CUDA(d, cublasLtMatmulDescInit(&p->product, tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F,
                                           CUDA_R_32F)) &&
        GAI_SET(Desc, &p->product, DESC_TRANSA, s->a_form) && GAI_SET(Desc, &p->product, DESC_TRANSB, s->b_form) &&
        GAI_CUDA(d, cublasLtMatrixLayoutInit(&p->a, s->type, a_turned ? s->k : s->m, a_turned ? s->m : s->k,
                                             (int64_t)s->lda)) &&
        GAI_CUDA(d, cublasLtMatrixLayoutInit(&p->b, s->type, b_turned ? s->n : s->k, b_turned ? s->k : s->n,
                                             (int64_t)s->ldb)) &&
        GAI_CUDA(d, cublasLtMatrixLayoutInit(&p->c, CUDA_R_32F, s->m, s->n, (int64_t)s->ldc)) &&
        GAI_CUDA(d, cublasLtMatmulPreferenceInit(&rules)) &&
        GAI_SET(Preference, &rules, PREF_MAX_WORKSPACE_BYTES, workspace) &&
        GAI_SET(Preference, &rules, PREF_REDUCTION_SCHEME_MASK, reductions) &&
        GAI_SET(Preference, &rules, PREF_MIN_ALIGNMENT_A_BYTES, s->a_align) &&
        GAI_SET(Preference, &rules, PREF_MIN_ALIGNMENT_B_BYTES, s->b_align) &&
        GAI_SET(Preference, &rules, PREF_MIN_ALIGNMENT_C_BYTES, s->c_align) &&
        GAI_SET(Preference, &rules, PREF_MIN_ALIGNMENT_D_BYTES, s->c_align) &&
        GAI_CUDA(d, cublasLtMatmulAlgoGetHeuristic(d->blas, &p->product, &p->a, &p->b, &p->c, &p->c, &rules, 1, &found,
                                                   &count));
#undef GAI_SET
    if (made && (count == 0 || found.state != CUBLAS_STATUS_SUCCESS))
        gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, "cublasLtMatmulAlgoGetHeuristic", "no algorithm");
    if (d->error.result != GA_OK) return false;
    p->algorithm = found.algo, p->shape = *s;
    return true;
}

static gai_cuda_plan *gai_cuda_find_plan(gai_cuda *d, const gai_cuda_shape *s) {
    for (size_t i = 0; i < gai_cuda_min(d->plans_made, GAI_CUDA_PLANS); i++)
        if (memcmp(&d->plans[i].shape, s, sizeof *s) == 0) return &d->plans[i];
    gai_cuda_plan *p = &d->plans[d->plans_made++ % GAI_CUDA_PLANS];
    memset(p, 0, sizeof *p);
    return gai_cuda_make_plan(d, p, s) ? p : NULL;
}

/* D = A B, or A B + C for a C that is not NULL and may be D; in columns: a row-major (M, N) is an (N, M) there. */
static void gai_cuda_gemm(gai_cuda *d, float *out, const float *c, size_t ldc, gai_cuda_operand a, bool a_turned,
                          size_t lda, gai_cuda_operand b, bool b_turned, size_t ldb, size_t m, size_t n, size_t k) {
    const float one = 1, keep = c ? 1 : 0;
    if (!c) c = out;
    gai_cuda_shape s;
    memset(&s, 0, sizeof s);
    s.type = a.type, s.a_form = a_turned ? CUBLAS_OP_T : CUBLAS_OP_N, s.b_form = b_turned ? CUBLAS_OP_T : CUBLAS_OP_N;
    s.a_align = gai_cuda_alignment(a.p, a.p), s.b_align = gai_cuda_alignment(b.p, b.p);
    s.c_align = gai_cuda_alignment(c, out);
    s.m = m, s.n = n, s.k = k, s.lda = lda, s.ldb = ldb, s.ldc = ldc;
    gai_cuda_plan *p = d->error.result == GA_OK ? gai_cuda_find_plan(d, &s) : NULL;
    if (!p) return;
    (void)GAI_CUDA(d, cublasLtMatmul(d->blas, &p->product, &one, a.p, &p->a, b.p, &p->b, &keep, c, &p->c, out, &p->c,
                                     &p->algorithm, d->workspace, GAI_CUDA_WORKSPACE, d->stream));
}

/* y = x w^T,  dx = dy w,  dw += dy^T x. */
static void gai_cuda_product(gai_cuda *d, float *y, gai_cuda_operand x, gai_cuda_operand w, size_t M, size_t O,
                             size_t I) {
    gai_cuda_gemm(d, y, NULL, O, w, true, I, x, false, I, O, M, I);
}
static void gai_cuda_product_dx(gai_cuda *d, float *dx, gai_cuda_operand dy, gai_cuda_operand w, size_t M, size_t O,
                                size_t I) {
    gai_cuda_gemm(d, dx, NULL, I, w, false, I, dy, false, O, I, M, O);
}
static void gai_cuda_product_dw(gai_cuda *d, float *dw, gai_cuda_operand dy, gai_cuda_operand x, size_t M, size_t O,
                                size_t I) {
    gai_cuda_gemm(d, dw, dw, I, x, false, I, dy, true, O, I, O, M);
}

static void gai_cuda_linear_forward(void *state, float *y, const float *x, const float *w, size_t M, size_t O,
                                    size_t I) {
    gai_cuda *d = (gai_cuda *)state;
    char *at = gai_cuda_scratch(d, gai_cuda_operand_bytes(d, M * I) + gai_cuda_weight_bytes(d, w, O * I));
    gai_cuda_operand xs = gai_cuda_operand_of(d, x, M * I, &at), ws = gai_cuda_weights_of(d, w, O * I, &at);
    gai_cuda_product(d, y, xs, ws, M, O, I);
}

static void gai_cuda_linear_backward(void *state, float *dx, float *dw, const float *dy, const float *x, const float *w,
                                     size_t M, size_t O, size_t I) {
    gai_cuda *d = (gai_cuda *)state;
    char *at = gai_cuda_scratch(d, gai_cuda_operand_bytes(d, M * I) + gai_cuda_weight_bytes(d, w, O * I) +
                                       gai_cuda_operand_bytes(d, M * O));
    bool x_first = d->rounded.values == x; /* what stands in scratch already stays at its start */
    gai_cuda_operand xs, dys;
    if (x_first) xs = gai_cuda_operand_of(d, x, M * I, &at);
    dys = gai_cuda_operand_of(d, dy, M * O, &at);
    if (!x_first) xs = gai_cuda_operand_of(d, x, M * I, &at);
    gai_cuda_product_dw(d, dw, dys, xs, M, O, I);
    if (dx) gai_cuda_product_dx(d, dx, dys, gai_cuda_weights_of(d, w, O * I, &at), M, O, I);
}

/* y (M, I): the first I of `stride` channels of each row of x. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_channels_to_bf16(__nv_bfloat16 *y, const float *x, size_t stride, size_t M, size_t I) {
    size_t i = gai_index<1>();
    if (i >= M * I) return;
    gai_pack<1> one = gai_load<1>(x + i / I * stride + i % I);
    gai_store<1>(y + i, one);
}

/* The first I of `stride` channels of each row, as products read them; *columns: how far apart its rows then are. */
static gai_cuda_operand gai_cuda_channels_of(gai_cuda *d, const float *x, size_t stride, size_t M, size_t I, char **at,
                                             size_t *columns) {
    gai_cuda_operand plain = {x, CUDA_R_32F}, rounded = {*at, CUDA_R_16BF};
    *columns = d->bf16 ? I : stride;
    if (!d->bf16) return plain;
    GAI_LAUNCH(d, gai_k_channels_to_bf16, gai_blocks(M * I, GAI_CUDA_THREADS), GAI_CUDA_THREADS, 0,
               (__nv_bfloat16 *)*at, x, stride, M, I);
    *at += gai_cuda_half_bytes(M * I);
    return rounded;
}

static void gai_cuda_linear_channels_forward(void *state, float *y, const float *x, size_t stride, const float *w,
                                             size_t M, size_t O, size_t I) {
    gai_cuda *d = (gai_cuda *)state;
    size_t columns;
    char *at = gai_cuda_scratch(d, gai_cuda_operand_bytes(d, M * I) + gai_cuda_weight_bytes(d, w, O * I));
    gai_cuda_operand xs = gai_cuda_channels_of(d, x, stride, M, I, &at, &columns);
    gai_cuda_gemm(d, y, NULL, O, gai_cuda_weights_of(d, w, O * I, &at), true, I, xs, false, columns, O, M, I);
}

static void gai_cuda_linear_channels_backward(void *state, float *dx, float *dw, const float *dy, const float *x,
                                              size_t stride, const float *w, size_t M, size_t O, size_t I) {
    gai_cuda *d = (gai_cuda *)state;
    size_t columns;
    char *at = gai_cuda_scratch(d, gai_cuda_operand_bytes(d, M * I) + gai_cuda_weight_bytes(d, w, O * I) +
                                       gai_cuda_operand_bytes(d, M * O));
    gai_cuda_operand xs = gai_cuda_channels_of(d, x, stride, M, I, &at, &columns);
    gai_cuda_operand dys = gai_cuda_operand_of(d, dy, M * O, &at);
    gai_cuda_gemm(d, dx, dx, stride, gai_cuda_weights_of(d, w, O * I, &at), false, I, dys, false, O, I, M, O);
    gai_cuda_gemm(d, dw, dw, I, xs, false, columns, dys, true, O, I, O, M);
}

/* ---- embedding --------------------------------------------------------------------------------------------------- */

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_embedding_forward(float *x, const int32_t *tokens, const float *w, size_t C) {
    const float *row = w + (size_t)tokens[blockIdx.x] * C;
    for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC)
        gai_store<VEC>(x + blockIdx.x * C + c, gai_load<VEC>(row + c));
}

static void gai_cuda_embedding_forward(void *state, float *x, const int32_t *tokens, const float *w, size_t N,
                                       size_t C) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH_ROWS(d, gai_aligned(gai_bits(x, w, C)), gai_k_embedding_forward, N, C, 0, x, tokens, w, C);
}

/* The block of the first row with a token adds up all rows with it, in their order; the others have nothing to do. A
 * block looks at 128 tokens at a time, and keeps a bit for each that is its own. */
template <int VEC>
static __global__ void __launch_bounds__(128)
    gai_k_embedding_backward(float *dw, const int32_t *tokens, const float *dx, size_t N, size_t C) {
    GAI_SHARED(unsigned, same, [4]);
    int32_t token = tokens[blockIdx.x];
    size_t c = ((size_t)blockIdx.y * blockDim.x + threadIdx.x) * VEC;
    gai_pack<VEC> sum = {};
    for (size_t n0 = 0; n0 < N; n0 += 128) {
        size_t n = n0 + threadIdx.x;
        unsigned bits = __ballot_sync(GAI_WARP, n < N && tokens[n] == token);
        if (threadIdx.x % 32 == 0) same[threadIdx.x / 32] = bits;
        __syncthreads();
        for (int warp = 0; warp < 4; warp++)
            for (unsigned left = same[warp]; left; left &= left - 1) {
                size_t row = n0 + (size_t)(warp * 32 + __ffs((int)left) - 1);
                if (row < blockIdx.x) return; /* the whole block: an earlier one has this token */
                if (c >= C) continue;
                if (row == blockIdx.x) sum = gai_load<VEC>(dw + (size_t)token * C + c);
                gai_pack<VEC> more = gai_load<VEC>(dx + row * C + c);
                GAI_EACH(i) sum.v[i] += more.v[i];
            }
        __syncthreads();
    }
    if (c < C) gai_store<VEC>(dw + (size_t)token * C + c, sum);
}

static void gai_cuda_embedding_backward(void *state, float *dw, const int32_t *tokens, const float *dx, size_t N,
                                        size_t C) {
    gai_cuda *d = (gai_cuda *)state;
    if (gai_aligned(gai_bits(dw, dx, C)))
        GAI_LAUNCH(d, gai_k_embedding_backward<4>, dim3((unsigned)N, gai_blocks(C, 4 * 128)), 128, 0, dw, tokens, dx, N,
                   C);
    else
        GAI_LAUNCH(d, gai_k_embedding_backward<1>, dim3((unsigned)N, gai_blocks(C, 128)), 128, 0, dw, tokens, dx, N, C);
}

/* ---- RMSNorm ----------------------------------------------------------------------------------------------------- */

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_rmsnorm_forward(float *h, __nv_bfloat16 *rounded, float *rstd, const float *x, const float *w, size_t C,
                          float eps) {
    const float *xn = x + blockIdx.x * C;
    float sum = 0;
    for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) {
        gai_pack<VEC> a = gai_load<VEC>(xn + c);
        GAI_EACH(i) sum += a.v[i] * a.v[i];
    }
    float r = 1 / sqrtf(gai_block_sum(sum) / (float)C + eps);
    for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) {
        gai_pack<VEC> a = gai_load<VEC>(xn + c), b = gai_load<VEC>(w + c);
        GAI_EACH(i) a.v[i] = b.v[i] * a.v[i] * r;
        gai_store_both<VEC>(h, rounded, blockIdx.x * C + c, a);
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

static void gai_cuda_rmsnorm_forward(void *state, float *h, float *rstd, const float *x, const float *w, size_t N,
                                     size_t C, float eps) {
    gai_cuda *d = (gai_cuda *)state;
    __nv_bfloat16 *rounded = gai_cuda_beside(d, N * C);
    GAI_LAUNCH_ROWS(d, gai_aligned(gai_bits(h, x, w, C)), gai_k_rmsnorm_forward, N, C, 0, h, rounded, rstd, x, w, C,
                    eps);
    gai_cuda_are_beside(d, h, N * C);
}

/* A block takes every gridDim-th row, and keeps its part of dw: in shared memory, or in `parts` itself where a row is
 * too long. A thread stays with its columns, so that nobody waits. dx may be dh. */
template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_rmsnorm_backward(float *dx, float *parts, const float *dh, const float *x, const float *w, const float *rstd,
                           size_t N, size_t C, bool add, bool shared) {
    GAI_DYNAMIC_SHARED(float, on_chip);
    float *part = parts + blockIdx.x * C, *dw = shared ? on_chip : part;
    for (size_t n = blockIdx.x; n < N; n += gridDim.x) {
        const float *xn = x + n * C, *dhn = dh + n * C;
        float r = rstd[n], sum = 0;
        for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) {
            gai_pack<VEC> g = gai_load<VEC>(dhn + c), a = gai_load<VEC>(xn + c), b = gai_load<VEC>(w + c), total = {};
            if (n != blockIdx.x) total = gai_load<VEC>(dw + c);
            GAI_EACH(i) {
                sum += b.v[i] * g.v[i] * a.v[i];
                total.v[i] += g.v[i] * a.v[i] * r;
            }
            gai_store<VEC>(dw + c, total);
        }
        float along = r * r * (gai_block_sum(sum) / (float)C);
        for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) {
            gai_pack<VEC> g = gai_load<VEC>(dhn + c), a = gai_load<VEC>(xn + c), b = gai_load<VEC>(w + c), old = {};
            if (add) old = gai_load<VEC>(dx + n * C + c);
            GAI_EACH(i) g.v[i] = old.v[i] + r * (b.v[i] * g.v[i] - a.v[i] * along);
            gai_store<VEC>(dx + n * C + c, g);
        }
    }
    if (!shared) return;
    for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) gai_store<VEC>(part + c, gai_load<VEC>(dw + c));
}

static size_t gai_cuda_parts(size_t rows) {
    return gai_cuda_min(rows, GAI_CUDA_PARTS);
}

static void gai_cuda_rmsnorm_backward(void *state, float *dx, float *dw, const float *dh, const float *x,
                                      const float *w, const float *rstd, size_t N, size_t C, bool add) {
    gai_cuda *d = (gai_cuda *)state;
    size_t parts = gai_cuda_parts(N), bytes = C * sizeof *x;
    bool shared = bytes <= GAI_CUDA_SHARED;
    float *part = (float *)gai_cuda_scratch(d, parts * bytes);
    GAI_LAUNCH_ROWS(d, gai_aligned(gai_bits(dx, dh, x, w, C)), gai_k_rmsnorm_backward, parts, C, shared ? bytes : 0, dx,
                    part, dh, x, w, rstd, N, C, add, shared);
    gai_cuda_add_parts(d, dw, part, parts, C, true);
}

/* ---- heads: QK-norm and RoPE ------------------------------------------------------------------------------------- */

/* `lanes` threads work on a head; each has pairs (i, i + D/2) of its values, VEC neighbours at a time, ROUNDS times. */
template <int VEC>
struct gai_heads {
    enum { ROUNDS = VEC == 4 ? 1 : 4 }; /* D <= 256: 32 lanes x 4 values, or 32 lanes x 4 rounds */
    gai_pack<VEC> a[ROUNDS], b[ROUNDS];
};

#define GAI_EACH_PAIR(k, i)                                       \
    _Pragma("unroll") for (int k = 0; k < gai_heads<VEC>::ROUNDS; \
                           k++) if (size_t i = (size_t)(k * lanes + lane) * VEC; i < D / 2)

template <int VEC>
static __device__ __forceinline__ gai_heads<VEC> gai_load_head(const float *x, int lane, int lanes, size_t D) {
    gai_heads<VEC> h = {};
    GAI_EACH_PAIR(k, i) h.a[k] = gai_load<VEC>(x + i), h.b[k] = gai_load<VEC>(x + D / 2 + i);
    return h;
}

/* 1 / sqrt(mean(x^2) + eps), for all lanes of the head. */
template <int VEC>
static __device__ __forceinline__ float gai_head_rstd(const gai_heads<VEC> &h, int lanes, size_t D, float eps) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < gai_heads<VEC>::ROUNDS; k++)
        GAI_EACH(j) sum += h.a[k].v[j] * h.a[k].v[j] + h.b[k].v[j] * h.b[k].v[j]; /* zeros where there are none */
    return 1 / sqrtf(gai_group_sum(sum, lanes) / (float)D + eps);
}

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS, 1) /* 1: else ptxas saves registers, and spills */
    gai_k_heads_forward(float *y, const float *x, size_t x_stride, const float *w, const float *rope, size_t N,
                        size_t T, size_t H, size_t D, float eps, int lanes) {
    int lane = threadIdx.x & (lanes - 1);
    size_t head = (size_t)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    bool real = head < N * H; /* the others keep their warp company */
    size_t n = real ? head / H : 0, at = real ? head : 0;
    gai_heads<VEC> h = gai_load_head<VEC>(x + n * x_stride + at % H * D, lane, lanes, D);
    float r = w ? gai_head_rstd<VEC>(h, lanes, D, eps) : 1;
    GAI_EACH_PAIR(k, i) {
        if (!real) continue;
        if (w) {
            gai_pack<VEC> wa = gai_load<VEC>(w + i), wb = gai_load<VEC>(w + D / 2 + i);
            GAI_EACH(j) h.a[k].v[j] *= wa.v[j] * r, h.b[k].v[j] *= wb.v[j] * r;
        }
        if (rope) {
            const float *turn = rope + n % T * D + i;
            gai_pack<VEC> cosine = gai_load<VEC>(turn), sine = gai_load<VEC>(turn + D / 2);
            GAI_EACH(j) {
                float a = h.a[k].v[j], b = h.b[k].v[j];
                h.a[k].v[j] = a * cosine.v[j] - b * sine.v[j];
                h.b[k].v[j] = b * cosine.v[j] + a * sine.v[j];
            }
        }
        gai_store<VEC>(y + at * D + i, h.a[k]);
        gai_store<VEC>(y + at * D + D / 2 + i, h.b[k]);
    }
}

/* Threads for each head: a power of two that covers its pairs. */
static int gai_cuda_head_lanes(size_t D, size_t vec) {
    int lanes = 1;
    while (lanes < 32 && (size_t)lanes * vec < D / 2) lanes *= 2;
    return lanes;
}

static void gai_cuda_heads_forward(void *state, float *y, const float *x, size_t x_stride, const float *w,
                                   const float *rope, size_t B, size_t T, size_t H, size_t D, float eps) {
    gai_cuda *d = (gai_cuda *)state;
    bool four = gai_aligned(gai_bits(y, x, x_stride, w, rope, D / 2));
    int lanes = gai_cuda_head_lanes(D, four ? 4 : 1);
    unsigned blocks = gai_blocks(B * T * H, (size_t)(GAI_CUDA_THREADS / lanes));
    if (four)
        GAI_LAUNCH(d, gai_k_heads_forward<4>, blocks, GAI_CUDA_THREADS, 0, y, x, x_stride, w, rope, B * T, T, H, D, eps,
                   lanes);
    else
        GAI_LAUNCH(d, gai_k_heads_forward<1>, blocks, GAI_CUDA_THREADS, 0, y, x, x_stride, w, rope, B * T, T, H, D, eps,
                   lanes);
}

/* A block takes every gridDim-th batch of heads; a thread adds up dw for its pairs, then the block over its heads. */
template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_heads_backward(float *dx, float *parts, const float *dy, const float *x, size_t x_stride, size_t dx_stride,
                         const float *w, const float *rope, size_t N, size_t T, size_t H, size_t D, float eps,
                         int lanes) {
    GAI_DYNAMIC_SHARED(float, totals); /* (heads of the block, D) */
    int lane = threadIdx.x & (lanes - 1), mine = threadIdx.x / lanes, heads = GAI_CUDA_THREADS / lanes;
    gai_heads<VEC> dw = {};
    for (size_t first = (size_t)blockIdx.x * heads; first < N * H; first += (size_t)gridDim.x * heads) {
        bool real = first + mine < N * H;
        size_t at = real ? first + mine : 0, n = at / H;
        gai_heads<VEC> u = gai_load_head<VEC>(dy + at * D, lane, lanes, D);
        if (rope) GAI_EACH_PAIR(k, i) {
                const float *turn = rope + n % T * D + i;
                gai_pack<VEC> cosine = gai_load<VEC>(turn), sine = gai_load<VEC>(turn + D / 2);
                GAI_EACH(j) {
                    float a = u.a[k].v[j], b = u.b[k].v[j];
                    u.a[k].v[j] = a * cosine.v[j] + b * sine.v[j];
                    u.b[k].v[j] = b * cosine.v[j] - a * sine.v[j];
                }
            }
        if (w) {
            gai_heads<VEC> v = gai_load_head<VEC>(x + n * x_stride + at % H * D, lane, lanes, D);
            float r = gai_head_rstd<VEC>(v, lanes, D, eps), sum = 0;
            GAI_EACH_PAIR(k, i) {
                gai_pack<VEC> wa = gai_load<VEC>(w + i), wb = gai_load<VEC>(w + D / 2 + i);
                GAI_EACH(j) {
                    if (real) dw.a[k].v[j] += u.a[k].v[j] * v.a[k].v[j] * r;
                    if (real) dw.b[k].v[j] += u.b[k].v[j] * v.b[k].v[j] * r;
                    u.a[k].v[j] *= wa.v[j], u.b[k].v[j] *= wb.v[j];
                    sum += u.a[k].v[j] * v.a[k].v[j] + u.b[k].v[j] * v.b[k].v[j];
                }
            }
            float along = r * r * (gai_group_sum(sum, lanes) / (float)D);
            GAI_EACH_PAIR(k, i) GAI_EACH(j) {
                u.a[k].v[j] = r * (u.a[k].v[j] - v.a[k].v[j] * along);
                u.b[k].v[j] = r * (u.b[k].v[j] - v.b[k].v[j] * along);
            }
        }
        float *to = dx + n * dx_stride + at % H * D;
        if (real) GAI_EACH_PAIR(k, i) gai_store<VEC>(to + i, u.a[k]), gai_store<VEC>(to + D / 2 + i, u.b[k]);
    }
    if (!w) return;
    GAI_EACH_PAIR(k, i) {
        gai_store<VEC>(totals + mine * D + i, dw.a[k]);
        gai_store<VEC>(totals + mine * D + D / 2 + i, dw.b[k]);
    }
    __syncthreads();
    for (size_t i = threadIdx.x; i < D; i += blockDim.x) {
        float sum = 0;
        for (int h = 0; h < heads; h++) sum += totals[h * D + i];
        parts[blockIdx.x * D + i] = sum;
    }
}

static void gai_cuda_heads_backward(void *state, float *dx, float *dw, const float *dy, const float *x, size_t x_stride,
                                    size_t dx_stride, const float *w, const float *rope, size_t B, size_t T, size_t H,
                                    size_t D, float eps) {
    gai_cuda *d = (gai_cuda *)state;
    bool four = gai_aligned(gai_bits(dx, dy, x, x_stride, dx_stride, w, rope, D / 2));
    int lanes = gai_cuda_head_lanes(D, four ? 4 : 1);
    size_t heads = (size_t)(GAI_CUDA_THREADS / lanes), batches = gai_cuda_ceil(B * T * H, heads);
    size_t blocks = w ? gai_cuda_parts(batches) : batches, shared_bytes = w ? heads * D * sizeof *x : 0;
    float *parts = w ? (float *)gai_cuda_scratch(d, blocks * D * sizeof *x) : NULL;
    if (four)
        GAI_LAUNCH(d, gai_k_heads_backward<4>, (unsigned)blocks, GAI_CUDA_THREADS, shared_bytes, dx, parts, dy, x,
                   x_stride, dx_stride, w, rope, B * T, T, H, D, eps, lanes);
    else
        GAI_LAUNCH(d, gai_k_heads_backward<1>, (unsigned)blocks, GAI_CUDA_THREADS, shared_bytes, dx, parts, dy, x,
                   x_stride, dx_stride, w, rope, B * T, T, H, D, eps, lanes);
    if (w) gai_cuda_add_parts(d, dw, parts, blocks, D, true);
}

/* ==== attention =================================================================================================== */
/* Flash attention (Dao 2022, 2023): one block of threads owns 64 rows of one head and walks over the other side in
 * tiles, so that no T x T matrix exists in memory. Three kernels,
 *
 *     forward   rows are queries   S = Q K^T    y  += P V          over the keys
 *     dq        rows are queries   S = Q K^T    dq += dS K         over the keys,    with dP = dY V^T
 *     dk, dv    rows are keys      S^T = K Q^T  dv += P^T dY       over the queries, with dP^T = V dY^T
 *                                               dk += dS^T Q
 *
 * in two versions: gai_flash_ on tensor cores, bfloat16 with float32 accumulation, and gai_plain_ in float32. No sum
 * depends on the order in which blocks run, so every run gives the same bits.
 *
 * Rounding of the tensor-core version: q, k, v and dy to bfloat16, P and dS as they become operands, each to the
 * nearest. What is walked over is rounded once, before, and then read by all blocks of its heads; a tile is on its way
 * to shared memory (cp.async) while the one before it is multiplied. Scores, the softmax and its sum, delta, lse and
 * all accumulators are float32.
 *
 * Costs of a head, S = T, counting 2 FLOPs for a multiply-add; half of each product lies below the diagonal, and
 * tiles above it are skipped:
 *
 *                  products            FLOPs       float32 values to and from memory, each read once
 *     forward      S, y                2 T^2 D     (4 T D + T) with k and v shared by the group
 *     dq           S, dP, dq           3 T^2 D     5 T D + 2 T
 *     dk, dv       S, dP, dk, dv       4 T^2 D     6 T D + 2 T
 *
 * A tile is read again by each of the T / 64 blocks of its head, T / 128 times on average, half as often where a block
 * of the forward pass owns 128 rows: from the second-level cache, as bfloat16. */

/* What tiles of the tensor-core version are read from is rounded once, in pairs, k with v and q with dy: to (B, heads,
 * 2, gai_flash_padded(rows), width), so that a tile is one piece of memory, without an edge. Rows and columns that do
 * not exist are zero. */
static __host__ __device__ __forceinline__ int gai_flash_padded(int rows) {
    return (rows + 127) / 128 * 128;
}

/* Sizes of a launch of attention. */
struct gai_attention {
    int T, S, HQ, HK, D;
    float scale; /* 1 / sqrt(D) */
};

/* Where the rows of one head of one sequence start, and how far apart they are. */
struct gai_head {
    size_t q, kv, row, q_stride, kv_stride; /* row: of lse and delta */
    size_t q_tiles, kv_tiles;               /* first rows of what gai_k_flash_round leaves */
};

static __device__ __forceinline__ gai_head gai_head_at(int b, int h, const gai_attention &n) {
    size_t T = n.T, S = n.S;
    return {(b * T * n.HQ + h) * n.D,
            (b * S * n.HK + h / (n.HQ / n.HK)) * n.D,
            ((size_t)b * n.HQ + h) * T,
            (size_t)n.HQ * n.D,
            (size_t)n.HK * n.D,
            (size_t)(b * n.HQ + h) * 2 * gai_flash_padded(n.T),
            (size_t)(b * n.HK + h / (n.HQ / n.HK)) * 2 * gai_flash_padded(n.S)};
}

/* How many keys the last of the queries [i0, i0 + rows) sees. */
static __device__ __forceinline__ int gai_keys_seen(int i0, int rows, const gai_attention &n) {
    int keys = n.S - n.T + i0 + rows;
    return keys < n.S ? keys : n.S;
}

/* ---- on tensor cores --------------------------------------------------------------------------------------------- */

enum { GAI_FLASH_ROWS = 64, GAI_FLASH_THREADS = 128 }; /* 16 rows for each of four warps */

/* Below compute capability 8.0 the kernels are empty, and never launched. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
enum { GAI_HAS_MMA = 0 };
#else
enum { GAI_HAS_MMA = 1 };
#endif

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
/* 16 bytes from global to shared memory, on their way until this thread waits for its copies; other threads see them
 * after a barrier behind that. */
static __device__ __forceinline__ void gai_copy_async(__nv_bfloat16 *to, const __nv_bfloat16 *from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from)
                 : "memory");
#else
    __trap();
#endif
}
static __device__ __forceinline__ void gai_copies_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    __trap();
#endif
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

/* Two values rounded to bfloat16; the first in the lower half. */
static __device__ __forceinline__ uint32_t gai_pack_bf16(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &two, sizeof bits);
    return bits;
}

/* Keys of a step of the forward pass: fewer where accumulators leave no registers. */
template <int D, int M>
constexpr int gai_flash_keys = D <= 64 && M == 1 ? 64 : 32;
enum { GAI_FLASH_STEP = 32 }; /* in the backward pass */

/* Rounds a or b, by blockIdx.y, (B, rows, H, D); `packs` of four values each. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_flash_round(__nv_bfloat16 *to, const float *a, const float *b, size_t packs, int rows, int H, int D,
                      int width) {
    size_t at = gai_index<1>();
    if (at >= packs) return;
    int column = (int)(at % (width / 4)) * 4, padded = gai_flash_padded(rows);
    size_t line = at / (width / 4), row = line % padded, head = line / padded;
    const float *from = blockIdx.y == 0 ? a : b;
    gai_pack<4> x = {};
    if (row < (size_t)rows && column < D) x = gai_load<4>(from + ((head / H * rows + row) * H + head % H) * D + column);
    gai_store<4>(to + ((head * 2 + blockIdx.y) * padded + row) * width + column, x);
}

/* A tile (ROWS, D) on its way to shared memory, while others are computed with. A row there takes an odd number of
 * 16-byte units: the eight rows that ldmatrix reads at a time then lie in different banks. */
template <int ROWS, int D>
static __device__ __forceinline__ void gai_flash_fetch(__nv_bfloat16 *to, const __nv_bfloat16 *from) {
    constexpr int STEP = GAI_FLASH_THREADS * 8 / D; /* rows at a time */
    int row = threadIdx.x / (D / 8), column = threadIdx.x % (D / 8) * 8;
    to += row * (D + 8) + column, from += row * D + column;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) gai_copy_async(to + i * STEP * (D + 8), from + i * STEP * D);
}

/* The same from float32, at once. */
template <int ROWS, int D>
static __device__ __forceinline__ void gai_flash_load(__nv_bfloat16 *to, const float *from, size_t stride, int rows,
                                                      int columns) {
    constexpr int STEP = GAI_FLASH_THREADS * 4 / D;
    int row = threadIdx.x / (D / 4), column = threadIdx.x % (D / 4) * 4;
    from += row * stride + column;
#pragma unroll 8
    for (; row < ROWS; row += STEP, from += STEP * stride) {
        gai_pack<4> x = {};
        if (row < rows && column < columns) x = gai_load<4>(from);
        gai_store<4>(to + row * (D + 8) + column, x);
    }
}

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

/* M of them, one below the other. */
template <int STRIDE, int M>
static __device__ __forceinline__ void gai_flash_operands(uint32_t (&a)[M][4], const __nv_bfloat16 *tile) {
#pragma unroll
    for (int m = 0; m < M; m++) gai_flash_operand<STRIDE>(a[m], tile + m * 16 * STRIDE);
}

/* c (16 M, 8 N) += a (16 M, 16) b^T with b (8 N, 16) at the upper left of a tile: what is read of b serves M
 * products. */
template <int STRIDE, int M, int N>
static __device__ __forceinline__ void gai_flash_rows(float (&c)[M][N][4], const uint32_t (&a)[M][4],
                                                      const __nv_bfloat16 *b) {
    int lane = threadIdx.x & 31;
    b += ((lane & 7) + (lane >> 4) * 8) * STRIDE + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t pair[4];
        gai_ldmatrix(pair, b + n * 8 * STRIDE);
#pragma unroll
        for (int m = 0; m < M; m++) {
            gai_mma_m16n8k16(c[m][n], a[m], {pair[0], pair[1]});
            gai_mma_m16n8k16(c[m][n + 1], a[m], {pair[2], pair[3]});
        }
    }
}

/* c (16 M, 8 N) += a (16 M, 16) b with b (16, 8 N) at the upper left of a tile. */
template <int STRIDE, int M, int N>
static __device__ __forceinline__ void gai_flash_columns(float (&c)[M][N][4], const uint32_t (&a)[M][4],
                                                         const __nv_bfloat16 *b) {
    int lane = threadIdx.x & 31;
    b += (lane & 15) * STRIDE + (lane >> 4) * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t pair[4];
        gai_ldmatrix_transposed(pair, b + n * 8);
#pragma unroll
        for (int m = 0; m < M; m++) {
            gai_mma_m16n8k16(c[m][n], a[m], {pair[0], pair[1]});
            gai_mma_m16n8k16(c[m][n + 1], a[m], {pair[2], pair[3]});
        }
    }
}

/* c (16, 8 N) = a b^T over D columns: a the 16 rows of this warp, b (8 N, D). */
template <int D, int N>
static __device__ __forceinline__ void gai_flash_scores(float (&c)[1][N][4], const __nv_bfloat16 *a,
                                                        const __nv_bfloat16 *b) {
    constexpr int STRIDE = D + 8;
#pragma unroll
    for (int n = 0; n < N; n++) c[0][n][0] = c[0][n][1] = c[0][n][2] = c[0][n][3] = 0;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        uint32_t part[1][4];
        gai_flash_operands<STRIDE>(part, a + d);
        gai_flash_rows<STRIDE>(c, part, b + d);
    }
}

/* Writes upper * c, or lower * c in rows 8 to 15, to 16 rows, where rows and columns exist. */
template <int N>
static __device__ __forceinline__ void gai_flash_write(float *to, size_t stride, int first, int rows, int columns,
                                                       const float (&c)[N][4], float upper, float lower) {
    int lane = threadIdx.x & 31, row = first + lane / 4, column = lane % 4 * 2;
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

/* Scores of one tile to exp(s - top), with what has been summed before scaled to the new top. Powers of two, so that
 * the factor of exp2 and of 1 / sqrt(D) is one. top, sum: of the rows g and g + 8; sum is this lane's part of it. */
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

/* Scores of keys that lie after their query become -infinity. first: key of column 0 less query of row 0 of this
 * warp. */
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

/* See ga_sdpa_forward. One block for 64 M queries of a head, 16 M for each warp; those with the most keys start first.
 * kv: k and v as gai_k_flash_round leaves them. While a block computes with one stage of keys, the next is on its
 * way. */
template <int D, int M>
static __global__ void __launch_bounds__(GAI_FLASH_THREADS, 2)
    gai_k_flash_forward(float *y, float *lse, const float *q, const __nv_bfloat16 *kv, const float *sink, int heads,
                        gai_attention n) {
    if (!GAI_HAS_MMA) return;
    constexpr int ROWS = GAI_FLASH_ROWS * M, KEYS = gai_flash_keys<D, M>, STRIDE = D + 8, TILE = KEYS * STRIDE;
    GAI_DYNAMIC_SHARED(__nv_bfloat16, stages); /* two of k and v */
    __nv_bfloat16 *q_tile = stages + 2 * TILE; /* where the second will be, until it is in registers */
    int lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * 16 * M, h = blockIdx.x % heads % n.HQ;
    int i0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * ROWS, first_sees = n.S - n.T + i0 + warp_row;
    int keys = gai_keys_seen(i0, ROWS, n);
    gai_head at = gai_head_at(blockIdx.x % heads / n.HQ, h, n);
    kv += at.kv_tiles * D;
    auto fetch = [&](int j0, __nv_bfloat16 *stage) {
        gai_flash_fetch<KEYS, D>(stage, kv + (size_t)j0 * D);
        gai_flash_fetch<KEYS, D>(stage + TILE, kv + (size_t)(gai_flash_padded(n.S) + j0) * D);
    };

    fetch(0, stages);
    gai_flash_load<ROWS, D>(q_tile, q + at.q + i0 * at.q_stride, at.q_stride, n.T - i0, n.D);
    __syncthreads(); /* q_tile is whole */
    uint32_t q_part[D / 16][M][4];
#pragma unroll
    for (int d = 0; d < D / 16; d++) gai_flash_operands<STRIDE>(q_part[d], q_tile + warp_row * STRIDE + d * 16);

    float sum_y[M][D / 8][4] = {}, top[M][2], sum[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
        top[m][0] = top[m][1] = sink ? sink[h] * GAI_LOG2E : -INFINITY;
        sum[m][0] = sum[m][1] = sink && lane % 4 == 0;
    }
    for (int j0 = 0, odd = 0; j0 < keys; j0 += KEYS, odd ^= 1) {
        const __nv_bfloat16 *k_tile = stages + odd * 2 * TILE, *v_tile = k_tile + TILE;
        gai_copies_wait();
        __syncthreads(); /* this stage is whole, the other is read */
        if (j0 + KEYS < keys) fetch(j0 + KEYS, stages + (odd ^ 1) * 2 * TILE);
        if (j0 > first_sees + 16 * M - 1) continue; /* no row of this warp sees them */
        float s[M][KEYS / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; d++) gai_flash_rows<STRIDE>(s, q_part[d], k_tile + d * 16);
#pragma unroll
        for (int m = 0; m < M; m++) {
            gai_flash_mask(s[m], j0 - first_sees - 16 * m);
            gai_flash_softmax(s[m], sum_y[m], top[m], sum[m], n.scale * GAI_LOG2E);
        }
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            uint32_t p[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) gai_flash_operand(p[m], s[m][2 * j], s[m][2 * j + 1]);
            gai_flash_columns<STRIDE>(sum_y, p, v_tile + j * 16 * STRIDE);
        }
    }

    y += at.q + i0 * at.q_stride, lse += at.row;
#pragma unroll
    for (int m = 0; m < M; m++) {
        float all[2] = {gai_row_sum(sum[m][0]), gai_row_sum(sum[m][1])};
        gai_flash_write(y, at.q_stride, warp_row + 16 * m, n.T - i0, n.D, sum_y[m], 1 / all[0], 1 / all[1]);
#pragma unroll
        for (int side = 0; side < 2; side++) {
            int i = i0 + warp_row + 16 * m + lane / 4 + 8 * side;
            if (lane % 4 == 0 && i < n.T) lse[i] = (top[m][side] + log2f(all[side])) * GAI_LN2;
        }
    }
}

/* dq of ga_sdpa_backward; delta_i = dy_i . y_i. One block for 64 queries of a head. q_dy, kv: as gai_k_flash_round
 * leaves them. */
template <int D>
static __global__ void __launch_bounds__(GAI_FLASH_THREADS, 2)
    gai_k_flash_backward_q(float *dq, const float *lse, const float *delta, const __nv_bfloat16 *q_dy,
                           const __nv_bfloat16 *kv, int heads, gai_attention n) {
    if (!GAI_HAS_MMA) return;
    constexpr int KEYS = GAI_FLASH_STEP, STRIDE = D + 8, TILE = KEYS * STRIDE;
    GAI_DYNAMIC_SHARED(__nv_bfloat16, q_tile);
    __nv_bfloat16 *dy_tile = q_tile + GAI_FLASH_ROWS * STRIDE, *stages = dy_tile + GAI_FLASH_ROWS * STRIDE;
    int lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * 16;
    int i0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * GAI_FLASH_ROWS, first_sees = n.S - n.T + i0 + warp_row;
    int keys = gai_keys_seen(i0, GAI_FLASH_ROWS, n);
    gai_head at = gai_head_at(blockIdx.x % heads / n.HQ, blockIdx.x % heads % n.HQ, n);
    kv += at.kv_tiles * D;
    auto fetch = [&](int j0, __nv_bfloat16 *stage) {
        gai_flash_fetch<KEYS, D>(stage, kv + (size_t)j0 * D);
        gai_flash_fetch<KEYS, D>(stage + TILE, kv + (size_t)(gai_flash_padded(n.S) + j0) * D);
    };

    q_dy += (at.q_tiles + i0) * D;
    gai_flash_fetch<GAI_FLASH_ROWS, D>(q_tile, q_dy);
    gai_flash_fetch<GAI_FLASH_ROWS, D>(dy_tile, q_dy + (size_t)gai_flash_padded(n.T) * D);
    fetch(0, stages);
    float log_sum[2], row_delta[2];
    for (int side = 0; side < 2; side++) {
        int i = i0 + warp_row + lane / 4 + 8 * side;
        log_sum[side] = i < n.T ? lse[at.row + i] * GAI_LOG2E : INFINITY; /* P = 0 */
        row_delta[side] = i < n.T ? delta[at.row + i] : 0;
    }

    float sum_dq[1][D / 8][4] = {};
    for (int j0 = 0, odd = 0; j0 < keys; j0 += KEYS, odd ^= 1) {
        const __nv_bfloat16 *k_tile = stages + odd * 2 * TILE, *v_tile = k_tile + TILE;
        gai_copies_wait();
        __syncthreads(); /* this stage, q_tile and dy_tile are whole, the other stage is read */
        if (j0 + KEYS < keys) fetch(j0 + KEYS, stages + (odd ^ 1) * 2 * TILE);
        if (j0 > first_sees + 15) continue;
        float s[1][KEYS / 8][4], ds[1][KEYS / 8][4];
        gai_flash_scores<D>(s, q_tile + warp_row * STRIDE, k_tile);
        gai_flash_mask(s[0], j0 - first_sees);
        gai_flash_scores<D>(ds, dy_tile + warp_row * STRIDE, v_tile);
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                ds[0][j][i] =
                    gai_exp2(s[0][j][i] * (n.scale * GAI_LOG2E) - log_sum[i >> 1]) * (ds[0][j][i] - row_delta[i >> 1]);
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            uint32_t part[1][4];
            gai_flash_operand(part[0], ds[0][2 * j], ds[0][2 * j + 1]);
            gai_flash_columns<STRIDE>(sum_dq, part, k_tile + j * 16 * STRIDE);
        }
    }
    dq += at.q + i0 * at.q_stride;
    gai_flash_write(dq, at.q_stride, warp_row, n.T - i0, n.D, sum_dq[0], n.scale, n.scale);
}

/* dk and dv of ga_sdpa_backward, (B, T, HQ / group, D): sums over `group` query heads. One block for 64 keys. */
template <int D>
static __global__ void __launch_bounds__(GAI_FLASH_THREADS, 2)
    gai_k_flash_backward_kv(float *dk, float *dv, const float *lse, const float *delta, const __nv_bfloat16 *q_dy,
                            const __nv_bfloat16 *kv, int heads, int group, gai_attention n) {
    if (!GAI_HAS_MMA) return;
    constexpr int QUERIES = GAI_FLASH_STEP, STRIDE = D + 8, TILE = QUERIES * STRIDE;
    GAI_DYNAMIC_SHARED(__nv_bfloat16, k_tile);
    GAI_SHARED(float, of_rows, [2][2 * QUERIES]); /* lse, delta */
    __nv_bfloat16 *v_tile = k_tile + GAI_FLASH_ROWS * STRIDE, *stages = v_tile + GAI_FLASH_ROWS * STRIDE;
    int lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * 16, owners = n.HQ / group;
    int b = blockIdx.x % heads / owners, owner = blockIdx.x % heads % owners;
    int j0 = (int)(blockIdx.x / heads) * GAI_FLASH_ROWS, steps = (n.T - j0 + QUERIES - 1) / QUERIES;
    int turns = group * steps;
    gai_head at = gai_head_at(b, owner * group, n);
    q_dy += at.q_tiles * D, kv += (at.kv_tiles + j0) * D;

    /* A turn is 32 queries of one head; all turns of a head, then those of the next. */
    auto fetch = [&](int turn, __nv_bfloat16 *stage) {
        size_t padded = gai_flash_padded(n.T), row = turn / steps * 2 * padded + j0 + turn % steps * QUERIES;
        gai_flash_fetch<QUERIES, D>(stage, q_dy + row * D);
        gai_flash_fetch<QUERIES, D>(stage + TILE, q_dy + (row + padded) * D);
    };
    /* Of queries that do not exist P is 0. */
    auto rows_of_turn = [&](int turn) {
        int i = j0 + turn % steps * QUERIES + threadIdx.x % QUERIES;
        bool is_lse = threadIdx.x < QUERIES;
        if (i >= n.T) return is_lse ? INFINITY : 0.f;
        float x = (is_lse ? lse : delta)[at.row + (size_t)(turn / steps) * n.T + i];
        return is_lse ? x * GAI_LOG2E : x;
    };
    gai_flash_fetch<GAI_FLASH_ROWS, D>(k_tile, kv);
    gai_flash_fetch<GAI_FLASH_ROWS, D>(v_tile, kv + (size_t)gai_flash_padded(n.S) * D);
    fetch(0, stages);
    if (threadIdx.x < 2 * QUERIES) of_rows[0][threadIdx.x] = rows_of_turn(0);

    float sum_dk[1][D / 8][4] = {}, sum_dv[1][D / 8][4] = {};
    for (int turn = 0; turn < turns; turn++) {
        const __nv_bfloat16 *q_tile = stages + turn % 2 * 2 * TILE, *dy_tile = q_tile + TILE;
        const float *of_row = of_rows[turn % 2];
        bool more = turn + 1 < turns && threadIdx.x < 2 * QUERIES;
        int i0 = j0 + turn % steps * QUERIES;
        gai_copies_wait();
        __syncthreads(); /* this stage, k_tile and v_tile are whole, the other stage is read */
        if (turn + 1 < turns) fetch(turn + 1, stages + (turn + 1) % 2 * 2 * TILE);
        float next_rows = more ? rows_of_turn(turn + 1) : 0;
        if (j0 + warp_row < i0 + QUERIES) { /* else no query sees a key of this warp */
            float p[1][QUERIES / 8][4], ds[1][QUERIES / 8][4];
            gai_flash_scores<D>(p, k_tile + warp_row * STRIDE, q_tile);
            gai_flash_scores<D>(ds, v_tile + warp_row * STRIDE, dy_tile);
#pragma unroll
            for (int i = 0; i < QUERIES / 16; i++) {
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    float &p_at = p[0][2 * i + e / 4][e % 4], &ds_at = ds[0][2 * i + e / 4][e % 4];
                    int query = 16 * i + e / 4 * 8 + lane % 4 * 2 + e % 2, key = warp_row + lane / 4 + e % 4 / 2 * 8;
                    bool visible = j0 + key <= i0 + query;
                    p_at = visible ? gai_exp2(p_at * (n.scale * GAI_LOG2E) - of_row[query]) : 0;
                    ds_at = p_at * (ds_at - of_row[QUERIES + query]);
                }
                uint32_t part[1][4];
                gai_flash_operand(part[0], p[0][2 * i], p[0][2 * i + 1]);
                gai_flash_columns<STRIDE>(sum_dv, part, dy_tile + i * 16 * STRIDE);
                gai_flash_operand(part[0], ds[0][2 * i], ds[0][2 * i + 1]);
                gai_flash_columns<STRIDE>(sum_dk, part, q_tile + i * 16 * STRIDE);
            }
        }
        if (more) of_rows[(turn + 1) % 2][threadIdx.x] = next_rows;
    }
    size_t stride = (size_t)owners * n.D, to = ((size_t)b * n.T + j0) * stride + owner * n.D;
    gai_flash_write(dk + to, stride, warp_row, n.T - j0, n.D, sum_dk[0], n.scale, n.scale);
    gai_flash_write(dv + to, stride, warp_row, n.T - j0, n.D, sum_dv[0], 1, 1);
}

/* ---- in float32 -------------------------------------------------------------------------------------------------- */

enum { GAI_PLAIN_THREADS = 256, GAI_PLAIN_PITCH = 68 }; /* 16 x 16 threads, each with 4 x 4 values of a 64 x 64 tile */

typedef float gai_plain_tile[64][GAI_PLAIN_PITCH]; /* rows are aligned to 16 bytes */

/* c (64, 64) += a^T b with a, b (depth, 64) in shared memory. */
static __device__ __forceinline__ void gai_plain_multiply(float (&c)[4][4], const float (*a)[GAI_PLAIN_PITCH],
                                                          const float (*b)[GAI_PLAIN_PITCH], int depth) {
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll 4
    for (int k = 0; k < depth; k++) {
        float4 x = *(const float4 *)&a[k][row], z = *(const float4 *)&b[k][column];
        const float left[4] = {x.x, x.y, x.z, x.w}, right[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) c[i][j] += left[i] * right[j];
    }
}

/* Columns [d, d + 32) of 64 rows, transposed; what does not exist is zero. A warp takes 4 rows of 8 columns: whole
 * sectors, and 32 banks. */
static __device__ void gai_plain_read_transposed(float (*to)[GAI_PLAIN_PITCH], const float *from, size_t stride,
                                                 int rows, int d, int D) {
    int column = threadIdx.x / 32 % 4 * 8 + threadIdx.x % 8, row = threadIdx.x / 128 * 4 + threadIdx.x / 8 % 4;
    from += row * stride + d + column;
    if (d + column >= D) rows = 0;
#pragma unroll 8
    for (; row < 64; row += 8, from += 8 * stride) to[column][row] = row < rows ? *from : 0;
}

/* c (64, 64) = a b^T over D columns; a, b (64, D) in global memory. */
static __device__ void gai_plain_scores(float (&c)[4][4], gai_plain_tile &buffer, const float *a, size_t a_stride,
                                        int a_rows, const float *b, size_t b_stride, int b_rows, int D) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) c[i][j] = 0;
    for (int d = 0; d < D; d += 32) {
        __syncthreads(); /* buffer is read */
        gai_plain_read_transposed(buffer, a, a_stride, a_rows, d, D);
        gai_plain_read_transposed(buffer + 32, b, b_stride, b_rows, d, D);
        __syncthreads(); /* both parts of buffer are whole */
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
        __syncthreads(); /* p is whole, buffer is read */
        for (int at = threadIdx.x; at < 64 * 64; at += GAI_PLAIN_THREADS) {
            int row = at / 64, column = at % 64, d = chunk * 64 + column;
            buffer[row][column] = row < rows && d < D ? b[row * stride + d] : 0;
        }
        __syncthreads(); /* buffer is whole */
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
    bool aligned = ((uintptr_t)to | stride * sizeof *to) % 16 == 0;
    to += row * stride + column, rows -= row, D -= column;
#pragma unroll
    for (int i = 0; i < 4 && i < rows; i++, to += stride)
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const float(&x)[4] = c[chunk][i], f = factor[i];
            if (aligned && chunk * 64 + 4 <= D)
                *(float4 *)(to + chunk * 64) = make_float4(x[0] * f, x[1] * f, x[2] * f, x[3] * f);
            else
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (chunk * 64 + j < D) to[chunk * 64 + j] = x[j] * f;
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
static __global__ void __launch_bounds__(GAI_PLAIN_THREADS, CHUNKS == 1 ? 2 : 1)
    gai_k_plain_forward(float *y, float *lse, const float *q, const float *k, const float *v, const float *sink,
                        int heads, gai_attention n) {
    GAI_SHARED(float4, p_space, [64 * GAI_PLAIN_PITCH / 4]);
    GAI_SHARED(float4, buffer_space, [64 * GAI_PLAIN_PITCH / 4]);
    gai_plain_tile &p = *(gai_plain_tile *)p_space, &buffer = *(gai_plain_tile *)buffer_space;
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4, h = blockIdx.x % heads % n.HQ;
    int i0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * 64, offset = n.S - n.T;
    int keys = gai_keys_seen(i0, 64, n);
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
static __global__ void __launch_bounds__(GAI_PLAIN_THREADS, CHUNKS == 1 ? 2 : 1)
    gai_k_plain_backward_q(float *dq, const float *dy, const float *lse, const float *delta, const float *q,
                           const float *k, const float *v, int heads, gai_attention n) {
    GAI_SHARED(float4, ds_space, [64 * GAI_PLAIN_PITCH / 4]);
    GAI_SHARED(float4, buffer_space, [64 * GAI_PLAIN_PITCH / 4]);
    gai_plain_tile &ds_tile = *(gai_plain_tile *)ds_space, &buffer = *(gai_plain_tile *)buffer_space;
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
    int i0 = (int)(gridDim.x / heads - 1 - blockIdx.x / heads) * 64, offset = n.S - n.T;
    int keys = gai_keys_seen(i0, 64, n);
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
static __global__ void __launch_bounds__(GAI_PLAIN_THREADS, CHUNKS == 1 ? 2 : 1)
    gai_k_plain_backward_kv(float *dk, float *dv, const float *dy, const float *lse, const float *delta, const float *q,
                            const float *k, const float *v, int heads, int group, gai_attention n) {
    GAI_SHARED(float4, p_space, [64 * GAI_PLAIN_PITCH / 4]);
    GAI_SHARED(float4, buffer_space, [64 * GAI_PLAIN_PITCH / 4]);
    gai_plain_tile &p_tile = *(gai_plain_tile *)p_space, &buffer = *(gai_plain_tile *)buffer_space;
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4, owners = n.HQ / group;
    int b = blockIdx.x % heads / owners, owner = blockIdx.x % heads % owners, j0 = (int)(blockIdx.x / heads) * 64;
    gai_head at = gai_head_at(b, owner * group, n);
    k += at.kv + j0 * at.kv_stride, v += at.kv + j0 * at.kv_stride;
    q += at.q, dy += at.q, lse += at.row, delta += at.row;

    float sum_dk[CHUNKS][4][4] = {}, sum_dv[CHUNKS][4][4] = {}, p[4][4], ds[4][4];
    for (int head = 0; head < group; head++, q += n.D, dy += n.D, lse += n.T, delta += n.T)
        for (int i0 = j0; i0 < n.T; i0 += 64) {
            const float *q0 = q + i0 * at.q_stride, *dy0 = dy + i0 * at.q_stride;
            gai_plain_scores(p, buffer, k, at.kv_stride, n.T - j0, q0, at.q_stride, n.T - i0, n.D);
            gai_plain_scores(ds, buffer, v, at.kv_stride, n.T - j0, dy0, at.q_stride, n.T - i0, n.D);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int query = i0 + column + j;
                float log_sum = query < n.T ? lse[query] : INFINITY, row_delta = query < n.T ? delta[query] : 0;
                for (int i = 0; i < 4; i++) {
                    p[i][j] = j0 + row + i <= query ? expf(p[i][j] * n.scale - log_sum) : 0;
                    ds[i][j] = p[i][j] * (ds[i][j] - row_delta);
                }
            }
            gai_plain_keep(p_tile, p);
            gai_plain_accumulate(sum_dv, p_tile, buffer, dy0, at.q_stride, n.T - i0, n.D);
            __syncthreads(); /* p_tile is read: dS takes its place */
            gai_plain_keep(p_tile, ds);
            gai_plain_accumulate(sum_dk, p_tile, buffer, q0, at.q_stride, n.T - i0, n.D);
        }
    size_t stride = (size_t)owners * n.D, to = ((size_t)b * n.T + j0) * stride + owner * n.D;
    const float scale[4] = {n.scale, n.scale, n.scale, n.scale}, one[4] = {1, 1, 1, 1};
    gai_plain_write(dk + to, stride, n.T - j0, n.D, sum_dk, scale);
    gai_plain_write(dv + to, stride, n.T - j0, n.D, sum_dv, one);
}

/* ---- for both versions ------------------------------------------------------------------------------------------- */

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

/* log P_ij of a head by a warp, for all its lanes; q and k as the forward pass read them, so that P is that of its
 * lse. */
static __device__ __forceinline__ float gai_log_p(const float *qi, const float *kj, float lse, bool bf16,
                                                  const gai_attention &n) {
    float sum = 0;
    for (int d = threadIdx.x % 32; d < n.D; d += 32) sum += gai_round_to(qi[d], bf16) * gai_round_to(kj[d], bf16);
    return gai_warp_sum(sum) * n.scale - lse;
}

/* See ga_sdpa_column. One warp for a row (b, h, i). */
static __global__ void __launch_bounds__(128)
    gai_k_attention_column(float *p, const float *q, const float *k, const float *lse, int j, size_t rows, bool bf16,
                           gai_attention n) {
    size_t row = blockIdx.x * (size_t)4 + threadIdx.x / 32, bh = row / n.T;
    int i = (int)(row % n.T);
    if (row >= rows) return; /* the whole warp */
    gai_head at = gai_head_at((int)(bh / n.HQ), (int)(bh % n.HQ), n);
    float log_p = gai_log_p(q + at.q + i * at.q_stride, k + at.kv + j * at.kv_stride, lse[row], bf16, n);
    if (threadIdx.x % 32 == 0) p[row] = j <= n.S - n.T + i ? expf(log_p) : 0;
}

/* ---- by cuDNN, where it was compiled in -------------------------------------------------------------------------- */

#ifdef GA_CUDNN
namespace gai_fe = cudnn_frontend;

/* Attention of one shape, planned when a model is made: that takes cuDNN up to seconds, so no pass does it. Training,
 * evaluation and analysis in whole batches then run on the plan; other shapes, keys of a cache and sinks on the kernels
 * above. q, k, v, y and their gradients become bfloat16 on their way in and float32 on their way out; lse is float32 on
 * both. The backward pass is asked for with sums in a fixed order. */
struct gai_cudnn_plan {
    ga_shape n;
    bool backward, refused;
    gai_fe::graph::Graph graph;
    int64_t workspace;
};

struct gai_cudnn {
    cudnnHandle_t handle;
    std::vector<std::unique_ptr<gai_cudnn_plan>> plans;
};

/* The names of the tensors in a plan. */
enum { GAI_Q = 1, GAI_K, GAI_V, GAI_Y, GAI_LSE, GAI_DY, GAI_DQ, GAI_DK, GAI_DV };

typedef std::vector<int64_t> gai_cudnn_sizes;

/* Of (B, T, H, D) as we have it, in cuDNN's order (B, H, T, D). */
static gai_cudnn_sizes gai_cudnn_dim(const ga_shape &n, size_t H) {
    return {(int64_t)n.B, (int64_t)H, (int64_t)n.T, (int64_t)n.D};
}
static gai_cudnn_sizes gai_cudnn_stride(const ga_shape &n, size_t H) {
    return {(int64_t)(n.T * H * n.D), (int64_t)n.D, (int64_t)(H * n.D), 1};
}

/* lse (B, HQ, T), to cuDNN (B, HQ, T, 1) */
static void gai_cudnn_lse(gai_fe::graph::Tensor_attributes &lse, const ga_shape &n) {
    int64_t T = (int64_t)n.T, HQ = (int64_t)n.HQ;
    lse.set_uid(GAI_LSE).set_data_type(gai_fe::DataType_t::FLOAT);
    lse.set_dim({(int64_t)n.B, HQ, T, 1}).set_stride({HQ * T, T, 1, 1});
}

static std::shared_ptr<gai_fe::graph::Tensor_attributes> gai_cudnn_input(gai_fe::graph::Graph &g, int64_t uid,
                                                                         const ga_shape &n, size_t H) {
    gai_fe::graph::Tensor_attributes tensor;
    tensor.set_uid(uid).set_dim(gai_cudnn_dim(n, H)).set_stride(gai_cudnn_stride(n, H));
    return g.tensor(tensor);
}

static void gai_cudnn_output(gai_fe::graph::Tensor_attributes &tensor, int64_t uid, const ga_shape &n, size_t H) {
    tensor.set_output(true).set_uid(uid).set_dim(gai_cudnn_dim(n, H)).set_stride(gai_cudnn_stride(n, H));
}

/* Causal, scaled by 1 / sqrt(D). */
template <class OPTIONS>
static OPTIONS gai_cudnn_options(const ga_shape &n) {
    OPTIONS options;
    options.set_name("attention").set_attn_scale(1 / sqrtf((float)n.D));
    options.set_diagonal_alignment(gai_fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
    return options;
}

static void gai_cudnn_describe(gai_fe::graph::Graph &g, const ga_shape &n, bool backward) {
    g.set_io_data_type(gai_fe::DataType_t::BFLOAT16);
    g.set_intermediate_data_type(gai_fe::DataType_t::FLOAT).set_compute_data_type(gai_fe::DataType_t::FLOAT);
    auto q = gai_cudnn_input(g, GAI_Q, n, n.HQ), k = gai_cudnn_input(g, GAI_K, n, n.HK),
         v = gai_cudnn_input(g, GAI_V, n, n.HK);
    if (!backward) {
        auto options = gai_cudnn_options<gai_fe::graph::SDPA_attributes>(n);
        auto [y, lse] = g.sdpa(q, k, v, options.set_generate_stats(true));
        gai_cudnn_output(*y, GAI_Y, n, n.HQ);
        gai_cudnn_lse(lse->set_output(true), n);
        return;
    }
    gai_fe::graph::Tensor_attributes lse;
    gai_cudnn_lse(lse, n);
    auto options = gai_cudnn_options<gai_fe::graph::SDPA_backward_attributes>(n);
    auto y = gai_cudnn_input(g, GAI_Y, n, n.HQ), dy = gai_cudnn_input(g, GAI_DY, n, n.HQ);
    auto [dq, dk, dv] = g.sdpa_backward(q, k, v, y, dy, g.tensor(lse), options.set_deterministic_algorithm(true));
    gai_cudnn_output(*dq, GAI_DQ, n, n.HQ);
    gai_cudnn_output(*dk, GAI_DK, n, n.HK);
    gai_cudnn_output(*dv, GAI_DV, n, n.HK);
}

static gai_cudnn_plan *gai_cudnn_find(const gai_cuda *d, const ga_shape &n, bool backward) {
    if (!d->cudnn) return NULL;
    for (auto &plan : d->cudnn->plans)
        if (plan->backward == backward && memcmp(&plan->n, &n, sizeof n) == 0) return plan.get();
    return NULL;
}

/* Bytes of scratch: its operands in bfloat16, and cuDNN's workspace. */
static size_t gai_cudnn_bytes(const gai_cudnn_plan &p) {
    size_t rows = p.n.B * p.n.T, queries = gai_cuda_half_bytes(rows * p.n.HQ * p.n.D),
           keys = gai_cuda_half_bytes(rows * p.n.HK * p.n.D);
    return (p.backward ? 4 * queries + 4 * keys : 2 * queries + 2 * keys) + (size_t)p.workspace;
}

/* Says in the device's name, once, whose attention it is. */
static void gai_cudnn_tell(gai_cuda *d, gai_fe::error_t e) {
    size_t n = strlen(d->name);
    if (strstr(d->name, " attention")) return;
    if (e.is_good())
        snprintf(d->name + n, sizeof d->name - n, ", cuDNN's attention");
    else
        snprintf(d->name + n, sizeof d->name - n, ", own attention (cuDNN: %.120s)", e.get_message().c_str());
}

/* Plans a shape, if it is new and cuDNN takes it. Returns the scratch that it needs: 0 where the kernels above
 * serve. */
static size_t gai_cudnn_prepare(gai_cuda *d, const ga_shape &n, bool backward) {
    if (!d->cudnn || !d->bf16 || n.D > 128 || n.D % 8 != 0) return 0;
    gai_cudnn_plan *plan = gai_cudnn_find(d, n, backward);
    if (!plan) {
        plan = new gai_cudnn_plan();
        d->cudnn->plans.emplace_back(plan);
        plan->n = n, plan->backward = backward;
        gai_cudnn_describe(plan->graph, n, backward);
        gai_fe::error_t e = plan->graph.build(d->cudnn->handle, {gai_fe::HeurMode_t::A});
        plan->refused = e.is_bad() || (e = plan->graph.get_workspace_size(plan->workspace)).is_bad();
        gai_cudnn_tell(d, e);
    }
    return plan->refused ? 0 : gai_cudnn_bytes(*plan);
}

/* What a configuration will run, so that its passes find it. */
static size_t gai_cudnn_prepare_for(gai_cuda *d, const ga_config *c, ga_mode mode) {
    ga_sizes z = ga_sizes_of(c);
    ga_shape n = {c->batch_size, c->max_seq_len, c->max_seq_len, z.HQ, z.HK, z.D};
    if (c->attention_sink != GA_SINK_NONE) return 0;
    size_t forward = gai_cudnn_prepare(d, n, false), backward = mode == GA_TRAINING ? gai_cudnn_prepare(d, n, true) : 0;
    return gai_cuda_max(forward, backward);
}

/* The plan of a pass, or NULL. */
static gai_cudnn_plan *gai_cudnn_plan_of(const gai_cuda *d, const ga_shape &n, const float *sink, bool backward) {
    gai_cudnn_plan *plan = sink ? NULL : gai_cudnn_find(d, n, backward);
    return plan && !plan->refused ? plan : NULL;
}

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS) gai_k_from_bf16(float *y, const __nv_bfloat16 *x, size_t n) {
    size_t i = gai_index<VEC>();
    if (i >= n) return;
    gai_pack<VEC> pack;
    GAI_EACH(j) pack.v[j] = __bfloat162float(x[i + j]);
    gai_store<VEC>(y + i, pack);
}

static void gai_cuda_from_bf16(gai_cuda *d, float *y, const void *x, size_t n) {
    GAI_LAUNCH_ARRAY(d, gai_aligned(gai_bits(y, n)), gai_k_from_bf16, n, y, (const __nv_bfloat16 *)x, n);
}

/* x in bfloat16 at *at, which moves on; room for n values where x is NULL. */
static void *gai_cudnn_operand(gai_cuda *d, const float *x, size_t n, char **at) {
    if (x) return (void *)gai_cuda_operand_of(d, x, n, at).p;
    void *room = *at;
    *at += gai_cuda_half_bytes(n);
    return room;
}

static void gai_cudnn_forward(gai_cuda *d, gai_cudnn_plan *plan, float *y, float *lse, const float *q, const float *k,
                              const float *v) {
    const ga_shape &n = plan->n;
    size_t queries = n.B * n.T * n.HQ * n.D, keys = n.B * n.T * n.HK * n.D;
    char *at = gai_cuda_scratch(d, gai_cudnn_bytes(*plan));
    std::unordered_map<int64_t, void *> pack;
    pack[GAI_Q] = gai_cudnn_operand(d, q, queries, &at), pack[GAI_K] = gai_cudnn_operand(d, k, keys, &at);
    pack[GAI_V] = gai_cudnn_operand(d, v, keys, &at), pack[GAI_Y] = gai_cudnn_operand(d, NULL, queries, &at);
    pack[GAI_LSE] = lse;
    (void)GAI_CUDA(d, plan->graph.execute(d->cudnn->handle, pack, at));
    gai_cuda_from_bf16(d, y, pack[GAI_Y], queries);
}

static void gai_cudnn_backward(gai_cuda *d, gai_cudnn_plan *plan, float *dq, float *dk, float *dv, const float *dy,
                               const float *y, const float *lse, const float *q, const float *k, const float *v) {
    const ga_shape &n = plan->n;
    size_t queries = n.B * n.T * n.HQ * n.D, keys = n.B * n.T * n.HK * n.D;
    char *at = gai_cuda_scratch(d, gai_cudnn_bytes(*plan));
    std::unordered_map<int64_t, void *> pack;
    pack[GAI_Q] = gai_cudnn_operand(d, q, queries, &at), pack[GAI_K] = gai_cudnn_operand(d, k, keys, &at);
    pack[GAI_V] = gai_cudnn_operand(d, v, keys, &at), pack[GAI_Y] = gai_cudnn_operand(d, y, queries, &at);
    pack[GAI_DY] = gai_cudnn_operand(d, dy, queries, &at), pack[GAI_DQ] = gai_cudnn_operand(d, NULL, queries, &at);
    pack[GAI_DK] = gai_cudnn_operand(d, NULL, keys, &at), pack[GAI_DV] = gai_cudnn_operand(d, NULL, keys, &at);
    pack[GAI_LSE] = (void *)lse;
    (void)GAI_CUDA(d, plan->graph.execute(d->cudnn->handle, pack, at));
    gai_cuda_from_bf16(d, dq, pack[GAI_DQ], queries);
    gai_cuda_from_bf16(d, dk, pack[GAI_DK], keys);
    gai_cuda_from_bf16(d, dv, pack[GAI_DV], keys);
}

/* Without a cuDNN that works, attention is our own, and the name says why. */
static void gai_cudnn_open(gai_cuda *d) {
    cudnnHandle_t handle = NULL;
    cudnnStatus_t status = d->bf16 ? cudnnCreate(&handle) : CUDNN_STATUS_SUCCESS;
    if (handle && status == CUDNN_STATUS_SUCCESS) status = cudnnSetStream(handle, d->stream);
    if (status != CUDNN_STATUS_SUCCESS)
        gai_cudnn_tell(d, {gai_fe::error_code_t::CUDNN_BACKEND_API_FAILED, cudnnGetErrorString(status)});
    if (handle && status == CUDNN_STATUS_SUCCESS)
        d->cudnn = new gai_cudnn{handle, {}};
    else if (handle)
        (void)cudnnDestroy(handle);
}

static void gai_cudnn_close(gai_cuda *d) {
    if (!d->cudnn) return;
    d->cudnn->plans.clear();
    (void)cudnnDestroy(d->cudnn->handle);
    delete d->cudnn;
}
#endif

/* ---- the operators ----------------------------------------------------------------------------------------------- */

static gai_attention gai_attention_of(ga_shape n) {
    return {(int)n.T, (int)n.S, (int)n.HQ, (int)n.HK, (int)n.D, 1 / sqrtf((float)n.D)};
}

/* Blocks for tiles of 64 rows of `heads` heads of T rows. */
static unsigned gai_attention_blocks(size_t heads, size_t rows) {
    return (unsigned)(heads * gai_cuda_ceil(rows, 64));
}

/* Whether attention of this shape runs on tensor cores; `addresses` as in gai_aligned. */
static bool gai_takes_flash(const gai_cuda *d, ga_shape n, uintptr_t addresses) {
    return d->bf16 && n.D <= 128 && gai_aligned(addresses | n.D * sizeof(float));
}

/* The version of a kernel for heads of D values: flash, filled up with zeros to a power of two, or plain. */
#define GAI_FLASH_KERNEL(name, D, ...) \
    ((D) <= 32 ? name<32 __VA_ARGS__> : (D) <= 64 ? name<64 __VA_ARGS__> : name<128 __VA_ARGS__>)
#define GAI_PLAIN_KERNEL(name, D) ((D) <= 64 ? name<1> : (D) <= 128 ? name<2> : name<4>)

/* Columns of a tile. */
static size_t gai_flash_width(size_t D) {
    return D <= 32 ? 32 : D <= 64 ? 64 : 128;
}

/* Bytes of shared memory: `rows` rows of tiles. */
static size_t gai_flash_shared(size_t D, size_t rows) {
    return rows * (gai_flash_width(D) + 8) * sizeof(__nv_bfloat16);
}

/* Bytes of two tensors (B, rows, H, D) as tiles are read from them. */
static size_t gai_flash_bytes(size_t B, size_t H, size_t rows, size_t D) {
    return 2 * B * H * (size_t)gai_flash_padded((int)rows) * gai_flash_width(D) * sizeof(__nv_bfloat16);
}

/* Rounds two such tensors. */
static void gai_flash_round(gai_cuda *d, char *to, const float *a, const float *b, size_t B, size_t H, size_t rows,
                            size_t D) {
    size_t packs = gai_flash_bytes(B, H, rows, D) / (2 * 4 * sizeof(__nv_bfloat16));
    GAI_LAUNCH(d, gai_k_flash_round, dim3(gai_blocks(packs, GAI_CUDA_THREADS), 2), GAI_CUDA_THREADS, 0,
               (__nv_bfloat16 *)to, a, b, packs, (int)rows, (int)H, (int)D, (int)gai_flash_width(D));
}

/* More than GAI_CUDA_SHARED has to be asked for. */
static bool gai_allow_shared(gai_cuda *d, const void *kernel, size_t bytes) {
    return bytes <= GAI_CUDA_SHARED ||
           GAI_CUDA(d, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

/* On tensor cores. A block takes 128 queries where its registers have room for them, and that leaves two blocks for
 * each multiprocessor: what it reads of keys and values then serves twice as many products. */
static void gai_flash_forward(gai_cuda *d, float *y, float *lse, const float *q, const float *k, const float *v,
                              const float *sink, ga_shape n) {
    int heads = (int)(n.B * n.HQ);
    unsigned blocks = (unsigned)(heads * gai_cuda_ceil(n.T, 2 * GAI_FLASH_ROWS));
    bool two = n.D <= 64 && blocks >= 2 * (unsigned)d->properties.multiProcessorCount;
    auto flash = GAI_FLASH_KERNEL(gai_k_flash_forward, n.D, , 1);
    if (two) flash = n.D <= 32 ? gai_k_flash_forward<32, 2> : gai_k_flash_forward<64, 2>;
    if (!two) blocks = gai_attention_blocks(heads, n.T);
    size_t keys = two || n.D > 64 ? gai_flash_keys<64, 2> : gai_flash_keys<64, 1>;
    size_t shared = gai_flash_shared(n.D, 2 * keys + gai_cuda_max(2 * keys, two ? 128 : 64));
    char *kv = gai_cuda_scratch(d, gai_flash_bytes(n.B, n.HK, n.S, n.D));
    gai_flash_round(d, kv, k, v, n.B, n.HK, n.S, n.D);
    GAI_LAUNCH(d, flash, blocks, GAI_FLASH_THREADS, shared, y, lse, q, (const __nv_bfloat16 *)kv, sink, heads,
               gai_attention_of(n));
}

static void gai_cuda_sdpa_forward(void *state, float *y, float *lse, const float *q, const float *k, const float *v,
                                  const float *sink, ga_shape n) {
    gai_cuda *d = (gai_cuda *)state;
#ifdef GA_CUDNN
    if (gai_cudnn_plan *plan = gai_cudnn_plan_of(d, n, sink, false)) return gai_cudnn_forward(d, plan, y, lse, q, k, v);
#endif
    if (gai_takes_flash(d, n, gai_bits(y) | gai_bits(q) | gai_bits(k) | gai_bits(v)))
        return gai_flash_forward(d, y, lse, q, k, v, sink, n);
    int heads = (int)(n.B * n.HQ);
    auto plain = GAI_PLAIN_KERNEL(gai_k_plain_forward, n.D);
    GAI_LAUNCH(d, plain, gai_attention_blocks(heads, n.T), GAI_PLAIN_THREADS, 0, y, lse, q, k, v, sink, heads,
               gai_attention_of(n));
}

/* dk and dv are summed over a group of query heads by one block where that leaves work for all multiprocessors, else by
 * one block for each query head, and then over the group from scratch. */
static void gai_cuda_sdpa_backward(void *state, float *dq, float *dk, float *dv, float *dsink, float *scratch,
                                   const float *dy, const float *y, const float *lse, const float *q, const float *k,
                                   const float *v, const float *sink, ga_shape n) {
    gai_cuda *d = (gai_cuda *)state;
#ifdef GA_CUDNN
    if (gai_cudnn_plan *plan = gai_cudnn_plan_of(d, n, sink, true))
        return gai_cudnn_backward(d, plan, dq, dk, dv, dy, y, lse, q, k, v);
#endif
    gai_attention a = gai_attention_of(n);
    size_t rows = n.B * n.T * n.HQ, kv_values = n.B * n.T * n.HK * n.D;
    float *dk_heads = scratch, *dv_heads = dk_heads + rows * n.D, *delta = dv_heads + rows * n.D;
    bool is_flash = gai_takes_flash(d, n,
                                    gai_bits(dq) | gai_bits(dk) | gai_bits(dv) | gai_bits(scratch) | gai_bits(dy) |
                                        gai_bits(q) | gai_bits(k) | gai_bits(v));
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
        size_t bytes = gai_flash_shared(n.D, 2 * GAI_FLASH_ROWS + 4 * GAI_FLASH_STEP);
        size_t of_queries = gai_flash_bytes(n.B, n.HQ, n.T, n.D);
        char *q_dy = gai_cuda_scratch(d, of_queries + gai_flash_bytes(n.B, n.HK, n.T, n.D)), *kv = q_dy + of_queries;
        gai_flash_round(d, q_dy, q, dy, n.B, n.HQ, n.T, n.D);
        gai_flash_round(d, kv, k, v, n.B, n.HK, n.T, n.D);
        if (!gai_allow_shared(d, (const void *)flash_q, bytes) || !gai_allow_shared(d, (const void *)flash_kv, bytes))
            return;
        GAI_LAUNCH(d, flash_q, q_blocks, GAI_FLASH_THREADS, bytes, dq, lse, delta, (const __nv_bfloat16 *)q_dy,
                   (const __nv_bfloat16 *)kv, heads, a);
        GAI_LAUNCH(d, flash_kv, kv_blocks, GAI_FLASH_THREADS, bytes, dk_to, dv_to, lse, delta,
                   (const __nv_bfloat16 *)q_dy, (const __nv_bfloat16 *)kv, owners, group, a);
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
               gai_takes_flash(d, n, gai_bits(q) | gai_bits(k)), gai_attention_of(n));
}

/* ==== end of attention ============================================================================================ */

/* ---- the gate ---------------------------------------------------------------------------------------------------- */

/* sigma of Eq. 5 and its derivative. */
static __device__ __forceinline__ float gai_k_activation(float x, ga_gate_activation activation) {
    float p = gai_k_sigmoid(x);
    return activation == GA_SIGMOID      ? p
           : activation == GA_SILU       ? x * p
           : activation == GA_NS_SIGMOID ? 0.5f + 0.5f * p
                                         : x;
}

static __device__ __forceinline__ float gai_k_derivative(float x, ga_gate_activation activation) {
    float p = gai_k_sigmoid(x);
    return activation == GA_SIGMOID      ? p * (1 - p)
           : activation == GA_SILU       ? p * (1 + x * (1 - p))
           : activation == GA_NS_SIGMOID ? 0.5f * p * (1 - p)
                                         : 1;
}

static __host__ __device__ __forceinline__ bool gai_cuda_elementwise(const ga_gate &g) {
    return g.type == GA_ELEMENTWISE && g.input != GA_INPUT_SCALAR;
}

/* The mean over the heads of the scores of value c: what all heads share. */
template <int VEC>
static __device__ __forceinline__ gai_pack<VEC> gai_shared_score(const float *s, size_t c, const ga_gate &g) {
    gai_pack<VEC> score = {};
    for (size_t h = 0; h < g.H; h++) {
        gai_pack<VEC> x = gai_load<VEC>(s + h * g.D + c);
        GAI_EACH(i) score.v[i] += gai_k_activation(x.v[i], g.activation);
    }
    GAI_EACH(i) score.v[i] /= (float)g.H;
    return score;
}

/* Elementwise: a thread for each pack of a row's values, in all heads when they share their scores. */
template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_gate_elementwise(float *o, __nv_bfloat16 *rounded, const float *y, size_t y_stride, const float *s,
                           size_t s_stride, size_t N, ga_gate g) {
    bool shared = g.sharing == GA_SHARED;
    size_t width = g.H * g.D, items = shared ? g.D : width, heads = shared ? g.H : 1;
    size_t at = gai_index<VEC>(), n = at / items, c = at % items;
    if (n >= N) return;
    gai_pack<VEC> score;
    if (shared)
        score = gai_shared_score<VEC>(s + n * s_stride, c, g);
    else {
        score = gai_load<VEC>(s + n * s_stride + c);
        GAI_EACH(i) score.v[i] = gai_k_activation(score.v[i], g.activation);
    }
    for (size_t h = 0; h < heads; h++, c += g.D) {
        gai_pack<VEC> v = gai_load<VEC>(y + n * y_stride + c);
        GAI_EACH(i) v.v[i] = g.form == GA_MULTIPLICATIVE ? v.v[i] * score.v[i] : v.v[i] + score.v[i];
        gai_store_both<VEC>(o, rounded, n * width + c, v);
    }
}

/* One number for each head of a row, or for all: scores (H) in shared memory, by the whole block. */
static __device__ __forceinline__ void gai_head_scores(float *scores, const float *s, const ga_gate &g) {
    float sum = 0;
    for (size_t h = threadIdx.x; h < g.H; h += blockDim.x) {
        scores[h] = gai_k_activation(s[g.input == GA_INPUT_SCALAR ? 0 : h], g.activation);
        sum += scores[h];
    }
    if (g.sharing == GA_SHARED) {
        sum = gai_block_sum(sum) / (float)g.H;
        for (size_t h = threadIdx.x; h < g.H; h += blockDim.x) scores[h] = sum;
    }
    __syncthreads();
}

/* Headwise and scalar: a block for each row. */
template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_gate_headwise(float *o, __nv_bfloat16 *rounded, const float *y, size_t y_stride, const float *s,
                        size_t s_stride, ga_gate g) {
    GAI_DYNAMIC_SHARED(float, scores);
    size_t n = blockIdx.x, width = g.H * g.D;
    gai_head_scores(scores, s + n * s_stride, g);
    for (size_t c = threadIdx.x * VEC; c < width; c += blockDim.x * VEC) {
        gai_pack<VEC> v = gai_load<VEC>(y + n * y_stride + c);
        float score = scores[c / g.D];
        GAI_EACH(i) v.v[i] = g.form == GA_MULTIPLICATIVE ? v.v[i] * score : v.v[i] + score;
        gai_store_both<VEC>(o, rounded, n * width + c, v);
    }
}

/* Without parameters (Table 3 rows 5 and 6): a warp for each head of each row. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_gate_self(float *o, __nv_bfloat16 *rounded, const float *y, size_t y_stride, size_t N, ga_gate g) {
    size_t head = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= N * g.H) return; /* the whole warp */
    const float *yh = y + head / g.H * y_stride + head % g.H * g.D;
    float sum = 0;
    for (size_t d = threadIdx.x % 32; d < g.D; d += 32) sum += yh[d] * yh[d];
    float r = 1 / sqrtf(gai_warp_sum(sum) / (float)g.D + g.eps);
    for (size_t d = threadIdx.x % 32; d < g.D; d += 32) {
        gai_pack<1> v = {{g.activation == GA_RMSNORM ? yh[d] * r : yh[d] * gai_k_sigmoid(yh[d])}};
        gai_store_both<1>(o, rounded, head * g.D + d, v);
    }
}

static void gai_cuda_gate_forward(void *state, float *o, const float *y, size_t y_stride, const float *s,
                                  size_t s_stride, size_t N, ga_gate g) {
    gai_cuda *d = (gai_cuda *)state;
    size_t items = N * (g.sharing == GA_SHARED ? g.D : g.H * g.D);
    bool four = gai_aligned(gai_bits(o, y, y_stride, g.D));
    __nv_bfloat16 *rounded = gai_cuda_beside(d, N * g.H * g.D);
    if (g.form == GA_SELF)
        GAI_LAUNCH(d, gai_k_gate_self, gai_blocks(N * g.H, GAI_CUDA_THREADS / 32), GAI_CUDA_THREADS, 0, o, rounded, y,
                   y_stride, N, g);
    else if (gai_cuda_elementwise(g))
        GAI_LAUNCH_ARRAY(d, four && gai_aligned(gai_bits(s, s_stride)), gai_k_gate_elementwise, items, o, rounded, y,
                         y_stride, s, s_stride, N, g);
    else
        GAI_LAUNCH_ROWS(d, four, gai_k_gate_headwise, N, g.H * g.D, g.H * sizeof *o, o, rounded, y, y_stride, s,
                        s_stride, g);
    gai_cuda_are_beside(d, o, N * g.H * g.D);
}

/* Elementwise, as in the forward pass. */
template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_gate_elementwise_backward(float *dy, size_t dy_stride, float *ds, size_t ds_stride, const float *d_o,
                                    const float *y, size_t y_stride, const float *s, size_t s_stride, size_t N,
                                    ga_gate g) {
    bool shared = g.sharing == GA_SHARED, times = g.form == GA_MULTIPLICATIVE;
    size_t width = g.H * g.D, items = shared ? g.D : width, heads = shared ? g.H : 1;
    size_t at = gai_index<VEC>(), n = at / items, first = at % items;
    if (n >= N) return;
    const float *sn = s + n * s_stride;
    gai_pack<VEC> score, total = {};
    if (shared)
        score = gai_shared_score<VEC>(sn, first, g);
    else {
        score = gai_load<VEC>(sn + first);
        GAI_EACH(i) score.v[i] = gai_k_activation(score.v[i], g.activation);
    }
    for (size_t h = 0, c = first; h < heads; h++, c += g.D) {
        gai_pack<VEC> d = gai_load<VEC>(d_o + n * width + c), v = gai_load<VEC>(y + n * y_stride + c);
        GAI_EACH(i) total.v[i] += times ? d.v[i] * v.v[i] : d.v[i];
        GAI_EACH(i) d.v[i] *= times ? score.v[i] : 1;
        gai_store<VEC>(dy + n * dy_stride + c, d);
    }
    for (size_t h = 0, c = first; h < heads; h++, c += g.D) {
        gai_pack<VEC> x = gai_load<VEC>(sn + c);
        GAI_EACH(i) x.v[i] = total.v[i] / (float)heads * gai_k_derivative(x.v[i], g.activation);
        gai_store<VEC>(ds + n * ds_stride + c, x);
    }
}

/* Headwise: a block for each row, a warp for each head in turn. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_gate_headwise_backward(float *dy, size_t dy_stride, float *ds, size_t ds_stride, const float *d_o,
                                 const float *y, size_t y_stride, const float *s, size_t s_stride, ga_gate g) {
    GAI_DYNAMIC_SHARED(float, scores); /* (H), then (H) sums of d score */
    float *sums = scores + g.H;
    size_t n = blockIdx.x, width = g.H * g.D;
    const float *sn = s + n * s_stride;
    bool times = g.form == GA_MULTIPLICATIVE;
    gai_head_scores(scores, sn, g);
    for (size_t h = threadIdx.x / 32; h < g.H; h += blockDim.x / 32) {
        float sum = 0, score = scores[h];
        for (size_t c = h * g.D + threadIdx.x % 32; c < (h + 1) * g.D; c += 32) {
            float d = d_o[n * width + c];
            sum += times ? d * y[n * y_stride + c] : d;
            dy[n * dy_stride + c] = times ? d * score : d;
        }
        sum = gai_warp_sum(sum);
        if (threadIdx.x % 32 == 0) sums[h] = sum;
    }
    __syncthreads();
    float all = 0;
    if (g.sharing == GA_SHARED) {
        for (size_t h = threadIdx.x; h < g.H; h += blockDim.x) all += sums[h];
        all = gai_block_sum(all) / (float)g.H;
    }
    for (size_t h = threadIdx.x; h < g.H; h += blockDim.x)
        ds[n * ds_stride + h] = (g.sharing == GA_SHARED ? all : sums[h]) * gai_k_derivative(sn[h], g.activation);
}

static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_gate_self_backward(float *dy, size_t dy_stride, const float *d_o, const float *y, size_t y_stride, size_t N,
                             ga_gate g) {
    size_t head = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= N * g.H) return; /* the whole warp */
    const float *yh = y + head / g.H * y_stride + head % g.H * g.D, *dh = d_o + head * g.D;
    float *to = dy + head / g.H * dy_stride + head % g.H * g.D, squares = 0, sum = 0;
    for (size_t d = threadIdx.x % 32; d < g.D; d += 32) squares += yh[d] * yh[d], sum += dh[d] * yh[d];
    float r = 1 / sqrtf(gai_warp_sum(squares) / (float)g.D + g.eps), mean = gai_warp_sum(sum) / (float)g.D;
    for (size_t d = threadIdx.x % 32; d < g.D; d += 32)
        to[d] =
            g.activation == GA_RMSNORM ? r * (dh[d] - r * r * yh[d] * mean) : dh[d] * gai_k_derivative(yh[d], GA_SILU);
}

/* Gates that are parameters: the same logits for every row. Part blockIdx.y of the rows; a thread for each value of
 * Y. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_gate_free_backward(float *dy, size_t dy_stride, float *parts, const float *d_o, const float *y,
                             size_t y_stride, const float *s, size_t N, ga_gate g) {
    size_t width = g.H * g.D, c = gai_index<1>();
    if (c >= width) return;
    bool times = g.form == GA_MULTIPLICATIVE;
    size_t step = gai_cuda_elementwise(g) ? g.D : 1, first = gai_cuda_elementwise(g) ? c % g.D : 0;
    float score = 0, sum = 0;
    if (g.input == GA_INPUT_SCALAR)
        score = gai_k_activation(s[0], g.activation);
    else if (g.sharing == GA_SPECIFIC)
        score = gai_k_activation(s[gai_cuda_elementwise(g) ? c : c / g.D], g.activation);
    else {
        for (size_t h = 0; h < g.H; h++) score += gai_k_activation(s[first + h * step], g.activation);
        score /= (float)g.H;
    }
    for (size_t n = N * blockIdx.y / gridDim.y; n < N * (blockIdx.y + 1) / gridDim.y; n++) {
        float d = d_o[n * width + c];
        sum += times ? d * y[n * y_stride + c] : d;
        dy[n * dy_stride + c] = times ? d * score : d;
    }
    parts[blockIdx.y * width + c] = sum;
}

/* ds of such gates from the sums of d score over all rows, (H, D): a warp adds up what one logit reaches. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_gate_free_logits(float *ds, const float *sums, const float *s, ga_gate g) {
    size_t j = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (j >= g.logits) return; /* the whole warp */
    bool shared = g.sharing == GA_SHARED, elementwise = gai_cuda_elementwise(g);
    size_t first = 0, count = g.H * g.D, step = 1; /* a scalar, and headwise scores that are shared, reach all */
    if (elementwise)
        first = shared ? j % g.D : j, count = shared ? g.H : 1, step = g.D;
    else if (!shared && g.input != GA_INPUT_SCALAR)
        first = j * g.D, count = g.D;
    float sum = 0;
    for (size_t i = threadIdx.x % 32; i < count; i += 32) sum += sums[first + i * step];
    sum = gai_warp_sum(sum) / (shared && g.input != GA_INPUT_SCALAR ? (float)g.H : 1);
    if (threadIdx.x % 32 == 0) ds[j] += sum * gai_k_derivative(s[j], g.activation);
}

static void gai_cuda_gate_free(gai_cuda *d, float *dy, size_t dy_stride, float *ds, const float *d_o, const float *y,
                               size_t y_stride, const float *s, size_t N, ga_gate g) {
    size_t width = g.H * g.D, parts = gai_cuda_parts(gai_cuda_ceil(N, 16));
    float *sums = (float *)gai_cuda_scratch(d, (parts + 1) * width * sizeof *sums), *part = sums + width;
    GAI_LAUNCH(d, gai_k_gate_free_backward, dim3(gai_blocks(width, GAI_CUDA_THREADS), (unsigned)parts),
               GAI_CUDA_THREADS, 0, dy, dy_stride, part, d_o, y, y_stride, s, N, g);
    gai_cuda_add_parts(d, sums, part, parts, width, false);
    GAI_LAUNCH(d, gai_k_gate_free_logits, gai_blocks(g.logits, GAI_CUDA_THREADS / 32), GAI_CUDA_THREADS, 0, ds, sums, s,
               g);
}

static void gai_cuda_gate_backward(void *state, float *dy, size_t dy_stride, float *ds, size_t ds_stride,
                                   const float *d_o, const float *y, size_t y_stride, const float *s, size_t s_stride,
                                   size_t N, ga_gate g) {
    gai_cuda *d = (gai_cuda *)state;
    size_t items = N * (g.sharing == GA_SHARED ? g.D : g.H * g.D);
    bool four = gai_aligned(gai_bits(dy, dy_stride, ds, ds_stride, d_o, y, y_stride, s, s_stride, g.D));
    if (g.form == GA_SELF)
        GAI_LAUNCH(d, gai_k_gate_self_backward, gai_blocks(N * g.H, GAI_CUDA_THREADS / 32), GAI_CUDA_THREADS, 0, dy,
                   dy_stride, d_o, y, y_stride, N, g);
    else if (s_stride == 0)
        gai_cuda_gate_free(d, dy, dy_stride, ds, d_o, y, y_stride, s, N, g);
    else if (gai_cuda_elementwise(g))
        GAI_LAUNCH_ARRAY(d, four, gai_k_gate_elementwise_backward, items, dy, dy_stride, ds, ds_stride, d_o, y,
                         y_stride, s, s_stride, N, g);
    else
        GAI_LAUNCH(d, gai_k_gate_headwise_backward, (unsigned)N, GAI_CUDA_THREADS, 2 * g.H * sizeof *ds, dy, dy_stride,
                   ds, ds_stride, d_o, y, y_stride, s, s_stride, g);
}

/* ---- SwiGLU, clip, add ------------------------------------------------------------------------------------------- */

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_swiglu_forward(float *a, __nv_bfloat16 *rounded, const float *u, size_t N, size_t F) {
    size_t at = gai_index<VEC>();
    if (at >= N * F) return;
    const float *from = u + at / F * 2 * F + at % F;
    gai_pack<VEC> act = gai_load<VEC>(from), up = gai_load<VEC>(from + F);
    GAI_EACH(i) act.v[i] *= gai_k_sigmoid(act.v[i]) * up.v[i];
    gai_store_both<VEC>(a, rounded, at, act);
}

static void gai_cuda_swiglu_forward(void *state, float *a, const float *u, size_t N, size_t F) {
    gai_cuda *d = (gai_cuda *)state;
    __nv_bfloat16 *rounded = gai_cuda_beside(d, N * F);
    GAI_LAUNCH_ARRAY(d, gai_aligned(gai_bits(a, u, F)), gai_k_swiglu_forward, N * F, a, rounded, u, N, F);
    gai_cuda_are_beside(d, a, N * F);
}

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_swiglu_backward(float *du, __nv_bfloat16 *rounded, const float *da, const float *u, size_t N, size_t F) {
    size_t at = gai_index<VEC>();
    if (at >= N * F) return;
    size_t row = at / F * 2 * F + at % F;
    gai_pack<VEC> act = gai_load<VEC>(u + row), up = gai_load<VEC>(u + row + F), d = gai_load<VEC>(da + at), d_act;
    GAI_EACH(i) {
        float p = gai_k_sigmoid(act.v[i]);
        d_act.v[i] = d.v[i] * up.v[i] * p * (1 + act.v[i] * (1 - p));
        d.v[i] *= act.v[i] * p;
    }
    gai_store_both<VEC>(du, rounded, row, d_act);
    gai_store_both<VEC>(du, rounded, row + F, d);
}

static void gai_cuda_swiglu_backward(void *state, float *du, const float *da, const float *u, size_t N, size_t F) {
    gai_cuda *d = (gai_cuda *)state;
    __nv_bfloat16 *rounded = gai_cuda_beside(d, N * 2 * F);
    GAI_LAUNCH_ARRAY(d, gai_aligned(gai_bits(du, da, u, F)), gai_k_swiglu_backward, N * F, du, rounded, da, u, N, F);
    gai_cuda_are_beside(d, du, N * 2 * F);
}

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_clip_forward(float *y, const float *x, size_t n, float limit) {
    size_t at = gai_index<VEC>();
    if (at >= n) return;
    gai_pack<VEC> v = gai_load<VEC>(x + at);
    GAI_EACH(i) v.v[i] = v.v[i] > limit ? limit : v.v[i] < -limit ? -limit : v.v[i]; /* NaN stays */
    gai_store<VEC>(y + at, v);
}

static void gai_cuda_clip_forward(void *state, float *y, const float *x, size_t n, float limit) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH_ARRAY(d, gai_aligned(gai_bits(y, x, n)), gai_k_clip_forward, n, y, x, n, limit);
}

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_clip_backward(float *dx, const float *dy, const float *x, size_t n, float limit) {
    size_t at = gai_index<VEC>();
    if (at >= n) return;
    gai_pack<VEC> v = gai_load<VEC>(x + at), d = gai_load<VEC>(dy + at);
    GAI_EACH(i) if (v.v[i] > limit || v.v[i] < -limit) d.v[i] = 0;
    gai_store<VEC>(dx + at, d);
}

static void gai_cuda_clip_backward(void *state, float *dx, const float *dy, const float *x, size_t n, float limit) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH_ARRAY(d, gai_aligned(gai_bits(dx, dy, x, n)), gai_k_clip_backward, n, dx, dy, x, n, limit);
}

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_add(float *y, const float *a, const float *b, size_t n) {
    size_t at = gai_index<VEC>();
    if (at >= n) return;
    gai_pack<VEC> v = gai_load<VEC>(a + at), w = gai_load<VEC>(b + at);
    GAI_EACH(i) v.v[i] += w.v[i];
    gai_store<VEC>(y + at, v);
}

static void gai_cuda_add(void *state, float *y, const float *a, const float *b, size_t n) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH_ARRAY(d, gai_aligned(gai_bits(y, a, b, n)), gai_k_add, n, y, a, b, n);
}

/* ---- mixture of experts ------------------------------------------------------------------------------------------ */

/* Order of floats as unsigned integers: -0 as 0, NaN above all, so that there is always exactly one order. */
static __device__ __forceinline__ unsigned gai_order(float x) {
    unsigned bits = __float_as_uint(x + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* How many of E values stand before value e: the larger ones, and of equal ones those before it. A choice of the K
 * largest is then rank < K, by all lanes at once. */
static __device__ __forceinline__ int gai_rank(const float *z, int e, int E) {
    unsigned mine = gai_order(z[e]);
    int rank = 0;
    for (int i = 0; i < E; i++) {
        unsigned other = gai_order(z[i]);
        rank += other > mine || (other == mine && i < e);
    }
    return rank;
}

enum { GAI_ROUTE_WARPS = 4 }; /* positions of a block: one for each warp */

static __global__ void __launch_bounds__(GAI_ROUTE_WARPS * 32)
    gai_k_route_forward(float *p, float *lse, float *weights, int32_t *experts, const float *logits, size_t N, int E,
                        int K, bool normalize) {
    GAI_DYNAMIC_SHARED(float, all);
    int lane = threadIdx.x % 32;
    size_t n = (size_t)blockIdx.x * GAI_ROUTE_WARPS + threadIdx.x / 32;
    if (n >= N) return; /* the whole warp */
    float *z = all + threadIdx.x / 32 * E, top = -INFINITY, sum = 0, of_chosen = 0;
    for (int e = lane; e < E; e += 32) z[e] = logits[n * E + e], top = fmaxf(top, z[e]);
    __syncwarp(); /* logits may be p */
    top = gai_warp_max(top);
    for (int e = lane; e < E; e += 32) sum += expf(z[e] - top);
    sum = gai_warp_sum(sum);
    for (int e = lane; e < E; e += 32) {
        float pe = expf(z[e] - top) / sum;
        p[n * E + e] = pe;
        int rank = gai_rank(z, e, E);
        if (rank >= K) continue;
        experts[n * K + rank] = e, weights[n * K + rank] = pe;
        of_chosen += pe;
    }
    of_chosen = gai_warp_sum(of_chosen);
    __syncwarp();
    for (int j = lane; normalize && j < K; j += 32) weights[n * K + j] /= of_chosen;
    if (lane == 0) lse[n] = top + logf(sum);
}

static void gai_cuda_route_forward(void *state, float *p, float *lse, float *weights, int32_t *experts,
                                   const float *logits, size_t N, ga_router r) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_route_forward, gai_blocks(N, GAI_ROUTE_WARPS), GAI_ROUTE_WARPS * 32,
               GAI_ROUTE_WARPS * r.E * sizeof *p, p, lse, weights, experts, logits, N, (int)r.E, (int)r.K, r.normalize);
}

static __global__ void __launch_bounds__(GAI_ROUTE_WARPS * 32)
    gai_k_route_backward(float *d_logits, const float *d_weights, const float *p, const float *lse,
                         const int32_t *experts, const int32_t *counts, size_t N, int E, int K, bool normalize,
                         float balance_scale, float z_scale) {
    GAI_DYNAMIC_SHARED(float, all);
    int lane = threadIdx.x % 32;
    size_t n = (size_t)blockIdx.x * GAI_ROUTE_WARPS + threadIdx.x / 32;
    if (n >= N) return; /* the whole warp */
    float *dp = all + threadIdx.x / 32 * E, slots = 0, of_chosen = 0, along = 0, total = 0;
    const float *pn = p + n * E;
    for (int e = lane; e < E; e += 32) slots += (float)counts[e];
    float each = balance_scale * (float)E * (float)K / gai_warp_sum(slots) / (float)N;
    for (int e = lane; e < E; e += 32) dp[e] = each * (float)counts[e];
    for (int j = lane; j < K; j += 32) {
        float pe = pn[experts[n * K + j]];
        of_chosen += pe, along += d_weights[n * K + j] * pe;
    }
    of_chosen = gai_warp_sum(of_chosen), along = gai_warp_sum(along) / of_chosen;
    __syncwarp();
    for (int j = lane; j < K; j += 32) { /* different experts: no two lanes meet */
        float dw = d_weights[n * K + j];
        dp[experts[n * K + j]] += normalize ? (dw - along) / of_chosen : dw;
    }
    __syncwarp();
    for (int e = lane; e < E; e += 32) total += dp[e] * pn[e];
    total = gai_warp_sum(total);
    for (int e = lane; e < E; e += 32) d_logits[n * E + e] = pn[e] * (dp[e] - total + z_scale * 2 * lse[n] / (float)N);
}

static void gai_cuda_route_backward(void *state, float *d_logits, const float *d_weights, const float *p,
                                    const float *lse, const int32_t *experts, const int32_t *counts, size_t N,
                                    ga_router r, float balance_scale, float z_scale) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_route_backward, gai_blocks(N, GAI_ROUTE_WARPS), GAI_ROUTE_WARPS * 32,
               GAI_ROUTE_WARPS * r.E * sizeof *p, d_logits, d_weights, p, lse, experts, counts, N, (int)r.E, (int)r.K,
               r.normalize, balance_scale, z_scale);
}

/* A block for each expert looks at every slot. First it counts its own, offsets[e + 1]; then, when those are sums, it
 * puts them into its rows, in their order: the place of a slot is the number of own slots before it. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_route_rows(int32_t *rows, int32_t *slots, int32_t *offsets, const int32_t *experts, size_t R, bool count) {
    GAI_SHARED(int, found, [GAI_CUDA_THREADS / 32]);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, e = blockIdx.x;
    int next = count ? 0 : offsets[e];
    for (size_t s0 = 0; s0 < R; s0 += blockDim.x) {
        size_t s = s0 + threadIdx.x;
        bool own = s < R && experts[s] == e;
        unsigned bits = __ballot_sync(GAI_WARP, own);
        if (lane == 0) found[warp] = __popc(bits);
        __syncthreads();
        int before = __popc(bits & ((1u << lane) - 1)), total = 0;
        for (int w = 0; w < GAI_CUDA_THREADS / 32; w++) {
            if (w < warp) before += found[w];
            total += found[w];
        }
        if (own && !count) rows[s] = next + before, slots[next + before] = (int32_t)s;
        next += total;
        __syncthreads();
    }
    if (count && threadIdx.x == 0) offsets[e + 1] = next;
}

static __global__ void __launch_bounds__(32) gai_k_add_counts(int32_t *offsets, int E) {
    if (threadIdx.x > 0) return;
    offsets[0] = 0;
    for (int e = 0; e < E; e++) offsets[e + 1] += offsets[e];
}

static void gai_cuda_route_rows(void *state, int32_t *rows, int32_t *slots, int32_t *offsets, const int32_t *experts,
                                size_t N, ga_router r) {
    gai_cuda *d = (gai_cuda *)state;
    for (int pass = 0; pass < 2; pass++) {
        GAI_LAUNCH(d, gai_k_route_rows, (unsigned)r.E, GAI_CUDA_THREADS, 0, rows, slots, offsets, experts, N * r.K,
                   pass == 0);
        if (pass == 0) GAI_LAUNCH(d, gai_k_add_counts, 1, 32, 0, offsets, (int)r.E);
    }
}

/* Part blockIdx.y of the rows: sums of p, and in the last column those of lse^2. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_route_sums(float *parts, const float *p, const float *lse, size_t N, size_t E) {
    size_t e = gai_index<1>();
    if (e > E) return;
    float sum = 0;
    for (size_t n = N * blockIdx.y / gridDim.y; n < N * (blockIdx.y + 1) / gridDim.y; n++)
        sum += e < E ? p[n * E + e] : lse[n] * lse[n];
    parts[blockIdx.y * (E + 1) + e] = sum;
}

static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_route_counts(int32_t *counts, const int32_t *offsets, size_t E) {
    size_t e = gai_index<1>();
    if (e < E) counts[e] += offsets[e + 1] - offsets[e];
}

static void gai_cuda_route_sums(void *state, int32_t *counts, float *sums, const int32_t *offsets, const float *p,
                                const float *lse, size_t N, ga_router r) {
    gai_cuda *d = (gai_cuda *)state;
    size_t parts = gai_cuda_parts(gai_cuda_ceil(N, 16));
    float *part = (float *)gai_cuda_scratch(d, parts * (r.E + 1) * sizeof *part);
    GAI_LAUNCH(d, gai_k_route_sums, dim3(gai_blocks(r.E + 1, GAI_CUDA_THREADS), (unsigned)parts), GAI_CUDA_THREADS, 0,
               part, p, lse, N, r.E);
    gai_cuda_add_parts(d, sums, part, parts, r.E + 1, true);
    GAI_LAUNCH(d, gai_k_route_counts, gai_blocks(r.E, GAI_CUDA_THREADS), GAI_CUDA_THREADS, 0, counts, offsets, r.E);
}

static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_route_pool(int32_t *seen, int32_t *counts, float *sums, const float *parts, ga_pool pool) {
    size_t i = gai_index<1>();
    for (size_t r = 0; r < pool.ranks && i < pool.n_sums; r++) {
        const float *part = parts + r * pool.values;
        sums[i] += part[pool.sums + i];
        if (i >= pool.n) continue;
        counts[i] += (int32_t)__float_as_uint(part[i]);
        if (r == pool.rank) seen[i] = counts[i];
    }
}

static void gai_cuda_route_pool(void *state, int32_t *seen, int32_t *counts, float *sums, const float *parts,
                                ga_pool pool) {
    GAI_LAUNCH((gai_cuda *)state, gai_k_route_pool, gai_blocks(pool.n_sums, GAI_CUDA_THREADS), GAI_CUDA_THREADS, 0,
               seen, counts, sums, parts, pool);
}

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_gather_rows(float *y, const float *x, const int32_t *slots, size_t C, size_t K) {
    const float *from = x + (size_t)slots[blockIdx.x] / K * C;
    float *to = y + blockIdx.x * C;
    for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) gai_store<VEC>(to + c, gai_load<VEC>(from + c));
}

static void gai_cuda_gather_rows(void *state, float *y, const float *x, const int32_t *slots, size_t R, size_t C,
                                 size_t K) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH_ROWS(d, gai_aligned(gai_bits(y, x, C)), gai_k_gather_rows, R, C, 0, y, x, slots, C, K);
}

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_sum_rows(float *y, const float *x, const int32_t *rows, size_t C, size_t K) {
    const int32_t *own = rows + blockIdx.x * K;
    float *to = y + blockIdx.x * C;
    for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) {
        gai_pack<VEC> sum = gai_load<VEC>(x + (size_t)own[0] * C + c);
        for (size_t j = 1; j < K; j++) {
            gai_pack<VEC> more = gai_load<VEC>(x + (size_t)own[j] * C + c);
            GAI_EACH(i) sum.v[i] += more.v[i];
        }
        gai_store<VEC>(to + c, sum);
    }
}

static void gai_cuda_sum_rows(void *state, float *y, const float *x, const int32_t *rows, size_t N, size_t C,
                              size_t K) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH_ROWS(d, gai_aligned(gai_bits(y, x, C)), gai_k_sum_rows, N, C, 0, y, x, rows, C, K);
}

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_expert_swiglu_forward(float *a, const float *u, const float *weights, const int32_t *slots, size_t F) {
    const float *from = u + blockIdx.x * 2 * F;
    float weight = weights[slots[blockIdx.x]], *to = a + blockIdx.x * F;
    for (size_t f = threadIdx.x * VEC; f < F; f += blockDim.x * VEC) {
        gai_pack<VEC> act = gai_load<VEC>(from + f), up = gai_load<VEC>(from + F + f);
        GAI_EACH(i) act.v[i] *= weight * gai_k_sigmoid(act.v[i]) * up.v[i];
        gai_store<VEC>(to + f, act);
    }
}

static void gai_cuda_expert_swiglu_forward(void *state, float *a, const float *u, const float *weights,
                                           const int32_t *slots, size_t R, size_t F) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH_ROWS(d, gai_aligned(gai_bits(a, u, F)), gai_k_expert_swiglu_forward, R, F, 0, a, u, weights, slots, F);
}

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_expert_swiglu_backward(float *du, float *d_weights, const float *da, const float *u, const float *weights,
                                 const int32_t *slots, size_t F) {
    const float *from = u + blockIdx.x * 2 * F, *da_row = da + blockIdx.x * F;
    float weight = weights[slots[blockIdx.x]], *to = du + blockIdx.x * 2 * F, sum = 0;
    for (size_t f = threadIdx.x * VEC; f < F; f += blockDim.x * VEC) {
        gai_pack<VEC> act = gai_load<VEC>(from + f), up = gai_load<VEC>(from + F + f), d = gai_load<VEC>(da_row + f);
        GAI_EACH(i) {
            float p = gai_k_sigmoid(act.v[i]), silu = act.v[i] * p;
            sum += d.v[i] * silu * up.v[i];
            up.v[i] *= weight * d.v[i] * p * (1 + act.v[i] * (1 - p));
            d.v[i] *= weight * silu;
        }
        gai_store<VEC>(to + f, up);
        gai_store<VEC>(to + F + f, d);
    }
    sum = gai_block_sum(sum);
    if (threadIdx.x == 0) d_weights[slots[blockIdx.x]] = sum;
}

static void gai_cuda_expert_swiglu_backward(void *state, float *du, float *d_weights, const float *da, const float *u,
                                            const float *weights, const int32_t *slots, size_t R, size_t F) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH_ROWS(d, gai_aligned(gai_bits(du, da, u, F)), gai_k_expert_swiglu_backward, R, F, 0, du, d_weights, da, u,
                    weights, slots, F);
}

/* ---- grouped products -------------------------------------------------------------------------------------------- */

/* Products of the experts' rows, whose numbers only the device knows. One tile of C, 64 x 64, for each block of four
 * warps, each with 32 x 32 of it; the contraction goes in steps of 32 through shared memory.
 *
 *     forward   y  (R, O)   = x w_e^T      rows of a tile belong to one expert     k over I
 *     dx        dx (R, I)   = dy w_e       the same                                k over O
 *     dw        dw_e (O, I) += dy^T x      one expert for each blockIdx.z          k over the expert's rows
 *
 * On tensor cores operands are rounded to bfloat16 as they are loaded; else the sums are float32 throughout. */
enum { GAI_TILE_ROWS = 64, GAI_TILE_STEP = 32, GAI_TILE_THREADS = 128 };

/* An operand: element (i, k) at p[i * row + k * step], of which rows x steps exist. One of the strides is 1. */
struct gai_grouped_operand {
    const float *p;
    size_t row, step, rows, steps;
};

/* Element (i, k) of a tile that begins at k0; zero beyond the end. */
static __device__ __forceinline__ float gai_element(const gai_grouped_operand &a, size_t i, size_t k) {
    return i < a.rows && k < a.steps ? a.p[i * a.row + k * a.step] : 0.f;
}

/* A step of an operand into shared memory, (64, 32) with rows of STRIDE. Neighbouring threads read neighbours. */
template <class T, int STRIDE>
static __device__ __forceinline__ void gai_load_step(T *to, const gai_grouped_operand &a, size_t k0) {
    for (int at = threadIdx.x; at < GAI_TILE_ROWS * GAI_TILE_STEP; at += GAI_TILE_THREADS) {
        int i = at / GAI_TILE_STEP, k = at % GAI_TILE_STEP;
        if (a.step != 1 && sizeof(T) == 2) /* a warp takes 8 rows of 4: whole sectors, and different banks */
            i = at / 32 % 8 * 8 + at % 8, k = at / 256 * 4 + at / 8 % 4;
        else if (a.step != 1)
            i = at % GAI_TILE_ROWS, k = at / GAI_TILE_ROWS;
        T value = (T)gai_element(a, i, k0 + k);
        to[i * STRIDE + k] = value;
    }
}

/* c (64, 64) = A B^T for operands that begin at the tile; element (i, j) of this thread by `where`. */
struct gai_tensor_tile {
    enum { STRIDE = GAI_TILE_STEP + 8 };
    typedef __nv_bfloat16 element;
    float c[2][4][4] = {}; /* 2 x 16 rows, 4 x 8 columns of the warp */

    __device__ __forceinline__ void step(const element *a, const element *b) {
        int warp = threadIdx.x / 32;
        a += warp / 2 * 32 * STRIDE, b += warp % 2 * 32 * STRIDE;
#pragma unroll
        for (int k = 0; k < GAI_TILE_STEP; k += 16) {
            uint32_t part[2][4];
            gai_flash_operands<STRIDE>(part, a + k);
            gai_flash_rows<STRIDE>(c, part, b + k);
        }
    }
    template <class F>
    __device__ __forceinline__ void each(F f) const {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int v = 0; v < 4; v++)
                    f(warp / 2 * 32 + i * 16 + lane / 4 + v / 2 * 8, warp % 2 * 32 + j * 8 + lane % 4 * 2 + v % 2,
                      c[i][j][v]);
    }
};

struct gai_float_tile {
    enum { STRIDE = GAI_TILE_STEP + 1 };
    typedef float element;
    float c[8][4] = {}; /* rows t, t + 8, ..., columns u, u + 16, ... */

    __device__ __forceinline__ void step(const element *a, const element *b) {
        int t = threadIdx.x / 16, u = threadIdx.x % 16;
        for (int k = 0; k < GAI_TILE_STEP; k++) {
            float line[4];
#pragma unroll
            for (int j = 0; j < 4; j++) line[j] = b[(u + 16 * j) * STRIDE + k];
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) c[i][j] += a[(t + 8 * i) * STRIDE + k] * line[j];
        }
    }
    template <class F>
    __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) f(threadIdx.x / 16 + 8 * i, threadIdx.x % 16 + 16 * j, c[i][j]);
    }
};

template <class TILE>
static __device__ __forceinline__ TILE gai_tile_product(const gai_grouped_operand &a, const gai_grouped_operand &b) {
    GAI_DYNAMIC_SHARED(typename TILE::element, a_step);
    typename TILE::element *b_step = a_step + GAI_TILE_ROWS * TILE::STRIDE;
    TILE tile;
    for (size_t k = 0; k < a.steps; k += GAI_TILE_STEP) {
        gai_load_step<typename TILE::element, TILE::STRIDE>(a_step, a, k);
        gai_load_step<typename TILE::element, TILE::STRIDE>(b_step, b, k);
        __syncthreads();
        tile.step(a_step, b_step);
        __syncthreads(); /* before the next step is written over this one */
    }
    return tile;
}

/* The expert of a tile of rows, and the tile's first row: the tiles of all experts are counted through. */
static __device__ __forceinline__ bool gai_find_tile(size_t tile, const int32_t *offsets, int E, int &expert,
                                                     size_t &first) {
    for (expert = 0; expert < E; expert++) {
        size_t tiles = (size_t)(offsets[expert + 1] - offsets[expert] + GAI_TILE_ROWS - 1) / GAI_TILE_ROWS;
        if (tile < tiles) break;
        tile -= tiles;
    }
    if (expert == E) return false;
    first = (size_t)offsets[expert] + tile * GAI_TILE_ROWS;
    return true;
}

/* y (R, O) = x (R, I) w_e^T with w (O, I); `turned`: x w_e with w (I, O), for the gradient of the rows. How many tiles
 * there are only the offsets say: a block takes every gridDim-th. */
template <class TILE>
static __global__ void __launch_bounds__(GAI_TILE_THREADS)
    gai_k_grouped_rows(float *y, const float *x, const float *w, size_t w_stride, const int32_t *offsets, int E,
                       size_t O, size_t I, bool turned) {
    size_t columns = (O + GAI_TILE_ROWS - 1) / GAI_TILE_ROWS, first;
    int expert;
    for (size_t t = blockIdx.x; gai_find_tile(t / columns, offsets, E, expert, first); t += gridDim.x) {
        size_t rows = (size_t)offsets[expert + 1] - first, column = t % columns * GAI_TILE_ROWS;
        const float *we = w + (size_t)expert * w_stride + (turned ? column : column * I);
        gai_grouped_operand a = {x + first * I, I, 1, rows, I}, b = {we, turned ? 1 : I, turned ? O : 1, O - column, I};
        TILE tile = gai_tile_product<TILE>(a, b);
        tile.each([&](size_t i, size_t j, float c) {
            if (i < rows && column + j < O) y[(first + i) * O + column + j] = c;
        });
    }
}

/* dw_e (O, I) += dy^T x over the rows of expert blockIdx.z. */
template <class TILE>
static __global__ void __launch_bounds__(GAI_TILE_THREADS, 1) /* 1: else ptxas saves registers, and spills */
    gai_k_grouped_weights(float *dw, const float *dy, const float *x, size_t w_stride, const int32_t *offsets, size_t O,
                          size_t I) {
    size_t begin = (size_t)offsets[blockIdx.z], rows = (size_t)offsets[blockIdx.z + 1] - begin;
    size_t o = (size_t)blockIdx.y * GAI_TILE_ROWS, column = (size_t)blockIdx.x * GAI_TILE_ROWS;
    if (rows == 0) return; /* the whole block */
    gai_grouped_operand a = {dy + begin * O + o, 1, O, O - o, rows},
                        b = {x + begin * I + column, 1, I, I - column, rows};
    TILE tile = gai_tile_product<TILE>(a, b);
    float *to = dw + blockIdx.z * w_stride;
    tile.each([&](size_t i, size_t j, float c) {
        if (o + i < O && column + j < I) to[(o + i) * I + column + j] += c;
    });
}

template <class TILE>
static constexpr size_t gai_tile_bytes() {
    return 2 * GAI_TILE_ROWS * TILE::STRIDE * sizeof(typename TILE::element);
}

static void gai_cuda_grouped_rows(gai_cuda *d, float *y, const float *x, const float *w, size_t w_stride,
                                  const int32_t *offsets, size_t E, size_t O, size_t I, bool turned) {
    unsigned blocks = 4 * (unsigned)d->properties.multiProcessorCount;
    if (d->bf16)
        GAI_LAUNCH(d, gai_k_grouped_rows<gai_tensor_tile>, blocks, GAI_TILE_THREADS, gai_tile_bytes<gai_tensor_tile>(),
                   y, x, w, w_stride, offsets, (int)E, O, I, turned);
    else
        GAI_LAUNCH(d, gai_k_grouped_rows<gai_float_tile>, blocks, GAI_TILE_THREADS, gai_tile_bytes<gai_float_tile>(), y,
                   x, w, w_stride, offsets, (int)E, O, I, turned);
}

static void gai_cuda_grouped_forward(void *state, float *y, const float *x, const float *w, size_t w_stride,
                                     const int32_t *offsets, size_t E, size_t O, size_t I) {
    gai_cuda_grouped_rows((gai_cuda *)state, y, x, w, w_stride, offsets, E, O, I, false);
}

static void gai_cuda_grouped_backward(void *state, float *dx, float *dw, const float *dy, const float *x,
                                      const float *w, size_t w_stride, const int32_t *offsets, size_t E, size_t O,
                                      size_t I) {
    gai_cuda *d = (gai_cuda *)state;
    dim3 grid(gai_blocks(I, GAI_TILE_ROWS), gai_blocks(O, GAI_TILE_ROWS), (unsigned)E);
    gai_cuda_grouped_rows(d, dx, dy, w, w_stride, offsets, E, I, O, true);
    if (d->bf16)
        GAI_LAUNCH(d, gai_k_grouped_weights<gai_tensor_tile>, grid, GAI_TILE_THREADS, gai_tile_bytes<gai_tensor_tile>(),
                   dw, dy, x, w_stride, offsets, O, I);
    else
        GAI_LAUNCH(d, gai_k_grouped_weights<gai_float_tile>, grid, GAI_TILE_THREADS, gai_tile_bytes<gai_float_tile>(),
                   dw, dy, x, w_stride, offsets, O, I);
}

/* ---- switch heads ------------------------------------------------------------------------------------------------ */

/* A warp for each head of each position: probabilities of the chosen experts in shared memory, -1 for the others. */
static __device__ __forceinline__ void gai_switch_choice(float *p, const float *s, int E, int K) {
    for (int e = threadIdx.x % 32; e < E; e += 32) p[e] = gai_rank(s, e, E) < K ? gai_k_sigmoid(s[e]) : -1;
    __syncwarp();
}

static __global__ void __launch_bounds__(GAI_ROUTE_WARPS * 32)
    gai_k_switch_forward(float *y, const float *x, const float *s, size_t stride, size_t N, ga_switch w) {
    GAI_DYNAMIC_SHARED(float, all);
    size_t head = (size_t)blockIdx.x * GAI_ROUTE_WARPS + threadIdx.x / 32, n = head / w.H, h = head % w.H;
    if (n >= N) return; /* the whole warp */
    float *p = all + threadIdx.x / 32 * w.E;
    gai_switch_choice(p, s + n * stride + h * w.E, (int)w.E, (int)w.K);
    const float *experts = x + n * stride + h * w.E * w.D;
    for (size_t i = threadIdx.x % 32; i < w.D; i += 32) {
        float sum = 0;
        for (size_t e = 0; e < w.E; e++)
            if (p[e] >= 0) sum += experts[e * w.D + i] * p[e];
        y[head * w.D + i] = sum;
    }
}

static __global__ void __launch_bounds__(GAI_ROUTE_WARPS * 32)
    gai_k_switch_backward(float *dx, float *ds, const float *dy, const float *x, const float *s, size_t stride,
                          size_t N, ga_switch w) {
    GAI_DYNAMIC_SHARED(float, all);
    size_t head = (size_t)blockIdx.x * GAI_ROUTE_WARPS + threadIdx.x / 32, n = head / w.H, h = head % w.H;
    if (n >= N) return; /* the whole warp */
    float *p = all + threadIdx.x / 32 * w.E;
    size_t at = n * stride + h * w.E, first = n * stride + h * w.E * w.D;
    gai_switch_choice(p, s + at, (int)w.E, (int)w.K);
    for (size_t e = 0; e < w.E; e++) {
        float sum = 0;
        for (size_t i = threadIdx.x % 32; i < w.D; i += 32) {
            float d = dy[head * w.D + i];
            dx[first + e * w.D + i] = p[e] >= 0 ? d * p[e] : 0;
            sum += d * x[first + e * w.D + i];
        }
        sum = gai_warp_sum(sum);
        if (threadIdx.x % 32 == 0) ds[at + e] = p[e] >= 0 ? sum * p[e] * (1 - p[e]) : 0;
    }
}

static void gai_cuda_switch_forward(void *state, float *y, const float *x, const float *s, size_t stride, size_t N,
                                    ga_switch w) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_switch_forward, gai_blocks(N * w.H, GAI_ROUTE_WARPS), GAI_ROUTE_WARPS * 32,
               GAI_ROUTE_WARPS * w.E * sizeof *y, y, x, s, stride, N, w);
}

static void gai_cuda_switch_backward(void *state, float *dx, float *ds, const float *dy, const float *x, const float *s,
                                     size_t stride, size_t N, ga_switch w) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_switch_backward, gai_blocks(N * w.H, GAI_ROUTE_WARPS), GAI_ROUTE_WARPS * 32,
               GAI_ROUTE_WARPS * w.E * sizeof *dx, dx, ds, dy, x, s, stride, N, w);
}

/* ---- output head and cross-entropy ------------------------------------------------------------------------------- */

/* A block for each row: the loss, and unless `gradients` is NULL scale (softmax - onehot), which may be written over
 * the logits. The first pass keeps a running maximum, so that there are two passes, the second from the cache. */
template <int VEC, class GRADIENT>
static __device__ __forceinline__ void gai_cross_entropy_row(float *losses, GRADIENT *gradients, const float *logits,
                                                             const int32_t *targets, size_t V, const float *worth) {
    const float *row = logits + blockIdx.x * V;
    int32_t target = targets[blockIdx.x];
    float top = -INFINITY, sum = 0;
    for (size_t v = threadIdx.x * VEC; v < V && target >= 0; v += blockDim.x * VEC) {
        gai_pack<VEC> x = gai_load<VEC>(row + v);
        float higher = top;
        GAI_EACH(i) higher = fmaxf(higher, x.v[i]);
        if (higher > top) sum *= expf(top - higher), top = higher;
        GAI_EACH(i) sum += expf(x.v[i] - top);
    }
    float highest = gai_block_max(top);
    sum = gai_block_sum(top > -INFINITY ? sum * expf(top - highest) : sum);
    float at_target = target >= 0 ? row[target] : 0;
    __syncthreads(); /* before anybody writes over the logits */
    if (threadIdx.x == 0) losses[blockIdx.x] = target >= 0 ? logf(sum) + highest - at_target : 0;
    if (!gradients) return;
    float scale = *worth;
    for (size_t v = threadIdx.x * VEC; v < V; v += blockDim.x * VEC) {
        gai_pack<VEC> x = gai_load<VEC>(row + v);
        GAI_EACH(i) {
            float p = expf(x.v[i] - highest) * (scale / sum) - ((int32_t)(v + i) == target ? scale : 0);
            x.v[i] = target >= 0 ? p : 0;
        }
        gai_store<VEC>(gradients + blockIdx.x * V + v, x);
    }
}

template <int VEC>
static __global__ void __launch_bounds__(1024)
    gai_k_cross_entropy(float *losses, float *gradients, const float *logits, const int32_t *targets, size_t V,
                        const float *scale) {
    gai_cross_entropy_row<VEC>(losses, gradients, logits, targets, V, scale);
}

template <int VEC>
static __global__ void __launch_bounds__(1024)
    gai_k_cross_entropy_bf16(float *losses, __nv_bfloat16 *gradients, const float *logits, const int32_t *targets,
                             size_t V, const float *scale) {
    gai_cross_entropy_row<VEC>(losses, gradients, logits, targets, V, scale);
}

/* Threads of a block that walks along a vocabulary twice. */
static unsigned gai_cuda_vocabulary_threads(size_t V) {
    return V >= 8192 ? 1024 : 256;
}

/* Rows whose gradients of the logits exist at one time in bfloat16: dw is read and written once for all of them. */
static size_t gai_cuda_head_rows(const gai_cuda *d, size_t N, size_t V) {
    enum { BYTES = 256 << 20 };
    if (!d->bf16) return gai_cuda_min(N, GA_HEAD_ROWS);
    size_t slices = BYTES / (V * sizeof(__nv_bfloat16)) / GA_HEAD_ROWS;
    return gai_cuda_min(N, gai_cuda_max(slices, 1) * GA_HEAD_ROWS);
}

static void gai_cuda_head_loss(void *state, float *losses, float *dx, float *dw, float *logits, const float *x,
                               const float *w, const int32_t *targets, size_t N, size_t C, size_t V,
                               const float *scale) {
    gai_cuda *d = (gai_cuda *)state;
    size_t group = gai_cuda_head_rows(d, N, V);
    bool four = gai_aligned(gai_bits(logits, V));
    unsigned threads = gai_cuda_vocabulary_threads(V);
    char *scratch = gai_cuda_scratch(d, gai_cuda_weight_bytes(d, w, V * C) + gai_cuda_operand_bytes(d, group * C) +
                                            gai_cuda_operand_bytes(d, group * V));
    gai_cuda_operand ws = gai_cuda_weights_of(d, w, V * C, &scratch);
    for (size_t g0 = 0; g0 < N; g0 += group) {
        size_t count = gai_cuda_min(group, N - g0);
        char *at = scratch;
        gai_cuda_operand xs = gai_cuda_operand_of(d, x + g0 * C, count * C, &at), gradients = {logits, CUDA_R_32F};
        if (d->bf16) gradients.p = at, gradients.type = CUDA_R_16BF;
        for (size_t n0 = 0; n0 < count; n0 += GA_HEAD_ROWS) {
            size_t rows = gai_cuda_min(GA_HEAD_ROWS, count - n0), n = g0 + n0;
            gai_cuda_operand slice = {(const char *)xs.p + n0 * C * (d->bf16 ? 2 : 4), xs.type};
            gai_cuda_product(d, logits, slice, ws, rows, V, C);
            if (d->bf16) {
                __nv_bfloat16 *to = dx ? (__nv_bfloat16 *)at + n0 * V : NULL;
                if (four)
                    GAI_LAUNCH(d, gai_k_cross_entropy_bf16<4>, (unsigned)rows, threads, 0, losses + n, to, logits,
                               targets + n, V, scale);
                else
                    GAI_LAUNCH(d, gai_k_cross_entropy_bf16<1>, (unsigned)rows, threads, 0, losses + n, to, logits,
                               targets + n, V, scale);
            } else if (four)
                GAI_LAUNCH(d, gai_k_cross_entropy<4>, (unsigned)rows, threads, 0, losses + n, dx ? logits : NULL,
                           logits, targets + n, V, scale);
            else
                GAI_LAUNCH(d, gai_k_cross_entropy<1>, (unsigned)rows, threads, 0, losses + n, dx ? logits : NULL,
                           logits, targets + n, V, scale);
        }
        if (!dx) continue;
        gai_cuda_product_dw(d, dw, gradients, xs, count, V, C);
        gai_cuda_product_dx(d, dx + g0 * C, gradients, ws, count, V, C);
    }
}

static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_mean_loss(double *mean, double *total, const float *losses, const int32_t *targets, size_t N, double scale) {
    GAI_SHARED(double, sums, [GAI_CUDA_THREADS]);
    GAI_SHARED(unsigned long long, counts, [GAI_CUDA_THREADS]);
    double sum = 0;
    unsigned long long count = 0;
    for (size_t n = threadIdx.x; n < N; n += GAI_CUDA_THREADS) sum += (double)losses[n], count += targets[n] >= 0;
    sums[threadIdx.x] = sum, counts[threadIdx.x] = count;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int t = 1; t < GAI_CUDA_THREADS; t++) sum += sums[t], count += counts[t];
    sum = count ? sum / (double)count : (double)NAN;
    *mean = sum;
    if (total) *total += scale * sum;
}

static void gai_cuda_mean_loss(void *state, double *mean, double *total, const float *losses, const int32_t *targets,
                               size_t N, double scale) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_mean_loss, 1, GAI_CUDA_THREADS, 0, mean, total, losses, targets, N, scale);
}

/* ---- optimiser --------------------------------------------------------------------------------------------------- */

/* What a step needs of the settings, in float. */
typedef struct {
    float b1, b2, eps, scale, keep, rate, root;
} gai_cuda_adamw_numbers;

template <int VEC>
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_adamw(float *p, const float *g, float *m, float *v, size_t n, gai_cuda_adamw_numbers a) {
    size_t at = gai_index<VEC>();
    if (at >= n) return;
    gai_pack<VEC> P = gai_load<VEC>(p + at), G = gai_load<VEC>(g + at), M = gai_load<VEC>(m + at),
                  S = gai_load<VEC>(v + at);
    GAI_EACH(i) {
        float x = G.v[i] * a.scale;
        M.v[i] = a.b1 * M.v[i] + (1 - a.b1) * x;
        S.v[i] = a.b2 * S.v[i] + (1 - a.b2) * x * x;
        P.v[i] = P.v[i] * a.keep - a.rate * M.v[i] / (sqrtf(S.v[i]) * a.root + a.eps);
    }
    gai_store<VEC>(p + at, P);
    gai_store<VEC>(m + at, M);
    gai_store<VEC>(v + at, S);
}

static void gai_cuda_adamw(void *state, float *p, const float *g, float *m, float *v, size_t n, ga_adamw_settings a) {
    gai_cuda *d = (gai_cuda *)state;
    double step = (double)a.step;
    gai_cuda_adamw_numbers numbers = {(float)a.beta1,
                                      (float)a.beta2,
                                      (float)a.eps,
                                      (float)a.gradient_scale,
                                      (float)(1 - a.learning_rate * a.weight_decay),
                                      (float)(a.learning_rate / (1 - pow(a.beta1, step))),
                                      (float)(1 / sqrt(1 - pow(a.beta2, step)))};
    GAI_LAUNCH_ARRAY(d, gai_aligned(gai_bits(p, g, m, v, n)), gai_k_adamw, n, p, g, m, v, n, numbers);
}

static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_sum_of_squares(double *parts, const float *x, size_t n) {
    double sum = 0;
    for (size_t i = gai_index<1>(); i < n; i += (size_t)gridDim.x * blockDim.x) sum += (double)x[i] * (double)x[i];
    sum = gai_block_total(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

/* sums_i += parts of `fields` numbers, in order, a thread for each number. */
static __global__ void __launch_bounds__(32)
    gai_k_add_doubles(double *sums, const double *parts, size_t count, int fields) {
    if ((int)threadIdx.x >= fields) return;
    double sum = 0;
    for (size_t i = 0; i < count; i++) sum += parts[i * fields + threadIdx.x];
    sums[threadIdx.x] += sum;
}

static void gai_cuda_sum_of_squares(void *state, double *sum, const float *x, size_t n) {
    gai_cuda *d = (gai_cuda *)state;
    size_t blocks = gai_cuda_parts(gai_cuda_ceil(n, GAI_CUDA_THREADS * 4));
    double *parts = (double *)gai_cuda_scratch(d, blocks * sizeof *parts);
    GAI_LAUNCH(d, gai_k_sum_of_squares, (unsigned)blocks, GAI_CUDA_THREADS, 0, parts, x, n);
    GAI_LAUNCH(d, gai_k_add_doubles, 1, 32, 0, sum, parts, blocks, 1);
}

/* ---- analysis ---------------------------------------------------------------------------------------------------- */

/* *top becomes the larger of itself and a float without its sign. Without it a number's bits grow with its value, and
 * NaN stands above all: an integer maximum, the same in any order. */
static __device__ __forceinline__ void gai_keep_largest(double *top, unsigned bits) {
    double value = (double)__uint_as_float(bits);
    unsigned long long wide;
    memcpy(&wide, &value, sizeof wide);
    atomicMax(reinterpret_cast<unsigned long long *>(top), wide);
}

static __global__ void __launch_bounds__(GAI_CUDA_THREADS) gai_k_max_abs(double *top, const float *x, size_t n) {
    unsigned mine = 0;
    for (size_t i = gai_index<1>(); i < n; i += (size_t)gridDim.x * blockDim.x) {
        unsigned bits = __float_as_uint(x[i]) & 0x7fffffffu;
        mine = bits > mine ? bits : mine;
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        unsigned other = __shfl_xor_sync(GAI_WARP, mine, o);
        mine = other > mine ? other : mine;
    }
    if (threadIdx.x % 32 == 0) gai_keep_largest(top, mine);
}

static void gai_cuda_max_abs(void *state, double *max, const float *x, size_t n) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_max_abs, (unsigned)gai_cuda_parts(gai_cuda_ceil(n, GAI_CUDA_THREADS)), GAI_CUDA_THREADS, 0, max,
               x, n);
}

/* A block for each g sums over r and i. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_accumulate(double *sums, size_t g_stride, const float *x, size_t R, size_t G, size_t I) {
    double sum = 0;
    for (size_t at = threadIdx.x; at < R * I; at += blockDim.x) sum += x[(at / I * G + blockIdx.x) * I + at % I];
    sum = gai_block_total(sum);
    if (threadIdx.x == 0) sums[blockIdx.x * g_stride] += sum;
}

/* A thread for each (g, i) sums over r. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_accumulate_apart(double *sums, size_t g_stride, size_t i_stride, const float *x, size_t R, size_t G,
                           size_t I) {
    size_t at = gai_index<1>();
    if (at >= G * I) return;
    double sum = 0;
    for (size_t r = 0; r < R; r++) sum += x[r * G * I + at];
    sums[at / I * g_stride + at % I * i_stride] += sum;
}

static void gai_cuda_accumulate(void *state, double *sums, size_t g_stride, size_t i_stride, const float *x, size_t R,
                                size_t G, size_t I) {
    gai_cuda *d = (gai_cuda *)state;
    if (g_stride == 0) R *= G, G = 1; /* one sum over both */
    if (i_stride == 0 || I == 1)
        GAI_LAUNCH(d, gai_k_accumulate, (unsigned)G, GAI_CUDA_THREADS, 0, sums, g_stride, x, R, G, I);
    else
        GAI_LAUNCH(d, gai_k_accumulate_apart, gai_blocks(G * I, GAI_CUDA_THREADS), GAI_CUDA_THREADS, 0, sums, g_stride,
                   i_stride, x, R, G, I);
}

/* A block for each head. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_sdpa_sink(double *shares, const float *sink, const float *lse, size_t B, size_t T) {
    size_t HQ = gridDim.x, h = blockIdx.x;
    double sum = 0;
    for (size_t at = threadIdx.x; at < B * T; at += blockDim.x)
        sum += exp((double)sink[h] - (double)lse[(at / T * HQ + h) * T + at % T]);
    sum = gai_block_total(sum);
    if (threadIdx.x == 0) shares[h] += sum;
}

static void gai_cuda_sdpa_sink(void *state, double *shares, const float *sink, const float *lse, size_t B, size_t HQ,
                               size_t T) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_sdpa_sink, (unsigned)HQ, GAI_CUDA_THREADS, 0, shares, sink, lse, B, T);
}

static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_count_rows(double *rows, const int32_t *offsets, size_t E) {
    size_t e = gai_index<1>();
    if (e < E) rows[e] += offsets[e + 1] - offsets[e];
}

static void gai_cuda_route_counts(void *state, double *rows, const int32_t *offsets, size_t E) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_count_rows, gai_blocks(E, GAI_CUDA_THREADS), GAI_CUDA_THREADS, 0, rows, offsets, E);
}

/* Score j of row n: each once, a shared one not H times. */
static __device__ __forceinline__ float gai_one_score(const float *s, size_t j, const ga_gate &g) {
    if (g.input == GA_INPUT_SCALAR || g.sharing == GA_SPECIFIC) return gai_k_activation(s[j], g.activation);
    if (gai_cuda_elementwise(g)) return gai_shared_score<1>(s, j, g).v[0];
    float sum = 0;
    for (size_t h = 0; h < g.H; h++) sum += gai_k_activation(s[h], g.activation);
    return sum / (float)g.H;
}

enum { GAI_CUDA_SUMS = sizeof(ga_gate_sums) / sizeof(double) };

/* Of head blockIdx.y, `values` scores in each row. A thread takes every score whose number is its own plus a multiple
 * of the threads. Counts are integers, in any order; sums go from thread to thread of a block, then by
 * gai_k_add_statistics from block to block, in order. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS, 1) /* 1: else ptxas saves registers, and spills */
    gai_k_gate_statistics(ga_gate_sums *parts, const float *s, size_t s_stride, size_t N, size_t values, ga_gate g) {
    GAI_SHARED(unsigned, counts, [GA_BINS + 2]);
    GAI_SHARED(double, sums, [2][GAI_CUDA_THREADS]);
    GAI_SHARED(float, ends, [2][GAI_CUDA_THREADS]);
    for (int i = threadIdx.x; i < GA_BINS + 2; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    double sum = 0, squares = 0;
    float low = INFINITY, high = -INFINITY;
    for (size_t i = gai_index<1>(); i < N * values; i += (size_t)gridDim.x * blockDim.x) {
        float x = gai_one_score(s + i / values * s_stride, blockIdx.y * values + i % values, g);
        double bin = floor((double)x * GA_BINS);
        sum += (double)x, squares += (double)x * (double)x;
        low = fminf(low, x), high = fmaxf(high, x);
        atomicAdd(&counts[bin > 0 ? bin < GA_BINS - 1 ? (int)bin : GA_BINS - 1 : 0], 1u);
        if ((double)x < 0.1) atomicAdd(&counts[GA_BINS], 1u);
        if ((double)x < 0.5) atomicAdd(&counts[GA_BINS + 1], 1u);
    }
    sums[0][threadIdx.x] = sum, sums[1][threadIdx.x] = squares;
    ends[0][threadIdx.x] = low, ends[1][threadIdx.x] = high;
    __syncthreads();
    ga_gate_sums *part = parts + (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    for (int i = threadIdx.x; i < GA_BINS; i += blockDim.x) part->bins[i] = counts[i];
    if (threadIdx.x > 0) return;
    for (int t = 1; t < GAI_CUDA_THREADS; t++) {
        sum += sums[0][t], squares += sums[1][t];
        low = fminf(low, ends[0][t]), high = fmaxf(high, ends[1][t]);
    }
    part->sum = sum, part->sum_of_squares = squares, part->min = (double)low, part->max = (double)high;
    part->below_01 = counts[GA_BINS], part->below_05 = counts[GA_BINS + 1];
    part->count = blockIdx.x == 0 ? (double)(N * values) : 0;
}

/* Adds `count` parts to the sums of head blockIdx.x: each field by a thread of its own. */
static __global__ void __launch_bounds__(64)
    gai_k_add_statistics(ga_gate_sums *sums, const ga_gate_sums *parts, size_t count) {
    ga_gate_sums *of = sums + blockIdx.x;
    const double *fields = (const double *)(parts + blockIdx.x * count);
    size_t f = threadIdx.x, min = offsetof(ga_gate_sums, min) / sizeof(double),
           max = offsetof(ga_gate_sums, max) / sizeof(double);
    bool fresh = of->count == 0;
    __syncthreads(); /* before the thread of that field writes it */
    if (f >= GAI_CUDA_SUMS) return;
    double total = fresh && (f == min || f == max) ? fields[f] : ((double *)of)[f];
    for (size_t p = 0; p < count; p++) {
        double x = fields[p * GAI_CUDA_SUMS + f];
        total = f == min ? fmin(total, x) : f == max ? fmax(total, x) : total + x;
    }
    ((double *)of)[f] = total;
}

/* Blocks of gai_k_gate_statistics for each head: no more in all than sums have parts, but one. */
static size_t gai_cuda_gate_blocks(size_t heads, size_t scores) {
    return gai_cuda_min(gai_cuda_ceil(scores, GAI_CUDA_THREADS), gai_cuda_max(GAI_CUDA_PARTS / heads, 1));
}

static void gai_cuda_gate_statistics(void *state, ga_gate_sums *sums, const float *s, size_t s_stride, size_t N,
                                     ga_gate g) {
    gai_cuda *d = (gai_cuda *)state;
    size_t heads = g.sharing == GA_SHARED || g.input == GA_INPUT_SCALAR ? 1 : g.H;
    size_t values = gai_cuda_elementwise(g) ? g.D : 1, blocks = gai_cuda_gate_blocks(heads, N * values);
    ga_gate_sums *parts = (ga_gate_sums *)gai_cuda_scratch(d, heads * blocks * sizeof *parts);
    GAI_LAUNCH(d, gai_k_gate_statistics, dim3((unsigned)blocks, (unsigned)heads), GAI_CUDA_THREADS, 0, parts, s,
               s_stride, N, values, g);
    GAI_LAUNCH(d, gai_k_add_statistics, (unsigned)heads, 64, 0, sums, parts, blocks);
}

/* Sums of |x factor|, and how many are below two bounds, over N rows of W values. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_magnitude_statistics(ga_magnitude_sums *parts, const float *x, size_t x_stride, size_t N, size_t W,
                               double factor) {
    GAI_SHARED(unsigned, counts, [2]);
    if (threadIdx.x < 2) counts[threadIdx.x] = 0;
    __syncthreads();
    double sum = 0;
    unsigned below_1e_2 = 0, below_1e_3 = 0;
    for (size_t i = gai_index<1>(); i < N * W; i += (size_t)gridDim.x * blockDim.x) {
        double a = fabs((double)x[i / W * x_stride + i % W] * factor);
        sum += a, below_1e_2 += a < 1e-2, below_1e_3 += a < 1e-3;
    }
    atomicAdd(&counts[0], below_1e_2), atomicAdd(&counts[1], below_1e_3);
    sum = gai_block_total(sum);
    if (threadIdx.x > 0) return;
    ga_magnitude_sums *part = parts + blockIdx.x;
    part->count = blockIdx.x == 0 ? (double)(N * W) : 0, part->sum = sum;
    part->below_1e_2 = counts[0], part->below_1e_3 = counts[1];
}

static void gai_cuda_magnitude_statistics(void *state, ga_magnitude_sums *sums, const float *x, size_t x_stride,
                                          size_t N, size_t W, double factor) {
    gai_cuda *d = (gai_cuda *)state;
    enum { FIELDS = sizeof *sums / sizeof(double) };
    size_t blocks = gai_cuda_parts(gai_cuda_ceil(N * W, GAI_CUDA_THREADS));
    ga_magnitude_sums *parts = (ga_magnitude_sums *)gai_cuda_scratch(d, blocks * sizeof *parts);
    GAI_LAUNCH(d, gai_k_magnitude_statistics, (unsigned)blocks, GAI_CUDA_THREADS, 0, parts, x, x_stride, N, W, factor);
    GAI_LAUNCH(d, gai_k_add_doubles, 1, 32, 0, (double *)sums, (const double *)parts, blocks, FIELDS);
}

/* |x|'s bits above, the column's distance from the end below: the maximum is the largest, and of equal ones the
 * first. */
static __device__ __forceinline__ unsigned long long gai_max_key(float x, size_t c) {
    unsigned bits = __float_as_uint(x) & 0x7fffffffu;
    if (bits > 0x7f800000u) bits = 0x7fc00000u; /* every NaN is the same */
    return (unsigned long long)bits << 32 | (0xffffffffu - (unsigned)c);
}

/* A warp for each row. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_max_abs_rows(float *max, float *at, const float *x, size_t N, size_t C) {
    size_t n = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (n >= N) return; /* the whole warp */
    unsigned long long top = gai_max_key(0, 0);
    for (size_t c = threadIdx.x % 32; c < C; c += 32) {
        unsigned long long key = gai_max_key(x[n * C + c], c);
        top = key > top ? key : top;
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        unsigned long long other = __shfl_xor_sync(GAI_WARP, top, o);
        top = other > top ? other : top;
    }
    if (threadIdx.x % 32 > 0) return;
    max[n] = __uint_as_float((unsigned)(top >> 32));
    at[n] = (float)(0xffffffffu - (unsigned)top);
}

static void gai_cuda_max_abs_rows(void *state, float *max, float *at, const float *x, size_t N, size_t C) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_max_abs_rows, gai_blocks(N, GAI_CUDA_THREADS / 32), GAI_CUDA_THREADS, 0, max, at, x, N, C);
}

/* Part blockIdx.y of the rows, a thread for each column. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_max_abs_columns(double *max, const float *x, size_t N, size_t C) {
    size_t c = gai_index<1>();
    if (c >= C) return;
    unsigned top = 0;
    for (size_t n = N * blockIdx.y / gridDim.y; n < N * (blockIdx.y + 1) / gridDim.y; n++) {
        unsigned bits = __float_as_uint(x[n * C + c]) & 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    gai_keep_largest(max + c, top);
}

static void gai_cuda_max_abs_columns(void *state, double *max, const float *x, size_t N, size_t C) {
    gai_cuda *d = (gai_cuda *)state;
    dim3 grid(gai_blocks(C, GAI_CUDA_THREADS), (unsigned)gai_cuda_parts(gai_cuda_ceil(N, 16)));
    GAI_LAUNCH(d, gai_k_max_abs_columns, grid, GAI_CUDA_THREADS, 0, max, x, N, C);
}

/* Block 0 looks for the peak; the others have a thread for each position. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_keep_peaks(double *max_at, ga_peak *peak, const float *max, const float *at, const int32_t *tokens, size_t N,
                     size_t T) {
    GAI_SHARED(unsigned long long, tops, [GAI_CUDA_THREADS / 32]);
    size_t t = (size_t)(blockIdx.x - 1) * blockDim.x + threadIdx.x;
    for (size_t n = t; blockIdx.x > 0 && t < T && n < N; n += T)
        gai_keep_largest(max_at + t, __float_as_uint(max[n]) & 0x7fffffffu);
    if (blockIdx.x > 0) return; /* the whole block */
    unsigned long long top = 0;
    for (size_t n = threadIdx.x; n < N; n += blockDim.x) {
        unsigned long long key = gai_max_key(max[n], n);
        top = key > top ? key : top;
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        unsigned long long other = __shfl_xor_sync(GAI_WARP, top, o);
        top = other > top ? other : top;
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < GAI_CUDA_THREADS / 32; warp++) top = tops[warp] > top ? tops[warp] : top;
    size_t n = 0xffffffffu - (unsigned)top;
    double value = (double)max[n];
    if (peak->token >= 0 && (value <= peak->value || peak->value != peak->value)) return;
    peak->value = value, peak->position = n % T, peak->dimension = (size_t)at[n], peak->token = tokens[n];
}

static void gai_cuda_keep_peaks(void *state, double *max_at, ga_peak *peak, const float *max, const float *at,
                                const int32_t *tokens, size_t N, size_t T) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_keep_peaks, 1 + gai_blocks(T, GAI_CUDA_THREADS), GAI_CUDA_THREADS, 0, max_at, peak, max, at,
               tokens, N, T);
}

static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_row_norms(float *norms, const float *x, size_t N, size_t D) {
    size_t n = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (n >= N) return; /* the whole warp */
    float sum = 0;
    for (size_t i = threadIdx.x % 32; i < D; i += 32) sum += x[n * D + i] * x[n * D + i];
    sum = gai_warp_sum(sum);
    if (threadIdx.x % 32 == 0) norms[n] = sqrtf(sum);
}

static void gai_cuda_row_norms(void *state, float *norms, const float *x, size_t N, size_t D) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_row_norms, gai_blocks(N, GAI_CUDA_THREADS / 32), GAI_CUDA_THREADS, 0, norms, x, N, D);
}

/* A block for each 16 x 16 of a head's moments, a thread for each of them; 16 rows of x at a time in shared memory. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_head_moments(double *moments, const float *x, size_t N, size_t H, size_t D) {
    GAI_SHARED(float, left, [16][16]);
    GAI_SHARED(float, right, [16][16]);
    int row = threadIdx.x / 16, column = threadIdx.x % 16;
    size_t h = blockIdx.z, i0 = (size_t)blockIdx.y * 16, j0 = (size_t)blockIdx.x * 16;
    double sum = 0;
    for (size_t n0 = 0; n0 < N; n0 += 16) {
        const float *xh = x + ((n0 + row) * H + h) * D;
        left[row][column] = n0 + row < N && i0 + column < D ? xh[i0 + column] : 0;
        right[row][column] = n0 + row < N && j0 + column < D ? xh[j0 + column] : 0;
        __syncthreads();
        for (int n = 0; n < 16; n++) sum += (double)left[n][row] * (double)right[n][column];
        __syncthreads(); /* before the next rows are written over these */
    }
    if (i0 + row < D && j0 + column < D) moments[(h * D + i0 + row) * D + j0 + column] += sum;
}

static void gai_cuda_head_moments(void *state, double *moments, const float *x, size_t N, size_t H, size_t D) {
    gai_cuda *d = (gai_cuda *)state;
    unsigned tiles = gai_blocks(D, 16);
    GAI_LAUNCH(d, gai_k_head_moments, dim3(tiles, tiles, (unsigned)H), GAI_CUDA_THREADS, 0, moments, x, N, H, D);
}

static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_scale_rows(float *x, size_t x_stride, size_t N, size_t W, float factor) {
    size_t i = gai_index<1>(), at = i / W * x_stride + i % W;
    if (i < N * W) x[at] = factor == 0 ? 0 : x[at] * factor;
}

static void gai_cuda_scale_rows(void *state, float *x, size_t x_stride, size_t N, size_t W, float factor) {
    gai_cuda *d = (gai_cuda *)state;
    GAI_LAUNCH(d, gai_k_scale_rows, gai_blocks(N * W, GAI_CUDA_THREADS), GAI_CUDA_THREADS, 0, x, x_stride, N, W,
               factor);
}

/* A block for each query, (B, HQ, T): its warps take the keys that it sees. */
static __global__ void __launch_bounds__(128) gai_k_attention_entropy(float *entropy, const float *q, const float *k,
                                                                      const float *lse, bool bf16, gai_attention n) {
    int i = blockIdx.x % n.T, head = blockIdx.x / n.T;
    gai_head at = gai_head_at(head / n.HQ, head % n.HQ, n);
    float sum = 0;
    for (int j = threadIdx.x / 32; j <= n.S - n.T + i; j += blockDim.x / 32) {
        float log_p = gai_log_p(q + at.q + i * at.q_stride, k + at.kv + j * at.kv_stride, lse[at.row + i], bf16, n);
        sum -= expf(log_p) * log_p;
    }
    sum = gai_block_sum(threadIdx.x % 32 == 0 ? sum : 0);
    if (threadIdx.x == 0) entropy[blockIdx.x] = sum;
}

/* A block for each key, (B, HQ, S): its warps take the queries that see it. */
static __global__ void __launch_bounds__(128) gai_k_attention_received(float *received, const float *q, const float *k,
                                                                       const float *lse, bool bf16, gai_attention n) {
    int j = blockIdx.x % n.S, head = blockIdx.x / n.S, first = j > n.S - n.T ? j - (n.S - n.T) : 0;
    gai_head at = gai_head_at(head / n.HQ, head % n.HQ, n);
    float sum = 0;
    for (int i = first + (int)threadIdx.x / 32; i < n.T; i += (int)blockDim.x / 32)
        sum += expf(gai_log_p(q + at.q + i * at.q_stride, k + at.kv + j * at.kv_stride, lse[at.row + i], bf16, n));
    sum = gai_block_sum(threadIdx.x % 32 == 0 ? sum : 0);
    if (threadIdx.x == 0) received[blockIdx.x] = sum;
}

static void gai_cuda_sdpa_statistics(void *state, float *received, float *entropy, const float *q, const float *k,
                                     const float *lse, ga_shape n) {
    gai_cuda *d = (gai_cuda *)state;
    bool flash = gai_takes_flash(d, n, gai_bits(q, k));
    size_t heads = n.B * n.HQ;
    GAI_LAUNCH(d, gai_k_attention_entropy, (unsigned)(heads * n.T), 128, 0, entropy, q, k, lse, flash,
               gai_attention_of(n));
    GAI_LAUNCH(d, gai_k_attention_received, (unsigned)(heads * n.S), 128, 0, received, q, k, lse, flash,
               gai_attention_of(n));
}

/* ---- ranks ------------------------------------------------------------------------------------------------------- */

#ifdef GA_NCCL

/* clang-format off */
#define GAI_NCCL_FUNCTIONS(X)                                                                                          \
    X(GetVersion) X(GetUniqueId) X(GetErrorString) X(GetLastError) X(CommInitRankConfig) X(CommGetAsyncError)          \
    X(CommFinalize) X(CommDestroy) X(CommAbort) X(GroupStart) X(GroupEnd) X(AllReduce) X(ReduceScatter) X(AllGather)   \
    X(Send) X(Recv)
/* clang-format on */

typedef struct {
#define GAI_X(name) decltype(&nccl##name) name;
    GAI_NCCL_FUNCTIONS(GAI_X)
#undef GAI_X
} gai_nccl;

enum {
    GAI_RANKS_BYTES = 32 << 10, /* of the host's values at one time */
    GAI_RANKS_PATIENCE = 10     /* most seconds that the end waits for a communicator that is aborted */
};

/* An exchange runs on a stream of its own, after what the device's stream had been given before; the device's stream
 * waits for it when it is told to. A second thread looks after the other ranks: only it can end an exchange that would
 * never end, since this one may stand in any call that waits for the GPU. */
struct gai_cuda_ranks {
    gai_cuda *device;
    ga_cuda_ranks_settings settings;
    gai_nccl nccl;
    cudaStream_t stream;
    cudaEvent_t computed, exchanged;
    volatile unsigned char *mark; /* in the host's memory, set by the stream: odd while an exchange is under way */
    unsigned char marks;          /* what it is set to by all that is in the stream */
    char *values;                 /* GAI_RANKS_BYTES of the host, on their way */
    __nv_bfloat16 *halves;        /* GAI_RANKS_HALVES gradients on their way out, and as many that came in */
    pthread_t watcher;
    bool watched;

    pthread_mutex_t lock; /* of what both threads use: */
    ncclComm_t comm;      /* NULL before the beginning, and after a failure */
    ga_error failure;     /* the first, for good */
    bool stop, stopped;   /* the watcher is to end, and has nothing more to do */
};
typedef struct gai_cuda_ranks gai_cuda_ranks;

static double gai_seconds() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void gai_nap(double seconds) {
    const struct timespec t = {0, (long)(seconds * 1e9)};
    nanosleep(&t, NULL);
}

/* ---- ranks: failures, and who notices them ---- */

static void gai_ranks_fail(gai_cuda_ranks *r, const char *file, int line, const char *call, const char *word) {
    if (r->failure.result != GA_OK) return;
    const char *name = strrchr(file, '/');
    r->failure.result = GA_ERR_DEVICE;
    snprintf(r->failure.text, sizeof r->failure.text, "%s:%d: %s: %s", name ? name + 1 : file, line, call, word);
}

/* A failure of the ranks is one of the device: what it has computed since may be anything. */
static void gai_cuda_take_failure(gai_cuda *d) {
    if (!d->ranks) return;
    pthread_mutex_lock(&d->ranks->lock);
    if (d->error.result == GA_OK) d->error = d->ranks->failure;
    pthread_mutex_unlock(&d->ranks->lock);
}

/* What NCCL says of a failure, in one line. */
static void gai_nccl_explain(const gai_cuda_ranks *r, ncclResult_t result, char *text, size_t size) {
    snprintf(text, size, "%s: %.200s", r->nccl.GetErrorString(result), r->nccl.GetLastError(r->comm));
    for (char *end; (end = strchr(text, '\n'));) *end = ' ';
}

/* What the communicator says of the latest call. */
static ncclResult_t gai_nccl_state(const gai_cuda_ranks *r) {
    ncclResult_t state = ncclSuccess;
    return r->nccl.CommGetAsyncError(r->comm, &state) == ncclSuccess ? state : ncclInternalError;
}

/* An exchange that has had its turn on the GPU, and takes its time: what the GPU computed before does not count. */
typedef struct {
    unsigned char mark;
    double since;
} gai_ranks_clock;

static bool gai_ranks_late(const gai_cuda_ranks *r, gai_ranks_clock *clock) {
    unsigned char mark = *r->mark;
    if (mark != clock->mark || mark % 2 == 0) clock->mark = mark, clock->since = gai_seconds();
    return gai_seconds() > clock->since + r->settings.timeout;
}

/* Why the ranks cannot go on; NULL: they can. */
static const char *gai_ranks_trouble(gai_cuda_ranks *r, gai_ranks_clock *clock, ga_error *e) {
    ga_cuda_rendezvous meeting = r->settings.rendezvous;
    ncclResult_t state = ncclSuccess;
    if (meeting.all_alive && !meeting.all_alive(meeting.state, e)) return e->text;
    if (r->comm) state = gai_nccl_state(r);
    if (state != ncclSuccess && state != ncclInProgress) {
        gai_nccl_explain(r, state, e->text, sizeof e->text);
        return e->text;
    }
    return gai_ranks_late(r, clock) ? "the other ranks do not answer" : NULL;
}

/* The second thread. It ends the exchanges where there is trouble, so that the GPU comes to the end of its streams.
 * Where a rank has been killed, ncclCommAbort may itself wait for ever: it runs without the lock. */
static void *gai_ranks_watch(void *state) {
    gai_cuda_ranks *r = (gai_cuda_ranks *)state;
    ga_error e = {GA_OK, ""};
    gai_ranks_clock clock = {0, 0};
    const char *trouble = cudaSetDevice(r->device->index) == cudaSuccess ? NULL : "cudaSetDevice fails";
    for (bool stop = false; !stop; gai_nap(0.02)) {
        ncclComm_t ended = NULL;
        pthread_mutex_lock(&r->lock);
        if (!trouble && r->failure.result == GA_OK) trouble = gai_ranks_trouble(r, &clock, &e);
        if (trouble) gai_ranks_fail(r, __FILE__, __LINE__, "exchange", trouble);
        if (r->failure.result != GA_OK) ended = r->comm, r->comm = NULL;
        stop = r->stop;
        pthread_mutex_unlock(&r->lock);
        if (ended) (void)r->nccl.CommAbort(ended);
    }
    pthread_mutex_lock(&r->lock);
    r->stopped = true;
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* Before a call of NCCL: nobody takes the communicator away until gai_nccl_leave. False: something has failed
 * before. */
static bool gai_nccl_enter(gai_cuda_ranks *r) {
    pthread_mutex_lock(&r->lock);
    if (r->device->error.result == GA_OK) r->device->error = r->failure;
    if (r->device->error.result == GA_OK) return true;
    pthread_mutex_unlock(&r->lock);
    return false;
}

/* After it: the communicator does not block, so that a call may go on after it has returned, of some versions also
 * after it has returned ncclSuccess. It is over when the communicator's state says so. */
static bool gai_nccl_leave(gai_cuda_ranks *r, ncclResult_t result, const char *file, int line, const char *call) {
    double deadline = gai_seconds() + r->settings.timeout;
    if (result == ncclSuccess && r->comm) result = gai_nccl_state(r);
    while (result == ncclInProgress && r->failure.result == GA_OK) {
        pthread_mutex_unlock(&r->lock);
        gai_nap(20e-6);
        pthread_mutex_lock(&r->lock);
        if (gai_seconds() > deadline) gai_ranks_fail(r, file, line, call, "the other ranks do not answer");
        if (r->comm) result = gai_nccl_state(r);
    }
    if (result != ncclSuccess) {
        char word[300];
        gai_nccl_explain(r, result, word, sizeof word);
        gai_ranks_fail(r, file, line, call, word);
    }
    pthread_mutex_unlock(&r->lock);
    gai_cuda_take_failure(r->device);
    return r->device->error.result == GA_OK;
}

/* Makes a call of NCCL, unless one has failed before; whether all is well. */
#define GAI_NCCL(r, call) (gai_nccl_enter(r) && gai_nccl_leave((r), (call), __FILE__, __LINE__, #call))

/* ---- ranks: exchanges ---- */

static bool gai_ranks_set_mark(gai_cuda_ranks *r) {
    return GAI_CUDA(r->device, cudaMemsetAsync((void *)r->mark, ++r->marks, 1, r->stream));
}

/* The exchange that follows begins when the device's stream has come this far. */
static bool gai_ranks_begin(gai_cuda_ranks *r) {
    gai_cuda *d = r->device;
    return GAI_CUDA(d, cudaEventRecord(r->computed, d->stream)) &&
           GAI_CUDA(d, cudaStreamWaitEvent(r->stream, r->computed, 0)) && gai_ranks_set_mark(r);
}

/* All exchanges up to here are what gai_ranks_wait waits for. */
static void gai_ranks_begun(gai_cuda_ranks *r) {
    if (gai_ranks_set_mark(r)) (void)GAI_CUDA(r->device, cudaEventRecord(r->exchanged, r->stream));
}

static ga_result gai_cuda_ranks_status(void *state, ga_error *e) {
    return gai_cuda_status(((gai_cuda_ranks *)state)->device, e);
}

static void gai_cuda_ranks_wait(void *state) {
    gai_cuda_ranks *r = (gai_cuda_ranks *)state;
    (void)GAI_CUDA(r->device, cudaStreamWaitEvent(r->device->stream, r->exchanged, 0));
}

/* n values of each rank's part, one behind the other in bfloat16. All sizes are multiples of 4. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_pack_parts(__nv_bfloat16 *y, const float *x, size_t per_rank, size_t n, size_t count) {
    size_t i = gai_index<4>();
    if (i < count * n) gai_store<4>(y + i, gai_load<4>(x + i / n * per_rank + i % n));
}

/* x += what the other ranks have sent, in float32. */
static __global__ void __launch_bounds__(GAI_CUDA_THREADS)
    gai_k_add_parts_bf16(float *x, const __nv_bfloat16 *parts, size_t n, size_t count, size_t rank) {
    size_t i = gai_index<4>();
    if (i >= n) return;
    gai_pack<4> sum = gai_load<4>(x + i);
    for (size_t r = 0; r < count; r++) {
        if (r == rank) continue;
        uint2 bits = *reinterpret_cast<const uint2 *>(parts + r * n + i);
        sum.v[0] += __uint_as_float(bits.x << 16), sum.v[1] += __uint_as_float(bits.x & 0xffff0000u);
        sum.v[2] += __uint_as_float(bits.y << 16), sum.v[3] += __uint_as_float(bits.y & 0xffff0000u);
    }
    gai_store<4>(x + i, sum);
}

static size_t gai_ranks_halves_bytes(const gai_cuda_ranks *r) {
    return r && r->settings.bf16 && !r->halves ? 2 * GAI_RANKS_HALVES * sizeof *r->halves : 0;
}

/* In a group a call is noted down, whatever the communicator's state. */
static bool gai_nccl_noted(ncclResult_t result) {
    return result == ncclSuccess || result == ncclInProgress;
}

/* To each other rank its n values, and from each of them n of one's own. */
static ncclResult_t gai_nccl_swap(const gai_cuda_ranks *r, __nv_bfloat16 *in, const __nv_bfloat16 *out, size_t n) {
    ncclResult_t result = r->nccl.GroupStart(), end;
    if (result != ncclSuccess) return result;
    for (int i = 0; i < (int)r->settings.count && gai_nccl_noted(result); i++) {
        if (i == (int)r->settings.rank) continue;
        result = r->nccl.Send(out + i * n, n, ncclBfloat16, i, r->comm, r->stream);
        if (gai_nccl_noted(result)) result = r->nccl.Recv(in + i * n, n, ncclBfloat16, i, r->comm, r->stream);
    }
    end = r->nccl.GroupEnd();
    return gai_nccl_noted(result) ? end : result;
}

/* A slice of every part at a time. The sums stay in float32, as those of ncclReduceScatter in bfloat16 would not; the
 * bytes that travel are as many. */
static void gai_ranks_reduce_scatter_bf16(gai_cuda_ranks *r, float *x, size_t per_rank) {
    gai_cuda *d = r->device;
    size_t rank = r->settings.rank, count = r->settings.count, most = GAI_RANKS_HALVES / count / 4 * 4;
    size_t bytes = gai_ranks_halves_bytes(r);
    if (bytes && !GAI_CUDA(d, cudaMalloc((void **)&r->halves, bytes))) return;
    __nv_bfloat16 *out = r->halves, *in = out + GAI_RANKS_HALVES;
    for (size_t at = 0; at < per_rank; at += most) {
        size_t n = gai_cuda_min(most, per_rank - at);
        GAI_LAUNCH_INTO(r->stream, d, gai_k_pack_parts, gai_blocks(count * n, 4 * GAI_CUDA_THREADS), GAI_CUDA_THREADS,
                        0, out, x + at, per_rank, n, count);
        if (!GAI_NCCL(r, gai_nccl_swap(r, in, out, n))) return;
        GAI_LAUNCH_INTO(r->stream, d, gai_k_add_parts_bf16, gai_blocks(n, 4 * GAI_CUDA_THREADS), GAI_CUDA_THREADS, 0,
                        x + rank * per_rank + at, in, n, count, rank);
    }
}

static void gai_cuda_reduce_scatter(void *state, float *x, size_t per_rank) {
    gai_cuda_ranks *r = (gai_cuda_ranks *)state;
    float *mine = x + r->settings.rank * per_rank;
    if (!gai_ranks_begin(r)) return;
    if (r->settings.bf16)
        gai_ranks_reduce_scatter_bf16(r, x, per_rank);
    else
        (void)GAI_NCCL(r, r->nccl.ReduceScatter(x, mine, per_rank, ncclFloat32, ncclSum, r->comm, r->stream));
    gai_ranks_begun(r);
}

static void gai_cuda_all_gather(void *state, float *x, size_t per_rank) {
    gai_cuda_ranks *r = (gai_cuda_ranks *)state;
    float *mine = x + r->settings.rank * per_rank;
    if (!gai_ranks_begin(r)) return;
    (void)GAI_NCCL(r, r->nccl.AllGather(mine, x, per_rank, ncclFloat32, r->comm, r->stream));
    gai_ranks_begun(r);
}

/* Values of the host: to the device, exchanged there, and back. */
static void gai_cuda_sum(void *state, double *values, size_t n) {
    gai_cuda_ranks *r = (gai_cuda_ranks *)state;
    gai_cuda *d = r->device;
    const size_t most = GAI_RANKS_BYTES / sizeof *values;
    for (size_t at = 0; at < n; at += most) {
        size_t count = gai_cuda_min(most, n - at), bytes = count * sizeof *values;
        if (!GAI_CUDA(d, cudaMemcpyAsync(r->values, values + at, bytes, cudaMemcpyHostToDevice, r->stream)) ||
            !gai_ranks_set_mark(r) ||
            !GAI_NCCL(r, r->nccl.AllReduce(r->values, r->values, count, ncclFloat64, ncclSum, r->comm, r->stream)))
            return;
        gai_ranks_begun(r);
        if (!GAI_CUDA(d, cudaMemcpyAsync(values + at, r->values, bytes, cudaMemcpyDeviceToHost, r->stream)) ||
            !GAI_CUDA(d, cudaStreamSynchronize(r->stream)))
            return;
    }
}

/* By the way in which the ranks have found each other: no time limit, and no GPU that waits. What was begun before ends
 * before: that has a limit. */
static void gai_cuda_broadcast(void *state, void *values, size_t bytes) {
    gai_cuda_ranks *r = (gai_cuda_ranks *)state;
    ga_cuda_rendezvous meeting = r->settings.rendezvous;
    ga_error e = {GA_OK, ""};
    if (!GAI_CUDA(r->device, cudaStreamSynchronize(r->stream))) return;
    gai_cuda_take_failure(r->device);
    if (r->device->error.result != GA_OK || meeting.share(meeting.state, values, bytes, &e)) return;
    pthread_mutex_lock(&r->lock);
    gai_ranks_fail(r, __FILE__, __LINE__, "broadcast", e.text);
    pthread_mutex_unlock(&r->lock);
    gai_cuda_take_failure(r->device);
}

/* ---- ranks: beginning and end ---- */

static bool gai_ranks_load(gai_cuda_ranks *r) {
    gai_cuda *d = r->device;
    int version = 0;
    setenv("NCCL_NVLS_ENABLE", "0", 0); /* NVLink's switches add in no fixed order: not the same bits in every run */
    void *library = dlopen(GAI_NCCL_LIBRARY, RTLD_NOW); /* it stays to the end */
    const char *missing = library ? NULL : "dlopen";
#define GAI_X(name) \
    if (!missing && !(*(void **)&r->nccl.name = dlsym(library, "nccl" #name))) missing = "nccl" #name;
    GAI_NCCL_FUNCTIONS(GAI_X)
#undef GAI_X
    if (missing) {
        gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, missing, dlerror());
        return false;
    }
    if (!GAI_NCCL(r, r->nccl.GetVersion(&version))) return false;
    if (version < NCCL_VERSION_CODE) {
        char word[80];
        snprintf(word, sizeof word, "version %d, but compiled for %d", version, NCCL_VERSION_CODE);
        gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, "libnccl.so.2", word);
        return false;
    }
    return true;
}

/* Exchanges begin before the products that were launched earlier are all done: their stream goes first. */
static bool gai_ranks_streams(gai_cuda_ranks *r) {
    gai_cuda *d = r->device;
    int least = 0, greatest = 0;
    return GAI_CUDA(d, cudaDeviceGetStreamPriorityRange(&least, &greatest)) &&
           GAI_CUDA(d, cudaStreamCreateWithPriority(&r->stream, cudaStreamNonBlocking, greatest)) &&
           GAI_CUDA(d, cudaEventCreateWithFlags(&r->computed, cudaEventDisableTiming)) &&
           GAI_CUDA(d, cudaEventCreateWithFlags(&r->exchanged, cudaEventDisableTiming)) &&
           GAI_CUDA(d, cudaMallocHost((void **)&r->mark, 1)) && (*r->mark = 0, true) &&
           GAI_CUDA(d, cudaMalloc((void **)&r->values, GAI_RANKS_BYTES));
}

static bool gai_ranks_watched(gai_cuda_ranks *r) {
    int wrong = pthread_create(&r->watcher, NULL, gai_ranks_watch, r);
    r->watched = wrong == 0;
    if (wrong) gai_cuda_fail(r->device, GA_ERR_DEVICE, __FILE__, __LINE__, "pthread_create", strerror(wrong));
    return r->watched;
}

/* The first exchange shows whether all are there. */
static void gai_ranks_meet(gai_cuda_ranks *r) {
    gai_cuda *d = r->device;
    ga_cuda_ranks_settings s = r->settings;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclUniqueId id;
    ga_error e = {GA_OK, ""};
    memset(&id, 0, sizeof id);
    if (s.rank == 0 && !GAI_NCCL(r, r->nccl.GetUniqueId(&id))) return;
    if (!s.rendezvous.share(s.rendezvous.state, &id, sizeof id, &e)) {
        gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, "rendezvous", e.text);
        return;
    }
    double ranks = 1;
    if (!gai_ranks_watched(r) ||
        !GAI_NCCL(r, r->nccl.CommInitRankConfig(&r->comm, (int)s.count, id, (int)s.rank, &config)))
        return;
    gai_cuda_sum(r, &ranks, 1);
    if (ranks != (double)s.count)
        gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, "first exchange", "it does not count the ranks");
}

/* Ends the second thread; false: it does not come back from ncclCommAbort. */
static bool gai_ranks_unwatch(gai_cuda_ranks *r) {
    double deadline = gai_seconds() + fmin(GAI_RANKS_PATIENCE, r->settings.timeout);
    bool stopped = !r->watched;
    pthread_mutex_lock(&r->lock);
    r->stop = true;
    pthread_mutex_unlock(&r->lock);
    for (; !stopped && gai_seconds() < deadline; gai_nap(0.001)) {
        pthread_mutex_lock(&r->lock);
        stopped = r->stopped;
        pthread_mutex_unlock(&r->lock);
    }
    if (stopped && r->watched) pthread_join(r->watcher, NULL);
    return stopped;
}

static void gai_ranks_close(gai_cuda_ranks *r, bool failed) {
    gai_cuda *d = r->device;
    bool finished = !failed && GAI_NCCL(r, r->nccl.CommFinalize(r->comm));
    pthread_mutex_lock(&r->lock);
    if (!finished) gai_ranks_fail(r, __FILE__, __LINE__, "exchange", "this rank has given up");
    pthread_mutex_unlock(&r->lock);
    d->ranks = NULL;
    if (!gai_ranks_unwatch(r)) return; /* the process ends: what that thread still uses ends with it */
    if (r->comm) (void)r->nccl.CommDestroy(r->comm);
    if (r->exchanged) (void)cudaEventDestroy(r->exchanged);
    if (r->computed) (void)cudaEventDestroy(r->computed);
    if (r->stream) (void)cudaStreamDestroy(r->stream);
    (void)cudaFreeHost((void *)r->mark);
    (void)cudaFree(r->values);
    (void)cudaFree(r->halves);
    (void)cudaGetLastError(); /* nobody is to take it for an error of his own */
    pthread_mutex_destroy(&r->lock);
    free(r);
}

ga_result ga_ranks_cuda(ga_ranks *ranks, ga_device *device, const ga_cuda_ranks_settings *settings, ga_error *e) {
    gai_cuda *d = (gai_cuda *)device->state;
    gai_cuda_ranks *r = (gai_cuda_ranks *)calloc(1, sizeof *r);
    memset(ranks, 0, sizeof *ranks);
    if (!r) {
        gai_cuda_fail(d, GA_ERR_MEMORY, __FILE__, __LINE__, "calloc", "no memory for the ranks");
        return gai_cuda_status(d, e);
    }
    r->device = d, r->settings = *settings, d->ranks = r;
    pthread_mutex_init(&r->lock, NULL);
    if (gai_ranks_load(r) && gai_ranks_streams(r)) gai_ranks_meet(r);
    ga_result result = gai_cuda_status(d, e);
    if (result != GA_OK) {
        gai_ranks_close(r, true);
        return result;
    }
    ranks->rank = settings->rank, ranks->count = settings->count, ranks->state = r;
    ranks->reduce_scatter = gai_cuda_reduce_scatter, ranks->all_gather = gai_cuda_all_gather;
    ranks->wait = gai_cuda_ranks_wait, ranks->status = gai_cuda_ranks_status;
    ranks->sum = gai_cuda_sum, ranks->broadcast = gai_cuda_broadcast;
    return GA_OK;
}

void ga_ranks_cuda_destroy(ga_ranks *ranks, bool failed) {
    if (ranks->state) gai_ranks_close((gai_cuda_ranks *)ranks->state, failed);
    memset(ranks, 0, sizeof *ranks);
}

#else

static void gai_cuda_take_failure(gai_cuda *) {}

static size_t gai_ranks_halves_bytes(const struct gai_cuda_ranks *) {
    return 0;
}

ga_result ga_ranks_cuda(ga_ranks *ranks, ga_device *, const ga_cuda_ranks_settings *, ga_error *e) {
    ga_error none = {GA_ERR_DEVICE, "several GPUs need NCCL: its header nccl.h was not there at build time"};
    memset(ranks, 0, sizeof *ranks);
    if (e) *e = none;
    return none.result;
}

void ga_ranks_cuda_destroy(ga_ranks *, bool) {}

#endif

/* ---- device ------------------------------------------------------------------------------------------------------ */

/* Memory beside the model's own blocks: packed weights, and the scratch of the most demanding operator. */
static size_t gai_cuda_own_bytes(void *state, const ga_config *c, ga_mode mode) {
    gai_cuda *d = (gai_cuda *)state;
    ga_sizes z = ga_sizes_of(c);
    ga_gate g = ga_gate_of(c);
    ga_summary summary;
    if (ga_summarize(c, mode, &summary, NULL) != GA_OK) return 0;
    size_t N = c->batch_size * c->max_seq_len, rows = gai_cuda_head_rows(d, N, z.V), scratch;
    size_t products[][2] = {{z.C, z.Z}, {z.HQ * z.D, z.C},   {z.C, 2 * z.F},
                            {z.F, z.C}, {z.C, z.G_channels}, {z.C, z.E}}; /* columns in and out */
    scratch = gai_cuda_operand_bytes(d, rows * z.C) + gai_cuda_operand_bytes(d, rows * z.V);
    for (size_t i = 0; i < sizeof products / sizeof *products; i++) {
        size_t gradients = mode == GA_TRAINING ? gai_cuda_operand_bytes(d, N * products[i][1]) : 0;
        scratch = gai_cuda_max(scratch, gai_cuda_operand_bytes(d, N * products[i][0]) + gradients);
    }
    size_t columns = gai_cuda_max(gai_cuda_max(z.C, z.D), z.E + 1), free_gate = z.G_free ? g.H * g.D : 0;
    scratch = gai_cuda_max(scratch, GAI_CUDA_PARTS * columns * sizeof(float));
    scratch = gai_cuda_max(scratch, (GAI_CUDA_PARTS + 1) * free_gate * sizeof(float));
    scratch = gai_cuda_max(scratch, gai_cuda_max(GAI_CUDA_PARTS, g.H) * sizeof(ga_gate_sums));
    size_t rounded_heads = z.HK + (mode == GA_TRAINING ? z.HQ : 0);
    if (d->bf16 && z.D <= 128)
        scratch = gai_cuda_max(scratch, gai_flash_bytes(c->batch_size, rounded_heads, c->max_seq_len, z.D));
#ifdef GA_CUDNN
    scratch = gai_cuda_max(scratch, gai_cudnn_prepare_for(d, c, mode));
#endif
    d->reserved = scratch;
    size_t packed = d->bf16 ? summary.weight_bytes / sizeof(float) * sizeof(__nv_bfloat16) : 0;
    return packed + (scratch > d->scratch_bytes ? scratch : 0) + gai_ranks_halves_bytes(d->ranks);
}

/* Less what the driver takes later: kernels are loaded when they first run, and blocks are rounded up to 2 MiB. */
static size_t gai_cuda_free_bytes(void *state) {
    size_t available, total;
    if (!GAI_CUDA((gai_cuda *)state, cudaMemGetInfo(&available, &total))) return SIZE_MAX;
    return available > GAI_CUDA_DRIVER ? available - GAI_CUDA_DRIVER : 0;
}

/* Whether there are GPUs, and how many. A driver that is older than the toolkit is the usual reason why there are
 * none. */
static bool gai_cuda_count(gai_cuda *d, int *count) {
    int knows = 0, wants = 0;
    char word[160] = "there is no NVIDIA driver";
    if (!GAI_CUDA(d, cudaDriverGetVersion(&knows)) || !GAI_CUDA(d, cudaRuntimeGetVersion(&wants))) return false;
    cudaError_t e = cudaGetDeviceCount(count);
    if (e != cudaErrorInsufficientDriver) return gai_cuda_checked(d, e, __FILE__, __LINE__, "cudaGetDeviceCount");
    if (knows > 0)
        snprintf(
            word, sizeof word,
            "the driver knows CUDA %d.%d, and this was built with CUDA %d.%d: it takes a newer driver, or an older "
            "toolkit",
            knows / 1000, knows % 1000 / 10, wants / 1000, wants % 1000 / 10);
    (void)cudaGetLastError();
    gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, "cudaGetDeviceCount", word);
    return false;
}

/* Whether kernels were compiled for this GPU, or such that the driver can compile them on. From those for 7.5 it makes
 * some that run on any later GPU, and compute nothing on tensor cores. */
static bool gai_cuda_has_kernels(gai_cuda *d) {
    cudaFuncAttributes kernel;
    cudaError_t e = cudaFuncGetAttributes(&kernel, (const void *)gai_k_add_parts);
    bool there = e != cudaErrorNoKernelImageForDevice && e != cudaErrorUnsupportedPtxVersion;
    int major = d->properties.major, minor = d->properties.minor;
    if (there && !gai_cuda_checked(d, e, __FILE__, __LINE__, "cudaFuncGetAttributes")) return false;
    if (there && (major < 8 || kernel.ptxVersion >= 80)) return true;
    char word[256];
    snprintf(word, sizeof word, "%s; make -B CUDA_ARCH=-arch=sm_%d%d compiles for it",
             there ? "kernels were compiled for older GPUs only" : cudaGetErrorString(e), major, minor);
    (void)cudaGetLastError();
    gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, d->properties.name, word);
    return false;
}

static ga_result gai_cuda_open(gai_cuda *d, ga_cuda_settings settings) {
    int count = 0;
    if (!gai_cuda_count(d, &count)) return d->error.result;
    if (settings.index < 0 || settings.index >= count) {
        char word[64];
        snprintf(word, sizeof word, "there are %d", count);
        gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, "no such GPU", word);
        return d->error.result;
    }
    d->index = settings.index;
    if (!GAI_CUDA(d, cudaSetDevice(settings.index)) ||
        !GAI_CUDA(d, cudaGetDeviceProperties(&d->properties, settings.index)))
        return d->error.result;
    if (d->properties.major * 10 + d->properties.minor < 75) {
        gai_cuda_fail(d, GA_ERR_DEVICE, __FILE__, __LINE__, d->properties.name, "compute capability below 7.5");
        return d->error.result;
    }
    if (!gai_cuda_has_kernels(d)) return d->error.result;
    d->bf16 = settings.bf16 && d->properties.major >= 8, d->tf32 = settings.tf32 && d->properties.major >= 8;
    snprintf(d->name, sizeof d->name, "cuda, %s, %s products", d->properties.name,
             d->bf16   ? "bfloat16"
             : d->tf32 ? "TF32"
                       : "float32");
    (void)GAI_CUDA(d, cudaMallocHost((void **)&d->slots, (size_t)GAI_CUDA_SLOTS * GAI_CUDA_SLOT));
    for (int i = 0; i < GAI_CUDA_SLOTS; i++)
        (void)GAI_CUDA(d, cudaEventCreateWithFlags(&d->through[i], cudaEventDisableTiming));
    if (GAI_CUDA(d, cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking)) &&
        GAI_CUDA(d, cublasLtCreate(&d->blas)))
        (void)GAI_CUDA(d, cudaMalloc(&d->workspace, GAI_CUDA_WORKSPACE));
#ifdef GA_CUDNN
    if (d->error.result == GA_OK) gai_cudnn_open(d);
#endif
    return d->error.result;
}

static void gai_cuda_close(gai_cuda *d) {
    gai_cuda_forget_passes(d);
#ifdef GA_CUDNN
    gai_cudnn_close(d);
#endif
    if (d->blas) (void)cublasLtDestroy(d->blas);
    (void)cudaFree(d->workspace);
    (void)cudaFree(d->scratch);
    (void)cudaFreeHost(d->slots);
    for (int i = 0; i < GAI_CUDA_SLOTS; i++)
        if (d->through[i]) (void)cudaEventDestroy(d->through[i]);
    if (d->stream) (void)cudaStreamDestroy(d->stream);
    (void)cudaGetLastError(); /* nobody is to take it for an error of his own */
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
    device->status = gai_cuda_status, device->wait = gai_cuda_wait;
    device->weights_changed = gai_cuda_weights_changed;
    device->own_bytes = gai_cuda_own_bytes, device->free_bytes = gai_cuda_free_bytes;
    if (!settings.plain) device->replay = gai_cuda_replay, device->recorded = gai_cuda_recorded;
#define GAI_X(name, parameters, arguments) device->name = gai_cuda_##name; /* all of them, or this does not compile */
    GA_OPERATORS(GAI_X)
#undef GAI_X
    return GA_OK;
}

void ga_device_cuda_destroy(ga_device *device) {
    if (device->state) gai_cuda_close((gai_cuda *)device->state);
    memset(device, 0, sizeof *device);
}

bool ga_device_cuda_bf16(const ga_device *device) {
    return ((const gai_cuda *)device->state)->bf16;
}

const char *ga_device_cuda_unrecorded(const ga_device *device) {
    const gai_cuda *d = (const gai_cuda *)device->state;
    return d->unrecorded.result == GA_OK ? NULL : d->unrecorded.text;
}

#endif /* GATED_ATTENTION_CUDA_IMPLEMENTATION */
