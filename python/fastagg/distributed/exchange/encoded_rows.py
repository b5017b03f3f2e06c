"""The arithmetic of one exchange on rows of encoded bytes, as they come from other ranks and go to them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from fastagg._native import core
from fastagg._native.codes import ELEMENT_BYTES, Code, encoded_bytes
from fastagg._native.operands import SourceOperands
from fastagg.distributed.exchange.arithmetic import Arithmetic
from fastagg.distributed.exchange.exchange import NO_KEY, Exchange

_NO_FEEDBACK = (0, 0.0, 0, 0.0, False)


class EncodedRows:
    """Encodes, adds up and decodes the elements [begin, end) of an exchange's tensor.

    Attributes:
        arithmetic: by which it does so. It finds whether the result is finite, as far as it has been written, and the
            sum of the squares of what was reduced here, if that is wanted.
        sent_bytes: what was handed to others.
    """

    def __init__(self, exchange: Exchange, rank: int, world: int, arithmetic: Arithmetic) -> None:
        self._exchange, self._wide = exchange, exchange.encoding.wire == Code.FLOAT64
        if exchange.feedback is not None:
            exchange.feedback.check(exchange.tensor)
        self.arithmetic = arithmetic
        self._share = float(world if exchange.mean else 1)
        self._factor = exchange.encoded_factor(world)
        self._own_slice = core.slice_of(exchange.tensor.numel(), rank, world)
        self._loses_in_the_tensor = exchange.feedback is not None and exchange.code in (Code.FLOAT16, Code.BFLOAT16)
        self.sent_bytes = 0

    def row_bytes(self, begin: int, end: int) -> int:
        """The size of a row."""
        return self._exchange.encoding.row_bytes(end - begin)

    def wire_bytes(self, begin: int, end: int) -> int:
        """The same without what aligns it."""
        return self._exchange.encoding.wire_bytes(end - begin)

    def count_sent(self, size: int) -> None:
        """Notes bytes on the wire that were handed to others."""
        self.sent_bytes += size

    def encode(self, row: torch.Tensor, begin: int, end: int) -> None:
        """This rank's values, with what was left of the last ones."""
        exchange = self._exchange
        values = exchange.tensor[begin:end]
        if self._wide:
            row[: 8 * (end - begin)].view(torch.float64).copy_(values)
            return
        feedback = _NO_FEEDBACK
        if exchange.feedback:
            feedback = (*exchange.feedback.addresses(begin), 1 / self._factor, False)
        source = (values.data_ptr(), 0, exchange.code, 0)
        result = self._encoded(row, begin, end, exchange.encoding.key)
        self._reduce([source], 1 / self._factor, feedback, result, begin)

    def encode_mean(self, rows: Sequence[torch.Tensor], row: torch.Tensor, begin: int, end: int) -> None:
        """The mean (or sum) of what all ranks have encoded, for all of them."""
        exchange = self._exchange
        if self._wide:
            out = row[: 8 * (end - begin)]  # the factor goes into the one rounding
            self._reduce_float64(rows, self._share, exchange.factor, out, norm=exchange.norm)
            return
        error = exchange.feedback.error[begin:].data_ptr() if exchange.feedback else 0
        key = (*exchange.encoding.key[:3], core.MEANS_RANK)
        # What is lost here is this rank's alone to feed back: as its share of the next sum.
        feedback = (0, 0.0, error, self._share, True)
        result = self._encoded(row, begin, end, key)
        sources = self._sources(rows, end - begin)
        self._reduce(sources, self._share * self._factor, feedback, result, begin, norm=exchange.norm)

    def write_mean(self, rows: Sequence[torch.Tensor], begin: int, end: int) -> None:
        """The mean (or sum) of what all ranks have encoded, into the tensor."""
        exchange = self._exchange
        if self._wide:
            out = exchange.tensor[begin:end]
            self._reduce_float64(rows, self._share, exchange.factor, out, norm=exchange.norm, check=True)
            return
        for first, last in self._split_at_own_slice(begin, end):
            out = exchange.tensor[first:last]
            sources = [_source_from(exchange.encoding.source(row, end - begin), first - begin) for row in rows]
            result = (sources[0], exchange.code, 0, out.data_ptr(), 0, last - first, False, NO_KEY, 1.0)
            divisor, feedback = self._share * self._factor / exchange.factor, self._feedback_of_result(first, last)
            self._reduce(sources, divisor, feedback, result, first, norm=exchange.norm, check=True)

    def decode(self, row: torch.Tensor, begin: int, end: int) -> None:
        """What a rank has encoded for all, into the tensor."""
        exchange = self._exchange
        out = exchange.tensor[begin:end]
        if self._wide:
            self._reduce_float64([row], 1.0, 1.0, out, check=True)
            return
        source = exchange.encoding.source(row, end - begin)
        count = end - begin
        self.arithmetic.cast((source, exchange.code, 0, out.data_ptr(), 0, count, False, NO_KEY, exchange.factor))

    def _split_at_own_slice(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The range in parts that are this rank's to feed back, or not."""
        cuts = [begin, *(cut for cut in self._own_slice if begin < cut < end), end]
        return list(pairwise(cuts)) if self._loses_in_the_tensor else [(begin, end)]

    def _feedback_of_result(self, begin: int, end: int) -> tuple[int, float, int, float, bool]:
        """What rounding to a tensor's own 16 bits takes is fed back by the slice's owner: its share of the next sum."""
        exchange = self._exchange
        if exchange.feedback is None or not self._loses_in_the_tensor:
            return _NO_FEEDBACK
        if not self._own_slice[0] <= begin < end <= self._own_slice[1]:
            return _NO_FEEDBACK
        return 0, 0.0, exchange.feedback.error[begin:].data_ptr(), self._share / exchange.factor, True

    def _sources(self, rows: Sequence[torch.Tensor], count: int) -> list[tuple[int, int, int, int]]:
        return [self._exchange.encoding.source(row, count) for row in rows]

    def _encoded(self, row: torch.Tensor, begin: int, end: int, key: Any) -> tuple[Any, ...]:
        """A row as the result of `core.reduce`."""
        encoding = self._exchange.encoding
        codes, scales, wire, shift = encoding.source(row, end - begin)
        values = self._exchange.code if self._exchange.ceiling is None else self._exchange.ceiling
        return (0, 0, values, 0), wire, shift, codes, scales, end - begin, encoding.stochastic, key, 1.0

    def _reduce(
        self,
        sources: Any,
        divisor: float,
        feedback: Any,
        result: Any,
        begin: int,
        *,
        norm: bool = False,
        check: bool = False,
    ) -> None:
        first, stretches = begin + self._exchange.first, self._exchange.stretches
        operands = (sources, divisor, *feedback, result, first, stretches)
        self.arithmetic.reduce(operands, norm=norm, check=check)

    def _reduce_float64(
        self,
        rows: Sequence[torch.Tensor],
        divisor: float,
        factor: float,
        out: torch.Tensor,
        *,
        norm: bool = False,
        check: bool = False,
    ) -> None:
        count = out.numel() * out.element_size() // ELEMENT_BYTES[Code.FLOAT64]
        addresses = [row.data_ptr() for row in rows]
        self.arithmetic.reduce_float64(addresses, divisor, factor, out.data_ptr(), count, norm=norm, check=check)


def _source_from(source: SourceOperands, skipped: int) -> SourceOperands:
    """A row's elements from a later one on, at a multiple of a pass."""
    codes, scales, wire, shift = source
    return codes + encoded_bytes(Code(wire), skipped), scales + 4 * (skipped >> shift), wire, shift
