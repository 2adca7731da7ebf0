#!/bin/sh
# A test of the tests of the CUDA kernels: tests/cuda/bugs.txt breaks gated_attention_cuda.cuh in one place at a time; found
# on the CPU, with the checker or with cuDNN's attention where the list says so.
#     tests/cuda/bugs.sh [TEXT]    only the bugs whose test, pattern or lines contain TEXT
set -u
cd "$(dirname "$0")/../.." || exit 1
script=tests/cuda/bugs.sh list=tests/cuda/bugs.txt
sources=gated_attention_cuda.cuh

# object TEST MODE
object() { if [ "$2" = cudnn ]; then echo "build/cuda/cudnn/test_$1.o"; else echo "build/cuda/test_$1.o"; fi; }

prepare() {
    if [ -z "$(make -s print-CUDA_INCLUDE)" ]; then
        skip "bugs in the kernels (the CUDA headers are not here)"
        finish
    fi
    plain=$(make -s print-CUDA_CPU) plain_parts=$(make -s print-CUDA_CPU_PARTS | sed 's,[^ ]*,build/cuda/&.o,g')
    checked=$(make -s print-CUDA_CHECKED) checked_parts=$(make -s print-CUDA_CHECKED_PARTS)
    libraries="-rdynamic $(make -s print-OPENMP) -lcmocka -lm"
    export plain plain_parts checked checked_parts libraries
    tests=$(awk '/^[a-z]+ test_/ { print $1, (NF > 2 ? $3 : "plain") }' $list | sort -u |
        while read -r test mode; do object "$test" "$mode"; done | sort -u)
    # shellcheck disable=SC2086 # lists of files
    make -s $plain_parts $checked_parts $tests || exit 1
}

build() {
    flags="$plain -O0" parts=$plain_parts
    case $3 in
    checked) flags="$checked -O1 -fsanitize=thread" parts="-no-pie -Wl,--wrap=memcpy,--wrap=memset $checked_parts" ;;
    cudnn) flags="$flags -DGA_CUDNN -Itests/cuda/cudnn" ;;
    esac
    # shellcheck disable=SC2086 # lists of flags and files
    ${CXX:-c++} $flags -w -DGATED_ATTENTION_CUDA_IMPLEMENTATION -x c++ -c "$1/gated_attention_cuda.cuh" -o "$1/kernels.o" &&
        ${CXX:-c++} "$(object "$2" "$3")" "$1/kernels.o" $parts -o "$1/program" $libraries
}

. tests/mutating.sh
