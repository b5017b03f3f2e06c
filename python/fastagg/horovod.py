"""The names of a Horovod user's training script, on fastagg and torch.distributed.

>>> import fastagg.horovod as hvd
>>> hvd.init()

The script is started by torchrun. What Horovod has and fastagg has not is refused: reductions but averages and sums,
compressors of one's own (a wire's name is taken instead), process sets (a torch.distributed group is taken instead).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from fastagg._extras import needing

with needing("torch", __name__):
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # now: optimizers load it, and loaded beside a group it would keep that to the very end

from fastagg._native.codes import FLOATS, WIRES, code_of_dtype
from fastagg.distributed import broadcast as broadcasting
from fastagg.distributed import optimizer as distributed_optimizer
from fastagg.distributed.channels import group_of, refusing
from fastagg.distributed.collectives import OPERATIONS, device_of, reduce_named
from fastagg.distributed.messages import add_up, gather
from fastagg.distributed.named_tensors import check_tensor, description
from fastagg.distributed.optimizer import SynchronizedOptimizer

__all__ = [
    "Average",
    "Compression",
    "DistributedOptimizer",
    "Sum",
    "allreduce",
    "allreduce_",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "global_process_set",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "size",
]

Average, Sum = "mean", "sum"
global_process_set: dist.ProcessGroup | None = None


class Compression:
    """Wires by the names of Horovod's compressors; any other wire is asked for by its own name, as in `quantize`."""

    none, fp16, bf16 = "fp32", "fp16", "bf16"


def init(comm: Any = None, process_sets: Any = None) -> None:
    """Joins the ranks that torchrun has started, if torch.distributed is not initialised.

    Raises:
        RuntimeError: torchrun has not started this process.
        ValueError: a communicator or process sets: make groups with torch.distributed.new_group.
    """
    _refuse(bool(comm), "comm: expected None, ranks are those that torchrun has started")
    _refuse(bool(process_sets), "process_sets: expected none, make groups with torch.distributed.new_group")
    if dist.is_initialized():
        return
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise RuntimeError("init() needs the environment of torchrun: torchrun --nproc-per-node 2 script.py")
    dist.init_process_group("gloo")


def is_initialized() -> bool:
    """Whether this process has joined the others."""
    return dist.is_initialized()


def shutdown() -> None:
    """Leaves the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among all."""
    return dist.get_rank()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size()


def local_rank() -> int:
    """This process's number on its host, from torchrun."""
    return _from_torchrun("LOCAL_RANK")


def local_size() -> int:
    """How many processes there are on this host, from torchrun."""
    return _from_torchrun("LOCAL_WORLD_SIZE")


def barrier(process_set: dist.ProcessGroup | None = global_process_set) -> None:
    """Waits for all ranks."""
    gather(b"", "barrier", group_of(_group(process_set)))


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: torch.optim.Optimizer,
    named_parameters: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: str = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: dist.ProcessGroup | None = global_process_set,
) -> SynchronizedOptimizer:
    """`fastagg.DistributedOptimizer` with Horovod's arguments.

    Raises:
        TypeError, ValueError: as there, and for what fastagg does not have.
    """
    with refusing(process_set):
        group, operation, wire = _group(process_set), _operation(op, None), _wire(compression)
        _refuse(
            gradient_predivide_factor != 1.0 and operation != Average, "gradient_predivide_factor: it needs op=Average"
        )  # which is divided once, in float32: the factor, which would keep sums in range, cancels out
        has_groups = num_groups != 0 or groups is not None
        _refuse(has_groups, "num_groups, groups: fastagg.DistributedOptimizer has fusion_bytes")
        _refuse(sparse_as_dense, "sparse_as_dense: expected False, sparse gradients are not supported")
        named = _of_the_optimizer(optimizer, named_parameters)
    return distributed_optimizer.DistributedOptimizer(
        optimizer, named, wire=wire, op=operation, backward_passes_per_step=backward_passes_per_step, group=group
    )


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: dist.ProcessGroup | None = global_process_set,
) -> torch.Tensor:
    """The mean or sum of a tensor over the ranks, as a new tensor through which gradients flow back.

    ``postscale_factor * reduce(prescale_factor * x)``

    Args:
        tensor: floating or of integers, whose mean is rounded towards zero.
        average: the older spelling of `op`.
        name: the same on all ranks in the same call: another one is an error there, before anything is added.
        compression: how floating values travel.
        op: `Average`, the default, or `Sum`.
        prescale_factor: multiplies the rank's values; 1 for integers.
        postscale_factor: multiplies the result; 1 for integers.
        process_set: a torch.distributed group in the place of Horovod's process set.

    Raises:
        TypeError, ValueError: as `fastagg.all_reduce`, and for what fastagg does not have.
    """
    with _refusing_to_reduce(tensor, process_set):
        _check_is_tensor(tensor)
        reduction = _Reduction(
            *(name or "", _operation(op, average), _wire(compression)),
            *(prescale_factor, postscale_factor, _group(process_set)),
        )
    result: torch.Tensor = _AllReduce.apply(tensor, reduction)  # type: ignore[no-untyped-call]
    return result


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: dist.ProcessGroup | None = global_process_set,
) -> torch.Tensor:
    """The same in place, without gradients.

    Raises:
        TypeError, ValueError: as there.
    """
    with _refusing_to_reduce(tensor, process_set):
        _check_is_tensor(tensor)
        operation, group = _operation(op, average), _group(process_set)
        reduction = _Reduction(name or "", operation, Compression.none, prescale_factor, postscale_factor, group)
    reduction.make(tensor.detach())
    return tensor


def broadcast(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: dist.ProcessGroup | None = global_process_set,
) -> torch.Tensor:
    """The root's tensor, as a new one; the mean of all ranks' gradients flows back to the root, zeros to the others.

    Raises:
        TypeError, ValueError: as `fastagg.broadcast_parameters`.
    """
    with refusing(process_set):
        _check_is_tensor(tensor)
        group = _group(process_set)
    result: torch.Tensor = _Broadcast.apply(tensor, root_rank, name, group)  # type: ignore[no-untyped-call]
    return result


def broadcast_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: dist.ProcessGroup | None = global_process_set,
) -> torch.Tensor:
    """The root's tensor, in place, without gradients.

    Raises:
        TypeError, ValueError: as `fastagg.broadcast_parameters`.
    """
    broadcasting.broadcast_parameters([(name or "tensor", tensor)], root_rank, group=_group(process_set))
    return tensor


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    name: str | None = None,
    process_set: dist.ProcessGroup | None = global_process_set,
) -> Any:
    """The root's object, pickled: with cloudpickle where it is installed."""
    return broadcasting.broadcast_object(obj, root_rank, group=_group(process_set))


def broadcast_parameters(
    params: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor] | torch.Tensor],
    root_rank: int = 0,
    process_set: dist.ProcessGroup | None = global_process_set,
) -> None:
    """Gives all ranks the root's parameters: `fastagg.broadcast_parameters`; a dict's order is of no account."""
    with refusing(process_set):
        group = _group(process_set)
        given = dict(sorted(params.items())) if isinstance(params, Mapping) else params
    broadcasting.broadcast_parameters(given, root_rank, group=group)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int = 0,
    model: torch.nn.Module | None = None,
    process_set: dist.ProcessGroup | None = global_process_set,
) -> None:
    """Gives all ranks the root's state: `fastagg.broadcast_optimizer_state`; the model is not needed."""
    broadcasting.broadcast_optimizer_state(optimizer, root_rank, group=_group(process_set))


class _Reduction(NamedTuple):
    """What `allreduce` does with a tensor."""

    name: str
    op: str
    wire: str
    prescale: float
    postscale: float
    group: dist.ProcessGroup | None

    def make(self, tensor: torch.Tensor) -> None:
        """Reduces in place."""
        if _is_of_integers(tensor):
            self._add_up_integers(tensor)
            return
        with _refusing_to_reduce(tensor, self.group):
            if self.prescale != 1.0:
                tensor.mul_(self.prescale)
        reduce_named(tensor, self.name, self.op, self.wire, self.group)
        if self.postscale != 1.0:
            tensor.mul_(self.postscale)

    def _add_up_integers(self, tensor: torch.Tensor) -> None:
        with _refusing_to_reduce(tensor, self.group):
            _refuse((self.prescale, self.postscale) != (1.0, 1.0), "prescale_factor, postscale_factor: integers need 1")
            check_tensor("tensor", tensor)
            group = group_of(self.group)
            whole = tensor.contiguous()
            title = f"allreduce {self.name!r}, {self.op} of {description('tensor', tensor)}"
        add_up(whole, title, group)
        if self.op == Average:
            whole.copy_(torch.div(whole, dist.get_world_size(group), rounding_mode="trunc"))
        if whole is not tensor:
            tensor.copy_(whole)


class _AllReduce(torch.autograd.Function):
    """An all-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, reduction: _Reduction) -> torch.Tensor:
        context.reduction = reduction
        with _refusing_to_reduce(tensor, reduction.group):
            result = tensor.clone()
        reduction.make(result)
        return result

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllReduce.apply(gradient, context.reduction), None  # type: ignore[no-untyped-call]


class _Broadcast(torch.autograd.Function):
    """A broadcast whose gradient is the mean of the gradients, on the root."""

    @staticmethod
    def forward(
        context: Any, tensor: torch.Tensor, root: int, name: str | None, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        context.options = root, name, group
        with refusing(group):
            copied = tensor.clone()
        return broadcast_(copied, root, name, group)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        root, name, group = context.options
        mean = allreduce(gradient, name=name and f"gradient of {name}", process_set=group)
        return mean if dist.get_rank() == root else torch.zeros_like(mean), None, None, None


def _refusing_to_reduce(tensor: Any, process_set: Any) -> AbstractContextManager[None]:
    """`refusing`, before an all-reduce of this tensor."""
    return refusing(process_set, None if _is_of_integers(tensor) else device_of(tensor))


def _is_of_integers(tensor: Any) -> bool:
    """Whether it is added up in its own arithmetic, as bytes on the host."""
    is_tensor = isinstance(tensor, torch.Tensor)
    return is_tensor and code_of_dtype(tensor.dtype) not in FLOATS and not tensor.is_complex()


def _check_is_tensor(tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")


def _of_the_optimizer(optimizer: Any, named_parameters: Any) -> Any:
    """Horovod takes the names of a whole model for an optimizer of a part of it."""
    if named_parameters is None or not isinstance(optimizer, torch.optim.Optimizer):
        return named_parameters
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    pairs = named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters
    return [pair for pair in pairs if not isinstance(pair, tuple) or len(pair) != 2 or pair[1] in held]


def _operation(op: Any, average: bool | None) -> str:
    if average is not None:
        _refuse(op is not None, "average and op: give one of them")
        return Average if average else Sum
    op = Average if op is None else op
    _refuse(op not in OPERATIONS, f"op: expected Average or Sum, got {op!r}")
    return str(op)


def _wire(compression: Any) -> str:
    wires = (*WIRES, "Compression.none, .fp16, .bf16")
    _refuse(not isinstance(compression, str), f"compression: expected one of {', '.join(wires)}, got {compression!r}")
    return str(compression)


def _group(process_set: Any) -> dist.ProcessGroup | None:
    known = process_set is None or isinstance(process_set, dist.ProcessGroup)
    _refuse(not known, f"process_set: expected a torch.distributed.ProcessGroup, got {process_set!r}")
    return process_set  # type: ignore[no-any-return]


def _refuse(unsupported: bool, reason: str) -> None:
    if unsupported:
        raise ValueError(reason)


def _from_torchrun(variable: str) -> int:
    if variable not in os.environ:
        raise RuntimeError(f"{variable} is not set: start the script with torchrun")
    return int(os.environ[variable])
