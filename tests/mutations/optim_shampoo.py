"""Seeded bugs in Shampoo's kernels."""

import torch

import tilewise as tw
from harness.mutations import Mutation
from tilewise.reference import shampoo as reference

FAMILY = "optim"
SHAMPOO = "optim/cuda/shampoo.h"
MUTATIONS = [
    Mutation("no_barrier_in_product", SHAMPOO, "      sync_block();  // this stage", "      // this stage", "race"),
    Mutation("one_stage", SHAMPOO, "stage ^= 1)", "stage ^= 0)", "plain"),
    Mutation("no_barrier_after_table", SHAMPOO, "    sync_block();\n    const RowLane", "    const RowLane", "race"),
    Mutation("run_order", SHAMPOO, "codec.encode(x[i][e]) << 4 * i", "codec.encode(x[i][e]) << 4 * (3 - i)", "plain"),
    Mutation("tail_dropped", SHAMPOO, "blocks = ceil_div(order, kRowBlock)", "blocks = order / kRowBlock", "plain"),
    Mutation("diagonal_quantised", SHAMPOO, " && !(apart && lane.run(i) + e == lane.diagonal)", "", "plain"),
    Mutation("other_diagonal", SHAMPOO, "diagonal[lane.row] = values", "diagonal[lane.diagonal] = values", "plain"),
    Mutation("missing_negative", SHAMPOO, "x < 0 ? first_negative : thresholds[0]", "thresholds[0]", "plain"),
    Mutation("scale_of_the_row", SHAMPOO, "q.p.scales[lane.block];", "q.p.scales[lane.row];", "plain"),
    Mutation("not_mirrored", SHAMPOO, "if (kDefect && m0 < n0) mirror", "if (kDefect && m0 > n0) mirror", "plain"),
    Mutation("columns_beyond_the_edge", SHAMPOO, "row < order && column + e < order ?", "row < order ?", "plain"),
    Mutation("wrong_half", SHAMPOO, "const int row = m + i % 4 + i / 4 * 32;", "const int row = m + i;", "plain"),
    Mutation("no_identity", SHAMPOO, "(row == column + e) - sum", "-sum", "plain"),
    Mutation("half_step", SHAMPOO, "fmaf(.5f, sum, x[e])", "fmaf(.25f, sum, x[e])", "plain"),
]  # fmt: skip


def check_codes():
    for order, keep_diagonal in ((66, True), (70, False)):
        values = torch.randn(2, order, order)
        indices, scales, diagonal = reference.quantize(values, keep_diagonal)
        got = tw.optim.quantize_matrix(values, keep_diagonal=keep_diagonal)
        assert torch.equal(got[1], scales) and torch.equal(reference.unpack(got[0], order), indices)
        assert diagonal is None or torch.equal(got[2], diagonal)
        assert torch.equal(tw.optim.dequantize_matrix(*got), reference.dequantize(indices, scales, diagonal))


def check_orthonormalize():
    for batch, order in ((2, 70), (1, 68)):
        rows = torch.linalg.qr(torch.randn(batch, order, order))[0] + 0.05 * torch.randn(batch, order, order)
        torch.testing.assert_close(tw.optim.orthonormalize(rows), reference.orthonormalize(rows), rtol=1e-4, atol=1e-5)


def check():
    torch.manual_seed(0)
    check_codes()
    check_orthonormalize()
