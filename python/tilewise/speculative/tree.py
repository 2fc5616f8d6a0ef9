"""Token trees: their links, and the ways in which drafts become one."""

from typing import NamedTuple

import torch

from tilewise import _C
from tilewise._library import check_tensors, core, register
from tilewise.speculative.template import TreeTemplate

#: The largest N of any tree.
MAX_NODES = 256


class TreeLinks(NamedTuple):
    """What :func:`tree_finalize` derives from a tree's parents.

    Attributes:
        positions: int32 (B, N), ``seq_lens + depth``; -1 for padding.
        first_child, next_sibling: int32 (B, N), node indices; -1 where there is none.
        ancestor_bits: int64 (B, N, W): bit j of node i says that j is i or an ancestor of i.
    """

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
    """Links and positions of a batch of token trees, which attention and verification follow.

    The bits are the tree mask of SpecInfer (Miao et al., 2024, arXiv:2305.09781).

    Args:
        parent: int32 (B, N), contiguous; -1 for the root, -2 for padding.
        n_nodes: int32 (B,), nodes in use per tree.
        seq_lens: int32 (B,), position of each root.

    Returns:
        :class:`TreeLinks`.

    Raises:
        ValueError: wrong shape; on CPU, a parent that does not precede its node. On CUDA such a node counts as padding
            and the next tilewise call on the device raises.
        TypeError: wrong dtype.
    """
    check_tensors("tree_finalize", parent=parent, n_nodes=n_nodes, seq_lens=seq_lens)
    return TreeLinks(*_tree_finalize_op(parent, n_nodes, seq_lens))


class DraftTree(NamedTuple):
    """A batch of token trees on one device.

    Attributes:
        parent: int32 (B, N), -1 for the root, -2 for padding.
        tokens: int32 (B, N), 0 for padding.
        n_nodes: int32 (B,), nodes in use.
    """

    parent: torch.Tensor
    tokens: torch.Tensor
    n_nodes: torch.Tensor

    @classmethod
    def chain(cls, tokens: torch.Tensor, n_nodes: torch.Tensor | None = None) -> "DraftTree":
        """Trees without branches: each token follows the one before it.

        Args:
            tokens: int32 (B, N).
            n_nodes: int32 (B,), how many of them each tree has; None: all.
        """
        batch, nodes = tokens.shape
        parent = torch.arange(-1, nodes - 1, dtype=torch.int32, device=tokens.device).expand(batch, nodes)
        if n_nodes is None:
            n_nodes = torch.full((batch,), nodes, dtype=torch.int32, device=tokens.device)
            return cls(parent.contiguous(), tokens, n_nodes)
        used = torch.arange(nodes, device=tokens.device) < n_nodes[:, None]
        return cls(torch.where(used, parent, -2), torch.where(used, tokens, 0), n_nodes)

    def finalize(self, seq_lens: torch.Tensor) -> TreeLinks:
        """See :func:`tree_finalize`."""
        return tree_finalize(self.parent, self.n_nodes, seq_lens)

    def to(self, device) -> "DraftTree":
        """The same trees on another device."""
        return DraftTree(*(t.to(device) for t in self))


def _empty_tree(like: torch.Tensor, batch: int, nodes: int) -> tuple[torch.Tensor, ...]:
    new = [like.new_empty(shape, dtype=torch.int32) for shape in ((batch, nodes), (batch, nodes), (batch,))]
    return tuple(new)


def _new_template_tree(parent, rank, table, root_tokens):
    return _empty_tree(table, root_tokens.numel(), parent.numel())


def _tree_from_template(parent, rank, table, root_tokens):
    tree = _new_template_tree(parent, rank, table, root_tokens)
    _C.tree_from_template(parent, rank, table, root_tokens, *tree)
    return tree


_tree_from_template_op = register(
    "tree_from_template(Tensor parent, Tensor rank, Tensor table, Tensor root_tokens) -> (Tensor, Tensor, Tensor)",
    _tree_from_template,
    fake=_new_template_tree,
)


def tree_from_template(template: TreeTemplate, table: torch.Tensor, root_tokens: torch.Tensor) -> DraftTree:
    """Fills a static tree shape with the candidates of a table: ``tokens[i] = table[tokens[parent[i]], rank[i]]``.

    The draft of Token Recycling (Luo et al., 2024, arXiv:2408.08696).

    Args:
        template: ``parent`` and ``rank``, int32 (N,).
        table: int32 (V, C), the candidates that may follow each token; a value outside [0, V) stands for none: that
            node and its subtree are left out, and the nodes that remain move up in order.
        root_tokens: int32 (B,), the last committed token of each sequence.

    Raises:
        ValueError: wrong shape; on CPU, a bad template or root token. On CUDA those drop their node and the next
            tilewise call on the device raises.
        TypeError: wrong dtype.
    """
    check_tensors("tree_from_template", table=table, root_tokens=root_tokens)
    parent, rank = (t.to(table.device) for t in template)
    return DraftTree(*_tree_from_template_op(parent, rank, table, root_tokens))


def _new_sequence_tree(sequences, root_tokens, max_nodes):
    return _empty_tree(sequences, root_tokens.numel(), max_nodes)


def _tree_from_sequences(sequences, root_tokens, max_nodes):
    if not 1 <= max_nodes <= MAX_NODES:
        raise ValueError(f"tree_from_sequences: max_nodes is {max_nodes}, expected 1 to {MAX_NODES}")
    tree = _new_sequence_tree(sequences, root_tokens, max_nodes)
    _C.tree_from_sequences(sequences, root_tokens, *tree)
    return tree


_tree_from_sequences_op = register(
    "tree_from_sequences(Tensor sequences, Tensor root_tokens, int max_nodes) -> (Tensor, Tensor, Tensor)",
    _tree_from_sequences,
    fake=_new_sequence_tree,
)


def tree_from_sequences(
    sequences: torch.Tensor, root_tokens: torch.Tensor, *, max_nodes: int | None = None
) -> DraftTree:
    """Merges draft continuations into one prefix tree per sequence of the batch, shared prefixes once.

    So that one pass verifies them all (Miao et al., 2024, SpecInfer, arXiv:2305.09781).

    Args:
        sequences: int32 (B, width, length), continuations of the root such as n-gram matches, most important first;
            each ends at its first negative token.
        root_tokens: int32 (B,).
        max_nodes: N of the result; tokens that find no free slot are left out. Default: room for all, at most 256.

    Returns:
        A :class:`DraftTree` of N nodes; tokens stand in the order in which they were first met.

    Raises:
        ValueError: wrong shape, or max_nodes outside 1 to 256.
        TypeError: wrong dtype.
    """
    check_tensors("tree_from_sequences", sequences=sequences, root_tokens=root_tokens)
    if max_nodes is None:
        max_nodes = min(MAX_NODES, 1 + sequences[0].numel()) if sequences.ndim == 3 and len(sequences) else 1
    return DraftTree(*_tree_from_sequences_op(sequences, root_tokens, max_nodes))


_table_update_op = register(
    "table_update(Tensor(a!) table, Tensor tokens, Tensor topk, Tensor? n_nodes) -> ()",
    core("table_update"),
    fake=lambda table, tokens, topk, n_nodes: None,
)


def table_update(
    table: torch.Tensor, tokens: torch.Tensor, topk: torch.Tensor, *, n_nodes: torch.Tensor | None = None
) -> None:
    """Writes fresh candidates into a table, in place: ``table[tokens[b, i]] = topk[b, i]``.

    Deterministic: of several rows for one token, the last in (b, i) order stays (Token Recycling's update,
    arXiv:2408.08696, with a winner fixed).

    Args:
        table: int32 (V, C).
        tokens: int32 (B, N), the tokens that were evaluated.
        topk: int32 (B, N, C), the likeliest successors of each, best first.
        n_nodes: int32 (B,), how many of the N count; None: all.

    Raises:
        ValueError: wrong shape; on CPU, a token outside the table (nothing is written). On CUDA it is skipped and the
            next tilewise call on the device raises.
        TypeError: wrong dtype.
    """
    check_tensors("table_update", table=table, tokens=tokens, topk=topk, n_nodes=n_nodes)
    _table_update_op(table, tokens, topk, n_nodes)
    torch.autograd.graph.increment_version(table)
