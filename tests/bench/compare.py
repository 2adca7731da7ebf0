"""Tokens per second and peak memory of ./train and of PyTorch (torch_speed.py) on the same configuration.

    python compare.py CONFIG.cfg [options]        --help lists them; writes build/bench/training.json
    python compare.py CONFIG.cfg --ours           ./train alone, for small differences: the gate's cost, two threads
                                                  against one; writes build/bench/ours.json

The contestants of a group run in turn, one after the other, `--rounds` times: A B C A B C ... A PyTorch process stays
alive for all its turns, since starting and compiling takes longer than a step; it does nothing between them. ./train is
started anew for each turn, and its first step is not counted.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from config import read_config

OURS, EAGER, COMPILED = "ours", "PyTorch eager", "PyTorch compiled"  # PyTorch under torch.sh
INSTALLED = "PyTorch compiled, as installed"
WORK = pathlib.Path("build/bench")
MOST_STEPS = 20  # in one turn


class Refused(Exception):
    """This build, or this machine, cannot run it; the text says why."""


@dataclasses.dataclass
class Contestant:
    program: str
    products: str  # float32, bf16
    micro_batch: int
    gate: str = "elementwise"  # none, elementwise, headwise
    recompute: bool = False
    threads: int = 0  # 0: all cores
    speeds: list = dataclasses.field(default_factory=list)  # tokens per second of each step
    peak_bytes: list = dataclasses.field(default_factory=list)  # of each process
    refused: str = ""

    def __str__(self):
        extra = ", recomputation" * self.recompute + f", threads {self.threads}" * (self.threads > 0)
        return f"{self.program}, {self.products}, micro-batch {self.micro_batch}, gate {self.gate}{extra}"

    def keys(self, sequences):
        gate = ["gate_position=none"] if self.gate == "none" else ["gate_position=G1", f"gate_type={self.gate}"]
        return gate + [
            f"use_amp={'on' if self.products == 'bf16' else 'off'}",
            f"batch_size={self.micro_batch}",
            f"gradient_accumulation_steps={max(1, sequences // self.micro_batch)}",
            f"recompute={int(self.recompute)}",
            f"threads={self.threads}",
        ]


def wait(process):
    """Waits for the end of a process: its exit status, and the most memory that it held, in bytes."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_line(path):
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")


class Train:
    """./train, started for each turn."""

    def __init__(self, config, contestant, sequences):
        self.contestant, self.directory, self.log = contestant, WORK / "run", WORK / "train.log"
        # Attention is not looked at while it trains, and the one held-out window comes after the last step: PyTorch's
        # steps do neither.
        self.command = ["./train", config, "--fresh", f"output_dir={self.directory}", "log_every=1000000"]
        self.command += ["eval_windows=1", "eval_every=0", "save_every=0", *contestant.keys(sequences)]

    def turn(self, steps):
        with self.log.open("w") as log:
            process = subprocess.Popen([*self.command, f"max_steps={steps + 1}"], stdout=log, stderr=log)
            status, peak = wait(process)
        if status:
            raise Refused(last_line(self.log))
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        shutil.rmtree(self.directory)
        self.contestant.speeds += [json.loads(line)["tokens_per_s"] for line in lines[1:]]
        self.contestant.peak_bytes.append(peak)

    def end(self):
        pass


class Torch:
    """torch_speed.py, kept alive between its turns."""

    def __init__(self, config, contestant, sequences):
        self.contestant, self.log = contestant, WORK / "torch.log"
        here, mode = pathlib.Path(__file__).parent, "eager" if contestant.program == EAGER else "compiled"
        python = [sys.executable, "-W", "ignore"] if contestant.program == INSTALLED else [here / "torch.sh"]
        command = [*python, here / "torch_speed.py", config, "--turns", "--mode", mode]
        command += contestant.keys(sequences)
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str((WORK / "inductor").resolve())}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.read()  # "ready"

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise Refused(last_line(self.log))
        return line

    def turn(self, steps):
        for _ in range(steps):
            self.ask()
            self.contestant.speeds.append(json.loads(self.read())["tokens_per_s"])

    def ask(self):
        """A process that has died says so by the end of its output."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def end(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.contestant.peak_bytes.append(wait(self.process)[1])


def groups_of_ours():
    for products in ("float32", "bf16"):
        yield [Contestant(OURS, products, 1, gate) for gate in ("none", "headwise", "elementwise")]
        yield [Contestant(OURS, products, 1, threads=threads) for threads in (1, 2)]


def groups(full):
    """Lists of contestants that are compared with each other, and so run in turn."""
    for products in ("float32", "bf16"):
        group = [Contestant(OURS, products, 1, gate) for gate in ("elementwise", "headwise", "none")]
        group += [Contestant(EAGER, products, 1), Contestant(COMPILED, products, 1)]
        group += [Contestant(COMPILED, products, 1, "none"), Contestant(INSTALLED, products, 1)]
        if full:
            group += [Contestant(COMPILED, products, 1, "headwise"), Contestant(EAGER, products, 1, "none")]
        yield group
        group = [Contestant(program, products, 8) for program in (OURS, INSTALLED, COMPILED)]
        group += [Contestant(EAGER, products, 8)] if full else []
        group += [Contestant(OURS, products, 8, recompute=True)] if full or products == "bf16" else []
        yield group
        if not full:
            continue
        yield [Contestant(program, products, 8, "none") for program in (OURS, EAGER, COMPILED)]
        for micro_batch in (2, 4, 16):
            yield [Contestant(program, products, micro_batch) for program in (OURS, EAGER, COMPILED)]
        yield [Contestant(COMPILED, products, 1, threads=threads) for threads in (1, 2)]


def steps_of_turn(contestant, tokens, seconds):
    """As many as fit, by the speed seen so far."""
    if not contestant.speeds:
        return 1
    return max(1, min(MOST_STEPS, round(seconds * contestant.speeds[-1] / tokens)))


def take_turn(runner, tokens, seconds):
    contestant = runner.contestant
    runner.turn(steps_of_turn(contestant, tokens, seconds))
    print(f"    {contestant}: {contestant.speeds[-1]:.0f} tokens/s", flush=True)


def attempt(contestant, action, *arguments):
    """Notes a refusal, so that the others go on."""
    try:
        return action(*arguments)
    except Refused as reason:
        contestant.refused = str(reason)
        print(f"    {contestant}: {reason}", flush=True)
        return None


def run_group(config, group, arguments, context_length):
    runners = []
    for contestant in group:
        program = Train if contestant.program == OURS else Torch
        runner = attempt(contestant, program, config, contestant, arguments.sequences)
        runners += [runner] if runner else []
    for number in range(arguments.rounds):
        print(f"  round {number + 1} of {arguments.rounds}", flush=True)
        for runner in runners:
            if not runner.contestant.refused:
                tokens = max(arguments.sequences, runner.contestant.micro_batch) * context_length
                attempt(runner.contestant, take_turn, runner, tokens, arguments.seconds)
    for runner in runners:
        runner.end()


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--full", action="store_true", help="micro-batches 1 to 16, all gates, one thread and two")
    parser.add_argument("--ours", action="store_true", help="./train alone: gates, one thread and two")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8, help="in an optimiser step; a micro-batch at least")
    parser.add_argument("--seconds", type=float, default=3, help="that a turn lasts; one step at least")
    parser.add_argument("--only", default="", help="groups whose first contestant's description contains this")
    return parser.parse_args()


def main():
    arguments = parse()
    WORK.mkdir(parents=True, exist_ok=True)
    context_length = int(read_config(pathlib.Path(arguments.config))["max_seq_len"])
    begin, results = time.time(), []
    for group in groups_of_ours() if arguments.ours else groups(arguments.full):
        if arguments.only not in str(group[0]):
            continue
        print(f"{group[0].products}, micro-batch {group[0].micro_batch} ({time.time() - begin:.0f} s)", flush=True)
        run_group(arguments.config, group, arguments, context_length)
        results += [dataclasses.asdict(contestant) for contestant in group]
    options = {"config": arguments.config, "rounds": arguments.rounds, "sequences": arguments.sequences}
    name = "ours.json" if arguments.ours else "training.json"
    (WORK / name).write_text(json.dumps({**options, "results": results}, indent=1))


if __name__ == "__main__":
    main()
