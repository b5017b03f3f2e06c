"""Parameters and optimizer states of one rank, copied to all."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastagg._extras import needing

with needing("torch", __name__):
    import torch
    import torch.distributed as dist

from fastagg._arguments import as_integer
from fastagg.distributed.channels import group_of, refusing
from fastagg.distributed.messages import broadcast, gather
from fastagg.distributed.named_tensors import (
    FUSION_BYTES,
    batches,
    check_alike,
    check_tensor,
    dense_strides,
    description,
    named_tensors,
)


def broadcast_parameters(
    parameters: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor] | torch.Tensor],
    root_rank: int = 0,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Gives the tensors of all ranks the values of one rank's, in place and bit for bit.

    Args:
        parameters: `model.state_dict()`, `model.named_parameters()`, or pairs of name and CPU tensor of any dtype.
        root_rank: the global rank whose values they are.
        group: the process group; None for the default one.

    Raises:
        TypeError: something else among them, or a root that is no integer.
        ValueError: a name that occurs twice; or ranks that differ in names, shapes or dtypes, on every rank.
    """
    with refusing(group):
        named = named_tensors("parameters", parameters)
        group, root = _group_and_root(group, root_rank)
        lines = [f"root_rank {root}", *(description(name, tensor) for name, tensor in named)]
    check_alike(lines, group, "broadcast_parameters")
    _broadcast([tensor.detach() for _, tensor in named], root, group)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int = 0, *, group: dist.ProcessGroup | None = None
) -> None:
    """Gives the optimizers of all ranks the state and the options, the learning rate for one, of one rank's.

    The other ranks need no state yet: after the root alone has loaded a checkpoint, this is what follows.

    Args:
        optimizer: over CPU parameters, `DistributedOptimizer` or not.
        root_rank: the global rank whose state it is.
        group: the process group; None for the default one.

    Raises:
        TypeError: no optimizer, or a root that is no integer.
        ValueError: ranks that differ in the optimizer's class or parameters, on every rank.
    """
    with refusing(group):
        group, root = _group_and_root(group, root_rank)
        outline = _outline(optimizer)
    check_alike([f"root_rank {root}", *outline], group, "broadcast_optimizer_state")
    is_root, tensors = dist.get_rank() == root, []

    def taken_out(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensors.append(leaf.detach())
        return _Place(tuple(leaf.shape), dense_strides(leaf), leaf.dtype)

    def put_in(leaf: Any) -> Any:
        if not isinstance(leaf, _Place):
            return leaf
        tensors.append(torch.empty_strided(leaf.shape, leaf.strides, dtype=leaf.dtype, device="cpu"))
        return tensors[-1]

    with refusing(group):
        structure = _mapped(optimizer.state_dict(), taken_out) if is_root else None
    structure = broadcast_object(structure, root, group=group)
    with refusing(group):
        state = None if is_root else _mapped(structure, put_in)
    _broadcast(tensors, root, group)
    if state is not None:
        _adopt(optimizer, state)


def broadcast_object(value: Any, root_rank: int = 0, *, group: dist.ProcessGroup | None = None) -> Any:
    """One rank's object on all ranks, pickled: with cloudpickle where it is installed.

    The root gets its own back. Do it among ranks whom you trust: who can send a pickle can run code.

    Args:
        value: what the root has; of no account on the other ranks.
        root_rank: the global rank whose object it is.
        group: the process group; None for the default one.

    Raises:
        TypeError: a root that is no integer.
        ValueError: ranks with different roots; or an object of the root's that cannot be pickled, on the other ranks.
        Exception: what pickling raised, on the root; or what unpickling raised on any rank, there, and ValueError
            elsewhere.
    """
    with refusing(group):
        group, root = _group_and_root(group, root_rank)
        place, is_root = dist.get_group_rank(group, root), dist.get_rank() == root
        data = _pickler().dumps(value) if is_root else b""
    check_alike([f"root_rank {root}"], group, "broadcast_object")
    size = torch.tensor([len(data)], device="cpu")
    broadcast(size, place, "broadcast_object", group)
    with refusing(group):
        carried = torch.frombuffer(bytearray(data or b"\0" * int(size)), dtype=torch.uint8)
    broadcast(carried, place, "broadcast_object", group)
    with refusing(group):
        if not is_root:
            value = pickle.loads(bytes(carried.numpy()))
    gather(b"", "broadcast_object", group)  # all could read it
    return value


def _pickler() -> Any:
    """What can pickle most."""
    try:
        return importlib.import_module("cloudpickle")
    except ImportError:
        return pickle


class _Place(NamedTuple):
    """Where a tensor belongs in a structure that travels without its tensors."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _group_and_root(group: dist.ProcessGroup | None, root_rank: Any) -> tuple[dist.ProcessGroup, int]:
    """The group, and the global rank in it as Python's own integer.

    Raises:
        TypeError, ValueError: there is no such group; the root is no integer, or none of its ranks.
    """
    group, root = group_of(group), as_integer(root_rank, "root_rank")
    members = dist.get_process_group_ranks(group)
    if root not in members:
        raise ValueError(f"root_rank: expected a global rank of the group, one of {members}, got {root}")
    return group, root


def _broadcast(tensors: Sequence[torch.Tensor], root: int, group: dist.ProcessGroup) -> None:
    """Broadcasts tensors, fused by dtype, as bytes: backends do not know every dtype."""
    for batch in batches(tensors, FUSION_BYTES):
        members = [tensors[place] for place in batch]
        with refusing(group):
            flat = torch.cat([tensor.reshape(-1) for tensor in members])
        broadcast(flat, dist.get_group_rank(group, root), "a broadcast of tensors", group)
        begin = 0
        for tensor in members:
            tensor.copy_(flat[begin : begin + tensor.numel()].view(tensor.shape))
            begin += tensor.numel()


def _outline(optimizer: torch.optim.Optimizer) -> list[str]:
    """What optimizers must have in common to exchange their states.

    Raises:
        TypeError, ValueError: it is no optimizer; a parameter or the state is no plain CPU tensor.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    lines = [type(optimizer).__name__]
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            name = f"parameter {place} of group {number}"
            check_tensor(name, parameter)
            lines.append(description(name, parameter))
    for kept in optimizer.state.values():
        _mapped(kept, _check_state)
    return lines


def _check_state(leaf: Any) -> None:
    """Raises TypeError or ValueError for a tensor of an optimizer's state that cannot be broadcast."""
    if isinstance(leaf, torch.Tensor):
        check_tensor("the optimizer's state", leaf)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A structure of dicts, lists and tuples with every leaf replaced."""
    if isinstance(value, dict):
        return {key: _mapped(entry, function) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(entry, function) for entry in value)
    return function(value)


def _adopt(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a state_dict as it is, where `load_state_dict` would cast it to the parameters' dtypes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group, options in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update(options, params=group["params"])
    optimizer.state.clear()
    for key, entry in state["state"].items():
        optimizer.state[parameters[key] if isinstance(key, int) else key] = entry
