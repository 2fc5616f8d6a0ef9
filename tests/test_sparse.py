"""Linear layers with 2:4 weights against the reference, on every device."""

import pytest
import tilewise as tw
import torch
from tilewise.reference import sparse as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def close(got, exact, torchs, factor, name):
    """At most `factor` times torch's own error, and no all-zero output."""
    assert got.shape == exact.shape and got.dtype == torchs.dtype, name
    if not exact.numel():
        return
    got, torchs = got.detach().cpu().double(), torchs.detach().cpu().double()
    eps = torch.finfo(torch.float32).eps
    error, allowed = (got - exact).abs().max(), (torchs - exact).abs().max()
    assert error <= factor * allowed + 2 * eps * exact.abs().max(), f"{name}: {error:.2e}, torch {allowed:.2e}"
    assert (got - exact).norm() <= 0.02 * exact.norm(), name


def problem(device, dtype, rows, columns, out):
    w, x = torch.randn(out, columns, dtype=dtype), torch.randn(rows, columns, dtype=dtype)
    return [t.to(device.torch) for t in (w, x, torch.randn(out, dtype=dtype), torch.randn(rows, out, dtype=dtype))]


def gradients(x, w, mask, bias, dy):
    """y, dx, dw at the kept positions, dbias of the reference."""
    x, w, bias = (t.detach().cpu().clone().requires_grad_() for t in (x, w, bias))
    y = reference.linear(x, w, mask.cpu(), bias)
    y.backward(dy.cpu().to(y.dtype))
    return y.detach(), x.grad, w.grad[mask.cpu()].reshape(w.shape[0], -1), bias.grad


CPU_SHAPES = [(1, 4, 1), (2, 8, 3), (7, 20, 33), (9, 100, 17), (50, 132, 65), (130, 256, 300), (700, 36, 20)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,columns,out", CPU_SHAPES)
def test_linear(device, dtype, rows, columns, out):
    w, x, bias, dy = problem(device, dtype, rows, columns, out)
    weight = tw.NMSparse.from_dense(w)
    leaves = [x.requires_grad_(), weight.values.requires_grad_(), bias.requires_grad_()]
    y = tw.linear(x, weight, bias)
    y.backward(dy)
    arguments = (x, w, weight.mask(), bias, dy)
    torchs = gradients(*arguments)
    exact = gradients(*(t if t.dtype == torch.bool else t.double() for t in arguments))
    for name, factor, a, e, t in zip(
        ("y", "dx", "dvalues", "dbias"), (2, 3, 3, 3), (y, *(leaf.grad for leaf in leaves)), exact, torchs, strict=True
    ):
        close(a, e, t, factor, name)
