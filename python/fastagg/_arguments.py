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
