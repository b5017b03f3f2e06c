"""The DDP communication hook: gradients are averaged by `all_reduce` while backward goes on.

>>> state = AllReduceState(wire="fp16")
>>> model.register_comm_hook(state, all_reduce_hook)

`report` tells whether that would gain anything.
"""

# No annotations from the future: torch compares the hook's with its own class.
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fastagg._codes import FLOATS, Code, code_of_dtype, wire_name
from fastagg._transports import executor_of, transport_of
from fastagg.communication import encoding_of, reduce_tensor

if TYPE_CHECKING:
    from fastagg.headroom import Report, report

__all__ = ["AllReduceState", "Report", "all_reduce_hook", "report"]


def __getattr__(name: str) -> Any:
    """The report is fetched at first use: it needs this module."""
    if name not in ("Report", "report"):
        raise AttributeError(f"module 'fastagg.ddp' has no attribute {name!r}")
    from fastagg import headroom

    return getattr(headroom, name)


class AllReduceState:
    """What `all_reduce_hook` needs, and what it found in the last step. It pickles, its group left out.

    Attributes:
        found_inf: whether an averaged gradient is infinite or NaN; the same on every rank.
        wire_bytes: encoded bytes, scales included, that this rank handed to others.
        transport: how the ranks exchange; None before the first step.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, wire: Any = "fp16") -> None:
        """The state of one model's hook.

        Args:
            process_group: the model's group; None for the default one.
            wire: how gradients travel, as in `quantize`, rounded to nearest.

        Raises:
            ValueError: an unknown wire.
        """
        self.process_group, self.wire = process_group, wire_name(wire)
        self.found_inf, self.wire_bytes = False, 0
        self.transport: str | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def all_reduce_hook(
    state: AllReduceState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket over the group's ranks in a thread of its own, in the order of the buckets.

    ``gradient = decode(encode(sum_r(decode(encode(gradient_r))) / world))``

    Raises:
        TypeError: the bucket's dtype has no wire.
        PeerError: in backward, if a rank has died or hung (torch may pass it on as a RuntimeError that quotes it).
    """
    group = state.process_group if state.process_group is not None else dist.group.WORLD
    gradients = bucket.buffer()
    code = code_of_dtype(gradients.dtype)
    if group is None or code not in FLOATS or gradients.device.type != "cpu":
        raise TypeError(f"expected floating gradients on the CPU, got {gradients.dtype} on {gradients.device}")
    if bucket.index() == 0:
        state.found_inf, state.wire_bytes = False, 0
    transport = transport_of(group)
    state.transport = transport.name
    encoding = encoding_of(state.wire, Code(code), None, None)
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()

    def reduce() -> None:
        try:
            outcome = reduce_tensor(transport, gradients, Code(code), encoding, mean=True)
            with state._lock:
                state.found_inf |= not outcome.finite
                state.wire_bytes += outcome.wire_bytes
            future.set_result(gradients)
        except Exception as error:  # the future carries it to whoever waits
            future.set_exception(error)  # type: ignore[arg-type]

    executor_of(transport).submit(reduce)
    return future
