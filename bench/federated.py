"""The benchmark of federated rounds: `python bench/federated.py [--quick] [--results FOLDER]`.

Seconds and peak memory from serialised replies to a serialised model, for Flower, its older strategies and NVFlare, and
for fastagg in the place of each. Every contender runs in a process of its own, in turn with the others; the answer is
checked before it is timed.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable

import numpy as np

import federated_report
import scripts
from federated_report import Row
from federated_rounds import ROUNDS, STEPS, Case, expected_mean, expected_step, read
from machine import seconds, use_all_processors
from memory import peak_of
from own_process import arguments, measure

MILLION = 1_000_000
CASES = {
    "K=10, 25M": Case(10, 25 * MILLION),
    "K=200, 25 MB": Case(200, 6_250_000, calls=1),
    "K=100, 25M": Case(100, 25 * MILLION, calls=1),
    "K=10, 1 GB": Case(10, 250 * MILLION, distinct=2, calls=2),
    "K=1000, 25M": Case(1000, 25 * MILLION, calls=0),
}
QUICK_CASES = {"K=4, 1M": Case(4, MILLION, calls=2)}
STEP_CASES = {"FedAdam, 25M": Case(2, 25 * MILLION, calls=5)}
QUICK_STEP_CASES = {"FedAdam, 1M": Case(2, MILLION, calls=2)}
LARGEST_ERROR = 2e-5  # of the mean: rounded weights and float32 sums of up to a thousand
PROCESSES = 2  # of every contender in a case of few clients


def check(name: str, case: Case, answer: object) -> None:
    """Asserts that a contender's first answer is what it should be."""
    arrays, expected = read(answer), (expected_step if name in STEPS else expected_mean)(case)
    assert arrays.keys() == expected.keys(), f"{name}: other layers"
    for layer, numbers in expected.items():
        got = arrays[layer].reshape(-1)[: len(numbers)]
        np.testing.assert_allclose(got, numbers, rtol=LARGEST_ERROR, atol=LARGEST_ERROR, err_msg=f"{name}: {layer}")


def measure_here(name: str, case: Case) -> None:
    """Measures a contender in this process; prints its seconds and peak as JSON."""
    use_all_processors()
    contender = {**ROUNDS, **STEPS}[name]
    contender(Case(2, 10_000, case.layers))()  # what is loaded and started once is not the round's
    call = contender(case)
    answers: list[object] = []
    times: list[float] = []
    peak = peak_of(lambda: times.append(seconds(lambda: answers.append(call()))))
    check(name, case, answers.pop())
    later = [seconds(call) for _ in range(case.calls)]
    print(json.dumps({"seconds": later or times, "peak": peak}))


def measure_case(key: str, case: Case, contenders: Iterable[str]) -> list[Row]:
    """All contenders of a case, in turn."""
    rows = {name: Row(key, name, case.clients, case.model_bytes) for name in contenders}
    for _ in range(PROCESSES if case.clients <= 10 else 1):
        for name, row in rows.items():
            print(f"federated: {key}: {name}", flush=True)
            try:
                measured = measure(name, case)
            except RuntimeError as error:  # such as too little memory: the others are still worth their time
                print(f"federated: {key}: left out: {error}", flush=True)
                continue
            row.seconds += measured["seconds"]
            row.peak_models = max(row.peak_models, measured["peak"] / case.model_bytes)
    return [row for row in rows.values() if row.seconds]


def main() -> None:
    """Measures, and writes the report."""
    chosen = arguments("Time federated rounds with fastagg and without.", quick="a small model: a smoke test")
    if chosen.contender:
        measure_here(chosen.contender, Case(**chosen.case))
        return
    rounds, steps = (QUICK_CASES, QUICK_STEP_CASES) if chosen.quick else (CASES, STEP_CASES)
    work = [(key, case, STEPS) for key, case in steps.items()] + [(key, case, ROUNDS) for key, case in rounds.items()]
    command, rows = shlex.join(["python", "bench/federated.py", *sys.argv[1:]]), list[Row]()
    for key, case, contenders in work:
        rows += measure_case(key, case, contenders)
        summary = federated_report.write(rows, chosen.results, command, chosen.quick)  # what there is, if it is cut off
    print(summary)


if __name__ == "__main__":
    scripts.end_with(main)
