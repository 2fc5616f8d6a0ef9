"""The one operator that all optimizers' steps are: many tensors in one fused pass."""

from itertools import chain
from operator import is_
from typing import NamedTuple

import torch

from tilewise import _C
from tilewise._library import register


class Options(NamedTuple):
    """What a step is told beside its tensors; which of it a rule uses: ``include/tilewise/optim.h``."""

    rule: str  # adam, sgd, lion, rmsprop or adagrad
    lr: float
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    dampening: float = 0.0
    lr_decay: float = 0.0
    decoupled_weight_decay: bool = False
    nesterov: bool = False
    maximize: bool = False
    stochastic_rounding: bool = False
    capturable: bool = False
    seed: int = 0


def _optimizer_step(
    params,
    grads,
    first,
    first_scales,
    second,
    second_scales,
    residuals,
    steps,
    rows,
    streams,
    rule,
    numbers,
    flags,
    seed,
    lr=None,
    found_inf=None,
    grad_scale=None,
):
    dense = [p if p.is_contiguous() else _dense(p) for p in params]
    grads = [g if g.is_contiguous() else g.contiguous() for g in grads]
    states = first, first_scales, second, second_scales, residuals
    workspace = _workspace(params, rows)
    _C.optimizer_step(
        dense, grads, *states, steps, rows, streams, rule, numbers, flags, seed, [lr, found_inf, grad_scale, workspace]
    )
    if not all(map(is_, params, dense)):
        for p, d in zip(params, dense, strict=True):
            if d is not p:
                p.copy_(d)
    torch.autograd.graph.increment_version([*params, *chain.from_iterable(states), *steps])


def _workspace(params, rows):
    if not any(rows):
        return None
    floats = sum(_C.optimizer_workspace(p.numel(), r) for p, r in zip(params, rows, strict=False) if r)
    return torch.empty(floats, dtype=torch.float32, device=params[0].device)


def _dense(p):
    """A contiguous copy."""
    if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
        raise ValueError(f"optimizer_step: param has strides {p.stride()}, expected elements that do not overlap")
    return p.contiguous()


_optimizer_step_op = register(
    "optimizer_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] first_scales, "
    "Tensor(d!)[] second, Tensor(e!)[] second_scales, Tensor(f!)[] residuals, Tensor(g!)[] steps, int[] rows, "
    "int[] streams, str rule, float[] numbers, bool[] flags, int seed, Tensor? lr=None, Tensor? found_inf=None, "
    "Tensor? grad_scale=None) -> ()",
    _optimizer_step,
    fake=lambda *args: None,
)


def optimizer_step(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    steps: list[torch.Tensor],
    options: Options,
    *,
    first: list[torch.Tensor] = (),
    first_scales: list[torch.Tensor] = (),
    second: list[torch.Tensor] = (),
    second_scales: list[torch.Tensor] = (),
    residuals: list[torch.Tensor] = (),
    rows: list[int] = (),
    streams: list[int] = (),
    lr: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
) -> None:
    """One step of an optimizer over many parameters, in place; what the optimizers of this package call.

    Lists have one entry per parameter, in the same order; one may be left out where no parameter has such a tensor, and
    hold empty tensors where only some have. ``include/tilewise/optim.h`` gives the formulas and the forms of a moment.

    Args:
        params, grads: float32, bfloat16 or float16; a gradient has its parameter's shape.
        steps: float32 scalars, steps taken so far; incremented. In host memory unless ``options.capturable``.
        options: rule and numbers.
        first, first_scales, second, second_scales: the moments that the rule keeps.
        residuals: int16, what a bfloat16 parameter lacks of its float32 master; or empty.
        rows: rows of the matrix as which a rank-1 or factored second moment sees the parameter; 0 for blocks.
        streams: numbers that tell apart the parameters' random bits under stochastic rounding.
        lr, found_inf, grad_scale: float32 scalars on the parameters' device.

    Raises:
        ValueError: shapes, strides, overlaps, options out of range.
        TypeError: dtypes.
        NotImplementedError: first and second moments in different bits.
    """
    numbers, flags = [float(x) for x in options[1:8]], list(options[8:13])
    step = _optimizer_step_op if len(params) else _optimizer_step  # the dispatcher wants a tensor to go by
    step(
        params,
        grads,
        list(first),
        list(first_scales),
        list(second),
        list(second_scales),
        list(residuals),
        steps,
        list(rows),
        list(streams),
        options.rule,
        numbers,
        flags,
        options.seed,
        lr,
        found_inf,
        grad_scale,
    )
