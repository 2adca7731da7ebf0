/* data/random.h - random numbers by position, and a shuffle that needs no memory.
 *
 * Whatever is drawn here depends on where it stands (seed, purpose, index) and never on what was drawn before, so a
 * stream can be entered anywhere: a stopped run goes on at window i and sees what it would have seen.
 *
 *     data_random r = data_random_at(seed, DATA_RANDOM_TRAIN, window);
 *     uint32_t token = data_random_below(&r, vocab);
 *
 *     for (uint64_t i = 0; i < n; i++) visit(data_permute(i, n, seed, epoch));   // each of 0..n-1 once
 */
#ifndef DATA_RANDOM_H
#define DATA_RANDOM_H

#include <stdint.h>

/* Each purpose has its own numbers under the same seed. The first two are the values of data_part. */
enum { DATA_RANDOM_TRAIN, DATA_RANDOM_VAL, DATA_RANDOM_SHUFFLE, DATA_RANDOM_CHAIN };

typedef struct {
    uint32_t key[2];
    uint32_t counter[4]; /* block within the stream, purpose, index (low, high) */
    uint32_t block[4];
    unsigned used; /* words of `block` already handed out */
} data_random;

/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011): ten rounds of
 *
 *     (c0, c1, c2, c3) <- (hi(B c2) ^ c1 ^ k0,  lo(B c2),  hi(A c0) ^ c3 ^ k1,  lo(A c0)),    k <- k + W
 */
static inline void data_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0;
        uint64_t b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* A stream of 2^34 words that no other (seed, purpose, index) shares. */
static inline data_random data_random_at(uint64_t seed, uint32_t purpose, uint64_t index) {
    data_random r = {.key = {(uint32_t)seed, (uint32_t)(seed >> 32)},
                     .counter = {0, purpose, (uint32_t)index, (uint32_t)(index >> 32)},
                     .used = 4};
    return r;
}

static inline uint32_t data_random_next(data_random *r) {
    if (r->used == 4) {
        data_philox(r->block, r->counter, r->key);
        r->counter[0]++;
        r->used = 0;
    }
    return r->block[r->used++];
}

static inline uint64_t data_random_next64(data_random *r) {
    uint64_t high = data_random_next(r);
    return high << 32 | data_random_next(r);
}

/* Uniform in (0, 1), both ends excluded: the middles of 2^52 equal cells, so that a logarithm is always finite. */
static inline double data_random_uniform(data_random *r) {
    return ((double)(data_random_next64(r) >> 12) + 0.5) * 0x1p-52;
}

/* Uniform in 0..n-1, n > 0, without bias: the products whose low word falls under 2^32 mod n are the surplus, and
 * drawn again. */
static inline uint32_t data_random_below(data_random *r, uint32_t n) {
    uint32_t surplus = (uint32_t)-n % n;
    uint64_t product;
    do product = (uint64_t)data_random_next(r) * n;
    while ((uint32_t)product < surplus);
    return (uint32_t)(product >> 32);
}

/* The finaliser of splitmix64: every bit of x reaches every bit of the result. */
static inline uint64_t data_mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* Where i (of 0..n-1) goes in the shuffle number `epoch` under a seed. A Feistel network permutes the 2^(2h) >= n
 * numbers of two h-bit halves,
 *
 *     (l, r) <- (r, l ^ f(r, key)),
 *
 * and following a cycle of it from a number below n leads back below n (at most four steps in the mean), which
 * permutes 0..n-1.
 */
static inline uint64_t data_permute(uint64_t i, uint64_t n, uint64_t seed, uint64_t epoch) {
    enum { ROUNDS = 8 };
    unsigned half = 0;
    while (half < 32 && (n - 1) >> (2 * half) != 0) half++;
    if (half == 0) return i;
    uint64_t mask = ((uint64_t)1 << half) - 1, key[ROUNDS];
    data_random draw = data_random_at(seed, DATA_RANDOM_SHUFFLE, epoch);
    for (int round = 0; round < ROUNDS; round++) key[round] = data_random_next64(&draw);
    do {
        uint64_t left = i >> half, right = i & mask;
        for (int round = 0; round < ROUNDS; round++) {
            uint64_t next = left ^ (data_mix(right ^ key[round]) & mask);
            left = right;
            right = next;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

#endif
