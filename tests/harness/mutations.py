"""Seeded bugs: each must be caught, which proves that the tests and detectors are alive.

A mutation is a replacement in one source file. The harness copies csrc, applies it, compiles the family's CUDA sources
for the emulator with -DTILEWISE_FEW_INSTANCES, and expects the family's ``check()`` to fail on the result.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness.emulation import schedule
from tilewise import _C

ROOT = Path(__file__).parents[2]
_FLAGS = {"plain": ["-O1"], "schedules": ["-O1"], "race": ["-O1", "-fsanitize=thread"]}


@dataclass(frozen=True)
class Mutation:
    """``old`` stands exactly once in ``file`` (below csrc/) and becomes ``new``; ``mode`` must catch it.

    plain: the fixed schedule gives a wrong result or a diagnosis; schedules: some random schedule does;
    race: the race checker reports it.
    """

    name: str
    file: str
    old: str
    new: str
    mode: str

    def __str__(self):
        return self.name


CLEAN = Mutation("clean", "", "", "", "plain")


@functools.cache
def _runtime_objects(build: Path) -> list[str]:
    targets = ("tilewise_emulator_runtime", "tilewise_emulator_race_hooks")
    sources = sorted((ROOT / "csrc" / "simt" / "emulator").glob("*.cpp"))
    names = [build / "CMakeFiles" / f"{t}.dir" / f"{s.relative_to(ROOT)}.o" for t in targets for s in sources]
    objects = [str(name) for name in names if name.exists()]
    if not objects:
        raise FileNotFoundError("the emulator's runtime is not built: run `make build`")
    return objects


def _apply(mutation: Mutation, csrc: Path) -> None:
    if not mutation.file:
        return
    path = csrc / mutation.file
    text = path.read_text()
    found = text.count(mutation.old)
    if found != 1:
        raise ValueError(f"mutation {mutation.name}: its text stands {found} times in {mutation.file}, expected once")
    path.write_text(text.replace(mutation.old, mutation.new))


def build_mutant(family: str, mutation: Mutation, mode: str, directory: Path) -> Path:
    """Compiles the mutated family into a library of its own."""
    csrc = directory / "csrc"
    shutil.copytree(ROOT / "csrc" / family, csrc / family)
    for shared in ("common", "simt"):
        shutil.copytree(ROOT / "csrc" / shared, csrc / shared)
    _apply(mutation, csrc)
    library = directory / f"lib{family}_{mutation.name}_{mode}.so"
    build = Path(os.environ.get("TILEWISE_BUILD_DIR", ROOT / "build"))
    common = ["-std=c++17", "-fPIC", "-g0", "-w", "-fvisibility=hidden", f"-I{csrc}", "-DTILEWISE_FEW_INSTANCES"]
    objects = []
    for source in sorted((csrc / family / "cuda").glob("*.cu")):
        objects.append(str(source.with_suffix(".o")))
        compile_ = ["g++", *common, *_FLAGS[mode], "-x", "c++", "-c", str(source), "-o", objects[-1]]
        subprocess.run(compile_, check=True)
    exports = f"-Wl,--version-script={csrc / 'simt' / 'emulator' / 'exports.map'}"
    link = ["g++", "-shared", exports, *objects, *_runtime_objects(build), "-lpthread", "-ldl", "-o", str(library)]
    subprocess.run(link, check=True)
    return library


def failure_of(family: str, mutation: Mutation, check) -> str | None:
    """Runs ``check()`` on the mutated kernels; what it raised, or None if nothing was noticed."""
    with tempfile.TemporaryDirectory(prefix="tilewise-mutation-") as directory:
        library = build_mutant(family, mutation, mutation.mode, Path(directory))
        _C.emulate(str(library))
        try:
            if mutation.mode != "schedules":
                return _outcome(check)
            for seed in range(20):
                with schedule(seed):
                    if outcome := _outcome(check):
                        return outcome
            return None
        finally:
            _C.emulate(None)
            _C.forget_buffers()


def _outcome(check) -> str | None:
    try:
        check()
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__
    return None
