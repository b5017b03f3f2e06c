"""Writing checkpoint files piece by piece."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import tempfile
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastagg._extras import needing
from fastagg._native.codes import FLOATS, WIRES, encoded_bytes
from fastagg._npy import npy_header
from fastagg._quoting import quoted
from fastagg.files.checkpoints import LeafDescription
from fastagg.files.npz import SUFFIX
from fastagg.files.quantized import METADATA_KEY, QuantizedLeaf, metadata_of_leaves, quantized_leaf
from fastagg.files.safetensors import DTYPES, LENGTH_BYTES
from fastagg.quantization.cast import quantize
from fastagg.quantization.quantized import check_block

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_ALIGNMENT = 8
_DEFAULT_METADATA = {"format": "pt"}  # of a file without any: transformers before 4.49 cannot read one without
_LARGEST_MEMBER_NAME = 2**16 - 1 - len(SUFFIX)  # bytes
# Bytes after which the disk is told: while it writes, the sums go on, and there is less to wait for at the end.
_WRITEBACK_BYTES = 32 << 20
_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class Writer(Protocol):
    """A checkpoint that is being written, its leaves in order and each from its first element on."""

    def write(self, name: str, begin: int, array: np.ndarray) -> None:
        """Writes a leaf's elements from `begin` on."""
        ...

    def finish(self) -> None:
        """Writes what is left once all leaves are written."""
        ...

    def close(self) -> None:
        """Gives back what the writer needs, whether it has finished or not."""
        ...


class Tensor(NamedTuple):
    """A tensor's place in a file."""

    leaf: LeafDescription
    begin: int


def write_all(descriptor: int, data: Any, place: int) -> None:
    """Writes bytes at a place in a file, in as many calls as it takes."""
    left = memoryview(data).cast("B")
    while left:
        count = os.pwrite(descriptor, left, place)
        left, place = left[count:], place + count


def start_writeback(descriptor: int) -> None:
    """Lets the system begin to write to the disk what has been written so far, where it can be told to."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, 0, 0, _WRITE)


def _bytes_of(array: np.ndarray) -> Any:
    """A contiguous array's bytes, also of a dtype that Python's buffers do not know."""
    return array.reshape(-1).view(np.uint8).data


class SafetensorsWriter:
    """One .safetensors file; with a wire, floating leaves become codes and scales."""

    def __init__(
        self, descriptor: int, leaves: dict[str, LeafDescription], metadata: dict[str, str], wire: str | None
    ) -> None:
        """Writes the header.

        Raises:
            ValueError: a leaf is called as another one's codes or scales would be.
        """
        self._descriptor, self._unsynced = descriptor, 0
        self._quantized: dict[str, QuantizedLeaf] = {}
        metadata = {name: text for name, text in metadata.items() if name != METADATA_KEY} or _DEFAULT_METADATA.copy()
        if wire is not None:
            block = check_block(wire, None)
            floats = {name: leaf for name, leaf in leaves.items() if leaf.code in FLOATS}
            self._quantized = {
                name: quantized_leaf(name, wire, block, leaf.dtype, leaf.shape) for name, leaf in floats.items()
            }
            metadata[METADATA_KEY] = metadata_of_leaves(self._quantized)
        self.tensors = self._place(leaves)
        self._data = self._write_header(metadata)

    def write(self, name: str, begin: int, array: np.ndarray) -> None:
        """See `Writer`.

        Raises:
            ValueError: an element is too large for the wire.
        """
        leaf = self._quantized.get(name)
        if leaf is None:
            self._write_bytes(name, begin * array.itemsize, array)
            return
        coded = quantize(array, leaf.wire, block=leaf.block)
        if coded.nonfinite:
            raise ValueError(f"leaf {quoted(name)}: the result is too large for {leaf.wire}")
        self._write_bytes(leaf.codes, encoded_bytes(WIRES[leaf.wire], begin), coded.data)
        if leaf.scales is not None and leaf.block is not None:
            self._write_bytes(leaf.scales, 4 * (begin // leaf.block), coded.scales)

    def finish(self) -> None:
        """See `Writer`."""

    def close(self) -> None:
        """See `Writer`."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(leaf.nbytes for leaf, _ in self.tensors.values())

    def _place(self, leaves: dict[str, LeafDescription]) -> dict[str, Tensor]:
        """Every tensor's place behind the header, wide dtypes first, so that all are aligned."""
        tensors: list[tuple[str, LeafDescription]] = []
        for name, leaf in leaves.items():
            quantized = self._quantized.get(name)
            tensors += [(name, leaf)] if quantized is None else quantized.tensors()
        if len(dict(tensors)) < len(tensors):
            twice = Counter(name for name, _ in tensors).most_common(1)[0][0]
            raise ValueError(f"leaf {quoted(twice)} is also a name of codes or scales")
        placed, end = {}, 0
        for name, leaf in sorted(tensors, key=lambda item: -item[1].element_bytes):
            placed[name] = Tensor(leaf, end)
            end += leaf.nbytes
        return placed

    def _write_header(self, metadata: dict[str, str]) -> int:
        """Returns where the tensors' bytes begin."""
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        for name, (leaf, begin) in self.tensors.items():
            offsets = [begin, begin + leaf.nbytes]
            header[name] = {"dtype": _NAMES[leaf.dtype], "shape": leaf.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        write_all(self._descriptor, len(text).to_bytes(LENGTH_BYTES, "little") + text, 0)
        return LENGTH_BYTES + len(text)

    def _write_bytes(self, name: str, offset: int, array: np.ndarray) -> None:
        write_all(self._descriptor, _bytes_of(array), self._data + self.tensors[name].begin + offset)
        self._unsynced += array.nbytes
        if self._unsynced >= _WRITEBACK_BYTES:
            start_writeback(self._descriptor)
            self._unsynced = 0


class NpzWriter:
    """One .npz file, its members stored uncompressed, so that they can be mapped."""

    def __init__(self, descriptor: int, leaves: dict[str, LeafDescription]) -> None:
        """Begins the archive.

        Raises:
            TypeError: a leaf is bf16, which the format has no name for.
            ValueError: a leaf has a name that the format would cut.
        """
        for name, leaf in leaves.items():
            if zipfile.ZipInfo(name + SUFFIX).filename != name + SUFFIX or len(name.encode()) > _LARGEST_MEMBER_NAME:
                raise ValueError(f"leaf {quoted(name)}: .npz cannot hold such a name")
            if leaf.dtype == "bfloat16":
                raise TypeError(f"leaf {quoted(name)}: .npz has no bf16: ask for another dtype, or write .safetensors")
        self._leaves = leaves
        self._file = os.fdopen(os.dup(descriptor), "w+b")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._member: Any = None

    def write(self, name: str, begin: int, array: np.ndarray) -> None:
        """See `Writer`."""
        leaf = self._leaves[name]
        if begin == 0:
            self._member = self._archive.open(zipfile.ZipInfo(name + SUFFIX), "w", force_zip64=True)
            self._member.write(npy_header(array.dtype, leaf.shape))
        self._member.write(_bytes_of(array))
        if begin + array.size == leaf.elements:
            self._member.close()

    def finish(self) -> None:
        """See `Writer`."""
        self._archive.close()

    def close(self) -> None:
        """See `Writer`. An archive that is not finished ends where it is."""
        with contextlib.suppress(OSError):
            if self._member is not None:
                self._member.close()
            self._archive.close()
        self._file.close()


class TorchWriter:
    """One .pt file with a state_dict of contiguous tensors.

    torch.save wants all tensors at once: until then they are in a file without a name in the output's directory, which
    is mapped, so that memory holds no more of them than the system likes.
    """

    def __init__(
        self, descriptor: int, folder: Path, leaves: dict[str, LeafDescription], module_versions: Any = None
    ) -> None:
        """Makes room for the tensors."""
        with needing("torch", "To write .pt files fastagg"):
            import torch

        self._torch, self._descriptor, self._leaves = torch, descriptor, leaves
        self._module_versions = module_versions
        self._places, end = {}, 0
        for name, leaf in leaves.items():
            self._places[name] = end
            end += -(-leaf.nbytes // 64) * 64
        with contextlib.ExitStack() as opened:
            self._scratch = opened.enter_context(tempfile.TemporaryFile(dir=folder))
            self._scratch.truncate(max(end, 1))
            opened.pop_all()  # it stays open

    def write(self, name: str, begin: int, array: np.ndarray) -> None:
        """See `Writer`."""
        write_all(self._scratch.fileno(), _bytes_of(array), self._places[name] + begin * array.itemsize)

    def finish(self) -> None:
        """See `Writer`."""
        mapping = mmap.mmap(self._scratch.fileno(), 0)
        state: Any = {name: self._tensor(mapping, name, leaf) for name, leaf in self._leaves.items()}
        if self._module_versions is not None:
            state = OrderedDict(state)
            state._metadata = self._module_versions
        with os.fdopen(os.dup(self._descriptor), "wb") as file:
            self._torch.save(state, file)

    def close(self) -> None:
        """See `Writer`."""
        self._scratch.close()

    def _tensor(self, mapping: mmap.mmap, name: str, leaf: LeafDescription) -> Any:
        dtype = getattr(self._torch, leaf.dtype)
        if not leaf.elements:
            return self._torch.empty(leaf.shape, dtype=dtype, device="cpu")
        flat = self._torch.frombuffer(mapping, dtype=dtype, count=leaf.elements, offset=self._places[name])
        return flat.reshape(leaf.shape)
