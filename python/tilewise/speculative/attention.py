"""Attention of a tree's nodes to a paged prefix and to their own ancestors."""

import math

import torch

from tilewise import _C
from tilewise._library import check_tensors, register


def _new_results(q, k_pages, v_pages, block_table, prefix_len, ancestor_bits, scale):
    out = q.new_empty(q.shape)
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _tree_attention(q, k_pages, v_pages, block_table, prefix_len, ancestor_bits, scale):
    out, lse = _new_results(q, k_pages, v_pages, block_table, prefix_len, ancestor_bits, scale)
    floats = _C.tree_attention_workspace(q, k_pages, block_table)
    workspace = q.new_empty(floats, dtype=torch.float32) if floats else None
    _C.tree_attention(q, k_pages, v_pages, block_table, prefix_len, ancestor_bits, scale, out, lse, workspace)
    return out, lse


_tree_attention_op = register(
    "tree_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor prefix_len, "
    "Tensor ancestor_bits, float scale) -> (Tensor, Tensor)",
    _tree_attention,
    fake=_new_results,
)


def tree_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    prefix_len: torch.Tensor,
    ancestor_bits: torch.Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
):
    """Attention of every node of a token tree to the prefix and to the nodes above it.

    ``out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k_j) v_j`` over the positions j < prefix_len[b], and over
    j = prefix_len[b] + a for the nodes a that are i itself or its ancestors; h's key head is ``h // (Hq // Hkv)``.
    The keys are split between processors and the partial results merged by their log-sum-exp (Dao et al., 2023,
    Flash-Decoding; tree masks: Miao et al., 2024, SpecInfer, arXiv:2305.09781). K and V are read once for all the
    nodes and heads that share them, and parts of the tree that no node of a tile sees are skipped: a chain of N nodes
    costs what causal attention costs.

    Args:
        q: (B, N, Hq, D) float32, float16 or bfloat16; D from 1 to 256 (64 and 128 are fast).
        k_pages, v_pages: (P, page_size, Hkv, D), any page size; Hq a multiple of Hkv.
        block_table: int32 (B, pages per sequence).
        prefix_len: int32 (B,).
        ancestor_bits: int64 (B, N, W) as :func:`tree_finalize` returns it. Any mask will do: bit j of row i lets node
            i see node j. A node without bits is padding.
        scale: default ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp, float32 (B, N, Hq), natural logarithm.

    Returns:
        out (B, N, Hq, D), or (out, lse). Padding gives 0 and -inf.

    Raises:
        ValueError: wrong shape, a scale that is not finite; on CPU, positions beyond the block table or pages beyond
            the pool. On CUDA such keys are skipped and the next tilewise call on the device raises.
        TypeError: wrong dtype.
    """
    check_tensors(
        "tree_attention",
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        block_table=block_table,
        prefix_len=prefix_len,
        ancestor_bits=ancestor_bits,
    )
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1]) if q.ndim and q.shape[-1] else 1.0
    out, lse = _tree_attention_op(q, k_pages, v_pages, block_table, prefix_len, ancestor_bits, scale)
    return (out, lse) if return_lse else out
