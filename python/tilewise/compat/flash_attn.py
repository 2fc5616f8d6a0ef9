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
float32, natural logarithm; S_dmask is None, as no matrix of probabilities exists.
"""

import torch

from tilewise import rope
from tilewise._library import check_tensors
from tilewise.attention import attention, attention_varlen
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
    """Attention of q (B, S, Hq, D) to k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv): out (B, S, Hq, Dv)."""
    _expect_dims("flash_attn_func", 4, q=q, k=k, v=v)
    out, lse = attention(
        *map(_heads_first, (q, k, v)),
        causal=causal,
        scale=softmax_scale,
        window=_window(window_size, causal),
        softcap=softcap,
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
    """:func:`flash_attn_func` with k and v as kv (B, Sk, 2, Hkv, D)."""
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
    """:func:`flash_attn_func` with q, k and v as qkv (B, S, 3, H, D)."""
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
):
    """Attention within each of B packed sequences: q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), out (Tq, Hq, Dv).

    Sequence b has queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``, int32 (B + 1,), and keys likewise.

    Raises:
        NotImplementedError: a block_table; :func:`flash_attn_with_kvcache` reads pages.
    """
    _expect_dims("flash_attn_varlen_func", 3, q=q, k=k, v=v)
    if block_table is not None:
        raise NotImplementedError(
            "flash_attn_varlen_func: block_table is given, expected None (flash_attn_with_kvcache reads pages)"
        )
    out, lse = attention_varlen(
        *map(_rows_contiguous, (q, k, v)),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        scale=softmax_scale,
        window=_window(window_size, causal),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_lse=True,
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
    """:func:`flash_attn_varlen_func` with k and v as kv (Tk, 2, Hkv, D)."""
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
    """:func:`flash_attn_varlen_func` with q, k and v as qkv (T, 3, H, D)."""
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

    Nothing waits for the device, and nothing is differentiable.

    Args:
        k_cache, v_cache: (Bc, S_max, Hkv, D).
        cache_seqlens: keys that sequence b has before the call, int32 (B,), or one number for all. With k they must be
            given; without k, None is S_max.
        rotary_cos, rotary_sin: (positions, P). The first 2P channels of the new keys turn by their places in the cache,
            those of query i by place ``cache_seqlens + i`` if causal or windowed, else by ``cache_seqlens``.
        rotary_interleaved: pairs are channels (2i, 2i + 1); otherwise (i, i + P).
        cache_batch_idx: int32 (B,), which row of the cache a sequence has; default row b.
        cache_leftpad: int32 (B,), where in its row a sequence begins; default 0.
        num_splits: how many parts the keys are cut into changes speed only, and is chosen here.
        return_softmax_lse: also return lse (B, Hq, S).

    Returns:
        out (B, S, Hq, D), or (out, lse).

    Raises:
        ValueError: k without v, cos without sin, either without k, k without cache_seqlens; on CPU also lengths beyond
            the cache.
        NotImplementedError: a block_table.
    """
    operation = "flash_attn_with_kvcache"
    _expect_dims(operation, 4, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    check_tensors(operation, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx)
    check_tensors(operation, cache_leftpad=cache_leftpad, block_table=block_table)
    if block_table is not None:
        raise NotImplementedError(f"{operation}: block_table is given, expected None (no kernel reads its pages yet)")
    _expect_together(operation, k=k, v=v)
    _expect_tables(operation, rotary_cos, rotary_sin, k, k_cache)
    if cache_seqlens is None and k is not None:
        raise ValueError(f"{operation}: cache_seqlens is None, expected how many keys stand before k")
    batch, capacity = q.shape[0], k_cache.shape[1]
    past = _per_sequence(operation, "cache_seqlens", capacity if cache_seqlens is None else cache_seqlens, q)
    begin = _per_sequence(operation, "cache_leftpad", 0 if cache_leftpad is None else cache_leftpad, q)
    if cache_batch_idx is None and k_cache.shape[0] < batch:
        raise ValueError(f"{operation}: k_cache has {k_cache.shape[0]} rows, expected at least {batch} (q's batch)")
    row = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx
    row = _per_sequence(operation, "cache_batch_idx", row, q)
    _expect_places(operation, k_cache, row, begin, past + (0 if k is None else k.shape[1]))
    if rotary_cos is not None:
        one_place = not causal and max(window_size) < 0
        tables = rotary_cos, rotary_sin, rotary_interleaved
        q, k = _turned(q, past, *tables, one_place=one_place), _turned(k, past, *tables)
    if k is not None:
        append_kv(k_cache, v_cache, row[:, None].contiguous(), past, _rows_contiguous(k), _rows_contiguous(v))
        past = past + k.shape[1]
    if cache_batch_idx is not None:
        k_cache, v_cache = k_cache[row.long()], v_cache[row.long()]
    out, lse = _attend_rows(
        _rows_contiguous(q),
        k_cache[:batch],
        v_cache[:batch],
        begin,
        past,
        causal=causal,
        scale=softmax_scale,
        window=_window(window_size, causal),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    return (out, lse) if return_softmax_lse else out


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


def _window(window_size, causal):
    """(left, right) with None for what is unlimited, or None altogether."""
    left, right = (None if n < 0 else n for n in window_size)
    right = None if causal else right
    return None if left is None and right is None else (left, right)


def _result(out, lse, return_attn_probs):
    return (out, lse, None) if return_attn_probs else out


def _rows_contiguous(t):
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _heads_first(t):
    return _rows_contiguous(t).transpose(1, 2)


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


def _expect_tables(operation, cos, sin, k, k_cache):
    _expect_together(operation, rotary_cos=cos, rotary_sin=sin)
    if cos is None:
        return
    if k is None:
        raise ValueError(f"{operation}: k is None, expected the keys that rotary_cos belongs to")
    capacity, dim = k_cache.shape[1], k_cache.shape[3]
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        if t.ndim != 2 or t.shape != cos.shape or t.shape[0] < capacity or 2 * t.shape[1] > dim:
            expected = f"({capacity} or more, {dim // 2} or less), both alike"
            raise ValueError(f"{operation}: {name} has shape {tuple(t.shape)}, expected {expected}")


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


def _expect_places(operation, k_cache, row, begin, end):
    """On CPU; a GPU is not waited for, and its kernels stay within the tensors."""
    rows, capacity = k_cache.shape[:2]
    if row.is_cuda or not row.numel():
        return
    if not 0 <= int(row.min()) <= int(row.max()) < rows:
        raise ValueError(
            f"{operation}: cache_batch_idx has {row.tolist()}, expected rows of the cache, 0 to {rows - 1}"
        )
    if int(begin.min()) < 0 or bool((begin > end).any()):
        raise ValueError(f"{operation}: cache_leftpad has {begin.tolist()}, expected 0 to {end.tolist()} (the lengths)")
    if int(end.max()) > capacity:
        raise ValueError(f"{operation}: cache_seqlens leads to length {int(end.max())}, expected at most {capacity}")
