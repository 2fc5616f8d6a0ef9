"""What the sparse tests share: problems and their judgement."""

import torch

from harness.judge import assert_accurate, draws, yardsticks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(device, dtype, rows, columns, out):
    """w, x, bias, dy at unit variance."""
    shapes = (out, columns), (rows, columns), (out,), (rows, out)
    return [torch.randn(shape, dtype=dtype).to(device.torch) for shape in shapes]


def dense_results(reference, mask):
    """(x, w, bias, dy) -> y, dx, dvalues (at the mask, row by row), dbias of the reference in their dtype."""

    def run(x, w, bias, dy):
        x, w, bias = (t.clone().requires_grad_() for t in (x, w, bias))
        y = reference.linear(x, w, mask, bias)
        y.backward(dy)
        return y.detach(), x.grad, w.grad[mask], bias.grad

    return run


def assert_matches_dense(reference, results, x, w, mask, bias, dy):
    """``results`` are y, dx, dvalues, dbias: outputs within twice torch's error, gradients within three times."""
    run, problem = dense_results(reference, mask.cpu()), [t.detach().cpu() for t in (x, w, bias, dy)]
    rulers = yardsticks([run], problem, draws(len(bias)))
    for name, factor, got, ruler in zip(("y", "dx", "dvalues", "dbias"), (2, 3, 3, 3), results, rulers, strict=True):
        assert got.dtype == x.dtype, name
        assert_accurate(name, got.reshape(ruler.exact.shape), ruler, factor)
