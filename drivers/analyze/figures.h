/* drivers/analyze/figures.h - what analyze measured, as figures: for each one NAME.csv (its data), NAME.gp (a gnuplot
 * script that can be run again, `gnuplot NAME.gp`) and NAME.svg, all in DIR/figures.
 *
 *     report r = {.directory = "reports/quick", .models = models, ...};
 *     if (!figures_write(&r)) return fail(r.error);
 *     if (!r.has_gnuplot) puts("gnuplot was not found");   // the CSVs and scripts are there all the same
 *
 * Needs gated_attention.h (ga_statistics), data.h (labels) and stb_ds before it, and POSIX (fork, getline).
 */
#ifndef DRIVERS_FIGURES_H
#define DRIVERS_FIGURES_H

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* Attention maps show this many positions from the first; since attention is causal, they do not depend on the rest. */
enum { FIGURE_MAP = 64, FIGURE_WINDOW_MAP = 32, FIGURE_LABELLED = 40, FIGURE_PATH = 1024 };
/* Of a plot: small enough that its letters are still read when a phone's width shows all of it. */
enum { FIGURE_WIDTH = 540, FIGURE_HEIGHT = 380 };

typedef struct {
    double step, value;
} report_point;

/* The loss after an intervention; key NULL: after a head was silenced. */
typedef struct {
    const char *key;
    size_t layer, head;
    double loss;
} report_change;

typedef struct {
    const char *name, *directory; /* as given, the checkpoint it was read from */
    const char *tokenizer;        /* the directory, if it has a tokenizer.json; else NULL */
    char file[64];                /* the name, as part of a file name */
    char gate[128];               /* in words */
    ga_config config;             /* of the checkpoint */
    size_t parameters;
    double loss, *window_losses; /* (samples) of each window, and their mean */
    ga_statistics *statistics;
    double *maps;                                  /* (L, M, M) averaged over heads and windows */
    double *window_maps;                           /* (L, M, M) of the first window, averaged over heads */
    report_point *training, *held_out, *f_attn;    /* stb_ds arrays from metrics.jsonl, empty where there is none */
    double trained_rope_base;                      /* the checkpoint's own, where an option replaces it */
    struct length_result *lengths;                 /* stb_ds array: --lengths */
    report_change *changes;                        /* stb_ds array, empty without --interventions */
    char peak_labels[GA_STREAMS][DATA_LABEL_SIZE]; /* tokens that carry the largest activations */
} report_model;

typedef struct {
    char stem[96], title[192];
    bool drawn;
} report_figure;

typedef struct {
    const char *directory;
    const char *source, *part; /* of the tokens; in words, which of them */
    size_t seq_len, samples;
    size_t map_len;                  /* M, positions in the maps */
    char (*labels)[DATA_LABEL_SIZE]; /* (M) tokens of the first window */
    double lowest_loss;              /* that any model can reach; NaN: nobody knows */
    report_model *models;            /* stb_ds array */
    report_figure *figures;          /* stb_ds array, in the order of drawing */
    bool has_gnuplot;
    char error[FIGURE_PATH + 128];
} report;

/* Every figure of a comparison. False, with r->error, when a file cannot be written; gnuplot missing is no failure. */
static bool figures_write(report *r);

/* The model that the others are held against: the first without a gate, else the first. */
static size_t report_baseline(const report *r);
/* The layer with the largest F-Attn. */
static size_t report_sink_layer(const report_model *m);

static bool report_fail(report *r, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(r->error, sizeof r->error, format, arguments);
    va_end(arguments);
    return false;
}

static size_t report_baseline(const report *r) {
    for (size_t i = 0; i < arrlenu(r->models); i++)
        if (r->models[i].config.gate_position == GA_NO_GATE) return i;
    return 0;
}

/* Whether any model's softmax has a sink logit. */
static bool report_has_sinks(const report *r) {
    for (size_t i = 0; i < arrlenu(r->models); i++)
        if (r->models[i].statistics->has_sink) return true;
    return false;
}

static size_t report_sink_layer(const report_model *m) {
    size_t largest = 0;
    for (size_t l = 1; l < m->statistics->L; l++)
        if (ga_f_attn(m->statistics, l) > ga_f_attn(m->statistics, largest)) largest = l;
    return largest;
}

/* Loss of one model less that of another: mean and standard error over the windows, which both have seen. */
static void report_loss_difference(const report *r, size_t from, size_t model, double *mean, double *error) {
    double sum = 0, squares = 0, n = (double)r->samples;
    const double *a = r->models[model].window_losses, *b = r->models[from].window_losses;
    for (size_t i = 0; i < r->samples; i++) sum += a[i] - b[i];
    *mean = sum / n;
    for (size_t i = 0; i < r->samples; i++) squares += (a[i] - b[i] - *mean) * (a[i] - b[i] - *mean);
    *error = sqrt(squares / (n - 1) / n); /* NaN for a single window */
}

static size_t report_most_layers(const report *r) {
    size_t most = 0;
    for (size_t i = 0; i < arrlenu(r->models); i++)
        if (r->models[i].statistics->L > most) most = r->models[i].statistics->L;
    return most;
}

static size_t report_gated_models(const report *r) {
    size_t n = 0;
    for (size_t i = 0; i < arrlenu(r->models); i++) n += r->models[i].statistics->has_gate;
    return n;
}

/* ---- files ------------------------------------------------------------------------------------------------------- */

static bool report_make_directory(report *r, const char *path) {
    char partial[FIGURE_PATH];
    if ((size_t)snprintf(partial, sizeof partial, "%s", path) >= sizeof partial)
        return report_fail(r, "%s: the name is too long", path);
    for (char *c = partial + 1; *c; c++) {
        if (*c != '/') continue;
        *c = 0;
        int made = mkdir(partial, 0777);
        if (made && errno != EEXIST && errno != EISDIR)
            return report_fail(r, "%s: cannot be made: %s", partial, strerror(errno));
        *c = '/';
    }
    struct stat status;
    if (mkdir(partial, 0777) == 0) return true;
    int why = errno;
    if (stat(partial, &status) == 0 && S_ISDIR(status.st_mode)) return true;
    return report_fail(r, "%s: cannot be made: %s", path, why == EEXIST ? "a file has this name" : strerror(why));
}

static bool report_path(report *r, char path[FIGURE_PATH], const char *name, const char *ending) {
    if (snprintf(path, FIGURE_PATH, "%s/%s%s", r->directory, name, ending) < FIGURE_PATH) return true;
    return report_fail(r, "%s: the name is too long", r->directory);
}

static FILE *report_open(report *r, const char *name, const char *ending) {
    char path[FIGURE_PATH];
    if (!report_path(r, path, name, ending)) return NULL;
    FILE *file = fopen(path, "w");
    if (!file) report_fail(r, "%s: cannot be written: %s", path, strerror(errno));
    return file;
}

static bool report_close(report *r, FILE *file, const char *name, const char *ending) {
    bool good = !ferror(file);
    if (fclose(file) == 0 && good) return true;
    return report_fail(r, "%s/%s%s: cannot be written: %s", r->directory, name, ending, strerror(errno));
}

/* Bytes of the UTF-8 character at `text`; 0: there is none. */
static size_t report_utf8(const char *text) {
    const unsigned char *b = (const unsigned char *)text;
    if (b[0] < 0x80) return 1;
    size_t length = b[0] >= 0xF0 ? 4 : b[0] >= 0xE0 ? 3 : 2;
    if (b[0] < 0xC2 || b[0] > 0xF4) return 0;
    for (size_t i = 1; i < length; i++)
        if ((b[i] & 0xC0) != 0x80) return 0;
    bool overlong = (b[0] == 0xE0 && b[1] < 0xA0) || (b[0] == 0xF0 && b[1] < 0x90);
    bool surrogate = b[0] == 0xED && b[1] > 0x9F, beyond = b[0] == 0xF4 && b[1] > 0x8F;
    return overlong || surrogate || beyond ? 0 : length;
}

/* Whole file with a 0 behind it; NULL when it cannot be read. */
static char *report_read(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    char *text = NULL, block[4096];
    size_t n;
    while ((n = fread(block, 1, sizeof block, file)) > 0) memcpy(arraddnptr(text, n), block, n);
    bool good = !ferror(file);
    fclose(file);
    if (good) arrput(text, 0);
    if (!good) arrfree(text);
    return text;
}

/* Text for XML and HTML. Bytes that are no UTF-8, and control characters, which neither can hold, become U+FFFD. */
static void report_escape(FILE *file, const char *text) {
    static const struct {
        char c;
        const char *entity;
    } special[] = {{'&', "&amp;"}, {'<', "&lt;"}, {'>', "&gt;"}, {'"', "&quot;"}, {'\'', "&#39;"}};
    while (*text) {
        size_t length = report_utf8(text), i = 0;
        while (i < sizeof special / sizeof special[0] && special[i].c != *text) i++;
        if (i < sizeof special / sizeof special[0])
            fputs(special[i].entity, file);
        else if (length == 0 || (unsigned char)*text < ' ')
            fputs("\xEF\xBF\xBD", file);
        else
            fwrite(text, 1, length, file);
        text += length ? length : 1;
    }
}

/* ---- gnuplot ----------------------------------------------------------------------------------------------------- */

/* Okabe and Ito's colours, which readers of every colour vision tell apart; one for each model, in all figures. */
static const char *const figure_colours[] = {"#d55e00", "#0072b2", "#009e73", "#cc79a7",
                                             "#e69f00", "#56b4e9", "#5a5a5a", "#a0522d"};

static const char *figure_colour(size_t model) {
    return figure_colours[model % (sizeof figure_colours / sizeof figure_colours[0])];
}

/* Text as a gnuplot string: within '...' only the quote itself is special. */
static void figure_quote(FILE *gp, const char *text) {
    putc('\'', gp);
    for (; *text; text++) {
        if (*text == '\'') putc('\'', gp);
        putc((unsigned char)*text < ' ' ? ' ' : *text, gp);
    }
    putc('\'', gp);
}

static void figure_quotef(FILE *gp, const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    figure_quote(gp, text);
}

static void figure_begin(FILE *gp, const char *stem, int width, int height) {
    fprintf(gp, "# gnuplot %s.gp draws %s.svg; gnuplot -e png=1 %s.gp draws %s.png\n", stem, stem, stem, stem);
    fprintf(
        gp,
        "if (exists('png')) {\n"
        "    set terminal pngcairo noenhanced size %d,%d fontscale 1.8 linewidth 2 pointscale 2 background '#ffffff'\n"
        "    set output '%s.png'\n} else {\n"
        "    set terminal svg noenhanced size %d,%d font 'Helvetica,14' background '#ffffff'\n"
        "    set output '%s.svg'\n}\n",
        2 * width, 2 * height, stem, width, height, stem);
    fputs("set encoding utf8\nset datafile separator comma\nset border 3 linecolor rgb '#8c8c8c'\n"
          "set tics nomirror out scale 0.5 textcolor rgb '#333333'\n"
          "set grid ytics linetype 1 linecolor rgb '#e6e6e6'\n"
          "set key tmargin left horizontal Left reverse samplen 1.6 textcolor rgb '#333333'\n"
          "set style fill solid 0.9 noborder\n",
          gp);
}

/* A key above the plot, in columns. */
static void figure_key(FILE *gp) {
    fputs("set key tmargin left horizontal Left reverse samplen 1.6 font ',13' textcolor rgb '#333333'\n", gp);
}

/* One more curve: a dashed line with its value in the key. */
static void figure_line(FILE *gp, double y, const char *colour, int dashes, const char *title) {
    fprintf(gp, ", \\\n     %.9g with lines dashtype %d linewidth 1.5 linecolor rgb %s title ", y, dashes, colour);
    figure_quotef(gp, "%s (%.3g)", title, y);
}

/* gnuplot as a child in DIR/figures, its complaints in STEM.log; its exit status, 127 when there is no gnuplot. */
static int figure_run_gnuplot(const char *directory, const char *stem, bool png) {
    char script[128], log[128];
    snprintf(script, sizeof script, "%s.gp", stem);
    snprintf(log, sizeof log, "%s.log", stem);
    fflush(NULL);
    pid_t child = fork();
    if (child < 0) return 126;
    if (child == 0) {
        if (chdir(directory) != 0) _exit(126);
        int file = open(log, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (file >= 0) dup2(file, STDERR_FILENO);
        if (png) execlp("gnuplot", "gnuplot", "-e", "png=1", script, (char *)NULL);
        if (!png) execlp("gnuplot", "gnuplot", script, (char *)NULL);
        _exit(errno == ENOENT || errno == EACCES || errno == ENOTDIR ? 127 : 126);
    }
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) return 126;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 126;
}

/* What gnuplot cannot be told: ids of the figure's own, so that many figures stand in one page; cells of maps with
 * sharp edges; a title for readers that speak. */
static bool figure_finish_svg(report *r, const report_figure *figure) {
    static const char *const before_id[] = {"id='", "id=\"", "href='#", "url(#"};
    static const char gnuplot_title[] = "<title>Gnuplot</title>", image[] = "<image ";
    char path[FIGURE_PATH], name[128];
    snprintf(name, sizeof name, "figures/%s", figure->stem);
    if (!report_path(r, path, name, ".svg")) return false;
    char *svg = report_read(path);
    if (!svg) return report_fail(r, "%s: gnuplot did not write it", path);
    FILE *file = report_open(r, name, ".svg");
    if (!file) return arrfree(svg), false;
    for (const char *at = svg; *at;) {
        if (!strncmp(at, gnuplot_title, sizeof gnuplot_title - 1)) {
            fputs("<title>", file);
            report_escape(file, figure->title);
            fputs("</title>", file);
            at += sizeof gnuplot_title - 1;
            continue;
        }
        size_t length = 1;
        for (size_t i = 0; i < sizeof before_id / sizeof before_id[0]; i++)
            if (!strncmp(at, before_id[i], strlen(before_id[i]))) length = strlen(before_id[i]);
        if (!strncmp(at, image, sizeof image - 1)) {
            fputs("<image style='image-rendering:optimizeSpeed;image-rendering:pixelated' ", file);
            at += sizeof image - 1;
            continue;
        }
        fwrite(at, 1, length, file);
        if (length > 1) fprintf(file, "%s-", figure->stem);
        at += length;
    }
    arrfree(svg);
    return report_close(r, file, name, ".svg");
}

/* Closes the script, draws it, and enters the figure in r->figures. */
static bool figure_end(report *r, FILE *gp, const char *stem, const char *title) {
    char path[FIGURE_PATH], name[128];
    snprintf(name, sizeof name, "figures/%.100s", stem);
    if (!report_close(r, gp, name, ".gp") || !report_path(r, path, name, ".log")) return false;
    report_figure figure = {.drawn = false};
    snprintf(figure.stem, sizeof figure.stem, "%s", stem);
    snprintf(figure.title, sizeof figure.title, "%s", title);
    char directory[FIGURE_PATH];
    if (!report_path(r, directory, "figures", "")) return false;
    if (r->has_gnuplot) {
        int status = figure_run_gnuplot(directory, stem, false);
        figure.drawn = status == 0;
        r->has_gnuplot = status != 127;
        if (status == 0 || status == 127) remove(path);
    }
    if (figure.drawn && !figure_finish_svg(r, &figure)) return false;
    arrput(r->figures, figure);
    return true;
}

static FILE *figure_open(report *r, const char *stem, const char *ending) {
    char name[128];
    snprintf(name, sizeof name, "figures/%.100s", stem);
    return report_open(r, name, ending);
}

static bool figure_close(report *r, FILE *file, const char *stem) {
    char name[128];
    snprintf(name, sizeof name, "figures/%.100s", stem);
    return report_close(r, file, name, ".csv");
}

/* ---- by layer ---------------------------------------------------------------------------------------------------- */

static void figure_csv_text(FILE *csv, const char *text) {
    bool quoted = strpbrk(text, ",\"") != NULL;
    if (quoted) putc('"', csv);
    for (; *text; text++) {
        if (*text == '"') putc('"', csv);
        putc(*text, csv);
    }
    if (quoted) putc('"', csv);
}

static void figure_csv_number(FILE *csv, double x) {
    fprintf(csv, isfinite(x) ? ",%.9g" : ",", x);
}

static void figure_layer_axis(FILE *gp, size_t layers) {
    fprintf(gp, "set xrange [-0.6:%g]\nset xtics 0,%zu\nset xlabel 'layer'\n", (double)layers - 0.4, layers / 13 + 1);
}

/* Where the bar of model i of n stands beside its layer, and how wide it is. */
static double figure_bar_offset(size_t i, size_t n) {
    return 0.64 * ((double)i + 0.5) / (double)n - 0.32;
}

static double figure_bar_width(size_t n) {
    return 0.58 / (double)n;
}

/* ---- gates ------------------------------------------------------------------------------------------------------- */

/* Fig. 7. */
static bool figure_gate(report *r) {
    const char *stem = "gate_by_layer";
    FILE *csv = figure_open(r, stem, ".csv");
    if (!csv) return false;
    fputs("model,layer,mean,std,min,max,below_0.1,below_0.5\n", csv);
    double lowest = 0, highest = 1;
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        const ga_statistics *s = r->models[i].statistics;
        for (size_t l = 0; s->has_gate && l < s->L; l++) {
            figure_csv_text(csv, r->models[i].name);
            fprintf(csv, ",%zu", l);
            figure_csv_number(csv, ga_gate_mean(s, l));
            figure_csv_number(csv, ga_gate_std(s, l));
            figure_csv_number(csv, ga_gate_min(s, l));
            figure_csv_number(csv, ga_gate_max(s, l));
            figure_csv_number(csv, ga_gate_below(s, l, 0.1));
            figure_csv_number(csv, ga_gate_below(s, l, 0.5));
            putc('\n', csv);
            lowest = fmin(lowest, ga_gate_min(s, l));
            highest = fmax(highest, ga_gate_max(s, l));
        }
    }
    if (!figure_close(r, csv, stem)) return false;
    size_t n = report_gated_models(r), row = 0, at = 0;
    if (n == 0) return true;

    FILE *gp = figure_open(r, stem, ".gp");
    if (!gp) return false;
    figure_begin(gp, stem, FIGURE_WIDTH, FIGURE_HEIGHT);
    figure_layer_axis(gp, report_most_layers(r));
    if (lowest >= 0 && highest <= 1) fputs("set yrange [0:1]\n", gp);
    fputs("set ylabel 'gate score'\nplot", gp);
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        const ga_statistics *s = r->models[i].statistics;
        if (!s->has_gate) continue;
        char rows[160];
        snprintf(rows, sizeof rows, "'%s.csv' skip 1 every ::%zu::%zu using ($2%+.4f)", stem, row, row + s->L - 1,
                 figure_bar_offset(at, n));
        double width = figure_bar_width(n);
        fprintf(gp,
                "%s %s:($3-$4<$5?$5:$3-$4):5:6:($3+$4>$6?$6:$3+$4):(%.4f) with candlesticks linewidth 1.2 linecolor "
                "rgb '%s' fillstyle solid 0.35 border title ",
                at ? ", \\\n    " : "", rows, width, figure_colour(i));
        figure_quote(gp, r->models[i].name);
        fprintf(gp, ", \\\n     %s:3:3:3:3:(%.4f) with candlesticks linewidth 3 linecolor rgb '%s' notitle", rows,
                width, figure_colour(i));
        row += s->L;
        at++;
    }
    fputs(", \\\n"
          "     0.116 with lines dashtype 3 linewidth 1.5 linecolor rgb '#8c8c8c' title 'paper: elementwise (0.116)'\n",
          gp);
    return figure_end(r, gp, stem, "Gate scores by layer");
}

/* Fig. 3. */
static bool figure_histogram(report *r) {
    const char *stem = "gate_histogram";
    FILE *csv = figure_open(r, stem, ".csv");
    if (!csv) return false;
    double *columns = NULL; /* stb_ds array, GA_BINS values for each column */
    fputs("low,high", csv);
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        const ga_statistics *s = r->models[i].statistics;
        for (size_t l = 0; s->has_gate && l <= s->L; l++) {
            char title[160];
            if (l == 0) snprintf(title, sizeof title, "%s", r->models[i].name);
            if (l > 0) snprintf(title, sizeof title, "%s layer %zu", r->models[i].name, l - 1);
            putc(',', csv);
            figure_csv_text(csv, title);
            ga_gate_histogram(s, l ? l - 1 : GA_ALL, arraddnptr(columns, GA_BINS));
        }
    }
    for (size_t b = 0; b < GA_BINS; b++) {
        fprintf(csv, "\n%.2f,%.2f", (double)b / GA_BINS, (double)(b + 1) / GA_BINS);
        for (size_t c = 0; c < arrlenu(columns) / GA_BINS; c++) figure_csv_number(csv, columns[c * GA_BINS + b]);
    }
    putc('\n', csv);
    arrfree(columns);
    if (!figure_close(r, csv, stem)) return false;
    if (report_gated_models(r) == 0) return true;

    FILE *gp = figure_open(r, stem, ".gp");
    if (!gp) return false;
    figure_begin(gp, stem, FIGURE_WIDTH, FIGURE_HEIGHT);
    fprintf(gp, "set xrange [0:1]\nset yrange [0:*]\nset xlabel 'gate score'\nset ylabel '%% of the scores'\nplot");
    for (size_t i = 0, column = 3, at = 0; i < arrlenu(r->models); i++) {
        const ga_statistics *s = r->models[i].statistics;
        if (!s->has_gate) continue;
        char bars[96];
        snprintf(bars, sizeof bars, "'%s.csv' skip 1 using (($1+$2)/2):(100*$%zu)", stem, column);
        fprintf(gp, "%s %s:(%.4f) with boxes fillstyle transparent solid 0.3 noborder linecolor rgb '%s' notitle",
                at++ ? ", \\\n    " : "", bars, 1.0 / GA_BINS, figure_colour(i));
        fprintf(gp, ", \\\n     %s with histeps linewidth 2 linecolor rgb '%s' title ", bars, figure_colour(i));
        figure_quotef(gp, "%s (mean %.3f)", r->models[i].name, ga_gate_mean(s, GA_ALL));
        column += 1 + s->L;
    }
    putc('\n', gp);
    return figure_end(r, gp, stem, "Histogram of the gate scores");
}

/* ---- training curves --------------------------------------------------------------------------------------------- */

/* The number, or the largest of the array of numbers, behind a key in one line of metrics.jsonl; NaN: there is none. */
static double report_read_metric(const char *line, const char *key) {
    const char *at = strstr(line, key);
    if (!at) return NAN;
    at += strlen(key);
    double largest = NAN;
    do {
        char *end;
        double x = strtod(at + (*at == '[' || *at == ','), &end);
        if (end == at) break;
        largest = fmax(largest, x);
        at = end;
    } while (*at == ',' && key[strlen(key) - 1] == '[');
    return largest;
}

/* Averages neighbours until about 300 points are left: what a figure can show, without the noise of single batches. */
static void report_thin_points(report_point *points) {
    size_t n = arrlenu(points), block = (n + 299) / 300, kept = 0;
    for (size_t i = 0; block > 1 && i < n; i += block) {
        report_point p = {0, 0};
        size_t count = block < n - i ? block : n - i;
        for (size_t k = i; k < i + count; k++) p.step += points[k].step, p.value += points[k].value;
        points[kept++] = (report_point){p.step / (double)count, p.value / (double)count};
    }
    if (block > 1) arrsetlen(points, kept);
}

/* metrics.jsonl of the run that the checkpoint belongs to, if it is there. */
static void report_read_curves(report_model *m) {
    char path[FIGURE_PATH];
    FILE *file = NULL;
    static const char *const places[] = {"/..", ""};
    for (size_t i = 0; i < 2 && !file; i++)
        if (snprintf(path, sizeof path, "%s%s/metrics.jsonl", m->directory, places[i]) < FIGURE_PATH)
            file = fopen(path, "r");
    if (!file) return;
    char *line = NULL;
    size_t size = 0;
    while (getline(&line, &size, file) > 0) {
        double step = report_read_metric(line, "\"step\":"), loss = report_read_metric(line, "\"loss\":");
        double val_loss = report_read_metric(line, "\"val_loss\":"),
               f_attn = report_read_metric(line, "\"f_attn_by_layer\":[");
        if (isfinite(step) && isfinite(loss)) arrput(m->training, ((report_point){step, loss}));
        if (isfinite(step) && isfinite(val_loss)) arrput(m->held_out, ((report_point){step, val_loss}));
        if (isfinite(step) && isfinite(f_attn)) arrput(m->f_attn, ((report_point){step, f_attn}));
    }
    free(line);
    fclose(file);
    report_thin_points(m->training);
}

static void figure_series_csv(FILE *csv, const char *model, const char *series, const report_point *points) {
    for (size_t i = 0; i < arrlenu(points); i++) {
        figure_csv_text(csv, model);
        fprintf(csv, ",%s,%.0f", series, points[i].step);
        figure_csv_number(csv, points[i].value);
        putc('\n', csv);
    }
}

typedef enum { FIGURE_TRAINING, FIGURE_HELD_OUT, FIGURE_F_ATTN, FIGURE_SERIES } figure_series;

static const report_point *figure_points(const report_model *m, figure_series series) {
    return series == FIGURE_TRAINING ? m->training : series == FIGURE_HELD_OUT ? m->held_out : m->f_attn;
}

static size_t figure_count_points(const report *r, figure_series series) {
    size_t n = 0;
    for (size_t i = 0; i < arrlenu(r->models); i++) n += arrlenu(figure_points(&r->models[i], series));
    return n;
}

/* One series of every model; the rows of the CSV follow one another by model, then by series. */
static void figure_plot_series(report *r, FILE *gp, figure_series series, const char *style, bool titled,
                               double scale) {
    size_t row = 0;
    for (size_t i = 0; i < arrlenu(r->models); i++) {
        for (int s = 0; s < FIGURE_SERIES; s++) {
            size_t n = arrlenu(figure_points(&r->models[i], (figure_series)s));
            if (s == (int)series && n > 0) {
                fprintf(gp, " 'training_curves.csv' skip 1 every ::%zu::%zu using 3:(%g*$4) %s linecolor rgb '%s%s' ",
                        row, row + n - 1, scale, style, series == FIGURE_TRAINING ? "#90" : "#", figure_colour(i) + 1);
                fputs(titled ? "title " : "notitle", gp);
                if (titled) figure_quote(gp, r->models[i].name);
                fputs(", \\\n    ", gp);
            }
            row += n;
        }
    }
}

static bool figure_training(report *r) {
    const char *stem = "training_curves";
    static const char *const names[FIGURE_SERIES] = {"training loss", "held-out loss", "held-out F-Attn"};
    FILE *csv = figure_open(r, stem, ".csv");
    if (!csv) return false;
    fputs("model,series,step,value\n", csv);
    for (size_t i = 0; i < arrlenu(r->models); i++)
        for (int s = 0; s < FIGURE_SERIES; s++)
            figure_series_csv(csv, r->models[i].name, names[s], figure_points(&r->models[i], (figure_series)s));
    if (!figure_close(r, csv, stem)) return false;
    bool training = figure_count_points(r, FIGURE_TRAINING) > 0, held_out = figure_count_points(r, FIGURE_HELD_OUT) > 0;
    bool f_attn = figure_count_points(r, FIGURE_F_ATTN) > 0;
    if (!training && !held_out) return true;

    FILE *gp = figure_open(r, stem, ".gp");
    if (!gp) return false;
    size_t lines = arrlenu(r->models) + 1; /* of the key; the same in both panels keeps their axes level */
    figure_begin(gp, stem, FIGURE_WIDTH, (f_attn ? 2 : 1) * (300 + 21 * (int)lines));
    fprintf(gp, "set key vertical maxrows %zu\n", lines);
    if (f_attn) fputs("set multiplot layout 2,1\n", gp);
    fputs("set xtics autofreq\nset xrange [0:*]\nset xlabel 'optimiser step'\nset ylabel 'loss, nats per token'\nplot",
          gp);
    if (training) figure_plot_series(r, gp, FIGURE_TRAINING, "with lines linewidth 1.2", !held_out, 1);
    if (held_out)
        figure_plot_series(r, gp, FIGURE_HELD_OUT, "with linespoints pointtype 7 pointsize 0.5 linewidth 2", true, 1);
    if (isfinite(r->lowest_loss))
        fprintf(gp,
                " %.9g with lines dashtype 2 linewidth 1.5 linecolor rgb '#333333' title 'lowest that can be reached "
                "(%.3f)'\n",
                r->lowest_loss, r->lowest_loss);
    else
        fputs(" NaN notitle\n", gp);
    if (f_attn) {
        fputs("set yrange [0:*]\nset ylabel 'F-Attn of the largest layer, %'\nplot", gp);
        figure_plot_series(r, gp, FIGURE_F_ATTN, "with linespoints pointtype 7 pointsize 0.5 linewidth 2", true, 100);
        double uniform = 100 * ga_f_attn_uniform(r->seq_len);
        fprintf(gp, " %.9g with lines dashtype 2 linewidth 1.5 linecolor rgb '#333333' title 'uniform (%.1f)'\n",
                uniform, uniform);
        fputs("unset multiplot\n", gp);
    }
    return figure_end(r, gp, stem, "Training curves");
}

/* ---- attention maps ---------------------------------------------------------------------------------------------- */

static const double *report_map(const double *maps, size_t layer, size_t M) {
    return maps + layer * M * M;
}

/* The first, a third, two thirds, the last layer (0, 9, 18, 27 of 28), each once; returns how many. */
static size_t report_map_layers(size_t layers, size_t chosen[4]) {
    size_t n = 0;
    for (size_t i = 0; i < 4; i++) {
        size_t layer = (i * (layers - 1) + 1) / 3;
        if (n == 0 || layer != chosen[n - 1]) chosen[n++] = layer;
    }
    return n;
}

/* Mean attention on the first token in the first `shown` rows of a map. */
static double report_map_sink(const double *map, size_t M, size_t shown) {
    double sum = 0;
    for (size_t i = 0; i < shown; i++) sum += map[i * M];
    return sum / (double)shown;
}

static bool figure_map_csv(report *r, const char *stem, const double *map, size_t M, size_t shown) {
    FILE *csv = figure_open(r, stem, ".csv");
    if (!csv) return false;
    for (size_t i = 0; i < shown; i++)
        for (size_t j = 0; j < shown; j++) fprintf(csv, "%.9g%c", map[i * M + j], j + 1 < shown ? ',' : '\n');
    return figure_close(r, csv, stem);
}

/* A panel of a figure of maps: the CSV of `shown` positions and its title. */
typedef struct {
    char stem[96], title[192];
} figure_panel;

/* Tick labels: tokens where they can be read, else numbers. */
static void figure_map_tics(report *r, FILE *gp, size_t shown, bool labelled) {
    if (!labelled) {
        size_t step = shown <= 16 ? 2 : shown <= 40 ? 8 : 16;
        fprintf(gp, "set xtics 0,%zu font ',11' offset 0,0.5\nset ytics 0,%zu font ',11' offset 0.6,0\n", step, step);
        return;
    }
    for (const char *axis = "xy"; *axis; axis++) {
        fprintf(gp, "set %s font ',%d' (",
                *axis == 'x' ? "xtics rotate by 90 right offset 0,0.3" : "ytics offset 0.6,0", shown > 32 ? 9 : 10);
        for (size_t i = 0; i < shown; i++) {
            if (i) putc(',', gp);
            figure_quote(gp, r->labels[i]);
            fprintf(gp, " %zu", i);
        }
        fputs(")\n", gp);
    }
}

/* Characters of the longest of the first `shown` labels. */
static size_t figure_longest_label(const report *r, size_t shown) {
    size_t longest = 0;
    for (size_t i = 0; i < shown; i++) {
        size_t n = 0;
        for (const char *c = r->labels[i]; *c; c++) n += ((unsigned char)*c & 0xC0) != 0x80;
        if (n > longest) longest = n;
    }
    return longest;
}

/* Square panels, row by row, with one scale of colours. The scale is that of the square root: a column of a few per
 * cent is seen beside one of ninety, and an even spread stays pale. */
static bool figure_maps(report *r, const char *stem, const char *title, const figure_panel *panels, size_t n,
                        size_t columns, size_t shown, bool labelled) {
    size_t rows = (n + columns - 1) / columns;
    double text = labelled ? 7.0 * (double)figure_longest_label(r, shown) : 0; /* room for the tokens beside the axes */
    double side = labelled ? 400 : 330, left = labelled ? 54 + text : 60, right = 88, gap = labelled ? 40 + text : 50,
           top = 46, bottom = labelled ? 54 + text : 54;
    double width = left + (double)columns * side + (double)(columns - 1) * gap + right;
    double row_height = top + side + bottom, height = (double)rows * row_height;
    FILE *gp = figure_open(r, stem, ".gp");
    if (!gp) return false;
    figure_begin(gp, stem, (int)width, (int)height);
    fputs(
        "unset grid\nunset key\n"
        "set palette defined (0 '#ffffff', 0.1 '#fff5eb', 0.25 '#fdd0a2', 0.45 '#fd8d3c', 0.65 '#d94801', \\\n"
        "    0.82 '#8c2d04', 1 '#3d0f02')\n"
        "set cbrange [0:1]\n"
        "set cbtics ('0 %%' 0, '1 %%' 0.1, '5 %%' 0.2236, '10 %%' 0.3162, '25 %%' 0.5, '50 %%' 0.7071, '100 %%' 1) \\\n"
        "    font ',11' scale 0\n",
        gp);
    fprintf(gp, "set xrange [-0.5:%zu.5]\nset yrange [%zu.5:-0.5]\n", shown - 1, shown - 1);
    fprintf(gp, "set xlabel 'key' font ',12' offset 0,%g\nset multiplot\n", labelled ? 0.5 : 0.8);
    figure_map_tics(r, gp, shown, labelled);
    for (size_t i = 0; i < n; i++) {
        double x = left + (double)(i % columns) * (side + gap), y = (double)(i / columns) * row_height + top;
        fprintf(gp, "set lmargin at screen %.5f\nset rmargin at screen %.5f\n", x / width, (x + side) / width);
        fprintf(gp, "set tmargin at screen %.5f\nset bmargin at screen %.5f\n", 1 - y / height,
                1 - (y + side) / height);
        if (i % columns == 0)
            fprintf(gp, "set ylabel 'query' font ',12' offset %g,0\n", labelled ? 0.4 : 1.6);
        else
            fputs("unset ylabel\n", gp);
        if (i + 1 != columns)
            fputs("unset colorbox\n", gp);
        else
            fprintf(gp, "set colorbox user origin screen %.5f, screen %.5f size screen %.5f, screen %.5f noborder\n",
                    (width - right + 16) / width, 1 - (top + side) / height, 14 / width, side / height);
        fputs("set title ", gp);
        figure_quote(gp, panels[i].title);
        fputs(" font ',13' offset 0,-0.4\n", gp);
        fprintf(gp, "plot '%s.csv' matrix using 1:2:($1>$2 ? NaN : sqrt($3)) with image\n", panels[i].stem);
    }
    fputs("unset multiplot\n", gp);
    return figure_end(r, gp, stem, title);
}

/* The map of one layer as CSV and as a panel: averaged over windows, or (`window`, the ending of the file's name) of
 * the first one. */
static bool figure_map_panel(report *r, const report_model *m, size_t layer, const char *window, size_t shown,
                             figure_panel *panel) {
    const double *map = report_map(window ? m->window_maps : m->maps, layer, r->map_len);
    double sink = window ? report_map_sink(map, r->map_len, shown) : ga_f_attn(m->statistics, layer);
    snprintf(panel->stem, sizeof panel->stem, "map_%s_layer%zu%s", m->file, layer, window ? window : "");
    snprintf(panel->title, sizeof panel->title, "%s, layer %zu: %.1f %% on the first token", m->name, layer,
             100 * sink);
    return figure_map_csv(r, panel->stem, map, r->map_len, shown);
}

/* Fig. 2, right: every model in the layer where the baseline's sink is largest. */
static bool figure_side_by_side(report *r, bool window) {
    size_t n = arrlenu(r->models), sink = report_sink_layer(&r->models[report_baseline(r)]);
    size_t shown = window && r->map_len > FIGURE_WINDOW_MAP ? FIGURE_WINDOW_MAP : r->map_len;
    figure_panel *panels = NULL;
    bool good = true;
    for (size_t i = 0; i < n && good; i++) {
        const report_model *m = &r->models[i];
        good = figure_map_panel(r, m, sink < m->statistics->L ? sink : m->statistics->L - 1, window ? "_window0" : NULL,
                                shown, arraddnptr(panels, 1));
    }
    if (good && window)
        good = figure_maps(r, "maps_window", "Attention maps of one window", panels, n, n < 2 ? 1 : 2, shown, true);
    if (good && !window)
        good = figure_maps(r, "maps_side_by_side", "Attention maps, averaged", panels, n, n < 2 ? 1 : 2, shown, false);
    arrfree(panels);
    return good;
}

/* One model's maps in up to four layers. */
static bool figure_model_maps(report *r, const report_model *m) {
    size_t layers[4] = {0}, n = report_map_layers(m->statistics->L, layers);
    figure_panel panels[4];
    char stem[96], title[192];
    for (size_t i = 0; i < n; i++)
        if (!figure_map_panel(r, m, layers[i], NULL, r->map_len, &panels[i])) return false;
    snprintf(stem, sizeof stem, "maps_%s", m->file);
    snprintf(title, sizeof title, "Attention maps of %s", m->name);
    return figure_maps(r, stem, title, panels, n, n < 2 ? 1 : 2, r->map_len, false);
}

/* ---- all of them ------------------------------------------------------------------------------------------------- */

static bool figures_write(report *r) {
    char path[FIGURE_PATH];
    r->has_gnuplot = true;
    if (!report_path(r, path, "figures", "") || !report_make_directory(r, path)) return false;
    if (!figure_side_by_side(r, false) || !figure_side_by_side(r, true)) return false;
    if (!figure_gate(r) || !figure_histogram(r) || !figure_training(r)) return false;
    for (size_t i = 0; i < arrlenu(r->models); i++)
        if (!figure_model_maps(r, &r->models[i])) return false;
    return true;
}

#endif
