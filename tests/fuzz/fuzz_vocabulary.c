/* A vocabulary learned from a text, .txt or .jsonl by the first byte: the file reads back and knows the text. */
#include "fuzz.h"
#include "../../data/vocabulary.h"

static int fuzz_vocabulary(const uint8_t *data, size_t size) {
    if (size < 2) return 0; /* an empty text teaches nothing, and that is said */
    ga_error e = {GA_OK, ""};
    bool lines = data[0] & 1;
    char text[128], output[128];
    snprintf(text, sizeof text, "%s", fuzz_write(lines ? "x.jsonl" : "x.txt", data + 1, size - 1));
    snprintf(output, sizeof output, "%s/learned.json", fuzz_directory());
    const char *texts[] = {text};
    data_vocabulary_options options = {.vocab_size = 258 + data[0] / 2, .min_frequency = 1};
    if (data_vocabulary_train(texts, 1, &options, output, &e)) {
        FUZZ_CHECK(lines);
        fuzz_check_line(e.text);
        return 0;
    }
    data_tokenizer *t = data_tokenizer_open(output, &e);
    FUZZ_CHECK(t && data_tokenizer_size(t) >= 257 && data_tokenizer_size(t) <= options.vocab_size);
    int32_t *tokens = NULL;
    FUZZ_CHECK(data_tokenizer_encode(t, (const char *)data + 1, size - 1, true, &tokens, &e) == GA_OK);
    FUZZ_CHECK(arrlenu(tokens) <= 3 * size);
    arrfree(tokens);
    data_tokenizer_close(t);
    return 0;
}
