#!/bin/sh
# A test of the tests of the CUDA kernels: tests/cuda/bugs.txt breaks gated_attention_cuda.cuh in one place at a time, in a
# copy. The test that each bug names must fail on it, on the CPU with the checker, and must pass without it.
#     tests/cuda/bugs.sh [TEXT]    only the bugs whose test, pattern or lines contain TEXT
set -u

# The compiler's flags for kernels, and what they are linked with: checked, or plain.
flags() {
    case $1 in
    checked) echo "$CHECKED -O1 -fsanitize=thread" ;;
    cudnn) echo "$PLAIN -O0 -DGA_CUDNN -Itests/cuda/cudnn" ;;
    *) echo "$PLAIN -O0" ;;
    esac
}
parts() {
    if [ "$1" = checked ]; then echo "-no-pie -Wl,--wrap=memcpy,--wrap=memset $CHECKED_PARTS"; else echo "$PLAIN_PARTS"; fi
}

# test_object TEST MODE
test_object() { if [ "$2" = cudnn ]; then echo "build/cuda/cudnn/test_$1.o"; else echo "build/cuda/test_$1.o"; fi; }

# build HEADER MODE OBJECT TEST PROGRAM
build() {
    # shellcheck disable=SC2046,SC2086 # lists of flags and files
    ${CXX:-c++} $(flags "$2") -w -DGATED_ATTENTION_CUDA_IMPLEMENTATION -x c++ -c "$1" -o "$3" &&
        ${CXX:-c++} "$(test_object "$4" "$2")" "$3" $(parts "$2") -o "$5" $LIBRARIES
}

# passes PROGRAM PATTERN: such tests there are, and they pass
passes() { timeout 120 "$1" "$2" > "$1.log" 2>&1 && grep -q '^\[       OK \]' "$1.log"; }

# why LOG: in a few words
why() { grep -hoE '^cucpu: [^,]*|[a-z]+ of .*, as a share.*|ERROR.*' "$1" | head -n 1 | cut -c 1-110; }

# try_header TEST PATTERN [MODE]
try_header() {
    program="$WORK/header_$2_${3-plain}"
    if build gated_attention_cuda.cuh "${3-plain}" "$program.o" "$1" "$program" && passes "$program" "$2"; then
        echo "ok       $*: passes on the header as it is"
    else
        echo "FAIL     $*: fails on the header as it is: $(why "$program.log")"
    fi
}

# try_bug FILE: the bug in the file
try_bug() {
    { read -r test pattern mode && read -r old && read -r new; } < "$1"
    old=${old#- } new=${new#+} new=${new# }
    count=$(grep -cF -e "$old" gated_attention_cuda.cuh)
    if [ "$count" -ne 1 ]; then
        echo "FAIL     $test $pattern: in $count lines of the header, not in one: $old"
        return
    fi
    OLD=$old NEW=$new awk '(at = index($0, ENVIRON["OLD"])) {
            $0 = substr($0, 1, at - 1) ENVIRON["NEW"] substr($0, at + length(ENVIRON["OLD"])) }
        { print }' gated_attention_cuda.cuh > "$1.cuh"
    if ! build "$1.cuh" "${mode:-plain}" "$1.o" "$test" "$1.program" > "$1.log" 2>&1; then
        echo "FAIL     $test $pattern: does not compile: $new"
    elif passes "$1.program" "$pattern"; then
        echo "SURVIVED $test $pattern: $old -> $new"
    else
        echo "caught   $test $pattern: $old -> $new    [$(why "$1.program.log")]"
    fi
    rm -f "$1".*
}

case ${1-} in
--header | --bug)
    try=try_${1#--}
    shift
    "$try" "$@"
    exit
    ;;
esac

cd "$(dirname "$0")/../.." || exit 1
if [ -z "$(make -s print-CUDA_INCLUDE)" ]; then
    echo "0 passed, 0 failed (skipped: the CUDA headers are not here)"
    exit 0
fi
WORK=$(mktemp -d) || exit 1
trap 'rm -rf "$WORK"' EXIT
awk -v work="$WORK" -v text="${1-}" 'BEGIN { RS = "" }
    { gsub(/(^|\n)#[^\n]*/, ""); sub(/^\n/, "") }
    $0 != "" && index($0, text) { print > sprintf("%s/%03d", work, ++n) }' tests/cuda/bugs.txt
PLAIN=$(make -s print-CUDA_CPU) PLAIN_PARTS=$(make -s print-CUDA_CPU_PARTS | sed 's,[^ ]*,build/cuda/&.o,g')
CHECKED=$(make -s print-CUDA_CHECKED) CHECKED_PARTS=$(make -s print-CUDA_CHECKED_PARTS)
LIBRARIES="-rdynamic $(make -s print-OPENMP) -lcmocka -lm"
export WORK PLAIN PLAIN_PARTS CHECKED CHECKED_PARTS LIBRARIES
awk 'FNR == 1 && !seen[$0]++ { print "--header", $0 }' "$WORK"/[0-9]* > "$WORK/runs"
for bug in "$WORK"/[0-9]*; do echo "--bug $bug"; done >> "$WORK/runs"
tests=$(awk 'FNR == 1 { print $1, $3 }' "$WORK"/[0-9]* | sort -u | while read -r test mode; do test_object "$test" "$mode"; done | sort -u)
# shellcheck disable=SC2086 # lists of files
make -s $PLAIN_PARTS $CHECKED_PARTS $tests || exit 1
xargs -P 2 -L 1 sh tests/cuda/bugs.sh < "$WORK/runs" | tee "$WORK/result"
passed=$(grep -c -e '^ok' -e '^caught' "$WORK/result")
failed=$(grep -c -e '^FAIL' -e '^SURVIVED' "$WORK/result")
[ $((passed + failed)) -ge "$(grep -c . "$WORK/runs")" ] || failed=$((failed + 1))
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
