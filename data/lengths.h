/* data/lengths.h - analyze --lengths: the same models on windows of rising length, as in section 4.4. For each length the
 * accuracy on the questions that the data asks, the loss by position, and the sinks.
 *
 *     if (!measure_lengths(&a)) puts(a.failure);     // fills the models' `lengths`
 *
 * Activations grow with the length, attention's time with its square; logits are made in slices, and where only answers
 * count, at the answers alone. Needs measure.h before it.
 */
#ifndef DATA_LENGTHS_H
#define DATA_LENGTHS_H

/* Bins of positions: 0..15, then four to each doubling, up to 2^28. */
enum { LENGTH_BINS = 1 + 4 * 25, LENGTH_ROWS = 64 /* of logits at one time */ };

struct length_result {
    size_t length, windows;
    char positions[96];                        /* in words: extrapolated, YaRN, another base */
    double loss, answer_loss, accuracy, exact; /* the last three NaN where nothing is asked */
    double bin_loss[LENGTH_BINS];              /* mean over a bin's targets */
    double bin_targets[LENGTH_BINS];           /* how many it has */
    double f_attn, f_attn_uniform, sink_share, m_act, gate_mean;
    double *f_attn_by_layer; /* (L) */
};

/* The first position of a bin; of bin LENGTH_BINS: one beyond the last. */
static size_t length_bin_start(size_t bin) {
    return bin == 0 ? 0 : (size_t)lround(16 * pow(2, (double)(bin - 1) / 4));
}

static bool lengths_asked(const report *r) {
    return arrlenu(r->models[0].lengths) > 0;
}

static bool lengths_have_answers(const report *r) {
    return lengths_asked(r) && isfinite(r->models[0].lengths[0].accuracy);
}

/* ---- measuring --------------------------------------------------------------------------------------------------- */

/* "1k,2k,4096": rising, k stands for 1024. */
static bool parse_lengths(analysis *a, size_t **lengths) {
    const char *text = a->options.lengths;
    for (const char *at = text;; at++) {
        char *end;
        errno = 0;
        unsigned long long n = strtoull(at, &end, 10);
        size_t scale = *end == 'k' ? 1024 : 1;
        if (scale > 1) end++;
        bool number = *at >= '0' && *at <= '9' && errno == 0 && n >= 1 && n <= (16777216 / scale);
        if (!number || (*end && *end != ','))
            return fail(a, 2, "--lengths %s: it takes lengths up to 16384k, such as 512,1k,2k", text);
        if (arrlenu(*lengths) > 0 && n * scale <= arrlast(*lengths))
            return fail(a, 2, "--lengths %s: lengths rise from one to the next", text);
        arrput(*lengths, (size_t)n * scale);
        if (!*end) return true;
        at = end;
    }
}

typedef struct {
    ga_model *model;
    ga_statistics *statistics;
    int32_t *tokens, *targets, *question; /* (rows) */
    ga_real *losses;                      /* (rows) */
    ga_real *logits;                      /* (LENGTH_ROWS, V) */
    double answers, right, questions, exact, answer_loss;
    double loss, targets_counted;
} length_measuring;

static void free_length_measuring(length_measuring *w) {
    ga_statistics_destroy(w->statistics);
    ga_destroy(w->model);
    free(w->tokens);
    free(w->losses);
    free(w->logits);
}

static bool allocate_length_measuring(analysis *a, length_measuring *w, const report_model *m, size_t longest) {
    size_t rows = longest > 4096 ? longest : 4096 / longest * longest;
    w->model = load_model(a, m, rows / longest, longest);
    if (!w->model) return false;
    w->statistics = ga_statistics_create(w->model);
    w->tokens = malloc(3 * rows * sizeof *w->tokens);
    w->targets = w->tokens + rows;
    w->question = w->targets + rows;
    w->losses = malloc(rows * sizeof *w->losses);
    w->logits = malloc(LENGTH_ROWS * m->config.vocab_size * sizeof *w->logits);
    return (w->statistics && w->tokens && w->losses && w->logits) || fail(a, 1, "%s: out of memory", m->name);
}

/* -ln p of the target, and whether it is the most likely token. */
static double length_answer_loss(const ga_real *logits, size_t V, int32_t target, bool *right) {
    size_t best = 0;
    double sum = 0;
    for (size_t v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    for (size_t v = 0; v < V; v++) sum += exp((double)logits[v] - (double)logits[best]);
    *right = best == (size_t)target;
    return log(sum) + (double)logits[best] - (double)logits[target];
}

/* The answers among rows first .. first + T - 1, which one window fills: a question's answer is whole when each of its
 * tokens is the most likely one, which is when greedy decoding gives it. */
static bool measure_answers(analysis *a, length_measuring *w, const report_model *m, size_t first, size_t T) {
    size_t V = m->config.vocab_size;
    int32_t asked = 0;
    bool whole = false;
    for (size_t t = 0; t < T;) {
        size_t n = 0;
        while (t + n < T && n < LENGTH_ROWS && w->question[first + t + n] > 0) n++;
        ga_error e;
        if (n > 0 && ga_logits(w->model, first + t, n, w->logits, &e)) return fail(a, 1, "%s: %s", m->name, e.text);
        for (size_t i = 0; i < n; i++, t++) {
            bool right;
            w->losses[first + t] = (ga_real)length_answer_loss(w->logits + i * V, V, w->targets[first + t], &right);
            w->answer_loss += (double)w->losses[first + t];
            w->answers++;
            w->right += right;
            if (w->question[first + t] != asked) {
                w->exact += whole;
                w->questions++;
                asked = w->question[first + t];
                whole = true;
            }
            whole = whole && right;
        }
        t += n == 0;
    }
    w->exact += whole;
    return true;
}

/* `count` windows of T tokens. When all targets that count are answers, nothing else needs logits. */
static bool measure_length_windows(analysis *a, length_measuring *w, const report_model *m, struct length_result *l,
                                   size_t first, size_t count) {
    size_t T = l->length, questions = 0;
    bool others = false;
    char text[1024];
    for (size_t i = 0; i < count; i++) {
        int32_t *tokens = w->tokens + i * T, *targets = w->targets + i * T, *question = w->question + i * T;
        if (!data_window(a->stream, a->part, first + i, tokens, targets, text, sizeof text))
            return fail(a, 1, "%s", text);
        memset(question, 0, T * sizeof *question);
        questions += data_questions(a->stream, tokens, question);
        for (size_t t = 0; t < T; t++) others = others || (targets[t] >= 0 && question[t] == 0);
    }
    ga_observer observer = {.statistics = w->statistics};
    ga_error e;
    if (ga_forward(w->model, w->tokens, others ? w->targets : NULL, count, T, &observer, NULL, &e))
        return fail(a, 1, "%s: %s", m->name, e.text);
    if (others)
        w->model->device.copy_out(w->model->device.state, w->losses, w->model->losses, count * T * sizeof *w->losses);
    for (size_t i = 0; i < count && questions > 0; i++)
        if (!measure_answers(a, w, m, i * T, T)) return false;
    for (size_t i = 0; i < count; i++)
        for (size_t t = 0, bin = 0; t < T; t++) {
            if (w->targets[i * T + t] < 0) continue;
            while (length_bin_start(bin + 1) <= t) bin++;
            l->bin_loss[bin] += (double)w->losses[i * T + t];
            l->bin_targets[bin]++;
            w->loss += (double)w->losses[i * T + t];
            w->targets_counted++;
        }
    return true;
}

/* How the model reaches positions that it was not trained on, and what was changed for it. */
static void describe_positions(const report_model *m, size_t length, char *text, size_t size) {
    const ga_config *c = &m->config;
    double reach = c->rope_factor * (double)c->rope_original_length;
    if (c->rope_factor > 1)
        snprintf(text, size, "YaRN %g x %zu%s", c->rope_factor, c->rope_original_length,
                 (double)length > reach ? ", extrapolated" : "");
    else
        snprintf(text, size, "%s", length <= c->max_seq_len ? "as trained" : "RoPE extrapolated");
    size_t used = strlen(text);
    if (c->rope_base != m->trained_rope_base)
        snprintf(text + used, size - used, ", base %g in place of %g", c->rope_base, m->trained_rope_base);
}

static bool measure_length(analysis *a, length_measuring *w, report_model *m, size_t length) {
    struct length_result l = {.length = length, .windows = a->report.samples};
    size_t rows = w->model->max_rows / length, L = w->model->sizes.L;
    bool terminal = isatty(STDERR_FILENO);
    describe_positions(m, length, l.positions, sizeof l.positions);
    ga_statistics_reset(w->statistics);
    w->answers = w->right = w->questions = w->exact = w->answer_loss = w->loss = w->targets_counted = 0;
    for (size_t i = 0, count; i < l.windows; i += count) {
        count = rows < l.windows - i ? rows : l.windows - i;
        if (!measure_length_windows(a, w, m, &l, i, count)) return false;
        if (terminal) fprintf(stderr, "\r%s, length %zu: %zu of %zu windows ", m->name, length, i + count, l.windows);
    }
    if (terminal) fprintf(stderr, "\r\033[K");
    for (size_t b = 0; b < LENGTH_BINS; b++) l.bin_loss[b] /= l.bin_targets[b];
    l.loss = w->loss / w->targets_counted;
    l.answer_loss = w->answer_loss / w->answers;
    l.accuracy = w->right / w->answers;
    l.exact = w->exact / w->questions;
    l.f_attn = ga_f_attn(w->statistics, GA_ALL);
    l.f_attn_uniform = ga_f_attn_uniform(length);
    l.sink_share = ga_sink_share(w->statistics, GA_ALL);
    l.m_act = ga_m_act(w->statistics, GA_ALL);
    l.gate_mean = ga_gate_mean(w->statistics, GA_ALL);
    for (size_t i = 0; i < L; i++) arrput(l.f_attn_by_layer, ga_f_attn(w->statistics, i));
    arrput(m->lengths, l);
    return true;
}

/* Every model on the windows of every length; the report's own windows and figures stay as they are. */
static bool measure_lengths(analysis *a) {
    report *r = &a->report, kept = *r;
    data_stream *stream = a->stream;
    size_t *lengths = NULL;
    bool good = parse_lengths(a, &lengths);
    for (size_t i = 0; good && i < arrlenu(r->models); i++) {
        length_measuring w = {0};
        good = allocate_length_measuring(a, &w, &r->models[i], arrlast(lengths));
        for (size_t k = 0; good && k < arrlenu(lengths); k++) {
            r->seq_len = lengths[k];
            a->stream = NULL;
            good = open_data(a, &r->models[0]) && measure_length(a, &w, &r->models[i], lengths[k]);
            data_close(a->stream);
        }
        free_length_measuring(&w);
    }
    a->stream = stream;
    r->seq_len = kept.seq_len;
    r->samples = kept.samples;
    r->lowest_loss = kept.lowest_loss;
    arrfree(lengths);
    return good;
}

static void free_lengths(report_model *m) {
    for (size_t i = 0; i < arrlenu(m->lengths); i++) arrfree(m->lengths[i].f_attn_by_layer);
    arrfree(m->lengths);
}

static double length_largest(const struct length_result *l, size_t *layer) {
    *layer = 0;
    for (size_t i = 1; i < arrlenu(l->f_attn_by_layer); i++)
        if (l->f_attn_by_layer[i] > l->f_attn_by_layer[*layer]) *layer = i;
    return l->f_attn_by_layer[*layer];
}

/* ---- table, CSV, summary.json ------------------------------------------------------------------------------------ */

static void print_lengths(const report *r) {
    if (!lengths_asked(r)) return;
    printf("\nby length, %s\n\n%-16s  %8s  %7s  %8s  %8s  %8s  %7s  %8s  %13s  %7s  %s\n", r->source, "model", "length",
           "windows", "accuracy", "whole", "loss", "F-Attn", "uniform", "largest layer", "M-Act", "positions");
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0; k < arrlenu(r->models[i].lengths); k++) {
            const struct length_result *l = &r->models[i].lengths[k];
            char percent[2][16] = {"-", "-"}, largest[64];
            size_t layer;
            double most = length_largest(l, &layer);
            snprintf(largest, sizeof largest, "%.1f %% (%zu)", 100 * most, layer);
            if (isfinite(l->accuracy)) snprintf(percent[0], sizeof percent[0], "%.1f %%", 100 * l->accuracy);
            if (isfinite(l->exact)) snprintf(percent[1], sizeof percent[1], "%.1f %%", 100 * l->exact);
            print_padded(r->models[i].name, 16);
            printf("  %8zu  %7zu  %8s  %8s  %8.4f  %5.1f %%  %6.1f %%  %13s  %7.4g  %s\n", l->length, l->windows,
                   percent[0], percent[1], l->loss, 100 * l->f_attn, 100 * l->f_attn_uniform, largest, l->m_act,
                   l->positions);
        }
}

static bool lengths_csv(report *r) {
    FILE *csv = figure_open(r, "lengths", ".csv");
    if (!csv) return false;
    fputs("model,length,windows,positions,rope_base,loss,answer_loss,accuracy,whole_answers,f_attn,f_attn_uniform,"
          "f_attn_largest_layer,sink_share,m_act,gate_mean\n",
          csv);
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0; k < arrlenu(r->models[i].lengths); k++) {
            const struct length_result *l = &r->models[i].lengths[k];
            size_t layer;
            double numbers[] = {r->models[i].config.rope_base,
                                l->loss,
                                l->answer_loss,
                                l->accuracy,
                                l->exact,
                                l->f_attn,
                                l->f_attn_uniform,
                                length_largest(l, &layer),
                                l->sink_share,
                                l->m_act,
                                l->gate_mean};
            figure_csv_text(csv, r->models[i].name);
            fprintf(csv, ",%zu,%zu,", l->length, l->windows);
            figure_csv_text(csv, l->positions);
            for (size_t n = 0; n < sizeof numbers / sizeof numbers[0]; n++) figure_csv_number(csv, numbers[n]);
            putc('\n', csv);
        }
    return figure_close(r, csv, "lengths");
}

/* A row for each bin that holds targets. */
static bool lengths_positions_csv(report *r) {
    FILE *csv = figure_open(r, "loss_by_position", ".csv");
    if (!csv) return false;
    fputs("model,length,from,to,loss,targets\n", csv);
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0; k < arrlenu(r->models[i].lengths); k++) {
            const struct length_result *l = &r->models[i].lengths[k];
            for (size_t b = 0; b < LENGTH_BINS; b++) {
                if (l->bin_targets[b] == 0) continue;
                size_t to = length_bin_start(b + 1);
                figure_csv_text(csv, r->models[i].name);
                fprintf(csv, ",%zu,%zu,%zu", l->length, length_bin_start(b), (to < l->length ? to : l->length) - 1);
                figure_csv_number(csv, l->bin_loss[b]);
                fprintf(csv, ",%.0f\n", l->bin_targets[b]);
            }
        }
    return figure_close(r, csv, "loss_by_position");
}

static void length_json_number(FILE *f, const char *key, double x) {
    fprintf(f, isfinite(x) ? ", \"%s\": %.9g" : ", \"%s\": null", key, x);
}

static void report_json_lengths(FILE *f, const report_model *m) {
    if (arrlenu(m->lengths) == 0) return;
    fputs(",\n        \"lengths\": [", f);
    for (size_t k = 0; k < arrlenu(m->lengths); k++) {
        const struct length_result *l = &m->lengths[k];
        fprintf(f, "%s{\"length\": %zu, \"windows\": %zu, \"positions\": ", k ? ", " : "", l->length, l->windows);
        report_json_text(f, l->positions);
        length_json_number(f, "rope_base", m->config.rope_base);
        length_json_number(f, "loss", l->loss);
        length_json_number(f, "answer_loss", l->answer_loss);
        length_json_number(f, "accuracy", l->accuracy);
        length_json_number(f, "whole_answers", l->exact);
        length_json_number(f, "f_attn", l->f_attn);
        length_json_number(f, "f_attn_uniform", l->f_attn_uniform);
        length_json_number(f, "sink_share", l->sink_share);
        length_json_number(f, "m_act", l->m_act);
        length_json_number(f, "gate_mean", l->gate_mean);
        fputs(", \"f_attn_by_layer\": [", f);
        for (size_t i = 0; i < arrlenu(l->f_attn_by_layer); i++)
            fprintf(f, isfinite(l->f_attn_by_layer[i]) ? "%s%.9g" : "%snull", i ? ", " : "", l->f_attn_by_layer[i]);
        fputs("], \"loss_by_position\": [", f);
        for (size_t b = 0, n = 0; b < LENGTH_BINS; b++) {
            if (l->bin_targets[b] == 0) continue;
            fprintf(f, isfinite(l->bin_loss[b]) ? "%s[%zu, %.9g]" : "%s[%zu, null]", n++ ? ", " : "",
                    length_bin_start(b), l->bin_loss[b]);
        }
        fputs("]}", f);
    }
    putc(']', f);
}

/* ---- figure and section of the report ---------------------------------------------------------------------------- */

/* Column `column` of lengths.csv over length, a line for each model. */
static void lengths_plot(report *r, FILE *gp, int column) {
    size_t row = 0;
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        size_t n = arrlenu(r->models[i].lengths);
        fprintf(gp,
                " 'lengths.csv' skip 1 every ::%zu::%zu using 2:(100*$%d) with linespoints pointtype 7 pointsize 0.6 "
                "linewidth 2 linecolor rgb '%s' title ",
                row, row + n - 1, column, figure_colour(i));
        figure_quote(gp, r->models[i].name);
        fputs(", \\\n    ", gp);
        row += n;
    }
}

/* Loss by position at the greatest length. */
static void lengths_plot_positions(report *r, FILE *gp) {
    size_t row = 0;
    fputs("plot", gp);
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0, n = arrlenu(r->models[i].lengths); k < n; k++) {
            size_t bins = 0;
            for (size_t b = 0; b < LENGTH_BINS; b++) bins += r->models[i].lengths[k].bin_targets[b] > 0;
            if (k + 1 == n) {
                fprintf(gp,
                        " 'loss_by_position.csv' skip 1 every ::%zu::%zu using (($3+$4)/2+1):5 with linespoints "
                        "pointtype 7 pointsize 0.4 linewidth 2 linecolor rgb '%s' title ",
                        row, row + bins - 1, figure_colour(i));
                figure_quote(gp, r->models[i].name);
                fputs(i + 1 < arrlenu(r->models) ? ", \\\n    " : "\n", gp);
            }
            row += bins;
        }
}

static bool figures_write_lengths(report *r) {
    const char *stem = "lengths";
    if (!lengths_asked(r)) return true;
    if (!lengths_csv(r) || !lengths_positions_csv(r)) return false;
    FILE *gp = figure_open(r, stem, ".gp");
    if (!gp) return false;
    bool answers = lengths_have_answers(r);
    size_t lines = arrlenu(r->models) + 1, longest = arrlast(r->models[0].lengths).length;
    figure_begin(gp, stem, FIGURE_WIDTH, (answers ? 3 : 2) * (300 + 21 * (int)lines));
    fprintf(gp, "set key vertical maxrows %zu\nset tmargin %zu\nset multiplot layout %d,1\n", lines, lines + 1,
            answers ? 3 : 2);
    fprintf(gp, "set logscale x 2\nset xlabel 'length of the window'\nset xtics %zu,4,%zu\n",
            r->models[0].lengths[0].length, longest);
    if (answers) {
        fputs("set yrange [0:100]\nset ylabel 'answer tokens that are right, %'\nplot", gp);
        lengths_plot(r, gp, 8);
        fputs(" NaN notitle\n", gp);
    }
    fputs("set yrange [0:*]\nset ylabel 'F-Attn, %'\nplot", gp);
    lengths_plot(r, gp, 10);
    fprintf(gp,
            " 'lengths.csv' skip 1 every ::0::%zu using 2:(100*$11) with lines dashtype 2 linewidth 1.5 linecolor rgb "
            "'#333333' title 'uniform'\n",
            arrlenu(r->models[0].lengths) - 1);
    fprintf(gp, "set autoscale y\nset xtics autofreq\nset xlabel 'position'\nset ylabel 'loss, windows of %zu'\n",
            longest);
    lengths_plot_positions(r, gp);
    fputs("unset multiplot\n", gp);
    return figure_end(r, gp, stem, "Accuracy, attention on the first token and loss, by length");
}

static void lengths_table_html(const report *r, FILE *f) {
    fputs("<div class=\"scroll\"><table><thead><tr><th>model</th><th>length</th><th>windows</th><th>answer tokens "
          "right, %</th><th>whole answers, %</th><th>loss</th><th>F-Attn, %</th><th>uniform, %</th><th>M-Act</th>"
          "<th class=\"text\">positions</th></tr></thead>\n<tbody>\n",
          f);
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0; k < arrlenu(r->models[i].lengths); k++) {
            const struct length_result *l = &r->models[i].lengths[k];
            fputs("<tr><td>", f);
            report_model_name(r, f, i);
            fprintf(f, "</td><td>%zu</td><td>%zu</td>", l->length, l->windows);
            report_cell(f, "%.1f", 100 * l->accuracy);
            report_cell(f, "%.1f", 100 * l->exact);
            report_cell(f, "%.4f", l->loss);
            report_cell(f, "%.1f", 100 * l->f_attn);
            report_cell(f, "%.1f", 100 * l->f_attn_uniform);
            report_cell(f, "%.4g", l->m_act);
            fputs("<td class=\"text\">", f);
            report_escape(f, l->positions);
            fputs("</td></tr>\n", f);
        }
    fputs("</tbody></table></div>\n", f);
}

/* Table 5, RULER. */
static void lengths_paper_html(FILE *f) {
    static const struct {
        const char *method;
        double score[6];
    } rows[] = {{"baseline", {88.89, 85.88, 83.15, 79.50, NAN, NAN}},
                {"SDPA gate", {90.56, 87.11, 84.61, 79.77, NAN, NAN}},
                {"baseline + YaRN", {82.90, 71.52, 61.23, 37.94, 37.51, 31.65}},
                {"SDPA gate + YaRN", {88.13, 80.01, 76.74, 72.88, 66.60, 58.82}}};
    fputs("<details><summary>The paper's Table 5 (RULER; trained at 4k, on at 32k with the base raised to 1M)</summary>"
          "<div class=\"scroll\"><table><thead><tr><th>method</th><th>4k</th><th>8k</th><th>16k</th><th>32k</th>"
          "<th>64k</th><th>128k</th></tr></thead>\n<tbody>\n",
          f);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        fprintf(f, "<tr class=\"paper\"><td>%s</td>", rows[i].method);
        for (size_t k = 0; k < 6; k++) report_cell(f, "%.2f", rows[i].score[k]);
        fputs("</tr>\n", f);
    }
    fputs("</tbody></table></div></details>\n", f);
}

static void report_rest_lengths(const report *r, FILE *f) {
    lengths_table_html(r, f);
    lengths_paper_html(f);
}

#endif
