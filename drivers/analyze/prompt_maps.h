/* drivers/analyze/prompt_maps.h - analyze --prompt ... --maps: the attention maps of a prompt, averaged over heads,
 * with its tokens on both axes: for each model a figure of four layers, and one figure with a row for each model. As
 * SVG and as PNG.
 *
 * Needs measure.h before it.
 */
#ifndef DRIVERS_PROMPT_MAPS_H
#define DRIVERS_PROMPT_MAPS_H

enum { PROMPT_MAP = 128, PROMPT_LAYERS = 8 };

/* What the figure of all models is drawn from. */
typedef struct {
    figure_panel *panels;            /* stb_ds array, model by model */
    char (*labels)[DATA_LABEL_SIZE]; /* the tokens that the first model reads, */
    size_t length, layers;           /* their number, and the layers it shows */
    bool alike;                      /* so far all models read the same, and show the same layers */
} prompt_maps;

/* --layers, else the first, a quarter, three quarters and the last (0, 6, 20 and 27 of 28, the 1st, 7th, 21st and
 * 28th), each once; their number, 0 on failure. */
static size_t choose_layers(analysis *a, const report_model *m, size_t layers[PROMPT_LAYERS]) {
    size_t L = m->config.n_layers, n = 0;
    if (!a->options.layers) {
        size_t some[] = {1, L / 4, 3 * L / 4, L};
        for (size_t i = 0; i < 4; i++)
            if (some[i] > 0 && (n == 0 || some[i] - 1 > layers[n - 1])) layers[n++] = some[i] - 1;
        return n;
    }
    for (const char *at = a->options.layers; *at;) {
        size_t length = strcspn(at, ",");
        if (n == PROMPT_LAYERS || !read_size(keep_text(a, "%.*s", (int)length, at), 0, (double)L - 1, &layers[n])) {
            note_failure(a, 2, "--layers %s: it takes up to %d layers of %s, 0 to %zu, with commas between them",
                         a->options.layers, PROMPT_LAYERS, m->name, L - 1);
            return 0;
        }
        n++;
        at += length + (at[length] == ',');
    }
    return n;
}

/* The figure once more as PNG. */
static bool draw_png(report *r, const char *stem) {
    char path[FIGURE_PATH], name[128];
    if (!report_path(r, path, "figures", "")) return false;
    figure_run_gnuplot(path, stem, true);
    snprintf(name, sizeof name, "figures/%.100s", stem);
    if (!report_path(r, path, name, ".log")) return false;
    remove(path);
    return true;
}

static bool draw_prompt_maps(report *r, const char *stem, const char *title, const figure_panel *panels, size_t n,
                             size_t columns) {
    bool labelled = r->map_len <= FIGURE_LABELLED;
    return figure_maps(r, stem, title, panels, n, columns, r->map_len, labelled) &&
           (!r->has_gnuplot || draw_png(r, stem));
}

/* One model, two layers in a row; its panels are added to those of all models. */
static bool draw_model(analysis *a, const report_model *m, prompt_maps *all) {
    report *r = &a->report;
    size_t layers[PROMPT_LAYERS], n = choose_layers(a, m, layers), first = arrlenu(all->panels);
    char stem[96], title[192], directory[FIGURE_PATH];
    if (n == 0 || !choose_output(a)) return false;
    bool good = report_path(r, directory, "figures", "") && report_make_directory(r, directory);
    for (size_t i = 0; good && i < n; i++)
        good = figure_map_panel(r, m, layers[i], "_prompt", r->map_len, arraddnptr(all->panels, 1));
    snprintf(stem, sizeof stem, "prompt_maps_%s", m->file);
    snprintf(title, sizeof title, "Attention maps of %s", m->name);
    good = good && draw_prompt_maps(r, stem, title, all->panels + first, n, n < 2 ? 1 : 2);
    if (!good) return fail(a, 1, "%s", r->error);
    if (r->has_gnuplot) printf("maps of %s: %s/figures/%s.svg and .png\n", m->name, r->directory, stem);
    if (first == 0) {
        all->alike = true, all->length = r->map_len, all->layers = n;
        all->labels = malloc(r->map_len * sizeof *all->labels);
        if (!all->labels) return fail(a, 1, "out of memory");
        memcpy(all->labels, r->labels, r->map_len * sizeof *all->labels);
    }
    all->alike = all->alike && all->length == r->map_len && all->layers == n;
    for (size_t i = 0; all->alike && i < r->map_len; i++) all->alike = strcmp(all->labels[i], r->labels[i]) == 0;
    return true;
}

/* Runs the prompt, or its first tokens, and draws the model's figure. */
static bool map_prompt(analysis *a, report_model *m, ga_model *model, const int32_t *prompt, size_t length,
                       prompt_maps *all) {
    report *r = &a->report;
    r->map_len = r->seq_len = length < PROMPT_MAP ? length : PROMPT_MAP;
    r->samples = 1;
    r->has_gnuplot = true;
    measuring w = {.model = model, .batch_size = 1};
    bool good = allocate_measuring(a, &w, m) && label_tokens(a, m, prompt);
    if (good) {
        memcpy(w.tokens, prompt, r->map_len * sizeof *prompt);
        good = map_windows(a, &w, m, 1);
    }
    if (good) copy_maps(&w, m->window_maps, r->map_len);
    free_measuring(&w);
    good = good && draw_model(a, m, all);
    if (good && length > PROMPT_MAP) printf("(of the first %d tokens of %zu)\n", PROMPT_MAP, length);
    return good;
}

/* Every model a row. */
static bool draw_all_models(analysis *a, const prompt_maps *all) {
    static const char stem[] = "prompt_maps_all";
    report *r = &a->report;
    if (!all->alike) {
        printf("no figure of all models: they show other layers, or read the prompt as other tokens\n");
        return true;
    }
    if (!draw_prompt_maps(r, stem, "Attention maps of all models", all->panels, arrlenu(all->panels), all->layers))
        return fail(a, 1, "%s", r->error);
    if (r->has_gnuplot) printf("all models: %s/figures/%s.svg and .png\n", r->directory, stem);
    return true;
}

#endif
