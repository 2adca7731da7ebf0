/* cudnn_frontend.h - as much of cuDNN's frontend as gated_attention_cuda.cuh uses, for cuda_cpu.h: attention by plain loops
 * over tensors of any strides, with the checks that the library makes. That the real one takes the same calls is for
 * tests/cuda/static.sh to see. */
#ifndef CUDA_CPU_CUDNN_FRONTEND_H
#define CUDA_CPU_CUDNN_FRONTEND_H

#include "../cuda_cpu.h"
#include "../cuda_cpu_control.h"
#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

void cucpu_cudnn_ran(); /* one more run for cucpu_cudnn_runs */

struct cucpu_cudnn {
    cudaStream_t stream;
};
typedef cucpu_cudnn *cudnnHandle_t;
typedef enum { CUDNN_STATUS_SUCCESS, CUDNN_STATUS_NOT_INITIALIZED } cudnnStatus_t;

static inline cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
    if (cucpu_call_fails()) return CUDNN_STATUS_NOT_INITIALIZED;
    *handle = new cucpu_cudnn();
    return CUDNN_STATUS_SUCCESS;
}
static inline cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    return CUDNN_STATUS_SUCCESS;
}
static inline cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
    delete handle;
    return CUDNN_STATUS_SUCCESS;
}
static inline const char *cudnnGetErrorString(cudnnStatus_t) {
    return "CUDNN_STATUS_NOT_INITIALIZED";
}

namespace cudnn_frontend {
enum class DataType_t { NOT_SET, BFLOAT16, FLOAT };
enum class DiagonalAlignment_t { NOT_SET, TOP_LEFT };
enum class HeurMode_t { A };
enum class error_code_t { OK, GRAPH_NOT_SUPPORTED, CUDNN_BACKEND_API_FAILED };

struct [[nodiscard]] error_t {
    error_code_t code = error_code_t::OK;
    std::string message;
    bool is_good() const { return code == error_code_t::OK; }
    bool is_bad() const { return !is_good(); }
    std::string get_message() { return message; }
};

namespace graph {
struct Tensor_attributes {
    int64_t uid = 0;
    std::vector<int64_t> dim, stride;
    DataType_t type = DataType_t::NOT_SET;
    bool output = false;
#define CUCPU_SETTER(name, field, T)   \
    Tensor_attributes &name(T value) { \
        field = value;                 \
        return *this;                  \
    }
    CUCPU_SETTER(set_uid, uid, int64_t)
    CUCPU_SETTER(set_dim, dim, const std::vector<int64_t> &)
    CUCPU_SETTER(set_stride, stride, const std::vector<int64_t> &)
    CUCPU_SETTER(set_data_type, type, DataType_t)
    CUCPU_SETTER(set_output, output, bool)
#undef CUCPU_SETTER
    size_t at(int64_t b, int64_t h, int64_t t, int64_t d) const {
        return (size_t)(b * stride[0] + h * stride[1] + t * stride[2] + d * stride[3]);
    }
};
typedef std::shared_ptr<Tensor_attributes> tensor_pointer;

template <class SELF>
struct attention_options {
    DiagonalAlignment_t alignment = DiagonalAlignment_t::NOT_SET;
    int right_bound = -1;
    float scale = 0;
    bool asked = false; /* for what the pass needs: statistics, or sums in a fixed order */
#define CUCPU_SETTER(name, field, T) \
    SELF &name(T value) {            \
        field = value;               \
        return *(SELF *)this;        \
    }
    SELF &set_name(const char *) {
        return *(SELF *)this;
    }
    CUCPU_SETTER(set_attn_scale, scale, float)
    CUCPU_SETTER(set_diagonal_alignment, alignment, DiagonalAlignment_t)
    CUCPU_SETTER(set_diagonal_band_right_bound, right_bound, int)
    CUCPU_SETTER(set_generate_stats, asked, bool)
    CUCPU_SETTER(set_deterministic_algorithm, asked, bool)
#undef CUCPU_SETTER
};
struct SDPA_attributes : attention_options<SDPA_attributes> {};
struct SDPA_backward_attributes : attention_options<SDPA_backward_attributes> {};

class Graph {
    enum { WORKSPACE = 1000 };
    DataType_t io = DataType_t::NOT_SET;
    std::vector<tensor_pointer> in, out; /* q k v [y dy lse]; y lse, or dq dk dv */
    float scale = 0;
    bool good = false;

    typedef std::unordered_map<int64_t, void *> pointers;
    static float get(const pointers &p, const tensor_pointer &t, int64_t b, int64_t h, int64_t i, int64_t d) {
        return __bfloat162float(((const __nv_bfloat16 *)p.at(t->uid))[t->at(b, h, i, d)]);
    }
    static void put(const pointers &p, const tensor_pointer &t, int64_t b, int64_t h, int64_t i, int64_t d, double x) {
        ((__nv_bfloat16 *)p.at(t->uid))[t->at(b, h, i, d)] = __float2bfloat16((float)x);
    }
    static double dot(const pointers &p, const tensor_pointer &x, int64_t hx, int64_t i, const tensor_pointer &y,
                      int64_t hy, int64_t j, int64_t b) {
        double sum = 0;
        for (int64_t d = 0; d < x->dim[3]; d++) sum += (double)get(p, x, b, hx, i, d) * get(p, y, b, hy, j, d);
        return sum;
    }
    tensor_pointer made() { return *out.insert(out.end(), std::make_shared<Tensor_attributes>()); }

    void forward(const pointers &p) const {
        const tensor_pointer &q = in[0], &k = in[1], &v = in[2], &y = out[0], &lse = out[1];
        int64_t T = q->dim[2], D = q->dim[3], group = q->dim[1] / k->dim[1];
        std::vector<double> s((size_t)T);
        for (int64_t b = 0; b < q->dim[0]; b++)
            for (int64_t h = 0; h < q->dim[1]; h++)
                for (int64_t i = 0; i < T; i++) {
                    double sum = 0;
                    for (int64_t j = 0; j <= i; j++)
                        sum += s[(size_t)j] = exp(dot(p, q, h, i, k, h / group, j, b) * scale);
                    for (int64_t d = 0; d < D; d++) {
                        double value = 0;
                        for (int64_t j = 0; j <= i; j++) value += s[(size_t)j] / sum * get(p, v, b, h / group, j, d);
                        put(p, y, b, h, i, d, value);
                    }
                    ((float *)p.at(lse->uid))[lse->at(b, h, i, 0)] = (float)log(sum);
                }
    }

    void backward(const pointers &p) const {
        const tensor_pointer &q = in[0], &k = in[1], &v = in[2], &y = in[3], &dy = in[4], &lse = in[5];
        int64_t T = q->dim[2], D = q->dim[3], group = q->dim[1] / k->dim[1];
        for (int64_t b = 0; b < q->dim[0]; b++)
            for (int64_t g = 0; g < k->dim[1]; g++) {
                std::vector<double> dk((size_t)(T * D)), dv(dk);
                for (int64_t h = g * group; h < (g + 1) * group; h++)
                    for (int64_t i = 0; i < T; i++) {
                        std::vector<double> dq((size_t)D);
                        double delta = dot(p, dy, h, i, y, h, i, b);
                        double lse_i = ((const float *)p.at(lse->uid))[lse->at(b, h, i, 0)];
                        for (int64_t j = 0; j <= i; j++) {
                            double P = exp(dot(p, q, h, i, k, g, j, b) * scale - lse_i);
                            double ds = P * (dot(p, dy, h, i, v, g, j, b) - delta) * scale;
                            for (int64_t d = 0; d < D; d++) {
                                dq[(size_t)d] += ds * get(p, k, b, g, j, d);
                                dk[(size_t)(j * D + d)] += ds * get(p, q, b, h, i, d);
                                dv[(size_t)(j * D + d)] += P * get(p, dy, b, h, i, d);
                            }
                        }
                        for (int64_t d = 0; d < D; d++) put(p, out[0], b, h, i, d, dq[(size_t)d]);
                    }
                for (int64_t at = 0; at < T * D; at++) {
                    put(p, out[1], b, g, at / D, at % D, dk[(size_t)at]);
                    put(p, out[2], b, g, at / D, at % D, dv[(size_t)at]);
                }
            }
    }

  public:
    Graph &set_io_data_type(DataType_t type) {
        io = type;
        return *this;
    }
    Graph &set_intermediate_data_type(DataType_t) { return *this; }
    Graph &set_compute_data_type(DataType_t) { return *this; }
    tensor_pointer tensor(const Tensor_attributes &t) { return std::make_shared<Tensor_attributes>(t); }

    std::array<tensor_pointer, 2> sdpa(tensor_pointer q, tensor_pointer k, tensor_pointer v, const SDPA_attributes &o) {
        in = {q, k, v}, scale = o.scale, good = o.asked && o.right_bound == 0;
        good = good && o.alignment == DiagonalAlignment_t::TOP_LEFT;
        tensor_pointer y = made();
        return {y, made()};
    }
    std::array<tensor_pointer, 3> sdpa_backward(tensor_pointer q, tensor_pointer k, tensor_pointer v, tensor_pointer y,
                                                tensor_pointer dy, tensor_pointer lse,
                                                const SDPA_backward_attributes &o) {
        in = {q, k, v, y, dy, lse}, scale = o.scale, good = o.asked && o.right_bound == 0;
        good = good && o.alignment == DiagonalAlignment_t::TOP_LEFT;
        tensor_pointer dq = made(), dk = made();
        return {dq, dk, made()};
    }

    /* Head size 96 stands for what a version of cuDNN or a GPU does not have. */
    error_t build(cudnnHandle_t, const std::vector<HeurMode_t> &) {
        bool is = good && io == DataType_t::BFLOAT16 && scale > 0;
        for (const tensor_pointer &t : out) is = is && t->output;
        if (is && in[0]->dim[3] == 96) return {error_code_t::GRAPH_NOT_SUPPORTED, "no engine for head size 96"};
        return is ? error_t() : error_t{error_code_t::GRAPH_NOT_SUPPORTED, "a setting is missing"};
    }
    error_t get_workspace_size(int64_t &bytes) const {
        bytes = WORKSPACE;
        return {};
    }
    error_t execute(cudnnHandle_t handle, const pointers &p, void *workspace) const {
        if (cucpu_call_fails()) return {error_code_t::CUDNN_BACKEND_API_FAILED, "cuDNN failed"};
        cucpu_cudnn_ran();
        cucpu_submit(handle->stream, [=] {
            memset(workspace, 0xff, WORKSPACE); /* NaN, where something else lies there too */
            out.size() == 2 ? forward(p) : backward(p);
        });
        return {};
    }
};
} // namespace graph
} // namespace cudnn_frontend

#endif
