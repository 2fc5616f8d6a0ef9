"""Long convolution through torch.fft, as the formula reads."""

import torch


def fft_conv(u, k, *, causal=True, pregate=None, postgate=None, skip=None):
    """y = postgate * (k conv x + skip * x) with x = pregate * u, in u's dtype; causal, or circular with period L."""
    length = u.shape[-1]
    x = u if pregate is None else pregate * u
    y = torch.zeros_like(x)
    if x.numel() and k.numel():
        size = 2 * length if causal else length
        filtered = torch.fft.rfft(x, size) * torch.fft.rfft(k, size)
        y = torch.fft.irfft(filtered, size)[..., :length]
    if skip is not None:
        y = y + skip[:, None] * x
    return y if postgate is None else postgate * y
