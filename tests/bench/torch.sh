#!/bin/sh
# PyTorch as fast as it gets on this machine, with nothing changed in what it computes:
#     tests/bench/torch.sh SCRIPT.py [argument ...]
#
# By itself glibc's malloc gives every large block back to the kernel, and takes it anew, page by page, in each
# micro-batch; here it keeps them, as tcmalloc would. And MKL gets the answer of mkl.c where the processor is AMD's.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
if grep -q AuthenticAMD /proc/cpuinfo 2>/dev/null; then
    make -s -C "$root" build/bench/mkl.so
    export LD_PRELOAD="$root/build/bench/mkl.so${LD_PRELOAD:+:$LD_PRELOAD}"
fi
exec "$root/.venv/bin/python" -W ignore "$@"
