"""The single torch.library.Library, and the few ways in which every family registers its operators with it."""

from collections.abc import Callable

import torch

from tilewise import _C

_library = torch.library.Library("tilewise", "DEF")


def register(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Defines ``tilewise::<schema>`` for CPU and CUDA tensors and returns the operator.

    ``kernel`` allocates with ``torch.empty`` and calls ``tilewise._C``; ``fake`` does the same without data. An
    out-variant operator whose kernel is :func:`core` of its name runs no Python code at all: torch's dispatcher calls
    the core's function.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        if kernel is not getattr(_C, name, None) or not _C.register_operator(name, key, torch.Tensor):
            _library.impl(name, kernel, key)
    torch.library.register_fake(f"tilewise::{name}", fake, lib=_library)
    return getattr(torch.ops.tilewise, name).default


def core(name: str) -> Callable:
    """The function of ``tilewise._C``; in a build without its family, one that raises."""

    def missing(*args):
        raise NotImplementedError(f"{name}: not in this build, expected its family among TILEWISE_FAMILIES")

    return getattr(_C, name, missing)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Makes ``tilewise::<name>`` differentiable."""
    torch.library.register_autograd(f"tilewise::{name}", backward, setup_context=setup_context, lib=_library)


def check_tensors(operation: str, **tensors) -> None:
    """Raises TypeError for arguments that are not tensors; None passes. Everything else is checked in the core."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{operation}: {name} is a {type(value).__name__}, expected a torch.Tensor")


def rows_contiguous(t):
    """Gradients arrive with any strides (those of sum() have stride 0): the core reads contiguous rows."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
