"""The robust rules as their papers write them: plain float64 NumPy on a matrix of one client a row.

Slow and obvious: distances are sums of squared differences, and iterations move vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reference import assert_rounded_once, name_of

Array = np.ndarray

LARGEST_ERROR = {"fp64": 1e-12, "fp32": 1e-6, "fp16": 1e-6, "bf16": 1e-6}  # of the clients' largest magnitude


def assert_rule(result: Array, exact: Array, clients: Array) -> None:
    """Holds a result to the reference, coordinate by coordinate: the stated error, and one rounding to its dtype.

    The error counts relative to the largest magnitude that any client has there, for a rule's value may be near zero
    where clients' values cancel.
    """
    assert result.shape == exact.shape
    slack = LARGEST_ERROR[name_of(result.dtype)] * np.abs(clients).max(axis=0)
    assert_rounded_once(result, exact, slack)


# Rules on single coordinates


def median(x: Array) -> Array:
    """Yin et al. 2018, definition 1; of an even number the mean of the two in the middle."""
    ordered = np.sort(x, axis=0)
    count = len(x)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed_mean(x: Array, f: int) -> Array:
    """Yin et al. 2018, definition 2: without the f smallest and the f largest."""
    return np.sort(x, axis=0)[f : len(x) - f].mean(axis=0)


def mean_near(x: Array, center: Array, count: int) -> Array:
    """The mean of the values nearest to the centre, the smaller one first of two as near."""
    order = np.lexsort((x, np.abs(x - center)), axis=0)
    return np.take_along_axis(x, order[:count], axis=0).mean(axis=0)


def meamed(x: Array, f: int) -> Array:
    """Xie et al. 2018, "Generalized Byzantine-tolerant SGD": mean around the median."""
    return mean_near(x, median(x), len(x) - f)


def phocas(x: Array, f: int) -> Array:
    """Xie et al. 2018, "Phocas": mean around the trimmed mean."""
    return mean_near(x, trimmed_mean(x, f), len(x) - f)


# Rules on distances


def squared_distances(x: Array) -> Array:
    """Between all pairs of clients."""
    return np.array([[np.sum((one - other) ** 2) for other in x] for one in x])


def krum_scores(x: Array, f: int, convention: str = "paper") -> Array:
    """Blanchard et al. 2017: for each client the sum of squared distances to its n-f-2 nearest others.

    "byzfl" takes n-f-1 of them, "byzantine_momentum" n-f-1 distances that are not squared. At least one counts.
    """
    return scores_of(squared_distances(x), f, convention)


def scores_of(squared: Array, f: int, convention: str) -> Array:
    """The same from the squared distances."""
    distances = np.sqrt(squared) if convention == "byzantine_momentum" else squared
    nearest = max(1, len(squared) - f - (2 if convention == "paper" else 1))
    return np.array([np.sort(np.delete(row, client))[:nearest].sum() for client, row in enumerate(distances)])


def ranking(x: Array, f: int, convention: str = "paper", keys: Sequence[Any] | None = None) -> list[int]:
    """The clients from the best score to the worst, of equal scores the smaller key first."""
    scores, keys = krum_scores(x, f, convention), range(len(x)) if keys is None else keys
    return sorted(range(len(x)), key=lambda client: (scores[client], keys[client]))


def krum(x: Array, f: int, convention: str = "paper", keys: Sequence[Any] | None = None) -> Array:
    """Blanchard et al. 2017."""
    return x[ranking(x, f, convention, keys)[0]]


def multi_krum(
    x: Array, f: int, weights: Sequence[float] | None = None, m: int | None = None, convention: str = "paper"
) -> Array:
    """Blanchard et al. 2017, Multi-Krum: the mean of the m best."""
    best = ranking(x, f, convention)[: len(x) - f if m is None else m]
    return np.average(x[best], axis=0, weights=None if weights is None else np.asarray(weights)[best])


def bulyan_selection(x: Array, f: int, convention: str = "paper") -> list[int]:
    """El Mhamdi et al. 2018, the first phase: n-2f times Krum's choice, which leaves the set."""
    distances, left, chosen = squared_distances(x), list(range(len(x))), list[int]()
    for _ in range(len(x) - 2 * f):
        scores = scores_of(distances[np.ix_(left, left)], f, convention)
        chosen.append(left.pop(int(scores.argmin())))
    return chosen


def bulyan(x: Array, f: int, convention: str = "paper") -> Array:
    """El Mhamdi et al. 2018: of those chosen, coordinate by coordinate the mean of all but 2f around the median."""
    chosen = x[bulyan_selection(x, f, convention)]
    return mean_near(chosen, median(chosen), len(chosen) - 2 * f)


def normalised(weights: Sequence[float] | None, count: int) -> Array:
    """Weights that sum to one."""
    numbers = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    return numbers / numbers.sum()


def geometric_median(
    x: Array,
    weights: Sequence[float] | None = None,
    smoothing: float = 1e-6,
    iterations: int = 10_000,
    tolerance: float = 1e-10,
) -> Array:
    """Pillutla et al. 2022 (RFA): the smoothed Weiszfeld algorithm, from the weighted mean on."""
    alpha = normalised(weights, len(x))
    coefficients = alpha
    for _ in range(iterations):
        distances = np.linalg.norm(x - coefficients @ x, axis=1)
        beta = alpha / np.maximum(smoothing, distances)
        before, coefficients = coefficients, beta / beta.sum()
        if np.all(np.abs(coefficients - before) <= tolerance * before):
            break
    return coefficients @ x


def clipped(x: Array, center: Array, radius: float) -> Array:
    """Every client's difference from the centre, shortened to the radius where it is longer."""
    difference = x - center
    length = np.linalg.norm(difference, axis=1, keepdims=True)
    return difference * np.minimum(1, radius / np.maximum(length, np.finfo(np.float64).tiny))


def centered_clip(
    x: Array,
    radius: float,
    weights: Sequence[float] | None = None,
    center: Array | None = None,
    iterations: int = 5,
) -> Array:
    """Karimireddy et al. 2021, from the weighted mean on where no centre is given."""
    alpha = normalised(weights, len(x))
    v = alpha @ x if center is None else center
    for _ in range(iterations):
        v = v + alpha @ clipped(x, v, radius)
    return v


def norm_clip(x: Array, radius: float, weights: Sequence[float] | None = None, reference: Array | None = None) -> Array:
    """Sun et al. 2019, "Can you really backdoor federated learning?": the mean of shortened updates."""
    center = np.zeros(x.shape[1]) if reference is None else reference
    return center + normalised(weights, len(x)) @ clipped(x, center, radius)


def fltrust(x: Array, trusted: Array, reference: Array | None = None) -> Array:
    """Cao et al. 2021: the mean of updates as long as the server's own, by their cosine to it."""
    center = np.zeros(x.shape[1]) if reference is None else reference
    g, g0 = x - center, trusted - center
    length, length0 = np.linalg.norm(g, axis=1), np.linalg.norm(g0)
    trust = np.maximum(0, g @ g0 / (length * length0))
    return center + (trust * length0 / length) @ g / trust.sum()


# Pre-aggregations


def nearest_neighbor_mixing(x: Array, f: int) -> Array:
    """Allouah et al. 2023: every client becomes the mean of its n-f nearest, itself among them."""
    order = np.argsort(squared_distances(x), axis=1, kind="stable")
    return np.array([x[nearest[: len(x) - f]].mean(axis=0) for nearest in order])
