"""One benchmark case, and how two implementations are timed against each other on a shared, noisy machine."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Case:
    """The same work done by tilewise and by torch's best way, on the same inputs.

    flops and bytes are the least that any implementation must do; ``target`` is the ratio torch / tilewise that the
    project promises on one CPU thread, None where it promises nothing.
    """

    name: str
    tilewise: Callable[[], object]
    torch: Callable[[], object]
    flops: float = 0.0
    bytes: float = 0.0
    target: float | None = None


@dataclass
class Rates:
    """What this machine was measured to do: FLOP/s of torch's fp32 matrix product, bytes/s of a large copy."""

    flops: float
    bytes: float

    def floor(self, case: Case) -> float:
        """Seconds that the case needs at these rates."""
        return max(case.flops / self.flops, case.bytes / self.bytes)


@dataclass
class Result:
    name: str
    tilewise_seconds: float
    torch_seconds: float
    ratio: float  # median over pairs of torch / tilewise
    ratio_low: float
    ratio_high: float  # the middle half of the pairs
    floor_seconds: float
    target: float | None

    @property
    def fraction_of_floor(self) -> float:
        return self.floor_seconds / self.tilewise_seconds


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def _repeats(run: Callable[[], object], sample_seconds: float, device: torch.device) -> int:
    _seconds(run, 1, device)  # warm caches, build plans
    once = max(_seconds(run, 1, device), 1e-7)
    if once < sample_seconds / 20:
        once = _seconds(run, 20, device)
    return max(1, round(sample_seconds / once))


def measure(case: Case, rates: Rates, device: torch.device, pairs: int = 15, sample_seconds: float = 0.03) -> Result:
    """Alternates the two implementations, so that both see the same drift of clocks and load; medians over pairs."""
    ours_repeats = _repeats(case.tilewise, sample_seconds, device)
    torch_repeats = _repeats(case.torch, sample_seconds, device)
    ours, theirs = [], []
    for i in range(pairs):
        first_ours = i % 2 == 0
        for which in (first_ours, not first_ours):
            if which:
                ours.append(_seconds(case.tilewise, ours_repeats, device))
            else:
                theirs.append(_seconds(case.torch, torch_repeats, device))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Result(
        case.name,
        statistics.median(ours),
        statistics.median(theirs),
        middle,
        low,
        high,
        rates.floor(case),
        case.target,
    )


def measure_rates(device: torch.device) -> Rates:
    """The best of a few runs: a rate is a limit, so interruptions only ever lower it."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn((1 << 28 if device.type == "cuda" else 1 << 26) // 4, device=device)
    copy = torch.empty_like(source)
    best = lambda run: min(_seconds(run, 3, device) for _ in range(5))  # noqa: E731
    return Rates(
        flops=2 * n**3 / best(lambda: torch.mm(a, b, out=product)),
        bytes=2 * source.numel() * 4 / best(lambda: copy.copy_(source)),
    )
