"""Sketches: updates projected at random to so few dimensions that clients can be compared with each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastagg._updates.structure import as_list
from fastagg._updates.values import Leaf, blocks_of, columns_of
from fastagg.robust.arguments import as_count
from fastagg.statistics import as_labels


class Sketch(NamedTuple):
    """The sketched updates of one round.

    Attributes:
        clients: labels, one a client.
        leaves: names of the floating leaves.
        elements: int64 (leaves,), the leaves' numbers of elements.
        values: float64 (clients, leaves, dimensions); the sum over the leaves is the sketch of the whole update.
        largest: float64 (clients, leaves), the largest absolute finite value.
        nonfinite: int64 (clients, leaves), numbers of NaNs and infinities, which the sketch takes for zeros.
    """

    clients: tuple[Any, ...]
    leaves: tuple[str, ...]
    elements: np.ndarray
    values: np.ndarray
    largest: np.ndarray
    nonfinite: np.ndarray

    def __repr__(self) -> str:
        return f"Sketch({len(self.clients)} clients, {len(self.leaves)} leaves, {self.dimensions} dimensions)"

    @property
    def dimensions(self) -> int:
        """Dimensions of a leaf's sketch."""
        return int(self.values.shape[2])

    def cosines(self) -> np.ndarray:
        """Cosines between all pairs of clients, float64 (clients, clients), up to about 1 / sqrt(dimensions)."""
        return cosines_of_gram(whole_gram(self.values))


def sketch(
    updates: Iterable[Any],
    dimensions: int = 256,
    seed: int = 0,
    *,
    reference: Any = None,
    clients: Sequence[Any] | None = None,
) -> Sketch:
    """Projects every client's update, less `reference`, leaf by leaf.

    ``values[k, l, j] = sum over the elements i of leaf l with bucket(i) = j of sign(i) * (x[k, i] - reference[i])``

    with buckets and signs drawn uniformly from `seed`, the same ones for all clients (a count sketch: Charikar, Chen
    and Farach-Colton 2002; as random projection: Weinberger et al. 2009). Inner products, and so squared norms and
    distances, are unbiased; their standard deviation is at most sqrt(2 / dimensions) times the product of the norms.

    Args:
        updates: as for `fedavg`, of any floating dtypes and libraries; integer leaves are left out. One block of 65536
            elements of every client is held at a time (a `Quantized` leaf is decoded as a whole).
        dimensions: of each leaf's sketch.
        seed: of the buckets and signs; the same seed gives the same sketch.
        reference: the model that the clients started from, where the updates are whole models. Directions tell much
            less about whole models, which all point the same way.
        clients: labels, one an update; without, their numbers.

    Raises:
        TypeError, ValueError: no updates, updates of unlike structures or shapes, without a floating leaf, or
            dimensions, a seed or labels that do not fit.
    """
    updates = as_list(updates)
    dimensions, seed = as_count(dimensions, "dimensions", 1), as_count(seed, "seed")
    labels = as_labels(range(len(updates)) if clients is None else clients)
    if len(labels) != len(updates):
        raise ValueError(f"clients: expected {len(updates)} labels, one for each update, got {len(labels)}")
    names, sizes, parts = [], [], []
    for index, (name, leaves, base) in enumerate(columns_of(updates, reference)):
        names.append(name)
        sizes.append(leaves[0].elements)
        parts.append(_sketch_leaf(leaves, base, dimensions, np.random.default_rng((seed, index))))
    if not parts:
        raise ValueError("updates: expected at least one floating leaf, got none")
    values, largest, nonfinite = (np.stack(column, axis=1) for column in zip(*parts, strict=True))
    return Sketch(labels, tuple(names), np.array(sizes, np.int64), values, largest, nonfinite)


def _sketch_leaf(
    leaves: list[Leaf], base: Leaf | None, dimensions: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sketches, largest absolute values and numbers of non-finite values, one row a client."""
    values = np.zeros((len(leaves), dimensions))
    largest = np.zeros(len(leaves))
    nonfinite = np.zeros(len(leaves), np.int64)
    for rows in blocks_of(leaves, base):
        broken = ~np.isfinite(rows)
        nonfinite += broken.sum(axis=1)
        rows[broken] = 0
        largest = np.maximum(largest, np.abs(rows).max(axis=1))
        buckets = generator.integers(0, dimensions, rows.shape[1])
        rows *= generator.choice((-1.0, 1.0), rows.shape[1])
        for client, row in enumerate(rows):
            values[client] += np.bincount(buckets, row, dimensions)
    return values, largest, nonfinite


def pairwise_cosines(updates: Iterable[Any], *, reference: Any = None) -> np.ndarray:
    """Cosines between all pairs of clients: float64 (clients, clients), NaN where an update is zero or not finite.

    ``<x_j - reference, x_k - reference> / (|x_j - reference| |x_k - reference|)`` over all floating leaves.

    Raises:
        TypeError, ValueError: no updates, or updates of unlike structures or shapes.
    """
    updates = as_list(updates)
    gram = np.zeros((len(updates), len(updates)))
    with np.errstate(invalid="ignore", over="ignore"):
        for _, leaves, base in columns_of(updates, reference):
            for rows in blocks_of(leaves, base):
                gram += rows @ rows.T
    return cosines_of_gram(gram)


def whole_gram(values: np.ndarray) -> np.ndarray:
    """Inner products between the clients' whole sketches."""
    whole = values.sum(axis=1)
    product: np.ndarray = whole @ whole.T
    return product


def cosines_of_gram(gram: np.ndarray) -> np.ndarray:
    """Cosines from inner products; NaN for a vector that is zero or not finite."""
    norms = np.sqrt(np.diag(gram))
    cosines = np.full(gram.shape, np.nan)
    usable = np.isfinite(norms) & (norms > 0)
    pairs = np.ix_(usable, usable)
    cosines[pairs] = np.clip(gram[pairs] / np.outer(norms[usable], norms[usable]), -1, 1)
    return cosines
