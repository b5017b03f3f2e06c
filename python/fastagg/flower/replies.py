"""A round's replies: which of them can be averaged, and why the others cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fastagg._codes import name_of
from fastagg.flower.arrays import Leaf, read_record


class LeftOutReply(NamedTuple):
    """A reply that no mean contains."""

    server_round: int
    node: int
    reason: str


class UnusableReplyError(Exception):
    """A reply that cannot be averaged; the message says why."""


class Reply(NamedTuple):
    """A reply that can be averaged: its node, records and weight, and a training reply's leaves in place.

    `divisor` is its share of the sum by which q-FedAvg divides.
    """

    node: int
    content: RecordDict
    metrics: MetricRecord
    weight: float
    leaves: dict[str, Leaf]
    divisor: float = 0.0

    def form(self, metric_lengths: bool) -> frozenset[Any]:
        """What all replies of a mean must share: the records' and metrics' names, and the leaves with their shapes.

        With `metric_lengths`, also which metrics are lists, and how long.
        """
        records = {*self.content.metric_records, *(self.content.array_records if self.leaves else ())}
        metrics = {
            (name, len(value) if metric_lengths and isinstance(value, list) else -1)
            for name, value in self.metrics.items()
        }
        return frozenset({*records, *metrics, *form_of(self.leaves)})


_dtype_name = lru_cache(maxsize=256)(name_of)  # NumPy makes up a dtype's name at every look


def form_of(leaves: Mapping[str, Leaf]) -> frozenset[tuple[str, tuple[int, ...], str]]:
    """Leaves' names, shapes and dtypes; a quantised leaf has the dtype that it was made of."""
    return frozenset((name, tuple(leaf.shape), _dtype_name(leaf.dtype)) for name, leaf in leaves.items())


def read_reply(message: Message, server_round: int, weighted_by_key: str, has_arrays: bool) -> Reply:
    """A message as a reply of the round.

    Raises:
        UnusableReplyError: it is of another round, carries not just one record of each kind, no weight that is a
            finite number of 0 or more, or arrays whose bytes are not what they claim to be. A reply of weight 0 has no
            leaves: nobody looks at its arrays.
    """
    group = message.metadata.group_id
    if isinstance(group, str) and group.isdecimal() and int(group) != server_round:
        raise UnusableReplyError(f"is of round {group}, not of round {server_round}")
    content = message.content
    metrics: MetricRecord = _only(content.metric_records, "MetricRecord")
    weight = _read_weight(metrics, weighted_by_key)
    leaves: dict[str, Leaf] = {}
    if has_arrays and weight > 0:
        arrays: ArrayRecord = _only(content.array_records, "ArrayRecord")
        try:
            leaves = read_record(arrays)
        except (TypeError, ValueError) as error:
            raise UnusableReplyError(str(error)) from None
        if not leaves:
            raise UnusableReplyError("has an ArrayRecord without arrays")
    return Reply(message.metadata.src_node_id, content, metrics, weight, leaves)


def _only(records: Any, kind: str) -> Any:
    if len(records) != 1:
        raise UnusableReplyError(f"expected exactly one {kind}, got {len(records)}")
    return next(iter(records.values()))


def _read_weight(metrics: MetricRecord, key: str) -> float:
    if key not in metrics:
        raise UnusableReplyError(f"its MetricRecord has no {key!r}, by which replies are weighted")
    value = metrics[key]
    if isinstance(value, (list, bool)) or not 0 <= value < math.inf:
        raise UnusableReplyError(f"expected a finite {key!r} of 0 or more, got {value!r}")
    return _as_float(value, key)


def _as_float(value: float, key: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise UnusableReplyError(f"expected a {key!r} in the range of floats, got {value!r}") from None


def agreed_form(forms: Collection[frozenset[Any]], model: frozenset[Any]) -> frozenset[Any] | None:
    """The form that a mean's replies must have; None if none has the model's leaves.

    It is the commonest with the model's names, shapes and dtypes, else with its names and shapes; without a model the
    commonest of all.
    """
    counts = Counter(forms)
    fitting = [form for form in counts if leaves_of(form) == model]
    fitting = fitting or [form for form in counts if _shapes(leaves_of(form)) == _shapes(model)]
    return max(fitting if model else counts, key=lambda form: counts[form], default=None)


def leaves_of(form: frozenset[Any]) -> frozenset[Any]:
    """The leaves among the items of a reply's form."""
    return frozenset(item for item in form if isinstance(item, tuple) and len(item) == 3)


def _shapes(leaves: frozenset[Any]) -> set[Any]:
    return {leaf[:2] for leaf in leaves}


def differences(form: frozenset[Any], agreed: frozenset[Any]) -> str:
    """What a reply lacks and what it has too much, for the report."""
    missing, unexpected = (sorted(map(_describe, part)) for part in (agreed - form, form - agreed))
    parts = [
        f"{what} {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for what, names in (("lacks", missing), ("has", unexpected))
        if names
    ]
    return f"differs from what was expected: {' and '.join(parts)}"


def _describe(item: Any) -> str:
    if isinstance(item, str):
        return f"record {item!r}"
    if len(item) == 2:
        return f"metric {item[0]!r}" + (f" of length {item[1]}" if item[1] >= 0 else "")
    return f"leaf {item[0]!r} {item[2]} {item[1]}"
