"""The judge itself: it accepts a right operator and rejects the usual wrong ones, in every dtype."""

import pytest
import torch

from harness.judge import assert_accurate, ratios, yardsticks
from tilewise.reference import attention as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def linear(x, w):
    return [x @ w.t()]


def attention(q, k, v):
    return [reference.attention(q, k, v)[0]]


# The function, its tensors, and which of them have the dimension that is summed over, and where.
PROBLEMS = {
    "linear": (linear, ((16, 512), (65, 512)), (0, 1), -1),
    "attention": (attention, ((1, 2, 30, 64), (1, 2, 300, 64), (1, 2, 300, 64)), (1, 2), -2),
}


def without_last(tensors, summed, dim):
    return [t.narrow(dim, 0, t.shape[dim] - 1) if i in summed else t for i, t in enumerate(tensors)]


def with_two_swapped(tensors, summed, dim):
    order = torch.arange(tensors[summed[0]].shape[dim])
    order[[3, 5]] = order[[5, 3]]
    return [t.index_select(dim, order) if i == summed[0] else t for i, t in enumerate(tensors)]


def judged(problem, dtype, change_inputs=None, change_output=lambda y: y):
    """An operator that sums in float64 and rounds once, perhaps with a mistake, before the judge."""
    function, shapes, summed, dim = PROBLEMS[problem]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    [yardstick] = yardsticks([function], tensors, 8)
    seen = change_inputs(tensors, summed, dim) if change_inputs else tensors
    assert_accurate("y", change_output(function(*(t.double() for t in seen))[0]).to(dtype), yardstick, 2)


both = pytest.mark.parametrize("problem", PROBLEMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@both
@dtypes
def test_right(problem, dtype):
    judged(problem, dtype)


@both
@dtypes
@pytest.mark.parametrize("mistake", [without_last, with_two_swapped], ids=["last-dropped", "swapped"])
def test_wrong_terms(problem, dtype, mistake):
    with pytest.raises(AssertionError, match="times what is allowed"):
        judged(problem, dtype, change_inputs=mistake)


MISTAKES = {
    "zeros": torch.zeros_like,
    "last-zero": lambda y: torch.cat([y[..., :-1], 0 * y[..., -1:]], -1),
    "nan": lambda y: torch.where(y == y.max(), torch.nan, y),
    "negative": torch.neg,
}


@both
@dtypes
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_wrong_output(problem, dtype, mistake):
    with pytest.raises(AssertionError, match="times what is allowed"):
        judged(problem, dtype, change_output=mistake)


# Torch's own formula of attention is this far off in 16 bits, where it rounds scores and probabilities.
SCALES = [
    ("linear", torch.float32, 1.001),
    ("linear", torch.float16, 1.001),
    ("linear", torch.bfloat16, 1.01),
    ("attention", torch.float32, 1.001),
    ("attention", torch.float16, 1.01),
    ("attention", torch.bfloat16, 1.03),
]


@pytest.mark.parametrize("problem,dtype,scale", SCALES, ids=str)
def test_wrong_scale(problem, dtype, scale):
    with pytest.raises(AssertionError, match="times what is allowed"):
        judged(problem, dtype, change_output=lambda y: scale * y)


def test_zero_because_terms_cancel():
    """Where the exact gradient is zero everywhere, roundings of terms of order one may remain, and no more."""
    [yardstick] = yardsticks([lambda x: [x - x]], [torch.randn(64)], 8)
    assert ratios(torch.full((64,), 2.0**-20), yardstick, 3)["largest error"] < 1
    assert ratios(torch.full((64,), 2.0**-18), yardstick, 3)["largest error"] > 1


def test_every_draw_is_another_problem():
    x = torch.randn(1000)
    [yardstick] = yardsticks([lambda x: [x.sum()[None]]], [x], 32)
    assert len(yardstick.errors) == 32 and len({float(e) for e in yardstick.errors}) > 8
    assert torch.equal(yardstick.exact, x.double().sum()[None])


@pytest.mark.parametrize(("size", "problems"), [(1.0, 8), (1e6, 32)], ids=["alike", "one-outlier"])
def test_few_errors_that_matter_are_drawn_more_often(size, problems):
    x = torch.randn(8192).abs() + 1
    x[5] *= size
    [yardstick] = yardsticks([lambda x: [x / 3]], [x], 8)
    assert len(yardstick.errors) == problems
