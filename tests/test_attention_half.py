"""Attention in fp16 at the ends of its range: inputs, weights and gradients that fp16 as it is could not hold."""

import pytest
import torch

import tilewise as tw
from attention_cases import Shape, inputs, judge
from tilewise.reference import attention as reference

pytestmark = pytest.mark.devices("cpu")
f16 = torch.float16
LARGEST = torch.finfo(f16).max


def scaled(tensors, sizes):
    return [(t.float() * size).clamp(-LARGEST, LARGEST).half() for t, size in zip(tensors, sizes, strict=True)]


# q, k, v and dout; gradients stay within what fp16 holds to some bits
SIZES = {
    "large-scores": (2e4, 2e4, 1, 300),  # inputs up to the largest number
    "large-values": (1, 1, 2e4, 1e-3),
    "large-gradients": (1, 1, 1, 2e3),
    "subnormal-scores": (1e-5, 1e-5, 1, 0.1),
    "subnormal-keys": (100, 1e-5, 1, 0.05),
    "subnormal-values": (1, 1, 4e-5, 1e3),
    "subnormal-gradients": (0.1, 0.1, 1e3, 4e-5),
}


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(device, sizes, causal):
    shape = Shape(1, 2, 1, 70, 90, 64, 64)
    dout = torch.randn(1, 2, 70, 64)
    *tensors, dout = scaled([*inputs(shape, f16, device), dout], sizes)
    options = {"causal": causal, "scale": 0.125 / sizes[0] / sizes[1]}
    kernel = lambda q, k, v: tw.attention(q, k, v, return_lse=True, **options)  # noqa: E731

    def plain(q, k, v):  # whose products would leave fp16's range
        out, lse = reference.attention(q.float(), k.float(), v.float(), **options)
        return out.to(q.dtype), lse

    judge(kernel, plain, tensors, dout, f16)


def test_scores_beyond_fp16(device):
    """Scores of millions choose one key."""
    q, k, v = scaled(inputs(Shape(1, 1, 1, 70, 200, 64, 64), f16, device), (2e4, 100, 1))
    out, lse = tw.attention(q, k, v, return_lse=True)
    best, chosen = (q.double() @ k.double().transpose(-1, -2) / 8).topk(2)
    decided = (best[..., 0] - best[..., 1] > 100)[0, 0]  # of float32's own errors, and more
    assert decided.sum() > 60
    expected = v[0, 0, chosen[0, 0, :, 0]]
    torch.testing.assert_close(out[0, 0, decided], expected[decided], rtol=2.0**-10, atol=0)  # two roundings
    torch.testing.assert_close(lse.double(), best[..., 0], rtol=2e-6, atol=1)


@pytest.mark.parametrize("first", [0.0, -30.0, 9.0], ids=["equal", "lower-first", "higher-first"])
def test_equal_scores(device, first):
    """The first key's score is what weights refer to; the others all have one weight and one rounding."""
    v = torch.randn(1, 1, 500, 64).half()
    q, k = torch.zeros(1, 1, 40, 64).half(), torch.zeros(1, 1, 500, 64).half()
    q[..., 0], k[:, :, 0, 0] = 1, first
    out, lse = tw.attention(q, k, v, scale=1.0, return_lse=True)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), scale=1.0)
    assert (out - exact).abs().max() <= 2.0**-10 * exact.abs().max()  # two roundings
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("powers", [(0, -12, 10), (10, 0, -12), (-12, 10, 0)], ids=str)
def test_gradients_of_many_sizes(device, powers, options):
    """Runs of 128 queries whose gradients differ by up to 2^22; the keys that only later ones see keep their own."""
    shape = Shape(1, 2, 1, 384, 384, 64, 64)
    q, k, v = inputs(shape, f16, device)
    sizes = torch.tensor(powers).repeat_interleave(128).exp2()[:, None]
    dout = (torch.randn(1, 2, 384, 64) * sizes).half()

    def gradients(attention, *tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        drops = {"generator": torch.Generator().manual_seed(7)} if "dropout_p" in options else {}
        out = attention(*leaves, causal=True, **options, **drops)
        return torch.autograd.grad(out, leaves, dout.to(out.dtype))

    got = gradients(tw.attention, q, k, v)
    if "dropout_p" in options:  # what is kept depends on the seed, and not on the type
        exact = gradients(tw.attention, q.float(), k.float(), v.float())
    else:
        exact = gradients(lambda *t, **given: reference.attention(*t, **given)[0], q.double(), k.double(), v.double())
    for name, one, right in zip(("dq", "dk", "dv"), got, exact, strict=True):
        for i in range(0, 384, 128):
            part, of = one[:, :, i : i + 128].double(), right[:, :, i : i + 128].double()
            assert (part - of).norm() < 4e-3 * of.norm(), f"{name} of rows {i} to {i + 127}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dout"])
def test_gradients_of_what_is_not_finite(device, which, bad):
    """It shows, and not in the queries of other tiles."""
    tensors = [*inputs(Shape(1, 1, 1, 150, 150, 64, 64), f16, device), torch.randn(1, 1, 150, 64).half()]

    def gradients():
        *leaves, dout = (t.clone().requires_grad_() for t in tensors)
        return torch.autograd.grad(tw.attention(*leaves, causal=True), leaves, dout.detach())

    clean = gradients()
    tensors[which][0, 0, 140, 3] = bad
    dq, dk, dv = gradients()
    assert not all(t.isfinite().all() for t in (dq, dk, dv))
    torch.testing.assert_close(dq[:, :, :128], clean[0][:, :, :128], atol=2e-3, rtol=2e-3)
