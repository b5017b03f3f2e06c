"""Notices ranks that die while others wait for them in the store, which cannot tell."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastagg._native import core

Process = tuple[int, int]
"""A process's number and when it started, which together never name another one; (0, 0): not seen from here."""

_FOREVER = datetime.timedelta(days=30)  # a wait that ran out would break the group's own connections
_TAG = 0x0FA57A00  # of messages beside the user's own
_LEAVE_TAKING = 0.5  # seconds that the interpreter's end waits for threads that are about to end


class Watch:
    """The other ranks of a group while they meet: their processes on this host, and Gloo's connections to all.

    Who has never called fastagg has told nobody his process, but his connections break when he dies.
    """

    def __init__(self, group: dist.ProcessGroup, names: Sequence[int], rank: int, number: int) -> None:
        self._names, self._rank, gloo = list(names), rank, _gloo_of(group)
        others = [] if gloo is None else [peer for peer in range(len(names)) if peer != rank]
        self._connections = [_Connection(gloo, peer, _TAG + number % 256) for peer in others]
        self._processes: core.Peers | None = None
        self._ended: int | None = None

    def add_processes(self, processes: Sequence[Process]) -> None:
        """Watches the ranks' processes too."""
        alive = [process if process == process_of(process[0]) else (0, 0) for process in processes]
        self._ended = next((rank for rank, one in enumerate(processes) if one != alive[rank]), None)
        with contextlib.suppress(OSError):  # no descriptors of processes here: there are the connections
            self._processes = core.Peers([number for number, _ in alive], self._names, self._rank)

    def lost(self) -> int | None:
        """The name of a rank that has died, or has left the group before it has met the others."""
        broken = next((connection.peer for connection in self._connections if connection.broken), self._ended)
        if broken is None and self._processes is not None and (ended := self._processes.ended()) >= 0:
            broken = ended
        return None if broken is None else self._names[broken]

    def close(self) -> None:
        """Lets go of the connections: the ranks have met, or never will."""
        for connection in self._connections:
            connection.close()
        self._connections = []


class _Connection:
    """A message that is expected of a peer, and comes when it has met the others; else the connection's end."""

    def __init__(self, gloo: Any, peer: int, tag: int) -> None:
        self.peer, self.broken = peer, False
        self._gloo, self._tag, self._own, self._theirs = (
            gloo,
            tag,
            torch.zeros(1, device="cpu"),
            torch.zeros(1, device="cpu"),
        )
        self._leaving, self._closed = None, threading.Event()
        try:
            self._expected = gloo.recv([self._theirs], peer, tag)
        except RuntimeError:  # it is broken already
            self.broken = True
            return
        self.thread = threading.Thread(target=self._watch, name="fastagg-peers", daemon=True)
        self.thread.start()
        _open.add(self)

    def close(self) -> None:
        """Sends this rank's message."""
        with contextlib.suppress(RuntimeError):
            self._leaving = self._gloo.send([self._own], self.peer, self._tag)
        self._gloo = None
        self._closed.set()

    def _watch(self) -> None:
        try:
            self._expected.wait(_FOREVER)
        except RuntimeError:
            self.broken = True
            return
        self._closed.wait()
        with contextlib.suppress(RuntimeError):
            if self._leaving is not None:
                self._leaving.wait(_FOREVER)


_open: weakref.WeakSet[_Connection] = weakref.WeakSet()


@atexit.register
def _let_threads_end() -> None:
    """A thread that comes back from torch when the interpreter has ended would abort the process."""
    deadline = time.monotonic() + _LEAVE_TAKING
    for connection in list(_open):
        connection.thread.join(max(deadline - time.monotonic(), 0))


def process_of(number: int) -> Process:
    """A process of this host, as others can know it; (0, 0) if it has ended."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0
    return (0, 0) if fields[0] in "ZX" else (number, int(fields[19]))


def _gloo_of(group: dist.ProcessGroup) -> Any:
    """The group's Gloo backend, or None."""
    try:
        backend: Any = group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return None
    backend = getattr(backend, "wrapped_pg", backend)
    return backend if getattr(backend, "name", lambda: "")() == "gloo" else None
