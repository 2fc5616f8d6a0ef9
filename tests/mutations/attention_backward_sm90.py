"""Seeded bugs in the Hopper backward."""

import torch

import tilewise as tw
from harness.emulation import architecture
from harness.mutations import Mutation
from mutations import _ring
from tilewise.reference import attention as reference

FAMILY = "attention"
HOPPER = "attention/cuda/backward_sm90.h"
WAITED = "    wgmma_wait<1>(scores);\n    auto& p ="
RELEASED_EARLY = "    Base::release_before(s, c);\n    wgmma_wait<1>(scores);\n    auto& p ="
OWN_ROWS_AGAIN = "Base::issue_scores(dp, c.owned, dout)"
KEPT = "      mask.drop_queries(kept, query + i * kPartQueries, key);\n"
ADJUSTED = "      if (masked) mask.template adjust_queries"
KEYS_DONE = "    bar_sync(Base::kGroup + c.index, 128);  // every warp of the group has done with the keys and values\n"

MUTATIONS = [
    *_ring.MUTATIONS,
    Mutation("other_stage_released", HOPPER, "(c.ring.used - 1) % Stages", "c.ring.used % Stages", "race"),
    Mutation("released_early", HOPPER, WAITED, RELEASED_EARLY, "race"),
    Mutation("wrong_stage", HOPPER, "static_cast<uint32_t>(stage) * (2", "static_cast<uint32_t>(0) * (2", "plain"),
    Mutation("bytes_miscounted", HOPPER, "&s.full[stage], 2 * kTileBytes)", "&s.full[stage], kTileBytes)", "plain"),
    Mutation("scores_not_awaited", HOPPER, WAITED, "    auto& p =", "plain"),
    Mutation("dp_not_awaited", HOPPER, "    wgmma_wait<0>(dp);\n    mask.drop_keys", "    mask.drop_keys", "plain"),
    Mutation("sum_not_awaited", HOPPER, "      wgmma_wait<0>(dq);\n", "", "plain"),
    Mutation("foreign_rows", HOPPER, "    if (valid < Rows) clear_rows", "    if (false) clear_rows", "plain"),
    Mutation("statistics_unordered", HOPPER, "      sync_warp();  // the leader", "      // the leader", "race"),
    Mutation("keys_overwritten", HOPPER, KEYS_DONE, "", "race"),
    Mutation("operands_swapped", HOPPER, "Base::issue_scores(dp, c.second_owned(), dout)", OWN_ROWS_AGAIN, "plain"),
    Mutation("sums_swapped", HOPPER, "(sums.dk, ds_weights, q)", "(sums.dk, p_weights, q)", "plain"),
    Mutation("rows_stepped_wrong", HOPPER, "(tile, i * 2048)", "(tile, i * 1024)", "plain"),
    Mutation("mask_of_first_rows", HOPPER, "key = w.first + c.warp_row();", "key = w.first;", "plain"),
    Mutation("mask_dropped", HOPPER, ADJUSTED, ADJUSTED.replace("masked", "false"), "plain"),
    Mutation("full_too_soon", HOPPER, "mask.full_query_begin(group_key + ", "mask.full_query_begin(0 * ", "plain"),
    Mutation("nothing_dropped", HOPPER, KEPT, "", "plain"),
    Mutation("slopes_dropped", HOPPER, "    mask.follow(ds, slopes);\n", "", "plain"),
    Mutation("keys_of_other_head", HOPPER, "kv_head = kv_head_of(p, w.head)", "kv_head = 0", "plain"),
    Mutation("tile_skipped", HOPPER, "tile = next_tile(mask, w, tile, end), c.ring", "tile++, c.ring", "plain"),
]


def _assert_gradients(got, expected):
    for name, a, e in zip(("dq", "dk", "dv"), got, expected, strict=True):
        error = (a.double() - e).norm()
        assert error < 0.02 * e.norm(), f"{name}: relative error {error / e.norm():.3f}"


def _gradients(run, tensors, dout):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = run(*leaves)
    return torch.autograd.grad(out, leaves, dout.to(out))


def _inputs(heads, queries, keys):
    torch.manual_seed(queries)
    rows = ((heads, queries), (2, keys), (2, keys), (heads, queries))
    return [torch.randn(1, h, s, 64).bfloat16() for h, s in rows]


def _check(heads, queries, keys, dropout=None, **options):
    *tensors, dout = _inputs(heads, queries, keys)
    drawn, exact = {}, {}
    if dropout:
        drawn = {"dropout_p": dropout, "generator": torch.Generator().manual_seed(3)}
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=torch.Generator().manual_seed(3))
        exact = {"dropout_p": dropout, "dropout_seed": int(seed)}
    got = _gradients(lambda q, k, v: tw.attention(q, k, v, **options, **drawn), tensors, dout)
    plain = lambda q, k, v: reference.attention(q, k, v, **options, **exact)[0]  # noqa: E731
    _assert_gradients(got, _gradients(plain, [t.double() for t in tensors], dout))


def _check_packed():
    """Everything of the second sequence is NaN; the first must not see it."""
    *tensors, dout = (t[0].transpose(0, 1).clone() for t in _inputs(2, 80, 80))
    for t in (*tensors, dout):
        t[40:] = torch.nan
    offsets = torch.tensor([0, 40, 80], dtype=torch.int32)
    got = _gradients(lambda q, k, v: tw.attention_varlen(q, k, v, offsets, offsets), tensors, dout)
    alone = [t[:40].double().transpose(0, 1)[None] for t in tensors]
    plain = lambda q, k, v: reference.attention(q, k, v)[0]  # noqa: E731
    expected = _gradients(plain, alone, dout[:40].transpose(0, 1)[None])
    _assert_gradients([g[:40].transpose(0, 1)[None] for g in got], expected)


def check():
    blocks = torch.eye(5, 10, dtype=torch.bool)[None, None] | (torch.arange(10) == 9)
    with architecture(901):
        _check_packed()
        _check(4, 200, 560, causal=True)
        _check(2, 150, 300, block_mask=tw.BlockMask(blocks, 32), softcap=2.0, dropout=0.2)
