"""The checkpoint of an accumulator: everything it holds, as plain values and one NumPy array of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastagg._arguments import as_flag, as_integer
from fastagg._updates.policies import check_policies
from fastagg._updates.structure import Structure
from fastagg._updates.weights import as_weights
from fastagg.averaging.client_statistics import Measured, measured_of
from fastagg.averaging.sums import LeafSums, Total, check_device, check_sums

_AS_THEY_ARE = (
    *("device", "folds", "added", "count", "total_weight", "dropped"),
    *("nan_policy", "integer_policy", "batch", "low_memory"),
)
_VERSION = 2
_LEAST = {"folds": 0, "added": 0, "count": 0, "batch": 1}
_KEYS = {"version", "structure", "leaves", "sums", *_AS_THEY_ARE}


@dataclass(frozen=True)
class AccumulatorState:
    """What an accumulator holds; `dropped` as plain tuples, `measured` None without statistics."""

    structure: Structure | None
    leaves: list[LeafSums]
    device: str
    sums: np.ndarray | None
    folds: int
    added: int
    count: int
    total_weight: Total
    dropped: list[tuple[Any, ...]]
    nan_policy: str
    integer_policy: str | None
    batch: int
    low_memory: bool
    measured: list[Measured] | None

    def describe(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "version": _VERSION,
            "structure": None if self.structure is None else self.structure.describe(),
            "leaves": [leaf.describe() for leaf in self.leaves],
            "sums": self.sums,
            **{name: getattr(self, name) for name in _AS_THEY_ARE},
            "total_weight": tuple(self.total_weight),
            "statistics": None if self.measured is None else [tuple(measured) for measured in self.measured],
        }

    @classmethod
    def described(cls, plain: Any) -> AccumulatorState:
        """The state that `describe` described, checked.

        Raises:
            ValueError: it is of another version of fastagg, incomplete or damaged.
        """
        if not isinstance(plain, dict) or plain.get("version") != _VERSION or not plain.keys() >= _KEYS:
            raise ValueError(f"state: expected what Accumulator.state_dict() returned, version {_VERSION}")
        try:
            return cls._checked(plain)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"state: damaged: {error}") from error

    @classmethod
    def _checked(cls, plain: dict[str, Any]) -> AccumulatorState:
        """The state, whose every field fits the others: they are what native code goes by.

        Raises:
            LookupError, TypeError, ValueError, AttributeError, OverflowError: one does not.
        """
        check_policies(plain["nan_policy"], plain["integer_policy"])
        numbers = {name: _from(least, plain[name], name) for name, least in _LEAST.items()}
        count, added = numbers["count"], numbers["added"]
        if added < count:
            raise ValueError(f"{count} updates contributed of {added} that were added")
        structure = None if plain["structure"] is None else Structure.described(plain["structure"])
        leaves = [] if structure is None else [LeafSums.described(leaf) for leaf in plain["leaves"]]
        if len(leaves) != (0 if structure is None else len(structure.names) or 1) or (count > 0 and not leaves):
            raise ValueError(f"{count} updates of one structure do not have these {len(leaves)} leaves")
        check_device(plain["device"], leaves)
        total = _total(plain["total_weight"])
        if (total.high > 0) != (count > 0):
            raise ValueError(f"{count} updates do not weigh {total.high} together")
        sums = None if plain["sums"] is None else np.asarray(plain["sums"])
        check_sums(sums, leaves, count, plain["integer_policy"])
        return cls(
            structure=structure,
            leaves=leaves,
            device=plain["device"],
            sums=sums,
            total_weight=total,
            dropped=[_dropped(one, added) for one in plain["dropped"]],
            nan_policy=plain["nan_policy"],
            integer_policy=plain["integer_policy"],
            low_memory=as_flag(plain["low_memory"], "low_memory"),
            measured=measured_of(plain.get("statistics"), leaves, count, added),  # older states have none
            **numbers,
        )


def _from(least: int, value: Any, name: str) -> int:
    """An integer that is no less than another."""
    number = as_integer(value, name)
    if number < least:
        raise ValueError(f"{name}: expected {least} or more, got {number}")
    return number


def _total(plain: Any) -> Total:
    """The weights' total, and what a float of it lacks."""
    high, rest = plain
    high = as_weights([high, 1.0], 2)[0]
    if not isinstance(rest, float) or not abs(rest) <= math.ulp(high):
        raise ValueError(f"a total weight of {high} cannot lack {rest!r}")
    return Total(high, rest)


def _dropped(plain: Any, added: int) -> tuple[Any, ...]:
    """One update that was left out."""
    client, leaf, reason = plain
    if not 0 <= as_integer(client, "client") < added or not isinstance(reason, str):
        raise ValueError(f"client {client!r} cannot have been left out, of {added}, because of {reason!r}")
    return client, leaf, reason
