"""The report of the benchmark of robust aggregation: JSON, a Markdown page and a plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from page import cpu_page, cpu_subtitle, in_lines, number, table
from robust_contenders import FASTAGG, FASTAGG_OUT, LEGACY, PLAIN, SERVER_APP
from verdicts import Measured, Target, at_least, at_most

_COLUMNS = ("case", "who", "milliseconds", "of the limit", "times Flower's speed", "peak extra memory, models")
_HOW = """\
Every contender ran in a process of its own on arrays that were in memory, 50 layers a model, and its answer was held
against float64 first (that of the rules without a rival only for being finite: their values are tested in tests/).
Times are medians. The limit is `_core.stream_probe`: it reads every client once and writes one model on the same
threads without arithmetic, in turn with the contender's calls. Flower is what its strategies call on arrays, without
their reading of replies: "Flower" the functions of the older strategies (for median and trimmed mean the arithmetic of
the ServerApp's too), "Flower, ServerApp" those of the message API; the faster one is compared with. Memory is how far
the process rose above what it held before its first call on this case, the result included. "statistics" is
`fedavg(stats=True)`, beside the same mean without."""


@dataclass
class Row:
    """A contender's calls of one case.

    Attributes:
        limit_seconds: of the streaming probe, before each call.
        peak_models: the most memory beyond what was there before, in models.
    """

    case: str
    rule: str
    contender: str
    clients: int
    seconds: list[float] = field(default_factory=list)
    limit_seconds: list[float] = field(default_factory=list)
    peak_models: float = 0.0

    @property
    def median(self) -> float:
        """Seconds a call."""
        return median(self.seconds)

    @property
    def fraction_of_limit(self) -> float:
        """1.0: as fast as the memory."""
        return median(self.limit_seconds) / self.median

    @property
    def is_fastagg(self) -> bool:
        """Whether it is ours."""
        return self.contender.startswith(FASTAGG)


def write(rows: list[Row], folder: Path, command: str, quick: bool) -> str:
    """Writes the report's files into a folder; returns the targets in a few lines."""
    path = folder / ("robust-quick.md" if quick else "robust.md")
    judged = [] if quick else targets(rows)
    page = cpu_page(
        title="Robust aggregation: measured",
        paragraphs=[_HOW],
        targets=judged,
        data={"rows": [_plain(rows, row) for row in rows]},
        sections={"Rules": table(_COLUMNS, [_cells(rows, row) for row in rows])},
    )
    page.write(path, command, quick)
    _draw(rows, path.with_suffix(".png"), cpu_subtitle(page.machine))
    return f"{in_lines(judged)}\nreport: {path}"


def targets(rows: list[Row]) -> list[Target]:
    """What was to be reached, and what was."""

    def of(case: str, value: Callable[[Row], float | None]) -> Measured | None:
        row = next((row for row in rows if (row.case, row.contender) == (case, FASTAGG)), None)
        found = None if row is None else value(row)
        return None if found is None else Measured(found)

    def speed(case: str) -> Measured | None:
        return of(case, lambda row: speedup(rows, row))

    def cost(case: str) -> Measured | None:
        times = {row.contender: row.median for row in rows if row.case == case}
        return Measured(times[FASTAGG_OUT] / times[PLAIN]) if PLAIN in times else None

    peaks = [row.peak_models for row in rows if row.contender == FASTAGG]
    return [
        at_least("median, K=10, 25M: times Flower's", 20, speed("median, K=10, 25M")),
        at_least("median, K=10, 25M: of the limit", 0.25, of("median, K=10, 25M", lambda row: row.fraction_of_limit)),
        at_least("trimmed_mean, K=10, 25M: times Flower's", 15, speed("trimmed_mean, K=10, 25M")),
        at_least("trimmed_mean, K=50, 5M: times Flower's", 15, speed("trimmed_mean, K=50, 5M")),
        at_least("krum, K=20, 2M: times Flower's", 3, speed("krum, K=20, 2M")),
        at_least("multi_krum, K=20, 2M: times Flower's", 3, speed("multi_krum, K=20, 2M")),
        at_least("bulyan, K=20, 2M: times Flower's", 10, speed("bulyan, K=20, 2M")),
        at_most("statistics, K=10, 25M: times the plain mean's time", 1.25, cost("statistics, K=10, 25M")),
        at_most("statistics, K=20, 2M: times the plain mean's time", 1.25, cost("statistics, K=20, 2M")),
        at_most("every rule: peak extra memory in models", 1.5, Measured(max(peaks)) if peaks else None),
    ]


def speedup(rows: list[Row], row: Row) -> float | None:
    """How much faster than the faster of Flower's ways."""
    rivals = [one.median for one in rows if one.case == row.case and one.contender in (LEGACY, SERVER_APP)]
    return min(rivals) / row.median if rivals and row.is_fastagg else None


def _plain(rows: list[Row], row: Row) -> dict[str, Any]:
    derived = {"median_seconds": row.median, "fraction_of_limit": row.fraction_of_limit}
    return {**asdict(row), **derived, "speedup": speedup(rows, row)}


def _cells(rows: list[Row], row: Row) -> tuple[str, ...]:
    times = number(speedup(rows, row), 1)
    return (
        row.case,
        row.contender,
        f"{row.median * 1e3:.1f}",
        number(row.fraction_of_limit, 3),
        times,
        f"{row.peak_models:.2f}",
    )


def _draw(rows: list[Row], path: Path, subtitle: str) -> None:
    try:
        import matplotlib as mpl
    except ImportError:  # it is optional
        return
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row.case for row in rows))
    height = 0.23 * len(rows) + 0.16 * len(cases) + 1.2
    figure, all_axes = plt.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
    figure.suptitle(f"Robust aggregation (shorter is better)\n{subtitle}", fontsize=11)
    _draw_bars(all_axes[0], rows, [row.median * 1e3 for row in rows], "milliseconds a call, logarithmic", ",.0f")
    peaks = [row.peak_models for row in rows]
    _draw_bars(all_axes[1], rows, peaks, "peak extra memory in models, the result included", ".2f")
    all_axes[0].set_xscale("log")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bars(axes: Any, rows: list[Row], values: list[float], title: str, form: str) -> None:
    places, place = list[float](), 0.0
    for index, row in enumerate(rows):
        place += 1.7 if index and row.case != rows[index - 1].case else 1
        places.append(place)
    axes.barh(places, values, color=["#0b6e4f" if row.is_fastagg else "#e0a458" for row in rows])
    for where, value in zip(places, values, strict=True):
        axes.text(value, where, f" {value:{form}}", fontsize=7.5, va="center")
    axes.set_yticks(places, [f"{row.case}: {row.contender}" for row in rows], fontsize=8)
    axes.set_ylim(places[-1] + 1, 0)
    axes.margins(x=0.12)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
