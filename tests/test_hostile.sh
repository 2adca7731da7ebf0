#!/bin/sh
# Files that attack: tests/hostile.py spoils a checkpoint in some ninety ways and gives it to analyze (its weights loaded, and
# mapped) and to train. Each must be refused with its own clear line, in bounded time and memory.
#     tests/test_hostile.sh [--table]      with --table: attack | line, as analyze says it
# Run from the repository's root after make. Prints `ok NAME` or `FAIL NAME` and a last line `N passed, N failed`.
set -u
if ! command -v python3 > /dev/null; then
    echo "skipped: no python3"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
OMP_WAIT_POLICY=passive python3 tests/hostile.py ./analyze ./train "$work" "$@"
