/* drivers/analyze/gallery.h - the figures of sections 4.2, 4.3 and A.3 to A.5 that are one number for each layer, head
 * or position: lists, from which the CSVs, the plots, the columns of summary.json and the tables of report.html are
 * made.
 *
 *     gallery_write(&r);        // after figures.h; a new figure is a line in one of the lists
 *
 * Needs figures.h before it.
 */
#ifndef DRIVERS_GALLERY_H
#define DRIVERS_GALLERY_H

typedef double (*gallery_value)(const ga_statistics *s, size_t layer);

/* One of up to three curves of a model: what it is called, its key in summary.json (KEY and KEY_by_layer). */
typedef struct {
    const char *name, *key;
    gallery_value value;
} gallery_series;

/* A figure by layer. `scale` is for the plot and the tables; files hold the value as it is. */
typedef struct {
    const char *stem, *title, *label, *format;
    double scale;
    bool logarithmic;
    gallery_series series[3];
    double (*even)(const report *r); /* a dashed line: what even attention has; may be NULL */
    double paper[2];                 /* what the paper has without and with the gate; 0: nothing */
} gallery_layers;

static double gallery_y_before(const ga_statistics *s, size_t l) {
    return ga_output_magnitude(s, GA_BEFORE_GATE, l);
}
static double gallery_y_after(const ga_statistics *s, size_t l) {
    return ga_output_magnitude(s, GA_AFTER_GATE, l);
}
static double gallery_y_before_below_1e_2(const ga_statistics *s, size_t l) {
    return ga_output_below(s, GA_BEFORE_GATE, l, 1e-2);
}
static double gallery_y_after_below_1e_2(const ga_statistics *s, size_t l) {
    return ga_output_below(s, GA_AFTER_GATE, l, 1e-2);
}
static double gallery_y_mean_below_1e_2(const ga_statistics *s, size_t l) {
    return ga_output_below(s, GA_MEAN_GATE, l, 1e-2);
}
static double gallery_y_before_below_1e_3(const ga_statistics *s, size_t l) {
    return ga_output_below(s, GA_BEFORE_GATE, l, 1e-3);
}
static double gallery_y_after_below_1e_3(const ga_statistics *s, size_t l) {
    return ga_output_below(s, GA_AFTER_GATE, l, 1e-3);
}
static double gallery_y_mean_below_1e_3(const ga_statistics *s, size_t l) {
    return ga_output_below(s, GA_MEAN_GATE, l, 1e-3);
}
static double gallery_max_attention_output(const ga_statistics *s, size_t l) {
    return ga_activation_max(s, GA_ATTENTION_OUTPUT, l);
}
static double gallery_max_attention_residual(const ga_statistics *s, size_t l) {
    return ga_activation_max(s, GA_ATTENTION_RESIDUAL, l);
}
static double gallery_max_ffn_output(const ga_statistics *s, size_t l) {
    return ga_activation_max(s, GA_FFN_OUTPUT, l);
}
static double gallery_sink_heads(const ga_statistics *s, size_t l) {
    return ga_sink_heads(s, l, 0.3);
}
static double gallery_entropy(const ga_statistics *s, size_t l) {
    return ga_attention_entropy(s, l, GA_ALL);
}
static double gallery_rank_weights(const ga_statistics *s, size_t l) {
    return ga_effective_rank(s, GA_RANK_WEIGHTS, l, GA_ALL);
}
static double gallery_rank_before(const ga_statistics *s, size_t l) {
    return ga_effective_rank(s, GA_RANK_BEFORE, l, GA_ALL);
}
static double gallery_rank_after(const ga_statistics *s, size_t l) {
    return ga_effective_rank(s, GA_RANK_AFTER, l, GA_ALL);
}
static double gallery_even_f_attn(const report *r) {
    return ga_f_attn_uniform(r->seq_len);
}
static double gallery_even_entropy(const report *r) {
    return ga_entropy_uniform(r->seq_len);
}
static double gallery_same_length(const report *r) {
    (void)r;
    return 1;
}

/* clang-format off */
static const gallery_layers gallery_by_layer[] = {
    {"f_attn_by_layer", "Share of attention on the first token, by layer", "attention on the first token, %", "%.2f", 100,
     false, {{"", "f_attn", ga_f_attn}}, gallery_even_f_attn, {46.7, 4.8}},
    {"sink_share_by_layer", "Share of the sink logit, by layer", "share of the sink logit, %", "%.2f", 100,
     false, {{"", "sink_share", ga_sink_share}}, NULL, {0, 0}},
    {"sink_heads_by_layer", "Share of heads with a sink, by layer", "heads above 30 %, % of all", "%.1f", 100,
     false, {{"", "sink_heads", gallery_sink_heads}}, NULL, {0, 0}},
    {"entropy_by_layer", "Entropy of the attention, by layer", "entropy, nats", "%.3f", 1,
     false, {{"", "entropy", gallery_entropy}}, gallery_even_entropy, {0, 0}},
    {"drain_by_layer", "Length of the first token's states over the others', by layer", "length, first token / others",
     "%.3f", 1, true, {{"value", "value_drain", ga_value_drain}, {"key", "key_drain", ga_key_drain}}, gallery_same_length, {0, 0}},
    {"y_magnitude_by_layer", "Mean |Y| before and after the gate, by layer", "mean |Y|", "%.4f", 1,
     true, {{"before the gate", "y_before", gallery_y_before}, {"after it", "y_after", gallery_y_after}}, NULL, {0.71, 0.05}},
    {"y_below_1e-2_by_layer", "Share of |Y| below 0.01, by layer", "|Y| below 0.01, %", "%.2f", 100, false,
     {{"before the gate", "y_before_below_1e-2", gallery_y_before_below_1e_2}, {"after it", "y_after_below_1e-2", gallery_y_after_below_1e_2},
      {"mean score instead", "y_mean_gate_below_1e-2", gallery_y_mean_below_1e_2}}, NULL, {0, 0}},
    {"y_below_1e-3_by_layer", "Share of |Y| below 0.001, by layer", "|Y| below 0.001, %", "%.2f", 100, false,
     {{"before the gate", "y_before_below_1e-3", gallery_y_before_below_1e_3}, {"after it", "y_after_below_1e-3", gallery_y_after_below_1e_3},
      {"mean score instead", "y_mean_gate_below_1e-3", gallery_y_mean_below_1e_3}}, NULL, {0, 0}},
    {"max_attention_output_by_layer", "Largest |attention output|, by layer", "largest |attention output|", "%.4g", 1,
     true, {{"", "max_attention_output", gallery_max_attention_output}}, NULL, {0, 0}},
    {"max_attention_residual_by_layer", "Largest |x| after attention, by layer", "largest |x| after attention", "%.4g", 1,
     true, {{"", "max_attention_residual", gallery_max_attention_residual}}, NULL, {0, 0}},
    {"max_ffn_output_by_layer", "Largest |FFN output|, by layer", "largest |FFN output|", "%.4g", 1,
     true, {{"", "max_ffn_output", gallery_max_ffn_output}}, NULL, {0, 0}},
    {"max_act_by_layer", "Largest |x| after the FFN, by layer", "largest |x| after the FFN", "%.4g", 1,
     true, {{"", "max_ffn_residual", ga_m_act}}, NULL, {0, 0}},
    {"rank_weights_by_layer", "Effective rank of W_V W_O, by layer", "effective rank of W_V W_O", "%.2f", 1,
     false, {{"", "rank_weights", gallery_rank_weights}}, NULL, {0, 0}},
    {"rank_output_by_layer", "Effective rank of the heads' output, by layer", "effective rank of the output", "%.2f", 1,
     false, {{"before the gate", "rank_before", gallery_rank_before}, {"after it", "rank_after", gallery_rank_after}}, NULL, {0, 0}},
    {"expert_load_by_layer", "Load of the busiest expert, by layer", "busiest expert / mean", "%.2f", 1,
     false, {{"", "expert_max_load", ga_expert_max_load}}, gallery_same_length, {0, 0}},
    {"expert_dead_by_layer", "Share of experts without a token, by layer", "experts without a token, %", "%.1f", 100,
     false, {{"", "expert_dead", ga_expert_dead}}, NULL, {0, 0}},
};
/* clang-format on */
enum { GALLERY_LAYERS = sizeof gallery_by_layer / sizeof gallery_by_layer[0], GALLERY_SERIES = 3 };

typedef enum { GALLERY_HEAD, GALLERY_GATE_HEAD, GALLERY_EXPERT } gallery_unit; /* a gate may have fewer heads */

/* A figure by head, or by expert: a point for each, above its layer. */
typedef struct {
    const char *stem, *title, *label, *key;
    double scale;
    double (*value)(const ga_statistics *s, size_t layer, size_t head);
    gallery_unit unit;
    double threshold; /* a line in the plot; 0: none */
} gallery_heads;

static double gallery_rank_weights_head(const ga_statistics *s, size_t l, size_t h) {
    return ga_effective_rank(s, GA_RANK_WEIGHTS, l, h);
}
/* What W_O reads: behind a gate at G1. */
static double gallery_rank_output_head(const ga_statistics *s, size_t l, size_t h) {
    double after = ga_effective_rank(s, GA_RANK_AFTER, l, h);
    return isnan(after) ? ga_effective_rank(s, GA_RANK_BEFORE, l, h) : after;
}
static double gallery_sink_position_head(const ga_statistics *s, size_t l, size_t h) {
    return s->has_details ? (double)ga_sink_position(s, l, h) : NAN;
}

/* clang-format off */
static const gallery_heads gallery_by_head[] = {
    {"f_attn_by_head", "Share of attention on the first token, by head", "attention on the first token, %", "f_attn_by_head",
     100, ga_f_attn_head, GALLERY_HEAD, 0.3},
    {"sink_position_by_head", "Position that gets most attention, by head", "position", "sink_position_by_head",
     1, gallery_sink_position_head, GALLERY_HEAD, 0},
    {"entropy_by_head", "Entropy of the attention, by head", "entropy, nats", "entropy_by_head",
     1, ga_attention_entropy, GALLERY_HEAD, 0},
    {"gate_mean_by_head", "Mean gate score, by head", "mean gate score", "gate_mean_by_head", 1, ga_gate_mean_head, GALLERY_GATE_HEAD, 0},
    {"gate_std_by_head", "Deviation of the gate score, by head", "deviation", "gate_std_by_head", 1, ga_gate_std_head, GALLERY_GATE_HEAD, 0},
    {"gate_min_by_head", "Smallest gate score, by head", "smallest score", "gate_min_by_head", 1, ga_gate_min_head, GALLERY_GATE_HEAD, 0},
    {"gate_max_by_head", "Largest gate score, by head", "largest score", "gate_max_by_head", 1, ga_gate_max_head, GALLERY_GATE_HEAD, 0},
    {"rank_weights_by_head", "Effective rank of W_V W_O, by head", "effective rank of W_V W_O", "rank_weights_by_head",
     1, gallery_rank_weights_head, GALLERY_HEAD, 0},
    {"rank_output_by_head", "Effective rank of the head's output, by head", "effective rank of the output",
     "rank_output_by_head", 1, gallery_rank_output_head, GALLERY_HEAD, 0},
    {"expert_load_by_expert", "Load of each expert, by layer", "expert / mean", "expert_load_by_expert", 1, ga_expert_load,
     GALLERY_EXPERT, 1},
};
/* clang-format on */
enum { GALLERY_HEADS = sizeof gallery_by_head / sizeof gallery_by_head[0] };

/* A figure by position, or by dimension from the largest on: mean or maximum over the layers. */
typedef struct {
    const char *stem, *title, *label, *key;
    double scale;
    bool by_dimension;
    double (*value)(const ga_statistics *s, size_t at);
    double (*even)(const report *r, size_t at);
} gallery_places;

static double gallery_attention_at(const ga_statistics *s, size_t position) {
    return ga_attention_received(s, GA_ALL, GA_ALL, position);
}
/* Of position j the mean over the queries i >= j of 1 / (i + 1). */
static double gallery_even_attention_at(const report *r, size_t position) {
    double sum = 0;
    for (size_t i = position; i < r->seq_len; i++) sum += 1 / (double)(i + 1);
    return sum / (double)(r->seq_len - position);
}
static double gallery_value_norm_at(const ga_statistics *s, size_t position) {
    return ga_value_norm(s, GA_ALL, GA_ALL, position);
}
static double gallery_key_norm_at(const ga_statistics *s, size_t position) {
    return ga_key_norm(s, GA_ALL, GA_ALL, position);
}
static double gallery_max_at(const ga_statistics *s, size_t position) {
    double top = NAN;
    for (size_t l = 0; l < s->L; l++) top = fmax(top, ga_activation_max_at(s, GA_FFN_RESIDUAL, l, position));
    return top;
}
static double gallery_max_in(const ga_statistics *s, size_t dimension) {
    double top = NAN;
    for (size_t l = 0; l < s->L; l++) top = fmax(top, ga_activation_max_in(s, GA_FFN_RESIDUAL, l, dimension));
    return top;
}

/* clang-format off */
static const gallery_places gallery_by_place[] = {
    {"attention_by_position", "Attention that a position gets, mean over layers and heads", "attention received, %",
     "attention_by_position", 100, false, gallery_attention_at, gallery_even_attention_at},
    {"value_norm_by_position", "Length of the value states, by position", "length of the values", "value_norm_by_position",
     1, false, gallery_value_norm_at, NULL},
    {"key_norm_by_position", "Length of the key states, by position", "length of the keys", "key_norm_by_position",
     1, false, gallery_key_norm_at, NULL},
    {"max_act_by_position", "Largest |x| of the residual stream, by position", "largest |x|", "max_act_by_position",
     1, false, gallery_max_at, NULL},
    {"max_act_by_dimension", "Largest |x| of the residual stream, by dimension", "largest |x|", "max_act_by_dimension",
     1, true, gallery_max_in, NULL},
};
/* clang-format on */
enum { GALLERY_PLACES = sizeof gallery_by_place / sizeof gallery_by_place[0], GALLERY_POSITIONS = 64 };

/* ---- by layer ---------------------------------------------------------------------------------------------------- */

static bool gallery_has(const report_model *m, const gallery_series *series) {
    return series->value && !isnan(series->value(m->statistics, GA_ALL));
}

static bool gallery_layers_any(const report *r, const gallery_layers *f) {
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0; k < GALLERY_SERIES; k++)
            if (gallery_has(&r->models[i], &f->series[k])) return true;
    return false;
}

/* "model" or "model, after it" */
static const char *gallery_title(const report_model *m, const gallery_series *series, char title[160]) {
    snprintf(title, 160, *series->name ? "%s, %s" : "%s", m->name, series->name);
    return title;
}

static bool gallery_layers_csv(report *r, const gallery_layers *f) {
    FILE *csv = figure_open(r, f->stem, ".csv");
    if (!csv) return false;
    char title[160];
    fputs("layer", csv);
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0; k < GALLERY_SERIES; k++) {
            if (!gallery_has(&r->models[i], &f->series[k])) continue;
            putc(',', csv);
            figure_csv_text(csv, gallery_title(&r->models[i], &f->series[k], title));
        }
    for (size_t l = 0; l < report_most_layers(r); l++) {
        fprintf(csv, "\n%zu", l);
        for (size_t i = 0; i < arrlenu(r->models); i++)
            for (size_t k = 0; k < GALLERY_SERIES; k++) {
                const ga_statistics *s = r->models[i].statistics;
                if (gallery_has(&r->models[i], &f->series[k]))
                    figure_csv_number(csv, l < s->L ? f->series[k].value(s, l) : NAN);
            }
    }
    putc('\n', csv);
    return figure_close(r, csv, f->stem);
}

/* A logarithmic axis only where the values span more than a decade, all of them positive. */
static bool gallery_spans(const report *r, const gallery_layers *f) {
    double low = INFINITY, high = 0;
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0; k < GALLERY_SERIES; k++)
            for (size_t l = 0; gallery_has(&r->models[i], &f->series[k]) && l < r->models[i].statistics->L; l++) {
                double x = f->series[k].value(r->models[i].statistics, l);
                low = fmin(low, x), high = fmax(high, x);
            }
    return low > 0 && high > 10 * low;
}

/* Colours are models, dashes are series: black entries tell the dashes. */
static void gallery_dashes(FILE *gp, const gallery_series *series) {
    for (size_t k = 0; k < GALLERY_SERIES && series[k].value && *series[0].name; k++) {
        fprintf(gp,
                ", \\\n     NaN with linespoints dashtype %zu pointtype %zu pointsize 0.8 linewidth 2 linecolor rgb "
                "'#333333' title ",
                k + 1, 7 - k);
        figure_quote(gp, series[k].name);
    }
}

static bool gallery_draw_layers(report *r, const gallery_layers *f) {
    if (!gallery_layers_any(r, f)) return true;
    if (!gallery_layers_csv(r, f)) return false;
    FILE *gp = figure_open(r, f->stem, ".gp");
    if (!gp) return false;
    figure_begin(gp, f->stem, FIGURE_WIDTH, FIGURE_HEIGHT);
    figure_key(gp);
    figure_layer_axis(gp, report_most_layers(r));
    fputs(f->logarithmic && gallery_spans(r, f) ? "set logscale y\n" : "set yrange [0:*]\n", gp);
    fputs("set ylabel ", gp);
    figure_quote(gp, f->label);
    fputs("\nplot", gp);
    for (size_t i = 0, column = 2, drawn = 0; i < arrlenu(r->models); i++)
        for (size_t k = 0, named = 0; k < GALLERY_SERIES; k++) {
            if (!gallery_has(&r->models[i], &f->series[k])) continue;
            fprintf(gp,
                    "%s '%s.csv' skip 1 using 1:(%g*$%zu) with linespoints dashtype %zu pointtype %zu pointsize 0.8 "
                    "linewidth 2 linecolor rgb '%s' ",
                    drawn++ ? ", \\\n    " : "", f->stem, f->scale, column++, k + 1, 7 - k, figure_colour(i));
            fputs(named ? "notitle" : "title ", gp);
            if (!named++) figure_quote(gp, r->models[i].name);
        }
    gallery_dashes(gp, f->series);
    if (f->even)
        figure_line(gp, f->scale * f->even(r), "'#333333'", 2, f->even == gallery_same_length ? "equal" : "even");
    if (f->paper[0] > 0) figure_line(gp, f->paper[0], "'#8c8c8c'", 3, "paper");
    if (f->paper[1] > 0) figure_line(gp, f->paper[1], "'#8c8c8c'", 4, "paper, gated");
    putc('\n', gp);
    return figure_end(r, gp, f->stem, f->title);
}

/* ---- by head ----------------------------------------------------------------------------------------------------- */

static size_t gallery_count_heads(const report_model *m, const gallery_heads *f) {
    const ga_statistics *s = m->statistics;
    if (isnan(f->value(s, 0, 0))) return 0;
    return f->unit == GALLERY_EXPERT ? s->E : f->unit == GALLERY_GATE_HEAD ? s->gate_heads : s->HQ;
}

static bool gallery_draw_heads(report *r, const gallery_heads *f) {
    size_t n = arrlenu(r->models), total = 0, row = 0, drawn = 0;
    for (size_t i = 0; i < n; i++) total += gallery_count_heads(&r->models[i], f);
    if (total == 0) return true;
    FILE *csv = figure_open(r, f->stem, ".csv");
    if (!csv) return false;
    fprintf(csv, "model,layer,%s,value\n", f->unit == GALLERY_EXPERT ? "expert" : "head");
    for (size_t i = 0; i < n; i++) {
        const ga_statistics *s = r->models[i].statistics;
        size_t heads = gallery_count_heads(&r->models[i], f);
        for (size_t j = 0; j < s->L * heads; j++) {
            figure_csv_text(csv, r->models[i].name);
            fprintf(csv, ",%zu,%zu", j / heads, j % heads);
            figure_csv_number(csv, f->value(s, j / heads, j % heads));
            putc('\n', csv);
        }
    }
    if (!figure_close(r, csv, f->stem)) return false;

    FILE *gp = figure_open(r, f->stem, ".gp");
    if (!gp) return false;
    figure_begin(gp, f->stem, FIGURE_WIDTH, FIGURE_HEIGHT);
    figure_key(gp);
    figure_layer_axis(gp, report_most_layers(r));
    fputs("set yrange [0:*]\nset ylabel ", gp);
    figure_quote(gp, f->label);
    fputs("\nplot", gp);
    for (size_t i = 0; i < n; i++) {
        size_t heads = gallery_count_heads(&r->models[i], f), rows = heads * r->models[i].statistics->L;
        if (heads == 0) continue;
        /* the heads of a layer stand side by side, so that equal ones are seen */
        fprintf(gp,
                "%s '%s.csv' skip 1 every ::%zu::%zu using ($2%+.4f+%.4f*($3-%g)):(%g*$4) with points pointtype 7 "
                "pointsize 0.7 linecolor rgb '%s' title ",
                drawn++ ? ", \\\n    " : "", f->stem, row, row + rows - 1, figure_bar_offset(i, n),
                figure_bar_width(n) / (double)(heads + 1), (double)(heads - 1) / 2, f->scale, figure_colour(i));
        figure_quote(gp, r->models[i].name);
        row += rows;
    }
    if (f->threshold > 0)
        figure_line(gp, f->scale * f->threshold, "'#333333'", 2, f->unit == GALLERY_EXPERT ? "even" : "sink");
    putc('\n', gp);
    return figure_end(r, gp, f->stem, f->title);
}

/* ---- by position and by dimension -------------------------------------------------------------------------------- */

static size_t gallery_count_places(const report *r, const report_model *m, const gallery_places *f) {
    size_t places = f->by_dimension ? m->config.d_model : r->seq_len;
    return isnan(f->value(m->statistics, 0)) ? 0 : places;
}

typedef struct {
    size_t at;
    double value;
} gallery_place;

static int gallery_falling(const void *a, const void *b) {
    const gallery_place *x = a, *y = b;
    return x->value < y->value ? 1 : x->value > y->value ? -1 : x->at < y->at ? -1 : x->at > y->at;
}

/* The places of a model in the order of the figure, an stb_ds array. */
static gallery_place *gallery_collect(const report *r, const report_model *m, const gallery_places *f) {
    gallery_place *places = NULL;
    size_t n = gallery_count_places(r, m, f);
    for (size_t j = 0; j < n; j++) arrput(places, ((gallery_place){j, f->value(m->statistics, j)}));
    if (f->by_dimension && n > 0) qsort(places, n, sizeof *places, gallery_falling);
    return places;
}

static bool gallery_draw_places(report *r, const gallery_places *f) {
    size_t n = arrlenu(r->models), row = 0, drawn = 0;
    size_t *rows = NULL;
    FILE *csv = figure_open(r, f->stem, ".csv");
    if (!csv) return false;
    fprintf(csv, "model,place,%s,value\n", f->by_dimension ? "dimension" : "position");
    for (size_t i = 0; i < n; i++) {
        gallery_place *places = gallery_collect(r, &r->models[i], f);
        for (size_t j = 0; j < arrlenu(places); j++) {
            figure_csv_text(csv, r->models[i].name);
            fprintf(csv, ",%zu,%zu", f->by_dimension ? j + 1 : j, places[j].at);
            figure_csv_number(csv, places[j].value);
            putc('\n', csv);
        }
        arrput(rows, arrlenu(places));
        row += arrlenu(places);
        arrfree(places);
    }
    bool good = figure_close(r, csv, f->stem);
    FILE *gp = good && row > 0 ? figure_open(r, f->stem, ".gp") : NULL;
    if (!gp) return arrfree(rows), good && row == 0;
    figure_begin(gp, f->stem, FIGURE_WIDTH, FIGURE_HEIGHT);
    figure_key(gp);
    size_t shown = r->seq_len < GALLERY_POSITIONS ? r->seq_len : GALLERY_POSITIONS;
    if (f->by_dimension)
        fputs("set xrange [1:*]\nset logscale x\nset xlabel 'dimension, from the largest on'\n", gp);
    else
        fprintf(gp, "set xrange [-0.5:%zu.5]\nset xlabel 'position'\n", shown - 1);
    fputs("set yrange [0:*]\nset ylabel ", gp);
    figure_quote(gp, f->label);
    fputs("\nplot", gp);
    row = 0;
    for (size_t i = 0; i < n; row += rows[i++]) {
        if (rows[i] == 0) continue;
        fprintf(gp,
                "%s '%s.csv' skip 1 every ::%zu::%zu using 2:(%g*$4) with linespoints pointtype 7 pointsize 0.5 "
                "linewidth 2 linecolor rgb '%s' title ",
                drawn++ ? ", \\\n    " : "", f->stem, row, row + rows[i] - 1, f->scale, figure_colour(i));
        figure_quote(gp, r->models[i].name);
    }
    if (f->even) {
        fputs(", \\\n     '-' using 1:2 with lines dashtype 2 linewidth 1.5 linecolor rgb '#333333' title 'even'\n",
              gp);
        for (size_t j = 0; j < shown; j++) fprintf(gp, "%zu,%.9g\n", j, f->scale * f->even(r, j));
        fputs("e", gp);
    }
    putc('\n', gp);
    arrfree(rows);
    return figure_end(r, gp, f->stem, f->title);
}

/* ---- histograms by layer ----------------------------------------------------------------------------------------- */

/* Fig. 3 by layer: a row of colours for each. */
static bool gallery_draw_histograms(report *r, const report_model *m) {
    char stem[96], title[192];
    snprintf(stem, sizeof stem, "gate_histogram_%s", m->file);
    snprintf(title, sizeof title, "Gate scores by layer, %s", m->name);
    const ga_statistics *s = m->statistics;
    FILE *csv = figure_open(r, stem, ".csv");
    if (!csv) return false;
    for (size_t l = 0; l < s->L; l++) {
        double shares[GA_BINS];
        ga_gate_histogram(s, l, shares);
        for (size_t b = 0; b < GA_BINS; b++) fprintf(csv, "%.9g%c", shares[b], b + 1 < GA_BINS ? ',' : '\n');
    }
    if (!figure_close(r, csv, stem)) return false;
    FILE *gp = figure_open(r, stem, ".gp");
    if (!gp) return false;
    figure_begin(gp, stem, FIGURE_WIDTH, 190 + (int)(s->L < 12 ? 20 * s->L : 240));
    fputs("unset grid\nunset key\nset title ", gp);
    figure_quote(gp, title);
    fprintf(gp,
            " font ',14' offset 0,-0.4\nset xrange [0:1]\nset yrange [%zu.5:-0.5]\nset ytics 0,%zu\nset xlabel 'gate "
            "score'\nset ylabel 'layer'\n"
            "set palette defined (0 '#ffffff', 0.1 '#deebf7', 0.3 '#9ecae1', 0.6 '#3182bd', 1 '#08306b')\n"
            "set cbrange [0:1]\nset cbtics ('0 %%%%' 0, %s'10 %%%%' 0.3162, '40 %%%%' 0.6325, '100 %%%%' 1) scale 0\n"
            "plot '%s.csv' matrix using (($1+0.5)/%d):2:(sqrt($3)) with image\n",
            s->L - 1, s->L / 13 + 1, s->L < 6 ? "" : "'1 %%' 0.1, ", stem, GA_BINS);
    return figure_end(r, gp, stem, title);
}

/* ---- interventions ----------------------------------------------------------------------------------------------- */

/* What is changed, one thing at a time, in all layers: X(key, what, kind, value). scores: the layer's mean. */
/* clang-format off */
#define REPORT_CHANGES(X)                                                   \
    X(gate_mean, "gate scores: their mean", GA_SET_GATE, NAN)               \
    X(gate_1, "gate scores: 1", GA_SET_GATE, 1)                             \
    X(gate_half, "gate scores halved", GA_SCALE_GATE, 0.5)                  \
    X(gate_double, "gate scores doubled", GA_SCALE_GATE, 2)                 \
    X(first_key, "first token: no key", GA_REMOVE_KEY, 0)                   \
    X(first_value, "first token: no value", GA_REMOVE_VALUE, 0)
/* clang-format on */

static const struct {
    const char *key, *what;
    ga_intervention_kind kind;
    double value; /* NAN: the layer's mean score */
} report_changes[] = {
#define X(key, what, kind, value) {#key, what, kind, value},
    REPORT_CHANGES(X)
#undef X
};
enum { CHANGES = sizeof report_changes / sizeof report_changes[0] };

/* NaN where it was not measured. */
static double report_loss_after(const report_model *m, const char *key) {
    for (size_t i = 0; i < arrlenu(m->changes); i++)
        if (m->changes[i].key && strcmp(m->changes[i].key, key) == 0) return m->changes[i].loss;
    return NAN;
}

/* Bars to the right of a name, one below another; models side by side. */
static bool gallery_draw_changes(report *r) {
    const char *stem = "interventions";
    size_t n = arrlenu(r->models), rows = 0;
    FILE *csv = figure_open(r, stem, ".csv");
    if (!csv) return false;
    fputs("model,change,row,loss,difference\n", csv);
    for (size_t i = 0; i < n; i++)
        for (size_t c = 0; c < CHANGES; c++) {
            double loss = report_loss_after(&r->models[i], report_changes[c].key);
            if (isnan(loss)) continue;
            figure_csv_text(csv, r->models[i].name);
            fprintf(csv, ",%s,%.4f", report_changes[c].key, (double)c + figure_bar_offset(i, n));
            figure_csv_number(csv, loss);
            figure_csv_number(csv, loss - r->models[i].loss);
            putc('\n', csv);
            rows++;
        }
    if (!figure_close(r, csv, stem)) return false;
    FILE *gp = rows > 0 ? figure_open(r, stem, ".gp") : NULL;
    if (!gp) return rows == 0;
    figure_begin(gp, stem, FIGURE_WIDTH, 130 + (int)CHANGES * (int)(18 + 12 * n));
    figure_key(gp);
    fputs("set key tmargin right\n", gp);
    fprintf(gp, "set yrange [%.1f:-0.5]\nset ytics (", CHANGES - 0.5);
    for (size_t c = 0; c < CHANGES; c++) {
        figure_quote(gp, report_changes[c].what);
        fprintf(gp, " %zu%s", c, c + 1 < CHANGES ? ", " : "");
    }
    fprintf(gp, ") scale 0\nunset grid\nset grid xtics linetype 1 linecolor rgb '#e6e6e6'\nset xtics font ',13'\n"
                "set xlabel 'change of the loss, nats'\n"
                "set arrow from 0,graph 0 to 0,graph 1 nohead linecolor rgb '#333333'\nplot");
    for (size_t i = 0, first = 0, drawn = 0; i < n; i++) {
        size_t count = 0;
        for (size_t c = 0; c < CHANGES; c++) count += !isnan(report_loss_after(&r->models[i], report_changes[c].key));
        if (count == 0) continue;
        fprintf(
            gp,
            "%s '%s.csv' skip 1 every ::%zu::%zu using (0):3:(0):5:($3-%.4f):($3+%.4f) with boxxyerror linecolor rgb "
            "'%s' title ",
            drawn++ ? ", \\\n    " : "", stem, first, first + count - 1, figure_bar_width(n) / 2,
            figure_bar_width(n) / 2, figure_colour(i));
        figure_quote(gp, r->models[i].name);
        first += count;
    }
    putc('\n', gp);
    return figure_end(r, gp, stem, "Loss after interventions");
}

/* Every silenced head: how much attention it gave the first token, how much the loss rose. */
static bool gallery_draw_silenced(report *r) {
    const char *stem = "silenced_heads";
    size_t row = 0;
    FILE *csv = figure_open(r, stem, ".csv");
    if (!csv) return false;
    fputs("model,layer,head,f_attn,loss,difference\n", csv);
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (size_t c = 0; c < arrlenu(r->models[i].changes); c++) {
            const report_change *change = &r->models[i].changes[c];
            if (change->key) continue;
            figure_csv_text(csv, r->models[i].name);
            fprintf(csv, ",%zu,%zu", change->layer, change->head);
            figure_csv_number(csv, ga_f_attn_head(r->models[i].statistics, change->layer, change->head));
            figure_csv_number(csv, change->loss);
            figure_csv_number(csv, change->loss - r->models[i].loss);
            putc('\n', csv);
            row++;
        }
    if (!figure_close(r, csv, stem)) return false;
    FILE *gp = row > 0 ? figure_open(r, stem, ".gp") : NULL;
    if (!gp) return row == 0;
    figure_begin(gp, stem, FIGURE_WIDTH, FIGURE_HEIGHT);
    figure_key(gp);
    fputs("set xrange [0:*]\nset xlabel 'attention of the head on the first token, %'\nset ylabel 'change of the loss, "
          "nats'\nset xzeroaxis linetype 1 linecolor rgb '#8c8c8c'\nplot",
          gp);
    row = 0;
    for (size_t i = 0, drawn = 0; i < arrlenu(r->models); i++) {
        size_t count = 0;
        for (size_t c = 0; c < arrlenu(r->models[i].changes); c++) count += !r->models[i].changes[c].key;
        if (count == 0) continue;
        fprintf(
            gp,
            "%s '%s.csv' skip 1 every ::%zu::%zu using (100*$4):6 with points pointtype 7 linecolor rgb '%s' title ",
            drawn++ ? ", \\\n    " : "", stem, row, row + count - 1, figure_colour(i));
        figure_quote(gp, r->models[i].name);
        row += count;
    }
    putc('\n', gp);
    return figure_end(r, gp, stem, "Loss after a head was silenced");
}

/* ---- all of them ------------------------------------------------------------------------------------------------- */

static bool gallery_write(report *r) {
    for (size_t i = 0; i < GALLERY_LAYERS; i++)
        if (!gallery_draw_layers(r, &gallery_by_layer[i])) return false;
    for (size_t i = 0; i < GALLERY_HEADS; i++)
        if (!gallery_draw_heads(r, &gallery_by_head[i])) return false;
    for (size_t i = 0; i < GALLERY_PLACES; i++)
        if (!gallery_draw_places(r, &gallery_by_place[i])) return false;
    for (size_t i = 0; i < arrlenu(r->models); i++)
        if (r->models[i].statistics->has_gate && !gallery_draw_histograms(r, &r->models[i])) return false;
    return gallery_draw_changes(r) && gallery_draw_silenced(r);
}

#endif
