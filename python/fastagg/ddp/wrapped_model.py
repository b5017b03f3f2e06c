"""What DistributedDataParallel knows of a model, and does not tell its communication hook."""

from __future__ import annotations

import gc
import weakref
from itertools import compress

import torch
from torch.nn.parallel import DistributedDataParallel


class WrappedModel:
    """The DistributedDataParallel of a hook's buckets, which torch does not hand to the hook: it is searched for."""

    def __init__(self) -> None:
        self._found: weakref.ref[DistributedDataParallel] | None = None
        self._is_searched = False

    def search(self, parameter: torch.Tensor, state: object) -> None:
        """Finds it by one of its parameters, at first use; of several the one whose hook has this state."""
        if self._is_searched and (self._found is None or self._found() is not None):
            return
        self._is_searched = True
        kinds = _kinds_of(DistributedDataParallel)
        objects = gc.get_objects()
        # Without a step of Python's for each of some hundred thousand.
        models = [
            one for one in compress(objects, map(kinds.__contains__, map(type, objects))) if hasattr(one, "reducer")
        ]
        del objects
        own = [one for one in models if any(parameter is other for other in one._module_parameters)]
        own.sort(key=lambda one: (any(given is state for _, given in one._comm_hooks), bool(one._comm_hooks)))
        self._found = weakref.ref(own[-1]) if own else None

    @property
    def may_leave_out(self) -> bool:
        """Whether DDP leaves the gradient of a parameter that no rank has used in a step as it was."""
        model = self._model
        return model is not None and bool(model.find_unused_parameters or model.static_graph)

    @property
    def joins(self) -> bool:
        """Whether ranks may have run out of inputs: they are in the context of `join`."""
        model = self._model
        return model is not None and bool(model._join_config.enable)

    @property
    def divides_by_present_ranks(self) -> bool:
        """Whether means are those of the ranks that still have inputs: `join(divide_by_initial_world_size=False)`."""
        model = self._model
        if model is None or not self.joins:
            return False
        return bool(model._join_config.is_first_joinable) and not model._divide_by_initial_world_size

    @property
    def _model(self) -> DistributedDataParallel | None:
        return None if self._found is None else self._found()


def is_in_backward() -> bool:
    """Whether autograd calls: the hook of a rank that has run out of inputs is called by `join`, with zeros."""
    return torch._C._current_graph_task_id() >= 0


def _kinds_of(kind: type) -> set[type]:
    """A class and all that are derived from it."""
    return {kind}.union(*map(_kinds_of, kind.__subclasses__()))
