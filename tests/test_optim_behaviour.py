"""The optimizers of tw.optim behave as torch.optim's: groups, schedules, scalers, hooks, copies; and on bad input."""

import ast
import copy
import gc
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import tilewise as tw
from optimizer_cases import MAKERS, assert_equal, copies, give_gradients, parameters, train
from tilewise.optim import forms
from tilewise.optim.options import COMMON
from tilewise.optim.step import Options

pytestmark = pytest.mark.usefixtures("one_thread", "home")
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


# ---- as torch.optim.Optimizer ----


@every_optimizer
def test_parameters_without_gradient_do_not_count(make):
    params = parameters()
    optimizer = make(params)
    give_gradients(params)
    params[0].grad = None
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before) and params[0] not in optimizer.state
    assert float(optimizer.state[params[1]]["step"]) == 1
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    give_gradients(params)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in params)


@every_optimizer
def test_closure_schedulers_and_tensor_lr(make):
    ours, theirs = (lambda p: (p, copies(p)))(parameters(shapes=[(70, 80)]))
    runs = []
    for params, lr in ((ours, 0.015625), (theirs, torch.tensor(0.015625, device="cpu"))):
        optimizer = make(params, lr=lr)
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
        assert losses[-1] < losses[0] and float(optimizer.param_groups[0]["lr"]) == 0.015625 / 16
        runs.append(losses)
    assert runs[0] == runs[1]
    assert_equal(ours, theirs)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_schedulers_of_momentum(name):
    """OneCycleLR writes betas or momentum as well; the result is torch.optim's."""
    ours, theirs = (lambda p: (p, copies(p)))(parameters())
    other = torch.optim.AdamW(theirs, lr=1e-2) if name == "AdamW" else torch.optim.SGD(theirs, 1e-2, 0.9, nesterov=True)
    optimizers = MAKERS[name](ours, state_bits=32), other
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=10) for o in optimizers]
    for _ in range(9):
        give_gradients(ours, theirs)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step(), schedule.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_groups():
    params = parameters(shapes=[(70, 80)] * 4)
    optimizer = tw.optim.AdamW([{"params": params[:1], "lr": 0.0}, {"params": params[1:2], "state_bits": 32}])
    optimizer.add_param_group({"params": params[2:3], "weight_decay": 0.0})
    optimizer.add_param_group({"params": params[3], "state_bits": 8, "block_size": 256})
    before = [p.detach().clone() for p in params]
    train(optimizer, params)
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
    assert [forms.find(optimizer.state[p], "exp_avg").bits for p in params] == [4, 32, 4, 8]
    for wrong, error in (({"state_bits": 5}, ValueError), ({"state_bits": 8, "block_size": 128}, NotImplementedError)):
        with pytest.raises(error, match="AdamW: "):
            optimizer.add_param_group({"params": parameters(), **wrong})
    assert len(optimizer.param_groups) == 4


@every_optimizer
def test_maximize_is_minimizing_the_negative(make):
    ours, theirs = (lambda p: (p, copies(p)))(parameters())
    a, b = make(ours, maximize=True), make(theirs)
    for _ in range(3):
        give_gradients(ours, theirs)
        for p in theirs:
            p.grad.neg_()
        a.step(), b.step()
    assert_equal(ours, theirs)


def test_momentum_may_begin_later():
    [p] = parameters(shapes=[(70, 80)])
    optimizer = tw.optim.SGD([p], lr=0.1)
    train(optimizer, [p])
    assert set(optimizer.state[p]) == {"step"}
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, [p])
    assert set(optimizer.state[p]) == {"step", "momentum_buffer", "momentum_buffer_scale"}


@every_optimizer
def test_grad_scaler(home, make):
    """The same as by hand; bad steps are skipped and do not count, whether gradients were unscaled before or not."""
    [p], [q] = (lambda a: (a, copies(a)))(parameters(shapes=[(70, 80)]))
    optimizer, other = make([p]), make([q])
    scaler = torch.amp.GradScaler(home.type, init_scale=1024.0)
    for kind in ("plain", "inf", "unscaled", "plain"):
        before = p.detach().clone()
        scaler.scale(p.square().sum() * (float("inf") if kind == "inf" else 1.0)).backward()
        if kind == "unscaled":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(p, before) == (kind == "inf") and p.isfinite().all()
        if kind != "inf":
            q.grad = 2 * q.detach()
            other.step()
    assert not hasattr(optimizer, "found_inf")
    assert scaler.get_scale() == 512 and float(optimizer.state[p]["step"]) == 3
    torch.testing.assert_close(p, q)


@pytest.mark.devices("cuda")
def test_cuda_graph_with_learning_rate_on_the_device(home):
    """Replays read the counters, the gradients and the learning rate that are there by then."""
    ours, theirs = (lambda p: (p, copies(p)))(parameters(shapes=[(70, 80), (3,)]))
    lr = torch.tensor(1e-2, device=home)
    optimizer = tw.optim.AdamW(ours, lr=lr, state_bits=32, capturable=True)
    other = torch.optim.AdamW(theirs, lr=1e-2)
    give_gradients(ours, theirs)
    optimizer.step(), other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for scale in (1.0, 0.5, 0.25):
        lr.fill_(1e-2 * scale)
        other.param_groups[0]["lr"] = 1e-2 * scale
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn_like(q)
            p.grad.copy_(q.grad)
        graph.replay(), other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert float(optimizer.state[p]["step"]) == 4


@pytest.mark.devices("cuda")
def test_parameters_that_moved_to_another_device(home):
    [p] = parameters("cpu", shapes=[(70, 80)])
    optimizer = tw.optim.AdamW([p])
    train(optimizer, [p])
    p.grad, p.data = None, p.data.to(home)
    give_gradients([p])
    with pytest.raises((ValueError, RuntimeError), match="device"):
        optimizer.step()


@every_optimizer
def test_hooks(make):
    [p] = parameters(shapes=[(70, 80)])
    optimizer, calls = make([p]), []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("any pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("any post")),
    ]
    train(optimizer, [p])
    for handle in handles:
        handle.remove()
    train(optimizer, [p])
    assert calls == ["any pre", "pre", "post", "any post"]


@every_optimizer
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_deepcopy_and_pickle(make, twin):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 2)
    twins, other = twin((params, optimizer))
    give_gradients(params, twins)
    optimizer.step(), other.step()
    assert_equal(params, twins)
    optimizer.step()
    assert not torch.equal(params[0], twins[0])  # nothing is shared


def test_mixed_dtypes_and_strides_in_one_step():
    """float32, bfloat16, float16 and transposed parameters together, as each would alone."""
    params = [*parameters(shapes=[(70, 80)]), *parameters(dtype=torch.bfloat16), *parameters(dtype=torch.float16)]
    params.append(torch.nn.Parameter(torch.randn(60, 90).t()))
    alone = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    optimizer, others = tw.optim.AdamW(params), [tw.optim.AdamW([p]) for p in alone]
    for _ in range(2):
        give_gradients(params, alone)
        optimizer.step()
        for other in others:
            other.step()
    assert_equal(params, alone)


def test_lists_of_torch_compile_options_are_accepted():
    for options in ({"foreach": True}, {"fused": False}, {"foreach": None, "fused": True, "differentiable": False}):
        params = parameters()
        train(tw.optim.AdamW(params, **options), params)


# ---- overrides ----


def test_overrides_decide_the_states():
    model = torch.nn.Sequential(torch.nn.Linear(80, 90), torch.nn.Sequential(torch.nn.Linear(90, 100)))
    inner = model[1]
    tw.optim.override(inner, state_bits=8)
    tw.optim.override(inner[0].bias, min_quantized_size=50)
    tw.optim.override(model, second_moment="block", state_bits=32)
    optimizer = tw.optim.AdamW(model.parameters(), second_moment="rank1")
    train(optimizer, list(model.parameters()))
    bits = [forms.find(optimizer.state[p], "exp_avg").bits for p in model.parameters()]
    assert bits == [32, 32, 8, 8]
    before = len(tw.optim.overrides._modules), len(tw.optim.overrides._parameters)
    del model, inner, optimizer
    gc.collect()
    assert (len(tw.optim.overrides._modules), len(tw.optim.overrides._parameters)) == (before[0] - 2, before[1] - 1)


def test_stable_embedding():
    embedding = tw.nn.StableEmbedding(500, 64, padding_idx=3)
    assert (embedding.weight[3] == 0).all() and embedding.weight.abs().max() <= (6 / 564) ** 0.5
    rows = embedding(torch.arange(10))
    assert rows.shape == (10, 64) and rows[4:].mean().abs() < 0.1 and abs(rows[4:].std() - 1) < 0.1
    for model in (embedding, copy.deepcopy(embedding)):
        optimizer = tw.optim.AdamW(model.parameters(), state_bits=4)
        model(torch.randint(500, (50,))).square().sum().backward()
        optimizer.step()
        assert optimizer.state[model.weight]["exp_avg"].dtype is torch.float32
    half = tw.nn.StableEmbedding(10, 8, dtype=torch.bfloat16)
    assert half(torch.tensor([1])).dtype is torch.bfloat16 and half.norm.weight.dtype is torch.float32
    with pytest.raises(NotImplementedError, match="sparse"):
        tw.nn.StableEmbedding(10, 8, sparse=True)


def test_memory_report():
    model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.LayerNorm(400))
    optimizer = tw.optim.AdamW(model.named_parameters(), second_moment="factored")
    report = optimizer.memory_report()
    assert [row.name for row in report] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [row.form for row in report] == ["factored", "float32", "float32", "float32"]
    assert report[0].bits == 4 and 0.53 < report[0].bytes_per_parameter < 0.57 and report[1].state_bytes == 3204
    lines = str(report).splitlines()
    assert len(lines) == 6 and "400x300" in lines[1] and f"{report.state_bytes:,}" in lines[-1]
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert "0.weight" in console.export_text()
    assert tw.optim.SGD(model.parameters()).memory_report()[0].form == "none"


# ---- what is documented ----

DOCUMENT = (Path(__file__).parents[1] / "docs" / "optim.md").read_text()


def own_defaults(kind):
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


@every_optimizer
def test_options_are_documented(make):
    """docs/optim.md has every argument with its default, docstrings name them, and torch.optim's are the same."""
    kind = make.func
    call = re.search(rf"^{kind.__name__}\((.*?)\)$", DOCUMENT, re.MULTILINE | re.DOTALL)
    documented = {k.arg: ast.literal_eval(k.value) for k in ast.parse(call[0]).body[0].value.keywords}
    assert documented == own_defaults(kind) and list(documented) == list(own_defaults(kind))
    named = kind.__doc__ + (tw.optim.Adam.__doc__ if kind is tw.optim.AdamW else "")
    assert all(re.search(rf"\b{name}\b", named) for name in documented)
    theirs = own_defaults(getattr(torch.optim, kind.__name__, tw.optim.AdamW if "Shampoo" in kind.__name__ else kind))
    for name in documented.keys() & theirs.keys():
        assert documented[name] == theirs[name]


def test_common_options_and_names_are_documented():
    table = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", DOCUMENT, re.MULTILINE))
    assert {name: ast.literal_eval(value) for name, value in table.items()} == COMMON
    for name in COMMON:
        assert f"``{name}=" in tw.optim.Adam.__doc__ and name in tw.optim.LowBitOptimizer.__doc__
    assert all(re.search(rf"\b{name}\b", DOCUMENT) for name in tw.optim.__all__)


# ---- bad input ----

WRONG_OPTIONS = [
    ({"lr": -1.0}, ValueError, "lr is -1.0"),
    ({"lr": float("nan")}, ValueError, "lr is nan"),
    ({"lr": float("inf")}, ValueError, "lr is inf"),
    ({"lr": "fast"}, TypeError, "lr is 'fast'"),
    ({"lr": torch.ones(2)}, ValueError, "lr has 2 elements"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr is -1.0"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
    ({"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\] is -0.1"),
    ({"betas": 0.9}, TypeError, "betas is 0.9"),
    ({"eps": -1e-8}, ValueError, "eps is -1e-08"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay is -0.1"),
    ({"amsgrad": True}, NotImplementedError, "amsgrad is True"),
    ({"differentiable": True}, NotImplementedError, "differentiable is True"),
    ({"state_bits": 5}, ValueError, "state_bits is 5"),
    ({"state_bits": 4.0}, TypeError, "state_bits is 4.0"),
    ({"block_size": 64}, NotImplementedError, "block_size is 64"),
    ({"block_size": 256}, NotImplementedError, "block_size is 256"),
    ({"state_bits": 8, "block_size": 128}, NotImplementedError, "block_size is 128"),
    ({"block_size": 0}, ValueError, "block_size is 0"),
    ({"second_moment": "rank2"}, ValueError, "second_moment is 'rank2'"),
    ({"second_moment": None}, TypeError, "second_moment is None"),
    ({"second_moment": "rank1", "state_bits": 8}, NotImplementedError, "second_moment is 'rank1' with state_bits 8"),
    ({"min_quantized_size": -1}, ValueError, "min_quantized_size is -1"),
    ({"maximize": 1}, TypeError, "maximize is 1"),
    ({"capturable": None}, TypeError, "capturable is None"),
    ({"fused": "yes"}, TypeError, "fused is 'yes'"),
    ({"seed": 1.5}, TypeError, "seed is 1.5"),
    ({"master_weights": True, "stochastic_rounding": True}, ValueError, "stochastic_rounding is True"),
]
OTHER_WRONG_OPTIONS = [
    ("SGD", {"momentum": -0.1}, ValueError, "momentum is -0.1"),
    ("SGD", {"momentum": 0.0, "nesterov": True}, ValueError, "nesterov is True with momentum 0.0"),
    ("SGD", {"dampening": 0.1}, ValueError, "nesterov is True with momentum 0.9 and dampening 0.1"),
    ("SGD", {"dampening": float("nan"), "nesterov": False}, ValueError, "dampening is nan"),
    ("RMSprop", {"centered": True}, NotImplementedError, "centered is True"),
    ("RMSprop", {"alpha": -1.0}, ValueError, "alpha is -1.0"),
    ("Adagrad", {"lr_decay": -1.0}, ValueError, "lr_decay is -1.0"),
    ("Adagrad", {"initial_accumulator_value": -1.0}, ValueError, "initial_accumulator_value is -1.0"),
    ("Lion", {"betas": (0.9, 1.5)}, ValueError, r"betas\[1\] is 1.5"),
    ("Shampoo", {"graft": "adam"}, ValueError, "graft is 'adam'"),
    ("Shampoo", {"graft": None}, TypeError, "graft is None"),
    ("Shampoo", {"momentum": -1.0}, ValueError, "momentum is -1.0"),
    ("Shampoo", {"shampoo_beta": -0.5}, ValueError, "shampoo_beta is -0.5"),
    ("Shampoo", {"matrix_eps": "small"}, TypeError, "matrix_eps is 'small'"),
    ("Shampoo", {"precondition_interval": 0}, ValueError, "precondition_interval is 0"),
    ("Shampoo", {"root_interval": 1.5}, TypeError, "root_interval is 1.5"),
    ("Shampoo", {"max_order": 0}, ValueError, "max_order is 0"),
    ("Shampoo", {"max_order": 40000}, ValueError, "max_order is 40000"),
]
WRONG = [("AdamW", *entry) for entry in WRONG_OPTIONS] + OTHER_WRONG_OPTIONS


@pytest.mark.parametrize("name,options,error,message", WRONG, ids=[f"{w[0]}-{w[1]}" for w in WRONG])
def test_wrong_options(name, options, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        MAKERS[name](parameters(), **options)
    params = parameters()
    optimizer = MAKERS[name](params)
    optimizer.param_groups[0].update(options)
    give_gradients(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=f"{name}: {message}"):
        optimizer.step()
    assert_equal(params, before)


def test_unknown_options():
    for name, make in MAKERS.items():
        with pytest.raises(TypeError, match=f"{name}: got an unexpected argument 'state_bit'"):
            make(parameters(), state_bit=4)
    with pytest.raises(TypeError, match="override: got an unexpected option 'lr'"):
        tw.optim.override(torch.nn.Linear(2, 2), lr=1.0)
    with pytest.raises(ValueError, match="override: state_bits is 5"):
        tw.optim.override(torch.nn.Linear(2, 2), state_bits=5)
    with pytest.raises(TypeError, match="override: target is a int"):
        tw.optim.override(3, state_bits=8)


def test_wrong_parameters():
    for dtype in (torch.float64, torch.complex64):
        [p] = parameters(dtype=dtype, shapes=[(5,)])
        give_gradients([p])
        optimizer = tw.optim.AdamW([p])
        with pytest.raises(TypeError, match="optimizer_step: param has dtype"):
            optimizer.step()
        assert not optimizer.state
    [p] = parameters(dtype=torch.float16, shapes=[(5,)])
    give_gradients([p])
    with pytest.raises(TypeError, match="optimizer_step: param has dtype"):
        tw.optim.AdamW([p], master_weights=True).step()
    [p] = parameters(shapes=[(50, 4)])
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (50, 4), check_invariants=True)
    with pytest.raises(TypeError, match="layout"):
        tw.optim.AdamW([p]).step()
    p = torch.nn.Parameter(torch.randn(1, 40).expand(50, 40))
    p.grad = torch.ones(50, 40)
    with pytest.raises(ValueError, match="overlap"):
        tw.optim.AdamW([p]).step()
    with pytest.raises(ValueError, match="empty parameter list"):
        tw.optim.AdamW([])


@every_optimizer
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_parameters_that_change_under_their_states(make, bits):
    """Another shape or dtype raises and changes nothing."""
    p = torch.nn.Parameter(torch.randn(70, 80))
    optimizer = make([p], state_bits=bits)
    train(optimizer, [p])
    held = {name: t.clone() for name, t in optimizer.state[p].items()}
    for data, error in ((torch.randn(71, 90), ValueError), (torch.randn(70, 80).double(), TypeError)):
        p.grad, p.data = None, data
        give_gradients([p])
        before = p.detach().clone()
        with pytest.raises(error, match="optimizer_step: |Shampoo: "):
            optimizer.step()
        assert torch.equal(p, before)
        assert all(torch.equal(t, held[name]) for name, t in optimizer.state[p].items())


def test_gradients_that_are_not_finite():
    """They reach their own parameters, as in torch, and nothing else."""
    for name, make in MAKERS.items():
        [p], [q] = (lambda a: (a, copies(a)))(parameters(shapes=[(70, 80)]))
        optimizer, other = make([p]), make([q])
        give_gradients([p], [q])
        p.grad[0, 0] = float("nan")
        q.grad[0, 0] = 0
        optimizer.step(), other.step()
        assert p[0, 0].isnan() or name == "Lion", name
        torch.testing.assert_close(p.flatten()[1:], q.flatten()[1:], rtol=1e-6, atol=1e-7)
        p.data[0, 0] = 0
        train(optimizer, [p])
        assert p.isfinite().all(), name


def test_numbers_reach_the_core():
    """Every optimizer fills the fields of Options that its rule uses."""
    fields = set(Options._fields)
    for make in MAKERS.values():
        optimizer = make(parameters())
        assert set(optimizer.numbers(optimizer.param_groups[0])) <= fields
