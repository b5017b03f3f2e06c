"""NumPy arrays as addresses."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastagg._arrays.library import FixedMemory, View, unsupported
from fastagg._native import core
from fastagg._native.codes import Code, code_of_dtype


class NumPy:
    """NumPy arrays; bf16 is ml_dtypes.bfloat16."""

    name = "numpy"
    memory_moves = False

    def view(self, array: Any) -> View:
        """See `Kind`."""
        code = code_of_dtype(array.dtype)
        if code is None:
            raise unsupported(array.dtype)
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError("expected a plain array, got a masked one: fill it first")
        if not (array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative):
            array = np.require(array, array.dtype.newbyteorder("="), ["C", "A"])
        return View(core.numpy_address(array), code, array.shape, "cpu", array)

    def writable_view(self, array: Any) -> View:
        """See `Kind`."""
        flags = array.flags
        if not (flags.c_contiguous and flags.aligned and array.dtype.isnative):
            raise ValueError("expected a writable, C-contiguous, aligned array")
        self.note_write(array)
        return self.view(array)

    def note_write(self, array: Any) -> None:
        """See `Kind`."""
        if not array.flags.writeable:
            raise ValueError("expected a writable, C-contiguous, aligned array")

    def keep(self, array: Any) -> FixedMemory:
        """See `Kind`."""
        return FixedMemory(array.view(np.ndarray), core.numpy_address(array))

    def alias(self, array: Any) -> Any:
        """See `Kind`."""
        return array.view()

    def address(self, array: Any) -> int:
        """See `Kind`."""
        return core.numpy_address(array)

    def addresses(self, arrays: list[Any]) -> list[int]:
        """See `Kind`."""
        return core.numpy_addresses(arrays)

    def dtype_of(self, array: Any) -> Any:
        """See `Kind`."""
        dtype = array.dtype
        return dtype if dtype.isnative else dtype.newbyteorder("=")

    def device_of(self, array: Any) -> str:
        """See `Kind`."""
        return "cpu"

    def dtype_for(self, code: Code) -> Any:
        """See `Kind`."""
        if code != Code.BFLOAT16:
            return np.dtype(code.name.lower())
        try:
            import ml_dtypes
        except ImportError:
            raise TypeError("NumPy has bf16 only with ml_dtypes: pip install ml_dtypes") from None
        return np.dtype(ml_dtypes.bfloat16)

    def empty(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        """See `Kind`. NumPy itself asks for huge pages."""
        return np.empty(shape, dtype)

    def empty_like(self, array: Any) -> Any:
        """See `Kind`."""
        return np.empty(array.shape, array.dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        """See `Kind`."""
        return np.zeros(shape, dtype)

    def stream(self, device: str) -> int:
        """See `Kind`."""
        return 0

    def dtype_named(self, name: str) -> Any:
        """See `Kind`."""
        return self.dtype_for(Code.BFLOAT16) if name == "bfloat16" else np.dtype(name)

    def to_numpy(self, array: Any) -> np.ndarray:
        """See `Kind`."""
        return np.array(array)

    def from_numpy(self, array: np.ndarray, device: str) -> Any:
        """See `Kind`."""
        return array.copy()
