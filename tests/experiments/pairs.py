"""Reads the reports of tests/experiments/pairs.sh, checks them, prints the table and writes docs/quick-pair.md."""
import json
import sys

out, seeds = sys.argv[1], sys.argv[2:]
passed = failed = 0
rows = []


def check(name, good):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print(("ok " if good else "FAIL ") + name)


def layers(values):
    return " ".join(f"{v:.3f}" for v in values)


for seed in seeds:
    with open(f"{out}/report-{seed}/summary.json") as f:
        summary = json.load(f)
    base, gated = summary["baseline"], summary["gated"]
    sink = max(base["f_attn_by_layer"])
    layer = base["f_attn_by_layer"].index(sink)
    check(f"seed {seed}: the baseline's largest F-Attn {sink:.3f} is at least 0.40", sink >= 0.40)
    worst = max(gated["f_attn_by_layer"])
    check(f"seed {seed}: the gated F-Attn {worst:.3f} is at most a quarter of that in every layer", worst <= sink / 4)
    check(f"seed {seed}: the gated loss {gated['loss']:.4f} is at most the baseline's {base['loss']:.4f}",
          gated["loss"] <= base["loss"])
    where = [l for l, v in enumerate(base["f_attn_by_layer"]) if v >= 0.40]
    means = [gated["gate_mean_by_layer"][l] for l in where]
    check(f"seed {seed}: the gate mean {layers(means)} is below 0.25 where the sink sits", all(m < 0.25 for m in means))
    for name, m in (("baseline", base), ("gated", gated)):
        gate = layers(m["gate_mean_by_layer"]) if m.get("gate_mean_by_layer") else "-"
        rows.append(f"| {seed} | {name} | {m['loss']:.4f} | {m['lowest_loss']:.4f} | {m['f_attn']:.3f} "
                    f"| {layers(m['f_attn_by_layer'])} | {m['f_attn_uniform']:.3f} | {m['m_act']:.2f} | {gate} |")

table = "\n".join(["| seed | model | loss | lowest reachable | F-Attn | by layer | uniform | M-Act | gate by layer |",
                   "|---|---|---|---|---|---|---|---|---|"] + rows)
with open("docs/quick-pair.md", "w") as f:
    f.write("# The quick pair over several seeds\n\n"
            "`configs/quick-baseline.cfg` and `configs/quick.cfg`, trained and compared on 256 fresh sequences by `make "
            f"pairs` (here `SEEDS=\"{' '.join(seeds)}\" make pairs`), which also wrote this page. The seed changes weights, data and the task's bigram chain. F-Attn "
            "counts every query position; uniform is what attention spread evenly would give.\n\n" + table + "\n")
print(table)
print(f"{passed} passed, {failed} failed")
sys.exit(failed != 0)
