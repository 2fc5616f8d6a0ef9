"""Attention against the reference, on every device: dense shapes, values, strides, determinism, registration."""

import math

import pytest
import torch

import tilewise as tw
from attention_cases import DTYPES, Shape, assert_lse_close, inputs, judge
from harness.emulation import assert_schedules_agree
from harness.judge import assert_accurate, draws, yardsticks
from tilewise.attention.options import pack
from tilewise.reference import attention as reference

SHAPES = [
    Shape(1, 1, 1, 1, 1, 64, 64),
    Shape(2, 4, 2, 65, 130, 64, 64),
    Shape(1, 2, 1, 127, 127, 128, 128),
    Shape(1, 3, 3, 200, 77, 64, 64),
    Shape(1, 1, 1, 1030, 1030, 64, 64),
    Shape(2, 8, 1, 1, 300, 128, 128),
]
FEW_QUERIES = [
    *(Shape(4, 4 * group, 4, queries, 140, 64, 64) for group in (4, 8) for queries in (1, 3, 8)),
    Shape(3, 6, 2, 7, 150, 40, 24),  # three rows of a query, which no vector is a multiple of
    Shape(4, 24, 1, 2, 130, 64, 64),  # more than a vector
    Shape(1, 4, 1, 12, 5, 64, 64),
]
# The same for the tensor cores, where up to 16 rows, and up to 64, are a tile.
SHARED_TILES = [
    (Shape(2, 6, 2, 3, 150, 64, 64), torch.bfloat16),
    (Shape(1, 8, 1, 5, 130, 64, 64), torch.float16),
    (Shape(1, 4, 1, 1, 70, 128, 128), torch.float16),
    (Shape(1, 4, 1, 32, 20, 128, 128), torch.bfloat16),
]
SHARED_RULES = {
    "dense": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (40, None), "softcap": 3.0},
    "both-sides": {"window": (9, 5)},
}
ODD_DIMS = [
    Shape(1, 2, 1, 33, 65, 40, 24),
    Shape(1, 2, 2, 50, 70, 7, 3),  # no row sees a single key: torch's terms would cancel exactly in three dimensions
    Shape(1, 1, 1, 64, 64, 256, 256),
    Shape(1, 2, 2, 70, 200, 256, 256),  # more keys than the tile kernel packs at a time
    Shape(1, 1, 1, 33, 600, 256, 256),  # the same in several runs
]
EMPTY = [Shape(2, 3, 3, 16, 0, 64, 64), Shape(0, 3, 3, 16, 4, 64, 64), Shape(1, 2, 1, 0, 5, 64, 64)]


def check(shape, dtype, device, causal, layout="bhsd", scale=None):
    """Output, lse and gradients against float64, beside plain torch in the same dtype."""
    q, k, v = inputs(shape, dtype, device, layout)
    dout = torch.randn(*q.shape[:3], v.shape[-1]).to(device.torch, dtype)
    options = {"causal": causal, "scale": scale}
    kernel = lambda q, k, v: tw.attention(q, k, v, return_lse=True, **options)  # noqa: E731
    plain = lambda q, k, v: reference.attention(q, k, v, **options)  # noqa: E731
    judge(kernel, plain, (q, k, v), dout, dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(device, shape, dtype, causal):
    check(shape.on(device), dtype, device, causal)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", FEW_QUERIES, ids=str)
def test_few_queries(device, shape, dtype, causal):
    """The heads of a group share a tile."""
    check(shape, dtype, device, causal, layout="bshd" if shape.queries == 3 else "bhsd")


@pytest.mark.modes
@pytest.mark.parametrize("options", SHARED_RULES.values(), ids=SHARED_RULES)
@pytest.mark.parametrize("shape,dtype", SHARED_TILES, ids=str)
def test_heads_of_a_group_share_a_tile(device, shape, dtype, options):
    tensors = inputs(shape, dtype, device, "bshd" if shape.queries == 3 else "bhsd")
    out, lse = tw.attention(*tensors, return_lse=True, **options)
    plain = lambda q, k, v: reference.attention(q, k, v, **options)  # noqa: E731
    rulers = yardsticks([lambda *t: plain(*t)[:1]], tensors, draws(8 * lse.numel()))
    assert_accurate("out", out, *rulers, 2)
    assert_lse_close(lse, plain(*(t.double() for t in tensors))[1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", ODD_DIMS, ids=str)
def test_head_dims(device, shape, dtype):
    check(shape.on(device), dtype, device, causal=True)


@pytest.mark.modes
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
def test_small(device, dtype, causal):
    check(Shape(1, 2, 1, 21, 37, 64, 64), dtype, device, causal)


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(device, shape, causal):
    q, k, v = (t.requires_grad_() for t in inputs(shape.on(device), torch.float32, device))
    out, lse = tw.attention(q, k, v, causal=causal, return_lse=True)
    assert out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == q.shape[:3]
    assert (out == 0).all() and (lse == -math.inf).all()
    for gradient, of in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert gradient.shape == of.shape and (gradient == 0).all()


def test_rows_with_nothing_to_attend_to(device):
    shape = Shape(1, 2, 2, 70, 30, 64, 64).on(device)
    blind = shape.queries - shape.keys
    q, k, v = inputs(shape, torch.float32, device)
    q[:, :, :blind] = math.nan  # not even these may show
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = tw.attention(*leaves, causal=True, return_lse=True)
    assert (out[:, :, :blind] == 0).all() and (lse[:, :, :blind] == -math.inf).all()
    assert out[:, :, blind:].isfinite().all() and lse[:, :, blind:].isfinite().all()
    dq = torch.autograd.grad(out.sum(), leaves)[0]
    assert (dq[:, :, :blind] == 0).all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_scale(device, scale):
    check(Shape(1, 2, 1, 40, 60, 64, 64), torch.float32, device, causal=False, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_strided(device, dtype):
    check(Shape(2, 4, 2, 65, 130, 64, 64).on(device), dtype, device, causal=True, layout="bshd")


def test_slices_of_one_projection(device):
    """q, k and v as views into one packed projection, rows far apart; a broadcast batch; out in q's own layout."""
    fused = torch.randn(2, 45, 3, 2, 64).to(device.torch)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    got = tw.attention(q, k, v, causal=True)
    assert got.transpose(1, 2).is_contiguous()
    assert torch.equal(got, tw.attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True))
    wide = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
    assert torch.equal(tw.attention(q, *wide)[1], tw.attention(q[1:], k[:1], v[:1])[0])


def test_gradient_of_sum(device):
    """The gradient of sum() has stride 0 everywhere."""
    shape = Shape(1, 1, 1, 20, 20, 64, 64)
    q, k, v = (t.requires_grad_() for t in inputs(shape, torch.float32, device))
    got = torch.autograd.grad(tw.attention(q, k, v).sum(), (q, k, v))
    expected = torch.autograd.grad(reference.attention(q, k, v)[0].sum(), (q, k, v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize(
    "dtype,queries,bound",
    [
        (torch.float32, 64, 1e-4),
        (torch.float16, 64, 1e-3),
        (torch.bfloat16, 64, 4e-3),
        (torch.bfloat16, 150, 4e-3),  # many tiles, not a few
    ],
    ids=str,
)
def test_scores_far_apart(device, dtype, queries, bound, causal):
    """Rising scores move the running maximum in every block; huge ones must neither overflow nor vanish."""
    shape = Shape(1, 1, 1, queries, 400, 64, 64).on(device)
    q, k, v = inputs(shape, dtype, device)
    k *= torch.linspace(0.1, 30, shape.keys, device=device.torch)[:, None].to(dtype)
    exact = reference.attention(q.double(), k.double(), v.double(), causal=causal)
    out, lse = tw.attention(q, k, v, causal=causal, return_lse=True)
    assert ((out - exact[0]).norm() / exact[0].norm()) < bound  # float32 scores of a few hundred
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "dtype,atol,rtol",
    [(torch.float32, 1e-5, 1e-4), (torch.float16, 1e-3, 1e-3), (torch.bfloat16, 2e-3, 2.0**-7)],
    ids=DTYPES,
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_not_finite(device, which, bad, dtype, atol, rtol):
    """As in torch: rows that meet NaN give NaN, and everything else is untouched."""
    shape = Shape(1, 1, 1, 40, 150, 64, 64).on(device)
    tensors = dict(zip("qkv", inputs(shape, dtype, device), strict=True))
    tensors[which][0, 0, torch.randint(40, ()), 3] = bad
    got, lse = tw.attention(*tensors.values(), return_lse=True)
    expected, expected_lse = reference.attention(*(t.float() for t in tensors.values()))
    torch.testing.assert_close(got.float(), expected, equal_nan=True, atol=atol, rtol=rtol)
    expected_lse = expected_lse.where(expected_lse != math.inf, math.nan)  # an infinite score: NaN here, +inf in torch
    torch.testing.assert_close(lse, expected_lse, equal_nan=True, atol=1e-5, rtol=1e-4)
    leaves = [t.requires_grad_() for t in tensors.values()]
    gradients = torch.autograd.grad(tw.attention(*leaves).sum(), leaves)
    assert not all(g.isfinite().all() for g in gradients)


@pytest.mark.modes
def test_schedules(device):
    """Bit-identical in every schedule under emulation; elsewhere in every run, and on CPU for any number of threads."""
    q, k, v = (t.requires_grad_() for t in inputs(Shape(1, 2, 1, 30, 50, 64, 64), torch.bfloat16, device))

    def run():
        out, lse = tw.attention(q, k, v, causal=True, return_lse=True, deterministic=True)
        return out, lse, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    if device.kind == "emulated":
        assert_schedules_agree(run)
    else:
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_any_number_of_threads(device):
    shape = Shape(1, 1, 1, 900, 900, 64, 64).on(device)
    q, k, v = (t.requires_grad_() for t in inputs(shape, torch.float32, device))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = tw.attention(q, k, v, causal=True)
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_finite_differences(device):
    """gradcheck in float32: the loss is measured in float64, the step is wide, so the bound is loose (1 %)."""
    q, k, v = inputs(Shape(1, 1, 1, 6, 9, 64, 64), torch.float32, device)
    weights = torch.randn(1, 1, 6, 64, dtype=torch.float64, device=device.torch)
    loss = lambda *t: (tw.attention(*t).double() * weights).sum()  # noqa: E731
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    step = 2.0**-6
    for i, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        moved = [[t + sign * step * direction if i == j else t for j, t in enumerate((q, k, v))] for sign in (1, -1)]
        measured = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
        assert abs(measured - (gradient * direction).sum()) < 1e-2 * gradient.norm() * direction.norm()


def test_gradient_of_lse_alone(device):
    """lse depends on q and k only: its gradient is the weighted mean of the other's rows."""
    q, k, v = (t.requires_grad_() for t in inputs(Shape(1, 1, 1, 3, 5, 64, 64), torch.float32, device))
    _, lse = tw.attention(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    weights = (q @ k.transpose(-1, -2) / 8).softmax(-1)
    torch.testing.assert_close(dq, weights @ k / 8)
    torch.testing.assert_close(dk, weights.transpose(-1, -2) @ q / 8)
    assert (dv == 0).all()


def test_out_variant(device):
    """Writes exactly its outputs, also into a strided one."""
    q, k, v = inputs(Shape(1, 2, 1, 30, 40, 64, 64), torch.float32, device)
    expected, expected_lse = tw.attention(q, k, v, causal=True, return_lse=True)
    frame = torch.full((1, 30, 2, 80), 7.0, device=device.torch)
    out, lse = frame[..., 8:72].transpose(1, 2), torch.empty_like(expected_lse)
    assert torch.ops.tilewise.attention_out(q, k, v, out, lse, True) is None
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert (frame[..., :8] == 7).all() and (frame[..., 72:] == 7).all()


@pytest.mark.parametrize("v_dim", [64, 32])
def test_opcheck(v_dim):
    q, k, v = (torch.randn(1, 2, 9, d, requires_grad=True) for d in (64, 64, v_dim))
    ops, options = torch.ops.tilewise, lambda q, **given: pack("attention", q, 9, **given)
    torch.library.opcheck(ops.attention.default, (q, k, v, *options(q, causal=True)))
    out, lse = (t.detach() for t in tw.attention(q, k, v, return_lse=True))
    q, k, v = (t.detach() for t in (q, k, v))
    torch.library.opcheck(ops.attention_backward.default, (out, lse, q, k, v, out, lse, False, *options(q, scale=0.5)))
    torch.library.opcheck(ops.attention_out.default, (q, k, v, out, lse, True, 0.5))


def test_compiles_whole():
    """No graph break, and the same results with symbolic lengths."""
    compiled = torch.compile(
        lambda q, k, v: tw.attention(q, k, v, causal=True).sum(), backend="aot_eager", fullgraph=True
    )
    for rows in (8, 12, 20):
        q, k, v = (torch.randn(1, 2, rows, 64, requires_grad=True) for _ in range(3))
        got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
        expected = torch.autograd.grad(tw.attention(q, k, v, causal=True).sum(), (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
