#!/bin/sh
# make test-cuda: the companion on the GPU that is here, against plain C; then with compute-sanitizer.
set -u
cd "$(dirname "$0")/../.."
passed=0 failed=0
ok() { echo "ok $1" && passed=$((passed + 1)); }
bad() { echo "FAIL $1" && failed=$((failed + 1)); }
if ! nvidia-smi -L 2>/dev/null; then
    echo "no NVIDIA GPU here; make test runs the same tests on the CPU"
    exit 1
fi
mkdir -p build/log
for test in cuda sdpa; do
    log=build/log/gpu-$test.log
    if build/cuda/${test}_gpu >$log 2>&1; then ok "$test: $(grep -c '^\[       OK \]' $log) tests"; else bad "$test" && tail -n 5 $log; fi
done
if sh tests/cuda/resume.sh ./train; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
if command -v compute-sanitizer >/dev/null 2>&1; then
    for tool in memcheck racecheck initcheck synccheck; do
        for test in cuda sdpa; do
            log=build/log/gpu-$test-$tool.log
            if compute-sanitizer --tool $tool --error-exitcode 9 build/cuda/${test}_gpu 'test_*' 'test_training*' >$log 2>&1; then
                ok "$test under $tool"
            else
                bad "$test under $tool" && grep -m 3 '=========' $log
            fi
        done
    done
else
    echo "skipped: compute-sanitizer is not here (it comes with the CUDA toolkit)"
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
