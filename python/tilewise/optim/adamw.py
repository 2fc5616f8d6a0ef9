"""AdamW with 4-bit states."""

import torch
from torch.optim import Optimizer

from tilewise import _C
from tilewise._library import register
from tilewise.optim.checkpoint import STATE_VERSION, Held, check_state_dict
from tilewise.optim.options import check_group
from tilewise.optim.quantize import CODE_BYTES, block_count


def _adamw_step(params, grads, exp_avgs, exp_avg_sqs, scales, steps, lr, beta1, beta2, eps, weight_decay, maximize):
    dense = [_dense(p) for p in params]
    grads = [g.contiguous() for g in grads]
    _C.adamw_step(dense, grads, exp_avgs, exp_avg_sqs, scales, steps, lr, beta1, beta2, eps, weight_decay, maximize)
    for p, d in zip(params, dense, strict=True):
        if d is not p:
            p.copy_(d)
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *scales, *steps])


_adamw_step_op = register(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] scales, Tensor(e!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize) -> ()",
    _adamw_step,
    fake=lambda *args: None,
)


class AdamW(Optimizer):
    r"""AdamW with 4-bit states and one fused pass over all parameters: torch.optim.AdamW, with an eighth of the state.

    With :math:`g` the gradient (negated if ``maximize``) and :math:`t` the step, in float32:

    .. math::
        m &= \beta_1 D(m_q) + (1 - \beta_1) g, \qquad v = \beta_2 D(v_q) + (1 - \beta_2) g^2 \\
        p &= p (1 - \eta \lambda)
             - \frac{\eta}{1 - \beta_1^t} \, \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \\
        m_q &= Q(m), \qquad v_q = Q(v)

    :math:`D` and :math:`Q` are :func:`dequantize_state` and :func:`quantize_state`: 4 bits per element and a scale per
    128, together 1.0625 bytes per parameter instead of 8. First moments take the nearest code of the dynamic-exponent
    book, second moments that of :math:`((i + 1) / 16)^4`, times the block's largest magnitude. The update itself uses
    the moments before they are quantised.
    B. Li, J. Chen, J. Zhu, *Memory Efficient Optimizers with 4-bit States*, NeurIPS 2023; I. Loshchilov, F. Hutter,
    *Decoupled Weight Decay Regularization*, ICLR 2019.

    Args:
        params: parameters or groups of them, float32, bfloat16 or float16; gradients may have another of these dtypes
            than their parameters. Those that are not contiguous are stepped through a contiguous copy; states are in
            row-major order whatever the strides.
        lr: a number, or a tensor of one element (read at every step: on CUDA that waits for the device).
        betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        state_bits: 4, or 32 for states as torch.optim.AdamW keeps them.
        block_size: None or 128.
        min_quantized_size: parameters with fewer elements keep 32-bit states.

    The step counters are in host memory: a step costs no synchronisation, but cannot be replayed from a CUDA graph.

    Every option may differ between parameter groups. ``state_bits`` and ``min_quantized_size`` decide at a parameter's
    first step; later changes do not touch existing states.

    A NaN or infinite gradient element makes its parameter NaN, as in torch.optim.AdamW; in quantised states the moments
    of that element restart from zero and its neighbours are unaffected. Under torch.amp.GradScaler such steps are
    skipped.

    Raises:
        ValueError: an option out of range; a state dict that is truncated, foreign, of another version or for other
            shapes (nothing is changed then).
        TypeError: an option, parameter, gradient or state of a wrong type or dtype; sparse gradients.
        NotImplementedError: ``state_bits=8``, or a ``block_size`` other than 128.

    Example::

        optimizer = tilewise.optim.AdamW(model.parameters(), lr=3e-4)
        loss.backward()
        optimizer.step()
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        *,
        state_bits=4,
        block_size=None,
        min_quantized_size=4096,
        maximize=False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
            "block_size": block_size,
            "min_quantized_size": min_quantized_size,
            "maximize": maximize,
            "state_version": STATE_VERSION,
        }
        check_group("AdamW", defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        """As in torch.optim.Optimizer; a group that raises is not added."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            check_group("AdamW", self.param_groups[-1])
        except Exception:
            del self.param_groups[before:]
            raise

    def load_state_dict(self, state_dict):
        """Takes over a dict of :meth:`state_dict`; the states are copied, to the device of each parameter.

        Raises:
            ValueError, TypeError: it does not fit this optimizer; nothing is changed.
        """
        check_state_dict(self, state_dict)
        held = {index: Held(state) for index, state in state_dict["state"].items()}
        super().load_state_dict({"state": held, "param_groups": state_dict["param_groups"]})

    def __setstate__(self, state):
        super().__setstate__(state)
        for p, value in self.state.items():
            if isinstance(value, Held):
                self.state[p] = value.on(p.device)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all of them before anything changes
            check_group("AdamW", group)
        for group in self.param_groups:
            for params in _by_device(p for p in group["params"] if p.grad is not None):
                self._step_params(group, params)
        return loss

    def _step_params(self, group, params):
        states = [self.state[p] or self._new_state(p, group) for p in params]
        none = torch.empty(0, device=params[0].device)
        _adamw_step_op(
            params,
            [_strided(p.grad) for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s.get("scales", none) for s in states],
            [s["step"] for s in states],
            float(group["lr"]),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["maximize"],
        )

    def _new_state(self, p, group):
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32)
        if group["state_bits"] == 4 and p.numel() >= max(group["min_quantized_size"], 1):
            blocks = block_count(p.numel())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(blocks, CODE_BYTES, dtype=torch.uint8, device=p.device)
            state["scales"] = torch.zeros(blocks, 2, dtype=torch.float32, device=p.device)
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        return state


def _dense(p):
    """The parameter itself, or a contiguous copy."""
    if p.is_contiguous():
        return p
    if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
        raise ValueError(f"adamw_step: param has strides {p.stride()}, expected elements that do not overlap")
    return p.contiguous()


def _by_device(params):
    devices = {}
    for p in params:
        devices.setdefault(p.device, []).append(p)
    return devices.values()


def _strided(grad):
    if grad.layout is not torch.strided:
        raise TypeError(f"AdamW: a gradient has layout {grad.layout}, expected a dense tensor")
    return grad
