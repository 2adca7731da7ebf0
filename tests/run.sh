#!/bin/sh
# Runs test programs (cmocka) and test scripts, as many at once as there are cores, and closes with the line
# "N passed, N failed".
#     [JOBS=N] tests/run.sh PROGRAM_OR_SCRIPT ...
set -u

# run_one TEST: its log is build/log/NAME.log; one line of its tests, and below it what failed or was skipped
run_one() {
    name=$(basename "$1" .sh)
    log=build/log/$name.log start=$(date +%s)
    "./$1" >"$log" 2>&1
    tally "$log" $?
    {
        printf '%-18s %4d passed %3d failed %3d skipped %5d s\n' "$name" "$p" "$f" "$s" $(($(date +%s) - start))
        {
            if [ "$f" -ne 0 ]; then
                grep -av '^ok ' "$log" | grep -E 'FAIL|SURVIVED|ERROR|[Ee]rror:|Sanitizer|Assert' | head -n 20
                tail -n 3 "$log"
            fi
            grep -aE '^skipped: |^\[  SKIPPED \] [a-zA-Z_]' "$log" | sort -u
        } | sed 's/^/    /'
    } >"$log.line"
    cat "$log.line" # at once, since another test may be writing too
}

cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
if [ "${1-}" = --one ]; then run_one "$2" && exit; fi
printf '%s\n' "$@" | xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -n 1 sh tests/run.sh --one | tee "$work/lines"
awk -v expected=$# '/^[^ ]+ +[0-9]+ passed +[0-9]+ failed/ { n++; passed += $2; failed += $4; skipped += $6 }
    END { if (n != expected) { failed++; print "only " n " of " expected " tests came to their end" }
          if (skipped) print skipped " skipped, for the reasons above"
          print passed " passed, " failed " failed"
          exit failed > 0 }' "$work/lines"
