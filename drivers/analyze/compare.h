/* drivers/analyze/compare.h - analyze without another mode: several models on the same tokens, as a table,
 * summary.json, figures and report.html.
 *
 * Needs interventions.h and measure_lengths.h before it.
 */
#ifndef DRIVERS_COMPARE_H
#define DRIVERS_COMPARE_H

/* ---- a model ----------------------------------------------------------------------------------------------------- */

static bool measure_model(analysis *a, report_model *m) {
    report *r = &a->report;
    size_t most = a->options.has_batch_size ? a->options.batch_size : r->seq_len < 4096 ? 4096 / r->seq_len : 1;
    measuring w = {.batch_size = most < r->samples ? most : r->samples};
    w.model = load_model(a, m, w.batch_size, r->seq_len);
    if (!w.model) return false;
    m->parameters = w.model->n_weights;
    bool good = allocate_measuring(a, &w, m), terminal = isatty(STDERR_FILENO);
    /* The first window goes alone, for its own maps. */
    for (size_t i = 0, count = 1; good && i < r->samples; i += count, count = w.batch_size) {
        if (count > r->samples - i) count = r->samples - i;
        good = read_windows(a, &w, i, count) && measure_windows(a, &w, m, i, count);
        if (good && i == 0 && !r->labels) good = label_tokens(a, m, w.tokens);
        good = good && map_windows(a, &w, m, count);
        if (good && i == 0) copy_maps(&w, m->window_maps, r->map_len);
        if (terminal) fprintf(stderr, "\r%s: %zu of %zu windows ", m->name, i + count, r->samples);
    }
    good = good && finish_statistics(a, &w, m) && (!a->options.interventions || intervene(a, &w, m));
    if (terminal) fprintf(stderr, "\r\033[K");
    if (good) copy_maps(&w, m->maps, r->map_len);
    free_measuring(&w);
    ga_destroy(w.model);
    return good;
}

/* ---- what is printed --------------------------------------------------------------------------------------------- */

static void print_table(const report *r) {
    size_t name_width = 12, gate_width = strlen("G1 input-independent sigmoid");
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        if (strlen(r->models[i].name) > name_width) name_width = strlen(r->models[i].name);
        if (strlen(r->models[i].gate) > gate_width) gate_width = strlen(r->models[i].gate);
    }
    printf("\n%zu windows of %zu tokens of %s (%s)\n", r->samples, r->seq_len, r->source, r->part);
    printf("even attention: F-Attn %.2f %%", 100 * ga_f_attn_uniform(r->seq_len));
    if (isfinite(r->lowest_loss)) printf("; lowest loss that can be reached: %.4f", r->lowest_loss);
    bool sinks = report_has_sinks(r);
    printf("\n\n%-*s  %12s  %-*s  %8s  %8s  %7s  %13s  %7s  %9s  %9s%s\n", (int)name_width, "model", "parameters",
           (int)gate_width, "gate", "loss", "ppl", "F-Attn", "largest layer", "M-Act", "gate mean", "below 0.1",
           sinks ? "  sink logit" : "");
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        const report_model *m = &r->models[i];
        const ga_statistics *s = m->statistics;
        size_t sink = report_sink_layer(m);
        char largest[64];
        snprintf(largest, sizeof largest, "%.1f %% (%zu)", 100 * ga_f_attn(s, sink), sink);
        print_padded(m->name, name_width);
        printf("  %12zu  ", m->parameters);
        print_padded(m->gate, gate_width);
        printf("  %8.4f  %8.4g  %5.1f %%  %13s  %7.4g", m->loss, exp(m->loss), 100 * ga_f_attn(s, GA_ALL), largest,
               ga_m_act(s, GA_ALL));
        print_number(9, "%.3f", ga_gate_mean(s, GA_ALL), !s->has_gate);
        print_number(9, "%.1f %%", 100 * ga_gate_below(s, GA_ALL, 0.1), !s->has_gate);
        if (sinks) print_number(10, "%.1f %%", 100 * ga_sink_share(s, GA_ALL), !s->has_sink);
        printf("\n");
    }
    printf("\nthe paper, Table 4 (15B mixture of experts, 400B tokens)\n");
    for (size_t i = 0; i < REPORT_TABLE_4_ROWS; i++) {
        const report_table_4_row *row = &report_table_4[i];
        char gate[96];
        snprintf(gate, sizeof gate, i ? "%s %s" : "none", row->method, row->activation);
        printf("%-*s  %12s  %-*s  %8s  %8.3f  %5.1f %%  %13s  %7.0f", (int)name_width, i ? "" : "baseline", "",
               (int)gate_width, gate, "-", row->ppl, 100 * row->f_attn, "-", row->m_act);
        print_number(9, "%.3f", row->gate_mean, isnan(row->gate_mean));
        printf("  %9s\n", "-");
    }
    size_t base = report_baseline(r);
    for (size_t i = 0; i < arrlenu(r->models) && r->samples > 1; i++) {
        if (i == base) continue;
        double difference, error;
        report_loss_difference(r, base, i, &difference, &error);
        printf("\n%s against %s: loss %+.4f +- %.4f (standard error over the windows)", r->models[i].name,
               r->models[base].name, difference, error);
    }
    printf("\n");
}

/* ---- comparing --------------------------------------------------------------------------------------------------- */

static bool compare(analysis *a) {
    report *r = &a->report;
    if (a->options.lengths && !parse_lengths(a)) return false;
    if (!load_run(a, &r->models[0]) || !check_tokenizers(a) || !open_data(a, &r->models[0]) || !choose_output(a))
        return false;
    r->map_len = r->seq_len < FIGURE_MAP ? r->seq_len : FIGURE_MAP;
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        printf("%s: %s\n", r->models[i].name, r->models[i].directory);
        fflush(stdout);
        if (!measure_model(a, &r->models[i])) return false;
        report_read_curves(&r->models[i]);
    }
    if (a->options.lengths && !measure_lengths(a)) return false;
    print_table(r);
    print_lengths(r);
    if (!report_write_summary(r) || !figures_write(r) || !figures_write_lengths(r) || !gallery_write(r) ||
        !report_write_html(r))
        return fail(a, 1, "%s", r->error);
    print_figures(r);
    printf("report: %s/report.html, numbers: %s/summary.json\n", r->directory, r->directory);
    return true;
}

#endif
