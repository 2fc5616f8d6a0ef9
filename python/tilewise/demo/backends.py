"""The two ways in which the demo computes the same model: plain torch, and tilewise."""

import torch
import torch.nn.functional as F
from torch import nn

import tilewise as tw


def two_four_mask(weight: torch.Tensor) -> torch.Tensor:
    """True for the two largest magnitudes of every four consecutive weights along the input dimension."""
    groups = weight.abs().view(weight.shape[0], -1, 4)
    keep = groups.topk(2, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, keep, True).view_as(weight)


class MaskedLinear(nn.Module):
    """2:4 sparsity in plain torch: a dense weight under a fixed mask."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("mask", two_four_mask(weight))

    def forward(self, x):
        return F.linear(x, self.weight * self.mask)


class SparseLinear(nn.Module):
    """2:4 sparsity in tilewise: only the kept values exist, and only they are trained."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.compressed = tw.NMSparse.from_dense(weight, 2, 4)
        self.values = nn.Parameter(self.compressed.values)
        self.compressed.values = self.values

    def forward(self, x):
        return tw.linear(x, self.compressed)


class Torch:
    name = "torch"
    sparse_linear = MaskedLinear

    @staticmethod
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @staticmethod
    def long_conv(u, k, pregate, postgate, skip):
        """postgate * (k conv (pregate * u) + skip * (pregate * u)), by real FFTs of twice the length."""
        gated, length = pregate * u, u.shape[-1]
        spectrum = torch.fft.rfft(gated, 2 * length) * torch.fft.rfft(k, 2 * length)
        return postgate * (torch.fft.irfft(spectrum, 2 * length)[..., :length] + skip[:, None] * gated)

    @staticmethod
    def optimizer(parameters, **options):
        return torch.optim.AdamW(parameters, fused=True, **options)


class Tilewise:
    name = "tilewise"
    sparse_linear = SparseLinear

    @staticmethod
    def attention(q, k, v):
        return tw.attention(q, k, v, causal=True)

    @staticmethod
    def long_conv(u, k, pregate, postgate, skip):
        return tw.fft_conv(u, k, pregate=pregate, postgate=postgate, skip=skip)

    @staticmethod
    def optimizer(parameters, **options):
        return tw.optim.AdamW(parameters, state_bits=4, **options)
