#!/bin/sh
# Causal attention by sequence length, ours and PyTorch's in turn:    tests/bench/attention.sh [longest T [rounds]]
# Leaves lines `T program products seconds bytes` in build/bench/attention.txt.
set -eu
cd "$(dirname "$0")/../.."
longest=${1:-32768} rounds=${2:-3}
out=build/bench
mkdir -p $out
make -s $out/attention
: >$out/attention.tmp

measure() { # program products command...
    program=$1 products=$2
    shift 2
    status=0
    figures=$("$@" "$products" "$T") || status=$?
    [ $status -eq 3 ] && return # ours, on a processor without bfloat16 products
    [ $status -eq 0 ] || exit $status
    echo "$T $program $products $figures" | tee -a $out/attention.tmp
}

T=512
while [ "$T" -le "$longest" ]; do
    round=0
    while [ $round -lt "$rounds" ]; do
        for products in float32 bf16; do
            measure ours "$products" $out/attention
            measure PyTorch "$products" tests/bench/torch.sh tests/bench/attention.py
        done
        round=$((round + 1))
        # One pass of a long sequence takes seconds: it needs no repetition.
        if [ "$T" -ge 8192 ]; then break; fi
    done
    T=$((2 * T))
done
mv $out/attention.tmp $out/attention.txt
