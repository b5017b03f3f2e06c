"""What lets Flower's accounted differential privacy take our strategies.

The constructors of flwr/serverapp/strategy/dp_fixed_clipping.py, given an `accountant`, refuse a strategy where (line
110 in Flower 1.41)

    strategy.__class__.aggregate_train is not FedAvg.aggregate_train

What they need is that the model is the weighted mean of the replies, which that of our `FedAvg` is. So whoever asks
from Flower's own code is shown Flower's method, and everybody else ours.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from flwr.serverapp import strategy as flower


class AccountedAggregateTrain:
    """`aggregate_train` of the class that has it: on a strategy its `_aggregate_train`, on the class as said above."""

    def __init__(self, *, model_made_by: Collection[str]) -> None:
        """A class attribute.

        Args:
            model_made_by: the methods that make the model; a subclass with others than this class has no mean.
        """
        self._model_made_by = model_made_by

    def __set_name__(self, averaging: type, name: str) -> None:
        self._averaging: Any = averaging

    def __get__(self, strategy: Any, owner: Any) -> Any:
        if strategy is not None:
            return strategy._aggregate_train
        ours = self._averaging
        asks = str(sys._getframe(1).f_globals.get("__name__", ""))
        is_mean = all(getattr(owner, name) is getattr(ours, name) for name in self._model_made_by)
        return flower.FedAvg.aggregate_train if is_mean and asks.startswith("flwr.") else ours._aggregate_train
