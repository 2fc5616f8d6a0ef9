"""Seeded bugs in the kernels of the long convolution."""

import torch

import tilewise as tw
from harness.mutations import Mutation
from tilewise.reference.fft_conv import fft_conv as reference

_CUDA = "fft_conv/cuda/"
MUTATIONS = [
    Mutation(
        "no_barrier_after_factor1",
        _CUDA + "conv.h",
        "      F::factor1(s.exchange, x, s.tables);\n      sync_block();\n",
        "      F::factor1(s.exchange, x, s.tables);\n",
        "race",
    ),
    Mutation(
        "no_barrier_before_inverse1",
        _CUDA + "conv.h",
        "      sync_block();\n      end_row(s, {p, b, head, in_scale});",
        "      end_row(s, {p, b, head, in_scale});",
        "race",
    ),
    Mutation("no_warp_sync", _CUDA + "three_factors.h", "    sync_warp();  // orders", "    // orders", "race"),
    Mutation("no_wait_for_tables", _CUDA + "conv.h", "  cp_async_wait<0>();\n", "", "race"),
    Mutation(
        "no_barrier_in_transform",
        _CUDA + "fft32.h",
        "      sync_block();\n    }\n    if (span",
        "    }\n    if (span",
        "race",
    ),
    Mutation("wrong_twiddle", _CUDA + "prepare.h", "(16 * j2 + j3), 4 * n)", "(16 * j3 + j2), 4 * n)", "plain"),
    Mutation("twiddle_not_conjugated", _CUDA + "two_factors.h", "pack_multiply<true>", "pack_multiply<false>", "plain"),
    Mutation("no_quarter_bin", _CUDA + "prepare.h", "c * root(-i, 4 * p.n)", "c * root(0, 4 * p.n)", "plain"),
    Mutation("circular_sign", _CUDA + "prepare.h", "0.f : -tap(p, k, earlier)", "0.f : tap(p, k, earlier)", "plain"),
    Mutation("circular_lag_lost", _CUDA + "reduce.h", "if (p.circular && m > 0) sum -=", "if (false) sum -=", "plain"),
    Mutation("dropped_gate", _CUDA + "rows.h", "  if (!gate) return;\n", "  return;\n", "plain"),
    Mutation("spectrum_not_conjugated", _CUDA + "launch.cu", "conjugate ? w_.conj_spectrum :", "false ? 0 :", "plain"),
    Mutation(
        "correlation_not_conjugated",
        _CUDA + "filter_grad.h",
        "scale * (gi[i] * ur[i] - gr[i] * ui[i])",
        "scale * (gi[i] * ur[i] + gr[i] * ui[i])",
        "plain",
    ),
    Mutation("surplus_phase", _CUDA + "filter_grad.h", "4 * k1 - 1) / (8 * N1)", "4 * k1 - 1) / (4 * N1)", "plain"),
    Mutation("lost_partials", _CUDA + "reduce.h", "i < p.count; i++", "i < 1; i++", "plain"),
    Mutation(
        "tail_not_masked",
        _CUDA + "rows.h",
        "        if (offset < left) w[g].w[i / 2] |=",
        "        w[g].w[i / 2] |=",
        "plain",
    ),
]


def _compare(length, taps, causal, batch):
    generator = torch.Generator().manual_seed(length)
    row = lambda: torch.randn(batch, 1, length, generator=generator).half()  # noqa: E731
    k, skip = torch.randn(1, taps, generator=generator) * taps**-0.5, torch.randn(1, generator=generator)
    leaves = [row(), k, row(), row(), skip]
    dy = row()

    def run(function, tensors):
        u, k, pregate, postgate, skip = tensors = [t.clone().requires_grad_() for t in tensors]
        y = function(u, k, causal=causal, pregate=pregate, postgate=postgate, skip=skip)
        return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]

    # the mutated library is built without fp32 rows, and for 256 and 4096 points only
    for got, exact in zip(run(tw.fft_conv, leaves), run(reference, [t.double() for t in leaves]), strict=True):
        error = (got.double() - exact).norm() / exact.norm()
        assert error <= 5e-3, f"relative L2 {error:.2e}"


def check():
    _compare(256, 256, True, 5)
    _compare(203, 203, False, 3)
    _compare(4096, 100, True, 2)
