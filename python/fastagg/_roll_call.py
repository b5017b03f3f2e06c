"""Finds out who is missing when a backend's exchange has failed: torch's own errors do not say."""

from __future__ import annotations

import time

from fastagg._errors import PeerError
from fastagg._meeting import Meeting

_GRACE = 5.0  # seconds: all who live have failed as well by then, or are told by their connections


def peer_error(meeting: Meeting, error: Exception) -> Exception:
    """PeerError for the first rank that does not answer; another error if all do."""
    missing = _missing(meeting)
    if missing is None:
        return PeerError(0, f"rank 0 is gone, and the store with it: {error}")
    if not missing:
        return RuntimeError(f"the connection is broken, and every rank answers: {error}")
    return PeerError(missing[0], f"rank {', '.join(map(str, missing))} did not answer: {error}")


def _missing(meeting: Meeting) -> list[int] | None:
    """The ranks that have not failed here too within a while; None if the store does not answer."""
    try:
        meeting.store.set(f"failed/{meeting.rank}", "")
        if meeting.store.check(["lost"]):  # a host knows which of its ranks
            return [int(meeting.store.get("lost"))]
        missing, deadline = list(range(meeting.world)), time.monotonic() + _GRACE
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not meeting.store.check([f"failed/{rank}"])]
            time.sleep(0.02)
        return [meeting.names[rank] for rank in missing]
    except RuntimeError:
        return None
