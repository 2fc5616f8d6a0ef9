"""Which drafts the target accepts."""

from typing import NamedTuple

import torch

from tilewise import _C
from tilewise._library import check_tensors, register


class Verified(NamedTuple):
    """The accepted path of each tree; L is the greatest depth that was allowed.

    Attributes:
        accept_len: int32 (B,), accepted drafts (the root does not count).
        path: int32 (B, L + 1), node indices from the root on; -1 beyond ``accept_len``.
        out_tokens: int32 (B, L + 1), the accepted tokens, then the target's own next token; -1 beyond. This step adds
            ``out_tokens[b, : accept_len[b] + 1]`` to the text; the last of them is the next tree's root.
    """

    accept_len: torch.Tensor
    path: torch.Tensor
    out_tokens: torch.Tensor


def _new_verified(parent, tokens, logits, n_nodes, max_depth):
    batch = parent.shape[0]
    shapes = ((batch,), (batch, max_depth + 1), (batch, max_depth + 1))
    return tuple(parent.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _verify_greedy(parent, tokens, logits, n_nodes, max_depth):
    if not 0 <= max_depth <= 255:
        raise ValueError(f"verify_greedy: max_depth is {max_depth}, expected 0 to 255")
    verified = _new_verified(parent, tokens, logits, n_nodes, max_depth)
    _C.verify_greedy(parent, tokens, logits, n_nodes, *verified)
    return verified


_verify_greedy_op = register(
    "verify_greedy(Tensor parent, Tensor tokens, Tensor logits, Tensor n_nodes, int max_depth) "
    "-> (Tensor, Tensor, Tensor)",
    _verify_greedy,
    fake=_new_verified,
)


def verify_greedy(
    parent: torch.Tensor,
    tokens: torch.Tensor,
    logits: torch.Tensor,
    *,
    n_nodes: torch.Tensor,
    max_depth: int | None = None,
) -> Verified:
    """Follows the target's greedy choices down each tree for as long as a child holds the chosen token.

    Lossless: the text equals that of plain greedy decoding with the same logits. Only the logits of the nodes on the
    path are read. The greedy choice is torch.argmax's: the first of equal maxima, and NaN above every number. Of
    siblings with one token the first counts (Miao et al., 2024, SpecInfer, arXiv:2305.09781).

    Args:
        parent, tokens: int32 (B, N).
        logits: (B, N, V) float32, float16 or bfloat16; or their argmax, int32 (B, N).
        n_nodes: int32 (B,).
        max_depth: the most drafts that may be accepted, which fixes the shapes of the result; default N - 1.

    Returns:
        :class:`Verified`: accept_len (B,), path and out_tokens (B, max_depth + 1), int32.

    Raises:
        ValueError: wrong shape; on CPU, a bad tree. On CUDA a bad ``n_nodes`` is clamped and the next tilewise call on
            the device raises.
        TypeError: wrong dtype.
    """
    check_tensors("verify_greedy", parent=parent, tokens=tokens, logits=logits, n_nodes=n_nodes)
    if max_depth is None:
        max_depth = max(0, parent.shape[1] - 1) if parent.ndim == 2 else 0
    return Verified(*_verify_greedy_op(parent, tokens, logits, n_nodes, max_depth))
