"""Arguments that must be integers or truth values, checked where they are given."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np


def as_integer(value: Any, name: str) -> int:
    """An integer argument, NumPy's integers included; raises TypeError if it is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def as_flag(value: Any, name: str) -> bool:
    """A truth value; raises TypeError for anything else: "no" would be true."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)
