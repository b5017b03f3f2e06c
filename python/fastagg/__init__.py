"""fastagg: the aggregation step of federated and distributed training as a small native library."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastagg._backend import get_num_threads, set_num_threads
from fastagg._build import __version__, build_info
from fastagg._errors import CudaError, DroppedUpdateWarning, NonFiniteUpdateError, PeerError
from fastagg.accumulator import Accumulator
from fastagg.averaging import fedavg
from fastagg.quantization import Quantized, dequantize, quantize
from fastagg.statistics import Statistics

if TYPE_CHECKING:
    from fastagg.broadcasting import broadcast_optimizer_state, broadcast_parameters
    from fastagg.communication import all_reduce
    from fastagg.distributed_optimizer import DistributedOptimizer

__all__ = [
    "Accumulator",
    "CudaError",
    "DistributedOptimizer",
    "DroppedUpdateWarning",
    "NonFiniteUpdateError",
    "PeerError",
    "Quantized",
    "Statistics",
    "__version__",
    "all_reduce",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "build_info",
    "dequantize",
    "fedavg",
    "get_num_threads",
    "quantize",
    "set_num_threads",
]


_NEED_TORCH = {
    "DistributedOptimizer": "distributed_optimizer",
    "all_reduce": "communication",
    "broadcast_optimizer_state": "broadcasting",
    "broadcast_parameters": "broadcasting",
}


# What `import fastagg` leaves out and `fastagg.server.FedAdam` fetches.
_SUBMODULES = (
    *("asynchronous", "ddp", "files", "flower", "nvflare", "outliers", "plots", "ranks", "ray", "report", "robust"),
    *("server", "statistics", "trees"),
)


def __getattr__(name: str) -> Any:
    """What needs more than NumPy, or more than most need, is fetched at first use."""
    if name in _SUBMODULES:
        return import_module(f"fastagg.{name}")
    if name not in _NEED_TORCH:
        raise AttributeError(f"module 'fastagg' has no attribute {name!r}")
    try:
        module = import_module(f"fastagg.{_NEED_TORCH[name]}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"fastagg.{name} needs PyTorch: pip install 'fastagg[torch]'") from error
    return getattr(module, name)
