"""The CUDA kernels of the long convolution against float64: emulated, and on a GPU where there is one.

16-bit rows are transformed in fp16 on tensor cores, so they are judged by relative L2 error, as plain torch (fp32
transforms) is no yardstick: 2e-3 for fp16; for bf16, whose output alone rounds to 1.7e-3, 4e-3; gradients 1.5 times as
much.
"""

import pytest
import torch

import tilewise as tw
from harness.emulation import assert_schedules_agree
from harness.judge import relative
from tilewise.reference.fft_conv import fft_conv as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUND = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 4e-3}
GRADIENT_BOUND = {dtype: 1.5 * bound for dtype, bound in BOUND.items()}
# (B, H, L, K): every transform size, full, ragged (L not a multiple of 8) and short filters
SHAPES = [
    (3, 2, 1, 1),
    (5, 2, 256, 256),
    (6, 1, 251, 251),
    (2, 2, 512, 100),
    (2, 1, 520, 520),
    (5, 1, 1001, 1001),
    (1, 1, 1500, 1500),
    (1, 2, 2048, 2048),
    (3, 1, 4096, 4096),
    (2, 1, 4095, 1),
    (1, 1, 8192, 5000),
    (1, 1, 8203, 8203),
    (1, 1, 16384, 16384),
]
TINY = [(2, 1, 40, 40), (3, 2, 256, 33), (1, 1, 1000, 1000)]


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


pytestmark = pytest.mark.devices("emulated", "cuda")


def make_inputs(shape, dtype, gates=(True, True), skip=True, scale=1.0):
    batch, heads, length, taps = shape
    row = lambda: torch.randn(batch, heads, length).to(dtype)  # noqa: E731
    u = (scale * torch.randn(batch, heads, length)).to(dtype)
    pregate, postgate = (row() if gate else None for gate in gates)
    k, d = torch.randn(heads, taps) * taps**-0.5, torch.randn(heads)
    if taps == 1:  # a filter and a skip that nearly cancel would make everything small but the errors
        d = d.copysign(k[:, 0])
    return [u, k, pregate, postgate, d if skip else None]


def call(function, tensors, causal):
    u, k, pregate, postgate, skip = tensors
    return function(u, k, causal=causal, pregate=pregate, postgate=postgate, skip=skip)


def with_gradients(function, tensors, dy, causal):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = call(function, leaves, causal)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]


def to(tensors, *args):
    return [None if t is None else t.to(*args) for t in tensors]


def products_size(tensors, dy):
    """The l2 norm of the products whose sum dskip is, and each tap of dk: a sum itself may be anything down to zero."""
    u, _, pregate, postgate, _ = to(tensors, torch.float64)
    ones = torch.ones_like(u)
    return (u * (ones if pregate is None else pregate) * dy * (ones if postgate is None else postgate)).norm()


def check(device, tensors, dy, causal):
    """Output and every gradient; ``<=`` fails for NaN too."""
    exact = with_gradients(reference, to(tensors, torch.float64), dy, causal)
    got = with_gradients(tw.fft_conv, to(tensors, device.torch), dy.to(device.torch), causal)
    names = ["y"] + ["d" + n for n, t in zip(("u", "k", "pre", "post", "skip"), tensors, strict=True) if t is not None]
    dtype = tensors[0].dtype
    for name, a, e in zip(names, got, exact, strict=True):
        error = relative(a, e, products_size(tensors, dy) if name in ("dk", "dskip") else 0.0)
        assert error <= (BOUND if name == "y" else GRADIENT_BOUND)[dtype], f"{name}: relative L2 {error:.2e}"


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "circular"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size(device, shape, dtype, causal):
    check(device, make_inputs(shape, dtype), torch.randn(shape[:3]).to(dtype), causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "circular"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", TINY, ids=str)
@pytest.mark.modes
def test_tiny(device, shape, dtype, causal):
    check(device, make_inputs(shape, dtype), torch.randn(shape[:3]).to(dtype), causal)


@pytest.mark.modes
def test_tiny_three_factors(device):
    check(device, make_inputs((2, 1, 4096, 64), torch.float16), torch.randn(2, 1, 4096).half(), True)


@pytest.mark.parametrize("gates", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("length", [256, 300, 2100])
def test_gates_and_skip(device, length, gates, skip):
    tensors = make_inputs((2, 1, length, length), torch.bfloat16, gates, skip)
    check(device, tensors, torch.randn(2, 1, length).bfloat16(), True)


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_at_a_time(device, wanted):
    tensors = make_inputs((2, 2, 128, 128), torch.float16)
    dy = torch.randn(2, 2, 128).half()
    exact = with_gradients(reference, to(tensors, torch.float64), dy, True)[1 + wanted]
    size = products_size(tensors, dy) if wanted in (1, 4) else 0.0
    there = to(tensors, device.torch)
    there[wanted].requires_grad_()
    call(tw.fft_conv, there, True).backward(dy.to(device.torch))
    assert relative(there[wanted].grad, exact, size) <= GRADIENT_BOUND[torch.float16]


@pytest.mark.parametrize("length", [64, 3000])
@pytest.mark.parametrize("offset", [0, 1])
def test_strided_and_misaligned(device, length, offset):
    """Rows of a (L, B, H) pool of odd strides, and a batch that is broadcast."""
    heads = 2
    pool = torch.randn(3, heads, length + 3).half().to(device.torch)
    u, gate = pool[::2, :, offset : offset + length], pool[1:2, :, :length].expand(2, -1, -1)
    k = torch.randn(heads, 2 * length).to(device.torch)[:, ::1][:, :length] * length**-0.5
    y = tw.fft_conv(u, k, pregate=gate)
    exact = reference(u.double().cpu(), k.double().cpu(), causal=True, pregate=gate.double().cpu())
    assert relative(y, exact) <= BOUND[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("length", [200, 4000])
def test_rows_of_any_scale(device, dtype, length):
    """Each row has its own power of two: neither large rows overflow fp16 nor small ones vanish in it."""
    scales = torch.tensor([1e-4, 1.0, 300.0] if dtype == torch.float16 else [1e-12, 1.0, 1e12])
    u = (scales[:, None, None] * (torch.randn(3, 1, length) + 1)).to(dtype)
    k = torch.rand(1, length) / length
    y = tw.fft_conv(u.to(device.torch), k.to(device.torch))
    exact = reference(u.double(), k.double(), causal=True)
    for b in range(3):
        assert relative(y[b], exact[b]) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_filters_of_any_scale(device, dtype, scale):
    tensors = make_inputs((2, 2, 300, 300), torch.bfloat16, (False, False), False)
    tensors[1] *= scale * torch.tensor([[1.0], [1e-3]])
    got = call(tw.fft_conv, to(tensors, device.torch), True)
    exact = call(reference, to(tensors, torch.float64), True)
    for h in range(2):
        assert relative(got[:, h], exact[:, h]) <= BOUND[torch.bfloat16]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("length", [100, 2100])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_not_finite(device, dtype, length, bad):
    u = torch.randn(2, 2, length).to(dtype)
    u[0, 1, 5] = bad
    k = torch.randn(2, length)
    y = tw.fft_conv(u.to(device.torch), k.to(device.torch)).cpu()
    assert y[0, 1, 5:].isnan().all()
    others = torch.tensor([[True, False], [True, True]])
    exact = reference(u.double(), k.double(), causal=True)
    assert relative(y[others], exact[others]) <= BOUND[dtype]


def test_zero_rows_and_filters(device):
    u = torch.randn(3, 2, 300).half()
    u[1] = 0
    k = torch.randn(2, 300)
    k[1] = 0
    skip = torch.tensor([0.0, 2.0])
    y = tw.fft_conv(u.to(device.torch), k.to(device.torch), skip=skip.to(device.torch)).cpu()
    assert y[1].eq(0).all()
    assert torch.equal(y[:, 1], 2 * u[:, 1])
    assert y[::2, 0].abs().min(-1).values.gt(0).all()


def test_above_the_largest_size(device):
    u = torch.zeros(1, 1, 16385, device=device.torch)
    with pytest.raises(NotImplementedError, match="fft_conv: u has length above 16384"):
        tw.fft_conv(u, torch.ones(1, 4, device=device.torch))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.modes
@pytest.mark.devices("emulated")
def test_schedules(device, dtype):
    tensors = make_inputs((5, 1, 200, 200), dtype)
    dy = torch.randn(5, 1, 200).to(dtype)
    assert_schedules_agree(lambda: tuple(with_gradients(tw.fft_conv, tensors, dy, False)))


@pytest.mark.modes
@pytest.mark.devices("emulated")
def test_schedules_three_factors(device):
    tensors = make_inputs((2, 1, 4096, 16), torch.float16)
    dy = torch.randn(2, 1, 4096).half()
    assert_schedules_agree(lambda: tuple(with_gradients(tw.fft_conv, tensors, dy, True)), count=4)
