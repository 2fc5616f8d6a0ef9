"""The functions of the flash-attn package (version 2), with its argument names, layouts and return values.

    from tilewise.compat.flash_attn import flash_attn_func        # was: from flash_attn import flash_attn_func

They run wherever :func:`tilewise.attention` does, on CPU too, in float32 too, and raise its errors. What all share:

    tensors          (B, S, H, D); packed sequences (T, H, D). Key heads divide query heads. Any strides.
    softmax_scale    default 1 / sqrt(D)
    causal           bottom-right aligned: query i sees keys up to i + Sk - S
    window_size      (left, right) keys around that diagonal; -1 is unlimited
    softcap          0 is none
    alibi_slopes     float32 (H,) or (B, H)
    deterministic    the gradient is so anyway
    dropout_p        drawn from torch's default generator

With ``return_attn_probs=True`` the result is (out, softmax_lse, S_dmask): lse (B, H, S), or (H, T) of packed sequences,
float32, natural logarithm; S_dmask is None, as no matrix of probabilities exists. The algorithm is FlashAttention-2's
(Dao, arXiv:2307.08691).
"""

import torch

from tilewise import rope
from tilewise._library import check_tensors, rows_contiguous
from tilewise.attention import attention, attention_varlen, paged_attention, paged_attention_varlen
from tilewise.speculative import append_kv

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

UNLIMITED = (-1, -1)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=UNLIMITED,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention of q (B, S, Hq, D) to k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv); differentiable in all three.

    Args:
        q, k, v: float32, float16 or bfloat16, of one dtype.
        dropout_p, ...: as at the top of this module.

    Returns:
        out (B, S, Hq, Dv), or (out, softmax_lse, None).

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`tilewise.attention`.
    """
    _expect_dims("flash_attn_func", 4, q=q, k=k, v=v)
    out, lse = attention(
        *map(_heads_first, (q, k, v)),
        **_scoring(softmax_scale, causal, window_size, softcap),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_lse=True,
    )
    return _result(out.transpose(1, 2), lse, return_attn_probs)


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=UNLIMITED,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_func` with k and v as kv (B, Sk, 2, Hkv, D), which has the gradient.

    Raises:
        ValueError: another shape of kv; otherwise as :func:`flash_attn_func`.
    """
    k, v = _unbind("flash_attn_kvpacked_func", kv=kv, dims=5, parts=2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=UNLIMITED,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_func` with q, k and v as qkv (B, S, 3, H, D), which has the gradient.

    Raises:
        ValueError: another shape of qkv; otherwise as :func:`flash_attn_func`.
    """
    q, k, v = _unbind("flash_attn_qkvpacked_func", qkv=qkv, dims=5, parts=3)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=UNLIMITED,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    seqused_k=None,
):
    """Attention within each of B packed sequences: q (Tq, Hq, D) to k (Tk, Hkv, D) and v (Tk, Hkv, Dv).

    Sequence b has queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``, int32 (B + 1,), and keys likewise.

    Args:
        max_seqlen_q, max_seqlen_k: the longest lengths, or a bound on them.
        block_table: int32 (B, pages per sequence). k and v are then pages (P, page size, Hkv, D), any page size, of
            which cu_seqlens_k gives the lengths (its differences), and nothing is differentiable:
            :func:`tilewise.paged_attention_varlen`.
        seqused_k: int32 (B,), how many of its keys a sequence has in use; beside a block_table cu_seqlens_k may then be
            None.

    Returns:
        out (Tq, Hq, Dv), or (out, softmax_lse, None).

    Raises:
        ValueError: neither cu_seqlens_k nor seqused_k; on CPU, lengths beyond the sequence or the block table;
            otherwise as :func:`tilewise.attention_varlen`.
        TypeError: as there.
        NotImplementedError: alibi_slopes or dropout_p beside a block_table; otherwise as there.
    """
    operation = "flash_attn_varlen_func"
    check_tensors(operation, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k)
    _expect_dims(operation, 3, q=q)
    _expect_dims(operation, 3 if block_table is None else 4, k=k, v=v)
    scoring = _scoring(softmax_scale, causal, window_size, softcap)
    if block_table is not None:
        _expect_without(operation, "a block_table", alibi_slopes=alibi_slopes, dropout_p=dropout_p or None)
        if cu_seqlens_k is None and seqused_k is None:
            raise ValueError(f"{operation}: cu_seqlens_k and seqused_k are None, expected one of them")
        lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
        pages = k, v, block_table, cu_seqlens_q, lengths.contiguous()
        with torch.no_grad():
            out, lse = paged_attention_varlen(
                rows_contiguous(q), *pages, max_seqlen_q=max_seqlen_q, return_lse=True, **scoring
            )
        return _result(out, lse, return_attn_probs)
    if cu_seqlens_k is None:
        raise ValueError(f"{operation}: cu_seqlens_k is None, expected where the sequences' keys begin")
    if seqused_k is not None:
        cu_seqlens_q, cu_seqlens_k = _in_use(operation, cu_seqlens_q, cu_seqlens_k, seqused_k)
        if alibi_slopes is not None and alibi_slopes.ndim == 2:
            alibi_slopes = alibi_slopes.repeat_interleave(2, 0)
    out, lse = attention_varlen(
        *map(rows_contiguous, (q, k, v)),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_lse=True,
        **scoring,
    )
    return _result(out, lse, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=UNLIMITED,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_varlen_func` with k and v as kv (Tk, 2, Hkv, D), which has the gradient.

    Raises:
        ValueError: another shape of kv; otherwise as :func:`flash_attn_varlen_func`.
    """
    k, v = _unbind("flash_attn_varlen_kvpacked_func", kv=kv, dims=4, parts=2)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, *sequences, *options)


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=UNLIMITED,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_varlen_func` with q, k and v as qkv (T, 3, H, D), which has the gradient.

    Raises:
        ValueError: another shape of qkv; otherwise as :func:`flash_attn_varlen_func`.
    """
    q, k, v = _unbind("flash_attn_varlen_qkvpacked_func", qkv=qkv, dims=4, parts=3)
    sequences = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, *sequences, *options)


@torch.no_grad()
def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=UNLIMITED,
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Attention of q (B, S, Hq, D) to a cache, to which k and v (B, Sn, Hkv, D) are appended in place first.

    Nothing waits for the device, and nothing is differentiable. :func:`tilewise.paged_attention` reads the cache, rows
    as pages of the rows' length; with cache_leftpad or alibi_slopes :func:`tilewise.attention_varlen` reads the rows.

    Args:
        k_cache, v_cache: (Bc, S_max, Hkv, D); or with a block_table pages (P, page size, Hkv, D), any page size.
        cache_seqlens: keys that sequence b has before the call, int32 (B,), or one number for all. With k they must be
            given; without k, None is all that the cache has room for.
        rotary_cos, rotary_sin: (positions, P). The first 2P channels of the new keys turn by their places in the cache,
            those of query i by place ``cache_seqlens + i`` if causal or windowed, else by ``cache_seqlens``.
        rotary_interleaved: pairs are channels (2i, 2i + 1); otherwise (i, i + P).
        cache_batch_idx: int32 (B,), which row of the cache a sequence has; default row b.
        cache_leftpad: int32 (B,), where in its row a sequence begins; default 0.
        block_table: int32 (B, pages per sequence), the pages of a sequence in order.
        num_splits: how many parts the keys are cut into; 0 leaves the choice. Changes results by rounding only.
        return_softmax_lse: also return lse (B, Hq, S).

    Returns:
        out (B, S, Hq, D), or (out, lse).

    Raises:
        ValueError: k without v, cos without sin, either without k, k without cache_seqlens, cache_batch_idx beside a
            block_table; on CPU also lengths beyond the cache.
        NotImplementedError: cache_leftpad or alibi_slopes beside a block_table.
    """
    operation = "flash_attn_with_kvcache"
    _expect_dims(operation, 4, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    check_tensors(operation, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx)
    check_tensors(operation, cache_leftpad=cache_leftpad, block_table=block_table, alibi_slopes=alibi_slopes)
    _expect_together(operation, k=k, v=v)
    if cache_seqlens is None and k is not None:
        raise ValueError(f"{operation}: cache_seqlens is None, expected how many keys stand before k")
    if block_table is not None:
        _expect_pages(operation, block_table, cache_batch_idx, cache_leftpad, alibi_slopes)
    table = _table_of_rows(operation, q, k_cache, cache_batch_idx) if block_table is None else block_table
    capacity = table.shape[1] * k_cache.shape[1]
    _expect_tables(operation, rotary_cos, rotary_sin, k, capacity, q.shape[3])
    past = _per_sequence(operation, "cache_seqlens", capacity if cache_seqlens is None else cache_seqlens, q)
    begin = _per_sequence(operation, "cache_leftpad", 0 if cache_leftpad is None else cache_leftpad, q)
    _expect_lengths(operation, begin, past + (0 if k is None else k.shape[1]), capacity)
    if rotary_cos is not None:
        one_place = not causal and max(window_size) < 0
        tables = rotary_cos, rotary_sin, rotary_interleaved
        q, k = _turned(q, past, *tables, one_place=one_place), _turned(k, past, *tables)
    if k is not None:
        append_kv(k_cache, v_cache, table, past, rows_contiguous(k), rows_contiguous(v))
        past = past + k.shape[1]
    scoring = _scoring(softmax_scale, causal, window_size, softcap)
    if cache_leftpad is None and alibi_slopes is None:
        pages = k_cache, v_cache, table, past
        out, lse = paged_attention(_heads_first(q), *pages, **scoring, num_splits=num_splits or None, return_lse=True)
        out = out.transpose(1, 2)
    else:
        rows = [_rows_of(cache, table, cache_batch_idx) for cache in (k_cache, v_cache)]
        out, lse = _attend_rows(rows_contiguous(q), *rows, begin, past, alibi_slopes=alibi_slopes, **scoring)
    return (out, lse) if return_softmax_lse else out


def _in_use(operation, cu_seqlens_q, cu_seqlens_k, used):
    """Offsets of twice as many sequences: the keys that are in use, with all queries, and the others, with none."""
    if used.shape != cu_seqlens_k[1:].shape or used.dtype != torch.int32:
        got = f"shape {tuple(used.shape)} and dtype {used.dtype}"
        raise ValueError(f"{operation}: seqused_k has {got}, expected {tuple(cu_seqlens_k[1:].shape)} and torch.int32")
    if not used.is_cuda and used.numel() and (used < 0).any():
        raise ValueError(f"{operation}: seqused_k has {used.tolist()}, expected at least 0")
    starts_q = torch.cat([cu_seqlens_q[:1], cu_seqlens_q[1:].repeat_interleave(2)])
    starts_k = torch.stack([cu_seqlens_k[:-1], cu_seqlens_k[:-1] + used], 1).flatten()
    return starts_q, torch.cat([starts_k, cu_seqlens_k[-1:]])


def _rows_of(cache, table, cache_batch_idx):
    return cache[: table.shape[0]] if cache_batch_idx is None else cache[table[:, 0].long()]


def _attend_rows(q, k_cache, v_cache, begin, end, *, alibi_slopes, **options):
    """Each sequence's queries to the keys begin..end of its row, where they stand.

    The rows, one after the other, are packed sequences, three to a row: the keys before, those that count, and those
    behind. Only the second has queries.
    """
    (batch, queries), (_, capacity, *_) = q.shape[:2], k_cache.shape
    row = torch.arange(batch, dtype=torch.int32, device=q.device)
    starts_q = torch.stack([row, row, row + 1], 1).flatten() * queries
    starts_k = (row * capacity)[:, None] + torch.stack([torch.zeros_like(begin), begin, end], 1)
    cu_seqlens_q = torch.cat([starts_q, starts_q.new_tensor([batch * queries])])
    cu_seqlens_k = torch.cat([starts_k.flatten(), starts_q.new_tensor([batch * capacity])])
    if alibi_slopes is not None and alibi_slopes.ndim == 2:
        alibi_slopes = alibi_slopes.repeat_interleave(3, 0)
    out, lse = attention_varlen(
        q.flatten(0, 1),
        k_cache.flatten(0, 1),
        v_cache.flatten(0, 1),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=queries,
        max_seqlen_k=capacity,
        alibi_slopes=alibi_slopes,
        return_lse=True,
        **options,
    )
    return out.unflatten(0, (batch, queries)), lse.unflatten(1, (batch, queries)).transpose(0, 1).contiguous()


def _turned(x, past, cos, sin, interleaved, one_place=False):
    """x (B, S, H, D) with its first 2P channels turned by the angles of places past + i, or of past alone."""
    steps = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
    steps = steps if one_place else torch.arange(x.shape[1], device=x.device)
    place = (past[:, None] + steps).clamp(0, cos.shape[0] - 1)
    tables = cos[place].float(), sin[place].float()
    return rope.apply(_heads_first(x), tables, interleaved=interleaved).transpose(1, 2)


def _scoring(softmax_scale, causal, window_size, softcap):
    """What all kinds of attention take, under tilewise's names: None is unlimited."""
    left, right = (None if n < 0 else n for n in window_size)
    right = None if causal else right
    window = None if left is None and right is None else (left, right)
    return {"causal": causal, "scale": softmax_scale, "window": window, "softcap": softcap}


def _result(out, lse, return_attn_probs):
    return (out, lse, None) if return_attn_probs else out


def _heads_first(t):
    return rows_contiguous(t).transpose(1, 2)


def _unbind(operation, *, dims, parts, **packed):
    _expect_dims(operation, dims, **packed)
    ((name, t),) = packed.items()
    if t.shape[dims - 3] != parts:
        raise ValueError(f"{operation}: {name} has size {t.shape[dims - 3]} in dimension {dims - 3}, expected {parts}")
    return t.unbind(dims - 3)


def _expect_dims(operation, dims, **tensors):
    check_tensors(operation, **tensors)
    for name, t in tensors.items():
        if t is not None and t.ndim != dims:
            raise ValueError(f"{operation}: {name} has {t.ndim} dimensions, expected {dims}")


def _expect_together(operation, **tensors):
    missing = [name for name, t in tensors.items() if t is None]
    if len(missing) == 1:
        given = next(name for name in tensors if name not in missing)
        raise ValueError(f"{operation}: {missing[0]} is None, expected a tensor beside {given}")


def _expect_tables(operation, cos, sin, k, capacity, dim):
    _expect_together(operation, rotary_cos=cos, rotary_sin=sin)
    if cos is None:
        return
    if k is None:
        raise ValueError(f"{operation}: k is None, expected the keys that rotary_cos belongs to")
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        if t.ndim != 2 or t.shape != cos.shape or t.shape[0] < capacity or 2 * t.shape[1] > dim:
            expected = f"({capacity} or more, {dim // 2} or less), both alike"
            raise ValueError(f"{operation}: {name} has shape {tuple(t.shape)}, expected {expected}")


def _table_of_rows(operation, q, k_cache, cache_batch_idx):
    """The block table int32 (B, 1) of a cache whose pages are its rows."""
    batch, rows = q.shape[0], k_cache.shape[0]
    if cache_batch_idx is not None:
        table = _per_sequence(operation, "cache_batch_idx", cache_batch_idx, q)
        if not table.is_cuda and batch and not 0 <= int(table.min()) <= int(table.max()) < rows:
            raise ValueError(f"{operation}: cache_batch_idx has {table.tolist()}, expected 0 to {rows - 1} (rows)")
        return table[:, None].contiguous()
    if rows < batch:
        raise ValueError(f"{operation}: k_cache has {rows} rows, expected at least {batch} (q's batch)")
    return torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]


def _expect_pages(operation, block_table, cache_batch_idx, cache_leftpad, alibi_slopes):
    if block_table.ndim != 2:
        raise ValueError(f"{operation}: block_table has {block_table.ndim} dimensions, expected 2")
    if cache_batch_idx is not None:
        raise ValueError(f"{operation}: cache_batch_idx is given, expected None beside a block_table")
    _expect_without(operation, "a block_table", cache_leftpad=cache_leftpad, alibi_slopes=alibi_slopes)


def _expect_without(operation, other, **given):
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{operation}: {name} is given, expected None beside {other}")


def _per_sequence(operation, name, value, q):
    """int32 (B,) of one number or of a tensor."""
    batch = q.shape[0]
    if isinstance(value, int):
        return torch.full((batch,), value, dtype=torch.int32, device=q.device)
    check_tensors(operation, **{name: value})
    if value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(f"{operation}: {name} is {value.dtype}, expected integers")
    if value.shape != (batch,):
        raise ValueError(f"{operation}: {name} has shape {tuple(value.shape)}, expected ({batch},)")
    return value.int()


def _expect_lengths(operation, begin, end, capacity):
    """On CPU; a GPU is not waited for, and its kernels stay within the tensors."""
    if end.is_cuda or not end.numel():
        return
    if int(begin.min()) < 0 or bool((begin > end).any()):
        raise ValueError(f"{operation}: cache_leftpad has {begin.tolist()}, expected 0 to {end.tolist()} (the lengths)")
    if int(end.max()) > capacity:
        raise ValueError(f"{operation}: cache_seqlens leads to length {int(end.max())}, expected at most {capacity}")
