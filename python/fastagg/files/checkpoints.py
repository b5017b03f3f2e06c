"""A checkpoint: a mapping from names to arrays, with what can be known before an array is read."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from fastagg._native.codes import ELEMENT_BYTES, WIRES, Code, code_of_dtype, encoded_bytes
from fastagg._quoting import quoted
from fastagg.files.mapped_file import MappedFile, release

_MOST_DIMENSIONS, _LARGEST_SIZE = 64, 2**63 - 1  # of NumPy's arrays


def checked_shape(sizes: Iterable[Any]) -> tuple[int, ...]:
    """Sizes that a file tells, as a shape; their product is safe to compute, which takes long for what no array has.

    Raises:
        TypeError: they are none.
        ValueError: they are no integers of 0 or more, too large, or too many.
    """
    shape = tuple(sizes)
    if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size <= _LARGEST_SIZE for size in shape):
        raise ValueError(
            f"shape {quoted(shape)}: expected at most {_MOST_DIMENSIONS} sizes, integers of 0 or more below 2**63"
        )
    return shape


class LeafDescription(NamedTuple):
    """A leaf's dtype by its plain name and its shape; for a `Quantized`, those of the original."""

    dtype: str
    shape: tuple[int, ...]
    wire: str | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def code(self) -> Code:
        """The dtype's native code."""
        code = code_of_dtype(self.dtype)
        assert code is not None
        return code

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the array."""
        return ELEMENT_BYTES[self.code]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.elements * self.element_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of the array, or of a `Quantized` leaf's codes."""
        return encoded_bytes(self.code if self.wire is None else WIRES[self.wire], self.elements)

    def check_shape(self) -> None:
        """Raises ValueError for a shape that no array has: too many dimensions, or too large ones beside a 0."""
        element = np.empty((), f"V{self.element_bytes}")
        np.ndarray(self.shape, element.dtype, element, strides=(0,) * len(self.shape))


class Checkpoint(Mapping[str, Any]):
    """An open checkpoint; iteration gives the names in the order in which the file holds them.

    Arrays are read-only views of the mapped file where it has them as plain bytes, and stay valid once it is closed.
    Where another process cuts the file off while it is open, they read as NaN, and closing it is an error.

    Attributes:
        path: what was opened.
        metadata: the file's own texts by name (`__metadata__` of a .safetensors file).
        module_versions: `_metadata` of a state_dict, by module; None where the file has none.
        leaves: the description of every leaf, known without reading it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.leaves: dict[str, LeafDescription] = {}
        self.mapped: list[tuple[int, int]] = []  # spans of memory that are mapped files
        self.files: list[MappedFile] = []
        self.module_versions: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self.leaves)} leaves)"

    @abstractmethod
    def __getitem__(self, name: str) -> Any: ...

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, scales left out."""
        return sum(leaf.stored_bytes for leaf in self.leaves.values())

    def leaf(self, name: str) -> Any:
        """A leaf to be read in pieces: as `self[name]`, a strided array, or what has a `part` of its own."""
        return self[name]

    def release(self, span: tuple[int, int]) -> None:
        """Gives back the pages of a span of a mapped array."""
        release(span, self.mapped)

    def check_whole(self) -> None:
        """Raises ValueError if a file was cut off since it was opened."""
        for file in self.files:
            file.check_whole()

    def close(self) -> None:
        """Closes the file.

        Raises:
            ValueError: it was cut off while it was open.
        """
        try:
            self.check_whole()
        finally:
            for file in self.files:
                file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except ValueError:
            if error is None:  # else the block has ended with an error of its own
                raise
