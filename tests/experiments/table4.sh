#!/bin/sh
# Table 4 in small: trains configs/variants/table4-*.cfg, mixtures of experts as the paper's models are, and the same rows
# with a dense FFN as wide as a token's experts; compares them, writes docs/table4.md.
#     tests/experiments/table4.sh [key=value ...]
set -eu
cd "$(dirname "$0")/../.."
. tests/experiments/jobs.sh
out=build/table4
mkdir -p $out docs
dense="n_experts=0 d_ff=96"

rows() { # NAME KEY=VALUE...: every row, as NAME/ROW, and their comparison
    name=$1 models=
    shift
    for config in configs/variants/table4-*.cfg; do
        row=$(basename "$config" .cfg)
        models="$models $row:$out/$name/$row/last"
        start logged "$out/$name-$row.log" ./train "$config" threads=1 output_dir="$out/$name/$row" "$@" --fresh
    done
    await
    # shellcheck disable=SC2086 # several models
    logged $out/"$name".log ./analyze --models $models --num_samples 256 --output $out/"$name"-report
}
part() { # END NAME: the table, up to the line that begins with END
    echo '```'
    printf '%s\n' "$(sed -n "/windows of/,/$1/p" $out/"$2".log | sed "/$1/d")"
    echo '```'
}
activated() { # of the baseline: "230,624 parameters, 175,328 activated by a token"
    ./train configs/variants/table4-01-baseline.cfg "$@" output_dir=$out/size --dry-run |
        sed -n 's/^parameters  *\([0-9,]*\) .*; \(.*\)$/\1 parameters, \2/p; s/^parameters  *\([0-9,]*\) [^;]*$/\1 parameters/p'
}

rows mixture "$@"
# shellcheck disable=SC2086 # several keys
rows dense $dense "$@"
# shellcheck disable=SC2086
{
    echo "# Table 4 in small"
    echo
    echo "Each row of Table 4 on Bigram-Backcopy (\`configs/variants/table4-*.cfg\`: 4 query heads, 2 key-value heads), one seed, written by"
    echo "\`make table4\`, with the paper's figures below. A row rests on the first token as far as its F-Attn lies above that of even attention."
    echo
    echo "As mixtures of 16 experts, 4 for each token, like the paper's of 128 and 8 (the baseline: $(activated "$@")):"
    echo
    part "^the paper" mixture
    echo
    echo "With a dense FFN as wide as a token's experts (\`$dense\`; the baseline: $(activated $dense "$@")):"
    echo
    part "^report:" dense
} >docs/table4.md
cat docs/table4.md
