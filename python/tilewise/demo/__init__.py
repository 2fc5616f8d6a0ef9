"""``tilewise demo``: two small language models trained on real text, then decoded with token trees."""

import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tilewise.demo import decode, report
from tilewise.demo.data import Corpus, load_bytes
from tilewise.demo.models import LongConvModel, Transformer
from tilewise.demo.train import Task, train_side_by_side

TASKS = (
    Task(
        "transformer (2:4-sparse MLP)",
        partial(Transformer, depth=2),
        batch=8,
        length=256,
        learning_rate=2.5e-3,
        max_steps=900,
    ),
    Task(
        "long-convolution model",
        partial(LongConvModel, depth=2),
        batch=2,
        length=4096,
        learning_rate=1e-2,
        max_steps=300,
    ),
)
TRAINING_SECONDS = 100.0  # per model at most, both runs together


def run(text: str | None = None, out: str = "demo-report", steps: int | None = None) -> int:
    """Trains, decodes and writes the report, which marks every promise that was missed; 0 unless decoding differs."""
    begin, console = time.monotonic(), Console()
    data = load_bytes(text)
    corpus = Corpus(data)
    console.print(
        f"{data.numel() / 1e6:.1f} MB of {'text' if text else 'Python sources'}; every model is trained twice"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        results = {t.title: train_side_by_side(t, corpus, TRAINING_SECONDS, steps, progress) for t in TASKS}
        transformer = results[TASKS[0].title][1].model
        plain, tree = decode.compare(transformer, corpus, progress)
    report.show(results, plain, tree, Path(out), console)
    console.print(f"{time.monotonic() - begin:.0f} s")
    return 0 if plain.tokens == tree.tokens else 1
