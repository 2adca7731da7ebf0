/* cuda_cpu_count.cpp - counts, in kernels that run on the CPU by cuda_cpu.h, what their accesses to memory cost
 * on a GPU, as Nsight Compute does: 32-byte sectors of global memory that a warp's access touches, and the
 * turns (wavefronts) that one to shared memory takes, beside the fewest that would do. Part of the checker,
 * which sees every address.
 *
 * The n-th time that the lanes of a warp come to one place of the code is one access. A GPU gathers them so as long as
 * the lanes stay together; where they part it needs more. Atomics are not counted. */
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <unistd.h>
#include "cuda_cpu.h"
#include "cuda_cpu_control.h"

bool cucpu_counts;

namespace {
enum { SECTOR = 32, BANKS = 32 };

/* A warp's access, as far as its lanes have come. */
struct request {
    uint64_t at[32];
    uint32_t lanes;
    uint32_t bytes;
    bool shared;
};

std::map<const void *, cucpu_traffic> kernels;
cucpu_traffic *current;
std::unordered_map<uint64_t, uint32_t> turns;   /* how often a thread has been at a place */
std::unordered_map<uint64_t, request> requests; /* by place, warp and turn */

/* The addresses of the lanes that take part. */
int addresses(const request &r, int first, int end, uint64_t *to) {
    int n = 0;
    for (int l = first; l < end; l++)
        if (r.lanes >> l & 1) to[n++] = r.at[l];
    std::sort(to, to + n);
    return n;
}

void count_sectors(const request &r) {
    uint64_t at[32], next = 0, next_sector = 0;
    size_t bytes = 0, sectors = 0;
    for (int i = 0, n = addresses(r, 0, 32, at); i < n; i++) {
        uint64_t end = at[i] + r.bytes, last = (end - 1) / SECTOR;
        bytes += end - std::max(at[i], std::min(next, end)), next = std::max(next, end);
        sectors += last + 1 - std::max(at[i] / SECTOR, std::min(next_sector, last + 1)), next_sector = last + 1;
    }
    current->requests++, current->sectors += sectors, current->least_sectors += (bytes + SECTOR - 1) / SECTOR;
}

/* Turns that the lanes [first, end) take: each bank gives one word at a time, to all who ask for it. */
size_t turns_of(const request &r, int first, int end) {
    uint64_t at[32], last[BANKS];
    size_t words[BANKS] = {}, most = 0;
    for (int i = 0, n = addresses(r, first, end, at); i < n; i++)
        for (uint64_t word = at[i] / 4; word <= (at[i] + r.bytes - 1) / 4; word++) {
            size_t bank = word % BANKS;
            if (words[bank] && last[bank] == word) continue;
            last[bank] = word, most = std::max(most, ++words[bank]);
        }
    return most;
}

/* 128 bytes at a time: accesses of 8 bytes go by half warps, those of 16 by quarters. */
void count_turns(const request &r) {
    int lanes = r.bytes <= 4 ? 32 : 128 / (int)r.bytes;
    current->shared_requests++;
    for (int first = 0; first < 32; first += lanes) {
        size_t taken = turns_of(r, first, first + lanes);
        current->wavefronts += taken, current->least_wavefronts += taken > 0;
    }
}

void count(const request &r) {
    if (r.shared)
        count_turns(r);
    else
        count_sectors(r);
}

/* The name of a kernel, from the debugging information. */
std::string name_of(const void *kernel) {
    char program[256], command[400], text[300] = "";
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    program[n > 0 ? n : 0] = 0;
    snprintf(command, sizeof command, "addr2line -Cfe %s %p", program, kernel);
    FILE *f = popen(command, "r");
    if (f) {
        if (!fgets(text, sizeof text, f)) text[0] = 0;
        pclose(f);
    }
    const char *from = strstr(text, "gai_k_");
    from = from ? from : text;
    return std::string(from, strcspn(from, "(\n"));
}
} // namespace

/* ---- what the scheduler and the checker tell -------------------------------------------------------------------------- */

void cucpu_count_kernel(const void *kernel) {
    current = &kernels[kernel];
    current->launches++;
}

void cucpu_count_access(const void *p, size_t bytes, bool writes, bool shared, uint32_t place) {
    uint64_t at = (uint64_t)place << 32 | (uint64_t)writes << 31;
    uint64_t turn = turns[at | (uint64_t)cucpu_current->linear]++;
    request &r = requests[at | (uint64_t)cucpu_current->warp << 26 | turn];
    r.at[cucpu_current->lane] = (uint64_t)(uintptr_t)p, r.lanes |= 1u << cucpu_current->lane;
    r.bytes = (uint32_t)bytes, r.shared = shared;
}

/* Rows of 16 bytes for each of four matrices. */
void cucpu_count_ldmatrix(const uint64_t *rows) {
    request r = {{}, ~0u, 16, true};
    memcpy(r.at, rows, sizeof r.at);
    count(r);
}

void cucpu_count_block() {
    for (auto &r : requests) count(r.second);
    turns.clear(), requests.clear();
}

/* ---- what tests ask ---------------------------------------------------------------------------------------------------- */

void cucpu_count(bool on) {
    cucpu_counts = on;
}

size_t cucpu_counted(cucpu_traffic *to, size_t most) {
    size_t n = 0;
    for (auto &k : kernels) {
        if (n == most) break;
        to[n] = k.second;
        snprintf(to[n++].kernel, sizeof to->kernel, "%s", name_of(k.first).c_str());
    }
    std::sort(to, to + n,
              [](const cucpu_traffic &a, const cucpu_traffic &b) { return strcmp(a.kernel, b.kernel) < 0; });
    kernels.clear();
    return n;
}
