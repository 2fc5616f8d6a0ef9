"""Third-order attention against its definition, with gradients."""

import math

import pytest
import torch

import tilewise as tw
from attention_cases import DTYPES, assert_lse_close
from harness.judge import assert_accurate, doubled, draws, yardsticks

NAMES = ("out", "dq", "dk1", "dk2", "dv1", "dv2")


def plain(q, k1, k2, v1, v2, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = scale * torch.einsum("bhid,bhjd,bhkd->bhijk", q, k1, k2)
    weights = scores.flatten(-2).softmax(-1).view(scores.shape)
    return torch.einsum("bhijk,bhjd,bhkd->bhid", weights, v1, v2), scores.flatten(-2).logsumexp(-1)


def with_gradients(run, tensors, dout, dlse):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = run(*leaves)
    return out, *torch.autograd.grad((out, lse), leaves, (dout.to(out), dlse.to(lse)))


def tensors_of(queries, first, second, dim, v_dim, dtype, device):
    shapes = ((queries, dim), (first, dim), (second, dim), (first, v_dim), (second, v_dim))
    return [torch.randn(2, 2, *shape).to(device.torch, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", [(9, 13, 21, 64, 64), (1, 1, 5, 64, 64)], ids=str)
def test_against_definition(device, sizes, dtype):
    tensors = tensors_of(*sizes, dtype, device)
    dout = torch.randn(2, 2, sizes[0], sizes[4]).to(tensors[0])
    dlse = torch.randn(2, 2, sizes[0], device=device.torch)
    ours = lambda *t: tw.tensor_attention(*t, return_lse=True)  # noqa: E731
    if dtype == torch.float32:  # 16-bit rows q * k1 are rounded
        assert_lse_close(ours(*tensors)[1], plain(*doubled(tensors))[1])
    got = with_gradients(ours, tensors, dout, dlse)
    run = lambda *t: with_gradients(plain, t[:5], *t[5:])  # noqa: E731
    rulers = yardsticks([run], [*tensors, dout, dlse], draws(dout.numel()))
    for i, (name, result, ruler) in enumerate(zip(NAMES, got, rulers, strict=True)):
        assert_accurate(name, result, ruler, 3 if i else 2)


def test_several_chunks():
    """More rows than one call takes."""
    tensors = [torch.randn(1, 1, n, 16, requires_grad=True) for n in (7, 1500, 3, 1500, 3)]
    out = tw.tensor_attention(*tensors)
    expected, _ = plain(*(t.double() for t in tensors))
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(out)
    for got, right in zip(
        torch.autograd.grad(out, tensors, dout), torch.autograd.grad(expected, tensors, dout.double()), strict=True
    ):
        torch.testing.assert_close(got.double(), right.double(), rtol=1e-3, atol=1e-5)


def test_no_pairs():
    q, k, v = torch.randn(1, 1, 3, 8, requires_grad=True), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    for first, second in ((0, 4), (4, 0)):
        args = (k[:, :, :first], k[:, :, :second], v[:, :, :first], v[:, :, :second])
        out, lse = tw.tensor_attention(q, *args, return_lse=True)
        assert (out == 0).all() and (lse == -math.inf).all()
        assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()


def test_errors():
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 6)
    for args, kind, message in (
        ((q, k, k[..., :4], v, v), ValueError, "k2 has shape"),
        ((q, k, k, v[:, :, :2], v), ValueError, "v1 has shape"),
        ((q, k, k, v, v[..., :3]), ValueError, "v2 has shape"),
        ((q, k.half(), k, v, v), TypeError, "k1 has dtype"),
        ((q[0], k, k, v, v), ValueError, "q has shape"),
        ((None, k, k, v, 3), TypeError, "v2 is a int"),
    ):
        with pytest.raises(kind, match=f"tensor_attention: {message}"):
            tw.tensor_attention(*args)


def test_opcheck():
    tensors = [torch.randn(1, 2, n, 8, requires_grad=True) for n in (3, 4, 5, 4, 5)]
    torch.library.opcheck(torch.ops.tilewise.tensor_attention.default, (*tensors, 0.5))
