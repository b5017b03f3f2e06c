"""The targets on a CUDA device, and whether a run reaches them."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cases import ARRAY, CALLS, CASTS, FEDAVG, HOOK, KINDS, RESNET50, Case, fedavg
from gpu_rows import Results
from verdicts import Measured, Target, at_least, at_most

_OF_COPY, _TIMES_EAGER, _TIMES_ANY = 0.90, 1.5, 1.0
_CAST_OF_COPY = 0.88
_TIMES_HOOK = 2.5
_CALL_MICROSECONDS = 60


def targets(results: Results) -> list[Target]:
    """Every target, in the order of the report."""
    return [*_fedavg(results), *_casts(results), _hook(results), *_calls(results)]


def _fedavg(results: Results) -> list[Target]:
    found = []
    for kind in KINDS:
        cases = [fedavg(clients, kind, layout) for layout in (ARRAY, RESNET50) for clients in (10, 100)]
        # Of the other kinds the worst one counts.
        groups = [[case] for case in cases] if kind == "fp32" else [cases]
        for group in groups:
            text = group[0].key if len(group) == 1 else f"fedavg: {kind}, the least of K=10, 100 and both layouts"
            found.append(at_least(f"{text}: of the copy's bandwidth", _OF_COPY, _least_fraction(results, group)))
            found.append(at_least(f"{text}: times the best eager torch", _TIMES_EAGER, _least_speedup(results, group)))
    speedups = results.speedups(FEDAVG)
    measured = Measured(min(speedups)) if speedups else None
    return [*found, at_least("fedavg: times any contender, the least of all cases", _TIMES_ANY, measured)]


def _least_fraction(results: Results, cases: Sequence[Case]) -> Measured | None:
    """The least of some cases, of the copy's bandwidth; None where one is missing."""
    rows = [results.row(case) for case in cases]
    fractions = [None if row is None else row.fraction_of_copy for row in rows]
    known = [fraction for fraction in fractions if fraction is not None]
    return Measured(min(known)) if len(known) == len(cases) else None


def _least_speedup(results: Results, cases: Sequence[Case]) -> Measured | None:
    """The least of some cases, of the times of the best eager contender; None where one is missing."""
    best = [min(speedups) for case in cases if (speedups := results.speedups([case], eager=True))]
    return Measured(min(best)) if len(best) == len(cases) else None


def _casts(results: Results) -> list[Target]:
    return [
        at_least(f"{case.key}: of the copy's bandwidth", _CAST_OF_COPY, _least_fraction(results, [case]))
        for case in CASTS
    ]


def _hook(results: Results) -> Target:
    return at_least(
        f"{HOOK.key}: times torch's fp16 hook, unscaling and clipping", _TIMES_HOOK, _least_speedup(results, [HOOK])
    )


def _calls(results: Results) -> list[Target]:
    found = []
    for case in CALLS:
        row = results.row(case)
        measured = None if row is None else Measured(row.median * 1e6)
        found.append(at_most(f"{case.key}: microseconds until it returns", _CALL_MICROSECONDS, measured, digits=1))
    return found
