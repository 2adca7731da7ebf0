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

# run NAME PROGRAM [FILTER [SKIP]]: a cmocka program; each of its tests counts
run() {
    log="build/log/cuda-$1.log"
    "$2" ${3+"$3"} ${4+"$4"} >"$log" 2>&1
    status=$?
    p=$(grep -c '^\[       OK \]' "$log")
    f=$(grep '^\[  FAILED  \] [a-zA-Z_]' "$log" | sort -u | wc -l)
    [ "$status" -ne 0 ] && [ "$f" -eq 0 ] && f=1
    echo "$1: $p passed, $f failed"
    [ "$f" -eq 0 ] || { grep -E '^\[ +(ERROR|FAILED)|^cucpu' "$log" | head -n 10 | sed 's/^/FAIL /'; }
    passed=$((passed + p)) failed=$((failed + f))
}

mkdir -p build/log
programs="build/cuda/cuda_cpu build/cuda/sdpa_cpu build/cuda/checked/cuda_cpu build/cuda/checked/sdpa_cpu build/cuda/train_cpu"
# shellcheck disable=SC2086 # a list
if make -s $programs >build/log/cuda-build.log 2>&1; then ok "builds"; else
    bad "builds" && head -n 20 build/log/cuda-build.log
    echo "$passed passed, $failed failed"
    exit 1
fi
rm -f build/cuda/*.gcda
run "on the CPU" build/cuda/cuda_cpu
for CUCPU_SEED in 0 1 3; do # in order, in reverse, at random
    export CUCPU_SEED
    run "on the CPU, order $CUCPU_SEED" build/cuda/cuda_cpu 'test_*' 'test_training*'
    run "attention on the CPU, order $CUCPU_SEED" build/cuda/sdpa_cpu
done
unset CUCPU_SEED
run "with the checker" build/cuda/checked/cuda_cpu 'test_*' 'test_training*'
run "attention with the checker" build/cuda/checked/sdpa_cpu

if sh tests/cuda/resume.sh build/cuda/train_cpu; then passed=$((passed + 1)); else failed=$((failed + 1)); fi

# Lines of the companion that ran: gcov names each template's copies; a line counts once.
gcov -r -t -o build/cuda build/cuda/kernels_cpu.o >build/cuda/coverage 2>build/log/cuda-coverage.log
coverage=$(awk -F: '/0:Source:/ { ours = $4 ~ /cuh$/ } ours && /^ *[0-9=#]/ { all[$2] = 1; if ($1 !~ /[#=]/) ran[$2] = 1 }
    END { for (l in all) n++; for (l in ran) r++; printf "%d %d %.1f", r, n, n ? 100 * r / n : 0 }' \
    build/cuda/coverage)
set -- $coverage
echo "coverage: $1 of $2 lines of gated_attention_cuda.cuh, $3 %"
if [ "$(echo "$3" | cut -d. -f1)" -ge 95 ]; then ok "coverage above 95 %"; else bad "coverage above 95 %"; fi

# The programs find the companion beside them, but read it, and cuBLAS, only where there is a driver: here an empty one.
if [ -n "$(make -s print-NVCC)" ] && make -s train >build/log/cuda-train.log 2>&1; then
    driver=$(mktemp -d)
    printf '' | ${CC:-cc} -shared -x c - -o "$driver/libcuda.so.1"
    why=$(LD_LIBRARY_PATH=$driver ./train configs/quick.cfg --dry-run device=cuda 2>&1)
    rm -r "$driver"
    case $why in *gated_attention_cuda.cuh:*) ok "the companion is loaded" ;; *) bad "the companion is not loaded: $why" ;; esac
    if ldd ./train | grep -q cublas; then bad "cuBLAS is loaded without a driver"; else ok "cuBLAS waits for a driver"; fi
fi

# Every architecture, where nvcc is.
tests/cuda/static.sh >build/log/cuda-static.log
grep -v '^ok' build/log/cuda-static.log
passed=$((passed + $(grep -c '^ok' build/log/cuda-static.log)))
failed=$((failed + $(grep -c '^FAIL' build/log/cuda-static.log)))
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
