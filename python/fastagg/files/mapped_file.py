"""Files as memory: mapped for reading, with pages that can be given back."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from fastagg._native import core
from fastagg.files.plain_file import open_plain

_PAGE = mmap.PAGESIZE
# The first touch of a page maps its neighbours too, as far as one page table: those that have been given back as well.
_FAULT_AROUND = 2 << 20
_advise = getattr(ctypes.CDLL(None), "madvise", None)
if _advise is not None:
    _advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedFile:
    """A file's bytes as one read-only array; the mapping lives as long as any view of it.

    To read where the file was cut off meanwhile gives NaN as long as it is open; `check_whole` tells.
    """

    def __init__(self, path: Path) -> None:
        """Maps a file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is empty, or no plain file.
        """
        self._path = path
        with os.fdopen(open_plain(path), "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError(f"{path}: the file is empty")
            try:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:  # it keeps a descriptor of its own, and there may be too many
                raise OSError(error.errno, error.strerror, str(path)) from None
        self.bytes: np.ndarray = np.frombuffer(self._mapping, np.uint8)
        self._guards: list[core.MappedFileGuard] = []
        self.guard(self.span)

    def guard(self, span: tuple[int, int]) -> None:
        """Watches over another mapping of the file too."""
        self._guards.append(core.MappedFileGuard(span[0], span[1] - span[0]))

    def check_whole(self) -> None:
        """Raises ValueError if the file has become shorter since it was opened: what was read of it may be nothing."""
        if self._mapping.size() < self.bytes.size or any(guard.was_cut() for guard in self._guards):
            raise ValueError(f"{self._path}: the file was cut off while it was read")

    def close(self) -> None:
        """Ends the watch over the mapping, which stays."""
        self._guards.clear()

    def __len__(self) -> int:
        return self.bytes.size

    @property
    def span(self) -> tuple[int, int]:
        """First address of the mapping, and the one behind its last byte."""
        return span_of(self.bytes)

    def array(self, dtype: np.dtype, shape: tuple[int, ...], begin: int) -> np.ndarray:
        """A view of the bytes from `begin` on; not aligned where they are not."""
        end = begin + dtype.itemsize * int(np.prod(shape, dtype=object))
        return self.bytes[begin:end].view(dtype).reshape(shape)


def span_of(array: np.ndarray) -> tuple[int, int]:
    """First address of a contiguous array, and the one behind its last byte."""
    return array.ctypes.data, array.ctypes.data + array.nbytes


def spans_of_mapping(path: Path) -> list[tuple[int, int]]:
    """Where this process has mapped a file, whoever mapped it; nowhere on systems that do not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    name = os.fsencode(path.resolve()).replace(b"\n", rb"\012")
    lines = (line.split(maxsplit=5) for line in maps.read_bytes().split(b"\n"))
    ranges = (fields[0].split(b"-") for fields in lines if len(fields) == 6 and fields[5] == name)
    return [(int(begin, 16), int(end, 16)) for begin, end in ranges]


def release(span: tuple[int, int], mapped: list[tuple[int, int]]) -> None:
    """Gives back the pages of a span, as far as they are those of mapped files: read again, they are mapped again."""
    if _advise is None:
        return
    for begin, end in mapped:
        first = max(span[0] - _FAULT_AROUND, begin) // _PAGE * _PAGE
        last = -(-min(span[1], end) // _PAGE) * _PAGE
        if first < last:
            _advise(first, last - first, mmap.MADV_DONTNEED)
