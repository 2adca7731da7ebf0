#!/usr/bin/env bash
# Several ranks under mpirun: the run of one rank, in any number; resumed with another; failures and signals that end all; the
# same in short with another MPI that is here.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
. tests/runs.sh
train=$root/train analyze=$root/analyze mpirun=mpirun
[ -e build/mpi/libranks_mpi.so ] || { skip "ranks over MPI (train is built without: mpicc is not here)" && finish; }
has mpirun "ranks over MPI" || finish
cd "$work" || exit 1
export OMP_NUM_THREADS=1
# Open MPI: as root in containers, more ranks than cores, on any core, without copies between processes that need ptrace.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none

# ranks N ARGUMENTS...: train on N ranks
ranks() {
    local n=$1
    shift
    timeout 60 "$mpirun" -n "$n" "$train" "$@"
}
# refuse NAME RANKS CODE PATTERN ARGUMENTS...: one line of train's on stderr, beside what mpirun has to say
refuse() {
    local name=$1 n=$2 code=$3 pattern=$4
    shift 4
    prints "$name" "$code" "^train: .*$pattern" ranks "$n" "$@"
    check "... in one line" test "$(grep -c '^train: ' "$work/.said")" -eq 1
}
# near RUN RUN TOLERANCE: every figure of every step, relative to what it is
near() {
    paste -d '\n' <(trace "$1") <(trace "$2") | awk -v tolerance="$3" '
        { n = split($0, fields, /[][,:{}]+/) }
        NR % 2 { for (i = 1; i <= n; i++) before[i] = fields[i]; count = n; next }
        n != count { print "line " NR / 2 ": other fields"; exit bad = 1 }
        { for (i = 1; i <= n; i++) {
              a = before[i]; b = fields[i]; d = a - b; size = a < 0 ? -a : a
              if (a == b) continue
              if (!((d < 0 ? -d : d) <= tolerance * (size > 1e-3 ? size : 1e-3))) {
                  print "line " NR / 2 ", " fields[i - 1] ": " a " and " b; exit bad = 1
              } } }
        END { exit bad || NR == 0 }'
}
not() { ! "$@"; }

cat >tiny.cfg <<END
data = gen:backcopy
vocab_size = 61
d_model = 24
n_layers = 3
n_heads = 4
n_kv_heads = 2
head_dim = 6
d_ff = 40
max_seq_len = 20
batch_size = 2
gradient_accumulation_steps = 4
max_steps = 12
warmup_steps = 3
learning_rate = 3e-3
val_fraction = 0.1
eval_windows = 9
eval_every = 4
save_every = 6
log_every = 5
sample_every = 6
sample_tokens = 5
use_amp = off
device = cpu
END

# ---- the same run ----
"$train" tiny.cfg output_dir=one >one.out 2>&1
check "one rank under mpirun: the same bits" ranks 1 tiny.cfg output_dir=launched
check "... in all that it leaves" same_run one launched
ranks 2 tiny.cfg output_dir=two >two.out 2>&1
check "two ranks have the losses, norms and figures of one" near one two 1e-4
check "... and are told of" grep -Eq '^ranks +2 \(.+\), 2 on this machine: 2 micro-batches of a step each' two.out
check "... by one of them" test "$(grep -c '^model ' two.out)" -eq 1
check "two ranks again" ranks 2 tiny.cfg output_dir=again
check "... the same bits" same_run two again
check "four ranks" ranks 4 tiny.cfg output_dir=four
check "... have the losses, norms and figures of one" near one four 1e-4
mixture="n_experts=5 experts_per_token=2 load_balance_coef=0.5 d_ff=12"
"$train" tiny.cfg output_dir=mixture $mixture >mixture.out 2>&1
check "a mixture of experts on two ranks" ranks 2 tiny.cfg output_dir=mixture2 $mixture
check "... has the losses and the load of one" near mixture mixture2 1e-4
check "analyze reads what ranks wrote" "$analyze" --models one:one two:two --data gen:backcopy --num_samples 4 --output report
check "... and finds the same" awk -F '"loss":' '{ split($2, a, ","); loss[NR] = a[1] }
    END { d = (loss[1] - loss[2]) / loss[1]; exit !(d < 1e-4 && d > -1e-4) }' <(grep -o '"loss":[^,]*,' report/summary.json)

# ---- gradients as bfloat16 ----
prints "bfloat16 between ranks is said to be lossy" 0 'gradients sent as bfloat16 \(lossy: rounded to 8 bits' \
    ranks 2 tiny.cfg output_dir=rounded exchange=bfloat16
check "... is near" near one rounded 2e-2
check "... and is rounded" not near one rounded 1e-5

# ---- memory ----
optimizer() { sed -n 's/^memory .*optimizer \([0-9.]*\) .*/\1/p' "$1"; }
"$train" tiny.cfg --dry-run >dry1.out 2>&1
ranks 2 tiny.cfg --dry-run >dry2.out 2>&1
check "half of the moments is planned for each of two" awk -v a="$(optimizer dry1.out)" -v b="$(optimizer dry2.out)" \
    'BEGIN { exit !(b / a > 0.49 && b / a < 0.52) }'

prints "ranks without a number of threads share the cores" 0 'thread.* \(for each rank' \
    env -u OMP_NUM_THREADS timeout 60 "$mpirun" -n 2 "$train" tiny.cfg --dry-run

# ---- resumed with any number of ranks ----
check "two ranks, a part of the run" ranks 2 tiny.cfg output_dir=parts max_steps=6
cp -r parts stopped
check "... two go on" ranks 2 tiny.cfg output_dir=parts
"$train" tiny.cfg output_dir=whole max_steps=6 >whole.out 2>&1 && "$train" tiny.cfg output_dir=whole >>whole.out 2>&1
check "... as one does" near whole parts 1e-4
mv stopped mixed
check "... one goes on" "$train" tiny.cfg output_dir=mixed max_steps=9
check "... and then two" ranks 2 tiny.cfg output_dir=mixed
check "... all its steps are there" test "$(wc -l <mixed/metrics.jsonl)" -eq 12

# ---- failures ----
refuse "a number that cannot be shared" 3 2 "gradient_accumulation_steps = 4 cannot be spread over 3 ranks" tiny.cfg output_dir=x
refuse "an unknown key: one line, of all" 2 2 "unknown key 'nope'" tiny.cfg nope=1
refuse "data that is not there" 2 1 "/none.bin: cannot be opened" tiny.cfg data=/none.bin output_dir=x
refuse "another number of micro-batches" 2 2 "gradient_accumulation_steps = 8, but the run in two began with 4" \
    tiny.cfg output_dir=two gradient_accumulation_steps=8
exec 7<>two/metrics.jsonl
flock -n 7
refuse "what only rank 0 finds" 2 1 "rank 0 of 2: two: another trainer is writing this run" tiny.cfg output_dir=two max_steps=20
exec 7>&-
refuse "divergence, found by all" 2 1 "the run diverged" tiny.cfg output_dir=wild learning_rate=10 min_lr=10 init_std=9 \
    grad_clip=0 max_steps=400 eval_every=0 sample_every=0
mkdir -p elsewhere && cp "$train" elsewhere/
train=$work/elsewhere/train refuse "without its companion" 2 1 "MPI cannot be used: " tiny.cfg output_dir=x

prints "a launcher of another MPI" 1 '^train: the launcher has started 3 processes, of which .* knows 1' \
    env PMI_SIZE=3 PMI_RANK=0 timeout 60 "$root/train" tiny.cfg output_dir=x

# ---- signals ----
# begin RUN: two ranks that will not end by themselves; their process ids in $first and $second, mpirun's in $launcher
begin() {
    "$mpirun" -n 2 "$train" tiny.cfg output_dir="$1" max_steps=1000000 eval_every=0 sample_every=0 save_every=0 log_every=1000 \
        >"$1.out" 2>&1 &
    launcher=$!
    for _ in $(seq 300); do
        [ "$(wc -l 2>/dev/null <"$1/metrics.jsonl" || echo 0)" -ge 3 ] && break
        sleep 0.05
    done
    # shellcheck disable=SC2046
    set -- $(pgrep -f "^$train tiny.cfg output_dir=$1 ")
    first=${1:-0} second=${2:-0}
}
ended() { # the launcher, within ten seconds; its exit code is in $code
    for _ in $(seq 100); do
        kill -0 "$launcher" 2>/dev/null || break
        sleep 0.1
    done
    kill -0 "$launcher" 2>/dev/null && kill -KILL "$launcher" "$first" "$second" && return 1
    wait "$launcher"
    code=$?
}
gone() { # process, within five seconds
    for _ in $(seq 50); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    return 1
}
signals() { # names of two runs
    begin "$1"
    kill -KILL "$second"
    check "a rank is killed: all end" ended
    ended
    check "... as a failure" test "$code" -ne 0
    check "... the other rank too" gone "$first"
    begin "$2"
    kill -TERM "$second"
    check "a rank is asked to stop: all stop" ended
    ended
    check "... in good order" test "$code" -eq 0
    check "... saved" test -e "$2/last/training_state.json"
    check "... and say so once" test "$(grep -c '^stopped at step' "$2.out")" -eq 1
    steps=$(wc -l <"$2/metrics.jsonl")
    check "... what was left goes on alone" "$train" tiny.cfg output_dir="$2" max_steps=$((steps + 2)) eval_every=0 sample_every=0
}
signals killed asked

# ---- another MPI, by the names that Debian gives them side by side ----
for other in mpich openmpi; do
    [ "$(readlink -f "$(command -v mpirun)")" != "$(readlink -f "$(command -v mpirun.$other)")" ] || continue
    has mpicc.$other "ranks over another MPI, $other" || continue
    mkdir -p $other/build/mpi && cp "$root/train" $other/
    check "$other: the shared object, without a warning" mpicc.$other -std=c11 -O2 -Wall -Wextra -Werror -fPIC -shared \
        "$root/drivers/train/ranks_mpi.c" -o $other/build/mpi/libranks_mpi.so -lpthread -lm
    train=$work/$other/train mpirun=mpirun.$other
    ranks 2 tiny.cfg output_dir=$other-two >$other.out 2>&1
    check "$other: two ranks have the bits of two" same_run two $other-two
    check "$other: ... and are told of" grep -Eiq '^ranks +2 \(.*MPI.*\), 2 on this machine' $other.out
    refuse "$other: an unknown key: one line, of all" 2 2 "unknown key 'nope'" tiny.cfg nope=1
    refuse "$other: what only rank 0 finds" 2 1 "rank 0 of 2: .*: File exists|rank 0 of 2: .*: Not a directory" tiny.cfg output_dir=tiny.cfg/x
    signals $other-killed $other-asked
done

finish
