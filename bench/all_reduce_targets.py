"""The targets of all-reduce, and whether a run reaches them."""

from __future__ import annotations

from all_reduce_cases import (
    FOUR_RANKS,
    GLOO,
    KILOBYTE,
    LIMIT,
    MEGABYTE,
    OPEN_MPI,
    TORCH_HOOK,
    TWO_HOSTS,
    TWO_RANKS,
    TWO_RANKS_OF_MPI,
    Exchange,
    fastagg_over,
    short_size,
)
from all_reduce_rows import Results
from verdicts import Measured, Target, at_least, at_most

FP32, FP16 = fastagg_over("fp32"), fastagg_over("fp16")
_LARGE = (25 * MEGABYTE, 100 * MEGABYTE)
# Bytes an element that the limit moves.
_LIMIT_BYTES = 8
_LINK_TARGETS = {"fp16": 1.9, "int8": 3.6, "int4": 6.8, "sign": 18}


def targets(results: Results) -> list[Target]:
    """Every target, in the order of the report."""
    return [*_two_ranks(results), *_four_ranks(results), *_two_hosts(results)]


def _two_ranks(results: Results) -> list[Target]:
    def compared(size: int, contender: str, other: str) -> Measured | None:
        return _speedup(results, TWO_RANKS, size, contender, other)

    found = []
    for size in _LARGE:
        text = f"2 ranks, {short_size(size)}"
        found += [
            at_least(f"{text}, fp32: times Gloo", 4, compared(size, FP32, GLOO)),
            at_least(f"{text}, fp16: times torch's fp16_compress_hook", 8, compared(size, FP16, TORCH_HOOK)),
            at_least(f"{text}, fp16: of the limit", 0.65, compared(size, FP16, LIMIT)),
        ]
    largest, small = _LARGE[-1], 64 * KILOBYTE
    beside_mpi = _speedup(results, TWO_RANKS_OF_MPI, largest, FP16, OPEN_MPI)
    share = compared(largest, FP16, LIMIT)
    moved = None if share is None else Measured(_LIMIT_BYTES / share.value, share.is_quiet)
    return [
        *found,
        at_least("2 ranks, 100 MB, fp16: times Open MPI", 3, beside_mpi),
        at_most("2 ranks, 100 MB, fp16: bytes an element that memory moves in its time", 12, moved, digits=1),
        at_least("2 ranks, 64 kB, fp32: times Gloo", 5, compared(small, FP32, GLOO)),
    ]


def _four_ranks(results: Results) -> list[Target]:
    measured = _speedup(results, FOUR_RANKS, _LARGE[0], FP32, GLOO)
    return [at_least("4 ranks, 25 MB, fp32: times Gloo", 3.5, measured)]


def _two_hosts(results: Results) -> list[Target]:
    text = "2 hosts, 1 Gbit/s, 100 MB, {}: times Gloo"
    return [
        at_least(text.format(wire), bound, _speedup(results, TWO_HOSTS, _LARGE[-1], fastagg_over(wire), GLOO))
        for wire, bound in _LINK_TARGETS.items()
    ]


def _speedup(results: Results, exchange: Exchange, size: int, contender: str, other: str) -> Measured | None:
    """How many times as long as a contender another takes."""
    row = results.row(exchange.key, size, other)
    value = None if row is None else results.times(row, contender)
    return None if value is None else Measured(value, results.is_quiet(exchange.key, size))
