/* Generation against the speed of memory: each new token reads every weight once but those of the embedding, so the
 * limit is how fast a loop that only adds up the same weights reads them, measured in the same run.
 *
 *     make build/bench/generation && build/bench/generation [CONFIG.cfg [tokens]] */
#define _POSIX_C_SOURCE 200809L
#define GATED_ATTENTION_IMPLEMENTATION
#include "gated_attention.h"
#include "gated_attention_x86.h"

enum { ROUNDS = 5 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Bytes a second of the best of a few passes over w. */
static double read_speed(const float *w, size_t n, float *total) {
    enum { SUMS = 128, PIECE = 1 << 16 };
    double best = 0;
    for (int round = 0; round < ROUNDS; round++) {
        double begin = now(), sum = 0;
#ifdef _OPENMP
#pragma omp parallel for reduction(+ : sum)
#endif
        for (size_t i = 0; i < n / PIECE; i++) {
            float sums[SUMS] = {0};
            for (size_t j = i * PIECE; j < (i + 1) * PIECE; j += SUMS)
                for (size_t k = 0; k < SUMS; k++) sums[k] += w[j + k];
            for (size_t k = 0; k < SUMS; k++) sum += (double)sums[k];
        }
        best = fmax(best, (double)(n / PIECE * PIECE * sizeof *w) / (now() - begin));
        *total += (float)sum;
    }
    return best;
}

int main(int argc, char **argv) {
    ga_error e;
    ga_config c = ga_config_default();
    ga_device device;
    size_t tokens = argc > 2 ? strtoul(argv[2], NULL, 10) : 128;
    float total = 0;
    if (ga_config_load(&c, argc > 1 ? argv[1] : "configs/rtx4060.cfg", &e) != GA_OK ||
        ga_device_x86(&device, (ga_x86_settings){NULL, false}, &e) != GA_OK) {
        fprintf(stderr, "%s\n", e.text);
        return 1;
    }
    tokens = tokens < 1 ? 1 : tokens < c.max_seq_len ? tokens : c.max_seq_len;
    ga_model *m = ga_create(&c, &device, GA_INFERENCE, &e);
    ga_generator *g = m ? ga_generator_create(m, tokens, &e) : NULL;
    float *logits = (float *)malloc(c.vocab_size * sizeof *logits);
    if (!g || !logits) {
        fprintf(stderr, "%s\n", g ? "no memory" : e.text);
        return 1;
    }
    size_t embedding = c.tied_embeddings ? 0 : c.vocab_size * c.d_model;
    const float *read = m->weights + embedding;
    size_t n = m->n_weights - embedding;
    double memory = 0, best = 0;
    for (int round = 0; round < ROUNDS; round++) {
        memory = fmax(memory, read_speed(read, n, &total));
        int32_t token = 0;
        ga_generator_reset(g);
        double begin = now();
        for (size_t t = 0; t < tokens; t++) {
            if (ga_generator_feed(g, &token, 1, logits, &e) != GA_OK) {
                fprintf(stderr, "%s\n", e.text);
                return 1;
            }
            token = 0;
            for (size_t v = 1; v < c.vocab_size; v++)
                if (logits[v] > logits[token]) token = (int32_t)v;
        }
        best = fmax(best, (double)tokens / (now() - begin));
    }
    double rate = best * (double)(n * sizeof *read);
    printf("%s\n", device.name);
    printf("tokens generated, one sequence    %8zu\n", tokens);
    printf("tokens per second                 %8.1f\n", best);
    printf("weights read for a token, MB      %8.1f\n", (double)(n * sizeof *read) / 1e6);
    printf("that is, GB/s                     %8.1f   %3.0f %% of what a loop that only reads them reaches (%.1f)\n",
           rate / 1e9, 100 * rate / memory, memory / 1e9);
    ga_generator_destroy(g);
    ga_destroy(m);
    ga_device_x86_destroy(&device);
    free(logits);
    return total == 12345.0f; /* so that the loop is not left out */
}
