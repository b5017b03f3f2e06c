"""The report of a run: JSON, a Markdown page and a plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from contenders import CONTENDERS
from page import cpu_page, cpu_subtitle, in_lines, number, table
from rows import QUIET_SHARE, Row
from targets import targets

_COLUMNS = (
    "operation",
    "case",
    "contender",
    "median ms",
    "GB/s",
    "of the limit",
    "time / fastagg's",
    "peak extra memory, models",
)


def stem(quick: bool) -> str:
    """The name of the report's files: a smoke test never replaces real numbers."""
    return "cpu-quick" if quick else "cpu"


def write(rows: list[Row], folder: Path, command: str, quick: bool) -> None:
    """Writes the report's files into a folder."""
    rows = sorted(rows, key=lambda row: list(CONTENDERS).index(row.operation))
    page = cpu_page(
        title="fastagg on the CPU: measured",
        paragraphs=[_HOW, _noise(rows)],
        targets=[] if quick else targets(rows),
        data={"rows": [_row_as_json(row) for row in rows]},
        sections={"Rows": table(_COLUMNS, [_cells(row) for row in rows]), **_held(rows)},
    )
    path = folder / f"{stem(quick)}.md"
    page.write(path, command, quick)
    try:
        from plot import draw
    except ImportError:  # matplotlib is optional
        return
    draw(rows, path.with_suffix(".png"), cpu_subtitle(page.machine))


def summary(rows: list[Row], quick: bool) -> str:
    """The targets in a few lines."""
    return in_lines([] if quick else targets(rows))


def _row_as_json(row: Row) -> dict[str, Any]:
    return {
        **asdict(row),
        "median_seconds": row.median,
        "gigabytes_per_second": row.gigabytes_per_second,
        "fraction_of_limit": row.fraction_of_limit,
        "times_fastagg": row.times_fastagg,
        "is_quiet": row.is_quiet,
    }


_HOW = """\
Every row's answer was held against a float64 NumPy reference before it was timed. A time is the median of the rounds.
The limit is `_core.stream_probe`, which reads the same bytes and writes the same bytes on the same threads without any
arithmetic; it and fastagg run in turn with every round of every contender, so each ratio compares neighbours in time.
GB/s counts what the operation cannot but touch (every input once, the result once), whatever a contender touches
beyond it. `out=` rows write into memory that is there already, and are compared with fastagg's `out=` row."""


def _noise(rows: list[Row]) -> str:
    """How far the numbers can be trusted."""
    busy = sum(not row.is_quiet for row in rows)
    return (
        f"In {busy} of {len(rows)} rows the machine was busy with something else as well, or is not known to have been "
        f"free (the limit's threads had less than {QUIET_SHARE:.0%} of their processors): no target is judged by those."
    )


def _cells(row: Row) -> tuple[str, ...]:
    milliseconds = row.median * 1e3
    return (
        row.operation,
        row.case,
        row.contender,
        f"{milliseconds:.1f}" if milliseconds >= 1 else f"{milliseconds:.4f}",
        number(row.gigabytes_per_second, 1),
        number(row.fraction_of_limit, 2),
        number(row.times_fastagg, 2),
        number(row.extra_models, 2),
    )


def _held(rows: list[Row]) -> dict[str, str]:
    """What an Accumulator holds."""
    held = [row.notes["bytes_per_element"] for row in rows if "bytes_per_element" in row.notes]
    lines = [(str(clients), f"{size:.2f}") for sizes in held for clients, size in sizes.items()]
    return {"Memory of an Accumulator": table(("clients", "bytes an fp32 element"), lines)} if lines else {}
