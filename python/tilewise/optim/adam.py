"""Adam and AdamW."""

from tilewise.optim.base import LowBitOptimizer


class Adam(LowBitOptimizer):
    r"""torch.optim.Adam with states in 4, 8 or 32 bits, in one fused pass over all parameters.

    With :math:`g` the gradient (negated if ``maximize``, plus :math:`\lambda p` unless ``decoupled_weight_decay``) and
    :math:`t` the step, in float32:

    .. math::
        m &= \beta_1 D(m_q) + (1 - \beta_1) g, \qquad v = \beta_2 D(v_q) + (1 - \beta_2) g^2 \\
        p &= p - \frac{\eta}{1 - \beta_1^t} \, \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \\
        m_q &= Q(m), \qquad v_q = Q(v)

    :math:`Q` and :math:`D` are :func:`quantize_state` and :func:`dequantize_state`; the update itself uses the moments
    before they are quantised.
    D. Kingma, J. Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015; T. Dettmers et al., *8-bit Optimizers via
    Block-wise Quantization*, ICLR 2022; B. Li, J. Chen, J. Zhu, *Memory Efficient Optimizers with 4-bit States*,
    NeurIPS 2023; N. Shazeer, M. Stern, *Adafactor*, ICML 2018 (factored second moments).

    Args:
        params: parameters (float32, bfloat16 or float16) or groups of them, or pairs of a name and a parameter.
            Gradients may have another of these dtypes. Parameters that are not contiguous are stepped through a
            contiguous copy; states are in row-major order whatever the strides. DTensors (FSDP2) step on their shards.
        lr: a number, or a tensor of one element; one on the parameters' device is read there, without synchronisation.
        betas, eps, weight_decay: as in torch.optim.Adam.
        amsgrad: only False.
        decoupled_weight_decay: decay as AdamW does.
        options: those of every optimizer of this package (:class:`LowBitOptimizer`): ``state_bits=4``,
            ``block_size=None``, ``second_moment="block"``, ``min_quantized_size=4096``, ``stochastic_rounding=False``,
            ``seed=0``, ``master_weights=False``, ``maximize=False``, ``capturable=False``; and without effect
            ``foreach=None``, ``fused=None``, ``differentiable=False``.

    Step counters are in host memory unless ``capturable``. A NaN or infinite gradient element makes its parameter NaN,
    as in torch.optim; in quantised states the moments of that element restart from zero and its neighbours are
    unaffected. Under torch.amp.GradScaler such steps are skipped.

    Raises:
        ValueError: an option out of range; a state dict that is truncated, foreign, of another version or for other
            shapes (nothing is changed then).
        TypeError: an option, parameter, gradient or state of a wrong type or dtype; sparse gradients.
        NotImplementedError: ``amsgrad``, ``differentiable``, a block size without a kernel, rank-1 states in 8 or 32
            bits.

    Example::

        optimizer = tilewise.optim.Adam(model.parameters(), lr=3e-4, state_bits=8)
        loss.backward()
        optimizer.step()
    """

    rule, first, second = "adam", "exp_avg", "exp_avg_sq"

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        decoupled_weight_decay=False,
        **options,
    ):
        super().__init__(
            params,
            options,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    @staticmethod
    def numbers(group):
        beta1, beta2 = group["betas"]
        decoupled = group["decoupled_weight_decay"]
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "decoupled_weight_decay": decoupled}


class AdamW(Adam):
    r"""torch.optim.AdamW with states in 4, 8 or 32 bits, in one fused pass over all parameters.

    :class:`Adam` (which has the formula, the options and the errors) with :math:`p = p (1 - \eta \lambda)` before the
    update and gradients without decay. I. Loshchilov, F. Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as in torch.optim.AdamW.
        options: as in :class:`Adam`.

    Raises:
        ValueError, TypeError, NotImplementedError: as in :class:`Adam`.

    Example::

        optimizer = tilewise.optim.AdamW(model.parameters(), lr=3e-4)  # 1.06 bytes of states per parameter
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, **options):
        options.setdefault("decoupled_weight_decay", True)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
