/* A configuration file (.cfg), which may include itself. */
#include "fuzz.h"

static int fuzz_config(const uint8_t *data, size_t size) {
    ga_error e = {GA_OK, ""};
    ga_config c = ga_config_default();
    ga_summary s;
    const char *path = fuzz_write("run.cfg", data, size);
    ga_result result = ga_config_load(&c, path, &e);
    if (result == GA_OK) result = ga_config_check(&c, &e);
    if (result == GA_OK) result = ga_summarize(&c, GA_TRAINING, &s, &e);
    if (result != GA_OK) FUZZ_CHECK(e.text[0]);
    return 0;
}
