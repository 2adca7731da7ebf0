/* drivers/train/progress.h - what is seen of a run while it trains: a bar of two lines on a terminal, else a line now
 * and then.
 *
 * Needs run.h before it.
 */
#ifndef DRIVERS_PROGRESS_H
#define DRIVERS_PROGRESS_H

#include <sys/ioctl.h>
#include <unistd.h>

static size_t terminal_width(void) {
    struct winsize size;
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

/* Of a line that the terminal does not break, in a text of `size` bytes. */
static size_t line_width(size_t size) {
    size_t width = terminal_width() - 1;
    return width < size ? width : size - 1;
}

static void erase_bar(progress *p) {
    if (p->drawn) printf("\r\033[K\033[1A\033[K");
    p->drawn = false;
}

/* Appends a field, or leaves it out when the line would grow beyond `width`. */
static void add_field(char *line, size_t width, const char *format, ...) {
    char field[128];
    va_list list;
    va_start(list, format);
    vsnprintf(field, sizeof field, format, list);
    va_end(list);
    size_t length = strlen(line);
    if (length + (length > 0) + strlen(field) > width) return;
    if (length > 0) strcat(line, " ");
    strcat(line, field);
}

static void add_number(char *line, size_t width, const char *format, double x) {
    if (!isnan(x)) add_field(line, width, format, x);
}

static void add_figures(const progress *p, char *line, size_t width) {
    add_number(line, width, "loss %.4f", p->latest.loss);
    add_number(line, width, "val %.4f", p->latest.val_loss);
    add_number(line, width, "F-Attn %.3f", p->f_attn);
    add_number(line, width, "sink %.3f", p->sink_share);
    add_number(line, width, "M-Act %.3g", p->m_act);
    add_number(line, width, "gate %.3f", p->gate_mean);
    const routing *r = &p->routing;
    size_t worst = routing_worst(r);
    if (!isnan(r->mean.max_load))
        add_field(line, width, "load %.2f (%.2f in layer %zu)", r->mean.max_load, r->layers[worst].max_load, worst);
    add_number(line, width, "dead %.2g", r->mean.dead);
    add_number(line, width, "balance %.3f", r->mean.load_balance);
    add_number(line, width, "z %.3g", r->mean.router_z);
    add_number(line, width, "|g| %.3g", p->latest.grad_norm);
}

static void add_pace(const run *r, char *line, size_t width, double steps_done) {
    double pace = (now() - r->started) / (steps_done - (double)r->first_step);
    add_field(line, width, "%s left", DURATION(pace * ((double)r->steps - steps_done)));
    add_number(line, width, "%.0f tok/s", r->progress.latest.tokens_per_s);
    add_number(line, width, "lr %.2g", r->progress.latest.learning_rate);
}

/* On a terminal no wider than it: what does not fit stands in the bar. */
static void print_line(run *r) {
    char line[256] = "";
    size_t width = r->progress.terminal ? line_width(sizeof line) : sizeof line - 1;
    add_field(line, width, "step %" PRIu64 "/%" PRIu64, r->state.step, r->steps);
    add_figures(&r->progress, line, width);
    add_pace(r, line, width, (double)r->state.step);
    erase_bar(&r->progress);
    printf("%s\n", line);
    fflush(stdout);
}

/* Two lines, neither wider than the terminal, at most ten times a second. steps_done counts a part of a step too. */
static void draw_bar(run *r, double steps_done) {
    progress *p = &r->progress;
    if (!p->terminal || (p->drawn && now() - p->drawn_at < 0.1)) return;
    char line[256] = "", bar[64];
    size_t width = line_width(sizeof line);
    double share = steps_done / (double)r->steps;
    add_field(line, width, "%" PRIu64 "/%" PRIu64, r->state.step, r->steps);
    add_field(line, width, "%.0f%%", 100 * share);
    add_pace(r, line, width, steps_done);
    size_t cells = width < strlen(line) + 3 ? 0 : width - strlen(line) - 3;
    if (cells >= sizeof bar) cells = sizeof bar - 1;
    for (size_t i = 0; i < cells; i++) bar[i] = (double)i < share * (double)cells ? '#' : '-';
    if (cells > 0) add_field(line, width, "[%.*s]", (int)cells, bar);
    erase_bar(p);
    printf("%s\n", line);
    *line = 0;
    add_figures(p, line, width);
    printf("%s", line);
    fflush(stdout);
    p->drawn = true;
    p->drawn_at = now();
}

static void show_step(run *r, const measurement *m) {
    progress *p = &r->progress;
    double val_loss = isnan(m->val_loss) ? p->latest.val_loss : m->val_loss;
    p->latest = *m;
    p->latest.val_loss = val_loss;
    bool last = r->state.step == r->steps, due_line = last || r->state.step % r->config.log_every == 0;
    if (!isnan(m->val_loss) || (due_line && !p->terminal)) print_line(r);
    if (!last) draw_bar(r, (double)r->state.step);
}

#endif
