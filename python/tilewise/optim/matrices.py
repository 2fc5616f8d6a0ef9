"""The pieces of Shampoo on batches of square matrices: 4-bit codes, and rows made orthonormal again.

A row of n elements has C = ceil(n / 64) blocks of 64 consecutive elements; each block is 32 bytes of codes and one
float32 scale, its largest magnitude. Code c stands for sign(t) t^2 / 225 with t = 2 c - 15, except that code 7 is zero
(Linear-2). csrc/optim/params.h gives the order of the codes within a block.
S. Wang, P. Zhou, J. Li, H. Huang, *4-bit Shampoo for Memory-Efficient Network Training*, NeurIPS 2024.
"""

import torch

from tilewise._library import check_tensors, core, register

ROW_BLOCK, ROW_BLOCK_BYTES = 64, 32

# Looked up once: an optimizer of another kind must not need them.
_core_quantize, _core_dequantize = core("quantize_matrix"), core("dequantize_matrix")
_core_orthonormalize = core("orthonormalize")


def row_blocks(order: int) -> int:
    return (order + ROW_BLOCK - 1) // ROW_BLOCK


def _empty_codes(values, keep_diagonal):
    batch, order = values.shape[0], values.shape[-1]
    blocks = row_blocks(order)
    codes = torch.empty(batch, order, blocks * ROW_BLOCK_BYTES, dtype=torch.uint8, device=values.device)
    empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=values.device)  # noqa: E731
    return codes, empty(batch, order, blocks), empty(batch, order if keep_diagonal else 0)


def _squares(values):
    if values.ndim != 3:  # before memory of an unknown size is taken; all else is checked in the core
        raise ValueError(f"quantize_matrix: values has shape {tuple(values.shape)}, expected 3 dimensions")
    return values.contiguous()


def _quantize_matrix(values, keep_diagonal):
    values = _squares(values)
    codes, scales, diagonal = _empty_codes(values, keep_diagonal)
    _core_quantize(values, codes, scales, diagonal if keep_diagonal else None)
    return codes, scales, diagonal


def _empty_values(codes):
    batch, order = codes.shape[0], codes.shape[1]
    return torch.empty(batch, order, order, dtype=torch.float32, device=codes.device)


def _dequantize_matrix(codes, scales, diagonal):
    values = _empty_values(codes)
    _core_dequantize(codes, scales, diagonal, values)
    return values


def _orthonormalize(rows, steps):
    rows = rows.contiguous()
    out, defect, spare = torch.empty_like(rows), None, None
    if steps:
        defect = torch.empty_like(rows)
        spare = torch.empty_like(rows) if steps > 1 else None
    source = rows
    for _ in range(steps):
        target = spare if source is out else out
        _core_orthonormalize(source, defect, target)
        source = target
    return source if source is not rows else rows.clone()


_quantize_op = register(
    "quantize_matrix(Tensor values, bool keep_diagonal) -> (Tensor, Tensor, Tensor)",
    _quantize_matrix,
    fake=_empty_codes,
)
_dequantize_op = register(
    "dequantize_matrix(Tensor codes, Tensor scales, Tensor? diagonal) -> Tensor",
    _dequantize_matrix,
    fake=lambda codes, scales, diagonal: _empty_values(codes),
)
_orthonormalize_op = register(
    "orthonormalize(Tensor rows, int steps) -> Tensor",
    _orthonormalize,
    fake=lambda rows, steps: torch.empty_like(rows, memory_format=torch.contiguous_format),
)


def quantize_matrix(
    values: torch.Tensor, *, keep_diagonal: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantises square matrices to 4 bits, in blocks of 64 consecutive elements of a row.

    Shampoo's preconditioners are held so (S. Wang et al., *4-bit Shampoo for Memory-Efficient Network Training*,
    NeurIPS 2024).

    Every element gets the nearest value exactly; a tie goes to the smaller magnitude. Values that are not finite count
    as zero; a block of zeros stays zero.

    Args:
        values: float32 (b, n, n), any strides.
        keep_diagonal: keep the diagonals in float32; they do not count for the scales.

    Returns:
        codes uint8 (b, n, 32 C), scales float32 (b, n, C), with C = ceil(n / 64), and the diagonal float32 (b, n), or
        None.

    Raises:
        TypeError: ``values`` is not a float32 tensor.
        ValueError: it does not consist of square matrices, of order at most 32768.
    """
    check_tensors("quantize_matrix", values=values)
    codes, scales, diagonal = _quantize_op(values, bool(keep_diagonal))
    return codes, scales, diagonal if keep_diagonal else None


def dequantize_matrix(codes: torch.Tensor, scales: torch.Tensor, diagonal: torch.Tensor | None = None) -> torch.Tensor:
    """The float32 matrices (b, n, n) that codes, scales and diagonal stand for; inverse of :func:`quantize_matrix`.

    Args:
        codes: uint8 (b, n, 32 C), contiguous, with C = ceil(n / 64).
        scales: float32 (b, n, C).
        diagonal: float32 (b, n), or None if the codes hold it.

    Raises:
        TypeError: wrong dtype.
        ValueError: codes, scales and diagonal that do not fit each other.
    """
    check_tensors("dequantize_matrix", codes=codes, scales=scales, diagonal=diagonal)
    shape = tuple(codes.shape)
    if len(shape) != 3 or shape[2] != row_blocks(shape[1]) * ROW_BLOCK_BYTES:  # before memory of that size is taken
        raise ValueError(f"dequantize_matrix: codes has shape {shape}, expected (b, n, 32 ceil(n / 64))")
    return _dequantize_op(codes, scales, diagonal)


def orthonormalize(rows: torch.Tensor, *, steps: int = 1) -> torch.Tensor:
    r"""Makes the rows of nearly orthogonal matrices orthonormal, by Bjorck's iteration.

    .. math:: V \leftarrow \tfrac{3}{2} V - \tfrac{1}{2} (V V^T) V

    The distance from orthonormality is squared in every step, if it is below 1 at first.
    A. Bjorck, C. Bowie, *An Iterative Algorithm for Computing the Best Estimate of an Orthogonal Matrix*, SIAM J.
    Numer. Anal., 1971.

    Args:
        rows: float32 (b, n, n), any strides.
        steps: how many, 0 to 1000.

    Returns:
        float32 (b, n, n).

    Raises:
        TypeError: ``rows`` is not a float32 tensor, or ``steps`` not an int.
        ValueError: ``rows`` does not consist of square matrices, or ``steps`` is out of range.
    """
    check_tensors("orthonormalize", rows=rows)
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"orthonormalize: steps is {steps!r}, expected an int")
    if not 0 <= steps <= 1000:
        raise ValueError(f"orthonormalize: steps is {steps}, expected 0 <= steps <= 1000")
    return _orthonormalize_op(rows, steps)
