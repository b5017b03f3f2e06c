"""FedBuff: every K updates change the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastagg._arrays.registry import adopt
from fastagg._errors import NONFINITE, NonFiniteUpdateError
from fastagg._native.codes import FLOATS, Code, name_of
from fastagg._updates.buffers import is_buffer
from fastagg._updates.leaves import gather, infinite_leaves, inputs_of
from fastagg._updates.sent import Sent, is_nonfinite, with_zeros
from fastagg._updates.structure import Structure
from fastagg.asynchronous.staleness import INVERSE_ROOT, Staleness
from fastagg.asynchronous.versioned_server import VersionedServer, nonfinite_leaf, renamed
from fastagg.averaging.accumulator import Accumulator
from fastagg.quantization.cast import dequantize
from fastagg.quantization.quantized import Quantized
from fastagg.server.optimizer import as_buffers, in_range
from fastagg.server.step import add

DIVISORS = ("count", "weights")


class FedBuff(VersionedServer):
    """Buffered asynchronous aggregation: every K updates change the model (Nguyen et al. 2022, Algorithm 1).

    ``x = x + learning_rate / D * sum_i(s(staleness_i) * delta_i)`` over the K updates in the buffer. D is their count
    K, as in the paper; with ``divisor="weights"`` it is ``sum_i(s(staleness_i))``, which makes steps of full length of
    stale updates too. Every update counts for itself, whichever version it is of.

    Clients send ``delta = trained model - model they started from``, but the values themselves of buffers (integer and
    bool leaves, running_mean, running_var and the others that `fastagg.server.FedAvg.step` names): those become the
    mean of what the K clients sent, weighted by s. Where the model is infinite, as in a causal mask, differences are
    not looked at and the model stays. The buffer is an `Accumulator`, so that memory does not grow with K. Methods may
    be called from several threads.

    Attributes:
        dropped: the updates that were left out, as (version, reason).
    """

    def __init__(
        self,
        model: Any,
        *,
        buffer_size: int = 10,
        learning_rate: float = 1.0,
        staleness: Staleness = INVERSE_ROOT,
        divisor: str = "count",
        max_staleness: int | None = None,
        buffers: Iterable[Any] = (),
        nan_policy: str = "drop",
        integer_policy: str | None = None,
    ) -> None:
        """A server whose model, a copy, is version 0.

        Args:
            model: an array, a sequence or a mapping of arrays.
            buffer_size: K, 1 or more.
            learning_rate: of the server, 0 or more.
            staleness: s, from the number of versions that an update is behind to a weight above 0, at most 1.
            divisor: "count" or "weights".
            max_staleness: updates further behind are dropped, with a warning; None takes all.
            buffers: names of further leaves that are averaged as they are.
            nan_policy: for an update with a NaN or an infinity, as in `fedavg`: "drop" leaves it out and warns.
            integer_policy: for integer and bool leaves of the K clients, as in `fedavg`.
        """
        super().__init__(model, staleness, max_staleness, nan_policy, integer_policy)
        if not isinstance(buffer_size, int) or buffer_size < 1:
            raise ValueError(f"buffer_size: expected an integer of 1 or more, got {buffer_size!r}")
        if divisor not in DIVISORS:
            raise ValueError(f"divisor: expected one of {', '.join(DIVISORS)}, got {divisor!r}")
        self.buffer_size, self.divisor, self.buffers = buffer_size, divisor, as_buffers(buffers)
        names = Structure(self._model).names or (None,)
        for name in self.buffers:
            if name not in names:
                raise ValueError(f"buffers: the model has no leaf {name!r}")
        self.learning_rate = in_range(learning_rate, "learning_rate")
        self._buffer = self._new_buffer()

    def __repr__(self) -> str:
        return f"FedBuff(version={self._version}, pending={self.pending})"

    @property
    def pending(self) -> int:
        """Updates in the buffer."""
        return self._buffer.count

    def add(self, update: Any, version: int) -> int:
        """Adds a client's change to the buffer; the K-th one changes the model and empties it.

        Args:
            update: the client's deltas, and the values of its buffers, of the server's structure, shapes, dtypes and
                device; leaves may be `Quantized`. It is not altered, and not needed afterwards.
            version: that of the model from which the client started.

        Returns:
            The version now: one more if this was the K-th.

        Raises:
            TypeError, ValueError: the update does not fit, the version is negative or newer than the newest, or under
                "raise" it holds a NaN or an infinity. Nothing has changed then.
            NonFiniteUpdateError: the K updates would make the model infinite, and `nan_policy` is not "propagate". The
                model and its version are as they were, and the buffer is empty: with those updates in it, every later
                one would fail too.
        """
        with self._lock:
            weight = self._weight(version)
            if weight is None:
                return self._version
            self._check(update, version)
            try:
                self._buffer.add(self._finite(update), weight)
            except NonFiniteUpdateError:
                reason = f"it {NONFINITE}"
                if self.nan_policy == "raise":
                    raise NonFiniteUpdateError(f"update of version {version}: {reason}") from None
                self._drop(version, reason)
            if self._buffer.count >= self.buffer_size:
                self._apply()
            return self._version

    def state_dict(self) -> dict[str, Any]:
        """A copy of the model and the buffer, for `load_state_dict`; the constructor's arguments are not in it."""
        with self._lock:
            return {**super().state_dict(), "buffer": self._buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` saved, with this server's own arguments.

        Raises:
            ValueError: the state is of another kind of server or of another model, or its buffer has summed integers
                under an `integer_policy` that this server cannot go on with. Nothing has changed then.
        """
        with self._lock:
            loaded = self._loaded(state)
            self._buffer = self._loaded_buffer(state)
            self._model, self._version, self.dropped = loaded

    def _new_buffer(self) -> Accumulator:
        policy = "propagate" if self.nan_policy == "propagate" else "raise"
        return Accumulator(nan_policy=policy, integer_policy=self.integer_policy, sent=self._sent())

    def _sent(self) -> Sent:
        """The model whose infinities are no fault of an update's."""
        return Sent(self._model, unrounded=False)

    def _finite(self, update: Any) -> Any:
        """The update without the differences from infinities of the model, which are NaN."""
        structure, inputs = Structure(self._model), inputs_of(self._model)
        infinite = infinite_leaves(inputs)
        if not infinite:
            return update
        leaves, names = structure.leaves(update, "update"), structure.names or (None,)
        for index in infinite:
            if not is_buffer(names[index], inputs[index].dtype, self.buffers):
                leaf = dequantize(leaves[index]) if isinstance(leaves[index], Quantized) else adopt(leaves[index])[1]
                leaves[index] = with_zeros(leaf, is_nonfinite(inputs[index].owners[0]))
        return structure.build(leaves)

    def _loaded_buffer(self, state: dict[str, Any]) -> Accumulator:
        """The buffer that a state holds, with this server's policies.

        Raises:
            ValueError: there is none, it is damaged, or of another model.
        """
        saved = state.get("buffer")
        if not isinstance(saved, dict):
            raise ValueError("state: expected a buffer, as FedBuff.state_dict() saves it")
        own, buffer = self._new_buffer(), Accumulator()
        buffer.load_state_dict(saved)
        if buffer.count == 0:
            return own
        if _leaves_of_buffer(saved) != self._leaves_for_buffer():
            raise ValueError("state: its buffer is of another model, or has summed integers under another policy")
        options = {name: getattr(own, name) for name in ("nan_policy", "integer_policy", "batch", "low_memory")}
        buffer.load_state_dict({**saved, **options})
        return buffer

    def _leaves_for_buffer(self) -> dict[Any, tuple[Any, ...]]:
        """What `_leaves_of_buffer` says of a buffer of this server."""
        rounds = self.integer_policy == "round"
        names = Structure(self._model).names or (None,)
        return {
            name: (leaf.device, leaf.kind.name, name_of(leaf.dtype), leaf.shape, rounds and not leaf.is_float)
            for name, leaf in zip(names, inputs_of(self._model), strict=True)
        }

    def _check(self, update: Any, version: int) -> None:
        """Raises TypeError or ValueError unless the update is like the model."""
        structure = Structure(self._model)
        try:
            for index, column in enumerate(structure.columns([self._model, update])):
                expected = gather(column, structure, index, None).dtype
                if name_of(column[1].dtype) != name_of(expected):
                    where = f"client 1, {structure.leaf_name(index)}"
                    raise TypeError(f"{where}: expected dtype {name_of(expected)}, got {name_of(column[1].dtype)}")
        except (TypeError, ValueError) as error:
            raise type(error)(renamed(error, version)) from None

    def _apply(self) -> None:
        """Makes the next version from the buffer."""
        total = self._buffer.total_weight
        divisor = self._buffer.count if self.divisor == "count" else total
        rate = self.learning_rate * total / divisor
        stepped = add(self._model, self._buffer.result(), rate, self.buffers, keep_buffers=False)
        self._buffer.reset(sent=self._sent())
        where = None if self.nan_policy == "propagate" else nonfinite_leaf(stepped, self._model)
        if where is not None:
            step = f"the step from version {self._version} leads to a NaN or an infinity"
            raise NonFiniteUpdateError(f"the model, {where}: {step}; the buffer has been emptied")
        self._model = stepped
        self._version += 1
        self._buffer.reset(sent=self._sent())


def _leaves_of_buffer(saved: dict[str, Any]) -> dict[Any, tuple[Any, ...]]:
    """By name, the device, library, dtype and shape of a saved buffer's leaves, and whether integers are rounded."""
    names = saved["structure"]["names"] or (None,)
    return {
        name: (saved["device"], kind, dtype, tuple(shape), Code(code) not in FLOATS and Code(state) == Code.FLOAT64)
        for name, (kind, dtype, code, shape, state, _) in zip(names, saved["leaves"], strict=True)
    }
