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
    common = {"momentum": 0.9} if rule == "SGD" else {}

    def prepare():
        ours, theirs = _parameters(device, dtype, count), _parameters(device, dtype, count)
        tilewise_step = getattr(optim, rule)(ours, lr=1e-3, **common, **options).step
        return tilewise_step, getattr(torch.optim, rule)(theirs, lr=1e-3, **common, fused=True).step

    # p, and the states, are read and written, g is read: the share of the floor is that of a copy's bandwidth
    per_element = 3 * dtype.itemsize + 2 * moments * STATE_BYTES[options.get("state_bits", 4)]
    name = f"{rule} {label} {str(dtype).removeprefix('torch.')} {count // 1_000_000}M in {TENSORS} tensors"
    return Case(name, bytes=count // TENSORS * TENSORS * per_element, target=target, prepare=prepare)


def _codec_cases(device, count, bits):
    def quantize():
        values = torch.randn(count, device=device)
        copy = functools.partial(torch.empty_like(values).copy_, values)
        return lambda: optim.quantize_state(values, signed=True, bits=bits), copy

    def dequantize():
        values = torch.randn(count, device=device)
        codes, scales = optim.quantize_state(values, signed=True, bits=bits)
        copy = functools.partial(torch.empty_like(values).copy_, values)
        return lambda: optim.dequantize_state(codes, scales, (count,), signed=True, bits=bits), copy

    label, least = f"{bits}-bit {count // 1_000_000}M over copy", count * (4 + STATE_BYTES[bits])
    yield Case(f"quantize {label}", bytes=least, prepare=quantize)
    yield Case(f"dequantize {label}", bytes=least, prepare=dequantize)


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

    def bjorck():
        rows = torch.linalg.qr(torch.randn(4, 512, 512, device=device))[0].contiguous()
        two_products = lambda: torch.baddbmm(rows, rows @ rows.mT, rows, beta=1.5, alpha=-0.5)  # noqa: E731
        return lambda: optim.orthonormalize(rows), two_products

    return [
        Case(
            f"Shampoo 4-bit over 32-bit, order {order}, {interval} steps",
            flops=4.0 * interval * order**3,
            target=1 / 1.1,
            prepare=lambda: tuple(_shampoo_cycle(device, order, interval, bits) for bits in (4, 32)),
        ),
        Case("Bjorck step, 4 of order 512", flops=3.0 * 4 * 512**3, prepare=bjorck),
    ]


def cases(device: torch.device) -> list[Case]:
    """50M parameters in 150 tensors (1e9 on CUDA), and the tensors of a small model."""
    on_cuda = device.type == "cuda"
    count, values = (1_000_000_000, 256_000_000) if on_cuda else (50_000_000, 16_000_000)
    f32, bf16 = torch.float32, torch.bfloat16
    promised = (1 / 0.6, 1 / 0.6, None, None) if on_cuda else (1.65, 1.65, 1.25, 1.05)
    return [
        _case("4-bit", device, f32, count, promised[0]),
        _case("4-bit", device, bf16, count, promised[1]),
        _case("8-bit", device, f32, count, promised[2], state_bits=8),
        _case("8-bit", device, bf16, count, promised[3], state_bits=8),
        _case("32-bit", device, f32, count, state_bits=32),
        _case("4-bit rank-1", device, f32, count, second_moment="rank1"),
        _case("4-bit factored", device, f32, count, second_moment="factored"),
        _case("4-bit and 16-bit residual", device, bf16, count, master_weights=True),
        _case("4-bit", device, f32, count, rule="SGD", moments=1),
        _case("4-bit", device, f32, 1_000_000),
        *_codec_cases(device, values, 4),
        *_codec_cases(device, values, 8),
        *shampoo_cases(device),
    ]
