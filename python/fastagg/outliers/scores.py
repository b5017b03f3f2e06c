"""The four scores of a client. All are in spreads of the clients, so that one threshold fits them all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastagg._extras import EXTRAS
from fastagg.outliers.features import NORMAL_CONSISTENCY, leaf_allowance

_JITTER = 0.5  # spreads; without it clients that are all but alike would be told apart by next to nothing
_BACKGROUND = 12  # points a client, and at least 256
_LARGEST_DEVIATION = 100.0  # spreads; beyond, one client's scale would hide all others


def worst_deviations(deviations: dict[str, np.ndarray], threshold: float) -> np.ndarray:
    """Float64 (clients, features): of every kind the whole update's deviation, and that of the leaf with the largest.

    A leaf's counts times `leaf_allowance`.
    """
    columns = []
    for table in deviations.values():
        columns.append(table[:, 0])
        if table.shape[1] > 1:
            leaves = table[:, 1:] * leaf_allowance(threshold, table.shape[1] - 1)
            columns.append(np.take_along_axis(leaves, np.abs(leaves).argmax(axis=1)[:, None], axis=1)[:, 0])
    return np.stack(columns, axis=1)


def zscore(worst: np.ndarray, seed: int) -> np.ndarray:
    """The largest deviation of any feature (Iglewicz and Hoaglin 1993, "modified z-score")."""
    scores: np.ndarray = np.abs(worst).max(axis=1)
    return scores


def kmeans(worst: np.ndarray, seed: int) -> np.ndarray:
    """Distance to the nearest of the cluster centres that stand for the majority.

    Two clusters (Lloyd's k-means); the largest ones that together hold more than half of the clients stand for the
    majority, so that hostile clients who agree with each other are no cluster to be close to. The distances are scored
    as norms are: by their logarithm, none below that of a usual client.
    """
    clusters = _sklearn("cluster")
    points = _points(worst)
    count = min(2, len(np.unique(points, axis=0)))
    model = clusters.KMeans(n_clusters=count, n_init=10, random_state=seed).fit(points)
    sizes = np.bincount(model.labels_, minlength=count)
    order = np.argsort(-sizes, kind="stable")
    enough = int(np.searchsorted(np.cumsum(sizes[order]), len(points) / 2, side="right")) + 1
    centres = model.cluster_centers_[order[:enough]]
    distances = np.linalg.norm(points[:, None] - centres, axis=2).min(axis=1)
    logarithms = np.log(np.maximum(distances, math.sqrt(points.shape[1])))
    above = logarithms - np.median(logarithms)
    spread = max(NORMAL_CONSISTENCY * float(np.median(np.abs(above))), 0.3)
    scores: np.ndarray = np.maximum(above, 0) / spread
    return scores


def local_outlier_factor(worst: np.ndarray, seed: int) -> np.ndarray:
    """How much thinner a client's neighbourhood is than its neighbours' own (Breunig et al. 2000).

    ``ln(LOF) / 0.25`` among the clients and the background, so that a score of 3.5 means 2.4 times thinner. More than
    half of the clients are everybody's neighbours: hostile ones who agree with each other need others.
    """
    neighbors = _sklearn("neighbors")
    points = _with_background(worst, seed)
    model = neighbors.LocalOutlierFactor(n_neighbors=max(20, len(worst) // 2 + 1)).fit(points)
    scores: np.ndarray = np.maximum(np.log(-model.negative_outlier_factor_[: len(worst)]) / 0.25, 0)
    return scores


def isolation_forest(worst: np.ndarray, seed: int) -> np.ndarray:
    """How few random cuts isolate a client (Liu, Ting and Zhou 2008).

    ``(s - median of the background's s) / 0.07``, where s, between 0 and 1, is the forest's anomaly score.
    """
    ensemble = _sklearn("ensemble")
    points = _with_background(worst, seed)
    model = ensemble.IsolationForest(n_estimators=100, random_state=seed).fit(points)
    anomaly = -model.score_samples(points)
    scores: np.ndarray = np.maximum((anomaly[: len(worst)] - np.median(anomaly[len(worst) :])) / 0.07, 0)
    return scores


METHODS = {
    "zscore": zscore,
    "kmeans": kmeans,
    "local_outlier_factor": local_outlier_factor,
    "isolation_forest": isolation_forest,
}


def _points(worst: np.ndarray) -> np.ndarray:
    points: np.ndarray = np.clip(worst, -_LARGEST_DEVIATION, _LARGEST_DEVIATION)
    return points


def _with_background(worst: np.ndarray, seed: int) -> np.ndarray:
    """The clients, blurred by half a spread, and standard normal points: what honest clients look like in spreads.

    The clients alone are too few to tell what is dense and what is thin, and hostile ones too large a part of them.
    """
    random = np.random.default_rng(seed)
    points = _points(worst)
    count = max(256, _BACKGROUND * len(points))
    return np.vstack([points + random.normal(0, _JITTER, points.shape), random.normal(0, 1, (count, points.shape[1]))])


def _sklearn(module: str) -> Any:
    """A module of scikit-learn."""
    from importlib import import_module

    try:
        return import_module(f"sklearn.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"This method of fastagg.outliers needs scikit-learn: {EXTRAS['report'].command}"
        ) from error
