"""The products of products.c by PyTorch: oneDNN in bfloat16, in float32 what PyTorch is linked with (MKL, OpenBLAS).

    python products.py [M [rounds]]
"""
import statistics
import sys
import time

import torch

SIZES = ((1280, 512), (512, 512), (2752, 512), (512, 1376), (32000, 512))
REPEATED_FLOP = 2e9


def gflops(product, work, rounds):
    repeat = int(REPEATED_FLOP / work) + 1
    product()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(repeat):
            product()
        seconds.append((time.perf_counter() - begin) / repeat)
    return 1e-9 * work / statistics.median(seconds)


def main():
    M = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    for dtype in (torch.float32, torch.bfloat16):
        print(f"PyTorch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads")
        print(f"{'M x O x I':>20} {'forward GF/s':>16} {'dX GF/s':>16} {'dW GF/s':>16}")
        for O, I in SIZES:
            x, w, dy = (torch.rand(shape).sub(0.5).to(dtype) for shape in ((M, I), (O, I), (M, O)))
            products = (lambda: x @ w.T, lambda: dy @ w, lambda: dy.T @ x)
            speeds = (gflops(product, 2 * M * O * I, rounds) for product in products)
            print(f"{M:5} x {O:5} x {I:4}", *(f"{speed:16.0f}" for speed in speeds), flush=True)


if __name__ == "__main__":
    main()
