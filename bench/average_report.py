"""The report of the benchmark of `fastagg average`: JSON, a Markdown page and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from page import cpu_page, cpu_subtitle, in_lines, table
from verdicts import Measured, at_least, at_most

FASTAGG, LIMIT = "fastagg average", "the limit: read all once, write one, sync"
_COLUMNS = ("who", "median seconds", "best seconds", "GB/s read, median", "time / fastagg's")
_HOW = """\
Eight checkpoints in the page cache, an embedding and the layers of a transformer in fp32; the contenders took turns in
one process. Ratios are medians of the rounds' own. `fastagg average` and the limit sync the file that they write, which
takes longer now and then; the others do not. The limit reads the mapped files on the same threads without arithmetic.
The memory is the peak of the command in a process of its own: Python, NumPy and the files' mapped pages included. The
answer was held against float64 first."""


@dataclass
class Row:
    """A contender's rounds."""

    contender: str
    seconds: list[float] = field(default_factory=list)


def write(rows: list[Row], read: int, peak: int, folder: Path, command: str, quick: bool) -> str:
    """Writes the report's files into a folder; returns the targets in a few lines."""
    path = folder / ("average-quick.md" if quick else "average.md")
    ours = next(row.seconds for row in rows if row.contender == FASTAGG)
    limit = next(row.seconds for row in rows if row.contender == LIMIT)
    fraction = median(one / other for one, other in zip(limit, ours, strict=True))
    judged = [
        at_least("8 files of 500 MB: of the streaming limit", 0.7, Measured(fraction)),
        at_most("8 files of 500 MB: peak memory in GB", 1, Measured(peak / 1e9)),
    ]
    page = cpu_page(
        title="Averaging checkpoints: measured",
        paragraphs=[_HOW],
        targets=[] if quick else judged,
        data={"rows": [asdict(row) for row in rows], "read_bytes": read, "peak_bytes": peak},
        sections={"Contenders": table(_COLUMNS, [_cells(row, ours, read) for row in rows])},
    )
    page.write(path, command, quick)
    _draw(rows, path.with_suffix(".png"), cpu_subtitle(page.machine))
    return f"{in_lines(page.targets)}\nreport: {path}"


def _cells(row: Row, ours: list[float], read: int) -> tuple[str, ...]:
    ratio = median(one / other for one, other in zip(row.seconds, ours, strict=True))
    typical, best = median(row.seconds), min(row.seconds)
    return row.contender, f"{typical:.3f}", f"{best:.3f}", f"{read / typical / 1e9:.1f}", f"{ratio:.2f}"


def _draw(rows: list[Row], path: Path, subtitle: str) -> None:
    try:
        import matplotlib as mpl
    except ImportError:  # it is optional
        return
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    values = [median(row.seconds) for row in rows]
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    figure.suptitle(f"Eight checkpoints averaged, seconds (shorter is better)\n{subtitle}", fontsize=11)
    axes.barh(range(len(rows)), values, color=["#0b6e4f" if row.contender == FASTAGG else "#9aa5b1" for row in rows])
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.2f}", fontsize=8, va="center")
    axes.set_yticks(range(len(rows)), [row.contender for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
