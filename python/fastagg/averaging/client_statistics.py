"""What an accumulator with `stats` keeps of each client."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastagg._arguments import as_integer
from fastagg._native.codes import FLOATS
from fastagg._updates.leaves import measured_names
from fastagg._updates.structure import Structure
from fastagg._updates.weights import as_weights
from fastagg.averaging.sums import LeafSums
from fastagg.statistics import MOMENTS, Statistics, by_client

if TYPE_CHECKING:
    from fastagg._native.operands import LeafTuple, MeasurementOperands


class Measured(NamedTuple):
    """What a fold has found of one client: float64 (floating leaves, MOMENTS)."""

    client: int
    weight: float
    moments: np.ndarray


def floating(leaves: Sequence[LeafSums]) -> list[int]:
    """The leaves that have statistics."""
    return [index for index, leaf in enumerate(leaves) if leaf.code in FLOATS]


def measurements(
    leaves: Sequence[LeafSums], operands: Sequence[LeafTuple], sums: int, total: float
) -> list[MeasurementOperands]:
    """The updates that wait, to be compared with the sums that they join.

    Args:
        leaves: as the accumulator keeps them.
        operands: what is added up, leaf by leaf.
        sums: how many of a leaf's sources, the first ones, are sums and no updates.
        total: the weight of everything that is added up.
    """
    return [
        (sources[sums:] if leaf.code in FLOATS else [], None, 1 / total)
        for leaf, (sources, *_) in zip(leaves, operands, strict=True)
    ]


def found_of(clients: Sequence[tuple[int, float]], moments: np.ndarray, leaves: Sequence[LeafSums]) -> list[Measured]:
    """What the native code found of clients, given as (number, weight)."""
    of_clients = by_client(moments, floating(leaves), len(clients))
    return [Measured(client, weight, found) for (client, weight), found in zip(clients, of_clients, strict=True)]


def renumbered(measured: Iterable[Measured], first: int, rows: Sequence[int]) -> list[Measured]:
    """Another accumulator's clients, numbered from `first` on, with their leaves in the order of `rows`."""
    return [one._replace(client=first + one.client, moments=one.moments[rows]) for one in measured]


def table_of(measured: Sequence[Measured], structure: Structure, leaves: Sequence[LeafSums]) -> Statistics:
    """The statistics of all clients."""
    floats = floating(leaves)
    return Statistics.from_moments(
        [one.client for one in measured],
        measured_names(structure, floats),
        [leaves[index].elements for index in floats],
        [one.weight for one in measured],
        np.stack([one.moments for one in measured]),
    )


def measured_of(saved: Any, leaves: Sequence[LeafSums], count: int, added: int) -> list[Measured] | None:
    """Saved statistics; None for none.

    Raises:
        TypeError, ValueError: they are not those of as many updates with these leaves.
    """
    if saved is None:
        return None
    measured = [_restored(*one) for one in saved]
    if any(not 0 <= one.client < added for one in measured):
        raise ValueError(f"expected statistics of clients 0 to {added - 1}")
    shape = (len(floating(leaves)), MOMENTS)
    if len(measured) != count or any(one.moments.shape != shape for one in measured):
        raise ValueError(f"expected statistics of {count} updates, each of shape {shape}")
    return measured


def _restored(client: Any, weight: Any, moments: Any) -> Measured:
    return Measured(as_integer(client, "client"), as_weights([weight, 1.0], 2)[0], np.array(moments, np.float64))
