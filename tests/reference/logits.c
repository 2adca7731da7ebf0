/* logits.c - the C side of round_trip.py: reads a checkpoint, computes logits, and writes the checkpoint again.
 *
 *     logits READ TOKENS LOGITS [WRITTEN]
 *
 * TOKENS: int32, one sequence; LOGITS becomes float32, (T, V); WRITTEN: a directory for ga_save.
 */
#define GATED_ATTENTION_IMPLEMENTATION
#include "../../gated_attention.h"

enum { MOST = 4096 };

static int fail(const char *what) {
    fprintf(stderr, "logits: %s\n", what);
    return 1;
}

int main(int argc, char **argv) {
    static int32_t tokens[MOST];
    ga_error e;
    ga_config c = ga_config_default();
    if (argc < 4) return fail("usage: logits READ TOKENS LOGITS [WRITTEN]");
    FILE *in = fopen(argv[2], "rb"), *out = fopen(argv[3], "wb");
    if (!in || !out) return fail("cannot open TOKENS or LOGITS");
    size_t T = fread(tokens, sizeof *tokens, MOST, in);
    fclose(in);
    if (ga_load_config(&c, argv[1], false, &e)) return fail(e.text);
    c.batch_size = 1;
    ga_model *m = ga_create(&c, NULL, GA_INFERENCE, &e);
    if (!m || ga_load(m, argv[1], NULL, &e) || ga_forward(m, tokens, NULL, 1, T, NULL, NULL, &e)) return fail(e.text);
    ga_real *logits = (ga_real *)malloc(T * m->sizes.V * sizeof *logits);
    if (!logits) return fail("out of memory");
    if (ga_logits(m, 0, T, logits, &e)) return fail(e.text);
    if (fwrite(logits, sizeof *logits, T * m->sizes.V, out) != T * m->sizes.V || fclose(out))
        return fail("cannot write");
    if (argc > 4 && ga_save(m, argv[4], NULL, &e)) return fail(e.text);
    free(logits);
    ga_destroy(m);
    return 0;
}
