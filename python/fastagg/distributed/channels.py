"""Chooses how the ranks of a group exchange."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from fastagg._errors import PeerError
from fastagg._native import core
from fastagg._native.backend import Backend, backend_for
from fastagg._native.build import TRANSPORT_VARIABLE
from fastagg.distributed.host_executor import Line
from fastagg.distributed.rendezvous.store import Meeting
from fastagg.distributed.rendezvous.watch import Process, process_of
from fastagg.distributed.stream_executor import DeviceLine
from fastagg.distributed.transports import peer_memory
from fastagg.distributed.transports.base import HostTransport, Transport
from fastagg.distributed.transports.gloo import BackendTransport
from fastagg.distributed.transports.gloo_group import PrivateGroup
from fastagg.distributed.transports.hierarchical import HierarchicalTransport
from fastagg.distributed.transports.nccl import CollectiveTransport
from fastagg.distributed.transports.shared_memory import host_of_this_process, meet
from fastagg.quantization.rounding import draw_seed

Result = TypeVar("Result")

_log = logging.getLogger("fastagg")
_CPU, _HOST = torch.device("cpu"), torch.device("meta")
_FILES = 8  # that a group needs, beside some for each of its ranks
_ASKED = f"{TRANSPORT_VARIABLE}=backend asks for it"


class Channel:
    """How a group's ranks exchange, in which order, and the seeds that they share.

    It is opened by the first exchange, in the line's order: a rank need not wait for the others to make it.
    """

    def __init__(self, meet: Callable[[], Meeting], open_: Opening, line: Line | DeviceLine) -> None:
        self.line = line
        self._meet, self._open = meet, open_
        self._opening = threading.RLock()
        self._meeting: Meeting | None = None  # while they meet
        self._transport: Transport | None = None
        self._seed = self._calls = 0
        if isinstance(line, Line):
            line.interrupt = _Weakly(self).interrupt

    @property
    def transport(self) -> Transport:
        """The way, on which all ranks agree here, at first use.

        Raises:
            PeerError: a rank did not come.
            OSError: a rank cannot open as many files as it needs, on all ranks.
            ValueError: FASTAGG_TRANSPORT names no transport, on any rank; or the group has no backend for the device.
        """
        if self._transport is not None:
            return self._transport
        with self._opening:
            if self._transport is None:
                self._open_together()
            assert self._transport is not None
            return self._transport

    @property
    def host_transport(self) -> HostTransport:
        """The same for a channel of CPU tensors."""
        return cast(HostTransport, self.transport)

    def run(self, work: Callable[[HostTransport], Result]) -> Result:
        """Makes exchanges on the CPU in the line's order, and waits for them."""
        return cast(Line, self.line).run(lambda: work(self.host_transport))

    @property
    def name(self) -> str | None:
        """The transport's name, once there is one."""
        return None if self._transport is None else self._transport.name

    def seed(self) -> tuple[int, int, int]:
        """A seed that all ranks draw alike, for an exchange of which they have not agreed yet."""
        return self._seed, self._calls % 2**32, 0

    def has_used_seed(self) -> None:
        """All ranks have made the exchange: the next one has another seed."""
        self._calls += 1

    def refuse(self, error: Exception) -> None:
        """Tells the others, without waiting for them, that this rank's call was wrong; of a channel on the host."""
        text = f"refused it: {type(error).__name__}: {error}".encode(errors="replace")[: core.DESCRIPTION_BYTES - 1]
        cast(Line, self.line).submit(lambda: self.host_transport.agree(text.decode(errors="ignore")))

    def interrupt(self) -> None:
        """Ends what is under way in another thread: the others will know that this rank has left."""
        if self._meeting is not None:
            self._meeting.interrupt()
        if self._transport is not None and isinstance(self.line, Line):
            self.host_transport.interrupt()

    def _open_together(self) -> None:
        meeting = self._meeting = self._meet()
        try:
            transport, self._seed = self._open(meeting)
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the store may be gone
                if isinstance(error, PeerError):
                    meeting.tell_lost(error.rank)
                elif not isinstance(error, Exception):
                    meeting.tell_lost(meeting.name)
            raise
        finally:
            self._meeting = None
            meeting.close()
        if isinstance(self.line, Line):
            self.line.sees_signals = cast(HostTransport, transport).sees_signals
        self._transport = transport
        _log.debug("group of %d ranks: %s, because %s", meeting.world, transport.name, transport.reason)


Opening = Callable[[Meeting], tuple[Transport, int]]


class _Weakly:
    """A channel's interruption for its line, which the channel keeps."""

    def __init__(self, channel: Channel) -> None:
        self._channel = weakref.ref(channel)

    def interrupt(self) -> None:
        channel = self._channel()
        if channel is not None:
            channel.interrupt()


class _Door:
    """Where a group's channels are opened, one a device: other groups' ranks need not wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.channels: dict[torch.device, Channel] = {}


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


def group_of(group: Any) -> dist.ProcessGroup:
    """The group that was given, or the default one.

    Raises:
        TypeError: something else.
        ValueError: there is none yet; or this rank is no member of it, or torch.distributed does not know it.
    """
    group = group if group is not None else dist.group.WORLD
    if group is None:
        raise ValueError("group: torch.distributed is not initialised; call torch.distributed.init_process_group first")
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: this rank is not a member of it; make the call on the group's members only")
        raise TypeError(f"group: expected a process group of torch.distributed, got {type(group).__name__}")
    if group not in dist.distributed_c10d._world.pg_map:
        raise ValueError(
            f"group: torch.distributed does not know this {type(group).__name__}: it was destroyed, or is none that "
            "init_process_group or new_group has made, as torchft's are; give one of those"
        )
    return group


def channel_of(group: dist.ProcessGroup, device: torch.device = _CPU) -> Channel:
    """The group's channel for tensors on a device; see `Channel.transport` for what its opening raises."""
    with _lock:
        door = _doors.setdefault(group, _Door())
    with door.lock:
        channel = door.channels.get(device)
        if channel is None:
            door.channels[device] = channel = _channel_of(weakref.ref(group), device)
    if isinstance(channel.line, DeviceLine):
        channel.transport  # noqa: B018 - not on the device's stream, nor in a captured graph
    return channel


def host_channel_of(group: dist.ProcessGroup) -> Channel:
    """The group's channel for bytes on the host, whatever serves CPU tensors (in tests, kernels of a device)."""
    return channel_of(group, _CPU if backend_for("cpu") is None else _HOST)


@contextlib.contextmanager
def refusing(group: Any, device: torch.device | None = None) -> Iterator[None]:
    """Around what a rank does before an exchange: tells the others, who would wait for this one, if it goes wrong.

    It counts as the exchange, on all ranks. So it must not be put around one.

    Args:
        group: as it was given: where it is wrong, nobody knows whom to tell.
        device: where the tensors are that the others exchange; None: they exchange bytes on the host.
    """
    try:
        yield
    except Exception as error:
        if device is None or not _meet_on(device):
            with contextlib.suppress(TypeError, ValueError):  # there may be no group
                host_channel_of(group_of(group)).refuse(error)
        raise


def _meet_on(device: torch.device) -> bool:
    """Whether exchanges meet at a device's pace: there the others find out by the timeout."""
    return device.type == "cuda" or backend_for("cpu") is not None


def _channel_of(group: weakref.ref[dist.ProcessGroup], device: torch.device) -> Channel:
    """A channel that does not keep its group."""

    def alive() -> dist.ProcessGroup:
        found = group()
        if found is None:
            raise RuntimeError("the process group is gone")
        return found

    backend = None if device == _HOST else backend_for(str(device))
    if backend is None:
        return Channel(lambda: Meeting.of(alive()), _open, Line())
    return Channel(
        lambda: Meeting.of(alive()), lambda meeting: _open_on(device, backend, alive(), meeting), DeviceLine(device)
    )


def _open(meeting: Meeting) -> tuple[Transport, int]:
    hosts, asked, seed = _gather_facts(meeting, _CPU)
    met = _meet_over_memory(meeting, hosts) if not any(asked) else _ASKED
    return BackendTransport(PrivateGroup(meeting), met) if isinstance(met, str) else met, seed


def _open_on(
    device: torch.device, backend: Backend, group: dist.ProcessGroup, meeting: Meeting
) -> tuple[Transport, int]:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the group's first all_reduce of CUDA tensors cannot be captured: make the call once before")
    hosts, asked, seed = _gather_facts(meeting, device)
    if any(asked):
        met: Transport | str = _ASKED
    elif len(set(hosts)) > 1:
        met = "not all ranks are on one host"
    else:
        met = peer_memory.meet(meeting, backend, device)
    return _over_collectives(group, meeting, backend, device, met) if isinstance(met, str) else met, seed


def _over_collectives(
    group: dist.ProcessGroup, meeting: Meeting, backend: Backend, device: torch.device, reason: str
) -> CollectiveTransport:
    names = dist.get_backend_config(group)  # "nccl", or "cpu:gloo,cuda:nccl"
    by_device = dict(one.split(":") for one in names.split(",") if ":" in one)
    name = by_device.get(device.type, names)
    if device.type == "cuda" and name != "nccl":
        raise ValueError(f"group: CUDA tensors need the backend nccl, got {name}; peer memory is no way, for {reason}")
    if meeting.world > backend.MAXIMUM_RANKS:
        raise ValueError(f"group: expected at most {backend.MAXIMUM_RANKS} ranks for CUDA tensors, got {meeting.world}")
    return CollectiveTransport(group, name, meeting, backend, reason)


class _Facts(NamedTuple):
    """What a rank tells the others first."""

    host: str
    asked: str
    """The transport that it asks for."""
    seed: int
    device: str
    process: Process
    problem: str
    """Why it cannot open the files that it needs."""


def _gather_facts(meeting: Meeting, device: torch.device) -> tuple[list[str], list[str], int]:
    """Every rank's host and the transport that it asks for, and a seed for all."""
    asked = os.environ.get(TRANSPORT_VARIABLE, "")
    problem = _room_for_files(2 * meeting.world + _FILES)
    own = _Facts(host_of_this_process(), asked, draw_seed(), device.type, process_of(os.getpid()), problem)
    found = [_Facts(*json.loads(one)) for one in meeting.gather(json.dumps(own).encode())]
    for name, facts in zip(meeting.names, found, strict=True):
        if facts.problem:
            raise OSError(errno.EMFILE, f"rank {name} cannot open the files that a group needs: {facts.problem}")
        if facts.device != device.type:
            raise ValueError(f"rank {name} has {facts.device} tensors; rank {meeting.name} has {device.type} tensors")
        if facts.asked not in ("", "backend"):
            raise ValueError(f"{TRANSPORT_VARIABLE} on rank {name}: expected backend, or nothing, got {facts.asked!r}")
    meeting.watch.add_processes(
        [cast(Process, tuple(one.process)) if one.host == own.host else (0, 0) for one in found]
    )
    return [one.host for one in found], [one.asked for one in found], found[0].seed


def _room_for_files(count: int) -> str:
    """Why so many more files cannot be opened; empty if they can."""
    opened = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return f"{error.strerror}, {len(opened)} of {count}; raise its limit (ulimit -n)"
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return ""


def _meet_over_memory(meeting: Meeting, hosts: Sequence[str]) -> Transport | str:
    """A transport that shares memory, or the reason why there is none: the same on all ranks."""
    if len(set(hosts)) == 1:
        return meet(meeting)
    if len(set(hosts)) < len(hosts):
        return HierarchicalTransport.meet(meeting, hosts)
    return "every rank is on a host of its own"
