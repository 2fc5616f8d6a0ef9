"""2:4 products on AMX tiles, in 16 bits: where tiles, panels, blocks and segments end; what is not finite; threads."""

import pytest
import torch

import tilewise as tw
from sparse_cases import assert_matches_dense, problem
from test_sparse import run_linear
from tilewise.reference import sparse as reference

OPS = torch.ops.tilewise
HALVES = [torch.bfloat16, torch.float16]

# Rows, inputs, outputs. Look-up, one and two columns of tiles, panels; one below, at and above a tile of 16, a square
# of 32 and a panel of 64; inputs that are a multiple of 4 but not of 8; more than one block, panel and segment (2048).
EDGES = [
    (2, 68, 65), (3, 4, 1), (15, 28, 63), (16, 32, 64), (17, 36, 33), (31, 60, 16), (32, 64, 17), (33, 68, 15),
    (64, 132, 31), (65, 124, 64), (97, 192, 130),
]  # fmt: skip
LARGE = [(300, 2052, 70), (70, 100, 2050), (2060, 36, 40), (1100, 516, 36), (1, 4100, 72), (20, 4100, 40)]


def check(device, dtype, rows, columns, out):
    w, x, bias, dy = problem(device, dtype, rows, columns, out)
    weight = tw.NMSparse.from_dense(w)
    assert_matches_dense(reference, run_linear(x, weight, bias, dy), x, w, weight.mask(), bias, dy)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows,columns,out", EDGES)
def test_edges(device, dtype, rows, columns, out):
    check(device, dtype, rows, columns, out)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows,columns,out", LARGE)
def test_large(device, dtype, rows, columns, out):
    check(device, dtype, rows, columns, out)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows,columns,out", [(20, 68, 40), (70, 132, 75), (300, 64, 520)])
def test_small_integers_are_exact(device, dtype, rows, columns, out):
    """Sums of small integers have no rounding: every product that is left out, doubled or misplaced shows."""
    w, x, dy = (torch.randint(-2, 3, s).to(dtype) for s in ((out, columns), (rows, columns), (rows, out)))
    w, x, dy = (t.to(device.torch) for t in (w, x, dy))
    weight = tw.NMSparse.from_dense(w)
    dense, mask = weight.to_dense().float(), weight.mask()
    expected = x.float() @ dense.t(), dy.float() @ dense, (dy.float().t() @ x.float())[mask].view(weight.values.shape)
    y = OPS.nm_linear(x, weight.values, weight.indices, None)
    dx = OPS.nm_linear_dx(dy, weight.values, weight.indices)
    dvalues = OPS.nm_linear_dvalues(dy, x, weight.indices)
    for got, right in zip((y, dx, dvalues), expected, strict=True):
        assert torch.equal(got, right.to(dtype))


def zero_weights(out, columns, dtype, device):
    """Keeps the first two of every four; the others, which x may meet with infinity, are not there."""
    mask = torch.tensor([True, True, False, False], device=device.torch).repeat(out, columns // 4)
    return tw.NMSparse.from_dense(torch.randn(out, columns, dtype=dtype, device=device.torch), mask=mask)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [2, 5, 30, 70])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_dropped_inputs_are_ignored(device, dtype, rows, bad):
    """What no weight was kept for reaches nothing, NaN and infinity neither; nor does it change a bit of other rows."""
    weight = zero_weights(40, 72, dtype, device)
    x = torch.randn(rows, 72, dtype=dtype)
    clean = tw.linear(x, weight)
    x[1, 6] = x[rows - 1, 71] = bad  # both dropped
    y = tw.linear(x, weight)
    touched = torch.zeros(rows, dtype=torch.bool)
    touched[[1, rows - 1]] = True
    assert torch.equal(y[~touched], clean[~touched])
    assert y.isfinite().all() and torch.allclose(y.float(), clean.float(), rtol=0.02, atol=0.02)
    x[1, 5] = bad  # kept
    y = tw.linear(x, weight)
    assert not y[1].isfinite().any() and torch.equal(y[~touched], clean[~touched])


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [5, 70])
def test_gradients_not_finite(device, dtype, rows):
    """They reach the inputs that depend on them and no other row; dvalues depend on their own two columns only."""
    weight = zero_weights(40, 72, dtype, device)
    x, dy = torch.randn(rows, 72, dtype=dtype), torch.randn(rows, 40, dtype=dtype)
    clean = OPS.nm_linear_dx(dy, weight.values, weight.indices)
    clean_values = OPS.nm_linear_dvalues(dy, x, weight.indices)
    dy[1, 7] = torch.inf
    dx = OPS.nm_linear_dx(dy, weight.values, weight.indices)
    assert not dx[1, weight.mask()[0]].isfinite().any()
    assert torch.equal(dx[2:], clean[2:]) and torch.equal(dx[0], clean[0])
    dvalues = OPS.nm_linear_dvalues(dy, x, weight.indices)
    others = torch.arange(40) != 7
    assert torch.equal(dvalues[others], clean_values[others]) and not dvalues[7].isfinite().any()


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows,columns,out", [(20, 132, 200), (300, 68, 140), (40, 2180, 2120)])
def test_threads_do_not_matter(device, dtype, rows, columns, out):
    w, x, bias, dy = problem(device, dtype, rows, columns, out)
    weight, threads, found = tw.NMSparse.from_dense(w), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append([t.detach() for t in run_linear(x, weight, bias, dy)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
