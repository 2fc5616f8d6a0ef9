"""Optimizers with quantised states in plain torch; runs in the dtype of its arguments (the tests pass float64)."""

import torch

BLOCK, BLOCK8 = 128, 256
_DYNAMIC_EXPONENT = [0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1]
_POSITIVE = torch.tensor([round(x * 2**23) / 2**23 for x in _DYNAMIC_EXPONENT], dtype=torch.float64)
SIGNED_CODES = torch.cat([-_POSITIVE[1:8].flip(0), _POSITIVE])
UNSIGNED_CODES = (torch.arange(1, 17, dtype=torch.float64) / 16) ** 4
SIGNED_FLOOR, UNSIGNED_FLOOR, FLOOR8 = 2.0**-78, 2.0**-86, 2.0**-76


def _ordinals8(signed):
    """The 8-bit magnitudes in ascending order, as (numerator, unit): decades of 2^i or 2^(i+1) even parts, 0 and 1."""
    entries = [(0.0, 0.0)]
    for i in range(7):
        parts = 2 ** (i if signed else i + 1)
        entries += [(18.0 * n + 9 - 16 * parts, 5.0 ** (i - 7) / (256 * parts / 2**i)) for n in range(parts, 2 * parts)]
    return torch.tensor([*entries, (1.0, 1.0)], dtype=torch.float64)


# In units of 1 / _UNITS8 all magnitudes are even integers, so that midpoints are integers too.
_UNITS8 = 80_000_000
_ORDINALS8 = {signed: _ordinals8(signed) for signed in (True, False)}
_INTEGERS8 = {signed: (_UNITS8 * t.prod(1)).round() for signed, t in _ORDINALS8.items()}


def codes8(signed):
    """(numerators, units) of the 256 codes: a code's value is their product."""
    numerators, units = _ORDINALS8[signed].unbind(1)
    if signed:
        return torch.cat([-numerators[1:128].flip(0), numerators]), torch.cat([units[1:128].flip(0), units])
    return numerators, units


def midpoints8(signed):
    """Exact ones of the magnitudes, times _UNITS8."""
    return (_INTEGERS8[signed][1:] + _INTEGERS8[signed][:-1]) / 2


def nearest8(values, scales, signed):
    """8-bit codes by comparison with every midpoint; the products are exact in float64 and a tie stays below."""
    magnitudes = (_UNITS8 * values.double().abs())[..., None]
    ordinals = (magnitudes > midpoints8(signed) * scales.double()[:, None, None]).sum(-1)
    return torch.where(values < 0, 127 - ordinals, 127 + ordinals).clamp(min=0) if signed else ordinals


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


def blocks(values, size=BLOCK):
    padded = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % size))
    return padded.view(-1, size)


def quantize(values, signed, bits=4):
    """(code indices (B, 128), scales (B,)); with 8 bits (B, 256)."""
    x = torch.where(values.isfinite(), values, 0)
    x = blocks(x if signed else x.clamp(min=0), BLOCK if bits == 4 else BLOCK8)
    if bits == 8:
        scales = x.abs().amax(1).clamp(min=FLOOR8)
        return nearest8(x, scales, signed), scales
    scales = x.abs().amax(1).clamp(min=SIGNED_FLOOR if signed else UNSIGNED_FLOOR)
    return nearest(x, scales, signed), scales


def dequantize(indices, scales, shape, signed, bits=4):
    if bits == 8:
        numerators, units = (t.to(scales.dtype) for t in codes8(signed))
        values = numerators[indices] * (units[indices] * scales[:, None])
    else:
        values = (SIGNED_CODES if signed else UNSIGNED_CODES).to(scales.dtype)[indices] * scales[:, None]
    return values.flatten()[: shape.numel()].view(shape)


def adamw_step(p, g, m, v, step, *, lr, betas, eps, weight_decay, maximize=False):
    """New (p, m, v); ``step`` counts from 1. The moments are those before quantisation."""
    g = -g if maximize else g
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    denominator = (v / (1 - betas[1] ** step)).sqrt() + eps
    return p * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * m / denominator, m, v
