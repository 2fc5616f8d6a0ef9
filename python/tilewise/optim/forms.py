"""The forms in which an optimizer holds a moment: which tensors stand for it, and the way from and to float32.

    form       tensors in a parameter's state (n elements, seen as a matrix of r rows and c columns)
    FLOAT      <name> float32 of the parameter's shape
    BLOCK8     <name> uint8 (ceil(n / 256), 256), <name>_scale float32 (ceil(n / 256),)
    BLOCK4     <name> uint8 (ceil(n / 128), 64), <name>_scale float32 (ceil(n / 128),)
    RANK1      <name> uint8 (ceil(n / 128), 64), <name>_maxima float32 (r + c,): of each row, then of each column
    FACTORED   <name>_means float32 (r + c,): of each row, then of each column

The names of the tensors tell the forms apart. All are in row-major order of the parameter's elements.
"""

import functools
import math
from dataclasses import dataclass

import torch

from tilewise.optim.quantize import dequantize_state, quantize_state

CODE_BYTES = {4: 64, 8: 256}  # of a block
BLOCK = {4: 128, 8: 256}  # elements


@dataclass(frozen=True)
class Form:
    """How a moment is held: bits per element, and what the names of its tensors add to the moment's."""

    label: str
    bits: int
    scale: str | None  # suffix of the scales' name
    codes: bool = True

    @property
    def by_matrix(self) -> bool:
        """Whether its scales belong to rows and columns."""
        return self.scale in ("_maxima", "_means")

    def layout(self, name: str, shape) -> dict:
        """{name of a tensor: (dtype, shape)} of a moment of a parameter of this shape."""
        if self.scale is None:
            return {name: (torch.float32, tuple(shape))}
        blocks = block_count(math.prod(shape), self.bits) if self.codes else 0
        scales = sum(as_matrix(shape)) if self.by_matrix else blocks
        codes = {name: (torch.uint8, (blocks, CODE_BYTES[self.bits]))} if self.codes else {}
        return codes | {name + self.scale: (torch.float32, (scales,))}


FLOAT = Form("float32", 32, None)
BLOCK8 = Form("block", 8, "_scale")
BLOCK4 = Form("block", 4, "_scale")
RANK1 = Form("rank1", 4, "_maxima")
FACTORED = Form("factored", 32, "_means", codes=False)
BLOCKWISE = {32: FLOAT, 8: BLOCK8, 4: BLOCK4}


def block_count(numel: int, bits: int) -> int:
    """Blocks of a state; the last one may be partly filled."""
    return -(-numel // BLOCK[bits])


def as_matrix(shape) -> tuple[int, int]:
    """(rows, columns) at the split of the dimensions where their sum is least; (0, 0) for fewer than two dimensions."""
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(splits, key=sum, default=(0, 0))


def planned(shape, numel: int, options: dict) -> tuple[Form, Form]:
    """The forms of first and second moment of a new state.

    Args:
        shape: of the elements held here; of a sharded parameter, the shard's.
        numel: elements of the whole parameter, which decide whether it is quantised.
        options: ``state_bits``, ``min_quantized_size`` and, where the optimizer has it, ``second_moment``.
    """
    if numel < max(options["min_quantized_size"], 1):
        return FLOAT, FLOAT
    plain = BLOCKWISE[options["state_bits"]]
    structured = {"rank1": RANK1, "factored": FACTORED}.get(options.get("second_moment"))
    if structured is None or not 0 < sum(as_matrix(shape)) <= math.prod(shape) / 32:
        return plain, plain
    return plain, structured


def find(state: dict, name: str) -> Form | None:
    """The form in which a state holds a moment, by the names of its tensors; None if it does not."""
    for form in (FACTORED, RANK1):
        if name + form.scale in state:
            return form
    if name + "_scale" not in state:
        return FLOAT if name in state else None
    codes = state.get(name)
    wide = isinstance(codes, torch.Tensor) and codes.ndim == 2 and codes.shape[1] == CODE_BYTES[8]
    return BLOCK8 if wide else BLOCK4


def zeros(form: Form, name: str, shape, device) -> dict:
    """The tensors of a moment that is zero everywhere."""
    return {
        key: torch.zeros(size, dtype=dtype, device=device) for key, (dtype, size) in form.layout(name, shape).items()
    }


def nbytes(form: Form, name: str, shape) -> int:
    """Bytes that a moment of a parameter of this shape takes."""
    return sum(math.prod(size) * dtype.itemsize for dtype, size in form.layout(name, shape).values())


# ---- from and to float32 ----


def decode(form: Form, name: str, state: dict, shape, signed: bool) -> torch.Tensor:
    """The float32 tensor of the given shape that a moment stands for."""
    if form is FLOAT:
        return state[name]
    scales = state[name + form.scale]
    if not form.by_matrix:
        return dequantize_state(state[name], scales, shape, signed=signed, bits=form.bits)
    rows, columns = scales.split(as_matrix(shape))
    if form is FACTORED:
        mean = rows.mean()
        return (rows[:, None] * (columns / torch.where(mean > 0, mean, 1))).reshape(shape)
    ones = torch.ones(len(state[name]), device=scales.device)
    fractions = dequantize_state(state[name], ones, shape, signed=False)
    return fractions * torch.minimum(rows[:, None], columns).reshape(shape)


def encode(form: Form, name: str, values: torch.Tensor, signed: bool) -> dict:
    """The tensors that hold float32 ``values`` in this form.

    Values that were decoded from the same form and blocks get the same codes: where the largest magnitude of a block is
    a negative value, its scale is such that this value is a code (the signed books have no -1).
    """
    if form is FLOAT:
        return {name: values}
    if form.by_matrix:
        return _encode_matrix(form, name, values)
    codes, scales = quantize_state(values, signed=signed, bits=form.bits)
    if signed:
        _keep_negative_extremes(values, codes, scales, form.bits)
    return {name: codes, name + form.scale: scales}


def _encode_matrix(form, name, values):
    matrix = values.reshape(as_matrix(values.shape)).clamp(min=0)
    if form is FACTORED:
        return {name + form.scale: torch.cat([matrix.mean(1), matrix.mean(0)])}
    rows, columns = matrix.amax(1), matrix.amax(0)
    scales = torch.minimum(rows[:, None], columns)
    fractions = matrix / torch.where(scales > 0, scales, 1)
    indices = torch.bucketize(_blocks(fractions, 4), _midpoints(4, False).to(values.device))
    return {name: _pack(indices, 4), name + form.scale: torch.cat([rows, columns])}


def _keep_negative_extremes(values, codes, scales, bits):
    blocks = _blocks(values, bits)
    lowest, highest = blocks.amin(1), blocks.amax(1)
    chosen = ((-lowest >= highest) & (lowest < 0)).nonzero()[:, 0]
    if not len(chosen):
        return
    book = _book(bits, True).to(values.device)
    wanted = _undo_product(lowest[chosen], book[0])
    scales[chosen] = torch.maximum(wanted, scales[chosen])
    indices = torch.bucketize(blocks[chosen] / scales[chosen, None], _midpoints(bits, True).to(values.device))
    codes[chosen] = _pack(indices, bits)


def _undo_product(product, factor):
    """The float32 whose product with ``factor`` is ``product``, or nearest to it."""
    quotient = product / factor
    candidates = torch.stack([quotient, quotient.nextafter(quotient * 2), quotient.nextafter(quotient / 2)])
    error = (candidates * factor - product).abs()
    return candidates.gather(0, error.argmin(0, keepdim=True))[0]


def _blocks(values, bits):
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK[bits])).view(-1, BLOCK[bits])


def _pack(indices, bits):
    """Indices into the book, (B, elements of a block), as codes (csrc/optim/params.h has the order)."""
    if bits == 8:
        return indices.to(torch.uint8)
    low, high = indices.to(torch.uint8).view(-1, 2, 4, 16).transpose(2, 3).unbind(1)
    return (low | high << 4).reshape(-1, CODE_BYTES[4])


@functools.cache
def _book(bits, signed):
    """The values that codes stand for, ascending, on the CPU."""
    codes = _pack(torch.arange(BLOCK[bits], device="cpu")[None] % 2**bits, bits)
    one = torch.ones(1, device="cpu")
    return dequantize_state(codes, one, (BLOCK[bits],), signed=signed, bits=bits)[: 2**bits]


@functools.cache
def _midpoints(bits, signed):
    book = _book(bits, signed)
    return (book[1:] + book[:-1]) / 2
