"""The report of a run: JSON, a Markdown page and a plot."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
from contenders import CONTENDERS
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
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: list(CONTENDERS).index(row.operation))
    described = machine.describe()
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path = folder / f"{stem(quick)}.json"
    path.write_text(json.dumps(_as_json(rows, described, date, command, quick), indent=1) + "\n")
    path.with_suffix(".md").write_text(_markdown(rows, described, date, command, quick))
    try:
        from plot import draw
    except ImportError:  # matplotlib is optional
        return
    draw(rows, path.with_suffix(".png"), f"{described['processor']}, {described['processors']} processors, {date}")


def summary(rows: list[Row], quick: bool) -> str:
    """The targets in a few lines."""
    if quick:
        return "quick run: small arrays, so the targets do not apply"
    lines = (f"{target.verdict:15}  {target.text}: {target.measured} ({target.needed})" for target in targets(rows))
    return "\n".join(lines)


def _as_json(rows: list[Row], described: dict[str, Any], date: str, command: str, quick: bool) -> dict[str, Any]:
    measured = [
        {
            **asdict(row),
            "median_seconds": row.median,
            "gigabytes_per_second": row.gigabytes_per_second,
            "fraction_of_limit": row.fraction_of_limit,
            "times_fastagg": row.times_fastagg,
            "is_quiet": row.is_quiet,
        }
        for row in rows
    ]
    judged = [] if quick else [{**target._asdict(), "verdict": target.verdict} for target in targets(rows)]
    return {
        "machine": described,
        "date": date,
        "command": command,
        "quick": quick,
        "targets": judged,
        "rows": _rounded(measured),
    }


def _rounded(value: Any) -> Any:
    """Numbers with six significant digits: what is beyond them is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _markdown(rows: list[Row], described: dict[str, Any], date: str, command: str, quick: bool) -> str:
    parts = [
        "# fastagg on the CPU: measured",
        _machine_lines(described, date, command),
        _HOW,
        _noise(rows),
        *([] if quick else ["## Targets", _targets_table(rows)]),
        "## Rows",
        _table(_COLUMNS, [_cells(row) for row in rows]),
        *_held_lines(rows),
    ]
    return "\n\n".join(parts) + "\n"


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


def _machine_lines(described: dict[str, Any], date: str, command: str) -> str:
    build = described["fastagg"]
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    processors, threads = described["processors"], build["threads"]
    return "\n".join(
        [
            f"- machine: {described['processor']}, {processors} processors, "
            f"{described['memory_gigabytes']:g} GB, {described['system']}",
            f"- fastagg {build['version']}: {build['isa']}, {threads} threads, compiler {build['compiler']}",
            f"- Python {described['python']}, {packages}",
            f"- date: {date}",
            f"- command: `{command}`",
        ]
    )


def _targets_table(rows: list[Row]) -> str:
    cells = [(target.text, target.needed, target.measured, target.verdict) for target in targets(rows)]
    return _table(("target", "needed", "measured", "verdict"), cells)


def _cells(row: Row) -> tuple[str, ...]:
    milliseconds = row.median * 1e3
    return (
        row.operation,
        row.case,
        row.contender,
        f"{milliseconds:.1f}" if milliseconds >= 1 else f"{milliseconds:.4f}",
        _number(row.gigabytes_per_second, 1),
        _number(row.fraction_of_limit, 2),
        _number(row.times_fastagg, 2),
        _number(row.extra_models, 2),
    )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _held_lines(rows: list[Row]) -> list[str]:
    """What an Accumulator holds."""
    held = [row.notes["bytes_per_element"] for row in rows if "bytes_per_element" in row.notes]
    lines = [(str(clients), f"{size:.2f}") for sizes in held for clients, size in sizes.items()]
    return ["## Memory of an Accumulator", _table(("clients", "bytes an fp32 element"), lines)] if lines else []


def _table(header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    rule = tuple("---" for _ in header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))
