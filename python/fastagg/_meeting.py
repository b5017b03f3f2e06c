"""Where the ranks of a group agree on how to exchange: a few bytes through the group's store, whatever its backend."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from fastagg._errors import PeerError


class Meeting:
    """Ranks who all do the same here in the same order."""

    def __init__(self, store: Any, names: list[int], rank: int, timeout: float) -> None:
        self.store, self.names, self.rank, self.timeout = store, names, rank, timeout
        self._gathered = 0

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Meeting:
        """The ranks of a group, named as the world names them."""
        store = PrefixStore("fastagg", dist.distributed_c10d._get_process_group_store(group))
        rank = dist.get_rank(group)
        # A store can outlive its groups: those of a name that comes again must not read what the first have left.
        store = PrefixStore(str(store.add(f"meetings of {rank}", 1)), store)
        return cls(store, dist.get_process_group_ranks(group), rank, _timeout_of(group))

    @property
    def world(self) -> int:
        """How many they are."""
        return len(self.names)

    def gather(self, own: bytes) -> list[bytes]:
        """What every rank has brought.

        Raises:
            PeerError: a rank did not come within the timeout.
        """
        self._gathered += 1
        keys = [f"{self._gathered}/{rank}" for rank in range(self.world)]
        self.store.set(keys[self.rank], own.hex())
        try:
            self.store.wait(keys, datetime.timedelta(seconds=self.timeout))
        except RuntimeError as error:
            name = next((name for name, key in zip(self.names, keys, strict=True) if not self.store.check([key])), -1)
            raise PeerError(name, f"rank {name} did not meet the others: {error}") from error
        return [bytes.fromhex(self.store.get(key).decode()) for key in keys]

    def part(self, label: str, ranks: list[int]) -> Meeting:
        """Some of the ranks, this one among them."""
        store = PrefixStore(label, self.store)
        return Meeting(store, [self.names[rank] for rank in ranks], ranks.index(self.rank), self.timeout)


def _timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that the group waits for a peer."""
    for device in ("cpu", "cuda"):  # the group may have a backend for one of them only
        try:
            return float(group._get_backend(torch.device(device)).options._timeout.total_seconds())
        except (AttributeError, RuntimeError):
            continue
    return float(dist.constants.default_pg_timeout.total_seconds())
