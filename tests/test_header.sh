#!/bin/sh
# gated_attention.h as others use it: C11 and C++17, gcc and clang, in two translation units of one program, as static
# functions, in double, with and without OpenMP; no writable globals, nothing needed but libc, libm and OpenMP. And the programs
# with nothing that is optional: neither OpenMP nor GPU, MPI or tokenizers.
#     tests/test_header.sh
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
cd tests || exit 1
warnings="-Wall -Wextra -Wpedantic -Wshadow -Werror"

# runs NAME COMPILER ARGUMENT...: it compiles and links, and the program ends well
runs() {
    what=$1
    shift
    rm -f "$work/program"
    check "$what" "$@" -no-pie -o "$work/program" -lm
    check "$what, runs" "$work/program"
}

# The symbols of libc, libm and OpenMP on this machine.
list_libraries() {
    for compiler in gcc clang; do
        "$compiler" -fopenmp -Wl,--no-as-needed "$work/empty.c" -lm -o "$work/$compiler" 2>/dev/null && ldd "$work/$compiler"
    done | grep -o '/[^ ]*' | sort -u | while read -r library; do nm -D --defined-only "$library"; done |
        sed 's/.* //; s/@.*//' | sort -u
}

# no_globals OBJECT: fails and prints what lies in memory that can change
no_globals() { nm "$1" | grep -q ga_create && ! nm "$1" | grep ' [BbCDdGgSs] '; }

# no_strangers OBJECT: fails and prints what neither libc, libm nor OpenMP has
no_strangers() { nm -u "$1" | grep -q malloc && ! nm -u "$1" | sed 's/.* //; s/@.*//' | grep -vxF -f "$work/known"; }

# whole CC CXX FLAG...
whole() {
    cc=$1 cxx=$2
    shift 2
    flags="$warnings -fno-pie $*" # position-independent code keeps constant tables of pointers where they can change
    kind="$cc $*:"
    rm -f "$work/c.o"
    # shellcheck disable=SC2086 # flags are words
    {
        check "$kind the implementation" "$cc" -std=c11 $flags -c header_two_units_a.c -o "$work/c.o"
        check "$kind no writable globals" no_globals "$work/c.o"
        check "$kind needs libc, libm and OpenMP only" no_strangers "$work/c.o"
        runs "$kind two translation units" "$cc" -std=c11 $flags header_two_units_b.c "$work/c.o"
        runs "$kind used from C++17" "$cxx" -std=c++17 $flags -DLINK_ONLY header.cpp "$work/c.o"
        runs "$kind implemented in C++17" "$cxx" -std=c++17 $flags header.cpp
    }
}

# as_static CC FLAG
as_static() {
    kind="$1 $2:"
    # shellcheck disable=SC2086
    {
        check "$kind static, in one file" "$1" -std=c11 $warnings -fno-pie "$2" -DPARTNER -c header_static.c -o "$work/partner.o"
        runs "$kind static, in two files" "$1" -std=c11 $warnings -fno-pie "$2" header_static.c "$work/partner.o"
    }
}

echo 'int main(void) { return 0; }' >"$work/empty.c"
list_libraries >"$work/known"
prints "GA_MALLOC without GA_FREE is refused" 1 'error.*define both GA_MALLOC and GA_FREE' \
    ${CC:-cc} -std=c11 -DGA_MALLOC=malloc -c header_two_units_a.c -o "$work/c.o"
# Every pair of a compiler, of threads or none, of an optimisation, of a precision.
for pair in "gcc g++" "clang clang++"; do
    cc=${pair% *} cxx=${pair#* }
    has "$cc" "the header with $cc" || continue
    whole "$cc" "$cxx" -O0
    whole "$cc" "$cxx" -O1 -DGA_DOUBLE
    as_static "$cc" -O0
    # shellcheck disable=SC2086
    {
        check "$cc: C23" "$cc" -std=c2x $warnings -funsigned-char -fshort-enums -fsyntax-only header_two_units_a.c
        check "$cc: C++20" "$cxx" -std=c++20 $warnings -fsyntax-only header.cpp
        check "$cc: with the companion, behind <complex.h>" "$cc" -std=gnu11 $warnings -DGATED_ATTENTION_IMPLEMENTATION \
            -include complex.h -include ../gated_attention.h -fsyntax-only -x c ../gated_attention_x86.h
    }
    if "$cc" -fopenmp "$work/empty.c" -o "$work/empty" 2>/dev/null; then
        whole "$cc" "$cxx" -O3 -fopenmp
        as_static "$cc" -fopenmp
    else
        skip "the header with $cc and OpenMP ($cc -fopenmp does not link here)"
    fi
done
for program in train analyze; do
    # shellcheck disable=SC2086
    check "$program with nothing that is optional" ${CC:-cc} -std=c11 $warnings -fsyntax-only ../$program.c
done
finish
