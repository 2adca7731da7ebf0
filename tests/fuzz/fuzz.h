/* fuzz.h - what the fuzz targets share: the headers, a directory of the process's own, and what holds of a failure. */
#ifndef FUZZ_H
#define FUZZ_H

#define GATED_ATTENTION_IMPLEMENTATION
#include "../../gated_attention.h"
#define STB_DS_IMPLEMENTATION
#include <stb/stb_ds.h>
#define DATA_IMPLEMENTATION
#include "../../data/data.h"

#define FUZZ_CHECK(condition)                                               \
    do {                                                                    \
        if (!(condition)) {                                                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                        \
        }                                                                   \
    } while (0)

static char fuzz_root[64];

/* Its files are few and stay; the directory is one of the run's own (FUZZ_DIRECTORY), removed by the caller. */
static const char *fuzz_directory(void) {
    if (fuzz_root[0]) return fuzz_root;
    const char *parent = getenv("FUZZ_DIRECTORY");
    snprintf(fuzz_root, sizeof fuzz_root, "%s/XXXXXX", parent ? parent : "/tmp");
    FUZZ_CHECK(mkdtemp(fuzz_root));
    return fuzz_root;
}

/* The path of a file in that directory, which becomes `size` bytes. */
static const char *fuzz_write(const char *name, const void *data, size_t size) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", fuzz_directory(), name);
    FILE *f = fopen(path, "wb");
    FUZZ_CHECK(f && fwrite(data, 1, size, f) == size && fclose(f) == 0);
    return path;
}

/* A failure says why, in one line that is safe to print. */
static void fuzz_check_line(const char *text) {
    FUZZ_CHECK(text[0]);
    for (const char *c = text; *c; c++) FUZZ_CHECK(*c != '\n' && *c != '\r');
}

#endif
