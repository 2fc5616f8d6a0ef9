"""``tilewise bench FAMILY``: every kernel beside torch's best way to do the same, in the same run.

Ratios are what counts: the two sides alternate, so that both see the same machine. The floor is the time that the
least bytes and operations take at the rates measured on this machine.
"""

import datetime
import importlib
import json
import platform
import re
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


def cells(result: dict) -> list[str]:
    """A result as text: case, both times, ratio with the middle half of its pairs, promise, floor, share of it."""
    ratio = f"{result['ratio']:.2f} ({result['ratio_low']:.2f} to {result['ratio_high']:.2f})"
    promised = f"{result['target']:.2f}" if result["target"] else ""
    floor, fraction = (f"{result['floor_seconds'] * 1e3:.3g}", f"{result['fraction_of_floor']:.0%}")
    times = (f"{result[side + '_seconds'] * 1e3:.3g}" for side in ("tilewise", "torch"))
    return [result["name"], *times, ratio, promised, *((floor, fraction) if result["floor_seconds"] else ("", ""))]


def rates_text(rates: dict) -> str:
    products = (f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates["flops"].items())
    return ", ".join([*products, f"copy {rates['bytes'] / 1e9:.1f} GB/s"])


COLUMNS = ("case", "tilewise ms", "torch ms", "torch / tilewise", "promised", "floor ms", "of floor")


def _table(entry: dict):
    from rich.table import Table

    machine, rates = entry["machine"], entry["rates"]
    about = f"{machine['device']}, {machine['threads']} thread(s), {machine['isa']}, torch {machine['torch']}"
    table = Table(title=f"{entry['family']}: {about}", caption=f"rates measured: {rates_text(rates)}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "case" else "right")
    for result in entry["results"]:
        missed = result["target"] and result["ratio"] < result["target"]
        table.add_row(*cells(result), style="red" if missed else None)
    return table


def markdown(report: list[dict], command: str) -> str:
    """The same tables for bench/results/."""
    lines = []
    for entry in report:
        machine, rates = entry["machine"], entry["rates"]
        lines += [
            f"## {entry['family']}",
            "",
            f"{machine['device']}, {machine['threads']} thread(s), {machine['isa']}, torch {machine['torch']}, "
            f"{machine['date']}; rates measured: {rates_text(rates)}",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---|" + "---:|" * (len(COLUMNS) - 1),
            *("| " + " | ".join(cells(r)) + " |" for r in entry["results"]),
            *(f"\nFailed: {name}: {why}" for name, why in entry.get("failed", {}).items()),
            "",
        ]
    return "\n".join([f"Command: `{command}`", "", *lines])


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
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.margins(y=0.005)
    axes.invert_yaxis()
    machine = report[0]["machine"]
    axes.set_xlabel("times faster than torch (orange: promised)")
    axes.set_title(f"{machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure_family(
    family: str, device: torch.device, rates: Rates, pattern="", pairs=15, track=iter, promised=False, keep_going=None
) -> dict:
    """One family's entry of the report; ``track`` may wrap the iteration in a progress bar.

    ``keep_going(entry)`` is called after every case, and a case that raises is noted in the entry and left behind.
    """
    cases = [c for c in importlib.import_module(f"tilewise.bench.{family}").cases(device) if re.search(pattern, c.name)]
    cases = [c for c in cases if c.target or not promised]
    entry = {"family": family, "machine": _machine(device, torch.get_num_threads()), "rates": {}, "results": []}
    for case in track(cases):
        try:
            result = measure(case, rates, device, pairs)
            entry["results"].append({**asdict(result), "fraction_of_floor": result.fraction_of_floor})
        except Exception as why:
            if not keep_going:
                raise
            entry.setdefault("failed", {})[case.name] = f"{type(why).__name__}: {why}"[:500]
        entry["rates"] = rates.as_dict()
        if keep_going:
            keep_going(entry)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return entry


def run(
    families,
    device="cpu",
    threads=1,
    pattern="",
    json_path=None,
    plot_path=None,
    markdown_path=None,
    pairs=15,
    promised=False,
) -> list[dict]:
    """Runs the cases of ``families`` whose name has a match of ``pattern``; if ``promised`` those with a promise.

    Prints tables and writes the files asked for.
    """
    from rich.console import Console
    from rich.progress import Progress

    device = torch.device(device)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    rates = measure_rates(device)
    console, report = Console(), []
    for family in families:
        with Progress(console=console, transient=True) as progress:
            track = lambda cases, family=family: progress.track(cases, description=family)  # noqa: B023, E731
            report.append(measure_family(family, device, rates, pattern, pairs, track, promised))
        console.print(_table(report[-1]))
    if json_path:
        Path(json_path).write_text(json.dumps(report, indent=1) + "\n")
    if markdown_path:
        command = f"tilewise bench {' '.join(families)} --device {device} --threads {threads} --pairs {pairs}"
        Path(markdown_path).write_text(markdown(report, command))
    if plot_path:
        plot(report, plot_path)
    return report
