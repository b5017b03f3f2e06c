"""fastagg in NVFlare: an aggregator for its FedAvg and scatter-and-gather workflows, and filters that quantise.

>>> from fastagg.nvflare import FedAvgAggregator
>>> recipe = FedAvgRecipe(..., aggregator=FedAvgAggregator())
"""

from fastagg._public import name_publicly

try:
    import nvflare  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("fastagg.nvflare needs NVFlare: pip install 'fastagg[nvflare]'") from error

from fastagg.nvflare.aggregator import FedAvgAggregator
from fastagg.nvflare.filters import DequantizeFilter, QuantizeFilter

__all__ = ["DequantizeFilter", "FedAvgAggregator", "QuantizeFilter"]

name_publicly(globals())
