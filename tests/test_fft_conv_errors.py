"""Bad input to the long convolution: every documented error, and thousands of random calls."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import tilewise as tw
from harness.strides import moved
from tilewise.reference.fft_conv import fft_conv as reference


def good():
    return {"u": torch.randn(2, 3, 10), "k": torch.randn(3, 7)}


# name, replaced arguments, error, what the message says
BAD_CALLS = [
    ("u is no tensor", {"u": [1.0]}, TypeError, "u is a list"),
    ("float64", {"u": torch.randn(2, 3, 10).double()}, TypeError, "u has dtype float64"),
    ("integer filter", {"k": torch.ones(3, 7, dtype=torch.int32)}, TypeError, "k has dtype int32"),
    ("float64 filter", {"k": torch.ones(3, 7, dtype=torch.float64)}, TypeError, "k has dtype float64"),
    ("u of two dimensions", {"u": torch.randn(3, 10)}, ValueError, "u has shape"),
    ("u of four dimensions", {"u": torch.randn(1, 2, 3, 10)}, ValueError, "u has shape"),
    ("filter with a batch", {"k": torch.randn(1, 3, 7)}, ValueError, "k has shape"),
    ("filter of other heads", {"k": torch.randn(4, 7)}, ValueError, "k has shape"),
    ("filter longer than u", {"k": torch.randn(3, 11)}, ValueError, "k has length 11, expected at most 10"),
    ("transposed u", {"u": torch.randn(10, 3, 2).transpose(0, 2)}, ValueError, "u has stride"),
    ("strided filter", {"k": torch.randn(3, 14)[:, ::2]}, ValueError, "k has stride 2"),
    ("gate of another dtype", {"pregate": torch.randn(2, 3, 10).half()}, TypeError, "pregate has dtype float16"),
    ("gate of another shape", {"postgate": torch.randn(2, 1, 10)}, ValueError, "postgate has shape"),
    ("strided gate", {"postgate": torch.randn(2, 3, 20)[..., ::2]}, ValueError, "postgate has stride 2"),
    ("integer skip", {"skip": torch.ones(3, dtype=torch.int64)}, TypeError, "skip has dtype int64"),
    ("scalar skip", {"skip": torch.tensor(1.0)}, ValueError, "skip has shape"),
    ("out of another shape", {"out": torch.empty(2, 3, 9)}, ValueError, "y has shape"),
    ("out of another dtype", {"out": torch.empty(2, 3, 10).half()}, TypeError, "y has dtype float16"),
    ("expanded out", {"out": torch.empty(1, 3, 10).expand(2, 3, 10)}, ValueError, "y has stride 0"),
]


@pytest.mark.parametrize("name,arguments,error,text", BAD_CALLS, ids=[c[0] for c in BAD_CALLS])
def test_bad_calls(device, name, arguments, error, text):
    given = {**good(), **arguments}
    there = {n: moved(t, device.torch) if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    before = {n: t.clone() for n, t in there.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(error, match=text) as caught:
        tw.fft_conv(**there)
    assert str(caught.value).startswith("fft_conv: ")
    for n, t in before.items():
        assert n == "out" or torch.equal(there[n], t)


def test_out_must_not_overlap(device):
    memory = torch.randn(2, 3, 20, device=device.torch)
    u, k = memory[..., :10], torch.randn(3, 10, device=device.torch)
    for out in (u, memory[..., 5:15]):
        with pytest.raises(ValueError, match="y overlaps u"):
            tw.fft_conv(u, k, out=out)


# ---- thousands of random calls ----
_DTYPES = [torch.float32] * 6 + [torch.float16, torch.bfloat16, torch.float64, torch.int32]


@st.composite
def calls(draw):
    size = st.integers(0, 4)
    batch, heads, length = draw(size), draw(size), draw(st.integers(0, 20))
    dtype = draw(st.sampled_from(_DTYPES))

    def tensor(shape, dtype):
        twist = draw(st.sampled_from(["no"] * 12 + ["longer", "dims", "strided", "dtype", "expanded"]))
        shape = list(shape)
        if twist == "longer":
            shape[draw(st.integers(0, len(shape) - 1))] += 1
        if twist == "dims":
            shape.append(1)
        dtype = draw(st.sampled_from(_DTYPES)) if twist == "dtype" else dtype
        if twist == "strided":
            return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
        if twist == "expanded" and shape[0] > 1:
            return torch.randn(1, *shape[1:]).to(dtype).expand(shape)
        return torch.randn(shape).to(dtype)

    row = (batch, heads, length)
    optional = lambda shape, dtype: tensor(shape, dtype) if draw(st.booleans()) else None  # noqa: E731
    return {
        "u": tensor(row, dtype),
        "k": tensor((heads, draw(st.integers(0, length))), torch.float32),
        "causal": draw(st.booleans()),
        "pregate": optional(row, dtype),
        "postgate": optional(row, dtype),
        "skip": optional((heads,), torch.float32),
    }


@hypothesis.settings(max_examples=2000, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(calls())
def test_random_calls(arguments):
    """A documented error or the right result; the inputs stay as they were."""
    before = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    try:
        got = tw.fft_conv(**arguments)
    except (ValueError, TypeError) as error:
        assert str(error).startswith("fft_conv: ")
    else:
        exact = reference(**{n: t.double() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()})
        bound = 1e-5 if got.dtype == torch.float32 else 2e-2
        assert got.shape == exact.shape
        scale = exact.abs().max() + 1 if exact.numel() else 1
        assert ((got.double() - exact).abs() <= bound * scale * 10).all()
    for n, t in before.items():
        assert torch.equal(arguments[n], t)
