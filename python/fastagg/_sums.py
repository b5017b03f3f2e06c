"""Where an accumulator's sums lie: one block of memory, each leaf at a cache line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from fastagg._codes import ELEMENT_BYTES, Code, name_of
from fastagg._tensor import kind_named
from fastagg.averaging import LeafInputs

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
        """The leaf that `describe` described."""
        kind, dtype, code, shape, state, offset = plain
        return cls(kind, kind_named(kind).dtype_named(dtype), Code(code), tuple(shape), Code(state), offset)

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
        state = _state_code(leaf, integer_policy)
        leaves.append(LeafSums(leaf.kind.name, leaf.dtype, leaf.result_code, leaf.shape, state, offset))
        offset = aligned(leaves[-1].end)
    return leaves


def check_sums(sums: np.ndarray | None, leaves: list[LeafSums], count: int) -> None:
    """Raises ValueError unless a saved block of sums holds just these leaves."""
    if sums is None:
        if count:
            raise ValueError(f"state: damaged: {count} updates were added, but it has no sums")
        return
    offset = end = 0
    for leaf in leaves:
        if leaf.offset != offset:
            raise ValueError(f"state: damaged: a leaf of {leaf.shape} begins at {leaf.offset}, expected {offset}")
        end = leaf.end
        offset = aligned(end)
    if sums.dtype != np.uint8 or sums.shape != (end,):
        raise ValueError(f"state: damaged: expected {end} bytes of sums, got {sums.dtype} {sums.shape}")


def paired(sums: np.ndarray | None, leaves: list[LeafSums]) -> tuple[np.ndarray | None, list[LeafSums]]:
    """Sums of which those of fp64 leaves were single floats, as pairs of floats."""
    pairs, offset = [], 0
    for leaf in leaves:
        state = Code.STATE128 if leaf.code == Code.FLOAT64 else leaf.state
        pairs.append(leaf._replace(state=state, offset=offset))
        offset = aligned(pairs[-1].end)
    if sums is None:
        return None, pairs
    block = np.zeros(pairs[-1].end, np.uint8)
    for old, new in zip(leaves, pairs, strict=True):  # the first plane is what there was
        block[new.offset : new.offset + old.end - old.offset] = sums[old.offset : old.end]
    return block, pairs


def _state_code(leaf: LeafInputs, integer_policy: str | None) -> Code:
    """How the leaf's sums are kept: as wide sums, or as an integer leaf's own values."""
    if leaf.is_float:
        return Code.STATE128 if leaf.result_code == Code.FLOAT64 else Code.STATE48
    return Code.FLOAT64 if integer_policy == "round" else leaf.result_code


def aligned(size: int) -> int:
    """The next multiple of a cache line."""
    return -(-size // ALIGNMENT) * ALIGNMENT
