"""Rules that give each update a weight by how far it lies from the others, or from what the server trusts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastagg.robust.arguments import as_count, as_positive
from fastagg.robust.rules import DistanceRule, Geometry, Options, distances_from, exact_sum, run

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Where a client is far away, rounding keeps the others' coefficients in motion. Changes so small that have not become
# smaller for so many iterations are that; those of a slow iteration become smaller each time.
_SMALL_CHANGE, _PATIENCE = 1e-6, 20


class GeometricMedian(DistanceRule):
    """See `geometric_median`."""

    name = "geometric_median"

    def __init__(self, smoothing: float = 1e-6, iterations: int = 10_000, tolerance: float = 1e-10) -> None:
        """Weiszfeld's iteration, smoothed."""
        self.smoothing = as_positive(smoothing, "smoothing")
        self.iterations = as_count(iterations, "iterations", 1)
        self.tolerance = as_positive(tolerance, "tolerance")

    def check(self, count: int) -> None:
        """Any number of updates has a geometric median."""

    def coefficients(self, geometry: Geometry) -> np.ndarray:
        """Where the iteration ends."""
        weights, products = geometry.shares(), geometry.inner_products()
        current, least, since = weights, np.inf, 0
        for _ in range(self.iterations):
            previous = current
            current = weights / np.maximum(distances_from(previous, products), self.smoothing)
            current /= exact_sum(current)
            change = largest_change(previous, current)
            since = 0 if change < least else since + 1
            least = min(change, least)
            if change <= self.tolerance or (change < _SMALL_CHANGE and since == _PATIENCE):
                break
        return current


class CenteredClip(DistanceRule):
    """See `centered_clip`."""

    name = "centered_clip"

    def __init__(self, radius: float, center: Any = None, iterations: int = 5) -> None:
        """Starts at a center; None for the weighted mean."""
        self.radius, self.center = as_positive(radius, "radius"), center
        self.iterations = as_count(iterations, "iterations", 1)

    def check(self, count: int) -> None:
        """Any number of updates will do."""

    def beside(self) -> Mapping[str, Any]:
        """The center, if one is given."""
        return {} if self.center is None else {"center": self.center}

    def coefficients(self, geometry: Geometry) -> np.ndarray:
        """Where the iteration ends."""
        weights, products = geometry.shares(), geometry.inner_products()
        current = weights
        if self.center is not None:
            current = np.zeros_like(weights)
            current[-1] = 1
        for _ in range(self.iterations):
            steps = weights * clip_factors(distances_from(current, products), self.radius)
            current = current * (1 - exact_sum(steps)) + steps
        return current


class NormClip(DistanceRule):
    """See `norm_clip`."""

    name = "norm_clip"

    def __init__(self, radius: float, reference: Any = None) -> None:
        """Clips differences from a reference; None for zero."""
        self.radius, self.reference = as_positive(radius, "radius"), reference

    def check(self, count: int) -> None:
        """Any number of updates will do."""

    def beside(self) -> Mapping[str, Any]:
        """The reference."""
        return {"reference": self.reference}

    def coefficients(self, geometry: Geometry) -> np.ndarray:
        """Each update's weight, clipped; the rest is the reference's."""
        clipped: np.ndarray = geometry.shares() * clip_factors(np.sqrt(geometry.distances[-1]), self.radius)
        clipped[-1] = rest_of(clipped)
        return clipped


class FLTrust(DistanceRule):
    """See `fltrust`."""

    name = "fltrust"

    def __init__(self, trusted: Any, reference: Any = None) -> None:
        """Trusts an update of the server's own."""
        if trusted is None:
            raise TypeError("trusted: expected an update of the server's own, got None")
        self.trusted, self.reference = trusted, reference

    def check(self, count: int) -> None:
        """Any number of updates will do."""

    def beside(self) -> Mapping[str, Any]:
        """The reference, and what the server trusts."""
        return {"reference": self.reference, "trusted": self.trusted}

    def coefficients(self, geometry: Geometry) -> np.ndarray:
        """Each update's trust, and the rest for the reference."""
        near, from_reference, from_trusted = geometry.near, geometry.distances[-2], geometry.distances[-1]
        norms, trusted_norm = np.sqrt(from_reference[near]), np.sqrt(from_reference[-1])
        dots = 0.5 * (from_reference[near] + from_reference[-1] - from_trusted[near])
        scale = norms * trusted_norm
        trust = np.clip(np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0), 0, 1)
        coefficients = np.zeros(len(geometry.distances))
        if trust.any():
            heard = trust > 0
            shares = np.zeros_like(trust)
            shares[heard] = trust[heard] / exact_sum(trust) * trusted_norm / norms[heard]
            coefficients[near] = shares
        coefficients[-2] = rest_of(coefficients)
        return coefficients


def largest_change(before: np.ndarray, after: np.ndarray) -> float:
    """Of coefficients, in parts of themselves: times a client far away, the smallest one moves the result."""
    parts = np.divide(np.abs(after - before), before, out=np.zeros_like(after), where=before > 0)
    return float(parts.max())


def rest_of(coefficients: np.ndarray) -> float:
    """What coefficients lack to one, unless rounding is all that they lack."""
    rest = 1 - exact_sum(coefficients)
    return rest if abs(rest) > len(coefficients) * np.finfo(np.float64).eps else 0.0


def clip_factors(distances: np.ndarray, radius: float) -> np.ndarray:
    """min(1, radius / distance)."""
    factors: np.ndarray = radius / np.maximum(distances, radius)
    return factors


def geometric_median(
    updates: Any,
    weights: Any = None,
    *,
    smoothing: float = 1e-6,
    iterations: int = 10_000,
    tolerance: float = 1e-10,
    **options: Unpack[Options],
) -> Any:
    """The point whose weighted distances from the updates have the smallest sum (RFA, Pillutla et al. 2022).

    ``argmin_v sum_k(weights[k] * |x_k - v|)``, by Weiszfeld's iteration from the weighted mean:
    ``v = sum_k(b_k * x_k) / sum_k(b_k)``, ``b_k = weights[k] / max(smoothing, |x_k - v|)``

    The updates are read twice, whatever the number of iterations: once for their distances, once for the result. The
    iterations run on the coefficients; of a client more than 1e10 times as far away as the others they know
    the direction less well, and no more than that. One whose squared distances overflow float64 has no part.

    Args:
        updates: K updates of one structure, as in `fastagg.fedavg`; or `MixedUpdates`.
        weights: as in `fastagg.fedavg`.
        smoothing: the distance below which a client's pull grows no more; above 0, in the units of the updates.
        iterations: at most so many. Tens are enough for models; points of two or three coordinates may take thousands.
        tolerance: stop when no coefficient b_k / sum(b) changes by a larger share of itself, or when rounding is all
            that still changes them.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as in `fastagg.fedavg`; a number is out of its range; no floating leaf.
    """
    rule = GeometricMedian(smoothing, iterations, tolerance)
    return run(rule, updates, weights, options)


def centered_clip(
    updates: Any,
    radius: float,
    weights: Any = None,
    *,
    center: Any = None,
    iterations: int = 5,
    **options: Unpack[Options],
) -> Any:
    """The updates' mean, each clipped to a ball around the last estimate (Karimireddy et al. 2021).

    ``v += sum_k(weights[k] * (x_k - v) * min(1, radius / |x_k - v|)) / sum_k(weights[k])``, repeated

    Args:
        updates: as in `geometric_median`.
        radius: of the ball, above 0, in the units of the updates.
        center: where v starts, an update: the paper takes the last round's aggregate. None: the weighted mean.
        iterations: how often.
        weights: as in `fastagg.fedavg`.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as `geometric_median`; the center is built otherwise, or not finite.
    """
    rule = CenteredClip(radius, center, iterations)
    return run(rule, updates, weights, options)


def norm_clip(
    updates: Any,
    radius: float,
    weights: Any = None,
    *,
    reference: Any = None,
    **options: Unpack[Options],
) -> Any:
    """The mean of the updates' differences from a reference, each clipped to a norm (Sun et al. 2019).

    ``reference + sum_k(weights[k] * (x_k - reference) * min(1, radius / |x_k - reference|)) / sum_k(weights[k])``

    Integer leaves are combined alike: without a reference, counters shrink with the rest.

    Args:
        updates: as in `geometric_median`.
        radius: the largest norm, above 0, in the units of the updates.
        reference: the model that the clients started from. None: zero, for updates that are differences already.
        weights: as in `fastagg.fedavg`.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as `geometric_median`; the reference is built otherwise, or not finite.
    """
    return run(NormClip(radius, reference), updates, weights, options)


def fltrust(
    updates: Any,
    trusted: Any,
    *,
    reference: Any = None,
    **options: Unpack[Options],
) -> Any:
    """The mean of the updates as far as they point where the server's own does, at its norm (Cao et al. 2021).

    ``g = x - reference``, ``t_k = max(0, cos(g_k, g_trusted))``,
    ``reference + sum_k(t_k * |g_trusted| / |g_k| * g_k) / sum_k(t_k)``; the reference where nobody points there

    Args:
        updates: as in `geometric_median`.
        trusted: the update that the server has made on data of its own.
        reference: the model that all started from. None: zero, for updates that are differences already.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as `geometric_median`; trusted or the reference is built otherwise, or not finite.
    """
    return run(FLTrust(trusted, reference), updates, None, options)
