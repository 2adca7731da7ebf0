"""Reads the runs of tests/experiments/late_gate.sh, prints the table and writes docs/late-gate.md and docs/late-gate.svg."""
import json
import sys

from plots import plot

out, steps = sys.argv[1], int(sys.argv[2])
RUNS = {"ungated": "trained on without a gate", "headwise": "headwise gate added", "elementwise": "elementwise gate added",
        "scratch": "gated from the start (headwise)"}


def read(name):
    with open(f"{out}/{name}/metrics.jsonl") as f:
        return [m for m in map(json.loads, f) if "val_loss" in m]


baseline = read("baseline")
sink = max(range(len(baseline[-1]["f_attn_by_layer"])), key=lambda l: baseline[-1]["f_attn_by_layer"][l])
curves = {"baseline": [(m["step"], m) for m in baseline]}
for name, title in RUNS.items():
    before, shift = ([], 0) if name == "scratch" else (curves["baseline"][-1:], steps)
    curves[title] = before + [(m["step"] + shift, m) for m in read(name)]


def layer(m):
    return max(m["f_attn_by_layer"])


def number(x):
    return "-" if x is None else f"{x:.3f}"


table = ["| model | steps | held-out loss | F-Attn | F-Attn of the largest layer | gate score, by layer |", "|---|---|---|---|---|---|"]
for title, curve in curves.items():
    total, m = curve[-1]
    gate = " ".join(number(x) for x in m["gate_mean_by_layer"] or []) or "-"
    table.append(f"| {title} | {total} | {m['val_loss']:.4f} | {m['f_attn']:.3f} | {layer(m):.3f} | {gate} |")
added = [f"set arrow from {steps},graph 0 to {steps},graph 1 nohead dashtype 2 linecolor rgb '#8c8c8c'"]
end = {name: layer(curves[title][-1][1]) for name, title in RUNS.items()}
finding = (f"{steps} steps after a gate was added, the layer with the sink keeps {100 * end['headwise']:.0f} % and "
           f"{100 * end['elementwise']:.0f} % on the first token; gated from the start, {100 * end['scratch']:.0f} %")
plot("docs/late-gate.svg", finding, [
    {"xlabel": "optimiser step", "ylabel": "F-Attn of the largest layer", "set": added + ["set yrange [0:1]"],
     "series": {t: [(x, layer(m)) for x, m in c] for t, c in curves.items()}},
    {"xlabel": "optimiser step", "ylabel": "held-out loss, nats", "set": ["set autoscale y"],
     "series": {t: [(x, m["val_loss"]) for x, m in c] for t, c in curves.items()}}],
    looks={"baseline": {"colour": 6}})
with open("docs/late-gate.md", "w") as f:
    f.write("# Adding the gate late\n\n"
            f"`configs/quick-baseline.cfg`, trained for {steps} steps, then for {steps} more from its weights as it is and with a gate "
            f"that starts fresh (`configs/late-gate.cfg`; the learning rate starts over each time); beside it a model with the gate from the start. Written by `make late-gate` with `STEPS={steps}`. The "
            "paper finds that a gate added to a trained model does not remove its sinks (A.7).\n\n" + "\n".join(table) + "\n\n"
            "![Attention on the first token over the steps](late-gate.svg)\n\nThe vertical line is where the gate is added.\n")
print("\n".join(table))
