"""A number against what it must reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Target(NamedTuple):
    """One target and what was measured."""

    text: str
    needed: str
    measured: str  # "" where a row of it is missing
    reached: bool
    is_quiet: bool

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.measured:
            return "not measured"
        if not self.is_quiet:
            return "machine busy"
        return "reached" if self.reached else "not reached"


class Measured(NamedTuple):
    """A number, and whether the machine was quiet enough for it to count."""

    value: float
    is_quiet: bool = True


def at_least(text: str, bound: float, measured: Measured | None) -> Target:
    """A target that larger numbers reach."""
    return _judged(text, f"at least {bound:g}", measured, lambda value: value >= bound)


def at_most(text: str, bound: float, measured: Measured | None, digits: int = 2) -> Target:
    """A target that smaller numbers reach."""
    return _judged(text, f"at most {bound:g}", measured, lambda value: value <= bound, digits)


def _judged(
    text: str, needed: str, measured: Measured | None, reaches: Callable[[float], bool], digits: int = 2
) -> Target:
    """A target by the number that is shown."""
    if measured is None:
        return Target(text, needed, "", False, True)
    shown = f"{measured.value:.{digits}f}"
    return Target(text, needed, shown, reaches(float(shown)), measured.is_quiet)
