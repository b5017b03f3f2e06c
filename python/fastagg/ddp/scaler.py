"""torch's GradScaler, unscaled by the hook."""

import inspect
import types
from typing import Any

from fastagg._extras import needing

with needing("torch", "fastagg.ddp"):
    import torch
    from torch.amp.grad_scaler import OptState
from fastagg.ddp.loss_scale import when_backward_begins
from fastagg.ddp.state import AllReduceState


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
