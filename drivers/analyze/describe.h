/* drivers/analyze/describe.h - `./analyze --describe DIR`: what a checkpoint holds, where its gate is, and what it
 * costs to use.
 *
 * Everything that loading checks is checked, but no weight is read: it takes a moment, however large the model.
 * Needs analysis.h before it.
 */
#ifndef DRIVERS_DESCRIBE_H
#define DRIVERS_DESCRIBE_H

static const char *scale_bytes(double bytes, char text[32]) {
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB"};
    size_t i = 0;
    for (; bytes >= 1000 && i < 4; i++) bytes /= 1000;
    snprintf(text, 32, i ? "%.2f %s" : "%.0f %s", bytes, units[i]);
    return text;
}

#define GROUPED(n) grouped((n), (char[32]){0})
#define BYTES(n)   scale_bytes((double)(n), (char[32]){0})

static void print_architecture(const ga_config *c, const ga_inventory *v) {
    printf("  source        %s%s%s\n", *v->family ? v->family : "a config.json without model_type",
           *v->version ? ", written by transformers " : "", v->version);
    printf("  architecture  %zu layers, d_model %zu, %zu query and %zu key-value heads of %zu\n", c->n_layers,
           c->d_model, c->n_heads, c->n_kv_heads, c->head_dim);
    printf("                vocabulary %zu%s, %zu positions, RoPE base %g", c->vocab_size,
           c->tied_embeddings ? " (embeddings tied)" : "", c->max_seq_len, c->rope_base);
    if (c->rope_factor > 1) printf(", YaRN %g times %zu", c->rope_factor, c->rope_original_length);
    if (c->partial_rotary_factor < 1) printf(" on %g of the dimensions", c->partial_rotary_factor);
    printf("%s%s\n", c->qk_norm ? ", QK-norm" : "", c->sandwich_norm ? ", sandwich norm" : "");
    if (c->n_experts > 0)
        printf("                %zu experts in each FFN, each %zu wide; %zu for each token\n", c->n_experts, c->d_ff,
               c->experts_per_token);
    else
        printf("                FFN %zu wide\n", c->d_ff);
}

static void print_gate(const ga_config *c, const ga_inventory *v, const ga_summary *s) {
    char gate[128];
    describe_gate(c, gate);
    printf("  gate          %s\n", gate);
    if (v->packing) printf("                W_theta: %s\n", v->packing);
    if (s->gate_parameters > 0)
        printf("                %s parameters, %.2f %% of all\n", GROUPED(s->gate_parameters),
               100 * (double)s->gate_parameters / (double)s->parameters);
}

static void print_files(const ga_inventory *v, const char *directory) {
    printf("  files         %zu, %s: %zu tensors", v->files, BYTES(v->bytes), v->tensors);
    const char *separator = ", ";
    for (size_t k = 0; k < GA_STORED_TYPES; k++)
        if (v->values[k] > 0) {
            printf("%s%s values in %s", separator, GROUPED(v->values[k]), v->types[k]);
            separator = " and ";
        }
    printf("\n  training      %s\n",
           ga_checkpoint_exists(directory, true) ? "can go on: optimiser and state are there" : "weights only");
}

/* What each way of using it takes, for one window of at most 4096 positions. */
static bool print_memory(analysis *a, const char *directory, ga_config c) {
    static const struct {
        ga_mode mode;
        const char *name;
    } uses[] = {{GA_MAPPED, "mapped"}, {GA_INFERENCE, "loaded"}, {GA_TRAINING, "training"}};
    ga_error e;
    c.batch_size = 1;
    if (c.max_seq_len > 4096) c.max_seq_len = 4096;
    printf("  memory        of a window of %zu positions, in float32\n", c.max_seq_len);
    for (size_t i = 0; i < 3; i++) {
        ga_summary s;
        if (ga_summarize(&c, uses[i].mode, &s, &e)) return fail(a, 1, "%s: %s", directory, e.text);
        printf("                %-8s  %s: weights %s, activations %s%s%s\n", uses[i].name, BYTES(s.total_bytes),
               BYTES(s.weight_bytes), BYTES(s.activation_bytes), s.optimizer_bytes ? ", gradients and moments " : "",
               s.optimizer_bytes ? BYTES(s.gradient_bytes + s.optimizer_bytes) : "");
    }
    return true;
}

static bool describe(analysis *a, const char *argument) {
    report_model m = {.name = argument};
    ga_inventory inventory;
    ga_summary s;
    ga_error e;
    m.config = ga_config_default();
    if (!find_checkpoint(a, &m, argument)) return false;
    if (ga_inspect(m.directory, &m.config, &inventory, &e) || ga_summarize(&m.config, GA_INFERENCE, &s, &e))
        return fail(a, 1, "%s", e.text);
    printf("%s\n", m.directory);
    print_architecture(&m.config, &inventory);
    print_gate(&m.config, &inventory, &s);
    printf("  parameters    %s, embeddings %s", GROUPED(s.parameters), GROUPED(s.embedding_parameters));
    if (s.activated_parameters < s.parameters) printf(", %s met by each token", GROUPED(s.activated_parameters));
    printf("; %.4g MFLOP a token\n", s.forward_flops / 1e6);
    print_files(&inventory, m.directory);
    return print_memory(a, m.directory, m.config);
}

static bool describe_all(analysis *a) {
    for (size_t i = 0; i < arrlenu(a->options.describe); i++)
        if (!describe(a, a->options.describe[i])) return false;
    return true;
}

#endif
