"""The benchmark of robust aggregation: `python bench/robust.py [--quick] [--results FOLDER]`.

Seconds and peak memory of every rule, beside the streaming limit of the machine and Flower's functions for the rules
that it has. Every contender runs in a process of its own, in turn with the others; the answer is checked before it is
timed.
"""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

import numpy as np

import robust_report
import scripts
from fastagg import _core
from machine import seconds, use_all_processors
from memory import peak_of
from own_process import arguments, measure
from robust_contenders import CHECKED, CONTENDERS, RULES, Case, Layers, buffers_of, contenders_of, expected
from robust_report import Row

MILLION = 1_000_000
CASES = {
    "median, K=10, 25M": Case("median", 10, 25 * MILLION, 0, calls=3),
    "trimmed_mean, K=10, 25M": Case("trimmed_mean", 10, 25 * MILLION, 2, calls=3),
    "trimmed_mean, K=50, 5M": Case("trimmed_mean", 50, 5 * MILLION, 10, calls=3),
    "statistics, K=10, 25M": Case("statistics", 10, 25 * MILLION, 0, calls=9),
    **{f"{rule}, K=20, 2M": Case(rule, 20, 2 * MILLION, 4) for rule in RULES},
}
QUICK_CASES = {f"{rule}, K=11, 100k": Case(rule, 11, MILLION // 10, 2, calls=2) for rule in RULES}
LARGEST_ERROR = 2e-6  # of a value of order one: float32 means
PROCESSES = 2  # of every contender; one in a smoke test
CHUNKS = tuple(1024 * kibibytes for kibibytes in (4, 16, 64, 256))  # that the limit reads of one client before the next


def check(name: str, case: Case, answer: Layers) -> None:
    """Asserts that a contender's answer is what it should be."""
    assert all(np.isfinite(layer).all() for layer in answer), f"{case.rule}, {name}: not finite"
    wanted = expected(case)
    if wanted is not None:
        for layer, numbers in zip(answer, wanted, strict=True):
            np.testing.assert_allclose(layer[:CHECKED], numbers, LARGEST_ERROR, LARGEST_ERROR, err_msg=name)


def limit(case: Case) -> tuple[Any, list[float]]:
    """A call that reads all clients once and writes one model without arithmetic, and a list for its seconds."""
    buffers, out = buffers_of(case), np.ones(case.size * case.layers, np.float32)
    addresses = [buffer.ctypes.data for buffer in buffers]

    def walk(chunk: int) -> float:
        return seconds(
            lambda: _core.stream_probe(addresses, case.model_bytes, out.ctypes.data, case.model_bytes, chunk)
        )

    quickest = min(CHUNKS, key=lambda chunk: min(walk(chunk) for _ in range(3)))
    times = list[float]()
    return lambda: times.append(walk(quickest)), times


def measure_here(name: str, case: Case) -> None:
    """Measures a contender in this process; prints its seconds, the limit's and its peak as JSON."""
    use_all_processors()
    prepare = CONTENDERS[name]
    prepare(Case(case.rule, case.clients, 50_000, case.hostile))()  # what is loaded and started once is not the call's
    call = prepare(case)
    answers = list[Layers]()
    peak = peak_of(lambda: answers.append(call()))
    check(name, case, answers.pop())
    walk, limits = limit(case)
    times = list[float]()
    for _ in range(case.calls):
        walk()
        times.append(seconds(call))
    print(json.dumps({"seconds": times, "limit_seconds": limits, "peak": peak}))


def measure_case(key: str, case: Case, processes: int) -> list[Row]:
    """All contenders of a case in so many processes each, in turn."""
    rows = {name: Row(key, case.rule, name, case.clients) for name in contenders_of(case)}
    for _ in range(processes):
        for name, row in rows.items():
            print(f"robust: {key}: {name}", flush=True)
            measured = measure(name, case)
            row.seconds += measured["seconds"]
            row.limit_seconds += measured["limit_seconds"]
            row.peak_models = max(row.peak_models, measured["peak"] / case.model_bytes)
    return list(rows.values())


def main() -> None:
    """Measures, and writes the report."""
    chosen = arguments("Time robust aggregation with fastagg and without.", quick="small models: a smoke test")
    if chosen.contender:
        measure_here(chosen.contender, Case(**chosen.case))
        return
    command, rows, summary = shlex.join(["python", "bench/robust.py", *sys.argv[1:]]), list[Row](), ""
    for key, case in (QUICK_CASES if chosen.quick else CASES).items():
        rows += measure_case(key, case, 1 if chosen.quick else PROCESSES)
        summary = robust_report.write(rows, chosen.results, command, chosen.quick)  # what there is, if it is cut off
    print(summary)


if __name__ == "__main__":
    scripts.end_with(main)
