"""Where an accumulator's sums lie: one block of memory, each leaf at a cache line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from fastagg._arguments import as_integer, as_shape
from fastagg._arrays.registry import kind_named
from fastagg._native.codes import ELEMENT_BYTES, FLOATS, Code, code_of_dtype, name_of
from fastagg._updates.leaves import LeafInputs

ALIGNMENT = 64
# Bytes of an element in the two planes of sums.
PLANES = {Code.STATE48: (4, 2), Code.STATE128: (8, 8)}


class Total(NamedTuple):
    """A sum of weights in twice the precision of a float: rounded, and what that lacks."""

    high: float
    rest: float

    def plus(self, weights: Iterable[float]) -> Total:
        """The sum with more weights, or with those of another total."""
        terms = (*self, *weights)
        high = math.fsum(terms)
        return Total(high, math.fsum((*terms, -high)))

    def times(self, power_of_two: float) -> Total:
        """The sum, scaled exactly."""
        return Total(self.high * power_of_two, self.rest * power_of_two)


class LeafSums(NamedTuple):
    """One leaf as the accumulator keeps it: what the result shall be, and where its sums lie."""

    kind: str
    dtype: Any
    code: Code
    shape: tuple[int, ...]
    state: Code
    offset: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def describe(self) -> list[Any]:
        """Plain values, for a checkpoint."""
        return [self.kind, name_of(self.dtype), int(self.code), list(self.shape), int(self.state), self.offset]

    @property
    def end(self) -> int:
        """Where the sums end in the block, in bytes."""
        if self.state in PLANES:  # each at a cache line
            first, second = PLANES[self.state]
            return self.offset + aligned(first * self.elements) + second * self.elements
        return self.offset + ELEMENT_BYTES[self.state] * self.elements

    @classmethod
    def described(cls, plain: list[Any]) -> LeafSums:
        """The leaf that `describe` described, but for its state and offset, of which `check_sums` knows.

        Raises:
            KeyError, TypeError, ValueError: no leaf is described so.
        """
        kind, name, code, shape, state, offset = plain
        expected = code_of_dtype(name) if isinstance(name, str) else None
        if expected is None or expected != code:
            raise ValueError(f"a leaf of dtype {name!r} has the code {expected}, got {code!r}")
        try:
            dtype = kind_named(kind).dtype_named(name)
        except ImportError:
            raise ValueError(f"its arrays are {kind}'s, which is not installed") from None
        if name_of(dtype) != name:
            raise ValueError(f"expected the dtype {name_of(dtype)!r}, got {name!r}")
        return cls(kind, dtype, expected, as_shape(shape), Code(state), as_integer(offset, "offset"))

    def operands(self, base: int) -> tuple[int, int, int, int]:
        """The sums in the block of memory at `base`, as a source."""
        return base + self.offset, self.companion(base), self.state, 0

    def companion(self, base: int) -> int:
        """The second plane of the sums, or 0 where they have one."""
        if self.state not in PLANES:
            return 0
        return base + self.offset + aligned(PLANES[self.state][0] * self.elements)


def lay_out(inputs: list[LeafInputs], integer_policy: str | None) -> list[LeafSums]:
    """The leaves' places in one block of memory, each at a cache line."""
    leaves, offset = [], 0
    for leaf in inputs:
        state = _state_code(leaf.result_code, integer_policy)
        leaves.append(LeafSums(leaf.kind.name, leaf.dtype, leaf.result_code, leaf.shape, state, offset))
        offset = aligned(leaves[-1].end)
    return leaves


def check_device(device: Any, leaves: list[LeafSums]) -> None:
    """Raises ValueError unless it is the name of a device on which the libraries of these leaves have arrays."""
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda:\d{1,4}", device, re.ASCII):
        raise ValueError(f"device: expected 'cpu' or 'cuda:0', got {device!r}")
    elsewhere = "cupy" if device == "cpu" else "numpy"
    if any(leaf.kind == elsewhere for leaf in leaves):
        raise ValueError(f"there are no {elsewhere} arrays on {device}")


def check_sums(sums: np.ndarray | None, leaves: list[LeafSums], count: int, integer_policy: str | None) -> None:
    """Raises ValueError unless a saved block of sums is what `lay_out` makes of these leaves."""
    if (sums is None) != (count == 0):
        has = "no sums" if sums is None else "sums"
        raise ValueError(f"{count} updates were added, but it has {has}")
    offset = end = 0
    for leaf in leaves:
        expected = _state_code(leaf.code, integer_policy)
        if leaf.state != expected:
            raise ValueError(f"a leaf of {leaf.code.name} keeps its sums as {expected.name}, got {leaf.state.name}")
        if leaf.offset != offset:
            raise ValueError(f"a leaf of {leaf.shape} begins at {leaf.offset}, expected {offset}")
        end = leaf.end
        offset = aligned(end)
    if sums is not None and (sums.dtype != np.uint8 or sums.shape != (end,)):
        raise ValueError(f"expected {end} bytes of sums, got {sums.dtype} {sums.shape}")


def _state_code(code: Code, integer_policy: str | None) -> Code:
    """How the sums of a leaf are kept: as wide sums, or as an integer leaf's own values."""
    if code in FLOATS:
        return Code.STATE128 if code == Code.FLOAT64 else Code.STATE48
    return Code.FLOAT64 if integer_policy == "round" else code


def aligned(size: int) -> int:
    """The next multiple of a cache line."""
    return -(-size // ALIGNMENT) * ALIGNMENT
