/* cuda_cpu_libs.cpp - cuBLASLt for cuda_cpu.h as plain loops, with the library's checks of arguments, and those that it
 * leaves to its caller: that an algorithm is used for the shape and the alignment that it was chosen for. */
#include "cuda_cpu.h"
#include "cuda_cpu_control.h"
#include <cublasLt.h>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct cublasLtContext {
    int nothing;
};

namespace {
double get(const void *p, cudaDataType t, size_t i) {
    if (t == CUDA_R_32F) return ((const float *)p)[i];
    if (t == CUDA_R_16BF) return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
    fprintf(stderr, "cucpu: cuBLAS data type %d\n", (int)t);
    exit(86);
}

void put(void *p, cudaDataType t, size_t i, double v) {
    if (t == CUDA_R_32F)
        ((float *)p)[i] = (float)v;
    else
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16((float)v);
}

/* An operand as the product sees it, lines of k. TF32 keeps 10 bits after the point. */
std::vector<float> lines(const void *p, cudaDataType t, size_t rows, size_t k, size_t by_row, size_t by_k, bool tf32) {
    std::vector<float> to(rows * k);
    for (size_t i = 0; i < rows; i++)
        for (size_t l = 0; l < k; l++) {
            float v = (float)get(p, t, i * by_row + l * by_k);
            if (tf32 && std::isfinite(v)) v = __uint_as_float((__float_as_uint(v) + 0x1000) & ~0x1fffu);
            to[i * k + l] = v;
        }
    return to;
}

/* What the opaque structures hold here. */
struct product {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    cublasOperation_t a_form, b_form;
};
struct layout {
    cudaDataType type;
    uint64_t rows, columns;
    int64_t ld;
};
struct rules {
    uint64_t workspace;
    uint32_t reductions, alignment[4]; /* of A, B, C, D */
};
struct algorithm {
    uint64_t shape, workspace;
    uint32_t alignment[4];
    bool in_place;
};
static_assert(sizeof(product) <= sizeof(cublasLtMatmulDescOpaque_t) &&
                  sizeof(layout) <= sizeof(cublasLtMatrixLayoutOpaque_t) &&
                  sizeof(rules) <= sizeof(cublasLtMatmulPreferenceOpaque_t) &&
                  sizeof(algorithm) <= sizeof(cublasLtMatmulAlgo_t),
              "");

template <class T>
T *as(void *opaque) {
    return (T *)opaque;
}

uint64_t mix(uint64_t hash, uint64_t x) {
    return (hash ^ x) * 0x100000001b3ull;
}

/* Identifies operation and layouts; 0: they do not fit together. */
uint64_t shape_of(const product *p, const layout *a, const layout *b, const layout *c, const layout *d) {
    bool a_plain = p->a_form == CUBLAS_OP_N, b_plain = p->b_form == CUBLAS_OP_N;
    uint64_t m = a_plain ? a->rows : a->columns, k = a_plain ? a->columns : a->rows;
    uint64_t n = b_plain ? b->columns : b->rows;
    const layout *all[] = {a, b, c, d};
    uint64_t hash = mix(mix(mix(0xcbf29ce484222325ull, p->a_form), p->b_form), p->compute);
    for (const layout *l : all) {
        if (l->rows == 0 || l->columns == 0 || l->ld < (int64_t)l->rows) return 0;
        hash = mix(mix(mix(mix(hash, l->type), l->rows), l->columns), (uint64_t)l->ld);
    }
    bool types =
        a->type == b->type && c->type == d->type && p->scale == CUDA_R_32F &&
        (p->compute == CUBLAS_COMPUTE_32F || (p->compute == CUBLAS_COMPUTE_32F_FAST_TF32 && a->type == CUDA_R_32F));
    bool sizes =
        k == (b_plain ? b->rows : b->columns) && c->rows == m && c->columns == n && d->rows == m && d->columns == n;
    return types && sizes ? hash | 1 : 0;
}

/* Whether two matrices have memory in common; those whose columns lie between the other's do not. */
bool overlap(const void *p, const layout &of_p, const void *q, const layout &of_q) {
    const char *p0 = (const char *)p, *q0 = (const char *)q;
    size_t p_size = of_p.type == CUDA_R_32F ? 4 : 2, q_size = of_q.type == CUDA_R_32F ? 4 : 2;
    size_t p_bytes = ((of_p.columns - 1) * (size_t)of_p.ld + of_p.rows) * p_size;
    size_t q_bytes = ((of_q.columns - 1) * (size_t)of_q.ld + of_q.rows) * q_size;
    if (p0 + p_bytes <= q0 || q0 + q_bytes <= p0) return false;
    size_t stride = (size_t)of_p.ld * p_size;
    if (stride != (size_t)of_q.ld * q_size) return true;
    size_t apart =
        p0 < q0 ? (size_t)(q0 - p0) % stride : stride - (size_t)(p0 - q0) % stride; /* q's column after p's */
    return apart < of_p.rows * p_size || apart + of_q.rows * q_size > stride;
}
} // namespace

/* Runs of the attention in tests/cuda/cudnn. */
static long cudnn_runs;
void cucpu_cudnn_ran() {
    cudnn_runs++;
}
long cucpu_cudnn_runs() {
    return cudnn_runs;
}

#ifdef CUCPU_CHECK
void cucpu_check_host_write(void *p, size_t n), cucpu_check_host_read(const void *p, size_t n);
#endif

#define CALL \
    if (cucpu_call_fails()) return CUBLAS_STATUS_NOT_INITIALIZED

extern "C" {
cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
    CALL;
    *h = new cublasLtContext();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
    CALL;
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t p, size_t, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
    CALL;
    *as<product>(p) = {compute, scale, CUBLAS_OP_N, CUBLAS_OP_N};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t p, cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t bytes) {
    CALL;
    bool a = attribute == CUBLASLT_MATMUL_DESC_TRANSA;
    if ((!a && attribute != CUBLASLT_MATMUL_DESC_TRANSB) || bytes != sizeof(cublasOperation_t))
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(a ? &as<product>(p)->a_form : &as<product>(p)->b_form, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t l, size_t, cudaDataType type, uint64_t rows,
                                                 uint64_t columns, int64_t ld) {
    CALL;
    *as<layout>(l) = {type, rows, columns, ld};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t r, size_t) {
    CALL;
    *as<rules>(r) = {0, CUBLASLT_REDUCTION_SCHEME_MASK, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                                    size_t bytes) {
    CALL;
    rules *r = as<rules>(preference);
    int of = (int)attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
    void *to = attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES     ? (void *)&r->workspace
               : attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK ? (void *)&r->reductions
               : of >= 0 && of < 4                                       ? (void *)&r->alignment[of]
                                                                         : nullptr;
    if (!to || bytes != (to == &r->workspace ? sizeof r->workspace : sizeof r->reductions))
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t p, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference,
                                              int wanted, cublasLtMatmulHeuristicResult_t *results, int *count) {
    CALL;
    const rules *r = as<rules>(preference);
    uint64_t shape = shape_of(as<product>(p), as<layout>(a), as<layout>(b), as<layout>(c), as<layout>(d));
    *count = 0;
    if (!shape || wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    memset(results, 0, sizeof *results);
    algorithm *found = as<algorithm>(&results->algo);
    found->shape = shape, found->workspace = r->workspace / 2;
    memcpy(found->alignment, r->alignment, sizeof found->alignment);
    found->in_place = r->reductions & CUBLASLT_REDUCTION_SCHEME_INPLACE;
    results->workspaceSize = found->workspace, results->state = CUBLAS_STATUS_SUCCESS, *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasLtGetStatusString(cublasStatus_t s) {
    return s == CUBLAS_STATUS_SUCCESS           ? "the operation completed successfully"
           : s == CUBLAS_STATUS_NOT_INITIALIZED ? "the library was not initialized"
           : s == CUBLAS_STATUS_INVALID_VALUE   ? "an unsupported value or parameter was passed to the function"
                                                : "another status";
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha, const void *A,
                              cublasLtMatrixLayout_t a_layout, const void *B, cublasLtMatrixLayout_t b_layout,
                              const void *beta, const void *C, cublasLtMatrixLayout_t c_layout, void *D,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
    CALL;
    product p = *as<product>(desc);
    layout a = *as<layout>(a_layout), b = *as<layout>(b_layout), c = *as<layout>(c_layout), d = *as<layout>(d_layout);
    const algorithm *with = as<algorithm>((void *)algo);
    if (!with || with->shape != shape_of(&p, &a, &b, &c, &d) || !workspace || with->workspace > workspace_bytes)
        return CUBLAS_STATUS_INVALID_VALUE;
    if ((uintptr_t)workspace % 256) return CUBLAS_STATUS_INVALID_VALUE; /* less would exclude some algorithms */
    const void *addresses[] = {A, B, C, D};
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)addresses[i] % with->alignment[i]) return CUBLAS_STATUS_INVALID_VALUE;
    if (overlap(A, a, D, d) || overlap(B, b, D, d) || (C != D && overlap(C, c, D, d))) {
        fprintf(stderr, "cucpu: a product is written over its own operand\n");
        exit(86);
    }
    float scale = *(const float *)alpha, keep = *(const float *)beta;
    bool tf32 = p.compute == CUBLAS_COMPUTE_32F_FAST_TF32, in_place = with->in_place;
    cucpu_submit(stream, [=] {
        static bool reversed; /* in place, whoever comes first is added first */
        reversed = in_place && !reversed;
        bool a_plain = p.a_form == CUBLAS_OP_N, b_plain = p.b_form == CUBLAS_OP_N;
        size_t M = d.rows, N = d.columns, K = a_plain ? a.columns : a.rows;
        size_t la = (size_t)a.ld, lb = (size_t)b.ld, lc = (size_t)c.ld, ld = (size_t)d.ld;
        std::vector<float> x = lines(A, a.type, M, K, a_plain ? 1 : la, a_plain ? la : 1, tf32);
        std::vector<float> y = lines(B, b.type, N, K, b_plain ? lb : 1, b_plain ? 1 : lb, tf32);
        for (size_t j = 0; j < N; j++)
            for (size_t i = 0; i < M; i++) {
                float sum = 0;
                for (size_t l = 0; l < K; l++) {
                    size_t at = reversed ? K - 1 - l : l;
                    sum += x[i * K + at] * y[j * K + at];
                }
                put(D, d.type, j * ld + i, scale * sum + (keep != 0 ? keep * get(C, c.type, j * lc + i) : 0));
            }
#ifdef CUCPU_CHECK
        size_t read = a.type == CUDA_R_32F ? 4 : 2, written = d.type == CUDA_R_32F ? 4 : 2;
        for (size_t i = 0; i < M; i++) cucpu_check_host_read((const char *)A + (a_plain ? i : i * la) * read, 1);
        for (size_t j = 0; j < N; j++) cucpu_check_host_write((char *)D + j * ld * written, M * written);
#endif
    });
    return CUBLAS_STATUS_SUCCESS;
}
}
