/* MKL, with which PyTorch for x86 is linked, asks this function whether the processor is Intel's, and takes its AVX2
 * kernels on others, AVX-512 or not: half the speed of float32 products. torch.sh preloads this answer; which
 * instructions there are MKL finds out by itself. */
int mkl_serv_intel_cpu_true(void);
int mkl_serv_intel_cpu_true(void) {
    return 1;
}
