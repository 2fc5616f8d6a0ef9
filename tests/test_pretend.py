"""The pretended CUDA device: what it refuses, in a process of its own; and some of the suite's tests on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a real CUDA device")

REFUSED = """
from harness import pretend
import torch
import tilewise as tw
pretend.install()

def refused(error, run):
    try:
        run()
    except error:
        return
    raise AssertionError("not refused")

with pretend.device:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.is_cuda and (there * 2).device.type == "cuda" and there.cpu().device.type == "cpu"
    assert (there * torch.tensor(2.0)).sum().item() == 6  # a number may come from the CPU
    assert there[torch.tensor([0])].is_cuda  # and so may indices
    refused(RuntimeError, lambda: here + there)
    refused(RuntimeError, lambda: torch.stack([here, there]))
    refused(RuntimeError, lambda: here[torch.tensor([0], device="cuda")])
    refused(TypeError, there.numpy)
    refused(RuntimeError, lambda: torch.rand(3, device="cuda", generator=torch.Generator()))
    draw = lambda: torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    assert torch.equal(draw(), draw())
    leaf = torch.nn.Parameter(there)
    (leaf * leaf).sum().backward()
    assert leaf.grad.is_cuda and leaf.grad.tolist() == [2.0, 2.0, 2.0]
    q = torch.randn(1, 1, 4, 64, device="cuda")
    assert tw.attention(q, q, q).is_cuda
    refused(ValueError, lambda: tw.attention(q, q, q.cpu()))
print("as a GPU")
"""


def run(command, **variables):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests")]), **variables}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_refuses_what_a_gpu_refuses():
    done = run([sys.executable, "-c", REFUSED])
    assert done.stdout.strip() == "as a GPU", done.stdout + done.stderr


def test_some_tests():
    """One quick test of each family; all of them: TILEWISE_DEVICES=pretend python -m pytest tests."""
    families = ["attention", "fft_conv", "sparse", "speculative", "optim_step"]
    files = [f"tests/test_{name}.py" for name in (*families, "optim_offload", "optim_convert")]
    chosen = ["-k", "known or out_variant or empty or identity or first_step or offload or nothing_is_shared"]
    done = run([sys.executable, "-m", "pytest", *chosen, *files], TILEWISE_DEVICES="pretend")
    assert done.returncode == 0, done.stdout + done.stderr
