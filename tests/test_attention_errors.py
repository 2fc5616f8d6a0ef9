"""Bad input to attention: every documented error, and thousands of random calls."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tilewise as tw
from harness.strides import moved
from tilewise.reference import attention as reference


def tensors(device, **changes):
    """q, k, v of one valid call, some replaced."""
    shapes = {"q": (1, 4, 5, 64), "k": (1, 2, 6, 64), "v": (1, 2, 6, 64)}
    return [changes.get(name, torch.randn(s, device=device.torch)) for name, s in shapes.items()]


ERRORS = {
    "q-3d": (ValueError, "attention: q has shape .* expected 4 dimensions", {"q": torch.zeros(4, 5, 64)}),
    "k-batch": (ValueError, "attention: k has batch 2, expected 1", {"k": torch.zeros(2, 2, 6, 64)}),
    "k-dim": (ValueError, "attention: k has head dim 128, expected 64", {"k": torch.zeros(1, 2, 6, 128)}),
    "v-batch": (ValueError, "attention: v has batch 3, expected 1", {"v": torch.zeros(3, 2, 6, 64)}),
    "v-heads": (ValueError, "attention: v has 1 heads, expected 2", {"v": torch.zeros(1, 1, 6, 64)}),
    "v-keys": (ValueError, "attention: v has 7 keys, expected 6", {"v": torch.zeros(1, 2, 7, 64)}),
    "heads": (ValueError, "attention: q has 3 heads, expected a multiple of 2", {"q": torch.zeros(1, 3, 5, 64)}),
    "strided": (ValueError, "attention: q has stride 2 in its last", {"q": torch.zeros(1, 4, 5, 128)[..., ::2]}),
    "f64": (TypeError, "attention: q has dtype float64", {"q": torch.zeros(1, 4, 5, 64).double()}),
    "mixed": (
        TypeError,
        "attention: k has dtype bfloat16, expected float32",
        {"k": torch.zeros(1, 2, 6, 64).bfloat16()},
    ),
    "list": (TypeError, "attention: v is a list, expected a torch.Tensor", {"v": [1.0]}),
    "wide": (
        NotImplementedError,
        "attention: q has head dim 264, expected",
        {"q": torch.zeros(1, 4, 5, 264), "k": torch.zeros(1, 2, 6, 264)},
    ),
}


@pytest.mark.parametrize("error,message,changes", ERRORS.values(), ids=ERRORS)
def test_errors(device, error, message, changes):
    changes = {name: moved(t, device.torch) if isinstance(t, torch.Tensor) else t for name, t in changes.items()}
    with pytest.raises(error, match=message):
        tw.attention(*tensors(device, **changes))


def test_bad_outputs(device):
    q, k, v = tensors(device)
    out, lse = torch.empty_like(q), torch.empty(1, 4, 5, device=device.torch)
    write = torch.ops.tilewise.attention_out
    with pytest.raises(ValueError, match="attention: out has shape"):
        write(q, k, v, out[:, :2], lse)
    with pytest.raises(ValueError, match="attention: out overlaps"):
        write(q, k, v, q, lse)
    with pytest.raises(ValueError, match="attention: out has stride 0"):
        write(q, k, v, out[:, :, :1].expand(-1, -1, 5, -1), lse)
    with pytest.raises(TypeError, match="attention: lse has dtype float16"):
        write(q, k, v, out, lse.half())
    with pytest.raises(ValueError, match="attention: lse has shape"):
        write(q, k, v, out, lse[:, :3])
    with pytest.raises(ValueError, match="attention: lse is not contiguous"):
        write(q, k, v, out, torch.empty(1, 5, 4, device=device.torch).transpose(1, 2))


@pytest.mark.parametrize(
    "message,q_offsets,options",
    [
        ("cu_seqlens_q has dtype int64", torch.tensor([0, 4]), {}),
        ("cu_seqlens_q has shape", torch.tensor([[0, 4]], dtype=torch.int32), {}),
        ("cu_seqlens_q is empty", torch.tensor([], dtype=torch.int32), {}),
        ("cu_seqlens_k has shape", torch.tensor([0, 2, 4], dtype=torch.int32), {}),
        ("max_seqlen_q is -1", torch.tensor([0, 4], dtype=torch.int32), {"max_seqlen_q": -1}),
    ],
)
def test_varlen_errors(device, message, q_offsets, options):
    q, k, v = (torch.zeros(4, 1, 64, device=device.torch) for _ in range(3))
    offsets = torch.tensor([0, 4], dtype=torch.int32, device=device.torch)
    with pytest.raises((ValueError, TypeError), match=f"attention_varlen: {message}"):
        tw.attention_varlen(q, k, v, q_offsets.to(device.torch), offsets, **options)


def test_varlen_length_too_small():
    """On CPU a bound below the longest sequence is an error; on CUDA it counts as a bad offset."""
    q, k, v = (torch.zeros(9, 1, 64) for _ in range(3))
    offsets = torch.tensor([0, 2, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="attention_varlen: max_seqlen_k is 6, expected at least 7"):
        tw.attention_varlen(q, k, v, offsets, offsets, max_seqlen_k=6)


SIZES, DIMS = st.integers(0, 5), st.sampled_from([0, 1, 3, 8, 16, 257])
VALUES = st.sampled_from([0.0, 1.0, 1e30, -1e30, math.nan, math.inf, -math.inf])
TYPES = st.sampled_from([torch.float32] * 4 + [torch.float16, torch.bfloat16, torch.float64, torch.int32])


@st.composite
def any_tensor(draw, like=None):
    """Mostly tensors that fit ``like``, sometimes anything."""
    fits = draw(st.integers(0, 9)) > 0
    if like is None or not fits:
        shape = [draw(SIZES) for _ in range(draw(st.sampled_from([4, 4, 4, 4, 3, 2])) - 1)] + [draw(DIMS)]
        dtype = draw(TYPES)
    else:
        shape, dtype = list(like.shape), like.dtype
    t = torch.randn(shape).to(dtype)
    if t.numel() and draw(st.integers(0, 3)) == 0 and dtype.is_floating_point:
        t.view(-1)[draw(st.integers(0, t.numel() - 1))] = draw(VALUES)
    layout = draw(st.integers(0, 5))
    if layout == 0 and t.ndim == 4:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t.transpose(-1, -2) if layout == 1 else t


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_call(data):
    """A documented error or the right result; the inputs stay as they were."""
    q = data.draw(any_tensor())
    k = data.draw(any_tensor(q))
    v = data.draw(any_tensor(k))
    causal, scale = data.draw(st.booleans()), data.draw(st.sampled_from([None, 0.5, -1.0, 0.0]))
    before = [t.clone() for t in (q, k, v)]
    try:
        out, lse = tw.attention(q, k, v, causal=causal, scale=scale, return_lse=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert str(error).startswith("attention: ")
    else:
        assert out.dtype == q.dtype and lse.shape == q.shape[:3]
        if all(t.isfinite().all() and (t.abs() < 1e3).all() for t in before):
            exact, exact_lse = reference.attention(*(t.double() for t in before), causal=causal, scale=scale)
            torch.testing.assert_close(out.double(), exact, atol=5e-2, rtol=5e-2)
            torch.testing.assert_close(lse.double(), exact_lse, atol=1e-2, rtol=1e-2)
    for t, same in zip((q, k, v), before, strict=True):
        torch.testing.assert_close(t, same, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=1000, deadline=None)
@given(
    cu_q=st.lists(st.integers(-2, 8), max_size=5),
    cu_k=st.lists(st.integers(-2, 8), max_size=5),
    lengths=st.tuples(*[st.one_of(st.none(), st.integers(-1, 9))] * 2),
    rising=st.booleans(),
)
def test_any_offsets(cu_q, cu_k, lengths, rising):
    if rising:
        cu_q, cu_k = [0, *sorted(map(abs, cu_q))], [0, *sorted(map(abs, cu_k))]
        cu_k = (cu_k + [8] * 5)[: len(cu_q)]
    q, k, v = torch.randn(6, 2, 8), torch.randn(7, 1, 8), torch.randn(7, 1, 8)
    offsets = [torch.tensor(c, dtype=torch.int32) for c in (cu_q, cu_k)]
    try:
        out = tw.attention_varlen(q, k, v, *offsets, max_seqlen_q=lengths[0], max_seqlen_k=lengths[1])
    except ValueError as error:
        assert str(error).startswith("attention_varlen: ")
        return
    expected = torch.zeros_like(q)
    expected[: cu_q[-1]] = reference.attention_varlen(q, k, v, *offsets)[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
