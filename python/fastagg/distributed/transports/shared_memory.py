"""The transport of ranks that are processes of one host: csrc/comm/shared_memory.h."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from fastagg._native import core
from fastagg.distributed.exchange.exchange import Exchange, Outcome
from fastagg.distributed.rendezvous.store import Meeting

Phase = Callable[..., tuple[bool, int, float]]


class SharedMemoryTransport:
    """Ranks of one host, through memory that they share."""

    name = "shared memory"
    reason = "all ranks are processes of one user on one host"
    sees_signals = True

    def __init__(self, memory: core.SharedMemoryGroup, world: int, timeout: float) -> None:
        self._memory, self._timeout, self.shares = memory, timeout, world

    def all_reduce(self, exchange: Exchange) -> Outcome:
        """See `Transport`."""
        return self._run(self._memory.all_reduce, exchange)

    def reduce_scatter(self, exchange: Exchange) -> Outcome:
        """The same for this rank's slice alone."""
        return self._run(self._memory.reduce_scatter, exchange)

    def all_gather(self, exchange: Exchange) -> Outcome:
        """Copies each rank's slice to all ranks."""
        return self._run(self._memory.all_gather, exchange)

    def agree(self, description: str) -> None:
        """See `HostTransport`."""
        self._memory.broadcast(0, 0, 0, description, self._timeout)

    def broadcast(self, data: torch.Tensor, root: int, description: str) -> None:
        """See `HostTransport`."""
        self._memory.broadcast(data.data_ptr(), data.nbytes, root, description, self._timeout)

    def interrupt(self) -> None:
        """See `HostTransport`."""
        self._memory.interrupt()

    def tell_lost(self, name: int) -> int:
        """Lets all ranks of this host raise PeerError for a rank, or for the returned one, which was told before."""
        return self._memory.tell_lost(name)

    def _run(self, phase: Phase, exchange: Exchange) -> Outcome:
        return Outcome(*phase(exchange.operands(self.shares), self._timeout))


def host_of_this_process() -> str:
    """A digest of what processes that can share memory have in common: the boot, the namespaces, the user.

    FASTAGG_HOST, where it is set, tells apart what looks like one host.
    """
    facts = [_read("/proc/sys/kernel/random/boot_id"), str(os.geteuid()), os.environ.get("FASTAGG_HOST", "")]
    facts += [_link(f"/proc/self/ns/{namespace}") for namespace in ("ipc", "pid", "user")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def meet(meeting: Meeting) -> SharedMemoryTransport | str:
    """Maps one segment on all ranks of one host; if one cannot, none does, and the reason is returned."""
    processes = [int(process) for process in meeting.gather(str(os.getpid()).encode())]
    memory, problem, descriptor = None, "", -1
    try:
        if meeting.rank == 0:
            memory = core.SharedMemoryGroup(processes, meeting.names, 0)
            descriptor = memory.descriptor()
    except OSError as error:
        problem = str(error)
    descriptor = int(meeting.gather(str(descriptor).encode())[0])
    try:
        if meeting.rank != 0 and descriptor >= 0:
            memory = core.SharedMemoryGroup.attach(processes, meeting.names, meeting.rank, processes[0], descriptor)
    except OSError as error:
        problem = str(error)
    problems = [one.decode() for one in meeting.gather(problem.encode()) if one]
    if memory is not None:
        memory.close_descriptor()
    if problems or memory is None:
        return f"shared memory could not be mapped on every rank: {', '.join(problems)}"
    return SharedMemoryTransport(memory, meeting.world, meeting.timeout)


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
