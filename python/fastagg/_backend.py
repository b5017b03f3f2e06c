"""Which native module does the work: `_core` for the CPU, `_cuda` for CUDA devices."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Sequence
from typing import Any, Protocol, cast

from fastagg import _core
from fastagg._extras import CUDA_COMMAND

# csrc/bindings/operands.h reads these.
# (sources, their code or None, weights, divisor, count, fold, out, companion, code, dither)
LeafOperands = tuple[list[Any], int | None, list[float], float, int, int, int, int, int, int]
# (data, companion, code, block_shift)
SourceOperands = tuple[int, int, int, int]
# (seed, step, tensor, rank)
RandomKey = tuple[int, int, int, int]
# (source, code, block_shift, out, scales, count, stochastic, key, factor)
CastOperands = tuple[SourceOperands, int, int, int, int, int, bool, RandomKey, float]

# (sources, divisor, residual, its factor, error, its factor, raise, result, begin, stretches)
ReductionOperands = tuple[
    list[SourceOperands], float, int, float, int, float, bool, CastOperands, int, Sequence[tuple[int, int]]
]

MEAN, MAXIMUM = 0, 1


class Backend(Protocol):
    """The operations of one native module."""

    def weighted_sum(self, leaves: list[LeafOperands], stream: int, check: bool) -> list[int]:
        """Does the leaves; returns the indices of those with non-finite sums, if asked to check."""
        ...

    def cast(self, operands: CastOperands, stream: int, check: bool) -> bool:
        """Casts; returns whether nothing became infinite or NaN, if asked to check."""
        ...

    def reduce(self, operands: ReductionOperands, stream: int, norm: bool, check: bool) -> tuple[bool, float]:
        """Adds up, divides and encodes; returns whether the result is finite, and its sum of squares, if asked."""
        ...


class _CPU:
    """`_core`: it has no streams, and checks at no cost."""

    def weighted_sum(self, leaves: list[LeafOperands], stream: int, check: bool) -> list[int]:
        flagged = _core.weighted_sum(leaves)
        return flagged if check else []

    def cast(self, operands: CastOperands, stream: int, check: bool) -> bool:
        return _core.cast(operands)

    def reduce(self, operands: ReductionOperands, stream: int, norm: bool, check: bool) -> tuple[bool, float]:
        return _core.reduce(operands, norm)


_cpu = _CPU()
_cpu_override: Backend | None = None
_cuda: Backend | None = None


def backend_for(device: str) -> Backend:
    """The backend of a device such as "cpu" or "cuda:0".

    Raises:
        RuntimeError: this build has no CUDA backend.
    """
    if device == "cpu":
        return _cpu_override or _cpu
    return _load_cuda()


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
    """Lets another module do the CPU's work: the tests run the CUDA kernels on the CPU through it."""
    global _cpu_override
    _cpu_override = backend


def draw_seed() -> int:
    """A fresh seed for stochastic rounding."""
    return secrets.randbits(63)


def set_num_threads(count: int) -> None:
    """Sets the number of threads that CPU operations use.

    Args:
        count: 1 or more; 0 restores the default (OMP_NUM_THREADS if set, else the processors available).

    Raises:
        ValueError: count is negative.
    """
    _core.set_num_threads(count)


def get_num_threads() -> int:
    """The number of threads that CPU operations use."""
    return _core.get_num_threads()
