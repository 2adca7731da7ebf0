#!/usr/bin/env bash
# Table 4 in small: trains configs/variants/table4-*.cfg, compares them, writes docs/table4.md.
#     tests/experiments/table4.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
out=build/table4
mkdir -p $out docs
models=()
for config in configs/variants/table4-*.cfg; do
    name=$(basename "$config" .cfg)
    models+=("$name:$out/$name/last")
    ./train "$config" threads=1 output_dir="$out/$name" "$@" --fresh >"$out/$name.log" 2>&1 &
    [ "$(jobs -r | wc -l)" -lt "$(nproc)" ] || wait -n
done
wait
./analyze --models "${models[@]}" --num_samples 256 --output $out/report >$out/report.log

# The parameters of all rows, from ./train --dry-run: "parameters  230,624 (...); 175,328 activated by a token".
sizes=$(for config in configs/variants/table4-*.cfg; do
    ./train "$config" "$@" output_dir=$out/size --dry-run
done | sed -n 's/^parameters  *\([0-9,]*\).*; \([0-9,]*\) activated.*/\1 \2/p' | sort |
    awk 'NR == 1 { first = $1; least = $2 } { last = $1; most = $2 } END { print first " to " last " parameters, of which a token uses " least " to " most }')
{
    echo "# Table 4 in small"
    echo
    echo "Each row of Table 4 as a mixture of 16 experts, 4 for each token, like the paper's of 128 and 8: $sizes"
    echo "(\`configs/variants/table4-*.cfg\`: 4 query heads, 2 key-value heads), on Bigram-Backcopy with one seed, written by"
    echo "\`make table4\`, with the paper's figures below."
    echo
    echo '```'
    sed -n '/windows of/,/^report:/p' $out/report.log | sed '/^report:/d'
    echo '```'
} >docs/table4.md
cat docs/table4.md
