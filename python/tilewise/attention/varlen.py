"""Attention within each of several sequences that stand packed one after the other, (T, H, D)."""

import torch

from tilewise import _C
from tilewise._library import check_tensors, register, register_autograd, rows_contiguous
from tilewise.attention import options as attention_options
from tilewise.attention.options import SCHEMA, empty_gradients, empty_outputs, of_options


def _blank_outputs(q, v):
    """Rows that belong to no sequence keep 0 and -inf."""
    out, lse = empty_outputs(q, v)
    return out.zero_(), lse.fill_(-torch.inf)


def _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
    out, lse = _blank_outputs(q, v)
    lengths = (max_seqlen_q, max_seqlen_k)
    _C.attention_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, *lengths, options)
    return out, lse


def _backward(
    dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, max_seqlen_q, max_seqlen_k, bias_gradient, *options
):
    grads = empty_gradients(q, k, v, options, bias_gradient)
    for gradient in grads[:3]:
        gradient.zero_()
    dout, delta = rows_contiguous(dout), torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    extra, lengths = of_options(grads, options, bias_gradient), (max_seqlen_q, max_seqlen_k)
    _C.attention_varlen_backward(
        dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, *grads[:3], delta, *extra, *lengths, options
    )
    return grads


_SEQUENCES = "Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_LENGTHS = "SymInt? max_seqlen_q, SymInt? max_seqlen_k"

_varlen_op = register(
    f"attention_varlen(Tensor q, Tensor k, Tensor v, {_SEQUENCES}, {_LENGTHS}, {SCHEMA}) -> (Tensor, Tensor)",
    _forward,
    fake=lambda q, k, v, *_: empty_outputs(q, v),
)
_varlen_backward_op = register(
    f"attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, {_SEQUENCES}, "
    f"Tensor out, Tensor lse, {_LENGTHS}, bool bias_gradient, {SCHEMA}) -> Tensor[]",
    _backward,
    fake=lambda dout, dlse, q, k, v, cu_q, cu_k, out, lse, max_q, max_k, bias_gradient, *options: empty_gradients(
        q, k, v, options, bias_gradient
    ),
)
register_autograd("attention_varlen", *attention_options.differentiation(_varlen_backward_op, tensors=5))


def attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    *,
    max_seqlen_q=None,
    max_seqlen_k=None,
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
    """:func:`attention` within each of B sequences that stand packed one after the other; differentiable likewise.

    No token sees another sequence's (Krell et al., arXiv:2107.02027).

    Args:
        q: (Tq, Hq, D); k: (Tk, Hkv, D); v: (Tk, Hkv, Dv); dtypes as for :func:`attention`. Sequence b has queries
            ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and keys likewise. Rows beyond the last offset belong to no
            sequence: they get out 0, lse -inf and gradients 0.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), from 0, not decreasing.
        max_seqlen_q, max_seqlen_k: the longest lengths, or a bound on them. Left out, they are read from cu_seqlens on
            CPU; on CUDA, where reading would wait for the device, the number of tokens bounds them.
        return_lse: also return lse (Hq, Tq), float32; differentiable.
        causal, scale, window, ...: as in :func:`attention`; queries and keys count within their sequence. A bias, mask
            or block mask has shape (B, Hq, max_seqlen_q, max_seqlen_k), for which both lengths must be given.

    Returns:
        out (Tq, Hq, Dv), or (out, lse).

    Raises:
        ValueError: as :func:`attention`; on CPU also offsets that decrease or overrun the tokens. On CUDA such offsets
            are clamped and the next tilewise call on the device raises.
        TypeError, NotImplementedError: as :func:`attention`.
    """
    check_tensors("attention_varlen", q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    shaped = bias is not None or mask is not None or block_mask is not None
    if shaped and (max_seqlen_q is None or max_seqlen_k is None):
        raise ValueError(
            "attention_varlen: max_seqlen_q or max_seqlen_k is None, expected both beside a bias, mask or block_mask"
        )
    options = attention_options.pack(
        "attention_varlen",
        q,
        max_seqlen_k,
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
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = _varlen_op(q, k, v, *sequences, *options)
    return (out, lse) if return_lse else out
