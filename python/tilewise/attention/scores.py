"""What attention weighed: column sums and block maxima of its probabilities, without the S x Sk matrix."""

import torch

from tilewise import _C
from tilewise._library import check_tensors, register


def _empty_sums(q, k, lse, last_key, scale):
    if q.ndim != 4 or k.ndim != 4:  # nonsense, which the core then reports
        return q.new_empty((0,), dtype=torch.float32)
    return q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)


def _column_sums(q, k, lse, last_key, scale):
    sums = _empty_sums(q, k, lse, last_key, scale)
    _C.attention_column_sums(q, k, lse, sums, last_key, scale)
    return sums


def _empty_maxima(q, k, lse, block_q, block_k, last_key, scale):
    if q.ndim != 4 or k.ndim != 4 or min(block_q, block_k) < 1:
        return q.new_empty((0,), dtype=torch.float32)
    down, across = (q.shape[2] + block_q - 1) // block_q, (k.shape[2] + block_k - 1) // block_k
    return q.new_empty((*q.shape[:2], down, across), dtype=torch.float32)


def _block_max(q, k, lse, block_q, block_k, last_key, scale):
    maxima = _empty_maxima(q, k, lse, block_q, block_k, last_key, scale)
    _C.attention_block_max(q, k, lse, block_q, block_k, maxima, last_key, scale)
    return maxima


_column_sums_op = register(
    "attention_column_sums(Tensor q, Tensor k, Tensor lse, Tensor? last_key, float? scale) -> Tensor",
    _column_sums,
    fake=_empty_sums,
)
_block_max_op = register(
    "attention_block_max(Tensor q, Tensor k, Tensor lse, int block_q, int block_k, Tensor? last_key, float? scale) "
    "-> Tensor",
    _block_max,
    fake=_empty_maxima,
)


def _diagonals(q, k, rows=None):
    """The last key that each query, or each of ``rows``, sees under causality."""
    rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows
    return (rows + (k.shape[2] - q.shape[2])).to(torch.int32)


def _sighted(last_key, keys):
    """How many of the queries see each key."""
    ends = torch.bincount((last_key.long() + 1).clamp(0, keys), minlength=keys + 1)  # who sees exactly n keys
    return last_key.numel() - ends.cumsum(0)[:keys]


def attention_column_sums(q, k, lse, *, rows=None, causal=False, normalize=True, scale=None):
    """How much weight each key got: ``sum_i exp(scale * q_i k_j - lse_i)`` over all queries or over probe rows.

    The importance score of heavy hitters (H2O, arXiv:2306.14048) and of ZipCache's salient tokens (arXiv:2405.14256),
    which estimates it from 10 % of the rows.

    Args:
        q: (B, Hq, S, D) float32, float16 or bfloat16; k: (B, Hkv, Sk, D).
        lse: (B, Hq, S) float32, as :func:`tilewise.attention` returned it.
        rows: the probe rows' indices, integers (R,); None: all.
        causal: as it was in the attention.
        normalize: divide each sum by the number of these queries that see the key; keys that none sees get 0.
        scale: default ``1 / sqrt(D)``.

    Returns:
        (B, Hq, Sk) float32.

    Raises:
        ValueError: shapes that do not fit together, a scale that is not finite.
        TypeError: another dtype.
        IndexError: rows outside q.
    """
    check_tensors("attention_column_sums", q=q, k=k, lse=lse, rows=rows)
    last_key = _diagonals(q, k, rows) if causal and q.ndim == 4 and k.ndim == 4 else None
    if rows is not None:
        q, lse = q.index_select(2, rows), lse.index_select(2, rows)
    sums = _column_sums_op(q, k, lse.contiguous(), last_key, scale)
    if not normalize:
        return sums
    seen = q.shape[2] if last_key is None else _sighted(last_key, k.shape[2])
    return sums / torch.as_tensor(seen, device=sums.device).clamp_min(1)


def attention_block_max(q, k, lse, block_size, *, causal=False, scale=None):
    """The largest probability of each block of queries and keys: what a block-sparse gate is trained to predict.

    SeerAttention (arXiv:2410.13276) trains its gate on the max-pooled attention map.

    Args:
        q: (B, Hq, S, D) float32, float16 or bfloat16; k: (B, Hkv, Sk, D).
        lse: (B, Hq, S) float32, as :func:`tilewise.attention` returned it.
        block_size: queries and keys of a block, (bq, bk) or one number: multiples of 16 from 16 to 128.
        causal: as it was in the attention.
        scale: default ``1 / sqrt(D)``.

    Returns:
        (B, Hq, ceil(S / bq), ceil(Sk / bk)) float32.

    Raises:
        ValueError: shapes that do not fit together, another block size, a scale that is not finite.
        TypeError: another dtype.
    """
    check_tensors("attention_block_max", q=q, k=k, lse=lse)
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    last_key = _diagonals(q, k) if causal and q.ndim == 4 and k.ndim == 4 else None
    return _block_max_op(q, k, lse.contiguous(), block_q, block_k, last_key, scale)
