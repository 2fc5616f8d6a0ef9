"""Attention over a paged cache of keys and values."""

import torch

from tilewise import _C
from tilewise._library import check_tensors, register


def _empty_outputs(q, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


# What a row of a cache is, in the order of the core's CacheFormat.
FORMATS = ("native", "int8", "int4", "int2", "bfp12")


def run_paged(q, k_pages, v_pages, block_table, seq_lens, *options):
    out, lse = _empty_outputs(q)
    floats = _C.paged_attention_workspace(q, k_pages, v_pages, block_table, *options[5:7])
    workspace = q.new_empty(floats, dtype=torch.float32) if floats else None
    _C.paged_attention(q, k_pages, v_pages, block_table, seq_lens, *options, out, lse, workspace)
    return out, lse


_paged_attention_op = register(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor seq_lens, bool causal, "
    "float? scale, SymInt? window_left, SymInt? window_right, float softcap, SymInt? num_splits, int format, "
    "Tensor? k_channels, Tensor? v_channels) -> (Tensor, Tensor)",
    run_paged,
    fake=_empty_outputs,
)


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    num_splits: int | None = None,
    return_lse: bool = False,
):
    """:func:`attention` of new tokens to a cache in pages, their own keys included; decoding, or a chunk of a prompt.

    With L = seq_lens[b], query i of the S new tokens stands at key ``L - S + i``, its diagonal, and sees the keys up to
    there. The keys are split into ranges that are worked on side by side and merged by their log-sum-exp (Dao et al.,
    2023, Flash-Decoding); pages are those of Kwon et al. (vLLM, arXiv:2309.06180). K and V are read once for all the
    queries and heads that share them. On CPU the result has the same bits for any number of threads.

    On CUDA, tensor cores serve fp16 and bf16 with D 64 or 128 and 16-byte rows, any page size; on Hopper, wgmma from 64
    tokens on for multiples of 8 to 128 if there is one range of keys; the fp32 units all the rest.

    Args:
        q: (B, Hq, S, D), float32, float16 or bfloat16; D from 1 to 256; any strides whose last dimension is contiguous.
        k_pages, v_pages: (P, page_size, Hkv, D) of q's dtype, any page size; Hq a multiple of Hkv.
        block_table: int32 (B, pages per sequence), the pages of a sequence in order.
        seq_lens: int32 (B,), how many keys a sequence has, those of the new tokens included.
        causal: False lets a query see all L keys.
        scale: default ``1 / sqrt(D)``.
        window: (left, right), how many keys before and after its diagonal a query sees; None for no limit. Pages
            before every window are not looked at.
        softcap: bounds the scores by ``softcap * tanh(score / softcap)``; 0 for none.
        num_splits: how many ranges of keys; default: as the shapes suggest. It changes results by rounding only.
        return_lse: also return the log-sum-exp, float32 (B, Hq, S), natural logarithm.

    Returns:
        out (B, Hq, S, D), or (out, lse). A query that sees no key gets 0 and -inf.

    Raises:
        ValueError: wrong shape; a negative window or softcap, a scale or softcap that is not finite, num_splits below
            1; on CPU, negative seq_lens, seq_lens beyond the block table, or pages beyond the pool. On CUDA such keys
            are skipped, or read as zeros, and the next tilewise call on the device raises.
        TypeError: wrong dtype.
    """
    options = pack_options(causal, scale, window, softcap, num_splits)
    return attend_pages(q, k_pages, v_pages, block_table, seq_lens, options, return_lse)


def pack_options(causal=True, scale=None, window=None, softcap=0.0, num_splits=None, format=0, channels=(None, None)):
    """The public options, and which of FORMATS the rows are in, as the operators take them."""
    left, right = (None, None) if window is None else window
    return causal, scale, left, right, softcap, num_splits, format, *channels


def attend_pages(q, k_pages, v_pages, block_table, seq_lens, options, return_lse=False):
    """paged_attention with the options of pack_options."""
    check_tensors("paged_attention", q=q, k_pages=k_pages, v_pages=v_pages, block_table=block_table, seq_lens=seq_lens)
    out, lse = _paged_attention_op(q, k_pages, v_pages, block_table, seq_lens, *options)
    return (out, lse) if return_lse else out
