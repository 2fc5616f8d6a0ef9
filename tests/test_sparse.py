"""Linear layers with 2:4 weights against the reference, on every device."""

import pytest
import torch

import tilewise as tw
from harness.emulation import assert_schedules_agree
from harness.judge import assert_accurate, yardsticks
from sparse_cases import DTYPES, assert_matches_dense, problem
from tilewise.reference import sparse as reference

# Rows, inputs, outputs: few rows (look-up kernels), tails in every direction, several tiles and panels.
SHAPES = [(1, 4, 1), (2, 8, 3), (7, 20, 33), (17, 100, 17), (40, 128, 72), (50, 132, 65), (130, 256, 136)]
LONG = [(600, 68, 300), (1, 2048, 256), (16, 512, 129), (1030, 36, 20)]


def run_linear(x, weight, bias, dy):
    """y, dx, dvalues, dbias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight.values, bias)]
    weight.values = leaves[1]
    y = tw.linear(leaves[0], weight, leaves[2])
    y.backward(dy)
    return y, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,columns,out", SHAPES)
def test_linear(device, dtype, rows, columns, out):
    w, x, bias, dy = problem(device, dtype, rows, columns, out)
    weight = tw.NMSparse.from_dense(w)
    assert_matches_dense(reference, run_linear(x, weight, bias, dy), x, w, weight.mask(), bias, dy)


@pytest.mark.parametrize("rows,columns,out", LONG)
def test_linear_long(device, rows, columns, out):
    if device.small:
        rows, columns = min(rows, 130), min(columns, 512)
    w, x, bias, dy = problem(device, torch.float32, rows, columns, out)
    weight = tw.NMSparse.from_dense(w)
    assert_matches_dense(reference, run_linear(x, weight, bias, dy), x, w, weight.mask(), bias, dy)


@pytest.mark.modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,columns,out", [(3, 64, 8), (18, 12, 7), (20, 192, 40)])
def test_linear_small(device, dtype, rows, columns, out):
    w, x, bias, dy = problem(device, dtype, rows, columns, out)
    weight = tw.NMSparse.from_dense(w)
    assert_matches_dense(reference, run_linear(x, weight, bias, dy), x, w, weight.mask(), bias, dy)


@pytest.mark.modes
def test_schedules(device):
    if device.kind != "emulated":
        return
    w, x, bias, dy = problem(device, torch.bfloat16, 20, 192, 24)
    weight = tw.NMSparse.from_dense(w)
    assert_schedules_agree(lambda: tuple(t.detach() for t in run_linear(x, weight, bias, dy)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [16, 64], ids=["few", "many"])
def test_identity_input_is_exact(device, dtype, rows):
    """Rows of the identity pick single weights: a wrong permutation cannot hide in rounding."""
    w = torch.randn(24, 64, dtype=dtype, device=device.torch)
    weight = tw.NMSparse.from_dense(w)
    picked = torch.randperm(64, device=device.torch)[:rows]
    y = tw.linear(torch.eye(64, dtype=dtype, device=device.torch)[picked], weight)
    assert torch.equal(y, weight.to_dense().t()[picked])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_gradients_are_exact(device, dtype):
    w = torch.randn(64, 64, dtype=dtype, device=device.torch)
    weight, eye = tw.NMSparse.from_dense(w), torch.eye(64, dtype=dtype, device=device.torch)
    _, dx, _, _ = run_linear(eye, weight, w[0], eye)
    assert torch.equal(dx, weight.to_dense())
    _, _, dvalues, _ = run_linear(w, weight, w[0], eye)  # dy^T x = w
    assert torch.equal(dvalues, weight.values)


@pytest.mark.parametrize("rows", [5, 40])
def test_views(device, rows):
    """Rows apart, rows repeated (stride 0), an unaligned start, an expanded gradient."""
    w, base, bias, _ = problem(device, torch.bfloat16, rows, 3 * 64 + 1, 24)
    weight = tw.NMSparse.from_dense(w[:, :64].contiguous())
    for x in (base[:, :64], base[:, 1:65], base[:1, 64:128].expand(rows, 64)):
        expected = tw.linear(x.contiguous(), weight, bias)
        assert torch.equal(tw.linear(x, weight, bias), expected)
    leaf = base[:, :64].detach().requires_grad_()
    tw.linear(leaf, weight).sum().backward()
    dense = weight.to_dense().detach().cpu()
    plain = lambda w: [torch.ones(rows, 24, dtype=w.dtype) @ w]  # noqa: E731
    assert_accurate("dx", leaf.grad, *yardsticks([plain], [dense], 4), 3)


def test_leading_dimensions_and_empty(device):
    weight = tw.NMSparse.from_dense(torch.randn(6, 8, device=device.torch))
    x = torch.randn(2, 3, 8, device=device.torch)
    assert torch.equal(tw.linear(x, weight), tw.linear(x.reshape(6, 8), weight).reshape(2, 3, 6))
    assert torch.equal(tw.linear(x[0, 0], weight), tw.linear(x[0, :1], weight)[0])
    for shape in ((0, 8), (4, 0, 8)):
        leaf = torch.randn(shape, device=device.torch, requires_grad=True)
        weight.values = weight.values.detach().requires_grad_()
        y = tw.linear(leaf, weight)
        assert y.shape == (*shape[:-1], 6)
        y.sum().backward()
        assert leaf.grad.shape == shape and not weight.values.grad.any()
    for out, columns in ((0, 8), (6, 0)):
        empty = tw.NMSparse.from_dense(torch.randn(out, columns, device=device.torch))
        leaf = torch.randn(3, columns, device=device.torch, requires_grad=True)
        bias = torch.randn(out, device=device.torch)
        y = tw.linear(leaf, empty, bias)
        assert torch.equal(y, bias.expand(3, out))
        y.sum().backward()
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


def test_matmul(device):
    w, x, _, _ = problem(device, torch.float32, 20, 64, 12)
    weight = tw.NMSparse.from_dense(w)
    assert torch.equal(tw.matmul(weight, x.t()), tw.linear(x, weight).t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 20])
def test_not_finite(device, dtype, rows):
    """NaN and infinity reach the outputs that depend on them, and no other row."""
    w = torch.randn(9, 12, dtype=dtype, device=device.torch)
    weight = tw.NMSparse.from_dense(w)
    x = torch.randn(rows, 12, dtype=dtype, device=device.torch)
    clean = tw.linear(x, weight)
    for bad in (torch.nan, torch.inf):
        x[1, 5] = bad
        y = tw.linear(x, weight)
        touched = weight.mask()[:, 5] & (weight.to_dense()[:, 5] != 0)
        assert not y[1, touched].isfinite().any()
        rest = torch.arange(rows, device=device.torch) != 1
        assert torch.equal(y[rest], clean[rest])


def test_gradients_by_differences(device):
    """Central differences of the fp32 operator itself; the step is large because the map is bilinear (no curvature)."""
    w, x, bias, dy = problem(device, torch.float32, 3, 8, 5)
    weight = tw.NMSparse.from_dense(w)
    _, *gradients = run_linear(x, weight, bias, dy)
    inputs = [x, weight.values.detach(), bias]
    for i, gradient in enumerate(gradients):
        flat = torch.empty(inputs[i].numel(), device=device.torch)
        for j in range(flat.numel()):
            values = []
            for step in (1.0, -1.0):
                moved = [t.clone() for t in inputs]
                moved[i].view(-1)[j] += step
                y = tw.linear(moved[0], tw.NMSparse(moved[1], weight.indices), moved[2])
                values.append((y * dy).sum())
            flat[j] = (values[0] - values[1]) / 2
        assert torch.allclose(flat.view_as(gradient), gradient, rtol=1e-4, atol=1e-4)


def test_pattern_follows_the_reference():
    w = torch.randn(50, 64)
    w[:20] = torch.randint(-2, 3, (20, 64)).float()  # many ties
    weight = tw.NMSparse.from_dense(w)
    mask = reference.nm_mask(w)
    assert torch.equal(weight.mask(), mask)
    assert torch.equal(weight.to_dense(), torch.where(mask, w, 0))
    assert torch.equal(tw.NMSparse.from_dense(w, mask=mask).values, weight.values)
    zero = tw.NMSparse.from_dense(torch.zeros(1, 8))
    assert zero.indices.tolist() == [[0x44]]  # of equals, the lower index


@pytest.mark.parametrize("columns", [4, 8, 12, 64])
def test_storage(columns):
    w = torch.randn(5, columns, dtype=torch.bfloat16)
    weight = tw.NMSparse.from_dense(w)
    bytes_per_row = (columns + 7) // 8
    assert weight.values.shape == (5, columns // 2) and weight.indices.shape == (5, bytes_per_row)
    assert weight.nbytes == 5 * (columns + bytes_per_row) and weight.shape == (5, columns)
    assert weight.dtype == torch.bfloat16 and weight.to("cpu") is weight
    again = tw.CompressedWeight.from_state_dict(weight.state_dict())
    assert isinstance(again, tw.NMSparse) and torch.equal(again.to_dense(), weight.to_dense())


def test_training_moves_only_values():
    torch.manual_seed(0)
    weight = tw.NMSparse.from_dense(torch.randn(16, 32))
    weight.values = torch.nn.Parameter(weight.values)
    indices = weight.indices.clone()
    target = torch.randn(16, 32)
    optimizer = torch.optim.Adam([weight.values], lr=0.05)
    x = torch.randn(64, 32)
    losses = []
    for _ in range(60):
        loss = (tw.linear(x, weight) - x @ torch.where(weight.mask(), target, 0).t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert torch.equal(weight.indices, indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    ops, x, bias = torch.ops.tilewise, torch.randn(5, 16, dtype=dtype), torch.randn(7, dtype=dtype)
    weight = tw.NMSparse.from_dense(torch.randn(7, 16, dtype=dtype))
    values, dy = weight.values, torch.randn(5, 7, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (x, values, bias)]
    torch.library.opcheck(ops.nm_linear, (leaves[0], leaves[1], weight.indices, leaves[2]))
    torch.library.opcheck(ops.nm_linear, (x, values, weight.indices, None))
    torch.library.opcheck(ops.nm_linear_dx, (dy, values, weight.indices))
    torch.library.opcheck(ops.nm_linear_dvalues, (dy, x, weight.indices))
    torch.library.opcheck(ops.column_sum, (dy,))


def test_compiles_in_one_graph():
    weight = tw.NMSparse.from_dense(torch.randn(7, 16))
    x = torch.randn(5, 16)
    compiled = torch.compile(
        lambda x, v: torch.ops.tilewise.nm_linear(x, v, weight.indices, None), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x, weight.values), tw.linear(x, weight))
