"""Quantised optimizer states: codes against the reference, on every device."""

import pytest
import torch

import tilewise as tw
from harness.emulation import assert_schedules_agree
from tilewise import _C
from tilewise.reference import optim as reference


def heavy_tailed(*shape):
    """Magnitudes over many decades, as moments have."""
    return torch.randn(shape) * torch.randn(shape).abs() ** 3


# ---- quantisation ----


def indices_of(codes, bits):
    return reference.unpack(codes.cpu()) if bits == 4 else codes.cpu().long()


def magnitude_midpoints(bits, signed):
    """In float64."""
    if bits == 8:
        return reference.midpoints8(signed) / reference._UNITS8
    book = reference.SIGNED_CODES if signed else reference.UNSIGNED_CODES
    middle = (book[1:] + book[:-1]) / 2
    return middle[middle > 0]


def assert_quantized(values, device, signed, bits):
    """Codes and scales are the reference's, and so are the floats they stand for."""
    n = values.numel()
    indices, scales = reference.quantize(values, signed, bits)
    codes, got_scales = tw.optim.quantize_state(values.to(device.torch), signed=signed, bits=bits)
    assert torch.equal(got_scales.cpu(), scales) and bool(scales.isfinite().all())
    got = indices_of(codes, bits).flatten()[:n]
    wrong = (got != indices.flatten()[:n]).nonzero().flatten()
    assert not len(wrong), f"{len(wrong)} codes, the first of {float(values.flatten()[wrong[0]])!r}"
    decoded = tw.optim.dequantize_state(codes, got_scales, values.shape, signed=signed, bits=bits)
    assert torch.equal(decoded.cpu(), reference.dequantize(indices, scales, values.shape, signed, bits))


def of_both_books(test):
    test = pytest.mark.parametrize("bits", [4, 8], ids=["4bit", "8bit"])(test)
    return pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])(test)


@of_both_books
@pytest.mark.parametrize("n", [0, 1, 127, 128, 255, 256, 1000])
@pytest.mark.modes
def test_quantize_is_exact(device, n, signed, bits):
    values = heavy_tailed(n) if signed else heavy_tailed(n).square()
    assert_quantized(values, device, signed, bits)


@of_both_books
def test_quantize_many_values(device, signed, bits):
    """Many scales, magnitudes evenly over all decades of the book and below it."""
    count = 40 if device.small else 1000
    scales = 10 ** (torch.rand(count, 1) * 20 - 10)
    values = scales * 10 ** (torch.rand(count, 256) * -9)
    if signed:
        values *= torch.randint(0, 2, values.shape) * 2 - 1
    assert_quantized(values, device, signed, bits)


@of_both_books
def test_quantize_around_every_midpoint(device, signed, bits):
    """The floats next to each decision, at scales that make the products inexact."""
    middle = magnitude_midpoints(bits, signed)
    for scale in [1.0, 0.7182818, 3.1e-12, 9.7e20, 1.9999999, *torch.rand(20 if device.kind == "cpu" else 2).tolist()]:
        scale = torch.tensor(scale)
        at = (middle * scale.double()).float()
        values = torch.cat([at, at.nextafter(scale * 2), at.nextafter(-scale)])
        values = torch.cat([values, -values]) if signed else values
        block = 128 if bits == 4 else 256  # of which the first holds the scale
        values = torch.nn.functional.pad(values, (0, -len(values) % (block - 1))).view(-1, block - 1)
        values = torch.cat([scale.expand(len(values), 1), values], 1)
        assert_quantized(values, device, signed, bits)


@of_both_books
def test_quantize_ties(device, signed, bits):
    """At scales whose products with midpoints are floats, the code of smaller magnitude wins."""
    scale = 9765.625 if bits == 8 else 4.0  # 10^7 / 2^10: 8-bit midpoints are multiples of 1 / (4 10^7)
    exact = magnitude_midpoints(bits, signed) * scale
    at = exact.float()
    ties = at[at.double() == exact]
    assert len(ties) > (100 if bits == 8 else 5)
    values = torch.cat([torch.tensor([scale]), ties[:100]])
    assert_quantized(values, device, signed, bits)
    codes, _ = tw.optim.quantize_state(values.to(device.torch), signed=signed, bits=bits)
    zero = (7 if bits == 4 else 127) if signed else 0
    index = (exact.float()[:, None] == ties[:100]).nonzero()[:, 0]  # of the midpoint, so of the magnitude below it
    assert torch.equal(indices_of(codes, bits).flatten()[1 : 1 + len(index)].sort()[0], (index + zero).sort()[0])


@of_both_books
def test_codes_come_back(device, signed, bits):
    """Every code of the book, at its own value."""
    codes = 16 if bits == 4 else 256
    scales = 2.0 ** torch.arange(-60, 61, 20) * (1 + torch.rand(7))
    indices = torch.arange(codes).expand(7, -1)
    values = reference.dequantize(indices, scales, torch.Size([7, codes]), signed, bits)
    values = torch.nn.functional.pad(values, (0, -codes % (128 if bits == 4 else 256)))
    got, got_scales = tw.optim.quantize_state(values.to(device.torch), signed=signed, bits=bits)
    assert torch.equal(got_scales.cpu(), scales)
    assert torch.equal(indices_of(got, bits)[:, :codes], indices)


@of_both_books
@pytest.mark.modes
def test_quantize_special_values(device, signed, bits):
    values = torch.randn(1100).abs()
    values[:256] = 0
    values[[260, 280, 300, 320]] = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0])
    values[512:768] = 1e-44  # far below the smallest scale
    values[768:1024] = 3e38 * torch.rand(256)
    values[770] = -0.0
    assert_quantized(values, device, signed, bits)
    assert_quantized(values[512:768] * 1e25, device, signed, bits)
    assert_quantized(torch.full((1, 300), float("nan")), device, signed, bits)


@pytest.mark.parametrize("bits", [4, 8], ids=["4bit", "8bit"])
def test_quantize_strides(device, bits):
    values = torch.randn(40, 60, device=device.torch).t()
    codes, scales = tw.optim.quantize_state(values, signed=True, bits=bits)
    expected, _ = tw.optim.quantize_state(values.contiguous(), signed=True, bits=bits)
    assert torch.equal(codes, expected)
    pairs = torch.stack([scales, scales], 1)  # scales as an optimizer's state holds them
    a = tw.optim.dequantize_state(codes, pairs[:, 0], (60, 40), signed=True, bits=bits)
    assert torch.equal(a, tw.optim.dequantize_state(codes, scales, (60, 40), signed=True, bits=bits))


@of_both_books
def test_quantize_unaligned(device, signed, bits):
    values = torch.randn(1001, device=device.torch)[1:].abs()
    codes, _ = tw.optim.quantize_state(values, signed=signed, bits=bits)
    assert torch.equal(codes, tw.optim.quantize_state(values.clone(), signed=signed, bits=bits)[0])


@of_both_books
@pytest.mark.modes
def test_quantize_schedules(device, signed, bits):
    if device.kind == "emulated":
        values = heavy_tailed(700).abs()
        assert_schedules_agree(lambda: tw.optim.quantize_state(values, signed=signed, bits=bits))
        codes, scales = tw.optim.quantize_state(values, signed=signed, bits=bits)
        assert_schedules_agree(lambda: (tw.optim.dequantize_state(codes, scales, (700,), signed=signed, bits=bits),))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_8bit_book_is_the_published_one(signed):
    """The middles of even parts of [0.1, 1], 1 to 64 (unsigned 2 to 128) of them, times 10^-6 to 1; zero and one."""
    book = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float32)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        book += [*middles.tolist(), *(-middles).tolist()] if signed else middles.tolist()
    published = torch.tensor(sorted(book), dtype=torch.float32)
    codes = torch.arange(256, dtype=torch.uint8)[None]
    ours = tw.optim.dequantize_state(codes, torch.ones(1), (256,), signed=signed, bits=8)
    torch.testing.assert_close(ours, published, rtol=2 * 2.0**-23, atol=0)  # two ulp


# ---- the operators as torch sees them ----


def test_opcheck():
    for bits in (4, 8):
        torch.library.opcheck(torch.ops.tilewise.quantize_state.default, (torch.randn(300), True, bits))
        codes, scales = tw.optim.quantize_state(torch.randn(300), signed=False, bits=bits)
        torch.library.opcheck(torch.ops.tilewise.dequantize_state.default, (codes, scales, [300], False, bits))


# ---- bad input ----


def test_wrong_quantize_arguments(device):
    x = torch.randn(300, device=device.torch)
    codes, scales = tw.optim.quantize_state(x, signed=True)
    with pytest.raises(TypeError, match="quantize_state: values"):
        tw.optim.quantize_state(x.double(), signed=True)
    with pytest.raises(TypeError, match="quantize_state: values is a list"):
        tw.optim.quantize_state([1.0], signed=True)
    with pytest.raises(ValueError, match="dequantize_state: codes"):
        tw.optim.dequantize_state(codes, scales, (400,), signed=True)
    with pytest.raises(ValueError, match="dequantize_state: shape"):
        tw.optim.dequantize_state(codes, scales, (-3, -100), signed=True)
    with pytest.raises(ValueError, match="dequantize_state: scales"):
        tw.optim.dequantize_state(codes, scales[:2], (300,), signed=True)
    with pytest.raises(TypeError, match="dequantize_state: scales"):
        tw.optim.dequantize_state(codes, scales.half(), (300,), signed=True)


def test_wrong_bits(device):
    x = torch.randn(300, device=device.torch)
    codes, scales = tw.optim.quantize_state(x, signed=True, bits=8)
    for bits in (0, 5, -8, 32):
        with pytest.raises(ValueError, match=f"^quantize_state: bits is {bits}, expected 4 or 8"):
            tw.optim.quantize_state(x, signed=True, bits=bits)
        with pytest.raises(ValueError, match=f"^dequantize_state: bits is {bits}, expected 4 or 8"):
            tw.optim.dequantize_state(codes, scales, (300,), signed=True, bits=bits)
        with pytest.raises(ValueError, match=f"^quantize_state: bits is {bits}, expected 4 or 8"):
            _C.quantize_state(x, codes, scales, True, bits)  # as callers in C++
    for bits in ("8", 8.0, None, True):
        with pytest.raises(TypeError, match="^quantize_state: bits is"):
            tw.optim.quantize_state(x, signed=True, bits=bits)
    with pytest.raises(ValueError, match="^dequantize_state: codes has shape"):
        tw.optim.dequantize_state(codes, scales, (300,), signed=True)  # codes of 8 bits read as 4
    with pytest.raises(ValueError, match="^dequantize_state: codes has shape"):
        tw.optim.dequantize_state(codes[:, :64], scales[:1], (512,), signed=True, bits=8)
    with pytest.raises(ValueError, match="^quantize_state: codes is not aligned"):
        _C.quantize_state(x, codes.new_zeros(513)[1:].view(2, 256), scales, True, 8)
