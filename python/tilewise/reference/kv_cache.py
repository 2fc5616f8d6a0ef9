"""Quantised rows of a KV cache in plain torch: what the bytes mean, and the nearest codes."""

import torch

BITS = {"int8": 8, "int4": 4, "int2": 2}


def unpack(rows, bits, dim):
    """Codes (..., dim) of bytes, two's complement: byte j of a group of 16 holds the group's channels j, 16 + j, ...,
    from its low bits on."""
    fields = 8 // bits
    groups = -(-dim // (16 * fields))
    code_bytes = rows[..., : 16 * groups].reshape(*rows.shape[:-1], groups, 1, 16).int()
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=rows.device)[:, None]
    codes = (code_bytes >> shifts & (1 << bits) - 1).flatten(-3)[..., :dim]
    return (codes ^ (1 << bits - 1)) - (1 << bits - 1)


def scale_and_zero(rows, bits, dim):
    """float32 (..., 1) each."""
    at = -(-dim // (16 * (8 // bits))) * 16
    pair = rows[..., at : at + 4].contiguous().view(torch.bfloat16).float()
    return pair[..., :1], pair[..., 1:]


def exponents(rows, dim):
    """uint8 (..., dim), each channel's."""
    blocks = -(-dim // 32)
    return rows[..., 16 * blocks : 17 * blocks].repeat_interleave(32, -1)[..., :dim]


def dequantize(rows, format, dim, channels=None):
    """float64 (..., heads, dim) of uint8 (..., heads, row bytes)."""
    if format == "bfp12":
        found = exponents(rows, dim)
        values = unpack(rows, 4, dim).double() * torch.exp2(found.double() - 130)
        return values.masked_fill(found == 255, torch.nan)
    scale, zero = scale_and_zero(rows, BITS[format], dim)
    values = unpack(rows, BITS[format], dim) * scale.double() + zero.double()
    return values if channels is None else values * channels.double()


def rotate(x, cos, sin, interleaved=False):
    """x (..., S, D) by angles (..., S, R / 2)."""
    rotary = 2 * cos.shape[-1]
    head, rest = x[..., :rotary], x[..., rotary:]
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    head = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([head, rest], -1)


def channel_order(k, rotary_dim=0, interleaved=False):
    """int64 (Hkv, D): each head's channels of k (B, Hkv, S, D), largest norm first, those that turn in pairs."""
    half, dim = rotary_dim // 2, k.shape[-1]
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    orders = []
    for head in k.double().transpose(0, 1).flatten(1, 2):
        norm = lambda channels: -float(head[:, list(channels)].norm())  # noqa: B023, E731
        turning = sorted(pairs, key=norm)
        turning = (
            [c for pair in turning for c in pair]
            if interleaved
            else [*(a for a, _ in turning), *(b for _, b in turning)]
        )
        orders.append([*turning, *sorted(range(rotary_dim, dim), key=lambda c: norm([c]))])
    return torch.tensor(orders)
