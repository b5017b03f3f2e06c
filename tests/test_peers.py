"""Flower's and NVFlare's own aggregation on the same input: where they are right, fastagg agrees."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastagg
from data import counts, generator, normal

SHAPES = {"weight": (16, 9), "bias": (16,), "scalar": ()}


def updates(clients: int, dtype: type) -> tuple[list[dict[str, np.ndarray]], list[float]]:
    """Clients' models, and their numbers of examples."""
    random = generator(clients)
    models = [
        {name: np.asarray(normal(random, shape, np.dtype(dtype))) for name, shape in SHAPES.items()}
        for _ in range(clients)
    ]
    return models, counts(random, clients)


def imported(load: Callable[[], Any]) -> Any:
    """A peer's names, with its own warnings left aside; skips where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    except ImportError as error:
        pytest.skip(f"not installed: {error.name}")


@functools.cache
def flower_aggregate() -> Any:
    """Flower's plain function over lists of arrays."""
    from flwr.server.strategy.aggregate import aggregate

    return aggregate


@functools.cache
def flower_records() -> Any:
    """What Flower's message API averages with."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    return Array, ArrayRecord, MetricRecord, RecordDict, aggregate_arrayrecords


@functools.cache
def nvflare_helper() -> Any:
    """What NVFlare's aggregators add up with."""
    from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

    return WeightedAggregationHelper


def by_flower_aggregate(models: list[dict[str, np.ndarray]], weights: list[float]) -> dict[str, np.ndarray]:
    aggregate = imported(flower_aggregate)
    means = aggregate([(list(model.values()), int(weight)) for model, weight in zip(models, weights, strict=True)])
    return dict(zip(models[0], means, strict=True))


def by_flower_records(models: list[dict[str, np.ndarray]], weights: list[float]) -> dict[str, np.ndarray]:
    array, array_record, metric_record, record_dict, aggregate = imported(flower_records)
    records = [
        record_dict(
            {
                "arrays": array_record({name: array(leaf) for name, leaf in model.items()}),
                "metrics": metric_record({"examples": weight}),
            }
        )
        for model, weight in zip(models, weights, strict=True)
    ]
    return {name: leaf.numpy() for name, leaf in aggregate(records, "examples").items()}


def by_nvflare(models: list[dict[str, np.ndarray]], weights: list[float]) -> dict[str, np.ndarray]:
    helper = imported(nvflare_helper)()
    for client, (model, weight) in enumerate(zip(models, weights, strict=True)):
        copies = {name: leaf.copy() for name, leaf in model.items()}
        helper.add(copies, weight, f"site-{client}", 0)
    return helper.get_result()


@pytest.mark.parametrize("peer", [by_flower_aggregate, by_flower_records, by_nvflare])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("clients", [1, 2, 10])
def test_peers_agree(peer: Callable[..., dict[str, np.ndarray]], dtype: type, clients: int) -> None:
    models, weights = updates(clients, dtype)
    theirs, ours = peer(models, weights), fastagg.fedavg(models, weights)
    tolerance = 2e-6 if dtype == np.float32 else 1e-14
    for name, leaf in ours.items():
        assert np.allclose(leaf, theirs[name], rtol=tolerance, atol=tolerance)


def test_flower_records_agree_in_fp64() -> None:
    # Not to the bit: Flower's sums are rounded at every step, ours once.
    models, weights = updates(5, np.float64)
    theirs, ours = by_flower_records(models, weights), fastagg.fedavg(models, weights)
    for name, leaf in ours.items():
        assert np.allclose(leaf, np.asarray(theirs[name]), rtol=1e-15, atol=1e-15)
