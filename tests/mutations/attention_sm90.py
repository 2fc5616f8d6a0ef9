"""Seeded bugs in the Hopper forward."""

import torch

import tilewise as tw
from harness.emulation import architecture
from harness.mutations import Mutation
from mutations import _ring
from tilewise.reference import attention as reference

FAMILY = "attention"
HOPPER, KEYS = "attention/cuda/forward_sm90.h", "attention/cuda/keys_sm90.h"
STAGED = "    fence_proxy_async();\n    bar_sync(kGroup + group, 128);"
SCORES_ARRIVED = "    wgmma_wait<1>(scores);\n    release(k_empty);"
SCORES_RELEASED_EARLY = "    release(k_empty);\n    wgmma_wait<1>(scores);"
WEIGHTS_EARLY = "    to_weights(weights, scores);\n    wgmma_wait<0>(out);\n    if (c.adding)"

MUTATIONS = [
    *_ring.MUTATIONS,
    Mutation("queries_reused_early", HOPPER, "if (queries > 0) mbar_wait(", "if (false) mbar_wait(", "race"),
    Mutation("output_not_fenced", HOPPER, STAGED, STAGED.replace("fence_proxy_async();", ""), "race"),
    Mutation("store_not_awaited", HOPPER, "      bulk_wait_read<0>();\n", "", "race"),
    Mutation("queries_overwritten", HOPPER, "    bar_sync(kGroup + c.group, 128);", "    //", "race"),
    Mutation("scores_not_awaited", HOPPER, "    wgmma_wait<1>(scores);\n", "", "plain"),
    Mutation("keys_released_early", HOPPER, SCORES_ARRIVED, SCORES_RELEASED_EARLY, "race"),
    Mutation("values_stepped_wrong", HOPPER, "(v, i * 2048)", "(v, i * 1024)", "plain"),
    Mutation("foreign_values", HOPPER, "      clear_rows<", "      if (false) clear_rows<", "plain"),
    Mutation("bytes_miscounted", KEYS, "Keys * D * sizeof(T));", "Keys * D);", "plain"),
    Mutation("nobody_begins", HOPPER, "if (c.group == 1) bar_arrive(kTurn", "if (false) bar_arrive(kTurn", "plain"),
    Mutation("not_rescaled", HOPPER, "    if (c.outgrown) {", "    if (false) {", "plain"),
    Mutation("weights_too_early", HOPPER, "    wgmma_wait<0>(out);\n    if (c.adding)", WEIGHTS_EARLY, "plain"),
    Mutation(
        "mask_of_other_warp", HOPPER, "(warp_id() & 3) * 16;\n  }\n\n  // Scores", "0;\n  }\n\n  // Scores", "plain"
    ),
    Mutation("page_of_first_box", KEYS, "page = shfl(own.page, i)", "page = shfl(own.page, 0)", "plain"),
    Mutation("slot_of_first_box", KEYS, "slot = shfl(own.slot, i)", "slot = shfl(own.slot, 0)", "plain"),
    Mutation("stale_values", HOPPER, "(a.seq_lens && Source::kBoxed)", "false", "plain"),
    Mutation("page_of_next_tile", HOPPER, "place = next_place)", "place = place)", "plain"),
    Mutation("gathered_rows_not_fenced", KEYS, "    fence_proxy_async();  // wgmma", "    // wgmma", "race"),
    Mutation("gathered_rows_not_awaited", KEYS, "    cp_async_wait<Newer>();\n", "", "race"),
    Mutation("rows_never_announced", KEYS, "cp_async_commit();\n    announce<1>();", "cp_async_commit();", "plain"),
    Mutation("last_rows_not_announced", KEYS, "finish() { announce<0>(); }", "finish() {}", "plain"),
    Mutation("swizzle_of_first_row", KEYS, "(swizzled ^ (i * 8))", "swizzled", "plain"),
    Mutation("behind_the_sequence", KEYS, "{key < w.seq.k_len ?", "{true ?", "plain"),
    Mutation("nan_lost", HOPPER, "odd = 0.f * base[h]", "odd = 0.f", "plain"),
    Mutation("nan_not_the_largest", HOPPER, "float top = max_nan(", "float top = fmaxf(", "plain"),
    Mutation("sink_dropped", HOPPER, "add_sink(c, out, mask.sink());", ";", "plain"),
    Mutation("nothing_dropped", HOPPER, "    mask.drop_keys(as_fragment(scores), query, key);\n", "", "plain"),
    Mutation(
        "tile_skipped_by_consumers", HOPPER, "tile = next_tile(mask, w, tile);\n    if", "tile--;\n    if", "plain"
    ),
]


def _inputs(heads, queries, keys, slope=0.0):
    torch.manual_seed(queries)
    q, k, v = (torch.randn(1, h, s, 64) for h, s in ((heads, queries), (2, keys), (2, keys)))
    k *= torch.linspace(1 + slope, 1, keys)[:, None]
    return [t.bfloat16() for t in (q, k, v)]


def _assert_close(got, expected):
    error = (got.double() - expected).norm()
    assert error < 0.02 * expected.norm(), f"relative error {error / expected.norm():.3f}"


def _check(heads, queries, keys, slope=0.0, dropout=None, **options):
    tensors, drawn, exact = _inputs(heads, queries, keys, slope), {}, {}
    if dropout:
        drawn = {"dropout_p": dropout, "generator": torch.Generator().manual_seed(3)}
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=torch.Generator().manual_seed(3))
        exact = {"dropout_p": dropout, "dropout_seed": int(seed)}
    out, lse = tw.attention(*tensors, **options, **drawn, return_lse=True)
    expected, expected_lse = reference.attention(*(t.double() for t in tensors), **options, **exact)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    _assert_close(out, expected)


def _check_packed():
    """The second sequence's values are NaN; the first must not see them."""
    q, k, v = (t[0].transpose(0, 1) for t in _inputs(2, 80, 80))
    v = v.clone()
    v[40:] = torch.nan
    offsets = torch.tensor([0, 40, 80], dtype=torch.int32)
    out = tw.attention_varlen(q, k, v, offsets, offsets)
    expected, _ = reference.attention(*(t[:40].double().transpose(0, 1)[None] for t in (q, k, v)))
    _assert_close(out[:40], expected[0].transpose(0, 1))


def _check_paged(size):
    """Two sequences in pages of some size; NaN stand behind the first."""
    q, k, v = (torch.cat([t, t.flip(2)]) for t in _inputs(2, 70, 192))
    count = 192 // size
    lens, table = torch.tensor([100, 192], dtype=torch.int32), torch.randperm(2 * count).int().view(2, count)
    k[0, :, 100:] = v[0, :, 100:] = torch.nan
    pages = torch.empty(2, 2 * count, size, 2, 64, dtype=torch.bfloat16)
    for of, t in zip(pages, (k, v), strict=True):
        of[table.flatten().long()] = t.transpose(1, 2).reshape(2 * count, size, 2, 64)
    out = tw.paged_attention(q, *pages, table, lens)
    for b, length in enumerate(lens.tolist()):
        alone = (t[b : b + 1].double() for t in (q, k[:, :, :length], v[:, :, :length]))
        _assert_close(out[b : b + 1], reference.attention(*alone, causal=True)[0])


def _check_not_finite():
    """Rows that meet NaN are NaN, wherever it is: a part of the weights is made by instructions that lose it."""
    q, k, v = _inputs(2, 9, 40)
    for key in range(40):
        k[0, 0, key, 3], k[0, 1, key, 3] = torch.nan, torch.inf
        out = tw.attention(q, k, v)
        expected, _ = reference.attention(*(t.float() for t in (q, k, v)))
        assert torch.equal(out.isnan(), expected.isnan()), f"NaN at key {key}"
        k[0, :, key, 3] = 0


def check():
    blocks = torch.eye(5, 10, dtype=torch.bool)[None, None] | (torch.arange(10) == 9)
    with architecture(901):
        _check(4, 150, 600, causal=True)
        _check(2, 9, 300, slope=9.0)
        _check_packed()
        _check_not_finite()
        _check_paged(96)  # boxes of 32
        _check_paged(12)  # gathered
        _check(2, 150, 300, block_mask=tw.BlockMask(blocks, 32), sink_logits=torch.ones(2), dropout=0.2)
