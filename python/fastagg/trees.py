"""Thousands of clients in a fixed tree of partial sums: in one process here, on many machines in `fastagg.ray`."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastagg._errors import DroppedUpdateWarning
from fastagg._quoting import quoted
from fastagg._updates.policies import check_policies
from fastagg._updates.weights import as_weights
from fastagg.averaging.accumulator import Accumulator

__all__ = ["average"]

Node = TypeVar("Node")
Load = Callable[[Any], Any]


def average(
    sources: Iterable[Any],
    weights: Any = None,
    *,
    load: Load | None = None,
    fan_in: int = 32,
    nan_policy: str = "raise",
    integer_policy: str | None = None,
) -> Any:
    """The weighted mean of many clients, of whom only one is in memory at a time.

    ``mean[i] = sum_k(weights[k] * x_k[i]) / sum_k(weights[k])``

    Chunk c adds up the sources ``c * fan_in`` to ``(c + 1) * fan_in - 1`` in order; chunks are merged in pairs, pairs
    in fours and so on, what is left over last. The tree follows from the number of sources and `fan_in` alone, so the
    result has the same bits as that of `fastagg.ray.average` with the same `fan_in`, on any number of workers. With
    another `fan_in`, or in one `Accumulator`, the sums are rounded in another order: the results then differ
    seldom, by the last bit, and all are within the error that `Accumulator` states.

    In memory are one client and at most ``log2(chunks) + 2`` accumulators.

    Args:
        sources: paths of checkpoints, which `fastagg.files.open_checkpoint` reads; or anything that `load` takes.
        weights: a finite number of 0 or more for each source, such as numbers of examples; None for equal weights.
        load: turns a source into an update: an array, or a sequence or a mapping of arrays or `Quantized`.
        fan_in: sources in a chunk.
        nan_policy: for a client with a NaN or an infinity: "raise", "drop" (leave it out and warn) or "propagate".
        integer_policy: "max", "first", "round" or None, as in `fedavg`.

    Returns:
        The mean, in the structure, libraries and dtypes of the first source.

    Raises:
        TypeError, ValueError: wrong arguments; or a source that differs from the others, is damaged or, under "raise",
            holds a NaN or an infinity. The message names it.
        OSError: a file cannot be read. What else reading raises keeps its type as well, and names the source.
    """
    plan = Plan(sources, weights, load, fan_in, nan_policy, integer_policy)
    return plan.result(fold((chunk.partial_sum() for chunk in plan.chunks), merge))


class PartialSum(NamedTuple):
    """The sums of sources that follow each other."""

    accumulator: Accumulator
    first: str
    last: str

    @property
    def name(self) -> str:
        """The sources, as errors call them."""
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


class Chunk(NamedTuple):
    """A leaf of the tree: sources that one accumulator adds up."""

    names: list[str]
    sources: list[Any]
    weights: list[float]
    load: Load | None
    nan_policy: str
    integer_policy: str | None

    def partial_sum(self) -> PartialSum:
        """Reads the sources one after another, and adds them up."""
        accumulator = Accumulator(nan_policy=self.nan_policy, integer_policy=self.integer_policy)
        reference = ""  # the source that the others are compared with
        for number, (name, source, weight) in enumerate(zip(self.names, self.sources, self.weights, strict=True)):
            with warnings.catch_warnings(), self._opened(name, source) as update:
                warnings.simplefilter("ignore", DroppedUpdateWarning)  # the root warns, and knows the source
                try:
                    accumulator.add(update, weight)
                except Exception as error:
                    raise _reworded(error, _of_source(str(error), name, number, reference)) from error
            del update  # before the next one is loaded
            if not reference and accumulator.count:
                reference = name
        return PartialSum(accumulator, self.names[0], self.names[-1])

    def _opened(self, name: str, source: Any) -> AbstractContextManager[Any]:
        """The source's update, for a `with` block; errors name the source."""
        try:
            if self.load is not None:
                return nullcontext(self.load(source))
            from fastagg.files import open_checkpoint

            return open_checkpoint(source)
        except Exception as error:
            raise _reworded(error, _prefixed(str(error), name)) from error


class Plan:
    """What is to be averaged, checked and cut into chunks; and what becomes of their total."""

    def __init__(
        self,
        sources: Iterable[Any],
        weights: Any,
        load: Load | None,
        fan_in: int,
        nan_policy: str,
        integer_policy: str | None,
    ) -> None:
        check_policies(nan_policy, integer_policy)
        if not isinstance(fan_in, (int, np.integer)) or fan_in < 1:
            raise ValueError(f"fan_in: expected an integer of 1 or more, got {fan_in!r}")
        clients = _as_list(sources, load)
        numbers = as_weights(weights, len(clients))
        self.names = [_name_of(client, number) for number, client in enumerate(clients)]
        parts = [slice(begin, begin + fan_in) for begin in range(0, len(clients), fan_in)]
        self.chunks = [
            Chunk(self.names[part], clients[part], numbers[part], load, nan_policy, integer_policy) for part in parts
        ]

    def result(self, total: PartialSum) -> Any:
        """The mean; warns of every source that was left out."""
        for client, leaf, reason in total.accumulator.dropped:
            where = "the array" if leaf is None else f"leaf {quoted(leaf)}"
            warnings.warn(f"dropped: {self.names[client]}, {where}: {reason}", DroppedUpdateWarning, stacklevel=3)
        return total.accumulator.result()


def fold(leaves: Iterable[Node], merge: Callable[[Node, Node], Node]) -> Node:
    """Merges leaves to one, left with right: in pairs, pairs in fours and so on, what is left over last.

    Leaves are taken one by one, and as soon as two nodes of a size are there they are merged: at most
    ``log2(leaves) + 2`` exist at a time.
    """
    waiting: list[Node] = []
    for number, leaf in enumerate(leaves, start=1):
        waiting.append(leaf)
        while number % 2 == 0:  # as often as 2 divides the number of leaves
            right = waiting.pop()
            waiting.append(merge(waiting.pop(), right))
            number //= 2
    while len(waiting) > 1:
        right = waiting.pop()
        waiting.append(merge(waiting.pop(), right))
    return waiting[0]


def merge(left: PartialSum, right: PartialSum) -> PartialSum:
    """Adds the sums of the right to those of the left.

    Raises:
        ValueError: their structures, shapes or dtypes differ; the message names both.
    """
    try:
        left.accumulator.merge(right.accumulator)
    except ValueError as error:
        message = str(error).replace("other", right.name, 1)
        raise ValueError(f"{message}, compared with {left.name}") from None
    return PartialSum(left.accumulator, left.first, right.last)


def _as_list(given: Any, load: Load | None) -> list[Any]:
    """The sources.

    Raises:
        TypeError: there is a single path, or something that is no path and no `load` to read it.
        ValueError: there are none.
    """
    if isinstance(given, (str, bytes, os.PathLike)):
        raise TypeError(f"sources: expected a sequence of sources, got the single path {os.fspath(given)!r}")
    sources = list(given)
    if not sources:
        raise ValueError("sources: expected at least one, got none")
    for number, source in enumerate(sources):
        if load is None and not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"source {number}: expected a path, or a load= that reads it, got {type(source).__name__}")
    return sources


def _name_of(source: Any, number: int) -> str:
    """A source as errors call it."""
    return str(source) if isinstance(source, (str, os.PathLike)) else f"source {number}"


def _of_source(message: str, name: str, number: int, reference: str) -> str:
    """What the accumulator says of a client, with the source's name in the place of the client's number."""
    message = re.sub(rf"\bclient {number}\b", lambda _: name, message, count=1)
    if "the first client's" in message:
        message = message.replace("the first client's", f"{reference}'s")
    elif reference and "leaves" in message:
        message = f"{message}, compared with {reference}"
    return _prefixed(message, name)


def _prefixed(message: str, name: str) -> str:
    """A message that names the source."""
    return message if re.search(rf"{re.escape(name)}(?!\w)", message) else f"{name}: {message}"


def _reworded(error: Exception, message: str) -> Exception:
    """The error with another message; of the same type where that can be."""
    if message == str(error):
        return error
    try:
        return type(error)(message)
    except Exception:  # a type that is not made of a message alone
        return ValueError(f"{message} ({type(error).__name__})")
