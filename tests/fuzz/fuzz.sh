#!/bin/sh
# The parsers under libFuzzer, with the address and undefined-behaviour sanitizers.
#     tests/fuzz/fuzz.sh SECONDS [TARGET ...]     SECONDS for each target, from tests/fuzz/seeds; all targets by default
# What a target finds new stays in build/fuzz/corpus/TARGET for the next run; an input that breaks it becomes
# build/fuzz/TARGET-*, and FUZZ_TARGET=TARGET build/fuzz/fuzz FILE runs it again. Prints a line for each target, and after
# runs of a minute or more which share of the lines of the functions that it reached.
set -u
cd "$(dirname "$0")/../.." || exit 1
. tests/testing.sh
seconds=${1:-60}
[ $# -eq 0 ] || shift
out=build/fuzz
mkdir -p "$out"
FUZZ_DIRECTORY=$work # files that change a thousand times a second
if [ -w /dev/shm ]; then
    FUZZ_DIRECTORY=$(mktemp -d /dev/shm/fuzz.XXXXXX) || exit 1
    trap 'rm -rf "$work" "$FUZZ_DIRECTORY"' EXIT
fi
export FUZZ_DIRECTORY
compiler=${FUZZ_CC:-clang}
if ! printf 'int LLVMFuzzerTestOneInput(const char*d,unsigned long n){return n>9&&d[9]==1;}\n' |
    $compiler -fsanitize=fuzzer,address,undefined -x c - -o "$out/try" 2> /dev/null; then
    skip "fuzzing ($compiler has no libFuzzer; Debian: clang and libclang-rt-dev)"
    finish
fi

flags=${FUZZ_FLAGS-$(make -s print-TEXT 2> /dev/null)} libs=${FUZZ_LIBS-$(make -s print-TEXT_LIBS 2> /dev/null)}

# build PROGRAM FLAGS
build() { $compiler -std=c11 -gline-tables-only -O1 $2 $flags tests/fuzz/fuzz.c -o "$1" $libs -lm; }

# coverage TARGET: by what its corpus and seeds reach
coverage() {
    profdata=$(command -v llvm-profdata || ls /usr/bin/llvm-profdata-* 2> /dev/null | tail -n 1)
    cov=$(command -v llvm-cov || ls /usr/bin/llvm-cov-* 2> /dev/null | tail -n 1)
    [ -n "$profdata" ] && [ -n "$cov" ] || return 0
    [ "$out/cov" -nt gated_attention.h ] ||
        build "$out/cov" "-fsanitize=fuzzer -fprofile-instr-generate -fcoverage-mapping" 2> /dev/null || return 0
    LLVM_PROFILE_FILE=$out/$1.profraw FUZZ_TARGET=$1 "$out/cov" -runs=0 "$out/corpus/$1" "tests/fuzz/seeds/$1" > /dev/null 2>&1
    "$profdata" merge -sparse "$out/$1.profraw" -o "$out/$1.profdata" 2> /dev/null || return 0
    "$cov" report "$out/cov" -instr-profile="$out/$1.profdata" -show-functions gated_attention.h data/*.h drivers/*.h drivers/*/*.h tests/fuzz/fuzz_*.c \
        2> /dev/null | awk '$5 > $6 && $5 ~ /^[0-9]+$/ && $1 != "TOTAL" { all += $5; missed += $6; n++ }
            END { if (all) printf "     it reaches %d functions, and in them %.1f %% of %d lines\n", n, 100 * (all - missed) / all, all }'
}

if ! build "$out/fuzz" "-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all" > "$out/build.log" 2>&1; then
    bad "tests/fuzz/fuzz.c" "$(grep -m 1 error "$out/build.log")"
    finish
fi
[ $# -gt 0 ] || set -- $(ls tests/fuzz/fuzz_*.c | sed 's|.*/fuzz_\(.*\)\.c|\1|')
for target; do
    mkdir -p "$out/corpus/$target"
    dictionary=tests/fuzz/json.dict
    [ ! -e "tests/fuzz/$target.dict" ] || dictionary=tests/fuzz/$target.dict
    log=$out/$target.log
    FUZZ_TARGET=$target "$out/fuzz" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=8192 \
        -dict="$dictionary" -artifact_prefix="$out/$target-" -print_final_stats=1 "$out/corpus/$target" \
        "tests/fuzz/seeds/$target" > "$log" 2>&1
    status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
    edges=$(grep -o 'cov: [0-9]* ft: [0-9]* corp: [0-9]*' "$log" | tail -n 1)
    if [ $status -eq 0 ] && [ "${runs:-0}" -gt 0 ]; then ok "$target: $runs runs, ${edges:-no coverage}"; else
        bad "$target: ${runs:-0} runs" "$(grep -m 3 -E 'error:|ERROR|fuzz_.*:[0-9]+:' "$log")"
    fi
    [ "$seconds" -lt 60 ] || coverage "$target"
done
finish
