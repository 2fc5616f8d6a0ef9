"""The Lambda-shaped mask with clamped distances: rotary attention beyond the lengths of training."""

import torch

from tilewise import rope
from tilewise._library import check_tensors
from tilewise.attention.dense import attention
from tilewise.attention.merge import merge_attention


def lm_infinite_attention(
    q, k, v, *, window, global_tokens, theta=10000.0, dim=None, interleaved=False, scale=None, return_lse=False
):
    """Causal attention to the last ``window`` keys and to the first ``global_tokens``, at clamped rotary distances.

    Query i sees key j if i - j < window, or if j < global_tokens; its distance to a global token beyond the window
    counts as ``window`` (Han et al., LM-Infinite, arXiv:2308.16137). Two calls of :func:`tilewise.attention`, joined:
    keys within the window at their own distances; global tokens beyond it unrotated, the queries all rotated by
    ``window``. Differentiable.

    Args:
        q: (B, Hq, S, D) and k: (B, Hkv, Sk, D), both before rotation; the last query stands at the last key.
        v: (B, Hkv, Sk, Dv).
        window: how many keys a query sees, itself included; at least 1.
        global_tokens: from 0.
        theta, dim, interleaved: as in :func:`tilewise.rope.apply`.
        scale: default ``1 / sqrt(D)``.
        return_lse: also return lse (B, Hq, S).

    Returns:
        out (B, Hq, S, Dv), or (out, lse).

    Raises:
        ValueError: a window below 1 or negative global_tokens; otherwise as :func:`tilewise.attention`.
    """
    operation = "lm_infinite_attention"
    check_tensors(operation, q=q, k=k, v=v)
    for name, value, least in (("window", window, 1), ("global_tokens", global_tokens, 0)):
        if value < least:
            raise ValueError(f"{operation}: {name} is {value}, expected at least {least}")
    options = {"theta": theta, "dim": dim, "interleaved": interleaved}
    keys = torch.arange(k.shape[2], device=k.device)
    queries = keys[k.shape[2] - q.shape[2] :]
    rotated = (rope.apply(q, queries, **options), rope.apply(k, keys, **options))
    near = attention(*rotated, v, causal=True, window=(window - 1, None), scale=scale, return_lse=True)
    seen = min(global_tokens, k.shape[2])
    beyond = queries[:, None] - keys[:seen] >= window
    clamped = rope.apply(q, torch.full_like(queries, window), **options)
    far = attention(clamped, k[:, :, :seen], v[:, :, :seen], mask=beyond, scale=scale, return_lse=True)
    out, lse = merge_attention(*zip(near, far, strict=True))
    return (out, lse) if return_lse else out
