"""Which native module does the work: `_core` for the CPU, `_cuda` for CUDA devices."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

import numpy as np

from fastagg._arguments import as_integer
from fastagg._extras import CUDA_COMMAND
from fastagg._native import core
from fastagg._native.operands import (
    CastOperands,
    Leaves,
    MeasurementOperands,
    ModelLeafOperands,
    OptimizerOperands,
    ReductionOperands,
    WindowOperands,
)

_MOST_THREADS = 2**31 - 1  # what the native code counts with


class Backend(Protocol):
    """The operations of `_cuda`, queued on a stream.

    `nonfinite` is the address of an int32 on the device that is raised if a result is not finite, `squares` that of
    MAXIMUM_BLOCKS float64 to which sums of squares are added; 0 for neither.
    """

    MAXIMUM_BLOCKS: int
    MAXIMUM_RANKS: int
    PEER_CONTROL_BYTES: int
    DIFFERS: int
    PeerMemory: Any

    def weighted_sum(self, leaves: Leaves, stream: int, check: bool) -> list[int]:
        """Does the leaves; if asked to check, waits and returns the indices of those with non-finite sums."""
        ...

    def cast(self, operands: CastOperands, stream: int, nonfinite: int) -> None:
        """Casts."""
        ...

    def reduce(self, operands: ReductionOperands, stream: int, nonfinite: int, squares: int) -> None:
        """Adds up, divides and encodes."""
        ...

    def reduce_float64(
        self,
        sources: list[int],
        divisor: float,
        factor: float,
        out: int,
        count: int,
        stream: int,
        nonfinite: int,
        squares: int,
    ) -> None:
        """Adds up float64 arrays: sum / divisor * factor."""
        ...

    def server_step(self, optimizer: OptimizerOperands, leaves: list[ModelLeafOperands], stream: int) -> None:
        """A server optimiser's step of the leaves, their moments in place."""
        ...

    def sorted_mean(self, rule: WindowOperands, leaves: Leaves, stream: int) -> list[int]:
        """Does the leaves, waits, and returns the indices of those with non-finite values."""
        ...

    def squared_distances(self, leaves: Leaves, clients: int, distances: int, stream: int) -> bool:
        """Waits, and writes the matrix to the host's memory; returns whether all values are finite."""
        ...

    def all_reduce(
        self,
        exchange: tuple[Any, ...],
        peers: tuple[Any, ...],
        description: int,
        stream: int,
        nonfinite: int,
        squares: int,
    ) -> None:
        """Reduces over ranks whose devices reach each other's memory."""
        ...

    def peer_blocks(self, device: int) -> int:
        """Blocks of threads of an all-reduce on a device."""
        ...


_in_the_place_of_the_cpu: Backend | None = None
_cuda: Backend | None = None


def backend_for(device: str) -> Backend | None:
    """The backend of a device such as "cuda:0"; None for the CPU, whose operations `_core` does at once.

    Raises:
        RuntimeError: this build has no CUDA backend.
    """
    return _in_the_place_of_the_cpu if device == "cpu" else _load_cuda()


def weighted_sum(leaves: Leaves, device: str, stream: int, check: bool) -> list[int]:
    """Does the leaves of a device; returns the indices of those with non-finite sums, if asked to check."""
    backend = backend_for(device)
    if backend is not None:
        return backend.weighted_sum(leaves, stream, check)
    flagged = core.weighted_sum(leaves)
    return flagged if check else []


def server_step(optimizer: OptimizerOperands, leaves: list[ModelLeafOperands], device: str, stream: int) -> None:
    """Steps the leaves of a device towards the clients' mean, their moments in place."""
    backend = backend_for(device)
    if backend is not None:
        backend.server_step(optimizer, leaves, stream)
    else:
        core.server_step(optimizer, leaves)


def sorted_mean(rule: WindowOperands, leaves: Leaves, device: str, stream: int) -> list[int]:
    """Writes the leaves' means of sorted values; returns the indices of those with non-finite values."""
    backend = backend_for(device)
    return core.sorted_mean(rule, leaves) if backend is None else backend.sorted_mean(rule, leaves, stream)


def squared_distances(leaves: Leaves, clients: int, distances: np.ndarray, device: str, stream: int) -> bool:
    """Writes all pairs' squared distances into a float64 matrix; returns whether all values are finite."""
    backend, address = backend_for(device), core.numpy_address(distances)
    if backend is None:
        return core.squared_distances(leaves, clients, address)
    return backend.squared_distances(leaves, clients, address, stream)


def statistics(leaves: Leaves, measured: list[MeasurementOperands]) -> tuple[list[int], np.ndarray]:
    """`weighted_sum` on the CPU, and float64 moments (leaves, clients, numbers) of the sources that are measured."""
    return core.statistics(leaves, measured)


def _load_cuda() -> Backend:
    global _cuda
    if _cuda is None:
        try:
            _cuda = cast(Backend, importlib.import_module("fastagg._cuda"))
        except ImportError as error:
            raise RuntimeError(
                f"this build of fastagg has no CUDA backend; with nvcc on the PATH, build it by: {CUDA_COMMAND}"
            ) from error
    return _cuda


def override_cpu(backend: Backend | None) -> None:
    """Lets a device's module do the CPU's work: the tests run the CUDA kernels on the CPU through it."""
    global _in_the_place_of_the_cpu
    _in_the_place_of_the_cpu = backend


def set_num_threads(count: int) -> None:
    """Sets the number of threads that CPU operations use.

    Args:
        count: 1 or more; 0 restores the default (OMP_NUM_THREADS if set, else the processors available).

    Raises:
        TypeError: count is no integer.
        ValueError: count is negative, or beyond any number of threads.
    """
    count = as_integer(count, "count")
    if not 0 <= count <= _MOST_THREADS:
        raise ValueError(f"count: expected an integer from 0 to {_MOST_THREADS}, got {count}")
    core.set_num_threads(count)


def get_num_threads() -> int:
    """The number of threads that CPU operations use."""
    return core.get_num_threads()
