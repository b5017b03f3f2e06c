"""How much an update weighs whose client started from an older model."""

from __future__ import annotations

from collections.abc import Callable

from fastagg.server.optimizer import in_range

Staleness = Callable[[int], float]


def constant() -> Staleness:
    """``s(t) = 1``: an update weighs the same however old the model is that its client started from."""
    return lambda staleness: 1.0


def hinge(a: float = 10.0, b: float = 4.0) -> Staleness:
    """``s(t) = 1 if t <= b else 1 / (a * (t - b) + 1)`` (Xie et al. 2019, section 5.2).

    Raises:
        ValueError: a or b is negative.
    """
    a, b = in_range(a, "a"), in_range(b, "b")
    return lambda staleness: 1.0 if staleness <= b else 1.0 / (a * (staleness - b) + 1.0)


def polynomial(a: float = 0.5) -> Staleness:
    """``s(t) = (t + 1) ** -a`` (Xie et al. 2019, section 5.2; with a = 0.5 the weight of Nguyen et al. 2022).

    Raises:
        ValueError: a is negative.
    """
    a = in_range(a, "a")
    return lambda staleness: (staleness + 1.0) ** -a


INVERSE_ROOT = polynomial(0.5)
