#!/bin/sh
# What is measured on the GPU, with weights loaded and layer by layer, and what is written there, is that of the CPU.
#     tests/cuda/analysis.sh TRAIN ANALYZE
set -eu
train=$(realpath "$1") analyze=$(realpath "$2")
config=$(realpath "$(dirname "$0")/tiny.cfg")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$train" "$config" max_steps=4 device=cpu output_dir=run >train.out
for how in cpu:loaded cuda:loaded cuda:mapped; do # --device cuda: refused where there is none
    "$analyze" --models run --device ${how%:*} --weights ${how#*:} --data gen:random --num_samples 2 --output $how >$how.out
    "$analyze" --models run --device ${how%:*} --weights ${how#*:} --prompt "t1 t2 t3" --generate 10 --temperature 0 2>/dev/null |
        head -n 1 >$how.text
    grep -oE -- '-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?' $how/summary.json >$how.numbers
done
for how in cuda:loaded cuda:mapped; do
    cmp cpu:loaded.text $how.text
    paste cpu:loaded.numbers $how.numbers | awk '{ d = $1 - $2; a = $1; if (d < 0) d = -d; if (a < 0) a = -a
        if (!(d <= 1e-3 * a + 1e-6)) { bad = 1; print "not", $1, "but", $2 } n++ }
        END { exit bad || n < 100 }' || { echo "FAIL $how: figures differ" && exit 1; }
done
echo "ok $(grep -c . cpu:loaded.numbers) figures, and a text"
