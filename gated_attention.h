/* gated_attention.h - "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free"
 *                     (Qiu et al., NeurIPS 2025, arXiv 2505.06708) in one file of plain C.
 *
 * The whole transformer of the paper: forward, hand-derived backward, AdamW, analysis, checkpoints, generation.
 * It needs libc and libm. It keeps no global variables, prints nothing and never exits.
 *
 * USE. In exactly one C or C++ file, before other headers (POSIX file calls are declared through it):
 *
 *     #define GATED_ATTENTION_IMPLEMENTATION
 *     #include "gated_attention.h"
 *
 *     ga_config c = ga_config_default();            // every key with its default; see GA_CONFIG below
 *     ga_config_set(&c, "gate_type", "headwise", NULL);
 *     ga_model *m = ga_create(&c, NULL, GA_TRAINING, NULL);
 *     for (size_t step = 0; step < 1000; step++) {
 *         double loss, norm;
 *         fetch(tokens, targets);                   // int32_t, (B, T) each
 *         ga_forward_backward(m, tokens, targets, c.batch_size, c.max_seq_len, 1.0, NULL, &loss, NULL);
 *         ga_update(m, ga_learning_rate(&c, step, 1000), &norm, NULL);
 *     }
 *     ga_destroy(m);
 *
 * Everywhere else include it without the macro. Compile with -O3 -march=native -ffp-contract=fast, and -fopenmp for
 * threads. Functions that can fail return ga_result and take a ga_error (or NULL) that receives one clear line.
 * Processes that train one model together give it a table by which they reach each other: ga_ranks.
 *
 * OPTIONS, defined before the include:
 *     GA_STATIC                   all functions static: the header may be implemented in several files of a program
 *     GA_DOUBLE                   double in place of float, for gradient checks
 *     GA_MALLOC, GA_FREE          both or none: malloc(size) and free(pointer) of your own; an allocator with a state
 *                                 of its own goes into ga_device.allocate
 *
 * LETTERS, as in the paper where it has them:
 *     B   sequences in a batch             C   d_model, width of the residual stream
 *     T   positions in a sequence (n)      D   head_dim, width of one head (d_k)
 *     N   B * T, rows of an activation     HQ  query heads (q)          HK  key-value heads (k)
 *     L   layers                           F   d_ff, width of the FFN   V   tokens in the vocabulary
 *     G   gate logits of one position      Z   HQ*D + G + 2*HK*D, one row of [query | gate | key | value]; with
 *                                              switch heads one row of [query | gate | routers | keys | values]
 *     E   experts of an FFN, 0: dense      K   experts of one position; 1 when dense
 *     S   positions of the keys: T, or in generation all so far
 * A shape (B, T, HQ, D) is row-major. `d` before a name is the gradient of the loss with respect to it.
 *
 * INDEX of the paper: where each equation, table and figure is.
 *     Eq. 1   Q, K, V projections                    pass 2, gai_project_forward: one product for [q | gate | k | v]
 *     Eq. 2   softmax(Q K^T / sqrt(d_k)) V           ga_sdpa_forward, ga_sdpa_backward
 *     Eq. 3-4 concatenation and W_O                  pass 7, gai_attention_forward
 *     Eq. 5   Y' = Y (.) sigma(X W_theta)            ga_gate_forward, ga_gate_backward
 *     Eq. 6-8 where non-linearity enters W_V W_O     gate_position G2 (Eq. 7), G1 (Eq. 8)
 *     Eq. 6   effective rank of W_V W_O, of outputs  ga_measure_ranks, ga_effective_rank
 *     Eq. 9   NS-sigmoid                             gai_gate_activation
 *     2.1     QK-norm, RoPE                          ga_heads_forward        SwiGLU   ga_swiglu_forward
 *     3.1     mixture of experts, its two losses     ga_route_forward, ga_grouped_forward, ga_routing_of
 *     Table 1 positions, granularity, sharing, form  keys gate_position, gate_type, gate_sharing, gate_form
 *     Table 2 sandwich norm; A.6 clipped outputs     keys sandwich_norm, attn_clip, ffn_clip
 *     Table 3 RMSNorm or SiLU on the SDPA output     gate_form = self
 *     Table 4 gate score, M-Act, F-Attn              ga_gate_mean, ga_m_act, ga_f_attn
 *     Table 5 longer contexts: RoPE's base, YaRN     keys rope_*; ga_rope_frequency, ga_rope_scale; ga_start_from
 *     Table 6 switch heads (A.1)                     ga_switch_forward, ga_switch_backward; keys switch_*
 *     Table 7 the three architectures (A.2)          keys n_layers, n_heads, n_kv_heads, d_model, d_ff, n_experts, ...
 *     Fig. 2  F-Attn by layer; attention maps        ga_f_attn(s, layer), ga_map
 *     Fig. 3  histograms of the gate scores          ga_gate_histogram
 *     Fig. 4  mean |Y| before and after the gate     ga_output_magnitude
 *     Fig. 5  share of |Y| below 1e-2 and 1e-3       ga_output_below
 *     Fig. 6  maxima by layer, position, dimension   ga_activation_max, _max_at, _max_in, ga_activation_peak
 *     Fig. 7  mean, deviation, minimum, maximum      ga_gate_mean, _std, _min, _max; of a head ga_gate_mean_head, ...
 *     A.7     a gate added to a trained model        ga_start_from
 * Beside the paper:
 *     sinks by head, where, entropy, value drain     ga_sink_heads, _position; ga_attention_received, _entropy;
 *                                                    ga_value_drain
 *     what a part is for: a pass without it          ga_forward_with, ga_intervention
 *     a sink logit in the softmax                    key attention_sink; ga_sdpa_forward, ga_sink_share
 *     a gate that reads few channels                 key gate_input_dims; ga_linear_channels_forward
 *
 * SECTIONS. First the declarations: results, configuration, operators, ranks, device, tensors, model, analysis,
 * generation, checkpoints. Below "==== implementation", behind helpers and matrix products, each under a heading of
 * these words:
 *     2.1: softmax attention                 outputs, residual stream, loss       the model
 *     2.2: the gate                          optimiser operators                  optimiser and schedule
 *     the rest of the block                  4.2, 4.3: operators of the analysis  analysis: 4.2, 4.3, A.3 to A.5
 *     3.1: mixture of experts                device                               generation
 *     A.1: switch heads                      memory                               checkpoints
 *
 * COMPANIONS that compute the same on other hardware, each a ga_device for ga_create: gated_attention_x86.h (AVX2,
 * AVX-512, AMX), gated_attention_cuda.cuh (NVIDIA GPUs).
 *
 * Licence: MIT, at the end of the file.
 */
#pragma push_macro("I") /* of <complex.h>; a letter here */
#undef I

#ifndef GATED_ATTENTION_H
#define GATED_ATTENTION_H

#if defined(GATED_ATTENTION_IMPLEMENTATION) && !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L
#endif
#if defined(GATED_ATTENTION_IMPLEMENTATION) && !defined(_FILE_OFFSET_BITS)
#define _FILE_OFFSET_BITS 64 /* files above 2 GB, also where a pointer has 32 bits */
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if !defined(GA_STATIC)
#define GA_API extern
#elif defined(__GNUC__)
#define GA_API __attribute__((unused)) static
#else
#define GA_API static
#endif

#ifdef GA_DOUBLE
typedef double ga_real;
#else
typedef float ga_real;
#endif

/* ---- results ----------------------------------------------------------------------------------------------------- */

typedef enum {
    GA_OK = 0,
    GA_ERR_CONFIG,   /* a key is unknown, a value is of the wrong type, out of range, or contradicts another */
    GA_ERR_MEMORY,   /* an allocation failed */
    GA_ERR_INPUT,    /* a token outside the vocabulary, a batch larger than the model was made for */
    GA_ERR_FILE,     /* a file cannot be opened, read, written or renamed */
    GA_ERR_FORMAT,   /* a file is not what it says it is: truncated, false lengths, bad JSON */
    GA_ERR_MISMATCH, /* a checkpoint of another shape */
    GA_ERR_DIVERGED, /* the loss or the gradient is NaN or infinite */
    GA_ERR_DEVICE    /* a call of the device's library failed */
} ga_result;

/* What went wrong, as one line without a full stop at its end. */
typedef struct {
    ga_result result;
    char text[512];
} ga_error;

/* ---- configuration ----------------------------------------------------------------------------------------------- */

enum { GA_TEXT = 512, GA_MAX_HEAD_DIM = 256, GA_MAX_HEADS = 1024, GA_MAX_EXPERTS = 1024 };
#define GA_ALL ((size_t)-1) /* "over all layers" or "over all heads" */

typedef enum { GA_NO_GATE, GA_G1, GA_G2, GA_G3, GA_G4, GA_G5 } ga_gate_position;
typedef enum { GA_ELEMENTWISE, GA_HEADWISE } ga_gate_type;
typedef enum { GA_SPECIFIC, GA_SHARED } ga_gate_sharing;
typedef enum { GA_MULTIPLICATIVE, GA_ADDITIVE, GA_SELF } ga_gate_form;
typedef enum { GA_SIGMOID, GA_SILU, GA_NS_SIGMOID, GA_IDENTITY, GA_RMSNORM } ga_gate_activation;
typedef enum { GA_INPUT_QUERY, GA_INPUT_NONE, GA_INPUT_SCALAR } ga_gate_input;
typedef enum { GA_SINK_NONE, GA_SINK_LEARNED, GA_SINK_ONE } ga_attention_sink;
typedef enum { GA_SWITCH_NONE, GA_SWITCH_V, GA_SWITCH_KV } ga_switch_heads;

/* The one list of configuration keys: it makes the struct, the parser, the help, the printout and the range checks.
 *     X(kind, group, name, default, lowest, highest, choices, meaning)
 * kinds: SIZE size_t, SEED uint64_t, INTEGER long, REAL double, FLAG bool, TEXT char[GA_TEXT], CHOICE an int, the
 * index of a word of `choices`. */
/* clang-format off */
#define GA_CONFIG(X)                                                                                                   \
    X(SIZE, MODEL, vocab_size, 32000, 2, 16777216, "", "tokens in the vocabulary")                                     \
    X(SIZE, MODEL, d_model, 512, 1, 65536, "", "width of the residual stream")                                         \
    X(SIZE, MODEL, n_layers, 6, 1, 1024, "", "transformer blocks")                                                     \
    X(SIZE, MODEL, n_heads, 8, 1, GA_MAX_HEADS, "", "query heads")                                                     \
    X(SIZE, MODEL, n_kv_heads, 2, 1, GA_MAX_HEADS, "", "key-value heads; divides n_heads")                             \
    X(SIZE, MODEL, head_dim, 64, 2, GA_MAX_HEAD_DIM, "", "width of one head, even; need not be d_model / n_heads")     \
    X(SIZE, MODEL, d_ff, 1376, 1, 1048576, "", "width of the SwiGLU FFN, or of each expert")                           \
    X(SIZE, MODEL, n_experts, 0, 0, GA_MAX_EXPERTS, "", "experts in each FFN, each d_ff wide; 0: a dense FFN (3.1)")   \
    X(SIZE, MODEL, experts_per_token, 8, 1, GA_MAX_EXPERTS, "", "experts that a token is sent to: the top k")          \
    X(FLAG, MODEL, normalize_top_k, 1, 0, 1, "", "the weights of a token's experts add up to 1")                       \
    X(REAL, MODEL, load_balance_coef, 0.01, 0, 1000, "", "of the load-balancing loss over the global batch")           \
    X(REAL, MODEL, router_z_coef, 0.001, 0, 1000, "", "of the router's z-loss")                                        \
    X(SIZE, MODEL, max_seq_len, 512, 1, 16777216, "", "positions in a sequence")                                       \
    X(REAL, MODEL, rope_base, 10000, 1, 1e12, "", "base of the rotary position embedding")                             \
    X(REAL, MODEL, rope_factor, 1, 1, 1e6, "", "YaRN: for lengths up to this times the original; 1: off (4.4)")        \
    X(SIZE, MODEL, rope_original_length, 0, 0, 16777216, "", "YaRN: positions that RoPE was trained for")              \
    X(REAL, MODEL, rope_beta_fast, 32, 1e-3, 1e6, "", "YaRN: pairs that turn more often over that length stay")        \
    X(REAL, MODEL, rope_beta_slow, 1, 1e-3, 1e6, "", "YaRN: pairs that turn less often are slowed by rope_factor")     \
    X(REAL, MODEL, rope_attention_factor, 0, 0, 1000, "", "YaRN: scale of cos and sin; 0: 0.1 ln(rope_factor) + 1")    \
    X(REAL, MODEL, partial_rotary_factor, 1, 0, 1, "", "share of a head's pairs of dimensions that RoPE turns")        \
    X(REAL, MODEL, norm_eps, 1e-6, 0, 1, "", "epsilon of every RMSNorm")                                               \
    X(FLAG, MODEL, qk_norm, 1, 0, 1, "", "RMSNorm of each query and key head, before RoPE")                            \
    X(CHOICE, MODEL, attention_sink, GA_SINK_NONE, 0, 2, "none learned one",                                           \
      "a share of each head's softmax without a key: learned logit (gpt-oss), or one in the denominator")              \
    X(CHOICE, MODEL, switch_heads, GA_SWITCH_NONE, 0, 2, "none v kv",                                                  \
      "each value head, or key and value head, is a sum over the chosen of its experts (A.1, Table 6)")                \
    X(SIZE, MODEL, switch_experts, 4, 1, GA_MAX_EXPERTS, "", "experts of a switch head")                               \
    X(SIZE, MODEL, switch_top_k, 4, 1, GA_MAX_EXPERTS, "", "experts of a switch head that a position uses")            \
    X(FLAG, MODEL, tied_embeddings, 0, 0, 1, "", "the output head uses the embedding's weights")                       \
    X(FLAG, MODEL, sandwich_norm, 0, 0, 1, "", "RMSNorm of attention and FFN output before the residual (Table 2)")    \
    X(REAL, MODEL, attn_clip, 0, 0, 1e30, "", "clip the attention output to +-this; 0: off (A.6)")                     \
    X(REAL, MODEL, ffn_clip, 0, 0, 1e30, "", "clip the FFN output to +-this; 0: off (A.6)")                            \
    X(REAL, MODEL, init_std, 0.02, 0, 10, "", "standard deviation of all other matrices at the start")                 \
    X(CHOICE, GATE, gate_position, GA_G1, 0, 5, "none G1 G2 G3 G4 G5",                                                 \
      "G1 SDPA output, G2 value, G3 key, G4 query, G5 after W_O")                                                      \
    X(CHOICE, GATE, gate_type, GA_ELEMENTWISE, 0, 1, "elementwise headwise", "one score for each value, or each head") \
    X(CHOICE, GATE, gate_sharing, GA_SPECIFIC, 0, 1, "specific shared", "shared: scores are averaged over the heads")  \
    X(CHOICE, GATE, gate_form, GA_MULTIPLICATIVE, 0, 2, "multiplicative additive self",                                \
      "Y * score, Y + score, or activation(Y) without parameters")                                                     \
    X(CHOICE, GATE, gate_activation, GA_SIGMOID, 0, 4, "sigmoid silu ns-sigmoid identity rmsnorm",                     \
      "rmsnorm goes with gate_form = self only")                                                                       \
    X(CHOICE, GATE, gate_input, GA_INPUT_QUERY, 0, 2, "query none scalar",                                             \
      "query: X W_theta; none: learned, independent of X (Table 4 row 6); scalar: one learned number a layer")         \
    X(SIZE, GATE, gate_input_dims, 0, 0, 65536, "", "the gate reads only this many first channels of X; 0: all")       \
    X(FLAG, GATE, gate_frozen, 0, 0, 1, "", "W_theta stays at its random start (a control)")                           \
    X(REAL, GATE, gate_init_std, 0.02, 0, 10, "", "standard deviation of W_theta at the start")                        \
    X(TEXT, TRAIN, data, "gen:backcopy", 0, 0, "", "a file (.txt .jsonl .u16 .u32 .bin) or gen:NAME,key=value,...")    \
    X(TEXT, TRAIN, tokenizer, "", 0, 0, "",                                                                            \
      "of .txt, .jsonl: DIR or FILE.json, train, bytes; empty: init_from's, else bytes")                               \
    X(REAL, TRAIN, val_fraction, 0.01, 0, 0.9, "", "share of the windows held out")                                    \
    X(FLAG, TRAIN, shuffle, 1, 0, 1, "", "training windows in a seeded random order")                                  \
    X(INTEGER, TRAIN, bos_token, -1, -1, 16777215, "", "first token of each window of a file; -1: none")               \
    X(SIZE, TRAIN, batch_size, 1, 1, 65536, "", "sequences in a micro-batch")                                          \
    X(SIZE, TRAIN, gradient_accumulation_steps, 32, 1, 65536, "", "micro-batches in an optimiser step")                \
    X(SIZE, TRAIN, max_steps, 0, 0, 1e12, "", "optimiser steps; 0: by max_tokens")                                     \
    X(SIZE, TRAIN, max_tokens, 5000000, 0, 1e15, "", "tokens in an epoch; 0: all of a file")                           \
    X(SIZE, TRAIN, epochs, 1, 1, 1000000, "", "passes over max_tokens")                                                \
    X(REAL, TRAIN, learning_rate, 1e-3, 0, 10, "", "highest learning rate")                                            \
    X(REAL, TRAIN, min_lr, 1e-4, 0, 10, "", "learning rate at the end of the cosine")                                  \
    X(SIZE, TRAIN, warmup_steps, 100, 0, 1e9, "", "steps of linear warm-up")                                           \
    X(REAL, TRAIN, weight_decay, 0.1, 0, 10, "", "AdamW's decoupled decay, on matrices only")                          \
    X(REAL, TRAIN, beta1, 0.9, 0, 0.999999, "", "AdamW")                                                               \
    X(REAL, TRAIN, beta2, 0.95, 0, 0.999999, "", "AdamW")                                                              \
    X(REAL, TRAIN, eps, 1e-8, 0, 1, "", "AdamW")                                                                       \
    X(REAL, TRAIN, grad_clip, 1, 0, 1e30, "", "largest global gradient norm; 0: off")                                  \
    X(SEED, TRAIN, seed, 1, 0, 0, "", "of weights, data order and samples")                                            \
    X(SIZE, RUN, log_every, 10, 1, 1e9, "", "steps between plain progress lines")                                      \
    X(SIZE, RUN, eval_every, 250, 0, 1e9, "", "steps between held-out evaluations; 0: at the end only")                \
    X(SIZE, RUN, eval_windows, 64, 1, 1e9, "", "held-out windows in an evaluation")                                    \
    X(SIZE, RUN, save_every, 500, 0, 1e9, "", "steps between checkpoints; 0: at the end only")                         \
    X(SIZE, RUN, sample_every, 0, 0, 1e9, "", "steps between generated samples; 0: none")                              \
    X(SIZE, RUN, sample_tokens, 64, 1, 1e6, "", "tokens in a sample")                                                  \
    X(TEXT, RUN, output_dir, "", 0, 0, "", "where the run is kept; empty: checkpoints/<name of the configuration>")    \
    X(TEXT, RUN, init_from, "", 0, 0, "",                                                                              \
      "checkpoint directory to start from; gives the model's keys that are not set")                                   \
    X(CHOICE, RUN, device, 0, 0, 2, "auto cpu cuda", "where to compute")                                               \
    X(CHOICE, RUN, use_amp, 0, 0, 2, "auto off on", "bfloat16 matrix products where the device has them")              \
    X(FLAG, RUN, tf32, 0, 0, 1, "", "float32 matrix products by TF32 where the device has it")                         \
    X(FLAG, RUN, recompute, 0, 0, 1, "", "keep one layer's activations, recompute them in the backward pass")          \
    X(SIZE, RUN, threads, 0, 0, 4096, "", "OpenMP threads; 0: all cores, shared by the ranks on a machine")            \
    X(CHOICE, RUN, exchange, 0, 0, 1, "float32 bfloat16", "between ranks: how gradients are sent; bfloat16 rounds them")
/* clang-format on */

#define GAI_MEMBER_SIZE(name)    size_t name;
#define GAI_MEMBER_SEED(name)    uint64_t name;
#define GAI_MEMBER_INTEGER(name) long name;
#define GAI_MEMBER_REAL(name)    double name;
#define GAI_MEMBER_FLAG(name)    bool name;
#define GAI_MEMBER_CHOICE(name)  int name;
#define GAI_MEMBER_TEXT(name)    char name[GA_TEXT];

typedef struct {
#define GAI_X(kind, group, name, def, low, high, choices, meaning) GAI_MEMBER_##kind(name)
    GA_CONFIG(GAI_X)
#undef GAI_X
} ga_config;

/* What each key is, for help and printing: ga_config_key(i) for i = 0, 1, ... until it returns false. */
typedef struct {
    const char *name, *group, *choices, *meaning; /* group: MODEL, GATE, TRAIN or RUN */
} ga_key;

/* Every key at its default. */
GA_API ga_config ga_config_default(void);
GA_API bool ga_config_key(size_t i, ga_key *key);
/* Sets one key from text. GA_ERR_CONFIG: the value is of the wrong type or out of range, and the error says what the
 * key takes; or there is no such key, and it says which name is nearest. */
GA_API ga_result ga_config_set(ga_config *c, const char *key, const char *value, ga_error *e);
/* The value of a key as text, in the form that ga_config_set reads back exactly; false: no such key. */
GA_API bool ga_config_get(const ga_config *c, const char *key, char *text, size_t size);
/* Reads `key = value` lines; # opens a comment. Errors name file, line and key. A key may stand once in a file, and
 * overrides what an `include = other.cfg` line (relative to the file) has set before it. */
GA_API ga_result ga_config_load(ga_config *c, const char *path, ga_error *e);
/* Refuses members out of their range and keys that contradict each other; the error names them. ga_create calls it. */
GA_API ga_result ga_config_check(const ga_config *c, ga_error *e);

/* ---- the gate of Eq. 5, as the operators see it ------------------------------------------------------------------ */

/* What ga_gate_forward has to know: the keys gate_*, and the sizes that follow from them. */
typedef struct {
    ga_gate_position position;
    ga_gate_type type;
    ga_gate_sharing sharing;
    ga_gate_form form;
    ga_gate_activation activation;
    ga_gate_input input;
    size_t H;      /* heads of Y: HQ at G1 and G4, HK at G2 and G3, 1 at G5 */
    size_t D;      /* values of Y in each head: D, or C at G5; a row of Y has H * D values */
    size_t logits; /* G: values of S in a row: H*D elementwise, H headwise, 1 for a scalar, 0 for `self` */
    ga_real eps;   /* of the RMSNorm in `self` */
} ga_gate;

GA_API ga_gate ga_gate_of(const ga_config *c);

/* ---- the router of a mixture of experts, as the operators see it ------------------------------------------------- */

typedef struct {
    size_t E, K;    /* experts, and how many of them a position is sent to */
    bool normalize; /* the K weights of a position add up to 1 */
} ga_router;

GA_API ga_router ga_router_of(const ga_config *c);

/* What ranks have counted of their micro-batches: `ranks` parts, one behind the other. */
typedef struct {
    size_t rank, ranks; /* rank: this process */
    size_t values;      /* of ga_real in a part: it begins with n counts (int32_t), */
    size_t sums;        /* and from this value on it has n_sums sums */
    size_t n, n_sums;
} ga_pool;

/* ---- switch heads, as the operators see them --------------------------------------------------------------------- */

typedef struct {
    size_t H, D; /* heads, and values in each */
    size_t E, K; /* experts of a head, and how many of them a position uses */
} ga_switch;

GA_API ga_switch ga_switch_of(const ga_config *c);

/* ---- operators --------------------------------------------------------------------------------------------------- */

/* Sizes of an attention: T queries at the last T of S positions; query i sees keys 0 .. S-T+i. In training S = T. */
typedef struct {
    size_t B, T, S, HQ, HK, D;
} ga_shape;

enum { GA_BINS = 50 }; /* bins of a gate-score histogram over [0, 1]; what lies outside goes to the outer ones */

/* Sums over many gate scores, for Table 4, Fig. 3 and Fig. 7. */
typedef struct {
    double count, sum, sum_of_squares, min, max, below_01, below_05, bins[GA_BINS];
} ga_gate_sums;

/* Sums over many values |x|, for Fig. 4 and 5. */
typedef struct {
    double count, sum, below_1e_2, below_1e_3;
} ga_magnitude_sums;

/* The largest absolute value, and what carries it. */
typedef struct {
    double value;
    size_t position, dimension;
    int32_t token; /* -1: nothing was seen */
} ga_peak;

typedef struct {
    double learning_rate, beta1, beta2, eps, weight_decay, gradient_scale;
    uint64_t step; /* from 1, for the bias correction */
} ga_adamw_settings;

/* The one list of operators: X(name, (parameters), (arguments)). Each is declared below as ga_<name>, a plain
 * C function on plain arrays that can be called alone, and is an entry of ga_device, where a companion puts
 * its own version. */
/* clang-format off */
#define GA_OPERATORS(X)                                                                                                \
    X(embedding_forward, (ga_real *x, const int32_t *tokens, const ga_real *w, size_t N, size_t C),                    \
      (x, tokens, w, N, C))                                                                                            \
    X(embedding_backward, (ga_real *dw, const int32_t *tokens, const ga_real *dx, size_t N, size_t C),                 \
      (dw, tokens, dx, N, C))                                                                                          \
    X(linear_forward, (ga_real *y, const ga_real *x, const ga_real *w, size_t M, size_t O, size_t I),                  \
      (y, x, w, M, O, I))                                                                                              \
    X(linear_backward,                                                                                                 \
      (ga_real *dx, ga_real *dw, const ga_real *dy, const ga_real *x, const ga_real *w, size_t M, size_t O, size_t I), \
      (dx, dw, dy, x, w, M, O, I))                                                                                     \
    X(linear_channels_forward,                                                                                         \
      (ga_real *y, const ga_real *x, size_t stride, const ga_real *w, size_t M, size_t O, size_t I),                   \
      (y, x, stride, w, M, O, I))                                                                                      \
    X(linear_channels_backward,                                                                                        \
      (ga_real *dx, ga_real *dw, const ga_real *dy, const ga_real *x, size_t stride, const ga_real *w, size_t M,       \
       size_t O, size_t I),                                                                                            \
      (dx, dw, dy, x, stride, w, M, O, I))                                                                             \
    X(rmsnorm_forward,                                                                                                 \
      (ga_real *h, ga_real *rstd, const ga_real *x, const ga_real *w, size_t N, size_t C, ga_real eps),                \
      (h, rstd, x, w, N, C, eps))                                                                                      \
    X(rmsnorm_backward,                                                                                                \
      (ga_real *dx, ga_real *dw, const ga_real *dh, const ga_real *x, const ga_real *w, const ga_real *rstd, size_t N, \
       size_t C, bool add),                                                                                            \
      (dx, dw, dh, x, w, rstd, N, C, add))                                                                             \
    X(heads_forward,                                                                                                   \
      (ga_real *y, const ga_real *x, size_t x_stride, const ga_real *w, const ga_real *rope, size_t B, size_t T,       \
       size_t H, size_t D, ga_real eps),                                                                               \
      (y, x, x_stride, w, rope, B, T, H, D, eps))                                                                      \
    X(heads_backward,                                                                                                  \
      (ga_real *dx, ga_real *dw, const ga_real *dy, const ga_real *x, size_t x_stride, size_t dx_stride,               \
       const ga_real *w, const ga_real *rope, size_t B, size_t T, size_t H, size_t D, ga_real eps),                    \
      (dx, dw, dy, x, x_stride, dx_stride, w, rope, B, T, H, D, eps))                                                  \
    X(sdpa_forward,                                                                                                    \
      (ga_real *y, ga_real *lse, const ga_real *q, const ga_real *k, const ga_real *v, const ga_real *sink,            \
       ga_shape n),                                                                                                    \
      (y, lse, q, k, v, sink, n))                                                                                      \
    X(sdpa_backward,                                                                                                   \
      (ga_real *dq, ga_real *dk, ga_real *dv, ga_real *dsink, ga_real *scratch, const ga_real *dy, const ga_real *y,   \
       const ga_real *lse, const ga_real *q, const ga_real *k, const ga_real *v, const ga_real *sink, ga_shape n),     \
      (dq, dk, dv, dsink, scratch, dy, y, lse, q, k, v, sink, n))                                                      \
    X(gate_forward,                                                                                                    \
      (ga_real *o, const ga_real *y, size_t y_stride, const ga_real *s, size_t s_stride, size_t N, ga_gate g),         \
      (o, y, y_stride, s, s_stride, N, g))                                                                             \
    X(gate_backward,                                                                                                   \
      (ga_real *dy, size_t dy_stride, ga_real *ds, size_t ds_stride, const ga_real *d_o, const ga_real *y,             \
       size_t y_stride, const ga_real *s, size_t s_stride, size_t N, ga_gate g),                                       \
      (dy, dy_stride, ds, ds_stride, d_o, y, y_stride, s, s_stride, N, g))                                             \
    X(switch_forward,                                                                                                  \
      (ga_real *y, const ga_real *x, const ga_real *s, size_t stride, size_t N, ga_switch w),                          \
      (y, x, s, stride, N, w))                                                                                         \
    X(switch_backward,                                                                                                 \
      (ga_real *dx, ga_real *ds, const ga_real *dy, const ga_real *x, const ga_real *s, size_t stride, size_t N,       \
       ga_switch w),                                                                                                   \
      (dx, ds, dy, x, s, stride, N, w))                                                                                \
    X(swiglu_forward, (ga_real *a, const ga_real *u, size_t N, size_t F), (a, u, N, F))                                \
    X(swiglu_backward, (ga_real *du, const ga_real *da, const ga_real *u, size_t N, size_t F), (du, da, u, N, F))      \
    X(route_forward,                                                                                                   \
      (ga_real *p, ga_real *lse, ga_real *weights, int32_t *experts, const ga_real *logits, size_t N, ga_router r),    \
      (p, lse, weights, experts, logits, N, r))                                                                        \
    X(route_backward,                                                                                                  \
      (ga_real *d_logits, const ga_real *d_weights, const ga_real *p, const ga_real *lse, const int32_t *experts,      \
       const int32_t *counts, size_t N, ga_router r, ga_real balance_scale, ga_real z_scale),                          \
      (d_logits, d_weights, p, lse, experts, counts, N, r, balance_scale, z_scale))                                    \
    X(route_rows,                                                                                                      \
      (int32_t *rows, int32_t *slots, int32_t *offsets, const int32_t *experts, size_t N, ga_router r),                \
      (rows, slots, offsets, experts, N, r))                                                                           \
    X(route_sums,                                                                                                      \
      (int32_t *counts, ga_real *sums, const int32_t *offsets, const ga_real *p, const ga_real *lse, size_t N,         \
       ga_router r),                                                                                                   \
      (counts, sums, offsets, p, lse, N, r))                                                                           \
    X(route_pool,                                                                                                      \
      (int32_t *seen, int32_t *counts, ga_real *sums, const ga_real *parts, ga_pool pool),                             \
      (seen, counts, sums, parts, pool))                                                                               \
    X(gather_rows, (ga_real *y, const ga_real *x, const int32_t *slots, size_t R, size_t C, size_t K),                 \
      (y, x, slots, R, C, K))                                                                                          \
    X(sum_rows, (ga_real *y, const ga_real *x, const int32_t *rows, size_t N, size_t C, size_t K),                     \
      (y, x, rows, N, C, K))                                                                                           \
    X(grouped_forward,                                                                                                 \
      (ga_real *y, const ga_real *x, const ga_real *w, size_t w_stride, const int32_t *offsets, size_t E, size_t O,    \
       size_t I),                                                                                                      \
      (y, x, w, w_stride, offsets, E, O, I))                                                                           \
    X(grouped_backward,                                                                                                \
      (ga_real *dx, ga_real *dw, const ga_real *dy, const ga_real *x, const ga_real *w, size_t w_stride,               \
       const int32_t *offsets, size_t E, size_t O, size_t I),                                                          \
      (dx, dw, dy, x, w, w_stride, offsets, E, O, I))                                                                  \
    X(expert_swiglu_forward,                                                                                           \
      (ga_real *a, const ga_real *u, const ga_real *weights, const int32_t *slots, size_t R, size_t F),                \
      (a, u, weights, slots, R, F))                                                                                    \
    X(expert_swiglu_backward,                                                                                          \
      (ga_real *du, ga_real *d_weights, const ga_real *da, const ga_real *u, const ga_real *weights,                   \
       const int32_t *slots, size_t R, size_t F),                                                                      \
      (du, d_weights, da, u, weights, slots, R, F))                                                                    \
    X(clip_forward, (ga_real *y, const ga_real *x, size_t n, ga_real limit), (y, x, n, limit))                         \
    X(clip_backward, (ga_real *dx, const ga_real *dy, const ga_real *x, size_t n, ga_real limit),                      \
      (dx, dy, x, n, limit))                                                                                           \
    X(add, (ga_real *y, const ga_real *a, const ga_real *b, size_t n), (y, a, b, n))                                   \
    X(head_loss,                                                                                                       \
      (ga_real *losses, ga_real *dx, ga_real *dw, ga_real *logits, const ga_real *x, const ga_real *w,                 \
       const int32_t *targets, size_t N, size_t C, size_t V, const ga_real *scale),                                    \
      (losses, dx, dw, logits, x, w, targets, N, C, V, scale))                                                         \
    X(mean_loss,                                                                                                       \
      (double *mean, double *total, const ga_real *losses, const int32_t *targets, size_t N, double scale),            \
      (mean, total, losses, targets, N, scale))                                                                        \
    X(adamw, (ga_real *p, const ga_real *g, ga_real *m, ga_real *v, size_t n, ga_adamw_settings a),                    \
      (p, g, m, v, n, a))                                                                                              \
    X(sum_of_squares, (double *sum, const ga_real *x, size_t n), (sum, x, n))                                          \
    X(max_abs, (double *max, const ga_real *x, size_t n), (max, x, n))                                                 \
    X(accumulate,                                                                                                      \
      (double *sums, size_t g_stride, size_t i_stride, const ga_real *x, size_t R, size_t G, size_t I),                \
      (sums, g_stride, i_stride, x, R, G, I))                                                                          \
    X(sdpa_column,                                                                                                     \
      (ga_real *p, const ga_real *q, const ga_real *k, const ga_real *lse, size_t j, ga_shape n),                      \
      (p, q, k, lse, j, n))                                                                                            \
    X(sdpa_statistics,                                                                                                 \
      (ga_real *received, ga_real *entropy, const ga_real *q, const ga_real *k, const ga_real *lse, ga_shape n),       \
      (received, entropy, q, k, lse, n))                                                                               \
    X(sdpa_sink, (double *shares, const ga_real *sink, const ga_real *lse, size_t B, size_t HQ, size_t T),             \
      (shares, sink, lse, B, HQ, T))                                                                                   \
    X(route_counts, (double *rows, const int32_t *offsets, size_t E), (rows, offsets, E))                              \
    X(magnitude_statistics,                                                                                            \
      (ga_magnitude_sums *sums, const ga_real *x, size_t x_stride, size_t N, size_t W, double factor),                 \
      (sums, x, x_stride, N, W, factor))                                                                               \
    X(max_abs_rows, (ga_real *max, ga_real *at, const ga_real *x, size_t N, size_t C), (max, at, x, N, C))             \
    X(max_abs_columns, (double *max, const ga_real *x, size_t N, size_t C), (max, x, N, C))                            \
    X(keep_peaks,                                                                                                      \
      (double *max_at, ga_peak *peak, const ga_real *max, const ga_real *at, const int32_t *tokens, size_t N,          \
       size_t T),                                                                                                      \
      (max_at, peak, max, at, tokens, N, T))                                                                           \
    X(row_norms, (ga_real *norms, const ga_real *x, size_t N, size_t D), (norms, x, N, D))                             \
    X(head_moments, (double *moments, const ga_real *x, size_t N, size_t H, size_t D), (moments, x, N, H, D))          \
    X(scale_rows, (ga_real *x, size_t x_stride, size_t N, size_t W, ga_real factor), (x, x_stride, N, W, factor))      \
    X(gate_statistics, (ga_gate_sums *sums, const ga_real *s, size_t s_stride, size_t N, ga_gate g),                   \
      (sums, s, s_stride, N, g))
/* clang-format on */

#define GAI_X(name, parameters, arguments) GA_API void ga_##name parameters;
GA_OPERATORS(GAI_X)
#undef GAI_X

enum {
#define GAI_X(name, parameters, arguments) GA_OP_##name,
    GA_OPERATORS(GAI_X)
#undef GAI_X
        GA_OP_COUNT
};

/* The name of operator i = GA_OP_<name>, i < GA_OP_COUNT. */
GA_API const char *ga_operator_name(size_t i);

enum { GA_HEAD_ROWS = 256 }; /* rows of logits that exist at one time */

/* ---- ranks ------------------------------------------------------------------------------------------------------- */

/* Data parallel training with the optimiser's state spread over the ranks (ZeRO stage 1, Rajbhandari et al. 2020).
 * `count` processes hold the same weights; each computes gradients of its own micro-batches, keeps 1 / count of the
 * moments, and updates the weights that these belong to:
 *
 *     g_r  += d loss / d w                    ga_forward_backward, on rank r
 *     g     = sum_r g_r, each part where its moments are            reduce_scatter
 *     |g|^2 = sum over the parts                                    sum
 *     w     = AdamW(w, g) of the own part, then of all of them      all_gather
 *
 * This table moves the values: drivers/train/ranks_mpi.c fills it with MPI, gated_attention_cuda.cuh with NCCL. A model
 * takes it from its device (ga_device.ranks). All ranks make the same calls, in the same order, with the same sizes.
 *
 * reduce_scatter and all_gather work in place, in the memory of the model's device, on count * per_rank values, of
 * which part i, the per_rank values from i * per_rank on, belongs to rank i; per_rank is a multiple of GA_RANK_UNIT. A
 * call begins an exchange, behind all that the device was asked for before, and returns; exchanges go on in the order
 * of the calls, and nobody touches their values before `wait`. The same values give the same bits in every run. */
enum { GA_RANK_UNIT = 16 };

typedef struct {
    size_t rank, count; /* rank < count */
    void *state;        /* handed to every entry */
    /* The rank's own part becomes the sum of all ranks' values there; the other parts are undefined after it. The
     * table may round what it sends to bfloat16; it adds in float32. */
    void (*reduce_scatter)(void *state, ga_real *values, size_t per_rank);
    /* Every part i becomes that of rank i, bit for bit. */
    void (*all_gather)(void *state, ga_real *values, size_t per_rank);
    /* The exchanges are done before anything that the device is asked for from now on. */
    void (*wait)(void *state);
    /* In host memory, done on return, with the same bits on all ranks: the sums over the ranks; the bytes of rank 0. */
    void (*sum)(void *state, double *values, size_t n);
    void (*broadcast)(void *state, void *bytes, size_t n);
    /* The first failure since the last call of `status`; after a failure the other entries do nothing. */
    ga_result (*status)(void *state, ga_error *e);
} ga_ranks;

/* ---- device ------------------------------------------------------------------------------------------------------ */

typedef enum {
    GA_TRAINING,  /* weights, gradients, both moments, the activations of all layers */
    GA_INFERENCE, /* weights and the activations of one layer: evaluation, analysis, generation */
    /* As GA_INFERENCE, for models larger than memory: ga_load maps the checkpoint's files, whose weights stay there in
     * their own type; each layer is expanded to ga_real when its turn comes. */
    GA_MAPPED
} ga_mode;

/* Where tensors live and who computes on them. ga_device_cpu() is the plain C table; a companion header starts from it
 * and replaces entries. The model only ever touches tensors through these pointers. */
typedef struct {
    const char *name;
    void *state;                                  /* handed to every entry */
    void *(*allocate)(void *state, size_t bytes); /* zeroed, aligned to 64 bytes; NULL: there is not enough */
    void (*release)(void *state, void *p);
    void (*copy_in)(void *state, void *to, const void *from_host, size_t bytes);
    void (*copy_out)(void *state, void *to_host, const void *from, size_t bytes);
    void (*zero)(void *state, void *p, size_t bytes);
    void (*weights_changed)(void *state, const ga_real *weights, size_t n); /* packed copies are stale; may be NULL */
    ga_result (*status)(void *state, ga_error *e); /* the first failure since the last call; NULL: nothing can fail */
    void (*wait)(void *state);                     /* until all operators are done; NULL: they are when they return */
    /* For devices that record a pass and run it again (CUDA graphs); both NULL where a call is cheap. `key` holds all
     * that the operators of a pass and their arguments follow from. replay: true if a recording of this pass has been
     * started; else the model calls the operators, and then `recorded`: true if they have been run, false if they have
     * only been recorded, so that replay is to be asked again. Releasing memory ends all recordings. */
    bool (*replay)(void *state, const void *key, size_t bytes);
    bool (*recorded)(void *state);
    /* Memory that it takes beside the model's; may be NULL. */
    size_t (*own_bytes)(void *state, const ga_config *c, ga_mode mode);
    size_t (*free_bytes)(void *state); /* memory that is left; NULL: not known */
    const ga_ranks *ranks;             /* the processes that train together; NULL: this one trains alone */
#define GAI_JOIN(...)                      __VA_ARGS__
#define GAI_STRIP(...)                     GAI_JOIN __VA_ARGS__
#define GAI_X(name, parameters, arguments) void (*name)(void *state, GAI_STRIP(parameters));
    GA_OPERATORS(GAI_X)
#undef GAI_X
} ga_device;

/* The plain C operators and the host's memory. */
GA_API ga_device ga_device_cpu(void);

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

/* The one list of parameters: X(scope, field, name, rows, columns, condition, start)
 *
 *     scope  FIRST  once, before the layers; LAST once, after them
 *            LAYER  once a layer; "model.layers.<i>." stands before its name
 *            FFN    once a layer, after "model.layers.<i>.mlp."; in a mixture once for each expert of each layer, after
 *                   "model.layers.<i>.mlp.experts.<e>."
 *     start  MATRIX (normal, init_std) or GATE (normal, gate_init_std), which decay; ONES or ZEROS, which do not
 *
 * A matrix multiplies as y = x w^T. The order is that in memory: gate_weight stands between query and key, so that
 * [query | gate | key | value] is one matrix of Z rows when the gate reads all of X; ffn_act and ffn_up are one matrix
 * of 2 F rows; the FFNs of a layer follow its other tensors, 3 F C values for each expert. In the expressions z is a
 * ga_sizes and c the configuration. */
/* clang-format off */
#define GA_TENSORS(X)                                                                                                  \
    X(FIRST, embed, "model.embed_tokens.weight", z.V, z.C, true, MATRIX)                                               \
    X(LAYER, attn_norm, "input_layernorm.weight", 1, z.C, true, ONES)                                                  \
    X(LAYER, query, "self_attn.q_proj.weight", z.HQ * z.D, z.C, true, MATRIX)                                          \
    X(LAYER, gate_weight, "self_attn.gate.weight", z.G, z.C, z.G > 0, GATE)                                            \
    X(LAYER, key_router, "self_attn.k_router.weight", z.R_key, z.C, z.R_key > 0, GATE)                                 \
    X(LAYER, value_router, "self_attn.v_router.weight", z.R_value, z.C, z.R_value > 0, GATE)                           \
    X(LAYER, key, "self_attn.k_proj.weight", z.X_key, z.C, true, MATRIX)                                               \
    X(LAYER, value, "self_attn.v_proj.weight", z.X_value, z.C, true, MATRIX)                                           \
    X(LAYER, gate_channels, "self_attn.gate.weight", z.G_channels, c->gate_input_dims, z.G_channels > 0, GATE)         \
    X(LAYER, gate_free, "self_attn.gate.weight", 1, z.G_free, z.G_free > 0, ZEROS)                                     \
    X(LAYER, sinks, "self_attn.sinks", 1, z.HQ, c->attention_sink == GA_SINK_LEARNED, ZEROS)                           \
    X(LAYER, query_norm, "self_attn.q_norm.weight", 1, z.D, c->qk_norm, ONES)                                          \
    X(LAYER, key_norm, "self_attn.k_norm.weight", 1, z.D, c->qk_norm, ONES)                                            \
    X(LAYER, attn_output, "self_attn.o_proj.weight", z.C, z.HQ * z.D, true, MATRIX)                                    \
    X(LAYER, attn_out_norm, "attn_out_norm.weight", 1, z.C, c->sandwich_norm, ONES)                                    \
    X(LAYER, ffn_norm, "post_attention_layernorm.weight", 1, z.C, true, ONES)                                          \
    X(LAYER, router, "mlp.gate.weight", z.E, z.C, z.E > 0, MATRIX)                                                     \
    X(LAYER, ffn_out_norm, "ffn_out_norm.weight", 1, z.C, c->sandwich_norm, ONES)                                      \
    X(FFN, ffn_act, "gate_proj.weight", z.F, z.C, true, MATRIX)                                                        \
    X(FFN, ffn_up, "up_proj.weight", z.F, z.C, true, MATRIX)                                                           \
    X(FFN, ffn_down, "down_proj.weight", z.C, z.F, true, MATRIX)                                                       \
    X(LAST, final_norm, "model.norm.weight", 1, z.C, true, ONES)                                                       \
    X(LAST, head, "lm_head.weight", z.V, z.C, !c->tied_embeddings, MATRIX)
/* clang-format on */

enum {
#define GAI_X(scope, field, name, rows, columns, condition, start) GA_TENSOR_##field,
    GA_TENSORS(GAI_X)
#undef GAI_X
        GA_TENSOR_COUNT
};

typedef enum { GA_START_MATRIX, GA_START_GATE, GA_START_ONES, GA_START_ZEROS } ga_start;

/* One parameter tensor: rows * columns values at `offset` in the blocks weights, gradients, moment1 and moment2. */
typedef struct {
    int id;        /* GA_TENSOR_... */
    size_t layer;  /* GA_ALL outside the layers */
    size_t expert; /* GA_ALL where it is none's */
    size_t rows, columns, offset;
    ga_start start;
    bool decays, frozen;
    char name[96]; /* as in a Hugging Face checkpoint */
} ga_tensor;

/* Sizes that follow from a configuration, in the letters above. G: gate logits that are computed from X, columns of
 * the product [query | gate | key | value]; G_channels: computed from the first gate_input_dims channels of X, in a
 * product of their own; G_free: gate logits that are parameters themselves. At most one of the three is not 0.
 * R_key, R_value: router logits of switch heads; X_key, X_value: values that the key and value projections make, HK
 * * D for each expert. */
typedef struct {
    size_t C, L, HQ, HK, D, F, V, G, G_channels, G_free, Z, E, K, R_key, R_value, X_key, X_value;
} ga_sizes;

GA_API ga_sizes ga_sizes_of(const ga_config *c);

/* RoPE, with YaRN where rope_factor > 1: the angle in radians by which pair i of a head turns from one position to the
 * next, 0 for pairs that do not turn; and the factor of cos and sin. */
GA_API double ga_rope_frequency(const ga_config *c, size_t i);
GA_API double ga_rope_scale(const ga_config *c);

/* ---- model ------------------------------------------------------------------------------------------------------- */

typedef struct ga_mapped_files ga_mapped_files;

/* Activations of one layer: X(field, values in each of the N rows, kept), in the order of the forward pass, whose
 * numbers stand beside them. What is not kept shares its memory with the other layers: the backward pass does not need
 * it, or computes it again at little cost. */
/* clang-format off */
#define GA_LAYER_ACTIVATIONS(X)                                                                                        \
    X(x, z.C, true)                                /* residual stream before the layer */                              \
    X(h1, z.C, false) X(rstd1, 1, true)            /* 1 attention pre-norm: the X of Eq. 1 and Eq. 5 */                \
    X(qgkv, z.Z, true)                             /* 2 query, gate logits, key, value */                              \
    X(s, z.G_channels, true)                       /* gate logits of the first channels */                             \
    X(switched, z.R_key > 0 ? z.HK * z.D : 0, true)                            /* 3 keys of switch heads */            \
    X(gated, g.position >= GA_G2 && g.position <= GA_G4 ? g.H * g.D : 0, true) /* 3 gate at G2, G3, G4 */              \
    X(q, z.HQ * z.D, true) X(k, z.HK * z.D, true)  /* 4 after QK-norm and RoPE */                                      \
    X(v, z.HK * z.D, true)                         /* contiguous */                                                    \
    X(y, z.HQ * z.D, true) X(lse, z.HQ, true)      /* 5 SDPA output of Eq. 2, log-sum-exp (B, HQ, T) */                \
    X(y_gated, g.position == GA_G1 ? z.HQ * z.D : 0, false)                    /* 6 gate at G1 */                      \
    X(o, z.C, g.position == GA_G5 || c->attn_clip > 0 || c->sandwich_norm)     /* 7 W_O, Eq. 4 */                      \
    X(o_gated, g.position == GA_G5 ? z.C : 0, true)                            /* 8 gate at G5 */                      \
    X(o_clipped, c->attn_clip > 0 ? z.C : 0, c->sandwich_norm)                 /* 9 clip (A.6) */                      \
    X(o_normed, c->sandwich_norm ? z.C : 0, false)                             /* 10 sandwich norm */                  \
    X(rstd_o, c->sandwich_norm ? 1 : 0, true)                                                                          \
    X(x_mid, z.C, true)                            /* 11 residual */                                                   \
    X(h2, z.C, false) X(rstd2, 1, true)            /* 12 FFN pre-norm */                                               \
    X(router_p, z.E, true)                         /* 12a router logits, then 12b their softmax */                     \
    X(router_lse, z.E > 0 ? 1 : 0, true) X(weights, z.E > 0 ? z.K : 0, true)   /* 12b of the K experts */              \
    X(h_rows, z.E > 0 ? z.K * z.C : 0, false)      /* 12d a row of h2 for each expert of a position, by expert */      \
    X(u, z.K * 2 * z.F, true)                      /* 13 [act | up]; in a mixture K rows of a position, by expert */   \
    X(a, z.K * z.F, false)                         /* 14 silu(act) * up, in a mixture times the expert's weight */     \
    X(f_rows, z.E > 0 ? z.K * z.C : 0, false)      /* 15 down, by expert; in a mixture f is 15a, their sum */          \
    X(f, z.C, c->ffn_clip > 0 || c->sandwich_norm) /* 15 down */                                                       \
    X(f_clipped, c->ffn_clip > 0 ? z.C : 0, c->sandwich_norm)                  /* 16 clip (A.6) */                     \
    X(f_normed, c->sandwich_norm ? z.C : 0, false)                             /* 17 sandwich norm */                  \
    X(rstd_f, c->sandwich_norm ? 1 : 0, true)

/* Where the rows of a mixture go: X(field, values). N * K is the number of rows, whatever the router chooses. */
#define GA_LAYER_INDICES(X)                                                                                            \
    X(experts, N * z.K)                            /* 12b expert of slot n K + j, the j-th choice of position n */     \
    X(rows, N * z.K) X(slots, N * z.K)             /* 12c row of a slot, slot of a row: the rows of expert e are */    \
    X(offsets, z.E + 1)                            /*     offsets[e] .. offsets[e + 1], in the order of positions */
/* clang-format on */

typedef struct {
#define GAI_X(field, values, kept) ga_real *field;
    GA_LAYER_ACTIVATIONS(GAI_X)
#undef GAI_X
#define GAI_X(field, values) int32_t *field;
    GA_LAYER_INDICES(GAI_X)
#undef GAI_X
} ga_layer_activations;

typedef struct ga_intervention ga_intervention;

typedef struct {
    ga_config config;
    ga_sizes sizes;
    ga_gate gate;
    ga_router router;
    ga_mode mode;
    ga_device device;
    size_t n_tensors, n_weights; /* n_weights: values in all tensors */
    ga_tensor *tensors;
    ga_real *weights, *gradients, *moment1, *moment2; /* one block each; the last three only in GA_TRAINING */
    uint64_t updates;                                 /* optimiser steps taken */
    /* The blocks, cut into n_buckets parts that are exchanged between ranks one by one: the embedding, each layer, what
     * follows. Part b goes from buckets[b] to buckets[b + 1], multiples of count * GA_RANK_UNIT; at the end up to that
     * many values are unused. A rank's moments are its share, 1 / count, of each part in turn. Alone: one part. */
    size_t n_buckets, *buckets;
    size_t begun;      /* parts, counted from the last one, whose gradients are being exchanged */
    bool last_of_step; /* to be set before a step's last ga_forward_backward: gradients are sent while it runs */
    /* GA_MAPPED: the files of ga_load, and the layer whose weights are in `weights`; GA_ALL: final norm
     * and output head. */
    ga_mapped_files *mapped;
    size_t expanded;

    size_t max_rows;              /* batch_size * max_seq_len */
    ga_real *activation_block;    /* the memory of all of the following, on the device */
    ga_layer_activations *layers; /* L of them; they share memory in GA_INFERENCE and with `recompute`, but for x */
    ga_real *x_final, *h_final, *rstd_final, *losses, *logits;
    ga_real *row_scale; /* (1) what a row's loss is worth to the gradients */
    double *loss;       /* (2) mean loss of the last pass; sum of scale * mean since the last update */
    double *squares;    /* (1) sum of those of the gradients, or of the weights */
    ga_real *rope;      /* (max_seq_len, D): cos for D/2 frequencies, then sin */
    ga_real *sink_one;  /* (HQ) zeros: sink logits of attention_sink = one; else NULL */
    ga_real *dx, *dh, *d_qgkv, *ds, *dq, *dk, *dv, *dy, *d_o, *du, *da, *scratch;
    ga_real *d_rows, *d_router, *d_weights; /* of a mixture: (K * max_rows, C), (max_rows, E), (max_rows, K) */
    int32_t *expert_counts; /* (L, E) rows of each expert since the last update, of all micro-batches: c_e of 3.1 */
    ga_real *router_sums;   /* (L, E + 1) in the same time: sum of p_e, sum of lse^2 */
    int32_t *counted;       /* (L, E) where a forward pass counts; alone: expert_counts */
    ga_real *summed;        /* (L, E + 1) where it adds up; alone: router_sums */
    int32_t *seen;          /* (L, E) c_e^(m) for the backward pass; alone: expert_counts */
    ga_real *routed;        /* with ranks: what each has counted of a micro-batch (ga_pool), then `seen`; else NULL */
    int32_t *tokens, *targets;           /* (max_rows) on the device */
    size_t B, T;                         /* of the last forward pass */
    const ga_intervention *intervention; /* of the pass that is running, else NULL */

    bool profile; /* to be set: measures each operator, in `seconds` and `calls` */
    double seconds[GA_OP_COUNT];
    uint64_t calls[GA_OP_COUNT];
} ga_model;

/* What a configuration will cost, before anything is allocated. */
typedef struct {
    size_t parameters, embedding_parameters, gate_parameters;
    size_t activated_parameters; /* all but those of the experts that a token is not sent to */
    size_t weight_bytes, gradient_bytes, optimizer_bytes, activation_bytes, total_bytes;
    /* For each token, at T = max_seq_len: 2 for a multiply-add, attention over the keys that a query sees. */
    double forward_flops, training_flops;
} ga_summary;

/* Fills in *s. GA_ERR_CONFIG as ga_config_check, or where a size is too large to be counted; GA_ERR_MEMORY where it is
 * more than a pointer reaches. */
GA_API ga_result ga_summarize(const ga_config *c, ga_mode mode, ga_summary *s, ga_error *e);
/* The same for one of `ranks` processes that train the model together: each holds 1 / ranks of the moments.
 * GA_ERR_INPUT: ranks is 0. */
GA_API ga_result ga_summarize_rank(const ga_config *c, ga_mode mode, size_t ranks, ga_summary *s, ga_error *e);

/* A model whose weights are drawn from config.seed. Each tensor has a random stream of its own, by its name: models
 * that differ in the gate only start from the same weights everywhere else. NULL on failure. The configuration is
 * copied; `device`, or ga_device_cpu() for NULL, is copied too, but its state must outlive the model. With GA_MAPPED
 * the model has no weights before ga_load, and computes nothing. With device->ranks and GA_TRAINING all ranks call
 * this, and later ga_update, ga_load, ga_start_from and ga_save, of which rank 0 writes the files. */
GA_API ga_model *ga_create(const ga_config *c, const ga_device *device, ga_mode mode, ga_error *e);
GA_API void ga_destroy(ga_model *m);
/* The tensor GA_TENSOR_<field> of a layer (GA_ALL for those outside the layers), in a mixture that of expert 0; NULL
 * when there is none. */
GA_API const ga_tensor *ga_find_tensor(const ga_model *m, int id, size_t layer);

typedef struct ga_observer ga_observer;

/* Forward pass over tokens (B, T). With targets (B, T) *loss becomes their mean cross-entropy in nats; negative targets
 * are not counted, and where there is no other it is NaN. targets, loss and observer may be NULL; the observer sees
 * every layer as it is computed. GA_ERR_INPUT unless T <= max_seq_len, B * T <= batch_size * max_seq_len, and every
 * token and target is below V. */
GA_API ga_result ga_forward(ga_model *m, const int32_t *tokens, const int32_t *targets, size_t B, size_t T,
                            const ga_observer *observer, double *loss, ga_error *e);
/* The same, with targets, and adds scale * d loss / d weights to m->gradients; `scale` is 1 / n for the mean over the n
 * micro-batches of a step. With experts the routers' two losses (section 3.1 below) are part of that loss, but not of
 * *loss; they count over all micro-batches since ga_update. With loss NULL it does not wait for a device that works in
 * the background. With ranks all call it equally often: micro-batch k of a step is computed by rank k mod count. */
GA_API ga_result ga_forward_backward(ga_model *m, const int32_t *tokens, const int32_t *targets, size_t B, size_t T,
                                     double scale, const ga_observer *observer, double *loss, ga_error *e);
/* The sum of scale * loss over the calls of ga_forward_backward since ga_update, on all ranks. Waits for the device. */
GA_API ga_result ga_batch_loss(ga_model *m, double *loss, ga_error *e);
/* What the routers of a mixture did with the batch so far: the micro-batches of ga_forward_backward since ga_update. */
typedef struct {
    double load_balance; /* L_lb = E sum_e f_e P_e over all of them; K when the load is even */
    double router_z;     /* L_z = mean lse^2 */
    double max_load;     /* rows of the busiest expert over the mean */
    double dead;         /* share of the experts that no row went to */
} ga_routing;

/* layer: an index, or GA_ALL for the mean over the layers. All NaN without experts, or before the first micro-batch. */
GA_API ga_routing ga_routing_of(ga_model *m, size_t layer);
/* Of the logits (B * T, V) of the last forward pass the rows first .. first + rows - 1, into host memory: they are
 * computed again, since the logits of a batch never exist at once. GA_ERR_INPUT: there are no such rows. */
GA_API ga_result ga_logits(ga_model *m, size_t first, size_t rows, ga_real *logits, ga_error *e);

/* Learning rate of step s (from 0) of `steps`: linear warm-up, then a cosine to min_lr. */
GA_API double ga_learning_rate(const ga_config *c, uint64_t step, uint64_t steps);
/* Clips the gradients to the global norm grad_clip, takes one AdamW step and clears the gradients; *norm (or NULL) is
 * their norm before clipping. GA_ERR_DIVERGED when it is not finite: weights stay as they are, and without ranks so do
 * gradients. */
GA_API ga_result ga_update(ga_model *m, double learning_rate, double *norm, ga_error *e);
/* GA_ERR_DIVERGED where a weight is not finite; waits for the device. */
GA_API ga_result ga_check_weights(ga_model *m, ga_error *e);

/* ---- analysis ---------------------------------------------------------------------------------------------------- */

typedef struct ga_sums ga_sums;

/* Sums over all windows seen, by layer; the functions below turn them into the paper's figures. They grow where the
 * model computes, and come to the host when a figure is asked for. */
typedef struct {
    size_t L, HQ, E;
    bool has_gate, has_sink, has_details;
    size_t gate_heads; /* heads with scores of their own: 1 when they share them, and at G5 */
    double rows;       /* query positions seen, B * T each pass */
    ga_sums *sums;
} ga_statistics;

/* An attention map P of one layer, of a head or averaged over them (GA_ALL), summed over the windows of length T; a
 * pass of another length leaves it as it is. The caller makes room for p, zeroed, and keeps it. */
typedef struct {
    size_t layer, head, T;
    double *p;      /* (T, T): row i is query i, to be divided by `windows` */
    double windows; /* that were added up */
} ga_map;

/* What a forward pass adds to while it runs; statistics may be NULL, n_maps 0. */
struct ga_observer {
    ga_statistics *statistics;
    ga_map *maps;
    size_t n_maps;
};

/* For F-Attn, M-Act and the gate scores: cheap enough to be measured while training. NULL: not enough memory. To be
 * destroyed before the model's device. */
GA_API ga_statistics *ga_statistics_create(const ga_model *m);
/* The same, and for all under "details" below: a second product of queries and keys in each layer, and passes over Y,
 * the values and the residual stream, but no T x T matrix. */
GA_API ga_statistics *ga_statistics_create_detailed(const ga_model *m);
/* Forgets what was seen. */
GA_API void ga_statistics_reset(ga_statistics *s);
/* s becomes, on every rank, what all of them have seen together. GA_ERR_INPUT: it has details, which are not merged. */
GA_API ga_result ga_statistics_merge(ga_statistics *s, const ga_ranks *ranks, ga_error *e);
GA_API void ga_statistics_destroy(ga_statistics *s);

/* layer, head: an index, or GA_ALL for the mean over them. Query 0, which sees only itself, is counted. */
GA_API double ga_f_attn(const ga_statistics *s, size_t layer);                   /* Table 4 F-Attn, Fig. 2 */
GA_API double ga_f_attn_head(const ga_statistics *s, size_t layer, size_t head); /* of one head */
GA_API double ga_f_attn_uniform(size_t T);                                       /* of attention spread evenly */
/* With attention_sink: the share of the sink logit, while F-Attn is still that of the first token; else NaN. */
GA_API double ga_sink_share(const ga_statistics *s, size_t layer);
GA_API double ga_sink_share_head(const ga_statistics *s, size_t layer, size_t head);
GA_API double ga_m_act(const ga_statistics *s, size_t layer); /* Table 4 M-Act, Fig. 6 */
/* Of the scores as they multiply Y or are added to it, after sharing; NaN without a gate. */
GA_API double ga_gate_mean(const ga_statistics *s, size_t layer); /* Table 4 gate score, Fig. 7 */
GA_API double ga_gate_std(const ga_statistics *s, size_t layer);
GA_API double ga_gate_min(const ga_statistics *s, size_t layer);
GA_API double ga_gate_max(const ga_statistics *s, size_t layer);
GA_API double ga_gate_below(const ga_statistics *s, size_t layer, double bound); /* bound 0.1 or 0.5, else NaN */
GA_API void ga_gate_histogram(const ga_statistics *s, size_t layer, double shares[GA_BINS]); /* Fig. 3; sums to 1 */
/* Of a mixture of experts, else NaN: the positions sent to an expert; these over the mean of the experts; the largest
 * such ratio of a layer; the share of the experts without a position. For GA_ALL the mean of each over the layers. */
GA_API double ga_expert_rows(const ga_statistics *s, size_t layer, size_t expert);
GA_API double ga_expert_load(const ga_statistics *s, size_t layer, size_t expert);
GA_API double ga_expert_max_load(const ga_statistics *s, size_t layer);
GA_API double ga_expert_dead(const ga_statistics *s, size_t layer);
/* Of one head's scores; head < s->gate_heads. */
GA_API double ga_gate_mean_head(const ga_statistics *s, size_t layer, size_t head);
GA_API double ga_gate_std_head(const ga_statistics *s, size_t layer, size_t head);
GA_API double ga_gate_min_head(const ga_statistics *s, size_t layer, size_t head);
GA_API double ga_gate_max_head(const ga_statistics *s, size_t layer, size_t head);
/* Share of heads that give position 0 more than `threshold` of their attention (Gu et al. 2024, Sink_1 with 0.3). */
GA_API double ga_sink_heads(const ga_statistics *s, size_t layer, double threshold);

/* ---- details: NaN, or nothing, where the statistics were made without them --------------------------------------- */

/* Y is the tensor that the gate modulates (the SDPA output at G1, the value at G2, ...); without a gate the SDPA
 * output.
 *     GA_BEFORE_GATE   Y
 *     GA_AFTER_GATE    Y'; NaN without a gate
 *     GA_MEAN_GATE     Y times the mean score of the layer in the same pass; NaN where no score multiplies */
typedef enum { GA_BEFORE_GATE, GA_AFTER_GATE, GA_MEAN_GATE, GA_STAGES } ga_stage;

GA_API double ga_output_magnitude(const ga_statistics *s, ga_stage stage, size_t layer); /* A.3, Fig. 4: mean |Y| */
/* A.3, Fig. 5: share of |Y| below 1e-2 or 1e-3; another bound: NaN. */
GA_API double ga_output_below(const ga_statistics *s, ga_stage stage, size_t layer, double bound);

/* A.4, Fig. 6: what attention and FFN add to the residual stream, after gate, clip and sandwich norm, and the stream
 * after each. The largest absolute value, and where it was; by position and by dimension, of one layer. */
typedef enum { GA_ATTENTION_OUTPUT, GA_ATTENTION_RESIDUAL, GA_FFN_OUTPUT, GA_FFN_RESIDUAL, GA_STREAMS } ga_stream;

GA_API ga_peak ga_activation_peak(const ga_statistics *s, ga_stream stream, size_t layer);
GA_API double ga_activation_max(const ga_statistics *s, ga_stream stream, size_t layer); /* GA_ALL: mean over layers */
GA_API double ga_activation_max_at(const ga_statistics *s, ga_stream stream, size_t layer, size_t position);
GA_API double ga_activation_max_in(const ga_statistics *s, ga_stream stream, size_t layer, size_t dimension);

/* The attention that `position` gets, mean over the queries that see it; at position 0 F-Attn. */
GA_API double ga_attention_received(const ga_statistics *s, size_t layer, size_t head, size_t position);
/* Where the sink is: the position that gets most. Only the first half of the longest window counts, which at least half
 * of its queries see: few see a late position, and it gets much from itself. */
GA_API size_t ga_sink_position(const ga_statistics *s, size_t layer, size_t head);
/* Entropy of the attention in nats, mean over queries; ga_entropy_uniform(T) is that of attention spread evenly. */
GA_API double ga_attention_entropy(const ga_statistics *s, size_t layer, size_t head);
GA_API double ga_entropy_uniform(size_t T);

/* Mean Euclidean norm of the values (keys) of a key-value head at a position; GA_ALL: at all positions but the first.
 * Values are what attention sums, after a gate at G2; keys are after QK-norm and RoPE. */
GA_API double ga_value_norm(const ga_statistics *s, size_t layer, size_t head, size_t position);
GA_API double ga_key_norm(const ga_statistics *s, size_t layer, size_t head, size_t position);
/* Value drain (Guo et al. 2024): the norm at position 0 over that at the others, far below 1 when the value of the
 * first token has drained. */
GA_API double ga_value_drain(const ga_statistics *s, size_t layer);
GA_API double ga_key_drain(const ga_statistics *s, size_t layer);

/* Eq. 6: effective rank exp(-sum_i p_i log p_i), p_i = sigma_i / sum_j sigma_j (Roy and Vetterli 2007),
 * between 1 and D, of
 *     GA_RANK_WEIGHTS   W_V^k W_O^k; NaN where a router mixes values (A.1)
 *     GA_RANK_BEFORE    the rows Y^k W_O^k over all positions seen, Y before the gate at G1
 *     GA_RANK_AFTER     the same after the gate; NaN without one
 * ga_measure_ranks computes them from the model's weights and from what s, with details, has seen; ga_effective_rank
 * returns them. GA_ERR_INPUT: s has no details. */
typedef enum { GA_RANK_WEIGHTS, GA_RANK_BEFORE, GA_RANK_AFTER, GA_RANKS } ga_rank;

GA_API ga_result ga_measure_ranks(ga_statistics *s, ga_model *m, ga_error *e);
GA_API double ga_effective_rank(const ga_statistics *s, ga_rank rank, size_t layer, size_t head);

/* What a part is for: a forward pass without it. */
typedef enum {
    GA_SET_GATE,     /* the scores of a layer become scores[layer], or `value` where scores is NULL */
    GA_SCALE_GATE,   /* the scores times `value` */
    GA_SILENCE_HEAD, /* the output of a query head, behind the gate at G1, becomes 0 */
    GA_REMOVE_KEY,   /* no query but the first sees position 0: the others share its attention */
    GA_REMOVE_VALUE  /* the value state of position 0 becomes 0: attention on it is lost */
} ga_intervention_kind;

struct ga_intervention {
    ga_intervention_kind kind;
    size_t layer, head; /* where; GA_ALL: everywhere. `head` is for GA_SILENCE_HEAD */
    double value;
    const double *scores; /* (L) or NULL */
};

/* ga_forward with one change, which ends with the pass. GA_ERR_INPUT: there is no such layer or head; the model has no
 * gate whose scores could be set; scores that are added cannot be scaled. Under GA_REMOVE_KEY an observer sees the
 * attention as it would be with position 0. */
GA_API ga_result ga_forward_with(ga_model *m, const ga_intervention *change, const int32_t *tokens,
                                 const int32_t *targets, size_t B, size_t T, const ga_observer *observer, double *loss,
                                 ga_error *e);

/* ---- generation -------------------------------------------------------------------------------------------------- */

typedef struct ga_generator ga_generator;

/* Generation with a cache of keys and values for up to `capacity` <= max_seq_len positions. NULL on failure. The model
 * must outlive it. */
GA_API ga_generator *ga_generator_create(ga_model *m, size_t capacity, ga_error *e);
GA_API void ga_generator_destroy(ga_generator *g);
/* Forgets all tokens. */
GA_API void ga_generator_reset(ga_generator *g);
/* From now on s, made by ga_statistics_create, or NULL, sees what is computed, as ga_forward's observer would: the
 * tokens that are fed are the queries, all positions so far the keys. */
GA_API void ga_generator_observe(ga_generator *g, ga_statistics *s);
/* Appends n tokens; `logits` (V), in host memory, or NULL, receives those after the last one. GA_ERR_INPUT: they do not
 * fit into the cache, or one is not in the vocabulary. */
GA_API ga_result ga_generator_feed(ga_generator *g, const int32_t *tokens, size_t n, ga_real *logits, ga_error *e);

typedef struct {
    double temperature; /* 0: the most likely token */
    size_t top_k;       /* 0: all */
    double top_p;       /* of the most likely tokens as many as hold this share of the probability; 1: all */
} ga_sampling;

/* Draws a token from logits (V), which it overwrites. *random is the state of the random stream; it begins
 * with any number. */
GA_API int32_t ga_sample(ga_real *logits, size_t V, ga_sampling s, uint64_t *random);

/* The next random number of a stream: 64 bits (splitmix64), a double in [0, 1), a normal one. */
GA_API uint64_t ga_random_bits(uint64_t *state);
GA_API double ga_random_uniform(uint64_t *state);
GA_API double ga_random_normal(uint64_t *state);

/* ---- checkpoints ------------------------------------------------------------------------------------------------- */

/* What a run needs beside weights and moments to go on as if it had never stopped. */
typedef struct {
    uint64_t step;    /* optimiser steps done */
    uint64_t windows; /* training windows consumed */
    uint64_t tokens;  /* training tokens consumed */
    uint64_t random;  /* state of the driver's random stream */
    double best_val_loss;
} ga_training_state;

/* Writes a Hugging Face directory: config.json, model.safetensors, and with `state` optimizer.safetensors (moments) and
 * training_state.json. Written under another name, synced and renamed: whole or not at all. With ranks, rank 0 writes
 * what one process would, and any number of ranks can load it; with `state` only between two steps. */
GA_API ga_result ga_save(ga_model *m, const char *directory, const ga_training_state *state, ga_error *e);
/* Sets the model's keys (groups MODEL and GATE, but for max_seq_len when `keep_length`) from a config.json. */
GA_API ga_result ga_load_config(ga_config *c, const char *directory, bool keep_length, ga_error *e);
/* Reads weights into m, and with `state` moments and training state too (GA_ERR_FILE if the directory has none).
 * Every length is checked before a byte is used; F32, BF16, F16 and F64 are read. On failure m is to be destroyed.
 * GA_MAPPED: maps the files, which must stay as they are until m is destroyed. */
GA_API ga_result ga_load(ga_model *m, const char *directory, ga_training_state *state, ga_error *e);
/* ga_create with the weights of a checkpoint: none are drawn that it would replace. Keys rope_* are those of c, all
 * others must be the checkpoint's. NULL on failure. */
GA_API ga_model *ga_open(const ga_config *c, const ga_device *device, ga_mode mode, const char *directory, ga_error *e);
/* Gives m the weights of another model, which may differ in two ways: in the keys rope_* and max_seq_len, on which no
 * weight depends (section 4.4), and in that it has no gate, in which case m's gate stays as it was drawn (A.7). All
 * else as ga_load. `changes` (size), or NULL, receives what differs, in words; it is empty where nothing does. */
GA_API ga_result ga_start_from(ga_model *m, const char *directory, char *changes, size_t size, ga_error *e);
/* Whether a directory holds a checkpoint (with training state, if asked for). */
GA_API bool ga_checkpoint_exists(const char *directory, bool with_state);

enum { GA_STORED_TYPES = 4 };

/* What the files of a checkpoint hold. */
typedef struct {
    char family[32], version[32];       /* model_type, and of transformers; empty where config.json has none */
    const char *packing;                /* where the rows of W_theta are; NULL when there are none */
    size_t files, tensors;              /* safetensors files of the weights, and tensors in them */
    uint64_t bytes;                     /* of these files */
    const char *types[GA_STORED_TYPES]; /* "F32" and so on, and how many values are of each */
    uint64_t values[GA_STORED_TYPES];
} ga_inventory;

/* Sets the model's keys of *c, and checks the files as ga_load does, but reads no weights: only an lm_head that stands
 * beside tied embeddings, which must equal them. */
GA_API ga_result ga_inspect(const char *directory, ga_config *c, ga_inventory *inventory, ga_error *e);

#ifdef __cplusplus
}
#endif
#endif /* GATED_ATTENTION_H */

/* ==== implementation ============================================================================================== */

#if defined(GATED_ATTENTION_IMPLEMENTATION) && !defined(GATED_ATTENTION_IMPLEMENTED)
#define GATED_ATTENTION_IMPLEMENTED

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <locale.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _WIN32
#include <direct.h>
#include <io.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#endif

#if defined(GA_MALLOC) != defined(GA_FREE)
#error "gated_attention.h: define both GA_MALLOC and GA_FREE, or neither"
#endif
#ifndef GA_MALLOC
#define GA_MALLOC(size) malloc(size)
#define GA_FREE(p)      free(p)
#endif

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __MINGW_PRINTF_FORMAT
#define GAI_PRINTF_OF __MINGW_PRINTF_FORMAT
#else
#define GAI_PRINTF_OF printf
#endif
#ifdef __GNUC__
#define GAI_FN                  __attribute__((unused)) static
#define GAI_INLINE              __attribute__((unused, always_inline)) static inline
#define GAI_PRINTF(text, first) __attribute__((format(GAI_PRINTF_OF, text, first)))
#else
#define GAI_FN     static
#define GAI_INLINE static inline
#define GAI_PRINTF(text, first)
#endif

/* Loops whose iterations are independent. Which thread runs which never changes a sum, so the number of threads does
 * not change the result. */
#ifdef _OPENMP
#define GAI_PRAGMA(x) _Pragma(#x)
#define GAI_PARALLEL_FOR GAI_PRAGMA(omp parallel for schedule(static))
#define GAI_PARALLEL_TASKS GAI_PRAGMA(omp parallel for schedule(dynamic))
#else
#define GAI_PARALLEL_FOR
#define GAI_PARALLEL_TASKS
#endif

/* ---- errors, small helpers --------------------------------------------------------------------------------------- */

GAI_PRINTF(3, 4) GAI_FN ga_result gai_fail(ga_error *e, ga_result result, const char *format, ...) {
    if (e) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(e->text, sizeof e->text, format, arguments);
        va_end(arguments);
        e->result = result;
    }
    return result;
}

GAI_INLINE size_t gai_min(size_t a, size_t b) {
    return a < b ? a : b;
}
GAI_INLINE size_t gai_max(size_t a, size_t b) {
    return a > b ? a : b;
}
GAI_INLINE size_t gai_ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

/* The layers or heads from `begin` to before `end` that an index chooses out of `count`: one of them, or
 * with GA_ALL all. */
typedef struct {
    size_t begin, end;
} gai_range;

GAI_INLINE gai_range gai_range_of(size_t index, size_t count) {
    gai_range all = {0, count}, one = {index, index + 1};
    return index == GA_ALL ? all : one;
}

/* ---- machine and system ------------------------------------------------------------------------------------------ */

/* What ISO C does not have: POSIX, and what Windows (MinGW) offers in its place. There a file is read where it would be
 * mapped, directories are not synced, and clock() is the time that passes. */
#ifdef _WIN32
GAI_FN int gai_make_directory(const char *path) {
    return _mkdir(path);
}
GAI_FN int gai_link_status(const char *path, struct stat *s) {
    return stat(path, s);
}
GAI_FN int gai_sync(FILE *file) {
    return _commit(_fileno(file));
}
GAI_FN int gai_sync_folder(const char *path) {
    (void)path;
    return 0;
}
GAI_FN void *gai_map(FILE *file, size_t size) {
    (void)file, (void)size;
    return NULL;
}
GAI_FN void gai_unmap_bytes(void *bytes, size_t size) {
    (void)bytes, (void)size;
}
GAI_FN double gai_seconds(void) {
    return (double)clock() / CLOCKS_PER_SEC;
}
#else
GAI_FN int gai_make_directory(const char *path) {
    return mkdir(path, 0777);
}
GAI_FN int gai_link_status(const char *path, struct stat *s) {
    return lstat(path, s);
}
GAI_FN int gai_sync(FILE *file) {
    return fsync(fileno(file));
}
/* Not every file system can sync a directory, nor has one to be readable; only an error of the disk counts. */
GAI_FN int gai_sync_folder(const char *path) {
    int file = open(path, O_RDONLY);
    if (file < 0) return 0;
    int failed = fsync(file) != 0 && errno == EIO;
    close(file);
    return failed;
}
/* NULL where it cannot be mapped. */
GAI_FN void *gai_map(FILE *file, size_t size) {
    void *bytes = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fileno(file), 0);
    return bytes == MAP_FAILED ? NULL : bytes;
}
GAI_FN void gai_unmap_bytes(void *bytes, size_t size) {
    munmap(bytes, size);
}
GAI_FN double gai_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
#endif

/* Whether a sum of floats is rounded to float: not on an x87, where gcc keeps 80 bits, nor where float is computed as
 * double. There generic vectors do not mix with such scalars, and e^x cannot be had from the rounding of a sum. */
#define GAI_EXACT_FLOAT (FLT_EVAL_METHOD == 0 || FLT_EVAL_METHOD == 16)

/* strtod and snprintf follow the locale of the program that uses this header, whose decimal point may be a comma. Files
 * have a dot, everywhere. *end is what follows the number, as strtod has it; one of more than 496 characters is cut, so
 * that *end stands inside it. */
GAI_FN double gai_real_of(const char *text, char **end) {
    const char *point = localeconv()->decimal_point;
    char local[GA_TEXT];
    size_t n = gai_min(strspn(text, "+-.0123456789abcdefinptyxABCDEFINPTYX"), sizeof local - 16);
    size_t whole = gai_min(strcspn(text, "."), n);
    bool has_point = whole < n;
    snprintf(local, sizeof local, "%.*s%s%.*s", (int)whole, text, has_point ? point : "", (int)(n - whole - has_point),
             text + whole + has_point);
    double x = strtod(local, end);
    size_t used = (size_t)(*end - local);
    *end = (char *)(text + used - (used > whole ? strlen(point) - 1 : 0));
    return x;
}

GAI_FN void gai_print_real(char *text, size_t size, int digits, double x) {
    const char *point = localeconv()->decimal_point;
    size_t n = strlen(point);
    snprintf(text, size, "%.*g", digits, x);
    char *at = strstr(text, point);
    if (!at) return;
    *at = '.';
    memmove(at + 1, at + n, strlen(at + n) + 1);
}

/* ---- random numbers ---------------------------------------------------------------------------------------------- */

GA_API uint64_t ga_random_bits(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

GA_API double ga_random_uniform(uint64_t *state) {
    return (double)(ga_random_bits(state) >> 11) * 0x1p-53;
}

GA_API double ga_random_normal(uint64_t *state) { /* Box-Muller */
    double radius = sqrt(-2 * log(1 - ga_random_uniform(state)));
    return radius * cos(6.283185307179586 * ga_random_uniform(state));
}

/* ---- configuration ----------------------------------------------------------------------------------------------- */

typedef enum { GAI_SIZE, GAI_SEED, GAI_INTEGER, GAI_REAL, GAI_FLAG, GAI_CHOICE, GAI_TEXT } gai_kind;

/* One row of GA_CONFIG. `offset` is where the key lives in ga_config. */
typedef struct {
    const char *name, *group, *choices, *meaning;
    size_t offset;
    double lowest, highest;
    gai_kind kind;
} gai_key;

enum {
#define GAI_X(kind, group, name, def, low, high, choices, meaning) GAI_KEY_##name,
    GA_CONFIG(GAI_X)
#undef GAI_X
        GAI_KEY_COUNT
};

GAI_FN const gai_key *gai_keys(void) {
    static const gai_key keys[] = {
#define GAI_X(kind, group, name, def, low, high, choices, meaning) \
    {#name, #group, choices, meaning, offsetof(ga_config, name), low, high, GAI_##kind},
        GA_CONFIG(GAI_X)
#undef GAI_X
    };
    return keys;
}

GAI_FN const gai_key *gai_find_key(const char *name) {
    const gai_key *keys = gai_keys();
    for (size_t i = 0; i < GAI_KEY_COUNT; i++)
        if (strcmp(keys[i].name, name) == 0) return &keys[i];
    return NULL;
}

/* Letters to insert, delete or replace that turn one name into the other (Levenshtein); `to` has fewer than 64. */
GAI_FN size_t gai_edits(const char *from, const char *to) {
    size_t n = strlen(to), row[64]; /* from the letters of `from` so far to each beginning of `to` */
    for (size_t j = 0; j <= n; j++) row[j] = j;
    for (; *from; from++) {
        size_t diagonal = row[0]++;
        for (size_t j = 1; j <= n; j++) {
            size_t replaced = diagonal + (*from != to[j - 1]);
            diagonal = row[j];
            row[j] = gai_min(replaced, gai_min(row[j - 1], row[j]) + 1);
        }
    }
    return row[n];
}

/* The error of a key that does not exist, with the one that was meant where a few letters make it. */
GAI_FN ga_result gai_unknown_key(const char *name, ga_error *e) {
    const gai_key *keys = gai_keys(), *nearest = keys;
    for (const gai_key *k = keys; k < keys + GAI_KEY_COUNT; k++)
        if (gai_edits(name, k->name) < gai_edits(name, nearest->name)) nearest = k;
    if (gai_edits(name, nearest->name) <= strlen(name) / 4)
        return gai_fail(e, GA_ERR_CONFIG, "unknown key '%s'; is it %s?", name, nearest->name);
    return gai_fail(e, GA_ERR_CONFIG, "unknown key '%s'", name);
}

#define GAI_DEFAULT_SIZE(member, value)    member = value;
#define GAI_DEFAULT_SEED(member, value)    member = value;
#define GAI_DEFAULT_INTEGER(member, value) member = value;
#define GAI_DEFAULT_REAL(member, value)    member = value;
#define GAI_DEFAULT_FLAG(member, value)    member = value;
#define GAI_DEFAULT_CHOICE(member, value)  member = value;
#define GAI_DEFAULT_TEXT(member, value)    memcpy(member, value, sizeof value);

GA_API ga_config ga_config_default(void) {
    ga_config c;
    memset(&c, 0, sizeof c);
#define GAI_X(kind, group, name, def, low, high, choices, meaning) GAI_DEFAULT_##kind(c.name, def)
    GA_CONFIG(GAI_X)
#undef GAI_X
    return c;
}

GA_API bool ga_config_key(size_t i, ga_key *key) {
    if (i >= GAI_KEY_COUNT) return false;
    const gai_key *k = gai_keys() + i;
    key->name = k->name;
    key->group = k->group;
    key->choices = k->choices;
    key->meaning = k->meaning;
    return true;
}

/* The i-th word of a list separated by spaces: its start, with its length in *length; NULL when there is none. */
GAI_FN const char *gai_word(const char *list, int i, size_t *length) {
    for (;; i--) {
        *length = strcspn(list, " ");
        if (*length == 0) return NULL;
        if (i == 0) return list;
        list += *length;
        if (*list == ' ') list++;
    }
}

GAI_FN ga_result gai_set_real(double *at, const gai_key *k, const char *value, ga_error *e) {
    char *end = NULL;
    double x = gai_real_of(value, &end);
    if (end == value || *end) return gai_fail(e, GA_ERR_CONFIG, "%s: '%s' is not a number", k->name, value);
    if (!(x >= k->lowest && x <= k->highest))
        return gai_fail(e, GA_ERR_CONFIG, "%s: %s is out of range, %g to %g", k->name, value, k->lowest, k->highest);
    *at = x;
    return GA_OK;
}

GAI_FN ga_result gai_set_whole(void *at, const gai_key *k, const char *value, ga_error *e) {
    char *end = NULL;
    bool negative = *value == '-', bounded = k->kind != GAI_SEED;
    errno = 0;
    unsigned long long n = strtoull(value + negative, &end, 10);
    if (!isdigit((unsigned char)value[negative]) || *end)
        return gai_fail(e, GA_ERR_CONFIG, "%s: '%s' is not a whole number", k->name, value);
    double x = negative ? -(double)n : (double)n;
    double highest = k->kind == GAI_SIZE ? fmin(k->highest, (double)SIZE_MAX) : k->highest;
    if (errno == ERANGE || (bounded && !(x >= k->lowest && x <= highest)) || (!bounded && negative))
        return gai_fail(e, GA_ERR_CONFIG, "%s: %s is out of range, %.0f to %.0f", k->name, value, k->lowest,
                        bounded ? highest : 18446744073709551615.0);
    if (k->kind == GAI_SEED)
        *(uint64_t *)at = n;
    else if (k->kind == GAI_SIZE)
        *(size_t *)at = (size_t)n;
    else
        *(long *)at = negative ? -(long)n : (long)n;
    return GA_OK;
}

GAI_FN ga_result gai_set_choice(int *at, const gai_key *k, const char *value, ga_error *e) {
    size_t length;
    const char *word;
    for (int i = 0; (word = gai_word(k->choices, i, &length)) != NULL; i++)
        if (strlen(value) == length && strncmp(word, value, length) == 0) {
            *at = i;
            return GA_OK;
        }
    return gai_fail(e, GA_ERR_CONFIG, "%s: '%s' is none of: %s", k->name, value, k->choices);
}

GAI_FN ga_result gai_set_flag(bool *at, const gai_key *k, const char *value, ga_error *e) {
    bool on = strcmp(value, "1") == 0 || strcmp(value, "true") == 0;
    if (!on && strcmp(value, "0") != 0 && strcmp(value, "false") != 0)
        return gai_fail(e, GA_ERR_CONFIG, "%s: '%s' is neither 0 nor 1", k->name, value);
    *at = on;
    return GA_OK;
}

GAI_FN ga_result gai_set_text(char *at, const gai_key *k, const char *value, ga_error *e) {
    if (strlen(value) >= GA_TEXT)
        return gai_fail(e, GA_ERR_CONFIG, "%s: longer than %d characters", k->name, GA_TEXT - 1);
    memset(at, 0, GA_TEXT);
    memcpy(at, value, strlen(value));
    return GA_OK;
}

GA_API ga_result ga_config_set(ga_config *c, const char *name, const char *value, ga_error *e) {
    const gai_key *k = gai_find_key(name);
    if (!k) return gai_unknown_key(name, e);
    void *at = (char *)c + k->offset;
    switch (k->kind) {
    case GAI_CHOICE:
        return gai_set_choice((int *)at, k, value, e);
    case GAI_REAL:
        return gai_set_real((double *)at, k, value, e);
    case GAI_FLAG:
        return gai_set_flag((bool *)at, k, value, e);
    case GAI_TEXT:
        return gai_set_text((char *)at, k, value, e);
    default:
        return gai_set_whole(at, k, value, e);
    }
}

GA_API bool ga_config_get(const ga_config *c, const char *name, char *text, size_t size) {
    const gai_key *k = gai_find_key(name);
    if (!k) return false;
    const void *at = (const char *)c + k->offset;
    size_t length;
    const char *word;
    switch (k->kind) {
    case GAI_SIZE:
        snprintf(text, size, "%zu", *(const size_t *)at);
        break;
    case GAI_SEED:
        snprintf(text, size, "%llu", (unsigned long long)*(const uint64_t *)at);
        break;
    case GAI_INTEGER:
        snprintf(text, size, "%ld", *(const long *)at);
        break;
    case GAI_FLAG:
        snprintf(text, size, "%d", *(const bool *)at);
        break;
    case GAI_TEXT:
        snprintf(text, size, "%s", (const char *)at);
        break;
    case GAI_CHOICE:
        word = gai_word(k->choices, *(const int *)at, &length);
        snprintf(text, size, "%.*s", (int)(word ? length : 1), word ? word : "?");
        break;
    case GAI_REAL: /* the shortest form that reads back as the same number */
        for (int digits = 6; digits <= 17; digits++) {
            char *end;
            gai_print_real(text, size, digits, *(const double *)at);
            if (gai_real_of(text, &end) == *(const double *)at) break;
        }
        break;
    }
    return true;
}

/* Cuts comment and white space off a line; returns its first character that counts. */
GAI_FN char *gai_trim(char *line) {
    for (char *p = line; *p; p++)
        if (*p == '#' && (p == line || isspace((unsigned char)p[-1]))) {
            *p = 0;
            break;
        }
    while (isspace((unsigned char)*line)) line++;
    size_t n = strlen(line);
    while (n > 0 && isspace((unsigned char)line[n - 1])) line[--n] = 0;
    return line;
}

enum { GAI_CONFIG_DEPTH = 8, GAI_CONFIG_FILES = 64 }; /* of a configuration that includes others */

/* Where reading a configuration stands. */
typedef struct gai_config_place {
    const char *path;
    const struct gai_config_place *outer; /* the file that includes this one, or NULL */
    struct stat status;
    int depth, *files; /* files that were opened, all depths together */
} gai_config_place;

GAI_FN ga_result gai_config_file(ga_config *c, gai_config_place at, ga_error *e);

/* `include = other.cfg` reads another file first, relative to this one; later keys override it. */
GAI_FN ga_result gai_config_include(ga_config *c, gai_config_place at, const char *value, ga_error *e) {
    char other[2 * GA_TEXT];
    const char *slash = strrchr(at.path, '/');
    int folder = *value == '/' || !slash ? 0 : (int)(slash - at.path) + 1;
    gai_config_place inner = {other, &at, at.status, at.depth + 1, at.files};
    if (at.depth == GAI_CONFIG_DEPTH)
        return gai_fail(e, GA_ERR_CONFIG, "include: more than %d files deep", (int)GAI_CONFIG_DEPTH);
    if (++*at.files > GAI_CONFIG_FILES)
        return gai_fail(e, GA_ERR_CONFIG, "include: more than %d files", (int)GAI_CONFIG_FILES);
    if (snprintf(other, sizeof other, "%.*s%s", folder, at.path, value) >= (int)sizeof other)
        return gai_fail(e, GA_ERR_CONFIG, "include: the path is too long");
    if (stat(other, &inner.status)) return gai_fail(e, GA_ERR_FILE, "include: %s: %s", other, strerror(errno));
    if (!S_ISREG(inner.status.st_mode)) return gai_fail(e, GA_ERR_FILE, "include: %s is not a regular file", other);
    for (const gai_config_place *p = &at; p; p = p->outer)
        if (p->status.st_ino != 0 && p->status.st_dev == inner.status.st_dev && p->status.st_ino == inner.status.st_ino)
            return gai_fail(e, GA_ERR_CONFIG, "include: %s is this file, or one that includes it", other);
    return gai_config_file(c, inner, e);
}

GAI_FN ga_result gai_config_line(ga_config *c, gai_config_place at, char *line, bool *seen, ga_error *e) {
    char *key = gai_trim(line);
    if (!*key) return GA_OK;
    char *value = strchr(key, '=');
    if (!value) return gai_fail(e, GA_ERR_CONFIG, "'%s' is not of the form key = value", key);
    *value++ = 0;
    key = gai_trim(key);
    value = gai_trim(value);
    if (strcmp(key, "include") == 0) return gai_config_include(c, at, value, e);
    const gai_key *k = gai_find_key(key);
    if (k && seen[k - gai_keys()]) return gai_fail(e, GA_ERR_CONFIG, "key '%s' stands twice", key);
    if (k) seen[k - gai_keys()] = true;
    return ga_config_set(c, key, value, e);
}

/* The next line, cut at its end; false: there is none. A line that is too long, or holds a zero byte, is
 * GA_ERR_CONFIG. */
GAI_FN bool gai_config_read_line(FILE *f, char *line, size_t size, ga_result *result, ga_error *e) {
    size_t n = 0;
    int byte;
    while ((byte = getc(f)) != EOF && byte != '\n') {
        if (byte == 0 || n + 1 == size) {
            *result = gai_fail(e, GA_ERR_CONFIG, byte == 0 ? "the line holds a zero byte" : "the line is too long");
            return true;
        }
        line[n++] = (char)byte;
    }
    line[n] = '\0';
    return byte != EOF || n > 0;
}

GAI_FN ga_result gai_config_file(ga_config *c, gai_config_place at, ga_error *e) {
    FILE *f = fopen(at.path, "rb");
    if (!f) return gai_fail(e, GA_ERR_FILE, "%s: %s", at.path, strerror(errno));
    bool seen[GAI_KEY_COUNT] = {false};
    char line[GA_TEXT + 256] = "";
    ga_result result = GA_OK;
    ga_error inner = {GA_OK, ""};
    for (size_t number = 1; result == GA_OK && gai_config_read_line(f, line, sizeof line, &result, &inner); number++) {
        bool mark = number == 1 && strncmp(line, "\xEF\xBB\xBF", 3) == 0; /* the byte order mark of some editors */
        if (result == GA_OK) result = gai_config_line(c, at, line + 3 * mark, seen, &inner);
        if (result != GA_OK) gai_fail(e, result, "%.180s:%zu: %.300s", at.path, number, inner.text);
    }
    if (result == GA_OK && ferror(f)) result = gai_fail(e, GA_ERR_FILE, "%s: %s", at.path, strerror(errno));
    fclose(f);
    return result;
}

GA_API ga_result ga_config_load(ga_config *c, const char *path, ga_error *e) {
    int files = 1;
    gai_config_place at;
    memset(&at, 0, sizeof at);
    at.path = path;
    at.files = &files;
    if (stat(path, &at.status)) return gai_fail(e, GA_ERR_FILE, "%s: %s", path, strerror(errno));
    return gai_config_file(c, at, e);
}

/* Which keys of the gate contradict each other, and why. */
GAI_FN ga_result gai_check_gate(const ga_config *c, ga_error *e) {
    bool self = c->gate_form == GA_SELF, query = c->gate_input == GA_INPUT_QUERY;
    const char *why = NULL;
    if (c->gate_position == GA_NO_GATE) return GA_OK;
    if (self && c->gate_position != GA_G1)
        why = "gate_form=self acts on the SDPA output (Table 3 rows 5 and 6): it needs gate_position=G1";
    else if (self && c->gate_activation != GA_RMSNORM && c->gate_activation != GA_SILU)
        why = "gate_form=self has no scores: it needs gate_activation=rmsnorm or silu (Table 3 rows 5 and 6)";
    else if (self && (!query || c->gate_frozen || c->gate_type != GA_ELEMENTWISE || c->gate_sharing != GA_SPECIFIC))
        why = "gate_form=self has no W_theta: gate_input, gate_frozen, gate_type and gate_sharing must keep their "
              "defaults";
    else if (!self && c->gate_activation == GA_RMSNORM)
        why = "gate_activation=rmsnorm normalises Y itself: it needs gate_form=self (Table 3 row 5)";
    else if (c->gate_position == GA_G5 && c->gate_type == GA_HEADWISE)
        why = "gate_type=headwise at gate_position=G5: after W_O there are no heads";
    else if (c->gate_position == GA_G5 && c->gate_sharing == GA_SHARED)
        why = "gate_sharing=shared at gate_position=G5: after W_O there are no heads";
    else if (c->gate_input == GA_INPUT_SCALAR && (c->gate_type != GA_ELEMENTWISE || c->gate_sharing != GA_SPECIFIC))
        why = "gate_input=scalar is one number a layer: gate_type and gate_sharing do not apply";
    else if (c->gate_input_dims > 0 && (self || !query))
        why = "gate_input_dims says how much of X the gate reads: it needs gate_input=query and no gate_form=self";
    else if (c->gate_frozen && !query)
        why = "gate_frozen=1 keeps a random W_theta: it needs gate_input=query";
    else if (c->gate_frozen && c->gate_init_std == 0)
        why = "gate_frozen=1 with gate_init_std=0 is a constant, not a random gate";
    else if (c->qk_norm && (c->gate_position == GA_G3 || c->gate_position == GA_G4) &&
             c->gate_form == GA_MULTIPLICATIVE && (c->gate_type == GA_HEADWISE || c->gate_input == GA_INPUT_SCALAR))
        why = "one score for a whole head at G3 or G4 is undone by QK-norm: set qk_norm=0 or gate_type=elementwise";
    if (why) return gai_fail(e, GA_ERR_CONFIG, "%s", why);
    if (c->gate_input_dims > c->d_model)
        return gai_fail(e, GA_ERR_CONFIG, "gate_input_dims=%zu is above d_model=%zu", c->gate_input_dims, c->d_model);
    return GA_OK;
}

/* Which keys of YaRN contradict each other. */
GAI_FN ga_result gai_check_rope(const ga_config *c, ga_error *e) {
    if (c->rope_factor == 1) return GA_OK;
    if (c->rope_original_length == 0)
        return gai_fail(e, GA_ERR_CONFIG,
                        "rope_factor=%g needs rope_original_length, the positions that RoPE was trained for",
                        c->rope_factor);
    if (c->rope_beta_fast < c->rope_beta_slow)
        return gai_fail(e, GA_ERR_CONFIG, "rope_beta_fast=%g is below rope_beta_slow=%g", c->rope_beta_fast,
                        c->rope_beta_slow);
    if (c->rope_base == 1)
        return gai_fail(e, GA_ERR_CONFIG, "rope_factor=%g with rope_base=1: all pairs turn alike", c->rope_factor);
    return GA_OK;
}

/* Which keys of switch heads contradict each other, or the gate. */
GAI_FN ga_result gai_check_switch(const ga_config *c, ga_error *e) {
    if (c->switch_heads == GA_SWITCH_NONE) return GA_OK;
    if (c->switch_top_k > c->switch_experts)
        return gai_fail(e, GA_ERR_CONFIG, "switch_top_k=%zu is above switch_experts=%zu", c->switch_top_k,
                        c->switch_experts);
    if (c->gate_position == GA_G2)
        return gai_fail(e, GA_ERR_CONFIG,
                        "switch_heads with gate_position=G2: the routers already gate the value heads (A.1)");
    if (c->switch_heads == GA_SWITCH_KV && c->gate_position == GA_G3)
        return gai_fail(e, GA_ERR_CONFIG,
                        "switch_heads=kv with gate_position=G3: the routers already gate the key heads (A.1)");
    if (c->switch_heads == GA_SWITCH_KV && c->switch_top_k == 1 && c->qk_norm)
        return gai_fail(e, GA_ERR_CONFIG,
                        "switch_heads=kv with switch_top_k=1: one score for a whole key head is undone by QK-norm: "
                        "set qk_norm=0 or switch_heads=v");
    return GA_OK;
}

/* ga_config_set takes nothing else, but a program may write to the members. */
GAI_FN ga_result gai_check_ranges(const ga_config *c, ga_error *e) {
    for (const gai_key *k = gai_keys(); k < gai_keys() + GAI_KEY_COUNT; k++) {
        const void *at = (const char *)c + k->offset;
        double x = k->lowest;
        if (k->kind == GAI_SIZE) x = (double)*(const size_t *)at;
        if (k->kind == GAI_INTEGER) x = (double)*(const long *)at;
        if (k->kind == GAI_REAL) x = *(const double *)at;
        if (k->kind == GAI_CHOICE) x = (double)*(const int *)at;
        if (!(x >= k->lowest && x <= k->highest))
            return gai_fail(e, GA_ERR_CONFIG, "%s: %.10g is out of range, %.10g to %.10g", k->name, x, k->lowest,
                            k->highest);
    }
    return GA_OK;
}

GA_API ga_result ga_config_check(const ga_config *c, ga_error *e) {
    ga_result result = gai_check_ranges(c, e);
    if (result != GA_OK) return result;
    if (c->n_heads % c->n_kv_heads != 0)
        return gai_fail(e, GA_ERR_CONFIG, "n_heads=%zu is not a multiple of n_kv_heads=%zu", c->n_heads, c->n_kv_heads);
    if (c->head_dim % 2 != 0)
        return gai_fail(e, GA_ERR_CONFIG, "head_dim=%zu is odd: RoPE turns pairs of dimensions", c->head_dim);
    if (c->min_lr > c->learning_rate)
        return gai_fail(e, GA_ERR_CONFIG, "min_lr=%g is above learning_rate=%g", c->min_lr, c->learning_rate);
    if (c->bos_token >= 0 && (size_t)c->bos_token >= c->vocab_size)
        return gai_fail(e, GA_ERR_CONFIG, "bos_token=%ld is not in a vocabulary of %zu", c->bos_token, c->vocab_size);
    if (c->n_experts == 1)
        return gai_fail(e, GA_ERR_CONFIG, "n_experts=1 leaves the router no choice: 0 is a dense FFN of that width");
    if (c->n_experts > 0 && c->experts_per_token > c->n_experts)
        return gai_fail(e, GA_ERR_CONFIG, "experts_per_token=%zu is above n_experts=%zu", c->experts_per_token,
                        c->n_experts);
    if (c->n_experts > 0 && c->experts_per_token == 1 && c->normalize_top_k)
        return gai_fail(
            e, GA_ERR_CONFIG,
            "experts_per_token=1 with normalize_top_k=1: the weight is always 1, and the router learns nothing "
            "from the loss");
    result = gai_check_rope(c, e);
    if (result == GA_OK) result = gai_check_switch(c, e);
    return result == GA_OK ? gai_check_gate(c, e) : result;
}

GA_API ga_gate ga_gate_of(const ga_config *c) {
    ga_gate g;
    g.position = (ga_gate_position)c->gate_position;
    g.type = (ga_gate_type)c->gate_type;
    g.sharing = (ga_gate_sharing)c->gate_sharing;
    g.form = (ga_gate_form)c->gate_form;
    g.activation = (ga_gate_activation)c->gate_activation;
    g.input = (ga_gate_input)c->gate_input;
    g.H = g.position == GA_G2 || g.position == GA_G3 ? c->n_kv_heads : c->n_heads;
    g.D = c->head_dim;
    if (g.position == GA_G5) {
        g.H = 1;
        g.D = c->d_model;
    }
    g.logits = g.type == GA_HEADWISE ? g.H : g.H * g.D;
    if (g.input == GA_INPUT_SCALAR) g.logits = 1;
    if (g.position == GA_NO_GATE || g.form == GA_SELF) g.logits = 0;
    g.eps = (ga_real)c->norm_eps;
    return g;
}

GA_API ga_router ga_router_of(const ga_config *c) {
    ga_router r = {c->n_experts, c->n_experts > 0 ? c->experts_per_token : 1, c->normalize_top_k};
    return r;
}

GA_API ga_switch ga_switch_of(const ga_config *c) {
    ga_switch s = {c->n_kv_heads, c->head_dim, c->switch_experts, c->switch_top_k};
    return s;
}

GA_API ga_sizes ga_sizes_of(const ga_config *c) {
    ga_gate g = ga_gate_of(c);
    ga_sizes z;
    z.C = c->d_model;
    z.L = c->n_layers;
    z.HQ = c->n_heads;
    z.HK = c->n_kv_heads;
    z.D = c->head_dim;
    z.F = c->d_ff;
    z.V = c->vocab_size;
    z.G = g.input == GA_INPUT_QUERY && c->gate_input_dims == 0 ? g.logits : 0;
    z.G_channels = g.input == GA_INPUT_QUERY && c->gate_input_dims > 0 ? g.logits : 0;
    z.G_free = g.input == GA_INPUT_QUERY ? 0 : g.logits;
    ga_switch s = ga_switch_of(c);
    z.R_key = c->switch_heads == GA_SWITCH_KV ? s.H * s.E : 0;
    z.R_value = c->switch_heads != GA_SWITCH_NONE ? s.H * s.E : 0;
    z.X_key = gai_max(z.R_key, z.HK) * z.D;
    z.X_value = gai_max(z.R_value, z.HK) * z.D;
    z.Z = z.HQ * z.D + z.G + z.R_key + z.R_value + z.X_key + z.X_value;
    z.E = c->n_experts;
    z.K = ga_router_of(c).K;
    return z;
}

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

/* e^x. In float a polynomial after the reduction x = n ln 2 + r, without branches, so that loops over it become vector
 * code; below 2 ulp. NaN stays NaN, what underflows is 0, what overflows is infinite. */
GAI_INLINE ga_real gai_exp(ga_real x) {
#if defined(GA_DOUBLE) || !GAI_EXACT_FLOAT
    return (ga_real)exp(x);
#else
    float y = x < -87.3f ? -87.3f : x > 88.7f ? 88.7f : x;
    float shifted = y * 1.44269504f + 12582912.f; /* 1.5 * 2^23: the low bits of the sum are the rounded integer */
    float n = shifted - 12582912.f;
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.381446685e-3f;
    p = p * r + 8.368780418e-3f;
    p = p * r + 4.166839422e-2f;
    p = p * r + 1.666652011e-1f;
    p = p * r + 4.999999341e-1f;
    p = p * r * r + r + 1;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4b400000u + 126u) << 23; /* 2^(n-1): n reaches 128 */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    float e = p * scale * 2;
    return x < -87.3f ? 0 : x > 88.7f ? (float)INFINITY : e;
#endif
}

GAI_INLINE ga_real gai_sqrt(ga_real x) {
#ifdef GA_DOUBLE
    return sqrt(x);
#else
    return sqrtf(x);
#endif
}

GAI_INLINE ga_real gai_log(ga_real x) {
#ifdef GA_DOUBLE
    return log(x);
#else
    return logf(x);
#endif
}

GAI_INLINE ga_real gai_sigmoid(ga_real x) {
    return 1 / (1 + gai_exp(-x));
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* All matrix products come down to one kernel: GAI_MR rows by GAI_NR columns of C stay in registers while
 * the contraction runs over k; each step loads GAI_NR values of B once and multiplies them with one value
 * from each row of A.
 *
 *            B  (K, NR), packed: line k is contiguous
 *          +---------+
 *          | k ----> |
 *          +---------+
 *     A    C (MR, NR)
 *   +---+  +---------+
 *   | | |  |         |      C[i][:] += A[i][k] * B[k][:]
 *   +---+  +---------+
 *
 * Every element of C is one chain of additions over k = 0, 1, ..., K-1, however the work is cut: neither block sizes
 * nor threads change a bit. Vectors are gcc's and clang's generic ones; elsewhere a lane is a scalar. */
#if !defined(__GNUC__) || !GAI_EXACT_FLOAT
enum { GAI_VECTOR_BYTES = sizeof(ga_real), GAI_MR = 4, GAI_NV = 4 };
typedef ga_real gai_vector;
#else
#ifdef __AVX512F__
enum { GAI_VECTOR_BYTES = 64, GAI_MR = 8, GAI_NV = 2 };
#elif defined(__AVX__)
enum { GAI_VECTOR_BYTES = 32, GAI_MR = 6, GAI_NV = 2 };
#else
enum { GAI_VECTOR_BYTES = 16, GAI_MR = 4, GAI_NV = 2 };
#endif
typedef ga_real gai_vector __attribute__((vector_size(GAI_VECTOR_BYTES)));
#endif
enum {
    GAI_LANES = GAI_VECTOR_BYTES / sizeof(ga_real),
    GAI_NR = GAI_LANES * GAI_NV,
    GAI_KC = 256, /* contraction steps of a packed panel of B: it stays in the first-level caches */
    GAI_NC = GAI_NR * (64 / GAI_NR > 0 ? 64 / GAI_NR : 1), /* columns that a task packs at a time */
    GAI_MC = 512                                           /* rows of C in a task */
};

/* A matrix as a product reads it: element (i, j) is at[i * row + j * column]. */
typedef struct {
    const ga_real *at;
    size_t row, column;
} gai_matrix;

/* Rows that begin `stride` values apart. */
GAI_INLINE gai_matrix gai_rows(const ga_real *at, size_t stride) {
    gai_matrix m = {at, stride, 1};
    return m;
}

GAI_INLINE gai_matrix gai_transposed(const ga_real *at, size_t stride) {
    gai_matrix m = {at, 1, stride};
    return m;
}

/* What remains of a matrix from element (i, j) on. */
GAI_INLINE gai_matrix gai_from(gai_matrix m, size_t i, size_t j) {
    m.at += i * m.row + j * m.column;
    return m;
}

/* C (GAI_MR, GAI_NR), rows ldc apart, (+)= A B for a packed panel b of B. */
GAI_INLINE void gai_kernel(ga_real *c, size_t ldc, gai_matrix a, const ga_real *b, size_t K, bool add) {
    gai_vector t[GAI_MR][GAI_NV];
    for (size_t i = 0; i < GAI_MR; i++)
        for (size_t j = 0; j < GAI_NV; j++)
            if (add)
                memcpy(&t[i][j], c + i * ldc + j * GAI_LANES, sizeof(gai_vector));
            else
                memset(&t[i][j], 0, sizeof(gai_vector));
    for (size_t k = 0; k < K; k++) {
        gai_vector line[GAI_NV];
        for (size_t j = 0; j < GAI_NV; j++) memcpy(&line[j], b + k * GAI_NR + j * GAI_LANES, sizeof(gai_vector));
        for (size_t i = 0; i < GAI_MR; i++)
            for (size_t j = 0; j < GAI_NV; j++) t[i][j] += a.at[i * a.row + k * a.column] * line[j];
    }
    for (size_t i = 0; i < GAI_MR; i++)
        for (size_t j = 0; j < GAI_NV; j++) memcpy(c + i * ldc + j * GAI_LANES, &t[i][j], sizeof(gai_vector));
}

/* The kernel for a block with fewer than GAI_MR rows or GAI_NR columns: it computes on padded copies. */
GAI_FN void gai_kernel_edge(ga_real *c, size_t ldc, gai_matrix a, const ga_real *b, size_t rows, size_t columns,
                            size_t K, bool add) {
    ga_real block[(size_t)GAI_MR * GAI_NR] = {0}, strip[(size_t)GAI_MR * GAI_KC];
    memset(strip, 0, sizeof strip);
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < K; k++) strip[i * GAI_KC + k] = a.at[i * a.row + k * a.column];
    if (add)
        for (size_t i = 0; i < rows; i++) memcpy(block + i * GAI_NR, c + i * ldc, columns * sizeof *c);
    gai_kernel(block, GAI_NR, gai_rows(strip, GAI_KC), b, K, true);
    for (size_t i = 0; i < rows; i++) memcpy(c + i * ldc, block + i * GAI_NR, columns * sizeof *c);
}

/* C (M, columns <= GAI_NR) (+)= A B for one packed panel of B, K <= GAI_KC. */
GAI_INLINE void gai_panel(ga_real *c, size_t ldc, gai_matrix a, const ga_real *b, size_t M, size_t columns, size_t K,
                          bool add) {
    for (size_t i = 0; i < M; i += GAI_MR) {
        size_t rows = gai_min(GAI_MR, M - i);
        if (rows == GAI_MR && columns == GAI_NR)
            gai_kernel(c + i * ldc, ldc, gai_from(a, i, 0), b, K, add);
        else
            gai_kernel_edge(c + i * ldc, ldc, gai_from(a, i, 0), b, rows, columns, K, add);
    }
}

/* Packs B (K, columns <= GAI_NR) as a panel of K lines of GAI_NR values, padded with zeros. */
GAI_FN void gai_pack(ga_real *to, gai_matrix b, size_t K, size_t columns) {
    if (columns < GAI_NR) memset(to, 0, K * GAI_NR * sizeof *to);
    if (b.column == 1)
        for (size_t k = 0; k < K; k++) memcpy(to + k * GAI_NR, b.at + k * b.row, columns * sizeof *to);
    else
        for (size_t k0 = 0; k0 < K; k0 += 16) /* 16 at a time: each line read is one cache line of B */
            for (size_t j = 0; j < columns; j++)
                for (size_t k = k0; k < gai_min(K, k0 + 16); k++) to[k * GAI_NR + j] = b.at[k * b.row + j * b.column];
}

/* C (M, N), rows ldc apart, (+)= A (M, K) B (K, N) on the calling thread. */
GAI_FN void gai_product_block(ga_real *c, size_t ldc, gai_matrix a, gai_matrix b, size_t M, size_t N, size_t K,
                              bool add) {
    ga_real panel[GAI_KC * GAI_NR];
    for (size_t k = 0; k < K; k += GAI_KC)
        for (size_t j = 0; j < N; j += GAI_NR) {
            size_t depth = gai_min(GAI_KC, K - k), columns = gai_min(GAI_NR, N - j);
            gai_pack(panel, gai_from(b, k, j), depth, columns);
            gai_panel(c + j, ldc, gai_from(a, 0, k), panel, M, columns, depth, add || k > 0);
        }
}

/* The same by all threads: a task is GAI_MC rows by GAI_NC columns of C. */
GAI_FN void gai_product(ga_real *c, size_t ldc, gai_matrix a, gai_matrix b, size_t M, size_t N, size_t K, bool add) {
    size_t strips = gai_ceil_div(M, GAI_MC), panels = gai_ceil_div(N, GAI_NC);
    GAI_PARALLEL_TASKS
    for (size_t task = 0; task < strips * panels; task++) {
        size_t i = task % strips * GAI_MC, j = task / strips * GAI_NC;
        gai_product_block(c + i * ldc + j, ldc, gai_from(a, i, 0), gai_from(b, 0, j), gai_min(GAI_MC, M - i),
                          gai_min(GAI_NC, N - j), K, add);
    }
}

/* sum_i a_i b_i in a fixed order: 16 partial sums. */
GAI_INLINE ga_real gai_dot(const ga_real *a, const ga_real *b, size_t n) {
    ga_real sums[16] = {0}, sum = 0;
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (size_t j = 0; j < 16; j++) sums[j] += a[i + j] * b[i + j];
    for (; i < n; i++) sums[i % 16] += a[i] * b[i];
    for (size_t j = 0; j < 16; j++) sum += sums[j];
    return sum;
}

/* What RMSNorm multiplies n values with: 1 / sqrt(mean(x^2) + eps). */
GAI_INLINE ga_real gai_rstd(const ga_real *x, size_t n, ga_real eps) {
    return 1 / gai_sqrt(gai_dot(x, x, n) / (ga_real)n + eps);
}

/* ==== 2.1: softmax attention ====================================================================================== */

/* Eq. 1 and Eq. 4, and every other linear map.
 *
 *     y = x w^T
 *
 *     y  (M, O)  out
 *     x  (M, I)
 *     w  (O, I)   as nn.Linear stores it
 */
GA_API void ga_linear_forward(ga_real *y, const ga_real *x, const ga_real *w, size_t M, size_t O, size_t I) {
    if (M >= GAI_MR / 2) {
        gai_product(y, O, gai_rows(x, I), gai_transposed(w, I), M, O, I, false);
        return;
    }
    /* A row or two, as in generation: packing w would cost more than reading it once. */
    GAI_PARALLEL_FOR
    for (size_t o = 0; o < O; o++)
        for (size_t m = 0; m < M; m++) y[m * O + o] = gai_dot(x + m * I, w + o * I, I);
}

/*     dx  = dy w       (M, I)  out; may be NULL
 *     dw += dy^T x     (O, I)  added to
 *     dy  (M, O)
 */
GA_API void ga_linear_backward(ga_real *dx, ga_real *dw, const ga_real *dy, const ga_real *x, const ga_real *w,
                               size_t M, size_t O, size_t I) {
    if (dx) gai_product(dx, I, gai_rows(dy, O), gai_rows(w, I), M, I, O, false);
    gai_product(dw, I, gai_transposed(dy, O), gai_rows(x, I), O, I, M, true);
}

/* A linear map of the first I channels of x, as the gate with gate_input_dims = I has it.
 *
 *     y = x[:, :I] w^T
 *
 *     y  (M, O)  out
 *     x  M rows, `stride` >= I apart
 *     w  (O, I)
 */
GA_API void ga_linear_channels_forward(ga_real *y, const ga_real *x, size_t stride, const ga_real *w, size_t M,
                                       size_t O, size_t I) {
    gai_product(y, O, gai_rows(x, stride), gai_transposed(w, I), M, O, I, false);
}

/*     dx[:, :I] += dy w,   dw += dy^T x[:, :I]      dx: rows as those of x, added to; dw (O, I) added to; dy (M, O)
 */
GA_API void ga_linear_channels_backward(ga_real *dx, ga_real *dw, const ga_real *dy, const ga_real *x, size_t stride,
                                        const ga_real *w, size_t M, size_t O, size_t I) {
    gai_product(dx, stride, gai_rows(dy, O), gai_rows(w, I), M, I, O, true);
    gai_product(dw, I, gai_transposed(dy, O), gai_rows(x, stride), O, I, M, true);
}

/* RoPE of one head, where it lies: the pairs (i, i + D/2) turn by angles whose cosines and sines are `rope` (D). */
GAI_INLINE void gai_rotate(ga_real *y, const ga_real *rope, size_t D) {
    const ga_real *cosine = rope, *sine = rope + D / 2;
    for (size_t i = 0; i < D / 2; i++) {
        ga_real a = y[i], b = y[i + D / 2];
        y[i] = a * cosine[i] - b * sine[i];
        y[i + D / 2] = b * cosine[i] + a * sine[i];
    }
}

GAI_INLINE void gai_rotate_back(ga_real *dy, const ga_real *rope, size_t D) {
    const ga_real *cosine = rope, *sine = rope + D / 2;
    for (size_t i = 0; i < D / 2; i++) {
        ga_real a = dy[i], b = dy[i + D / 2];
        dy[i] = a * cosine[i] + b * sine[i];
        dy[i + D / 2] = b * cosine[i] - a * sine[i];
    }
}

/* Splits projections into heads: QK-norm, then RoPE in its "rotate half" form (section 2.1 and A.2).
 *
 *     u   = w x / sqrt(mean(x^2) + eps)                   over the D values of a head; u = x when w is NULL
 *     y_i = u_i cos_i - u_{i+D/2} sin_i,   y_{i+D/2} = u_{i+D/2} cos_i + u_i sin_i   i < D/2; y = u when rope is NULL
 *
 *     y     (B, T, H, D)  out
 *     x     (B * T) rows of H * D values, x_stride apart: a section of [query | gate | key | value], or gated values
 *     w     (D)           or NULL
 *     rope  (T, D)        or NULL: cos of D/2 angles, then sin, for the first of the T positions on; YaRN scales both
 *
 * The backward pass needs x; the norm is cheap to do again.
 */
GA_API void ga_heads_forward(ga_real *y, const ga_real *x, size_t x_stride, const ga_real *w, const ga_real *rope,
                             size_t B, size_t T, size_t H, size_t D, ga_real eps) {
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < B * T; n++)
        for (size_t h = 0; h < H; h++) {
            const ga_real *xh = x + n * x_stride + h * D;
            ga_real *yh = y + (n * H + h) * D, r = w ? gai_rstd(xh, D, eps) : 1;
            for (size_t i = 0; i < D; i++) yh[i] = w ? w[i] * xh[i] * r : xh[i];
            if (rope) gai_rotate(yh, rope + n % T * D, D);
        }
}

/* QK-norm of one head backward: du (D) becomes dx; dw (D) is added to. */
GAI_INLINE void gai_norm_head_backward(ga_real *du, ga_real *dw, const ga_real *x, const ga_real *w, size_t D,
                                       ga_real eps) {
    ga_real r = gai_rstd(x, D, eps), mean = 0;
    for (size_t i = 0; i < D; i++) {
        dw[i] += du[i] * x[i] * r;
        mean += w[i] * du[i] * x[i] / (ga_real)D;
    }
    for (size_t i = 0; i < D; i++) du[i] = r * (w[i] * du[i] - r * r * x[i] * mean);
}

/*     du_i = dy_i cos_i + dy_{i+D/2} sin_i,   du_{i+D/2} = dy_{i+D/2} cos_i - dy_i sin_i        the inverse rotation
 *     dx   = r (w du - r^2 x mean(w du x)),   dw += sum over rows and heads of du x r,   r = 1 / sqrt(mean(x^2) + eps)
 *
 *     dx  (B * T) rows, dx_stride apart, out
 *     dw  (D)      added to; unused when w is NULL
 */
GA_API void ga_heads_backward(ga_real *dx, ga_real *dw, const ga_real *dy, const ga_real *x, size_t x_stride,
                              size_t dx_stride, const ga_real *w, const ga_real *rope, size_t B, size_t T, size_t H,
                              size_t D, ga_real eps) {
    enum { CHUNKS = 16 }; /* partial sums of dw, added in order at the end */
    ga_real partial[CHUNKS][GA_MAX_HEAD_DIM];
    memset(partial, 0, sizeof partial);
    size_t N = B * T;
    GAI_PARALLEL_FOR
    for (size_t chunk = 0; chunk < CHUNKS; chunk++)
        for (size_t n = N * chunk / CHUNKS; n < N * (chunk + 1) / CHUNKS; n++)
            for (size_t h = 0; h < H; h++) {
                const ga_real *xh = x + n * x_stride + h * D;
                ga_real *du = dx + n * dx_stride + h * D;
                memcpy(du, dy + (n * H + h) * D, D * sizeof *du);
                if (rope) gai_rotate_back(du, rope + n % T * D, D);
                if (w) gai_norm_head_backward(du, partial[chunk], xh, w, D, eps);
            }
    for (size_t chunk = 0; w && chunk < CHUNKS; chunk++)
        for (size_t i = 0; i < D; i++) dw[i] += partial[chunk][i];
}

/* Of the scores S only a tile exists at a time: `rows` queries from i0 on by `keys` keys from j0 on. */
enum { GAI_TILE = 64 }; /* at most, of each */

typedef struct {
    size_t i0, rows, j0, keys;
} gai_tile;

/* How many keys of the tile its query i sees. */
GAI_INLINE size_t gai_visible(gai_tile t, size_t i, ga_shape n) {
    size_t end = n.S - n.T + t.i0 + i + 1;
    return end <= t.j0 ? 0 : gai_min(t.keys, end - t.j0);
}

/* The first query that sees key j0, rounded down to a tile: tiles above the diagonal are never computed. */
GAI_INLINE size_t gai_first_query(size_t j0, ga_shape n) {
    size_t offset = n.S - n.T;
    return j0 > offset ? (j0 - offset) / GAI_TILE * GAI_TILE : 0;
}

/* The tile s_ij = q_i . k_j / sqrt(D), (rows, GAI_TILE). */
GAI_INLINE void gai_scores(ga_real *s, const ga_real *q, const ga_real *k_tile, size_t rows, ga_shape n) {
    ga_real scale = 1 / gai_sqrt((ga_real)n.D);
    for (size_t j = 0; j < GAI_TILE; j += GAI_NR)
        for (size_t d = 0; d < n.D; d += GAI_KC)
            gai_panel(s + j, GAI_TILE, gai_rows(q + d, n.HQ * n.D), k_tile + j * n.D + d * GAI_NR, rows, GAI_NR,
                      gai_min(GAI_KC, n.D - d), d > 0);
    for (size_t i = 0; i < rows * GAI_TILE; i++) s[i] *= scale;
}

/* Packs the transpose of a tile of rows (keys, D), so that products with it run over D. */
GAI_INLINE void gai_pack_tile(ga_real *to, const ga_real *rows, size_t stride, size_t keys, size_t D) {
    for (size_t j = 0; j < GAI_TILE; j += GAI_NR) {
        if (j < keys)
            gai_pack(to + j * D, gai_transposed(rows + j * stride, stride), D, gai_min(GAI_NR, keys - j));
        else
            memset(to + j * D, 0, GAI_NR * D * sizeof *to);
    }
}

/* One query tile against one key tile: y and lse, which hold the softmax so far, take in the new keys. first: y and lse
 * hold nothing yet.
 *
 *     lse' = log(exp(lse) + sum_j exp(s_j)),   y' = y exp(lse - lse') + sum_j exp(s_j - lse') v_j
 */
GAI_FN void gai_sdpa_tile(ga_real *y, ga_real *lse, const ga_real *q, const ga_real *k_tile, const ga_real *v,
                          gai_tile t, bool first, ga_shape n) {
    ga_real s[GAI_TILE * GAI_TILE];
    gai_scores(s, q, k_tile, t.rows, n);
    for (size_t i = 0; i < t.rows; i++) {
        size_t visible = gai_visible(t, i, n);
        ga_real *p = s + i * GAI_TILE, *yi = y + i * n.HQ * n.D;
        for (size_t j = visible; j < GAI_TILE; j++) p[j] = 0;
        if (visible == 0) continue;
        ga_real top = p[0];
        for (size_t j = 1; j < visible; j++) top = p[j] > top ? p[j] : top;
        if (!first && lse[i] > top) top = lse[i];
        ga_real sum = first ? 0 : gai_exp(lse[i] - top), part[16] = {0};
        for (size_t j = 0; j < GAI_TILE; j++) {
            p[j] = j < visible ? gai_exp(p[j] - top) : 0;
            part[j % 16] += p[j];
        }
        for (size_t j = 0; j < 16; j++) sum += part[j];
        ga_real next = top + gai_log(sum), keep = first ? 0 : gai_exp(lse[i] - next);
        for (size_t j = 0; j < visible; j++) p[j] /= sum;
        for (size_t d = 0; d < n.D; d++) yi[d] = first ? 0 : yi[d] * keep;
        lse[i] = next;
    }
    gai_product_block(y, n.HQ * n.D, gai_rows(s, GAI_TILE), gai_rows(v, n.HK * n.D), t.rows, n.D, t.keys, true);
}

/* Eq. 2, section 2.1: causal scaled dot-product attention, tiled with a running softmax; memory linear in T and S.
 *
 *     S_ij = q_i . k_j / sqrt(D)  for j <= S-T+i,   P = softmax(S),   y_i = sum_j P_ij v_j
 *
 * With a sink logit s_h for each head the softmax has one more term, which carries no value:
 *
 *     P_ij = exp(S_ij) / (exp(s_h) + sum_j exp(S_ij));      s_h = 0: one is added to the denominator
 *
 *     y    (B, T, HQ, D)  out
 *     lse  (B, HQ, T)     out: log of the denominator; with q, k, v and y all that the backward pass needs
 *     q    (B, T, HQ, D)  the last T of S positions
 *     k, v (B, S, HK, D)  query head h reads key-value head h / (HQ / HK)
 *     sink (HQ)           or NULL
 */
GA_API void ga_sdpa_forward(ga_real *y, ga_real *lse, const ga_real *q, const ga_real *k, const ga_real *v,
                            const ga_real *sink, ga_shape n) {
    GAI_PARALLEL_TASKS
    for (size_t task = 0; task < n.B * n.HQ; task++) {
        ga_real k_tile[(size_t)GAI_TILE * GA_MAX_HEAD_DIM];
        size_t b = task / n.HQ, h = task % n.HQ, kv = (b * n.S * n.HK + h / (n.HQ / n.HK)) * n.D;
        size_t q0 = (b * n.T * n.HQ + h) * n.D;
        for (size_t i = 0; sink && i < n.T; i++) { /* the softmax over the sink alone */
            lse[task * n.T + i] = sink[h];
            memset(y + q0 + i * n.HQ * n.D, 0, n.D * sizeof *y);
        }
        for (size_t j = 0; j < n.S; j += GAI_TILE) {
            size_t keys = gai_min(GAI_TILE, n.S - j), at = kv + j * n.HK * n.D;
            gai_pack_tile(k_tile, k + at, n.HK * n.D, keys, n.D);
            for (size_t i = gai_first_query(j, n); i < n.T; i += GAI_TILE) {
                size_t row = q0 + i * n.HQ * n.D;
                gai_tile tile = {i, gai_min(GAI_TILE, n.T - i), j, keys};
                gai_sdpa_tile(y + row, lse + task * n.T + i, q + row, k_tile, v + at, tile, j == 0 && !sink, n);
            }
        }
    }
}

/* One query tile against one key tile, backward. dk and dv are those of this query head alone, (S, D). */
GAI_FN void gai_sdpa_tile_backward(ga_real *dq, ga_real *dk, ga_real *dv, const ga_real *dy, const ga_real *lse,
                                   const ga_real *delta, const ga_real *q, const ga_real *k, const ga_real *k_tile,
                                   const ga_real *v_tile, gai_tile t, ga_shape n) {
    ga_real p[GAI_TILE * GAI_TILE], ds[GAI_TILE * GAI_TILE];
    ga_real scale = 1 / gai_sqrt((ga_real)n.D);
    size_t stride = n.HQ * n.D;
    gai_scores(p, q, k_tile, t.rows, n);
    gai_scores(ds, dy, v_tile, t.rows, n); /* (dy_i . v_j) / sqrt(D) */
    for (size_t i = 0; i < t.rows; i++) {
        size_t visible = gai_visible(t, i, n);
        for (size_t j = 0; j < GAI_TILE; j++) {
            size_t at = i * GAI_TILE + j;
            p[at] = j < visible ? gai_exp(p[at] - lse[i]) : 0;
            ds[at] = j < visible ? p[at] * (ds[at] - delta[i] * scale) : 0;
        }
    }
    gai_product_block(dv, n.D, gai_transposed(p, GAI_TILE), gai_rows(dy, stride), t.keys, n.D, t.rows, true);
    gai_product_block(dk, n.D, gai_transposed(ds, GAI_TILE), gai_rows(q, stride), t.keys, n.D, t.rows, true);
    gai_product_block(dq, stride, gai_rows(ds, GAI_TILE), gai_rows(k, n.HK * n.D), t.rows, n.D, t.keys, true);
}

/* dk, dv (B, T, HK, D): sums over the query heads of each group of dk_heads, dv_heads (B, HQ, T, D). */
GAI_FN void gai_sum_head_gradients(ga_real *dk, ga_real *dv, const ga_real *dk_heads, const ga_real *dv_heads,
                                   ga_shape n) {
    size_t T = n.T, D = n.D, group = n.HQ / n.HK;
    GAI_PARALLEL_FOR
    for (size_t row = 0; row < n.B * T; row++)
        for (size_t h = 0; h < n.HK; h++)
            for (size_t d = 0; d < D; d++) {
                ga_real sum_k = 0, sum_v = 0;
                for (size_t g = 0; g < group; g++) {
                    size_t at = ((row / T * n.HQ + h * group + g) * T + row % T) * D + d;
                    sum_k += dk_heads[at];
                    sum_v += dv_heads[at];
                }
                dk[(row * n.HK + h) * D + d] = sum_k;
                dv[(row * n.HK + h) * D + d] = sum_v;
            }
}

/* dsink_h += sum_i -exp(s_h - lse_i) delta_i over the rows of head h; lse, delta (B, HQ, T), delta_i = dy_i . y_i. */
GAI_FN void gai_sum_sink_gradients(ga_real *dsink, const ga_real *delta, const ga_real *lse, const ga_real *sink,
                                   ga_shape n) {
    for (size_t h = 0; h < n.HQ; h++) {
        double sum = 0;
        for (size_t b = 0; b < n.B; b++)
            for (size_t i = 0; i < n.T; i++) {
                size_t at = (b * n.HQ + h) * n.T + i;
                sum -= (double)(gai_exp(sink[h] - lse[at]) * delta[at]);
            }
        dsink[h] += (ga_real)sum;
    }
}

/*     dv_j  = sum_i P_ij dy_i
 *     dS_ij = P_ij (dy_i . v_j - dy_i . y_i)        since sum_j P_ij (dy_i . v_j) = dy_i . y_i
 *     dq_i  = sum_j dS_ij k_j / sqrt(D),            dk_j = sum_i dS_ij q_i / sqrt(D)
 *     ds_h += sum_i exp(s_h - lse_i) (0 - dy_i . y_i)
 *
 *     dq (B, T, HQ, D), dk, dv (B, T, HK, D)  out
 *     dsink (HQ)  added to; may be NULL
 *     scratch  B * HQ * T * (2 D + 1) values: dk and dv of each query head, summed over a group at the end, and dy . y
 * S must be T.
 */
GA_API void ga_sdpa_backward(ga_real *dq, ga_real *dk, ga_real *dv, ga_real *dsink, ga_real *scratch, const ga_real *dy,
                             const ga_real *y, const ga_real *lse, const ga_real *q, const ga_real *k, const ga_real *v,
                             const ga_real *sink, ga_shape n) {
    size_t T = n.T, D = n.D, heads = n.B * n.HQ, group = n.HQ / n.HK;
    ga_real *dk_heads = scratch, *dv_heads = dk_heads + heads * T * D, *deltas = dv_heads + heads * T * D;
    GAI_PARALLEL_TASKS
    for (size_t task = 0; task < heads; task++) {
        ga_real k_tile[(size_t)GAI_TILE * GA_MAX_HEAD_DIM], v_tile[(size_t)GAI_TILE * GA_MAX_HEAD_DIM];
        size_t b = task / n.HQ, h = task % n.HQ, kv = (b * T * n.HK + h / group) * D, q0 = (b * T * n.HQ + h) * D;
        ga_real *dk_head = dk_heads + task * T * D, *dv_head = dv_heads + task * T * D, *delta = deltas + task * T;
        memset(dk_head, 0, T * D * sizeof *dk);
        memset(dv_head, 0, T * D * sizeof *dv);
        for (size_t i = 0; i < T; i++) {
            size_t at = q0 + i * n.HQ * D;
            delta[i] = gai_dot(dy + at, y + at, D);
            memset(dq + at, 0, D * sizeof *dq);
        }
        for (size_t j = 0; j < T; j += GAI_TILE) {
            size_t keys = gai_min(GAI_TILE, T - j), at = kv + j * n.HK * D;
            gai_pack_tile(k_tile, k + at, n.HK * D, keys, D);
            gai_pack_tile(v_tile, v + at, n.HK * D, keys, D);
            for (size_t i = j; i < T; i += GAI_TILE) {
                size_t row = q0 + i * n.HQ * D;
                gai_tile tile = {i, gai_min(GAI_TILE, T - i), j, keys};
                gai_sdpa_tile_backward(dq + row, dk_head + j * D, dv_head + j * D, dy + row, lse + task * T + i,
                                       delta + i, q + row, k + at, k_tile, v_tile, tile, n);
            }
        }
    }
    gai_sum_head_gradients(dk, dv, dk_heads, dv_heads, n);
    if (sink && dsink) gai_sum_sink_gradients(dsink, deltas, lse, sink, n);
}

/* ==== 2.2: the gate =============================================================================================== */

/* sigma of Eq. 5 and its derivative; NS-sigmoid is Eq. 9. */
GAI_INLINE ga_real gai_gate_activation(ga_real x, ga_gate_activation activation) {
    switch (activation) {
    case GA_SIGMOID:
        return gai_sigmoid(x);
    case GA_SILU:
        return x * gai_sigmoid(x);
    case GA_NS_SIGMOID:
        return (ga_real)0.5 + (ga_real)0.5 * gai_sigmoid(x);
    default:
        return x;
    }
}

GAI_INLINE ga_real gai_gate_derivative(ga_real x, ga_gate_activation activation) {
    ga_real p = gai_sigmoid(x);
    switch (activation) {
    case GA_SIGMOID:
        return p * (1 - p);
    case GA_SILU:
        return p * (1 + x * (1 - p));
    case GA_NS_SIGMOID:
        return (ga_real)0.5 * p * (1 - p);
    default:
        return 1;
    }
}

/* out_i = sigma(s_i): the choice stands outside the loops, so that each becomes vector code. */
GAI_INLINE void gai_gate_activations(ga_real *out, const ga_real *s, size_t n, ga_gate_activation activation) {
    if (activation == GA_SIGMOID)
        for (size_t i = 0; i < n; i++) out[i] = gai_gate_activation(s[i], GA_SIGMOID);
    else if (activation == GA_SILU)
        for (size_t i = 0; i < n; i++) out[i] = gai_gate_activation(s[i], GA_SILU);
    else if (activation == GA_NS_SIGMOID)
        for (size_t i = 0; i < n; i++) out[i] = gai_gate_activation(s[i], GA_NS_SIGMOID);
    else
        for (size_t i = 0; i < n; i++) out[i] = s[i];
}

enum { GAI_GATE_CHUNK = 128 }; /* values of a head that are worked on at a time */

/* Whether each value has a logit of its own. */
GAI_INLINE bool gai_gate_elementwise(ga_gate g) {
    return g.type == GA_ELEMENTWISE && g.input != GA_INPUT_SCALAR;
}

/* Scores of values d0 .. d0+n-1 of head h of a row: what multiplies Y, or is added. A head-shared score is the mean of
 * the heads' scores. */
GAI_FN void gai_gate_scores(ga_real *score, const ga_real *s, ga_gate g, size_t h, size_t d0, size_t n) {
    ga_real one[GAI_GATE_CHUNK];
    size_t first = g.sharing == GA_SHARED ? 0 : h, count = g.sharing == GA_SHARED ? g.H : 1;
    if (gai_gate_elementwise(g)) {
        gai_gate_activations(score, s + first * g.D + d0, n, g.activation);
        for (size_t i = first + 1; i < first + count; i++) {
            gai_gate_activations(one, s + i * g.D + d0, n, g.activation);
            for (size_t d = 0; d < n; d++) score[d] += one[d];
        }
    } else {
        ga_real sum = 0;
        if (g.input == GA_INPUT_SCALAR) first = 0;
        for (size_t i = first; i < first + count; i++) sum += gai_gate_activation(s[i], g.activation);
        for (size_t d = 0; d < n; d++) score[d] = sum;
    }
    if (count > 1)
        for (size_t d = 0; d < n; d++) score[d] /= (ga_real)count;
}

/* Table 3 rows 5 and 6: no gate parameters, the non-linearity acts on the head's output itself.
 *
 *     o = y / sqrt(mean(y^2) + eps)   or   o = y sigmoid(y)
 */
GAI_FN void gai_self_forward(ga_real *o, const ga_real *y, ga_gate g) {
    ga_real r = gai_rstd(y, g.D, g.eps);
    for (size_t d = 0; d < g.D; d++) o[d] = g.activation == GA_RMSNORM ? y[d] * r : y[d] * gai_sigmoid(y[d]);
}

GAI_FN void gai_self_backward(ga_real *dy, const ga_real *d_o, const ga_real *y, ga_gate g) {
    ga_real r = gai_rstd(y, g.D, g.eps);
    ga_real mean = gai_dot(d_o, y, g.D) / (ga_real)g.D;
    for (size_t d = 0; d < g.D; d++)
        dy[d] = g.activation == GA_RMSNORM ? r * (d_o[d] - r * r * y[d] * mean)
                                           : d_o[d] * gai_gate_derivative(y[d], GA_SILU);
}

/* One row of H * D values. */
GAI_FN void gai_gate_row_forward(ga_real *o, const ga_real *y, const ga_real *s, ga_gate g) {
    ga_real score[GAI_GATE_CHUNK];
    for (size_t d0 = 0; d0 < g.D; d0 += GAI_GATE_CHUNK) {
        size_t count = gai_min(GAI_GATE_CHUNK, g.D - d0);
        for (size_t h = 0; h < g.H; h++) {
            size_t at = h * g.D + d0;
            if (h == 0 || g.sharing == GA_SPECIFIC) gai_gate_scores(score, s, g, h, d0, count);
            if (g.form == GA_MULTIPLICATIVE)
                for (size_t d = 0; d < count; d++) o[at + d] = y[at + d] * score[d];
            else
                for (size_t d = 0; d < count; d++) o[at + d] = y[at + d] + score[d];
        }
    }
}

/* Eq. 5, section 2.2: the gate.
 *
 *     score = sigma(S),  S = X W_theta     elementwise: one score for each value; headwise: one for each head
 *     o     = y score   (multiplicative)   or   y + score   (additive)
 *
 *     o  (N, H * D)  out
 *     y  N rows of H * D values, y_stride apart: what is modulated, at G1 to G5
 *     s  N rows of `logits` values, s_stride apart: a section of [query | gate | key | value] (X is the pre-norm's
 *        output, so one product makes all four) or, with gate_input_dims, of a product of its own; s_stride 0: the
 *        same parameters for every row (Table 4 row 6)
 *
 * The backward pass needs y and s.
 */
GA_API void ga_gate_forward(ga_real *o, const ga_real *y, size_t y_stride, const ga_real *s, size_t s_stride, size_t N,
                            ga_gate g) {
    size_t width = g.H * g.D;
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        if (g.form != GA_SELF) gai_gate_row_forward(o + n * width, y + n * y_stride, s + n * s_stride, g);
        for (size_t at = 0; g.form == GA_SELF && at < width; at += g.D)
            gai_self_forward(o + n * width + at, y + n * y_stride + at, g);
    }
}

/* dy of n values that a score has reached. */
GAI_INLINE void gai_gated_backward(ga_real *dy, const ga_real *d_o, const ga_real *score, size_t n, ga_gate g) {
    for (size_t d = 0; d < n; d++) dy[d] = g.form == GA_MULTIPLICATIVE ? d_o[d] * score[d] : d_o[d];
}

/* One row backward where each value has a logit of its own; ds is added to. */
GAI_FN void gai_elementwise_row_backward(ga_real *dy, ga_real *ds, const ga_real *d_o, const ga_real *y,
                                         const ga_real *s, ga_gate g) {
    bool multiplicative = g.form == GA_MULTIPLICATIVE, shared = g.sharing == GA_SHARED;
    ga_real score[GAI_GATE_CHUNK], d_score[GAI_GATE_CHUNK];
    for (size_t d0 = 0; d0 < g.D; d0 += GAI_GATE_CHUNK) {
        ga_real total[GAI_GATE_CHUNK] = {0}; /* shared: sums of d score over the heads */
        size_t count = gai_min(GAI_GATE_CHUNK, g.D - d0);
        for (size_t h = 0; h < g.H; h++) {
            size_t at = h * g.D + d0;
            if (h == 0 || !shared) gai_gate_scores(score, s, g, h, d0, count);
            gai_gated_backward(dy + at, d_o + at, score, count, g);
            for (size_t d = 0; d < count; d++) d_score[d] = multiplicative ? d_o[at + d] * y[at + d] : d_o[at + d];
            if (shared)
                for (size_t d = 0; d < count; d++) total[d] += d_score[d];
            else
                for (size_t d = 0; d < count; d++)
                    ds[at + d] += d_score[d] * gai_gate_derivative(s[at + d], g.activation);
        }
        for (size_t h = 0; shared && h < g.H; h++)
            for (size_t d = 0; d < count; d++)
                ds[h * g.D + d0 + d] +=
                    total[d] / (ga_real)g.H * gai_gate_derivative(s[h * g.D + d0 + d], g.activation);
    }
}

/* One row backward where a logit reaches a whole head, or one score the whole row; ds is added to. */
GAI_FN void gai_headwise_row_backward(ga_real *dy, ga_real *ds, const ga_real *d_o, const ga_real *y, const ga_real *s,
                                      ga_gate g) {
    bool scalar = g.input == GA_INPUT_SCALAR, shared = g.sharing == GA_SHARED;
    ga_real score[GAI_GATE_CHUNK], all = 0; /* all: sum of d score over the row */
    for (size_t d0 = 0; d0 < g.D; d0 += GAI_GATE_CHUNK) {
        size_t count = gai_min(GAI_GATE_CHUNK, g.D - d0);
        for (size_t h = 0; h < g.H; h++) {
            size_t at = h * g.D + d0;
            ga_real sum = 0;
            if (h == 0 || !shared) gai_gate_scores(score, s, g, h, d0, count);
            gai_gated_backward(dy + at, d_o + at, score, count, g);
            if (g.form == GA_MULTIPLICATIVE)
                sum = gai_dot(d_o + at, y + at, count);
            else
                for (size_t d = 0; d < count; d++) sum += d_o[at + d];
            if (scalar || shared)
                all += sum;
            else
                ds[h] += sum * gai_gate_derivative(s[h], g.activation);
        }
    }
    if (scalar)
        ds[0] += all * gai_gate_derivative(s[0], g.activation);
    else if (shared)
        for (size_t h = 0; h < g.H; h++) ds[h] += all / (ga_real)g.H * gai_gate_derivative(s[h], g.activation);
}

GAI_FN void gai_gate_row_backward(ga_real *dy, ga_real *ds, const ga_real *d_o, const ga_real *y, const ga_real *s,
                                  ga_gate g) {
    if (gai_gate_elementwise(g))
        gai_elementwise_row_backward(dy, ds, d_o, y, s, g);
    else
        gai_headwise_row_backward(dy, ds, d_o, y, s, g);
}

/*     dy       = d_o score  (multiplicative)   or   d_o  (additive)
 *     d score  = d_o y      (multiplicative)   or   d_o  (additive)
 *     dS       = sigma'(S) times the sum of d score over the values that the score reached (its head when headwise;
 *                all heads, divided by H, when shared)
 *
 *     dy  N rows, dy_stride apart, out
 *     ds  N rows, ds_stride apart, out; with s_stride 0 the sum over all rows is added to the one row ds
 */
GA_API void ga_gate_backward(ga_real *dy, size_t dy_stride, ga_real *ds, size_t ds_stride, const ga_real *d_o,
                             const ga_real *y, size_t y_stride, const ga_real *s, size_t s_stride, size_t N,
                             ga_gate g) {
    size_t width = g.H * g.D;
    if (g.form != GA_SELF && s_stride == 0) { /* every row adds to one ds: one after the other */
        for (size_t n = 0; n < N; n++)
            gai_gate_row_backward(dy + n * dy_stride, ds, d_o + n * width, y + n * y_stride, s, g);
        return;
    }
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        if (g.form == GA_SELF) {
            for (size_t at = 0; at < width; at += g.D)
                gai_self_backward(dy + n * dy_stride + at, d_o + n * width + at, y + n * y_stride + at, g);
            continue;
        }
        memset(ds + n * ds_stride, 0, g.logits * sizeof *ds);
        gai_gate_row_backward(dy + n * dy_stride, ds + n * ds_stride, d_o + n * width, y + n * y_stride,
                              s + n * s_stride, g);
    }
}

/* ==== the rest of the block ======================================================================================= */

/* x_n = w[tokens_n].    x (N, C) out,  tokens (N), each below V,  w (V, C) */
GA_API void ga_embedding_forward(ga_real *x, const int32_t *tokens, const ga_real *w, size_t N, size_t C) {
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) memcpy(x + n * C, w + (size_t)tokens[n] * C, C * sizeof *x);
}

/* dw[tokens_n] += dx_n: each thread takes columns of its own, so that equal tokens add up in the order of n. */
GA_API void ga_embedding_backward(ga_real *dw, const int32_t *tokens, const ga_real *dx, size_t N, size_t C) {
    enum { COLUMNS = 64 };
    GAI_PARALLEL_FOR
    for (size_t c0 = 0; c0 < C; c0 += COLUMNS)
        for (size_t n = 0; n < N; n++) {
            ga_real *row = dw + (size_t)tokens[n] * C;
            for (size_t c = c0; c < gai_min(C, c0 + COLUMNS); c++) row[c] += dx[n * C + c];
        }
}

/* RMSNorm.
 *
 *     h = w x rstd,   rstd = 1 / sqrt(mean(x^2) + eps)
 *
 *     h (N, C), rstd (N)  out;  x (N, C),  w (C).   The backward pass needs x and rstd.
 */
GA_API void ga_rmsnorm_forward(ga_real *h, ga_real *rstd, const ga_real *x, const ga_real *w, size_t N, size_t C,
                               ga_real eps) {
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        ga_real r = gai_rstd(x + n * C, C, eps);
        for (size_t c = 0; c < C; c++) h[n * C + c] = w[c] * x[n * C + c] * r;
        rstd[n] = r;
    }
}

/*     dx (+)= rstd (w dh - rstd^2 x mean(w dh x)),   dw += sum over rows of dh x rstd
 *
 *     dx (N, C)  added to when `add`, which is how the residual stream's gradient takes it in; else written
 *     dw (C)     added to
 */
GA_API void ga_rmsnorm_backward(ga_real *dx, ga_real *dw, const ga_real *dh, const ga_real *x, const ga_real *w,
                                const ga_real *rstd, size_t N, size_t C, bool add) {
    enum { COLUMNS = 64 };
    GAI_PARALLEL_FOR
    for (size_t c0 = 0; c0 < C; c0 += COLUMNS) /* before dx: it may lie where dh does */
        for (size_t n = 0; n < N; n++)
            for (size_t c = c0; c < gai_min(C, c0 + COLUMNS); c++) dw[c] += dh[n * C + c] * x[n * C + c] * rstd[n];
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const ga_real *xn = x + n * C, *dhn = dh + n * C;
        ga_real r = rstd[n], sums[16] = {0}, mean = 0;
        for (size_t c = 0; c < C; c++) sums[c % 16] += w[c] * dhn[c] * xn[c];
        for (size_t i = 0; i < 16; i++) mean += sums[i] / (ga_real)C;
        for (size_t c = 0; c < C; c++) {
            ga_real d = r * (w[c] * dhn[c] - r * r * xn[c] * mean);
            dx[n * C + c] = add ? dx[n * C + c] + d : d;
        }
    }
}

/* SwiGLU, between the two products of the FFN.
 *
 *     a = silu(act) up,   silu(x) = x sigmoid(x)
 *
 *     a (N, F)  out;   u (N, 2 F)  rows of [act | up], which the backward pass needs
 */
GA_API void ga_swiglu_forward(ga_real *a, const ga_real *u, size_t N, size_t F) {
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const ga_real *act = u + n * 2 * F, *up = act + F;
        for (size_t f = 0; f < F; f++) a[n * F + f] = act[f] * gai_sigmoid(act[f]) * up[f];
    }
}

/*     d act = da up silu'(act),   d up = da silu(act),   silu'(x) = p (1 + x (1 - p)),  p = sigmoid(x)
 *
 *     du (N, 2 F)  out;   da (N, F)
 */
GA_API void ga_swiglu_backward(ga_real *du, const ga_real *da, const ga_real *u, size_t N, size_t F) {
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const ga_real *act = u + n * 2 * F, *up = act + F, *dan = da + n * F;
        ga_real *d_act = du + n * 2 * F, *d_up = d_act + F;
        for (size_t f = 0; f < F; f++) {
            ga_real p = gai_sigmoid(act[f]);
            d_act[f] = dan[f] * up[f] * p * (1 + act[f] * (1 - p));
            d_up[f] = dan[f] * act[f] * p;
        }
    }
}

/* ==== 3.1: mixture of experts ===================================================================================== */

/* The FFN of a mixture is E FFNs, of which each position uses the K that the router chooses for it:
 *
 *     z = h W_router^T,   p = softmax(z),   S = the K largest of p,   f(h) = sum_{e in S} w_e FFN_e(h)
 *     w_e = p_e / sum_{i in S} p_i   (normalize_top_k)   or   p_e
 *
 * A choice (n, j), the j-th expert of position n, is slot s = n K + j. The N K slots are sorted by expert, so that the
 * rows of one expert stand together and a product over all experts is E products of contiguous matrices ("grouped"):
 *
 *     slots  n0 n0 n1 n1 n2 n2 ...       rows   | expert 0 | expert 1    | (none)  | expert 3 | ...
 *            e3 e0 e1 e0 e3 e1                    offsets[0] offsets[1]    offsets[2] = offsets[3]
 *
 * No position is dropped and no row is padded: there are always N K rows, so that memory is known
 * beforehand, while cost follows K, not E. The sort is stable: nothing depends on threads, and a device can
 * do it without asking the host.
 *
 * Two losses are added to the cross-entropy, each the mean over the layers:
 *
 *     L_z  = mean_n lse_n^2,   lse_n = log sum_e exp(z_ne)                               keeps the logits small
 *     L_lb = E sum_e f_e P_e,  f_e = c_e / tokens,   P_e = mean_n p_ne                   balances the load
 *
 * where c_e counts the positions that chose e; L_lb is K at perfect balance. Balance within a micro-batch would hinder
 * experts from specialising, so counts and tokens are those of the *global* batch: c_e is summed over the micro-batches
 * of an optimiser step, in ga_model.expert_counts, which are complete for all layers between forward and backward pass:
 * there ranks exchange theirs (ga_route_pool). When micro-batch m runs backward the choices of m+1, ... do not exist
 * yet; to know them would take a second forward pass over the whole batch. So the loss of micro-batch m is
 *
 *     L_lb,m = E sum_e f_e^(m) P_e,m,   f_e^(m) = c_e over micro-batches 1..m / tokens in 1..m,
 *
 * whose last term sees the whole batch; with one micro-batch a step it is the loss above. c_e is a count: piecewise
 * constant, so that its derivative is zero and the gradient below is exactly that of L_lb,m. */

/* The K largest of z, the largest first; of equal ones the first. */
GAI_FN void gai_top_k(int32_t *experts, const ga_real *z, ga_router r) {
    bool taken[GA_MAX_EXPERTS] = {false};
    for (size_t j = 0; j < r.K; j++) {
        size_t best = r.E;
        for (size_t e = 0; e < r.E; e++)
            if (!taken[e] && (best == r.E || z[e] > z[best])) best = e;
        taken[best] = true;
        experts[j] = (int32_t)best;
    }
}

/* Section 3.1: the router.  z, p, S and w as above.
 *
 *     p        (N, E)  out: all probabilities
 *     lse      (N)     out: log sum_e exp(z_ne)
 *     weights  (N, K)  out: w of the chosen experts
 *     experts  (N, K)  out: which they are, the most probable first
 *     logits   (N, E)  z; may be p
 *
 * The backward pass needs all that is put out.
 */
GA_API void ga_route_forward(ga_real *p, ga_real *lse, ga_real *weights, int32_t *experts, const ga_real *logits,
                             size_t N, ga_router r) {
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const ga_real *z = logits + n * r.E;
        const int32_t *chosen = experts + n * r.K;
        ga_real *pn = p + n * r.E, sum = 0, of_chosen = 0;
        gai_top_k(experts + n * r.K, z, r);
        ga_real top = z[chosen[0]];
        for (size_t e = 0; e < r.E; e++) {
            pn[e] = gai_exp(z[e] - top);
            sum += pn[e];
        }
        for (size_t e = 0; e < r.E; e++) pn[e] /= sum;
        lse[n] = top + gai_log(sum);
        for (size_t j = 0; j < r.K; j++) of_chosen += pn[chosen[j]];
        for (size_t j = 0; j < r.K; j++) weights[n * r.K + j] = pn[chosen[j]] / (r.normalize ? of_chosen : 1);
    }
}

/*     dp_e = (dw_e - sum_{i in S} dw_i w_i) / sum_{i in S} p_i    (normalised, e in S)   or   dw_e   (e in S)
 *          + balance_scale E f_e / N                              L_lb,m: c_e has no derivative
 *     dz_e = p_e (dp_e - sum_i dp_i p_i) + z_scale 2 lse p_e / N    L_z: d lse / d z_e = p_e
 *
 *     d_logits   (N, E)  out
 *     d_weights  (N, K)
 *     counts     (E)     c_e, of this micro-batch and those before it in the step
 *     balance_scale, z_scale: what the two losses are worth
 */
GA_API void ga_route_backward(ga_real *d_logits, const ga_real *d_weights, const ga_real *p, const ga_real *lse,
                              const int32_t *experts, const int32_t *counts, size_t N, ga_router r,
                              ga_real balance_scale, ga_real z_scale) {
    ga_real balance[GA_MAX_EXPERTS];
    double slots = 0;
    for (size_t e = 0; e < r.E; e++) slots += (double)counts[e];
    for (size_t e = 0; e < r.E; e++) {
        double f = (double)counts[e] * (double)r.K / slots;
        balance[e] = (ga_real)((double)balance_scale * (double)r.E * f / (double)N);
    }
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const ga_real *pn = p + n * r.E, *dw = d_weights + n * r.K;
        const int32_t *chosen = experts + n * r.K;
        ga_real *dz = d_logits + n * r.E, along = 0, of_chosen = 0, all = 0;
        for (size_t j = 0; j < r.K; j++) {
            of_chosen += pn[chosen[j]];
            along += dw[j] * pn[chosen[j]];
        }
        if (r.normalize) along /= of_chosen;
        for (size_t e = 0; e < r.E; e++) dz[e] = balance[e];
        for (size_t j = 0; j < r.K; j++) dz[chosen[j]] += r.normalize ? (dw[j] - along) / of_chosen : dw[j];
        for (size_t e = 0; e < r.E; e++) all += dz[e] * pn[e];
        for (size_t e = 0; e < r.E; e++) dz[e] = pn[e] * (dz[e] - all + z_scale * 2 * lse[n] / (ga_real)N);
    }
}

/* Sorts slots by expert, stable.
 *
 *     rows     (N K)    out: the row of a slot
 *     slots    (N K)    out: the slot of a row
 *     offsets  (E + 1)  out: rows offsets[e] .. offsets[e + 1] are those of expert e
 *     experts  (N, K)
 */
GA_API void ga_route_rows(int32_t *rows, int32_t *slots, int32_t *offsets, const int32_t *experts, size_t N,
                          ga_router r) {
    int32_t next[GA_MAX_EXPERTS];
    memset(offsets, 0, (r.E + 1) * sizeof *offsets);
    for (size_t s = 0; s < N * r.K; s++) offsets[experts[s] + 1]++;
    for (size_t e = 0; e < r.E; e++) {
        next[e] = offsets[e];
        offsets[e + 1] += offsets[e];
    }
    for (size_t s = 0; s < N * r.K; s++) {
        rows[s] = next[experts[s]]++;
        slots[rows[s]] = (int32_t)s;
    }
}

/* Adds what the losses need of a micro-batch to what is there of the step.
 *
 *     counts (E)      += rows of each expert
 *     sums   (E + 1)  += sum_n p_ne, and at the end sum_n lse_n^2
 */
GA_API void ga_route_sums(int32_t *counts, ga_real *sums, const int32_t *offsets, const ga_real *p, const ga_real *lse,
                          size_t N, ga_router r) {
    GAI_PARALLEL_FOR
    for (size_t e = 0; e <= r.E; e++) {
        double sum = 0;
        for (size_t n = 0; n < N; n++) sum += e < r.E ? (double)p[n * r.E + e] : (double)lse[n] * (double)lse[n];
        sums[e] += (ga_real)sum;
        if (e < r.E) counts[e] += offsets[e + 1] - offsets[e];
    }
}

/* With ranks: what each has counted of its micro-batch, one part behind the other, is added in the order of the ranks,
 * as if one had computed them in turn.
 *
 *     seen    (n)       out: c_e^(m), the counts up to the micro-batch of rank `pool.rank`
 *     counts  (n)       += those of all ranks
 *     sums    (n_sums)  += those of all ranks
 *     parts   (pool.ranks, pool.values)
 */
GA_API void ga_route_pool(int32_t *seen, int32_t *counts, ga_real *sums, const ga_real *parts, ga_pool pool) {
    for (size_t r = 0; r < pool.ranks; r++) {
        const ga_real *part = parts + r * pool.values;
        for (size_t i = 0; i < pool.n; i++) {
            int32_t count;
            memcpy(&count, (const char *)part + i * sizeof count, sizeof count);
            counts[i] += count;
            if (r == pool.rank) seen[i] = counts[i];
        }
        for (size_t i = 0; i < pool.n_sums; i++) sums[i] += part[pool.sums + i];
    }
}

/* y_r = x_n for each row r, whose slot belongs to position n.    y (R, C) out,  x (N, C),  slots (R),  R = N K
 * The backward pass is ga_sum_rows. */
GA_API void ga_gather_rows(ga_real *y, const ga_real *x, const int32_t *slots, size_t R, size_t C, size_t K) {
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < R; i++) memcpy(y + i * C, x + (size_t)slots[i] / K * C, C * sizeof *y);
}

/* y_n = sum of the rows of position n's slots, in their order.    y (N, C) out,  x (N K, C),  rows (N K)
 * The backward pass is ga_gather_rows. */
GA_API void ga_sum_rows(ga_real *y, const ga_real *x, const int32_t *rows, size_t N, size_t C, size_t K) {
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        ga_real *yn = y + n * C;
        memcpy(yn, x + (size_t)rows[n * K] * C, C * sizeof *y);
        for (size_t j = 1; j < K; j++)
            for (size_t c = 0; c < C; c++) yn[c] += x[(size_t)rows[n * K + j] * C + c];
    }
}

/* A linear map for each expert, on its own rows.
 *
 *     y_r = x_r w_e^T  for the rows r = offsets[e] .. offsets[e + 1] of expert e
 *
 *     y (R, O)  out;   x (R, I)
 *     w  (O, I) of expert e begins at w + e w_stride
 */
GA_API void ga_grouped_forward(ga_real *y, const ga_real *x, const ga_real *w, size_t w_stride, const int32_t *offsets,
                               size_t E, size_t O, size_t I) {
    size_t panels = gai_ceil_div(O, GAI_NC);
    GAI_PARALLEL_TASKS
    for (size_t task = 0; task < E * panels; task++) {
        size_t e = task / panels, j = task % panels * GAI_NC, columns = gai_min(GAI_NC, O - j);
        size_t end = (size_t)offsets[e + 1];
        for (size_t i = (size_t)offsets[e]; i < end; i += GAI_MC)
            gai_product_block(y + i * O + j, O, gai_rows(x + i * I, I), gai_transposed(w + e * w_stride + j * I, I),
                              gai_min(GAI_MC, end - i), columns, I, false);
    }
}

/*     dx_r  = dy_r w_e,    dw_e += sum over the rows of e of dy_r^T x_r;   an expert without rows keeps its dw
 *
 *     dx (R, I)  out;   dy (R, O)
 *     dw  (O, I) of expert e at dw + e w_stride, added to
 */
GA_API void ga_grouped_backward(ga_real *dx, ga_real *dw, const ga_real *dy, const ga_real *x, const ga_real *w,
                                size_t w_stride, const int32_t *offsets, size_t E, size_t O, size_t I) {
    size_t panels = gai_ceil_div(I, GAI_NC);
    GAI_PARALLEL_TASKS
    for (size_t task = 0; task < E * panels; task++) {
        size_t e = task / panels, j = task % panels * GAI_NC, columns = gai_min(GAI_NC, I - j);
        size_t first = (size_t)offsets[e], end = (size_t)offsets[e + 1];
        for (size_t i = first; i < end; i += GAI_MC)
            gai_product_block(dx + i * I + j, I, gai_rows(dy + i * O, O), gai_rows(w + e * w_stride + j, I),
                              gai_min(GAI_MC, end - i), columns, O, false);
        for (size_t o = 0; o < O && first < end; o += GAI_MC)
            gai_product_block(dw + e * w_stride + o * I + j, I, gai_transposed(dy + first * O + o, O),
                              gai_rows(x + first * I + j, I), gai_min(GAI_MC, O - o), columns, end - first, true);
    }
}

/* SwiGLU of an expert, times the expert's weight: what follows is linear, so that the weight may as well stand here,
 * and the backward pass gets its gradient without the expert's output.
 *
 *     a_r = w_s silu(act_r) up_r     for the slot s of row r
 *
 *     a (R, F)  out;   u (R, 2 F)  rows of [act | up], which the backward pass needs;   weights, slots (R)
 */
GA_API void ga_expert_swiglu_forward(ga_real *a, const ga_real *u, const ga_real *weights, const int32_t *slots,
                                     size_t R, size_t F) {
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < R; i++) {
        const ga_real *act = u + i * 2 * F, *up = act + F;
        ga_real weight = weights[slots[i]];
        for (size_t f = 0; f < F; f++) a[i * F + f] = weight * act[f] * gai_sigmoid(act[f]) * up[f];
    }
}

/*     d act = w da up silu'(act),   d up = w da silu(act),   dw = sum_f da silu(act) up = sum_f d up up / w
 *
 *     du (R, 2 F), d_weights (R)  out, the latter by slot;   da (R, F)
 */
GA_API void ga_expert_swiglu_backward(ga_real *du, ga_real *d_weights, const ga_real *da, const ga_real *u,
                                      const ga_real *weights, const int32_t *slots, size_t R, size_t F) {
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < R; i++) {
        const ga_real *act = u + i * 2 * F, *up = act + F, *dai = da + i * F;
        ga_real *d_act = du + i * 2 * F, *d_up = d_act + F, weight = weights[slots[i]];
        for (size_t f = 0; f < F; f++) {
            ga_real p = gai_sigmoid(act[f]);
            d_act[f] = weight * dai[f] * up[f] * p * (1 + act[f] * (1 - p));
            d_up[f] = dai[f] * act[f] * p;
        }
        d_weights[slots[i]] = gai_dot(d_up, up, F);
        for (size_t f = 0; f < F; f++) d_up[f] *= weight;
    }
}

/* ==== A.1: switch heads =========================================================================================== */

/* A switch head (Csordas et al. 2023; Table 6) has E experts, each a projection of its own. A position uses the K whose
 * routers' logits are the largest, weighted by sigmoids that do not compete:
 *
 *     s = X W_router,   p = sigmoid(s),   S = the K largest of s,   y_h = sum_{e in S} p_he x_he
 *
 * With E = K = 1 this is the headwise gate at G2. Each expert is a whole projection to D values, so that a model grows
 * by more than Table 6 states. All E experts of a head are computed: they are part of the one product [query | gate |
 * routers | keys | values], and in all rows of Table 6 but one every expert is chosen.
 *
 *     y  (N, H, D)  out
 *     x  N rows of (H, E, D) values, `stride` apart: what the experts' projections make
 *     s  N rows of (H, E) values, `stride` apart: router logits
 *
 * The backward pass needs x and s.
 */
GA_API void ga_switch_forward(ga_real *y, const ga_real *x, const ga_real *s, size_t stride, size_t N, ga_switch w) {
    ga_router choice = {w.E, w.K, false};
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++)
        for (size_t h = 0; h < w.H; h++) {
            const ga_real *logits = s + n * stride + h * w.E, *experts = x + n * stride + h * w.E * w.D;
            ga_real *yh = y + (n * w.H + h) * w.D;
            int32_t chosen[GA_MAX_EXPERTS];
            gai_top_k(chosen, logits, choice);
            for (size_t j = 0; j < w.K; j++) {
                const ga_real *xe = experts + (size_t)chosen[j] * w.D;
                ga_real p = gai_sigmoid(logits[chosen[j]]);
                for (size_t d = 0; d < w.D; d++) yh[d] = j == 0 ? xe[d] * p : yh[d] + xe[d] * p;
            }
        }
}

/*     dx_he = p_he dy_h,   ds_he = p_he (1 - p_he) (dy_h . x_he)   for the chosen experts, else 0
 *
 *     dx, ds  rows as those of x and s, out
 *     dy      (N, H, D)
 */
GA_API void ga_switch_backward(ga_real *dx, ga_real *ds, const ga_real *dy, const ga_real *x, const ga_real *s,
                               size_t stride, size_t N, ga_switch w) {
    ga_router choice = {w.E, w.K, false};
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++)
        for (size_t h = 0; h < w.H; h++) {
            size_t at = n * stride + h * w.E;
            const ga_real *logits = s + at, *dyh = dy + (n * w.H + h) * w.D;
            const ga_real *experts = x + n * stride + h * w.E * w.D;
            ga_real *d_experts = dx + n * stride + h * w.E * w.D;
            int32_t chosen[GA_MAX_EXPERTS];
            gai_top_k(chosen, logits, choice);
            memset(ds + at, 0, w.E * sizeof *ds);
            memset(d_experts, 0, w.E * w.D * sizeof *dx);
            for (size_t j = 0; j < w.K; j++) {
                size_t e = (size_t)chosen[j];
                ga_real p = gai_sigmoid(logits[e]);
                for (size_t d = 0; d < w.D; d++) d_experts[e * w.D + d] = dyh[d] * p;
                ds[at + e] = gai_dot(dyh, experts + e * w.D, w.D) * (p * (1 - p));
            }
        }
}

/* ==== outputs, residual stream, loss ============================================================================== */

/* A.6: y = x, held within [-limit, limit]; NaN stays NaN.    n values */
GA_API void ga_clip_forward(ga_real *y, const ga_real *x, size_t n, ga_real limit) {
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < n; i++) y[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
}

/*     dx = dy where |x| <= limit, else 0 */
GA_API void ga_clip_backward(ga_real *dx, const ga_real *dy, const ga_real *x, size_t n, ga_real limit) {
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < n; i++) dx[i] = x[i] > limit || x[i] < -limit ? 0 : dy[i];
}

/* The residual stream: y = a + b.    n values; y may be a or b */
GA_API void ga_add(ga_real *y, const ga_real *a, const ga_real *b, size_t n) {
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < n; i++) y[i] = a[i] + b[i];
}

/* Cross-entropy of one row; its logits become scale * d loss / d logits = scale (softmax - onehot). */
GAI_FN ga_real gai_cross_entropy(ga_real *logits, size_t V, int32_t target, ga_real scale) {
    ga_real top = logits[0], sums[16] = {0}, sum = 0, at_target = logits[target];
    for (size_t v = 1; v < V; v++) top = logits[v] > top ? logits[v] : top;
    size_t v = 0;
    for (; v + 16 <= V; v += 16)
        for (size_t j = 0; j < 16; j++) {
            logits[v + j] = gai_exp(logits[v + j] - top);
            sums[j] += logits[v + j];
        }
    for (; v < V; v++) {
        logits[v] = gai_exp(logits[v] - top);
        sums[0] += logits[v];
    }
    for (size_t j = 0; j < 16; j++) sum += sums[j];
    for (v = 0; v < V; v++) logits[v] *= scale / sum;
    logits[target] -= scale;
    return gai_log(sum) + top - at_target;
}

/* Output head and cross-entropy in one pass over slices of GA_HEAD_ROWS rows: the logits of a batch never exist at
 * once, and forward and backward share them.
 *
 *     logits = x w^T,   loss_n = log sum_v exp(logits_nv) - logits_n,target
 *     dx     = scale (softmax(logits) - onehot) w,        dw += scale (softmax(logits) - onehot)^T x
 *
 *     losses   (N)     out: in nats; 0 where the target is negative, which is not counted
 *     dx       (N, C)  out; NULL, with dw: losses only
 *     dw       (V, C)  added to
 *     logits   scratch of GA_HEAD_ROWS * V values
 *     x (N, C),  w (V, C),  targets (N),  scale (1): what each row's loss is worth; not read when dx is NULL
 */
GA_API void ga_head_loss(ga_real *losses, ga_real *dx, ga_real *dw, ga_real *logits, const ga_real *x, const ga_real *w,
                         const int32_t *targets, size_t N, size_t C, size_t V, const ga_real *scale) {
    ga_real worth = dx ? *scale : 0;
    for (size_t n0 = 0; n0 < N; n0 += GA_HEAD_ROWS) {
        size_t rows = gai_min(GA_HEAD_ROWS, N - n0);
        ga_linear_forward(logits, x + n0 * C, w, rows, V, C);
        GAI_PARALLEL_FOR
        for (size_t n = 0; n < rows; n++) {
            bool counted = targets[n0 + n] >= 0;
            losses[n0 + n] = counted ? gai_cross_entropy(logits + n * V, V, targets[n0 + n], worth) : 0;
            if (!counted) memset(logits + n * V, 0, V * sizeof *logits);
        }
        if (dx) ga_linear_backward(dx + n0 * C, dw, logits, x + n0 * C, w, rows, V, C);
    }
}

GAI_FN size_t gai_count_targets(const int32_t *targets, size_t N) {
    size_t count = 0;
    for (size_t n = 0; n < N; n++) count += targets[n] >= 0;
    return count;
}

/* The mean loss, in double: mean = sum_n losses_n / |{n: targets_n >= 0}|, NaN where there is no target;
 * total += scale mean.
 *
 *     mean (1) out,  total (1) added to, may be NULL    losses, targets (N)
 */
GA_API void ga_mean_loss(double *mean, double *total, const ga_real *losses, const int32_t *targets, size_t N,
                         double scale) {
    double sum = 0;
    size_t count = gai_count_targets(targets, N);
    for (size_t n = 0; n < N; n++) sum += (double)losses[n];
    *mean = count ? sum / (double)count : (double)NAN;
    if (total) *total += scale * *mean;
}

/* ==== optimiser operators ========================================================================================= */

/* AdamW with decoupled decay (Loshchilov and Hutter 2019), as PyTorch's; n values.
 *
 *     p *= 1 - lr decay,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
 *     p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps),                      g times gradient_scale before all
 */
GA_API void ga_adamw(ga_real *p, const ga_real *g, ga_real *m, ga_real *v, size_t n, ga_adamw_settings a) {
    ga_real b1 = (ga_real)a.beta1, b2 = (ga_real)a.beta2, eps = (ga_real)a.eps, scale = (ga_real)a.gradient_scale;
    ga_real keep = (ga_real)(1 - a.learning_rate * a.weight_decay);
    ga_real rate = (ga_real)(a.learning_rate / (1 - pow(a.beta1, (double)a.step)));
    ga_real root = (ga_real)(1 / sqrt(1 - pow(a.beta2, (double)a.step)));
    GAI_PARALLEL_FOR
    for (size_t i = 0; i < n; i++) {
        ga_real x = g[i] * scale;
        m[i] = b1 * m[i] + (1 - b1) * x;
        v[i] = b2 * v[i] + (1 - b2) * x * x;
        p[i] = p[i] * keep - rate * m[i] / (gai_sqrt(v[i]) * root + eps);
    }
}

/* *sum += sum of x_i^2 in double; n values */
GA_API void ga_sum_of_squares(double *sum, const ga_real *x, size_t n) {
    enum { CHUNKS = 64 }; /* added in order, whatever the threads */
    double part[CHUNKS];
    GAI_PARALLEL_FOR
    for (size_t chunk = 0; chunk < CHUNKS; chunk++) {
        double sums[8] = {0};
        size_t begin = n / CHUNKS * chunk, end = chunk + 1 == CHUNKS ? n : n / CHUNKS * (chunk + 1);
        for (size_t i = begin; i < end; i++) sums[(i - begin) % 8] += (double)x[i] * (double)x[i];
        part[chunk] = 0;
        for (size_t j = 0; j < 8; j++) part[chunk] += sums[j];
    }
    double all = 0;
    for (size_t chunk = 0; chunk < CHUNKS; chunk++) all += part[chunk];
    *sum += all;
}

/* ==== 4.2, 4.3: operators of the analysis ========================================================================= */

/* What the operators below sum up lies on the device, in double, and grows from pass to pass. */

/* Whether x takes the place of the largest value so far; NaN, once there, stays. */
GAI_INLINE bool gai_exceeds(double x, double top) {
    return !(x <= top) && top == top;
}

/* *max becomes the larger of itself and max |x_i|, NaN if any x_i is; n values */
GA_API void ga_max_abs(double *max, const ga_real *x, size_t n) {
    ga_real top = 0;
    bool nan = false;
    for (size_t i = 0; i < n; i++) {
        ga_real a = x[i] < 0 ? -x[i] : x[i];
        top = a > top ? a : top;
        nan |= x[i] != x[i];
    }
    double found = nan ? (double)NAN : (double)top;
    if (gai_exceeds(found, *max)) *max = found;
}

/* sums[g g_stride + i i_stride] += sum_r x_rgi;   x (R, G, I). An index whose stride is 0 is summed over as well. */
GA_API void ga_accumulate(double *sums, size_t g_stride, size_t i_stride, const ga_real *x, size_t R, size_t G,
                          size_t I) {
    for (size_t r = 0; r < R; r++)
        for (size_t g = 0; g < G; g++)
            for (size_t i = 0; i < I; i++) sums[g * g_stride + i * i_stride] += (double)x[(r * G + g) * I + i];
}

/* shares_h += sum_bi exp(s_h - lse_bhi), which the softmax gives to the sink logit s_h;   lse (B, HQ, T) */
GA_API void ga_sdpa_sink(double *shares, const ga_real *sink, const ga_real *lse, size_t B, size_t HQ, size_t T) {
    for (size_t i = 0; i < B * HQ * T; i++) {
        size_t h = i / T % HQ;
        shares[h] += exp((double)sink[h] - (double)lse[i]);
    }
}

/* rows_e += the rows of expert e, by the offsets of ga_route_rows */
GA_API void ga_route_counts(double *rows, const int32_t *offsets, size_t E) {
    for (size_t e = 0; e < E; e++) rows[e] += (double)(offsets[e + 1] - offsets[e]);
}

/* One column of the attention matrix, P_ij for key j, from what SDPA keeps: no T x T matrix is made. j = 0 is the first
 * token's share, of which F-Attn is the mean (Table 4).
 *
 *     P_ij = exp(q_i . k_j / sqrt(D) - lse_i)     0 where query i does not see key j
 *
 *     p (B, HQ, T)  out;   q, k, lse as in ga_sdpa_forward
 */
GA_API void ga_sdpa_column(ga_real *p, const ga_real *q, const ga_real *k, const ga_real *lse, size_t j, ga_shape n) {
    ga_real scale = 1 / gai_sqrt((ga_real)n.D);
    GAI_PARALLEL_FOR
    for (size_t bh = 0; bh < n.B * n.HQ; bh++) {
        size_t b = bh / n.HQ, h = bh % n.HQ;
        const ga_real *kj = k + ((b * n.S + j) * n.HK + h / (n.HQ / n.HK)) * n.D;
        for (size_t i = 0; i < n.T; i++) {
            const ga_real *qi = q + ((b * n.T + i) * n.HQ + h) * n.D;
            p[bh * n.T + i] = j <= n.S - n.T + i ? gai_exp(gai_dot(qi, kj, n.D) * scale - lse[bh * n.T + i]) : 0;
        }
    }
}

/* Heads with scores of their own; those that heads share are one head's. */
GAI_FN size_t gai_score_heads(ga_gate g) {
    return g.sharing == GA_SHARED || g.input == GA_INPUT_SCALAR ? 1 : g.H;
}

GAI_INLINE void gai_add_score(ga_gate_sums *sums, double x) {
    double scaled = floor(x * (double)GA_BINS);
    size_t bin = 0;
    if (scaled > 0) bin = scaled < GA_BINS - 1 ? (size_t)scaled : GA_BINS - 1;
    if (sums->count == 0 || x < sums->min) sums->min = x;
    if (sums->count == 0 || x > sums->max) sums->max = x;
    sums->count += 1;
    sums->sum += x;
    sums->sum_of_squares += x * x;
    sums->below_01 += x < 0.1;
    sums->below_05 += x < 0.5;
    sums->bins[bin] += 1;
}

/* Adds the gate scores of N rows to `sums` of each head that has its own: each score once, a headwise one not D times,
 * a shared one not H times. s, s_stride as in ga_gate_forward. */
GA_API void ga_gate_statistics(ga_gate_sums *sums, const ga_real *s, size_t s_stride, size_t N, ga_gate g) {
    size_t heads = gai_score_heads(g), values = gai_gate_elementwise(g) ? g.D : 1;
    for (size_t n = 0; n < N; n++)
        for (size_t h = 0; h < heads; h++)
            for (size_t d0 = 0; d0 < values; d0 += GAI_GATE_CHUNK) {
                ga_real score[GAI_GATE_CHUNK];
                size_t count = gai_min(GAI_GATE_CHUNK, values - d0);
                gai_gate_scores(score, s + n * s_stride, g, h, d0, count);
                for (size_t d = 0; d < count; d++) gai_add_score(sums + h, (double)score[d]);
            }
}

/* A row of scores in a tile, of which the query sees `visible` keys: adds P_j to columns_j, and -sum_j P_j log P_j to
 * *entropy. */
GAI_INLINE void gai_row_statistics(ga_real *columns, double *entropy, ga_real *s, ga_real lse, size_t visible) {
    ga_real p[GAI_TILE], part[16] = {0};
    for (size_t j = 0; j < GAI_TILE; j++) { /* all, so that it becomes vector code; what is not seen is cleared */
        s[j] -= lse;
        p[j] = gai_exp(s[j]);
    }
    for (size_t j = visible; j < GAI_TILE; j++) p[j] = 0;
    for (size_t j = 0; j < GAI_TILE; j++) columns[j] += p[j];
    for (size_t j = 0; j < GAI_TILE; j += 16)
        for (size_t l = 0; l < 16; l++) part[l] += p[j + l] * s[j + l];
    for (size_t j = 0; j < 16; j++) *entropy -= (double)part[j];
}

/* Where the attention goes and how widely it is spread, from what SDPA keeps: the tiles of P exist one at a time.
 *
 *     received_j = sum_i P_ij          the attention that key j gets from all queries that see it
 *     entropy_i  = -sum_j P_ij log P_ij = sum_j P_ij (lse_i - S_ij)
 *
 *     received (B, HQ, S), entropy (B, HQ, T)  out;   q, k, lse as in ga_sdpa_forward
 */
GA_API void ga_sdpa_statistics(ga_real *received, ga_real *entropy, const ga_real *q, const ga_real *k,
                               const ga_real *lse, ga_shape n) {
    GAI_PARALLEL_TASKS
    for (size_t bh = 0; bh < n.B * n.HQ; bh++) {
        ga_real k_tile[(size_t)GAI_TILE * GA_MAX_HEAD_DIM], s[GAI_TILE * GAI_TILE];
        size_t b = bh / n.HQ, h = bh % n.HQ, kv = (b * n.S * n.HK + h / (n.HQ / n.HK)) * n.D;
        memset(received + bh * n.S, 0, n.S * sizeof *received);
        for (size_t i0 = 0; i0 < n.T; i0 += GAI_TILE) {
            size_t rows = gai_min(GAI_TILE, n.T - i0), end = n.S - n.T + i0 + rows;
            double sums[GAI_TILE] = {0};
            for (size_t j0 = 0; j0 < end; j0 += GAI_TILE) {
                size_t keys = gai_min(GAI_TILE, n.S - j0);
                gai_tile tile = {i0, rows, j0, keys};
                ga_real columns[GAI_TILE] = {0};
                gai_pack_tile(k_tile, k + kv + j0 * n.HK * n.D, n.HK * n.D, keys, n.D);
                gai_scores(s, q + ((b * n.T + i0) * n.HQ + h) * n.D, k_tile, rows, n);
                for (size_t i = 0; i < rows; i++)
                    gai_row_statistics(columns, &sums[i], s + i * GAI_TILE, lse[bh * n.T + i0 + i],
                                       gai_visible(tile, i, n));
                for (size_t j = 0; j < keys; j++) received[bh * n.S + j0 + j] += columns[j];
            }
            for (size_t i = 0; i < rows; i++) entropy[bh * n.T + i0 + i] = (ga_real)sums[i];
        }
    }
}

/* Adds N rows of W values times `factor` to *sums (Fig. 4 and 5): how many, the sum of |x|, how many are below 1e-2 and
 * below 1e-3. The rows are x_stride apart. */
GA_API void ga_magnitude_statistics(ga_magnitude_sums *sums, const ga_real *x, size_t x_stride, size_t N, size_t W,
                                    double factor) {
    enum { CHUNKS = 64 }; /* added in order, whatever the threads */
    ga_magnitude_sums part[CHUNKS];
    memset(part, 0, sizeof part);
    GAI_PARALLEL_FOR
    for (size_t chunk = 0; chunk < CHUNKS; chunk++)
        for (size_t n = N * chunk / CHUNKS; n < N * (chunk + 1) / CHUNKS; n++)
            for (size_t i = 0; i < W; i++) {
                double a = fabs((double)x[n * x_stride + i] * factor);
                part[chunk].sum += a;
                part[chunk].below_1e_2 += a < 1e-2;
                part[chunk].below_1e_3 += a < 1e-3;
            }
    for (size_t chunk = 0; chunk < CHUNKS; chunk++) {
        sums->sum += part[chunk].sum;
        sums->below_1e_2 += part[chunk].below_1e_2;
        sums->below_1e_3 += part[chunk].below_1e_3;
    }
    sums->count += (double)N * (double)W;
}

/* The larger of an absolute value so far and |x|; NaN, once there, stays. */
GAI_INLINE ga_real gai_max_abs(ga_real top, ga_real x) {
    ga_real a = x < 0 ? -x : x;
    return top >= a || top != top ? top : a;
}

/* |x| = top, or both are NaN. */
GAI_INLINE bool gai_has_size(ga_real x, ga_real top) {
    return x == top || x == -top || (x != x && top != top);
}

/* max_n = max_c |x_nc|, NaN if any is, and at_n the first c that has it (Fig. 6: which positions, which dimensions).
 *
 *     max, at (N)  out;   x (N, C), C <= 2^24 so that `at` is exact
 */
GA_API void ga_max_abs_rows(ga_real *max, ga_real *at, const ga_real *x, size_t N, size_t C) {
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const ga_real *row = x + n * C;
        ga_real lanes[16] = {0}, top = 0;
        size_t c = 0, full = C / 16 * 16;
        for (; c < full; c += 16)
            for (size_t i = 0; i < 16; i++) lanes[i] = gai_max_abs(lanes[i], row[c + i]);
        for (; c < C; c++) lanes[c % 16] = gai_max_abs(lanes[c % 16], row[c]);
        for (size_t i = 0; i < 16; i++) top = gai_max_abs(top, lanes[i]);
        c = 0;
        while (c < C && !gai_has_size(row[c], top)) c++;
        max[n] = top;
        at[n] = (ga_real)c;
    }
}

/* max_c becomes the larger of itself and max_n |x_nc|, NaN if any is;   max (C),  x (N, C) */
GA_API void ga_max_abs_columns(double *max, const ga_real *x, size_t N, size_t C) {
    enum { CHUNK = 64 };
    GAI_PARALLEL_FOR
    for (size_t chunk = 0; chunk < gai_ceil_div(C, CHUNK); chunk++) {
        ga_real top[CHUNK] = {0};
        size_t begin = chunk * CHUNK, columns = gai_min(CHUNK, C - begin);
        for (size_t n = 0; n < N; n++)
            for (size_t c = 0; c < columns; c++) top[c] = gai_max_abs(top[c], x[n * C + begin + c]);
        for (size_t c = 0; c < columns; c++)
            if (gai_exceeds((double)top[c], max[begin + c])) max[begin + c] = (double)top[c];
    }
}

/* What ga_max_abs_rows has found in N rows, T of a sequence: max_at_t becomes the larger of itself and max_n of the
 * rows at position t; *peak the largest of all, the first of equal ones, with its row's token.
 *
 *     max_at (T);   max, at, tokens (N)
 */
GA_API void ga_keep_peaks(double *max_at, ga_peak *peak, const ga_real *max, const ga_real *at, const int32_t *tokens,
                          size_t N, size_t T) {
    for (size_t n = 0; n < N; n++) {
        double top = (double)max[n];
        if (gai_exceeds(top, max_at[n % T])) max_at[n % T] = top;
        if (peak->token >= 0 && !gai_exceeds(top, peak->value)) continue;
        peak->value = top;
        peak->position = n % T;
        peak->dimension = (size_t)at[n];
        peak->token = tokens[n];
    }
}

/* norms_n = sqrt(sum_d x_nd^2);   norms (N) out,  x (N, D): with values or keys, a row is a head of a position */
GA_API void ga_row_norms(ga_real *norms, const ga_real *x, size_t N, size_t D) {
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++) norms[n] = gai_sqrt(gai_dot(x + n * D, x + n * D, D));
}

/* The second moment of each head, from which the rank of its output follows (Eq. 6). In double: singular values are
 * roots of its eigenvalues, and rounding in float would fill up what an output lacks.
 *
 *     moments_h += sum_n x_nh x_nh^T       moments (H, D, D);   x (N, H, D)
 */
GA_API void ga_head_moments(double *moments, const ga_real *x, size_t N, size_t H, size_t D) {
    enum { ROWS = 8 }; /* of a moment at one time: they stay in the cache */
    GAI_PARALLEL_TASKS
    for (size_t h = 0; h < H; h++)
        for (size_t i0 = 0; i0 < D; i0 += ROWS) {
            double part[ROWS][GA_MAX_HEAD_DIM];
            size_t rows = gai_min(ROWS, D - i0);
            for (size_t i = 0; i < rows; i++) memset(part[i], 0, D * sizeof(double));
            for (size_t n = 0; n < N; n++) {
                const ga_real *xh = x + (n * H + h) * D;
                for (size_t i = 0; i < rows; i++)
                    for (size_t j = 0; j < D; j++) part[i][j] += (double)xh[i0 + i] * (double)xh[j];
            }
            for (size_t i = 0; i < rows; i++)
                for (size_t j = 0; j < D; j++) moments[(h * D + i0 + i) * D + j] += part[i][j];
        }
}

/* x_ni *= factor for N rows of W values, x_stride apart; factor 0 clears them, whatever they were. */
GA_API void ga_scale_rows(ga_real *x, size_t x_stride, size_t N, size_t W, ga_real factor) {
    GAI_PARALLEL_FOR
    for (size_t n = 0; n < N; n++)
        for (size_t i = 0; i < W; i++) x[n * x_stride + i] = factor == 0 ? 0 : x[n * x_stride + i] * factor;
}

/* ==== device ====================================================================================================== */

/* Memory of the CPU device: zeroed, aligned to a cache line; the pointer to free stands just before the block. */
GAI_FN void *gai_cpu_allocate(void *state, size_t bytes) {
    (void)state;
    enum { ALIGN = 64 };
    if (bytes > SIZE_MAX - 2 * ALIGN) return NULL;
    char *raw = (char *)GA_MALLOC(bytes + 2 * ALIGN);
    if (!raw) return NULL;
    char *p = raw + 2 * ALIGN - (uintptr_t)raw % ALIGN;
    memcpy(p - sizeof raw, &raw, sizeof raw);
    memset(p, 0, bytes);
    return p;
}

GAI_FN void gai_cpu_release(void *state, void *p) {
    (void)state;
    if (!p) return;
    void *raw;
    memcpy(&raw, (char *)p - sizeof raw, sizeof raw);
    GA_FREE(raw);
}

GAI_FN void gai_cpu_copy(void *state, void *to, const void *from, size_t bytes) {
    (void)state;
    if (bytes) memcpy(to, from, bytes);
}

GAI_FN void gai_cpu_zero(void *state, void *p, size_t bytes) {
    (void)state;
    memset(p, 0, bytes);
}

#define GAI_X(name, parameters, arguments)                           \
    GAI_FN void gai_cpu_##name(void *state, GAI_STRIP(parameters)) { \
        (void)state;                                                 \
        ga_##name arguments;                                         \
    }
GA_OPERATORS(GAI_X)
#undef GAI_X

GA_API ga_device ga_device_cpu(void) {
    ga_device d;
    memset(&d, 0, sizeof d);
    d.name = "cpu, plain C";
    d.allocate = gai_cpu_allocate;
    d.release = gai_cpu_release;
    d.copy_in = d.copy_out = gai_cpu_copy;
    d.zero = gai_cpu_zero;
#define GAI_X(name, parameters, arguments) d.name = gai_cpu_##name;
    GA_OPERATORS(GAI_X)
#undef GAI_X
    return d;
}

GA_API const char *ga_operator_name(size_t i) {
    static const char *const names[] = {
#define GAI_X(name, parameters, arguments) #name,
        GA_OPERATORS(GAI_X)
#undef GAI_X
    };
    return i < GA_OP_COUNT ? names[i] : "?";
}

/* Runs one operator of the model's device, with its time when the model is being profiled. */
#define GAI_RUN(m, op, ...)                                                              \
    do {                                                                                 \
        double gai_start = (m)->profile ? gai_seconds() : 0;                             \
        (m)->device.op((m)->device.state, __VA_ARGS__);                                  \
        if (!(m)->profile) break;                                                        \
        if ((m)->device.wait) (m)->device.wait((m)->device.state);                       \
        (m)->seconds[GA_OP_##op] += gai_seconds() - gai_start, (m)->calls[GA_OP_##op]++; \
    } while (0)

/* The ranks that train m together, or NULL. */
GAI_INLINE const ga_ranks *gai_ranks(const ga_model *m) {
    const ga_ranks *ranks = m->device.ranks;
    return ranks && ranks->count > 1 && m->mode == GA_TRAINING ? ranks : NULL;
}

/* Parts that the optimiser's state is in: ranks that train together, or 1. */
GAI_INLINE size_t gai_shares(const ga_model *m) {
    return gai_ranks(m) ? gai_ranks(m)->count : 1;
}

/* Operators return nothing: what failed in them is asked for once at the end of a pass. */
GAI_FN ga_result gai_status(const ga_model *m, ga_error *e) {
    const ga_ranks *ranks = gai_ranks(m);
    ga_result result = m->device.status ? m->device.status(m->device.state, e) : GA_OK;
    return result == GA_OK && ranks ? ranks->status(ranks->state, e) : result;
}

/* ==== memory ====================================================================================================== */

/* Whether a tensor is W_theta of Eq. 5. */
GAI_INLINE bool gai_is_w_theta(int id) {
    return id == GA_TENSOR_gate_weight || id == GA_TENSOR_gate_channels;
}

GAI_FN void gai_name_tensor(ga_tensor *t, bool ffn, const char *name) {
    if (t->layer == GA_ALL)
        snprintf(t->name, sizeof t->name, "%s", name);
    else if (!ffn)
        snprintf(t->name, sizeof t->name, "model.layers.%zu.%s", t->layer, name);
    else if (t->expert == GA_ALL)
        snprintf(t->name, sizeof t->name, "model.layers.%zu.mlp.%s", t->layer, name);
    else
        snprintf(t->name, sizeof t->name, "model.layers.%zu.mlp.experts.%zu.%s", t->layer, t->expert, name);
}

/* Sizes of models and of their parts are counted in uint64_t before memory is asked for: they may be more than a size_t
 * of 32 bits holds, which ga_summarize_rank and gai_statistics_create then refuse. */

typedef enum { GAI_FIRST, GAI_LAYER, GAI_FFN, GAI_LAST } gai_scope;

/* The parameters of a configuration in the order of the blocks; tensors NULL: they are only counted. */
typedef struct {
    const ga_config *config;
    ga_tensor *tensors;
    size_t count;
    uint64_t values;
} gai_tensor_list;

/* t: with id, layer, expert, rows, columns and start; the rest follows. */
GAI_FN void gai_append_tensor(gai_tensor_list *list, ga_tensor t, gai_scope scope, const char *name) {
    if (list->tensors) {
        t.offset = (size_t)list->values;
        t.decays = t.start == GA_START_MATRIX || t.start == GA_START_GATE;
        t.frozen = list->config->gate_frozen && gai_is_w_theta(t.id);
        gai_name_tensor(&t, scope == GAI_FFN, name);
        list->tensors[list->count] = t;
    }
    list->count++;
    list->values += (uint64_t)t.rows * t.columns;
}

/* The tensors of one scope, for one layer and one expert, or GA_ALL. */
GAI_FN void gai_append_tensors(gai_tensor_list *list, gai_scope scope, size_t layer, size_t expert) {
    const ga_config *c = list->config;
    ga_sizes z = ga_sizes_of(c);
    ga_tensor t;
    memset(&t, 0, sizeof t);
    t.layer = layer;
    t.expert = expert;
#define GAI_X(scope_, field, name, rows_, columns_, condition, start_) \
    if (scope == GAI_##scope_ && (condition)) {                        \
        t.id = GA_TENSOR_##field;                                      \
        t.rows = rows_;                                                \
        t.columns = columns_;                                          \
        t.start = GA_START_##start_;                                   \
        gai_append_tensor(list, t, scope, name);                       \
    }
    GA_TENSORS(GAI_X)
#undef GAI_X
}

GAI_FN size_t gai_list_tensors(const ga_config *c, ga_tensor *tensors, uint64_t *n_weights) {
    gai_tensor_list list = {c, tensors, 0, 0};
    gai_append_tensors(&list, GAI_FIRST, GA_ALL, GA_ALL);
    for (size_t l = 0; l < c->n_layers; l++) {
        gai_append_tensors(&list, GAI_LAYER, l, GA_ALL);
        if (c->n_experts == 0) gai_append_tensors(&list, GAI_FFN, l, GA_ALL);
        for (size_t e = 0; e < c->n_experts; e++) gai_append_tensors(&list, GAI_FFN, l, e);
    }
    gai_append_tensors(&list, GAI_LAST, GA_ALL, GA_ALL);
    if (n_weights) *n_weights = list.values;
    return list.count;
}

GA_API const ga_tensor *ga_find_tensor(const ga_model *m, int id, size_t layer) {
    for (size_t i = 0; i < m->n_tensors; i++)
        if (m->tensors[i].id == id && m->tensors[i].layer == layer) return &m->tensors[i];
    return NULL;
}

/* Values of the block of weights: all of them, or with GA_MAPPED those of a layer or of [final norm | output head],
 * whichever are more. */
GAI_FN uint64_t gai_weight_values(const ga_config *c, ga_mode mode) {
    uint64_t all, matrix = (uint64_t)c->vocab_size * c->d_model, head = c->d_model + matrix;
    gai_list_tensors(c, NULL, &all);
    if (mode != GA_MAPPED) return all;
    uint64_t layer = (all - head - (c->tied_embeddings ? 0 : matrix)) / c->n_layers;
    return head > layer ? head : layer;
}

/* The block of weights, and that of gradients, of one of `ranks`: a whole number of equal parts. */
GAI_FN uint64_t gai_block_values(const ga_config *c, ga_mode mode, size_t ranks) {
    uint64_t values = gai_weight_values(c, mode), unit = (uint64_t)ranks * GA_RANK_UNIT;
    return ranks > 1 && mode == GA_TRAINING ? (values + unit - 1) / unit * unit : values;
}

/* GA_MAPPED: the layers share one block, and so do the tensors around them, of which the embedding is never there as a
 * whole unless it is the output head as well. */
GAI_FN void gai_share_weights(ga_model *m) {
    size_t at = 0;
    for (size_t i = 0; i < m->n_tensors; i++) {
        ga_tensor *t = &m->tensors[i];
        bool starts = i == 0 || t->layer != t[-1].layer;
        if (starts) at = t->layer == GA_ALL && i > 0 && m->config.tied_embeddings ? m->sizes.V * m->sizes.C : 0;
        t->offset = at;
        at += t->rows * t->columns;
    }
}

/* Hands out parts of the activation block; with base NULL it only measures. Parts start on cache lines. */
typedef struct {
    char *base;
    uint64_t used;
} gai_arena;

GAI_FN void *gai_take(gai_arena *arena, uint64_t count, size_t size) {
    void *p = arena->base && count ? arena->base + (size_t)arena->used : NULL;
    arena->used += (count * size + 63) / 64 * 64;
    return p;
}

GAI_INLINE ga_real *gai_take_reals(gai_arena *arena, uint64_t count) {
    return (ga_real *)gai_take(arena, count, sizeof(ga_real));
}

/* The most values for each position that an observer's operator leaves in m->scratch: those of sdpa_statistics;
 * max_abs_rows and row_norms leave no more. */
GAI_FN size_t gai_observed_values(ga_sizes z) {
    return 2 * z.HQ;
}

/* Lays out all activations of the model over `arena`. Called twice: to measure, and to place. */
GAI_FN void gai_lay_out(ga_model *m, gai_arena *arena) {
    const ga_config *c = &m->config;
    ga_sizes z = m->sizes;
    ga_gate g = m->gate;
    uint64_t N = (uint64_t)c->batch_size * c->max_seq_len;
    bool training = m->mode == GA_TRAINING, share = !training || c->recompute;
    ga_layer_activations unplaced;
    memset(&unplaced, 0, sizeof unplaced);
    const ga_layer_activations *first = m->layers ? m->layers : &unplaced;
    for (size_t l = 0; l < z.L; l++) {
        ga_layer_activations *a = m->layers ? m->layers + l : &unplaced;
        /* With `share` one layer's memory serves all; but the backward pass starts from each layer's own x. */
#define GAI_X(field, values, kept)                                                   \
    {                                                                                \
        bool own = l == 0 || (!share && (kept)) || (training && &a->field == &a->x); \
        a->field = own ? gai_take_reals(arena, N * (values)) : first->field;         \
    }
        GA_LAYER_ACTIVATIONS(GAI_X)
#undef GAI_X
#define GAI_X(field, values) \
    a->field = l == 0 || !share ? (int32_t *)gai_take(arena, z.E > 0 ? (values) : 0, sizeof(int32_t)) : first->field;
        GA_LAYER_INDICES(GAI_X)
#undef GAI_X
    }
    m->x_final = gai_take_reals(arena, N * z.C);
    m->h_final = gai_take_reals(arena, N * z.C);
    m->rstd_final = gai_take_reals(arena, N);
    m->losses = gai_take_reals(arena, N);
    m->loss = (double *)gai_take(arena, 2, sizeof(double));
    m->squares = (double *)gai_take(arena, 1, sizeof(double));
    m->logits = gai_take_reals(arena, (N < GA_HEAD_ROWS ? N : (uint64_t)GA_HEAD_ROWS) * z.V);
    m->rope = gai_take_reals(arena, (uint64_t)c->max_seq_len * z.D);
    m->sink_one = gai_take_reals(arena, c->attention_sink == GA_SINK_ONE ? z.HQ : 0);
    m->tokens = (int32_t *)gai_take(arena, N, sizeof(int32_t));
    m->targets = (int32_t *)gai_take(arena, N, sizeof(int32_t));
    if (!training) {
        m->scratch = gai_take_reals(arena, N * gai_observed_values(z));
        return;
    }
    m->row_scale = gai_take_reals(arena, 1);
    m->dx = gai_take_reals(arena, N * z.C);
    m->dh = gai_take_reals(arena, N * z.C);
    m->d_o = gai_take_reals(arena, N * z.C);
    m->da = gai_take_reals(arena, N * gai_max(z.K * z.F, z.HQ * z.D));
    m->expert_counts = (int32_t *)gai_take(arena, z.L * z.E, sizeof(int32_t));
    m->router_sums = gai_take_reals(arena, z.E > 0 ? z.L * (z.E + 1) : 0);
    /* The backward passes of the FFN and of attention take turns with the rest. */
    gai_arena ffn = *arena;
    m->du = gai_take_reals(&ffn, N * z.K * 2 * z.F);
    m->d_rows = gai_take_reals(&ffn, z.E > 0 ? N * z.K * z.C : 0);
    m->d_router = gai_take_reals(&ffn, N * z.E);
    m->d_weights = gai_take_reals(&ffn, z.E > 0 ? N * z.K : 0);
    m->d_qgkv = gai_take_reals(arena, N * z.Z);
    m->ds = gai_take_reals(arena, N * z.G_channels);
    m->dq = gai_take_reals(arena, N * z.HQ * z.D);
    m->dk = gai_take_reals(arena, N * z.HK * z.D);
    m->dv = gai_take_reals(arena, N * z.HK * z.D);
    m->dy = gai_take_reals(arena, N * z.HQ * z.D);
    m->scratch = gai_take_reals(arena, N * gai_max(z.HQ * (2 * z.D + 1), gai_observed_values(z)));
    if (arena->used < ffn.used) arena->used = ffn.used;
}

/* Values from one expert's weights to the next one's. */
GAI_INLINE size_t gai_expert_stride(ga_sizes z) {
    return 3 * z.F * z.C;
}

/* What follows from a configuration alone. */
GAI_FN void gai_set_shape(ga_model *m, const ga_config *c, ga_mode mode) {
    m->config = *c;
    m->mode = mode;
    m->sizes = ga_sizes_of(c);
    m->gate = ga_gate_of(c);
    m->router = ga_router_of(c);
    m->max_rows = c->batch_size * c->max_seq_len;
}

GAI_FN uint64_t gai_activation_bytes(const ga_config *c, ga_mode mode) {
    ga_model m;
    memset(&m, 0, sizeof m);
    gai_set_shape(&m, c, mode);
    gai_arena arena = {NULL, 0};
    gai_lay_out(&m, &arena);
    return arena.used;
}

/* 3.1 with ranks: what each of them counts of a micro-batch, and where. */
GAI_FN ga_pool gai_pool_of(const ga_config *c, size_t rank, size_t ranks) {
    ga_sizes z = ga_sizes_of(c);
    ga_pool pool = {rank, ranks, 0, 0, z.L * z.E, z.E > 0 ? z.L * (z.E + 1) : 0};
    pool.sums = gai_ceil_div(pool.n * sizeof(int32_t), sizeof(ga_real));
    pool.values = gai_ceil_div(pool.sums + pool.n_sums, GA_RANK_UNIT) * GA_RANK_UNIT;
    return pool;
}

GAI_FN size_t gai_routed_bytes(const ga_config *c, ga_mode mode, size_t ranks) {
    ga_pool pool = gai_pool_of(c, 0, ranks);
    bool routed = mode == GA_TRAINING && ranks > 1;
    return routed ? ranks * pool.values * sizeof(ga_real) + pool.n * sizeof(int32_t) : 0;
}

GA_API ga_result ga_summarize_rank(const ga_config *c, ga_mode mode, size_t ranks, ga_summary *s, ga_error *e) {
    ga_result result = ga_config_check(c, e);
    if (result != GA_OK) return result;
    if (ranks == 0) return gai_fail(e, GA_ERR_INPUT, "a model is trained by one rank at least");
    ga_sizes z = ga_sizes_of(c);
    double rows = (double)c->batch_size * (double)c->max_seq_len;
    double widest = (double)(z.K * (2 * z.F + 2 * z.C) + z.E + z.Z + 8 * z.C + 4 * z.HQ * z.D);
    if (z.E > 0 && rows * (double)z.K > (double)INT32_MAX)
        return gai_fail(e, GA_ERR_CONFIG, "batch_size * max_seq_len * experts_per_token = %.0f rows are too many",
                        rows * (double)z.K);
    if (rows * widest * (double)(z.L + 4) > 1e15)
        return gai_fail(e, GA_ERR_CONFIG, "batch_size * max_seq_len = %.0f positions of this model are too many", rows);
    uint64_t parameters, weights = gai_block_values(c, mode, ranks) * sizeof(ga_real),
                         activations = gai_activation_bytes(c, mode) + gai_routed_bytes(c, mode, ranks);
    gai_list_tensors(c, NULL, &parameters);
    double total = (double)weights * (mode == GA_TRAINING ? 2 + 2 / (double)ranks : 1) + (double)activations;
    if (total >= (double)SIZE_MAX || parameters > SIZE_MAX)
        return gai_fail(e, GA_ERR_MEMORY, "the model takes %.1f GB for %.3g parameters, more than %d bits can count",
                        total / 1e9, (double)parameters, (int)sizeof(void *) * CHAR_BIT);
    memset(s, 0, sizeof *s);
    s->parameters = (size_t)parameters;
    s->embedding_parameters = z.V * z.C * (c->tied_embeddings ? 1 : 2);
    size_t channels = z.G_channels * c->gate_input_dims;
    s->gate_parameters = z.L * (z.G * z.C + channels + z.G_free);
    s->activated_parameters = s->parameters - (z.E > 0 ? z.L * (z.E - z.K) * gai_expert_stride(z) : 0);
    s->weight_bytes = (size_t)weights;
    s->gradient_bytes = mode == GA_TRAINING ? s->weight_bytes : 0;
    s->optimizer_bytes = 2 * s->gradient_bytes / ranks;
    s->activation_bytes = (size_t)activations;
    s->total_bytes = s->weight_bytes + s->gradient_bytes + s->optimizer_bytes + s->activation_bytes;
    double layer = (double)z.C * ((double)(z.Z + z.HQ * z.D + z.E) + 3 * (double)z.K * (double)z.F) + (double)channels;
    double attention = (double)(z.HQ * z.D) * ((double)c->max_seq_len + 1); /* 2 products over (T + 1) / 2 keys */
    s->forward_flops = 2 * ((double)z.L * (layer + attention) + (double)z.V * (double)z.C);
    s->training_flops = 3 * s->forward_flops + (c->recompute ? 2 * (double)z.L * (layer + attention) : 0);
    return GA_OK;
}

GA_API ga_result ga_summarize(const ga_config *c, ga_mode mode, ga_summary *s, ga_error *e) {
    return ga_summarize_rank(c, mode, 1, s, e);
}

/* ==== the model =================================================================================================== */

enum { GAI_PIECE = 4096 }; /* values in host memory at one time: a device may have to finish its work for each copy */

/* The stream of a tensor's start depends on seed and name alone. */
GAI_FN void gai_initialise_tensor(ga_model *m, const ga_tensor *t) {
    ga_real host[GAI_PIECE];
    size_t values = t->rows * t->columns;
    uint64_t random = 0xcbf29ce484222325u; /* FNV-1a of the name */
    for (const char *p = t->name; *p; p++) random = (random ^ (unsigned char)*p) * 0x100000001b3u;
    random ^= m->config.seed * 0x9e3779b97f4a7c15u;
    double std = t->start == GA_START_GATE ? m->config.gate_init_std : m->config.init_std;
    bool drawn = t->start == GA_START_MATRIX || t->start == GA_START_GATE;
    for (size_t done = 0; done < values; done += GAI_PIECE) {
        size_t n = gai_min(GAI_PIECE, values - done);
        for (size_t i = 0; i < n; i++) {
            double x = drawn ? std * ga_random_normal(&random) : t->start == GA_START_ONES;
            host[i] = (ga_real)x;
        }
        m->device.copy_in(m->device.state, m->weights + t->offset + done, host, n * sizeof *host);
    }
}

/* Pairs of dimensions of a head that RoPE turns; the others stay as they are. */
GAI_FN size_t gai_rotary_pairs(const ga_config *c) {
    return (size_t)((double)c->head_dim * c->partial_rotary_factor) / 2;
}

/* The pair, as a real number, that makes `turns` turns over the original length: L base^(-i/R) = 2 pi turns. */
GAI_FN double gai_pair_of_turns(const ga_config *c, double turns) {
    double length = (double)c->rope_original_length;
    return (double)gai_rotary_pairs(c) * log(length / (6.283185307179586 * turns)) / log(c->rope_base);
}

/* Section 2.1, RoPE, and 4.4, YaRN (Peng et al. 2023). Of the R pairs that turn, pair i has
 *
 *     theta_i = base^(-i/R)
 *
 * and with YaRN, where i(b) is the pair that makes b turns over the original length,
 *
 *     low = floor i(beta_fast),   high = ceil i(beta_slow),   both within 0 .. 2 R - 1
 *     theta_i ((1 - r_i) + r_i / factor),                     r_i = (i - low) / (high - low), within 0 .. 1
 *
 * The angle at position t is t times that. */
GA_API double ga_rope_frequency(const ga_config *c, size_t i) {
    size_t turning = gai_rotary_pairs(c);
    if (i >= turning) return 0;
    double theta = pow(c->rope_base, -(double)i / (double)turning);
    if (c->rope_factor == 1) return theta;
    double low = fmax(floor(gai_pair_of_turns(c, c->rope_beta_fast)), 0);
    double high = fmin(ceil(gai_pair_of_turns(c, c->rope_beta_slow)), 2 * (double)turning - 1);
    if (low == high) high += 0.001;
    double ramp = fmin(fmax(((double)i - low) / (high - low), 0), 1);
    return theta * (1 - ramp) + theta * ramp / c->rope_factor;
}

GA_API double ga_rope_scale(const ga_config *c) {
    if (c->rope_factor == 1) return 1;
    return c->rope_attention_factor > 0 ? c->rope_attention_factor : 0.1 * log(c->rope_factor) + 1;
}

GAI_FN void gai_initialise_rope(ga_model *m) {
    ga_real row[GA_MAX_HEAD_DIM];
    double frequencies[GA_MAX_HEAD_DIM / 2], scale = ga_rope_scale(&m->config);
    size_t half = m->sizes.D / 2;
    for (size_t i = 0; i < half; i++) frequencies[i] = ga_rope_frequency(&m->config, i);
    for (size_t t = 0; t < m->config.max_seq_len; t++) {
        for (size_t i = 0; i < half; i++) {
            double angle = (double)t * frequencies[i], size = frequencies[i] > 0 ? scale : 1;
            row[i] = (ga_real)(cos(angle) * size);
            row[half + i] = (ga_real)(sin(angle) * size);
        }
        m->device.copy_in(m->device.state, m->rope + t * 2 * half, row, 2 * half * sizeof *row);
    }
}

GAI_FN void *gai_zeroed(size_t bytes) {
    void *p = GA_MALLOC(bytes);
    if (p) memset(p, 0, bytes);
    return p;
}

GAI_FN bool gai_lay_out_routing(ga_model *m) {
    const ga_ranks *ranks = gai_ranks(m);
    size_t bytes = ranks ? gai_routed_bytes(&m->config, m->mode, ranks->count) : 0;
    m->counted = m->seen = m->expert_counts;
    m->summed = m->router_sums;
    if (bytes == 0) return true;
    m->routed = (ga_real *)m->device.allocate(m->device.state, bytes);
    if (!m->routed) return false;
    ga_pool pool = gai_pool_of(&m->config, ranks->rank, ranks->count);
    ga_real *own = m->routed + pool.rank * pool.values;
    m->counted = (int32_t *)(void *)own;
    m->summed = own + pool.sums;
    m->seen = (int32_t *)(void *)(m->routed + pool.ranks * pool.values);
    return true;
}

/* Cuts the blocks where layers begin, rounded up to equal parts: the first values of a layer, which the backward pass
 * comes to last, belong to the part before it. */
GAI_FN bool gai_cut_buckets(ga_model *m) {
    const ga_ranks *ranks = gai_ranks(m);
    size_t unit = gai_shares(m) * GA_RANK_UNIT, part = 0;
    m->n_buckets = ranks ? m->sizes.L + 2 : 1;
    m->buckets = (size_t *)gai_zeroed((m->n_buckets + 1) * sizeof *m->buckets);
    if (!m->buckets) return false;
    for (size_t i = 1; ranks && i < m->n_tensors; i++)
        if (m->tensors[i].layer != m->tensors[i - 1].layer)
            m->buckets[++part] = gai_ceil_div(m->tensors[i].offset, unit) * unit;
    m->buckets[m->n_buckets] = (size_t)gai_block_values(&m->config, m->mode, gai_shares(m));
    return true;
}

GAI_FN bool gai_allocate_model(ga_model *m) {
    uint64_t weights;
    m->n_tensors = gai_list_tensors(&m->config, NULL, &weights);
    m->n_weights = (size_t)weights;
    m->tensors = (ga_tensor *)gai_zeroed(m->n_tensors * sizeof *m->tensors);
    m->layers = (ga_layer_activations *)gai_zeroed(m->sizes.L * sizeof *m->layers);
    if (!m->tensors || !m->layers) return false;
    gai_list_tensors(&m->config, m->tensors, NULL);
    if (!gai_cut_buckets(m)) return false;
    size_t values = m->buckets[m->n_buckets];
    ga_real **blocks[] = {&m->weights, &m->gradients, &m->moment1, &m->moment2};
    for (size_t i = 0; i < (m->mode == GA_TRAINING ? 4u : 1u); i++) {
        size_t own = i < 2 ? values : values / gai_shares(m); /* the moments are spread over the ranks */
        *blocks[i] = (ga_real *)m->device.allocate(m->device.state, own * sizeof(ga_real));
        if (!*blocks[i]) return false;
    }
    size_t bytes = (size_t)gai_activation_bytes(&m->config, m->mode);
    m->activation_block = (ga_real *)m->device.allocate(m->device.state, bytes);
    if (!m->activation_block) return false;
    gai_arena arena = {(char *)m->activation_block, 0};
    gai_lay_out(m, &arena);
    if (!gai_lay_out_routing(m)) return false;
    gai_initialise_rope(m);
    if (m->mode == GA_MAPPED) gai_share_weights(m);
    return true;
}

/* The values of bucket b that this rank updates; `moment` is where their moments begin. */
typedef struct {
    size_t begin, values, moment;
} gai_share;

GAI_FN gai_share gai_share_of(const ga_model *m, size_t b) {
    const ga_ranks *ranks = gai_ranks(m);
    size_t count = gai_shares(m), values = (m->buckets[b + 1] - m->buckets[b]) / count;
    gai_share s = {m->buckets[b] + (ranks ? ranks->rank * values : 0), values, m->buckets[b] / count};
    return s;
}

/* Begins to send bucket b of a block to all ranks, each its share. */
GAI_FN void gai_gather_bucket(ga_model *m, ga_real *block, size_t b) {
    const ga_ranks *ranks = gai_ranks(m);
    size_t values = gai_share_of(m, b).values;
    if (ranks && values > 0) ranks->all_gather(ranks->state, block + m->buckets[b], values);
}

/* To be called after the weights were set, but not by ga_update. Each rank takes over the shares of the others: weights
 * that machines with another libm have drawn differ in their last bits. */
GAI_FN void gai_weights_are_set(ga_model *m) {
    const ga_ranks *ranks = gai_ranks(m);
    for (size_t b = 0; b < m->n_buckets; b++) gai_gather_bucket(m, m->weights, b);
    if (ranks) ranks->wait(ranks->state);
    if (m->device.weights_changed) m->device.weights_changed(m->device.state, m->weights, m->n_weights);
}

GAI_FN void gai_initialise_weights(ga_model *m) {
    for (size_t i = 0; i < m->n_tensors; i++) gai_initialise_tensor(m, &m->tensors[i]);
    gai_weights_are_set(m);
}

/* The memory that a model takes on a device, with what the device's operators need. */
GAI_FN double gai_needed_bytes(const ga_device *d, const ga_config *c, ga_mode mode) {
    ga_summary s;
    if (ga_summarize_rank(c, mode, d->ranks ? d->ranks->count : 1, &s, NULL) != GA_OK) return INFINITY;
    return (double)s.total_bytes + (double)(d->own_bytes ? d->own_bytes(d->state, c, mode) : 0);
}

/* Halves the micro-batch, and then also recomputes, until the model fits; false: it never does. */
GAI_FN bool gai_make_fit(const ga_device *d, ga_config *c, ga_mode mode, double have) {
    size_t batch_size = c->batch_size;
    for (int again = c->recompute; again < 2; again++)
        for (c->recompute = again, c->batch_size = batch_size; c->batch_size > 0; c->batch_size /= 2)
            if (gai_needed_bytes(d, c, mode) <= have) return true;
    return false;
}

GAI_FN ga_result gai_check_memory(const ga_device *d, const ga_config *c, ga_mode mode, ga_error *e) {
    double have = d->free_bytes ? (double)d->free_bytes(d->state) : INFINITY, need = gai_needed_bytes(d, c, mode);
    if (need <= have) return GA_OK;
    ga_config less = *c;
    char advice[128] = "; no smaller batch_size, nor recompute=1, makes it fit";
    if (gai_make_fit(d, &less, mode, have))
        snprintf(advice, sizeof advice, "; batch_size=%zu recompute=%d takes %.1f MB", less.batch_size, less.recompute,
                 gai_needed_bytes(d, &less, mode) / 1e6);
    return gai_fail(e, GA_ERR_MEMORY, "the model takes %.1f MB, and the device has %.1f MB left: %.1f MB too few%s",
                    need / 1e6, have / 1e6, (need - have) / 1e6, advice);
}

/* start: the weights are drawn, not only given room. */
GAI_FN ga_model *gai_create(const ga_config *c, const ga_device *device, ga_mode mode, bool start, ga_error *e) {
    ga_summary summary;
    ga_device d = device ? *device : ga_device_cpu();
    if (ga_summarize_rank(c, mode, d.ranks ? d.ranks->count : 1, &summary, e) != GA_OK ||
        gai_check_memory(&d, c, mode, e) != GA_OK)
        return NULL;
    ga_model *m = (ga_model *)gai_zeroed(sizeof *m);
    if (!m) {
        gai_fail(e, GA_ERR_MEMORY, "no memory for the model");
        return NULL;
    }
    gai_set_shape(m, c, mode);
    m->device = d;
    bool allocated = gai_allocate_model(m);
    if (allocated && start && mode != GA_MAPPED) gai_initialise_weights(m);
    ga_result result = gai_status(m, e);
    if (allocated && result == GA_OK) return m;
    if (result == GA_OK || result == GA_ERR_MEMORY)
        gai_fail(e, GA_ERR_MEMORY,
                 "not enough memory: the model takes %.4g GB; a smaller batch_size or recompute=1 takes less",
                 (double)summary.total_bytes / 1e9);
    ga_destroy(m);
    return NULL;
}

GA_API ga_model *ga_create(const ga_config *c, const ga_device *device, ga_mode mode, ga_error *e) {
    return gai_create(c, device, mode, true, e);
}

GAI_FN void gai_unmap(ga_mapped_files *mapped);

GA_API void ga_destroy(ga_model *m) {
    if (!m) return;
    if (m->begun > 0) gai_ranks(m)->wait(gai_ranks(m)->state);
    ga_real *blocks[] = {m->weights, m->gradients, m->moment1, m->moment2, m->activation_block, m->routed};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        if (blocks[i]) m->device.release(m->device.state, blocks[i]);
    gai_unmap(m->mapped);
    GA_FREE(m->buckets);
    GA_FREE(m->tensors);
    GA_FREE(m->layers);
    GA_FREE(m);
}

/* Where the parameters of a layer lie in one of the blocks (weights or gradients); NULL for those the model lacks. */
typedef struct {
#define GAI_X(scope, field, name, rows, columns, condition, start) ga_real *field;
    GA_TENSORS(GAI_X)
#undef GAI_X
} gai_parameters;

GAI_FN gai_parameters gai_layer_parameters(const ga_model *m, ga_real *block, size_t layer) {
    gai_parameters p;
    memset(&p, 0, sizeof p);
    ga_real **fields[] = {
#define GAI_X(scope, field, name, rows, columns, condition, start) &p.field,
        GA_TENSORS(GAI_X)
#undef GAI_X
    };
    size_t outer = 0, first = 1, count = 0; /* the tensors of a layer stand together, after the embedding */
    while (first + count < m->n_tensors && m->tensors[first + count].layer == 0) count++;
    for (size_t i = first + layer * count; i < first + (layer + 1) * count; i++)
        if (m->tensors[i].expert == GA_ALL || m->tensors[i].expert == 0)
            *fields[m->tensors[i].id] = block + m->tensors[i].offset;
    *fields[m->tensors[outer].id] = block + m->tensors[outer].offset;
    for (size_t i = first + m->sizes.L * count; i < m->n_tensors; i++)
        *fields[m->tensors[i].id] = block + m->tensors[i].offset;
    if (!p.head) p.head = p.embed; /* tied */
    return p;
}

/* Checkpoints, below: expands the mapped weights of a layer, or of final norm and output head, into m->weights. */
GAI_FN void gai_expand(ga_model *m, size_t layer);
/* The rows of the mapped embedding that m->tokens (N) name, into x (N, C). */
GAI_FN void gai_expand_embeddings(ga_model *m, ga_real *x, size_t N);

/* The weights of a layer, or with GA_ALL those after the last layer. Mapped ones are there until others
 * are asked for. */
GAI_FN gai_parameters gai_weights(ga_model *m, size_t layer) {
    if (m->mode == GA_MAPPED && m->expanded != layer) gai_expand(m, layer);
    return gai_layer_parameters(m, m->weights, layer == GA_ALL ? 0 : layer);
}

GAI_FN void gai_embed(ga_model *m, size_t N) {
    if (m->mode == GA_MAPPED)
        gai_expand_embeddings(m, m->layers[0].x, N);
    else
        GAI_RUN(m, embedding_forward, m->layers[0].x, m->tokens, gai_weights(m, 0).embed, N, m->sizes.C);
}

/* Where keys and values of a layer go, and which positions they are: in training the layer's own activations; in
 * generation rows of a cache that already holds `past` positions. */
typedef struct {
    ga_real *k, *v;               /* of the new positions */
    const ga_real *all_k, *all_v; /* of all S positions */
    size_t past;
} gai_cache;

/* The sections of a row of [query | gate | key router | value router | key | value]; those that a model
 * lacks are empty. */
typedef struct {
    ga_real *query, *gate, *key_router, *value_router, *key, *value;
} gai_sections;

GAI_FN gai_sections gai_sections_of(ga_sizes z, ga_real *row) {
    gai_sections at;
    at.query = row;
    at.gate = at.query + z.HQ * z.D;
    at.key_router = at.gate + z.G;
    at.value_router = at.key_router + z.R_key;
    at.key = at.value_router + z.R_value;
    at.value = at.key + z.X_key;
    return at;
}

/* The gate's logits S, in rows `stride` apart. */
typedef struct {
    const ga_real *s;
    size_t stride;
} gai_gate_logits;

/* A section of [query | gate | key | value], the rows of a product of their own, or parameters, one row for all. */
GAI_FN gai_gate_logits gai_gate_logits_of(const ga_model *m, const ga_layer_activations *a, const gai_parameters *w) {
    ga_sizes z = m->sizes;
    gai_gate_logits section = {gai_sections_of(z, a->qgkv).gate, z.Z};
    gai_gate_logits product = {a->s, z.G_channels}, parameters = {w->gate_free, 0};
    if (z.G > 0) return section;
    return z.G_channels > 0 ? product : parameters;
}

/* Where their gradient goes, in rows of the same stride. */
GAI_FN ga_real *gai_gate_gradient(const ga_model *m, const gai_parameters *dw) {
    ga_sizes z = m->sizes;
    if (z.G > 0) return gai_sections_of(z, m->d_qgkv).gate;
    return z.G_channels > 0 ? m->ds : dw->gate_free;
}

/* The sink logits of a layer, (HQ), or NULL. */
GAI_FN const ga_real *gai_sink_source(const ga_model *m, const gai_parameters *w) {
    return w->sinks ? w->sinks : m->sink_one;
}

/* Passes 12a to 15a: the FFN of a mixture (3.1). */
GAI_FN void gai_experts_forward(ga_model *m, const ga_layer_activations *a, const gai_parameters *w, size_t N) {
    ga_sizes z = m->sizes;
    ga_router r = m->router;
    size_t R = N * z.K, stride = gai_expert_stride(z);
    GAI_RUN(m, linear_forward, a->router_p, a->h2, w->router, N, z.E, z.C);                           /* 12a */
    GAI_RUN(m, route_forward, a->router_p, a->router_lse, a->weights, a->experts, a->router_p, N, r); /* 12b */
    GAI_RUN(m, route_rows, a->rows, a->slots, a->offsets, a->experts, N, r);                          /* 12c */
    GAI_RUN(m, gather_rows, a->h_rows, a->h2, a->slots, R, z.C, z.K);                                 /* 12d */
    GAI_RUN(m, grouped_forward, a->u, a->h_rows, w->ffn_act, stride, a->offsets, z.E, 2 * z.F, z.C);  /* 13 */
    GAI_RUN(m, expert_swiglu_forward, a->a, a->u, a->weights, a->slots, R, z.F);                      /* 14 */
    GAI_RUN(m, grouped_forward, a->f_rows, a->a, w->ffn_down, stride, a->offsets, z.E, z.C, z.F);     /* 15 */
    GAI_RUN(m, sum_rows, a->f, a->f_rows, a->rows, N, z.C, z.K);                                      /* 15a */
}

/* From d, the gradient of f, to m->dh, that of h2; d is not needed after 15a and may be m->d_o. scale: what the loss of
 * this micro-batch is worth. */
GAI_FN void gai_experts_backward(ga_model *m, size_t l, const gai_parameters *w, const gai_parameters *dw,
                                 const ga_real *d, bool fresh, double scale, size_t N) {
    const ga_layer_activations *a = &m->layers[l];
    ga_sizes z = m->sizes;
    ga_router r = m->router;
    size_t R = N * z.K, stride = gai_expert_stride(z);
    ga_real balance = (ga_real)(scale * m->config.load_balance_coef / (double)z.L);
    ga_real z_loss = (ga_real)(scale * m->config.router_z_coef / (double)z.L);
    if (!fresh) { /* 12d and 14 again */
        GAI_RUN(m, gather_rows, a->h_rows, a->h2, a->slots, R, z.C, z.K);
        GAI_RUN(m, expert_swiglu_forward, a->a, a->u, a->weights, a->slots, R, z.F);
    }
    GAI_RUN(m, gather_rows, m->d_rows, d, a->slots, R, z.C, z.K); /* 15a */
    GAI_RUN(m, grouped_backward, m->da, dw->ffn_down, m->d_rows, a->a, w->ffn_down, stride, a->offsets, z.E, z.C,
            z.F);                                                                                       /* 15 */
    GAI_RUN(m, expert_swiglu_backward, m->du, m->d_weights, m->da, a->u, a->weights, a->slots, R, z.F); /* 14 */
    GAI_RUN(m, grouped_backward, m->d_rows, dw->ffn_act, m->du, a->h_rows, w->ffn_act, stride, a->offsets, z.E, 2 * z.F,
            z.C);                                                 /* 13 */
    GAI_RUN(m, sum_rows, m->dh, m->d_rows, a->rows, N, z.C, z.K); /* 12d */
    GAI_RUN(m, route_backward, m->d_router, m->d_weights, a->router_p, a->router_lse, a->experts, m->seen + l * z.E, N,
            r, balance, z_loss);                                                                 /* 12b */
    GAI_RUN(m, linear_backward, m->d_o, dw->router, m->d_router, a->h2, w->router, N, z.E, z.C); /* 12a */
    GAI_RUN(m, add, m->dh, m->dh, m->d_o, N * z.C);
}

/* The intervention of the pass that is running, if it is of this kind and concerns this layer. */
GAI_FN const ga_intervention *gai_change(const ga_model *m, const ga_layer_activations *a, ga_intervention_kind kind) {
    const ga_intervention *i = m->intervention;
    return i && i->kind == kind && (i->layer == GA_ALL || a == &m->layers[i->layer]) ? i : NULL;
}

/* Passes 3, 6 and 8: the gate, with the scores that an intervention wants. A score that is the same everywhere is a
 * scalar parameter without activation. */
GAI_FN void gai_run_gate(ga_model *m, const ga_layer_activations *a, ga_real *o, const ga_real *y, size_t y_stride,
                         gai_gate_logits logits, size_t N) {
    ga_gate g = m->gate;
    const ga_intervention *set = gai_change(m, a, GA_SET_GATE), *scale = gai_change(m, a, GA_SCALE_GATE);
    if (set) {
        ga_real score = (ga_real)(set->scores ? set->scores[a - m->layers] : set->value);
        m->device.copy_in(m->device.state, m->scratch, &score, sizeof score);
        g.input = GA_INPUT_SCALAR;
        g.sharing = GA_SPECIFIC;
        g.activation = GA_IDENTITY;
        g.logits = 1;
        logits.s = m->scratch;
        logits.stride = 0;
    }
    GAI_RUN(m, gate_forward, o, y, y_stride, logits.s, logits.stride, N, g);
    if (scale) GAI_RUN(m, scale_rows, o, g.H * g.D, N, g.H * g.D, (ga_real)scale->value);
}

/* The same backward: rows of dy and y are `stride` apart; ds is gai_gate_gradient's. */
GAI_FN void gai_run_gate_backward(ga_model *m, ga_real *dy, ga_real *ds, const ga_real *d_o, const ga_real *y,
                                  size_t stride, gai_gate_logits logits, size_t N) {
    GAI_RUN(m, gate_backward, dy, stride, ds, logits.stride, d_o, y, stride, logits.s, logits.stride, N, m->gate);
}

/* Pass 5 once more, without the first key: each sequence from its second position on. */
GAI_FN void gai_attend_without_first(ga_model *m, const ga_layer_activations *a, const ga_real *sink, size_t B,
                                     size_t T) {
    ga_sizes z = m->sizes;
    ga_shape shape = {1, T - 1, T - 1, z.HQ, z.HK, z.D};
    for (size_t b = 0; b < B && T > 1; b++) {
        size_t q = (b * T + 1) * z.HQ * z.D, k = (b * T + 1) * z.HK * z.D;
        GAI_RUN(m, sdpa_forward, a->y + q, m->scratch, a->q + q, a->k + k, a->v + k, sink, shape);
    }
}

/* One block is passes 1 to 18, in three parts of a function each; the backward pass walks the same numbers in reverse.
 *
 * Passes 1 to 4: from x to queries, keys and values, whose heads the gates at G2 to G4 and switch heads modulate. */
GAI_FN void gai_project_forward(ga_model *m, const ga_layer_activations *a, const gai_parameters *w, gai_cache cache,
                                size_t B, size_t T) {
    ga_sizes z = m->sizes;
    const ga_config *c = &m->config;
    ga_gate g = m->gate;
    ga_real eps = (ga_real)c->norm_eps;
    size_t N = B * T, qD = z.HQ * z.D, kD = z.HK * z.D;
    gai_gate_logits logits = gai_gate_logits_of(m, a, w);
    gai_sections at = gai_sections_of(z, a->qgkv);
    const ga_real *query = at.query, *key = at.key, *value = at.value, *rope = m->rope + cache.past * z.D;
    size_t query_stride = z.Z, key_stride = z.Z, value_stride = z.Z;

    GAI_RUN(m, rmsnorm_forward, a->h1, a->rstd1, a->x, w->attn_norm, N, z.C, eps); /* 1 */
    GAI_RUN(m, linear_forward, a->qgkv, a->h1, w->query, N, z.Z, z.C); /* 2: Eq. 1, and X W_theta of Eq. 5 */
    if (z.G_channels > 0)
        GAI_RUN(m, linear_channels_forward, a->s, a->h1, z.C, w->gate_channels, N, z.G_channels, c->gate_input_dims);
    if (g.position == GA_G2) { /* 3: Eq. 7 */
        gai_run_gate(m, a, a->gated, value, z.Z, logits, N);
        value = a->gated;
        value_stride = kD;
    } else if (g.position == GA_G3) {
        gai_run_gate(m, a, a->gated, key, z.Z, logits, N);
        key = a->gated;
        key_stride = kD;
    } else if (g.position == GA_G4) {
        gai_run_gate(m, a, a->gated, query, z.Z, logits, N);
        query = a->gated;
        query_stride = qD;
    }
    if (z.R_key > 0) { /* 3: A.1 */
        GAI_RUN(m, switch_forward, a->switched, key, at.key_router, z.Z, N, ga_switch_of(c));
        key = a->switched;
        key_stride = kD;
    }
    GAI_RUN(m, heads_forward, a->q, query, query_stride, w->query_norm, rope, B, T, z.HQ, z.D, eps); /* 4 */
    GAI_RUN(m, heads_forward, cache.k, key, key_stride, w->key_norm, rope, B, T, z.HK, z.D, eps);
    if (z.R_value > 0)
        GAI_RUN(m, switch_forward, cache.v, value, at.value_router, z.Z, N, ga_switch_of(c)); /* 3: A.1 */
    else
        GAI_RUN(m, heads_forward, cache.v, value, value_stride, NULL, NULL, B, T, z.HK, z.D, eps);
}

/* Passes 5 to 11: attention, the gates at G1 and G5, W_O, and the residual stream. */
GAI_FN void gai_attention_forward(ga_model *m, const ga_layer_activations *a, const gai_parameters *w, gai_cache cache,
                                  size_t B, size_t T) {
    ga_sizes z = m->sizes;
    const ga_config *c = &m->config;
    ga_gate g = m->gate;
    size_t N = B * T, qD = z.HQ * z.D, kD = z.HK * z.D;
    gai_gate_logits logits = gai_gate_logits_of(m, a, w);
    const ga_real *sink = gai_sink_source(m, w);
    ga_shape shape = {B, T, cache.past + T, z.HQ, z.HK, z.D};
    ga_real *y = a->y;
    const ga_real *o = a->o;

    if (gai_change(m, a, GA_REMOVE_VALUE)) GAI_RUN(m, scale_rows, cache.v, T * kD, B, kD, 0);
    GAI_RUN(m, sdpa_forward, a->y, a->lse, a->q, cache.all_k, cache.all_v, sink, shape); /* 5: Eq. 2 */
    if (gai_change(m, a, GA_REMOVE_KEY)) gai_attend_without_first(m, a, sink, B, T);
    if (g.position == GA_G1) { /* 6: Eq. 5, Eq. 8 */
        gai_run_gate(m, a, a->y_gated, a->y, qD, logits, N);
        y = a->y_gated;
    }
    const ga_intervention *silence = gai_change(m, a, GA_SILENCE_HEAD);
    if (silence && silence->head == GA_ALL) GAI_RUN(m, scale_rows, y, qD, N, qD, 0);
    if (silence && silence->head != GA_ALL) GAI_RUN(m, scale_rows, y + silence->head * z.D, qD, N, z.D, 0);
    GAI_RUN(m, linear_forward, a->o, y, w->attn_output, N, z.C, qD); /* 7: Eq. 3 and 4 */
    if (g.position == GA_G5) {                                       /* 8 */
        gai_run_gate(m, a, a->o_gated, o, z.C, logits, N);
        o = a->o_gated;
    }
    if (c->attn_clip > 0) { /* 9 */
        GAI_RUN(m, clip_forward, a->o_clipped, o, N * z.C, (ga_real)c->attn_clip);
        o = a->o_clipped;
    }
    if (c->sandwich_norm) { /* 10 */
        GAI_RUN(m, rmsnorm_forward, a->o_normed, a->rstd_o, o, w->attn_out_norm, N, z.C, (ga_real)c->norm_eps);
        o = a->o_normed;
    }
    GAI_RUN(m, add, a->x_mid, a->x, o, N * z.C); /* 11 */
}

/* Passes 12 to 18: the FFN, dense or a mixture, and the residual stream. */
GAI_FN void gai_ffn_forward(ga_model *m, const ga_layer_activations *a, const gai_parameters *w, ga_real *x_next,
                            size_t N) {
    ga_sizes z = m->sizes;
    const ga_config *c = &m->config;
    ga_real eps = (ga_real)c->norm_eps;
    const ga_real *f = a->f;

    GAI_RUN(m, rmsnorm_forward, a->h2, a->rstd2, a->x_mid, w->ffn_norm, N, z.C, eps); /* 12 */
    if (z.E > 0) {
        gai_experts_forward(m, a, w, N); /* 12a to 15a */
    } else {
        GAI_RUN(m, linear_forward, a->u, a->h2, w->ffn_act, N, 2 * z.F, z.C); /* 13 */
        GAI_RUN(m, swiglu_forward, a->a, a->u, N, z.F);                       /* 14 */
        GAI_RUN(m, linear_forward, a->f, a->a, w->ffn_down, N, z.C, z.F);     /* 15 */
    }
    if (c->ffn_clip > 0) { /* 16 */
        GAI_RUN(m, clip_forward, a->f_clipped, f, N * z.C, (ga_real)c->ffn_clip);
        f = a->f_clipped;
    }
    if (c->sandwich_norm) { /* 17 */
        GAI_RUN(m, rmsnorm_forward, a->f_normed, a->rstd_f, f, w->ffn_out_norm, N, z.C, eps);
        f = a->f_normed;
    }
    GAI_RUN(m, add, x_next, a->x_mid, f, N * z.C); /* 18 */
}

GAI_FN void gai_layer_forward(ga_model *m, const ga_layer_activations *a, const gai_parameters *w, gai_cache cache,
                              ga_real *x_next, size_t B, size_t T) {
    gai_project_forward(m, a, w, cache, B, T);
    gai_attention_forward(m, a, w, cache, B, T);
    gai_ffn_forward(m, a, w, x_next, B * T);
}

/* Passes 18 to 12: m->dx, d loss / d x_next, becomes d loss / d x_mid. */
GAI_FN void gai_ffn_backward(ga_model *m, size_t l, const gai_parameters *w, const gai_parameters *dw, bool fresh,
                             double scale, size_t N) {
    const ga_layer_activations *a = &m->layers[l];
    ga_sizes z = m->sizes;
    const ga_config *c = &m->config;
    ga_real eps = (ga_real)c->norm_eps;
    const ga_real *d = m->dx; /* 18: both the residual and the FFN's output take d x_next */

    if (c->sandwich_norm) { /* 17 */
        const ga_real *f = c->ffn_clip > 0 ? a->f_clipped : a->f;
        GAI_RUN(m, rmsnorm_backward, m->d_o, dw->ffn_out_norm, d, f, w->ffn_out_norm, a->rstd_f, N, z.C, false);
        d = m->d_o;
    }
    if (c->ffn_clip > 0) { /* 16 */
        GAI_RUN(m, clip_backward, m->d_o, d, a->f, N * z.C, (ga_real)c->ffn_clip);
        d = m->d_o;
    }
    if (!fresh) GAI_RUN(m, rmsnorm_forward, a->h2, a->rstd2, a->x_mid, w->ffn_norm, N, z.C, eps); /* 12 again */
    if (z.E > 0) {
        gai_experts_backward(m, l, w, dw, d, fresh, scale, N); /* 15a to 12a */
    } else {
        if (!fresh) GAI_RUN(m, swiglu_forward, a->a, a->u, N, z.F);                                 /* 14 again */
        GAI_RUN(m, linear_backward, m->da, dw->ffn_down, d, a->a, w->ffn_down, N, z.C, z.F);        /* 15 */
        GAI_RUN(m, swiglu_backward, m->du, m->da, a->u, N, z.F);                                    /* 14 */
        GAI_RUN(m, linear_backward, m->dh, dw->ffn_act, m->du, a->h2, w->ffn_act, N, 2 * z.F, z.C); /* 13 */
    }
    GAI_RUN(m, rmsnorm_backward, m->dx, dw->ffn_norm, m->dh, a->x_mid, w->ffn_norm, a->rstd2, N, z.C, true); /* 12 */
}

/* Passes 11 to 5: from m->dx, d loss / d x_mid, to m->dq, m->dk and m->dv. */
GAI_FN void gai_attention_backward(ga_model *m, const ga_layer_activations *a, const gai_parameters *w,
                                   const gai_parameters *dw, bool fresh, size_t B, size_t T) {
    ga_sizes z = m->sizes;
    const ga_config *c = &m->config;
    ga_gate g = m->gate;
    size_t N = B * T, qD = z.HQ * z.D;
    gai_gate_logits logits = gai_gate_logits_of(m, a, w);
    ga_real *ds = gai_gate_gradient(m, dw);
    ga_shape shape = {B, T, T, z.HQ, z.HK, z.D};
    const ga_real *d = m->dx; /* 11 */
    const ga_real *y = g.position == GA_G1 ? a->y_gated : a->y, *o = g.position == GA_G5 ? a->o_gated : a->o;

    if (c->sandwich_norm) { /* 10 */
        const ga_real *normed = c->attn_clip > 0 ? a->o_clipped : o;
        GAI_RUN(m, rmsnorm_backward, m->d_o, dw->attn_out_norm, d, normed, w->attn_out_norm, a->rstd_o, N, z.C, false);
        d = m->d_o;
    }
    if (c->attn_clip > 0) { /* 9 */
        GAI_RUN(m, clip_backward, m->d_o, d, o, N * z.C, (ga_real)c->attn_clip);
        d = m->d_o;
    }
    if (g.position == GA_G5) { /* 8 */
        gai_run_gate_backward(m, m->dh, ds, d, a->o, z.C, logits, N);
        d = m->dh;
    }
    if (!fresh && g.position == GA_G1) /* 6 again */
        GAI_RUN(m, gate_forward, a->y_gated, a->y, qD, logits.s, logits.stride, N, g);
    GAI_RUN(m, linear_backward, m->da, dw->attn_output, d, y, w->attn_output, N, z.C, qD); /* 7 */
    d = m->da;
    if (g.position == GA_G1) { /* 6 */
        gai_run_gate_backward(m, m->dy, ds, d, a->y, qD, logits, N);
        d = m->dy;
    }
    GAI_RUN(m, sdpa_backward, m->dq, m->dk, m->dv, dw->sinks, m->scratch, d, a->y, a->lse, a->q, a->k, a->v,
            gai_sink_source(m, w), shape); /* 5 */
}

/* What pass 4 has read, and where its gradient goes: a section of [query | gate | key | value] itself, or what pass 3
 * has made of it, whose gradient goes to m->da, from which pass 3 goes on. */
typedef struct {
    const ga_real *x;
    ga_real *dx;
    size_t stride;
} gai_head_input;

GAI_FN gai_head_input gai_head_input_of(const ga_model *m, const ga_real *section, ga_real *d_section,
                                        const ga_real *made, size_t width) {
    gai_head_input plain = {section, d_section, m->sizes.Z}, modulated = {made, m->da, width};
    return made ? modulated : plain;
}

/* Passes 4 to 1: from m->dq, m->dk and m->dv to the sections of m->d_qgkv, and to d loss / d x in m->dx. */
GAI_FN void gai_project_backward(ga_model *m, const ga_layer_activations *a, const gai_parameters *w,
                                 const gai_parameters *dw, bool fresh, size_t B, size_t T) {
    ga_sizes z = m->sizes;
    const ga_config *c = &m->config;
    ga_gate g = m->gate;
    ga_real eps = (ga_real)c->norm_eps;
    size_t N = B * T, kD = z.HK * z.D;
    gai_gate_logits logits = gai_gate_logits_of(m, a, w);
    ga_real *ds = gai_gate_gradient(m, dw);
    gai_sections at = gai_sections_of(z, a->qgkv), d_at = gai_sections_of(z, m->d_qgkv);
    bool at_query = g.position == GA_G4, at_key = g.position == GA_G3, at_value = g.position == GA_G2;
    const ga_real *key_made = at_key ? a->gated : z.R_key > 0 ? a->switched : NULL;
    gai_head_input query = gai_head_input_of(m, at.query, d_at.query, at_query ? a->gated : NULL, z.HQ * z.D);
    gai_head_input key = gai_head_input_of(m, at.key, d_at.key, key_made, kD);
    gai_head_input value = gai_head_input_of(m, at.value, d_at.value, at_value ? a->gated : NULL, kD);

    /* 4 and 3: queries */
    GAI_RUN(m, heads_backward, query.dx, dw->query_norm, m->dq, query.x, query.stride, query.stride, w->query_norm,
            m->rope, B, T, z.HQ, z.D, eps);
    if (at_query) gai_run_gate_backward(m, d_at.query, ds, m->da, at.query, z.Z, logits, N);
    /* 4 and 3: keys */
    GAI_RUN(m, heads_backward, key.dx, dw->key_norm, m->dk, key.x, key.stride, key.stride, w->key_norm, m->rope, B, T,
            z.HK, z.D, eps);
    if (z.R_key > 0)
        GAI_RUN(m, switch_backward, d_at.key, d_at.key_router, m->da, at.key, at.key_router, z.Z, N, ga_switch_of(c));
    if (at_key) gai_run_gate_backward(m, d_at.key, ds, m->da, at.key, z.Z, logits, N);
    /* 4 and 3: values */
    if (z.R_value > 0)
        GAI_RUN(m, switch_backward, d_at.value, d_at.value_router, m->dv, at.value, at.value_router, z.Z, N,
                ga_switch_of(c));
    else
        GAI_RUN(m, heads_backward, value.dx, NULL, m->dv, value.x, value.stride, value.stride, NULL, NULL, B, T, z.HK,
                z.D, eps);
    if (at_value) gai_run_gate_backward(m, d_at.value, ds, m->da, at.value, z.Z, logits, N);
    if (!fresh) GAI_RUN(m, rmsnorm_forward, a->h1, a->rstd1, a->x, w->attn_norm, N, z.C, eps); /* 1 again */
    GAI_RUN(m, linear_backward, m->dh, dw->query, m->d_qgkv, a->h1, w->query, N, z.Z, z.C);    /* 2 */
    if (z.G_channels > 0)
        GAI_RUN(m, linear_channels_backward, m->dh, dw->gate_channels, m->ds, a->h1, z.C, w->gate_channels, N,
                z.G_channels, c->gate_input_dims);
    GAI_RUN(m, rmsnorm_backward, m->dx, dw->attn_norm, m->dh, a->x, w->attn_norm, a->rstd1, N, z.C, true); /* 1 */
}

/* m->dx holds d loss / d x_next and becomes d loss / d x; parameter gradients are added to dw. fresh: the forward pass
 * of this layer was the last one to run, so that what layers share is still there. scale: as in ga_forward_backward,
 * for the losses of the layer's own router. */
GAI_FN void gai_layer_backward(ga_model *m, size_t l, const gai_parameters *w, const gai_parameters *dw, bool fresh,
                               double scale, size_t B, size_t T) {
    const ga_layer_activations *a = &m->layers[l];
    gai_ffn_backward(m, l, w, dw, fresh, scale, B * T);
    gai_attention_backward(m, a, w, dw, fresh, B, T);
    gai_project_backward(m, a, w, dw, fresh, B, T);
}

/* ---- observation: what the analysis takes from a layer while it is there ----------------------------------------- */

/* What observers sum up over the rows, by layer: X(type, field, values). T is max_seq_len; `details` is 1 or 0. */
/* clang-format off */
#define GAI_SUMS(X)                                                                                                    \
    X(double, attention, L * HQ)                           /* attention probability on position 0 */                   \
    X(double, sink, L * HQ)                                /* and the share of the sink logit */                       \
    X(double, max_abs, L)                                  /* max |x| of the residual stream after the layer */        \
    X(ga_gate_sums, gate, L * gate_heads)                                                                              \
    X(double, expert_rows, L * z.E)                        /* positions sent to each expert */                         \
    X(double, received, details * L * HQ * T)              /* attention on each position */                            \
    X(double, entropy, details * L * HQ)                                                                               \
    X(double, value_norm, details * L * HK * T) X(double, key_norm, details * L * HK * T)                              \
    X(double, max_at, details * GA_STREAMS * L * T)        /* max |x| of a position, of a dimension */                 \
    X(double, max_in, details * GA_STREAMS * L * z.C)                                                                  \
    X(ga_peak, peaks, details * GA_STREAMS * L) X(ga_magnitude_sums, magnitudes, details * GA_STAGES * L)
/* Moments of each head's output, before the gate at G1 and behind it: for ga_measure_ranks alone. */
#define GAI_MOMENTS(X)                                                                                                 \
    X(double, before, details * L * HQ * z.D * z.D)                                                                    \
    X(double, after, details * (m->gate.position == GA_G1) * L * HQ * z.D * z.D)
/* clang-format on */

typedef struct {
#define GAI_X(type, field, values) type *field;
    GAI_SUMS(GAI_X)
    GAI_MOMENTS(GAI_X)
#undef GAI_X
} gai_sum_fields;

struct ga_sums {
    ga_device device;
    size_t HK, T, C, D;
    void *block, *copy; /* on the device, and on the host: the same where its memory is the host's */
    size_t copied;      /* bytes of the copy: all but the moments */
    bool stale;         /* the copy is older than the block */
    gai_sum_fields there, here;
    double *host, *queries, *windows; /* (T) each: queries that see a position, sequences that have it */
    double *ranks;                    /* (GA_RANKS, L, HQ) */
};

/* Where the fields stand in a block, and how many bytes those before the moments take; returns the bytes of all. */
GAI_FN uint64_t gai_lay_out_sums(gai_sum_fields *f, void *block, const ga_model *m, size_t details, size_t *copied) {
    ga_sizes z = m->sizes;
    uint64_t L = z.L, HQ = z.HQ, HK = z.HK, T = m->config.max_seq_len, gate_heads = gai_score_heads(m->gate);
    gai_arena arena = {(char *)block, 0};
#define GAI_X(type, field, values) f->field = (type *)gai_take(&arena, (values), sizeof(type));
    GAI_SUMS(GAI_X)
    *copied = (size_t)arena.used;
    GAI_MOMENTS(GAI_X)
#undef GAI_X
    return arena.used;
}

/* The sums on the host, as they are now. */
GAI_FN const gai_sum_fields *gai_fetch(const ga_statistics *s) {
    ga_sums *sums = s->sums;
    if (sums->stale && sums->copy != sums->block)
        sums->device.copy_out(sums->device.state, sums->copy, sums->block, sums->copied);
    sums->stale = false;
    return &sums->here;
}

/* The sums on the device become those on the host. */
GAI_FN void gai_put_sums(ga_sums *sums) {
    if (sums->copy != sums->block) sums->device.copy_in(sums->device.state, sums->block, sums->copy, sums->copied);
    sums->stale = false;
}

GAI_FN void gai_observe_attention(ga_model *m, const ga_sums *s, const ga_layer_activations *a, size_t l, size_t B,
                                  size_t T) {
    size_t HQ = m->sizes.HQ, n = B * HQ * T;
    ga_shape shape = {B, T, T, HQ, s->HK, s->D};
    GAI_RUN(m, sdpa_statistics, m->scratch, m->scratch + n, a->q, a->k, a->lse, shape);
    GAI_RUN(m, accumulate, s->there.received + l * HQ * s->T, s->T, 1, m->scratch, B, HQ, T);
    GAI_RUN(m, accumulate, s->there.entropy + l * HQ, 1, 0, m->scratch + n, B, HQ, T);
}

/* norms (L, HK, T) of rows (B, T, HK, D) */
GAI_FN void gai_observe_norms(ga_model *m, const ga_sums *s, double *norms, const ga_real *rows, size_t l, size_t B,
                              size_t T) {
    GAI_RUN(m, row_norms, m->scratch, rows, B * T * s->HK, s->D);
    GAI_RUN(m, accumulate, norms + l * s->HK * s->T, 1, s->T, m->scratch, B, T, s->HK);
}

GAI_FN void gai_observe_stream(ga_model *m, const ga_sums *s, ga_stream stream, const ga_real *x, size_t l, size_t N,
                               size_t T) {
    size_t at = (size_t)stream * m->sizes.L + l;
    GAI_RUN(m, max_abs_rows, m->scratch, m->scratch + N, x, N, s->C);
    GAI_RUN(m, keep_peaks, s->there.max_at + at * s->T, s->there.peaks + at, m->scratch, m->scratch + N, m->tokens, N,
            T);
    GAI_RUN(m, max_abs_columns, s->there.max_in + at * s->C, x, N, s->C);
}

/* The attention block's and the FFN's output as they are added to the residual stream: passes 8 to 10, 16 and 17. */
GAI_FN const ga_real *gai_attention_output(const ga_model *m, const ga_layer_activations *a) {
    const ga_config *c = &m->config;
    if (c->sandwich_norm) return a->o_normed;
    if (c->attn_clip > 0) return a->o_clipped;
    return m->gate.position == GA_G5 ? a->o_gated : a->o;
}

GAI_FN const ga_real *gai_ffn_output(const ga_model *m, const ga_layer_activations *a) {
    if (m->config.sandwich_norm) return a->f_normed;
    return m->config.ffn_clip > 0 ? a->f_clipped : a->f;
}

/* Y of Eq. 5 before the gate, and behind it (NULL without one): rows of *width values. */
GAI_FN const ga_real *gai_modulated(const ga_model *m, const ga_layer_activations *a, size_t *stride, size_t *width,
                                    const ga_real **after) {
    ga_sizes z = m->sizes;
    size_t qD = z.HQ * z.D, kD = z.HK * z.D;
    gai_sections at = gai_sections_of(z, a->qgkv);
    switch (m->gate.position) {
    case GA_G2:
        *stride = z.Z, *width = kD, *after = a->gated;
        return at.value;
    case GA_G3:
        *stride = z.Z, *width = kD, *after = a->gated;
        return at.key;
    case GA_G4:
        *stride = z.Z, *width = qD, *after = a->gated;
        return at.query;
    case GA_G5:
        *stride = *width = z.C, *after = a->o_gated;
        return a->o;
    default:
        *stride = *width = qD, *after = m->gate.position == GA_G1 ? a->y_gated : NULL;
        return a->y;
    }
}

GAI_FN void gai_observe_magnitudes(ga_model *m, ga_magnitude_sums *sums, size_t L, const ga_layer_activations *a,
                                   double mean_score, size_t N) {
    size_t stride, width;
    const ga_real *after, *y = gai_modulated(m, a, &stride, &width, &after);
    GAI_RUN(m, magnitude_statistics, sums + GA_BEFORE_GATE * L, y, stride, N, width, 1.0);
    if (after) GAI_RUN(m, magnitude_statistics, sums + GA_AFTER_GATE * L, after, width, N, width, 1.0);
    if (m->gate.logits > 0 && m->gate.form == GA_MULTIPLICATIVE)
        GAI_RUN(m, magnitude_statistics, sums + GA_MEAN_GATE * L, y, stride, N, width, mean_score);
}

/* mean_score: of the gate in this layer and this pass */
GAI_FN void gai_observe_details(ga_model *m, ga_sums *s, const ga_layer_activations *a, const ga_real *x_next,
                                double mean_score, size_t l, size_t B, size_t T) {
    const gai_sum_fields *f = &s->there;
    size_t N = B * T, HQ = m->sizes.HQ, moments = l * HQ * s->D * s->D;
    gai_observe_attention(m, s, a, l, B, T);
    gai_observe_norms(m, s, f->value_norm, a->v, l, B, T);
    gai_observe_norms(m, s, f->key_norm, a->k, l, B, T);
    gai_observe_stream(m, s, GA_ATTENTION_OUTPUT, gai_attention_output(m, a), l, N, T);
    gai_observe_stream(m, s, GA_ATTENTION_RESIDUAL, a->x_mid, l, N, T);
    gai_observe_stream(m, s, GA_FFN_OUTPUT, gai_ffn_output(m, a), l, N, T);
    gai_observe_stream(m, s, GA_FFN_RESIDUAL, x_next, l, N, T);
    gai_observe_magnitudes(m, f->magnitudes + l, m->sizes.L, a, mean_score, N);
    GAI_RUN(m, head_moments, f->before + moments, a->y, N, HQ, s->D);
    if (f->after) GAI_RUN(m, head_moments, f->after + moments, a->y_gated, N, HQ, s->D);
    if (l > 0) return;
    for (size_t j = 0; j < T; j++) {
        s->windows[j] += (double)B;
        s->queries[j] += (double)(B * (T - j));
    }
}

/* Adds the scores of a layer. Returns their mean in this pass where it is asked for: the one figure that has to come to
 * the host in each layer, since the passes over Y that follow need it. */
GAI_FN double gai_observe_gate(ga_model *m, const ga_statistics *s, gai_gate_logits logits, size_t l, size_t N) {
    size_t heads = s->gate_heads;
    ga_gate_sums *there = s->sums->there.gate + l * heads, *here = s->sums->here.gate + l * heads;
    double sum = 0, count = 0;
    for (size_t h = 0; s->has_details && h < heads; h++) {
        sum -= here[h].sum;
        count -= here[h].count;
    }
    GAI_RUN(m, gate_statistics, there, logits.s, logits.stride, N, m->gate);
    if (!s->has_details) return (double)NAN;
    if (here != there) m->device.copy_out(m->device.state, here, there, heads * sizeof *here);
    for (size_t h = 0; h < heads; h++) {
        sum += here[h].sum;
        count += here[h].count;
    }
    return sum / count;
}

GAI_FN void gai_observe_statistics(ga_model *m, ga_statistics *s, const ga_layer_activations *a,
                                   const gai_parameters *w, gai_cache cache, const ga_real *x_next, size_t l, size_t B,
                                   size_t T) {
    ga_sizes z = m->sizes;
    const gai_sum_fields *f = &s->sums->there;
    size_t N = B * T;
    ga_shape shape = {B, T, cache.past + T, z.HQ, z.HK, z.D};
    GAI_RUN(m, sdpa_column, m->scratch, a->q, cache.all_k, a->lse, 0, shape);
    GAI_RUN(m, accumulate, f->attention + l * z.HQ, 1, 0, m->scratch, B, z.HQ, T);
    if (s->has_sink) GAI_RUN(m, sdpa_sink, f->sink + l * z.HQ, gai_sink_source(m, w), a->lse, B, z.HQ, T);
    GAI_RUN(m, max_abs, f->max_abs + l, x_next, N * z.C);
    double mean_score = s->has_gate ? gai_observe_gate(m, s, gai_gate_logits_of(m, a, w), l, N) : (double)NAN;
    if (s->has_details) gai_observe_details(m, s->sums, a, x_next, mean_score, l, B, T);
    if (z.E > 0) GAI_RUN(m, route_counts, f->expert_rows + l * z.E, a->offsets, z.E);
    s->sums->stale = true;
}

GAI_FN void gai_observe_map(ga_model *m, ga_map *map, const ga_layer_activations *a, size_t B, size_t T) {
    ga_sizes z = m->sizes;
    ga_shape shape = {B, T, T, z.HQ, z.HK, z.D};
    gai_range heads = gai_range_of(map->head, z.HQ);
    ga_real p[256];
    for (size_t j = 0; j < T; j++) {
        GAI_RUN(m, sdpa_column, m->scratch, a->q, a->k, a->lse, j, shape);
        for (size_t b = 0; b < B; b++)
            for (size_t h = heads.begin; h < heads.end; h++)
                for (size_t i = 0; i < T; i += 256) {
                    size_t n = gai_min(256, T - i);
                    m->device.copy_out(m->device.state, p, m->scratch + (b * z.HQ + h) * T + i, n * sizeof *p);
                    for (size_t r = 0; r < n; r++)
                        map->p[(i + r) * T + j] += (double)p[r] / (double)(heads.end - heads.begin);
                }
    }
    map->windows += (double)B;
}

/* ---- passes over all layers -------------------------------------------------------------------------------------- */

GAI_FN ga_result gai_take_batch(ga_model *m, const int32_t *tokens, const int32_t *targets, size_t B, size_t T,
                                ga_error *e) {
    size_t V = m->sizes.V, N = B * T;
    if (m->mode == GA_MAPPED && !m->mapped)
        return gai_fail(e, GA_ERR_INPUT, "the model has no weights: in GA_MAPPED they come from ga_load");
    if (B == 0 || T == 0 || T > m->config.max_seq_len || B > m->max_rows / T)
        return gai_fail(e, GA_ERR_INPUT,
                        "a batch of %zu x %zu positions: the model was made for %zu, at most %zu a sequence", B, T,
                        m->max_rows, m->config.max_seq_len);
    for (size_t i = 0; i < N; i++) {
        if (tokens[i] < 0 || (size_t)tokens[i] >= V)
            return gai_fail(e, GA_ERR_INPUT, "token %ld at position %zu is not in a vocabulary of %zu", (long)tokens[i],
                            i, V);
        if (targets && targets[i] >= 0 && (size_t)targets[i] >= V)
            return gai_fail(e, GA_ERR_INPUT, "target %ld at position %zu is not in a vocabulary of %zu",
                            (long)targets[i], i, V);
    }
    m->device.copy_in(m->device.state, m->tokens, tokens, N * sizeof *tokens);
    if (targets) m->device.copy_in(m->device.state, m->targets, targets, N * sizeof *targets);
    m->B = B;
    m->T = T;
    return GA_OK;
}

/* Where layer l puts its output: the x of the next one. */
GAI_FN ga_real *gai_next_x(const ga_model *m, size_t l) {
    return l + 1 == m->sizes.L ? m->x_final : m->layers[l + 1].x;
}

/* Where all keys are those of the pass itself. */
GAI_INLINE gai_cache gai_no_past(const ga_layer_activations *a) {
    gai_cache own = {a->k, a->v, a->k, a->v, 0};
    return own;
}

GAI_FN void gai_run_layer(ga_model *m, size_t l, size_t B, size_t T) {
    const ga_layer_activations *a = &m->layers[l];
    gai_parameters w = gai_weights(m, l);
    gai_layer_forward(m, a, &w, gai_no_past(a), gai_next_x(m, l), B, T);
}

/* count: the routers' choices count for the load-balancing loss of this step. */
GAI_FN void gai_forward_layers(ga_model *m, const ga_observer *observer, bool count) {
    size_t N = m->B * m->T;
    gai_embed(m, N);
    for (size_t l = 0; l < m->sizes.L; l++) {
        gai_run_layer(m, l, m->B, m->T);
        const ga_layer_activations *a = &m->layers[l];
        if (m->sizes.E > 0 && count)
            GAI_RUN(m, route_sums, m->counted + l * m->sizes.E, m->summed + l * (m->sizes.E + 1), a->offsets,
                    a->router_p, a->router_lse, N, m->router);
        if (!observer) continue;
        gai_parameters w = gai_weights(m, l);
        if (observer->statistics)
            gai_observe_statistics(m, observer->statistics, a, &w, gai_no_past(a), gai_next_x(m, l), l, m->B, m->T);
        for (size_t i = 0; i < observer->n_maps; i++)
            if (observer->maps[i].layer == l && observer->maps[i].T == m->T)
                gai_observe_map(m, &observer->maps[i], a, m->B, m->T);
    }
    if (observer && observer->statistics) observer->statistics->rows += (double)N;
    GAI_RUN(m, rmsnorm_forward, m->h_final, m->rstd_final, m->x_final, gai_weights(m, GA_ALL).final_norm, N, m->sizes.C,
            (ga_real)m->config.norm_eps);
}

/* ---- ranks: exchanges of a pass ---------------------------------------------------------------------------------- */

/* Begins to add up the gradients of the next bucket, in the order in which the backward pass completes them. */
GAI_FN void gai_exchange_next(ga_model *m) {
    const ga_ranks *ranks = gai_ranks(m);
    size_t b = m->n_buckets - ++m->begun, values = gai_share_of(m, b).values;
    if (values > 0) ranks->reduce_scatter(ranks->state, m->gradients + m->buckets[b], values);
}

/* 3.1 with ranks, between forward and backward pass: all learn what each has counted. The device does it: the host does
 * not wait, and neither pass depends on a number that it knows. */
GAI_FN void gai_exchange_routing(ga_model *m) {
    const ga_ranks *ranks = gai_ranks(m);
    ranks->all_gather(ranks->state, m->routed, gai_pool_of(&m->config, ranks->rank, ranks->count).values);
    ranks->wait(ranks->state);
}

/* A number in the device's memory. The host waits here until the device has computed it. */
GAI_FN double gai_fetch_number(ga_model *m, const double *from) {
    double number = (double)NAN;
    m->device.copy_out(m->device.state, &number, from, sizeof number);
    return number;
}

GA_API ga_result ga_forward(ga_model *m, const int32_t *tokens, const int32_t *targets, size_t B, size_t T,
                            const ga_observer *observer, double *loss, ga_error *e) {
    ga_result result = gai_take_batch(m, tokens, targets, B, T, e);
    if (result != GA_OK) return result;
    gai_forward_layers(m, observer, false);
    if (!targets) return gai_status(m, e);
    gai_parameters w = gai_weights(m, GA_ALL);
    GAI_RUN(m, head_loss, m->losses, NULL, NULL, m->logits, m->h_final, w.head, m->targets, B * T, m->sizes.C,
            m->sizes.V, NULL);
    if (!loss) return gai_status(m, e);
    GAI_RUN(m, mean_loss, m->loss, NULL, m->losses, m->targets, B * T, 0);
    *loss = gai_fetch_number(m, m->loss);
    return gai_status(m, e);
}

GA_API ga_result ga_forward_with(ga_model *m, const ga_intervention *change, const int32_t *tokens,
                                 const int32_t *targets, size_t B, size_t T, const ga_observer *observer, double *loss,
                                 ga_error *e) {
    bool gate = change->kind == GA_SET_GATE || change->kind == GA_SCALE_GATE;
    if (change->layer != GA_ALL && change->layer >= m->sizes.L)
        return gai_fail(e, GA_ERR_INPUT, "layer %zu: the model has %zu", change->layer, m->sizes.L);
    if (change->kind == GA_SILENCE_HEAD && change->head != GA_ALL && change->head >= m->sizes.HQ)
        return gai_fail(e, GA_ERR_INPUT, "head %zu: the model has %zu", change->head, m->sizes.HQ);
    if (gate && m->gate.logits == 0)
        return gai_fail(e, GA_ERR_INPUT, "the model has no gate whose scores could be changed");
    if (change->kind == GA_SCALE_GATE && m->gate.form != GA_MULTIPLICATIVE)
        return gai_fail(e, GA_ERR_INPUT, "the gate adds its scores: they can be set, not scaled");
    m->intervention = change;
    ga_result result = ga_forward(m, tokens, targets, B, T, observer, loss, e);
    m->intervention = NULL;
    return result;
}

/* The two halves of ga_forward_backward, over m->tokens and m->targets. */
enum { GAI_FORWARD = 1, GAI_BACKWARD = 2 };

GAI_FN void gai_run_forward(ga_model *m, const ga_observer *observer) {
    const ga_ranks *ranks = gai_ranks(m);
    if (m->routed) {
        ga_pool pool = gai_pool_of(&m->config, ranks->rank, ranks->count);
        m->device.zero(m->device.state, m->counted, pool.values * sizeof(ga_real));
    }
    gai_forward_layers(m, observer, true);
}

GAI_FN void gai_run_backward(ga_model *m, double scale) {
    size_t B = m->B, T = m->T, N = B * T;
    const ga_ranks *ranks = gai_ranks(m);
    bool exchange = ranks && m->last_of_step;
    gai_parameters w = gai_layer_parameters(m, m->weights, 0), dw = gai_layer_parameters(m, m->gradients, 0);
    if (m->routed)
        GAI_RUN(m, route_pool, m->seen, m->expert_counts, m->router_sums, m->routed,
                gai_pool_of(&m->config, ranks->rank, ranks->count));
    GAI_RUN(m, head_loss, m->losses, m->dh, dw.head, m->logits, m->h_final, w.head, m->targets, N, m->sizes.C,
            m->sizes.V, m->row_scale);
    GAI_RUN(m, mean_loss, m->loss, m->loss + 1, m->losses, m->targets, N, scale);
    GAI_RUN(m, rmsnorm_backward, m->dx, dw.final_norm, m->dh, m->x_final, w.final_norm, m->rstd_final, N, m->sizes.C,
            false);
    if (exchange) gai_exchange_next(m);
    for (size_t l = m->sizes.L; l-- > 0;) {
        if (m->config.recompute && l + 1 < m->sizes.L) gai_run_layer(m, l, B, T); /* the last is still there */
        w = gai_layer_parameters(m, m->weights, l);
        dw = gai_layer_parameters(m, m->gradients, l);
        gai_layer_backward(m, l, &w, &dw, m->config.recompute || l + 1 == m->sizes.L, scale, B, T);
        if (exchange) gai_exchange_next(m);
    }
    GAI_RUN(m, embedding_backward, dw.embed, m->tokens, m->dx, N, m->sizes.C);
    if (exchange) gai_exchange_next(m);
}

GAI_FN void gai_run_halves(ga_model *m, int halves, double scale, const ga_observer *observer) {
    if (halves & GAI_FORWARD) gai_run_forward(m, observer);
    if (halves & GAI_BACKWARD) gai_run_backward(m, scale);
}

/* The same by a recording, where the device has one: without an observer or an exchange nothing in it depends on more
 * than the key. Tokens, targets and row_scale are in the memory of the device by now. */
GAI_FN void gai_pass(ga_model *m, int halves, double scale, const ga_observer *observer) {
    struct {
        const ga_model *model;
        size_t B, T, halves;
        double scale;
    } key;
    bool exchanges = gai_ranks(m) && m->last_of_step && halves == GAI_BACKWARD;
    if (!m->device.replay || observer || m->profile || exchanges) {
        gai_run_halves(m, halves, scale, observer);
        return;
    }
    memset(&key, 0, sizeof key);
    key.model = m;
    key.B = m->B;
    key.T = m->T;
    key.halves = (size_t)halves;
    key.scale = scale;
    while (!m->device.replay(m->device.state, &key, sizeof key)) {
        gai_run_halves(m, halves, scale, NULL);
        if (m->device.recorded(m->device.state)) break;
    }
}

GA_API ga_result ga_forward_backward(ga_model *m, const int32_t *tokens, const int32_t *targets, size_t B, size_t T,
                                     double scale, const ga_observer *observer, double *loss, ga_error *e) {
    if (m->mode != GA_TRAINING)
        return gai_fail(e, GA_ERR_INPUT, "the model was made for inference: it holds no gradients");
    if (!targets) return gai_fail(e, GA_ERR_INPUT, "a backward pass needs targets");
    ga_result result = gai_take_batch(m, tokens, targets, B, T, e);
    if (result != GA_OK) return result;
    if (m->begun > 0)
        return gai_fail(e, GA_ERR_INPUT,
                        "the gradients of this step are on their way to other ranks: ga_update is next");
    size_t count = gai_count_targets(targets, B * T);
    ga_real row_scale = (ga_real)(count ? scale / (double)count : 0);
    m->device.copy_in(m->device.state, m->row_scale, &row_scale, sizeof row_scale);
    if (gai_ranks(m)) {
        gai_pass(m, GAI_FORWARD, scale, observer);
        if (m->routed) gai_exchange_routing(m);
        gai_pass(m, GAI_BACKWARD, scale, NULL);
    } else {
        gai_pass(m, GAI_FORWARD | GAI_BACKWARD, scale, observer);
    }
    m->last_of_step = false;
    if (loss) *loss = gai_fetch_number(m, m->loss);
    return gai_status(m, e);
}

GA_API ga_result ga_batch_loss(ga_model *m, double *loss, ga_error *e) {
    if (m->mode != GA_TRAINING) return gai_fail(e, GA_ERR_INPUT, "the model was made for inference: it has no batch");
    const ga_ranks *ranks = gai_ranks(m);
    *loss = gai_fetch_number(m, m->loss + 1);
    if (ranks) ranks->sum(ranks->state, loss, 1);
    return gai_status(m, e);
}

GA_API ga_result ga_logits(ga_model *m, size_t first, size_t rows, ga_real *logits, ga_error *e) {
    size_t N = m->B * m->T, V = m->sizes.V;
    if (first > N || rows > N - first)
        return gai_fail(e, GA_ERR_INPUT, "logits of %zu rows from %zu on: the last forward pass had %zu rows", rows,
                        first, N);
    gai_parameters w = gai_weights(m, GA_ALL);
    for (size_t n = 0; n < rows; n += GA_HEAD_ROWS) {
        size_t count = gai_min(GA_HEAD_ROWS, rows - n);
        GAI_RUN(m, linear_forward, m->logits, m->h_final + (first + n) * m->sizes.C, w.head, count, V, m->sizes.C);
        m->device.copy_out(m->device.state, logits + n * V, m->logits, count * V * sizeof *logits);
    }
    return gai_status(m, e);
}

/* The largest of E numbers of rows over their mean, and the share of those that are 0. */
GAI_FN void gai_load(const double *rows, size_t E, double *max_load, double *dead) {
    double all = 0, most = 0;
    size_t none = 0;
    for (size_t e = 0; e < E; e++) {
        all += rows[e];
        if (rows[e] > most) most = rows[e];
        if (rows[e] == 0) none++;
    }
    *max_load = all > 0 ? most * (double)E / all : (double)NAN;
    *dead = all > 0 ? (double)none / (double)E : (double)NAN;
}

GAI_FN ga_routing gai_routing_of_layer(ga_model *m, size_t layer) {
    size_t E = m->sizes.E;
    int32_t counts[GA_MAX_EXPERTS];
    ga_real sums[GA_MAX_EXPERTS + 1];
    double rows[GA_MAX_EXPERTS], all = 0, product = 0;
    m->device.copy_out(m->device.state, counts, m->expert_counts + layer * E, E * sizeof *counts);
    m->device.copy_out(m->device.state, sums, m->router_sums + layer * (E + 1), (E + 1) * sizeof *sums);
    for (size_t e = 0; e < E; e++) {
        rows[e] = (double)counts[e];
        all += rows[e];
        product += rows[e] * (double)sums[e];
    }
    double tokens = all / (double)m->sizes.K;
    ga_routing r = {(double)E * product / (tokens * tokens), (double)sums[E] / tokens, 0, 0};
    gai_load(rows, E, &r.max_load, &r.dead);
    return r;
}

GA_API ga_routing ga_routing_of(ga_model *m, size_t layer) {
    ga_routing mean = {0, 0, 0, 0}, none = {(double)NAN, (double)NAN, (double)NAN, (double)NAN};
    if (m->sizes.E == 0 || m->mode != GA_TRAINING) return none;
    gai_range layers = gai_range_of(layer, m->sizes.L);
    double share = 1 / (double)(layers.end - layers.begin);
    for (size_t l = layers.begin; l < layers.end; l++) {
        ga_routing r = gai_routing_of_layer(m, l);
        mean.load_balance += share * r.load_balance;
        mean.router_z += share * r.router_z;
        mean.max_load += share * r.max_load;
        mean.dead += share * r.dead;
    }
    return mean;
}

/* ==== optimiser and schedule ====================================================================================== */

GA_API double ga_learning_rate(const ga_config *c, uint64_t step, uint64_t steps) {
    if (step < c->warmup_steps) return c->learning_rate * (double)(step + 1) / (double)c->warmup_steps;
    double span = steps > c->warmup_steps ? (double)(steps - c->warmup_steps) : 1;
    double progress = (double)(step - c->warmup_steps) / span;
    if (progress > 1) progress = 1;
    return c->min_lr + (c->learning_rate - c->min_lr) * (1 + cos(3.141592653589793 * progress)) / 2;
}

/* The values of a run of tensors: those from *i on that lie one behind the other and are frozen alike, with `decay`
 * also decay alike; *i becomes the first tensor after it. So the optimiser works on a few long arrays. */
GAI_FN size_t gai_alike(const ga_model *m, size_t *i, bool decay) {
    const ga_tensor *first = &m->tensors[*i];
    size_t values = 0;
    for (; *i < m->n_tensors; ++*i) {
        const ga_tensor *t = &m->tensors[*i];
        if (t->frozen != first->frozen || t->offset != first->offset + values) break;
        if (decay && t->decays != first->decays) break;
        values += t->rows * t->columns;
    }
    return values;
}

GAI_FN void gai_clear_gradients(ga_model *m) {
    m->device.zero(m->device.state, m->gradients, m->buckets[m->n_buckets] * sizeof(ga_real));
}

/* How many of the `values` from *offset on lie in a share; *offset becomes the first of them. */
GAI_FN size_t gai_within(gai_share s, size_t *offset, size_t values) {
    size_t end = gai_min(*offset + values, s.begin + s.values);
    *offset = gai_max(*offset, s.begin);
    return *offset < end ? end - *offset : 0;
}

/* Adds up the squares of the gradients in a share. */
GAI_FN void gai_add_squares(ga_model *m, gai_share s) {
    for (size_t i = 0; i < m->n_tensors;) {
        const ga_tensor *t = &m->tensors[i];
        size_t offset = t->offset, values = gai_within(s, &offset, gai_alike(m, &i, false));
        if (t->frozen || values == 0) continue;
        GAI_RUN(m, sum_of_squares, m->squares, m->gradients + offset, values);
    }
}

GAI_FN void gai_step(ga_model *m, gai_share s, ga_adamw_settings a) {
    for (size_t i = 0; i < m->n_tensors;) {
        const ga_tensor *t = &m->tensors[i];
        size_t offset = t->offset, values = gai_within(s, &offset, gai_alike(m, &i, true));
        if (t->frozen || values == 0) continue;
        size_t moment = s.moment + (offset - s.begin);
        a.weight_decay = t->decays ? m->config.weight_decay : 0;
        GAI_RUN(m, adamw, m->weights + offset, m->gradients + offset, m->moment1 + moment, m->moment2 + moment, values,
                a);
    }
}

/* No choice of a router counts from here on: a step begins. */
GAI_FN void gai_clear_routing(ga_model *m) {
    size_t L = m->sizes.L, E = m->sizes.E;
    m->device.zero(m->device.state, m->expert_counts, L * E * sizeof *m->expert_counts);
    m->device.zero(m->device.state, m->router_sums, L * (E + 1) * sizeof *m->router_sums);
}

GA_API ga_result ga_update(ga_model *m, double learning_rate, double *norm, ga_error *e) {
    const ga_config *c = &m->config;
    const ga_ranks *ranks = gai_ranks(m);
    if (m->mode != GA_TRAINING)
        return gai_fail(e, GA_ERR_INPUT, "the model was made for inference: it holds no gradients");
    while (ranks && m->begun < m->n_buckets) gai_exchange_next(m);
    if (ranks) ranks->wait(ranks->state);
    m->begun = 0;
    m->device.zero(m->device.state, m->squares, sizeof *m->squares);
    for (size_t b = 0; b < m->n_buckets; b++) gai_add_squares(m, gai_share_of(m, b));
    double sum = gai_fetch_number(m, m->squares);
    if (ranks) ranks->sum(ranks->state, &sum, 1);
    ga_result result = gai_status(m, e);
    if (result != GA_OK) return result;
    double length = sqrt(sum);
    if (norm) *norm = length;
    if (!isfinite(length)) return gai_fail(e, GA_ERR_DIVERGED, "the gradient is not finite: its norm is %g", length);
    ga_adamw_settings a = {learning_rate, c->beta1, c->beta2, c->eps, 0, 1, ++m->updates};
    if (c->grad_clip > 0 && length > c->grad_clip) a.gradient_scale = c->grad_clip / (length + 1e-6);
    for (size_t b = 0; b < m->n_buckets; b++) {
        gai_step(m, gai_share_of(m, b), a);
        gai_gather_bucket(m, m->weights, b);
    }
    if (ranks) ranks->wait(ranks->state);
    gai_clear_gradients(m);
    m->device.zero(m->device.state, m->loss + 1, sizeof *m->loss);
    if (m->sizes.E > 0) gai_clear_routing(m);
    if (m->device.weights_changed) m->device.weights_changed(m->device.state, m->weights, m->n_weights);
    return gai_status(m, e);
}

GA_API ga_result ga_check_weights(ga_model *m, ga_error *e) {
    m->device.zero(m->device.state, m->squares, sizeof *m->squares);
    GAI_RUN(m, sum_of_squares, m->squares, m->weights, m->n_weights);
    double sum = gai_fetch_number(m, m->squares);
    ga_result result = gai_status(m, e);
    if (result != GA_OK || isfinite(sum)) return result;
    return gai_fail(e, GA_ERR_DIVERGED, "the weights are not finite: the sum of their squares is %g", sum);
}

/* ==== analysis: 4.2, 4.3, A.3 to A.5 ============================================================================== */

GAI_FN ga_statistics *gai_statistics_create(const ga_model *m, size_t details) {
    ga_statistics *s = (ga_statistics *)gai_zeroed(sizeof *s);
    ga_sums *sums = s ? (ga_sums *)gai_zeroed(sizeof *sums) : NULL;
    if (!sums) {
        GA_FREE(s);
        return NULL;
    }
    s->sums = sums;
    s->L = m->sizes.L;
    s->HQ = m->sizes.HQ;
    s->E = m->sizes.E;
    s->has_gate = m->gate.logits > 0;
    s->gate_heads = gai_score_heads(m->gate);
    s->has_sink = m->config.attention_sink != GA_SINK_NONE;
    s->has_details = details > 0;
    sums->device = m->device;
    sums->HK = m->sizes.HK;
    sums->T = m->config.max_seq_len;
    sums->C = m->sizes.C;
    sums->D = m->sizes.D;
    uint64_t bytes = gai_lay_out_sums(&sums->there, NULL, m, details, &sums->copied);
    if (bytes <= SIZE_MAX) {
        sums->block = m->device.allocate(m->device.state, (size_t)bytes);
        /* Where a copy is a memcpy, the device's memory is the host's. */
        sums->copy = m->device.copy_out == gai_cpu_copy ? sums->block : gai_zeroed(sums->copied);
        sums->host = (double *)gai_zeroed((2 * sums->T + GA_RANKS * s->L * s->HQ) * sizeof(double));
    }
    if (!sums->block || !sums->copy || !sums->host) {
        ga_statistics_destroy(s);
        return NULL;
    }
    gai_lay_out_sums(&sums->there, sums->block, m, details, &sums->copied);
    gai_lay_out_sums(&sums->here, sums->copy, m, details, &sums->copied);
    sums->queries = sums->host;
    sums->windows = sums->queries + sums->T;
    sums->ranks = sums->windows + sums->T;
    ga_statistics_reset(s);
    return s;
}

GA_API ga_statistics *ga_statistics_create(const ga_model *m) {
    return gai_statistics_create(m, 0);
}

GA_API ga_statistics *ga_statistics_create_detailed(const ga_model *m) {
    return gai_statistics_create(m, 1);
}

GA_API void ga_statistics_reset(ga_statistics *s) {
    ga_sums *sums = s->sums;
    ga_device *device = &sums->device;
    size_t moments = s->has_details ? s->L * s->HQ * sums->D * sums->D * sizeof(double) : 0;
    s->rows = 0;
    memset(sums->copy, 0, sums->copied);
    for (size_t i = 0; s->has_details && i < GA_STREAMS * s->L; i++) sums->here.peaks[i].token = -1;
    gai_put_sums(sums);
    if (sums->there.before) device->zero(device->state, sums->there.before, moments);
    if (sums->there.after) device->zero(device->state, sums->there.after, moments);
    memset(sums->host, 0, 2 * sums->T * sizeof(double));
    for (size_t i = 0; i < GA_RANKS * s->L * s->HQ; i++) sums->ranks[i] = (double)NAN;
}

/* Gate scores seen elsewhere as well. */
GAI_FN void gai_add_gate_sums(ga_gate_sums *all, const ga_gate_sums *g) {
    if (!(g->count > 0)) return;
    if (!(all->count > 0) || g->min < all->min) all->min = g->min;
    if (!(all->count > 0) || g->max > all->max) all->max = g->max;
    all->count += g->count;
    all->sum += g->sum;
    all->sum_of_squares += g->sum_of_squares;
    all->below_01 += g->below_01;
    all->below_05 += g->below_05;
    for (size_t b = 0; b < GA_BINS; b++) all->bins[b] += g->bins[b];
}

/* What statistics consist of, as numbers: the first GAI_ADDED are sums, then follow maxima, last the gate's. */
enum { GAI_ADDED = 4, GAI_GATE = 5, GAI_PARTS };
typedef struct {
    double *values;
    size_t n;
} gai_part;

GAI_FN void gai_list_parts(ga_statistics *s, gai_part parts[GAI_PARTS]) {
    const gai_sum_fields *f = gai_fetch(s);
    size_t heads = s->L * s->HQ, gate = s->L * s->gate_heads * (sizeof *f->gate / sizeof(double));
    const gai_part list[GAI_PARTS] = {
        {&s->rows, 1},      {f->attention, heads},     {f->sink, heads}, {f->expert_rows, s->L * s->E},
        {f->max_abs, s->L}, {(double *)f->gate, gate},
    };
    memcpy(parts, list, sizeof list);
}

/* Each rank has a place for its own numbers, zero on the others: a sum over the ranks brings all of them to all. */
GA_API ga_result ga_statistics_merge(ga_statistics *s, const ga_ranks *ranks, ga_error *e) {
    gai_part parts[GAI_PARTS];
    size_t n = 0, at = 0;
    if (s->has_details) return gai_fail(e, GA_ERR_INPUT, "statistics with details are not merged over ranks");
    gai_list_parts(s, parts);
    for (size_t i = 0; i < GAI_PARTS; i++) n += parts[i].n;
    double *all = (double *)gai_zeroed(ranks->count * n * sizeof *all);
    if (!all) return gai_fail(e, GA_ERR_MEMORY, "no memory to merge statistics");
    for (size_t i = 0; i < GAI_PARTS; i++) {
        for (size_t k = 0; k < parts[i].n; k++) all[ranks->rank * n + at + k] = parts[i].values[k];
        at += parts[i].n;
    }
    ranks->sum(ranks->state, all, ranks->count * n);
    ga_statistics_reset(s);
    const double *next = all;
    for (size_t r = 0; r < ranks->count; r++) {
        for (size_t i = 0; i < GAI_GATE; i++) {
            for (size_t k = 0; k < parts[i].n; k++) {
                double *value = &parts[i].values[k];
                if (i < GAI_ADDED)
                    *value += next[k];
                else if (gai_exceeds(next[k], *value))
                    *value = next[k];
            }
            next += parts[i].n;
        }
        for (size_t k = 0; k < s->L * s->gate_heads; k++)
            gai_add_gate_sums(&s->sums->here.gate[k], (const ga_gate_sums *)(const void *)next + k);
        next += parts[GAI_GATE].n;
    }
    GA_FREE(all);
    gai_put_sums(s->sums);
    return ranks->status(ranks->state, e);
}

GA_API void ga_statistics_destroy(ga_statistics *s) {
    if (!s) return;
    ga_sums *sums = s->sums;
    if (sums->copy != sums->block) GA_FREE(sums->copy);
    if (sums->block) sums->device.release(sums->device.state, sums->block);
    GA_FREE(sums->host);
    GA_FREE(sums);
    GA_FREE(s);
}

/* Mean over the rows and the chosen layers and heads of sums (L, HQ). */
GAI_FN double gai_mean_share(const ga_statistics *s, const double *sums, size_t layer, size_t head) {
    gai_range layers = gai_range_of(layer, s->L), heads = gai_range_of(head, s->HQ);
    double sum = 0;
    for (size_t l = layers.begin; l < layers.end; l++)
        for (size_t h = heads.begin; h < heads.end; h++) sum += sums[l * s->HQ + h];
    return sum / (s->rows * (double)((layers.end - layers.begin) * (heads.end - heads.begin)));
}

GA_API double ga_f_attn_head(const ga_statistics *s, size_t layer, size_t head) {
    return gai_mean_share(s, gai_fetch(s)->attention, layer, head);
}

GA_API double ga_f_attn(const ga_statistics *s, size_t layer) {
    return ga_f_attn_head(s, layer, GA_ALL);
}

GA_API double ga_sink_share_head(const ga_statistics *s, size_t layer, size_t head) {
    return s->has_sink ? gai_mean_share(s, gai_fetch(s)->sink, layer, head) : (double)NAN;
}

GA_API double ga_sink_share(const ga_statistics *s, size_t layer) {
    return ga_sink_share_head(s, layer, GA_ALL);
}

GA_API double ga_f_attn_uniform(size_t T) { /* mean of 1 / (i + 1) over the queries i = 0 .. T-1 */
    double sum = 0;
    for (size_t i = T; i > 0; i--) sum += 1 / (double)i;
    return sum / (double)T;
}

GA_API double ga_m_act(const ga_statistics *s, size_t layer) {
    const double *max_abs = gai_fetch(s)->max_abs;
    if (layer != GA_ALL) return max_abs[layer];
    double sum = 0;
    for (size_t l = 0; l < s->L; l++) sum += max_abs[l];
    return sum / (double)s->L;
}

/* The sums of a layer and a head, or of all of them together. */
GAI_FN ga_gate_sums gai_gate_sums(const ga_statistics *s, size_t layer, size_t head) {
    ga_gate_sums all;
    memset(&all, 0, sizeof all);
    const ga_gate_sums *gate = gai_fetch(s)->gate;
    for (size_t i = 0; i < s->L * s->gate_heads; i++) {
        const ga_gate_sums *g = &gate[i];
        bool wanted = (layer == GA_ALL || i / s->gate_heads == layer) && (head == GA_ALL || i % s->gate_heads == head);
        if (wanted) gai_add_gate_sums(&all, g);
    }
    return all;
}

GA_API double ga_gate_mean_head(const ga_statistics *s, size_t layer, size_t head) {
    ga_gate_sums g = gai_gate_sums(s, layer, head);
    return g.count > 0 ? g.sum / g.count : (double)NAN;
}

GA_API double ga_gate_mean(const ga_statistics *s, size_t layer) {
    return ga_gate_mean_head(s, layer, GA_ALL);
}

GA_API double ga_gate_std_head(const ga_statistics *s, size_t layer, size_t head) {
    ga_gate_sums g = gai_gate_sums(s, layer, head);
    if (!(g.count > 0)) return (double)NAN;
    double mean = g.sum / g.count, variance = g.sum_of_squares / g.count - mean * mean;
    if (variance < 0) return 0; /* by rounding; NaN stays */
    return sqrt(variance);
}

GA_API double ga_gate_std(const ga_statistics *s, size_t layer) {
    return ga_gate_std_head(s, layer, GA_ALL);
}

GA_API double ga_gate_min_head(const ga_statistics *s, size_t layer, size_t head) {
    ga_gate_sums g = gai_gate_sums(s, layer, head);
    return g.count > 0 ? g.min : (double)NAN;
}

GA_API double ga_gate_min(const ga_statistics *s, size_t layer) {
    return ga_gate_min_head(s, layer, GA_ALL);
}

GA_API double ga_gate_max_head(const ga_statistics *s, size_t layer, size_t head) {
    ga_gate_sums g = gai_gate_sums(s, layer, head);
    return g.count > 0 ? g.max : (double)NAN;
}

GA_API double ga_gate_max(const ga_statistics *s, size_t layer) {
    return ga_gate_max_head(s, layer, GA_ALL);
}

GA_API double ga_gate_below(const ga_statistics *s, size_t layer, double bound) {
    ga_gate_sums g = gai_gate_sums(s, layer, GA_ALL);
    if (!(g.count > 0)) return (double)NAN;
    if (bound == (double)0.1) return g.below_01 / g.count;
    return bound == 0.5 ? g.below_05 / g.count : (double)NAN;
}

GA_API void ga_gate_histogram(const ga_statistics *s, size_t layer, double shares[GA_BINS]) {
    ga_gate_sums g = gai_gate_sums(s, layer, GA_ALL);
    for (size_t i = 0; i < GA_BINS; i++) shares[i] = g.count > 0 ? g.bins[i] / g.count : (double)NAN;
}

GA_API double ga_expert_rows(const ga_statistics *s, size_t layer, size_t expert) {
    if (expert >= s->E) return (double)NAN;
    gai_range layers = gai_range_of(layer, s->L);
    double rows = 0;
    for (size_t l = layers.begin; l < layers.end; l++) rows += gai_fetch(s)->expert_rows[l * s->E + expert];
    return rows / (double)(layers.end - layers.begin);
}

GA_API double ga_expert_load(const ga_statistics *s, size_t layer, size_t expert) {
    double all = 0;
    for (size_t e = 0; e < s->E; e++) all += ga_expert_rows(s, layer, e);
    return all > 0 ? ga_expert_rows(s, layer, expert) * (double)s->E / all : (double)NAN;
}

/* The busiest expert's load, and the share of experts without a row: of a layer, or the mean over the layers. */
GAI_FN void gai_mean_load(const ga_statistics *s, size_t layer, double *max_load, double *dead) {
    gai_range layers = gai_range_of(layer, s->L);
    double count = (double)(layers.end - layers.begin);
    *max_load = *dead = 0;
    for (size_t l = layers.begin; l < layers.end; l++) {
        double max_of_layer, dead_of_layer;
        gai_load(gai_fetch(s)->expert_rows + l * s->E, s->E, &max_of_layer, &dead_of_layer);
        *max_load += max_of_layer / count;
        *dead += dead_of_layer / count;
    }
}

GA_API double ga_expert_max_load(const ga_statistics *s, size_t layer) {
    double max_load, dead;
    gai_mean_load(s, layer, &max_load, &dead);
    return max_load;
}

GA_API double ga_expert_dead(const ga_statistics *s, size_t layer) {
    double max_load, dead;
    gai_mean_load(s, layer, &max_load, &dead);
    return dead;
}

GA_API double ga_sink_heads(const ga_statistics *s, size_t layer, double threshold) {
    gai_range layers = gai_range_of(layer, s->L);
    size_t sinks = 0;
    for (size_t l = layers.begin; l < layers.end; l++)
        for (size_t h = 0; h < s->HQ; h++) sinks += ga_f_attn_head(s, l, h) > threshold;
    return (double)sinks / (double)((layers.end - layers.begin) * s->HQ);
}

/* ---- details ----------------------------------------------------------------------------------------------------- */

/* Of a layer, or of all together. */
GAI_FN ga_magnitude_sums gai_magnitudes(const ga_statistics *s, ga_stage stage, size_t layer) {
    ga_magnitude_sums all;
    memset(&all, 0, sizeof all);
    for (size_t l = 0; s->has_details && l < s->L; l++) {
        const ga_magnitude_sums *g = &gai_fetch(s)->magnitudes[(size_t)stage * s->L + l];
        if (layer != GA_ALL && layer != l) continue;
        all.count += g->count;
        all.sum += g->sum;
        all.below_1e_2 += g->below_1e_2;
        all.below_1e_3 += g->below_1e_3;
    }
    return all;
}

GA_API double ga_output_magnitude(const ga_statistics *s, ga_stage stage, size_t layer) {
    ga_magnitude_sums g = gai_magnitudes(s, stage, layer);
    return g.count > 0 ? g.sum / g.count : (double)NAN;
}

GA_API double ga_output_below(const ga_statistics *s, ga_stage stage, size_t layer, double bound) {
    ga_magnitude_sums g = gai_magnitudes(s, stage, layer);
    if (!(g.count > 0)) return (double)NAN;
    if (bound == (double)1e-2) return g.below_1e_2 / g.count;
    return bound == (double)1e-3 ? g.below_1e_3 / g.count : (double)NAN;
}

GA_API ga_peak ga_activation_peak(const ga_statistics *s, ga_stream stream, size_t layer) {
    ga_peak none = {(double)NAN, 0, 0, -1};
    if (!s->has_details) return none;
    const ga_peak *peaks = gai_fetch(s)->peaks + (size_t)stream * s->L;
    size_t top = layer == GA_ALL ? 0 : layer;
    for (size_t l = 0; layer == GA_ALL && l < s->L; l++)
        if (gai_exceeds(peaks[l].value, peaks[top].value)) top = l;
    return peaks[top].token < 0 ? none : peaks[top];
}

GA_API double ga_activation_max(const ga_statistics *s, ga_stream stream, size_t layer) {
    if (layer != GA_ALL) return ga_activation_peak(s, stream, layer).value;
    double sum = 0;
    for (size_t l = 0; l < s->L; l++) sum += ga_activation_peak(s, stream, l).value;
    return sum / (double)s->L;
}

GA_API double ga_activation_max_at(const ga_statistics *s, ga_stream stream, size_t layer, size_t position) {
    const ga_sums *sums = s->sums;
    if (!s->has_details || position >= sums->T || sums->windows[position] == 0) return (double)NAN;
    return gai_fetch(s)->max_at[((size_t)stream * s->L + layer) * sums->T + position];
}

GA_API double ga_activation_max_in(const ga_statistics *s, ga_stream stream, size_t layer, size_t dimension) {
    const ga_sums *sums = s->sums;
    if (!s->has_details || dimension >= sums->C || sums->windows[0] == 0) return (double)NAN;
    return gai_fetch(s)->max_in[((size_t)stream * s->L + layer) * sums->C + dimension];
}

/* Mean of x (layers, heads) over the layers and heads that are asked for. */
GAI_FN double gai_mean_of_heads(const double *x, size_t layers, size_t heads, size_t stride, size_t layer,
                                size_t head) {
    double sum = 0;
    size_t count = 0;
    for (size_t i = 0; i < layers * heads; i++) {
        if ((layer != GA_ALL && i / heads != layer) || (head != GA_ALL && i % heads != head)) continue;
        sum += x[i * stride];
        count++;
    }
    return count ? sum / (double)count : (double)NAN;
}

GA_API double ga_attention_received(const ga_statistics *s, size_t layer, size_t head, size_t position) {
    const ga_sums *sums = s->sums;
    if (!s->has_details || position >= sums->T) return (double)NAN;
    return gai_mean_of_heads(gai_fetch(s)->received + position, s->L, s->HQ, sums->T, layer, head) /
           sums->queries[position];
}

GA_API size_t ga_sink_position(const ga_statistics *s, size_t layer, size_t head) {
    size_t T = 0, top = 0;
    while (s->has_details && T < s->sums->T && s->sums->windows[T] > 0) T++;
    for (size_t j = 1; j < (T + 1) / 2; j++)
        if (ga_attention_received(s, layer, head, j) > ga_attention_received(s, layer, head, top)) top = j;
    return top;
}

GA_API double ga_attention_entropy(const ga_statistics *s, size_t layer, size_t head) {
    if (!s->has_details) return (double)NAN;
    return gai_mean_of_heads(gai_fetch(s)->entropy, s->L, s->HQ, 1, layer, head) / s->rows;
}

GA_API double ga_entropy_uniform(size_t T) { /* mean of log(i + 1) over the queries i = 0 .. T-1 */
    double sum = 0;
    for (size_t i = T; i > 0; i--) sum += log((double)i);
    return sum / (double)T;
}

GAI_FN double gai_mean_norm(const ga_statistics *s, const double *norms, size_t layer, size_t head, size_t position) {
    if (!s->has_details) return (double)NAN;
    size_t T = s->sums->T, first = position == GA_ALL ? 1 : position, end = position == GA_ALL ? T : position + 1;
    double sum = 0, windows = 0;
    for (size_t j = first; j < end && j < T; j++) {
        sum += gai_mean_of_heads(norms + j, s->L, s->sums->HK, T, layer, head);
        windows += s->sums->windows[j];
    }
    return windows > 0 ? sum / windows : (double)NAN;
}

GA_API double ga_value_norm(const ga_statistics *s, size_t layer, size_t head, size_t position) {
    return gai_mean_norm(s, gai_fetch(s)->value_norm, layer, head, position);
}

GA_API double ga_key_norm(const ga_statistics *s, size_t layer, size_t head, size_t position) {
    return gai_mean_norm(s, gai_fetch(s)->key_norm, layer, head, position);
}

GA_API double ga_value_drain(const ga_statistics *s, size_t layer) {
    return ga_value_norm(s, layer, GA_ALL, 0) / ga_value_norm(s, layer, GA_ALL, GA_ALL);
}

GA_API double ga_key_drain(const ga_statistics *s, size_t layer) {
    return ga_key_norm(s, layer, GA_ALL, 0) / ga_key_norm(s, layer, GA_ALL, GA_ALL);
}

/* ---- Eq. 6: effective ranks, on the host and in double ----------------------------------------------------------- */

/* g (D, D) = a a^T, a: D rows of n values */
GAI_FN void gai_gram(double *g, const ga_real *a, size_t row_stride, size_t column_stride, size_t D, size_t n) {
    double column[GA_MAX_HEAD_DIM];
    memset(g, 0, D * D * sizeof *g);
    for (size_t c = 0; c < n; c++) {
        for (size_t i = 0; i < D; i++) column[i] = (double)a[i * row_stride + c * column_stride];
        for (size_t i = 0; i < D; i++)
            for (size_t j = 0; j < D; j++) g[i * D + j] += column[i] * column[j];
    }
}

/* Cholesky: g = l l^T in the lower triangle of g. A direction that g lacks, but for rounding, becomes a
 * column of zeros. */
GAI_FN void gai_cholesky(double *g, size_t D) {
    double largest = 0;
    for (size_t i = 0; i < D; i++) largest = fmax(largest, g[i * D + i]);
    for (size_t j = 0; j < D; j++) {
        double *gj = g + j * D, pivot = gj[j];
        for (size_t k = 0; k < j; k++) pivot -= gj[k] * gj[k];
        double root = pivot > 1e-14 * largest ? sqrt(pivot) : 0;
        for (size_t i = j; i < D; i++) {
            double *gi = g + i * D, sum = gi[j];
            for (size_t k = 0; k < j; k++) sum -= gi[k] * gj[k];
            gi[j] = root > 0 ? sum / root : 0;
        }
        gj[j] = root;
        for (size_t i = 0; i < j; i++) g[i * D + j] = 0;
    }
}

/* Jacobi's rotations: the symmetric matrix a (D, D) becomes diagonal, its eigenvalues. */
GAI_FN void gai_eigenvalues(double *a, size_t D) {
    for (size_t sweep = 0; sweep < 30; sweep++) {
        double off = 0, diagonal = 0;
        for (size_t i = 0; i < D; i++)
            for (size_t j = 0; j < D; j++) {
                double square = a[i * D + j] * a[i * D + j];
                if (i == j)
                    diagonal += square;
                else
                    off += square;
            }
        if (!(off > 1e-26 * diagonal)) return;
        for (size_t p = 0; p < D; p++)
            for (size_t q = p + 1; q < D; q++) {
                double apq = a[p * D + q];
                if (apq == 0) continue;
                double theta = (a[q * D + q] - a[p * D + p]) / (2 * apq);
                double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1)), c = 1 / sqrt(t * t + 1);
                double s = t * c;
                for (size_t k = 0; k < D; k++) {
                    double x = a[k * D + p], y = a[k * D + q];
                    a[k * D + p] = c * x - s * y;
                    a[k * D + q] = s * x + c * y;
                }
                for (size_t k = 0; k < D; k++) {
                    double x = a[p * D + k], y = a[q * D + k];
                    a[p * D + k] = c * x - s * y;
                    a[q * D + k] = s * x + c * y;
                }
            }
    }
}

/* Effective rank of a b, from left = a^T a and right = b b^T, both (D, D): the squares of the singular values of a b
 * are the eigenvalues of left right = l l^T right, and so of l^T right l. left and work (D, D) are overwritten. */
GAI_FN double gai_effective_rank(double *left, const double *right, double *work, size_t D) {
    double sum = 0, entropy = 0;
    gai_cholesky(left, D);
    for (size_t i = 0; i < D; i++)
        for (size_t j = 0; j < D; j++) {
            work[i * D + j] = 0;
            for (size_t k = j; k < D; k++) work[i * D + j] += right[i * D + k] * left[k * D + j];
        }
    for (size_t j = 0; j < D; j++) { /* column j of `work` becomes that of l^T right l: row i of l^T starts at i */
        double column[GA_MAX_HEAD_DIM];
        for (size_t i = 0; i < D; i++) column[i] = work[i * D + j];
        for (size_t i = 0; i < D; i++) {
            work[i * D + j] = 0;
            for (size_t k = i; k < D; k++) work[i * D + j] += left[k * D + i] * column[k];
        }
    }
    gai_eigenvalues(work, D);
    for (size_t i = 0; i < D; i++) sum += sqrt(fmax(0, work[i * D + i]));
    for (size_t i = 0; i < D; i++) {
        double p = sqrt(fmax(0, work[i * D + i])) / sum;
        if (p > 0) entropy -= p * log(p);
    }
    return sum > 0 ? exp(entropy) : (double)NAN;
}

/* What ga_measure_ranks has of a layer on the host. */
typedef struct {
    ga_real *value, *output; /* W_V (HK D, C), W_O (C, HQ D) */
    double *before, *after;  /* (HQ, D, D); NULL where there is none */
    double *work;            /* (HQ, 3, D, D) */
} gai_rank_layer;

GAI_FN void gai_rank_head(const ga_statistics *s, const gai_rank_layer *r, size_t l, size_t h) {
    const ga_sums *sums = s->sums;
    size_t D = sums->D, DD = D * D, C = sums->C, heads = s->L * s->HQ, at = l * s->HQ + h;
    double *left = r->work + 3 * h * DD, *right = left + DD, *rest = right + DD;
    gai_gram(right, r->output + h * D, 1, s->HQ * D, D, C);
    if (r->value) {
        gai_gram(left, r->value + h / (s->HQ / sums->HK) * D * C, C, 1, D, C);
        sums->ranks[GA_RANK_WEIGHTS * heads + at] = gai_effective_rank(left, right, rest, D);
    }
    sums->ranks[GA_RANK_BEFORE * heads + at] = gai_effective_rank(r->before + h * DD, right, rest, D);
    if (r->after) sums->ranks[GA_RANK_AFTER * heads + at] = gai_effective_rank(r->after + h * DD, right, rest, D);
}

GAI_FN void gai_rank_layer_of(const ga_statistics *s, ga_model *m, const gai_rank_layer *r, size_t l) {
    const gai_sum_fields *f = &s->sums->there;
    size_t C = s->sums->C, D = s->sums->D, moments = s->HQ * D * D;
    gai_parameters w = gai_weights(m, l);
    if (r->value) m->device.copy_out(m->device.state, r->value, w.value, s->sums->HK * D * C * sizeof *r->value);
    m->device.copy_out(m->device.state, r->output, w.attn_output, C * s->HQ * D * sizeof *r->output);
    m->device.copy_out(m->device.state, r->before, f->before + l * moments, moments * sizeof *r->before);
    if (r->after) m->device.copy_out(m->device.state, r->after, f->after + l * moments, moments * sizeof *r->after);
    GAI_PARALLEL_TASKS
    for (size_t h = 0; h < s->HQ; h++) gai_rank_head(s, r, l, h);
}

GA_API ga_result ga_measure_ranks(ga_statistics *s, ga_model *m, ga_error *e) {
    if (!s->has_details) return gai_fail(e, GA_ERR_INPUT, "effective ranks need detailed statistics");
    ga_sizes z = m->sizes;
    size_t values = z.HK * z.D * z.C, outputs = z.C * z.HQ * z.D, moments = z.HQ * z.D * z.D;
    bool has_value = z.R_value == 0, has_after = s->sums->there.after != NULL;
    ga_real *weights = (ga_real *)GA_MALLOC((values + outputs) * sizeof *weights);
    double *work = (double *)GA_MALLOC(5 * moments * sizeof *work);
    if (weights && work) {
        gai_rank_layer r = {has_value ? weights : NULL, weights + values, work, has_after ? work + moments : NULL,
                            work + 2 * moments};
        for (size_t l = 0; l < s->L; l++) gai_rank_layer_of(s, m, &r, l);
    }
    bool good = weights && work;
    GA_FREE(weights);
    GA_FREE(work);
    return good ? gai_status(m, e) : gai_fail(e, GA_ERR_MEMORY, "no memory for the effective ranks");
}

GA_API double ga_effective_rank(const ga_statistics *s, ga_rank rank, size_t layer, size_t head) {
    if (!s->has_details) return (double)NAN;
    return gai_mean_of_heads(s->sums->ranks + (size_t)rank * s->L * s->HQ, s->L, s->HQ, 1, layer, head);
}

/* ==== generation ================================================================================================== */

/* Keys after QK-norm and RoPE, and values, of all positions so far: (L, capacity, HK, D) each. */
struct ga_generator {
    ga_model *m;
    size_t capacity, length;
    ga_real *k, *v;
    ga_statistics *statistics; /* or NULL */
};

GA_API ga_generator *ga_generator_create(ga_model *m, size_t capacity, ga_error *e) {
    if (capacity == 0 || capacity > m->config.max_seq_len) {
        gai_fail(e, GA_ERR_INPUT, "a cache of %zu positions: the model has 1 to %zu", capacity, m->config.max_seq_len);
        return NULL;
    }
    uint64_t bytes = (uint64_t)m->sizes.L * capacity * m->sizes.HK * m->sizes.D * sizeof(ga_real);
    ga_generator *g = bytes <= SIZE_MAX ? (ga_generator *)gai_zeroed(sizeof *g) : NULL;
    if (g) {
        g->m = m;
        g->capacity = capacity;
        g->k = (ga_real *)m->device.allocate(m->device.state, (size_t)bytes);
        g->v = (ga_real *)m->device.allocate(m->device.state, (size_t)bytes);
        if (g->k && g->v) return g;
    }
    ga_generator_destroy(g);
    gai_fail(e, GA_ERR_MEMORY, "not enough memory for a cache of %zu positions: %.1f MB", capacity,
             2e-6 * (double)bytes);
    return NULL;
}

GA_API void ga_generator_destroy(ga_generator *g) {
    if (!g) return;
    if (g->k) g->m->device.release(g->m->device.state, g->k);
    if (g->v) g->m->device.release(g->m->device.state, g->v);
    GA_FREE(g);
}

GA_API void ga_generator_reset(ga_generator *g) {
    g->length = 0;
}

GA_API void ga_generator_observe(ga_generator *g, ga_statistics *s) {
    g->statistics = s;
}

/* At most max_seq_len tokens at a time, through the same layer pass as in training. */
GAI_FN ga_result gai_feed(ga_generator *g, const int32_t *tokens, size_t T, ga_error *e) {
    ga_model *m = g->m;
    ga_result result = gai_take_batch(m, tokens, NULL, 1, T, e);
    if (result != GA_OK) return result;
    size_t row = m->sizes.HK * m->sizes.D;
    gai_embed(m, T);
    for (size_t l = 0; l < m->sizes.L; l++) {
        ga_real *k = g->k + l * g->capacity * row, *v = g->v + l * g->capacity * row;
        gai_cache cache = {k + g->length * row, v + g->length * row, k, v, g->length};
        gai_parameters w = gai_weights(m, l);
        gai_layer_forward(m, &m->layers[l], &w, cache, gai_next_x(m, l), 1, T);
        if (g->statistics)
            gai_observe_statistics(m, g->statistics, &m->layers[l], &w, cache, gai_next_x(m, l), l, 1, T);
    }
    if (g->statistics) g->statistics->rows += (double)T;
    g->length += T;
    GAI_RUN(m, rmsnorm_forward, m->h_final, m->rstd_final, m->x_final, gai_weights(m, GA_ALL).final_norm, T, m->sizes.C,
            (ga_real)m->config.norm_eps);
    return gai_status(m, e);
}

GA_API ga_result ga_generator_feed(ga_generator *g, const int32_t *tokens, size_t n, ga_real *logits, ga_error *e) {
    if (n == 0 || n > g->capacity - g->length)
        return gai_fail(e, GA_ERR_INPUT, "%zu tokens do not fit: the cache holds %zu of %zu positions", n, g->length,
                        g->capacity);
    ga_result result = gai_feed(g, tokens, n, e);
    return result == GA_OK && logits ? ga_logits(g->m, n - 1, 1, logits, e) : result;
}

GAI_FN int32_t gai_argmax(const ga_real *x, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return (int32_t)best;
}

/* Probabilities in place of logits. */
GAI_FN void gai_softmax(ga_real *x, size_t n, double temperature) {
    ga_real top = x[gai_argmax(x, n)];
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        x[i] = gai_exp((ga_real)((double)(x[i] - top) / temperature));
        sum += (double)x[i];
    }
    for (size_t i = 0; i < n; i++) x[i] = (ga_real)((double)x[i] / sum);
}

/* The largest bound such that at least k values, and at least a mass of p, are not below it: bisection
 * over the bits. */
GAI_FN ga_real gai_cut(const ga_real *x, size_t n, size_t k, double p) {
    double low = 0, high = 1;
    for (int i = 0; i < 60; i++) {
        double middle = (low + high) / 2, mass = 0;
        size_t count = 0;
        for (size_t v = 0; v < n; v++)
            if ((double)x[v] >= middle) count++, mass += (double)x[v];
        if (count >= k && mass >= p)
            low = middle;
        else
            high = middle;
    }
    return (ga_real)low;
}

GA_API int32_t ga_sample(ga_real *logits, size_t V, ga_sampling s, uint64_t *random) {
    if (!(s.temperature > 0) || s.top_k == 1) return gai_argmax(logits, V);
    gai_softmax(logits, V, s.temperature);
    ga_real cut = 0;
    if (s.top_k > 0 && s.top_k < V) cut = gai_cut(logits, V, s.top_k, 0);
    double mass = 0, total = 0;
    for (size_t v = 0; v < V; v++) {
        if (logits[v] < cut) logits[v] = 0;
        mass += (double)logits[v];
    }
    if (s.top_p < 1) cut = gai_cut(logits, V, 1, s.top_p * mass);
    for (size_t v = 0; v < V; v++) {
        if (logits[v] < cut) logits[v] = 0;
        total += (double)logits[v];
    }
    double x = ga_random_uniform(random) * total;
    for (size_t v = 0; v < V; v++) {
        x -= (double)logits[v];
        if (x < 0) return (int32_t)v;
    }
    return gai_argmax(logits, V);
}

/* ==== checkpoints ====================================================================================================
 *
 * A directory as Hugging Face has it:
 *     config.json            the model's keys, in their names and in ours
 *     model.safetensors      the weights; other writers may spread them over shards, listed in *.index.json
 *     optimizer.safetensors  "moment1.<tensor>" and "moment2.<tensor>", always as the header keeps them in memory
 *     training_state.json    where the run stands; 64-bit numbers are strings, since JSON readers keep only 53 bits
 *
 * A safetensors file, all of it little-endian:
 *
 *     8 bytes     N, the length of the header
 *     N bytes     JSON, padded with spaces: {"__metadata__": {"format": "pt"},
 *                 "model.norm.weight": {"dtype": "F32", "shape": [512], "data_offsets": [begin, end]}, ...}
 *     the rest    the tensors, row-major, without holes; offsets count from the end of the header
 *
 * Files may come from anywhere. Every length and offset is checked against the file's size before it is used; memory is
 * bounded by the size of the files and of the model that config.json describes, and time by n log n.
 */

enum {
    GAI_PATH = 4096,
    GAI_STORED_NAME = 112,      /* "moment1." and ga_tensor.name */
    GAI_CHUNK = 1 << 17,        /* values of a tensor that are in host memory at one time */
    GAI_MAX_HEADER = 100000000, /* of a safetensors file, by its specification */
    GAI_MAX_JSON = 1 << 24,     /* bytes of any other JSON file */
    GAI_JSON_DEPTH = 64,
    GAI_MAX_SHARDS = 512,
    GAI_MAX_RANK = 4
};

/* ---- JSON -------------------------------------------------------------------------------------------------------- */

/* A cursor over JSON text, which is decoded where it lies. A value is a cursor at its first byte that ends with it. */
typedef struct {
    const char *path;
    ga_error *e;
    char *start, *at, *end;
} gai_json;

GAI_FN char gai_json_peek(const gai_json *j) {
    return j->at < j->end ? *j->at : '\0';
}

GAI_FN void gai_json_space(gai_json *j) {
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\n' || *j->at == '\r' || *j->at == '\t')) j->at++;
}

GAI_FN bool gai_json_take(gai_json *j, char c) {
    gai_json_space(j);
    if (j->at == j->end || *j->at != c) return false;
    j->at++;
    return true;
}

GAI_FN bool gai_json_hex4(gai_json *j, uint32_t *code) {
    static const char digits[] = "0123456789abcdefABCDEF";
    *code = 0;
    for (int i = 0; i < 4; i++) {
        char c = gai_json_peek(j);
        const char *digit = c != '\0' ? strchr(digits, c) : NULL;
        if (!digit) return false;
        size_t value = (size_t)(digit - digits);
        *code = *code * 16 + (uint32_t)(value < 16 ? value : value - 6);
        j->at++;
    }
    return true;
}

/* What follows a backslash. \u0000 is refused: it would cut a C string short. */
GAI_FN bool gai_json_escape(gai_json *j, uint32_t *code) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    char c = gai_json_peek(j);
    const char *simple = c != '\0' ? strchr(from, c) : NULL;
    j->at += c != '\0';
    if (simple != NULL) {
        *code = (uint32_t)to[simple - from];
        return true;
    }
    if (c != 'u' || !gai_json_hex4(j, code) || *code == 0) return false;
    if (*code < 0xD800 || *code > 0xDFFF) return true;
    uint32_t low;
    if (*code > 0xDBFF || gai_json_peek(j) != '\\') return false;
    j->at++;
    if (gai_json_peek(j) != 'u') return false;
    j->at++;
    if (!gai_json_hex4(j, &low) || low < 0xDC00 || low > 0xDFFF) return false;
    *code = 0x10000 + ((*code - 0xD800) << 10) + (low - 0xDC00);
    return true;
}

GAI_FN char *gai_utf8(char *out, uint32_t code) {
    int tail = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const unsigned char lead[] = {0, 0xC0, 0xE0, 0xF0};
    *out++ = (char)(lead[tail] | (code >> (6 * tail)));
    while (tail-- > 0) *out++ = (char)(0x80 | ((code >> (6 * tail)) & 0x3F));
    return out;
}

/* With `text` the string is decoded in place: an escape is never shorter than what it stands for. */
GAI_FN bool gai_json_string(gai_json *j, char **text) {
    if (!gai_json_take(j, '"')) return false;
    char *out = j->at;
    if (text != NULL) *text = out;
    for (;;) {
        char c = gai_json_peek(j);
        if ((unsigned char)c < 0x20) return false;
        j->at++;
        if (c == '"') break;
        uint32_t code = 0;
        if (c == '\\' && !gai_json_escape(j, &code)) return false;
        if (!text) continue;
        if (c == '\\')
            out = gai_utf8(out, code);
        else
            *out++ = c;
    }
    if (text != NULL) *out = '\0';
    return true;
}

GAI_FN bool gai_json_digits(gai_json *j) {
    const char *first = j->at;
    while (gai_json_peek(j) >= '0' && gai_json_peek(j) <= '9') j->at++;
    return j->at > first;
}

GAI_FN bool gai_json_number(gai_json *j) {
    if (gai_json_peek(j) == '-') j->at++;
    if (gai_json_peek(j) == '0')
        j->at++;
    else if (!gai_json_digits(j))
        return false;
    if (gai_json_peek(j) == '.') {
        j->at++;
        if (!gai_json_digits(j)) return false;
    }
    if (gai_json_peek(j) != 'e' && gai_json_peek(j) != 'E') return true;
    j->at++;
    if (gai_json_peek(j) == '+' || gai_json_peek(j) == '-') j->at++;
    return gai_json_digits(j);
}

GAI_FN bool gai_json_word(gai_json *j, const char *word) {
    size_t n = strlen(word);
    if ((size_t)(j->end - j->at) < n || memcmp(j->at, word, n) != 0) return false;
    j->at += n;
    return true;
}

GAI_FN bool gai_json_scalar(gai_json *j) {
    char c = gai_json_peek(j);
    if (c == '"') return gai_json_string(j, NULL);
    if (c == 't') return gai_json_word(j, "true");
    if (c == 'f') return gai_json_word(j, "false");
    if (c == 'n') return gai_json_word(j, "null");
    return gai_json_number(j);
}

/* Passes over one value of any kind and checks its syntax. One bit a level (1: object) in place of recursion. */
GAI_FN bool gai_json_skip(gai_json *j) {
    uint64_t objects = 0;
    int depth = 0;
    for (;;) {
        gai_json_space(j);
        char c = gai_json_peek(j);
        bool opens = c == '{' || c == '[';
        if (opens) {
            if (depth == GAI_JSON_DEPTH) return false;
            j->at++;
            depth++;
            objects = objects << 1 | (c == '{');
        } else if (!gai_json_scalar(j)) {
            return false;
        }
        while (depth > 0 && gai_json_take(j, objects & 1 ? '}' : ']')) {
            depth--;
            objects >>= 1;
            opens = false;
        }
        if (depth == 0) return true;
        if (!opens && !gai_json_take(j, ',')) return false;
        if ((objects & 1) && (!gai_json_string(j, NULL) || !gai_json_take(j, ':'))) return false;
    }
}

/* Opens a text of n bytes, with a zero byte behind them, that must be one object. */
GAI_FN ga_result gai_json_open(gai_json *j, const char *path, char *text, size_t n, ga_error *e) {
    gai_json all = {path, e, text, text, text + n};
    bool good = gai_json_skip(&all);
    gai_json_space(&all);
    if (!good || all.at != all.end)
        return gai_fail(e, GA_ERR_FORMAT, "%s: no valid JSON at byte %zu", path, (size_t)(all.at - text));
    *j = all;
    j->at = text;
    gai_json_space(j);
    if (*j->at != '{') return gai_fail(e, GA_ERR_FORMAT, "%s: holds no JSON object", path);
    return GA_OK;
}

/* The next member of an object, or with key NULL the next element of an array, whose syntax is known to be right. *j is
 * at the opening bracket the first time. false: there are no more. */
GAI_FN bool gai_json_next(gai_json *j, char **key, gai_json *value) {
    gai_json_space(j);
    char c = gai_json_peek(j);
    if (c != ',' && c != (key != NULL ? '{' : '[')) return false;
    j->at++;
    if (c != ',' && gai_json_take(j, key != NULL ? '}' : ']')) return false;
    if (key != NULL && (!gai_json_string(j, key) || !gai_json_take(j, ':'))) return false;
    gai_json_space(j);
    *value = *j;
    if (!gai_json_skip(j)) return false;
    value->end = j->at;
    return true;
}

/* Text of a file in a message: it must not break the line. */
GAI_FN const char *gai_printable(const char *text) {
    for (const char *p = text; *p != '\0'; p++)
        if (*p < 0x20 || *p > 0x7E) return "(not ASCII)";
    return text;
}

/* Whether a value stands in the file exactly like this; one that is not there is like nothing. */
GAI_FN bool gai_json_is(const gai_json *value, const char *text) {
    size_t n = strlen(text);
    return value->at && (size_t)(value->end - value->at) == n && memcmp(value->at, text, n) == 0;
}

/* The values of an object's members `names`; one that is not there, or null, has at = NULL. Other members are passed
 * over, or refused where the object is `closed`. */
GAI_FN ga_result gai_json_members(gai_json object, const char *const *names, size_t n, gai_json *values, bool closed) {
    if (gai_json_peek(&object) != '{')
        return gai_fail(object.e, GA_ERR_FORMAT, "%s: an object is missing at byte %zu", object.path,
                        (size_t)(object.at - object.start));
    char *key;
    gai_json value;
    for (size_t i = 0; i < n; i++) memset(&values[i], 0, sizeof values[i]);
    while (gai_json_next(&object, &key, &value)) {
        size_t i = 0;
        while (i < n && strcmp(key, names[i]) != 0) i++;
        if (i == n && closed)
            return gai_fail(object.e, GA_ERR_FORMAT, "%s: unknown key \"%.64s\"", object.path, gai_printable(key));
        if (i == n) continue;
        if (values[i].start) return gai_fail(object.e, GA_ERR_FORMAT, "%s: %s stands twice", object.path, names[i]);
        values[i] = value;
        if (gai_json_is(&value, "null")) values[i].at = NULL;
    }
    return GA_OK;
}

GAI_FN bool gai_parse_u64(const char *text, const char *end, uint64_t *number) {
    *number = 0;
    for (const char *p = text; p < end; p++) {
        uint64_t digit = (uint64_t)(unsigned char)*p - '0';
        if (digit > 9 || *number > (UINT64_MAX - digit) / 10) return false;
        *number = *number * 10 + digit;
    }
    return end > text;
}

/* ---- files ------------------------------------------------------------------------------------------------------- */

GAI_FN ga_result gai_file_error(ga_error *e, const char *what, const char *path) {
    return gai_fail(e, GA_ERR_FILE, "%s: cannot %s: %s", path, what, strerror(errno));
}

/* directory + separator + name */
GAI_FN ga_result gai_path(char path[GAI_PATH], const char *directory, const char *separator, const char *name,
                          ga_error *e) {
    int n = snprintf(path, GAI_PATH, "%s%s%s", directory, separator, name);
    if (n < 0 || n >= GAI_PATH) return gai_fail(e, GA_ERR_FILE, "%.128s...: the path is too long", directory);
    return GA_OK;
}

GAI_FN bool gai_exists(const char *path) {
    struct stat s;
    return stat(path, &s) == 0;
}

/* stat before fopen, which would wait for the other end of a pipe. */
GAI_FN ga_result gai_open(const char *path, FILE **file, uint64_t *size, ga_error *e) {
    struct stat s;
    if (stat(path, &s) != 0) return gai_file_error(e, "open", path);
    if (!S_ISREG(s.st_mode)) return gai_fail(e, GA_ERR_FILE, "%s: is not a regular file", path);
    *file = fopen(path, "rb");
    if (!*file) return gai_file_error(e, "open", path);
    *size = (uint64_t)s.st_size;
    return GA_OK;
}

/* The next n bytes and a zero byte behind them. *text is to be freed, also on failure. */
GAI_FN ga_result gai_read_text(FILE *file, const char *path, size_t n, char **text, ga_error *e) {
    *text = (char *)GA_MALLOC(n + 1);
    if (!*text) return gai_fail(e, GA_ERR_MEMORY, "%s: no memory for %zu bytes", path, n);
    if (fread(*text, 1, n, file) != n) return gai_fail(e, GA_ERR_FORMAT, "%s: ends early", path);
    (*text)[n] = '\0';
    return GA_OK;
}

/* A JSON file as a whole. *text is to be freed, also on failure. */
GAI_FN ga_result gai_json_load(gai_json *j, const char *path, char **text, ga_error *e) {
    FILE *file;
    uint64_t size;
    *text = NULL;
    ga_result result = gai_open(path, &file, &size, e);
    if (result != GA_OK) return result;
    if (size > GAI_MAX_JSON)
        result = gai_fail(e, GA_ERR_FORMAT, "%s: is larger than %d bytes", path, (int)GAI_MAX_JSON);
    if (result == GA_OK) result = gai_read_text(file, path, (size_t)size, text, e);
    if (result == GA_OK) result = gai_json_open(j, path, *text, (size_t)size, e);
    fclose(file);
    return result;
}

/* Text that grows inside a buffer whose size was computed beforehand. */
typedef struct {
    char *text;
    size_t used, size;
} gai_text;

GAI_PRINTF(2, 3) GAI_FN void gai_print(gai_text *t, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(t->text + t->used, t->size - t->used, format, arguments);
    va_end(arguments);
    if (n > 0) t->used = (size_t)n < t->size - t->used ? t->used + (size_t)n : t->size - 1;
}

GAI_FN ga_result gai_create_file(const char *path, FILE **file, ga_error *e) {
    *file = fopen(path, "wb");
    return *file != NULL ? GA_OK : gai_file_error(e, "create", path);
}

GAI_FN ga_result gai_put(FILE *file, const char *path, const void *data, size_t n, ga_error *e) {
    return fwrite(data, 1, n, file) == n ? GA_OK : gai_file_error(e, "write", path);
}

/* Closes a file that was written with the result `result`; it is safe on the disk when this returns GA_OK. */
GAI_FN ga_result gai_close_file(FILE *file, const char *path, ga_result result, ga_error *e) {
    if (result == GA_OK && (fflush(file) != 0 || gai_sync(file) != 0)) result = gai_file_error(e, "write", path);
    if (fclose(file) != 0 && result == GA_OK) result = gai_file_error(e, "write", path);
    return result;
}

GAI_FN ga_result gai_write_file(const char *path, const gai_text *t, ga_error *e) {
    FILE *file;
    if (t->used + 1 == t->size)
        return gai_fail(e, GA_ERR_MEMORY, "%s: the text is longer than %zu bytes", path, t->size);
    ga_result result = gai_create_file(path, &file, e);
    if (result != GA_OK) return result;
    return gai_close_file(file, path, gai_put(file, path, t->text, t->used, e), e);
}

GAI_FN ga_result gai_sync_directory(const char *path, ga_error *e) {
    return gai_sync_folder(path) == 0 ? GA_OK : gai_file_error(e, "write", path);
}

/* ---- what is stored, and where the gate is ----------------------------------------------------------------------- */

/* The released models keep the gate inside q_proj. With R = n_heads / n_kv_heads query heads to a group, its rows are
 *
 *     group 0                           group 1
 *     +------------------+------------+------------------+------------+----
 *     | queries of heads | gates of   | queries of heads | gates of   | ...      elementwise: R * D gate rows
 *     | 0 .. R-1: R * D  | the same   | R .. 2R-1: R * D | the same   |          headwise:    R gate rows
 *     +------------------+------------+------------------+------------+----
 *
 * while ours are two tensors, each with its heads in order. That form can say G1, head-specific, multiplicative,
 * sigmoid, computed from X; any other gate stays a tensor of its own.
 *
 * Qwen3-Next has the gate by head, [queries of head 0: D | gates: D | queries of head 1 ...], stores w - 1 for the
 * weight w of a norm, and pairs dimension i < R with i + R when RoPE turns the first 2R of D dimensions, while
 * ours pairs i with i + D/2 always. Queries and keys may have their dimensions in any order, if it is the same:
 * reading, the pieces
 *
 *     file      0 .. R     R .. 2R        2R .. R + D/2   R + D/2 .. D
 *     becomes   0 .. R     D/2 .. D/2+R   R .. D/2        D/2+R .. D
 *
 * go to where our pairs are. */
typedef enum {
    GAI_GATE_APART,    /* the gate in a tensor of its own, or none */
    GAI_GATE_BY_GROUP, /* q_proj holds it, as the released models have it */
    GAI_GATE_BY_HEAD   /* Qwen3-Next; only read */
} gai_layout;

GAI_FN bool gai_gate_is_packed(const ga_config *c) {
    return c->gate_position == GA_G1 && c->gate_sharing == GA_SPECIFIC && c->gate_form == GA_MULTIPLICATIVE &&
           c->gate_activation == GA_SIGMOID && c->gate_input == GA_INPUT_QUERY && c->gate_input_dims == 0;
}

/* What a safetensors file holds: the tensors of each block, their names behind the block's prefix. */
typedef struct {
    const char *prefixes[2];
    ga_real *blocks[2];
    /* Where the blocks are spread over the ranks: what this one has; the block is only room for all. */
    ga_real *shares[2];
    size_t n_blocks;
    gai_layout layout;
} gai_contents;

GAI_FN gai_contents gai_weights_of(const ga_model *m) {
    gai_layout layout = gai_gate_is_packed(&m->config) ? GAI_GATE_BY_GROUP : GAI_GATE_APART;
    gai_contents c = {{"", NULL}, {m->weights, NULL}, {NULL, NULL}, 1, layout};
    return c;
}

/* Between two steps the gradients are zero: their block is where the moments of all ranks come together. */
GAI_FN gai_contents gai_moments_of(const ga_model *m) {
    gai_contents c = {{"moment1.", "moment2."}, {m->moment1, m->moment2}, {NULL, NULL}, 2, GAI_GATE_APART};
    for (size_t i = 0; gai_ranks(m) && i < 2; i++) {
        c.shares[i] = c.blocks[i];
        c.blocks[i] = m->gradients;
    }
    return c;
}

/* From each rank's share to the whole block, or from that to the rank's own share. A sum with zeros serves as a copy
 * on the device. */
GAI_FN void gai_gather_shares(ga_model *m, ga_real *block, const ga_real *shares) {
    gai_clear_gradients(m);
    for (size_t b = 0; b < m->n_buckets; b++) {
        gai_share s = gai_share_of(m, b);
        GAI_RUN(m, add, block + s.begin, block + s.begin, shares + s.moment, s.values);
        gai_gather_bucket(m, block, b);
    }
    gai_ranks(m)->wait(gai_ranks(m)->state);
}

GAI_FN void gai_take_shares(ga_model *m, ga_real *shares, const ga_real *block) {
    for (size_t b = 0; b < m->n_buckets; b++) {
        gai_share s = gai_share_of(m, b);
        m->device.zero(m->device.state, shares + s.moment, s.values * sizeof(ga_real));
        GAI_RUN(m, add, shares + s.moment, shares + s.moment, block + s.begin, s.values);
    }
}

typedef struct {
    const ga_tensor *tensor;
    ga_real *block;
    bool packed; /* q_proj with the gate inside */
    gai_layout layout;
    ga_real shift; /* what is added to each value that is read */
    char name[GAI_STORED_NAME];
    size_t rank;
    uint64_t shape[2];
    uint64_t values;
} gai_stored;

GAI_FN size_t gai_stored_count(const ga_model *m, const gai_contents *c) {
    return c->n_blocks * m->n_tensors;
}

/* Stored tensor i; false: it lies inside another one. */
GAI_FN bool gai_stored_tensor(const ga_model *m, const gai_contents *c, size_t i, gai_stored *s) {
    size_t block = i / m->n_tensors;
    const ga_tensor *t = &m->tensors[i % m->n_tensors];
    if (c->layout != GAI_GATE_APART && t->id == GA_TENSOR_gate_weight) return false;
    s->tensor = t;
    s->block = c->blocks[block];
    s->packed = c->layout != GAI_GATE_APART && t->id == GA_TENSOR_query;
    s->layout = c->layout;
    s->shift = c->layout == GAI_GATE_BY_HEAD && t->start == GA_START_ONES;
    snprintf(s->name, sizeof s->name, "%s%s", c->prefixes[block], t->name);
    size_t rows = t->rows + (s->packed ? m->sizes.G : 0);
    s->rank = t->start == GA_START_ONES || t->id == GA_TENSOR_sinks ? 1 : 2;
    s->shape[0] = s->rank == 1 ? t->columns : rows;
    s->shape[1] = t->columns;
    s->values = rows * t->columns;
    return true;
}

/* The same for Qwen3-Next's queries, keys and their norms: four pieces of each head, and a fifth for the head's
 * gates. */
GAI_FN bool gai_stored_run_by_head(const ga_model *m, const gai_stored *s, size_t k, ga_real **values, size_t *n) {
    const ga_tensor *t = s->tensor;
    size_t D = m->sizes.D, R = gai_rotary_pairs(&m->config), heads = t->rows * t->columns / D, unit = 1;
    if (t->rows > 1) {
        heads = t->rows / D;
        unit = t->columns;
    }
    const size_t begin[] = {0, D / 2, R, D / 2 + R}, end[] = {R, D / 2 + R, D / 2, D};
    size_t pieces = s->packed ? 5 : 4, head = k / pieces, piece = k % pieces;
    if (head >= heads) return false;
    if (piece == 4) {
        t = ga_find_tensor(m, GA_TENSOR_gate_weight, t->layer);
        *values = s->block + t->offset + head * D * unit;
        *n = D * unit;
        return true;
    }
    *values = s->block + t->offset + (head * D + begin[piece]) * unit;
    *n = (end[piece] - begin[piece]) * unit;
    return true;
}

/* Run k, from 0, of values that follow each other both in the file and in memory; false: there are no more. */
GAI_FN bool gai_stored_run(const ga_model *m, const gai_stored *s, size_t k, ga_real **values, size_t *n) {
    const ga_tensor *t = s->tensor;
    size_t groups = 1;
    bool of_heads = t->id == GA_TENSOR_query || t->id == GA_TENSOR_key || t->id == GA_TENSOR_query_norm ||
                    t->id == GA_TENSOR_key_norm;
    if (s->layout == GAI_GATE_BY_HEAD && of_heads) return gai_stored_run_by_head(m, s, k, values, n);
    if (s->packed) {
        groups = m->sizes.HK;
        if (k % 2 == 1) t = ga_find_tensor(m, GA_TENSOR_gate_weight, t->layer);
        k /= 2;
    }
    if (k >= groups) return false;
    *n = t->rows / groups * t->columns;
    *values = s->block + t->offset + k * *n;
    return true;
}

/* ---- safetensors: numbers ---------------------------------------------------------------------------------------- */

typedef enum { GAI_F64, GAI_F32, GAI_F16, GAI_BF16, GAI_DTYPES } gai_dtype;

GAI_FN const char *gai_dtype_name(int type) {
    static const char *const names[] = {"F64", "F32", "F16", "BF16"};
    return names[type];
}

GAI_FN size_t gai_dtype_size(gai_dtype type) {
    static const size_t sizes[] = {8, 4, 2, 2};
    return sizes[type];
}

/* Little-endian bytes, whatever this machine has. */
GAI_INLINE uint64_t gai_get_bytes(const unsigned char *p, size_t n) {
    uint64_t bits = 0;
    for (size_t i = 0; i < n; i++) bits |= (uint64_t)p[i] << (8 * i);
    return bits;
}

GAI_FN void gai_put_bytes(unsigned char *p, uint64_t bits, size_t n) {
    for (size_t i = 0; i < n; i++) p[i] = (unsigned char)(bits >> (8 * i));
}

GAI_INLINE float gai_float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

GAI_INLINE double gai_double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* 1 sign, 5 exponent, 10 fraction bits, moved to where a float has them; 2^112 is the difference of the exponents'
 * biases, and makes a subnormal half a normal float. Exponent 31: infinity or NaN. */
GAI_INLINE float gai_half_of(uint32_t h) {
    float size = gai_float_of((h & 0x7FFF) << 13) * 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &size, sizeof bits);
    bits |= (h & 0x8000) << 16 | ((h & 0x7C00) == 0x7C00 ? 0x7F800000 : 0);
    return gai_float_of(bits);
}

/* n values of a file, plus `shift`. One loop for each type, without a branch inside: the compiler makes
 * vectors of it. */
GAI_FN void gai_decode(ga_real *to, const unsigned char *p, size_t n, gai_dtype type, ga_real shift) {
    if (type == GAI_F32)
        for (size_t i = 0; i < n; i++) to[i] = (ga_real)gai_float_of((uint32_t)gai_get_bytes(p + 4 * i, 4));
    else if (type == GAI_BF16)
        for (size_t i = 0; i < n; i++) to[i] = (ga_real)gai_float_of((uint32_t)gai_get_bytes(p + 2 * i, 2) << 16);
    else if (type == GAI_F16)
        for (size_t i = 0; i < n; i++) to[i] = (ga_real)gai_half_of((uint32_t)gai_get_bytes(p + 2 * i, 2));
    else
        for (size_t i = 0; i < n; i++) to[i] = (ga_real)gai_double_of(gai_get_bytes(p + 8 * i, 8));
    if (shift == 0) return;
    for (size_t i = 0; i < n; i++) to[i] += shift;
}

/* What this build writes: its own values, nothing lost. */
GAI_FN gai_dtype gai_own_dtype(void) {
    return sizeof(ga_real) == 8 ? GAI_F64 : GAI_F32;
}

GAI_FN void gai_encode(unsigned char *p, ga_real x) {
#ifdef GA_DOUBLE
    uint64_t bits;
#else
    uint32_t bits;
#endif
    memcpy(&bits, &x, sizeof bits);
    gai_put_bytes(p, bits, sizeof bits);
}

/* Moves values between a file and the device, a chunk at a time. */
typedef struct {
    ga_model *m;
    FILE *file;
    const char *path;
    unsigned char *bytes; /* GAI_CHUNK values of 8 bytes */
    ga_real *values;      /* GAI_CHUNK */
    ga_error *e;
} gai_stream;

GAI_FN ga_result gai_stream_create(gai_stream *s, ga_model *m, ga_error *e) {
    s->m = m;
    s->file = NULL;
    s->path = NULL;
    s->e = e;
    s->bytes = (unsigned char *)GA_MALLOC((size_t)GAI_CHUNK * 8);
    s->values = (ga_real *)GA_MALLOC((size_t)GAI_CHUNK * sizeof(ga_real));
    if (s->bytes && s->values) return GA_OK;
    return gai_fail(e, GA_ERR_MEMORY, "no memory for the buffers of a checkpoint");
}

GAI_FN void gai_stream_destroy(gai_stream *s) {
    if (s->file) fclose(s->file);
    GA_FREE(s->bytes);
    GA_FREE(s->values);
}

GAI_FN ga_result gai_stream_write(gai_stream *s, const ga_real *from, size_t n) {
    while (n > 0) {
        size_t some = gai_min(n, GAI_CHUNK);
        s->m->device.copy_out(s->m->device.state, s->values, from, some * sizeof(ga_real));
        for (size_t i = 0; i < some; i++) gai_encode(s->bytes + i * sizeof(ga_real), s->values[i]);
        ga_result result = gai_put(s->file, s->path, s->bytes, some * sizeof(ga_real), s->e);
        if (result != GA_OK) return result;
        from += some;
        n -= some;
    }
    return GA_OK;
}

/* Goes to a place in a file, which is opened unless it is the one that is open. `path` must live as long. */
GAI_FN ga_result gai_stream_seek(gai_stream *s, const char *path, uint64_t at) {
    if (path != s->path) {
        if (s->file) fclose(s->file);
        s->path = path;
        s->file = fopen(path, "rb");
        if (!s->file) return gai_file_error(s->e, "open", path);
    }
    return fseeko(s->file, (off_t)at, SEEK_SET) == 0 ? GA_OK : gai_file_error(s->e, "read", path);
}

GAI_FN ga_result gai_stream_bytes(gai_stream *s, unsigned char *bytes, size_t n) {
    if (fread(bytes, 1, n, s->file) == n) return GA_OK;
    return gai_fail(s->e, GA_ERR_FILE, "%s: ended while it was read", s->path);
}

GAI_FN ga_result gai_stream_read(gai_stream *s, ga_real *to, size_t n, gai_dtype type, ga_real shift) {
    size_t size = gai_dtype_size(type);
    while (n > 0) {
        size_t some = gai_min(n, GAI_CHUNK);
        ga_result result = gai_stream_bytes(s, s->bytes, some * size);
        if (result != GA_OK) return result;
        gai_decode(s->values, s->bytes, some, type, shift);
        s->m->device.copy_in(s->m->device.state, to, s->values, some * sizeof(ga_real));
        to += some;
        n -= some;
    }
    return GA_OK;
}

/* ---- safetensors: reading ---------------------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    gai_dtype type;
    size_t rank;
    uint64_t shape[GAI_MAX_RANK];
    uint64_t begin, end; /* from the start of the file */
    bool used, listed;   /* belongs to the model; named by the index */
} gai_entry;

/* One file; `entries` are sorted by name, and names lie in `header`. */
typedef struct {
    char path[GAI_PATH];
    char *header;
    gai_entry *entries;
    size_t n;
    uint64_t size;
    unsigned char *bytes; /* GA_MAPPED: the whole of it, */
    bool read;            /* read where it could not be mapped */
} gai_tensor_file;

/* model.safetensors, or its shards; optimizer.safetensors. */
typedef struct {
    gai_tensor_file *files;
    size_t n;
    char *index; /* text of the index */
    ga_error *e;
} gai_tensor_files;

enum { GAI_SHAPE_TEXT = 96 };

GAI_FN void gai_shape_text(char text[GAI_SHAPE_TEXT], size_t rank, const uint64_t *shape) {
    gai_text t = {text, 0, GAI_SHAPE_TEXT};
    gai_print(&t, "[");
    for (size_t i = 0; i < rank; i++) gai_print(&t, i > 0 ? ",%llu" : "%llu", (unsigned long long)shape[i]);
    gai_print(&t, "]");
}

GAI_FN ga_result gai_bad_tensor(const gai_tensor_file *f, const char *name, const char *what, ga_error *e) {
    return gai_fail(e, GA_ERR_FORMAT, "%s: tensor %.96s: %s", f->path, gai_printable(name), what);
}

/* An array of at most `most` whole numbers. */
GAI_FN bool gai_parse_array(gai_json array, uint64_t *numbers, size_t most, size_t *n) {
    gai_json item;
    if (gai_json_peek(&array) != '[') return false;
    for (*n = 0; gai_json_next(&array, NULL, &item); ++*n)
        if (*n == most || !gai_parse_u64(item.at, item.end, &numbers[*n])) return false;
    return true;
}

GAI_FN bool gai_parse_shape(gai_json array, gai_entry *t, uint64_t *values) {
    if (!gai_parse_array(array, t->shape, GAI_MAX_RANK, &t->rank)) return false;
    *values = 1;
    for (size_t i = 0; i < t->rank; i++) {
        if (t->shape[i] != 0 && *values > SIZE_MAX / t->shape[i]) return false;
        *values *= t->shape[i];
    }
    return true;
}

GAI_FN ga_result gai_parse_entry(const gai_tensor_file *f, gai_entry *t, gai_json object, uint64_t data_size) {
    static const char *const names[] = {"dtype", "shape", "data_offsets"};
    gai_json values[3];
    ga_error *e = object.e;
    char *type;
    uint64_t count, offsets[2];
    size_t n;
    ga_result result = gai_json_members(object, names, 3, values, false);
    if (result != GA_OK) return result;
    for (int i = 0; i < 3; i++)
        if (!values[i].at)
            return gai_fail(e, GA_ERR_FORMAT, "%s: tensor %.96s: has no %s", f->path, gai_printable(t->name), names[i]);
    if (!gai_json_string(&values[0], &type)) return gai_bad_tensor(f, t->name, "dtype is no string", e);
    int k = 0;
    while (k < GAI_DTYPES && strcmp(type, gai_dtype_name(k)) != 0) k++;
    if (k == GAI_DTYPES)
        return gai_fail(e, GA_ERR_FORMAT, "%s: tensor %.96s: dtype %.16s is none of F32, BF16, F16, F64", f->path,
                        gai_printable(t->name), gai_printable(type));
    t->type = (gai_dtype)k;
    if (!gai_parse_shape(values[1], t, &count)) return gai_bad_tensor(f, t->name, "shape is not usable", e);
    if (!gai_parse_array(values[2], offsets, 2, &n) || n != 2)
        return gai_bad_tensor(f, t->name, "data_offsets are not usable", e);
    t->begin = offsets[0];
    t->end = offsets[1];
    if (t->begin > t->end) return gai_bad_tensor(f, t->name, "data_offsets are out of order", e);
    if (t->end > data_size) return gai_bad_tensor(f, t->name, "data_offsets are beyond the end of the file", e);
    uint64_t bytes = t->end - t->begin, size = gai_dtype_size(t->type);
    if (bytes % size != 0 || bytes / size != count)
        return gai_bad_tensor(f, t->name, "shape and data_offsets differ in length", e);
    return GA_OK;
}

GAI_FN int gai_by_offset(const void *a, const void *b) {
    const gai_entry *x = (const gai_entry *)a, *y = (const gai_entry *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

GAI_FN int gai_by_name(const void *a, const void *b) {
    return strcmp(((const gai_entry *)a)->name, ((const gai_entry *)b)->name);
}

/* Offsets become those in the file; the entries are left in the order of their names. */
GAI_FN ga_result gai_check_layout(gai_tensor_file *f, uint64_t data, uint64_t data_size, ga_error *e) {
    uint64_t at = 0;
    qsort(f->entries, f->n, sizeof *f->entries, gai_by_offset);
    for (size_t i = 0; i < f->n; i++) {
        gai_entry *t = &f->entries[i];
        if (t->begin < at) return gai_bad_tensor(f, t->name, "overlaps another tensor", e);
        if (t->begin > at) return gai_bad_tensor(f, t->name, "there is a hole before it", e);
        at = t->end;
        t->begin += data;
        t->end += data;
    }
    if (at != data_size) return gai_fail(e, GA_ERR_FORMAT, "%s: bytes follow the last tensor", f->path);
    qsort(f->entries, f->n, sizeof *f->entries, gai_by_name);
    for (size_t i = 1; i < f->n; i++)
        if (strcmp(f->entries[i - 1].name, f->entries[i].name) == 0)
            return gai_bad_tensor(f, f->entries[i].name, "stands twice", e);
    return GA_OK;
}

GAI_FN ga_result gai_parse_header(gai_tensor_file *f, size_t length, uint64_t data_size, ga_error *e) {
    gai_json j, value;
    char *name;
    ga_result result = gai_json_open(&j, f->path, f->header, length, e);
    if (result != GA_OK) return result;
    static const char shortest[] = "\"\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,0]}";
    size_t most = length / (sizeof shortest - 1) + 1;
    f->entries = (gai_entry *)GA_MALLOC(most * sizeof *f->entries);
    if (!f->entries) return gai_fail(e, GA_ERR_MEMORY, "%s: no memory for its header", f->path);
    while (gai_json_next(&j, &name, &value)) {
        if (strcmp(name, "__metadata__") == 0) {
            if (gai_json_peek(&value) == '{') continue;
            return gai_fail(e, GA_ERR_FORMAT, "%s: __metadata__ is no object", f->path);
        }
        gai_entry *t = &f->entries[f->n];
        memset(t, 0, sizeof *t);
        t->name = name;
        result = gai_parse_entry(f, t, value, data_size);
        if (result != GA_OK) return result;
        f->n++;
    }
    return gai_check_layout(f, 8 + length, data_size, e);
}

GAI_FN ga_result gai_read_header(gai_tensor_file *f, FILE *file, uint64_t size, ga_error *e) {
    unsigned char prefix[8];
    if (size < sizeof prefix || fread(prefix, 1, sizeof prefix, file) != sizeof prefix)
        return gai_fail(e, GA_ERR_FORMAT, "%s: is too short for a safetensors file", f->path);
    uint64_t length = gai_get_bytes(prefix, sizeof prefix);
    if (length > GAI_MAX_HEADER || length > size - sizeof prefix)
        return gai_fail(e, GA_ERR_FORMAT, "%s: says that its header has %llu bytes, which is too long", f->path,
                        (unsigned long long)length);
    ga_result result = gai_read_text(file, f->path, (size_t)length, &f->header, e);
    if (result != GA_OK) return result;
    return gai_parse_header(f, (size_t)length, size - sizeof prefix - length, e);
}

GAI_FN ga_result gai_add_file(gai_tensor_files *all, const char *path) {
    FILE *file;
    uint64_t size;
    ga_result result = gai_open(path, &file, &size, all->e);
    if (result != GA_OK) return result;
    gai_tensor_file *f = &all->files[all->n++];
    memset(f, 0, sizeof *f);
    memcpy(f->path, path, strlen(path) + 1);
    f->size = size;
    result = gai_read_header(f, file, size, all->e);
    fclose(file);
    return result;
}

GAI_FN void gai_close_files(gai_tensor_files *all) {
    for (size_t i = 0; i < all->n; i++) {
        gai_tensor_file *f = &all->files[i];
        GA_FREE(f->header);
        GA_FREE(f->entries);
        if (f->read)
            GA_FREE(f->bytes);
        else if (f->bytes)
            gai_unmap_bytes(f->bytes, (size_t)f->size);
    }
    GA_FREE(all->files);
    GA_FREE(all->index);
}

GAI_FN gai_entry *gai_find_entry(const gai_tensor_file *f, const char *name) {
    gai_entry key;
    memset(&key, 0, sizeof key);
    key.name = name;
    return f->n > 0 ? (gai_entry *)bsearch(&key, f->entries, f->n, sizeof key, gai_by_name) : NULL;
}

/* A shard's name must be a plain one, so that an index cannot reach outside its directory. */
GAI_FN bool gai_is_plain_name(const char *name) {
    for (const char *p = name; *p != '\0'; p++)
        if (*p <= 0x20 || *p > 0x7E || *p == '/' || *p == '\\') return false;
    return name[0] != '\0' && name[0] != '.' && strlen(name) < 256;
}

/* The shard `name`, whose header is read when it is met first. Neighbours in an index mostly share a shard. */
GAI_FN ga_result gai_find_shard(gai_tensor_files *all, const char *directory, const char *name, gai_tensor_file **f) {
    char path[GAI_PATH];
    if (!gai_is_plain_name(name))
        return gai_fail(all->e, GA_ERR_FORMAT, "%s/%s: shard \"%.64s\" is no plain file name", directory,
                        "model.safetensors.index.json", gai_printable(name));
    ga_result result = gai_path(path, directory, "/", name, all->e);
    if (result != GA_OK) return result;
    for (size_t i = all->n; i-- > 0;) {
        *f = &all->files[i];
        if (strcmp((*f)->path, path) == 0) return GA_OK;
    }
    if (all->n == GAI_MAX_SHARDS) return gai_fail(all->e, GA_ERR_FORMAT, "%s: has too many shards", directory);
    *f = &all->files[all->n];
    return gai_add_file(all, path);
}

/* {"weight_map": {"<tensor>": "<file>", ...}}: every tensor is where the index says, and no shard holds another one. */
GAI_FN ga_result gai_open_shards(gai_tensor_files *all, const char *directory, const char *path) {
    static const char *const names[] = {"weight_map"};
    gai_json index, map, value;
    char *name, *shard;
    gai_tensor_file *f = NULL;
    ga_result result = gai_json_load(&index, path, &all->index, all->e);
    if (result == GA_OK) result = gai_json_members(index, names, 1, &map, false);
    if (result != GA_OK) return result;
    if (map.at == NULL || *map.at != '{') return gai_fail(all->e, GA_ERR_FORMAT, "%s: has no weight_map", path);
    while (gai_json_next(&map, &name, &value)) {
        if (!gai_json_string(&value, &shard))
            return gai_fail(all->e, GA_ERR_FORMAT, "%s: the shard of %.96s is no string", path, gai_printable(name));
        result = gai_find_shard(all, directory, shard, &f);
        if (result != GA_OK) return result;
        gai_entry *t = gai_find_entry(f, name);
        if (!t) return gai_bad_tensor(f, name, "is not in this shard, where the index says it is", all->e);
        if (t->listed) return gai_bad_tensor(f, name, "stands twice in the index", all->e);
        t->listed = true;
    }
    if (all->n == 0) return gai_fail(all->e, GA_ERR_FORMAT, "%s: weight_map is empty", path);
    for (size_t i = 0; i < all->n; i++)
        for (size_t k = 0; k < all->files[i].n; k++)
            if (!all->files[i].entries[k].listed)
                return gai_bad_tensor(&all->files[i], all->files[i].entries[k].name, "is not in the index", all->e);
    return GA_OK;
}

/* Opens <directory>/<name>.safetensors or else the shards of its index. *all is to be closed, also on failure. */
GAI_FN ga_result gai_open_files(gai_tensor_files *all, const char *directory, const char *name, ga_error *e) {
    char path[GAI_PATH], index[GAI_PATH];
    memset(all, 0, sizeof *all);
    all->e = e;
    ga_result result = gai_path(path, directory, name, ".safetensors", e);
    if (result == GA_OK) result = gai_path(index, directory, name, ".safetensors.index.json", e);
    if (result != GA_OK) return result;
    bool sharded = !gai_exists(path) && gai_exists(index);
    all->files = (gai_tensor_file *)GA_MALLOC((sharded ? GAI_MAX_SHARDS : 1) * sizeof *all->files);
    if (!all->files) return gai_fail(e, GA_ERR_MEMORY, "%s: no memory to read it", path);
    return sharded ? gai_open_shards(all, directory, index) : gai_add_file(all, path);
}

/* The stored form of a tensor: found once, of the right shape. */
GAI_FN ga_result gai_find_stored(gai_tensor_files *all, const gai_stored *s, gai_tensor_file **f, gai_entry **t) {
    char expected[GAI_SHAPE_TEXT], found[GAI_SHAPE_TEXT];
    *t = NULL;
    for (size_t i = 0; i < all->n; i++) {
        gai_entry *here = gai_find_entry(&all->files[i], s->name);
        if (!here) continue;
        if (*t != NULL) return gai_bad_tensor(*f, s->name, "stands in two shards", all->e);
        *t = here;
        *f = &all->files[i];
    }
    if (!*t) return gai_fail(all->e, GA_ERR_MISMATCH, "%s: tensor %s: is missing", all->files[0].path, s->name);
    if ((*t)->rank == s->rank && memcmp((*t)->shape, s->shape, s->rank * sizeof *s->shape) == 0) return GA_OK;
    gai_shape_text(expected, s->rank, s->shape);
    gai_shape_text(found, (*t)->rank, (*t)->shape);
    return gai_fail(all->e, GA_ERR_MISMATCH, "%s: tensor %s: has shape %s, expected %s", (*f)->path, s->name, found,
                    expected);
}

/* Whether two tensors are the same bytes. */
GAI_FN ga_result gai_compare(gai_stream *s, const gai_tensor_file *f, const gai_entry *t, const gai_tensor_file *g,
                             const gai_entry *u, bool *same) {
    *same = t->type == u->type && t->rank == u->rank && memcmp(t->shape, u->shape, sizeof t->shape) == 0;
    const size_t half = (size_t)GAI_CHUNK * 4;
    for (uint64_t done = 0, all = t->end - t->begin; *same && done < all; done += half) {
        size_t n = all - done < half ? (size_t)(all - done) : half;
        ga_result result = gai_stream_seek(s, f->path, t->begin + done);
        if (result == GA_OK) result = gai_stream_bytes(s, s->bytes, n);
        if (result == GA_OK) result = gai_stream_seek(s, g->path, u->begin + done);
        if (result == GA_OK) result = gai_stream_bytes(s, s->bytes + half, n);
        if (result != GA_OK) return result;
        *same = memcmp(s->bytes, s->bytes + half, n) == 0;
    }
    return GA_OK;
}

GAI_FN bool gai_has_end(const char *text, const char *end) {
    size_t n = strlen(text), tail = strlen(end);
    return n >= tail && strcmp(text + n - tail, end) == 0;
}

/* A tensor that the model does not have. Other writers keep the RoPE frequencies, and lm_head beside
 * tied embeddings. */
GAI_FN ga_result gai_check_extra(gai_tensor_files *all, gai_stream *stream, const gai_tensor_file *f,
                                 const gai_entry *t) {
    if (gai_has_end(t->name, "rotary_emb.inv_freq")) return GA_OK;
    if (gai_has_end(t->name, ".bias"))
        return gai_fail(all->e, GA_ERR_MISMATCH, "%s: tensor %.96s: biases are not supported", f->path,
                        gai_printable(t->name));
    if (strcmp(t->name, "lm_head.weight") != 0 || !stream->m->config.tied_embeddings)
        return gai_fail(all->e, GA_ERR_MISMATCH, "%s: tensor %.96s: the model has none of this name", f->path,
                        gai_printable(t->name));
    bool same = false;
    for (size_t i = 0; i < all->n && !same; i++) {
        const gai_entry *embed = gai_find_entry(&all->files[i], "model.embed_tokens.weight");
        if (!embed) continue;
        ga_result result = gai_compare(stream, f, t, &all->files[i], embed, &same);
        if (result != GA_OK) return result;
    }
    if (same) return GA_OK;
    return gai_fail(all->e, GA_ERR_MISMATCH, "%s: tensor lm_head.weight: differs from the embeddings it is tied to",
                    f->path);
}

GAI_FN ga_result gai_check_files(gai_tensor_files *all, gai_stream *stream, const gai_contents *c) {
    gai_stored s;
    gai_tensor_file *f = NULL;
    gai_entry *t = NULL;
    for (size_t i = 0; i < gai_stored_count(stream->m, c); i++) {
        if (!gai_stored_tensor(stream->m, c, i, &s)) continue;
        ga_result result = gai_find_stored(all, &s, &f, &t);
        if (result != GA_OK) return result;
        t->used = true;
    }
    for (size_t i = 0; i < all->n; i++)
        for (size_t k = 0; k < all->files[i].n; k++) {
            const gai_entry *extra = &all->files[i].entries[k];
            ga_result result = extra->used ? GA_OK : gai_check_extra(all, stream, &all->files[i], extra);
            if (result != GA_OK) return result;
        }
    return GA_OK;
}

GAI_FN ga_result gai_load_values(gai_tensor_files *all, gai_stream *stream, const gai_contents *c) {
    gai_stored s;
    gai_tensor_file *f = NULL;
    gai_entry *t = NULL;
    ga_real *values;
    size_t n;
    ga_model *m = stream->m;
    for (size_t i = 0; i < gai_stored_count(m, c); i++) {
        size_t block = i / m->n_tensors;
        if (gai_stored_tensor(m, c, i, &s)) {
            ga_result result = gai_find_stored(all, &s, &f, &t);
            if (result == GA_OK) result = gai_stream_seek(stream, f->path, t->begin);
            for (size_t k = 0; result == GA_OK && gai_stored_run(m, &s, k, &values, &n); k++)
                result = gai_stream_read(stream, values, n, t->type, s.shift);
            if (result != GA_OK) return result;
        }
        bool complete = (i + 1) % m->n_tensors == 0;
        if (complete && c->shares[block]) gai_take_shares(m, c->shares[block], c->blocks[block]);
    }
    return GA_OK;
}

/* ---- safetensors: weights that stay in their files ----
 *
 * GA_MAPPED: the bytes of every file are at hand, mapped or else read, and are turned into ga_real a layer at a time,
 * through a small buffer and the device's copy_in, so that any device can have them. Pages of a mapping are the
 * kernel's to drop and to fetch again: what must be in memory is one layer. A file that another program shortens while
 * it is mapped ends this one with SIGBUS, as with every mapping. */
struct ga_mapped_files {
    gai_tensor_files all;
    gai_layout layout;
    ga_real *values; /* GAI_CHUNK */
};

GAI_FN ga_result gai_map_file(gai_tensor_file *f, ga_error *e) {
    FILE *file;
    uint64_t size = 0;
    ga_result result = gai_open(f->path, &file, &size, e);
    if (result != GA_OK) return result;
    if (size != f->size) result = gai_fail(e, GA_ERR_FILE, "%s: changed while it was opened", f->path);
    if (size >= SIZE_MAX) result = gai_fail(e, GA_ERR_MEMORY, "%s: is larger than this machine's addresses", f->path);
    if (result == GA_OK) {
        void *bytes = gai_map(file, (size_t)size);
        f->read = bytes == NULL;
        if (f->read) {
            char *copy = NULL;
            result = gai_read_text(file, f->path, (size_t)size, &copy, e);
            bytes = copy;
        }
        f->bytes = (unsigned char *)bytes;
    }
    fclose(file);
    return result;
}

/* Takes over files that were opened and checked; *all is empty afterwards. */
GAI_FN ga_result gai_map_values(ga_model *m, gai_tensor_files *all, gai_layout layout) {
    for (size_t i = 0; i < all->n; i++) {
        ga_result result = gai_map_file(&all->files[i], all->e);
        if (result != GA_OK) return result;
    }
    ga_mapped_files *mapped = (ga_mapped_files *)GA_MALLOC(sizeof *mapped);
    ga_real *values = (ga_real *)GA_MALLOC((size_t)GAI_CHUNK * sizeof(ga_real));
    if (!mapped || !values) {
        GA_FREE(mapped);
        GA_FREE(values);
        return gai_fail(all->e, GA_ERR_MEMORY, "no memory for the buffers of a checkpoint");
    }
    gai_unmap(m->mapped);
    mapped->all = *all;
    mapped->all.e = NULL;
    mapped->layout = layout;
    mapped->values = values;
    m->mapped = mapped;
    m->expanded = m->sizes.L; /* none */
    memset(all, 0, sizeof *all);
    return GA_OK;
}

GAI_FN void gai_unmap(ga_mapped_files *mapped) {
    if (!mapped) return;
    gai_close_files(&mapped->all);
    GA_FREE(mapped->values);
    GA_FREE(mapped);
}

GAI_FN void gai_expand_run(ga_model *m, ga_real *to, const unsigned char *bytes, size_t n, gai_dtype type,
                           ga_real shift) {
    for (size_t done = 0; done < n; done += GAI_CHUNK) {
        size_t some = gai_min(n - done, GAI_CHUNK);
        gai_decode(m->mapped->values, bytes + done * gai_dtype_size(type), some, type, shift);
        m->device.copy_in(m->device.state, to + done, m->mapped->values, some * sizeof(ga_real));
    }
}

GAI_FN void gai_expand(ga_model *m, size_t layer) {
    gai_contents c = gai_weights_of(m);
    c.layout = m->mapped->layout;
    gai_tensor_file *f = NULL;
    gai_entry *entry = NULL;
    gai_stored s;
    ga_real *values;
    size_t n;
    for (size_t i = 0; i < m->n_tensors; i++) {
        const ga_tensor *t = &m->tensors[i];
        bool gathered = t->id == GA_TENSOR_embed && !m->config.tied_embeddings;
        if (t->layer != layer || gathered || !gai_stored_tensor(m, &c, i, &s)) continue;
        gai_find_stored(&m->mapped->all, &s, &f, &entry);
        const unsigned char *bytes = f->bytes + entry->begin;
        for (size_t k = 0; gai_stored_run(m, &s, k, &values, &n); k++) {
            gai_expand_run(m, values, bytes, n, entry->type, s.shift);
            bytes += n * gai_dtype_size(entry->type);
        }
    }
    m->expanded = layer;
    if (m->device.weights_changed)
        m->device.weights_changed(m->device.state, m->weights, (size_t)gai_weight_values(&m->config, GA_MAPPED));
}

GAI_FN void gai_expand_embeddings(ga_model *m, ga_real *x, size_t N) {
    gai_contents c = gai_weights_of(m);
    gai_tensor_file *f = NULL;
    gai_entry *entry = NULL;
    gai_stored s;
    int32_t tokens[256];
    size_t C = m->sizes.C, most = gai_min(256, GAI_CHUNK / C); /* rows at a time */
    gai_stored_tensor(m, &c, 0, &s);
    gai_find_stored(&m->mapped->all, &s, &f, &entry);
    for (size_t n = 0; n < N; n += most) {
        size_t rows = gai_min(most, N - n);
        m->device.copy_out(m->device.state, tokens, m->tokens + n, rows * sizeof *tokens);
        for (size_t i = 0; i < rows; i++)
            gai_decode(m->mapped->values + i * C,
                       f->bytes + entry->begin + (size_t)tokens[i] * C * gai_dtype_size(entry->type), C, entry->type,
                       0);
        m->device.copy_in(m->device.state, x + n * C, m->mapped->values, rows * C * sizeof(ga_real));
    }
}

/* The files of a block of tensors, of which everything but the values has been checked. */
typedef struct {
    gai_tensor_files files;
    gai_stream stream;
} gai_reader;

/* Of m only its shape and the list of its tensors are read. *r is to be closed, also on failure. */
GAI_FN ga_result gai_reader_open(gai_reader *r, ga_model *m, const char *directory, const char *name,
                                 const gai_contents *c, ga_error *e) {
    memset(r, 0, sizeof *r);
    ga_result result = gai_open_files(&r->files, directory, name, e);
    if (result == GA_OK) result = gai_stream_create(&r->stream, m, e);
    return result == GA_OK ? gai_check_files(&r->files, &r->stream, c) : result;
}

GAI_FN void gai_reader_close(gai_reader *r) {
    gai_stream_destroy(&r->stream);
    gai_close_files(&r->files);
}

GAI_FN ga_result gai_load_tensors(ga_model *m, const char *directory, const char *name, const gai_contents *c,
                                  ga_error *e) {
    gai_reader r;
    ga_result result = gai_reader_open(&r, m, directory, name, c, e);
    if (result == GA_OK)
        result =
            m->mode == GA_MAPPED ? gai_map_values(m, &r.files, c->layout) : gai_load_values(&r.files, &r.stream, c);
    gai_reader_close(&r);
    return result;
}

/* ---- safetensors: writing ---------------------------------------------------------------------------------------- */

GAI_FN ga_result gai_write_header(gai_stream *s, const gai_contents *c) {
    const char *type = gai_dtype_name(gai_own_dtype());
    size_t count = gai_stored_count(s->m, c), size = 64 + count * 384; /* an entry has at most 321 bytes */
    gai_text t = {(char *)GA_MALLOC(size), 0, size};
    if (!t.text) return gai_fail(s->e, GA_ERR_MEMORY, "%s: no memory for its header", s->path);
    gai_stored stored;
    uint64_t at = 0;
    gai_print(&t, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (size_t i = 0; i < count; i++) {
        char shape[GAI_SHAPE_TEXT];
        if (!gai_stored_tensor(s->m, c, i, &stored)) continue;
        uint64_t end = at + stored.values * sizeof(ga_real);
        gai_shape_text(shape, stored.rank, stored.shape);
        gai_print(&t, ",\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%llu,%llu]}", stored.name, type, shape,
                  (unsigned long long)at, (unsigned long long)end);
        at = end;
    }
    gai_print(&t, "}");
    while (t.used % 8 != 0) gai_print(&t, " ");
    unsigned char prefix[8];
    gai_put_bytes(prefix, t.used, sizeof prefix);
    ga_result result = gai_put(s->file, s->path, prefix, sizeof prefix, s->e);
    if (result == GA_OK) result = gai_put(s->file, s->path, t.text, t.used, s->e);
    GA_FREE(t.text);
    return result;
}

/* What rank 0, which writes a checkpoint, tells the others: to give their shares of a block of moments,
 * or how it went. */
enum { GAI_SAVED = 2 };
typedef struct {
    size_t block; /* of gai_moments_of; GAI_SAVED: `end` is the result */
    ga_error end;
} gai_order;

GAI_FN void gai_gather_moments(ga_model *m, size_t block) {
    gai_contents moments = gai_moments_of(m);
    gai_gather_shares(m, moments.blocks[block], moments.shares[block]);
}

GAI_FN void gai_call_for_shares(ga_model *m, size_t block) {
    gai_order order = {block, {GA_OK, ""}};
    gai_ranks(m)->broadcast(gai_ranks(m)->state, &order, sizeof order);
    gai_gather_moments(m, block);
}

/* On the other ranks, until rank 0 has written the checkpoint. */
GAI_FN ga_result gai_serve_rank_0(ga_model *m, ga_error *e) {
    const ga_ranks *ranks = gai_ranks(m);
    for (;;) {
        gai_order order = {GAI_SAVED, {GA_OK, ""}};
        ranks->broadcast(ranks->state, &order, sizeof order);
        ga_result result = gai_status(m, e);
        if (result != GA_OK) return result;
        if (order.block == GAI_SAVED)
            return order.end.result == GA_OK ? GA_OK : gai_fail(e, order.end.result, "%s", order.end.text);
        gai_gather_moments(m, order.block);
    }
}

GAI_FN ga_result gai_write_values(gai_stream *s, const gai_contents *c) {
    gai_stored stored;
    ga_real *values;
    size_t n;
    for (size_t i = 0; i < gai_stored_count(s->m, c); i++) {
        size_t block = i / s->m->n_tensors;
        if (i % s->m->n_tensors == 0 && c->shares[block]) gai_call_for_shares(s->m, block);
        if (!gai_stored_tensor(s->m, c, i, &stored)) continue;
        for (size_t k = 0; gai_stored_run(s->m, &stored, k, &values, &n); k++) {
            ga_result result = gai_stream_write(s, values, n);
            if (result != GA_OK) return result;
        }
    }
    return GA_OK;
}

GAI_FN ga_result gai_save_tensors(ga_model *m, const char *directory, const char *name, const gai_contents *c,
                                  ga_error *e) {
    char path[GAI_PATH];
    gai_stream s;
    ga_result result = gai_path(path, directory, name, ".safetensors", e);
    if (result != GA_OK) return result;
    result = gai_stream_create(&s, m, e);
    if (result == GA_OK) result = gai_create_file(path, &s.file, e);
    if (result == GA_OK) {
        s.path = path;
        result = gai_write_header(&s, c);
        if (result == GA_OK) result = gai_write_values(&s, c);
        result = gai_close_file(s.file, path, result, e);
        s.file = NULL;
    }
    gai_stream_destroy(&s);
    return result;
}

/* ---- config.json ------------------------------------------------------------------------------------------------- */

/* X(key, our key or NULL, required); first those with a key of ours */
#define GAI_HF_CONFIG(X)                                \
    X(vocab_size, "vocab_size", true)                   \
    X(hidden_size, "d_model", true)                     \
    X(num_hidden_layers, "n_layers", true)              \
    X(num_attention_heads, "n_heads", true)             \
    X(num_key_value_heads, "n_kv_heads", false)         \
    X(head_dim, "head_dim", false)                      \
    X(intermediate_size, "d_ff", true)                  \
    X(max_position_embeddings, "max_seq_len", false)    \
    X(rms_norm_eps, "norm_eps", false)                  \
    X(rope_theta, "rope_base", false)                   \
    X(initializer_range, "init_std", false)             \
    X(use_qk_norm, "qk_norm", false)                    \
    X(tie_word_embeddings, "tied_embeddings", false)    \
    X(num_experts, "n_experts", false)                  \
    X(num_experts_per_tok, "experts_per_token", false)  \
    X(moe_intermediate_size, "d_ff", false)             \
    X(norm_topk_prob, "normalize_top_k", false)         \
    X(router_aux_loss_coef, "load_balance_coef", false) \
    X(headwise_attn_output_gate, NULL, false)           \
    X(elementwise_attn_output_gate, NULL, false)        \
    X(model_type, NULL, false)                          \
    X(hidden_act, NULL, false)                          \
    X(attention_bias, NULL, false)                      \
    X(qkv_bias, NULL, false)                            \
    X(mlp_bias, NULL, false)                            \
    X(use_sliding_window, NULL, false)                  \
    X(rope_scaling, NULL, false)                        \
    X(rope_parameters, NULL, false)                     \
    X(decoder_sparse_step, NULL, false)                 \
    X(mlp_only_layers, NULL, false)                     \
    X(sliding_window, NULL, false)                      \
    X(layer_types, NULL, false)                         \
    X(full_attention_interval, NULL, false)             \
    X(partial_rotary_factor, NULL, false)               \
    X(transformers_version, NULL, false)                \
    X(gated_attention, NULL, false)

enum {
#define GAI_X(key, own, required) GAI_HF_##key,
    GAI_HF_CONFIG(GAI_X)
#undef GAI_X
        GAI_HF_COUNT
};

typedef struct {
    const char *name, *own;
    bool required;
} gai_hf_key;

GAI_FN const gai_hf_key *gai_hf_keys(void) {
    static const gai_hf_key keys[] = {
#define GAI_X(key, own, required) {#key, own, required},
        GAI_HF_CONFIG(GAI_X)
#undef GAI_X
    };
    return keys;
}

/* The keys that only a mixture of experts (qwen3_moe) has. */
GAI_FN bool gai_is_mixture_key(ptrdiff_t i) {
    return (i >= GAI_HF_num_experts && i <= GAI_HF_router_aux_loss_coef) || i == GAI_HF_decoder_sparse_step ||
           i == GAI_HF_mlp_only_layers;
}

GAI_FN bool gai_is_model_key(const gai_key *k) {
    return strcmp(k->group, "MODEL") == 0 || strcmp(k->group, "GATE") == 0;
}

/* Which of the two switches of a packed gate is on. */
GAI_FN bool gai_switch(const ga_config *c, int type) {
    return gai_gate_is_packed(c) && c->gate_type == type;
}

/* A value of the configuration as JSON: flags and numbers bare, words in quotes. */
GAI_FN void gai_print_value(gai_text *t, const ga_config *c, const gai_key *k) {
    char text[GA_TEXT];
    ga_config_get(c, k->name, text, sizeof text);
    if (k->kind == GAI_FLAG)
        gai_print(t, "%s", text[0] == '1' ? "true" : "false");
    else
        gai_print(t, k->kind == GAI_CHOICE ? "\"%s\"" : "%s", text);
}

/* Under which model_type transformers computes the same: Qwen3 with the released models' gate, Qwen3-MoE, Llama. Any
 * other model gets a name that is nobody's, and no class of theirs (NULL), so that it is not taken for one of these. */
GAI_FN const char *gai_own_family(const ga_config *c, const char **architecture) {
    bool plain = (c->gate_position == GA_NO_GATE || gai_gate_is_packed(c)) && c->partial_rotary_factor == 1 &&
                 !c->sandwich_norm && !(c->attn_clip > 0) && !(c->ffn_clip > 0) && c->attention_sink == GA_SINK_NONE &&
                 c->switch_heads == GA_SWITCH_NONE;
    bool mixture = c->n_experts > 0, llama = !c->qk_norm && c->gate_position == GA_NO_GATE;
    *architecture = NULL;
    if (!plain || (mixture && !c->qk_norm)) return "gated_attention";
    *architecture = mixture ? "Qwen3MoeForCausalLM" : llama ? "LlamaForCausalLM" : "Qwen3ForCausalLM";
    return mixture ? "qwen3_moe" : llama ? "llama" : "qwen3";
}

/* YaRN's keys, Hugging Face's and ours. */
enum { GAI_YARN_KEYS = 5 };

GAI_FN const gai_hf_key *gai_yarn_keys(void) {
    static const gai_hf_key keys[GAI_YARN_KEYS] = {{"factor", "rope_factor", true},
                                                   {"original_max_position_embeddings", "rope_original_length", false},
                                                   {"beta_fast", "rope_beta_fast", false},
                                                   {"beta_slow", "rope_beta_slow", false},
                                                   {"attention_factor", "rope_attention_factor", false}};
    return keys;
}

/* Whether a key of ours stands in the file as YaRN's as well, or is ruled out there by the lack of YaRN. */
GAI_FN bool gai_yarn_says(const ga_config *c, const gai_json *hf, const char *name) {
    if (!hf[GAI_HF_rope_scaling].start && !hf[GAI_HF_rope_parameters].start) return false;
    for (size_t i = 0; i < GAI_YARN_KEYS; i++)
        if (strcmp(gai_yarn_keys()[i].own, name) == 0) return i == 0 || c->rope_factor != 1;
    return false;
}

/* transformers wants YaRN's numbers to be floats, and no attention_factor where the rule makes it. */
GAI_FN void gai_print_rope_scaling(gai_text *t, const ga_config *c) {
    gai_print(t, "  \"rope_scaling\": ");
    if (c->rope_factor == 1) {
        gai_print(t, "null,\n");
        return;
    }
    gai_print(t, "{\"rope_type\": \"yarn\"");
    for (size_t i = 0; i < GAI_YARN_KEYS; i++) {
        const gai_key *k = gai_find_key(gai_yarn_keys()[i].own);
        char text[GA_TEXT];
        ga_config_get(c, k->name, text, sizeof text);
        if (k == &gai_keys()[GAI_KEY_rope_attention_factor] && c->rope_attention_factor == 0) continue;
        bool whole = k->kind == GAI_REAL && !strpbrk(text, ".e");
        gai_print(t, ", \"%s\": %s%s", gai_yarn_keys()[i].name, text, whole ? ".0" : "");
    }
    gai_print(t, "},\n");
}

GAI_FN ga_result gai_save_config(const ga_model *m, const char *directory, ga_error *e) {
    const ga_config *c = &m->config;
    char path[GAI_PATH], buffer[8192];
    gai_text t = {buffer, 0, sizeof buffer};
    ga_result result = gai_path(path, directory, "/", "config.json", e);
    if (result != GA_OK) return result;
    const char *architecture, *family = gai_own_family(c, &architecture);
    gai_print(&t, "{\n  \"model_type\": \"%s\",\n", family);
    if (architecture) gai_print(&t, "  \"architectures\": [\"%s\"],\n", architecture);
    if (c->n_experts > 0) gai_print(&t, "  \"decoder_sparse_step\": 1,\n  \"mlp_only_layers\": [],\n");
    gai_print(&t, "  \"torch_dtype\": \"%s\",\n", gai_own_dtype() == GAI_F64 ? "float64" : "float32");
    gai_print(&t, "  \"hidden_act\": \"silu\",\n  \"attention_bias\": false,\n  \"qkv_bias\": false,\n");
    gai_print(&t, "  \"use_sliding_window\": false,\n  \"sliding_window\": null,\n");
    gai_print_rope_scaling(&t, c);
    gai_print(&t, "  \"headwise_attn_output_gate\": %s,\n", gai_switch(c, GA_HEADWISE) ? "true" : "false");
    gai_print(&t, "  \"elementwise_attn_output_gate\": %s,\n", gai_switch(c, GA_ELEMENTWISE) ? "true" : "false");
    for (const gai_hf_key *k = gai_hf_keys(); k->own; k++) {
        if (c->n_experts == 0 && gai_is_mixture_key(k - gai_hf_keys())) continue;
        gai_print(&t, "  \"%s\": ", k->name);
        gai_print_value(&t, c, gai_find_key(k->own));
        gai_print(&t, ",\n");
    }
    gai_print(&t, "  \"gated_attention\": {");
    const char *separator = "";
    for (const gai_key *k = gai_keys(); k < gai_keys() + GAI_KEY_COUNT; k++) {
        if (!gai_is_model_key(k)) continue;
        gai_print(&t, "%s\n    \"%s\": ", separator, k->name);
        gai_print_value(&t, c, k);
        separator = ",";
    }
    gai_print(&t, "\n  }\n}\n");
    return gai_write_file(path, &t, e);
}

/* Sets our key `k` from a value of its kind: a flag, a number or a word. */
GAI_FN ga_result gai_set_value(ga_config *c, const gai_key *k, const char *name, gai_json value) {
    char text[GA_TEXT], first = gai_json_peek(&value), *string = text;
    ga_error inner;
    bool flag = first == 't' || first == 'f', word = first == '"';
    if (flag != (k->kind == GAI_FLAG) || word != (k->kind == GAI_CHOICE) || first == '{' || first == '[')
        return gai_fail(value.e, GA_ERR_FORMAT, "%s: %s has a value of the wrong type", value.path, name);
    size_t n = (size_t)(value.end - value.at);
    if (n >= sizeof text) return gai_fail(value.e, GA_ERR_FORMAT, "%s: %s is too long", value.path, name);
    memcpy(text, value.at, n);
    text[n] = '\0';
    if (word) gai_json_string(&value, &string);
    ga_result result = ga_config_set(c, k->name, gai_printable(string), &inner);
    if (result == GA_OK) return GA_OK;
    return gai_fail(value.e, result, "%s: %s: %.200s", value.path, name, inner.text);
}

/* Families of models: X(model_type, whether queries and keys have norms, what keeps it from being computed here or
 * NULL). gated_attention is this header's own name for what no other family can say. */
#define GAI_FAMILIES(X)                                             \
    X(qwen3, true, NULL)                                            \
    X(qwen3_next, true, NULL)                                       \
    X(qwen3_moe, true, NULL)                                        \
    X(llama, false, NULL)                                           \
    X(mistral, false, NULL)                                         \
    X(gated_attention, false, NULL)                                 \
    X(qwen2, false, "its queries, keys and values have biases")     \
    X(qwen2_moe, false, "its queries, keys and values have biases") \
    X(gpt_oss, false, "its projections have biases")                \
    X(gemma, false, "its FFN is not SwiGLU")                        \
    X(gemma2, false, "its FFN is not SwiGLU")                       \
    X(gemma3_text, false, "its FFN is not SwiGLU")                  \
    X(phi3, false, "it stores query, key and value as one tensor")  \
    X(deepseek_v3, false, "its keys and values are projected from a latent")

typedef struct {
    const char *name; /* in quotes, as in JSON */
    bool qk_norm;
    const char *obstacle;
} gai_family;

/* NULL: unknown. Without a model_type nothing is taken for granted, as in our own. */
GAI_FN const gai_family *gai_find_family(const gai_json *type) {
    static const gai_family families[] = {
#define GAI_X(name, qk_norm, obstacle) {"\"" #name "\"", qk_norm, obstacle},
        GAI_FAMILIES(GAI_X)
#undef GAI_X
    };
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        if (gai_json_is(type, families[i].name)) return &families[i];
    return NULL;
}

GAI_FN ga_result gai_check_family(const gai_json *type) {
    const gai_family *family = gai_find_family(type);
    if (!type->at || (family && !family->obstacle)) return GA_OK;
    if (family)
        return gai_fail(type->e, GA_ERR_CONFIG, "%s: model_type %s is not supported: %s", type->path, family->name,
                        family->obstacle);
    gai_json value = *type;
    char *name;
    if (gai_json_peek(&value) != '"' || !gai_json_string(&value, &name))
        return gai_fail(type->e, GA_ERR_CONFIG, "%s: model_type is no string", type->path);
    return gai_fail(type->e, GA_ERR_CONFIG,
                    "%s: model_type \"%.64s\" is none that is supported, such as qwen3 and llama", type->path,
                    gai_printable(name));
}

/* Every element of an array is the word `all`. */
GAI_FN bool gai_json_only(gai_json array, const char *all) {
    gai_json item;
    if (gai_json_peek(&array) != '[') return false;
    while (gai_json_next(&array, NULL, &item))
        if (!gai_json_is(&item, all)) return false;
    return true;
}

GAI_FN bool gai_is_next(const gai_json *values) {
    return gai_json_is(&values[GAI_HF_model_type], "\"qwen3_next\"");
}

/* Every layer must be one of softmax attention over all positions; in qwen3_next its FFN must be dense. */
GAI_FN ga_result gai_check_layers(const gai_json *values) {
    const gai_json *types = &values[GAI_HF_layer_types], *interval = &values[GAI_HF_full_attention_interval];
    const gai_json *type = &values[GAI_HF_model_type], *window = &values[GAI_HF_sliding_window];
    bool next = gai_is_next(values);
    if (types->at && !gai_json_only(*types, "\"full_attention\""))
        return gai_fail(types->e, GA_ERR_CONFIG,
                        "%s: layer_types: a hybrid model is not supported, only layers of full_attention", types->path);
    if (next && !types->at && !gai_json_is(interval, "1"))
        return gai_fail(type->e, GA_ERR_CONFIG,
                        "%s: layer_types are missing: a hybrid model is not supported, only layers of full_attention",
                        type->path);
    if (next && !gai_json_is(&values[GAI_HF_num_experts], "0"))
        return gai_fail(type->e, GA_ERR_CONFIG,
                        "%s: num_experts is not 0: the shared expert of qwen3_next is not supported", type->path);
    if (gai_json_is(type, "\"mistral\"") && window->at)
        return gai_fail(window->e, GA_ERR_CONFIG, "%s: sliding_window is not supported", window->path);
    return GA_OK;
}

/* What this implementation does not compute is refused, not left out. */
GAI_FN ga_result gai_check_supported(const gai_json *values) {
    static const int off[] = {GAI_HF_attention_bias, GAI_HF_qkv_bias, GAI_HF_mlp_bias, GAI_HF_use_sliding_window};
    for (size_t i = 0; i < sizeof off / sizeof *off; i++) {
        const gai_json *v = &values[off[i]];
        if (v->at && !gai_json_is(v, "false"))
            return gai_fail(v->e, GA_ERR_CONFIG, "%s: %s is not supported", v->path, gai_hf_keys()[off[i]].name);
    }
    const gai_json *act = &values[GAI_HF_hidden_act];
    if (act->at && !gai_json_is(act, "\"silu\""))
        return gai_fail(act->e, GA_ERR_CONFIG, "%s: hidden_act is not silu", act->path);
    ga_result result = gai_check_family(&values[GAI_HF_model_type]);
    return result == GA_OK ? gai_check_layers(values) : result;
}

/* A mixture has experts in every layer, or is refused; what a dense model says of experts is passed over, as Hugging
 * Face does. What a mixture leaves out has Hugging Face's default. */
GAI_FN ga_result gai_parse_mixture(ga_config *c, gai_json *values) {
    static const int required[] = {GAI_HF_num_experts, GAI_HF_num_experts_per_tok, GAI_HF_moe_intermediate_size};
    const gai_json *type = &values[GAI_HF_model_type], *step = &values[GAI_HF_decoder_sparse_step];
    const gai_json *dense = &values[GAI_HF_mlp_only_layers];
    if (!gai_json_is(type, "\"qwen3_moe\"")) {
        for (int i = 0; i < GAI_HF_COUNT; i++)
            if (gai_is_mixture_key(i)) values[i].at = NULL;
        return GA_OK;
    }
    for (size_t i = 0; i < sizeof required / sizeof *required; i++)
        if (!values[required[i]].at)
            return gai_fail(type->e, GA_ERR_FORMAT, "%s: %s is missing", type->path, gai_hf_keys()[required[i]].name);
    if (step->at && !gai_json_is(step, "1"))
        return gai_fail(step->e, GA_ERR_CONFIG,
                        "%s: decoder_sparse_step is not 1: layers without experts are not supported", step->path);
    if (dense->at && !gai_json_is(dense, "[]"))
        return gai_fail(dense->e, GA_ERR_CONFIG,
                        "%s: mlp_only_layers is not empty: layers without experts are not supported", dense->path);
    c->normalize_top_k = false;
    c->load_balance_coef = 0.001;
    return GA_OK;
}

/* YaRN's keys among the members of `object`, of which `other` are not computed. The original length is by default the
 * one that the file gives. */
GAI_FN ga_result gai_parse_yarn(ga_config *c, const gai_json *object, const char *name, gai_json *yarn,
                                const gai_json *other, size_t n_other, const gai_json *length) {
    for (size_t i = 0; i < n_other; i++)
        if (other[i].at)
            return gai_fail(object->e, GA_ERR_CONFIG,
                            "%s: %s of type yarn: mscale, mscale_all_dim and truncate are not supported", object->path,
                            name);
    if (!yarn[0].at) return gai_fail(object->e, GA_ERR_FORMAT, "%s: %s: factor is missing", object->path, name);
    if (!yarn[1].at) yarn[1] = *length;
    ga_result result = GA_OK;
    for (size_t i = 0; i < GAI_YARN_KEYS && result == GA_OK; i++) {
        const gai_hf_key *k = &gai_yarn_keys()[i];
        if (yarn[i].at) result = gai_set_value(c, gai_find_key(k->own), k->name, yarn[i]);
    }
    return result;
}

/* rope_scaling, or what newer writers have in its place: rope_parameters, with the base and the share inside. */
GAI_FN ga_result gai_parse_rope(ga_config *c, const gai_json *values, int key) {
    enum { TYPE, OLD_TYPE, BASE, SHARE, OTHER, YARN = OTHER + 3, MEMBERS = YARN + GAI_YARN_KEYS };
    const char *names[MEMBERS] = {"rope_type", "type",           "rope_theta", "partial_rotary_factor",
                                  "mscale",    "mscale_all_dim", "truncate"};
    const gai_json *object = &values[key];
    gai_json members[MEMBERS], *type = &members[TYPE];
    if (!object->at || gai_json_is(object, "false")) return GA_OK;
    const char *name = gai_hf_keys()[key].name;
    for (size_t i = 0; i < GAI_YARN_KEYS; i++) names[YARN + i] = gai_yarn_keys()[i].name;
    ga_result result = gai_json_members(*object, names, MEMBERS, members, false);
    if (result != GA_OK) return result;
    if (!type->at) type = &members[OLD_TYPE];
    char *text = NULL;
    if (type->at && gai_json_is(type, "\"yarn\"")) {
        result = gai_parse_yarn(c, object, name, members + YARN, members + OTHER, YARN - OTHER,
                                &values[GAI_HF_max_position_embeddings]);
    } else if (type->at && !gai_json_is(type, "\"default\"")) {
        if (!gai_json_string(type, &text))
            return gai_fail(object->e, GA_ERR_FORMAT, "%s: %s: its type is no string", object->path, name);
        return gai_fail(object->e, GA_ERR_CONFIG, "%s: %s of type %.32s is not supported", object->path, name,
                        gai_printable(text));
    }
    if (members[BASE].at && result == GA_OK)
        result = gai_set_value(c, gai_find_key("rope_base"), names[BASE], members[BASE]);
    if (members[SHARE].at && result == GA_OK)
        result = gai_set_value(c, gai_find_key("partial_rotary_factor"), names[SHARE], members[SHARE]);
    return result;
}

/* Only Qwen3-Next turns a part of the dimensions, a quarter if it does not say. */
GAI_FN ga_result gai_parse_rotation(ga_config *c, const gai_json *values) {
    const gai_json *share = &values[GAI_HF_partial_rotary_factor];
    const char *name = gai_hf_keys()[GAI_HF_partial_rotary_factor].name;
    bool next = gai_is_next(values);
    if (next) c->partial_rotary_factor = 0.25;
    ga_result result = share->at ? gai_set_value(c, gai_find_key(name), name, *share) : GA_OK;
    if (result == GA_OK) result = gai_parse_rope(c, values, GAI_HF_rope_scaling);
    if (result == GA_OK) result = gai_parse_rope(c, values, GAI_HF_rope_parameters);
    if (result != GA_OK || next || c->partial_rotary_factor == 1) return result;
    return gai_fail(values->e, GA_ERR_CONFIG, "%s: %s is not supported for this model_type", values->path, name);
}

/* One of our own keys. Where another key of the file has set it already, the two must agree. */
GAI_FN ga_result gai_parse_own_key(ga_config *c, const gai_json *hf, const gai_key *own, gai_json value) {
    char before[GA_TEXT], after[GA_TEXT];
    ga_config_get(c, own->name, before, sizeof before);
    ga_result result = gai_set_value(c, own, own->name, value);
    if (result != GA_OK) return result;
    ga_config_get(c, own->name, after, sizeof after);
    if (strcmp(before, after) == 0) return GA_OK;
    if (gai_yarn_says(c, hf, own->name))
        return gai_fail(value.e, GA_ERR_FORMAT, "%s: rope_scaling (%s = %s) contradicts gated_attention.%s = %s",
                        value.path, own->name, before, own->name, after);
    for (size_t k = 0; gai_hf_keys()[k].own; k++)
        if (hf[k].at && strcmp(gai_hf_keys()[k].own, own->name) == 0)
            return gai_fail(value.e, GA_ERR_FORMAT, "%s: %s = %s contradicts gated_attention.%s = %s", value.path,
                            gai_hf_keys()[k].name, before, own->name, after);
    return GA_OK;
}

/* The object of our own keys, which says what the others cannot. */
GAI_FN ga_result gai_parse_own_keys(ga_config *c, const gai_json *hf, bool keep_length) {
    const gai_key *keys[GAI_KEY_COUNT];
    const char *names[GAI_KEY_COUNT];
    gai_json values[GAI_KEY_COUNT];
    size_t n = 0;
    for (size_t i = 0; i < GAI_KEY_COUNT; i++)
        if (gai_is_model_key(&gai_keys()[i])) {
            keys[n] = &gai_keys()[i];
            names[n] = keys[n]->name;
            n++;
        }
    ga_result result = gai_json_members(hf[GAI_HF_gated_attention], names, n, values, true);
    for (size_t i = 0; i < n && result == GA_OK; i++)
        if (values[i].at && !(keep_length && strcmp(names[i], "max_seq_len") == 0))
            result = gai_parse_own_key(c, hf, keys[i], values[i]);
    return result;
}

GAI_FN ga_result gai_parse_gate(ga_config *c, const gai_json *hf) {
    const gai_json *switches[2];
    bool on[2];
    switches[GA_HEADWISE] = &hf[GAI_HF_headwise_attn_output_gate];
    switches[GA_ELEMENTWISE] = &hf[GAI_HF_elementwise_attn_output_gate];
    for (int type = 0; type < 2; type++) {
        const gai_json *v = switches[type];
        on[type] = gai_json_is(v, "true");
        if (v->at && !on[type] && !gai_json_is(v, "false"))
            return gai_fail(v->e, GA_ERR_FORMAT, "%s: %s is neither true nor false", v->path,
                            gai_hf_keys()[v - hf].name);
    }
    if (gai_is_next(hf)) on[GA_ELEMENTWISE] = true; /* it has no switches: the gate is always there */
    if (on[0] && on[1])
        return gai_fail(hf->e, GA_ERR_FORMAT, "%s: headwise and elementwise_attn_output_gate are both true", hf->path);
    c->gate_position = on[0] || on[1] ? GA_G1 : GA_NO_GATE;
    c->gate_type = on[GA_HEADWISE] ? GA_HEADWISE : GA_ELEMENTWISE;
    return GA_OK;
}

GAI_FN void gai_reset_model_keys(ga_config *c, bool keep_length) {
    ga_config defaults = ga_config_default();
    char text[GA_TEXT];
    for (size_t i = 0; i < GAI_KEY_COUNT; i++) {
        const gai_key *k = &gai_keys()[i];
        if (!gai_is_model_key(k) || (keep_length && i == GAI_KEY_max_seq_len)) continue;
        ga_config_get(&defaults, k->name, text, sizeof text);
        ga_config_set(c, k->name, text, NULL);
    }
}

/* Who wrote a checkpoint. */
typedef struct {
    char family[32], version[32];
    bool by_head; /* the tensors are laid out as Qwen3-Next has them */
} gai_source;

/* A word of config.json, for messages; empty where there is none. */
GAI_FN void gai_copy_word(char *to, size_t size, const gai_json *value) {
    bool word = value->at && gai_json_peek(value) == '"';
    size_t n = word ? gai_min((size_t)(value->end - value->at) - 2, size - 1) : 0;
    if (n > 0) memcpy(to, value->at + 1, n);
    to[n] = '\0';
    if (n > 0 && strcmp(to, gai_printable(to)) != 0) to[0] = '\0';
}

GAI_FN ga_result gai_parse_config(ga_config *c, gai_json object, bool keep_length, gai_source *source) {
    const gai_hf_key *hf = gai_hf_keys();
    const char *names[GAI_HF_COUNT];
    gai_json values[GAI_HF_COUNT];
    for (size_t i = 0; i < GAI_HF_COUNT; i++) names[i] = hf[i].name;
    ga_result result = gai_json_members(object, names, GAI_HF_COUNT, values, false);
    if (result == GA_OK) result = gai_check_supported(values);
    if (result != GA_OK) return result;
    source->by_head = gai_is_next(values);
    gai_copy_word(source->family, sizeof source->family, &values[GAI_HF_model_type]);
    gai_copy_word(source->version, sizeof source->version, &values[GAI_HF_transformers_version]);
    gai_reset_model_keys(c, keep_length);
    result = gai_parse_mixture(c, values);
    if (result != GA_OK) return result;
    for (size_t i = 0; hf[i].own; i++) {
        if (hf[i].required && !values[i].at)
            return gai_fail(object.e, GA_ERR_FORMAT, "%s: %s is missing", object.path, hf[i].name);
        if (!values[i].at || (keep_length && i == GAI_HF_max_position_embeddings)) continue;
        result = gai_set_value(c, gai_find_key(hf[i].own), hf[i].name, values[i]);
        if (result != GA_OK) return result;
    }
    const gai_family *family = gai_find_family(&values[GAI_HF_model_type]);
    if (!values[GAI_HF_num_key_value_heads].at) c->n_kv_heads = c->n_heads;
    if (!values[GAI_HF_use_qk_norm].at) c->qk_norm = family && family->qk_norm;
    if (!values[GAI_HF_head_dim].at) c->head_dim = c->d_model / c->n_heads;
    if (c->head_dim < 2 || c->head_dim > GA_MAX_HEAD_DIM)
        return gai_fail(object.e, GA_ERR_CONFIG,
                        "%s: head_dim is missing, and hidden_size / num_attention_heads is %zu", object.path,
                        c->head_dim);
    result = gai_parse_rotation(c, values);
    if (result == GA_OK) result = gai_parse_gate(c, values);
    if (result != GA_OK || !values[GAI_HF_gated_attention].at) return result;
    bool headwise = gai_switch(c, GA_HEADWISE), elementwise = gai_switch(c, GA_ELEMENTWISE);
    result = gai_parse_own_keys(c, values, keep_length);
    if (result != GA_OK) return result;
    if (headwise != gai_switch(c, GA_HEADWISE) || elementwise != gai_switch(c, GA_ELEMENTWISE))
        return gai_fail(object.e, GA_ERR_FORMAT, "%s: %s = %d and %s = %d contradict the gate in gated_attention",
                        object.path, hf[GAI_HF_headwise_attn_output_gate].name, headwise,
                        hf[GAI_HF_elementwise_attn_output_gate].name, elementwise);
    return GA_OK;
}

/* ---- directories ----
 *
 * ga_save writes everything to <directory>.partial, syncs it, and then
 *     renames <directory>          to <directory>.replaced   (if there is one)
 *     renames <directory>.partial  to <directory>
 *     clears  <directory>.replaced
 * Stopped before the first rename, the old checkpoint is where it was; between the two, readers find it under its other
 * name; after that, the new one is whole. The next ga_save clears what is left over. One process at a time may save to
 * one directory. */

/* The directory's name without slashes at its end, and a suffix. */
GAI_FN ga_result gai_directory(char path[GAI_PATH], const char *directory, const char *suffix, ga_error *e) {
    size_t n = strlen(directory);
    if (n == 0) return gai_fail(e, GA_ERR_FILE, "the name of a checkpoint's directory is empty");
    while (n > 1 && directory[n - 1] == '/') n--;
    if (n + strlen(suffix) >= GAI_PATH) return gai_fail(e, GA_ERR_FILE, "%.128s...: the path is too long", directory);
    memcpy(path, directory, n);
    memcpy(path + n, suffix, strlen(suffix) + 1);
    return GA_OK;
}

/* Where to read a checkpoint. */
GAI_FN ga_result gai_locate(char path[GAI_PATH], const char *directory, ga_error *e) {
    char replaced[GAI_PATH];
    ga_result result = gai_directory(path, directory, "", e);
    if (result == GA_OK) result = gai_directory(replaced, directory, ".replaced", e);
    if (result == GA_OK && !gai_exists(path) && gai_exists(replaced)) memcpy(path, replaced, strlen(replaced) + 1);
    return result;
}

GAI_FN bool gai_is_ours(const char *name) {
    static const char *const files[] = {"config.json", "training_state.json", "model.safetensors",
                                        "optimizer.safetensors", "model.safetensors.index.json"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        if (strcmp(name, files[i]) == 0) return true;
    return strncmp(name, "model-", 6) == 0 && gai_has_end(name, ".safetensors");
}

/* Removes a directory that held a checkpoint. Whatever else lay in it, such as a tokenizer, moves to `heir`, or with
 * NULL stays. Nothing here can fail in a way that matters: what is left, the next ga_save meets again. */
GAI_FN void gai_clear(const char *directory, const char *heir) {
    char from[GAI_PATH], to[GAI_PATH];
    DIR *d = opendir(directory);
    if (!d) return;
    for (struct dirent *entry; (entry = readdir(d)) != NULL;) {
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0) continue;
        if (gai_path(from, directory, "/", name, NULL) != GA_OK) continue;
        if (gai_is_ours(name))
            remove(from);
        else if (heir && gai_path(to, heir, "/", name, NULL) == GA_OK && !gai_exists(to))
            rename(from, to);
    }
    closedir(d);
    rmdir(directory);
}

GAI_FN ga_result gai_make_parents(const char *directory, ga_error *e) {
    char path[GAI_PATH];
    for (const char *slash = strchr(directory + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        size_t n = (size_t)(slash - directory);
        memcpy(path, directory, n);
        path[n] = '\0';
        if (gai_make_directory(path) != 0 && !gai_exists(path)) return gai_file_error(e, "create", path);
    }
    return GA_OK;
}

GAI_FN ga_result gai_sync_parent(const char *directory, ga_error *e) {
    char path[GAI_PATH];
    const char *slash = strrchr(directory, '/');
    size_t n = slash ? (size_t)(slash - directory) : 0;
    memcpy(path, directory, n);
    path[n] = '\0';
    return gai_sync_directory(n > 0 ? path : slash ? "/" : ".", e);
}

GAI_FN ga_result gai_replace(const char *directory, const char *partial, const char *replaced, ga_error *e) {
    bool existed = gai_exists(directory);
    if (existed && rename(directory, replaced) != 0) return gai_file_error(e, "rename", directory);
    if (rename(partial, directory) != 0) {
        ga_result result = gai_file_error(e, "rename", partial);
        if (existed) rename(replaced, directory);
        return result;
    }
    ga_result result = gai_sync_parent(directory, e);
    if (result == GA_OK) gai_clear(replaced, directory);
    return result;
}

/* ---- training state ---------------------------------------------------------------------------------------------- */

enum { GAI_STATE_NUMBERS = 5 };

GAI_FN const char *const *gai_state_names(void) {
    static const char *const names[] = {"step", "windows", "tokens", "random", "updates", "best_val_loss"};
    return names;
}

GAI_FN ga_result gai_save_state(const ga_model *m, const char *directory, const ga_training_state *state, ga_error *e) {
    const uint64_t values[] = {state->step, state->windows, state->tokens, state->random, m->updates};
    char path[GAI_PATH], buffer[1024];
    gai_text t = {buffer, 0, sizeof buffer};
    ga_result result = gai_path(path, directory, "/", "training_state.json", e);
    if (result != GA_OK) return result;
    gai_print(&t, "{");
    for (size_t i = 0; i < GAI_STATE_NUMBERS; i++)
        gai_print(&t, "\n  \"%s\": \"%llu\",", gai_state_names()[i], (unsigned long long)values[i]);
    gai_print(&t, "\n  \"%s\": ", gai_state_names()[GAI_STATE_NUMBERS]);
    char best[32] = "null";
    if (isfinite(state->best_val_loss)) gai_print_real(best, sizeof best, 17, state->best_val_loss);
    gai_print(&t, "%s\n}\n", best);
    return gai_write_file(path, &t, e);
}

GAI_FN ga_result gai_parse_state(ga_training_state *state, uint64_t *updates, gai_json object) {
    uint64_t *const numbers[] = {&state->step, &state->windows, &state->tokens, &state->random, updates};
    gai_json values[GAI_STATE_NUMBERS + 1], *best = &values[GAI_STATE_NUMBERS];
    ga_result result = gai_json_members(object, gai_state_names(), GAI_STATE_NUMBERS + 1, values, false);
    if (result != GA_OK) return result;
    for (size_t i = 0; i < GAI_STATE_NUMBERS; i++) {
        char *text;
        if (!values[i].at || !gai_json_string(&values[i], &text) ||
            !gai_parse_u64(text, text + strlen(text), numbers[i]))
            return gai_fail(object.e, GA_ERR_FORMAT, "%s: %s is no whole number in quotes", object.path,
                            gai_state_names()[i]);
    }
    char *end = NULL;
    state->best_val_loss = best->at ? gai_real_of(best->at, &end) : INFINITY;
    if (best->at && (!gai_json_number(best) || best->at != end || !isfinite(state->best_val_loss)))
        return gai_fail(object.e, GA_ERR_FORMAT, "%s: best_val_loss is no number", object.path);
    return GA_OK;
}

GAI_FN ga_result gai_load_state(ga_model *m, const char *directory, ga_training_state *state, ga_error *e) {
    char path[GAI_PATH], *text = NULL;
    gai_json object;
    ga_training_state read;
    uint64_t updates;
    gai_contents moments = gai_moments_of(m);
    if (m->mode != GA_TRAINING)
        return gai_fail(e, GA_ERR_INPUT, "the model was made for inference: it holds no training state");
    ga_result result = gai_path(path, directory, "/", "training_state.json", e);
    if (result == GA_OK) result = gai_json_load(&object, path, &text, e);
    if (result == GA_OK) result = gai_parse_state(&read, &updates, object);
    if (result == GA_OK) result = gai_load_tensors(m, directory, "/optimizer", &moments, e);
    if (moments.shares[0]) gai_clear_gradients(m);
    GA_FREE(text);
    if (result != GA_OK) return result;
    *state = read;
    m->updates = updates;
    return GA_OK;
}

/* ---- checkpoints: the public functions --------------------------------------------------------------------------- */

GAI_FN ga_result gai_save_files(ga_model *m, const char *directory, const ga_training_state *state, ga_error *e) {
    gai_contents weights = gai_weights_of(m), moments = gai_moments_of(m);
    ga_result result = gai_save_config(m, directory, e);
    if (result == GA_OK) result = gai_save_tensors(m, directory, "/model", &weights, e);
    if (result == GA_OK && state) result = gai_save_tensors(m, directory, "/optimizer", &moments, e);
    if (result == GA_OK && state) result = gai_save_state(m, directory, state, e);
    return result == GA_OK ? gai_sync_directory(directory, e) : result;
}

GAI_FN ga_result gai_save(ga_model *m, const char *directory, const ga_training_state *state, ga_error *e) {
    char path[GAI_PATH], partial[GAI_PATH], replaced[GAI_PATH];
    struct stat s;
    if (state && m->mode != GA_TRAINING)
        return gai_fail(e, GA_ERR_INPUT, "the model was made for inference: it holds no training state");
    if (m->mode == GA_MAPPED)
        return gai_fail(e, GA_ERR_INPUT, "the model's weights are mapped: they are in a checkpoint already");
    ga_result result = gai_directory(path, directory, "", e);
    if (result == GA_OK) result = gai_directory(partial, directory, ".partial", e);
    if (result == GA_OK) result = gai_directory(replaced, directory, ".replaced", e);
    if (result == GA_OK) result = gai_make_parents(path, e);
    if (result != GA_OK) return result;
    if (gai_link_status(path, &s) == 0 && !S_ISDIR(s.st_mode))
        return gai_fail(e, GA_ERR_FILE, "%s: is no directory, so that a checkpoint cannot replace it", path);
    gai_clear(partial, NULL);
    if (gai_exists(path))
        gai_clear(replaced, path);
    else
        rename(replaced, path);
    if (gai_make_directory(partial) != 0) return gai_file_error(e, "create", partial);
    result = gai_save_files(m, partial, state, e);
    if (result == GA_OK) result = gai_replace(path, partial, replaced, e);
    if (result != GA_OK) gai_clear(partial, NULL);
    return result;
}

GA_API ga_result ga_save(ga_model *m, const char *directory, const ga_training_state *state, ga_error *e) {
    const ga_ranks *ranks = gai_ranks(m);
    if (!ranks) return gai_save(m, directory, state, e);
    gai_order order = {GAI_SAVED, {GA_OK, ""}};
    ga_result result = ranks->rank > 0 ? gai_serve_rank_0(m, e) : gai_save(m, directory, state, &order.end);
    if (ranks->rank == 0) {
        order.end.result = result;
        ranks->broadcast(ranks->state, &order, sizeof order);
        if (result != GA_OK) gai_fail(e, result, "%s", order.end.text);
    }
    if (state) gai_clear_gradients(m);
    return result == GA_OK ? gai_status(m, e) : result;
}

GAI_FN ga_result gai_load_config(ga_config *c, const char *directory, bool keep_length, gai_source *source,
                                 ga_error *e) {
    char found[GAI_PATH], path[GAI_PATH], *text = NULL;
    ga_config read = *c;
    gai_json object;
    ga_result result = gai_locate(found, directory, e);
    if (result == GA_OK) result = gai_path(path, found, "/", "config.json", e);
    if (result == GA_OK) result = gai_json_load(&object, path, &text, e);
    if (result == GA_OK) result = gai_parse_config(&read, object, keep_length, source);
    GA_FREE(text);
    if (result == GA_OK) *c = read;
    return result;
}

GA_API ga_result ga_load_config(ga_config *c, const char *directory, bool keep_length, ga_error *e) {
    gai_source source;
    return gai_load_config(c, directory, keep_length, &source, e);
}

/* Tensors of equal shape may still belong to another model: sigmoid or SiLU, another base of RoPE. What concerns only
 * training may differ. */
GAI_FN ga_result gai_check_model(const ga_model *m, const char *directory, gai_source *source, ga_error *e) {
    ga_config c = m->config;
    ga_result result = gai_load_config(&c, directory, true, source, e);
    for (size_t i = 0; result == GA_OK && i < GAI_KEY_COUNT; i++) {
        const gai_key *k = &gai_keys()[i];
        char stored[GA_TEXT], own[GA_TEXT];
        bool training = i == GAI_KEY_init_std || i == GAI_KEY_gate_init_std || i == GAI_KEY_gate_frozen ||
                        i == GAI_KEY_attn_clip || i == GAI_KEY_ffn_clip || i == GAI_KEY_load_balance_coef ||
                        i == GAI_KEY_router_z_coef;
        bool routing = i == GAI_KEY_experts_per_token || i == GAI_KEY_normalize_top_k;
        if (routing && m->config.n_experts == 0) continue;
        bool gate = strcmp(k->group, "GATE") == 0 && i != GAI_KEY_gate_position;
        if (training || (gate && m->config.gate_position == GA_NO_GATE)) continue;
        ga_config_get(&c, k->name, stored, sizeof stored);
        ga_config_get(&m->config, k->name, own, sizeof own);
        if (strcmp(stored, own) != 0)
            return gai_fail(e, GA_ERR_MISMATCH, "%s: %s is %s in the checkpoint and %s in the model", directory,
                            k->name, stored, own);
    }
    return result;
}

GA_API ga_result ga_load(ga_model *m, const char *directory, ga_training_state *state, ga_error *e) {
    char path[GAI_PATH];
    gai_source source;
    gai_contents weights = gai_weights_of(m);
    ga_result result = gai_locate(path, directory, e);
    if (result == GA_OK) result = gai_check_model(m, path, &source, e);
    if (result == GA_OK && source.by_head) weights.layout = GAI_GATE_BY_HEAD;
    if (result == GA_OK) result = gai_load_tensors(m, path, "/model", &weights, e);
    if (result == GA_OK && state) result = gai_load_state(m, path, state, e);
    if (result == GA_OK && m->mode != GA_MAPPED) gai_weights_are_set(m);
    return result == GA_OK ? gai_status(m, e) : result;
}

GAI_FN bool gai_is_position_key(const char *name) {
    return strncmp(name, "rope_", 5) == 0;
}

GAI_PRINTF(3, 4) GAI_FN void gai_add_change(char *changes, size_t size, const char *format, ...) {
    size_t used = strlen(changes), mark = used > 0 && used + 2 < size ? 2 : 0;
    va_list arguments;
    if (mark > 0) memcpy(changes + used, "; ", 3);
    va_start(arguments, format);
    vsnprintf(changes + used + mark, size - used - mark, format, arguments);
    va_end(arguments);
}

/* *from: m's configuration, with the positions of the checkpoint, and without a gate where it has none. */
GAI_FN ga_result gai_compare_start(ga_config *from, const ga_model *m, const char *directory, char *changes,
                                   size_t size, ga_error *e) {
    ga_config stored = m->config;
    ga_result result = ga_load_config(&stored, directory, false, e);
    *from = m->config;
    for (size_t i = 0; result == GA_OK && i < GAI_KEY_COUNT; i++) {
        const char *name = gai_keys()[i].name;
        char theirs[GA_TEXT], ours[GA_TEXT];
        if (!gai_is_position_key(name)) continue;
        ga_config_get(&stored, name, theirs, sizeof theirs);
        ga_config_get(from, name, ours, sizeof ours);
        if (strcmp(theirs, ours) == 0) continue;
        gai_add_change(changes, size, "%s was %s", name, theirs);
        result = ga_config_set(from, name, theirs, e);
    }
    if (result == GA_OK && stored.max_seq_len != m->config.max_seq_len)
        gai_add_change(changes, size, "max_seq_len was %zu", stored.max_seq_len);
    if (result == GA_OK && stored.gate_position == GA_NO_GATE) from->gate_position = GA_NO_GATE;
    return result;
}

/* Weights of a checkpoint whose keys are `from`: for the checks, since m's own positions were laid out
 * when m was made. */
GAI_FN ga_result gai_load_from(ga_model *m, ga_config from, const char *directory, ga_error *e) {
    ga_config own = m->config;
    m->config = from;
    ga_result result = ga_load(m, directory, NULL, e);
    m->config = own;
    return result;
}

/* The ungated model is read into a model of its own; what m has beyond it stays as it was made. */
GAI_FN ga_result gai_start_gate(ga_model *m, ga_config from, const char *directory, char *changes, size_t size,
                                ga_error *e) {
    from.batch_size = from.max_seq_len = 1;
    ga_error failure;
    ga_model *ungated = ga_open(&from, NULL, GA_INFERENCE, directory, &failure);
    if (!ungated) return gai_fail(e, failure.result, "%s", failure.text);
    gai_add_change(changes, size, "it had no gate, whose %zu weights start fresh", m->n_weights - ungated->n_weights);
    const ga_tensor *own = m->tensors; /* in the same order, with the gate's between them */
    for (size_t i = 0; i < ungated->n_tensors; i++, own++) {
        const ga_tensor *t = &ungated->tensors[i];
        while (strcmp(own->name, t->name) != 0) own++;
        m->device.copy_in(m->device.state, m->weights + own->offset, ungated->weights + t->offset,
                          t->rows * t->columns * sizeof(ga_real));
    }
    ga_destroy(ungated);
    gai_weights_are_set(m);
    return gai_status(m, e);
}

GA_API ga_result ga_start_from(ga_model *m, const char *directory, char *changes, size_t size, ga_error *e) {
    ga_config from;
    char unwanted[1];
    if (!changes) {
        changes = unwanted;
        size = sizeof unwanted;
    }
    changes[0] = '\0';
    ga_result result = gai_compare_start(&from, m, directory, changes, size, e);
    if (result != GA_OK) return result;
    if (from.gate_position != m->config.gate_position) return gai_start_gate(m, from, directory, changes, size, e);
    return gai_load_from(m, from, directory, e);
}

GA_API ga_model *ga_open(const ga_config *c, const ga_device *device, ga_mode mode, const char *directory,
                         ga_error *e) {
    char changes[GA_TEXT] = "";
    ga_config from;
    ga_model *m = gai_create(c, device, mode, false, e);
    ga_result result = m ? gai_compare_start(&from, m, directory, changes, sizeof changes, e) : GA_ERR_MEMORY;
    if (result == GA_OK && from.gate_position != c->gate_position)
        result = gai_fail(e, GA_ERR_MISMATCH, "%s: is a model without a gate", directory);
    if (result == GA_OK) result = gai_load_from(m, from, directory, e);
    if (result == GA_OK) return m;
    ga_destroy(m);
    return NULL;
}

GAI_FN bool gai_has_file(const char *directory, const char *name) {
    char path[GAI_PATH];
    struct stat s;
    return gai_path(path, directory, "/", name, NULL) == GA_OK && stat(path, &s) == 0 && S_ISREG(s.st_mode);
}

GA_API bool ga_checkpoint_exists(const char *directory, bool with_state) {
    char path[GAI_PATH];
    if (gai_locate(path, directory, NULL) != GA_OK || !gai_has_file(path, "config.json")) return false;
    if (!gai_has_file(path, "model.safetensors") && !gai_has_file(path, "model.safetensors.index.json")) return false;
    return !with_state || (gai_has_file(path, "optimizer.safetensors") && gai_has_file(path, "training_state.json"));
}

GAI_FN const char *gai_packing(const ga_model *m, gai_layout layout) {
    if (m->sizes.G == 0) return NULL;
    if (layout == GAI_GATE_BY_HEAD) return "in q_proj, behind the queries of each head";
    if (layout == GAI_GATE_BY_GROUP) return "in q_proj, behind the queries of each key-value group";
    return "in a tensor of its own, self_attn.gate.weight";
}

GAI_FN void gai_take_inventory(const gai_tensor_files *all, ga_inventory *inventory) {
    for (int k = 0; k < GAI_DTYPES; k++) inventory->types[k] = gai_dtype_name(k);
    inventory->files = all->n;
    for (size_t i = 0; i < all->n; i++) {
        const gai_tensor_file *f = &all->files[i];
        inventory->bytes += f->size;
        inventory->tensors += f->n;
        for (size_t k = 0; k < f->n; k++) {
            const gai_entry *t = &f->entries[k];
            inventory->values[t->type] += (t->end - t->begin) / gai_dtype_size(t->type);
        }
    }
}

GA_API ga_result ga_inspect(const char *directory, ga_config *c, ga_inventory *inventory, ga_error *e) {
    char path[GAI_PATH];
    gai_source source;
    gai_reader r;
    ga_model m;
    memset(inventory, 0, sizeof *inventory);
    memset(&m, 0, sizeof m);
    ga_result result = gai_locate(path, directory, e);
    if (result == GA_OK) result = gai_load_config(c, path, false, &source, e);
    if (result == GA_OK) result = ga_config_check(c, e);
    if (result != GA_OK) return result;
    gai_set_shape(&m, c, GA_INFERENCE);
    uint64_t weights;
    m.n_tensors = gai_list_tensors(c, NULL, &weights);
    m.n_weights = (size_t)weights;
    m.tensors = (ga_tensor *)gai_zeroed(m.n_tensors * sizeof *m.tensors);
    if (!m.tensors) return gai_fail(e, GA_ERR_MEMORY, "%s: no memory for the list of its tensors", path);
    gai_list_tensors(c, m.tensors, NULL);
    gai_contents contents = gai_weights_of(&m);
    if (source.by_head) contents.layout = GAI_GATE_BY_HEAD;
    memcpy(inventory->family, source.family, sizeof source.family);
    memcpy(inventory->version, source.version, sizeof source.version);
    inventory->packing = gai_packing(&m, contents.layout);
    result = gai_reader_open(&r, &m, path, "/model", &contents, e);
    if (result == GA_OK) gai_take_inventory(&r.files, inventory);
    gai_reader_close(&r);
    GA_FREE(m.tensors);
    return result;
}

#ifdef __cplusplus
}
#endif
#endif /* GATED_ATTENTION_IMPLEMENTATION */

#pragma pop_macro("I")

/* MIT License
 *
 * Copyright (c) 2026 The gated_attention.h authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
 * documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
 * rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
 * permit persons to whom the Software is furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
 * Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
 * WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
 * COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
 * OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 */
