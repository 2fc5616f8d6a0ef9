"""Attention in plain torch, in the dtype of its inputs."""

import math
from dataclasses import replace

import torch

from tilewise.reference import philox


def _distance(queries, keys, device):
    """How far key j stands behind the diagonal of query i."""
    return torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - (keys - queries)


def visible(queries, keys, *, causal=False, window=None, global_tokens=0, device=None):
    """bool (queries, keys): what causality and windows leave."""
    distance = _distance(queries, keys, device)
    left, right = window or (None, None)
    right = 0 if causal else right
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left is not None:
        seen &= (distance >= -left) | (torch.arange(keys, device=device) < global_tokens)
    return seen if right is None else seen & (distance <= right)


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    scale=None,
    window=None,
    global_tokens=0,
    softcap=0.0,
    alibi_slopes=None,
    bias=None,
    mask=None,
    block_mask=None,
    sink_logits=None,
    dropout_p=0.0,
    dropout_seed=0,
    first_sequence=0,
):
    """(out, lse); shapes as in :func:`tilewise.attention`.

    ``first_sequence`` is the place of the first of the batch among all that share the dropout's random numbers.
    """
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    queries, keys = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores)
    if alibi_slopes is not None:
        distance = _distance(queries, keys, q.device)
        slopes = alibi_slopes.reshape(-1, q.shape[1], 1, 1).to(scores)
        scores = scores - slopes * distance.abs().to(scores)
    seen = visible(queries, keys, causal=causal, window=window, global_tokens=global_tokens, device=q.device)
    if mask is not None:
        seen = seen & mask
    if block_mask is not None:
        seen = seen & block_mask.dense(queries, keys)
    scores = scores.masked_fill(~seen, -math.inf)
    if sink_logits is not None:
        sink = sink_logits[:, None, None].expand(*scores.shape[:-1], 1).to(scores)
        scores = torch.cat([scores, sink], -1)
    factors = None
    if dropout_p:
        batch, heads = q.shape[:2]
        kept = philox.keep(dropout_seed, dropout_p, first_sequence + batch, heads, queries, keys)[first_sequence:]
        factors = kept.to(v) / (1 - round(65536 * dropout_p) / 65536)
    return attend(scores, v, factors)


def attend(scores, v, factors=None):
    """(out, lse) of scores that may have a column more than v has rows, times ``factors`` on the weights, if any."""
    blind = (scores == -math.inf).all(-1)  # rows with nothing to attend to: 0, not 0 / 0
    scores = scores.masked_fill(blind[..., None], 0)
    lse = scores.logsumexp(-1).masked_fill(blind, -math.inf) if scores.shape[-1] else scores.sum(-1) - math.inf
    weights = scores.softmax(-1).masked_fill(blind[..., None], 0)[..., : v.shape[-2]]
    return (weights if factors is None else weights * factors) @ v, lse


def _of_sequence(name, option, b, queries, keys):
    """What an option of a packed call says about sequence ``b``."""
    if name == "block_mask":
        block_q, block_k = option.sizes
        blocks = _of_sequence("blocks", option.blocks, b, -(-queries // block_q), -(-keys // block_k))
        return replace(option, blocks=blocks)
    if name == "alibi_slopes" and option.ndim == 2:
        return option[b]
    if name not in ("bias", "mask", "blocks"):
        return option
    option = option[(None,) * (4 - option.ndim)]
    for dim, part in ((0, slice(b, b + 1)), (2, slice(queries)), (3, slice(keys))):
        if option.shape[dim] > 1:
            option = option[(slice(None),) * dim + (part,)]
    return option


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *, causal=False, scale=None, **options):
    """(out, lse); shapes as in :func:`tilewise.attention_varlen`."""
    out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[1], q.shape[0])
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [out[:0]], [lse[:, :0]]
    for b in range(len(starts_q) - 1):
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        heads_first = (t.transpose(0, 1)[None] for t in (q[rows_q], k[rows_k], v[rows_k]))
        lengths = starts_q[b + 1] - starts_q[b], starts_k[b + 1] - starts_k[b]
        own = {name: _of_sequence(name, option, b, *lengths) for name, option in options.items() if option is not None}
        if own.get("dropout_p"):
            own["first_sequence"] = b
        o, l = attention(*heads_first, causal=causal, scale=scale, **own)
        outs.append(o[0].transpose(0, 1))
        lses.append(l[0])
    return torch.cat(outs), torch.cat(lses, 1)


def paged_attention(q, k_pages, v_pages, block_table, seq_lens, *, window=None, causal=True, **options):
    """(out, lse); shapes as in :func:`tilewise.paged_attention`."""
    outs, lses = [q[:0]], [q[:0, ..., 0]]
    for b, length in enumerate(seq_lens.tolist()):
        rows = (pages[block_table[b].long()].flatten(0, 1)[:length] for pages in (k_pages, v_pages))
        k, v = (t.transpose(0, 1)[None] for t in rows)
        out, lse = attention(q[b : b + 1], k, v, window=window, causal=causal, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)
