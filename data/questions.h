/* data/questions.h - multiple-choice questions, one JSON object on each line, in one of the field's forms:
 *
 *     {"context": "The sky is", "choices": ["blue", "loud"], "label": 0}
 *
 *     context   or ctx, query, question      what the choices follow
 *     choices   or endings                   2 to 26 texts, or {"text": [...], "label": ["A", ...]}
 *     label     or gold, answer, answerKey   the right choice: its number from 0, or its letter
 *
 * so that Hellaswag's, MMLU's, ARC's files are read as they are. Other members are passed over, empty lines too.
 *
 *     data_question_file f;
 *     if (data_read_questions(&f, "hellaswag.jsonl", &e)) fail(e.text);
 *     for (size_t i = 0; i < arrlenu(f.questions); i++) ask(f.questions[i].context, f.questions[i].choices);
 *     data_free_questions(&f);                       // also after a failure
 *
 * The file that defines DATA_IMPLEMENTATION holds the code; it also implements gated_attention.h.
 */
#ifndef DATA_QUESTIONS_H
#define DATA_QUESTIONS_H

#include "../gated_attention.h"

enum { DATA_CHOICES = 26 };

typedef struct {
    size_t line; /* in the file, from 1 */
    const char *context;
    char **choices; /* stb_ds array */
    size_t label;
} data_question;

typedef struct {
    const char *path;
    char *text;               /* the file, decoded where it lies */
    data_question *questions; /* stb_ds array, not empty */
} data_question_file;

/* GA_ERR_FILE, GA_ERR_FORMAT (with the line), GA_ERR_MEMORY. `path` must live as long. */
ga_result data_read_questions(data_question_file *f, const char *path, ga_error *e);
void data_free_questions(data_question_file *f);

#endif

#if defined(DATA_IMPLEMENTATION) && !defined(DATA_QUESTIONS_IMPLEMENTED)
#define DATA_QUESTIONS_IMPLEMENTED

#include <string.h>

/* The one of n members that the question has; false: more than one, or none. */
static bool datai_one_of(const gai_json *members, size_t n, gai_json *value) {
    size_t found = 0;
    for (size_t i = 0; i < n; i++)
        if (members[i].at) *value = members[i], found++;
    return found == 1;
}

static bool datai_question_text(gai_json value, char **text) {
    return gai_json_peek(&value) == '"' && gai_json_string(&value, text);
}

static bool datai_question_texts(gai_json array, char ***texts) {
    gai_json value;
    if (gai_json_peek(&array) != '[') return false;
    while (gai_json_next(&array, NULL, &value)) {
        char *text;
        if (!datai_question_text(value, &text)) return false;
        arrput(*texts, text);
    }
    return true;
}

/* 2, "2", the letter "C", or one of `names` where the choices have them; n: there is no such choice. */
static size_t datai_question_label(gai_json value, char **names, size_t n) {
    char *text;
    uint64_t number;
    if (gai_json_peek(&value) != '"') return gai_parse_u64(value.at, value.end, &number) && number < n ? number : n;
    if (!gai_json_string(&value, &text)) return n;
    for (size_t i = 0; i < arrlenu(names); i++)
        if (strcmp(names[i], text) == 0) return i < n ? i : n;
    if (gai_parse_u64(text, text + strlen(text), &number)) return number < n ? number : n;
    bool letter = *text >= 'A' && *text <= 'Z' && !text[1];
    return letter && (size_t)(*text - 'A') < n ? (size_t)(*text - 'A') : n;
}

/* The texts of the choices, and *names where they have some of their own. */
static bool datai_question_choices(gai_json value, char ***choices, char ***names) {
    static const char *const parts[] = {"text", "label"};
    gai_json v[2];
    if (gai_json_peek(&value) != '{') return datai_question_texts(value, choices);
    if (gai_json_members(value, parts, 2, v, false) || !v[0].at) return false;
    return datai_question_texts(v[0], choices) && (!v[1].at || datai_question_texts(v[1], names));
}

static const char *datai_question_problem(data_question *q, gai_json *v) {
    enum {
        CONTEXT = 0,
        CONTEXTS = 4,
        CHOICES = CONTEXTS,
        CHOICE_FORMS = 2,
        LABEL = CHOICES + CHOICE_FORMS,
        LABELS = 4
    };
    gai_json context, choices, label;
    char *text, **names = NULL;
    if (!datai_one_of(v + CONTEXT, CONTEXTS, &context) || !datai_question_text(context, &text))
        return "needs one text \"context\" (or \"ctx\", \"query\", \"question\")";
    q->context = text;
    bool good =
        datai_one_of(v + CHOICES, CHOICE_FORMS, &choices) && datai_question_choices(choices, &q->choices, &names);
    size_t n = arrlenu(q->choices);
    for (size_t i = 0; i < n; i++) good = good && q->choices[i][0];
    good = good && n >= 2 && n <= DATA_CHOICES;
    q->label = good && datai_one_of(v + LABEL, LABELS, &label) ? datai_question_label(label, names, n) : n;
    arrfree(names);
    if (!good) return "needs \"choices\" (or \"endings\"), 2 to 26 texts that are not empty";
    return q->label < n ? NULL : "needs one \"label\" (or \"gold\", \"answer\", \"answerKey\") of a choice";
}

/* A line of `length` bytes, with a zero byte behind them. */
static ga_result datai_read_question(const char *path, char *line, size_t length, data_question *q, ga_error *e) {
    static const char *const names[] = {"context", "ctx",   "query", "question", "choices",
                                        "endings", "label", "gold",  "answer",   "answerKey"};
    enum { NAMES = sizeof names / sizeof names[0] };
    char place[GAI_PATH + 32];
    gai_json object, values[NAMES];
    snprintf(place, sizeof place, "%s:%zu", path, q->line);
    ga_result result = gai_json_open(&object, place, line, length, e);
    if (!result) result = gai_json_members(object, names, NAMES, values, false);
    if (result) return result;
    const char *problem = datai_question_problem(q, values);
    return problem ? gai_fail(e, GA_ERR_FORMAT, "%s: %s", place, problem) : GA_OK;
}

static ga_result datai_read_questions(data_question_file *f, size_t size, ga_error *e) {
    char *end = f->text + size;
    size_t number = 1;
    for (char *line = f->text; line < end; number++) {
        char *stop = (char *)memchr(line, '\n', (size_t)(end - line));
        if (!stop) stop = end;
        *stop = '\0';
        size_t length = (size_t)(stop - line);
        if (strspn(line, " \t\r") < length) {
            data_question q = {.line = number};
            arrput(f->questions, q);
            ga_result result = datai_read_question(f->path, line, length, &arrlast(f->questions), e);
            if (result) return result;
        }
        line = stop + 1;
    }
    return arrlenu(f->questions) > 0 ? GA_OK : gai_fail(e, GA_ERR_FORMAT, "%s: holds no question", f->path);
}

ga_result data_read_questions(data_question_file *f, const char *path, ga_error *e) {
    FILE *file = NULL;
    uint64_t size = 0;
    *f = (data_question_file){.path = path};
    ga_result result = gai_open(path, &file, &size, e);
    if (result) return result;
    result = gai_read_text(file, path, (size_t)size, &f->text, e);
    fclose(file);
    return result ? result : datai_read_questions(f, (size_t)size, e);
}

void data_free_questions(data_question_file *f) {
    for (size_t i = 0; i < arrlenu(f->questions); i++) arrfree(f->questions[i].choices);
    arrfree(f->questions);
    GA_FREE(f->text);
}

#endif
