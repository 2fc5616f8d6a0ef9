"""Builds the wheel and proves that it imports and runs in a clean environment without compiler, nvcc or GPU."""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]

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


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tilewise-wheel-") as scratch:
        scratch = Path(scratch)
        run(sys.executable, "-m", "pip", "wheel", "-q", ROOT, "--no-deps", "-w", scratch)
        (wheel,) = scratch.glob("*.whl")
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
