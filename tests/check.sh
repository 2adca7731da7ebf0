#!/bin/sh
# Formatting, warnings of two compilers in two languages, static analysis.    tests/check.sh SOURCE ...
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
step() { # NAME COMMAND...: as check, but what was found is shown line by line
    name=$1
    shift
    if "$@" >"$work/found" 2>&1; then ok "$name"; else bad "$name" && grep -E 'error|warning|FAIL|SC[0-9]' "$work/found" | head -n 30; fi
}
step "formatting" clang-format --dry-run -Werror "$@"
step "header: gcc, g++, clang, clang++" sh tests/test_header.sh
tidy='-checks=-*,clang-analyzer-*,bugprone-*,-bugprone-easily-swappable-parameters,-bugprone-narrowing-conversions,-bugprone-macro-parentheses,-bugprone-implicit-widening-of-multiplication-result,-bugprone-reserved-identifier,-clang-analyzer-security.insecureAPI.*,-bugprone-assignment-in-if-condition,-bugprone-suspicious-string-compare'
text=$(make -s print-TEXT)
mpi=$(mpicc --showme:compile 2>/dev/null)
for source in train.c analyze.c data/vocabulary.c ${mpi:+drivers/train/ranks_mpi.c}; do
    step "clang-tidy $source" clang-tidy --quiet "$tidy" --warnings-as-errors='*' "$source" -- -std=c11 -O1 $text $mpi
    step "cppcheck $source" cppcheck --quiet --error-exitcode=1 --std=c11 $text --enable=warning,portability --inline-suppr \
        --suppress=missingIncludeSystem --suppress=duplicateAssignExpression --suppress=invalidFunctionArg "$source"
done
step "no fast-math" sh -c '! grep -nE -- "-ffast-math|-Ofast" Makefile tests/*.sh | grep -v check.sh'
finish
