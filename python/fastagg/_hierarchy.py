"""The transport of several hosts with several ranks each: shared memory inside a host, one exchange between hosts.

The ranks of a host add up their values, a slice each; the owners of a slice on all hosts exchange it over the backend;
the ranks of a host share what came back.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from fastagg import _core
from fastagg._backend_transport import BackendTransport
from fastagg._codes import Code
from fastagg._exchange import NO_KEY, Encoding, Exchange, Feedback, Outcome
from fastagg._shared_memory import SharedMemoryTransport, gather, meet


class HierarchicalTransport:
    """Shared memory inside each host, the backend between hosts: a link carries each value once, encoded."""

    def __init__(
        self, inner: SharedMemoryTransport, inner_group: dist.ProcessGroup, outer_group: dist.ProcessGroup
    ) -> None:
        self._inner, self._inner_group, self._outer_group = inner, inner_group, outer_group
        hosts, ranks = dist.get_world_size(outer_group), dist.get_world_size(inner_group)
        self._outer = BackendTransport(outer_group, "one rank of each host")
        self.name = f"shared memory, and the {self._outer.name} between hosts"
        self.reason = f"{hosts} hosts have {ranks} ranks each"

    @classmethod
    def meet(cls, group: dist.ProcessGroup, hosts: list[bytes]) -> HierarchicalTransport | str:
        """Makes the groups of each host and of each slice; if one rank cannot, none does, and the reason comes back."""
        ranks = dist.get_process_group_ranks(group)
        by_host = [
            [rank for rank, host in zip(ranks, hosts, strict=True) if host == one] for one in dict.fromkeys(hosts)
        ]
        if len({len(members) for members in by_host}) > 1:
            return f"its hosts have different numbers of ranks: {', '.join(str(len(members)) for members in by_host)}"
        inner_ranks = next(members for members in by_host if dist.get_rank() in members)
        place = inner_ranks.index(dist.get_rank())
        inner_group = _new_group(inner_ranks)
        outer_group = _new_group([members[place] for members in by_host])
        inner = meet(inner_group)
        failed = isinstance(inner, str)
        if any(int(flag[0]) for flag in gather(torch.tensor([int(failed)]), group)) or isinstance(inner, str):
            return inner if isinstance(inner, str) else "shared memory could not be mapped on another host"
        return cls(inner, inner_group, outer_group)

    def all_reduce(self, group: dist.ProcessGroup, exchange: Exchange) -> Outcome:
        """See `Transport`."""
        whole, lossless = _widened(exchange)
        inside = Exchange(whole, lossless.wire, lossless, exchange.mean)
        bytes_added_up = self._inner.reduce_scatter(inside).wire_bytes
        between = self._outer.all_reduce(self._outer_group, self._slice_of(exchange, whole, lossless.wire))
        shared = self._inner.all_gather(inside._replace(factor=exchange.factor, norm=exchange.norm))
        if whole is not exchange.tensor:
            exchange.tensor.copy_(whole)
        return shared._replace(wire_bytes=bytes_added_up + between.wire_bytes + shared.wire_bytes)

    def _slice_of(self, exchange: Exchange, whole: torch.Tensor, code: Code) -> Exchange:
        """The exchange of this rank's slice with the other hosts' ranks."""
        rank, ranks = dist.get_rank(self._inner_group), dist.get_world_size(self._inner_group)
        begin, end = _core.SharedMemoryGroup.slice_of(whole.numel(), rank, ranks)
        feedback = exchange.feedback
        if feedback is not None:
            feedback.error.zero_()  # the other slices' errors are others'
            feedback = Feedback(feedback.residual[begin:end], feedback.factor, feedback.error[begin:end])
        own = Exchange(whole[begin:end], code, exchange.encoding, exchange.mean, feedback=feedback)
        return own._replace(first=begin, stretches=exchange.stretches)


def _widened(exchange: Exchange) -> tuple[torch.Tensor, Encoding]:
    """The tensor in a dtype that holds its host's sum, and that dtype as an encoding."""
    wide = Code.FLOAT64 if exchange.encoding.wire == Code.FLOAT64 else Code.FLOAT32
    dtype = torch.float64 if wide == Code.FLOAT64 else torch.float32
    return exchange.tensor.to(dtype), Encoding(wide, 8, False, NO_KEY)


def _new_group(ranks: list[int]) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return group
