"""What the DDP hook keeps from step to step, and tells about the last one."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fastagg._codes import Code, wire_name
from fastagg._exchange import Encoding, Exchange, Feedback, Outcome
from fastagg._residuals import Layout, Residuals
from fastagg.communication import encoding_of
from fastagg.quantization import check_block, random_key


class AllReduceState:
    """What `all_reduce_hook` needs, and what it found in the last step. It pickles, its group left out.

    Attributes:
        found_inf: whether an averaged gradient is infinite or NaN; the same on every rank. Where the gradients are on
            a device, a look at this and the norm waits for it; `GradScaler` does not look.
        grad_norm: the averaged gradient's L2 norm, the same on every rank; found on the way, without another pass.
        wire_bytes: encoded bytes, scales included, that this rank handed to others.
        transport: how the ranks exchange; None before the first step.
        steps: backward passes that were averaged.
        loss_scale: what `GradScaler` has multiplied the loss by; None without it.
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
        random_key(self.wire, rounding, (seed, 0, 0))
        self.seed, self.steps = seed, 0
        self._finite: bool | torch.Tensor = True
        self._squares: float | torch.Tensor = 0.0
        self.wire_bytes = 0
        self.transport: str | None = None
        self.loss_scale: float | None = None
        self._residuals = Residuals(named_parameters)
        self._step = _Step(1, 1.0)
        self._unscaled = False

    @property
    def found_inf(self) -> bool:
        """Whether an averaged gradient of the last step is infinite or NaN."""
        return not self._finite

    @property
    def grad_norm(self) -> float:
        """The last step's averaged gradient's L2 norm."""
        return math.sqrt(self._squares)

    def tell_found_inf(self, out: torch.Tensor) -> torch.Tensor:
        """Writes whether the last step has found infinity or NaN to a float32 tensor; the host does not wait for it."""
        if isinstance(self._finite, torch.Tensor):
            return out.copy_(~self._finite)
        return out.fill_(float(self.found_inf))

    def begin_bucket(self, group: dist.ProcessGroup, transport: str | None, bucket: Any, code: Code) -> Exchange:
        """The exchange of a bucket's gradients."""
        if bucket.index() == 0:
            self._begin_step(group, transport)
        layout = self._residuals.layout_of(bucket.parameters(), bucket.is_last())
        exchange = Exchange(
            bucket.buffer(),
            code,
            self._encoding(code, dist.get_rank(group)),
            mean=True,
            factor=1 / self._step.scale,
            feedback=self._feedback_of(layout),
            norm=True,
            stretches=layout.stretches if self.rounding == "stochastic" else (),
        )
        return exchange.described(f"bucket {bucket.index()}")

    def end_bucket(self, outcome: Outcome, *, is_last: bool) -> None:
        """Notes what the exchange of a bucket has found."""
        step = self._step
        step.finite = outcome.finite & step.finite
        step.wire_bytes += outcome.wire_bytes
        step.squares = outcome.squares + step.squares
        if not is_last:
            return
        self._finite, self._squares, self.wire_bytes = step.finite, step.squares, step.wire_bytes
        if step.layouts:
            self._residuals.commit(step.layouts, step.world, step.scale, step.finite)

    def gradients_are_used(self) -> None:
        """After the optimizer's step: gradients that the hook has unscaled are not wanted any more."""
        self._unscaled = False

    def check_unscaled(self, parameters: Sequence[torch.Tensor]) -> None:
        """Raises ValueError if the last backward's hook has not unscaled these parameters' gradients."""
        if not self._unscaled:
            raise ValueError("no gradients are unscaled: run backward on the scaled loss outside no_sync() first")
        strangers = sum(not self._residuals.knows(parameter) for parameter in parameters)
        if strangers:
            raise ValueError(f"{strangers} parameters are not those of the hook's model: use torch's GradScaler")

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals by parameter, and the count of steps: tensors (copies) and numbers."""
        return {"steps": self.steps, **self._residuals.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`, which every rank loads as its own.

        Where the number of ranks has changed, residuals are multiplied by the new number over the old one, so that the
        mean gets what was owed to it; ranks that are new load a state_dict without residuals, or none.

        Raises:
            ValueError: it names parameters that the model does not have, or of other sizes: once gradients come.
        """
        self._residuals.load_state_dict(state)
        self.steps = int(state["steps"])
        self._unscaled = False

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_residuals", "_step")}
        kept.update(_finite=bool(self._finite), _squares=float(self._squares))  # numbers, which every machine can load
        return {**kept, "process_group": None, "names": self._residuals.names, "state_dict": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        residuals, names = state.pop("state_dict"), state.pop("names")
        self.__dict__.update(state)
        self._residuals, self._step = Residuals(), _Step(1, 1.0)
        self._residuals.names = names
        self.load_state_dict(residuals)

    def _begin_step(self, group: dist.ProcessGroup, transport: str | None) -> None:
        if self._unscaled:
            raise RuntimeError(
                "the gradients of a step before have been unscaled and not used: call scaler.step() and "
                "scaler.update() once after each synchronised backward, and accumulate under no_sync()"
            )
        self._step = _Step(dist.get_world_size(group), 1.0 if self.loss_scale is None else self.loss_scale)
        self._unscaled = self.loss_scale is not None
        self.transport = transport
        self.steps += 1

    def _encoding(self, code: Code, rank: int) -> Encoding:
        key = (self.seed, self.steps % 2**32, 0, rank) if self.rounding == "stochastic" else None
        return encoding_of(self.wire, code, self.block, key)

    def _feedback_of(self, layout: Layout) -> Feedback | None:
        if not self.error_feedback or self.wire == "fp32":  # which takes nothing
            return None
        self._step.layouts.append(layout)
        return self._residuals.feedback_of(layout, self._step.world, self._step.scale)


class _Step:
    """What the buckets of one step have found so far."""

    def __init__(self, world: int, scale: float) -> None:
        self.world, self.scale = world, scale
        self.finite: bool | torch.Tensor = True
        self.squares: float | torch.Tensor = 0.0
        self.wire_bytes = 0
        self.layouts: list[Layout] = []
