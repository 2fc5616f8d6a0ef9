"""One step of an optimizer: the operator against the reference, on every device."""

import dataclasses

import pytest
import torch

from harness.emulation import assert_schedules_agree
from optim_cases import (
    CASES,
    FLOATS,
    RULES,
    assert_step,
    call,
    exact_step,
    first_moment,
    make_slot,
    run_step,
    second_moment,
)

STATES = [("adamw", "4bit"), ("adamw", "32bit"), ("adamw", "rank1"), ("adamw", "factored"), ("lion", "4bit")]


def same(a, b):
    """Bit for bit."""
    raw = lambda t: t.contiguous().view(-1).view(torch.uint8)  # noqa: E731
    return all(
        x.shape == y.shape and torch.equal(raw(x), raw(y))
        for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True)
    )


# ---- every rule, form and dtype ----


@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATS for b in FLOATS], ids=lambda d: f"{d[0]}-{d[1]}"[6:])
@pytest.mark.parametrize("name", ["adamw"])
@pytest.mark.parametrize("form", ["32bit", "8bit", "4bit", "rank1", "factored"])
def test_dtypes(device, name, form, dtypes):
    o = RULES[name]
    slot = make_slot((3, 431), *dtypes, o, form)
    assert_step(run_step([slot], device, o)[0], slot, o)


@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.modes
def test_rules(device, name, form, dtype):
    o = RULES[name]
    for maximize in (False, True):
        chosen = o._replace(maximize=maximize)
        slot = make_slot((7, 91), dtype, None, chosen, form)
        assert_step(run_step([slot], device, chosen)[0], slot, chosen)


@pytest.mark.parametrize("name", ["momentum", "adamw", "adagrad"])
def test_first_step(device, name):
    """Of fresh states: zeros."""
    o = RULES[name]
    slot = make_slot((300,), torch.float32, None, o, "32bit")
    for t in (slot.first, slot.second, slot.step):
        t.zero_()
    assert_step(run_step([slot], device, o)[0], slot, o)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_chunk_boundaries(device, name, form):
    """More than one chunk (8192 elements) and more than one thread's range."""
    o = RULES[name]
    small = device.small
    shapes = [(4, 2049)] if small else [(1, 8192), (3, 2731), (8193, 1), (5, 4001)]
    slots = [make_slot(shape, torch.float32, None, o, form) for shape in shapes]
    for got, slot in zip(run_step(slots, device, o), slots, strict=True):
        assert_step(got, slot, o)


@pytest.mark.parametrize("form", ["rank1", "factored"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (257, 3), (3, 1025), (130, 129)], ids=str)
def test_rows_and_columns(device, shape, form):
    """Tiles of 256 rows and 1024 columns, blocks of codes across rows."""
    slot = make_slot(shape, torch.float32, None, RULES["adam"], form)
    assert_step(run_step([slot], device, RULES["adam"])[0], slot, RULES["adam"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "rmsprop", "lion"])
@pytest.mark.modes
def test_many_tensors_in_one_call(device, name, dtype):
    """Of all forms, and empty ones."""
    o, forms = RULES[name], [form for rule, form in CASES if rule == name]
    shapes = [(300,), (1,), (128,), (2, 129), (), (5, 7), (4, 64), (0,), (3, 100)]
    slots = []
    for i, shape in enumerate(shapes):
        form = forms[i % len(forms)]
        slots.append(make_slot(shape, dtype, None, o, form if 0 not in (len(shape), *shape) else forms[0]))
    for got, slot in zip(run_step(slots, device, o), slots, strict=True):
        assert_step(got, slot, o)


def test_more_tensors_than_one_launch_takes(device):
    slots = [make_slot((3,), form=("4bit", "32bit")[i % 2]) for i in range(258)]
    for got, slot in zip(run_step(slots, device), slots, strict=True):
        assert_step(got, slot)


@pytest.mark.parametrize(("name", "form"), STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.modes
def test_unaligned_views(device, name, form, dtype):
    """A slice of a flat buffer starts anywhere."""
    slot = make_slot((1, 263), dtype, None, RULES[name], form)
    expected = run_step([slot], device, RULES[name])[0]
    moved = slot.to(device)
    for field, at in (("param", 1), ("grad", 3), ("second_scales", 1)):
        t = getattr(moved, field)
        view = t.new_empty(t.numel() + 8)[at : at + t.numel()].view(t.shape)
        setattr(moved, field, view.copy_(t))
    call([moved], RULES[name])
    assert same(moved.map(lambda t: t.cpu()), expected)


def test_strided_parameters_and_gradients(device):
    slot = make_slot((40, 50))
    expected = run_step([slot], device)[0]
    moved = slot.to(device)
    moved.param = torch.empty(50, 80, device=device.torch).t()[::2].copy_(slot.param)
    moved.grad = moved.grad.t().contiguous().t()
    call([moved], RULES["adamw"])
    assert torch.equal(moved.param.cpu(), expected.param) and torch.equal(moved.first.cpu(), expected.first)


# ---- numbers that are not finite, and zeros ----

BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize(("name", "form"), [c for c in CASES if c[1] != "32bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.modes
def test_gradients_that_are_not_finite(device, name, form, dtype):
    """The parameter is lost where torch loses it; in quantised states the element restarts, and no other is touched."""
    o = RULES[name]
    slot = make_slot((3, 100), dtype, None, o, form)
    bad = torch.tensor([0, 5, 131])
    good = torch.ones(300, dtype=torch.bool).index_fill_(0, bad, False)
    clean = slot.map(torch.clone)
    slot.grad.view(-1)[bad] = torch.tensor(BAD).to(dtype)
    clean.grad.view(-1)[bad] = 0
    got, without = run_step([slot, clean], device, o)
    lost = exact_step(slot, o, torch.float64)[0].view(-1)[bad]
    torch.testing.assert_close(got.param.view(-1)[bad].double(), lost, rtol=1e-2, atol=1e-5, equal_nan=True)
    if form != "factored" or o.decoupled_weight_decay or not o.weight_decay:  # where no gradient is another statistic
        torch.testing.assert_close(got.param.view(-1)[good], without.param.view(-1)[good], rtol=1e-5, atol=1e-6)
    assert got.first_scales.isfinite().all() and got.second_scales.isfinite().all()
    if got.first.numel():
        assert (first_moment(got, torch.float32).view(-1)[bad] == 0).all()
    assert run_step([got], device, o)[0].param.view(-1)[good].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_moments_that_overflow(device, dtype):
    """Torch's parameter does not move then; the state restarts."""
    slot = make_slot((300,), dtype)
    slot.grad[7] = 3e38
    got = run_step([slot], device)[0]
    expected = exact_step(slot, RULES["adamw"], torch.float32)[0]
    torch.testing.assert_close(got.param[7].float(), expected[7], rtol=1e-2, atol=0)
    assert first_moment(got, torch.float32)[7] == 0
    assert second_moment(got, torch.float32)[7] == got.second_scales[0] * 2**-16


@pytest.mark.parametrize("name", ["adamw", "momentum", "lion", "rmsprop momentum"])
def test_32_bit_states_propagate(device, name):
    o = RULES[name]
    slot = make_slot((50,), torch.float32, None, o, "32bit")
    slot.grad[:3] = torch.tensor(BAD)
    got = run_step([slot], device, o)[0]
    p, m, v, _ = exact_step(slot, o, torch.float32)
    torch.testing.assert_close(got.param, p, equal_nan=True)
    torch.testing.assert_close(got.first, m, equal_nan=True)
    if v is not None:
        torch.testing.assert_close(got.second, v, equal_nan=True)


@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_zero_gradients_and_zero_lr(device, name, form, eps):
    o = RULES[name]._replace(weight_decay=0.0, eps=eps)
    slot = make_slot((2, 100), torch.float32, None, o, form)
    for t in slot.tensors().values():
        if t is not slot.param:
            t.zero_()
    got = run_step([slot], device, o)[0]
    assert got.first_scales.isfinite().all() and got.second_scales.isfinite().all()
    if eps:
        assert torch.equal(got.param, slot.param)
    slot = make_slot((2, 100), torch.float32, None, o, form)
    assert torch.equal(run_step([slot], device, o._replace(lr=0.0))[0].param, slot.param)


# ---- scalars in tensors ----


@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize(("name", "form"), STATES + [("momentum", "4bit"), ("adagrad", "32bit"), ("sgd", "32bit")])
@pytest.mark.modes
def test_scalars_in_tensors(device, name, form, capturable):
    """A learning rate and a gradient scale in tensors; with `capturable` the device counts the steps."""
    o = RULES[name]
    slot = make_slot((3, 200), torch.float32, None, o, form)
    scaled = dataclasses.replace(slot, grad=slot.grad * 1024)
    lr, scale, found = torch.tensor(0.02), torch.tensor(1024.0), torch.tensor(0.0)
    told = {"lr": lr, "grad_scale": scale} | ({"found_inf": found} if capturable else {})
    got = run_on_device([scaled], device, o._replace(lr=0.5, capturable=capturable), told)[0]
    got.grad = slot.grad
    assert_step(got, slot, o._replace(lr=float(lr)))


def run_on_device(slots, device, o, scalars):
    """As run_step, with step counters where `capturable` wants them."""
    slots = [s.to(device) for s in slots]
    for s in slots:
        s.step = s.step.to(device.torch) if o.capturable else s.step
    call(slots, o, **{key: t.to(device.torch) for key, t in scalars.items()})
    out = [s.map(lambda t: t.cpu()) for s in slots]
    for s in out:
        s.step = s.step.cpu()
    return out


@pytest.mark.parametrize(("name", "form"), STATES)
@pytest.mark.modes
def test_found_inf_skips_the_step(device, name, form):
    o = RULES[name]._replace(capturable=True)
    slot = make_slot((3, 100), torch.float32, None, o, form)
    slot.grad.view(-1)[3] = float("inf")
    got = run_on_device([slot], device, o, {"found_inf": torch.tensor(1.0)})[0]
    assert same(got, slot)


# ---- order, schedules, threads ----


@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.devices("cpu")
def test_threads_do_not_matter(device, name, form):
    o = RULES[name]
    shapes = [(5, 4001), (300, 1100), (3, 3)] if form in ("rank1", "factored") else [(20001,), (7,), (9000,)]
    slots = [make_slot(shape, torch.float32, None, o, form) for shape in shapes]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_step(slots, device, o)
        torch.set_num_threads(2)
        two = run_step(slots, device, o)
    finally:
        torch.set_num_threads(before)
    assert all(same(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.modes
@pytest.mark.devices("emulated")
def test_schedules(device):
    slots = [
        make_slot((3, n), d, None, form=f)
        for n, f in ((100, "4bit"), (17, "32bit"), (90, "rank1"), (90, "factored"))
        for d in FLOATS[:2]
    ]
    assert_schedules_agree(lambda: tuple(t for s in run_step(slots, device) for t in s.tensors().values() if t.numel()))


# ---- the operator as torch sees it ----


def test_opcheck():
    slots = [make_slot((4, 50), form=form) for form in ("4bit", "32bit", "rank1", "factored")]
    columns = [
        [getattr(s, f) for s in slots]
        for f in ("param", "grad", "first", "first_scales", "second", "second_scales", "residual", "step")
    ]
    o = RULES["adamw"]
    rows, streams = [s.rows for s in slots], [0] * 4
    numbers, flags = [float(x) for x in o[1:8]], list(o[8:13])
    torch.library.opcheck(
        torch.ops.tilewise.optimizer_step.default,
        (*columns, rows, streams, o.rule, numbers, flags, 0, torch.tensor(0.1)),
    )


def test_step_bumps_versions():
    slot = make_slot((200,))
    before = {name: t._version for name, t in slot.tensors().items()}
    call([slot], RULES["adamw"])
    after = {name: t._version for name, t in slot.tensors().items()}
    assert {name for name in before if after[name] > before[name]} >= {
        "param",
        "first",
        "second",
        "first_scales",
        "second_scales",
        "step",
    }
    assert after["grad"] == before["grad"]
