"""Inputs and judgement shared by the attention tests."""

import math
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F

from harness.judge import assert_accurate, doubled, draws, yardsticks
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
        """The shape, reduced to what an emulated device runs in a moment."""
        if not device.small:
            return self
        heads = 2 if self.heads > self.kv_heads > 0 else min(self.heads, 1)
        most = 70 if self.dim <= 64 else 40
        return replace(
            self,
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


def with_gradients(run, tensors, dout, dlse, dtype):
    """(out, lse, dq, dk, dv, ...) of run(q, k, v, ...) -> (out, lse), all in ``dtype`` arithmetic.

    What stands behind v keeps the type it has, unless all is float64.
    """
    keep = lambda t, i: t if i > 2 and dtype != torch.float64 else t.to(dtype)  # noqa: E731
    leaves = [keep(t.detach(), i).clone().requires_grad_() for i, t in enumerate(tensors)]
    out, lse = run(*leaves)
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (dout.to(out), dlse.to(lse)))


class FlashAttend(torch.autograd.Function):
    """reference.attend with the gradients of FlashAttention, in plain torch: from lse and rowsum(dO * O)."""

    @staticmethod
    def forward(ctx, scores, v, factors=None):
        with torch.no_grad():
            out, lse = attend(scores, v, factors)
        ctx.save_for_backward(scores, v, factors, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        scores, v, factors, out, lse = ctx.saved_tensors
        factors = 1 if factors is None else factors
        blind = lse == -math.inf
        weights = (scores - lse.masked_fill(blind, 0)[..., None]).exp().masked_fill(blind[..., None], 0)
        dweights = F.pad((dout @ v.transpose(-1, -2)) * factors, (0, scores.shape[-1] - v.shape[-2]))
        delta = (dout * out).sum(-1) - dlse.masked_fill(blind, 0)
        dv = (weights[..., : v.shape[-2]] * factors).transpose(-1, -2) @ dout
        return weights * (dweights - delta[..., None]), dv, None


attend = reference.attend


def flash(plain):
    """``plain`` with fused attention in place of its formula: gradients through rowsum(dO * O), as ours.

    torch's own operator, where it defines the result: rows that see something, and no options; else FlashAttend. Also
    on CUDA, where the operator may choose to be the formula again, and equal terms that cancel then leave no error.
    """

    def fused(q, k, v, *, causal=False, scale=None, **options):
        queries, keys = q.shape[2], k.shape[2]
        if options or q.is_cuda or not q.numel() or not k.numel() or (causal and queries > keys):
            with mock.patch.object(reference, "attend", FlashAttend.apply):
                return formula(q, k, v, causal=causal, scale=scale, **options)
        _, lse = formula(q, k, v, causal=causal, scale=scale)
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries) if causal else None
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return out, lse

    formula = reference.attention

    def run(*tensors):
        with mock.patch.object(reference, "attention", fused):
            return plain(*tensors)

    return run


GRADIENTS = ("dq", "dk", "dv")


def judge(kernel, plain, tensors, dout, dtype, gradients=GRADIENTS):
    """kernel(q, k, v, ...) -> (out, lse) and its gradients beside plain torch in the same dtype, both against float64.

    torch's errors are those of its two ways, formula and fused operator.
    """
    dlse = torch.randn(plain(*tensors)[1].shape).to(dout)
    out, lse, *got = with_gradients(kernel, tensors, dout, dlse, dtype)
    exact_lse = plain(*doubled(tensors))[1]
    assert_lse_close(lse, exact_lse)

    def evaluated(run):
        def evaluate(*tensors_and_gradients):
            *tensors, dout, dlse = tensors_and_gradients
            out, _, *gradients = with_gradients(run, tensors, dout, dlse, tensors[0].dtype)
            return out, *gradients

        return evaluate

    ways = [evaluated(plain), evaluated(flash(plain))]
    independent = min([8 * lse.numel(), *(t.numel() for t in tensors[3:])])
    rulers = yardsticks(ways, [*tensors, dout, dlse], draws(independent))
    for i, (name, result, ruler) in enumerate(zip(("out", *gradients), (out, *got), rulers, strict=True)):
        assert_accurate(name, result, ruler, 3 if i else 2)


def assert_lse_close(got, exact, terms=1.0):
    """Some roundings of float32, whatever the dtype of the inputs; -inf exactly where it belongs.

    ``terms``: the size of what a score is the sum of, where that is more than scores are.
    """
    got, exact = got.cpu().double(), exact.cpu()
    seen = exact > -math.inf
    assert torch.equal(got > -math.inf, seen), "lse is -inf in other places"
    errors = (got - exact)[seen].abs()
    if seen.any():
        assert errors.max() <= 2e-6 * exact[seen].abs().max().clamp_min(terms), f"lse: largest error {errors.max():.2e}"


def another_kernel(device, dtype, group, queries):
    """Whether CUDA lets few queries of a group of heads share a tile, if a sequence is alone."""
    return device.kind != "cpu" and group > 1 and queries <= 32 and dtype != torch.float32


def assert_same(device, got, expected, group, queries):
    """Bit for bit; to rounding where another kernel serves a sequence that is alone."""
    close = 4 * torch.finfo(expected.dtype).eps if another_kernel(device, expected.dtype, group, queries) else 0
    torch.testing.assert_close(got, expected, rtol=close, atol=close)
