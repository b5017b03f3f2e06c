"""What the plots are drawn with: colours, axes, labels that fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastagg._extras import EXTRAS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastagg.plots.models import Histogram
    from fastagg.statistics import Statistics

INK, PALE, FAINT, ACCENT, OUTLIER = "#22303c", "#8a97a3", "#d5dce2", "#2f6f9f", "#c2401c"
MODEL_COLOURS = ("#8a97a3", "#2f6f9f", "#3d8b66", "#8460a8")
WIDTH = 9.5  # inches
_ROW = 0.17  # inches of a layer's row
_TALLEST = 14.0  # inches of all rows; more layers get narrower ones
_LONGEST_NAME, _LONGEST_LABEL = 44, 16  # characters of a layer and of a client
_MOST_TICKS, _MOST_NAMES = 40, 12


def import_matplotlib() -> None:
    """Raises ModuleNotFoundError, with the command that mends it, unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"fastagg.plots needs matplotlib: {EXTRAS['report'].command}") from error


def require(values: Any, what: str) -> None:
    """Raises unless matplotlib is installed and there is something to draw."""
    import_matplotlib()
    if not values:
        raise ValueError(f"{what}: expected at least one, got none")


def empty_figure(height: float, width: float = WIDTH, *, arranged: bool = True) -> Figure:
    """A figure without axes, which belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained" if arranged else None, facecolor="white")
    if arranged:
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    return figure


def rows_height(rows: int) -> float:
    """Inches of a figure of so many layers, one a row."""
    return min(max(_ROW * rows, 1.2), _TALLEST)


def figure_with_axes(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure of one panel."""
    figure = empty_figure(height, width)
    axes = figure.subplots()
    axes.tick_params(colors=INK, labelsize=8)
    return figure, axes


def calm(axes: Axes, grid: str) -> None:
    """Few lines: a grid along one axis, and no frame but below."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.grid(axis=grid, color="#e8ecef", linewidth=0.9)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(length=3, labelsize=8, color=PALE, labelcolor=INK)
    axes.tick_params(which="minor", length=0, labelsize=7, labelcolor=PALE)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(size=8.5, color=INK)


def count_rounds(axes: Axes) -> None:
    """An axis of whole rounds."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round", fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def hide_frame(axes: Axes) -> None:
    """No frame and no ticks, for maps."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def whole_norms(whole: Statistics) -> dict[Any, float]:
    """Each client's norm, NaN for one with non-finite values, which its norm leaves out."""
    norms = np.where(whole.nonfinite > 0, np.nan, whole.norm)[:, 0]
    return dict(zip(whole.clients, norms.tolist(), strict=True))


def norms_of_one_round(axes: Axes, norms: Mapping[Any, float], outliers: Collection[Any]) -> None:
    """One dot a client."""
    clients = list(norms)
    for place, client in enumerate(clients):
        _draw_norms(axes, [place], [norms[client]], OUTLIER if client in outliers else PALE, size=6)
    if math.isfinite(median := _median(list(norms.values()))):
        axes.axhline(median, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="median")
        axes.legend(frameon=False, fontsize=8)
    _scale_norms(axes, [norms])
    label_clients(axes.xaxis, clients, outliers)
    axes.set_xlabel("client", fontsize=8.5)


def norms_of_rounds(
    axes: Axes, norms: Mapping[int, Mapping[Any, float]], outliers: Mapping[int, Collection[Any]]
) -> None:
    """One line a client, and the median."""
    clients = list(dict.fromkeys(client for of_clients in norms.values() for client in of_clients))
    flagged = [client for client in clients if any(client in found for found in outliers.values())]
    for client in sorted(clients, key=lambda client: client in flagged):
        numbers = [number for number, of_clients in norms.items() if client in of_clients]
        values = [norms[number][client] for number in numbers]
        colour, alpha = (OUTLIER, 0.55) if client in flagged else (FAINT, 1.0)
        axes.plot(numbers, values, color=colour, linewidth=1.1, alpha=alpha)
        if len(numbers) == 1:
            _draw_norms(axes, numbers, values, colour, size=3)
        dotted = [number for number in numbers if client in outliers.get(number, ())]
        _draw_norms(axes, dotted, [norms[number][client] for number in dotted], OUTLIER, size=4.5)
    medians = [_median(list(of_clients.values())) for of_clients in norms.values()]
    axes.plot(list(norms), medians, color=INK, linewidth=2, label="median")
    axes.plot([], [], color=FAINT, linewidth=2, label="client")
    if flagged:
        axes.plot([], [], "o-", color=OUTLIER, markersize=4.5, label="outlier, a dot in its rounds")
    if any(not math.isfinite(value) for of_clients in norms.values() for value in of_clients.values()):
        axes.plot([], [], "x", color=OUTLIER, markersize=6, label="not finite")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.02), borderaxespad=0)
    count_rounds(axes)
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

    if any(0 < value < math.inf for of_clients in norms for value in of_clients.values()):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    calm(axes, "y")


def _name_lines(axes: Axes, norms: Mapping[int, Mapping[Any, float]], clients: Sequence[Any]) -> None:
    """Names of flagged clients in the margin beside their last values, moved apart where they would overlap."""
    last: dict[Any, float] = {}
    for of_clients in norms.values():
        last.update({client: of_clients[client] for client in clients if 0 < of_clients.get(client, 0) < math.inf})
    shown = sorted((value, str(client)) for client, value in last.items())[-_MOST_NAMES:]
    low, high = (math.log(limit) for limit in axes.get_ylim()) if shown else (0.0, 1.0)
    heights = [(math.log(value) - low) / (high - low) for value, _ in shown]
    for height, (_, name) in zip(_spread(heights, 0.06), shown, strict=True):
        style: dict[str, Any] = {"fontsize": 7.5, "color": OUTLIER, "va": "center"}
        axes.annotate(shortened(name, _LONGEST_LABEL), (1.01, height), xycoords="axes fraction", **style)


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


def label_clients(axis: Any, clients: Sequence[Any], outliers: Collection[Any], *, upright: bool = False) -> None:
    """Clients' labels where they fit: all of few, of many every so many and the outliers'."""
    names = [shortened(str(client), _LONGEST_LABEL) for client in clients]
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


def label_leaves(axes: Axes, leaves: Sequence[str]) -> None:
    """Layers' names where they fit: all of a hundred, of more every so many."""
    places = range(0, len(leaves), math.ceil(0.8 * _ROW * len(leaves) / _TALLEST))
    axes.set_yticks(places, labels=[shortened(leaves[place], _LONGEST_NAME) for place in places], fontsize=7)


def shortened(name: str, longest: int) -> str:
    """A name that can be drawn, a long one without its middle: no formula, no character that has no shape."""
    name = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
    if len(name) > longest:
        kept = longest - 1
        name = f"{name[: kept // 2]}…{name[-(kept - kept // 2) :]}"
    return name.replace("$", r"\$")


def largest_leaves(models: Mapping[str, Sequence[Histogram]], most: int) -> list[str]:
    """Names in the models' order, of more than `most` those of the largest leaves."""
    sizes = {leaf.leaf: int(leaf.counts.sum()) + leaf.nonfinite for model in models.values() for leaf in model}
    kept = set(sorted(sizes, key=lambda name: -sizes[name])[:most])
    return [name for name in sizes if name in kept]


def draw_histogram(axes: Axes, leaf: Histogram, model: str, colour: str) -> None:
    """Heights are densities: models may differ in the width of their bins."""
    low, high = leaf.minimum, leaf.maximum
    if low == high:
        axes.axvline(low, color=colour, linewidth=1.4)
        return
    edges = np.linspace(low, high, len(leaf.counts) + 1)
    heights = leaf.counts / max(int(leaf.counts.sum()), 1) / (edges[1] - edges[0])
    axes.stairs(heights, edges, fill=True, facecolor=(colour, 0.18), edgecolor=colour, linewidth=1.1)


def style_panel(axes: Axes, name: str) -> None:
    """A small panel's title and axes."""
    axes.set_title(shortened(name, 36), fontsize=7, loc="left", pad=3)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(labelsize=6.5, length=2, color=PALE, labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)


def line_of(colour: str) -> Any:
    """A line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linewidth=2)


def cosine_limits(cosines: np.ndarray) -> tuple[float, float]:
    """The limits of an axis of cosines: all of it only where one is negative."""
    known = cosines[np.isfinite(cosines)]
    low = float(known.min()) if known.size else 0.0
    return (-1.05, 1.05) if low < 0 else (-0.03, 1.05)


def rectangle(column: int, row: int) -> Any:
    """The black cell of a non-finite score."""
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="#15191d", edgecolor="none")


def diverging() -> Any:
    """Orange over white to blue."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = ("#8c3b0f", "#d98a53", "#f6e3d3", "#ffffff", "#d6e6f1", "#6fa3c8", "#1d4f7a")
    return LinearSegmentedColormap.from_list("orange_white_blue", stops).with_extremes(bad="#c9cdd1")


def alarming() -> Any:
    """White to grey-blue up to the middle, and from there yellow to dark red."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = [(0, "#ffffff"), (0.4999, "#c3d0da"), (0.5, "#f7c873"), (0.75, "#dd6b2f"), (1, "#8f1d14")]
    return LinearSegmentedColormap.from_list("calm_then_warm", stops).with_extremes(bad="#f4f6f8")
