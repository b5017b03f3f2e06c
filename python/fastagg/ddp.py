"""The DDP communication hook: gradients are averaged as `all_reduce` does it, while backward goes on.

>>> state = AllReduceState(wire="int8", error_feedback=True, named_parameters=model.named_parameters())
>>> model.register_comm_hook(state, all_reduce_hook)

`GradScaler` and gradient clipping can use what the hook finds on the way; `report` tells whether a wire would gain
anything.
"""

# No annotations from the future: torch compares the hook's with its own class.
import inspect
import types
from typing import TYPE_CHECKING, Any

from fastagg._extras import needing

with needing("torch", __name__):
    import torch
    import torch.distributed as dist
    from torch.amp.grad_scaler import OptState

from fastagg._codes import FLOATS, code_of_dtype
from fastagg._loss_scale import when_backward_begins
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
        TypeError: the state is none; the gradients are sparse, or of a dtype without a wire; or torch.compile with
            optimize_ddp="python_reducer" hands over none.
        ValueError: the state belongs to another model.
        PeerError: in backward, if a rank has died or hung.
    """
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        raise TypeError(f"expected a bucket of DDP's C++ reducer, got {type(bucket).__name__}: set optimize_ddp=True")
    if not isinstance(state, AllReduceState):
        raise TypeError(f"state: expected an AllReduceState, got {type(state).__name__}: register one with the hook")
    gradients = bucket.buffer()
    _check_gradients(state, gradients, bucket.parameters())
    group = group_of(state.process_group)
    channel = channel_of(group, gradients.device)
    begun = state.begin_bucket(group, bucket)

    def reduce() -> None:
        try:
            state.reduce_bucket(channel.transport, begun)
        except Exception:
            state.unscaled.forget()  # they are lost: the next step begins anew
            raise

    return channel.line.begin_future(reduce, gradients)


def _check_gradients(state: AllReduceState, gradients: torch.Tensor, parameters: list[torch.Tensor]) -> None:
    """Raises TypeError for gradients that the hook cannot reduce; every rank's bucket is the same."""
    first = state.name_of(parameters[0])
    if gradients.layout is not torch.strided:
        remedy = "build its layer with sparse=False, or leave it out of DDP's hook"
        raise TypeError(f"{first} has sparse gradients, which the hook does not reduce: {remedy}")
    if code_of_dtype(gradients.dtype) not in FLOATS or gradients.device.type not in ("cpu", "cuda"):
        got = f"{gradients.dtype} on {gradients.device} in the bucket of {first}"
        raise TypeError(f"expected floating gradients (fp32, fp16, bf16, fp64) on a CPU or CUDA device, got {got}")


class GradScaler(torch.amp.GradScaler):
    """torch's GradScaler without its pass over the gradients: the hook unscales them while it decodes.

    ``gradient = decode(mean) / scale``, and found_inf is what the hook has found.

    Gradients that the hook has not unscaled, those of parameters outside its model among them, are unscaled as torch
    does it. Those that it has unscaled and nobody has used are scaled again before the next scaled loss's backward.

    >>> scaler = GradScaler(state, "cpu")
    """

    def __init__(self, state: AllReduceState, device: str = "cpu", **options: Any) -> None:
        """torch.amp.GradScaler's arguments, after the state of the model's hook."""
        super().__init__(device, **options)
        self._state = state

    def scale(self, outputs: Any) -> Any:
        """Multiplies by the loss scale; the hook is told when backward comes through what is returned."""
        scaled = super().scale(outputs)
        if not self.is_enabled():
            return scaled
        state, scale = self._state, self.get_scale()
        return when_backward_begins(scaled, lambda _: state.scaled_backward_begins(scale))

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As torch's, also for fused optimizers, which would unscale by themselves.

        Raises:
            RuntimeError: there is a closure.
            TypeError: the optimizer's step takes a grad_scaler, by which it unscales.
        """
        if not self.is_enabled():
            return super().step(optimizer, *args, **kwargs)
        if any(map(callable, args)) or "closure" in kwargs:
            raise RuntimeError("step() with a closure: GradScaler unscales what one backward pass has left, once")
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            if "grad_scaler" in inspect.signature(optimizer.step).parameters:
                name = type(optimizer).__name__
                raise TypeError(f"{name}.step(grad_scaler=) unscales by itself: use torch.amp.GradScaler with it")
            if self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
                self.unscale_(optimizer)  # so that the optimizer is not told to do it
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: Any = None) -> None:
        """As torch's; gradients that no optimizer has used stay scaled by the old scale, as there."""
        self._state.unscaled.scale_again()
        super().update(new_scale)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        """Torch's pass for those gradients alone that the hook has not unscaled.

        What the hook has found is told where this optimizer has all of them: another one's may be the infinite ones.
        """
        parameters = (one for group in optimizer.param_groups for one in group["params"])
        divided, others, are_all = self._state.unscaled.take(parameters)
        found = super()._unscale_grads_(_holding(others), inv_scale, found_inf, allow_fp16)
        if not divided:
            return found
        if are_all or not self._state.may_have_found_inf:
            checked = {found_inf.device: self._state.tell_found_inf(found_inf.clone())}
        else:
            checked = super()._unscale_grads_(_holding(divided), torch.ones_like(inv_scale), found_inf, True)
        for device, one in checked.items():
            # Fused optimizers skip at exactly 1.
            found[device] = torch.maximum(found[device], one) if device in found else one
        return found


def _holding(parameters: list[torch.Tensor]) -> Any:
    """As much of an optimizer as torch's pass reads."""
    return types.SimpleNamespace(param_groups=[{"params": parameters}])


def __getattr__(name: str) -> Any:
    """The report is fetched at first use: it needs this module."""
    if name not in ("Report", "report"):
        raise AttributeError(f"module 'fastagg.ddp' has no attribute {name!r}")
    from fastagg import headroom

    return getattr(headroom, name)
