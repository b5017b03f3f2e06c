"""Rules that select the updates whose neighbours are nearest: Krum and what is built on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastagg._native.operands import NEAR_MEDIAN
from fastagg.robust.arguments import as_count
from fastagg.robust.mixing import MixedUpdates
from fastagg.robust.points import Points
from fastagg.robust.rules import Call, DistanceRule, Geometry, Options, run

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONVENTIONS = ("paper", "byzfl", "byzantine_momentum")


def scores_of(squared: np.ndarray, f: int, convention: str) -> np.ndarray:
    """Krum's score of every point, from their squared distances: the sum of its nearest neighbours' distances."""
    count = len(squared)
    neighbors = count - f - (2 if convention == "paper" else 1)
    distances = np.sqrt(squared) if convention == "byzantine_momentum" else squared
    others = np.sort(distances[~np.eye(count, dtype=bool)].reshape(count, count - 1), axis=1)
    scores: np.ndarray = others[:, : max(1, neighbors)].sum(axis=1)
    return scores


class Krum(DistanceRule):
    """See `krum`."""

    name = "krum"

    def __init__(self, f: int, convention: str = "paper", keys: Sequence[Any] | None = None) -> None:
        """Withstands f hostile clients; keys break ties."""
        if convention not in CONVENTIONS:
            raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}")
        self.f, self.convention = as_count(f, "f"), convention
        try:
            self.keys = None if keys is None else list(keys)
            sorted(self.keys or ())
        except (TypeError, ValueError) as error:
            raise TypeError(f"keys: expected keys that can be sorted, one for each update, but {error}") from None

    def check(self, count: int) -> None:
        """Raises ValueError unless most of a point's nearest neighbours are honest."""
        self.require(count, 2 * self.f + 3, f"2f + 3 for f = {self.f}")

    def coefficients(self, geometry: Geometry) -> np.ndarray:
        """All of the best."""
        return _mean_of(self.best(geometry, 1), geometry)

    def best(self, geometry: Geometry, count: int) -> list[int]:
        """The members of the lowest scores, the best first.

        Raises:
            ValueError: so many do not have enough neighbours that are finite.
        """
        members = geometry.members
        scores = scores_of(geometry.distances[np.ix_(members, members)], self.f, self.convention)
        if np.count_nonzero(np.isfinite(scores)) < count:
            raise ValueError(f"{self.name}: too few updates are finite to select {count}")
        keys = self._keys(geometry)
        order = sorted(range(len(members)), key=lambda place: (scores[place], keys[members[place]]))
        return [members[place] for place in order[:count]]

    def _keys(self, geometry: Geometry) -> Sequence[Any]:
        if self.keys is None:
            return range(len(geometry.weights))
        if len(self.keys) != len(geometry.weights):
            raise ValueError(f"keys: expected {len(geometry.weights)}, one for each update, got {len(self.keys)}")
        return self.keys


class MultiKrum(Krum):
    """See `multi_krum`."""

    name = "multi_krum"

    def __init__(
        self, f: int, m: int | None = None, convention: str = "paper", keys: Sequence[Any] | None = None
    ) -> None:
        """Selects m updates; None for all but f."""
        super().__init__(f, convention, keys)
        self.m = None if m is None else as_count(m, "m", 1)

    def check(self, count: int) -> None:
        """Raises ValueError unless there are enough neighbours, and m updates to select."""
        super().check(count)
        self.require(count, self.m or 1, f"m = {self.m}")

    def coefficients(self, geometry: Geometry) -> np.ndarray:
        """The weighted mean of the best."""
        return _mean_of(self.best(geometry, self.m or len(geometry.members) - self.f), geometry)


class Bulyan(Krum):
    """See `bulyan`."""

    name = "bulyan"

    def __init__(
        self, f: int, convention: str = "paper", keys: Sequence[Any] | None = None, rescore: bool = True
    ) -> None:
        """Selects updates one by one, with new scores each time; or all by the first scores."""
        super().__init__(f, convention, keys)
        self.rescore = rescore

    def check(self, count: int) -> None:
        """Raises ValueError unless most of the values around each median are honest."""
        self.require(count, 4 * self.f + 3, f"4f + 3 for f = {self.f}")

    def write(self, call: Call) -> list[int]:
        """Writes the aggregate; returns the clients that were selected."""
        selected = sorted(self.select(self.measure(call)))
        call.points.sorted_mean(NEAR_MEDIAN, 2 * self.f, selected, call.outs, call.integer_policy)
        return selected

    def select(self, geometry: Geometry) -> list[int]:
        """The n - 2f updates that Krum picks."""
        wanted = len(geometry.members) - 2 * self.f
        if self.f == 0 or not self.rescore:
            return self.best(geometry, wanted)
        left = list(geometry.members)
        picked: list[int] = []
        while len(picked) < wanted:
            picked += self.best(geometry._replace(members=left), 1)
            left.remove(picked[-1])
        return picked


def _mean_of(selected: list[int], geometry: Geometry) -> np.ndarray:
    """The weighted mean of a selection."""
    return geometry._replace(near=selected).shares()


def krum(
    updates: Any,
    f: int,
    *,
    convention: str = "paper",
    keys: Sequence[Any] | None = None,
    **options: Unpack[Options],
) -> Any:
    """The update whose n - f - 2 nearest neighbours are nearest (Blanchard et al. 2017).

    ``argmin_i sum of the n - f - 2 smallest |x_i - x_j|^2``, j other than i

    Distances are over all floating leaves, in float64, from the differences themselves. An update with a NaN is never
    selected.

    Args:
        updates: K updates of one structure, as in `fastagg.fedavg`; or `MixedUpdates`.
        f: how many of the clients may be hostile; n >= 2f + 3.
        convention: "paper"; "byzfl" sums n - f - 1 squared distances, "byzantine_momentum" n - f - 1 distances.
        keys: a sortable key a client: of equal scores, the smallest wins. None: the one that comes first.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as in `fastagg.fedavg`; f is no integer of 0 or more, or too large; no floating leaf.
    """
    return run(Krum(f, convention, keys), updates, None, options)


def multi_krum(
    updates: Any,
    f: int,
    weights: Any = None,
    *,
    m: int | None = None,
    convention: str = "paper",
    keys: Sequence[Any] | None = None,
    **options: Unpack[Options],
) -> Any:
    """The weighted mean of the m updates with Krum's lowest scores (Blanchard et al. 2017, "Multi-Krum").

    Args:
        updates: as in `krum`.
        f: as in `krum`.
        weights: of the clients in the mean of those selected, as in `fastagg.fedavg`; they do not matter to the scores.
            A client of weight 0 has no part in anything.
        m: how many to select; None for n - f.
        convention: as in `krum`.
        keys: as in `krum`.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as `krum`; m is no integer from 1 to n.
    """
    return run(MultiKrum(f, m, convention, keys), updates, weights, options)


def bulyan(
    updates: Any,
    f: int,
    *,
    convention: str = "paper",
    keys: Sequence[Any] | None = None,
    rescore: bool = True,
    **options: Unpack[Options],
) -> Any:
    """Krum's choice of n - 2f updates, and of each coordinate the mean of their n - 4f values nearest to the median.

    El Mhamdi et al. 2018.

    Args:
        updates: as in `krum`.
        f: how many of the clients may be hostile; n >= 4f + 3.
        convention: as in `krum`.
        keys: as in `krum`.
        rescore: pick the updates one by one, with the scores of those that are left (the paper); False: all by the
            first scores, as Flower does.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as `krum`.
    """
    return run(Bulyan(f, convention, keys, rescore), updates, None, options)


def squared_distances(updates: Iterable[Any]) -> np.ndarray:
    """The squared distances of all pairs of updates over their floating leaves.

    ``distances[i, j] = sum((x_i - x_j) ** 2)``

    Returns:
        (K, K) float64, symmetric, zero on the diagonal; NaN or infinite where an update is not finite.

    Raises:
        TypeError, ValueError: as in `fastagg.fedavg`; no leaf is a floating one.
    """
    points = updates.points() if isinstance(updates, MixedUpdates) else Points(updates)
    points.check_floats()
    return points.squared_distances()[0]


def krum_scores(updates: Iterable[Any], f: int, convention: str = "paper") -> np.ndarray:
    """Krum's score of every update: the lower, the more it is among its like.

    Args:
        updates: as in `krum`.
        f: as in `krum`.
        convention: as in `krum`.

    Returns:
        (K,) float64; infinite for an update that is not finite.

    Raises:
        TypeError, ValueError: as `krum`.
    """
    rule = Krum(f, convention)
    squared = squared_distances(updates)
    rule.check(len(squared))
    return scores_of(np.where(np.isnan(squared), np.inf, squared), rule.f, convention)
