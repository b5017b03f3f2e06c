"""The transport of ranks that are processes of one host: csrc/comm/shared_memory.h."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from fastagg import _core
from fastagg._exchange import Exchange, Outcome, timeout_of

Slice = tuple[int, int]


class SharedMemoryTransport:
    """Ranks of one host, through memory that they share."""

    name = "shared memory"
    reason = "all ranks are processes of one user on one host"

    def __init__(self, memory: _core.SharedMemoryGroup, timeout: float) -> None:
        self._memory, self._timeout = memory, timeout

    def all_reduce(self, group: dist.ProcessGroup, exchange: Exchange) -> Outcome:
        """See `Transport`."""
        return self._run(self._memory.all_reduce, exchange)

    def reduce_scatter(self, exchange: Exchange) -> Outcome:
        """The same for this rank's slice alone."""
        return self._run(self._memory.reduce_scatter, exchange)

    def all_gather(self, exchange: Exchange) -> Outcome:
        """Copies each rank's slice to all ranks."""
        return self._run(self._memory.all_gather, exchange)

    def _run(self, phase: Callable[..., tuple[bool, int, float]], exchange: Exchange) -> Outcome:
        wire, shift, stochastic, key = exchange.encoding
        feedback = exchange.feedback
        operands = (
            *(exchange.tensor.data_ptr(), exchange.code, exchange.tensor.numel()),
            *(wire, shift, stochastic, key, exchange.mean, exchange.factor),
            *((feedback.residual.data_ptr(), feedback.factor, feedback.error.data_ptr()) if feedback else (0, 0.0, 0)),
            *(exchange.norm, exchange.stretches),
        )
        return Outcome(*phase(operands, self._timeout))


def host_of_this_process() -> bytes:
    """A digest of what processes that can share memory have in common: the boot, the namespaces, the user.

    FASTAGG_HOST, where it is set, tells apart what looks like one host.
    """
    facts = [_read("/proc/sys/kernel/random/boot_id"), str(os.geteuid()), os.environ.get("FASTAGG_HOST", "")]
    facts += [_link(f"/proc/self/ns/{namespace}") for namespace in ("ipc", "pid", "user")]
    return hashlib.sha256("\n".join(facts).encode()).digest()


def meet(group: dist.ProcessGroup) -> SharedMemoryTransport | str:
    """Maps one segment on all ranks of a group on one host; if one cannot, none does, and the reason is returned."""
    rank = dist.get_rank(group)
    processes = [int(process[0]) for process in gather(torch.tensor([os.getpid()]), group)]
    names = [dist.get_global_rank(group, peer) for peer in range(len(processes))]
    memory, problem, descriptor = None, "", -1
    try:
        if rank == 0:
            memory = _core.SharedMemoryGroup(processes, names, rank)
            descriptor = memory.descriptor()
    except OSError as error:
        problem = str(error)
    descriptor = int(gather(torch.tensor([descriptor]), group)[0][0])
    try:
        if rank != 0 and descriptor >= 0:
            memory = _core.SharedMemoryGroup.attach(processes, names, rank, processes[0], descriptor)
    except OSError as error:
        problem = str(error)
    met = all(int(flag[0]) for flag in gather(torch.tensor([int(memory is not None)]), group))
    if memory is not None:
        memory.close_descriptor()
    if not met or memory is None:
        return f"shared memory could not be mapped on every rank {problem}".rstrip()
    return SharedMemoryTransport(memory, timeout_of(group))


def gather(own: torch.Tensor, group: dist.ProcessGroup) -> list[list[int]]:
    """Every rank's small tensor."""
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return [one.tolist() for one in everyone]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return os.urandom(16).hex()  # unknown: like no other


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return os.urandom(16).hex()
