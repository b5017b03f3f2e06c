"""The transport of any group, over Gloo: ranks send each other encoded pieces."""

from __future__ import annotations

import contextlib

import torch

from fastagg._native import core
from fastagg.distributed.exchange.arithmetic import HostArithmetic
from fastagg.distributed.exchange.encoded_rows import EncodedRows
from fastagg.distributed.exchange.exchange import Exchange, Outcome
from fastagg.distributed.transports.gloo_group import PrivateGroup
from fastagg.distributed.transports.gloo_rounds import Buffers, one_shot_rounds, run, shared_rounds


class BackendTransport:
    """Ranks of any hosts, over a group of fastagg's own."""

    name = "gloo backend"
    sees_signals = False

    def __init__(self, group: PrivateGroup, reason: str) -> None:
        self._group, self.reason, self.shares = group, reason, group.world
        self._buffers = Buffers()
        self._descriptions: _Descriptions | None = None  # kept for the same reason as the buffers
        self._sent: torch.Tensor | None = None

    def refuse(self, reason: str) -> None:
        """Takes part in an agreement that cannot be, for ranks of a host differ: every rank raises ValueError."""
        with contextlib.suppress(ValueError):
            self.agree(f"operands that differ inside its host: {reason}")

    def agree(self, description: str) -> None:
        """Raises ValueError on every rank if one was called with something else."""
        self._group.begin()
        self._begin_to_agree(description).compare()

    def broadcast(self, data: torch.Tensor, root: int, description: str, *, agreed: bool = False) -> None:
        """See `HostTransport`; `agreed`: the ranks have compared their descriptions already."""
        if not agreed:
            self.agree(description)
        self._sent = data
        if data.numel():
            self._group.broadcast(data, root)

    def interrupt(self) -> None:
        """See `HostTransport`."""
        self._group.interrupt()

    def tell_lost(self, name: int) -> None:
        """Lets all ranks raise PeerError for a rank, which may be none of theirs."""
        self._group.tell_lost(name)

    def all_reduce(self, exchange: Exchange, *, agreed: bool = False) -> Outcome:
        """See `Transport`; `agreed`: the ranks have compared their descriptions already."""
        group, count = self._group, exchange.tensor.numel()
        group.begin()
        descriptions = None if agreed else self._begin_to_agree(exchange.description)
        arithmetic = HostArithmetic()
        rows = EncodedRows(exchange, group.rank, group.world, arithmetic)
        in_one_shot = core.in_one_shot(count, group.world)
        rounds = (one_shot_rounds if in_one_shot else shared_rounds)(group, rows, self._buffers, count)
        rounds[0].encode()
        if descriptions is not None:
            descriptions.compare()
        run(rounds)
        squares = arithmetic.squares
        if exchange.norm and not in_one_shot:
            squares = sum(group.gather(squares)) * exchange.factor_of_squares
        return Outcome(arithmetic.finite, rows.sent_bytes, squares)

    def _begin_to_agree(self, description: str) -> _Descriptions:
        self._descriptions = _Descriptions(self._group, description)
        return self._descriptions


class _Descriptions:
    """What must be equal on all ranks; compared while the first values are encoded."""

    def __init__(self, group: PrivateGroup, own: str) -> None:
        self._group = group
        row = own.encode()[: core.DESCRIPTION_BYTES - 1].ljust(core.DESCRIPTION_BYTES, b"\0")
        self._own = torch.frombuffer(bytearray(row), dtype=torch.uint8)
        self._everyone = torch.empty(group.world * len(self._own), dtype=torch.uint8, device="cpu")
        self._work = group.all_gather(self._everyone, self._own)

    def compare(self) -> None:
        """Raises ValueError on every rank if one was called with something else."""
        self._group.wait([self._work])
        names, rank = self._group.meeting.names, self._group.rank
        rows = [bytes(row) for row in self._everyone.numpy().reshape(self._group.world, -1)]
        for peer, row in enumerate(rows):
            if row != rows[rank]:
                theirs, own = (text.rstrip(b"\0").decode(errors="ignore") for text in (row, rows[rank]))
                raise ValueError(f"rank {names[peer]} has {theirs}; rank {names[rank]} has {own}")
