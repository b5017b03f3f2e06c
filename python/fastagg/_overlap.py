"""Whether a result would be written over what it is read from."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fastagg._codes import ELEMENT_BYTES, Code

if TYPE_CHECKING:
    from fastagg._tensor import View
    from fastagg._updates import Structure
    from fastagg.averaging import LeafInputs

# Up to so many pairs of spans, comparing them one by one is faster than calling NumPy.
_FEW_PAIRS = 1000


def check(inputs: list[LeafInputs], outs: list[View], structure: Structure) -> None:
    """Raises ValueError if an output overlaps an input or another output."""
    spans = [span for leaf in inputs for span in _spans(leaf)]
    if len(spans) * len(outs) <= _FEW_PAIRS:
        suspects = [index for index, out in enumerate(outs) if _touches_any(out.span, spans)]
    else:
        suspects = _search(np.array(spans, np.uint64), outs)
    for index in suspects:
        _raise(inputs, outs[index], index, structure)
    in_order = sorted((index for index, out in enumerate(outs) if out.elements), key=lambda index: outs[index].span)
    for one, other in pairwise(in_order):
        if _touch(outs[one].span, outs[other].span):
            raise ValueError(f"out: {structure.leaf_name(one)} and {structure.leaf_name(other)} overlap")


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


def _touches_any(out: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    begin, end = out
    return any(begin < last and first < end and begin < end and first < last for first, last in spans)


def _search(spans: np.ndarray, outs: list[View]) -> list[int]:
    """The outputs that an input may reach into: those behind whose first byte an earlier input ends."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    begins, ends = np.array([out.span for out in outs], np.uint64).T
    before = np.searchsorted(spans[:, 0], ends)  # inputs that begin before the output ends
    return [int(index) for index in np.nonzero((before > 0) & (reach[before - 1] > begins) & (begins < ends))[0]]


def _raise(inputs: list[LeafInputs], out: View, index: int, structure: Structure) -> None:
    """Raises ValueError for the first input that shares a byte with an output."""
    for leaf, given in enumerate(inputs):
        for number, span in enumerate(_spans(given)):
            if _touch(out.span, span):
                client = number % len(given.sources)
                raise ValueError(
                    f"out, {structure.leaf_name(index)}: overlaps client {client}'s {structure.leaf_name(leaf)}"
                )


def encoded_bytes(code: Code, count: int) -> int:
    """Bytes of `count` elements of a code, scales left out."""
    if code == Code.WIRE_INT4:
        return -(-count // 2)
    if code == Code.WIRE_SIGN:
        return -(-count // 8)
    return count * ELEMENT_BYTES.get(code, 1)
