"""Seeded bugs in the optimizers' step."""

import dataclasses
import types

import torch

from harness.mutations import Mutation
from optim_cases import RULES, assert_step, call, make_slot, run_step
from tilewise.reference import optim as reference

STEP, FULL, RULE = "optim/cuda/step.h", "optim/cuda/full_step.h", "optim/cuda/rule.h"
STATISTICS, STRUCTURE = "optim/cuda/statistics.h", "optim/cuda/structure.h"
TENSORS, MASTER, CODEC = "optim/cuda/tensors.h", "optim/cuda/master.h", "optim/cuda/codec.h"


def plain(name, file, old, new=""):
    return Mutation(name, file, old, new, "plain")


MUTATIONS = [
    # blocks of codes
    Mutation("no_barrier_after_tables", STEP, "    sync_block();\n", "", "race"),
    Mutation("no_sync_before_write", STEP, "    sync_warp();  // a block's", "    // a block's", "race"),
    plain("nibble_order", CODEC, "8 * (c & 3) + 4 * (c >> 2)", "4 * c"),
    plain("halves_not_exchanged", CODEC, "kept | shfl_xor(given, 1)", "kept"),
    plain("midpoint_moved", CODEC, "fmaf(e, e, -.5f)", "e * e"),
    plain("tail_dropped", STEP, "valid(block * Codec::kElements < t.n)", "valid((block + 1) * Codec::kElements < t.n)"),
    plain("codes_beyond_the_end_count", STEP, "      clear_tail(v);\n"),
    plain("scale_of_the_first_block", STEP, "valid ? t.first_scales[block]", "valid ? t.first_scales[0]"),
    plain("bad_moment_kept", STEP, "v[i] = finite ? v[i] : 0;"),
    plain("chunk_of_another_tensor", STEP, "chunk - t.first_unit", "chunk"),
    plain("chunk_of_another_tensor_in_32_bits", FULL, "chunk - t.first_unit", "chunk"),
    # rules
    plain("no_bias_correction", RULE, "sqrt_approx(v), x.k.inv_correction2", "sqrt_approx(v), 1"),
    plain("nesterov_like_momentum", RULE, "c.nesterov ? fmaf(m, c.beta1, g) : m", "m"),
    plain("lion_turned", RULE, "m = fmaf(g, c.square_weight, m * c.beta2);", "m = u;"),
    plain("momentum_of_raw_gradients", RULE, "if (has_first) u = m = fmaf(u,", "if (has_first) u = m = fmaf(g,"),
    plain("decay_is_not_a_gradient", RULE, "l2 != 0 ? fmaf(l2, p, g) : g", "g"),
    # rows and columns
    Mutation("no_barrier_in_tile", STATISTICS, "    sync_block();\n    const W", "    const W", "race"),
    plain("column_instead_of_row", STRUCTURE, "fmaxf(fminf(row, column),", "fmaxf(column,"),
    plain("row_of_the_run_s_start", STRUCTURE, "at.advance(1, t);", "at.column = (at.column + 1) % t.columns;"),
    plain("partials_of_a_tile_dropped", STATISTICS, "tile < side.tiles;", "tile + 1 < side.tiles;"),
    plain("partials_of_one_warp_only", STATISTICS, "total = folded(total, s.totals[w][lane_id()], maximum)", "(void)w"),
    plain("columns_like_rows", STATISTICS, "of_tensor - (is_column ? row_units : 0)", "of_tensor"),
    plain("scales_of_rows_only", STATISTICS, "side.offset + i] = total", "i] = total"),
    Mutation(
        "no_barrier_in_combination",
        STATISTICS,
        "    sync_block();\n    if (warp_id() > 0",
        "    if (warp_id() > 0",
        "race",
    ),
    Mutation(
        "no_barrier_in_mean",
        STATISTICS,
        "    sync_block();\n    if (thread_id() != 0",
        "    if (thread_id() != 0",
        "race",
    ),
    plain("mean_of_one_warp_only", STATISTICS, "sum += s.totals[w];", "(void)s;"),
    plain("bad_gradient_in_statistics", STATISTICS, "square < INFINITY ? square : 0", "square"),
    plain("mean_of_the_other_side", STATISTICS, "t.rows, t.columns, 0}", "t.rows, t.rows, 0}"),
    plain("old_scales_stay", STATISTICS, "t.second_scales[i] = Workspace(t).scales[i];", "return;"),
    plain("only_the_first_scales_move", STATISTICS, "(unit - t.first_unit) * kThreads", "(0 * unit)"),
    # scalars of the device
    plain("found_inf_ignored", TENSORS, "d.found_inf && *d.found_inf != 0", "false"),
    plain("step_not_counted", TENSORS, "*q.steps[i] += 1", "*q.steps[i] += 0"),
    plain("step_of_before", TENSORS, "static_cast<uint32_t>(*t.step) + 1", "static_cast<uint32_t>(*t.step)"),
    plain("grad_scale_ignored", TENSORS, "c.grad_factor / *c.device.grad_scale", "c.grad_factor"),
    plain("no_bias_correction_on_device", TENSORS, "d.correct_bias ? -expm1f(t * d.log_beta2)", "d.correct_bias ? 1"),
    # 16-bit parameters
    plain("random_half_twice", MASTER, "round_up_by(p[i], r & 0xffff)", "round_up_by(p[i], r >> 16)"),
    plain("stream_ignored", MASTER, "static_cast<uint64_t>(t.stream) << 32", "0"),
    plain("residual_without_sign", MASTER, "static_cast<int16_t>(residuals", "static_cast<uint16_t>(residuals"),
    plain("master_rounded_down", MASTER, "(master + 0x8000) >> 16", "master >> 16"),
]
DEVICE = types.SimpleNamespace(torch=torch.device("cpu"), kind="emulated")


def check_forms():
    """Every form, blocks with tails, rows across blocks, tiles of rows; one gradient is infinite."""
    for dtype in (torch.float32, torch.bfloat16):
        forms = ["4bit", "8bit", "32bit", "rank1", "factored", "4bit", "32bit"]
        slots = [make_slot((3, 111), dtype, None, RULES["adam"], form) for form in forms]
        slots[0].second[-1], slots[0].second_scales[-1] = 0, 1e4
        slots[0].second[-1, -1] = 0xF0  # the code of element 127 means nothing, but is the largest of its block
        for got, slot in zip(run_step(slots, DEVICE, RULES["adam"]), slots, strict=True):
            assert_step(got, slot, RULES["adam"])
    for form in ("rank1", "factored"):
        slot = make_slot((260, 3), torch.float32, None, RULES["adamw"], form)
        slot.grad[7, 1] = float("inf")
        clean = slot.map(torch.clone)
        clean.grad[7, 1] = 0
        got, without = run_step([slot, clean], DEVICE)
        assert_step(without, clean)
        assert got.second_scales.isfinite().all()
        if form == "factored":  # in rank-1 the element that restarts may have been the largest
            torch.testing.assert_close(got.second_scales, without.second_scales)
    slot = make_slot((300,))
    slot.grad[7] = float("inf")
    assert run_step([slot], DEVICE)[0].second_scales.isfinite().all()


def check_rules():
    for name, o in RULES.items():
        slots = [make_slot((150,), torch.float32, None, o, form) for form in ("4bit", "32bit")[name == "sgd" :]]
        for got, slot in zip(run_step(slots, DEVICE, o), slots, strict=True):
            assert_step(got, slot, o)


def check_device_scalars():
    o = RULES["adamw"]._replace(capturable=True)
    slot = make_slot((150,), torch.float32, None, o, "4bit")
    scaled = dataclasses.replace(slot, grad=slot.grad * 1024)
    scalars = {"grad_scale": torch.tensor(1024.0), "found_inf": torch.tensor(0.0)}
    got = run_step([scaled], DEVICE, o, **scalars)[0]
    assert_step(dataclasses.replace(got, grad=slot.grad), slot, o)
    skipped = run_step([slot], DEVICE, o, found_inf=torch.tensor(1.0))[0]
    assert all(torch.equal(a, b) for a, b in zip(skipped.tensors().values(), slot.tensors().values(), strict=True))


def check_halves():
    o = RULES["adamw"]
    wide = make_slot((150,), torch.float32, torch.bfloat16, o, "4bit", stream=5)
    wide.param = wide.param.bfloat16().float()
    drawn = dataclasses.replace(wide.map(torch.clone), param=wide.param.bfloat16())
    call([drawn], o._replace(stochastic_rounding=True))
    high, residual = reference.split_master(wide.param)
    split = dataclasses.replace(wide.map(torch.clone), param=high, residual=residual)
    for _ in range(2):
        call([wide, split], o)
        assert torch.equal(reference.join_master(split.param, split.residual), wide.param)
        assert torch.equal(split.param, reference.split_master(wide.param)[0])
        if wide.step == 7:
            random = reference.random_bits(150, 0, 5, 7)
            assert torch.equal(drawn.param, reference.round_stochastically(wide.param, random, torch.bfloat16))


def check():
    torch.manual_seed(0)
    check_forms()
    check_rules()
    check_device_scalars()
    check_halves()
