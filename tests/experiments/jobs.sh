# Runs of the experiments side by side, as many at once as there are cores; one that fails ends the script, when those that
# run beside it are done. Source it in the repository's root, in sh or bash:
#
#     start COMMAND...    runs it in the background; waits while every core has a run
#     await               waits for all
# shellcheck shell=sh
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=1
j_cores=$(getconf _NPROCESSORS_ONLN)
j_running=

# Waits until at most this many are left, the oldest first.
j_leave() {
    j_most=$1
    # shellcheck disable=SC2086 # process ids
    set -- $j_running
    while [ $# -gt "$j_most" ]; do
        wait "$1" || { wait && exit 1; }
        shift
    done
    j_running=$*
}

start() {
    j_leave $((j_cores - 1))
    "$@" &
    j_running="$j_running $!"
}
await() { j_leave 0; }

# logged LOG COMMAND...: after a failure the log is shown
logged() {
    j_log=$1
    shift
    "$@" >"$j_log" 2>&1 || { cat "$j_log" >&2 && return 1; }
}
