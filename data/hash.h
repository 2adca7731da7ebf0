/* data/hash.h - the two hash tables of the tokenizer, with open addressing: bytes -> number, and pair of ids -> number.
 *
 *     data_map words = {0};
 *     if (!data_map_put(&words, "the", 3, 42)) return out_of_memory();
 *     uint64_t value;
 *     if (data_map_get(&words, "the", 3, &value)) use(value);
 *     data_map_free(&words);
 *
 * Each table has a seed of its own, so that nobody can write a file whose keys all meet in one place.
 *
 * The file that defines DATA_IMPLEMENTATION holds the code.
 */
#ifndef DATA_HASH_H
#define DATA_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* 64 bits that depend on every one of n bytes; not for passwords. `seed`: the hash of what came before, or 0. */
uint64_t data_hash(const void *bytes, size_t n, uint64_t seed);

typedef struct {
    uint64_t hash, value;
    size_t offset, length; /* of the key in `keys` */
} data_map_entry;

typedef struct {
    data_map_entry *entries; /* count of them, in the order in which they came */
    uint32_t *slots;         /* index of an entry + 1; 0: free */
    size_t capacity, count, room;
    char *keys; /* all keys, one behind the other */
    size_t keys_size, keys_room;
    uint64_t seed;
} data_map;

bool data_map_get(const data_map *m, const char *key, size_t n, uint64_t *value);
/* Adds a key, or replaces its value; false: out of memory. */
bool data_map_put(data_map *m, const char *key, size_t n, uint64_t value);
/* The place of a key's value, which is 0 where the key is new; NULL: out of memory. */
uint64_t *data_map_at(data_map *m, const char *key, size_t n);
void data_map_clear(data_map *m);
void data_map_free(data_map *m);

typedef struct {
    uint64_t *keys; /* UINT64_MAX: free */
    uint32_t *values;
    size_t capacity, count;
    uint64_t seed;
} data_pairs;

static inline uint64_t data_pair(int32_t a, int32_t b) {
    return (uint64_t)(uint32_t)a << 32 | (uint32_t)b;
}

uint32_t data_pairs_get(const data_pairs *p, uint64_t key, uint32_t otherwise);
bool data_pairs_put(data_pairs *p, uint64_t key, uint32_t value);
void data_pairs_free(data_pairs *p);

#endif

#if defined(DATA_IMPLEMENTATION) && !defined(DATA_HASH_IMPLEMENTED)
#define DATA_HASH_IMPLEMENTED

#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t datai_hash_word(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 32;
}

uint64_t data_hash(const void *bytes, size_t n, uint64_t seed) {
    const unsigned char *p = (const unsigned char *)bytes;
    uint64_t hash = datai_hash_word(seed, n), word = 0;
    for (; n >= 8; n -= 8, p += 8) {
        memcpy(&word, p, 8);
        hash = datai_hash_word(hash, word);
    }
    if (n == 0) return hash;
    word = 0;
    memcpy(&word, p, n);
    return datai_hash_word(hash, word);
}

/* The nanosecond and the address of a table when it is first needed. */
static uint64_t datai_hash_seed(const void *table) {
    struct timespec now = {0};
    timespec_get(&now, TIME_UTC);
    return datai_hash_word((uint64_t)(uintptr_t)table, (uint64_t)now.tv_nsec);
}

/* The slot of a key, or the free one where it belongs. */
static size_t datai_map_slot(const data_map *m, const char *key, size_t n, uint64_t hash) {
    size_t mask = m->capacity - 1, slot = hash & mask;
    for (; m->slots[slot]; slot = (slot + 1) & mask) {
        const data_map_entry *entry = &m->entries[m->slots[slot] - 1];
        if (entry->hash == hash && entry->length == n && memcmp(m->keys + entry->offset, key, n) == 0) break;
    }
    return slot;
}

static bool datai_map_grow(data_map *m) {
    size_t capacity = m->capacity ? 2 * m->capacity : 256;
    uint32_t *slots = calloc(capacity, sizeof *slots);
    data_map_entry *entries = realloc(m->entries, capacity / 2 * sizeof *entries);
    if (entries) m->entries = entries;
    if (!slots || !entries || capacity > UINT32_MAX) {
        free(slots);
        return false;
    }
    if (!m->capacity) m->seed = datai_hash_seed(entries);
    for (size_t i = 0; i < m->count; i++) {
        size_t slot = entries[i].hash & (capacity - 1);
        while (slots[slot]) slot = (slot + 1) & (capacity - 1);
        slots[slot] = (uint32_t)(i + 1);
    }
    free(m->slots);
    m->slots = slots;
    m->capacity = capacity;
    m->room = capacity / 2;
    return true;
}

static bool datai_map_keep_key(data_map *m, const char *key, size_t n) {
    if (m->keys_room - m->keys_size < n) {
        size_t room = 2 * m->keys_room + n + 4096;
        char *keys = realloc(m->keys, room);
        if (!keys) return false;
        m->keys = keys;
        m->keys_room = room;
    }
    if (n > 0) memcpy(m->keys + m->keys_size, key, n);
    m->keys_size += n;
    return true;
}

bool data_map_get(const data_map *m, const char *key, size_t n, uint64_t *value) {
    if (m->count == 0) return false;
    size_t slot = datai_map_slot(m, key, n, data_hash(key, n, m->seed));
    if (!m->slots[slot]) return false;
    *value = m->entries[m->slots[slot] - 1].value;
    return true;
}

uint64_t *data_map_at(data_map *m, const char *key, size_t n) {
    if (m->count == m->room && !datai_map_grow(m)) return NULL;
    uint64_t hash = data_hash(key, n, m->seed);
    size_t slot = datai_map_slot(m, key, n, hash);
    if (!m->slots[slot]) {
        if (!datai_map_keep_key(m, key, n)) return NULL;
        m->entries[m->count++] = (data_map_entry){hash, 0, m->keys_size - n, n};
        m->slots[slot] = (uint32_t)m->count;
    }
    return &m->entries[m->slots[slot] - 1].value;
}

bool data_map_put(data_map *m, const char *key, size_t n, uint64_t value) {
    uint64_t *place = data_map_at(m, key, n);
    if (place) *place = value;
    return place != NULL;
}

void data_map_clear(data_map *m) {
    if (m->count > 0) memset(m->slots, 0, m->capacity * sizeof *m->slots);
    m->count = m->keys_size = 0;
}

void data_map_free(data_map *m) {
    free(m->entries);
    free(m->slots);
    free(m->keys);
    *m = (data_map){0};
}

static size_t datai_pairs_slot(const data_pairs *p, uint64_t key) {
    size_t mask = p->capacity - 1, slot = datai_hash_word(p->seed, key) & mask;
    while (p->keys[slot] != UINT64_MAX && p->keys[slot] != key) slot = (slot + 1) & mask;
    return slot;
}

static bool datai_pairs_grow(data_pairs *p) {
    data_pairs larger = {.capacity = p->capacity ? 2 * p->capacity : 256, .count = p->count, .seed = p->seed};
    larger.keys = malloc(larger.capacity * sizeof *larger.keys);
    larger.values = malloc(larger.capacity * sizeof *larger.values);
    if (!larger.keys || !larger.values) {
        data_pairs_free(&larger);
        return false;
    }
    memset(larger.keys, 0xFF, larger.capacity * sizeof *larger.keys);
    if (!p->capacity) larger.seed = datai_hash_seed(larger.keys);
    for (size_t i = 0; i < p->capacity; i++) {
        if (p->keys[i] == UINT64_MAX) continue;
        size_t slot = datai_pairs_slot(&larger, p->keys[i]);
        larger.keys[slot] = p->keys[i];
        larger.values[slot] = p->values[i];
    }
    data_pairs_free(p);
    *p = larger;
    return true;
}

uint32_t data_pairs_get(const data_pairs *p, uint64_t key, uint32_t otherwise) {
    if (p->count == 0) return otherwise;
    size_t slot = datai_pairs_slot(p, key);
    return p->keys[slot] == key ? p->values[slot] : otherwise;
}

bool data_pairs_put(data_pairs *p, uint64_t key, uint32_t value) {
    if (2 * p->count >= p->capacity && !datai_pairs_grow(p)) return false;
    size_t slot = datai_pairs_slot(p, key);
    p->count += p->keys[slot] != key;
    p->keys[slot] = key;
    p->values[slot] = value;
    return true;
}

void data_pairs_free(data_pairs *p) {
    free(p->keys);
    free(p->values);
    *p = (data_pairs){0};
}

#endif
