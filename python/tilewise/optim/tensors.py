"""How the optimizers see parameters, gradients and scalars: sharded ones by their local part, scalars on a device."""

import torch

CPU = torch.device("cpu")
_PLAIN = (torch.nn.Parameter, torch.Tensor)


def is_plain(t) -> bool:
    """Whether a tensor is dense and of no class that needs care."""
    return type(t) in _PLAIN and t.layout is torch.strided


def is_sharded(t) -> bool:
    """Whether a tensor is a DTensor."""
    return type(t) not in _PLAIN and hasattr(t, "to_local")


def local(p: torch.Tensor) -> torch.Tensor:
    """The part of a DTensor that this process holds, which may be empty; other tensors themselves."""
    return p.to_local() if is_sharded(p) else p


def local_pair(operation: str, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A parameter and its gradient, or what this process holds of them."""
    grad = p.grad
    if grad.layout is not torch.strided:
        raise TypeError(f"{operation}: a gradient has layout {grad.layout}, expected a dense tensor")
    if type(p) in _PLAIN and type(grad) in _PLAIN:
        return p, grad
    if is_sharded(p) != is_sharded(grad):
        kinds = {True: "a DTensor", False: "a plain tensor"}
        raise TypeError(f"{operation}: a gradient is {kinds[is_sharded(grad)]}, expected {kinds[is_sharded(p)]}")
    if is_sharded(grad) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return local(p), local(grad)


def stream_of(p: torch.Tensor, index: int) -> int:
    """Number of a parameter's random stream: differs between parameters and shards, agrees between replicas."""
    if not is_sharded(p):
        return index
    shard = 0
    for dim, placement in enumerate(p.placements):
        if not placement.is_replicate():
            shard = shard * p.device_mesh.size(dim) + p.device_mesh.get_local_rank(dim)
    return (index + (shard << 16)) % 2**32


def learning_rate(lr, device: torch.device) -> tuple[float, torch.Tensor | None]:
    """(number, tensor): a learning rate that is on a device stays there."""
    if isinstance(lr, torch.Tensor) and lr.device.type != "cpu":
        return 0.0, lr.detach().to(device, torch.float32)
    return float(lr), None


def scalar_on(device: torch.device, value: torch.Tensor | None) -> torch.Tensor | None:
    """A float32 scalar of GradScaler on the device of a call."""
    return None if value is None else value.to(device, torch.float32)
