"""Decoding over codes with one query a key head, which has a kernel of its own on CPUs with byte products."""

import math

import pytest
import torch

import tilewise as tw
from attention_cases import assert_lse_close
from test_attention_cache import check_attention, dequantized, filled
from test_speculative import ints
from tilewise.reference import attention as reference

pytestmark = pytest.mark.devices("cpu")
CODES = ["int8", "int4", "int2"]
bf16 = torch.bfloat16

# keys, page size: blocks of 64 keys, fours, one key, a range of keys that ends anywhere
LENGTHS = [(1, 16), (3, 5), (64, 16), (65, 1), (130, 5), (191, 16)]


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("dim", [8, 40, 64, 100, 128, 144, 192, 256])
@pytest.mark.parametrize("length,page_size", LENGTHS)
def test_lengths_pages_and_head_dims(device, format, dim, length, page_size):
    heads = 9 if dim == 128 else 2  # nine are more than one team
    # Factors of channels make the query float32. Its 22 bits are too few for the lse of a key or two of int2.
    cache, table, k, _ = filled(format, 1, heads, length, dim, page_size, bf16, with_channels=length > 3)
    q = torch.randn(1, heads, 1, dim).to(bf16)
    # A score of few keys may be far smaller than the sums of codes and of zeros that it is the difference of.
    terms = float(q.float().norm(dim=-1).max() * k.abs().max()) / dim**0.5
    check_attention(cache, table, length, q, ints([length]), lse_terms=max(1.0, terms))


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize(
    "options", [{"window": (70, None)}, {"softcap": 2.0}, {"window": (100, 0), "softcap": 9.0}], ids=str
)
def test_options(device, format, options):
    cache, table, _, _ = filled(format, 2, 3, 200, 128, 5, bf16, with_channels=False)
    check_attention(cache, table, 200, torch.randn(2, 3, 1, 128).to(bf16), ints([200, 133]), 2, **options)


def by_hand(format, dim, codes, scale=1.0, zero=0.0, length=70):
    """A cache of one head whose keys and values have these bytes of codes, one for each key."""
    cache, table = tw.KVCache(5, 16, 1, dim, format=format), ints([[3, 1, 0, 4, 2]])
    for pages in (cache.k_pages, cache.v_pages):
        rows = pages[table[0].long()].view(80, -1)
        rows[:, :-4] = codes[:, None]
        rows[:, -4:] = torch.tensor([scale, zero], dtype=bf16).view(torch.uint8)
        pages[table[0].long()] = rows.view(5, 16, 1, -1)
    return cache, table, length


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("size", [1.0, 1.9921875, 2.0**-60, 1.9921875 * 2.0**60])
def test_sums_of_integers_fit(device, format, dim, size):
    """All codes the lowest or the highest, all channels of the query at the largest that a power of two stands for."""
    lowest, highest = {"int8": (0x80, 0x7F), "int4": (0x88, 0x77), "int2": (0xAA, 0x55)}[format]
    codes = torch.where(torch.rand(80) < 0.5, lowest, highest).to(torch.uint8)
    cache, table, length = by_hand(format, dim, codes, scale=2.0**-8)
    for signs in (torch.ones(dim), torch.randn(dim).sign()):
        q = (signs * size).to(bf16).view(1, 1, 1, dim)
        k, v = dequantized(cache, table, length)
        expected, exact = reference.attention(q.double(), k, v, scale=0.01 / size)
        out, lse = cache.attend(q, table, ints([length]), return_lse=True, scale=0.01 / size)
        assert_lse_close(lse, exact)
        torch.testing.assert_close(out.double(), expected, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("scale", [2.0**-90, 2.0**-40, 2.0**40, 2.0**100])
def test_scales_of_any_size(device, format, scale):
    codes = torch.randint(256, (80,), dtype=torch.uint8)
    cache, table, length = by_hand(format, 128, codes, scale=scale, zero=-scale)
    q = torch.randn(1, 1, 1, 128).to(bf16)
    k, v = dequantized(cache, table, length)
    expected, exact = reference.attention(q.double(), k, v, scale=0.1 / scale)
    out, lse = cache.attend(q, table, ints([length]), return_lse=True, scale=0.1 / scale)
    assert_lse_close(lse, exact)
    torch.testing.assert_close(out.double(), expected, rtol=2.0**-7, atol=scale * 1e-5)


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("largest", [2.0**10, 2.0**20, 2.0**-110])
def test_one_large_channel(device, format, largest):
    """The other channels are far below it, or all are nearly nothing: not less exact than in float32."""
    cache, table, _, _ = filled(format, 1, 2, 100, 128, 16, bf16, with_channels=False)
    q = torch.randn(1, 2, 1, 128) * min(1.0, largest)
    q[..., 5] = largest
    check_attention(cache, table, 100, q.to(bf16), ints([100]), scale=0.1 / largest)


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_not_finite(device, format, bad, where):
    """What is not finite stays in its head, and counts only if it is seen."""
    cache, table, k, v = filled(format, 1, 3, 130, 64, 16, bf16, with_channels=False)
    q = torch.randn(1, 3, 1, 64).to(bf16)
    fine = cache.attend(q, table, ints([130]))
    if where == "q":
        q[0, 1, 0, 9] = bad
    else:
        rows = {"k": k, "v": v}[where]
        rows[0, 1, 70, 9] = bad
        cache.append(k, v, table, ints([0]))
    out = cache.attend(q, table, ints([130]))
    assert not out[0, 1].isfinite().any()
    assert torch.equal(out[0, [0, 2]], fine[0, [0, 2]])
    if where != "q":
        assert cache.attend(q, table, ints([130]), window=(50, None)).isfinite().all()


@pytest.mark.parametrize("format", CODES)
def test_bits_do_not_depend_on_threads(device, format):
    """A thread asks for what its next range begins with; that changes nothing."""
    cache, table, _, _ = filled(format, 1, 2, 4200, 64, 16, bf16)
    q, lens = torch.randn(1, 2, 1, 64).to(bf16), ints([4170])
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(cache.attend(q, table, lens, return_lse=True))
    torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
    k, v = (t[:, :, :4170] for t in dequantized(cache, table, 4170))
    expected, _ = reference.attention(q.double(), k, v)
    torch.testing.assert_close(results[0][0].double(), expected, atol=2e-3, rtol=2.0**-8)
