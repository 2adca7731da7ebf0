/* drivers/train/printout.h - what train prints before its first step and after its last one.
 *
 * Needs run.h before it.
 */
#ifndef DRIVERS_PRINTOUT_H
#define DRIVERS_PRINTOUT_H

#include <sys/resource.h>

/* ---- before the first step ---------------------------------------------------------------------------------------- */

static void print_gate(const ga_config *c) {
    static const char *const positions[] = {"none",     "G1 (SDPA output)", "G2 (value)",
                                            "G3 (key)", "G4 (query)",       "G5 (after W_O)"};
    printf("gate        %s", positions[c->gate_position]);
    char activation[32], type[32], sharing[32], form[32];
    ga_config_get(c, "gate_activation", activation, sizeof activation);
    ga_config_get(c, "gate_type", type, sizeof type);
    ga_config_get(c, "gate_sharing", sharing, sizeof sharing);
    ga_config_get(c, "gate_form", form, sizeof form);
    if (c->gate_position != GA_NO_GATE && c->gate_form == GA_SELF)
        printf(", %s of Y itself, without parameters", activation);
    else if (c->gate_position != GA_NO_GATE)
        printf(", %s, head-%s, %s, %s, %s%s", type, sharing, form, activation,
               c->gate_input == GA_INPUT_QUERY  ? "from X"
               : c->gate_input == GA_INPUT_NONE ? "independent of X"
                                                : "one learned number a layer",
               c->gate_frozen ? ", frozen at its random start" : "");
    printf("\n");
}

static void print_model(const run *r) {
    const ga_config *c = &r->config;
    const ga_summary *s = &r->cost;
    printf("model       %zu layers, d_model %zu, %zu query and %zu key-value heads of %zu, d_ff %zu, vocabulary %s\n",
           c->n_layers, c->d_model, c->n_heads, c->n_kv_heads, c->head_dim, c->d_ff, GROUPED(c->vocab_size));
    if (c->n_experts > 0)
        printf("experts     %zu of that d_ff in each layer, %zu for each token, weights %s\n", c->n_experts,
               c->experts_per_token, c->normalize_top_k ? "that add up to 1" : "as the router gives them");
    print_gate(c);
    printf("parameters  %s (embedding %s, gate %s)", GROUPED(s->parameters), GROUPED(s->embedding_parameters),
           GROUPED(s->gate_parameters));
    if (c->n_experts > 0) printf("; %s activated by a token", GROUPED(s->activated_parameters));
    printf("\n");
    const ga_device *d = &r->device.device;
    size_t own = d->own_bytes ? d->own_bytes(d->state, c, GA_TRAINING) : 0;
    printf("memory      %s: weights %s, gradients %s, optimizer %s, activations %s", BYTES(s->total_bytes + own),
           BYTES(s->weight_bytes), BYTES(s->gradient_bytes), BYTES(s->optimizer_bytes), BYTES(s->activation_bytes));
    if (r->ranks.count > 1) printf(", on each of %zu ranks", r->ranks.count);
    if (d->own_bytes) printf(", device %s", BYTES(own));
    if (d->free_bytes) printf("; %s are free", BYTES(d->free_bytes(d->state)));
#ifdef _SC_PHYS_PAGES
    double here = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    if (!d->free_bytes && (double)(s->total_bytes + own) > here)
        printf("; more than the %s of this machine", BYTES((size_t)here));
#endif
    printf("\n");
    printf("compute     %s a token forward, %s in training\n", SCALED(s->forward_flops, "FLOP"),
           SCALED(s->training_flops, "FLOP"));
    printf("steps       %s of %zu x %zu windows of %zu tokens: %s tokens\n", GROUPED(r->steps),
           c->gradient_accumulation_steps, c->batch_size, c->max_seq_len, GROUPED(r->steps * step_tokens(c)));
}

static void print_ranks(const run *r) {
    const ranks *all = &r->ranks;
    if (all->count == 1) return;
    char exchange[16];
    ga_config_get(&r->config, "exchange", exchange, sizeof exchange);
    bool rounded = strcmp(exchange, "bfloat16") == 0;
    printf("ranks       %zu (%s), %zu on this machine: %zu micro-batches of a step each, moments shared out, "
           "gradients sent as %s%s\n",
           all->count, r->device.cuda ? "NCCL" : all->calls.library(all->mpi), all->local_count,
           r->config.gradient_accumulation_steps / all->count, exchange,
           rounded ? " (lossy: rounded to 8 bits; sums and weights in float32)" : "");
}

static void print_device(const run *r) {
    printf("device      %s (%s)", r->device.device.name, r->device.why);
    if (r->device.cuda) {
        printf("\n");
        return;
    }
    printf(", %zu thread%s", thread_count(r), thread_count(r) == 1 ? "" : "s");
#ifdef _OPENMP
    printf(" (%s)\n", r->config.threads     ? "as the key threads says"
                      : r->ranks.count == 1 ? "OpenMP's choice"
                      : r->ranks.bound      ? "for each rank, as the launcher binds it; mpirun --bind-to none frees it"
                                            : "for each rank: they share the cores");
#else
    printf(" (built without OpenMP)\n");
#endif
}

static void print_data(const run *r) {
    const ga_config *c = &r->config;
    uint64_t windows = data_windows(r->stream, DATA_TRAIN);
    printf("data        %s: ", c->data);
    if (windows == DATA_ENDLESS)
        printf("new windows without end");
    else
        printf("%s windows", GROUPED(windows));
    if (r->epoch_windows > 0) printf(", the first %s in each epoch", GROUPED(r->epoch_windows));
    if (r->val_windows > 0)
        printf("; %s held-out windows evaluated", GROUPED(r->val_windows));
    else
        printf("; nothing is held out, so there are no evaluations and there is no best checkpoint");
    if (!isnan(r->lowest_loss)) printf(", lowest loss there %.4f", r->lowest_loss);
    printf("\n");
}

/* ---- after the last step ------------------------------------------------------------------------------------------ */

static int by_seconds(const void *a, const void *b) {
    double x = **(double *const *)a, y = **(double *const *)b;
    return (x < y) - (x > y);
}

/* How much of the exchanges was hidden behind the backward pass: their own time, and what of it was waited for. */
static void print_exchange(const ranks *r) {
    ranks_mpi_seconds s = r->calls.times(r->mpi);
    printf("exchange of gradients %.2f s, of which %.2f s were waited for; of weights %.2f s and %.2f s\n", s.gradients,
           s.gradients_waited, s.weights, s.weights_waited);
}

static void print_profile(const run *r) {
    const ga_model *m = r->model;
    const double *order[GA_OP_COUNT];
    double wall = now() - r->started, inside = 0;
    for (size_t i = 0; i < GA_OP_COUNT; i++) {
        order[i] = &m->seconds[i];
        inside += m->seconds[i];
    }
    qsort(order, GA_OP_COUNT, sizeof order[0], by_seconds);
    printf("\n%-20s %8s %10s %12s\n", "operator", "share", "seconds", "calls");
    for (size_t i = 0; i<GA_OP_COUNT && * order[i]> 0; i++) {
        size_t op = (size_t)(order[i] - m->seconds);
        printf("%-20s %6.1f %% %10.2f %12s\n", ga_operator_name(op), 100 * *order[i] / wall, *order[i],
               GROUPED(m->calls[op]));
    }
    printf("%-20s %6.1f %% %10.2f\n", "outside", 100 * (wall - inside) / wall, wall - inside);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    double peak = (double)usage.ru_maxrss;
#else
    double peak = 1024.0 * (double)usage.ru_maxrss;
#endif
    double tokens = (double)(r->state.step - r->first_step) * (double)step_tokens(&r->config);
    printf("tokens per second %.0f, peak memory %s\n", tokens / r->step_seconds, SCALED(peak, "B"));
    if (r->ranks.mpi && !r->device.cuda) print_exchange(&r->ranks);
    printf("\n");
}

/* An argument of a command that can be pasted into a shell. */
static void print_argument(const char *text) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_+=.,:/@%^";
    if (*text && text[strspn(text, plain)] == 0) {
        printf("%s", text);
        return;
    }
    putchar('\'');
    for (; *text; text++) *text == '\'' ? printf("'\\''") : putchar(*text);
    putchar('\'');
}

/* The command that looks at the run, with the analyze beside this program. */
static void print_next(const run *r, const char *program) {
    char analyze[PATH_SIZE];
    const char *slash = strrchr(program, '/');
    snprintf(analyze, sizeof analyze, "%.*sanalyze", slash ? (int)(slash + 1 - program) : 0, program);
    printf("next        ");
    print_argument(analyze);
    printf(" --models ");
    print_argument(r->directory);
    printf("\n");
}

static void print_end(const run *r, const measurement *m, int argc, char **argv) {
    if (r->state.step < r->steps) {
        printf("stopped at step %s of %s, saved in %s; go on with\n           ", GROUPED(r->state.step),
               GROUPED(r->steps), r->last);
        for (int i = 0; i < argc; i++) {
            if (strcmp(argv[i], "--fresh") == 0) continue;
            putchar(' ');
            print_argument(argv[i]);
        }
        printf("\n");
        return;
    }
    bool evaluated = !isnan(m->val_loss);
    printf("done        %s steps, loss %.4f", GROUPED(r->steps), m->loss);
    if (evaluated) printf(", held-out loss %.4f (best %.4f", m->val_loss, r->state.best_val_loss);
    if (evaluated && !isnan(r->lowest_loss)) printf(", lowest possible %.4f", r->lowest_loss);
    printf("%s, ", evaluated ? ")" : "");
    if (r->spikes.count > 0) printf("%s loss spike%s, ", GROUPED(r->spikes.count), r->spikes.count == 1 ? "" : "s");
    printf("%s\n", DURATION(now() - r->started));
    const device_choice *d = &r->device;
    const char *why = d->unrecorded ? d->unrecorded(&d->device) : NULL;
    if (why) printf("note        passes were launched kernel by kernel, not as graphs: %s\n", why);
    printf("kept in     %s%s%s and %s\n", r->last, evaluated ? ", " : "", evaluated ? r->best : "", r->metrics_path);
    print_next(r, argv[0]);
}

#endif
