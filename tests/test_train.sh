#!/usr/bin/env bash
# Drives ./train end to end on tiny models: what it writes, stops and kills, divergence, bad input, full disks.
# TRAIN names another binary.
#     tests/test_train.sh [--runs]    only whole runs, their bits by threads, resumed and with experts: for tests/test_isa.sh
set -u
train=${TRAIN:-./train}
train=$(cd "$(dirname "$train")" && pwd)/$(basename "$train")
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
. tests/runs.sh
mounted=
trap '[ -n "$mounted" ] && umount "$mounted"; rm -rf "$work"' EXIT
cd "$work" || exit 1

# refuse NAME CODE PATTERN ARGUMENT...
refuse() {
    local name=$1 code=$2 pattern=$3
    shift 3
    refuses "$name" "$code" "^train: .*$pattern" timeout 20 "$train" "$@"
}

lines() { cat "$1" 2>/dev/null | wc -l | tr -d ' '; }
wait_for_lines() { # FILE COUNT
    for _ in $(seq 1000); do
        [ "$(lines "$1")" -ge "$2" ] && return 0
        sleep 0.01
    done
    return 1
}
shorten() { head -c "$2" "$1" >short && mv short "$1"; } # FILE SIZE
put_bytes() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; } # FILE OFFSET BYTES

cat >tiny.cfg <<END
vocab_size = 96
d_model = 32
n_layers = 2
n_heads = 4
n_kv_heads = 2
head_dim = 8
d_ff = 48
max_seq_len = 32
data = gen:backcopy
batch_size = 2
gradient_accumulation_steps = 2
max_steps = 40
warmup_steps = 5
learning_rate = 3e-3
log_every = 5
eval_every = 10
eval_windows = 5
save_every = 7
threads = 1
END

# ---- help and dry run

check "--help exits 0" "$train" --help
check "--help names keys, choices and sources" sh -c "'$train' --help | grep -q gate_position &&
    '$train' --help | grep -q 'none G1 G2 G3 G4 G5' && '$train' --help | grep -q trigger_rate"
check "and each group of keys once" sh -c "[ \$('$train' --help | grep -c '^[A-Z][A-Z]*\$') -eq 4 ]"
check "--dry-run exits 0" "$train" tiny.cfg --dry-run
check "--dry-run leaves nothing behind" test ! -e checkpoints

cat >paper.cfg <<END
vocab_size = 152064
d_model = 2048
n_layers = 28
n_heads = 16
n_kv_heads = 8
head_dim = 128
d_ff = 6144
max_seq_len = 4096
tied_embeddings = 1
gate_position = none
END
parameters() { "$train" paper.cfg --dry-run "$@" | grep -q "^parameters  $expected "; }
expected=1,720,837,120 check "parameters of the 28-layer baseline" parameters
expected=1,721,754,624 check "parameters of the 28-layer headwise model" parameters gate_position=G1 gate_type=headwise
expected=1,728,177,152 check "parameters of the 28-layer elementwise model" parameters gate_position=G1 d_ff=5504

# ---- a whole run

check "a run exits 0" "$train" tiny.cfg
run=checkpoints/tiny
cp -r $run whole
check "metrics.jsonl has a line for each step" sh -c "[ \"\$(sed -E 's/^\\{\"step\":([0-9]+),.*/\\1/' $run/metrics.jsonl | tr '\\n' ' ')\" = '$(seq 40 | tr '\n' ' ')' ]"
number='-?[0-9][-+.0-9e]*'
check "every line has loss, lr, grad_norm, tokens_per_s and tokens" sh -c "! grep -Evq '^\\{\"step\":[0-9]+,\"loss\":$number,\"lr\":$number,\"grad_norm\":$number,\"tokens_per_s\":$number,\"tokens\":[0-9]+[,}]' $run/metrics.jsonl"
evaluated="\"val_loss\":$number,\"f_attn\":$number,\"f_attn_by_layer\":\[$number,$number\],\"sink_share\":null,\"sink_share_by_layer\":null,\"m_act\":$number,\"max_act_by_layer\":\[$number,$number\],\"gate_mean\":$number,\"gate_mean_by_layer\":\[$number,$number\],\"lowest_loss\":$number\}$"
check "steps 10, 20, 30 and 40 are evaluated" sh -c "[ \$(grep -Ec '$evaluated' $run/metrics.jsonl) -eq 4 ] && [ \$(grep -c val_loss $run/metrics.jsonl) -eq 4 ]"
check "the tokens are counted" grep -q '^{"step":40,.*"tokens":5120,' $run/metrics.jsonl
check "the loss falls" awk -F'[:,]' 'NR == 1 { first = $4 } END { exit !($4 < 0.96 * first) }' $run/metrics.jsonl
check "the warm-up is linear" grep -q '^{"step":1,.*"lr":0.0006,' $run/metrics.jsonl
check "config.cfg repeats the run" sh -c "'$train' $run/config.cfg output_dir=again && cmp again/last/model.safetensors $run/last/model.safetensors"
check "a complete run says so" sh -c "'$train' tiny.cfg | grep -q '^complete'"
check "and is left as it was" same_run $run whole
check "without a gate gate_mean is null" sh -c "'$train' tiny.cfg gate_position=none max_steps=2 output_dir=plain && grep -q '\"gate_mean\":null,\"gate_mean_by_layer\":null' plain/metrics.jsonl"
check "a sink logit's share is recorded and printed" sh -c "'$train' tiny.cfg attention_sink=learned max_steps=2 output_dir=sink | grep -q ' F-Attn .* sink 0\\.' && grep -Eq '\"sink_share\":$number,\"sink_share_by_layer\":\\[$number,$number\\]' sink/metrics.jsonl"
check "samples are printed" sh -c "'$train' tiny.cfg output_dir=sampled max_steps=4 sample_every=2 sample_tokens=5 | grep -Eqc '^sample +<s> (t?T?[0-9]+ ){7}\\| (t?T?<?[s0-9]+>? ){5}$'"
check "--profile shows operators, speed and memory" sh -c "'$train' tiny.cfg output_dir=profiled max_steps=2 --profile >profile.out &&
    grep -q '^linear_backward .*%' profile.out && grep -Eq '^tokens per second [0-9]+, peak memory' profile.out"

# ---- determinism

for threads in 1 2 3; do "$train" tiny.cfg threads=$threads output_dir=threads-$threads >/dev/null; done
check "1 and 2 threads give the same bits" same_run threads-1 threads-2
check "1 and 3 threads give the same bits" same_run threads-1 threads-3
check "a run in another directory is the same" same_run threads-1 whole
"$train" tiny.cfg seed=2 output_dir=seed-2 >/dev/null
check "another seed is not" sh -c "test -s seed-2/last/model.safetensors && ! cmp -s seed-2/last/model.safetensors whole/last/model.safetensors"

# ---- a mixture of experts

experts="n_experts=6 experts_per_token=2 d_ff=24"
for threads in 1 3; do "$train" tiny.cfg $experts threads=$threads output_dir=experts-$threads >experts.out; done
check "a mixture: 1 and 3 threads give the same bits" same_run experts-1 experts-3
"$train" tiny.cfg $experts recompute=1 output_dir=experts-lean >/dev/null
check "a mixture: recomputed activations give the same bits" same_run experts-1 experts-lean
"$train" tiny.cfg $experts save_every=1 output_dir=experts-stopped >/dev/null &
pid=$!
wait_for_lines experts-stopped/metrics.jsonl 9
kill -INT $pid
wait $pid
"$train" tiny.cfg $experts output_dir=experts-stopped >/dev/null
check "a mixture: stopped and resumed equals never stopped" same_run experts-stopped experts-1
check "its parameters are told apart" sh -c "'$train' tiny.cfg $experts --dry-run | grep -Eq '^parameters .*; [0-9,]+ activated by a token$'"
check "the load of its experts and the routers' losses are printed" grep -Eq '^step 40/40 .* load [0-9.]+ \([0-9.]+ in layer [01]\) dead [0-9.]+ balance [0-9.]+ z [0-9.]+ ' experts.out
pair="\\[$number,$number\\]"
check "and recorded in each step, with the losses of the routers" sh -c "[ \$(grep -Ec '\"load_balance\":$number,\"load_balance_by_layer\":$pair,\"router_z\":$number,\"router_z_by_layer\":$pair,\"expert_max_load\":$number,\"expert_max_load_by_layer\":$pair,\"expert_dead\":$number,\"expert_dead_by_layer\":$pair' experts-1/metrics.jsonl) -eq 40 ]"
refuse "more experts for a token than there are" 2 "experts_per_token=7 is above n_experts=6" tiny.cfg $experts experts_per_token=7
refuse "a single expert" 2 "n_experts=1 " tiny.cfg n_experts=1
refuse "a negative coefficient" 2 "load_balance_coef: -1 is out of range" tiny.cfg $experts load_balance_coef=-1

[ "${1-}" != --runs ] || finish

# ---- stopping, killing, going on

long="max_steps=1500 save_every=100 eval_every=250 sample_every=300 sample_tokens=4"
"$train" tiny.cfg $long output_dir=long >/dev/null
for stop in INT:30 TERM:700; do
    signal=${stop%:*} after=${stop#*:}
    stopped="it's stopped by $signal"
    "$train" tiny.cfg $long output_dir="$stopped" >stop.out 2>&1 &
    pid=$!
    wait_for_lines "$stopped/metrics.jsonl" $after
    kill -$signal $pid
    wait $pid
    code=$?
    check "SIG$signal saves and exits 0" sh -c "[ $code -eq 0 ] && grep -q '^stopped' stop.out && test -e \"$stopped\"/last/model.safetensors"
    check "before the end" [ "$(lines "$stopped/metrics.jsonl")" -lt 1500 ]
    sh -c "$(sed -n "/; go on with\$/,\$ { /go on with\$/d; p; }" stop.out)" >/dev/null 2>&1
    check "stopped by SIG$signal and resumed equals never stopped" same_run "$stopped" long
done

# Each kill comes a random number of steps beyond the last checkpoint; a torn last line is what a full page cache leaves.
kills=0
while [ $kills -lt 12 ]; do
    "$train" tiny.cfg $long output_dir=killed threads=$((kills % 3 + 1)) >/dev/null 2>&1 &
    pid=$!
    wait_for_lines killed/metrics.jsonl $((kills * 110 + RANDOM % 110))
    kill -KILL $pid 2>/dev/null || break
    kills=$((kills + 1))
    wait $pid 2>/dev/null
    printf '{"step":39' >>killed/metrics.jsonl
done
check "it was killed 12 times" [ $kills -eq 12 ]
"$train" tiny.cfg $long output_dir=killed >/dev/null 2>&1
check "killed at random moments and resumed equals never stopped" same_run killed long

cat >slow.cfg <<END
d_model = 256
n_layers = 4
data = gen:random
batch_size = 4
max_steps = 10
END
"$train" slow.cfg >/dev/null 2>&1 &
pid=$!
sleep 1
refuse "two trainers do not write one run" 1 "another trainer" slow.cfg
kill -INT $pid
sleep 0.05
kill -INT $pid
wait $pid
check "a second signal ends at once" [ $? -eq 130 ]

# ---- going on with other keys

refuse "a directory is no configuration" 2 "checkpoints is a directory: ./train takes a configuration" checkpoints
refuse "other model keys do not go on" 2 "d_ff = 64.*48.*--fresh" tiny.cfg d_ff=64
refuse "other gate keys do not go on" 2 "gate_type = headwise.*--fresh" tiny.cfg gate_type=headwise
refuse "other training keys do not go on" 2 "learning_rate = 0\.1.*--fresh" tiny.cfg learning_rate=0.1
check "and leave the run as it was" same_run $run whole
check "keys of the run itself may change" "$train" tiny.cfg log_every=1 threads=1 save_every=3
check "a longer run goes on" sh -c "'$train' tiny.cfg max_steps=45 | grep -q '^note.*max_steps 40' && [ \$(wc -l <$run/metrics.jsonl) -eq 45 ]"
refuse "--fresh of a model larger than memory" 1 "memory" tiny.cfg --fresh max_seq_len=100000 batch_size=10000 n_layers=1024 eval_windows=1
check "removes nothing" test -e $run/last/model.safetensors
check "--fresh starts over" "$train" tiny.cfg --fresh
check "and is the same again" same_run $run whole

check "init_from starts from a checkpoint" sh -c "'$train' tiny.cfg init_from=whole/best output_dir=from max_steps=1 learning_rate=0 min_lr=0 &&
    cmp from/last/model.safetensors whole/best/model.safetensors"
# A gate added late (A.7): all but the gate is the checkpoint's; what else is missing stays an error.
"$train" tiny.cfg gate_position=none max_steps=3 output_dir=ungated >/dev/null
still="max_steps=1 learning_rate=0 min_lr=0"
"$train" tiny.cfg $still init_from=ungated/last output_dir=late >late.out 2>&1
check "init_from adds a gate, and says so" grep -q "^start *from ungated/last: it had no gate, whose 2048 weights start fresh$" late.out
check "which changes the model" sh -c "! cmp -s late/last/model.safetensors ungated/last/model.safetensors"
refuse "and nothing else that is missing" 1 "init_from: .*sandwich_norm is 0 .* 1" tiny.cfg $still sandwich_norm=1 init_from=ungated/last output_dir=other
refuse "init_from does not drop a gate" 1 "init_from: .*gate_position is G1" tiny.cfg $still gate_position=none init_from=whole/best output_dir=other
"$train" tiny.cfg $still rope_base=1e6 max_seq_len=64 init_from=whole/best output_dir=raised >raised.out 2>&1
check "init_from takes another rope_base and length, and says so" grep -q "^start *from whole/best: rope_base was 10000; max_seq_len was 32$" raised.out
"$train" tiny.cfg $still rope_factor=2 rope_original_length=32 max_seq_len=64 init_from=whole/best output_dir=yarn >yarn.out 2>&1
check "init_from goes on with YaRN, and says so" grep -q "^start *from whole/best: rope_factor was 1; rope_original_length was 0; max_seq_len was 32$" yarn.out
check "the checkpoint keeps it" grep -q '"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, ' yarn/last/config.json
refuse "a factor below 1" 2 "rope_factor.* 0.5 " tiny.cfg rope_factor=0.5
# What other programs wrote: the model's keys come from there.
outside() { # NAME DIRECTORY KEY...: a training goes on from the fixture, and its checkpoint has these keys
    local name=$1 directory=$root/tests/fixtures/$2
    shift 2
    printf 'data = gen:random,vocab=30\nmax_seq_len = 12\nthreads = 1\nuse_amp = off\nmax_steps = 2\nwarmup_steps = 0\n' >outside.cfg
    printf 'gradient_accumulation_steps = 1\neval_windows = 2\ngate_position = %s\n' "${1#*gate_position=}" >>outside.cfg
    "$train" outside.cfg init_from="$directory" output_dir=outside --fresh >out 2>&1 || { bad "$name: $(tail -1 out)"; return; }
    "$train" outside.cfg init_from="$directory" output_dir=outside max_steps=3 >>out 2>&1 || { bad "$name: $(tail -1 out)"; return; }
    for key; do grep -qx "${key%%=*} = ${key#*=}" outside/config.cfg || { bad "$name: no $key"; return; }; done
    ok "$name"
}
outside "init_from the authors' elementwise gate, in shards" hf_elementwise gate_position=G1 d_model=24 gate_type=elementwise
outside "init_from the authors' headwise gate, BF16" hf_headwise gate_position=G1 n_heads=6 gate_type=headwise tied_embeddings=1
outside "init_from the authors' baseline, F16" hf_baseline gate_position=none d_ff=40
outside "init_from Llama" outside_llama gate_position=none qk_norm=0 rope_base=500000
outside "init_from Qwen3-Next's attention layers" outside_qwen3_next gate_position=G1 partial_rotary_factor=0.25 head_dim=16

refuse "init_from a checkpoint of another shape" 1 "init_from: .*n_layers is 2 .* 3" tiny.cfg init_from=whole/best output_dir=other n_layers=3
refuse "init_from a directory that is none" 1 "nowhere" tiny.cfg init_from=nowhere output_dir=other

# ---- epochs and files

head -c 20000 /dev/urandom | base64 | tr -d '\n' | fold -w 60 | head -c 6433 >text.txt
file="data=text.txt vocab_size=256 max_seq_len=32 max_steps=0"
losses() { sed -E 's/.*"loss":([^,]*),.*/\1/' "$1/metrics.jsonl"; }
still="learning_rate=0 min_lr=0 gradient_accumulation_steps=1 batch_size=4 eval_every=0"
"$train" tiny.cfg $file $still max_tokens=0 epochs=2 val_fraction=0 shuffle=0 output_dir=file >file.out 2>&1
check "two epochs of a whole file" [ "$(lines file/metrics.jsonl)" -eq 101 ]
check "val_fraction = 0 holds nothing out, and says so" sh -c "grep -q 'nothing is held out' file.out && test ! -e file/best && ! grep -q val_loss file/metrics.jsonl"
for source in gen:backcopy text.txt; do
    for shuffle in 0 1; do
        "$train" tiny.cfg $file $still data=$source max_tokens=1280 epochs=3 shuffle=$shuffle output_dir=epochs >/dev/null 2>&1
        mean() { losses epochs | sed -n "$1" | awk '{ sum += $1 } END { printf "%.5f", sum }'; }
        check "epochs of $source repeat the same windows, shuffle = $shuffle" [ "$(lines epochs/metrics.jsonl) $(mean 1,10p) $(mean 1,10p)" = "30 $(mean 11,20p) $(mean 21,30p)" ]
        same=$([ "$(losses epochs | sed -n 1,10p)" = "$(losses epochs | sed -n 11,20p)" ] && echo 0 || echo 1)
        check "in another order if shuffled, shuffle = $shuffle" [ "$same" = $shuffle ]
        rm -r epochs
    done
done

# ---- divergence

# A NaN in the last tensor of a checkpoint; and eps = 0, where AdamW divides 0 by 0 for tokens that were not seen.
cp -r whole/best nan
put_bytes nan/model.safetensors $(($(wc -c <nan/model.safetensors) - 4)) '\x00\x00\xc0\x7f'
refuse "a loss that is not finite stops the run" 1 "step 1: .*diverged.*no checkpoint" tiny.cfg init_from=nan output_dir=diverged
check "and metrics.jsonl tells it" grep -q '"loss":null,.*"diverged":true}$' diverged/metrics.jsonl
check "and no checkpoint is written" test ! -e diverged/last
cp -r whole later
later="tiny.cfg max_steps=80 output_dir=later"
put_bytes later/last/model.safetensors $(($(wc -c <later/last/model.safetensors) - 4)) '\x00\x00\xc0\x7f'
cp later/last/model.safetensors kept.safetensors
refuse "a later divergence keeps the last checkpoint" 1 "step 41: .*diverged.*later/last keeps step 40" $later
check "as it was" cmp later/last/model.safetensors kept.safetensors
refuse "a loss that comes back up is divergence, finite as it is" 1 "step 1[0-9]*: the mean loss of 128 steps is [0-9.]*, .* at first .*diverged.*runaway/last keeps step" tiny.cfg max_steps=600 learning_rate=10 min_lr=10 gate_position=none eval_every=0 output_dir=runaway
check "and metrics.jsonl tells it with its figures" grep -Eq "\"loss\":$number,.*\"spikes\":[0-9]+,\"diverged\":true}\$" runaway/metrics.jsonl
# A text that repeats itself, and a byte in it that does not: one step's loss is far above those before.
awk 'BEGIN { for (i = 0; i < 4000; i++) { printf "abcdefgh"; if (i == 3200) for (k = 0; k < 64; k++) printf "~" } }' >spike.txt
spike="data=spike.txt vocab_size=128 batch_size=1 gradient_accumulation_steps=4 shuffle=0 val_fraction=0 eval_every=0 save_every=100"
"$train" tiny.cfg $spike max_steps=230 output_dir=spike >spike.out 2>&1
check "a loss spike is told when it comes" grep -Eq "^spike 1 +step 201: loss [0-9.]* after a mean of" spike.out
check "and at the end" grep -Eq "^done .* 1 loss spike, " spike.out
check "and counted in metrics.jsonl" sh -c "[ \$(grep -c '\"spikes\":0' spike/metrics.jsonl) -eq 200 ] && tail -1 spike/metrics.jsonl | grep -q '\"spikes\":1'"
"$train" tiny.cfg $spike max_steps=205 output_dir=spiked >/dev/null 2>&1
"$train" tiny.cfg $spike max_steps=206 output_dir=spiked >spiked.out 2>&1
check "a run that goes on has counted those before" sh -c "tail -1 spiked/metrics.jsonl | grep -q '\"spikes\":1' && ! grep -q '^spike' spiked.out"
refuse "weights that are not finite are not saved" 1 "diverged.*no checkpoint" tiny.cfg eps=0 vocab_size=4096 save_every=1 output_dir=weights

# ---- bad input

printf 'batch_size = 2\nno_such_key = 1\n' >unknown.cfg
printf 'batch_size = many\n' >type.cfg
printf 'batch_size\n' >line.cfg
printf 'seed = 1\nseed = 2\n' >twice.cfg
: >empty.txt
head -c 33 text.txt >short.u32
printf '\x07\x00\xff\xff' | cat - text.txt >large.u16
refuse "no arguments" 2 "usage"
refuse "unknown option" 2 "--frehs" tiny.cfg --frehs
refuse "two configurations" 2 "paper.cfg" tiny.cfg paper.cfg
refuse "missing configuration" 2 "missing.cfg: [^;]*$" missing.cfg
refuse "a configuration without its ending" 2 "tiny: .*; is it tiny.cfg\?" tiny
refuse "a key in the configuration's place" 2 "no configuration: ./train CONFIG.cfg d_model=16" d_model=16
refuse "spaces about =" 2 "d_model: a key is set as key=value, without spaces" tiny.cfg d_model = 16
refuse "unknown key in a file" 2 "unknown.cfg:2.*no_such_key" unknown.cfg
refuse "wrong type in a file" 2 "type.cfg:1.*batch_size" type.cfg
refuse "a line without =" 2 "line.cfg:1" line.cfg
refuse "a key twice" 2 "twice.cfg:2.*seed" twice.cfg
refuse "unknown key on the command line" 2 "no_such_key" tiny.cfg no_such_key=1
refuse "a misspelt key" 2 "unknown key 'max_step'; is it max_steps\?" tiny.cfg max_step=1
refuse "wrong type on the command line" 2 "d_model" tiny.cfg d_model=wide
refuse "an empty value" 2 "d_model" tiny.cfg d_model=
refuse "out of range" 2 "learning_rate" tiny.cfg learning_rate=11
refuse "not a number" 2 "learning_rate" tiny.cfg learning_rate=nan
refuse "negative size" 2 "batch_size" tiny.cfg batch_size=-1
refuse "unknown choice" 2 "gate_position" tiny.cfg gate_position=G6
refuse "a value of several lines" 2 "gate_position" tiny.cfg gate_position=$'G1\nG2'
refuse "heads that do not divide" 2 "n_kv_heads" tiny.cfg n_kv_heads=3
refuse "odd head_dim" 2 "head_dim" tiny.cfg head_dim=7
refuse "impossible gate" 2 "gate_" tiny.cfg gate_activation=rmsnorm
refuse "device = cuda" 2 "device.*CUDA" tiny.cfg device=cuda
GA_ISA=sse9 refuse "an unknown instruction set" 2 "GA_ISA = sse9 is none of: c avx2" tiny.cfg --dry-run
GA_ISA=c refuse "use_amp = on" 2 "use_amp" tiny.cfg use_amp=on
refuse "an endless epoch" 2 "max_tokens" tiny.cfg max_steps=0 max_tokens=0 output_dir=other
refuse "missing data" 1 "missing.txt" tiny.cfg data=missing.txt output_dir=other
refuse "data of an unknown kind" 1 "tiny.cfg" tiny.cfg data=tiny.cfg output_dir=other
refuse "empty data" 1 "empty.txt" tiny.cfg data=empty.txt output_dir=other
refuse "truncated data" 1 "short.u32" tiny.cfg data=short.u32 output_dir=other
refuse "token beyond the vocabulary" 1 "large.u16" tiny.cfg data=large.u16 val_fraction=0 shuffle=0 output_dir=other
refuse "unknown generator" 1 "gen:nothing" tiny.cfg data=gen:nothing output_dir=other
refuse "unknown generator key" 1 "speed" tiny.cfg data=gen:backcopy,speed=1 output_dir=other
refuse "a model larger than memory" 1 "" tiny.cfg max_seq_len=100000 batch_size=10000 n_layers=1024 eval_windows=1 data=gen:random output_dir=other
check "nothing was trained" test ! -e other/last

# ---- broken checkpoints

broken() { rm -rf broken; cp -r whole broken; }
go_on="tiny.cfg max_steps=50 output_dir=broken"
broken; rm -r broken/best; mv broken/last broken/last.replaced
check "killed while a checkpoint was renamed" sh -c "'$train' tiny.cfg output_dir=broken | grep -q '^complete'"
check "--fresh forgets that one too" sh -c "'$train' tiny.cfg output_dir=broken --fresh | grep -q 'begins at step 1' && test ! -e broken/last.replaced"
broken; shorten broken/last/model.safetensors $(($(wc -c <whole/last/model.safetensors) - 100))
refuse "truncated weights" 1 "model.safetensors" $go_on
broken; shorten broken/last/optimizer.safetensors 100
refuse "truncated optimizer state" 1 "optimizer.safetensors" $go_on
broken; put_bytes broken/last/model.safetensors 0 '\xff\xff\xff\xff\xff\xff\xff\x7f'
refuse "false header length" 1 "model.safetensors" $go_on
broken; printf '{"step": ' >broken/last/training_state.json
refuse "truncated training state" 1 "training_state.json" $go_on
broken; rm broken/config.cfg
refuse "no config.cfg" 1 "config.cfg" $go_on
broken; "$train" tiny.cfg d_ff=56 max_steps=1 output_dir=other-shape >/dev/null; cp other-shape/last/model.safetensors broken/last/
refuse "weights of another shape" 1 "" $go_on
check "metrics are kept" cmp broken/metrics.jsonl whole/metrics.jsonl

# ---- disks and directories

refuse "output_dir below a file" 1 "text.txt" tiny.cfg output_dir=text.txt/run
if [ -w /dev/full ]; then
    mkdir full
    ln -s /dev/full full/metrics.jsonl
    refuse "metrics.jsonl on a full disk" 1 "full/metrics.jsonl" tiny.cfg output_dir=full
else
    skip "metrics.jsonl on a full disk (no /dev/full is here)"
fi
mkdir disk
if mount -t tmpfs -o size=200k none disk 2>/dev/null; then
    mounted=$work/disk
    refuse "checkpoints on a full disk" 1 "disk/run/last.*No space left" tiny.cfg output_dir=disk/run eval_every=0
    umount disk && mounted=
else
    skip "checkpoints on a full disk (a small file system cannot be mounted here)"
fi

# ---- a terminal

if script -qec true /dev/null >terminal.out 2>&1; then
    TERM=xterm script -qec "stty cols 50; '$train' tiny.cfg output_dir=terminal save_every=1" /dev/null >terminal.out 2>&1
    check "a terminal has a bar" grep -q '\[#.*\]' terminal.out
    check "that fits its width" sh -c "tr '\\r' '\\n' <terminal.out | sed 's/\\x1b\\[[0-9]*[AK]//g' |
        awk '/^[0-9]+\\/[0-9]+ / || /^loss / { n++; if (length(\$0) > 49) bad = 1 } END { exit bad || n < 2 }'"
else
    skip "a terminal (util-linux's script is not here)"
fi
finish
