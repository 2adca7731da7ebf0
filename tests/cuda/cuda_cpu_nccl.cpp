/* cuda_cpu_nccl.cpp - NCCL for cuda_cpu.h: ranks are processes of this machine, each with its emulated GPU; data goes
 * through shared memory that the unique id names. An exchange runs when its stream gets there, and waits there for the
 * other ranks. As the library may, a call on a non-blocking communicator often is done only when ncclCommGetAsyncError
 * says so. Nobody notices that a rank has died: an exchange then waits until ncclCommAbort.
 *
 * What hangs or is undefined in the library ends the program with 86 here: ranks whose exchanges differ, a call while
 * another is in progress, buffers that overlap but are not in place, a communicator that is used after its end. */
#include "cuda_cpu.h"
#include "cuda_cpu_control.h"
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <mutex>
#include <nccl.h>
#include <sys/mman.h>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#ifdef CUCPU_CHECK
void cucpu_check_host_write(void *p, size_t n), cucpu_check_host_read(const void *p, size_t n);
#define CHECKED(x) x
#else
#define CHECKED(x)
#endif

void cucpu_drain(cudaStream_t s);

namespace {
enum { RANKS = 8, CHUNK = 1 << 16 };
enum kind { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, POINTS };
const char *const kind_names[] = {"all-reduce", "reduce-scatter", "all-gather", "group of sends"};

/* What all ranks have to agree on. */
struct description {
    uint64_t number;
    size_t count;
    int what, type, op;
};

struct meeting_place {
    std::atomic<int> joined, arrived, round;
    int ranks;
    description descriptions[RANKS];
    size_t bytes[RANKS][RANKS]; /* that one rank sends to another */
    char data[RANKS][CHUNK];
};

/* One half of a message between two ranks. */
struct point {
    const char *from;
    char *to;
    size_t bytes;
};

struct exchange {
    description d;
    const char *from;
    char *to;
    cudaStream_t stream;
    point sends[RANKS], receives[RANKS];
};
} // namespace

struct ncclComm {
    meeting_place *place = nullptr;
    int rank = 0, count = 0;
    bool blocking = true, finalized = false;
    std::thread::id owner = std::this_thread::get_id();
    std::atomic<bool> aborted{false}, gone{false};
    std::atomic<int> running{0};
    std::mutex mutex; /* of what follows: any thread may ask */
    int polls = 0;    /* that still say "in progress" */
    std::vector<exchange> pending;
    uint64_t number = 0;
};

namespace {
std::atomic<int> async_error;
thread_local int group_depth;
thread_local std::vector<std::pair<ncclComm *, exchange>> group;
uint64_t turn = 88172645463325252ull;

__attribute__((noreturn, format(printf, 1, 2))) void fatal(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fputs("cucpu: NCCL: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    _exit(86);
}

unsigned random_bits() {
    turn ^= turn << 13, turn ^= turn >> 7, turn ^= turn << 17;
    return (unsigned)(turn >> 32);
}

size_t size_of(int type) {
    if (type == ncclFloat32) return 4;
    if (type == ncclFloat64) return 8;
    if (type == ncclBfloat16) return 2;
    fatal("data type %d", type);
}

template <class T>
void add(char *sum, const char *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        T a, b;
        memcpy(&a, sum + i * sizeof a, sizeof a), memcpy(&b, x + i * sizeof b, sizeof b);
        a += b;
        memcpy(sum + i * sizeof a, &a, sizeof a);
    }
}

void add(int type, char *sum, const char *x, size_t n) {
    if (type == ncclFloat32) return add<float>(sum, x, n);
    if (type == ncclFloat64) return add<double>(sum, x, n);
    fatal("sums of data type %d", type);
}

/* Until all ranks are here; false: this rank has given up. */
bool meet(ncclComm *c) {
    meeting_place *p = c->place;
    int round = p->round;
    if (++p->arrived == c->count) {
        p->arrived = 0;
        p->round++;
        return true;
    }
    for (int spins = 0; p->round == round; spins++) {
        if (c->aborted) return false;
        spins < 64 ? (void)sched_yield() : (void)usleep(100);
    }
    return !c->aborted;
}

void compare(const ncclComm *c) {
    const description *all = c->place->descriptions, *mine = all + c->rank;
    for (int r = 0; r < c->count; r++)
        if (memcmp(mine, all + r, sizeof *mine) != 0)
            fatal("rank %d has exchange %d, a %s of %zu values of type %d; rank %d exchange %d, a %s of %zu of type %d",
                  c->rank, (int)mine->number, kind_names[mine->what], mine->count, mine->type, r, (int)all[r].number,
                  kind_names[all[r].what], all[r].count, all[r].type);
}

/* Values [first, first + n) of what the ranks have brought, for this rank. */
void take(const ncclComm *c, const exchange &x, size_t first, size_t n) {
    size_t size = size_of(x.d.type), skip = 0;
    if (x.d.what == ALL_GATHER) {
        for (int r = 0; r < c->count; r++)
            memcpy(x.to + ((size_t)r * x.d.count + first) * size, c->place->data[r], n * size);
        return;
    }
    if (x.d.what == REDUCE_SCATTER) { /* only what is this rank's */
        size_t begin = (size_t)c->rank * x.d.count, end = begin + x.d.count, last = first + n;
        size_t from = first > begin ? first : begin, to = last < end ? last : end;
        if (from >= to) return;
        skip = from - first, n = to - from, first = from - begin;
    }
    const char *nvls = getenv("NCCL_NVLS_ENABLE"); /* NVLink's switches begin with whom they like */
    int begin = nvls && strcmp(nvls, "0") == 0 ? 0 : (int)(x.d.number % (uint64_t)c->count);
    const char *head = c->place->data[begin] + skip * size;
    std::vector<char> sum(head, head + n * size);
    for (int r = 1; r < c->count; r++)
        add(x.d.type, sum.data(), c->place->data[(begin + r) % c->count] + skip * size, n);
    memcpy(x.to + first * size, sum.data(), n * size);
}

void check_memory(const ncclComm *c, const exchange &x) {
    (void)c, (void)x;
#ifdef CUCPU_CHECK
    size_t bytes = x.d.count * size_of(x.d.type), all = bytes * (size_t)c->count;
    cucpu_check_host_read(x.from, x.d.what == REDUCE_SCATTER ? all : bytes);
    cucpu_check_host_write(x.to, x.d.what == ALL_GATHER ? all : bytes);
#endif
}

/* A group of messages: each rank has a part of its place for each other. */
void run_points(ncclComm *c, const exchange &x) {
    const size_t part = CHUNK / RANKS;
    size_t longest = 0;
    for (int i = 0; i < c->count; i++) c->place->bytes[c->rank][i] = x.sends[i].bytes;
    if (!meet(c)) return;
    for (int i = 0; i < c->count; i++)
        if (x.receives[i].bytes != c->place->bytes[i][c->rank])
            fatal("rank %d sends %zu bytes to rank %d, which expects %zu", i, c->place->bytes[i][c->rank], c->rank,
                  x.receives[i].bytes);
    for (int i = 0; i < c->count * c->count; i++)
        longest = std::max(longest, c->place->bytes[i / c->count][i % c->count]);
    for (size_t first = 0; first < longest; first += part) {
        for (int i = 0; i < c->count; i++) {
            const point &p = x.sends[i];
            if (p.bytes > first)
                memcpy(c->place->data[c->rank] + (size_t)i * part, p.from + first, std::min(part, p.bytes - first));
        }
        if (!meet(c)) return;
        for (int i = 0; i < c->count; i++) {
            const point &p = x.receives[i];
            if (p.bytes > first)
                memcpy(p.to + first, c->place->data[i] + (size_t)c->rank * part, std::min(part, p.bytes - first));
        }
        if (!meet(c)) return;
    }
#ifdef CUCPU_CHECK
    for (int i = 0; i < c->count; i++) {
        cucpu_check_host_read(x.sends[i].from, x.sends[i].bytes);
        cucpu_check_host_write(x.receives[i].to, x.receives[i].bytes);
    }
#endif
}

void run_exchange(ncclComm *c, const exchange &x) {
    size_t size = size_of(x.d.type), n = x.d.what == REDUCE_SCATTER ? x.d.count * (size_t)c->count : x.d.count;
    c->place->descriptions[c->rank] = x.d;
    if (!meet(c)) return;
    compare(c);
    if (x.d.what == POINTS) return run_points(c, x);
    check_memory(c, x);
    for (size_t first = 0; first < n; first += CHUNK / size) {
        size_t part = n - first < CHUNK / size ? n - first : CHUNK / size;
        memcpy(c->place->data[c->rank], x.from + first * size, part * size);
        if (!meet(c)) return;
        take(c, x, first, part);
        if (!meet(c)) return;
    }
}

/* Into its stream, from where it runs in its turn. */
void enqueue(ncclComm *c, const exchange &x) {
    cucpu_submit(x.stream, [=] {
        c->running++;
        if (!c->aborted) run_exchange(c, x);
        c->running--;
    });
}

ncclComm *valid(ncclComm_t c) {
    if (!c || c->gone) fatal("a communicator is used that is not there");
    return c;
}

ncclResult_t begin(ncclComm *c, const std::vector<exchange> &what) {
    std::lock_guard<std::mutex> lock(c->mutex);
    if (!c->pending.empty() || c->polls || c->finalized) fatal("a call while another is in progress");
    if (c->blocking || random_bits() % 2) {
        for (const exchange &x : what) enqueue(c, x);
        return ncclSuccess;
    }
    c->pending = what, c->polls = 1 + (int)(random_bits() % 3);
    return random_bits() % 4 ? ncclInProgress : ncclSuccess; /* too early, as some versions do */
}

bool overlap(const void *a, size_t an, const void *b, size_t bn) {
    return (const char *)a < (const char *)b + bn && (const char *)b < (const char *)a + an;
}

/* Alone, or with the other calls of its group. */
ncclResult_t put(ncclComm *c, const exchange &x) {
    if (group_depth == 0) return begin(c, {x});
    group.push_back({c, x});
    return ncclSuccess;
}

exchange describe(ncclComm *c, kind what, size_t count, int type, cudaStream_t stream) {
    exchange x;
    memset((void *)&x, 0, sizeof x);
    x.d.number = c->number++, x.d.count = count, x.d.what = what, x.d.type = type, x.stream = stream;
    return x;
}

ncclResult_t collective(kind what, const void *from, void *to, size_t count, ncclDataType_t type, int op,
                        ncclComm_t comm, cudaStream_t stream) {
    if (cucpu_call_fails()) return ncclSystemError;
    ncclComm *c = valid(comm);
    size_t bytes = count * size_of(type), all = bytes * (size_t)c->count, share = bytes * (size_t)c->rank;
    size_t in = what == REDUCE_SCATTER ? all : bytes, out = what == ALL_GATHER ? all : bytes;
    const char *in_place = (const char *)from + (what == REDUCE_SCATTER ? share : 0);
    const char *out_place = (const char *)to + (what == ALL_GATHER ? share : 0);
    if (overlap(from, in, to, out) && in_place != out_place)
        fatal("the buffers of a %s overlap, but it is not in place", kind_names[what]);
    if (op != ncclSum) return ncclInvalidArgument;
    exchange x = describe(c, what, count, type, stream);
    x.d.op = op, x.from = (const char *)from, x.to = (char *)to;
    return put(c, x);
}

/* Messages of a group happen at one time: they become one exchange. */
ncclResult_t message(bool sends, void *buffer, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                     cudaStream_t stream) {
    if (cucpu_call_fails()) return ncclSystemError;
    ncclComm *c = valid(comm);
    if (peer < 0 || peer >= c->count) return ncclInvalidArgument;
    if (group_depth == 0) fatal("a message outside of a group");
    if (group.empty() || group.back().second.d.what != POINTS)
        group.push_back({c, describe(c, POINTS, 0, type, stream)});
    exchange &x = group.back().second;
    point &p = sends ? x.sends[peer] : x.receives[peer];
    if (p.bytes) fatal("two messages to or from one rank in a group");
    p.from = (const char *)buffer, p.to = (char *)buffer, p.bytes = count * size_of(type);
    return random_bits() % 4 ? ncclSuccess : ncclInProgress; /* as the communicator's state is */
}

/* The names of memory that not all ranks have come to. */
struct names : std::vector<std::string> {
    ~names() {
        for (const std::string &name : *this) shm_unlink(name.c_str());
    }
} created;

std::string place_name(const ncclUniqueId &id) {
    return std::string("/") + id.internal;
}
} // namespace

void cucpu_fail_async() {
    async_error = ncclRemoteError;
}

extern "C" {
ncclResult_t ncclGetVersion(int *version) {
    if (cucpu_call_fails()) return ncclSystemError;
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t e) {
    return e == ncclSuccess           ? "no error"
           : e == ncclSystemError     ? "unhandled system error (run with NCCL_DEBUG=INFO for details)"
           : e == ncclInvalidArgument ? "invalid argument (run with NCCL_DEBUG=WARN for details)"
           : e == ncclRemoteError     ? "remote process exited or there was a network error"
           : e == ncclInProgress      ? "NCCL operation in progress"
                                      : "another result";
}

const char *ncclGetLastError(ncclComm_t) {
    return "what the emulated library says";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    if (cucpu_call_fails()) return ncclSystemError;
    memset(id, 0, sizeof *id);
    for (int tries = 0; tries < 100; tries++) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        snprintf(id->internal, sizeof id->internal, "cucpu-nccl-%d-%lx", (int)getpid(), (long)now.tv_nsec);
        int file = shm_open(place_name(*id).c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
        if (file < 0) continue;
        int wrong = ftruncate(file, sizeof(meeting_place));
        close(file);
        created.push_back(place_name(*id));
        return wrong ? ncclSystemError : ncclSuccess;
    }
    return ncclSystemError;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int count, ncclUniqueId id, int rank, ncclConfig_t *config) {
    if (cucpu_call_fails()) return ncclSystemError;
    if (config->magic != 0xcafebeef || config->size != sizeof *config) return ncclInvalidArgument;
    if (count < 1 || count > RANKS || rank < 0 || rank >= count) return ncclInvalidArgument;
    int file = shm_open(place_name(id).c_str(), O_RDWR, 0600);
    if (file < 0) return ncclSystemError;
    void *p = mmap(nullptr, sizeof(meeting_place), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (p == MAP_FAILED) return ncclSystemError;
    ncclComm *c = *comm = new ncclComm();
    c->place = (meeting_place *)p, c->rank = rank, c->count = count, c->blocking = config->blocking != 0;
    if (c->blocking) fatal("a blocking communicator cannot be left when a rank does not come");
    if (++c->place->joined == count) shm_unlink(place_name(id).c_str());
    return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state) {
    ncclComm *c = valid(comm);
    std::lock_guard<std::mutex> lock(c->mutex);
    *state = ncclSuccess;
    if (async_error)
        *state = (ncclResult_t)async_error.load();
    else if (c->place->joined < c->count)
        *state = ncclInProgress;
    else if (c->polls > 0 && std::this_thread::get_id() != c->owner)
        *state = ncclInProgress;
    else if (c->polls > 0 && --c->polls > 0)
        *state = ncclInProgress;
    else if (std::this_thread::get_id() == c->owner) {
        for (const exchange &x : c->pending) enqueue(c, x);
        c->pending.clear();
    }
    return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
    if (cucpu_call_fails()) return ncclSystemError;
    group_depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    if (group_depth == 0) fatal("the end of a group that was not begun");
    bool last = --group_depth == 0;
    std::vector<exchange> what;
    ncclComm *c = last && !group.empty() ? group[0].first : nullptr;
    for (auto &one : group)
        if (last && one.first != c)
            fatal("a group of several communicators");
        else if (last)
            what.push_back(one.second);
    if (last) group.clear();
    if (cucpu_call_fails()) return ncclSystemError;
    return what.empty() ? ncclSuccess : begin(c, what);
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    return collective(ALL_REDUCE, from, to, count, type, op, comm, stream);
}
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
    return collective(REDUCE_SCATTER, from, to, count, type, op, comm, stream);
}
ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    return collective(ALL_GATHER, from, to, count, type, ncclSum, comm, stream);
}
ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return message(true, (void *)from, count, type, peer, comm, stream);
}
ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    return message(false, to, count, type, peer, comm, stream);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    if (cucpu_call_fails()) return ncclSystemError;
    ncclComm *c = valid(comm);
    std::lock_guard<std::mutex> lock(c->mutex);
    if (c->polls || !c->pending.empty()) fatal("the end while a call is in progress");
    c->finalized = true, c->polls = 2;
    return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (cucpu_call_fails()) return ncclSystemError;
    ncclComm *c = valid(comm);
    if (!c->finalized || c->polls) fatal("a communicator is destroyed that is not finalized");
    cucpu_drain(nullptr);
    c->gone = true;
    munmap(c->place, sizeof *c->place);
    return ncclSuccess;
}

/* From any thread; what runs comes back, without a result. */
ncclResult_t ncclCommAbort(ncclComm_t comm) {
    ncclComm *c = valid(comm);
    c->aborted = true;
    while (getenv("CUCPU_ABORT_HANGS")) pause();
    while (c->running) usleep(100);
    c->gone = true;
    return ncclSuccess;
}
}
