"""The demo's closing table and plot."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tilewise.demo.train import Run


def training_table(results: dict[str, list[Run]]) -> Table:
    table = Table(title="Training: the same seed, the same batches")
    for column in ("model", "run", "steps", "validation bits/byte", "step ms", "optimizer state", "bytes/parameter"):
        table.add_column(column, justify="left" if column in ("model", "run") else "right")
    for title, runs in results.items():
        for run in runs:
            table.add_row(
                title,
                run.backend.name,
                str(run.steps[-1]),
                f"{run.validation[-1]:.4f}",
                f"{run.median_step * 1e3:.0f}",
                f"{run.state_bytes / 1e6:.2f} MB",
                f"{run.state_bytes / run.trained_parameters:.2f}",
            )
        theirs, ours = runs
        table.add_row(
            "",
            "tilewise / torch",
            "",
            f"{ours.validation[-1] / theirs.validation[-1] - 1:+.2%}",
            f"{theirs.median_step / ours.median_step:.2f}x faster",
            f"{theirs.state_bytes / ours.state_bytes:.1f}x smaller",
            "",
            style="bold",
            end_section=True,
        )
    return table


def decoding_table(plain, tree) -> Table:
    table = Table(title="Greedy decoding of held-out prompts over a paged cache")
    for column in ("run", "tokens", "tokens per step", "tokens/s", "identical"):
        table.add_column(column, justify="left" if column == "run" else "right")
    table.add_row("one token a step", str(plain.count), "1.00", f"{plain.rate:.0f}", "")
    identical = "yes" if plain.tokens == tree.tokens else "NO"
    table.add_row("token trees", str(tree.count), f"{tree.tokens_per_step:.2f}", f"{tree.rate:.0f}", identical)
    table.add_row("ratio", "", "", f"{tree.rate / plain.rate:.2f}x", "", style="bold")
    return table


def plot_losses(results: dict[str, list[Run]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4))
    for axis, (title, runs) in zip(axes, results.items(), strict=True):
        for run, color in zip(runs, ("#7f8c8d", "#2a7f62"), strict=True):
            label = f"{run.backend.name}: {run.validation[-1]:.3f} bits/byte, {run.median_step * 1e3:.0f} ms a step"
            axis.plot(range(1, len(run.training) + 1), run.training, color=color, alpha=0.35, linewidth=0.8)
            axis.plot(run.steps, run.validation, color=color, marker="o", markersize=3, label=label)
        axis.set_title(title)
        axis.set_xlabel("step (line: training, dots: validation)")
        axis.set_ylabel("bits per byte")
        axis.set_ylim(top=min(9, axis.get_ylim()[1]))
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def verdicts(results: dict[str, list[Run]], plain, tree) -> list[tuple[str, bool]]:
    """What the demo promises, and whether this run kept it."""
    found = []
    for title, (theirs, ours) in results.items():
        gap = ours.validation[-1] / theirs.validation[-1] - 1
        found.append((f"{title}: validation loss at most 1 % above torch's ({gap:+.2%})", gap <= 0.01))
        smaller = theirs.state_bytes / ours.state_bytes
        found.append((f"{title}: optimizer state at least 7x smaller ({smaller:.1f}x)", smaller >= 7))
    found.append(("token trees give the same tokens as plain greedy decoding", plain.tokens == tree.tokens))
    return found


def show(results: dict[str, list[Run]], plain, tree, out: Path, console: Console) -> None:
    """Prints the tables, writes them and the plot to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    plot_losses(results, out / "losses.png")
    with open(out / "report.txt", "w") as file:
        for target in (Console(width=max(110, console.width)), Console(file=file, width=110)):
            target.print(training_table(results))
            target.print(decoding_table(plain, tree))
            for text, kept in verdicts(results, plain, tree):
                target.print(f"[{'green' if kept else 'red'}]{'kept  ' if kept else 'MISSED'}[/] {text}")
    console.print(f"Plot and tables: {out / 'losses.png'}, {out / 'report.txt'}")
