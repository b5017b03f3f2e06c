"""A run as one HTML page: every plot and style inside it, nothing fetched."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastagg import plots
from fastagg._extras import EXTRAS
from fastagg._native.build import __version__
from fastagg.outliers.features import leaf_allowance
from fastagg.plots.drawing import import_matplotlib
from fastagg.report.run import Round, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_DIFFERENT, _MOST_METRICS, _MOST_PANELS = 10, 4, 48
_METHODS_IN_WORDS = {
    "zscore": "their most unusual feature (zscore)",
    "kmeans": "their distance from the clusters of the majority (kmeans)",
    "local_outlier_factor": "how thin their neighbourhood is (local_outlier_factor)",
    "isolation_forest": "how easily they are isolated (isolation_forest)",
}
_ACTIONS_IN_WORDS = {
    "report": "to leave their weight as it is (report)",
    "drop": "to leave them out (drop)",
    "down_weight": "to lower their weight (down_weight)",
}


class Plot(NamedTuple):
    """A figure of the page: an SVG as a data URI, and what it shows, for those who cannot see it."""

    uri: str
    alternative: str


class Outlier(NamedTuple):
    """A client that was an outlier: a row of the page's table."""

    client: Any
    flagged: int
    seen: int
    rounds: str
    score: str
    worst_round: int
    reasons: tuple[str, ...]


def render(run: Run) -> str:
    """The page of a run.

    Raises:
        ValueError: the run holds nothing to show.
        ModuleNotFoundError: matplotlib or jinja2 is missing.
    """
    if not (run.rounds or run.models or run.comparisons):
        raise ValueError("the run is empty: nothing has been recorded")
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Reports need jinja2: {EXTRAS['report'].command}") from error
    import_matplotlib()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    template = environment.from_string(files("fastagg.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(_context(run))


def number(value: float, digits: int = 3) -> str:
    """A number as a person writes it."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}g}".replace("-", "−")


def _context(run: Run) -> dict[str, Any]:
    outliers = outlier_rows(run)
    last = {name: value for recorded in run.rounds for name, value in recorded.metrics.items()}
    return {
        "title": run.title,
        "version": __version__,
        "rounds": len(run.rounds),
        "clients": run.clients,
        "explored": sum(recorded.findings is not None for recorded in run.rounds),
        "outliers": outliers,
        "often": [row for row in outliers if row.flagged > 1],
        "metrics": dict(list(last.items())[:_MOST_METRICS]),
        "methods": sorted({_method(recorded) for recorded in run.rounds if recorded.findings is not None}),
        "curves": _curves(run),
        "norms": _norms(run),
        "layers": _layers(run),
        "cosines": _cosines(run),
        "importance": _importance(run),
        "histograms": _histograms(run),
        "models": list(run.models),
        "panels": min(_MOST_PANELS, leaves := max((len(model) for model in run.models.values()), default=0)),
        "model_leaves": leaves,
        "comparisons": _comparisons(run),
    }


def _comparisons(run: Run) -> list[dict[str, Any]]:
    """What the page shows of each comparison of two models."""
    return [
        {
            "first": compared.first,
            "second": compared.second,
            "plot": _plot(
                plots.compare_models(compared.rows, compared.first, compared.second),
                f"Relative difference and cosine of every layer of {compared.first} and {compared.second}.",
            ),
            "rows": sorted(compared.rows, key=lambda row: -_at_the_end(row.relative_difference))[:_MOST_DIFFERENT],
            "count": len(compared.rows),
        }
        for compared in run.comparisons
        if compared.rows
    ]


def outlier_rows(run: Run) -> list[Outlier]:
    """The table of outliers: those that were it most often first, with the reasons of their worst round."""
    rows = []
    for client, times in run.flagged().items():
        scores = {}
        for recorded in run.rounds:
            if recorded.findings is not None and client in recorded.findings.outliers:
                scores[recorded.number] = float(recorded.findings.scores[recorded.findings.clients.index(client)])
        worst = max(scores, key=lambda number: scores[number])
        findings = next(recorded.findings for recorded in run.rounds if recorded.number == worst)
        assert findings is not None
        seen = sum(recorded.findings is not None and client in recorded.findings.clients for recorded in run.rounds)
        reasons = findings.outliers[client]
        score = number(scores[worst], 2 if scores[worst] < 100 else 3)
        rows.append(Outlier(client, times, seen, in_ranges(sorted(scores)), score, worst, reasons))
    return rows


def in_ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in short: "1–4, 7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in ranges)


def layer_shares(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Each layer's share of the squared norm of what clients sent, and its share of the elements.

    ``share_l = mean over the rounds of (sum over clients of w norm_l^2 / sum over clients and layers of w norm^2)``,
    outliers and clients with non-finite values left out.
    """
    sums: dict[str, float] = {}
    sizes: dict[str, float] = {}
    counted = 0
    for recorded in run.rounds:
        statistics = recorded.statistics
        if statistics is None or len(statistics.leaves) < 2:
            continue
        excluded = set() if recorded.findings is None else set(recorded.findings.outliers)
        usable = ~(statistics.nonfinite > 0).any(axis=1)
        kept = usable & np.array([client not in excluded for client in statistics.clients])
        squares = statistics.weights[kept] @ statistics.norm[kept] ** 2
        if not squares.sum() > 0:
            continue
        counted += 1
        for name, share in zip(statistics.leaves, (squares / squares.sum()).tolist(), strict=True):
            sums[str(name)] = sums.get(str(name), 0.0) + share
        shares = statistics.elements / statistics.elements.sum()
        sizes.update(zip(map(str, statistics.leaves), shares.tolist(), strict=True))
    return {name: total / counted for name, total in sums.items()}, sizes


def highest_leaf_scores(run: Run) -> tuple[np.ndarray, list[Any], list[str], float]:
    """Float64 (clients, leaves), each the highest leaf score of all rounds; its clients, leaves and threshold."""
    found = [recorded.findings for recorded in run.rounds if recorded.findings is not None]
    clients = [client for client in run.clients if any(client in findings.clients for findings in found)]
    leaves = list(dict.fromkeys(leaf for findings in found for leaf in findings.leaves))
    scores = np.full((len(clients), len(leaves)), np.nan)
    for findings in found:
        place = np.ix_(
            [clients.index(client) for client in findings.clients], [leaves.index(leaf) for leaf in findings.leaves]
        )
        scores[place] = np.fmax(scores[place], findings.leaf_scores)
    thresholds = [findings.threshold / leaf_allowance(findings.threshold, len(findings.leaves)) for findings in found]
    return scores, clients, leaves, max(thresholds, default=math.nan)


def _at_the_end(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _method(recorded: Round) -> str:
    found = recorded.findings
    assert found is not None
    method, told = _METHODS_IN_WORDS[found.method], _ACTIONS_IN_WORDS[found.action]
    return f"Found by {method}, above a score of {found.threshold:g}; the aggregation was told {told}."


def _plot(figure: Figure, alternative: str) -> Plot:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph .* missing from", UserWarning)
        try:
            written = _as_svg(figure, "path")
        except UserWarning:  # a script that matplotlib's font does not have: the browser will
            warnings.simplefilter("ignore", UserWarning)
            written = _as_svg(figure, "none")
    return Plot("data:image/svg+xml;base64," + base64.b64encode(written).decode(), alternative)


def _as_svg(figure: Figure, text: str) -> bytes:
    """A figure whose text is drawn ("path"), or left to the fonts of who looks at it ("none")."""
    import matplotlib as mpl

    written = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": text, "svg.hashsalt": "fastagg"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _curves(run: Run) -> Plot | None:
    metrics = {recorded.number: recorded.metrics for recorded in run.rounds}
    if not any(metrics.values()):
        return None
    return _plot(plots.metrics_by_round(metrics), "The metrics by round.")


def _norms(run: Run) -> Plot | None:
    statistics = {recorded.number: recorded.statistics for recorded in run.rounds if recorded.statistics is not None}
    if not statistics:
        return None
    outliers = {
        recorded.number: list(recorded.findings.outliers) for recorded in run.rounds if recorded.findings is not None
    }
    return _plot(plots.norms_by_round(statistics, outliers), "Norm of every client's update in every round.")


def _layers(run: Run) -> Plot | None:
    scores, clients, leaves, threshold = highest_leaf_scores(run)
    if not scores.size:
        return None
    figure = plots.layer_by_client(scores, clients, leaves, threshold=threshold, outliers=run.flagged())
    return _plot(figure, "How unusual every layer of every client is.")


def _cosines(run: Run) -> dict[str, Any] | None:
    known = [recorded for recorded in run.rounds if recorded.cosines is not None]
    if not known:
        return None
    last = known[-1]
    assert last.cosines is not None
    outliers = () if last.findings is None else last.findings.outliers
    figure = plots.cosine_map(last.cosines, last.clients, outliers)
    return {"round": last.number, "plot": _plot(figure, "Cosines between the updates of all pairs of clients.")}


def _importance(run: Run) -> Plot | None:
    shares, sizes = layer_shares(run)
    if not shares:
        return None
    return _plot(plots.layer_importance(shares, sizes), "Each layer's share of the updates' squared norm.")


def _histograms(run: Run) -> Plot | None:
    if not any(run.models.values()):
        return None
    return _plot(plots.weight_histograms(run.models, most=_MOST_PANELS), "The distribution of every layer's weights.")
