"""Joining partial results over disjoint sets of keys."""

import torch

from tilewise import _C
from tilewise._library import check_tensors, register, register_autograd, rows_contiguous
from tilewise.attention.dense import attention

_MOST = 16  # parts that the core joins at a time


def _empty_merged(outs, lses):
    return torch.empty_like(outs[0]), torch.empty_like(lses[0])


def _merge(outs, lses):
    out, lse = _empty_merged(outs, lses)
    _C.merge_attention(outs, lses, out, lse)
    return out, lse


def _empty_parts(dout, dlse, outs, lses, out, lse):
    return [torch.empty_like(t) for t in (*outs, *lses)]


def _merge_backward(dout, dlse, outs, lses, out, lse):
    grads = _empty_parts(dout, dlse, outs, lses, out, lse)
    dout = rows_contiguous(dout)
    _C.merge_attention_backward(dout, dlse.contiguous(), outs, lses, out, lse, grads[: len(outs)], grads[len(outs) :])
    return grads


_merge_op = register(
    "merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)",
    _merge,
    fake=_empty_merged,
)
_merge_backward_op = register(
    "merge_attention_backward(Tensor dout, Tensor dlse, Tensor[] outs, Tensor[] lses, Tensor out, Tensor lse) "
    "-> Tensor[]",
    _merge_backward,
    fake=_empty_parts,
)


def _save(ctx, inputs, output):
    outs, lses = inputs
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)


def _differentiate(ctx, dout, dlse):
    *parts, out, lse = ctx.saved_tensors
    outs, lses = parts[: ctx.parts], parts[ctx.parts :]
    grads = _merge_backward_op(dout, dlse, outs, lses, out, lse)
    return grads[: ctx.parts], grads[ctx.parts :]


register_autograd("merge_attention", _differentiate, setup_context=_save)


def merge_attention(outs, lses):
    """Joins attention to disjoint sets of keys into attention to all of them, differentiable in outs and lses.

        lse = log(sum_i exp(lses[i]))          out = sum_i exp(lses[i] - lse) * outs[i]

    The step that split keys, shared prefixes (RelayAttention, arXiv:2402.14808) and rings of processes (TokenRing,
    arXiv:2412.20501) have in common. Parts are joined in order, 16 at a time.

    Args:
        outs: a sequence of (B, H, S, Dv), or (T, H, Dv) of packed sequences; float32, float16 or bfloat16.
        lses: as many (B, H, S), or (H, T); float32, natural logarithm. -inf marks a row that saw nothing.

    Returns:
        (out, lse) of one part's shapes. A row that no part saw gives 0 and -inf.

    Raises:
        ValueError: no parts, another number of lses, shapes that differ.
        TypeError: another dtype, or dtypes that differ.
    """
    outs, lses = list(outs), list(lses)
    for name, tensors in (("outs", outs), ("lses", lses)):
        check_tensors("merge_attention", **{f"{name}[{i}]": t for i, t in enumerate(tensors)})
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge_attention: got {len(outs)} outs and {len(lses)} lses, expected as many, at least one")
    lses = [lse.contiguous() for lse in lses]
    while True:
        out, lse = _merge_op(outs[:_MOST], lses[:_MOST])
        outs, lses = [out, *outs[_MOST:]], [lse, *lses[_MOST:]]
        if len(outs) == 1:
            return out, lse


def shared_prefix_attention(q, prefix_k, prefix_v, k, v, *, causal=True, scale=None, return_lse=False):
    """Attention of every sequence of a batch to one prefix that they share, and to its own keys.

    The prefix is read once for the whole batch: its queries stand side by side as one long sequence (RelayAttention,
    Zhu et al., arXiv:2402.14808). Equal to attention over ``cat([prefix, own])``, and differentiable likewise.

    Args:
        q: (B, Hq, S, D).
        prefix_k, prefix_v: (1, Hkv, P, D) and (1, Hkv, P, Dv), seen by every query.
        k, v: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv), each sequence's own.
        causal: among a sequence's own keys, bottom-right aligned.
        scale: default ``1 / sqrt(D)``.
        return_lse: also return lse (B, Hq, S).

    Returns:
        out (B, Hq, S, Dv), or (out, lse).

    Raises:
        ValueError: a prefix of more than one sequence; otherwise as :func:`tilewise.attention`.
    """
    check_tensors("shared_prefix_attention", q=q, prefix_k=prefix_k, prefix_v=prefix_v, k=k, v=v)
    if prefix_k.ndim != 4 or prefix_k.shape[0] != 1:
        raise ValueError(
            f"shared_prefix_attention: prefix_k has shape {tuple(prefix_k.shape)}, expected (1, Hkv, P, D)"
        )
    own = attention(q, k, v, causal=causal, scale=scale, return_lse=True)
    batch, heads, rows = q.shape[:3]
    side_by_side = q.transpose(0, 1).reshape(1, heads, batch * rows, q.shape[3])
    out, lse = attention(side_by_side, prefix_k, prefix_v, scale=scale, return_lse=True)
    out = out.view(heads, batch, rows, -1).transpose(0, 1)
    lse = lse.view(heads, batch, rows).transpose(0, 1)
    out, lse = merge_attention([out, own[0]], [lse, own[1]])
    return (out, lse) if return_lse else out
