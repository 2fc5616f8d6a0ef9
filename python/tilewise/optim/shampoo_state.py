"""Shampoo's options and states: what they may be, and what may be loaded.

Format, version 1 (``param_groups[i]["state_version"]``), per parameter, everything a tensor:
    step, statistics_step, root_step  float32 scalars: steps taken; at which of them statistics and roots were last
        computed, 0 for never
    blocks  int64 (4,): rows and columns of its matrix, and into how many blocks they are cut; zeros if it has none
    the tensors of optim/preconditioners.py
    exp_avg, exp_avg_sq (adamw) or momentum_buffer (sgd): float32 of the parameter's shape; adamw's in 4 bits uint8
        (B, 64), and then ``scales`` float32 (B, 2): the codes of quantize_state
"""

from numbers import Real

import torch

from tilewise.optim.preconditioners import blocks_of, layout, tensors_of
from tilewise.optim.quantize import CODE_BYTES, block_count

STATE_VERSION = 1
HOST_TENSORS = ("step", "statistics_step", "root_step", "blocks")
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
OPTIONS = ("lr", "betas", "eps", "weight_decay", "graft", "momentum", "state_bits", "precondition_interval",
           "root_interval", "shampoo_beta", "matrix_eps", "max_order", "min_quantized_size", "maximize")  # fmt: skip


# ---- options ----
def _number(operation, name, value, below=float("inf")):
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{operation}: {name} is {value!r}, expected a number")
    if not 0 <= value < below:
        limit = "" if below == float("inf") else f" < {below}"
        raise ValueError(f"{operation}: {name} is {value}, expected 0 <= {name}{limit}")


def _integer(operation, name, value, least, most=2**31):
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{operation}: {name} is {value!r}, expected an int")
    if not least <= value <= most:
        raise ValueError(f"{operation}: {name} is {value}, expected at least {least} and at most {most}")


def check_group(operation: str, group: dict) -> None:
    """Raises ValueError, TypeError or NotImplementedError for an option that a step could not use."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{operation}: lr has {lr.numel()} elements, expected a number or a tensor of one element")
        lr = lr.item() if lr.device.type == "cpu" else 0.0  # elsewhere the step itself reads it
    _number(operation, "lr", lr)
    for name in ("eps", "weight_decay", "matrix_eps"):
        _number(operation, name, group[name])
    for name in ("momentum", "shampoo_beta"):
        _number(operation, name, group[name], below=1)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{operation}: betas is {betas!r}, expected two numbers")
    for i, beta in enumerate(betas):
        _number(operation, f"betas[{i}]", beta, below=1)
    for name in ("precondition_interval", "root_interval"):
        _integer(operation, name, group[name], 1)
    _integer(operation, "max_order", group["max_order"], 1, 1 << 15)
    _integer(operation, "min_quantized_size", group["min_quantized_size"], 0)
    _check_choices(operation, group)


def _check_choices(operation, group):
    if not isinstance(group["graft"], str):
        raise TypeError(f"{operation}: graft is {group['graft']!r}, expected a string")
    if group["graft"] not in MOMENTS:
        raise ValueError(f"{operation}: graft is {group['graft']!r}, expected 'adamw' or 'sgd'")
    bits = group["state_bits"]
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"{operation}: state_bits is {bits!r}, expected an int")
    if bits == 8:
        raise NotImplementedError(f"{operation}: state_bits is 8, expected 4 or 32 (no kernel serves 8)")
    if bits not in (4, 32):
        raise ValueError(f"{operation}: state_bits is {bits}, expected 4 or 32")
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"{operation}: maximize is {group['maximize']!r}, expected a bool")


# ---- states ----
def _moments(p, graft, quantized):
    """{name: (dtype, shape)} of the grafted rule's states. A momentum of SGD in 4 bits would slow training down."""
    names = MOMENTS[graft]
    if not quantized or graft == "sgd":
        return dict.fromkeys(names, (torch.float32, tuple(p.shape)))
    blocks = block_count(p.numel())
    codes = dict.fromkeys(names, (torch.uint8, (blocks, CODE_BYTES)))
    return codes | {"scales": (torch.float32, (blocks, len(names)))}


def new_state(p, group) -> dict:
    """The state of a parameter before its first step."""
    blocks = blocks_of(p.shape, group["max_order"])
    where, least = layout(*blocks), max(group["min_quantized_size"], 1)
    quantized = lambda elements: group["state_bits"] == 4 and elements >= least  # noqa: E731
    tensors = _moments(p, group["graft"], quantized(p.numel()))
    if where:
        tensors |= tensors_of(where, lambda order: quantized(order * order))
    state = {name: torch.zeros((), dtype=torch.float32) for name in HOST_TENSORS[:3]}
    state["blocks"] = torch.tensor(blocks)
    for name, (dtype, shape) in tensors.items():
        state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
    return state


def layout_of(state):
    return layout(*state["blocks"].tolist())


def check_fits(operation: str, p, state: dict, graft: str) -> None:
    """Raises unless a state is complete and belongs to a parameter of this shape under this rule."""
    for name in HOST_TENSORS:
        if name not in state:
            raise ValueError(f"{operation} has no '{name}', expected a state of Shampoo")
        dtype, shape = (torch.int64, (4,)) if name == "blocks" else (torch.float32, ())
        _check_tensor(f"{operation}['{name}']", state[name], dtype, shape)
    rows, columns, row_count, column_count = state["blocks"].tolist()
    whole = blocks_of(p.shape, 1)
    cut = min(1, rows) <= row_count <= rows and min(1, columns) <= column_count <= columns
    if (rows, columns) != whole[:2] or not cut:
        raise ValueError(
            f"{operation}['blocks'] is {state['blocks'].tolist()}, expected blocks of a {whole[0]} x {whole[1]} matrix"
        )
    expected = _moments(p, graft, "scales" in state)
    if where := layout_of(state):
        expected |= tensors_of(where, lambda order: f"eigenvalues.{order}" in state)
    if set(state) != {*expected, *HOST_TENSORS}:
        raise ValueError(f"{operation} has {sorted(map(str, state))}, expected {sorted([*expected, *HOST_TENSORS])}")
    for name, (dtype, shape) in expected.items():
        _check_tensor(f"{operation}['{name}']", state[name], dtype, shape)


def _check_tensor(where, value, dtype, shape):
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise TypeError(f"{where} is a {type(value).__name__}, expected a dense tensor")
    if value.dtype != dtype:
        raise TypeError(f"{where} has dtype {value.dtype}, expected {dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{where} has shape {tuple(value.shape)}, expected {shape}")
    if value.is_meta:
        raise ValueError(f"{where} has no memory (a meta tensor), expected a real one")


def _check_values(what, state):
    step = float(state["step"])
    if not (0 <= step < 2**24 and step == int(step)):
        raise ValueError(f"{what}['step'] is {step}, expected an integer, 0 <= step < 2^24")
    for name in HOST_TENSORS[1:3]:
        value = float(state[name])
        if not (0 <= value <= step and value == int(value)):
            raise ValueError(f"{what}['{name}'] is {value}, expected an integer, 0 <= {name} <= step")
    for name, value in state.items():
        kind = name.split(".")[0]
        if not value.is_floating_point() or kind in HOST_TENSORS or kind in {*MOMENTS["adamw"], *MOMENTS["sgd"]}:
            continue
        if not bool(value.isfinite().all()):
            raise ValueError(f"{what}['{name}'] has values that are not finite")
        if (kind.endswith("scales") or kind == "eigenvalues") and not bool((value >= 0).all()):
            raise ValueError(f"{what}['{name}'] has negative values")


# ---- loading ----
class Held:
    """Carries a state through Optimizer.load_state_dict of torch, which would cast codes to the parameter's dtype."""

    def __init__(self, state: dict):
        self._state = state

    def on(self, device) -> dict:
        """A copy with the tensors on ``device``, but counters in host memory."""
        return {
            name: value.detach().to("cpu" if name in HOST_TENSORS else device, copy=True).contiguous()
            for name, value in self._state.items()
        }


def check_state_dict(optimizer, state_dict) -> None:
    """Raises ValueError or TypeError unless ``state_dict`` fits the optimizer's parameters exactly."""
    what = "Shampoo.load_state_dict"
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
        where = f"{what}: state[{index!r}]"
        _expect(what, f"state[{index!r}]", state, dict)
        check_fits(where, params[index][0], state, params[index][1])
        _check_values(where, state)


def _expect(what, name, value, types):
    if not isinstance(value, types):
        raise TypeError(f"{what}: {name} is a {type(value).__name__}, expected a dict of state_dict()")


def _check_groups(what, optimizer, saved):
    """Returns {saved index: (parameter, its graft)}."""
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
            params[index] = p, new["graft"]
    return params
