"""Block-wise quantisation of optimizer states to 4 or 8 bits.

A 4-bit state of n elements has B = ceil(n / 128) blocks of consecutive (row-major) elements; each block is 64 bytes of
codes and one float32 scale, its largest magnitude. Signed states (first moments) use the dynamic-exponent code book,
unsigned ones (second moments) ((i + 1) / 16)^4: no zero, because a zero denominator makes training unstable, and a
range of 2^16, because the second moments of a block lie that far apart and those taken too large slow their parameters
down.
B. Li, J. Chen, J. Zhu, *Memory Efficient Optimizers with 4-bit States*, NeurIPS 2023 (there the second code book is
linear, under finer normalisation).

An 8-bit state has B = ceil(n / 256) blocks; the codes of a block are 256 bytes in the order of its elements. Codes,
scales and code books are those of bitsandbytes: T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer, *8-bit Optimizers
via Block-wise Quantization*, ICLR 2022.
"""

import math

import torch

from tilewise import _C
from tilewise._library import check_tensors, register

BLOCK, CODE_BYTES = 128, 64
BLOCK8 = CODE_BYTES8 = 256


def block_count(numel: int, bits: int = 4) -> int:
    block = BLOCK if bits == 4 else BLOCK8
    return (numel + block - 1) // block


def _code_bytes(bits):
    return CODE_BYTES if bits == 4 else CODE_BYTES8


def _empty_codes(values, bits):
    blocks = block_count(values.numel(), bits)
    codes = torch.empty(blocks, _code_bytes(bits), dtype=torch.uint8, device=values.device)
    return codes, torch.empty(blocks, dtype=torch.float32, device=values.device)


def _quantize_state(values, signed, bits=4):
    codes, scales = _empty_codes(values, bits)
    _C.quantize_state(values.contiguous(), codes, scales, signed, bits)
    return codes, scales


def _dequantize_state(codes, scales, shape, signed, bits=4):
    values = torch.empty(shape, dtype=torch.float32, device=codes.device)
    _C.dequantize_state(codes, scales, values, signed, bits)
    return values


_quantize_op = register(
    "quantize_state(Tensor values, bool signed, int bits=4) -> (Tensor, Tensor)",
    _quantize_state,
    fake=lambda values, signed, bits=4: _empty_codes(values, bits),
)
_dequantize_op = register(
    "dequantize_state(Tensor codes, Tensor scales, SymInt[] shape, bool signed, int bits=4) -> Tensor",
    _dequantize_state,
    fake=lambda codes, scales, shape, signed, bits=4: torch.empty(shape, dtype=torch.float32, device=codes.device),
)


def _check_bits(operation, bits):
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"{operation}: bits is {bits!r}, expected an int")
    if bits not in (4, 8):  # before memory for the codes is taken
        raise ValueError(f"{operation}: bits is {bits}, expected 4 or 8")


def quantize_state(values: torch.Tensor, *, signed: bool, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a tensor to 4 or 8 bits as the optimizers do with their states.

    Every element gets the nearest code exactly; a tie goes to the code of smaller magnitude. Values that are not finite
    (and negative ones where ``signed`` is false) count as zero. Blocks with a scale each: T. Dettmers et al., *8-bit
    Optimizers via Block-wise Quantization*, ICLR 2022; in 4 bits B. Li, J. Chen, J. Zhu, *Memory Efficient Optimizers
    with 4-bit States*, NeurIPS 2023.

    Args:
        values: float32, any shape of n elements and any strides.
        signed: code book of first moments (true) or of second moments (false).
        bits: 4 or 8.

    Returns:
        codes and scales float32 (B,). With 4 bits codes are uint8 (B, 64), B = ceil(n / 128), in the order that
        csrc/optim/params.h gives; with 8 bits uint8 (B, 256), B = ceil(n / 256), a byte per element.

    Raises:
        TypeError: ``values`` is not a float32 tensor.
        ValueError: ``bits`` is neither 4 nor 8.
    """
    check_tensors("quantize_state", values=values)
    _check_bits("quantize_state", bits)
    return _quantize_op(values, bool(signed), bits)


def dequantize_state(codes: torch.Tensor, scales: torch.Tensor, shape, *, signed: bool, bits: int = 4) -> torch.Tensor:
    """The float32 tensor of the given shape that codes and scales stand for; inverse of :func:`quantize_state`.

    Args:
        codes: uint8 (B, 64), or (B, 256) with 8 bits, contiguous.
        scales: float32 (B,), any stride: ``state["exp_avg_scale"]`` of an optimizer's state.
        shape: of the result; B = ceil(prod(shape) / 128), with 8 bits ceil(prod(shape) / 256).
        signed, bits: those that the codes were made with.

    Raises:
        ValueError: a shape that does not fit the codes, or is negative; ``bits`` is neither 4 nor 8.
        TypeError: wrong dtype.
    """
    check_tensors("dequantize_state", codes=codes, scales=scales)
    _check_bits("dequantize_state", bits)
    shape = tuple(shape)
    if any(size < 0 for size in shape) or math.prod(shape) > 2**62:
        raise ValueError(f"dequantize_state: shape is {shape}, expected sizes >= 0")
    blocks = block_count(math.prod(shape), bits)
    if blocks != codes.shape[0] if codes.ndim else True:  # before memory of that size is taken
        raise ValueError(
            f"dequantize_state: codes has shape {tuple(codes.shape)}, expected "
            f"({blocks}, {_code_bytes(bits)}) for a result of shape {shape}"
        )
    return _dequantize_op(codes, scales, shape, bool(signed), bits)
