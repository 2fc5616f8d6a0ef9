"""Rotary embeddings against the formula in float64, and keys that move."""

import pytest
import torch

import tilewise as tw
from attention_cases import DTYPES


def expected(x, positions, theta=10000.0, dim=None, interleaved=False):
    """By complex numbers in float64."""
    dim = x.shape[-1] if dim is None else dim
    if dim == 0:
        return x.double()
    angles = positions.double()[..., None] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = angles if angles.ndim == 3 else angles[None]
    turned, rest = x.double()[..., :dim], x.double()[..., dim:]
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    z = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None].to(x.device)
    out = torch.view_as_real(z)
    out = out.flatten(-2) if interleaved else out.transpose(-1, -2).flatten(-2)
    return torch.cat([out, rest], -1)


@pytest.mark.modes
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "shape,dim", [((2, 3, 5, 64), None), ((1, 2, 3, 80), 20), ((1, 1, 1, 6), 2), ((1, 2, 4, 7), 0)]
)
def test_against_formula(device, shape, dim, dtype, interleaved):
    x = torch.randn(shape).to(device.torch, dtype)
    dim = dim if dim is not None else shape[-1]
    positions = torch.randint(0, 100_000, (shape[0], shape[2]))
    got = tw.rope.apply(x, positions.to(device.torch), dim=dim, interleaved=interleaved)
    right = expected(x.cpu(), positions, dim=dim, interleaved=interleaved)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), right, rtol=unit, atol=2e-6 + unit / 4)
    if dim < shape[-1]:
        assert torch.equal(got[..., dim:], x[..., dim:])


def test_gradient_turns_back(device):
    x = torch.randn(2, 3, 5, 64, device=device.torch, requires_grad=True)
    positions = torch.arange(5, device=device.torch)
    dout = torch.randn_like(x)
    (dx,) = torch.autograd.grad(tw.rope.apply(x, positions), x, dout)
    torch.testing.assert_close(dx.cpu().double(), expected(dout.cpu(), -positions.cpu()), rtol=1e-5, atol=1e-5)
    assert torch.allclose(tw.rope.apply(dx, positions), dout, atol=1e-5)


def test_reposition(device):
    """Keys cached at one place and moved are the keys of the other place."""
    k = torch.randn(2, 2, 6, 64, device=device.torch)
    old, new = torch.arange(6, device=device.torch), torch.arange(6, device=device.torch) + 5000
    moved = tw.rope.reposition(tw.rope.apply(k, old), old, new)
    torch.testing.assert_close(moved, tw.rope.apply(k, new), rtol=1e-4, atol=1e-5)
    assert torch.equal(tw.rope.reposition(moved, 0, 5), tw.rope.reposition(moved, old, old + 5))


def test_strided(device):
    x = torch.randn(2, 5, 3, 80, device=device.torch).transpose(1, 2)[..., 8:72]
    positions = torch.arange(5, device=device.torch)
    assert torch.equal(tw.rope.apply(x, positions), tw.rope.apply(x.contiguous(), positions))


def test_errors():
    x, positions = torch.randn(1, 2, 3, 8), torch.arange(3)
    for run, kind, message in (
        (lambda: tw.rope.apply(x, positions[:2]), ValueError, "rope_apply: cos has 2 rows, expected 3"),
        (lambda: tw.rope.apply(x, positions, dim=10), ValueError, "cos has 5 pairs, expected at most 4"),
        (lambda: tw.rope.apply(x, positions, dim=3), ValueError, "rope.table: dim is 3"),
        (lambda: tw.rope.apply(x[0], positions), ValueError, "x has shape"),
        (lambda: tw.rope.apply(x.double(), positions), TypeError, "x has dtype float64"),
        (lambda: tw.rope.apply(x, positions[None].expand(2, -1)), ValueError, "cos has batch 2"),
        (lambda: tw.rope.apply([1], positions), TypeError, "rope.apply: x is a list"),
    ):
        with pytest.raises(kind, match=message):
            run()


def test_opcheck():
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    cos, sin = (t[None] for t in tw.rope.table(torch.arange(3), 8))
    torch.library.opcheck(torch.ops.tilewise.rope_apply.default, (x, cos, sin, True, False))
