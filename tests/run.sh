#!/bin/sh
# Runs test programs (cmocka) and test scripts, and closes with the line "N passed, N failed".
#     tests/run.sh PROGRAM_OR_SCRIPT ...
set -u
export OMP_WAIT_POLICY=passive # a spinning team waits a hundred times longer where something else runs too
mkdir -p build/log
passed=0 failed=0
for test in "$@"; do
    name=$(basename "$test" .sh)
    log=build/log/$name.log
    start=$(date +%s)
    case $test in
    *.sh) "./$test" >"$log" 2>&1 ;;
    *) "$test" >"$log" 2>&1 ;;
    esac
    status=$?
    case $test in
    *.sh) # its own closing line
        p=$(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed.*/\1/p' "$log" | tail -n 1)
        f=$(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed.*/\2/p' "$log" | tail -n 1)
        ;;
    *)
        p=$(grep -c '^\[       OK \]' "$log")
        f=$(grep '^\[  FAILED  \] [a-zA-Z_]' "$log" | sort -u | wc -l) # named where it failed, and at the end
        ;;
    esac
    p=${p:-0} f=${f:-0}
    # A crash is a failure too, and so is nothing tested, unless it says that it cannot be here.
    if [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then f=1; fi
    if [ "$p" -eq 0 ] && [ "$f" -eq 0 ] && ! tail -n 1 "$log" | grep -q '(skipped)$'; then f=1; fi
    printf '%-18s %4d passed %3d failed %5d s\n' "$name" "$p" "$f" $(($(date +%s) - start))
    if [ "$f" -ne 0 ]; then
        grep -E 'FAIL|SURVIVED|ERROR|[Ee]rror:|Sanitizer|Assert' "$log" | head -n 20 | sed 's/^/    /'
        tail -n 3 "$log" | sed 's/^/    /'
    fi
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
