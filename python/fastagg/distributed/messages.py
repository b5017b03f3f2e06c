"""Bytes that the ranks of a group tell each other: in the order of their exchanges, and compared like them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fastagg.distributed.channels import host_channel_of
from fastagg.distributed.transports.base import HostTransport


def gather(own: bytes, title: str, group: dist.ProcessGroup) -> list[bytes]:
    """What every rank has brought, on all ranks.

    Raises:
        ValueError: a rank was called with something else than this title, on every rank.
        PeerError: a rank has died or hung.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    def exchange(transport: HostTransport) -> list[bytes]:
        sizes = _gathered(transport, [torch.tensor([len(own)], device="cpu") for _ in range(world)], title)
        texts = [torch.empty(int(size), dtype=torch.uint8, device="cpu") for size in sizes]
        if own:
            texts[rank] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        return [bytes(text.numpy()) for text in _gathered(transport, texts, title)]

    return host_channel_of(group).run(exchange)


def broadcast(tensor: torch.Tensor, root: int, title: str, group: dist.ProcessGroup) -> None:
    """Gives a contiguous CPU tensor of all ranks the bytes that it has on one, which is numbered as in the group.

    Raises:
        ValueError: a rank was called with something else, on every rank.
        PeerError: a rank has died or hung.
    """
    data = tensor.view(-1).view(torch.uint8)
    host_channel_of(group).run(lambda transport: transport.broadcast(data, root, title))


def add_up(tensor: torch.Tensor, title: str, group: dist.ProcessGroup) -> None:
    """Replaces a contiguous CPU tensor by its sum over the ranks, in its own arithmetic and in rank order.

    Raises:
        ValueError: a rank was called with something else, on every rank.
        PeerError: a rank has died or hung.
    """
    world = dist.get_world_size(group)

    def exchange(transport: HostTransport) -> None:
        everyone = _gathered(transport, [tensor.clone() for _ in range(world)], title)
        tensor.zero_()
        for theirs in everyone:
            tensor.add_(theirs)

    host_channel_of(group).run(exchange)


def _gathered(transport: HostTransport, tensors: Sequence[torch.Tensor], title: str) -> Sequence[torch.Tensor]:
    """Every rank's own of these tensors, on all ranks."""
    for root, tensor in enumerate(tensors):
        transport.broadcast(tensor.view(-1).view(torch.uint8), root, title)
    return tensors
