"""Drop-ins for Flower's strategies (flwr.serverapp.strategy), and what lets any precision travel.

``from fastagg.flower import FedAvg`` in the place of ``from flwr.serverapp.strategy import FedAvg``.
"""

from fastagg._public import name_publicly

try:
    from fastagg.flower.legacy import aggregate, aggregate_inplace
    from fastagg.flower.records import quantize_mod, to_array_record, to_state_dict
    from fastagg.flower.replies import LeftOutReply
    from fastagg.flower.robust import Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum
    from fastagg.flower.rounds import NoReplyLeftError
    from fastagg.flower.strategies import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedOpt, FedProx, FedYogi, QFedAvg
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flwr":
        raise
    raise ModuleNotFoundError("fastagg.flower needs Flower 1.22 or newer: pip install 'fastagg[flower]'") from error

__all__ = [
    "Bulyan",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedOpt",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "LeftOutReply",
    "MultiKrum",
    "NoReplyLeftError",
    "QFedAvg",
    "aggregate",
    "aggregate_inplace",
    "quantize_mod",
    "to_array_record",
    "to_state_dict",
]

name_publicly(globals())
