"""fastagg: the aggregation step of federated and distributed training as a small native library."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastagg._errors import CudaError, DroppedUpdateWarning, NonFiniteUpdateError, PeerError
from fastagg._extras import EXTRAS
from fastagg._native.backend import get_num_threads, set_num_threads
from fastagg._native.build import __version__, build_info
from fastagg._public import name_publicly
from fastagg.averaging.accumulator import Accumulator
from fastagg.averaging.mean import fedavg
from fastagg.quantization.cast import dequantize, quantize
from fastagg.quantization.quantized import Quantized
from fastagg.statistics import Statistics

if TYPE_CHECKING:
    from fastagg import asynchronous as asynchronous
    from fastagg import ddp as ddp
    from fastagg import files as files
    from fastagg import flower as flower
    from fastagg import horovod as horovod
    from fastagg import nvflare as nvflare
    from fastagg import outliers as outliers
    from fastagg import plots as plots
    from fastagg import ranks as ranks
    from fastagg import ray as ray
    from fastagg import report as report
    from fastagg import robust as robust
    from fastagg import server as server
    from fastagg import statistics as statistics
    from fastagg import trees as trees
    from fastagg.distributed.broadcast import broadcast_optimizer_state, broadcast_parameters
    from fastagg.distributed.collectives import all_reduce
    from fastagg.distributed.optimizer import DistributedOptimizer

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

name_publicly(globals())


_NEED_TORCH = {
    "DistributedOptimizer": "distributed.optimizer",
    "all_reduce": "distributed.collectives",
    "broadcast_optimizer_state": "distributed.broadcast",
    "broadcast_parameters": "distributed.broadcast",
}


# What `import fastagg` leaves out and `fastagg.server.FedAdam` fetches, and the extra that it cannot do without.
_SUBMODULES = {
    "asynchronous": None,
    "ddp": "torch",
    "files": None,
    "flower": "flower",
    "horovod": "torch",
    "nvflare": "nvflare",
    "outliers": None,
    "plots": None,
    "ranks": "torch",
    "ray": "ray",
    "report": None,
    "robust": None,
    "server": None,
    "statistics": None,
    "trees": None,
}


if not TYPE_CHECKING:  # with it, a type checker would take any name for one of fastagg's

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


def __dir__() -> list[str]:
    """All that is here or would be fetched, but not what lacks its packages: `help` fetches every name."""
    needs = {**_SUBMODULES, **dict.fromkeys(_NEED_TORCH, "torch")}
    return sorted({*globals(), *(name for name, extra in needs.items() if extra is None or not EXTRAS[extra].missing)})
