"""The Outlier Explorer: scores the clients of each round, says why, and what the aggregation shall do about it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastagg._updates.weights import as_weights
from fastagg.outliers.features import Features, deviations, features_of, leaf_allowance
from fastagg.outliers.reasons import notable_limits, reasons_for
from fastagg.outliers.scores import METHODS, worst_deviations
from fastagg.outliers.sketches import Sketch
from fastagg.robust.arguments import as_count, as_positive

if TYPE_CHECKING:
    from fastagg.statistics import Statistics

ACTIONS = ("report", "drop", "down_weight")
_SEEDS = 2**32
FEWEST = 3  # clients without a NaN: of two, nobody can say which one is unusual


@dataclass(frozen=True)
class Findings:
    """What the Explorer found in one round.

    Attributes:
        round: its number.
        clients: labels, one a client.
        scores: float64 (clients,), in spreads; above `threshold` a client is an outlier. Infinite for a client with
            non-finite values.
        outliers: the outliers' labels, each with its reasons in words.
        leaves: names of the leaves.
        leaf_scores: float64 (clients, leaves), how many spreads the most unusual feature of a leaf lies from the
            median; infinite for a leaf with non-finite values.
        method, threshold, action: the Explorer's.
    """

    round: int
    clients: tuple[Any, ...]
    scores: np.ndarray
    outliers: dict[Any, tuple[str, ...]]
    leaves: tuple[str, ...]
    leaf_scores: np.ndarray
    method: str
    threshold: float
    action: str

    def __repr__(self) -> str:
        return f"Findings(round={self.round}, {len(self.clients)} clients, outliers={list(self.outliers)})"

    def weights(self, original: Any = None) -> list[float]:
        """The weights to aggregate with, in the order of the clients.

        "report" leaves them as they are, "drop" gives outliers 0, and "down_weight" gives them
        ``weight * threshold / score``, which is 0 for a client with non-finite values.

        Args:
            original: the clients' weights, as for `fedavg`; None for equal ones.

        Raises:
            TypeError, ValueError: as for `fedavg`'s weights, or no weight is left.
        """
        weights = as_weights(original, len(self.clients))
        if self.action == "report":
            return weights
        changed = [
            weight if client not in self.outliers else self._reduced(weight, score)
            for client, weight, score in zip(self.clients, weights, self.scores.tolist(), strict=True)
        ]
        if not any(changed):
            raise ValueError(f"round {self.round}: every client of a weight other than 0 is an outlier, none is left")
        return changed

    def _reduced(self, weight: float, score: float) -> float:
        return 0.0 if self.action == "drop" or math.isinf(score) else weight * self.threshold / score

    def as_dict(self) -> dict[str, Any]:
        """Plain values; infinite scores stay floats."""
        return {
            "round": self.round,
            "clients": list(self.clients),
            "scores": self.scores.tolist(),
            "outliers": [[client, list(reasons)] for client, reasons in self.outliers.items()],
            "leaves": list(self.leaves),
            "leaf_scores": self.leaf_scores.tolist(),
            "method": self.method,
            "threshold": self.threshold,
            "action": self.action,
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Findings:
        """The findings that `as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: something is missing, or is not what `as_dict` gives.
        """
        clients, leaves = tuple(plain["clients"]), tuple(map(str, plain["leaves"]))
        outliers = {client: tuple(map(str, reasons)) for client, reasons in plain["outliers"]}
        if strangers := outliers.keys() - set(clients):
            raise ValueError(f"outliers: {strangers} are not among the clients")
        found_by = Explorer(plain["method"], plain["threshold"], plain["action"])  # which checks them
        return cls(
            as_count(plain["round"], "round"),
            clients,
            np.array(plain["scores"], np.float64).reshape(len(clients)),
            outliers,
            leaves,
            np.array(plain["leaf_scores"], np.float64).reshape(len(clients), len(leaves)),
            found_by.method,
            found_by.threshold,
            found_by.action,
        )


@dataclass
class Explorer:
    """Finds unusual clients, round after round.

    Every client's norm, distance from the centre, largest value and cosine to the centre, of the whole update and of
    each leaf, are put in spreads of all clients (see `features.deviations`) and scored:

    - "zscore": the largest deviation of any feature; a leaf's counts a little less, the less the more leaves there are.
    - "kmeans", "local_outlier_factor", "isolation_forest": of the whole update's deviations and each kind's most
      extreme leaf; by scikit-learn, and best with ten clients or more.

    A score above `threshold` makes an outlier, and a NaN or an infinity always does. Where fewer than three clients are
    free of those, or all are alike, there are no other outliers.

    Statistics are of what the clients sent: differences from the global model tell directions, whole models hardly do.
    A `Sketch` takes the difference itself (`reference=`), and its centre is one that a minority hardly moves.

    Attributes:
        method: "zscore", "kmeans", "local_outlier_factor" or "isolation_forest".
        threshold: in spreads. The default is that of Iglewicz and Hoaglin (1993).
        action: what `Findings.weights` does: "report", "drop" or "down_weight".
        seed: of the methods that draw random numbers.
        history: the findings so far.
    """

    method: str = "zscore"
    threshold: float = 3.5
    action: str = "report"
    seed: int = 0
    history: list[Findings] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, METHODS), ("action", self.action, ACTIONS)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        self.threshold, self.seed = as_positive(self.threshold, "threshold"), as_count(self.seed, "seed")
        if self.seed >= _SEEDS:
            raise ValueError(f"seed: expected a number below 2**32, as scikit-learn does, got {self.seed}")

    def explore(self, source: Statistics | Sketch, round: int | None = None) -> Findings:
        """Finds the outliers of a round and remembers them.

        Args:
            source: the `Statistics` of ``fedavg(..., stats=True)``, or a `Sketch`.
            round: its number; None for the one after the last.

        Raises:
            TypeError: `source` is neither, or the round no integer.
            ValueError: it holds no client, or one label twice; the round is negative.
            ModuleNotFoundError: the method needs scikit-learn.
        """
        features = features_of(source)
        tables = deviations(features)
        scores = self._scores(features, tables)
        allowance = leaf_allowance(self.threshold, len(features.leaves))
        limits = notable_limits(self.method, self.threshold, allowance)
        outliers = {
            features.clients[client]: reasons_for(client, features, tables, limits, self.method, scores[client])
            for client in np.flatnonzero(scores > self.threshold).tolist()
        }
        if round is None:
            round = self.history[-1].round + 1 if self.history else 1
        round = as_count(round, "round")
        found = Findings(
            round,
            features.clients,
            scores,
            outliers,
            features.nonfinite_leaves,
            _leaf_scores(features, tables),
            self.method,
            self.threshold,
            self.action,
        )
        self.history.append(found)
        return found

    def flagged(self, rounds: int = 1) -> dict[Any, int]:
        """Clients that were outliers in at least so many rounds, and in how many; the most often flagged first."""
        return times_flagged(self.history, rounds)

    def _scores(self, features: Features, tables: dict[str, np.ndarray]) -> np.ndarray:
        scores = np.zeros(len(features.clients))
        usable = ~features.broken
        scores[~usable] = math.inf
        if usable.sum() >= FEWEST:
            worst = worst_deviations({name: table[usable] for name, table in tables.items()}, self.threshold)
            scores[usable] = METHODS[self.method](worst, self.seed)
        return scores


def times_flagged(history: Iterable[Findings], rounds: int = 1) -> dict[Any, int]:
    """Clients that were outliers in at least so many rounds, and in how many; the most often flagged first."""
    counts: Counter[Hashable] = Counter(client for found in history for client in found.outliers)
    return {client: count for client, count in counts.most_common() if count >= rounds}


def _leaf_scores(features: Features, tables: dict[str, np.ndarray]) -> np.ndarray:
    columns = slice(1, None) if features.leaves else slice(0, 1)
    scores: np.ndarray = np.maximum.reduce([np.abs(table[:, columns]) for table in tables.values()])
    return np.where(features.nonfinite > 0, math.inf, scores)
