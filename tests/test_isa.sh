#!/bin/sh
# The fixtures from PyTorch, training and analysis with each instruction set that this processor has, forced by GA_ISA.
# (Operator by operator: test_x86.c; AMX without the hardware: test_amx.c.)
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
make -s build/test_fixtures build/test_analysis || exit 1
best=
for isa in amx avx512bf16 avx512 avx2 c; do
    export GA_ISA=$isa
    if ! ./train configs/quick.cfg --dry-run >"$work/why" 2>&1; then
        if grep -q '^train: .*has no such instructions$' "$work/why"; then skip "$isa (this processor does not have it)"; else
            bad "$isa" "$(cat "$work/why")"
        fi
        continue
    fi
    cmocka "$isa test_fixtures" build/test_fixtures
    cmocka "$isa test_analysis" build/test_analysis
    if [ -z "$best" ]; then # these scripts ran with it: it is the one that is taken where GA_ISA names none
        best=$isa
        continue
    fi
    check "$isa test_train.sh" tests/test_train.sh --runs
    check "$isa test_analyze.sh" tests/test_analyze.sh --figures
done
finish
