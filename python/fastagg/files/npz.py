"""Reading .npz files: members that are stored uncompressed are views of the mapped file."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from fastagg._codes import code_of_dtype
from fastagg._npy import read_npy_header
from fastagg.files.checkpoints import Checkpoint, LeafDescription
from fastagg.files.mapped_file import MappedFile, span_of

SUFFIX = ".npy"
_LOCAL_HEADER_BYTES = 30
_STEP = 4 << 20  # bytes
_CORRUPT = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)


class _Member(NamedTuple):
    """An array in the archive."""

    info: zipfile.ZipInfo
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    header_bytes: int


class NpzCheckpoint(Checkpoint):
    """One .npz file. A member is checked against its checksum when it is read; compressed ones are read as a whole."""

    def __init__(self, path: Path) -> None:
        """Opens the archive and reads every member's header.

        Raises:
            OSError: it cannot be read.
            TypeError: it holds a dtype that fastagg has no arithmetic for.
            ValueError: it is truncated, or no such file.
        """
        super().__init__(path)
        self._file = MappedFile(path)
        self.mapped = [self._file.span]
        try:
            self._archive = zipfile.ZipFile(path)
        except _CORRUPT as error:
            raise ValueError(f"{path}: no valid .npz file: {error}") from None
        self._members: dict[str, _Member] = {}
        for info in self._archive.infolist():
            self._add(info)

    def __getitem__(self, name: str) -> np.ndarray:
        member = self._members[name]
        try:
            stored = member.info.compress_type == zipfile.ZIP_STORED
            array = self._mapped(member) if stored else self._read(member)
        except _CORRUPT as error:
            raise ValueError(f"{self.path}: leaf {name!r}: {error}") from None
        if member.fortran_order:
            array = array.reshape(member.shape[::-1]).transpose()
        # Only values in C order and in the machine's order of bytes have addresses.
        return np.ascontiguousarray(array, member.dtype.newbyteorder("=")).reshape(member.shape)

    def close(self) -> None:
        """Closes the file."""
        self._archive.close()

    def _add(self, info: zipfile.ZipInfo) -> None:
        name = info.filename.removesuffix(SUFFIX)
        try:
            with self._archive.open(info) as file:
                dtype, shape, fortran_order = read_npy_header(file)
                header_bytes = file.tell()
        except _CORRUPT as error:
            raise ValueError(f"{self.path}: leaf {name!r}: {error}") from None
        if code_of_dtype(dtype.newbyteorder("=")) is None:
            raise TypeError(f"{self.path}: leaf {name!r}: dtype {dtype} is not supported")
        size = header_bytes + math.prod(shape) * dtype.itemsize
        if info.file_size != size:
            raise ValueError(f"{self.path}: leaf {name!r}: expected {size} bytes for {dtype} {shape}")
        if name in self._members:
            raise ValueError(f"{self.path}: leaf {name!r} is there twice")
        self._members[name] = _Member(info, dtype, shape, fortran_order, header_bytes)
        self.leaves[name] = LeafDescription(dtype.newbyteorder("=").name, shape)

    def _mapped(self, member: _Member) -> np.ndarray:
        """A stored member's elements as they lie in the file."""
        start = member.info.header_offset
        local = self._file.bytes[start : start + _LOCAL_HEADER_BYTES].tobytes()
        name_bytes, extra_bytes = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
        start += _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        stored = self._file.bytes[start : start + member.info.file_size]
        if stored.size != member.info.file_size:
            raise ValueError("truncated: its bytes end behind the file")
        if self._checksum(stored) != member.info.CRC:
            raise ValueError("its checksum is wrong")
        return self._file.array(member.dtype, (math.prod(member.shape),), start + member.header_bytes)

    def _checksum(self, stored: np.ndarray) -> int:
        """The checksum of mapped bytes, of which few stay in memory."""
        checksum = 0
        for begin in range(0, stored.size, _STEP):
            part = stored[begin : begin + _STEP]
            checksum = zlib.crc32(part.data, checksum)
            self.release(span_of(part))
        return checksum

    def _read(self, member: _Member) -> np.ndarray:
        """A compressed member's elements, decompressed."""
        elements = np.empty(math.prod(member.shape), member.dtype)
        with self._archive.open(member.info) as opened:
            file = io.BufferedReader(cast(io.RawIOBase, opened))
            file.read(member.header_bytes)
            count = file.readinto(elements.view(np.uint8).data)
            file.read(1)  # the end, where the checksum is compared
        if count != elements.nbytes:
            raise ValueError("truncated: it has fewer elements than its header says")
        return elements
