"""States of sharded parameters in a form that any sharding can load (``tilewise.optim.distributed``).

Optimizers of this package step on the local shards of DTensors (FSDP2), whose blocks of codes belong to that sharding.
In ``optimizer.state_dict()`` the moments of sharded parameters are therefore float32 DTensors with the parameters'
placements, as torch.optim's are, and every tool of torch that knows DTensors saves and reshards them::

    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    torch.distributed.checkpoint.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)

    saved = {"optim": get_optimizer_state_dict(model, optimizer)}  # in another run, with another number of processes
    torch.distributed.checkpoint.load(saved, checkpoint_id=path)
    set_optimizer_state_dict(model, optimizer, saved["optim"])

:func:`portable_state_dict` and :func:`load_portable_state_dict` do the same without a model, leave out the options of
states (``state_bits``, ...), and serve whole parameters too, so that one process may load what many saved.
:func:`local_state_dict` is exact and small, for the same sharding only.

ZeRO-1, each process keeping the states of some parameters, is torch's own wrapper::

    torch.distributed.optim.ZeroRedundancyOptimizer(model.parameters(), tilewise.optim.AdamW, lr=1e-3)
"""

import torch

from tilewise.optim import forms
from tilewise.optim.checkpoint import expect_outline
from tilewise.optim.convert import encoded_state, expect_moments_alone
from tilewise.optim.options import STATE_OPTIONS, check_group
from tilewise.optim.tensors import is_sharded, local

__all__ = ["load_portable_state_dict", "local_state_dict", "portable_state_dict"]


def portable_state_dict(optimizer) -> dict:
    """The optimizer's states in float32, sharded as the parameters are; of parameters without states, zeros.

    Of a sharded parameter every process must call it, but nothing is communicated. With quantised states it takes
    8 bytes per parameter while it lives.

    Returns:
        ``state``: {name: {``step``, moments by the names of torch.optim, ``residual`` as int32}}, names being those the
        optimizer was given, or "group.index"; ``param_groups``: plain hyperparameters.

    Raises:
        NotImplementedError: of :class:`Shampoo`, whose matrices belong to one sharding.
    """
    expect_moments_alone("portable_state_dict", optimizer)
    state, groups = {}, []
    for names, group in _named_groups(optimizer):
        for name, p in zip(names, group["params"], strict=True):
            state[name] = _portable(optimizer, group, p)
        numbers = {key: group[key] for key in _portable_options(optimizer)}
        if isinstance(numbers["lr"], torch.Tensor):
            numbers["lr"] = numbers["lr"].item()
        groups.append(numbers | {"params": names})
    return {"state": state, "param_groups": groups}


def load_portable_state_dict(optimizer, state_dict: dict) -> None:
    """Takes over a dict of :func:`portable_state_dict`, made with any sharding and any options of states.

    Moments are quantised for this optimizer and sharding. Where both are as before, codes are the same and values agree
    to float32's rounding. Moments may be DTensors of this or another placement on the same mesh, or whole tensors that
    every process has; where the parameter is a whole tensor, a DTensor is gathered.

    Args:
        optimizer: of this package, with the parameters of the same names.
        state_dict: unchanged.

    Raises:
        ValueError, TypeError, NotImplementedError: it does not fit this optimizer; nothing is changed.
    """
    what = "load_portable_state_dict"
    expect_moments_alone(what, optimizer)
    expect_outline(what, state_dict)
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"{what}: state_dict has {len(saved_groups)} param_groups, expected {len(optimizer.param_groups)}"
        )
    state, groups, count = {}, [], 0
    for (names, group), saved in zip(_named_groups(optimizer), saved_groups, strict=True):
        taken = {key: saved[key] for key in _portable_options(optimizer) if key in saved}
        new = {key: value for key, value in group.items() if key != "params"} | taken
        check_group(what, new, optimizer.options)
        for i, (name, p) in enumerate(zip(names, group["params"], strict=True), count):
            if name not in state_dict["state"]:
                raise ValueError(f"{what}: state has no entry {name!r}, expected one per parameter")
            state[i] = _held(f"{what}: state[{name!r}]", optimizer, new, p, state_dict["state"][name])
        groups.append(new | {"params": list(range(count, count + len(names)))})
        count += len(names)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def local_state_dict(optimizer) -> dict:
    """The states as this process holds them, codes of its shards included: for :meth:`load_state_dict` of the same
    process of the same sharding, which nobody checks. Save one file per process.
    """
    return torch.optim.Optimizer.state_dict(optimizer)


# ---- state_dict() and load_state_dict() ----


def sharded_state_dict(optimizer, state_dict: dict) -> dict:
    """A local state dict with DTensors in the entries of sharded parameters; ``state_dict`` is changed.

    Raises:
        NotImplementedError: of :class:`Shampoo`, whose matrices belong to one sharding.
    """
    owners = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    for index in list(state_dict["state"]):
        group, p = owners[index]
        if not is_sharded(p):
            continue
        if not optimizer.moments_alone:
            name = type(optimizer).__name__
            raise NotImplementedError(
                f"{name}.state_dict: a parameter is sharded, expected whole ones (matrices belong to one sharding: "
                "save tilewise.optim.distributed.local_state_dict(optimizer), a file per process)"
            )
        state_dict["state"][index] = _portable(optimizer, group, p)
    return state_dict


def local_entry(where, optimizer, state, p, group):
    """A parameter's state as this process holds it, from one that may have DTensors; others are not touched."""
    if not isinstance(state, dict) or not any(is_sharded(value) for value in state.values()):
        return state
    expect_moments_alone(where.split(": ", 1)[0], optimizer)
    return _held(where, optimizer, group, p, state)


# ---- one parameter ----


def _portable_options(optimizer):
    return [name for name in optimizer.options if name not in STATE_OPTIONS]


def _named_groups(optimizer):
    for i, group in enumerate(optimizer.param_groups):
        yield list(group.get("param_names") or (f"{i}.{j}" for j in range(len(group["params"])))), group


def _portable(optimizer, group, p):
    part, state = local(p), optimizer.state.get(p) or {}
    if not state:
        state = optimizer.initial_state(p, group)
    portable = {"step": state["step"].detach().clone()}
    for name, signed in optimizer.moments(group).items():
        form = forms.find(state, name)
        values = forms.decode(form, name, state, part.shape, signed)
        portable[name] = _whole(p, values.clone() if form is forms.FLOAT else values)
    if "residual" in state:
        portable["residual"] = _whole(p, state["residual"].to(torch.int32))
    return portable


def _whole(p, part):
    """The tensor whose local part this is."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=_strides(p))


def _strides(p):
    """Of a contiguous tensor of the parameter's shape."""
    return torch.empty(p.shape, device="meta").stride()


def _held(where, optimizer, group, p, entry):
    """The optimizer's own state of a parameter, from a portable one."""
    if not isinstance(entry, dict):
        raise TypeError(f"{where} is a {type(entry).__name__}, expected a dict of portable_state_dict()")
    kept = optimizer.moments(group)
    missing = [name for name in ("step", *kept) if name not in entry]
    if missing:
        raise ValueError(f"{where} has no {missing}, expected a dict of portable_state_dict()")
    moments = {name: _part(f"{where}[{name!r}]", p, entry[name], torch.float32) for name in kept}
    residual = None
    if "residual" in entry:
        residual = _part(f"{where}['residual']", p, entry["residual"], torch.int32).to(torch.int16)
    return encoded_state(optimizer, p, group, entry["step"], moments, residual)


def _part(where, p, value, dtype):
    """What this process holds of a tensor of the parameter's global shape."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where} is a {type(value).__name__}, expected a tensor")
    if tuple(value.shape) != tuple(p.shape) or value.dtype != dtype:
        raise ValueError(f"{where} is {value.dtype} {tuple(value.shape)}, expected {dtype} {tuple(p.shape)}")
    if not is_sharded(p):
        return value.full_tensor() if is_sharded(value) else value
    if is_sharded(value):
        return value.redistribute(p.device_mesh, p.placements).to_local()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None).to_local()
