"""The backends that the tests run on: every instruction set, the CUDA kernels on the CPU, and a real GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import fastagg
from fastagg import _core
from fastagg._native import backend as native_backend

NAMES = ("cpu-scalar", "cpu-avx2", "cpu-avx512", "cpu-neon", "cuda-on-cpu", "cuda")

# Around lanes, blocks of scales, chunks and tasks.
SMALL = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257]
LARGE = [4095, 4096, 4097, 65535, 65536, 65537, 2 * 16 * 4096 + 4097]
# A CUDA thread is a thread there: few sizes, around a warp, a block of scales and a task.
FEW = [1, 3, 8, 33, 257, 1025]


class Backend:
    """One backend, and how arrays get to it and back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_cpu = name.startswith("cpu-")
        self.sizes = FEW if name == "cuda-on-cpu" else SMALL + LARGE
        self.large = 1025 if name == "cuda-on-cpu" else 2 * 16 * 4096 + 4097

    def put(self, array: np.ndarray) -> Any:
        """The array where the backend reads it."""
        return array

    def get(self, array: Any) -> np.ndarray:
        """The array as NumPy's."""
        return array

    def put_all(self, arrays: list[np.ndarray]) -> list[Any]:
        """Several arrays at once."""
        return [self.put(array) for array in arrays]


class Cuda(Backend):
    """A real GPU, through torch."""

    def put(self, array: np.ndarray) -> Any:
        import torch

        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda()
        return torch.from_numpy(array).cuda()

    def get(self, array: Any) -> np.ndarray:
        import torch

        if array.dtype == torch.bfloat16:
            import ml_dtypes

            return array.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.cpu().numpy()


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Forces an instruction set for a while, without any other module in the CPU's place."""
    before, override = _core.isa(), native_backend.backend_for("cpu")
    _core.force_isa(name)
    native_backend.override_cpu(None)
    try:
        yield
    finally:
        _core.force_isa(before)
        native_backend.override_cpu(override)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of threads for a while."""
    fastagg.set_num_threads(count)
    try:
        yield
    finally:
        fastagg.set_num_threads(0)


def on_scalar(function: Callable[[], Any]) -> Any:
    """What the scalar loops make of it, on one thread: what every backend's bits are compared with."""
    with isa("scalar"), threads(1):
        return function()
