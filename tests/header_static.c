/* With GA_STATIC both files of this program have an implementation of their own; the second is this one with PARTNER.
 * Neither uses all of it, and nothing warns. */
#define GA_STATIC
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"

double partner(void);

#ifdef PARTNER
double partner(void) {
    return ga_f_attn_uniform(2);
}
#else
int main(void) {
    uint64_t random = 0;
    return partner() == 0.75 && ga_random_bits(&random) == UINT64_C(0xe220a8397b1dcdaf) ? 0 : 1;
}
#endif
