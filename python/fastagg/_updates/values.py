"""The values of an update's leaves as float64 NumPy arrays, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastagg._arrays.library import Kind
from fastagg._arrays.registry import adopt
from fastagg._native.codes import FLOATS, Code, code_of_dtype, name_of
from fastagg._updates.structure import Structure
from fastagg.quantization.cast import dequantize
from fastagg.quantization.quantized import Quantized, device_of

BLOCK = 1 << 16  # elements


class Leaf(NamedTuple):
    """One array of one client, in one dimension."""

    kind: Kind
    flat: Any
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(self.flat.shape[0])

    def values(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements from `start` to before `stop`, in float64."""
        part = self.flat[start:stop]
        if self.kind.name == "torch":  # torch has bf16, NumPy does not
            return self.kind.to_numpy(part.to(self.kind.dtype_for(Code.FLOAT64)))
        return self.kind.to_numpy(part).astype(np.float64)


def open_leaf(array: Any, who: str) -> Leaf | None:
    """An array or `Quantized` as a leaf; None for integers and bools, which are counters rather than weights.

    Raises:
        TypeError: it is no array, or of a dtype that fastagg does not know; the message begins with `who`.
    """
    try:
        if isinstance(array, Quantized):  # whose values are those of float32, whatever its dtype
            kind = array._kind
            array = dequantize(array, out=kind.empty(array.shape, kind.dtype_for(Code.FLOAT32), device_of(array)))
        kind, array = adopt(array)
        code = code_of_dtype(kind.dtype_of(array))
        if code is None:
            raise TypeError(f"dtype {name_of(kind.dtype_of(array))} is not supported")
    except TypeError as error:
        raise TypeError(f"{who}: {error}") from None
    if code not in FLOATS:
        return None
    if kind.name == "torch":
        array = array.detach()
    return Leaf(kind, array.reshape(-1), tuple(array.shape))


def leaf_title(structure: Structure, index: int) -> str:
    """A leaf's name in tables and plots."""
    return "array" if structure.container is None else str(structure.names[index])


def columns_of(updates: Sequence[Any], reference: Any = None) -> Iterator[tuple[str, list[Leaf], Leaf | None]]:
    """For each floating leaf: its name, what every client sent, and what `reference` holds.

    Raises:
        TypeError, ValueError: an update, or the reference, differs from the first update's structure or shapes.
    """
    structure = Structure(updates[0])
    references = None if reference is None else structure.leaves(reference, "reference")
    for index, column in enumerate(structure.columns(list(updates))):
        name = structure.leaf_name(index)
        leaves = [open_leaf(array, f"client {client}, {name}") for client, array in enumerate(column)]
        base = None if references is None else open_leaf(references[index], f"reference, {name}")
        if leaves[0] is None:
            continue
        kept = [_checked(leaf, leaves[0].shape, f"client {client}, {name}") for client, leaf in enumerate(leaves)]
        if references is not None:
            base = _checked(base, leaves[0].shape, f"reference, {name}")
        yield leaf_title(structure, index), kept, base


def _checked(leaf: Leaf | None, shape: tuple[int, ...], who: str) -> Leaf:
    if leaf is None:
        raise TypeError(f"{who}: expected a floating dtype like the first client's")
    if leaf.shape != shape:
        raise ValueError(f"{who}: expected shape {shape} like the first client's, got {leaf.shape}")
    return leaf


def blocks_of(leaves: Sequence[Leaf], base: Leaf | None = None) -> Iterator[np.ndarray]:
    """Blocks of shape (clients, elements) in float64, `base` subtracted; one block is held at a time."""
    for start in range(0, leaves[0].elements, BLOCK):
        rows = np.stack([leaf.values(start, start + BLOCK) for leaf in leaves])
        if base is not None:
            with np.errstate(invalid="ignore"):  # infinity minus infinity: NaN, as it should
                rows -= base.values(start, start + BLOCK)
        yield rows
