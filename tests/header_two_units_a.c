/* A program of two translation units: this one has the implementation, header_two_units_b.c only uses it. */
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"
#include "../gated_attention.h"

double loss_in_other_unit(void);
double first_loss(const ga_config *c);

double first_loss(const ga_config *c) {
    static const int32_t tokens[] = {1, 2, 3, 4}, targets[] = {2, 3, 4, 5};
    double loss = -1, norm;
    ga_model *m = ga_create(c, NULL, GA_TRAINING, NULL);
    if (!m || ga_forward_backward(m, tokens, targets, 1, 4, 1, NULL, &loss, NULL) != GA_OK) return -1;
    if (ga_update(m, 1e-3, &norm, NULL) != GA_OK || !(norm > 0)) return -1;
    ga_destroy(m);
    return loss;
}

int main(void) {
    ga_config c = ga_config_default();
    c.vocab_size = 8, c.d_model = 6, c.n_layers = 1, c.n_heads = 2, c.n_kv_heads = 1;
    c.head_dim = 4, c.d_ff = 5, c.max_seq_len = 4;
    double loss = first_loss(&c);
    return loss > 2 && loss < 2.2 && loss == loss_in_other_unit() ? 0 : 1; /* ln 8 = 2.08 */
}
