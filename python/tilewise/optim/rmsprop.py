"""RMSprop."""

from tilewise.optim.base import LowBitOptimizer


class RMSprop(LowBitOptimizer):
    r"""torch.optim.RMSprop with states in 4, 8 or 32 bits, in one fused pass over all parameters.

    With :math:`g` the gradient (negated if ``maximize``) plus :math:`\lambda p`, in float32:

    .. math::
        v = \alpha D(v_q) + (1 - \alpha) g^2, \qquad u = \frac{g}{\sqrt{v} + \epsilon}, \qquad v_q = Q(v)

    and :math:`p = p - \eta u`, or with momentum :math:`m = \mu D(m_q) + u`, :math:`p = p - \eta m`,
    :math:`m_q = Q(m)`. :math:`Q` and :math:`D` are :func:`quantize_state` and :func:`dequantize_state`.
    T. Tieleman, G. Hinton, *Lecture 6.5: RMSprop*, Coursera 2012.

    Args:
        params, lr, alpha, eps, weight_decay, momentum: as in torch.optim.RMSprop.
        centered: only False.
        options: as in :class:`Adam`.

    Raises:
        ValueError, TypeError, NotImplementedError: as in :class:`Adam`; ``centered``.

    Example::

        optimizer = tilewise.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9, state_bits=8)
    """

    rule, first, second = "rmsprop", "momentum_buffer", "square_avg"

    def __init__(
        self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, **options
    ):
        super().__init__(
            params,
            options,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
        )

    @staticmethod
    def numbers(group):
        return {"beta1": group["momentum"], "beta2": group["alpha"], "eps": group["eps"]}
