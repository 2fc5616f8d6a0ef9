"""Long convolution against float64, on every device."""

import itertools

import pytest
import tilewise as tw
import torch
from tilewise.reference.fft_conv import fft_conv as reference

NAMES = ("u", "k", "pregate", "postgate", "skip")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# relative L2 error against float64 on the same (rounded) inputs
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# (B, H, L, K): one sample, odd, prime, just around transform sizes, not a multiple of 8, short filters, lone rows; the
# short ones have enough rows for a largest error to mean something
CPU_SHAPES = [
    (8, 48, 1, 1),
    (8, 48, 2, 1),
    (6, 12, 17, 17),
    (9, 16, 100, 7),
    (5, 3, 255, 255),
    (5, 3, 257, 257),
    (3, 1, 1021, 1021),
    (5, 12, 1000, 64),
    (2, 40, 1536, 1),
    (1, 3, 4099, 4099),
    (2, 1, 16385, 9000),
]
TINY_SHAPES = [(1, 2, 128, 128), (3, 1, 100, 37)]


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def make_inputs(shape, dtype, gated=True, skip=True):
    """u, k, pregate, postgate, skip at unit variance; those that are left out are None."""
    batch, heads, length, taps = shape
    row = lambda: torch.randn(batch, heads, length).to(dtype)  # noqa: E731
    gates = (row(), row()) if gated else (None, None)
    return [row(), torch.randn(heads, taps), *gates, torch.randn(heads) if skip else None]


def call(function, tensors, causal):
    u, k, pregate, postgate, skip = tensors
    return function(u, k, causal=causal, pregate=pregate, postgate=postgate, skip=skip)


def plain_torch(u, k, **options):
    """The same in plain torch at u's dtype: fp32 transforms (torch has no 16-bit ones on CPU), 16-bit products."""
    dtype = u.dtype
    skip, gates = options.pop("skip"), {n: options.pop(n) for n in ("pregate", "postgate")}
    x = u if gates["pregate"] is None else gates["pregate"] * u
    y = reference(x.float(), k, **options).to(dtype)
    if skip is not None:
        y = y + skip.to(dtype)[:, None] * x
    return y if gates["postgate"] is None else gates["postgate"] * y


def with_gradients(function, tensors, dy, causal):
    """The output and the gradients of all given tensors."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = call(function, leaves, causal)
    given = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def relative(got, expected):
    return ((got.double().cpu() - expected).norm() / expected.norm()).item()


def assert_close(names, got, plain, exact, dtype):
    """The relative L2 bound, and at most 2x (output) or 3x (gradients) the largest error of plain torch."""
    for i, (name, a, t, e) in enumerate(zip(names, got, plain, exact, strict=True)):
        assert relative(a, e) <= BOUND[dtype], f"{name}: relative L2 {relative(a, e):.2e}"
        ours, torchs = (a.double().cpu() - e).abs().max(), (t.double() - e).abs().max()
        floor = torch.finfo(t.dtype).eps * e.abs().max()  # one rounding: torch can be exact by luck
        assert ours <= (3 if i else 2) * torchs + floor, f"{name}: max error {ours:.2e}, torch {torchs:.2e}"


def check_against_float64(device, shape, dtype, causal, gated=True, skip=True):
    tensors = make_inputs(shape, dtype, gated, skip)
    dy = torch.randn(shape[:3]).to(dtype)
    exact = with_gradients(reference, double(tensors), dy, causal)
    plain = with_gradients(plain_torch, tensors, dy, causal)
    there = [None if t is None else t.to(device.torch) for t in tensors]
    got = with_gradients(tw.fft_conv, there, dy.to(device.torch), causal)
    names = ["y"] + ["d" + n for n, t in zip(NAMES, tensors, strict=True) if t is not None]
    assert got[0].dtype == dtype and got[2].dtype == torch.float32
    assert_close(names, got, plain, exact, dtype)


def skip_unless(device, kind):
    if device.kind != kind:
        pytest.skip(f"for {kind}")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "circular"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_any_length(device, shape, dtype, causal):
    skip_unless(device, "cpu")
    many_heads = shape[1] >= 12  # one number a head: the largest of a few errors is a lottery
    check_against_float64(device, shape, dtype, causal, skip=many_heads)


@pytest.mark.parametrize("gated,skip", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gates_and_skip(device, dtype, gated, skip):
    skip_unless(device, "cpu")
    check_against_float64(device, (2, 16, 300, 300), dtype, True, gated, skip)
