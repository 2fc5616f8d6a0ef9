"""One benchmark case, and how two implementations are timed against each other on a shared, noisy machine."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FLOAT32 = torch.float32
Run = Callable[[], object]


@dataclass
class Case:
    """The same work done by tilewise and by torch's best way, on the same inputs.

    flops and bytes are the least that any implementation must do, dtype is that of the products; ``target`` is the
    ratio torch / tilewise that the project promises on one CPU thread, None where it promises nothing. Where tensors
    are large, ``prepare`` makes them and returns both sides: they live only while the case is measured.
    """

    name: str
    tilewise: Run | None = None
    torch: Run | None = None
    flops: float = 0.0
    bytes: float = 0.0
    target: float | None = None
    dtype: "torch.dtype" = FLOAT32  # noqa: UP037 (torch is a field here)
    prepare: Callable[[], tuple[Run, Run]] | None = None

    def runs(self) -> tuple[Run, Run]:
        return self.prepare() if self.prepare else (self.tilewise, self.torch)


@dataclass
class Rates:
    """What a device was measured to do: FLOP/s of torch's matrix product in each dtype, bytes/s of a large copy.

    A dtype's rate is measured when a case first asks for it.
    """

    device: torch.device
    bytes: float
    flops: dict[str, float] = field(default_factory=dict)

    def product(self, dtype: torch.dtype) -> float:
        name = str(dtype).removeprefix("torch.")
        if name not in self.flops:
            self.flops[name] = _product_rate(self.device, dtype)
        return self.flops[name]

    def floor(self, case: Case) -> float:
        """Seconds that the case needs at these rates."""
        arithmetic = case.flops / self.product(case.dtype) if case.flops else 0.0
        return max(arithmetic, case.bytes / self.bytes)

    def as_dict(self) -> dict:
        return {"flops": dict(self.flops), "bytes": self.bytes}


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
    runs = case.runs()
    repeats = [_repeats(run, sample_seconds, device) for run in runs]
    seconds = [[], []]
    for i in range(pairs):
        for side in (i % 2, 1 - i % 2):
            seconds[side].append(_seconds(runs[side], repeats[side], device))
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    medians = [statistics.median(side) for side in seconds]
    return Result(case.name, *medians, middle, low, high, rates.floor(case), case.target)


def _best(run: Run, device: torch.device) -> float:
    """The best of a few runs: a rate is a limit, so interruptions only ever lower it."""
    return min(_seconds(run, 3, device) for _ in range(5))


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=product), device)


def measure_rates(device: torch.device) -> Rates:
    source = torch.randn((1 << 30 if device.type == "cuda" else 1 << 26) // 4, device=device)
    copy = torch.empty_like(source)
    return Rates(device, bytes=2 * source.nbytes / _best(lambda: copy.copy_(source), device))
