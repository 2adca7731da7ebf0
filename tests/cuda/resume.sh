#!/bin/sh
# A run that goes from the CPU to the GPU and back: its losses are those of a run that stayed on the CPU.
#     tests/cuda/resume.sh TRAIN
set -eu
train=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >tiny.cfg <<END
vocab_size = 96
d_model = 16
n_layers = 2
n_heads = 2
n_kv_heads = 1
head_dim = 8
d_ff = 24
max_seq_len = 16
batch_size = 2
gradient_accumulation_steps = 2
data = gen:random
learning_rate = 1e-3
min_lr = 1e-3
warmup_steps = 0
eval_windows = 2
log_every = 1
use_amp = off
threads = 1
END
"$train" tiny.cfg max_steps=6 device=cpu output_dir=stayed >stayed.out
for leg in cpu:2 cuda:4 cpu:6; do
    "$train" tiny.cfg max_steps="${leg#*:}" device="${leg%:*}" output_dir=moved >>moved.out
done
grep -q '^device *cuda' moved.out || { echo "FAIL no leg ran on the GPU" && exit 1; }
losses() { sed -n 's/.*"loss":\([^,]*\),.*/\1/p' "$1/metrics.jsonl"; }
losses stayed >a
losses moved >b
paste a b | awk '{ d = $1 - $2; if (d < 0) d = -d; if (!(d < 1e-4)) bad = 1; n++ }
    END { if (bad || n != 6) exit 1 }' || { echo "FAIL losses differ" && paste a b && exit 1; }
echo "ok cpu, cuda, cpu: the losses of a run on the CPU"
