"""What the native code reads of each call; csrc/bindings/operands.h parses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastagg._native.codes import Code

# `LeafOperands` as the plain tuple that fedavg and Accumulator.add make of each leaf: it takes a quarter of the time.
LeafTuple = tuple[list[Any], int | None, list[float], float, int, int, int, int, int, int, float]
# (sources, their code or None, factor of the reference)
MeasurementOperands = tuple[list[Any], int | None, float]
# (data, companion, code, block_shift)
SourceOperands = tuple[int, int, int, int]
# (seed, step, tensor, rank)
RandomKey = tuple[int, int, int, int]
# (source, code, block_shift, out, scales, count, stochastic, key, factor)
CastOperands = tuple[SourceOperands, int, int, int, int, int, bool, RandomKey, float]
# (sources, divisor, residual, its factor, error, its factor, raise, result, begin, stretches)
ReductionOperands = tuple[
    list[SourceOperands], float, int, float, int, float, bool, CastOperands, int, Sequence[tuple[int, int]]
]
# (window, left out, rows, mixing: rows * clients numbers or None)
WindowOperands = tuple[int, int, int, list[float] | None]
# (rule, learning rate, beta_1, beta_2, tau)
OptimizerOperands = tuple[int, float, float, float, float]
# (model, mean, first moment, second moment, out, code, count)
ModelLeafOperands = tuple[int, int, int, int, int, int, int]

MEAN, MAXIMUM = 0, 1


class LeafOperands(NamedTuple):
    """One leaf of `weighted_sum` and its siblings: sum_k(weights[k] * sources[k]) / divisor, or their maximum.

    Attributes:
        sources: addresses, or `SourceOperands` where `code` is None.
        code: that of all sources.
        weights: one for each source.
        divisor: of the sum.
        elements: how many a source has.
        fold: MEAN or MAXIMUM.
        out: where the result goes; 0 for none, where all that is asked is whether every client's values are finite.
        companion: the second plane of an accumulator's sums, or 0.
        result_code: that of the result.
        dither: for rounding to 48-bit sums.
        rest: what the divisor of a float64 result lacks.
    """

    sources: list[Any]
    code: int | None
    weights: list[float]
    divisor: float
    elements: int
    fold: int = MEAN
    out: int = 0
    companion: int = 0
    result_code: int = Code.FLOAT32
    dither: int = 0
    rest: float = 0.0


Leaves = list[LeafOperands] | list[LeafTuple]

# The rules of `server_step`, in the order of `enum class Rule` of csrc/core/types.h.
ADD, INTERPOLATE, MOMENTUM, ADAGRAD, ADAM, YOGI = range(6)

# The windows of `sorted_mean`, in the order of `enum class Window`.
MIDDLE, TRIMMED, NEAR_MEDIAN, NEAR_TRIMMED = range(4)
