#!/usr/bin/env bash
# test_evaluate.sh - analyze --eval against lm-evaluation-harness: tests/fixtures/evaluation, which
# tests/reference/make_evaluation.py made with the harness itself; then files that are no questions. And --domains against
# the loss of a comparison.
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
analyze=${ANALYZE:-$root/analyze}
fixture=$root/tests/fixtures/evaluation
dir=$work
fails() { # NAME CODE PATTERN ARGUMENT...
    local name=$1 code=$2 pattern=$3
    shift 3
    refuses "$name" "$code" "^analyze: .*$pattern" "$analyze" --models "m:$fixture" --output "$dir/out" "$@"
}

while read -r form shots length; do
    out=$dir/${form}_${shots}_$length
    if ! "$analyze" --models "m:$fixture" --eval "$fixture/questions.jsonl" --eval_form "$form" --shots "$shots" \
        --seq_len "$length" --output "$out" > "$dir/stdout" 2> "$dir/stderr"; then
        bad "evaluation, $form, $shots shots: $(head -c 300 "$dir/stderr")"
        continue
    fi
    if python3 - "$fixture/expected.json" "$out" "$form" "$shots" "$length" > "$dir/compared" 2>&1 << 'END'
import csv, json, pathlib, sys
expected, out, case = sys.argv[1], pathlib.Path(sys.argv[2]), (sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
run = next(r for r in json.load(open(expected))["runs"] if (r["form"], r["shots"], r["length"]) == case)
ours = next(iter(json.load(open(out / "evaluation.json"))["m"].values()))
assert ours["questions"] == run["questions"], ours
for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
    assert abs(ours[name] - run[name]) <= 1e-8, (name, ours[name], run[name])
rows = list(csv.reader(open(out / "eval_m_questions.csv")))[1:]
assert len(rows) == len(run["log_p"])
for row, log_p in zip(rows, run["log_p"]):
    assert len(row) == 4 + len(log_p), row
    for a, b in zip(map(float, row[4:]), log_p):
        assert abs(a - b) <= 1e-5 + 1e-6 * abs(b), (row, log_p)
low, high = ours["acc_ci95"]
assert 0 <= low < ours["acc"] < high <= 1
END
    then ok "the harness's log-likelihoods, accuracies and standard errors: $form, $shots shots, $length positions"
    else bad "evaluation, $form, $shots shots, $length positions: $(tail -1 "$dir/compared")"; fi
done << 'END'
cloze 0 512
cloze 2 512
letters 0 512
letters 2 512
cloze 2 100
END

# The same questions in other forms of the field; the last two as Hellaswag and ARC have them.
head -4 "$fixture/questions.jsonl" > "$dir/first.jsonl"
python3 - "$dir" << 'END'
import json, sys
questions = [json.loads(line) for line in open(sys.argv[1] + "/first.jsonl")]
forms = [
    lambda q: {"context": q["question"], "choices": q["choices"], "label": str(q["answer"]), "ignored": {"a": [1, None]}},
    lambda q: {"query": q["question"], "choices": q["choices"], "gold": "ABCD"[q["answer"]]},
    lambda q: {"ind": 3, "ctx": q["question"], "endings": q["choices"], "label": q["answer"]},
    lambda q: {"question": q["question"], "choices": {"text": q["choices"], "label": [str(i + 1) for i in range(len(q["choices"]))]}, "answerKey": str(q["answer"] + 1)},
]
for i, form in enumerate(forms):
    open(f"{sys.argv[1]}/form{i}.jsonl", "w").write("\n\r\n".join(json.dumps(form(q)) for q in questions))
END
"$analyze" --models "m:$fixture" --eval "$dir/first.jsonl" "$dir"/form?.jsonl --output "$dir/forms" > "$dir/stdout" 2>&1
for i in 0 1 2 3; do
    if [ -s "$dir/forms/eval_m_first.csv" ] && diff <(cut -d, -f2- "$dir/forms/eval_m_first.csv") <(cut -d, -f2- "$dir/forms/eval_m_form$i.csv") > "$dir/diff"
    then ok "form $i reads as the same questions"; else bad "form $i: $(head -2 "$dir/diff" "$dir/stdout" | tr '\n' ' ')"; fi
done
tail -n +3 "$dir/first.jsonl" > "$dir/rest.jsonl"
head -2 "$dir/first.jsonl" > "$dir/shots.jsonl"
"$analyze" --models "m:$fixture" --eval "$dir/rest.jsonl" --shots 2 --shots_from "$dir/shots.jsonl" --output "$dir/from" > "$dir/stdout" 2>&1
if diff <(head -3 "$dir/cloze_2_512/eval_m_questions.csv" | cut -d, -f2-) <(cut -d, -f2- "$dir/from/eval_m_rest.csv") > "$dir/diff" 2>&1
then ok "shots from another file"; else bad "shots from another file: $(head -3 "$dir/diff" "$dir/stdout")"; fi

mkdir -p "$dir/other"
cp "$dir/shots.jsonl" "$dir/other/first.jsonl"
"$analyze" --models "m:$fixture" --eval "$dir/first.jsonl" "$dir/other/first.jsonl" --output "$dir/alike" > "$dir/stdout" 2>&1
if cmp "$dir/forms/eval_m_first.csv" "$dir/alike/eval_m_first.csv" > "$dir/diff" 2>&1 &&
    cmp <(head -3 "$dir/forms/eval_m_first.csv") "$dir/alike/eval_m_first@2.csv" > "$dir/diff" 2>&1
then ok "files of the same name in two directories"; else bad "files of the same name: $(cat "$dir/diff" "$dir/stdout")"; fi

line() { printf '%s\n' "$1" > "$dir/$2.jsonl"; }
line '{"question": "a", "choices": ["b", "c"]}' unlabelled
line '{"question": "a", "choices": ["b", "c"], "label": 2}' beyond
line '{"question": "a", "choices": ["b", "c"], "label": "C"}' letter
line '{"question": "a", "choices": ["b"], "label": 0}' single
line '{"question": "a", "choices": ["b", ""], "label": 0}' empty
line '{"question": "a", "choices": ["b", 3], "label": 0}' number
line '{"question": ["a"], "choices": ["b", "c"], "label": 0}' list
line '{"question": "a", "context": "b", "choices": ["b", "c"], "label": 0}' both
line '{"choices": ["b", "c"], "label": 0}' nothing
line '{"question": "a", "choices": ["b", "c"], "label": 0' cut
line '[1, 2]' array
line '' blank
fails "no label" 1 'unlabelled.jsonl:1: needs one "label"' --eval "$dir/unlabelled.jsonl"
fails "a label beyond the choices" 1 'of a choice' --eval "$dir/beyond.jsonl"
fails "a letter beyond the choices" 1 'of a choice' --eval "$dir/letter.jsonl"
fails "one choice" 1 '2 to 26 texts' --eval "$dir/single.jsonl"
fails "an empty choice" 1 'that are not empty' --eval "$dir/empty.jsonl"
fails "a choice that is no text" 1 '2 to 26 texts' --eval "$dir/number.jsonl"
fails "a context that is no text" 1 'needs one text "context"' --eval "$dir/list.jsonl"
fails "two contexts" 1 'needs one text "context"' --eval "$dir/both.jsonl"
fails "no context" 1 'needs one text "context"' --eval "$dir/nothing.jsonl"
fails "a line that ends early" 1 'cut.jsonl:1: no valid JSON' --eval "$dir/cut.jsonl"
fails "a line that is no object" 1 'holds no JSON object' --eval "$dir/array.jsonl"
fails "no questions" 1 'holds no question' --eval "$dir/blank.jsonl"
fails "a file twice" 2 'eval names .*first.jsonl twice' --eval "$dir/first.jsonl" "$dir/first.jsonl"
fails "no file" 1 'cannot open' --eval "$dir/none.jsonl"
fails "a directory" 1 'not a regular file' --eval "$dir"
fails "more shots than questions" 1 'too few for --shots 4' --eval "$dir/first.jsonl" --shots 4
fails "an unknown form" 2 'it is cloze or letters' --eval "$dir/first.jsonl" --eval_form mixed
fails "--shots without --eval" 2 '--shots goes with --eval' --shots 2 --data gen:backcopy

# ---- perplexity by domain: as a comparison measures it, and bits per byte ---------------------------------------------
cut -c1-40 "$fixture/questions.jsonl" | head -c 3000 > "$dir/a.txt"
head -c 2000 "$root/Makefile" > "$dir/b.txt"
"$analyze" --models "m:$fixture" --domains "$dir/a.txt" "$dir/b.txt" --seq_len 64 --output "$dir/domains" > "$dir/stdout" 2>&1
for domain in a b; do
    PATH=/nonexistent "$analyze" --models "m:$fixture" --data "$dir/$domain.txt" --seq_len 64 \
        --num_samples $((($(wc -c < "$dir/$domain.txt") - 1) / 64)) --output "$dir/compare_$domain" > "$dir/stdout2" 2>&1
    if python3 - "$dir" $domain > "$dir/compared" 2>&1 << 'END'
import json, math, sys
dir, name = sys.argv[1:]
domain = json.load(open(f"{dir}/domains/domains.json"))["m"][f"{dir}/{name}.txt"]
whole = json.load(open(f"{dir}/compare_{name}/summary.json"))["m"]
assert domain["windows"] == whole["samples"] and domain["tokens"] == 64 * domain["windows"], domain
assert abs(domain["loss"] - whole["loss"]) <= 1e-6 and abs(domain["ppl"] - math.exp(domain["loss"])) <= 1e-5 * domain["ppl"]
assert abs(domain["bits_per_byte"] - domain["loss"] / math.log(2)) <= 1e-6
END
    then ok "domain $domain has the loss of a comparison"; else bad "domain $domain: $(tail -1 "$dir/compared")"; fi
done
fails "a domain that is a generator" 2 'it takes files' --domains gen:backcopy
fails "a domain twice" 2 'domains names .*a.txt twice' --domains "$dir/a.txt" "$dir/b.txt" "$dir/a.txt"
fails "a domain that is not there" 1 'none.txt' --domains "$dir/none.txt"

finish
