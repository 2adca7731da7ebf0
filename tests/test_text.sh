#!/usr/bin/env bash
# Text from end to end: a model of one's own text with its own vocabulary, other tokenizers, builds without PCRE2; and, where
# .venv and the network are, Qwen's tokenizer and 10 MB of real text against the `tokenizers` library.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
export LC_ALL=C.UTF-8
python=$root/.venv/bin/python
fixtures=$root/tests/fixtures/tokenizers

cd "$work" || exit 1
for _ in $(seq 40); do cat "$fixtures/text.txt"; done >book.txt
small="vocab_size=700 d_model=16 n_layers=1 n_heads=1 n_kv_heads=1 head_dim=16 d_ff=32 max_seq_len=32 batch_size=1
    gradient_accumulation_steps=1 eval_windows=2 threads=1 save_every=2 log_every=1"
train() { timeout 60 "$root/train" "$root/configs/text.cfg" data=book.txt $small "$@"; }
vocabulary=$root/data/vocabulary

# ---- a model of one's own text ----
prints "a vocabulary is learned first" 0 "^vocabulary +run/tokenizer.json, learned in" train output_dir=run max_steps=4 sample_every=2
check "samples are text" said "^sample +.*\|.*[a-z]"
check "it lies in the run and in its checkpoints" sh -c "cmp run/tokenizer.json run/last/tokenizer.json && cmp run/tokenizer.json run/best/tokenizer.json"
check "its tokens lie beside the text" sh -c "[ \$(ls book.txt.*.tokens | wc -l) -eq 1 ]"
prints "a complete run is not learned again" 0 "^complete" train output_dir=run max_steps=4
check "neither is its vocabulary" sh -c "! grep '^vocabulary' .said && [ \$(ls book.txt.*.tokens | wc -l) -eq 1 ]"
prints "a run goes on" 0 "^done +6 steps" train output_dir=run max_steps=6
prints "--fresh learns again" 0 "^vocabulary" train output_dir=run max_steps=2 --fresh
prompt="The gate decides"
"$root/analyze" --models mine:run --prompt "$prompt" --generate 5 --threads 1 >goes_on 2>speed
check "the prompt is text" grep -q "^$prompt" goes_on
check "and goes on by five tokens" [ "$(wc -c <goes_on)" -gt $((${#prompt} + 5)) ]
check "whose speed is told" grep -q "^5 tokens, [1-9]" speed
check "its maps" "$root/analyze" --models mine:run --prompt "$prompt" --maps --output maps --threads 1
axis() { grep "^set $1tics.*'T' 0" maps/figures/prompt_maps_mine.gp | grep -o "'[^' ]*' [0-9]" | sed "s/^'//; s/' .*//"; }
for axis in x y; do
    check "have its tokens on the $axis axis" [ "$(axis $axis | tr -d '\n' | sed 's/␣/ /g')" = "$prompt" ]
done
if has gnuplot "the axes' labels in the figure"; then
    check "and in the figure" sh -c "axis='$(axis x)'; for label in \$axis; do
        [ \$(grep -c \">\$label</text>\" maps/figures/prompt_maps_mine.svg) -ge 2 ] || exit 1; done"
fi
prints "the report reads the run's text" 0 "^2 windows of 32 tokens of book.txt" "$root/analyze" --models mine:run --num_samples 2 --output report --threads 1
prints "a checkpoint's tokenizer is inherited" 0 "^done" train output_dir=next tokenizer= init_from=run/last max_steps=2
check "as it is" cmp run/tokenizer.json next/last/tokenizer.json
prints "tokenizer = bytes" 0 "^done" train output_dir=bytes tokenizer=bytes max_steps=1
check "leaves none" sh -c "! ls bytes/last/tokenizer.json 2>/dev/null"
prints "a tokenizer of the outside" 0 "^done" train output_dir=other "tokenizer=$fixtures/chat.json" max_steps=1
prints "models of other tokenizers are not compared" 1 "a and b have different tokenizers" "$root/analyze" --models a:run b:other --data book.txt
printf '{"text": "The gate decides."}\n{"text": "How much\\u2026"}\n' >two.jsonl
for _ in 1 2 3 4 5 6; do cat two.jsonl two.jsonl; done >docs.jsonl
prints "documents" 0 "^done" "$root/train" "$root/configs/text.cfg" data=docs.jsonl $small output_dir=docs "tokenizer=$fixtures/qwen.json" max_steps=1

sed 's/gate/goat/g' book.txt >goats.txt
cp goats.txt changing.txt
changing() { train output_dir=changing data=changing.txt tokenizer=bytes "$@"; }
prints "a run" 0 "^done" changing max_steps=2
printf "one more line\\n" >>changing.txt
prints "its text may grow within a window" 0 "^done" changing max_steps=3
cp book.txt changing.txt
prints "other text is another run's" 1 "changing.txt is not what the run in changing began with: --fresh starts over, and init_from=changing/last" changing max_steps=4
prints "--fresh takes it" 0 "^done" changing max_steps=2 --fresh
sed 1d changing/config.cfg >config.cfg && mv config.cfg changing/config.cfg && cp goats.txt changing.txt
prints "a run that does not tell its data goes on" 0 "^done" changing max_steps=3
iconv -f UTF-8 -t UTF-16 book.txt >utf16.txt
prints "text in another encoding" 0 "^note +utf16.txt is no UTF-8 text at byte 0 " train output_dir=utf16 data=utf16.txt tokenizer=bytes max_steps=1
for _ in $(seq 9999); do printf "Gewöhnlich "; done >utf8.txt # longer than what is looked at, which ends within an ö
prints "text in UTF-8" 0 "^done" train output_dir=utf8 data=utf8.txt tokenizer=bytes max_steps=1
check "is not remarked on" sh -c "! grep -q '^note' .said"

# ---- what cannot be ----
prints "no such tokenizer" 1 "^train: nowhere: cannot open" train output_dir=x tokenizer=nowhere max_steps=1
prints "more tokens than the model has" 1 "has tokens up to 424, beyond the model's vocab_size 400" train output_dir=x "tokenizer=$fixtures/chat.json" max_steps=1 vocab_size=400
prints "nothing to learn from" 2 "tokenizer = train goes with data = FILE" train output_dir=x data=gen:random max_steps=1
prints "text of another ending" 2 "text is known by its ending" train output_dir=x data=book.md max_steps=1
prints "no text is named" 1 "data = FILE.txt: No such file" "$root/train" "$root/configs/text.cfg" output_dir=x
prints "no room for the bytes" 2 "no room for the 256 bytes" train output_dir=x vocab_size=200 max_steps=1
prints "an epoch of unknown length" 2 "set max_steps or max_tokens" train output_dir=x max_steps=0 max_tokens=0 --dry-run
cp -r run broken && echo '{"model": {' >broken/best/tokenizer.json
prints "a broken tokenizer" 1 "broken/best/tokenizer.json: no valid JSON" "$root/analyze" --models a:broken --prompt x

# ---- the tool ----
prints "a vocabulary" 0 "learned.json: 500 tokens" "$vocabulary" book.txt --vocab_size 500 --output learned.json
prints "encode" 0 "tokens of [0-9]+ bytes" "$vocabulary" --tokenizer learned.json --encode book.txt --output book.u32
check "decode" "$vocabulary" --tokenizer learned.json --decode book.u32 --output book.again
check "is the text in NFC" python3 -c "
import unicodedata
a, b = (open(f, encoding='utf-8', newline='').read() for f in ('book.txt', 'book.again'))
raise SystemExit(unicodedata.normalize('NFC', a) != b)"
prints "usage" 2 "no text is given" "$vocabulary"
prints "an unknown option" 2 "^vocabulary: --frob is unknown" "$vocabulary" --frob 1
prints "two things at once" 2 "goes with --encode or --decode" "$vocabulary" --tokenizer learned.json
prints "tokens that are none" 1 "^vocabulary: bad.u32: 99999 is no token" sh -c "printf '\237\206\001\000' >bad.u32; $vocabulary --tokenizer learned.json --decode bad.u32"

# ---- without the libraries ----
${CC:-cc} -std=c11 -O0 -w "$root/data/vocabulary.c" -o bare -lm
prints "without PCRE2 it says so" 1 "learned.json: its (pattern|normalizer) .*needs (PCRE2|utf8proc).*libpcre2-dev|libutf8proc-dev" ./bare --tokenizer learned.json --encode book.txt

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
    echo "encoded at $best MB/s, the library at $(cat .check)"
    check "at 10 MB/s" awk "BEGIN {exit !($best >= 10)}"
    head -c 3000000 real.txt >part.txt
    prints "a vocabulary of 8000 tokens" 0 "8000 tokens, " "$vocabulary" part.txt --vocab_size 8000 --output real.json
    ours=$(sed -n 's/.*tokens, \([0-9.]*\) s/\1/p' .said)
    check "is the library's" compare train part.txt 8000 real.json
    theirs=$(head -n 1 .check)
    echo "learned in $ours s, by the library in $theirs s"
    check "within twice its time" awk "BEGIN {exit !(0 < $ours && $ours <= 2 * $theirs)}"
    check "our vocabulary in the library" sh -c "$vocabulary --tokenizer real.json --encode part.txt --output part.u32 2>/dev/null && $python $root/tests/reference/compare_tokenizer.py encode real.json part.txt part.u32"
else
    skip "text of real size (needs the tokenizers library and Qwen's ranks: tests/reference/setup.sh, and a network)"
fi
finish
