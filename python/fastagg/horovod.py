"""The names of a Horovod user's training script, on fastagg and torch.distributed.

>>> import fastagg.horovod as hvd
>>> hvd.init()

The script is started by torchrun. What Horovod has and fastagg has not is refused: reductions but averages and sums,
compressors of one's own (a wire's name is taken instead), process sets (a torch.distributed group is taken instead).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from fastagg._extras import needing

with needing("torch", __name__):
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # now: optimizers load it, and loaded beside a group it would keep that to the very end

from fastagg import distributed_optimizer
from fastagg._codes import FLOATS, WIRES, code_of_dtype
from fastagg._transports import channel_of, group_of
from fastagg.broadcasting import broadcast_optimizer_state, broadcast_parameters
from fastagg.communication import OPERATIONS, all_reduce
from fastagg.distributed_optimizer import SynchronizedOptimizer

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


def init() -> None:
    """Joins the ranks that torchrun has started, if torch.distributed is not initialised.

    Raises:
        RuntimeError: torchrun has not started this process.
    """
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


def barrier() -> None:
    """Waits for all ranks."""
    dist.barrier()


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
    _refuse(gradient_predivide_factor != 1.0, "gradient_predivide_factor: expected 1, sums are made in float32")
    _refuse(num_groups != 0 or groups is not None, "num_groups, groups: fastagg.DistributedOptimizer has fusion_bytes")
    _refuse(sparse_as_dense, "sparse_as_dense: expected False, sparse gradients are not supported")
    return distributed_optimizer.DistributedOptimizer(
        optimizer,
        named_parameters,
        wire=_wire(compression),
        op=_operation(op, None),
        backward_passes_per_step=backward_passes_per_step,
        group=_group(process_set),
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

    Args:
        tensor: floating; for sums also integers.
        average: the older spelling of `op`.
        name: not needed: calls are matched by their order.
        compression: how floating values travel.
        op: `Average`, the default, or `Sum`.
        prescale_factor: 1 only.
        postscale_factor: 1 only.
        process_set: a torch.distributed group in the place of Horovod's process set.

    Raises:
        TypeError, ValueError: as `fastagg.all_reduce`, and for what fastagg does not have.
    """
    _refuse(prescale_factor != 1.0 or postscale_factor != 1.0, "prescale_factor, postscale_factor: expected 1")
    operation, wire, group = _operation(op, average), _wire(compression), _group(process_set)
    result: torch.Tensor = _AllReduce.apply(tensor, operation, wire, group)  # type: ignore[no-untyped-call]
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
    """The same in place, without gradients."""
    _refuse(prescale_factor != 1.0 or postscale_factor != 1.0, "prescale_factor, postscale_factor: expected 1")
    _reduce(tensor.detach(), _operation(op, average), Compression.none, _group(process_set))
    return tensor


def broadcast(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """The root's tensor, as a new one."""
    return broadcast_(tensor.detach().clone(), root_rank, name)


def broadcast_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """The root's tensor, in place."""
    broadcast_parameters([(name or "tensor", tensor)], root_rank)
    return tensor


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """The root's object, pickled by torch.distributed."""
    holder = [obj]
    dist.broadcast_object_list(holder, src=root_rank)
    return holder[0]


class _AllReduce(torch.autograd.Function):
    """An all-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(
        context: Any, tensor: torch.Tensor, op: str, wire: str, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        context.options = op, wire, group
        result = tensor.clone()
        _reduce(result, op, wire, group)
        return result

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _AllReduce.apply(gradient, *context.options), None, None, None  # type: ignore[no-untyped-call]


def _reduce(tensor: torch.Tensor, op: str, wire: str, group: dist.ProcessGroup | None) -> None:
    """In place; sums of integers by the group's own backend, behind what is under way."""
    if code_of_dtype(tensor.dtype) in FLOATS:
        all_reduce(tensor, op=op, wire=wire, group=group)
    elif op == Sum:
        channel_of(group_of(group)).line.run(lambda: dist.all_reduce(tensor, group=group))
    else:
        raise TypeError(f"averages need a floating dtype (fp32, fp16, bf16, fp64), got {tensor.dtype}")


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
