/* data/retrieval.h - retrieval tasks in the manner of RULER (Hsieh et al. 2024), of tokens that need no text.
 *
 * A window asks, at its end, for what was said somewhere in it. There are W words 0..W-1, and four more tokens that are
 * the same in every task, so that one model can be trained on all of them:
 *
 *     W    <s>   opens every window             W+2  ?    opens a question
 *     W+1  !     opens a statement "! a b"      W+3  #    "the most common words", the argument of a question
 *
 * Needles (niah): each of G keys has M values of L words. The G*M statements "! key value", in random order, stand at
 * random places of a haystack; then the first Q of the keys are asked for, each with all its values in the order in
 * which they were said:
 *
 *     <s> t4 t9 ! k1 v1 t7 ! k0 v0 t2 t3 ? k0 v0 ? k1 v1            G = 2, M = 1, Q = 2
 *
 * Variables (vt): each of G chains hands a value through M variables, "! a b": b holds what a holds. All distinct
 * words, chains mixed at random, each in its order. A question names a value, the answer is the chain of its variables:
 *
 *     <s> t4 ! w a t9 t1 ! a b t7 ! b c t2 ? w a b c                G = 1, M = 3, Q = 1
 *
 * Common words (cwe): a list in which K words have the share s, the k-th of them (k = 1..K) s (K+1-k) / (1 + ... + K),
 * rounded down; all others are rarer. "? #" asks for the K words, the most frequent first:
 *
 *     <s> t5 t1 t5 t8 t1 t5 t3 ? # t5 t1                            K = 2
 *
 * The haystack is a bigram chain over the W words as in backcopy.h, which goes on behind a statement as if it had not
 * stood there: a text to be learned like any other, in which a head has nothing to look up.
 *
 * All answers follow from the window, so the lowest loss on them is 0, and a question's tokens are found by its form
 * alone: the targets after "? argument", up to the next ? or the end.
 *
 * The file that defines DATA_IMPLEMENTATION holds the code.
 */
#ifndef DATA_RETRIEVAL_H
#define DATA_RETRIEVAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backcopy.h"
#include "random.h"

typedef struct {
    int32_t words;     /* W */
    bool chained;      /* variables: the object of a statement is the subject of the next */
    size_t groups;     /* G keys or chains; 0: common words */
    size_t members;    /* M values of a key, or variables of a chain */
    size_t queries;    /* Q questions, 1..G */
    size_t value_size; /* L words of a value, 1 in a chain */
    size_t common;     /* K */
    double share;      /* s, 0..1 */
} data_retrieval;

enum { DATA_BOS, DATA_STATEMENT, DATA_QUESTION, DATA_MOST_COMMON, DATA_RETRIEVAL_MARKS }; /* tokens W + these */

/* Whether windows of T tokens can hold the task; `need`, where they cannot, says in a few words what it takes. */
bool data_retrieval_fits(const data_retrieval *r, size_t T, char *need, size_t need_size);

/* inputs (T) = x_0 .. x_{T-1}, targets (T) = x_1 .. x_T. haystack: a chain over r->words tokens without triggers.
 * False: out of memory. */
bool data_retrieval_window(const data_retrieval *r, data_backcopy *haystack, data_random *random, size_t T,
                           int32_t *inputs, int32_t *targets);

/* question (T): the number, from 1, of the question that target t is part of the answer to; 0: of none. Returns how
 * many questions there are. */
size_t data_retrieval_questions(int32_t words, size_t T, const int32_t *inputs, int32_t *question);

#endif

#if defined(DATA_IMPLEMENTATION) && !defined(DATA_RETRIEVAL_IMPLEMENTED)
#define DATA_RETRIEVAL_IMPLEMENTED

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

/* The tokens x_0 .. x_T as they are written; the last one is no input. */
typedef struct {
    int32_t *inputs, last;
    size_t T, n;
} datai_window;

static void datai_put(datai_window *w, int32_t token) {
    if (w->n < w->T)
        w->inputs[w->n] = token;
    else
        w->last = token;
    w->n++;
}

static void datai_shuffle(data_random *random, int32_t *x, size_t n) {
    for (size_t i = n; i > 1; i--) {
        size_t j = data_random_below(random, (uint32_t)i);
        int32_t swapped = x[i - 1];
        x[i - 1] = x[j];
        x[j] = swapped;
    }
}

/* ---- needles and variables ---- */

static size_t datai_statements(const data_retrieval *r) {
    return r->groups * r->members;
}

/* Tokens of a window that are no haystack. */
static size_t datai_retrieval_overhead(const data_retrieval *r) {
    return 1 + datai_statements(r) * (2 + r->value_size) + r->queries * (2 + r->members * r->value_size);
}

static size_t datai_names(const data_retrieval *r) {
    return r->chained ? r->groups * (r->members + 1) : r->groups;
}

/* Subject of statement m of a group: name i of the window is word data_permute(i), so that all names differ. */
static int32_t datai_subject(const data_retrieval *r, uint64_t names, size_t group, size_t m) {
    size_t i = r->chained ? group * (r->members + 1) + m : group;
    return (int32_t)data_permute(i, (uint64_t)r->words, names, 0);
}

/* objects (G, M, L) */
static void datai_draw_objects(const data_retrieval *r, data_random *random, uint64_t names, int32_t *objects) {
    for (size_t i = 0; i < datai_statements(r); i++)
        for (size_t l = 0; l < r->value_size; l++)
            objects[i * r->value_size + l] = r->chained ? datai_subject(r, names, i / r->members, i % r->members + 1)
                                                        : (int32_t)data_random_below(random, (uint32_t)r->words);
}

/* Each of the places that are left, of words and of statements, is as likely as any other to be a statement's. The m-th
 * statement of a group is the m-th that is put. */
static bool datai_put_haystack(const data_retrieval *r, data_backcopy *haystack, data_random *random, uint64_t names,
                               const int32_t *order, const int32_t *objects, size_t *said, datai_window *w) {
    size_t statements = datai_statements(r), words = w->T + 1 - datai_retrieval_overhead(r), put = 0;
    int32_t word = (int32_t)data_random_below(random, (uint32_t)r->words);
    while (words + statements > put) {
        if (data_random_below(random, (uint32_t)(words + statements - put)) >= statements - put) {
            datai_put(w, word);
            words--;
            word = data_backcopy_draw(haystack, random, word);
            if (word < 0) return false;
            continue;
        }
        size_t group = (size_t)order[put++], m = said[group]++;
        datai_put(w, r->words + DATA_STATEMENT);
        datai_put(w, datai_subject(r, names, group, m));
        for (size_t l = 0; l < r->value_size; l++) datai_put(w, objects[(group * r->members + m) * r->value_size + l]);
    }
    return true;
}

static bool datai_put_statements(const data_retrieval *r, data_backcopy *haystack, data_random *random,
                                 datai_window *w) {
    size_t statements = datai_statements(r);
    int32_t *order = malloc(statements * (1 + r->value_size) * sizeof *order), *objects = order + statements;
    size_t *said = calloc(r->groups, sizeof *said);
    bool good = order && said;
    if (good) {
        uint64_t names = data_random_next64(random);
        datai_draw_objects(r, random, names, objects);
        for (size_t i = 0; i < statements; i++) order[i] = (int32_t)(i / r->members);
        datai_shuffle(random, order, statements);
        good = datai_put_haystack(r, haystack, random, names, order, objects, said, w);
        for (size_t q = 0; good && q < r->queries; q++) {
            datai_put(w, r->words + DATA_QUESTION);
            datai_put(w, datai_subject(r, names, q, 0));
            for (size_t i = 0; i < r->members * r->value_size; i++)
                datai_put(w, objects[q * r->members * r->value_size + i]);
        }
    }
    free(order);
    free(said);
    return good;
}

/* ---- common words ---- */

static size_t datai_list(const data_retrieval *r, size_t T) {
    return T > r->common + 2 ? T - r->common - 2 : 0;
}

/* How often the common word k = 0..K-1 stands in a list. */
static size_t datai_common_count(const data_retrieval *r, size_t list, size_t k) {
    size_t K = r->common;
    return (size_t)(r->share * (double)list * (double)(K - k) / ((double)K * (double)(K + 1) / 2) + 1e-9);
}

/* Words of a list that are not common, and how often the most frequent of them stands there. */
static size_t datai_rare(const data_retrieval *r, size_t list, size_t *most) {
    size_t rare = list, others = (size_t)r->words - r->common;
    for (size_t k = 0; k < r->common; k++) rare -= datai_common_count(r, list, k);
    *most = (rare + others - 1) / others;
    return rare;
}

static void datai_put_list(const data_retrieval *r, data_random *random, datai_window *w) {
    uint64_t names = data_random_next64(random), W = (uint64_t)r->words;
    size_t list = datai_list(r, w->T), most, rare = datai_rare(r, list, &most);
    for (size_t k = 0; k < r->common; k++)
        for (size_t i = datai_common_count(r, list, k); i > 0; i--) datai_put(w, (int32_t)data_permute(k, W, names, 0));
    for (size_t i = 0; i < rare; i++) datai_put(w, (int32_t)data_permute(r->common + i % (W - r->common), W, names, 0));
    datai_shuffle(random, w->inputs + 1, list);
    datai_put(w, r->words + DATA_QUESTION);
    datai_put(w, r->words + DATA_MOST_COMMON);
    for (size_t k = 0; k < r->common; k++) datai_put(w, (int32_t)data_permute(k, W, names, 0));
}

/* ---- windows ---- */

bool data_retrieval_fits(const data_retrieval *r, size_t T, char *need, size_t need_size) {
    size_t names = r->groups > 0 ? datai_names(r) : r->common + 1;
    if (names > (size_t)r->words)
        return snprintf(need, need_size, "%zu different words, and there are %" PRId32, names, r->words), false;
    if (r->groups > 0) {
        size_t least = datai_retrieval_overhead(r) - 1;
        if (least <= T) return true;
        return snprintf(need, need_size, "windows of at least %zu tokens, not %zu", least, T), false;
    }
    size_t list = datai_list(r, T), last = datai_common_count(r, list, r->common - 1), most;
    datai_rare(r, list, &most);
    bool steps = r->common == 1 || datai_common_count(r, list, r->common - 2) > last;
    if (list > 0 && last > most && steps) return true;
    snprintf(need, need_size,
             "longer windows than %zu, more words than %" PRId32
             " or a larger share: common word %zu would stand there "
             "%zu times, no oftener than others",
             T, r->words, r->common, last);
    return false;
}

bool data_retrieval_window(const data_retrieval *r, data_backcopy *haystack, data_random *random, size_t T,
                           int32_t *inputs, int32_t *targets) {
    datai_window w = {.inputs = inputs, .T = T};
    datai_put(&w, r->words + DATA_BOS);
    if (r->groups == 0)
        datai_put_list(r, random, &w);
    else if (!datai_put_statements(r, haystack, random, &w))
        return false;
    for (size_t t = 0; t + 1 < T; t++) targets[t] = inputs[t + 1];
    targets[T - 1] = w.last;
    return true;
}

size_t data_retrieval_questions(int32_t words, size_t T, const int32_t *inputs, int32_t *question) {
    int32_t asked = 0, mark = words + DATA_QUESTION;
    for (size_t t = 0; t < T; t++) {
        asked += inputs[t] == mark;
        bool answers = asked > 0 && inputs[t] != mark && !(t + 1 < T && inputs[t + 1] == mark);
        question[t] = answers ? asked : 0;
    }
    return (size_t)asked;
}

#endif
