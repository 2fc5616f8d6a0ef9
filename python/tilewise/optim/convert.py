"""States of other options and of other libraries, as states of an optimizer of this package."""

import torch

from tilewise.optim import forms
from tilewise.optim.checkpoint import STATE_VERSION, check_state, expect_outline, match_params
from tilewise.optim.options import COMMON, LAYOUT_OPTIONS, check_group
from tilewise.optim.tensors import is_sharded, local

WHAT = "convert_state_dict"


def convert_state_dict(state_dict: dict, optimizer) -> dict:
    """A state dict that ``optimizer`` can load, with its bits, blocks and form of second moments.

    Moments that stand in the same form already are copied bit by bit; others become float32 and are quantised anew.
    Hyperparameters (lr, betas, ...) are taken over, options of states (``state_bits``, ``max_order``, ...) are the
    optimizer's. ``state_dict`` is recognised by its keys, and is one of:

        this package's      any options; also version 2
        torch.optim's       AdamW, Adam, SGD, RMSprop, Adagrad
        bitsandbytes'       Adam(W), SGD, Lion, RMSprop, Adagrad in 8 bits block-wise or 32
        torchao's           AdamW8bit, AdamW4bit, AdamWFp8 and their Adam: tensors with ``codes``, ``scale``, ``qmap``

    :class:`Shampoo` takes the states of the rule that is grafted on, its own or another library's; its matrices then
    begin anew. Those of its own states convert as moments do where blocks are the same. In other blocks
    (``max_order``), statistics of a part of a block are that block of the matrix, times the part's share of the
    gradient's squares along the other dimension, which is exact for gradients whose covariance is a Kronecker product;
    between what were different blocks they are zero; and roots are computed anew.

    Args:
        state_dict: of an optimizer over the same parameters in the same groups; unchanged.
        optimizer: of this package; unchanged.

    Raises:
        ValueError: other parameters or groups; states of another optimizer; truncated states.
        TypeError: not a dict of that kind.
        NotImplementedError: a state that no rule here has: ``amsgrad``, ``centered``, bitsandbytes without blocks.

    Example::

        optimizer = tilewise.optim.AdamW(model.parameters(), state_bits=4)
        optimizer.load_state_dict(convert_state_dict(torch.load("bitsandbytes.pt"), optimizer))
    """
    expect_outline(WHAT, state_dict)
    owners = match_params(WHAT, optimizer, state_dict["param_groups"])
    for index in state_dict["state"]:
        if index not in owners:
            raise ValueError(f"{WHAT}: state has an entry {index!r}, expected indices of parameters in param_groups")
    groups = [
        _converted_group(optimizer, old, saved)
        for old, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    new_groups = {index: group for group in groups for index in group["params"]}
    state = {}
    for index, entry in state_dict["state"].items():
        (p, saved), group = owners[index], new_groups[index]
        where = f"{WHAT}: state[{index!r}]"
        if not isinstance(entry, dict):
            raise TypeError(f"{where} is a {type(entry).__name__}, expected a dict of state_dict()")
        found = _reader(saved, entry)(where, optimizer, entry, p, group)
        if found is not None:
            state[index] = encoded_state(optimizer, p, group, *found)
    return {"state": state, "param_groups": groups}


def expect_moments_alone(what, optimizer) -> None:
    """Raises for an optimizer whose states are not moments alone."""
    if not optimizer.moments_alone:
        name = type(optimizer).__name__
        raise NotImplementedError(f"{what}: optimizer is a {name}, expected one that keeps moments alone")


def encoded_state(optimizer, p, group, step, moments, residual=None, others=None) -> dict:
    """A parameter's state as the optimizer would hold it.

    Args:
        moments: {name: float32 tensor of the shape held here | function of a form that gives the state's tensors}.
        others: what the state holds beside; None for what it would before the first step.
    """
    part = local(p)
    state = {"step": torch.tensor(float(step), dtype=torch.float32, device="cpu")}
    signed = optimizer.moments(group)
    for name, form in optimizer.planned_forms(p, group).items():
        values = moments.get(name)
        if values is None:
            state |= optimizer.new_moment(form, name, part.shape, group, part.device)
        elif callable(values):
            state |= values(form)
        else:
            state |= forms.encode(form, name, values.to(part.device), signed[name])
    if group["master_weights"] and p.dtype is torch.bfloat16:
        none = torch.zeros(part.shape, dtype=torch.int16, device=part.device)
        state["residual"] = none if residual is None else residual
    return state | (optimizer.new_others(p, group) if others is None else others)


def _converted_group(optimizer, old, saved):
    own = [name for name in optimizer.options if name not in COMMON and name not in LAYOUT_OPTIONS]
    renamed = _with_own_numbers(optimizer.rule_of(old)[0], saved)
    taken = {name: renamed[name] for name in (*own, "maximize", "initial_lr", "param_names") if name in renamed}
    if isinstance(taken.get("lr"), torch.Tensor) and not isinstance(old["lr"], torch.Tensor):
        taken["lr"] = taken["lr"].item()
    group = {name: value for name, value in old.items() if name != "params"} | taken
    group |= {"state_version": STATE_VERSION, "params": list(saved["params"])}
    check_group(WHAT, group, optimizer.options)
    return group


# ---- readers: a parameter's step, moments by name, residual and other tensors; None where it has no states yet ----


def _reader(saved, entry):
    if "state_version" in saved:
        return _read_own
    return _read_bitsandbytes if "state1" in _flat(entry) else _read_torch


def _read_own(where, optimizer, entry, p, group):
    if "scales" in entry:  # version 2
        scales = entry["scales"]
        if not isinstance(scales, torch.Tensor) or scales.ndim != 2 or scales.shape[1] != 2:
            raise ValueError(f"{where}['scales'] is not a tensor of two columns, expected one")
        first, second = (column.contiguous() for column in scales.unbind(1))
        entry = {name: value for name, value in entry.items() if name != "scales"}
        entry |= {"exp_avg_scale": first, "exp_avg_sq_scale": second}
    others = optimizer.new_others(p, group)
    if entry.keys().isdisjoint(others):  # of an optimizer without them
        entry = entry | others
    check_state(where, optimizer, entry, p, group)
    shape, (_, first, second) = local(p).shape, optimizer.rule_of(group)

    def moment(name, signed):
        held = forms.find(entry, name)

        def tensors(form):
            if form == held:
                return {key: entry[key].clone() for key in form.layout(name, shape)}
            return forms.encode(form, name, forms.decode(held, name, entry, shape, signed), signed)

        return tensors

    names = [name for name in (first, second) if name and forms.find(entry, name) is not None]
    moments = {name: moment(name, name == first) for name in names}
    return entry["step"], moments, entry.get("residual"), optimizer.converted_others(p, group, entry)


def _read_torch(where, optimizer, entry, p, group):
    for name in ("max_exp_avg_sq", "grad_avg"):
        if name in entry:
            raise NotImplementedError(f"{where} has {name!r}, expected a state without it (no rule here keeps one)")
    moments = {}
    for name in optimizer.moments(group):
        if name not in entry and not (entry.keys() <= {"step"} and optimizer.rule_of(group)[0] == "sgd"):
            raise ValueError(f"{where} has {sorted(map(str, entry))}, expected {name!r} among them")
        if entry.get(name) is not None:
            moments[name] = _floats(f"{where}[{name!r}]", entry[name], p)
    if "step" not in entry and not moments:
        return None
    return _step(where, entry.get("step", 1)), moments


def _read_bitsandbytes(where, optimizer, entry, p, group):
    entry, (rule, first, second) = _flat(entry), optimizer.rule_of(group)
    two = rule == "adam"
    names = (first, second) if two else (second or first,)
    if ("state2" in entry) != two:
        raise ValueError(f"{where} has {sorted(map(str, entry))}, expected the states of another optimizer")
    moments = {}
    for i, name in enumerate(names, 1):
        value, book, scales = (entry.get(f"{key}{i}") for key in ("state", "qmap", "absmax"))
        key = f"{where}['state{i}']"
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{key} is a {type(value).__name__}, expected a tensor")
        if value.dtype != torch.uint8:
            moments[name] = _floats(key, value, p)
        elif book is None or scales is None:
            raise NotImplementedError(f"{key} is quantised without blocks, expected 'qmap{i}' and 'absmax{i}'")
        else:
            moments[name] = _looked_up(key, value, book, scales, p, _bitsandbytes_block(key, value, scales))
    return _step(where, entry.get("step")), moments


def _flat(entry):
    """bitsandbytes may keep its quantised tensors one level deeper."""
    flat = {}
    for key, value in entry.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _bitsandbytes_block(where, codes, scales):
    for block in (256, 2048, 4096, 1024, 512, 128, 64):
        if scales.numel() == -(-codes.numel() // block):
            return block
    raise ValueError(f"{where} has {codes.numel()} elements and {scales.numel()} scales, expected one per 256")


def _with_own_numbers(rule, saved):
    """A group with its numbers by name: bitsandbytes keeps those of every optimizer as its betas."""
    names, betas = {"sgd": ("momentum", "dampening"), "rmsprop": ("alpha",)}.get(rule), saved.get("betas")
    if "state_version" in saved or names is None or not isinstance(betas, (tuple, list)) or len(betas) < 2:
        return saved
    return {name: value for name, value in saved.items() if name != "betas"} | dict(zip(names, betas, strict=False))


def _step(where, value):
    try:
        step = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{where}['step'] is a {type(value).__name__}, expected a number") from None
    if not (0 <= step < 2**24 and step == int(step)):
        raise ValueError(f"{where}['step'] is {step}, expected an integer, 0 <= step < 2^24")
    return step


def _floats(where, value, p):
    """A moment as float32, in the shape of what is held of the parameter here."""
    if is_sharded(value):
        value = value.to_local()
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where} is a {type(value).__name__}, expected a tensor")
    if all(hasattr(value, name) for name in ("codes", "scale")):
        return _torchao(where, value, p)
    if not value.is_floating_point() or value.layout is not torch.strided:
        raise TypeError(f"{where} has dtype {value.dtype} and layout {value.layout}, expected dense floating point")
    if tuple(value.shape) != tuple(local(p).shape):
        raise ValueError(f"{where} has shape {tuple(value.shape)}, expected {tuple(local(p).shape)}")
    return value.detach().to(torch.float32, copy=True).contiguous()


def _torchao(where, value, p):
    codes, scale, book = value.codes, value.scale, getattr(value, "qmap", None)
    if book is None:  # float8
        codes, book = codes.float(), None
    elif book.numel() == 16:  # the element of even index is in the high half
        codes = torch.stack([codes >> 4, codes & 15], -1)
    if not scale.numel() or codes.numel() % scale.numel():
        raise ValueError(f"{where} has {codes.numel()} elements and {scale.numel()} scales, expected whole blocks")
    return _looked_up(where, codes, book, scale, p, codes.numel() // scale.numel())


def _looked_up(where, codes, book, scales, p, block):
    shape = local(p).shape
    if codes.numel() != shape.numel():
        raise ValueError(f"{where} has {codes.numel()} elements, expected {shape.numel()}")
    flat = codes.reshape(-1)
    values = flat if book is None else book.to(flat.device, torch.float32)[flat.long()]
    padded = torch.nn.functional.pad(values, (0, scales.numel() * block - values.numel())).view(-1, block)
    return (padded * scales.to(padded.device, torch.float32).view(-1, 1)).flatten()[: shape.numel()].view(shape)
