"""Rules that look at each coordinate alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastagg._native.operands import MIDDLE, NEAR_MEDIAN, NEAR_TRIMMED, TRIMMED
from fastagg.robust.arguments import as_count
from fastagg.robust.rules import CoordinateRule, Options, run

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Median(CoordinateRule):
    """See `median`."""

    name, window, left_out = "median", MIDDLE, 0

    def check(self, count: int) -> None:
        """Any number of updates has a median."""


class TrimmedMean(CoordinateRule):
    """See `trimmed_mean`."""

    name, window = "trimmed_mean", TRIMMED

    def __init__(self, f: int) -> None:
        """Withstands f hostile clients."""
        self.left_out = as_count(f, "f")

    def check(self, count: int) -> None:
        """Raises ValueError unless something is left between what is cut."""
        self.require(count, 2 * self.left_out + 1, f"2f + 1 for f = {self.left_out}")


class Meamed(TrimmedMean):
    """See `meamed`."""

    name, window = "meamed", NEAR_MEDIAN


class Phocas(TrimmedMean):
    """See `phocas`."""

    name, window = "phocas", NEAR_TRIMMED


def median(updates: Any, **options: Unpack[Options]) -> Any:
    """The median of each coordinate; of an even number of clients the mean of the two in the middle (Yin et al. 2018).

    Sorting networks in registers, or in the cache for more than 16 clients, read every update once; the same bits on
    every instruction set, thread count and device. Sums are float64, rounded once to the leaf's dtype.

    Args:
        updates: K updates of one structure, as in `fastagg.fedavg`; or `MixedUpdates`.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as in `fastagg.fedavg`.
    """
    return run(Median(), updates, None, options)


def trimmed_mean(
    updates: Any,
    f: int,
    **options: Unpack[Options],
) -> Any:
    """The mean of each coordinate's values without the f smallest and the f largest (Yin et al. 2018).

    Args:
        updates: as in `median`.
        f: how many of the clients may be hostile; n >= 2f + 1.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as in `fastagg.fedavg`; f is no integer of 0 or more, or too large.
    """
    return run(TrimmedMean(f), updates, None, options)


def meamed(
    updates: Any,
    f: int,
    **options: Unpack[Options],
) -> Any:
    """The mean of each coordinate's n - f values nearest to their median ("mean around median", Xie et al. 2018).

    Of two values as far from the median, the larger is left out first.

    Args:
        updates: as in `median`.
        f: how many of the clients may be hostile; n >= 2f + 1.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as in `fastagg.fedavg`; f is no integer of 0 or more, or too large.
    """
    return run(Meamed(f), updates, None, options)


def phocas(
    updates: Any,
    f: int,
    **options: Unpack[Options],
) -> Any:
    """The mean of each coordinate's n - f values nearest to their trimmed mean (Xie et al. 2018).

    Of two values as far from it, the larger is left out first.

    Args:
        updates: as in `median`.
        f: how many of the clients may be hostile; n >= 2f + 1.
        **options: see `Options`.

    Raises:
        TypeError, ValueError: as in `fastagg.fedavg`; f is no integer of 0 or more, or too large.
    """
    return run(Phocas(f), updates, None, options)
