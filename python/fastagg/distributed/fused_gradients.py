"""Gradients that are reduced over the ranks in fused buffers while backward goes on."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

from fastagg._arrays.plain_tensors import check_plain
from fastagg.distributed.collectives import all_reduce
from fastagg.distributed.host_executor import Work
from fastagg.distributed.named_tensors import batches, dense_strides


class FusedGradients:
    """The gradients of some parameters, reduced over the ranks once a step.

    Parameters are assigned to buffers once, the last parameter first, and the buffers are sent in this order on every
    rank, each as soon as it and those before it are complete, whatever the order in which gradients come. Behind the
    last buffer travels who held a gradient at all: a parameter without one on some ranks counts as zeros there, and
    one without any stays without.

    Attributes:
        begun: whether gradients have come that are not synchronised yet.
        synchronized: whether the parameters hold the reduced gradients.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.Tensor]],
        *,
        wire: str,
        op: str,
        backward_passes: int,
        fusion_bytes: int,
        group: dist.ProcessGroup,
    ) -> None:
        self.begun = self.synchronized = False
        self._wire, self._op, self._group, self._backward_passes = wire, op, group, backward_passes
        self._slots = [_Slot(name, parameter) for name, parameter in reversed(parameters)]
        places = batches([slot.parameter for slot in self._slots], fusion_bytes)
        self._buffers = [_Buffer([self._slots[place] for place in batch]) for batch in places]
        self._reset()
        for place, slot in enumerate(self._slots):
            # Before backward adds to a gradient that might be under way, and after it has added.
            slot.accumulator.register_prehook(_weak_hook(self._accumulates, place))
            after = _weak_hook(self._accumulated, place)
            slot.parameter.register_post_accumulate_grad_hook(after)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Gives every parameter its reduced gradient, as soon as all ranks have called this; once a step.

        Raises:
            RuntimeError: somebody has removed or replaced a gradient that was under way.
            PeerError: a rank has died or hung.
        """
        if self.synchronized:
            return
        for slot in self._slots:
            if not slot.handed_over:
                self._hand_over(slot)
        for work in self._under_way:
            work.wait()
        strangers = [
            slot.name
            for slot, holders in zip(self._slots, self._holders.tolist(), strict=True)
            if not slot.take_back(has_gradient=holders > 0)
        ]
        self._reset()
        if strangers:
            raise RuntimeError(f"{strangers[0]!r}: its gradient was removed or replaced before synchronize()")
        self.synchronized = True

    def _reset(self) -> None:
        self.begun = False
        self._holders = torch.empty(0, device="cpu")
        self._unsent = deque(self._buffers)
        self._under_way: list[Work] = []
        for buffer in self._buffers:
            buffer.missing = len(buffer.slots)
        for slot in self._slots:
            slot.handed_over, slot.passes_left = False, self._backward_passes

    def _accumulates(self, place: int) -> None:
        """A backward pass is about to add to a parameter's gradient."""
        slot = self._slots[place]
        if slot.passes_left == 0:
            raise RuntimeError(
                f"{slot.name!r}: a backward pass more than backward_passes_per_step={self._backward_passes} "
                "since the last step() or synchronize()"
            )

    def _accumulated(self, place: int) -> None:
        """A backward pass has added to a parameter's gradient."""
        slot = self._slots[place]
        self.begun, self.synchronized = True, False
        slot.passes_left -= 1
        if slot.passes_left == 0:
            self._hand_over(slot)

    def _hand_over(self, slot: _Slot) -> None:
        """Puts a gradient into its buffer, and sends what is complete."""
        slot.hand_over()
        slot.buffer.missing -= 1
        while self._unsent and self._unsent[0].missing == 0:
            self._send(self._unsent.popleft().values, self._op, self._wire)
        if not self._unsent:
            held = [float(slot.was_held) for slot in self._slots]
            self._holders = torch.tensor(held, dtype=torch.float32, device="cpu")
            self._send(self._holders, "sum", "fp32")

    def _send(self, values: torch.Tensor, op: str, wire: str) -> None:
        work = all_reduce(values, op=op, wire=wire, group=self._group, async_op=True)
        self._under_way.append(cast(Work, work))


class _Slot:
    """One parameter's gradient and its place in a buffer."""

    buffer: _Buffer
    gradient: torch.Tensor  # in the buffer
    under_way: _UnderWay  # what the parameter has for a gradient in the meantime
    passes_left: int
    handed_over: bool
    was_held: bool

    def __init__(self, name: str, parameter: torch.Tensor) -> None:
        self.name, self.parameter = name, parameter
        # Autograd's node that adds to the gradient; its hooks last as long as somebody keeps it.
        self.accumulator: Any = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    def hand_over(self) -> None:
        """Moves the parameter's gradient into the buffer; zeros if it has none.

        Raises:
            TypeError: it is sparse, or has a graph of its own.
        """
        given = self.parameter.grad
        if given is None:
            self.gradient.zero_()
        else:
            try:
                check_plain(given)
            except TypeError as error:
                raise TypeError(f"the gradient of {self.name!r}: {error}") from None
            if given.requires_grad:
                raise TypeError(f"{self.name!r}: expected a gradient without a graph of its own (create_graph=True)")
            if given is not self.gradient:
                self.gradient.copy_(given)
            self.parameter.grad = self.under_way
        self.handed_over, self.was_held = True, given is not None

    def take_back(self, has_gradient: bool) -> bool:
        """Lets the parameter have what is in the buffer now; returns whether nobody has touched it meanwhile."""
        untouched = not self.was_held or self.parameter.grad is self.under_way
        self.parameter.grad = self.gradient if has_gradient else None
        return untouched


class _Buffer:
    """Gradients of one dtype, one behind the other."""

    missing: int

    def __init__(self, slots: list[_Slot]) -> None:
        self.slots = slots
        first = slots[0].parameter  # all have its dtype, and are on its device
        self.values = torch.zeros(sum(slot.parameter.numel() for slot in slots), dtype=first.dtype, device=first.device)
        begin = 0
        for slot in slots:
            shape, strides = slot.parameter.shape, dense_strides(slot.parameter)
            slot.buffer, slot.gradient = self, self.values.as_strided(shape, strides, begin)
            slot.under_way = slot.gradient.as_subclass(_UnderWay)
            begin += slot.parameter.numel()


class _UnderWay(torch.Tensor):
    """Stands for a gradient that is being reduced; whoever touches it is told so, where a number would be wrong."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise RuntimeError("this gradient is being reduced over the ranks: call the optimizer's synchronize() first")


def _weak_hook(method: Callable[[int], None], place: int) -> Callable[[Any], None]:
    """A parameter's hook that does not keep the buffers alive as long as the parameter."""
    reference = weakref.WeakMethod(method)

    def hook(_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(place)

    return hook
