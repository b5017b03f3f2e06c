"""A rank of the all-reduce benchmark: `all_reduce_ranks.py EXCHANGE [--quick]`, started by `all_reduce.py`.

Contenders take turns on one tensor, round by round; each answer is checked before it is timed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from all_reduce_cases import LIMIT, Exchange, exchange_named
from all_reduce_contenders import Call, Contender, contenders
from all_reduce_rows import ExchangeRow
from launch import keep, leave, meet
from turns import Limit, seconds

_WARMUP_ROUNDS, _WARMUP_SECONDS = 2, 0.02  # at least
_ROUND_SECONDS, _MOST_CALLS = 0.01, 200  # calls too short for the clock are repeated


class Inputs:
    """Tensors whose mean every wire holds exactly: whole numbers b, as 4b on even ranks and -2b on odd ones."""

    def __init__(self, count: int, rank: int) -> None:
        generator = torch.Generator().manual_seed(count)
        self._mean = torch.randint(-3, 4, (count,), generator=generator, dtype=torch.float32)
        self._factor = 4 if rank % 2 == 0 else -2
        self._own = self._mean * self._factor
        self.x = torch.empty_like(self._mean)

    def refill(self) -> None:
        """Puts this rank's values where they are reduced."""
        self.x.copy_(self._own)

    def check(self, contender: Contender, call: Call, world: int) -> None:
        """Asserts that a call leaves the mean, or the sum."""
        mean = self._mean if contender.wire != "sign" else torch.where(self._mean < 0, -1.0, 1.0)
        self.x.copy_(mean * self._factor)
        call()
        right = torch.equal(self.x, mean * world if contender.is_sum else mean)
        assert right, f"{contender.name}: wrong for {len(mean)} elements"


class Rounds:
    """A contender's rounds."""

    def __init__(self, contender: Contender, inputs: Inputs, world: int) -> None:
        """Checks the answer, warms up, and finds how many calls make a round."""
        self.contender, self._inputs = contender, inputs
        self._call = contender.prepare(inputs.x)
        self.calls, self.seconds, self.sent_bytes = 1, list[float](), list[float]()
        inputs.check(contender, self._call, world)
        while len(self.seconds) < _WARMUP_ROUNDS or sum(self.seconds) < _WARMUP_SECONDS:
            self.take_turn()
        self.calls = max(1, min(_MOST_CALLS, int(_ROUND_SECONDS / min(self.seconds))))
        self.seconds, self.sent_bytes = [], []

    def take_turn(self) -> None:
        """One round."""
        self._inputs.refill()
        before = link_bytes()
        self.seconds.append(seconds(self._call, self.calls) / self.calls)
        self.sent_bytes.append((link_bytes() - before) / self.calls)


def link_bytes() -> int:
    """What this host has sent so far over the link to the other; 0 without one."""
    link = os.environ.get("GLOO_SOCKET_IFNAME")
    return int(Path(f"/sys/class/net/{link}/statistics/tx_bytes").read_text()) if link else 0


def measure(exchange: Exchange, size: int, found: list[Contender], rounds: int) -> list[ExchangeRow]:
    """The rounds of all contenders at one size, and of the limit."""
    inputs, limit = Inputs(size // 4, dist.get_rank()), Limit(size, exchange.world)
    taking_part = [Rounds(contender, inputs, exchange.world) for contender in found]
    for _ in range(rounds):
        limit.take_turn()
        for one in taking_part:
            one.take_turn()
    place = (exchange.key, exchange.world, exchange.hosts, size)
    rows = [ExchangeRow(*place, LIMIT, "", "memory", 1, limit.seconds, None, limit.processor_shares)]
    for one in taking_part:
        who = (one.contender.name, one.contender.package, one.contender.transport())
        sent = median(one.sent_bytes) if exchange.hosts > 1 else None
        rows.append(ExchangeRow(*place, *who, one.calls, one.seconds, sent, []))
    return rows


def main(key: str, *options: str) -> None:
    """Measures an exchange, size by size."""
    quick = "--quick" in options
    exchange = exchange_named(key).at_size(quick)
    rank = meet()
    available = contenders()
    found = [available[name] for name in exchange.contenders]
    for size in exchange.sizes:
        for row in measure(exchange, size, found, exchange.rounds_at(size, quick)):
            if rank == 0:
                keep(asdict(row))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
