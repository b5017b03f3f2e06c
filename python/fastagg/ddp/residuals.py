"""Error feedback's memory: what rounding took from each parameter's gradient, whatever the buckets."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastagg.distributed.exchange.exchange import Feedback


class Layout:
    """The parameters of a bucket, and their residuals in its order: one flat tensor, and one for the next step's."""

    def __init__(self, names: list[str], sizes: list[int], places: list[int], device: torch.device) -> None:
        self.names, self.sizes, self._device, self._factor = names, sizes, device, 1.0
        self.elements = sum(sizes)
        self.stretches = [(sum(sizes[:index]), place) for index, place in enumerate(places)]
        self.residual: torch.Tensor | None = None
        self.error: torch.Tensor | None = None

    def feedback(self, views: dict[str, torch.Tensor], factor: float) -> Feedback:
        """This bucket's residuals, at first use those of the parameters' former buckets, and where the next ones go."""
        if self.residual is None or self.error is None:
            parts = [
                _checked(name, views.get(name), size, self._device)
                for name, size in zip(self.names, self.sizes, strict=True)
            ]
            self.residual = torch.cat(parts)
            self.error = torch.zeros(self.elements, dtype=torch.float32, device=self._device)
        self._factor = factor
        return Feedback(self.residual, factor, self.error)

    def commit(self, finite: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Makes the errors the residuals, if they are finite; returns each parameter's."""
        if self.residual is None or self.error is None:
            return {}
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
        # What the residuals are shares of, and the loss scale that they were multiplied by; no shares: none are owed.
        self._shares, self._scale = 0.0, 1.0
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
            sizes = [_elements_of(parameter) for parameter in parameters]
            self._layouts[key] = Layout(list(names), sizes, list(places), parameters[0].device)
        self._is_complete |= is_last
        return self._layouts[key]

    def name_of(self, parameter: torch.Tensor) -> str:
        """How errors name a parameter."""
        shape = f"of shape {tuple(parameter.shape)}"
        if self._names and id(parameter) in self._known:
            return f"parameter {self._known[id(parameter)][0]!r} {shape}"
        return f"a parameter {shape}"

    def feedback_of(self, layout: Layout, shares: float, scale: float) -> Feedback:
        """A layout's residuals, and where the next ones go.

        Raises:
            ValueError: a loaded residual has another size.
        """
        return layout.feedback(self._views, self._factor(shares, scale))

    def commit(self, layouts: Sequence[Layout], shares: float, scale: float, finite: bool | torch.Tensor) -> None:
        """Makes the errors of a step, in all its buckets, the residuals. Former buckets are forgotten.

        Parameters that took no part in the step keep what they are owed.
        """
        if finite is False:  # they are those of numbers that nobody uses
            return
        chooses = finite if isinstance(finite, torch.Tensor) else None
        self._layouts = {key: layout for key, layout in self._layouts.items() if layout in layouts}
        new = {name: view for layout in layouts for name, view in layout.commit(chooses).items()}
        factor = self._factor(shares, scale)
        for name, view in self._views.items():
            if name not in new:
                new[name] = view if factor == 1 else view * factor
        self._views, self._shares, self._scale = new, shares, scale

    def state_dict(self) -> dict[str, Any]:
        """Copies of the residuals, by parameter."""
        return {
            "world": int(self._shares) if float(self._shares).is_integer() else self._shares,
            "loss_scale": self._scale,
            "residuals": {name: view.clone() for name, view in self._views.items()},
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Takes copies of residuals, the sums of those of several states.

        Raises:
            ValueError, TypeError: a state is not what `state_dict` returns, or no other state's; a name is not a
                parameter's.
        """
        if not states:
            raise ValueError("expected what state_dict() returns, or several of them, got none")
        found = [_checked_state(state) for state in states]
        owing = [state for state in found if state[2]] or found[:1]
        shares, scale, _ = owing[0]
        for other in owing:
            if other[:2] != (shares, scale):
                raise ValueError(f"states differ: world and loss_scale are {(shares, scale)} and {other[:2]}")
        known, sums = {*self._names, *(name for name, _ in self._known.values())}, dict[str, torch.Tensor]()
        for name, residual in (item for _, _, residuals in owing for item in residuals.items()):
            if (self._names or self._is_complete) and name not in known:
                raise ValueError(f"residuals of parameters that the model does not have: {name}")
            if name in sums and sums[name].numel() != residual.numel():
                sizes = f"{sums[name].numel()} and {residual.numel()} elements"
                raise ValueError(f"states differ: the residual of parameter {name} has {sizes}")
            sums[name] = sums[name] + residual if name in sums else residual
        for parameter in self._kept:
            name = self._known[id(parameter)][0]
            if name in sums:
                _checked(name, sums[name], _elements_of(parameter), sums[name].device)
        self._views, self._shares, self._scale = sums, shares, scale
        self._layouts.clear()

    @property
    def names(self) -> list[str]:
        """The parameters' names, in the model's order; none if they go by their places."""
        return self._names

    @names.setter
    def names(self, names: list[str]) -> None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"names: expected a list of strings, got {names!r:.100}")
        if len(set(names)) < len(names):
            raise ValueError("names: a name occurs twice")
        self._names = names

    def _factor(self, shares: float, scale: float) -> float:
        """What residuals become other shares by, and those of a loss of another scale."""
        return scale / self._scale * (shares / self._shares if self._shares else 1.0)

    def _number(self, parameter: torch.Tensor) -> None:
        """Notes the parameter that comes before those known."""
        number = len(self._known)
        if self._is_complete or (self._names and number >= len(self._names)):
            shape = tuple(parameter.shape)
            raise ValueError(f"a parameter of shape {shape} is not the model's: an AllReduceState serves one model")
        self._known[id(parameter)] = self._names[-1 - number] if self._names else str(number), self._elements
        self._kept.append(parameter)
        self._elements += _elements_of(parameter)


def _elements_of(parameter: torch.Tensor) -> int:
    """Of its gradient in a bucket, where DDP puts complex numbers as pairs of real ones."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def _checked(name: str, residual: torch.Tensor | None, size: int, device: torch.device) -> torch.Tensor:
    """A parameter's residual, flat; zeros if it has none yet."""
    if residual is None:
        return torch.zeros(size, dtype=torch.float32, device=device)
    if residual.numel() != size:
        raise ValueError(f"parameter {name}: expected a residual of {size} elements, got {residual.numel()}")
    return residual.reshape(-1).to(device, torch.float32)


def _checked_state(state: Any) -> tuple[float, float, dict[str, torch.Tensor]]:
    """The shares, the loss scale and copies of the residuals of a state from outside.

    Raises:
        TypeError, ValueError: it is none.
    """
    world, scale = _number_in(state, "world"), _number_in(state, "loss_scale")
    residuals = field(state, "residuals")
    if not isinstance(residuals, Mapping):
        raise TypeError(f"residuals: expected a mapping from names to tensors, got {type(residuals).__name__}")
    if world < 0 or (residuals and world == 0):
        raise ValueError(f"world: expected the number of ranks that the residuals belong to, got {world}")
    if scale <= 0:
        raise ValueError(f"loss_scale: expected a number above 0, got {scale}")
    return world, scale, {_checked_name(name): _checked_residual(name, one) for name, one in residuals.items()}


def field(state: Any, name: str) -> Any:
    """A field of a state from outside.

    Raises:
        TypeError, ValueError: it is no mapping, or has no such field.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"expected what state_dict() returns, got {type(state).__name__}")
    if name not in state:
        raise ValueError(f"expected what state_dict() returns, got a mapping without {name!r}")
    return state[name]


def count_in(state: Any, name: str) -> int:
    """A field that is a number of something.

    Raises:
        TypeError, ValueError: it is none.
    """
    given = field(state, name)
    try:
        count = -1 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        raise TypeError(f"{name}: expected an integer of 0 or more, got {given!r:.100}") from None
    if not 0 <= count < 2**63:
        raise ValueError(f"{name}: expected an integer of 0 or more, got {given!r:.100}")
    return count


def _number_in(state: Any, name: str) -> float:
    """A field that is a finite number."""
    given = field(state, name)
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{name}: expected a number, got {given!r:.100}")
    if not abs(given) < 2.0**127 or not math.isfinite(given):
        raise ValueError(f"{name}: expected a finite number, got {given!r:.100}")
    return float(given)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"residuals: expected names of parameters, got {name!r:.100}")
    return name


def _checked_residual(name: str, residual: Any) -> torch.Tensor:
    """A copy, flat and float32."""
    if type(residual) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(
            f"the residual of parameter {name:.100}: expected a torch.Tensor, got {type(residual).__name__}"
        )
    plain = residual.layout is torch.strided and residual.device.type in ("cpu", "cuda")
    if not plain or not residual.is_floating_point() or residual.is_quantized:
        got = f"{residual.dtype}, {residual.layout} on {residual.device}"
        raise TypeError(f"the residual of parameter {name:.100}: expected a dense floating tensor, got {got}")
    if residual.numel() * residual.element_size() > residual.untyped_storage().nbytes():
        raise ValueError(f"the residual of parameter {name:.100}: expected a tensor with memory of its own")
    flat: torch.Tensor = residual.detach().resolve_neg().reshape(-1).to(torch.float32, copy=True)
    if not flat.isfinite().all():
        raise ValueError(f"the residual of parameter {name:.100}: expected finite values, got infinity or NaN")
    return flat
