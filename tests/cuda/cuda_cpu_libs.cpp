/* cuda_cpu_libs.cpp - cuBLAS for cuda_cpu.h as plain loops, with the argument checks of the library. */
#include "cuda_cpu.h"
#include "cuda_cpu_control.h"
#include <cublas_v2.h>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct cublasContext {
    cudaStream_t stream = nullptr;
    cublasMath_t mode = CUBLAS_DEFAULT_MATH;
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
} // namespace

#ifdef CUCPU_CHECK
void cucpu_check_host_write(void *p, size_t n), cucpu_check_host_read(const void *p, size_t n);
#endif

extern "C" {
cublasStatus_t cublasCreate_v2(cublasHandle_t *h) {
    if (cucpu_call_fails()) return CUBLAS_STATUS_NOT_INITIALIZED;
    *h = new cublasContext();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t h) {
    if (cucpu_call_fails()) return CUBLAS_STATUS_NOT_INITIALIZED;
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) {
    if (cucpu_call_fails()) return CUBLAS_STATUS_NOT_INITIALIZED;
    h->stream = s;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, size_t) {
    return cucpu_call_fails() ? CUBLAS_STATUS_NOT_INITIALIZED : CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t mode) {
    if (cucpu_call_fails()) return CUBLAS_STATUS_NOT_INITIALIZED;
    h->mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasGetStatusString(cublasStatus_t s) {
    return s == CUBLAS_STATUS_SUCCESS           ? "the operation completed successfully"
           : s == CUBLAS_STATUS_NOT_INITIALIZED ? "the library was not initialized"
           : s == CUBLAS_STATUS_INVALID_VALUE   ? "an unsupported value or parameter was passed to the function"
                                                : "another status";
}

cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                            const void *alpha, const void *A, cudaDataType at, int lda, const void *B, cudaDataType bt,
                            int ldb, const void *beta, void *C, cudaDataType ct, int ldc, cublasComputeType_t,
                            cublasGemmAlgo_t) {
    if (cucpu_call_fails()) return CUBLAS_STATUS_NOT_INITIALIZED;
    bool a_plain = ta == CUBLAS_OP_N, b_plain = tb == CUBLAS_OP_N;
    if (m < 0 || n < 0 || k < 0 || lda < (a_plain ? m : k) || ldb < (b_plain ? k : n) || ldc < m || at != bt)
        return CUBLAS_STATUS_INVALID_VALUE;
    float scale = *(const float *)alpha, keep = *(const float *)beta;
    bool tf32 = h->mode == CUBLAS_TF32_TENSOR_OP_MATH && at == CUDA_R_32F;
    cucpu_submit(h->stream, [=] {
        size_t M = (size_t)m, N = (size_t)n, K = (size_t)k, la = (size_t)lda, lb = (size_t)ldb, lc = (size_t)ldc;
        std::vector<float> a = lines(A, at, M, K, a_plain ? 1 : la, a_plain ? la : 1, tf32);
        std::vector<float> b = lines(B, bt, N, K, b_plain ? lb : 1, b_plain ? 1 : lb, tf32);
        for (size_t j = 0; j < N; j++)
            for (size_t i = 0; i < M; i++) {
                const float *x = &a[i * K], *y = &b[j * K];
                float sum = 0;
                for (size_t l = 0; l < K; l++) sum += x[l] * y[l];
                put(C, ct, j * lc + i, scale * sum + (keep != 0 ? keep * get(C, ct, j * lc + i) : 0));
            }
#ifdef CUCPU_CHECK
        size_t size = ct == CUDA_R_32F ? 4 : 2;
        for (size_t i = 0; i < M && N; i++)
            cucpu_check_host_read((const char *)A + (a_plain ? i : i * la) * (at == CUDA_R_32F ? 4 : 2), 1);
        for (size_t j = 0; j < N; j++) cucpu_check_host_write((char *)C + j * lc * size, M * size);
#endif
    });
    return CUBLAS_STATUS_SUCCESS;
}
}
