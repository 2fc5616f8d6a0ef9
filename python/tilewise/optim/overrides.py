"""Options of states that belong to a parameter rather than to the optimizer that steps it."""

import weakref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tilewise.optim.options import check_state_options

# Both hold their keys weakly. Modules are kept as such, and not as their parameters of the moment, because sharding a
# model puts other parameters into the same modules.
_modules = weakref.WeakKeyDictionary()
_parameters = WeakTensorKeyDictionary()


def override(target, **options) -> None:
    """Gives the states of a parameter, or of all parameters of a module, options of their own in every optimizer.

    They take the place of the parameter group's options when an optimizer creates the parameter's states, at its first
    step with a gradient; states that exist stay as they are. Parameters and modules are held weakly. Those of the
    parameter itself win over its module's, and those of the innermost module over the ones around it. Copies of a
    module are not overridden; sharding a module in place (FSDP2) keeps its override.

    Args:
        target: a torch.nn.Module, with all modules inside, or a torch.Tensor.
        options: any of ``state_bits``, ``block_size``, ``second_moment``, ``min_quantized_size``. With ``state_bits``
            alone, a ``block_size`` or ``second_moment`` of the group that these bits have no kernel for counts as the
            default.

    Raises:
        TypeError: neither a module nor a tensor; an unknown option, or one of a wrong type.
        ValueError: an option out of range.

    Example::

        tilewise.optim.override(model.embedding, state_bits=32)
    """
    check_state_options("override", options)
    if isinstance(target, torch.nn.Module):
        _modules[target] = _modules.get(target, {}) | options
    elif isinstance(target, torch.Tensor):
        _parameters[target] = _parameters.get(target, {}) | options
    else:
        raise TypeError(f"override: target is a {type(target).__name__}, expected a torch.nn.Module or a torch.Tensor")


def resolved(p: torch.Tensor, options: dict) -> dict:
    """A group's options of states with those of the parameter in their place."""
    own = _of_modules(p) | _parameters.get(p, {})
    if "state_bits" in own:
        own = {"block_size": None, "second_moment": "block"} | own
    return options | own


def _of_modules(p):
    found, size = {}, float("inf")
    for module, options in list(_modules.items()):
        parameters = list(module.parameters())
        if len(parameters) < size and any(q is p for q in parameters):
            found, size = options, len(parameters)
    return found
