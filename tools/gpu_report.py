"""`make gpu-report`: everything that only a machine with a GPU can tell, the most valuable first.

    build       for the local architecture, the CPU kernels in their generic version only
    test        the `cuda` half of the suite, in several processes; one that loses its GPU context is started again
    bench       every family beside torch
    golden      vectors of the device intrinsics, for CI to compare the emulator with
    sanitizer   compute-sanitizer's memcheck and racecheck on small cases
    ncu         shares of the peak rates of memory and tensor cores, one case of each family

    python tools/gpu_report.py [--stages build,test] [--seconds 560] [--continue] [FAMILY ...]

Writes gpu-report.json, gpu-report.md and gpu-report.log (the stages' whole output) to the folder $OUT (default
bench/results). Stages end with their own time limits and all together after --seconds; a failure does not stop the
next. What is built stays, so stages can be spread over several runs: --continue adds to the last run's report.
--rehearse goes the same way on a machine without a GPU: a pretended device, CPU benchmarks, nothing built.

Needs nvcc, cmake, ninja, torch, pybind11, pytest and numpy; no network. pytest-xdist is used where it is installed.
"""

import argparse
import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAMILIES = ("attention", "fft_conv", "sparse", "speculative", "optim")
ALSO_TESTED = {  # beside tests/test_<family>*.py
    "attention": ("lm_infinite", "packing", "rope", "zip_cache", "block_sparsity", "compat_flash_attn"),
    "optim": ("compat_bitsandbytes",),
}
LOG_BYTES = 12 << 20

BENCH = """
import json, sys, torch
from pathlib import Path
from tilewise import bench
family, device, pairs, pattern, path = sys.argv[1:]
device = torch.device(device)
keep = lambda entry: Path(path).write_text(json.dumps(entry))
entry = bench.measure_family(family, device, bench.measure_rates(device), pattern, int(pairs), keep_going=keep)
print(*(f"FAILED {n}: {w}" for n, w in entry.get("failed", {}).items()), sep="\\n")
print(len(entry["results"]), "cases")
sys.exit(bool(entry.get("failed")))
"""

# The tilewise side of the first case of a name, once to warm up and once profiled.
PROFILED = """
import importlib, sys, torch
cases = importlib.import_module("tilewise.bench." + sys.argv[1]).cases(torch.device("cuda"))
run = next(case for case in cases if sys.argv[2] in case.name).runs()[0]
run(); torch.cuda.synchronize()
torch.cuda.cudart().cudaProfilerStart(); run(); torch.cuda.synchronize(); torch.cuda.cudart().cudaProfilerStop()
"""
PROFILED_CASES = {
    "attention": ("bf16 causal 8K d128", "decode bfloat16 32 x 32/8"),
    "fft_conv": ("64x768x4096",),
    "sparse": ("4096x4096x4096 forward",),
    "speculative": ("bfloat16 16 x N=16 heads=32",),
    "optim": ("AdamW 4-bit float32",),
}

REHEARSED = {  # one small case of each family
    "attention": "fp32 packed", "fft_conv": "fp32 8x64x1000", "sparse": "2:4 float32 1x", "speculative": "verify",
    "optim": "1M",
}  # fmt: skip


def tool(name: str) -> str:
    """A program of the CUDA toolkit, which may be off the PATH."""
    return shutil.which(name) or f"/usr/local/cuda/bin/{name}"


def environment(extra: dict) -> dict:
    """Programs beside this interpreter and those of the toolkit are found."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "python"), "PYTHONUNBUFFERED": "1", **extra}


class Report:
    """Stages as they finish; written after each, so that a killed run leaves its results."""

    def __init__(self, families, out: Path, seconds: float, rehearsal: bool = False, before: Path | None = None):
        self.families, self.out, self.rehearsal = families, out, rehearsal
        self.begin, self.seconds = time.monotonic(), seconds
        self.kept = before
        self.data = {"families": list(families), "stages": {}, "bench": {}, "profiles": {}}
        if before and before.exists():
            self.data.update(json.loads(before.read_text()))
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "gpu-report.log").open("wb")

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def stage(self, name: str, command: list[str], limit: float, extra: dict | None = None) -> str | None:
        """Runs one command; its output if it succeeded."""
        limit = min(limit, self.left())
        print(f"== {name} ({time.monotonic() - self.begin:.0f} s)", flush=True)
        if limit < 3:
            return self.finish(name, "no time left", 0.0, "")
        start = time.monotonic()
        with tempfile.TemporaryFile() as output:  # a killed command leaves what it printed
            try:
                streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
                code = subprocess.run(
                    command, cwd=ROOT, env=environment(extra or {}), timeout=limit, **streams
                ).returncode
            except subprocess.TimeoutExpired:
                code = "time limit"
            except OSError as missing:
                code = f"{type(missing).__name__}: {missing}"
            output.seek(0)
            text = output.read().decode(errors="replace")
        return self.finish(name, code, round(time.monotonic() - start, 1), text)

    def finish(self, name, code, seconds, text) -> str | None:
        tail = text.strip().splitlines()[-12:]
        self.data["stages"][name] = {"result": code, "seconds": seconds, "tail": tail}
        print("\n".join(tail[-4:]), f"-> {code}, {seconds} s", flush=True)
        room = max(0, LOG_BYTES - self.log.tell())
        self.log.write(f"\n==== {name}: {code}, {seconds} s\n{text}".encode()[-room:] if room else b"")
        self.log.flush()
        self.write()
        return text if code == 0 else None

    def write(self) -> None:
        text = json.dumps(self.data, indent=1) + "\n"
        for path in (self.out / "gpu-report.json", *([self.kept] if self.kept else [])):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (self.out / "gpu-report.md").write_text(self.markdown())

    def markdown(self) -> str:
        lines = ["# GPU report", "", "Command: `make gpu-report`", ""]
        lines += ["| stage | result | seconds | last line |", "|---|---|---:|---|"]
        for name, stage in self.data["stages"].items():
            last = stage["tail"][-1].replace("|", "/")[:160] if stage["tail"] else ""
            lines.append(f"| {name} | {stage['result']} | {stage['seconds']} | {last} |")
        for name, rows in self.data["profiles"].items():
            lines += ["", f"## Profile: {name}", "", "| kernel | metric | value |", "|---|---|---:|"]
            lines += [f"| `{kernel[:80]}` | {metric} | {value} |" for kernel, metric, value in rows]
        if self.data["bench"]:
            sys.path.insert(0, str(ROOT / "python"))
            from tilewise import bench

            about = "The share of the floor, where bytes decide it, is the share of a copy's bandwidth."
            lines += ["", about, "", bench.markdown(list(self.data["bench"].values()), "make gpu-report")]
        return "\n".join(lines) + "\n"


def local_architecture() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}a-real" if major == 9 else f"{major}{minor}-real"


def ninja() -> str | None:
    """Where pip put it, which need not be on the PATH."""
    found = importlib.util.find_spec("ninja")
    beside = Path(found.origin).parent / "data" / "bin" / "ninja" if found else None
    beside = beside if beside and beside.exists() else Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja")


def build(report: Report) -> None:
    if not report.rehearsal:
        cmake = [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]
        configure = [*cmake, "-S", ".", "-B", "build/gpu", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja()}"]
        configure += ["-DTILEWISE_INPLACE=ON", "-DTILEWISE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={tool('nvcc')}"]
        configure += [f"-DCMAKE_CUDA_ARCHITECTURES={local_architecture()}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += ["-DTILEWISE_ISAS=generic", "-DTILEWISE_FAMILIES=" + ";".join(report.families)]
        report.stage("configure", configure, 60)
        report.stage("build", [*cmake, "--build", "build/gpu", "-j", str(os.cpu_count()), "--", "-k", "0"], 300)
    check = "import torch, tilewise; print(tilewise.info(), torch.__version__, torch.cuda.is_available())"
    report.stage("import", [sys.executable, "-c", check], 60)


def family_tests(family: str) -> list[str]:
    """A family's tests, but those that run whole programs or several processes."""
    names = [f"test_{family}*.py", *(f"test_{name}.py" for name in ALSO_TESTED.get(family, ()))]
    found = [path for name in names for path in (ROOT / "tests").glob(name)]
    return sorted(str(p.relative_to(ROOT)) for p in found if "distributed" not in p.name)


def tests(report: Report) -> None:
    pytest = [sys.executable, "-m", "pytest", "-p", "no:randomly", "--continue-on-collection-errors", "--tb=short"]
    devices = {"TILEWISE_DEVICES": "pretend" if report.rehearsal else "cuda"}
    several = importlib.util.find_spec("xdist") and not report.rehearsal
    processes = ["-n", str(min(8, os.cpu_count())), "--maxprocesses=8"] if several else []
    for family in report.families:
        chosen = ["-k", "known or bad"] if report.rehearsal else ["--durations=10"]
        report.stage(f"test {family}", [*pytest, *processes, *chosen, *family_tests(family)], 120, devices)


def benchmarks(report: Report) -> None:
    device, pairs = ("cpu", "1") if report.rehearsal else ("cuda", "7")
    with tempfile.TemporaryDirectory() as folder:
        for family in (*report.families, "binding"):
            path = Path(folder) / f"{family}.json"
            pattern = REHEARSED.get(family, "") if report.rehearsal else ""
            report.stage(
                f"bench {family}", [sys.executable, "-c", BENCH, family, device, pairs, pattern, str(path)], 90
            )
            if path.exists():  # also of a run that met its time limit
                report.data["bench"][family] = json.loads(path.read_text())
                report.write()


def golden_vectors(report: Report) -> None:
    """One .npz per architecture; belongs into tests/golden/."""
    driver = [sys.executable, str(ROOT / "tests" / "simt" / "golden.py")]
    if report.rehearsal:
        report.stage("golden record", [*driver, "record", "--emulated", "--out", str(report.out)], 300)
        return
    library, arch = str(ROOT / "build" / "libgolden.so"), local_architecture().removesuffix("-real")
    report.stage("golden build", [*driver, "build", "--arch", arch, "--nvcc", tool("nvcc"), "--out", library], 120)
    report.stage("golden record", [*driver, "record", "--lib", library, "--out", str(report.out)], 60)


def sanitizer(report: Report) -> None:
    for check in ("memcheck", "racecheck") if not report.rehearsal else ():
        for family in report.families:
            run = [sys.executable, "-m", "pytest", "-x", "-m", "modes", *family_tests(family)]
            command = [tool("compute-sanitizer"), "--tool", check, "--error-exitcode", "9"]
            only_ours, devices = ["--kernel-name", "kns=kernel_entry"], {"TILEWISE_DEVICES": "cuda"}
            report.stage(f"{check} {family}", [*command, *only_ours, *run], 75, devices)
            stage = report.data["stages"][f"{check} {family}"]
            if stage["seconds"] < 3 and stage["result"] not in (0, "no time left"):  # it did not take the options
                report.stage(f"{check} {family}", [*command, *run], 75, devices)


def profiles(report: Report) -> None:
    """Achieved shares of the peak rates, where ncu is at hand and may read the counters."""
    wanted = ("DRAM Throughput", "Compute (SM) Throughput", "Duration", "Registers Per Thread", "tensor")
    options = ["--set", "basic", "--section", "ComputeWorkloadAnalysis", "--print-details", "all", "--csv"]
    options += ["--page", "details", "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "4"]
    for family in report.families if not report.rehearsal and Path(tool("ncu")).exists() else ():
        for case in PROFILED_CASES[family]:
            command = [tool("ncu"), *options, sys.executable, "-c", PROFILED, family, case]
            output = report.stage(f"ncu {family}: {case}", command, 60)
            rows = csv.DictReader(io.StringIO(output[output.find('"ID"') :])) if output and '"ID"' in output else ()
            report.data["profiles"][f"{family}: {case}"] = [
                (row["Kernel Name"], row["Metric Name"], f"{row['Metric Value']} {row['Metric Unit']}")
                for row in rows
                if any(name in (row.get("Metric Name") or "") for name in wanted)
            ]
            report.write()


STAGES = {
    "build": build, "test": tests, "bench": benchmarks, "golden": golden_vectors, "sanitizer": sanitizer,
    "ncu": profiles,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", nargs="*", help=f"some of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=560, help="for everything (default: %(default)s)")
    parser.add_argument("--continue", dest="resume", action="store_true", help="add to the last run's report")
    parser.add_argument("--rehearse", action="store_true", help="the same way without a GPU")
    found = parser.parse_args()
    for name, value, known in (("family", found.family, FAMILIES), ("stage", found.stages.split(","), STAGES)):
        if unknown := set(value) - set(known):
            parser.error(f"no {name} {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    return found


def main() -> None:
    chosen = arguments()
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    if chosen.rehearse and "OUT" not in os.environ:
        out = Path(tempfile.mkdtemp(prefix="gpu-report-"))
    kept = None if chosen.rehearse else ROOT / "build" / "gpu" / "gpu-report.json"
    if kept and not chosen.resume:
        kept.unlink(missing_ok=True)
    report = Report(chosen.family or FAMILIES, out, chosen.seconds, chosen.rehearse, kept)
    for name in chosen.stages.split(","):
        try:
            STAGES[name](report)
        except Exception as why:  # a scarce machine always yields what it can
            report.finish(f"{name} (the script)", f"{type(why).__name__}: {why}", 0.0, "")
    print(f"written to {out}: gpu-report.json, .md, .log ({time.monotonic() - report.begin:.0f} s)")


if __name__ == "__main__":
    main()
