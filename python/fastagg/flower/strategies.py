"""Flower's strategies with fastagg's arithmetic: the same names, arguments and messages."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy.fedopt import FedOpt as FlowerFedOpt
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fastagg import server
from fastagg._errors import NONFINITE, NonFiniteUpdateError, NoUpdateLeftError
from fastagg._quoting import quoted
from fastagg._updates.policies import check_policies
from fastagg._updates.sent import Sent, same_infinities
from fastagg.averaging.mean import mean_and_dropped
from fastagg.flower.accounted_privacy import AccountedAggregateTrain
from fastagg.flower.arrays import (
    FreshArrays,
    Leaf,
    as_array,
    check_integer_leaves,
    read_record,
    squared_distance,
)
from fastagg.flower.replies import LeftOutReply, Reply, UnusableReplyError, differences, form_of
from fastagg.flower.rounds import LOG, EvaluationRound, Mean, Members, Round, Settings, TrainingRound
from fastagg.flower.streaming import StreamingGrid
from fastagg.server.optimizer import as_buffers, in_range

LEFT_OUT_METRIC = "replies-left-out"


_SMALLEST_RATE = 1e-30  # whose inverse's square is far inside the range of floats
_LARGEST_SHARE = 2.0**900  # so that the sum of any number of replies' shares is finite


class FedAvg(flower.FedAvg):
    """Federated averaging (McMahan et al. 2017): Flower's `FedAvg`, with the mean of `fastagg.fedavg`.

    ``mean[i] = sum_k(num_examples_k * x_k[i]) / sum_k(num_examples_k)``

    Replies are read from their bytes in place and never altered; leaves are matched by name and keep their dtypes; a
    leaf may be quantised (`quantize_mod`). A reply that cannot be averaged is left out, logged, counted in the round's
    metric "replies-left-out" and listed in `left_out`: one with other leaves or shapes than the model that was sent,
    with other records, dtypes or metrics than the rest (lists of other lengths, unless a function of one's own
    aggregates the metrics), bytes that are not what their header says, a weight that is no finite number of 0 or more,
    of another round, or a second one of a node. A reply of weight 0 has no part in anything.

    Attributes:
        left_out: (server_round, node, reason) of every reply that was left out.
    """

    aggregate_train = AccountedAggregateTrain(model_made_by=("_weighed", "_aggregate", "_next_model"))
    _in_model_dtypes = False

    def __init__(
        self,
        *args: Any,
        nan_policy: str = "drop",
        integer_policy: str | None = None,
        streaming: bool = False,
        **kwargs: Any,
    ) -> None:
        """A strategy with the arguments of Flower's strategy of the same name, and those named here.

        Args:
            *args: Flower's.
            nan_policy: for a reply that holds a NaN or an infinity: "drop" leaves it out, "raise" ends the round with
                an error, "propagate" adds it.
            integer_policy: for integer and bool leaves: "max", "first", "round" or None, as in `fastagg.fedavg`: None
                ends a run whose model looks like another quantiser's codes before its first round.
            streaming: add every reply to the sums when it arrives, and free it, so that the server's memory does not
                grow with the number of nodes. A reply must then have the leaves of the model that was sent, and an
                override of `aggregate_train` is called without replies.
            **kwargs: Flower's.
        """
        super().__init__(*args, **kwargs)
        check_policies(nan_policy, integer_policy)
        self.nan_policy, self.integer_policy, self.streaming = nan_policy, integer_policy, streaming
        self.left_out: list[LeftOutReply] = []
        self._model: dict[str, Leaf] = {}
        self._round: TrainingRound | None = None

    def summary(self) -> None:
        """Logs the settings."""
        LOG.info("\t├──> fastagg settings:")
        LOG.info("\t│\t├── NaN policy: %s | integer policy: %s", self.nan_policy, self.integer_policy)
        LOG.info("\t│\t└── Streaming: %s", self.streaming)
        super().summary()

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> flower.Result:
        """Runs the rounds; see Flower's `Strategy.start`."""
        if self.streaming:
            grid = cast(Grid, StreamingGrid(grid, self._take))
        return super().start(grid, *args, **kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's messages to the nodes that Flower samples."""
        self._model = read_record(arrays)
        if self.integer_policy is None:
            check_integer_leaves(self._model)
        self._round = self._open_round(server_round)
        return _of_round(server_round, self._sampled(server_round, arrays, config, grid))

    def _sampled(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The messages of Flower's strategy of the same name."""
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's messages to the nodes that Flower samples."""
        return _of_round(server_round, super().configure_evaluate(server_round, arrays, config, grid))

    def _open_round(self, server_round: int) -> TrainingRound:
        settings = Settings(
            self.nan_policy,
            self.integer_policy,
            self.streaming,
            self._in_model_dtypes,
            _is_flowers_mean(self.train_metrics_aggr_fn),
            self._weighed,
            self._aggregate,
            self._sent,
        )
        return TrainingRound(server_round, self.weighted_by_key, settings, self._model)

    def _take(self, message: Message) -> None:
        """Adds a reply that has just arrived, and frees its arrays.

        Raises:
            AggregationError: the round was not begun by our `configure_train`.
        """
        if self._round is None:
            raise AggregationError("streaming=True needs super().configure_train(...) to begin the round")
        self._round.take(message)
        if message.has_content():
            for record in message.content.array_records.values():
                record.clear()

    def _aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The round's model and metrics; None for the model if no result came, or too few for the rule.

        Raises:
            NoReplyLeftError: results came, and none can be averaged.
            NonFiniteUpdateError: under nan_policy="raise", one holds a NaN or an infinity.
        """
        opened, self._round = self._round, None
        current = opened if opened is not None and opened.number == server_round else self._open_round(server_round)
        for message in replies:
            current.take(message)
        LOG.info("aggregate_train: Received %s results and %s failures", current.results, current.failures)
        try:
            mean = current.mean()
        finally:
            self.left_out.extend(current.left_out)
        if mean is None:
            return None, self._metrics(self.train_metrics_aggr_fn, [], current)
        metrics = self._metrics(self.train_metrics_aggr_fn, mean.replies, current)
        return self._next_model(server_round, mean).record(), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean of the nodes' metrics; None if no reply can be averaged: the log then says why."""
        current = EvaluationRound(server_round, self.weighted_by_key, _is_flowers_mean(self.evaluate_metrics_aggr_fn))
        for message in replies:
            current.take(message)
        LOG.info("aggregate_evaluate: Received %s results and %s failures", current.results, current.failures)
        agreeing = current.agreeing()
        self.left_out.extend(current.left_out)
        return self._metrics(self.evaluate_metrics_aggr_fn, agreeing, current)

    def _weighed(self, reply: Reply) -> Reply:
        """A reply with its weight in the mean, or UnusableReplyError."""
        return reply

    def _aggregate(
        self, replies: list[Reply], weights: list[float], out: dict[str, np.ndarray], nan_policy: str
    ) -> Members:
        """Writes the replies' mean."""
        updates = [reply.leaves for reply in replies]
        try:
            _, dropped = mean_and_dropped(updates, weights, out, nan_policy, self.integer_policy, self._sent())
        except NoUpdateLeftError as error:
            dropped = error.dropped
        contributing = [reply for client, reply in enumerate(replies) if client not in dropped]
        return Members(contributing, [(replies[client], leaf_name) for client, leaf_name in dropped.items()])

    def _sent(self) -> Sent | None:
        """What the mean is to know of the model that was sent: here, where that is infinite itself."""
        return Sent(self._model, unrounded=False) if self._model else None

    def _next_model(self, server_round: int, mean: Mean) -> FreshArrays:
        """The model that a round's mean leads to."""
        return mean.arrays

    def _metrics(
        self, aggregate: Callable[[list[RecordDict], str], MetricRecord], replies: list[Reply], current: Round
    ) -> MetricRecord | None:
        """The replies' metrics, and how many replies were left out; None if there is nothing to tell."""
        metrics = aggregate([reply.content for reply in replies], self.weighted_by_key) if replies else None
        if current.left_out:
            metrics = MetricRecord() if metrics is None else metrics
            metrics[LEFT_OUT_METRIC] = len(current.left_out)
        return metrics


def _is_flowers_mean(aggregate: Callable[[list[RecordDict], str], MetricRecord]) -> bool:
    """Whether metrics are averaged element by element; a user's own function may make something else of lists."""
    return aggregate is aggregate_metricrecords


def _of_round(server_round: int, messages: Iterable[Message]) -> list[Message]:
    """Messages whose replies can be told from those of other rounds."""
    messages = list(messages)
    for message in messages:
        message.metadata.group_id = message.metadata.group_id or str(server_round)
    return messages


class FedProx(FedAvg, flower.FedProx):
    """FedProx (Li et al. 2020): `FedAvg` whose nodes are told `proximal-mu`, for `fastagg.server.proximal_term`."""


class _ServerOptimized(FedAvg):
    """A strategy whose next model is a server optimiser's step from the model that was sent towards the mean.

    Buffers (integer leaves, running statistics, and those named in `buffers=`) are no parameters: they take the mean.
    A quantised reply counts by how far it is from the model as its wire rounds that, so that no layer moves by
    roundings alone.
    """

    _in_model_dtypes = True
    optimizer: Any  # of fastagg.server
    current_arrays: Any  # of Flower's strategy: the model that was sent

    def __init__(self, *args: Any, buffers: Iterable[str] = (), **kwargs: Any) -> None:
        """A strategy with the arguments of `FedAvg` and of Flower's strategy of the same name.

        Args:
            *args: Flower's.
            buffers: names of further leaves that take the mean.
            **kwargs: Flower's, and those of `FedAvg`.

        Raises:
            TypeError, ValueError: a number is out of range.
        """
        super().__init__(*args, **kwargs)
        self.buffers = as_buffers(buffers)
        self.optimizer = self._new_optimizer()
        self._steps = 0

    @abstractmethod
    def _new_optimizer(self) -> Any:
        """The optimiser of `fastagg.server`, which checks the strategy's numbers."""

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's moments and the number of its steps, copied, for a checkpoint."""
        return {"optimizer": self.optimizer.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` saved, in a run whose rounds count from 1 again.

        Raises:
            ValueError: the state is of another strategy or model, or damaged. Nothing has changed then.
        """
        if not isinstance(state, dict) or state.keys() != {"optimizer", "steps"}:
            raise ValueError(f"state: expected what {type(self).__name__}.state_dict() returned")
        if not isinstance(state["steps"], int) or state["steps"] < 0:
            raise ValueError(f"state: expected a number of steps, got {state['steps']!r}")
        self.optimizer.load_state_dict(state["optimizer"])
        self._steps, self.buffers = state["steps"], self.optimizer.buffers

    def _sampled(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        for name in self.buffers:
            if name not in self._model:
                raise ValueError(f"buffers: the model has no leaf {name!r}")
        messages = flower.FedAvg.configure_train(self, server_round, arrays, config, grid)
        self.current_arrays = {name: as_array(leaf) for name, leaf in self._model.items()}  # where Flower copies
        return messages

    def _sent(self) -> Sent | None:
        return None if self.current_arrays is None else Sent(_current_model(self), self.buffers)

    def _next_model(self, server_round: int, mean: Mean) -> FreshArrays:
        current = _current_model(self)
        following = FreshArrays(current)
        rate = self._learning_rate(mean.replies)
        check = self.nan_policy == "propagate"  # otherwise the mean has been looked at
        self.optimizer.step(current, mean.arrays.views, out=following.views, learning_rate=rate, check_finite=check)
        self._steps += 1
        return following

    def _learning_rate(self, replies: list[Reply]) -> float:
        """The learning rate of a round of these replies.

        Also hands the optimiser the strategy's other attributes, which users may set.
        """
        raise NotImplementedError


def _current_model(strategy: Any) -> dict[str, np.ndarray]:
    """The model that a strategy has sent.

    Raises:
        AggregationError: it has sent none.
    """
    arrays = strategy.current_arrays
    if arrays is None:
        raise AggregationError("There is no model to step from: configure_train was not called before aggregate_train")
    leaves = read_record(arrays) if isinstance(arrays, ArrayRecord) else arrays
    return {name: as_array(leaf) for name, leaf in leaves.items()}


class FedAvgM(_ServerOptimized, flower.FedAvgM):
    """FedAvg with server momentum (Hsu et al. 2019).

    ``m = server_momentum * m + (x - mean)``, ``x = x - server_learning_rate * m``
    """

    def _new_optimizer(self) -> server.FedAvgM:
        rate, momentum = self.server_learning_rate, self.server_momentum
        return server.FedAvgM(learning_rate=rate, momentum=momentum, buffers=self.buffers)

    def _learning_rate(self, replies: list[Reply]) -> float:
        self.optimizer.momentum = self.server_momentum
        return self.server_learning_rate

    def _next_model(self, server_round: int, mean: Mean) -> FreshArrays:
        following = super()._next_model(server_round, mean) if self.server_opt else mean.arrays
        self.current_arrays = following.read_only()
        return following


class FedOpt(FedAvg, FlowerFedOpt):
    """What FedAdagrad, FedAdam and FedYogi share; by itself it averages, as Flower's does."""

    def _sampled(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        return flower.FedAvg.configure_train(self, server_round, arrays, config, grid)  # Flower's copies the model


class _Adaptive(_ServerOptimized, FedOpt):
    """Adaptive federated optimisation (Reddi et al. 2021, Algorithm 2).

    ``delta = mean - x``, ``m = beta_1 * m + (1 - beta_1) * delta``, ``x = x + eta * m / (sqrt(v) + tau)``
    """

    def _learning_rate(self, replies: list[Reply]) -> float:
        self.optimizer.beta_1, self.optimizer.beta_2, self.optimizer.tau = self.beta_1, self.beta_2, self.tau
        return self.eta


class FedAdagrad(_Adaptive, flower.FedAdagrad):
    """FedAdagrad: ``v = v + delta^2``; otherwise as FedAdam, with ``beta_1 = 0``."""

    def _new_optimizer(self) -> server.FedAdagrad:
        return server.FedAdagrad(learning_rate=self.eta, beta_1=self.beta_1, tau=self.tau, buffers=self.buffers)


class FedAdam(_Adaptive, flower.FedAdam):
    """FedAdam: ``v = beta_2 * v + (1 - beta_2) * delta^2``, and Flower's corrected learning rate.

    ``eta_t = eta * sqrt(1 - beta_2^(t + 1)) / (1 - beta_1^(t + 1))`` in step t (Kingma and Ba 2015, who have t; Flower
    has its round in the place of the step, and so begins anew where a run is resumed).
    """

    def _new_optimizer(self) -> server.FedAdam:
        return server.FedAdam(
            learning_rate=self.eta, beta_1=self.beta_1, beta_2=self.beta_2, tau=self.tau, buffers=self.buffers
        )

    def _learning_rate(self, replies: list[Reply]) -> float:
        rate, power = super()._learning_rate(replies), self._steps + 2
        return rate * math.sqrt(1 - self.beta_2**power) / (1 - self.beta_1**power)


class FedYogi(_Adaptive, flower.FedYogi):
    """FedYogi: ``v = v - (1 - beta_2) * delta^2 * sign(v - delta^2)``; otherwise as FedAdam, without correction."""

    def _new_optimizer(self) -> server.FedYogi:
        return server.FedYogi(
            learning_rate=self.eta, beta_1=self.beta_1, beta_2=self.beta_2, tau=self.tau, buffers=self.buffers
        )


class QFedAvg(_ServerOptimized, flower.QFedAvg):
    """q-FedAvg (Li et al. 2020): nodes with a higher loss weigh more.

    ``x = x - sum_k(F_k^q * L * (x - x_k)) / sum_k(q * F_k^(q - 1) * |L * (x - x_k)|^2 + L * F_k^q)``, L being
    ``1 / client_learning_rate`` and F_k the loss that a node reports as `train_loss_key`. A reply without a finite loss
    of 0 or more is left out, and one whose share of a sum leaves the range of floats.
    """

    def _new_optimizer(self) -> server.FedAvg:
        in_range(self.client_learning_rate, "client_learning_rate", least=_SMALLEST_RATE)
        in_range(self.q, "q")
        return server.FedAvg(buffers=self.buffers)

    def _weighed(self, reply: Reply) -> Reply:
        loss = reply.metrics.get(self.train_loss_key)
        if isinstance(loss, (list, bool)) or loss is None or not 0 <= loss < math.inf:
            raise UnusableReplyError(f"expected a finite {self.train_loss_key!r} of 0 or more, got {quoted(loss)}")
        current = _current_model(self)
        if form_of(current) != form_of(reply.leaves):
            raise UnusableReplyError(differences(form_of(reply.leaves), form_of(current)))
        distance = squared_distance(current, reply.leaves, self.buffers)
        weight, divisor = self._shares(loss, distance)
        if not weight + divisor < _LARGEST_SHARE and all(
            same_infinities(as_array(leaf), current[name]) for name, leaf in reply.leaves.items()
        ):
            raise UnusableReplyError(
                f"its {self.train_loss_key!r} {quoted(loss)}, or its model, is too large for its share"
            )
        return reply._replace(weight=weight, divisor=divisor)

    def _shares(self, loss: float, distance: float) -> tuple[float, float]:
        """A reply's shares of the two sums; infinite where they leave the range of floats."""
        lipschitz = 1 / self.client_learning_rate
        try:
            loss = float(loss) + 1e-10
            weight: float = lipschitz * loss**self.q
            return weight, self.q * loss ** (self.q - 1) * lipschitz**2 * distance + weight
        except OverflowError:
            return math.inf, math.inf

    def _learning_rate(self, replies: list[Reply]) -> float:
        rate = math.fsum(reply.weight for reply in replies) / math.fsum(reply.divisor for reply in replies)
        if math.isnan(rate):  # under "propagate"
            raise NonFiniteUpdateError(f"a reply {NONFINITE}, so that there is no step")
        return rate
