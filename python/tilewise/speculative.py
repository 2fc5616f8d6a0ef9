"""Speculative decoding with token trees (``tilewise.speculative``).

B batch, N nodes per tree (at most 256), W = ceil(N / 64). A tree is ``parent`` int32 (B, N): node 0 is the root
(parent -1) and stands for the last committed token, every other node's parent precedes it, and slots from
``n_nodes[b]`` on are padding (-2).
"""

from typing import NamedTuple

import torch

from tilewise import _C
from tilewise._library import check_tensors, register


class TreeLinks(NamedTuple):
    """What :func:`tree_finalize` derives from a tree's parents."""

    positions: torch.Tensor
    first_child: torch.Tensor
    next_sibling: torch.Tensor
    ancestor_bits: torch.Tensor


def _empty_links(parent: torch.Tensor) -> tuple[torch.Tensor, ...]:
    words = (parent.shape[-1] + 63) // 64 if parent.ndim else 0
    links = [torch.empty_like(parent, memory_format=torch.contiguous_format) for _ in range(3)]
    return *links, parent.new_empty((*parent.shape, words), dtype=torch.int64)


def _tree_finalize(parent, n_nodes, seq_lens):
    links = _empty_links(parent)
    _C.tree_finalize(parent, n_nodes, seq_lens, *links)
    return links


_tree_finalize_op = register(
    "tree_finalize(Tensor parent, Tensor n_nodes, Tensor seq_lens) -> (Tensor, Tensor, Tensor, Tensor)",
    _tree_finalize,
    fake=lambda parent, n_nodes, seq_lens: _empty_links(parent),
)


def tree_finalize(parent: torch.Tensor, n_nodes: torch.Tensor, seq_lens: torch.Tensor) -> TreeLinks:
    """Links and positions of a batch of token trees.

    Args:
        parent: int32 (B, N), contiguous; -1 for the root, -2 for padding.
        n_nodes: int32 (B,), nodes in use per tree.
        seq_lens: int32 (B,), position of each root.

    Returns:
        positions int32 (B, N), ``seq_lens + depth`` (-1 for padding); first_child and next_sibling int32 (B, N), -1
        where there is none; ancestor_bits int64 (B, N, W): bit j of node i says that j is i or an ancestor of i.

    Raises:
        ValueError: wrong shape; on CPU, a parent that does not precede its node. On CUDA such a node counts as padding
            and the next tilewise call on the device raises.
        TypeError: wrong dtype.
    """
    check_tensors("tree_finalize", parent=parent, n_nodes=n_nodes, seq_lens=seq_lens)
    return TreeLinks(*_tree_finalize_op(parent, n_nodes, seq_lens))
