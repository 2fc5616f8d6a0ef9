"""2:4 sparsity (Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv:2104.08378)."""

from __future__ import annotations

import torch

from tilewise.sparse.operators import nm_linear_op
from tilewise.sparse.weight import DTYPES, CompressedWeight, expect_keys, expect_tensor


class NMSparse(CompressedWeight):
    """2:4 sparsity: of every four consecutive inputs of a row, two are kept (Mishra et al., arXiv:2104.08378).

    values (out, in / 2) holds the kept values in the order of their inputs; indices uint8 (out, ceil(in / 8)) holds one
    nibble per group of four, low nibble first: bits 0-1 the position of the first kept value, bits 2-3 that of the
    second (so 4, 8, 9, c, d or e; the unused last nibble of an odd number of groups is 0). This is the order in which
    the sparse tensor cores read their metadata, so every device works from the portable format itself.

    Args:
        values: (out, in / 2) float32, float16 or bfloat16.
        indices: uint8 (out, ceil(in / 8)), on the same device.

    Raises:
        ValueError: shapes that do not fit, indices that are not two rising positions of four.
        TypeError: not a tensor, or another dtype.
    """

    format = "nm_2_4"

    def __init__(self, values: torch.Tensor, indices: torch.Tensor):
        expect_tensor("NMSparse", "values", values, DTYPES, (None, None))
        out, columns = values.shape[0], 2 * values.shape[1]
        if columns % 4:
            raise ValueError(f"NMSparse: values has {values.shape[1]} columns, expected an even number")
        expected = (out, (columns + 7) // 8)
        expect_tensor("NMSparse", "indices", indices, (torch.uint8,), expected, values.device)
        indices = indices.contiguous()
        _expect_legal(indices, columns)
        super().__init__(values.contiguous(), (out, columns))
        self._indices = indices

    @property
    def indices(self) -> torch.Tensor:
        """uint8 (out, ceil(in / 8))."""
        return self._indices

    @classmethod
    def from_dense(cls, w: torch.Tensor, n: int = 2, m: int = 4, *, mask: torch.Tensor | None = None) -> NMSparse:
        """Keeps the ``n`` entries of largest magnitude in every ``m`` along the inputs; of equals, the lower index.

        Args:
            w: float32, float16 or bfloat16 (out, in), in a multiple of 4. A NaN counts as larger than every number.
            n, m: 2 and 4.
            mask: bool (out, in), two True in every four: what to keep instead.

        Raises:
            ValueError: in is not a multiple of 4, or mask does not keep two in every four.
            TypeError: wrong dtype.
            NotImplementedError: any other n and m.
        """
        expect_tensor("NMSparse.from_dense", "w", w, DTYPES, (None, None))
        if (n, m) != (2, 4):
            raise NotImplementedError(f"NMSparse.from_dense: n, m are {n}, {m}, expected 2, 4")
        out, columns = w.shape
        if columns % 4:
            raise ValueError(f"NMSparse.from_dense: w has {columns} input columns, expected a multiple of 4")
        groups = w.detach().reshape(out, columns // 4, 4)
        if mask is None:
            size = groups.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
            kept = size.sort(dim=-1, descending=True, stable=True).indices[..., :2].sort(dim=-1).values
        else:
            expect_tensor("NMSparse.from_dense", "mask", mask, (torch.bool,), (out, columns), w.device)
            marks = mask.reshape(groups.shape)
            if not bool((marks.sum(-1) == 2).all()):
                raise ValueError("NMSparse.from_dense: mask keeps another number than two of some four, expected two")
            kept = marks.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :2].sort(dim=-1).values
        values = groups.gather(-1, kept).reshape(out, columns // 2)
        return cls(values, _pack_nibbles(kept))

    def mask(self) -> torch.Tensor:
        """bool (out, in): where values are kept."""
        return torch.zeros(self.shape, dtype=torch.bool, device=self.device).scatter_(1, self._columns(), True)

    def _columns(self) -> torch.Tensor:
        """int64 (out, in / 2): the input of every kept value."""
        groups = self.shape[1] // 4
        shifts = torch.arange(0, 8, 2, device=self.device, dtype=torch.uint8)
        within = (self._indices.unsqueeze(-1) >> shifts & 3).flatten(1)[:, : 2 * groups].long()
        return within + 4 * torch.arange(groups, device=self.device).repeat_interleave(2)

    def to_dense(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device).scatter(1, self._columns(), self.values)

    def state_dict(self) -> dict:
        return {"format": self.format, "values": self.values.detach(), "indices": self._indices}

    @classmethod
    def _from_state(cls, state):
        expect_keys("NMSparse.from_state_dict", state, ("format", "values", "indices"))
        return cls(state["values"], state["indices"])

    def to(self, device) -> NMSparse:
        if torch.device(device) == self.device:
            return self
        return NMSparse(self.values.to(device), self._indices.to(device))

    def _linear(self, x, bias):
        return nm_linear_op(x, self.values, self._indices, bias)


def _pack_nibbles(kept: torch.Tensor) -> torch.Tensor:
    """uint8 (out, ceil(groups / 2)) of positions (out, groups, 2)."""
    nibbles = (kept[..., 0] | kept[..., 1] << 2).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous()


def _expect_legal(indices: torch.Tensor, columns: int) -> None:
    low, high = indices & 15, indices >> 4
    if columns % 8 and indices.numel():
        if bool((high[:, -1] != 0).any()):
            raise ValueError("NMSparse: indices has bits in the unused last nibble of a row, expected 0")
        high = high[:, :-1]
    for nibbles in (low, high):
        if not bool(((nibbles & 3) < (nibbles >> 2)).all()):
            raise ValueError("NMSparse: indices holds a group that is not two rising positions, expected only those")
