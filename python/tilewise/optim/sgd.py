"""Stochastic gradient descent."""

from tilewise.optim.base import LowBitOptimizer


class SGD(LowBitOptimizer):
    r"""torch.optim.SGD with its momentum in 4, 8 or 32 bits, in one fused pass over all parameters.

    With :math:`g` the gradient (negated if ``maximize``) plus :math:`\lambda p`, in float32:

    .. math::
        m = \mu D(m_q) + (1 - \tau) g, \qquad p = p - \eta m, \qquad m_q = Q(m)

    At the first step :math:`m = g`; with ``nesterov`` :math:`g + \mu m` takes the place of :math:`m` in the update;
    without momentum no state but the step counter is kept, and :math:`p = p - \eta g`. :math:`Q` and :math:`D` are
    :func:`quantize_state` and :func:`dequantize_state`.
    I. Sutskever et al., *On the importance of initialization and momentum in deep learning*, ICML 2013.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as in torch.optim.SGD.
        options: as in :class:`Adam`, but for ``second_moment``, which SGD has not.

    Raises:
        ValueError, TypeError, NotImplementedError: as in :class:`Adam`; ``nesterov`` without momentum, or with
            dampening.

    Example::

        optimizer = tilewise.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, state_bits=8)
    """

    rule, first = "sgd", "momentum_buffer"

    def __init__(self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, **options):
        super().__init__(
            params,
            options,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )

    @staticmethod
    def numbers(group):
        return {"beta1": group["momentum"], "dampening": group["dampening"], "nesterov": group["nesterov"]}
