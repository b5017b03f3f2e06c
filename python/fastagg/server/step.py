"""A server optimiser's step: its operands are checked, then all leaves go to the native code in one call."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from fastagg._arrays.library import Kind, View
from fastagg._arrays.registry import adopt
from fastagg._errors import NonFiniteUpdateError
from fastagg._native.backend import server_step, weighted_sum
from fastagg._native.codes import FLOATS, Code, name_of
from fastagg._native.operands import ADD, INTERPOLATE, MAXIMUM, MEAN, LeafOperands, ModelLeafOperands, OptimizerOperands
from fastagg._updates import overlap
from fastagg._updates.buffers import is_buffer
from fastagg._updates.leaves import LeafInputs, nonfinite_leaves
from fastagg._updates.sent import is_nonfinite, same_infinities, with_zeros
from fastagg._updates.structure import Structure


class ModelLeaf(NamedTuple):
    """One leaf of a model, or of what has the same structure."""

    kind: Kind
    dtype: Any
    view: View

    @property
    def moment_dtype(self) -> Any:
        """The dtype of its moments: the arithmetic's."""
        return self.kind.dtype_for(Code.FLOAT64 if self.view.code == Code.FLOAT64 else Code.FLOAT32)


class Operands(NamedTuple):
    """A model, the clients' mean and where the result goes, checked against each other."""

    structure: Structure
    model: list[ModelLeaf]
    mean: list[ModelLeaf]
    outs: list[View]
    result: Any

    @property
    def device(self) -> str:
        """Where everything lies."""
        return self.model[0].view.device

    @property
    def stream(self) -> int:
        """The caller's current stream there."""
        return self.model[0].kind.stream(self.device)

    @property
    def names(self) -> tuple[Any, ...]:
        """The leaves' keys, or places in a sequence; None for a single array."""
        return self.structure.names or (None,)

    def split(self, buffers: Collection[Any]) -> tuple[list[int], list[int]]:
        """The leaves that are buffers, and the others.

        Raises:
            ValueError: `buffers` names a leaf that the model does not have.
        """
        names = self.names
        for name in buffers:
            if name not in names:
                raise ValueError(f"buffers: the model has no leaf {name!r}")
        parts: tuple[list[int], list[int]] = ([], [])
        for index, leaf in enumerate(self.model):
            parts[not is_buffer(names[index], leaf.dtype, buffers)].append(index)
        return parts

    def check_finite(self) -> None:
        """Raises NonFiniteUpdateError for the first leaf with a NaN, or an infinity that the model does not have."""
        for index in nonfinite_leaves([_as_inputs(leaf) for leaf in self.mean], 0, self.stream):
            if not same_infinities(self.mean[index].view.owner, self.model[index].view.owner):
                raise NonFiniteUpdateError(f"mean, {self.structure.leaf_name(index)}: holds a NaN or an infinity")

    def copy(self, source: list[ModelLeaf], indices: list[int]) -> None:
        """Lets the result have the source's values in these leaves."""
        leaves: list[LeafOperands] = []
        for index in indices:
            view, out = source[index].view, self.outs[index].address
            fold = MEAN if view.code in FLOATS else MAXIMUM
            operands = LeafOperands(
                [view.address], view.code, [1.0], 1.0, view.elements, fold, out, result_code=view.code
            )
            leaves.append(operands)
        if leaves:
            weighted_sum(leaves, self.device, self.stream, False)

    def step(self, optimizer: OptimizerOperands, indices: list[int], moments: list[list[int]]) -> None:
        """Steps these leaves, whose moments lie at these addresses; all the way to the mean, they become the mean.

        So do elements of which the model is infinite, such as a causal mask's: no step leads away from infinity.
        """
        if optimizer[:2] == (INTERPOLATE, 1.0):
            self.copy(self.mean, indices)
            return
        infinite = {} if optimizer[0] == ADD else self._infinite(indices)
        leaves: list[ModelLeafOperands] = []
        for index, addresses in zip(indices, moments, strict=True):
            first, second = (*addresses, 0, 0)[:2]
            x, mean, out = self.model[index].view, self.mean[index].view, self.outs[index]
            if index in infinite:
                x, mean = infinite[index].x, infinite[index].mean
            leaves.append((x.address, mean.address, first, second, out.address, x.code, x.elements))
        if leaves:
            server_step(optimizer, leaves, self.device, self.stream)
        for index, part in infinite.items():
            out = self.outs[index].owner
            (out.detach() if hasattr(out, "detach") else out)[part.where] = part.values

    def _infinite(self, indices: list[int]) -> dict[int, _Infinite]:
        """Of these leaves, those whose model is infinite somewhere."""
        flagged = nonfinite_leaves([_as_inputs(self.model[index]) for index in indices], 0, self.stream)
        return {
            indices[place]: _infinite_part(self.model[indices[place]], self.mean[indices[place]]) for place in flagged
        }


class _Infinite(NamedTuple):
    """A leaf whose model is infinite in some places: model and mean with zeros there, and the mean's values."""

    x: View
    mean: View
    where: Any
    values: Any


def _infinite_part(model: ModelLeaf, mean: ModelLeaf) -> _Infinite:
    x, y = model.view.owner, mean.view.owner
    where = is_nonfinite(x)
    return _Infinite(model.kind.view(with_zeros(x, where)), model.kind.view(with_zeros(y, where)), where, y[where])


def add(
    model: Any,
    change: Any,
    factor: float,
    buffers: Collection[Any] = (),
    *,
    keep_buffers: bool = True,
    what: str = "change",
) -> Any:
    """``model + factor * change``, each operation rounded once; buffers stay as they are, or are those of the change.

    Raises:
        TypeError, ValueError: as for `operands_of`.
    """
    operands = operands_of(model, change, None, what)
    return _move(operands, ADD, factor, buffers, operands.model if keep_buffers else operands.mean)


def interpolate(model: Any, mean: Any, rate: float, *, out: Any = None, buffers: Collection[Any] = ()) -> Any:
    """``model + rate * (mean - model)``, each operation rounded once; buffers take the mean as it is.

    Raises:
        TypeError, ValueError: as for `operands_of`.
    """
    operands = operands_of(model, mean, out)
    return _move(operands, INTERPOLATE, rate, buffers, operands.mean)


def _move(operands: Operands, rule: int, rate: float, buffers: Collection[Any], source: list[ModelLeaf]) -> Any:
    """Steps by a rule without moments; buffers are copied from the source."""
    copied, moved = operands.split(buffers)
    operands.copy(source, copied)
    operands.step((rule, rate, 0.0, 0.0, 0.0), moved, [[] for _ in moved])
    return operands.result


def operands_of(model: Any, mean: Any, out: Any, what: str = "mean") -> Operands:
    """The operands of a step; new arrays for the result unless `out` has some.

    Raises:
        TypeError, ValueError: names, shapes, dtypes, libraries or devices differ, or `out` does not fit; the message
            names the leaf.
    """
    structure = Structure(model, "model")
    leaves = _leaves_of(model, structure, "model")
    for index, leaf in enumerate(leaves):
        _check_alike(leaf, leaves[0], f"model, {structure.leaf_name(index)}", device_only=True)
    means = _leaves_of(mean, structure, what)
    for index, (theirs, mine) in enumerate(zip(means, leaves, strict=True)):
        _check_alike(theirs, mine, f"{what}, {structure.leaf_name(index)}")
    if out is None:
        arrays = [leaf.kind.empty(leaf.view.shape, leaf.dtype, leaf.view.device) for leaf in leaves]
        outs = [leaf.kind.writable_view(array) for leaf, array in zip(leaves, arrays, strict=True)]
        return Operands(structure, leaves, means, outs, structure.build(arrays, model))
    return Operands(structure, leaves, means, _check_out(out, structure, leaves, means, what), out)


def _leaves_of(update: Any, structure: Structure, who: str) -> list[ModelLeaf]:
    leaves = []
    for index, array in enumerate(structure.leaves(update, who, "the model's")):
        try:
            kind, adopted = adopt(array)
            leaves.append(ModelLeaf(kind, kind.dtype_of(adopted), kind.view(adopted)))
        except TypeError as error:
            raise TypeError(f"{who}, {structure.leaf_name(index)}: {error}") from None
    return leaves


def _check_alike(leaf: ModelLeaf, expected: ModelLeaf, where: str, device_only: bool = False) -> None:
    """Raises TypeError or ValueError unless a leaf is like the model's."""
    if not device_only:
        if leaf.kind is not expected.kind:
            raise TypeError(f"{where}: expected a {expected.kind.name} array like the model's, got {leaf.kind.name}")
        if leaf.dtype != expected.dtype and name_of(leaf.dtype) != name_of(expected.dtype):
            raise TypeError(
                f"{where}: expected dtype {name_of(expected.dtype)} like the model's, got {name_of(leaf.dtype)}"
            )
        if leaf.view.shape != expected.view.shape:
            raise ValueError(f"{where}: expected shape {expected.view.shape} like the model's, got {leaf.view.shape}")
    if leaf.view.device != expected.view.device:
        raise ValueError(f"{where}: expected device {expected.view.device} like the model's, got {leaf.view.device}")


def _check_out(out: Any, structure: Structure, model: list[ModelLeaf], mean: list[ModelLeaf], what: str) -> list[View]:
    """The arrays of `out`; each may be the model's own in its place, and otherwise overlaps nothing."""
    arrays = structure.leaves(out, "out")
    views = []
    for index, (leaf, expected) in enumerate(zip(_leaves_of(out, structure, "out"), model, strict=True)):
        where = f"out, {structure.leaf_name(index)}"
        _check_alike(leaf, expected, where)
        try:
            views.append(leaf.kind.writable_view(adopt(arrays[index])[1]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    elsewhere = [leaf for leaf, view in zip(model, views, strict=True) if leaf.view.address != view.address]
    for leaves, whose in ((mean, what), (elsewhere, "model")):
        try:
            overlap.check([_as_inputs(leaf) for leaf in leaves], views, structure)
        except ValueError as error:
            raise ValueError(str(error).replace("client 0's", f"the {whose}'s")) from None
    return views


def _as_inputs(leaf: ModelLeaf) -> LeafInputs:
    view = leaf.view
    return LeafInputs(
        [view.address], view.code, leaf.kind, leaf.dtype, view.code, view.shape, view.device, [view.owner]
    )
