/* Texts under the tokenizers of the fixtures, by the first byte: the tokens stand for the text, in parts too. */
#include "fuzz.h"

/* The text with what is no UTF-8 replaced, as an stb_ds array. */
static char *replaced(const char *text, size_t n) {
    char *out = NULL;
    const unsigned char *p = (const unsigned char *)text, *end = p + n;
    while (p < end) {
        uint32_t code;
        int length = datai_utf8_next(p, end, &code);
        datai_append_bytes(&out, length < 0 ? "\xEF\xBF\xBD" : (const char *)p, length < 0 ? 3 : (size_t)length);
        p += length < 0 ? -length : length;
    }
    return out;
}

static void check_bytes(const data_tokenizer *t, const int32_t *tokens, const char *text, size_t n) {
    char *expected = replaced(text, n);
    size_t at = 0;
    for (size_t i = 0; i < arrlenu(tokens); i++) {
        size_t length = 0;
        const char *bytes = data_tokenizer_bytes(t, tokens[i], &length);
        FUZZ_CHECK(bytes && at + length <= arrlenu(expected) && memcmp(bytes, expected + at, length) == 0);
        at += length;
    }
    FUZZ_CHECK(at == arrlenu(expected));
    arrfree(expected);
}

static int fuzz_encode(const uint8_t *data, size_t size) {
    /* The first one changes no byte of a text. */
    static const char *const names[] = {"llama", "gpt2", "qwen", "chat", "digits", "removed", "runs"};
    static data_tokenizer *tokenizers[7];
    if (size == 0) return 0;
    size_t which = data[0] % 7, exact = 1;
    ga_error e = {GA_OK, ""};
    char path[96];
    snprintf(path, sizeof path, "tests/fixtures/tokenizers/%s.json", names[which]);
    if (!tokenizers[which]) tokenizers[which] = data_tokenizer_open(path, &e);
    data_tokenizer *t = tokenizers[which];
    FUZZ_CHECK(t);
    const char *text = (const char *)data + 1;
    size_t n = size - 1;
    int32_t *tokens = NULL, *parts = NULL;
    FUZZ_CHECK(data_tokenizer_encode(t, text, n, false, &tokens, &e) == GA_OK);
    if (which < exact) check_bytes(t, tokens, text, n);
    size_t part = data_tokenizer_part(t, text, n);
    FUZZ_CHECK(part < n || n == 0);
    if (part > 0) FUZZ_CHECK(data_tokenizer_encode_part(t, text, part, &parts, &e) == GA_OK);
    FUZZ_CHECK(data_tokenizer_encode(t, text + part, n - part, false, &parts, &e) == GA_OK);
    FUZZ_CHECK(arrlenu(parts) == arrlenu(tokens));
    FUZZ_CHECK(arrlenu(tokens) == 0 || memcmp(parts, tokens, arrlenu(tokens) * sizeof *tokens) == 0);
    arrfree(tokens);
    arrfree(parts);
    return 0;
}
