"""The transport of any group, over Gloo: encoded pieces go to their owners, encoded means come back."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from fastagg import _core
from fastagg._backend import RandomKey
from fastagg._codes import ELEMENT_BYTES, Code
from fastagg._exchange import MEANS_RANK, NO_KEY, Exchange, Outcome
from fastagg._private_group import PrivateGroup

_ROUNDS = 8
_SMALLEST_ROUND, _LARGEST_ROUND = 1 << 19, 1 << 22  # elements: small ones spend their time on latency


class BackendTransport:
    """Works in rounds, so that one round's values are encoded and decoded while others' are sent."""

    name = "gloo backend"

    def __init__(self, group: PrivateGroup, reason: str) -> None:
        self._group, self.reason = group, reason
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._signatures: _Signatures | None = None  # kept for the same reason as the buffers

    def refuse(self) -> None:
        """Takes part in an exchange that cannot be: every rank raises ValueError."""
        self._signatures = _Signatures(self._group, None)
        with contextlib.suppress(ValueError):
            self._signatures.compare()

    def tell_lost(self, name: int) -> None:
        """Tells the others, once their exchange fails, which rank was lost."""
        self._group.meeting.store.set("lost", str(name))

    def all_reduce(self, exchange: Exchange) -> Outcome:
        """See `Transport`."""
        rank, world = self._group.rank, self._group.world
        signatures = self._signatures = _Signatures(self._group, exchange)
        rounds = [_Round(self._group, exchange, pieces) for pieces in _pieces_of_rounds(exchange, world)]
        outcome = Outcome(True, exchange.wire_bytes(rank, world), 0.0)
        for index in range(len(rounds) + 2):
            if index < len(rounds):
                rounds[index].encode(self._buffer("sent", index, rounds[index].bytes * world))
                if index == 0:
                    signatures.compare()
                rounds[index].scatter(self._buffer("received", index, rounds[index].bytes * world))
            if 0 <= index - 1 < len(rounds):
                own = self._buffer("own", index - 1, rounds[index - 1].bytes)
                rounds[index - 1].reduce(own, self._buffer("means", index - 1, own.numel() * world))
            if 0 <= index - 2 < len(rounds):
                outcome = rounds[index - 2].decode(outcome)
        return _with_all_squares(self._group, outcome) if exchange.norm else outcome

    def _buffer(self, name: str, index: int, size: int) -> torch.Tensor:
        """Bytes that are used again by the third round after, and by the next call."""
        # The tensors themselves are kept, not views of them: were the backend's thread the last to let go of one while
        # the interpreter ends, it would take the process with it.
        buffer = self._buffers.setdefault((name, index % 3), torch.empty(0, dtype=torch.uint8))
        return buffer.resize_(size)


class _Round:
    """A piece of every slice: encoded, sent to the slice's owner, added up there, sent to all, decoded."""

    def __init__(self, group: PrivateGroup, exchange: Exchange, pieces: list[tuple[int, int]]) -> None:
        self._group, self._exchange, self._pieces = group, exchange, pieces
        self._rank, self._world = group.rank, group.world
        self.bytes = exchange.encoding.row_bytes(max(end - begin for begin, end in pieces))
        self._squares = 0.0

    def encode(self, sent: torch.Tensor) -> None:
        """Encodes this rank's values, a row for each owner."""
        self._sent = sent
        exchange, divisor = self._exchange, 1 / self._exchange.encoded_factor(self._world)
        for (begin, end), row in zip(self._pieces, sent.view(self._world, -1), strict=True):
            values = exchange.tensor[begin:end]
            if exchange.encoding.wire == Code.FLOAT64:
                _as_float64(row, end - begin).copy_(values)
                continue
            source = (values.data_ptr(), 0, exchange.code, 0)
            feedback: tuple[Any, ...] = (0, 0.0, 0, 0.0, False)
            if exchange.feedback:
                residual, factor, error = exchange.feedback
                feedback = (residual[begin:].data_ptr(), factor, error[begin:].data_ptr(), divisor, False)
            self._encode([source], divisor, feedback, row, begin, end, exchange.encoding.key)

    def scatter(self, received: torch.Tensor) -> None:
        """Sends each row to its owner."""
        self._received = received
        self._work = self._group.all_to_all(received, self._sent)

    def reduce(self, own: torch.Tensor, means: torch.Tensor) -> None:
        """Adds up what all ranks sent for this rank's piece, and sends its mean to all."""
        self._group.wait(self._work)
        self._means = means
        exchange, (begin, end) = self._exchange, self._pieces[self._rank]
        rows = self._received.view(self._world, -1)
        share = float(self._world if exchange.mean else 1)
        if exchange.encoding.wire == Code.FLOAT64:
            self._reduce_float64(rows, own, share, end - begin)
        else:
            sources = [exchange.encoding.source(row, end - begin) for row in rows]
            error = exchange.feedback.error[begin:].data_ptr() if exchange.feedback else 0
            divisor, key = share * exchange.encoded_factor(self._world), exchange.encoding.key
            # The means have random numbers of their own, the same whoever rounds them.
            means_key = (*key[:3], MEANS_RANK)
            self._squares = self._encode(sources, divisor, (0, 0.0, error, share, True), own, begin, end, means_key)
        self._work = self._group.all_gather(means, own)

    def decode(self, outcome: Outcome) -> Outcome:
        """Decodes everybody's means into the tensor."""
        self._group.wait(self._work)
        finite = outcome.finite
        for (begin, end), row in zip(self._pieces, self._means.view(self._world, -1), strict=True):
            finite &= self._decode(row, begin, end)
        return outcome._replace(finite=finite, squares=outcome.squares + self._squares * self._exchange.factor**2)

    def _encode(
        self,
        sources: list[tuple[int, int, int, int]],
        divisor: float,
        feedback: tuple[Any, ...],
        row: torch.Tensor,
        begin: int,
        end: int,
        key: RandomKey,
    ) -> float:
        """Encodes the quotient of the sources' sum; returns its sum of squares, if wanted."""
        wire, shift, stochastic, _ = self._exchange.encoding
        codes, scales, _, _ = self._exchange.encoding.source(row, end - begin)
        result = (sources[0], wire, shift, codes, scales, end - begin, stochastic, key, 1.0)
        first = begin + self._exchange.first
        operands = (sources, divisor, *feedback, result, first, self._exchange.stretches)
        _, squares = _core.reduce(operands, self._exchange.norm)
        return squares

    def _reduce_float64(self, rows: torch.Tensor, own: torch.Tensor, share: float, count: int) -> None:
        means = _as_float64(own, count).zero_()
        for row in rows:
            means += _as_float64(row, count)
        means /= share
        self._squares = float(means.square().sum())

    def _decode(self, row: torch.Tensor, begin: int, end: int) -> bool:
        exchange = self._exchange
        out = exchange.tensor[begin:end]
        if exchange.encoding.wire == Code.FLOAT64:
            torch.mul(_as_float64(row, end - begin), exchange.factor, out=out)
            return bool(out.isfinite().all())
        source = exchange.encoding.source(row, end - begin)
        return _core.cast((source, exchange.code, 0, out.data_ptr(), 0, end - begin, False, NO_KEY, exchange.factor))


class _Signatures:
    """What must be equal on all ranks; compared while the first values are encoded."""

    _NAMES = "(elements, dtype code, wire code, log2 of the block, stochastic, mean, shape and list)"

    def __init__(self, group: PrivateGroup, exchange: Exchange | None) -> None:
        """`exchange`: None refuses."""
        self._group = group
        facts = [-1] * 7
        if exchange is not None:
            wire, shift, stochastic, _ = exchange.encoding
            facts = [exchange.tensor.numel(), exchange.code, wire, shift, stochastic, exchange.mean, exchange.tag]
        self._own = torch.tensor(facts, dtype=torch.int64)
        self._everyone = torch.empty(group.world * len(self._own), dtype=self._own.dtype)
        self._work = group.all_gather(self._everyone, self._own)

    def compare(self) -> None:
        """Raises ValueError on every rank if one was called with something else."""
        self._group.wait(self._work)
        own = tuple(self._own.tolist())
        for rank, other in enumerate(self._everyone.view(-1, len(own)).tolist()):
            if tuple(other) != own:
                who, here = self._group.meeting.names[rank], self._group.meeting.names[self._group.rank]
                raise ValueError(f"rank {who} has {tuple(other)}, rank {here} has {own}: {self._NAMES}")


def _pieces_of_rounds(exchange: Exchange, world: int) -> list[list[tuple[int, int]]]:
    """For each round, the range of elements that belongs to each rank's slice."""
    count = exchange.tensor.numel()
    slices = [_core.SharedMemoryGroup.slice_of(count, rank, world) for rank in range(world)]
    whole = min(max(count // _ROUNDS, _SMALLEST_ROUND), _LARGEST_ROUND)
    piece = -(-whole // (world * _core.PASS)) * _core.PASS
    largest = slices[0][1] - slices[0][0]
    return [
        [(min(begin + start, end), min(begin + start + piece, end)) for begin, end in slices]
        for start in range(0, max(largest, 1), piece)
    ]


def _with_all_squares(group: PrivateGroup, outcome: Outcome) -> Outcome:
    """The sum over all slices, added up in the order of the ranks on every rank."""
    own = torch.tensor([outcome.squares], dtype=torch.float64)
    everyone = torch.empty(group.world, dtype=torch.float64)
    group.wait(group.all_gather(everyone, own))
    return outcome._replace(squares=sum(everyone.tolist()))


def _as_float64(row: torch.Tensor, count: int) -> torch.Tensor:
    return row[: count * ELEMENT_BYTES[Code.FLOAT64]].view(torch.float64)
