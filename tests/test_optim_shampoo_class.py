"""What tw.optim.Shampoo has beside the other optimizers (test_optim_behaviour.py, _checkpoint.py): matrices."""

import copy

import pytest
import torch

import tilewise as tw
from optimizer_cases import assert_equal, give_gradients, rejected, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(66, 70), (64, 5, 3), (5,), (), (0, 3), (70, 66)]
OFTEN = {"precondition_interval": 1, "root_interval": 2}


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def trained(steps=3, graft="adamw", **options):
    params = parameters()
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.01}]
    optimizer = tw.optim.Shampoo(groups, graft=graft, **OFTEN | options)
    for _ in range(steps):
        give_gradients(params)
        optimizer.step()
    return params, optimizer


def test_groups_and_parameters_without_gradient():
    params = parameters([(70, 80)] * 4)
    optimizer = tw.optim.Shampoo([{"params": params[:1], "lr": 0.0}, {"params": params[1:2], "state_bits": 32}])
    optimizer.add_param_group({"params": params[2:], "max_order": 40, "graft": "sgd"})
    before = [p.detach().clone() for p in params]
    give_gradients(params)
    params[3].grad = None
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, False, False, True]
    assert [p in optimizer.state for p in params] == [True, True, True, False]
    assert [optimizer.state[p]["blocks"].tolist()[2:] for p in params[:3]] == [[1, 1], [1, 1], [2, 2]]
    assert ["eigenvalues.70" in optimizer.state[p] for p in params[:2]] == [True, False]
    with pytest.raises(ValueError, match="state_bits is 5"):
        optimizer.add_param_group({"params": parameters(), "state_bits": 5})
    assert len(optimizer.param_groups) == 3


def test_options_decide_at_the_first_step():
    params, optimizer = trained()
    twins, other = copy.deepcopy((params, optimizer))
    for group in other.param_groups:
        group.update(state_bits=32, max_order=20, min_quantized_size=10**6)
    give_gradients(params, twins)
    optimizer.step(), other.step()
    assert_equal(params, twins)
    optimizer.param_groups[0]["graft"] = "sgd"
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="Shampoo: a state"):
        optimizer.step()
    assert_equal(params, before)


def test_overrides():
    params = parameters([(70, 80), (80, 70)])
    tw.optim.override(params[1], state_bits=32)
    optimizer = tw.optim.Shampoo(params)
    give_gradients(params)
    optimizer.step()
    assert ["eigenvalues.70" in optimizer.state[p] for p in params] == [True, False]
    assert [row.bits for row in optimizer.memory_report()] == [4, 32]


def test_states_are_not_portable():
    """Matrices belong to one sharding."""
    _, optimizer = trained()
    with pytest.raises(NotImplementedError, match="portable_state_dict: optimizer is a Shampoo"):
        tw.optim.distributed.portable_state_dict(optimizer)
    with pytest.raises(NotImplementedError, match="load_portable_state_dict: optimizer is a Shampoo"):
        tw.optim.distributed.load_portable_state_dict(optimizer, {})


def test_wrong_parameters():
    """Found before anything changes, the first parameter included."""
    first = parameters([(6, 7)])
    for dtype in (torch.float64, torch.complex64):
        params = [*first, *parameters([(5, 6)], dtype)]
        give_gradients(params)
        with pytest.raises(TypeError, match="Shampoo: param has dtype"):
            tw.optim.Shampoo(params).step()
    p = parameters([(50, 4)])[0]
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (50, 4), check_invariants=True)
    expanded = torch.nn.Parameter(torch.randn(1, 40).expand(50, 40))
    expanded.grad = torch.ones(50, 40)
    for wrong, error, message in ((p, TypeError, "layout"), (expanded, ValueError, "overlap")):
        before = first[0].detach().clone()
        optimizer = tw.optim.Shampoo([*first, wrong])
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(first[0], before) and not optimizer.state


def test_a_gradient_of_another_shape():
    params = parameters([(66, 70), (70, 66)])
    give_gradients(params)
    params[1].data = torch.randn(66, 70)
    before = [p.detach().clone() for p in params]
    optimizer = tw.optim.Shampoo(params, **OFTEN)
    for call in (optimizer.step, optimizer.update_preconditioners):
        with pytest.raises(ValueError, match=r"Shampoo: a gradient has shape \(70, 66\)"):
            call()
    assert_equal(params, before)
    assert not optimizer.state


# ---- saving and loading ----


def put(name, change, index=0):
    """Replaces one tensor of a state by a function of it."""
    return lambda d: d["state"][index].__setitem__(name, change(d["state"][index][name]))


WRONG_STATES = {
    "group option missing": (ValueError, lambda d: d["param_groups"][0].pop("max_order")),
    "other graft": (ValueError, lambda d: d["param_groups"][0].__setitem__("graft", "sgd")),
    "tensor missing": (ValueError, lambda d: d["state"][0].pop("eigenvalues.66")),
    "tensor too many": (ValueError, lambda d: d["state"][0].__setitem__("statistics.66", torch.zeros(1, 66, 66))),
    "truncated codes": (ValueError, put("eigenvectors.66", lambda t: t[:, :-1])),
    "other parameter's": (ValueError, lambda d: d["state"].update({0: d["state"][1], 1: d["state"][0]})),
    "codes as float": (TypeError, put("root.70", torch.Tensor.float)),
    "no tensor": (TypeError, put("root_diagonal.70", torch.Tensor.tolist)),
    "NaN root": (ValueError, put("root_diagonal.70", lambda t: t * float("nan"))),
    "negative scale": (ValueError, put("root_scales.70", torch.neg)),
    "negative eigenvalues": (ValueError, put("eigenvalues.70", lambda t: -1 - t)),
    "infinite statistics": (ValueError, put("statistics.15", lambda t: t + float("inf"), 1)),
    "roots of tomorrow": (ValueError, put("root_step", lambda t: t + 9)),
    "other blocks": (ValueError, put("blocks", lambda t: t + 1)),
    "too many blocks": (ValueError, put("blocks", lambda t: t + 10**6)),
    "negative blocks": (ValueError, put("blocks", torch.neg)),
    "no blocks": (ValueError, put("blocks", torch.zeros_like)),
    "meta tensor": (ValueError, put("root.66", lambda t: t.to("meta"))),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_wrong_state_dict_changes_nothing(name):
    error, spoil = WRONG_STATES[name]
    params, optimizer = trained()
    wrong = snapshot(optimizer)
    spoil(wrong)
    rejected(optimizer, wrong, error, "Shampoo.load_state_dict: ")
