"""Where results go: new arrays, or the caller's."""

from __future__ import annotations

from typing import Any

from fastagg._arrays.library import View
from fastagg._arrays.registry import kind_of
from fastagg._native.codes import name_of
from fastagg._updates import overlap
from fastagg._updates.leaves import LeafInputs
from fastagg._updates.structure import Structure


def results_for(inputs: list[LeafInputs], structure: Structure, out: Any, first: Any) -> tuple[Any, list[int]]:
    """New arrays for the result, or those of `out`, with their addresses."""
    if out is None:
        arrays = [_new_result(leaf) for leaf in inputs]
        addresses = [leaf.kind.address(array) for leaf, array in zip(inputs, arrays, strict=True)]
        return structure.build(arrays, first), addresses
    return out, [view.address for view in check_out(inputs, structure, out)]


def _new_result(leaf: LeafInputs) -> Any:
    if leaf.code == leaf.result_code:
        return leaf.kind.empty_like(leaf.owners[0])
    return leaf.kind.empty(leaf.shape, leaf.dtype, leaf.device)


def check_out(inputs: list[LeafInputs], structure: Structure, out: Any) -> list[View]:
    """The arrays of `out`, in the order of the leaves.

    Raises:
        TypeError, ValueError: one does not fit its leaf, cannot be written, or overlaps an input or another.
    """
    views = [
        _out_view(leaf, array, structure, index)
        for index, (leaf, array) in enumerate(zip(inputs, structure.leaves(out, "out"), strict=True))
    ]
    overlap.check(inputs, views, structure)
    return views


def _out_view(leaf: LeafInputs, array: Any, structure: Structure, index: int) -> View:
    """An array of `out`, whose memory fits its leaf."""
    try:
        if leaf.code == leaf.result_code:
            addresses = leaf.kind.addresses([leaf.owners[0], array])
            if len(addresses) == 2:  # it looks just like the clients' arrays
                leaf.kind.note_write(array)
                return View(addresses[1], leaf.result_code, leaf.shape, leaf.device, array)
        return _checked_out_view(leaf, array)
    except (TypeError, ValueError) as error:
        raise type(error)(f"out, {structure.leaf_name(index)}: {error}") from None


def _checked_out_view(leaf: LeafInputs, array: Any) -> View:
    if kind_of(array) is not leaf.kind:
        raise TypeError(f"expected a {leaf.kind.name} array, got {type(array).__name__}")
    if array.dtype != leaf.dtype and name_of(array.dtype) != name_of(leaf.dtype):
        raise TypeError(f"expected dtype {name_of(leaf.dtype)}, got {name_of(array.dtype)}")
    view = leaf.kind.writable_view(array)
    if view.shape != leaf.shape:
        raise ValueError(f"expected shape {leaf.shape}, got {view.shape}")
    if view.device != leaf.device:
        raise ValueError(f"expected device {leaf.device}, got {view.device}")
    return view
