"""Long convolution through the FFT, with gates and a skip connection.

B batch, H heads (channels), L length, K filter length. A filter of length K < L is a partial convolution: the same as
one of length L that ends in zeros, without storing them.
"""

import torch

from tilewise import _C
from tilewise._library import check_tensors, register, register_autograd, rows_contiguous

_HALF = (torch.float16, torch.bfloat16)


def _workspace(bytes_, like):
    return torch.empty(bytes_, dtype=torch.uint8, device=like.device) if bytes_ else None


def _like(t):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


# ---- forward ----
def _fft_conv_out(u, k, pregate, postgate, skip, causal, out):
    inputs = (u, k, pregate, postgate, skip, causal)
    _C.fft_conv(*inputs, _workspace(_C.fft_conv_workspace(*inputs), u), out)


def _fft_conv(u, k, pregate, postgate, skip, causal):
    out = _like(u)
    _fft_conv_out(u, k, pregate, postgate, skip, causal, out)
    return out


_INPUTS = "Tensor u, Tensor k, Tensor? pregate, Tensor? postgate, Tensor? skip, bool causal"
_op = register(
    f"fft_conv({_INPUTS}) -> Tensor",
    _fft_conv,
    fake=lambda u, k, pregate, postgate, skip, causal: _like(u),
)
_out_op = register(
    f"fft_conv_out({_INPUTS}, Tensor(a!) out) -> ()",
    _fft_conv_out,
    fake=lambda u, k, pregate, postgate, skip, causal, out: None,
)


# ---- backward: one tensor per entry of `wanted` (u, k, pregate, postgate, skip) that is set ----
def _empty_gradients(u, k, pregate, postgate, skip, wanted):
    return [_like(t) if want else None for t, want in zip((u, k, pregate, postgate, skip), wanted, strict=True)]


def _fft_conv_backward(dy, u, k, pregate, postgate, skip, causal, wanted):
    inputs = (u, k, pregate, postgate, skip, causal)
    gradients = _empty_gradients(u, k, pregate, postgate, skip, wanted)
    found = [g for g in gradients if g is not None]
    if u.numel() == 0:
        return [g.zero_() for g in found]  # sums over nothing
    workspace = _workspace(_C.fft_conv_backward_workspace(*inputs, *gradients), u)
    _C.fft_conv_backward(*inputs, workspace, rows_contiguous(dy), *gradients)
    return found


def _fake_backward(dy, u, k, pregate, postgate, skip, causal, wanted):
    return [g for g in _empty_gradients(u, k, pregate, postgate, skip, wanted) if g is not None]


_backward_op = register(
    f"fft_conv_backward(Tensor dy, {_INPUTS}, bool[] wanted) -> Tensor[]", _fft_conv_backward, _fake_backward
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx, dy):
    wanted = ctx.needs_input_grad[:5]
    if not any(wanted):
        return (None,) * 6
    found = iter(_backward_op(dy, *ctx.saved_tensors, ctx.causal, wanted))
    return *(next(found) if want else None for want in wanted), None


register_autograd("fft_conv", _autograd_backward, _setup_context)


def fft_conv(
    u: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = True,
    pregate: torch.Tensor | None = None,
    postgate: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Long convolution of every row of ``u`` with its head's filter, between two gates.

    ``y = postgate * (k conv x + skip * x)`` with ``x = pregate * u``, where conv is causal,
    ``(k conv x)[l] = sum_{j <= l} k[j] x[l - j]``, or circular with period L. Arithmetic is float32 on CPU; on CUDA the
    transform's factors are 16-bit with float32 accumulation.

    Args:
        u: (B, H, L), float32, float16 or bfloat16; any L.
        k: (H, K) with K <= L, float32 (16-bit filters are converted, and their gradient comes back in their dtype).
        causal: False for circular convolution.
        pregate, postgate: (B, H, L), u's dtype.
        skip: (H,), float32 (16-bit is converted).
        out: (B, H, L), u's dtype, sharing no memory with an input: the result goes there. Not differentiable.

    Returns:
        (B, H, L) in u's dtype. A NaN or infinity in a row of u or of the gates makes that row NaN where it reaches it
        through the transform, and no other row.

    Raises:
        ValueError: wrong shape or device, K > L, last dimension not contiguous, overlapping ``out``.
        TypeError: wrong dtype, or not a tensor.
        NotImplementedError: on CUDA, a length that no kernel serves.

    Differentiable in u, k, pregate, postgate and skip; the gradients of k and skip are summed over the batch in float32
    in a fixed order.

    Long convolutions as a layer: Poli et al., "Hyena Hierarchy" (2023); the fused FFT: Fu et al., "FlashFFTConv"
    (2023). The CPU kernels work modulo x^N - i (the right-angle convolution, Crandall & Fagin 1994).
    """
    check_tensors("fft_conv", u=u, k=k, pregate=pregate, postgate=postgate, skip=skip, out=out)
    if k.dtype in _HALF:
        k = k.float()
    if skip is not None and skip.dtype in _HALF:
        skip = skip.float()
    if out is None:
        return _op(u, k, pregate, postgate, skip, causal)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (u, k, pregate, postgate, skip, out)):
        raise ValueError("fft_conv: out does not support gradients, expected inputs that do not require them")
    _out_op(u, k, pregate, postgate, skip, causal, out)
    torch.autograd.graph.increment_version(out)
    return out
