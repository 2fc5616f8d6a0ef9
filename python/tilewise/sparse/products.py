"""Products with a sparse weight."""

import torch

from tilewise._library import check_tensors
from tilewise.sparse.weight import CompressedWeight


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
    """``W x`` with a sparse weight; differentiable in x and ``weight.values``.

    Args:
        weight: :class:`NMSparse` or (on CPU) :class:`CSR`, (out, in).
        x: (in, n) of the weight's dtype.

    Returns:
        (out, n).

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`linear`.
    """
    check_tensors("matmul", x=x)
    if x.ndim != 2:
        raise ValueError(f"matmul: x has shape {tuple(x.shape)}, expected 2 dimensions")
    return linear(x.t().contiguous(), weight).t()
