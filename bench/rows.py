"""One measured row, and what follows from its times."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

# Below this share of the processors somebody else was using them, and no time says much.
QUIET_SHARE = 0.85


@dataclass
class Row:
    """A contender's rounds of one case, with those of its neighbours that ran in turn with them."""

    operation: str
    key: str
    case: str
    contender: str
    package: str
    seconds: list[float]
    limit_seconds: list[float]
    processor_shares: list[float]  # of the time of its threads' processors, that the limit's runs had
    rival_seconds: list[float]  # fastagg's
    twin_seconds: list[float]  # the same work in another layout
    bytes: int | None  # that the operation cannot but read and write
    extra_models: float | None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds a call."""
        return median(self.seconds)

    @property
    def gigabytes_per_second(self) -> float | None:
        """Of the bytes that the operation cannot but touch, whatever the contender touches beyond them."""
        return None if self.bytes is None else self.bytes / self.median / 1e9

    @property
    def fraction_of_limit(self) -> float | None:
        """1.0: as fast as the memory."""
        return median(self.limit_seconds) / self.median if self.limit_seconds else None

    @property
    def times_fastagg(self) -> float | None:
        """Its time over fastagg's; None for fastagg itself."""
        return self.median / median(self.rival_seconds) if self.rival_seconds else None

    @property
    def times_twin(self) -> float | None:
        """Its time over that of its twin."""
        return self.median / median(self.twin_seconds) if self.twin_seconds else None

    @property
    def is_quiet(self) -> bool:
        """Whether the machine is known to have done nothing else meanwhile."""
        return bool(self.processor_shares) and median(self.processor_shares) >= QUIET_SHARE

    @property
    def most_bytes_per_element(self) -> float | None:
        """What an Accumulator holds, at its worst."""
        held = self.notes.get("bytes_per_element")
        return max(held.values()) if held else None
