"""Reading .npz files: members stored uncompressed are views of the mapped file, others are inflated in pieces."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from fastagg._native.codes import code_of_dtype
from fastagg._npy import read_npy_header
from fastagg._quoting import printable, quoted
from fastagg.files.checkpoints import Checkpoint, LeafDescription, checked_shape
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

    @property
    def is_stored(self) -> bool:
        """Whether its bytes lie in the file as they are."""
        return self.info.compress_type == zipfile.ZIP_STORED


class NpzCheckpoint(Checkpoint):
    """One .npz file. A member is checked against its checksum when it is read."""

    def __init__(self, path: Path) -> None:
        """Opens the archive and reads every member's header.

        Raises:
            OSError: it cannot be read.
            TypeError: it holds a dtype that fastagg has no arithmetic for.
            ValueError: it is truncated, or no such file.
        """
        super().__init__(path)
        self._file = MappedFile(path)
        self.files, self.mapped = [self._file], [self._file.span]
        try:
            self._archive = zipfile.ZipFile(path)
        except _CORRUPT as error:
            raise ValueError(f"{path}: no valid .npz file: {printable(str(error))}") from None
        self._members: dict[str, _Member] = {}
        for info in self._archive.infolist():
            if not info.is_dir():  # which other archivers add
                self._add(info)

    def __getitem__(self, name: str) -> np.ndarray:
        member, array = self._members[name], self.leaf(name)
        if isinstance(array, InflatedMember):
            array = array.part(0, math.prod(member.shape)).reshape(member.shape)
        # Only values in C order and in the machine's order of bytes have addresses.
        return np.ascontiguousarray(array, member.dtype.newbyteorder("=")).reshape(member.shape)

    def leaf(self, name: str) -> Any:
        """A view of the file, or a member to be inflated piece by piece; one in Fortran's order is inflated whole."""
        member = self._members[name]
        try:
            if member.is_stored:
                array = self._mapped(member)
            elif member.fortran_order:
                array = InflatedMember(self, name).part(0, math.prod(member.shape))
            else:
                return InflatedMember(self, name)
        except _CORRUPT as error:
            raise self._corrupt(name, error) from None
        return array.reshape(member.shape[::-1]).transpose() if member.fortran_order else array.reshape(member.shape)

    def close(self) -> None:
        """Closes the file."""
        self._archive.close()
        super().close()

    def _corrupt(self, name: str, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: leaf {quoted(name)}: {printable(str(error) or type(error).__name__)}")

    def _add(self, info: zipfile.ZipInfo) -> None:
        name = info.filename.removesuffix(SUFFIX)
        try:
            with self._archive.open(info) as file:
                dtype, sizes, fortran_order = read_npy_header(file)
                header_bytes = file.tell()
            shape = checked_shape(sizes)
        except _CORRUPT as error:
            raise self._corrupt(name, error) from None
        if code_of_dtype(dtype.newbyteorder("=")) is None:
            raise TypeError(f"{self.path}: leaf {quoted(name)}: dtype {printable(str(dtype))} {_unsupported(dtype)}")
        size = header_bytes + math.prod(shape) * dtype.itemsize
        if info.file_size != size:
            raise ValueError(
                f"{self.path}: leaf {quoted(name)}: expected {quoted(size)} bytes for {dtype} {quoted(shape)}, "
                f"got {info.file_size}"
            )
        if name in self._members:
            raise ValueError(f"{self.path}: leaf {quoted(name)} is there twice")
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
            self._file.check_whole()
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


class InflatedMember:
    """A compressed member's elements, inflated from the first to the last, so that memory holds a piece of them."""

    def __init__(self, checkpoint: NpzCheckpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name
        self._member = checkpoint._members[name]
        opened = checkpoint._archive.open(self._member.info)
        self._file = io.BufferedReader(cast(io.RawIOBase, opened))
        self._file.read(self._member.header_bytes)
        self._left = math.prod(self._member.shape)

    def part(self, begin: int, end: int) -> np.ndarray:
        """The elements [begin, end); each part begins where the last one has ended.

        Raises:
            ValueError: the member is damaged; the message names the file and the leaf.
        """
        assert end - begin <= self._left
        elements = np.empty(end - begin, self._member.dtype)
        self._left -= elements.size
        try:
            if self._file.readinto(elements.view(np.uint8).data) != elements.nbytes:
                raise ValueError("truncated: it has fewer elements than its header says")
            if not self._left:
                self._file.read(1)  # the end, where the checksum is compared
                self._file.close()
        except _CORRUPT as error:
            raise self._checkpoint._corrupt(self._name, error) from None
        return elements


def _unsupported(dtype: np.dtype) -> str:
    """Why a dtype is refused: np.savez writes those of ml_dtypes, bf16 and fp8, without their names."""
    if dtype.kind == "V" and dtype.names is None and dtype.itemsize <= 2:
        name = "bf16" if dtype.itemsize == 2 else "fp8"
        return f"is not supported: .npz has no {name}, if that is what np.savez was given: save it as .safetensors"
    return "is not supported"
