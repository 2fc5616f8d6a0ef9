"""LM-Infinite's attention against its definition: scores at clamped rotary distances."""

import math

import pytest
import torch

import tilewise as tw


def expected(q, k, v, window, global_tokens):
    """By the rotation of each pair of query and key, one distance at a time."""
    group, dim = q.shape[1] // k.shape[1], q.shape[3]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    queries, keys = q.shape[2], k.shape[2]
    scores = torch.full((*q.shape[:3], keys), -math.inf, dtype=torch.float64)
    for i in range(queries):
        for j in range(i + keys - queries + 1):
            distance = i + keys - queries - j
            if distance < window or j < global_tokens:
                angles = min(distance, window) * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
                a, b = q[:, :, i, : dim // 2], q[:, :, i, dim // 2 :]
                turned = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
                scores[:, :, i, j] = (turned * k[:, :, j]).sum(-1) / math.sqrt(dim)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    "queries,keys,window,global_tokens", [(20, 20, 6, 3), (5, 30, 8, 4), (9, 9, 20, 2), (12, 12, 3, 0)]
)
def test_against_definition(device, queries, keys, window, global_tokens):
    q = torch.randn(1, 4, queries, 64, device=device.torch, requires_grad=True)
    k, v = (torch.randn(1, 2, keys, 64, device=device.torch, requires_grad=True) for _ in range(2))
    out = tw.lm_infinite_attention(q, k, v, window=window, global_tokens=global_tokens)
    exact = [t.detach().cpu().double().requires_grad_() for t in (q, k, v)]
    right = expected(*exact, window, global_tokens)
    torch.testing.assert_close(out.cpu().double(), right, rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for got, of in zip(grads, torch.autograd.grad(right, exact, dout.cpu().double()), strict=True):
        torch.testing.assert_close(got.cpu().double(), of, rtol=1e-3, atol=1e-4)


def test_errors():
    q = torch.randn(1, 1, 3, 8)
    for options, message in (
        ({"window": 0, "global_tokens": 1}, "window is 0"),
        ({"window": 2, "global_tokens": -1}, "global_tokens is -1"),
    ):
        with pytest.raises(ValueError, match=f"lm_infinite_attention: {message}"):
            tw.lm_infinite_attention(q, q, q, **options)
