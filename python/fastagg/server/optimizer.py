"""What all server optimisers share: a step with its checks, the moments, and their checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastagg._arrays.registry import kind_named
from fastagg._native.codes import name_of
from fastagg._native.operands import OptimizerOperands
from fastagg._updates.buffers import is_buffer
from fastagg._updates.sent import holds_roundings
from fastagg._updates.structure import Structure
from fastagg.server.step import Operands, operands_of

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


class _Kept(NamedTuple):
    """One leaf as the optimiser met it, with its moments: none for a buffer."""

    library: str
    dtype: str
    shape: tuple[int, ...]
    device: str
    moments: list[Any]

    @property
    def like(self) -> tuple[str, str, tuple[int, ...], str]:
        """All that a later model's leaf must equal."""
        return self[:4]

    def __str__(self) -> str:
        return f"a {self.library} array of {self.dtype} {self.shape} on {self.device}"


class ServerOptimizer:
    """The base of the server optimisers: `step` moves a model towards the clients' mean, or past it."""

    _HYPERPARAMETERS: ClassVar[tuple[str, ...]]
    learning_rate: float

    def __init__(self, buffers: Iterable[Any], **hyperparameters: float) -> None:
        self._buffers = as_buffers(buffers)
        self._kept: dict[Any, _Kept] | None = None
        for name, value in hyperparameters.items():
            setattr(self, name, value)
        self._operands(None)

    @property
    def buffers(self) -> tuple[Any, ...]:
        """The leaves that take the mean as it is, beside those that `step` names."""
        return self._buffers

    def step(
        self,
        model: Any,
        mean: Any,
        *,
        out: Any = None,
        learning_rate: float | None = None,
        check_finite: bool = True,
    ) -> Any:
        """Steps the model towards the clients' mean; neither is altered.

        fp32, fp16 and bf16 leaves are computed in float32, fp64 leaves in float64, each operation rounded once, with
        the same bits on every instruction set, thread count and device. Buffers (integer and bool leaves, running_mean,
        running_var, num_batches_tracked, moving_mean, moving_variance and those in `buffers`) get the mean as it is,
        and so do elements of which the model is infinite.

        Args:
            model: what the clients started from: an array, a sequence or a mapping of arrays.
            mean: what `fedavg` or `Accumulator.result` made of their updates, of the same structure, shapes, dtypes and
                device. Mappings are matched by name, whatever their order. Of quantised updates make it by
                ``fedavg(..., sent=model)``: else a leaf that nobody trained moves by its roundings, which the adaptive
                optimisers repeat at full length in every round.
            out: where the result goes; may be the model itself, but not overlap the mean.
            learning_rate: of this step alone, for schedules and bias corrections; None for the optimiser's own.
            check_finite: look for a NaN or an infinity in the mean first, which reads it once more; False saves that
                where `fedavg` has looked already.

        Returns:
            The new model in the structure and dtypes of the model; or `out`.

        Raises:
            TypeError, ValueError: a leaf's name, shape, dtype, library or device differs from the model's, or from that
                of the moments; `out` does not fit; a number is out of range; the mean holds a NaN, or an infinity where
                the model has another value. Nothing has changed then.

        Warns:
            RuntimeWarning: the mean is one of quantised updates that was made without `sent`.
        """
        constants = self._operands(learning_rate)
        operands = operands_of(model, mean, out)
        copied, stepped = operands.split(self._buffers)
        _warn_of_roundings(operands.structure, mean, stepped)
        kept = self._matching(operands, stepped) if self._moment_count() else None
        if check_finite:
            operands.check_finite()
        self._kept = kept
        operands.copy(operands.mean, copied)
        operands.step(constants, stepped, [self._addresses(operands, index) for index in stepped])
        return operands.result

    def state_dict(self) -> dict[str, Any]:
        """A copy of the moments and hyperparameters, as plain values and NumPy arrays, for `load_state_dict`."""
        leaves = []
        for name, kept in (self._kept or {}).items():
            kind = kind_named(kept.library)
            leaves.append([name, *kept.like, [kind.to_numpy(moment) for moment in kept.moments]])
        return {
            "version": 1,
            "optimizer": type(self).__name__,
            "hyperparameters": {name: getattr(self, name) for name in self._HYPERPARAMETERS},
            "buffers": list(self.buffers),
            "leaves": leaves,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Becomes what `state_dict` saved, hyperparameters included: the next steps have the same bits.

        Raises:
            ValueError: the state is of another optimiser, of another model than the one stepped so far, of another
                version, or damaged. Nothing has changed then.
        """
        if not isinstance(state, dict) or state.get("version") != 1:
            raise ValueError(f"state: expected what {type(self).__name__}.state_dict() returned, version 1")
        if state.get("optimizer") != type(self).__name__:
            raise ValueError(f"state: expected one of {type(self).__name__}, got one of {state.get('optimizer')}")
        try:
            loaded = type(self)(**state["hyperparameters"], buffers=state["buffers"])
            kept = {leaf[0]: loaded._restored(*leaf) for leaf in state["leaves"]} or None
            if len(kept or {}) != len(state["leaves"]):
                raise ValueError("a leaf occurs twice")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"state: damaged: {error}") from error
        if self._kept is not None and kept is not None:
            _check_same(kept, self._kept, "state")
        loaded._kept = kept
        self.__dict__.update(loaded.__dict__)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={getattr(self, name)}" for name in self._HYPERPARAMETERS)
        return f"{type(self).__name__}({numbers})"

    def _operands(self, learning_rate: float | None) -> OptimizerOperands:
        """The rule with its constants.

        Raises:
            TypeError, ValueError: a number is none, or out of range.
        """
        raise NotImplementedError

    def _rate(self, learning_rate: float | None) -> float:
        """The learning rate of one step."""
        return in_range(self.learning_rate if learning_rate is None else learning_rate, "learning_rate")

    def _moment_count(self) -> int:
        """Moments that the rule keeps of each element."""
        return 0

    def _matching(self, operands: Operands, stepped: list[int]) -> dict[Any, _Kept]:
        """What is kept, which the model must match; moments of zeros before the first step.

        Raises:
            ValueError: the model is another than in the steps before.
        """
        count, moved = self._moment_count(), set(stepped)
        here = {}
        for index, (name, leaf) in enumerate(zip(operands.names, operands.model, strict=True)):
            shape, device, moments = leaf.view.shape, leaf.view.device, []
            if self._kept is None and index in moved:
                moments = [leaf.kind.zeros(shape, leaf.moment_dtype, device) for _ in range(count)]
            here[name] = _Kept(leaf.kind.name, name_of(leaf.dtype), shape, device, moments)
        if self._kept is None:
            return here
        _check_same(here, self._kept, "model")
        return self._kept

    def _addresses(self, operands: Operands, index: int) -> list[int]:
        """Where a leaf's moments lie."""
        if self._kept is None:
            return []
        kind = operands.model[index].kind
        return [kind.address(moment) for moment in self._kept[operands.names[index]].moments]

    def _restored(
        self, name: Any, library: str, dtype: str, shape: tuple[int, ...], device: str, moments: list[Any]
    ) -> _Kept:
        """A leaf of a checkpoint.

        Raises:
            ValueError: its moments are not what its dtype and shape ask for.
        """
        kind = kind_named(library)
        count = 0 if is_buffer(name, dtype, self.buffers) else self._moment_count()
        expected = np.dtype(np.float64 if dtype == "float64" else np.float32)
        arrays = [np.asarray(moment) for moment in moments]
        if len(arrays) != count or any((array.dtype, array.shape) != (expected, tuple(shape)) for array in arrays):
            raise ValueError(f"leaf {name!r}: expected {count} moments of {expected} {tuple(shape)}")
        try:
            return _Kept(library, dtype, tuple(shape), device, [kind.from_numpy(array, device) for array in arrays])
        except (AssertionError, RuntimeError) as error:  # torch's and CuPy's
            raise ValueError(f"leaf {name!r}: its moments cannot be put on {device}: {error}") from error


def _warn_of_roundings(structure: Structure, mean: Any, stepped: list[int]) -> None:
    """Warns of a mean that still holds the roundings of its quantised updates, which every round would repeat."""
    leaves = structure.leaves(mean, "mean")
    found = next((structure.leaf_name(index) for index in stepped if holds_roundings(leaves[index])), None)
    if found is not None:
        advice = "leaves that nobody trains will move; fedavg(..., sent=model) takes the roundings out"
        warnings.warn(
            f"mean, {found}: holds the roundings of quantised updates: {advice}", RuntimeWarning, stacklevel=3
        )


def as_buffers(buffers: Iterable[Any]) -> tuple[Any, ...]:
    """The names of leaves that the user calls buffers.

    Raises:
        TypeError: a single name.
    """
    if isinstance(buffers, (str, bytes)):
        raise TypeError(f"buffers: expected names of leaves, got the single name {buffers!r}")
    return tuple(buffers)


def in_range(value: Any, name: str, *, least: float = 0.0, below: float = math.inf) -> float:
    """A hyperparameter as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite in float32, less than `least`, or not below `below`.
    """
    if isinstance(value, (str, bytes, bool)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not (least <= number <= _LARGEST and number < below):
        bound = f"below {below:g}" if below < math.inf else "finite in float32"
        raise ValueError(f"{name}: expected a number of {least:g} or more, {bound}, got {value}")
    return number


def as_tau(value: Any) -> float:
    """What keeps quotients finite where the second moment is zero, as a float."""
    return in_range(value, "tau", least=_SMALLEST)


def _check_same(given: dict[Any, _Kept], kept: dict[Any, _Kept], who: str) -> None:
    """Raises ValueError unless the leaves are those whose moments are kept, in any order."""
    for name in kept:
        if name not in given:
            raise ValueError(f"{who}: leaf {name!r} is missing, of which moments are kept")
    for name, leaf in given.items():
        if name not in kept:
            raise ValueError(f"{who}: leaf {name!r} is new: there were steps without it")
        if leaf.like != kept[name].like:
            raise ValueError(f"{who}, leaf {name!r}: expected {kept[name]} as in the steps before, got {leaf}")
