"""The transport of several hosts with several ranks each: shared memory inside a host, one exchange between hosts.

The ranks of a host add up their values, a slice each; the owners of a slice on all hosts exchange it over the backend;
the ranks of a host share what came back. What is encoded between hosts is a host's mean: error feedback keeps what that
takes with the owner of the slice, as the host's share. It is fed back into the rank's own values, whatever slice they
are of, for slices have other owners when buckets or hosts have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fastagg._errors import PeerError
from fastagg._native import core
from fastagg._native.codes import Code
from fastagg.distributed.exchange.arithmetic import HostArithmetic
from fastagg.distributed.exchange.exchange import NO_KEY, Encoding, Exchange, Feedback, Outcome
from fastagg.distributed.rendezvous.store import Meeting
from fastagg.distributed.transports.gloo import BackendTransport
from fastagg.distributed.transports.gloo_group import PrivateGroup
from fastagg.distributed.transports.shared_memory import SharedMemoryTransport, meet

Result = TypeVar("Result")

_LOSSLESS = Encoding(Code.FLOAT32, 8, False, NO_KEY)


class HierarchicalTransport:
    """Shared memory inside each host, the backend between hosts: a link carries each value once, encoded."""

    name = f"shared memory, and the {BackendTransport.name} between hosts"
    sees_signals = BackendTransport.sees_signals

    def __init__(
        self, inner: SharedMemoryTransport, inside: Meeting, outside: Meeting, by_host: list[list[int]]
    ) -> None:
        self._inner, self._inside, self._by_host = inner, inside, by_host
        self._outer = BackendTransport(PrivateGroup(outside), "one rank of each host")
        self.reason, self.shares = f"{outside.world} hosts have {inside.world} ranks each", outside.world

    @classmethod
    def meet(cls, meeting: Meeting, hosts: Sequence[str]) -> HierarchicalTransport | str:
        """Connects each host and each slice; if one rank cannot, none does, and the reason comes back."""
        by_host = [[rank for rank, host in enumerate(hosts) if host == one] for one in dict.fromkeys(hosts)]
        if len({len(members) for members in by_host}) > 1:
            return f"its hosts have different numbers of ranks: {', '.join(str(len(members)) for members in by_host)}"
        number, members = next((n, members) for n, members in enumerate(by_host) if meeting.rank in members)
        place = members.index(meeting.rank)
        inside = meeting.part(f"host {number}", members)
        outside = meeting.part(f"slice {place}", [others[place] for others in by_host])
        inner = meet(inside)
        problems = [one.decode() for one in meeting.gather(inner.encode() if isinstance(inner, str) else b"") if one]
        if problems or isinstance(inner, str):
            return problems[0]
        return cls(inner, inside, outside, by_host)

    def all_reduce(self, exchange: Exchange) -> Outcome:
        """See `Transport`."""
        return self._telling_who_is_lost(exchange.description, lambda: self._reduce(exchange))

    def agree(self, description: str) -> None:
        """See `HostTransport`."""
        self._telling_who_is_lost(description, lambda: None)

    def broadcast(self, data: torch.Tensor, root: int, description: str) -> None:
        """See `HostTransport`."""
        host, place = next((host, members.index(root)) for host, members in enumerate(self._by_host) if root in members)

        def carry() -> None:
            if self._inside.rank == place:
                self._outer.broadcast(data, host, description, agreed=True)
            self._inner.broadcast(data, place, description)

        self._telling_who_is_lost(description, carry)

    def interrupt(self) -> None:
        """See `HostTransport`."""
        self._inner.interrupt()
        self._outer.interrupt()

    def _telling_who_is_lost(self, description: str, exchange: Callable[[], Result]) -> Result:
        """Makes an exchange once all ranks have agreed on it."""
        try:
            self._agree(description)
            return exchange()
        except PeerError as error:
            first = self._tell_lost(error.rank)  # later ones are those who gave up because of it
            if first != error.rank:
                raise PeerError(first, f"rank {first} was lost") from error
            raise
        except RuntimeError:  # this rank cannot go on
            self._tell_lost(self._inside.names[self._inside.rank])
            raise

    def _agree(self, description: str) -> None:
        """Raises ValueError on every rank of every host if one was called with something else."""
        try:
            self._inner.agree(description)
        except ValueError as error:
            self._outer.refuse(str(error))  # the other hosts' ranks must not go on either
            raise
        self._outer.agree(description)

    def _reduce(self, exchange: Exchange) -> Outcome:
        whole, lossless = _widened(exchange)
        inside = Exchange(whole, lossless.wire, lossless, exchange.mean, description=exchange.description)
        added_up = self._inner.reduce_scatter(inside._replace(feedback=self._fed_back(exchange)))
        between = self._outer.all_reduce(self._slice_of(exchange, whole, lossless.wire), agreed=True)
        shared = self._inner.all_gather(inside._replace(factor=exchange.factor, norm=exchange.norm))
        finite = shared.finite and (whole is exchange.tensor or self._narrow(whole, exchange))
        sent = added_up.wire_bytes + between.wire_bytes + shared.wire_bytes
        return Outcome(finite, sent, shared.squares)

    def _fed_back(self, exchange: Exchange) -> Feedback | None:
        """What the host's mean shall have of this rank's residual, which is a host's share; the errors become zero."""
        if exchange.feedback is None:
            return None
        shares = self._inside.world if exchange.mean else 1
        return exchange.feedback._replace(factor=exchange.feedback.factor * shares)

    def _narrow(self, whole: torch.Tensor, exchange: Exchange) -> bool:
        """Writes a float32 result in the tensor's dtype; whether it is finite. Owners feed back what that takes."""
        begin, end = core.slice_of(whole.numel(), self._inside.rank, self._inside.world)
        arithmetic = HostArithmetic()
        for first, last in ((0, begin), (begin, end), (end, whole.numel())):
            source, out = (whole[first:].data_ptr(), 0, Code.FLOAT32, 0), exchange.tensor[first:].data_ptr()
            result = (source, exchange.code, 0, out, 0, last - first, False, NO_KEY, 1.0)
            if exchange.feedback is None or (first, last) != (begin, end):
                arithmetic.cast(result)
                continue
            error = (0, 0.0, exchange.feedback.error[first:].data_ptr(), 1 / exchange.factor, True)
            arithmetic.reduce(([source], 1.0, *error, result, first, ()), norm=False, check=True)
        return arithmetic.finite

    def _tell_lost(self, name: int) -> int:
        """Lets all ranks raise PeerError for a rank, or for the returned one, which was told before."""
        first = self._inner.tell_lost(name)
        self._outer.tell_lost(first)
        return first

    def _slice_of(self, exchange: Exchange, whole: torch.Tensor, code: Code) -> Exchange:
        """The exchange of this rank's slice with the other hosts' ranks."""
        begin, end = core.slice_of(whole.numel(), self._inside.rank, self._inside.world)
        feedback = None
        if exchange.feedback is not None:
            feedback = Feedback(None, 0.0, exchange.feedback.error[begin:end])
        own = Exchange(whole[begin:end], code, exchange.encoding, exchange.mean, feedback=feedback)
        return own._replace(first=begin, stretches=exchange.stretches, ceiling=exchange.code)


def _widened(exchange: Exchange) -> tuple[torch.Tensor, Encoding]:
    """The tensor in a dtype that holds its host's sum, and that dtype as an encoding."""
    wide = Code.FLOAT64 if exchange.encoding.wire == Code.FLOAT64 else Code.FLOAT32
    dtype = torch.float64 if wide == Code.FLOAT64 else torch.float32
    return exchange.tensor.to(dtype), _LOSSLESS._replace(wire=wide)
