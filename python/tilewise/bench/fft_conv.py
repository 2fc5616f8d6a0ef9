"""Long convolutions against torch's rfft formulation, each at the transform size that suits it best."""

import math

import torch

from tilewise.bench.case import Case
from tilewise.fft_conv import fft_conv

# (B, H, L): the main path, short rows, long lone rows, lengths that are no power of two
SHAPES = [(8, 64, 8192), (8, 64, 1024), (1, 64, 131072), (1, 8, 1 << 20), (8, 64, 1000), (3, 5, 14113)]
CUDA_SHAPES = [(64, 768, 1024), (64, 768, 4096), (64, 768, 8192)]


def good_size(n: int) -> int:
    """The smallest even 5-smooth size from n on: what torch's transforms are fast at."""
    return min(m for t in range(13) for f in range(7) if (m := _fill(3**t * 5**f, n)) >= n)


def _fill(odd: int, n: int) -> int:
    return odd * 2 ** max(1, math.ceil(math.log2(max(n / odd, 1))))


def torch_conv(u, k, causal=True, pregate=None, postgate=None):
    length = u.shape[-1]
    size = good_size(2 * length - 1) if causal else length
    x = u if pregate is None else pregate * u
    y = torch.fft.irfft(torch.fft.rfft(x.float(), size) * torch.fft.rfft(k, size), size)[..., :length].to(u.dtype)
    return y if postgate is None else postgate * y


def _work(shape, item, passes, tensors):
    """flops of `passes` transforms a row (2.5 N log2 N, real, N = 2L); bytes of `tensors` like u, and of k."""
    batch, heads, length = shape
    flops = 2.5 * 2 * length * math.log2(max(2, 2 * length)) * heads * (passes * batch + 1)
    return flops, batch * heads * length * item * tensors + heads * length * 4


def _tensors(shape, dtype, device, gated):
    """u and k with the gates by name, and dy."""
    u, dy = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    k = torch.randn(shape[1:], device=device) / shape[2] ** 0.5
    names = ("pregate", "postgate") if gated else ()
    return u, k, {name: torch.randn(shape, device=device, dtype=dtype) for name in names}, dy


def _case(name, shape, dtype, device, gated=False, causal=True, target=None):
    def prepare():
        u, k, gates, _ = _tensors(shape, dtype, device, gated)
        options = {"causal": causal, **gates}
        return lambda: fft_conv(u, k, **options), lambda: torch_conv(u, k, **options)

    flops, least = _work(shape, dtype.itemsize, 2, 4 if gated else 2)
    return Case(name, flops=flops, bytes=least, target=target, dtype=dtype, prepare=prepare)


def _training_case(name, shape, dtype, device, gated=False):
    def prepare():
        u, k, gates, dy = _tensors(shape, dtype, device, gated)
        leaves = [t.requires_grad_() for t in (u, k, *gates.values())]
        differentiate = lambda f: lambda: torch.autograd.grad(f(u, k, **gates), leaves, dy)  # noqa: E731
        return differentiate(fft_conv), differentiate(torch_conv)

    flops, least = _work(shape, dtype.itemsize, 5, 11 if gated else 5)
    return Case(name, flops=flops, bytes=least, dtype=dtype, prepare=prepare)


def cases(device: torch.device) -> list[Case]:
    f32, f16 = torch.float32, torch.float16
    name = lambda shape, what: f"fft_conv {what} {'x'.join(map(str, shape))}"  # noqa: E731
    if device.type == "cuda":
        return [_case(name(s, "fp16 gated"), s, f16, device, gated=True) for s in CUDA_SHAPES] + [
            _training_case(name(s, "fp16 gated, forward+backward"), s, f16, device, gated=True) for s in CUDA_SHAPES
        ]
    main = SHAPES[0]
    return [
        *(_case(name(s, "fp32"), s, f32, device, target=6.0 if s == main else None) for s in SHAPES),
        *(_training_case(name(s, "fp32, forward+backward"), s, f32, device) for s in SHAPES),
        _case(name(main, "fp32 gated"), main, f32, device, gated=True),
        _training_case(name(main, "fp32 gated, forward+backward"), main, f32, device, gated=True),
        _case(name(main, "bf16"), main, torch.bfloat16, device),
        _case(name(main, "fp32 circular"), main, f32, device, causal=False),
    ]
