"""Attention of packed queries, as many as each sequence has, to a paged cache."""

from itertools import pairwise

import torch

from tilewise._library import check_tensors, register
from tilewise.attention.paged import pack_options, run_paged

_TILE = 64  # rows that the kernels work on at a time: the queries of all heads that share a key


def _empty_outputs(q, *_):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _paged_attention_varlen(q, k_pages, v_pages, block_table, cu_seqlens_q, seq_lens, max_seqlen_q, *options):
    """Cuts queries into chunks of as many rows, and takes chunks for sequences.

    A chunk ends where its last query stands, and so do its keys, which puts every query on its diagonal. What rows a
    sequence's first chunk has too many stand in front, and their results in a row behind all others.
    """
    total, heads, dim = q.shape
    nobody = q.new_empty((len(seq_lens), heads, 0, dim))
    run_paged(nobody, k_pages, v_pages, block_table, seq_lens, *options)  # the core's own checks, of all sequences
    out = q.new_zeros((total + 1, heads, dim))
    lse = q.new_full((total + 1, heads), -torch.inf, dtype=torch.float32)
    if heads and len(seq_lens) and min(total, max_seqlen_q):
        causal, _, left, right, *_ = options
        to_diagonal = causal or right == 0
        # Keys behind a diagonal are counted from where the last query stands: then all are in one chunk.
        cut = to_diagonal or (left, right) == (None, None)
        most = min(max_seqlen_q, max(1, _TILE * k_pages.shape[2] // heads)) if cut else max_seqlen_q
        sequences = torch.stack([cu_seqlens_q[:-1].clamp_min(0), cu_seqlens_q[1:], seq_lens])
        for members, rows in _groups(cu_seqlens_q.diff(), most):
            of = sequences[:, members]
            chunks, last = _chunks(*of[:2], rows, total)
            begin, end, keys = of[:, chunks]
            if to_diagonal:
                keys = torch.where(last < end, (keys - (end - last)).clamp_min(0), keys)
            keys = torch.where(last > begin, keys, 0)
            place = last[:, None] + torch.arange(-rows, 0, device=q.device)
            taken = q.index_select(0, place.clamp(0, total - 1).flatten()).unflatten(0, place.shape).transpose(1, 2)
            found = run_paged(taken, k_pages, v_pages, block_table[members][chunks], keys.int(), *options)
            to = torch.where((place >= begin[:, None]) & (place < total), place, total).flatten()
            for result, part in zip((out, lse), found, strict=True):
                result.index_copy_(0, to, part.transpose(1, 2).flatten(0, 1))
    return out[:total], lse[:total].t().contiguous()


def _groups(lengths, rows):
    """(which sequences, rows of their chunks): single queries apart, where their number can be looked at."""
    if lengths.is_cuda:
        return [(slice(None), rows)]
    groups = ((lengths == 1, 1), (lengths > 1, min(rows, int(lengths.max()))))
    return [(members.nonzero()[:, 0], rows) for members, rows in groups if members.any()]


def _chunks(begin, end, rows, total):
    """Each chunk's sequence, and the place behind its last query.

    A GPU is not asked how many there are: of the most there can be, some end before their sequence begins.
    """
    counts = ((end - begin).clamp_min(0) + rows - 1) // rows
    ends = counts.cumsum(0)
    most = (total + len(counts) * (rows - 1)) // rows if ends.is_cuda else int(ends[-1])
    chunk = torch.arange(most, device=ends.device)
    of = torch.searchsorted(ends, chunk, right=True).clamp_max(len(counts) - 1)
    return of, end[of] - (chunk - (ends - counts)[of]) * rows


_paged_attention_varlen_op = register(
    "paged_attention_varlen(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor cu_seqlens_q, "
    "Tensor seq_lens, SymInt max_seqlen_q, bool causal, float? scale, SymInt? window_left, SymInt? window_right, "
    "float softcap, SymInt? num_splits, int format, Tensor? k_channels, Tensor? v_channels) -> (Tensor, Tensor)",
    _paged_attention_varlen,
    fake=_empty_outputs,
)


def paged_attention_varlen(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    num_splits: int | None = None,
    return_lse: bool = False,
):
    """:func:`paged_attention` of packed queries, of which each sequence may have another number.

    One call serves the chunks of some prompts and the single tokens of sequences that decode (Agrawal et al., SARATHI,
    arXiv:2308.16369). Query i of the S of sequence b stands at key ``seq_lens[b] - S + i``. A chunk of a prompt reads
    its keys once for every 64 of its rows, a row being a query of one head of those that share keys.

    Args:
        q: (T, Hq, D), float32, float16 or bfloat16; D from 1 to 256; any strides.
        k_pages, v_pages, block_table, seq_lens: as for :func:`paged_attention`.
        cu_seqlens_q: int32 (B + 1,), from 0, not decreasing: sequence b has queries ``cu_seqlens_q[b]`` to
            ``cu_seqlens_q[b + 1]``. Rows beyond the last offset belong to no sequence: they get out 0 and lse -inf.
        max_seqlen_q: the most queries of a sequence, or a bound on it; default what cu_seqlens_q says on CPU, on CUDA
            T. It costs time only where it cannot be done without: on CUDA, in a window that is not ``causal``.
        causal, scale, window, softcap, num_splits: as for :func:`paged_attention`.
        return_lse: also return the log-sum-exp, float32 (Hq, T), natural logarithm.

    Returns:
        out (T, Hq, D), or (out, lse). A query that sees no key gets 0 and -inf.

    Raises:
        ValueError, TypeError: as :func:`paged_attention`; on CPU also offsets that decrease or overrun q. On CUDA such
            offsets are clamped.
    """
    tensors = (q, k_pages, v_pages, block_table, cu_seqlens_q, seq_lens)
    return attend_packed(*tensors, pack_options(causal, scale, window, softcap, num_splits), max_seqlen_q, return_lse)


def attend_packed(
    q, k_pages, v_pages, block_table, cu_seqlens_q, seq_lens, options, max_seqlen_q=None, return_lse=False
):
    """paged_attention_varlen with the options of pack_options."""
    operation = "paged_attention_varlen"
    check_tensors(operation, q=q, k_pages=k_pages, v_pages=v_pages, block_table=block_table)
    check_tensors(operation, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens)
    longest = _check_sequences(operation, q, cu_seqlens_q, seq_lens, max_seqlen_q)
    out, lse = _paged_attention_varlen_op(q, k_pages, v_pages, block_table, cu_seqlens_q, seq_lens, longest, *options)
    return (out, lse) if return_lse else out


def _check_sequences(operation, q, cu_seqlens_q, seq_lens, max_seqlen_q):
    """The longest sequence, or a bound; the core looks at everything but how queries are shared out."""
    if q.ndim != 3:
        raise ValueError(f"{operation}: q has shape {tuple(q.shape)}, expected 3 dimensions")
    if cu_seqlens_q.dtype != torch.int32:
        raise TypeError(f"{operation}: cu_seqlens_q has dtype {cu_seqlens_q.dtype}, expected torch.int32")
    if cu_seqlens_q.device != q.device:
        raise ValueError(f"{operation}: cu_seqlens_q is on {cu_seqlens_q.device}, expected {q.device} (q's)")
    if seq_lens.ndim != 1 or cu_seqlens_q.shape != (len(seq_lens) + 1,):
        got, batch = tuple(cu_seqlens_q.shape), len(seq_lens) if seq_lens.ndim else 0
        raise ValueError(f"{operation}: cu_seqlens_q has shape {got}, expected ({batch + 1},) (seq_lens's and one)")
    if max_seqlen_q is not None and max_seqlen_q < 0:
        raise ValueError(f"{operation}: max_seqlen_q is {max_seqlen_q}, expected at least 0")
    if q.is_cuda:
        return q.shape[0] if max_seqlen_q is None else min(max_seqlen_q, q.shape[0])
    offsets = cu_seqlens_q.tolist()
    if offsets[0] or sorted(offsets) != offsets or offsets[-1] > len(q):
        raise ValueError(f"{operation}: cu_seqlens_q is {offsets}, expected from 0 to at most {len(q)}, not decreasing")
    longest = max((b - a for a, b in pairwise(offsets)), default=0)
    if max_seqlen_q is not None and max_seqlen_q < longest:
        raise ValueError(f"{operation}: max_seqlen_q is {max_seqlen_q}, expected at least {longest} (the longest)")
    return longest
