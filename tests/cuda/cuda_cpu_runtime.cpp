/* cuda_cpu_runtime.cpp - the CUDA runtime of cuda_cpu.h: memory, streams, events, graphs, launch limits. What is put
 * into a stream runs as late as it may: when somebody waits for it; streams take turns at random. A missing
 * synchronisation is therefore seen, and so is an error that nobody checks, by cucpu_fail_call. */
#include "cuda_cpu.h"
#include "cuda_cpu_control.h"
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#ifdef CUCPU_CHECK
void *cucpu_check_malloc(size_t bytes);
void cucpu_check_free(void *p), cucpu_check_host_write(void *p, size_t n),
    cucpu_check_host_read(const void *p, size_t n);
#define CHECKED(x) x
#else
#define CHECKED(x)
#endif

struct CUevent_st {
    std::atomic<uint64_t> recorded{0}, reached{0}; /* asked for by other threads */
    bool captured = false;                         /* its latest record is a part of a graph */
};
struct work {
    std::shared_ptr<void> closure;
    void (*run)(void *) = nullptr;
    CUevent_st *event = nullptr; /* without a closure: record it, or wait until it has reached `ticket` */
    uint64_t ticket = 0;
    bool wait = false;
};
struct CUgraph_st {
    std::vector<work> steps;
    cudaStreamCaptureMode mode;
    bool invalid = false; /* a call was made that a capture does not allow */
};
struct CUgraphExec_st {
    std::vector<work> steps;
};
struct CUstream_st {
    std::deque<work> queue;
    CUgraph_st *capture = nullptr;
};

namespace {
CUstream_st null_stream;
std::vector<CUstream_st *> streams = {&null_stream};
std::map<const void *, size_t> opted_in, allocated;
std::map<char *, size_t> pinned;
cudaError_t last_error;
cudaError_t failure = cudaErrorLaunchFailure;
size_t memory_used, memory_size = (size_t)8 << 30, bytes_out;
long calls, failing_call, allocations, launches, waits;
long devices = getenv("CUCPU_DEVICES") ? atol(getenv("CUCPU_DEVICES")) : 1;
const std::thread::id main_thread = std::this_thread::get_id();
bool dry, for_good;
int capability = 89, image = 89, driver = CUDART_VERSION;
std::atomic<int> global_captures;
uint64_t turn = 0x9E3779B97F4A7C15ull;
const size_t SHARED_DEFAULT = 48 << 10;

/* Bytes of shared memory that a block gets at most when it asks, by compute capability: CUDA's programming guide. */
size_t shared_most() {
    static const struct {
        int capability;
        size_t kib;
    } most[] = {{75, 64}, {80, 163}, {86, 99}, {87, 163}, {89, 99}, {90, 227}, {100, 227}, {120, 99}};
    size_t kib = 48;
    for (auto &m : most)
        if (capability >= m.capability) kib = m.kib;
    return kib << 10;
}

cudaError_t fail(cudaError_t e) {
    return last_error = e;
}

/* Counts a call of the library; true: this is the one that is to fail, or comes after it and that was for good. Threads
 * beside the first, which look after things now and then, do not count. */
bool fails() {
    if (std::this_thread::get_id() != main_thread) return false;
    calls++;
    return failing_call > 0 && (for_good ? calls >= failing_call : calls == failing_call);
}
#define CALL \
    if (fails()) return fail(failure)

bool can_run(const CUstream_st *s) {
    return !s->queue.empty() && !(s->queue.front().wait && s->queue.front().event->reached < s->queue.front().ticket);
}

void run_head(CUstream_st *s) {
    work w = s->queue.front();
    s->queue.pop_front();
    if (w.run && !dry) w.run(w.closure.get());
    if (!w.run && !w.wait) w.event->reached = w.ticket;
}

/* Streams take turns at random until `s` is empty, NULL: until all are; or until the event is reached. */
void drain(CUstream_st *s, const CUevent_st *e = nullptr) {
    uint64_t ticket = e ? e->recorded.load() : 0;
    for (bool idle = true;; idle = false) {
        std::vector<CUstream_st *> able;
        bool left = e && e->reached < ticket;
        for (CUstream_st *other : streams) {
            left |= !e && !other->queue.empty() && (!s || other == s);
            if (can_run(other)) able.push_back(other);
        }
        if (!left) return;
        waits += idle;
        if (able.empty()) {
            fprintf(stderr, "cucpu: streams wait for each other\n");
            exit(86);
        }
        turn = turn * 6364136223846793005ull + 1442695040888963407ull;
        run_head(able[(turn >> 33) % able.size()]);
    }
}

CUstream_st *stream_of(cudaStream_t s) {
    return s ? s : &null_stream;
}

cudaError_t put(cudaStream_t stream, const work &w) {
    CUstream_st *s = stream_of(stream);
    if (s->capture && s->capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
    if (s->capture)
        s->capture->steps.push_back(w);
    else
        s->queue.push_back(w);
    launches += !s->capture && w.run;
    return cudaSuccess;
}

cudaError_t invalidate(CUstream_st *s, cudaError_t e) {
    s->capture->invalid = true;
    return fail(e);
}

/* A call that no capture allows: it fails, and so will the capture. One of another thread only matters
 * to a global one. */
cudaError_t forbidden() {
    cudaError_t e = cudaSuccess;
    if (std::this_thread::get_id() != main_thread)
        return global_captures > 0 ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
    for (CUstream_st *s : streams)
        if (s->capture && s->capture->mode != cudaStreamCaptureModeRelaxed)
            e = invalidate(s, cudaErrorStreamCaptureUnsupported);
    return e;
}
#define NOT_CAPTURED \
    if (cudaError_t refused = forbidden()) return refused

bool is_pinned(const void *p) {
    auto at = pinned.upper_bound((char *)p);
    return at != pinned.begin() && (--at, (char *)p < at->first + at->second);
}

/* Whether n bytes from p on lie in one block of device memory. */
bool is_on_device(const void *p, size_t n) {
    auto at = allocated.upper_bound(p);
    return at != allocated.begin() && (--at, (const char *)p + n <= (const char *)at->first + at->second);
}

void copy_now(void *to, const void *from, size_t n) {
    CHECKED(cucpu_check_host_read(from, n));
    memcpy(to, from, n);
    CHECKED(cucpu_check_host_write(to, n));
}
} // namespace

/* ---- what tests set and ask ------------------------------------------------------------------------------------------ */

void cucpu_set_memory(size_t bytes) {
    memory_size = bytes;
}
void cucpu_drain(cudaStream_t s) {
    drain(stream_of(s));
}
void cucpu_set_devices(int n) {
    devices = n;
}
void cucpu_set_capability(int major_and_minor, int compiled_for) {
    capability = major_and_minor, image = compiled_for;
}
void cucpu_set_driver(int version) {
    driver = version;
}
void cucpu_fail_call(long n) {
    calls = 0, failing_call = n, for_good = false;
}
void cucpu_fail_from(long n) {
    calls = 0, failing_call = n, for_good = true;
}
long cucpu_calls() {
    return calls;
}
bool cucpu_call_fails() {
    return fails();
}
void cucpu_set_dry(bool on) {
    dry = on;
}
long cucpu_launches() {
    return launches;
}
long cucpu_waits() {
    return waits;
}
long cucpu_allocations() {
    return allocations;
}
size_t cucpu_memory_used() {
    return memory_used;
}
size_t cucpu_bytes_out() {
    return bytes_out;
}
size_t cucpu_live_allocations() {
    return allocated.size();
}

/* ---- launches --------------------------------------------------------------------------------------------------------- */

cudaError_t cucpu_enqueue(cudaStream_t stream, void *closure, void (*run)(void *), void (*destroy)(void *)) {
    work w;
    w.closure = std::shared_ptr<void>(closure, destroy), w.run = run;
    return put(stream, w);
}

cudaError_t cucpu_check_launch(const void *kernel, dim3 g, dim3 b, size_t shared_bytes) {
    CALL;
    uint64_t threads = (uint64_t)b.x * b.y * b.z, blocks = (uint64_t)g.x * g.y * g.z;
    size_t limit = opted_in.count(kernel) ? opted_in[kernel] : SHARED_DEFAULT;
    if (!image) return fail(cudaErrorNoKernelImageForDevice);
    if (threads == 0 || blocks == 0 || threads > 1024 || b.z > 64) return fail(cudaErrorInvalidConfiguration);
    if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return fail(cudaErrorInvalidConfiguration);
    if (shared_bytes > limit) return fail(cudaErrorInvalidValue);
    return cudaSuccess;
}

size_t cucpu_shared_most(const void *kernel) {
    return opted_in.count(kernel) ? shared_most() : SHARED_DEFAULT;
}

extern "C" {

cudaError_t cudaGetLastError() {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}

const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess                         ? "no error"
           : e == cudaErrorMemoryAllocation         ? "out of memory"
           : e == cudaErrorNoDevice                 ? "no CUDA-capable device is detected"
           : e == cudaErrorInvalidDevice            ? "invalid device ordinal"
           : e == cudaErrorLaunchFailure            ? "unspecified launch failure"
           : e == cudaErrorInvalidValue             ? "invalid argument"
           : e == cudaErrorInsufficientDriver       ? "CUDA driver version is insufficient for CUDA runtime version"
           : e == cudaErrorNoKernelImageForDevice   ? "no kernel image is available for execution on the device"
           : e == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
           : e == cudaErrorStreamCaptureInvalidated ? "operation failed due to a previous error during capture"
                                                    : "another error";
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    CALL;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > shared_most()) return fail(cudaErrorInvalidValue);
    opted_in[kernel] = (size_t)value;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *of, const void *) {
    CALL;
    if (!image) return fail(cudaErrorNoKernelImageForDevice);
    memset(of, 0, sizeof *of);
    of->ptxVersion = image, of->binaryVersion = capability;
    return cudaSuccess;
}

/* ---- devices ---------------------------------------------------------------------------------------------------------- */

cudaError_t cudaDriverGetVersion(int *version) {
    CALL;
    *version = driver;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    CALL;
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *n) {
    CALL;
    *n = 0;
    if (driver < CUDART_VERSION / 1000 * 1000) return fail(cudaErrorInsufficientDriver);
    *n = (int)devices;
    return devices ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device) {
    CALL;
    return device >= 0 && device < devices ? cudaSuccess : fail(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    CALL;
    if (device >= devices) return fail(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulated GPU");
    p->major = capability / 10, p->minor = capability % 10, p->multiProcessorCount = 4, p->totalGlobalMem = memory_size;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    CALL;
    *available = memory_size > memory_used ? memory_size - memory_used : 0, *total = memory_size;
    return cudaSuccess;
}

/* ---- memory ----------------------------------------------------------------------------------------------------------- */

cudaError_t cudaMalloc(void **p, size_t n) {
    CALL;
    *p = nullptr;
    NOT_CAPTURED;
    if (n > memory_size - memory_used) return fail(cudaErrorMemoryAllocation);
#ifdef CUCPU_CHECK
    *p = cucpu_check_malloc(n);
#else
    *p = aligned_alloc(256, (n + 255) / 256 * 256);
#endif
    if (!*p) return fail(cudaErrorMemoryAllocation);
    memset(*p, 0xff, n);
    memory_used += n, allocated[*p] = n, allocations++;
    return cudaSuccess;
}

/* After a failure for good it fails, too; but here its memory is needed again. */
cudaError_t cudaFree(void *p) {
    bool failed = fails();
    if (failed && !for_good) return fail(failure);
    if (!p) return cudaSuccess;
    NOT_CAPTURED;
    drain(nullptr);
    if (!allocated.count(p)) return fail(cudaErrorInvalidValue);
    memory_used -= allocated[p], allocated.erase(p);
#ifdef CUCPU_CHECK
    cucpu_check_free(p);
#else
    free(p);
#endif
    return failed ? fail(failure) : cudaSuccess;
}

cudaError_t cudaMallocHost(void **p, size_t n) {
    CALL;
    NOT_CAPTURED;
    *p = malloc(n ? n : 1);
    if (!*p) return fail(cudaErrorMemoryAllocation);
    memset(*p, 0xff, n);
    pinned[(char *)*p] = n;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p) {
    bool failed = fails();
    if (failed && !for_good) return fail(failure);
    if (!p) return cudaSuccess;
    NOT_CAPTURED;
    drain(nullptr);
    pinned.erase((char *)p);
    free(p);
    return failed ? fail(failure) : cudaSuccess;
}

/* As the runtime does: pageable memory is read before the call returns, and written before it returns; pinned memory
 * whenever the stream gets there. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t stream) {
    CALL;
    CUstream_st *s = stream_of(stream);
    if (kind != cudaMemcpyDeviceToHost && !is_on_device(to, n)) return fail(cudaErrorInvalidValue);
    if (kind != cudaMemcpyHostToDevice && !is_on_device(from, n)) return fail(cudaErrorInvalidValue);
    if (kind == cudaMemcpyDeviceToHost) bytes_out += n;
    if (kind == cudaMemcpyHostToDevice && !is_pinned(from)) {
        if (s->capture) return invalidate(s, cudaErrorStreamCaptureUnsupported);
        std::vector<char> bytes((const char *)from, (const char *)from + n);
        return cucpu_submit(stream, [=] { copy_now(to, bytes.data(), n); });
    }
    if (kind == cudaMemcpyDeviceToHost && !is_pinned(to)) {
        if (s->capture) return invalidate(s, cudaErrorStreamCaptureUnsupported);
        drain(s);
        copy_now(to, from, n);
        return cudaSuccess;
    }
    return cucpu_submit(stream, [=] { copy_now(to, from, n); });
}

/* Pinned memory too has an address on the device. */
cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t stream) {
    CALL;
    if (!is_on_device(p, n) && !is_pinned(p)) return fail(cudaErrorInvalidValue);
    return cucpu_submit(stream, [=] {
        memset(p, value, n);
        CHECKED(cucpu_check_host_write(p, n));
    });
}

/* ---- streams, events, graphs ------------------------------------------------------------------------------------------ */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    CALL;
    streams.push_back(*s = new CUstream_st());
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    CALL;
    *least = 0, *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int) {
    return cudaStreamCreateWithFlags(s, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t s) {
    CALL;
    drain(s);
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i] == s) streams.erase(streams.begin() + (long)i);
    delete s;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    CALL;
    NOT_CAPTURED; /* of any stream */
    drain(stream_of(s));
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    CALL;
    NOT_CAPTURED;
    drain(nullptr);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    CALL;
    *e = new CUevent_st();
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t e) {
    CALL;
    drain(nullptr);
    delete e;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    CALL;
    e->captured = stream_of(s)->capture;
    if (e->captured) return cudaSuccess; /* one stream's order is the graph's */
    work w;
    w.event = e, w.ticket = ++e->recorded;
    return put(s, w);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    CALL;
    bool inside = stream_of(s)->capture;
    if (inside && e->captured) return cudaSuccess;
    if (inside) return invalidate(stream_of(s), cudaErrorStreamCaptureIsolation);
    if (e->captured) return fail(cudaErrorNotSupported); /* a second stream of one capture */
    work w;
    w.event = e, w.ticket = e->recorded, w.wait = true;
    return put(s, w);
}

/* Runs nothing: whatever is in the streams goes on when the first thread waits. */
cudaError_t cudaEventQuery(cudaEvent_t e) {
    CALL;
    NOT_CAPTURED;
    return e->reached < e->recorded ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    CALL;
    NOT_CAPTURED;
    if (e->captured) return fail(cudaErrorCapturedEvent);
    drain(nullptr, e);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
    CALL;
    if (!s) return fail(cudaErrorStreamCaptureUnsupported);
    if (s->capture) return fail(cudaErrorIllegalState);
    s->capture = new CUgraph_st();
    s->capture->mode = mode;
    global_captures += mode == cudaStreamCaptureModeGlobal;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
    CUgraph_st *ended = s->capture;
    bool broken = fails(), good = ended && !ended->invalid && !broken;
    *g = good ? ended : nullptr, s->capture = nullptr; /* it ends all the same */
    global_captures -= ended && ended->mode == cudaStreamCaptureModeGlobal;
    if (good) return cudaSuccess;
    cudaError_t e = broken ? failure : ended ? cudaErrorStreamCaptureInvalidated : cudaErrorIllegalState;
    delete ended;
    return fail(e);
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long) {
    CALL;
    *e = new CUgraphExec_st();
    (*e)->steps = g->steps;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    CALL;
    delete g;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) {
    CALL;
    drain(nullptr);
    delete e;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) {
    CALL;
    if (stream_of(s)->capture) return invalidate(stream_of(s), cudaErrorStreamCaptureUnsupported);
    stream_of(s)->queue.insert(stream_of(s)->queue.end(), e->steps.begin(), e->steps.end());
    launches++;
    return cudaSuccess;
}
}
