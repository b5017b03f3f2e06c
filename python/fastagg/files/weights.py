"""The weights of files, negative ones included, as the native sum takes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# A sum of decimal weights is off by this much of their magnitudes at most: less is zero, and nothing to divide by.
_SMALLEST_SHARE = 1e-12
# Powers of two whose reciprocals are normal numbers too.
_LARGEST_EXPONENT = 900


class Combination(NamedTuple):
    """``sum_k(weights[k] * x_k) / (divisor + rest)``, the rest being what rounding has taken from the divisor."""

    weights: list[float]
    divisor: float
    rest: float


def check_weights(weights: Iterable[float] | None, paths: Sequence[Path], signed: bool) -> list[float]:
    """The files' weights as floats; equal weights for None.

    Raises:
        TypeError: a weight is no number.
        ValueError: there are not as many as files, one is not finite or negative without `signed`, or all are zero.
    """
    given = [1.0] * len(paths) if weights is None else list(weights)
    if len(given) != len(paths):
        raise ValueError(f"weights: expected {len(paths)}, one for each file, got {len(given)}")
    numbers = [_as_number(weight, path) for path, weight in zip(paths, given, strict=True)]
    for path, weight in zip(paths, numbers, strict=True):
        if not math.isfinite(weight):
            raise ValueError(f"{path}: expected a finite weight, got {weight}")
        if weight < 0 and not signed:
            raise ValueError(f"{path}: expected a weight of 0 or more, got {weight} (negative ones must be allowed)")
    if not any(numbers):
        raise ValueError("weights: all are zero, so no file contributes")
    return numbers


def _as_number(weight: Any, path: Path) -> float:
    """A file's weight as a float; raises TypeError if it is no number."""
    try:
        if isinstance(weight, (str, bytes, bool, np.bool_)):
            raise TypeError
        return float(weight)
    except OverflowError:  # an integer beyond the floats
        return math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{path}: expected a number as its weight, got {weight!r}") from None


def combine(weights: list[float], normalize: bool) -> Combination:
    """The weights of the contributing files, scaled like `fedavg`'s by a power of two, so that no sum overflows.

    Raises:
        ValueError: they shall be divided by their sum, which is zero.
    """
    exponent = math.frexp(max(map(abs, weights)))[1]
    factor = math.ldexp(1.0, -3 - min(max(exponent, -_LARGEST_EXPONENT), _LARGEST_EXPONENT))
    scaled = [weight * factor for weight in weights]
    if not normalize:
        return Combination(scaled, factor, 0.0)
    total = math.fsum(scaled)
    if abs(total) <= _SMALLEST_SHARE * math.fsum(map(abs, scaled)):
        raise ValueError("weights: their sum is zero, so they cannot be normalized")
    return Combination(scaled, total, math.fsum((*scaled, -total)))
