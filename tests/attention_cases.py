"""Inputs and judgement shared by the attention tests."""

from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F

from harness.judge import head_dim_orders
from tilewise.reference import attention as reference

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """q (batch, heads, queries, dim), k (batch, kv_heads, keys, dim), v (batch, kv_heads, keys, v_dim)."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    v_dim: int

    def __str__(self):
        return f"b{self.batch}-h{self.heads}:{self.kv_heads}-s{self.queries}x{self.keys}-d{self.dim}x{self.v_dim}"

    def on(self, device):
        """The shape, reduced to what a device's kernels serve, and to what an emulated one runs in a moment."""
        if device.kind == "cpu":
            return self
        dim = 64 if self.dim < 128 else 128
        served = replace(self, dim=dim, v_dim=dim)
        if device.kind == "cuda":
            return served
        heads = 2 if self.heads > self.kv_heads > 0 else min(self.heads, 1)
        most = 70 if dim == 64 else 40
        return replace(
            served,
            batch=min(self.batch, 1),
            heads=heads,
            kv_heads=min(self.kv_heads, 1),
            queries=min(self.queries, most + 6),
            keys=min(self.keys, most),
        )


def inputs(shape, dtype, device, layout="bhsd"):
    """q, k, v with heads before rows (bhsd), or rows before heads in memory (bshd)."""

    def one(heads, rows, dim):
        if layout == "bhsd":
            return torch.randn(shape.batch, heads, rows, dim).to(device.torch, dtype)
        return torch.randn(shape.batch, rows, heads, dim).to(device.torch, dtype).transpose(1, 2)

    return (
        one(shape.heads, shape.queries, shape.dim),
        one(shape.kv_heads, shape.keys, shape.dim),
        one(shape.kv_heads, shape.keys, shape.v_dim),
    )


def with_gradients(run, tensors, dout, dtype):
    """(out, lse, dq, dk, dv) of run(q, k, v) -> (out, lse), all in ``dtype`` arithmetic."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out, lse = run(*leaves)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))


def _reordered(run, order, tensors, dout, dtype):
    """The same computation with the head dimension summed in another order: another draw of its rounding errors."""
    q, k, v = tensors
    out, lse, dq, dk, dv = with_gradients(run, (q[..., order], k[..., order], v), dout, dtype)
    back = order.argsort()
    return out, lse, dq[..., back], dk[..., back], dv


def flash(plain):
    """``plain`` with torch's own fused attention in place of its formula: gradients through rowsum(dO * O), as ours.

    Where a row sees nothing, which torch's operator does not define, it stays with the formula.
    """

    def fused(q, k, v, *, causal=False, scale=None):
        out, lse = formula(q, k, v, causal=causal, scale=scale)
        queries, keys = q.shape[2], k.shape[2]
        if not q.numel() or not k.numel() or (causal and queries > keys):
            return out, lse
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries) if causal else None
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return out, lse.detach()

    formula = reference.attention

    def run(q, k, v):
        with mock.patch.object(reference, "attention", fused):
            return plain(q, k, v)

    return run


def judge(kernel, plain, tensors, dout, dtype):
    """kernel(q, k, v) -> (out, lse) and its gradients beside plain torch in the same dtype, both against float64.

    torch's error is the largest over its two ways, formula and fused operator, in several orders of the head dimension.
    """
    device = tensors[0].device
    orders = head_dim_orders(tensors[0].shape[-1], dout.numel())
    got = with_gradients(kernel, tensors, dout, dtype)
    exact = with_gradients(plain, tensors, dout, torch.float64)
    ways = (plain, flash(plain))
    found = [_reordered(way, o.to(device), tensors, dout, dtype) for way in ways for o in orders]
    assert_outputs_close(got, found, exact, dtype)


def _flat(t):
    return t.detach().double().cpu().flatten()


def assert_close(name, got, plain, exact, factor):
    """Worst and relative L2 error at most ``factor`` times the worst of torch's evaluations in the same dtype.

    A floor stands under torch's error, which on few elements can be small by chance or exactly zero: one rounding of a
    16-bit result, or the chain of roundings behind a float32 one; and in gradients what float32 leaves when dP and
    delta, of order one at unit variance, cancel (a single key).
    """
    got, exact, plain = _flat(got), _flat(exact), [_flat(p) for p in plain]
    assert got.shape == exact.shape, name
    if exact.numel() == 0:
        return
    epsilon, roundings = {"f16": (2**-11, 1), "bf16": (2**-8, 1), "f32": (2**-24, 8)}[name.split()[-1]]
    cancelled = 0 if name.startswith("out") else 2**-20
    worst = (got - exact).abs().max()
    plain_worst = max((p - exact).abs().max() for p in plain)
    allowed = factor * max(plain_worst, roundings * epsilon * exact.abs().max(), cancelled)
    assert worst <= allowed, f"{name}: worst error {worst:.2e}, expected at most {allowed:.2e}"
    relative, *plain_relative = ((t - exact).norm() / exact.norm().clamp_min(1e-30) for t in (got, *plain))
    bound = min(0.5, max(32 * epsilon, factor * max(plain_relative)))
    assert exact.norm() == 0 or relative <= bound, f"{name}: relative L2 error {relative:.2e}"


def assert_outputs_close(got, plain, exact, dtype):
    """For (out, lse, dq, dk, dv); ``plain`` is a list of such evaluations by torch."""
    label = next(k for k, v in DTYPES.items() if v == dtype)
    finite = ~exact[1].isinf()
    assert torch.equal(got[1].isinf().cpu(), exact[1].isinf().cpu()), "lse is -inf in other places"
    lse_error = (_flat(got[1]) - _flat(exact[1]))[finite.cpu().flatten()]
    largest = _flat(exact[1])[finite.cpu().flatten()].abs().clamp_min(1).max() if finite.any() else 1
    assert (lse_error.abs() <= 2e-6 * largest).all(), f"lse: worst error {lse_error.abs().max():.2e}"
    for i, name, factor in ((0, "out", 2), (2, "dq", 3), (3, "dk", 3), (4, "dv", 3)):
        assert_close(f"{name} {label}", got[i], [p[i] for p in plain], exact[i], factor)
