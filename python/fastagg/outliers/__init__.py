"""The Outlier Explorer: which clients of a round are unlike the others, why, and with what weight they shall count."""

from fastagg._public import name_publicly
from fastagg.outliers.explorer import ACTIONS, Explorer, Findings, times_flagged
from fastagg.outliers.scores import METHODS
from fastagg.outliers.sketches import Sketch, pairwise_cosines, sketch

__all__ = [
    "ACTIONS",
    "METHODS",
    "Explorer",
    "Findings",
    "Sketch",
    "pairwise_cosines",
    "sketch",
    "times_flagged",
]

name_publicly(globals())
