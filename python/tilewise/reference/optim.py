"""Optimizers with quantised states in plain torch; runs in the dtype of its arguments (the tests pass float64)."""

import torch

BLOCK = 128
_DYNAMIC_EXPONENT = [0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1]
_POSITIVE = torch.tensor([round(x * 2**23) / 2**23 for x in _DYNAMIC_EXPONENT], dtype=torch.float64)
SIGNED_CODES = torch.cat([-_POSITIVE[1:8].flip(0), _POSITIVE])
UNSIGNED_CODES = (torch.arange(1, 17, dtype=torch.float64) / 16) ** 4
SIGNED_FLOOR, UNSIGNED_FLOOR = 2.0**-78, 2.0**-86


def _element_order():
    """position[byte, half] of a block's codes: the element that stands there."""
    word, k, half = torch.arange(16), torch.arange(4), torch.arange(2)
    return (64 * half + 16 * k[:, None] + word[:, None, None]).reshape(64, 2)


def unpack(codes):
    """uint8 (B, 64) -> code indices (B, 128) in the order of the elements."""
    halves = torch.stack([codes & 15, codes >> 4], -1).long().flatten(1)
    return torch.empty_like(halves).scatter_(1, _element_order().flatten().expand_as(halves), halves)


def nearest(values, scales, signed):
    """Code indices by exhaustive search in float64; the first of equals when codes are ordered by magnitude."""
    book = SIGNED_CODES if signed else UNSIGNED_CODES
    by_magnitude = book.abs().argsort(stable=True)
    distance = (values.double()[..., None] - book[by_magnitude] * scales.double()[:, None, None]).abs()
    return by_magnitude[distance.argmin(-1)]


def blocks(values):
    padded = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK))
    return padded.view(-1, BLOCK)


def quantize(values, signed):
    """(code indices (B, 128), scales (B,))."""
    x = torch.where(values.isfinite(), values, 0)
    x = blocks(x if signed else x.clamp(min=0))
    scales = x.abs().amax(1).clamp(min=SIGNED_FLOOR if signed else UNSIGNED_FLOOR)
    return nearest(x, scales, signed), scales


def dequantize(indices, scales, shape, signed):
    book = (SIGNED_CODES if signed else UNSIGNED_CODES).to(scales.dtype)
    values = book[indices] * scales[:, None]
    return values.flatten()[: shape.numel()].view(shape)


def adamw_step(p, g, m, v, step, *, lr, betas, eps, weight_decay, maximize=False):
    """New (p, m, v); ``step`` counts from 1. The moments are those before quantisation."""
    g = -g if maximize else g
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    denominator = (v / (1 - betas[1] ** step)).sqrt() + eps
    return p * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * m / denominator, m, v
