"""The plot of an all-reduce run: time against size, and what the wires gain on a slow link and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from all_reduce_cases import (
    GLOO,
    LIMIT,
    OPEN_MPI,
    PLAIN_DDP,
    TORCH_HOOK,
    TWO_HOSTS,
    TWO_RANKS,
    TWO_RANKS_OF_MPI,
    fastagg_over,
    short_size,
)
from all_reduce_rows import Results, times

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

# Colour, line and marker of each contender.
_STYLES = {
    fastagg_over("fp32"): ("#0b6e4f", "-", "o"),
    fastagg_over("fp16"): ("#3aa17e", "-", "s"),
    fastagg_over("int8"): ("#8fd0b5", "-", "^"),
    fastagg_over("fp32", "backend"): ("#0b6e4f", ":", "o"),
    fastagg_over("fp16", "backend"): ("#3aa17e", ":", "s"),
    GLOO: ("#5b6672", "-", "o"),
    TORCH_HOOK: ("#9aa5b1", "-", "s"),
    OPEN_MPI: ("#e0a458", "-", "D"),
}


def draw(results: Results, path: Path, subtitle: str) -> None:
    """Draws all that was measured."""
    figure = plt.figure(figsize=(13, 6.6), layout="constrained")
    figure.suptitle("Time of an all-reduce (lower is better)\n" + subtitle, fontsize=11)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1))
    _draw_sizes(figure.add_subplot(grid[:, 0]), results)
    _draw_link(figure.add_subplot(grid[0, 1]), results)
    _draw_steps(figure.add_subplot(grid[1, 1]), results)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_sizes(axes: Any, results: Results) -> None:
    """Time against size, both logarithmic, for two ranks."""
    rows = [row for row in results.rows if row.exchange == TWO_RANKS.key]
    rows += [row for row in results.rows if row.exchange == TWO_RANKS_OF_MPI.key and row.contender == OPEN_MPI]
    for name, (colour, line, marker) in _STYLES.items():
        points = [(row.size, row.median) for row in rows if row.contender == name]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, markersize=4, label=name)
    limits = [(row.size, row.median) for row in rows if row.contender == LIMIT]
    axes.plot(*zip(*limits, strict=True), "--", color="#444444", linewidth=1, label="limit: memory, 8 bytes an element")
    axes.set(xscale="log", yscale="log", xlabel="size of the fp32 tensor on each rank")
    # Far below the others the limit says nothing: those tensors are in the caches.
    axes.set_ylim(bottom=min(row.median for row in rows if row.contender != LIMIT) / 3)
    axes.set_xticks([size for size, _ in limits], [short_size(size) for size, _ in limits], fontsize=8)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title("Two ranks on one host", fontsize=10)
    axes.grid(color="#e4e7eb", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_link(axes: Any, results: Results) -> None:
    """Bars of what each needs over the link."""
    rows = [row for row in results.rows if row.exchange == TWO_HOSTS.key and row.contender != LIMIT]
    size = short_size(rows[0].size) if rows else "not measured"
    axes.set_title(f"Two hosts, a link of 1 Gbit/s, {size}", fontsize=10)
    for row in rows:
        over = results.times(row, GLOO)
        remark = "" if over is None else f"{1 / over:.2f}x as fast as Gloo"
        _draw_bar(axes, row.contender, row.contender, row.median, remark)
    _finish_bars(axes)


def _draw_steps(axes: Any, results: Results) -> None:
    """Bars of a training step."""
    axes.set_title("A step of DDP, two ranks on one host", fontsize=10)
    for row in results.steps:
        plain = results.step(row.model, PLAIN_DDP)
        remark = "" if plain is None else f"{times(plain, row):.2f}x as fast as plain DDP"
        _draw_bar(axes, f"{row.model}: {row.contender}", row.contender, row.median, remark)
    _finish_bars(axes)


def _draw_bar(axes: Any, label: str, contender: str, seconds: float, remark: str) -> None:
    """One more bar, its time and speed beside it."""
    place = len(axes.patches)
    axes.barh(place, seconds * 1e3, height=0.78, color="#0b6e4f" if contender.startswith("fastagg") else "#9aa5b1")
    axes.text(seconds * 1e3, place, f" {seconds * 1e3:.0f} ms, {remark}", fontsize=7.5, va="center")
    axes.text(-0.01, place, label, fontsize=8, va="center", ha="right", transform=axes.get_yaxis_transform())


def _finish_bars(axes: Any) -> None:
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlim(0, axes.get_xlim()[1] * 1.55)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("milliseconds", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
