"""Finds out who is missing, or was late, when a backend's exchange has failed: torch's own errors do not say."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastagg._errors import PeerError
from fastagg.distributed.rendezvous.store import Meeting

_GRACE = 5.0  # seconds: all who live have failed as well by then, or are told by their connections


def peer_error(meeting: Meeting, error: Exception, waited: float = 0.0, unconnected: Sequence[int] = ()) -> Exception:
    """PeerError for the first rank that does not answer, or that came last after others had waited for the timeout.

    All ranks name the same one. Another error, if all answer and none was late. `waited`: this rank's seconds in the
    exchange that has failed; `unconnected`: who is the first to be suspected.
    """
    try:
        lost = meeting.known_to_be_lost()
        if lost is None:
            meeting.store.set(f"failed/{meeting.rank}", str(waited))
            lost = _missing(meeting, unconnected)
        if lost is None:
            lost = _latest(meeting)
        if lost is None:
            return RuntimeError(f"the connection is broken, and every rank answers: {error}")
        lost = meeting.tell_lost(lost)
        return PeerError(lost, f"rank {lost} has ended, did not answer, or came later than the timeout: {error}")
    except PeerError as known:
        return known
    except RuntimeError:  # torch's, for a store that does not answer
        lost = meeting.watch.lost()
        reason = "has ended" if lost is not None else "is gone, and the store with it"
        return PeerError(lost or 0, f"rank {lost or 0} {reason}: {error}")


def _missing(meeting: Meeting, unconnected: Sequence[int]) -> int | None:
    """The first rank that has not failed here too within a while, or of whom others have told meanwhile."""
    missing, deadline = list(range(meeting.world)), time.monotonic() + _GRACE
    while missing and time.monotonic() < deadline:
        time.sleep(0.02)
        missing = [rank for rank in missing if not meeting.store.check([f"failed/{rank}"])]
        lost = meeting.known_to_be_lost()
        if missing and lost is not None:
            return lost
    suspects = [rank for rank in missing if rank in unconnected] or missing
    return meeting.names[suspects[0]] if suspects else None


def _latest(meeting: Meeting) -> int | None:
    """The rank that had waited least, if another had waited for the timeout: its own wait broke all connections."""
    waits = [float(meeting.store.get(f"failed/{rank}")) for rank in range(meeting.world)]
    if max(waits) < 0.9 * meeting.timeout:
        return None
    return meeting.names[waits.index(min(waits))]
