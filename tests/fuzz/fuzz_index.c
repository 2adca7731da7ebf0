/* model.safetensors.index.json beside two shards. */
#include "fuzz.h"

static int fuzz_index(const uint8_t *data, size_t size) {
    static const char *const shards[] = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
    static bool made;
    ga_error e = {GA_OK, ""};
    gai_tensor_files all;
    for (int i = 0; i < 2 && !made; i++) {
        char file[128];
        int n = snprintf(file + 8, sizeof file - 8, "{\"%c\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
                         'a' + i);
        gai_put_bytes((unsigned char *)file, (uint64_t)n, 8);
        memcpy(file + 8 + n, "\0\0\0", 4);
        fuzz_write(shards[i], file, (size_t)n + 12);
    }
    made = true;
    fuzz_write("model.safetensors.index.json", data, size);
    ga_result result = gai_open_files(&all, fuzz_directory(), "/model", &e);
    if (result != GA_OK) fuzz_check_line(e.text);
    for (size_t i = 0; i < all.n; i++) /* only files of this directory, and no name twice */
        FUZZ_CHECK(strncmp(all.files[i].path, fuzz_directory(), strlen(fuzz_directory())) == 0 &&
                   !strchr(all.files[i].path + strlen(fuzz_directory()) + 1, '/'));
    gai_close_files(&all);
    return 0;
}
