"""The plot of a run on a CUDA device: every contender's bandwidth as a ratio to a copy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from gpu_cases import ARRAY, CASTS, FEDAVG, HOOK, Case
from gpu_rows import Results, Row

mpl.use("Agg")
import matplotlib.pyplot as plt

_COLUMNS: tuple[tuple[Case, ...], ...] = (
    tuple(case for case in FEDAVG if case.layout == ARRAY),
    tuple(case for case in FEDAVG if case.layout != ARRAY),
    (*CASTS, HOOK),
)
_COLOURS = {"fastagg": "#0b6e4f", "torch": "#9aa5b1", "cupy": "#7fa7c9", "triton": "#e0a458"}
_INCH_PER_BAR = 0.19
_BETWEEN_CASES = 1.4
_BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def draw(results: Results, path: Path, subtitle: str) -> None:
    """Draws the rows that have a bandwidth."""
    columns = [_blocks(results, cases) for cases in _COLUMNS]
    tallest = max(sum(len(block) + _BETWEEN_CASES for block in column) for column in columns)
    figure, all_axes = plt.subplots(1, len(columns), figsize=(17, 1.3 + tallest * _INCH_PER_BAR), layout="constrained")
    figure.suptitle("Bandwidth as a ratio to a copy in device memory (longer is better)\n" + subtitle, fontsize=11)
    widest = max((row.fraction_of_copy or 0 for row in results.rows), default=1)
    for axes, blocks in zip(all_axes, columns, strict=True):
        _draw_column(axes, blocks, results, tallest, max(widest, 1) * 1.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _blocks(results: Results, cases: tuple[Case, ...]) -> list[list[Row]]:
    """The rows of every case that has some."""
    blocks = [[row for row in results.rows if row.key == case.key] for case in cases]
    return [block for block in blocks if block]


def _draw_column(axes: Any, blocks: list[list[Row]], results: Results, height: float, width: float) -> None:
    place, places, names = 0.0, list[float](), list[str]()
    for block in blocks:
        axes.text(0, place, block[0].key, fontsize=8.5, fontweight="bold", va="center")
        for row in block:
            place += 1
            _draw_bar(axes, place, row, results.times_fastagg(row))
            places.append(place)
            names.append(row.contender)
        place += _BETWEEN_CASES
    axes.set_yticks(places, names, fontsize=7.5)
    axes.set_ylim(height, -1)
    axes.set_xlim(0, width)
    axes.axvline(1, color="#444444", linewidth=0.8, linestyle="--", zorder=0)
    axes.text(1, -1, "the copy", fontsize=8, ha="center", va="bottom", color="#444444")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_bar(axes: Any, place: float, row: Row, times_fastagg: float | None) -> None:
    fraction = row.fraction_of_copy or 0
    axes.barh(place, fraction, height=0.82, color=_COLOURS[row.package])
    times = "" if times_fastagg is None else f"   {times_fastagg:.1f}x fastagg's time"
    axes.text(fraction + 0.01, place, f"{fraction:.2f}{times}", fontsize=7.5, va="center", bbox=_BEHIND_TEXT)
