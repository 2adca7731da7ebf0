#!/usr/bin/env bash
# Data parallel training on this machine: one process with all cores, then RANKS (2) with a share of them each, with gradients
# in float32 and in bfloat16. Tokens per second, and how much of the exchange of gradients the backward pass hides.
#     tests/bench/ranks.sh [key=value ...]      writes docs/ranks.md; on top of configs/rtx4060.cfg
set -u
cd "$(dirname "$0")/../.." || exit 1
RANKS=${RANKS:-2} STEPS=${STEPS:-4} ACCUMULATE=${ACCUMULATE:-8}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMP_WAIT_POLICY=passive
load=$(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null || uptime | sed 's/.*average[s]*: //; s/[ ,].*//')

# measure NAME RANKS KEY=VALUE...: one row of the table
measure() {
    name=$1 n=$2
    shift 2
    start=
    [ "$n" -eq 1 ] || start="mpirun -np $n"
    # The step of the first touch of memory is not counted.
    $start ./train configs/rtx4060.cfg output_dir="$work/$name" device=cpu max_steps="$STEPS" eval_every=0 val_fraction=0 \
        gradient_accumulation_steps="$ACCUMULATE" save_every=0 log_every=1000 --fresh --profile "$@" >"$work/out" 2>&1 ||
        { tail -n 5 "$work/out" >&2 && exit 1; }
    threads=$(sed -n 's/^device .*, \([0-9]*\) thread.*/\1/p' "$work/out")
    speed=$(sed -n 's/.*"tokens_per_s":\([0-9.]*\).*/\1/p' "$work/$name/metrics.jsonl" | tail -n +2 | sort -n |
        awk '{ x[NR] = $1 } END { printf "%.0f", x[int((NR + 1) / 2)] }')
    sed -n 's/^exchange of gradients \([0-9.]*\) s, of which \([0-9.]*\) s .* weights \([0-9.]*\) s.*/\1 \2 \3/p' "$work/out" |
        awk -v steps="$STEPS" '$1 > 0 {
            printf "%.3f | %.3f | %.0f %% | %.3f\n", $1 / steps, $2 / steps, 100 * (1 - $2 / $1), $3 / steps }' >"$work/times"
    [ -s "$work/times" ] || echo "| | |" >"$work/times"
    echo "| $n x $threads | $name | $speed | $(cat "$work/times") |"
}

{
    echo "# Ranks"
    echo
    echo "Written by \`tests/bench/ranks.sh\`: \`configs/rtx4060.cfg\` with $ACCUMULATE micro-batches a step, $STEPS steps, on a"
    echo "machine with $(getconf _NPROCESSORS_ONLN) cores (load average before: $load). Seconds a step; the exchange of gradients begins in the"
    echo "backward pass of the last micro-batch, and what is not waited for is hidden. Weights follow the update and are waited for."
    echo
    echo "| ranks x threads | gradients sent as | tokens/s | exchange of gradients, s | waited for, s | hidden | weights, s |"
    echo "|---|---|---|---|---|---|---|"
    measure "-" 1 "$@"
    measure float32 "$RANKS" exchange=float32 "$@"
    measure bfloat16 "$RANKS" exchange=bfloat16 "$@"
} >"$work/table" && cp "$work/table" docs/ranks.md && cat docs/ranks.md
