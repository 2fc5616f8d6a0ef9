"""Block-wise 4-bit quantisation of optimizer states.

A state of n elements has B = ceil(n / 128) blocks of consecutive (row-major) elements; each block is 64 bytes of codes
and one float32 scale, its largest magnitude. Signed states (first moments) use the dynamic-exponent code book, unsigned
ones (second moments) ((i + 1) / 16)^4: no zero, because a zero denominator makes training unstable, and a range of
2^16, because the second moments of a block lie that far apart and those taken too large slow their parameters down.
B. Li, J. Chen, J. Zhu, *Memory Efficient Optimizers with 4-bit States*, NeurIPS 2023 (there the second code book is
linear, under finer normalisation).
"""

import math

import torch

from tilewise import _C
from tilewise._library import check_tensors, register

BLOCK, CODE_BYTES = 128, 64


def block_count(numel: int) -> int:
    return (numel + BLOCK - 1) // BLOCK


def _empty_codes(values):
    blocks = block_count(values.numel())
    codes = torch.empty(blocks, CODE_BYTES, dtype=torch.uint8, device=values.device)
    return codes, torch.empty(blocks, dtype=torch.float32, device=values.device)


def _quantize_state(values, signed):
    codes, scales = _empty_codes(values)
    _C.quantize_state(values.contiguous(), codes, scales, signed)
    return codes, scales


def _dequantize_state(codes, scales, shape, signed):
    values = torch.empty(shape, dtype=torch.float32, device=codes.device)
    _C.dequantize_state(codes, scales, values, signed)
    return values


_quantize_op = register(
    "quantize_state(Tensor values, bool signed) -> (Tensor, Tensor)",
    _quantize_state,
    fake=lambda values, signed: _empty_codes(values),
)
_dequantize_op = register(
    "dequantize_state(Tensor codes, Tensor scales, SymInt[] shape, bool signed) -> Tensor",
    _dequantize_state,
    fake=lambda codes, scales, shape, signed: torch.empty(shape, dtype=torch.float32, device=codes.device),
)


def quantize_state(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a tensor to 4 bits as the optimizers do with their states.

    Every element gets the nearest code exactly; a tie goes to the code of smaller magnitude. Values that are not finite
    (and negative ones where ``signed`` is false) count as zero.

    Args:
        values: float32, any shape of n elements and any strides.
        signed: code book of first moments (true) or of second moments (false).

    Returns:
        codes uint8 (B, 64) and scales float32 (B,), with B = ceil(n / 128). csrc/optim/params.h gives the order of the
        codes within a block.

    Raises:
        TypeError: ``values`` is not a float32 tensor.
    """
    check_tensors("quantize_state", values=values)
    return _quantize_op(values, bool(signed))


def dequantize_state(codes: torch.Tensor, scales: torch.Tensor, shape, *, signed: bool) -> torch.Tensor:
    """The float32 tensor of the given shape that codes and scales stand for; inverse of :func:`quantize_state`.

    Args:
        codes: uint8 (B, 64), contiguous.
        scales: float32 (B,), any stride: ``state["scales"][:, 0]`` for the first moment of an optimizer's state.
        shape: of the result; B = ceil(prod(shape) / 128).

    Raises:
        ValueError: a shape that does not fit the codes, or is negative.
        TypeError: wrong dtype.
    """
    check_tensors("dequantize_state", codes=codes, scales=scales)
    shape = tuple(shape)
    if any(size < 0 for size in shape) or math.prod(shape) > 2**62:
        raise ValueError(f"dequantize_state: shape is {shape}, expected sizes >= 0")
    if block_count(math.prod(shape)) != codes.shape[0] if codes.ndim else True:  # before memory of that size is taken
        raise ValueError(
            f"dequantize_state: codes has shape {tuple(codes.shape)}, expected "
            f"({block_count(math.prod(shape))}, {CODE_BYTES}) for a result of shape {shape}"
        )
    return _dequantize_op(codes, scales, shape, bool(signed))
