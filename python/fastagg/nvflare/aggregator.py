"""`FedAvgAggregator`: the weighted mean of clients' models, for NVFlare's workflows."""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fastagg._errors import DroppedUpdateWarning
from fastagg._quoting import printable, quoted
from fastagg._updates.forms import Forms
from fastagg._updates.policies import check_policies
from fastagg.averaging.accumulator import Accumulator
from fastagg.nvflare._metrics import mean_metrics, numbers_of
from fastagg.nvflare._replies import (
    ReplyForm,
    as_weight,
    client_of,
    form_of,
    is_on_disk,
    leaves_of,
    number_of_steps,
    round_of,
    shapes_of_global_model,
)

_LONGEST_REASON = 500  # characters; what it quotes is much shorter
_MOST_METRICS = 1000  # whose names are kept, to report each once


class DroppedReply(NamedTuple):
    """A reply that was left out of a round's mean."""

    client: str
    reason: str


class _Contribution(NamedTuple):
    """What is kept of a reply beside its sums."""

    client: str
    weight: float
    metrics: dict[str, float] | None


class _Group:
    """The replies of one form: their running mean and, by the accumulator's number, who sent them."""

    def __init__(self, accumulator: Accumulator) -> None:
        self.accumulator = accumulator
        self.contributions: dict[int, _Contribution] = {}
        self.mean: dict[str, Any] | None = None
        self._added = self._reported = 0

    def add(self, leaves: dict[str, Any], contribution: _Contribution) -> None:
        """Adds a reply; raises TypeError or ValueError if its leaves cannot be averaged."""
        number = self._added
        self._added += 1  # a refused update has had its number
        try:
            with _without_warnings():
                self.accumulator.add(leaves, contribution.weight)
        except (TypeError, ValueError) as error:
            text = str(error).replace(f"the weight of client {number}:", "its weight:", 1)
            text = re.sub(rf"^client {number}[,:] ", "", text)
            raise TypeError(text) if isinstance(error, TypeError) else ValueError(text) from None
        self.contributions[number] = contribution

    def finish(self) -> list[DroppedReply]:
        """Makes the mean; the replies that hold a NaN or an infinity are left out, and contributions no more."""
        try:
            with _without_warnings():
                self.mean = self.accumulator.result()
        except ValueError:  # nobody is left
            self.mean = None
        return self._found()

    def settle(self) -> list[DroppedReply]:
        """As `finish`, without the mean."""
        with _without_warnings():
            _ = self.accumulator.count  # which adds what waits
        return self._found()

    def _found(self) -> list[DroppedReply]:
        """The replies that have been found to hold a NaN or an infinity since the last call."""
        found = self.accumulator.dropped[self._reported :]
        self._reported += len(found)
        return [
            DroppedReply(self.contributions.pop(one.client).client, f"leaf {quoted(one.leaf)} {one.reason}")
            for one in found
        ]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences the accumulator: it knows clients by number, and the aggregator reports them by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DroppedUpdateWarning)
        yield


class FedAvgAggregator(ModelAggregator):
    """The weighted mean of the clients' models, by `fastagg.Accumulator` (McMahan et al. 2017, Algorithm 1).

    ``mean[i] = sum_k(weight_k * x_k[i]) / sum_k(weight_k)``, with ``weight_k = NUM_STEPS_CURRENT_ROUND`` of client k
    times its entry in `aggregation_weights`; 1 where either is missing. Metrics are averaged with the same weights.

    A client of weight 0 does not contribute. Left out and reported, by the log, `dropped` and the result's meta, are
    replies without parameters, of another round, the second one of a client, with a weight that is no finite number of
    0 or more, and with other leaves, shapes, dtypes or params_type (FULL, DIFF) than most replies of the round have; in
    a tie, than the model that was sent has, then the last round's mean, then the reply that came first.

    Attributes:
        dropped: the replies that were left out of the last round, as (client, reason).
    """

    def __init__(
        self,
        nan_policy: str = "drop",
        integer_policy: str | None = None,
        batch: int = 4,
        aggregation_weights: dict[str, float] | None = None,
        exclude_vars: str | None = None,
    ) -> None:
        """An aggregator for `FedAvgRecipe(aggregator=...)` or, as a component, for scatter-and-gather.

        Args:
            nan_policy: for a reply with a NaN or an infinity: "drop" (leave it out), "raise" (the round is an error) or
                "propagate".
            integer_policy: "max", "first", "round" or None, as in `fastagg.fedavg`.
            batch: replies that are held until they are added in one pass. Memory is `batch` models and one and a half
                for the sums. Replies that NVFlare keeps on disk are read and added one by one.
            aggregation_weights: for some clients, by name, a factor of their weight.
            exclude_vars: regular expression; leaves whose names it finds are not averaged and not in the result; None
                or "" for none.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        super().__init__()
        check_policies(nan_policy, integer_policy)
        # Job export reads the arguments from attributes of the same names.
        self.nan_policy, self.integer_policy, self.batch = nan_policy, integer_policy, batch
        self.aggregation_weights, self.exclude_vars = aggregation_weights, exclude_vars
        for client, weight in (aggregation_weights or {}).items():
            as_weight(weight, f"aggregation_weights[{client!r}]")
        self._exclude = re.compile(exclude_vars) if exclude_vars else None
        self._lock = threading.RLock()
        self._last_form: ReplyForm | None = None
        self._skipped_metrics: set[str] = set()
        self._accumulators: list[Accumulator] = []  # of earlier rounds
        self._new_group(batch)  # raises if the batch is wrong
        self.reset_stats()

    def reset_stats(self) -> None:
        """Forgets the round."""
        with self._lock:
            self._groups: Forms[ReplyForm, _Group] = Forms(self._rank)
            self._shapes: dict[Any, tuple[int, ...]] | None = None  # of the model that was sent, once looked for
            self._clients: set[str] = set()
            self._without_weight: list[str] = []
            self._replies = 0
            self._is_over = False
            self.dropped: list[DroppedReply] = []

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Adds a reply as scatter-and-gather hands it over; whether it was taken."""
        self.fl_ctx = fl_ctx
        client = _sender_of(shareable)
        try:
            model = _model_of(shareable, fl_ctx)
        except Exception as error:  # whatever a client makes NVFlare stumble over
            with self._lock:
                self._begin()
                self._drop(client, f"it is no model: {error}")
            return False
        if client != AppConstants.CLIENT_UNKNOWN:
            model.meta["client_name"] = client  # whatever it calls itself
        return self.accept_model(model)

    def accept_model(self, model: FLModel) -> bool:
        """Adds a client's reply; whether it was taken.

        Args:
            model: its `params` map names to NumPy arrays, PyTorch tensors, `fastagg.Quantized`, what `QuantizeFilter`
                made of them, or references to tensors on disk. They must not change before `aggregate_model`.
        """
        with self._lock:
            self._begin()
            self._replies += 1
            client = f"reply {self._replies}"
            try:
                client = client_of(model) or client
                self._add(client, model)
            except Exception as error:  # nothing that a client sends may end the round of all
                self._drop(client, str(error) or type(error).__name__)
                return False
            return True

    def aggregate_model(self) -> FLModel:
        """The round's mean, with its metrics and, in its meta, the number of replies in it and those left out.

        Raises:
            ValueError: no reply is left, or under "raise" one holds a NaN or an infinity; the message names the causes.
        """
        with self._lock:
            groups, self._groups = self._groups, Forms(self._rank)
            self._is_over = True
            chosen = self._finish(groups)
            if chosen is None:
                raise ValueError(f"no reply is left to average: {self._causes()}")
            form, mean = chosen
            for other, group in groups:
                if other != form:
                    for contribution in group.contributions.values():
                        self._drop(contribution.client, other.difference_from(form))
            self._last_form = form
            return self._result(form, mean)

    def _begin(self) -> None:
        """Begins a round where the last one is over: not every workflow resets what has been aggregated."""
        if self._is_over:
            self.reset_stats()

    def _add(self, client: str, model: FLModel) -> None:
        """Adds a reply to those of its form; raises TypeError or ValueError if it is wrong."""
        expected = self.fl_ctx.get_prop(AppConstants.CURRENT_ROUND) if self.fl_ctx else None
        current_round = round_of(model, expected)
        if client in self._clients:
            raise ValueError("a second reply in one round")
        weight = number_of_steps(model) * (self.aggregation_weights or {}).get(client, 1.0)
        leaves = leaves_of(model, self._exclude)
        form = form_of(model, leaves, current_round)
        if weight == 0:
            self._without_weight.append(client)
        else:
            group = self._groups.get(form) or self._new_group(1 if is_on_disk(model) else self.batch)
            group.add(leaves, _Contribution(client, weight, self._metrics_of(model)))
            gone = self._groups.has_grown(form, group)
            for contribution in gone.contributions.values() if gone else ():
                self._drop(contribution.client, "its structure is unlike most others', of too many kinds")
        self._clients.add(client)

    def _metrics_of(self, model: FLModel) -> dict[str, float] | None:
        """A reply's metrics that can be averaged; warns once of each that cannot."""
        if model.metrics is None:
            return None
        averaged, skipped = numbers_of(model.metrics)
        for name in skipped.keys() - self._skipped_metrics:
            if len(self._skipped_metrics) < _MOST_METRICS:
                self.warning(f"metric {name} is not averaged: {skipped[name]}")
                self._skipped_metrics.add(name)
        return averaged

    def _new_group(self, batch: int) -> _Group:
        if self._accumulators and self._accumulators[0].batch == batch:
            return _Group(self._accumulators.pop())
        # Under "raise" all are looked at before the round ends in an error: NVFlare would log one in accept_model only.
        nan_policy = "propagate" if self.nan_policy == "propagate" else "drop"
        integer_policy = self.integer_policy
        return _Group(Accumulator(nan_policy=nan_policy, integer_policy=integer_policy, batch=batch, low_memory=True))

    def _finish(self, groups: Forms[ReplyForm, _Group]) -> tuple[ReplyForm, _Group] | None:
        """The group of most replies, with its mean; its accumulator keeps its memory for the next round."""
        found, best = [], groups.best()
        for form, group in groups:
            found += group.finish() if form == best else group.settle()
        chosen = groups.best()  # another one, if many of the best were dropped
        agreeing = None if chosen is None else groups.get(chosen)
        if agreeing and chosen != best:
            agreeing.finish()
        self._accumulators = [agreeing.accumulator] if agreeing else []
        for accumulator in self._accumulators:
            accumulator.reset()
        for client, reason in found:
            self._drop(client, reason)
        if found and self.nan_policy == "raise":
            raise ValueError("; ".join(f"{client}: {reason}" for client, reason in found))
        return (chosen, agreeing) if chosen and agreeing and agreeing.contributions else None

    def _drop(self, client: str, reason: str) -> None:
        client, reason = printable(client), printable(reason, _LONGEST_REASON)
        self.dropped.append(DroppedReply(client, reason))
        self.warning(f"the reply of {client} is left out: {reason}")

    def _rank(self, form: ReplyForm, group: _Group) -> tuple[int, bool, bool]:
        if self._shapes is None:
            self._shapes = shapes_of_global_model(self.fl_ctx, self._exclude)
        last = self._last_form
        is_last = last is not None and form._replace(current_round=last.current_round) == last
        return len(group.contributions), form.fits(self._shapes), is_last

    def _causes(self) -> str:
        causes = [f"{client}: {reason}" for client, reason in self.dropped]
        causes += [f"{client}: its weight is 0" for client in self._without_weight]
        return "; ".join(causes) or "there was none"

    def _result(self, form: ReplyForm, group: _Group) -> FLModel:
        contributions = list(group.contributions.values())
        weights = [contribution.weight for contribution in contributions]
        report = {"total_weight": math.fsum(weights), "dropped": [list(dropped) for dropped in self.dropped]}
        return FLModel(
            params=group.mean,
            params_type=form.params_type,
            metrics=mean_metrics([contribution.metrics for contribution in contributions], weights),
            current_round=form.current_round,
            meta={"nr_aggregated": len(contributions), "current_round": form.current_round, "fastagg": report},
        )


def _sender_of(shareable: Shareable) -> str:
    """The name of the client that NVFlare has received a reply from."""
    try:
        name = shareable.get_peer_prop(ReservedKey.IDENTITY_NAME, default=AppConstants.CLIENT_UNKNOWN)
    except Exception:  # the headers are the client's
        name = None
    return name if isinstance(name, str) else AppConstants.CLIENT_UNKNOWN


def _model_of(shareable: Shareable, fl_ctx: FLContext) -> FLModel:
    """A reply as a model, of the round that its cookie tells if it tells none itself."""
    model = FLModelUtils.from_shareable(shareable, fl_ctx)
    if model.current_round is None:
        model.current_round = shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND)
    return model
