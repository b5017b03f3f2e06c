"""Asynchronous aggregation: servers that take each update as it arrives, whatever version its client started from.

A server written by hand:

    server = FedAsync(model, mixing=0.6, staleness=polynomial(0.5))
    model, version = server.latest()  # for each client that asks for work
    server.add(trained_model, version)  # for each one that is done
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fastagg._codes import FLOATS, Code, name_of
from fastagg._errors import DroppedUpdateWarning, NonFiniteUpdateError
from fastagg._updates import Structure
from fastagg.accumulator import Accumulator
from fastagg.averaging import NONFINITE, LeafInputs, check_policies, fedavg, gather, mean_and_dropped, nonfinite_leaves
from fastagg.server.optimizer import as_buffers, in_range
from fastagg.server.step import add, interpolate

__all__ = ["DroppedContribution", "FedAsync", "FedBuff", "Staleness", "constant", "hinge", "polynomial"]

Staleness = Callable[[int], float]
DIVISORS = ("count", "weights")


def constant() -> Staleness:
    """``s(t) = 1``: an update weighs the same however old the model is that its client started from."""
    return lambda staleness: 1.0


def hinge(a: float = 10.0, b: float = 4.0) -> Staleness:
    """``s(t) = 1 if t <= b else 1 / (a * (t - b) + 1)`` (Xie et al. 2019, section 5.2).

    Raises:
        ValueError: a or b is negative.
    """
    a, b = in_range(a, "a"), in_range(b, "b")
    return lambda staleness: 1.0 if staleness <= b else 1.0 / (a * (staleness - b) + 1.0)


def polynomial(a: float = 0.5) -> Staleness:
    """``s(t) = (t + 1) ** -a`` (Xie et al. 2019, section 5.2; with a = 0.5 the weight of Nguyen et al. 2022).

    Raises:
        ValueError: a is negative.
    """
    a = in_range(a, "a")
    return lambda staleness: (staleness + 1.0) ** -a


_INVERSE_ROOT = polynomial(0.5)


class DroppedContribution(NamedTuple):
    """An update that a server left out: the version its client started from, and why."""

    version: int
    reason: str


class _Server:
    """What both servers share: versions, who is too old, and the checkpoint."""

    def __init__(
        self, model: Any, staleness: Staleness, max_staleness: int | None, nan_policy: str, integer_policy: str
    ) -> None:
        check_policies(nan_policy, integer_policy)
        if not callable(staleness):
            raise TypeError(f"staleness: expected a function such as polynomial(0.5), got {staleness!r}")
        if max_staleness is not None and (not isinstance(max_staleness, int) or max_staleness < 0):
            raise ValueError(f"max_staleness: expected an integer of 0 or more, or None, got {max_staleness!r}")
        self.staleness, self.max_staleness = staleness, max_staleness
        self.nan_policy, self.integer_policy = nan_policy, integer_policy
        self.dropped: list[DroppedContribution] = []
        self._lock = threading.RLock()
        self._model = fedavg([model])
        self._version = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(version={self._version})"

    @property
    def model(self) -> Any:
        """The newest model. It never changes: later versions are new arrays."""
        return self._model

    @property
    def version(self) -> int:
        """How often the model has changed."""
        return self._version

    def latest(self) -> tuple[Any, int]:
        """The newest model and its version, which belong together whatever other threads add."""
        with self._lock:
            return self._model, self._version

    def state_dict(self) -> dict[str, Any]:
        """A copy of the model and what is held, for `load_state_dict`; the constructor's arguments are not in it."""
        with self._lock:
            return {
                "format": 1,
                "server": type(self).__name__,
                "version": self._version,
                "model": fedavg([self._model], nan_policy="propagate"),
                "dropped": [tuple(dropped) for dropped in self.dropped],
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` saved, with this server's own arguments.

        Raises:
            ValueError: the state is of another kind of server or of another model. Nothing has changed then.
        """
        with self._lock:
            self._model, self._version, self.dropped = self._loaded(state)

    def _loaded(self, state: Any) -> tuple[Any, int, list[DroppedContribution]]:
        """The model, the version and the updates left out that a state holds, checked.

        Raises:
            ValueError: the state is of another kind of server or of another model.
        """
        if not isinstance(state, dict) or state.get("format") != 1 or state.get("server") != type(self).__name__:
            raise ValueError(f"state: expected what {type(self).__name__}.state_dict() returned, format 1")
        try:
            model = interpolate(self._model, state["model"], 1.0)
            where = None if self.nan_policy == "propagate" else _nonfinite_leaf(model)
            if where is not None:
                raise NonFiniteUpdateError(f"the model, {where}: it {NONFINITE}")
            version = _as_version(state["version"])
            if version < 0:
                raise ValueError(f"version: expected 0 or more, got {version}")
            return model, version, [DroppedContribution(*dropped) for dropped in state["dropped"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state: damaged, or of another model: {error}") from None

    def _weight(self, version: Any) -> float | None:
        """The staleness weight of an update of a version; None if it is too old, which is reported.

        Raises:
            TypeError, ValueError: there never was such a version, or the weight is out of range.
        """
        version = _as_version(version)
        if not 0 <= version <= self._version:
            raise ValueError(f"version: expected 0 to {self._version}, the newest, got {version}")
        staleness = self._version - version
        if self.max_staleness is not None and staleness > self.max_staleness:
            self._drop(version, f"its staleness is {staleness}, above max_staleness={self.max_staleness}", stacklevel=4)
            return None
        weight = in_range(self.staleness(staleness), f"the weight of staleness {staleness}")
        if not 0 < weight <= 1:
            raise ValueError(f"the weight of staleness {staleness}: expected above 0, at most 1, got {weight}")
        return weight

    def _drop(self, version: int, reason: str, stacklevel: int = 3) -> None:
        """Reports an update that is left out, to whoever called `add`."""
        self.dropped.append(DroppedContribution(version, reason))
        warnings.warn(f"update of version {version} dropped: {reason}", DroppedUpdateWarning, stacklevel=stacklevel)


class FedAsync(_Server):
    """Asynchronous federated optimisation: every update changes the model (Xie et al. 2019, Algorithm 1).

    ``x = (1 - alpha_t) * x + alpha_t * x_new``, ``alpha_t = mixing * s(version now - version of the client's start)``

    Integer and bool leaves follow `integer_policy`, over the server's and the client's; float buffers are mixed.
    Methods may be called from several threads.

    Attributes:
        dropped: the updates that were left out, as (version, reason).
    """

    def __init__(
        self,
        model: Any,
        *,
        mixing: float = 0.6,
        staleness: Staleness = _INVERSE_ROOT,
        max_staleness: int | None = None,
        nan_policy: str = "drop",
        integer_policy: str = "max",
    ) -> None:
        """A server whose model, a copy, is version 0.

        Args:
            model: an array, a sequence or a mapping of arrays.
            mixing: alpha, above 0 and at most 1.
            staleness: s, from the number of versions that an update is behind to a weight above 0, at most 1.
            max_staleness: updates further behind are dropped, with a warning; None takes all.
            nan_policy: for an update with a NaN or an infinity, as in `fedavg`: "drop" leaves it out and warns.
            integer_policy: "max", "first" (the server's stay as they are) or "round", as in `fedavg`.
        """
        super().__init__(model, staleness, max_staleness, nan_policy, integer_policy)
        self.mixing = in_range(mixing, "mixing")
        if not 0 < self.mixing <= 1:
            raise ValueError(f"mixing: expected a number above 0, at most 1, got {mixing}")

    def add(self, update: Any, version: int) -> int:
        """Mixes in a client's model.

        Args:
            update: the model that the client has trained, of the server's structure, shapes, dtypes and device; leaves
                may be `Quantized`. It is not altered, and not needed afterwards.
            version: that of the model from which the client started.

        Returns:
            The version now: one more, unless the update was dropped.

        Raises:
            TypeError, ValueError: the update does not fit, the version is negative or newer than the newest, or under
                "raise" it holds a NaN or an infinity. Nothing has changed then.
        """
        with self._lock:
            weight = self._weight(version)
            if weight is None:
                return self._version
            alpha = self.mixing * weight
            policy = "propagate" if self.nan_policy == "propagate" else "raise"
            try:
                updates, weights = [self._model, update], [1 - alpha, alpha]
                mixed, _ = mean_and_dropped(updates, weights, None, None, policy, self.integer_policy)
            except NonFiniteUpdateError as error:
                if self.nan_policy == "raise":
                    raise NonFiniteUpdateError(_renamed(error, version)) from None
                self._drop(version, f"it {NONFINITE}")
                return self._version
            except (TypeError, ValueError) as error:
                raise type(error)(_renamed(error, version)) from None
            self._model = mixed
            self._version += 1
            return self._version


class FedBuff(_Server):
    """Buffered asynchronous aggregation: every K updates change the model (Nguyen et al. 2022, Algorithm 1).

    ``x = x + learning_rate / D * sum_i(s(staleness_i) * delta_i)`` over the K updates in the buffer. D is their count
    K, as in the paper; with ``divisor="weights"`` it is ``sum_i(s(staleness_i))``, which makes steps of full length of
    stale updates too. Every update counts for itself, whichever version it is of.

    Clients send ``delta = trained model - model they started from``, but the values themselves of buffers (integer and
    bool leaves, running_mean, running_var and the others that `fastagg.server.FedAvg.step` names): those become the
    mean of what the K clients sent, weighted by s. The buffer is an `Accumulator`, so that memory does not grow with K.
    Methods may be called from several threads.

    Attributes:
        dropped: the updates that were left out, as (version, reason).
    """

    def __init__(
        self,
        model: Any,
        *,
        buffer_size: int = 10,
        learning_rate: float = 1.0,
        staleness: Staleness = _INVERSE_ROOT,
        divisor: str = "count",
        max_staleness: int | None = None,
        buffers: Iterable[Any] = (),
        nan_policy: str = "drop",
        integer_policy: str = "max",
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
                self._buffer.add(update, weight)
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
        return Accumulator(nan_policy=policy, integer_policy=self.integer_policy)

    def _loaded_buffer(self, state: dict[str, Any]) -> Accumulator:
        """The buffer that a state holds, with this server's policies.

        Raises:
            ValueError: there is none, it is damaged, or of another model.
        """
        saved = state.get("buffer")
        if not isinstance(saved, dict):
            raise ValueError("state: expected a buffer, as FedBuff.state_dict() saves it")
        buffer = self._new_buffer()
        if saved.get("count") == 0:
            return buffer
        own = ("nan_policy", "integer_policy", "batch", "low_memory")
        buffer.load_state_dict({**saved, **{name: getattr(buffer, name) for name in own}})
        if saved["structure"] is None or _leaves_of_buffer(saved) != self._leaves_for_buffer():
            raise ValueError("state: its buffer is of another model, or has summed integers under another policy")
        return buffer

    def _leaves_for_buffer(self) -> dict[Any, tuple[Any, ...]]:
        """What `_leaves_of_buffer` says of a buffer of this server."""
        rounds = self.integer_policy == "round"
        names = Structure(self._model).names or (None,)
        return {
            name: (leaf.device, leaf.kind.name, name_of(leaf.dtype), leaf.shape, rounds and not leaf.is_float)
            for name, leaf in zip(names, _inputs_of(self._model), strict=True)
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
            raise type(error)(_renamed(error, version)) from None

    def _apply(self) -> None:
        """Makes the next version from the buffer."""
        total = self._buffer.total_weight
        divisor = self._buffer.count if self.divisor == "count" else total
        rate = self.learning_rate * total / divisor
        stepped = add(self._model, self._buffer.result(), rate, self.buffers, keep_buffers=False)
        self._buffer.reset()
        where = None if self.nan_policy == "propagate" else _nonfinite_leaf(stepped)
        if where is not None:
            step = f"the step from version {self._version} leads to a NaN or an infinity"
            raise NonFiniteUpdateError(f"the model, {where}: {step}; the buffer has been emptied")
        self._model = stepped
        self._version += 1


def _as_version(version: Any) -> int:
    """A version as an integer; raises TypeError if it is none."""
    if isinstance(version, bool) or not hasattr(version, "__index__"):
        raise TypeError(f"version: expected an integer, got {version!r}")
    return int(version.__index__())


def _inputs_of(model: Any) -> list[LeafInputs]:
    """A model's leaves as native operands."""
    structure = Structure(model)
    return [gather(column, structure, index, None) for index, column in enumerate(structure.columns([model]))]


def _nonfinite_leaf(model: Any) -> str | None:
    """The first leaf with a NaN or an infinity, as errors call it."""
    inputs = _inputs_of(model)
    flagged = nonfinite_leaves(inputs, 0, inputs[0].kind.stream(inputs[0].device))
    return Structure(model).leaf_name(flagged[0]) if flagged else None


def _leaves_of_buffer(saved: dict[str, Any]) -> dict[Any, tuple[Any, ...]]:
    """By name, the device, library, dtype and shape of a saved buffer's leaves, and whether integers are rounded."""
    names = saved["structure"]["names"] or (None,)
    return {
        name: (saved["device"], kind, dtype, tuple(shape), Code(code) not in FLOATS and Code(state) == Code.FLOAT64)
        for name, (kind, dtype, code, shape, state, _) in zip(names, saved["leaves"], strict=True)
    }


def _renamed(error: Exception, version: int) -> str:
    """An error about the server's model and an update, as `fedavg` words it of clients 0 and 1."""
    text = str(error).replace("client 1", f"update of version {version}", 1)
    text = text.replace(" (dtype= says what the result shall be)", "")
    return text.replace("the first client's", "the server's").replace("client 0's", "the server's")
