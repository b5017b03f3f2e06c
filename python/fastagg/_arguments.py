"""Arguments that must be integers or truth values, checked where they are given."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from fastagg._quoting import quoted

_MOST_DIMENSIONS = 64  # NumPy's and torch's
_MOST_ELEMENTS = 1 << 59


def as_integer(value: Any, name: str) -> int:
    """An integer argument, NumPy's integers included; raises TypeError if it is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {quoted(value)}") from None


def as_shape(value: Any) -> tuple[int, ...]:
    """A shape that came from outside, as integers.

    Raises:
        TypeError, ValueError: it is none, or no array can have it.
    """
    try:
        sizes = tuple(operator.index(size) for size in value)
    except TypeError:
        raise TypeError(f"shape: expected integers, got {quoted(value)}") from None
    if min(sizes, default=0) < 0 or len(sizes) > _MOST_DIMENSIONS or math.prod(filter(None, sizes)) >= _MOST_ELEMENTS:
        raise ValueError(f"shape: expected sizes of 0 or more that can be held in memory, got {quoted(value)}")
    return sizes


def as_flag(value: Any, name: str) -> bool:
    """A truth value; raises TypeError for anything else: "no" would be true."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {quoted(value)}")
    return bool(value)
