/* gated_attention.h on another machine, for tests/test_ports.sh.
 *
 *     ports OWN [OTHER]
 *
 * Trains a small model, saves it as OWN and reads it again; prints the last loss, and with OTHER, a model that another
 * machine has saved, its loss on the same tokens, in 1e-7 nats: whole numbers, which are the same in every locale. */
#define GATED_ATTENTION_IMPLEMENTATION
#include "../gated_attention.h"

#include <locale.h>

enum { T = 32, STEPS = 20 };

static int32_t tokens[T], targets[T];

static ga_config small_model(void) {
    ga_config c = ga_config_default();
    c.vocab_size = 16, c.d_model = 40, c.n_layers = 2, c.n_heads = 4, c.n_kv_heads = 2;
    c.head_dim = 10, c.d_ff = 48, c.max_seq_len = T;
    return c;
}

static bool is(bool good, const char *what, const ga_error *e) {
    if (!good) printf("%s: %s\n", what, e->text);
    return good;
}

/* Numbers are written with a dot, whatever the locale. */
static bool reads_numbers(void) {
    ga_config c = ga_config_default();
    ga_error e = {GA_OK, ""};
    char text[64];
    bool good = ga_config_set(&c, "learning_rate", "2.5e-4", &e) == GA_OK && c.learning_rate == (double)2.5e-4L;
    good = good && ga_config_get(&c, "learning_rate", text, sizeof text) && strcmp(text, "0.00025") == 0;
    return is(good, "2.5e-4", &e) && is(ga_config_set(&c, "learning_rate", "0,5", &e) == GA_ERR_CONFIG, "0,5", &e);
}

/* What a size_t cannot hold is refused, not cut. */
static bool refuses_sizes(void) {
    ga_config c = ga_config_default();
    ga_error e = {GA_OK, ""};
    ga_summary s;
    bool narrow = SIZE_MAX < UINT64_MAX;
    ga_result steps = ga_config_set(&c, "max_steps", "1000000000000", &e);
    c.batch_size = 64; /* 7.4 GB */
    ga_result rows = ga_summarize(&c, GA_TRAINING, &s, &e);
    c.batch_size = 1, c.d_model = c.vocab_size = 65536; /* the embedding alone has 2^32 values */
    ga_result values = ga_summarize(&c, GA_INFERENCE, &s, &e);
    return is(steps == (narrow ? GA_ERR_CONFIG : GA_OK), "max_steps", &e) &&
           is(rows == (narrow ? GA_ERR_MEMORY : GA_OK), "rows", &e) &&
           is(values == (narrow ? GA_ERR_MEMORY : GA_OK), "values", &e);
}

static bool train(ga_model *m, double *loss, ga_error *e) {
    for (int step = 0; step < STEPS; step++) {
        double norm;
        if (ga_forward_backward(m, tokens, targets, 1, T, 1.0, NULL, loss, e) != GA_OK) return false;
        if (ga_update(m, 1e-3, &norm, e) != GA_OK) return false;
    }
    return ga_forward(m, tokens, targets, 1, T, NULL, loss, e) == GA_OK;
}

static bool loss_of(const char *directory, ga_mode mode, double *loss, ga_error *e) {
    ga_config c = small_model();
    ga_model *m = ga_open(&c, NULL, mode, directory, e);
    bool good = m && ga_forward(m, tokens, targets, 1, T, NULL, loss, e) == GA_OK;
    ga_destroy(m);
    return good;
}

/* Twice: the second time in the place of the first. */
static bool saves(ga_model *m, const char *directory, double loss) {
    ga_error e = {GA_OK, ""};
    ga_training_state state = {STEPS, STEPS, (uint64_t)STEPS * T, 1, 0.1}, read;
    double again, mapped;
    if (!is(ga_save(m, directory, &state, &e) == GA_OK && ga_save(m, directory, &state, &e) == GA_OK, "save", &e))
        return false;
    if (!is(ga_load(m, directory, &read, &e) == GA_OK && read.best_val_loss == state.best_val_loss, "load", &e))
        return false;
    if (!is(loss_of(directory, GA_INFERENCE, &again, &e) && again == loss, "open", &e)) return false;
    return is(loss_of(directory, GA_MAPPED, &mapped, &e) && mapped == loss, "map", &e);
}

int main(int argc, char **argv) {
    ga_error e = {GA_OK, ""};
    double loss = 0, other = 0;
    if (!setlocale(LC_ALL, "") || argc < 2) return 2;
    for (int i = 0; i < T; i++) tokens[i] = i * i % 16, targets[i] = (i + 1) * (i + 1) % 16;
    ga_config c = small_model();
    ga_model *m = ga_create(&c, NULL, GA_TRAINING, &e);
    bool good =
        reads_numbers() && refuses_sizes() && is(m && train(m, &loss, &e), "train", &e) && saves(m, argv[1], loss);
    ga_destroy(m);
    if (!good || (argc > 2 && !is(loss_of(argv[2], GA_INFERENCE, &other, &e), "other", &e))) return 1;
    printf("point %s\nloss %.0f\n", localeconv()->decimal_point, 1e7 * loss);
    if (argc > 2) printf("other %.0f\n", 1e7 * other);
    return 0;
}
