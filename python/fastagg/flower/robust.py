"""Flower's robust strategies, by the rules of `fastagg.robust`: a few hostile nodes do not decide the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.multikrum import select_multikrum

from fastagg._updates.leaves import infinite_leaves, inputs_of
from fastagg._updates.sent import is_nonfinite, with_zeros
from fastagg.flower.arrays import FreshArrays, Leaf, as_array
from fastagg.flower.replies import Reply
from fastagg.flower.rounds import LOG, Mean, Members
from fastagg.flower.strategies import FedAvg
from fastagg.robust import coordinates, selection
from fastagg.robust.arguments import as_count
from fastagg.robust.points import Points
from fastagg.robust.rules import Geometry, Rule

SelectionRule = Callable[[list[RecordDict], int, int], list[RecordDict]]


class _Robust(FedAvg):
    """What the robust strategies share: a rule looks at all replies of a round together."""

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
                an error, "propagate" leaves it to the rule.
            integer_policy: for integer and bool leaves: "round" (the rule's own answer, rounded), or "max" or "first"
                of the replies that take part; None is "round", but ends a run whose model looks like another
                quantiser's codes.
            streaming: refused: no rule here is a sum.
            **kwargs: Flower's.

        Raises:
            ValueError: an argument is wrong.
        """
        if streaming:
            raise ValueError(f"streaming: {type(self).__name__} needs all replies of a round at once")
        super().__init__(*args, nan_policy=nan_policy, integer_policy=integer_policy, **kwargs)

    @abstractmethod
    def _rule(self, replies: list[Reply]) -> Rule:
        """The rule for so many replies."""

    def _aggregate(
        self, replies: list[Reply], weights: list[float], out: dict[str, np.ndarray], nan_policy: str
    ) -> Members:
        # In the order of nodes, which breaks ties and fixes every bit, whoever came first.
        if all(isinstance(reply.node, int) for reply in replies):
            order = sorted(range(len(replies)), key=lambda index: replies[index].node)
            replies, weights = [replies[index] for index in order], [weights[index] for index in order]
        rule, constants = self._rule(replies), Constants(self._model)
        updates = [constants.taken_out(reply.leaves) for reply in replies]
        try:
            outcome = rule.aggregate(
                updates, weights, out=out, nan_policy=nan_policy, integer_policy=self.integer_policy
            )
        except ValueError as error:
            dropped = Points(updates).nonfinite(range(len(updates))) if nan_policy == "drop" else {}
            if not _is_too_few(rule, len(updates) - len(dropped)):
                raise
            LOG.warning("aggregate_train: %s keeps the model: %s", type(self).__name__, error)
            return _members(replies, [], dropped)
        constants.put_back(out, len(replies))
        return _members(replies, outcome.selected, outcome.dropped)


class Constants:
    """Where the model that was sent is infinite, as a causal mask is: a reply's same infinity is no fault of it."""

    def __init__(self, model: dict[str, Leaf]) -> None:
        """Looks the model through; an empty one has no constants."""
        arrays = {name: as_array(leaf) for name, leaf in model.items()}
        infinite = infinite_leaves(inputs_of(arrays)) if arrays else []
        self._values = {name: arrays[name] for name in (list(arrays)[index] for index in infinite)}
        self._counts = {name: np.zeros(values.shape, int) for name, values in self._values.items()}

    def taken_out(self, leaves: dict[str, Leaf]) -> dict[str, Leaf]:
        """A reply's leaves with zeros in the places of the same infinities."""
        replaced = {}
        for name, values in self._values.items():
            array = as_array(leaves[name])
            same = is_nonfinite(values) & (array == values)
            self._counts[name] += same
            replaced[name] = with_zeros(array, same)
        return {**leaves, **replaced}

    def put_back(self, out: dict[str, np.ndarray], count: int) -> None:
        """Writes the infinities that more than half of so many replies have had."""
        for name, values in self._values.items():
            most = 2 * self._counts[name] > count
            out[name][most] = values[most]


def _is_too_few(rule: Rule, count: int) -> bool:
    try:
        rule.check(count)
    except ValueError:
        return True
    return count == 0


def _members(replies: list[Reply], selected: list[int], dropped: dict[int, str]) -> Members:
    return Members(
        [replies[client] for client in selected], [(replies[client], name) for client, name in dropped.items()]
    )


class FedMedian(_Robust, flower.FedMedian):
    """The coordinates' medians (Yin et al. 2018), by `fastagg.robust.median`.

    A reply counts once, and not at all of 0 examples.
    """

    def _rule(self, replies: list[Reply]) -> Rule:
        return coordinates.Median()


class FedTrimmedAvg(_Robust, flower.FedTrimmedAvg):
    """The coordinates' means without the ``int(beta * K)`` smallest and largest of K values (Yin et al. 2018).

    By `fastagg.robust.trimmed_mean`; a reply counts once, and not at all of 0 examples.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `FedMedian`; `beta` is 0 or more and below 0.5."""
        super().__init__(*args, **kwargs)
        if not 0 <= self.beta < 0.5:  # older versions of Flower take any
            raise ValueError(f"beta: expected a number of 0 or more and below 0.5, got {self.beta!r}")

    def _rule(self, replies: list[Reply]) -> Rule:
        return _Trimmed(self.beta)


class _Trimmed(coordinates.TrimmedMean):
    """Cuts a share of the values that are there, so of those that stay when others are dropped."""

    def __init__(self, beta: float) -> None:
        super().__init__(0)
        self._beta = beta

    def check(self, count: int) -> None:
        """Any number of updates can be trimmed; sets how many values are cut."""
        self.left_out = int(self._beta * count)


class _Selecting(_Robust):
    """A strategy that looks at the distances between models, and selects some.

    Attributes:
        selected: by round, the nodes whose models are in the aggregate.
    """

    num_malicious_nodes: int

    def __init__(self, *args: Any, convention: str = "paper", **kwargs: Any) -> None:
        """See `FedMedian`; `convention` says what Krum's score is, as in `fastagg.robust.krum`."""
        super().__init__(*args, **kwargs)
        self.convention = convention
        self.selected: dict[int, list[int]] = {}
        self._rule([])  # a wrong argument is an error here

    def _hostile(self) -> int:
        return as_count(self.num_malicious_nodes, "num_malicious_nodes")

    def _next_model(self, server_round: int, mean: Mean) -> FreshArrays:
        self.selected[server_round] = [reply.node for reply in mean.replies]
        LOG.info("aggregate_train: Selected nodes %s", self.selected[server_round])
        return super()._next_model(server_round, mean)


class MultiKrum(_Selecting, flower.MultiKrum):
    """The weighted mean of the `num_nodes_to_select` models with the best Krum scores (Blanchard et al. 2017).

    A score is the sum of a model's squared distances to its ``n - f - 2`` nearest others, of n replies with f
    `num_malicious_nodes`; of equal ones, that of the smallest node id is better. Metrics are those of the selected. A
    round of fewer than ``2f + 3`` replies goes on, as in Flower, with a warning: a hostile model may be selected.
    """

    def _rule(self, replies: list[Reply]) -> Rule:
        wanted = as_count(self.num_nodes_to_select, "num_nodes_to_select", 1)
        return _MultiKrum(self._hostile(), wanted, self.convention)


class _Krum(selection.Krum):
    """Selects among however few replied."""

    def check(self, count: int) -> None:
        """Warns unless there are enough neighbours."""
        least = 2 * self.f + 3
        if 0 < count < least:
            message = "aggregate_train: %d replies are fewer than %d (2f + 3 for f = %d): a hostile one may be selected"
            LOG.warning(message, count, least, self.f)


class _MultiKrum(_Krum, selection.MultiKrum):
    """Selects all where fewer replied than are to be selected."""

    def best(self, geometry: Geometry, count: int) -> list[int]:
        """The members of the lowest scores, the best first."""
        return super().best(geometry, min(count, len(geometry.near)))


class Krum(MultiKrum, flower.Krum):
    """The model with the best Krum score (Blanchard et al. 2017); see `MultiKrum`."""

    def _rule(self, replies: list[Reply]) -> Rule:
        return _Krum(self._hostile(), self.convention)


class Bulyan(_Selecting, flower.Bulyan):
    """The coordinates' means of the ``n - 4f`` values nearest to the median of ``n - 2f`` selected models.

    El Mhamdi et al. 2018. The models with the best Krum scores are selected at once, as Flower does, or with
    `one_by_one`, as the paper does, each by new scores among those that are left. A `selection_rule` of one's own is
    called as Flower calls it. Metrics are those of the selected. A round of fewer than ``4f + 3`` replies keeps the
    model: the log says so.
    """

    def __init__(self, *args: Any, one_by_one: bool = False, **kwargs: Any) -> None:
        """See `FedMedian`; `convention` says what Krum's score is, `one_by_one` whether it is computed anew."""
        self.one_by_one = one_by_one
        super().__init__(*args, **kwargs)

    def _rule(self, replies: list[Reply]) -> Rule:
        if self.selection_rule is select_multikrum:
            return selection.Bulyan(self._hostile(), self.convention, rescore=self.one_by_one)
        return _BulyanOf(self._hostile(), self.selection_rule, [reply.content for reply in replies])


class _BulyanOf(selection.Bulyan):
    """Bulyan whose updates somebody else selects."""

    def __init__(self, f: int, select: SelectionRule, contents: list[RecordDict]) -> None:
        super().__init__(f)
        self._select, self._contents = select, contents

    def select(self, geometry: Geometry) -> list[int]:
        """What the selection rule selects.

        Raises:
            ValueError: that is not as many of the contents as it was asked for.
        """
        wanted = len(geometry.members) - 2 * self.f
        chosen = self._select([self._contents[member] for member in geometry.members], self.f, wanted)
        places = {id(self._contents[member]): member for member in geometry.members}
        selected = {places[id(content)] for content in chosen if id(content) in places}
        if len(selected) != wanted:
            raise ValueError(f"selection_rule: expected {wanted} of the contents it was given, got {len(selected)}")
        return sorted(selected)
