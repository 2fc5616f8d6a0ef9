"""AdamW with 4-bit states against torch's fused AdamW: the same parameters, gradients and options, one step.

Quantisation by itself beside a copy of the float32 values: torch has nothing like it.
"""

import functools

import torch

from tilewise import optim
from tilewise.bench.case import Case

TENSORS, STATE_BYTES = 150, 2 * 136 / 128  # read and written: 64 + 64 bytes of codes and 8 of scales per 128 elements


def _parameters(device, dtype, count):
    params = [torch.nn.Parameter(torch.randn(count // TENSORS, device=device).to(dtype)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def _case(name, device, dtype, count, target, **options):
    ours, theirs = _parameters(device, dtype, count), _parameters(device, dtype, count)
    tilewise_step = optim.AdamW(ours, **options).step
    torch_step = torch.optim.AdamW(theirs, fused=True).step
    size = ours[0].element_size()
    state_bytes = 16 if options.get("state_bits") == 32 else STATE_BYTES
    least = sum(p.numel() for p in ours) * (3 * size + state_bytes)  # p is read and written, g is read
    return Case(name, tilewise_step, torch_step, bytes=least, target=target)


def _codec_cases(device, count, bits):
    values = torch.randn(count, device=device)
    target = torch.empty_like(values)
    codes, scales = optim.quantize_state(values, signed=True, bits=bits)
    least = values.nbytes + codes.nbytes + scales.nbytes
    copy = functools.partial(target.copy_, values)
    label = f"{bits}-bit {count // 1_000_000}M over copy"
    return [
        Case(f"quantize {label}", lambda: optim.quantize_state(values, signed=True, bits=bits), copy, bytes=least),
        Case(
            f"dequantize {label}",
            lambda: optim.dequantize_state(codes, scales, (count,), signed=True, bits=bits),
            copy,
            bytes=least,
        ),
    ]


def cases(device: torch.device) -> list[Case]:
    """50M parameters in 150 tensors (1e9 on CUDA), and the tensors of a small model."""
    count = 1_000_000_000 if device.type == "cuda" else 50_000_000
    label = f"{count // 1_000_000}M in {TENSORS} tensors"
    return [
        _case(f"AdamW 4-bit float32 {label}", device, torch.float32, count, 1.5),
        _case(f"AdamW 4-bit bfloat16 {label}", device, torch.bfloat16, count, 1.5),
        _case("AdamW 4-bit float32 1M in 150 tensors", device, torch.float32, 1_000_000, None),
        _case(f"AdamW 32-bit float32 {label}", device, torch.float32, count, None, state_bits=32),
        *_codec_cases(device, 16_000_000, 4),
        *_codec_cases(device, 16_000_000, 8),
    ]
