#!/usr/bin/env bash
# Table 2 and A.6 in small: trains configs/sweep.cfg without a gate, with sandwich norm, with clipped outputs and with both
# gates at rising learning rates. A run that diverges is a result like any other. Writes docs/sweep.md and docs/sweep.svg.
#     [RATES="5e-3 2e-2"] [SEEDS="1 2"] tests/experiments/sweep.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
rates=${RATES:-2e-3 5e-3 1e-2 2e-2 4e-2 8e-2}
seeds=${SEEDS:-1}
out=build/sweep
mkdir -p $out docs
declare -A keys=(
    [baseline]="gate_position=none"
    [sandwich]="gate_position=none sandwich_norm=1"
    [clipped]="gate_position=none attn_clip=10 ffn_clip=10"
    [headwise]="gate_position=G1 gate_type=headwise"
    [elementwise]="gate_position=G1 gate_type=elementwise"
)
methods="baseline sandwich clipped headwise elementwise"
for seed in $seeds; do
    for rate in $rates; do
        for method in $methods; do
            name=$method-$rate-$seed
            # shellcheck disable=SC2086 # several keys
            ./train configs/sweep.cfg ${keys[$method]} learning_rate=$rate seed=$seed threads=1 output_dir=$out/$name "$@" \
                --fresh >$out/$name.log 2>&1 || grep -q diverged $out/$name.log || { cat $out/$name.log && exit 1; } &
            [ "$(jobs -r | wc -l)" -lt "$(nproc)" ] || wait -n
        done
    done
done
while [ "$(jobs -r | wc -l)" -gt 0 ]; do wait -n; done
python3 tests/experiments/sweep.py $out "$rates" "$seeds" "$methods"
