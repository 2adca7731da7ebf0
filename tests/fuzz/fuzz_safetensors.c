/* model.safetensors: read, mapped and inspected. An odd first byte: what follows is the header alone, behind which
 * the target puts its length and as many bytes as the model has. */
#include "fuzz.h"

static ga_model *loaded, *mapped;

static void make_models(void) {
    static const char *const keys[][2] = {{"vocab_size", "3"}, {"d_model", "2"},     {"n_layers", "1"},
                                          {"n_heads", "2"},    {"n_kv_heads", "1"},  {"head_dim", "2"},
                                          {"d_ff", "1"},       {"max_seq_len", "4"}, {"tied_embeddings", "1"}};
    ga_error e;
    ga_config c = ga_config_default();
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        FUZZ_CHECK(ga_config_set(&c, keys[i][0], keys[i][1], &e) == GA_OK);
    loaded = ga_create(&c, NULL, GA_INFERENCE, &e);
    mapped = ga_create(&c, NULL, GA_MAPPED, &e);
    FUZZ_CHECK(loaded && mapped);
    char directory[128];
    snprintf(directory, sizeof directory, "%s/model", fuzz_directory());
    FUZZ_CHECK(ga_save(loaded, directory, NULL, &e) == GA_OK);
}

static void write_file(const uint8_t *data, size_t size) {
    if (size == 0 || data[0] % 2 == 0) {
        fuzz_write("model/model.safetensors", size ? data + 1 : data, size ? size - 1 : 0);
        return;
    }
    size_t header = size - 1, values = loaded->n_weights * sizeof(ga_real);
    unsigned char *all = (unsigned char *)calloc(1, 8 + header + values);
    FUZZ_CHECK(all);
    gai_put_bytes(all, header, 8);
    memcpy(all + 8, data + 1, header);
    fuzz_write("model/model.safetensors", all, 8 + header + values);
    free(all);
}

static int fuzz_safetensors(const uint8_t *data, size_t size) {
    static const int32_t tokens[4] = {0, 1, 2, 0};
    ga_error e = {GA_OK, ""};
    char directory[128];
    ga_inventory inventory;
    ga_config c = ga_config_default();
    if (!loaded) make_models();
    write_file(data, size);
    snprintf(directory, sizeof directory, "%s/model", fuzz_directory());
    ga_result result = ga_load(loaded, directory, NULL, &e);
    if (result != GA_OK) fuzz_check_line(e.text);
    FUZZ_CHECK(ga_inspect(directory, &c, &inventory, &e) == result); /* it checks the same */
    if (result != GA_OK) return 0;
    FUZZ_CHECK(ga_load(mapped, directory, NULL, &e) == GA_OK);
    FUZZ_CHECK(ga_forward(mapped, tokens, NULL, 1, 4, NULL, NULL, &e) == GA_OK);
    gai_unmap(mapped->mapped); /* before the file is written anew */
    mapped->mapped = NULL;
    return 0;
}
