"""The plot of a run: every contender's fraction of the machine's limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from rows import Row

mpl.use("Agg")
import matplotlib.pyplot as plt

_COLUMNS = (("fedavg",), ("accumulator", "quantize", "dequantize"))
_COLOURS = {"fastagg": "#0b6e4f", "torch": "#9aa5b1", "numpy": "#b8a9c9", "flwr": "#e0a458", "nvflare": "#7fa7c9"}
_INCH_PER_BAR = 0.21
_BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def draw(rows: list[Row], path: Path, subtitle: str) -> None:
    """Draws the rows that have a limit."""
    columns = [_blocks([row for row in rows if row.operation in names]) for names in _COLUMNS]
    tallest = max(sum(len(block) + 1.4 for block in column) for column in columns)
    figure, all_axes = plt.subplots(1, 2, figsize=(13, 1.3 + tallest * _INCH_PER_BAR), layout="constrained")
    figure.suptitle("Fraction of the machine's memory limit (longer is better)\n" + subtitle, fontsize=11)
    widest = max((row.fraction_of_limit or 0 for row in rows), default=1)
    for axes, blocks in zip(all_axes, columns, strict=True):
        _draw_column(axes, blocks, tallest, max(widest, 1) * 1.12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _blocks(rows: list[Row]) -> list[list[Row]]:
    """The rows with a limit, one list a case."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.fraction_of_limit is not None:
            cases.setdefault((row.operation, row.key), []).append(row)
    return list(cases.values())


def _draw_column(axes: Any, blocks: list[list[Row]], height: float, width: float) -> None:
    place, places, names = 0.0, [], []
    for block in blocks:
        title = f"{block[0].operation}: {block[0].case}"
        axes.text(0, place, title, fontsize=8.5, fontweight="bold", va="center")
        for row in block:
            place += 1
            _draw_bar(axes, place, row)
            places.append(place)
            names.append(row.contender)
        place += 1.4
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(height, -1)
    axes.set_xlim(0, width)
    axes.axvline(1, color="#444444", linewidth=0.8, linestyle="--", zorder=0)
    axes.text(1, -1, "the limit", fontsize=8, ha="center", va="bottom", color="#444444")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_bar(axes: Any, place: float, row: Row) -> None:
    fraction = row.fraction_of_limit or 0
    axes.barh(place, fraction, height=0.82, color=_COLOURS.get(row.package, "#9aa5b1"))
    times = "" if row.times_fastagg is None else f"   {row.times_fastagg:.1f}x fastagg's time"
    axes.text(fraction + 0.01, place, f"{fraction:.2f}{times}", fontsize=7.5, va="center", bbox=_BEHIND_TEXT)
