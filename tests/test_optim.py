"""4-bit optimizer states: the operators against the reference, on every device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from harness.emulation import assert_schedules_agree
from harness.judge import assert_accurate, draws, yardsticks
from tilewise import _C
from tilewise.reference import optim as reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
adamw_step = torch.ops.tilewise.adamw_step


def heavy_tailed(*shape):
    """Magnitudes over many decades, as moments have."""
    return torch.randn(shape) * torch.randn(shape).abs() ** 3


# ---- quantisation ----


def indices_of(codes, bits):
    return reference.unpack(codes.cpu()) if bits == 4 else codes.cpu().long()


def magnitude_midpoints(bits, signed):
    """In float64."""
    if bits == 8:
        return reference.midpoints8(signed) / reference._UNITS8
    book = reference.SIGNED_CODES if signed else reference.UNSIGNED_CODES
    middle = (book[1:] + book[:-1]) / 2
    return middle[middle > 0]


def assert_quantized(values, device, signed, bits):
    """Codes and scales are the reference's, and so are the floats they stand for."""
    n = values.numel()
    indices, scales = reference.quantize(values, signed, bits)
    codes, got_scales = tw.optim.quantize_state(values.to(device.torch), signed=signed, bits=bits)
    assert torch.equal(got_scales.cpu(), scales) and bool(scales.isfinite().all())
    got = indices_of(codes, bits).flatten()[:n]
    wrong = (got != indices.flatten()[:n]).nonzero().flatten()
    assert not len(wrong), f"{len(wrong)} codes, the first of {float(values.flatten()[wrong[0]])!r}"
    decoded = tw.optim.dequantize_state(codes, got_scales, values.shape, signed=signed, bits=bits)
    assert torch.equal(decoded.cpu(), reference.dequantize(indices, scales, values.shape, signed, bits))


def of_both_books(test):
    test = pytest.mark.parametrize("bits", [4, 8], ids=["4bit", "8bit"])(test)
    return pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])(test)


@of_both_books
@pytest.mark.parametrize("n", [0, 1, 127, 128, 255, 256, 1000])
@pytest.mark.modes
def test_quantize_is_exact(device, n, signed, bits):
    values = heavy_tailed(n) if signed else heavy_tailed(n).square()
    assert_quantized(values, device, signed, bits)


@of_both_books
def test_quantize_many_values(device, signed, bits):
    """Many scales, magnitudes evenly over all decades of the book and below it."""
    count = 40 if device.kind == "emulated" else 1000
    scales = 10 ** (torch.rand(count, 1) * 20 - 10)
    values = scales * 10 ** (torch.rand(count, 256) * -9)
    if signed:
        values *= torch.randint(0, 2, values.shape) * 2 - 1
    assert_quantized(values, device, signed, bits)


@of_both_books
def test_quantize_around_every_midpoint(device, signed, bits):
    """The floats next to each decision, at scales that make the products inexact."""
    middle = magnitude_midpoints(bits, signed)
    for scale in [1.0, 0.7182818, 3.1e-12, 9.7e20, 1.9999999, *torch.rand(20 if device.kind == "cpu" else 2).tolist()]:
        scale = torch.tensor(scale)
        at = (middle * scale.double()).float()
        values = torch.cat([at, at.nextafter(scale * 2), at.nextafter(-scale)])
        values = torch.cat([values, -values]) if signed else values
        block = 128 if bits == 4 else 256  # of which the first holds the scale
        values = torch.nn.functional.pad(values, (0, -len(values) % (block - 1))).view(-1, block - 1)
        values = torch.cat([scale.expand(len(values), 1), values], 1)
        assert_quantized(values, device, signed, bits)


@of_both_books
def test_quantize_ties(device, signed, bits):
    """At scales whose products with midpoints are floats, the code of smaller magnitude wins."""
    scale = 9765.625 if bits == 8 else 4.0  # 10^7 / 2^10: 8-bit midpoints are multiples of 1 / (4 10^7)
    exact = magnitude_midpoints(bits, signed) * scale
    at = exact.float()
    ties = at[at.double() == exact]
    assert len(ties) > (100 if bits == 8 else 5)
    values = torch.cat([torch.tensor([scale]), ties[:100]])
    assert_quantized(values, device, signed, bits)
    codes, _ = tw.optim.quantize_state(values.to(device.torch), signed=signed, bits=bits)
    zero = (7 if bits == 4 else 127) if signed else 0
    index = (exact.float()[:, None] == ties[:100]).nonzero()[:, 0]  # of the midpoint, so of the magnitude below it
    assert torch.equal(indices_of(codes, bits).flatten()[1 : 1 + len(index)].sort()[0], (index + zero).sort()[0])


@of_both_books
def test_codes_come_back(device, signed, bits):
    """Every code of the book, at its own value."""
    codes = 16 if bits == 4 else 256
    scales = 2.0 ** torch.arange(-60, 61, 20) * (1 + torch.rand(7))
    indices = torch.arange(codes).expand(7, -1)
    values = reference.dequantize(indices, scales, torch.Size([7, codes]), signed, bits)
    values = torch.nn.functional.pad(values, (0, -codes % (128 if bits == 4 else 256)))
    got, got_scales = tw.optim.quantize_state(values.to(device.torch), signed=signed, bits=bits)
    assert torch.equal(got_scales.cpu(), scales)
    assert torch.equal(indices_of(got, bits)[:, :codes], indices)


@of_both_books
@pytest.mark.modes
def test_quantize_special_values(device, signed, bits):
    values = torch.randn(1100).abs()
    values[:256] = 0
    values[[260, 280, 300, 320]] = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0])
    values[512:768] = 1e-44  # far below the smallest scale
    values[768:1024] = 3e38 * torch.rand(256)
    values[770] = -0.0
    assert_quantized(values, device, signed, bits)
    assert_quantized(values[512:768] * 1e25, device, signed, bits)
    assert_quantized(torch.full((1, 300), float("nan")), device, signed, bits)


@pytest.mark.parametrize("bits", [4, 8], ids=["4bit", "8bit"])
def test_quantize_strides(device, bits):
    values = torch.randn(40, 60, device=device.torch).t()
    codes, scales = tw.optim.quantize_state(values, signed=True, bits=bits)
    expected, _ = tw.optim.quantize_state(values.contiguous(), signed=True, bits=bits)
    assert torch.equal(codes, expected)
    pairs = torch.stack([scales, scales], 1)  # scales as an optimizer's state holds them
    a = tw.optim.dequantize_state(codes, pairs[:, 0], (60, 40), signed=True, bits=bits)
    assert torch.equal(a, tw.optim.dequantize_state(codes, scales, (60, 40), signed=True, bits=bits))


@of_both_books
def test_quantize_unaligned(device, signed, bits):
    values = torch.randn(1001, device=device.torch)[1:].abs()
    codes, _ = tw.optim.quantize_state(values, signed=signed, bits=bits)
    assert torch.equal(codes, tw.optim.quantize_state(values.clone(), signed=signed, bits=bits)[0])


@of_both_books
@pytest.mark.modes
def test_quantize_schedules(device, signed, bits):
    if device.kind == "emulated":
        values = heavy_tailed(700).abs()
        assert_schedules_agree(lambda: tw.optim.quantize_state(values, signed=signed, bits=bits))
        codes, scales = tw.optim.quantize_state(values, signed=signed, bits=bits)
        assert_schedules_agree(lambda: (tw.optim.dequantize_state(codes, scales, (700,), signed=signed, bits=bits),))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_8bit_book_is_the_published_one(signed):
    """The middles of even parts of [0.1, 1], 1 to 64 (unsigned 2 to 128) of them, times 10^-6 to 1; zero and one."""
    book = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float32)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        book += [*middles.tolist(), *(-middles).tolist()] if signed else middles.tolist()
    published = torch.tensor(sorted(book), dtype=torch.float32)
    codes = torch.arange(256, dtype=torch.uint8)[None]
    ours = tw.optim.dequantize_state(codes, torch.ones(1), (256,), signed=signed, bits=8)
    torch.testing.assert_close(ours, published, rtol=2 * 2.0**-23, atol=0)  # two ulp


# ---- one step ----


def make_slot(shape, dtype, grad_dtype, quantized=True):
    """(param, grad, exp_avg, exp_avg_sq, scales, step) in the middle of a training."""
    m = heavy_tailed(*shape) * 1e-2
    v = m.square() + (heavy_tailed(*shape) * 1e-2).square()
    state = [m, v, torch.empty(0)]
    if quantized:
        (m_codes, m_scales), (v_codes, v_scales) = (tw.optim.quantize_state(x, signed=x is m) for x in (m, v))
        state = [m_codes, v_codes, torch.stack([m_scales, v_scales], 1)]
    return [torch.randn(shape).to(dtype), heavy_tailed(*shape).to(grad_dtype), *state, torch.tensor(6.0)]


def run_step(slots, device, maximize=False, **changes):
    options = OPTIONS | changes
    lists = [list(column) for column in zip(*slots, strict=True)]
    lists = [[t.to(device.torch) for t in column] for column in lists[:5]] + [[t.clone() for t in lists[5]]]
    lists = [[t.clone() for t in column] for column in lists]
    adamw_step(*lists, options["lr"], *options["betas"], options["eps"], options["weight_decay"], maximize)
    return [[t.cpu() for t in slot] for slot in zip(*lists, strict=True)]


def moments(slot, dtype):
    p, _, m, v, scales, _ = slot
    if m.dtype is torch.float32:
        return m.to(dtype), v.to(dtype)
    decode = lambda codes, s, signed: reference.dequantize(reference.unpack(codes), s.to(dtype), p.shape, signed)  # noqa: E731
    return decode(m, scales[:, 0], True), decode(v, scales[:, 1], False)


def expected_step(slot, dtype, maximize=False):
    p, g, *_, step = slot
    m, v = moments(slot, dtype)
    return reference.adamw_step(p.to(dtype), g.to(dtype), m, v, int(step) + 1, maximize=maximize, **OPTIONS)


def assert_step(got, slot, maximize=False):
    """Parameters at most 2x as far from float64 as plain torch in the parameter's dtype; states the nearest codes."""
    exact = expected_step(slot, torch.float64, maximize)
    p, dtype = got[0], got[0].dtype

    def plain(p, g, m, v):  # in float32, then one rounding
        wide = torch.promote_types(p.dtype, torch.float32)
        tensors = (t.to(wide) for t in (p, g, m, v))
        return [reference.adamw_step(*tensors, int(slot[5]) + 1, maximize=maximize, **OPTIONS)[0].to(p.dtype)]

    state = [*slot[:2], *moments(slot, torch.float32)]
    assert_accurate("p", p, *yardsticks([plain], state, draws(p.numel())), 2)
    ulp = torch.finfo(torch.float32).eps
    error, rounding = (p.double() - exact[0]).norm(), (exact[0].to(dtype).double() - exact[0]).norm()
    assert error <= 1.1 * rounding + 1e-4 * (exact[0] - slot[0].double()).norm() + ulp * exact[0].norm()
    assert float(got[5]) == float(slot[5]) + 1
    assert_moments(got, slot, exact[1:])


def assert_moments(got, slot, exact):
    """Within float32's rounding of the averages' terms; in 4 bits, the nearest codes up to that."""
    terms = 0.9 * moments(slot, torch.float64)[0].abs() + 0.1 * slot[1].double().abs(), exact[1]
    for i, (new, target) in enumerate(zip(moments(got, torch.float64), exact, strict=True)):
        close = {"rtol": 1e-6, "atol": 2e-7 * float(terms[i].max())}
        if got[2].dtype is torch.float32:
            torch.testing.assert_close(new, target, **close)
            continue
        scales, blocks = got[4][:, i], reference.blocks(target)
        torch.testing.assert_close(scales.double(), blocks.abs().amax(1), **close)
        indices = reference.nearest(blocks, scales, signed=i == 0)
        nearest = reference.dequantize(indices, scales.double(), target.shape, signed=i == 0)
        assert ((new - target).abs() <= (nearest - target).abs() + 2 * close["atol"]).all()


@pytest.mark.parametrize("quantized", [True, False], ids=["4bit", "32bit"])
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_step(device, dtype, grad_dtype, quantized):
    slot = make_slot((3, 1111), dtype, grad_dtype, quantized)
    assert_step(run_step([slot], device)[0], slot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.modes
def test_many_tensors_in_one_call(device, dtype):
    shapes = [(300,), (1,), (128,), (2, 129), (), (5, 7), (4, 64)]
    slots = [make_slot(shape, dtype, dtype, quantized=i % 3 != 2) for i, shape in enumerate(shapes)]
    for maximize in (False, True):
        for got, slot in zip(run_step(slots, device, maximize), slots, strict=True):
            assert_step(got, slot, maximize)


def test_more_tensors_than_one_launch_takes(device):
    slots = [make_slot((3,), torch.float32, torch.float32, quantized=i % 2 == 0) for i in range(258)]
    for got, slot in zip(run_step(slots, device), slots, strict=True):
        assert_step(got, slot)


def test_chunk_boundaries(device):
    """More than one thread block (8192 elements) and more than one thread's range."""
    slots = [
        make_slot((n,), torch.float32, torch.float32, quantized) for n in (8192, 8193, 20001) for quantized in (1, 0)
    ]
    for got, slot in zip(run_step(slots, device), slots, strict=True):
        assert_step(got, slot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.modes
def test_unaligned_views(device, dtype):
    """A slice of a flat buffer starts anywhere."""
    slot = make_slot((263,), dtype, dtype)
    expected = run_step([slot], device)[0]
    p, g = (torch.zeros(300, dtype=dtype, device=device.torch)[i : i + 263] for i in (1, 3))
    p.copy_(slot[0]), g.copy_(slot[1])
    rest = [[t.to(device.torch).clone()] for t in slot[2:5]] + [[slot[5].clone()]]
    options = OPTIONS["lr"], *OPTIONS["betas"], OPTIONS["eps"], OPTIONS["weight_decay"], False
    adamw_step([p], [g], *rest, *options)
    assert torch.equal(p.cpu(), expected[0])
    assert torch.equal(rest[0][0].cpu(), expected[2]) and torch.equal(rest[1][0].cpu(), expected[3])


def test_strided_parameters_and_gradients(device):
    slot = make_slot((40, 50), torch.float32, torch.float32)
    expected = run_step([slot], device)[0]
    p = torch.empty(50, 80, device=device.torch).t()[::2]
    p.copy_(slot[0])
    g = slot[1].to(device.torch).t().contiguous().t()
    rest = [[t.to(device.torch).clone()] for t in slot[2:5]] + [[slot[5].clone()]]
    options = OPTIONS["lr"], *OPTIONS["betas"], OPTIONS["eps"], OPTIONS["weight_decay"], False
    adamw_step([p], [g], *rest, *options)
    assert torch.equal(p.cpu(), expected[0]) and torch.equal(rest[0][0].cpu(), expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.modes
def test_gradients_that_are_not_finite(device, dtype):
    """NaN where torch has NaN; the states and all other elements are as if the bad ones' gradients had been zero."""
    slot = make_slot((300,), dtype, dtype)
    bad = torch.tensor([0, 5, 131, 299])
    slot[1][bad] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38]).to(dtype)
    got = run_step([slot], device)[0]
    exact = expected_step(slot, torch.float64)[0]
    assert got[0][bad[:3]].isnan().all()
    overflow = expected_step(slot, torch.float32)[0][299]  # v is infinite, so the gradient has no effect
    torch.testing.assert_close(got[0][299].float(), overflow, rtol=1e-2, atol=0)
    good = torch.ones(300, dtype=torch.bool).index_fill_(0, bad, False)
    torch.testing.assert_close(got[0][good].double(), exact[good], rtol=1e-2, atol=1e-5)
    assert got[4].isfinite().all()
    m, v = moments(got, torch.float32)
    assert (m[bad] == 0).all() and torch.equal(v[bad], got[4][[0, 0, 1, 2], 1] * 2**-16)
    assert run_step([got], device)[0][0][good].isfinite().all()


def test_zero_gradients_and_zero_lr(device):
    slot = make_slot((200,), torch.float32, torch.float32)
    for t in slot[1:5]:
        t.zero_()
    got = run_step([slot], device, weight_decay=0.0)[0]
    assert torch.equal(got[0], slot[0]) and got[4].isfinite().all()
    slot = make_slot((200,), torch.float32, torch.float32)
    assert torch.equal(run_step([slot], device, lr=0.0)[0][0], slot[0])


@pytest.mark.modes
def test_schedules(device):
    if device.kind == "emulated":
        slots = [make_slot((n,), d, d, n != 50) for n in (300, 50) for d in (torch.float32, torch.bfloat16)]
        assert_schedules_agree(lambda: tuple(t for slot in run_step(slots, device) for t in slot))


# ---- the operators as torch sees them ----


def test_opcheck():
    columns = [list(c) for c in zip(*[make_slot((n,), torch.float32, torch.float32) for n in (200, 5)], strict=True)]
    torch.library.opcheck(adamw_step.default, (*columns, 1e-3, 0.9, 0.999, 1e-8, 1e-2, False))
    for bits in (4, 8):
        torch.library.opcheck(torch.ops.tilewise.quantize_state.default, (torch.randn(300), True, bits))
        codes, scales = tw.optim.quantize_state(torch.randn(300), signed=False, bits=bits)
        torch.library.opcheck(torch.ops.tilewise.dequantize_state.default, (codes, scales, [300], False, bits))


def test_step_bumps_versions():
    slot = make_slot((200,), torch.float32, torch.float32)
    before = slot[0]._version
    adamw_step(*([t] for t in slot), 1e-3, 0.9, 0.999, 1e-8, 1e-2, False)
    assert slot[0]._version > before


# ---- bad input ----

WRONG_SLOTS = {
    "param dtype": (TypeError, lambda s: s.__setitem__(0, s[0].double())),
    "grad dtype": (TypeError, lambda s: s.__setitem__(1, s[1].long())),
    "grad shape": (ValueError, lambda s: s.__setitem__(1, s[1][:-1])),
    "code dtype": (TypeError, lambda s: s.__setitem__(2, s[2].view(torch.int8))),
    "code shape": (ValueError, lambda s: s.__setitem__(3, s[3][:1])),
    "code strides": (ValueError, lambda s: s.__setitem__(2, torch.stack([s[2], s[2]], -1)[..., 0])),
    "mixed states": (TypeError, lambda s: s.__setitem__(3, s[0].new_zeros(200))),
    "scale shape": (ValueError, lambda s: s.__setitem__(4, s[4][:1])),
    "scale dtype": (TypeError, lambda s: s.__setitem__(4, s[4].double())),
    "no scales": (ValueError, lambda s: s.__setitem__(4, s[4].new_empty(0))),
    "step dtype": (TypeError, lambda s: s.__setitem__(5, torch.tensor(1))),
    "step size": (ValueError, lambda s: s.__setitem__(5, torch.zeros(2))),
    "step negative": (ValueError, lambda s: s[5].fill_(-1)),
    "step NaN": (ValueError, lambda s: s[5].fill_(float("nan"))),
    "overlap": (ValueError, lambda s: s.__setitem__(1, s[0])),
    "misaligned": (ValueError, lambda s: s.__setitem__(2, s[2].new_zeros(129)[1:].view(2, 64))),
}


@pytest.mark.parametrize("name", WRONG_SLOTS)
def test_wrong_slot(device, name):
    error, spoil = WRONG_SLOTS[name]
    slots = [make_slot((200,), torch.float32, torch.float32) for _ in range(2)]
    slots = [[*(t.to(device.torch) for t in slot[:5]), slot[5]] for slot in slots]
    spoil(slots[1])
    before = [[t.clone() for t in slot] for slot in slots]
    with pytest.raises(error, match="adamw_step: "):
        adamw_step(*(list(c) for c in zip(*slots, strict=True)), 1e-3, 0.9, 0.999, 1e-8, 1e-2, False)
    for slot, old in zip(slots, before, strict=True):
        assert all(torch.equal(a, b) or not torch.equal(b, b) for a, b in zip(slot, old, strict=True))


def test_wrong_quantize_arguments(device):
    x = torch.randn(300, device=device.torch)
    codes, scales = tw.optim.quantize_state(x, signed=True)
    with pytest.raises(TypeError, match="quantize_state: values"):
        tw.optim.quantize_state(x.double(), signed=True)
    with pytest.raises(TypeError, match="quantize_state: values is a list"):
        tw.optim.quantize_state([1.0], signed=True)
    with pytest.raises(ValueError, match="dequantize_state: codes"):
        tw.optim.dequantize_state(codes, scales, (400,), signed=True)
    with pytest.raises(ValueError, match="dequantize_state: shape"):
        tw.optim.dequantize_state(codes, scales, (-3, -100), signed=True)
    with pytest.raises(ValueError, match="dequantize_state: scales"):
        tw.optim.dequantize_state(codes, scales[:2], (300,), signed=True)
    with pytest.raises(TypeError, match="dequantize_state: scales"):
        tw.optim.dequantize_state(codes, scales.half(), (300,), signed=True)


def test_wrong_bits(device):
    x = torch.randn(300, device=device.torch)
    codes, scales = tw.optim.quantize_state(x, signed=True, bits=8)
    for bits in (0, 5, -8, 32):
        with pytest.raises(ValueError, match=f"^quantize_state: bits is {bits}, expected 4 or 8"):
            tw.optim.quantize_state(x, signed=True, bits=bits)
        with pytest.raises(ValueError, match=f"^dequantize_state: bits is {bits}, expected 4 or 8"):
            tw.optim.dequantize_state(codes, scales, (300,), signed=True, bits=bits)
        with pytest.raises(ValueError, match=f"^quantize_state: bits is {bits}, expected 4 or 8"):
            _C.quantize_state(x, codes, scales, True, bits)  # as callers in C++
    for bits in ("8", 8.0, None, True):
        with pytest.raises(TypeError, match="^quantize_state: bits is"):
            tw.optim.quantize_state(x, signed=True, bits=bits)
    with pytest.raises(ValueError, match="^dequantize_state: codes has shape"):
        tw.optim.dequantize_state(codes, scales, (300,), signed=True)  # codes of 8 bits read as 4
    with pytest.raises(ValueError, match="^dequantize_state: codes has shape"):
        tw.optim.dequantize_state(codes[:, :64], scales[:1], (512,), signed=True, bits=8)
    with pytest.raises(ValueError, match="^quantize_state: codes is not aligned"):
        _C.quantize_state(x, codes.new_zeros(513)[1:].view(2, 256), scales, True, 8)


numbers = st.sampled_from([0.0, 1e-3, 0.9, 1.0, -1.0, float("nan"), float("inf"), 1e30])


@settings(max_examples=2000, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    dtypes=st.tuples(*[st.sampled_from([*FLOATS, torch.float64, torch.int32, torch.complex64])] * 2),
    quantized=st.booleans(),
    drop=st.integers(-1, 5),
    extra=st.integers(-1, 5),
    options=st.tuples(numbers, numbers, numbers, numbers, numbers),
    maximize=st.booleans(),
)
def test_any_arguments(shape, dtypes, quantized, drop, extra, options, maximize):
    """A listed error and nothing changed, or a step of every tensor."""
    slot = make_slot(shape, torch.float32, torch.float32, quantized)
    slot[0], slot[1] = slot[0].to(dtypes[0]), slot[1].to(dtypes[1])
    lists = [[t] for t in slot]
    extra = -1 if extra == drop else extra
    if drop >= 0:
        lists[drop] = []
    if extra >= 0:
        lists[extra] = [*lists[extra], torch.zeros(3)]
    before = [t.clone() for t in slot]
    try:
        adamw_step(*lists, *options, maximize)
    except (ValueError, TypeError):
        assert all(torch.equal(a, b) for a, b in zip(slot, before, strict=True))
    else:
        assert set(dtypes) <= set(FLOATS) and drop < 0 and extra < 0
        assert 0 <= options[1] < 1 and 0 <= options[2] < 1 and float(slot[5]) == 7
        assert all(0 <= o < float("inf") for o in options)
