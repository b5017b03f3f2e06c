"""Finds out who is missing when a backend's exchange has failed: torch's own errors do not say."""

from __future__ import annotations

import time
from typing import Any, NoReturn

import torch.distributed as dist

from fastagg._errors import PeerError

_GRACE = 5.0  # seconds: all who live have failed as well by then, or are told by their connections


def raise_peer_error(group: dist.ProcessGroup, error: Exception) -> NoReturn:
    """Raises PeerError for the first rank that does not answer; the error itself if all do."""
    names = dist.get_process_group_ranks(group)
    missing = _missing(dist.distributed_c10d._get_process_group_store(group), names, dist.get_rank())
    if missing is None:
        raise PeerError(names[0], f"rank {names[0]} is gone, and the group's store with it: {error}") from error
    if not missing:
        raise error
    raise PeerError(missing[0], f"rank {', '.join(map(str, missing))} did not answer: {error}") from error


def _missing(store: Any, names: list[int], own: int) -> list[int] | None:
    """The ranks that have not failed here too within a while; None if the store does not answer."""
    try:
        store.set(f"fastagg/failed/{own}", "")
        missing, deadline = list(names), time.monotonic() + _GRACE
        while missing and time.monotonic() < deadline:
            missing = [name for name in missing if not store.check([f"fastagg/failed/{name}"])]
            time.sleep(0.02)
        return missing
    except (RuntimeError, ConnectionError):
        return None
