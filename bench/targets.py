"""The targets, and whether a run's rows reach them."""

from __future__ import annotations

from collections.abc import Callable

from contenders import FASTAGG, FASTAGG_OUT
from rows import Row
from verdicts import Measured, Target, at_least, at_most


class Results:
    """A run's rows by operation, case and contender."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = {(row.operation, row.key, row.contender): row for row in rows}

    def value(self, operation: str, key: str, contender: str, of: Callable[[Row], float | None]) -> Measured | None:
        """A number of one row, or None without it."""
        row = self._rows.get((operation, key, contender))
        value = None if row is None else of(row)
        return None if row is None or value is None else Measured(value, row.is_quiet)

    def fraction(self, operation: str, key: str) -> Measured | None:
        """Of the limit, for fastagg into existing memory."""
        return self.value(operation, key, FASTAGG_OUT, lambda row: row.fraction_of_limit)

    def speedup(self, operation: str, key: str, contender: str) -> Measured | None:
        """How many times as long as fastagg a contender takes."""
        return self.value(operation, key, contender, lambda row: row.times_fastagg)


def targets(rows: list[Row]) -> list[Target]:
    """Every target, in the order of the report."""
    results = Results(rows)
    return [*_fedavg(results), *_casts(results), *_memory(results), *_accumulator(results)]


def _fedavg(results: Results) -> list[Target]:
    one = "fedavg K=10, N=25M fp32, one array"
    state_dict = results.value("fedavg", "state_dict", FASTAGG_OUT, lambda row: row.times_twin)
    small = results.value("fedavg", "small", FASTAGG, lambda row: row.median * 1e6)
    return [
        at_least(f"{one}, out=: of the limit", 0.85, results.fraction("fedavg", "array")),
        at_least(f"{one}, out=: times torch's add_ loop", 2, results.speedup("fedavg", "array", "torch add_, out=")),
        at_least(f"{one}: times torch's add_ loop", 2, results.speedup("fedavg", "array", "torch add_")),
        at_least(f"{one}: times Flower's ServerApp", 7, results.speedup("fedavg", "array", "Flower ServerApp")),
        at_most("the same as a state_dict of 214 leaves: times the one array's time", 1.2, state_dict),
        at_least("fedavg K=100, N=2.5M, out=: of the limit", 0.75, results.fraction("fedavg", "hundred clients")),
        *(
            at_least(f"{key} uploads, out=: of the limit of their own bytes", 0.75, results.fraction("fedavg", key))
            for key in ("fp16", "bf16", "int8")
        ),
        at_most("fedavg K=10, N=1000: microseconds a call", 15, small),
    ]


def _casts(results: Results) -> list[Target]:
    found = []
    for operation, arrow in (("quantize", "fp32 to fp16"), ("dequantize", "fp16 to fp32")):
        text = f"{operation} {arrow}, 64M"
        copy, to = (results.speedup(operation, "fp16", name) for name in ("torch copy_, out=", "torch .to()"))
        found += [
            at_least(f"{text}, out=: of the limit", 0.85, results.fraction(operation, "fp16")),
            at_least(f"{text}, out=: times torch's copy_", 1.15, copy),
            at_least(f"{text}: times torch's .to()", 2, to),
        ]
    return found


def _memory(results: Results) -> list[Target]:
    models = results.value("fedavg", "array", FASTAGG, lambda row: row.extra_models)
    held = results.value("accumulator", "batch=1", FASTAGG, lambda row: row.most_bytes_per_element)
    return [
        at_most("fedavg: peak extra memory in models", 1, _always(models)),
        at_most("Accumulator: bytes an fp32 element, whatever K", 12, _always(held), digits=1),
    ]


def _accumulator(results: Results) -> list[Target]:
    single = results.speedup("accumulator", "batch=1", "torch add_")
    batched = results.speedup("accumulator", "batch=8", "torch add_")
    inverse = None if single is None else Measured(1 / single.value, single.is_quiet)
    return [
        at_most("Accumulator batch=1: times the time of torch's add_", 1.7, inverse),
        at_least("Accumulator batch=8: times torch's add_ loop", 1.5, batched),
    ]


def _always(measured: Measured | None) -> Measured | None:
    """Memory is what it is, however busy the machine."""
    return None if measured is None else Measured(measured.value)
