"""Optimizers with states in few bits against torch's fused ones: the same parameters, gradients and options, one step.

Quantisation by itself beside a copy of the float32 values: torch has nothing like it. And Shampoo with 4-bit states
against itself with 32-bit ones.
"""

import functools

import torch

from tilewise import optim
from tilewise.bench.case import Case

TENSORS = 150
STATE_BYTES = {4: 68 / 128, 8: 260 / 256, 32: 4}  # of a moment's element: codes and a scale per block


def _parameters(device, dtype, count):
    rows = 1000 if count >= 1000 * TENSORS else 1
    shape = rows, count // TENSORS // rows
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def _case(label, device, dtype, count, target=None, rule="AdamW", moments=2, **options):
    ours, theirs = _parameters(device, dtype, count), _parameters(device, dtype, count)
    common = {"momentum": 0.9} if rule == "SGD" else {}
    tilewise_step = getattr(optim, rule)(ours, lr=1e-3, **common, **options).step
    torch_step = getattr(torch.optim, rule)(theirs, lr=1e-3, **common, fused=True).step
    # p, and the states, are read and written, g is read
    per_element = 3 * ours[0].element_size() + 2 * moments * STATE_BYTES[options.get("state_bits", 4)]
    name = f"{rule} {label} {str(dtype).removeprefix('torch.')} {count // 1_000_000}M in {TENSORS} tensors"
    return Case(name, tilewise_step, torch_step, bytes=sum(p.numel() for p in ours) * per_element, target=target)


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
    f32, bf16 = torch.float32, torch.bfloat16
    return [
        _case("4-bit", device, f32, count, 1.65),
        _case("4-bit", device, bf16, count, 1.65),
        _case("8-bit", device, f32, count, 1.25, state_bits=8),
        _case("8-bit", device, bf16, count, 1.05, state_bits=8),
        _case("32-bit", device, f32, count, state_bits=32),
        _case("4-bit rank-1", device, f32, count, second_moment="rank1"),
        _case("4-bit factored", device, f32, count, second_moment="factored"),
        _case("4-bit and 16-bit residual", device, bf16, count, master_weights=True),
        _case("4-bit", device, f32, count, rule="SGD", moments=1),
        _case("4-bit", device, f32, 1_000_000),
        *_codec_cases(device, 16_000_000, 4),
        *_codec_cases(device, 16_000_000, 8),
        *shampoo_cases(device),
    ]
