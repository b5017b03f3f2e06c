"""What every transport owes."""

from __future__ import annotations

from typing import Protocol

import torch

from fastagg.distributed.exchange.exchange import Exchange, Outcome


class Transport(Protocol):
    """One way to reduce tensors over a group."""

    @property
    def name(self) -> str:
        """What `state.transport` calls it."""
        ...

    @property
    def reason(self) -> str:
        """Why no faster one was taken."""
        ...

    @property
    def shares(self) -> int:
        """What a residual is a share of: a mean is owed the sum of all ranks' residuals over this number."""
        ...

    def all_reduce(self, exchange: Exchange) -> Outcome:
        """Reduces one tensor in place."""
        ...


class HostTransport(Transport, Protocol):
    """One that also carries bytes on the CPU."""

    sees_signals: bool
    """Whether a wait in the main thread answers Ctrl-C; else exchanges have a thread of their own."""

    def agree(self, description: str) -> None:
        """Raises ValueError on every rank if one was called with something else."""
        ...

    def broadcast(self, data: torch.Tensor, root: int, description: str) -> None:
        """Copies a rank's bytes to all, once all have agreed on a description."""
        ...

    def interrupt(self) -> None:
        """Ends the wait of another thread of this process: PeerError that names this rank, on all ranks."""
        ...
