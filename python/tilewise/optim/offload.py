"""An optimizer that keeps its states and a copy of the parameters in host memory."""

import weakref

import torch
from torch.optim import Optimizer

from tilewise.optim.adam import AdamW


class CPUOffload(Optimizer):
    """Steps on the CPU: states and master parameters are in host memory, the device keeps parameters and gradients.

    Gradients are copied to the host while the backward pass goes on, each as soon as it is accumulated; ``step`` runs
    the optimizer over the host's copies and copies the parameters back. Parameters that are in host memory already (and
    need no other dtype) are stepped in place.

    Args:
        params: parameters or groups of them, as for any optimizer.
        optimizer_class: any torch.optim.Optimizer; :class:`AdamW` of this package by default.
        master_dtype: dtype of the host's parameters, torch.float32 say; None for the parameters' own.
        options: of ``optimizer_class``.

    It is a torch.optim.Optimizer whose ``param_groups`` hold the device's parameters: LR schedulers, gradient clipping
    (a gradient that was changed after the backward pass is copied again) and torch.amp.GradScaler work on it.
    ``state_dict()`` is that of ``optimizer_class``, with the host's parameters as ``masters`` where they have another
    dtype than the device's. It cannot be pickled or deep-copied.

    Raises:
        TypeError, ValueError: those of ``optimizer_class``.

    Example::

        optimizer = tilewise.optim.CPUOffload(model.parameters(), tilewise.optim.AdamW, lr=1e-4, state_bits=8)
    """

    def __init__(self, params, optimizer_class=AdamW, *, master_dtype=None, **options):
        self.master_dtype = master_dtype
        self._host = {}  # parameter: its copy in host memory
        self._copied = {}  # parameter: (weak reference to the gradient that was copied, its version)
        self._streams = {}  # device: the stream of its copies
        groups = _groups(params)
        self.optimizer = optimizer_class([self._host_group(group) for group in groups], **options)
        self._complete = False
        super().__init__(groups, self.optimizer.defaults)
        self._complete = True

    def add_param_group(self, param_group):
        """As in torch.optim.Optimizer."""
        if self._complete:
            [param_group] = _groups([param_group])
            self.optimizer.add_param_group(self._host_group(param_group))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [p for p in self._host if p.grad is not None]
        for p, host in self._host.items():
            if p.grad is None:
                host.grad = None
            elif not self._is_copied(p):
                self._copy_gradient(p)
        for stream in self._streams.values():
            stream.synchronize()
        self._share_options()
        self.optimizer.step()
        for p in stepped:
            self._copy_back(p)
        return loss

    def zero_grad(self, set_to_none: bool = True):
        """As in torch.optim.Optimizer; the host's gradients are forgotten."""
        super().zero_grad(set_to_none)
        for p, host in self._host.items():
            if host is not p:
                host.grad = None
        self._copied.clear()

    def state_dict(self):
        """The state dict of the optimizer on the host, and ``masters`` where they differ from the parameters."""
        self._share_options()
        state_dict = self.optimizer.state_dict()
        if self.master_dtype is not None:
            state_dict["masters"] = [host.detach().clone() for host in self._host.values()]
        return state_dict

    def load_state_dict(self, state_dict):
        """Takes over a dict of :meth:`state_dict`, or one of ``optimizer_class``; without ``masters``, the host's
        parameters are those of the device.

        Raises:
            ValueError, TypeError: it does not fit; nothing is changed.
        """
        masters = state_dict.get("masters") if isinstance(state_dict, dict) else None
        hosts = list(self._host.items())
        if masters is not None:
            fits = len(masters) == len(hosts) and all(
                isinstance(m, torch.Tensor) and m.shape == h.shape for m, (_, h) in zip(masters, hosts, strict=True)
            )
            if not fits:
                raise ValueError("CPUOffload.load_state_dict: masters do not fit the parameters, expected one for each")
            state_dict = {name: value for name, value in state_dict.items() if name != "masters"}
        self.optimizer.load_state_dict(state_dict)
        with torch.no_grad():
            for i, (p, host) in enumerate(hosts):
                host.copy_(p if masters is None else masters[i])
        for group, host_group in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            group.update({name: value for name, value in host_group.items() if name != "params"})

    def memory_report(self, named_parameters=None):
        """As :meth:`LowBitOptimizer.memory_report`, of the host's memory."""
        pairs = [(name, self._host[p]) for name, p in named_parameters or ()]
        return self.optimizer.memory_report(pairs or None)

    def __getstate__(self):
        raise TypeError("CPUOffload: cannot be pickled or copied, expected its state_dict() to be saved")

    # ---- the host's side ----

    def _host_group(self, group):
        return group | {"params": [self._with_name(entry) for entry in group["params"]]}

    def _with_name(self, entry):
        return (entry[0], self._host_of(entry[1])) if isinstance(entry, tuple) else self._host_of(entry)

    def _host_of(self, p):
        dtype = self.master_dtype or p.dtype
        if p.device.type == "cpu" and p.dtype == dtype:
            self._host[p] = p
            return p
        copy = torch.empty(p.shape, dtype=dtype, device="cpu", pin_memory=p.is_cuda).copy_(p.detach())
        host = torch.nn.Parameter(copy)
        self._host[p] = host
        if p.requires_grad:
            me = weakref.ref(self)
            p.register_post_accumulate_grad_hook(lambda q: me() and me()._copy_gradient(q))
        if p.is_cuda:
            self._streams.setdefault(p.device, torch.cuda.Stream(p.device))
        return host

    def _share_options(self):
        """LR schedulers write into this optimizer's groups."""
        for group, host_group in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            host_group.update({name: value for name, value in group.items() if name != "params"})

    # ---- copies ----

    def _is_copied(self, p):
        grad, version = self._copied.get(p, (None, None))
        return self._host[p] is p or (grad is not None and grad() is p.grad and version == p.grad._version)

    @torch.no_grad()
    def _copy_gradient(self, p):
        host = self._host[p]
        if p.grad.layout is not torch.strided:
            raise TypeError(f"CPUOffload: a gradient has layout {p.grad.layout}, expected a dense tensor")
        if host.grad is None:
            host.grad = torch.empty(p.shape, dtype=host.dtype, device="cpu", pin_memory=p.is_cuda)
        with self._beside(p):
            host.grad.copy_(p.grad, non_blocking=True)
        self._copied[p] = weakref.ref(p.grad), p.grad._version

    def _copy_back(self, p):
        if self._host[p] is p:
            return
        with self._beside(p):
            p.copy_(self._host[p], non_blocking=True)
        if p.is_cuda:
            torch.cuda.current_stream(p.device).wait_stream(self._streams[p.device])

    def _beside(self, p):
        """The stream of copies, after what the current one has been given."""
        if not p.is_cuda:
            return torch.cuda.stream(None)
        stream = self._streams[p.device]
        stream.wait_stream(torch.cuda.current_stream(p.device))
        p.grad.record_stream(stream)
        return torch.cuda.stream(stream)


def _groups(params):
    """Groups with lists of parameters."""
    params = list(params)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    return [
        group | {"params": [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])}
        for group in groups
    ]
