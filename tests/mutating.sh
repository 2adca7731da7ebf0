# A test of the tests: a list of breaks, each of which is put into a copy of the sources, one at a time. The test that it names
# must fail on it, and must pass on the sources as they are. tests/mutants.sh and tests/cuda/bugs.sh source this, after
#
#     script       itself
#     list         the list: blocks of three lines, which tests/mutants.txt describes
#     sources      the files, one of which a break stands in, on one line
#     prepare      what is needed once, exported for
#     build DIRECTORY TEST MODE    makes DIRECTORY/program, of the sources that lie in DIRECTORY
#
# with their own arguments: a TEXT, which a break must have in it to be tried.
# shellcheck shell=sh disable=SC2154
. tests/testing.sh

# copy DIRECTORY: the sources, as they are
copy() {
    for source in $sources; do
        mkdir -p "$1/$(dirname "$source")" && cp "$source" "$1/$source" || return
    done
}

# passes DIRECTORY PATTERN: such tests there are, and they pass
passes() { timeout 120 "$1/program" "$2" >"$1/log" 2>&1 && grep -q '^\[       OK \]' "$1/log"; }

# why LOG: in a few words
why() { grep -hoE 'error:.*|^cucpu: [^,]*|[a-z]+ of .*, as a share.*|ERROR.*|Segmentation.*' "$1" | head -n 1 | cut -c 1-110; }

# try_sound DIRECTORY TEST MODE PATTERN...: without a break the tests pass, else their failure would say nothing
try_sound() {
    directory=$1 test=$2 mode=$3
    shift 3
    if ! { copy "$directory" && build "$directory" "$test" "$mode"; } >"$directory.log" 2>&1; then
        bad "$test as it is does not build" "$(why "$directory.log")"
        return
    fi
    for pattern; do
        if passes "$directory" "$pattern"; then ok "$test $pattern passes as it is"; else
            bad "$test $pattern fails as it is" "$(why "$directory/log")"
        fi
    done
    rm -rf "$directory"
}

# try_break FILE: the break in the file
try_break() {
    { read -r test pattern mode && read -r old && read -r new; } <"$1"
    old=${old#- } new=${new#+} new=${new# }
    # shellcheck disable=SC2086 # lists
    file=$(grep -lF -e "$old" $sources) count=$(cat $sources | grep -cF -e "$old")
    if [ "$count" -ne 1 ]; then
        bad "$test $pattern: in $count lines of the sources, not in one: $old"
        return
    fi
    copy "$1.d"
    OLD=$old NEW=$new awk '(at = index($0, ENVIRON["OLD"])) {
            $0 = substr($0, 1, at - 1) ENVIRON["NEW"] substr($0, at + length(ENVIRON["OLD"])) }
        { print }' "$file" >"$1.d/$file"
    if ! build "$1.d" "$test" "${mode:-plain}" >"$1.log" 2>&1; then bad "$test $pattern: does not compile: $new" "$(why "$1.log")"
    elif passes "$1.d" "$pattern"; then echo "SURVIVED $test $pattern: $old -> $new"
    else ok "caught by $test $pattern: $old -> $new   [$(why "$1.d/log")]"; fi
    rm -rf "$1.d"
}

case ${1-} in
--sound | --break)
    try=try_${1#--}
    shift
    "$try" "$@"
    exit
    ;;
esac

prepare
awk -v work="$work" -v text="${1-}" 'BEGIN { RS = "" }
    { gsub(/(^|\n)#[^\n]*/, ""); sub(/^\n/, "") }
    $0 != "" && index($0, text) { print > sprintf("%s/%03d", work, ++n) }' "$list"
awk -v work="$work" 'FNR == 1 && !seen[$0]++ { key = $1 " " (NF > 2 ? $3 : "plain"); patterns[key] = patterns[key] " " $2 }
    END { for (key in patterns) { name = key; sub(/ /, "_", name); print "--sound", work "/" name, key patterns[key] } }' \
    "$work"/[0-9]* >"$work/runs"
for break in "$work"/[0-9]*; do echo "--break $break"; done >>"$work/runs"
xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -L 1 sh "$script" <"$work/runs" | tee "$work/result"
passed=$(grep -c '^ok' "$work/result")
failed=$(grep -c -e '^FAIL' -e '^SURVIVED' "$work/result")
[ $((passed + failed)) -ge "$(grep -c . "$work/runs")" ] || bad "some tries did not come to their end"
finish
