#!/bin/sh
# make bench-cuda: tokens/s and memory of ./train on this GPU beside PyTorch, eager and compiled, and the limits that
# FLOPs and bytes set.
#     tests/cuda/bench.sh [CONFIG.cfg [key=value ...]]      default: configs/rtx4060.cfg
set -eu
cd "$(dirname "$0")/../.."
config=${1:-configs/rtx4060.cfg}
[ $# -gt 0 ] && shift
work=build/bench-cuda
rm -rf $work
mkdir -p $work
nvidia-smi -L || { echo "no NVIDIA GPU here" && exit 1; }
tests/reference/setup.sh
python="$(pwd)/.venv/bin/python"
# What PyTorch does without on a CPU: Triton, which compiles its kernels.
"$python" -c 'import triton' 2>/dev/null ||
    "$python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' tests/reference/requirements.txt)"
used() { nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i 0; }

# watch COMMAND...: runs it, and notes the most memory in use beyond what was in use before, in MiB
watch() {
    before=$(used) most=0
    "$@" &
    while kill -0 $! 2>/dev/null; do
        now=$(used)
        [ "$now" -gt "$most" ] && most=$now
        sleep 0.2
    done
    wait $! && echo $((most - before)) >$work/memory
}
median() { sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
row() { # NAME SPEEDS: without the first two steps, which warm up
    printf '| %s | %.0f | %s |\n' "$1" "$(tail -n +3 "$2" | median)" "$(cat $work/memory)"
}
speeds() { sed -n 's/.*"tokens_per_s": *\([0-9.e+]*\).*/\1/p' "$1"; }

{
    echo "| $(basename "$config") $* | tokens/s | memory, MiB |"
    echo "|---|---:|---:|"
    watch ./train "$config" "$@" --fresh device=cuda use_amp=on max_steps=22 eval_every=0 save_every=0 log_every=1 \
        output_dir=$work/run >$work/train.log
    speeds $work/run/metrics.jsonl >$work/speeds
    row "./train" $work/speeds
    for mode in eager compiled; do
        watch "$python" -W ignore tests/bench/torch_speed.py "$config" "$@" use_amp=on max_steps=22 --device cuda \
            --mode $mode >$work/torch.log
        speeds $work/torch.log >$work/speeds
        row "PyTorch, $mode" $work/speeds
    done
    : >$work/complete
} | tee $work/table.md
[ -f $work/complete ] || { echo "a row failed: see the logs in $work" >&2 && exit 1; }
echo
"$python" tests/cuda/limits.py "$config" "$@" --measure
