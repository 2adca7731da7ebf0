#!/bin/sh
# Table 2 and A.6 in small: trains configs/sweep.cfg without a gate, with sandwich norm, with clipped outputs and with both
# gates at rising learning rates. A run that diverges is a result like any other. Writes docs/sweep.md and docs/sweep.svg.
#     [RATES="5e-3 2e-2"] [SEEDS="1 2"] tests/experiments/sweep.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
. tests/experiments/jobs.sh
rates=${RATES:-2e-3 5e-3 1e-2 2e-2 4e-2 8e-2}
seeds=${SEEDS:-1}
out=build/sweep
mkdir -p $out docs
methods="baseline sandwich clipped headwise elementwise"
keys() {
    case $1 in
    baseline) echo gate_position=none ;;
    sandwich) echo gate_position=none sandwich_norm=1 ;;
    clipped) echo gate_position=none attn_clip=10 ffn_clip=10 ;;
    headwise) echo gate_position=G1 gate_type=headwise ;;
    elementwise) echo gate_position=G1 gate_type=elementwise ;;
    esac
}

# run NAME KEY=VALUE...: divergence ends a run, but not the sweep
run() {
    name=$1
    shift
    ./train configs/sweep.cfg threads=1 output_dir=$out/"$name" "$@" --fresh >$out/"$name".log 2>&1 ||
        grep -q diverged $out/"$name".log || { cat $out/"$name".log >&2 && return 1; }
}
for seed in $seeds; do
    for rate in $rates; do
        for method in $methods; do
            # shellcheck disable=SC2046 # several keys
            start run "$method-$rate-$seed" $(keys "$method") "learning_rate=$rate" "seed=$seed" "$@"
        done
    done
done
await
python3 tests/experiments/sweep.py $out "$rates" "$seeds" "$methods"
