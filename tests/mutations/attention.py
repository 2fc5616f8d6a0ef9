"""Seeded bugs in the attention kernels."""

import torch

import tilewise as tw
from harness.emulation import architecture
from harness.mutations import Mutation
from tilewise.reference import attention as reference

FORWARD, BACKWARD = "attention/cuda/forward.h", "attention/cuda/backward.h"
TILE, FLOAT_TILE = "attention/cuda/tile.h", "attention/cuda/float_tile.h"
SOFTMAX, MASK, SEQUENCE = (f"attention/cuda/{name}.h" for name in ("softmax", "mask", "sequence"))
HOPPER = "attention/cuda/forward_sm90.h"
KEYS_ARRIVED = "    cp_async_wait<0>();\n    sync_block();  // the keys have arrived"
STAGED = "  sync_warp();\n  constexpr int kChunks"
STAGED_BY_GROUP = "    fence_proxy_async();\n    bar_sync(kGroup + group, 128);"
SCORES_ARRIVED = "    wgmma_wait<1>(scores);\n    release(k_empty);"
SCORES_RELEASED_EARLY = "    release(k_empty);\n    wgmma_wait<1>(scores);"
WEIGHTS_EARLY = "    to_weights(weights, scores);\n    wgmma_wait<0>(out);\n    if (c.adding)"
NEXT_TILE = "        at.advance(later, first);\n        cp_async_wait<0>();\n"

MUTATIONS = [
    Mutation("keys_not_awaited", FORWARD, KEYS_ARRIVED, KEYS_ARRIVED.replace("    cp_async_wait<0>();\n", ""), "plain"),
    Mutation("values_reused_early", FORWARD, "    sync_block();  // the keys have arrived", "    //", "race"),
    Mutation("keys_reused_early", FORWARD, "    sync_block();  // the values have arrived", "    //", "race"),
    Mutation("mask_dropped", FORWARD, "adjust_keys<T, Masked>", "adjust_keys<T, false>", "plain"),
    Mutation("tail_key_seen", MASK, "if (8 * j + e >= limit)", "if (8 * j + e > limit)", "plain"),
    Mutation("causal_too_short", MASK, "min_of(k_len, query + shift() + 1)", "min_of(k_len, query + shift())", "plain"),
    Mutation("heads_mixed", SEQUENCE, "head / (p.q_heads / p.kv_heads)", "head % p.kv_heads", "plain"),
    Mutation("not_rescaled", SOFTMAX, "    if (outgrown) raise(top, acc);\n", "", "plain"),
    Mutation(
        "lse_in_base_2", SOFTMAX, "(max[i][h] + log2_approx(total)) * kLn2", "max[i][h] + log2_approx(total)", "plain"
    ),
    Mutation("fragment_swapped", TILE, "= pack2<T>(x[2], x[3])", "= pack2<T>(x[3], x[2])", "plain"),
    Mutation(
        "staging_not_synchronised", TILE, "  sync_warp();\n  constexpr int kChunks", "  constexpr int kChunks", "race"
    ),
    Mutation("group_head_wrong", BACKWARD, "at = {kv_head * heads,", "at = {kv_head,", "plain"),
    Mutation("stage_reused_early", BACKWARD, NEXT_TILE + "        sync_block();", NEXT_TILE, "race"),
    Mutation("delta_dropped", BACKWARD, "(ds[i][j][e] - d)", "ds[i][j][e]", "plain"),
    Mutation("blind_row_counted", BACKWARD, "lse == -INFINITY ? INFINITY : lse * kLog2e", "lse * kLog2e", "plain"),
    Mutation(
        "weights_not_shared",
        "attention/cuda/float_tile.h",
        "= weights[i][j];\n  sync_warp();",
        "= weights[i][j];",
        "race",
    ),
    Mutation(
        "hopper_stage_not_awaited", HOPPER, "    if (ring.reused()) mbar_wait(", "    if (false) mbar_wait(", "race"
    ),
    Mutation("hopper_queries_reused_early", HOPPER, "if (queries > 0) mbar_wait(", "if (false) mbar_wait(", "race"),
    Mutation(
        "hopper_output_not_fenced", HOPPER, STAGED_BY_GROUP, STAGED_BY_GROUP.replace("fence_proxy_async();", ""), "race"
    ),
    Mutation("hopper_store_not_awaited", HOPPER, "      bulk_wait_read<0>();\n", "", "race"),
    Mutation("hopper_queries_overwritten", HOPPER, "    bar_sync(kGroup + c.group, 128);", "    //", "race"),
    Mutation("hopper_scores_not_awaited", HOPPER, "    wgmma_wait<1>(scores);\n", "", "plain"),
    Mutation("hopper_keys_released_early", HOPPER, SCORES_ARRIVED, SCORES_RELEASED_EARLY, "race"),
    Mutation("hopper_values_stepped_wrong", HOPPER, "(v, i * 2048)", "(v, i * 1024)", "plain"),
    Mutation("hopper_foreign_values", HOPPER, "      clear_rows(", "      if (false) clear_rows(", "plain"),
    Mutation("hopper_bytes_miscounted", HOPPER, "Rows * D * sizeof(T));\n#pragma", "Rows * D);\n#pragma", "plain"),
    Mutation(
        "hopper_nobody_begins", HOPPER, "if (c.group == 1) bar_arrive(kTurn", "if (false) bar_arrive(kTurn", "plain"
    ),
    Mutation("hopper_not_rescaled", HOPPER, "    if (c.outgrown) {", "    if (false) {", "plain"),
    Mutation("hopper_weights_too_early", HOPPER, "    wgmma_wait<0>(out);\n    if (c.adding)", WEIGHTS_EARLY, "plain"),
    Mutation("hopper_limit_of_other_row", HOPPER, "mask.key_limit(row + 8)}", "mask.key_limit(row)}", "plain"),
]


def _inputs(heads, queries, keys, dtype, slope):
    torch.manual_seed(queries)
    q, k, v, dout = (torch.randn(1, h, s, 64) for h, s in ((heads, queries), (2, keys), (2, keys), (heads, queries)))
    k *= torch.linspace(1 + slope, 1, keys)[:, None]
    return [t.to(dtype) for t in (q, k, v, dout)]


def _assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        error = (a.double() - b).norm()
        assert error < 0.02 * b.norm(), f"relative error {error / b.norm():.3f}"


def _check(heads, queries, keys, dtype, causal, slope=0.0):
    """Output, lse and gradients against float64; ``slope`` makes the first keys' scores the largest, last in line."""
    *tensors, dout = _inputs(heads, queries, keys, dtype, slope)
    leaves = [t.requires_grad_() for t in tensors]
    out, lse = tw.attention(*leaves, causal=causal, return_lse=True)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected, expected_lse = reference.attention(*exact, causal=causal)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    got = (out, *torch.autograd.grad(out, leaves, dout))
    _assert_close(got, (expected, *torch.autograd.grad(expected, exact, dout.double())))


def _check_forward(heads, queries, keys, causal, slope=0.0):
    tensors = _inputs(heads, queries, keys, torch.bfloat16, slope)[:3]
    out, lse = tw.attention(*tensors, causal=causal, return_lse=True)
    expected, expected_lse = reference.attention(*(t.double() for t in tensors), causal=causal)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    _assert_close([out], [expected])


def _check_packed():
    """The second sequence's values are NaN; the first must not see them."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(80, 1, 64).bfloat16() for _ in range(3))
    v[40:] = torch.nan
    offsets = torch.tensor([0, 40, 80], dtype=torch.int32)
    out = tw.attention_varlen(q, k, v, offsets, offsets)
    expected, _ = reference.attention(*(t[:40].double().transpose(0, 1)[None] for t in (q, k, v)))
    error = (out[:40].double() - expected[0].transpose(0, 1)).norm()
    assert error < 0.02 * expected.norm(), f"relative error {error / expected.norm():.3f}"


def check():
    with architecture(800):
        _check_ampere()
    with architecture(901):
        _check_forward(4, 150, 600, causal=True)
        _check_forward(2, 9, 300, causal=False, slope=9.0)
        _check_packed()


def _check_ampere():
    _check(4, 40, 150, torch.bfloat16, causal=True)
    _check(2, 70, 33, torch.bfloat16, causal=True)
    _check(2, 9, 150, torch.bfloat16, causal=False, slope=9.0)
    _check(2, 20, 40, torch.float32, causal=False)
