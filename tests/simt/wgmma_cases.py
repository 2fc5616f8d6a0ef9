"""The wgmma probes: one 64 x N x 64 product each, in small integers, so that every result is exact."""

import numpy as np

import emulated
from formats import ENCODE

CASES = {  # name: format, N, B is N-major, A is M-major
    "bf16_n8": ("bf16", 8, False, False),
    "bf16_n64": ("bf16", 64, False, False),
    "bf16_n64_nmajor": ("bf16", 64, True, False),
    "bf16_n64_mmajor": ("bf16", 64, False, True),
    "fp16_n128_mmajor_nmajor": ("fp16", 128, True, True),
    "bf16_n128_nmajor_rs": ("bf16", 128, True, False),
    "bf16_n176_rs": ("bf16", 176, False, False),
    "bf16_n256": ("bf16", 256, False, False),
    "fp16_n256_nmajor_rs": ("fp16", 256, True, False),
}


def inputs(name):
    """A and B as they lie in memory, and the accumulators that should come out."""
    kind, n, n_major, m_major = CASES[name]
    rng = np.random.default_rng(n)
    a, b = rng.integers(-8, 9, (64, 64)), rng.integers(-8, 9, (64, n))  # (m, k), (k, n)
    stored_a = emulated.aligned((64, 64), np.uint16)
    stored_b = emulated.aligned((64, n) if n_major else (n, 64), np.uint16)
    stored_a[:] = ENCODE[kind](a.T if m_major else a)
    stored_b[:] = ENCODE[kind](b if n_major else b.T)
    return stored_a, stored_b, fragment(a @ b)


def fragment(d):
    """[64, N] -> [128 threads, N / 2]."""
    t, i = np.arange(128)[:, None], np.arange(d.shape[1] // 2)[None]
    return d[t // 32 * 16 + t % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + t % 4 * 2 + i % 2].astype(np.float32)
