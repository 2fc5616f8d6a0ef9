"""Seeded bugs: each must be caught, which proves that the tests and detectors are alive.

A mutation is a replacement in one source file. The harness copies csrc, applies it, compiles those of the family's CUDA
sources that contain it for the emulator with -DTILEWISE_FEW_INSTANCES, and expects ``check()`` of its table to fail.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.emulation import schedule
from tilewise import _C

ROOT = Path(__file__).parents[2]
# Without optimisation: nearly all of a seeded bug's time is its compilation, and the checks are small. SIMT_DEVICE says
# always_inline, which -O0 obeys, and kernels are then twice the code; only the race checker needs it (simt/host.h).
_PLAIN = ["-O0", "-Dalways_inline="]
_FLAGS = {"plain": _PLAIN, "schedules": _PLAIN, "race": ["-O0", "-fsanitize=thread"]}


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


def _build_directory() -> Path:
    return Path(os.environ.get("TILEWISE_BUILD_DIR", ROOT / "build"))


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


def _compile(source: Path, csrc: Path, mode: str, target: Path) -> str:
    common = ["-std=c++17", "-fPIC", "-g0", "-w", "-fvisibility=hidden", f"-I{csrc}", "-DTILEWISE_FEW_INSTANCES"]
    command = ["g++", *common, *_FLAGS[mode], "-x", "c++", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return str(target)


@functools.cache
def _includes(source: Path) -> frozenset[str]:
    """The files below csrc/ that a source is made of."""
    csrc = ROOT / "csrc"
    command = ["g++", "-std=c++17", f"-I{csrc}", "-DTILEWISE_FEW_INSTANCES", "-MM", "-x", "c++", str(source)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.replace("\\\n", " ").split()[1:]
    return frozenset(str(Path(name).resolve().relative_to(csrc)) for name in listed if Path(name).is_relative_to(csrc))


@functools.cache
def _clean_object(source: Path, mode: str) -> str:
    """The object of an unchanged source, kept in the build folder under a name that its text decides."""
    text = hashlib.sha256(" ".join(_FLAGS[mode]).encode())
    for name in sorted(_includes(source)):
        text.update((ROOT / "csrc" / name).read_bytes())
    kept = _build_directory() / "mutations" / f"{source.stem}_{text.hexdigest()[:16]}.o"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}.o")  # other processes may be at it too
        _compile(source, ROOT / "csrc", mode, fresh)
        fresh.replace(kept)
    return str(kept)


def build_mutant(family: str, mutation: Mutation, mode: str, directory: Path) -> Path:
    """Compiles what the mutation touches and links it with the family's other objects into a library of its own."""
    csrc = directory / "csrc"
    for part in (family, "common", "simt"):
        shutil.copytree(ROOT / "csrc" / part, csrc / part)
    _apply(mutation, csrc)
    library = directory / f"lib{family}_{mutation.name}_{mode}.so"
    objects = []
    for source in sorted((ROOT / "csrc" / family / "cuda").glob("*.cu")):
        if mutation.file in _includes(source):
            mutated = csrc / source.relative_to(ROOT / "csrc")
            objects.append(_compile(mutated, csrc, mode, directory / f"{source.stem}.o"))
        else:
            objects.append(_clean_object(source, mode))
    exports = f"-Wl,--version-script={csrc / 'simt' / 'emulator' / 'exports.map'}"
    runtime = _runtime_objects(_build_directory())
    link = ["g++", "-shared", exports, *objects, *runtime, "-lpthread", "-ldl", "-o", str(library)]
    subprocess.run(link, check=True)
    return library


def failure_of(family: str, mutation: Mutation, check) -> str | None:
    """Runs ``check()`` on the mutated kernels; what it raised, or None if nothing was noticed."""
    with tempfile.TemporaryDirectory(prefix="tilewise-mutation-") as directory:
        library = build_mutant(family, mutation, mutation.mode, Path(directory))
        return _in_child(lambda: _failure(library, mutation, check))


def _failure(library: Path, mutation: Mutation, check) -> str | None:
    _C.emulate(str(library))
    if mutation.mode != "schedules":
        return _outcome(check)
    for seed in range(20):
        with schedule(seed):
            if outcome := _outcome(check):
                return outcome
    return None


def _outcome(check) -> str | None:
    try:
        check()
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


def _in_child(run) -> str | None:
    """``run()`` in a process of its own: a bug that writes where it should not must not reach later tests."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's thread team does not exist here
        try:
            outcome = run()
            text = "" if outcome is None else outcome
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        text = answer.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return text or (f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else None)
