/* The other unit of header_two_units_a.c: declarations only, by way of names. */
#include "../gated_attention.h"
#include "../gated_attention.h"

double loss_in_other_unit(void);
double first_loss(const ga_config *c);

double loss_in_other_unit(void) {
    static const char *settings[][2] = {{"vocab_size", "8"}, {"d_model", "6"},  {"n_layers", "1"}, {"n_heads", "2"},
                                        {"n_kv_heads", "1"}, {"head_dim", "4"}, {"d_ff", "5"},     {"max_seq_len", "4"}};
    ga_config c = ga_config_default();
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        if (ga_config_set(&c, settings[i][0], settings[i][1], (ga_error *)0) != GA_OK) return -2;
    return first_loss(&c);
}
