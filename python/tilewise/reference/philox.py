"""Random bits in plain torch: Philox4x32-10 (Salmon et al., 2011)."""

import torch

_MASK = 0xFFFFFFFF


def words(counter, key):
    """The four output words of Philox4x32-10; ``counter`` are four int64 tensors, ``key`` two numbers, of 32 bits."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        # 32 x 32 bits do not fit a signed 64-bit product: the multiplicand goes in two halves
        high_a, low_a = _product(a, 0xD2511F53)
        high_c, low_c = _product(c, 0xCD9E8D57)
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return a, b, c, d


def _product(x, multiplier):
    low, high = (x & 0xFFFF) * multiplier, (x >> 16) * multiplier
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & _MASK


def keep(seed, dropout_p, batch, heads, queries, keys):
    """bool (batch, heads, queries, keys): which weights dropout keeps; ``seed`` is a 64-bit number."""
    groups = (keys + 7) // 8
    grid = torch.meshgrid(*(torch.arange(n) for n in (batch * heads, queries, groups)), indexing="ij")
    head, query, group = grid
    four = words((group, query, head, torch.zeros_like(group)), (seed & _MASK, seed >> 32 & _MASK))
    bits = torch.stack([half for word in four for half in (word & 0xFFFF, word >> 16)], -1).flatten(-2)
    return (bits[..., :keys] >= round(65536 * dropout_p)).view(batch, heads, queries, keys)
