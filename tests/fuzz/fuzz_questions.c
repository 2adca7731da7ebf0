/* Multiple-choice questions: what is taken has choices and the right one among them. */
#include "fuzz.h"
#include "../../data/questions.h"

static int fuzz_questions(const uint8_t *data, size_t size) {
    ga_error e = {GA_OK, ""};
    data_question_file f;
    ga_result result = data_read_questions(&f, fuzz_write("questions.jsonl", data, size), &e);
    if (result != GA_OK) fuzz_check_line(e.text);
    if (result == GA_OK) FUZZ_CHECK(arrlenu(f.questions) > 0);
    for (size_t i = 0; result == GA_OK && i < arrlenu(f.questions); i++) {
        const data_question *q = &f.questions[i];
        FUZZ_CHECK(q->line > 0 && strlen(q->context) < size && q->label < arrlenu(q->choices));
        FUZZ_CHECK(arrlenu(q->choices) >= 2 && arrlenu(q->choices) <= DATA_CHOICES);
        for (size_t j = 0; j < arrlenu(q->choices); j++) FUZZ_CHECK(q->choices[j][0] && strlen(q->choices[j]) < size);
    }
    data_free_questions(&f);
    return 0;
}
