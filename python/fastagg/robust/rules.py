"""What every rule does: check the updates, leave out who sent a NaN, write the result."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import numpy as np

from fastagg._errors import NONFINITE, DroppedUpdateWarning, NonFiniteUpdateError, NoUpdateLeftError
from fastagg._updates.policies import check_policies
from fastagg._updates.weights import as_weights
from fastagg.robust.mixing import MixedUpdates
from fastagg.robust.points import Points


class Options(TypedDict, total=False):
    """What every rule takes besides.

    Attributes:
        out: an update of the same structure to write into, as in `fastagg.fedavg`.
        dtype: floating dtype of the result's floating leaves; None keeps the clients'.
        nan_policy: for a client with a NaN or an infinity: "raise" (the default), "drop" (leave it out, and warn; what
            a rule asks of the number of clients holds for those that stay) or "propagate" (to rules by coordinate NaN
            is plus infinity, which sorts last; to rules by distance such a client is infinitely far from all, and never
            selected).
        integer_policy: for integer and bool leaves, which have no part in distances: "round" (the rule's own answer,
            rounded to nearest even, exact below 2**53; an update that is selected alone is copied), or "max" or "first"
            of those that take part. None, the default, is "round", but refuses what looks like another quantiser's
            codes, as `fastagg.fedavg` does.
    """

    out: Any
    dtype: Any
    nan_policy: str
    integer_policy: str | None


class Outcome(NamedTuple):
    """What a rule made of a round.

    Attributes:
        result: the aggregate, like the first update.
        dropped: the clients that "drop" left out, each with the name of its first leaf with a NaN or an infinity.
        selected: the clients that the result is made of.
    """

    result: Any
    dropped: dict[int, str]
    selected: list[int]


class Call(NamedTuple):
    """One call of a rule, checked.

    Attributes:
        points: the updates.
        members: those that take part: of a weight above 0.
        weights: of all points.
        outs: addresses of the result's leaves.
        dropped: filled with those that "drop" leaves out.
    """

    points: Points
    members: list[int]
    weights: np.ndarray
    outs: list[int]
    nan_policy: str
    integer_policy: str
    dropped: dict[int, str]

    def drop(self, found: dict[int, str]) -> list[int]:
        """The members without those found to hold a NaN or an infinity.

        Raises:
            NonFiniteUpdateError: the policy is "raise".
            NoUpdateLeftError: nobody is left.
        """
        if self.nan_policy == "raise":
            client, leaf_name = next(iter(found.items()))
            raise NonFiniteUpdateError(f"client {client}, {leaf_name}: {NONFINITE}")
        self.dropped.update(found)
        kept = [member for member in self.members if member not in found]
        if not kept:
            raise NoUpdateLeftError(self.dropped)
        return kept


class Rule(ABC):
    """A way to make one update of many of which some are hostile."""

    name: ClassVar[str]

    def aggregate(
        self,
        updates: Any,
        weights: Any = None,
        *,
        out: Any = None,
        dtype: Any = None,
        nan_policy: str = "raise",
        integer_policy: str | None = None,
    ) -> Outcome:
        """The aggregate of K updates, and whose it is; see the function of the rule's name."""
        check_policies(nan_policy, integer_policy)
        if isinstance(updates, MixedUpdates):
            points = updates.points(dtype, self.beside())
        else:
            points = Points(updates, dtype, beside=self.beside())
        if not points.count:
            raise ValueError("updates: expected at least one, got none")
        shares = np.asarray(as_weights(weights, points.count))
        shares /= shares.max()  # so that no sum overflows
        members = np.flatnonzero(shares).tolist()
        self.check(len(members))
        if integer_policy is None:
            points.check_integers()
        result, outs = points.new_results(out)
        call = Call(points, members, shares, outs, nan_policy, integer_policy or "round", {})
        return Outcome(result, call.dropped, self.write(call))

    def beside(self) -> Mapping[str, Any]:
        """Updates that are no client's, by the name that errors give them; None stands for zero."""
        return {}

    @abstractmethod
    def check(self, count: int) -> None:
        """Raises ValueError if so many updates are too few."""

    @abstractmethod
    def write(self, call: Call) -> list[int]:
        """Writes the aggregate; returns the clients that it is made of."""

    def require(self, count: int, least: int, condition: str) -> None:
        """Raises ValueError if there are fewer updates than a condition asks for."""
        if count < least:
            raise ValueError(f"{self.name}: expected at least {least} updates ({condition}), got {count}")


class CoordinateRule(Rule):
    """A rule that looks at each coordinate alone: the mean of a window of its sorted values.

    Attributes:
        window: of `fastagg._native.operands`.
        left_out: values cut at each end, or left out as the farthest.
    """

    window: ClassVar[int]
    left_out: int

    def write(self, call: Call) -> list[int]:
        """Writes the aggregate; returns the clients that took part."""
        members = call.members
        if self._write(call, members) and call.nan_policy != "propagate":
            members = call.drop(call.points.nonfinite(members))
            self.check(len(members))
            self._write(call, members)
        return members

    def _write(self, call: Call, members: list[int]) -> list[int]:
        return call.points.sorted_mean(self.window, self.left_out, members, call.outs, call.integer_policy)


class Geometry(NamedTuple):
    """Where the updates of a call lie.

    Attributes:
        distances: squared, float64: of all points, and behind them of what lies beside them.
        members: the points that take part.
        near: those of them that hold no NaN and no infinity, and whose squared distances do not overflow; the others
            are infinitely far from all.
        weights: of all points.
    """

    distances: np.ndarray
    members: list[int]
    near: list[int]
    weights: np.ndarray

    def shares(self) -> np.ndarray:
        """The weights of the near points over their sum; 0 for all else."""
        shares = np.zeros(len(self.distances))
        shares[self.near] = self.weights[self.near] / exact_sum(self.weights[self.near])
        return shares

    def inner_products(self) -> np.ndarray:
        """Of the near points and what lies beside them, seen from the one in their middle; 0 for all else.

        None exceeds the product of two lengths: of a point far away, the digits of its distances tell no more.
        """
        parts = [*self.near, *range(len(self.weights), len(self.distances))]
        distances = self.distances[np.ix_(parts, parts)]
        lengths = distances[np.median(distances, axis=1).argmin()]
        largest = np.sqrt(lengths[:, None]) * np.sqrt(lengths)
        products = np.zeros_like(self.distances)
        products[np.ix_(parts, parts)] = np.clip((lengths[:, None] + lengths - distances) / 2, -largest, largest)
        return products


def distances_from(coefficients: np.ndarray, products: np.ndarray) -> np.ndarray:
    """The distance of every point from a combination whose coefficients sum to one, from their inner products.

    Added up point by point: BLAS does it in an order of each processor's own, which points without a part change too.
    """
    along = (products * coefficients[:, None]).sum(axis=0)
    length = exact_sum(coefficients * along)
    distances: np.ndarray = np.sqrt(np.maximum(length - 2 * along + products.diagonal(), 0.0))
    return distances


def exact_sum(values: np.ndarray) -> float:
    """The sum, rounded once: in whatever order, and with however many zeros."""
    return math.fsum(values.tolist())


class DistanceRule(Rule):
    """A rule that knows of the updates only how far they are from each other, and combines them."""

    def write(self, call: Call) -> list[int]:
        """Writes the aggregate; returns the clients that it is made of."""
        coefficients = self.coefficients(self.measure(call))
        call.points.combine(coefficients, call.outs, call.integer_policy)
        return [int(point) for point in np.flatnonzero(coefficients[: call.points.count])]

    @abstractmethod
    def coefficients(self, geometry: Geometry) -> np.ndarray:
        """The aggregate as a combination of all points and what lies beside them; the coefficients sum to one."""

    def measure(self, call: Call) -> Geometry:
        """Measures the distances of a call's points, without those dropped."""
        call.points.check_floats()
        distances, finite = call.points.squared_distances()
        found = {} if finite else call.points.nonfinite(call.members)
        members = call.members
        near = [member for member in members if member not in found]
        if found and (call.nan_policy != "propagate" or not near):
            members = call.drop(found)
            self.check(len(members))
        distances[~np.isfinite(distances)] = np.inf
        beside = range(call.points.count, len(distances))
        for name, place in zip(self.beside(), beside, strict=True):
            if not np.isfinite(distances[place, near]).any():
                raise ValueError(f"{self.name}: the squared distances of {name} from all updates overflow float64")
        others = [*near, *beside]
        near = [member for member in near if np.median(distances[member, others]) < np.inf]
        if not near:
            raise ValueError(f"{self.name}: squared distances of most updates overflow float64")
        return Geometry(distances, members, near, call.weights)


def run(rule: Rule, updates: Any, weights: Any, options: Options) -> Any:
    """A rule's aggregate alone; each client that is dropped is a warning of the caller's caller."""
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    if unknown:
        raise TypeError(
            f"{rule.name} takes no {', '.join(unknown)}; its options are {', '.join(Options.__annotations__)}"
        )
    outcome = rule.aggregate(updates, weights, **options)
    for client, leaf_name in outcome.dropped.items():
        message = f"client {client} dropped: {leaf_name} {NONFINITE}"
        warnings.warn(message, DroppedUpdateWarning, stacklevel=3)
    return outcome.result
