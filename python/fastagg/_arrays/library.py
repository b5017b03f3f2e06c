"""What every array library is asked: an array as an address, and new arrays."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastagg._native.codes import ELEMENT_BYTES, Code, name_of


class View(NamedTuple):
    """What the native code needs to know of one array, and the object that keeps its memory alive."""

    address: int
    code: Code
    shape: tuple[int, ...]
    device: str
    owner: Any

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """First address, and the one behind the last byte."""
        return self.address, self.address + self.elements * ELEMENT_BYTES[self.code]


class Kept(Protocol):
    """An array that is kept: an object of our own over the memory of another, whose shape and dtype nobody changes."""

    @property
    def array(self) -> Any: ...

    def address(self) -> int:
        """Where the array begins now.

        Raises:
            ValueError: its memory has been taken away.
        """
        ...


class FixedMemory(NamedTuple):
    """An array whose memory stays where it is as long as the array does."""

    array: Any
    begin: int

    def address(self) -> int:
        """See `Kept`."""
        return self.begin


class Kind(Protocol):
    """One array library."""

    name: str
    memory_moves: bool  # whether the memory of an array can be changed for other memory while the array is kept

    def view(self, array: Any) -> View:
        """The array as an address; a contiguous copy of it where its own memory is not."""
        ...

    def writable_view(self, array: Any) -> View:
        """The array's own memory.

        Raises:
            ValueError: it cannot be written in one piece.
        """
        ...

    def keep(self, array: Any) -> Kept:
        """A contiguous array, to be kept."""
        ...

    def alias(self, array: Any) -> Any:
        """Another array over the same memory, with a shape and a dtype of its own."""
        ...

    def address(self, array: Any) -> int:
        """Where an array that `empty` made begins."""
        ...

    def addresses(self, arrays: list[Any]) -> list[int]:
        """Addresses of the leading arrays that look just like the first one: the fast path for many clients."""
        ...

    def dtype_of(self, array: Any) -> Any:
        """The array's dtype, as its library spells it."""
        ...

    def device_of(self, array: Any) -> str:
        """The array's device: "cpu" or "cuda:0"."""
        ...

    def dtype_for(self, code: Code) -> Any:
        """The library's dtype for a floating code."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        """A new array, its contents undefined."""
        ...

    def empty_like(self, array: Any) -> Any:
        """The same for an array's shape, dtype and device; `addresses` has taken it."""
        ...

    def note_write(self, array: Any) -> None:
        """Prepares for a write into an array that `addresses` has taken.

        Raises:
            ValueError: it cannot be written.
        """
        ...

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        """A new array of zeros."""
        ...

    def stream(self, device: str) -> int:
        """The caller's current stream on a CUDA device."""
        ...

    def dtype_named(self, name: str) -> Any:
        """The library's dtype of that plain name."""
        ...

    def to_numpy(self, array: Any) -> np.ndarray:
        """A copy in the host's memory."""
        ...

    def from_numpy(self, array: np.ndarray, device: str) -> Any:
        """A copy on a device."""
        ...


def unsupported(dtype: Any) -> TypeError:
    """The error about a dtype that no code stands for."""
    return TypeError(f"dtype {name_of(dtype)} is not supported (expected a real floating, integer or bool dtype)")
