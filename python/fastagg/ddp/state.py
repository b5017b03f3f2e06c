"""What the DDP hook keeps from step to step, and tells about the last one."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastagg._extras import needing

with needing("torch", "fastagg.ddp"):
    import torch
    import torch.distributed as dist

from fastagg._native.codes import Code, code_of_dtype, wire_name
from fastagg.ddp.loss_scale import ScaledBackward, UnscaledGradients
from fastagg.ddp.residuals import Layout, Residuals, count_in, field
from fastagg.ddp.wrapped_model import WrappedModel, is_in_backward
from fastagg.distributed.collectives import encoding_of
from fastagg.distributed.exchange.exchange import Encoding, Exchange, Feedback
from fastagg.distributed.transports.base import Transport
from fastagg.quantization.quantized import check_block
from fastagg.quantization.rounding import random_key

# What a pickled state is made of anew; its group and its model's parameters are not.
_ARGUMENTS = ("wire", "rounding", "error_feedback", "seed", "block")


class AllReduceState:
    """What `all_reduce_hook` needs, and what it found in the last step. It pickles, its group left out.

    Attributes:
        found_inf: whether an averaged gradient is infinite or NaN; the same on every rank. Where the gradients are on
            a device, a look at this and the norm waits for it; `GradScaler` does not look.
        grad_norm: the averaged gradient's L2 norm, the same on every rank; found on the way, without another pass.
        wire_bytes: encoded bytes, scales included, that this rank handed to others.
        transport: how the ranks exchange; None before the first step.
        steps: backward passes that were averaged.
        loss_scale: what `GradScaler` has multiplied the loss by through which backward goes; None without it.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        wire: Any = "fp16",
        rounding: str = "nearest",
        error_feedback: bool = False,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
        *,
        seed: int = 0,
        block: int | None = None,
    ) -> None:
        """The state of one model's hook.

        Args:
            process_group: the model's group; None for the default one.
            wire: how gradients travel, as in `quantize`.
            rounding: "nearest" or "stochastic"; every rank, step and parameter has random numbers of its own.
            error_feedback: add what rounding took from a step's gradients to the next step's (Seide et al., "1-Bit
                Stochastic Gradient Descent", 2014). It takes 8 bytes a parameter.
            named_parameters: the model's, by whose names errors are kept; None: by their places, counted from the
                model's last.
            seed: of stochastic rounding; the same on every rank.
            block: elements that share a scale, as in `quantize`.

        Raises:
            ValueError: an unknown wire or rounding, or one that does not go with the other.
        """
        self.process_group, self.wire, self.rounding = process_group, wire_name(wire), rounding
        self.error_feedback, self.block = error_feedback, check_block(self.wire, block)
        if not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {seed!r:.100}")
        random_key(self.wire, rounding, (seed, 0, 0))
        self.seed, self.steps = seed, 0
        self._finite: bool | torch.Tensor = True
        self._squares: float | torch.Tensor = 0.0
        self.wire_bytes = 0
        self.transport: str | None = None
        self._scaled_backward: weakref.ref[ScaledBackward] | None = None
        self._residuals = Residuals(named_parameters)
        self.unscaled = UnscaledGradients()
        self._model = WrappedModel()
        self._step = _Step(0, 1, None)

    @property
    def found_inf(self) -> bool:
        """Whether an averaged gradient of the last step is infinite or NaN."""
        return not self._finite

    @property
    def grad_norm(self) -> float:
        """The last step's averaged gradient's L2 norm."""
        return math.sqrt(self._squares)

    @property
    def loss_scale(self) -> float | None:
        """What the loss was multiplied by, through which backward goes now."""
        backward = self._scaled_backward and self._scaled_backward()
        return backward.scale if backward else None

    @property
    def may_have_found_inf(self) -> bool:
        """The same, or that the host does not know it yet."""
        return isinstance(self._finite, torch.Tensor) or self.found_inf

    def tell_found_inf(self, out: torch.Tensor) -> torch.Tensor:
        """Writes whether the last step has found infinity or NaN to a float32 tensor; the host does not wait for it."""
        if isinstance(self._finite, torch.Tensor):
            return out.copy_(~self._finite)
        return out.fill_(float(self.found_inf))

    def begin_bucket(self, group: dist.ProcessGroup, bucket: Any) -> Bucket:
        """What is to be done about a bucket's gradients, in the order in which DDP hands them over.

        Raises:
            ValueError: the state belongs to another model, or the bucket has not its parameters' sizes.
        """
        gradients, parameters = bucket.buffer(), bucket.parameters()
        self._model.search(parameters[0], self)
        if bucket.index() == 0:
            self._begin_step(group)
        layout = self._residuals.layout_of(parameters, bucket.is_last())
        if gradients.shape != (layout.elements,):
            first = self._residuals.name_of(parameters[0])
            expected = f"{layout.elements} elements, those of its {len(parameters)} parameters, {first} the first"
            raise ValueError(f"bucket {bucket.index()}: expected {expected}; got shape {tuple(gradients.shape)}")
        return Bucket(bucket.index(), gradients, parameters, layout.sizes, bucket.is_last())

    def reduce_bucket(self, transport: Transport, bucket: Bucket) -> None:
        """Replaces a bucket's gradients by their means, and notes what the exchange has found."""
        step, used = self._step, bucket.parameters
        if bucket.number == 0:
            step.shares, self.transport = transport.shares, transport.name
        parts = list(torch.split(bucket.gradients, bucket.sizes))
        if step.asks:
            used, parts = self._ask(transport, bucket, parts)
        if len(used) == len(bucket.parameters):
            self._reduce(transport, bucket, bucket.parameters, bucket.gradients)
        elif used:  # without the others, which DDP may leave as they are, whatever is written here
            together = torch.cat(parts)
            self._reduce(transport, bucket, used, together)
            for part, mean in zip(parts, torch.split(together, [part.numel() for part in parts]), strict=True):
                part.copy_(mean)
        if step.is_scaled:
            self.unscaled.note(used, step.scale)
        if bucket.is_last:
            self._finite, self._squares, self.wire_bytes = step.finite, step.squares, step.wire_bytes
            if step.layouts:
                self._residuals.commit(step.layouts, step.shares, step.scale, step.finite)

    def scaled_backward_begins(self, scale: float) -> None:
        """Backward comes through a loss that `GradScaler` has scaled: in what it reduces, the scale is divided out."""
        if self.loss_scale is not None:
            return  # through another loss, already
        self.unscaled.scale_again()
        self._scaled_backward = weakref.ref(ScaledBackward(scale))

    def name_of(self, parameter: torch.Tensor) -> str:
        """How errors name a parameter."""
        return self._residuals.name_of(parameter)

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals by parameter, and the count of steps: tensors (copies) and numbers.

        A mean is owed the sum of all ranks' residuals over their `world`: the ranks, or the hosts where several have
        several ranks each and a residual is what was lost between hosts.
        """
        return {"steps": self.steps, **self._residuals.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Goes on from a `state_dict`, which every rank loads as its own, or from several.

        Whatever hosts and ranks there are now: residuals become shares of the new mean, so that it gets what was owed.
        All that was saved must be loaded once, by any rank: fewer ranks load several states each, whose residuals are
        added up; ranks that are new load a state_dict without residuals, or none.

        Raises:
            TypeError, ValueError: it is no state_dict; states differ in their steps or ranks; it names parameters that
                the model does not have, or of other sizes (once gradients come, where they are not known before).
        """
        states = [state] if isinstance(state, Mapping) or not isinstance(state, Sequence) else list(state)
        steps = {count_in(one, "steps") for one in states}
        if len(steps) > 1:
            raise ValueError(f"states differ: steps are {', '.join(map(str, sorted(steps)))}")
        self._residuals.load_state_dict(states)
        self.steps = steps.pop()
        self.unscaled.forget()

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in (*_ARGUMENTS, "wire_bytes", "transport")}
        kept.update(_finite=bool(self._finite), _squares=float(self._squares))  # numbers, which every machine can load
        return {**kept, "process_group": None, "names": self._residuals.names, "state_dict": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arguments = {name: field(state, name) for name in _ARGUMENTS}
        if not isinstance(arguments["error_feedback"], bool):
            raise TypeError(f"error_feedback: expected a bool, got {arguments['error_feedback']!r:.100}")
        transport, squares = field(state, "transport"), field(state, "_squares")
        if not isinstance(transport, str | None) or not isinstance(squares, float):
            got = f"{transport!r:.100}, {squares!r:.100}"
            raise TypeError(f"transport, _squares: expected a name or None, and a float, got {got}")
        restored = AllReduceState(**arguments)
        restored._residuals.names = field(state, "names")
        restored.load_state_dict(field(state, "state_dict"))
        restored.wire_bytes, restored.transport = count_in(state, "wire_bytes"), transport
        restored._finite, restored._squares = field(state, "_finite") is True, max(squares, 0.0)
        self.__dict__.update(restored.__dict__)

    def _begin_step(self, group: dist.ProcessGroup) -> None:
        is_present, joins = is_in_backward(), self._model.joins
        if self.unscaled and self.loss_scale is None and is_present and self.unscaled.any_left():
            raise RuntimeError(
                "backward on a loss that is not scaled, while a scaled loss's gradients have been neither used nor "
                "counted as unscaled: call scaler.unscale_(optimizer) or scaler.step(optimizer) first"
            )
        self.unscaled.forget()
        keeps = self._feeds_back or self.wire == "sign"  # what rounding makes of zeros is not zeros
        step = _Step(dist.get_rank(group), dist.get_world_size(group), self.loss_scale)
        step.is_present = is_present or not joins
        step.asks = joins or (self._model.may_leave_out and (keeps or step.is_scaled))
        self._step = step
        self.steps += 1

    def _ask(
        self, transport: Transport, bucket: Bucket, parts: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The parameters of a bucket that have a gradient on any rank, and their gradients.

        The other ranks tell, too, how many still have inputs, and the loss scale to those that have none.
        """
        step = self._step
        told = [float(step.is_present), step.scale if step.is_present else 0.0]
        own = torch.tensor(told, dtype=torch.float64, device=bucket.gradients.device)
        asked = torch.cat([own, has_values(parts).to(torch.float64)])
        encoding = encoding_of("fp32", Code.FLOAT64, None, None)  # which adds up exactly
        question = Exchange(asked, Code.FLOAT64, encoding, mean=False)
        outcome = transport.all_reduce(question.described(f"bucket {bucket.number}: who has gradients"))
        step.wire_bytes += outcome.wire_bytes
        present, scales, *holders = asked.tolist()
        step.scale = scales / present
        if self._model.divides_by_present_ranks:
            step.shares, step.gain = transport.shares * present / step.world, step.world / present
        chosen = [place for place, count in enumerate(holders) if count > 0]
        return [bucket.parameters[place] for place in chosen], [parts[place] for place in chosen]

    def _reduce(
        self, transport: Transport, bucket: Bucket, parameters: Sequence[torch.Tensor], gradients: torch.Tensor
    ) -> None:
        """The mean of the gradients of a bucket's parameters, or some of them."""
        step, code = self._step, Code(code_of_dtype(gradients.dtype) or 0)
        layout = self._residuals.layout_of(parameters, is_last=False)
        exchange = Exchange(
            gradients,
            code,
            self._encoding(code, step.rank),
            mean=True,
            factor=step.gain / step.scale,
            feedback=self._feedback_of(layout),
            norm=True,
            stretches=layout.stretches if self.rounding == "stochastic" else (),
        )
        outcome = transport.all_reduce(exchange.described(f"bucket {bucket.number}"))
        step.finite = outcome.finite & step.finite
        step.wire_bytes += outcome.wire_bytes
        step.squares = outcome.squares + step.squares

    def _encoding(self, code: Code, rank: int) -> Encoding:
        key = (self.seed, self.steps % 2**32, 0, rank) if self.rounding == "stochastic" else None
        return encoding_of(self.wire, code, self.block, key)

    @property
    def _feeds_back(self) -> bool:
        return self.error_feedback and self.wire != "fp32"  # which takes nothing

    def _feedback_of(self, layout: Layout) -> Feedback | None:
        if not self._feeds_back:
            return None
        self._step.layouts.append(layout)
        return self._residuals.feedback_of(layout, self._step.shares, self._step.scale)


class Bucket(NamedTuple):
    """What DDP has told of a bucket; its own object may be gone when its turn comes."""

    number: int
    gradients: torch.Tensor
    parameters: list[torch.Tensor]
    sizes: list[int]
    is_last: bool


class _Step:
    """What is known of a step, and what its buckets have found so far."""

    is_present = True  # this rank has inputs
    asks = False  # each bucket is preceded by a question to all ranks
    shares = 1.0  # of the mean, that residuals are: known once the ranks have met
    gain = 1.0  # a mean of the ranks that have inputs, over that of all

    def __init__(self, rank: int, world: int, loss_scale: float | None) -> None:
        self.rank, self.world = rank, world
        self.is_scaled, self.scale = loss_scale is not None, 1.0 if loss_scale is None else loss_scale
        self.finite: bool | torch.Tensor = True
        self.squares: float | torch.Tensor = 0.0
        self.wire_bytes = 0
        self.layouts: list[Layout] = []


def has_values(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Which of some gradients are not all zeros."""
    if parts[0].device.type != "cpu":
        return torch.stack([part.count_nonzero() for part in parts]) > 0
    # Most begin with other values: a look at those is enough.
    found = [bool(part[:1024].count_nonzero()) or bool(part[1024:].count_nonzero()) for part in parts]
    return torch.tensor(found, device="cpu")
