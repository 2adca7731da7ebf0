/* config.json of a checkpoint: what is taken must be a configuration that reads back as itself. */
#include "fuzz.h"

static int fuzz_config_json(const uint8_t *data, size_t size) {
    ga_error e = {GA_OK, ""};
    ga_config c = ga_config_default();
    ga_summary s;
    fuzz_write("config.json", data, size);
    if (ga_load_config(&c, fuzz_directory(), false, &e) != GA_OK) {
        fuzz_check_line(e.text);
        return 0;
    }
    ga_key key;
    for (size_t i = 0; ga_config_key(i, &key); i++) {
        char text[GA_TEXT];
        FUZZ_CHECK(ga_config_get(&c, key.name, text, sizeof text));
        FUZZ_CHECK(ga_config_set(&c, key.name, text, &e) == GA_OK);
    }
    if (ga_summarize(&c, GA_MAPPED, &s, &e) != GA_OK) fuzz_check_line(e.text);
    return 0;
}
