"""Adagrad."""

import torch

from tilewise.optim import forms
from tilewise.optim.base import LowBitOptimizer


class Adagrad(LowBitOptimizer):
    r"""torch.optim.Adagrad with its sum in 4, 8 or 32 bits, in one fused pass over all parameters.

    With :math:`g` the gradient (negated if ``maximize``) plus :math:`\lambda p` and :math:`t` the step, in float32:

    .. math::
        v = D(v_q) + g^2, \qquad p = p - \frac{\eta}{1 + (t - 1) \gamma} \, \frac{g}{\sqrt{v} + \epsilon},
        \qquad v_q = Q(v)

    :math:`Q` and :math:`D` are :func:`quantize_state` and :func:`dequantize_state`. A sum that only grows forgets what
    is small beside it: in 4 bits an element's sum stands still once its squared gradients are below half a code's step.
    J. Duchi, E. Hazan, Y. Singer, *Adaptive Subgradient Methods*, JMLR 2011.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps: as in torch.optim.Adagrad.
        options: as in :class:`Adam`.

    Raises:
        ValueError, TypeError, NotImplementedError: as in :class:`Adam`.

    Example::

        optimizer = tilewise.optim.Adagrad(model.parameters(), lr=1e-2, state_bits=8)
    """

    rule, second = "adagrad", "sum"

    def __init__(
        self,
        params,
        lr=1e-2,
        lr_decay=0.0,
        weight_decay=0.0,
        initial_accumulator_value=0.0,
        eps=1e-10,
        **options,
    ):
        super().__init__(
            params,
            options,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
        )

    @staticmethod
    def numbers(group):
        return {"lr_decay": group["lr_decay"], "eps": group["eps"]}

    def new_moment(self, form, name, shape, group, device):
        if not group["initial_accumulator_value"]:
            return super().new_moment(form, name, shape, group, device)
        full = torch.full(shape, float(group["initial_accumulator_value"]), device=device)
        return forms.encode(form, name, full, signed=False)
