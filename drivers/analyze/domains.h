/* drivers/analyze/domains.h - analyze --domains: perplexity by domain, one file of text or tokens for each.
 *
 * Each file is read from its beginning in windows that do not overlap, all of them unless --num_samples says how many.
 * Losses are means over tokens; since tokenizers cut text differently, bits per byte compare models where they do:
 *
 *     bits per byte = sum of the losses / ln 2 / bytes of the tokens that were predicted
 *
 * Needs measure.h before it.
 */
#ifndef DRIVERS_DOMAINS_H
#define DRIVERS_DOMAINS_H

typedef struct {
    size_t windows;
    double tokens, loss_sum, bytes; /* bytes 0: the tokens stand for no text */
} domain_score;

/* Bytes that a token stands for; 0 where tokens are no text. */
static double domain_bytes(const analysis *a, const report_model *m, int32_t token) {
    size_t n = 0;
    if (a->tokenizer) data_tokenizer_bytes(a->tokenizer, token, &n);
    return a->tokenizer ? (double)n : reads_bytes(a, m) ? 1 : 0;
}

static bool domain_windows(analysis *a, measuring *w, const report_model *m, size_t count, domain_score *score) {
    size_t T = a->report.seq_len;
    ga_error e;
    double loss;
    if (ga_forward(w->model, w->tokens, w->targets, count, T, NULL, &loss, &e))
        return fail(a, 1, "%s: %s", m->name, e.text);
    size_t counted = 0;
    for (size_t i = 0; i < count * T; i++) {
        if (w->targets[i] < 0) continue;
        score->bytes += domain_bytes(a, m, w->targets[i]);
        counted++;
    }
    score->tokens += (double)counted;
    if (counted > 0) score->loss_sum += loss * (double)counted;
    return true;
}

static bool score_domain(analysis *a, measuring *w, const report_model *m, const char *file, domain_score *score) {
    report *r = &a->report;
    bool good = true, terminal = isatty(STDERR_FILENO);
    if (is_generator(file)) return fail(a, 2, "--domains %s: it takes files", file);
    data_close(a->stream);
    a->stream = NULL;
    a->options.data = file;
    if (!open_data(a, m)) return false;
    uint64_t all = data_windows(a->stream, a->part);
    score->windows = a->options.has_num_samples ? r->samples : (size_t)all;
    for (size_t i = 0, n = w->batch_size; good && i < score->windows; i += n) {
        if (n > score->windows - i) n = score->windows - i;
        good = read_windows(a, w, i, n) && domain_windows(a, w, m, n, score);
        if (terminal) fprintf(stderr, "\r%s, %s: %zu of %zu windows ", m->name, file, i + n, score->windows);
    }
    if (terminal) fprintf(stderr, "\r\033[K");
    if (good && !(score->tokens > 0)) return fail(a, 1, "%s: holds nothing to predict", file);
    return good;
}

static double domain_bits(const domain_score *s) {
    return s->bytes > 0 ? s->loss_sum / log(2) / s->bytes : (double)NAN;
}

static void print_domain(const report_model *m, const char *file, const domain_score *s) {
    double loss = s->loss_sum / s->tokens;
    printf("%-12s  %-32s  %9zu  %11.0f  %8.4f  %9.5g", m->name, file, s->windows, s->tokens, loss, exp(loss));
    print_number(13, "%.4f", domain_bits(s), !(s->bytes > 0));
    printf("\n");
    fflush(stdout);
}

static bool score_domains(analysis *a, const report_model *m, domain_score *scores) {
    size_t T = a->report.seq_len;
    measuring w = {.batch_size = a->options.has_batch_size ? a->options.batch_size : T < 4096 ? 4096 / T : 1};
    w.model = load_model(a, m, w.batch_size, T);
    if (!w.model) return false;
    w.tokens = malloc(2 * w.batch_size * T * sizeof *w.tokens);
    bool good = w.tokens || fail(a, 1, "%s: out of memory", m->name);
    w.targets = w.tokens + w.batch_size * T;
    for (size_t i = 0; good && i < arrlenu(a->options.domains); i++) {
        const char *file = a->options.domains[i];
        good = score_domain(a, &w, m, file, &scores[i]);
        if (good) print_domain(m, file, &scores[i]);
    }
    ga_destroy(w.model);
    free(w.tokens);
    return good;
}

static bool write_domains(analysis *a, const domain_score *scores) {
    report *r = &a->report;
    size_t n = arrlenu(a->options.domains);
    FILE *f = report_open(r, "domains", ".json");
    if (!f) return fail(a, 1, "%s", r->error);
    fprintf(f, "{\n");
    for (size_t m = 0; m < arrlenu(r->models); m++) {
        fprintf(f, "    ");
        report_json_text(f, r->models[m].name);
        fprintf(f, ": {\n");
        for (size_t i = 0; i < n; i++) {
            const domain_score *s = &scores[m * n + i];
            double bits = domain_bits(s), loss = s->loss_sum / s->tokens;
            fprintf(f, "        ");
            report_json_text(f, a->options.domains[i]);
            fprintf(f, ": {\"windows\": %zu, \"tokens\": %.0f, \"loss\": %.9g, \"ppl\": %.9g", s->windows, s->tokens,
                    loss, exp(loss));
            if (isfinite(bits)) fprintf(f, ", \"bits_per_byte\": %.9g", bits);
            fprintf(f, "}%s\n", i + 1 < n ? "," : "");
        }
        fprintf(f, "    }%s\n", m + 1 < arrlenu(r->models) ? "," : "");
    }
    fprintf(f, "}\n");
    return report_close(r, f, "domains", ".json") || fail(a, 1, "%s", r->error);
}

static bool domains(analysis *a) {
    size_t n = arrlenu(a->options.domains), models = arrlenu(a->report.models);
    if (!are_different(a, "domains", a->options.domains) || !choose_output(a)) return false;
    assert(n > 0 && models > 0);
    domain_score *scores = calloc(n * models, sizeof *scores);
    bool good = scores || fail(a, 1, "out of memory");
    if (good) {
        printf("%zu positions in a window\n%-12s  %-32s  %9s  %11s  %8s  %9s  %13s\n", a->report.seq_len, "model",
               "domain", "windows", "tokens", "loss", "ppl", "bits per byte");
    }
    for (size_t m = 0; good && m < models; m++) {
        report_model *model = &a->report.models[m];
        good = load_run(a, model) && score_domains(a, model, scores + m * n);
    }
    good = good && write_domains(a, scores);
    if (good) printf("all numbers: %s/domains.json\n", a->report.directory);
    free(scores);
    return good;
}

#endif
