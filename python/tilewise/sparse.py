"""Linear layers with sparse weights: ``y = x W^T + bias`` from the kept values alone.

Formats: :class:`NMSparse` keeps two of every four consecutive inputs (Mishra et al. 2021, "Accelerating Sparse Deep
Neural Networks"), :class:`CSR` any set of entries. Both are trained through ``weight.values``.
"""

from __future__ import annotations

import torch

from tilewise import _C
from tilewise._library import check_tensors, register, register_autograd

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---- operators; outputs of malformed inputs are sized 0 where there is no size, and the core says what is wrong ----
def _size(t: torch.Tensor, dim: int) -> int:
    return t.shape[dim] if dim < t.ndim else 0


def _nm_linear(x, values, indices, bias):
    y = x.new_empty(_size(x, 0), _size(values, 0))
    _C.nm_linear(x, values, indices, bias, y)
    return y


def _nm_linear_dx(dy, values, indices):
    dx = dy.new_empty(_size(dy, 0), 2 * _size(values, 1))
    _C.nm_linear_dx(dy, values, indices, dx)
    return dx


def _nm_linear_dvalues(dy, x, indices):
    dvalues = dy.new_empty(_size(dy, 1), _size(x, 1) // 2)
    _C.nm_linear_dvalues(dy, x, indices, dvalues)
    return dvalues


def _column_sum(dy):
    total = dy.new_empty(_size(dy, 1))
    _C.column_sum(dy, total)
    return total


_nm_linear_op = register(
    "nm_linear(Tensor x, Tensor values, Tensor indices, Tensor? bias) -> Tensor",
    _nm_linear,
    fake=lambda x, values, indices, bias: x.new_empty(_size(x, 0), _size(values, 0)),
)
_nm_linear_dx_op = register(
    "nm_linear_dx(Tensor dy, Tensor values, Tensor indices) -> Tensor",
    _nm_linear_dx,
    fake=lambda dy, values, indices: dy.new_empty(_size(dy, 0), 2 * _size(values, 1)),
)
_nm_linear_dvalues_op = register(
    "nm_linear_dvalues(Tensor dy, Tensor x, Tensor indices) -> Tensor",
    _nm_linear_dvalues,
    fake=lambda dy, x, indices: dy.new_empty(_size(dy, 1), _size(x, 1) // 2),
)
_column_sum_op = register("column_sum(Tensor dy) -> Tensor", _column_sum, fake=lambda dy: dy.new_empty(_size(dy, 1)))


def _save_nm(ctx, inputs, output):
    x, values, indices, _ = inputs
    needs_x, needs_values, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_values else None, values if needs_x else None, indices)


def _nm_backward(ctx, dy):
    x, values, indices = ctx.saved_tensors
    dy = dy.contiguous()
    needs_x, needs_values, _, needs_bias = ctx.needs_input_grad
    return (
        _nm_linear_dx_op(dy, values, indices) if needs_x else None,
        _nm_linear_dvalues_op(dy, x, indices) if needs_values else None,
        None,
        _column_sum_op(dy) if needs_bias else None,
    )


register_autograd("nm_linear", _nm_backward, _save_nm)


def _csr_linear(x, values, bias, matrix, transposed, columns, tile):
    y = x.new_empty(_size(x, 0), max(_size(matrix[0], 0) - 1, 0))
    order = matrix[4] if len(matrix) > 4 else None
    crow, col, tile_ptr, records = matrix[:4]
    _C.csr_linear(x, values, crow, col, columns, tile, tile_ptr, records, order, bias, y)
    return y


def _csr_linear_dvalues(dy, x, matrix, tile):
    crow, col, tile_ptr, records = matrix
    dvalues = dy.new_empty(_size(col, 0))
    _C.csr_linear_dvalues(dy, x, crow, col, _size(x, 1), tile, tile_ptr, records, dvalues)
    return dvalues


# matrix = [crow, col, tile_ptr, records], transposed = the same of W^T and the order of its values, or nothing where no
# gradient of x is asked for.
_csr_linear_op = register(
    "csr_linear(Tensor x, Tensor values, Tensor? bias, Tensor[] matrix, Tensor[] transposed, int columns, int tile)"
    " -> Tensor",
    _csr_linear,
    fake=lambda x, values, bias, matrix, *_: x.new_empty(_size(x, 0), max(_size(matrix[0], 0) - 1, 0)),
)
_csr_linear_dvalues_op = register(
    "csr_linear_dvalues(Tensor dy, Tensor x, Tensor[] matrix, int tile) -> Tensor",
    _csr_linear_dvalues,
    fake=lambda dy, x, matrix, tile: dy.new_empty(_size(matrix[1], 0)),
)


def _save_csr(ctx, inputs, output):
    x, values, _, matrix, transposed, columns, ctx.tile = inputs
    ctx.save_for_backward(x, values, *matrix, *transposed)


def _csr_backward(ctx, dy):
    x, values, *structure = ctx.saved_tensors
    matrix, transposed = structure[:4], structure[4:]
    dy = dy.contiguous()
    needs_x, needs_values, needs_bias, *_ = ctx.needs_input_grad
    out = matrix[0].shape[0] - 1
    return (
        _csr_linear_op(dy, values, None, transposed, [], out, ctx.tile) if needs_x else None,
        _csr_linear_dvalues_op(dy, x, matrix, ctx.tile) if needs_values else None,
        _column_sum_op(dy) if needs_bias else None,
        [None] * len(matrix),
        [None] * len(transposed),
        None,
        None,
    )


register_autograd("csr_linear", _csr_backward, _save_csr)


# ---- weights ----
class CompressedWeight:
    """A weight (out, in) stored by its kept values. ``weight.values`` is an ordinary tensor: make it require gradients
    (or set it to a ``torch.nn.Parameter`` of the same shape) to train it, with the pattern fixed."""

    format: str
    _formats: dict[str, type[CompressedWeight]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        CompressedWeight._formats[cls.format] = cls

    def __init__(self, values: torch.Tensor, shape):
        self._shape = torch.Size(shape)
        self._values = values

    @property
    def values(self) -> torch.Tensor:
        return self._values

    @values.setter
    def values(self, new: torch.Tensor) -> None:
        old = self._values
        _expect_tensor(type(self).__name__, "values", new, (old.dtype,), tuple(old.shape), old.device)
        self._values = new

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        return self._values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the portable format (what ``state_dict`` holds)."""
        return sum(t.nbytes for t in self.state_dict().values() if isinstance(t, torch.Tensor))

    def __repr__(self):
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, nbytes={self.nbytes})"

    def to_dense(self) -> torch.Tensor:
        """The weight (out, in) with zeros where nothing is kept; differentiable in ``values``."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Tensors and plain numbers, the same on every device; :meth:`from_state_dict` takes them back."""
        raise NotImplementedError

    def to(self, device) -> CompressedWeight:
        """The same weight on another device (itself if it is there already)."""
        raise NotImplementedError

    @classmethod
    def from_state_dict(cls, state: dict) -> CompressedWeight:
        """Rebuilds a weight from :meth:`state_dict`.

        Raises:
            TypeError: an entry of the wrong type or dtype.
            ValueError: missing or unknown entries, another format, shapes that do not fit, illegal indices.
        """
        if not isinstance(state, dict):
            raise TypeError(f"{cls.__name__}.from_state_dict: state is a {type(state).__name__}, expected a dict")
        name = state.get("format")
        known = CompressedWeight._formats if cls is CompressedWeight else {cls.format: cls}
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"{cls.__name__}.from_state_dict: format is {name!r}, expected one of {sorted(known)}")
        return known[name]._from_state(state)

    @classmethod
    def _from_state(cls, state):
        raise NotImplementedError

    def _linear(self, x, bias):
        raise NotImplementedError


def _expect_tensor(operation, name, value, dtypes, shape, device=None):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{operation}: {name} is a {type(value).__name__}, expected a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{operation}: {name} has layout {value.layout}, expected torch.strided")
    if value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{operation}: {name} has dtype {str(value.dtype).removeprefix('torch.')}, expected {expected}")
    if value.ndim != len(shape) or any(e not in (None, n) for n, e in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{operation}: {name} has shape {tuple(value.shape)}, expected {shape} (None: any)")
    if device is not None and value.device != device:
        raise ValueError(f"{operation}: {name} is on {value.device}, expected {device}")


def _expect_keys(operation, state, keys):
    if set(state) != set(keys):
        raise ValueError(f"{operation}: state has entries {sorted(map(str, state))}, expected {sorted(keys)}")


def _expect_ints(operation, state, keys):
    for key in keys:
        if type(state[key]) is not int:
            raise TypeError(f"{operation}: {key} is a {type(state[key]).__name__}, expected an int")
        if state[key] < 0:
            raise ValueError(f"{operation}: {key} is {state[key]}, expected at least 0")


class NMSparse(CompressedWeight):
    """2:4 sparsity: of every four consecutive inputs of a row, two are kept.

    values (out, in / 2) holds the kept values in the order of their inputs; indices uint8 (out, ceil(in / 8)) holds one
    nibble per group of four, low nibble first: bits 0-1 the position of the first kept value, bits 2-3 that of the
    second (so 4, 8, 9, c, d or e; the unused last nibble of an odd number of groups is 0). This is the order in which
    the sparse tensor cores read their metadata, so every device works from the portable format itself.
    """

    format = "nm_2_4"

    def __init__(self, values: torch.Tensor, indices: torch.Tensor):
        _expect_tensor("NMSparse", "values", values, _DTYPES, (None, None))
        out, columns = values.shape[0], 2 * values.shape[1]
        if columns % 4:
            raise ValueError(f"NMSparse: values has {values.shape[1]} columns, expected an even number")
        expected = (out, (columns + 7) // 8)
        _expect_tensor("NMSparse", "indices", indices, (torch.uint8,), expected, values.device)
        indices = indices.contiguous()
        _expect_legal(indices, columns)
        super().__init__(values.contiguous(), (out, columns))
        self._indices = indices

    @property
    def indices(self) -> torch.Tensor:
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
        _expect_tensor("NMSparse.from_dense", "w", w, _DTYPES, (None, None))
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
            _expect_tensor("NMSparse.from_dense", "mask", mask, (torch.bool,), (out, columns), w.device)
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
        _expect_keys("NMSparse.from_state_dict", state, ("format", "values", "indices"))
        return cls(state["values"], state["indices"])

    def to(self, device) -> NMSparse:
        if torch.device(device) == self.device:
            return self
        return NMSparse(self.values.to(device), self._indices.to(device))

    def _linear(self, x, bias):
        return _nm_linear_op(x, self.values, self._indices, bias)


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


class CSR(CompressedWeight):
    """Unstructured sparsity: crow int32 (out + 1,), col int32 (nnz,) rising within every row, values (nnz,)."""

    format = "csr"

    def __init__(self, values: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, columns: int):
        _expect_tensor("CSR", "values", values, _DTYPES, (None,))
        nnz = values.shape[0]
        _expect_tensor("CSR", "crow", crow, (torch.int32,), (None,), values.device)
        _expect_tensor("CSR", "col", col, (torch.int32,), (nnz,), values.device)
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
        return self._crow

    @property
    def col(self) -> torch.Tensor:
        return self._col

    @classmethod
    def from_dense(cls, w: torch.Tensor, *, mask: torch.Tensor | None = None) -> CSR:
        """The entries of w (out, in) that are not zero, or those where mask (bool, out, in) is True.

        Raises:
            TypeError: wrong dtype. ValueError: wrong shape.
        """
        _expect_tensor("CSR.from_dense", "w", w, _DTYPES, (None, None))
        if mask is None:
            mask = w != 0
        else:
            _expect_tensor("CSR.from_dense", "mask", mask, (torch.bool,), tuple(w.shape), w.device)
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
        _expect_keys("CSR.from_state_dict", state, ("format", "values", "crow", "col", "columns"))
        _expect_ints("CSR.from_state_dict", state, ("columns",))
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
            self._plans["transposed"] = [crow, cols.to(torch.int32), *plan, order]
        return self._plans["transposed"]

    def _linear(self, x, bias):
        if self.device.type != "cpu":
            raise NotImplementedError(f"linear: weight is CSR on {self.device}, expected CSR on CPU or another format")
        needs_dx = x.requires_grad and torch.is_grad_enabled()
        transposed = self._transposed() if needs_dx else []
        return _csr_linear_op(x, self.values, bias, self._matrix(), transposed, self.shape[1], self._tile)


_ROW_BLOCK = 128  # kCsrRows of tilewise/sparse.h


def _tile_columns(nnz: int, out: int, columns: int) -> int:
    """Sparser matrices take wider tiles, so that a row still has several entries in each (measured)."""
    density = nnz / max(out * columns, 1)
    return 64 if density > 0.125 else 128 if density > 0.07 else 256


def _csr_plan(rows, cols, tile, out, columns) -> tuple[torch.Tensor, torch.Tensor]:
    """tile_ptr and records of tilewise/sparse.h: one record per run of a row's entries within a tile of columns; a
    tile's records in rising order of length."""
    across = -(-columns // tile)
    tiles = -(-out // _ROW_BLOCK) * across
    run = rows * across + cols // tile
    run, count = torch.unique_consecutive(run, return_counts=True)
    first = count.cumsum(0) - count
    row = run // across if across else run
    where = row // _ROW_BLOCK * across + run % max(across, 1)
    order = (where * (tile + 1) + count).argsort(stable=True)
    row, first, count, where = row[order], first[order], count[order], where[order]
    records = torch.stack([row, first, count, count.cumsum(0) - count], dim=1).to(torch.int32)
    tile_ptr = torch.searchsorted(where, torch.arange(tiles + 1, device=where.device))
    return tile_ptr.to(torch.int32), records


# ---- public functions ----
def linear(x: torch.Tensor, weight: CompressedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x W^T + bias`` with a sparse weight; differentiable in x, bias and ``weight.values``.

    Args:
        x: (..., in) of the weight's dtype; float32, float16 or bfloat16. Sums are kept in float32.
        weight: :class:`NMSparse` or (on CPU) :class:`CSR`, (out, in).
        bias: (out,) of the same dtype.

    Returns:
        (..., out).

    Raises:
        ValueError: shapes that do not fit, or another device than the weight's.
        TypeError: wrong dtype, or not a tensor or weight.
        NotImplementedError: CSR on CUDA.
    """
    check_tensors("linear", x=x, bias=bias)
    if not isinstance(weight, CompressedWeight):
        raise TypeError(f"linear: weight is a {type(weight).__name__}, expected a CompressedWeight")
    out, columns = weight.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, expected (..., {columns}) (weight's)")
    if x.ndim == 2:
        return weight._linear(x, bias)
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return weight._linear(x.reshape(rows, columns), bias).reshape(*x.shape[:-1], out)


def matmul(weight: CompressedWeight, x: torch.Tensor) -> torch.Tensor:
    """``W x`` (out, n) with x (in, n); differentiable in x and ``weight.values``. Errors as in :func:`linear`."""
    check_tensors("matmul", x=x)
    if x.ndim != 2:
        raise ValueError(f"matmul: x has shape {tuple(x.shape)}, expected 2 dimensions")
    return linear(x.t().contiguous(), weight).t()
