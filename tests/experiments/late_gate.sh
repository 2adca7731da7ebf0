#!/bin/sh
# A.7 in small: a baseline is trained, then trained on without a gate, and with one added late; and a gated model from the
# start, for as many steps in all. Do the sinks go? Writes docs/late-gate.md and docs/late-gate.svg.
#     [STEPS=800] tests/experiments/late_gate.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
. tests/experiments/jobs.sh
steps=${STEPS:-800}
out=build/late-gate
mkdir -p $out docs
run() { # NAME CONFIG KEY=VALUE...
    name=$1 config=$2
    shift 2
    logged $out/"$name".log ./train "$config" threads=1 eval_every=$((steps / 20)) save_every=0 output_dir=$out/"$name" "$@" --fresh
}
run baseline configs/quick-baseline.cfg max_steps="$steps" "$@"
late() { # NAME KEY=VALUE...: the baseline goes on
    name=$1
    shift
    run "$name" configs/late-gate.cfg max_steps="$steps" init_from=$out/baseline/last "$@"
}
start late ungated gate_position=none "$@"
start late headwise "$@"
start late elementwise gate_type=elementwise "$@"
start run scratch configs/quick.cfg max_steps=$((2 * steps)) "$@"
await
python3 tests/experiments/late_gate.py $out "$steps"
