#!/bin/sh
# A test of the tests: tests/mutants.txt breaks gated_attention.h or a header in data/ or drivers/ in one place at a time, in a copy. The
# test that each break names must fail on it, and must pass on the headers as they are.
#     tests/mutants.sh [TEXT]    only the breaks whose test, pattern or lines contain TEXT
set -u

# copy DIRECTORY: the headers, as they are
copy() {
    mkdir -p "$1/tests" "$1/data" "$1/drivers" && cp gated_attention.h gated_attention_x86.h "$1" && cp data/*.h "$1/data/" &&
        cp drivers/*.h "$1/drivers/" &&        cp tests/*.h "$1/tests/"
}

# build DIRECTORY TEST: the test, with the headers that lie there
build() {
    cp "tests/test_$2.c" "$1/tests/" &&
        ${CC:-cc} -std=c11 -O0 -I"$1" "$1/tests/test_$2.c" -o "$1/program" -lcmocka -lpthread $MUTANTS_TEXT -lm \
            > "$1/log" 2>&1
}

# passes DIRECTORY PATTERN: such tests there are, and they pass
passes() { timeout 60 "$1/program" "$2" > "$1/log" 2>&1 && grep -q '^\[       OK \]' "$1/log"; }

# try_header DIRECTORY TEST PATTERN...: without a break the tests pass, else their failure would say nothing
try_header() {
    directory=$1 test=$2
    shift 2
    copy "$directory" && build "$directory" "$test"
    for pattern; do
        if passes "$directory" "$pattern"; then
            echo "ok       $test $pattern: passes on the header as it is"
        else
            echo "FAIL     $test $pattern: fails on the header as it is"
        fi
    done
}

# try_break FILE: the break in the file
try_break() {
    { read -r test pattern && read -r old && read -r new; } < "$1"
    old=${old#- } new=${new#+ }
    file=$(grep -lF -e "$old" gated_attention.h data/*.h drivers/*.h)
    count=$(cat gated_attention.h data/*.h drivers/*.h | grep -cF -e "$old")
    if [ "$count" -ne 1 ]; then
        echo "FAIL     $test $pattern: in $count lines of the headers, not in one: $old"
        return
    fi
    copy "$1.d"
    OLD=$old NEW=$new awk '(at = index($0, ENVIRON["OLD"])) {
            $0 = substr($0, 1, at - 1) ENVIRON["NEW"] substr($0, at + length(ENVIRON["OLD"])) }
        { print }' "$file" > "$1.d/$file"
    if ! build "$1.d" "$test"; then
        echo "FAIL     $test $pattern: does not compile: $new"
    elif passes "$1.d" "$pattern"; then
        echo "SURVIVED $test $pattern: $new"
    else
        echo "caught   $test $pattern: $new"
    fi
    rm -rf "$1.d"
}

case ${1-} in
--header | --break)
    try=try_${1#--}
    shift
    "$try" "$@"
    exit
    ;;
esac

cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d) || exit 1
MUTANTS_TEXT="$(make -s print-TEXT) $(make -s print-TEXT_LIBS)" # PCRE2 and utf8proc
export MUTANTS_TEXT
trap 'rm -rf "$work"' EXIT
awk -v work="$work" -v text="${1-}" 'BEGIN { RS = "" }
    { gsub(/(^|\n)#[^\n]*/, ""); sub(/^\n/, "") }
    $0 != "" && index($0, text) { print > sprintf("%s/%03d", work, ++n) }' tests/mutants.txt
awk -v work="$work" 'FNR == 1 && !seen[$0]++ { patterns[$1] = patterns[$1] " " $2 }
    END { for (test in patterns) print "--header", work "/header_" test, test patterns[test] }' "$work"/[0-9]* > "$work/runs"
for mutant in "$work"/[0-9]*; do echo "--break $mutant"; done >> "$work/runs"
xargs -P 2 -L 1 sh tests/mutants.sh < "$work/runs" | tee "$work/result"
passed=$(grep -c -e '^ok' -e '^caught' "$work/result")
failed=$(grep -c -e '^FAIL' -e '^SURVIVED' "$work/result")
[ $((passed + failed)) -ge "$(grep -c . "$work/runs")" ] || failed=$((failed + 1))
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
