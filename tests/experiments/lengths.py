"""Reads the reports of tests/experiments/lengths.sh, prints the table and writes docs/lengths.md and docs/lengths.svg."""
import json
import sys

from plots import plot

out = sys.argv[1]
STAGES = {"short": "trained at 64", "long": "+ on at 256, base 1e6", "yarn": "+ YaRN x 4"}
rows = []
for stage, title in STAGES.items():
    with open(f"{out}/{stage}/summary.json") as f:
        summary = json.load(f)
    for model in ("baseline", "gated"):
        rows.append((f"{model} {title}", summary[model]["lengths"]))


def table(key):
    lengths = [x["length"] for x in rows[0][1]]
    lines = ["| model | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for title, entries in rows:
        lines.append(f"| {title} | " + " | ".join(f"{100 * x[key]:.1f}" for x in entries) + " |")
    return "\n".join(lines)


def series(key):
    return {title: [(x["length"], 100 * x[key]) for x in entries] for title, entries in rows}


def end(model):
    return f"{100 * dict(rows)[f'{model} ' + STAGES['yarn']][-1]['accuracy']:.0f} %"


# The model by colour, the stage of training by marker and dash.
looks = {f"{model} {title}": {"colour": colour, "marker": stage, "dash": [3, 2, 1][stage]}
         for stage, title in enumerate(STAGES.values()) for colour, model in enumerate(("baseline", "gated"))}
lengths = [x["length"] for x in rows[0][1]]
even = [(x["length"], 100 * x["f_attn_uniform"]) for x in rows[0][1]]
axis = ["set logscale x 2", "set xtics (" + ", ".join(map(str, lengths)) + ")", f"set xrange [{lengths[0] / 1.2}:{lengths[-1] * 1.2}]"]
plot("docs/lengths.svg", f"Windows of {lengths[-1]} tokens after training at 256: with YaRN the baseline gets {end('baseline')} of "
     f"the answers right, the gated model {end('gated')}", [
    {"xlabel": "length of the window, tokens", "ylabel": "answers that are right, %", "set": axis + ["set yrange [0:103]"],
     "series": series("accuracy")},
    {"xlabel": "length of the window, tokens", "ylabel": "F-Attn, %", "set": ["set logscale y", "set yrange [0.1:10]"],
     "series": series("f_attn") | {"attention spread evenly": even}}],
    looks=looks | {"attention spread evenly": {"colour": 6, "marker": 6, "dash": 4}})
uniform = " ".join(f"{y:.1f}" for _, y in even)
with open("docs/lengths.md", "w") as f:
    f.write("# Longer contexts in small\n\n"
            "Eight needles, all asked for (`configs/lengths.cfg`): trained in windows of 64 tokens, trained on in windows of 256 with the RoPE "
            "base raised from 10000 to 1000000 (`configs/lengths-long.cfg`), then measured as it is and with YaRN by a factor of "
            "4; one seed; 64 windows of each length, 512 answers. Written by `make lengths`.\n\n"
            "Answers that are right, %, by the length of the window:\n\n" + table("accuracy") + "\n\n"
            f"F-Attn, % (attention spread evenly has {uniform}):\n\n" + table("f_attn") + "\n\n"
            "![Accuracy and attention on the first token by length](lengths.svg)\n\n"
            "An F-Attn below that of even attention means that there is no sink: the loss counts answers only, so heads at rest may "
            "look anywhere. What a sink costs when positions are stretched, as the paper has it, this task does not show.\n\n"
            "The paper's counterpart is Table 5 (RULER): trained at 4k with a base of 10k, on at 32k with 1M, then YaRN to 128k.\n\n"
            "| method | 4k | 8k | 16k | 32k | 64k | 128k |\n|---|---|---|---|---|---|---|\n"
            "| baseline | 88.89 | 85.88 | 83.15 | 79.50 | - | - |\n| SDPA gate | 90.56 | 87.11 | 84.61 | 79.77 | - | - |\n"
            "| baseline + YaRN | 82.90 | 71.52 | 61.23 | 37.94 | 37.51 | 31.65 |\n"
            "| SDPA gate + YaRN | 88.13 | 80.01 | 76.74 | 72.88 | 66.60 | 58.82 |\n")
print(table("accuracy"))
