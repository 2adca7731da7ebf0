/* data/jsonl.h - the "text" of JSON Lines as one stream of bytes, from a file of any size.
 *
 * Each line is a JSON object (RFC 8259) with a string "text"; its other members may be anything and are checked and
 * skipped. The texts follow one another, unescaped to UTF-8, with one newline byte between them. Blank lines are
 * skipped. Raw bytes above 0x7F are passed on as they are.
 *
 *     data_jsonl j;
 *     data_jsonl_from_file(&j, fd, buffer, sizeof buffer);
 *     data_jsonl_point here = data_jsonl_tell(&j);
 *     size_t n = data_jsonl_read(&j, bytes, size);           // less than size: the end, or a problem
 *     if (j.problem) report(path, j.now.line, j.problem);
 *     data_jsonl_seek(&j, here);                             // the same bytes once more
 *
 * A point can be kept for as long as the file stays the same, so a sparse list of points gives random access.
 * The file that defines DATA_IMPLEMENTATION holds the code.
 */
#ifndef DATA_JSONL_H
#define DATA_JSONL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { DATA_JSONL_DEPTH = 64 }; /* deepest nesting of a skipped value */

/* A place where reading can be taken up. */
typedef struct {
    uint64_t decoded; /* bytes of text before it */
    uint64_t offset;  /* in the file */
    uint64_t line;    /* counted from 1 */
    bool in_text;     /* inside a "text", else between two lines */
    bool started;     /* a text came before, so the next one follows a newline */
} data_jsonl_point;

typedef struct {
    data_jsonl_point now; /* `offset` is filled in by data_jsonl_tell */
    const char *problem;  /* what is wrong in line now.line, NULL while all is well */

    int fd; /* -1: all is in memory */
    unsigned char *buffer;
    size_t buffer_size;
    const unsigned char *next, *end; /* bytes at hand; `end` stands at end_offset in the file */
    uint64_t end_offset;
    unsigned char unit[4]; /* an unescaped character or newline, handed out byte by byte */
    unsigned unit_size, unit_used;
    data_jsonl_point unit_start;
} data_jsonl;

void data_jsonl_from_file(data_jsonl *j, int fd, unsigned char *buffer, size_t buffer_size);
void data_jsonl_from_memory(data_jsonl *j, const void *bytes, size_t size);

/* Hands out the next n bytes of text (to nowhere if `out` is NULL) and returns how many there were. */
size_t data_jsonl_read(data_jsonl *j, unsigned char *out, size_t n);

/* The next whole text, in place of what is in the stb_ds array *text; false: the end, or a problem. Not to be mixed
 * with data_jsonl_read. */
bool data_jsonl_next(data_jsonl *j, char **text);

/* A point at, or up to three bytes before, the next byte: point.decoded says which. */
data_jsonl_point data_jsonl_tell(const data_jsonl *j);
void data_jsonl_seek(data_jsonl *j, data_jsonl_point point);

#endif

#if defined(DATA_IMPLEMENTATION) && !defined(DATA_JSONL_IMPLEMENTED)
#define DATA_JSONL_IMPLEMENTED

#include <errno.h>
#include <string.h>
#include <unistd.h>

static bool datai_jsonl_fail(data_jsonl *j, const char *problem) {
    if (!j->problem) j->problem = problem;
    return false;
}

static bool datai_jsonl_refill(data_jsonl *j) {
    if (j->fd < 0) return false;
    ssize_t n;
    do n = pread(j->fd, j->buffer, j->buffer_size, (off_t)j->end_offset);
    while (n < 0 && errno == EINTR);
    if (n < 0) return datai_jsonl_fail(j, "the file cannot be read");
    j->next = j->buffer;
    j->end = j->buffer + n;
    j->end_offset += (uint64_t)n;
    return n > 0;
}

/* The next byte, -1 at the end. */
static int datai_jsonl_peek(data_jsonl *j) {
    if (j->next == j->end && !datai_jsonl_refill(j)) return -1;
    return *j->next;
}

static int datai_jsonl_byte(data_jsonl *j) {
    int c = datai_jsonl_peek(j);
    if (c >= 0) j->next++;
    return c;
}

/* The next byte that is no blank. A newline counts as a sign, since an object ends with its line. */
static int datai_jsonl_sign(data_jsonl *j) {
    int c;
    do c = datai_jsonl_byte(j);
    while (c == ' ' || c == '\t' || c == '\r');
    return c;
}

static bool datai_jsonl_hex4(data_jsonl *j, uint32_t *value) {
    *value = 0;
    for (int i = 0; i < 4; i++) {
        int c = datai_jsonl_byte(j);
        uint32_t digit = c >= '0' && c <= '9'   ? (uint32_t)(c - '0')
                         : c >= 'a' && c <= 'f' ? (uint32_t)(c - 'a' + 10)
                         : c >= 'A' && c <= 'F' ? (uint32_t)(c - 'A' + 10)
                                                : 16;
        if (digit == 16) return datai_jsonl_fail(j, "bad JSON: \\u needs four hexadecimal digits");
        *value = *value << 4 | digit;
    }
    return true;
}

/* A code point above U+FFFF is written as two escapes: D800..DBFF for its upper ten bits, then DC00..DFFF for the
 * lower ten. */
static bool datai_jsonl_code_point(data_jsonl *j, uint32_t *code) {
    if (!datai_jsonl_hex4(j, code)) return false;
    if (*code < 0xD800 || *code > 0xDFFF) return true;
    uint32_t low;
    if (*code > 0xDBFF || datai_jsonl_byte(j) != '\\' || datai_jsonl_byte(j) != 'u')
        return datai_jsonl_fail(j, "bad JSON: a \\u surrogate without its other half");
    if (!datai_jsonl_hex4(j, &low)) return false;
    if (low < 0xDC00 || low > 0xDFFF) return datai_jsonl_fail(j, "bad JSON: a \\u surrogate without its other half");
    *code = 0x10000 + ((*code - 0xD800) << 10) + (low - 0xDC00);
    return true;
}

static unsigned datai_utf8(unsigned char out[4], uint32_t code) {
    if (code < 0x80) {
        out[0] = (unsigned char)code;
        return 1;
    }
    unsigned size = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const unsigned char lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (unsigned i = size - 1; i > 0; i--, code >>= 6) out[i] = (unsigned char)(0x80 | (code & 0x3F));
    out[0] = (unsigned char)(lead[size] | code);
    return size;
}

/* One unit of a string: a byte, or an escape as 1 to 4 bytes of UTF-8. Its closing quote has size 0. */
static bool datai_jsonl_character(data_jsonl *j, unsigned char out[4], unsigned *size) {
    int c = datai_jsonl_byte(j);
    *size = 0;
    if (c == '"') return true;
    if (c < 0 || c == '\n') return datai_jsonl_fail(j, "bad JSON: the line ends inside a string");
    if (c < 0x20) return datai_jsonl_fail(j, "bad JSON: a control character inside a string");
    *size = 1;
    out[0] = (unsigned char)c;
    if (c != '\\') return true;

    static const char names[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    c = datai_jsonl_byte(j);
    if (c == 'u') {
        uint32_t code;
        if (!datai_jsonl_code_point(j, &code)) return false;
        *size = datai_utf8(out, code);
        return true;
    }
    const char *name = c > 0 ? strchr(names, c) : NULL;
    if (!name) return datai_jsonl_fail(j, "bad JSON: unknown escape in a string");
    out[0] = (unsigned char)meanings[name - names];
    return true;
}

/* The rest of a string; says whether it is `expected`. */
static bool datai_jsonl_string(data_jsonl *j, const char *expected, bool *equal) {
    unsigned char out[4];
    unsigned size;
    *equal = true;
    for (;;) {
        if (!datai_jsonl_character(j, out, &size)) return false;
        if (size == 0) break;
        for (unsigned i = 0; i < size && *equal; i++)
            *equal = *expected != '\0' && (unsigned char)*expected++ == out[i];
    }
    *equal = *equal && *expected == '\0';
    return true;
}

static bool datai_jsonl_digits(data_jsonl *j) {
    bool any = false;
    for (int c; (c = datai_jsonl_peek(j)) >= '0' && c <= '9'; any = true) j->next++;
    return any || datai_jsonl_fail(j, "bad JSON: a number without digits");
}

/* The rest of  -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?  after its first byte c. */
static bool datai_jsonl_number(data_jsonl *j, int c) {
    if (c == '-') c = datai_jsonl_byte(j);
    if (c < '0' || c > '9') return datai_jsonl_fail(j, "bad JSON: unknown value");
    if (c != '0')
        while ((c = datai_jsonl_peek(j)) >= '0' && c <= '9') j->next++;
    if (datai_jsonl_peek(j) == '.') {
        j->next++;
        if (!datai_jsonl_digits(j)) return false;
    }
    c = datai_jsonl_peek(j);
    if (c != 'e' && c != 'E') return true;
    j->next++;
    c = datai_jsonl_peek(j);
    if (c == '+' || c == '-') j->next++;
    return datai_jsonl_digits(j);
}

static bool datai_jsonl_skip(data_jsonl *j, int c, int depth);

static bool datai_jsonl_skip_container(data_jsonl *j, int close, int depth) {
    bool ignored;
    if (depth >= DATA_JSONL_DEPTH) return datai_jsonl_fail(j, "bad JSON: nested too deeply");
    int c = datai_jsonl_sign(j);
    if (c == close) return true;
    for (;;) {
        if (close == '}') {
            if (c != '"') return datai_jsonl_fail(j, "bad JSON: expected a key in quotes");
            if (!datai_jsonl_string(j, "", &ignored)) return false;
            if (datai_jsonl_sign(j) != ':') return datai_jsonl_fail(j, "bad JSON: expected ':' after a key");
            c = datai_jsonl_sign(j);
        }
        if (!datai_jsonl_skip(j, c, depth + 1)) return false;
        c = datai_jsonl_sign(j);
        if (c == close) return true;
        if (c != ',') return datai_jsonl_fail(j, "bad JSON: expected ',' or the closing bracket");
        c = datai_jsonl_sign(j);
    }
}

/* A value of any type, after its first byte c. */
static bool datai_jsonl_skip(data_jsonl *j, int c, int depth) {
    bool ignored;
    if (c == '"') return datai_jsonl_string(j, "", &ignored);
    if (c == '[') return datai_jsonl_skip_container(j, ']', depth);
    if (c == '{') return datai_jsonl_skip_container(j, '}', depth);
    const char *rest = c == 't' ? "rue" : c == 'f' ? "alse" : c == 'n' ? "ull" : NULL;
    if (!rest) return datai_jsonl_number(j, c);
    for (; *rest; rest++)
        if (datai_jsonl_byte(j) != *rest) return datai_jsonl_fail(j, "bad JSON: unknown value");
    return true;
}

/* Members of a line's object, up to the opening quote of its "text" (*text true) or to its closing brace (*text false).
 * `after_text` says that they come behind the text, so there must be no second one.
 */
static bool datai_jsonl_members(data_jsonl *j, bool after_text, bool *text) {
    *text = false;
    for (bool first = !after_text;; first = false) {
        int c = datai_jsonl_sign(j);
        if (c == '}') return true;
        if (!first) {
            if (c != ',') return datai_jsonl_fail(j, "bad JSON: expected ',' or '}'");
            c = datai_jsonl_sign(j);
        }
        if (c != '"') return datai_jsonl_fail(j, "bad JSON: expected a key in quotes");
        if (!datai_jsonl_string(j, "text", text)) return false;
        if (datai_jsonl_sign(j) != ':') return datai_jsonl_fail(j, "bad JSON: expected ':' after a key");
        c = datai_jsonl_sign(j);
        if (!*text) {
            if (!datai_jsonl_skip(j, c, 1)) return false;
            continue;
        }
        if (after_text) return datai_jsonl_fail(j, "two members \"text\" in one object");
        return c == '"' || datai_jsonl_fail(j, "\"text\" is not a string");
    }
}

/* From between two lines into the next text; false at the end of the file. */
static bool datai_jsonl_open_text(data_jsonl *j) {
    int c;
    bool text;
    j->unit_start = data_jsonl_tell(j);
    while ((c = datai_jsonl_sign(j)) == '\n') j->now.line++;
    if (c < 0) return false;
    if (c != '{') return datai_jsonl_fail(j, "bad JSON: expected an object");
    if (!datai_jsonl_members(j, false, &text)) return false;
    if (!text) return datai_jsonl_fail(j, "the object has no \"text\"");
    j->unit[0] = '\n';
    j->unit_size = j->now.started;
    j->unit_used = 0;
    j->now.in_text = j->now.started = true;
    return true;
}

/* From behind a text to the start of the next line. */
static bool datai_jsonl_close_text(data_jsonl *j) {
    bool text;
    if (!datai_jsonl_members(j, true, &text)) return false;
    int c = datai_jsonl_sign(j);
    if (c >= 0 && c != '\n') return datai_jsonl_fail(j, "bad JSON: something follows the object");
    j->now.line += c == '\n';
    j->now.in_text = false;
    return true;
}

/* Most bytes of a text stand for themselves: these are handed out without a detour. */
static size_t datai_jsonl_plain(data_jsonl *j, unsigned char *out, size_t n) {
    size_t at_hand = (size_t)(j->end - j->next), i = 0;
    if (n > at_hand) n = at_hand;
    while (i < n && j->next[i] >= 0x20 && j->next[i] != '"' && j->next[i] != '\\') i++;
    if (out && i > 0) memcpy(out, j->next, i);
    j->next += i;
    j->now.decoded += i;
    return i;
}

void data_jsonl_from_file(data_jsonl *j, int fd, unsigned char *buffer, size_t buffer_size) {
    *j = (data_jsonl){.fd = fd, .buffer = buffer, .buffer_size = buffer_size, .next = buffer, .end = buffer};
    j->now.line = 1;
}

void data_jsonl_from_memory(data_jsonl *j, const void *bytes, size_t size) {
    *j = (data_jsonl){.fd = -1, .next = bytes, .end_offset = size};
    j->end = j->next + size;
    j->now.line = 1;
}

data_jsonl_point data_jsonl_tell(const data_jsonl *j) {
    if (j->unit_used < j->unit_size) return j->unit_start;
    data_jsonl_point point = j->now;
    point.offset = j->end_offset - (uint64_t)(j->end - j->next);
    return point;
}

void data_jsonl_seek(data_jsonl *j, data_jsonl_point point) {
    if (j->fd < 0) {
        j->next = j->end - (j->end_offset - point.offset);
    } else {
        j->next = j->end = j->buffer;
        j->end_offset = point.offset;
    }
    j->now = point;
    j->unit_size = j->unit_used = 0;
    j->problem = NULL;
}

size_t data_jsonl_read(data_jsonl *j, unsigned char *out, size_t n) {
    size_t done = 0;
    while (done < n && !j->problem) {
        if (j->unit_used < j->unit_size) {
            if (out) out[done] = j->unit[j->unit_used];
            done++;
            if (++j->unit_used == j->unit_size) j->now.decoded += j->unit_size;
            continue;
        }
        if (!j->now.in_text) {
            if (!datai_jsonl_open_text(j)) break;
            continue;
        }
        size_t plain = datai_jsonl_plain(j, out ? out + done : NULL, n - done);
        done += plain;
        if (plain > 0) continue;
        j->unit_start = data_jsonl_tell(j);
        j->unit_used = 0;
        if (!datai_jsonl_character(j, j->unit, &j->unit_size)) break;
        if (j->unit_size == 0) datai_jsonl_close_text(j);
    }
    return done;
}

bool data_jsonl_next(data_jsonl *j, char **text) {
    arrsetlen(*text, 0);
    if (!datai_jsonl_open_text(j)) return false;
    for (;;) {
        size_t at_hand = (size_t)(j->end - j->next), length = arrlenu(*text);
        arrsetlen(*text, length + at_hand + sizeof j->unit);
        length += datai_jsonl_plain(j, (unsigned char *)*text + length, at_hand);
        if (!datai_jsonl_character(j, (unsigned char *)*text + length, &j->unit_size)) return false;
        arrsetlen(*text, length + j->unit_size);
        if (j->unit_size > 0) continue;
        j->unit_used = 0;
        return datai_jsonl_close_text(j);
    }
}

#endif
