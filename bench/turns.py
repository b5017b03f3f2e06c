"""How ranks time a call together, and the limit that takes its turn beside the contenders."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from all_reduce_cases import MEGABYTE
from fastagg import _core

_PROBE_BYTES = 25 * MEGABYTE  # at least, so that it is memory that is measured, not caches
_PROBE_CHUNK = 64 << 10


def seconds(call: Callable[[], Any], calls: int = 1) -> float:
    """How long calls take on the slowest rank, where all ranks begin together."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    longest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)


class Limit:
    """Every rank reads as many bytes as it reduces and writes as many, without arithmetic.

    Where that is less than the caches hold, it is the time that memory would take: the walk is longer, and its time
    counts in proportion.
    """

    def __init__(self, size: int, world: int) -> None:
        self._bytes = max(size, _PROBE_BYTES)
        self._scale = size / self._bytes
        self._source, self._out = torch.ones(self._bytes // 4), torch.ones(self._bytes // 4)
        self._processors = min(world, int(os.environ["PROCESSORS"]))
        self.seconds, self.processor_shares = list[float](), list[float]()

    def take_turn(self) -> None:
        """One walk; keeps its time, and the share of the processors' time that the ranks had."""
        elapsed = seconds(self._walk)
        processor_seconds = torch.tensor(self._processor_seconds)
        dist.all_reduce(processor_seconds)
        self.seconds.append(elapsed * self._scale)
        self.processor_shares.append(float(processor_seconds) / (elapsed * self._processors))

    def _walk(self) -> None:
        begin, out = time.process_time(), self._out.data_ptr()
        _core.stream_probe([self._source.data_ptr()], self._bytes, out, self._bytes, _PROBE_CHUNK)
        self._processor_seconds = time.process_time() - begin
