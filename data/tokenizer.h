/* data/tokenizer.h - the tokenizer of a Hugging Face directory (tokenizer.json): byte-level BPE, text to tokens and
 * back.
 *
 *     ga_error e;
 *     data_tokenizer *t = data_tokenizer_open("checkpoints/qwen", &e);      // a directory, or the file itself
 *     if (!t) return fail(e.text);
 *     int32_t *tokens = NULL;                                                // an stb_ds array
 *     if (data_tokenizer_encode(t, text, strlen(text), true, &tokens, &e)) return fail(e.text);
 *     for (size_t i = 0; i < arrlenu(tokens); i++) {
 *         size_t length;
 *         const char *bytes = data_tokenizer_bytes(t, tokens[i], &length);
 *         fwrite(bytes, 1, length, stdout);
 *     }
 *     arrfree(tokens);
 *     data_tokenizer_close(t);
 *
 * What happens to a text, in this order, as in the `tokenizers` library:
 *
 *     1  bytes that are no UTF-8 become U+FFFD, one for each maximal part of a character
 *     2  added tokens that are not `normalized` are cut out
 *     3  NFC                                                         normalizer
 *     4  added tokens that are `normalized` are cut out
 *     5  regular expressions cut the rest into words                 pre_tokenizer: Split, Digits, ByteLevel, Sequence
 *     6  the bytes of a word are joined pair by pair, the pair with the lowest rank first        model: BPE
 *     7  special tokens are put around it, if asked for              post_processor: TemplateProcessing
 *
 * Kinds of normalizer, model and so on that are not in this list are refused by their names. Decoding puts the tokens'
 * bytes one behind the other. Words that came before are looked up; a word of n bytes costs n log n.
 *
 * The file is hostile until it is read: every index is checked, memory is a small multiple of the file's size.
 *
 * A character that Unicode gained later than a library's tables is to it unassigned. \p{L}, \p{N} and NFC are those of
 * the `tokenizers` library all the same (unicode.h).
 *
 * Regular expressions need PCRE2 (DATA_PCRE2 is defined, -lpcre2-8), NFC needs utf8proc (DATA_UTF8PROC, -lutf8proc); a
 * program built without them says so when it is to open a tokenizer.
 *
 * The file that defines DATA_IMPLEMENTATION holds the code; it also implements gated_attention.h.
 */
#ifndef DATA_TOKENIZER_H
#define DATA_TOKENIZER_H

#include "../gated_attention.h"

/* Serves one thread at a time. */
typedef struct data_tokenizer data_tokenizer;

/* The name of a tokenizer's file in its directory, and whether a directory has one. */
#define DATA_TOKENIZER_FILE "tokenizer.json"
bool data_tokenizer_exists(const char *directory);

/* NULL on failure: GA_ERR_FILE, GA_ERR_FORMAT (bad JSON, a kind that is unknown, ids out of range), GA_ERR_MEMORY. */
data_tokenizer *data_tokenizer_open(const char *path, ga_error *e);
void data_tokenizer_close(data_tokenizer *t);

/* Highest id + 1: what a model's vocab_size must at least be. */
size_t data_tokenizer_size(const data_tokenizer *t);
/* The file it was read from, and a hash of its bytes. */
const char *data_tokenizer_path(const data_tokenizer *t);
uint64_t data_tokenizer_hash(const data_tokenizer *t);

/* Appends the tokens of n bytes of text to the stb_ds array *tokens; `special`: with those of the post_processor. */
ga_result data_tokenizer_encode(data_tokenizer *t, const char *text, size_t n, bool special, int32_t **tokens,
                                ga_error *e);
/* For texts larger than memory: how many of the n bytes make a part whose tokens do not depend on what stands behind
 * them but for one byte (0: none), and the tokens of such a part. Part by part gives the tokens of the whole. */
size_t data_tokenizer_part(const data_tokenizer *t, const char *text, size_t n);
ga_result data_tokenizer_encode_part(data_tokenizer *t, const char *text, size_t part, int32_t **tokens, ga_error *e);

/* What a token stands for, n bytes that need not be whole characters. NULL: there is no such token. */
const char *data_tokenizer_bytes(const data_tokenizer *t, int32_t token, size_t *n);
/* The same as a label of one line in UTF-8: a space as U+2423, other bytes that are no visible character as \n or \xNN;
 * cut, with an ellipsis, where it would not fit. Returns `text`. */
const char *data_tokenizer_label(const data_tokenizer *t, int32_t token, char *text, size_t size);
/* Whether it is a special token, such as <|endoftext|>. */
bool data_tokenizer_special(const data_tokenizer *t, int32_t token);
/* The id of an added token or of an entry of the vocabulary as it stands in the file; -1: there is none. */
int32_t data_tokenizer_find(const data_tokenizer *t, const char *content);
/* The token that stands between two documents: <|endoftext|>, <|end_of_text|>, </s>; -1: it has none of them. */
int32_t data_tokenizer_separator(const data_tokenizer *t);

/* The words into which steps 1 to 5 cut a text, for training a vocabulary: visit(context, bytes, n). */
typedef ga_result data_word_visitor(void *context, const char *bytes, size_t n, ga_error *e);
ga_result data_tokenizer_words(data_tokenizer *t, const char *text, size_t part, bool more, data_word_visitor *visit,
                               void *context, ga_error *e);

#endif

#if defined(DATA_IMPLEMENTATION) && !defined(DATA_TOKENIZER_IMPLEMENTED)
#define DATA_TOKENIZER_IMPLEMENTED

#include <stdlib.h>
#include <string.h>

#ifndef INCLUDE_STB_DS_H
#if defined(__has_include) && !__has_include(<stb/stb_ds.h>)
#include <stb_ds.h>
#else
#include <stb/stb_ds.h>
#endif
#endif

#ifdef DATA_PCRE2
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#endif
#ifdef DATA_UTF8PROC
#include <stdatomic.h>
#include <utf8proc.h>
#endif

#include "hash.h"
#include "unicode.h"

enum {
    DATAI_MAX_FILE = 1 << 28,  /* bytes of a tokenizer.json */
    DATAI_MAX_HOLES = 1 << 16, /* ids that stand for nothing */
    DATAI_MAX_STEPS = 16,
    DATAI_CACHED_WORD = 256,      /* bytes of the longest word that is kept */
    DATAI_CACHED_WORDS = 1 << 18, /* words that are kept before all are forgotten */
    DATAI_CACHED_TOKENS = 1 << 22 /* and tokens of them */
};
#define DATAI_NO_RANK UINT32_MAX

/* ---- UTF-8 ---- */

/* Length of the character at p < end, and its code point. Bytes that are none: the negated number of those that a
 * U+FFFD stands for, which is as many as could still have become a character (Unicode 3.9, table 3-8). */
static int datai_utf8_next(const unsigned char *p, const unsigned char *end, uint32_t *code) {
    unsigned char lead = *p;
    *code = lead;
    if (lead < 0x80) return 1;
    int tail = lead >= 0xC2 && lead < 0xE0 ? 1 : lead >= 0xE0 && lead < 0xF0 ? 2 : lead >= 0xF0 && lead < 0xF5 ? 3 : 0;
    if (tail == 0) return -1;
    unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    *code = lead & (0x3Fu >> tail);
    for (int i = 1; i <= tail; i++, low = 0x80, high = 0xBF) {
        if (p + i == end || p[i] < low || p[i] > high) return -i;
        *code = *code << 6 | (p[i] & 0x3F);
    }
    return tail + 1;
}

/* How many bytes from p on are ASCII. */
static size_t datai_ascii(const char *p, size_t n) {
    size_t i = 0;
    uint64_t word;
    for (; i + 8 <= n; i += 8) {
        memcpy(&word, p + i, 8);
        if (word & 0x8080808080808080u) break;
    }
    while (i < n && !((unsigned char)p[i] & 0x80)) i++;
    return i;
}

/* How many bytes from the beginning are UTF-8. */
static size_t datai_utf8_valid(const char *text, size_t n) {
    const unsigned char *p = (const unsigned char *)text, *end = p + n;
    uint32_t code;
    while (p < end) {
        p += datai_ascii((const char *)p, (size_t)(end - p));
        if (p == end) break;
        int length = datai_utf8_next(p, end, &code);
        if (length < 0) break;
        p += length;
    }
    return (size_t)((const char *)p - text);
}

static void datai_append_bytes(char **out, const char *bytes, size_t n) {
    if (n > 0) memcpy(arraddnptr(*out, n), bytes, n);
}

/* White_Space of Unicode, which has been the same since version 6.3. */
#define DATAI_SPACE \
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"

static bool datai_is_space(uint32_t code) {
    return (code >= 0x9 && code <= 0xD) || code == 0x20 || code == 0x85 || code == 0xA0 || code == 0x1680 ||
           (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 || code == 0x202F || code == 0x205F ||
           code == 0x3000;
}

/* ---- bytes as characters ---- */

/* A vocabulary writes each byte as a character that can be seen: itself if it is one of Latin-1, else the next one of
 * U+0100, U+0101, ... */
static bool datai_is_visible(unsigned byte) {
    return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
}

static void datai_byte_characters(uint32_t characters[256]) {
    uint32_t next = 0x100;
    for (unsigned b = 0; b < 256; b++) characters[b] = datai_is_visible(b) ? b : next++;
}

/* ---- regular expressions ---- */

#ifdef DATA_PCRE2
typedef struct {
    pcre2_code *code;
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
} datai_regex;

static void datai_regex_free(datai_regex *r) {
    pcre2_match_context_free(r->context);
    pcre2_jit_stack_free(r->stack);
    pcre2_match_data_free(r->match);
    pcre2_code_free(r->code);
}

/* A pattern as the `tokenizers` library understands it, an stb_ds array: \s is White_Space (PCRE2 adds U+180E), and
 * letters and numbers are those of Unicode 16. A negated escape inside a class stays as it is. */
static char *datai_regex_text(const char *pattern) {
    static const char *const classes[][3] = {{"\\s", "\\S", DATAI_SPACE},
                                             {"\\p{L}", "\\P{L}", "\\p{L}" DATA_LATE_LETTERS},
                                             {"\\p{N}", "\\P{N}", "\\p{N}" DATA_LATE_NUMBERS}};
    enum { CLASSES = sizeof classes / sizeof classes[0] };
    char *out = NULL;
    bool in_class = false;
    for (const char *p = pattern; *p;) {
        size_t n = *p == '\\' && p[1] ? 2 : 1, i, negated;
        if (*p == '[') in_class = true;
        if (*p == ']') in_class = false;
        for (i = 0; i < 2 * CLASSES; i++)
            if (strncmp(p, classes[i / 2][i % 2], strlen(classes[i / 2][i % 2])) == 0) break;
        negated = i % 2;
        if (i == 2 * CLASSES || (negated && in_class)) {
            datai_append_bytes(&out, p, n);
            p += n;
            continue;
        }
        const char *ranges = classes[i / 2][2];
        if (!in_class) datai_append_bytes(&out, "[^", 1 + negated);
        datai_append_bytes(&out, ranges, strlen(ranges));
        if (!in_class) datai_append_bytes(&out, "]", 1);
        p += strlen(classes[i / 2][negated]);
    }
    arrput(out, '\0');
    return out;
}

static ga_result datai_regex_open(datai_regex *r, const char *path, const char *pattern, ga_error *e) {
    enum { LONGEST = 4096, SMALL_STACK = 1 << 15, LARGE_STACK = 1 << 26 };
    size_t length = strlen(pattern);
    if (length > LONGEST) return gai_fail(e, GA_ERR_FORMAT, "%s: a pattern of more than %d bytes", path, (int)LONGEST);
    char *text = datai_regex_text(pattern);
    int problem = 0;
    PCRE2_SIZE offset = 0;
    pcre2_compile_context *compile = pcre2_compile_context_create(NULL);
    if (compile) {
        pcre2_set_newline(compile, PCRE2_NEWLINE_LF);
        r->code = pcre2_compile((PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED,
                                PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &problem, &offset,
                                compile);
    }
    pcre2_compile_context_free(compile);
    arrfree(text);
    if (!r->code) {
        PCRE2_UCHAR why[128] = "";
        pcre2_get_error_message(problem, why, sizeof why);
        return gai_fail(e, GA_ERR_FORMAT, "%s: the pattern \"%.80s\": %s", path, gai_printable(pattern), (char *)why);
    }
    pcre2_jit_compile(r->code, PCRE2_JIT_COMPLETE); /* where it is not to be had, the interpreter does it */
    r->match = pcre2_match_data_create(1, NULL);
    r->context = pcre2_match_context_create(NULL);
    r->stack = pcre2_jit_stack_create(SMALL_STACK, LARGE_STACK, NULL);
    if (!r->match || !r->context) return gai_fail(e, GA_ERR_MEMORY, "%s: out of memory", path);
    pcre2_jit_stack_assign(r->context, NULL, r->stack);
    return GA_OK;
}

/* The first match from `at` on. *found is false where there is none. A run of spaces takes as many steps of
 * backtracking as it is long; a pattern that takes far more is given up. */
static ga_result datai_regex_next(datai_regex *r, const char *text, size_t n, size_t at, size_t *first, size_t *end,
                                  bool *found, ga_error *e) {
    enum { LEAST_STEPS = 10000000 };
    uint64_t steps = LEAST_STEPS + 4 * (uint64_t)n;
    pcre2_set_match_limit(r->context, steps < UINT32_MAX ? (uint32_t)steps : UINT32_MAX);
    int result = pcre2_match(r->code, (PCRE2_SPTR)text, n, at, PCRE2_NO_UTF_CHECK, r->match, r->context);
    *found = result != PCRE2_ERROR_NOMATCH;
    if (!*found) return GA_OK;
    const PCRE2_SIZE *range = pcre2_get_ovector_pointer(r->match);
    *first = range[0];
    *end = range[1];
    if (result >= 0 && *first >= at && *end >= *first) return GA_OK;
    PCRE2_UCHAR why[128] = "it matches backwards";
    if (result < 0) pcre2_get_error_message(result, why, sizeof why);
    return gai_fail(e, GA_ERR_FORMAT, "the tokenizer's pattern cannot split this text: %s", (char *)why);
}
#else
typedef struct {
    char none;
} datai_regex;

static void datai_regex_free(datai_regex *r) {
    (void)r;
}

static ga_result datai_regex_open(datai_regex *r, const char *path, const char *pattern, ga_error *e) {
    (void)r, (void)pattern;
    return gai_fail(e, GA_ERR_FORMAT,
                    "%s: its pattern needs PCRE2, without which this program was built (libpcre2-dev, then make again)",
                    path);
}

static ga_result datai_regex_next(datai_regex *r, const char *text, size_t n, size_t at, size_t *first, size_t *end,
                                  bool *found, ga_error *e) {
    (void)r, (void)text, (void)n, (void)at, (void)first, (void)end, (void)e;
    *found = false;
    return GA_OK;
}
#endif

/* ---- NFC ---- */

/* Most text is in NFC already. A character is `plain` if NFC leaves it and what stands before it as they are; only the
 * stretches around others are normalised. One bit for each code point. */
#ifdef DATA_UTF8PROC
enum { DATAI_CODES = 0x110000 };
#define DATAI_NFC (UTF8PROC_STABLE | UTF8PROC_COMPOSE)

static bool datai_is_plain(const uint8_t *plain, uint32_t code) {
    return code < 0x300 || (plain[code >> 3] >> (code & 7) & 1);
}

/* Not plain is what has a combining class, what NFC replaces, and what is the last part of a composed character. Plain
 * is U+11A7, which stands before the first trailing jamo: utf8proc would take it for one; and what the `tokenizers`
 * library does not know yet. */
static void datai_find_plain(uint8_t *plain) {
    memset(plain, 0xFF, DATAI_CODES / 8);
    for (utf8proc_int32_t code = 0x300; code < DATAI_CODES; code++) {
        const utf8proc_property_t *p = utf8proc_get_property(code);
        bool hangul = code >= 0xAC00 && code <= 0xD7A3;
        bool jamo = (code >= 0x1161 && code <= 0x1175) || (code >= 0x11A8 && code <= 0x11C2);
        if (p->combining_class || jamo) plain[code >> 3] &= (uint8_t) ~(1 << (code & 7));
        if (hangul || p->decomp_seqindex == UINT16_MAX || p->decomp_type) continue;
        utf8proc_int32_t parts[32];
        int boundary = 0;
        utf8proc_ssize_t n = utf8proc_decompose_char(code, parts, 32, DATAI_NFC, &boundary);
        if (n < 1 || n > 32) continue;
        utf8proc_int32_t last = parts[n - 1];
        plain[last >> 3] &= (uint8_t) ~(1 << (last & 7));
        utf8proc_ssize_t composed = utf8proc_normalize_utf32(parts, n, DATAI_NFC);
        if (composed != 1 || parts[0] != code) plain[code >> 3] &= (uint8_t) ~(1 << (code & 7));
    }
    static const uint32_t late[][2] = {DATA_LATE_MARKS};
    for (size_t i = 0; i < sizeof late / sizeof late[0]; i++)
        for (uint32_t code = late[i][0]; code <= late[i][1]; code++) plain[code >> 3] |= (uint8_t)(1 << (code & 7));
}

/* A million code points are looked at, which all tokenizers of a process share the outcome of. */
static ga_result datai_nfc_open(const uint8_t **plain, const char *path, ga_error *e) {
    static _Atomic(uint8_t *) shared;
    *plain = atomic_load(&shared);
    if (*plain) return GA_OK;
    uint8_t *own = (uint8_t *)malloc(DATAI_CODES / 8), *none = NULL;
    if (!own) return gai_fail(e, GA_ERR_MEMORY, "%s: out of memory", path);
    datai_find_plain(own);
    if (!atomic_compare_exchange_strong(&shared, &none, own)) free(own); /* another thread was first */
    *plain = atomic_load(&shared);
    return GA_OK;
}

/* Canonical order of a run of marks: by combining class, and within one as they came. A counting sort, since utf8proc's
 * own takes the square of the run's length. */
static bool datai_order_marks(utf8proc_int32_t *codes, size_t n) {
    size_t start[257] = {0};
    utf8proc_int32_t *marks = (utf8proc_int32_t *)malloc(n * sizeof *marks);
    if (!marks) return false;
    memcpy(marks, codes, n * sizeof *marks);
    for (size_t i = 0; i < n; i++) start[utf8proc_get_property(marks[i])->combining_class + 1]++;
    for (size_t c = 1; c < 257; c++) start[c] += start[c - 1];
    for (size_t i = 0; i < n; i++) codes[start[utf8proc_get_property(marks[i])->combining_class]++] = marks[i];
    free(marks);
    return true;
}

/* NFC of the characters [first, end), appended to the stb_ds array *out: decomposed, ordered, composed. Only the first
 * is plain; a mark that is plain stays where it is. */
static ga_result datai_nfc_stretch(const uint8_t *plain, const char *first, const char *end, char **out, ga_error *e) {
    utf8proc_int32_t *codes = NULL;
    size_t ordered = 0;
    bool good = true;
    for (const char *p = first; p < end;) {
        uint32_t code;
        utf8proc_int32_t parts[32];
        int boundary = 0;
        int length = datai_utf8_next((const unsigned char *)p, (const unsigned char *)end, &code);
        p += length;
        if (datai_is_plain(plain, code) && utf8proc_get_property((utf8proc_int32_t)code)->combining_class) {
            datai_append_bytes(out, p - length, (size_t)length);
            continue;
        }
        utf8proc_ssize_t n = utf8proc_decompose_char((utf8proc_int32_t)code, parts, 32, DATAI_NFC, &boundary);
        for (utf8proc_ssize_t i = 0; i < n && i < 32; i++) arrput(codes, parts[i]);
    }
    for (size_t i = 0, n = arrlenu(codes); good && i <= n; i++) {
        if (i < n && utf8proc_get_property(codes[i])->combining_class) continue;
        if (i > ordered + 1) good = datai_order_marks(codes + ordered, i - ordered);
        ordered = i + 1;
    }
    utf8proc_ssize_t n = utf8proc_normalize_utf32(codes, (utf8proc_ssize_t)arrlenu(codes), DATAI_NFC);
    for (utf8proc_ssize_t i = 0; good && i < n; i++) {
        utf8proc_uint8_t bytes[4] = {0};
        size_t length = (size_t)utf8proc_encode_char(codes[i], bytes);
        datai_append_bytes(out, (const char *)bytes, length);
    }
    arrfree(codes);
    return good ? GA_OK : gai_fail(e, GA_ERR_MEMORY, "out of memory");
}

/* NFC of a text in UTF-8. *normal is the text itself where that is normalised, else *out, an stb_ds array. */
static ga_result datai_nfc(const uint8_t *plain, const char *text, size_t n, char **out, const char **normal,
                           size_t *normal_n, ga_error *e) {
    const char *p = text, *end = text + n, *done = text, *starter = text;
    arrsetlen(*out, 0);
    while (p < end) {
        size_t ascii = datai_ascii(p, (size_t)(end - p));
        if (ascii > 0) starter = p + ascii - 1;
        p += ascii;
        if (p == end) break;
        uint32_t code;
        int length = datai_utf8_next((const unsigned char *)p, (const unsigned char *)end, &code);
        if (datai_is_plain(plain, code)) {
            starter = p;
            p += length;
            continue;
        }
        for (p += length; p < end; p += length) {
            length = datai_utf8_next((const unsigned char *)p, (const unsigned char *)end, &code);
            if (datai_is_plain(plain, code)) break;
        }
        datai_append_bytes(out, done, (size_t)(starter - done));
        ga_result result = datai_nfc_stretch(plain, starter, p, out, e);
        if (result) return result;
        done = starter = p;
    }
    bool changed = done > text;
    if (changed) datai_append_bytes(out, done, (size_t)(end - done));
    *normal = changed ? *out : text;
    *normal_n = changed ? arrlenu(*out) : n;
    return GA_OK;
}
#else
static ga_result datai_nfc_open(const uint8_t **plain, const char *path, ga_error *e) {
    *plain = NULL;
    return gai_fail(e, GA_ERR_FORMAT,
                    "%s: its normalizer NFC needs utf8proc, without which this program was built (libutf8proc-dev, "
                    "then make again)",
                    path);
}

static ga_result datai_nfc(const uint8_t *plain, const char *text, size_t n, char **out, const char **normal,
                           size_t *normal_n, ga_error *e) {
    (void)plain, (void)out, (void)e;
    *normal = text;
    *normal_n = n;
    return GA_OK;
}
#endif

/* ---- what a tokenizer is ---- */

typedef struct {
    uint32_t offset, length; /* in `bytes`; length 0: there is no such token */
    bool special;
} datai_token;

/* Added tokens of one kind, as a tree of their bytes: (node, byte) -> node; node 0 is the root. */
typedef struct {
    data_pairs children;
    int32_t *tokens; /* stb_ds array by node: index in `added`, -1: none ends here */
    bool first[256];
} datai_trie;

typedef struct {
    char *content;
    int32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
} datai_added;

/* A step of the pre_tokenizer. */
typedef struct {
    bool prefix_space; /* a text that does not begin with a space gets one */
    bool has_regex;
    bool removed, invert; /* what matches (or, inverted, what does not) is left out */
    datai_regex regex;
    char *buffer; /* stb_ds array: the text with its space */
} datai_step;

struct data_tokenizer {
    char *path;
    uint64_t hash;
    char *bytes;         /* stb_ds array */
    datai_token *tokens; /* stb_ds array by id */
    data_map vocabulary; /* entries as they stand in the file -> id */
    int32_t of_byte[256];
    data_pairs merges; /* two ids -> rank */
    int32_t *merged;   /* stb_ds array by rank: the id that the pair becomes */
    uint32_t characters[256];
    bool ignore_merges;

    bool nfc;
    const uint8_t *plain; /* NULL: no NFC */
    datai_added *added;   /* stb_ds array */
    data_map of_added;    /* content -> id */
    datai_trie raw, normalized;
    bool has_single_word;
    datai_regex word_character; /* \w of single_word */
    datai_step steps[DATAI_MAX_STEPS];
    size_t n_steps;
    int32_t *before, *after; /* stb_ds arrays: the special tokens around a text */
    bool has_parts;          /* data_tokenizer_part may cut a text behind a newline */

    /* Working memory. */
    char *text, *composed, *key;    /* stb_ds arrays */
    data_map cache;                 /* word -> first of its tokens in `cached` << 16 | their number */
    int32_t *cached;                /* stb_ds array */
    int32_t *ids, *next, *previous; /* stb_ds arrays: the symbols of a word, in a doubly linked list */
    uint64_t *heap;                 /* stb_ds array: rank << 32 | position of a pair */
    int32_t **out;                  /* where tokens go, or else words */
    data_word_visitor *visit;
    void *visit_context;
};

/* ---- step 6: a word ---- */

static void datai_heap_push(uint64_t **heap, uint64_t value) {
    arrput(*heap, value);
    uint64_t *h = *heap;
    size_t i = arrlenu(h) - 1;
    for (; i > 0 && h[(i - 1) / 2] > value; i = (i - 1) / 2) h[i] = h[(i - 1) / 2];
    h[i] = value;
}

static uint64_t datai_heap_pop(uint64_t *h) {
    uint64_t top = h[0], last = arrpop(h);
    size_t n = arrlenu(h), i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= n) break;
        if (child + 1 < n && h[child + 1] < h[child]) child++;
        if (h[child] >= last) break;
        h[i] = h[child];
        i = child;
    }
    if (n > 0) h[i] = last;
    return top;
}

static void datai_push_pair(data_tokenizer *t, int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    uint32_t rank = data_pairs_get(&t->merges, data_pair(t->ids[left], t->ids[right]), DATAI_NO_RANK);
    if (rank != DATAI_NO_RANK) datai_heap_push(&t->heap, (uint64_t)rank << 32 | (uint32_t)left);
}

/* Joins the symbols in t->ids until no rank is left. A pair whose place in the heap is out of date counts if what
 * stands there now becomes the same token: so does the library's. */
static void datai_merge(data_tokenizer *t) {
    int32_t n = (int32_t)arrlen(t->ids);
    arrsetlen(t->next, (size_t)n);
    arrsetlen(t->previous, (size_t)n);
    arrsetlen(t->heap, 0);
    for (int32_t i = 0; i < n; i++) {
        t->next[i] = i + 1 < n ? i + 1 : -1;
        t->previous[i] = i - 1;
    }
    for (int32_t i = 0; i + 1 < n; i++) datai_push_pair(t, i, i + 1);
    while (arrlenu(t->heap) > 0) {
        uint64_t top = datai_heap_pop(t->heap);
        int32_t left = (int32_t)(uint32_t)top, right = t->ids[left] < 0 ? -1 : t->next[left];
        if (right < 0) continue;
        int32_t id = t->merged[top >> 32];
        uint32_t rank = data_pairs_get(&t->merges, data_pair(t->ids[left], t->ids[right]), DATAI_NO_RANK);
        if (rank == DATAI_NO_RANK || t->merged[rank] != id) continue;
        t->ids[left] = id;
        t->ids[right] = -1;
        t->next[left] = t->next[right];
        if (t->next[left] >= 0) t->previous[t->next[left]] = left;
        datai_push_pair(t, t->previous[left], left);
        datai_push_pair(t, left, t->next[left]);
    }
}

/* The id of a word that stands in the vocabulary as it is. */
static int32_t datai_whole_word(data_tokenizer *t, const char *word, size_t n) {
    arrsetlen(t->key, 2 * n);
    char *end = t->key;
    for (size_t i = 0; i < n; i++) end = gai_utf8(end, t->characters[(unsigned char)word[i]]);
    uint64_t id;
    return data_map_get(&t->vocabulary, t->key, (size_t)(end - t->key), &id) ? (int32_t)id : -1;
}

/* The tokens of a word, to the end of *out. Bytes that the vocabulary lacks are left out. */
static void datai_tokens_of_word(data_tokenizer *t, const char *word, size_t n, int32_t **out) {
    int32_t whole = t->ignore_merges ? datai_whole_word(t, word, n) : -1;
    if (whole >= 0) {
        arrput(*out, whole);
        return;
    }
    arrsetlen(t->ids, 0);
    for (size_t i = 0; i < n; i++) {
        int32_t id = t->of_byte[(unsigned char)word[i]];
        if (id >= 0) arrput(t->ids, id);
    }
    if (arrlenu(t->ids) == 0) return;
    datai_merge(t);
    for (int32_t i = 0; i >= 0; i = t->next[i]) arrput(*out, t->ids[i]);
}

static void datai_append_tokens(int32_t **out, const int32_t *tokens, size_t n) {
    if (n > 0) memcpy(arraddnptr(*out, n), tokens, n * sizeof *tokens);
}

static ga_result datai_word(data_tokenizer *t, const char *word, size_t n, ga_error *e) {
    if (t->visit) return t->visit(t->visit_context, word, n, e);
    if (n > INT32_MAX) return gai_fail(e, GA_ERR_INPUT, "a word of %zu bytes is too long to be encoded", n);
    if (n > DATAI_CACHED_WORD) {
        datai_tokens_of_word(t, word, n, t->out);
        return GA_OK;
    }
    uint64_t known;
    if (!data_map_get(&t->cache, word, n, &known)) {
        if (t->cache.count >= DATAI_CACHED_WORDS || arrlenu(t->cached) >= DATAI_CACHED_TOKENS) {
            data_map_clear(&t->cache);
            arrsetlen(t->cached, 0);
        }
        uint64_t first = arrlenu(t->cached);
        datai_tokens_of_word(t, word, n, &t->cached);
        known = first << 16 | (arrlenu(t->cached) - first);
        if (!data_map_put(&t->cache, word, n, known)) return gai_fail(e, GA_ERR_MEMORY, "out of memory");
    }
    if (known & 0xFFFF) datai_append_tokens(t->out, t->cached + (known >> 16), known & 0xFFFF);
    return GA_OK;
}

/* ---- step 5: words ---- */

/* n bytes of text, behind which `behind` more can be seen but do not belong to it. */
static ga_result datai_split(data_tokenizer *t, size_t step_index, const char *text, size_t n, size_t behind,
                             ga_error *e) {
    if (n == 0) return GA_OK;
    if (step_index == t->n_steps) return datai_word(t, text, n, e);
    datai_step *step = &t->steps[step_index];
    if (step->prefix_space && *text != ' ') {
        arrsetlen(step->buffer, n + behind + 1);
        step->buffer[0] = ' ';
        memcpy(step->buffer + 1, text, n + behind);
        text = step->buffer;
        n++;
    }
    if (!step->has_regex) return datai_split(t, step_index + 1, text, n, behind, e);
    size_t done = 0, at = 0;
    while (at < n) {
        size_t first, end;
        bool found;
        ga_result result = datai_regex_next(&step->regex, text, n + behind, at, &first, &end, &found, e);
        if (result) return result;
        if (!found || first >= n) break;
        if (end > n) end = n;
        bool keep_match = !step->removed || step->invert, keep_rest = !step->removed || !step->invert;
        if (first > done && keep_rest) result = datai_split(t, step_index + 1, text + done, first - done, 0, e);
        if (!result && end > first && keep_match)
            result = datai_split(t, step_index + 1, text + first, end - first, 0, e);
        if (result) return result;
        done = at = end;
        if (end == first) /* an empty match only cuts; go on behind the next character */
            for (at++; at < n && ((unsigned char)text[at] & 0xC0) == 0x80;) at++;
    }
    return step->removed && step->invert ? GA_OK : datai_split(t, step_index + 1, text + done, n - done, 0, e);
}

/* ---- steps 1 to 4 ---- */

/* The longest added token at text[at], -1: none. */
static int32_t datai_match_added(const datai_trie *trie, const char *text, size_t n, size_t at, size_t *end) {
    int32_t found = -1;
    uint32_t node = 0;
    while (at < n) {
        node = data_pairs_get(&trie->children, (uint64_t)node << 8 | (unsigned char)text[at], DATAI_NO_RANK);
        if (node == DATAI_NO_RANK) break;
        at++;
        if (trie->tokens[node] < 0) continue;
        found = trie->tokens[node];
        *end = at;
    }
    return found;
}

/* Whether the character before or behind a place is part of a word. */
static ga_result datai_beside_word(data_tokenizer *t, const char *text, size_t n, size_t at, bool before, bool *word,
                                   ga_error *e) {
    *word = false;
    if (before ? at == 0 : at == n) return GA_OK;
    size_t from = at;
    if (before) do
            from--;
        while (((unsigned char)text[from] & 0xC0) == 0x80);
    uint32_t code;
    int length = datai_utf8_next((const unsigned char *)text + from, (const unsigned char *)text + n, &code);
    size_t first, end;
    return datai_regex_next(&t->word_character, text + from, (size_t)length, 0, &first, &end, word, e);
}

static size_t datai_spaces_before(const char *text, size_t at, size_t lowest) {
    while (at > lowest) {
        size_t from = at;
        do from--;
        while (from > lowest && ((unsigned char)text[from] & 0xC0) == 0x80);
        uint32_t code;
        datai_utf8_next((const unsigned char *)text + from, (const unsigned char *)text + at, &code);
        if (!datai_is_space(code)) break;
        at = from;
    }
    return at;
}

static size_t datai_spaces_behind(const char *text, size_t at, size_t n) {
    while (at < n) {
        uint32_t code;
        int length = datai_utf8_next((const unsigned char *)text + at, (const unsigned char *)text + n, &code);
        if (!datai_is_space(code)) break;
        at += (size_t)length;
    }
    return at;
}

static ga_result datai_normalize(data_tokenizer *t, const char *text, size_t n, size_t behind, ga_error *e);

static ga_result datai_between_added(data_tokenizer *t, bool raw, const char *text, size_t n, size_t behind,
                                     ga_error *e) {
    return raw ? datai_normalize(t, text, n, behind, e) : datai_split(t, 0, text, n, behind, e);
}

/* Cuts out the added tokens that are looked for before normalisation (`raw`), or behind it. */
static ga_result datai_cut_added(data_tokenizer *t, bool raw, const char *text, size_t n, size_t behind, ga_error *e) {
    const datai_trie *trie = raw ? &t->raw : &t->normalized;
    size_t done = 0;
    for (size_t at = 0; at < n; at++) {
        if (!trie->first[(unsigned char)text[at]]) continue;
        size_t end = at, first = at;
        int32_t index = datai_match_added(trie, text, n, at, &end);
        if (index < 0) continue;
        const datai_added *a = &t->added[index];
        bool word_before = false, word_behind = false;
        if (a->single_word) {
            ga_result result = datai_beside_word(t, text, n, at, true, &word_before, e);
            if (!result) result = datai_beside_word(t, text, n, end, false, &word_behind, e);
            if (result) return result;
        }
        at = end - 1;
        if (word_before || word_behind) continue;
        if (a->lstrip) first = datai_spaces_before(text, first, done < first ? done : first);
        if (a->rstrip) end = datai_spaces_behind(text, end, n);
        ga_result result = first > done ? datai_between_added(t, raw, text + done, first - done, 0, e) : GA_OK;
        if (result) return result;
        if (t->out) arrput(*t->out, a->id);
        done = end;
    }
    return done < n ? datai_between_added(t, raw, text + done, n - done, behind, e) : GA_OK;
}

static ga_result datai_normalize(data_tokenizer *t, const char *text, size_t n, size_t behind, ga_error *e) {
    if (t->nfc) {
        ga_result result = datai_nfc(t->plain, text, n + behind, &t->composed, &text, &n, e);
        if (result) return result;
        n -= behind; /* an ASCII letter or digit, which stays what it is */
    }
    return datai_cut_added(t, false, text, n, behind, e);
}

/* A text in UTF-8; what is none is replaced. */
static ga_result datai_encode(data_tokenizer *t, const char *text, size_t n, size_t behind, ga_error *e) {
    size_t valid = datai_utf8_valid(text, n);
    if (valid == n) return datai_cut_added(t, true, text, n, behind, e);
    arrsetlen(t->text, 0);
    for (size_t at = 0; at < n;) {
        datai_append_bytes(&t->text, text + at, valid);
        at += valid;
        if (at == n) break;
        uint32_t code;
        int length = datai_utf8_next((const unsigned char *)text + at, (const unsigned char *)text + n, &code);
        datai_append_bytes(&t->text, "\xEF\xBF\xBD", 3);
        at += (size_t)-length;
        valid = datai_utf8_valid(text + at, n - at);
    }
    datai_append_bytes(&t->text, text + n, behind);
    return datai_cut_added(t, true, t->text, arrlenu(t->text) - behind, behind, e);
}

ga_result data_tokenizer_encode(data_tokenizer *t, const char *text, size_t n, bool special, int32_t **tokens,
                                ga_error *e) {
    t->out = tokens;
    t->visit = NULL;
    if (special) datai_append_tokens(tokens, t->before, arrlenu(t->before));
    ga_result result = datai_encode(t, text, n, 0, e);
    if (special && !result) datai_append_tokens(tokens, t->after, arrlenu(t->after));
    return result;
}

static bool datai_is_alphanumeric(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

/* Behind a newline, before a letter or digit: there no character is composed, no added token lies (has_parts), and the
 * pattern was seen to cut. */
size_t data_tokenizer_part(const data_tokenizer *t, const char *text, size_t n) {
    if (!t->has_parts) return 0;
    for (size_t i = n; i > 1; i--)
        if (text[i - 2] == '\n' && datai_is_alphanumeric(text[i - 1])) return i - 1;
    return 0;
}

ga_result data_tokenizer_encode_part(data_tokenizer *t, const char *text, size_t part, int32_t **tokens, ga_error *e) {
    t->out = tokens;
    t->visit = NULL;
    return datai_encode(t, text, part, 1, e);
}

ga_result data_tokenizer_words(data_tokenizer *t, const char *text, size_t part, bool more, data_word_visitor *visit,
                               void *context, ga_error *e) {
    t->out = NULL;
    t->visit = visit;
    t->visit_context = context;
    return datai_encode(t, text, part, more, e);
}

/* Whether the first step always cuts between a newline and a letter or digit. */
static bool datai_cuts_at_lines(data_tokenizer *t) {
    static const char *const lines[] = {"",      "a",        " ",   "7",    ".",       "\n",  "\r",
                                        "\t",    "a ",       "a\n", "a \n", ". ",      ".\n", "\n ",
                                        "  \n ", "\xC3\xA9", "'s",  "\r\n", " \r\n\r", ")(",  "a\t\n"};
    if (t->n_steps == 0 || !t->steps[0].has_regex) return false;
    for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++) {
        for (const char *next = "aZ09"; *next; next++) {
            char text[16];
            size_t n = (size_t)sprintf(text, "%s\n%c", lines[i], *next), end = 0;
            bool found = true;
            while (found && end < n - 1) {
                size_t first, from = end;
                ga_error e;
                if (datai_regex_next(&t->steps[0].regex, text, n, from, &first, &end, &found, &e)) return false;
                if (!found || end == from) return false;
                if (first == n - 1) end = first;
            }
            if (end != n - 1) return false;
        }
    }
    return true;
}

static bool datai_find_parts(data_tokenizer *t) {
    for (size_t i = 0; i < arrlenu(t->added); i++) {
        const datai_added *a = &t->added[i];
        if (a->single_word || a->lstrip || strchr(a->content, '\n')) return false;
    }
    for (size_t i = 0; i < t->n_steps; i++)
        if (t->steps[i].prefix_space) return false;
    return datai_cuts_at_lines(t);
}

/* ---- decoding ---- */

const char *data_tokenizer_bytes(const data_tokenizer *t, int32_t token, size_t *n) {
    if (token < 0 || (size_t)token >= arrlenu(t->tokens) || t->tokens[token].length == 0) return NULL;
    *n = t->tokens[token].length;
    return t->bytes + t->tokens[token].offset;
}

const char *data_tokenizer_label(const data_tokenizer *t, int32_t token, char *text, size_t size) {
    enum { ELLIPSIS = 3 };
    size_t n = 0, used = 0;
    const char *bytes = data_tokenizer_bytes(t, token, &n);
    if (!bytes) {
        snprintf(text, size, "%d", (int)token);
        return text;
    }
    const unsigned char *p = (const unsigned char *)bytes, *end = p + n;
    while (p < end) {
        char part[8];
        uint32_t code;
        int length = datai_utf8_next(p, end, &code);
        if (code == ' ')
            snprintf(part, sizeof part, "\xE2\x90\xA3");
        else if (code == '\n' || code == '\t' || code == '\r')
            snprintf(part, sizeof part, code == '\n' ? "\\n" : code == '\t' ? "\\t" : "\\r");
        else if (length < 0 || code < 0x20 || (code >= 0x7F && code < 0xA0))
            snprintf(part, sizeof part, "\\x%02X", *p);
        else
            snprintf(part, sizeof part, "%.*s", length, (const char *)p);
        p += length < 0 || code < 0x80 ? 1 : length;
        size_t room = size - 1 - used, needed = strlen(part) + (p < end ? ELLIPSIS : 0);
        if (needed > room) snprintf(part, sizeof part, room < ELLIPSIS ? "" : "\xE2\x80\xA6");
        memcpy(text + used, part, strlen(part));
        used += strlen(part);
        if (needed > room) break;
    }
    text[used] = '\0';
    return text;
}

bool data_tokenizer_special(const data_tokenizer *t, int32_t token) {
    return token >= 0 && (size_t)token < arrlenu(t->tokens) && t->tokens[token].special;
}

int32_t data_tokenizer_find(const data_tokenizer *t, const char *content) {
    uint64_t id;
    size_t n = strlen(content);
    bool found = data_map_get(&t->of_added, content, n, &id) || data_map_get(&t->vocabulary, content, n, &id);
    return found ? (int32_t)id : -1;
}

int32_t data_tokenizer_separator(const data_tokenizer *t) {
    static const char *const names[] = {"<|endoftext|>", "<|end_of_text|>", "</s>"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        int32_t id = data_tokenizer_find(t, names[i]);
        if (id >= 0) return id;
    }
    return -1;
}

size_t data_tokenizer_size(const data_tokenizer *t) {
    return arrlenu(t->tokens);
}

const char *data_tokenizer_path(const data_tokenizer *t) {
    return t->path;
}

uint64_t data_tokenizer_hash(const data_tokenizer *t) {
    return t->hash;
}

/* ---- reading the file ---- */

/* A JSON value as a string, which is decoded where it lies: once only. */
static bool datai_json_text(gai_json value, char **text) {
    return value.at && gai_json_peek(&value) == '"' && gai_json_string(&value, text);
}

static bool datai_json_id(const gai_json *value, int32_t *id) {
    uint64_t number;
    if (!value->at || !gai_parse_u64(value->at, value->end, &number) || number > INT32_MAX) return false;
    *id = (int32_t)number;
    return true;
}

/* The "type" of an object, of which `names` are the other members wanted; values[0] is the type's. */
static ga_result datai_json_typed(gai_json object, const char *what, const char *const *names, size_t n,
                                  gai_json *values, char **type) {
    ga_result result = gai_json_members(object, names, n, values, false);
    if (result) return result;
    if (datai_json_text(values[0], type)) return GA_OK;
    return gai_fail(object.e, GA_ERR_FORMAT, "%s: the %s has no \"type\"", object.path, what);
}

static ga_result datai_unknown(gai_json value, const char *what, const char *type, const char *known) {
    return gai_fail(value.e, GA_ERR_FORMAT, "%s: a %s of type \"%.64s\" is not known here (known: %s)", value.path,
                    what, gai_printable(type), known);
}

/* The bytes that an entry stands for, to t->bytes: its characters' bytes, or where one of them stands
 * for none, itself. */
static ga_result datai_add_bytes(data_tokenizer *t, const char *path, const char *content, int32_t id, ga_error *e) {
    static const unsigned char hidden[] = {
        /* bytes that are not visible, in their order */
        0,    1,    2,    3,    4,    5,    6,    7,    8,    9,    10,   11,   12,   13,   14,   15,   16,
        17,   18,   19,   20,   21,   22,   23,   24,   25,   26,   27,   28,   29,   30,   31,   32,   127,
        0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8B, 0x8C, 0x8D, 0x8E, 0x8F, 0x90,
        0x91, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9E, 0x9F, 0xA0, 0xAD};
    size_t n = strlen(content), offset = arrlenu(t->bytes);
    const unsigned char *p = (const unsigned char *)content, *end = p + n;
    bool bytes = true;
    if (datai_utf8_valid(content, n) != n) return gai_fail(e, GA_ERR_FORMAT, "%s: token %d is no UTF-8", path, (int)id);
    while (p < end && bytes) {
        uint32_t code;
        p += datai_utf8_next(p, end, &code);
        bytes = code < 0x100 ? datai_is_visible(code) : code < 0x100 + sizeof hidden;
        if (bytes) arrput(t->bytes, (char)(code < 0x100 ? code : hidden[code - 0x100]));
    }
    if (!bytes) {
        arrsetlen(t->bytes, offset);
        datai_append_bytes(&t->bytes, content, n);
    }
    t->tokens[id].offset = (uint32_t)offset;
    t->tokens[id].length = (uint32_t)(arrlenu(t->bytes) - offset);
    return GA_OK;
}

/* Room for the id. More holes than a real file has would be memory for nothing. */
static ga_result datai_make_room(data_tokenizer *t, gai_json value, int32_t id, size_t entries) {
    if ((size_t)id >= entries + DATAI_MAX_HOLES)
        return gai_fail(value.e, GA_ERR_FORMAT, "%s: id %d in a vocabulary of %zu", value.path, (int)id, entries);
    size_t size = arrlenu(t->tokens);
    if ((size_t)id < size) return GA_OK;
    memset(arraddnptr(t->tokens, (size_t)id + 1 - size), 0, ((size_t)id + 1 - size) * sizeof *t->tokens);
    return GA_OK;
}

static ga_result datai_read_vocabulary(data_tokenizer *t, gai_json object) {
    gai_json value;
    char *key;
    size_t entries = 0;
    for (const char *p = object.at; p < object.end; p++) entries += *p == ':';
    while (gai_json_next(&object, &key, &value)) {
        int32_t id;
        if (!datai_json_id(&value, &id))
            return gai_fail(object.e, GA_ERR_FORMAT, "%s: the id of \"%.64s\" is no number from 0 on", t->path,
                            gai_printable(key));
        if (*key == '\0') continue; /* an empty entry is the token of no text */
        ga_result result = datai_make_room(t, object, id, entries);
        if (result) return result;
        if (t->tokens[id].length > 0)
            return gai_fail(object.e, GA_ERR_FORMAT, "%s: two tokens have the id %d", t->path, (int)id);
        uint64_t other;
        size_t length = strlen(key);
        if (data_map_get(&t->vocabulary, key, length, &other))
            return gai_fail(object.e, GA_ERR_FORMAT, "%s: \"%.64s\" stands twice in the vocabulary", t->path,
                            gai_printable(key));
        result = datai_add_bytes(t, t->path, key, id, object.e);
        if (result) return result;
        if (!data_map_put(&t->vocabulary, key, length, (uint64_t)id))
            return gai_fail(object.e, GA_ERR_MEMORY, "%s: out of memory", t->path);
    }
    for (unsigned b = 0; b < 256; b++) {
        char character[4];
        uint64_t id;
        size_t n = (size_t)(gai_utf8(character, t->characters[b]) - character);
        t->of_byte[b] = data_map_get(&t->vocabulary, character, n, &id) ? (int32_t)id : -1;
    }
    return GA_OK;
}

/* "a b" or ["a", "b"]. */
static bool datai_read_merge(gai_json value, char **left, char **right) {
    if (gai_json_peek(&value) != '[') {
        if (!datai_json_text(value, left)) return false;
        char *space = strchr(*left, ' ');
        if (!space || strchr(space + 1, ' ')) return false;
        *space = '\0';
        *right = space + 1;
        return true;
    }
    gai_json part;
    return gai_json_next(&value, NULL, &part) && datai_json_text(part, left) && gai_json_next(&value, NULL, &part) &&
           datai_json_text(part, right) && !gai_json_next(&value, NULL, &part);
}

static ga_result datai_read_merges(data_tokenizer *t, gai_json array) {
    gai_json value;
    while (gai_json_next(&array, NULL, &value)) {
        char *left, *right;
        uint64_t a, b, joined;
        size_t rank = arrlenu(t->merged);
        if (!datai_read_merge(value, &left, &right))
            return gai_fail(array.e, GA_ERR_FORMAT, "%s: merge %zu is neither \"a b\" nor [\"a\", \"b\"]", t->path,
                            rank);
        size_t m = strlen(left), n = strlen(right);
        arrsetlen(t->key, m + n);
        memcpy(t->key, left, m);
        memcpy(t->key + m, right, n);
        if (!data_map_get(&t->vocabulary, left, m, &a) || !data_map_get(&t->vocabulary, right, n, &b) ||
            !data_map_get(&t->vocabulary, t->key, m + n, &joined))
            return gai_fail(array.e, GA_ERR_FORMAT,
                            "%s: merge %zu has a part or a result that is not in the vocabulary", t->path, rank);
        arrput(t->merged, (int32_t)joined);
        if (!data_pairs_put(&t->merges, data_pair((int32_t)a, (int32_t)b), (uint32_t)rank))
            return gai_fail(array.e, GA_ERR_MEMORY, "%s: out of memory", t->path);
    }
    return GA_OK;
}

/* Keys of the model that change what it does, and the values that leave it as it is here. */
static ga_result datai_refuse_options(gai_json model, const char *const *names, const gai_json *values, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const gai_json *v = &values[i];
        if (!v->at || gai_json_is(v, "false") || gai_json_is(v, "\"\"") || gai_json_is(v, "0") || gai_json_is(v, "0.0"))
            continue;
        return gai_fail(model.e, GA_ERR_FORMAT, "%s: model.%s is set, which is not known here", model.path, names[i]);
    }
    return GA_OK;
}

static ga_result datai_read_model(data_tokenizer *t, gai_json model) {
    enum { TYPE, VOCAB, MERGES, IGNORE, UNKNOWN, OPTIONS };
    static const char *const names[] = {"type",
                                        "vocab",
                                        "merges",
                                        "ignore_merges",
                                        "unk_token",
                                        "dropout",
                                        "byte_fallback",
                                        "continuing_subword_prefix",
                                        "end_of_word_suffix"};
    enum { COUNT = sizeof names / sizeof names[0] };
    gai_json v[COUNT];
    char absent[] = "BPE", *type = absent; /* files of the library's first versions have no type */
    ga_result result = gai_json_members(model, names, COUNT, v, false);
    if (result) return result;
    if (v[TYPE].at && !datai_json_text(v[TYPE], &type))
        return gai_fail(model.e, GA_ERR_FORMAT, "%s: model.type is no string", t->path);
    if (strcmp(type, "BPE") != 0) return datai_unknown(model, "model", type, "BPE");
    result = datai_refuse_options(model, names + OPTIONS, v + OPTIONS, COUNT - OPTIONS);
    if (!result && (!v[VOCAB].at || *v[VOCAB].at != '{' || !v[MERGES].at || *v[MERGES].at != '['))
        result = gai_fail(model.e, GA_ERR_FORMAT, "%s: the model has no object vocab or no array merges", t->path);
    if (!result) result = datai_read_vocabulary(t, v[VOCAB]);
    if (!result) result = datai_read_merges(t, v[MERGES]);
    if (result) return result;
    t->ignore_merges = gai_json_is(&v[IGNORE], "true");
    for (unsigned b = 0; b < 256 && v[UNKNOWN].at; b++)
        if (t->of_byte[b] < 0)
            return gai_fail(model.e, GA_ERR_FORMAT,
                            "%s: model.unk_token with a vocabulary that lacks the byte %02X is not known here", t->path,
                            b);
    return GA_OK;
}

/* NFC, or a Sequence of such; null: none. */
static ga_result datai_read_normalizer(data_tokenizer *t, gai_json value) {
    static const char *const names[] = {"type", "normalizers"};
    gai_json v[2], part;
    char *type;
    if (!value.at) return GA_OK;
    ga_result result = datai_json_typed(value, "normalizer", names, 2, v, &type);
    if (result) return result;
    if (strcmp(type, "NFC") == 0) {
        t->nfc = true;
        return t->plain ? GA_OK : datai_nfc_open(&t->plain, t->path, value.e);
    }
    if (strcmp(type, "Sequence") != 0) return datai_unknown(value, "normalizer", type, "NFC, Sequence");
    while (!result && v[1].at && gai_json_next(&v[1], NULL, &part)) result = datai_read_normalizer(t, part);
    return result;
}

static ga_result datai_add_step(data_tokenizer *t, const char *pattern, datai_step **step, ga_error *e) {
    if (t->n_steps == DATAI_MAX_STEPS)
        return gai_fail(e, GA_ERR_FORMAT, "%s: more than %d pre_tokenizers", t->path, (int)DATAI_MAX_STEPS);
    *step = &t->steps[t->n_steps++];
    (*step)->has_regex = pattern != NULL;
    return pattern ? datai_regex_open(&(*step)->regex, t->path, pattern, e) : GA_OK;
}

/* {"Regex": "..."} or {"String": "..."}; a string stands for itself. */
static ga_result datai_read_pattern(gai_json value, char **pattern) {
    static const char *const names[] = {"Regex", "String"};
    gai_json v[2];
    char *text;
    *pattern = NULL;
    ga_result result = gai_json_members(value, names, 2, v, false);
    if (result) return result;
    bool regex = datai_json_text(v[0], &text);
    if (!regex && !datai_json_text(v[1], &text))
        return gai_fail(value.e, GA_ERR_FORMAT, "%s: a Split whose pattern is neither Regex nor String", value.path);
    char *out = (char *)malloc(2 * strlen(text) + 1);
    if (!out) return gai_fail(value.e, GA_ERR_MEMORY, "%s: out of memory", value.path);
    *pattern = out;
    for (; *text; text++) {
        if (!regex && (unsigned char)*text < 0x80 && !datai_is_alphanumeric(*text)) *out++ = '\\';
        *out++ = *text;
    }
    *out = '\0';
    return GA_OK;
}

static ga_result datai_read_split(data_tokenizer *t, gai_json value, const gai_json *v) {
    enum { PATTERN = 1, BEHAVIOR, INVERT };
    char *behavior, *pattern;
    datai_step *step = NULL;
    if (!v[PATTERN].at || !datai_json_text(v[BEHAVIOR], &behavior))
        return gai_fail(value.e, GA_ERR_FORMAT, "%s: a Split needs pattern and behavior", t->path);
    if (strcmp(behavior, "Isolated") != 0 && strcmp(behavior, "Removed") != 0)
        return datai_unknown(value, "Split behavior", behavior, "Isolated, Removed");
    ga_result result = datai_read_pattern(v[PATTERN], &pattern);
    if (!result) result = datai_add_step(t, pattern, &step, value.e);
    free(pattern);
    if (result) return result;
    step->removed = strcmp(behavior, "Removed") == 0;
    step->invert = gai_json_is(&v[INVERT], "true");
    return GA_OK;
}

/* GPT-2's own pattern is that of ByteLevel, if it uses one. */
static ga_result datai_read_byte_level(data_tokenizer *t, gai_json value, const gai_json *v) {
    enum { ADD_PREFIX_SPACE = 4, USE_REGEX };
    static const char pattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
    bool prefix = !v[ADD_PREFIX_SPACE].at || gai_json_is(&v[ADD_PREFIX_SPACE], "true");
    bool regex = !gai_json_is(&v[USE_REGEX], "false");
    datai_step *step = NULL;
    if (!prefix && !regex) return GA_OK;
    ga_result result = datai_add_step(t, regex ? pattern : NULL, &step, value.e);
    if (!result) step->prefix_space = prefix;
    return result;
}

/* *byte_level: whether the step that turns bytes into characters, which is the last one, has come. */
static ga_result datai_read_pre_tokenizer(data_tokenizer *t, gai_json value, bool *byte_level) {
    enum { PRETOKENIZERS = 6, INDIVIDUAL };
    static const char *const names[] = {"type",      "pattern",       "behavior",         "invert", "add_prefix_space",
                                        "use_regex", "pretokenizers", "individual_digits"};
    gai_json v[8], part;
    char *type;
    ga_result result = datai_json_typed(value, "pre_tokenizer", names, 8, v, &type);
    if (result) return result;
    if (strcmp(type, "Sequence") == 0) {
        while (!result && v[PRETOKENIZERS].at && gai_json_next(&v[PRETOKENIZERS], NULL, &part))
            result = datai_read_pre_tokenizer(t, part, byte_level);
        return result;
    }
    if (*byte_level) return gai_fail(value.e, GA_ERR_FORMAT, "%s: ByteLevel is not the last pre_tokenizer", t->path);
    if (strcmp(type, "Split") == 0) return datai_read_split(t, value, v);
    datai_step *step = NULL;
    if (strcmp(type, "Digits") == 0)
        return datai_add_step(t, gai_json_is(&v[INDIVIDUAL], "true") ? "\\p{N}" : "\\p{N}+", &step, value.e);
    if (strcmp(type, "ByteLevel") != 0)
        return datai_unknown(value, "pre_tokenizer", type, "ByteLevel, Split, Digits, Sequence");
    *byte_level = true;
    return datai_read_byte_level(t, value, v);
}

/* Adds the bytes of an added token to a tree. */
static ga_result datai_trie_add(datai_trie *trie, const char *content, size_t n, int32_t index, ga_error *e) {
    uint32_t node = 0;
    if (n == 0) return GA_OK;
    if (arrlenu(trie->tokens) == 0) arrput(trie->tokens, -1);
    trie->first[(unsigned char)*content] = true;
    for (size_t i = 0; i < n; i++) {
        uint64_t key = (uint64_t)node << 8 | (unsigned char)content[i];
        uint32_t child = data_pairs_get(&trie->children, key, DATAI_NO_RANK);
        if (child == DATAI_NO_RANK) {
            child = (uint32_t)arrlenu(trie->tokens);
            arrput(trie->tokens, -1);
            if (!data_pairs_put(&trie->children, key, child)) return gai_fail(e, GA_ERR_MEMORY, "out of memory");
        }
        node = child;
    }
    if (trie->tokens[node] < 0) trie->tokens[node] = index;
    return GA_OK;
}

static ga_result datai_read_added(data_tokenizer *t, gai_json value, size_t entries) {
    enum { ID, CONTENT, SINGLE_WORD, LSTRIP, RSTRIP, NORMALIZED, SPECIAL, COUNT };
    static const char *const names[] = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"};
    gai_json v[COUNT];
    datai_added a = {0};
    ga_result result = gai_json_members(value, names, COUNT, v, false);
    if (result) return result;
    if (!datai_json_id(&v[ID], &a.id) || !datai_json_text(v[CONTENT], &a.content))
        return gai_fail(value.e, GA_ERR_FORMAT, "%s: an added token needs a number id and a string content", t->path);
    if (*a.content == '\0') return GA_OK;
    a.single_word = gai_json_is(&v[SINGLE_WORD], "true");
    a.lstrip = gai_json_is(&v[LSTRIP], "true");
    a.rstrip = gai_json_is(&v[RSTRIP], "true");
    a.normalized = gai_json_is(&v[NORMALIZED], "true");
    a.special = gai_json_is(&v[SPECIAL], "true");
    result = datai_make_room(t, value, a.id, entries);
    if (result) return result;
    uint64_t known = 0;
    bool in_vocabulary = data_map_get(&t->vocabulary, a.content, strlen(a.content), &known);
    if (in_vocabulary ? known != (uint64_t)a.id : t->tokens[a.id].length > 0)
        return gai_fail(value.e, GA_ERR_FORMAT, "%s: the added token \"%.64s\" has the id %d of another, or another id",
                        t->path, gai_printable(a.content), (int)a.id);
    if (!in_vocabulary) result = datai_add_bytes(t, t->path, a.content, a.id, value.e);
    if (result) return result;
    t->tokens[a.id].special = a.special;
    size_t n = strlen(a.content);
    bool named =
        data_map_get(&t->of_added, a.content, n, &known) || data_map_put(&t->of_added, a.content, n, (uint64_t)a.id);
    a.content = named ? strdup(a.content) : NULL;
    if (!a.content) return gai_fail(value.e, GA_ERR_MEMORY, "%s: out of memory", t->path);
    arrput(t->added, a);
    return GA_OK;
}

/* Special tokens come first where two are the same. */
static ga_result datai_plant_added(data_tokenizer *t, bool special, ga_error *e) {
    for (size_t i = 0; i < arrlenu(t->added); i++) {
        const datai_added *a = &t->added[i];
        if (a->special != special) continue;
        const char *content = a->content;
        size_t n = strlen(content);
        ga_result result = GA_OK;
        if (a->normalized && t->nfc) result = datai_nfc(t->plain, content, n, &t->composed, &content, &n, e);
        if (!result) result = datai_trie_add(a->normalized ? &t->normalized : &t->raw, content, n, (int32_t)i, e);
        if (!result && a->single_word && !t->has_single_word) {
            t->has_single_word = true;
            result = datai_regex_open(&t->word_character, t->path,
                                      "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200c}\\x{200d}]", e);
        }
        if (result) return result;
    }
    return GA_OK;
}

static ga_result datai_read_all_added(data_tokenizer *t, gai_json array) {
    if (!array.at) return GA_OK;
    gai_json value;
    size_t entries = t->vocabulary.count;
    for (const char *p = array.at; p < array.end; p++) entries += *p == '{';
    ga_result result = GA_OK;
    while (!result && gai_json_next(&array, NULL, &value)) result = datai_read_added(t, value, entries);
    if (!result) result = datai_plant_added(t, true, array.e);
    if (!result) result = datai_plant_added(t, false, array.e);
    return result;
}

/* One piece of a template: {"SpecialToken": {"id": NAME}} or {"Sequence": {"id": "A"}}. */
static ga_result datai_read_piece(data_tokenizer *t, gai_json piece, bool *seen_text) {
    static const char *const kinds[] = {"SpecialToken", "Sequence"}, *const fields[] = {"id"};
    gai_json kind[2], v[1];
    char *name;
    ga_result result = gai_json_members(piece, kinds, 2, kind, false);
    if (result) return result;
    if (!kind[0].at) {
        if (!kind[1].at || *seen_text)
            return gai_fail(piece.e, GA_ERR_FORMAT, "%s: a template that is no special tokens around one text",
                            t->path);
        *seen_text = true;
        return GA_OK;
    }
    result = gai_json_members(kind[0], fields, 1, v, false);
    if (result) return result;
    if (!datai_json_text(v[0], &name))
        return gai_fail(piece.e, GA_ERR_FORMAT, "%s: a template's special token has no id", t->path);
    int32_t id = data_tokenizer_find(t, name);
    if (id < 0)
        return gai_fail(piece.e, GA_ERR_FORMAT, "%s: the template's \"%.64s\" is no token", t->path,
                        gai_printable(name));
    arrput(*(*seen_text ? &t->after : &t->before), id);
    return GA_OK;
}

static ga_result datai_read_post_processor(data_tokenizer *t, gai_json value) {
    static const char *const names[] = {"type", "single", "processors"};
    gai_json v[3], part;
    char *type;
    if (!value.at) return GA_OK;
    ga_result result = datai_json_typed(value, "post_processor", names, 3, v, &type);
    if (result || strcmp(type, "ByteLevel") == 0) return result; /* which trims offsets */
    bool sequence = strcmp(type, "Sequence") == 0, seen_text = false;
    if (!sequence && strcmp(type, "TemplateProcessing") != 0)
        return datai_unknown(value, "post_processor", type, "ByteLevel, TemplateProcessing, Sequence");
    gai_json parts = v[sequence ? 2 : 1];
    while (!result && parts.at && gai_json_next(&parts, NULL, &part))
        result = sequence ? datai_read_post_processor(t, part) : datai_read_piece(t, part, &seen_text);
    return result;
}

static ga_result datai_read_decoder(gai_json value) {
    static const char *const names[] = {"type", "decoders"};
    gai_json v[2], part;
    char absent[] = "null", *type = absent;
    ga_result result = value.at ? datai_json_typed(value, "decoder", names, 2, v, &type) : GA_OK;
    if (result || strcmp(type, "ByteLevel") == 0) return result;
    if (strcmp(type, "Sequence") != 0) return datai_unknown(value, "decoder", type, "ByteLevel, Sequence");
    while (!result && v[1].at && gai_json_next(&v[1], NULL, &part)) result = datai_read_decoder(part);
    return result;
}

static ga_result datai_read_tokenizer(data_tokenizer *t, gai_json file, ga_error *e) {
    enum { ADDED, NORMALIZER, PRE_TOKENIZER, POST_PROCESSOR, DECODER, MODEL, COUNT };
    static const char *const names[] = {"added_tokens",   "normalizer", "pre_tokenizer",
                                        "post_processor", "decoder",    "model"};
    gai_json v[COUNT];
    bool byte_level = false;
    ga_result result = gai_json_members(file, names, COUNT, v, false);
    if (result) return result;
    if (!v[MODEL].at) return gai_fail(e, GA_ERR_FORMAT, "%s: has no model", t->path);
    /* What is cheap to refuse comes first. */
    v[DECODER].e = e, v[DECODER].path = t->path;
    result = datai_read_decoder(v[DECODER]);
    if (!result) result = datai_read_normalizer(t, v[NORMALIZER]);
    if (!result && v[PRE_TOKENIZER].at) result = datai_read_pre_tokenizer(t, v[PRE_TOKENIZER], &byte_level);
    if (!result && !byte_level)
        result = gai_fail(e, GA_ERR_FORMAT, "%s: its pre_tokenizer has no ByteLevel: only byte-level BPE is known here",
                          t->path);
    if (!result) result = datai_read_model(t, v[MODEL]);
    if (!result) result = datai_read_all_added(t, v[ADDED]);
    if (!result) result = datai_read_post_processor(t, v[POST_PROCESSOR]);
    if (!result) t->has_parts = datai_find_parts(t);
    return result;
}

/* A tokenizer from n bytes of JSON with a zero byte behind them, which are decoded where they lie. */
static data_tokenizer *datai_tokenizer_of_text(const char *path, char *text, size_t n, ga_error *e) {
    data_tokenizer *t = (data_tokenizer *)calloc(1, sizeof *t);
    gai_json j;
    if (t) t->path = strdup(path);
    if (!t || !t->path) {
        gai_fail(e, GA_ERR_MEMORY, "%s: out of memory", path);
        data_tokenizer_close(t);
        return NULL;
    }
    datai_byte_characters(t->characters);
    t->hash = data_hash(text, n, 0);
    ga_result result = gai_json_open(&j, t->path, text, n, e);
    if (!result) result = datai_read_tokenizer(t, j, e);
    if (!result) return t;
    data_tokenizer_close(t);
    return NULL;
}

static bool datai_is_directory(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

bool data_tokenizer_exists(const char *directory) {
    char path[GAI_PATH];
    return gai_path(path, directory, "/", DATA_TOKENIZER_FILE, NULL) == GA_OK && gai_exists(path);
}

data_tokenizer *data_tokenizer_open(const char *path, ga_error *e) {
    char full[GAI_PATH], *text = NULL;
    FILE *file = NULL;
    uint64_t size = 0;
    ga_error ignored;
    if (!e) e = &ignored;
    bool directory = datai_is_directory(path);
    if (gai_path(full, path, directory ? "/" : "", directory ? DATA_TOKENIZER_FILE : "", e)) return NULL;
    if (gai_open(full, &file, &size, e)) return NULL;
    ga_result result = GA_OK;
    if (size > DATAI_MAX_FILE)
        result = gai_fail(e, GA_ERR_FORMAT, "%s: is larger than %d bytes", full, (int)DATAI_MAX_FILE);
    if (!result) result = gai_read_text(file, full, (size_t)size, &text, e);
    data_tokenizer *t = result ? NULL : datai_tokenizer_of_text(full, text, (size_t)size, e);
    fclose(file);
    GA_FREE(text);
    return t;
}

void data_tokenizer_close(data_tokenizer *t) {
    if (!t) return;
    for (size_t i = 0; i < t->n_steps; i++) {
        if (t->steps[i].has_regex) datai_regex_free(&t->steps[i].regex);
        arrfree(t->steps[i].buffer);
    }
    if (t->has_single_word) datai_regex_free(&t->word_character);
    for (size_t i = 0; i < arrlenu(t->added); i++) free(t->added[i].content);
    data_pairs_free(&t->raw.children);
    data_pairs_free(&t->normalized.children);
    arrfree(t->raw.tokens);
    arrfree(t->normalized.tokens);
    arrfree(t->added);
    arrfree(t->bytes);
    arrfree(t->tokens);
    data_map_free(&t->of_added);
    data_map_free(&t->vocabulary);
    data_pairs_free(&t->merges);
    arrfree(t->merged);
    arrfree(t->before);
    arrfree(t->after);
    arrfree(t->text);
    arrfree(t->composed);
    arrfree(t->key);
    data_map_free(&t->cache);
    arrfree(t->cached);
    arrfree(t->ids);
    arrfree(t->next);
    arrfree(t->previous);
    arrfree(t->heap);
    free(t->path);
    free(t);
}

#endif
