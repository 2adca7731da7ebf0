/* drivers/analyze/report.h - what analyze measured, as summary.json and as report.html: beside the paper's own figures,
 * in one file that needs no network.
 *
 *     report_write_summary(&r);
 *     report_write_html(&r);     // after figures_write(&r): the figures are copied into the page
 *
 * Needs figures.h, gallery.h and lengths.h before it.
 */
#ifndef DRIVERS_REPORT_H
#define DRIVERS_REPORT_H

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

static const char report_style[] =
    ":root{color-scheme:light dark;--ink:#1d1d1f;--dim:#555;--page:#fff;--line:#ddd;--card:#f6f6f4;--note:#fff6e5}\n"
    "@media (prefers-color-scheme:dark){:root{--ink:#e8e8e6;--dim:#a9a9a6;--page:#17181a;--line:#3a3b3e;--card:#222326;"
    "--note:#3a2f16}}\n"
    "*{box-sizing:border-box}\n"
    "body{margin:0 auto;max-width:76rem;padding:1.5rem 1rem 4rem;background:var(--page);color:var(--ink);"
    "font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}\n"
    "h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0;overflow-wrap:anywhere}\n"
    "h2{font-size:1.25rem;line-height:1.3;margin:2.6rem 0 .2rem;padding-top:1rem;border-top:1px solid var(--line)}\n"
    "h3{font-size:1rem;margin:1rem 0 .2rem}\n"
    "p{margin:.5rem 0;max-width:46rem}\n"
    "code{font:.88em ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}\n"
    "a{color:inherit}\n"
    "nav{columns:15rem;font-size:.9rem;margin:1.2rem 0}nav a{display:block;padding:.18rem 0;break-inside:avoid}\n"
    ".lead,.place,nav small{color:var(--dim)}.place{margin:0;font-size:.9rem}nav small{display:inline}\n"
    ".beside{display:grid;grid-template-columns:minmax(0,1fr) 16rem;gap:0 1.5rem;align-items:start}\n"
    ".figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:0 1rem}\n"
    "aside{background:var(--card);border-left:3px solid #8c8c8c;padding:.6rem .9rem;margin:.8rem 0;font-size:.9rem}\n"
    "aside b{display:block}\n"
    "@media (max-width:52rem){.beside{display:block}}\n"
    "@media (max-width:74rem){.beside:has(figure.wide){display:block}}\n" /* else the colour bar is scrolled to */
    ".scroll{overflow-x:auto;margin:.8rem 0}\n"
    "table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}\n"
    "caption{text-align:left;color:var(--dim);padding-bottom:.3rem}\n"
    "th,td{padding:.28rem .55rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}\n"
    "thead th{border-bottom:1.5px solid #888;font-weight:600;vertical-align:bottom}\n"
    "th:first-child,td:first-child,.text{text-align:left}\n"
    "small{display:block;color:var(--dim)}\n"
    "tr.paper td{color:var(--dim);font-style:italic}\n"
    ".swatch{display:inline-block;width:.7em;height:.7em;margin-right:.45em;border-radius:2px}\n"
    "figure{margin:.8rem 0;overflow-x:auto;background:#fff;border-radius:4px}\n"
    "figure svg{display:block;width:100%;max-width:38rem;height:auto}\n"
    "figure.wide{grid-column:1/-1}figure.wide svg{min-width:54rem;max-width:54rem}\n"
    "figure svg text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}\n"
    "summary{cursor:pointer;color:var(--dim);font-size:.9rem;padding:.3rem 0}\n"
    ".note{background:var(--note);border-left:3px solid #e69f00;padding:.5rem .8rem}\n"
    "@media print{:root{--ink:#000;--dim:#333;--page:#fff;--line:#bbb;--card:#f4f4f4;--note:#fff}"
    "body{max-width:none;padding:0;font-size:10pt}nav{display:none}h2,h3{break-after:avoid}"
    "section,figure,table,aside{break-inside:avoid}figure,.scroll{overflow:visible}"
    "figure.wide svg{min-width:0;max-height:20cm}"
    ".beside{display:block}.figures{grid-template-columns:1fr 1fr}"
    "details:not([open]){display:none}}\n";

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

static void report_json_heads(FILE *f, const report_model *m, const gallery_heads *g) {
    size_t heads = gallery_count_heads(m, g);
    fprintf(f, heads ? ",\n        \"%s\": [" : ",\n        \"%s\": null", g->key);
    for (size_t l = 0; heads && l < m->statistics->L; l++)
        for (size_t h = 0; h < heads; h++) {
            double x = g->value(m->statistics, l, h);
            fputs(h ? ", " : l ? ", [" : "[", f);
            fprintf(f, isfinite(x) ? "%.9g" : "null", x);
            if (h + 1 == heads) putc(']', f);
        }
    if (heads) putc(']', f);
}

/* Fig. 3: the shares of GA_BINS bins over [0, 1]. */
static void report_json_histograms(FILE *f, const ga_statistics *s) {
    fputs(",\n        \"gate_histogram_by_layer\": ", f);
    for (size_t l = 0; s->has_gate && l < s->L; l++) {
        double shares[GA_BINS];
        ga_gate_histogram(s, l, shares);
        fputs(l ? ", " : "[", f);
        for (size_t b = 0; b < GA_BINS; b++)
            fprintf(f, isfinite(shares[b]) ? "%s%.9g" : "%snull", b ? ", " : "[", shares[b]);
        putc(']', f);
    }
    fputs(s->has_gate ? "]" : "null", f);
}

/* The columns of the lists in gallery.h; of places the first GALLERY_POSITIONS. */
static void report_json_gallery(FILE *f, const report *r, const report_model *m) {
    for (size_t i = 0; i < GALLERY_LAYERS; i++)
        for (size_t k = 0; k < GALLERY_SERIES && gallery_by_layer[i].series[k].value; k++) {
            const gallery_series *series = &gallery_by_layer[i].series[k];
            char key[80];
            report_json_number(f, series->key, series->value(m->statistics, GA_ALL));
            snprintf(key, sizeof key, "%s_by_layer", series->key);
            report_json_layers(f, key, m->statistics, series->value);
        }
    for (size_t i = 0; i < GALLERY_HEADS; i++) report_json_heads(f, m, &gallery_by_head[i]);
    for (size_t i = 0; i < GALLERY_PLACES; i++) {
        const gallery_places *g = &gallery_by_place[i];
        gallery_place *places = gallery_collect(r, m, g);
        size_t n = arrlenu(places) < GALLERY_POSITIONS ? arrlenu(places) : GALLERY_POSITIONS;
        fprintf(f, n ? ",\n        \"%s\": [" : ",\n        \"%s\": null", g->key);
        for (size_t j = 0; j < n; j++) {
            fputs(j ? ", " : "", f);
            if (g->by_dimension) fprintf(f, "[%zu, ", places[j].at);
            fprintf(f, isfinite(places[j].value) ? "%.9g" : "null", places[j].value);
            if (g->by_dimension) putc(']', f);
        }
        if (n) putc(']', f);
        arrfree(places);
    }
}

static const char *const report_streams[] = {"attention_output", "attention_residual", "ffn_output", "ffn_residual"};

/* Fig. 6: what carries the largest value of each stream in each layer. */
static void report_json_peaks(FILE *f, const report_model *m) {
    for (int stream = 0; stream < GA_STREAMS; stream++) {
        fprintf(f, ",\n        \"%s_peak_by_layer\": ", report_streams[stream]);
        bool known = ga_activation_peak(m->statistics, (ga_stream)stream, 0).token >= 0;
        for (size_t l = 0; known && l < m->statistics->L; l++) {
            ga_peak peak = ga_activation_peak(m->statistics, (ga_stream)stream, l);
            fputs(l ? ", " : "[", f);
            fprintf(f, "{\"position\": %zu, \"dimension\": %zu, \"token\": %" PRId32 "}", peak.position, peak.dimension,
                    peak.token);
        }
        fputs(known ? "]" : "null", f);
    }
}

/* Losses after interventions, and by silenced head; null where they were not asked for. */
static void report_json_changes(FILE *f, const report_model *m) {
    size_t written = 0;
    fputs(",\n        \"interventions\": ", f);
    for (size_t i = 0; i < arrlenu(m->changes); i++) {
        const report_change *c = &m->changes[i];
        if (!c->key) continue;
        fprintf(f, isfinite(c->loss) ? "%s\"%s\": %.9g" : "%s\"%s\": null", written++ ? ", " : "{", c->key, c->loss);
    }
    fputs(written ? "}" : "null", f);
    fputs(",\n        \"silenced_heads\": ", f);
    written = 0;
    for (size_t i = 0; i < arrlenu(m->changes); i++) {
        const report_change *c = &m->changes[i];
        if (c->key) continue;
        fprintf(f, "%s{\"layer\": %zu, \"head\": %zu, \"loss\": ", written++ ? ", " : "[", c->layer, c->head);
        fprintf(f, isfinite(c->loss) ? "%.9g}" : "null}", c->loss);
    }
    fputs(written ? "]" : "null", f);
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

static void report_json_model(FILE *f, const report *r, const report_model *m) {
    const ga_statistics *s = m->statistics;
    report_json_text(f, m->name);
    fprintf(f, ": {\n        \"params\": %zu", m->parameters);
    report_json_number(f, "loss", m->loss);
    report_json_number(f, "ppl", exp(m->loss));
    report_json_number(f, "lowest_loss", r->lowest_loss);
    report_json_number(f, "f_attn_uniform", ga_f_attn_uniform(r->seq_len));
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
    report_json_histograms(f, s);
    report_json_gallery(f, r, m);
    report_json_peaks(f, m);
    report_json_changes(f, m);
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

static void report_heading(FILE *f, const char *id, const char *title) {
    fprintf(f, "\n<section id=\"%s\">\n<h2>", id);
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
        bool wide = strncmp(stem, "maps_", 5) == 0; /* drawn for more than a phone's width */
        if (svg)
            fprintf(f, "<figure%s>\n%s</figure>\n", wide ? " class=\"wide\"" : "", svg);
        else
            fprintf(f,
                    "<p class=\"note\">Not drawn: <code>gnuplot %s.gp</code> in <code>figures/</code> draws it.</p>\n",
                    stem);
        arrfree(text);
    }
    return true;
}

/* A row for each layer, a column for each curve. */
static void report_layers_table(const report *r, FILE *f, const gallery_layers *g) {
    size_t layers = report_most_layers(r);
    if (!gallery_layers_any(r, g)) return;
    fprintf(f, "<details><summary>Numbers: %s</summary>\n<div class=\"scroll\"><table>\n<thead><tr><th>layer</th>",
            g->title);
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0; k < GALLERY_SERIES; k++) {
            if (!gallery_has(&r->models[i], &g->series[k])) continue;
            fputs("<th>", f);
            report_model_name(r, f, i);
            if (*g->series[k].name) fprintf(f, "<small>%s</small>", g->series[k].name);
            fputs("</th>", f);
        }
    fputs("</tr></thead>\n<tbody>\n", f);
    for (size_t l = 0; l <= layers; l++) {
        if (l < layers) fprintf(f, "<tr><td>%zu</td>", l);
        if (l == layers) fputs("<tr><td><b>mean</b></td>", f);
        for (size_t i = 0; i < arrlenu(r->models); i++)
            for (size_t k = 0; k < GALLERY_SERIES; k++) {
                const ga_statistics *s = r->models[i].statistics;
                if (!gallery_has(&r->models[i], &g->series[k])) continue;
                gallery_value value = g->series[k].value;
                report_cell(f, g->format,
                            l == layers ? g->scale * value(s, GA_ALL)
                            : l < s->L  ? g->scale * value(s, l)
                                        : NAN);
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

/* What a section says of the models in numbers: means over layers, as sentences of a section from one list. */
typedef struct {
    const char *section, *what, *format;
    double scale;
    double (*value)(const ga_statistics *, size_t);
    bool gated; /* only where a model has a gate */
} report_mean;

static const report_mean report_mean_list[] = {
    {"f-attn", "Mean over layers", " %.1f&nbsp;%%", 100, ga_f_attn, false},
    {"heads", "Heads above 30&nbsp;%", " %.0f&nbsp;%%", 100, gallery_sink_heads, false},
    {"drain", "Value at the first token over the others, mean over layers", " %.2f", 1, ga_value_drain, false},
    {"histograms", "Mean", " %.3f", 1, ga_gate_mean, false},
    {"magnitude", "Before the gate", " %.3f", 1, gallery_y_before, false},
    {"magnitude", "after it", " %.3f", 1, gallery_y_after, true},
    {"sparsity", "Below 0.01 before the gate", " %.1f&nbsp;%%", 100, gallery_y_before_below_1e_2, false},
    {"sparsity", "after it", " %.1f&nbsp;%%", 100, gallery_y_after_below_1e_2, true},
    {"sparsity", "with the mean score", " %.1f&nbsp;%%", 100, gallery_y_mean_below_1e_2, true},
    {"m-act", "Mean over layers", " %.4g", 1, ga_m_act, false},
    {"rank", "Of W<sub>V</sub>W<sub>O</sub>", " %.1f", 1, gallery_rank_weights, false},
    {"rank", "of the output before a gate", " %.1f", 1, gallery_rank_before, false},
    {"rank", "after it", " %.1f", 1, gallery_rank_after, true},
};

static void report_section_means(const report *r, FILE *f, const char *section) {
    size_t listed = 0;
    for (size_t i = 0; i < sizeof report_mean_list / sizeof report_mean_list[0]; i++) {
        const report_mean *m = &report_mean_list[i];
        if (strcmp(m->section, section) != 0 || (m->gated && report_gated_models(r) == 0)) continue;
        fprintf(f, "%s%s: ", listed++ ? "; " : " ", m->what);
        report_means(r, f, m->format, m->scale, m->value);
    }
    if (listed > 0) putc('.', f);
}

/* ---- sections ---------------------------------------------------------------------------------------------------- */

/* "On the first token, in layer 1, where the F-Attn of baseline is largest: baseline 85.5 %, gated 3.5 %." */
static void report_finding(const report *r, FILE *f) {
    size_t base = report_baseline(r), sink = report_sink_layer(&r->models[base]), listed = 0;
    fprintf(f, "On the first token, in layer %zu, where the F-Attn of ", sink);
    report_escape(f, r->models[base].name);
    fputs(" is largest: ", f);
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        const ga_statistics *s = r->models[i].statistics;
        if (sink >= s->L) continue;
        fputs(listed++ ? ", <b>" : "<b>", f);
        report_escape(f, r->models[i].name);
        fprintf(f, " %.1f&nbsp;%%</b>", 100 * ga_f_attn(s, sink));
    }
    fputs(".", f);
}

static void report_head(const report *r, FILE *f) {
    fputs("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
          "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>Gated attention: ",
          f);
    report_names(r, f);
    fprintf(f, "</title>\n<style>\n%s</style>\n</head>\n<body>\n<h1>Gated attention: ", report_style);
    report_names(r, f);
    fputs("</h1>\n<p>", f);
    report_finding(r, f);
    fprintf(f, "</p>\n<p class=\"lead\">%zu windows of %zu tokens from <code>", r->samples, r->seq_len);
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
        fprintf(f, "<small>%s</small></td><td>%.1f&nbsp;%%</td>", strcmp(m->gate, "none") ? m->gate : "no gate",
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
    report_heading(f, "paper", "The paper\xE2\x80\x99s own figures, and others\xE2\x80\x99 measurements");
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

/* A section: what it is, where it stands in the paper, what it shows, what the paper has for it. */
typedef struct {
    const char *id, *title, *place;
    const char *shows; /* a sentence, as HTML */
    void (*numbers)(const report *r,
                    FILE *f);               /* a sentence of the models' own; NULL: that of report_mean_list, if any */
    const char *paper;                      /* as HTML; NULL: the paper has nothing */
    const char *figures[5];                 /* those that were drawn are shown */
    void (*rest)(const report *r, FILE *f); /* tables behind the figures; may be NULL */
    const char *each;                       /* a figure of every model: EACH_<model>; may be NULL */
} report_section;

static void report_numbers_maps(const report *r, FILE *f) {
    size_t base = report_baseline(r), sink = report_sink_layer(&r->models[base]);
    fprintf(f, "Layer %zu, where the F-Attn of ", sink);
    report_escape(f, r->models[base].name);
    fprintf(f, " is largest; %zu windows, their first %zu positions. Below: one window, token by token.", r->samples,
            r->map_len);
}

static void report_numbers_training(const report *r, FILE *f) {
    if (isfinite(r->lowest_loss)) fprintf(f, "The lowest loss that can be reached here is %.4f.", r->lowest_loss);
}

static void report_rest_gate(const report *r, FILE *f) {
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
    fputs("</tbody></table></div>\n", f);
}

/* Which positions, dimensions and tokens carry the largest values: of each stream over all layers. */
static void report_rest_peaks(const report *r, FILE *f) {
    static const char *const names[] = {"attention output", "residual after attention", "FFN output",
                                        "residual after the FFN"};
    fputs("<div class=\"scroll\"><table><caption>What carries the largest value</caption><thead><tr><th>model</th>"
          "<th class=\"text\">of</th><th>largest</th><th>layer</th><th>position</th><th class=\"text\">token</th>"
          "<th>dimension</th></tr></thead>\n<tbody>\n",
          f);
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (int stream = 0; stream < GA_STREAMS; stream++) {
            const ga_statistics *s = r->models[i].statistics;
            ga_peak peak = ga_activation_peak(s, (ga_stream)stream, GA_ALL);
            size_t layer = 0;
            if (peak.token < 0) continue;
            for (size_t l = 0; l < s->L; l++)
                if (ga_activation_peak(s, (ga_stream)stream, l).value == peak.value) layer = l;
            fputs("<tr><td>", f);
            report_model_name(r, f, i);
            fprintf(f, "</td><td class=\"text\">%s</td><td>%.4g</td><td>%zu</td><td>%zu</td><td class=\"text\"><code>",
                    names[stream], peak.value, layer, peak.position);
            report_escape(f, r->models[i].peak_labels[stream]);
            fprintf(f, "</code></td><td>%zu</td></tr>\n", peak.dimension);
        }
    fputs("</tbody></table></div>\n", f);
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

static void report_rest_changes(const report *r, FILE *f) {
    fputs("<div class=\"scroll\"><table><caption>Loss, and its change</caption><thead><tr><th>change</th>", f);
    for (size_t i = 0; i < arrlenu(r->models); i++) fputs("<th>", f), report_model_name(r, f, i), fputs("</th>", f);
    fputs("</tr></thead>\n<tbody>\n", f);
    for (size_t c = 0; c < CHANGES; c++) {
        fprintf(f, "<tr><td>%s</td>", report_changes[c].what);
        for (size_t i = 0; i < arrlenu(r->models); i++) {
            double loss = report_loss_after(&r->models[i], report_changes[c].key);
            if (isnan(loss))
                fputs("<td>&ndash;</td>", f);
            else
                fprintf(f, "<td>%.4f<small>%+.4f</small></td>", loss, loss - r->models[i].loss);
        }
        fputs("</tr>\n", f);
    }
    fputs("</tbody></table></div>\n", f);
}

/* clang-format off */
static const report_section report_sections[] = {
    {"maps", "Attention maps", "Fig. 2, right; section 4.2",
     "What each query attends to, averaged over heads: a sink is the dark column at the left edge.", report_numbers_maps,
     "Layer 21: 83&nbsp;% of the attention on the first token without the gate, 4&nbsp;% with it.",
     {"maps_side_by_side", "maps_window"}, NULL, NULL},
    {"f-attn", "F-Attn by layer", "Fig. 2, left; F-Attn of Table 4",
     "The share of attention that goes to the first token: layers with sinks stand far above even attention.",
     NULL,
     "46.7&nbsp;% without a gate, 4.8&nbsp;% with the elementwise, 7.3&nbsp;% with the headwise one, 30.1&nbsp;% with a "
     "head-shared, 29.7&nbsp;% with a value gate.",
     {"f_attn_by_layer", "sink_share_by_layer"}, NULL, NULL},
    {"heads", "Sinks by head", "Section 4.2; the measure of Gu et al. 2024",
     "Each head&rsquo;s share on the first token; a head above 30&nbsp;% has a sink.", NULL,
     "Heads are averaged there. Gu et al. count the heads above 30&nbsp;% on windows of 64 tokens.",
     {"f_attn_by_head", "sink_heads_by_layer"}, NULL, NULL},
    {"places", "Where the sink sits", "Section 4.2",
     "The attention that each position gets from the queries that see it, and for each head the position that gets most: "
     "a sink may sit elsewhere than at position 0.", NULL, "F-Attn is of the first token alone.",
     {"attention_by_position", "sink_position_by_head"}, NULL, NULL},
    {"entropy", "Entropy of the attention", "Section 4.2",
     "How widely attention is spread: a head that rests on one token has little entropy, and so has one that looks "
     "something up.", NULL, NULL, {"entropy_by_layer", "entropy_by_head"}, NULL, NULL},
    {"drain", "Value drain", "Section 4.2; Guo et al. 2024",
     "How long the value and key states of the first token are, against those of the others: a sink&rsquo;s value drains, "
     "so that attention on it adds nothing.", NULL,
     "Not among its figures. Guo et al. find that values drain where heads rest.",
     {"drain_by_layer", "value_norm_by_position", "key_norm_by_position"}, NULL, NULL},
    {"histograms", "Gate scores: histograms", "Fig. 3; section 4.2",
     "How the gate scores are distributed: near 0 the gate silences what the head says.", NULL,
     "After SDPA the scores gather near 0, those of a value gate and head-shared ones less. Means: 0.116 elementwise, "
     "0.172 headwise, 0.221 on the value, 0.271 head-shared.", {"gate_histogram"}, NULL, "gate_histogram"},
    {"gate", "Gate scores by layer and by head", "Fig. 7; appendix A.5",
     "By layer: the line is the mean, the box one deviation to each side, the whiskers reach from the smallest score to the "
     "largest. By head: the mean and the deviation.", NULL,
     "Where the gate is sparse, a head can stay silent without resting on the first token.",
     {"gate_by_layer", "gate_mean_by_head", "gate_std_by_head", "gate_min_by_head", "gate_max_by_head"}, report_rest_gate,
     NULL},
    {"magnitude", "Mean |Y| before and after the gate", "Fig. 4; appendix A.3",
     "The mean absolute value of what the gate modulates (the SDPA output, or the value at G2), and of what it lets "
     "through.", NULL, "0.71 before the gate, 0.05 after it.", {"y_magnitude_by_layer"}, NULL, NULL},
    {"sparsity", "Share of small values before and after the gate", "Fig. 5; appendix A.3",
     "How much of Y is near zero: before the gate, after it, and with the layer&rsquo;s mean score in the scores&rsquo; "
     "place. What the last lacks against the second is sparsity that depends on the query.", NULL,
     "The same three counts, of the SDPA output.", {"y_below_1e-2_by_layer", "y_below_1e-3_by_layer"},
     NULL, NULL},
    {"m-act", "Massive activations", "Fig. 6; appendix A.4; M-Act of Table 4",
     "The largest absolute value of what attention and FFN add to the residual stream, and of the stream after each, by "
     "layer.", NULL,
     "M-Act: 1053 without a gate, 94 with the elementwise, 98 with the headwise one; the FFN of an early layer (6) writes "
     "them.", {"max_attention_output_by_layer", "max_attention_residual_by_layer", "max_ffn_output_by_layer",
               "max_act_by_layer"}, NULL, NULL},
    {"carriers", "What carries the massive activations", "Fig. 6; appendix A.4",
     "The largest value of the residual stream at each position, and of each dimension from the largest on: massive "
     "activations stand at few positions in few dimensions.", NULL, NULL, {"max_act_by_position", "max_act_by_dimension"},
     report_rest_peaks, NULL},
    {"rank", "Effective rank of W<sub>V</sub>W<sub>O</sub> and of the heads&rsquo; output", "Eq. 6; section 4.1",
     "In how many directions a head can write, and in how many its output does write, before and after the gate "
     "(exponential of the entropy of the normalised singular values).", NULL,
     "Without a non-linearity between them W<sub>V</sub> and W<sub>O</sub> are one map of rank at most d<sub>k</sub> "
     "(Eq. 6); the gate makes the output a non-linear one (Eq. 8).",
     {"rank_weights_by_layer", "rank_output_by_layer", "rank_weights_by_head", "rank_output_by_head"}, NULL, NULL},
    {"experts", "Load of the experts", "Section 3.1",
     "The positions that each expert gets, over the mean of its layer: 1 is even; the largest of them by layer; and the share "
     "of a layer&rsquo;s experts that no position is sent to.", NULL,
     "128 experts, of which 8 are chosen; the load-balancing loss is over the global batch.", {"expert_load_by_expert", "expert_load_by_layer", "expert_dead_by_layer"}, NULL,
     NULL},
    {"interventions", "Interventions", "Sections 4.2 and 4.3",
     "The loss with one thing changed in the forward pass, against the loss without: what a part is for. At the right every "
     "head silenced in turn, by its share of attention on the first token.", NULL,
     "Not among its figures; Fig. 5 puts the mean gate score in the scores&rsquo; place and counts small values.",
     {"interventions", "silenced_heads"}, report_rest_changes, NULL},
    {"lengths", "By length", "Section 4.4; Table 5",
     "How many of the answers&rsquo; tokens are the model&rsquo;s most likely ones (where the data asks questions), F-Attn, "
     "which falls with the length even for attention spread evenly (dashed), and the loss by position in the longest "
     "windows, which rises where positions lie beyond those that a model can tell apart.", NULL,
     "The gated model loses less when YaRN stretches its positions: at 128k 58.8 against 31.7.", {"lengths"},
     report_rest_lengths, NULL},
    {"training", "Training curves", "Table 1",
     "Thin: the training loss, averaged over short stretches; dots: held-out loss, and F-Attn in the layer where it is "
     "largest: when the sink forms.", report_numbers_training, "Perplexity 6.026 without the gate, 5.761 with it.",
     {"training_curves"}, NULL, NULL},
    {"depth", "Maps through the depth", "Fig. 2",
     "The first layer, those at a third and two thirds of the depth, and the last, averaged over heads and windows.", NULL,
     NULL, {NULL}, NULL, "maps"},
};
/* clang-format on */
enum { REPORT_SECTIONS = sizeof report_sections / sizeof report_sections[0] };

static bool report_has_figure(const report *r, const char *stem) {
    for (size_t i = 0; i < arrlenu(r->figures); i++)
        if (strcmp(r->figures[i].stem, stem) == 0) return true;
    return false;
}

/* The figure that a section has of one model. */
static const char *report_each(const report *r, const report_section *section, size_t model, char stem[96]) {
    snprintf(stem, 96, "%s_%s", section->each, r->models[model].file);
    return stem;
}

/* A section without a figure is left out. */
static bool report_wanted(const report *r, const report_section *section) {
    char stem[96];
    for (size_t i = 0; i < 5 && section->figures[i]; i++)
        if (report_has_figure(r, section->figures[i])) return true;
    for (size_t i = 0; section->each && i < arrlenu(r->models); i++)
        if (report_has_figure(r, report_each(r, section, i, stem))) return true;
    return false;
}

/* The numbers of a section's figures by layer. */
static void report_layers_numbers(const report *r, FILE *f, const report_section *section) {
    for (size_t i = 0; i < 5 && section->figures[i]; i++)
        for (size_t g = 0; g < GALLERY_LAYERS; g++)
            if (strcmp(section->figures[i], gallery_by_layer[g].stem) == 0)
                report_layers_table(r, f, &gallery_by_layer[g]);
}

static bool report_section_html(report *r, FILE *f, const report_section *section) {
    char stem[96];
    fprintf(f, "\n<section id=\"%s\">\n<h2>%s</h2>\n<p class=\"place\">%s</p>\n<p>%s", section->id, section->title,
            section->place, section->shows);
    if (section->numbers) putc(' ', f), section->numbers(r, f);
    report_section_means(r, f, section->id);
    fputs("</p>\n", f);
    if (section->paper) fputs("<div class=\"beside\">\n", f);
    fputs("<div class=\"figures\">\n", f);
    for (size_t i = 0; i < 5 && section->figures[i]; i++)
        if (!report_figure_html(r, f, section->figures[i])) return false;
    for (size_t i = 0; section->each && i < arrlenu(r->models); i++)
        if (!report_figure_html(r, f, report_each(r, section, i, stem))) return false;
    fputs("</div>\n", f);
    if (section->paper) fprintf(f, "<aside><b>In the paper</b>%s</aside>\n</div>\n", section->paper);
    report_layers_numbers(r, f, section);
    if (section->rest) section->rest(r, f);
    fputs("</section>\n", f);
    return true;
}

static void report_contents(const report *r, FILE *f) {
    fputs("<nav aria-label=\"Contents\">\n", f);
    for (size_t i = 0; i < REPORT_SECTIONS; i++)
        if (report_wanted(r, &report_sections[i]))
            fprintf(f, "<a href=\"#%s\">%s <small>%s</small></a>\n", report_sections[i].id, report_sections[i].title,
                    report_sections[i].place);
    fputs("<a href=\"#paper\">The paper&rsquo;s Table 4</a>\n<a href=\"#method\">How this was measured</a>\n</nav>\n",
          f);
}

static void report_method(const report *r, FILE *f) {
    report_heading(f, "method", "How this was measured");
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
    bool good = true;
    report_head(r, f);
    report_results(r, f);
    if (!r->has_gnuplot)
        fputs("<p class=\"note\">gnuplot was not found, so the figures are not drawn; their data and scripts are in "
              "<code>figures/</code>.</p>\n",
              f);
    report_contents(r, f);
    for (size_t i = 0; i < REPORT_SECTIONS && good; i++)
        if (report_wanted(r, &report_sections[i])) good = report_section_html(r, f, &report_sections[i]);
    report_paper(f);
    report_method(r, f);
    fputs("</body>\n</html>\n", f);
    return report_close(r, f, "report", ".html") && good;
}

#endif
