"""FLOPs and bytes of a training step by operator, and the speed that they allow.

    python limits.py CONFIG.cfg [key=value ...] [--tflops X --bandwidth Y | --measure] [--speed TOKENS_PER_S]

Counts for one token: FLOPs of forward and backward pass, and bytes to and from memory when every array is read or written
once by each operator that needs it (float32; operands of products and of attention also as bfloat16; norms, gate and
SwiGLU run once more in the backward pass, since their results are not kept). What norms, gate and SwiGLU make is rounded
as it is made, so that products do not read it as float32. The weights' own traffic is shared by the tokens of a
micro-batch or step. An operator takes at least max(FLOPs / X, bytes / Y); the sum over operators limits tokens/s.
--measure takes X from a large bfloat16 product and Y from a copy on the GPU that is here (needs PyTorch). --speed says
what share of the limits a run reached.
"""
import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))
from config import read_config  # noqa: E402


def operators(keys):
    """(name, FLOPs, bytes) of each operator for one token, forward and backward."""
    names = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")
    V, C, L, HQ, HK, D, F, T = (int(keys[name]) for name in names)
    rows = int(keys.get("batch_size", 1)) * T
    step = rows * int(keys.get("gradient_accumulation_steps", 1))
    gate_position = keys.get("gate_position", "G1")
    gate = {"headwise": HQ}.get(keys.get("gate_type"), HQ * D) if gate_position != "none" else 0
    Z = HQ * D + gate + 2 * HK * D

    def product(name, outputs, inputs, beside):
        """beside: operands that their maker has rounded."""
        weights = outputs * inputs
        moved = 4 * (3 * inputs + 3 * outputs) + 2 * 2 * (2 * inputs + outputs)  # float32, and to bfloat16 and back
        moved -= 4 * beside
        return name, 6 * weights, moved + (2 * 2 * weights + 2 * 4 * weights) / rows

    # Bytes: 4 for a value in float32; what attention walks over is rounded first (4 + 2), and then read so (2).
    forward = (4 + 4) * HQ + 2 * (6 + 2) * HK  # q, y; k, v
    delta = (4 + 4) * HQ  # dy, y
    dq = (6 + 2 + 6 + 2 + 4) * HQ + 2 * (6 + 2) * HK  # q, dy, dq; k, v
    dk_dv = (2 + 2) * HQ + 2 * (2 + 4) * HK  # q, dy; k, v, dk, dv
    attention = D * (forward + delta + dq + dk_dv)

    layer = [
        product("product [q, gate, k, v]", Z, C, C),
        product("product W_O", C, HQ * D, HQ * D if gate_position == "G1" else 0),
        product("product [act, up]", 2 * F, C, C + 2 * F),
        product("product down", C, F, 2 * F),
        ("attention", 3.5 * 2 * HQ * D * (T + 1), attention),
        ("QK-norm, RoPE", 0, 4 * D * 5 * (HQ + 2 * HK)),
        ("RMSNorm", 0, 2 * 4 * C * (2 * 2 + 4)),
        ("gate", 0, 4 * (2 * (2 * HQ * D + gate) + 3 * HQ * D + 2 * gate) if gate else 0),
        ("SwiGLU", 0, 4 * (2 * 3 * F + 5 * F)),
        ("residual", 0, 2 * 4 * 3 * C),
    ]
    weights = 2 * V * C + L * (C * (Z + HQ * D + 3 * F))
    total = [(name, L * flops, L * moved) for name, flops, moved in layer]
    name, flops, moved = product("output head, cross-entropy", V, C, C)
    total.append((name, flops, moved + 4 * 2 * V))
    total.append(("optimiser", 0, weights * (4 * 8 + 6) / step))
    return total


def measured():
    import torch

    def seconds(work, repeat=20):
        for _ in range(3):
            work()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeat):
            work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000 / repeat

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, y = torch.empty(1 << 28, device="cuda"), torch.empty(1 << 28, device="cuda")
    return 2 * 8192**3 / seconds(lambda: a @ b) / 1e12, 8 * x.numel() / seconds(lambda: y.copy_(x)) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--tflops", type=float, help="bfloat16 products, 10^12 a second")
    parser.add_argument("--bandwidth", type=float, help="of memory, 10^9 bytes a second")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--speed", type=float, help="tokens/s of a run")
    arguments = parser.parse_intermixed_args()
    keys = read_config(arguments.config)
    keys.update(argument.split("=", 1) for argument in arguments.keys)
    if arguments.measure:
        arguments.tflops, arguments.bandwidth = measured()
    timed = arguments.tflops and arguments.bandwidth
    print("| operator | kFLOP a token | kB a token | FLOPs a byte |" + (" least ns a token |" if timed else ""))
    print("|---|---:|---:|---:|" + ("---:|" if timed else ""))
    seconds = total = 0
    for name, flops, moved in operators(keys):
        total += flops
        least = max(flops / (arguments.tflops * 1e12), moved / (arguments.bandwidth * 1e9)) if timed else 0
        seconds += least
        line = f"| {name} | {flops / 1e3:,.0f} | {moved / 1e3:,.1f} | {flops / moved if moved else 0:,.0f} |"
        print(line + (f" {least * 1e9:,.1f} |" if timed else ""))
    if timed:
        print(f"\nAt {arguments.tflops:.0f} TFLOP/s and {arguments.bandwidth:.0f} GB/s: at most {1 / seconds:,.0f} tokens/s.")
    if timed and arguments.speed:
        print(f"{arguments.speed:,.0f} tokens/s are {100 * arguments.speed * seconds:.1f} % of that, and in FLOPs "
              f"{100 * arguments.speed * total / (arguments.tflops * 1e12):.1f} % of what products reach.")


if __name__ == "__main__":
    main()
