#!/bin/sh
# Speed and memory on configs/rtx4060.cfg, beside PyTorch:
#     tests/bench/bench.sh --quick              the share of time by operator, tokens/s, peak memory; needs no PyTorch
#     tests/bench/bench.sh [option of compare.py ...]
#                                               that, and the comparison; writes docs/bench.md and docs/attention.svg
# BENCH_CONFIG is another configuration, BENCH_ATTENTION the longest sequence of the attention part.
set -eu
cd "$(dirname "$0")/../.."
config=${BENCH_CONFIG:-configs/rtx4060.cfg}
work=build/bench
begin=$(date +%s)
export PYTHONDONTWRITEBYTECODE=1
mkdir -p $work
rm -f $work/*.txt $work/*.json # so that no figure of docs/bench.md is of another run

profile() { # use_amp
    ./train "$config" --profile --fresh output_dir=$work/profile use_amp="$1" \
        max_steps=2 gradient_accumulation_steps=8 eval_windows=1 log_every=1000000 >$work/train.log 2>&1 || return
    rm -rf $work/profile
    sed -n -e 's/^device *//p' -e '/^operator/,/^tokens per second/p' $work/train.log
}

echo "== share of time by operator"
uptime | sed 's/.*load average/load average before the run/' >$work/load.txt
profile off | tee $work/profile.txt
[ -s $work/profile.txt ] || { cat $work/train.log >&2 && exit 1; }
if bf16=$(profile on); then
    printf '\n%s\n' "$bf16" | tee -a $work/profile.txt
else
    tail -n 1 $work/train.log
fi
[ "${1:-}" = --quick ] && exit

tests/reference/setup.sh
python="$(pwd)/.venv/bin/python"
make -s $work/products $work/generation

echo "== matrix products"
$work/products | tee $work/products.txt
echo "== the same products in PyTorch"
tests/bench/torch.sh tests/bench/products.py | tee $work/torch_products.txt
echo "== generation"
$work/generation "$config" | tee $work/generation.txt
echo "== attention"
sh tests/bench/attention.sh "${BENCH_ATTENTION:-32768}"
echo "== training"
"$python" tests/bench/compare.py "$config" "$@"
"$python" tests/bench/compare.py "$config" --ours --rounds 6
echo
echo "$((($(date +%s) - begin + 30) / 60)) min" >$work/duration.txt
"$python" tests/bench/table.py "make bench${*:+ BENCH=\"$*\"}" >docs/bench.md
cat docs/bench.md
