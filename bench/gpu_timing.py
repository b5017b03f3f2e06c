"""How the contenders of a case take turns on the device, beside a copy that is the device's limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

import gpu_machine

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]

COPY = "copy"
_COPY_ELEMENTS = 1 << 27  # of float32: half a gibibyte, read once and written once
# Seconds that a turn takes at least, so that what is not the operation does not count.
_TURN = 3e-3
_MOST_CALLS = 50
# How long the device waits, in times that queueing took a moment ago; it counts cycles, at no more than this many.
_MARGIN, _LEAST_WAIT, _CYCLES_A_SECOND = 1.5, 1e-3, 2.1e9


class Copy:
    """A copy from device memory to device memory."""

    def __init__(self) -> None:
        self._source = torch.ones(_COPY_ELEMENTS, device=gpu_machine.DEVICE)
        self._out = torch.zeros_like(self._source)
        self.bytes = 2 * self._source.nbytes

    def __call__(self) -> None:
        """One copy."""
        self._out.copy_(self._source)


def device_seconds(call: Call, calls: int) -> float:
    """The device's time for a call, from an event before the first of several to one behind the last."""
    torch.cuda.synchronize()
    return _seconds_between_events(call, calls)


def _seconds_between_events(call: Call, calls: int) -> float:
    begin, end = _event(), _event()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / calls


def _keep_waiting(seconds: float) -> None:
    torch.cuda._sleep(int(seconds * _CYCLES_A_SECOND))  # type: ignore[no-untyped-call, unused-ignore]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]


def waiting_seconds(call: Call, calls: int) -> float:
    """The device's time for a call that the host has queued already: while it does, the device is kept waiting.

    As `device_seconds` for a call that itself waits for the device.
    """
    torch.cuda.synchronize()
    begin_of_queueing = time.perf_counter()
    for _ in range(calls):
        call()
    queueing = time.perf_counter() - begin_of_queueing
    torch.cuda.synchronize()
    _keep_waiting(queueing * _MARGIN + _LEAST_WAIT)
    return _seconds_between_events(call, calls)


def host_seconds(call: Call, calls: int) -> float:
    """The host's time until a call returns, on a device that has nothing else to do."""
    elapsed = 0.0
    for _ in range(calls):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        elapsed += time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / calls


def calls_of_a_turn(call: Call, clock: Clock) -> int:
    """Calls that make a turn long enough; the first ones warm everything up."""
    clock(call, 2)
    return max(1, min(_MOST_CALLS, math.ceil(_TURN / clock(call, 2))))


def take_turns(contenders: Mapping[str, Call], clock: Clock, turns: int) -> dict[str, list[float]]:
    """Seconds a call of every contender, turn by turn."""
    calls = {name: calls_of_a_turn(call, clock) for name, call in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, call in contenders.items():
            seconds[name].append(clock(call, calls[name]))
    return seconds
