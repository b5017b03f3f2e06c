"""Replies as a Flower server gets them, and a grid of nodes in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

try:  # newer versions of Flower make messages only within a run
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
except ImportError:
    pass

Update = Mapping[str, np.ndarray]


def record_of(update: Update | ArrayRecord) -> ArrayRecord:
    """A model as Flower itself writes it."""
    return (
        update if isinstance(update, ArrayRecord) else ArrayRecord({k: Array(np.asarray(x)) for k, x in update.items()})
    )


def reply_to(request: Message, update: Any, weight: Any = 1, **metrics: Any) -> Message:
    """A node's reply to a message."""
    record = RecordDict({"metrics": MetricRecord({"num-examples": weight, **metrics})})
    if update is not None:
        record["arrays"] = record_of(update)
    return Message(record, reply_to=request)


def replies(updates: Iterable[Any], weights: Iterable[Any], server_round: int | None = None) -> list[Message]:
    """Replies of nodes 1, 2, …"""
    group = None if server_round is None else str(server_round)
    return [
        reply_to(Message(RecordDict(), node, MessageType.TRAIN, group_id=group), update, weight)
        for node, (update, weight) in enumerate(zip(updates, weights, strict=True), start=1)
    ]


def failure(node: int) -> Message:
    """The reply of a node that could not train."""
    return Message(Error(0, "the node broke"), reply_to=Message(RecordDict(), node, MessageType.TRAIN))


def arrays_of(record: ArrayRecord | None) -> dict[str, np.ndarray]:
    """A record's arrays, as Flower itself reads them."""
    assert record is not None
    return {name: array.numpy() for name, array in record.items()}


class LocalGrid(Grid):
    """A grid whose nodes are functions of this process: each answers when its reply is pulled."""

    def __init__(self, nodes: int, answer: Callable[[Message], Message]) -> None:
        self.nodes, self.answer = nodes, answer
        self.waiting: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Nothing: there is one run."""

    @property
    def run(self) -> Any:
        """There is one run."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """A message."""
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes are numbered from 1."""
        return range(1, self.nodes + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keeps the messages until their replies are pulled."""
        first = len(self.waiting)
        pushed = {f"message {first + index}": message for index, message in enumerate(messages)}
        for message_id, message in pushed.items():
            message.metadata.__dict__["_message_id"] = message_id
        self.waiting.update(pushed)
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Lets the nodes answer."""
        return [self.answer(self.waiting.pop(message_id)) for message_id in message_ids if message_id in self.waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies at once."""
        return self.pull_messages(self.push_messages(messages))
