"""Attention never holds a matrix of scores: what a long sequence needs beside its inputs is O(S d)."""

import subprocess
import sys

LENGTH, DIM = 32768, 64
TENSOR = LENGTH * DIM * 4  # bytes of q, 8 MiB; a matrix of scores has 4 GiB
# Out, three gradients, and the partial dq of the 16 runs that keys are split into where heads are few.
FORWARD, BOTH = 4 * TENSOR, 32 * TENSOR

# Prints by how many bytes a forward, and then forward and backward, raise the most memory this process ever had.
# (VmHWM, as ru_maxrss starts at what the parent had.)
_GROWTH = f"""
import torch
import tilewise as tw

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def run(length):
    q, k, v = (torch.randn(1, 1, length, {DIM}, requires_grad=True) for _ in range(3))
    before = peak()
    out = tw.attention(q, k, v, causal=True)
    forward = peak() - before
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(t.isfinite().all() for t in (out, *gradients))
    return forward, peak() - before

torch.set_num_threads(1)
run(64)  # loads what is loaded once
print(*run({LENGTH}))
"""


def test_memory_of_a_long_sequence():
    printed = subprocess.run([sys.executable, "-c", _GROWTH], capture_output=True, text=True, check=True).stdout
    forward, both = map(int, printed.split())
    assert TENSOR <= forward <= FORWARD, f"forward took {forward / 2**20:.0f} MiB"
    assert 4 * TENSOR <= both <= BOTH, f"forward and backward took {both / 2**20:.0f} MiB"
