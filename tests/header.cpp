// The header as C++17: implemented, or with LINK_ONLY used from an object that a C compiler made.
#ifndef LINK_ONLY
#define GATED_ATTENTION_IMPLEMENTATION
#endif
#include "../gated_attention.h"
#include "../gated_attention.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

struct destroy {
    void operator()(ga_model *m) const { ga_destroy(m); }
};

bool generates() {
    ga_config c = ga_config_default();
    const std::vector<std::pair<std::string, std::string>> settings = {
        {"vocab_size", "8"}, {"d_model", "6"},  {"n_layers", "1"}, {"n_heads", "2"},
        {"n_kv_heads", "1"}, {"head_dim", "4"}, {"d_ff", "5"},     {"max_seq_len", "4"}};
    ga_error e{};
    for (const auto &[key, value] : settings)
        if (ga_config_set(&c, key.c_str(), value.c_str(), &e) != GA_OK) return false;
    const std::unique_ptr<ga_model, destroy> m(ga_create(&c, nullptr, GA_INFERENCE, &e));
    if (!m) return false;
    ga_generator *g = ga_generator_create(m.get(), 4, &e);
    std::vector<ga_real> logits(8);
    std::vector<int32_t> tokens = {3};
    std::uint64_t random = 1;
    while (g && tokens.size() < 4) {
        if (ga_generator_feed(g, &tokens.back(), 1, logits.data(), &e) != GA_OK) break;
        tokens.push_back(ga_sample(logits.data(), logits.size(), {1.0, 0, 1.0}, &random));
    }
    ga_generator_destroy(g);
    return tokens.size() == 4;
}

} // namespace

int main() {
    return generates() ? 0 : 1;
}
