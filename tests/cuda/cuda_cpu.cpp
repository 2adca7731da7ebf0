/* cuda_cpu.cpp - the scheduler of cuda_cpu.h: runs the threads of a block as fibers of one CPU thread, and finds barriers
 * and warp operations that would hang or be undefined on a GPU. Not to be compiled with -fsanitize. */
#include "cuda_cpu.h"
#include "cuda_cpu_control.h"
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>
#include <sys/mman.h>
#include <ucontext.h>

#ifdef CUCPU_CHECK /* cuda_cpu_check.cpp */
int cucpu_quiet;
void *cucpu_check_shared(size_t bytes);
void cucpu_check_kernel(), cucpu_check_block(), cucpu_check_barrier(), cucpu_check_warp(int linear), cucpu_check_end(),
    cucpu_check_ldmatrix(const uint64_t *addresses), cucpu_count_kernel(const void *kernel), cucpu_count_block();
extern bool cucpu_counts; /* cuda_cpu_count.cpp */
void cucpu_check_copy(const void *p, bool writes, bool counts, void *caller);
#define CHECKED(x) x
#else
#define CHECKED(x)
#endif

/* Saves the registers that the ABI preserves, and goes on where `to` was saved. */
#if defined(__x86_64__)
#define ASSEMBLY_SWITCH
extern "C" void cucpu_switch(void **save, void *to);
asm(".text\n.globl cucpu_switch\n.type cucpu_switch,@function\ncucpu_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
#endif

cucpu_thread *cucpu_current;
uint3 cucpu_block_index;
dim3 cucpu_block_size, cucpu_grid_size;

void cucpu_fatal(const char *format, int a, int b) {
    fprintf(stderr, "cucpu: block (%u,%u,%u) thread %d: ", cucpu_block_index.x, cucpu_block_index.y,
            cucpu_block_index.z, cucpu_current ? cucpu_current->linear : -1);
    fprintf(stderr, format, a, b);
    fputc('\n', stderr);
    exit(86);
}

namespace {
enum { READY, AT_BARRIER, AT_WARP, DONE };
enum { IN_ORDER, REVERSED }; /* other seeds: random */
enum { MASKS = 8, STACK = 128 << 10 };

struct fiber : cucpu_thread {
    int state, line;
    std::vector<std::pair<void *, const void *>> copies; /* on their way */
    char *stack;
    void *saved;
    ucontext_t context;
};
/* One set of lanes that meet; two rounds of values, since a lane may still read while the next round starts. */
struct meeting {
    uint32_t mask, arrived;
    int line;
    unsigned round;
    uint64_t slots[2][32];
};
struct warp {
    int count;
    meeting meetings[MASKS];
};

std::vector<fiber *> fibers;
std::vector<int> ready;
warp warps[32];
std::map<const void *, void *> shared_blocks;
void *dynamic;
#ifdef ASSEMBLY_SWITCH
void *host_saved;
#else
ucontext_t host_context;
#endif
int threads, at_barrier, done;
size_t dynamic_bytes, shared_bytes, shared_most; /* shared: of this block so far */
void (*kernel_body)(void *);
void *kernel_argument;
uint64_t random_state;
int order = -1;
long kernels;

uint64_t random_bits() {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state;
}

void to_host(fiber *f) {
#ifdef ASSEMBLY_SWITCH
    cucpu_switch(&f->saved, host_saved);
#else
    swapcontext(&f->context, &host_context);
#endif
}

void to_fiber(fiber *f) {
    cucpu_current = f;
#ifdef ASSEMBLY_SWITCH
    cucpu_switch(&host_saved, f->saved);
#else
    swapcontext(&host_context, &f->context);
#endif
}

void run_fiber() {
    fiber *f = (fiber *)cucpu_current;
    kernel_body(kernel_argument);
    if (!f->copies.empty()) cucpu_fatal("%d copies that nobody waited for", (int)f->copies.size(), 0);
    f->state = DONE, done++;
    to_host(f);
    abort();
}

void prepare(fiber *f, int i) {
    f->linear = i, f->lane = i & 31, f->warp = i >> 5;
    f->index.x = i % cucpu_block_size.x, f->index.y = i / cucpu_block_size.x % cucpu_block_size.y;
    f->index.z = i / (cucpu_block_size.x * cucpu_block_size.y);
#ifdef ASSEMBLY_SWITCH
    void **top = (void **)(f->stack + STACK);
    *--top = nullptr, *--top = (void *)run_fiber;
    top -= 6;
    memset(top, 0, 6 * sizeof *top);
    f->saved = top;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack, f->context.uc_stack.ss_size = STACK, f->context.uc_link = nullptr;
    makecontext(&f->context, run_fiber, 0);
#endif
    f->state = READY;
    ready.push_back(i);
}

void *new_shared(size_t bytes) { /* NaN in every word, so that what is read too early shows */
#ifdef CUCPU_CHECK
    void *p = cucpu_check_shared(bytes);
#else
    void *p = aligned_alloc(128, (bytes + 127) / 128 * 128);
#endif
    memset(p, 0xff, bytes);
    return p;
}

void start_block() {
    CHECKED(cucpu_check_block());
#ifndef CUCPU_CHECK
    for (auto &s : shared_blocks) free(s.second);
    free(dynamic);
#endif
    shared_blocks.clear();
    shared_bytes = dynamic_bytes;
    dynamic = dynamic_bytes ? new_shared(dynamic_bytes) : nullptr;
    at_barrier = done = 0;
    ready.clear();
    for (warp &w : warps) w.count = 0;
    for (int i = 0; i < threads; i++) prepare(fibers[i], i);
}

int next_ready() {
    size_t i = order == IN_ORDER ? 0 : order == REVERSED ? ready.size() - 1 : random_bits() % ready.size();
    int linear = ready[i];
    if (order == IN_ORDER)
        ready.erase(ready.begin());
    else
        ready[i] = ready.back(), ready.pop_back();
    return linear;
}

void run_block() {
    CHECKED(cucpu_quiet++);
    start_block();
    CHECKED(cucpu_quiet--);
    while (!ready.empty()) to_fiber(fibers[next_ready()]);
    for (int i = 0; i < threads && done < threads; i++) {
        cucpu_current = fibers[i];
        if (fibers[i]->state == AT_BARRIER)
            cucpu_fatal("__syncthreads at line %d reached by some threads only (%d have returned)", fibers[i]->line,
                        done);
        if (fibers[i]->state == AT_WARP)
            cucpu_fatal("warp operation at line %d: lanes of its mask never arrived (%d have returned)",
                        fibers[i]->line, done);
    }
    cucpu_current = nullptr;
    CHECKED(if (cucpu_counts) cucpu_count_block());
}
} // namespace

void cucpu_yield() {
    fiber *f = (fiber *)cucpu_current;
    ready.push_back(f->linear);
    to_host(f);
}

void *cucpu_dynamic_shared() {
    return dynamic;
}

void *cucpu_shared(const void *key, size_t bytes, size_t align) {
    CHECKED(cucpu_quiet++);
    void *&p = shared_blocks[key];
    if (align > 16) cucpu_fatal("shared memory aligned to %d bytes", (int)align, 0);
    if (!p) p = new_shared(bytes), shared_bytes += bytes;
    if (shared_bytes > shared_most)
        cucpu_fatal("%d bytes of shared memory, of which %d at the launch", (int)shared_bytes, (int)dynamic_bytes);
    CHECKED(cucpu_quiet--);
    return p;
}

void cucpu_barrier(int line) {
    fiber *f = (fiber *)cucpu_current;
    f->state = AT_BARRIER, f->line = line;
    if (++at_barrier == threads) {
        for (int i = 0; i < threads; i++) {
            if (fibers[i]->line != line)
                cucpu_fatal("__syncthreads divergence: lines %d and %d", line, fibers[i]->line);
            fibers[i]->state = READY;
            ready.push_back(i);
        }
        at_barrier = 0;
        CHECKED(cucpu_check_barrier());
    }
    to_host(f);
}

void cucpu_copy_async(void *to, const void *from, int line) {
    if (((uintptr_t)to | (uintptr_t)from) % 16)
        cucpu_fatal("copy at line %d: an address is not a multiple of 16", line, 0);
    CHECKED(cucpu_check_copy(from, false, true, __builtin_return_address(0)));
    CHECKED(cucpu_check_copy(to, true, true, __builtin_return_address(0)));
    memset(to, 0xff, 16);
    ((fiber *)cucpu_current)->copies.push_back({to, from});
}

void cucpu_copies_wait() {
    auto &copies = ((fiber *)cucpu_current)->copies;
    for (auto &c : copies) {
        CHECKED(cucpu_check_copy(c.first, true, false, __builtin_return_address(0)));
        memcpy(c.first, c.second, 16);
    }
    copies.clear();
}

static meeting *find_meeting(warp *w, uint32_t mask, int line) {
    for (int i = 0; i < w->count; i++)
        if (w->meetings[i].mask == mask) return &w->meetings[i];
    if (w->count == MASKS) cucpu_fatal("more than %d different masks in one warp (line %d)", MASKS, line);
    meeting *m = &w->meetings[w->count++];
    m->mask = mask, m->arrived = 0, m->round = 0;
    return m;
}

const uint64_t *cucpu_warp(uint32_t mask, uint64_t value, int line, bool with_memory,
                           void (*call)(const uint64_t *values)) {
    fiber *f = (fiber *)cucpu_current;
    int first = f->warp * 32;
    uint32_t exist = threads - first >= 32 ? ~0u : (1u << (threads - first)) - 1;
    if (!(mask >> f->lane & 1)) cucpu_fatal("warp operation at line %d: lane %d is not in its own mask", line, f->lane);
    if (mask & ~exist && mask != ~0u)
        cucpu_fatal("warp operation at line %d: its mask names lanes that do not exist", line, 0);
    mask &= exist;
    meeting *m = find_meeting(&warps[f->warp], mask, line);
    if (!m->arrived)
        m->line = line;
    else if (m->line != line)
        cucpu_fatal("warp operation divergence: lines %d and %d", line, m->line);
    uint64_t *slots = m->slots[m->round & 1];
    slots[f->lane] = value, m->arrived |= 1u << f->lane;
    f->line = line, f->state = AT_WARP;
    if (m->arrived == mask) {
        if (call) call(slots);
        CHECKED(if (with_memory) cucpu_check_warp(f->linear));
        m->arrived = 0, m->round++;
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) fibers[first + l]->state = READY, ready.push_back(first + l);
    }
    (void)with_memory;
    to_host(f);
    return slots;
}

static float bf16_value(uint32_t two, int i) {
    return __uint_as_float(i ? two & 0xffff0000u : two << 16);
}

void cucpu_mma(const uint64_t *fragments) {
    float A[16][16], B[16][8];
    const cucpu_fragments *of[32];
    for (int l = 0; l < 32; l++) {
        of[l] = (const cucpu_fragments *)(uintptr_t)fragments[l];
        const uint32_t *a = of[l]->a, *b = of[l]->b;
        for (int i = 0; i < 2; i++) {
            int g = l / 4, t = 2 * (l % 4) + i;
            A[g][t] = bf16_value(a[0], i), A[g + 8][t] = bf16_value(a[1], i);
            A[g][t + 8] = bf16_value(a[2], i), A[g + 8][t + 8] = bf16_value(a[3], i);
            B[t][g] = bf16_value(b[0], i), B[t + 8][g] = bf16_value(b[1], i);
        }
    }
    for (int i = 0; i < 16; i++) {
        float row[8] = {};
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) row[j] += A[i][k] * B[k][j];
        for (int j = 0; j < 8; j++) of[i % 8 * 4 + j / 2]->d[i / 8 * 2 + j % 2] += row[j];
    }
}

void cucpu_aligned_to_16(const uint64_t *addresses) {
    for (int l = 0; l < 32; l++)
        if (addresses[l] % 16) cucpu_fatal("ldmatrix: the address of lane %d is not a multiple of 16", l, 0);
    CHECKED(cucpu_check_ldmatrix(addresses));
}

void cucpu_run(const void *kernel, void (*body)(void *), void *argument, dim3 grid, dim3 block, size_t at_launch) {
    if (order < 0) {
        const char *seed = getenv("CUCPU_SEED");
        order = seed ? atoi(seed) : 2;
        random_state = 0x9E3779B97F4A7C15ull * (uint64_t)(order + 1);
    }
    threads = (int)(block.x * block.y * block.z), cucpu_block_size = block, cucpu_grid_size = grid;
    kernel_body = body, kernel_argument = argument;
    dynamic_bytes = at_launch, shared_most = cucpu_shared_most(kernel);
    while (fibers.size() < (size_t)threads) {
        fiber *f = new fiber();
        f->stack =
            (char *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        fibers.push_back(f);
    }
    kernels++;
    CHECKED(cucpu_check_kernel());
    CHECKED(if (cucpu_counts) cucpu_count_kernel(kernel));
    uint32_t blocks = grid.x * grid.y * grid.z;
    std::vector<uint32_t> turn(blocks);
    for (uint32_t i = 0; i < blocks; i++) turn[i] = order == REVERSED ? blocks - 1 - i : i;
    if (order > REVERSED)
        for (uint32_t i = blocks - 1; i > 0; i--) std::swap(turn[i], turn[random_bits() % (i + 1)]);
    for (uint32_t i : turn) {
        cucpu_block_index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
        run_block();
    }
    CHECKED(cucpu_check_end());
}

long cucpu_kernels_run() {
    return kernels;
}
