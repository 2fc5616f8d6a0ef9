"""What the tests of the optimizers share: every optimizer with the options that change its formula, and parameters."""

import io
from functools import partial
from typing import NamedTuple

import pytest
import torch

import tilewise as tw
from tilewise.optim import forms
from tilewise.optim.step import Options
from tilewise.reference import optim as reference

SHAPES = [(64, 80), (130, 33), (5,), (), (0, 3)]


class Case(NamedTuple):
    ours: type
    theirs: object  # of torch.optim, or a stand-in
    options: dict


class ReferenceLion(torch.optim.Optimizer):
    """Lion of the reference, which torch.optim has not."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rule = Options("lion", group["lr"], *group["betas"], weight_decay=group["weight_decay"])
            rule = rule._replace(decoupled_weight_decay=True, maximize=group["maximize"])
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("exp_avg", torch.zeros_like(p))
                new, state["exp_avg"], _ = reference.step(rule, p, p.grad, m, None, 1)
                p.copy_(new)


_optim, _torch = tw.optim, torch.optim
CASES = {
    "AdamW": Case(_optim.AdamW, _torch.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.99)}),
    "AdamW-maximize": Case(_optim.AdamW, _torch.AdamW, {"lr": 1e-2, "eps": 1e-3, "maximize": True}),
    "Adam": Case(_optim.Adam, _torch.Adam, {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}),
    "SGD": Case(_optim.SGD, _torch.SGD, {"lr": 1e-2, "weight_decay": 0.1}),
    "SGD-momentum": Case(_optim.SGD, _torch.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "SGD-nesterov": Case(_optim.SGD, _torch.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Lion": Case(_optim.Lion, ReferenceLion, {"lr": 1e-3, "weight_decay": 0.1}),
    "RMSprop": Case(_optim.RMSprop, _torch.RMSprop, {"lr": 1e-3, "alpha": 0.9, "weight_decay": 0.1}),
    "RMSprop-momentum": Case(_optim.RMSprop, _torch.RMSprop, {"lr": 1e-3, "momentum": 0.5, "maximize": True}),
    "Adagrad": Case(_optim.Adagrad, _torch.Adagrad, {"lr": 1e-2, "lr_decay": 0.1, "weight_decay": 0.1}),
    "Adagrad-initial": Case(_optim.Adagrad, _torch.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.2}),
}
# One of each class, all with states of their own.
MAKERS = {
    "AdamW": partial(tw.optim.AdamW, lr=1e-2),
    "Adam": partial(tw.optim.Adam, lr=1e-2, weight_decay=0.1),
    "SGD": partial(tw.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "Lion": partial(tw.optim.Lion, lr=1e-3, weight_decay=0.1),
    "RMSprop": partial(tw.optim.RMSprop, lr=1e-3, momentum=0.5),
    "Adagrad": partial(tw.optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1),
    "Shampoo": partial(tw.optim.Shampoo, lr=1e-2, precondition_interval=1, root_interval=2),
}
# Those whose states are moments alone: an element depends on its own gradients, however parameters are sharded.
ELEMENTWISE = {name: make for name, make in MAKERS.items() if make.func.moments_alone}


def parameters(device=None, dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]


def copies(params, device=None):
    return [torch.nn.Parameter(p.detach().clone().to(device or p.device)) for p in params]


def give_gradients(*lists, scale=1.0):
    """The same random gradients to the parameters of every list."""
    for same in zip(*lists, strict=True):
        grad = torch.randn_like(same[0]) * scale
        for p in same:
            p.grad = grad.to(p).clone()


def train(optimizer, params, steps=1):
    for _ in range(steps):
        give_gradients(params)
        optimizer.step()


def moments(optimizer, p, group=None):
    """{name: float32 values} of a parameter's moments."""
    group, state = group or optimizer.param_groups[0], optimizer.state[p]
    return {
        name: forms.decode(forms.find(state, name), name, state, p.shape, signed)
        for name, signed in optimizer.moments(group).items()
    }


def assert_equal(a, b):
    assert all(torch.equal(p, q.to(p.device)) for p, q in zip(a, b, strict=True))


def snapshot(optimizer):
    return through_file(optimizer.state_dict())


def through_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_state(a, b):
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        assert all(torch.equal(t, b["state"][index][name]) for name, t in state.items())


def rejected(optimizer, state_dict, error, match):
    before = snapshot(optimizer)
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(state_dict)
    assert_same_state(snapshot(optimizer), before)
