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
    sed -n 's/.*"step": *\([0-9]*\).*"loss": *\([0-9.]*\).*/\1 \2/p' $out/"$name"/metrics.jsonl >$out/"$name".txt
}

large="max_steps=300 eval_every=0 eval_windows=64 save_every=25 log_every=25"
for amp in on off; do
    run quick-$amp configs/quick.cfg $amp
    run rtx4060-$amp configs/rtx4060.cfg $amp $large "$@"
done

# The mean |difference| of the curves, beside how far a curve moves from one step to the next: its own noise.
compare() { # name
    paste -d ' ' $out/"$1"-off.txt $out/"$1"-on.txt | awk -v name="$1.cfg" '
        { gap = $2 - $4; gaps += gap < 0 ? -gap : gap; signed += gap
          if (NR > 1) { move = $2 - last; moves += move < 0 ? -move : move }
          last = $2; a = $2; b = $4 }
        END { printf "| `%s` | %d | %.4f | %.4f | %.5f | %+.5f | %.5f |\n", name, NR, a, b, gaps / NR, signed / NR, moves / (NR - 1) }'
}
{
    echo "# float32 and bfloat16 products"
    echo
    echo "Training loss of the same run with float32 and with bfloat16 matrix products (\`use_amp\`), written by \`make curves${*:+ CURVES=\"$*\"}\`:"
    echo "the mean distance of the two curves, with and without its sign, beside how far the float32 curve moves from one"
    echo "step to the next."
    echo
    echo "| configuration | steps | last loss, float32 | last loss, bfloat16 | mean distance | float32 less bfloat16 | mean move in a step |"
    echo "| --- | --- | --- | --- | --- | --- | --- |"
    compare quick
    compare rtx4060
    echo
    echo "![Training loss with float32 and with bfloat16 products](bfloat16.svg)"
} >docs/bfloat16.md
gnuplot <<EOF
set terminal svg size 900,400 enhanced font 'sans-serif,12' background rgb 'white'
set output 'docs/bfloat16.svg'
set multiplot layout 1,2
set xlabel 'optimiser step'
set ylabel 'training loss, nats'
set grid
do for [name in "quick rtx4060"] {
    set title name.'.cfg'
    plot '$out/'.name.'-off.txt' with lines lw 2 lc rgb '#0072b2' title 'float32', \
         '$out/'.name.'-on.txt' with lines lw 1 lc rgb '#d55e00' title 'bfloat16'
}
EOF
cat docs/bfloat16.md
