"""The errors and warnings of fastagg's own; all else is ValueError or TypeError."""

from __future__ import annotations


class CudaError(RuntimeError):
    """The CUDA driver or runtime refused; the message is its own."""


class DroppedUpdateWarning(UserWarning):
    """A client's update was left out because of `nan_policy="drop"`; the message names it and its leaf."""
