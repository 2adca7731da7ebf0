/* cuda_cpu_control.h - what a test can set and ask of the emulated runtime. */
#ifndef CUDA_CPU_CONTROL_H
#define CUDA_CPU_CONTROL_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif
void cucpu_set_memory(size_t bytes); /* of the device */
void cucpu_set_devices(int n);
/* 89 is 8.9; what kernels were compiled for, 0: nothing that this device can run. */
void cucpu_set_capability(int major_and_minor, int compiled_for);
void cucpu_set_driver(int version); /* the newest CUDA that it knows, as 1000 * major + 10 * minor */
void cucpu_fail_call(long n);       /* the n-th call of a library from now on fails; 0: none */
void cucpu_fail_from(long n);       /* and all after it, as when a kernel has gone wrong */
long cucpu_calls(void);             /* since then */
bool cucpu_call_fails(void);        /* for the libraries beside the runtime: counts a call */
long cucpu_allocations(void);       /* of device memory, ever */
size_t cucpu_live_allocations(void);
size_t cucpu_memory_used(void);
size_t cucpu_bytes_out(void); /* copied to the host, ever */
long cucpu_kernels_run(void);
long cucpu_cudnn_runs(void); /* of cuDNN's attention, ever */
long cucpu_launches(void);   /* of kernels, copies and graphs, that the host has put into streams, ever */
long cucpu_waits(void);      /* of the host, for a stream that had work left, ever */
void cucpu_set_dry(bool on); /* streams take work, and do not do it: to count launches of large models */

/* What a kernel's accesses to memory cost: cuda_cpu_count.cpp, in programs with the checker. */
typedef struct {
    char kernel[64];
    size_t launches;
    size_t requests, sectors, least_sectors;              /* of warps to global memory; 32 bytes each */
    size_t shared_requests, wavefronts, least_wavefronts; /* to shared memory */
} cucpu_traffic;
void cucpu_count(bool on);                            /* from the next kernel on */
size_t cucpu_counted(cucpu_traffic *to, size_t most); /* by name, since the last time; how many */

void cucpu_fail_async(void); /* the communicators of NCCL find that something has gone wrong */
#ifdef __cplusplus
}
#endif

#endif
