/* fuzz.c - all targets in one program, since the headers take their time to compile: FUZZ_TARGET names the one to run.
 * A target is a file fuzz_NAME.c with `static int fuzz_NAME(const uint8_t *data, size_t size)`, a line of FUZZ_TARGETS,
 * and seeds in seeds/NAME. fuzz.sh runs them.
 */
#include "fuzz.h"

#define FUZZ_TARGETS(X) \
    X(config)           \
    X(config_json)      \
    X(encode)           \
    X(index)            \
    X(json)             \
    X(jsonl)            \
    X(kept)             \
    X(questions)        \
    X(safetensors)      \
    X(tokenizer)        \
    X(tokens)           \
    X(vocabulary)

#include "fuzz_config.c"
#include "fuzz_config_json.c"
#include "fuzz_encode.c"
#include "fuzz_index.c"
#include "fuzz_json.c"
#include "fuzz_jsonl.c"
#include "fuzz_kept.c"
#include "fuzz_questions.c"
#include "fuzz_safetensors.c"
#include "fuzz_tokenizer.c"
#include "fuzz_tokens.c"
#include "fuzz_vocabulary.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int (*target)(const uint8_t *, size_t);
    if (!target) {
        const char *name = getenv("FUZZ_TARGET");
#define X(target_name) \
    if (name && strcmp(name, #target_name) == 0) target = fuzz_##target_name;
        FUZZ_TARGETS(X)
#undef X
        FUZZ_CHECK(target);
    }
    return target(data, size);
}
