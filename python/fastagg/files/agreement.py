"""Whether checkpoints have the same leaves, and what those of their mean are."""

from __future__ import annotations

from collections.abc import Sequence

from fastagg._native.codes import FLOATS, Code
from fastagg._quoting import quoted
from fastagg._updates.integer_codes import IntegerLeaf, refuse_codes
from fastagg.files.checkpoints import Checkpoint, LeafDescription


def leaves_of_mean(checkpoints: Sequence[Checkpoint], target: Code | None) -> dict[str, LeafDescription]:
    """The leaves of the mean: the first file's, the floating ones of the dtype `target` if that is given.

    Raises:
        TypeError, ValueError: a file's leaves differ from the first one's, or it has none; the message names both.
    """
    first = checkpoints[0]
    if not first:
        raise ValueError(f"{first.path}: the file has no leaves")
    for checkpoint in checkpoints[1:]:
        _check_names(checkpoint, first)
    for checkpoint in checkpoints:
        for name, expected in first.leaves.items():
            _check_leaf(f"{checkpoint.path}: leaf {quoted(name)}", checkpoint.leaves[name], expected, target)
    return {name: _mean_of(leaf, target) for name, leaf in first.leaves.items()}


def check_integers(checkpoint: Checkpoint) -> None:
    """Raises ValueError where a file's integer leaves look like another quantiser's codes, or like bytes."""
    names = tuple(checkpoint.leaves)
    integers = tuple(
        IntegerLeaf(place, leaf.dtype, leaf.shape)
        for place, leaf in enumerate(checkpoint.leaves.values())
        if leaf.code not in FLOATS
    )
    try:
        refuse_codes(names, integers, lambda place: [("", checkpoint[names[place]])])
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def _check_names(checkpoint: Checkpoint, first: Checkpoint) -> None:
    for what, one, other in (("missing", first, checkpoint), ("unexpected", checkpoint, first)):
        if names := [name for name in one if name not in other.leaves]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{checkpoint.path}: {what} leaf {quoted(names[0])}{more} (expected those of {first.path})"
            )


def _check_leaf(who: str, leaf: LeafDescription, expected: LeafDescription, target: Code | None) -> None:
    if leaf.shape != expected.shape:
        raise ValueError(f"{who}: expected shape {expected.shape} like the first file's, got {leaf.shape}")
    if leaf.dtype == expected.dtype:
        return
    floats = leaf.code in FLOATS and expected.code in FLOATS
    if floats and (target is not None or leaf.wire is not None):
        return
    hint = " (ask for a dtype to say what the result shall be)" if floats else ""
    raise TypeError(f"{who}: expected dtype {expected.dtype} like the first file's, got {leaf.dtype}{hint}")


def _mean_of(leaf: LeafDescription, target: Code | None) -> LeafDescription:
    dtype = leaf.dtype if target is None or leaf.code not in FLOATS else target.name.lower()
    return LeafDescription(dtype, leaf.shape)
