"""tw.optim.Shampoo as a torch.optim.Optimizer: groups, closures, schedulers, wrong options, saving and loading."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from harness.spoil import spoil_anywhere
from optimizer_cases import assert_equal, assert_same_state, copies, give_gradients, rejected, snapshot, through_file

SHAPES = [(66, 70), (64, 5, 3), (5,), (), (0, 3), (70, 66)]
OFTEN = {"precondition_interval": 1, "root_interval": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """Small factorisations, which other processes that share the cores would hold up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


# ---- as torch.optim.Optimizer ----


def test_closure_schedulers_and_tensor_lr():
    ours, theirs = (lambda p: (p, copies(p)))(parameters([(70, 80)]))
    runs = []
    for params, lr in ((ours, 0.1), (theirs, torch.tensor(0.1))):
        optimizer = tw.optim.Shampoo(params, lr=lr, **OFTEN)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        target = torch.ones_like(params[0])

        def closure(optimizer=optimizer, params=params, target=target):
            optimizer.zero_grad()
            loss = (params[0] - target).square().mean()
            loss.backward()
            return loss

        losses = []
        for _ in range(4):
            losses.append(optimizer.step(closure).item())
            schedule.step()
        assert losses[-1] < losses[0] and float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 / 16)
        runs.append(losses)
    assert runs[0] == runs[1]
    assert_equal(ours, theirs)


def test_maximize_is_minimizing_the_negative():
    ours, theirs = (lambda p: (p, copies(p)))(parameters())
    a, b = tw.optim.Shampoo(ours, maximize=True, **OFTEN), tw.optim.Shampoo(theirs, **OFTEN)
    for _ in range(3):
        give_gradients(ours, theirs)
        for p in theirs:
            p.grad.neg_()
        a.step(), b.step()
    assert_equal(ours, theirs)


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


def test_states_do_not_convert():
    """What other optimizers hold has no matrices, and what reshards has none either."""
    params, optimizer = trained()
    other = tw.optim.AdamW([{"params": params[:3]}, {"params": params[3:]}])
    other.step()
    with pytest.raises(NotImplementedError, match="convert_state_dict: optimizer is a Shampoo"):
        tw.optim.convert_state_dict(other.state_dict(), optimizer)
    with pytest.raises(NotImplementedError, match="portable_state_dict: optimizer is a Shampoo"):
        tw.optim.distributed.portable_state_dict(optimizer)
    with pytest.raises(NotImplementedError, match="load_portable_state_dict: optimizer is a Shampoo"):
        tw.optim.distributed.load_portable_state_dict(optimizer, {})


def test_grad_scaler_skips_bad_steps():
    [p] = parameters([(70, 80)])
    optimizer, scaler = tw.optim.Shampoo([p], **OFTEN), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (False, True):
        before = p.detach().clone()
        scaler.scale(p.square().sum() * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(p, before) == bad and p.isfinite().all()
    assert float(optimizer.state[p]["step"]) == 1


WRONG_OPTIONS = [
    ({"lr": -1.0}, ValueError, "lr is -1.0"),
    ({"lr": float("nan")}, ValueError, "lr is nan"),
    ({"lr": "fast"}, TypeError, "lr is 'fast'"),
    ({"lr": torch.ones(2)}, ValueError, "lr has 2 elements"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr is -1.0"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
    ({"betas": 0.9}, TypeError, "betas is 0.9"),
    ({"eps": -1e-8}, ValueError, "eps is -1e-08"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay is -0.1"),
    ({"graft": "adam"}, ValueError, "graft is 'adam'"),
    ({"graft": None}, TypeError, "graft is None"),
    ({"momentum": -1.0}, ValueError, "momentum is -1.0"),
    ({"shampoo_beta": -0.5}, ValueError, "shampoo_beta is -0.5"),
    ({"matrix_eps": "small"}, TypeError, "matrix_eps is 'small'"),
    ({"precondition_interval": 0}, ValueError, "precondition_interval is 0"),
    ({"root_interval": 1.5}, TypeError, "root_interval is 1.5"),
    ({"max_order": 0}, ValueError, "max_order is 0"),
    ({"max_order": 40000}, ValueError, "max_order is 40000"),
    ({"state_bits": 5}, ValueError, "state_bits is 5"),
    ({"second_moment": "rank1", "state_bits": 8}, NotImplementedError, "second_moment is 'rank1'"),
    ({"capturable": True}, NotImplementedError, "capturable is True"),
    ({"state_bits": 4.0}, TypeError, "state_bits is 4.0"),
    ({"min_quantized_size": -1}, ValueError, "min_quantized_size is -1"),
    ({"maximize": 1}, TypeError, "maximize is 1"),
]


@pytest.mark.parametrize("options,error,message", WRONG_OPTIONS, ids=[str(o[0]) for o in WRONG_OPTIONS])
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=f"Shampoo: {message}"):
        tw.optim.Shampoo(parameters(), **options)
    params = parameters()
    optimizer = tw.optim.Shampoo(params)
    optimizer.param_groups[0].update(options)
    give_gradients(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=f"Shampoo: {message}"):
        optimizer.step()
    assert_equal(params, before)


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
    with pytest.raises(ValueError, match=r"Shampoo: a gradient has shape \(70, 66\)"):
        optimizer.step()
    assert_equal(params, before)
    assert not optimizer.state


def test_a_parameter_that_changed_its_shape():
    params, optimizer = trained()
    before = params[1].detach().clone()
    params[0].data, params[0].grad = torch.randn(70, 66), torch.randn(70, 66)
    with pytest.raises(ValueError, match="Shampoo: a state"):
        optimizer.step()
    assert torch.equal(params[1], before)


# ---- saving and loading ----


def fresh_like(params, **options):
    twins = copies(params)
    return twins, tw.optim.Shampoo([{"params": twins[:3]}, {"params": twins[3:]}], **options)


@pytest.mark.parametrize(
    "options", [{}, {"state_bits": 32}, {"graft": "sgd"}, {"max_order": 40}, {"state_bits": 8}], ids=str
)
@pytest.mark.parametrize("way", ["direct", "file"])
def test_training_continues_bit_identically(options, way):
    params, optimizer = trained(**options)
    twins, other = fresh_like(params, graft=options.get("graft", "adamw"))
    saved = optimizer.state_dict()
    other.load_state_dict(saved if way == "direct" else through_file(saved))
    for _ in range(3):
        give_gradients(params, twins)
        optimizer.step(), other.step()
        assert_equal(params, twins)
    assert other.param_groups[1]["lr"] == 0.01
    for p, q in zip(params, twins, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][name]) and value.dtype == other.state[q][name].dtype


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_deepcopy_and_pickle(twin):
    params, optimizer = trained()
    twins, other = twin((params, optimizer))
    give_gradients(params, twins)
    optimizer.step(), other.step()
    assert_equal(params, twins)
    optimizer.step()
    assert not torch.equal(params[0], twins[0])  # nothing is shared


def put(name, change, index=0):
    """Replaces one tensor of a state by a function of it."""
    return lambda d: d["state"][index].__setitem__(name, change(d["state"][index][name]))


WRONG_STATES = {
    "no state": (ValueError, lambda d: d.pop("state")),
    "no groups": (ValueError, lambda d: d.pop("param_groups")),
    "groups missing": (ValueError, lambda d: d["param_groups"].pop()),
    "group option missing": (ValueError, lambda d: d["param_groups"][0].pop("max_order")),
    "other version": (ValueError, lambda d: d["param_groups"][1].__setitem__("state_version", 2)),
    "bad option": (ValueError, lambda d: d["param_groups"][0].__setitem__("lr", -1.0)),
    "other graft": (ValueError, lambda d: d["param_groups"][0].__setitem__("graft", "sgd")),
    "fewer parameters": (ValueError, lambda d: d["param_groups"][0]["params"].pop()),
    "repeated index": (ValueError, lambda d: d["param_groups"][0].__setitem__("params", [0, 0, 1])),
    "unknown index": (ValueError, lambda d: d["state"].__setitem__(77, d["state"][0])),
    "tensor missing": (ValueError, lambda d: d["state"][0].pop("eigenvalues.66")),
    "tensor too many": (ValueError, lambda d: d["state"][0].__setitem__("statistics.66", torch.zeros(1, 66, 66))),
    "truncated codes": (ValueError, put("eigenvectors.66", lambda t: t[:, :-1])),
    "other parameter's": (ValueError, lambda d: d["state"].update({0: d["state"][1], 1: d["state"][0]})),
    "codes as float": (TypeError, put("root.70", torch.Tensor.float)),
    "no tensor": (TypeError, put("root_diagonal.70", torch.Tensor.tolist)),
    "no dict": (TypeError, lambda d: d["state"].__setitem__(0, None)),
    "NaN root": (ValueError, put("root_diagonal.70", lambda t: t * float("nan"))),
    "negative scale": (ValueError, put("root_scales.70", torch.neg)),
    "negative eigenvalues": (ValueError, put("eigenvalues.70", lambda t: -1 - t)),
    "infinite statistics": (ValueError, put("statistics.15", lambda t: t + float("inf"), 1)),
    "step of 2.5": (ValueError, put("step", lambda t: t - 0.5, 2)),
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


def test_foreign_state_dict_changes_nothing():
    params, optimizer = trained()
    twins = copies(params)
    give_gradients(params, twins)
    for kind in (torch.optim.AdamW, tw.optim.AdamW):
        foreign = kind([{"params": twins[:3]}, {"params": twins[3:]}])
        foreign.step()
        rejected(optimizer, foreign.state_dict(), ValueError, "has no .*graft")
    rejected(optimizer, None, TypeError, "state_dict is a NoneType")


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_any_state_dict(data):
    """One arbitrary change anywhere in a state dict: a listed error and nothing changed, or a state that steps."""
    if not SPOILED:
        params = parameters([(6, 7), (5,), (4, 3)])
        give_gradients(params)
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        optimizer = tw.optim.Shampoo(groups, min_quantized_size=4, precondition_interval=1, root_interval=1)
        optimizer.step()
        SPOILED.extend((params, optimizer))
    params, optimizer = SPOILED
    before = snapshot(optimizer)
    wrong = copy.deepcopy(before)
    spoil_anywhere(data, wrong)
    try:
        optimizer.load_state_dict(wrong)
    except (ValueError, TypeError, NotImplementedError):
        assert_same_state(snapshot(optimizer), before)
    else:
        optimizer.step()
        optimizer.load_state_dict(before)


SPOILED = []  # parameters and optimizer of test_any_state_dict, made once
