/* The other unit: declarations only, behind a macro I, which stays. Takes one step of training. */
#include <complex.h>
#include "../gated_attention.h"
#include "../gated_attention.h"

#ifndef I
#error "gated_attention.h has taken the I of <complex.h> away"
#endif

int main(void) {
    static const int32_t tokens[] = {1, 2, 3, 4}, targets[] = {2, 3, 4, 5};
    ga_config c = ga_config_default();
    c.vocab_size = 8, c.d_model = 6, c.n_layers = 1, c.n_heads = 2, c.n_kv_heads = 1;
    c.head_dim = 4, c.d_ff = 5, c.max_seq_len = 4;
    ga_model *m = ga_create(&c, (ga_device *)0, GA_TRAINING, (ga_error *)0);
    double loss = 0, norm = 0;
    if (!m) return 1;
    if (ga_forward_backward(m, tokens, targets, 1, 4, 1, (ga_observer *)0, &loss, (ga_error *)0) != GA_OK) return 2;
    if (ga_update(m, 1e-3, &norm, (ga_error *)0) != GA_OK) return 3;
    ga_destroy(m);
    return loss > 2 && loss < 2.2 && norm > 0 ? 0 : 4; /* ln 8 = 2.08 */
}
