"""The mean of a round's replies: of all in one pass, or of each as it arrives."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
from flwr.app import Message
from flwr.serverapp.exception import AggregationError

from fastagg._errors import NONFINITE, NonFiniteUpdateError
from fastagg._quoting import quoted
from fastagg._updates.forms import Forms
from fastagg._updates.sent import Sent
from fastagg.averaging.accumulator import Accumulator
from fastagg.flower.arrays import FreshArrays, Leaf, check_integer_leaves, in_dtype
from fastagg.flower.replies import (
    LeftOutReply,
    Reply,
    UnusableReplyError,
    agreed_form,
    differences,
    form_of,
    leaves_of,
    read_reply,
)

LOG = logging.getLogger("flwr")


class NoReplyLeftError(AggregationError, ValueError):
    """Replies came, and none of them can be averaged."""


class Mean(NamedTuple):
    """The mean of a round, and the replies that it is made of."""

    arrays: FreshArrays
    replies: list[Reply]


class Members(NamedTuple):
    """Whose replies an aggregate is made of, and which were dropped, each with its first non-finite leaf.

    Nobody's where there were too few for the rule.
    """

    replies: list[Reply]
    dropped: list[tuple[Reply, str]]


class Settings(NamedTuple):
    """How a strategy averages.

    Attributes:
        nan_policy, integer_policy: as in `fastagg.fedavg`.
        streaming: whether replies are added as they arrive.
        in_model_dtypes: whether replies must have the leaves and dtypes of the model that was sent; floating leaves of
            another floating dtype are then read as the model's.
        metric_lengths: whether a metric that is a list must be equally long in all replies.
        weighed: a reply with its weight in the mean.
        aggregate: writes the mean of replies of one form, by their weights, into arrays; its last argument is the
            nan_policy "drop" or "propagate".
        sent: what the mean is to know of the model that was sent, as it is when the first reply comes.
    """

    nan_policy: str
    integer_policy: str | None
    streaming: bool
    in_model_dtypes: bool
    metric_lengths: bool
    weighed: Callable[[Reply], Reply]
    aggregate: Callable[[list[Reply], list[float], dict[str, np.ndarray], str], Members]
    sent: Callable[[], Sent | None]


class Round(ABC):
    """The messages that come back in a round.

    Attributes:
        number: of the round.
        results, failures: how many messages brought a result, and how many an error.
        weightless: how many results have a weight of 0, and so no part in anything.
        left_out: the results that cannot be averaged.
    """

    has_arrays: ClassVar[bool]

    def __init__(self, number: int, weighted_by_key: str) -> None:
        """A round in which nothing has come yet; `weighted_by_key` is the metric that is a reply's weight."""
        self.number, self.results, self.failures, self.weightless = number, 0, 0, 0
        self.left_out: list[LeftOutReply] = []
        self._weighted_by_key = weighted_by_key
        self._nodes: set[int] = set()

    def take(self, message: Message) -> None:
        """Adds a message; one that cannot be averaged is left out."""
        node = message.metadata.src_node_id
        if message.has_error():
            self.failures += 1
            LOG.info("\t> Received error in reply from node %s: %s", quoted(node), quoted(message.error.reason))
            return
        self.results += 1
        try:
            if isinstance(node, int) and node in self._nodes:
                raise UnusableReplyError("has already replied in this round")
            reply = read_reply(message, self.number, self._weighted_by_key, self.has_arrays)
            if reply.weight > 0:
                self._add(reply)
            else:
                self.weightless += 1
        except UnusableReplyError as error:
            self._leave_out(node, str(error))
        else:
            if isinstance(node, int) and node:  # 0 where a message was not sent over a network
                self._nodes.add(node)

    @abstractmethod
    def _add(self, reply: Reply) -> None:
        """Adds a reply, or raises UnusableReplyError."""

    def _leave_out(self, node: int, reason: str) -> None:
        self.left_out.append(LeftOutReply(self.number, node, reason))
        LOG.warning("\t> Left out the reply of node %s: %s", quoted(node), reason)


class EvaluationRound(Round):
    """A round of evaluation: metrics alone."""

    has_arrays = False

    def __init__(self, number: int, weighted_by_key: str, metric_lengths: bool) -> None:
        """See `Round` and `Settings`."""
        super().__init__(number, weighted_by_key)
        self._metric_lengths = metric_lengths
        self._replies: list[Reply] = []

    def _add(self, reply: Reply) -> None:
        self._replies.append(reply)

    def agreeing(self) -> list[Reply]:
        """The replies with the metrics that most have."""
        return _agreeing(self._replies, self._metric_lengths, {}, self._leave_out)


class TrainingRound(Round):
    """A round of training: models, from the first to the mean."""

    has_arrays = True

    def __init__(self, number: int, weighted_by_key: str, settings: Settings, model: dict[str, Leaf]) -> None:
        """See `Round`; `model` is what was sent to the nodes, empty where that is not known."""
        super().__init__(number, weighted_by_key)
        self._settings, self._model, self._wanted = settings, model, form_of(model)
        self._models = (_Streamed if settings.streaming else _Collected)(settings, model, self._leave_out)

    def _add(self, reply: Reply) -> None:
        if self._settings.in_model_dtypes and self._model:
            reply = self._like_the_model(reply)
        if self._settings.integer_policy is None:
            try:
                check_integer_leaves(reply.leaves)
            except ValueError as error:
                raise UnusableReplyError(str(error)) from None
        self._models.add(self._settings.weighed(reply))

    def _like_the_model(self, reply: Reply) -> Reply:
        """A reply with its floating leaves in the model's dtypes.

        Raises:
            UnusableReplyError: it has other leaves, shapes or integer dtypes.
        """
        if form_of(reply.leaves) == self._wanted:
            return reply
        model, leaves = self._model, reply.leaves
        leaves = {name: in_dtype(leaf, model[name].dtype) if name in model else leaf for name, leaf in leaves.items()}
        if form_of(leaves) != self._wanted:
            raise UnusableReplyError(differences(form_of(leaves), self._wanted))
        return reply._replace(leaves=leaves)

    def mean(self) -> Mean | None:
        """The mean of the replies; None if no result came, or too few for the strategy's rule.

        Raises:
            NoReplyLeftError: results came, and none can be averaged.
            NonFiniteUpdateError: under "raise", one holds a NaN or an infinity.
        """
        if not self.results:
            return None
        try:
            mean = self._models.mean()
        except NonFiniteUpdateError:
            raise
        except ValueError as error:
            raise NoReplyLeftError(f"round {self.number}: {error}{self._listed()}") from None
        if mean is None:
            raise NoReplyLeftError(f"round {self.number}: no reply can be averaged{self._listed()}")
        return mean if mean.replies else None

    def _listed(self) -> str:
        weightless = f"; {self.weightless} of weight 0" if self.weightless else ""
        return weightless + "".join(f"; node {node}: {reason}" for _, node, reason in self.left_out)


def _agreeing(
    replies: list[Reply], metric_lengths: bool, model: dict[str, Leaf], leave_out: Callable[[int, str], None]
) -> list[Reply]:
    """The replies of one form; the others are left out."""
    if not replies:
        return []
    forms = [reply.form(metric_lengths) for reply in replies]
    agreed = agreed_form(forms, form_of(model))
    for reply, form in zip(replies, forms, strict=True):
        if agreed is None:
            leave_out(reply.node, differences(leaves_of(form), form_of(model)))
        elif form != agreed:
            leave_out(reply.node, differences(form, agreed))
    return [reply for reply, form in zip(replies, forms, strict=True) if form == agreed]


class _Collected:
    """Keeps the replies and averages them in one pass."""

    def __init__(self, settings: Settings, model: dict[str, Leaf], leave_out: Callable[[int, str], None]) -> None:
        self._settings, self._model, self._leave_out = settings, model, leave_out
        self._replies: list[Reply] = []

    def add(self, reply: Reply) -> None:
        """Takes a reply."""
        self._replies.append(reply)

    def mean(self) -> Mean | None:
        """The mean, and whose it is; None if there is nobody.

        Raises:
            ValueError: all weights are 0, or all hold a NaN or an infinity.
        """
        replies = _agreeing(self._replies, self._settings.metric_lengths, self._model, self._leave_out)
        if not replies:
            return None
        arrays = FreshArrays(replies[0].leaves)
        weights = [reply.weight for reply in replies]
        nan_policy = "propagate" if self._settings.nan_policy == "propagate" else "drop"
        members = self._settings.aggregate(replies, weights, arrays.views, nan_policy)
        for reply, leaf_name in members.dropped:
            if self._settings.nan_policy == "raise":
                raise NonFiniteUpdateError(f"node {reply.node}, {leaf_name}: {NONFINITE}")
            self._leave_out(reply.node, f"{leaf_name} {NONFINITE}")
        if len(members.dropped) == len(replies):
            return None
        return Mean(arrays, members.replies)


class _Leaf(NamedTuple):
    """A leaf without its elements."""

    shape: tuple[int, ...]
    dtype: Any


class _Sums(NamedTuple):
    """What is kept of the replies of one form: their sums, the leaves' shapes and dtypes, and all but their arrays."""

    accumulator: Accumulator
    leaves: dict[str, _Leaf]
    replies: list[Reply]


class _Streamed:
    """Adds each reply to sums when it comes, and keeps nothing of its arrays.

    Replies whose metrics differ have sums of their own until all are there.
    """

    def __init__(self, settings: Settings, model: dict[str, Leaf], leave_out: Callable[[int, str], None]) -> None:
        self._settings, self._wanted, self._leave_out = settings, form_of(model), leave_out
        self._sums: Forms[frozenset[Any], _Sums] = Forms(lambda form, sums: len(sums.replies))

    def add(self, reply: Reply) -> None:
        """Adds a reply to the sums of those of its form, that is: with the same metrics.

        Raises:
            UnusableReplyError: it differs from the model, or holds a NaN or an infinity.
        """
        leaves = form_of(reply.leaves)
        if self._wanted and leaves != self._wanted:
            raise UnusableReplyError(differences(leaves, self._wanted))
        form = reply.form(self._settings.metric_lengths)
        sums = self._sums.get(form) or self._new_sums(reply)
        try:
            sums.accumulator.add(reply.leaves, reply.weight)
        except NonFiniteUpdateError as error:
            if self._settings.nan_policy == "raise":
                raise NonFiniteUpdateError(f"node {reply.node}, {_without_number(error)}") from None
            raise UnusableReplyError(_without_number(error)) from None
        except (TypeError, ValueError) as error:
            raise UnusableReplyError(_without_number(error)) from None
        sums.replies.append(reply._replace(leaves={}))
        gone = self._sums.has_grown(form, sums)
        for left_out in gone.replies if gone else ():
            self._leave_out(left_out.node, "its metrics are unlike most others', of too many kinds")

    def _new_sums(self, reply: Reply) -> _Sums:
        nan_policy = "propagate" if self._settings.nan_policy == "propagate" else "raise"
        integer_policy, sent = self._settings.integer_policy, self._settings.sent()
        sums = Accumulator(nan_policy=nan_policy, integer_policy=integer_policy, low_memory=True, sent=sent)
        leaves = {name: _Leaf(tuple(leaf.shape), leaf.dtype) for name, leaf in reply.leaves.items()}
        return _Sums(sums, leaves, [])

    def mean(self) -> Mean | None:
        """The mean of the replies with the metrics that most have; None if there is nobody."""
        agreed = self._sums.best()
        for form, sums in self._sums:
            if form != agreed:
                for reply in sums.replies:
                    self._leave_out(reply.node, differences(form, agreed or frozenset()))
        chosen = None if agreed is None else self._sums.get(agreed)
        if chosen is None:
            return None
        arrays = FreshArrays(chosen.leaves)
        chosen.accumulator.result(out=arrays.views)
        return Mean(arrays, chosen.replies)


def _without_number(error: Exception) -> str:
    """An accumulator's message without the client's number, which is not the node's."""
    return re.sub(r"^the weight of client \d+:", "its weight:", re.sub(r"^client \d+, ", "", str(error)))
