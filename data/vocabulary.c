/* data/vocabulary.c - vocabularies and tokens on the command line.
 *
 *     data/vocabulary --tokenizer DIR --encode FILE --output FILE.u32     the tokens of a file
 *     data/vocabulary --tokenizer DIR --decode FILE.u32 --output FILE     the text of tokens
 */
#define _POSIX_C_SOURCE 200809L

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define STB_DS_IMPLEMENTATION
#include <stb/stb_ds.h>
#define DATA_IMPLEMENTATION
#define GATED_ATTENTION_IMPLEMENTATION
#include "tokenizer.h"
static double now(void){struct timespec t;clock_gettime(CLOCK_MONOTONIC,&t);return t.tv_sec+1e-9*t.tv_nsec;}
int main(int argc, char **argv) {
    ga_error e;
    double t0 = now();
    data_tokenizer *t = data_tokenizer_open(argv[1], &e);
    if (!t) return fprintf(stderr, "%s\n", e.text), 1;
    fprintf(stderr, "open %.3f parts %d\n", now() - t0, t->has_parts);
    FILE *f = fopen(argv[2], "rb");
    fseek(f, 0, SEEK_END);
    size_t n = ftell(f);
    rewind(f);
    char *text = malloc(n + 1);
    fread(text, 1, n, f);
    int32_t *tokens = NULL;
    t0 = now();
    if (data_tokenizer_encode(t, text, n, argc > 4, &tokens, &e)) return fprintf(stderr, "%s\n", e.text), 1;
    t0 = now() - t0;
    fprintf(stderr, "%zu bytes %zu tokens %.3f s %.1f MB/s\n", n, arrlenu(tokens), t0, n / t0 / 1e6);
    f = fopen(argv[3], "wb");
    fwrite(tokens, 4, arrlenu(tokens), f);
    fclose(f);
    data_tokenizer_close(t);
}
