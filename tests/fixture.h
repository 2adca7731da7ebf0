/* Reads what tests/reference/make_fixtures.py writes: models and what PyTorch makes of them. Include it after
 * testing.h, and gated_attention_x86.h before it. */
#ifndef FIXTURE_H
#define FIXTURE_H

/* A file of safetensors with compact JSON and no escapes. */

typedef struct {
    char *header;        /* JSON, ends with '\0' */
    unsigned char *data; /* words of 4 bytes, F32 or I32, as this machine has them */
    size_t size;         /* of data */
} fixture;

/* n bytes of a file, the first the lowest. */
static inline uint64_t little_endian(const unsigned char *bytes, size_t n) {
    uint64_t bits = 0;
    while (n-- > 0) bits = bits << 8 | bytes[n];
    return bits;
}

static inline fixture read_fixture(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail_msg("cannot open %s", path);
    unsigned char prefix[8];
    assert_int_equal(fread(prefix, sizeof prefix, 1, file), 1);
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    size_t length = (size_t)little_endian(prefix, sizeof prefix), rest = (size_t)ftell(file) - sizeof prefix;
    assert_true(length < rest);
    fixture f = {(char *)calloc(1, length + 1), NULL, rest - length};
    f.data = (unsigned char *)malloc(f.size);
    assert_true(f.header && f.data);
    assert_int_equal(fseek(file, sizeof prefix, SEEK_SET), 0);
    assert_int_equal(fread(f.header, 1, length, file), length);
    assert_int_equal(fread(f.data, 1, f.size, file), f.size);
    fclose(file);
    for (size_t i = 0; i + 4 <= f.size; i += 4) {
        uint32_t word = (uint32_t)little_endian(f.data + i, 4);
        memcpy(f.data + i, &word, sizeof word);
    }
    return f;
}

static inline void free_fixture(fixture *f) {
    free(f->header);
    free(f->data);
}

/* The values of a tensor, or NULL when there is none; *n counts them. */
static inline const void *find_values(const fixture *f, const char *name, const char *dtype, size_t *n) {
    char opening[192];
    snprintf(opening, sizeof opening, "\"%s\":{\"dtype\":\"%s\"", name, dtype);
    const char *entry = strstr(f->header, opening);
    if (!entry) return NULL;
    const char *offsets = strstr(entry, "\"data_offsets\":[");
    size_t begin = 0, end = 0;
    assert_non_null(offsets);
    assert_int_equal(sscanf(offsets, "\"data_offsets\":[%zu,%zu]", &begin, &end), 2);
    assert_true(begin <= end && end <= f->size && begin % 4 == 0 && (end - begin) % 4 == 0);
    *n = (end - begin) / 4;
    return f->data + begin;
}

static inline const float *floats(const fixture *f, const char *name, size_t expected) {
    size_t n = 0;
    const float *x = (const float *)find_values(f, name, "F32", &n);
    if (!x) fail_msg("the fixture has no %s", name);
    if (n != expected) fail_msg("%s has %zu values, not %zu", name, n, expected);
    return x;
}

static inline const int32_t *integers(const fixture *f, const char *name, size_t expected) {
    size_t n = 0;
    const int32_t *x = (const int32_t *)find_values(f, name, "I32", &n);
    if (!x) fail_msg("the fixture has no %s", name);
    assert_int_equal(n, expected);
    return x;
}

static inline size_t count_weights(const fixture *f) {
    size_t n = 0;
    for (const char *p = f->header; (p = strstr(p, "\"weight.")); p++) n++;
    return n;
}

/* Every entry of the metadata is a key of the configuration, but for the batch's two sizes. */
static inline ga_config read_config(const fixture *f, size_t *B, size_t *T) {
    ga_config c = ga_config_default();
    const char *p = strstr(f->header, "\"__metadata__\":{");
    assert_non_null(p);
    p += strlen("\"__metadata__\":{");
    char key[64], value[64];
    int length = 0;
    for (; sscanf(p, "\"%63[^\"]\":\"%63[^\"]\"%n", key, value, &length) == 2;
         p += p[length] == ',' ? length + 1 : length) {
        ga_error e;
        if (!strcmp(key, "batch"))
            *B = strtoul(value, NULL, 10);
        else if (!strcmp(key, "seq_len"))
            *T = strtoul(value, NULL, 10);
        else
            expect_ok(ga_config_set(&c, key, value, &e), &e);
    }
    assert_int_equal(*p, '}');
    c.batch_size = *B;
    return c;
}

static inline const float *of_tensor(const fixture *f, const char *prefix, const ga_tensor *t) {
    char name[128];
    snprintf(name, sizeof name, "%s.%s", prefix, t->name);
    return floats(f, name, t->rows * t->columns);
}

static inline void load_weights(ga_model *m, const fixture *f) {
    assert_int_equal(m->n_tensors, count_weights(f));
    for (size_t i = 0; i < m->n_tensors; i++) {
        const ga_tensor *t = &m->tensors[i];
        const float *w = of_tensor(f, "weight", t);
        for (size_t j = 0; j < t->rows * t->columns; j++) m->weights[t->offset + j] = w[j];
    }
}

/* Plain C, or with GA_ISA the operators of gated_attention_x86.h for that instruction set, in float32. */
static inline ga_device fixture_device(void) {
    ga_device device = ga_device_cpu();
    ga_x86_settings settings = {NULL, false};
    ga_error e;
    if (getenv("GA_ISA")) expect_ok(ga_device_x86(&device, settings, &e), &e);
    return device;
}

#endif
