"""Third-order attention: a query attends to pairs of keys."""

import math

import torch

from tilewise._library import check_tensors, register, register_autograd
from tilewise.attention import options as attention_options
from tilewise.attention.dense import attention_backward_op, attention_op

_ROWS = 4096  # rows of (query, first key) that one call of the kernel takes, about: memory stays O(S D)


def _chunks(q, k1):
    step = max(1, _ROWS // max(1, k1.shape[2]))
    return [slice(i, min(i + step, q.shape[2])) for i in range(0, q.shape[2], step)]


def _rows(q, k1):
    """One row q_i * k1_j for every pair: (B, H, queries * N, D)."""
    return (q[:, :, :, None] * k1[:, :, None]).flatten(2, 3)


def _empty(q, k1, k2, v1, v2, scale):
    return q.new_empty((*q.shape[:3], v1.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _options(rows, scale):
    return attention_options.pack("tensor_attention", rows, None, scale=scale)


def _partials(q, k1, k2, v2, scale):
    """Attention of the rows to k2: the rows, out (B, H, queries, N, Dv) and lse (B, H, queries, N)."""
    rows = _rows(q, k1)
    out, lse = attention_op(rows, k2, v2, *_options(rows, scale))
    return rows, out.unflatten(2, (q.shape[2], -1)), lse.unflatten(2, (q.shape[2], -1))


def _weights(lse, total):
    """How much of a query's weight its first key j has."""
    return (lse - total.masked_fill(total == -math.inf, 0)[..., None]).exp()


def _forward(q, k1, k2, v1, v2, scale):
    out, lse = _empty(q, k1, k2, v1, v2, scale)
    attention_op(q[:, :, :0], k2, v2, *_options(q, scale))  # the core's own checks, of no rows too
    if not k1.shape[2]:
        return out.zero_(), lse.fill_(-math.inf)
    for chunk in _chunks(q, k1):
        _, partial, partial_lse = _partials(q[:, :, chunk], k1, k2, v2, scale)
        lse[:, :, chunk] = partial_lse.logsumexp(-1)
        weights = _weights(partial_lse, lse[:, :, chunk])
        out[:, :, chunk] = torch.einsum("bhij,bhijd,bhjd->bhid", weights, partial.float(), v1.float())
    return out, lse


def _empty_gradients(dout, dlse, q, k1, k2, v1, v2, out, lse, scale):
    return [torch.empty_like(t) for t in (q, k1, k2, v1, v2)]


def _backward(dout, dlse, q, k1, k2, v1, v2, out, lse, scale):
    dq = torch.zeros_like(q)
    dk1, dk2, dv1, dv2 = (torch.zeros_like(t, dtype=torch.float32) for t in (k1, k2, v1, v2))
    # d lse_ij = w_ij (dO_i . (V1_j * O_ij) - delta_i), delta as in any attention
    delta = (dout.float() * out.float()).sum(-1) - (0 if dlse is None else dlse)
    for chunk in _chunks(q, k1) if k1.shape[2] else []:
        rows, partial, partial_lse = _partials(q[:, :, chunk], k1, k2, v2, scale)
        weights = _weights(partial_lse, lse[:, :, chunk])
        weighted = weights[..., None] * dout[:, :, chunk, None].float()
        of_v1 = weighted * partial.float()
        dv1 += of_v1.sum(2)
        dpartial = (weighted * v1[:, :, None].float()).to(q)
        dpartial_lse = (of_v1 * v1[:, :, None].float()).sum(-1) - weights * delta[:, :, chunk, None]
        flat = (t.flatten(2, 3) for t in (dpartial, dpartial_lse, partial, partial_lse))
        dpartial, dpartial_lse, partial, partial_lse = flat
        drows, dk2_part, dv2_part = attention_backward_op(
            dpartial, dpartial_lse, rows, k2, v2, partial, partial_lse, False, *_options(rows, scale)
        )
        drows = drows.unflatten(2, (-1, k1.shape[2])).float()
        dq[:, :, chunk] = (drows * k1[:, :, None].float()).sum(3).to(q)
        dk1 += (drows * q[:, :, chunk, None].float()).sum(2)
        dk2 += dk2_part
        dv2 += dv2_part
    return [dq, *(grad.to(q) for grad in (dk1, dk2, dv1, dv2))]


_tensor_attention_op = register(
    "tensor_attention(Tensor q, Tensor k1, Tensor k2, Tensor v1, Tensor v2, float? scale) -> (Tensor, Tensor)",
    _forward,
    fake=_empty,
)
_tensor_attention_backward_op = register(
    "tensor_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k1, Tensor k2, Tensor v1, Tensor v2, "
    "Tensor out, Tensor lse, float? scale) -> Tensor[]",
    _backward,
    fake=_empty_gradients,
)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse):
    dout = torch.zeros_like(ctx.saved_tensors[5]) if dout is None else dout
    return (*_tensor_attention_backward_op(dout, dlse, *ctx.saved_tensors, ctx.scale), None)


register_autograd("tensor_attention", _differentiate, setup_context=_save)


def tensor_attention(q, k1, k2, v1, v2, *, scale=None, return_lse=False):
    """Attention of each query to all pairs of a first and a second key; differentiable in all five tensors.

        S_ijk = scale * sum_d q_id k1_jd k2_kd          out_i = sum_jk softmax_jk(S_i)_jk (v1_j * v2_k)

    Third-order attention (Sanford et al., arXiv:2306.02896; Alman and Song, arXiv:2310.04064). For a query and a first
    key it is ordinary attention of the row q_i * k1_j over the second keys, and partial results join by their lse:
    O(S N^2 D) time, O((S + N) D) memory.

    Args:
        q: (B, H, S, D) float32, float16 or bfloat16.
        k1, k2: (B, H, N, D) and (B, H, M, D).
        v1, v2: (B, H, N, Dv) and (B, H, M, Dv).
        scale: default ``1 / sqrt(D)``.
        return_lse: also return lse (B, H, S), float32; differentiable.

    Returns:
        out (B, H, S, Dv), or (out, lse). Without any pair, 0 and -inf.

    Raises:
        ValueError: shapes that do not fit together, a scale that is not finite.
        TypeError: another dtype, or dtypes that differ.
        NotImplementedError: head dims over 256.
    """
    operation = "tensor_attention"
    check_tensors(operation, q=q, k1=k1, k2=k2, v1=v1, v2=v2)
    _check(operation, q, k1, k2, v1, v2)
    out, lse = _tensor_attention_op(q, k1, k2, v1, v2, scale)
    return (out, lse) if return_lse else out


def _check(operation, q, k1, k2, v1, v2):
    """What the kernel, which sees rows and second keys only, cannot tell."""
    for name, t in (("q", q), ("k1", k1), ("k2", k2), ("v1", v1), ("v2", v2)):
        if t.ndim != 4:
            raise ValueError(f"{operation}: {name} has shape {tuple(t.shape)}, expected 4 dimensions")
        if t.dtype != q.dtype:
            raise TypeError(f"{operation}: {name} has dtype {t.dtype}, expected {q.dtype} (q's)")
    for name, t, expected in (
        ("k1", k1, (*q.shape[:2], k1.shape[2], q.shape[3])),
        ("k2", k2, (*q.shape[:2], k2.shape[2], q.shape[3])),
        ("v1", v1, (*q.shape[:2], k1.shape[2], v1.shape[3])),
        ("v2", v2, (*q.shape[:2], k2.shape[2], v1.shape[3])),
    ):
        if t.shape != expected:
            raise ValueError(f"{operation}: {name} has shape {tuple(t.shape)}, expected {tuple(expected)}")
