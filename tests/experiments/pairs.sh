#!/bin/sh
# The quick pair over three seeds, of weights, data and the task's chain alike: does the baseline park its attention on
# the first token, and does the gate remove that, at no cost in loss? Writes docs/quick-pair.md.
#     [SEEDS="1 2 3"] tests/experiments/pairs.sh [key=value ...]
set -eu
seeds=${SEEDS:-1 2 3}
cd "$(dirname "$0")/../.."
. tests/experiments/jobs.sh
out=build/pairs
mkdir -p "$out" docs
for seed in $seeds; do
    data=gen:backcopy,trigger_rate=0.15,seed=$seed
    for name in baseline gated; do
        config=configs/quick.cfg
        [ $name = gated ] || config=configs/quick-baseline.cfg
        start logged "$out/$name-$seed.log" ./train $config "seed=$seed" "data=$data" threads=1 \
            output_dir="$out/$name-$seed" "$@" --fresh
    done
done
await
for seed in $seeds; do
    data=gen:backcopy,trigger_rate=0.15,seed=$seed
    ./analyze --models "baseline:$out/baseline-$seed/last" "gated:$out/gated-$seed/last" --data "$data" \
        --num_samples 256 --output "$out/report-$seed" >"$out/report-$seed.log"
done
# shellcheck disable=SC2086 # several seeds
python3 tests/experiments/pairs.py "$out" $seeds
