"""What may be loaded into an optimizer: everything is checked before anything is changed.

Format, version 3 (``param_groups[i]["state_version"]``): per parameter ``step`` float32 scalar; each moment under the
name that torch.optim gives it, in one of the forms of tilewise.optim.forms; ``residual`` int16 of the parameter's shape
where a bfloat16 parameter has a float32 master. In row-major order of the parameter's elements.
Shampoo's matrices: tilewise.optim.shampoo_state. Of a sharded parameter the moments are float32 and the residual is
int32, DTensors of the parameter's shape (tilewise.optim.distributed).
Versions 1 and 2 kept the scales of both moments of AdamW side by side in ``scales``; such a dict raises here, and
version 2 converts (:func:`tilewise.optim.convert_state_dict`).
"""

import copy

import torch

from tilewise.optim import forms
from tilewise.optim.options import check_group
from tilewise.optim.tensors import local

STATE_VERSION = 3


def adopt_state_dict(optimizer, state_dict, local_entry) -> dict:
    """``state`` and ``param_groups`` of an optimizer that takes over ``state_dict``, as copies on its devices.

    ``local_entry(where, optimizer, state, p, group)`` is what of a state belongs to this process.

    Raises ValueError, TypeError or NotImplementedError unless it fits the optimizer's parameters exactly.
    """
    what = f"{type(optimizer).__name__}.load_state_dict"
    expect_outline(what, state_dict)
    owners = _check_groups(what, optimizer, state_dict["param_groups"])
    states = {}
    for index, state in state_dict["state"].items():
        if index not in owners:
            raise ValueError(f"{what}: state has an entry {index!r}, expected indices of parameters in param_groups")
        where = f"{what}: state[{index!r}]"
        states[index] = local_entry(where, optimizer, state, *owners[index])
        check_state(where, optimizer, states[index], *owners[index])
    return _copies(optimizer, state_dict | {"state": states}, owners)


def expect_outline(what, state_dict) -> None:
    """A dict with ``state`` and ``param_groups`` of the right types, the groups with ``params``."""
    _expect(what, "state_dict", state_dict, dict)
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"{what}: state_dict has no '{key}', expected a dict of state_dict()")
    _expect(what, "state", state_dict["state"], dict)
    _expect(what, "param_groups", state_dict["param_groups"], (list, tuple))
    for i, group in enumerate(state_dict["param_groups"]):
        _expect(what, f"param_groups[{i}]", group, dict)
        if "params" not in group:
            raise ValueError(f"{what}: param_groups[{i}] has no 'params', expected a dict of state_dict()")
        _expect(what, f"param_groups[{i}]['params']", group["params"], (list, tuple))


def match_params(what, optimizer, saved) -> dict:
    """{saved index: (parameter, saved group)}; the groups are known to have ``params``."""
    groups = optimizer.param_groups
    if len(saved) != len(groups):
        raise ValueError(f"{what}: state_dict has {len(saved)} param_groups, expected {len(groups)}")
    owners = {}
    for i, (new, old) in enumerate(zip(saved, groups, strict=True)):
        if len(new["params"]) != len(old["params"]):
            raise ValueError(
                f"{what}: param_groups[{i}] has {len(new['params'])} parameters, expected {len(old['params'])}"
            )
        for index, p in zip(new["params"], old["params"], strict=True):
            if not isinstance(index, (int, str)) or index in owners:
                raise ValueError(f"{what}: param_groups[{i}] lists parameter {index!r}, expected distinct indices")
            owners[index] = p, new
    return owners


def _expect(what, name, value, types):
    if not isinstance(value, types):
        raise TypeError(f"{what}: {name} is a {type(value).__name__}, expected a dict of state_dict()")


def _check_groups(what, optimizer, saved):
    for i, group in enumerate(saved):
        missing = [name for name in ("state_version", *optimizer.options) if name not in group]
        if missing:
            raise ValueError(f"{what}: param_groups[{i}] has no {missing}, expected a dict of this optimizer")
        version = group["state_version"]
        if not isinstance(version, int) or version != STATE_VERSION:
            raise ValueError(f"{what}: param_groups[{i}] has state_version {version!r}, expected {STATE_VERSION}")
        check_group(what, group, optimizer.options)
        names = group.get("param_names", [])
        if not isinstance(names, (list, tuple)) or (names and len(names) != len(group["params"])):
            raise ValueError(f"{what}: param_groups[{i}]['param_names'] is {names!r}, expected a name per parameter")
    return match_params(what, optimizer, saved)


# ---- one parameter's state ----


def check_state(where, optimizer, state, p, group) -> None:
    """Raises unless a parameter's state in this package's format fits it."""
    _expect(*where.split(": ", 1), state, dict)
    expected = check_tensors_fit(where, optimizer, state, p, group)
    step = float(state["step"])
    if not (0 <= step < 2**24 and step == int(step)):
        raise ValueError(f"{where}['step'] is {step}, expected an integer, 0 <= step < 2^24")
    for name in expected:
        if name.endswith(SCALES) and not bool(((state[name] >= 0) & state[name].isfinite()).all()):
            raise ValueError(f"{where}['{name}'] has values that are negative or not finite")
    optimizer.check_values(where, state)


def check_tensors_fit(where, optimizer, state, p, group) -> dict:
    """The same without looking at values; returns {name: (dtype, shape)}."""
    expected = _expected_tensors(where, optimizer, state, p, group)
    if set(state) != set(expected):
        raise ValueError(f"{where} has {sorted(map(str, state))}, expected {sorted(expected)}")
    for name, (dtype, shape) in expected.items():
        check_tensor(f"{where}['{name}']", state[name], dtype, shape)
    return expected


SCALES = ("_scale", "_maxima", "_means")


def _expected_tensors(where, optimizer, state, p, group):
    """{name: (dtype, shape)}, in the forms that the state's names tell."""
    expected = {"step": (torch.float32, ())}
    found = {name: forms.find(state, name) for name in optimizer.rule_of(group)[1:] if name}
    kept, shape = optimizer.moments(group), local(p).shape
    for name, form in found.items():
        if name in kept or form is not None:
            expected |= _layout(where, form or forms.FLOAT, name, shape)
    held = [form for form in found.values() if form not in (None, forms.FACTORED)]
    if len({form.bits for form in held}) > 1:
        raise ValueError(f"{where} has moments in {held[0].bits} and {held[1].bits} bits, expected the same bits")
    if "residual" in state and p.dtype is torch.bfloat16:
        expected["residual"] = (torch.int16, tuple(shape))
    return expected | optimizer.other_tensors(where, p, group, state)


def _layout(where, form, name, shape):
    if form.by_matrix and not all(forms.as_matrix(shape)):
        raise ValueError(f"{where}['{name}{form.scale}'] stands for a matrix, expected none for shape {tuple(shape)}")
    return form.layout(name, shape)


def check_tensor(where, value, dtype, shape):
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise TypeError(f"{where} is a {type(value).__name__}, expected a dense tensor")
    if value.dtype != dtype:
        raise TypeError(f"{where} has dtype {value.dtype}, expected {dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{where} has shape {tuple(value.shape)}, expected {shape}")
    if value.is_meta:
        raise ValueError(f"{where} has no memory (a meta tensor), expected a real one")


# ---- taking over ----


def _copies(optimizer, state_dict, owners):
    state = type(optimizer.state)(dict)
    for index, values in state_dict["state"].items():
        p, group = owners[index]
        device, host = local(p).device, optimizer.host_tensors_of(group)
        state[p] = {
            name: value.detach().to("cpu" if name in host else device, copy=True).contiguous()
            for name, value in values.items()
        }
    groups = []
    for old, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        names = {name: old[name] for name in ("param_names",) if name in old}
        new = copy.deepcopy({key: value for key, value in saved.items() if key != "params"})
        groups.append({"params": old["params"], **names, **new})
    return {"state": state, "param_groups": groups}
