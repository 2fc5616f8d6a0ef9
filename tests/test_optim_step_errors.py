"""Arguments that an optimizer's step refuses: the documented error, and nothing changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim_cases import CASES, FLOATS, RULES, call, keeps_first, keeps_second, make_slot, none
from tilewise.optim.step import optimizer_step


def same(a, b):
    """NaN equals NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def assert_refused(error, match, slots, o, **scalars):
    before = [{name: t.clone() for name, t in s.tensors().items()} for s in slots]
    with pytest.raises(error, match=f"optimizer_step: {match}"):
        call(slots, o, **scalars)
    for s, old in zip(slots, before, strict=True):
        assert all(same(t, old[name]) for name, t in s.tensors().items())


def misaligned(t):
    return t.new_zeros(t.numel() + 16)[1 : t.numel() + 1].view(t.shape)


def doubled_stride(t):
    return torch.stack([t, t], -1)[..., 0]


# what is wrong: (form, error, the argument named, the slot's change)
WRONG_SLOTS = {
    "param dtype": ("4bit", TypeError, "param", lambda s: {"param": s.param.double()}),
    "grad dtype": ("4bit", TypeError, "grad", lambda s: {"grad": s.grad.long()}),
    "grad shape": ("4bit", ValueError, "grad", lambda s: {"grad": s.grad[:-1]}),
    "grad dims": ("4bit", ValueError, "grad", lambda s: {"grad": s.grad.flatten()}),
    "code dtype": ("4bit", TypeError, "first", lambda s: {"first": s.first.view(torch.int8)}),
    "code shape": ("4bit", ValueError, "second", lambda s: {"second": s.second[:1]}),
    "code shape, 8 bits": ("8bit", ValueError, "second", lambda s: {"second": s.second.repeat(2, 1)}),
    "code strides": ("4bit", ValueError, "first", lambda s: {"first": doubled_stride(s.first)}),
    "misaligned": ("4bit", ValueError, "first", lambda s: {"first": misaligned(s.first)}),
    "misaligned, 8 bits": ("8bit", ValueError, "second", lambda s: {"second": misaligned(s.second)}),
    "state shape": ("32bit", ValueError, "first", lambda s: {"first": s.first[:-1]}),
    "state dtype": ("32bit", TypeError, "second", lambda s: {"second": s.second.double()}),
    "state missing": ("4bit", (TypeError, ValueError), "first", lambda s: {"first": none()}),
    "scales with 32 bits": ("32bit", ValueError, "first_scales", lambda s: {"first_scales": torch.zeros(2)}),
    "scale shape": ("4bit", ValueError, "second_scales", lambda s: {"second_scales": s.second_scales[:1]}),
    "scale dtype": ("4bit", TypeError, "first_scales", lambda s: {"first_scales": s.first_scales.double()}),
    "no scales": ("8bit", ValueError, "first_scales", lambda s: {"first_scales": none()}),
    "scale strides": ("4bit", ValueError, "first_scales", lambda s: {"first_scales": doubled_stride(s.first_scales)}),
    "rows": ("rank1", ValueError, "rows", lambda s: {"rows": 7}),
    "rows negative": ("4bit", ValueError, "rows", lambda s: {"rows": -2}),
    "row scales": ("factored", ValueError, "second_scales", lambda s: {"rows": 10}),
    "rank-1 codes": ("rank1", ValueError, "second", lambda s: {"second": s.second[:1]}),
    "step dtype": ("4bit", TypeError, "step", lambda s: {"step": torch.tensor(1)}),
    "step size": ("4bit", ValueError, "step", lambda s: {"step": torch.zeros(2)}),
    "step negative": ("4bit", ValueError, "step", lambda s: {"step": torch.tensor(-1.0)}),
    "step NaN": ("4bit", ValueError, "step", lambda s: {"step": torch.tensor(float("nan"))}),
    "step fraction": ("4bit", ValueError, "step", lambda s: {"step": torch.tensor(0.5)}),
    "step large": ("4bit", ValueError, "step", lambda s: {"step": torch.tensor(2.0**24)}),
    "param is grad": ("4bit", ValueError, "param", lambda s: {"grad": s.param}),
    "states share": ("4bit", ValueError, "second", lambda s: {"second": s.first}),
    "scales share": ("4bit", ValueError, "second_scales", lambda s: {"second_scales": s.first_scales}),
    "residual dtype": ("4bit", TypeError, "residual", lambda s: {"residual": torch.zeros(4, 50)}),
    "residual shape": ("4bit", ValueError, "residual", lambda s: {"residual": torch.zeros(3, dtype=torch.int16)}),
    "residual of float32": ("4bit", TypeError, "param", lambda s: {"residual": torch.zeros(4, 50, dtype=torch.int16)}),
    "stream": ("4bit", ValueError, "stream", lambda s: {"stream": -1}),
    "stream large": ("4bit", ValueError, "stream", lambda s: {"stream": 2**32}),
}


@pytest.mark.parametrize("name", WRONG_SLOTS)
def test_wrong_slot(device, name):
    form, error, argument, change = WRONG_SLOTS[name]
    slots = [make_slot((4, 50), form=form).to(device) for _ in range(2)]
    for key, value in change(slots[1]).items():
        on_device = torch.is_tensor(value) and key != "step"
        setattr(slots[1], key, value.to(device.torch) if on_device else value)
    assert_refused(error, argument, slots, RULES["adamw"])


def test_moments_in_different_bits(device):
    slot, other = make_slot((4, 50), form="4bit").to(device), make_slot((4, 50), form="8bit").to(device)
    slot.second, slot.second_scales = other.second, other.second_scales
    assert_refused(NotImplementedError, "first has other bits", [slot], RULES["adamw"])
    slot = make_slot((4, 50), form="rank1").to(device)
    slot.first, slot.first_scales = other.first, other.first_scales
    assert_refused(NotImplementedError, "first has other bits", [slot], RULES["adamw"])


def test_moments_that_the_rule_does_not_keep(device):
    slot = make_slot((4, 50)).to(device)
    assert_refused(ValueError, "second has 128 elements, expected none", [slot], RULES["momentum"])
    assert_refused(ValueError, "first has 128 elements, expected none", [slot], RULES["adagrad"])
    slot = make_slot((4, 50), o=RULES["lion"]).to(device)
    slot.rows = 4
    assert_refused(ValueError, "rows is 4, expected 0", [slot], RULES["lion"])


def test_masters_are_not_rounded_stochastically(device):
    slot = make_slot((4, 50), torch.bfloat16).to(device)
    slot.residual = torch.zeros(4, 50, dtype=torch.int16, device=device.torch)
    assert_refused(ValueError, "stochastic_rounding", [slot], RULES["adamw"]._replace(stochastic_rounding=True))


WRONG_OPTIONS = {
    "rule": (RULES["adamw"]._replace(rule="adamax"), "rule is adamax"),
    "lr": (RULES["adamw"]._replace(lr=-1e-3), "lr"),
    "lr NaN": (RULES["adamw"]._replace(lr=float("nan")), "lr"),
    "beta1": (RULES["adamw"]._replace(beta1=1.0), "beta1"),
    "beta2": (RULES["lion"]._replace(beta2=1.0), "beta2"),
    "beta negative": (RULES["momentum"]._replace(beta1=-0.1), "beta1"),
    "eps": (RULES["adamw"]._replace(eps=-1e-8), "eps"),
    "weight_decay": (RULES["adamw"]._replace(weight_decay=float("inf")), "weight_decay"),
    "lr_decay": (RULES["adagrad"]._replace(lr_decay=-1.0), "lr_decay"),
    "dampening": (RULES["momentum"]._replace(dampening=float("nan")), "dampening"),
    "nesterov": (RULES["nesterov"]._replace(dampening=0.1), "nesterov"),
    "nesterov without momentum": (RULES["sgd"]._replace(nesterov=True), "nesterov"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_wrong_option(device, name):
    o, match = WRONG_OPTIONS[name]
    assert_refused(ValueError, match, [make_slot((4, 50)).to(device)], o)
    with pytest.raises(ValueError, match=f"optimizer_step: {match}"):
        optimizer_step([], [], [], o)


def test_wrong_scalars(device):
    slot, o = make_slot((4, 50)).to(device), RULES["adamw"]
    tensor = lambda *args, **kinds: torch.tensor(*args, device=device.torch, **kinds)  # noqa: E731
    assert_refused(TypeError, "lr_tensor", [slot], o, lr=tensor(0.1, dtype=torch.float64))
    assert_refused(ValueError, "grad_scale", [slot], o, grad_scale=tensor([1.0, 2.0]))
    assert_refused(TypeError, "found_inf", [slot], o, found_inf=tensor(0))
    if device.kind != "cpu":
        assert_refused(ValueError, "found_inf", [slot], o, found_inf=tensor(0.0))
    else:
        assert_refused(ValueError, "lr", [slot], o, lr=tensor(-1.0))


def test_wrong_lists(device):
    slot, o = make_slot((4, 50)).to(device), RULES["adamw"]
    states = {"first": [slot.first], "first_scales": [slot.first_scales]}
    states |= {"second": [slot.second], "second_scales": [slot.second_scales]}
    with pytest.raises(ValueError, match="optimizer_step: grads has 0 entries, expected 1"):
        optimizer_step([slot.param], [], [slot.step], o, **states)
    with pytest.raises(ValueError, match="optimizer_step: steps has 2 entries, expected 1"):
        optimizer_step([slot.param], [slot.grad], [slot.step, slot.step], o, **states)
    for name in states:
        with pytest.raises(ValueError, match=f"optimizer_step: {name} has 2 entries, expected 1"):
            optimizer_step([slot.param], [slot.grad], [slot.step], o, **states | {name: states[name] * 2})
    with pytest.raises(ValueError, match="optimizer_step: rows has 2 entries, expected 1"):
        optimizer_step([slot.param], [slot.grad], [slot.step], o, **states, rows=[0, 0])
    assert float(slot.step) == 6


numbers = st.sampled_from([0.0, 1e-8, 1e-3, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0, 1e30, -1.0, float("nan"), float("inf")])
fields = ["param", "grad", "first", "first_scales", "second", "second_scales", "step"]


@settings(max_examples=2000, deadline=None)
@given(
    case=st.sampled_from(CASES),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    dtypes=st.tuples(*[st.sampled_from([*FLOATS, torch.float64, torch.int32, torch.complex64])] * 2),
    rows=st.integers(-1, 4),
    change=st.sampled_from([None, "rows", *fields]),
    options=st.tuples(*[numbers] * 7),
    flags=st.tuples(*[st.booleans()] * 5),
)
def test_any_arguments(case, shape, dtypes, rows, change, options, flags):
    """A listed error and nothing changed, or a step."""
    o = RULES[case[0]]
    shape = [max(1, n) for n in shape] if case[1] in ("rank1", "factored") else shape
    slot = make_slot(shape, o=o, form=case[1])
    slot.param, slot.grad = slot.param.to(dtypes[0]), slot.grad.to(dtypes[1])
    if change == "rows":
        slot.rows = rows
    elif change:
        setattr(slot, change, torch.zeros(11))  # no shape above has one dimension of 11
    before = slot.map(torch.clone)
    asked = type(o)(o.rule, *options, *flags, 0)
    try:
        call([slot], asked)
    except (ValueError, TypeError, NotImplementedError):
        assert all(same(a, b) for a, b in zip(slot.tensors().values(), before.tensors().values(), strict=True))
    else:
        assert set(dtypes) <= set(FLOATS) and float(slot.step) == 7
        assert keeps_first(asked) == keeps_first(o) or not slot.param.numel()
        assert keeps_second(asked) == keeps_second(o)
        assert all(0 <= x < float("inf") for x in (*options[:5], options[6]))
