"""The pieces of Shampoo: 4-bit codes of matrices and Bjorck's iteration, against the reference, on every device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from harness.emulation import assert_schedules_agree
from harness.judge import assert_accurate, draws, yardsticks
from tilewise.reference import shampoo as reference

ORDERS = [1, 5, 63, 64, 65, 130]


def orthogonal(batch, order):
    return torch.linalg.qr(torch.randn(batch, order, order))[0]


def nearly_orthogonal(batch, order):
    """What 4 bits leave of orthonormal rows."""
    indices, scales, _ = reference.quantize(orthogonal(batch, order))
    return reference.dequantize(indices, scales)


def assert_codes(got, values, keep_diagonal):
    indices, scales, diagonal = reference.quantize(values, keep_diagonal)
    assert torch.equal(got[1].cpu(), scales)
    assert torch.equal(reference.unpack(got[0].cpu(), values.shape[-1]), indices)
    assert got[2] is None if diagonal is None else torch.equal(got[2].cpu(), diagonal)
    return reference.dequantize(indices, scales, diagonal)


# ---- codes ----


@pytest.mark.parametrize("keep_diagonal", [False, True], ids=["all", "off-diagonal"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.modes
def test_quantize_is_exact(device, order, keep_diagonal):
    values = torch.randn(2, order, order) * torch.randn(2, order, order).abs() ** 2
    got = tw.optim.quantize_matrix(values.to(device.torch), keep_diagonal=keep_diagonal)
    expected = assert_codes(got, values, keep_diagonal)
    assert torch.equal(tw.optim.dequantize_matrix(*got).cpu(), expected)


def test_quantize_around_every_midpoint(device):
    """The floats next to each decision, at scales that make the products inexact."""
    values = torch.zeros(5, 64, 64)
    middle = (reference.SQUARES[1:] + reference.SQUARES[:-1]) / 2
    for i, scale in enumerate([1.0, 0.7182818, 3.1e-12, 9.7e20, 1.9999999]):
        scale = torch.tensor(scale)
        at = (middle * scale.double()).float()
        values[i, 1, :46] = torch.cat([at, at.nextafter(scale * 2), at.nextafter(-scale * 2), scale[None]])
    assert_codes(tw.optim.quantize_matrix(values.to(device.torch)), values, False)


def test_ties_go_to_the_smaller_magnitude(device):
    values = torch.zeros(1, 17, 17)
    values[0, 3, :15] = ((reference.SQUARES[1:] + reference.SQUARES[:-1]) / 2).float()
    values[0, 3, 15] = 1.0
    codes, scales, _ = tw.optim.quantize_matrix(values.to(device.torch))
    got = reference.unpack(codes.cpu(), 17)[0, 3, 0, :15]
    assert torch.equal(got, torch.tensor([*range(1, 8), *range(7, 15)]))


@pytest.mark.parametrize("keep_diagonal", [False, True], ids=["all", "off-diagonal"])
def test_quantize_special_values(device, keep_diagonal):
    values = torch.randn(1, 130, 130)
    values[0, 3] = 0
    values[0, 4, [2, 3, 5, 6]] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    values[0, 5] = 1e-44  # far below the smallest scale
    values[0, 6] = -3e38
    values[0, 7] = float("nan")
    got = tw.optim.quantize_matrix(values.to(device.torch), keep_diagonal=keep_diagonal)
    off = values.clone()
    if keep_diagonal:  # it is kept as it is, NaN included
        assert torch.equal(got[2].cpu().isnan(), values[0].diagonal().isnan()[None])
        values[0, 7, 7] = off[0, 7, 7] = 0
        got = tw.optim.quantize_matrix(values.to(device.torch), keep_diagonal=True)
    expected = assert_codes(got, off, keep_diagonal)
    back = tw.optim.dequantize_matrix(*got)
    assert back.isfinite().all() and torch.equal(back.cpu(), expected)
    assert (expected[0, 3, 4:] == 0).all() and (expected[0, 7, 8:] == 0).all()


def test_the_diagonal_does_not_count_for_the_scales(device):
    values = torch.randn(1, 70, 70) / 100 + 50 * torch.eye(70)
    apart = tw.optim.dequantize_matrix(*tw.optim.quantize_matrix(values.to(device.torch), keep_diagonal=True)).cpu()
    together = tw.optim.dequantize_matrix(*tw.optim.quantize_matrix(values.to(device.torch))).cpu()
    assert torch.equal(apart.diagonal(dim1=1, dim2=2), values.diagonal(dim1=1, dim2=2))
    off = ~torch.eye(70, dtype=torch.bool)
    assert (apart - values)[0][off].norm() < 0.2 * values[0][off].norm() < 0.25 * (together - values)[0][off].norm()


@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 0)])
def test_empty(device, shape):
    values = torch.randn(shape, device=device.torch)
    got = tw.optim.quantize_matrix(values, keep_diagonal=True)
    assert tw.optim.dequantize_matrix(*got).shape == shape
    assert tw.optim.orthonormalize(values).shape == shape


def test_strides(device):
    values = torch.randn(4, 66, 66, device=device.torch).mT[::2]
    for a, b in zip(tw.optim.quantize_matrix(values), tw.optim.quantize_matrix(values.contiguous()), strict=True):
        assert a is b is None or torch.equal(a, b)
    assert torch.equal(tw.optim.orthonormalize(values), tw.optim.orthonormalize(values.contiguous()))


# ---- Bjorck's iteration ----


@pytest.mark.parametrize("batch,order", [(1, 1), (3, 7), (2, 64), (1, 65), (2, 130)])
@pytest.mark.modes
def test_orthonormalize(device, batch, order):
    rows = nearly_orthogonal(batch, order)
    plain = lambda v: (reference.orthonormalize(v),)  # noqa: E731
    [yardstick] = yardsticks([plain], [rows], draws(rows.numel()))
    assert_accurate("rows", tw.optim.orthonormalize(rows.to(device.torch)).cpu(), yardstick, 2)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("order", [300, 512])
def test_orthonormalize_large(device, order):
    """Several panels, several depths of packing."""
    rows = nearly_orthogonal(1, order)
    [yardstick] = yardsticks([lambda v: (reference.orthonormalize(v),)], [rows], 8)
    assert_accurate("rows", tw.optim.orthonormalize(rows.to(device.torch)).cpu(), yardstick, 2)


def test_residual_falls(device):
    """The distance from orthonormality is squared by every step, down to rounding."""
    order = 100 if device.small else 256
    rows = nearly_orthogonal(1, order)
    iterates = [tw.optim.orthonormalize(rows.to(device.torch), steps=k)[0].double().cpu() for k in range(5)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small factorisations; other processes may share the cores
    residuals = [float(torch.linalg.eigvalsh(v @ v.T - torch.eye(order)).abs().max()) for v in iterates]
    torch.set_num_threads(threads)
    assert 0.05 < residuals[0] < 0.5
    for before, after in zip(residuals[:-1], residuals[1:], strict=True):
        assert after < before**2 + 3e-6
    assert residuals[4] < 3e-6


def test_orthonormalize_steps_are_repeated_steps(device):
    rows = nearly_orthogonal(2, 66).to(device.torch)
    expected, before = rows, rows.clone()
    for steps in range(4):
        assert torch.equal(tw.optim.orthonormalize(rows, steps=steps), expected)
        expected = tw.optim.orthonormalize(expected)
    assert torch.equal(rows, before)


def test_nan_stays_in_its_matrix(device):
    rows = nearly_orthogonal(3, 66)
    rows[1, 5, 6] = float("nan")
    out = tw.optim.orthonormalize(rows.to(device.torch)).cpu()
    assert out[1].isnan().any() and out[[0, 2]].isfinite().all()


@pytest.mark.devices("emulated")
@pytest.mark.modes
def test_schedules(device):
    rows = nearly_orthogonal(1, 70)

    def run():
        codes, scales, diagonal = tw.optim.quantize_matrix(rows, keep_diagonal=True)
        return codes, scales, diagonal, tw.optim.dequantize_matrix(codes, scales), tw.optim.orthonormalize(rows)

    assert_schedules_agree(run)


# ---- as torch sees them ----


def test_opcheck():
    values = torch.randn(2, 70, 70)
    codes, scales, diagonal = tw.optim.quantize_matrix(values, keep_diagonal=True)
    ops = torch.ops.tilewise
    for keep in (False, True):
        torch.library.opcheck(ops.quantize_matrix.default, (values, keep))
    for kept in (None, diagonal):
        torch.library.opcheck(ops.dequantize_matrix.default, (codes, scales, kept))
    for steps in (0, 1, 2):
        torch.library.opcheck(ops.orthonormalize.default, (values, steps))


def test_errors(device):
    x = torch.randn(2, 70, 70, device=device.torch)
    codes, scales, diagonal = tw.optim.quantize_matrix(x, keep_diagonal=True)
    t = tw.optim
    for error, message, call in [
        (TypeError, "quantize_matrix: values is a list", lambda: t.quantize_matrix([1.0])),
        (TypeError, "quantize_matrix: values has dtype", lambda: t.quantize_matrix(x.double())),
        (ValueError, "quantize_matrix: values has shape", lambda: t.quantize_matrix(x[0])),
        (ValueError, "quantize_matrix: values has shape .*square", lambda: t.quantize_matrix(x[:, :9])),
        (TypeError, "dequantize_matrix: codes is a list", lambda: t.dequantize_matrix(codes.tolist(), scales)),
        (TypeError, "dequantize_matrix: codes", lambda: t.dequantize_matrix(codes.view(torch.int8), scales)),
        (ValueError, "dequantize_matrix: codes", lambda: t.dequantize_matrix(codes[..., 1:], scales)),
        (ValueError, "dequantize_matrix: codes", lambda: t.dequantize_matrix(codes[0], scales)),
        (ValueError, "dequantize_matrix: scales", lambda: t.dequantize_matrix(codes, scales[:1])),
        (ValueError, "dequantize_matrix: scales", lambda: t.dequantize_matrix(codes, scales.mT.contiguous().mT)),
        (TypeError, "dequantize_matrix: scales", lambda: t.dequantize_matrix(codes, scales.double())),
        (ValueError, "dequantize_matrix: diagonal", lambda: t.dequantize_matrix(codes, scales, diagonal[:, 1:])),
        (TypeError, "dequantize_matrix: diagonal", lambda: t.dequantize_matrix(codes, scales, diagonal.half())),
        (TypeError, "orthonormalize: rows is a int", lambda: t.orthonormalize(3)),
        (TypeError, "orthonormalize: rows has dtype", lambda: t.orthonormalize(x.half())),
        (ValueError, "orthonormalize: rows has shape", lambda: t.orthonormalize(x[..., 1:])),
        (ValueError, "orthonormalize: steps is -1", lambda: t.orthonormalize(x, steps=-1)),
        (TypeError, "orthonormalize: steps is 1.0", lambda: t.orthonormalize(x, steps=1.0)),
    ]:
        with pytest.raises(error, match=message):
            call()


dtypes = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int32, torch.uint8, torch.complex64])


@settings(max_examples=2000, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    square=st.booleans(),
    dtype=dtypes,
    keep=st.booleans(),
    steps=st.integers(-1, 2),
    drop=st.booleans(),
)
def test_any_arguments(shape, square, dtype, keep, steps, drop):
    """A listed error, or the right result."""
    values = torch.randn([2, *shape[:1], *shape[:1]] if square else shape).to(dtype)
    before = values.clone()
    good = values.ndim == 3 and values.shape[1] == values.shape[2] and dtype is torch.float32
    try:
        codes, scales, diagonal = tw.optim.quantize_matrix(values, keep_diagonal=keep)
    except (ValueError, TypeError):
        assert not good
        codes = scales = diagonal = values
    else:
        assert good
        assert_codes((codes, scales, diagonal), values, keep)
    try:
        back = tw.optim.dequantize_matrix(codes, scales.flatten()[:1] if drop else scales, diagonal)
    except (ValueError, TypeError):
        assert not good or drop
    else:
        assert back.shape == values.shape
    try:
        out = tw.optim.orthonormalize(values, steps=steps)
    except (ValueError, TypeError):
        assert not good or steps < 0
    else:
        torch.testing.assert_close(out, reference.orthonormalize(values, steps), rtol=1e-3, atol=1e-2)
    assert torch.equal(values, before)
