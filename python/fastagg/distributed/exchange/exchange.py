"""One all-reduce as the transports see it: what travels, and what comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastagg._native import core
from fastagg._native.codes import Code, encoded_bytes
from fastagg._native.operands import RandomKey, SourceOperands

NO_KEY: RandomKey = (0, 0, 0, 0)


class Encoding(NamedTuple):
    """How values travel."""

    wire: Code
    block_shift: int
    stochastic: bool
    key: RandomKey

    def wire_bytes(self, count: int) -> int:
        """Bytes of `count` elements, scales included."""
        return encoded_bytes(self.wire, count) + self._scales_bytes(count)

    def row_bytes(self, count: int) -> int:
        """Bytes of a row of `count` elements: codes, then scales, each padded to 16 bytes so that rows are aligned."""
        return _padded(encoded_bytes(self.wire, count)) + _padded(self._scales_bytes(count))

    def source(self, row: torch.Tensor, count: int) -> SourceOperands:
        """The `count` elements of a row."""
        address = row.data_ptr()
        return address, address + _padded(encoded_bytes(self.wire, count)), self.wire, self.block_shift

    def _scales_bytes(self, count: int) -> int:
        return -(-count >> self.block_shift) * 4 if self.wire >= Code.WIRE_FP8_E4M3 else 0


class Feedback(NamedTuple):
    """Error feedback: flat float32 tensors of the values' size."""

    residual: torch.Tensor | None
    """Added to the values, times `factor`; None: nothing is."""
    factor: float
    error: torch.Tensor
    """Receives what encoding took from this rank's values, and from the means that it encodes for all."""

    def check(self, values: torch.Tensor) -> None:
        """Raises ValueError unless both tensors match the values: native code sees their addresses alone."""
        count, device = values.numel(), values.device
        for name, given in (("residual", self.residual), ("error", self.error)):
            if given is None:
                continue
            if given.dtype != torch.float32 or given.shape != (count,) or given.device != device:
                got = f"shape {tuple(given.shape)} of {given.dtype} on {given.device}"
                raise ValueError(f"{name}: expected {count} elements of torch.float32 on {device}, got {got}")
            if not given.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {given.stride()}")

    def addresses(self, begin: int = 0) -> tuple[int, float, int]:
        """The residual from an element on, its factor and the error from there on, as native code reads them."""
        residual = 0 if self.residual is None else self.residual[begin:].data_ptr()
        return residual, self.factor, self.error[begin:].data_ptr()


class Exchange(NamedTuple):
    """One all-reduce of a contiguous tensor, in place."""

    tensor: torch.Tensor
    code: Code
    encoding: Encoding
    mean: bool
    factor: float = 1.0
    """Multiplies the result once it is decoded: a loss scale's inverse."""
    feedback: Feedback | None = None
    norm: bool = False
    """Whether the sum of the result's squares is wanted; on a device, whether the result is finite, too."""
    first: int = 0
    """The place of the first element in a larger tensor, which the stretches refer to."""
    stretches: Sequence[tuple[int, int]] = ()
    """(begin, place): elements from `begin` on draw the random numbers from `place` on. None: from 0 on."""
    ceiling: Code | None = None
    """The dtype in which finite values must stay finite; None: the tensor's own."""
    description: str = ""
    """What must be equal on all ranks: they compare it, and errors show it."""

    def described(self, subject: str) -> Exchange:
        """The same with a description: what is reduced, and how."""
        wire, shift, stochastic, _ = self.encoding
        text = (
            f"{subject}: {self.tensor.numel()} elements of {_name_of(self.code)}, {'mean' if self.mean else 'sum'}, "
            f"wire {_name_of(wire)}, {'stochastic' if stochastic else 'nearest'}, blocks of {1 << shift}, "
            f"factor {self.factor}{', norm' if self.norm else ''}"
        )
        if len(text) >= core.DESCRIPTION_BYTES:
            text = f"{text[: core.DESCRIPTION_BYTES - 20]} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return self._replace(description=text)

    def sent_bytes(self, rank: int, world: int) -> int:
        """Encoded bytes, scales included, that a rank hands to others."""
        count = self.tensor.numel()
        slices = [core.slice_of(count, owner, world) for owner in range(world)]
        sizes = [self.encoding.wire_bytes(end - begin) for begin, end in slices]
        if core.in_one_shot(count, world):
            return sum(sizes) * (world - 1)
        return sum(sizes) - sizes[rank] + sizes[rank] * (world - 1)

    def operands(self, world: int) -> tuple[Any, ...]:
        """As `exchange_of` in csrc/bindings/operands.h reads it."""
        wire, shift, stochastic, key = self.encoding
        if self.feedback is not None:
            self.feedback.check(self.tensor)
        return (
            *(self.tensor.data_ptr(), self.code, self.tensor.numel()),
            *(wire, shift, stochastic, key, self.mean, self.encoded_factor(world), self.factor),
            *(self.feedback.addresses() if self.feedback is not None else (0, 0.0, 0)),
            *(self.norm, self.stretches, self.description),
        )

    @property
    def factor_of_squares(self) -> float:
        """What the squares of a slice's means lack: of float64 ones, which have been multiplied, nothing."""
        return 1.0 if self.encoding.wire == Code.FLOAT64 else self.factor**2

    def encoded_factor(self, world: int) -> float:
        """The power of two that keeps a mean's terms inside float16: without it one large value would be infinite."""
        return 2.0 ** -(world - 1).bit_length() if self.mean and self.encoding.wire == Code.FLOAT16 else 1.0


class Outcome(NamedTuple):
    """What an all-reduce found and cost. On a device it is a tensor that tells, once the stream has come there."""

    finite: bool | torch.Tensor
    wire_bytes: int
    """Encoded bytes, scales included, that this rank handed to others."""
    squares: float | torch.Tensor
    """The sum of the result's squares, if wanted."""


def _name_of(code: Code) -> str:
    return code.name.lower().removeprefix("wire_")


def _padded(size: int) -> int:
    return -(-size // 16) * 16
