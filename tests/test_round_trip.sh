#!/bin/sh
# Checkpoints to PyTorch and back (tests/reference/round_trip.py), where tests/reference/setup.sh has made .venv.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
if ! .venv/bin/python -c 'import torch, transformers' 2>/dev/null; then
    skip "checkpoints in PyTorch (no .venv with torch and transformers: tests/reference/setup.sh; test_checkpoint has fixtures)"
    finish
fi
check "the program for one checkpoint's logits builds" ${CC:-cc} -std=c11 -O1 tests/reference/logits.c -o "$work/logits" -lm
.venv/bin/python tests/reference/round_trip.py "$work/logits" >"$work/log" 2>&1
tally "$work/log" $?
cat "$work/log"
passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
finish
