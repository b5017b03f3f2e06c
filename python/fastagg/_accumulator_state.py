"""The checkpoint of an accumulator: everything it holds, as plain values and one NumPy array of bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastagg._measured import Measured, measured_of
from fastagg._sums import LeafSums, Total, check_sums, paired
from fastagg._updates import Structure
from fastagg.averaging import check_policies

_AS_THEY_ARE = (
    *("device", "folds", "added", "count", "total_weight", "dropped"),
    *("nan_policy", "integer_policy", "batch", "low_memory"),
)
# Version 1 had no pairs: a float64 sum was one float64, and the total weight a float.
_VERSION = 2
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
        if not isinstance(plain, dict) or plain.get("version") not in (1, _VERSION) or not plain.keys() >= _KEYS:
            raise ValueError(f"state: expected what Accumulator.state_dict() returned, version 1 or {_VERSION}")
        try:
            structure = None if plain["structure"] is None else Structure.described(plain["structure"])
            leaves = [LeafSums.described(leaf) for leaf in plain["leaves"]]
            check_policies(plain["nan_policy"], plain["integer_policy"])
            sums = None if plain["sums"] is None else np.asarray(plain["sums"])
            total = plain["total_weight"]
            total = Total(total, 0.0) if plain["version"] == 1 else Total(*total)
            measured = measured_of(plain.get("statistics"), leaves, plain["count"])  # older states have none
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"state: damaged: {error}") from error
        check_sums(sums, leaves, plain["count"])
        if plain["version"] == 1:
            sums, leaves = paired(sums, leaves)
        return cls(
            structure=structure,
            leaves=leaves,
            sums=sums,
            measured=measured,
            **{**{name: plain[name] for name in _AS_THEY_ARE}, "total_weight": total},
        )
