"""Why a client is an outlier, in words."""

from __future__ import annotations

import numpy as np

from fastagg.outliers.features import Features

_SHOWN = 5
_NOTABLE = 2.0  # spreads from which a feature is worth a word where another score has found the client


def reasons_for(
    client: int,
    features: Features,
    deviations: dict[str, np.ndarray],
    limits: tuple[float, float],
    method: str,
    score: float,
) -> tuple[str, ...]:
    """The reasons in words, the weightiest first, at most five.

    `limits` are the deviations from which the whole update's features and the leaves' are named.
    """
    if features.broken[client]:
        return _nonfinite(client, features)
    found = []
    for column in range(1 + len(features.leaves)):
        limit = limits[column > 0]
        for name in _worth_telling({name: abs(table[client, column]) for name, table in deviations.items()}, limit):
            found.append((column > 0, -abs(deviations[name][client, column]), name, column))
    words = [_in_words(client, name, column, features) for _, _, name, column in sorted(found)]
    if method != "zscore":
        words.insert(0, f"{_SCORE_IN_WORDS[method]}: {score:.1f} spreads above the median client's")
    return _shortened(words)


def _worth_telling(sizes: dict[str, float], limit: float) -> list[str]:
    """The kinds of feature beyond the limit, but of sizes just the first: a large norm is a large distance too."""
    beyond = [name for name, size in sizes.items() if size > limit]
    of_size = [name for name in beyond if name != "cosine"]
    return of_size[:1] + [name for name in beyond if name == "cosine"]


_SCORE_IN_WORDS = {
    "kmeans": "far from the cluster centres",
    "local_outlier_factor": "in a thin neighbourhood (local outlier factor)",
    "isolation_forest": "easy to isolate (isolation forest)",
}


def notable_limits(method: str, threshold: float, allowance: float) -> tuple[float, float]:
    """The deviations from which the whole update's features and the leaves' are named as reasons."""
    limit = threshold if method == "zscore" else min(_NOTABLE, threshold)
    return limit, limit / allowance


def _nonfinite(client: int, features: Features) -> tuple[str, ...]:
    counts = features.nonfinite[client]
    words = [
        f"{count} non-finite {'value' if count == 1 else 'values'} in {_place(name)}"
        for name, count in zip(features.nonfinite_leaves, counts.tolist(), strict=True)
        if count
    ]
    return _shortened(words)


def _shortened(words: list[str]) -> tuple[str, ...]:
    if len(words) <= _SHOWN:
        return tuple(words)
    return (*words[: _SHOWN - 1], f"and {len(words) - _SHOWN + 1} more")


def _in_words(client: int, name: str, column: int, features: Features) -> str:
    values = features.values[name][:, column]
    value = float(values[client])
    others = values[~features.broken]
    typical = float(np.median(others[np.isfinite(others)]))
    place = _place(features.leaves[column - 1]) if column else "the whole update"
    if name == "cosine":
        return _cosine_in_words(value, typical, f" in {place}" if column else "")
    subject = {"norm": "norm of", "distance": "distance from the centre of", "largest": "largest value of"}[name]
    if typical == 0:
        return f"{subject} {place} is {value:.3g} where the median is 0"
    return f"{subject} {place} is {_ratio_in_words(value / typical)} times the median"


def _ratio_in_words(ratio: float) -> str:
    """Two digits, and no exponent before a million."""
    return f"{ratio:.0f}" if 99.5 <= ratio < 1e6 else f"{ratio:.2g}"


def _cosine_in_words(value: float, typical: float, where: str) -> str:
    direction = "points away from the centre" if value < 0 else "hardly points to the centre"
    return f"{direction}{where}: cosine {value:.2f}, median {typical:.2f}"


def _place(leaf: str) -> str:
    return "the update" if leaf in ("all", "array") else f"layer {leaf}"
