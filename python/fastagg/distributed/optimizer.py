"""Optimizers whose gradients are averaged over the ranks, for training loops without DDP.

>>> optimizer = DistributedOptimizer(optimizer, model.named_parameters(), wire="fp16")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from fastagg._extras import needing

with needing("torch", __name__):
    import torch
    import torch.distributed as dist

from fastagg._native.codes import FLOATS, code_of_dtype, wire_name
from fastagg.distributed.channels import group_of, refusing
from fastagg.distributed.collectives import OPERATIONS
from fastagg.distributed.fused_gradients import FusedGradients
from fastagg.distributed.named_tensors import (
    FUSION_BYTES,
    check_alike,
    dense_strides,
    description,
    named_tensors,
)


def DistributedOptimizer(  # noqa: N802 - the name that Horovod's users know
    optimizer: torch.optim.Optimizer,
    named_parameters: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | None = None,
    *,
    wire: Any = "fp32",
    op: str = "mean",
    backward_passes_per_step: int = 1,
    fusion_bytes: int = FUSION_BYTES,
    group: dist.ProcessGroup | None = None,
) -> SynchronizedOptimizer:
    """Makes an optimizer step by the gradients of all ranks, reduced by `all_reduce` while backward goes on.

    ``gradient = decode(encode(sum_r(decode(encode(gradient_r))) / world))``, as `all_reduce` does it.

    A gradient that is under way cannot be used: clipping, a GradScaler and all else that looks at gradients come after
    ``synchronize()``. A gradient is a view of its buffer, which the next step overwrites. Several backward passes of a
    step add up, as they do without ranks. From backward until ``synchronize()`` or ``step()`` returns, leave the
    process group to the optimizer, or give it one of its own.

    Args:
        optimizer: any of torch's kind but LBFGS. It is changed: its class becomes a subclass of what it was.
        named_parameters: `model.named_parameters()`; None: named by their places in the optimizer. Parameters are fused
            in reverse order, as backward meets them.
        wire: how gradients travel, as in `quantize`, rounded to nearest.
        op: "mean" or "sum".
        backward_passes_per_step: how often backward adds to each gradient before it is sent.
        fusion_bytes: size of the buffers in which gradients travel; a larger gradient travels alone.
        group: the process group; None for the default one.

    Returns:
        The optimizer.

    Raises:
        TypeError: a parameter of a dtype without a wire.
        ValueError: wrong names or arguments; or ranks that differ in parameters or arguments, on every rank.
    """
    with refusing(group):
        _check_optimizer(optimizer)
        wire = wire_name(wire)
        if op not in OPERATIONS:
            raise ValueError(f"op: expected one of {', '.join(OPERATIONS)}, got {op!r}")
        if backward_passes_per_step < 1:
            raise ValueError(f"backward_passes_per_step: expected 1 or more, got {backward_passes_per_step}")
        if fusion_bytes < 1:
            raise ValueError(f"fusion_bytes: expected 1 or more, got {fusion_bytes}")
        named = _named(optimizer, named_parameters)
        trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        if not trainable:
            raise ValueError("optimizer: none of its parameters requires a gradient")
        group = group_of(group)
        options = f"{wire=}, {op=}, {backward_passes_per_step=}, {fusion_bytes=}"
        lines = [f"{description(name, parameter)}, strides {dense_strides(parameter)}" for name, parameter in trainable]
    check_alike([options, *lines], group)
    with refusing(group):
        gradients = FusedGradients(
            trainable,
            wire=wire,
            op=op,
            backward_passes=backward_passes_per_step,
            fusion_bytes=fusion_bytes,
            group=group,
        )
    vars(optimizer).pop("step", None)  # a scheduler's, around the step that is replaced
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (SynchronizedOptimizer, kind), {})
    distributed = cast(SynchronizedOptimizer, optimizer)
    distributed._gradients, distributed._synchronizes = gradients, True
    distributed._frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
    return distributed


class SynchronizedOptimizer(torch.optim.Optimizer):
    """What `DistributedOptimizer` adds to an optimizer's class."""

    _gradients: FusedGradients
    _frozen: list[tuple[str, torch.Tensor]]
    _synchronizes: bool

    def synchronize(self) -> None:
        """Waits until every parameter has its reduced gradient; `step` does not do it again.

        A parameter without a gradient on some ranks counts as zeros there; without one on any rank it has None.

        Raises:
            RuntimeError: a gradient was removed or replaced since backward, or a frozen parameter is frozen no more.
            PeerError: a rank has died or hung.
        """
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise RuntimeError(f"{name!r} requires a gradient and did not when DistributedOptimizer was called")
        self._gradients.synchronize()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Lets `step` leave the gradients as they are: after `synchronize`, and clipping for example."""
        self._synchronizes = False
        try:
            yield
        finally:
            self._synchronizes = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronises the gradients, if `synchronize` has not, and steps; a closure's, each time it was called.

        Raises:
            RuntimeError: in `skip_synchronize`, if gradients are not synchronised.
        """
        if closure is None:
            self._synchronize_for_step()
            result = super().step()
        else:

            def synchronized_closure() -> Any:
                loss = closure()
                self._synchronize_for_step()
                return loss

            result = super().step(synchronized_closure)
        self._gradients.synchronized = False
        return result

    # Torch wraps a class's step for its hooks when it finds it unmarked, and has wrapped the inherited one.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's own.

        Raises:
            RuntimeError: there are gradients that are not synchronised.
        """
        if self._gradients.begun:
            raise RuntimeError("zero_grad() between backward and step(): call step() or synchronize() first")
        self._gradients.synchronized = False
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises RuntimeError: parameters are assigned to buffers once."""
        raise RuntimeError("add_param_group() after DistributedOptimizer(): add all parameters first")

    def _synchronize_for_step(self) -> None:
        if self._synchronizes:
            self.synchronize()
        elif self._gradients.begun:
            raise RuntimeError("step() in skip_synchronize(): gradients are not synchronised, call synchronize() first")


def _check_optimizer(optimizer: Any) -> None:
    """Raises TypeError or ValueError for an optimizer that cannot be made a distributed one."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, SynchronizedOptimizer):
        raise ValueError("optimizer: it is a DistributedOptimizer already")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS decides by the loss, which differs between ranks")
    own_step = vars(optimizer).get("step")
    if own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
        raise ValueError("optimizer: its step() has been replaced; call DistributedOptimizer before")


def _named(optimizer: torch.optim.Optimizer, named_parameters: Any) -> list[tuple[str, torch.Tensor]]:
    """The optimizer's parameters with their names, in the order in which they were named.

    Raises:
        TypeError, ValueError: names and parameters do not match, or `all_reduce` cannot serve a parameter.
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if named_parameters is None:
        named_parameters = [(f"parameter {place}", parameter) for place, parameter in enumerate(held)]
    named = named_tensors("named_parameters", named_parameters)
    members, names = set(held), dict[torch.Tensor, str]()
    for name, parameter in named:
        if names.setdefault(parameter, name) != name:
            raise ValueError(f"named_parameters: {names[parameter]!r} and {name!r} are one parameter")
        if parameter.requires_grad and parameter not in members:
            raise ValueError(f"named_parameters: {name!r} is not in the optimizer")
        if parameter.requires_grad and code_of_dtype(parameter.dtype) not in FLOATS:
            raise TypeError(f"{name!r}: expected a floating dtype (fp32, fp16, bf16, fp64), got {parameter.dtype}")
    for place, parameter in enumerate(held):
        if parameter not in names:
            raise ValueError(f"named_parameters: no name for {description(f'parameter {place}', parameter)}")
    return [(name, parameter) for name, parameter in named if parameter in members]
