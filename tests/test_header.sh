#!/bin/sh
# gated_attention.h as others use it: C11 and C++17, gcc and clang, in two translation units of one program, as static
# functions, in double, with and without OpenMP; no writable globals, nothing needed but libc, libm and OpenMP.
#     tests/test_header.sh
set -u
cd "$(dirname "$0")" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
warnings="-Wall -Wextra -Wpedantic -Wshadow -Werror"

# report NAME STATUS: one line; after a failure what the compiler or the check said
report() {
    if [ "$2" -eq 0 ]; then
        passed=$((passed + 1))
        echo "ok   $1"
    else
        failed=$((failed + 1))
        echo "FAIL $1"
        head -n 20 "$work/log"
    fi
}

# run NAME COMMAND...: the command's output is kept for the report
run() {
    what=$1
    shift
    "$@" > "$work/log" 2>&1
    report "$what" $?
}

# build NAME COMPILER ARGUMENT...: compiles, links and runs
build() {
    what=$1
    shift
    { "$@" -no-pie -o "$work/program" -lm && "$work/program"; } > "$work/log" 2>&1
    report "$what" $?
}

# The symbols of libc, libm and OpenMP on this machine.
list_libraries() {
    echo 'int main(void) { return 0; }' > "$work/empty.c"
    for compiler in gcc clang; do
        "$compiler" -fopenmp -Wl,--no-as-needed "$work/empty.c" -lm -o "$work/$compiler" 2> /dev/null && ldd "$work/$compiler"
    done | grep -o '/[^ ]*' | sort -u | while read -r library; do nm -D --defined-only "$library"; done |
        sed 's/.* //; s/@.*//' | sort -u > "$work/known"
}

# no_globals OBJECT: fails and prints what lies in memory that can change
no_globals() { ! nm "$1" | grep ' [BbCDdGgSs] '; }

# no_strangers OBJECT: fails and prints what neither libc, libm nor OpenMP has
no_strangers() { ! nm -u "$1" | sed 's/.* //; s/@.*//' | grep -vxF -f "$work/known"; }

# check CC CXX FLAG...
check() {
    cc=$1 cxx=$2
    shift 2
    flags="$warnings -fno-pie $*" # position-independent code keeps constant tables of pointers where they can change
    name="$cc $*:"
    rm -f "$work/c.o"
    # shellcheck disable=SC2086 # flags are words
    {
        run "$name the implementation" "$cc" -std=c11 $flags -c header_two_units_a.c -o "$work/c.o"
        run "$name no writable globals" no_globals "$work/c.o"
        run "$name needs libc, libm and OpenMP only" no_strangers "$work/c.o"
        build "$name two translation units" "$cc" -std=c11 $flags header_two_units_b.c "$work/c.o"
        build "$name used from C++17" "$cxx" -std=c++17 $flags -DLINK_ONLY header.cpp "$work/c.o"
        build "$name implemented in C++17" "$cxx" -std=c++17 $flags header.cpp
    }
}

# check_static CC FLAG...
check_static() {
    cc=$1
    shift
    name="$cc $*:"
    # shellcheck disable=SC2086
    {
        run "$name static, in one file" "$cc" -std=c11 $warnings -fno-pie "$@" -DPARTNER -c header_static.c -o "$work/partner.o"
        build "$name static, in two files" "$cc" -std=c11 $warnings -fno-pie "$@" header_static.c "$work/partner.o"
    }
}

# refuses NAME COMMAND...: it must not compile
refuses() {
    what=$1
    shift
    ! "$@" > "$work/log" 2>&1 && grep -q 'define both GA_MALLOC and GA_FREE' "$work/log"
    report "$what" $?
}

list_libraries
refuses "GA_MALLOC without GA_FREE is refused" gcc -std=c11 -DGA_MALLOC=malloc -c header_two_units_a.c -o "$work/c.o"
for pair in "gcc g++" "clang clang++"; do
    cc=${pair% *} cxx=${pair#* }
    for openmp in "" -fopenmp; do
        # shellcheck disable=SC2086
        if ! "$cc" $openmp "$work/empty.c" -o "$work/empty" 2> /dev/null; then
            echo "     $cc $openmp is not installed: left out"
            continue
        fi
        for optimisation in -O0 -O3; do check "$cc" "$cxx" "$optimisation" $openmp; done
        check_static "$cc" -O0 $openmp
    done
    command -v "$cc" > /dev/null && check "$cc" "$cxx" -O1 -DGA_DOUBLE
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
