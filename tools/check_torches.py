"""`make torches-check`: the suite under every release of torch that the one wheel is made for.

    python tools/check_torches.py [--environments DIR] [VERSION ...] [-- PYTEST ARGUMENTS]

Builds one wheel (without CUDA kernels unless TILEWISE_CUDA says otherwise), unpacks it beside a copy of the tests, and
runs them with each torch in an environment of its own; a table comes last. Environments are gigabytes, as PyPI's torch
brings CUDA libraries: they are made one at a time and removed again, or kept in DIR and used again from there. Where no
GPU is, such a torch also shows that tilewise takes "built for CUDA" and "has a GPU" for two things.

TILEWISE_DEVICES is cpu unless set; with `emulated` or `pretend` among them, build/emulator must have been built.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from check_wheel import build_wheel

ROOT = Path(__file__).parents[1]
VERSIONS = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")  # the last patch of each release
PACKAGES = ("numpy", "pytest>=8", "hypothesis>=6.100", "expecttest", "rich>=13", "matplotlib>=3.8")
WITHOUT_TORCH = ("tests/simt", "tests/test_mutations.py", "tests/test_sass.py")
WITH_EMULATOR = ("tests/test_pretend.py", "tests/test_gpu_report.py")
FACTS = "import platform, torch; print(platform.python_version(), torch.version.cuda or '-', torch.cuda.is_available())"


def say(text: str, begin: float = time.monotonic()) -> None:  # noqa: B008 (the time of the script's start)
    print(f"== {text} (after {time.monotonic() - begin:.0f} s)", flush=True)


def unpacked_wheel(scratch: Path) -> Path:
    """A copy of the repository whose package is what an installation would have."""
    say("building the wheel")
    wheel = build_wheel(scratch, {"TILEWISE_CUDA": "OFF", **os.environ})
    tree = scratch / "tree"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in files.strip("\0").split("\0"):
        if not name.startswith("python/") and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree / "python")
    return tree


@contextlib.contextmanager
def environment(version: str, kept: Path | None):
    """The interpreter that has this torch."""
    with tempfile.TemporaryDirectory(prefix=f"torch-{version}-") as scratch:
        folder = kept / version if kept else Path(scratch)
        python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            say(f"torch {version}: installing")
            venv.create(folder, with_pip=True, clear=True)
            install = [python, "-m", "pip", "install", "-q", "--no-cache-dir", f"torch=={version}", *PACKAGES]
            subprocess.run(install, check=True)
            (folder / "complete").touch()
        yield python


def run_tests(python: Path, tree: Path, results: Path, arguments: list[str]) -> None:
    emulator = Path(os.environ.get("TILEWISE_EMULATOR_DIR", ROOT / "build" / "emulator"))
    own = {"PYTHONPATH": str(tree / "python"), "TILEWISE_EMULATOR_DIR": str(emulator)}
    without = WITHOUT_TORCH if list(emulator.glob("libtilewise_emulated_*.so")) else WITHOUT_TORCH + WITH_EMULATOR
    ignored = [option for name in without for option in ("--ignore", name)]
    command = [python, "-m", "pytest", "--tb=short", f"--junitxml={results}", *ignored, *arguments]
    subprocess.run(command, cwd=tree, env={"TILEWISE_DEVICES": "cpu", **os.environ, **own})


def counts(results: Path) -> dict:
    """What pytest counted; it failed as a whole if it left nothing."""
    if not results.exists():
        return {"tests": 0, "errors": 1, "failures": 0, "skipped": 0, "time": 0.0}
    suite = ElementTree.parse(results).getroot().find("testsuite")
    return {name: float(suite.get(name)) for name in ("tests", "errors", "failures", "skipped", "time")}


def check(version: str, tree: Path, kept: Path | None, arguments: list[str]) -> tuple[str, bool]:
    """A row of the table, and whether all is well."""
    results = tree.parent / f"{version}.xml"
    try:
        with environment(version, kept) as python:
            facts = subprocess.run([python, "-c", FACTS], check=True, capture_output=True, text=True).stdout
            say(f"torch {version}: tests")
            run_tests(python, tree, results, arguments)
    except subprocess.CalledProcessError as why:
        return f"| {version} | {Path(why.cmd[0]).name} ended with {why.returncode} | | | | | | |", False
    found, (interpreter, cuda, gpu) = counts(results), facts.split()
    bad = int(found["errors"] + found["failures"])
    passed = int(found["tests"] - bad - found["skipped"])
    row = (version, interpreter, cuda, gpu, passed, bad, int(found["skipped"]), f"{found['time']:.0f}")
    return "| " + " | ".join(map(str, row)) + " |", passed > 0 and not bad


def main() -> None:
    given = sys.argv[1:]
    own, arguments = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("version", nargs="*", default=VERSIONS, help=f"of torch (default: {' '.join(VERSIONS)})")
    parser.add_argument("--environments", type=Path, help="where they are kept (default: none is)")
    chosen = parser.parse_args(own)
    rows = []
    with tempfile.TemporaryDirectory(prefix="tilewise-torches-") as scratch:
        tree = unpacked_wheel(Path(scratch))
        for version in chosen.version:
            rows.append(check(version, tree, chosen.environments, arguments or ["tests"]))
            say(f"torch {version}: {rows[-1][0]}")
    print(
        "\n| torch | python | CUDA | GPU | passed | failed | skipped | seconds |\n|---|---|---|---|---:|---:|---:|---:|"
    )
    print(*(row for row, _ in rows), sep="\n")
    sys.exit(not all(well for _, well in rows))


if __name__ == "__main__":
    main()
