"""Seeded bugs in the attention kernels."""

import torch

import tilewise as tw
from harness.emulation import architecture
from harness.mutations import Mutation
from tilewise.reference import attention as reference

FORWARD, BACKWARD = "attention/cuda/forward.h", "attention/cuda/backward.h"
GRADIENT = "attention/cuda/gradient.h"
TILE, FLOAT_TILE = "attention/cuda/tile.h", "attention/cuda/float_tile.h"
SOFTMAX, MASK, SEQUENCE = (f"attention/cuda/{name}.h" for name in ("softmax", "mask", "sequence"))
GENERAL, BIAS = "attention/cuda/general.h", "attention/cuda/bias.h"
KEYS_ARRIVED = "    cp_async_wait<0>();\n    sync_block();  // the keys have arrived"
STAGED = "  sync_warp();\n  constexpr int kChunks"
NEXT_TILE = "        at.advance(later, first);\n        cp_async_wait<0>();\n"

MUTATIONS = [
    Mutation("keys_not_awaited", FORWARD, KEYS_ARRIVED, KEYS_ARRIVED.replace("    cp_async_wait<0>();\n", ""), "plain"),
    Mutation("values_reused_early", FORWARD, "    sync_block();  // the keys have arrived", "    //", "race"),
    Mutation("keys_reused_early", FORWARD, "    sync_block();  // the values have arrived", "    //", "race"),
    Mutation("mask_dropped", FORWARD, "else if (Masked)", "else if (false)", "plain"),
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
    Mutation(
        "group_head_wrong",
        BACKWARD,
        "Walk at(later, first, kv_head * heads,",
        "Walk at(later, first, kv_head,",
        "plain",
    ),
    Mutation("stage_reused_early", BACKWARD, NEXT_TILE + "        sync_block();", NEXT_TILE, "race"),
    Mutation("delta_dropped", BACKWARD, "(ds[i][j][e] - d)", "ds[i][j][e]", "plain"),
    Mutation("blind_row_counted", GRADIENT, "lse == -INFINITY ? INFINITY : lse * kLog2e", "lse * kLog2e", "plain"),
    Mutation(
        "weights_not_shared",
        "attention/cuda/float_tile.h",
        "= weights[i][j];\n  sync_warp();",
        "= weights[i][j];",
        "race",
    ),
    Mutation("window_bound_dropped", GENERAL, "(~lowest_bits(diagonal - left()) |", "(~0u |", "plain"),
    Mutation("global_tokens_hidden", GENERAL, "lowest_bits(rules.global_tokens - key)", "0u", "plain"),
    Mutation(
        "gap_skips_too_far", GENERAL, "tile = key_begin(query) / Keys;", "tile = key_begin(query) / Keys + 1;", "plain"
    ),
    Mutation(
        "bias_transposed",
        GENERAL,
        "fn(score, Transposed ? column : row, Transposed ? row : column)",
        "fn(score, Transposed ? row : column, Transposed ? column : row)",
        "plain",
    ),
    Mutation("mask_bit_shifted", GENERAL, "(key % 32);", "(key % 32 + 1);", "plain"),
    Mutation(
        "block_index_wrong", GENERAL, "block_row(query / rules.block_q)", "block_row(query / rules.block_k)", "plain"
    ),
    Mutation("softcap_slope_dropped", GENERAL, "return x * slopes.at[j][e];", "return x;", "plain"),
    Mutation(
        "bits_of_wrong_half", GENERAL, "shfl(own, 16 * half + 8 * h + g)", "shfl(own, 16 * h + 8 * half + g)", "plain"
    ),
    Mutation(
        "dropout_counter_wrong_in_backward",
        BACKWARD,
        "mask.drop_queries(p, query, key)",
        "mask.drop_queries(p, query, key + 8)",
        "plain",
    ),
    Mutation("rules_of_wrong_head", BACKWARD, "if constexpr (Mask::kGeneral) mask.head = at.head;", "", "plain"),
    Mutation("sink_dropped_from_lse", FORWARD, "state.rows.add_sink(mask.sink(), state.acc);", "", "plain"),
    Mutation(
        "dbias_rows_not_summed", BIAS, "for (int r = 0; r < rows_each; r++)", "for (int r = 0; r < 1; r++)", "plain"
    ),
    Mutation("dbias_heads_not_summed", BIAS, "h < heads.end", "h <= heads.begin", "plain"),
    Mutation("dbias_tiles_reused_early", BIAS, "    sync_block();  // the tiles before have been read\n", "", "race"),
]


def _check(heads, queries, keys, dtype, slope=0.0, leaves=(), dropout=None, **options):
    """Output, lse and gradients against float64; ``slope`` makes the first keys' scores the largest, last in line."""
    torch.manual_seed(queries)
    q, k, v, dout = (torch.randn(1, h, s, 64) for h, s in ((heads, queries), (2, keys), (2, keys), (heads, queries)))
    k *= torch.linspace(1 + slope, 1, keys)[:, None]
    if "sink_logits" in leaves:  # whose gradient, a sum over all rows, would cancel
        v, dout = v + 0.5, dout + 0.5
    q, k, v, dout = (t.to(dtype) for t in (q, k, v, dout))
    tensors = [t.requires_grad_() for t in (q, k, v, *(options.pop(name) for name in leaves))]
    drawn = {"dropout_p": dropout, "generator": torch.Generator().manual_seed(3)} if dropout else {}
    out, lse = tw.attention(*tensors[:3], **options, **drawn, **_named(leaves, tensors), return_lse=True)
    if dropout:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=torch.Generator().manual_seed(3))
        drawn = {"dropout_p": dropout, "dropout_seed": int(seed)}
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected, expected_lse = reference.attention(*exact[:3], **options, **drawn, **_named(leaves, exact))
    got = (out, *torch.autograd.grad(out, tensors, dout))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, (expected, *torch.autograd.grad(expected, exact, dout.double())), strict=True):
        error = (a.double() - b).norm()
        assert error < 0.02 * b.norm(), f"relative error {error / b.norm():.3f}"


def _named(leaves, tensors):
    return dict(zip(leaves, tensors[3:], strict=True))


def check():
    with architecture(800):
        _check_all()


def _check_all():
    _check(4, 40, 150, torch.bfloat16, causal=True)
    _check(2, 70, 33, torch.bfloat16, causal=True)
    _check(2, 9, 150, torch.bfloat16, causal=False, slope=9.0)
    _check(2, 20, 40, torch.float32, causal=False)
    _check_rules()


def _check_rules():
    torch.manual_seed(1)
    _check(4, 9, 300, torch.bfloat16, window=(30, 3), global_tokens=4, alibi_slopes=torch.tensor([0.0, 0.1, 0.2, 0.05]))
    blocks = torch.tensor([[[[1, 0, 1], [0, 1, 1], [1, 1, 0]]]]).bool()
    masked = {"mask": torch.rand(1, 4, 40, 140) < 0.6, "block_mask": tw.BlockMask(blocks, (16, 48))}
    _check(4, 40, 140, torch.bfloat16, softcap=1.5, **masked)
    summed = {"bias": torch.randn(1, 1, 1, 70), "sink_logits": torch.randn(2) + 2, "leaves": ("bias", "sink_logits")}
    for dtype in (torch.bfloat16, torch.float32):
        _check(2, 80, 70, dtype, dropout=0.3, **summed)
