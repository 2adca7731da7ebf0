#!/bin/sh
# Loss curves with float32 and with bfloat16 products, in one plot: quick.cfg, and 300 steps of rtx4060.cfg (more than
# an hour on two cores; goes on where it was stopped). Writes docs/bfloat16.svg and docs/bfloat16.md.
#     tests/experiments/curves.sh [key=value ...]     the keys are for rtx4060.cfg: gradient_accumulation_steps=8 takes a quarter
set -eu
cd "$(dirname "$0")/../.."
out=build/curves
mkdir -p $out docs

run() { # name configuration use_amp [key=value ...]
    name=$1 config=$2 amp=$3
    shift 3
    ./train "$config" use_amp="$amp" output_dir=$out/"$name" "$@" >>$out/"$name".log 2>&1 || {
        tail -n 1 $out/"$name".log >&2
        exit 1
    }
}

large="max_steps=300 eval_every=0 eval_windows=64 save_every=25 log_every=25"
for amp in on off; do
    run quick-$amp configs/quick.cfg $amp
    # shellcheck disable=SC2086 # several keys
    run rtx4060-$amp configs/rtx4060.cfg $amp $large "$@"
done

python3 tests/experiments/curves.py $out "$*"
