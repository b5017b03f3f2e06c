"""Clients' updates as points: their distances, combinations of them, and what lies in the middle of each coordinate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastagg._errors import NONFINITE
from fastagg._native.backend import sorted_mean, squared_distances, weighted_sum
from fastagg._native.codes import FLOATS, Code, float_code
from fastagg._native.operands import (
    MAXIMUM,
    MEAN,
    MIDDLE,
    NEAR_MEDIAN,
    NEAR_TRIMMED,
    TRIMMED,
    LeafOperands,
    WindowOperands,
)
from fastagg._updates.leaves import LeafInputs, check_devices, check_integers, gather, nonfinite_leaves
from fastagg._updates.outputs import results_for
from fastagg._updates.structure import Structure, as_list
from fastagg.averaging.sums import Total

__all__ = ["MIDDLE", "NEAR_MEDIAN", "NEAR_TRIMMED", "TRIMMED", "Points"]


class Points:
    """Updates that have been checked, each a point or, through `mixing`, what points are combined from.

    Attributes:
        structure: of every update.
        mixing: (count, clients) float64: each point as a combination of the updates that sums to one; None where the
            points are the updates themselves.
        count: of the points; those beside them, such as a server's own update, follow.
    """

    def __init__(
        self,
        updates: Iterable[Any],
        dtype: Any = None,
        mixing: np.ndarray | None = None,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks the updates, and what lies beside them by its name: an update, or None for zero.

        Raises:
            TypeError, ValueError: as `fastagg.fedavg`.
        """
        self._updates = as_list(updates)
        self.mixing = mixing
        self._clients = len(self._updates)
        self.count = self._clients if mixing is None else len(mixing)
        self._beside = dict(beside or {})
        self.structure = Structure(self._updates[0])
        target = None if dtype is None else float_code(dtype)
        given = [update for update in self._beside.values() if update is not None]
        rows = [self.structure.leaves(update, name) for name, update in self._beside.items() if update is not None]
        columns = self.structure.columns(self._updates)
        self._names = [*range(self._clients), *(name for name, update in self._beside.items() if update is not None)]
        self.inputs: list[LeafInputs] = []
        for index, column in enumerate(columns):
            self.inputs.append(self._gather([*column, *(row[index] for row in rows)], index, target))
        self._places = self._places_of(len(given))
        self._device = check_devices(self.inputs, self.structure)
        self._stream = self.inputs[0].kind.stream(self._device)

    def _gather(self, column: list[Any], index: int, target: Code | None) -> LeafInputs:
        try:
            return gather(column, self.structure, index, target)
        except (TypeError, ValueError) as error:
            raise type(error)(self._named(error)) from None

    def _named(self, error: Exception) -> str:
        """An error's message, in which what lies beside the points has its name and no client's number."""
        message = str(error)
        for place, name in enumerate(self._names[self._clients :], self._clients):
            message = message.replace(f"client {place}'s", f"{name}'s").replace(f"client {place},", f"{name},")
        return message

    def _places_of(self, given: int) -> list[int | None]:
        """For each point, mixed or not, and each beside them, its place among a leaf's sources; None for zero."""
        places: list[int | None] = list(range(self._clients))
        beside = iter(range(self._clients, self._clients + given))
        return places + [None if update is None else next(beside) for update in self._beside.values()]

    def new_results(self, out: Any) -> tuple[Any, list[int]]:
        """New arrays for a result, or those of `out`, and their addresses."""
        try:
            return results_for(self.inputs, self.structure, out, self._updates[0])
        except ValueError as error:
            raise ValueError(self._named(error)) from None

    def check_integers(self) -> None:
        """Raises ValueError where integer leaves look like another quantiser's codes."""
        check_integers(self.structure, self.inputs)

    def check_floats(self) -> None:
        """Raises ValueError where no leaf has distances."""
        if not any(leaf.is_float for leaf in self.inputs):
            raise ValueError("updates: expected at least one floating leaf to measure distances by, got integers alone")

    def squared_distances(self) -> tuple[np.ndarray, bool]:
        """The squared distances of all points and those beside them; and whether all values are finite.

        Over the floating leaves, in float64, from the differences themselves. Points with a NaN have NaN distances.
        """
        leaves: list[LeafOperands] = []
        for leaf in self.inputs:
            if leaf.is_float:
                zero: Any = 0 if leaf.code is not None else (0, 0, int(Code.FLOAT32), 0)
                sources = [zero if place is None else leaf.sources[place] for place in self._places]
                ones = [1.0] * len(sources)
                leaves.append(LeafOperands(sources, leaf.code, ones, 1.0, math.prod(leaf.shape)))
        count = len(self._places)
        distances = np.zeros((count, count))
        finite = squared_distances(leaves, count, distances, self._device, self._stream)
        return self.mixed(distances), finite

    def mixed(self, distances: np.ndarray) -> np.ndarray:
        """The points' squared distances from those of the updates."""
        if self.mixing is None:
            return distances
        beside = len(self._beside)
        rows = np.zeros((self.count + beside, self._clients + beside))
        rows[: self.count, : self._clients] = self.mixing
        rows[self.count :, self._clients :] = np.eye(beside)
        far = ~np.isfinite(distances)
        near, between = np.where(far, 0.0, distances), np.zeros((len(rows), len(rows)))
        # |Xa - Xb|^2 = (a - b)' P (a - b), for a and b that sum to one; P are inner products seen from the point in the
        # middle, for those seen from a hostile one would drown the others.
        middle = near[np.median(distances, axis=1).argmin()]
        products = rows @ ((middle[:, None] + middle - near) / 2)
        for place, row in enumerate(rows):
            gaps = row - rows[place + 1 :]
            squares = np.maximum(np.einsum("ij,ij->i", products[place] - products[place + 1 :], gaps), 0.0)
            if far.any():
                is_far = np.einsum("ij,ij->i", np.abs(gaps) @ far, np.abs(gaps)) > 0
                squares = np.where(is_far, np.inf, squares)
            between[place, place + 1 :] = between[place + 1 :, place] = squares
        return between

    def nonfinite(self, points: Iterable[int]) -> dict[int, str]:
        """Those of the clients, by number, that hold a NaN or an infinity, each with the name of its first such leaf.

        Raises:
            ValueError: what lies beside the points does.
        """
        found = {}
        for place in [*points, *range(self._clients, len(self._names))]:
            leaves = nonfinite_leaves(self.inputs, place, self._stream)
            if leaves and place >= self._clients:
                raise ValueError(f"{self._names[place]}, {self.structure.leaf_name(leaves[0])}: {NONFINITE}")
            if leaves:
                found[place] = self.structure.leaf_name(leaves[0])
        return found

    def all_finite(self) -> bool:
        """Whether no update holds a NaN or an infinity."""
        leaves = [
            LeafOperands(leaf.sources, leaf.code, [1.0] * len(leaf.sources), 1.0, math.prod(leaf.shape))
            for leaf in self.inputs
            if leaf.is_float
        ]
        return not weighted_sum(leaves, self._device, self._stream, True)

    def combine(self, coefficients: np.ndarray, outs: list[int], integer_policy: str) -> None:
        """Writes sum_i coefficients[i] * point_i, those beside the points included; they sum to one."""
        points, beside = coefficients[: self.count], coefficients[self.count :]
        clients = points if self.mixing is None else points @ self.mixing
        shares = {}
        for place, share in zip(self._places, [*clients.tolist(), *beside.tolist()], strict=True):
            if place is not None and share != 0:
                shares[place] = share
        shares = shares or {len(self._names) - 1: 0.0}  # nothing but zero
        total = Total(0.0, 0.0).plus([*clients.tolist(), *beside.tolist()])  # 1 but for rounding
        leaves: list[LeafOperands] = []
        for leaf, out in zip(self.inputs, outs, strict=True):
            fold, places = MEAN, list(shares)
            is_copy = list(shares.values()) == [1.0]  # whose integers may be beyond float64's
            if not leaf.is_float and (is_copy or integer_policy != "round"):
                fold, places = MAXIMUM, [place for place in shares if place < self._clients] or places
                places = places[:1] if integer_policy == "first" else places
            sources = [leaf.sources[place] for place in places]
            weights = [shares[place] for place in places]
            count = math.prod(leaf.shape)
            code = leaf.result_code
            leaves.append(
                LeafOperands(
                    *(sources, leaf.code, weights, total.high, count, fold, out), result_code=code, rest=total.rest
                )
            )
        weighted_sum(leaves, self._device, self._stream, False)

    def sorted_mean(
        self, window: int, left_out: int, points: list[int], outs: list[int], integer_policy: str
    ) -> list[int]:
        """Writes for each coordinate the mean of a window of these points' sorted values.

        Returns:
            the leaves in which a client holds a NaN or an infinity.
        """
        rows = len(points)
        divisor = {MIDDLE: 2 - rows % 2, TRIMMED: rows - 2 * left_out}.get(window, rows - left_out)
        clients = points if self.mixing is None else list(range(self._clients))
        mixing = None if self.mixing is None else self.mixing[points].ravel().tolist()
        rule: WindowOperands = (window, left_out, rows, mixing)
        sorted_leaves: list[LeafOperands] = []
        others: list[LeafOperands] = []
        floats = []
        for index, (leaf, out) in enumerate(zip(self.inputs, outs, strict=True)):
            sources, count = [leaf.sources[client] for client in clients], math.prod(leaf.shape)
            ones, code = [1.0] * len(sources), leaf.result_code
            operands = LeafOperands(sources, leaf.code, ones, float(divisor), count, out=out, result_code=code)
            if leaf.result_code in FLOATS or integer_policy == "round":
                sorted_leaves.append(operands)
                floats.append(index)
            else:
                sources = sources[:1] if integer_policy == "first" else sources
                others.append(operands._replace(sources=sources, fold=MAXIMUM))
        if others:
            weighted_sum(others, self._device, self._stream, False)
        return [floats[index] for index in sorted_mean(rule, sorted_leaves, self._device, self._stream)]
