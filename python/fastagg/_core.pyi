"""
fastagg's operations on the CPU.
"""

from __future__ import annotations

import collections.abc
import typing

import numpy
import numpy.typing
import typing_extensions

__all__: list[str] = [
    "DESCRIPTION_BYTES",
    "MAXIMUM_BLOCK",
    "MEANS_RANK",
    "MINIMUM_BLOCK",
    "PASS",
    "MappedFileGuard",
    "Peers",
    "SharedMemoryGroup",
    "advise_huge_pages",
    "available_isas",
    "available_processors",
    "cast",
    "force_isa",
    "get_num_threads",
    "in_one_shot",
    "isa",
    "numpy_address",
    "numpy_addresses",
    "overlaps",
    "reduce",
    "reduce_float64",
    "server_step",
    "set_num_threads",
    "slice_of",
    "sorted_mean",
    "squared_distances",
    "statistics",
    "stream_probe",
    "tensor_addresses",
    "weighted_sum",
]

class MappedFileGuard:
    """
    While it lives, to read where a mapped file was cut off gives NaN, and no SIGBUS.
    """
    def __init__(
        self, address: typing.SupportsInt | typing.SupportsIndex, bytes: typing.SupportsInt | typing.SupportsIndex
    ) -> None:
        """
        Watches over memory that is a mapped file.
        """
    def was_cut(self) -> bool:
        """
        Whether anything behind the file's end has been read.
        """

class Peers:
    """
    The processes of a group's ranks, watched whatever they do.
    """
    def __init__(
        self,
        processes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        names: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        rank: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def ended(self) -> int:
        """
        The rank of a process that has ended, or -1.
        """

class SharedMemoryGroup:
    """
    One rank's end of a group of processes on one host.
    """
    @staticmethod
    def attach(
        processes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        names: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        rank: typing.SupportsInt | typing.SupportsIndex,
        creator: typing.SupportsInt | typing.SupportsIndex,
        descriptor: typing.SupportsInt | typing.SupportsIndex,
    ) -> SharedMemoryGroup:
        """
        Attaches to the segment that another process has created.
        """
    def __init__(
        self,
        processes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        names: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        rank: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        Creates the group's segment.
        """
    def all_gather(
        self, operands: tuple[typing.Any, ...], timeout: typing.SupportsFloat | typing.SupportsIndex
    ) -> tuple[bool, int, float]:
        """
        Copies each rank's slice to all ranks.
        """
    def all_reduce(
        self, operands: tuple[typing.Any, ...], timeout: typing.SupportsFloat | typing.SupportsIndex
    ) -> tuple[bool, int, float]:
        """
        Sums or averages in place; returns whether the result is finite, the bytes handed to others, and the sum of its squares.
        """
    def broadcast(
        self,
        data: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
        root: typing.SupportsInt | typing.SupportsIndex,
        description: str,
        timeout: typing.SupportsFloat | typing.SupportsIndex,
    ) -> None:
        """
        Copies a rank's bytes, at an address, to all ranks.
        """
    def close_descriptor(self) -> None:
        """
        For when all have attached.
        """
    def descriptor(self) -> int:
        """
        The segment's descriptor, or -1.
        """
    def interrupt(self) -> None:
        """
        Ends the wait of another thread, and every later one.
        """
    def reduce_scatter(
        self, operands: tuple[typing.Any, ...], timeout: typing.SupportsFloat | typing.SupportsIndex
    ) -> tuple[bool, int, float]:
        """
        The same for this rank's slice alone.
        """
    def tell_lost(self, name: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        All ranks will raise PeerError for this one, or for the returned one, of which they were told before.
        """

def advise_huge_pages(
    address: typing.SupportsInt | typing.SupportsIndex, bytes: typing.SupportsInt | typing.SupportsIndex
) -> None:
    """
    Asks for huge pages for memory that is about to be written first.
    """

def available_isas() -> list[str]:
    """
    Instruction sets of this build that the processor has, best first.
    """

def available_processors() -> int:
    """
    Processors that this process may run on.
    """

def cast(operands: tuple[typing.Any, ...]) -> bool:
    """
    Decodes a source and encodes it as another code; returns whether nothing became infinite or NaN.
    """

def force_isa(name: str) -> None:
    """
    Uses one instruction set from now on.
    """

def get_num_threads() -> int:
    """
    Threads that an operation uses.
    """

def in_one_shot(
    count: typing.SupportsInt | typing.SupportsIndex, ranks: typing.SupportsInt | typing.SupportsIndex
) -> bool:
    """
    Whether every rank reduces everything itself.
    """

def isa() -> str:
    """
    The instruction set in use.
    """

def numpy_address(array: numpy.ndarray) -> int:
    """
    Address of a NumPy array's first element.
    """

def numpy_addresses(arrays: list[typing.Any]) -> list[typing.Any]:
    """
    Addresses of the leading NumPy arrays that share the first one's dtype, shape and C layout.
    """

def overlaps(
    inputs: list[typing.Any],
    outs: collections.abc.Sequence[
        tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]
    ],
) -> bool:
    """
    Whether one of the outs, (first address, the one behind the last byte), shares a byte with an input or with another; inputs are (first addresses, bytes of each).
    """

def reduce(operands: tuple[typing.Any, ...], norm: bool) -> tuple[bool, float]:
    """
    Adds up encoded arrays, divides and encodes; returns whether the result is finite, and its sum of squares.
    """

def reduce_float64(
    sources: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    divisor: typing.SupportsFloat | typing.SupportsIndex,
    factor: typing.SupportsFloat | typing.SupportsIndex,
    out: typing.SupportsInt | typing.SupportsIndex,
    count: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[bool, float]:
    """
    Adds up arrays of float64, divides and multiplies; returns whether the result is finite, and its sum of squares.
    """

def server_step(optimizer: tuple[typing.Any, ...], leaves: list[typing.Any]) -> None:
    """
    A server optimiser's step of leaves, their moments in place.
    """

def set_num_threads(count: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Sets the threads that an operation uses; 0 restores the default.
    """

def slice_of(
    count: typing.SupportsInt | typing.SupportsIndex,
    rank: typing.SupportsInt | typing.SupportsIndex,
    ranks: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[int, int]:
    """
    The elements that a rank owns: [begin, end).
    """

def sorted_mean(rule: tuple[typing.Any, ...], leaves: list[typing.Any]) -> list[int]:
    """
    Means of windows of the clients' sorted values; returns the indices of leaves with non-finite values.
    """

def squared_distances(
    leaves: list[typing.Any],
    clients: typing.SupportsInt | typing.SupportsIndex,
    distances: typing.SupportsInt | typing.SupportsIndex,
) -> bool:
    """
    Squared distances of all pairs of clients, over all leaves, as a matrix of float64; returns whether all values are finite.
    """

def statistics(
    leaves: list[typing.Any], measured: list[typing.Any]
) -> tuple[list[int], numpy.typing.NDArray[numpy.float64]]:
    """
    Weighted sums, and moments of the clients (leaves, clients, numbers); returns the indices of leaves with non-finite sums first.
    """

def stream_probe(
    sources: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    source_bytes: typing.SupportsInt | typing.SupportsIndex,
    out: typing.SupportsInt | typing.SupportsIndex,
    out_bytes: typing.SupportsInt | typing.SupportsIndex,
    chunk_bytes: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    Reads the sources side by side and overwrites `out`, without arithmetic: the benchmark's limit.
    """

def tensor_addresses(
    exchange: typing_extensions.CapsuleType,
    types: tuple[typing.Any, ...],
    is_negative: typing.Any,
    tensors: list[typing.Any],
) -> list[typing.Any]:
    """
    Addresses of the leading tensors that are of one of these types and share the first one's dtype, device and shape, contiguous and not negative views; `exchange` is their library's table for DLPack.
    """

def weighted_sum(leaves: list[typing.Any]) -> list[int]:
    """
    Weighted sums or maxima of leaves, in place; returns the indices of leaves with non-finite sums.
    """

DESCRIPTION_BYTES: int = 256
MAXIMUM_BLOCK: int = 4096
MEANS_RANK: int = 4294967295
MINIMUM_BLOCK: int = 32
PASS: int = 4096
__compiler__: str
__version__: str
