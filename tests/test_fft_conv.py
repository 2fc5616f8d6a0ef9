"""Long convolution: the CPU kernels against float64, and on every device values, strides, registration.

The CUDA kernels have their own file, because they serve other sizes at another precision.
"""

import itertools

import pytest
import torch

import tilewise as tw
from harness.judge import assert_accurate, doubled, draws, relative, yardsticks
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


def assert_bounded(names, got, exact, dtype):
    for name, a, e in zip(names, got, exact, strict=True):
        assert relative(a, e) <= BOUND[dtype], f"{name}: relative L2 {relative(a, e):.2e}"


def check_against_float64(device, shape, dtype, causal, gated=True, skip=True):
    """At most 2x (output) or 3x (gradients) the error of plain torch."""
    tensors = make_inputs(shape, dtype, gated, skip)
    dy = torch.randn(shape[:3]).to(dtype)
    there = [None if t is None else t.to(device.torch) for t in tensors]
    got = with_gradients(tw.fft_conv, there, dy.to(device.torch), causal)
    names = ["y"] + ["d" + n for n, t in zip(NAMES, tensors, strict=True) if t is not None]
    assert got[0].dtype == dtype and got[2].dtype == torch.float32
    plain, exact = (lambda *t, f=f: with_gradients(f, t[:-1], t[-1], causal) for f in (plain_torch, reference))
    # Gates make heavy tails: the largest error is that of a few elements, so small problems are drawn more often.
    count = max(draws(min(t.numel() for t in got)), min(128, 2**19 // max(1, got[0].numel())))
    rulers = yardsticks([plain], [*tensors, dy], count, exact)
    for name, ours, ruler in zip(names, got, rulers, strict=True):
        assert_accurate(name, ours, ruler, 2 if name == "y" else 3)


# The CPU kernels alone: the CUDA ones serve other sizes, or are too slow under emulation.
on_cpu = pytest.mark.devices("cpu")


# ---- values ----
@on_cpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "circular"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_any_length(device, shape, dtype, causal):
    many_heads = shape[1] >= 12  # one number a head: the largest of a few errors is a lottery
    check_against_float64(device, shape, dtype, causal, skip=many_heads)


@on_cpu
@pytest.mark.parametrize("gated,skip", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gates_and_skip(device, dtype, gated, skip):
    check_against_float64(device, (2, 16, 300, 300), dtype, True, gated, skip)


@pytest.mark.parametrize("length", [1, 16, 100, 257])
def test_causal_is_not_circular(device, length):
    u, k = torch.zeros(1, 1, length, device=device.torch), torch.randn(1, length, device=device.torch)
    u[..., -1] = 1  # an impulse at the end: its causal response has one sample, its circular one is k, rotated
    causal, circular = (tw.fft_conv(u, k, causal=c)[0, 0].cpu() for c in (True, False))
    expected = torch.zeros(length)
    expected[-1] = k[0, 0]
    assert (causal - expected).norm() <= 1e-5 * k.cpu().norm()
    assert (circular - k[0].cpu().roll(-1)).norm() <= 1e-5 * k.cpu().norm()


def test_partial_filter_is_a_padded_one(device):
    u, k = torch.randn(2, 3, 300, device=device.torch), torch.randn(3, 37, device=device.torch)
    padded = torch.nn.functional.pad(k, (0, 263))
    for causal in (True, False):
        assert torch.equal(tw.fft_conv(u, k, causal=causal), tw.fft_conv(u, padded, causal=causal))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("length", [40, 300])
def test_bad_values_stay_in_their_row(device, value, length):
    u, pregate = torch.randn(3, 4, length), torch.randn(3, 4, length)
    clean = tw.fft_conv(u.to(device.torch), torch.ones(4, length, device=device.torch)).cpu()
    u[1, 2, 5] = value
    y = tw.fft_conv(u.to(device.torch), torch.ones(4, length, device=device.torch)).cpu()
    assert not y[1, 2, 5:].isfinite().any()
    y[1, 2] = clean[1, 2]
    assert torch.equal(y, clean)
    u[1, 2, 5] = 1
    pregate[0, 3] = value
    bad = tw.fft_conv(u.to(device.torch), torch.ones(4, length, device=device.torch), pregate=pregate.to(device.torch))
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[0, 3] = True
    assert torch.equal(~bad.cpu().isfinite().all(-1), expected)


def test_bad_filter_stays_in_its_head(device):
    u, k = torch.randn(2, 3, 70, device=device.torch), torch.randn(3, 70, device=device.torch)
    k[1, 0] = float("nan")
    finite = tw.fft_conv(u, k).isfinite().all(-1).cpu()
    assert torch.equal(finite, torch.tensor([True, False, True]).expand(2, 3))


# ---- layouts, threads, registration ----
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_strides(device, dtype):
    """Views into larger tensors, a transposed batch, expanded gates and an expanded gradient."""
    whole = torch.randn(5, 2, 3, 150, device=device.torch).to(dtype)
    u, pregate = whole[1].transpose(0, 1)[..., 3:132], whole[2, 0, 0, 7:136].expand(3, 2, 129)
    k, postgate = torch.randn(2, 200, device=device.torch)[:, 5:134], whole[4, :, :, 1:130].transpose(0, 1)
    dy = torch.ones(3, 2, 1, device=device.torch, dtype=dtype).expand(3, 2, 129)
    tensors = [u, k, pregate, postgate, None]
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    y = call(tw.fft_conv, leaves, True)
    got = [y, *torch.autograd.grad(y, leaves[:4], dy)]
    exact = with_gradients(reference, doubled([t if t is None else t.cpu() for t in tensors]), dy.cpu(), True)
    assert_bounded(["y", "du", "dk", "dpregate", "dpostgate"], got, exact, dtype)


@on_cpu
def test_gradients_do_not_depend_on_threads(device):
    tensors, dy = make_inputs((5, 6, 700, 700), torch.float32), torch.randn(5, 6, 700)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(with_gradients(tw.fft_conv, tensors, dy, True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@on_cpu
@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in itertools.combinations(range(5), n)], ids=str)
def test_only_wanted_gradients(device, wanted):
    tensors, dy = make_inputs((2, 16, 50, 50), torch.float32), torch.randn(2, 16, 50)
    leaves = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    got = torch.autograd.grad(call(tw.fft_conv, leaves, True), [leaves[i] for i in wanted], dy)
    exact = with_gradients(reference, doubled(tensors), dy, True)
    assert_bounded([NAMES[i] for i in wanted], got, [exact[1 + i] for i in wanted], torch.float32)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 0)], ids=str)
def test_empty(device, shape):
    tensors = [t.to(device.torch) for t in make_inputs(shape, torch.float32)]
    y, du, dk, _, _, dskip = with_gradients(tw.fft_conv, tensors, torch.randn(shape[:3], device=device.torch), True)
    assert y.shape == du.shape == shape[:3]
    assert dk.shape == (shape[1], shape[3]) and not dk.any() and dskip.shape == (shape[1],) and not dskip.any()


def test_16_bit_filters(device):
    u = torch.randn(2, 3, 64, device=device.torch, dtype=torch.bfloat16)
    k, skip = (torch.randn(*s, device=device.torch, dtype=torch.bfloat16) for s in ((3, 64), (3,)))
    leaves = [k.clone().requires_grad_(), skip.clone().requires_grad_()]
    y = tw.fft_conv(u, leaves[0], skip=leaves[1])
    assert torch.equal(y, tw.fft_conv(u, k.float(), skip=skip.float()))
    assert [g.dtype for g in torch.autograd.grad(y.sum(), leaves)] == [torch.bfloat16] * 2


def test_out(device):
    u, k = torch.randn(2, 3, 50, device=device.torch), torch.randn(3, 50, device=device.torch)
    out = torch.full_like(u, 7)
    version = out._version
    assert tw.fft_conv(u, k, out=out) is out and out._version > version
    assert torch.equal(out, tw.fft_conv(u, k))
    with pytest.raises(ValueError, match="out does not support gradients"):
        tw.fft_conv(u.requires_grad_(), k, out=out)


@on_cpu
def test_opcheck(device):
    tensors = make_inputs((2, 3, 20, 7), torch.float32)
    for given in (tensors, [*tensors[:2], None, None, None]):
        leaves = [None if t is None else t.clone().requires_grad_() for t in given]
        torch.library.opcheck(torch.ops.tilewise.fft_conv.default, (*leaves, True))
        torch.library.opcheck(torch.ops.tilewise.fft_conv_out.default, (*given, False, torch.empty(2, 3, 20)))
        wanted = [t is not None for t in given]
        torch.library.opcheck(torch.ops.tilewise.fft_conv_backward.default, (tensors[0], *given, True, wanted))


@on_cpu
@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
def test_gradcheck(device):
    """Finite differences of the fp32 kernel itself; the exact comparison is with float64 autograd, above."""
    tensors = [t.requires_grad_() for t in make_inputs((2, 2, 5, 3), torch.float32)]
    for causal in (True, False):
        run = lambda *t: call(tw.fft_conv, t, causal)  # noqa: E731, B023
        assert torch.autograd.gradcheck(run, tensors, eps=1e-2, atol=2e-2, rtol=2e-2)


@on_cpu
def test_compiles_without_graph_breaks(device):
    u, k = torch.randn(2, 3, 40), torch.randn(3, 40)
    compiled = torch.compile(lambda u, k: tw.fft_conv(2 * u, k) + 1, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(u, k), tw.fft_conv(2 * u, k) + 1)
