"""An exchange over a backend in rounds, so that one round's values are encoded and decoded while others' are sent.

Either every rank owns a slice of the elements, adds up what all have sent for it, and sends the encoded mean to all;
or, in one shot, every rank sends its values to all and adds up everything itself.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from fastagg._native import core
from fastagg.distributed.exchange.encoded_rows import EncodedRows
from fastagg.distributed.transports.gloo_group import PrivateGroup

_ROUNDS = 8
_SMALLEST, _LARGEST = 1 << 20, 1 << 23  # encoded bytes of a round: small ones spend their time on latency
_STAGES = 4  # from sending values to having sent the last byte
_BUFFERS = _STAGES + 1  # a round is encoded before the one that sends its last bytes is closed

Piece = tuple[int, int]
"""The elements [begin, end)."""


class Round(Protocol):
    """A part of the elements on its way; the methods are called in this order."""

    def encode(self) -> None:
        """Encodes this rank's values."""

    def expect(self) -> None:
        """Tells the others that their bytes may come."""

    def send_values(self) -> None:
        """Sends this rank's values."""

    def reduce(self) -> None:
        """Adds up what all ranks have sent here."""

    def gather(self) -> None:
        """Decodes what others have added up."""

    def close(self) -> None:
        """Waits until all that was sent has left."""


class Buffers:
    """Bytes for what is under way, one set for each round in flight.

    The tensors themselves are kept, not views of them: were a backend's thread the last to let go of one while the
    interpreter ends, it would take the process with it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], torch.Tensor] = {}

    def rows(self, name: str, number: int, sizes: list[int]) -> list[torch.Tensor]:
        """Rows of these sizes, in memory that every `_BUFFERS`th round shares."""
        whole = self._kept.setdefault((name, number % _BUFFERS), torch.empty(0, dtype=torch.uint8, device="cpu"))
        if whole.numel() < sum(sizes):
            whole.resize_(sum(sizes))
        return list(whole[: sum(sizes)].split(sizes))  # type: ignore[no-untyped-call]


def run(rounds: list[Round]) -> None:
    """Takes all rounds through their stages, each one stage behind the one before it; the first is encoded already."""
    rounds[0].expect()
    for index in range(len(rounds) + _STAGES - 1):
        if index + 1 < len(rounds):
            rounds[index + 1].expect()  # early: a sender waits until it has heard that its bytes are expected
        if index < len(rounds):
            rounds[index].send_values()
        if index + 1 < len(rounds):
            rounds[index + 1].encode()
        if 0 <= index - 1 < len(rounds):
            rounds[index - 1].reduce()
        if 0 <= index - 2 < len(rounds):
            rounds[index - 2].gather()
        if 0 <= index - 3 < len(rounds):
            rounds[index - 3].close()


def shared_rounds(group: PrivateGroup, encoded: EncodedRows, buffers: Buffers, count: int) -> list[Round]:
    """Rounds that consist of a piece of every rank's slice."""
    slices = [core.slice_of(count, rank, group.world) for rank in range(group.world)]
    size = _passes(_round_elements(encoded, count) / group.world)
    starts = range(0, max(slices[0][1], 1), size)  # the first slice is the largest
    rounds = [[(min(begin + start, end), min(begin + start + size, end)) for begin, end in slices] for start in starts]
    return [_SharedRound(group, encoded, buffers, number, pieces) for number, pieces in enumerate(rounds)]


def one_shot_rounds(group: PrivateGroup, encoded: EncodedRows, buffers: Buffers, count: int) -> list[Round]:
    """Rounds of which every rank reduces everything."""
    size = _passes(_round_elements(encoded, count))
    pieces = [(start, min(start + size, count)) for start in range(0, max(count, 1), size)]
    return [_OneShotRound(group, encoded, buffers, number, piece) for number, piece in enumerate(pieces)]


def _round_elements(encoded: EncodedRows, count: int) -> float:
    whole = max(encoded.wire_bytes(0, count), 1)
    return count * min(max(whole / _ROUNDS, _SMALLEST), _LARGEST) / whole


def _passes(elements: float) -> int:
    """Rounded up to whole passes of the loops, at least one."""
    return max(math.ceil(elements / core.PASS), 1) * core.PASS


class _SharedRound:
    def __init__(
        self, group: PrivateGroup, encoded: EncodedRows, buffers: Buffers, number: int, pieces: list[Piece]
    ) -> None:
        self._group, self._encoded, self._pieces = group, encoded, pieces
        self._tags = 2 * number, 2 * number + 1  # of values and of means
        sizes = [encoded.row_bytes(*piece) for piece in pieces]
        self._sizes_on_wire = [encoded.wire_bytes(*piece) for piece in pieces]
        self._values = buffers.rows("values", number, [sizes[group.rank]] * group.world)
        self._means = buffers.rows("means", number, sizes)
        self._sent = buffers.rows("sent", number, sizes)
        self._sent[group.rank] = self._values[group.rank]  # they stay here

    def encode(self) -> None:
        for row, piece in zip(self._sent, self._pieces, strict=True):
            self._encoded.encode(row, *piece)

    def expect(self) -> None:
        self._arriving = self._group.receive_all(self._values, self._tags[0])
        self._means_arriving = self._group.receive_all(self._means, self._tags[1])

    def send_values(self) -> None:
        self._leaving = self._group.send_all(self._sent, self._tags[0])
        self._encoded.count_sent(sum(self._sizes_on_wire) - self._sizes_on_wire[self._group.rank])

    def reduce(self) -> None:
        self._group.wait(self._arriving)
        rank = self._group.rank
        self._encoded.encode_mean(self._values, self._means[rank], *self._pieces[rank])
        self._leaving += self._group.send_all([self._means[rank]] * self._group.world, self._tags[1])
        self._encoded.count_sent(self._sizes_on_wire[rank] * (self._group.world - 1))

    def gather(self) -> None:
        self._group.wait(self._means_arriving)
        for row, piece in zip(self._means, self._pieces, strict=True):
            self._encoded.decode(row, *piece)

    def close(self) -> None:
        self._group.wait(self._leaving)


class _OneShotRound:
    def __init__(self, group: PrivateGroup, encoded: EncodedRows, buffers: Buffers, number: int, piece: Piece) -> None:
        self._group, self._encoded, self._piece, self._tag = group, encoded, piece, 2 * number
        self._values = buffers.rows("values", number, [encoded.row_bytes(*piece)] * group.world)

    def encode(self) -> None:
        self._encoded.encode(self._values[self._group.rank], *self._piece)

    def expect(self) -> None:
        self._arriving = self._group.receive_all(self._values, self._tag)

    def send_values(self) -> None:
        world = self._group.world
        self._leaving = self._group.send_all([self._values[self._group.rank]] * world, self._tag)
        self._encoded.count_sent(self._encoded.wire_bytes(*self._piece) * (world - 1))

    def reduce(self) -> None:
        self._group.wait(self._arriving)
        self._encoded.write_mean(self._values, *self._piece)

    def gather(self) -> None:
        pass

    def close(self) -> None:
        self._group.wait(self._leaving)
