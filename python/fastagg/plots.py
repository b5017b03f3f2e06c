"""Plots of what clients sent and how models differ, as matplotlib figures that belong to no window.

`figure.savefig("norms.png")` writes one; `fastagg report` puts them all into one page. Outliers have one colour
everywhere, and no other thing has it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from fastagg._extras import EXTRAS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastagg.report.models import Histogram, LayerComparison
    from fastagg.statistics import Statistics

__all__ = [
    "compare_models",
    "cosine_map",
    "layer_by_client",
    "layer_importance",
    "metrics_by_round",
    "norms_by_round",
    "weight_histograms",
]

INK, PALE, FAINT, ACCENT, OUTLIER = "#22303c", "#8a97a3", "#d5dce2", "#2f6f9f", "#c2401c"
MODEL_COLOURS = ("#8a97a3", "#2f6f9f", "#3d8b66", "#8460a8")
WIDTH = 9.5  # inches
_ROW = 0.17  # inches of a layer's row
_TALLEST = 14.0  # inches of all rows; more layers get narrower ones
_LONGEST_NAME, _LONGEST_LABEL = 44, 16  # characters of a layer and of a client
_MOST_TICKS, _MOST_NAMES = 40, 12


def norms_by_round(rounds: Mapping[int, Statistics], outliers: Mapping[int, Collection[Any]] | None = None) -> Figure:
    """The norm of every client's update by round, on a logarithmic axis; of one round, by client.

    Args:
        rounds: round -> statistics.
        outliers: round -> the clients that were outliers in it, drawn in the outliers' colour and named.

    Raises:
        ValueError: there is no round.
    """
    _require(rounds, "rounds")
    outliers = outliers or {}
    figure, axes = _figure(3.8)
    wholes = {number: one.whole() for number, one in sorted(rounds.items())}
    norms = {number: _whole_norms(one) for number, one in wholes.items()}
    if len(norms) == 1:
        number, one = next(iter(norms.items()))
        _norms_of_one_round(axes, one, outliers.get(number, ()))
    else:
        _norms_of_rounds(axes, norms, outliers)
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
    figure, axes = _figure(6.4, width=7.4)
    image = axes.imshow(cosines, cmap=_diverging(), vmin=-1, vmax=1, interpolation="nearest")
    _label_clients(axes.xaxis, clients, outliers)
    _label_clients(axes.yaxis, clients, outliers, upright=True)
    _bare(axes)
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
    figure, axes = _figure(1.6 + _rows_height(len(leaves)))
    axes.set_facecolor("#f4f6f8")
    shown = np.where(np.isinf(scores), np.nan, np.minimum(scores, 3 * threshold)).T
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(vmin=0, vcenter=threshold, vmax=3 * threshold)
    image = axes.imshow(shown, cmap=_alarming(), norm=norm, aspect="auto", interpolation="nearest")
    for column, row in np.argwhere(np.isinf(scores)).tolist():
        axes.add_patch(_rectangle(column, row))
    _label_clients(axes.xaxis, clients, outliers)
    _label_leaves(axes, leaves)
    _bare(axes)
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
    _require(models, "models")
    leaves = _largest_leaves(models, most)
    _require(leaves, "models: leaves")
    columns = min(4, len(leaves))
    rows = math.ceil(len(leaves) / columns)
    height = 0.7 + 1.3 * rows
    figure = _empty_figure(height, arranged=False)  # arranging takes longer than all the rest
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
                    _draw_histogram(axes, leaf, model, colour)
        _style_panel(axes, name)
    lines = [_line(colour) for _, colour in zip(models, cycle(MODEL_COLOURS))]
    names = [_shortened(model, 30) for model in models]
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
    _require(rows, "rows")
    figure = _empty_figure(1.1 + _rows_height(len(rows)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
    places = np.arange(len(rows))
    differences = np.array([row.relative_difference for row in rows])
    cosines = np.array([row.cosine for row in rows])
    left.barh(places, np.where(np.isfinite(differences), differences, 0), 0.7, color=ACCENT)
    before, after = _shortened(first, 30), _shortened(second, 30)
    left.set_xlabel(f"relative difference: |{after} − {before}| / |{before}|")
    right.plot(cosines, places, "o", color=ACCENT, markersize=4)
    right.set_xlabel("cosine")
    right.set_xlim(*_cosine_limits(cosines))
    right.locator_params(axis="x", nbins=5)
    for axes in (left, right):
        _quiet(axes, "x")
    for place, one in enumerate(differences.tolist()):
        if not math.isfinite(one):
            words = "not finite" if math.isnan(one) else f"{_shortened(first, 14)} is zero"
            left.annotate(words, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=7, color=OUTLIER)
    _label_leaves(left, [row.leaf for row in rows])
    left.set_ylabel("layer", fontsize=8.5, color=INK)
    left.set_ylim(len(rows) - 0.4, -0.6)
    return figure


def layer_importance(shares: Mapping[str, float], elements: Mapping[str, float]) -> Figure:
    """Each layer's share of the updates' squared norm as a bar, and its share of the elements as a tick.

    A bar that reaches past its tick is a layer that moves more than its size would let expect.

    Raises:
        ValueError: there is no layer.
    """
    _require(shares, "shares")
    figure, axes = _figure(0.9 + _rows_height(len(shares)))
    places = np.arange(len(shares))
    axes.barh(places, list(shares.values()), 0.7, color=ACCENT, label="share of the squared norm")
    sizes = [elements[name] for name in shares]
    axes.plot(sizes, places, "|", color=INK, markersize=9, markeredgewidth=1.6, label="share of the elements")
    _quiet(axes, "x")
    _label_leaves(axes, list(shares))
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
    _require(names, "rounds: metrics")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _empty_figure(2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        numbers = sorted(number for number, metrics in rounds.items() if name in metrics)
        values = [rounds[number][name] for number in numbers]
        axes.plot(numbers, values, color=ACCENT, linewidth=2, marker="o" if len(values) < 30 else "", markersize=4)
        axes.set_title(_shortened(name, 30), loc="left", fontsize=9.5)
        _count_rounds(axes)
        _quiet(axes, "y")
    return figure


def import_matplotlib() -> None:
    """Raises ModuleNotFoundError, with the command that mends it, unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"fastagg.plots needs matplotlib: {EXTRAS['report'].command}") from error


def _require(values: Any, what: str) -> None:
    import_matplotlib()
    if not values:
        raise ValueError(f"{what}: expected at least one, got none")


def _empty_figure(height: float, width: float = WIDTH, *, arranged: bool = True) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained" if arranged else None, facecolor="white")
    if arranged:
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    return figure


def _rows_height(rows: int) -> float:
    return min(max(_ROW * rows, 1.2), _TALLEST)


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = _empty_figure(height, width)
    axes = figure.subplots()
    axes.tick_params(colors=INK, labelsize=8)
    return figure, axes


def _quiet(axes: Axes, grid: str) -> None:
    """Few lines: a grid along one axis, and no frame but below."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.grid(axis=grid, color="#e8ecef", linewidth=0.9)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(length=3, labelsize=8, color=PALE, labelcolor=INK)
    axes.tick_params(which="minor", length=0, labelsize=7, labelcolor=PALE)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(size=8.5, color=INK)


def _count_rounds(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round", fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _bare(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _whole_norms(whole: Statistics) -> dict[Any, float]:
    """Each client's norm, NaN for one with non-finite values, which its norm leaves out."""
    norms = np.where(whole.nonfinite > 0, np.nan, whole.norm)[:, 0]
    return dict(zip(whole.clients, norms.tolist(), strict=True))


def _norms_of_one_round(axes: Axes, norms: Mapping[Any, float], outliers: Collection[Any]) -> None:
    clients = list(norms)
    for place, client in enumerate(clients):
        _draw_norms(axes, [place], [norms[client]], OUTLIER if client in outliers else PALE, size=6)
    if math.isfinite(median := _median(list(norms.values()))):
        axes.axhline(median, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="median")
        axes.legend(frameon=False, fontsize=8)
    _scale_norms(axes, [norms])
    _label_clients(axes.xaxis, clients, outliers)
    axes.set_xlabel("client", fontsize=8.5)


def _norms_of_rounds(
    axes: Axes, norms: Mapping[int, Mapping[Any, float]], outliers: Mapping[int, Collection[Any]]
) -> None:
    clients = list(dict.fromkeys(client for one in norms.values() for client in one))
    flagged = [client for client in clients if any(client in found for found in outliers.values())]
    for client in sorted(clients, key=lambda client: client in flagged):
        numbers = [number for number, one in norms.items() if client in one]
        values = [norms[number][client] for number in numbers]
        colour, alpha = (OUTLIER, 0.55) if client in flagged else (FAINT, 1.0)
        axes.plot(numbers, values, color=colour, linewidth=1.1, alpha=alpha)
        if len(numbers) == 1:
            _draw_norms(axes, numbers, values, colour, size=3)
        dotted = [number for number in numbers if client in outliers.get(number, ())]
        _draw_norms(axes, dotted, [norms[number][client] for number in dotted], OUTLIER, size=4.5)
    medians = [_median(list(one.values())) for one in norms.values()]
    axes.plot(list(norms), medians, color=INK, linewidth=2, label="median")
    axes.plot([], [], color=FAINT, linewidth=2, label="client")
    if flagged:
        axes.plot([], [], "o-", color=OUTLIER, markersize=4.5, label="outlier, a dot in its rounds")
    if any(not math.isfinite(value) for one in norms.values() for value in one.values()):
        axes.plot([], [], "x", color=OUTLIER, markersize=6, label="not finite")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.02), borderaxespad=0)
    _count_rounds(axes)
    _scale_norms(axes, norms.values())
    _name_lines(axes, norms, flagged)


def _draw_norms(axes: Axes, places: Sequence[int], norms: Sequence[float], colour: str, size: float) -> None:
    """Dots, and crosses on the upper edge for what is not finite."""
    for place, norm in zip(places, norms, strict=True):
        if math.isfinite(norm):
            axes.plot(place, norm, "o", color=colour, markersize=size)
        else:
            upper = axes.get_xaxis_transform()
            axes.plot(place, 1.0, "x", color=OUTLIER, markersize=6, transform=upper, clip_on=False)


def _scale_norms(axes: Axes, norms: Iterable[Mapping[Any, float]]) -> None:
    """A logarithmic axis, if there is anything on it, with plain numbers."""
    from matplotlib.ticker import LogLocator

    if any(0 < value < math.inf for one in norms for value in one.values()):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    _quiet(axes, "y")


def _name_lines(axes: Axes, norms: Mapping[int, Mapping[Any, float]], clients: Sequence[Any]) -> None:
    """Names of flagged clients in the margin beside their last values, moved apart where they would overlap."""
    last: dict[Any, float] = {}
    for one in norms.values():
        last.update({client: one[client] for client in clients if 0 < one.get(client, 0) < math.inf})
    shown = sorted((value, str(client)) for client, value in last.items())[-_MOST_NAMES:]
    low, high = (math.log(limit) for limit in axes.get_ylim()) if shown else (0.0, 1.0)
    heights = [(math.log(value) - low) / (high - low) for value, _ in shown]
    for height, (_, name) in zip(_spread(heights, 0.06), shown, strict=True):
        style: dict[str, Any] = {"fontsize": 7.5, "color": OUTLIER, "va": "center"}
        axes.annotate(_shortened(name, _LONGEST_LABEL), (1.01, height), xycoords="axes fraction", **style)


def _spread(heights: Sequence[float], least: float) -> list[float]:
    """Rising heights, moved as little as it takes to lie `least` apart and within 0 and 1, room permitting."""
    spread = np.array(heights)
    for index in range(1, len(spread)):
        spread[index] = max(spread[index], spread[index - 1] + least)
    for index in range(len(spread) - 1, -1, -1):
        above = spread[index + 1] - least if index + 1 < len(spread) else 1.0
        spread[index] = min(spread[index], above)
    return [float(height) for height in spread]


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.median(finite)) if finite else math.nan


def _label_clients(axis: Any, clients: Sequence[Any], outliers: Collection[Any], *, upright: bool = False) -> None:
    """Clients' labels where they fit: all of few, of many every so many and the outliers'."""
    names = [_shortened(str(client), _LONGEST_LABEL) for client in clients]
    step = math.ceil(len(clients) / _MOST_TICKS)
    room = max(1, step - 1)
    marked = [place for place, client in enumerate(clients) if client in outliers]
    places: list[int] = []
    for place in marked:  # outliers first, and others where none is near
        if not places or place - places[-1] >= room:
            places.append(place)
    places += [place for place in range(0, len(clients), step) if all(abs(place - other) >= step for other in marked)]
    longest = max(len(names[place]) for place in places)
    rotation = 0 if upright or (longest <= 3 and len(places) <= 42) else 90
    axis.set_ticks(places, labels=[names[place] for place in places], rotation=rotation, fontsize=7)
    for place, label in zip(places, axis.get_ticklabels(), strict=True):
        if clients[place] in outliers:
            label.set(color=OUTLIER, fontweight="bold")


def _label_leaves(axes: Axes, leaves: Sequence[str]) -> None:
    """Layers' names where they fit: all of a hundred, of more every so many."""
    places = range(0, len(leaves), math.ceil(0.8 * _ROW * len(leaves) / _TALLEST))
    axes.set_yticks(places, labels=[_shortened(leaves[place], _LONGEST_NAME) for place in places], fontsize=7)


def _shortened(name: str, longest: int) -> str:
    """A name that can be drawn, a long one without its middle: no formula, no character that has no shape."""
    name = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
    if len(name) > longest:
        kept = longest - 1
        name = f"{name[: kept // 2]}…{name[-(kept - kept // 2) :]}"
    return name.replace("$", r"\$")


def _largest_leaves(models: Mapping[str, Sequence[Histogram]], most: int) -> list[str]:
    """Names in the models' order, of more than `most` those of the largest leaves."""
    sizes = {leaf.leaf: int(leaf.counts.sum()) + leaf.nonfinite for model in models.values() for leaf in model}
    kept = set(sorted(sizes, key=lambda name: -sizes[name])[:most])
    return [name for name in sizes if name in kept]


def _draw_histogram(axes: Axes, leaf: Histogram, model: str, colour: str) -> None:
    """Heights are densities: models may differ in the width of their bins."""
    low, high = leaf.minimum, leaf.maximum
    if low == high:
        axes.axvline(low, color=colour, linewidth=1.4)
        return
    edges = np.linspace(low, high, len(leaf.counts) + 1)
    heights = leaf.counts / max(int(leaf.counts.sum()), 1) / (edges[1] - edges[0])
    axes.stairs(heights, edges, fill=True, facecolor=(colour, 0.18), edgecolor=colour, linewidth=1.1)


def _style_panel(axes: Axes, name: str) -> None:
    axes.set_title(_shortened(name, 36), fontsize=7, loc="left", pad=3)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(labelsize=6.5, length=2, color=PALE, labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)


def _line(colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linewidth=2)


def _cosine_limits(cosines: np.ndarray) -> tuple[float, float]:
    known = cosines[np.isfinite(cosines)]
    low = float(known.min()) if known.size else 0.0
    return (-1.05, 1.05) if low < 0 else (-0.03, 1.05)


def _rectangle(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="#15191d", edgecolor="none")


def _diverging() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    stops = ("#8c3b0f", "#d98a53", "#f6e3d3", "#ffffff", "#d6e6f1", "#6fa3c8", "#1d4f7a")
    return LinearSegmentedColormap.from_list("orange_white_blue", stops).with_extremes(bad="#c9cdd1")


def _alarming() -> Any:
    """White to grey-blue up to the middle, and from there yellow to dark red."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = [(0, "#ffffff"), (0.4999, "#c3d0da"), (0.5, "#f7c873"), (0.75, "#dd6b2f"), (1, "#8f1d14")]
    return LinearSegmentedColormap.from_list("calm_then_warm", stops).with_extremes(bad="#f4f6f8")
