"""The report of a machine with a GPU, rehearsed where there is none: the way it goes, not what it measures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a real CUDA device")


def rehearse(out, *arguments):
    command = [sys.executable, str(ROOT / "tools" / "gpu_report.py"), "--rehearse", *arguments]
    return subprocess.run(command, env={**os.environ, "OUT": str(out)}, capture_output=True, text=True, timeout=300)


def test_cheap_stages(tmp_path):
    """Both files and the log of a family's tests and benchmarks; the stages without a rehearsal pass by."""
    done = rehearse(tmp_path, "--stages", "build,test,bench,sanitizer,ncu", "speculative")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-report.json", "gpu-report.md", "gpu-report.log"}
    report = json.loads((tmp_path / "gpu-report.json").read_text())
    stages = {name: stage["result"] for name, stage in report["stages"].items()}
    assert stages == {"import": 0, "test speculative": 0, "bench speculative": 0, "bench binding": 0}, done.stdout
    results = report["bench"]["speculative"]["results"]
    assert len(results) == 1 and results[0]["name"].startswith("verify_greedy") and results[0]["tilewise_seconds"] > 0
    text = (tmp_path / "gpu-report.md").read_text()
    assert results[0]["name"] in text and "| test speculative | 0 |" in text
    assert "==== bench speculative: 0" in (tmp_path / "gpu-report.log").read_text()


def test_no_time_left(tmp_path):
    """Every stage is noted, none begins."""
    done = rehearse(tmp_path, "--stages", "build,bench", "--seconds", "1", "optim")
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "gpu-report.json").read_text())["stages"]
    assert {stage["result"] for stage in stages.values()} == {"no time left"} and len(stages) == 3


def test_unknown_names(tmp_path):
    assert "no family optics" in rehearse(tmp_path, "optics").stderr
    assert "no stage tests" in rehearse(tmp_path, "--stages", "tests").stderr
