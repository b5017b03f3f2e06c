"""A running weighted mean: clients are added as they arrive, and memory does not grow with their number."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from typing import Any, NamedTuple

import numpy as np

from fastagg._backend import MAXIMUM, MEAN, LeafOperands, backend_for
from fastagg._codes import ELEMENT_BYTES, FLOATS, Code, name_of
from fastagg._errors import DroppedUpdateWarning
from fastagg._tensor import Kind, kind_named
from fastagg._updates import Structure, as_weights
from fastagg.averaging import LeafInputs, check_devices, check_out, check_policies, gather, is_finite
from fastagg.quantization import Quantized

_ALIGNMENT = 64
_STATE_KEYS = {
    *("version", "structure", "leaves", "device", "sums", "folds", "added", "count", "total_weight", "dropped"),
    *("nan_policy", "integer_policy", "batch"),
}
# Beyond these, sums of float32 values could leave the range of float64; counts of examples are far inside.
_LARGEST_WEIGHT, _SMALLEST_WEIGHT = 2.0**300, 2.0**-300
_REASON = "holds a NaN, an infinity, or values beyond the range of the sums"


class DroppedUpdate(NamedTuple):
    """An update that `nan_policy="drop"` left out."""

    client: int
    leaf: Any
    reason: str


class _Leaf(NamedTuple):
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

    @classmethod
    def described(cls, plain: list[Any]) -> _Leaf:
        """The leaf that `describe` described."""
        kind, dtype, code, shape, state, offset = plain
        return cls(kind, kind_named(kind).dtype_named(dtype), Code(code), tuple(shape), Code(state), offset)

    def operands(self, base: int) -> tuple[int, int, int, int]:
        """The sums in the block of memory at `base`, as a source."""
        return base + self.offset, self.companion(base), self.state, 0

    def companion(self, base: int) -> int:
        """The lower halves of 48-bit sums."""
        return base + self.offset + _aligned(4 * self.elements) if self.state == Code.STATE48 else 0


class Accumulator:
    """The weighted mean of updates that arrive one after another.

    ``result[i] = sum_k(weight_k * x_k[i]) / sum_k(weight_k)``

    The sums are kept as the upper 48 bits of float64 (csrc/core/state48.h), twice: the sums as they are, and the sums
    with the update at hand, which become valid only when all of the update has proved good. That is 12 bytes an fp32,
    fp16 or bf16 element and 16 an fp64 one (plain float64 sums), whatever the number of clients. At most 1.2e-7 of the
    weighted mean of |x| off for ten thousand fp32 clients in any order and any tree of merges. Methods may be called
    from several threads.

    Attributes:
        count: updates that contributed.
        total_weight: the sum of their weights.
        dropped: the updates that `nan_policy="drop"` left out, as (client, leaf, reason); clients are numbered from 0
            in the order of `add`.
    """

    def __init__(self, *, nan_policy: str = "raise", integer_policy: str = "max", batch: int = 1) -> None:
        """An empty accumulator.

        Args:
            nan_policy: "raise", "drop" or "propagate", as in `fedavg`.
            integer_policy: "max", "first" or "round", as in `fedavg`.
            batch: updates to hold by reference and fold in one pass. 1 keeps nothing of an update once `add` has
                returned; more is faster, for callers who leave their arrays alone until they are folded.
        """
        check_policies(nan_policy, integer_policy)
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: expected an integer of 1 or more, got {batch!r}")
        self.nan_policy, self.integer_policy, self.batch = nan_policy, integer_policy, batch
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forgets everything that was added."""
        with self._lock:
            self._structure: Structure | None = None
            self._leaves: list[_Leaf] = []
            self._device = "cpu"
            self._sums: Any = None
            self._spare: Any = None
            self._pending: list[tuple[int, list[LeafInputs], float]] = []
            self._added = 0
            self._count = 0
            self._total = 0.0
            self._folds = 0
            self.dropped: list[DroppedUpdate] = []

    @property
    def count(self) -> int:
        """Updates that contributed; those still held by `batch` are folded first."""
        with self._lock:
            self._fold()
            return self._count

    @property
    def total_weight(self) -> float:
        """The sum of their weights."""
        with self._lock:
            self._fold()
            return self._total

    def add(self, update: Any, weight: float = 1.0) -> None:
        """Adds one client's update.

        Args:
            update: an array, a sequence or a mapping of arrays or `Quantized`, of the structure, shapes and dtypes of
                the first one that contributed.
            weight: a number from 2**-300 to 2**300, or 0, which contributes nothing.

        Raises:
            TypeError, ValueError: the update or the weight is wrong, or under "raise" holds a NaN or an infinity. The
                accumulator still holds what it held. With `batch` > 1 a NaN is found when the batch is folded: the
                error may then name another client than this one, which is left out while this one still waits.
        """
        with self._lock:
            client = self._added
            self._added += 1  # a refused update has had its number
            weight = _as_weight(weight, client)
            inputs = self._check(update, client, contributes=weight > 0)
            if weight == 0:
                return
            self._pending.append((client, inputs, weight))
            if len(self._pending) >= self.batch:
                self._fold()

    def merge(self, other: Accumulator) -> None:
        """Adds all that another accumulator holds, as if its clients had been added here.

        Raises:
            TypeError: other is no Accumulator.
            ValueError: its structure, shapes, dtypes or integer policy differ.
        """
        if not isinstance(other, Accumulator):
            raise TypeError(f"other: expected an Accumulator, got {type(other).__name__}")
        if other is self:
            other = copy.copy(self)
        first, second = sorted((self, other), key=id)  # one order for all: two merges must not wait for each other
        with first._lock, second._lock:
            self._fold()
            other._fold()
            self._check_mergeable(other)
            if other._count:
                if self._structure is None:
                    self._adopt(other)
                sources = [self._sums, other._sums] if self._count else [other._sums]
                self._combine([self._kind().address(sums) for sums in sources])
                self._count += other._count
                self._total = math.fsum((self._total, other._total))
            self.dropped.extend(dropped._replace(client=self._added + dropped.client) for dropped in other.dropped)
            self._added += other._added

    def result(self, *, out: Any = None) -> Any:
        """The weighted mean of all that was added, as new arrays like the first update's, or written into `out`.

        Raises:
            ValueError: nothing was added, or nothing but weights of 0; or `out` does not fit.
        """
        with self._lock:
            self._fold()
            if self._structure is None or self._count == 0:
                raise ValueError("nothing was added, so there is no mean")
            base = self._kind().address(self._sums)
            inputs = [self._as_inputs(leaf, base) for leaf in self._leaves]
            if out is None:
                arrays = [leaf.kind.empty(leaf.shape, leaf.dtype, leaf.device) for leaf in inputs]
                views = [leaf.kind.writable_view(array) for leaf, array in zip(inputs, arrays, strict=True)]
            else:
                views = check_out(inputs, self._structure, out)
            leaves: list[LeafOperands] = []
            for leaf, source, view in zip(self._leaves, inputs, views, strict=True):
                fold = MEAN if leaf.state in (Code.STATE48, Code.FLOAT64) else MAXIMUM
                leaves.append(
                    (source.sources, None, [1.0], self._total, leaf.elements, fold, view.address, 0, leaf.code, 0)
                )
            backend_for(self._device).weighted_sum(leaves, self._stream(), False)
            return self._structure.build(arrays) if out is None else out

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything held, as plain values and one NumPy array of bytes, for `load_state_dict`."""
        with self._lock:
            self._fold()
            sums = None
            if self._sums is not None:
                sums = self._kind().to_numpy(self._sums)
            return {
                "version": 1,
                "structure": None if self._structure is None else self._structure.describe(),
                "leaves": [leaf.describe() for leaf in self._leaves],
                "device": self._device,
                "sums": sums,
                "folds": self._folds,
                "added": self._added,
                "count": self._count,
                "total_weight": self._total,
                "dropped": [tuple(dropped) for dropped in self.dropped],
                "nan_policy": self.nan_policy,
                "integer_policy": self.integer_policy,
                "batch": self.batch,
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Becomes what `state_dict` saved, policies included.

        Raises:
            ValueError: the state is of another version of fastagg, or incomplete.
        """
        if not isinstance(state, dict) or state.get("version") != 1 or not state.keys() >= _STATE_KEYS:
            raise ValueError("state: expected what Accumulator.state_dict() returned, version 1")
        try:
            structure = None if state["structure"] is None else Structure.described(state["structure"])
            leaves = [_Leaf.described(leaf) for leaf in state["leaves"]]
            check_policies(state["nan_policy"], state["integer_policy"])
            saved = None if state["sums"] is None else np.asarray(state["sums"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"state: damaged: {error}") from error
        _check_sums(saved, leaves, state["count"])
        with self._lock:
            self.reset()
            self._structure, self._leaves, self._device = structure, leaves, state["device"]
            if saved is not None:
                self._sums = self._allocate(len(saved))
                self._sums[:] = self._kind().from_numpy(saved, self._device)
            self._folds, self._added = state["folds"], state["added"]
            self._count, self._total = state["count"], state["total_weight"]
            self.dropped = [DroppedUpdate(*dropped) for dropped in state["dropped"]]
            self.nan_policy, self.integer_policy = state["nan_policy"], state["integer_policy"]
            self.batch = state["batch"]

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lock = threading.RLock()
        self.load_state_dict(state)

    def __repr__(self) -> str:
        return f"Accumulator(count={self._count}, total_weight={self._total}, pending={len(self._pending)})"

    def _check(self, update: Any, client: int, contributes: bool) -> list[LeafInputs]:
        """The update's leaves, checked against the first update's; nothing has changed if this raises."""
        structure = self._structure or Structure(update, client)
        columns = structure.leaves(update, client)
        inputs = []
        for index, array in enumerate(columns):
            try:
                inputs.append(gather([array], structure, index, None))
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("client 0", f"client {client}", 1)) from None
        device = check_devices(inputs, structure)
        if self._structure is None:
            if contributes:
                self._leaves, self._structure, self._device = _lay_out(inputs, self.integer_policy), structure, device
            return inputs
        for index, (leaf, known) in enumerate(zip(inputs, self._leaves, strict=True)):
            who = f"client {client}, {structure.leaf_name(index)}"
            if leaf.shape != known.shape:
                raise ValueError(f"{who}: expected shape {known.shape} like the first client's, got {leaf.shape}")
            as_codes = isinstance(columns[index], Quantized) and known.code in FLOATS
            if name_of(leaf.dtype) != name_of(known.dtype) and not as_codes:
                raise TypeError(
                    f"{who}: expected dtype {name_of(known.dtype)} like the first client's, got {name_of(leaf.dtype)}"
                )
        if device != self._device:
            raise ValueError(f"client {client}: expected device {self._device} like the first client's, got {device}")
        return inputs

    def _fold(self) -> None:
        """Adds the updates that wait. A non-finite one is dropped or raised; then the others still wait."""
        while self._pending:
            flagged = self._combine_pending()
            offenders = self._offenders(flagged) if flagged else {}
            if not offenders:
                self._swap()
                self._count += len(self._pending)
                self._total = math.fsum((self._total, *(weight for _, _, weight in self._pending)))
                self._pending.clear()
                return
            self._pending = [entry for entry in self._pending if entry[0] not in offenders]
            structure = self._structure
            if self._count == 0 and not self._pending:  # a refused first update says nothing of those to come
                self._structure, self._spare = None, None
            self._report(offenders, structure)

    def _combine_pending(self) -> list[int]:
        """Writes sums + pending updates to the spare block; returns the leaves that are not finite there."""
        sums = [self._kind().address(self._sums)] if self._count else []
        weights = [1.0] * len(sums) + [weight for _, _, weight in self._pending]
        base, dither = self._spare_address(), bit_reversed(self._folds)
        leaves: list[LeafOperands] = []
        for index, leaf in enumerate(self._leaves):
            sources: list[Any] = [leaf.operands(address) for address in sums]
            for _, inputs, _ in self._pending:
                given = inputs[index]
                sources.append(given.sources[0] if given.code is None else (given.sources[0], 0, given.code, 0))
            leaves.append(self._leaf_operands(leaf, sources, weights, base, dither))
        return backend_for(self._device).weighted_sum(leaves, self._stream(), self.nan_policy != "propagate")

    def _combine(self, bases: list[int]) -> None:
        """Sets the sums to the total of several blocks of sums."""
        spare, dither = self._spare_address(), bit_reversed(self._folds)
        weights = [1.0] * len(bases)
        leaves = [
            self._leaf_operands(leaf, [leaf.operands(base) for base in bases], weights, spare, dither)
            for leaf in self._leaves
        ]
        backend_for(self._device).weighted_sum(leaves, self._stream(), False)
        self._swap()

    def _swap(self) -> None:
        """Makes what was written to the spare block valid."""
        self._sums, self._spare = self._spare, self._sums
        self._folds += 1

    def _leaf_operands(
        self, leaf: _Leaf, sources: list[Any], weights: list[float], base: int, dither: int
    ) -> LeafOperands:
        fold = MEAN
        if leaf.state not in (Code.STATE48, Code.FLOAT64):
            fold = MAXIMUM
            sources = sources[:1] if self.integer_policy == "first" else sources
        out, companion = base + leaf.offset, leaf.companion(base)
        return sources, None, weights, 1.0, leaf.elements, fold, out, companion, leaf.state, dither

    def _offenders(self, flagged: list[int]) -> dict[int, int]:
        """The waiting clients with a non-finite value, and their first such leaf."""
        found: dict[int, int] = {}
        for index in flagged:
            for client, inputs, _ in self._pending:
                if client not in found and not is_finite(inputs[index], 0, self._stream()):
                    found[client] = index
        # Finite values can leave the sums' range together: then all that were added are at fault.
        return dict(sorted(found.items())) or {client: flagged[0] for client, _, _ in self._pending}

    def _report(self, offenders: dict[int, int], structure: Structure | None) -> None:
        """Raises for, or warns of, updates that were left out."""
        assert structure is not None
        messages = {
            client: f"client {client}, {structure.leaf_name(index)}: {_REASON}" for client, index in offenders.items()
        }
        if self.nan_policy == "raise":
            raise ValueError("; ".join(messages.values()))
        for client, index in offenders.items():
            names = structure.names
            self.dropped.append(DroppedUpdate(client, names[index] if names else None, _REASON))
            warnings.warn(f"dropped: {messages[client]}", DroppedUpdateWarning, stacklevel=4)

    def _check_mergeable(self, other: Accumulator) -> None:
        if other.integer_policy != self.integer_policy:
            raise ValueError(f"other: expected integer_policy {self.integer_policy!r}, got {other.integer_policy!r}")
        if self._structure is None or other._structure is None:
            return
        if not self._structure.has_names_of(other._structure):
            raise ValueError("other: its leaves have other names or another order")
        for index, (mine, theirs) in enumerate(zip(self._leaves, other._leaves, strict=True)):
            if (mine.shape, mine.code, mine.state) != (theirs.shape, theirs.code, theirs.state):
                raise ValueError(
                    f"other, {self._structure.leaf_name(index)}: expected {name_of(mine.dtype)} {mine.shape}, "
                    f"got {name_of(theirs.dtype)} {theirs.shape}"
                )
        if self._device != other._device:
            raise ValueError(f"other: expected device {self._device}, got {other._device}")

    def _adopt(self, other: Accumulator) -> None:
        """Takes over the structure of an accumulator that is merged into an empty one."""
        self._structure, self._leaves, self._device = other._structure, other._leaves, other._device

    def _as_inputs(self, leaf: _Leaf, base: int) -> LeafInputs:
        """A leaf's sums in the block of memory at `base`."""
        kind, source = kind_named(leaf.kind), leaf.operands(base)
        return LeafInputs([source], None, kind, leaf.dtype, leaf.code, leaf.shape, self._device, [self._sums])

    def _spare_address(self) -> int:
        if self._spare is None:
            last = self._leaves[-1]
            self._spare = self._allocate(last.offset + _state_bytes(last.state, last.elements))
        return self._kind().address(self._spare)

    def _allocate(self, size: int) -> Any:
        """A block of bytes on the updates' device, at a cache line."""
        kind = self._kind()
        block = kind.empty((size + _ALIGNMENT,), kind.dtype_for(Code.UINT8), self._device)
        unaligned = -self._kind().address(block) % _ALIGNMENT
        return block[unaligned : unaligned + size]

    def _kind(self) -> Kind:
        """The library that holds the sums: NumPy on the CPU."""
        return kind_named("numpy" if self._device == "cpu" else self._leaves[0].kind)

    def _stream(self) -> int:
        return kind_named(self._leaves[0].kind).stream(self._device)


def _lay_out(inputs: list[LeafInputs], integer_policy: str) -> list[_Leaf]:
    """The leaves' places in one block of memory, each at a cache line."""
    leaves, offset = [], 0
    for leaf in inputs:
        state = _state_code(leaf, integer_policy)
        code = leaf.result_code
        leaves.append(_Leaf(leaf.kind.name, leaf.dtype, code, leaf.shape, state, offset))
        offset += _aligned(_state_bytes(state, leaves[-1].elements))
    return leaves


def _check_sums(sums: np.ndarray | None, leaves: list[_Leaf], count: int) -> None:
    """Raises ValueError unless a saved block of sums holds just these leaves."""
    if sums is None:
        if count:
            raise ValueError(f"state: damaged: {count} updates were added, but it has no sums")
        return
    offset = end = 0
    for leaf in leaves:
        if leaf.offset != offset:
            raise ValueError(f"state: damaged: a leaf of {leaf.shape} begins at {leaf.offset}, expected {offset}")
        end = offset + _state_bytes(leaf.state, leaf.elements)
        offset = _aligned(end)
    if sums.dtype != np.uint8 or sums.shape != (end,):
        raise ValueError(f"state: damaged: expected {end} bytes of sums, got {sums.dtype} {sums.shape}")


def _as_weight(weight: Any, client: int) -> float:
    """A weight as a float in range.

    Raises:
        TypeError, ValueError: it is no such number; the message names the client.
    """
    try:
        number = as_weights([weight, 1.0], 2)[0]
    except TypeError:
        raise TypeError(f"the weight of client {client}: expected a number, got {weight!r}") from None
    except ValueError:
        number = math.nan
    if not (number == 0 or _SMALLEST_WEIGHT <= number <= _LARGEST_WEIGHT):
        raise ValueError(f"the weight of client {client}: expected 0, or 2**-300 to 2**300, got {weight!r}")
    return number


def _state_code(leaf: LeafInputs, integer_policy: str) -> Code:
    if leaf.is_float:
        return Code.FLOAT64 if leaf.result_code == Code.FLOAT64 else Code.STATE48
    return Code.FLOAT64 if integer_policy == "round" else leaf.result_code


def _state_bytes(state: Code, count: int) -> int:
    if state == Code.STATE48:  # two planes, each at a cache line
        return _aligned(4 * count) + 2 * count
    return ELEMENT_BYTES[state] * count


def _aligned(size: int) -> int:
    """The next multiple of a cache line."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def bit_reversed(index: int) -> int:
    """The index-th number of van der Corput's sequence in units of 2**-16: evenly spread, whatever its length."""
    return int(f"{index % 65536:016b}"[::-1], 2)
