"""Chooses how the ranks of a group exchange, and keeps their exchanges in order."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from fastagg._backend_transport import BackendTransport
from fastagg._build import TRANSPORT_VARIABLE
from fastagg._exchange import Transport
from fastagg._hierarchy import HierarchicalTransport
from fastagg._shared_memory import gather, host_of_this_process, meet

_log = logging.getLogger("fastagg")

Result = TypeVar("Result")


class Line:
    """A group's exchanges one after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastagg-all-reduce")
        self._busy = threading.Lock()
        self._last: Future[Any] | None = None

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Does the work in the line's own thread."""
        future = self._thread.submit(self._do, work)
        self._last = future
        return future

    def run(self, work: Callable[[], Result]) -> Result:
        """Does the work here and now if nothing waits: a thread takes longer to wake than a small message takes."""
        if self._last is None or self._last.done():
            return self._do(work)
        return self.submit(work).result()

    def _do(self, work: Callable[[], Result]) -> Result:
        with self._busy:
            return work()


class Channel(NamedTuple):
    """How a group's ranks exchange, and in which order."""

    transport: Transport
    line: Line


_channels: weakref.WeakKeyDictionary[dist.ProcessGroup, Channel] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def channel_of(group: dist.ProcessGroup) -> Channel:
    """The group's channel, opened at first use by all its ranks together."""
    with _lock:
        found = _channels.get(group)
        if found is None:
            found = _channels[group] = Channel(_choose(group), Line())
            name, reason = found.transport.name, found.transport.reason
            _log.debug("group of %d ranks: %s, because %s", dist.get_world_size(group), name, reason)
        return found


def _choose(group: dist.ProcessGroup) -> Transport:
    asked = os.environ.get(TRANSPORT_VARIABLE)
    if asked not in (None, "", "backend"):
        raise ValueError(f"{TRANSPORT_VARIABLE}: expected backend, or nothing, got {asked!r}")
    if asked == "backend":
        return BackendTransport(group, f"{TRANSPORT_VARIABLE}=backend asks for it")
    own = torch.frombuffer(bytearray(host_of_this_process()), dtype=torch.uint8)
    hosts = [bytes(host) for host in gather(own, group)]
    met: Transport | str = "every rank is on a host of its own"
    if len(set(hosts)) == 1:
        met = meet(group)
    elif len(set(hosts)) < len(hosts):
        met = HierarchicalTransport.meet(group, hosts)
    return BackendTransport(group, met) if isinstance(met, str) else met
