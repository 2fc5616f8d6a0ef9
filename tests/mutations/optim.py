"""Seeded bugs in the optim kernels."""

import torch

import tilewise as tw
from harness.mutations import Mutation
from tilewise.reference import optim as reference

STEP, CODEC = "optim/cuda/adamw.h", "optim/cuda/codec.h"
MUTATIONS = [
    Mutation("no_barrier_after_table", STEP, "    sync_block();\n", "", "race"),
    Mutation("no_sync_before_write", STEP, "    sync_warp();  // a quad's", "    // a quad's", "race"),
    Mutation("nibble_order", CODEC, "8 * (c & 3) + 4 * (c >> 2)", "4 * c", "plain"),
    Mutation("halves_not_exchanged", CODEC, "kept | shfl_xor(given, 1)", "kept", "plain"),
    Mutation("tail_dropped", STEP, "valid = start < t.n;", "valid = start + kBlock <= t.n;", "plain"),
    Mutation("scale_of_the_other", STEP, "scales[1] * k.beta2", "scales[0] * k.beta2", "plain"),
    Mutation("no_bias_correction", STEP, "fmaf(sqrt_approx(v), t.inv_correction2, k.eps)", "sqrt_approx(v)", "plain"),
    Mutation("chunk_of_another_tensor", STEP, "chunk - t.first_chunk", "chunk", "plain"),
    Mutation("bad_moment_kept", STEP, "square = finite ? square : 0;", "", "plain"),
    Mutation("second_moment_midpoint", CODEC, "fmaf(e, e, -.5f)", "e * e", "plain"),
    Mutation("midpoint_rounded_up", CODEC, "bits_f32(f32_bits(product) - 1) : product", "product : product", "plain"),
]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def moments(p, m, v, scales):
    if m.dtype is torch.float32:
        return m.clone(), v.clone()
    decode = lambda codes, i: reference.dequantize(reference.unpack(codes), scales[:, i], p.shape, i == 0)  # noqa: E731
    return decode(m, 0), decode(v, 1)


def check_steps():
    """Three steps of whole blocks, tails and 32-bit states; the second one meets an infinite gradient."""
    shapes = [(300, torch.float32), (129, torch.bfloat16), (20, torch.float32)]
    params = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n, dtype in shapes]
    optimizer = tw.optim.AdamW(params, min_quantized_size=100, **OPTIONS)
    for step in (1, 2, 3):
        for p in params:
            p.grad = torch.randn_like(p)
        if step == 2:
            params[0].grad[7] = float("inf")
        names = "exp_avg", "exp_avg_sq", "scales"
        states = [[optimizer.state[p].get(name) for name in names] if step > 1 else None for p in params]
        before = [
            (p.detach().clone().float(), p.grad.float(), s and moments(p, *s))
            for p, s in zip(params, states, strict=True)
        ]
        optimizer.step()
        for p, (old, grad, state) in zip(params, before, strict=True):
            m, v = state or (torch.zeros_like(old), torch.zeros_like(old))
            expected, m, v = reference.adamw_step(old, grad, m, v, step, **OPTIONS)
            tolerance = {"rtol": 1e-5 if p.dtype is torch.float32 else 8e-3, "atol": 1e-6, "equal_nan": True}
            torch.testing.assert_close(p.detach().float(), expected, **tolerance)
            m, v = m.where(v.isfinite(), 0), v.where(v.isfinite(), 0)
            got = moments(p, *(optimizer.state[p].get(name) for name in names))
            if "scales" in optimizer.state[p]:
                m, v = (reference.dequantize(*reference.quantize(x, x is m), x.shape, x is m) for x in (m, v))
            for a, b in zip(got, (m, v), strict=True):
                assert ((a - b).abs() > 1e-5 * b.abs().max()).sum() <= 1  # a code near a midpoint


def check_quantize():
    for book, signed in ((reference.SIGNED_CODES, True), (reference.UNSIGNED_CODES, False)):
        middle = (book[1:] + book[:-1]) / 2
        for scale in torch.rand(8):
            at = (middle * scale).float()
            values = torch.cat([at, at.nextafter(scale * 2), at.nextafter(-scale * 2), scale[None]])
            indices, _ = reference.quantize(values, signed)
            codes, _ = tw.optim.quantize_state(values, signed=signed)
            assert torch.equal(reference.unpack(codes)[0, : values.numel()], indices[0, : values.numel()])


def check():
    torch.manual_seed(0)
    check_steps()
    check_quantize()
