"""Who reduces: fastagg with its wires and transports, and what a user would call instead."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

import fastagg
from all_reduce_cases import GLOO, OPEN_MPI, TORCH_HOOK, fastagg_over
from fastagg.distributed.channels import channel_of

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One way to reduce a tensor in place."""

    name: str
    package: str
    wire: str
    prepare: Callable[[torch.Tensor], Call]
    transport: Callable[[], str]
    is_sum: bool = False  # where the mean would cost another pass, which is not asked of it


def contenders() -> dict[str, Contender]:
    """Those that can run among these ranks, Open MPI if it has started them; all ranks must ask for them together."""
    group, backend = dist.group.WORLD, _backend_group()
    wires = ("fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "sign")
    found = [
        *(_fastagg(fastagg_over(wire), wire, group) for wire in wires),
        *(_fastagg(fastagg_over(wire, "backend"), wire, backend) for wire in ("fp32", "fp16")),
        Contender(GLOO, "torch", "fp32", lambda x: lambda: dist.all_reduce(x), lambda: "TCP", is_sum=True),
        Contender(TORCH_HOOK, "torch", "fp16", _torch_hook, lambda: "TCP"),
    ]
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        found.append(Contender(OPEN_MPI, "mpi4py", "fp32", _open_mpi, lambda: "Open MPI's own", is_sum=True))
    return {contender.name: contender for contender in found}


def _backend_group() -> dist.ProcessGroup:
    """A group of all ranks that does not use shared memory; the choice is made at its first call."""
    group = dist.new_group()
    os.environ["FASTAGG_TRANSPORT"] = "backend"
    fastagg.all_reduce(torch.zeros(1), group=group)
    del os.environ["FASTAGG_TRANSPORT"]
    return group


def _fastagg(name: str, wire: str, group: dist.ProcessGroup) -> Contender:
    return Contender(
        name,
        "fastagg",
        wire,
        lambda x: lambda: fastagg.all_reduce(x, wire=wire, group=group),
        lambda: channel_of(group).transport.name,
    )


def _torch_hook(x: torch.Tensor) -> Call:
    """The real hook: a GradBucket cannot be made here, but a tuple of the buffer, as compiled DDP passes it, can."""
    return lambda: fp16_compress_hook(None, (x,)).wait()


def _open_mpi(x: torch.Tensor) -> Call:
    import mpi4py

    mpi4py.rc.thread_level = "funneled"  # only this thread calls it
    from mpi4py import MPI

    values = x.numpy()
    return lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, values)
