"""Plots of what clients sent and how models differ, as matplotlib figures that belong to no window.

`figure.savefig("norms.png")` writes one; `fastagg report` puts them all into one page. Outliers have one colour
everywhere, and no other thing has it.
"""

from fastagg.plots.figures import (
    compare_models,
    cosine_map,
    layer_by_client,
    layer_importance,
    metrics_by_round,
    norms_by_round,
    weight_histograms,
)

__all__ = [
    "compare_models",
    "cosine_map",
    "layer_by_client",
    "layer_importance",
    "metrics_by_round",
    "norms_by_round",
    "weight_histograms",
]
