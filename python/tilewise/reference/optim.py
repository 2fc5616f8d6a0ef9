"""Optimizers with quantised states in plain torch; runs in the dtype of its arguments (the tests pass float64)."""

import torch

from tilewise.reference.philox import words as philox_words

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


def pack(indices):
    """Inverse of :func:`unpack`."""
    halves = indices.gather(1, _element_order().flatten().expand_as(indices)).view(-1, 64, 2)
    return (halves[..., 0] | halves[..., 1] << 4).to(torch.uint8)


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


# ---- one step ----


def step(o, p, g, m, v, t):
    """New (p, m, v); ``t`` counts from 1. The moments are those before quantisation; None where the rule keeps none.

    ``o`` has the numbers of the rule by name, as tilewise.optim.step.Options has: rule, lr, beta1, beta2, ...
    A second moment that is factored is passed as ``v`` already averaged: a function of nothing, ``lambda: v``.
    """
    g = effective_gradient(o, p, g)
    p = p * (1 - o.lr * o.weight_decay) if o.decoupled_weight_decay else p
    if v is not None:
        v = v() if callable(v) else average_squares(o, v, g)
    update, m = _UPDATES[o.rule](o, g, m, v, t)
    return p - update, m, v


def effective_gradient(o, p, g):
    g = -g if o.maximize else g
    return g if o.decoupled_weight_decay or not o.weight_decay else g + o.weight_decay * p


def average_squares(o, v, g):
    return v + g * g if o.rule == "adagrad" else o.beta2 * v + (1 - o.beta2) * g * g


def _adam(o, g, m, v, t):
    m = o.beta1 * m + (1 - o.beta1) * g
    denominator = (v / (1 - o.beta2**t)).sqrt() + o.eps
    return o.lr / (1 - o.beta1**t) * m / denominator, m


def _sgd(o, g, m, v, t):
    if m is None:
        return o.lr * g, None
    m = g if t == 1 else o.beta1 * m + (1 - o.dampening) * g
    return o.lr * (g + o.beta1 * m if o.nesterov else m), m


def _lion(o, g, m, v, t):
    between = o.beta1 * m + (1 - o.beta1) * g
    sign = torch.where(between.isnan(), between, between.sign())  # torch's sign of NaN is 0, which would hide it
    return o.lr * sign, o.beta2 * m + (1 - o.beta2) * g


def _rmsprop(o, g, m, v, t):
    u = g / (v.sqrt() + o.eps)
    if m is None:
        return o.lr * u, None
    m = o.beta1 * m + u
    return o.lr * m, m


def _adagrad(o, g, m, v, t):
    return o.lr / (1 + (t - 1) * o.lr_decay) * g / (v.sqrt() + o.eps), None


_UPDATES = {"adam": _adam, "sgd": _sgd, "lion": _lion, "rmsprop": _rmsprop, "adagrad": _adagrad}


# ---- second moments that rows and columns share ----


def structured_scales(scales, rows, shape):
    """The scale of every element of a rank-1 moment: the smaller of its row's and its column's."""
    by_row, by_column = scales[:rows, None], scales[None, rows:]
    return torch.minimum(by_row, by_column).clamp(min=UNSIGNED_FLOOR).reshape(shape)


def rank1_scales(v, rows):
    """float32 (rows + columns): the largest v of each row, then of each column; what is not finite counts as zero."""
    v = torch.where(v.isfinite(), v, 0).reshape(rows, -1)
    return torch.cat([v.amax(1), v.amax(0)])


def dequantize_rank1(indices, scales, rows, shape):
    book = UNSIGNED_CODES.to(scales.dtype)
    return book[indices.flatten()[: shape.numel()]].view(shape) * structured_scales(scales, rows, shape)


def quantize_rank1(v, scales, rows):
    """Code indices (B, 128) of v under its new scales."""
    scales = structured_scales(scales, rows, v.shape)
    v = torch.where(v.isfinite(), v, 0).clamp(min=0)
    # one element per row of `nearest`, as every one has a scale of its own
    indices = nearest(v.reshape(-1, 1), scales.flatten(), signed=False)
    return blocks(indices.flatten())


def factored_scales(o, scales, g, rows):
    """New moving averages of the mean g^2 of each row, then of each column."""
    square = torch.where((g * g).isfinite(), g * g, 0).reshape(rows, -1)
    mean = torch.cat([square.mean(1), square.mean(0)])
    return scales + mean if o.rule == "adagrad" else o.beta2 * scales + (1 - o.beta2) * mean


def factored_moment(scales, rows, shape):
    by_row, by_column = scales[:rows, None], scales[None, rows:]
    mean = by_row.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (by_row / mean * by_column).reshape(shape)


# ---- 16-bit parameters ----


def split_master(master):
    """A float32 tensor as (bfloat16, int16): bits = (bits of the bfloat16 << 16) + residual."""
    bits = master.view(torch.int32).long() & 0xFFFFFFFF
    high = ((bits + 0x8000) >> 16).where(~master.isnan(), 0x7FC0)
    residual = (bits - (high << 16)).where(~master.isnan(), 0)
    return _signed16(high).view(torch.bfloat16), _signed16(residual)


def join_master(param, residual):
    bits = (param.view(torch.int16).long() << 16) + residual
    return (bits & 0xFFFFFFFF).sub(((bits >> 31) & 1) << 32).int().view(torch.float32)


def _signed16(x):
    x = x & 0xFFFF
    return (x - ((x >> 15) << 16)).to(torch.int16)


def random_bits(n, seed, stream, t):
    """The 16 random bits of each of n elements under stochastic rounding at step t."""
    group = torch.arange((n + 7) // 8)
    counter = group & 0xFFFFFFFF, group >> 32, torch.full_like(group, t), torch.zeros_like(group)
    words = philox_words(counter, (seed & 0xFFFFFFFF, stream))
    return torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1).flatten()[:n]


def round_stochastically(x, random, dtype):
    """float32 -> bfloat16 or float16: up or down, such that the mean is x; ``random`` holds 16 bits per element."""
    random = random.view(x.shape)
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    if dtype is torch.bfloat16:
        rounded = _signed16((bits + random) >> 16).view(torch.bfloat16)
        return torch.where(x.isfinite(), rounded, x.to(dtype))
    normal = (((bits & 0x7FFFFFFF) + (random >> 3)) & 0x7FFFE000).int().view(torch.float32)
    subnormal = (x.abs() * 2.0**24 + random.float() / 65536).floor() / 2.0**24
    rounded = torch.where(x.abs() < 2.0**-14, subnormal, normal).copysign(x).to(dtype)
    return torch.where(x.abs() < 65504, rounded, x.to(dtype))
