"""Seeded bugs in the 8-bit codes."""

import torch

import tilewise as tw
from harness.mutations import Mutation
from tilewise.reference import optim as reference

FAMILY = "optim"
CODEC, KERNEL = "optim/cuda/codec8.h", "optim/cuda/quantize.h"
RUN = "  using Values = typename Lane::Values;\n\n  SIMT_DEVICE static void run(const Params& q, Smem& s) {\n"
FILL = "    s.tables.fill();\n"
MUTATIONS = [
    Mutation("no_barrier_after_tables", KERNEL, RUN + FILL + "    sync_block();\n", RUN + FILL, "race"),
    Mutation("words_not_exchanged", CODEC, "      swap_bit(words, 2, 2);\n", "", "plain"),
    Mutation("class_too_high", CODEC, "- kStart) >> 24", "- kStart + (1u << 21)) >> 24", "plain"),
    Mutation("beyond_the_decade", CODEC, "1.f / 9, kRoundBias), last)", "1.f / 9, kRoundBias), last + 1)", "plain"),
    Mutation("border_of_the_decade", CODEC, "biased == last ? bits_f32(words.w) : inner", "inner", "plain"),
    Mutation(
        "product_rounded",
        CODEC,
        "fmaf(-midpoint, scale, product) > fmaf(-factor, a, product)",
        "product > midpoint * scale",
        "plain",
    ),
    Mutation("tie_up", CODEC, "product) > fmaf(-factor", "product) >= fmaf(-factor", "plain"),
    Mutation("minus_one", CODEC, "return ordinal < 128 ? 127 - ordinal : 0;", "return 127 - ordinal;", "plain"),
    Mutation(
        "zero_decoded",
        CODEC,
        "fmaxf(fmaf(18, half_up, bits_f32(words.x)), 0)",
        "fmaf(18, half_up, bits_f32(words.x))",
        "plain",
    ),
    Mutation("sign_lost", CODEC, "(f32_bits(from_zero) & 0x80000000u)", "0u", "plain"),
    Mutation("wrong_octet", CODEC, "64 * (part >> 2) + 16 * (c & 3)", "64 * (c & 1) + 16 * (part & 3)", "plain"),
    Mutation(
        "scale_of_half_a_block",
        CODEC,
        "{ return fmaxf(warp_max(absmax, kOctet)",
        "{ return fmaxf(warp_max(absmax, 4)",
        "plain",
    ),
]


def check():
    torch.manual_seed(0)
    for signed in (True, False):
        middle = reference.midpoints8(signed) / 8e7
        for scale in (9765.625, 0.7182818):  # ties, and none
            scale = torch.tensor(scale)
            at = (middle * scale.double()).float()
            values = torch.cat([scale[None], at, at.nextafter(scale * 2), at.nextafter(-scale)])
            values = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(-1, 256)
            values[1:, -1] = scale  # in the other half of the block
            if signed:
                values[1] *= -1
            indices, scales = reference.quantize(values, signed, bits=8)
            codes, got_scales = tw.optim.quantize_state(values, signed=signed, bits=8)
            assert torch.equal(got_scales, scales) and torch.equal(codes.long(), indices)
            decoded = tw.optim.dequantize_state(codes, scales, values.shape, signed=signed, bits=8)
            assert torch.equal(decoded, reference.dequantize(indices, scales, values.shape, signed, bits=8))
