/* Whether cuDNN's frontend finds the graphs of gated_attention_cuda.cuh valid, without a GPU: tests/cuda/static.sh. */
#define GATED_ATTENTION_CUDA_IMPLEMENTATION
#include "gated_attention_cuda.cuh"

static bool is_valid(ga_shape n, bool backward, std::string *why) {
    gai_fe::graph::Graph graph;
    graph.set_sm_version(80); /* else it asks the GPU */
    gai_cudnn_describe(graph, n, backward);
    gai_fe::error_t e = graph.validate();
    *why = e.get_message();
    return e.is_good();
}

int main() {
    const ga_shape good[] = {{2, 65, 65, 4, 2, 64}, {1, 512, 512, 6, 6, 64}, {4, 1000, 1000, 16, 2, 128}, {1, 7, 7, 2, 1, 8}};
    const ga_shape bad = {2, 65, 65, 5, 2, 64}; /* heads that do not divide */
    std::string why;
    for (int backward = 0; backward < 2; backward++) {
        for (const ga_shape &n : good)
            if (!is_valid(n, backward, &why)) return printf("D %zu, backward %d: %s\n", n.D, backward, why.c_str()), 1;
        if (is_valid(bad, backward, &why)) return printf("5 query heads of 2 key heads are valid\n"), 1;
    }
    return 0;
}
