"""The arithmetic of one exchange on rows of encoded bytes, as they come from other ranks and go to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastagg import _core
from fastagg._codes import Code
from fastagg._exchange import NO_KEY, Exchange


class EncodedRows:
    """Encodes, adds up and decodes the elements [begin, end) of an exchange's tensor.

    Attributes:
        finite: whether the result is, as far as it has been written.
        squares: the sum of the squares of what was reduced here, if wanted.
    """

    def __init__(self, exchange: Exchange, world: int) -> None:
        self._exchange, self._wide = exchange, exchange.encoding.wire == Code.FLOAT64
        self._share = float(world if exchange.mean else 1)
        self._factor = exchange.encoded_factor(world)
        self.finite, self.squares = True, 0.0

    def bytes(self, begin: int, end: int) -> int:
        """The size of a row."""
        return self._exchange.encoding.row_bytes(end - begin)

    def encode(self, row: torch.Tensor, begin: int, end: int) -> None:
        """This rank's values, with what was left of the last ones."""
        exchange = self._exchange
        values = exchange.tensor[begin:end]
        if self._wide:
            _float64(row).copy_(values)
            return
        feedback: tuple[Any, ...] = (0, 0.0, 0, 0.0, False)
        if exchange.feedback:
            residual, factor, error = exchange.feedback
            feedback = (residual[begin:].data_ptr(), factor, error[begin:].data_ptr(), 1 / self._factor, False)
        source = (values.data_ptr(), 0, exchange.code, 0)
        self._reduce([source], 1 / self._factor, feedback, self._encoded(row, begin, end, exchange.encoding.key), begin)

    def encode_mean(self, rows: Sequence[torch.Tensor], row: torch.Tensor, begin: int, end: int) -> None:
        """The mean (or sum) of what all ranks have encoded, for all of them."""
        exchange = self._exchange
        if self._wide:
            mean = self._mean_of_float64(rows)
            _float64(row).copy_(mean)
            self.squares += float(mean.square().sum()) if exchange.norm else 0.0
            return
        error = exchange.feedback.error[begin:].data_ptr() if exchange.feedback else 0
        key = (*exchange.encoding.key[:3], _core.MEANS_RANK)
        # What is lost here is this rank's alone to feed back: as its share of the next sum.
        feedback = (0, 0.0, error, self._share, True)
        result = self._encoded(row, begin, end, key)
        _, squares = self._reduce(self._sources(rows, end - begin), self._share * self._factor, feedback, result, begin)
        self.squares += squares

    def write_mean(self, rows: Sequence[torch.Tensor], begin: int, end: int) -> None:
        """The mean (or sum) of what all ranks have encoded, into the tensor."""
        exchange = self._exchange
        out = exchange.tensor[begin:end]
        if self._wide:
            self._write_float64(self._mean_of_float64(rows), out)
            self.squares += float(out.square().sum()) if exchange.norm else 0.0
            return
        sources = self._sources(rows, end - begin)
        result = (sources[0], exchange.code, 0, out.data_ptr(), 0, end - begin, False, NO_KEY, 1.0)
        divisor = self._share * self._factor / exchange.factor
        finite, squares = self._reduce(sources, divisor, (0, 0.0, 0, 0.0, False), result, begin)
        self.finite &= finite
        self.squares += squares

    def decode(self, row: torch.Tensor, begin: int, end: int) -> None:
        """What a rank has encoded for all, into the tensor."""
        exchange = self._exchange
        out = exchange.tensor[begin:end]
        if self._wide:
            self._write_float64(_float64(row), out)
            return
        source = exchange.encoding.source(row, end - begin)
        self.finite &= _core.cast(
            (source, exchange.code, 0, out.data_ptr(), 0, end - begin, False, NO_KEY, exchange.factor)
        )

    def _sources(self, rows: Sequence[torch.Tensor], count: int) -> list[tuple[int, int, int, int]]:
        return [self._exchange.encoding.source(row, count) for row in rows]

    def _encoded(self, row: torch.Tensor, begin: int, end: int, key: Any) -> tuple[Any, ...]:
        """A row as the result of `_core.reduce`."""
        encoding = self._exchange.encoding
        source = encoding.source(row, end - begin)
        codes, scales, wire, shift = source
        return source, wire, shift, codes, scales, end - begin, encoding.stochastic, key, 1.0

    def _reduce(self, sources: Any, divisor: float, feedback: Any, result: Any, begin: int) -> tuple[bool, float]:
        first, stretches = begin + self._exchange.first, self._exchange.stretches
        return _core.reduce((sources, divisor, *feedback, result, first, stretches), self._exchange.norm)

    def _mean_of_float64(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        mean = torch.zeros_like(_float64(rows[0]))
        for row in rows:
            mean += _float64(row)
        return mean.div_(self._share)

    def _write_float64(self, values: torch.Tensor, out: torch.Tensor) -> None:
        torch.mul(values, self._exchange.factor, out=out)
        self.finite &= bool(out.isfinite().all())


def _float64(row: torch.Tensor) -> torch.Tensor:
    return row.view(torch.float64)
