"""The DDP communication hook: gradients are averaged as `all_reduce` does it, while backward goes on.

>>> state = AllReduceState(wire="int8", error_feedback=True, named_parameters=model.named_parameters())
>>> model.register_comm_hook(state, all_reduce_hook)

`GradScaler` and gradient clipping can use what the hook finds on the way; `report` tells whether a wire would gain
anything.
"""

# No annotations from the future: torch compares the hook's with its own class.
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fastagg._codes import FLOATS, Code, code_of_dtype
from fastagg._transports import channel_of, group_of
from fastagg.hook_state import AllReduceState

if TYPE_CHECKING:
    from fastagg.headroom import Report, report

__all__ = ["AllReduceState", "GradScaler", "Report", "all_reduce_hook", "report"]


def all_reduce_hook(
    state: AllReduceState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket over the group's ranks in a thread of its own, or on a stream, in the order of the buckets.

    ``gradient = decode(encode(sum_r(decode(encode(gradient_r + residual_r))) / world))``

    As in `all_reduce`, the mean of two ranks, and of few elements, is not encoded.

    Raises:
        TypeError: the bucket's dtype has no wire; or torch.compile with optimize_ddp="python_reducer" hands over none.
        ValueError: the state belongs to another model.
        PeerError: in backward, if a rank has died or hung.
    """
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        raise TypeError(f"expected a bucket of DDP's C++ reducer, got {type(bucket).__name__}: set optimize_ddp=True")
    group = group_of(state.process_group)
    gradients = bucket.buffer()
    code = code_of_dtype(gradients.dtype)
    if code not in FLOATS or gradients.device.type not in ("cpu", "cuda"):
        device = gradients.device
        raise TypeError(f"expected floating gradients on a CPU or CUDA device, got {gradients.dtype} on {device}")
    channel = channel_of(group, gradients.device)
    exchange = state.begin_bucket(group, channel.name, bucket, Code(code))

    def reduce() -> None:
        try:
            transport = channel.transport
            state.transport = transport.name
            state.end_bucket(transport.all_reduce(exchange), is_last=bucket.is_last())
        except Exception:
            state.gradients_are_used()  # they are lost: the next step begins anew
            raise

    return channel.line.begin_future(reduce, gradients)


class GradScaler(torch.amp.GradScaler):
    """torch's GradScaler without its pass over the gradients: the hook unscales them while it decodes.

    ``gradient = decode(mean) / scale``, and found_inf is what the hook has found.

    The hook must run once between two calls of `update`: accumulate gradients under DDP's no_sync.

    >>> scaler = GradScaler(state, "cpu")
    """

    def __init__(self, state: AllReduceState, device: str = "cpu", **options: Any) -> None:
        """torch.amp.GradScaler's arguments, after the state of the model's hook."""
        super().__init__(device, **options)
        self._state = state

    def scale(self, outputs: Any) -> Any:
        """Multiplies by the loss scale, and tells the hook."""
        scaled = super().scale(outputs)
        self._state.loss_scale = self.get_scale() if self.is_enabled() else None
        return scaled

    def update(self, new_scale: Any = None) -> None:
        """As torch's; the next backward may come."""
        self._state.gradients_are_used()
        super().update(new_scale)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        """Instead of torch's pass: the gradients are unscaled already, and the same on every rank.

        Raises:
            ValueError: the optimizer has gradients that the hook has not unscaled.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._state.check_unscaled([parameter for parameter in parameters if parameter.grad is not None])
        return {found_inf.device: self._state.tell_found_inf(found_inf)}


def __getattr__(name: str) -> Any:
    """The report is fetched at first use: it needs this module."""
    if name not in ("Report", "report"):
        raise AttributeError(f"module 'fastagg.ddp' has no attribute {name!r}")
    from fastagg import headroom

    return getattr(headroom, name)
