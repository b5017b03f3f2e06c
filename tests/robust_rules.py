"""Every robust rule beside its reference, called alike: rule(updates, f, **options)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import robust_reference as expected
from fastagg import robust

Array = np.ndarray
RADIUS = 3.0  # some updates of standard normal values are longer, some are not


class Rule(NamedTuple):
    """One rule.

    Attributes:
        rule: takes updates, f and options.
        reference: takes a float64 matrix of one client a row, and f.
        least: the fewest clients for f hostile ones.
    """

    rule: Callable[..., Any]
    reference: Callable[[Array, int], Array]
    least: Callable[[int], int]


def majority(f: int) -> int:
    """More honest clients than hostile ones."""
    return 2 * f + 1


def any_number(f: int) -> int:
    """The rule has no f."""
    return 1


COORDINATE_RULES = {
    "median": Rule(
        lambda updates, f, **options: robust.median(updates, **options), lambda x, f: expected.median(x), any_number
    ),
    "trimmed_mean": Rule(robust.trimmed_mean, expected.trimmed_mean, majority),
    "meamed": Rule(robust.meamed, expected.meamed, majority),
    "phocas": Rule(robust.phocas, expected.phocas, majority),
}
SELECTING_RULES = {
    "krum": Rule(robust.krum, expected.krum, lambda f: 2 * f + 3),
    "multi_krum": Rule(robust.multi_krum, expected.multi_krum, lambda f: 2 * f + 3),
    "bulyan": Rule(robust.bulyan, expected.bulyan, lambda f: 4 * f + 3),
}
WEIGHING_RULES = {
    "geometric_median": Rule(
        lambda updates, f, **options: robust.geometric_median(updates, **options),
        lambda x, f: expected.geometric_median(x),
        any_number,
    ),
    "centered_clip": Rule(
        lambda updates, f, **options: robust.centered_clip(updates, RADIUS, **options),
        lambda x, f: expected.centered_clip(x, RADIUS),
        any_number,
    ),
    "norm_clip": Rule(
        lambda updates, f, **options: robust.norm_clip(updates, RADIUS, **options),
        lambda x, f: expected.norm_clip(x, RADIUS),
        any_number,
    ),
    # The last client is the server itself.
    "fltrust": Rule(
        lambda updates, f, **options: robust.fltrust(updates[:-1], updates[-1], **options),
        lambda x, f: expected.fltrust(x[:-1], x[-1]),
        lambda f: 2,
    ),
}
RULES = {**COORDINATE_RULES, **SELECTING_RULES, **WEIGHING_RULES}

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
every_coordinate_rule = pytest.mark.parametrize("rule", COORDINATE_RULES.values(), ids=COORDINATE_RULES.keys())
every_distance_rule = pytest.mark.parametrize(
    "rule", (SELECTING_RULES | WEIGHING_RULES).values(), ids=(SELECTING_RULES | WEIGHING_RULES).keys()
)
every_selecting_rule = pytest.mark.parametrize("rule", SELECTING_RULES.values(), ids=SELECTING_RULES.keys())


def most_hostile(rule: Rule, clients: int) -> int:
    """The largest f that a rule takes from so many clients."""
    return max(f for f in range(clients) if f == 0 or rule.least(f) <= clients)


def rows(random: np.random.Generator, clients: int, size: int, dtype: np.dtype) -> Array:
    """Honest clients around a common model, one a row, no two alike."""
    model = random.normal(size=size)
    return np.asarray(model + random.normal(size=(clients, size)), np.float64).astype(dtype)


def wide(x: Any) -> Array:
    """What the reference takes: the very values, in float64."""
    return np.stack([np.asarray(row).astype(np.float64) for row in x])
