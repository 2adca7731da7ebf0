#!/bin/sh
# Checkpoints to PyTorch and back (tests/reference/round_trip.py), where tests/reference/setup.sh has made .venv.
set -u
cd "$(dirname "$0")/.." || exit 1
if ! .venv/bin/python -c 'import torch, transformers' 2> /dev/null; then
    echo "skipped: no .venv with torch and transformers (tests/reference/setup.sh makes it); test_checkpoint holds stored fixtures"
    echo "0 passed, 0 failed (skipped)"
    exit 0
fi
mkdir -p build && ${CC:-cc} -std=c11 -O1 tests/reference/logits.c -o build/logits -lm || exit 1
.venv/bin/python tests/reference/round_trip.py build/logits
