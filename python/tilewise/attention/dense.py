"""Attention over tensors (B, H, S, D)."""

import torch

from tilewise import _C
from tilewise._library import check_tensors, core, register, register_autograd, rows_contiguous
from tilewise.attention import options as attention_options
from tilewise.attention.options import SCHEMA, empty_gradients, empty_outputs, of_options


def _forward(q, k, v, *options):
    out, lse = empty_outputs(q, v)
    floats = _C.attention_workspace(q, k)
    workspace = q.new_empty(floats, dtype=torch.float32) if floats else None
    _C.attention_forward(q, k, v, out, lse, options, workspace)
    return out, lse


def _backward(dout, dlse, q, k, v, out, lse, bias_gradient, *options):
    grads = empty_gradients(q, k, v, options, bias_gradient)
    dout, delta = rows_contiguous(dout), torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    _C.attention_backward(
        dout, dlse, q, k, v, out, lse, *grads[:3], delta, *of_options(grads, options, bias_gradient), options
    )
    return grads


attention_op = register(
    f"attention(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
    _forward,
    fake=lambda q, k, v, *_: empty_outputs(q, v),
)
attention_backward_op = register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"bool bias_gradient, {SCHEMA}) -> Tensor[]",
    _backward,
    fake=lambda dout, dlse, q, k, v, out, lse, bias_gradient, *options: empty_gradients(
        q, k, v, options, bias_gradient
    ),
)
# Writes into given memory and allocates nothing. The kernel is the binding's own function.
_attention_out_op = register(
    "attention_out(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, "
    "bool causal=False, float? scale=None) -> ()",
    core("attention_out"),
    fake=lambda *_: None,
)
register_autograd("attention", *attention_options.differentiation(attention_backward_op, tensors=3))


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    scale=None,
    window=None,
    global_tokens=0,
    softcap=0.0,
    alibi_slopes=None,
    bias=None,
    mask=None,
    block_mask=None,
    sink_logits=None,
    dropout_p=0.0,
    generator=None,
    return_lse=False,
    deterministic=False,
):
    """``softmax(scale * q k^T) v``, differentiable in q, k, v, bias and sink_logits.

    With x = scale * q k^T and the diagonal of query i at key ``i + Sk - S`` (bottom-right aligned)::

        score[i, j] = softcap * tanh(x / softcap) + bias - slope * |j - diagonal|      -inf where hidden
        lse[i]      = log(exp(sink) + sum_j exp(score[i, j]))
        out[i]      = sum_j keep[i, j] / (1 - dropout_p) * exp(score[i, j] - lse[i]) * v[j]

    All options compose.

    Args:
        q: (B, Hq, S, D), float32, float16 or bfloat16; any strides whose last dimension is contiguous.
        k: (B, Hkv, Sk, D), Hq a multiple of Hkv: query head h reads key head ``h // (Hq // Hkv)``.
        v: (B, Hkv, Sk, Dv).
        causal: a query sees the keys up to its diagonal.
        scale: default ``1 / sqrt(D)``.
        window: (left, right), how many keys before and after its diagonal a query sees; None for no limit.
        global_tokens: the first keys, which every query sees whatever ``window``'s left says (Han et al., LM-Infinite,
            arXiv:2308.16137: a Lambda-shaped mask).
        softcap: bounds the scores by a tanh (Gemma 2, arXiv:2408.00118); 0 for none.
        alibi_slopes: (Hq,) or (B, Hq) float32 (Press et al., arXiv:2108.12409).
        bias: (B, Hq, S, Sk), any of these 1 or left out in front; q's dtype or float32. Gets a gradient, reduced to its
            shape.
        mask: bool, shaped as a bias, True = attend.
        block_mask: a :class:`BlockMask`; time falls with the number of its blocks.
        sink_logits: (Hq,), a learnable score without a value that takes part in the softmax. Gets a gradient.
        dropout_p: in [0, 1), in steps of 1 / 65536.
        generator: of the dropout's random numbers; the gradient drops what the output dropped.
        return_lse: also return lse (B, Hq, S), float32, natural logarithm; differentiable.
        deterministic: the same gradient bits in every run. All kernels are so today; on CPU for any number of threads.

    Returns:
        out (B, Hq, S, Dv), or (out, lse). A query that sees no key gives 0 and lse -inf (its sink logit, if any).

    Raises:
        ValueError: shapes that do not fit together, a last dimension that is not contiguous, a negative window or
            softcap, a scale or softcap that is not finite in float32, a dropout_p outside [0, 1).
        TypeError: another dtype, or dtypes that differ.
        NotImplementedError: head dims over 256.
    """
    check_tensors("attention", q=q, k=k, v=v)
    options = attention_options.pack(
        "attention",
        q,
        k.shape[2] if k.ndim == 4 else 0,
        causal=causal,
        scale=scale,
        window=window,
        global_tokens=global_tokens,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        bias=bias,
        mask=mask,
        block_mask=block_mask,
        sink_logits=sink_logits,
        dropout_p=dropout_p,
        generator=generator,
        deterministic=deterministic,
    )
    out, lse = attention_op(q, k, v, *options)
    return (out, lse) if return_lse else out
