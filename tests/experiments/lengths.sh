#!/bin/sh
# Section 4.4 in small: retrieval trained at 64 tokens, trained on at 256 with a raised RoPE base, stretched to 1024 by YaRN;
# with the gate and without. Writes docs/lengths.md and docs/lengths.svg.
#     tests/experiments/lengths.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
. tests/experiments/jobs.sh
out=build/lengths
mkdir -p $out docs
train() { # NAME CONFIG KEY=VALUE...
    name=$1 config=$2
    shift 2
    logged $out/"$name".log ./train "$config" threads=1 output_dir=$out/"$name" "$@" --fresh
}
model() { # NAME KEY=VALUE...: short, then long
    model=$1
    shift
    train "$model" configs/lengths.cfg "$@" &&
        train "$model-long" configs/lengths-long.cfg "$@" init_from=$out/"$model"/last
}
start model baseline gate_position=none "$@"
start model gated "$@"
await

measure() { # REPORT MODEL:... OPTION...
    report=$1
    shift
    ./analyze --models "$@" --data gen:niah,keys=8,queries=8,answers_only=1 --lengths 64,128,256,512,1k --num_samples 64 \
        --output $out/"$report" >$out/"$report".log
}
measure short baseline:$out/baseline/last gated:$out/gated/last
measure long baseline:$out/baseline-long/last gated:$out/gated-long/last
measure yarn baseline:$out/baseline-long/last gated:$out/gated-long/last --rope_factor 4
python3 tests/experiments/lengths.py $out
