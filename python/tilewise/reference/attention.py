"""Attention in plain torch, in the dtype of its inputs."""

import math

import torch


def attention(q, k, v, *, causal=False, scale=None):
    """(out, lse); shapes as in :func:`tilewise.attention`."""
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        queries, keys = scores.shape[-2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1)
    blind = lse == -math.inf  # rows with nothing to attend to: 0, not 0 / 0
    weights = scores.masked_fill(blind[..., None], 0).softmax(-1).masked_fill(blind[..., None], 0)
    return weights @ v, lse


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *, causal=False, scale=None):
    """(out, lse); shapes as in :func:`tilewise.attention_varlen`."""
    out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[1], q.shape[0])
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [out[:0]], [lse[:, :0]]
    for b in range(len(starts_q) - 1):
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        heads_first = (t.transpose(0, 1)[None] for t in (q[rows_q], k[rows_k], v[rows_k]))
        o, l = attention(*heads_first, causal=causal, scale=scale)
        outs.append(o[0].transpose(0, 1))
        lses.append(l[0])
    return torch.cat(outs), torch.cat(lses, 1)
