/* JSON, and the object of a run's state in it. */
#include "fuzz.h"

/* Goes through a value that is known to be right; returns how many values there are in it. */
static size_t walk(gai_json value) {
    gai_json inner;
    char *key, *text;
    size_t count = 1;
    char first = gai_json_peek(&value);
    FUZZ_CHECK(value.at < value.end);
    if (first == '"')
        FUZZ_CHECK(gai_json_string(&value, &text) && strlen(text) < (size_t)(value.end - value.start) + 1);
    if (first == '{')
        while (gai_json_next(&value, &key, &inner)) count += walk(inner);
    if (first == '[')
        while (gai_json_next(&value, NULL, &inner)) count += walk(inner);
    return count;
}

static int fuzz_json(const uint8_t *data, size_t size) {
    ga_error e = {GA_OK, ""};
    gai_json j;
    ga_training_state state;
    uint64_t updates;
    for (int pass = 0; pass < 2; pass++) { /* strings are decoded where they lie, so each pass has a copy */
        char *text = (char *)malloc(size + 1);
        FUZZ_CHECK(text);
        memcpy(text, data, size);
        text[size] = '\0';
        ga_result result = gai_json_open(&j, "text", text, size, &e);
        if (result == GA_OK && pass == 0) FUZZ_CHECK(walk(j) <= size);
        if (result == GA_OK && pass == 1) result = gai_parse_state(&state, &updates, j);
        if (result != GA_OK) fuzz_check_line(e.text);
        free(text);
    }
    return 0;
}
