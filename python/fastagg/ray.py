"""Thousands of clients averaged by the workers of a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fastagg._native.backend import set_num_threads
from fastagg.trees import Chunk, Load, PartialSum, Plan, fold, merge

try:
    import ray
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("fastagg.ray needs Ray: pip install 'fastagg[ray]'") from error

__all__ = ["average"]


def average(
    sources: Iterable[Any],
    weights: Any = None,
    *,
    load: Load | None = None,
    fan_in: int = 32,
    nan_policy: str = "raise",
    integer_policy: str | None = None,
    num_cpus: float = 1,
) -> Any:
    """`fastagg.trees.average` on the workers of a Ray cluster, which is started on this machine if there is none.

    ``mean[i] = sum_k(weights[k] * x_k[i]) / sum_k(weights[k])``

    A task adds up a chunk of `fan_in` sources, others merge partial sums; this process receives the total alone. The
    tree is that of `fastagg.trees.average`, and so are the bits, whatever the number of workers and the order in which
    they end. A worker that dies is replaced and its chunk read again: with the same bits.

    A worker holds one client and one accumulator while it adds, two accumulators while it merges. Ray's object stores
    hold about ``4 * workers + log2(chunks)`` partial sums at most, of 6 bytes an fp32 element each.

    Args:
        sources: paths that every worker can read, or anything that `load` takes: numbers of clients, references to
            Ray's objects with ``load=ray.get``.
        weights: as in `fastagg.trees.average`.
        load: runs on the workers.
        fan_in: sources in a chunk. More of them: fewer partial sums are sent, among fewer workers.
        nan_policy: as in `fastagg.trees.average`; the warnings of "drop" come in this process.
        integer_policy: as in `fedavg`.
        num_cpus: processors of a task, and its threads.

    Returns:
        The mean, in the structure, libraries and dtypes of the first source.

    Raises:
        TypeError, ValueError, OSError: as in `fastagg.trees.average`: what a worker raises comes out here.
        ray.exceptions.RayError: Ray itself failed, such as a worker that died again and again.
    """
    if not num_cpus > 0:
        raise ValueError(f"num_cpus: expected a number above 0, got {num_cpus!r}")
    plan = Plan(sources, weights, load, fan_in, nan_policy, integer_policy)
    tasks = _Tasks(num_cpus)
    total = ray.get(fold(tasks.partial_sums(plan.chunks), tasks.merge).sums)
    if isinstance(total, Exception):
        raise total
    return plan.result(total)


class _Node(NamedTuple):
    """References to what a task will return.

    Errors are results as well: Ray would wrap them, and log each one that nobody asks for.
    """

    sums: Any  # a PartialSum, or the error
    error: Any  # or None: small, so it can be looked at here


class _Tasks:
    """Starts tasks, only so many ahead of the oldest that has not ended."""

    def __init__(self, num_cpus: float) -> None:
        if not ray.is_initialized():
            ray.init()
        processors: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._ahead = 2 * max(1, int(processors.get("CPU", 1) / num_cpus))
        self._num_cpus, self._threads = num_cpus, max(1, int(num_cpus))
        self._under_way: deque[_Node] = deque()

    def partial_sums(self, chunks: list[Chunk]) -> Iterator[_Node]:
        """The leaves of the tree.

        Raises:
            Exception: the error of the oldest task, if that has failed.
        """
        add_up = _add_up.options(num_cpus=self._num_cpus)
        for chunk in chunks:
            if len(self._under_way) == self._ahead:
                error = ray.get(self._under_way.popleft().error)
                if error is not None:
                    raise error
            started: Any = add_up.remote(chunk, self._threads)
            self._under_way.append(_Node(*started))
            yield self._under_way[-1]

    def merge(self, left: _Node, right: _Node) -> _Node:
        """Merges two nodes; the newest leaf counts as under way until that is done."""
        merge_two = _merge.options(num_cpus=self._num_cpus)
        started: Any = merge_two.remote(left.sums, right.sums, self._threads)
        self._under_way[-1] = _Node(*started)
        return self._under_way[-1]


@ray.remote(num_returns=2)
def _add_up(chunk: Chunk, threads: int) -> tuple[PartialSum | Exception, Exception | None]:
    set_num_threads(threads)
    try:
        return chunk.partial_sum(), None
    except Exception as error:
        return error, error


@ray.remote(num_returns=2)
def _merge(
    left: PartialSum | Exception, right: PartialSum | Exception, threads: int
) -> tuple[PartialSum | Exception, Exception | None]:
    set_num_threads(threads)
    try:
        return _merged(left, right), None
    except Exception as error:
        return error, error


def _merged(left: PartialSum | Exception, right: PartialSum | Exception) -> PartialSum:
    """The sums of both; raises the error that either is."""
    if isinstance(left, Exception):
        raise left
    if isinstance(right, Exception):
        raise right
    return merge(left, right)
