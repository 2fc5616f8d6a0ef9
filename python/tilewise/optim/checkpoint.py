"""What may be loaded into an optimizer: everything is checked before anything is changed.

Format, version 2 (``param_groups[i]["state_version"]``): per parameter ``step`` float32 scalar and either 32-bit states
(``exp_avg``, ``exp_avg_sq`` float32 of the parameter's shape) or 4-bit states (``exp_avg``, ``exp_avg_sq`` uint8
(B, 64), ``scales`` float32 (B, 2)), in row-major order of the parameter's elements.
In version 1 the codes of ``exp_avg_sq`` stood for (i + 1) / 16; such a dict raises.
"""

import torch

from tilewise.optim.options import OPTIONS, check_group
from tilewise.optim.quantize import CODE_BYTES, block_count

STATE_VERSION = 2


class Held:
    """Carries a state through Optimizer.load_state_dict of torch, which would cast codes to the parameter's dtype."""

    def __init__(self, state: dict):
        self._state = state

    def on(self, device) -> dict:
        """A copy with the tensors on ``device``; the step counter stays in host memory."""
        return {
            name: value.detach().to("cpu" if name == "step" else device, copy=True).contiguous()
            for name, value in self._state.items()
        }


def check_state_dict(optimizer, state_dict) -> None:
    """Raises ValueError or TypeError unless ``state_dict`` fits the optimizer's parameters exactly."""
    what = f"{type(optimizer).__name__}.load_state_dict"
    _expect(what, "state_dict", state_dict, dict)
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"{what}: state_dict has no '{key}', expected a dict of state_dict()")
    _expect(what, "state", state_dict["state"], dict)
    _expect(what, "param_groups", state_dict["param_groups"], (list, tuple))
    params = _check_groups(what, optimizer, state_dict["param_groups"])
    for index, state in state_dict["state"].items():
        if index not in params:
            raise ValueError(f"{what}: state has an entry {index!r}, expected indices of parameters in param_groups")
        _check_state(what, index, state, params[index])


def _expect(what, name, value, types):
    if not isinstance(value, types):
        raise TypeError(f"{what}: {name} is a {type(value).__name__}, expected a dict of state_dict()")


def _check_groups(what, optimizer, saved):
    """Returns {saved index: parameter}."""
    groups = optimizer.param_groups
    if len(saved) != len(groups):
        raise ValueError(f"{what}: state_dict has {len(saved)} param_groups, expected {len(groups)}")
    params = {}
    for i, (new, old) in enumerate(zip(saved, groups, strict=True)):
        _expect(what, f"param_groups[{i}]", new, dict)
        missing = [key for key in ("params", "state_version", *OPTIONS) if key not in new]
        if missing:
            raise ValueError(f"{what}: param_groups[{i}] has no {missing}, expected a dict of this optimizer")
        version = new["state_version"]
        if not isinstance(version, int) or version != STATE_VERSION:
            raise ValueError(f"{what}: param_groups[{i}] has state_version {version!r}, expected {STATE_VERSION}")
        _expect(what, f"param_groups[{i}]['params']", new["params"], (list, tuple))
        if len(new["params"]) != len(old["params"]):
            raise ValueError(
                f"{what}: param_groups[{i}] has {len(new['params'])} parameters, expected {len(old['params'])}"
            )
        check_group(what, new)
        for index, p in zip(new["params"], old["params"], strict=True):
            if not isinstance(index, (int, str)) or index in params:
                raise ValueError(f"{what}: param_groups[{i}] lists parameter {index!r}, expected distinct indices")
            params[index] = p
    return params


def _expected_tensors(p, quantized):
    """{name: (dtype, shape)} of a parameter's state."""
    state = {"step": (torch.float32, ())}
    if not quantized:
        return state | {name: (torch.float32, tuple(p.shape)) for name in ("exp_avg", "exp_avg_sq")}
    blocks = block_count(p.numel())
    state |= dict.fromkeys(("exp_avg", "exp_avg_sq"), (torch.uint8, (blocks, CODE_BYTES)))
    return state | {"scales": (torch.float32, (blocks, 2))}


def _check_state(what, index, state, p):
    _expect(what, f"state[{index!r}]", state, dict)
    expected = _expected_tensors(p, "scales" in state)
    if set(state) != set(expected):
        raise ValueError(f"{what}: state[{index!r}] has {sorted(map(str, state))}, expected {sorted(expected)}")
    for name, (dtype, shape) in expected.items():
        value, where = state[name], f"{what}: state[{index!r}]['{name}']"
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            raise TypeError(f"{where} is a {type(value).__name__}, expected a dense tensor")
        if value.dtype != dtype:
            raise TypeError(f"{where} has dtype {value.dtype}, expected {dtype}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{where} has shape {tuple(value.shape)}, expected {shape}")
        if value.is_meta:
            raise ValueError(f"{where} has no memory (a meta tensor), expected a real one")
    step = float(state["step"])
    if not (0 <= step < 2**24 and step == int(step)):
        raise ValueError(f"{what}: state[{index!r}]['step'] is {step}, expected an integer, 0 <= step < 2^24")
    if "scales" in state and not bool(((state["scales"] >= 0) & state["scales"].isfinite()).all()):
        raise ValueError(f"{what}: state[{index!r}]['scales'] has values that are negative or not finite")
