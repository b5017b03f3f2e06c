"""Whether a result would be written over what it is read from."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fastagg._codes import ELEMENT_BYTES, Code

if TYPE_CHECKING:
    from fastagg._tensor import View
    from fastagg._updates import Structure
    from fastagg.averaging import LeafInputs


def check(inputs: list[LeafInputs], outs: list[View], structure: Structure) -> None:
    """Raises ValueError if an output overlaps an input or another output."""
    spans, labels = _input_spans(inputs)
    order = np.argsort(spans[:, 0], kind="stable")
    starts, reach = spans[order, 0], np.maximum.accumulate(spans[order, 1])
    for index, out in enumerate(outs):
        begin, end = out.span
        before = int(np.searchsorted(starts, end))  # inputs that start before the output ends
        if begin < end and before and reach[before - 1] > begin:
            behind = np.nonzero((spans[:, 0] < end) & (spans[:, 1] > begin))[0]
            client, leaf = labels[int(behind[0])]
            raise ValueError(
                f"out, {structure.leaf_name(index)}: overlaps client {client}'s {structure.leaf_name(leaf)}"
            )
    sorted_outs = sorted(range(len(outs)), key=lambda index: outs[index].span)
    for one, other in pairwise(sorted_outs):
        if outs[one].elements and outs[other].elements and outs[one].span[1] > outs[other].span[0]:
            raise ValueError(f"out: {structure.leaf_name(one)} and {structure.leaf_name(other)} overlap")


def _input_spans(inputs: list[LeafInputs]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """First and last address of every input, and its (client, leaf)."""
    spans, labels = [], []
    for index, leaf in enumerate(inputs):
        count = int(np.prod(leaf.shape, dtype=np.int64))
        for client, source in enumerate(leaf.sources):
            address, code = (source, leaf.code) if leaf.code is not None else (source[0], Code(source[2]))
            spans.append((address, address + encoded_bytes(code, count) if count else address))
            labels.append((client, index))
    return np.array(spans, np.uint64), labels


def encoded_bytes(code: Code, count: int) -> int:
    """Bytes of `count` elements of a code, scales left out."""
    if code == Code.WIRE_INT4:
        return -(-count // 2)
    if code == Code.WIRE_SIGN:
        return -(-count // 8)
    return count * ELEMENT_BYTES.get(code, 1)
