"""PyTorch tensors as addresses."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from fastagg._arrays.library import View, unsupported
from fastagg._native import core
from fastagg._native.codes import Code, code_of_dtype

HUGE = 4 << 20  # bytes from which a fresh block is worth huge pages


class _KeptTensor:
    """A tensor that is kept; torch can move or resize its storage, as share_memory_() and torch.multiprocessing do."""

    __slots__ = ("_begin", "_data_ptr", "array")

    def __init__(self, array: Any) -> None:
        self.array, self._data_ptr = array, array.data_ptr
        self._begin = self._data_ptr()

    def address(self) -> int:
        """See `Kept`."""
        begin: int = self._data_ptr()
        if begin != self._begin:
            self._check_memory()
            self._begin = begin
        return begin

    def _check_memory(self) -> None:
        storage_end = self.array.untyped_storage().nbytes()
        if (self.array.storage_offset() + self.array.numel()) * self.array.itemsize > storage_end:
            raise ValueError("its tensors have lost their memory: their storage was freed or made smaller")


class Torch:
    """PyTorch tensors on CPU and CUDA devices."""

    name = "torch"
    memory_moves = True

    def __init__(self) -> None:
        import torch

        from fastagg._arrays import plain_tensors

        self.torch, self.plain_tensors = torch, plain_tensors
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
        addresses = self.addresses([array])  # of almost all tensors: what it takes needs no further look
        if not addresses:
            self.plain_tensors.check_plain(array)
        code = code_of_dtype(array.dtype)
        if code is None:
            raise unsupported(array.dtype)
        if not addresses:
            array = self.plain_tensors.in_order(array)
        address = addresses[0] if addresses else array.data_ptr()
        return View(address, code, tuple(array.shape), self.device_of(array), array)

    def writable_view(self, array: Any) -> View:
        """See `Kind`."""
        view = self.view(array)
        if view.address != array.data_ptr():
            raise ValueError("expected a contiguous tensor, and no negative view (resolve_neg())")
        self.note_write(array)
        return view

    def note_write(self, array: Any) -> None:
        """See `Kind`. An autograd graph that has saved the tensor must notice."""
        if not array.is_inference():
            self.torch.autograd.graph.increment_version(array)

    def keep(self, array: Any) -> _KeptTensor:
        """See `Kind`."""
        return _KeptTensor(array.detach())

    def alias(self, array: Any) -> Any:
        """See `Kind`."""
        return array.detach()

    def address(self, array: Any) -> int:
        """See `Kind`."""
        return int(array.data_ptr())

    def addresses(self, arrays: list[Any]) -> list[int]:
        """See `Kind`."""
        if self.exchange is not None:
            return core.tensor_addresses(self.exchange, self.plain, self.torch.Tensor.is_neg, arrays)
        return self._addresses_one_by_one(arrays)

    def _addresses_one_by_one(self, arrays: list[Any]) -> list[int]:
        addresses: list[int] = []
        with suppress(RuntimeError):  # nested tensors have no shape, vmap's no address
            self._append_addresses(arrays, addresses)
        return addresses

    def _append_addresses(self, arrays: list[Any], addresses: list[int]) -> None:
        first, plain = arrays[0], self.plain
        if first.layout is not self.torch.strided or first.device.type not in ("cpu", "cuda"):
            return
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
            core.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
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
