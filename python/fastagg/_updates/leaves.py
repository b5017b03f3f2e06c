"""What all clients sent for a leaf, checked and ready for the native code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fastagg._arrays.library import Kind
from fastagg._arrays.registry import adopt, kind_of
from fastagg._native.backend import weighted_sum
from fastagg._native.codes import FLOATS, Code, code_of_dtype, name_of
from fastagg._native.operands import LeafOperands
from fastagg._updates.integer_codes import IntegerLeaf, refuse_codes
from fastagg._updates.structure import Structure
from fastagg.quantization.quantized import Quantized, device_of, source_operands


class LeafInputs(NamedTuple):
    """What all clients sent for one leaf, checked and ready for the native code."""

    sources: list[Any]  # addresses, or operands of csrc/bindings/operands.h where `code` is None
    code: Code | None
    kind: Kind
    dtype: Any  # of the result, as the library spells it
    result_code: Code
    shape: tuple[int, ...]
    device: str
    owners: list[Any]  # keeps copies alive

    @property
    def is_float(self) -> bool:
        """Whether the weighted mean applies, rather than the integer policy."""
        return self.result_code in FLOATS


def gather(
    column: list[Any], structure: Structure, index: int, target: Code | None, numbered_from: int = 0
) -> LeafInputs:
    """What all clients sent for one leaf; errors number them from `numbered_from` on.

    Raises:
        TypeError, ValueError: an array differs from the first client's; the message names its client and the leaf.
    """
    kind = kind_of(column[0])
    if kind is not None:
        addresses = kind.addresses(column)
        if len(addresses) == len(column):
            return _uniform(column, addresses, kind, structure, index, target, numbered_from)
    return _gather_one_by_one(column, structure, index, target, numbered_from)


def located(column: list[LeafInputs]) -> list[LeafInputs]:
    """What clients sent for one leaf a while ago, one each, where it lies now: a torch tensor's memory can be moved.

    Raises:
        ValueError: an array's memory has been taken away, or its shape or dtype changed.
    """
    first, owners = column[0], [leaf.owners[0] for leaf in column]
    if not first.kind.memory_moves:
        return column
    addresses = [] if isinstance(owners[0], Quantized) else first.kind.addresses(owners)
    if len(addresses) == len(column) and owners[0].shape == first.shape and owners[0].dtype == first.dtype:
        return [_at(leaf, address) for leaf, address in zip(column, addresses, strict=True)]
    return [_located_alone(leaf) for leaf in column]


def _located_alone(leaf: LeafInputs) -> LeafInputs:
    owner = leaf.owners[0]
    if isinstance(owner, Quantized):
        return leaf._replace(sources=[source_operands(owner)])
    view = leaf.kind.view(owner)
    expected = leaf.sources[0][2] if leaf.code is None else leaf.code
    if view.owner is not owner or (view.shape, view.code) != (leaf.shape, expected):
        raise ValueError("its shape, dtype or strides have changed since it was added")
    return _at(leaf, view.address)


def _at(leaf: LeafInputs, address: int) -> LeafInputs:
    """The same at another address."""
    source = address if leaf.code is not None else (address, *leaf.sources[0][1:])
    return leaf if source == leaf.sources[0] else leaf._replace(sources=[source])


def _uniform(
    column: list[Any],
    addresses: list[int],
    kind: Kind,
    structure: Structure,
    index: int,
    target: Code | None,
    numbered_from: int,
) -> LeafInputs:
    """Arrays that look just like the first one."""
    first = column[0]
    dtype = kind.dtype_of(first)
    code = code_of_dtype(dtype)
    if code is None:
        raise TypeError(
            f"client {numbered_from}, {structure.leaf_name(index)}: dtype {name_of(dtype)} is not supported"
        )
    result = code
    if target is not None and target != code and code in FLOATS:
        result, dtype = target, kind.dtype_for(target)
    return LeafInputs(addresses, code, kind, dtype, result, tuple(first.shape), kind.device_of(first), column)


def _gather_one_by_one(
    column: list[Any], structure: Structure, index: int, target: Code | None, numbered_from: int
) -> LeafInputs:
    """Arrays of which some are `Quantized`, not contiguous, or wrong."""
    sources: list[Any] = []
    owners: list[Any] = []
    kinds: list[Kind] = []
    dtypes: list[Any] = []
    shape: tuple[int, ...] | None = None
    device, leaf_name = "", structure.leaf_name(index)
    for client, leaf in enumerate(column, numbered_from):
        try:
            if isinstance(leaf, Quantized):
                kind, dtype, leaf_shape, leaf_device = leaf._kind, leaf.dtype, leaf.shape, device_of(leaf)
                sources.append(source_operands(leaf))
                owners.append(leaf)
            else:
                kind, array = adopt(leaf)
                view = kind.view(array)
                dtype, leaf_shape, leaf_device = kind.dtype_of(array), view.shape, view.device
                sources.append((view.address, 0, view.code, 0))
                owners.append(view.owner)
        except (TypeError, ValueError) as error:
            raise type(error)(f"client {client}, {leaf_name}: {error}") from None
        if shape is None:
            shape, device = leaf_shape, leaf_device
        who = f"client {client}, {leaf_name}"
        if leaf_shape != shape:
            raise ValueError(f"{who}: expected shape {shape} like the first client's, got {leaf_shape}")
        if leaf_device != device:
            raise ValueError(f"{who}: expected device {device} like the first client's, got {leaf_device}")
        if kind.name != (kinds[0].name if kinds else kind.name):
            raise TypeError(f"{who}: expected a {kinds[0].name} array like the first client's, got {kind.name}")
        kinds.append(kind)
        dtypes.append(None if isinstance(leaf, Quantized) else dtype)
    assert shape is not None
    if all(dtype is None for dtype in dtypes):
        dtypes[0] = column[0].dtype
    dtype, result = _result_dtype(kinds[0], dtypes, leaf_name, target, numbered_from)
    return LeafInputs(sources, None, kinds[0], dtype, result, shape, device, owners)


def _result_dtype(
    kind: Kind, dtypes: list[Any], leaf_name: str, target: Code | None, numbered_from: int
) -> tuple[Any, Code]:
    """The one dtype of the arrays among a leaf's inputs, unless `target` overrules it.

    Raises:
        TypeError: they differ, and `target` does not say what the result shall be.
    """
    first_client, first_dtype = next(
        (client, dtype) for client, dtype in enumerate(dtypes, numbered_from) if dtype is not None
    )
    first = code_of_dtype(first_dtype)
    assert first is not None
    floats = first in FLOATS
    for client, dtype in enumerate(dtypes, numbered_from):
        if dtype is None and not floats:
            raise TypeError(f"client {client}, {leaf_name}: a Quantized cannot join {name_of(first_dtype)} arrays")
        if dtype is None:
            continue
        code = code_of_dtype(dtype)
        both_float = floats and code in FLOATS
        if name_of(dtype) != name_of(first_dtype) and not (both_float and target is not None):
            hint = " (dtype= says what the result shall be)" if both_float else ""
            raise TypeError(
                f"client {client}, {leaf_name}: expected dtype {name_of(first_dtype)} like client "
                f"{first_client}'s, got {name_of(dtype)}{hint}"
            )
    if target is None or not floats:
        return first_dtype, first
    return kind.dtype_for(target), target


def inputs_of(update: Any) -> list[LeafInputs]:
    """The leaves of a single update."""
    structure = Structure(update)
    return [gather(column, structure, index, None) for index, column in enumerate(structure.columns([update]))]


def infinite_leaves(inputs: list[LeafInputs]) -> list[int]:
    """The floating leaves in which a single update holds a NaN or an infinity."""
    return nonfinite_leaves(inputs, 0, inputs[0].kind.stream(inputs[0].device))


def is_finite(leaf: LeafInputs, client: int, stream: int) -> bool:
    """Whether a client's leaf holds no NaN and no infinity."""
    return not nonfinite_leaves([leaf], client, stream)


def nonfinite_leaves(inputs: list[LeafInputs], client: int, stream: int) -> list[int]:
    """The floating leaves in which a client holds a NaN or an infinity."""
    floats = [index for index, leaf in enumerate(inputs) if leaf.is_float]
    leaves: list[LeafOperands] = []
    for leaf in (inputs[index] for index in floats):
        source, code = leaf.sources[client], leaf.code
        leaves.append(LeafOperands([source], code, [1.0], 1.0, math.prod(leaf.shape)))
    return [floats[index] for index in weighted_sum(leaves, inputs[0].device, stream, True)] if leaves else []


def check_integers(
    structure: Structure, inputs: list[LeafInputs], contributing: Iterable[int] | None = None, numbered_from: int = 0
) -> None:
    """Refuses integers that look like another quantiser's codes, which no policy was given for.

    Args:
        structure: that of the updates.
        inputs: all leaves.
        contributing: the clients to look at; None for all.
        numbered_from: the number of the first client in errors.

    Raises:
        ValueError: a client's leaf looks so.
    """
    leaves = tuple(IntegerLeaf(index, leaf.dtype, leaf.shape) for index, leaf in enumerate(inputs) if not leaf.is_float)
    if not leaves:
        return

    def values(index: int) -> Iterator[tuple[str, Any]]:
        owners = inputs[index].owners
        for client in range(len(owners)) if contributing is None else contributing:
            yield f"client {numbered_from + client}, ", owners[client]

    refuse_codes(structure.names or (None,), leaves, values)


def check_devices(inputs: list[LeafInputs], structure: Structure) -> str:
    """The one device of an update.

    Raises:
        ValueError: there are several.
    """
    device = inputs[0].device
    for index, leaf in enumerate(inputs):
        if leaf.device != device:
            raise ValueError(
                f"mixed devices in one update: {structure.leaf_name(0)} is on {device}, "
                f"{structure.leaf_name(index)} on {leaf.device}"
            )
    return device


def check_measurable(device: str, stats: bool) -> None:
    """Raises ValueError where statistics are asked for that no kernel gathers."""
    if stats and device != "cpu":
        raise ValueError(f"stats: expected updates on the CPU, got device {device}")


def measured_names(structure: Structure, floats: list[int]) -> list[Any]:
    """The names of the floating leaves in statistics."""
    return ["array" if structure.container is None else structure.names[index] for index in floats]
