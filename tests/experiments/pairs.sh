#!/bin/sh
# The quick pair over three seeds, of weights, data and the task's chain alike: does the baseline park its attention on
# the first token, and does the gate remove that, at no cost in loss? Writes docs/quick-pair.md.
#     [SEEDS="1 2 3"] tests/experiments/pairs.sh [key=value ...]
set -eu
seeds=${SEEDS:-1 2 3}
cd "$(dirname "$0")/../.."
out=build/pairs
mkdir -p "$out" docs
for seed in $seeds; do
    data=gen:backcopy,trigger_rate=0.15,seed=$seed
    for name in baseline gated; do
        config=configs/quick.cfg
        [ $name = gated ] || config=configs/quick-baseline.cfg
        ./train $config seed=$seed data=$data threads=1 output_dir="$out/$name-$seed" "$@" --fresh \
            >"$out/$name-$seed.log" 2>&1 &
    done
    wait
    ./analyze --models "baseline:$out/baseline-$seed/last" "gated:$out/gated-$seed/last" --data $data \
        --num_samples 256 --output "$out/report-$seed" >"$out/report-$seed.log"
    echo "seed $seed done"
done
python3 tests/experiments/pairs.py "$out" $seeds
