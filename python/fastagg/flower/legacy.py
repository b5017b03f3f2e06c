"""Drop-ins for the aggregation functions of Flower's older strategies (`flwr.server.strategy.aggregate`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastagg.averaging.mean import fedavg
from fastagg.flower.arrays import read_npy


def aggregate(results: list[tuple[list[np.ndarray], int]], **options: Any) -> list[np.ndarray]:
    """The weighted mean of (layers, number of examples) pairs; options are those of `fastagg.fedavg`."""
    mean: list[np.ndarray] = fedavg([layers for layers, _ in results], [count for _, count in results], **options)
    return mean


def aggregate_inplace(results: list[tuple[Any, Any]], **options: Any) -> list[np.ndarray]:
    """The weighted mean of (client, FitRes) pairs, read from their bytes; options are those of `fastagg.fedavg`."""
    updates = [[read_npy(tensor) for tensor in result.parameters.tensors] for _, result in results]
    mean: list[np.ndarray] = fedavg(updates, [result.num_examples for _, result in results], **options)
    return mean
