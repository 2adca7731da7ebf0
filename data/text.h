/* data/text.h - the tokens of a text file, made once and kept beside it.
 *
 *     int fd = data_text_tokens("book.txt", tokenizer, NULL, &layout, &e);      // -1: a failure
 *     pread(fd, tokens, n * layout.width, layout.header + first * layout.width);
 *
 * A .txt file is one document; the documents of a .jsonl file are each followed by the tokenizer's separator
 * (<|endoftext|> and the like, else a newline). The tokens lie in book.txt.<hash of the tokenizer>.tokens, all of it
 * little-endian:
 *
 *      0  "GATOKENS"             24  mtime of the text, ns      48  tokens
 *      8  u32 version, u32 width 32  hash of the text           56  hash of the tokens
 *     16  size of the text       40  hash of the tokenizer      64  hash of bytes 0 to 63
 *     72  tokens of `width` bytes
 *
 * The file counts if all of that fits; where only the text's mtime is another one, if the text's hash is still the
 * same. Else it is made anew, under another name that is renamed at the end. Where the directory cannot be written, the
 * tokens go to a file without a name. The file that defines DATA_IMPLEMENTATION holds the code.
 */
#ifndef DATA_TEXT_H
#define DATA_TEXT_H

#include "tokenizer.h"

/* Told now and then how far a long work has come, 0 to 1; NULL: nobody wants to know. */
typedef void data_progress(const char *what, double share);

typedef struct {
    uint64_t header, tokens; /* bytes before the first token; how many there are */
    unsigned width;          /* bytes of a token, 2 or 4 */
} data_text_layout;

/* A file to read the tokens of `path` from; -1 on failure. */
int data_text_tokens(const char *path, data_tokenizer *t, data_progress *progress, data_text_layout *layout,
                     ga_error *e);

/* Hands the parts of a .txt or .jsonl file, one after the other, to visit(context, text, n, more, end): `more` is true
 * if one more byte stands behind the n that does not belong to the part; `end` at the end of each document. */
typedef ga_result data_text_visitor(void *context, const char *text, size_t n, bool more, bool end, ga_error *e);
ga_result data_text_visit(const char *path, const data_tokenizer *t, data_progress *progress, const char *what,
                          data_text_visitor *visit, void *context, ga_error *e);

/* Whether the first 64 KiB of a file are text in UTF-8, without zero bytes; false: `at` is where they are not. A file
 * that cannot be read is its reader's affair. */
bool data_text_is_utf8(const char *path, size_t *at);

/* Copies a file, whole or not at all. */
ga_result data_copy_file(const char *from, const char *to, ga_error *e);

#endif

#if defined(DATA_IMPLEMENTATION) && !defined(DATA_TEXT_IMPLEMENTED)
#define DATA_TEXT_IMPLEMENTED

#include "jsonl.h"

enum { DATAI_TEXT_HEADER = 72, DATAI_TEXT_VERSION = 1, DATAI_TEXT_PART = 1 << 22, DATAI_TEXT_BLOCK = 1 << 20 };

/* ---- reading text in parts ---- */

static bool datai_ends_with(const char *text, const char *ending) {
    size_t n = strlen(text), k = strlen(ending);
    return n > k && strcmp(text + n - k, ending) == 0;
}

static ga_result datai_visit_txt(const char *path, FILE *file, uint64_t size, const data_tokenizer *t,
                                 data_progress *progress, const char *what, data_text_visitor *visit, void *context,
                                 ga_error *e) {
    char *text = NULL;
    size_t have = 0;
    uint64_t done = 0;
    ga_result result = GA_OK;
    for (bool end = false; !result && !end;) {
        arrsetlen(text, have + DATAI_TEXT_PART);
        size_t got = fread(text + have, 1, DATAI_TEXT_PART, file);
        have += got;
        end = got < DATAI_TEXT_PART;
        if (end && ferror(file)) {
            result = gai_file_error(e, "read", path);
            break;
        }
        size_t part = end ? have : data_tokenizer_part(t, text, have);
        if (part == 0 && !end) continue; /* longer lines than the part: read on */
        if (part > 0 || end) result = visit(context, text, part, !end, end, e);
        memmove(text, text + part, have - part);
        have -= part;
        done += part;
        if (progress && size > 0) progress(what, (double)done / (double)size);
    }
    arrfree(text);
    return result;
}

static ga_result datai_visit_jsonl(const char *path, FILE *file, uint64_t size, data_progress *progress,
                                   const char *what, data_text_visitor *visit, void *context, ga_error *e) {
    unsigned char *buffer = malloc(DATAI_TEXT_BLOCK);
    if (!buffer) return gai_fail(e, GA_ERR_MEMORY, "%s: out of memory", path);
    data_jsonl j;
    data_jsonl_from_file(&j, fileno(file), buffer, DATAI_TEXT_BLOCK);
    char *text = NULL;
    uint64_t shown = 0;
    ga_result result = GA_OK;
    while (!result && data_jsonl_next(&j, &text)) {
        result = visit(context, text, arrlenu(text), false, true, e);
        if (!progress || j.end_offset - shown < DATAI_TEXT_BLOCK) continue;
        shown = j.end_offset;
        progress(what, (double)shown / (double)size);
    }
    if (!result && j.problem)
        result = gai_fail(e, GA_ERR_FORMAT, "%s:%llu: %s", path, (unsigned long long)j.now.line, j.problem);
    if (!result && progress) progress(what, 1);
    arrfree(text);
    free(buffer);
    return result;
}

ga_result data_text_visit(const char *path, const data_tokenizer *t, data_progress *progress, const char *what,
                          data_text_visitor *visit, void *context, ga_error *e) {
    FILE *file = NULL;
    uint64_t size = 0;
    ga_result result = gai_open(path, &file, &size, e);
    if (result) return result;
    if (datai_ends_with(path, ".jsonl"))
        result = datai_visit_jsonl(path, file, size, progress, what, visit, context, e);
    else
        result = datai_visit_txt(path, file, size, t, progress, what, visit, context, e);
    fclose(file);
    return result;
}

bool data_text_is_utf8(const char *path, size_t *at) {
    enum { LOOKED_AT = 1 << 16 };
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    char *text = fd < 0 ? NULL : (char *)malloc(LOOKED_AT);
    ssize_t n = text ? read(fd, text, LOOKED_AT) : 0;
    size_t have = n > 0 ? (size_t)n : 0;
    const char *zero = have > 0 ? (const char *)memchr(text, 0, have) : NULL;
    *at = datai_utf8_valid(text, zero ? (size_t)(zero - text) : have);
    free(text);
    if (fd >= 0) close(fd);
    return !zero && *at + 4 > have; /* the last character may be cut */
}

/* ---- the file of tokens ---- */

static void datai_put64(unsigned char *out, uint64_t value) {
    for (int i = 0; i < 8; i++) out[i] = (unsigned char)(value >> (8 * i));
}

static uint64_t datai_get64(const unsigned char *bytes) {
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--) value = value << 8 | bytes[i];
    return value;
}

static bool datai_read_fully(int fd, unsigned char *out, size_t n, uint64_t offset) {
    while (n > 0) {
        ssize_t got = pread(fd, out, n, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        out += got;
        n -= (size_t)got;
        offset += (uint64_t)got;
    }
    return true;
}

static bool datai_write_fully(int fd, const unsigned char *bytes, size_t n, uint64_t offset) {
    while (n > 0) {
        ssize_t put = pwrite(fd, bytes, n, (off_t)offset);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return false;
        bytes += put;
        n -= (size_t)put;
        offset += (uint64_t)put;
    }
    return true;
}

/* Hash of the bytes [first, first + n) of a file, block by block. */
static bool datai_hash_file(int fd, uint64_t first, uint64_t n, uint64_t *hash) {
    unsigned char *block = malloc(DATAI_TEXT_BLOCK);
    bool good = block != NULL;
    *hash = 0;
    while (good && n > 0) {
        size_t size = n < DATAI_TEXT_BLOCK ? (size_t)n : DATAI_TEXT_BLOCK;
        good = datai_read_fully(fd, block, size, first);
        if (good) *hash = data_hash(block, size, *hash);
        first += size;
        n -= size;
    }
    free(block);
    return good;
}

/* The text that tokens are of. */
typedef struct {
    const char *path;
    int fd;
    uint64_t size, mtime, tokenizer;
} datai_source;

static void datai_text_header(unsigned char header[DATAI_TEXT_HEADER], const datai_source *s, uint64_t text_hash,
                              const data_text_layout *layout, uint64_t hash) {
    memcpy(header, "GATOKENS", 8);
    datai_put64(header + 8, DATAI_TEXT_VERSION | (uint64_t)layout->width << 32);
    const uint64_t fields[] = {s->size, s->mtime, text_hash, s->tokenizer, layout->tokens, hash};
    for (size_t i = 0; i < 6; i++) datai_put64(header + 16 + 8 * i, fields[i]);
    datai_put64(header + 64, data_hash(header, 64, 0));
}

/* Whether a file holds the tokens of the source. */
static bool datai_tokens_fit(int fd, const datai_source *s, data_text_layout *layout) {
    unsigned char header[DATAI_TEXT_HEADER];
    struct stat status;
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode) || !datai_read_fully(fd, header, sizeof header, 0))
        return false;
    uint64_t form = datai_get64(header + 8), hash;
    layout->width = (unsigned)(form >> 32);
    layout->header = DATAI_TEXT_HEADER;
    layout->tokens = datai_get64(header + 48);
    if (memcmp(header, "GATOKENS", 8) != 0 || datai_get64(header + 64) != data_hash(header, 64, 0) ||
        (uint32_t)form != DATAI_TEXT_VERSION || (layout->width != 2 && layout->width != 4) ||
        datai_get64(header + 16) != s->size || datai_get64(header + 40) != s->tokenizer ||
        layout->tokens > UINT64_MAX / 8 ||
        (uint64_t)status.st_size != DATAI_TEXT_HEADER + layout->tokens * layout->width)
        return false;
    if (!datai_hash_file(fd, DATAI_TEXT_HEADER, layout->tokens * layout->width, &hash) ||
        hash != datai_get64(header + 56))
        return false;
    if (datai_get64(header + 24) == s->mtime) return true;
    uint64_t text_hash;
    if (!datai_hash_file(s->fd, 0, s->size, &text_hash) || text_hash != datai_get64(header + 32)) return false;
    datai_text_header(header, s, text_hash, layout, hash); /* where it cannot be written, the text is hashed again */
    (void)datai_write_fully(fd, header, sizeof header, 0);
    return true;
}

typedef struct {
    data_tokenizer *tokenizer;
    const char *path;
    int fd;
    data_text_layout *layout;
    int32_t *tokens;      /* stb_ds array */
    unsigned char *bytes; /* stb_ds array: tokens that make no whole block yet */
    uint64_t written, hash;
} datai_token_writer;

static ga_result datai_flush_tokens(datai_token_writer *w, bool end, ga_error *e) {
    unsigned width = w->layout->width;
    for (size_t i = 0; i < arrlenu(w->tokens); i++)
        for (unsigned b = 0; b < width; b++) arrput(w->bytes, (unsigned char)((uint32_t)w->tokens[i] >> (8 * b)));
    w->layout->tokens += arrlenu(w->tokens);
    arrsetlen(w->tokens, 0);
    size_t size = arrlenu(w->bytes), done = 0;
    while (size - done >= DATAI_TEXT_BLOCK || (end && size > done)) {
        size_t n = size - done < DATAI_TEXT_BLOCK ? size - done : DATAI_TEXT_BLOCK;
        w->hash = data_hash(w->bytes + done, n, w->hash);
        if (!datai_write_fully(w->fd, w->bytes + done, n, DATAI_TEXT_HEADER + w->written))
            return gai_fail(e, GA_ERR_FILE, "%s: cannot write its tokens: %s", w->path, strerror(errno));
        w->written += n;
        done += n;
    }
    if (done > 0) memmove(w->bytes, w->bytes + done, size - done);
    arrsetlen(w->bytes, size - done);
    return GA_OK;
}

static ga_result datai_write_part(void *context, const char *text, size_t n, bool more, bool end, ga_error *e) {
    datai_token_writer *w = (datai_token_writer *)context;
    ga_result result = more ? data_tokenizer_encode_part(w->tokenizer, text, n, &w->tokens, e)
                            : data_tokenizer_encode(w->tokenizer, text, n, false, &w->tokens, e);
    if (!result && end && datai_ends_with(w->path, ".jsonl")) {
        int32_t separator = data_tokenizer_separator(w->tokenizer);
        if (separator >= 0)
            arrput(w->tokens, separator);
        else
            result = data_tokenizer_encode(w->tokenizer, "\n", 1, false, &w->tokens, e);
    }
    return result ? result : datai_flush_tokens(w, false, e);
}

static ga_result datai_write_tokens(const datai_source *s, data_tokenizer *t, int fd, data_progress *progress,
                                    data_text_layout *layout, ga_error *e) {
    unsigned char header[DATAI_TEXT_HEADER];
    *layout = (data_text_layout){DATAI_TEXT_HEADER, 0, data_tokenizer_size(t) <= 0x10000 ? 2 : 4};
    datai_token_writer w = {.tokenizer = t, .path = s->path, .fd = fd, .layout = layout};
    uint64_t text_hash = 0;
    ga_result result = data_text_visit(s->path, t, progress, "tokens", datai_write_part, &w, e);
    if (!result) result = datai_flush_tokens(&w, true, e);
    if (!result && !datai_hash_file(s->fd, 0, s->size, &text_hash)) result = gai_file_error(e, "read", s->path);
    datai_text_header(header, s, text_hash, layout, w.hash);
    if (!result && (!datai_write_fully(fd, header, sizeof header, 0) || fsync(fd) != 0))
        result = gai_fail(e, GA_ERR_FILE, "%s: cannot write its tokens: %s", s->path, strerror(errno));
    arrfree(w.tokens);
    arrfree(w.bytes);
    return result;
}

static int datai_unnamed_file(void) {
    const char *directory = getenv("TMPDIR");
    char path[GAI_PATH];
    if (gai_path(path, directory ? directory : "/tmp", "/", "tokens-XXXXXX", NULL)) return -1;
    int fd = mkstemp(path);
    if (fd >= 0) unlink(path);
    return fd;
}

static int datai_make_tokens(const datai_source *s, data_tokenizer *t, const char *kept, data_progress *progress,
                             data_text_layout *layout, ga_error *e) {
    char partial[GAI_PATH];
    int n = snprintf(partial, sizeof partial, "%s.%ld", kept, (long)getpid());
    bool named = n > 0 && (size_t)n < sizeof partial;
    int fd = named ? open(partial, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666) : -1;
    named = fd >= 0;
    if (!named) fd = datai_unnamed_file();
    if (fd < 0) return gai_fail(e, GA_ERR_FILE, "%s: nowhere to write its tokens: %s", s->path, strerror(errno)), -1;
    ga_result result = datai_write_tokens(s, t, fd, progress, layout, e);
    if (!result && named && rename(partial, kept) != 0) result = gai_file_error(e, "rename", partial);
    if (!result) return fd;
    close(fd);
    if (named) unlink(partial);
    return -1;
}

int data_text_tokens(const char *path, data_tokenizer *t, data_progress *progress, data_text_layout *layout,
                     ga_error *e) {
    char kept[GAI_PATH];
    struct stat status;
    datai_source s = {.path = path, .tokenizer = data_tokenizer_hash(t)};
    int n = snprintf(kept, sizeof kept, "%s.%016llx.tokens", path, (unsigned long long)s.tokenizer);
    if (n < 0 || (size_t)n >= sizeof kept) return gai_fail(e, GA_ERR_FILE, "%.128s...: the path is too long", path), -1;
    s.fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (s.fd < 0 || fstat(s.fd, &status) != 0) {
        gai_file_error(e, "open", path);
        if (s.fd >= 0) close(s.fd);
        return -1;
    }
    s.size = (uint64_t)status.st_size;
#ifdef __APPLE__
    struct timespec changed = status.st_mtimespec;
#else
    struct timespec changed = status.st_mtim;
#endif
    s.mtime = (uint64_t)changed.tv_sec * 1000000000u + (uint64_t)changed.tv_nsec;
    int fd = open(kept, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) fd = open(kept, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 && !datai_tokens_fit(fd, &s, layout)) {
        close(fd);
        fd = -1;
    }
    if (fd < 0) fd = datai_make_tokens(&s, t, kept, progress, layout, e);
    close(s.fd);
    return fd;
}

/* Under another name first, which is synced and renamed. */
static ga_result datai_write_file(const char *path, const char *bytes, size_t n, ga_error *e) {
    char partial[GAI_PATH];
    ga_result result = gai_path(partial, path, "", ".tmp", e);
    if (result) return result;
    FILE *file = fopen(partial, "wb");
    bool written = file && fwrite(bytes, 1, n, file) == n && fflush(file) == 0 && fsync(fileno(file)) == 0;
    if (file) written = (fclose(file) == 0) & written;
    if (written && rename(partial, path) == 0) return GA_OK;
    result = gai_file_error(e, "write", path);
    if (file) unlink(partial);
    return result;
}

ga_result data_copy_file(const char *from, const char *to, ga_error *e) {
    FILE *file = NULL;
    uint64_t size = 0;
    char *bytes = NULL;
    ga_result result = gai_open(from, &file, &size, e);
    if (result) return result;
    result = gai_read_text(file, from, (size_t)size, &bytes, e);
    fclose(file);
    if (!result) result = datai_write_file(to, bytes, (size_t)size, e);
    GA_FREE(bytes);
    return result;
}

#endif
