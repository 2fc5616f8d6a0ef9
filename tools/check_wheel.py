"""Builds the wheel and proves that it imports and runs in a clean environment without compiler, nvcc or GPU.

The wheel is configured and built anew, in an isolated environment and a folder of its own. What `make build` compiled
is put there first, with ninja's record of how: an object is used again where the wheel's build would give the same
command to the same sources, and compiled otherwise. The extension module always is.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"  # of `make build`

PROBE = """
import pathlib, torch, tilewise
assert "site-packages" in tilewise.__file__, tilewise.__file__
q, k, v = (torch.randn(1, 2, 33, 64) for _ in range(3))
out = tilewise.attention(q, k, v, causal=True)
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
assert torch.allclose(out, expected, atol=1e-4), "attention in the installed wheel is wrong"
print("attention agrees with torch;", ", ".join(f"{k} {v}" for k, v in tilewise.info().items()))
"""


def run(*command, **options):
    print("+", *map(str, command), flush=True)
    return subprocess.run([str(c) for c in command], check=True, **options)


def copy_objects(folder: Path) -> int:
    """Objects and ninja's records to where a build folder will be; times stay, as the records speak of them."""
    folders = [f for f in (BUILD / "CMakeFiles").glob("tilewise*.dir") if "emulated" not in f.name]
    objects = [path for f in folders for path in f.glob("**/*.o")]
    for path in objects + [p for p in (BUILD / ".ninja_log", BUILD / ".ninja_deps") if p.exists()]:
        to = folder / path.relative_to(BUILD)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, to)
    return len(objects)


def tools(environment) -> dict[str, str]:
    """Where a build takes the compiler and the ninja of `make build`.

    Another name of the compiler is another command, and another ninja might not read the records.
    """
    cache = BUILD / "CMakeCache.txt"
    text = cache.read_text() if cache.exists() else ""
    found = dict(re.findall(r"^CMAKE_(CXX_COMPILER|MAKE_PROGRAM):\w+=(.+)$", text, re.MULTILINE))
    if len(found) < 2:
        return dict(environment)
    path = os.pathsep.join([str(Path(found["MAKE_PROGRAM"]).parent), environment["PATH"]])
    return {"CXX": found["CXX_COMPILER"], **environment, "PATH": path}


def build_wheel(scratch: Path, environment=os.environ) -> Path:
    """The wheel, in ``scratch``."""
    folder = scratch / "build"
    print(f"{copy_objects(folder)} objects of {BUILD}", flush=True)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", ROOT, "--no-deps", "-w", scratch)
    run(*pip, "--config-settings", f"build-dir={folder}", env=tools(environment))
    (wheel,) = scratch.glob("*.whl")
    return wheel


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tilewise-wheel-") as scratch:
        scratch = Path(scratch)
        wheel = build_wheel(scratch)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        if "-py3-none-" not in wheel.name:
            sys.exit(f"check_wheel: {wheel.name} is not tagged py3-none-<platform>")
        venv.create(scratch / "env", with_pip=True)
        python = scratch / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
        bare = {"PATH": str(python.parent), "HOME": str(scratch), "LANG": os.environ.get("LANG", "C.UTF-8")}
        run(python.parent / "tilewise", "info", env=bare, cwd=scratch)
        run(python, "-c", PROBE, env=bare, cwd=scratch)


if __name__ == "__main__":
    main()
