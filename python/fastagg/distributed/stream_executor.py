"""A group's exchanges on a device: queued on a stream of their own, so that nobody waits for them but the device."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class DeviceLine:
    """Exchanges one after the other, in the order in which they were asked for, behind what the caller has queued.

    Where the caller's stream is being captured into a CUDA graph, the exchanges become part of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._module = device, torch.get_device_module(device)
        with torch.cuda.device(device.index if device.type == "cuda" else -1):  # -1: leave it as it is
            self._stream = self._module.Stream(priority=-1)  # before what computes: others wait for it
        self._busy = threading.Lock()

    def run(self, work: Callable[[], object], tensors: Sequence[torch.Tensor] = ()) -> None:
        """Queues the work; what the caller queues from now on comes behind it."""
        self.begin(work, tensors).wait()

    def begin(self, work: Callable[[], object], tensors: Sequence[torch.Tensor]) -> DeviceWork:
        """Queues the work, which uses these tensors; returns what to wait for."""
        with self._busy:
            self._stream.wait_stream(self._module.current_stream(self.device))
            with self._module.stream(self._stream):
                work()
                future = self._future()
                future.set_result(list(tensors))  # notes where the stream is
                event = self._module.Event()
                event.record(self._stream)
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)  # their memory is not anybody else's until then
        return DeviceWork(self._module, self.device, event, future)

    def begin_future(self, work: Callable[[], object], result: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """Queues the work; whoever waits for the future's result lets his stream wait."""
        future = self._future()

        def work_and_tell() -> None:
            work()
            future.set_result(result)

        self.begin(work_and_tell, [result])
        return future

    def _future(self) -> torch.futures.Future[Any]:
        return torch.futures.Future(devices=[self.device] if self.device.type == "cuda" else None)


class DeviceWork:
    """An all-reduce that a device has before it."""

    def __init__(
        self, module: Any, device: torch.device, event: Any, future: torch.futures.Future[list[torch.Tensor]]
    ) -> None:
        self._module, self._device, self._event, self._future = module, device, event, future

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Lets the current stream wait until the tensors hold the result; the host goes on at once."""
        self._module.current_stream(self._device).wait_event(self._event)
        return True

    def is_completed(self) -> bool:
        """Whether the tensors hold the result."""
        return bool(self._event.query())

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Torch's future of the tensors, for `then` and `torch.futures.wait_all`."""
        return self._future
