"""Seeded bugs in the attention kernels."""

import torch

import tilewise as tw
from harness.mutations import Mutation
from tilewise.reference import attention as reference

FORWARD, BACKWARD = "attention/cuda/forward.h", "attention/cuda/backward.h"
TILE, FLOAT_TILE = "attention/cuda/tile.h", "attention/cuda/float_tile.h"
SOFTMAX, MASK = "attention/cuda/softmax.h", "attention/cuda/mask.h"
KEYS_ARRIVED = "    cp_async_wait<0>();\n    sync_block();  // the keys have arrived"
STAGED = "  sync_warp();\n  constexpr int kChunks"
NEXT_TILE = "        at = at.next(begin, seq.q_len);\n        cp_async_wait<0>();\n"

MUTATIONS = [
    Mutation("keys_not_awaited", FORWARD, KEYS_ARRIVED, KEYS_ARRIVED.replace("    cp_async_wait<0>();\n", ""), "plain"),
    Mutation("values_reused_early", FORWARD, "    sync_block();  // the keys have arrived", "    //", "race"),
    Mutation("keys_reused_early", FORWARD, "    sync_block();  // the values have arrived", "    //", "race"),
    Mutation("mask_dropped", FORWARD, "if (Masked) hide(", "if (false) hide(", "plain"),
    Mutation("tail_key_seen", FORWARD, "if (8 * j + e >= limit)", "if (8 * j + e > limit)", "plain"),
    Mutation("causal_too_short", MASK, "min_of(k_len, query + shift() + 1)", "min_of(k_len, query + shift())", "plain"),
    Mutation("heads_mixed", FORWARD, "head / (p.q_heads / p.kv_heads)", "head % p.kv_heads", "plain"),
    Mutation("not_rescaled", SOFTMAX, "    if (outgrown) raise(top, acc);\n", "", "plain"),
    Mutation(
        "lse_in_base_2", SOFTMAX, "(max[i][h] + log2_approx(total)) * kLn2", "max[i][h] + log2_approx(total)", "plain"
    ),
    Mutation("fragment_swapped", TILE, "= pack2<T>(x[2], x[3])", "= pack2<T>(x[3], x[2])", "plain"),
    Mutation(
        "staging_not_synchronised", TILE, "  sync_warp();\n  constexpr int kChunks", "  constexpr int kChunks", "race"
    ),
    Mutation("group_head_wrong", BACKWARD, "at = {kv_head * heads, begin}", "at = {kv_head, begin}", "plain"),
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
]


def _check(heads, queries, keys, dtype, causal, slope=0.0):
    """Output, lse and gradients against float64; ``slope`` makes the first keys' scores the largest, last in line."""
    torch.manual_seed(queries)
    q, k, v, dout = (torch.randn(1, h, s, 64) for h, s in ((heads, queries), (2, keys), (2, keys), (heads, queries)))
    k *= torch.linspace(1 + slope, 1, keys)[:, None]
    q, k, v, dout = (t.to(dtype) for t in (q, k, v, dout))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = tw.attention(*leaves, causal=causal, return_lse=True)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected, expected_lse = reference.attention(*exact, causal=causal)
    got = (out, *torch.autograd.grad(out, leaves, dout))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, (expected, *torch.autograd.grad(expected, exact, dout.double())), strict=True):
        error = (a.double() - b).norm()
        assert error < 0.02 * b.norm(), f"relative error {error / b.norm():.3f}"


def check():
    _check(4, 40, 150, torch.bfloat16, causal=True)
    _check(2, 70, 33, torch.bfloat16, causal=True)
    _check(2, 9, 150, torch.bfloat16, causal=False, slope=9.0)
    _check(2, 20, 40, torch.float32, causal=False)
