"""One function a figure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from fastagg.plots.drawing import (
    ACCENT,
    INK,
    MODEL_COLOURS,
    OUTLIER,
    alarming,
    calm,
    cosine_limits,
    count_rounds,
    diverging,
    draw_histogram,
    empty_figure,
    figure_with_axes,
    hide_frame,
    import_matplotlib,
    label_clients,
    label_leaves,
    largest_leaves,
    line_of,
    norms_of_one_round,
    norms_of_rounds,
    rectangle,
    require,
    rows_height,
    shortened,
    style_panel,
    whole_norms,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastagg.plots.models import Histogram, LayerComparison
    from fastagg.statistics import Statistics


def norms_by_round(rounds: Mapping[int, Statistics], outliers: Mapping[int, Collection[Any]] | None = None) -> Figure:
    """The norm of every client's update by round, on a logarithmic axis; of one round, by client.

    Args:
        rounds: round -> statistics.
        outliers: round -> the clients that were outliers in it, drawn in the outliers' colour and named.

    Raises:
        ValueError: there is no round.
    """
    require(rounds, "rounds")
    outliers = outliers or {}
    figure, axes = figure_with_axes(3.8)
    wholes = {number: statistics.whole() for number, statistics in sorted(rounds.items())}
    norms = {number: whole_norms(whole) for number, whole in wholes.items()}
    if len(norms) == 1:
        number, of_clients = next(iter(norms.items()))
        norms_of_one_round(axes, of_clients, outliers.get(number, ()))
    else:
        norms_of_rounds(axes, norms, outliers)
    axes.set_ylabel("norm of the update")
    return figure


def cosine_map(cosines: np.ndarray, clients: Sequence[Any], outliers: Collection[Any] = ()) -> Figure:
    """The cosines between all pairs of clients: 1 is dark blue, 0 white, -1 dark orange; NaN is grey.

    Args:
        cosines: (clients, clients).
        clients: labels.
        outliers: the labels to be shown in the outliers' colour.

    Raises:
        ValueError: the shape does not fit the clients.
    """
    import_matplotlib()
    cosines = np.asarray(cosines, np.float64)
    if cosines.shape != (len(clients),) * 2 or not len(clients):
        raise ValueError(f"cosines: expected shape {(len(clients),) * 2}, got {cosines.shape}")
    figure, axes = figure_with_axes(6.4, width=7.4)
    image = axes.imshow(cosines, cmap=diverging(), vmin=-1, vmax=1, interpolation="nearest")
    label_clients(axes.xaxis, clients, outliers)
    label_clients(axes.yaxis, clients, outliers, upright=True)
    hide_frame(axes)
    axes.set_xlabel("client", fontsize=8.5, color=INK)
    axes.set_ylabel("client", fontsize=8.5, color=INK)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, aspect=30)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["−1", "−0.5", "0", "0.5", "1"], fontsize=7.5)
    bar.set_label("cosine", fontsize=8)
    bar.outline.set_visible(False)
    return figure


def layer_by_client(
    scores: np.ndarray,
    clients: Sequence[Any],
    leaves: Sequence[str],
    *,
    threshold: float = 3.5,
    outliers: Collection[Any] = (),
) -> Figure:
    """How unusual each layer of each client is: `Findings.leaf_scores`, grey up to the threshold, warm colours above.

    Args:
        scores: (clients, leaves), in spreads; infinite for non-finite values (black), NaN where there is none.
        clients: labels.
        leaves: names.
        threshold: where the colours begin.
        outliers: the labels to be shown in the outliers' colour.

    Raises:
        ValueError: the shape does not fit the clients and leaves.
    """
    import_matplotlib()
    scores = np.asarray(scores, np.float64)
    if scores.shape != (len(clients), len(leaves)) or not scores.size:
        raise ValueError(f"scores: expected shape {(len(clients), len(leaves))}, got {scores.shape}")
    figure, axes = figure_with_axes(1.6 + rows_height(len(leaves)))
    axes.set_facecolor("#f4f6f8")
    shown = np.where(np.isinf(scores), np.nan, np.minimum(scores, 3 * threshold)).T
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(vmin=0, vcenter=threshold, vmax=3 * threshold)
    image = axes.imshow(shown, cmap=alarming(), norm=norm, aspect="auto", interpolation="nearest")
    for column, row in np.argwhere(np.isinf(scores)).tolist():
        axes.add_patch(rectangle(column, row))
    label_clients(axes.xaxis, clients, outliers)
    label_leaves(axes, leaves)
    hide_frame(axes)
    axes.set_xlabel("client", fontsize=8.5, color=INK)
    axes.set_ylabel("layer", fontsize=8.5, color=INK)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.03, aspect=30)
    bar.set_ticks(
        [0, threshold, 3 * threshold], labels=["0", f"{threshold:.2g}", f"≥ {3 * threshold:.2g}"], fontsize=7.5
    )
    bar.set_label("spreads from the median client", fontsize=8)
    bar.outline.set_visible(False)
    return figure


def weight_histograms(models: Mapping[str, Sequence[Histogram]], *, most: int = 48) -> Figure:
    """The distribution of every leaf's values, one panel a leaf, one line a model.

    Args:
        models: name -> `fastagg.report.weight_histograms(model)`.
        most: panels; of more leaves, those with most elements are shown.

    Raises:
        ValueError: there is no model, or a model without a floating leaf.
    """
    require(models, "models")
    leaves = largest_leaves(models, most)
    require(leaves, "models: leaves")
    columns = min(4, len(leaves))
    rows = math.ceil(len(leaves) / columns)
    height = 0.7 + 1.3 * rows
    figure = empty_figure(height, arranged=False)  # arranging takes longer than all the rest
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.03, 0.5 / height, 0.99, 1 - 0.6 / height, wspace=0.1, hspace=0.62)
    figure.supxlabel("weight", fontsize=8.5, color=INK, y=0.08 / height)
    figure.supylabel("density", fontsize=8.5, color=INK, x=0.005)
    for axes in grid.flat[len(leaves) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, leaves, strict=False):
        for (model, histograms), colour in zip(models.items(), cycle(MODEL_COLOURS)):
            for leaf in histograms:
                if leaf.leaf == name:
                    draw_histogram(axes, leaf, model, colour)
        style_panel(axes, name)
    lines = [line_of(colour) for _, colour in zip(models, cycle(MODEL_COLOURS))]
    names = [shortened(model, 30) for model in models]
    figure.legend(lines, names, loc="upper right", frameon=False, ncols=4, fontsize=8)
    return figure


def compare_models(rows: Sequence[LayerComparison], first: str = "first", second: str = "second") -> Figure:
    """Two models layer by layer: the relative difference and the cosine.

    Args:
        rows: of `fastagg.report.compare_models`.
        first: the first model's name.
        second: the second model's name.

    Raises:
        ValueError: there is no row.
    """
    require(rows, "rows")
    figure = empty_figure(1.1 + rows_height(len(rows)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
    places = np.arange(len(rows))
    differences = np.array([row.relative_difference for row in rows])
    cosines = np.array([row.cosine for row in rows])
    left.barh(places, np.where(np.isfinite(differences), differences, 0), 0.7, color=ACCENT)
    before, after = shortened(first, 30), shortened(second, 30)
    left.set_xlabel(f"relative difference: |{after} − {before}| / |{before}|")
    right.plot(cosines, places, "o", color=ACCENT, markersize=4)
    right.set_xlabel("cosine")
    right.set_xlim(*cosine_limits(cosines))
    right.locator_params(axis="x", nbins=5)
    for axes in (left, right):
        calm(axes, "x")
    for place, difference in enumerate(differences.tolist()):
        if not math.isfinite(difference):
            words = "not finite" if math.isnan(difference) else f"{shortened(first, 14)} is zero"
            left.annotate(words, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=7, color=OUTLIER)
    label_leaves(left, [row.leaf for row in rows])
    left.set_ylabel("layer", fontsize=8.5, color=INK)
    left.set_ylim(len(rows) - 0.4, -0.6)
    return figure


def layer_importance(shares: Mapping[str, float], elements: Mapping[str, float]) -> Figure:
    """Each layer's share of the updates' squared norm as a bar, and its share of the elements as a tick.

    A bar that reaches past its tick is a layer that moves more than its size would let expect.

    Raises:
        ValueError: there is no layer.
    """
    require(shares, "shares")
    figure, axes = figure_with_axes(0.9 + rows_height(len(shares)))
    places = np.arange(len(shares))
    axes.barh(places, list(shares.values()), 0.7, color=ACCENT, label="share of the squared norm")
    sizes = [elements[name] for name in shares]
    axes.plot(sizes, places, "|", color=INK, markersize=9, markeredgewidth=1.6, label="share of the elements")
    calm(axes, "x")
    label_leaves(axes, list(shares))
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.set_xlabel("share of all layers", fontsize=8.5, color=INK)
    axes.set_ylabel("layer", fontsize=8.5, color=INK)
    figure.legend(loc="outside upper right", frameon=False, ncols=2, fontsize=8)
    return figure


def metrics_by_round(rounds: Mapping[int, Mapping[str, float]]) -> Figure:
    """One panel for each metric, such as loss and accuracy, by round.

    Raises:
        ValueError: there is no metric.
    """
    names = list(dict.fromkeys(name for metrics in rounds.values() for name in metrics))
    require(names, "rounds: metrics")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = empty_figure(2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        numbers = sorted(number for number, metrics in rounds.items() if name in metrics)
        values = [rounds[number][name] for number in numbers]
        axes.plot(numbers, values, color=ACCENT, linewidth=2, marker="o" if len(values) < 30 else "", markersize=4)
        axes.set_title(shortened(name, 30), loc="left", fontsize=9.5)
        count_rounds(axes)
        calm(axes, "y")
    return figure
