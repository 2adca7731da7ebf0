#!/bin/sh
# The kernels of gated_attention_cuda.cuh, on the CPU through tests/cuda/cuda_cpu.h; needs the CUDA headers, no GPU.
set -u
cd "$(dirname "$0")/.."
passed=0 failed=0
ok() { echo "ok $1" && passed=$((passed + 1)); }
bad() { echo "FAIL $1" && failed=$((failed + 1)); }
include=$(make -s print-CUDA_INCLUDE)
if [ -z "$include" ]; then
    echo "skipped: the CUDA headers (cuda_runtime.h, cublas_v2.h) are not here; Debian: nvidia-cuda-dev, or NVIDIA's toolkit"
    echo "0 passed, 0 failed (skipped)"
    exit 0
fi

# run NAME PROGRAM [FILTER]: a cmocka program; each of its tests counts
run() {
    log="build/log/cuda-$1.log"
    "$2" ${3+"$3"} >"$log" 2>&1
    status=$?
    p=$(grep -c '^\[       OK \]' "$log")
    f=$(grep '^\[  FAILED  \] [a-zA-Z_]' "$log" | sort -u | wc -l)
    [ "$status" -ne 0 ] && [ "$f" -eq 0 ] && f=1
    echo "$1: $p passed, $f failed"
    [ "$f" -eq 0 ] || { grep -E '^\[ +(ERROR|FAILED)|^cucpu' "$log" | head -n 10 | sed 's/^/FAIL /'; }
    passed=$((passed + p)) failed=$((failed + f))
}

mkdir -p build/log
if make -s build/cuda/test_cpu build/cuda/sdpa_cpu build/cuda/checked/sdpa_cpu >build/log/cuda-build.log 2>&1; then ok "builds"; else
    bad "builds" && head -n 20 build/log/cuda-build.log
    echo "$passed passed, $failed failed"
    exit 1
fi
run "on the CPU" build/cuda/test_cpu
for CUCPU_SEED in 0 1 3; do # in order, in reverse, at random
    export CUCPU_SEED
    run "attention on the CPU, order $CUCPU_SEED" build/cuda/sdpa_cpu
done
unset CUCPU_SEED
run "attention with the checker" build/cuda/checked/sdpa_cpu
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
