"""The report of an all-reduce run: JSON, a Markdown page and a plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from all_reduce_cases import (
    FOUR_RANKS,
    FOUR_RANKS_OF_MPI,
    GLOO,
    LIMIT,
    NO_COMMUNICATION,
    OTHER_WIRES,
    PLAIN_DDP,
    TWO_HOSTS,
    TWO_RANKS,
    TWO_RANKS_OF_MPI,
    Exchange,
    short_size,
)
from all_reduce_rows import ExchangeRow, Results, StepRow, times
from all_reduce_targets import FP16, FP32, targets
from page import cpu_page, cpu_subtitle, in_lines, number, table
from rows import QUIET_SHARE

_HEADINGS = {
    TWO_RANKS: "Two ranks on one host",
    TWO_RANKS_OF_MPI: "Two ranks on one host, started and bound to processors by mpirun",
    OTHER_WIRES: "Two ranks on one host, the other wires",
    FOUR_RANKS: "Four ranks on one host",
    FOUR_RANKS_OF_MPI: "Four ranks on one host, started by mpirun",
    TWO_HOSTS: "Two hosts, a link of 1 Gbit/s",
}
_ON_A_HOST = (
    *("size", "contender", "transport", "calls a round", "time", "algbw GB/s", "busbw GB/s"),
    *("of the limit", f"time / {FP32}'s", f"time / {FP16}'s"),
)
_BETWEEN_HOSTS = (
    *("size", "contender", "transport", "time", "algbw GB/s", "busbw GB/s"),
    *("MB sent by a host", "of the link", "Gloo's time / its"),
)
_STEPS = ("model", "parameters", "contender", "time", "beyond no communication", "plain DDP's time / its")


def stem(quick: bool) -> str:
    """The name of the report's files: a smoke test never replaces real numbers."""
    return "all_reduce-quick" if quick else "all_reduce"


def write(results: Results, folder: Path, command: str, quick: bool) -> None:
    """Writes the report's files into a folder."""
    exchanges = {heading: _exchange_table(exchange, results) for exchange, heading in _HEADINGS.items()}
    page = cpu_page(
        title="all_reduce on the CPU: measured",
        paragraphs=[_HOW, _noise(results)],
        targets=[] if quick else targets(results),
        data={
            "missing": results.missing,
            "rows": [_row_as_json(row, results) for row in results.rows],
            "steps": [asdict(row) | {"median_seconds": row.median} for row in results.steps],
        },
        sections={**exchanges, "Steps of DDP, two ranks on one host": _steps_table(results)},
    )
    path = folder / f"{stem(quick)}.md"
    page.write(path, command, quick)
    try:
        from all_reduce_plot import draw
    except ImportError:  # matplotlib is optional
        return
    draw(results, path.with_suffix(".png"), cpu_subtitle(page.machine))


_HOW = """\
Every contender's answer was compared with the exact mean on every rank before it was timed: inputs are whole numbers
that every wire holds. Contenders then take turns on the same tensor, round by round, each from a barrier on; a time is
the slowest rank's, the median of the rounds; a ratio is the median of the rounds' ratios. Calls too short for the clock
are repeated in a round. Every rank is a process with one thread, as torchrun starts it. Size is that of the fp32 tensor
on each rank, whatever the wire; algbw is size over time, busbw is algbw times 2(W-1)/W, as nccl-tests counts them.
Gloo and Open MPI leave the sum, which is less work than the mean.

The limit: every rank reads its tensor once and writes it once, 8 bytes an element, with `_core.stream_probe`, all ranks
at the same time and in turn with the contenders. Where the tensors fit into the caches it is no limit, and stands for
what memory would take. Between hosts the limit is the link: the bytes that its own counters saw, over its rate; the
headers, which they do not see, take 0.05 of it."""


def summary(results: Results, quick: bool) -> str:
    """The targets in a few lines."""
    return in_lines([] if quick else targets(results))


def _noise(results: Results) -> str:
    """How far the numbers can be trusted."""
    shares = {(row.exchange, row.size): row.processor_shares for row in results.rows if row.processor_shares}
    shares |= {(row.model, row.parameters): row.processor_shares for row in results.steps}
    busy = sum(median(found) < QUIET_SHARE for found in shares.values())
    return (
        f"In {busy} of {len(shares)} comparisons the machine was busy with something else as well (the limit's ranks "
        f"had less than {QUIET_SHARE:.0%} of their processors): no target is judged by those."
    )


def _row_as_json(row: ExchangeRow, results: Results) -> dict[str, Any]:
    return {
        **asdict(row),
        "median_seconds": row.median,
        "algorithm_gigabytes_per_second": row.algorithm_gigabytes,
        "bus_gigabytes_per_second": row.bus_gigabytes,
        "fraction_of_limit": results.fraction_of_limit(row),
        "fraction_of_link": row.fraction_of_link,
        "times_fastagg_fp32": results.times(row, FP32),
        "times_fastagg_fp16": results.times(row, FP16),
    }


def _exchange_table(exchange: Exchange, results: Results) -> str:
    if exchange.key in results.missing:
        return f"Not measured: {results.missing[exchange.key]}"
    header = _BETWEEN_HOSTS if exchange.hosts > 1 else _ON_A_HOST
    rows = [row for row in results.rows if row.exchange == exchange.key]
    return table(header, [_cells(row, results) for row in rows if exchange.hosts == 1 or row.contender != LIMIT])


def _cells(row: ExchangeRow, results: Results) -> tuple[str, ...]:
    speeds = (short_time(row.median), f"{row.algorithm_gigabytes:.3g}", f"{row.bus_gigabytes:.3g}")
    if row.hosts > 1:
        over = results.times(row, GLOO)
        megabytes = None if row.sent_bytes is None else row.sent_bytes / 1e6
        more = (number(megabytes, 1), number(row.fraction_of_link, 2), number(None if over is None else 1 / over, 2))
        return (short_size(row.size), row.contender, row.transport, *speeds, *more)
    ratios = (results.fraction_of_limit(row), results.times(row, FP32), results.times(row, FP16))
    named = (short_size(row.size), row.contender, row.transport, str(row.calls))
    return (*named, *speeds, *(number(ratio, 2) for ratio in ratios))


def _steps_table(results: Results) -> str:
    return table(_STEPS, [_step_cells(row, results) for row in results.steps])


def _step_cells(row: StepRow, results: Results) -> tuple[str, ...]:
    alone, plain = results.step(row.model, NO_COMMUNICATION), results.step(row.model, PLAIN_DDP)
    assert alone is not None
    assert plain is not None
    beyond = median(own - its for own, its in zip(row.seconds, alone.seconds, strict=True))
    named = (row.model, f"{row.parameters:,}", row.contender)
    return (*named, short_time(row.median), short_time(beyond), number(1 / times(row, plain), 2))


def short_time(seconds: float) -> str:
    """0.0274 as "27.4 ms"."""
    return f"{seconds * 1e3:.1f} ms" if abs(seconds) >= 1e-3 else f"{seconds * 1e6:.1f} µs"
