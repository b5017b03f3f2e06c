"""The header of an .npy file: what stands before an array's elements."""

from __future__ import annotations

import io
import math
import tokenize
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np

# All that NumPy's parser has been seen to raise for wrong bytes, beside its own ValueError.
_PARSER_ERRORS = (KeyError, ValueError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError)


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
        ValueError: that is no header of version 1 or 2.
    """
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = readers[version](stream)
    except _PARSER_ERRORS as error:
        raise ValueError(f"its header is no .npy header: {error}") from None
    return NpyHeader(dtype, tuple(map(int, shape)), is_fortran)  # NumPy takes bools for sizes
