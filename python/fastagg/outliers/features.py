"""What clients are compared by, and how unusual each client's value is among all of them."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastagg.outliers.sketches import Sketch

if TYPE_CHECKING:
    from fastagg.statistics import Statistics

NORMAL_CONSISTENCY = 1.4826  # times the median absolute deviation: the standard deviation of normal values
_SMALLEST_RATIO = 1e-9  # of the largest value of a column: below, a value counts as that, so that logarithms exist


class Kind(NamedTuple):
    """One kind of feature.

    A deviation is divided by the clients' own spread, but by no less than `smallest_spread`: what lies closer
    together than that is never unusual, however alike the other clients are.
    """

    name: str
    is_ratio: bool  # compared by its logarithm
    smallest_spread: float


# 0.3 under a threshold of 3.5: nothing within a factor of exp(1.05) = 2.9 of the median is an outlier.
KINDS = (
    Kind("norm", True, 0.3),
    Kind("distance", True, 0.3),
    Kind("largest", True, 0.3),
    Kind("cosine", False, 0.08),
)


class Features(NamedTuple):
    """The clients' features: column 0 is the whole update, the others are its leaves (none if there is only one).

    Attributes:
        clients: labels, one a client.
        leaves: names of the leaves, one a column from column 1 on.
        elements: int64 (columns,), numbers of elements.
        values: for each kind of feature, float64 (clients, columns).
        nonfinite: int64 (clients, leaves), numbers of NaNs and infinities.
        nonfinite_leaves: the names for `nonfinite`.
    """

    clients: tuple[Any, ...]
    leaves: tuple[str, ...]
    elements: np.ndarray
    values: dict[str, np.ndarray]
    nonfinite: np.ndarray
    nonfinite_leaves: tuple[str, ...]

    @property
    def broken(self) -> np.ndarray:
        """The clients with a NaN or an infinity, bool (clients,)."""
        broken: np.ndarray = np.any(self.nonfinite > 0, axis=1)
        return broken


def features_of(source: Statistics | Sketch) -> Features:
    """The features of a round.

    Raises:
        TypeError: it is neither Statistics nor a Sketch.
        ValueError: it holds no client.
    """
    from fastagg.statistics import Statistics

    if not isinstance(source, (Statistics, Sketch)):
        raise TypeError(
            "expected the Statistics of fedavg(..., stats=True) or the Sketch of outliers.sketch(), "
            f"got {type(source).__name__}"
        )
    if not source.clients:
        raise ValueError("expected at least one client, got none")
    twice = next((client for client, count in Counter(source.clients).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"client {twice!r}: its label is there twice")
    with np.errstate(over="ignore", invalid="ignore"):  # squares beyond float64: their largest values tell enough
        values = _of_sketch(source) if isinstance(source, Sketch) else _of_statistics(source)
    elements = np.concatenate([[source.elements.sum()], source.elements])
    leaves = tuple(map(str, source.leaves))
    columns = slice(None) if len(leaves) > 1 else slice(0, 1)
    return Features(
        tuple(source.clients),
        leaves if len(leaves) > 1 else (),
        elements[columns],
        {name: table[:, columns] for name, table in values.items()},
        source.nonfinite,
        leaves,
    )


def _of_statistics(statistics: Statistics) -> dict[str, np.ndarray]:
    whole = statistics.whole()

    def table(name: str) -> np.ndarray:
        return np.hstack([getattr(whole, name), getattr(statistics, name)])

    values = {name: table(name) for name in ("norm", "distance", "cosine")}
    values["cosine"][(values["norm"] == 0) | (table("mean_norm") == 0)] = np.nan  # no direction
    values["largest"] = np.maximum(np.abs(table("minimum")), np.abs(table("maximum")))
    return values


def _of_sketch(sketch: Sketch) -> dict[str, np.ndarray]:
    """As of statistics, but with a centre of which a minority is no large part."""
    columns = np.concatenate([sketch.values.sum(axis=1, keepdims=True), sketch.values], axis=1)
    usable = ~(sketch.nonfinite > 0).any(axis=1)
    centre = _centre(columns[usable]) if usable.any() else np.zeros(columns.shape[1:])
    largest = np.hstack([sketch.largest.max(axis=1, keepdims=True), sketch.largest])
    norms, distances = np.linalg.norm(columns, axis=2), np.linalg.norm(columns - centre, axis=2)
    return {"norm": norms, "distance": distances, "largest": largest, "cosine": _cosines(columns, centre)}


def _centre(columns: np.ndarray) -> np.ndarray:
    """The median of the clients, each first scaled down to the median norm; then, twice, their weighted mean.

    The weights are ``max(0, cosine of the whole update to the last centre)``, as in FLTrust (Cao et al. 2021): the
    median of clients whose data differ is short, and those who point away shorten it further.
    """
    norms = np.linalg.norm(columns, axis=2)
    factors = np.minimum(1, np.median(norms, axis=0) / np.maximum(norms, np.finfo(np.float64).tiny))
    scaled = columns * factors[:, :, None]
    centre: np.ndarray = np.median(scaled, axis=0)
    for _ in range(2):
        agreement = np.maximum(0, np.nan_to_num(_cosines(scaled[:, :1], centre[:1])[:, 0]))
        if agreement.any():
            centre = np.tensordot(agreement / agreement.sum(), scaled, 1)
    return centre


def _cosines(columns: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Of each client's columns to the centre's; NaN where one is zero."""
    lengths = np.linalg.norm(columns, axis=2) * np.linalg.norm(centre, axis=1)
    products = np.einsum("klj,lj->kl", columns, centre)
    cosines: np.ndarray = np.divide(products, lengths, out=np.full(lengths.shape, np.nan), where=lengths > 0)
    return cosines


def deviations(features: Features) -> dict[str, np.ndarray]:
    """For each kind, float64 (clients, columns): how many spreads a value lies from the clients' median.

    ``z = (v - median(v)) / max(1.4826 median(|v - median(v)|), the leaves' typical spread, smallest spread)``

    where v is the logarithm of norms, distances and largest values, and the cosine itself; of cosines only low ones
    are unusual, and the spread is that of the cosines from the median up. Clients with non-finite values are left out
    and have zeros. The median absolute deviation of few clients is often far too small by chance: hence the typical
    spread, the median over the leaves.
    """
    usable = ~features.broken
    found = {}
    for kind in KINDS:
        table = np.zeros(features.values[kind.name].shape)
        if usable.any():
            table[usable] = _standardise(features.values[kind.name][usable], kind, features.elements)
        found[kind.name] = table
    return found


def _standardise(values: np.ndarray, kind: Kind, elements: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    values = np.where(known, values, np.nan)
    values[:, ~known.any(axis=0)] = 0
    if kind.is_ratio:
        floor = np.nanmax(values, axis=0) * _SMALLEST_RATIO
        values = np.log(np.maximum(values, np.where(floor > 0, floor, 1)))
    medians = np.nanmedian(values, axis=0)
    differences = values - medians
    sizes = np.where(differences >= 0, differences, np.nan) if kind.name == "cosine" else np.abs(differences)
    spreads = NORMAL_CONSISTENCY * np.nanmedian(sizes, axis=0)
    smallest = np.full(spreads.shape, kind.smallest_spread)
    if kind.name == "cosine":
        # In n dimensions, directions that have nothing in common spread by 1 / sqrt(n). And where most agree closely,
        # a client that agrees less is not yet against them.
        smallest = np.maximum.reduce([smallest, 1 / np.sqrt(np.maximum(elements, 1)), medians / 5])
    if len(spreads) > 1:
        smallest[1:] = np.maximum(smallest[1:], np.median(spreads[1:]))
    found = np.where(known, differences / np.maximum(spreads, smallest), 0)
    return np.minimum(found, 0) if kind.name == "cosine" else found


def leaf_allowance(threshold: float, leaves: int) -> float:
    """How much of a leaf's deviation counts, so that many leaves do not make an outlier of everybody.

    ``threshold / sqrt(threshold^2 + 2 ln(4 leaves))``: the most extreme of m normal values, here four kinds of feature
    of every leaf, passes the root about as seldom as a single one passes the threshold.
    """
    return threshold / math.sqrt(threshold**2 + 2 * math.log(max(len(KINDS) * leaves, 1)))
