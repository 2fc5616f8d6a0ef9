"""Shampoo with 4-bit states."""

import torch

from tilewise.optim import forms, shampoo_state
from tilewise.optim.adam import AdamW
from tilewise.optim.base import LowBitOptimizer
from tilewise.optim.checkpoint import check_tensors_fit
from tilewise.optim.options import check_group
from tilewise.optim.overrides import resolved
from tilewise.optim.preconditioners import Product, Slot, Statistic, compute_roots, precondition, update_statistics
from tilewise.optim.rows import Rows
from tilewise.optim.sgd import SGD
from tilewise.optim.tensors import local

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GRAFTED = {"adamw": AdamW, "sgd": SGD}
_PIECE_ELEMENTS = 1 << 24  # parameters stepped together, or one parameter: bounds the memory a step needs


class Shampoo(LowBitOptimizer):
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
    moments as in :class:`AdamW`; the momentum of SGD takes 8 bits, since 4 would slow training down.
    V. Gupta, T. Koren, Y. Singer, *Shampoo: Preconditioned Stochastic Tensor Optimization*, ICML 2018;
    S. Wang, P. Zhou, J. Li, H. Huang, *4-bit Shampoo for Memory-Efficient Network Training*, NeurIPS 2024.

    Args:
        params: parameters or groups of them, float32, bfloat16 or float16, with any strides.
        lr: a number, or a tensor of one element.
        betas, eps: of the AdamW that is grafted on; ``momentum``: of the SGD.
        weight_decay: decoupled with AdamW; with SGD times the parameter added to :math:`\hat G`.
        graft: "adamw" or "sgd".
        precondition_interval, root_interval: :math:`T_1` and :math:`T_2`, in steps of the parameter.
        shampoo_beta, matrix_eps: :math:`\beta` and :math:`\epsilon`.
        max_order: of a matrix, at most 32768.
        options: as in :class:`Adam`, but for ``block_size``. ``state_bits`` is 4, 32, or 8 for moments in 8 bits beside
            matrices in 4; matrices with fewer than ``min_quantized_size`` elements stay in float32, too.

    Matrices of equal order are worked on together, over all parameters of a group; eigenvectors and QR are
    torch.linalg's, which on CUDA may wait for the device. With ``capturable`` a CUDA graph leaves them out: what is
    replayed preconditions with the roots of the moment, and :meth:`update_preconditioners` does between replays what
    the intervals ask for. Roots in 4 bits are multiplied in bfloat16 on CUDA and on CPUs with AMX tiles. The moments'
    step is one fused pass over the parameters of a group, at most 2^24 elements at a time. Every option may differ
    between parameter groups; ``graft``, ``max_order`` and the options of states decide at a parameter's first step.
    Later changes do not touch existing states, and a change of ``graft`` raises. Of a DTensor the local shard is the
    matrix.

    A gradient block whose products are not finite leaves its statistics as they are; the parameters of that block
    become NaN, as in torch.optim.AdamW. Under torch.amp.GradScaler such steps are skipped.

    Raises:
        ValueError: an option out of range; a state that does not fit its parameter; a state dict that is truncated,
            foreign, of another version or for other shapes (nothing is changed then).
        TypeError: an option, parameter, gradient or state of a wrong type or dtype; sparse gradients.
        NotImplementedError: as in :class:`Adam`.

    Example::

        optimizer = tilewise.optim.Shampoo(model.parameters(), lr=3e-4, precondition_interval=100, root_interval=500)
        loss.backward()
        optimizer.step()
    """

    rule, first, second = AdamW.rule, AdamW.first, AdamW.second  # unless `graft` says otherwise
    lacks, moments_alone = ("block_size",), False
    host_tensors = tuple(shampoo_state.HOST_TENSORS)

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
        precondition_interval=100,
        root_interval=500,
        shampoo_beta=0.95,
        matrix_eps=1e-6,
        max_order=1200,
        **options,
    ):
        super().__init__(
            params,
            options,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            graft=graft,
            momentum=momentum,
            precondition_interval=precondition_interval,
            root_interval=root_interval,
            shampoo_beta=shampoo_beta,
            matrix_eps=matrix_eps,
            max_order=max_order,
        )

    # ---- the grafted rule ----

    @staticmethod
    def numbers(group):
        fixed = {"decoupled_weight_decay": True, "dampening": 0.0, "nesterov": False}
        return GRAFTED[group["graft"]].numbers(group | fixed)

    def rule_of(self, group):
        grafted = GRAFTED[group["graft"]]
        return grafted.rule, grafted.first, grafted.second

    def moments(self, group):
        _, first, second = self.rule_of(group)
        if second is None:
            return {first: True} if group["momentum"] > 0 else {}
        return {first: True, second: False}

    def planned_forms(self, p, group):
        options = resolved(p, group)
        if group["graft"] == "sgd" and options["state_bits"] == 4:  # 4 would slow training down
            options = options | {"state_bits": 8}
        return dict(zip(self.moments(group), forms.planned(local(p).shape, p.numel(), options), strict=False))

    # ---- the matrices' states ----

    def new_others(self, p, group):
        return shampoo_state.new_tensors(local(p), resolved(p, group))

    def converted_others(self, p, group, state):
        return shampoo_state.converted_tensors(local(p), resolved(p, group), state)

    def other_tensors(self, where, p, group, state):
        if not state:
            return shampoo_state.planned(local(p), resolved(p, group))
        return shampoo_state.found(where, local(p), state)

    def check_values(self, where, state):
        shampoo_state.check_values(where, state)

    @property
    def _step_supports_amp_scaling(self):
        """Whether to step is the host's choice: statistics move before the fused pass."""
        return False

    # ---- steps ----

    def _calls(self):
        calls = super()._calls()
        for group, *columns in calls:  # all of them before anything changes
            for p, grad, row in zip(*columns, strict=True):
                self._check_parameter(p, grad, row, group)
        return calls

    def _check_parameter(self, p, grad, row, group):
        for name, t in (("param", p), ("a gradient", grad)):
            if t.dtype not in _FLOATS:
                raise TypeError(f"Shampoo: {name} has dtype {t.dtype}, expected float32, bfloat16 or float16")
        if grad.shape != p.shape:
            raise ValueError(f"Shampoo: a gradient has shape {tuple(grad.shape)}, expected {tuple(p.shape)}")
        if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(f"Shampoo: param has strides {p.stride()}, expected elements that do not overlap")
        check_tensors_fit("Shampoo: a state", self, row.state, row.p, group)
        host = self.host_tensors_of(group)
        if any(t.device != p.device for name, t in row.state.items() if name not in host):
            raise ValueError(f"Shampoo: param is on {p.device}, expected the device of its state")

    @torch.no_grad()
    def update_preconditioners(self):
        """Moves statistics and computes roots where a multiple of their interval passed since they last were.

        To be called between replays of a graph that holds :meth:`step`; the gradients are those that the graph left in
        ``grad``. It reads the step counters, so it waits for the device; every ``precondition_interval`` replays is
        often enough. A :meth:`step` that is not captured does the same by itself, before it preconditions.

        Raises:
            ValueError, TypeError: as :meth:`step`; nothing is changed.

        Example::

            optimizer = tilewise.optim.Shampoo(model.parameters(), capturable=True, precondition_interval=100)
            ...  # steps that are not captured, at least one: they create the states
            with torch.cuda.graph(graph):
                model(x).square().mean().backward()
                optimizer.step()
            for i in range(1, 10001):
                x.copy_(next(batches))
                graph.replay()
                if i % 100 == 0:
                    optimizer.update_preconditioners()
        """
        for group in self.param_groups:
            check_group(type(self).__name__, group, self.options)
        for group, params, grads, rows in self._calls():
            states = [row.state for row in rows]
            for piece in _pieces([p.numel() for p in params]):
                with torch.autocast(params[0].device.type, enabled=False):
                    _update_matrices(group, grads[piece], states[piece], _steps(states[piece]))

    def _step_rows(self, group, params, grads, rows):
        pieces = list(_pieces([p.numel() for p in params]))
        for piece in pieces:
            states = [row.state for row in rows[piece]]
            with torch.autocast(params[0].device.type, enabled=False):
                captured = _is_captured(params[0])
                if not captured:
                    _update_matrices(group, grads[piece], states, [step + 1 for step in _steps(states)])
                directions = _directions(grads[piece], states, captured)
            super()._step_rows(group, params[piece], directions, rows if len(pieces) == 1 else Rows(rows[piece]))


def _pieces(sizes):
    """Slices of at most _PIECE_ELEMENTS together."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > _PIECE_ELEMENTS:
            yield slice(start, i)
            start, total = i, 0
        total += size
    yield slice(start, len(sizes))


def _is_captured(p) -> bool:
    return p.is_cuda and torch.cuda.is_current_stream_capturing()


def _steps(states):
    """The counters as numbers; waits for the device if they are there."""
    return torch.stack([state["step"] for state in states]).int().tolist()


def _update_matrices(group, grads, states, steps):
    """What the intervals ask for at these steps: statistics of the gradients, and inverse roots."""
    statistics, slots = [], []
    for grad, state, step in zip(grads, states, steps, strict=True):
        where = shampoo_state.layout_of(state)
        if where is None:
            continue
        if _is_due(step, state["statistics_step"], group["precondition_interval"]):
            statistics += _statistics(where, state, grad.float().reshape(where.rows, where.columns))
            state["statistics_step"].fill_(step)
        if _is_due(step, state["root_step"], group["root_interval"]) and state["statistics_step"] > 0:
            slots += [Slot(state, order, i) for order, count in where.orders.items() for i in range(count)]
            state["root_step"].fill_(step)
    update_statistics(statistics, group["shampoo_beta"])
    compute_roots(slots, group["matrix_eps"])


def _is_due(step, last, interval):
    """Whether a multiple of the interval passed since the last time."""
    return step // interval > int(last) // interval


def _directions(grads, states, captured):
    """What takes the place of the gradients; in a graph of every one that has matrices, as roots may come later."""
    directions, products = list(grads), []
    for i, (grad, state) in enumerate(zip(grads, states, strict=True)):
        where = shampoo_state.layout_of(state)
        if where is None or not (captured or state["root_step"] > 0):
            continue
        g = grad.float().reshape(where.rows, where.columns)
        direction = torch.empty_like(g, memory_format=torch.contiguous_format)
        products += _products(where, state, g, direction)
        directions[i] = direction.view(grad.shape)
    precondition(products, or_gradient=captured)
    return directions


def _statistics(where, state, g):
    first = bool(state["statistics_step"] == 0)
    for block in where.blocks:
        x = g[block.rows, block.columns]
        yield Statistic(Slot(state, *block.left), x, first)
        yield Statistic(Slot(state, *block.right), x.mT, first)


def _products(where, state, g, direction):
    for block in where.blocks:
        at = block.rows, block.columns
        yield Product(Slot(state, *block.left), Slot(state, *block.right), g[at], direction[at])
