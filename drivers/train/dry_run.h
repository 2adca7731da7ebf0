/* drivers/train/dry_run.h - train --dry-run: the plan, and an estimate of the time from the speed of this machine's
 * products.
 *
 * Needs plan.h and printout.h before it.
 */
#ifndef DRIVERS_DRY_RUN_H
#define DRIVERS_DRY_RUN_H

/* FLOP per second of the device's products at this model's sizes, from about a second of them. Sizes beyond a few
 * thousand are cut: they no longer change the speed, but would need memory. */
static double measure_speed(const run *r) {
    const ga_config *c = &r->config;
    enum { MOST_ROWS = 256, MOST_COLUMNS = 2048 };
    ga_sizes z = ga_sizes_of(c);
    size_t shapes[][2] = {{z.Z, z.C}, {2 * z.F, z.C}, {z.C, z.F}};
    size_t rows = c->batch_size * c->max_seq_len;
    if (rows > MOST_ROWS) rows = MOST_ROWS;
    double flops = 0, seconds = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        size_t O = shapes[i][0] < MOST_COLUMNS ? shapes[i][0] : MOST_COLUMNS;
        size_t I = shapes[i][1] < MOST_COLUMNS ? shapes[i][1] : MOST_COLUMNS;
        const ga_device *d = &r->device.device;
        ga_real *block = d->allocate(d->state, (rows * O + rows * I + O * I) * sizeof *block);
        if (!block) return NAN;
        double begin = now(), spent;
        do {
            d->linear_forward(d->state, block, block + rows * O, block + rows * O + rows * I, rows, O, I);
            if (d->wait) d->wait(d->state);
            flops += 2.0 * (double)rows * (double)O * (double)I;
            spent = now() - begin;
        } while (spent < 0.3);
        seconds += spent;
        d->release(d->state, block);
    }
    return flops / seconds;
}

static bool dry_run(run *r) {
    const ga_config *c = &r->config;
    bool needs_data = c->max_steps == 0 && c->max_tokens == 0;
    if (needs_data && strcmp(c->tokenizer, "train") == 0 && access(r->tokenizer, F_OK) != 0)
        return fail(r, 2,
                    "how long an epoch is will be known when the vocabulary is learned: set max_steps or max_tokens");
    if (needs_data && !open_data(r)) return false;
    if (!plan_steps(r)) return false;
    print_model(r);
    print_device(r);
    print_ranks(r);
    double speed = measure_speed(r) * (double)r->ranks.count;
    double tokens = (double)r->steps * (double)step_tokens(c);
    printf("time        about %s on this machine, if all of it ran like its products: %s, %s\n",
           DURATION(tokens * r->cost.training_flops / speed), SCALED(speed, "FLOP/s"),
           SCALED(speed / r->cost.training_flops, "tokens/s"));
    return true;
}

#endif
