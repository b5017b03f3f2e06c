"""The report of a run on a CUDA device: JSON, a Markdown page and a plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_machine
from all_reduce_report import short_time
from gpu_rows import Results, Row
from gpu_targets import targets
from page import Page, in_lines, number, table, today

_HEADINGS = {
    "fedavg": "The weighted mean",
    "quantize": "Encoding",
    "dequantize": "Decoding",
    "hook": "The DDP hook's arithmetic on one device",
    "call": "Until a call returns",
}
_COLUMNS = ("case", "contender", "median", "spread", "GB/s", "of the copy", "of the copy, queued", "time / fastagg's")


def stem(device: str, quick: bool) -> str:
    """The name of the report's files: a smoke test never replaces real numbers."""
    return f"gpu-{gpu_machine.slug(device)}{'-quick' * quick}"


def write(results: Results, folder: Path, described: dict[str, Any], command: str, quick: bool) -> Path:
    """Writes the report's files into a folder; returns the page's path."""
    page = Page(
        title=f"fastagg on {described['device']}: measured",
        machine=described,
        machine_lines=_machine_lines(results, described),
        paragraphs=[_HOW],
        targets=[] if quick else targets(results),
        data={
            "copy_gigabytes_per_second": results.copy_gigabytes_per_second,
            "missing": results.missing,
            "rows": [_row_as_json(row, results) for row in results.rows],
        },
        sections=_sections(results),
    )
    path = folder / f"{stem(described['device'], quick)}.md"
    page.write(path, command, quick)
    try:
        from gpu_plot import draw
    except ImportError:  # matplotlib is optional
        return path
    draw(results, path.with_suffix(".png"), f"{described['device']}, {today()}")
    return path


def summary(results: Results, quick: bool) -> str:
    """The targets in a few lines."""
    return in_lines([] if quick else targets(results))


def _row_as_json(row: Row, results: Results) -> dict[str, Any]:
    return {
        **asdict(row),
        "median_seconds": row.median,
        "spread": row.spread,
        "gigabytes_per_second": row.gigabytes_per_second,
        "fraction_of_copy": row.fraction_of_copy,
        "queued_fraction_of_copy": row.queued_fraction_of_copy,
        "times_fastagg": results.times_fastagg(row),
    }


def _sections(results: Results) -> dict[str, str]:
    """The rows by operation, and what was left out."""
    sections = {}
    for operation, heading in _HEADINGS.items():
        rows = [row for row in results.rows if row.operation == operation]
        if rows:
            sections[heading] = table(_COLUMNS, [_cells(row, results) for row in rows])
    if results.missing:
        sections["Left out"] = table(("what", "why"), [(what, _cell(why)) for what, why in results.missing.items()])
    return sections


_HOW = """\
Every contender's answer was held against float64 before it was timed, in memory that had been filled with NaN; the
hook's gradients against what fp16 leaves of them, bit for bit. A turn is several calls in a row, about 3 ms of them or
more, from a CUDA event on an idle device to one behind the last call, so that what the host adds is in it. Contenders
and the copy take turns. Median and spread (the longest turn less the shortest, over the median) are those of the turns,
a ratio is the median of the turns' ratios. What is worked on in turn is at least four times the second-level cache.

"Queued" is fastagg once more with the device kept waiting until the host has queued all calls of a turn: where it is
more than the column before, the host was too slow for the device. Targets are judged without it.

The copy is one from device memory to device memory, half a gibibyte, counted as read and written. GB/s counts what the
operation cannot but touch (every input once, the result once; for the hook gradients and codes both ways), whatever a
contender touches beyond it. `fedavg` takes the 53 integer scalars of a ResNet-50 too, the contenders do not. The cost
of a call is the host's time until it returns, with the device idle before."""


def _machine_lines(results: Results, described: dict[str, Any]) -> list[str]:
    contenders = ", ".join(f"{name} {described[name]}" for name in ("triton", "cupy") if described[name] is not None)
    return [
        f"device: {described['device']}, {described['memory_gigabytes']:g} GB, compute capability "
        f"{described['compute_capability']}, {described['multiprocessors']} multiprocessors, second-level cache "
        f"{described['cache_bytes'] / 2**20:g} MiB",
        f"driver {described['driver'] or 'of unknown version'} for CUDA {described['cuda_driver']}, fastagg "
        f"{described['fastagg']} with CUDA's runtime {described['cuda_runtime']}",
        f"Python {described['python']}, torch {described['torch']} for CUDA {described['cuda_of_torch']}"
        + (f", {contenders}" if contenders else ""),
        f"copy from device memory to device memory: {number(results.copy_gigabytes_per_second, 0)} GB/s",
    ]


def _cells(row: Row, results: Results) -> tuple[str, ...]:
    return (
        row.key.partition(": ")[2],
        row.contender,
        short_time(row.median),
        f"{row.spread:.0%}",
        number(row.gigabytes_per_second, 0),
        number(row.fraction_of_copy, 2),
        number(row.queued_fraction_of_copy, 2),
        number(results.times_fastagg(row), 2),
    )


def _cell(text: str) -> str:
    """A text that does not end its cell."""
    return text.replace("|", "\\|")
