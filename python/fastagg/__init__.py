"""fastagg: weighted FedAvg and FP16 quantisation as a small native library."""

from fastagg._backend import get_num_threads, set_num_threads
from fastagg._build import __version__, build_info
from fastagg._errors import CudaError, DroppedUpdateWarning
from fastagg.accumulator import Accumulator
from fastagg.averaging import fedavg
from fastagg.quantization import Quantized, dequantize, quantize

__all__ = [
    "Accumulator",
    "CudaError",
    "DroppedUpdateWarning",
    "Quantized",
    "__version__",
    "build_info",
    "dequantize",
    "fedavg",
    "get_num_threads",
    "quantize",
    "set_num_threads",
]
