#!/usr/bin/env bash
# The fixtures from PyTorch, training and analysis with each instruction set that this processor has, forced by GA_ISA.
# (Operator by operator: test_x86.c; AMX without the hardware: test_amx.c.)
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
for isa in c avx2 avx512 avx512bf16 amx; do
    export GA_ISA=$isa
    if ! ./train configs/quick.cfg --dry-run >/dev/null 2>&1; then
        skip "$isa (this processor does not have it)"
        continue
    fi
    for test in build/test_fixtures build/test_analysis tests/test_train.sh tests/test_analyze.sh; do
        log=build/log/isa_${isa}_$(basename "$test" .sh).log
        if "./$test" >"$log" 2>&1; then
            echo "ok $isa $test" && passed=$((passed + 1))
        else
            echo "FAIL $isa $test" && failed=$((failed + 1)) && grep -E 'FAIL|not below' "$log" | head -n 3
        fi
    done
done
finish
