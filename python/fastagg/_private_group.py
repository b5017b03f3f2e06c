"""A Gloo group of our own: what DDP and users do over theirs meanwhile cannot come between its exchanges."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from fastagg._meeting import Meeting
from fastagg._roll_call import raise_peer_error


class PrivateGroup:
    """The ranks of a meeting, connected by Gloo."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting, self.rank, self.world = meeting, meeting.rank, meeting.world
        timeout = datetime.timedelta(seconds=meeting.timeout)
        store = PrefixStore("gloo", meeting.store)
        try:
            self._gloo: Any = dist.ProcessGroupGloo(store, self.rank, self.world, timeout)
        except RuntimeError as error:
            raise_peer_error(meeting, error)

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> Any:
        """Sends one of `world` equal parts to each rank; returns torch's Work."""
        return self._gloo.alltoall_base(received, sent, [], [])

    def all_gather(self, everyone: torch.Tensor, own: torch.Tensor) -> Any:
        """Copies each rank's tensor to all ranks; returns torch's Work."""
        return self._gloo._allgather_base(everyone, own)

    def wait(self, work: Any) -> None:
        """Waits for what the two above have started.

        Raises:
            PeerError: a rank has died or hung.
        """
        try:
            work.wait()
        except RuntimeError as error:  # torch's for a broken connection and for its timeout
            raise_peer_error(self.meeting, error)
