"""Pre-aggregations: updates are mixed with each other before a rule sees them. The mixtures are never held."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from fastagg._errors import NONFINITE, DroppedUpdateWarning, NonFiniteUpdateError, NoUpdateLeftError
from fastagg._updates.structure import as_list
from fastagg.robust.arguments import as_count
from fastagg.robust.points import Points


class MixedUpdates(Sequence[Any]):
    """Mixtures of updates, which every rule of `fastagg.robust` takes in the place of updates.

    ``mixed[i] = sum_k mixing[i, k] * x_k``

    Nothing is mixed until it is asked for: rules mix a few thousand elements at a time or, where distances are enough,
    none. Indexing gives a mixed update. The updates must stay as they are while this is used.

    Attributes:
        updates: those that are mixed.
        mixing: (mixtures, updates) float64; rows sum to one.
    """

    def __init__(self, updates: list[Any], mixing: np.ndarray) -> None:
        """Mixtures of updates that have been checked and are finite."""
        self.updates, self.mixing = updates, mixing

    def points(self, dtype: Any = None, beside: Mapping[str, Any] | None = None) -> Points:
        """The mixtures for a rule."""
        return Points(self.updates, dtype, self.mixing, beside)

    def __len__(self) -> int:
        return len(self.mixing)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> MixedUpdates: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return MixedUpdates(self.updates, self.mixing[index])
        points = self.points()
        coefficients = np.zeros(len(self))
        coefficients[operator.index(index)] = 1
        result, outs = points.new_results(None)
        points.combine(coefficients, outs, "round")
        return result


def nearest_neighbor_mixing(updates: Iterable[Any], f: int, *, nan_policy: str = "raise") -> MixedUpdates:
    """Each update as the mean of its n - f nearest, itself included (NNM, Allouah et al. 2023).

    ``mixed_i = 1 / (n - f) * sum of the n - f updates nearest to x_i``; of two as near, the first comes first.

    Args:
        updates: as in `fastagg.fedavg`; or `MixedUpdates`.
        f: how many of the clients may be hostile; n > f.
        nan_policy: for a client with a NaN or an infinity: "raise", or "drop" (leave it out, and warn).

    Returns:
        n mixtures for any rule: `fastagg.robust.median(nearest_neighbor_mixing(updates, 2))`.

    Raises:
        TypeError, ValueError: as in `fastagg.fedavg`; f is no integer from 0 to n - 1; no leaf is a floating one.
    """
    mixed, points = _finite(updates, nan_policy)
    kept = len(mixed) - as_count(f, "f")
    if kept < 1:
        raise ValueError(f"nearest_neighbor_mixing: expected more than f = {f} updates, got {len(mixed)}")
    points.check_floats()
    distances, _ = points.squared_distances()
    np.fill_diagonal(distances, -1.0)  # itself before any that is equal
    rows = np.zeros_like(distances)
    np.put_along_axis(rows, np.argsort(distances, axis=1, kind="stable")[:, :kept], 1.0 / kept, axis=1)
    return MixedUpdates(mixed.updates, rows @ mixed.mixing)


def bucketing(updates: Iterable[Any], size: int, *, seed: int, nan_policy: str = "raise") -> MixedUpdates:
    """The means of random buckets of updates (Karimireddy et al. 2022, "s-bucketing").

    Args:
        updates: as in `fastagg.fedavg`; or `MixedUpdates`.
        size: updates of a bucket; the last one may have fewer.
        seed: of the order in which updates are put into buckets (`numpy.random.default_rng`); a new one each round.
        nan_policy: for a client with a NaN or an infinity: "raise", or "drop" (leave it out, and warn).

    Returns:
        ceil(n / size) mixtures for any rule; up to f of them hold something of f hostile clients.

    Raises:
        TypeError, ValueError: as in `fastagg.fedavg`; size is no integer of 1 or more, or seed none of 0 or more.
    """
    size, seed = as_count(size, "size", 1), as_count(seed, "seed")
    mixed, _ = _finite(updates, nan_policy)
    order = np.random.default_rng(seed).permutation(len(mixed))
    buckets = [order[first : first + size] for first in range(0, len(mixed), size)]
    rows = np.zeros((len(buckets), len(mixed)))
    for row, bucket in zip(rows, buckets, strict=True):
        row[bucket] = 1.0 / len(bucket)
    return MixedUpdates(mixed.updates, rows @ mixed.mixing)


def _finite(updates: Iterable[Any], nan_policy: str) -> tuple[MixedUpdates, Points]:
    """The updates without those that hold a NaN or an infinity, as mixtures of themselves."""
    if nan_policy not in ("raise", "drop"):
        raise ValueError(f"nan_policy: expected raise or drop, got {nan_policy!r}")
    if isinstance(updates, MixedUpdates):
        return updates, updates.points()
    updates = as_list(updates)
    points = Points(updates)
    if not points.all_finite():
        found = points.nonfinite(range(points.count))
        if found and nan_policy == "raise":
            client, leaf_name = next(iter(found.items()))
            raise NonFiniteUpdateError(f"client {client}, {leaf_name}: {NONFINITE}")
        for client, leaf_name in found.items():
            warnings.warn(f"client {client} dropped: {leaf_name} {NONFINITE}", DroppedUpdateWarning, stacklevel=3)
        updates = [update for client, update in enumerate(updates) if client not in found]
        if not updates:
            raise NoUpdateLeftError(found)
        points = Points(updates)
    return MixedUpdates(updates, np.eye(len(updates))), points
