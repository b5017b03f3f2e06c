"""FedAvg: the weighted mean of K clients' updates in one pass over memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastagg import _overlap
from fastagg._backend import MAXIMUM, MEAN, LeafOperands, LeafTuple, MeasurementOperands, statistics, weighted_sum
from fastagg._codes import FLOATS, Code, code_of_dtype, float_code, name_of
from fastagg._errors import NONFINITE as NONFINITE
from fastagg._errors import DroppedUpdateWarning, NonFiniteUpdateError, NoUpdateLeftError
from fastagg._integer_codes import IntegerLeaf, refuse_codes
from fastagg._sent import Correction, Sent, SentLeaves, loses, note_rounded
from fastagg._tensor import Kind, View, adopt, kind_of
from fastagg._updates import Structure, as_list, as_weights
from fastagg.quantization import Quantized, device_of, source_operands
from fastagg.statistics import Statistics, by_client

NAN_POLICIES = ("raise", "drop", "propagate")
INTEGER_POLICIES = ("max", "first", "round")


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


def fedavg(
    updates: Iterable[Any],
    weights: Any = None,
    *,
    out: Any = None,
    dtype: Any = None,
    nan_policy: str = "raise",
    integer_policy: str | None = None,
    stats: bool = False,
    sent: Any = None,
) -> Any:
    """The weighted mean of K updates.

    ``mean[i] = sum_k(weights[k] * x_k[i]) / sum_k(weights[k])``

    Accumulated in float64 in client order (16-bit clients of a 16-bit result in runs of eight in float32, int8 and int4
    in exact sums of a few clients), divided and rounded once at the end: at most 1.2e-7 of the weighted mean of |x| off
    for float32 (McMahan et al. 2017, Algorithm 1, line "w_{t+1}"). float64 results are added up in pairs of float64:
    within one unit in the last place of the exact mean, and ``K**2 * 2**-104`` of the weighted mean of |x|; the mean of
    equal models is that model. The same bits on every instruction set, thread count and device.

    Args:
        updates: K updates of one structure: arrays, or sequences of arrays, or mappings from names to arrays (a
            state_dict). Arrays are NumPy, PyTorch, CuPy or anything that speaks DLPack or
            `__cuda_array_interface__`; a leaf may be a `Quantized`, which is decoded on the way. Of a single array of
            two or more dimensions, the rows are the updates.
        weights: K finite numbers of 0 or more, such as numbers of examples; None for equal weights. A client of
            weight 0 never contributes, whatever it holds.
        out: an update of the same structure to write into; may not overlap an input.
        dtype: floating dtype of the result's floating leaves; None keeps the clients'.
        nan_policy: for a client with a NaN or an infinity: "raise", "drop" (leave it out, weight and all, and warn) or
            "propagate".
        integer_policy: for integer and bool leaves: "max", "first" (the first contributing client's) or "round" (the
            weighted mean rounded to nearest even; in float64, so exact while the sum of weights times values stays
            below 2**53). None is "max" for counters, positions and masks; what looks like another quantiser's codes or
            like serialised bytes (`_integer_codes` says how) is a ValueError.
        stats: also return the `Statistics` of all K clients, those of weight 0 and those dropped included, gathered in
            the same pass; for updates on the CPU.
        sent: the model that the clients started from, of the updates' structure and shapes. It takes the clients'
            roundings out of the mean, for a server optimiser to step towards: a quantised leaf counts as
            ``sent + value - (sent as its wire, block and seed round it)``, so that a leaf that no client has changed
            is the sent one. Buffers (see `server.FedAvg.step`) stay the plain mean. And an infinity where the sent
            model holds the same is no fault of a client.

    Returns:
        The mean, in the structure, libraries, dtypes and devices of the first update; or `out`. With `stats`, the pair
        (mean, Statistics), whose cosines and distances are to this mean.

    Raises:
        TypeError: updates that are no arrays, or differ in kind or dtype.
        ValueError: no updates, wrong weights, differing names, shapes or devices, an `out` or a `sent` that does not
            fit, `stats` of updates on a CUDA device, integers that look like codes (all before anything is written),
            or under "raise" a client with a NaN or an infinity (`out` is then undefined).
    """
    given = None if sent is None else Sent(sent)
    average = _averaged(updates, weights, out, dtype, nan_policy, integer_policy, stats, given)
    for client, leaf_name in average.dropped.items():
        warnings.warn(f"client {client} dropped: {leaf_name} {NONFINITE}", DroppedUpdateWarning, stacklevel=2)
    return average.mean if average.statistics is None else (average.mean, average.statistics)


def mean_and_dropped(
    updates: Iterable[Any],
    weights: Any,
    out: Any,
    nan_policy: str,
    integer_policy: str | None,
    sent: Sent | None = None,
) -> tuple[Any, dict[int, str]]:
    """The mean of `fedavg`, and the clients that "drop" left out, each with the name of its first such leaf."""
    average = _averaged(updates, weights, out, None, nan_policy, integer_policy, False, sent)
    return average.mean, average.dropped


def copy_of(update: Any) -> Any:
    """New arrays with an update's values, whatever those are."""
    return fedavg([update], nan_policy="propagate", integer_policy="first")


class _Average(NamedTuple):
    """A mean, the clients that were dropped with the names of their leaves, and statistics if they were wanted."""

    mean: Any
    dropped: dict[int, str]
    statistics: Statistics | None


def _averaged(
    updates: Iterable[Any],
    weights: Any,
    out: Any,
    dtype: Any,
    nan_policy: str,
    integer_policy: str | None,
    stats: bool,
    sent: Sent | None,
) -> _Average:
    check_policies(nan_policy, integer_policy)
    updates = as_list(updates)
    weights = as_weights(weights, len(updates))
    structure = Structure(updates[0])
    target = None if dtype is None else float_code(dtype)
    inputs = [gather(column, structure, index, target) for index, column in enumerate(structure.columns(updates))]
    device = check_devices(inputs, structure)
    check_measurable(device, stats)
    model = None if sent is None else SentLeaves(sent, structure, [(x.kind, x.shape, x.device) for x in inputs])
    results, addresses = results_for(inputs, structure, out, updates[0])
    if model is not None and out is not None:
        model.check_overlap(results, structure)
    mean = _Mean(inputs, addresses, structure, integer_policy, stats, model)
    flagged = mean.run(weights, check=nan_policy != "propagate")
    offenders = mean.offenders(weights, flagged, every=nan_policy == "drop") if flagged else {}
    if offenders and nan_policy == "raise":
        client, index = next(iter(offenders.items()))
        raise NonFiniteUpdateError(f"client {client}, {structure.leaf_name(index)}: {NONFINITE}")
    dropped = {client: structure.leaf_name(index) for client, index in offenders.items()}
    if dropped:
        mean.run(_without(weights, dropped), check=False)
    if out is not None or any(leaf.code is None for leaf in inputs):
        mean.note_roundings(results)
    return _Average(results, dropped, mean.statistics(weights) if stats else None)


class _Mean:
    """One `fedavg` whose operands have been checked."""

    def __init__(
        self,
        inputs: list[LeafInputs],
        outs: list[int],
        structure: Structure,
        integer_policy: str | None,
        stats: bool,
        sent: SentLeaves | None,
    ) -> None:
        self.inputs, self.outs, self.structure = inputs, outs, structure
        self.integer_policy, self.stats, self.sent = integer_policy, stats, sent
        self.device, self.stream = inputs[0].device, inputs[0].kind.stream(inputs[0].device)

    def run(self, weights: list[float], check: bool) -> list[int]:
        """Writes the mean, and measures the clients if asked to; returns the leaves whose sums are not finite."""
        contributing = None if min(weights) > 0 else [client for client, weight in enumerate(weights) if weight > 0]
        leaves = self._operands(weights, contributing)
        corrections = [] if self.sent is None else self._correct(leaves, contributing, self.sent)
        if not self.stats:
            flagged = weighted_sum(leaves, self.device, self.stream, check)
        else:
            measured: list[MeasurementOperands] = [
                (leaf.sources if leaf.is_float else [], leaf.code, 1.0) for leaf in self.inputs
            ]
            flagged, self.moments = statistics(leaves, measured)
        del corrections  # they lay in memory of their own until here
        return flagged if check else []

    def statistics(self, weights: list[float]) -> Statistics:
        """What the last run has found of all clients."""
        floats = [index for index, leaf in enumerate(self.inputs) if leaf.is_float]
        elements = [math.prod(self.inputs[index].shape) for index in floats]
        names, moments = measured_names(self.structure, floats), by_client(self.moments, floats, len(weights))
        return Statistics.from_moments(range(len(weights)), names, elements, weights, moments)

    def _operands(self, weights: list[float], contributing: list[int] | None) -> list[LeafTuple]:
        scaled, total = scale_weights(weights if contributing is None else [weights[client] for client in contributing])
        rest: float | None = None
        leaves: list[LeafTuple] = []
        integers: list[int] = []
        for index, (leaf, out) in enumerate(zip(self.inputs, self.outs, strict=True)):
            sources = leaf.sources if contributing is None else [leaf.sources[client] for client in contributing]
            fold, leaf_rest = MEAN, 0.0
            if leaf.result_code == Code.FLOAT64:
                rest = leaf_rest = math.fsum((*scaled, -total)) if rest is None else rest
            elif leaf.result_code not in FLOATS and self.integer_policy != "round":
                fold = MAXIMUM
                sources = sources[:1] if self.integer_policy == "first" else sources
                integers.append(index)
            count = math.prod(leaf.shape)
            leaves.append((sources, leaf.code, scaled, total, count, fold, out, 0, leaf.result_code, 0, leaf_rest))
        if integers and self.integer_policy is None:
            check_integers(self.structure, self.inputs, integers)
        return leaves

    def _correct(self, leaves: list[LeafTuple], contributing: list[int] | None, sent: SentLeaves) -> list[Correction]:
        """Takes the clients' roundings out of the sums; returns what must live until those are made."""
        corrections = []
        for index, (leaf, operands) in enumerate(zip(self.inputs, leaves, strict=True)):
            if leaf.code is not None or not leaf.is_float:
                continue
            owners = leaf.owners if contributing is None else [leaf.owners[client] for client in contributing]
            sources, code, weights, divisor = operands[:4]
            correction = sent.correction(index, owners, weights)
            if correction is not None:
                corrections.append(correction)
                rescaled, _ = scale_weights([*weights, *correction.weights])
                factor = rescaled[0] / weights[0]  # a power of two
                terms = [*sources, *correction.sources], code, rescaled, divisor * factor
                leaves[index] = (*terms, *operands[4:10], operands[10] * factor)
        return corrections

    def offenders(self, weights: list[float], flagged: list[int], every: bool) -> dict[int, int]:
        """The clients with a non-finite value and their first such leaf: every one, or just the first found."""
        found: dict[int, int] = {}
        for index in flagged:
            leaf = self.inputs[index]
            for client, weight in enumerate(weights):
                if weight == 0 or client in found:
                    continue
                if not self._is_in_order(leaf, client, index):
                    found[client] = index
                    if not every:
                        return found
        return dict(sorted(found.items()))

    def _is_in_order(self, leaf: LeafInputs, client: int, index: int) -> bool:
        """Whether a client's leaf is finite, or infinite as the sent model is."""
        return is_finite(leaf, client, self.stream) or (
            self.sent is not None and self.sent.excuses(index, leaf.owners[client])
        )

    def note_roundings(self, result: Any) -> None:
        """Remembers which leaves of the result hold roundings that nobody has taken out."""
        for leaf, array in zip(self.inputs, self.structure.leaves(result, "the result"), strict=True):
            is_rounded = leaf.code is None and leaf.is_float and any(loses(x, leaf.result_code) for x in leaf.owners)
            note_rounded(array, is_rounded and not (self.sent is not None and self.sent.unrounds))


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


def check_integers(structure: Structure, inputs: list[LeafInputs], integers: Iterable[int]) -> None:
    """Raises ValueError where integer leaves look like another quantiser's codes, which no policy was given for."""
    names = structure.names or (None,)
    leaves = tuple(IntegerLeaf(index, inputs[index].dtype, inputs[index].shape) for index in integers)
    refuse_codes(names, leaves, lambda index: inputs[index].owners[0])


def scale_weights(weights: list[float]) -> tuple[list[float], float]:
    """Weights divided by a power of two that leaves the largest in [1/16, 1/8). And their sum.

    So no sum of float32 values overflows, that of eight clients in float32 included.
    """
    exponent = math.frexp(max(weights))[1]
    if exponent < -1000:  # the power of two must be in range, too
        return scale_weights([weight * 2.0**100 for weight in weights])
    factor = math.ldexp(1.0, -3 - exponent)
    scaled = [weight * factor for weight in weights]
    return scaled, math.fsum(scaled)


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


def check_policies(nan_policy: str, integer_policy: str | None) -> None:
    """Raises ValueError for a policy that does not exist."""
    if nan_policy not in NAN_POLICIES:
        raise ValueError(f"nan_policy: expected one of {', '.join(NAN_POLICIES)}, got {nan_policy!r}")
    if integer_policy is not None and integer_policy not in INTEGER_POLICIES:
        raise ValueError(f"integer_policy: expected one of {', '.join(INTEGER_POLICIES)}, got {integer_policy!r}")


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
    _overlap.check(inputs, views, structure)
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


def _without(weights: list[float], dropped: dict[int, str]) -> list[float]:
    """The weights with those of the dropped set to 0.

    Raises:
        NoUpdateLeftError: nobody is left.
    """
    kept = [0.0 if client in dropped else weight for client, weight in enumerate(weights)]
    if not any(kept):
        raise NoUpdateLeftError(dropped)
    return kept
