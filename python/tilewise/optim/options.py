"""Checks of an optimizer's options, group by group. The numbers are checked again in the core, for other callers."""

import math
from numbers import Real

import torch

OPTIONS = ("lr", "betas", "eps", "weight_decay", "state_bits", "block_size", "min_quantized_size", "maximize")


def check_group(operation: str, group: dict) -> None:
    """Raises ValueError, TypeError or NotImplementedError for an option that a step could not use."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{operation}: lr has {lr.numel()} elements, expected a number or a tensor of one element")
        if lr.device.type == "cpu":  # elsewhere the step itself reads it, once
            _check_number(operation, "lr", lr.item())
    else:
        _check_number(operation, "lr", lr)
    _check_number(operation, "eps", group["eps"])
    _check_number(operation, "weight_decay", group["weight_decay"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{operation}: betas is {betas!r}, expected two numbers")
    for i, beta in enumerate(betas):
        _check_number(operation, f"betas[{i}]", beta, below=1)
    _check_state_options(operation, group)


def _check_state_options(operation, group):
    bits, block, least = group["state_bits"], group["block_size"], group["min_quantized_size"]
    for name, value in (("state_bits", bits), ("block_size", block), ("min_quantized_size", least)):
        if value is None and name == "block_size":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{operation}: {name} is {value!r}, expected an int")
    if bits == 8:
        raise NotImplementedError(f"{operation}: state_bits is 8, expected 4 or 32 (no kernel serves 8 yet)")
    if bits not in (4, 32):
        raise ValueError(f"{operation}: state_bits is {bits}, expected 4 or 32")
    if block is not None and block < 1:
        raise ValueError(f"{operation}: block_size is {block}, expected 128")
    if block not in (None, 128):
        raise NotImplementedError(f"{operation}: block_size is {block}, expected 128 (no kernel serves another)")
    if least < 0:
        raise ValueError(f"{operation}: min_quantized_size is {least}, expected at least 0")
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"{operation}: maximize is {group['maximize']!r}, expected a bool")


def _check_number(operation, name, value, below=math.inf):
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{operation}: {name} is {value!r}, expected a number")
    if not 0 <= value < below:
        limit = "" if below == math.inf else f" < {below}"
        raise ValueError(f"{operation}: {name} is {value}, expected 0 <= {name}{limit}")
