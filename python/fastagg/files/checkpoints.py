"""A checkpoint: a mapping from names to arrays, with what can be known before an array is read."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from fastagg._codes import ELEMENT_BYTES, WIRES, Code, code_of_dtype
from fastagg._overlap import encoded_bytes
from fastagg.files.mapped_file import release


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

    Attributes:
        path: what was opened.
        metadata: the file's own texts by name (`__metadata__` of a .safetensors file).
        leaves: the description of every leaf, known without reading it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.leaves: dict[str, LeafDescription] = {}
        self.mapped: list[tuple[int, int]] = []  # spans of memory that are mapped files

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

    def release(self, span: tuple[int, int]) -> None:
        """Gives back the pages of a span of a mapped array."""
        release(span, self.mapped)

    def close(self) -> None:
        """Closes the file."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
