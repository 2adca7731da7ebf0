#!/bin/sh
# A test of the tests: tests/mutants.txt breaks gated_attention.h or a header in data/ or drivers/ in one place at a time.
#     tests/mutants.sh [TEXT]    only the breaks whose test, pattern or lines contain TEXT
set -u
cd "$(dirname "$0")/.." || exit 1
script=tests/mutants.sh list=tests/mutants.txt
sources=$(echo gated_attention.h data/*.h drivers/*.h drivers/*/*.h)

prepare() {
    text=$(make -s print-TEXT) text_libraries=$(make -s print-TEXT_LIBS) # PCRE2 and utf8proc
    export text text_libraries
}

build() {
    # The test itself is copied too: it finds the headers beside it before those of the repository.
    mkdir -p "$1/tests" && cp gated_attention_x86.h train.c analyze.c "$1" && cp tests/*.h "tests/test_$2.c" "$1/tests" || return
    # shellcheck disable=SC2086 # lists of flags
    ${CC:-cc} -std=c11 -O0 -w -I"$1" "$1/tests/test_$2.c" -o "$1/program" -lcmocka -lpthread $text $text_libraries -lm
}

. tests/mutating.sh
