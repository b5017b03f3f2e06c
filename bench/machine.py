"""The machine: what it is, and its limit, which is the streaming probe's time for the same traffic."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastagg
from fastagg import _core
from inputs import Inputs, bytes_of
from rows import QUIET_SHARE

# Bytes read from one buffer before the next one's turn: which is fastest depends on the processor and on K.
_CHUNKS = tuple(1024 * kibibytes for kibibytes in (1, 4, 16, 64, 256, 1024))
_TRIES = 3
# Seconds to wait for a busy machine before looking again, and in all for a case.
_PAUSE, _PATIENCE = 0.2, 20.0


class Limit:
    """Reading every input once and writing one result, on the same threads as fastagg, without arithmetic.

    The probe reads the inputs' own memory where each is one array. A state_dict's traffic, or that of codes and scales,
    runs over one buffer a client, of the same library and size, so that it is a single walk.
    """

    def __init__(self, inputs: Inputs, quick: bool) -> None:
        case = inputs.case
        self.walks = 1
        self.buffers, self.out = _buffers(inputs)
        if case.operation == "accumulator":  # a sum must be read and written for every batch
            self.walks = case.clients // case.batch
            self.buffers = [*self.buffers[: case.batch], _touched(inputs, inputs.result_bytes)]
        self._addresses = [_address(buffer) for buffer in self.buffers]
        self._source_bytes, self._out_bytes = int(self.buffers[0].nbytes), int(self.out.nbytes)
        self._chunk = min(_CHUNKS, key=self._quickest)
        self._threads, self._patience = fastagg.get_num_threads(), 0.0 if quick else _PATIENCE

    def __call__(self) -> None:
        """One run of the probe."""
        for _ in range(self.walks):
            self._walk(self._chunk)

    @property
    def bytes(self) -> int:
        """Bytes that the operation cannot but read and write."""
        return self.walks * (len(self._addresses) * self._source_bytes + self._out_bytes)

    def timed(self) -> tuple[float, float]:
        """The probe's seconds, and its share of its threads' processors; again while others use those too much.

        A thread that waits for memory still holds its processor: a share below 1 is time that somebody else had.
        """
        while True:
            processor_begin = time.process_time()
            elapsed = seconds(self)
            share = (time.process_time() - processor_begin) / (elapsed * self._threads)
            if share >= QUIET_SHARE or self._patience <= 0:
                return elapsed, share
            time.sleep(_PAUSE)
            self._patience -= _PAUSE + elapsed

    def _quickest(self, chunk: int) -> float:
        return min(seconds(lambda: self._walk(chunk)) for _ in range(_TRIES))

    def _walk(self, chunk: int) -> None:
        _core.stream_probe(self._addresses, self._source_bytes, _address(self.out), self._out_bytes, chunk)


def _buffers(inputs: Inputs) -> tuple[list[Any], Any]:
    """One array a client, and one for the result."""
    sizes = {bytes_of(update) for update in inputs.updates}
    assert len(sizes) == 1, "all clients send as much"
    if not any(isinstance(side, (dict, fastagg.Quantized)) for side in (inputs.updates[0], inputs.out)):
        return inputs.updates, inputs.out
    sources = [_touched(inputs, size) for size in sizes for _ in inputs.updates]
    return sources, _touched(inputs, inputs.result_bytes)


def _touched(inputs: Inputs, size: int) -> Any:
    """A float32 array of the case's library, written once."""
    if inputs.case.library == "numpy":
        return np.full(size // 4, 0.5, np.float32)
    import torch

    return torch.full((size // 4,), 0.5)


def _address(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr())


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def use_all_processors() -> int:
    """Gives fastagg and torch as many threads as there are processors; returns how many."""
    processors = int(fastagg.build_info()["processors"])
    fastagg.set_num_threads(processors)
    try:
        import torch
    except ImportError:
        return processors
    torch.set_num_threads(processors)
    return processors


def describe() -> dict[str, Any]:
    """Processor, memory and versions, as plain values."""
    build = fastagg.build_info()
    packages = ("numpy", "torch", "flwr", "nvflare", "mpi4py", "pytest-benchmark")
    return {
        "processor": _processor(),
        "processors": build["processors"],
        "memory_gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": build["python"],
        "fastagg": {key: build[key] for key in ("version", "compiler", "isa", "threads")},
        "packages": {name: version for name in packages if (version := _version(name)) is not None},
    }


def _processor() -> str:
    """The processor's name, which only Linux tells in full."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
