/* data/vocabulary.h - a vocabulary of one's own: byte pair encoding learned from text, written as a tokenizer.json.
 *
 *     const char *texts[] = {"book.txt", "news.jsonl"};
 *     data_vocabulary_options options = {.vocab_size = 32000, .min_frequency = 2};
 *     if (data_vocabulary_train(texts, 2, &options, "tokenizer.json", &e)) return fail(e.text);
 *
 * The tokens are <|endoftext|>, the 256 bytes, and then, until vocab_size is reached or no pair is left that occurs
 * min_frequency times, the two neighbours that stand together most often, joined. Text is normalised (NFC) and cut into
 * words by Qwen's pattern; pairs do not reach over the end of a word, so the words and how often they occur are all
 * that is looked at.
 *
 * The order is that of the `tokenizers` library's BpeTrainer: of pairs that occur equally often, the one with the lower
 * first id, then the lower second id. So the file has the same tokens under the same ids, if that trainer gets the same
 * text in one piece, the same splitting and the 256 bytes as its initial alphabet. But for two cases: words of more
 * than DATA_VOCABULARY_WORD bytes are counted in pieces of that length, and an <|endoftext|> in the text is not
 * counted, since it will not be encoded by its letters.
 *
 * The file that defines DATA_IMPLEMENTATION holds the code.
 */
#ifndef DATA_VOCABULARY_H
#define DATA_VOCABULARY_H

#include "text.h"

enum { DATA_VOCABULARY_WORD = 1024 };

typedef struct {
    size_t vocab_size;
    uint64_t min_frequency; /* of a pair; 0 is as 1 */
    data_progress *progress;
} data_vocabulary_options;

/* Learns from .txt and .jsonl files and writes `output`, whole or not at all. */
ga_result data_vocabulary_train(const char *const *texts, size_t n_texts, const data_vocabulary_options *options,
                                const char *output, ga_error *e);

#endif

#if defined(DATA_IMPLEMENTATION) && !defined(DATA_VOCABULARY_IMPLEMENTED)
#define DATA_VOCABULARY_IMPLEMENTED

/* Words are runs of symbols, which are ids. */
typedef struct {
    size_t first; /* in `symbols` */
    uint32_t length;
    int64_t count;
} datai_word_symbols;

typedef struct {
    uint32_t *items;
    uint32_t n, room;
} datai_positions;

/* A pair that may be joined next, and the words it may be in. */
typedef struct {
    int64_t count;
    uint64_t pair;
    datai_positions words;
} datai_candidate;

typedef struct {
    data_map counts; /* word -> how often it occurs */

    int32_t *symbols;          /* stb_ds array */
    datai_word_symbols *words; /* stb_ds array */
    data_map tokens;           /* a token as it stands in the file -> id; the entries are in the order of ids */
    uint64_t *merges;          /* stb_ds array: pairs in the order in which they were joined */

    data_pairs pairs;        /* -> index in the arrays that follow */
    int64_t *pair_counts;    /* stb_ds array */
    datai_positions *places; /* stb_ds array: words in which the pair has arisen since it last became a candidate */
    uint64_t *touched;       /* stb_ds array: pairs with places */
    datai_candidate *queue;  /* stb_ds array: a heap, the most frequent pair first */
    ga_error *e;
} datai_trainer;

/* ---- counting words ---- */

static ga_result datai_count_word(void *context, const char *bytes, size_t n, ga_error *e) {
    datai_trainer *t = (datai_trainer *)context;
    for (size_t done = 0, piece; done < n; done += piece) {
        piece = n - done < DATA_VOCABULARY_WORD ? n - done : DATA_VOCABULARY_WORD;
        uint64_t *count = data_map_at(&t->counts, bytes + done, piece);
        if (!count) return gai_fail(e, GA_ERR_MEMORY, "out of memory");
        ++*count;
    }
    return GA_OK;
}

typedef struct {
    datai_trainer *trainer;
    data_tokenizer *splitter;
} datai_counting;

static ga_result datai_count_part(void *context, const char *text, size_t n, bool more, bool end, ga_error *e) {
    datai_counting *c = (datai_counting *)context;
    (void)end;
    return data_tokenizer_words(c->splitter, text, n, more, datai_count_word, c->trainer, e);
}

/* ---- candidates ---- */

/* Whether a is to be joined before b. */
static bool datai_comes_first(const datai_candidate *a, const datai_candidate *b) {
    return a->count != b->count ? a->count > b->count : a->pair < b->pair;
}

static void datai_queue_push(datai_candidate **queue, datai_candidate c) {
    arrput(*queue, c);
    datai_candidate *q = *queue;
    size_t i = arrlenu(q) - 1;
    for (; i > 0 && datai_comes_first(&c, &q[(i - 1) / 2]); i = (i - 1) / 2) q[i] = q[(i - 1) / 2];
    q[i] = c;
}

/* Lets the candidate at the top, which has become smaller, sink to its place. */
static void datai_queue_sink(datai_candidate *q) {
    datai_candidate c = q[0];
    size_t n = arrlenu(q), i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= n) break;
        if (child + 1 < n && datai_comes_first(&q[child + 1], &q[child])) child++;
        if (!datai_comes_first(&q[child], &c)) break;
        q[i] = q[child];
        i = child;
    }
    q[i] = c;
}

static datai_candidate datai_queue_pop(datai_candidate *q) {
    datai_candidate top = q[0], last = arrpop(q);
    if (arrlenu(q) == 0) return top;
    q[0] = last;
    datai_queue_sink(q);
    return top;
}

/* Notes that a pair occurs `change` times more (or fewer) in a word. */
static bool datai_change_pair(datai_trainer *t, int32_t left, int32_t right, int64_t change, uint32_t word) {
    uint64_t pair = data_pair(left, right);
    uint32_t index = data_pairs_get(&t->pairs, pair, UINT32_MAX);
    if (index == UINT32_MAX) {
        index = (uint32_t)arrlenu(t->pair_counts);
        if (!data_pairs_put(&t->pairs, pair, index)) return false;
        arrput(t->pair_counts, 0);
        arrput(t->places, ((datai_positions){0}));
    }
    t->pair_counts[index] += change;
    if (change < 0) return true;
    datai_positions *p = &t->places[index];
    if (p->n == 0) arrput(t->touched, pair);
    if (p->n > 0 && p->items[p->n - 1] == word) return true;
    if (p->n == p->room) {
        uint32_t room = p->room ? 2 * p->room : 4;
        uint32_t *items = (uint32_t *)realloc(p->items, room * sizeof *items);
        if (!items) return false;
        p->items = items;
        p->room = room;
    }
    p->items[p->n++] = word;
    return true;
}

/* Pairs that have arisen become candidates. */
static void datai_queue_touched(datai_trainer *t) {
    for (size_t i = 0; i < arrlenu(t->touched); i++) {
        uint32_t index = data_pairs_get(&t->pairs, t->touched[i], 0);
        datai_candidate c = {t->pair_counts[index], t->touched[i], t->places[index]};
        t->places[index] = (datai_positions){0};
        if (c.count > 0)
            datai_queue_push(&t->queue, c);
        else
            free(c.words.items);
    }
    arrsetlen(t->touched, 0);
}

/* ---- joining ---- */

static bool datai_join_in_word(datai_trainer *t, uint32_t word, int32_t left, int32_t right, int32_t joined) {
    datai_word_symbols *w = &t->words[word];
    int32_t *s = t->symbols + w->first;
    uint32_t n = w->length, kept = 0;
    bool good = true;
    for (uint32_t i = 0; i < n && good; i++) {
        if (s[i] != left || i + 1 == n || s[i + 1] != right) {
            s[kept++] = s[i];
            continue;
        }
        if (kept > 0)
            good = datai_change_pair(t, s[kept - 1], left, -w->count, word) &&
                   datai_change_pair(t, s[kept - 1], joined, w->count, word);
        s[kept++] = joined;
        i++;
        if (good && i + 1 < n)
            good = datai_change_pair(t, right, s[i + 1], -w->count, word) &&
                   datai_change_pair(t, joined, s[i + 1], w->count, word);
    }
    w->length = kept;
    return good;
}

/* The id of the joined token. Two pairs can give the same one: "ab" + "c" and "a" + "bc". */
static bool datai_joined_token(datai_trainer *t, uint64_t pair, char **key, int32_t *id) {
    const data_map_entry *left = &t->tokens.entries[pair >> 32], *right = &t->tokens.entries[(uint32_t)pair];
    size_t next = t->tokens.count;
    arrsetlen(*key, 0);
    datai_append_bytes(key, t->tokens.keys + left->offset, left->length);
    datai_append_bytes(key, t->tokens.keys + right->offset, right->length);
    uint64_t *value = data_map_at(&t->tokens, *key, arrlenu(*key));
    if (!value) return false;
    if (t->tokens.count > next) *value = next;
    *id = (int32_t)*value;
    return true;
}

/* Counts are corrected when a candidate reaches the top: what has become rarer sinks. As in the library, the count of a
 * pair that was joined stays, and counts again if its parts come together once more by another way. */
static bool datai_join_pairs(datai_trainer *t, const data_vocabulary_options *options) {
    uint64_t lowest = options->min_frequency > 1 ? options->min_frequency : 1;
    char *key = NULL;
    bool good = true;
    size_t begun = t->tokens.count;
    while (good && t->tokens.count < options->vocab_size && arrlenu(t->queue) > 0) {
        int64_t count = t->pair_counts[data_pairs_get(&t->pairs, t->queue[0].pair, 0)];
        if (t->queue[0].count != count) {
            t->queue[0].count = count;
            datai_queue_sink(t->queue);
            continue;
        }
        if (count < 1 || (uint64_t)count < lowest) break;
        datai_candidate top = datai_queue_pop(t->queue);
        int32_t joined = 0;
        good = datai_joined_token(t, top.pair, &key, &joined);
        arrput(t->merges, top.pair);
        for (uint32_t i = 0; i < top.words.n && good; i++)
            good = datai_join_in_word(t, top.words.items[i], (int32_t)(top.pair >> 32), (int32_t)(uint32_t)top.pair,
                                      joined);
        free(top.words.items);
        datai_queue_touched(t);
        if (options->progress && (t->tokens.count & 63) == 0)
            options->progress("vocabulary",
                              (double)(t->tokens.count - begun) / (double)(options->vocab_size - begun + 1));
    }
    arrfree(key);
    return good;
}

static bool datai_start_words(datai_trainer *t, const int32_t of_byte[256]) {
    for (size_t i = 0; i < t->counts.count; i++) {
        const data_map_entry *entry = &t->counts.entries[i];
        datai_word_symbols w = {arrlenu(t->symbols), (uint32_t)entry->length, (int64_t)entry->value};
        for (size_t k = 0; k < entry->length; k++)
            arrput(t->symbols, of_byte[(unsigned char)t->counts.keys[entry->offset + k]]);
        arrput(t->words, w);
    }
    for (size_t i = 0; i < arrlenu(t->words); i++) {
        const datai_word_symbols *w = &t->words[i];
        for (uint32_t k = 0; k + 1 < w->length; k++)
            if (!datai_change_pair(t, t->symbols[w->first + k], t->symbols[w->first + k + 1], w->count, (uint32_t)i))
                return false;
    }
    datai_queue_touched(t);
    return true;
}

/* ---- writing ---- */

static void datai_json_raw(char **out, const char *text) {
    datai_append_bytes(out, text, strlen(text));
}

/* What stands between the quotes. */
static void datai_json_inside(char **out, const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (text[i] == '"' || text[i] == '\\') arrput(*out, '\\');
        arrput(*out, text[i]);
    }
}

static void datai_json_quote(char **out, const char *text) {
    datai_json_raw(out, "\"");
    datai_json_inside(out, text, strlen(text));
    datai_json_raw(out, "\"");
}

static void datai_json_token(char **out, const data_map *tokens, size_t id) {
    datai_json_inside(out, tokens->keys + tokens->entries[id].offset, tokens->entries[id].length);
}

static const char datai_separator[] = "<|endoftext|>";
static const char datai_pattern[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
    "\\s+(?!\\S)|\\s+";

/* tokenizer.json, as an stb_ds array. A pair that was joined twice has the rank of the last time. */
static bool datai_write_json(char **out, const data_map *tokens, const uint64_t *merges) {
    data_pairs last = {0};
    for (size_t i = 0; i < arrlenu(merges); i++)
        if (!data_pairs_put(&last, merges[i], (uint32_t)i)) return data_pairs_free(&last), false;
    datai_json_raw(out,
                   "{\"version\": \"1.0\", \"truncation\": null, \"padding\": null,\n\"added_tokens\": [{\"id\": 0, "
                   "\"content\": ");
    datai_json_quote(out, datai_separator);
    datai_json_raw(out, ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, "
                        "\"special\": true}],\n\"normalizer\": {\"type\": \"NFC\"},\n\"pre_tokenizer\": {\"type\": "
                        "\"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", \"pattern\": {\"Regex\": ");
    datai_json_quote(out, datai_pattern);
    datai_json_raw(out,
                   "}, \"behavior\": \"Isolated\", \"invert\": false}, {\"type\": \"ByteLevel\", "
                   "\"add_prefix_space\": false, \"trim_offsets\": false, \"use_regex\": false}]},\n"
                   "\"post_processor\": null,\n\"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
                   "\"trim_offsets\": false, \"use_regex\": false},\n\"model\": {\"type\": \"BPE\", \"dropout\": "
                   "null, \"unk_token\": null, \"continuing_subword_prefix\": null, \"end_of_word_suffix\": null, "
                   "\"fuse_unk\": false, \"byte_fallback\": false, \"ignore_merges\": false,\n\"vocab\": {");
    for (size_t id = 0; id < tokens->count; id++) {
        char number[32];
        snprintf(number, sizeof number, "\": %zu", id);
        datai_json_raw(out, id ? ",\n\"" : "\n\"");
        datai_json_token(out, tokens, id);
        datai_json_raw(out, number);
    }
    datai_json_raw(out, "},\n\"merges\": [");
    const char *between = "\n\"";
    for (size_t i = 0; i < arrlenu(merges); i++) {
        if (data_pairs_get(&last, merges[i], 0) != i) continue;
        datai_json_raw(out, between);
        datai_json_token(out, tokens, merges[i] >> 32);
        datai_json_raw(out, " ");
        datai_json_token(out, tokens, (uint32_t)merges[i]);
        datai_json_raw(out, "\"");
        between = ",\n\"";
    }
    datai_json_raw(out, "]}}\n");
    data_pairs_free(&last);
    return true;
}

/* The tokens that every vocabulary begins with: the separator, then the bytes in the order of their characters, which
 * is first those that are visible as they are. */
static bool datai_first_tokens(data_map *tokens, int32_t of_byte[256]) {
    uint32_t characters[256];
    datai_byte_characters(characters);
    bool good = data_map_put(tokens, datai_separator, strlen(datai_separator), 0);
    for (unsigned i = 0; i < 2 * 256 && good; i++) {
        unsigned b = i % 256;
        if (datai_is_visible(b) != (i < 256)) continue;
        char character[4];
        of_byte[b] = (int32_t)tokens->count;
        good = data_map_put(tokens, character, (size_t)(gai_utf8(character, characters[b]) - character), tokens->count);
    }
    return good;
}

static void datai_free_trainer(datai_trainer *t) {
    for (size_t i = 0; i < arrlenu(t->places); i++) free(t->places[i].items);
    for (size_t i = 0; i < arrlenu(t->queue); i++) free(t->queue[i].words.items);
    data_map_free(&t->counts);
    data_map_free(&t->tokens);
    data_pairs_free(&t->pairs);
    arrfree(t->symbols);
    arrfree(t->words);
    arrfree(t->merges);
    arrfree(t->pair_counts);
    arrfree(t->places);
    arrfree(t->touched);
    arrfree(t->queue);
}

/* A tokenizer without merges, which cuts text into words. */
static ga_result datai_open_splitter(data_tokenizer **splitter, const data_map *tokens, ga_error *e) {
    char *json = NULL;
    bool written = datai_write_json(&json, tokens, NULL);
    size_t n = arrlenu(json);
    arrput(json, '\0');
    *splitter = written ? datai_tokenizer_of_text("the vocabulary to be trained", json, n, e) : NULL;
    arrfree(json);
    if (!written) return gai_fail(e, GA_ERR_MEMORY, "out of memory");
    return *splitter ? GA_OK : e->result;
}

static ga_result datai_learn(datai_trainer *t, const char *const *texts, size_t n_texts,
                             const data_vocabulary_options *options, ga_error *e) {
    int32_t of_byte[256];
    if (!datai_first_tokens(&t->tokens, of_byte)) return gai_fail(e, GA_ERR_MEMORY, "out of memory");
    if (options->vocab_size < t->tokens.count)
        return gai_fail(e, GA_ERR_CONFIG, "a vocabulary of %zu tokens has no room for the 256 bytes and %s",
                        options->vocab_size, datai_separator);
    datai_counting counting = {.trainer = t};
    ga_result result = datai_open_splitter(&counting.splitter, &t->tokens, e);
    for (size_t i = 0; i < n_texts && !result; i++)
        result =
            data_text_visit(texts[i], counting.splitter, options->progress, "words", datai_count_part, &counting, e);
    data_tokenizer_close(counting.splitter);
    if (result) return result;
    if (t->counts.count == 0) return gai_fail(e, GA_ERR_FORMAT, "%s: holds no text", n_texts ? texts[0] : "nothing");
    if (!datai_start_words(t, of_byte) || !datai_join_pairs(t, options))
        return gai_fail(e, GA_ERR_MEMORY, "out of memory");
    if (options->progress) options->progress("vocabulary", 1);
    return GA_OK;
}

ga_result data_vocabulary_train(const char *const *texts, size_t n_texts, const data_vocabulary_options *options,
                                const char *output, ga_error *e) {
    ga_error ignored;
    datai_trainer t = {0};
    char *json = NULL;
    if (!e) e = &ignored;
    ga_result result = datai_learn(&t, texts, n_texts, options, e);
    if (!result && !datai_write_json(&json, &t.tokens, t.merges)) result = gai_fail(e, GA_ERR_MEMORY, "out of memory");
    if (!result) result = datai_write_file(output, json, arrlenu(json), e);
    arrfree(json);
    datai_free_trainer(&t);
    return result;
}

#endif
