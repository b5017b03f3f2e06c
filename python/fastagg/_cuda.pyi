"""
fastagg's operations on CUDA devices.
"""

from __future__ import annotations

import collections.abc
import typing

__all__: list[str] = [
    "DIFFERS",
    "MAXIMUM_BLOCKS",
    "MAXIMUM_RANKS",
    "PEER_CONTROL_BYTES",
    "PeerMemory",
    "all_reduce",
    "cast",
    "device_count",
    "driver_version",
    "peer_blocks",
    "reduce",
    "reduce_float64",
    "runtime_version",
    "server_step",
    "sorted_mean",
    "squared_distances",
    "weighted_sum",
]

class PeerMemory:
    """
    Zeroed memory of a device that the other ranks' processes can open.
    """
    def __init__(
        self, bytes: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def handle(self) -> bytes:
        """
        What lets another process open it.
        """
    def open(
        self, handles: collections.abc.Sequence[str], rank: typing.SupportsInt | typing.SupportsIndex
    ) -> list[int]:
        """
        The addresses of all ranks' memory here, given all their handles.
        """
    def tell_lost(self, number: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Ends the device's waits.
        """
    @property
    def lost(self) -> int:
        """
        A lost rank + 1, or one that differs, DIFFERS above it; or 0.
        """
    @property
    def lost_address(self) -> int:
        """
        Where the device looks and tells.
        """

def all_reduce(
    exchange: tuple[typing.Any, ...],
    peers: tuple[typing.Any, ...],
    description: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
    nonfinite: typing.SupportsInt | typing.SupportsIndex,
    squares: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Reduces over ranks whose devices reach each other's memory; `description` is the same on all.
    """

def cast(
    operands: tuple[typing.Any, ...],
    stream: typing.SupportsInt | typing.SupportsIndex,
    nonfinite: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Decodes a source and encodes it as another code on a stream.
    """

def device_count() -> int:
    """
    CUDA devices that can be used; 0 without a driver.
    """

def driver_version() -> int:
    """
    CUDA's version that the driver serves; 0 without a driver.
    """

def peer_blocks(device: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Blocks of threads of an all-reduce on a device.
    """

def reduce(
    operands: tuple[typing.Any, ...],
    stream: typing.SupportsInt | typing.SupportsIndex,
    nonfinite: typing.SupportsInt | typing.SupportsIndex,
    squares: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Adds up encoded arrays, divides and encodes on a stream.
    """

def reduce_float64(
    sources: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    divisor: typing.SupportsFloat | typing.SupportsIndex,
    factor: typing.SupportsFloat | typing.SupportsIndex,
    out: typing.SupportsInt | typing.SupportsIndex,
    count: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
    nonfinite: typing.SupportsInt | typing.SupportsIndex,
    squares: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Adds up float64 arrays on a stream: sum / divisor * factor.
    """

def runtime_version() -> int:
    """
    CUDA's version that this module was built with.
    """

def server_step(
    optimizer: tuple[typing.Any, ...], leaves: list[typing.Any], stream: typing.SupportsInt | typing.SupportsIndex
) -> None:
    """
    A server optimiser's step of leaves on a stream, their moments in place.
    """

def sorted_mean(
    rule: tuple[typing.Any, ...], leaves: list[typing.Any], stream: typing.SupportsInt | typing.SupportsIndex
) -> list[int]:
    """
    Means of windows of the clients' sorted values on a stream; waits and returns the indices of leaves with non-finite values.
    """

def squared_distances(
    leaves: list[typing.Any],
    clients: typing.SupportsInt | typing.SupportsIndex,
    distances: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> bool:
    """
    Squared distances of all pairs of clients, over all leaves, on a stream; waits, writes them to the host's memory as a matrix of float64 and returns whether all values are finite.
    """

def weighted_sum(leaves: list[typing.Any], stream: typing.SupportsInt | typing.SupportsIndex, check: bool) -> list[int]:
    """
    Weighted sums or maxima of leaves on a stream; with check, waits and returns the indices of leaves with non-finite sums.
    """

DIFFERS: int = 2147483648
MAXIMUM_BLOCKS: int = 4096
MAXIMUM_RANKS: int = 128
PEER_CONTROL_BYTES: int = 1048832
