"""Which blocks of keys are worth reading: builders of :class:`tilewise.BlockMask` for :func:`tilewise.attention`.

    mask = vertical_slash(q, k, vertical=1000, slash=4000)
    out = attention(q, k, v, causal=True, block_mask=mask)

All are plain torch on q's device in O(S D) memory plus the blocks; no S x Sk matrix is stored. Shapes: B batch, Hq and
Hkv heads, S queries, Sk keys, D head dim; blocks of bq queries and bk keys, each a multiple of 16 from 16 to 128; the
diagonal of query i is key ``i + Sk - S``. With ``causal``, blocks that the diagonal crosses are always kept, so every
query sees at least its own key, and blocks beyond it never are.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tilewise._library import check_tensors
from tilewise.attention import BlockMask

__all__ = ["lambda_mask", "seer_gate", "seer_scores", "segment_criticality", "vertical_slash"]


def lambda_mask(queries, keys, *, window, global_tokens=0, block_size=64, causal=True, device=None) -> BlockMask:
    """The blocks that a Lambda-shaped mask touches: the last ``window`` keys before a query, and the first keys.

    Whole blocks are kept, so a query sees up to a block more than the window. ``attention(..., window=(window, 0),
    global_tokens=n)`` draws the same shape exactly and skips the same blocks (Han et al., LM-Infinite,
    arXiv:2308.16137); this form is for combining it with another block mask.

    Args:
        queries, keys: S and Sk.
        window: keys before its diagonal that a query sees; without ``causal``, those behind it all are.
        global_tokens: the first keys, which every query sees.
        block_size: (bq, bk), or one number for both.
        device: of the result.

    Returns:
        A BlockMask of (1, 1, ceil(S / bq), ceil(Sk / bk)).

    Raises:
        ValueError: a negative number, or a block size that is not served.
    """
    for name, value in {"queries": queries, "keys": keys, "window": window, "global_tokens": global_tokens}.items():
        _expect("lambda_mask", name, value, value >= 0, "at least 0")
    grid = _Grid(queries, keys, *_sizes("lambda_mask", block_size), device)
    near = grid.key_last >= grid.first[:, None] - window
    kept = (near | (grid.key_first < global_tokens)) & grid.visible(causal)
    return BlockMask(kept[None, None], block_size)


def seer_scores(q, k, wq, wk, *, block_size, causal=True, rope=None) -> torch.Tensor:
    """The gate of SeerAttention (Gao et al., arXiv:2410.13276): how much a block of queries attends to one of keys.

        pooled = [max, min, mean of the block]      (3D)
        score  = softmax over blocks of rope(pooled(q) wq) . rope(pooled(k) wk) / sqrt(Dg)

    Differentiable in wq and wk (and q, k): they are trained towards the largest attention weight of each block, which
    ``tilewise.attention_block_max`` gives without an S x Sk matrix.

    Args:
        q: (B, Hq, S, D); k: (B, Hkv, Sk, D), before RoPE where ``rope`` is given.
        wq: (3D, Dg) or one per head (Hq, 3D, Dg); wk: (3D, Dg) or (Hkv, 3D, Dg). The scores have their dtype.
        block_size: (bq, bk), or one number for both.
        causal: the softmax runs over the blocks that a block of queries sees.
        rope: f(x (B, H, blocks, Dg), positions int64 (blocks,)) -> x; positions are those of the blocks' first tokens,
            queries counting from ``Sk - S``.

    Returns:
        (B, Hq, ceil(S / bq), ceil(Sk / bk)); rows sum to 1, or are 0 where nothing is seen.

    Raises:
        ValueError: shapes that do not fit, or a block size that is not served.
        TypeError: arguments that are not tensors.
    """
    group = _check("seer_scores", q, k)
    check_tensors("seer_scores", wq=wq, wk=wk)
    sizes = _sizes("seer_scores", block_size)
    for name, weight, heads in (("wq", wq, q.shape[1]), ("wk", wk, k.shape[1])):
        _expect_weight(name, weight, heads, 3 * q.shape[3])
    _expect("seer_scores", "wk's last dimension", wk.shape[-1], wk.shape[-1] == wq.shape[-1], f"{wq.shape[-1]} (wq's)")
    grid = _Grid(q.shape[2], k.shape[2], *sizes, q.device)
    gate_q = _pool(q, sizes[0]).to(wq.dtype) @ wq
    gate_k = _pool(k, sizes[1]).to(wk.dtype) @ wk
    if rope is not None:
        gate_q, gate_k = rope(gate_q, grid.first), rope(gate_k, grid.key_first)
    logits = _grouped_scores(gate_q, gate_k, group) / wq.shape[-1] ** 0.5
    return _softmax(logits, grid.visible(causal))


def seer_gate(q, k, wq, wk, *, block_size, threshold=None, top_k=None, causal=True, rope=None) -> BlockMask:
    """The blocks that SeerAttention's gate opens: those of :func:`seer_scores` from ``threshold`` on, or the best.

    Args:
        threshold: keep the blocks whose score is at least this; or
        top_k: keep so many blocks of keys per block of queries, the diagonal ones first. Exactly one of the two.
        q, k, wq, wk, block_size, causal, rope: as in :func:`seer_scores`.

    Returns:
        A BlockMask of (B, Hq, ceil(S / bq), ceil(Sk / bk)).

    Raises:
        ValueError, TypeError: as :func:`seer_scores`; both or neither of threshold and top_k, or one that is out of
            range.
    """
    if (threshold is None) == (top_k is None):
        raise ValueError(f"seer_gate: threshold is {threshold} and top_k is {top_k}, expected exactly one of them")
    if top_k is not None:
        _expect("seer_gate", "top_k", top_k, top_k >= 1, "at least 1")
    else:
        _expect("seer_gate", "threshold", threshold, not math.isnan(threshold), "a number")
    with torch.no_grad():
        scores = seer_scores(q, k, wq, wk, block_size=block_size, causal=causal, rope=rope)
    grid = _Grid(q.shape[2], k.shape[2], *_sizes("seer_gate", block_size), q.device)
    visible, diagonal = grid.visible(causal), grid.diagonal(causal)
    if threshold is not None:
        kept = (scores >= threshold) & visible | diagonal
    else:
        kept = _best(scores.masked_fill(diagonal, torch.inf), visible, top_k) | diagonal
    return BlockMask(kept, block_size)


@torch.no_grad()
def vertical_slash(q, k, *, vertical, slash, last=64, block_size=64, causal=True, scale=None) -> BlockMask:
    """The columns and diagonals that the last queries attend to most (Jiang et al., MInference, arXiv:2407.02490).

        A        = softmax(scale * q[-last:] k^T)
        columns  = the ``vertical`` keys j with the largest sum_i A[i, j]
        slashes  = the ``slash`` distances o with the largest sum_i A[i, diagonal(i) - o]

    kept are the blocks that hold a part of one of these, per batch and head.

    Args:
        q: (B, Hq, S, D); k: (B, Hkv, Sk, D).
        vertical, slash: how many columns and diagonals; all there are if there are fewer.
        last: how many queries at the end are looked at; their weights, last x Sk, are the largest thing stored.
        block_size: (bq, bk), or one number for both.
        scale: default ``1 / sqrt(D)``.

    Returns:
        A BlockMask of (B, Hq, ceil(S / bq), ceil(Sk / bk)).

    Raises:
        ValueError: shapes that do not fit, a negative number, a scale that is not finite, or a block size that is not
            served.
        TypeError: arguments that are not tensors.
    """
    group = _check("vertical_slash", q, k)
    for name, value, least in (("vertical", vertical, 0), ("slash", slash, 0), ("last", last, 1)):
        _expect("vertical_slash", name, value, value >= least, f"at least {least}")
    queries, keys = q.shape[2], k.shape[2]
    grid = _Grid(queries, keys, *_sizes("vertical_slash", block_size), q.device)
    last = min(last, queries)
    scale = _scale("vertical_slash", scale, q)
    logits = _grouped_scores(q[:, :, queries - last :], k, group).float() * scale
    seen = torch.ones(last, keys, dtype=torch.bool, device=q.device)
    weights = _softmax(logits, seen.tril(keys - last) if causal else seen)
    columns = _largest(weights.sum(2), vertical)
    distances = _diagonal_sums(weights)
    slashes = _largest(distances[..., :keys] if causal else distances, slash)
    key_last = torch.minimum(grid.key_last, grid.last[:, None]) if causal else grid.key_last[None]
    kept = _any_between(columns, grid.key_first, key_last)
    nearest, furthest = (keys - 1 - of_query[:, None] for of_query in (grid.last, grid.first))
    kept = kept | _any_between(slashes, nearest + grid.key_first, furthest + grid.key_last)
    return BlockMask(kept | grid.diagonal(causal), block_size)


def _diagonal_sums(weights):
    """Sums of the last rows' weights (B, H, rows, Sk) at one distance o from the diagonal: (B, H, Sk + rows - 1).

    They stand at Sk - 1 - o, where shifting each row by its number from the end puts them.
    """
    rows, keys = weights.shape[2:]
    width = max(keys + rows - 1, 0)
    shifted = F.pad(weights.flip(2), (0, rows)).flatten(2)[..., : rows * width]
    return shifted.unflatten(2, (rows, width)).sum(2)


@torch.no_grad()
def segment_criticality(
    q,
    k,
    *,
    segment=512,
    block_size=(128, 32),
    budget=2048,
    previous=None,
    causal=True,
    scale=None,
    return_scores=False,
):
    """The blocks of keys that matter to a whole segment of queries (Lv et al., CritiPrefill, arXiv:2409.12490).

    A segment is represented by the elementwise largest and smallest of its queries, a block by those of its keys::

        score = max(mean(q_max . k_max, q_min . k_max), mean(q_max . k_min, q_min . k_min))
        score = softmax over blocks before the segment of scale * score, averaged over the heads that share a key head
        score = 0.25 * previous + 0.75 * score              with the scores of the layer before

    kept are the best ``budget // bk`` blocks before the segment, and the segment's own.

    Args:
        q: (B, Hq, S, D); k: (B, Hkv, Sk, D).
        segment: queries that share a choice, a multiple of bq.
        block_size: (bq, bk), or one number for both.
        budget: keys before its own that a segment reads, at least bk.
        previous: (B, Hkv, ceil(S / segment), ceil(Sk / bk)), the scores of the layer before.
        causal: without it, all blocks are chosen from and a segment has none of its own.
        scale: of the softmax; default ``1 / sqrt(D)``. It matters beside ``previous`` only.
        return_scores: also return the scores, for the next layer's ``previous``.

    Returns:
        A BlockMask of (B, Hq, ceil(S / bq), ceil(Sk / bk)), or (mask, scores).

    Raises:
        ValueError: shapes that do not fit, a segment that is not a multiple of bq, a budget below bk, a scale that is
            not finite, or a block size that is not served.
        TypeError: arguments that are not tensors.
    """
    operation = "segment_criticality"
    group = _check(operation, q, k)
    check_tensors(operation, previous=previous)
    block_q, block_k = _sizes(operation, block_size)
    _expect(operation, "segment", segment, segment > 0 and segment % block_q == 0, f"a multiple of {block_q} (bq)")
    _expect(operation, "budget", budget, budget >= block_k, f"at least {block_k} (bk)")
    segments = _Grid(q.shape[2], k.shape[2], segment, block_k, q.device)
    scores = _criticality(q, k, segment, block_k, group) * _scale(operation, scale, q)
    own = segments.diagonal(causal)
    before = segments.visible(causal) & ~own
    scores = _softmax(scores, before)
    if previous is not None:
        fits = previous.shape == scores.shape
        _expect(operation, "previous' shape", tuple(previous.shape), fits, tuple(scores.shape))
        scores = 0.25 * previous + 0.75 * scores
    rows = _Grid(q.shape[2], k.shape[2], block_q, block_k, q.device)
    kept = _best(scores, before, budget // block_k) | own
    kept = kept.repeat_interleave(segment // block_q, 2)[:, :, : rows.first.numel()] & rows.visible(causal)
    mask = BlockMask(kept.repeat_interleave(group, 1), block_size)
    return (mask, scores) if return_scores else mask


def _criticality(q, k, segment, block_k, group):
    """(B, Hkv, segments, blocks) float32."""
    middle = (_reduce(q, segment, "amax") + _reduce(q, segment, "amin")).float() / 2
    score = lambda order: _grouped_scores(middle, _reduce(k, block_k, order).float(), group)  # noqa: E731
    return torch.maximum(score("amax"), score("amin")).unflatten(1, (k.shape[1], group)).mean(2)


@dataclass(frozen=True)
class _Grid:
    """S x Sk scores cut into blocks."""

    queries: int
    keys: int
    block_q: int
    block_k: int
    device: torch.device | None

    def _starts(self, length, block):
        return torch.arange(0, length, block, device=self.device)

    @property
    def first(self):
        """int64 (blocks of queries,): the diagonal of each one's first query."""
        return self._starts(self.queries, self.block_q) + self.keys - self.queries

    @property
    def last(self):
        return (self.first + self.block_q).clamp(max=self.keys) - 1

    @property
    def key_first(self):
        """int64 (blocks of keys,)."""
        return self._starts(self.keys, self.block_k)

    @property
    def key_last(self):
        return (self.key_first + self.block_k).clamp(max=self.keys) - 1

    def visible(self, causal):
        """bool (blocks of queries, blocks of keys)."""
        seen = self.key_first <= self.last[:, None]
        return seen if causal else torch.ones_like(seen)

    def diagonal(self, causal):
        """The blocks that the diagonal crosses; none without causality."""
        crossed = (self.key_first <= self.last[:, None]) & (self.key_last >= self.first[:, None])
        return crossed if causal else torch.zeros_like(crossed)


def _expect(operation, name, got, fits, expected):
    if not fits:
        raise ValueError(f"{operation}: {name} is {got}, expected {expected}")


def _expect_weight(name, weight, heads, inputs):
    fits = weight.shape[:-1] in ((inputs,), (heads, inputs))
    _expect("seer_scores", f"{name}'s shape", tuple(weight.shape), fits, f"({inputs}, Dg) or ({heads}, {inputs}, Dg)")


def _sizes(operation, block_size):
    sizes = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    served = len(sizes) == 2 and all(16 <= n <= 128 and n % 16 == 0 for n in sizes)
    _expect(operation, "block_size", block_size, served, "multiples of 16 from 16 to 128")
    return sizes


def _scale(operation, scale, q):
    scale = max(1, q.shape[3]) ** -0.5 if scale is None else scale
    _expect(operation, "scale", scale, math.isfinite(scale), "a finite number")
    return scale


def _check(operation, q, k):
    """How many query heads share a key head."""
    check_tensors(operation, q=q, k=k)
    for name, t in (("q", q), ("k", k)):
        if t.ndim != 4:
            raise ValueError(f"{operation}: {name} has {t.ndim} dimensions, expected 4")
    fits = k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3] and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    expected = f"q's {tuple(q.shape)} but for keys, and heads that divide q's"
    _expect(operation, "k's shape", tuple(k.shape), fits, expected)
    return q.shape[1] // k.shape[1]


def _reduce(t, block, order):
    """amax or amin over blocks of rows: (B, H, S, D) -> (B, H, ceil(S / block), D)."""
    spare = -t.shape[2] % block
    t = F.pad(t, (0, 0, 0, spare), value=-torch.inf if order == "amax" else torch.inf) if spare else t
    return getattr(t.unflatten(2, (t.shape[2] // block, block)), order)(3)


def _mean(t, block):
    whole = t.shape[2] // block * block
    means = t[:, :, :whole].unflatten(2, (whole // block, block)).mean(3)
    return means if whole == t.shape[2] else torch.cat([means, t[:, :, whole:].mean(2, keepdim=True)], 2)


def _pool(t, block):
    return torch.cat([_reduce(t, block, "amax"), _reduce(t, block, "amin"), _mean(t, block)], -1)


def _grouped_scores(q, k, group):
    """q k^T (B, Hq, m, n) of q (B, Hq, m, D) and k (B, Hkv, n, D), which is not repeated for its query heads."""
    scores = q.unflatten(1, (k.shape[1], group)).flatten(2, 3) @ k.transpose(2, 3)
    return scores.unflatten(2, (group, q.shape[2])).flatten(1, 2)


def _softmax(logits, seen):
    """Over what is seen; rows that see nothing are 0."""
    blind = ~seen.any(-1, keepdim=True)
    return logits.masked_fill(~(seen | blind), -torch.inf).softmax(-1).masked_fill(blind, 0)


def _largest(scores, count):
    """bool like ``scores``: the largest of the last dimension."""
    places = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)


def _best(scores, candidates, count):
    return _largest(scores.masked_fill(~candidates, -torch.inf), count) & candidates


def _any_between(marks, first, last):
    """bool (B, H, ...): whether one of the marks (B, H, n) stands at first..last (...), which may lie outside."""
    first, last = torch.broadcast_tensors(first, last)
    counts = F.pad(marks.cumsum(-1, dtype=torch.int32), (1, 0))
    most = marks.shape[-1]
    return counts[..., (last + 1).clamp(0, most)] > counts[..., first.clamp(0, most)]
