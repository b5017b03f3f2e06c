"""The transport of tensors on devices of any hosts: encoded rows through the group's own collectives (NCCL)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fastagg._native import core
from fastagg._native.backend import Backend
from fastagg.distributed.exchange.arithmetic import DeviceArithmetic, current_stream
from fastagg.distributed.exchange.encoded_rows import EncodedRows
from fastagg.distributed.exchange.exchange import Exchange, Outcome
from fastagg.distributed.rendezvous.failures import peer_error
from fastagg.distributed.rendezvous.fingerprint import Agreement
from fastagg.distributed.rendezvous.store import Meeting

_SQUARES_BYTES = 16  # behind the codes of a mean: the sum of its squares, and what keeps rows aligned


class CollectiveTransport:
    """Ranks whose tensors are on devices, over the collectives of the group's backend, on the current stream."""

    def __init__(self, group: dist.ProcessGroup, name: str, meeting: Meeting, backend: Backend, reason: str) -> None:
        # Channels are kept as long as their groups, which they must not keep.
        self._group = weakref.ref(group)
        self._meeting, self._backend, self.reason, self.shares = meeting, backend, reason, meeting.world
        self._agreement = Agreement(meeting)
        self.name = f"{name} backend"

    def all_reduce(self, exchange: Exchange) -> Outcome:
        """See `Transport`."""
        self._agreement.check(exchange.description)
        meeting, device = self._meeting, exchange.tensor.device
        stream = current_stream(device)
        rows = EncodedRows(exchange, meeting.rank, meeting.world, DeviceArithmetic(self._backend, device, stream))
        in_one_shot = core.in_one_shot(exchange.tensor.numel(), meeting.world)
        squares = (self._reduce_everywhere if in_one_shot else self._reduce_slices)(exchange, rows)
        sent = exchange.sent_bytes(meeting.rank, meeting.world)
        return Outcome(rows.arithmetic.finite, sent, squares) if exchange.norm else Outcome(True, sent, 0.0)

    def _reduce_everywhere(self, exchange: Exchange, rows: EncodedRows) -> Any:
        """Every rank gathers all values, and reduces them."""
        count = exchange.tensor.numel()
        own, everyone = self._rows(exchange, rows.row_bytes(0, count))
        rows.encode(own, 0, count)
        self._call(dist.all_gather_into_tensor, everyone, own)
        rows.write_mean(list(everyone), 0, count)
        return rows.arithmetic.squares

    def _reduce_slices(self, exchange: Exchange, rows: EncodedRows) -> torch.Tensor:
        """Every rank reduces its slice, and gathers the others' means."""
        rank, world = self._meeting.rank, self._meeting.world
        slices = [core.slice_of(exchange.tensor.numel(), owner, world) for owner in range(world)]
        size = rows.row_bytes(*slices[0])  # the first slice is the largest
        _, sent = self._rows(exchange, size)
        _, received = self._rows(exchange, size)
        own, means = self._rows(exchange, size + _SQUARES_BYTES)
        for row, elements in zip(sent, slices, strict=True):
            rows.encode(row, *elements)
        self._call(dist.all_to_all_single, received, sent)
        rows.encode_mean(list(received), own, *slices[rank])
        own[size:].view(torch.float64)[0] = rows.arithmetic.squares
        self._call(dist.all_gather_into_tensor, means, own)
        for row, elements in zip(means, slices, strict=True):
            rows.decode(row, *elements)
        return means[:, size:].contiguous().view(torch.float64)[:, 0].sum() * exchange.factor_of_squares

    def _call(self, collective: Callable[..., Any], received: torch.Tensor, sent: torch.Tensor) -> None:
        group = self._group()
        if group is None:  # torch would take the default group for it
            raise RuntimeError("the process group is gone")
        try:
            collective(received.view(-1), sent.view(-1), group=group)
        except RuntimeError as error:  # torch's for a broken connection and for its timeout
            raise peer_error(self._meeting, error) from error

    def _rows(self, exchange: Exchange, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes of one row, and of one for each rank."""
        device, world = exchange.tensor.device, self._meeting.world
        return (
            torch.empty(size, dtype=torch.uint8, device=device),
            torch.empty(world, size, dtype=torch.uint8, device=device),
        )
