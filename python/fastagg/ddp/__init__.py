"""The DDP communication hook: gradients are averaged as `all_reduce` does it, while backward goes on.

>>> state = AllReduceState(wire="int8", error_feedback=True, named_parameters=model.named_parameters())
>>> model.register_comm_hook(state, all_reduce_hook)

`GradScaler` and gradient clipping can use what the hook finds on the way; `report` tells whether a wire would gain
anything.
"""

from typing import TYPE_CHECKING, Any

from fastagg._public import name_publicly
from fastagg.ddp.hook import all_reduce_hook
from fastagg.ddp.scaler import GradScaler
from fastagg.ddp.state import AllReduceState

if TYPE_CHECKING:
    from fastagg.ddp.benchmark import Report, report

__all__ = ["AllReduceState", "GradScaler", "Report", "all_reduce_hook", "report"]

name_publicly(globals())


def __getattr__(name: str) -> Any:
    """The benchmark is fetched at first use: most training has none."""
    if name not in ("Report", "report"):
        raise AttributeError(f"module 'fastagg.ddp' has no attribute {name!r}")
    from fastagg.ddp import benchmark

    benchmark.Report.__module__ = __name__
    return getattr(benchmark, name)
