"""What clients' updates look like, leaf by leaf, and how they lie to their mean."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

__all__ = ["QUANTITIES", "Statistics"]

# The columns of what the native code finds of a client's leaf: `struct Moments` of csrc/core/types.h.
_FINITE, _NONFINITE, _MEAN, _DEVIATIONS, _MINIMUM, _MAXIMUM, _PRODUCTS, _DISTANCES, _REFERENCE = range(9)
MOMENTS = 9

QUANTITIES = (
    *("norm", "mean", "standard_deviation", "minimum", "maximum"),
    *("nonfinite", "cosine", "distance", "mean_norm"),
)


class Statistics:
    """A table of numbers about each client's floating leaves x, and about the mean m that they went into.

    NaN and infinity count for nothing but `nonfinite`: of x they are left out of every number, of m out of the last
    three. A leaf without a finite value has norm 0 and mean, standard deviation, minimum and maximum NaN. Numbers are
    within 1e-6 of float64's: cosines by difference, means in proportion to the mean of |x|, all others to themselves.
    Squares of fp64 values beyond 1e154 overflow: norms and distances are then infinite.

    Attributes:
        clients: their labels: numbers, unless `with_clients` gave others.
        leaves: the names of the floating leaves; "array" for updates that are a single array.
        elements: int64 (leaves,), elements of each leaf.
        weights: float64 (clients,), as given: of a client that was dropped, too.
        norm: float64 (clients, leaves), as all that follow: ``sqrt(sum x^2)``.
        mean: ``sum x / n``, n the finite values.
        standard_deviation: ``sqrt(sum (x - mean)^2 / n)``.
        minimum: the smallest value.
        maximum: the largest value.
        nonfinite: int64, how many values are NaN or infinite.
        cosine: ``sum x m / (norm * mean_norm)``; 0 where one of the two is zero.
        distance: ``sqrt(sum (x - m)^2)``.
        mean_norm: ``sqrt(sum m^2)``, the same for all clients that were averaged in one pass.
    """

    clients: tuple[Any, ...]
    leaves: tuple[Any, ...]
    elements: np.ndarray
    weights: np.ndarray
    norm: np.ndarray
    mean: np.ndarray
    standard_deviation: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    nonfinite: np.ndarray
    cosine: np.ndarray
    distance: np.ndarray
    mean_norm: np.ndarray

    def __init__(
        self,
        clients: Iterable[Any],
        leaves: Iterable[Any],
        elements: Any,
        weights: Any,
        **quantities: Any,
    ) -> None:
        """A table of its columns, each of shape (clients, leaves).

        Raises:
            TypeError: a quantity is missing, or there is none of this name.
            ValueError: a shape does not fit.
        """
        self.clients, self.leaves = as_labels(clients), tuple(leaves)
        self.elements = _column("elements", elements, np.int64, (len(self.leaves),))
        self.weights = _column("weights", weights, np.float64, (len(self.clients),))
        if quantities.keys() != set(QUANTITIES):
            wrong = ", ".join(sorted(quantities.keys() ^ set(QUANTITIES)))
            raise TypeError(f"Statistics: missing or unknown: {wrong}")
        for name in QUANTITIES:
            dtype = np.int64 if name == "nonfinite" else np.float64
            shape = (len(self.clients), len(self.leaves))
            setattr(self, name, _column(name, quantities[name], dtype, shape))

    @classmethod
    def from_moments(
        cls, clients: Iterable[Any], leaves: Iterable[Any], elements: Any, weights: Any, moments: np.ndarray
    ) -> Statistics:
        """The table of what the native code found: float64 (clients, leaves, MOMENTS)."""
        columns = np.moveaxis(moments, -1, 0)
        finite, deviations = columns[_FINITE], columns[_DEVIATIONS]
        norm = np.hypot(np.sqrt(deviations), np.sqrt(finite) * columns[_MEAN])
        mean_norm = np.sqrt(columns[_REFERENCE])
        with np.errstate(invalid="ignore"):  # where squares have overflowed
            cosine = np.clip(_divided(columns[_PRODUCTS], norm * mean_norm, 0.0), -1, 1)
        return cls(
            clients,
            leaves,
            elements,
            weights,
            norm=norm,
            mean=np.where(finite > 0, columns[_MEAN], np.nan),
            standard_deviation=np.sqrt(_divided(deviations, finite, np.nan)),
            minimum=np.where(finite > 0, columns[_MINIMUM], np.nan),
            maximum=np.where(finite > 0, columns[_MAXIMUM], np.nan),
            nonfinite=columns[_NONFINITE],
            cosine=cosine,
            distance=np.sqrt(columns[_DISTANCES]),
            mean_norm=mean_norm,
        )

    def whole(self) -> Statistics:
        """The statistics of whole updates: the same table with the one leaf "all", merged without loss.

        Means and deviations by Chan, Golub and LeVeque (1979), weighted by the leaves' finite values.
        """
        finite = self.elements - self.nonfinite
        mean = np.where(finite > 0, self.mean, 0.0)
        counts = finite.sum(axis=1, keepdims=True)
        center = _divided((finite * mean).sum(axis=1, keepdims=True), counts, np.nan)
        variance = np.where(finite > 0, self.standard_deviation**2 + (mean - center) ** 2, 0.0)
        norm, mean_norm = _root_of_squares(self.norm), _root_of_squares(self.mean_norm)
        with np.errstate(invalid="ignore"):  # where squares have overflowed
            products = (self.cosine * self.norm * self.mean_norm).sum(axis=1, keepdims=True)
        return Statistics(
            self.clients,
            ("all",),
            [self.elements.sum()],
            self.weights,
            norm=norm,
            mean=center,
            standard_deviation=np.sqrt(_divided((finite * variance).sum(axis=1, keepdims=True), counts, np.nan)),
            minimum=_extreme(np.fmin, self.minimum),
            maximum=_extreme(np.fmax, self.maximum),
            nonfinite=self.nonfinite.sum(axis=1, keepdims=True),
            cosine=np.clip(_divided(products, norm * mean_norm, 0.0), -1, 1),
            distance=_root_of_squares(self.distance),
            mean_norm=mean_norm,
        )

    def with_clients(self, labels: Sequence[Any]) -> Statistics:
        """The same table under other labels, such as a server's names of its nodes.

        Raises:
            ValueError: there is not one for each client.
        """
        labels = tuple(labels)
        if len(labels) != len(self.clients):
            raise ValueError(f"labels: expected {len(self.clients)}, one for each client, got {len(labels)}")
        return Statistics(labels, self.leaves, self.elements, self.weights, **self._quantities())

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON: NaN and infinity become null and "inf" or "-inf"."""
        return {
            "clients": [_plain_label(label) for label in self.clients],
            "leaves": [_plain_label(name) for name in self.leaves],
            "elements": self.elements.tolist(),
            "weights": self.weights.tolist(),
            **{name: [[_plain(x) for x in row] for row in column.tolist()] for name, column in self._items()},
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Statistics:
        """The table that `as_dict` described.

        Raises:
            ValueError: something is missing or does not fit.
        """
        try:
            fixed = [plain[name] for name in ("clients", "leaves", "elements", "weights")]
            shape = (len(fixed[0]), len(fixed[1]))
            quantities = {name: _numbers(plain[name]).reshape(shape) for name in QUANTITIES}
            return cls(*fixed, **quantities)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"statistics: expected what Statistics.as_dict() returned: {error!r}") from error

    def to_pandas(self) -> Any:
        """A DataFrame of one row a client and leaf: client, leaf, weight, elements, and the quantities.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ModuleNotFoundError:
            raise ModuleNotFoundError("Statistics.to_pandas needs pandas: pip install pandas") from None
        leaves = len(self.leaves)
        return pandas.DataFrame(
            {
                "client": [client for client in self.clients for _ in range(leaves)],
                "leaf": list(self.leaves) * len(self.clients),
                "weight": np.repeat(self.weights, leaves),
                "elements": np.tile(self.elements, len(self.clients)),
                **{name: column.reshape(-1) for name, column in self._items()},
            }
        )

    def to_tensorboard(self, writer: Any, step: int) -> None:
        """Writes whole updates' numbers as one scalar a client, and each leaf's as a histogram over the clients.

        Args:
            writer: torch.utils.tensorboard.SummaryWriter, or anything with its add_scalar and add_histogram.
            step: the round.
        """
        for name, column in self.whole()._items():
            for client, value in zip(self.clients, column[:, 0].tolist(), strict=True):
                writer.add_scalar(f"{name}/client {client}", value, step)
        for name, column in self._items():
            for leaf, values in zip(self.leaves, column.T, strict=True):
                finite = values[np.isfinite(values)]
                if finite.size:
                    writer.add_histogram(f"{name}/leaf {leaf}", finite, step)

    def __repr__(self) -> str:
        return f"Statistics({len(self.clients)} clients, {len(self.leaves)} leaves)"

    def _items(self) -> Iterable[tuple[str, np.ndarray]]:
        return self._quantities().items()

    def _quantities(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in QUANTITIES}


def as_labels(labels: Iterable[Any]) -> tuple[Any, ...]:
    """Clients' labels, NumPy's numbers as Python's, so that they can be written as JSON.

    Raises:
        TypeError: one cannot be looked up, such as a list.
    """
    plain = tuple(label.item() if isinstance(label, np.generic) else label for label in labels)
    for label in plain:
        if not isinstance(label, Hashable):
            raise TypeError(f"labels: expected numbers, texts or other hashable values, got {label!r}")
    return plain


def by_client(moments: np.ndarray, floats: list[int], clients: int) -> np.ndarray:
    """The native code's moments (all leaves, clients, MOMENTS) as (clients, floating leaves, MOMENTS)."""
    return np.swapaxes(moments[floats], 0, 1) if floats else np.empty((clients, 0, MOMENTS))


def _column(name: str, values: Any, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of the table's own.

    Raises:
        ValueError: its shape is another one, or it holds no integers where it must.
    """
    column = np.array(values)
    if dtype is np.int64 and column.dtype.kind == "f" and not (np.abs(column) < 2.0**63).all():
        raise ValueError(f"{name}: expected integers, got NaN, infinity or one that is too large")
    column = column.astype(dtype)
    if column.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {column.shape}")
    return column


def _divided(dividend: np.ndarray, divisor: np.ndarray, otherwise: float) -> np.ndarray:
    """The quotients; another number where the divisor is zero."""
    quotients = np.full(dividend.shape, otherwise)
    np.divide(dividend, divisor, out=quotients, where=divisor != 0)
    return quotients


def _root_of_squares(column: np.ndarray) -> np.ndarray:
    """The norm over all leaves; infinite where squares overflow."""
    with np.errstate(over="ignore"):
        return np.asarray(np.sqrt((column**2).sum(axis=1, keepdims=True)))


def _extreme(smaller_or_larger: np.ufunc, column: np.ndarray) -> np.ndarray:
    """The extreme over all leaves that have one."""
    return np.asarray(smaller_or_larger.reduce(column, axis=1, keepdims=True, initial=np.nan))


def _plain_label(label: Any) -> Any:
    return label if isinstance(label, (str, int, float)) or label is None else str(label)


def _plain(number: float) -> Any:
    if math.isfinite(number):
        return number
    return None if math.isnan(number) else str(number)


def _numbers(rows: Any) -> np.ndarray:
    return np.array([[math.nan if x is None else float(x) for x in row] for row in rows], np.float64)
