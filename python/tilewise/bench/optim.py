"""AdamW with 4-bit states against torch's fused AdamW: the same parameters, gradients and options, one step.

Quantisation by itself beside a copy of the float32 values: torch has nothing like it. And Shampoo with 4-bit states
against itself with 32-bit ones.
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


def _shampoo_cycle(device, order, interval, bits):
    """Steps of one matrix from one new inverse root to the next."""
    p = torch.nn.Parameter(torch.randn(order, order, device=device))
    p.grad = torch.randn_like(p)
    step = optim.Shampoo([p], state_bits=bits, precondition_interval=interval, root_interval=interval).step

    def cycle():
        for _ in range(interval):
            step()

    return cycle


def shampoo_cases(device: torch.device) -> list[Case]:
    """4-bit Shampoo beside the 32-bit one, which has 7 times the state; and Bjorck's step beside two products."""
    order, interval = (1024 if device.type == "cuda" else 512), 200
    ours, theirs = (_shampoo_cycle(device, order, interval, bits) for bits in (4, 32))
    name = f"Shampoo 4-bit over 32-bit, order {order}, {interval} steps"
    rows = torch.linalg.qr(torch.randn(4, 512, 512, device=device))[0].contiguous()

    def two_products():
        return torch.baddbmm(rows, rows @ rows.mT, rows, beta=1.5, alpha=-0.5)

    bjorck = "Bjorck step, 4 of order 512"
    return [
        Case(name, ours, theirs, flops=4.0 * interval * order**3, target=1 / 1.1),
        Case(bjorck, lambda: optim.orthonormalize(rows), two_products, flops=3.0 * rows.numel() * 512),
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
        *shampoo_cases(device),
    ]
