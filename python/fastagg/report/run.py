"""The record of a training run: what every round's clients sent, who was an outlier, how the model fared."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastagg._quoting import printable, quoted
from fastagg.files.atomic import atomic_file
from fastagg.files.plain_file import read_plain
from fastagg.outliers import Findings, times_flagged
from fastagg.plots.models import Histogram, LayerComparison, compare_models, weight_histograms
from fastagg.robust.arguments import as_count
from fastagg.statistics import Statistics

FORMAT = "fastagg run"
VERSION = 1
_NONFINITE = "$float"  # JSON has no NaN and no infinity
_LARGEST_FILE = 1 << 30  # bytes
_MOST_BITS = 14_000  # of an integer that Python writes: 4300 digits


@dataclass
class Round:
    """One round; what was not recorded is None, or empty.

    Attributes:
        number: of the round.
        statistics: what the clients sent.
        findings: the Outlier Explorer's.
        metrics: such as loss and accuracy, name -> value.
        cosines: float64 (clients, clients), between the clients' updates.
    """

    number: int
    statistics: Statistics | None = None
    findings: Findings | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    cosines: np.ndarray | None = None

    @property
    def clients(self) -> tuple[Any, ...]:
        """The labels of the clients, as far as anything of them was recorded."""
        source = self.statistics or self.findings
        return () if source is None else source.clients


@dataclass
class Comparison:
    """Two models, layer by layer."""

    first: str
    second: str
    rows: list[LayerComparison]


@dataclass
class Run:
    """A training run as `fastagg report` shows it.

    Attributes:
        title: the report's.
        rounds: in the order in which they were recorded.
        models: name -> the distribution of every leaf.
        comparisons: of two models each.
    """

    title: str = "Federated run"
    rounds: list[Round] = field(default_factory=list)
    models: dict[str, list[Histogram]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)

    def record(
        self,
        round: int | None = None,
        *,
        statistics: Statistics | None = None,
        findings: Findings | None = None,
        metrics: Mapping[str, float] | None = None,
        cosines: Any = None,
    ) -> None:
        """Adds what is known of a round.

        Args:
            round: its number; None for the findings' round, or the one after the last.
            statistics: of ``fedavg(..., stats=True)``; `statistics.whole()` keeps the file small.
            findings: of `Explorer.explore`.
            metrics: numbers such as the loss; a curve is drawn of each.
            cosines: (clients, clients), of `outliers.pairwise_cosines` or `Sketch.cosines`, in the clients' order.

        Raises:
            TypeError, ValueError: what is given is of another type, a metric is no number, the round none of 0 or more
                or there already, the findings or cosines are of other clients than the statistics.
        """
        _check_types(statistics, findings, metrics)
        if round is None:
            last = self.rounds[-1].number if self.rounds else 0
            round = findings.round if findings is not None else last + 1
        round = as_count(round, "round")
        for source in (statistics, findings):
            for client in () if source is None else source.clients:
                if not isinstance(client, (int, str)):
                    raise TypeError(f"client {quoted(client)}: expected a label that is a number or a text, for JSON")
                if isinstance(client, int) and client.bit_length() > _MOST_BITS:
                    raise ValueError(f"client {quoted(client)}: expected a number of less than 4300 digits, or a text")
        if any(known.number == round for known in self.rounds):
            raise ValueError(f"round {round} has been recorded already")
        new = Round(round, statistics, findings, _as_metrics(metrics or {}))
        if statistics is not None and findings is not None and findings.clients != statistics.clients:
            raise ValueError(f"round {round}: the findings are of other clients than the statistics")
        if cosines is not None:
            new.cosines = np.asarray(cosines, np.float64)
            if not new.clients or new.cosines.shape != (len(new.clients),) * 2:
                raise ValueError(
                    f"cosines: expected shape {(len(new.clients),) * 2}, one row and column for each client of the "
                    f"statistics or findings, got {new.cosines.shape}"
                )
        self.rounds.append(new)

    def add_model(self, name: str, model: Any, *, bins: int = 50) -> None:
        """Adds the distribution of a model's weights.

        Raises:
            TypeError, ValueError: as for `weight_histograms`.
        """
        self.models[name] = weight_histograms(model, bins)

    def compare(self, first_name: str, first: Any, second_name: str, second: Any) -> list[LayerComparison]:
        """Adds the comparison of two models, and returns its rows.

        Raises:
            TypeError, ValueError: as for `compare_models`.
        """
        self.comparisons.append(Comparison(first_name, second_name, compare_models(first, second)))
        return self.comparisons[-1].rows

    @property
    def clients(self) -> list[Any]:
        """All clients of all rounds: numbers first, then texts, with the numbers in them in their order."""
        return sorted({client for one in self.rounds for client in one.clients}, key=_natural_order)

    def flagged(self, rounds: int = 1) -> dict[Any, int]:
        """Clients that were outliers in at least so many rounds, and in how many; the most often flagged first."""
        return times_flagged((one.findings for one in self.rounds if one.findings is not None), rounds)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the run as JSON, in one step: what was at `path` stays until the new file is complete.

        Raises:
            OSError: it cannot be written.
        """
        plain = {
            "format": FORMAT,
            "version": VERSION,
            "title": self.title,
            "rounds": [_round_as_dict(one) for one in self.rounds],
            "models": {name: [_histogram_as_dict(leaf) for leaf in leaves] for name, leaves in self.models.items()},
            "comparisons": [
                {"first": one.first, "second": one.second, "rows": [row._asdict() for row in one.rows]}
                for one in self.comparisons
            ],
        }
        text = json.dumps(_without_nonfinite(plain), allow_nan=False, separators=(",", ":"))
        with atomic_file(Path(path), force=True) as descriptor, os.fdopen(os.dup(descriptor), "w") as file:
            file.write(text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Reads what `save` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no run, of another version, truncated or damaged; the message names the file.
        """
        plain = _read(Path(path))
        try:
            run = cls(
                _as_text(plain["title"]),
                models={name: [_histogram_of(leaf) for leaf in leaves] for name, leaves in plain["models"].items()},
                comparisons=[_comparison_of(one) for one in plain["comparisons"]],
            )
            for one in plain["rounds"]:
                run.record(as_count(one["number"], "round"), **_record_of(one))
            return run
        except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {printable(str(error), 300)}") from error


def _natural_order(label: int | str) -> tuple[Any, ...]:
    """So that site9 comes before site10."""
    if not isinstance(label, str):
        return (0, label)
    return (1, *map(_by_size, re.findall(r"[0-9]+|[^0-9]+", label)))


def _by_size(part: str) -> tuple[Any, ...]:
    """Digits by the number that they are, which may be too long for Python to read; other text as it is."""
    if not "0" <= part[0] <= "9":
        return (False, part)
    digits = part.lstrip("0")
    return (True, len(digits), digits)


def _check_types(statistics: Any, findings: Any, metrics: Any) -> None:
    """Raises TypeError for a part of a round's record that is not what `Run.record` takes."""
    for name, value, kind, words in (
        ("statistics", statistics, Statistics, "the Statistics of fedavg(..., stats=True)"),
        ("findings", findings, Findings, "the Findings of Explorer.explore"),
        ("metrics", metrics, Mapping, "a mapping from names to numbers"),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name}: expected {words}, got {type(value).__name__}")


def _as_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for name, value in metrics.items():
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            found[str(name)] = float(value)
        except (OverflowError, TypeError, ValueError):
            raise TypeError(f"metric {quoted(name)}: expected a number, got {quoted(value)}") from None
    return found


def _read(path: Path) -> dict[str, Any]:
    text = read_plain(path, _LARGEST_FILE)
    try:
        plain = json.loads(text, object_hook=_with_nonfinite)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no run of fastagg: it is not text") from None
    except (RecursionError, ValueError) as error:
        what = "is truncated, or no run of fastagg" if FORMAT.encode() in text[:100] else "is no run of fastagg"
        raise ValueError(f"{path} {what}: {printable(str(error), 300)}") from None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ValueError(f"{path} is no run of fastagg: it does not say {FORMAT!r}")
    if plain.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {quoted(plain.get('version'))}, and this fastagg reads version {VERSION}"
        )
    return plain


def _round_as_dict(one: Round) -> dict[str, Any]:
    return {
        "number": one.number,
        "statistics": None if one.statistics is None else one.statistics.as_dict(),
        "findings": None if one.findings is None else one.findings.as_dict(),
        "metrics": one.metrics,
        "cosines": None if one.cosines is None else one.cosines.tolist(),
    }


def _record_of(plain: dict[str, Any]) -> dict[str, Any]:
    """What `Run.record` was told of a round."""
    statistics, findings = plain["statistics"], plain["findings"]
    return {
        "statistics": None if statistics is None else Statistics.from_dict(statistics),
        "findings": None if findings is None else Findings.from_dict(findings),
        "metrics": plain["metrics"],
        "cosines": plain["cosines"],
    }


def _histogram_as_dict(leaf: Histogram) -> dict[str, Any]:
    return {**leaf._asdict(), "counts": leaf.counts.tolist()}


def _histogram_of(plain: dict[str, Any]) -> Histogram:
    counts, limits = np.array(plain["counts"], np.int64), (float(plain["minimum"]), float(plain["maximum"]))
    if counts.ndim != 1 or not counts.size or not np.isfinite(limits).all():
        raise ValueError(f"counts: expected one number a bin between finite limits, got {counts.shape}, {limits}")
    return Histogram(_as_text(plain["leaf"]), counts, *limits, as_count(plain["nonfinite"], "nonfinite"))


def _comparison_of(plain: dict[str, Any]) -> Comparison:
    return Comparison(_as_text(plain["first"]), _as_text(plain["second"]), [_row_of(row) for row in plain["rows"]])


def _row_of(plain: dict[str, Any]) -> LayerComparison:
    leaf, elements, *numbers = (plain[name] for name in LayerComparison._fields)
    return LayerComparison(_as_text(leaf), as_count(elements, "elements"), *map(float, numbers))


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {quoted(value)}")
    return value


def _without_nonfinite(plain: Any) -> Any:
    """The same with ``{"$float": "nan"}`` for floats that JSON has no name for."""
    if isinstance(plain, float):
        return plain if math.isfinite(plain) else {_NONFINITE: str(plain)}
    if isinstance(plain, dict):
        return {key: _without_nonfinite(value) for key, value in plain.items()}
    if isinstance(plain, (list, tuple)):
        return [_without_nonfinite(value) for value in plain]
    return plain


def _with_nonfinite(plain: dict[str, Any]) -> Any:
    text = plain.get(_NONFINITE)
    return float(text) if isinstance(text, str) and len(plain) == 1 else plain
