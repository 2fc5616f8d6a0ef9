"""Shampoo with 32-bit or 4-bit states."""

import torch
from torch.optim import Optimizer

from tilewise.optim.preconditioners import Product, Slot, Statistic, compute_roots, precondition, update_statistics
from tilewise.optim.quantize import dequantize_state, quantize_state
from tilewise.optim.shampoo_state import (
    MOMENTS,
    STATE_VERSION,
    Held,
    check_fits,
    check_group,
    check_state_dict,
    layout_of,
    new_state,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PIECE_ELEMENTS = 1 << 24  # parameters stepped together, or one parameter: bounds the memory a step needs


class Shampoo(Optimizer):
    r"""Shampoo, whose preconditioners take 4 bits per element; its steps are those of AdamW or SGD with momentum.

    Every parameter of two or more dimensions is a matrix of shape (size of the first, product of the others), cut into
    blocks of at most ``max_order`` rows and columns, as few and as equal as possible. With :math:`G` the gradient of a
    block (negated if ``maximize``), in float32:

    .. math::
        L &= \beta L + (1 - \beta) G G^T, \qquad R = \beta R + (1 - \beta) G^T G
            &&\text{every } T_1 \text{ steps} \\
        \hat L &= (L + \epsilon \lambda_{\max} I)^{-1/4}, \qquad \hat R \text{ likewise}
            &&\text{every } T_2 \text{ steps} \\
        \hat G &= \hat L G \hat R \cdot \|G\| / \|\hat L G \hat R\|

    and :math:`\hat G` takes the place of the gradient in AdamW or SGD; before the first :math:`\hat L` it is :math:`G`,
    and for parameters of fewer dimensions always.

    With ``state_bits=4`` a matrix is kept as its eigenvalues in float32 and its eigenvectors :math:`V` in 4 bits
    (:func:`quantize_matrix`); :func:`orthonormalize` mends them when they are read. New eigenvectors are one step of
    orthogonal iteration, a QR factorisation of :math:`(\beta V \Lambda V^T + (1 - \beta) G G^T) V`; only the first ones
    come from a full decomposition. Inverse roots are kept as their diagonals in float32 and the rest in 4 bits, AdamW's
    moments as in :class:`AdamW`; the momentum of SGD stays in float32.
    V. Gupta, T. Koren, Y. Singer, *Shampoo: Preconditioned Stochastic Tensor Optimization*, ICML 2018;
    S. Wang, P. Zhou, J. Li, H. Huang, *4-bit Shampoo for Memory-Efficient Network Training*, NeurIPS 2024.

    Args:
        params: parameters or groups of them, float32, bfloat16 or float16, with any strides.
        lr: a number, or a tensor of one element (read at every step: on CUDA that waits for the device).
        betas, eps: of the AdamW that is grafted on; ``momentum``: of the SGD.
        weight_decay: decoupled with AdamW; with SGD times the parameter added to :math:`\hat G`.
        graft: "adamw" or "sgd".
        state_bits: 4 or 32.
        precondition_interval, root_interval: :math:`T_1` and :math:`T_2`, in steps of the parameter.
        shampoo_beta, matrix_eps: :math:`\beta` and :math:`\epsilon`.
        max_order: of a matrix, at most 32768.
        min_quantized_size: matrices and moments with fewer elements stay in float32.
        maximize: as in torch.optim.

    Matrices of equal order are worked on together, over all parameters of a group; eigenvectors and QR are
    torch.linalg's, which on CUDA may wait for the device. Step counters are in host memory. Every option may differ
    between parameter groups; ``graft``, ``state_bits``, ``max_order`` and ``min_quantized_size`` decide at a
    parameter's first step. Later changes do not touch existing states, and a change of ``graft`` raises.

    A gradient block whose products are not finite leaves its statistics as they are; the parameters of that block
    become NaN, as in torch.optim.AdamW. Under torch.amp.GradScaler such steps are skipped.

    Raises:
        ValueError: an option out of range; a state that does not fit its parameter; a state dict that is truncated,
            foreign, of another version or for other shapes (nothing is changed then).
        TypeError: an option, parameter, gradient or state of a wrong type or dtype; sparse gradients.
        NotImplementedError: ``state_bits=8``.

    Example::

        optimizer = tilewise.optim.Shampoo(model.parameters(), lr=3e-4, precondition_interval=100, root_interval=500)
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
        graft="adamw",
        momentum=0.9,
        state_bits=4,
        precondition_interval=100,
        root_interval=500,
        shampoo_beta=0.95,
        matrix_eps=1e-6,
        max_order=1200,
        min_quantized_size=4096,
        maximize=False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "graft": graft,
            "momentum": momentum,
            "state_bits": state_bits,
            "precondition_interval": precondition_interval,
            "root_interval": root_interval,
            "shampoo_beta": shampoo_beta,
            "matrix_eps": matrix_eps,
            "max_order": max_order,
            "min_quantized_size": min_quantized_size,
            "maximize": maximize,
            "state_version": STATE_VERSION,
        }
        check_group("Shampoo", defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        """As in torch.optim.Optimizer; a group that raises is not added."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            check_group("Shampoo", self.param_groups[-1])
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
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for group, params in groups:  # all of them before anything changes
            check_group("Shampoo", group)
            for p in params:
                _check_parameter(p, self.state.get(p), group["graft"])
        for group, params in groups:
            for piece in _pieces(params):
                with torch.autocast(piece[0].device.type, enabled=False):
                    self._step_params(group, piece)
        return loss

    def _step_params(self, group, params):
        states = []
        for p in params:
            if not self.state.get(p):
                self.state[p] = new_state(p, group)
            states.append(self.state[p])
            states[-1]["step"] += 1
        grads = [-p.grad.float() if group["maximize"] else p.grad.float() for p in params]
        directions = list(grads)
        statistics, slots, products = [], [], []
        for i, (p, state) in enumerate(zip(params, states, strict=True)):
            where = layout_of(state)
            if where is None:
                continue
            step = int(state["step"])
            if step % group["precondition_interval"] == 0:
                statistics += _statistics(where, state, grads[i])
                state["statistics_step"].fill_(step)
            if step % group["root_interval"] == 0 and state["statistics_step"] > 0:
                slots += [Slot(state, order, i) for order, count in where.orders.items() for i in range(count)]
                state["root_step"].fill_(step)
            if state["root_step"] > 0:
                directions[i] = torch.empty(where.rows, where.columns, device=p.device)
                products += _products(where, state, grads[i], directions[i])
                directions[i] = directions[i].view(p.shape)
        update_statistics(statistics, group["shampoo_beta"])
        compute_roots(slots, group["matrix_eps"])
        precondition(products)
        _apply(params, directions, states, group)


def _statistics(where, state, grad):
    g, first = grad.reshape(where.rows, where.columns), bool(state["statistics_step"] == 0)
    for block in where.blocks:
        x = g[block.rows, block.columns]
        yield Statistic(Slot(state, *block.left), x, first)
        yield Statistic(Slot(state, *block.right), x.mT, first)


def _products(where, state, grad, direction):
    g = grad.reshape(where.rows, where.columns)
    for block in where.blocks:
        at = block.rows, block.columns
        yield Product(Slot(state, *block.left), Slot(state, *block.right), g[at], direction[at])


def _pieces(params):
    """Lists of parameters on one device, of at most _PIECE_ELEMENTS together."""
    piece, size = [], 0
    for p in sorted(params, key=lambda p: str(p.device)):
        if piece and (size + p.numel() > _PIECE_ELEMENTS or p.device != piece[0].device):
            yield piece
            piece, size = [], 0
        piece.append(p)
        size += p.numel()
    if piece:
        yield piece


def _check_parameter(p, state, graft):
    if p.grad.layout is not torch.strided:
        raise TypeError(f"Shampoo: a gradient has layout {p.grad.layout}, expected a dense tensor")
    for name, t in (("param", p), ("a gradient", p.grad)):
        if t.dtype not in _FLOATS:
            raise TypeError(f"Shampoo: {name} has dtype {t.dtype}, expected float32, bfloat16 or float16")
    if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
        raise ValueError(f"Shampoo: param has strides {p.stride()}, expected elements that do not overlap")
    if state:
        check_fits("Shampoo: a state", p, state, graft)
        if state[MOMENTS[graft][0]].device != p.device:
            raise ValueError(f"Shampoo: param is on {p.device}, expected the device of its state")


def _apply(params, directions, states, group) -> None:
    """The grafted rule, one step of AdamW or SGD with momentum along ``directions`` (float32)."""
    names, lr, decay = MOMENTS[group["graft"]], float(group["lr"]), group["weight_decay"]
    moments = [_read(states, params, i, name) for i, name in enumerate(names)]
    wide = [p.float() for p in params]  # float32 parameters themselves
    if group["graft"] == "sgd":
        [velocity] = moments
        torch._foreach_mul_(velocity, group["momentum"])
        torch._foreach_add_(velocity, directions)
        torch._foreach_add_(velocity, wide, alpha=decay)
        torch._foreach_add_(wide, velocity, alpha=-lr)
    else:
        (beta1, beta2), (m, v) = group["betas"], moments
        steps = [int(state["step"]) for state in states]
        torch._foreach_lerp_(m, directions, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, directions, directions, 1 - beta2)
        denominators = torch._foreach_sqrt(v)
        torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(wide, 1 - lr * decay)
        torch._foreach_addcdiv_(wide, m, denominators, [-lr / (1 - beta1**t) for t in steps])
    for p, new in zip(params, wide, strict=True):
        if p is not new:
            p.copy_(new)
    for i, (name, values) in enumerate(zip(names, moments, strict=True)):
        _write(states, i, name, values)


def _read(states, params, i, name):
    """The moments in float32; those that are not quantised themselves."""
    return [
        dequantize_state(s[name], s["scales"][:, i], p.shape, signed=name != "exp_avg_sq") if "scales" in s else s[name]
        for s, p in zip(states, params, strict=True)
    ]


def _write(states, i, name, values):
    for state, value in zip(states, values, strict=True):
        if "scales" in state:
            codes, scales = quantize_state(value, signed=name != "exp_avg_sq")
            state[name].copy_(codes)
            state["scales"][:, i].copy_(scales)
