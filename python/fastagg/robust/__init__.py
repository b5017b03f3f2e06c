"""Rules that survive broken and hostile clients, in the place of the mean.

``fastagg.robust.median(updates)`` instead of ``fastagg.fedavg(updates)``. Rules by coordinate sort the clients' values
in one pass over memory; rules by distance make one pass for the distances of all pairs and one for the result.
"""

from fastagg._public import name_publicly
from fastagg.robust.combinations import centered_clip, fltrust, geometric_median, norm_clip
from fastagg.robust.coordinates import meamed, median, phocas, trimmed_mean
from fastagg.robust.mixing import MixedUpdates, bucketing, nearest_neighbor_mixing
from fastagg.robust.selection import bulyan, krum, krum_scores, multi_krum, squared_distances

__all__ = [
    "MixedUpdates",
    "bucketing",
    "bulyan",
    "centered_clip",
    "fltrust",
    "geometric_median",
    "krum",
    "krum_scores",
    "meamed",
    "median",
    "multi_krum",
    "nearest_neighbor_mixing",
    "norm_clip",
    "phocas",
    "squared_distances",
    "trimmed_mean",
]

name_publicly(globals())
