"""Where the ranks of a group agree on how to exchange: a few bytes through the group's store, whatever its backend."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from fastagg._errors import PeerError
from fastagg.distributed.rendezvous.watch import Watch

_PAUSES = 0.0005, 0.02  # seconds between two looks at the store: the first, and the longest


class Meeting:
    """Ranks who all do the same here in the same order.

    Nobody waits inside the store: a client that waits there keeps all other threads of its process from using it, and
    sees neither a signal nor a peer that has died.
    """

    def __init__(self, store: Any, names: list[int], rank: int, timeout: float, watch: Watch) -> None:
        self.store, self.names, self.rank, self.timeout, self.watch = store, names, rank, timeout, watch
        self._gathered = 0
        self._interrupted = False

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Meeting:
        """The ranks of a group, named as the world names them."""
        store = PrefixStore("fastagg", dist.distributed_c10d._get_process_group_store(group))
        rank = dist.get_rank(group)
        # A store can outlive its groups: those of a name that comes again must not read what the first have left.
        number = store.add(f"meetings of {rank}", 1)
        names = dist.get_process_group_ranks(group)
        return cls(PrefixStore(str(number), store), names, rank, _timeout_of(group), Watch(group, names, rank, number))

    def close(self) -> None:
        """The ranks have met, or never will."""
        self.watch.close()

    @property
    def world(self) -> int:
        """How many they are."""
        return len(self.names)

    @property
    def name(self) -> int:
        """What the others call this rank."""
        return self.names[self.rank]

    def gather(self, own: bytes) -> list[bytes]:
        """What every rank has brought.

        Raises:
            PeerError: a rank has died, or did not come within the timeout.
        """
        self._gathered += 1
        keys = [f"{self._gathered}/{rank}" for rank in range(self.world)]
        try:
            self.store.set(keys[self.rank], own.hex())
            self.wait(keys)
            return [bytes.fromhex(self.store.get(key).decode()) for key in keys]
        except PeerError:
            raise
        except RuntimeError as error:  # torch's, for a store that does not answer
            raise self._storeless(error) from error

    def wait(self, keys: Sequence[str], timeout: float | None = None) -> None:
        """Waits until the store has all keys.

        Raises:
            PeerError: a rank has died, or did not come within the timeout.
        """
        pause, longest = _PAUSES
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while not self.store.check(list(keys)):
            lost = self._lost()
            if self.store.check(list(keys)):
                return  # whoever has brought his part may go
            if lost is not None:
                raise lost
            if time.monotonic() > deadline:
                late = next((key for key in keys if not self.store.check([key])), keys[0])
                raise self._too_late(late)
            time.sleep(pause)
            pause = min(1.5 * pause, longest)

    def tell_lost(self, name: int) -> int:
        """Lets the others know of a lost rank; returns it, or the one of whom they were told before."""
        return int(self.store.compare_set("lost", "", str(name)))

    def known_to_be_lost(self) -> int | None:
        """The rank of whom others have told, or whose process has ended."""
        if self.store.check(["lost"]):
            return int(self.store.get("lost"))
        return self.watch.lost()

    def interrupt(self) -> None:
        """Ends the wait of another thread of this process: from then on this rank is lost to the others."""
        self._interrupted = True

    def part(self, label: str, ranks: list[int]) -> Meeting:
        """Some of the ranks, this one among them."""
        store = PrefixStore(label, self.store)
        return Meeting(store, [self.names[rank] for rank in ranks], ranks.index(self.rank), self.timeout, self.watch)

    def _lost(self) -> PeerError | None:
        if self._interrupted:
            return PeerError(self.name, f"rank {self.name} was interrupted")
        name = self.known_to_be_lost()
        return None if name is None else PeerError(name, f"rank {name} has ended or left")

    def _too_late(self, key: str) -> PeerError:
        place = key.rsplit("/", 1)[-1]
        name = self.names[int(place)] if place.isdigit() and int(place) < self.world else -1
        called = f"rank {name} has not made its first call of this group within {self.timeout:g} s"
        return PeerError(name, f"{called}: it hangs, or waits elsewhere")

    def _storeless(self, error: Exception) -> PeerError:
        name = self.watch.lost()
        if name is not None:
            return PeerError(name, f"rank {name} has ended: {error}")
        return PeerError(0, f"rank 0 is gone, and the store with it: {error}")


class MeetingStore(Store):  # type: ignore[misc, unused-ignore]
    """A meeting's store for torch: whoever waits in it sees signals and ranks that die."""

    def __init__(self, meeting: Meeting, label: str) -> None:
        super().__init__()
        self._meeting, self._store = meeting, PrefixStore(label, meeting.store)
        self._label = label
        self.error: BaseException | None = None
        """What ended a wait: torch may make another error of it."""

    def set(self, key: str, value: Any) -> None:
        """See `torch.distributed.Store`, as for all that follows."""
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Waits for a key, and returns its value."""
        self.wait([key])
        return bytes(self._store.get(key))

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        """Waits for keys."""
        try:
            self._meeting.wait([f"{self._label}/{key}" for key in keys])
        except BaseException as error:
            self.error = error
            raise

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return bool(self._store.check(keys))

    def add(self, key: str, amount: int) -> int:
        """Adds to a counter."""
        return int(self._store.add(key, amount))


def _timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that the group waits for a peer."""
    for device in ("cpu", "cuda"):  # the group may have a backend for one of them only
        try:
            return float(group._get_backend(torch.device(device)).options._timeout.total_seconds())
        except (AttributeError, RuntimeError):
            continue
    return float(dist.constants.default_pg_timeout.total_seconds())
