/* data/report.h - what analyze measured, as summary.json and as report.html: beside the paper's own figures, in one
 * file that needs no network.
 *
 *     report_write_summary(&r);
 *     report_write_html(&r);     // after figures_write(&r): the figures are copied into the page
 *
 * Needs figures.h before it.
 */
#ifndef DATA_REPORT_H
#define DATA_REPORT_H

/* Table 4 (15A2B mixture of experts, 400B tokens, T = 4096). */
typedef struct {
    const char *method, *activation;
    double gate_mean, m_act, f_attn, ppl; /* gate_mean NaN: no gate */
} report_table_4_row;

static const report_table_4_row report_table_4[] = {
    {"baseline", "none", NAN, 1053, 0.467, 6.026},
    {"G1 elementwise", "sigmoid", 0.116, 94, 0.048, 5.761},
    {"G1 headwise", "sigmoid", 0.172, 98, 0.073, 5.792},
    {"G1 head-shared", "sigmoid", 0.271, 286, 0.301, 5.801},
    {"G2 elementwise", "sigmoid", 0.221, 125, 0.297, 5.820},
    {"G1 input-independent", "sigmoid", 0.335, 471, 0.364, 5.917},
    {"G1 elementwise", "NS-sigmoid", 0.653, 892, 0.451, 5.900},
};
enum { REPORT_TABLE_4_ROWS = sizeof report_table_4 / sizeof report_table_4[0] };

/* Other people's measurements; NaN where they give none. */
static const struct {
    const char *what;
    double f_attn, m_act, gate_mean, below_01, ppl;
} report_measurements[] = {
    {"released 1.7B, baseline", 0.427, NAN, NAN, NAN, 13.250},
    {"released 1.7B, headwise", 0.0525, NAN, 0.257, 0.219, 13.176},
    {"released 1.7B, elementwise", 0.0187, NAN, 0.140, 0.602, 13.238},
    {"200M from scratch, baseline", 0.030, NAN, NAN, NAN, 38.50},
    {"200M from scratch, elementwise", 0.007, NAN, NAN, NAN, 37.56},
    {"200M from scratch, headwise", 0.007, NAN, NAN, NAN, 37.74},
    {"50.9M on random tokens, baseline", 0.140, 15.8, NAN, NAN, NAN},
    {"50.9M on random tokens, elementwise", 0.136, 15.3, 0.526, 0.020, NAN},
};

/* Write DIR/summary.json, DIR/report.html; false with r->error when they cannot. */
static bool report_write_summary(report *r);
static bool report_write_html(report *r);

/* In lengths.h; they write nothing without --lengths. */
static void report_json_lengths(FILE *f, const report_model *m);
static bool report_lengths_section(report *r, FILE *f);

static const char report_style[] =
    ":root{color-scheme:light}\n"
    "*{box-sizing:border-box}\n"
    "body{margin:0 auto;max-width:60rem;padding:1.5rem 1rem 4rem;background:#fff;color:#1d1d1f;"
    "font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}\n"
    "h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}\n"
    "h2{font-size:1.2rem;margin:2.8rem 0 .4rem;padding-top:1rem;border-top:1px solid #ddd}\n"
    "p{margin:.5rem 0}\n"
    "code{font:.88em ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}\n"
    ".lead{color:#555}\n"
    ".scroll{overflow-x:auto;margin:.8rem 0}\n"
    "table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}\n"
    "caption{text-align:left;color:#555;padding-bottom:.3rem}\n"
    "th,td{padding:.28rem .55rem;text-align:right;white-space:nowrap;border-bottom:1px solid #eaeaea}\n"
    "thead th{border-bottom:1.5px solid #888;font-weight:600;vertical-align:bottom}\n"
    "th:first-child,td:first-child,.text{text-align:left}\n"
    "small{display:block;color:#666}\n"
    "tr.paper td{color:#666;font-style:italic}\n"
    ".swatch{display:inline-block;width:.7em;height:.7em;margin-right:.45em;border-radius:2px}\n"
    "figure{margin:.8rem 0;overflow-x:auto}\n"
    "figure svg{display:block;width:100%;min-width:34rem;height:auto}\n"
    "figure svg text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}\n"
    "summary{cursor:pointer;color:#555;font-size:.9rem}\n"
    ".note{background:#fff6e5;border-left:3px solid #e69f00;padding:.5rem .8rem}\n"
    "@media "
    "print{body{max-width:none;padding:0;font-size:10pt}h3{break-after:avoid}section,figure,table{break-inside:avoid}"
    "figure,.scroll{overflow:visible}figure svg{min-width:0}}\n";

/* ---- summary.json ------------------------------------------------------------------------------------------------ */

static void report_json_number(FILE *f, const char *key, double x) {
    fprintf(f, isfinite(x) ? ",\n        \"%s\": %.9g" : ",\n        \"%s\": null", key, x);
}

static void report_json_text(FILE *f, const char *text) {
    putc('"', f);
    while (*text) {
        size_t length = report_utf8(text);
        if (length == 0 || (unsigned char)*text < ' ')
            fprintf(f, "\\u%04x", length ? (unsigned)*text : 0xFFFDu);
        else
            fprintf(f, "%s%.*s", *text == '"' || *text == '\\' ? "\\" : "", (int)length, text);
        text += length ? length : 1;
    }
    putc('"', f);
}

static void report_json_layers(FILE *f, const char *key, const ga_statistics *s,
                               double (*value)(const ga_statistics *, size_t)) {
    fprintf(f, ",\n        \"%s\": ", key);
    if (isnan(value(s, GA_ALL))) {
        fputs("null", f);
        return;
    }
    for (size_t l = 0; l < s->L; l++)
        fprintf(f, isfinite(value(s, l)) ? "%s%.9g" : "%snull", l ? ", " : "[", value(s, l));
    putc(']', f);
}

static void report_json_heads(FILE *f, const ga_statistics *s) {
    fputs(",\n        \"f_attn_by_head\": [", f);
    for (size_t l = 0; l < s->L; l++)
        for (size_t h = 0; h < s->HQ; h++) {
            double x = ga_f_attn_head(s, l, h);
            fputs(h ? ", " : l ? ", [" : "[", f);
            fprintf(f, isfinite(x) ? "%.9g" : "null", x);
            if (h + 1 == s->HQ) putc(']', f);
        }
    putc(']', f);
}

static void report_json_model(FILE *f, const report *r, const report_model *m) {
    const ga_statistics *s = m->statistics;
    report_json_text(f, m->name);
    fprintf(f, ": {\n        \"params\": %zu", m->parameters);
    report_json_number(f, "loss", m->loss);
    report_json_number(f, "ppl", exp(m->loss));
    report_json_number(f, "lowest_loss", r->lowest_loss);
    report_json_number(f, "f_attn", ga_f_attn(s, GA_ALL));
    report_json_number(f, "f_attn_uniform", ga_f_attn_uniform(r->seq_len));
    report_json_layers(f, "f_attn_by_layer", s, ga_f_attn);
    report_json_heads(f, s);
    report_json_number(f, "sink_share", ga_sink_share(s, GA_ALL));
    report_json_layers(f, "sink_share_by_layer", s, ga_sink_share);
    report_json_number(f, "m_act", ga_m_act(s, GA_ALL));
    report_json_layers(f, "max_act_by_layer", s, ga_m_act);
    report_json_number(f, "gate_mean", ga_gate_mean(s, GA_ALL));
    report_json_number(f, "gate_std", ga_gate_std(s, GA_ALL));
    report_json_number(f, "gate_below_0.1", ga_gate_below(s, GA_ALL, 0.1));
    report_json_number(f, "gate_below_0.5", ga_gate_below(s, GA_ALL, 0.5));
    report_json_layers(f, "gate_mean_by_layer", s, ga_gate_mean);
    report_json_layers(f, "gate_std_by_layer", s, ga_gate_std);
    report_json_layers(f, "gate_min_by_layer", s, ga_gate_min);
    report_json_layers(f, "gate_max_by_layer", s, ga_gate_max);
    report_json_lengths(f, m);
    fprintf(f, ",\n        \"gate\": ");
    report_json_text(f, m->gate);
    fprintf(f, ",\n        \"checkpoint\": ");
    report_json_text(f, m->directory);
    fprintf(f, ",\n        \"data\": ");
    report_json_text(f, r->source);
    fprintf(f, ",\n        \"seq_len\": %zu,\n        \"samples\": %zu\n    }", r->seq_len, r->samples);
}

static bool report_write_summary(report *r) {
    FILE *f = report_open(r, "summary", ".json");
    if (!f) return false;
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        fputs(i ? ",\n    " : "{\n    ", f);
        report_json_model(f, r, &r->models[i]);
    }
    fputs("\n}\n", f);
    return report_close(r, f, "summary", ".json");
}

/* ---- pieces of a page -------------------------------------------------------------------------------------------- */

/* A table's cell, with a dash for what is not there. */
static void report_cell(FILE *f, const char *format, double x) {
    fputs("<td>", f);
    if (isnan(x))
        fputs("&ndash;", f);
    else
        fprintf(f, format, x);
    fputs("</td>", f);
}

static void report_model_name(const report *r, FILE *f, size_t model) {
    fprintf(f, "<span class=\"swatch\" style=\"background:%s\"></span>", figure_colour(model));
    report_escape(f, r->models[model].name);
}

static void report_heading(FILE *f, const char *title) {
    fputs("\n<section>\n<h2>", f);
    report_escape(f, title);
    fputs("</h2>\n", f);
}

/* The drawn figure, or where its script is. */
static bool report_figure_html(report *r, FILE *f, const char *stem) {
    for (size_t i = 0; i < arrlenu(r->figures); i++) {
        const report_figure *figure = &r->figures[i];
        if (strcmp(figure->stem, stem)) continue;
        char path[FIGURE_PATH], name[128];
        snprintf(name, sizeof name, "figures/%s", stem);
        if (!report_path(r, path, name, ".svg")) return false;
        char *text = figure->drawn ? report_read(path) : NULL, *svg = text ? strstr(text, "<svg") : NULL;
        if (svg)
            fprintf(f, "<figure>\n%s</figure>\n", svg);
        else
            fprintf(f,
                    "<p class=\"note\">Not drawn: <code>gnuplot %s.gp</code> in <code>figures/</code> draws it.</p>\n",
                    stem);
        arrfree(text);
    }
    return true;
}

/* A row for each layer, a column for each model that has the figure; folded away for deep models. */
static void report_layers_table(const report *r, FILE *f, const char *caption, const char *format, double scale,
                                double (*value)(const ga_statistics *, size_t)) {
    size_t layers = report_most_layers(r);
    fprintf(f,
            "<details%s><summary>The numbers</summary>\n<div class=\"scroll\"><table><caption>%s</caption>\n"
            "<thead><tr><th>layer</th>",
            layers <= 12 ? " open" : "", caption);
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        if (isnan(value(r->models[i].statistics, GA_ALL))) continue;
        fputs("<th>", f);
        report_model_name(r, f, i);
        fputs("</th>", f);
    }
    fputs("</tr></thead>\n<tbody>\n", f);
    for (size_t l = 0; l <= layers; l++) {
        if (l < layers) fprintf(f, "<tr><td>%zu</td>", l);
        if (l == layers) fputs("<tr><td><b>mean</b></td>", f);
        for (size_t i = 0; i < arrlenu(r->models); i++) {
            const ga_statistics *s = r->models[i].statistics;
            if (isnan(value(s, GA_ALL))) continue;
            report_cell(f, format, l == layers ? scale * value(s, GA_ALL) : l < s->L ? scale * value(s, l) : NAN);
        }
        fputs("</tr>\n", f);
    }
    fputs("</tbody></table></div></details>\n", f);
}

static void report_names(const report *r, FILE *f) {
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        if (i) fputs(", ", f);
        report_escape(f, r->models[i].name);
    }
}

/* "baseline 35.2 %, gated 8.1 %": the figure over all layers of every model that has it. */
static void report_means(const report *r, FILE *f, const char *format, double scale,
                         double (*value)(const ga_statistics *, size_t)) {
    size_t listed = 0;
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        double x = scale * value(r->models[i].statistics, GA_ALL);
        if (isnan(x)) continue;
        if (listed++) fputs(", ", f);
        report_escape(f, r->models[i].name);
        fprintf(f, format, x);
    }
}

/* ---- sections ---------------------------------------------------------------------------------------------------- */

static void report_head(const report *r, FILE *f) {
    fputs("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
          "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>Gated attention: ",
          f);
    report_names(r, f);
    fprintf(f, "</title>\n<style>\n%s</style>\n</head>\n<body>\n<h1>Gated attention: ", report_style);
    report_names(r, f);
    fprintf(f, "</h1>\n<p class=\"lead\">%zu windows of %zu tokens from <code>", r->samples, r->seq_len);
    report_escape(f, r->source);
    fputs("</code> (", f);
    report_escape(f, r->part);
    fprintf(f,
            "), the same for every model. Attention spread evenly over what each position sees would put %.2f&nbsp;%% "
            "on the first token.",
            100 * ga_f_attn_uniform(r->seq_len));
    if (isfinite(r->lowest_loss))
        fprintf(f, " The lowest loss that any model can reach on these windows is %.4f.", r->lowest_loss);
    fputs("</p>\n", f);
}

static void report_difference_cell(const report *r, FILE *f, size_t base, size_t model) {
    double difference, error;
    report_loss_difference(r, base, model, &difference, &error);
    if (model == base)
        fputs("<td>&ndash;</td>", f);
    else
        fprintf(f, "<td>%+.4f<small>&plusmn; %.4f</small></td>", difference, error);
}

static void report_results(const report *r, FILE *f) {
    size_t base = report_baseline(r);
    bool compared = arrlenu(r->models) > 1 && r->samples > 1, sinks = report_has_sinks(r);
    fputs("<div class=\"scroll\"><table>\n"
          "<thead><tr><th>model</th><th>F-Attn,<br>mean</th><th>largest<br>layer</th>",
          f);
    if (sinks) fputs("<th>sink logit,<br>mean</th>", f);
    fputs("<th>M-Act</th><th>gate score,<br>mean</th><th>below<br>0.1</th><th>loss</th>", f);
    if (compared) fputs("<th>against<br>", f), report_escape(f, r->models[base].name), fputs("</th>", f);
    fputs("<th>perplexity</th><th>parameters</th></tr></thead>\n<tbody>\n", f);
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        const report_model *m = &r->models[i];
        const ga_statistics *s = m->statistics;
        size_t sink = report_sink_layer(m);
        fputs("<tr><td>", f);
        report_model_name(r, f, i);
        fprintf(f, "<small>%s</small></td><td>%.1f&nbsp;%%</td>", m->config.gate_position ? m->gate : "no gate",
                100 * ga_f_attn(s, GA_ALL));
        fprintf(f, "<td>%.1f&nbsp;%% (%zu)</td>", 100 * ga_f_attn(s, sink), sink);
        if (sinks) report_cell(f, "%.1f&nbsp;%%", 100 * ga_sink_share(s, GA_ALL));
        fprintf(f, "<td>%.4g</td>", ga_m_act(s, GA_ALL));
        report_cell(f, "%.3f", ga_gate_mean(s, GA_ALL));
        report_cell(f, "%.1f&nbsp;%%", 100 * ga_gate_below(s, GA_ALL, 0.1));
        fprintf(f, "<td>%.4f</td>", m->loss);
        if (compared) report_difference_cell(r, f, base, i);
        fprintf(f, "<td>%.4g</td><td>%zu</td></tr>\n", exp(m->loss), m->parameters);
    }
    fputs("</tbody></table></div>\n", f);
    if (compared)
        fputs("<p class=\"lead\">&plusmn; is the standard error of the difference in loss, window by window.</p>\n", f);
}

static void report_paper(FILE *f) {
    report_heading(f, "The paper\xE2\x80\x99s own figures, and others\xE2\x80\x99 measurements");
    fputs("<div class=\"scroll\"><table><caption>Table 4: 15B mixture of experts, 400B tokens of text</caption>\n"
          "<thead><tr><th>method</th><th class=\"text\">activation</th><th>F-Attn</th><th>M-Act</th>"
          "<th>gate score</th><th>below 0.1</th><th>perplexity</th></tr></thead>\n<tbody>\n",
          f);
    for (size_t i = 0; i < REPORT_TABLE_4_ROWS; i++) {
        const report_table_4_row *row = &report_table_4[i];
        fprintf(f, "<tr><td>%s</td><td class=\"text\">%s</td><td>%.1f&nbsp;%%</td><td>%.0f</td>", row->method,
                row->activation, 100 * row->f_attn, row->m_act);
        report_cell(f, "%.3f", row->gate_mean);
        fprintf(f, "<td>&ndash;</td><td>%.3f</td></tr>\n", row->ppl);
    }
    for (size_t i = 0; i < sizeof report_measurements / sizeof report_measurements[0]; i++) {
        fprintf(f, "<tr class=\"paper\"><td>%s</td><td class=\"text\"></td>", report_measurements[i].what);
        report_cell(f, "%.1f&nbsp;%%", 100 * report_measurements[i].f_attn);
        report_cell(f, "%.1f", report_measurements[i].m_act);
        report_cell(f, "%.3f", report_measurements[i].gate_mean);
        report_cell(f, "%.1f&nbsp;%%", 100 * report_measurements[i].below_01);
        report_cell(f, "%.2f", report_measurements[i].ppl);
        fputs("</tr>\n", f);
    }
    fputs("</tbody></table></div>\n"
          "<p class=\"lead\">Italic: measured by others. The released models on blocks of 512 tokens of FineWeb-Edu; "
          "200M parameters after 500M tokens; 50.9M parameters on uniform random tokens (a consumer GPU). Absolute "
          "values depend on size, data and length; what carries over is the order of the rows.</p>\n</section>\n",
          f);
}

static bool report_maps_section(report *r, FILE *f) {
    size_t base = report_baseline(r), sink = report_sink_layer(&r->models[base]);
    report_heading(f, "Attention maps");
    fprintf(f, "<p>The attention of layer %zu, where the F-Attn of ", sink);
    report_escape(f, r->models[base].name);
    fprintf(f,
            " is largest, averaged over heads and %zu windows; the first %zu positions. A sink is the dark column at "
            "the left edge: %.1f&nbsp;%% of the attention",
            r->samples, r->map_len, 100 * ga_f_attn(r->models[base].statistics, sink));
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        const ga_statistics *s = r->models[i].statistics;
        if (i == base || sink >= s->L) continue;
        fprintf(f, ", %.1f&nbsp;%% in ", 100 * ga_f_attn(s, sink));
        report_escape(f, r->models[i].name);
    }
    fputs(". Fig. 2 of the paper shows layer 21 of its 28-layer models: 83&nbsp;% without the gate, 4&nbsp;% with it."
          "</p>\n",
          f);
    if (!report_figure_html(r, f, "maps_side_by_side")) return false;
    fputs("<p>The same layer on the first window alone, with its tokens.</p>\n", f);
    if (!report_figure_html(r, f, "maps_window")) return false;
    fputs("</section>\n", f);
    return true;
}

static bool report_f_attn_section(report *r, FILE *f) {
    report_heading(f, "F-Attn by layer");
    fputs("<p>The share of attention that goes to the first token, over all heads and query positions (Fig. 2, left; "
          "F-Attn of Table 4). Sinks are those layers that stand far above the dashed line of even attention. Mean "
          "over layers: ",
          f);
    report_means(r, f, " %.1f&nbsp;%%", 100, ga_f_attn);
    fputs("; in the paper 46.7&nbsp;% without a gate, 4.8&nbsp;% with the elementwise, 7.3&nbsp;% with the headwise "
          "one.</p>\n",
          f);
    if (!report_figure_html(r, f, "f_attn_by_layer")) return false;
    report_layers_table(r, f, "attention on the first token, %", "%.2f", 100, ga_f_attn);
    fputs("</section>\n", f);
    return true;
}

static bool report_m_act_section(report *r, FILE *f) {
    report_heading(f, "Massive activations by layer");
    fputs("<p>The largest absolute value of the residual stream after each layer (Fig. 6; M-Act of Table 4 is the "
          "mean over layers). ",
          f);
    report_means(r, f, " %.4g", 1, ga_m_act);
    fputs("; in the paper 1053 without a gate, 94 with the elementwise, 98 with the headwise one.</p>\n", f);
    if (!report_figure_html(r, f, "max_act_by_layer")) return false;
    report_layers_table(r, f, "largest |x| after the layer", "%.4g", 1, ga_m_act);
    fputs("</section>\n", f);
    return true;
}

static bool report_gate_section(report *r, FILE *f) {
    if (report_gated_models(r) == 0) return true;
    report_heading(f, "Gate scores");
    fputs("<p>By layer (Fig. 7): the line is the mean, the box one standard deviation to each side, the whiskers "
          "reach from the smallest score to the largest. Where the gate is sparse, a head can stay silent without "
          "resting on the first token. Mean: ",
          f);
    report_means(r, f, " %.3f", 1, ga_gate_mean);
    fputs("; in the paper 0.116 elementwise, 0.172 headwise, 0.271 head-shared, 0.221 on the value.</p>\n", f);
    if (!report_figure_html(r, f, "gate_by_layer")) return false;
    report_layers_table(r, f, "mean gate score", "%.4f", 1, ga_gate_mean);
    fputs("<p>Over all layers (Fig. 3): the paper&rsquo;s scores after SDPA gather near 0.</p>\n", f);
    if (!report_figure_html(r, f, "gate_histogram")) return false;
    fputs("<div class=\"scroll\"><table><thead><tr><th>model</th><th>mean</th><th>deviation</th><th>smallest</th>"
          "<th>largest</th><th>below 0.1</th><th>below 0.5</th></tr></thead>\n<tbody>\n",
          f);
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        const ga_statistics *s = r->models[i].statistics;
        if (!s->has_gate) continue;
        fputs("<tr><td>", f);
        report_model_name(r, f, i);
        fprintf(f, "</td><td>%.4f</td><td>%.4f</td><td>%.4g</td><td>%.4g</td>", ga_gate_mean(s, GA_ALL),
                ga_gate_std(s, GA_ALL), ga_gate_min(s, GA_ALL), ga_gate_max(s, GA_ALL));
        fprintf(f, "<td>%.1f&nbsp;%%</td><td>%.1f&nbsp;%%</td></tr>\n", 100 * ga_gate_below(s, GA_ALL, 0.1),
                100 * ga_gate_below(s, GA_ALL, 0.5));
    }
    fputs("</tbody></table></div>\n</section>\n", f);
    return true;
}

static bool report_training_section(report *r, FILE *f) {
    if (figure_count_points(r, FIGURE_TRAINING) + figure_count_points(r, FIGURE_HELD_OUT) == 0) return true;
    report_heading(f, "Training curves");
    fputs("<p>Thin: the training loss, averaged over short stretches; dots: held-out loss", f);
    if (isfinite(r->lowest_loss)) fputs("; dashed: the lowest that can be reached", f);
    fputs(". ", f);
    if (figure_count_points(r, FIGURE_F_ATTN) > 0)
        fputs("At the right, F-Attn on the held-out windows in the layer where it is largest: when the sink forms. ",
              f);
    fputs("In the paper (Table 1) the gate lowers the perplexity from 6.026 to 5.761.</p>\n", f);
    if (!report_figure_html(r, f, "training_curves")) return false;
    fputs("</section>\n", f);
    return true;
}

static bool report_depth_section(report *r, FILE *f) {
    report_heading(f, "Maps through the depth");
    fputs("<p>The first layer, those at a third and two thirds of the depth, and the last, averaged over heads and "
          "windows.</p>\n",
          f);
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        char stem[96];
        snprintf(stem, sizeof stem, "maps_%s", r->models[i].file);
        fputs("<h3>", f);
        report_model_name(r, f, i);
        fputs("</h3>\n", f);
        if (!report_figure_html(r, f, stem)) return false;
    }
    fputs("</section>\n", f);
    return true;
}

static void report_method(const report *r, FILE *f) {
    report_heading(f, "How this was measured");
    fputs("<ul>\n"
          "<li><b>F-Attn</b>: the attention probability on position 0, averaged over windows, layers, heads and all "
          "query positions, the first one, which sees only itself, included.</li>\n"
          "<li><b>M-Act</b>: the largest absolute value of the residual stream after each layer, before the final "
          "norm, over all windows, positions and dimensions; averaged over layers.</li>\n"
          "<li><b>Gate score</b>: the values that multiply (or are added to) the gated tensor, over layers, heads, "
          "positions and windows.</li>\n"
          "<li><b>Loss</b>: mean cross-entropy in nats per target; perplexity is its exponential.</li>\n"
          "<li>Layers are counted from 0.</li>\n</ul>\n<p>Checkpoints:</p>\n<ul>\n",
          f);
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        fputs("<li>", f);
        report_model_name(r, f, i);
        fputs(": <code>", f);
        report_escape(f, r->models[i].directory);
        fprintf(
            f,
            "</code>, %zu layers, %zu query and %zu key-value heads of %zu, width %zu, FFN %zu, vocabulary %zu</li>\n",
            r->models[i].config.n_layers, r->models[i].config.n_heads, r->models[i].config.n_kv_heads,
            r->models[i].config.head_dim, r->models[i].config.d_model, r->models[i].config.d_ff,
            r->models[i].config.vocab_size);
    }
    fputs("</ul>\n"
          "<p>All figures with their data and scripts are in <code>figures/</code> beside this file (SVG, CSV, "
          "gnuplot), all numbers in <code>summary.json</code>. The paper: Qiu et al., &ldquo;Gated Attention for "
          "Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free&rdquo;, NeurIPS 2025, arXiv "
          "2505.06708.</p>\n</section>\n",
          f);
}

static bool report_write_html(report *r) {
    FILE *f = report_open(r, "report", ".html");
    if (!f) return false;
    report_head(r, f);
    report_results(r, f);
    if (!r->has_gnuplot)
        fputs("<p class=\"note\">gnuplot was not found, so the figures are not drawn; their data and scripts are in "
              "<code>figures/</code>.</p>\n",
              f);
    bool good = report_maps_section(r, f);
    report_paper(f);
    good = good && report_f_attn_section(r, f) && report_m_act_section(r, f) && report_gate_section(r, f) &&
           report_lengths_section(r, f) && report_training_section(r, f) && report_depth_section(r, f);
    report_method(r, f);
    fputs("</body>\n</html>\n", f);
    return report_close(r, f, "report", ".html") && good;
}

#endif
