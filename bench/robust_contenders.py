"""Who aggregates robustly: fastagg's rules, and Flower's functions on the same arrays. And what statistics cost.

Every contender is made from a case and is called without arguments; its answer is the model's layers.

Flower's functions get arrays that are in memory, as fastagg does: what its strategies spend on reading replies is left
out. Median and trimmed mean have the same arithmetic in its ServerApp and in its older strategies; for the rules on
distances both are measured, and the faster one is the rival.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastagg
from fastagg import robust

Layers = list[np.ndarray]
Call = Callable[[], Layers]

CHECKED = 1000  # elements of a layer
RADIUS_SHARE = 0.8  # of the shortest update, so that every one is clipped


@dataclass(frozen=True)
class Case:
    """K clients and a model of N fp32 parameters, under one rule.

    Attributes:
        rule: its name.
        hostile: f.
        calls: timed, after one that is not.
    """

    rule: str
    clients: int
    parameters: int
    hostile: int
    layers: int = 50
    calls: int = 5

    @property
    def size(self) -> int:
        """Elements of a layer."""
        return self.parameters // self.layers

    @property
    def model_bytes(self) -> int:
        """Bytes of a model."""
        return 4 * self.size * self.layers

    @property
    def radius(self) -> float:
        """For the rules that clip."""
        return RADIUS_SHARE * float(np.sqrt(self.size * self.layers))


def scale_of(case: Case, client: int) -> float:
    """What a client's random numbers are multiplied by: distances are apart, so that every convention selects alike."""
    return 1 + client / case.clients


@functools.cache
def buffers_of(case: Case) -> list[np.ndarray]:
    """Each client's whole model in one piece of memory."""
    models = []
    for client in range(case.clients):
        numbers = np.random.default_rng(client).standard_normal(case.size * case.layers, np.float32)
        models.append(np.multiply(numbers, np.float32(scale_of(case, client)), out=numbers))
    return models


def updates_of(case: Case) -> list[Layers]:
    """The same as layers."""
    return [np.split(model, case.layers) for model in buffers_of(case)]


# The answers that can be told without the rule's distances: of clients of growing scale the first are selected.


def expected(case: Case) -> list[np.ndarray] | None:
    """The first elements of every layer in float64; None for a rule that is held against tests/ alone."""
    answer = _ANSWERS.get(case.rule)
    if answer is None:
        return None
    columns = [np.stack([update[layer][:CHECKED] for update in updates_of(case)]) for layer in range(case.layers)]
    return [answer(column.astype(np.float64), case.hostile) for column in columns]


def _trimmed(x: np.ndarray, f: int) -> np.ndarray:
    return np.sort(x, axis=0)[f : len(x) - f].mean(axis=0)


def _near_median(x: np.ndarray, f: int) -> np.ndarray:
    chosen = x[: len(x) - 2 * f]
    nearest = np.argsort(np.abs(chosen - np.median(chosen, axis=0)), axis=0, kind="stable")[: len(chosen) - 2 * f]
    return np.take_along_axis(chosen, nearest, axis=0).mean(axis=0)


_ANSWERS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "statistics": lambda x, f: x.mean(axis=0),
    "median": lambda x, f: np.median(x, axis=0),
    "trimmed_mean": _trimmed,
    "krum": lambda x, f: x[0],
    "multi_krum": lambda x, f: x[: len(x) - f].mean(axis=0),
    "bulyan": _near_median,
}

# fastagg

_RULES: dict[str, Callable[..., Layers]] = {
    "statistics": lambda updates, case, **options: fastagg.fedavg(updates, stats=True, **options)[0],
    "median": lambda updates, case, **options: robust.median(updates, **options),
    "trimmed_mean": lambda updates, case, **options: robust.trimmed_mean(updates, case.hostile, **options),
    "meamed": lambda updates, case, **options: robust.meamed(updates, case.hostile, **options),
    "phocas": lambda updates, case, **options: robust.phocas(updates, case.hostile, **options),
    "krum": lambda updates, case, **options: robust.krum(updates, case.hostile, **options),
    "multi_krum": lambda updates, case, **options: robust.multi_krum(updates, case.hostile, **options),
    "bulyan": lambda updates, case, **options: robust.bulyan(updates, case.hostile, **options),
    "geometric_median": lambda updates, case, **options: robust.geometric_median(updates, **options),
    "centered_clip": lambda updates, case, **options: robust.centered_clip(updates, case.radius, **options),
    "norm_clip": lambda updates, case, **options: robust.norm_clip(updates, case.radius, **options),
    "fltrust": lambda updates, case, **options: robust.fltrust(updates, updates[0], **options),
    "nearest_neighbor_mixing, median": lambda updates, case, **options: robust.median(
        robust.nearest_neighbor_mixing(updates, case.hostile), **options
    ),
    "bucketing, geometric_median": lambda updates, case, **options: robust.geometric_median(
        robust.bucketing(updates, 2, seed=0), **options
    ),
}
RULES = tuple(_RULES)
FASTAGG, FASTAGG_OUT, PLAIN = "fastagg", "fastagg, out=", "fastagg, out=, without statistics"
LEGACY, SERVER_APP = "Flower", "Flower, ServerApp"


def _fastagg(case: Case) -> Call:
    updates = updates_of(case)
    return lambda: _RULES[case.rule](updates, case)


def _fastagg_into(case: Case) -> Call:
    updates, out = updates_of(case), [np.ones(case.size, np.float32) for _ in range(case.layers)]
    return lambda: _RULES[case.rule](updates, case, out=out)


def _plain(case: Case) -> Call:
    updates, out = updates_of(case), [np.ones(case.size, np.float32) for _ in range(case.layers)]
    return lambda: fastagg.fedavg(updates, out=out)


# Flower


def _imported(module: str) -> Any:
    """A module of Flower's; its own imports may warn of names that are going away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _legacy(case: Case) -> Call:
    """The functions of Flower's older strategies, which take arrays; every client has one example."""
    flower = _imported("flwr.server.strategy.aggregate")
    results, f = [(update, 1) for update in updates_of(case)], case.hostile
    calls: dict[str, Call] = {
        "median": lambda: flower.aggregate_median(results),
        "trimmed_mean": lambda: flower.aggregate_trimmed_avg(results, (f + 0.5) / case.clients),
        "krum": lambda: flower.aggregate_krum(results, f, 0),
        "multi_krum": lambda: flower.aggregate_krum(results, f, case.clients - f),
        "bulyan": lambda: flower.aggregate_bulyan(list(results), f, flower.aggregate_krum, to_keep=0),
    }
    return calls[case.rule]


def _server_app(case: Case) -> Call:
    """What Flower's message API calls, on records that give their arrays without reading them from bytes."""
    app = _imported("flwr.app")
    multikrum, bulyan = (_imported(f"flwr.serverapp.strategy.{name}") for name in ("multikrum", "bulyan"))
    aggregate = _imported("flwr.server.strategy.aggregate").aggregate

    class ReadRecord(app.ArrayRecord):  # type: ignore[misc]
        """A record whose arrays have been read."""

        def __init__(self, layers: Layers) -> None:
            super().__init__()
            self.layers = layers

        def to_numpy_ndarrays(self, *, keep_input: bool = True) -> Layers:
            return self.layers

    contents = [app.RecordDict({"arrays": ReadRecord(update)}) for update in updates_of(case)]

    def selected(count: int) -> list[Layers]:
        return [chosen["arrays"].layers for chosen in multikrum.select_multikrum(contents, case.hostile, count)]

    def by_bulyan() -> Layers:
        chosen = selected(case.clients - 2 * case.hostile)
        medians = [np.median(column, axis=0) for column in zip(*chosen, strict=True)]
        return bulyan.aggregate_n_closest_weights(medians, chosen, len(chosen) - 2 * case.hostile)

    calls: dict[str, Call] = {
        "krum": lambda: selected(1)[0],
        "multi_krum": lambda: aggregate([(layers, 1) for layers in selected(case.clients - case.hostile)]),
        "bulyan": by_bulyan,
    }
    return calls[case.rule]


CONTENDERS: dict[str, Callable[[Case], Call]] = {
    FASTAGG: _fastagg,
    FASTAGG_OUT: _fastagg_into,
    PLAIN: _plain,
    LEGACY: _legacy,
    SERVER_APP: _server_app,
}


def contenders_of(case: Case) -> list[str]:
    """Who has the case's rule."""
    if case.rule == "statistics":
        return [FASTAGG_OUT, PLAIN]
    if case.rule in ("median", "trimmed_mean"):
        return [FASTAGG, FASTAGG_OUT, LEGACY]
    return [FASTAGG, FASTAGG_OUT, LEGACY, SERVER_APP] if case.rule in _ANSWERS else [FASTAGG]
