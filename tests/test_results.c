/* Tests of what analyze computes beside the model: scores of multiple choice, means and their errors, bins, what figures
 * show. By hand, or by the formulas that are named. The programs as a whole are driven by test_analyze.sh and
 * test_evaluate.sh.
 *
 *     cc -std=c11 -O2 -I. tests/test_results.c -o test_results -lcmocka -lm && ./test_results
 */
#define main analyze_main
#include "analyze.c"
#undef main
#undef fail
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

static void close_to(double x, double wanted) {
    if (!(fabs(x - wanted) <= 1e-6 * (1 + fabs(wanted)))) fail_msg("%.9g, not %.9g", x, wanted);
}

/* ---- multiple choice ------------------------------------------------------------------------------------------------- */

static void test_errors(void **state) {
    (void)state;
    double interval[2];
    close_to(eval_standard_error(3, 10), sqrt(0.3 * 0.7 / 9)); /* that of a sample's mean */
    assert_true(isnan(eval_standard_error(1, 1)));
    eval_interval(8, 10, interval); /* Wilson's, of 8 in 10 */
    close_to(interval[0], 0.4901625), close_to(interval[1], 0.9433178);
    eval_interval(0, 10, interval);
    close_to(interval[0], 0), close_to(interval[1], 0.2775328);
    eval_interval(10, 10, interval);
    close_to(interval[0], 0.7224672), close_to(interval[1], 1);
}

static const char *const CHOICES[] = {"aaaa", "b", "\xE6\x97\xA5\xE6\x9C\xAC"}; /* 4, 1 and 2 characters */

static data_question question_of(char **choices, size_t label) {
    data_question q = {.context = "Which?", .label = label};
    for (size_t i = 0; i < 3; i++) arrput(q.choices, choices[i]);
    return q;
}

static void test_choice(void **state) {
    (void)state;
    analysis a = {.options.eval_form = "cloze"};
    data_question q = question_of((char **)CHOICES, 0);
    static const struct {
        double log_p[3];
        size_t plain, normalised, letters;
    } cases[] = {{{-5, -2, -3}, 1, 0, 1},    /* by character -1.25, -2, -1.5 */
                 {{-8, -3, -3}, 1, 2, 1},    /* -2, -3, -1.5; of equals the first */
                 {{-1, -1, -1}, 0, 0, 0},    /* -0.25, -1, -0.5 */
                 {{-9, -9, -4.5}, 2, 0, 2}}; /* -2.25, -9, -2.25 */
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        eval_request requests[3];
        for (size_t k = 0; k < 3; k++) requests[k] = (eval_request){.log_p = cases[i].log_p[k]};
        a.options.eval_form = "cloze";
        assert_int_equal(eval_choose(&a, &q, requests, false), cases[i].plain);
        assert_int_equal(eval_choose(&a, &q, requests, true), cases[i].normalised);
        a.options.eval_form = "letters";
        assert_int_equal(eval_choose(&a, &q, requests, true), cases[i].letters);
    }
    arrfree(q.choices);
}

static void test_shots(void **state) {
    (void)state;
    analysis a = {.options = {.eval_form = "letters", .shots = 2, .description = "D\n\n"}};
    data_question_file f = {0};
    for (size_t i = 0; i < 3; i++) arrput(f.questions, question_of((char **)CHOICES, 2 - i));
    static const char question[] = "Which?\nA. aaaa\nB. b\nC. \xE6\x97\xA5\xE6\x9C\xAC\nAnswer:";
    char wanted[512];
    snprintf(wanted, sizeof wanted, "D\n\n%s C\n\n%s B\n\n", question, question);
    char *text = eval_prefix(&a, &f);
    assert_int_equal(arrlenu(text), strlen(wanted));
    assert_memory_equal(text, wanted, strlen(wanted));
    arrfree(text);
    a.options.eval_form = "cloze", a.options.description = NULL, a.options.shots = 1;
    text = eval_prefix(&a, &f);
    snprintf(wanted, sizeof wanted, "Which? %s\n\n", CHOICES[2]);
    assert_int_equal(arrlenu(text), strlen(wanted));
    assert_memory_equal(text, wanted, strlen(wanted));
    arrfree(text);
    for (size_t i = 0; i < 3; i++) arrfree(f.questions[i].choices);
    arrfree(f.questions);
}

/* Six tokens, of which the last three are the choice: they are predicted, from all before them that fit. */
static void test_rows(void **state) {
    (void)state;
    eval_request r = {.context = 3};
    for (int32_t t = 1; t <= 6; t++) arrput(r.tokens, t);
    static const int32_t in8[] = {1, 2, 3, 4, 5, 0, 0, 0}, out8[] = {-1, -1, 4, 5, 6, -1, -1, -1};
    static const int32_t in3[] = {3, 4, 5}, out3[] = {4, 5, 6};
    int32_t inputs[8], targets[8];
    eval_fill_row(&r, 8, inputs, targets);
    assert_memory_equal(inputs, in8, sizeof in8);
    assert_memory_equal(targets, out8, sizeof out8);
    eval_fill_row(&r, 3, inputs, targets);
    assert_memory_equal(inputs, in3, sizeof in3);
    assert_memory_equal(targets, out3, sizeof out3);
    arrfree(r.tokens);
}

static void test_names(void **state) {
    (void)state;
    analysis a = {0};
    report_model m = {.file = "gated"};
    static const char *const files[] = {"a/arc easy.jsonl", "b/arc easy.jsonl", "arc.2.jsonl"};
    for (size_t i = 0; i < 3; i++) arrput(a.options.eval, files[i]);
    assert_string_equal(eval_name(&a, &m, 0), "eval_gated_arc_easy");
    assert_string_equal(eval_name(&a, &m, 1), "eval_gated_arc_easy@2");
    assert_string_equal(eval_name(&a, &m, 2), "eval_gated_arc.2");
    assert_string_equal(name_of_directory(&a, "runs/gated/best//"), "gated");
    assert_string_equal(name_of_directory(&a, "last"), "last");
    assert_string_equal(name_of_directory(&a, "runs/last.7"), "last.7");
    assert_true(are_different(&a, "eval", a.options.eval));
    arrput(a.options.eval, files[0]);
    assert_false(are_different(&a, "eval", a.options.eval));
    arrfree(a.options.eval);
    for (size_t i = 0; i < arrlenu(a.texts); i++) free(a.texts[i]);
    arrfree(a.texts);
}

/* ---- losses ------------------------------------------------------------------------------------------------------------ */

static void test_losses(void **state) {
    (void)state;
    domain_score s = {.windows = 2, .tokens = 10, .loss_sum = 8 * log(2), .bytes = 4};
    close_to(domain_bits(&s), 2);
    s.bytes = 0;
    assert_true(isnan(domain_bits(&s)));

    double base[] = {3, 4, 5}, other[] = {2.5, 3, 5.5}, mean, error;
    report r = {.samples = 3};
    arrput(r.models, ((report_model){.window_losses = base}));
    arrput(r.models, ((report_model){.window_losses = other}));
    report_loss_difference(&r, 0, 1, &mean, &error); /* -0.5, -1, 0.5 */
    close_to(mean, -1.0 / 3);
    close_to(error, sqrt((1.0 / 36 + 16.0 / 36 + 25.0 / 36) / 2 / 3));
    r.models[0].config.gate_position = GA_G1, r.models[1].config.gate_position = GA_NO_GATE;
    assert_int_equal(report_baseline(&r), 1);
    r.models[1].config.gate_position = GA_G2;
    assert_int_equal(report_baseline(&r), 0);
    arrfree(r.models);

    ga_real logits[] = {1, 3, 2};
    bool right;
    double sum = exp(1) + exp(2) + exp(3);
    close_to(length_answer_loss(logits, 3, 1, &right), log(sum) - 3);
    assert_true(right);
    close_to(length_answer_loss(logits, 3, 0, &right), log(sum) - 1);
    assert_false(right);
}

/* ---- by length and position ---------------------------------------------------------------------------------------------- */

static void test_bins(void **state) {
    (void)state;
    static const size_t starts[] = {0, 16, 19, 23, 27, 32, 38, 45, 54, 64}; /* 16 2^((b - 1) / 4) */
    for (size_t b = 0; b < sizeof starts / sizeof starts[0]; b++) assert_int_equal(length_bin_start(b), starts[b]);
    assert_int_equal(length_bin_start(LENGTH_BINS), (size_t)1 << 29);
    struct length_result l = {0};
    static const double shares[] = {0.1, 0.7, 0.7, 0.2};
    for (size_t i = 0; i < 4; i++) arrput(l.f_attn_by_layer, shares[i]);
    size_t layer;
    close_to(length_largest(&l, &layer), 0.7);
    assert_int_equal(layer, 1);
    arrfree(l.f_attn_by_layer);
}

static void test_even(void **state) {
    (void)state;
    report r = {.seq_len = 3};
    close_to(gallery_even_attention_at(&r, 0), (1 + 1.0 / 2 + 1.0 / 3) / 3);
    close_to(gallery_even_attention_at(&r, 1), (1.0 / 2 + 1.0 / 3) / 2);
    close_to(gallery_even_attention_at(&r, 2), 1.0 / 3);
    close_to(gallery_even_f_attn(&r), (1 + 1.0 / 2 + 1.0 / 3) / 3);
    close_to(gallery_even_entropy(&r), (log(2) + log(3)) / 3);
}

static void test_maps(void **state) {
    (void)state;
    static const double map[] = {1, 0, 0, 0.5, 0.5, 0, 0.3, 0.3, 0.4};
    close_to(report_map_sink(map, 3, 3), 0.6);
    close_to(report_map_sink(map, 3, 2), 0.75);
    assert_ptr_equal(report_map(map, 2, 2), map + 8);
    static const struct {
        size_t layers, n, chosen[4];
    } cases[] = {{1, 1, {0}}, {2, 2, {0, 1}}, {3, 3, {0, 1, 2}}, {6, 4, {0, 2, 3, 5}}, {28, 4, {0, 9, 18, 27}}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t chosen[4], n = report_map_layers(cases[i].layers, chosen);
        assert_int_equal(n, cases[i].n);
        assert_memory_equal(chosen, cases[i].chosen, n * sizeof *chosen);
    }
}

/* Bars of a layer lie within it, side by side, around its middle. */
static void test_bars(void **state) {
    (void)state;
    for (size_t n = 1; n < 6; n++) {
        double width = figure_bar_width(n), sum = 0;
        for (size_t i = 0; i < n; i++) {
            double middle = figure_bar_offset(i, n);
            assert_true(middle - width / 2 > -0.4 && middle + width / 2 < 0.4);
            if (i > 0) assert_true(middle - figure_bar_offset(i - 1, n) > width);
            sum += middle;
        }
        assert_true(fabs(sum) < 1e-9);
    }
}

/* ---- training curves ------------------------------------------------------------------------------------------------------- */

static void test_curves(void **state) {
    (void)state;
    static const char line[] =
        "{\"step\":7,\"loss\":2.5,\"val_loss\":null,\"f_attn_by_layer\":[0.1,0.9,0.3],\"m_act\":4}";
    close_to(report_read_metric(line, "\"step\":"), 7);
    close_to(report_read_metric(line, "\"loss\":"), 2.5);
    close_to(report_read_metric(line, "\"f_attn_by_layer\":["), 0.9);
    assert_true(isnan(report_read_metric(line, "\"val_loss\":")));
    assert_true(isnan(report_read_metric(line, "\"none\":")));
    report_point *points = NULL;
    for (int i = 0; i < 601; i++) arrput(points, ((report_point){i, 2 * i}));
    report_thin_points(points); /* three at a time */
    assert_int_equal(arrlenu(points), 201);
    close_to(points[0].step, 1), close_to(points[0].value, 2);
    close_to(points[200].step, 600), close_to(points[200].value, 1200); /* the last alone */
    arrsetlen(points, 300 - 99);
    report_thin_points(points);
    assert_int_equal(arrlenu(points), 201); /* few enough */
    arrfree(points);
}

static void test_changes(void **state) {
    (void)state;
    report_model m = {0};
    arrput(m.changes, ((report_change){NULL, 0, 1, 9}));
    arrput(m.changes, ((report_change){"gate_mean", 0, 0, 3}));
    close_to(report_loss_after(&m, "gate_mean"), 3);
    assert_true(isnan(report_loss_after(&m, "gate_one")));
    arrfree(m.changes);
}

int main(int argc, char **argv) {
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_errors), cmocka_unit_test(test_choice), cmocka_unit_test(test_shots),
        cmocka_unit_test(test_rows),   cmocka_unit_test(test_names),  cmocka_unit_test(test_losses),
        cmocka_unit_test(test_bins),   cmocka_unit_test(test_even),   cmocka_unit_test(test_maps),
        cmocka_unit_test(test_bars),   cmocka_unit_test(test_curves), cmocka_unit_test(test_changes),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
