"""Running the CUDA kernels on the host: which library, and under which schedules."""

import contextlib
import os
from pathlib import Path

MODE = os.environ.get("TILEWISE_EMULATOR", "plain")
_DIRECTORY = Path(os.environ.get("TILEWISE_EMULATOR_DIR", Path(__file__).parents[2] / "build" / "emulator"))


def emulator_library(mode: str = MODE) -> str:
    path = _DIRECTORY / f"libtilewise_emulated_{mode}.so"
    if not path.exists():
        raise FileNotFoundError(f"{path.name} is not built: run `make build`")
    return str(path)


@contextlib.contextmanager
def schedule(seed: int):
    """Random order of threads and asynchronous operations, repeatable by its seed."""
    names = {"SIMT_SCHED": "random", "SIMT_ASYNC": "random", "SIMT_SEED": str(seed), "SIMT_PREEMPT": "32" * (seed % 2)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: value or "0" for name, value in names.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def architecture(number: int):
    """What launchers take the device to be: 800, or 901 for a Hopper with its own instructions."""
    before = os.environ.get("SIMT_ARCH")
    os.environ["SIMT_ARCH"] = str(number)
    try:
        yield
    finally:
        os.environ.pop("SIMT_ARCH") if before is None else os.environ.__setitem__("SIMT_ARCH", before)


@contextlib.contextmanager
def blocks_from(number: int):
    """Leaves out the thread blocks before this one, to reach the end of a huge grid in no time."""
    os.environ["SIMT_FIRST_BLOCK"] = str(number)
    try:
        yield
    finally:
        del os.environ["SIMT_FIRST_BLOCK"]


def assert_schedules_agree(run, count: int = 10) -> None:
    """``run()`` returns tensors (or a tuple of them): bit-identical under the fixed and ``count`` random schedules."""
    as_tuple = lambda out: out if isinstance(out, tuple) else (out,)  # noqa: E731
    expected = [t.clone() for t in as_tuple(run())]
    for seed in range(count):
        with schedule(seed):
            got = as_tuple(run())
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            same = a.contiguous().view(-1).view(dtype=_bytes(a)) == b.contiguous().view(-1).view(dtype=_bytes(b))
            assert bool(same.all()), f"output {i} differs under random schedule {seed}"


def _bytes(tensor):
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
