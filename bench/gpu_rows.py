"""What the benchmark of a CUDA device measured, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from all_reduce_rows import times
from gpu_cases import FASTAGG, Case


@dataclass
class Row:
    """A contender's turns of one case; the copy and the other contenders took turns with it."""

    operation: str
    key: str
    contender: str
    package: str
    is_eager: bool
    bytes: int | None  # that the operation cannot but read and write; None where the host's time is measured
    seconds: list[float]  # of a call, turn by turn
    copy_bytes: int  # read and written
    copy_seconds: list[float]
    queued_seconds: list[float] = field(default_factory=list)  # of calls that the host had queued before: fastagg's

    @property
    def median(self) -> float:
        """Seconds a call."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """The longest turn less the shortest, in medians."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    @property
    def gigabytes_per_second(self) -> float | None:
        """Of the bytes that the operation cannot but touch, whatever the contender touches beyond them."""
        return None if self.bytes is None else self.bytes / self.median / 1e9

    @property
    def fraction_of_copy(self) -> float | None:
        """1.0: as many bytes a second as a copy from device memory to device memory."""
        if self.bytes is None:
            return None
        speeds = zip(self.seconds, self.copy_seconds, strict=True)
        return median(self.bytes / own / (self.copy_bytes / copy) for own, copy in speeds)

    @property
    def queued_fraction_of_copy(self) -> float | None:
        """The same without what the host adds to calls that do not wait for the device."""
        if self.bytes is None or not self.queued_seconds:
            return None
        return self.bytes / median(self.queued_seconds) / (self.copy_bytes / median(self.copy_seconds))


class Results:
    """A run's rows by case and contender, and why others are missing."""

    def __init__(self, rows: list[Row], missing: dict[str, str]) -> None:
        self.rows, self.missing = rows, missing
        self._rows = {(row.key, row.contender): row for row in rows}

    def row(self, case: Case, contender: str = FASTAGG) -> Row | None:
        """What one contender measured, if it did."""
        return self._rows.get((case.key, contender))

    def times_fastagg(self, row: Row) -> float | None:
        """A row's time in units of fastagg's beside it; None for fastagg itself."""
        ours = self._rows.get((row.key, FASTAGG))
        return None if ours is None or ours is row else times(row, ours)

    def speedups(self, cases: Iterable[Case], eager: bool = False) -> list[float]:
        """How many times as long as fastagg every other contender of some cases takes, or every eager one."""
        keys = {case.key for case in cases}
        found = (self.times_fastagg(row) for row in self.rows if row.key in keys and (row.is_eager or not eager))
        return [speedup for speedup in found if speedup is not None]

    @property
    def copy_gigabytes_per_second(self) -> float | None:
        """The copy's bandwidth: the median over the cases."""
        speeds = {row.key: row.copy_bytes / median(row.copy_seconds) / 1e9 for row in self.rows if row.bytes}
        return median(speeds.values()) if speeds else None
