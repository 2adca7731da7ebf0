# What a run leaves, for the scripts that compare runs. Sourced by bash.
# shellcheck shell=bash

# trace RUN: its metrics, without its timing
trace() { sed -E 's/"tokens_per_s":[^,]*,//' "$1/metrics.jsonl"; }

# same_run RUN RUN: bit for bit, metrics and checkpoints
same_run() {
    [ -s "$1/metrics.jsonl" ] && cmp <(trace "$1") <(trace "$2") || return 1
    for file in last/model.safetensors last/optimizer.safetensors last/training_state.json best/model.safetensors; do
        cmp "$1/$file" "$2/$file" || return 1
    done
}
