"""Unstructured sparsity: compressed sparse rows, and the plan by which the kernels walk them."""

from __future__ import annotations

import torch

from tilewise.sparse.operators import csr_linear_op
from tilewise.sparse.weight import DTYPES, CompressedWeight, expect_ints, expect_keys, expect_tensor


class CSR(CompressedWeight):
    """Unstructured sparsity in compressed sparse rows; products with it run on CPU.

    Args:
        values: (nnz,) float32, float16 or bfloat16, row after row.
        crow: int32 (out + 1,), from 0 to nnz: row i has values ``crow[i]`` to ``crow[i + 1]``.
        col: int32 (nnz,), the input of each value, rising within every row.
        columns: in.

    Raises:
        ValueError: shapes that do not fit, offsets or columns out of order or range, tensors on several devices.
        TypeError: not a tensor, or another dtype.
    """

    format = "csr"

    def __init__(self, values: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, columns: int):
        expect_tensor("CSR", "values", values, DTYPES, (None,))
        nnz = values.shape[0]
        expect_tensor("CSR", "crow", crow, (torch.int32,), (None,), values.device)
        expect_tensor("CSR", "col", col, (torch.int32,), (nnz,), values.device)
        if crow.shape[0] == 0:
            raise ValueError("CSR: crow is empty, expected one entry more than rows")
        counts = crow.long().diff()
        if int(crow[0]) != 0 or int(crow[-1]) != nnz or bool((counts < 0).any()):
            raise ValueError(f"CSR: crow does not rise from 0 to {nnz} (the number of values), expected that")
        if bool(((col < 0) | (col >= columns)).any()):
            raise ValueError(f"CSR: col holds a column out of range, expected 0 <= column < {columns}")
        rows = torch.arange(counts.shape[0], device=crow.device).repeat_interleave(counts)
        if bool(((col[1:] <= col[:-1]) & (rows[1:] == rows[:-1])).any()):
            raise ValueError("CSR: col does not rise within a row, expected rising columns")
        super().__init__(values.contiguous(), (crow.shape[0] - 1, columns))
        self._crow, self._col, self._rows = crow.contiguous(), col.contiguous(), rows
        self._tile = _tile_columns(nnz, *self._shape)
        self._plans = {}

    @property
    def crow(self) -> torch.Tensor:
        """int32 (out + 1,)."""
        return self._crow

    @property
    def col(self) -> torch.Tensor:
        """int32 (nnz,)."""
        return self._col

    @classmethod
    def from_dense(cls, w: torch.Tensor, *, mask: torch.Tensor | None = None) -> CSR:
        """The entries that are not zero, or those that a mask chooses.

        Args:
            w: (out, in) float32, float16 or bfloat16.
            mask: bool (out, in), True = keep, zeros too.

        Raises:
            ValueError: wrong shape, or another device.
            TypeError: wrong dtype.
        """
        expect_tensor("CSR.from_dense", "w", w, DTYPES, (None, None))
        if mask is None:
            mask = w != 0
        else:
            expect_tensor("CSR.from_dense", "mask", mask, (torch.bool,), tuple(w.shape), w.device)
        counts = mask.sum(1)
        crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return cls(w.detach()[mask], crow, mask.nonzero()[:, 1].to(torch.int32), w.shape[1])

    def mask(self) -> torch.Tensor:
        """bool (out, in): where values are kept."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        return mask.index_put((self._rows, self._col.long()), torch.ones((), dtype=torch.bool, device=self.device))

    def to_dense(self) -> torch.Tensor:
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return dense.index_put((self._rows, self._col.long()), self.values)

    def state_dict(self) -> dict:
        entries = {"values": self.values.detach(), "crow": self._crow, "col": self._col}
        return {"format": self.format, "columns": self.shape[1], **entries}

    @classmethod
    def _from_state(cls, state):
        expect_keys("CSR.from_state_dict", state, ("format", "values", "crow", "col", "columns"))
        expect_ints("CSR.from_state_dict", state, ("columns",))
        return cls(state["values"], state["crow"], state["col"], state["columns"])

    def to(self, device) -> CSR:
        if torch.device(device) == self.device:
            return self
        return CSR(self.values.to(device), self._crow.to(device), self._col.to(device), self.shape[1])

    def _matrix(self) -> list[torch.Tensor]:
        if "forward" not in self._plans:
            plan = _csr_plan(self._rows, self._col.long(), self._tile, *self.shape)
            self._plans["forward"] = [self._crow, self._col, *plan]
        return self._plans["forward"]

    def _transposed(self) -> list[torch.Tensor]:
        if "transposed" not in self._plans:
            order = self._col.long().argsort(stable=True)
            rows, cols = self._col.long()[order], self._rows[order]
            counts = torch.bincount(rows, minlength=self.shape[1])
            crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
            plan = _csr_plan(rows, cols, self._tile, self.shape[1], self.shape[0])
            self._plans["transposed"] = [crow, cols.to(torch.int32), *plan, order.to(torch.int32)]
        return self._plans["transposed"]

    def _linear(self, x, bias):
        if self.device.type != "cpu":
            raise NotImplementedError(f"linear: weight is CSR on {self.device}, expected CSR on CPU or another format")
        needs_dx = x.requires_grad and torch.is_grad_enabled()
        transposed = self._transposed() if needs_dx else []
        return csr_linear_op(x, self.values, bias, self._matrix(), transposed, self.shape[1], self._tile)


_ROW_BLOCK = 128  # kCsrRows of tilewise/sparse.h


def _tile_columns(nnz: int, out: int, columns: int) -> int:
    """Sparser matrices take wider tiles, so that a row still has several entries in each (measured)."""
    density = nnz / max(out * columns, 1)
    return 64 if density > 0.125 else 128 if density > 0.07 else 256


def _csr_plan(rows, cols, tile, out, columns) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tile_ptr, records and within of tilewise/sparse.h: one record per run of a row's entries within a tile of
    columns; a tile's records in rising order of length."""
    across = -(-columns // tile)
    tiles = -(-out // _ROW_BLOCK) * across
    run = rows * across + cols // tile
    run, count = torch.unique_consecutive(run, return_counts=True)
    first = count.cumsum(0) - count
    row = run // across if across else run
    where = row // _ROW_BLOCK * across + run % max(across, 1)
    order = (where * (tile + 1) + count).argsort(stable=True)
    row, first, count, where = row[order], first[order], count[order], where[order]
    position = count.cumsum(0) - count
    entries = (first - position).repeat_interleave(count) + torch.arange(cols.shape[0], device=cols.device)
    records = torch.stack([row, first, count, position], dim=1).to(torch.int32)
    tile_ptr = torch.searchsorted(where, torch.arange(tiles + 1, device=where.device))
    return tile_ptr.to(torch.int32), records, (cols % tile)[entries].to(torch.uint8)
