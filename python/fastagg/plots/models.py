"""What a model's weights look like, and how two models differ layer by layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastagg._updates.structure import Structure
from fastagg._updates.values import Leaf, blocks_of, leaf_title, open_leaf


class LayerComparison(NamedTuple):
    """How one floating leaf of two models differs; what is not finite makes its row NaN.

    Attributes:
        leaf: its name.
        elements: its number of elements.
        first_norm, second_norm: Euclidean norms.
        relative_difference: ``|second - first| / |first|``; infinite where only the first is zero.
        cosine: ``<first, second> / (|first| |second|)``; NaN where one is zero.
        largest_difference: ``max |second - first|``.
    """

    leaf: str
    elements: int
    first_norm: float
    second_norm: float
    relative_difference: float
    cosine: float
    largest_difference: float


class Histogram(NamedTuple):
    """The distribution of one floating leaf's finite values.

    Attributes:
        leaf: its name.
        counts: int64 (bins,).
        minimum, maximum: of the finite values; the bins between them are of equal width.
        nonfinite: the number of NaNs and infinities.
    """

    leaf: str
    counts: np.ndarray
    minimum: float
    maximum: float
    nonfinite: int


def compare_models(first: Any, second: Any) -> list[LayerComparison]:
    """Compares two models leaf by leaf, in float64, a block at a time; integer leaves are left out.

    Args:
        first: an array, a sequence of arrays or a mapping of arrays (a state_dict), of any floating dtypes and library.
        second: the same structure and shapes; its dtypes and library may be others.

    Raises:
        TypeError, ValueError: the structures or shapes differ; the message names the leaf.
    """
    rows = []
    structure = Structure(first, "the first model")
    others = _leaves_of(structure, second, "the second model")
    for index, (one, other) in enumerate(zip(_leaves_of(structure, first, "the first model"), others, strict=True)):
        if (one is None) != (other is None):
            raise TypeError(f"{structure.leaf_name(index)}: expected floating dtypes in both models or in none")
        if one is None or other is None:
            continue
        if one.shape != other.shape:
            raise ValueError(
                f"the second model, {structure.leaf_name(index)}: expected shape {one.shape} like the first model's, "
                f"got {other.shape}"
            )
        rows.append(_compare(leaf_title(structure, index), one, other))
    return rows


def weight_histograms(model: Any, bins: int = 50) -> list[Histogram]:
    """The distribution of every floating leaf of a model, in float64, a block at a time.

    Small leaves get fewer bins: at most twice the root of their number of elements.

    Raises:
        TypeError, ValueError: the model is no array, sequence or mapping of arrays, or `bins` is not positive.
    """
    if bins < 1:
        raise ValueError(f"bins: expected 1 or more, got {bins}")
    structure = Structure(model, "the model")
    leaves = enumerate(_leaves_of(structure, model, "the model"))
    return [_histogram(leaf_title(structure, index), leaf, bins) for index, leaf in leaves if leaf is not None]


def _leaves_of(structure: Structure, model: Any, who: str) -> list[Leaf | None]:
    arrays = structure.leaves(model, who, "the first model's")
    return [open_leaf(array, f"{who}, {structure.leaf_name(index)}") for index, array in enumerate(arrays)]


def _compare(name: str, first: Leaf, second: Leaf) -> LayerComparison:
    products = np.zeros((2, 2))
    squared_difference = largest = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for rows in blocks_of([first, second]):
            products += rows @ rows.T
            difference = np.abs(rows[1] - rows[0])
            squared_difference += float(difference @ difference)
            largest = float(np.maximum(largest, difference.max()))
        first_norm, second_norm = np.sqrt(np.diag(products)).tolist()
    if not math.isfinite(products.sum()):
        return LayerComparison(name, first.elements, first_norm, second_norm, math.nan, math.nan, math.nan)
    difference_norm, lengths = math.sqrt(squared_difference), first_norm * second_norm
    relative = difference_norm / first_norm if first_norm else (math.inf if second_norm else 0.0)
    cosine = min(1.0, max(-1.0, float(products[0, 1]) / lengths)) if lengths else math.nan
    return LayerComparison(name, first.elements, first_norm, second_norm, relative, cosine, largest)


def _histogram(name: str, leaf: Leaf, bins: int) -> Histogram:
    bins = max(1, min(bins, math.ceil(2 * math.sqrt(leaf.elements))))
    minimum, maximum, nonfinite = math.inf, -math.inf, 0
    for rows in blocks_of([leaf]):
        finite = rows[np.isfinite(rows)]
        nonfinite += rows.size - finite.size
        minimum = min(minimum, float(finite.min(initial=math.inf)))
        maximum = max(maximum, float(finite.max(initial=-math.inf)))
    counts = np.zeros(bins, np.int64)
    if minimum > maximum:
        return Histogram(name, counts, 0.0, 0.0, nonfinite)
    for rows in blocks_of([leaf]):
        finite = rows[np.isfinite(rows)]
        counts += np.histogram(finite, bins, _range(minimum, maximum))[0]
    return Histogram(name, counts, minimum, maximum, nonfinite)


def _range(minimum: float, maximum: float) -> tuple[float, float]:
    """Bounds of the bins: one value alone lies in the middle of them."""
    return (minimum, maximum) if minimum < maximum else (minimum - 0.5, maximum + 0.5)
