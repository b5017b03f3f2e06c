"""Chooses how the ranks of a group exchange, and keeps their exchanges in order."""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch.distributed as dist

from fastagg._backend import draw_seed
from fastagg._backend_transport import BackendTransport
from fastagg._build import TRANSPORT_VARIABLE
from fastagg._exchange import Transport
from fastagg._hierarchy import HierarchicalTransport
from fastagg._meeting import Meeting
from fastagg._private_group import PrivateGroup
from fastagg._shared_memory import host_of_this_process, meet

_log = logging.getLogger("fastagg")

Result = TypeVar("Result")


class Line:
    """A group's exchanges one after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastagg-all-reduce")
        self._busy, self._counting = threading.Lock(), threading.Lock()
        self._waiting = 0
        self._thread_id: int | None = None

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Does the work in the line's own thread."""
        with self._counting:
            self._waiting += 1
        return self._thread.submit(self._do_waiting, work)

    def run(self, work: Callable[[], Result]) -> Result:
        """Does the work here and now if nothing waits: a thread takes longer to wake than a small message takes."""
        if threading.get_ident() == self._thread_id:
            return work()  # called back from the line itself, between two exchanges
        if self._waiting:
            return self.submit(work).result()
        with self._busy:
            return work()

    def _do_waiting(self, work: Callable[[], Result]) -> Result:
        self._thread_id = threading.get_ident()
        try:
            with self._busy:
                return work()
        finally:
            with self._counting:
                self._waiting -= 1


class Channel:
    """How a group's ranks exchange, in which order, and the seeds that they share."""

    def __init__(self, transport: Transport, seed: int) -> None:
        self.transport, self.line, self._seed = transport, Line(), seed
        self._calls = itertools.count()

    def next_seed(self) -> tuple[int, int, int]:
        """A seed that all ranks draw alike."""
        return self._seed, next(self._calls) % 2**32, 0


class _Door:
    """Where a group's channel is opened: other groups' ranks need not wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.channel: Channel | None = None


_doors: weakref.WeakKeyDictionary[dist.ProcessGroup, _Door] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_of_the_parent: list[_Door] = []


def _forget_the_parents_channels() -> None:
    """A forked child is no rank: it must not write its parent's flags, nor wait for threads that it does not have."""
    global _lock
    _lock = threading.Lock()
    _of_the_parent.extend(_doors.values())
    _doors.clear()


os.register_at_fork(after_in_child=_forget_the_parents_channels)


def group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group that was given, or the default one.

    Raises:
        ValueError: there is none yet.
    """
    group = group if group is not None else dist.group.WORLD
    if group is None:
        raise ValueError("group: torch.distributed is not initialised; call torch.distributed.init_process_group first")
    return group


def channel_of(group: dist.ProcessGroup) -> Channel:
    """The group's channel, opened at first use by all its ranks together.

    Raises:
        PeerError: a rank did not come.
        ValueError: FASTAGG_TRANSPORT names no transport, on any rank.
    """
    with _lock:
        door = _doors.setdefault(group, _Door())
    with door.lock:
        if door.channel is None:
            door.channel = _open(Meeting.of(group))
            name, reason = door.channel.transport.name, door.channel.transport.reason
            _log.debug("group of %d ranks: %s, because %s", dist.get_world_size(group), name, reason)
        return door.channel


def _open(meeting: Meeting) -> Channel:
    own = [host_of_this_process(), os.environ.get(TRANSPORT_VARIABLE, ""), draw_seed()]
    found = [json.loads(one) for one in meeting.gather(json.dumps(own).encode())]
    hosts, asked, seeds = zip(*found, strict=True)
    met = _meet_over_memory(meeting, hosts, asked)
    return Channel(BackendTransport(PrivateGroup(meeting), met) if isinstance(met, str) else met, seeds[0])


def _meet_over_memory(meeting: Meeting, hosts: Sequence[str], asked: Sequence[str]) -> Transport | str:
    """A transport that shares memory, or the reason why there is none: the same on all ranks."""
    for name, one in zip(meeting.names, asked, strict=True):
        if one not in ("", "backend"):
            raise ValueError(f"{TRANSPORT_VARIABLE} on rank {name}: expected backend, or nothing, got {one!r}")
    if any(asked):
        return f"{TRANSPORT_VARIABLE}=backend asks for it"
    if len(set(hosts)) == 1:
        return meet(meeting)
    if len(set(hosts)) < len(hosts):
        return HierarchicalTransport.meet(meeting, hosts)
    return "every rank is on a host of its own"
