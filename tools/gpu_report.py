"""`make gpu-report`: everything that only a machine with a GPU can tell, in one run of at most nine minutes.

Builds for the local architecture, runs the `cuda` half of the suite, records golden vectors of the device intrinsics,
runs compute-sanitizer on small cases, and benchmarks every family beside torch. Writes gpu-report.json and
gpu-report.md to the folder $OUT (default bench/results). Arguments name families; default: all.

Needs nvcc, cmake, ninja, torch, pybind11 and pytest; no network. Each stage has its own time limit and a failure does
not stop the next, so that a scarce machine always yields what it can.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path(os.environ.get("OUT", ROOT / "bench" / "results"))
FAMILIES = ("attention", "fft_conv", "sparse", "speculative", "optim")

BENCH = """
import json, sys, torch
from tilewise import bench
device = torch.device("cuda")
rates = bench.measure_rates(device)
print(json.dumps([bench.measure_family(f, device, rates, pairs=7) for f in sys.argv[1:]]))
"""


class Report:
    """Stages as they finish; written after each, so that a killed run leaves its results."""

    def __init__(self, families):
        self.families, self.begin = families, time.monotonic()
        self.data = {"families": list(families), "stages": {}, "bench": []}

    def stage(self, name: str, command: list[str], limit: int, environment: dict | None = None) -> str | None:
        print(f"== {name} ({time.monotonic() - self.begin:.0f} s)", flush=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), **(environment or {})}
        start = time.monotonic()
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit)
            code, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as late:
            code, output = "time limit", str(late.stdout or b"")
        except FileNotFoundError as missing:
            code, output = "not found", str(missing)
        tail = output.strip().splitlines()[-12:]
        seconds = round(time.monotonic() - start, 1)
        self.data["stages"][name] = {"result": code, "seconds": seconds, "tail": tail}
        print("\n".join(tail[-4:]), f"-> {code}, {seconds} s", flush=True)
        self.write()
        return done.stdout if code == 0 else None

    def write(self) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "gpu-report.json").write_text(json.dumps(self.data, indent=1) + "\n")
        (OUT / "gpu-report.md").write_text(self.markdown())

    def markdown(self) -> str:
        lines = [
            "# GPU report",
            "",
            "Command: `make gpu-report`",
            "",
            "| stage | result | seconds | last line |",
            "|---|---|---:|---|",
        ]
        for name, stage in self.data["stages"].items():
            last = stage["tail"][-1].replace("|", "/")[:160] if stage["tail"] else ""
            lines.append(f"| {name} | {stage['result']} | {stage['seconds']} | {last} |")
        if self.data["bench"]:
            sys.path.insert(0, str(ROOT / "python"))
            from tilewise import bench

            lines += ["", bench.markdown(self.data["bench"], "make gpu-report")]
        return "\n".join(lines) + "\n"


def build(report: Report) -> None:
    jobs = str(os.cpu_count())
    configure = ["cmake", "-S", ".", "-B", "build/gpu", "-G", "Ninja", "-DTILEWISE_INPLACE=ON", "-DTILEWISE_CUDA=ON"]
    configure += ["-DCMAKE_CUDA_ARCHITECTURES=" + local_architecture(), f"-DPython_EXECUTABLE={sys.executable}"]
    report.stage("configure", configure, 60)
    report.stage("build", ["cmake", "--build", "build/gpu", "-j", jobs], 240)


def local_architecture() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}a-real" if major == 9 else f"{major}{minor}-real"


def family_tests(family: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob(f"test_{family}*.py"))


def tests(report: Report) -> None:
    for family in report.families:
        command = [sys.executable, "-m", "pytest", "-p", "no:randomly", *family_tests(family)]
        report.stage(f"test {family}", command, 120, {"TILEWISE_DEVICES": "cuda"})


def golden_vectors(report: Report) -> None:
    """One .npz per architecture; belongs into tests/golden/."""
    driver, library = str(ROOT / "tests" / "simt" / "golden.py"), str(ROOT / "build" / "libgolden.so")
    arch = local_architecture().removesuffix("-real")
    report.stage("golden build", [sys.executable, driver, "build", "--arch", arch, "--out", library], 120)
    report.stage("golden record", [sys.executable, driver, "record", "--lib", library, "--out", str(OUT)], 60)


def sanitizer(report: Report) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for check in ("memcheck", "racecheck"):
        for family in report.families:
            run = [sys.executable, "-m", "pytest", "-x", "-m", "modes", *family_tests(family)]
            command = [tool, "--tool", check, "--error-exitcode", "9", "--kernel-name", "regex:kernel_entry", *run]
            report.stage(f"{check} {family}", command, 75, {"TILEWISE_DEVICES": "cuda"})


def benchmarks(report: Report) -> None:
    for family in report.families:
        output = report.stage(f"bench {family}", [sys.executable, "-c", BENCH, family], 90)
        if output:
            report.data["bench"] += json.loads(output.strip().splitlines()[-1])
            report.write()


def main() -> None:
    families = sys.argv[1:] or FAMILIES
    unknown = set(families) - set(FAMILIES)
    if unknown:
        sys.exit(f"gpu_report: no family {', '.join(sorted(unknown))}; expected some of {', '.join(FAMILIES)}")
    report = Report(families)
    for stage in (build, tests, benchmarks, golden_vectors, sanitizer):
        stage(report)
    print(f"written to {OUT}: gpu-report.json, gpu-report.md ({time.monotonic() - report.begin:.0f} s)")


if __name__ == "__main__":
    main()
