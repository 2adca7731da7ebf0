#!/bin/sh
# make bench-cuda: tokens/s and memory of ./train on this GPU beside PyTorch, eager, compiled and by max-autotune, and
# the limits that FLOPs and bytes set.
#     tests/cuda/bench.sh [CONFIG.cfg [key=value ...]]
# Without arguments: configs/rtx4060.cfg, and on a GPU of 70 GB and more the paper's 1.7B model too.
set -eu
cd "$(dirname "$0")/../.."
export CUDA_DEVICE_ORDER=PCI_BUS_ID # so that CUDA counts GPUs as nvidia-smi does
gpu=${CUDA_VISIBLE_DEVICES:-0}
gpu=${gpu%%,*}
# mebibytes FIELD: of the GPU's memory; 0 where nvidia-smi does not know
mebibytes() { nvidia-smi --query-gpu="memory.$1" --format=csv,noheader,nounits -i "$gpu" | grep -x '[0-9]*' || echo 0; }

nvidia-smi -L 2>/dev/null || { echo "no NVIDIA GPU here" && exit 1; }
failed=0
if [ $# -eq 0 ]; then
    sh tests/cuda/bench.sh configs/rtx4060.cfg || failed=1
    [ "$(mebibytes total)" -ge 70000 ] || exit $failed
    set -- configs/paper-1.7b-28l.cfg batch_size=1 recompute=0 gradient_accumulation_steps=8 data=gen:random
fi
config=$1
shift
work=build/bench-cuda/$(basename "$config" .cfg)
rm -rf "$work"
mkdir -p "$work"

# What PyTorch does without on a CPU is Triton, which compiles its kernels, and NVIDIA's libraries: several GB.
requirement=$(grep '^torch==' tests/reference/requirements.txt)
python=$(pwd)/.venv/bin/python
pytorch() {
    tests/reference/setup.sh || return
    "$python" -c 'import triton' 2>/dev/null || "$python" -m pip install --quiet --disable-pip-version-check "$requirement" ||
        return
    "$python" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && return
    echo "PyTorch, built for CUDA $("$python" -c 'import torch; print(torch.version.cuda)'), cannot use this GPU with its driver:"
    echo "$python -m pip install $requirement --index-url URL, with the URL of a wheel for its CUDA (pytorch.org)"
    return 1
}
with_pytorch=1
pytorch || with_pytorch=0

# watch COMMAND...: runs it, and notes the most memory in use beyond what was in use before, in MiB
watch() {
    before=$(mebibytes used) most=$before
    "$@" &
    while kill -0 $! 2>/dev/null; do
        now=$(mebibytes used)
        [ "$now" -gt "$most" ] && most=$now
        sleep 0.2
    done
    memory=$((most - before))
    wait $!
}
median() { sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
# speed METRICS: the median, without the first two steps, which warm up
speed() { sed -n 's/.*"tokens_per_s": *\([0-9.e+]*\).*/\1/p' "$1" | tail -n +3 | median; }

# row NAME METRICS LOG COMMAND...: where a command fails, the others still have their rows
row() {
    name=$1 metrics=$2 log=$3
    shift 3
    if watch "$@" >"$log" 2>"$log.err"; then printf '| %s | %.0f | %s |\n' "$name" "$(speed "$metrics")" "$memory"; else
        printf '| %s | failed, see %s | |\n' "$name" "$log.err"
        tail -n 1 "$log.err" >&2
        failed=1
    fi
}

echo "| $(basename "$config")${*:+ $*} | tokens/s | memory, MiB |"
echo "|---|---:|---:|"
row "./train" "$work/run/metrics.jsonl" "$work/train.log" ./train "$config" "$@" --fresh device=cuda use_amp=on \
    max_steps=22 eval_every=0 eval_windows=1 save_every=0 log_every=1 output_dir="$work/run"
for mode in eager compiled max-autotune; do
    [ $with_pytorch = 1 ] || break
    row "PyTorch, $mode" "$work/torch-$mode.log" "$work/torch-$mode.log" "$python" -W ignore \
        tests/bench/torch_speed.py "$config" "$@" use_amp=on max_steps=22 --device cuda --mode $mode
done
echo
if [ $with_pytorch = 1 ] && [ -s "$work/run/metrics.jsonl" ]; then
    "$python" tests/cuda/limits.py "$config" "$@" --measure --speed "$(speed "$work/run/metrics.jsonl")"
fi
[ $failed = 0 ] && [ $with_pytorch = 1 ]
