"""4-bit optimizer states: the operators against the reference, on every device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from harness.emulation import assert_schedules_agree
from harness.judge import assert_accurate, draws, yardsticks
from tilewise.reference import optim as reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
adamw_step = torch.ops.tilewise.adamw_step


def heavy_tailed(*shape):
    """Magnitudes over many decades, as moments have."""
    return torch.randn(shape) * torch.randn(shape).abs() ** 3


# ---- quantisation ----


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 1000])
@pytest.mark.modes
def test_quantize_is_exact(device, n, signed):
    values = heavy_tailed(n) if signed else heavy_tailed(n).square()
    indices, scales = reference.quantize(values, signed)
    codes, got_scales = tw.optim.quantize_state(values.to(device.torch), signed=signed)
    assert torch.equal(got_scales.cpu(), scales)
    assert torch.equal(reference.unpack(codes.cpu()).flatten()[:n], indices.flatten()[:n])
    values = tw.optim.dequantize_state(codes, got_scales, (n,), signed=signed)
    assert torch.equal(values.cpu(), reference.dequantize(indices, scales, torch.Size([n]), signed))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_quantize_around_every_midpoint(device, signed):
    """The floats next to each decision, at scales that make the products inexact."""
    book = reference.SIGNED_CODES if signed else reference.UNSIGNED_CODES
    for scale in [1.0, 0.7182818, 3.1e-12, 9.7e20, 1.9999999]:
        scale = torch.tensor(scale)
        middle = ((book[1:] + book[:-1]) / 2 * scale.double()).float()
        values = torch.cat([middle, middle.nextafter(scale * 2), middle.nextafter(-scale * 2), scale[None]])
        values = torch.nn.functional.pad(values, (0, 128 - values.numel()))
        indices, scales = reference.quantize(values, signed)
        codes, _ = tw.optim.quantize_state(values.to(device.torch), signed=signed)
        assert torch.equal(scales, scale[None])
        assert torch.equal(reference.unpack(codes.cpu()), indices)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_quantize_special_values(device, signed):
    values = torch.randn(600).abs()
    values[:128] = 0
    values[[130, 140, 150, 160]] = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0])
    values[256:384] = 1e-44  # far below the smallest scale
    values[384:512] = 3e38
    indices, scales = reference.quantize(values, signed)
    codes, got_scales = tw.optim.quantize_state(values.to(device.torch), signed=signed)
    assert torch.equal(got_scales.cpu(), scales) and bool(scales.isfinite().all())
    assert torch.equal(reference.unpack(codes.cpu()).flatten()[:600], indices.flatten()[:600])


def test_quantize_strides(device):
    values = torch.randn(40, 60, device=device.torch).t()
    codes, scales = tw.optim.quantize_state(values, signed=True)
    expected, _ = tw.optim.quantize_state(values.contiguous(), signed=True)
    assert torch.equal(codes, expected)
    pairs = torch.stack([scales, scales], 1)  # scales as an optimizer's state holds them
    a = tw.optim.dequantize_state(codes, pairs[:, 0], (60, 40), signed=True)
    assert torch.equal(a, tw.optim.dequantize_state(codes, scales, (60, 40), signed=True))


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
    torch.library.opcheck(torch.ops.tilewise.quantize_state.default, (torch.randn(300), True))
    codes, scales = tw.optim.quantize_state(torch.randn(300), signed=False)
    torch.library.opcheck(torch.ops.tilewise.dequantize_state.default, (codes, scales, [300], False))


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
