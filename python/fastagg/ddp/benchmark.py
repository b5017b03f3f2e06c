"""What a wire could gain: a user's own training step without communication, with plain DDP and with every wire."""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastagg._extras import needing

with needing("torch", "fastagg.ddp"):
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
    from torch.nn.parallel import DistributedDataParallel

from fastagg._native.codes import wire_name
from fastagg.ddp.hook import all_reduce_hook
from fastagg.ddp.state import AllReduceState
from fastagg.distributed.channels import group_of, refusing
from fastagg.distributed.named_tensors import check_alike

# The share of a step that is worth a word: what a few steps cannot tell apart is less.
_NOTABLE = 0.05
# Gradients that are further off do not train as the true ones do.
_SOUND = 0.1


@dataclass(frozen=True)
class Row:
    """One way to exchange gradients.

    Attributes:
        name: "no communication", "plain DDP" or a wire.
        seconds: a step's median.
        exposed: seconds of a step that it adds to one without communication.
        gain: the part of plain DDP's step that it saves; without communication, the most that can be saved.
        wire_bytes: encoded bytes a step that this rank hands to others; None for plain DDP, which does not count.
        gradient_error: how far its gradients are from the exact mean of the ranks' own, as relative L2.
    """

    name: str
    seconds: float
    exposed: float
    gain: float
    wire_bytes: int | None
    gradient_error: float


@dataclass(frozen=True)
class Report:
    """What `report` measured. As a string it is a table with the verdict below it.

    Attributes:
        rows: without communication, plain DDP, then every wire.
        world: ranks.
        steps: measured steps of each row.
    """

    rows: tuple[Row, ...]
    world: int
    steps: int

    @property
    def verdict(self) -> str:
        """What to do, in one sentence."""
        if self.world == 1:
            return "There is one rank, so nothing is communicated: no wire can gain anything."
        none, _, *wires = self.rows
        share = f"Communication is {max(none.gain, 0):.0%} of your step"
        if none.gain < _NOTABLE:
            return f"{share}: no wire can gain more than that."
        faster = [row for row in wires if row.gain >= _NOTABLE and math.isfinite(row.gradient_error)]
        if not faster:
            return f"{share}, but no wire measured here makes a step notably shorter: stay with plain DDP."
        candidates = [row for row in faster if row.gradient_error <= _SOUND] or faster
        fastest = max(row.gain for row in candidates)
        best = min((row for row in candidates if row.gain > fastest - _NOTABLE), key=lambda row: row.gradient_error)
        unsound = ", which needs error feedback" if best.gradient_error > _SOUND else ""
        error = f"a gradient error of {best.gradient_error:.2g}{unsound}"
        return f"{share}: the {best.name} wire makes a step {best.gain:.0%} shorter, with {error}."

    def __str__(self) -> str:
        headings = ("", "step", "exposed", "gain", "wire bytes", "gradient error")
        cells = [headings, *(_cells(row, self.world) for row in self.rows)]
        first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
        lines = [
            name.ljust(first) + "".join(cell.rjust(width + 3) for cell, width in zip(line, others, strict=True))
            for name, *line in cells
        ]
        title = f"World size {self.world}; medians of {self.steps} steps, each as long as its slowest rank's."
        return "\n".join([title, "", *lines, "", self.verdict])


def report(
    model: torch.nn.Module,
    step: Callable[[torch.nn.Module], Any],
    *,
    wires: Sequence[Any] = ("fp32", "fp16", "int8"),
    steps: int = 10,
    warmup: int = 3,
    process_group: dist.ProcessGroup | None = None,
    **ddp_options: Any,
) -> Report:
    """Measures what `all_reduce_hook` would gain for a model: all ranks call it, with the same arguments.

    Each contender is a copy of the model under DistributedDataParallel. They take turns step by step, so that a noisy
    machine disturbs them alike, and all begin with the same random numbers. Without communication (torch's
    `noop_hook`) DDP's own work remains, its broadcast of buffers included. The model, its gradients and the global
    random number generators are left as they were. Memory: a copy of the model, with gradients, for each contender.

    >>> print(report(model, lambda model: loss(model(x), y).backward()))

    Args:
        model: the module itself, not yet under DDP.
        step: does forward and backward with the module that it is given, the same at every call: one batch, fetched
            before, and no optimizer step.
        wires: those to measure, as in `quantize`.
        steps: measured steps of each contender.
        warmup: steps before them; DDP arranges its buckets in the first.
        process_group: the model's group; None for the default one.
        ddp_options: of DistributedDataParallel, such as find_unused_parameters=True.

    Raises:
        ValueError: wrong arguments, or other ones on another rank; or a step that yields no gradients, or others at
            every call.
    """
    with refusing(process_group):
        _check(model, step, wires, steps, warmup)
        different_wires = dict.fromkeys(map(wire_name, wires))
        group = group_of(process_group)
    check_alike([f"wires {', '.join(different_wires)}", f"{steps=}, {warmup=}"], group)
    states = [AllReduceState(group, wire) for wire in different_wires]
    hooks = [(None, noop_hook), None, *((state, all_reduce_hook) for state in states)]
    contenders = [_wrapped(model, hook, process_group=group, **ddp_options) for hook in hooks]
    _take_turns(contenders, step, warmup, group)
    errors = _gradient_errors(contenders, group)
    medians = [statistics.median(seconds) for seconds in _take_turns(contenders, step, steps, group)]
    names = ["no communication", "plain DDP", *(state.wire for state in states)]
    wire_bytes = [0, None, *(state.wire_bytes for state in states)]
    rows = (
        Row(name, seconds, seconds - medians[0], 1 - seconds / medians[1], size, error)
        for name, seconds, size, error in zip(names, medians, wire_bytes, errors, strict=True)
    )
    return Report(tuple(rows), dist.get_world_size(group), steps)


def _check(model: Any, step: Any, wires: Any, steps: Any, warmup: Any) -> None:
    """Raises ValueError for a wrong argument."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, DistributedDataParallel):
        raise ValueError(f"model: expected a torch.nn.Module that is not yet under DDP, got {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model: no parameter of {type(model).__name__} requires a gradient")
    if not callable(step):
        raise ValueError(f"step: expected a function of the model, got {step!r}")
    if isinstance(wires, str) or not isinstance(wires, Sequence):
        raise ValueError(f"wires: expected a sequence of wires, got {wires!r}")
    for name, count in (("steps", steps), ("warmup", warmup)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected an integer of 1 or more, got {count!r}")


def _wrapped(model: torch.nn.Module, hook: tuple[Any, Any] | None, **options: Any) -> DistributedDataParallel:
    """A copy of the model under DDP, with a hook if there is one."""
    copied = DistributedDataParallel(copy.deepcopy(model), **options)
    if hook is not None:
        copied.register_comm_hook(*hook)
    return copied


def _take_turns(
    contenders: Sequence[DistributedDataParallel], step: Callable[[torch.nn.Module], Any], rounds: int, group: Any
) -> list[list[float]]:
    """The seconds of every contender's steps, each as long as its slowest rank's."""
    seconds = [[_seconds(contender, step, group) for contender in contenders] for _ in range(rounds)]
    slowest = torch.tensor(seconds, dtype=torch.float64, device=contenders[0].device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
    return [column.tolist() for column in slowest.T]


def _seconds(contender: DistributedDataParallel, step: Callable[[torch.nn.Module], Any], group: Any) -> float:
    """How long one step takes that all ranks begin together."""
    contender.zero_grad()
    with _generators_kept(contender.device):
        dist.barrier(group)
        _finish(contender.device)
        begin = time.perf_counter()
        step(contender)
        _finish(contender.device)
        seconds = time.perf_counter() - begin
    if all(parameter.grad is None for parameter in contender.parameters()):
        raise ValueError("step: no gradients; it must call backward on what the model that it is given computes")
    return seconds


def _finish(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Puts the global random number generators of torch, NumPy and Python back to where they stood."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what steps may still draw from)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def _gradient_errors(contenders: Sequence[DistributedDataParallel], group: Any) -> list[float]:
    """The relative L2 distance of every contender's gradients from the mean over ranks of the first one's.

    The first contender communicates nothing: its gradients are the rank's own.

    Raises:
        ValueError: plain DDP's, the second's, are nowhere near.
    """
    squares = torch.zeros(len(contenders) + 1, dtype=torch.float64, device=contenders[0].device)
    for parameters in zip(*(contender.parameters() for contender in contenders), strict=True):
        if not parameters[0].requires_grad:
            continue
        mean = _gradient(parameters[0]).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
        squares += torch.stack([*((_gradient(one) - mean).square().sum() for one in parameters), mean.square().sum()])
    *distances, norm = squares.sqrt()
    errors = [float(distance / norm) if distance != 0 else 0.0 for distance in distances]
    if errors[1] > _SOUND:
        message = f"plain DDP's gradients are {errors[1]:.2g} (relative L2) off the mean of the ranks' own"
        raise ValueError(f"step: {message}; it must do the same at every call, with one batch")
    return errors


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """In double precision; zeros for a parameter that was not used."""
    return torch.zeros_like(parameter, dtype=torch.float64) if parameter.grad is None else parameter.grad.double()


def _cells(row: Row, world: int) -> tuple[str, ...]:
    """The texts of a row of the table. One rank communicates nothing: what its steps differ by is noise, no gain."""
    return (
        row.name,
        f"{row.seconds * 1e3:.2f} ms",
        f"{row.exposed * 1e3:.2f} ms",
        f"{row.gain:.1%}" if world > 1 else "",
        "-" if row.wire_bytes is None else f"{row.wire_bytes:,}",
        f"{row.gradient_error:.2g}",
    )
