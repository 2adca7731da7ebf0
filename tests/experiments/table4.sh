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
{
    echo "# Table 4 in small"
    echo
    echo "Each row of Table 4 as a model of about 180 thousand parameters on Bigram-Backcopy (\`configs/variants/table4-*.cfg\`; 4 query"
    echo "heads, 2 key-value heads, one seed), written by \`make table4\`, with the paper's figures below."
    echo
    echo '```'
    sed -n '/windows of/,/^report:/p' $out/report.log | sed '/^report:/d'
    echo '```'
} >docs/table4.md
cat docs/table4.md
