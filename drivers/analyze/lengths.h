/* drivers/analyze/lengths.h - analyze --lengths: what was measured in windows of rising length, as in section 4.4, and
 * its figure: accuracy on the questions that the data asks, the loss by position, the sinks. measure_lengths.h measures
 * it, report.h puts it into summary.json and report.html.
 *
 * Needs figures.h before it.
 */
#ifndef DRIVERS_LENGTHS_H
#define DRIVERS_LENGTHS_H

/* Bins of positions: 0..15, then four to each doubling, up to 2^28. */
enum { LENGTH_BINS = 1 + 4 * 25 };

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
    return r->models && arrlenu(r->models[0].lengths) > 0;
}

static bool lengths_have_answers(const report *r) {
    return lengths_asked(r) && isfinite(r->models[0].lengths[0].accuracy);
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

/* ---- CSV and figure --------------------------------------------------------------------------------------------- */

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

#endif
