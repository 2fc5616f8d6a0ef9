"""Lion."""

from tilewise.optim.base import LowBitOptimizer


class Lion(LowBitOptimizer):
    r"""Lion with its moment in 4, 8 or 32 bits, in one fused pass over all parameters.

    With :math:`g` the gradient (negated if ``maximize``), in float32:

    .. math::
        p &= p (1 - \eta \lambda) - \eta \, \mathrm{sign}(\beta_1 D(m_q) + (1 - \beta_1) g) \\
        m_q &= Q(\beta_2 D(m_q) + (1 - \beta_2) g)

    :math:`Q` and :math:`D` are :func:`quantize_state` and :func:`dequantize_state`.
    X. Chen et al., *Symbolic Discovery of Optimization Algorithms*, NeurIPS 2023.

    Args:
        params: as in :class:`Adam`.
        lr, betas, weight_decay: of the formula; the weight decay is decoupled.
        options: as in :class:`Adam`, but for ``second_moment``, which Lion has not.

    Raises:
        ValueError, TypeError, NotImplementedError: as in :class:`Adam`.

    Example::

        optimizer = tilewise.optim.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
    """

    rule, first = "lion", "exp_avg"

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **options):
        super().__init__(params, options, lr=lr, betas=betas, weight_decay=weight_decay)

    @staticmethod
    def numbers(group):
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "decoupled_weight_decay": True}
