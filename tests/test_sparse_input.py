"""Bad input to the sparse family: the documented error or the right result, and nothing changed in place."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from harness.emulation import assert_schedules_agree

OPS = torch.ops.tilewise


def two_four(out=6, columns=8, dtype=torch.float32, device="cpu"):
    return tw.NMSparse.from_dense(torch.randn(out, columns, dtype=dtype, device=device))


X, ONES = torch.randn(3, 8), torch.ones(3, 8, dtype=torch.bool)
from_dense = tw.NMSparse.from_dense

ERRORS = [
    (ValueError, "x has shape", lambda w: tw.linear(torch.randn(3, 12), w)),
    (ValueError, "x has shape", lambda w: tw.linear(torch.randn(()), w)),
    (ValueError, "stride", lambda w: tw.linear(torch.randn(8, 3).t(), w)),
    (TypeError, "x has dtype float64", lambda w: tw.linear(X.double(), w)),
    (TypeError, "weight.values has dtype float32, expected bfloat16", lambda w: tw.linear(X.bfloat16(), w)),
    (TypeError, "x is a list", lambda w: tw.linear([1.0] * 8, w)),
    (TypeError, "weight is a Tensor", lambda w: tw.linear(X, torch.randn(6, 8))),
    (ValueError, "bias has shape", lambda w: tw.linear(X, w, torch.randn(5))),
    (TypeError, "bias has dtype", lambda w: tw.linear(X, w, torch.randn(6).half())),
    (ValueError, "x has shape", lambda w: tw.matmul(w, torch.randn(8))),
    (ValueError, "multiple of 4", lambda w: from_dense(torch.randn(3, 6))),
    (NotImplementedError, "n, m are 1, 4", lambda w: from_dense(X, 1, 4)),
    (TypeError, "w has dtype int64", lambda w: from_dense(X.long())),
    (ValueError, "w has shape", lambda w: from_dense(torch.randn(8))),
    (ValueError, "mask keeps", lambda w: from_dense(X, mask=ONES)),
    (ValueError, "mask has shape", lambda w: tw.CSR.from_dense(X, mask=ONES[:, :4])),
    (ValueError, "values has shape", lambda w: setattr(w, "values", torch.randn(6, 5))),
    (TypeError, "values is a int", lambda w: setattr(w, "values", 3)),
    (ValueError, "indices", lambda w: OPS.nm_linear(X, w.values, torch.zeros_like(w.indices), None)),
    (TypeError, "indices has dtype", lambda w: OPS.nm_linear(X, w.values, w.indices.int(), None)),
    (ValueError, "x has shape", lambda w: OPS.nm_linear_dvalues(torch.randn(3, 6), torch.randn(4, 8), w.indices)),
    (ValueError, "dy has shape", lambda w: OPS.nm_linear_dx(torch.randn(3, 5), w.values, w.indices)),
]


@pytest.mark.parametrize("error,text,call", ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_documented_errors(error, text, call):
    with pytest.raises(error, match=text):
        call(two_four())


@pytest.mark.modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [0x40, 0x45, 0xF4, 0x14], ids=hex)
def test_bad_metadata(device, dtype, bad):
    """CPU refuses; CUDA kernels stay inside the tensors and leave the other outputs right, and the next call raises."""
    weight = two_four(20, 64, dtype, device.torch)
    x, dy = (torch.randn(20, n, dtype=dtype, device=device.torch) for n in (64, 20))
    clean = OPS.nm_linear(x, weight.values, weight.indices, None)
    indices = weight.indices.clone()
    indices[3, 2] = bad
    for call in (
        lambda: OPS.nm_linear(x, weight.values, indices, None),
        lambda: OPS.nm_linear_dx(dy, weight.values, indices),
        lambda: OPS.nm_linear_dvalues(dy, x, indices),
    ):
        with pytest.raises(ValueError):
            y = call()
            others = torch.arange(20, device=device.torch) != 3
            if y.shape == clean.shape:
                assert torch.equal(y[:, others], clean[:, others])
            call()  # raises what the kernel reported
    assert torch.equal(OPS.nm_linear(x, weight.values, weight.indices, None), clean)


@pytest.mark.modes
def test_odd_groups_need_no_metadata(device):
    """The unused last nibble is 0, which no group may be: the kernels must not mistake it for one."""
    weight = two_four(18, 12, torch.bfloat16, device.torch)
    x = torch.randn(20, 12, dtype=torch.bfloat16, device=device.torch)
    for _ in range(2):  # a report would raise at the second
        OPS.nm_linear_dvalues(tw.linear(x, weight), x, weight.indices)
    if device.kind == "emulated":
        assert_schedules_agree(lambda: tw.linear(x, weight), count=3)


# ---- thousands of odd calls: hypothesis draws the seeds, which makes an example cost milliseconds ----
SEEDS = st.integers(0, 2**32 - 1)


def seeded(seed):
    torch.manual_seed(seed)
    return random.Random(seed)


def odd_tensor(rng, shape, dtype):
    """Mostly as asked; sometimes another shape, dtype or layout, or not finite."""
    if rng.random() < 0.05:
        shape = tuple(rng.choices([0, 1, 2, 4, 8, 12], k=rng.randrange(4)))
    if rng.random() < 0.05:
        dtype = rng.choice([torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64])
    tensor = torch.randn(shape).mul(3).to(dtype)
    if tensor.is_floating_point() and tensor.numel() and rng.random() < 0.05:
        tensor.view(-1)[0] = rng.choice([torch.nan, torch.inf, -torch.inf])
    layout = rng.randrange(16)
    if layout == 0 and tensor.ndim == 2:
        return tensor.t().contiguous().t()
    if layout == 1 and tensor.ndim:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == 2 and tensor.ndim == 2 and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    return tensor


def odd_indices(rng, out, groups):
    """Legal nibbles, but sometimes not."""
    nibbles = [4, 8, 9, 12, 13, 14] if rng.random() < 0.7 else list(range(16))
    rows = [rng.choices(nibbles, k=groups) + [0] * (groups % 2) for _ in range(out)]
    if groups % 2 and out and rng.random() < 0.1:
        rows[-1][-1] = 4
    packed = [[a | b << 4 for a, b in zip(row[::2], row[1::2], strict=True)] for row in rows]
    return torch.tensor(packed, dtype=torch.uint8).reshape(out, (groups + 1) // 2)


def unchanged(now, before):
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(now, before, strict=True))


@settings(max_examples=2500, deadline=None)
@given(SEEDS)
def test_any_call(seed):
    """The operators on anything: a listed error, or the result of dense arithmetic; the inputs stay as they are."""
    rng = seeded(seed)
    rows, out, groups = rng.choice([0, 1, 3, 18]), rng.choice([0, 1, 2, 5]), rng.randrange(4)
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    x, dy = odd_tensor(rng, (rows, 4 * groups), dtype), odd_tensor(rng, (rows, out), dtype)
    values, indices = odd_tensor(rng, (out, 2 * groups), dtype), odd_indices(rng, out, groups)
    bias = odd_tensor(rng, (out,), dtype) if rng.random() < 0.5 else None
    inputs = [t for t in (x, dy, values, bias, indices) if t is not None]
    before = [t.clone() for t in inputs]
    try:
        y = OPS.nm_linear(x, values, indices, bias)
        dx, dvalues = OPS.nm_linear_dx(dy, values, indices), OPS.nm_linear_dvalues(dy, x, indices)
        total = OPS.column_sum(dy)
    except (ValueError, TypeError):
        assert unchanged(inputs, before)
        return
    assert unchanged(inputs, before)
    weight = tw.NMSparse(values, indices)  # what the kernels accept, the class does
    if not all(bool(t.isfinite().all()) for t in inputs):
        return
    x, dy, dense = x.double(), dy.double(), weight.to_dense().double()
    results = [
        (y, x @ dense.t() + (0 if bias is None else bias.double())),
        (dx, dy @ dense),
        (dvalues, (dy.t() @ x)[weight.mask()].view_as(dvalues)),
        (total, dy.sum(0)),
    ]
    relative = 8 * torch.finfo(dtype).eps
    for got, exact in results:
        assert torch.allclose(got.double(), exact, rtol=relative, atol=1e-4 + 8 * relative)


def junk(rng):
    return rng.choice([None, 3, -1, 2.5, "nm_2_4", "csr", True, [], torch.zeros(2), torch.zeros(3, dtype=torch.int32)])


def corrupt(rng, state):
    key = rng.choice([*state, "extra"])
    entry, how = state.get(key), rng.randrange(5)
    if how == 0:
        state.pop(key, None)
    elif how == 1 or not isinstance(entry, torch.Tensor):
        state[key] = junk(rng)
    elif how == 2 and entry.numel() and not entry.is_floating_point():
        bad = rng.choice([-(2**31), -1, 0, 1, 255, 2**31 - 1])
        entry.view(-1)[rng.randrange(entry.numel())] = bad % 256 if entry.dtype == torch.uint8 else bad
    elif how == 3 and entry.ndim and entry.shape[0]:
        state[key] = entry[:-1]
    else:
        state[key] = entry.to(rng.choice([torch.float64, torch.int64, torch.uint8, torch.float32]))


@settings(max_examples=700, deadline=None)
@given(SEEDS)
def test_any_state_dict(seed):
    """A corrupted or foreign state dict: a listed error, or a weight that multiplies as its dense form does."""
    rng = seeded(seed)
    w = torch.randn(rng.randrange(5), 4 * rng.randrange(4))
    sparse = tw.CSR.from_dense(w * (torch.rand(w.shape) < 0.5)) if rng.random() < 0.5 else from_dense(w)
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in sparse.state_dict().items()}
    for _ in range(rng.randrange(3)):
        corrupt(rng, state)
    try:
        weight = rng.choice([tw.CompressedWeight, tw.CompressedWeight, tw.NMSparse, tw.CSR]).from_state_dict(state)
    except (ValueError, TypeError):
        return
    x = torch.randn(rng.choice([1, 20]), weight.shape[1], requires_grad=True)
    y = tw.linear(x.to(weight.dtype), weight)
    assert torch.allclose(y, x.to(weight.dtype) @ weight.to_dense().t(), rtol=1e-2, atol=1e-4)
    y.sum().backward()


CSR_WEIGHT = tw.CSR.from_dense(torch.randn(9, 12) * (torch.rand(9, 12) < 0.5))


@settings(max_examples=1000, deadline=None)
@given(SEEDS)
def test_any_csr_plan(seed):
    """A plan or order that does not belong to the matrix: a listed error, or reads within the tensors."""
    rng, weight = seeded(seed), CSR_WEIGHT
    rows, tile, is_transposed = rng.choice([2, 20]), weight._tile, rng.random() < 0.5
    matrix = [t.clone() for t in (weight._transposed() if is_transposed else weight._matrix())]
    columns, out = (9, 12) if is_transposed else (12, 9)
    tensor = rng.choice(matrix)
    if tensor.numel():
        bad = rng.choice([-(2**31), -5, -1, 0, 1, 7, 1000, 2**31 - 1])
        tensor.view(-1)[rng.randrange(tensor.numel())] = bad % 256 if tensor.dtype == torch.uint8 else bad
    x, dy = torch.randn(rows, columns), torch.randn(rows, out)
    for call in (
        lambda: OPS.csr_linear(x, weight.values, None, matrix, [], columns, tile),
        lambda: OPS.csr_linear_dvalues(dy, x, matrix[:5], tile),
    ):
        try:
            result = call()
        except (ValueError, TypeError):
            continue
        assert result.isfinite().all()
