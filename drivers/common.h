/* drivers/common.h - small things that train and analyze both need.
 */
#ifndef DRIVERS_COMMON_H
#define DRIVERS_COMMON_H

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool ends_with(const char *text, const char *ending) {
    size_t n = strlen(text), k = strlen(ending);
    return n >= k && strcmp(text + n - k, ending) == 0;
}

/* 1234567 as 1,234,567 */
static const char *grouped(uint64_t n, char text[32]) {
    char digits[32];
    int length = snprintf(digits, sizeof digits, "%" PRIu64, n), used = 0;
    for (int i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0) text[used++] = ',';
        text[used++] = digits[i];
    }
    text[used] = 0;
    return text;
}

/* Why the program ends: one line, whatever a name holds. */
static void print_failure(const char *program, char *text) {
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    fprintf(stderr, "%s: %s\n", program, text);
}

/* False, with what went wrong in e. */
#define fail_with(e, result, ...) (gai_fail((e), (result), __VA_ARGS__) == GA_OK)

#endif
