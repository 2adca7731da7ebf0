/* The tokens kept beside a text: whatever lies there, they are those of the text. By the first byte the hashes are put
 * right, so that what they guard is reached; then the tokens may be others, but no more than the file holds. */
#include "fuzz.h"

static int fuzz_kept(const uint8_t *data, size_t size) {
    static const char text[] = "The gate decides.\n";
    static data_tokenizer *t;
    ga_error e = {GA_OK, ""};
    data_text_layout layout;
    char path[128], kept[160];
    unsigned char bytes[512];
    if (size == 0 || size > sizeof bytes) return 0;
    if (!t) t = data_tokenizer_open("tests/fixtures/tokenizers/qwen.json", &e);
    FUZZ_CHECK(t);
    snprintf(path, sizeof path, "%s", fuzz_write("kept.txt", text, sizeof text - 1));
    snprintf(kept, sizeof kept, "kept.txt.%016llx.tokens", (unsigned long long)data_tokenizer_hash(t));
    memcpy(bytes, data + 1, --size);
    bool right = data[0] & 1 && size >= DATAI_TEXT_HEADER;
    if (right) {
        datai_put64(bytes + 16, sizeof text - 1);
        datai_put64(bytes + 32, data_hash(text, sizeof text - 1, 0));
        datai_put64(bytes + 40, data_tokenizer_hash(t));
        datai_put64(bytes + 56,
                    size > DATAI_TEXT_HEADER ? data_hash(bytes + DATAI_TEXT_HEADER, size - DATAI_TEXT_HEADER, 0) : 0);
        datai_put64(bytes + 64, data_hash(bytes, 64, 0));
    }
    fuzz_write(kept, bytes, size);
    int fd = data_text_tokens(path, t, NULL, &layout, &e);
    FUZZ_CHECK(fd >= 0);
    struct stat status;
    FUZZ_CHECK(fstat(fd, &status) == 0);
    FUZZ_CHECK((uint64_t)status.st_size == layout.header + layout.tokens * layout.width);
    int32_t *tokens = NULL;
    FUZZ_CHECK(data_tokenizer_encode(t, text, sizeof text - 1, false, &tokens, &e) == GA_OK);
    FUZZ_CHECK(right || layout.tokens == arrlenu(tokens));
    arrfree(tokens);
    close(fd);
    return 0;
}
