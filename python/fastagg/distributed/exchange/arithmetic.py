"""The operations of an all-reduce on the CPU or a device, and what they find on the way."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from fastagg._native import core
from fastagg._native.backend import Backend
from fastagg._native.operands import CastOperands, ReductionOperands


class Arithmetic(Protocol):
    """Operations that add to what was found before."""

    @property
    def finite(self) -> Any:
        """Whether all results that were checked are finite: a bool, or a tensor of one on the device."""

    @property
    def squares(self) -> Any:
        """The sum of the squares of the results that were wanted: a float, or a tensor of float64."""

    def cast(self, operands: CastOperands) -> None:
        """Casts, and checks the result."""

    def reduce(self, operands: ReductionOperands, *, norm: bool, check: bool) -> None:
        """Adds up, divides and encodes."""

    def reduce_float64(
        self, sources: list[int], divisor: float, factor: float, out: int, count: int, *, norm: bool, check: bool
    ) -> None:
        """The same for float64 arrays, which travel as they are: sum / divisor * factor."""


class HostArithmetic:
    """`_core`'s operations: what they find is known when they return."""

    def __init__(self) -> None:
        self.finite, self.squares = True, 0.0

    def cast(self, operands: CastOperands) -> None:
        """See `Arithmetic`."""
        self.finite &= core.cast(operands)

    def reduce(self, operands: ReductionOperands, *, norm: bool, check: bool) -> None:
        """See `Arithmetic`."""
        self._note(core.reduce(operands, norm), norm, check)

    def reduce_float64(
        self, sources: list[int], divisor: float, factor: float, out: int, count: int, *, norm: bool, check: bool
    ) -> None:
        """See `Arithmetic`."""
        self._note(core.reduce_float64(sources, divisor, factor, out, count), norm, check)

    def _note(self, found: tuple[bool, float], norm: bool, check: bool) -> None:
        self.finite &= found[0] or not check
        self.squares += found[1] if norm else 0.0


def current_stream(device: torch.device) -> int:
    """The address of the device's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


class DeviceArithmetic:
    """A device's operations, queued on a stream: what they find stays on the device."""

    def __init__(self, backend: Backend, device: torch.device, stream: int) -> None:
        self._backend, self._stream = backend, stream
        # The flag behind the sums of squares: one allocation, cleared by one kernel.
        self._found = torch.zeros(backend.MAXIMUM_BLOCKS + 1, dtype=torch.float64, device=device)
        self.squares_at = self._found.data_ptr()
        self.nonfinite_at = self._found[-1:].data_ptr()

    @property
    def finite(self) -> torch.Tensor:
        """Whether all results so far are."""
        return self._found[-1:].view(torch.int32)[0] == 0

    @property
    def squares(self) -> torch.Tensor:
        """The sum of squares so far."""
        return self._found[:-1].sum()

    def cast(self, operands: CastOperands) -> None:
        """See `Arithmetic`."""
        self._backend.cast(operands, self._stream, self.nonfinite_at)

    def reduce(self, operands: ReductionOperands, *, norm: bool, check: bool) -> None:
        """See `Arithmetic`."""
        self._backend.reduce(operands, self._stream, *self._places(norm, check))

    def reduce_float64(
        self, sources: list[int], divisor: float, factor: float, out: int, count: int, *, norm: bool, check: bool
    ) -> None:
        """See `Arithmetic`."""
        places = self._places(norm, check)
        self._backend.reduce_float64(sources, divisor, factor, out, count, self._stream, *places)

    def _places(self, norm: bool, check: bool) -> tuple[int, int]:
        return self.nonfinite_at if check else 0, self.squares_at if norm else 0
