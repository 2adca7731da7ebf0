/* drivers/device.h - which device the keys `device`, `use_amp` and `tf32` mean, and why.
 *
 *     device_choice choice;
 *     if (!device_open(&choice, &config, 0, &e)) puts(e.text);
 *     printf("%s (%s)\n", choice.device.name, choice.why);
 *     ...
 *     device_close(&choice);
 *
 * Needs gated_attention.h, gated_attention_x86.h and common.h before it. With GA_CUDA also gated_attention_cuda.cuh,
 * and the program is linked with that companion. With GA_CUDA_LIBRARY, the name of a shared object which the
 * Makefile has made of it, it is loaded where there is a driver: cuBLAS takes a tenth of a second and 150 MB
 * wherever it is loaded.
 */
#ifndef DRIVERS_DEVICE_H
#define DRIVERS_DEVICE_H

#include <limits.h>
#include <stdio.h>
#include <string.h>
#ifdef GA_CUDA_LIBRARY
#include <dlfcn.h>
#endif

typedef struct {
    ga_device device;
    bool cuda, bf16;
    ga_ranks ranks; /* that GPUs exchange with, after ranks_join */
    /* Of the companion that made them. */
    void (*destroy)(ga_device *);
    void (*leave)(ga_ranks *, bool failed);
    const char *(*unrecorded)(const ga_device *); /* why it launches kernel by kernel; NULL: it records no passes */
    char why[640];
} device_choice;

/* The end of the ranks' exchanges; failed: without waiting for anybody. */
static void device_leave(device_choice *d, bool failed) {
    if (d->leave) d->leave(&d->ranks, failed);
    d->leave = NULL;
}

static void device_close(device_choice *d) {
    device_leave(d, false);
    if (d->destroy) d->destroy(&d->device);
}

#if defined(GA_CUDA) || defined(GA_CUDA_LIBRARY)
typedef struct {
    ga_result (*create)(ga_device *, ga_cuda_settings, ga_error *);
    void (*destroy)(ga_device *);
    bool (*bf16)(const ga_device *);
    const char *(*unrecorded)(const ga_device *);
    ga_result (*join)(ga_ranks *, ga_device *, const ga_cuda_ranks_settings *, ga_error *);
    void (*leave)(ga_ranks *, bool);
} device_cuda;
#endif

#ifdef GA_CUDA
static bool device_find_cuda(device_cuda *cuda, ga_error *e) {
    (void)e;
    *cuda = (device_cuda){ga_device_cuda, ga_device_cuda_destroy, ga_device_cuda_bf16, ga_device_cuda_unrecorded,
                          ga_ranks_cuda,  ga_ranks_cuda_destroy};
    return true;
}
#elif defined(GA_CUDA_LIBRARY)
/* The driver first: where there is none, the companion and cuBLAS need not be read at all. They stay to the end. */
static bool device_find_cuda(device_cuda *cuda, ga_error *e) {
    if (!dlopen("libcuda.so.1", RTLD_LAZY)) return fail_with(e, GA_ERR_DEVICE, "no NVIDIA driver: %.400s", dlerror());
    void *library = dlopen(GA_CUDA_LIBRARY, RTLD_NOW);
    const struct {
        const char *name;
        void **call;
    } symbols[] = {
        {"ga_device_cuda", (void **)&cuda->create},    {"ga_device_cuda_destroy", (void **)&cuda->destroy},
        {"ga_device_cuda_bf16", (void **)&cuda->bf16}, {"ga_device_cuda_unrecorded", (void **)&cuda->unrecorded},
        {"ga_ranks_cuda", (void **)&cuda->join},       {"ga_ranks_cuda_destroy", (void **)&cuda->leave}};
    bool whole = library != NULL;
    for (size_t i = 0; whole && i < sizeof symbols / sizeof symbols[0]; i++)
        whole = (*symbols[i].call = dlsym(library, symbols[i].name)) != NULL;
    return whole || fail_with(e, GA_ERR_DEVICE, "%.500s", dlerror());
}
#endif

/* The GPU, when it is wanted and there; `e` says why not. */
static bool device_open_cuda(device_choice *d, size_t gpu, bool bf16, bool tf32, ga_error *e) {
#if defined(GA_CUDA) || defined(GA_CUDA_LIBRARY)
    ga_cuda_settings settings = {.index = gpu < INT_MAX ? (int)gpu : INT_MAX, .bf16 = bf16, .tf32 = tf32};
    device_cuda cuda;
    if (!device_find_cuda(&cuda, e) || cuda.create(&d->device, settings, e) != GA_OK) return false;
    d->cuda = true, d->destroy = cuda.destroy, d->unrecorded = cuda.unrecorded, d->bf16 = cuda.bf16(&d->device);
    return true;
#else
    (void)d, (void)gpu, (void)bf16, (void)tf32;
    return fail_with(e, GA_ERR_DEVICE, "this program is built without CUDA");
#endif
}

static bool device_open_cpu(device_choice *d, bool bf16, ga_error *e) {
    ga_x86_settings settings = {NULL, bf16};
    if (ga_device_x86(&d->device, settings, e) != GA_OK) return false;
    d->destroy = ga_device_x86_destroy, d->bf16 = ga_device_x86_bf16(&d->device);
    return true;
}

/* gpu: as CUDA counts them. */
static bool device_open(device_choice *d, const ga_config *c, size_t gpu, ga_error *e) {
    char device[16], use_amp[16];
    ga_config_get(c, "device", device, sizeof device);
    ga_config_get(c, "use_amp", use_amp, sizeof use_amp);
    bool bf16 = strcmp(use_amp, "off") != 0;
    ga_error no_gpu = {GA_OK, ""};
    memset(d, 0, sizeof *d);
    if (strcmp(device, "cpu") != 0 && device_open_cuda(d, gpu, bf16, c->tf32, &no_gpu))
        snprintf(d->why, sizeof d->why, "device = %s", device);
    else if (strcmp(device, "cuda") == 0)
        return fail_with(e, no_gpu.result, "device = cuda: no CUDA device can be used: %.400s", no_gpu.text);
    else if (!device_open_cpu(d, bf16, e))
        return false;
    else if (strcmp(device, "cpu") == 0)
        snprintf(d->why, sizeof d->why, "device = cpu");
    else
        snprintf(d->why, sizeof d->why, "device = auto: %.500s", no_gpu.text);
    if (strcmp(use_amp, "on") != 0 || d->bf16) return true;
    gai_fail(e, GA_ERR_CONFIG, "use_amp = on: the device (%s) has no bfloat16 products; auto takes float32",
             d->device.name);
    device_close(d);
    memset(d, 0, sizeof *d);
    return false;
}

#endif
