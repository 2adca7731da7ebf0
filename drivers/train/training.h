/* drivers/train/training.h - the loop of train: accumulated gradients, the update, evaluation, what follows a step,
 * divergence.
 *
 *     measurement m = nothing_measured;
 *     if (!train(r, &m)) return false;
 *
 * Needs metrics.h, progress.h, plan.h, run_directory.h and sample.h before it.
 */
#ifndef DRIVERS_TRAINING_H
#define DRIVERS_TRAINING_H

/* Records that loss, gradient or weights are no longer numbers; `last` stays as it was. */
static bool diverge(run *r, uint64_t step, measurement *m, const char *what) {
    m->diverged = true;
    if (!write_metrics(r, step, m)) return false;
    char kept[PATH_SIZE + 64] = "no checkpoint was written before";
    if (r->saved) snprintf(kept, sizeof kept, "%s keeps step %" PRIu64, r->last, r->saved_step);
    return fail(r, 1,
                "step %" PRIu64
                ": %s (loss %g, gradient norm %g): the run diverged; %s; try a lower learning_rate, more warmup_steps, "
                "a smaller grad_clip, the gate (gate_position = G1), or attn_clip and ffn_clip (A.6)",
                step, what, m->loss, m->grad_norm, kept);
}

static void look_at_attention(run *r) {
    r->progress.f_attn = ga_f_attn(r->live, GA_ALL);
    r->progress.sink_share = ga_sink_share(r->live, GA_ALL);
    r->progress.m_act = ga_m_act(r->live, GA_ALL);
    r->progress.gate_mean = ga_gate_mean(r->live, GA_ALL);
}

/* Gradients of a whole step, as the mean over its micro-batches. The next windows are read while a device computes:
 * their loss is asked for at the end only, but for the very first that is seen. A stop is heeded between two
 * micro-batches: the step is then left out (false, without a failure), and the run goes on from before it. Ranks take
 * micro-batches in turn, and stop together, between two steps. */
static bool accumulate(run *r, measurement *m) {
    const ga_config *c = &r->config;
    const ga_observer observer = {.statistics = r->live};
    uint64_t step = r->state.step + 1;
    bool look = step == r->first_step + 1 || step % c->log_every == 0;
    if (look) ga_statistics_reset(r->live);
    double share = 1.0 / (double)c->gradient_accumulation_steps;
    for (size_t k = r->ranks.rank; k < c->gradient_accumulation_steps; k += r->ranks.count) {
        if (stop_requested && r->ranks.count == 1) return false;
        r->model->last_of_step = k + r->ranks.count >= c->gradient_accumulation_steps;
        if (!read_windows(r, DATA_TRAIN, r->state.windows + k * c->batch_size, c->batch_size)) return false;
        double *latest = &r->progress.latest.loss;
        if (ga_forward_backward(r->model, r->inputs, r->targets, c->batch_size, c->max_seq_len, share,
                                look && k == 0 ? &observer : NULL, isnan(*latest) ? latest : NULL, &r->error))
            return fail_library(r);
        if (look && k == 0) look_at_attention(r);
        draw_bar(r, (double)r->state.step + (double)(k + 1) * share);
    }
    if (ga_batch_loss(r->model, &m->loss, &r->error)) return fail_library(r);
    return isfinite(m->loss) || diverge(r, step, m, "the loss is not finite");
}

/* Tells of a spike in the loss; ends a run that has unlearned all that it knew, finite as its numbers may be. */
static bool judge_loss(run *r, measurement *m) {
    const spikes *s = &r->spikes;
    spike_kind kind = spikes_add(&r->spikes, m->loss);
    if (kind == SPIKE_NONE) return true;
    if (kind == SPIKE_DIVERGED) {
        char what[160];
        snprintf(what, sizeof what, "the mean loss of %d steps is %.3f, %.3f at its lowest, %.3f at first",
                 SPIKE_WINDOW, s->mean, s->lowest, s->first);
        return diverge(r, r->state.step, m, what);
    }
    erase_bar(&r->progress);
    printf("spike %-5" PRIu64 " step %" PRIu64 ": loss %.4f after a mean of %.4f, standard deviation %.4f\n", s->count,
           r->state.step, m->loss, s->mean, s->deviation);
    return true;
}

static bool take_step(run *r, measurement *m) {
    const ga_config *c = &r->config;
    double begin = now();
    if (!accumulate(r, m)) return false;
    routing_look(&r->progress.routing, r->model);
    m->learning_rate = ga_learning_rate(c, r->state.step, r->steps);
    ga_result result = ga_update(r->model, m->learning_rate, &m->grad_norm, &r->error);
    if (result == GA_ERR_DIVERGED) return diverge(r, r->state.step + 1, m, "the gradient is not finite");
    if (result) return fail_library(r);
    result = ga_check_weights(r->model, &r->error); /* a finite loss may still have left some that are none */
    if (result == GA_ERR_DIVERGED) return diverge(r, r->state.step + 1, m, "the weights are not finite");
    if (result) return fail_library(r);
    r->state.step++;
    r->state.windows += c->batch_size * c->gradient_accumulation_steps;
    r->state.tokens += step_tokens(c);
    double seconds = now() - begin;
    r->step_seconds += seconds;
    m->tokens_per_s = (double)step_tokens(c) / seconds;
    return judge_loss(r, m);
}

static bool evaluate(run *r, double *loss) {
    const ga_config *c = &r->config;
    ga_observer observer = {.statistics = r->held_out};
    ga_statistics_reset(r->held_out);
    *loss = 0;
    uint64_t turn = c->batch_size * r->ranks.count; /* windows that all ranks see at one time */
    for (uint64_t first = r->ranks.rank * c->batch_size; first < r->val_windows; first += turn) {
        size_t count = r->val_windows - first < c->batch_size ? (size_t)(r->val_windows - first) : c->batch_size;
        double mean;
        if (!read_windows(r, DATA_VAL, first, count)) return false;
        if (ga_forward(r->model, r->inputs, r->targets, count, c->max_seq_len, &observer, &mean, &r->error))
            return fail_library(r);
        *loss += mean * (double)count / (double)r->val_windows;
    }
    const ga_ranks *all = r->ranks.table;
    if (!all) return true;
    all->sum(all->state, loss, 1);
    return ga_statistics_merge(r->held_out, all, &r->error) == GA_OK || fail_library(r);
}

static bool due(uint64_t step, uint64_t every) {
    return every > 0 && step % every == 0;
}

/* What follows a step: evaluation, sample, its line in metrics.jsonl, checkpoints. */
static bool finish_step(run *r, measurement *m) {
    const ga_config *c = &r->config;
    uint64_t step = r->state.step;
    bool last = step == r->steps, evaluated = r->val_windows > 0 && (last || due(step, c->eval_every));
    bool saved = last || due(step, c->save_every);
    if (evaluated && !evaluate(r, &m->val_loss)) return false;
    if (evaluated && !isfinite(m->val_loss)) return diverge(r, step, m, "the held-out loss is not finite");
    if (due(step, c->sample_every) && !print_sample(r)) return false;
    if (!write_metrics(r, step, m)) return false;
    if (evaluated && !save_best(r, m->val_loss)) return false;
    if (saved && !save_last(r)) return false;
    show_step(r, m);
    return true;
}

/* Leaves the loop at the end, at a stop or at a failure (false). */
static bool train(run *r, measurement *m) {
    r->started = now();
    r->first_step = r->state.step;
    while (r->state.step < r->steps && !ranks_any(&r->ranks, stop_requested)) {
        *m = nothing_measured;
        if (take_step(r, m)) {
            if (!finish_step(r, m)) return false;
        } else if (r->exit_code) {
            return false;
        }
    }
    return r->state.step == r->steps || save_last(r);
}

#endif
