#!/bin/sh
# gated_attention.h as others use it: in C11 and C++17, gcc and clang, in two translation units of one program, as static
# functions, in double, with and without OpenMP; no writable globals, nothing needed but libc, libm and OpenMP.
#
#     tests/test_header.sh
set -u
cd "$(dirname "$0")" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
warnings="-Wall -Wextra -Wpedantic -Wshadow -Werror"

# report NAME STATUS: one line, with the compiler's output where there is any
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

# writable OBJECT: prints the symbols that lie in memory that can change
writable() {
    nm "$1" | awk '$2 ~ /^[BbCDdGgSs]$/ { print $NF }' | grep -v -e '^DW\.ref\.' -e '^\.' 
}

# foreign OBJECT: prints what it needs beside libc, libm, OpenMP and the compiler's own helpers
foreign() {
    nm -u "$1" | awk '{ print $NF }' | sed 's/@.*//' | while read -r symbol; do
        grep -qx "$symbol" "$work/libraries" || echo "$symbol"
    done
}

# The dynamic symbols of libc, libm and OpenMP on this machine.
list_libraries() {
    echo 'int main(void) { return 0; }' > "$work/empty.c"
    gcc -fopenmp "$work/empty.c" -Wl,--no-as-needed -lm -lgomp -o "$work/empty"
    ldd "$work/empty" | sed -n 's/.*=> \(\/[^ ]*\).*/\1/p' | while read -r library; do
        nm -D --defined-only "$library"
    done | awk '{ print $NF }' | sed 's/@.*//' > "$work/libraries"
    # linker and compiler support; clang's OpenMP calls
    printf '%s\n' _GLOBAL_OFFSET_TABLE_ __stack_chk_fail __cpu_model __cpu_indicator_init >> "$work/libraries"
    for compiler in clang; do
        command -v "$compiler" > /dev/null || continue
        "$compiler" -print-file-name=libomp.so | while read -r library; do
            [ -e "$library" ] && nm -D --defined-only "$library" | awk '{ print $NF }' | sed 's/@.*//' >> "$work/libraries"
        done
    done
    sort -u -o "$work/libraries" "$work/libraries"
}

# check_object OBJECT NAME
check_object() {
    writable "$1" > "$work/log"
    [ ! -s "$work/log" ]
    report "$2: no writable globals" $?
    foreign "$1" > "$work/log"
    [ ! -s "$work/log" ]
    report "$2: needs libc, libm and OpenMP only" $?
}

# build_and_run NAME COMPILER FLAGS... -- FILES...
build_and_run() {
    name=$1
    shift
    { "$@" -lm -o "$work/program" && "$work/program"; } > "$work/log" 2>&1
    report "$name" $?
}

list_libraries
for pair in "gcc g++" "clang clang++"; do
    cc=${pair% *} cxx=${pair#* }
    if ! command -v "$cc" > /dev/null || ! command -v "$cxx" > /dev/null; then
        echo "$cc or $cxx is not installed" > "$work/log"
        report "$cc and $cxx" 1
        continue
    fi
    for optimisation in -O0 -O3; do
        for openmp in "" -fopenmp; do
            if [ -n "$openmp" ] && ! "$cc" -fopenmp "$work/empty.c" -o "$work/empty" 2> /dev/null; then
                echo "     $cc has no OpenMP here: left out"
                continue
            fi
            for real in "" -DGA_DOUBLE; do
                flags="$optimisation $openmp $real"
                # shellcheck disable=SC2086 # flags are words
                {
                    build_and_run "$cc $flags: two translation units" "$cc" -std=c11 $warnings $flags header_two_units_a.c header_two_units_b.c
                    build_and_run "$cc $flags: static in two files" "$cc" -std=c11 $warnings $flags -DPARTNER header_static.c -DGA_STATIC
                    build_and_run "$cxx $flags: C++17" "$cxx" -std=c++17 $warnings $flags header.cpp
                    "$cc" -std=c11 $warnings $flags -c header_two_units_a.c -o "$work/unit.o" 2> "$work/log"
                    report "$cc $flags: object" $?
                    check_object "$work/unit.o" "$cc $flags"
                }
            done
        done
    done
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
