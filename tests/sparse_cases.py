"""What the sparse tests share: problems, the judge, bad inputs."""

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_close(got, exact, torchs, factor, name):
    """At most ``factor`` times torch's own error (or a rounding of the largest value, where torch happens to be exact),
    and a relative L2 error that no all-zero output meets."""
    assert got.shape == exact.shape and got.dtype == torchs.dtype, name
    if not exact.numel():
        return
    got, torchs = got.detach().cpu().double(), torchs.detach().cpu().double()
    error, allowed = (got - exact).abs().max(), (torchs - exact).abs().max()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= factor * allowed + rounding, f"{name}: error {error:.2e}, torch's {allowed:.2e}"
    assert (got - exact).norm() <= 0.01 * exact.norm(), name


def problem(device, dtype, rows, columns, out):
    """w, x, bias, dy at unit variance."""
    shapes = (out, columns), (rows, columns), (out,), (rows, out)
    return [torch.randn(shape, dtype=dtype).to(device.torch) for shape in shapes]


def dense_results(reference, x, w, mask, bias, dy):
    """y, dx, dvalues (at the mask, row by row), dbias of the reference in the dtype of its inputs, on the CPU."""
    x, w, bias = (t.detach().cpu().clone().requires_grad_() for t in (x, w, bias))
    y = reference.linear(x, w, mask.cpu(), bias)
    y.backward(dy.detach().cpu())
    return y.detach(), x.grad, w.grad[mask.cpu()], bias.grad


def assert_matches_dense(reference, results, x, w, mask, bias, dy):
    """``results`` are y, dx, dvalues, dbias: outputs within twice torch's error, gradients within three times."""
    torchs = dense_results(reference, x, w, mask, bias, dy)
    exact = dense_results(reference, *(t if t is mask else t.double() for t in (x, w, mask, bias, dy)))
    for name, factor, got, e, t in zip(
        ("y", "dx", "dvalues", "dbias"), (2, 3, 3, 3), results, exact, torchs, strict=True
    ):
        assert_close(got.reshape(e.shape), e, t, factor, name)
