"""``tilewise bench FAMILY``: every kernel beside torch's best way to do the same, in the same run.

Ratios are what counts: the two sides alternate, so that both see the same machine. The floor is the time that the
least bytes and operations take at the rates measured on this machine.
"""

import datetime
import importlib
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

import tilewise
from tilewise.bench.case import Case, Rates, Result, measure, measure_rates

FAMILIES = ("attention", "fft_conv", "sparse", "speculative", "optim", "binding")

__all__ = ["FAMILIES", "Case", "Rates", "Result", "measure", "measure_rates", "run"]


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _machine(device: torch.device, threads: int) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": threads,
        "isa": tilewise.info()["isa"],
        "torch": torch.__version__,
        "tilewise": tilewise.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _table(family: str, results: list[Result], machine: dict, rates: Rates):
    from rich.table import Table

    about = f"{machine['device']}, {machine['threads']} thread(s), {machine['isa']}, torch {machine['torch']}"
    table = Table(
        title=f"{family}: {about}", caption=f"rates {rates.flops / 1e9:.0f} GFLOP/s, {rates.bytes / 1e9:.1f} GB/s"
    )
    table.add_column("case")
    for column in ("tilewise ms", "torch ms", "torch / tilewise", "promised", "floor ms", "of floor"):
        table.add_column(column, justify="right")
    for r in results:
        met = r.target is None or r.ratio >= r.target
        ratio = f"[{'green' if met else 'red'}]{r.ratio:.2f}[/] ({r.ratio_low:.2f} to {r.ratio_high:.2f})"
        promised = "" if r.target is None else f"{r.target:.2f}"
        fraction = f"{r.fraction_of_floor:.0%}" if r.floor_seconds else ""
        floor = f"{r.floor_seconds * 1e3:.3g}" if r.floor_seconds else ""
        row = (f"{r.tilewise_seconds * 1e3:.3g}", f"{r.torch_seconds * 1e3:.3g}", ratio, promised, floor, fraction)
        table.add_row(r.name, *row)
    return table


def plot(report: list[dict], path: str) -> None:
    """Bars of torch / tilewise for every case, a tick where the project promises a ratio."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(f"{entry['family']}: {r['name']}", r) for entry in report for r in entry["results"]]
    figure, axes = plt.subplots(figsize=(10, 0.8 + 0.32 * len(rows)))
    for y, (_, r) in enumerate(rows):
        axes.barh(y, r["ratio"], color="#2a7f62" if r["target"] is None or r["ratio"] >= r["target"] else "#c0392b")
        axes.plot([r["ratio_low"], r["ratio_high"]], [y, y], color="black", linewidth=1)
        axes.text(r["ratio"], y, f" {r['ratio']:.2f}", va="center", fontsize=8)
        if r["target"]:
            axes.plot([r["target"]] * 2, [y - 0.4, y + 0.4], color="#e67e22", linewidth=2)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    machine = report[0]["machine"]
    axes.set_xlabel("times faster than torch (orange: promised)")
    axes.set_title(f"{machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(families, device="cpu", threads=1, pattern="", json_path=None, plot_path=None, pairs=15) -> list[dict]:
    """Runs the cases of ``families`` whose name contains ``pattern``; prints tables, optionally writes JSON and PNG."""
    from rich.console import Console
    from rich.progress import Progress

    device = torch.device(device)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    rates = measure_rates(device)
    console, report = Console(), []
    for family in families:
        cases = [c for c in importlib.import_module(f"tilewise.bench.{family}").cases(device) if pattern in c.name]
        with Progress(console=console, transient=True) as progress:
            results = [measure(c, rates, device, pairs) for c in progress.track(cases, description=family)]
        machine = _machine(device, threads)
        console.print(_table(family, results, machine, rates))
        rows = [{**asdict(r), "fraction_of_floor": r.fraction_of_floor} for r in results]
        report.append({"family": family, "machine": machine, "rates": asdict(rates), "results": rows})
    if json_path:
        Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
    if plot_path:
        plot(report, plot_path)
    return report
