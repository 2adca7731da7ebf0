#!/usr/bin/env bash
# test_analyze.sh - analyze from the command line: two tiny models are trained, compared and prompted.
#
# ANALYZE and TRAIN name the programs (default ./analyze and ./train). Figures are held against one another where they
# come from different code: summary.json against the trainer's metrics, the maps against F-Attn, bins against shares.
#     tests/test_analyze.sh [--figures]    only the figures of comparisons: for tests/test_isa.sh
set -u
cd "$(dirname "$0")/.." || exit 1
. tests/testing.sh
analyze=${ANALYZE:-$root/analyze}
train=${TRAIN:-$root/train}
dir=$work

close() { # NAME A B RELATIVE: the numbers agree; fails on what is no number
    if awk -v a="$2" -v b="$3" -v r="$4" 'BEGIN { number = "^-?[0-9.]+(e[-+]?[0-9]+)?$"
        if (a !~ number || b !~ number) exit 1
        d = a - b; if (d < 0) d = -d; m = b < 0 ? -b : b; exit !(d <= r * m + 1e-12) }'; then ok "$1"
    else bad "$1: $2 is not $3"; fi
}
fails() { # NAME CODE PATTERN ARGUMENT...
    local name=$1 code=$2 pattern=$3
    shift 3
    refuses "$name" "$code" "^analyze: .*$pattern" "$analyze" "$@"
}
# number FILE MODEL KEY: of summary.json, which has a key on each line; arrays and text as they stand
number() {
    awk -v model="    \"$2\": {" -v key="        \"$3\": " 'index($0, model) == 1 { inside = 1 }
        inside && index($0, key) == 1 { sub(/,$/, ""); print substr($0, length(key) + 1); exit }' "$1"
}
numbers() { PATH=/nonexistent "$analyze" "$@" > out 2> err; } # without the figures, which take the time
same_map() { # FILE FILE: two CSVs of 64 x 64 agree
    awk -F, 'NR == FNR { for (j = 1; j <= NF; j++) p[FNR, j] = $j; next }
        { for (j = 1; j <= NF; j++) { d = $j - p[FNR, j]; if (!(d < 1e-5 && d > -1e-5)) wrong = 1 } n++ }
        END { exit wrong || n != 64 }' "$1" "$2"
}
metric() { grep '"val_loss"' "$1" | tail -1 | sed "s/.*\"$2\":\([^,}]*\).*/\1/"; }
mean() { tr -d '[]' <<< "$1" | awk -F, '{ for (i = 1; i <= NF; i++) s += $i; printf "%.9g", s / NF }'; }

for program in "$analyze" "$train"; do
    [ -x "$program" ] || { bad "$program is not there: make builds it" && finish; }
done

# ---- two models ------------------------------------------------------------------------------------------------------

cat > "$dir/tiny.cfg" << 'END'
vocab_size = 65
d_model = 16
n_layers = 5
n_heads = 4
n_kv_heads = 2
head_dim = 8
d_ff = 32
max_seq_len = 24
batch_size = 4
gradient_accumulation_steps = 1
max_steps = 30
warmup_steps = 5
learning_rate = 1e-2
eval_every = 10
eval_windows = 6
data = gen:backcopy,vocab=64
threads = 1
use_amp = off
END
cd "$dir" || exit 1
check "train the baseline" "$train" tiny.cfg gate_position=none output_dir=runs/baseline
check "train the gated model" "$train" tiny.cfg output_dir=runs/gated
head -c 60000 "$root/gated_attention.h" > text.txt
check "train a model of bytes" "$train" tiny.cfg vocab_size=257 data=text.txt bos_token=256 val_fraction=0.1 n_layers=1 output_dir=runs/bytes

# ---- a comparison ----------------------------------------------------------------------------------------------------

"$analyze" --models baseline:runs/baseline 'ga <t>&ed:runs/gated' --data gen:backcopy,vocab=64 --num_samples 9 --output rep > table
check "compare" test $? -eq 0
s=rep/summary.json
gated='ga <t>&ed'
check "the table names both models" grep -q "^ga <t>&ed .*G1 elementwise sigmoid" table
check "the table says which checkpoint" grep -q "^baseline: runs/baseline/best" table
check "the table has the paper's Table 4" grep -q "0.116" table
if has python3 "summary.json and report.html as a whole"; then
    check "summary.json is JSON with the contract's keys" python3 - << 'END'
import json, math
s = json.load(open("rep/summary.json"))
assert list(s) == ["baseline", "ga <t>&ed"], list(s)
for name, m in s.items():
    for key in "params loss ppl f_attn f_attn_by_layer m_act max_act_by_layer gate_mean gate_std gate_below_0.1 gate_below_0.5 gate_mean_by_layer seq_len samples".split():
        assert key in m, key
    assert m["seq_len"] == 24 and m["samples"] == 9 and len(m["f_attn_by_layer"]) == 5 and len(m["max_act_by_layer"]) == 5
    assert [len(h) for h in m["f_attn_by_head"]] == [4] * 5
    assert abs(m["ppl"] - math.exp(m["loss"])) < 1e-6 * m["ppl"] and m["lowest_loss"] < m["loss"]
    heads = [sum(h) / 4 for h in m["f_attn_by_head"]]
    assert all(abs(a - b) < 1e-7 for a, b in zip(heads, m["f_attn_by_layer"])), heads
assert s["baseline"]["gate_mean"] is None and s["baseline"]["gate_mean_by_layer"] is None
assert len(s["ga <t>&ed"]["gate_mean_by_layer"]) == 5 and 0 < s["ga <t>&ed"]["gate_mean"] < 1
END
    check "report.html: every tag is closed, nothing comes from elsewhere" python3 - << 'END'
import html.parser, re
text = open("rep/report.html", encoding="utf-8").read()
void = {"meta", "br"}
class Parser(html.parser.HTMLParser):
    stack, ids, uses = [], set(), set()
    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key == "id": assert value not in self.ids, value; self.ids.add(value)
            if key in ("src", "href", "xlink:href"):
                assert value[0] == "#" or value.startswith("data:"), value
                if value[0] == "#": self.uses.add(value[1:])
        assert tag != "script" and tag != "link"
        if tag not in void: self.stack.append(tag)
    def handle_startendtag(self, tag, attrs): self.handle_starttag(tag, attrs); self.stack.pop() if tag not in void else None
    def handle_endtag(self, tag): assert self.stack.pop() == tag, tag
p = Parser(); p.feed(text); p.close()
assert not p.stack, p.stack
assert p.uses <= p.ids, p.uses - p.ids
urls = set(re.findall(r"https?://[^\s'\"<)]+", text)) - {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
assert not urls, urls
assert "<t>" not in text and "ga &lt;t&gt;&amp;ed" in text
END
    if has gnuplot "the figures"; then
        check "the figures are XML" python3 -c 'import glob, xml.dom.minidom as x
for f in glob.glob("rep/figures/*.svg"): x.parse(f)'
    fi
fi
figures="f_attn_by_head sink_heads_by_layer attention_by_position sink_position_by_head entropy_by_layer drain_by_layer value_norm_by_position gate_histogram_ga__t__ed gate_mean_by_head y_magnitude_by_layer y_below_1e-2_by_layer y_below_1e-3_by_layer max_attention_output_by_layer max_attention_residual_by_layer max_ffn_output_by_layer max_act_by_position max_act_by_dimension rank_weights_by_layer rank_output_by_layer
    rank_output_by_head maps_side_by_side maps_window f_attn_by_layer max_act_by_layer gate_by_layer gate_histogram training_curves maps_baseline maps_ga__t__ed"
for f in $figures; do
    [ -s rep/figures/$f.gp ] || bad "figure $f has no script"
    command -v gnuplot > /dev/null || continue
    if [ -s rep/figures/$f.svg ] && grep -q "$f-gnuplot_canvas" rep/report.html; then ok "figure $f"; else bad "figure $f"; fi
done
for f in f_attn_by_layer max_act_by_layer gate_by_layer gate_histogram training_curves map_baseline_layer{0,1,3,4} map_ga__t__ed_layer0; do
    if [ -s rep/figures/$f.csv ]; then ok "$f.csv"; else bad "$f.csv"; fi
done

# ---- details and interventions ----------------------------------------------------------------------------------------

numbers --models baseline:runs/baseline "$gated:runs/gated" --data gen:backcopy,vocab=64 --num_samples 9 --interventions --output changed
check "interventions run" test $? -eq 0
if has python3 "the details of summary.json"; then
    check "summary.json: details agree with one another and with their CSV" python3 - << 'END'
import csv, json, math
plain, changed = (json.load(open(f"{d}/summary.json")) for d in ("rep", "changed"))
near = lambda a, b, r=1e-6: abs(a - b) <= r * max(1, abs(b))
mean = lambda x: sum(x) / len(x)
for name, m in changed.items():
    L, HQ, T, C = 5, 4, 24, 16
    gated = name != "baseline"
    for key in ("entropy", "value_drain", "key_drain", "y_before", "y_before_below_1e-2", "y_before_below_1e-3", "sink_heads",
                "max_attention_output", "max_attention_residual", "max_ffn_output", "max_ffn_residual", "rank_weights",
                "rank_before"):
        assert len(m[key + "_by_layer"]) == L and all(math.isfinite(x) for x in m[key + "_by_layer"]), key
    for key in ("y_after", "y_after_below_1e-2", "y_mean_gate_below_1e-2", "y_mean_gate_below_1e-3", "rank_after"):
        assert (m[key] is not None) == gated and (m[key + "_by_layer"] is not None) == gated, key
    for key in ("f_attn", "entropy", "rank_weights", "rank_output", "sink_position", "gate_mean", "gate_std", "gate_min", "gate_max"):
        heads = m[key + "_by_head"]
        assert heads is None if "gate" in key and not gated else [len(h) for h in heads] == [HQ] * L, key
    assert near(m["attention_by_position"][0], m["f_attn"]) and len(m["attention_by_position"]) == T
    assert near(sum(a * (T - j) for j, a in enumerate(m["attention_by_position"])), T)
    assert near(m["entropy"], mean(m["entropy_by_layer"])) and near(mean(m["entropy_by_head"][2]), m["entropy_by_layer"][2])
    assert near(m["max_ffn_residual"], m["m_act"]) and m["max_ffn_residual_by_layer"] == m["max_act_by_layer"]
    assert near(max(m["max_act_by_position"]), max(m["max_act_by_layer"]))
    assert near(m["max_act_by_dimension"][0][1], max(m["max_act_by_layer"])) and len(m["max_act_by_dimension"]) == C
    peak = m["ffn_residual_peak_by_layer"][m["max_act_by_layer"].index(max(m["max_act_by_layer"]))]
    assert peak["dimension"] == m["max_act_by_dimension"][0][0] and peak["position"] < T and 0 <= peak["token"] < 65
    assert m["max_act_by_position"][peak["position"]] == max(m["max_act_by_position"])
    assert m["sink_heads"] == sum(x > 0.3 for h in m["f_attn_by_head"] for x in h) / (L * HQ)
    assert all(1 <= x <= 8 for x in m["rank_weights_by_layer"] + m["rank_before_by_layer"])
    assert 0 < m["y_before_below_1e-3"] < m["y_before_below_1e-2"] < 1
    if gated:
        assert m["y_after"] < m["y_before"] and m["y_after_below_1e-2"] > m["y_before_below_1e-2"]
        assert all(near(sum(h), 1) for h in m["gate_histogram_by_layer"]) and len(m["gate_histogram_by_layer"][0]) == 50
        assert near(mean(m["gate_mean_by_head"][3]), m["gate_mean_by_layer"][3])
        assert near(min(map(min, m["gate_min_by_head"])), min(m["gate_min_by_layer"]))
    # interventions: what is asked for and no more; the rest is as without them
    expected = {"first_key", "first_value"} | ({"gate_mean", "gate_1", "gate_half", "gate_double"} if gated else set())
    assert set(m["interventions"]) == expected, m["interventions"]
    assert all(abs(loss - m["loss"]) > 1e-7 for loss in m["interventions"].values())
    assert [(h["layer"], h["head"]) for h in m["silenced_heads"]] == [(l, h) for l in range(L) for h in range(HQ)]
    assert plain[name]["interventions"] is None and plain[name]["silenced_heads"] is None
    assert {k: v for k, v in m.items() if k not in ("interventions", "silenced_heads")} == \
        {k: v for k, v in plain[name].items() if k not in ("interventions", "silenced_heads")}
    for row in csv.DictReader(open("changed/figures/interventions.csv")):
        if row["model"] == name:
            assert near(float(row["loss"]), m["interventions"][row["change"]])
            assert near(float(row["difference"]), m["interventions"][row["change"]] - m["loss"], 1e-5)
    for row in csv.DictReader(open("changed/figures/y_magnitude_by_layer.csv")):
        column = name + ", before the gate"
        assert near(float(row[column]), m["y_before_by_layer"][int(row["layer"])])
    for row in csv.DictReader(open("changed/figures/f_attn_by_head.csv")):
        if row["model"] == name:
            assert near(float(row["value"]), m["f_attn_by_head"][int(row["layer"])][int(row["head"])])
    rows = [r for r in csv.DictReader(open("changed/figures/attention_by_position.csv")) if r["model"] == name]
    assert all(near(float(r["value"]), a) for r, a in zip(rows, m["attention_by_position"])) and len(rows) == T
END
fi
for batch in 1 5; do numbers --models "$gated:runs/gated" --data gen:backcopy,vocab=64 --num_samples 9 --batch_size $batch --interventions --output "batch$batch"; done
for key in entropy value_drain y_after max_ffn_output rank_after; do
    close "$key does not depend on the batch" "$(number batch1/summary.json "$gated" $key)" "$(number batch5/summary.json "$gated" $key)" 1e-5
done
for change in gate_mean first_key; do
    of() { number "$1" "$gated" interventions | grep -o "\"$change\": [0-9.e-]*" | cut -d' ' -f2; }
    close "the loss with $change does not depend on the batch" "$(of batch1/summary.json)" "$(of batch5/summary.json)" 1e-5
done

# ---- the same figure from two places ---------------------------------------------------------------------------------

for m in baseline "$gated"; do
    column=$([ "$m" = baseline ] && echo 2 || echo 3)
    file=$([ "$m" = baseline ] && echo baseline || echo ga__t__ed)
    close "$m: f_attn is the mean over layers" "$(mean "$(number $s "$m" f_attn_by_layer)")" "$(number $s "$m" f_attn)" 1e-7
    close "$m: m_act is the mean over layers" "$(mean "$(number $s "$m" max_act_by_layer)")" "$(number $s "$m" m_act)" 1e-7
    for l in 0 1 3 4; do
        f_attn=$(awk -F, -v l=$l -v c=$column '$1 == l { print $c }' rep/figures/f_attn_by_layer.csv)
        close "$m: F-Attn of layer $l in CSV and JSON" "$(number $s "$m" f_attn_by_layer | tr -d '[] ' | cut -d, -f$((l + 1)))" "$f_attn" 0
        close "$m: F-Attn of layer $l from its map" "$(awk -F, '{ s += $1 } END { printf "%.9g", s / NR }' rep/figures/map_${file}_layer$l.csv)" "$f_attn" 1e-5
    done
    for map in rep/figures/map_${file}_layer1.csv rep/figures/map_${file}_layer*_window0.csv; do
        check "$m: rows of $(basename "$map") sum to 1, nothing above the diagonal" awk -F, '
            { s = 0; for (j = 1; j <= NF; j++) { s += $j; if (j > NR && $j != 0) wrong = 1 }
              if (!(s > 0.99999 && s < 1.00001)) wrong = 1 } END { exit wrong || NR != 24 }' "$map"
    done
done
close "the histogram sums to 1" "$(awk -F, 'NR > 1 { s += $3 } END { print s }' rep/figures/gate_histogram.csv)" 1 1e-6
close "its first bins are gate_below_0.1" "$(awk -F, 'NR > 1 && NR <= 6 { s += $3 } END { printf "%.9g", s }' rep/figures/gate_histogram.csv)" "$(number $s "$gated" gate_below_0.1)" 1e-6
close "gate_mean is the mean over layers" "$(mean "$(number $s "$gated" gate_mean_by_layer)")" "$(number $s "$gated" gate_mean)" 1e-7
close "F-Attn of even attention" "$(number $s baseline f_attn_uniform)" "$(awk 'BEGIN { for (i = 1; i <= 24; i++) s += 1 / i; printf "%.9g", s / 24 }')" 1e-8

numbers --models g:runs/gated/last --num_samples 6 --batch_size 1 --output again
for pair in loss:val_loss f_attn:f_attn m_act:m_act gate_mean:gate_mean lowest_loss:lowest_loss; do
    close "held-out ${pair%:*} as the trainer measured it" "$(number again/summary.json g "${pair%:*}")" "$(metric runs/gated/metrics.jsonl "${pair#*:}")" 1e-6
done
check "train a model with a sink logit" "$train" tiny.cfg gate_position=none attention_sink=learned output_dir=runs/sink
numbers --models b:runs/baseline/last s:runs/sink/last --num_samples 6 --output sinks
close "the sink logit's share as the trainer measured it" "$(number sinks/summary.json s sink_share)" "$(metric runs/sink/metrics.jsonl sink_share)" 1e-6
close "sink_share is the mean over layers" "$(mean "$(number sinks/summary.json s sink_share_by_layer)")" "$(number sinks/summary.json s sink_share)" 1e-7
check "without a sink logit its share is null" test "$(number sinks/summary.json b sink_share)" = null
check "a column of the table and the report" sh -c "grep -q 'sink logit$' out && grep -q 'sink logit' sinks/report.html && ! grep -q 'sink logit' table rep/report.html"
numbers --models g:runs/gated/last --num_samples 6 --batch_size 4 --threads 2 --output batched
close "the batch size changes nothing" "$(number batched/summary.json g loss)" "$(number again/summary.json g loss)" 1e-6
numbers --models b:runs/bytes/last --num_samples 6 --output bytes
close "a held-out file as the trainer measured it" "$(number bytes/summary.json b loss)" "$(metric runs/bytes/metrics.jsonl val_loss)" 1e-6

# Windows of a file: [i T, i T + T], so the second window of a file is the first one of the file without its first T tokens.
tail -c +25 text.txt > later.txt
for run in "one text.txt 1" "two text.txt 2" "later later.txt 1"; do
    set -- $run
    numbers --models b:runs/bytes --data "$2" --num_samples "$3" --output "$1"
done
close "window 1 begins at token T" "$(awk -v a="$(number two/summary.json b loss)" -v b="$(number one/summary.json b loss)" 'BEGIN { printf "%.9g", 2 * a - b }')" "$(number later/summary.json b loss)" 1e-6

# The maps show the first 64 positions, which do not depend on what follows: a text's first window of 100 has those of 64.
for T in 64 100; do numbers --models b:runs/bytes --data text.txt --num_samples 1 --seq_len $T --output "T$T"; done
check "maps do not depend on the length of the windows" same_map T64/figures/map_b_layer0.csv T100/figures/map_b_layer0.csv
numbers --models b:runs/bytes --data text.txt --num_samples 3 --seq_len 100 --batch_size 1 --output apart
numbers --models b:runs/bytes --data text.txt --num_samples 3 --seq_len 100 --batch_size 3 --output together
check "nor on the batch" same_map apart/figures/map_b_layer0.csv together/figures/map_b_layer0.csv

# ---- experts ---------------------------------------------------------------------------------------------------------

check "train a mixture of experts" "$train" tiny.cfg n_experts=6 experts_per_token=2 d_ff=16 max_steps=10 output_dir=runs/experts
check "compare it with a dense model" "$analyze" --models experts:runs/experts baseline:runs/baseline --data gen:backcopy,vocab=64 --num_samples 5 --output experts
e=experts/summary.json
loads() { number $e experts expert_load_by_expert | tr -d '[] ' | tr ',' '\n' | awk -v layer="$1" 'int((NR - 1) / 6) == layer'; }
close "the loads of a layer's experts have the mean 1" "$(loads 3 | awk '{ sum += $1 } END { print sum / 6 }')" 1 1e-5
close "the busiest is the largest of them" "$(number $e experts expert_max_load_by_layer | tr -d '[] ' | cut -d, -f4)" "$(loads 3 | sort -g | tail -1)" 1e-6
check "a dense model has none" test "$(number $e baseline expert_max_load_by_layer)$(number $e baseline expert_load_by_expert)" = nullnull
check "CSV of each expert" test "$(wc -l < experts/figures/expert_load_by_expert.csv)" -eq 31
check "the report has their section" grep -q '<section id="experts">' experts/report.html
check "one without experts has not" sh -c "! grep -q '<section id=\"experts\">' rep/report.html"

# ---- by length -------------------------------------------------------------------------------------------------------

# length FILE MODEL LENGTH KEY: of an entry of "lengths"
length() { number "$1" "$2" lengths | grep -o "{\"length\": $3,[^}]*" | sed "s/.*\"$4\": \(\"[^\"]*\"\|[^,]*\).*/\1/"; }
numbers --models g:runs/gated/last --num_samples 6 --lengths 8,24,64 --output lengths
check "--lengths succeeds" test -s lengths/summary.json
for key in loss f_attn f_attn_uniform m_act gate_mean; do
    close "$key by length is that of the comparison" "$(length lengths/summary.json g 24 $key)" "$(number lengths/summary.json g $key)" 1e-6
done
numbers --models g:runs/gated/last --num_samples 6 --seq_len 64 --output length64
close "beyond max_seq_len as well" "$(length lengths/summary.json g 64 loss)" "$(number length64/summary.json g loss)" 1e-6
check "and it is said" [ "$(length lengths/summary.json g 64 positions) $(length lengths/summary.json g 24 positions)" = '"RoPE extrapolated" "as trained"' ]
check "no questions, no accuracy" [ "$(length lengths/summary.json g 8 accuracy)" = null ]
close "the bins of positions make the loss" "$(awk -F, '$2 == 64 { s += $5 * $6; n += $6 } END { printf "%.9g", s / n }' lengths/figures/loss_by_position.csv)" "$(length lengths/summary.json g 64 loss)" 1e-7
check "they join, from 0 to the last position" awk -F, '$2 == 64 { if ($3 != to) bad = 1; to = $4 + 1; n += $6 } END { exit bad || to != 64 || n != 6 * 64 }' lengths/figures/loss_by_position.csv
check "lengths.csv has a row for each" [ "$(cut -d, -f 1-4 lengths/figures/lengths.csv | tail -n +2 | tr '\n' ' ')" = 'g,8,6,as trained g,24,6,as trained g,64,6,RoPE extrapolated ' ]

cwe=gen:cwe,common=2,share=0.6,vocab=61
check "train on a retrieval task" "$train" tiny.cfg data=$cwe,answers_only=1 batch_size=32 max_steps=250 n_layers=2 output_dir=runs/cwe
"$analyze" --models c:runs/cwe/last --data $cwe,answers_only=1 --num_samples 40 --lengths 24,100 --output answers > out2 2> err
numbers --models c:runs/cwe/last --data $cwe --num_samples 40 --lengths 24,100 --output all
accuracy=$(length answers/summary.json c 24 accuracy)
check "it is learned: accuracy $accuracy" awk -v a="$accuracy" 'BEGIN { exit !(a > 0.8 && a <= 1) }'
check "a whole answer needs all its tokens" awk -v a="$accuracy" -v w="$(length answers/summary.json c 24 whole_answers)" 'BEGIN { exit !(w <= a && w >= 2 * a - 1) }'
for key in accuracy whole_answers answer_loss f_attn; do
    close "$key needs no other logits" "$(length answers/summary.json c 100 $key)" "$(length all/summary.json c 100 $key)" 1e-6
done
close "the loss of answers only is theirs" "$(length answers/summary.json c 24 loss)" "$(length answers/summary.json c 24 answer_loss)" 1e-6
close "in the comparison too" "$(number answers/summary.json c loss)" "$(length answers/summary.json c 24 loss)" 1e-6
numbers --models c:runs/cwe/last --num_samples 6 --output cwe
close "and as the trainer measured it" "$(number cwe/summary.json c loss)" "$(metric runs/cwe/metrics.jsonl val_loss)" 1e-6
if has gnuplot "the figure of lengths"; then
    check "figure and section of the report" sh -c "grep -q 'lengths-gnuplot_canvas' answers/report.html && grep -q 'By length' answers/report.html"
fi
check "the table has the lengths" grep -Eq "^c +100 +40 +[0-9.]+ % +[0-9.]+ % .* RoPE extrapolated\$" out2
numbers --models g:runs/gated/last --num_samples 6 --rope_base 500 --lengths 24 --output base
check "another base is said" [ "$(length base/summary.json g 24 positions)" = '"as trained, base 500 in place of 10000"' ]
check "and changes the loss" [ "$(length base/summary.json g 24 loss)" != "$(length lengths/summary.json g 24 loss)" ]
numbers --models g:runs/gated/last --num_samples 6 --rope_factor 2 --lengths 24,48,64 --output yarn
check "YaRN is said, and where it ends" [ "$(length yarn/summary.json g 48 positions) $(length yarn/summary.json g 64 positions)" = '"YaRN 2 x 24" "YaRN 2 x 24, extrapolated"' ]
check "and changes the loss" [ "$(length yarn/summary.json g 24 loss)" != "$(length lengths/summary.json g 24 loss)" ]
fails "a length that is none" 2 "--lengths 64,1x: it takes lengths" --models g:runs/gated --lengths 64,1x
fails "lengths that fall" 2 "lengths rise" --models g:runs/gated --lengths 64,32
fails "too short for the task" 1 "needs windows of at least" --models g:runs/gated --data gen:niah,vocab=61 --lengths 4,24
fails "--lengths of a prompt" 2 "--lengths does not go with --prompt" --models g:runs/gated --prompt 1 --lengths 8

[ "${1-}" != --figures ] || finish

# ---- prompts ---------------------------------------------------------------------------------------------------------

"$analyze" --models b:runs/bytes --prompt 'int ma' --generate 10 --temperature 0 > out 2> err
check "a prompt of bytes goes on" grep -q '^<s>int ma' out
check "speed is told" grep -q '^10 tokens, [0-9.]* a second' err
"$analyze" --models g:runs/gated --prompt '<s> t9 T1' --generate 5 --seed 3 > out1 2> err
"$analyze" --models g:runs/gated --prompt '64, 9 1' --generate 5 --seed 3 > out2 2> err
check "labels and numbers are the same prompt, the seed the same draws" cmp out1 out2
"$analyze" --models g:runs/gated --prompt '<s> t9 T1' --generate 5 --seed 3 --figures > out3 2> err
check "the same tokens with their figures" test "$(sed -n '3,7s/ .*//p' out3 | xargs)" = "$(cut -d' ' -f4- out1 | xargs)"
check "which are numbers" test "$(grep -c '^[^ ].* [0-9.]* %  *0\.[0-9]*$' out3)" -eq 6
check "eight tokens" test "$(wc -w < out1)" -eq 8
check "maps of a prompt" "$analyze" --models g:runs/gated --prompt '64 9 1 9 33' --maps --output prompt
check "their CSV has the prompt's length" test "$(wc -l < prompt/figures/map_g_layer4_prompt.csv)" -eq 5
fails "a layer that is not there" 2 "0 to 4, with commas" --models g:runs/gated --prompt '64 9' --maps --layers 1,5
fails "--layers without --prompt" 2 "--layers goes with --prompt" --models g:runs/gated --layers 1
check "maps of two models, of given layers" "$analyze" --models b:runs/baseline g:runs/gated --prompt '64 9 1 9 33' --maps --layers 0,2,4 --output two
if has gnuplot "figures of a prompt's maps"; then
    check "a figure of all models" grep -q 'g, layer 4' two/figures/prompt_maps_all.svg
    check "as PNG too" sh -c 'head -c 4 two/figures/prompt_maps_all.png | grep -q PNG && head -c 4 two/figures/prompt_maps_b.png | grep -q PNG'
    check "their labels" grep -q '>T1</text>' prompt/figures/prompt_maps_g.svg
fi

# ---- without gnuplot, with NaN ---------------------------------------------------------------------------------------

numbers --models baseline:runs/baseline --num_samples 2 --output bare
code=$?
if [ $code -eq 0 ] && [ -s bare/figures/f_attn_by_layer.csv ] && [ -s bare/summary.json ] && grep -q "gnuplot was not found" out && grep -q "gnuplot was not found" bare/report.html
then ok "without gnuplot the rest is written, and said so"; else bad "without gnuplot: exit code $code"; fi
mkdir fake && printf '#!/bin/sh\necho no >&2\nexit 1\n' > fake/gnuplot && chmod +x fake/gnuplot
PATH=$dir/fake:$PATH "$analyze" --models baseline:runs/baseline --num_samples 2 --output fake > out
code=$?
if [ $code -eq 0 ] && grep -q "gnuplot failed on fake/figures/f_attn_by_layer.gp" out && grep -q "^no" fake/figures/f_attn_by_layer.log
then ok "a figure that gnuplot fails on is named"; else bad "failing gnuplot: exit code $code"; fi

cp -r runs/gated/best broken
size=$(wc -c < broken/model.safetensors)
head -c 4096 /dev/zero | tr '\0' '\377' | dd of=broken/model.safetensors bs=1 seek=$((size - 4096)) conv=notrunc 2> /dev/null
numbers --models n:broken --data gen:backcopy --num_samples 2 --output nan
code=$?
if [ $code -eq 0 ] && [ "$(number nan/summary.json n loss)" = null ] && grep -q "nan" out; then ok "a loss that is NaN is shown as such"
else bad "NaN: exit code $code, loss $(number nan/summary.json n loss), $(head -c 200 err)"; fi

# ---- other checkpoints -----------------------------------------------------------------------------------------------

fixtures=$root/tests/fixtures
describes() { # NAME DIRECTORY LINE...: --describe says each of these lines
    local name=$1 directory=$2
    shift 2
    "$analyze" --describe "$directory" > described 2> err || { bad "$name: $(head -c 200 err)"; return; }
    for line; do grep -qxF -- "$line" described || { bad "$name: not there: $line"; sed 's/^/      /' described; return; }; done
    ok "$name"
}
describes "--describe: a gate by key-value group in two shards" "$fixtures/hf_elementwise" "$fixtures/hf_elementwise" \
    "  source        qwen3, written by transformers 4.51.3" "  gate          G1 elementwise sigmoid" \
    "                W_theta: in q_proj, behind the queries of each key-value group" \
    "                1,536 parameters, 11.10 % of all" "  files         2, 57.85 kB: 25 tensors, 13,832 values in F32"
describes "--describe: a gate by head" "$fixtures/outside_qwen3_next" \
    "                vocabulary 37, 16 positions, RoPE base 10000 on 0.25 of the dimensions, QK-norm" \
    "                W_theta: in q_proj, behind the queries of each head"
describes "--describe: YaRN" "$fixtures/hf_yarn" \
    "                vocabulary 37, 1024 positions, RoPE base 10000, YaRN 4 times 256, QK-norm"
describes "--describe: no gate, F16" "$fixtures/hf_baseline" "  gate          none" \
    "  files         1, 27.07 kB: 25 tensors, 12,296 values in F16" "  training      weights only"
describes "--describe: a run of train" runs/gated "runs/gated/best" "  source        qwen3"
describes "--describe: a checkpoint to go on from" runs/gated/last \
    "  training      can go on: optimiser and state are there"
fails "--describe: what is no checkpoint" 1 "is not a checkpoint" --describe runs
fails "--describe with --prompt" 2 "does not go with" --describe runs/gated --prompt 1 --generate 2
for how in loaded mapped; do
    numbers --models n:"$fixtures/hf_headwise" --weights $how --data gen:backcopy,vocab=30 --num_samples 3 --output $how
done
check "the same figures from mapped weights" cmp loaded/summary.json mapped/summary.json
fails "--weights: another word" 2 "--weights some: it is loaded, mapped or auto" --models n:runs/gated --weights some

# ---- bad input -------------------------------------------------------------------------------------------------------

b=baseline:runs/baseline
fails "no arguments" 2 "--models NAME:DIR is missing"
fails "unknown option" 2 "unknown option --bogus" --models $b --bogus
fails "a misspelt option" 2 "unknown option --num_sample; is it --num_samples\? \(see --help\)" --models $b --num_sample 3
fails "not an option" 2 "extra: not an option" --data x extra
fails "no name" 2 "expected NAME:DIR, such as mine:" --models :runs/baseline
fails "a directory without a name" 2 "expected NAME:DIR" --models /
check "the directory's name where none is given" numbers --models runs/baseline/best/ runs/gated --num_samples 2 --output unnamed
check "... not best" python3 -c "import json; assert list(json.load(open('unnamed/summary.json'))) == ['baseline', 'gated']"
mkdir -p pickled && : > pickled/pytorch_model.bin
fails "weights in another form" 1 "pytorch_model.bin, which is not read" --models pickled
cd / && fails "a run whose data is elsewhere" 1 "bytes was trained on text.txt, which is not to be found from here" --models "$dir/runs/bytes"
cd "$dir" || exit 1
fails "name of control characters" 2 "not plain text" --models $'a\nb:runs/baseline' --data gen:backcopy
fails "a name twice" 2 "two models are named a" --models a:runs/baseline a:runs/gated
fails "names that make one file" 2 "files the same name" --models 'a b:runs/baseline' a_b:runs/gated
fails "no such directory" 1 "there is no nowhere" --models a:nowhere --data gen:backcopy
fails "not a checkpoint" 1 "is not a checkpoint" --models a:runs --data gen:backcopy
fails "another vocabulary" 1 "they cannot read the same tokens" --models $b c:runs/bytes --data gen:backcopy
fails "a number that is none" 2 "--num_samples 3x" --models $b --num_samples 3x
fails "a value is missing" 2 "--num_samples needs N" --models $b --num_samples
fails "out of range" 2 "--top_p 2" --models $b --prompt 1 --top_p 2
fails "unknown part" 2 "--part some" --models $b --part some
fails "unknown data" 1 "unknown kind of data" --models $b --data data.xyz
fails "unknown generator" 1 "unknown generator" --models $b --data gen:bogus
fails "no such file" 1 "none.txt: cannot be opened" --models b:runs/bytes --data none.txt
head -c 30 text.txt > short.txt
fails "fewer tokens than a window" 1 "fewer than one window" --models b:runs/bytes --data short.txt --seq_len 64
fails "fewer windows than asked for" 1 "fewer than --num_samples 64" --models b:runs/bytes --data short.txt --num_samples 64
fails "a token beyond the vocabulary" 1 "is not below vocab_size 65" --models $b --data text.txt
fails "--maps without a prompt" 2 "--maps goes with --prompt" --models $b --maps
fails "an option of a comparison with a prompt" 2 "--num_samples does not go with --prompt" --models $b --prompt 1 --num_samples 2
fails "interventions on a prompt" 2 "--interventions does not go with --prompt" --models $b --prompt 1 --interventions
fails "a prompt too long" 1 "more than its 24 positions" --models $b --prompt "1 2 3" --generate 30
fails "a prompt of no tokens" 1 '"hello" is no token of baseline, which reads numbers below .* and labels: 0 is T0, 17 is t17,' --models $b --prompt "hello"
fails "an empty prompt" 1 "--prompt is empty" --models $b --prompt " "
check "--seq_len beyond max_seq_len, if asked for" numbers --models $b --seq_len 40 --num_samples 2 --output long
mkdir -p file && : > file/there
fails "an output that is a file" 1 "a file has this name" --models $b --num_samples 1 --output file/there
head -c 3000 runs/baseline/best/model.safetensors > file/model.safetensors
cp runs/baseline/best/config.json file/
fails "a checkpoint that is cut short" 1 "a: " --models a:file --data gen:backcopy --num_samples 1 --output x
if [ -w /dev/full ]; then
    mkdir -p full && ln -s /dev/full full/summary.json
    fails "a full disk" 1 "cannot be written: No space left" --models $b --num_samples 1 --output full
else
    skip "a full disk (no /dev/full is here)"
fi
check "--help" "$analyze" --help

finish
