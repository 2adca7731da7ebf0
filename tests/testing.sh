# What the test scripts share, in sh and in bash. Source it in the repository's root:
#
#     cd "$(dirname "$0")/.." || exit 1
#     . tests/testing.sh
#
#     check NAME COMMAND...                  the command succeeds
#     prints NAME CODE PATTERN COMMAND...    it ends with this code, and a line that it prints matches PATTERN (grep -E)
#     refuses NAME CODE PATTERN COMMAND...   it ends with this code and with one line on stderr, which matches
#     said PATTERN                           what the last of these two printed has such a line
#     ok NAME, bad NAME [WHY]                what none of these can say
#     skip WHAT (WHY)                        what cannot be tested here: counted, and shown by tests/run.sh
#     has PROGRAM [WHAT]                     the program is there; else what needs it is skipped
#     cmocka NAME PROGRAM [FILTER [SKIP]]    each test of the program counts; none is a failure
#     finish                                 the closing line "N passed, N failed[, N skipped]", and the exit status
#
# $root is the repository, $work an empty directory that is removed at the end. Names that begin with t_ are its own.
# Programs find no GPU, unless TEST_GPU is set: what they print and the last bits of their results depend on it.
# shellcheck shell=sh
root=$PWD
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
[ -n "${TEST_GPU-}" ] || export CUDA_VISIBLE_DEVICES=
export LC_ALL=C OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=1
mkdir -p build/log
passed=0 failed=0 skipped=0
command -v timeout >/dev/null || timeout() { shift && "$@"; } # not on macOS: there without a limit

ok() { passed=$((passed + 1)) && echo "ok   $1"; }
bad() { failed=$((failed + 1)) && echo "FAIL $1${2:+: $(printf '%s' "$2" | tr '\n' ' ' | cut -c 1-400)}"; }
skip() { skipped=$((skipped + 1)) && echo "skipped: $*"; }
has() { command -v "$1" >/dev/null 2>&1 || { skip "${2:-what needs $1} ($1 is not here)" && return 1; }; }

check() {
    t_name=$1
    shift
    if "$@" >"$work/.check" 2>&1; then ok "$t_name"; else bad "$t_name" "$(cat "$work/.check")"; fi
}

prints() {
    t_name=$1 t_code=$2 t_pattern=$3
    shift 3
    "$@" >"$work/.said" 2>&1
    t_status=$?
    if [ "$t_status" -ne "$t_code" ]; then bad "$t_name" "exit code $t_status, not $t_code: $(cat "$work/.said")"
    elif ! grep -Eq -- "$t_pattern" "$work/.said"; then bad "$t_name" "$(cat "$work/.said")"
    else ok "$t_name"; fi
}

refuses() {
    t_name=$1 t_code=$2 t_pattern=$3
    shift 3
    "$@" >"$work/.out" 2>"$work/.err"
    t_status=$?
    grep -v '^==.*Sanitizer' "$work/.err" >"$work/.said" # a note of its own
    if [ "$t_status" -ne "$t_code" ]; then bad "$t_name" "exit code $t_status, not $t_code: $(cat "$work/.said")"
    elif [ "$(wc -l <"$work/.said")" -ne 1 ]; then bad "$t_name" "not one line on stderr: $(cat "$work/.said")"
    elif ! grep -Eq -- "$t_pattern" "$work/.said"; then bad "$t_name" "$(cat "$work/.said")"
    else ok "$t_name"; fi
}

said() { grep -Eq -- "$1" "$work/.said" || { cat "$work/.said" && return 1; }; }

# tally LOG STATUS: sets p, f and s, how many tests passed, failed and were skipped, by a script's closing line or cmocka's. A
# crash is a failure, and so is a run in which there was nothing to test.
tally() {
    t_closing=$(grep -a '^[0-9]* passed, [0-9]* failed' "$1" | tail -n 1)
    if [ -n "$t_closing" ]; then
        p=${t_closing%% *} f=${t_closing#*, } s=0
        f=${f%% *}
        case $t_closing in *skipped) s=${t_closing##*failed, } s=${s%% *} ;; esac
    else # a failed test is named where it failed, and at the end
        p=$(grep -ac '^\[       OK \]' "$1")
        f=$(grep -a '^\[  FAILED  \] [a-zA-Z_]' "$1" | sort -u | wc -l)
        s=$(grep -a '^\[  SKIPPED \] [a-zA-Z_]' "$1" | sort -u | wc -l)
    fi
    [ "$2" -eq 0 ] || [ "$f" -gt 0 ] || f=1
    [ $((p + f + s)) -gt 0 ] || f=1
}

cmocka() {
    t_log="build/log/$(echo "$1" | tr ' ,' '-_').log"
    "$2" ${3+"$3"} ${4+"$4"} >"$t_log" 2>&1
    tally "$t_log" $?
    echo "$1: $p passed, $f failed, $s skipped"
    [ "$f" -eq 0 ] || grep -aE '^\[ +(ERROR|FAILED)|^cucpu|Sanitizer|runtime error' "$t_log" | head -n 10 | sed 's/^/FAIL /'
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

finish() {
    t_skipped=
    [ "$skipped" -eq 0 ] || t_skipped=", $skipped skipped"
    echo "$passed passed, $failed failed$t_skipped"
    [ "$failed" -eq 0 ] && [ $((passed + skipped)) -gt 0 ]
    exit
}
