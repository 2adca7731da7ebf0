#!/bin/sh
# The quick pair, gated and not, from nothing to the report:    tests/demo.sh DIRECTORY [key=value ...]
set -eu
dir=$1
shift
start=$(date +%s)
./train configs/quick-baseline.cfg output_dir="$dir/baseline" "$@" --fresh
./train configs/quick.cfg output_dir="$dir/gated" "$@" --fresh
./analyze --models baseline:"$dir/baseline/last" gated:"$dir/gated/last" --output "$dir/report" --interventions
echo "demo: $(($(date +%s) - start)) s; the report is $dir/report/report.html"
