"""Checks of an optimizer's options, group by group. The numbers are checked again in the core, for other callers.

Every option of every optimizer has one entry in ``CHECKS``; an optimizer checks those that it has.
"""

import math
from numbers import Real

import torch

from tilewise.optim.forms import BLOCK

# What every optimizer has beside its own arguments; those of torch.optim that choose between its implementations mean
# nothing here.
COMMON = {
    "maximize": False,
    "capturable": False,
    "foreach": None,
    "fused": None,
    "differentiable": False,
    "state_bits": 4,
    "block_size": None,
    "second_moment": "block",
    "min_quantized_size": 4096,
    "stochastic_rounding": False,
    "seed": 0,
    "master_weights": False,
}
# What decides how states look, rather than what is computed.
STATE_OPTIONS = ("state_bits", "block_size", "second_moment", "min_quantized_size")
LAYOUT_OPTIONS = (*STATE_OPTIONS, "max_order")  # those, and Shampoo's own
SECOND_MOMENTS = ("block", "rank1", "factored")
GRAFTS = ("adamw", "sgd")  # of Shampoo


def complete(operation: str, options: dict, without: tuple = ()) -> dict:
    """The options given by name, and the defaults of the others."""
    known = {name: value for name, value in COMMON.items() if name not in without}
    for name in options:
        if name not in known:
            raise TypeError(f"{operation}: got an unexpected argument {name!r}, expected one of {', '.join(known)}")
    return known | options


def check_group(operation: str, group: dict, names) -> None:
    """Raises ValueError, TypeError or NotImplementedError for an option that a step could not use."""
    for name in names:
        CHECKS[name](operation, name, group[name])
    _check_states(operation, group)
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"{operation}: nesterov is True with momentum {group['momentum']} and dampening {group['dampening']}, "
            "expected momentum > 0 and no dampening"
        )


def check_state_options(operation: str, options: dict) -> None:
    """The same for some of STATE_OPTIONS alone."""
    for name, value in options.items():
        if name not in STATE_OPTIONS:
            raise TypeError(
                f"{operation}: got an unexpected option {name!r}, expected one of {', '.join(STATE_OPTIONS)}"
            )
        CHECKS[name](operation, name, value)


# ---- one option ----


def _number(below=math.inf, least=0.0):
    def check(operation, name, value):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{operation}: {name} is {value!r}, expected a number")
        if not (least <= value < below and math.isfinite(value)):
            lower = "" if least == -math.inf else f"{least:g} <= "
            limit = "" if below == math.inf else f" < {below}"
            raise ValueError(f"{operation}: {name} is {value}, expected {lower or 'a finite '}{name}{limit}")

    return check


def _learning_rate(operation, name, value):
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{operation}: lr has {value.numel()} elements, expected a number or a tensor of one element"
            )
        if value.device.type != "cpu":
            return  # the kernels read it
        value = value.item()
    _number()(operation, name, value)


def _betas(operation, name, value):
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{operation}: {name} is {value!r}, expected two numbers")
    for i, beta in enumerate(value):
        _number(below=1)(operation, f"{name}[{i}]", beta)


def _flag(operation, name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{operation}: {name} is {value!r}, expected a bool")


def _flag_or_none(operation, name, value):
    if value is not None:
        _flag(operation, name, value)


def _unserved_flag(operation, name, value):
    _flag(operation, name, value)
    if value:
        raise NotImplementedError(f"{operation}: {name} is True, expected False (no kernel serves it)")


def _integer(least=-(2**63), at_most=2**63 - 1):
    def check(operation, name, value):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{operation}: {name} is {value!r}, expected an int")
        if not least <= value <= at_most:
            raise ValueError(f"{operation}: {name} is {value}, expected {least} <= {name} <= {at_most}")

    return check


def _state_bits(operation, name, value):
    _integer()(operation, name, value)
    if value not in (4, 8, 32):
        raise ValueError(f"{operation}: {name} is {value}, expected 4, 8 or 32")


def _block_size(operation, name, value):
    if value is not None:
        _integer(least=1)(operation, name, value)


def _one_of(choices):
    def check(operation, name, value):
        if not isinstance(value, str):
            raise TypeError(f"{operation}: {name} is {value!r}, expected a str")
        if value not in choices:
            raise ValueError(f"{operation}: {name} is {value!r}, expected one of {', '.join(choices)}")

    return check


CHECKS = {
    "lr": _learning_rate,
    "betas": _betas,
    "eps": _number(),
    "weight_decay": _number(),
    "amsgrad": _unserved_flag,
    "decoupled_weight_decay": _flag,
    "momentum": _number(),
    "dampening": _number(least=-math.inf),
    "nesterov": _flag,
    "alpha": _number(),
    "centered": _unserved_flag,
    "lr_decay": _number(),
    "initial_accumulator_value": _number(),
    "graft": _one_of(GRAFTS),
    "precondition_interval": _integer(least=1, at_most=2**31),
    "root_interval": _integer(least=1, at_most=2**31),
    "shampoo_beta": _number(below=1),
    "matrix_eps": _number(),
    "max_order": _integer(least=1, at_most=1 << 15),
    "maximize": _flag,
    "capturable": _flag,
    "foreach": _flag_or_none,
    "fused": _flag_or_none,
    "differentiable": _unserved_flag,
    "state_bits": _state_bits,
    "block_size": _block_size,
    "second_moment": _one_of(SECOND_MOMENTS),
    "min_quantized_size": _integer(least=0),
    "stochastic_rounding": _flag,
    "seed": _integer(),
    "master_weights": _flag,
}


def _check_states(operation, group):
    """What several options must agree on."""
    bits, block = group["state_bits"], group.get("block_size")
    if block is not None and (block != BLOCK[bits] if bits in BLOCK else block not in BLOCK.values()):
        served = BLOCK.get(bits, "128 or 256")
        raise NotImplementedError(f"{operation}: block_size is {block}, expected {served} (no kernel serves another)")
    if group.get("second_moment") == "rank1" and bits != 4:
        raise NotImplementedError(f"{operation}: second_moment is 'rank1' with state_bits {bits}, expected 4")
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError(f"{operation}: stochastic_rounding is True with master_weights, expected False")
