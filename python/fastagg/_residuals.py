"""Error feedback's memory: what rounding took from each parameter's gradient, whatever the buckets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastagg._exchange import Feedback


class Layout:
    """The parameters of a bucket, and their residuals in its order: one flat tensor, and one for the next step's."""

    def __init__(self, names: list[str], sizes: list[int], places: list[int], device: torch.device) -> None:
        self.names, self.sizes, self._device, self._factor = names, sizes, device, 1.0
        self.stretches = [(sum(sizes[:index]), place) for index, place in enumerate(places)]
        self.residual = self.error = torch.empty(0)

    def feedback(self, views: dict[str, torch.Tensor], factor: float) -> Feedback:
        """This bucket's residuals, at first use those of the parameters' former buckets, and where the next ones go."""
        if self.residual.numel() == 0:
            parts = [
                _checked(name, views.get(name), size, self._device)
                for name, size in zip(self.names, self.sizes, strict=True)
            ]
            self.residual, self.error = torch.cat(parts), torch.zeros(sum(self.sizes), device=self._device)
        self._factor = factor
        return Feedback(self.residual, factor, self.error)

    def commit(self, finite: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Makes the errors the residuals, if they are finite; returns each parameter's."""
        if finite is not None:  # the host does not know it yet: the device chooses
            torch.where(finite, self.error, self.residual * self._factor, out=self.error)
        self.residual, self.error = self.error, self.residual
        return dict(zip(self.names, torch.split(self.residual, self.sizes), strict=True))


class Residuals:
    """Residuals by parameter; a bucket that DDP makes up anew takes its parameters' along."""

    def __init__(self, named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
        self._known: dict[int, tuple[str, int]] = {}  # by id: the parameter's name, and its first element's place
        self._kept: list[torch.Tensor] = []  # so that an id stays theirs
        self._elements = 0
        self._is_complete = False  # all of the model's parameters are known
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._views: dict[str, torch.Tensor] = {}
        self._world, self._scale = 0, 1.0  # the ranks and the loss scale that the residuals belong to
        named = [] if named_parameters is None else [(name, one) for name, one in named_parameters if one.requires_grad]
        self._names = [name for name, _ in named]
        if len(set(self._names)) < len(self._names):
            raise ValueError("named_parameters: a name occurs twice")
        for _, parameter in reversed(named):
            self._number(parameter)
        self._is_complete = bool(named)

    def layout_of(self, parameters: Sequence[torch.Tensor], is_last: bool) -> Layout:
        """The layout of a bucket; the first step's buckets tell what the model's parameters are.

        Raises:
            ValueError: a parameter is not the model's.
        """
        key = tuple(map(id, parameters))
        if key not in self._layouts:
            for parameter in reversed(parameters):
                if id(parameter) not in self._known:
                    self._number(parameter)
            names, places = zip(*(self._known[id(parameter)] for parameter in parameters), strict=True)
            sizes = [parameter.numel() for parameter in parameters]
            self._layouts[key] = Layout(list(names), sizes, list(places), parameters[0].device)
        self._is_complete |= is_last
        return self._layouts[key]

    def knows(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is the model's."""
        return id(parameter) in self._known

    def feedback_of(self, layout: Layout, world: int, scale: float) -> Feedback:
        """A layout's residuals, and where the next ones go.

        Raises:
            ValueError: a loaded residual has another size.
        """
        return layout.feedback(self._views, scale / self._scale * (world / self._world if self._world else 1.0))

    def commit(self, layouts: Sequence[Layout], world: int, scale: float, finite: bool | torch.Tensor) -> None:
        """Makes the errors of a step, in all its buckets, the residuals. Former buckets are forgotten."""
        if finite is False:  # they are those of numbers that nobody uses
            return
        chooses = finite if isinstance(finite, torch.Tensor) else None
        self._layouts = {key: layout for key, layout in self._layouts.items() if layout in layouts}
        self._views = {name: view for layout in layouts for name, view in layout.commit(chooses).items()}
        self._world, self._scale = world, scale

    def state_dict(self) -> dict[str, Any]:
        """Copies of the residuals, by parameter."""
        return {
            "world": self._world,
            "loss_scale": self._scale,
            "residuals": {name: view.clone() for name, view in self._views.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes copies of residuals.

        Raises:
            ValueError: a name is not a parameter's.
        """
        unknown = set(state["residuals"]) - set(self._names)
        if self._names and unknown:
            raise ValueError(f"residuals of parameters that the model does not have: {', '.join(sorted(unknown))}")
        self._views = {name: residual.clone() for name, residual in state["residuals"].items()}
        self._world, self._scale = int(state["world"]), float(state["loss_scale"])
        self._layouts.clear()

    @property
    def names(self) -> list[str]:
        """The parameters' names, in the model's order; none if they go by their places."""
        return self._names

    @names.setter
    def names(self, names: list[str]) -> None:
        self._names = names

    def _number(self, parameter: torch.Tensor) -> None:
        """Notes the parameter that comes before those known."""
        number = len(self._known)
        if self._is_complete or (self._names and number >= len(self._names)):
            shape = tuple(parameter.shape)
            raise ValueError(f"a parameter of shape {shape} is not the model's: an AllReduceState serves one model")
        self._known[id(parameter)] = self._names[-1 - number] if self._names else str(number), self._elements
        self._kept.append(parameter)
        self._elements += parameter.numel()


def _checked(name: str, residual: torch.Tensor | None, size: int, device: torch.device) -> torch.Tensor:
    """A parameter's residual, flat; zeros if it has none yet."""
    if residual is None:
        return torch.zeros(size, device=device)
    if residual.numel() != size:
        raise ValueError(f"parameter {name}: expected a residual of {size} elements, got {residual.numel()}")
    return residual.reshape(-1).to(device, torch.float32)
