"""Clients' weights: checked, and scaled for the native code."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any


def scale_weights(weights: list[float]) -> tuple[list[float], float]:
    """Weights divided by a power of two that leaves the largest in [1/16, 1/8). And their sum.

    So no sum of float32 values overflows, that of eight clients in float32 included.
    """
    exponent = math.frexp(max(weights))[1]
    if exponent < -1000:  # the power of two must be in range, too
        return scale_weights([weight * 2.0**100 for weight in weights])
    factor = math.ldexp(1.0, -3 - exponent)
    scaled = [weight * factor for weight in weights]
    return scaled, math.fsum(scaled)


def as_weights(weights: Any, count: int) -> list[float]:
    """Clients' weights as floats; equal weights for None.

    Raises:
        TypeError: a weight is no number.
        ValueError: there are not `count` of them, or one is negative or not finite, or all are zero.
    """
    if weights is None:
        return [1.0] * count
    numbers = _as_numbers(weights, count)
    if len(numbers) != count:
        raise ValueError(f"weights: expected {count}, one for each update, got {len(numbers)}")
    if not (min(numbers) >= 0 and math.isfinite(sum(numbers))):
        for client, weight in enumerate(numbers):
            check_weight(weight, f"the weight of client {client}")
    if not any(numbers):
        raise ValueError("weights: all are zero, so no client contributes")
    return numbers


def _as_numbers(weights: Any, count: int) -> list[float]:
    if isinstance(weights, (str, bytes, bytearray, Mapping)):
        raise TypeError(f"weights: expected {count} numbers, got {type(weights).__name__}")
    try:
        weights = list(weights)
        return array("d", weights).tolist()  # the fast way: text is refused here too
    except OverflowError:
        pass
    except TypeError as error:
        raise TypeError(f"weights: expected {count} numbers, got {weights!r}") from error
    return [_as_number(weight) for weight in weights]


def _as_number(weight: Any) -> float:
    """A number as a float."""
    try:
        return float(weight)
    except OverflowError:  # an integer beyond the floats: refused by name, as infinity is
        return math.inf


def check_weight(weight: float, what: str) -> None:
    """Raises ValueError unless the weight is finite and not negative."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"{what}: expected a finite number of 0 or more, got {weight}")
