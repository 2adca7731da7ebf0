#!/bin/sh
# A run that goes from the CPU to the GPU and back: its losses are those of a run that stayed on the CPU.
#     tests/cuda/resume.sh TRAIN
set -eu
train=$(realpath "$1")
config=$(realpath "$(dirname "$0")/tiny.cfg")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$train" "$config" max_steps=6 device=cpu output_dir=stayed >stayed.out
for leg in cpu:2 cuda:4 cpu:6; do
    "$train" "$config" max_steps="${leg#*:}" device="${leg%:*}" output_dir=moved >>moved.out
done
grep -q '^device *cuda' moved.out || { echo "FAIL no leg ran on the GPU" && exit 1; }
losses() { sed -n 's/.*"loss":\([^,]*\),.*/\1/p' "$1/metrics.jsonl"; }
losses stayed >a
losses moved >b
paste a b | awk '{ d = $1 - $2; if (d < 0) d = -d; if (!(d < 1e-4)) bad = 1; n++ }
    END { if (bad || n != 6) exit 1 }' || { echo "FAIL losses differ" && paste a b && exit 1; }
echo "ok cpu, cuda, cpu: the losses of a run on the CPU"
