"""A grid that hands every training reply on when it arrives, so that no two need to be held at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fastagg.flower.rounds import LOG

_LONGEST_PAUSE = 1.0  # seconds between two looks for replies
_SHORTEST_PAUSE = 0.01


@Grid.register  # what it does not have is the grid's own
class StreamingGrid:
    """A Flower grid whose `send_and_receive` of training messages pulls replies one by one.

    Each goes to `take` and is not kept: the list that comes back is empty. Everything else is the grid's own. A look
    for replies asks for every waiting node by itself, so that no two replies come at once.
    """

    def __init__(self, grid: Grid, take: Callable[[Message], None]) -> None:
        """A grid over another one."""
        self._grid, self._take = grid, take

    def __getattr__(self, name: str) -> Any:
        """What the grid itself does."""
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Sends, and waits until all have replied or the time is over."""
        messages = list(messages)
        if not all(message.metadata.message_type.startswith(MessageType.TRAIN) for message in messages):
            return self._grid.send_and_receive(messages, timeout=timeout)
        waiting = [message_id for message_id in self._grid.push_messages(messages) if message_id]  # None: not sent
        if len(waiting) < len(messages):
            LOG.warning("%d of %d messages could not be sent", len(messages) - len(waiting), len(messages))
        del messages
        end = time.monotonic() + timeout if timeout is not None else None
        pause = _SHORTEST_PAUSE
        while waiting and (end is None or time.monotonic() < end):
            still_waiting = [message_id for message_id in waiting if not self._pull(message_id)]
            pause = _SHORTEST_PAUSE if len(still_waiting) < len(waiting) else min(2 * pause, _LONGEST_PAUSE)
            waiting = still_waiting
            if waiting:
                time.sleep(pause)
        return []

    def _pull(self, message_id: str) -> bool:
        """Takes the reply to one message; whether it was there."""
        replies = list(self._grid.pull_messages([message_id]))
        for reply in replies:
            self._take(reply)
        return bool(replies)
