"""Joining partial results: against one call over all keys, in values and gradients, on every device."""

import math

import pytest
import torch

import tilewise as tw
from attention_cases import DTYPES, Shape, inputs, judge
from harness.judge import assert_accurate, draws, yardsticks


def parts_of(shape, count, dtype, device):
    outs = [torch.randn(shape).to(device.torch, dtype) for _ in range(count)]
    lses = [3 * torch.randn(shape[:-1], device=device.torch) for _ in range(count)]
    return outs, lses


def plain(*parts):
    """(out, lse) by the formula; ``parts`` are the outs, then the lses."""
    outs, lses = parts[: len(parts) // 2], torch.stack(parts[len(parts) // 2 :])
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == -math.inf, 0)).exp()
    return sum(o * w[..., None].to(o) for o, w in zip(outs, weights, strict=True)), lse


def with_gradients(run, parts, dout, dlse):
    leaves = [t.detach().clone().requires_grad_() for t in parts]
    out, lse = run(*leaves)
    return out, lse, *torch.autograd.grad((out, lse), leaves, (dout.to(out), dlse.to(lse)))


def merged(*parts):
    return tw.merge_attention(parts[: len(parts) // 2], parts[len(parts) // 2 :])


@pytest.mark.modes
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "count,shape", [(1, (1, 2, 3, 8)), (2, (2, 3, 5, 64)), (3, (1, 1, 7, 33)), (16, (1, 2, 2, 256))]
)
def test_against_formula(device, dtype, count, shape):
    outs, lses = parts_of(shape, count, dtype, device)
    lses[0][..., 0] = -math.inf
    dout, dlse = torch.randn(shape).to(device.torch, dtype), torch.randn(shape[:-1], device=device.torch)
    got = with_gradients(merged, (*outs, *lses), dout, dlse)
    run = lambda *t: with_gradients(plain, t[:-2], *t[-2:])  # noqa: E731
    rulers = yardsticks([run], [*outs, *lses, dout, dlse], draws(dout.numel()))
    blind = count == 1  # those rows have no defined gradient by the formula
    for i, (result, ruler) in enumerate(zip(got, rulers, strict=True)):
        if blind:
            result = result[:, :, 1:] if result.ndim == 4 else result[..., 1:]
            ruler.exact = ruler.exact[:, :, 1:] if ruler.exact.ndim == 4 else ruler.exact[..., 1:]
            ruler.errors = [e[e == e] for e in ruler.errors]
        assert_accurate(str(i), result, ruler, 2 if i < 2 else 3)


def test_more_parts_than_at_a_time(device):
    outs, lses = parts_of((1, 2, 3, 16), 40, torch.float32, device)
    out, lse = tw.merge_attention(outs, lses)
    expected, expected_lse = plain(*[t.double() for t in (*outs, *lses)])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.modes
def test_rows_that_nobody_saw(device):
    """0 and -inf; NaN in a part without weight does not show, and no gradient is NaN."""
    outs, lses = parts_of((1, 1, 4, 64), 2, torch.float32, device)
    for lse in lses:
        lse[..., 0] = -math.inf
    lses[1][..., 1] = -math.inf
    outs[1][..., 1, :] = math.nan
    leaves = [t.requires_grad_() for t in (*outs, *lses)]
    out, lse = merged(*leaves)
    assert (out[..., 0, :] == 0).all() and (lse[..., 0] == -math.inf).all()
    torch.testing.assert_close(out[..., 1, :], outs[0][..., 1, :])
    grads = torch.autograd.grad(out.sum() + lse[..., 1:].sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert all((g[..., 0, :] == 0).all() for g in grads[:2]) and all((g[..., 0] == 0).all() for g in grads[2:])


def test_strided_parts(device):
    outs, lses = parts_of((2, 3, 5, 64), 2, torch.bfloat16, device)
    expected = tw.merge_attention(outs, lses)
    turned = [o.transpose(1, 2).contiguous().transpose(1, 2) for o in outs]
    got = tw.merge_attention(turned, [lses[0].transpose(0, 1).contiguous().transpose(0, 1), lses[1]])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_packed(device):
    outs = [torch.randn(7, 2, 64, device=device.torch) for _ in range(2)]
    lses = [torch.randn(2, 7, device=device.torch) for _ in range(2)]
    out, lse = tw.merge_attention(outs, lses)
    expected, expected_lse = plain(*[o.transpose(0, 1) for o in outs], *lses)
    torch.testing.assert_close(out.transpose(0, 1), expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_split_keys(device, dtype):
    """Two halves of the keys, joined, beside one call over all: values and gradients, lse's own included."""
    shape = Shape(1, 4, 2, 33, 70, 64, 64).on(device)
    tensors = inputs(shape, dtype, device)
    half = shape.keys // 2

    def joined(q, k, v):
        halves = [tw.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(half), slice(half, None))]
        return tw.merge_attention(*zip(*halves, strict=True))

    from tilewise.reference import attention as reference

    dout = torch.randn(*tensors[0].shape[:3], 64).to(device.torch, dtype)
    judge(joined, lambda q, k, v: reference.attention(q, k, v), tensors, dout, dtype)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "dense"])
def test_shared_prefix(device, causal):
    q, k, v = inputs(Shape(3, 4, 2, 9, 12, 64, 64), torch.float32, device)
    prefix_k, prefix_v = (torch.randn(1, 2, 40, 64, device=device.torch) for _ in range(2))
    leaves = [t.requires_grad_() for t in (q, prefix_k, prefix_v, k, v)]
    out = tw.shared_prefix_attention(*leaves, causal=causal)
    joined = [torch.cat([p.expand(3, -1, -1, -1), own], 2) for p, own in ((prefix_k, k), (prefix_v, v))]
    expected, _ = tw.attention(q, *joined, causal=causal, return_lse=True)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    for got, right in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="shared_prefix_attention: prefix_k has shape"):
        tw.shared_prefix_attention(q, k, v, k, v)


def test_errors():
    outs, lses = [torch.randn(1, 2, 3, 8)] * 2, [torch.randn(1, 2, 3)] * 2
    for bad, kind, message in (
        ((outs, lses[:1]), ValueError, "got 2 outs and 1 lses"),
        (([], []), ValueError, "got 0 outs"),
        (([outs[0], outs[0].half()], lses), TypeError, "outs has dtype"),
        (([outs[0], outs[0][:, :1]], lses), ValueError, "outs has shape"),
        ((outs, [lses[0], lses[0][..., :2]]), ValueError, "lses has shape"),
        ((outs, [lses[0], lses[0].double()]), TypeError, "lses has dtype"),
        ((outs, [lses[0], 3]), TypeError, r"lses\[1\] is a int"),
        (([outs[0][0, 0]] * 2, lses), ValueError, "outs has 2 dimensions"),
    ):
        with pytest.raises(kind, match=f"merge_attention: {message}"):
            tw.merge_attention(*bad)


def test_opcheck():
    outs, lses = (
        [torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(2)],
        [torch.randn(1, 2, 3) for _ in range(2)],
    )
    ops = torch.ops.tilewise
    torch.library.opcheck(ops.merge_attention.default, (outs, lses))
    outs = [o.detach() for o in outs]
    out, lse = tw.merge_attention(outs, lses)
    torch.library.opcheck(ops.merge_attention_backward.default, (out, lse, outs, lses, out, lse))
