"""Arrays of every library as addresses: the one place that knows NumPy, PyTorch, CuPy and DLPack."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from fastagg import _core
from fastagg._codes import ELEMENT_BYTES, Code, code_of_dtype, name_of

HUGE = 4 << 20  # bytes from which a fresh block is worth huge pages


class View(NamedTuple):
    """What the native code needs to know of one array, and the object that keeps its memory alive."""

    address: int
    code: Code
    shape: tuple[int, ...]
    device: str
    owner: Any

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """First address, and the one behind the last byte."""
        return self.address, self.address + self.elements * ELEMENT_BYTES[self.code]


class Kind(Protocol):
    """One array library."""

    name: str

    def view(self, array: Any) -> View:
        """The array as an address; a contiguous copy of it where its own memory is not."""
        ...

    def writable_view(self, array: Any) -> View:
        """The array's own memory.

        Raises:
            ValueError: it cannot be written in one piece.
        """
        ...

    def address(self, array: Any) -> int:
        """Where an array that `empty` made begins."""
        ...

    def addresses(self, arrays: list[Any]) -> list[int]:
        """Addresses of the leading arrays that look just like the first one: the fast path for many clients."""
        ...

    def dtype_of(self, array: Any) -> Any:
        """The array's dtype, as its library spells it."""
        ...

    def device_of(self, array: Any) -> str:
        """The array's device: "cpu" or "cuda:0"."""
        ...

    def dtype_for(self, code: Code) -> Any:
        """The library's dtype for a floating code."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        """A new array, its contents undefined."""
        ...

    def empty_like(self, array: Any) -> Any:
        """The same for an array's shape, dtype and device; `addresses` has taken it."""
        ...

    def note_write(self, array: Any) -> None:
        """Prepares for a write into an array that `addresses` has taken.

        Raises:
            ValueError: it cannot be written.
        """
        ...

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        """A new array of zeros."""
        ...

    def stream(self, device: str) -> int:
        """The caller's current stream on a CUDA device."""
        ...

    def dtype_named(self, name: str) -> Any:
        """The library's dtype of that plain name."""
        ...

    def to_numpy(self, array: Any) -> np.ndarray:
        """A copy in the host's memory."""
        ...

    def from_numpy(self, array: np.ndarray, device: str) -> Any:
        """A copy on a device."""
        ...


def _unsupported(dtype: Any) -> TypeError:
    return TypeError(f"dtype {name_of(dtype)} is not supported (expected a real floating, integer or bool dtype)")


class NumPy:
    """NumPy arrays; bf16 is ml_dtypes.bfloat16."""

    name = "numpy"

    def view(self, array: Any) -> View:
        """See `Kind`."""
        code = code_of_dtype(array.dtype)
        if code is None:
            raise _unsupported(array.dtype)
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError("expected a plain array, got a masked one: fill it first")
        if not (array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative):
            array = np.require(array, array.dtype.newbyteorder("="), ["C", "A"])
        return View(_core.numpy_address(array), code, array.shape, "cpu", array)

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

    def address(self, array: Any) -> int:
        """See `Kind`."""
        return _core.numpy_address(array)

    def addresses(self, arrays: list[Any]) -> list[int]:
        """See `Kind`."""
        return _core.numpy_addresses(arrays)

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


class Torch:
    """PyTorch tensors on CPU and CUDA devices."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.plain = (torch.Tensor, torch.nn.Parameter)
        self.exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # from torch 2.10 on
        self.cpu = torch.device("cpu")

    def adopt(self, array: Any) -> Any:
        """CUDA memory of another library, in place; what is queued there comes before what we queue."""
        if hasattr(array, "__dlpack__"):
            return self.torch.utils.dlpack.from_dlpack(array)
        tensor = self.torch.as_tensor(array)
        stream = array.__cuda_array_interface__.get("stream")  # torch does not look at it
        if stream is not None:
            current = self.torch.cuda.current_stream(tensor.device)
            theirs: Any = self.torch.cuda.ExternalStream  # torch has no types for it
            current.wait_stream(theirs(stream, tensor.device))
        return tensor

    def view(self, array: Any) -> View:
        """See `Kind`."""
        code = code_of_dtype(array.dtype)
        if code is None:
            raise _unsupported(array.dtype)
        if array.layout is not self.torch.strided:
            raise TypeError(f"expected a dense tensor, got layout {array.layout}")
        if array.device.type not in ("cpu", "cuda"):
            raise TypeError(f"expected a tensor on a CPU or CUDA device, got {array.device}")
        if not array.is_contiguous() or array.is_neg():
            array = array.detach().resolve_neg().contiguous()
        if array.data_ptr() == 0 and array.numel():
            raise TypeError("expected a tensor with memory, got one without: clone it first")
        return View(array.data_ptr(), code, tuple(array.shape), self.device_of(array), array)

    def writable_view(self, array: Any) -> View:
        """See `Kind`."""
        view = self.view(array)
        if view.address != array.data_ptr():
            raise ValueError("expected a contiguous tensor")
        self.note_write(array)
        return view

    def note_write(self, array: Any) -> None:
        """See `Kind`. An autograd graph that has saved the tensor must notice."""
        if not array.is_inference():
            self.torch.autograd.graph.increment_version(array)

    def address(self, array: Any) -> int:
        """See `Kind`."""
        return int(array.data_ptr())

    def addresses(self, arrays: list[Any]) -> list[int]:
        """See `Kind`."""
        if self.exchange is not None:
            return _core.tensor_addresses(self.exchange, self.plain, self.torch.Tensor.is_neg, arrays)
        return self._addresses_one_by_one(arrays)

    def _addresses_one_by_one(self, arrays: list[Any]) -> list[int]:
        first, plain = arrays[0], self.plain
        addresses: list[int] = []
        if first.layout is not self.torch.strided or first.device.type not in ("cpu", "cuda"):
            return addresses
        dtype, shape, device, on_cpu = first.dtype, first.shape, first.get_device(), first.is_cpu
        for array in arrays:
            fits = (
                type(array) in plain
                and array.dtype is dtype
                and array.shape == shape
                and (array.is_cpu if on_cpu else array.is_cuda and array.get_device() == device)
                and array.is_contiguous()
                and not array.is_neg()
                and (array.data_ptr() or not array.numel())
            )
            if not fits:
                break
            addresses.append(array.data_ptr())
        return addresses

    def dtype_of(self, array: Any) -> Any:
        """See `Kind`."""
        return array.dtype

    def device_of(self, array: Any) -> str:
        """See `Kind`."""
        index = array.get_device()
        return "cpu" if index < 0 else f"cuda:{index}"

    def dtype_for(self, code: Code) -> Any:
        """See `Kind`."""
        return getattr(self.torch, code.name.lower())

    def empty(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        """See `Kind`."""
        return self._with_huge_pages(
            self.torch.empty(shape, dtype=dtype, device=self.cpu if device == "cpu" else device)
        )

    def empty_like(self, array: Any) -> Any:
        """See `Kind`. Half as long as `empty`, which must make sense of more arguments."""
        return self._with_huge_pages(self.torch.empty_like(array))

    def _with_huge_pages(self, tensor: Any) -> Any:
        """The tensor, whose memory nobody has touched yet."""
        if tensor.nbytes >= HUGE and tensor.is_cpu:
            _core.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
        return tensor

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: str) -> Any:
        """See `Kind`."""
        return self.torch.zeros(shape, dtype=dtype, device=device)

    def stream(self, device: str) -> int:
        """See `Kind`."""
        return 0 if device == "cpu" else int(self.torch.cuda.current_stream(device).cuda_stream)

    def dtype_named(self, name: str) -> Any:
        """See `Kind`."""
        return getattr(self.torch, name)

    def to_numpy(self, array: Any) -> np.ndarray:
        """See `Kind`."""
        return np.array(array.cpu().numpy())

    def from_numpy(self, array: np.ndarray, device: str) -> Any:
        """See `Kind`."""
        return self.torch.tensor(array, device=device)


class CuPy:
    """CuPy arrays."""

    name = "cupy"

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
            raise _unsupported(array.dtype)
        array = self.cupy.ascontiguousarray(array)
        return View(int(array.data.ptr), code, array.shape, f"cuda:{array.device.id}", array)

    def writable_view(self, array: Any) -> View:
        """See `Kind`."""
        if not array.flags.c_contiguous:
            raise ValueError("expected a C-contiguous array")
        return self.view(array)

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


_kinds: dict[str, Kind] = {"numpy": NumPy()}
_MAKERS: dict[str, type[Torch] | type[CuPy]] = {"cupy": CuPy, "torch": Torch}
# Of the libraries' own types, which almost all arrays are.
_kinds_of_types: dict[type, Kind] = {np.ndarray: _kinds["numpy"]}


def kind_named(name: str) -> Kind:
    """The array library of that name."""
    if name not in _kinds:
        kind = _MAKERS[name]()
        _kinds[name] = kind
        _kinds_of_types.update(dict.fromkeys(kind.plain, kind))
    return _kinds[name]


def kind_of(array: Any) -> Kind | None:
    """The library that an array belongs to, or None if it is no array that fastagg takes as it is."""
    kind = _kinds_of_types.get(type(array))
    return kind if kind is not None else _kind_of_another_type(array)


def _kind_of_another_type(array: Any) -> Kind | None:
    if isinstance(array, (np.ndarray, np.generic)):
        return _kinds["numpy"]
    for name, type_name in (("torch", "Tensor"), ("cupy", "ndarray")):
        module = sys.modules.get(name)
        if module is not None and isinstance(array, getattr(module, type_name, ())):
            return kind_named(name)
    return None


def adopt(array: Any) -> tuple[Kind, Any]:
    """The array as one of a library we know: itself, or its memory seen through DLPack or the CUDA array interface.

    Raises:
        TypeError: it is no array.
    """
    kind = kind_of(array)
    if kind is not None:
        return kind, np.asarray(array) if isinstance(array, np.generic) else array
    on_cpu = hasattr(array, "__dlpack__") and int(array.__dlpack_device__()[0]) == 1
    if on_cpu:
        return _kinds["numpy"], _numpy_from_dlpack(array)
    if hasattr(array, "__dlpack__") or hasattr(array, "__cuda_array_interface__"):
        kind = _cuda_library()
        return kind, kind.adopt(array)
    hint = ": pass its state_dict()" if hasattr(array, "state_dict") else ""
    raise TypeError(f"expected an array (NumPy, PyTorch, CuPy or DLPack), got {type(array).__name__}{hint}")


def _numpy_from_dlpack(array: Any) -> np.ndarray:
    """An array in the host's memory, in place.

    Raises:
        TypeError: NumPy has no such dtype (bf16 among them).
    """
    try:
        return np.from_dlpack(array)
    except (RuntimeError, BufferError) as error:
        raise TypeError(f"NumPy cannot take this array through DLPack: {error}") from None


def _cuda_library() -> Torch | CuPy:
    """What holds CUDA memory that came through an interface: CuPy where installed, else torch."""
    for name in _MAKERS:
        try:
            kind_named(name)
        except ImportError:
            continue
        return cast("Torch | CuPy", _kinds[name])
    raise TypeError("CUDA arrays need CuPy or PyTorch: pip install cupy-cuda13x, or torch")
