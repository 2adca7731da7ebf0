"""Prints, from the reports of tests/experiments/table4.sh, the rows that ran with several seeds.

    python3 table4.py DIRECTORY SEED...
"""
import json
import sys


def percent(values):
    return " ".join(f"{100 * value:.1f}" for value in values)


print("| seed | row | loss | F-Attn, % | by layer | even | M-Act | gate by layer |")
print("|---|---|---|---|---|---|---|---|")
for seed in sys.argv[2:]:
    with open(f"{sys.argv[1]}/report-{seed}/summary.json") as file:
        models = json.load(file)
    for name, m in models.items():
        if not isinstance(m, dict) or "f_attn_by_layer" not in m:
            continue
        gate = " ".join(f"{value:.3f}" for value in m.get("gate_mean_by_layer") or []) or "-"
        print(f"| {seed} | {name} | {m['loss']:.4f} | {percent([m['f_attn']])} | {percent(m['f_attn_by_layer'])} "
              f"| {percent([m['f_attn_uniform']])} | {m['m_act']:.2f} | {gate} |")
