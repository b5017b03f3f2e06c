"""Whether a result would be written over what it is read from."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from fastagg._native import core
from fastagg._native.codes import Code, encoded_bytes

if TYPE_CHECKING:
    from fastagg._arrays.library import View
    from fastagg._updates.leaves import LeafInputs
    from fastagg._updates.structure import Structure


def check(inputs: list[LeafInputs], outs: list[View], structure: Structure) -> None:
    """Raises ValueError if an output overlaps an input or another output."""
    given = [part for leaf in inputs for part in _arrays(leaf)]
    taken = [out.span for out in outs]
    if not core.overlaps(given, taken):
        return
    for index, out in enumerate(taken):
        _check_inputs(inputs, out, index, structure)
    in_order = sorted((begin, end, index) for index, (begin, end) in enumerate(taken) if begin < end)
    for (_, end, one), (begin, _, other) in pairwise(in_order):
        if begin < end:
            raise ValueError(f"out: {structure.leaf_name(one)} and {structure.leaf_name(other)} overlap")


def _arrays(leaf: LeafInputs) -> list[tuple[list[int], int]]:
    """First addresses of arrays of one size, and their bytes."""
    if leaf.code is not None:
        return [(leaf.sources, encoded_bytes(leaf.code, math.prod(leaf.shape)))]
    return [([begin], end - begin) for begin, end in _spans(leaf)]


def _spans(leaf: LeafInputs) -> list[tuple[int, int]]:
    """First address of each client's array, and the one behind its last byte."""
    count = math.prod(leaf.shape)
    if leaf.code is not None:
        size = encoded_bytes(leaf.code, count)
        return [(address, address + size) for address in leaf.sources]
    spans = [(address, address + encoded_bytes(Code(code), count)) for address, _, code, _ in leaf.sources]
    with_scales = [source for source in leaf.sources if source[2] >= Code.WIRE_FP8_E4M3]
    return spans + [(address, address - 4 * (-count >> shift)) for _, address, _, shift in with_scales]


def _touch(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two spans share a byte."""
    return one[0] < other[1] and other[0] < one[1] and one[0] < one[1] and other[0] < other[1]


def _check_inputs(inputs: list[LeafInputs], out: tuple[int, int], index: int, structure: Structure) -> None:
    """Raises ValueError for the first input that shares a byte with an output."""
    for leaf, given in enumerate(inputs):
        for number, span in enumerate(_spans(given)):
            if _touch(out, span):
                client = number % len(given.sources)
                what = "array" if structure.container is None else structure.leaf_name(leaf)
                raise ValueError(f"out, {structure.leaf_name(index)}: overlaps client {client}'s {what}")
