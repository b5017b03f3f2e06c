"""What results should be: NumPy in wider arithmetic, and exact rounding, independent of fastagg."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray

FLOATS: dict[str, np.dtype] = {
    "fp64": np.dtype(np.float64),
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
INTEGERS = [np.dtype(name) for name in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
LARGEST_ERROR = 1.2e-7  # of the weighted mean of |x|: contract item 3


class Format(NamedTuple):
    """A floating format: stored mantissa bits, exponent of the smallest normal, largest finite value."""

    mantissa: int
    minimum_exponent: int
    largest: float


FORMATS = {
    "fp32": Format(23, -126, float(np.finfo(np.float32).max)),
    "fp16": Format(10, -14, 65504.0),
    "bf16": Format(7, -126, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
    "fp8_e4m3": Format(3, -6, 448.0),
    "fp8_e5m2": Format(2, -14, 57344.0),
}


def name_of(dtype: Any) -> str:
    """The short name of a floating dtype: "fp16"."""
    return next(name for name, known in FLOATS.items() if known == np.dtype(dtype))


def units_of(x: Array, fmt: Format) -> Array:
    """The exponent of the unit in the last place that a format has at x."""
    exponent = np.frexp(x)[1] - 1
    return np.maximum(exponent, fmt.minimum_exponent) - fmt.mantissa


def round_to(x: Array, name: str) -> Array:
    """float64 rounded once to a format, to nearest even; beyond its largest value to infinity. As float64."""
    x = np.asarray(x, np.float64)
    if name == "fp64":
        return x
    fmt = FORMATS[name]
    finite = np.where(np.isfinite(x), x, 0.0)
    unit = units_of(finite, fmt)
    rounded = np.copysign(np.ldexp(np.rint(np.ldexp(finite, -unit)), unit), finite)
    rounded = np.where(np.abs(rounded) > fmt.largest, np.copysign(np.inf, finite), rounded)
    return np.where(np.isfinite(x), rounded, x)


def mean(columns: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted mean in long double, as exact as float64 can show."""
    total = sum((np.longdouble(weight) for weight in weights), np.longdouble(0))
    result = np.zeros(columns[0].shape, np.longdouble)
    for column, weight in zip(columns, weights, strict=True):
        result = result + np.longdouble(weight) * wide(column)
    return result / total


def magnitude(columns: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted mean of |x|."""
    return mean([np.abs(wide(column)) for column in columns], weights)


def wide(array: Array) -> Array:
    """Any array in long double."""
    return np.asarray(array, np.float64 if array.dtype.kind == "V" else None).astype(np.longdouble)


def exact_mean(columns: Sequence[Array], weights: Sequence[float]) -> list[Fraction]:
    """The weighted mean of every element as a rational number."""
    total = sum(map(Fraction, weights))
    sums = [Fraction(0)] * columns[0].size
    for column, weight in zip(columns, map(Fraction, weights), strict=True):
        values = np.asarray(column, np.float64).ravel().tolist()
        sums = [sum_ + weight * Fraction(value) for sum_, value in zip(sums, values, strict=True)]
    return [sum_ / total for sum_ in sums]


def assert_fp64_mean(result: Array, columns: Sequence[Array], weights: Sequence[float]) -> None:
    """Holds a float64 mean of finite values to one unit in the last place, and what cancellation leaves of the sums.

    A hundred elements are held to it exactly, all of them as far as long double can show.
    """
    units = np.spacing(np.abs(result)) + len(columns) * np.longdouble(2.0**-62) * magnitude(columns, weights)
    assert np.all(np.abs(wide(result) - mean(columns, weights)) <= units)
    sample = np.s_[:: max(result.size // 100, 1)]
    columns = [np.asarray(column, np.float64).ravel()[sample] for column in columns]
    exact = exact_mean(columns, weights)
    scale = exact_mean([np.abs(column) for column in columns], weights)
    slack = Fraction(len(columns) ** 2 + 4, 2**104)
    for value, mean_, magnitude_ in zip(result.ravel()[sample].tolist(), exact, scale, strict=True):
        error = abs(Fraction(value) - mean_)
        assert error <= Fraction(math.ulp(value)) + slack * magnitude_, f"{value} for {float(mean_)}"


def assert_mean(result: Array, columns: Sequence[Array], weights: Sequence[float]) -> None:
    """Holds a floating result to the contract: a unit for float64, the bound for float32, else one rounding.

    fp16 and bf16 may be off where the exact mean is a tie but for what a float32 accumulation cannot see.
    """
    name = name_of(result.dtype)
    assert result.shape == columns[0].shape
    if name == "fp64":
        assert_fp64_mean(result, columns, weights)
        return
    exact, scale = mean(columns, weights), magnitude(columns, weights)
    if name == "fp32":
        error = np.abs(wide(result) - exact)
        assert np.all(error <= LARGEST_ERROR * scale + 2.0**-149), f"off by {np.max(error / scale)} of the mean of |x|"
        return
    assert_rounded_once(result, exact, 2.0**-22 * scale)


def assert_rounded_once(result: Array, exact: Array, slack: Array | float) -> None:
    """Rounding is monotonic: the result lies between the roundings of exact - slack and exact + slack."""
    name = name_of(result.dtype)
    low, high = round_to(exact - slack, name), round_to(exact + slack, name)
    value = result.astype(np.float64)
    wrong = ~((low <= value) & (value <= high))
    assert not wrong.any(), f"expected {low[wrong][:5]} to {high[wrong][:5]}, got {value[wrong][:5]}"


def bits(array: Array) -> Array:
    """An array's bits as unsigned integers, every NaN as one pattern: payloads are not part of the contract."""
    array = np.ascontiguousarray(array)
    if array.dtype.kind in "fV":
        array = np.where(np.isnan(array.astype(np.float64)), np.array(np.nan).astype(array.dtype), array)
    return array.view(f"u{array.dtype.itemsize}")


def assert_same_bits(one: Array, other: Array) -> None:
    """Equal shapes, dtypes and bits."""
    assert one.dtype == other.dtype, f"{one.dtype} and {other.dtype}"
    assert one.shape == other.shape, f"{one.shape} and {other.shape}"
    different = np.atleast_1d(bits(one) != bits(other))
    where = tuple(index[0] for index in np.nonzero(different)) if different.any() else ()
    assert not where, (
        f"{different.sum()} differ, first at {where}: {np.atleast_1d(one)[where]!r}, {np.atleast_1d(other)[where]!r}"
    )
