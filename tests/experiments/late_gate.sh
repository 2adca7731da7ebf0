#!/usr/bin/env bash
# A.7 in small: a baseline is trained, then trained on without a gate, and with one added late; and a gated model from the
# start, for as many steps in all. Do the sinks go? Writes docs/late-gate.md and docs/late-gate.svg.
#     [STEPS=800] tests/experiments/late_gate.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
steps=${STEPS:-800}
out=build/late-gate
mkdir -p $out docs
common="threads=1 eval_every=$((steps / 20)) save_every=0"
run() { # NAME CONFIG KEY=VALUE...
    name=$1 config=$2
    shift 2
    # shellcheck disable=SC2086 # several keys
    ./train "$config" $common output_dir=$out/$name "$@" --fresh >$out/$name.log 2>&1 || { cat $out/$name.log && exit 1; }
}
run baseline configs/quick-baseline.cfg max_steps=$steps "$@"
waiting() { [ "$(jobs -r | wc -l)" -lt "$(nproc)" ] || wait -n; }
on="max_steps=$steps init_from=$out/baseline/last"
# shellcheck disable=SC2086
{
    run ungated configs/late-gate.cfg $on gate_position=none "$@" & waiting
    run headwise configs/late-gate.cfg $on "$@" & waiting
    run elementwise configs/late-gate.cfg $on gate_type=elementwise "$@" & waiting
    run scratch configs/quick.cfg max_steps=$((2 * steps)) "$@" & waiting
}
while [ "$(jobs -r | wc -l)" -gt 0 ]; do wait -n; done
python3 tests/experiments/late_gate.py $out "$steps"
