"""The errors and warnings of fastagg's own; all else is ValueError or TypeError."""

from __future__ import annotations


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


class DroppedUpdateWarning(UserWarning):
    """A client's update was left out because of `nan_policy="drop"`; the message names it and its leaf."""


class NotKeptWarning(UserWarning):
    """Something that stands in a checkpoint, or beside it, is not in the file that was made of it."""
