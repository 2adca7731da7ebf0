"""Writes docs/bench.md, from what bench.sh left in build/bench, to standard output.

    python table.py COMMAND        the command that the reader is told
"""
import collections
import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys

from compare import COMPILED, EAGER, INSTALLED, OURS, WORK
from config import read_config

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "experiments"))
from plots import plot  # noqa: E402

DOCS = pathlib.Path("docs")
EMPTY = "–"


# ---- reading ---------------------------------------------------------------------------------------------------------


def text_of(name):
    path = WORK / name
    return path.read_text().strip() if path.exists() else ""


def output_of(*command):
    """Of a program that may not be there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def field(text, name):
    match = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def machine():
    cpu = output_of("lscpu")
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
    extensions = [name for name in known if name in field(cpu, "Flags").split()]
    caches = ", ".join(f"{name} {field(cpu, name + ' cache')}" for name in ("L2", "L3") if field(cpu, name + " cache"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = field(cpu, "Model name") or platform.processor()
    return {
        "processor": f"{processor}, {os.cpu_count()} cores, {' '.join(extensions)}",
        "caches": caches,
        "memory": f"{memory:.0f} GB",
        "compiler": (output_of(os.environ.get("CC", "cc"), "--version").splitlines() or [""])[0],
        "PyTorch": output_of(sys.executable, "-c", "import torch; print(torch.__version__)").strip(),
        "load before": text_of("load.txt").partition(": ")[2],
        "duration": text_of("duration.txt"),
    }


Case = collections.namedtuple("Case", "products micro_batch gate recompute threads")


class Training:
    """The results of compare.py by case and program."""

    def __init__(self, run):
        self.cases, self.results = [], {}
        for result in run["results"]:
            case = Case(*(result[name] for name in Case._fields))
            if case not in self.cases:
                self.cases.append(case)
            self.results[case, result["program"]] = result

    def median(self, case, program, name):
        result = self.results.get((case, program))
        return statistics.median(result[name]) if result and result[name] and not result["refused"] else None

    def speed(self, case, program):
        return self.median(case, program, "speeds")

    def memory(self, case, program):
        return self.median(case, program, "peak_bytes")

    def refused(self, case, program):
        result = self.results.get((case, program))
        return result["refused"] if result else ""

    def best(self, products, programs):
        speeds = (self.speed(case, program) for case in self.cases for program in programs if case.products == products)
        return max((speed for speed in speeds if speed), default=None)


# ---- writing ---------------------------------------------------------------------------------------------------------


def ratio(a, b):
    return a / b if a and b else None


def number(x, form="{:.2f}"):
    return EMPTY if x is None else form.format(x)


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def block(text):
    return f"```\n{text}\n```"


def name_of(case):
    threads = f", {case.threads} thread{'s' * (case.threads > 1)}" if case.threads else ""
    return f"{case.micro_batch}{', recomputation' * case.recompute}{threads}"


def figure(training, case, program, measure, form, scale=1):
    if training.refused(case, program):
        return "not in this build" if "use_amp" in training.refused(case, program) else "failed"
    value = measure(case, program)
    return number(value and value / scale, form)


def training_table(training):
    head = ["products", "micro-batch", "gate", "ours", "as installed", "tuned", "tuned, eager"]
    head += ["ours / as installed", "ours / tuned", "MB ours", "as installed", "tuned", "ours / tuned"]
    rows = []
    for case in training.cases:
        speeds = [training.speed(case, program) for program in (OURS, INSTALLED, COMPILED)]
        row = [case.products, name_of(case), case.gate]
        for program in (OURS, INSTALLED, COMPILED, EAGER):
            row.append(figure(training, case, program, training.speed, "{:.0f}"))
        row += [number(ratio(speeds[0], speed)) for speed in speeds[1:]]
        for program in (OURS, INSTALLED, COMPILED):
            row.append(figure(training, case, program, training.memory, "{:.0f}", 1e6))
        memory = ratio(training.memory(case, OURS), training.memory(case, COMPILED))
        rows.append([*row, number(memory)])
    return table(head, rows)


def flop_shares(config):
    """Of the gate, over a model without: 6 FLOP for each weight and token in training."""
    printed = output_of("./train", config, "gate_position=none", "--dry-run")
    value, prefix = re.search(r"([\d.]+) ([kMGT]?)FLOP in training", printed).groups()
    without = float(value) * 1000.0 ** " kMGT".index(prefix or " ")
    keys = read_config(pathlib.Path(config))
    L, C, HQ, D = (int(keys[name]) for name in ("n_layers", "d_model", "n_heads", "head_dim"))
    return {gate: 6 * L * C * columns / without for gate, columns in (("headwise", HQ), ("elementwise", HQ * D))}


def gate_costs(training, shares):
    """(products, gate, slower by, share of FLOPs) of ours at micro-batch 1."""
    for products in ("float32", "bf16"):
        case = Case(products, 1, "none", False, 0)
        for gate, share in shares.items():
            slower = ratio(training.speed(case, OURS), training.speed(case._replace(gate=gate), OURS))
            if slower:
                yield products, gate, slower - 1, share


def goals(training, ours, costs):
    """(measure, figure, "at least" or "at most", goal)"""
    for products, goal in (("bf16", 3.5), ("float32", 1.3)):
        case = Case(products, 1, "elementwise", False, 0)
        measured = ratio(training.speed(case, OURS), training.speed(case, COMPILED))
        yield f"{products}, micro-batch 1: tokens/s over tuned PyTorch's", measured, "at least", goal
    measured = ratio(training.best("bf16", [OURS]), training.best("bf16", [EAGER, COMPILED]))
    yield "bf16: best tokens/s over tuned PyTorch's best, any micro-batch", measured, "at least", 2.5
    for products in ("float32", "bf16"):
        for micro_batch, recompute, goal in ((1, False, 0.6), (8, False, 0.8), (8, True, 0.5)):
            case = Case(products, micro_batch, "elementwise", recompute, 0)
            measured = ratio(training.memory(case, OURS), training.memory(case._replace(recompute=False), COMPILED))
            what = f"{products}, micro-batch {name_of(case)}: peak memory over tuned PyTorch's"
            yield what, measured, "at most", goal
    for products, gate, slower, share in costs:
        if gate == "headwise":
            yield f"{products}: cost of the headwise gate", slower, "at most", 0.02
        else:
            yield f"{products}: cost of the elementwise gate beyond its share of FLOPs", slower - share, "at most", 0.05
    for products in ("float32", "bf16"):
        one, two = (Case(products, 1, "elementwise", False, threads) for threads in (1, 2))
        measured = ratio(ours.speed(two, OURS), ours.speed(one, OURS))
        yield f"{products}: two threads over one", measured, "at least", 1.85


def goal_rows(rows):
    for measure, value, bound, goal in rows:
        if value is not None:
            reached = value >= goal if bound == "at least" else value <= goal
            yield measure, number(value, "{:.3f}"), f"{bound} {goal}", "yes" if reached else "no"


def spread(training):
    """The largest distance of a speed from its median."""
    lists = [result["speeds"] for result in training.results.values() if result["speeds"]]
    return max((abs(x / statistics.median(speeds) - 1) for speeds in lists for x in speeds), default=0)


def training_part(run, run_of_ours):
    training, ours = Training(run), Training(run_of_ours)
    costs = list(gate_costs(ours, flop_shares(run["config"])))
    yield "## Training"
    yield (
        f"Tokens per second over whole optimiser steps of `{run['config']}` ({run['sequences']} sequences or one "
        f"micro-batch in a step: forward, backward, clipping, AdamW), and peak memory of the process in MB. The "
        f"programs ran in turn, {run['rounds']} times each; the figures are medians, and no step was further than "
        f"{spread(training):.0%} from its median. Ratios above 1 in speed and below 1 in memory are in favour of this "
        f"project."
    )
    yield (
        "PyTorch, compiled unless it says eager: *as installed* by pip, and *tuned* (`tests/bench/torch.sh`): malloc "
        "keeps large blocks, and on an AMD processor MKL takes AVX-512, which it does by itself on Intel's alone."
    )
    yield training_table(training)
    yield "## Goals"
    yield table(["measure", "figure", "goal", "reached"], goal_rows(goals(training, ours, costs)))
    yield "## Cost of the gate"
    yield (
        "How much longer a step of ours takes than without a gate, at micro-batch 1 and otherwise equal shape. For "
        f"small differences ours ran once more without PyTorch, {run_of_ours['rounds']} times each in turn; no step "
        f"was further than {spread(ours):.0%} from its median."
    )
    yield table(
        ["products", "gate", "slower by", "share of FLOPs"],
        ([products, gate, f"{slower:.1%}", f"{share:.1%}"] for products, gate, slower, share in costs),
    )
    yield "One thread and two, tokens per second:"
    threads = [case for case in ours.cases if case.threads]
    yield table(
        ["products", "threads", "tokens/s"],
        ([case.products, case.threads, f"{ours.speed(case, OURS):.0f}"] for case in threads),
    )


def attention_figures():
    """{(program, products): {T: (seconds, bytes)}}, medians."""
    seen = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in text_of("attention.txt").splitlines():
        T, program, products, seconds, size = line.split()
        seen[program, products][int(T)].append((float(seconds), float(size)))
    return {
        key: {T: tuple(map(statistics.median, zip(*pairs))) for T, pairs in by_length.items()}
        for key, by_length in seen.items()
    }


def faster_at_the_longest(figures):
    """ "2.2 times (float32) ... as fast as PyTorch at 32768 positions", of what was measured with both programs."""
    longest = max(T for by_length in figures.values() for T in by_length)
    seconds = {key: by_length[longest][0] for key, by_length in figures.items() if longest in by_length}
    ratios = [
        f"{seconds['PyTorch', products] / seconds['ours', products]:.1f} ({products})"
        for products in ("float32", "bf16")
        if {("PyTorch", products), ("ours", products)} <= seconds.keys()
    ]
    return f"Attention over {longest} positions: PyTorch's seconds over ours, {' and '.join(ratios)}"


def plot_attention(figures):
    """Seconds and bytes over T as docs/attention.svg; False without gnuplot."""
    if not shutil.which("gnuplot"):
        return False
    lengths = sorted({T for by_length in figures.values() for T in by_length})
    ticks = ", ".join(f"'{T if T < 1024 else f'{T // 1024}k'}' {T}" for T in lengths)
    axes = ["set logscale xy", f"set xtics ({ticks})", f"set xrange [{lengths[0] / 1.2}:{lengths[-1] * 1.2}]"]

    def series(panel, scale):
        return {
            f"{program}, {products}": [(T, values[panel] / scale) for T, values in by_length.items()]
            for (program, products), by_length in figures.items()
        }

    looks = {
        f"{program}, {products}": {"colour": int(products == "float32"), "marker": int(program != "ours"), "dash": dash}
        for program, dash in (("ours", 1), ("PyTorch", 2))
        for products in ("float32", "bf16")
    }
    plot(
        DOCS / "attention.svg",
        faster_at_the_longest(figures),
        [
            {"xlabel": "positions T", "ylabel": "forward and backward, s", "set": axes, "series": series(0, 1)},
            {"xlabel": "positions T", "ylabel": "memory, MB", "set": [], "series": series(1, 1e6)},
        ],
        looks,
    )
    return True


def attention_part(figures):
    yield "## Attention"
    yield (
        "Forward and backward of one sequence, 8 heads of 64, against `scaled_dot_product_attention`: seconds, and by "
        "how many MB the process grows (inputs, outputs, gradients, scratch)."
    )
    if plot_attention(figures):
        yield "![Seconds and memory of attention by sequence length](attention.svg)"
    keys = list(figures)
    lengths = sorted({T for by_length in figures.values() for T in by_length})
    head = ["T", *(f"{program} {products} {unit}" for program, products in keys for unit in ("s", "MB"))]
    rows = []
    for T in lengths:
        row = [T]
        for key in keys:
            seconds, size = figures[key].get(T, (None, None))
            row += [number(seconds, "{:.4f}"), number(size and size / 1e6, "{:.1f}")]
        rows.append(row)
    yield table(head, rows)


def parts(command):
    yield "# Speed and memory"
    yield f"Measured by `{command}` on {datetime.date.today()}; `tests/bench/README.md` says how."
    yield table(["", ""], [row for row in machine().items() if row[1]])
    if text_of("training.json"):
        yield from training_part(json.loads(text_of("training.json")), json.loads(text_of("ours.json")))
    if text_of("profile.txt"):
        yield "## Share of time by operator"
        yield (
            "Two steps of 8 micro-batches of one sequence with the elementwise gate, one held-out window, and a "
            "checkpoint, which is most of what is outside of the operators."
        )
        yield block(text_of("profile.txt"))
    if text_of("products.txt"):
        yield "## Matrix products"
        yield (
            "`y = x w^T` with x (M, I), w (O, I), its input gradient dX and weight gradient dW, in GFLOP/s and as a "
            "share of the peak: what a loop that only touches registers reaches in the same run."
        )
        yield block(text_of("products.txt"))
    if text_of("torch_products.txt"):
        yield "The same products in PyTorch; in bfloat16 its inputs and outputs are bfloat16 already, ours are float32."
        yield block(text_of("torch_products.txt"))
    if text_of("generation.txt"):
        yield "## Generation"
        yield "One sequence with a key-value cache, against the speed of memory in the same run."
        yield block(text_of("generation.txt"))
    if text_of("attention.txt"):
        yield from attention_part(attention_figures())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: table.py COMMAND")
    print("\n\n".join(parts(sys.argv[1])))
