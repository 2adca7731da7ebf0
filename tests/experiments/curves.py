"""Reads the runs of tests/experiments/curves.sh, prints the table and writes docs/bfloat16.md and docs/bfloat16.svg."""
import json
import sys

from plots import plot

out, options = sys.argv[1], sys.argv[2]
NAMES = ("quick", "rtx4060")


def read(name, amp):
    with open(f"{out}/{name}-{amp}/metrics.jsonl") as f:
        return [(m["step"], m["loss"]) for m in map(json.loads, f) if "loss" in m]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


curves = {name: {"float32": read(name, "off"), "bfloat16": read(name, "on")} for name in NAMES}
distances = []
table = ["| configuration | steps | last loss, float32 | last loss, bfloat16 | mean distance | float32 less bfloat16 | mean move in a step |",
         "| --- | --- | --- | --- | --- | --- | --- |"]
for name, both in curves.items():
    exact, rounded = ([loss for _, loss in both[products]] for products in ("float32", "bfloat16"))
    distances.append(mean(abs(a - b) for a, b in zip(exact, rounded)))
    table.append(f"| `{name}.cfg` | {len(exact)} | {exact[-1]:.4f} | {rounded[-1]:.4f} | {distances[-1]:.5f} | "
                 f"{mean(a - b for a, b in zip(exact, rounded)):+.5f} | {mean(abs(a - b) for a, b in zip(exact, exact[1:])):.5f} |")
axes = {"xlabel": "optimiser step", "ylabel": "training loss, nats"}
plot("docs/bfloat16.svg", "With bfloat16 products the loss is that of float32 but for " +
     " and ".join(f"{d:.3f} nats ({name}.cfg)" for name, d in zip(NAMES, distances)) + ", on average",
     [axes | {"title": f"{name}.cfg", "series": both} for name, both in curves.items()],
     looks={"float32": {"colour": 1, "width": 2.5}, "bfloat16": {"colour": 0, "width": 1}})
with open("docs/bfloat16.md", "w") as f:
    f.write("# float32 and bfloat16 products\n\n"
            "Training loss of the same run with float32 and with bfloat16 matrix products (`use_amp`), written by `make curves"
            + (f' CURVES="{options}"' if options else "") + "`:\nthe mean distance of the two curves, with and without its sign, "
            "beside how far the float32 curve moves from one\nstep to the next.\n\n" + "\n".join(table) +
            "\n\n![Training loss with float32 and with bfloat16 products](bfloat16.svg)\n")
print("\n".join(table))
