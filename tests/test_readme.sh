#!/bin/sh
# What the documents say is there: commands, targets, files, functions, keys and options; the README's ten lines of C; and
# every configuration.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
out=$work
documents=$(ls README.md ./*/README.md docs/*.md tests/*/README.md)

awk '/^```c$/ {c = 1; next} /^```$/ {c = 0} c' README.md >"$out/example.c"
check "the example compiles as C" cc -std=gnu11 -O1 -Wall -Wextra -Werror -I. "$out/example.c" -o "$out/example" -lm
check "the example runs" sh -c "$out/example >$out/steps"
check "its loss falls" awk '/step 0:/ {a = $4} /step 19:/ {b = $4} END {exit !(b + 0 < a / 2)}' "$out/steps"
check "the example compiles as C++" c++ -std=gnu++17 -O1 -Wall -Wextra -Werror -I. -x c++ "$out/example.c" -o "$out/example" -lm

# code DOCUMENT...: the words that stand between backticks or in a block, one a line
code() {
    awk '/^```/ { block = !block; next }
        block { print; next }
        { n = split($0, part, "`"); for (i = 2; i <= n; i += 2) print part[i] }' "$@" | tr -s ' |"();,' '\n' |
        grep -vE 'NAME|CONFIG|^(config.cfg|example.c|--mca)$' | sort -u # what stands for another, is a run's or another program's
}
# shellcheck disable=SC2086 # lists
code $documents >"$work/code"
find . -name .git -prune -o -name build -prune -o -name .venv -prune -o -type f -print | sed 's,.*/,,' | sort -u >"$work/files"
for program in ./train ./analyze data/vocabulary; do $program --help; done >"$work/help" 2>&1

# found KIND PATTERN COMMAND: the words of the documents that match PATTERN, each with the command, in which $word is the word
found() {
    missing= n=0
    for word in $(grep -oE "$2" "$work/code"); do
        export word
        n=$((n + 1))
        sh -c "$3" || missing="$missing $word"
    done
    check "$n $1" [ "$n" -gt 0 ]
    check "all of them are there:$missing" [ -z "$missing" ]
}
# shellcheck disable=SC2016 # $word is for found
{
    found "paths" '^(\./)?(tests|data|docs|configs|drivers|\.ci)/[A-Za-z0-9_./*-]*$' 'ls -d $word $word.c 2>/dev/null | grep -q . || grep -rqF $word tests/*/*.sh'
    found "names of files" '^[A-Za-z0-9_-]+\.(c|h|cuh|cpp|sh|py|cfg)$' "grep -qx \$word $work/files"
    found "functions and types" '\b(ga|gai|data)_[a-z0-9_]+\b' 'grep -qw $word *.h *.cuh data/*.h drivers/*.h drivers/*/*.h'
    found "keys" '^[a-z_]+=' "grep -qw \${word%=} $work/help"
    found "options" '^--[a-z][a-z_-]*' 'grep -qrF -e "$word" train.c analyze.c data drivers tests'
    grep -ohE '(`|^)make [a-z0-9-]+' $documents | sed 's/.*make //' | sort -u >"$work/code"
    found "targets of make" '^.*$' 'grep -q "^$word:" Makefile'
}
for document in $documents; do
    for link in $(grep -oE '\]\([A-Za-z.][^):#]*\)' "$document" | tr -d '])('); do
        check "$document: $link" ls "$(dirname "$document")/$link"
    done
done
for fixture in $(grep -oE 'fixtures? .*\|' README.md | grep -oE '`[a-z0-9_*]+`' | tr -d '`' | sort -u); do
    check "fixture $fixture" sh -c "ls tests/fixtures/$fixture.safetensors"
done

# Every configuration is accepted, and the paper's models have its numbers of parameters.
for config in configs/*.cfg configs/variants/*.cfg; do
    check "$config" ./train "$config" init_from= --dry-run # what a run starts from may not be there yet
done
parameters() { ./train "$@" --dry-run | grep -q "parameters *$n"; }
n=1,728,177,152 && check "1.7B elementwise" parameters configs/paper-1.7b-28l.cfg
n=1,721,754,624 && check "1.7B headwise" parameters configs/paper-1.7b-28l.cfg gate_type=headwise d_ff=6144
n=1,720,837,120 && check "1.7B baseline" parameters configs/paper-1.7b-28l.cfg gate_position=none d_ff=6144
n=15,577,751,552 && check "15A2B baseline" parameters configs/paper-15a2b-moe.cfg
n=15,779,078,144 && check "15A2B elementwise" parameters configs/paper-15a2b-moe.cfg gate_position=G1
n=50,961,664 && check "the seed model" parameters configs/rtx4060.cfg
finish
