/* device.h - the GPU under test, or its emulation by cuda_cpu.h. Include it after testing.h and
 * gated_attention_cuda.cuh, in one file of a program. */
#ifndef CUDA_TEST_DEVICE_H
#define CUDA_TEST_DEVICE_H

static ga_device device; /* of the test that runs */
static bool bf16;        /* whether its products read bfloat16 */

static void open_device_with(ga_cuda_settings settings) {
    ga_error e;
    expect_ok(ga_device_cuda(&device, settings, &e), &e);
    bf16 = ga_device_cuda_bf16(&device);
}

static void open_device(bool with_bf16) {
    open_device_with((ga_cuda_settings){.bf16 = with_bf16});
}

static void close_device(void) {
    ga_error e;
    expect_ok(device.status(device.state, &e), &e);
    ga_device_cuda_destroy(&device);
}

#endif
