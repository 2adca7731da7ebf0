/* drivers/analyze/evaluate.h - analyze --eval: multiple choice by log-likelihood, with the numbers of
 * lm-evaluation-harness.
 *
 * The questions are those of data/questions.h. For each choice
 *
 *     log p(choice) = sum over its tokens of log p(token | context, tokens before)
 *
 * where the text is `context + " " + choice`. Accuracy: how often the right choice has the highest log p; normalised
 * accuracy: the highest log p / characters of the choice. With --eval_form letters the choices are listed under the
 * question and their letters are scored, as is done for MMLU:
 *
 *     question            with --shots N the first N questions of the file (or of --shots_from) stand before it,
 *     A. first            answered, with an empty line between them; those of the file itself are not scored.
 *     B. second
 *     Answer: A
 *
 * Needs analysis.h and data/questions.h before it.
 */
#ifndef DRIVERS_EVALUATE_H
#define DRIVERS_EVALUATE_H

enum { EVALUATE_TOKENS = 4096 /* computed at once, where a question has fewer */ };

/* What a model makes of a file. */
typedef struct {
    size_t questions, right, right_normalised;
} eval_score;

/* ---- the text of a question -------------------------------------------------------------------------------------- */

static bool eval_by_letter(const analysis *a) {
    return strcmp(a->options.eval_form, "letters") == 0;
}

static void eval_append(char **text, const char *more) {
    memcpy(arraddnptr(*text, strlen(more)), more, strlen(more));
}

/* What stands before the answer, without the space between them. */
static void eval_append_question(const analysis *a, const data_question *q, char **text) {
    eval_append(text, q->context);
    if (!eval_by_letter(a)) return;
    for (size_t i = 0; i < arrlenu(q->choices); i++) {
        char head[] = {'\n', (char)('A' + i), '.', ' ', 0};
        eval_append(text, head);
        eval_append(text, q->choices[i]);
    }
    eval_append(text, "\nAnswer:");
}

static void eval_append_answer(const analysis *a, const data_question *q, size_t choice, char **text) {
    char letter[] = {(char)('A' + choice), 0};
    eval_append(text, " ");
    eval_append(text, eval_by_letter(a) ? letter : q->choices[choice]);
}

/* The description and the answered questions that every question follows. */
static char *eval_prefix(const analysis *a, const data_question_file *shots) {
    char *text = NULL;
    if (a->options.description) eval_append(&text, a->options.description);
    for (size_t i = 0; i < a->options.shots; i++) {
        eval_append_question(a, &shots->questions[i], &text);
        eval_append_answer(a, &shots->questions[i], shots->questions[i].label, &text);
        eval_append(&text, "\n\n");
    }
    return text;
}

/* ---- log-likelihoods --------------------------------------------------------------------------------------------- */

/* One choice of a question: its tokens behind those of the context. */
typedef struct {
    int32_t *tokens; /* stb_ds array */
    size_t context;  /* tokens before the choice's own */
    double log_p;
} eval_request;

/* Tokens of the context and of both together; what comes behind the former is the choice. Spaces at the end of the
 * context belong to the choice: tokenizers join them to the word that follows. */
static bool eval_tokens(analysis *a, const report_model *m, const char *text, size_t context, size_t length,
                        eval_request *r) {
    int32_t *before = NULL;
    while (context > 0 && strchr(" \t\n\r\f\v", text[context - 1])) context--;
    int32_t first = a->has_run && a->run.bos_token >= 0 ? (int32_t)a->run.bos_token : -1;
    if (context == 0 && first < 0) {
        if (!load_tokenizer(a, m)) return false;
        first = a->tokenizer ? data_tokenizer_separator(a->tokenizer) : -1;
        if (first < 0) return fail(a, 1, "%s: a context is empty, and the model has no token to begin with", m->name);
    }
    if (first >= 0) arrput(r->tokens, first), arrput(before, first);
    bool good = encode_text(a, m, text, context, &before);
    good = good && (context > 0 ? encode_text(a, m, text, length, &r->tokens)
                                : encode_text(a, m, text + context, length - context, &r->tokens));
    r->context = arrlenu(before);
    arrfree(before);
    return good;
}

static bool eval_make_requests(analysis *a, const report_model *m, const data_question_file *f, const data_question *q,
                               const char *prefix, eval_request **requests) {
    char *text = NULL;
    if (arrlenu(prefix) > 0) memcpy(arraddnptr(text, arrlenu(prefix)), prefix, arrlenu(prefix));
    eval_append_question(a, q, &text);
    size_t context = arrlenu(text);
    bool good = true;
    for (size_t i = 0; good && i < arrlenu(q->choices); i++) {
        eval_request r = {0};
        arrsetlen(text, context);
        eval_append_answer(a, q, i, &text);
        good = eval_tokens(a, m, text, context, arrlenu(text), &r);
        arrput(*requests, r);
        if (good && r.context >= arrlenu(r.tokens))
            good = fail(a, 1, "%s:%zu: the tokenizer leaves nothing of a choice behind its context", f->path, q->line);
    }
    arrfree(text);
    return good;
}

/* Inputs and targets of a request in a row of T; the oldest tokens are left out where there are more than T. */
static void eval_fill_row(const eval_request *r, size_t T, int32_t *inputs, int32_t *targets) {
    size_t n = arrlenu(r->tokens) - 1, skip = n > T ? n - T : 0;
    for (size_t t = 0; t < T; t++) {
        size_t at = t + skip;
        inputs[t] = at < n ? r->tokens[at] : 0;
        targets[t] = at < n && at + 1 >= r->context ? r->tokens[at + 1] : -1;
    }
}

typedef struct {
    ga_model *model;
    size_t rows; /* tokens computed at once */
    int32_t *inputs, *targets;
    ga_real *losses;
} eval_batch;

static bool eval_run(analysis *a, const report_model *m, eval_batch *b, eval_request *requests, size_t n, size_t T) {
    for (size_t i = 0; i < n; i++) eval_fill_row(&requests[i], T, b->inputs + i * T, b->targets + i * T);
    ga_error e;
    if (ga_forward(b->model, b->inputs, b->targets, n, T, NULL, NULL, &e)) return fail(a, 1, "%s: %s", m->name, e.text);
    b->model->device.copy_out(b->model->device.state, b->losses, b->model->losses, n * T * sizeof *b->losses);
    for (size_t i = 0; i < n; i++) {
        requests[i].log_p = 0;
        for (size_t t = 0; t < T; t++) requests[i].log_p -= (double)b->losses[i * T + t];
    }
    return true;
}

/* All requests, as many at a time as fit. */
static bool eval_run_all(analysis *a, const report_model *m, eval_batch *b, eval_request *requests) {
    size_t longest = b->model->config.max_seq_len;
    for (size_t i = 0, n; i < arrlenu(requests); i += n) {
        size_t T = 1;
        for (n = 0; i + n < arrlenu(requests); n++) {
            size_t own = arrlenu(requests[i + n].tokens) - 1;
            size_t wider = own > longest ? longest : own > T ? own : T;
            if (n > 0 && (n + 1) * wider > b->rows) break;
            T = wider;
        }
        if (!eval_run(a, m, b, requests + i, n, T)) return false;
    }
    return true;
}

/* ---- scores ------------------------------------------------------------------------------------------------------ */

static double eval_characters(const char *text) {
    double n = 0;
    for (; *text; text++) n += ((unsigned char)*text & 0xC0) != 0x80;
    return n;
}

/* The choice with the highest log p, or log p for each character; the first of equals. */
static size_t eval_choose(const analysis *a, const data_question *q, const eval_request *requests, bool normalised) {
    size_t best = 0;
    double highest = -INFINITY;
    for (size_t i = 0; i < arrlenu(q->choices); i++) {
        double characters = eval_by_letter(a) ? 1 : eval_characters(q->choices[i]);
        double score = requests[i].log_p / (normalised ? characters : 1);
        if (score > highest) highest = score, best = i;
    }
    return best;
}

static double eval_standard_error(size_t right, size_t n) {
    double p = (double)right / (double)n;
    return n > 1 ? sqrt(p * (1 - p) / (double)(n - 1)) : (double)NAN;
}

/* 95 % confidence interval of a share, after Wilson: it stays within 0 and 1. */
static void eval_interval(size_t right, size_t n, double interval[2]) {
    double z = 1.959963984540054, p = (double)right / (double)n, k = z * z / (double)n;
    double centre = (p + k / 2) / (1 + k), half = z * sqrt(p * (1 - p) / (double)n + k / (double)n / 4) / (1 + k);
    interval[0] = fmax(0, centre - half), interval[1] = fmin(1, centre + half);
}

static bool eval_finite(const eval_request *requests) {
    for (size_t i = 0; i < arrlenu(requests); i++)
        if (!isfinite(requests[i].log_p)) return false;
    return true;
}

/* Scores the questions from `first` on, and writes a line for each into `csv`. */
static bool eval_score_file(analysis *a, const report_model *m, eval_batch *b, const data_question_file *f,
                            size_t first, const char *prefix, eval_score *score, FILE *csv) {
    enum { TOGETHER = 64 }; /* questions */
    bool good = true, terminal = isatty(STDERR_FILENO);
    size_t n = arrlenu(f->questions);
    fprintf(csv, "line,label,chosen,chosen_normalised,log_p...\n");
    for (size_t from = first; good && from < n; from += TOGETHER) {
        size_t end = from + TOGETHER < n ? from + TOGETHER : n, at = 0;
        eval_request *requests = NULL;
        for (size_t i = from; good && i < end; i++)
            good = eval_make_requests(a, m, f, &f->questions[i], prefix, &requests);
        good = good && eval_run_all(a, m, b, requests);
        if (good && !eval_finite(requests)) good = fail(a, 1, "%s: the model's losses are not finite", m->name);
        for (size_t i = from; good && i < end; i++) {
            const data_question *q = &f->questions[i];
            size_t chosen = eval_choose(a, q, requests + at, false),
                   normalised = eval_choose(a, q, requests + at, true);
            score->questions++, score->right += chosen == q->label, score->right_normalised += normalised == q->label;
            fprintf(csv, "%zu,%zu,%zu,%zu", q->line, q->label, chosen, normalised);
            for (size_t j = 0; j < arrlenu(q->choices); j++) fprintf(csv, ",%.9g", requests[at + j].log_p);
            fprintf(csv, "\n");
            at += arrlenu(q->choices);
        }
        for (size_t i = 0; i < arrlenu(requests); i++) arrfree(requests[i].tokens);
        arrfree(requests);
        if (terminal) fprintf(stderr, "\r%s: %zu of %zu questions of %s ", m->name, end - first, n - first, f->path);
    }
    if (terminal) fprintf(stderr, "\r\033[K");
    return good;
}

/* ---- the mode ---------------------------------------------------------------------------------------------------- */

/* "a/b/hellaswag.jsonl": "hellaswag", made safe for a file name. */
static const char *eval_stem(analysis *a, const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path, *dot = strrchr(name, '.');
    char *stem = (char *)keep_text(a, "%.*s", dot && dot > name ? (int)(dot - name) : 128, name);
    for (char *c = stem; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr("-+.", *c)) *c = '_';
    return stem;
}

/* The name of what is written for file i, with a number where a file before it, of another directory, has
 * the same stem. */
static const char *eval_name(analysis *a, const report_model *m, size_t i) {
    const char *stem = eval_stem(a, a->options.eval[i]);
    size_t number = 1;
    for (size_t k = 0; k < i; k++) number += strcmp(eval_stem(a, a->options.eval[k]), stem) == 0;
    return number == 1 ? keep_text(a, "eval_%s_%s", m->file, stem)
                       : keep_text(a, "eval_%s_%s@%zu", m->file, stem, number);
}

static bool eval_model(analysis *a, const report_model *m, const data_question_file *files,
                       const data_question_file *shots, eval_score *scores) {
    size_t longest = a->options.has_seq_len ? a->options.seq_len : m->config.max_seq_len;
    eval_batch b = {.rows = longest > EVALUATE_TOKENS ? longest : EVALUATE_TOKENS};
    size_t sequences = b.rows / longest;
    b.rows = sequences * longest;
    b.model = load_model(a, m, sequences, longest);
    if (!b.model) return false;
    b.inputs = malloc(b.rows * sizeof *b.inputs);
    b.targets = malloc(b.rows * sizeof *b.targets);
    b.losses = malloc(b.rows * sizeof *b.losses);
    bool good = (b.inputs && b.targets && b.losses) || fail(a, 1, "%s: out of memory", m->name);
    for (size_t i = 0; good && i < arrlenu(a->options.eval); i++) {
        const data_question_file *from = shots ? shots : &files[i];
        size_t first = shots ? 0 : a->options.shots;
        const char *name = eval_name(a, m, i);
        FILE *csv = report_open(&a->report, name, ".csv");
        if (!csv) good = fail(a, 1, "%s", a->report.error);
        char *prefix = eval_prefix(a, from);
        good = good && eval_score_file(a, m, &b, &files[i], first, prefix, &scores[i], csv);
        if (csv && !report_close(&a->report, csv, name, ".csv") && good) good = fail(a, 1, "%s", a->report.error);
        arrfree(prefix);
    }
    free(b.inputs);
    free(b.targets);
    free(b.losses);
    ga_destroy(b.model);
    return good;
}

static void eval_print(const analysis *a, const report_model *m, const eval_score *scores) {
    for (size_t i = 0; i < arrlenu(a->options.eval); i++) {
        const eval_score *s = &scores[i];
        double n = (double)s->questions;
        printf("%-12s  %-24s  %9zu  %6.2f +- %5.2f %%  %6.2f +- %5.2f %%\n", m->name, a->options.eval[i], s->questions,
               100 * (double)s->right / n, 100 * eval_standard_error(s->right, s->questions),
               100 * (double)s->right_normalised / n, 100 * eval_standard_error(s->right_normalised, s->questions));
    }
}

static void eval_json_share(FILE *f, const char *name, size_t right, size_t n) {
    double interval[2], error = eval_standard_error(right, n);
    eval_interval(right, n, interval);
    fprintf(f, "\"%s\": %.9g, ", name, (double)right / (double)n);
    fprintf(f, isfinite(error) ? "\"%s_stderr\": %.9g, " : "\"%s_stderr\": null, ", name, error);
    fprintf(f, "\"%s_ci95\": [%.9g, %.9g]", name, interval[0], interval[1]);
}

static bool eval_write(analysis *a, const eval_score *scores) {
    FILE *f = report_open(&a->report, "evaluation", ".json");
    if (!f) return fail(a, 1, "%s", a->report.error);
    size_t files = arrlenu(a->options.eval);
    fprintf(f, "{\n");
    for (size_t m = 0; m < arrlenu(a->report.models); m++) {
        fprintf(f, "    ");
        report_json_text(f, a->report.models[m].name);
        fprintf(f, ": {\n");
        for (size_t i = 0; i < files; i++) {
            const eval_score *s = &scores[m * files + i];
            fprintf(f, "        ");
            report_json_text(f, a->options.eval[i]);
            fprintf(f, ": {\"questions\": %zu, \"shots\": %zu, ", s->questions, a->options.shots);
            eval_json_share(f, "acc", s->right, s->questions);
            fprintf(f, ", ");
            eval_json_share(f, "acc_norm", s->right_normalised, s->questions);
            fprintf(f, "}%s\n", i + 1 < files ? "," : "");
        }
        fprintf(f, "    }%s\n", m + 1 < arrlenu(a->report.models) ? "," : "");
    }
    fprintf(f, "}\n");
    return report_close(&a->report, f, "evaluation", ".json") || fail(a, 1, "%s", a->report.error);
}

static bool eval_read_file(analysis *a, data_question_file *f, const char *path) {
    ga_error e;
    return !data_read_questions(f, path, &e) || fail(a, 1, "%s", e.text);
}

static bool evaluate(analysis *a) {
    const options *o = &a->options;
    size_t n = arrlenu(o->eval), models = arrlenu(a->report.models);
    if (strcmp(o->eval_form, "cloze") && strcmp(o->eval_form, "letters"))
        return fail(a, 2, "--eval_form %s: it is cloze or letters", o->eval_form);
    if (!are_different(a, "eval", o->eval) || !choose_output(a)) return false;
    assert(n > 0 && models > 0);
    data_question_file *files = NULL, shots = {0};           /* an stb_ds array */
    eval_score *scores = calloc(n * models, sizeof *scores); /* (models, files) */
    bool good = scores || fail(a, 1, "out of memory");
    for (size_t i = 0; good && i < n; i++) {
        arrput(files, (data_question_file){0});
        good = eval_read_file(a, &files[i], o->eval[i]);
    }
    good = good && (!o->shots_from || eval_read_file(a, &shots, o->shots_from));
    for (size_t i = 0; good && i < n; i++) {
        const data_question_file *from = o->shots_from ? &shots : &files[i];
        size_t have = arrlenu(from->questions);
        if (have < o->shots + !o->shots_from)
            good = fail(a, 1, "%s: has %zu questions, too few for --shots %zu", from->path, have, o->shots);
    }
    if (good) printf("%-12s  %-24s  %9s  %17s  %17s\n", "model", "file", "questions", "accuracy", "normalised");
    for (size_t m = 0; good && m < models; m++) {
        report_model *model = &a->report.models[m];
        good = load_run(a, model) && eval_model(a, model, files, o->shots_from ? &shots : NULL, scores + m * n);
        if (good) eval_print(a, model, scores + m * n);
        fflush(stdout);
    }
    good = good && eval_write(a, scores);
    if (good) printf("+- is the standard error; all numbers: %s/evaluation.json\n", a->report.directory);
    for (size_t i = 0; i < arrlenu(files); i++) data_free_questions(&files[i]);
    data_free_questions(&shots);
    arrfree(files);
    free(scores);
    return good;
}

#endif
