"""What ranks are called with, compared where a device does the exchange: it cannot raise an error."""

from __future__ import annotations

from fastagg.distributed.rendezvous.store import Meeting


class Agreement:
    """Compares each description once, the first time that it is met: a training step's come again and again.

    A rank that is called with something known where the others are called with something new is found by the timeout;
    ranks that call what is known in another order, by the transport if at all.
    """

    def __init__(self, meeting: Meeting) -> None:
        self._meeting, self._known = meeting, set[str]()

    def check(self, description: str) -> None:
        """Raises ValueError on every rank if one was called with something else."""
        if description in self._known:
            return
        names, rank = self._meeting.names, self._meeting.rank
        everyone = [one.decode() for one in self._meeting.gather(description.encode())]
        for name, theirs in zip(names, everyone, strict=True):
            if theirs != description:
                raise ValueError(f"rank {name} has {theirs}; rank {names[rank]} has {description}")
        self._known.add(description)
