"""The weighted mean of what clients measured."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from fastagg._quoting import quoted


def numbers_of(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """The finite numbers among a client's metrics, and why each of the others cannot be averaged, by its quoted name.

    Raises:
        TypeError: they are no mapping.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics: expected a dict, got {type(metrics).__name__}")
    averaged, skipped = {}, {}
    for name, value in metrics.items():
        number = as_number(value)
        if number is None:
            skipped[quoted(name)] = f"expected a number, got {type(value).__name__}"
        elif not math.isfinite(number):
            skipped[quoted(name)] = f"expected a finite number, got {number}"
        else:
            averaged[name] = number
    return averaged, skipped


def mean_metrics(metrics: list[dict[str, float] | None], weights: list[float]) -> dict[str, float] | None:
    """Every metric's weighted mean over the clients that sent it, in float64.

    ``mean[name] = sum_k(weights[k] * metrics[k][name]) / sum_k(weights[k])`` over the k that have the name. None if a
    client sent no metrics at all, as in NVFlare: a mean over some would be compared with one over all.
    """
    if any(one is None for one in metrics):
        return None
    sent = [(one, weight) for one, weight in zip(metrics, weights, strict=True) if one]
    names = dict.fromkeys(name for one, _ in sent for name in one)
    means = {}
    for name in names:
        terms = [(weight, one[name]) for one, weight in sent if name in one]
        total = math.fsum(weight for weight, _ in terms)
        means[name] = _sum(weight / total * value for weight, value in terms)
    return means or None


def _sum(terms: Iterable[float]) -> float:
    try:
        return math.fsum(terms)
    except OverflowError:  # all of them are nearly as large as a float can be
        return math.inf


def as_number(value: Any) -> float | None:
    """A number, or an array without dimensions, as a float; None for anything else, bools among it."""
    if getattr(value, "shape", None) == ():  # an array without dimensions
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond the floats
        return math.inf
