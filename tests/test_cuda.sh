#!/bin/sh
# The kernels of gated_attention_cuda.cuh, on the CPU through tests/cuda/cuda_cpu.h; needs the CUDA headers, no GPU.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
include=$(make -s print-CUDA_INCLUDE)
if [ -z "$include" ]; then
    skip "the kernels (cuda_runtime.h and cublasLt.h are not here; Debian: nvidia-cuda-dev, or NVIDIA's toolkit)"
    finish
fi

programs="build/cuda/cuda_cpu build/cuda/sdpa_cpu build/cuda/checked/cuda_cpu build/cuda/checked/sdpa_cpu build/cuda/checked/accesses_cpu build/cuda/cudnn/sdpa_cpu build/cuda/train_cpu build/cuda/analyze_cpu"
nccl=$(make -s print-CUDA_NCCL)
[ -n "$nccl" ] && programs="$programs build/cuda/ranks_cpu build/cuda/checked/ranks_cpu"
# shellcheck disable=SC2086 # a list
if make -s $programs >build/log/cuda-build.log 2>&1; then ok "builds"; else
    bad "builds" && head -n 20 build/log/cuda-build.log
    finish
fi
rm -f build/cuda/*.gcda
cmocka "kernels on the CPU" build/cuda/cuda_cpu
for CUCPU_SEED in 0 1 3; do # in order, in reverse, at random
    export CUCPU_SEED
    cmocka "kernels on the CPU, order $CUCPU_SEED" build/cuda/cuda_cpu 'test_*' 'test_training*'
    cmocka "attention on the CPU, order $CUCPU_SEED" build/cuda/sdpa_cpu
done
unset CUCPU_SEED
cmocka "kernels with the checker" build/cuda/checked/cuda_cpu 'test_*' 'test_training*'
cmocka "attention with the checker" build/cuda/checked/sdpa_cpu
cmocka "sectors and bank conflicts" build/cuda/checked/accesses_cpu
cmocka "attention by what stands for cuDNN" build/cuda/cudnn/sdpa_cpu 'test_cudnn*'
if [ -n "$nccl" ]; then
    cmocka "ranks on the CPU" build/cuda/ranks_cpu
    cmocka "ranks with the checker" build/cuda/checked/ranks_cpu 'test_*' 'test_training*'
    cmocka "ranks by the environment" tests/cuda/ranks.sh build/cuda/train_cpu more
else
    skip "ranks (nccl.h is not here; Debian: libnccl-dev, or NVIDIA's package)"
fi

check "a run goes from the CPU to the GPU and back" sh tests/cuda/resume.sh build/cuda/train_cpu
check "an analysis on the GPU is that on the CPU" sh tests/cuda/analysis.sh build/cuda/train_cpu build/cuda/analyze_cpu

# Lines of the companion that ran: gcov names each template's copies; a line counts once.
gcov -r -t -o build/cuda build/cuda/kernels_cpu.o >build/cuda/coverage 2>build/log/cuda-coverage.log
coverage=$(awk -F: '/0:Source:/ { ours = $4 ~ /cuh$/ } ours && /^ *[0-9=#]/ { all[$2] = 1; if ($1 !~ /[#=]/) ran[$2] = 1 }
    END { for (l in all) n++; for (l in ran) r++; printf "%d %d %.1f", r, n, n ? 100 * r / n : 0 }' \
    build/cuda/coverage)
set -- $coverage
echo "coverage: $1 of $2 lines of gated_attention_cuda.cuh, $3 %"
if [ "$(echo "$3" | cut -d. -f1)" -ge 95 ]; then ok "coverage above 95 %"; else bad "coverage above 95 %"; fi

# The programs find the companion beside them, but read it, and cuBLAS, only where there is a driver: here an empty one.
if [ -n "$(make -s print-NVCC)" ]; then
    check "train with the companion builds" make -s train
    mkdir "$work/driver"
    ${CC:-cc} -shared -x c /dev/null -o "$work/driver/libcuda.so.1"
    prints "the companion is loaded" 2 "gated_attention_cuda.cuh:" \
        env LD_LIBRARY_PATH="$work/driver" ./train configs/quick.cfg --dry-run device=cuda
    check "cuBLAS waits for a driver" sh -c "! ldd ./train | grep cublas"
    printf '#!/bin/sh\necho "Failed to initialize NVML: Driver/library version mismatch"\nexit 18\n' >"$work/driver/nvidia-smi"
    chmod +x "$work/driver/nvidia-smi"
    check "a driver that does not work is no GPU to compile for" \
        sh -c '[ -z "$(PATH=$1:$PATH make -s print-CUDA_GPU)" ]' sh "$work/driver"
else
    skip "how the companion is loaded (nvcc is not here)"
fi

# Every architecture, where nvcc is.
tests/cuda/static.sh >build/log/cuda-static.log 2>&1
tally build/log/cuda-static.log $?
grep -v '^ok' build/log/cuda-static.log
passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
finish
