"""Sequences of different lengths without padding between them.

:func:`pack` chooses which sequences share a row, :func:`unpad` and :func:`pad` carry tensors between padded rows and
packed tokens, and :func:`tilewise.attention_varlen` keeps packed sequences apart, so that results are those of the
sequences alone (Krell et al., Packing without cross-contamination, arXiv:2107.02027; Zhao et al., Prepacking,
arXiv:2404.09529)::

    packing = pack(lengths)                                # n sequences in fewer rows of the longest's length
    tokens = unpad(prompts, packing)                       # (n, S) -> (T,), bin after bin
    q, k, v = project(embed(tokens), packing.positions)    # (T, H, D)
    cu, longest = packing.cu_seqlens, packing.max_seqlen
    out = attention_varlen(q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True)
    out = pad(out, packing)                                # (n, S, H, D)
    rows = pad(tokens, packing.bin_lengths, length=packing.capacity)   # where a layer wants rows: (bins, capacity)

The same call serves chunked prefill (Agrawal et al., SARATHI, arXiv:2308.16369): one batch holds a chunk of C prompt
tokens and several decodes, C and 1 queries long, with past + C and past + 1 keys. Causality is bottom-right aligned in
each sequence, which is the chunk's offset::

    cu_q, cu_k = offsets([C, 1, 1]), offsets([past[0] + C, past[1] + 1, past[2] + 1])
    out = attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=C, max_seqlen_k=longest, causal=True)

Where keys and values stand in pages, :func:`tilewise.paged_attention_varlen` takes such a batch.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch

from tilewise._library import check_tensors

__all__ = ["Packing", "offsets", "pack", "pad", "unpad"]


@dataclass(frozen=True)
class Packing:
    """n sequences, packed bin after bin; index tensors are on the device that :func:`pack` was given.

    Attributes:
        lengths: tokens of each sequence, in the caller's order.
        capacity: the most tokens of a bin.
        bins: the sequences of each bin, in the order in which they stand in it.
        order: int64 (n,), the sequences in packed order: ``bins``, flat.
        cu_seqlens: int32 (n + 1,), where the sequences begin in packed order, and the end.
        positions: int32 (T,), of each token within its sequence.
    """

    lengths: tuple[int, ...]
    capacity: int
    bins: list[list[int]]
    order: torch.Tensor
    cu_seqlens: torch.Tensor
    positions: torch.Tensor

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def bin_lengths(self) -> list[int]:
        """Tokens of each bin; for :func:`pad` and :func:`unpad` where bins are to be rows."""
        return [sum(self.lengths[i] for i in members) for members in self.bins]


def offsets(lengths, device=None) -> torch.Tensor:
    """0 and the running sums of ``lengths``, as ``cu_seqlens`` arguments want them.

    Args:
        lengths: n non-negative integers, or an integer tensor (n,), which is copied to the host.
        device: of the result.

    Returns:
        int32 (n + 1,).

    Raises:
        ValueError: a negative length.
        TypeError: lengths that are not integers.
    """
    return torch.tensor([0, *accumulate(as_lengths("offsets", lengths))], dtype=torch.int32, device=device)


def pack(lengths, capacity=None, *, device=None) -> Packing:
    """First-fit-decreasing bins: the longest sequence first, each into the first bin that still has room.

    At most 11/9 of the least number of bins, plus 6/9. O(n log n).

    Args:
        lengths: n non-negative integers, or an integer tensor (n,), which is copied to the host.
        capacity: tokens of a bin; default the longest length.
        device: where the index tensors go; default that of ``lengths`` if it is a tensor, else the CPU.

    Raises:
        ValueError: a negative length, or one above the capacity.
        TypeError: lengths that are not integers.
    """
    if device is None:
        device = lengths.device if torch.is_tensor(lengths) else "cpu"
    lengths = as_lengths("pack", lengths)
    capacity = max(lengths, default=0) if capacity is None else capacity
    if max(lengths, default=0) > capacity:
        raise ValueError(f"pack: lengths has {max(lengths)}, expected at most {capacity} (capacity)")
    bins = _first_fit_decreasing(lengths, capacity)
    order = [i for members in bins for i in members]
    cu_seqlens = offsets([lengths[i] for i in order], device)
    positions = _positions([lengths[i] for i in order]).to(device, torch.int32)
    return Packing(tuple(lengths), capacity, bins, torch.tensor(order, device=device).long(), cu_seqlens, positions)


def unpad(padded, where) -> torch.Tensor:
    """The tokens of padded rows, one after the other; differentiable, and undone exactly by :func:`pad`.

    Args:
        padded: (B, S, ...), any dtype.
        where: the tokens: lengths of the rows (B integers or an integer tensor (B,)), a bool mask (B, S), True =
            token, or a :class:`Packing` of the B rows, whose order the result then has.

    Returns:
        (T, ...): the rows' tokens in their order. A mask, or lengths on a GPU, are waited for.

    Raises:
        ValueError: another number of rows or tokens than ``padded`` has.
        TypeError: arguments of other types.
    """
    check_tensors("unpad", padded=padded)
    if padded.ndim < 2:
        raise ValueError(f"unpad: padded has {padded.ndim} dimensions, expected at least 2")
    rows, length = padded.shape[:2]
    token, of_where = _tokens("unpad", where, length, padded.device)
    if of_where[0] != rows or (torch.is_tensor(where) and where.dtype == torch.bool and of_where[1] != length):
        raise ValueError(f"unpad: padded has shape {(rows, length)} in front, expected {of_where} (where's)")
    return padded.flatten(0, 1).index_select(0, token)


def pad(packed, where, *, length=None, value=0) -> torch.Tensor:
    """Packed tokens as padded rows, the inverse of :func:`unpad`; differentiable.

    Args:
        packed: (T, ...), any dtype.
        where: as for :func:`unpad`.
        length: S of the result; default the longest row, or the mask's S.
        value: what stands where there is no token.

    Returns:
        (B, S, ...).

    Raises:
        ValueError: another number of tokens than ``where`` has, or a row longer than ``length``.
        TypeError: arguments of other types.
    """
    check_tensors("pad", packed=packed)
    if packed.ndim < 1:
        raise ValueError("pad: packed has 0 dimensions, expected at least 1")
    token, (rows, length) = _tokens("pad", where, length, packed.device)
    if token.numel() != packed.shape[0]:
        raise ValueError(f"pad: packed has {packed.shape[0]} tokens, expected {token.numel()} (where's)")
    blank = packed.new_full((rows * length, *packed.shape[1:]), value)
    return blank.index_copy(0, token, packed).unflatten(0, (rows, length))


def as_lengths(operation, lengths) -> list[int]:
    if torch.is_tensor(lengths):
        if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.ndim != 1:
            got = f"{lengths.dtype} with {lengths.ndim} dimensions"
            raise TypeError(f"{operation}: lengths is {got}, expected integers with 1 dimension")
        lengths = lengths.tolist()
    lengths = list(lengths)
    for n in lengths:
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"{operation}: lengths has a {type(n).__name__}, expected integers")
        if n < 0:
            raise ValueError(f"{operation}: lengths has {n}, expected at least 0")
    return lengths


def _first_fit_decreasing(lengths, capacity):
    """Bins of indices. A tree of maxima over the bins' free room finds the first that fits in O(log n)."""
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # node i has children 2i and 2i + 1
    bins = [[] for _ in lengths]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < lengths[i])
        bins[node - leaves].append(i)
        room[node] -= lengths[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [members for members in bins if members]


def _positions(lengths) -> torch.Tensor:
    """int64 (T,): 0 .. n - 1 for every length n."""
    n = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    starts = n.cumsum(0) - n
    return torch.arange(int(n.sum()), device="cpu") - starts.repeat_interleave(n)


def _tokens(operation, where, length, device):
    """(int64 (T,) places in B x S rows, flat, in packed order; (B, S)); S is the longest if ``length`` is None."""
    if torch.is_tensor(where) and where.dtype == torch.bool:
        return _tokens_of_mask(operation, where, length, device)
    if isinstance(where, Packing):
        lengths, rows = where.lengths, where.order.cpu()
    else:
        lengths = as_lengths(operation, where)
        rows = torch.arange(len(lengths), device="cpu")
    longest = max(lengths, default=0)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"{operation}: where has a length of {longest}, expected at most {length}")
    in_order = torch.tensor(lengths, dtype=torch.int64, device="cpu")[rows]
    place = (rows * length).repeat_interleave(in_order) + _positions(in_order.tolist())
    return place.to(device), (len(lengths), length)


def _tokens_of_mask(operation, mask, length, device):
    if mask.ndim != 2:
        raise ValueError(f"{operation}: where has {mask.ndim} dimensions, expected 2 (a mask of rows)")
    rows, columns = mask.shape
    length = columns if length is None else length
    if operation == "pad" and length < columns:
        raise ValueError(f"pad: length is {length}, expected at least {columns} (the mask's)")
    row, column = mask.nonzero(as_tuple=True)
    return (row * length + column).to(device), (rows, columns if operation == "unpad" else length)
