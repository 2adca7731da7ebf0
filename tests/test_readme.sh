#!/bin/sh
# What the README says is there: its targets, files, functions and keys, its ten lines of C; and every configuration.
set -u
cd "$(dirname "$0")/.."
out=build/readme
mkdir -p "$out"
passed=0 failed=0
check() {
    name=$1
    shift
    if "$@" >"$out/log" 2>&1; then echo "ok $name" && passed=$((passed + 1)); else
        echo "FAIL $name" && failed=$((failed + 1)) && head -n 5 "$out/log"
    fi
}

awk '/^```c$/ {c = 1; next} /^```$/ {c = 0} c' README.md >"$out/example.c"
check "the example compiles as C" cc -std=gnu11 -O1 -Wall -Wextra -Werror -I. "$out/example.c" -o "$out/example" -lm
check "the example runs" sh -c "$out/example >$out/steps"
check "its loss falls" awk '/step 0:/ {a = $4} /step 19:/ {b = $4} END {exit !(b + 0 < a / 2)}' "$out/steps"
check "the example compiles as C++" c++ -std=gnu++17 -O1 -Wall -Wextra -Werror -I. -x c++ "$out/example.c" -o "$out/example" -lm

for target in $(grep -oE '`?make [a-z0-9-]+' README.md | sed 's/.*make //' | sort -u); do
    check "make $target" sh -c "make -n $target >/dev/null 2>&1 || grep -q '^$target:' Makefile"
done
for file in $(grep -oE '\]\([a-zA-Z][^):]*\)' README.md | tr -d '])(' ; grep -oE '`[a-z_0-9.-]+\.(cfg|c|h|sh)`' README.md | tr -d '`'); do
    check "$file is there" sh -c "ls '$file' 'configs/$file' 'configs/variants/$file' 2>/dev/null | grep -q ."
done
for name in $(grep -oE '`gai?_[a-z_]+' README.md | tr -d '`' | sort -u); do
    check "$name is in the header" grep -qE "\\b$name\\b" gated_attention.h
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
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
