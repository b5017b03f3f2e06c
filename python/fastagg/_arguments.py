"""Arguments that must be integers or truth values, checked where they are given."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from fastagg._quoting import quoted

_MOST_DIMENSIONS = 64  # NumPy's and torch's


def as_integer(value: Any, name: str) -> int:
    """An integer argument, NumPy's integers included; raises TypeError if it is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {quoted(value)}") from None


def as_shape(sizes: Any) -> tuple[int, ...]:
    """A shape that somebody sent; raises TypeError or ValueError unless an array can have it."""
    shape = tuple(operator.index(size) for size in sizes)
    if len(shape) > _MOST_DIMENSIONS or min(shape, default=0) < 0 or math.prod(filter(None, shape)) >= 1 << 63:
        raise ValueError(f"expected the shape of an array, got {quoted(shape)}")
    return shape


def as_flag(value: Any, name: str) -> bool:
    """A truth value; raises TypeError for anything else: "no" would be true."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {quoted(value)}")
    return bool(value)


def as_shape(value: Any) -> tuple[int, ...]:
    """A shape that came from outside, as integers.

    Raises:
        TypeError, ValueError: it is none.
    """
    try:
        sizes = tuple(operator.index(size) for size in value)
    except TypeError:
        raise TypeError(f"shape: expected integers, got {value!r}") from None
    if any(size < 0 for size in sizes) or math.prod(max(size, 1) for size in sizes) >= 1 << 59:
        raise ValueError(f"shape: expected sizes of 0 or more that can be held in memory, got {value!r}")
    return sizes
