"""The demo as a person sees it: progress, a table and a figure."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastagg.cli.demo import CLASSES, Results, Settings, WireRun, run
from fastagg.files.atomic import atomic_file, check_place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

CHECKPOINTS = (1, 5, 10, 20, 30)

_INK, _PALE = "#22303c", "#8a97a3"
# The curves all but coincide: each later one is thinner, so that the earlier ones show on both sides of it.
_WIRE_STYLES = (("#b9c4ce", 8.0), ("#2f7ec7", 4.0), ("#e2502b", 1.5), ("#3d9a6b", 1.0))
_DIGIT_COLOURS = (
    *("#33507a", "#4f83b8", "#8fbbd9", "#3f8f7b", "#8cc7a1"),
    *("#e9d27c", "#eda44f", "#d9663f", "#a8405a", "#6d4a7f"),
)


def present(settings: Settings, output: Path, console: Console) -> Results:
    """Runs the demo under a progress bar, prints the table and writes the figure."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    output.parent.mkdir(parents=True, exist_ok=True)
    check_place(output, force=True)  # before the training, not after it
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {wire: progress.add_task(f"{wire} uploads", total=settings.rounds) for wire in settings.wires}
        results = run(settings, lambda wire, done: progress.update(tasks[wire], completed=done))
    for table in (accuracy_table(results), cost_table(results)):
        console.print(table)
    console.print(
        "fastagg and the NumPy loop average the very same uploads, and their means are checked to agree first. "
        "The model is small, so the times are mostly Python's; `fastagg bench` shows large ones."
    )
    draw(results, output)
    console.print(f"Figure: {output}", soft_wrap=True)
    return results


def accuracy_table(results: Results) -> Table:
    """Accuracy of each wire after some of the rounds."""
    rounds = [number for number in CHECKPOINTS if number < results.settings.rounds] + [results.settings.rounds]
    rows = [(wired.wire, *(f"{wired.accuracy[number - 1]:.1%}" for number in rounds)) for wired in results.runs]
    return _table("Test accuracy after …", ("uploads", *(f"round {number}" for number in rounds)), rows)


def cost_table(results: Results) -> Table:
    """Bytes and times of each wire."""
    headings = ("uploads", "bytes\na round", "bytes\nin total", "mean by\nfastagg", "mean by\nNumPy loop")
    title = f"Cost, with {results.settings.clients_per_round} uploads a round; times are medians"
    return _table(title, headings, [(wired.wire, *_costs(wired)) for wired in results.runs])


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _costs(wired: WireRun) -> tuple[str, ...]:
    sizes = (statistics.mean(wired.upload_bytes), sum(wired.upload_bytes))
    times = (statistics.median(wired.fastagg_seconds), statistics.median(wired.numpy_seconds))
    return *(bytes_in_words(size) for size in sizes), *(f"{seconds * 1e6:.0f} µs" for seconds in times)


def bytes_in_words(size: float) -> str:
    """A number of bytes with a unit: 192.4 kB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def draw(results: Results, output: Path) -> None:
    """Writes the figure as a PNG: accuracy by round, accuracy by bytes uploaded, and who holds which digits."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcParams["axes.edgecolor"] = _PALE
        for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"):
            mpl.rcParams[name] = _INK
        figure = Figure(figsize=(12, 8.2), dpi=120, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 2, height_ratios=(1.25, 1), hspace=0.42, wspace=0.14)
        grid.update(left=0.065, right=0.945, top=0.83, bottom=0.075)
        by_round = figure.add_subplot(grid[0, 0])
        _draw_accuracy_by_round(by_round, results)
        _draw_accuracy_by_bytes(figure.add_subplot(grid[0, 1], sharey=by_round), results)
        _draw_clients(figure.add_subplot(grid[1, :]), results)
        _write_titles(figure, results)
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output, force=True) as descriptor, os.fdopen(os.dup(descriptor), "wb") as file:
            figure.savefig(file, format="png")


def _write_titles(figure: Any, results: Results) -> None:
    settings = results.settings
    first, last = results.runs[0], results.runs[-1]
    share = sum(last.upload_bytes) / sum(first.upload_bytes)
    title = f"{settings.clients} clients learn handwritten digits together"
    if first is not last:
        title += f": {last.wire} uploads need {share:.0%} of the bytes of {first.wire}"
    figure.text(0.065, 0.95, title, fontsize=15, fontweight="bold", va="center")
    detail = (
        f"Federated averaging for {settings.rounds} rounds, {settings.clients_per_round} clients drawn in each; "
        "final test accuracy: " + ", ".join(f"{wired.wire} {wired.accuracy[-1]:.1%}" for wired in results.runs)
    )
    figure.text(0.065, 0.912, detail, fontsize=10.5, color="#55636f", va="center")


def _style_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e8ecef", linewidth=0.9)


def _draw_accuracy_by_round(axes: Axes, results: Results) -> None:
    curves = np.array([wired.accuracy for wired in results.runs])
    apart = float(np.max(curves.max(axis=0) - curves.min(axis=0)))
    _style_axes(axes, f"Test accuracy by round (curves within {apart * 100:.1f} points)")
    rounds = range(1, results.settings.rounds + 1)
    for wired, (colour, width) in zip(results.runs, _WIRE_STYLES, strict=False):
        axes.plot(rounds, wired.accuracy, color=colour, linewidth=width, label=wired.wire, solid_capstyle="round")
    axes.set_xlabel("round")
    axes.set_xlim(0, results.settings.rounds * 1.03)
    axes.set_ylim(max(0, np.floor(curves.min() * 10) / 10 - 0.1), 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(title="uploads", frameon=False, loc="lower right", alignment="left")


def _draw_accuracy_by_bytes(axes: Axes, results: Results) -> None:
    _style_axes(axes, "Test accuracy by megabytes uploaded")
    for wired, (colour, _) in zip(results.runs, _WIRE_STYLES, strict=False):
        megabytes = [size / 1e6 for size in accumulate(wired.upload_bytes)]
        axes.plot(megabytes, wired.accuracy, color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot(megabytes[-1], wired.accuracy[-1], "o", color=colour, markersize=7)
        # A line down from the last round to the axis, where there is room for words.
        axes.plot([megabytes[-1]] * 2, [0, wired.accuracy[-1]], color=colour, linewidth=1, linestyle=(0, (2, 3)))
        axes.annotate(
            f"{wired.wire}\n{bytes_in_words(sum(wired.upload_bytes))}",
            (megabytes[-1], axes.get_ylim()[0]),
            xytext=(-6, 7),
            textcoords="offset points",
            ha="right",
            va="bottom",
        )
    axes.set_xlabel("uploaded by all clients so far, MB")
    axes.set_xlim(left=0)


def _draw_clients(axes: Axes, results: Results) -> None:
    _style_axes(axes, "What each client holds: training images by digit")
    counts = results.label_counts
    clients = np.arange(len(counts))
    bottom = np.zeros(len(counts))
    for digit in range(CLASSES):
        bars = axes.bar(clients, counts[:, digit], 0.78, bottom, color=_DIGIT_COLOURS[digit], label=str(digit))
        for bar in bars:
            bar.set(edgecolor="white", linewidth=0.6)
        bottom += counts[:, digit]
    axes.set_xticks(clients if len(clients) <= 30 else clients[:: len(clients) // 20])
    axes.set_xlim(-0.6, len(counts) - 0.4)
    axes.set_xlabel("client")
    axes.set_ylabel("images")
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1)
    legend.set(title="digit", frame_on=False)
