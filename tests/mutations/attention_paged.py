"""Seeded bugs in attention over paged caches, and in writing them."""

import torch

import tilewise as tw
from harness.mutations import Mutation
from tilewise.reference import attention as reference
from tilewise.reference import kv_cache

FAMILY = "attention"
PAGED, PAGED_TILES = "attention/cuda/paged.h", "common/paged/cuda/attention.h"
PAGED_ROWS, PAGED_SOURCE = "common/paged/cuda/rows.h", "common/paged/cuda/source.h"
PAGED_CODES, PAGED_WIDENED = "common/paged/cuda/codes.h", "common/paged/cuda/widened.h"
CACHE = "attention/cuda/cache.h"

MUTATIONS = [
    Mutation("window_ignored", PAGED, "key >= first && key < end", "key < end", "plain"),
    Mutation("diagonal_too_long", PAGED, "shift + token + right + 1", "shift + token + right + 2", "plain"),
    Mutation(
        "full_by_the_last_token", PAGED, "full_end = end_key(first_token)", "full_end = end_key(last_token)", "plain"
    ),
    Mutation("pages_not_shared_out", PAGED_TILES, "t.first_tile = begin + from;", "t.first_tile = from;", "plain"),
    Mutation(
        "cap_after_the_mask", PAGED_TILES, "if (limit != 0.f) score = softcap", "if (masked) score = softcap", "plain"
    ),
    Mutation("pages_not_awaited", PAGED_TILES, "cp_async_wait<1>();", "cp_async_wait<2>();", "race"),
    Mutation("splits_unweighted", PAGED_ROWS, "sum += exp2_approx((lse - base) * kLog2e) *", "sum +=", "plain"),
    Mutation("hidden_key_counts", PAGED_ROWS, "if (v_row[j] < 0) score[j] = -INFINITY;", "", "plain"),
    Mutation("values_not_rescaled", PAGED_ROWS, "r.out[i] * shrink + four", "r.out[i] + four", "plain"),
    Mutation("rounding_not_taken_back", PAGED_ROWS, " - r.excess * shrink;", ";", "plain"),
    Mutation("rotation_one_way", CACHE, "(first ? -turned : turned)", "turned", "plain"),
    Mutation("partner_overwritten", CACHE, "    sync_warp();  // all has been read that is overwritten\n", "", "race"),
    Mutation("codes_packed_early", PAGED_SOURCE, "    sync_warp();\n    Layout::pack", "    Layout::pack", "race"),
    Mutation("high_fields_lost", PAGED_SOURCE, "byte >> (Bits * (in / 16)) & kMask", "byte & kMask", "plain"),
    Mutation("value_channels_lost", PAGED_ROWS, "p.v_channels ? inverse *", "false ? inverse *", "plain"),
    Mutation("tile_channels_lost", PAGED_TILES, "p.v_channels ? inverse *", "false ? inverse *", "plain"),
    Mutation("warps_joined_unweighted", PAGED_TILES, "weight = exp2_approx(", "weight = 1 + 0 * exp2_approx(", "plain"),
    Mutation("queries_overwritten", PAGED_TILES, "    sync_block();  // the queries have", "    // the", "race"),
    Mutation("copies_unordered", PAGED_TILES, "      sync_warp();\n", "      ;\n", "race"),
    Mutation("joined_early", PAGED_TILES, "    sync_block();\n    store(p,", "    store(p,", "race"),
    Mutation("query_rounded", PAGED_CODES, "(x[n][e] + x[n][e + 2]) * q.unit", "x[n][e] * q.unit", "plain"),
    Mutation("query_unit_lost", PAGED_CODES, "+ of_group[e + 2]) * q.unit", "+ of_group[e + 2])", "plain"),
    Mutation("zero_not_rescaled", PAGED_CODES, "      zero *= factor;\n", "", "plain"),
    Mutation("hidden_row_counts", PAGED_CODES, "zero += x[n][e] == 0.f ? 0.f :", "zero +=", "plain"),
    Mutation("odd_bytes_lost", PAGED_CODES, "word >> (kBits * f + 8)", "word >> (kBits * f)", "plain"),
    Mutation("upper_halves_lost", PAGED_CODES, "upper(column, half) ? 0x7632", "false ? 0x7632", "plain"),
    Mutation(
        "packed_heads_swapped",
        "attention/packing.h",
        "{s.batch, s.row, s.head}; };\n  PagedParams",
        "{s.batch, s.head, s.row}; };\n  PagedParams",
        "plain",
    ),
    Mutation("packed_window_lost", "attention/packing.h", "p.causal ? 0 : p.rules", "p.rules", "plain"),
    Mutation("factors_of_first_group", PAGED_CODES, "exponents[n][1], word / 4)", "exponents[n][1], 0)", "plain"),
    Mutation(
        "multiplied_while_widened", PAGED_TILES, "      sync_block();  // everyone has read", "      // has", "race"
    ),
    Mutation(
        "widened_while_multiplied", PAGED_TILES, "      sync_block();  // all has arrived", "      // all", "race"
    ),
    Mutation("second_product_lost", PAGED_WIDENED, "multiply<fp16>(sums, 0, low, b);", "", "plain"),
    Mutation("odd_channels_lost", PAGED_WIDENED, "half / 2 * kBits + half % 2 * 8", "half / 2 * kBits", "plain"),
    Mutation("widened_by_first_exponent", PAGED_WIDENED, "pair(x, factors[g])", "pair(x, factors[0])", "plain"),
    Mutation("wide_zero_not_rescaled", PAGED_WIDENED, "      zero[h] *= factor;\n", "", "plain"),
]


def _check_paged(tokens, dim=64, **options):
    """Several splits, key tiles with and without masks, a length that ends within a page."""
    generator = torch.Generator().manual_seed(2)
    k_pages, v_pages = torch.randn(2, 30, 16, 1, dim, generator=generator).bfloat16()
    table = torch.randperm(30, generator=generator)[:25][None].int()
    lens = torch.tensor([386], dtype=torch.int32)  # a tile of keys ends between the diagonals of the tokens
    q = torch.randn(1, 2, tokens, dim, generator=generator).bfloat16()
    out, lse = tw.paged_attention(q, k_pages, v_pages, table, lens, return_lse=True, num_splits=2, **options)
    pages = (k_pages.double(), v_pages.double())
    expected, expected_lse = reference.paged_attention(q.double(), *pages, table, lens, **options)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    assert (out - expected).norm() < 0.02 * expected.norm()


def _check_rows(keys=1998):
    """A head dim without tiles. The key in the middle has 2.34 times the weight of every other."""
    generator = torch.Generator().manual_seed(6)
    k_pages, v_pages = torch.zeros(2, 125, 16, 1, 8, dtype=torch.bfloat16)
    table, lens = torch.arange(125, dtype=torch.int32)[None], torch.tensor([keys], dtype=torch.int32)
    k_pages.flatten(0, 1)[keys // 2] = 0.3
    v_pages += 1 + torch.randn(v_pages.shape, generator=generator)
    q = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    out, lse = tw.paged_attention(q, k_pages, v_pages, table, lens, return_lse=True, num_splits=1)
    pages = (k_pages.double(), v_pages.double())
    expected, expected_lse = reference.paged_attention(q.double(), *pages, table, lens)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-6)
    assert (out - expected).norm() < 0.005 * expected.norm()


def _check_cache(format, dim=96):
    """Keys in both fields of a byte, rotated when they are written and once more in place."""
    generator = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 1, 1, 21, dim, generator=generator).bfloat16()
    channels = tw.KVCache.channels(v * torch.linspace(0.5, 2, dim)) if format in kv_cache.BITS else None
    cache = tw.KVCache(6, 4, 1, dim, format=format, k_channels=channels, v_channels=channels)
    table, start = torch.randperm(6, generator=generator)[None].int(), torch.tensor([0], dtype=torch.int32)
    cache.append(k, v, table, start, theta=50.0)
    cache.update_rope(table, torch.arange(21, dtype=torch.int32)[None], 3, theta=50.0)
    angles = torch.arange(3, 24)[:, None] * 50.0 ** -(torch.arange(0, dim, 2) / dim)
    rows = [p[table[0].long()].flatten(0, 1)[:21].transpose(0, 1) for p in (cache.k_pages, cache.v_pages)]
    if channels is None:
        keys, values = (r[None].double() for r in rows)
    else:
        keys, values = (kv_cache.dequantize(r, format, dim, channels[:, None])[None] for r in rows)
    exact = kv_cache.rotate(k.double(), angles.cos(), angles.sin())
    assert (keys - exact).norm() < 0.3 * exact.norm() and (values - v).norm() < 0.2 * v.double().norm()
    q = torch.randn(1, 2, 2, dim, generator=generator).bfloat16()
    out = cache.attend(q, table, torch.tensor([21], dtype=torch.int32))
    expected, _ = reference.attention(q.double(), keys, values, causal=True)
    assert (out - expected).norm() < 0.02 * expected.norm()


def _check_tiles_of_codes(format, heads, dim=64):
    """Several tiles of keys, the last of which is hidden from the first token, and not finite for the second."""
    generator = torch.Generator().manual_seed(4)
    k, v = torch.randn(2, 1, 1, 150, dim, generator=generator).bfloat16() * torch.linspace(0.3, 3, dim)
    v += torch.linspace(-4, 4, 150)[:, None]  # zeros that matter, and differ
    channels = tw.KVCache.channels(v) if format in kv_cache.BITS else None
    cache = tw.KVCache(20, 8, 1, dim, format=format, k_channels=channels, v_channels=channels)
    table = torch.randperm(20, generator=generator)[None].int()
    v[0, 0, 149] = torch.nan
    cache.append(k.bfloat16(), v.bfloat16(), table, torch.tensor([0], dtype=torch.int32))
    rows = [p[table[0].long()].flatten(0, 1)[:149].transpose(0, 1)[None] for p in (cache.k_pages, cache.v_pages)]
    keys, values = (kv_cache.dequantize(r, format, dim, None if channels is None else channels[:, None]) for r in rows)
    q = 2 * torch.randn(1, heads, 2, dim, generator=generator).bfloat16()
    out, lse = cache.attend(q, table, torch.tensor([150], dtype=torch.int32), return_lse=True)
    expected, expected_lse = reference.attention(q[:, :, :1].double(), keys, values, causal=True)
    torch.testing.assert_close(lse[:, :, :1].double(), expected_lse, rtol=3e-6, atol=3e-6)
    assert (out[:, :, :1] - expected).norm() < 0.005 * expected.norm()
    assert out[:, :, 1].isnan().all()


def _check_packed_heads():
    """Three queries of four heads, without pages."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, h, n, 64, generator=generator).bfloat16() for h, n in ((8, 3), (2, 150), (2, 150)))
    out, lse = tw.attention(q, k, v, causal=True, return_lse=True)
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), causal=True)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert (out - expected).norm() < 0.02 * expected.norm()


def check():
    _check_cache("int4")
    _check_cache("bf16")
    for heads in (4, 9):  # operands in registers, and widened into shared memory
        _check_tiles_of_codes("int4", heads)
        _check_tiles_of_codes("bfp12", heads)
    _check_packed_heads()
    _check_rows()
    _check_paged(5, window=(300, None), softcap=2.0)
    _check_paged(20, window=(300, None), softcap=2.0)
