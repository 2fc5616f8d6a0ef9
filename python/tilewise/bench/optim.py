"""AdamW with 4-bit states against torch's fused AdamW: the same parameters, gradients and options, one step."""

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


def cases(device: torch.device) -> list[Case]:
    """50M parameters in 150 tensors (1e9 on CUDA), and the tensors of a small model."""
    count = 1_000_000_000 if device.type == "cuda" else 50_000_000
    label = f"{count // 1_000_000}M in {TENSORS} tensors"
    return [
        _case(f"AdamW 4-bit float32 {label}", device, torch.float32, count, 1.5),
        _case(f"AdamW 4-bit bfloat16 {label}", device, torch.bfloat16, count, 1.5),
        _case("AdamW 4-bit float32 1M in 150 tensors", device, torch.float32, 1_000_000, None),
        _case(f"AdamW 32-bit float32 {label}", device, torch.float32, count, None, state_bits=32),
    ]
