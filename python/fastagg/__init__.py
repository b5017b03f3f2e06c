"""fastagg: weighted FedAvg and FP16 quantisation as a small native library."""

from typing import TYPE_CHECKING, Any

from fastagg._backend import get_num_threads, set_num_threads
from fastagg._build import __version__, build_info
from fastagg._errors import CudaError, DroppedUpdateWarning, PeerError
from fastagg.accumulator import Accumulator
from fastagg.averaging import fedavg
from fastagg.quantization import Quantized, dequantize, quantize

if TYPE_CHECKING:
    from fastagg.communication import all_reduce

__all__ = [
    "Accumulator",
    "CudaError",
    "DroppedUpdateWarning",
    "PeerError",
    "Quantized",
    "__version__",
    "all_reduce",
    "build_info",
    "dequantize",
    "fedavg",
    "get_num_threads",
    "quantize",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    """`all_reduce` is fetched at first use: it needs torch."""
    if name != "all_reduce":
        raise AttributeError(f"module 'fastagg' has no attribute {name!r}")
    try:
        from fastagg.communication import all_reduce
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("fastagg.all_reduce needs PyTorch: pip install 'fastagg[torch]'") from error
    return all_reduce
