"""Reading .safetensors files: the header is checked, the tensors are views of the mapped file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastagg._arrays.registry import kind_named
from fastagg._quoting import printable, quoted
from fastagg.files.checkpoints import Checkpoint, LeafDescription, checked_shape
from fastagg.files.mapped_file import MappedFile
from fastagg.files.quantized import leaves_of_metadata
from fastagg.quantization.quantized import Quantized

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
ELEMENT_BYTES = {name: 2 if name == "bfloat16" else np.dtype(name).itemsize for name in DTYPES.values()}

LENGTH_BYTES = 8  # of the header's length, which begins the file
LARGEST_HEADER = 100_000_000  # the format's own limit


class Tensor(NamedTuple):
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # its place in the file
    end: int


class SafetensorsCheckpoint(Checkpoint):
    """One .safetensors file; where its metadata says so, pairs of codes and scales are `Quantized` leaves."""

    def __init__(self, path: Path) -> None:
        """Maps the file and checks its header.

        Raises:
            OSError: it cannot be read.
            TypeError: it holds a dtype that fastagg has no arithmetic for.
            ValueError: it is truncated, or no such file.
        """
        super().__init__(path)
        self._file = MappedFile(path)
        self.files, self.mapped = [self._file], [self._file.span]
        try:
            self.metadata, self._tensors = read_header(self._file.bytes)
            self._quantized = leaves_of_metadata(self.metadata)
            self.leaves = self._describe()
            for dtype in {tensor.dtype for tensor in self._tensors.values()}:
                kind_named("numpy").dtype_named(dtype)  # bf16 may be missing
            for name in self._quantized:
                self._quantized_array(name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    def __getitem__(self, name: str) -> Any:
        if name not in self.leaves:
            raise KeyError(name)
        return self._quantized_array(name) if name in self._quantized else self._array(name)

    @property
    def tensor_names(self) -> set[str]:
        """The tensors' own names: of a quantised leaf, those of its codes and scales."""
        return set(self._tensors)

    def _array(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        return self._file.array(kind_named("numpy").dtype_named(tensor.dtype), tensor.shape, tensor.begin)

    def _quantized_array(self, name: str) -> Quantized:
        leaf = self._quantized[name]
        codes = self._array(leaf.codes)
        scales = None if leaf.scales is None else self._array(leaf.scales)
        try:
            return Quantized(codes, scales, wire=leaf.wire, shape=leaf.shape, dtype=leaf.dtype, block=leaf.block)
        except (TypeError, ValueError) as error:
            raise type(error)(f"leaf {quoted(name)}: {error}") from None

    def _describe(self) -> dict[str, LeafDescription]:
        """Every leaf, a quantised one in the place of its codes."""
        by_codes = {leaf.codes: (name, leaf) for name, leaf in self._quantized.items()}
        scales = {leaf.scales for leaf in self._quantized.values()}
        for part in [*by_codes, *scales - {None}]:
            if part not in self._tensors:
                raise ValueError(f"tensor {quoted(part)}, of which the metadata tells, is missing")
        if both := self._quantized.keys() & self._tensors.keys():
            raise ValueError(f"leaf {quoted(min(both))} is there twice, as codes and as it is")
        described = {}
        for name, tensor in self._tensors.items():
            if name in by_codes:
                whole, leaf = by_codes[name]
                described[whole] = LeafDescription(leaf.dtype, leaf.shape, leaf.wire)
            elif name not in scales:
                described[name] = LeafDescription(tensor.dtype, tensor.shape)
        return described


def read_header(file: np.ndarray) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors in the order of their bytes.

    Raises:
        TypeError: a dtype that fastagg has no arithmetic for.
        ValueError: anything that the format forbids, so that every byte of the file belongs to one tensor.
    """
    if file.size < LENGTH_BYTES:
        raise ValueError(f"truncated: {file.size} bytes are no .safetensors file")
    length = int.from_bytes(file[:LENGTH_BYTES].tobytes(), "little")
    data = LENGTH_BYTES + length
    if length > LARGEST_HEADER:
        raise ValueError(f"no .safetensors file: a header of {length} bytes (at most {LARGEST_HEADER})")
    if data > file.size:
        raise ValueError(f"truncated: the header ends at byte {data}, the file at {file.size}")
    header = _parse(file[LENGTH_BYTES:data].tobytes())
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the format's own library takes null, too
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the header's __metadata__ is no mapping from names to texts")
    _check_unicode([*header, *metadata, *metadata.values()])
    tensors = {name: _tensor(name, entry, data) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_places(tensors, data, file.size)
    return metadata, tensors


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is no valid JSON: {printable(str(error))}") from None
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return header


def _check_unicode(texts: list[str]) -> None:
    """Raises ValueError for half of a surrogate pair: JSON can spell it, and nobody can write it again."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the header's text {quoted(text)} is no Unicode") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{quoted(twice)} stands there twice")
    return whole


def _tensor(name: str, entry: Any, data: int) -> Tensor:
    """One entry of the header."""
    try:
        dtype, sizes, (begin, end) = entry["dtype"], list(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"leaf {quoted(name)}: the header lacks its dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise TypeError(
            f"leaf {quoted(name)}: dtype {_plain(dtype)} is not supported (expected one of {', '.join(DTYPES)})"
        )
    try:
        shape = checked_shape(sizes)
    except ValueError as error:
        raise ValueError(f"leaf {quoted(name)}: {error}") from None
    if not all(type(number) is int and number >= 0 for number in (begin, end)):
        raise ValueError(f"leaf {quoted(name)}: data_offsets {quoted((begin, end))} must be integers of 0 or more")
    size = math.prod(shape) * ELEMENT_BYTES[DTYPES[dtype]]
    if end - begin != size:
        raise ValueError(
            f"leaf {quoted(name)}: expected {quoted(size)} bytes for {dtype} {quoted(shape)}, got {quoted(end - begin)}"
        )
    return Tensor(DTYPES[dtype], shape, data + begin, data + end)


def _plain(dtype: Any) -> str:
    """A dtype without quotes where it is a text."""
    return printable(dtype) if isinstance(dtype, str) else quoted(dtype)


def _check_places(tensors: dict[str, Tensor], data: int, size: int) -> None:
    """Raises ValueError unless the tensors fill the file from `data` on, each byte once."""
    reached = data
    for name, tensor in tensors.items():
        if tensor.end > size:
            raise ValueError(f"truncated: leaf {quoted(name)} ends at byte {quoted(tensor.end)}, the file at {size}")
        if tensor.begin != reached:
            what = "overlaps another one" if tensor.begin < reached else "leaves a gap before it"
            raise ValueError(f"leaf {quoted(name)}: {what} (its bytes begin at {tensor.begin}, expected {reached})")
        reached = tensor.end
    if reached != size:
        raise ValueError(f"{size - reached} bytes behind the last tensor belong to none")
