"""Linear layers with CSR weights against the reference, on every CPU instruction set; CUDA says that it has none."""

import pytest
import torch

import tilewise as tw
from sparse_cases import DTYPES, assert_matches_dense, problem
from tilewise.reference import sparse as reference

# Rows, inputs, outputs, density: every width of tiles and panels, empty rows and columns, tails, one entry, all kept.
SHAPES = [
    (1, 1, 1, 1.0),
    (2, 300, 140, 0.2),
    (3, 9, 5, 0.5),
    (12, 300, 140, 0.2),
    (33, 300, 140, 0.2),
    (100, 300, 140, 0.2),
    (130, 700, 150, 0.1),
    (70, 600, 260, 0.04),
    (40, 65, 129, 1.0),
    (20, 31, 7, 0.02),
]


on_cpu = pytest.mark.devices("cpu")


def run_linear(x, weight, bias, dy):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight.values, bias)]
    weight.values = leaves[1]
    y = tw.linear(leaves[0], weight, leaves[2])
    y.backward(dy)
    return y, *(leaf.grad for leaf in leaves)


@on_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,columns,out,density", SHAPES)
def test_linear(device, dtype, rows, columns, out, density):
    w, x, bias, dy = problem(device, dtype, rows, columns, out)
    mask = torch.rand(out, columns) < density
    weight = tw.CSR.from_dense(w, mask=mask)
    assert_matches_dense(reference, run_linear(x, weight, bias, dy), x, w, mask, bias, dy)


@on_cpu
def test_identity_is_exact(device):
    w = torch.randn(50, 70) * (torch.rand(50, 70) < 0.3)
    weight = tw.CSR.from_dense(w)
    assert torch.equal(weight.to_dense(), w)
    for picked in (torch.randperm(70)[:5], torch.randperm(70)):
        assert torch.equal(tw.linear(torch.eye(70)[picked], weight), w.t()[picked])
    _, dx, dvalues, _ = run_linear(torch.eye(50, 70), weight, w[:, 0], torch.eye(50))
    assert torch.equal(dx, w) and torch.equal(dvalues, torch.eye(50, 70)[weight.mask()])


@on_cpu
def test_empty(device):
    for rows, columns, out in ((0, 5, 3), (4, 0, 3), (4, 5, 0), (20, 0, 3), (20, 5, 3)):
        weight = tw.CSR.from_dense(torch.zeros(out, columns))
        x, bias, dy = torch.randn(rows, columns), torch.randn(out), torch.randn(rows, out)
        y, dx, dvalues, _ = run_linear(x, weight, bias, dy)
        assert torch.equal(y, bias.expand(rows, out))
        assert dx.shape == x.shape and not dx.any() and dvalues.shape == (0,)
    weight = tw.CSR.from_dense(torch.randn(3, 5))
    assert not run_linear(torch.randn(0, 5), weight, torch.randn(3), torch.randn(0, 3))[2].any()


@on_cpu
def test_values_may_change_in_place(device):
    w, x, *_ = problem(device, torch.float32, 20, 40, 30)
    weight = tw.CSR.from_dense(w)
    before = tw.linear(x, weight)
    weight.values.mul_(2)
    assert torch.equal(tw.linear(x, weight), 2 * before)


@on_cpu
def test_foreign_plan(device):
    """The kernels follow the plan as it stands, so no column beyond the last, narrower tile, no order too large."""
    weight = tw.CSR.from_dense(torch.randn(9, 70))
    x, dy, tile = torch.randn(20, 70), torch.randn(20, 9), weight._tile
    *matrix, within = weight._matrix()
    assert tile == 64 and int(within.max()) == 63 and int(within[-1]) < 6
    for bad, error in ((within.clone(), ValueError), (within[1:].clone(), ValueError), (within.int(), TypeError)):
        bad[-1] = 6
        with pytest.raises(error, match="weight.plan"):
            torch.ops.tilewise.csr_linear(x, weight.values, None, [*matrix, bad], [], 70, tile)
        with pytest.raises(error, match="weight.plan"):
            torch.ops.tilewise.csr_linear_dvalues(dy, x, [*matrix, bad], tile)
    *transposed, order = weight._transposed()
    with pytest.raises(ValueError, match="weight.order"):
        torch.ops.tilewise.csr_linear(dy, weight.values, None, [*transposed, order + 1], [], 9, tile)
    with pytest.raises(TypeError, match="weight.order"):
        torch.ops.tilewise.csr_linear(dy, weight.values, None, [*transposed, order.long()], [], 9, tile)


@on_cpu
def test_matmul_and_storage(device):
    w = torch.randn(6, 10) * (torch.rand(6, 10) < 0.4)
    weight = tw.CSR.from_dense(w)
    x = torch.randn(10, 20)
    assert torch.equal(tw.matmul(weight, x), tw.linear(x.t().contiguous(), weight).t())
    assert weight.nbytes == 4 * (2 * int((w != 0).sum()) + 7)
    again = tw.CompressedWeight.from_state_dict(weight.state_dict())
    assert isinstance(again, tw.CSR) and torch.equal(again.to_dense(), w)


def test_opcheck():
    weight = tw.CSR.from_dense(torch.randn(7, 16) * (torch.rand(7, 16) < 0.5))
    x, dy = torch.randn(5, 16), torch.randn(5, 7)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight.values, torch.randn(7))]
    matrix, transposed, tile = weight._matrix(), weight._transposed(), weight._tile
    torch.library.opcheck(torch.ops.tilewise.csr_linear, (*leaves, matrix, transposed, 16, tile))
    torch.library.opcheck(torch.ops.tilewise.csr_linear, (x, weight.values, None, matrix, [], 16, tile))
    torch.library.opcheck(torch.ops.tilewise.csr_linear_dvalues, (dy, x, matrix, tile))


def test_no_kernel_on_cuda(device):
    weight = tw.CSR.from_dense(torch.randn(3, 4))
    if device.kind == "cpu":
        assert tw.linear(torch.randn(2, 4), weight).shape == (2, 3)
        return
    with pytest.raises(NotImplementedError, match="CSR on"):
        tw.linear(torch.randn(2, 4, device=device.torch), weight.to(device.torch))
