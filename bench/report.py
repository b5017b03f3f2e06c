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
from verdicts import Target

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
    date = today()
    path = folder / f"{stem(quick)}.json"
    path.write_text(json.dumps(_as_json(rows, described, date, command, quick), indent=1) + "\n")
    path.with_suffix(".md").write_text(_markdown(rows, described, date, command, quick))
    try:
        from plot import draw
    except ImportError:  # matplotlib is optional
        return
    draw(rows, path.with_suffix(".png"), f"{described['processor']}, {described['processors']} processors, {date}")


def today() -> str:
    """The date, the same all over the world."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def summary(rows: list[Row], quick: bool) -> str:
    """The targets in a few lines."""
    return in_lines([] if quick else targets(rows))


def in_lines(judged: list[Target]) -> str:
    """Targets for the terminal; a quick run has none."""
    lines = (f"{target.verdict:15}  {target.text}: {target.measured} ({target.needed})" for target in judged)
    return "\n".join(lines) or "quick run: small arrays, so the targets do not apply"


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
        "rows": rounded(measured),
    }


def rounded(value: Any) -> Any:
    """Numbers with six significant digits: what is beyond them is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def _markdown(rows: list[Row], described: dict[str, Any], date: str, command: str, quick: bool) -> str:
    parts = [
        "# fastagg on the CPU: measured",
        machine_lines(described, date, command),
        _HOW,
        _noise(rows),
        *([] if quick else ["## Targets", targets_table(targets(rows))]),
        "## Rows",
        table(_COLUMNS, [_cells(row) for row in rows]),
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


def machine_lines(described: dict[str, Any], date: str, command: str) -> str:
    """What was measured where, when and how."""
    build = described["fastagg"]
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    processors, threads = described["processors"], f"{build['threads']} thread{'s' * (build['threads'] > 1)}"
    return "\n".join(
        [
            f"- machine: {described['processor']}, {processors} processors, "
            f"{described['memory_gigabytes']:g} GB, {described['system']}",
            f"- fastagg {build['version']}: {build['isa']}, {threads}, compiler {build['compiler']}",
            f"- Python {described['python']}, {packages}",
            f"- date: {date}",
            f"- command: `{command}`",
        ]
    )


def targets_table(judged: list[Target]) -> str:
    """The targets and their verdicts."""
    cells = [(target.text, target.needed, target.measured, target.verdict) for target in judged]
    return table(("target", "needed", "measured", "verdict"), cells)


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


def number(value: float | None, digits: int) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _held_lines(rows: list[Row]) -> list[str]:
    """What an Accumulator holds."""
    held = [row.notes["bytes_per_element"] for row in rows if "bytes_per_element" in row.notes]
    lines = [(str(clients), f"{size:.2f}") for sizes in held for clients, size in sizes.items()]
    return ["## Memory of an Accumulator", table(("clients", "bytes an fp32 element"), lines)] if lines else []


def table(header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    rule = tuple("---" for _ in header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))
