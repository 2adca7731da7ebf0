#!/bin/sh
# gated_attention.h for other machines, with each of their compilers that is here: it compiles without a warning, learns what it
# learns here (losses agree to 1e-5), and each reads what the other saved. qemu's user mode runs what this processor cannot,
# Wine what is for Windows. On Debian all of them are
#     gcc-{aarch64,i686,riscv64,s390x}-linux-gnu gcc-arm-linux-gnueabihf gcc-mingw-w64-x86-64 musl-tools tcc qemu-user wine64
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
PATH=$PATH:/usr/lib/wine # where Debian has wine64
export WINEDEBUG=-all WINEPREFIX="$root/build/wine"
flags="-std=c11 -O1 -Wall -Wextra -Wpedantic -Wshadow -Werror"
source=$root/tests/ports.c
cd "$work" || exit 1

# number NAME FILE: of a line "NAME number"
number() { tr -d '\r' <"$2" | sed -n "s/^$1 //p"; }

# agrees NAME FILE: the number is that of the same program here, to 1e-5
agrees() {
    echo "$(number "$1" "$2") $here" | awk '{ d = $1 - $2; exit !(NF == 2 && $1 > 0 && d * d <= 1e-10 * $2 * $2) }' ||
        { cat "$2" && return 1; }
}

# The program of port.
learns() {
    # shellcheck disable=SC2086 # none, or one
    timeout 60 $runner "./$name.exe" "of-$name" native >"$name.out" 2>"$name.err" || { cat "$name.out" "$name.err" && return 1; }
}

reads_here() { ./native.exe again "of-$name" >here.out || { cat here.out && return 1; }; }

# port NAME RUNNER COMPILER FLAG...: RUNNER is a program, or "-" where this processor runs it itself
port() {
    name=$1 runner=$2 compiler=$3
    shift 3
    has "$compiler" "the header on $name" || return
    # shellcheck disable=SC2086 # flags are words
    check "$name: no warning" "$compiler" $flags "$@" "$source" -o "$name.exe" -lm
    [ -x "$name.exe" ] || return
    if [ "$runner" = - ]; then runner=; else has "$runner" "the program for $name" || return; fi
    check "$name: learns, saves, reads" learns
    check "$name: the same loss" agrees loss "$name.out"
    check "$name: reads what was saved here" agrees other "$name.out"
    check "$name: what it saved is read here" reads_here
    check "$name: with the same loss" agrees other here.out
}

# shellcheck disable=SC2086
check "here" ${CC:-cc} $flags "$source" -o native.exe -lm
./native.exe native >native.out || bad "here" "$(cat native.out)"
here=$(number loss native.out)
check "learns" [ "${here:-99999999}" -lt 20000000 ]
# A locale of our own with a decimal comma: numbers in files keep their dot.
printf 'comment_char %%\nescape_char /\nLC_NUMERIC\ndecimal_point ","\nthousands_sep "."\ngrouping 3;3\nEND LC_NUMERIC\n' >source
mkdir locales
localedef -c -i source -f ANSI_X3.4-1968 locales/comma >/dev/null 2>&1 # warns of what the locale lacks
if [ -d locales/comma ]; then
    check "decimal comma" sh -c 'LOCPATH=$PWD/locales LC_ALL=comma ./native.exe comma native >comma.out'
    check "decimal comma: the locale has one" grep -qx "point ," comma.out
    check "decimal comma: the same checkpoint" cmp native/config.json comma/config.json
    check "decimal comma: the same state" cmp native/training_state.json comma/training_state.json
else
    skip "decimal comma (localedef makes no locale here)"
fi
port aarch64 qemu-aarch64 aarch64-linux-gnu-gcc -static
port armhf qemu-arm arm-linux-gnueabihf-gcc -static
port i386-x87 qemu-i386 i686-linux-gnu-gcc -static
port i386-gnu qemu-i386 i686-linux-gnu-gcc -static -std=gnu17 # sums stay in registers of 80 bits
port s390x qemu-s390x s390x-linux-gnu-gcc -static
port riscv64 qemu-riscv64 riscv64-linux-gnu-gcc -static
port musl - musl-gcc -static
port windows wine64 x86_64-w64-mingw32-gcc -static
port tcc - tcc
finish
