"""PyTorch tensors as addresses."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastagg import _core
from fastagg._codes import Code, code_of_dtype
from fastagg._kind import View, unsupported

HUGE = 4 << 20  # bytes from which a fresh block is worth huge pages


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
            raise unsupported(array.dtype)
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
