"""4-bit optimizer states and AdamW against the reference, on every device."""

import pytest
import tilewise as tw
import torch
from tilewise.reference import optim as reference


def heavy_tailed(*shape):
    """Magnitudes over many decades, as moments have."""
    return torch.randn(shape) * torch.randn(shape).abs() ** 3


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 1000])
@pytest.mark.modes
def test_quantize_is_exact(device, n, signed):
    values = heavy_tailed(n) if signed else heavy_tailed(n).square()
    indices, scales = reference.quantize(values, signed)
    codes, got_scales = tw.optim.quantize_state(values.to(device.torch), signed=signed)
    assert torch.equal(got_scales.cpu(), scales)
    assert torch.equal(reference.unpack(codes.cpu()).flatten()[:n], indices.flatten()[:n])
    values = tw.optim.dequantize_state(codes, got_scales, (n,), signed=signed)
    assert torch.equal(values.cpu(), reference.dequantize(indices, scales, torch.Size([n]), signed))
