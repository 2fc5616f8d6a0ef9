"""Paged caches: writing the nodes' keys and values, and keeping those of the accepted ones."""

from collections.abc import Sequence

import torch

from tilewise._library import check_tensors, core, register

_append_kv_op = register(
    "append_kv(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor start, Tensor k, Tensor v, "
    "Tensor? n_nodes) -> ()",
    core("append_kv"),
    fake=lambda k_pages, v_pages, block_table, start, k, v, n_nodes: None,
)


def append_kv(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    start: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    n_nodes: torch.Tensor | None = None,
) -> None:
    """Writes new keys and values into the pages, in place: token i of sequence b goes to position ``start[b] + i``.

    Args:
        k_pages, v_pages: (P, page_size, Hkv, D) float32, float16 or bfloat16.
        block_table: int32 (B, pages per sequence).
        start: int32 (B,); for a tree, ``prefix_len``.
        k, v: (B, N, Hkv, D) of the pages' dtype.
        n_nodes: int32 (B,), how many of the N are written; None: all.

    Raises:
        ValueError: wrong shape; on CPU, positions beyond the block table or pages beyond the pool (nothing is
            written). On CUDA those are skipped and the next tilewise call on the device raises.
        TypeError: wrong dtype.
    """
    check_tensors(
        "append_kv",
        k_pages=k_pages,
        v_pages=v_pages,
        block_table=block_table,
        start=start,
        k=k,
        v=v,
        n_nodes=n_nodes,
    )
    _append_kv_op(k_pages, v_pages, block_table, start, k, v, n_nodes)
    torch.autograd.graph.increment_version((k_pages, v_pages))


_compact_kv_op = register(
    "compact_kv(Tensor(a!)[] k_pages, Tensor(b!)[] v_pages, Tensor block_table, Tensor prefix_len, Tensor path, "
    "Tensor accept_len) -> ()",
    core("compact_kv"),
    fake=lambda k_pages, v_pages, block_table, prefix_len, path, accept_len: None,
)


def compact_kv(
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    block_table: torch.Tensor,
    prefix_len: torch.Tensor,
    path: torch.Tensor,
    accept_len: torch.Tensor,
) -> None:
    """Moves the accepted nodes' keys and values next to the prefix, in every layer, in place, in one launch.

    Node ``path[b, j]`` moves from position ``prefix_len[b] + path[b, j]`` to ``prefix_len[b] + j`` for
    1 <= j <= accept_len[b]; the root is already in place. Afterwards ``prefix_len + accept_len + 1`` tokens are
    committed.

    Args:
        caches: (k_pages, v_pages) of each layer, all of one shape, dtype and layout (P, page_size, Hkv, D).
        block_table: int32 (B, pages per sequence), shared by the layers.
        prefix_len: int32 (B,).
        path, accept_len: int32 (B, depth + 1) and (B,), from a verification.

    Raises:
        ValueError: wrong shape; on CPU, a path that does not rise or positions beyond the pages (nothing moves). On
            CUDA those sequences are skipped and the next tilewise call on the device raises.
        TypeError: wrong dtype.
    """
    check_tensors("compact_kv", block_table=block_table, prefix_len=prefix_len, path=path, accept_len=accept_len)
    for pair in caches:
        check_tensors("compact_kv", k_pages=pair[0], v_pages=pair[1])
    k_pages, v_pages = [pair[0] for pair in caches], [pair[1] for pair in caches]
    if not k_pages:
        return
    _compact_kv_op(k_pages, v_pages, block_table, prefix_len, path, accept_len)
    torch.autograd.graph.increment_version((*k_pages, *v_pages))
