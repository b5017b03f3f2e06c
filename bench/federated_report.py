"""The report of the benchmark of federated rounds: JSON, a Markdown page and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from federated_rounds import RIVALS
from page import cpu_page, cpu_subtitle, in_lines, number, table
from verdicts import Measured, Target, at_least, at_most

_COLUMNS = ("case", "who", "seconds a round", "times the framework's speed", "peak extra memory, models")
_HOW = """\
A round goes from the bytes that clients sent to the bytes that go back. Every contender ran in a process of its own,
and its answer was held against a float64 reference first. Seconds are the median of its calls after the first, where
there are others. Memory is how far the process rose above what it held before its first round, replies included: where
replies arrive one by one (NVFlare, streaming), those in the making count. "NVFlare, tensors" is its aggregator alone,
from tensors to tensors. Where K exceeds 10 (2 for the model of 1 GB), clients' replies are records of their own over
the bytes of the first ten (two)."""


@dataclass
class Row:
    """A contender's calls of one case.

    Attributes:
        seconds: of every call after the first in its process; of the first where there are no others.
        peak_models: the most memory beyond what was there before, in models.
    """

    case: str
    contender: str
    clients: int
    model_bytes: int
    seconds: list[float] = field(default_factory=list)
    peak_models: float = 0.0

    @property
    def median(self) -> float:
        """Seconds a round."""
        return median(self.seconds)


def write(rows: list[Row], folder: Path, command: str, quick: bool) -> str:
    """Writes the report's files into a folder; returns the targets in a few lines."""
    path = folder / ("federated-quick.md" if quick else "federated.md")
    judged = [] if quick else targets(rows)
    page = cpu_page(
        title="Federated rounds: measured",
        paragraphs=[_HOW],
        targets=judged,
        data={"rows": [{**asdict(row), "median_seconds": row.median, "speedup": _speedup(rows, row)} for row in rows]},
        sections={"Rounds": table(_COLUMNS, [_cells(rows, row) for row in rows])},
    )
    page.write(path, command, quick)
    _draw(rows, path.with_suffix(".png"), cpu_subtitle(page.machine))
    return f"{in_lines(judged)}\nreport: {path}"


def targets(rows: list[Row]) -> list[Target]:
    """What was to be reached, and what was."""

    def speed(case: str, contender: str) -> Measured | None:
        row = _find(rows, case, contender)
        value = None if row is None else _speedup(rows, row)
        return None if value is None else Measured(value, True)

    def peak(case: str, contender: str) -> Measured | None:
        row = _find(rows, case, contender)
        return None if row is None else Measured(row.peak_models, True)

    ours, nvflare, step = "fastagg in Flower", "fastagg in NVFlare, tensors", "fastagg in Flower, FedAdam step"
    return [
        at_least("Flower, K=10, 25M: times Flower's FedAvg", 6, speed("K=10, 25M", ours)),
        at_most("Flower, K=10, 25M: peak extra memory in models", 2, peak("K=10, 25M", ours)),
        at_most("streaming, 200 clients of 25 MB: peak in models", 4, peak("K=200, 25 MB", f"{ours}, streaming")),
        at_least("NVFlare's aggregator, K=10, 25M, torch: times its own", 1.5, speed("K=10, 25M", nvflare)),
        at_most("NVFlare, K=10, 25M, torch: peak in models", 7, peak("K=10, 25M", "fastagg in NVFlare")),
        at_least("FedAdam step, 25M: times Flower's", 5, speed("FedAdam, 25M", step)),
    ]


def _find(rows: list[Row], case: str, contender: str) -> Row | None:
    return next((row for row in rows if (row.case, row.contender) == (case, contender)), None)


def _speedup(rows: list[Row], row: Row) -> float | None:
    """How much faster than the framework itself."""
    rival = _find(rows, row.case, RIVALS.get(row.contender, ""))
    return None if rival is None else rival.median / row.median


def _cells(rows: list[Row], row: Row) -> tuple[str, ...]:
    speedup = number(_speedup(rows, row), 2)
    return row.case, row.contender, f"{row.median:.3f}", speedup, f"{row.peak_models:.2f}"


def _draw(rows: list[Row], path: Path, subtitle: str) -> None:
    try:
        import matplotlib as mpl
    except ImportError:  # it is optional
        return
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row.case for row in rows))
    figure, all_axes = plt.subplots(len(cases), 2, figsize=(12, 1.9 * len(cases) + 1), layout="constrained")
    figure.suptitle(
        f"A federated round, from clients' bytes to the server's (shorter is better)\n{subtitle}", fontsize=11
    )
    for axes, case in zip(all_axes.reshape(len(cases), 2), cases, strict=True):
        chosen = [row for row in rows if row.case == case]
        _draw_bars(axes[0], chosen, [row.median for row in chosen], f"{case}: seconds", ".3g")
        _draw_bars(axes[1], chosen, [row.peak_models for row in chosen], f"{case}: peak extra memory, models", ".1f")
        axes[1].set_yticklabels([])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bars(axes: Any, rows: list[Row], values: list[float], title: str, form: str) -> None:
    places = list(range(len(rows)))
    axes.barh(places, values, color=["#0b6e4f" if "fastagg" in row.contender else "#9aa5b1" for row in rows])
    for place, value in zip(places, values, strict=True):
        axes.text(value, place, f" {value:{form}}", fontsize=7.5, va="center")
    axes.set_yticks(places, [row.contender for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
