"""Rotary position embedding (Su et al., RoFormer, arXiv:2104.09864), and moving keys that are already rotated."""

import math

import torch

from tilewise import _C
from tilewise._library import check_tensors, register, register_autograd, rows_contiguous

__all__ = ["apply", "reposition", "table"]


def _rotate(x, cos, sin, interleaved, inverse):
    out = torch.empty_like(x)
    _C.rope_apply(x, cos, sin, out, interleaved, inverse)
    return out


_rope_op = register(
    "rope_apply(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor",
    _rotate,
    fake=lambda x, cos, sin, interleaved, inverse: torch.empty_like(x),
)


def _save(ctx, inputs, output):
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, dout):
    dout = rows_contiguous(dout)
    return _rope_op(dout, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None


register_autograd("rope_apply", _differentiate, setup_context=_save)


def table(positions, dim, *, theta=10000.0):
    """(cos, sin) float32 (..., dim / 2) of the angles ``position * theta^(-2 i / dim)``, evaluated in float64.

    Args:
        positions: integers or numbers, (S,) or (B, S).
        dim: channels that turn; even.
        theta: base of the wavelengths, above 0.

    Raises:
        ValueError: an odd or negative dim, or another theta.
    """
    if not 0 < theta < math.inf:
        raise ValueError(f"rope.table: theta is {theta}, expected a finite number above 0")
    if dim < 0 or dim % 2:
        raise ValueError(f"rope.table: dim is {dim}, expected an even number from 0")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / max(dim, 1)
    angles = positions.double()[..., None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def apply(x, positions, *, theta=10000.0, dim=None, interleaved=False):
    """Turns each row of x by the angles of its position; differentiable in x.

        (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)        arithmetic in float32

    Args:
        x: (B, H, S, D) float32, float16 or bfloat16.
        positions: (S,) or (B, S); or a pair (cos, sin) float32, (S, P) or (B, S, P), that :func:`table` gives.
        theta: base of the wavelengths.
        dim: how many of the first channels turn; default all.
        interleaved: pairs are channels (2 i, 2 i + 1) instead of (i, i + dim / 2).

    Returns:
        (B, H, S, D) in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an odd dim, a theta that is not above 0.
        TypeError: another dtype.
    """
    check_tensors("rope.apply", x=x)
    if isinstance(positions, torch.Tensor):
        positions = table(positions, x.shape[-1] if dim is None else dim, theta=theta)
    cos, sin = (t[None] if t.ndim == 2 else t for t in positions)
    return _rope_op(x, cos, sin, interleaved, False)


def reposition(k, old, new, *, theta=10000.0, dim=None, interleaved=False):
    """Keys rotated for positions ``old``, as if they had been rotated for ``new``: they turn by the difference.

    Block-Attention (Ma et al., arXiv:2409.15355) caches the keys of text blocks and moves them to where the blocks
    stand in a prompt.

    Args:
        k: (B, H, S, D) float32, float16 or bfloat16.
        old, new: (S,) or (B, S), or numbers.
        theta, dim, interleaved: as in :func:`apply`.

    Returns:
        (B, H, S, D) in k's dtype.

    Raises:
        ValueError, TypeError: as :func:`apply`.
    """
    check_tensors("rope.reposition", k=k)
    shift = torch.as_tensor(new, device=k.device) - torch.as_tensor(old, device=k.device)
    shift = shift.expand(k.shape[2]) if shift.ndim == 0 else shift
    return apply(k, shift, theta=theta, dim=dim, interleaved=interleaved)
