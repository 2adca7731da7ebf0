"""Seconds and bytes of PyTorch's causal attention, forward and backward: what attention.c measures of ours.

    python attention.py float32|bf16 T        prints: seconds bytes
"""
import resource
import statistics
import sys
import time

import torch
from torch.nn import functional

HEADS, HEAD_DIM, WARM_UP_T, MOST_PASSES, MEASURED_SECONDS = 8, 64, 64, 64, 0.5


def peak_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def inputs(dtype, T):
    """q, k, v, each (1, HEADS, T, HEAD_DIM), as PyTorch is fastest with, and the gradient of the output."""
    shape = (1, HEADS, T, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3))
    return q, k, v, torch.randn(shape, dtype=dtype)


def one_pass(q, k, v, dy):
    begin = time.perf_counter()
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    gradients = torch.autograd.grad(y, (q, k, v), dy)
    seconds = time.perf_counter() - begin
    del y, gradients
    return seconds


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in ("float32", "bf16") or not sys.argv[2].isdecimal():
        sys.exit("usage: attention.py float32|bf16 T")
    dtype, T = torch.bfloat16 if sys.argv[1] == "bf16" else torch.float32, int(sys.argv[2])
    torch.manual_seed(0)
    one_pass(*inputs(dtype, WARM_UP_T))
    before = peak_bytes()
    tensors, seconds = inputs(dtype, T), []
    while len(seconds) < MOST_PASSES and sum(seconds) < MEASURED_SECONDS:
        seconds.append(one_pass(*tensors))
    print(f"{statistics.median(seconds):.6f} {peak_bytes() - before}")


if __name__ == "__main__":
    main()
