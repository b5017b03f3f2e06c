"""CuPy arrays as addresses."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastagg._arrays.library import FixedMemory, View, unsupported
from fastagg._arrays.numpy import NumPy
from fastagg._native.codes import Code, code_of_dtype


class CuPy:
    """CuPy arrays."""

    name = "cupy"
    memory_moves = False

    def __init__(self) -> None:
        import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self.cupy, self.plain = cupy, (cupy.ndarray,)

    def adopt(self, array: Any) -> Any:
        """CUDA memory of another library, in place."""
        return self.cupy.from_dlpack(array) if hasattr(array, "__dlpack__") else self.cupy.asarray(array)

    def view(self, array: Any) -> View:
        """See `Kind`."""
        code = code_of_dtype(array.dtype)
        if code is None:
            raise unsupported(array.dtype)
        array = self.cupy.ascontiguousarray(array)
        return View(int(array.data.ptr), code, array.shape, f"cuda:{array.device.id}", array)

    def writable_view(self, array: Any) -> View:
        """See `Kind`."""
        if not array.flags.c_contiguous:
            raise ValueError("expected a C-contiguous array")
        return self.view(array)

    def keep(self, array: Any) -> FixedMemory:
        """See `Kind`."""
        return FixedMemory(array.view(), int(array.data.ptr))

    def alias(self, array: Any) -> Any:
        """See `Kind`."""
        return array.view()

    def address(self, array: Any) -> int:
        """See `Kind`."""
        return int(array.data.ptr)

    def addresses(self, arrays: list[Any]) -> list[int]:
        """See `Kind`. Every array is looked at one by one."""
        return []

    def dtype_of(self, array: Any) -> Any:
        """See `Kind`."""
        return array.dtype

    def device_of(self, array: Any) -> str:
        """See `Kind`."""
        return f"cuda:{array.device.id}"

    def dtype_for(self, code: Code) -> Any:
        """See `Kind`."""
        return NumPy().dtype_for(code)

    def empty(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        """See `Kind`."""
        with self.cupy.cuda.Device(int(device.removeprefix("cuda:"))):
            return self.cupy.empty(shape, dtype)

    def empty_like(self, array: Any) -> Any:
        """See `Kind`."""
        with array.device:
            return self.cupy.empty(array.shape, array.dtype)

    def note_write(self, array: Any) -> None:
        """See `Kind`. CuPy has no arrays that must not be written."""

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        """See `Kind`."""
        with self.cupy.cuda.Device(int(device.removeprefix("cuda:"))):
            return self.cupy.zeros(shape, dtype)

    def stream(self, device: str) -> int:
        """See `Kind`. CuPy keeps a current stream for each device."""
        with self.cupy.cuda.Device(int(device.removeprefix("cuda:"))):
            return int(self.cupy.cuda.get_current_stream().ptr)

    def dtype_named(self, name: str) -> Any:
        """See `Kind`."""
        return NumPy().dtype_named(name)

    def to_numpy(self, array: Any) -> np.ndarray:
        """See `Kind`."""
        return np.array(array.get())

    def from_numpy(self, array: np.ndarray, device: str) -> Any:
        """See `Kind`."""
        with self.cupy.cuda.Device(int(device.removeprefix("cuda:"))):
            return self.cupy.array(array)
