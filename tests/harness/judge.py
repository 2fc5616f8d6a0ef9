"""The one judge of all accuracy tests: an operator's errors against float64, beside those of plain torch in its dtype.

The largest error of one evaluation by torch is a matter of luck where outputs are few, have heavy tails or share a
rounding. So torch is also evaluated on problems like the given one, every number within 1/16 of what it was: sums and
their terms keep their size, but all is rounded anew, and torch's errors are further draws from the same distribution.
An operator passes when, on the problem itself,

* its largest error is at most ``factor`` times torch's largest (2 for outputs, 3 for gradients),
* its root mean square error is at most ``factor`` times torch's, and
* its relative L2 error is below ``RELATIVE``, whatever torch does: an all-zero output has 1.

Two floors stand under torch's error, which can be zero by construction. A result is never expected to be closer than
one rounding to its dtype: half an ulp of its largest value, and of its root mean square. And a gradient that is zero
because equal terms cancel (attention to a single key) may keep ``CANCELLED``, 16 float32 roundings of terms of order
one; this floor holds only where the exact result is zero everywhere.
"""

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

RELATIVE = 0.02
CANCELLED = 2.0**-20


def draws(independent: int) -> int:
    """How many problems to evaluate torch on, for an output with so many independent errors."""
    return min(32, max(8, 16384 // max(1, independent)))


def redrawn(tensors):
    """Every number within 1/16 of what it was; what is not a floating-point tensor stays as it is."""
    return [t * _near_one(t) if torch.is_tensor(t) and t.is_floating_point() else t for t in tensors]


def _near_one(t):
    return (1 + (torch.rand(t.shape, device=t.device) - 0.5) / 8).to(t.dtype)


def doubled(tensors):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in tensors]


@dataclass
class Yardstick:
    """What one output is measured by: its value in float64, and torch's errors on the problem and on others like it."""

    exact: torch.Tensor
    errors: list[torch.Tensor]


class _Shared:
    """The yardsticks of one case: torch's results are the same whichever instruction set or architecture is judged.

    Found again by their place in the test, the bytes of what they are of, and the state of the random numbers, which
    goes on as if they had been computed again.
    """

    def __init__(self):
        self.case, self.place, self.kept = None, 0, {}

    def begin(self, case):
        if case is None or case != self.case:
            self.kept.clear()
        self.case, self.place = case, 0

    def key(self, tensors, count):
        self.place += 1
        text = hashlib.sha256(torch.get_rng_state().numpy())
        for t in tensors:
            if torch.is_tensor(t):
                text.update(f"{t.dtype} {t.device} {tuple(t.shape)} {t.stride()}".encode())
                text.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            else:
                text.update(repr(t).encode())
        return self.place, count, text.digest()

    def of(self, key, compute):
        if key not in self.kept:
            found = compute()
            if self.case is None:
                return found
            self.kept[key] = found, torch.get_rng_state()
        found, state = self.kept[key]
        torch.set_rng_state(state)
        return [replace(yardstick) for yardstick in found]


_shared = _Shared()
begin = _shared.begin  # before each test, with what names its case but for the instruction set; None shares nothing


def yardsticks(plains, tensors, count: int, exact=None) -> list[Yardstick]:
    """One per output of ``plains``, functions of the tensors in plain torch that may each be the better one.

    ``count`` is how many problems to evaluate at least; there are more where a few elements carry most of the error.
    ``exact`` is the function to evaluate in float64, the first of ``plains`` if not given.
    """
    key = _shared.key(tensors, count)
    return _shared.of(key, lambda: _yardsticks(plains, tensors, count, exact or plains[0]))


def _yardsticks(plains, tensors, count, exact):
    with _one_thread():
        measured = [_measure(plains, tensors, exact)]
        again = lambda count: [_measure(plains, redrawn(tensors), exact) for _ in range(count)]  # noqa: E731
        measured += again(count - 1)
        measured += again(min(map(_draws, zip(*(errors for _, errors in measured), strict=True))) - count)
    exacts = measured[0][0]
    return [Yardstick(right, [e for _, errors in measured for e in errors[i]]) for i, right in enumerate(exacts)]


def _measure(plains, problem, exact):
    """The exact outputs of one problem, and of each of them the errors of every way."""
    exacts = exact(*doubled(problem))
    ways = [plain(*problem) for plain in plains]
    return exacts, [[_flat(t) - _flat(e) for t in of] for *of, e in zip(*ways, exacts, strict=True)]


def _draws(errors):
    """By the number of errors of equal size that would vary as much as these of one output do."""
    squares = torch.stack([e for of in errors for e in of]).square().mean(0).nan_to_num(0, 0, 0)
    return draws(int(squares.sum().square() / squares.square().sum().clamp_min(1e-300)))


@contextmanager
def _one_thread():
    """Problems are too small to share, and waiting for a busy core takes longer than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _flat(t):
    return t.detach().double().cpu().flatten()


def relative(got, exact, size=0.0) -> float:
    """The relative L2 error; ``size`` is what the norm of the exact result is at least taken to be."""
    return float((_flat(got) - _flat(exact)).norm() / max(exact.norm().cpu(), size))


def ratios(got, yardstick: Yardstick, factor):
    """What each bound is used up by: at most 1, or the operator is wrong. NaN anywhere gives NaN."""
    unit = torch.finfo(got.dtype).eps / 2
    got, exact = _flat(got), _flat(yardstick.exact)
    if exact.norm() == 0:
        allowed = factor * max(CANCELLED, *(e.abs().max() for e in yardstick.errors))
        return {"largest error": float(got.abs().max() / allowed)}
    found = {"relative L2 error": relative(got, exact) / RELATIVE}
    for bound, order in (("largest error", torch.inf), ("root mean square error", 2)):
        size = partial(torch.linalg.vector_norm, ord=order)
        allowed = factor * max(unit * size(exact), *map(size, yardstick.errors))
        found[bound] = float(size(got - exact) / allowed)
    return found


def assert_accurate(name, got, yardstick: Yardstick, factor):
    """``factor`` is 2 for outputs and 3 for gradients."""
    expected = tuple(yardstick.exact.shape)
    assert tuple(got.shape) == expected, f"{name}: shape {tuple(got.shape)}, expected {expected}"
    if not got.numel():
        return
    for bound, used in ratios(got, yardstick, factor).items():
        assert used <= 1, f"{name}: {bound} is {used:.3g} times what is allowed"
