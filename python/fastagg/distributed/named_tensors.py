"""Named tensors that are the same on all ranks: their names, their agreement, and how they are fused into batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from fastagg._arrays.plain_tensors import check_plain, check_writable
from fastagg.distributed.messages import gather

FUSION_BYTES = 25 * 2**20


def named_tensors(
    argument: str, given: Mapping[str, Any] | Iterable[torch.Tensor | tuple[str, Any]]
) -> list[tuple[str, torch.Tensor]]:
    """The pairs of name and tensor of a state_dict or an iterable; a tensor without a name is named by its place.

    Raises:
        TypeError, ValueError: something else; a name that occurs twice; no plain CPU tensor.
    """
    items = given.items() if isinstance(given, Mapping) else given
    if not isinstance(items, Iterable):
        raise TypeError(f"{argument}: expected a state_dict or pairs of name and tensor, got {type(given).__name__}")
    named: dict[str, torch.Tensor] = {}
    for place, item in enumerate(items):
        pair = (str(place), item) if isinstance(item, torch.Tensor) else item
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"{argument}: expected pairs of name and tensor, got {type(pair).__name__}")
        name, tensor = pair
        if name in named:
            raise ValueError(f"{argument}: the name {name!r} occurs twice")
        check_tensor(f"{argument}: {name!r}", tensor)
        named[name] = tensor
    return list(named.items())


def check_tensor(name: str, tensor: Any) -> None:
    """Raises TypeError or ValueError for what is no plain CPU tensor that can be written."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    try:
        check_plain(tensor)
        check_writable(tensor)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    if not tensor.is_cpu:
        raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}")


def description(name: str, tensor: torch.Tensor) -> str:
    """What must be the same on all ranks."""
    return f"{name!r}, {tensor.dtype} of shape {tuple(tensor.shape)}"


def check_alike(own: Sequence[str], group: dist.ProcessGroup, title: str = "a comparison of parameters") -> None:
    """Raises ValueError on every rank if one has another list than the first, with the first line that differs."""
    everyone = [json.loads(lines) for lines in gather(json.dumps(list(own)).encode(), title, group)]
    for rank, lines in enumerate(everyone):
        for expected, line in zip_longest(everyone[0], lines, fillvalue="nothing more"):
            if line != expected:
                first, other = dist.get_global_rank(group, 0), dist.get_global_rank(group, rank)
                raise ValueError(f"ranks differ: rank {first} has {expected}, rank {other} has {line}")


def batches(tensors: Sequence[torch.Tensor], limit: int) -> Iterator[list[int]]:
    """Places of tensors of one dtype that together have at most `limit` bytes, or of one larger tensor.

    The batches come in the order in which they are full.
    """
    filling: dict[torch.dtype, list[int]] = {}
    room: dict[torch.dtype, int] = {}
    for place, tensor in enumerate(tensors):
        dtype = tensor.dtype
        if dtype in filling and tensor.nbytes > room[dtype]:
            yield filling.pop(dtype)
        if dtype not in filling:
            filling[dtype], room[dtype] = [], limit
        filling[dtype].append(place)
        room[dtype] -= tensor.nbytes
    yield from sorted(filling.values(), key=lambda places: places[-1])


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a dense tensor that is laid out in memory like this one."""
    return torch.empty_like(tensor, device="meta").stride()
