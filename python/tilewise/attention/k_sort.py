"""Channels of keys in order of their size, so that blocks with an exponent in common have channels of one size.

Trukhanov and Soloveychik, Accurate Block Quantization in LLMs with Outliers, arXiv:2403.20137: K-sort. Scores are sums
over channels, so any order will do that keys and queries share.
"""

import torch

from tilewise._library import check_tensors


def channel_order(k, *, rotary_dim=0, interleaved=False):
    """The channels of each head of (B, Hkv, S, D), largest norm first: int64 (Hkv, D).

    Of the first ``rotary_dim`` channels pairs that turn together, (i, i + rotary_dim / 2) or if ``interleaved``
    (2 i, 2 i + 1), stay pairs, and are ordered by their norm; the channels behind follow among themselves.
    """
    check_tensors("channel_order", k=k)
    if not 0 <= rotary_dim <= k.shape[-1] or rotary_dim % 2:
        raise ValueError(f"channel_order: rotary_dim is {rotary_dim}, expected an even number to {k.shape[-1]}")
    squares = k.detach().float().square().sum((0, 2))  # [hkv, d]
    pairs = squares[:, :rotary_dim].unflatten(1, (-1, 2) if interleaved else (2, -1)).sum(2 if interleaved else 1)
    of_pairs = pairs.argsort(dim=1, descending=True, stable=True)
    first, second = (2 * of_pairs, 2 * of_pairs + 1) if interleaved else (of_pairs, of_pairs + rotary_dim // 2)
    turning = torch.stack([first, second], 2).flatten(1) if interleaved else torch.cat([first, second], 1)
    others = squares[:, rotary_dim:].argsort(dim=1, descending=True, stable=True) + rotary_dim
    return torch.cat([turning, others], 1)


def sort_channels(x, order):
    """x (B, H, S, D) with the channels of each head in the order (Hkv, D) of its key head; None: as they are.

    Nonsense stays as it is: the core reports it.
    """
    if order is None or x.ndim != 4 or x.shape[3] != order.shape[1] or x.shape[1] % len(order):
        return x
    of_heads = order.repeat_interleave(x.shape[1] // len(order), 0)
    return x.gather(3, of_heads[None, :, None].expand(x.shape))


def pairs_of(operation, order, rotary, interleaved):
    """The pairs (Hkv, R / 2) that stand at the places 0, 1, ... of the first ``rotary`` channels of an order."""
    turning = order[:, :rotary]
    first, second = turning.unflatten(1, (-1, 2) if interleaved else (2, -1)).unbind(2 if interleaved else 1)
    pairs, partner = (first // 2, first + 1) if interleaved else (first, first + rotary // 2)
    kept = (second == partner).all() and (turning < rotary).all() and (not interleaved or (first % 2 == 0).all())
    if not kept:
        how = "(2 i, 2 i + 1)" if interleaved else f"(i, i + {rotary // 2})"
        raise ValueError(
            f"{operation}: k_order takes pairs {how} of the first {rotary} channels apart, expected it not to"
        )
    return pairs


def expect_order(operation, order, heads, dim):
    """int64 on the host, for looking at."""
    check_tensors(operation, k_order=order)
    if order.shape != (heads, dim):
        raise ValueError(f"{operation}: k_order has shape {tuple(order.shape)}, expected {(heads, dim)}")
    if order.is_floating_point() or order.dtype == torch.bool:
        raise TypeError(f"{operation}: k_order has dtype {order.dtype}, expected integers")
    host = order.cpu().long()
    if not torch.equal(host.sort(1).values, torch.arange(dim, device="cpu").expand(heads, dim)):
        raise ValueError(
            f"{operation}: k_order has rows that are not permutations, expected each of 0 to {dim - 1} once"
        )
    return host
