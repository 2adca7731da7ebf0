#!/bin/sh
# The tests under the address, undefined-behaviour and thread sanitizers.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
out=build/sanitize
mkdir -p "$out"
text="$(make -s print-TEXT) $(make -s print-TEXT_LIBS)"

# clean NAME COMPILER FLAGS TEST...: the test programs, built so, find nothing; the runs' environment comes from the caller
clean() {
    name=$1 compiler=$2 flags=$3
    shift 3
    for test; do
        log=$out/$name-$test.log
        # shellcheck disable=SC2086 # lists of flags
        if $compiler -std=c11 -g -O1 -march=native $flags -I. -Itests "tests/test_$test.c" -o "$out/$name-$test" \
            -lcmocka -lpthread $text -lm >"$log" 2>&1; then
            cmocka "$name $test" "$out/$name-$test"
        else
            bad "$name $test does not build" "$(grep -m 3 error: "$log")"
        fi
    done
}

export ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export OMP_NUM_THREADS=2
omp=
printf '#include <omp.h>\nint main(void){return omp_get_max_threads()<1;}\n' |
    gcc -fopenmp -x c - -o "$out/omp" 2>/dev/null && omp=-fopenmp
clean address gcc "-fsanitize=address,undefined -fno-sanitize-recover=all $omp" operators fixtures model checkpoint ranks data \
    tokenizer
# Two models in two threads, without OpenMP, whose own barriers gcc's thread sanitizer cannot see ...
clean thread gcc "-fsanitize=thread" model ranks
# ... and with OpenMP where clang's runtime brings the tool that shows them to the sanitizer.
archer=$(ls /usr/lib/llvm-*/lib/libarcher.so 2>/dev/null | tail -n 1)
if [ -n "$archer" ] && command -v clang >/dev/null 2>&1; then
    OMP_TOOL_LIBRARIES=$archer TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1"
    export OMP_TOOL_LIBRARIES TSAN_OPTIONS
    clean openmp clang "-fsanitize=thread -fopenmp" fixtures operators
else
    skip "OpenMP under the thread sanitizer (clang, libomp and its libarcher are not here)"
fi
finish
