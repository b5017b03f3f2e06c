"""The transport of devices that reach each other's memory: one kernel a rank, csrc/cuda/all_reduce.cu."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
import zlib
from typing import Any

import torch

from fastagg._errors import PeerError
from fastagg._native import core
from fastagg._native.backend import Backend
from fastagg.distributed.exchange.arithmetic import DeviceArithmetic, current_stream
from fastagg.distributed.exchange.exchange import Exchange, Outcome
from fastagg.distributed.rendezvous.fingerprint import Agreement
from fastagg.distributed.rendezvous.store import Meeting

_SLOT_BYTES = 32 << 20  # of the encoded values and means of one launch; larger tensors take several
_LOOK_EVERY = 0.05  # seconds, for processes that have ended


class PeerMemoryTransport:
    """Ranks of one host whose devices reach each other's memory, on the current stream."""

    name = "peer memory"
    reason = "all ranks are on one host, and their devices reach each other's memory"

    def __init__(self, meeting: Meeting, backend: Backend, memory: Any, addresses: list[int], blocks: int) -> None:
        self._meeting, self._backend, self._memory, self.shares = meeting, backend, memory, meeting.world
        self._agreement = Agreement(meeting)
        self._peers = (meeting.rank, addresses, _SLOT_BYTES, blocks, meeting.timeout, memory.lost_address)
        self._watch()

    def all_reduce(self, exchange: Exchange) -> Outcome:
        """See `Transport`. A rank that is lost meanwhile is an error of the next call; the result is NaN."""
        self.check()
        self._agreement.check(exchange.description)
        rank, world, device = self._meeting.rank, self._meeting.world, exchange.tensor.device
        sent, digest = exchange.sent_bytes(rank, world), zlib.crc32(exchange.description.encode())
        called, stream = (exchange.operands(world), self._peers, digest), current_stream(device)
        if not exchange.norm:
            self._backend.all_reduce(*called, stream, 0, 0)
            return Outcome(True, sent, 0.0)
        found = DeviceArithmetic(self._backend, device, stream)
        self._backend.all_reduce(*called, stream, found.nonfinite_at, found.squares_at)
        return Outcome(found.finite, sent, found.squares)

    def check(self) -> None:
        """Raises PeerError if a rank is known to be lost, ValueError if one was called with something else."""
        lost = self._memory.lost
        if lost == 0:
            return
        name = self._meeting.names[(lost & ~self._backend.DIFFERS) - 1]
        if lost & self._backend.DIFFERS:
            own = self._meeting.names[self._meeting.rank]
            raise ValueError(f"rank {name} was called with something else than rank {own}, in an earlier call")
        raise PeerError(name, f"rank {name} has ended, or did not come within the timeout")

    def _watch(self) -> None:
        """Looks after the other processes: a device cannot see that one has ended."""
        processes = [int(process) for process in self._meeting.gather(str(os.getpid()).encode())]
        try:
            watched = core.Peers(processes, self._meeting.names, self._meeting.rank)
        except OSError:
            return  # no descriptors of processes here: there is the timeout
        memory = weakref.ref(self._memory)
        watch = threading.Thread(target=_look, args=(watched, memory), name="fastagg-peers", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread can be started: there is the timeout
            watch.start()


def _look(watched: core.Peers, memory: weakref.ref[Any]) -> None:
    pause = threading.Event()
    while not pause.wait(_LOOK_EVERY):
        alive = memory()
        if alive is None:
            return
        ended = watched.ended()
        if ended >= 0:
            alive.tell_lost(ended + 1)
            return
        del alive


def meet(meeting: Meeting, backend: Backend, device: torch.device) -> PeerMemoryTransport | str:
    """Shares memory among all ranks' devices; if one cannot, none does, and the reason is returned."""
    if meeting.world > backend.MAXIMUM_RANKS:
        return f"{meeting.world} ranks are more than the {backend.MAXIMUM_RANKS} that can share memory"
    index = device.index or 0
    memory, addresses, handle, problem = None, list[int](), b"", ""
    try:
        memory = backend.PeerMemory(backend.PEER_CONTROL_BYTES + 2 * _SLOT_BYTES, index)
        handle = memory.handle() if meeting.world > 1 else b""
    except RuntimeError as error:
        problem = str(error)
    handles = meeting.gather(handle)
    try:
        if memory is not None and (all(handles) or meeting.world == 1):
            addresses = memory.open(handles, meeting.rank)
    except RuntimeError as error:
        problem = str(error)
    problems = [one.decode() for one in meeting.gather(problem.encode()) if one]
    if problems:
        return f"memory could not be shared among the devices: {problems[0]}"
    blocks = [int(one) for one in meeting.gather(str(backend.peer_blocks(index)).encode())]
    return PeerMemoryTransport(meeting, backend, memory, addresses, min(blocks))
