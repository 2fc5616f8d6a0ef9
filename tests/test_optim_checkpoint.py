"""Saving and loading optimizers: training goes on bit by bit; what does not fit raises and changes nothing."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from harness.spoil import spoil_anywhere
from optimizer_cases import (
    MAKERS,
    assert_equal,
    assert_same_state,
    copies,
    give_gradients,
    parameters,
    rejected,
    snapshot,
    through_file,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread", "home")
STATES = {
    "4": {"state_bits": 4},
    "8": {"state_bits": 8},
    "32": {"state_bits": 32},
    "rank1": {"second_moment": "rank1"},
    "factored": {"second_moment": "factored"},
    "masters": {"master_weights": True},
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def served(make, options):
    return "second_moment" not in options or make.func not in (tw.optim.SGD, tw.optim.Lion)


EVERY = [
    pytest.param(make, options, id=f"{name}-{states}")
    for name, make in MAKERS.items()
    for states, options in STATES.items()
    if served(make, options)
]
EVERY += [
    pytest.param(MAKERS["Shampoo"], options, id=f"Shampoo-{name}")
    for name, options in {"sgd": {"graft": "sgd"}, "blocks": {"max_order": 40}}.items()
]


def trained(make=MAKERS["AdamW"], dtype=torch.float32, steps=2, **options):
    params = parameters(dtype=dtype)
    optimizer = make([{"params": params[:3]}, {"params": params[3:], "lr": 0.01}], **options)
    train(optimizer, params, steps)
    return params, optimizer


def fresh_like(params, make, **options):
    twins = copies(params)
    return twins, make([{"params": twins[:3]}, {"params": twins[3:]}], **options)


@pytest.mark.parametrize("make,options", EVERY)
@pytest.mark.parametrize("way", ["direct", "file"])
def test_training_continues_bit_identically(make, options, way):
    dtype = torch.bfloat16 if "master_weights" in options else torch.float32
    params, optimizer = trained(make, dtype, **options)
    twins, other = fresh_like(params, make)
    saved = optimizer.state_dict()
    other.load_state_dict(saved if way == "direct" else through_file(saved))
    for _ in range(2):
        give_gradients(params, twins)
        optimizer.step(), other.step()
        assert_equal(params, twins)
    assert other.param_groups[1]["lr"] == 0.01
    for p, q in zip(params, twins, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][name]) and value.dtype == other.state[q][name].dtype
            assert value.data_ptr() != other.state[q][name].data_ptr() or not value.numel()


def test_names_and_further_keys_of_groups_survive():
    names = [(str(i), p) for i, p in enumerate(parameters())]
    optimizer, other = tw.optim.AdamW(names), tw.optim.AdamW([(f"x{n}", q) for n, q in names])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == ["0", "1", "2", "3", "4"]
    assert other.param_groups[0]["initial_lr"] == 1e-3


def spoil_tensor(index, name, change):
    return lambda d: d["state"][index].__setitem__(name, change(d["state"][index][name]))


WRONG_STATES = {
    "no state": (ValueError, lambda d: d.pop("state")),
    "no groups": (ValueError, lambda d: d.pop("param_groups")),
    "groups missing": (ValueError, lambda d: d["param_groups"].pop()),
    "group option missing": (ValueError, lambda d: d["param_groups"][0].pop("state_bits")),
    "no parameters": (ValueError, lambda d: d["param_groups"][0].pop("params")),
    "other version": (ValueError, lambda d: d["param_groups"][1].__setitem__("state_version", 2)),
    "bad option": (ValueError, lambda d: d["param_groups"][0].__setitem__("lr", -1.0)),
    "fewer parameters": (ValueError, lambda d: d["param_groups"][0]["params"].pop()),
    "repeated index": (ValueError, lambda d: d["param_groups"][0].__setitem__("params", [0, 0, 1])),
    "wrong names": (ValueError, lambda d: d["param_groups"][0].__setitem__("param_names", ["a"])),
    "unknown index": (ValueError, lambda d: d["state"].__setitem__(77, d["state"][0])),
    "tensor missing": (ValueError, lambda d: d["state"][0].pop("exp_avg_sq")),
    "no step": (ValueError, lambda d: d["state"][0].pop("step")),
    "tensor too many": (ValueError, lambda d: d["state"][0].__setitem__("max_exp_avg_sq", torch.zeros(3))),
    "residual of float32": (ValueError, lambda d: d["state"][0].__setitem__("residual", torch.zeros(64, 80))),
    "truncated codes": (ValueError, spoil_tensor(0, "exp_avg", lambda t: t[:-1])),
    "truncated scales": (ValueError, spoil_tensor(0, "exp_avg_sq_scale", lambda t: t[:-1])),
    "other parameter's": (ValueError, lambda d: d["state"].update({0: d["state"][1], 1: d["state"][0]})),
    "other bits": (
        ValueError,
        lambda d: d["state"][0].update(exp_avg=torch.zeros(20, 256, dtype=torch.uint8), exp_avg_scale=torch.zeros(20)),
    ),
    "codes as float": (TypeError, spoil_tensor(0, "exp_avg", lambda t: t.float())),
    "no tensor": (TypeError, lambda d: d["state"][0].__setitem__("exp_avg", [1, 2])),
    "no dict": (TypeError, lambda d: d["state"].__setitem__(0, None)),
    "NaN scale": (ValueError, lambda d: d["state"][0]["exp_avg_scale"].fill_(float("nan"))),
    "negative scale": (ValueError, lambda d: d["state"][0]["exp_avg_sq_scale"].neg_()),
    "step of 2.5": (ValueError, lambda d: d["state"][2]["step"].fill_(2.5)),
    "meta tensor": (ValueError, spoil_tensor(0, "exp_avg_scale", lambda t: t.to("meta"))),
    "matrix of a vector": (ValueError, lambda d: d["state"][2].__setitem__("exp_avg_sq_means", torch.zeros(6))),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_wrong_state_dict_changes_nothing(name):
    error, spoil = WRONG_STATES[name]
    _, optimizer = trained()
    wrong = snapshot(optimizer)
    spoil(wrong)
    rejected(optimizer, wrong, error, "AdamW.load_state_dict: ")


@pytest.mark.parametrize(
    "options", [{"second_moment": "rank1"}, {"second_moment": "factored"}], ids=["rank1", "factored"]
)
def test_wrong_structured_states_change_nothing(options):
    name = "exp_avg_sq_maxima" if options["second_moment"] == "rank1" else "exp_avg_sq_means"
    params, optimizer = trained(**options)
    assert name in optimizer.state[params[0]]
    for spoil in (lambda t: t[:-1], lambda t: -t - 1, lambda t: t * float("nan")):
        wrong = snapshot(optimizer)
        wrong["state"][0][name] = spoil(wrong["state"][0][name])
        rejected(optimizer, wrong, ValueError, name)


def test_foreign_state_dict_changes_nothing():
    params, optimizer = trained()
    twins = copies(params)
    give_gradients(params, twins)
    foreign = torch.optim.AdamW([{"params": twins[:3]}, {"params": twins[3:]}])
    foreign.step()
    rejected(optimizer, foreign.state_dict(), ValueError, "has no .*state_bits")
    rejected(optimizer, None, TypeError, "state_dict is a NoneType")
    others = tw.optim.AdamW([{"params": parameters()[:3]}, {"params": parameters(shapes=[(3,), (4,)])}])
    for group in others.param_groups:
        give_gradients(group["params"])
    others.step()
    rejected(optimizer, others.state_dict(), ValueError, "has shape")


@every_optimizer
def test_state_dicts_of_other_optimizers_change_nothing(make):
    _, optimizer = trained(make)
    alike = {*make.func.__mro__, tw.optim.AdamW} if make.func is tw.optim.Adam else {*make.func.__mro__}
    for other in MAKERS.values():
        if other.func not in alike:
            rejected(optimizer, trained(other)[1].state_dict(), ValueError, f"{make.func.__name__}.load_state_dict")


SPOILED = {}  # parameters and optimizers of test_any_state_dict, made once


@settings(max_examples=2000, deadline=None)
@given(name=st.sampled_from([p.id for p in EVERY]), data=st.data())
def test_any_state_dict(name, data):
    """One arbitrary change anywhere in a state dict: a listed error and nothing changed, or a state that steps."""
    make, options = next(p.values for p in EVERY if p.id == name)
    if name not in SPOILED:
        dtype = torch.bfloat16 if "master_weights" in options else torch.float32
        make = partial(make, min_quantized_size=4, **options)
        params = parameters(dtype=dtype, shapes=[(64, 65), (5,), ()])
        optimizer = make([{"params": params[:2]}, {"params": params[2:]}])
        train(optimizer, params)
        SPOILED[name] = params, optimizer
    _, optimizer = SPOILED[name]
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    spoil_anywhere(data, wrong)
    try:
        optimizer.load_state_dict(wrong)
    except (ValueError, TypeError, NotImplementedError):
        assert_same_state(optimizer.state_dict(), before)
    else:
        optimizer.step()
        scales = [t for state in optimizer.state.values() for key, t in state.items() if key.endswith("_scale")]
        assert all(t.isfinite().all() for t in scales)
        optimizer.load_state_dict(before)
