#!/usr/bin/env bash
# Text from end to end: a model of one's own text with its own vocabulary, other tokenizers, builds without PCRE2; and, where
# .venv and the network are, Qwen's tokenizer and 10 MB of real text against the `tokenizers` library.
# Run from the repository's root after make. Prints `ok NAME` or `FAIL NAME` and a last line `N passed, N failed`.
set -u
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export LC_ALL=C.UTF-8 OMP_WAIT_POLICY=passive
passed=0 failed=0 skipped=
python=$root/.venv/bin/python
fixtures=$root/tests/fixtures/tokenizers

ok() { passed=$((passed + 1)) && echo "ok $1"; }
bad() { failed=$((failed + 1)) && echo "FAIL $1: $(head -c 400 "$work/out" | tr '\n' ' ')"; }
check() { # NAME COMMAND...: the command succeeds
    local name=$1
    shift
    if "$@" >"$work/out" 2>&1; then ok "$name"; else bad "$name"; fi
}
says() { # NAME CODE PATTERN COMMAND...: it ends with this code, and what it prints matches
    local name=$1 code=$2 pattern=$3
    shift 3
    "$@" >"$work/out" 2>&1
    local got=$?
    cp "$work/out" "$work/said"
    if [ $got -eq "$code" ] && grep -Eq -- "$pattern" "$work/out"; then ok "$name"; else bad "$name"; fi
}

cd "$work" || exit 1
for _ in $(seq 40); do cat "$fixtures/text.txt"; done >book.txt
small="vocab_size=700 d_model=16 n_layers=1 n_heads=1 n_kv_heads=1 head_dim=16 d_ff=32 max_seq_len=32 batch_size=1
    gradient_accumulation_steps=1 eval_windows=2 threads=1 save_every=2 log_every=1"
train() { timeout 60 "$root/train" "$root/configs/text.cfg" data=book.txt $small "$@"; }
vocabulary=$root/data/vocabulary

# ---- a model of one's own text ----
says "a vocabulary is learned first" 0 "^vocabulary +run/tokenizer.json, learned in" train output_dir=run max_steps=4 sample_every=2
check "samples are text" grep -Eq "^sample +.*\|.*[a-z]" said
check "it lies in the run and in its checkpoints" sh -c "cmp run/tokenizer.json run/last/tokenizer.json && cmp run/tokenizer.json run/best/tokenizer.json"
check "its tokens lie beside the text" sh -c "[ \$(ls book.txt.*.tokens | wc -l) = 1 ]"
says "a complete run is not learned again" 0 "^complete" train output_dir=run max_steps=4
check "neither is its vocabulary" sh -c "! grep -q '^vocabulary' said && [ \$(ls book.txt.*.tokens | wc -l) = 1 ]"
says "a run goes on" 0 "^done +6 steps" train output_dir=run max_steps=6
says "--fresh learns again" 0 "^vocabulary" train output_dir=run max_steps=2 --fresh
says "the prompt is text, and goes on as text" 0 "^The gate decides[^?]*" "$root/analyze" --models mine:run --prompt "The gate decides" --generate 5 --threads 1
says "the report reads the run's text" 0 "^2 windows of 32 tokens of book.txt" "$root/analyze" --models mine:run --num_samples 2 --output report --threads 1
check "its maps show tokens" sh -c "cat report/figures/*.csv | grep -q '␣\|gate\|the'"
says "a checkpoint's tokenizer is inherited" 0 "^done" train output_dir=next tokenizer= init_from=run/last max_steps=2
check "as it is" cmp run/tokenizer.json next/last/tokenizer.json
says "tokenizer = bytes" 0 "^done" train output_dir=bytes tokenizer=bytes max_steps=1
check "leaves none" sh -c "! ls bytes/last/tokenizer.json 2>/dev/null"
says "a tokenizer of the outside" 0 "^done" train output_dir=other "tokenizer=$fixtures/chat.json" max_steps=1
says "models of other tokenizers are not compared" 1 "a and b have different tokenizers" "$root/analyze" --models a:run b:other --data book.txt
printf '{"text": "The gate decides."}\n{"text": "How much\\u2026"}\n' >two.jsonl
for _ in 1 2 3 4 5 6; do cat two.jsonl two.jsonl; done >docs.jsonl
says "documents" 0 "^done" "$root/train" "$root/configs/text.cfg" data=docs.jsonl $small output_dir=docs "tokenizer=$fixtures/qwen.json" max_steps=1

# ---- what cannot be ----
says "no such tokenizer" 1 "^train: nowhere: cannot open" train output_dir=x tokenizer=nowhere max_steps=1
says "more tokens than the model has" 1 "has tokens up to 424, beyond the model's vocab_size 400" train output_dir=x "tokenizer=$fixtures/chat.json" max_steps=1 vocab_size=400
says "nothing to learn from" 2 "tokenizer = train goes with data = FILE" train output_dir=x data=gen:random max_steps=1
says "no room for the bytes" 2 "no room for the 256 bytes" train output_dir=x vocab_size=200 max_steps=1
says "an epoch of unknown length" 2 "set max_steps or max_tokens" train output_dir=x max_steps=0 max_tokens=0 --dry-run
cp -r run broken && echo '{"model": {' >broken/best/tokenizer.json
says "a broken tokenizer" 1 "broken/best/tokenizer.json: no valid JSON" "$root/analyze" --models a:broken --prompt x

# ---- the tool ----
says "a vocabulary" 0 "learned.json: 500 tokens" "$vocabulary" book.txt --vocab_size 500 --output learned.json
says "encode" 0 "tokens of [0-9]+ bytes" "$vocabulary" --tokenizer learned.json --encode book.txt --output book.u32
check "decode" "$vocabulary" --tokenizer learned.json --decode book.u32 --output book.again
check "is the text in NFC" python3 -c "
import unicodedata
a, b = (open(f, encoding='utf-8', newline='').read() for f in ('book.txt', 'book.again'))
raise SystemExit(unicodedata.normalize('NFC', a) != b)"
says "usage" 2 "no text is given" "$vocabulary"
says "an unknown option" 2 "^vocabulary: --frob is unknown" "$vocabulary" --frob 1
says "two things at once" 2 "goes with --encode or --decode" "$vocabulary" --tokenizer learned.json
says "tokens that are none" 1 "99999 is no token|is no token" sh -c "printf '\237\206\001\000' >bad.u32; $vocabulary --tokenizer learned.json --decode bad.u32"

# ---- without the libraries ----
${CC:-cc} -std=c11 -O0 -w "$root/data/vocabulary.c" -o bare -lm
says "without PCRE2 it says so" 1 "learned.json: its (pattern|normalizer) .*needs (PCRE2|utf8proc).*libpcre2-dev|libutf8proc-dev" ./bare --tokenizer learned.json --encode book.txt

# ---- real size ----
if [ -x "$python" ] && (cd "$root" && "$python" tests/reference/qwen_tokenizer.py) >out 2>&1; then
    qwen=$root/.venv/share/qwen/tokenizer.json
    find /usr/share/doc /usr/share/perl /usr/share/common-licenses /usr/lib/python3* "$root"/.venv/lib/ \
        \( -name '*.py' -o -name 'README*' -o -name copyright -o -name '*.txt' \) -type f 2>/dev/null | sort |
        xargs cat 2>/dev/null | head -c 10000000 >real.txt
    compare() { "$python" "$root/tests/reference/compare_tokenizer.py" "$@"; }
    best=0
    for _ in 1 2 3; do
        "$vocabulary" --tokenizer "$qwen" --encode real.txt --output real.u32 2>out
        speed=$(sed -n 's|.* \([0-9.]*\) MB/s.*|\1|p' out)
        best=$(echo "$best ${speed:-0}" | awk '{print ($1 > $2) ? $1 : $2}')
    done
    check "10 MB of real text: the library's tokens" compare encode "$qwen" real.txt real.u32
    echo "encoded at $best MB/s, the library at $(cat out)"
    check "at 10 MB/s" awk "BEGIN {exit !($best >= 10)}"
    head -c 3000000 real.txt >part.txt
    says "a vocabulary of 8000 tokens" 0 "8000 tokens, " "$vocabulary" part.txt --vocab_size 8000 --output real.json
    ours=$(sed -n 's/.*tokens, \([0-9.]*\) s/\1/p' said)
    check "is the library's" compare train part.txt 8000 real.json
    echo "learned in $ours s, by the library in $(cat out) s"
    check "within twice its time" awk "BEGIN {exit !($ours <= 2 * $(head -n 1 out))}"
    check "our vocabulary in the library" sh -c "$vocabulary --tokenizer real.json --encode part.txt --output part.u32 2>/dev/null && $python $root/tests/reference/compare_tokenizer.py encode real.json part.txt part.u32"
else
    skipped=" (skipped)"
    echo "skipped: the tokenizers library and Qwen's ranks (tests/reference/setup.sh, and a network)"
fi
echo "$passed passed, $failed failed$skipped"
[ "$failed" -eq 0 ]
