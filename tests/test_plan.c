/* Tests of what train computes beside the model: how long a run is, which windows it sees, when it ends, whether a run that
 * goes on is the same one. The programs as a whole are driven by test_train.sh.
 *
 *     cc -std=c11 -O2 -I. tests/test_plan.c -o test_plan -lcmocka -lm && ./test_plan
 */
#define main train_main
#include "train.c"
#undef main
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

static char directory[] = "build/test_plan.XXXXXX";

static const char *path(const char *name) {
    static char full[128];
    snprintf(full, sizeof full, "%s/%s", directory, name);
    return full;
}

/* The run of these keys, "key=value key=value". */
static run make_run(const char *keys) {
    run r = {.config = ga_config_default()};
    char text[512];
    snprintf(text, sizeof text, "%s", keys);
    for (char *key = strtok(text, " "); key; key = strtok(NULL, " ")) {
        char *equals = strchr(key, '=');
        *equals = 0;
        if (ga_config_set(&r.config, key, equals + 1, &r.error)) fail_msg("%s", r.error.text);
    }
    snprintf(r.directory, sizeof r.directory, "%s", directory);
    snprintf(r.config_copy, sizeof r.config_copy, "%s/config.cfg", directory);
    size_t rows = r.config.batch_size * r.config.max_seq_len;
    r.inputs = calloc(rows, sizeof *r.inputs), r.targets = calloc(rows, sizeof *r.targets);
    return r;
}

static void open_stream(run *r) {
    if (!open_data(r)) fail_msg("%s", r->failure);
}

static void end_run(run *r) {
    data_close(r->stream);
    free(r->inputs), free(r->targets);
}

/* A file of n tokens i % 251, but for the one at `other`. */
static void write_tokens(const char *name, size_t n, size_t other) {
    FILE *f = fopen(path(name), "wb");
    assert_non_null(f);
    for (size_t i = 0; i < n; i++) putc(i == other ? 255 : (int)(i % 251), f), putc(0, f);
    assert_int_equal(fclose(f), 0);
}

/* ---- words --------------------------------------------------------------------------------------------------------- */

static void test_words(void **state) {
    (void)state;
    char text[32];
    assert_string_equal(duration(99.4, text), "99 s");
    assert_string_equal(duration(100, text), "1 min 40 s");
    assert_string_equal(duration(5999, text), "99 min 59 s");
    assert_string_equal(duration(7325, text), "2 h 02 min");
    assert_string_equal(duration(4 * 86400, text), "4.0 days");
    assert_string_equal(duration(NAN, text), "?");
    assert_string_equal(scaled(999, "B", text), "999 B");
    assert_string_equal(scaled(1234567, "B", text), "1.23 MB");
    assert_string_equal(grouped(1234567, text), "1,234,567");
    assert_string_equal(grouped(999, text), "999");
}

/* ---- how long, and which windows ------------------------------------------------------------------------------------- */

#define STEP "max_seq_len=128 batch_size=2 gradient_accumulation_steps=3" /* 768 tokens */

static void test_steps(void **state) {
    (void)state;
    run r = make_run(STEP " max_steps=0 max_tokens=1000 epochs=2");
    assert_true(plan_steps(&r));
    assert_int_equal(r.steps, 3);         /* 2000 tokens */
    assert_int_equal(r.epoch_windows, 8); /* that 1000 tokens begin */
    r.config.max_steps = 5;
    assert_true(plan_steps(&r));
    assert_int_equal(r.steps, 5);
    r.config.max_steps = r.config.max_tokens = 0;
    assert_false(plan_steps(&r)); /* a generator has no end */
    assert_int_equal(r.exit_code, 2);
    end_run(&r);
}

static void test_steps_of_a_file(void **state) {
    (void)state;
    char keys[512];
    write_tokens("ten.u16", 10 * 128 + 1, SIZE_MAX);
    snprintf(keys, sizeof keys, STEP " vocab_size=256 max_steps=0 max_tokens=0 epochs=3 val_fraction=0.2 data=%s",
             path("ten.u16"));
    run r = make_run(keys);
    open_stream(&r);
    assert_true(plan_steps(&r) && plan_evaluation(&r));
    assert_int_equal(r.steps, 4); /* 3 x 8 x 128 tokens in steps of 768 */
    assert_int_equal(r.epoch_windows, 0);
    assert_int_equal(r.val_windows, 2);
    r.config.eval_windows = 1;
    assert_true(plan_evaluation(&r));
    assert_int_equal(r.val_windows, 1);
    end_run(&r);
}

static void test_windows(void **state) {
    (void)state;
    enum { N = 8 };
    run r = make_run("seed=3 shuffle=0");
    r.epoch_windows = N;
    for (uint64_t i = 0; i < 3 * N; i++) assert_int_equal(training_window(&r, i), i % N);
    r.config.shuffle = true;
    bool differs = false;
    for (uint64_t epoch = 1; epoch < 3; epoch++) {
        unsigned seen = 0;
        for (uint64_t i = 0; i < N; i++) {
            uint64_t window = training_window(&r, epoch * N + i);
            seen |= 1u << window;
            differs = differs || window != training_window(&r, (epoch + 1) * N + i);
        }
        assert_int_equal(seen, (1u << N) - 1); /* each once */
    }
    assert_true(differs); /* in another order */
    r.epoch_windows = 0;
    assert_int_equal(training_window(&r, 100), 100);
    end_run(&r);
}

static void test_due(void **state) {
    (void)state;
    assert_true(due(20, 10));
    assert_false(due(21, 10));
    assert_false(due(20, 0)); /* 0: never on the way */
}

/* ---- what is shown ----------------------------------------------------------------------------------------------------- */

static void test_time_left(void **state) {
    (void)state;
    run r = make_run("");
    r.steps = 300, r.first_step = 50, r.started = now() - 100;
    r.progress.latest = nothing_measured;
    char line[128] = "";
    add_pace(&r, line, sizeof line - 1, 150); /* 100 steps in 100 s, 150 to go */
    assert_string_equal(line, "2 min 30 s left");
    end_run(&r);
}

static void test_fields(void **state) {
    (void)state;
    char line[64] = "";
    add_field(line, 12, "%s", "loss 1");
    add_field(line, 12, "%s", "too long for it");
    add_number(line, 12, "val %.0f", NAN);
    add_number(line, 12, "|g| %.0f", 2); /* 6 + 1 + 5 */
    assert_string_equal(line, "loss 1 |g| 2");
}

/* ---- going on ------------------------------------------------------------------------------------------------------------ */

static void test_same_run(void **state) {
    (void)state;
    static const char keys[] = "vocab_size=17 max_seq_len=16 max_steps=9 data=gen:random";
    static const struct {
        const char *key, *value, *refused; /* NULL: the run goes on */
    } changes[] = {{"max_steps", "10", NULL},
                   {"max_tokens", "77", NULL},
                   {"epochs", "2", NULL},
                   {"log_every", "3", NULL},
                   {"d_model", "256", "d_model = 256, but the run in "},
                   {"gate_type", "headwise", "gate_type = headwise, but"},
                   {"learning_rate", "0.5", "learning_rate = 0.5, but"},
                   {"seed", "5", "seed = 5, but"}};
    run r = make_run(keys);
    open_stream(&r);
    if (!write_config(&r)) fail_msg("%s", r.failure);
    end_run(&r);
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        run other = make_run(keys);
        assert_false(ga_config_set(&other.config, changes[i].key, changes[i].value, &other.error));
        assert_int_equal(check_same_run(&other), changes[i].refused == NULL);
        if (changes[i].refused) assert_non_null(strstr(other.failure, changes[i].refused));
        if (changes[i].refused) assert_int_equal(other.exit_code, 2);
        end_run(&other);
    }
}

static void test_same_data(void **state) {
    (void)state;
    enum { T = 16, WINDOWS = 200, N = WINDOWS * T + 1 };
    static const struct {
        size_t tokens, other;
        bool same;
    } files[] = {{N, SIZE_MAX, true},     {N + T - 1, SIZE_MAX, true}, {N + T, SIZE_MAX, false}, {N, 0, false},
                 {N, 100 * T + 3, false}, {N, T - 1, false},           {N - T, SIZE_MAX, false}};
    char keys[512];
    write_tokens("data.u16", N, SIZE_MAX);
    snprintf(keys, sizeof keys, "vocab_size=256 max_seq_len=16 val_fraction=0 data=%s", path("data.u16"));
    run r = make_run(keys);
    open_stream(&r);
    if (!write_config(&r)) fail_msg("%s", r.failure);
    end_run(&r);
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        write_tokens("data.u16", files[i].tokens, files[i].other);
        run again = make_run(keys);
        open_stream(&again);
        if (check_same_data(&again) != files[i].same) fail_msg("file %zu: %s", i, again.failure);
        end_run(&again);
    }
}

static int make_directory_of_tests(void **state) {
    (void)state;
    return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory_of_tests(void **state) {
    (void)state;
    run r = {.exit_code = 0};
    return remove_directory(&r, directory) ? 0 : -1;
}

int main(int argc, char **argv) {
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_words),   cmocka_unit_test(test_steps),    cmocka_unit_test(test_steps_of_a_file),
        cmocka_unit_test(test_windows), cmocka_unit_test(test_due),      cmocka_unit_test(test_time_left),
        cmocka_unit_test(test_fields),  cmocka_unit_test(test_same_run), cmocka_unit_test(test_same_data),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, make_directory_of_tests, remove_directory_of_tests);
}
