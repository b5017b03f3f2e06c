"""Which gradients the hook has divided by the loss scale where torch's GradScaler expects them multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


class UnscaledGradients:
    """Gradients that the hook has divided by the loss scale, until a scaler counts them as unscaled."""

    def __init__(self) -> None:
        self._parameters: dict[int, torch.Tensor] = {}
        self._scale, self._noted = 1.0, 0

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def note(self, parameters: Sequence[torch.Tensor], scale: float) -> None:
        """These parameters' gradients have been divided."""
        self._scale = scale
        self._parameters.update((id(parameter), parameter) for parameter in parameters)
        self._noted = len(self._parameters)

    def forget(self) -> None:
        """They are lost."""
        self._parameters.clear()

    def take(self, parameters: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor], bool]:
        """Of these parameters those whose gradients have been divided, from now on the scaler's, and the others.

        And whether the former are all of the step's.
        """
        divided, others = list[torch.Tensor](), list[torch.Tensor]()
        for parameter in parameters:
            (divided if self._parameters.pop(id(parameter), None) is not None else others).append(parameter)
        are_all = len(divided) == self._noted
        return [parameter for parameter in divided if parameter.grad is not None], others, are_all

    def any_left(self) -> bool:
        """Whether there are such gradients still."""
        return any(parameter.grad is not None for parameter in self._parameters.values())

    @torch.no_grad()
    def scale_again(self) -> None:
        """Multiplies those that nobody has used, so that they are what torch's GradScaler would have."""
        gradients = [one.grad for one in self._parameters.values() if one.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self._scale)
        self._parameters.clear()


def when_backward_begins(outputs: Any, begin: Callable[[Any], None]) -> Any:
    """The same outputs, scaled ones as GradScaler returns them; `begin` is called when backward comes through them."""
    if isinstance(outputs, torch.Tensor):
        if outputs.requires_grad:
            outputs.register_hook(begin)  # type: ignore[no-untyped-call]
        return outputs
    followed = (when_backward_begins(one, begin) for one in outputs)
    return type(outputs)(followed) if isinstance(outputs, (list, tuple)) else followed


class ScaledBackward:
    """A backward pass through a scaled loss. The engine alone holds it: one that fails half way takes it along."""

    def __init__(self, scale: float) -> None:
        self.scale: float | None = scale
        engine = torch.autograd.Variable._execution_engine
        # At the very end, after what DDP does there: the first iteration of a static graph is reduced so.
        engine.queue_callback(lambda: engine.queue_callback(self._end))

    def _end(self) -> None:
        self.scale = None
