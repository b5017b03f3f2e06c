"""What a contender works on, and how it is prepared: answers are right before anything is timed."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpu_cases import FASTAGG, Case
from gpu_timing import Call


class Subject(Protocol):
    """One set of a case's inputs with room for its results."""

    @property
    def bytes(self) -> int:
        """Bytes that the operation cannot but read and write."""
        ...

    def spoil(self) -> None:
        """Undoes what a call has left, so that the next one must write every element."""
        ...

    def check(self, tolerance: float) -> None:
        """Asserts that a call has left the right answer."""
        ...


@dataclass(frozen=True)
class Contender:
    """One way to do an operation."""

    name: str
    package: str
    prepare: Callable[[Any], Call]  # from a subject; all that is not timed
    fits: Callable[[Case], bool] = lambda case: True
    is_eager: bool = False
    tolerance: float = 1e-5  # of a mean, in weighted means of |x|: plain float32 sums

    @property
    def is_fastagg(self) -> bool:
        """Whether it is ours."""
        return self.package == FASTAGG

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.package) is not None


def prepared(contender: Contender, subjects: Sequence[Subject]) -> Call:
    """A contender's call, on one subject after the other.

    Raises:
        AssertionError: its answer is wrong.
    """
    calls = [contender.prepare(subject) for subject in subjects]
    for subject, call in zip(subjects, calls, strict=True):
        subject.spoil()
        call()
        subject.check(contender.tolerance)
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()
