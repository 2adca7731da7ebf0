/* cuda_cpu_check.cpp - finds, in kernels that run on the CPU by cuda_cpu.h: accesses outside of memory or to the host's,
 * misaligned ones, reads of what nobody has written, and races: two threads at one place, one of them writing, without a
 * barrier between them.
 *
 * Kernels are compiled with -fsanitize=thread, but not linked with its library: the compiler's calls for each load and
 * store come here. Compile this file without it, everything with -DCUCPU_CHECK, and link with -no-pie
 * -Wl,--wrap=memcpy,--wrap=memset. CUCPU_KEEP_GOING: do not stop after the first kernel with a bad access. */
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sys/mman.h>
#include <unistd.h>
#include "cuda_cpu.h"

extern int cucpu_quiet;   /* the emulation's own accesses are none */
extern bool cucpu_counts; /* cuda_cpu_count.cpp */
void cucpu_count_access(const void *p, size_t bytes, bool writes, bool shared, uint32_t place);
void cucpu_count_ldmatrix(const uint64_t *rows);

namespace {
/* Times count kernels, blocks and barriers in one row: what was noted before `kernel_time` belongs to an earlier kernel,
 * before `block_time` to another block of this one, before `now` it lies behind a barrier. */
uint32_t now = 2, kernel_time, block_time;
uint16_t warp_time[32]; /* barriers of each warp alone */

/* Who read: one thread, several of one warp, or several warps. */
const uint16_t OF_WARP = 0x8000, MANY = 0xffff;

/* The last write and the last reads of one byte. */
struct cell {
    uint32_t written, read, first_read, write_at, read_at; /* when; and the place in the code */
    uint16_t writer, reader, writer_warp_time, reader_warp_time;
    bool exists, written_atomically, read_atomically;
};

const size_t DEVICE = (size_t)1 << 28, SHARED = 1 << 20; /* device memory, then the block's shared memory */
char *memory;
cell *cells;
size_t device_top = 256, shared_top;
std::map<char *, size_t> live;
std::map<uint64_t, int> reported;
int errors;
bool apart; /* accesses are checked, but not counted */

void *map_zeros(size_t bytes) {
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) perror("cucpu: mmap"), exit(87);
    return p;
}

void initialise() {
    if (memory) return;
    memory = (char *)map_zeros(DEVICE + SHARED);
    cells = (cell *)map_zeros((DEVICE + SHARED) * sizeof *cells);
}

cell *cell_of(const void *p) {
    return cells + ((const char *)p - memory);
}
bool is_device(const void *p) {
    return memory && (size_t)((const char *)p - memory) < DEVICE;
}

/* The function and line of an address, from the debugging information. */
void print_place(uint32_t address) {
    char program[256], command[400], text[300] = "?";
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    program[n > 0 ? n : 0] = 0;
    snprintf(command, sizeof command, "addr2line -Cse %s %x", program, address - 1);
    FILE *f = popen(command, "r");
    if (f) {
        if (!fgets(text, sizeof text, f)) text[0] = 0;
        pclose(f);
    }
    text[strcspn(text, "\n")] = 0;
    fprintf(stderr, "%s", text);
}

void report(const char *what, const char *p, size_t bytes, uint32_t place, uint32_t other_place) {
    errors++;
    if (reported[(uint64_t)place << 32 | other_place]++) return;
    size_t at = (size_t)(p - memory);
    fprintf(stderr, "cucpu: %s, %zu bytes at %s+%zu, block (%u,%u,%u) thread %d: ", what, bytes,
            at < DEVICE            ? "device"
            : at < DEVICE + SHARED ? "shared"
                                   : "HOST",
            at < DEVICE ? at : at - DEVICE, cucpu_block_index.x, cucpu_block_index.y, cucpu_block_index.z,
            cucpu_current->linear);
    print_place(place);
    if (other_place) fprintf(stderr, " and "), print_place(other_place);
    fputc('\n', stderr);
}

/* Whether nothing orders an earlier access, by `thread` at `time`, before one of this thread now. */
bool unordered(bool shared, uint32_t time, uint16_t thread, uint16_t its_warp_time) {
    int mine = cucpu_current->linear;
    if (time < kernel_time) return false;
    if (time < block_time) return !shared;
    if (time < now || thread == mine) return false;
    if (thread == MANY) return true;
    int warp = thread & OF_WARP ? thread & ~OF_WARP : thread / 32;
    return warp != mine / 32 || its_warp_time == warp_time[warp];
}

void note_read(cell *c, bool shared, bool atomic, uint32_t place) {
    int mine = cucpu_current->linear;
    if (c->read != now || c->reader == mine)
        c->reader = (uint16_t)mine;
    else if (c->reader != MANY) {
        int warp = c->reader & OF_WARP ? c->reader & ~OF_WARP : c->reader / 32;
        c->reader = warp == mine / 32 ? (uint16_t)(OF_WARP | warp) : MANY;
    }
    bool only = shared ? c->read != now : c->first_read < kernel_time; /* no earlier read can meet a write to come */
    c->read_atomically = atomic && (c->read_atomically || only);
    if (c->first_read < kernel_time) c->first_read = now;
    c->read = now, c->reader_warp_time = warp_time[mine / 32], c->read_at = place;
}

/* One byte; false: it was bad, and the rest of the access need not be looked at. */
bool access_byte(char *p, size_t bytes, bool writes, bool atomic, uint32_t place) {
    bool shared = p >= memory + DEVICE;
    cell *c = cell_of(p);
    if ((!writes || atomic) && (c->written == 0 || (shared && c->written < block_time))) {
        report("read of what nobody has written", p, bytes, place, 0);
        c->written = shared ? block_time : 1;
    }
    if (unordered(shared, c->written, c->writer, c->writer_warp_time) && !(atomic && c->written_atomically)) {
        report(writes ? "race: write after write" : "race: read after write", p, bytes, place, c->write_at);
        return false;
    }
    if (writes) {
        bool other_block = !shared && c->first_read >= kernel_time && c->first_read < block_time;
        if (!(atomic && c->read_atomically) &&
            (other_block || unordered(shared, c->read, c->reader, c->reader_warp_time))) {
            report("race: write after read", p, bytes, place, c->read_at);
            c->read = c->first_read = 0;
            return false;
        }
        c->written = now, c->writer = (uint16_t)cucpu_current->linear, c->write_at = place;
        c->writer_warp_time = warp_time[cucpu_current->warp], c->written_atomically = atomic;
    }
    if (!writes || atomic) note_read(c, shared, atomic, place);
    return true;
}

bool is_stack(const char *p) {
    const char *here = (const char *)__builtin_frame_address(0);
    return p > here - (128 << 10) && p < here + (128 << 10);
}

void access(void *at, size_t bytes, bool writes, bool atomic, uint32_t place) {
    if (!cucpu_current) return;
    char *p = (char *)at;
    if ((size_t)(p - memory) >= DEVICE + SHARED) {
        if (writes && !is_stack(p)) report("write outside of device memory", p, bytes, place, 0);
        return;
    }
    if (!cell_of(p)->exists || !cell_of(p + bytes - 1)->exists) return report("out of bounds", p, bytes, place, 0);
    if ((size_t)(p - memory) & (bytes - 1)) report("misaligned", p, bytes, place, 0);
    if (cucpu_counts && !apart && !atomic) cucpu_count_access(p, bytes, writes, p >= memory + DEVICE, place);
    for (size_t i = 0; i < bytes; i++)
        if (!access_byte(p + i, bytes, writes, atomic, place)) return;
}

__attribute__((noreturn)) void stop(const char *what) {
    fprintf(stderr, "cucpu: %s\n", what);
    exit(86);
}
} // namespace

/* ---- what the scheduler and the runtime tell ------------------------------------------------------------------------- */

void *cucpu_check_malloc(size_t bytes) {
    initialise();
    if (device_top + bytes + 512 > DEVICE) return nullptr;
    char *p = memory + device_top;
    device_top = (device_top + bytes + 511) & ~(size_t)255; /* 256 bytes or more that do not exist lie between blocks */
    live[p] = bytes;
    memset(cell_of(p), 0, bytes * sizeof(cell));
    for (size_t i = 0; i < bytes; i++) cell_of(p)[i].exists = true;
    return p;
}

void cucpu_check_free(void *q) {
    char *p = (char *)q;
    for (size_t i = 0; i < live[p]; i++) cell_of(p)[i].exists = false;
    live.erase(p);
    if (live.empty()) device_top = 256;
}

void *cucpu_check_shared(size_t bytes) {
    char *p = memory + DEVICE + shared_top;
    shared_top = (shared_top + bytes + 255) & ~(size_t)127;
    if (shared_top > SHARED) stop("more shared memory than there is");
    for (size_t i = 0; i < bytes; i++) cell_of(p)[i].exists = true;
    return p;
}

void cucpu_check_kernel() {
    initialise();
    kernel_time = ++now;
}

void cucpu_check_block() {
    for (size_t i = 0; i < shared_top; i++) cells[DEVICE + i].exists = false;
    shared_top = 0, block_time = ++now;
    memset(warp_time, 0, sizeof warp_time);
}

void cucpu_check_barrier() {
    ++now;
}

void cucpu_check_warp(int linear) {
    warp_time[linear / 32]++;
}

void cucpu_check_end() {
    if (errors && !getenv("CUCPU_KEEP_GOING")) stop("bad accesses");
}

void cucpu_check_host_write(void *p, size_t n) {
    for (size_t i = 0; is_device(p) && i < n; i++) {
        if (!cell_of(p)[i].exists) stop("a copy or fill from the host goes out of bounds");
        cell_of(p)[i].written = 1;
    }
}

void cucpu_check_host_read(const void *p, size_t n) {
    for (size_t i = 0; is_device(p) && i < n; i++) {
        if (!cell_of(p)[i].exists) stop("a copy to the host goes out of bounds");
        if (!cell_of(p)[i].written) stop("a copy to the host of what nobody has written");
    }
}

void cucpu_check_copy(const void *p, bool writes, bool counts, void *caller) {
    apart = !counts;
    access((void *)p, 16, writes, false, (uint32_t)(uintptr_t)caller);
    apart = false;
}

void cucpu_check_apart(bool on) {
    apart = on;
}

void cucpu_check_ldmatrix(const uint64_t *addresses) {
    for (int l = 0; l < 32; l++)
        if (addresses[l] - (uint64_t)(uintptr_t)(memory + DEVICE) >= SHARED)
            stop("ldmatrix of what is not shared memory");
    if (cucpu_counts) cucpu_count_ldmatrix(addresses);
}

void cucpu_check_pointer(const void *p) {
    if (p && !is_device(p)) stop("an argument of a kernel is no device pointer");
}

void cucpu_check_atomic(void *p, int bytes, void *caller) {
    access(p, (size_t)bytes, true, true, (uint32_t)(uintptr_t)caller);
}

/* ---- what the compiler calls ------------------------------------------------------------------------------------------ */

#define PLACE (uint32_t)(uintptr_t) __builtin_return_address(0)
#define ACCESSES(n)                           \
    void __tsan_read##n(void *p) {            \
        access(p, n, false, false, PLACE);    \
    }                                         \
    void __tsan_write##n(void *p) {           \
        access(p, n, true, false, PLACE);     \
    }                                         \
    void __tsan_unaligned_read##n(void *p) {  \
        access(p, n, false, false, PLACE);    \
    }                                         \
    void __tsan_unaligned_write##n(void *p) { \
        access(p, n, true, false, PLACE);     \
    }                                         \
    void __tsan_read_write##n(void *p) {      \
        access(p, n, false, false, PLACE);    \
        access(p, n, true, false, PLACE);     \
    }
extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void *p, long n) {
    for (long i = 0; i < n; i++) access((char *)p + i, 1, false, false, PLACE);
}
void __tsan_write_range(void *p, long n) {
    for (long i = 0; i < n; i++) access((char *)p + i, 1, true, false, PLACE);
}
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
unsigned char __tsan_atomic8_load(const volatile unsigned char *p, int) { /* of static variables */
    return *p;
}

/* A compiler may turn the copy of a structure into memcpy. */
void *__real_memcpy(void *, const void *, size_t);
void *__real_memset(void *, int, size_t);
static bool counts(const void *p) {
    return cucpu_current && !cucpu_quiet && (size_t)((const char *)p - memory) < DEVICE + SHARED;
}
void *__wrap_memcpy(void *to, const void *from, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (counts(from)) access((char *)from + i, 1, false, false, PLACE);
        if (counts(to)) access((char *)to + i, 1, true, false, PLACE);
    }
    return __real_memcpy(to, from, n);
}
void *__wrap_memset(void *p, int value, size_t n) {
    for (size_t i = 0; i < n && counts(p); i++) access((char *)p + i, 1, true, false, PLACE);
    return __real_memset(p, value, n);
}
}
