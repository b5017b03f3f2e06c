"""A round's replies: which of them can be averaged, and why the others cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fastagg._native.codes import name_of
from fastagg._quoting import printable, quoted
from fastagg.flower.arrays import Leaf, read_record

# Those of `Accumulator`: beyond them a sum of weights, or of weighted metrics, could leave the range of floats.
_LARGEST_WEIGHT, _SMALLEST_WEIGHT = 2.0**300, 2.0**-300

_NO_LIST, _ANY_LENGTH = -1, -2  # in the place of a metric's length


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

        And which metrics are lists; with `metric_lengths`, also how long.
        """
        records = {*self.content.metric_records, *(self.content.array_records if self.leaves else ())}
        metrics = {
            (name, (len(value) if metric_lengths else _ANY_LENGTH) if isinstance(value, list) else _NO_LIST)
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
            finite number of 0 or more, metrics that are no numbers, or arrays whose bytes are not what they claim to
            be. A reply of weight 0 has no leaves: nobody looks at its arrays.
    """
    try:
        return _read(message, server_round, weighted_by_key, has_arrays)
    except UnusableReplyError:
        raise
    except Exception as error:  # nothing that a node sends may end the round of all
        raise UnusableReplyError(f"cannot be read: {printable(f'{type(error).__name__}: {error}')}") from None


def _read(message: Message, server_round: int, weighted_by_key: str, has_arrays: bool) -> Reply:
    group = message.metadata.group_id
    if isinstance(group, str) and group.isdecimal() and group != str(server_round):
        raise UnusableReplyError(f"is of round {printable(group)}, not of round {server_round}")
    content = message.content
    metrics: MetricRecord = _only(content.metric_records, "MetricRecord")
    weight = _read_weight(metrics, weighted_by_key)
    _check_metrics(metrics)
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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UnusableReplyError(f"expected a finite {key!r} of 0 or more, got {quoted(value)}")
    if value and not _SMALLEST_WEIGHT <= value <= _LARGEST_WEIGHT:
        raise UnusableReplyError(f"its weight: expected 0, or 2**-300 to 2**300, got {quoted(value)} as {key!r}")
    return float(value)


def _check_metrics(metrics: MetricRecord) -> None:
    """Raises UnusableReplyError unless all are numbers, or lists of numbers, in the range of floats."""
    for name, value in metrics.items():
        if not all(_is_float(one) for one in (value if isinstance(value, list) else [value])):
            raise UnusableReplyError(f"expected its metric {quoted(name)} in the range of floats, got {quoted(value)}")


def _is_float(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 1023)


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
        f"{what} {printable(', '.join(names[:5]))}{', …' if len(names) > 5 else ''}"
        for what, names in (("lacks", missing), ("has", unexpected))
        if names
    ]
    return f"differs from what was expected: {' and '.join(parts)}"


def _describe(item: Any) -> str:
    if isinstance(item, str):
        return f"record {quoted(item)}"
    name = quoted(item[0])
    if len(item) == 2:
        return f"metric {name}" + ({_NO_LIST: "", _ANY_LENGTH: ", a list"}.get(item[1], f" of length {item[1]}"))
    return f"leaf {name} {item[2]} {quoted(item[1])}"
