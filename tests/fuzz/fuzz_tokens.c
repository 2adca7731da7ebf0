/* Files of tokens and of text, by the first byte: .bin .u16 .u32 .txt .jsonl; cut into windows of both parts. */
#include "fuzz.h"

enum { T = 5, VOCABULARY = 300 };

static void read_windows(data_stream *s, data_part part) {
    int32_t inputs[T], targets[T];
    char error[256] = "";
    uint64_t n = data_windows(s, part);
    for (uint64_t i = 0; i < n && i < 64; i++) {
        if (!data_window(s, part, i, inputs, targets, error, sizeof error)) {
            FUZZ_CHECK(error[0]);
            return;
        }
        for (size_t t = 0; t < T; t++)
            FUZZ_CHECK(inputs[t] >= 0 && inputs[t] < VOCABULARY && targets[t] >= 0 && targets[t] < VOCABULARY);
        char label[DATA_LABEL_SIZE];
        FUZZ_CHECK(strlen(data_token_text(s, inputs[0], label, sizeof label)) < sizeof label);
    }
}

static int fuzz_tokens(const uint8_t *data, size_t size) {
    static const char *const names[] = {"x.bin", "x.u16", "x.u32", "x.txt", "x.jsonl"};
    char error[256] = "";
    if (size == 0) return 0;
    data_options options = {.source = fuzz_write(names[data[0] % 5], data + 1, size - 1),
                            .vocab_size = VOCABULARY,
                            .seq_len = T,
                            .val_fraction = data[0] & 64 ? 0.3 : 0,
                            .shuffle = data[0] & 32,
                            .bos_token = data[0] & 128 ? 299 : -1};
    data_stream *s = data_open(&options, error, sizeof error);
    if (!s) {
        FUZZ_CHECK(error[0]);
        return 0;
    }
    read_windows(s, DATA_TRAIN);
    read_windows(s, DATA_VAL);
    data_close(s);
    return 0;
}
