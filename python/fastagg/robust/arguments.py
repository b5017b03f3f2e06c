"""Numbers that rules are given."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastagg._arguments import as_integer


def as_count(value: Any, name: str, least: int = 0) -> int:
    """An integer argument.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below `least`.
    """
    count = as_integer(value, name)
    if count < least:
        raise ValueError(f"{name}: expected {least} or more, got {count}")
    return count


def as_positive(value: Any, name: str) -> float:
    """A finite number above 0.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 < value < np.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return float(value)
