"""Chooses how the ranks of a group exchange."""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

from fastagg import _peer_memory
from fastagg._backend import Backend, backend_for
from fastagg._backend_transport import BackendTransport
from fastagg._build import TRANSPORT_VARIABLE
from fastagg._collectives import CollectiveTransport
from fastagg._exchange import Transport
from fastagg._hierarchy import HierarchicalTransport
from fastagg._meeting import Meeting
from fastagg._private_group import PrivateGroup
from fastagg._shared_memory import host_of_this_process, meet
from fastagg._streams import DeviceLine
from fastagg._threads import Line
from fastagg.quantization import draw_seed

_log = logging.getLogger("fastagg")
_CPU = torch.device("cpu")
_ASKED = f"{TRANSPORT_VARIABLE}=backend asks for it"


class Channel:
    """How a group's ranks exchange, in which order, and the seeds that they share."""

    def __init__(self, transport: Transport, line: Line | DeviceLine, seed: int) -> None:
        self.transport, self.line, self._seed = transport, line, seed
        self._calls = itertools.count()

    def next_seed(self) -> tuple[int, int, int]:
        """A seed that all ranks draw alike."""
        return self._seed, next(self._calls) % 2**32, 0


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


def group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group that was given, or the default one.

    Raises:
        ValueError: there is none yet.
    """
    group = group if group is not None else dist.group.WORLD
    if group is None:
        raise ValueError("group: torch.distributed is not initialised; call torch.distributed.init_process_group first")
    return group


def channel_of(group: dist.ProcessGroup, device: torch.device = _CPU) -> Channel:
    """The group's channel for tensors on a device, opened at first use by all its ranks together.

    Raises:
        PeerError: a rank did not come.
        ValueError: FASTAGG_TRANSPORT names no transport, on any rank; or the group has no backend for the device.
    """
    with _lock:
        door = _doors.setdefault(group, _Door())
    with door.lock:
        if device not in door.channels:
            backend = backend_for(str(device))
            meeting = Meeting.of(group)
            channel = _open(meeting) if backend is None else _open_on(device, backend, group, meeting)
            name, reason = channel.transport.name, channel.transport.reason
            _log.debug("group of %d ranks: %s, because %s", dist.get_world_size(group), name, reason)
            door.channels[device] = channel
        return door.channels[device]


def _open(meeting: Meeting) -> Channel:
    hosts, asked, seed = _gather_facts(meeting, _CPU)
    met = _meet_over_memory(meeting, hosts) if not any(asked) else _ASKED
    transport = BackendTransport(PrivateGroup(meeting), met) if isinstance(met, str) else met
    return Channel(transport, Line(), seed)


def _open_on(device: torch.device, backend: Backend, group: dist.ProcessGroup, meeting: Meeting) -> Channel:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the group's first all_reduce of CUDA tensors cannot be captured: make the call once before")
    hosts, asked, seed = _gather_facts(meeting, device)
    if any(asked):
        met: Transport | str = _ASKED
    elif len(set(hosts)) > 1:
        met = "not all ranks are on one host"
    else:
        met = _peer_memory.meet(meeting, backend, device)
    transport = _over_collectives(group, meeting, backend, device, met) if isinstance(met, str) else met
    return Channel(transport, DeviceLine(device), seed)


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


def _gather_facts(meeting: Meeting, device: torch.device) -> tuple[Sequence[str], Sequence[str], int]:
    """Every rank's host and the transport that it asks for, and a seed for all."""
    own = [host_of_this_process(), os.environ.get(TRANSPORT_VARIABLE, ""), draw_seed(), device.type]
    found = [json.loads(one) for one in meeting.gather(json.dumps(own).encode())]
    hosts, asked, seeds, types = zip(*found, strict=True)
    for name, theirs in zip(meeting.names, types, strict=True):
        if theirs != device.type:
            rank = meeting.names[meeting.rank]
            raise ValueError(f"rank {name} has {theirs} tensors; rank {rank} has {device.type} tensors")
    for name, one in zip(meeting.names, asked, strict=True):
        if one not in ("", "backend"):
            raise ValueError(f"{TRANSPORT_VARIABLE} on rank {name}: expected backend, or nothing, got {one!r}")
    return hosts, asked, seeds[0]


def _meet_over_memory(meeting: Meeting, hosts: Sequence[str]) -> Transport | str:
    """A transport that shares memory, or the reason why there is none: the same on all ranks."""
    if len(set(hosts)) == 1:
        return meet(meeting)
    if len(set(hosts)) < len(hosts):
        return HierarchicalTransport.meet(meeting, hosts)
    return "every rank is on a host of its own"
