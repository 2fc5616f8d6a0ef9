"""Scaled dot-product attention, dense and over packed sequences.

    out = softmax(scale * q k^T) v          lse = log(sum(exp(scale * q k^T)))

computed block by block with running softmax statistics, so that no S x Sk matrix is stored (Dao et al.,
FlashAttention, arXiv:2205.14135; FlashAttention-2, arXiv:2307.08691). Gradients recompute the probabilities from lse.
"""

import torch

from tilewise import _C
from tilewise._library import check_tensors, register, register_autograd


def _empty_out(q, v):
    """Memory for out (..., S, Dv), in q's order of dimensions where it has q's shape."""
    return torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1]))


def _empty_statistic(q):
    """Memory for lse: (B, Hq, S), or (Hq, T) of packed tensors."""
    shape = q.shape[:3] if q.ndim == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(shape, dtype=torch.float32)


def _empty_outputs(q, v):
    if q.ndim not in (3, 4) or v.ndim != q.ndim:  # nonsense, which the core then reports
        return torch.empty_like(q), q.new_empty((0,), dtype=torch.float32)
    return _empty_out(q, v), _empty_statistic(q)


def _blank_outputs(q, v):
    """As _empty_outputs, for packed tensors: rows that belong to no sequence keep 0 and -inf."""
    out, lse = _empty_outputs(q, v)
    return out.zero_(), lse.fill_(-torch.inf)


def _empty_gradients(q, k, v):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _rows_contiguous(t):
    """Gradients arrive with any strides (those of sum() have stride 0): the core reads contiguous rows."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _forward(q, k, v, causal, scale, deterministic):
    out, lse = _empty_outputs(q, v)
    _C.attention_forward(q, k, v, out, lse, causal, scale)
    return out, lse


def _backward(dout, q, k, v, out, lse, causal, scale, deterministic):
    grads = _empty_gradients(q, k, v)
    dout, delta = _rows_contiguous(dout), torch.empty_like(lse)
    _C.attention_backward(dout, q, k, v, out, lse, *grads, delta, causal, scale, deterministic)
    return grads


def _varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, deterministic):
    out, lse = _blank_outputs(q, v)
    lengths = (max_seqlen_q, max_seqlen_k)
    _C.attention_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, *lengths, causal, scale)
    return out, lse


def _varlen_backward(
    dout, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, max_seqlen_q, max_seqlen_k, causal, scale, deterministic
):
    grads = [t.zero_() for t in _empty_gradients(q, k, v)]
    dout, delta = _rows_contiguous(dout), torch.empty_like(lse)
    sequences, lengths = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    _C.attention_varlen_backward(
        dout, q, k, v, *sequences, out, lse, *grads, delta, *lengths, causal, scale, deterministic
    )
    return tuple(grads)


_OPTIONS = "bool causal, float? scale, bool deterministic"
_SEQUENCES = "Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_LENGTHS = "SymInt? max_seqlen_q, SymInt? max_seqlen_k"

_attention_op = register(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    fake=lambda q, k, v, *_: _empty_outputs(q, v),
)
_attention_backward_op = register(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=lambda dout, q, k, v, *_: _empty_gradients(q, k, v),
)
# Writes into given memory and allocates nothing. The kernel is the binding's own function.
_attention_out_op = register(
    "attention_out(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, "
    "bool causal=False, float? scale=None) -> ()",
    _C.attention_forward,
    fake=lambda *_: None,
)
_varlen_op = register(
    f"attention_varlen(Tensor q, Tensor k, Tensor v, {_SEQUENCES}, {_LENGTHS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _varlen_forward,
    fake=lambda q, k, v, *_: _empty_outputs(q, v),
)
_varlen_backward_op = register(
    f"attention_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, {_SEQUENCES}, Tensor out, Tensor lse, "
    f"{_LENGTHS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _varlen_backward,
    fake=lambda dout, q, k, v, *_: _empty_gradients(q, k, v),
)


def _save(tensors, options):
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.options = inputs[tensors:]
        ctx.mark_non_differentiable(output[1])

    return setup_context


def _differentiate(ctx, dout, _):
    grads = _attention_backward_op(dout, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None)


def _differentiate_varlen(ctx, dout, _):
    grads = _varlen_backward_op(dout, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 7)


register_autograd("attention", _differentiate, setup_context=_save(tensors=3, options=3))
register_autograd("attention_varlen", _differentiate_varlen, setup_context=_save(tensors=5, options=5))


def attention(q, k, v, *, causal=False, scale=None, return_lse=False, deterministic=False):
    """``softmax(scale * q k^T) v``, differentiable in q, k and v.

    Args:
        q: (B, Hq, S, D), float32, float16 or bfloat16; any strides whose last dimension is contiguous.
        k: (B, Hkv, Sk, D), Hq a multiple of Hkv: query head h reads key head ``h // (Hq // Hkv)``.
        v: (B, Hkv, Sk, Dv).
        causal: query i sees keys up to ``i + Sk - S`` (bottom-right aligned).
        scale: default ``1 / sqrt(D)``.
        return_lse: also return lse (B, Hq, S), float32, natural logarithm; it carries no gradient.
        deterministic: the same gradient bits in every run. All kernels are so today; on CPU for any number of threads.

    Returns:
        out (B, Hq, S, Dv), or (out, lse). A query that sees no key gives 0 and lse -inf.

    Raises:
        ValueError: shapes that do not fit together, or a last dimension that is not contiguous.
        TypeError: another dtype, or dtypes that differ.
        NotImplementedError: head dims over 256; on CUDA, others than D = Dv = 64 or 128.
    """
    check_tensors("attention", q=q, k=k, v=v)
    out, lse = _attention_op(q, k, v, causal, scale, deterministic)
    return (out, lse) if return_lse else out


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
    return_lse=False,
    deterministic=False,
):
    """:func:`attention` within each of B sequences that stand packed one after the other.

    Args:
        q: (Tq, Hq, D); k: (Tk, Hkv, D); v: (Tk, Hkv, Dv). Sequence b has queries ``cu_seqlens_q[b]`` to
            ``cu_seqlens_q[b + 1]`` and keys likewise. Rows beyond the last offset belong to no sequence: they
            get out 0, lse -inf and gradients 0.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), from 0, not decreasing.
        max_seqlen_q, max_seqlen_k: the longest lengths, or a bound on them. Left out, they are read from cu_seqlens on
            CPU; on CUDA, where reading would wait for the device, the number of tokens bounds them.
        causal, scale, deterministic: as in :func:`attention`.
        return_lse: also return lse (Hq, Tq), float32.

    Returns:
        out (Tq, Hq, Dv), or (out, lse).

    Raises:
        ValueError: as :func:`attention`; on CPU also offsets that decrease or overrun the tokens. On CUDA such offsets
            are clamped and the next tilewise call on the device raises.
        TypeError, NotImplementedError: as :func:`attention`.
    """
    check_tensors("attention_varlen", q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = _varlen_op(q, k, v, *sequences, causal, scale, deterministic)
    return (out, lse) if return_lse else out
