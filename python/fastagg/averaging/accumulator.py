"""A running weighted mean: clients are added as they arrive, and memory does not grow with their number."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from typing import Any, NamedTuple

from fastagg._arguments import as_flag, as_integer
from fastagg._arrays.library import Kind
from fastagg._arrays.registry import kind_named
from fastagg._errors import DroppedUpdateWarning, NonFiniteUpdateError
from fastagg._native.backend import statistics, weighted_sum
from fastagg._native.codes import FLOATS, Code, name_of
from fastagg._native.operands import MAXIMUM, MEAN, LeafOperands, LeafTuple
from fastagg._updates.leaves import (
    LeafInputs,
    check_devices,
    check_integers,
    check_measurable,
    gather,
    is_finite,
    located,
    nonfinite_leaves,
)
from fastagg._updates.outputs import check_out
from fastagg._updates.policies import check_policies
from fastagg._updates.sent import Correction, Sent, SentLeaves, loses, note_rounded
from fastagg._updates.structure import Structure
from fastagg._updates.weights import as_weights, scale_weights
from fastagg.averaging.accumulator_state import AccumulatorState
from fastagg.averaging.client_statistics import Measured, floating, found_of, measurements, renumbered, table_of
from fastagg.averaging.sums import ALIGNMENT, PLANES, LeafSums, Total, lay_out
from fastagg.quantization.quantized import Quantized
from fastagg.statistics import Statistics

# Beyond these, sums of float32 values could leave the range of float64; counts of examples are far inside.
_LARGEST_WEIGHT, _SMALLEST_WEIGHT = 2.0**300, 2.0**-300
_REASON = "holds a NaN, an infinity, or values beyond the range of the sums"


class DroppedUpdate(NamedTuple):
    """An update that `nan_policy="drop"` left out."""

    client: int
    leaf: Any
    reason: str


class _Options(NamedTuple):
    """How an accumulator was made; it stays so, for its sums are laid out by it."""

    nan_policy: str
    integer_policy: str | None
    batch: int
    low_memory: bool
    stats: bool


class Accumulator:
    """The weighted mean of updates that arrive one after another.

    ``result[i] = sum_k(weight_k * x_k[i]) / sum_k(weight_k)``

    The sums are kept as the upper 48 bits of float64 (csrc/core/state48.h), twice: the sums as they are, and the sums
    with the update at hand, which become valid only when all of the update has proved good. That is 12 bytes an fp32,
    fp16 or bf16 element, whatever the number of clients, and 32 an fp64 one, whose sums are pairs of float64. At most
    1.2e-7 of the weighted mean of |x| off for ten thousand fp32 clients in any order and any tree of merges; fp64 means
    are as exact as `fedavg`'s where sums of weights times values stay between 1e-290 and 1.8e308. Methods may be
    called from several threads.

    Attributes:
        count: updates that contributed.
        total_weight: the sum of their weights.
        dropped: the updates that `nan_policy="drop"` left out, as (client, leaf, reason); clients are numbered from 0
            in the order of `add`.
    """

    def __init__(
        self,
        *,
        nan_policy: str = "raise",
        integer_policy: str | None = None,
        batch: int = 1,
        low_memory: bool = False,
        stats: bool = False,
        sent: Any = None,
    ) -> None:
        """An empty accumulator.

        Args:
            nan_policy: "raise", "drop" or "propagate", as in `fedavg`.
            integer_policy: "max", "first", "round" or None, as in `fedavg`.
            batch: updates to hold by reference and fold in one pass. 1 keeps nothing of an update once `add` has
                returned; more is faster, for callers who leave their arrays alone until they are folded.
            low_memory: keep the sums once, and look updates through before they are added to any: 6 bytes an element in
                place of 12, for a little more time. Updates with fp64 leaves keep them twice all the same: their sums
                can overflow.
            stats: keep `statistics`, gathered as updates are folded: 72 bytes a client and floating leaf. For updates
                on the CPU, and without `sent`.
            sent: the model that the clients started from, as in `fedavg`; only referred to, so it must not change while
                updates are added. It is in no checkpoint.

        Raises:
            TypeError, ValueError: an option is of another type, or none of its values.
        """
        check_policies(nan_policy, integer_policy)
        if as_integer(batch, "batch") < 1:
            raise ValueError(f"batch: expected an integer of 1 or more, got {batch!r}")
        in_place, measures = as_flag(low_memory, "low_memory"), as_flag(stats, "stats")
        self._options = _Options(nan_policy, integer_policy, as_integer(batch, "batch"), in_place, measures)
        self._lock = threading.RLock()
        self._sums: Any = None
        self._spare: Any = None
        self._device = "cpu"
        self._unused: list[tuple[str, Any]] = []
        self.reset(sent=sent)

    def reset(self, *, sent: Any = None) -> None:
        """Forgets everything that was added; the memory of the sums stays for updates of the same size.

        Args:
            sent: the model that the clients of the updates to come start from.
        """
        if self.stats and sent is not None:
            raise ValueError("sent: an Accumulator(stats=True) cannot take it")
        with self._lock:
            self._sent = sent if sent is None or isinstance(sent, Sent) else Sent(sent)
            blocks = [(self._device, block) for block in (self._sums, self._spare) if block is not None]
            self._unused = blocks or self._unused
            self._structure: Structure | None = None
            self._leaves: list[LeafSums] = []
            self._sent_leaves: SentLeaves | None = None
            self._rounded: set[int] = set()  # leaves that hold roundings nobody has taken out
            self._device = "cpu"
            self._sums = self._spare = None
            self._pending: list[tuple[int, list[LeafInputs], float]] = []
            self._added = 0
            self._count = 0
            self._total = Total(0.0, 0.0)
            self._folds = 0
            self.dropped: list[DroppedUpdate] = []
            self._measured: list[Measured] = []

    @property
    def nan_policy(self) -> str:
        """As it was made."""
        return self._options.nan_policy

    @property
    def integer_policy(self) -> str | None:
        """As it was made."""
        return self._options.integer_policy

    @property
    def batch(self) -> int:
        """As it was made."""
        return self._options.batch

    @property
    def low_memory(self) -> bool:
        """As it was made."""
        return self._options.low_memory

    @property
    def stats(self) -> bool:
        """As it was made."""
        return self._options.stats

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
            return self._total.high

    @property
    def statistics(self) -> Statistics:
        """The `Statistics` of all updates that contributed, under their clients' numbers.

        Cosines and distances are to the mean of what had been folded by then, the client's own batch included: the
        first of `batch` = 1 has distance 0. Updates still held by `batch` are folded first.

        Raises:
            ValueError: the accumulator was made without `stats`, or nothing was added.
        """
        with self._lock:
            self._fold()
            if not self.stats:
                raise ValueError("statistics: expected an Accumulator(stats=True)")
            self._check_not_empty()
            assert self._structure is not None
            return table_of(self._measured, self._structure, self._leaves)

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
        """Adds all that another accumulator holds, as if its clients had been added here: leaves are matched by name.

        Raises:
            TypeError: other is no Accumulator.
            ValueError: its structure, shapes, dtypes or integer policy differ, or it has no statistics where this one
                has.
        """
        if not isinstance(other, Accumulator):
            raise TypeError(f"other: expected an Accumulator, got {type(other).__name__}")
        if other is self:
            other = copy.copy(self)
        first, second = sorted((self, other), key=id)  # one order for all: two merges must not wait for each other
        with first._lock, second._lock:
            self._fold()
            other._fold()
            places = self._places_in(other)
            if other._count:
                if self._structure is None:
                    self._adopt(other)
                blocks = [(self._leaves, self._sums)] if self._count else []
                self._combine([*blocks, ([other._leaves[place] for place in places], other._sums)])
                self._rounded |= {index for index, place in enumerate(places) if place in other._rounded}
                self._count += other._count
                self._total = self._total.plus(other._total)
            self.dropped.extend(dropped._replace(client=self._added + dropped.client) for dropped in other.dropped)
            if self.stats:
                floats = floating(other._leaves)
                rows = [floats.index(place) for place in places if place in floats]
                self._measured.extend(renumbered(other._measured, self._added, rows))
            self._added += other._added

    def result(self, *, out: Any = None) -> Any:
        """The weighted mean of all that was added, as new arrays like the first update's, or written into `out`.

        Raises:
            ValueError: nothing was added, or nothing but weights of 0; or `out` does not fit.
        """
        with self._lock:
            if out is not None:
                self._fold()  # it may lie where an update that waits does
            self._check_not_empty()
            structure = self._structure
            assert structure is not None
            inputs = [self._as_inputs(leaf) for leaf in self._leaves]
            if out is None:
                arrays = [leaf.kind.empty(leaf.shape, leaf.dtype, leaf.device) for leaf in inputs]
                views = [leaf.kind.writable_view(array) for leaf, array in zip(inputs, arrays, strict=True)]
            else:
                views = check_out(inputs, structure, out)
            addresses = [view.address for view in views]
            self._locate_pending()
            if self._write_mean(addresses):
                self._fold()  # drops or raises
                self._check_not_empty()
                self._write_mean(addresses)
            result = structure.build(arrays) if out is None else out
            for index, array in enumerate(structure.leaves(result, "out")):
                note_rounded(array, index in self._rounded)
            return result

    def _check_not_empty(self) -> None:
        if not (self._count or self._pending):
            raise ValueError("nothing was added, so there is no mean")

    def _write_mean(self, addresses: list[int]) -> list[int]:
        """Writes the mean of all that was added and of all that waits; returns the leaves that are not finite there."""
        weights = self._weights()
        scaled, _ = scale_weights(weights)
        total = self._total_of_all().times(scaled[0] / weights[0])  # a power of two
        corrections = self._corrections()
        leaves: list[LeafOperands] = []
        for index, (leaf, address) in enumerate(zip(self._leaves, addresses, strict=True)):
            sources, fold = self._sources(index)
            leaf_weights, divisor = scaled, total
            if index in corrections:
                sources = [*sources, *corrections[index].sources]
                leaf_weights, _ = scale_weights([*weights, *corrections[index].weights])
                divisor = self._total_of_all().times(leaf_weights[0] / weights[0])
            leaves.append(
                LeafOperands(
                    *(sources, None, leaf_weights, divisor.high, leaf.elements, fold, address),
                    result_code=leaf.code,
                    rest=divisor.rest,
                )
            )
        check = bool(self._pending) and self.nan_policy != "propagate"
        return weighted_sum(leaves, self._device, self._stream(), check)

    def _total_of_all(self) -> Total:
        """The weight of all that was added and of all that waits."""
        return self._total.plus(weight for _, _, weight in self._pending)

    def _weights(self) -> list[float]:
        """Those of the sums, where there are any, and of the updates that wait."""
        return [1.0] * bool(self._count) + [weight for _, _, weight in self._pending]

    def _sources(self, index: int) -> tuple[list[Any], int]:
        """A leaf's sums, where there are any, and what the updates that wait hold for it; and how they are folded."""
        leaf = self._leaves[index]
        sources: list[Any] = [leaf.operands(self._kind().address(self._sums))] if self._count else []
        for _, inputs, _ in self._pending:
            given = inputs[index]
            sources.append(given.sources[0] if given.code is None else (given.sources[0], 0, given.code, 0))
        return self._folded(leaf, sources)

    def _corrections(self) -> dict[int, Correction]:
        """By leaf, what takes the roundings of the updates that wait out of their sum; to be kept until it is made."""
        if self._sent_leaves is None or not self._sent_leaves.unrounds:
            return {}
        weights = [weight for _, _, weight in self._pending]
        columns = [[inputs[index].owners[0] for _, inputs, _ in self._pending] for index in range(len(self._leaves))]
        found = {index: self._sent_leaves.correction(index, column, weights) for index, column in enumerate(columns)}
        return {index: correction for index, correction in found.items() if correction is not None}

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything held, as plain values and one NumPy array of bytes, for `load_state_dict`."""
        with self._lock:
            self._fold()
            return AccumulatorState(
                structure=self._structure,
                leaves=self._leaves,
                device=self._device,
                sums=None if self._sums is None else self._kind().to_numpy(self._sums),
                folds=self._folds,
                added=self._added,
                count=self._count,
                total_weight=self._total,
                dropped=[tuple(dropped) for dropped in self.dropped],
                nan_policy=self.nan_policy,
                integer_policy=self.integer_policy,
                batch=self.batch,
                low_memory=self.low_memory,
                measured=self._measured if self.stats else None,
            ).describe()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Becomes what `state_dict` saved, policies included.

        Raises:
            ValueError: the state is of another version of fastagg, incomplete or damaged. Nothing has changed then.
        """
        loaded = AccumulatorState.described(state)
        kind, sums = _kind_of_sums(loaded.device, loaded.leaves), None
        if loaded.sums is not None:
            try:
                sums = _new_block(kind, loaded.device, len(loaded.sums))
                sums[:] = kind.from_numpy(loaded.sums, loaded.device)
            except (AssertionError, RuntimeError) as error:  # torch's and CuPy's
                raise ValueError(f"state: its sums cannot be put on {loaded.device}: {error}") from error
        with self._lock:
            self.reset(sent=self._sent)
            self._structure, self._leaves, self._device = loaded.structure, loaded.leaves, loaded.device
            self._sums = sums
            self._folds, self._added = loaded.folds, loaded.added
            self._count, self._total = loaded.count, loaded.total_weight
            self.dropped = [DroppedUpdate(*dropped) for dropped in loaded.dropped]
            measures, self._measured = loaded.measured is not None, loaded.measured or []
            self._options = _Options(
                loaded.nan_policy, loaded.integer_policy, loaded.batch, loaded.low_memory, measures
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        Accumulator.__init__(self)
        self.load_state_dict(state)

    def __repr__(self) -> str:
        return f"Accumulator(count={self._count}, total_weight={self._total.high}, pending={len(self._pending)})"

    def _check(self, update: Any, client: int, contributes: bool) -> list[LeafInputs]:
        """The update's leaves, checked against the first update's; nothing has changed if this raises."""
        structure = self._structure or Structure(update, client)
        columns = structure.leaves(update, client)
        inputs = [gather([array], structure, index, None, client) for index, array in enumerate(columns)]
        device = check_devices(inputs, structure)
        check_measurable(device, self.stats)
        if self.integer_policy is None and contributes:
            check_integers(structure, inputs, numbered_from=client)
        if self._structure is None:
            leaves = lay_out(inputs, self.integer_policy)
            model = self._model(structure, leaves, device)
            if contributes:
                self._leaves, self._structure, self._device, self._sent_leaves = leaves, structure, device, model
                self._note_roundings(columns)
            return inputs
        for index, (leaf, known) in enumerate(zip(inputs, self._leaves, strict=True)):
            if leaf.shape != known.shape:
                expected = f"expected shape {known.shape} like the first client's, got {leaf.shape}"
                raise ValueError(f"client {client}, {structure.leaf_name(index)}: {expected}")
            as_codes = isinstance(columns[index], Quantized) and known.code in FLOATS
            if name_of(leaf.dtype) != name_of(known.dtype) and not as_codes:
                expected = f"expected dtype {name_of(known.dtype)} like the first client's, got {name_of(leaf.dtype)}"
                raise TypeError(f"client {client}, {structure.leaf_name(index)}: {expected}")
        if device != self._device:
            raise ValueError(f"client {client}: expected device {self._device} like the first client's, got {device}")
        if self._sent_leaves is None and self._sent is not None:  # the sums came from elsewhere
            self._sent_leaves = self._model(structure, self._leaves, device)
        if contributes:
            self._note_roundings(columns)
        return inputs

    def _model(self, structure: Structure, leaves: list[LeafSums], device: str) -> SentLeaves | None:
        """The model that was sent, checked against the updates' leaves."""
        if self._sent is None:
            return None
        return SentLeaves(self._sent, structure, [(kind_named(leaf.kind), leaf.shape, device) for leaf in leaves])

    def _note_roundings(self, columns: list[Any]) -> None:
        """Remembers the leaves of an update whose roundings nobody takes out of the sums."""
        if Quantized in map(type, columns) and not (self._sent_leaves is not None and self._sent_leaves.unrounds):
            self._rounded |= {index for index, leaf in enumerate(columns) if loses(leaf, self._leaves[index].code)}

    def _fold(self) -> None:
        """Adds the updates that wait. A non-finite one is dropped or raised; then the others still wait."""
        self._locate_pending()
        while self._pending:
            offenders = self._nonfinite_pending() if self._spoils_sums else {}
            if not offenders:
                flagged, found = self._combine_pending()
                offenders = self._offenders(flagged) if flagged else {}
            if not offenders:
                self._swap()
                self._measured.extend(found)
                self._count += len(self._pending)
                self._total = self._total_of_all()
                self._pending.clear()
                return
            self._pending = [entry for entry in self._pending if entry[0] not in offenders]
            structure = self._structure
            if self._count == 0 and not self._pending:  # a refused first update says nothing of those to come
                self._structure, self._leaves, self._spare, self._sent_leaves = None, [], None, None
            self._report(offenders, structure)

    def _locate_pending(self) -> None:
        """Looks where the updates lie that have waited.

        Raises:
            TypeError, ValueError: one is no longer what was added; it waits no longer.
        """
        if self.batch == 1 or not self._pending:
            return
        try:
            columns = [located([inputs[index] for _, inputs, _ in self._pending]) for index in range(len(self._leaves))]
        except (TypeError, ValueError):
            self._refuse_changed()
            raise
        waiting = zip(self._pending, zip(*columns, strict=True), strict=True)
        self._pending = [(client, list(inputs), weight) for (client, _, weight), inputs in waiting]

    def _refuse_changed(self) -> None:
        """Raises for the first update that is no longer what was added, and lets go of it."""
        assert self._structure is not None
        for place, (client, inputs, _) in enumerate(self._pending):
            for index, leaf in enumerate(inputs):
                try:
                    located([leaf])
                except (TypeError, ValueError) as error:
                    del self._pending[place]
                    raise type(error)(f"client {client}, {self._structure.leaf_name(index)}: {error}") from None

    @property
    def _in_place(self) -> bool:
        """Whether sums are added to where they lie."""
        return self.low_memory and all(leaf.code != Code.FLOAT64 for leaf in self._leaves)

    @property
    def _spoils_sums(self) -> bool:
        """Whether the next updates are added to sums where those lie; the first ones join none that could be lost."""
        return self._in_place and self._count > 0

    def _nonfinite_pending(self) -> dict[int, int]:
        """The waiting clients with a non-finite value, and their first such leaf."""
        if self.nan_policy == "propagate":
            return {}
        found: dict[int, int] = {}
        for client, inputs, _ in self._pending:
            for index in nonfinite_leaves(inputs, 0, self._stream()):
                if client not in found and not self._is_excused(index, inputs[index]):
                    found[client] = index
        return found

    def _is_excused(self, index: int, leaf: LeafInputs) -> bool:
        """Whether a leaf that is not finite is infinite only where the sent model is."""
        return self._sent_leaves is not None and self._sent_leaves.excuses(index, leaf.owners[0])

    def _combine_pending(self) -> tuple[list[int], list[Measured]]:
        """Writes sums + pending updates to the next block of sums.

        Returns:
            The leaves that are not finite there, and what was found of the updates, if anybody asked for it.
        """
        weights, base, corrections = self._weights(), self._next_address(), self._corrections()
        leaves = [
            self._leaf_operands(leaf, *self._sources(index), weights, base) for index, leaf in enumerate(self._leaves)
        ]
        for index, correction in corrections.items():
            sources, fold = self._sources(index)
            sources, extended = [*sources, *correction.sources], [*weights, *correction.weights]
            leaves[index] = self._leaf_operands(self._leaves[index], sources, fold, extended, base)
        check = self.nan_policy != "propagate" and not self._spoils_sums
        if not self.stats:
            return weighted_sum(leaves, self._device, self._stream(), check), []
        measured = measurements(self._leaves, leaves, bool(self._count), self._total_of_all().high)
        flagged, moments = statistics(leaves, measured)
        found = found_of([(client, weight) for client, _, weight in self._pending], moments, self._leaves)
        return flagged if check else [], found

    def _combine(self, blocks: list[tuple[list[LeafSums], Any]]) -> None:
        """Sets the sums to the total of several blocks of sums, each with its leaves in the order of this one's."""
        following, weights = self._next_address(), [1.0] * len(blocks)
        bases = [(leaves, self._kind().address(sums)) for leaves, sums in blocks]
        operands = []
        for index, leaf in enumerate(self._leaves):
            sources = [leaves[index].operands(base) for leaves, base in bases]
            operands.append(self._leaf_operands(leaf, *self._folded(leaf, sources), weights, following))
        weighted_sum(operands, self._device, self._stream(), False)
        self._swap()

    def _swap(self) -> None:
        """Makes the next block of sums the valid one."""
        if self._spare is not None:
            self._sums, self._spare = self._spare, None if self._in_place else self._sums
        self._folds += 1

    def _folded(self, leaf: LeafSums, sources: list[Any]) -> tuple[list[Any], int]:
        """The sources that count for a leaf, and how they are folded."""
        if leaf.state in PLANES or leaf.state == Code.FLOAT64:
            return sources, MEAN
        return sources[:1] if self.integer_policy == "first" else sources, MAXIMUM

    def _leaf_operands(
        self, leaf: LeafSums, sources: list[Any], fold: int, weights: list[float], base: int
    ) -> LeafTuple:
        out, companion, dither = base + leaf.offset, leaf.companion(base), bit_reversed(self._folds)
        return sources, None, weights, 1.0, leaf.elements, fold, out, companion, leaf.state, dither, 0.0

    def _offenders(self, flagged: list[int]) -> dict[int, int]:
        """The waiting clients with a non-finite value, and their first such leaf."""
        found: dict[int, int] = {}
        for index in flagged:
            for client, inputs, _ in self._pending:
                in_order = client in found or is_finite(inputs[index], 0, self._stream())
                if not in_order and not self._is_excused(index, inputs[index]):
                    found[client] = index
        # Finite values can leave the sums' range together: then all that were added are at fault.
        model = self._sent_leaves
        beyond = [index for index in flagged if model is None or not model.is_infinite(index)]
        return dict(sorted(found.items())) or {client: beyond[0] for client, _, _ in self._pending if beyond}

    def _report(self, offenders: dict[int, int], structure: Structure | None) -> None:
        """Raises for, or warns of, updates that were left out."""
        assert structure is not None
        messages = {
            client: f"client {client}, {structure.leaf_name(index)}: {_REASON}" for client, index in offenders.items()
        }
        if self.nan_policy == "raise":
            raise NonFiniteUpdateError("; ".join(messages.values()))
        for client, index in offenders.items():
            names = structure.names
            self.dropped.append(DroppedUpdate(client, names[index] if names else None, _REASON))
            warnings.warn(f"dropped: {messages[client]}", DroppedUpdateWarning, stacklevel=4)

    def _places_in(self, other: Accumulator) -> list[int]:
        """Where another accumulator has this one's leaves, or all of its own where this one has none yet.

        Raises:
            ValueError: it cannot be merged into this one.
        """
        if (other.integer_policy or "max") != (self.integer_policy or "max"):
            raise ValueError(f"other: expected integer_policy {self.integer_policy!r}, got {other.integer_policy!r}")
        if self.stats and other._count and not other.stats:
            raise ValueError("other: expected an Accumulator(stats=True), as this one is")
        if self._structure is None or other._structure is None:
            return list(range(len(other._leaves)))
        places = self._structure.places_in(other._structure)
        if places is None:
            raise ValueError("other: its leaves have other names")
        for index, (mine, place) in enumerate(zip(self._leaves, places, strict=True)):
            theirs = other._leaves[place]
            if (mine.shape, mine.code, mine.state) != (theirs.shape, theirs.code, theirs.state):
                raise ValueError(
                    f"other, {self._structure.leaf_name(index)}: expected {name_of(mine.dtype)} {mine.shape}, "
                    f"got {name_of(theirs.dtype)} {theirs.shape}"
                )
        if self._device != other._device:
            raise ValueError(f"other: expected device {self._device}, got {other._device}")
        return places

    def _adopt(self, other: Accumulator) -> None:
        """Takes over the structure of an accumulator that is merged into an empty one."""
        self._structure, self._leaves, self._device = other._structure, other._leaves, other._device

    def _as_inputs(self, leaf: LeafSums) -> LeafInputs:
        """A leaf as `check_out` looks at it: the sums are ours alone, so `out` cannot overlap them."""
        return LeafInputs([], None, kind_named(leaf.kind), leaf.dtype, leaf.code, leaf.shape, self._device, [])

    def _next_address(self) -> int:
        """Where the next sums are written."""
        if self._in_place and self._sums is not None:
            return self._kind().address(self._sums)
        if self._spare is None:
            self._spare = self._allocate(self._leaves[-1].end)
        return self._kind().address(self._spare)

    def _allocate(self, size: int) -> Any:
        """A block of bytes on the updates' device, at a cache line."""
        while self._unused:
            device, block = self._unused.pop()
            if device == self._device and len(block) == size:
                return block
        return _new_block(self._kind(), self._device, size)

    def _kind(self) -> Kind:
        """The library that holds the sums."""
        return _kind_of_sums(self._device, self._leaves)

    def _stream(self) -> int:
        return kind_named(self._leaves[0].kind).stream(self._device)


def _kind_of_sums(device: str, leaves: list[LeafSums]) -> Kind:
    """The library that holds the sums of these leaves: NumPy on the CPU."""
    return kind_named("numpy" if device == "cpu" or not leaves else leaves[0].kind)


def _new_block(kind: Kind, device: str, size: int) -> Any:
    """Bytes at a cache line."""
    block = kind.empty((size + ALIGNMENT,), kind.dtype_for(Code.UINT8), device)
    unaligned = -kind.address(block) % ALIGNMENT
    return block[unaligned : unaligned + size]


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


def bit_reversed(index: int) -> int:
    """The index-th number of van der Corput's sequence in units of 2**-16: evenly spread, whatever its length."""
    return int(f"{index % 65536:016b}"[::-1], 2)
