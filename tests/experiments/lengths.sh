#!/usr/bin/env bash
# Section 4.4 in small: retrieval trained at 64 tokens, trained on at 256 with a raised RoPE base, stretched to 1024 by YaRN;
# with the gate and without. Writes docs/lengths.md and docs/lengths.svg.
#     tests/experiments/lengths.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
out=build/lengths
mkdir -p $out docs
train() { # NAME CONFIG KEY=VALUE...
    name=$1 config=$2
    shift 2
    ./train "$config" threads=1 output_dir=$out/$name "$@" --fresh >$out/$name.log 2>&1 || { cat $out/$name.log && exit 1; }
}
model() { # NAME KEY=VALUE...: short, then long
    name=$1
    shift
    train "$name" configs/lengths.cfg "$@"
    train "$name-long" configs/lengths-long.cfg "$@" init_from=$out/$name/last
}
model baseline gate_position=none "$@" &
[ "$(nproc)" -gt 1 ] || wait -n
model gated "$@" &
while [ "$(jobs -r | wc -l)" -gt 0 ]; do wait -n; done

measure() { # REPORT MODEL:... OPTION...
    report=$1
    shift
    ./analyze --models "$@" --data gen:niah,keys=8,queries=8,answers_only=1 --lengths 64,128,256,512,1k --num_samples 64 \
        --output $out/$report >$out/$report.log
}
measure short baseline:$out/baseline/last gated:$out/gated/last
measure long baseline:$out/baseline-long/last gated:$out/gated-long/last
measure yarn baseline:$out/baseline-long/last gated:$out/gated-long/last --rope_factor 4
python3 tests/experiments/lengths.py $out
