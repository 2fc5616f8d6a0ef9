"""Seeded bugs in the 2:4 kernels."""

import torch

import tilewise as tw
from harness.mutations import Mutation

FORWARD, BACKWARD, TILES = (f"sparse/cuda/{name}.h" for name in ("nm_forward", "nm_backward", "tiles"))
STAGE_BARRIER = "      sync_block();  // tile t has landed, and nobody reads tile t - 1 any more\n"
OUTPUT_BARRIER = "    sync_block();  // the output tile takes the place of the stages\n"
DX_BARRIER = "      sync_block();  // tile t is complete, and nobody reads tile t - 1 any more\n"
DX_TAIL = "if (o >= p.out || k >= p.in) return piece;"
EXCHANGE = "{shfl_xor(mine[0], 1), shfl_xor(mine[1], 1)}"

MUTATIONS = [
    Mutation("stage_not_awaited", FORWARD, "      cp_async_wait<kStages - 2>();\n", "", "race"),
    Mutation("stage_barrier_missing", FORWARD, STAGE_BARRIER, "", "race"),
    Mutation("output_over_stages", FORWARD, OUTPUT_BARRIER, "", "race"),
    Mutation("metadata_halves_swapped", FORWARD, "row + g) * 8 + 2 * t) |", "row + g) * 8 + 2 * (t ^ 1)) |", "plain"),
    Mutation("second_half_repeats_the_first", FORWARD, "4 * Step + lane_id() / 8", "lane_id() / 8", "plain"),
    Mutation("out_of_range_rows_loaded", TILES, "row < rows && c * 8 < cols", "c * 8 < cols", "race"),
    Mutation("illegal_nibble_kept", TILES, "return (m & ~((illegal >> 2) * 15)) | illegal;", "return m;", "plain"),
    Mutation("dx_tile_barrier_missing", BACKWARD, DX_BARRIER, "", "race"),
    Mutation("dx_positions_swapped", BACKWARD, "<< 16 * kept.first |", "<< 16 * kept.second |", "plain"),
    Mutation("dx_tail_outputs", BACKWARD, DX_TAIL, "if (k >= p.in) return piece;", "race"),
    Mutation("dvalues_stage_barrier_missing", BACKWARD, STAGE_BARRIER, "", "race"),
    Mutation("dvalues_pair_not_exchanged", BACKWARD, EXCHANGE, "{mine[0], mine[1]}", "plain"),
]


def check():
    torch.manual_seed(0)
    w, x, dy = (torch.randint(-3, 4, shape).bfloat16() for shape in ((40, 256), (20, 256), (20, 40)))
    weight = tw.NMSparse.from_dense(w)
    leaf = x.requires_grad_()
    weight.values = weight.values.requires_grad_()
    y = tw.linear(leaf, weight)
    y.backward(dy)
    dense = weight.to_dense().detach().float()
    exact = lambda t: t.to(torch.bfloat16)  # noqa: E731  (integers: the sums have no rounding of their own)
    assert torch.equal(y, exact(x.float() @ dense.t())), "y"
    assert torch.equal(leaf.grad, exact(dy.float() @ dense)), "dx"
    kept = (dy.float().t() @ x.float())[weight.mask()].view(40, 128)
    assert torch.equal(weight.values.grad, exact(kept)), "dvalues"
    check_bad_metadata(x.detach(), weight)


def check_bad_metadata(x, weight):
    """A bad group spoils its own output only, and the next call raises."""
    indices = weight.indices.clone()
    indices[7, 3] = 0x40
    values = weight.values.detach()
    clean = torch.ops.tilewise.nm_linear(x, values, weight.indices, None)
    y = torch.ops.tilewise.nm_linear(x, values, indices, None)
    others = torch.arange(40) != 7
    assert torch.equal(y[:, others], clean[:, others]), "another output than the bad one"
    try:
        torch.ops.tilewise.nm_linear(x, values, weight.indices, None)
    except ValueError:
        return
    raise AssertionError("a bad group was not reported")
