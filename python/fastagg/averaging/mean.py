"""FedAvg: the weighted mean of K clients' updates in one pass over memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastagg._errors import NONFINITE, DroppedUpdateWarning, NonFiniteUpdateError, NoUpdateLeftError
from fastagg._native.backend import statistics, weighted_sum
from fastagg._native.codes import FLOATS, Code, float_code
from fastagg._native.operands import MAXIMUM, MEAN, LeafTuple, MeasurementOperands
from fastagg._updates.leaves import (
    LeafInputs,
    check_devices,
    check_integers,
    check_measurable,
    gather,
    is_finite,
    measured_names,
)
from fastagg._updates.outputs import results_for
from fastagg._updates.policies import check_policies
from fastagg._updates.sent import Correction, Sent, SentLeaves, loses, note_rounded
from fastagg._updates.structure import Structure, as_list
from fastagg._updates.weights import as_weights, scale_weights
from fastagg.statistics import Statistics, by_client


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
            like serialised bytes (`_updates.integer_codes` says how) is a ValueError.
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
        has_integers = False
        for leaf, out in zip(self.inputs, self.outs, strict=True):
            sources = leaf.sources if contributing is None else [leaf.sources[client] for client in contributing]
            fold, leaf_rest = MEAN, 0.0
            if leaf.result_code == Code.FLOAT64:
                rest = leaf_rest = math.fsum((*scaled, -total)) if rest is None else rest
            elif leaf.result_code not in FLOATS and self.integer_policy != "round":
                fold = MAXIMUM
                sources = sources[:1] if self.integer_policy == "first" else sources
                has_integers = True
            count = math.prod(leaf.shape)
            leaves.append((sources, leaf.code, scaled, total, count, fold, out, 0, leaf.result_code, 0, leaf_rest))
        if has_integers and self.integer_policy is None:
            check_integers(self.structure, self.inputs, contributing)
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


def _without(weights: list[float], dropped: dict[int, str]) -> list[float]:
    """The weights with those of the dropped set to 0.

    Raises:
        NoUpdateLeftError: nobody is left.
    """
    kept = [0.0 if client in dropped else weight for client, weight in enumerate(weights)]
    if not any(kept):
        raise NoUpdateLeftError(dropped)
    return kept
