/* One of the two translation units of a program: the implementation and nothing else. header_two_units_b.c uses it. */
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"
#include "../gated_attention.h"
