"""The header of an .npy file: what stands before an array's elements."""

from __future__ import annotations

import io
import math
import tokenize
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np

from fastagg._quoting import printable

# All that NumPy's parser has been seen to raise for wrong bytes, beside its own ValueError.
_PARSER_ERRORS = (KeyError, TypeError, ValueError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError)
_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4, (3, 0): 4}
_LARGEST_HEADER = 10_000  # characters, as for np.load: deflated, a gigabyte of them is a megabyte


class NpyHeader(NamedTuple):
    """What an .npy file says of its array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@lru_cache(maxsize=4096)
def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The bytes before the elements of a C-ordered array, as `np.save` writes them."""
    stream = io.BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(stream, {"descr": description, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def read_npy_header(stream: IO[bytes]) -> NpyHeader:
    """Reads up to the first element.

    Raises:
        ValueError: that is no header of version 1, 2 or 3.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _LENGTH_BYTES:
            raise ValueError(f"version {version}")
        length = int.from_bytes(stream.read(_LENGTH_BYTES[version]), "little")
        if length > _LARGEST_HEADER:
            raise ValueError(f"{length} bytes (at most {_LARGEST_HEADER})")
        text = stream.read(length)
        if version == (3, 0):  # in UTF-8, for names of fields, which no dtype that is supported has
            text = text.decode().encode("latin-1")
        header = io.BytesIO(length.to_bytes(2, "little") + text)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(header)
    except _PARSER_ERRORS as error:
        raise ValueError(f"its header is no .npy header: {printable(str(error))}") from None
    return NpyHeader(dtype, tuple(map(int, shape)), is_fortran)  # NumPy takes bools for sizes
