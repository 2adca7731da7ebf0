#!/bin/sh
# make test-cuda: the companion on the GPU that is here, against plain C; then with compute-sanitizer.
set -u
cd "$(dirname "$0")/../.." || exit 1
export TEST_GPU=1
. tests/testing.sh
nvcc=$(make -s print-NVCC)
if [ -z "$nvcc" ]; then
    echo "no nvcc here (NVCC=PATH says where it is): the programs are built without CUDA"
    exit 1
fi
PATH=$PATH:$(dirname "$(realpath "$nvcc")") # compute-sanitizer lies beside it
if ! nvidia-smi -L 2>/dev/null; then
    echo "no NVIDIA GPU here; make test runs the same tests on the CPU"
    exit 1
fi
prints "train uses the GPU" 0 "^device *cuda, " ./train tests/cuda/tiny.cfg --dry-run
grep '^device' "$work/.said"
[ "$failed" -eq 0 ] || finish
for test in cuda sdpa; do cmocka "$test on the GPU" build/cuda/${test}_gpu; done
if [ -z "$(make -s print-CUDNN_FRONTEND)" ]; then
    skip "cuDNN's attention (its frontend is not here: pip install nvidia-cudnn-frontend)"
elif ! echo 'int main(void) { return 0; }' | ${CC:-cc} -x c - -o "$work/cudnn" -L"$(make -s print-CUDA_LIB)" -lcudnn 2>/dev/null; then
    skip "cuDNN's attention (libcudnn is not here)"
else
    check "builds with cuDNN" make -s CUDNN=1 BUILD=build/cudnn build/cudnn/cuda/sdpa_gpu
    cmocka "sdpa by cuDNN on the GPU" build/cudnn/cuda/sdpa_gpu
fi
check "a run goes from the CPU to the GPU and back" sh tests/cuda/resume.sh ./train
check "an analysis on the GPU is that on the CPU" sh tests/cuda/analysis.sh ./train ./analyze
if [ "$(nvidia-smi -L | grep -c '^GPU ')" -lt 2 ]; then
    skip "ranks (they need two GPUs; here is one)"
else
    cmocka "ranks on two GPUs" tests/cuda/ranks.sh ./train
fi
if command -v compute-sanitizer >/dev/null 2>&1; then
    filter=--kernel-name # --kernel-regex until 2023
    compute-sanitizer --help | grep -q -e "$filter" || filter=--kernel-regex
    for tool in memcheck racecheck initcheck synccheck; do
        options=
        case $tool in # cuBLAS's own kernels are not ours to judge, but initcheck must see what they write
        racecheck) options="--racecheck-detect-level error $filter kns=gai_k_" ;;
        synccheck) options="$filter kns=gai_k_" ;;
        esac
        for test in cuda sdpa; do
            log=build/log/gpu-$test-$tool.log
            # shellcheck disable=SC2086 # a list
            compute-sanitizer --tool $tool $options --error-exitcode 9 build/cuda/${test}_gpu 'test_*' 'test_training*' >$log 2>&1
            tally $log $?
            if [ "$f" -eq 0 ]; then ok "$test under $tool: $p tests"; else bad "$test under $tool" "$(grep -m 3 '=========' $log)"; fi
        done
    done
else
    skip "compute-sanitizer (it comes with the CUDA toolkit)"
fi
finish
