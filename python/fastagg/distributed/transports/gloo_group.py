"""A Gloo group of our own: what DDP and users do over theirs meanwhile cannot come between its exchanges."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fastagg._errors import PeerError
from fastagg.distributed.rendezvous.failures import peer_error
from fastagg.distributed.rendezvous.store import Meeting, MeetingStore

_UNUSED_TAG = 2**31 - 1


class PrivateGroup:
    """The ranks of a meeting, connected by Gloo. All methods raise PeerError if a rank has died or hung."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting, self.rank, self.world = meeting, meeting.rank, meeting.world
        self._lost: Exception | None = None  # from then on nothing can be exchanged
        self._probe, self._probes = torch.empty(1, device="cpu"), list[Any]()  # kept: they are never answered
        self._timeout = datetime.timedelta(seconds=meeting.timeout)
        self._store = MeetingStore(meeting, "gloo")  # torch does not keep what is Python's of it
        self.begin()
        try:
            self._gloo: Any = dist.ProcessGroupGloo(self._store, self.rank, self.world, self._timeout)
        except RuntimeError as error:
            raise self._store.error or peer_error(meeting, error, self._waited) from error

    def begin(self) -> None:
        """An exchange begins: who is found to have waited least for a broken one came last."""
        self._begun = time.monotonic()

    # Gloo's all_to_all sends in one direction at a time; sends and receives by themselves fill a link in both.

    def send_all(self, rows: Sequence[torch.Tensor], tag: int) -> list[Any]:
        """Sends each rank its row; returns what to wait for, once."""
        others = [peer for peer, row in enumerate(rows) if peer != self.rank and row.numel()]
        with self._telling_who_is_lost():
            return [self._gloo.send([rows[peer]], peer, tag) for peer in others]

    def receive_all(self, rows: Sequence[torch.Tensor], tag: int) -> list[Any]:
        """Receives a row from each rank; returns what to wait for, once."""
        others = [peer for peer, row in enumerate(rows) if peer != self.rank and row.numel()]
        with self._telling_who_is_lost():
            return [self._gloo.recv([rows[peer]], peer, tag) for peer in others]

    def all_gather(self, everyone: torch.Tensor, own: torch.Tensor) -> Any:
        """Copies each rank's tensor to all ranks; returns what to wait for."""
        with self._telling_who_is_lost():
            return self._gloo._allgather_base(everyone, own)

    def gather(self, own: float) -> list[float]:
        """Every rank's number, on all ranks."""
        everyone = torch.empty(self.world, dtype=torch.float64, device="cpu")
        self.wait([self.all_gather(everyone, torch.tensor([own], dtype=torch.float64, device="cpu"))])
        return everyone.tolist()

    def broadcast(self, data: torch.Tensor, root: int) -> None:
        """Copies the root's bytes to all ranks."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = root, 0, self._timeout
        with self._telling_who_is_lost():
            self._gloo.broadcast([data], options).wait()

    def wait(self, works: Sequence[Any]) -> None:
        """Waits for what the others have started."""
        with self._telling_who_is_lost():
            for work in works:
                work.wait()

    def tell_lost(self, name: int) -> None:
        """Ends the group: the others, once they find it broken, learn who was lost."""
        if self._lost is None:
            self._lost = PeerError(name, f"rank {name} was lost before")
            with contextlib.suppress(RuntimeError):  # the store may be gone as well
                self.meeting.tell_lost(name)

    def interrupt(self) -> None:
        """Ends the waits of another thread of this process; this rank is lost to the others."""
        self.tell_lost(self.meeting.name)
        # A wait that runs out breaks all connections, and so ends every wait, here and there: Gloo has no other way.
        with contextlib.suppress(RuntimeError):
            other = (self.rank + 1) % self.world
            self._gloo.recv([torch.empty(1, device="cpu")], other, _UNUSED_TAG).wait(datetime.timedelta(milliseconds=1))

    @property
    def _waited(self) -> float:
        return time.monotonic() - self._begun

    @contextlib.contextmanager
    def _telling_who_is_lost(self) -> Iterator[None]:
        if self._lost is not None:
            raise self._lost
        try:
            yield
        except RuntimeError as error:  # torch's for a broken connection and for its timeout
            if self._lost is None:
                self._lost = peer_error(self.meeting, error, self._waited, self._unconnected())
            raise self._lost from error

    def _unconnected(self) -> list[int]:
        """The ranks to which the connection is broken, and not to all: one's end breaks its own."""
        found = []
        for peer in range(self.world):
            try:
                if peer != self.rank:
                    self._probes.append(self._gloo.recv([self._probe], peer, _UNUSED_TAG - 1))
            except RuntimeError:
                found.append(peer)
        return found
