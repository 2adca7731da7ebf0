"""Reads the runs of tests/experiments/sweep.sh, prints the table and writes docs/sweep.md and docs/sweep.svg."""
import json
import sys

from plots import plot

out, rates, seeds, methods = sys.argv[1], sys.argv[2].split(), sys.argv[3].split(), sys.argv[4].split()
TITLES = {"baseline": "baseline", "sandwich": "sandwich norm", "clipped": "outputs clipped to ±10",
          "headwise": "gate G1 headwise", "elementwise": "gate G1 elementwise"}


def read(method, rate, seed):
    """Held-out loss at the end, the count of loss spikes, and the step at which a run diverged; the loss is None then."""
    with open(f"{out}/{method}-{rate}-{seed}/metrics.jsonl") as f:
        last = json.loads(f.readlines()[-1])
    diverged = last["step"] if last.get("diverged") else None
    return None if diverged else last["val_loss"], last["spikes"], diverged


def cell(runs):
    losses = [loss for loss, _, _ in runs if loss is not None]
    text = f"{sum(losses) / len(losses):.3f}" if losses else ""
    spikes, steps = sum(r[1] for r in runs), [str(r[2]) for r in runs if r[2]]
    if spikes:
        text += f" ({spikes} spike{'s' * (spikes > 1)})"
    return text + (f" diverged at step {', '.join(steps)}" if steps else "")


runs = {(m, r): [read(m, r, s) for s in seeds] for m in methods for r in rates}
table = ["| method | " + " | ".join(rates) + " |", "|---" * (len(rates) + 1) + "|"]
for m in methods:
    table.append(f"| {TITLES[m]} | " + " | ".join(cell(runs[m, r]) for r in rates) + " |")


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def number(x):
    return "divergence" if x is None else f"{x:.2f}"


spikes, diverged = sum(x[1] for r in runs.values() for x in r), sum(x[2] is not None for r in runs.values() for x in r)
def ends(*which):
    return " and ".join(number(mean([x[0] for x in runs[m, rates[-1]]])) for m in which)


log = ["set logscale x 10", f"set xrange [{float(rates[0]) / 1.3}:{float(rates[-1]) * 1.3}]", "set xtics (" + ", ".join(f"'{r}' {r}" for r in rates) + ")"]
panels = [{"xlabel": "highest learning rate", "ylabel": "held-out loss at the end, nats", "set": log,
           "series": {TITLES[m]: [(float(r), mean([x[0] for x in runs[m, r]])) for r in rates] for m in methods}}]
if spikes:
    panels.append({"xlabel": "highest learning rate", "ylabel": "loss spikes in a run", "set": ["set yrange [0:*]"],
                   "series": {TITLES[m]: [(float(r), mean([x[1] for x in runs[m, r]])) for r in rates] for m in methods}})
plot("docs/sweep.svg", f"At a learning rate of {rates[-1]} the baseline ends at {ends('baseline')}, the gated models at "
     f"{ends('headwise', 'elementwise')}", panels, width=450 if spikes else 720)
with open("docs/sweep.md", "w") as f:
    f.write("# Learning rates: stability in small\n\n"
            "`configs/sweep.cfg` (8 layers of width 32 on Bigram-Backcopy, 400 steps) at rising learning rates, written by "
            "`make sweep`" + (f" with `RATES=\"{' '.join(rates)}\" SEEDS=\"{' '.join(seeds)}\"`") + ". Held-out loss at the "
            f"end{', mean over the seeds' if len(seeds) > 1 else ''}; a spike is a step whose loss lies seven standard deviations above the mean of the 128 steps before it; a run has "
            "diverged when a loss is not finite or comes back up (`drivers/train/spikes.h`).\n\n" + "\n".join(table) + "\n\n"
            "![Final loss against the learning rate](sweep.svg)\n\n"
            f"Of {len(runs) * len(seeds)} runs, {diverged} diverged; they have {spikes} loss spikes in all.\n\n"
            "The paper's counterpart (Table 2, 48 layers, 1.7B parameters): at a rate of 8e-3 the baseline's perplexity "
            "goes from 7.421 to 9.195, with sandwich norm it stays at 7.407, with the elementwise gate at 7.325; after 1T "
            "tokens the baseline diverges there and the gated model does not. Clipping (A.6) does not prevent it.\n")
print("\n".join(table))
