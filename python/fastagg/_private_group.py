"""A Gloo group of our own: what DDP and users do over theirs meanwhile cannot come between its exchanges."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from fastagg._errors import PeerError
from fastagg._meeting import Meeting
from fastagg._roll_call import peer_error


class PrivateGroup:
    """The ranks of a meeting, connected by Gloo. All methods raise PeerError if a rank has died or hung."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting, self.rank, self.world = meeting, meeting.rank, meeting.world
        self._lost: Exception | None = None  # from then on nothing can be exchanged
        timeout = datetime.timedelta(seconds=meeting.timeout)
        store = PrefixStore("gloo", meeting.store)
        try:
            self._gloo: Any = dist.ProcessGroupGloo(store, self.rank, self.world, timeout)
        except RuntimeError as error:
            raise peer_error(meeting, error) from error

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
                self.meeting.store.set("lost", str(name))

    @contextlib.contextmanager
    def _telling_who_is_lost(self) -> Iterator[None]:
        if self._lost is not None:
            raise self._lost
        try:
            yield
        except RuntimeError as error:  # torch's for a broken connection and for its timeout
            self._lost = peer_error(self.meeting, error)
            raise self._lost from error
