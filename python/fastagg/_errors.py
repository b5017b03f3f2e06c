"""The errors and warnings of fastagg's own; all else is ValueError or TypeError."""

from __future__ import annotations

NONFINITE = "holds a NaN or an infinity"


class CudaError(RuntimeError):
    """The CUDA driver or runtime refused; the message is its own."""


class PeerError(RuntimeError):
    """A rank of a process group has died, hung or left.

    Attributes:
        rank: its global rank.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(reason)
        self.rank = rank

    def __reduce__(self) -> tuple[type[PeerError], tuple[int, str]]:
        return PeerError, (self.rank, str(self))


class NonFiniteUpdateError(ValueError):
    """An update holds a NaN or an infinity, and `nan_policy` is "raise"."""


class NoUpdateLeftError(ValueError):
    """`nan_policy="drop"` has dropped every client that contributes.

    Attributes:
        dropped: by client, the name of its first leaf with a NaN or an infinity.
    """

    def __init__(self, dropped: dict[int, str]) -> None:
        who = "; ".join(f"client {client}, {leaf_name}" for client, leaf_name in dropped.items())
        super().__init__(f"every contributing client {NONFINITE}, so none is left to average: {who}")
        self.dropped = dropped

    def __reduce__(self) -> tuple[type[NoUpdateLeftError], tuple[dict[int, str]]]:
        return NoUpdateLeftError, (self.dropped,)


class DroppedUpdateWarning(UserWarning):
    """A client's update was left out because of `nan_policy="drop"`; the message names it and its leaf."""


class NotKeptWarning(UserWarning):
    """Something that stands in a checkpoint, or beside it, is not in the file that was made of it."""
