#!/bin/sh
# Ranks with a GPU each, started by environment variables alone: the losses of one process, resuming with another number of
# ranks, a rank that is killed, and what is refused.
#     tests/cuda/ranks.sh TRAIN [MORE]    MORE: also what can only be tested with emulated GPUs
set -u
train=$(realpath "$1")
more=${2-}
cd "$(dirname "$0")/../.." || exit 1
export TEST_GPU=1
. tests/testing.sh
cd "$work" || exit 1
export OMP_NUM_THREADS=1 CUCPU_DEVICES=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + $$ % 20000)) RANKS_TIMEOUT=60
printf 'include = %s\ngradient_accumulation_steps = 4\ndevice = cuda\n' "$OLDPWD/tests/cuda/tiny.cfg" >tiny.cfg

# ranks N key=value...: as many processes, with RANKS_EACH set one GPU visible to each; their output in out.RANK and err.RANK, the exit codes in code.RANK
ranks() {
    n=$1 i=$1
    shift
    MASTER_PORT=$((MASTER_PORT + 1))
    while [ "$i" -gt 0 ]; do
        i=$((i - 1))
        { [ -z "${RANKS_EACH-}" ] || export CUDA_VISIBLE_DEVICES=$i CUCPU_DEVICES=1
            RANK=$i WORLD_SIZE=$n LOCAL_RANK=$i timeout 120 "$train" tiny.cfg "$@" >out.$i 2>err.$i; echo $? >code.$i; } &
    done
    wait
    [ "$(cat code.*)" = "$(yes 0 | head -n "$n")" ] || { cat err.* && false; }
}
losses() { sed -n 's/.*"loss":\([^,]*\),.*/\1/p' "$1/metrics.jsonl"; }
# alike A B TOLERANCE STEPS
alike() {
    losses "$1" >a
    losses "$2" >b
    paste a b | awk -v most="$3" -v steps="$4" '{ d = $1 - $2; if (d < 0) d = -d; if (!(d < most)) bad = 1; n++ }
        END { exit bad || n != steps }' || { paste a b && false; }
}
same() { ranks "$@" && rm code.*; }

check "one process" "$train" tiny.cfg max_steps=6 output_dir=one
check "two ranks train" same 2 max_steps=6 output_dir=two
check "with the losses of one process" alike two one 1e-4 6
check "only rank 0 prints" sh -c 'grep -q "^ranks  *2 (NCCL)" out.0 && [ ! -s out.1 ] && [ ! -s err.0 ] && [ ! -s err.1 ]'
check "two ranks train again" same 2 max_steps=6 output_dir=again
check "to the same bits" cmp two/last/model.safetensors again/last/model.safetensors
check "gradients as bfloat16" same 2 max_steps=6 output_dir=half exchange=bfloat16
check "are not far from it" alike half one 1e-2 6
check "and not the same" sh -c '! cmp -s two/last/model.safetensors half/last/model.safetensors && grep -q lossy out.0'
export RANKS_EACH=1
check "ranks that see one GPU each" same 2 max_steps=6 output_dir=each
unset RANKS_EACH
check "train to the same bits" cmp two/last/model.safetensors each/last/model.safetensors
[ -n "$more" ] || finish

# Names and launchers.
if getent hosts "$(uname -n)" >/dev/null 2>&1; then
    MASTER_ADDR=$(uname -n)
    check "rank 0 by the name of its machine" same 2 max_steps=1 output_dir=named
    port=$((MASTER_PORT + 1))
    { RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=$port "$train" tiny.cfg max_steps=1 output_dir=far >out.0 2>err.0 & }
    check "... is found at any of its addresses" env RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
        timeout 60 "$train" tiny.cfg max_steps=1 output_dir=far
    wait
    MASTER_PORT=$port
    MASTER_ADDR=127.0.0.1
fi
export SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0
check "torchrun's variables mean more than those that it inherits from srun" same 2 max_steps=1 output_dir=srun
unset SLURM_STEP_NUM_TASKS SLURM_PROCID
MASTER_PORT=$((MASTER_PORT + 1))
{ RANK=0 WORLD_SIZE=2 PMI_RANK=0 PMI_SIZE=2 MPI_LOCALRANKID=2 "$train" tiny.cfg max_steps=1 output_dir=local >out.0 2>err.0 & }
check "the rank on this machine by a launcher's variable" env RANK=1 WORLD_SIZE=2 PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=0 \
    CUCPU_DEVICES=1 timeout 60 "$train" tiny.cfg max_steps=1 output_dir=local
wait

check "three ranks begin" same 3 gradient_accumulation_steps=6 max_steps=2 output_dir=turns
check "two go on" same 2 gradient_accumulation_steps=6 max_steps=4 output_dir=turns
check "one ends" "$train" tiny.cfg gradient_accumulation_steps=6 max_steps=6 output_dir=turns
check "one process, six micro-batches" "$train" tiny.cfg gradient_accumulation_steps=6 max_steps=6 output_dir=whole
check "with its losses" alike turns whole 1e-4 6

# killed NAME VARIABLE=VALUE: a rank is killed while they train; the other ends with one line
killed() {
    MASTER_PORT=$((MASTER_PORT + 1))
    RANK=1 WORLD_SIZE=2 "$train" tiny.cfg max_steps=100000 output_dir="$2" >out.1 2>err.1 &
    victim=$!
    RANK=0 WORLD_SIZE=2 timeout 60 env "$2" "$train" tiny.cfg max_steps=100000 output_dir="$2" >out.0 2>err.0 &
    other=$!
    while kill -0 $other 2>/dev/null && ! grep -q '"step"' "$2/metrics.jsonl" 2>/dev/null; do sleep 0.1; done
    kill -9 $victim
    wait $other
    [ $? -eq 1 ] && [ "$(wc -l <err.0)" -eq 1 ] && grep -q "rank 0 of 2: .*rank 1 has ended" err.0
    if [ $? -eq 0 ]; then ok "$1"; else bad "$1" "$(cat err.0)"; fi
}
killed "a killed rank ends the other" RANKS_TIMEOUT=60
killed "also where ncclCommAbort does not return" CUCPU_ABORT_HANGS=1

# What is refused, in one line.
export RANKS_TIMEOUT=1
unset RANK WORLD_SIZE
MASTER_PORT=$((MASTER_PORT + 1))
refuses "WORLD_SIZE without RANK" 1 "WORLD_SIZE is set, but not RANK" env WORLD_SIZE=2 "$train" tiny.cfg
refuses "no address" 1 "RANK is set, but not MASTER_ADDR" env -u MASTER_ADDR RANK=0 WORLD_SIZE=2 "$train" tiny.cfg
refuses "a rank too many" 1 "RANK=2 is not one of WORLD_SIZE=2" env RANK=2 WORLD_SIZE=2 "$train" tiny.cfg
refuses "a rank that is none" 1 "RANK=-1 is not a whole number" env RANK=-1 WORLD_SIZE=2 "$train" tiny.cfg
refuses "an address that is none" 1 "MASTER_ADDR=no.such.host.invalid" \
    env RANK=1 WORLD_SIZE=2 MASTER_ADDR=no.such.host.invalid "$train" tiny.cfg
refuses "a wrong port" 1 "rank 1 finds no rank 0 at 127.0.0.1:" env RANK=1 WORLD_SIZE=2 "$train" tiny.cfg
refuses "nobody comes" 1 "rank 1 of 2 did not come to 127.0.0.1:.* within 1 s" env RANK=0 WORLD_SIZE=2 "$train" tiny.cfg
# together NAME PATTERN-OF-0 PATTERN-OF-1 "VARIABLES OF 0" "VARIABLES OF 1" [key=value...]: both end with 1 and one line
together() {
    name=$1 p0=$2 p1=$3 v0=$4 v1=$5
    shift 5
    MASTER_PORT=$((MASTER_PORT + 1))
    # shellcheck disable=SC2086 # lists of variables
    { env $v1 timeout 60 "$train" tiny.cfg output_dir=never "$@" >out.1 2>err.1; echo $? >code.1; } &
    # shellcheck disable=SC2086
    { env $v0 timeout 60 "$train" tiny.cfg output_dir=never "$@" >out.0 2>err.0; echo $? >code.0; } &
    wait
    if grep -q '^[12]$' code.0 && grep -q '^[12]$' code.1 && [ "$(cat err.0 err.1 | wc -l)" -eq 2 ] &&
        grep -Eq "$p0" err.0 && grep -Eq "$p1" err.1; then ok "$name"; else bad "$name" "$(cat code.? err.?)"; fi
}
export RANKS_TIMEOUT=60
together "ranks disagree on their number" "WORLD_SIZE is 2 for rank 0, and 3 for another" "WORLD_SIZE is 2 for rank 0" \
    "RANK=0 WORLD_SIZE=2" "RANK=1 WORLD_SIZE=3"
together "a GPU that is not there" "rank 1 has ended" "no such GPU: there are 3" \
    "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2" "RANK=1 LOCAL_RANK=3 WORLD_SIZE=2"
together "ranks without GPUs" "need a GPU each|has ended" "need a GPU each|has ended" "RANK=0 WORLD_SIZE=2" "RANK=1 WORLD_SIZE=2" device=cpu
MASTER_PORT=$((MASTER_PORT + 1))
{ env RANK=1 WORLD_SIZE=3 "$train" tiny.cfg >out.2 2>err.2; echo $? >code.2; } &
MASTER_PORT=$((MASTER_PORT - 1))
together "two ranks of one number" "two processes have RANK=1" "two processes have RANK=1" "RANK=0 WORLD_SIZE=3" "RANK=1 WORLD_SIZE=3"
check "all three end" grep -q "two processes have RANK=1" err.2
finish
