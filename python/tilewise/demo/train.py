"""Training the same model twice, side by side: plain torch with torch.optim.AdamW, and tilewise with 4-bit AdamW."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from tilewise.demo.backends import Tilewise, Torch
from tilewise.demo.data import Corpus
from tilewise.demo.models import bits_per_byte

GRADIENT_NORM = 1.0  # larger gradients are scaled down to it
VALIDATION_BYTES = 32_768  # fewer make the verdict a matter of luck: 8192 moved it by 1 %


@dataclass(frozen=True)
class Task:
    """One model and how it is trained."""

    title: str
    build: Callable[[type], nn.Module]
    batch: int
    length: int
    learning_rate: float
    max_steps: int


@dataclass
class Run:
    """One of a task's two trainings."""

    backend: type
    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)  # bits per byte at `steps`
    training: list[float] = field(default_factory=list)  # bits per byte of every step
    seconds: list[float] = field(default_factory=list)

    @property
    def median_step(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's tensors per parameter it holds, steps and other scalars left out."""
        tensors = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, steps // 5))  # calmer, and better for both, than a twentieth
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _new_run(task: Task, backend: type, seed: int) -> Run:
    torch.manual_seed(seed)
    model = task.build(backend)
    options = {"lr": task.learning_rate, "betas": (0.9, 0.95), "weight_decay": 0.05}
    return Run(backend, model, backend.optimizer(model.parameters(), **options))


def _step(run: Run, windows: torch.Tensor, learning_rate: float) -> None:
    begin = time.perf_counter()
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.zero_grad(set_to_none=True)
    loss = bits_per_byte(run.model, windows)
    (loss * math.log(2)).backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), GRADIENT_NORM)
    run.optimizer.step()
    run.seconds.append(time.perf_counter() - begin)
    run.training.append(loss.item())


@torch.no_grad()
def _validate(run: Run, step: int, windows: list[torch.Tensor]) -> None:
    run.steps.append(step)
    run.validation.append(sum(bits_per_byte(run.model, w).item() for w in windows) / len(windows))


def _steps_that_fit(task: Task, corpus: Corpus, budget_seconds: float) -> int:
    """The fastest of eight steps of each kind on throw-away models tells how many fit: a busy moment does not."""
    generator = torch.Generator().manual_seed(0)
    cost = 0.0
    for backend in (Torch, Tilewise):
        run = _new_run(task, backend, 0)
        for _ in range(8):
            _step(run, Corpus.windows(corpus.train, task.batch, task.length, generator), 0.0)
        cost += min(run.seconds)
    return max(20, min(task.max_steps, int(budget_seconds / (1.15 * cost))))


def train_side_by_side(task: Task, corpus: Corpus, budget_seconds: float, steps: int | None, progress) -> list[Run]:
    """Both runs from one seed on the same batches; the order within a step alternates, so that both see one machine."""
    steps = steps or _steps_that_fit(task, corpus, budget_seconds)
    runs = [_new_run(task, backend, seed=1) for backend in (Torch, Tilewise)]
    generator = torch.Generator().manual_seed(2)
    held_out = torch.Generator().manual_seed(3)
    batches = VALIDATION_BYTES // (task.batch * task.length)
    validation = [Corpus.windows(corpus.held_out, task.batch, task.length, held_out) for _ in range(batches)]
    bar = progress.add_task(f"training the {task.title}", total=steps)
    for step in range(steps):
        windows = Corpus.windows(corpus.train, task.batch, task.length, generator)
        for run in runs if step % 2 else reversed(runs):
            _step(run, windows, task.learning_rate * _schedule(step, steps))
        if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
            for run in runs:
                _validate(run, step + 1, validation)
        gap = f"{runs[0].training[-1]:.3f} | {runs[1].training[-1]:.3f} bits per byte"
        progress.update(bar, advance=1, description=f"training the {task.title} ({gap})")
    progress.remove_task(bar)
    return runs
