"""KVCache: codes against brute force, attention against attention over dequantised rows, rotation, moving, errors."""

import math

import pytest
import torch

import tilewise as tw
from attention_cases import assert_lse_close
from harness.judge import assert_accurate, draws, yardsticks
from test_speculative import ints
from tilewise.reference import attention as reference
from tilewise.reference import kv_cache

i32 = torch.int32
CODES = ["int8", "int4", "int2", "bfp12"]
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _on_device(request):
    """Everything that a test makes is on its device."""
    with request.getfixturevalue("device").torch if "device" in request.fixturenames else torch.device("cpu"):
        yield


def filled(format, batch, kv_heads, length, dim, page_size=8, dtype=torch.float32, with_channels=True, **rope):
    """A cache with ``length`` random tokens of each sequence, and what went in."""
    per_row = -(-length // page_size)
    k, v = (torch.randn(batch, kv_heads, length, dim) * (1 + 9 * (torch.rand(dim) > 0.9)) for _ in range(2))
    k, v = k.to(dtype), v.to(dtype)
    channels = {}
    if with_channels and format in kv_cache.BITS:
        channels = {"k_channels": tw.KVCache.channels(k), "v_channels": tw.KVCache.channels(v)}
    cache = tw.KVCache(batch * per_row + 2, page_size, kv_heads, dim, format=format, **channels)
    table = torch.randperm(batch * per_row + 2)[: batch * per_row].view(batch, per_row).to(i32)
    cache.append(k, v, table, torch.zeros(batch, dtype=i32), **rope)
    return cache, table, k, v


def rows_of(pages, table, length):
    """(B, Hkv, length, width) of pages."""
    return pages[table.long()].flatten(1, 2)[:, :length].transpose(1, 2)


def dequantized(cache, table, length):
    """float64 k and v (B, Hkv, length, D)."""
    found = []
    for pages, channels in ((cache.k_pages, cache.k_channels), (cache.v_pages, cache.v_channels)):
        rows = rows_of(pages, table, length)
        if cache.format in FLOATS:
            found.append(rows.double())
            continue
        channels = None if channels is None else channels[:, None]
        found.append(kv_cache.dequantize(rows, cache.format, cache.head_dim, channels))
    return found


@pytest.mark.parametrize("format", FLOATS)
def test_numbers_are_stored_as_they_are(device, format):
    cache, table, k, v = filled(format, 2, 2, 13, 40, dtype=FLOATS[format])
    assert torch.equal(rows_of(cache.k_pages, table, 13), k) and torch.equal(rows_of(cache.v_pages, table, 13), v)


@pytest.mark.parametrize("format", kv_cache.BITS)
@pytest.mark.parametrize("dim", [1, 24, 64, 100, 128, 256])
def test_codes_are_the_nearest(device, format, dim):
    """Brute force over all codes of the row's own scale and zero, which span the row's values tightly."""
    bits = kv_cache.BITS[format]
    cache, table, k, v = filled(format, 2, 2, 9, dim)
    for pages, channels, x in ((cache.k_pages, cache.k_channels, k), (cache.v_pages, cache.v_channels, v)):
        rows, x = rows_of(pages, table, 9), (x / channels[:, None]).double()
        scale, zero = (t.double() for t in kv_cache.scale_and_zero(rows, bits, dim))
        low, high, half = x.amin(-1, True), x.amax(-1, True), 2 ** (bits - 1)
        slack = 1e-6 * x.abs().amax(-1, True)
        assert (zero - half * scale <= low + slack).all() and (zero + (half - 1) * scale >= high - slack).all()
        assert (scale <= (high - low) / (2 * half - 1) * (1 + 1 / 127) + zero.abs() / 250 + 1e-30).all()
        grid = zero[..., None] + scale[..., None] * torch.arange(-half, half, dtype=torch.float64)
        best = (x[..., None] - grid).abs().amin(-1)
        error = (x - (kv_cache.unpack(rows, bits, dim) * scale + zero)).abs()
        assert (error <= best + 1e-6 * (scale + x.abs())).all()


@pytest.mark.parametrize("dim", [1, 24, 64, 100, 128, 256])
def test_mantissas_are_the_nearest(device, dim):
    cache, table, k, v = filled("bfp12", 2, 2, 9, dim)
    for pages, x in ((cache.k_pages, k), (cache.v_pages, v)):
        rows, x = rows_of(pages, table, 9), x.double()
        unit = torch.exp2(kv_cache.exponents(rows, dim).double() - 130)
        for block in range(0, dim, 32):
            largest = x[..., block : block + 32].abs().amax(-1)
            assert ((largest >= 4 * unit[..., block]) & (largest < 8 * unit[..., block])).all()
        best = (x[..., None] - unit[..., None] * torch.arange(-8, 8)).abs().amin(-1)
        assert torch.equal((x - kv_cache.dequantize(rows, "bfp12", dim)).abs(), best)


def test_error_falls_with_bits(device):
    errors = []
    for format in ("int2", "bfp12", "int4", "int8"):
        cache, table, k, _ = filled(format, 1, 2, 50, 128)
        errors.append(float((dequantized(cache, table, 50)[0] - k).norm() / k.norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] < 0.5 and errors[-1] < 0.01


def check_attention(cache, table, length, q, lens, num_splits=None, lse_terms=1.0, **options):
    """Against attention in float32 over dequantised rows, rounded at the end: what a cache could do at best."""
    k, v = dequantized(cache, table, length)
    out, lse = cache.attend(q, table, lens, return_lse=True, num_splits=num_splits, **options)

    def plain(q, k, v):
        work = torch.float32 if q.dtype != torch.float64 else q.dtype
        rows = [
            reference.attention(
                q[b : b + 1].to(work), *(t[b : b + 1, :, :n].to(work) for t in (k, v)), causal=True, **options
            )
            for b, n in enumerate(lens.tolist())
        ]
        return torch.cat([r[0] for r in rows]).to(q.dtype), torch.cat([r[1] for r in rows])

    rulers = yardsticks([lambda *t: plain(*t)[:1]], [q, k, v], draws(8 * lse.numel()))
    assert_accurate("out", out, *rulers, 2)
    assert_lse_close(lse, plain(q.double(), k, v)[1], lse_terms)


@pytest.mark.parametrize("format", [*CODES, "bf16"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("heads,kv_heads,tokens,dim", [(2, 2, 1, 128), (2, 1, 1, 64), (4, 1, 1, 100), (6, 2, 3, 64)])
def test_attention_is_that_over_dequantised_rows(device, format, dtype, heads, kv_heads, tokens, dim):
    if format in FLOATS and dtype != FLOATS[format]:
        return
    batch, length = (1, 40) if device.small else (2, 150)
    cache, table, _, _ = filled(format, batch, kv_heads, length, dim, dtype=dtype)
    q, lens = torch.randn(batch, heads, tokens, dim).to(dtype), ints([length, length - 19][:batch])
    options = {"window": (length - 10, None), "softcap": 8.0} if tokens == 3 else {}
    check_attention(cache, table, length, q, lens, **options)


@pytest.mark.modes
@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("format", CODES)
def test_groups_of_heads_over_several_tiles(device, format, dim, num_splits):
    """Two tokens of six heads for each key head; keys that only the second token sees."""
    cache, table, _, _ = filled(format, 1, 2, 200, dim, page_size=7, dtype=torch.bfloat16)
    q = torch.randn(1, 12, 2, dim).bfloat16()
    check_attention(cache, table, 200, q, ints([193]), num_splits, window=(150, None))


@pytest.mark.modes
@pytest.mark.parametrize(
    "heads,tokens", [(3, 3), (1, 17), (4, 16), (5, 13), (2, 50)], ids=["9", "17", "64", "65", "100"]
)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("format", CODES)
def test_many_rows(device, format, dim, heads, tokens):
    """Prompts and trees' worth of rows: more than 8 share widened codes, more than 16 have a warp for every 16."""
    cache, table, _, _ = filled(format, 1, 2, 150, dim, page_size=7, dtype=torch.bfloat16)
    dtype = torch.float16 if heads == 5 else torch.bfloat16
    q = torch.randn(1, 2 * heads, tokens, dim).to(dtype)
    check_attention(cache, table, 150, q, ints([143]), 2 if tokens == 16 else 1)


@pytest.mark.modes
@pytest.mark.parametrize("tokens", [5, 20])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("format", CODES)
def test_many_rows_masked(device, format, dim, tokens):
    """A prompt's chunk in two sequences of different lengths: windows, scores that are capped, a tile none sees."""
    cache, table, _, _ = filled(format, 2, 1, 150, dim, page_size=11, dtype=torch.bfloat16)
    q = torch.randn(2, 2, tokens, dim).bfloat16()
    check_attention(cache, table, 150, q, ints([150, 66]), 2, window=(70, None), softcap=8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["int8", "bfp12"])
def test_rows_at_any_address(device, format, dtype):
    cache, table, _, _ = filled(format, 1, 2, 20, 64, dtype=dtype)
    q, lens = torch.randn(1, 4, 1, 64).to(dtype), ints([20])
    expected = cache.attend(q, table, lens)
    for name in ("k_pages", "v_pages"):
        pages = getattr(cache, name)
        setattr(cache, name, torch.cat([pages, pages[..., :1]], -1)[..., :-1])
    torch.testing.assert_close(cache.attend(q, table, lens), expected, atol=0.03, rtol=0.02)


@pytest.mark.modes
@pytest.mark.devices("emulated", "cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", CODES)
def test_values_that_a_token_does_not_see_may_be_nan(device, format, dtype):
    """Within a tile that other tokens do see, where the CPU kernels multiply them by weights of zero."""
    k, v = torch.randn(2, 1, 1, 6, 64).to(dtype)
    v[0, 0, 4, 7] = torch.nan
    cache, table = tw.KVCache(1, 8, 1, 64, format=format), ints([[0]])
    cache.append(k, v, table, ints([0]))
    for heads in (1, 2, 3):  # each kind of kernel
        out = cache.attend(torch.randn(1, heads, 6, 64).to(dtype), table, ints([6]))
        assert out.isfinite().all(-1)[0].tolist() == [[True] * 4 + [False] * 2] * heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [40, 64])
def test_every_exponent(device, dim, dtype):
    """Also those that no encoder writes: a single value returns as it is, but for what is below 2^-123."""
    exponents = torch.tensor([*range(9), 60, 130, 254]) if device.small else torch.arange(255)
    cache = tw.KVCache(len(exponents), 8, 1, dim, format="bfp12")
    cache.k_pages.zero_()
    cache.v_pages.random_(256)
    cache.v_pages[..., -(-dim // 32) * 16 :] = exponents.to(torch.uint8)[:, None, None, None]
    table = torch.arange(len(exponents), dtype=i32)[:, None]
    expected = kv_cache.dequantize(cache.v_pages[:, :1], "bfp12", dim).view(-1, 1, 1, dim)
    for heads in (8, 16, 17):  # each kind of kernel
        q = torch.randn(len(exponents), heads, 1, dim).to(dtype)
        out = cache.attend(q, table, torch.ones(len(exponents), dtype=i32))
        torch.testing.assert_close(out.double(), expected.expand(-1, heads, -1, -1), rtol=1e-6, atol=2.0**-123)


@pytest.mark.parametrize("format", CODES)
def test_long_cache_in_splits(device, format):
    length = 300 if device.small else 2100
    cache, table, _, _ = filled(format, 1, 1, length, 64)
    k, v = dequantized(cache, table, length)
    for tokens in (1, 3 if device.small else 20):
        q = torch.randn(1, 2, tokens, 64)
        expected, _ = reference.attention(q.double(), k, v, causal=True)
        for num_splits in (None, 1, 5):
            out = cache.attend(q, table, ints([length]), num_splits=num_splits)
            torch.testing.assert_close(out.double(), expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("format", [*CODES, "fp32"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 32])
def test_rotation_on_the_way_in(device, format, interleaved, rotary_dim):
    k, v = torch.randn(2, 2, 2, 7, 64)
    start, table = ints([3, 11]), torch.randperm(8).view(2, 4).to(i32)
    rope = {"theta": 500.0, "interleaved": interleaved, "rotary_dim": rotary_dim}
    rotated, plain = (tw.KVCache(8, 8, 2, 64, format=format) for _ in range(2))
    rotated.append(k, v, table, start, **rope)
    angles = (start[:, None] + torch.arange(7))[..., None] * 500.0 ** -(
        torch.arange(0, rotary_dim or 64, 2, dtype=torch.float64) / (rotary_dim or 64)
    )
    cos, sin = angles.cos().float(), angles.sin().float()
    plain.append(kv_cache.rotate(k, cos[:, None], sin[:, None], interleaved), v, table, start)
    for a, b in zip(dequantized(rotated, table, 30), dequantized(plain, table, 30), strict=True):
        # a value on the border between two codes may get either
        assert (a - b).norm() <= 0.03 * b.norm()
    again = tw.KVCache(8, 8, 2, 64, format=format)
    again.append(k, v, table, start, cos=cos, sin=sin, interleaved=interleaved)
    assert torch.equal(again.k_pages, rotated.k_pages) and torch.equal(again.v_pages, rotated.v_pages)


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
@pytest.mark.modes
def test_rotation_in_the_cache(device, format):
    """Keys written at 0.. and moved by 100 are those that would have been written at 100..; others stay."""
    dtype = FLOATS.get(format, torch.float32)
    k, v = torch.randn(2, 1, 2, 12, 64).to(dtype)
    table, start = torch.randperm(3)[None].to(i32), ints([0])
    moved, there = (tw.KVCache(3, 4, 2, 64, format=format) for _ in range(2))
    moved.append(k, v, table, start, theta=1e4)
    there.append(k, v, table, start, theta=1e4, positions=torch.arange(100, 112)[None])
    before = dequantized(moved, table, 12)[0]
    moved.update_rope(table, torch.arange(2, 9, dtype=i32)[None], 100)
    got, expected = dequantized(moved, table, 12)[0], dequantized(there, table, 12)[0]
    assert (got - expected)[:, :, 2:9].norm() <= {"fp32": 1e-5, "bf16": 0.01, "int8": 0.02}[format] * expected.norm()
    assert torch.equal(got[:, :, :2], before[:, :, :2]) and torch.equal(got[:, :, 9:], before[:, :, 9:])
    moved.update_rope(table, torch.arange(2, 9, dtype=i32)[None], torch.full((1, 7), -100))
    assert (dequantized(moved, table, 12)[0] - before).norm() <= 0.03 * before.norm()


@pytest.mark.parametrize("format", [*CODES, "fp16"])
@pytest.mark.modes
def test_compact(device, format):
    cache, table, _, _ = filled(format, 1, 2, 20, 64, dtype=FLOATS.get(format, torch.float32))
    rows = rows_of(cache.k_pages, table, 20).clone()
    cache.compact(table, ints([10]), ints([[0, 2, 5, -1]]), ints([2]))
    rows[:, :, [11, 12]] = rows[:, :, [12, 15]].clone()
    assert torch.equal(rows_of(cache.k_pages, table, 20), rows)


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.modes
def test_not_finite(device, format, bad):
    """A row with NaN or infinity reads as NaN, and only that row; so do the results that see it."""
    k, v = torch.randn(2, 1, 1, 6, 32)
    k[0, 0, 4, 7] = bad
    cache, table = tw.KVCache(1, 8, 1, 32, format=format), ints([[0]])
    cache.append(k, v, table, ints([0]))
    assert dequantized(cache, table, 6)[0].isfinite().all(-1).flatten().tolist() == [True] * 4 + [False, True]
    out = cache.attend(torch.randn(1, 1, 6, 32), table, ints([6]))
    assert out.isfinite().all(-1).flatten().tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("format", CODES)
def test_constant_rows_and_extremes(device, format):
    k = torch.stack([torch.zeros(32), torch.full((32,), 3.0), torch.randn(32) * 1e30, torch.randn(32) * 1e-30])
    cache, table = tw.KVCache(1, 8, 1, 32, format=format), ints([[0]])
    cache.append(k[None, None], k[None, None], table, ints([0]))
    got = dequantized(cache, table, 4)[0][0, 0]
    assert not got[0].any() and (got[1] - 3).abs().max() < 0.03
    # Half a step between the row's extremes, and the roundings of scale and zero; bfp12 cuts 8 units off at 7.
    step = 1 / 4 if format == "bfp12" else 1.04 / (2 ** kv_cache.BITS[format] - 1) + 2**-8
    assert ((got - k).abs() <= step * k.double().abs().amax(-1, keepdim=True)).all()


def test_empty(device):
    cache = tw.KVCache(2, 4, 2, 64, format="int4")
    none = torch.zeros(0, 2, 3, 64)
    cache.append(none, none, torch.zeros(0, 1, dtype=i32), ints([]))
    out, lse = cache.attend(torch.randn(1, 4, 2, 64), ints([[0]]), ints([0]), return_lse=True)
    assert not out.any() and (lse == -math.inf).all()


def test_size():
    assert tw.KVCache(10, 16, 2, 128, format="int4").k_pages.shape[-1] == 64 + 4
    assert tw.KVCache(10, 16, 2, 128, format="bfp12").k_pages.shape[-1] == 64 + 4
    assert tw.KVCache(10, 16, 2, 128, format="int2").nbytes == 2 * 10 * 16 * 2 * 36


def test_errors():
    cache = tw.KVCache(4, 4, 2, 64, format="int4")
    k, table, start = torch.randn(1, 2, 3, 64), torch.zeros(1, 2, dtype=i32), ints([0])
    before = cache.k_pages.clone()
    bad_rows = [
        ((k[..., :32], k[..., :32], table, start), ValueError, "k_pages has rows of 36 bytes, expected 20"),
        ((k[:, :1], k[:, :1], table, start), ValueError, "k has shape"),
        ((k, k[:, :, :2], table, start), ValueError, "v has shape"),
        ((k, k.half(), table, start), TypeError, "v"),
        ((k.int(), k.int(), table, start), TypeError, "k"),
        ((k, k, table + 9, start), ValueError, "block_table"),
        ((k, k, table, start + 6), ValueError, "start"),
        ((k, k, table, start - 1), ValueError, "start"),
        ((k, k, table, start.long()), TypeError, "start"),
    ]
    for args, kind, message in bad_rows:
        with pytest.raises(kind, match=f"cache_append: .*{message}"):
            cache.append(*args)
    angles = torch.zeros(1, 3, 16)
    for rope, kind in (
        ({"cos": angles}, ValueError),
        ({"cos": angles, "sin": angles[:, :2]}, ValueError),
        ({"cos": angles.double(), "sin": angles.double()}, TypeError),
        ({"cos": torch.zeros(1, 3, 33), "sin": torch.zeros(1, 3, 33)}, ValueError),
        ({"cos": angles, "sin": angles, "theta": 10.0}, ValueError),
    ):
        with pytest.raises(kind):
            cache.append(k, k, table, start, **rope)
    assert torch.equal(cache.k_pages, before)
    with pytest.raises(ValueError, match="cache_rotate: positions"):
        cache.update_rope(table, ints([[8]]), 3)
    with pytest.raises(ValueError, match="format is 'int5'"):
        tw.KVCache(1, 1, 1, 64, format="int5")
    with pytest.raises(ValueError, match="head_dim is 300"):
        tw.KVCache(1, 1, 1, 300)
    with pytest.raises(ValueError, match="k_channels has shape"):
        tw.KVCache(4, 4, 2, 64, format="int4", k_channels=torch.ones(64, 2)).append(k, k, table, start)
    with pytest.raises(ValueError, match="k_channels is given"):
        tw.KVCache(4, 4, 2, 64, format="bfp12", k_channels=torch.ones(2, 64)).append(k, k, table, start)
    with pytest.raises(ValueError, match="paged_attention: k_pages has rows"):
        cache.attend(torch.randn(1, 2, 1, 128), table, ints([1]))


def test_registered():
    cache, table, k, v = filled("int4", 1, 2, 9, 64)
    channels = (cache.k_channels, cache.v_channels)
    append = (cache.k_pages, cache.v_pages, table, ints([0]), k, v, 2, *channels, None, None, False)
    torch.library.opcheck(torch.ops.tilewise.cache_append.default, append)
    angles = torch.zeros(1, 1, 32)
    rotate = (cache.k_pages, table, ints([[3]]), 64, 2, channels[0], angles, angles, False)
    torch.library.opcheck(torch.ops.tilewise.cache_rotate.default, rotate)
