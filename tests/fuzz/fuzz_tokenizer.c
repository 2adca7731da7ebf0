/* tokenizer.json: it is refused with a line, or a text becomes tokens that it has. */
#include "fuzz.h"

static int fuzz_tokenizer(const uint8_t *data, size_t size) {
    static const char text[] = "It's 12 e\xCC\x81t\xC3\xA9<|endoftext|> \n\n  ab\xFF\xE4\xBD\xA0 <mask> word";
    ga_error e = {GA_OK, ""};
    data_tokenizer *t = data_tokenizer_open(fuzz_write("tokenizer.json", data, size), &e);
    if (!t) {
        fuzz_check_line(e.text);
        return 0;
    }
    int32_t *tokens = NULL;
    char label[DATA_LABEL_SIZE];
    if (data_tokenizer_encode(t, text, sizeof text - 1, true, &tokens, &e)) fuzz_check_line(e.text);
    for (size_t i = 0; i < arrlenu(tokens); i++) {
        size_t n = 0;
        FUZZ_CHECK(tokens[i] >= 0 && (size_t)tokens[i] < data_tokenizer_size(t));
        FUZZ_CHECK(data_tokenizer_bytes(t, tokens[i], &n) && n > 0);
        FUZZ_CHECK(strlen(data_tokenizer_label(t, tokens[i], label, sizeof label)) < sizeof label);
    }
    arrfree(tokens);
    data_tokenizer_close(t);
    return 0;
}
