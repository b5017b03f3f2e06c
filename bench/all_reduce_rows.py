"""What the ranks measured, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from all_reduce_cases import LIMIT, LINK_BITS_PER_SECOND
from rows import QUIET_SHARE


@dataclass
class ExchangeRow:
    """A contender's rounds at one size; those of all contenders at that size ran in turn."""

    exchange: str
    world: int
    hosts: int
    size: int  # bytes of fp32 that every rank holds
    contender: str
    package: str
    transport: str
    calls: int  # a round
    seconds: list[float]  # of one call on the slowest rank, round by round
    sent_bytes: float | None  # by one host a call, where there is a link between hosts
    processor_shares: list[float]  # of the processors' time, that the limit's runs had

    @property
    def median(self) -> float:
        """Seconds a call."""
        return median(self.seconds)

    @property
    def algorithm_gigabytes(self) -> float:
        """Payload over time, as nccl-tests' algbw."""
        return self.size / self.median / 1e9

    @property
    def bus_gigabytes(self) -> float:
        """As nccl-tests' busbw: what every rank must send at least, uncompressed, over time."""
        return self.algorithm_gigabytes * 2 * (self.world - 1) / self.world

    @property
    def fraction_of_link(self) -> float | None:
        """1.0: the link was never idle; the headers of TCP and Ethernet, which are not counted, need 0.05."""
        return None if self.sent_bytes is None else self.sent_bytes * 8 / LINK_BITS_PER_SECOND / self.median


@dataclass
class StepRow:
    """A contender's rounds of training one model."""

    model: str
    parameters: int
    contender: str
    seconds: list[float]  # of a step on the slowest rank, round by round
    processor_shares: list[float]

    @property
    def median(self) -> float:
        """Seconds a step."""
        return median(self.seconds)


def times(row: Any, other: Any) -> float:
    """How many times the other's time a row takes: the median of the rounds that ran in turn."""
    return median(own / its for own, its in zip(row.seconds, other.seconds, strict=True))


class Results:
    """A run's rows by what they measured, and why others are missing."""

    def __init__(self, rows: list[ExchangeRow], steps: list[StepRow], missing: dict[str, str]) -> None:
        self.rows, self.steps, self.missing = rows, steps, missing
        self._rows = {(row.exchange, row.size, row.contender): row for row in rows}
        self._steps = {(row.model, row.contender): row for row in steps}

    def row(self, exchange: str, size: int, contender: str) -> ExchangeRow | None:
        """What one contender measured, if it did."""
        return self._rows.get((exchange, size, contender))

    def step(self, model: str, contender: str) -> StepRow | None:
        """What one contender needed for a model's step, if it did."""
        return self._steps.get((model, contender))

    def times(self, row: ExchangeRow, contender: str) -> float | None:
        """A row's time in units of another's beside it."""
        other = self.row(row.exchange, row.size, contender)
        return None if other is None else times(row, other)

    def fraction_of_limit(self, row: ExchangeRow) -> float | None:
        """1.0: as fast as the memory can read every rank's tensor once and write it once."""
        over = self.times(row, LIMIT) if row.hosts == 1 else None
        return None if over is None else 1 / over

    def is_quiet(self, exchange: str, size: int) -> bool:
        """Whether the machine did nothing else meanwhile."""
        limit = self.row(exchange, size, LIMIT)
        return limit is not None and median(limit.processor_shares) >= QUIET_SHARE
