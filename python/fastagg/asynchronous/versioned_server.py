"""What both servers share: versions, who is too old, and the checkpoint."""

from __future__ import annotations

import threading
import warnings
from typing import Any, NamedTuple

from fastagg._errors import NONFINITE, DroppedUpdateWarning, NonFiniteUpdateError
from fastagg._quoting import quoted
from fastagg._updates.leaves import infinite_leaves, inputs_of
from fastagg._updates.policies import check_policies
from fastagg._updates.sent import same_infinities
from fastagg._updates.structure import Structure
from fastagg.asynchronous.staleness import Staleness
from fastagg.averaging.mean import copy_of, fedavg
from fastagg.server.optimizer import in_range
from fastagg.server.step import interpolate


class DroppedContribution(NamedTuple):
    """An update that a server left out: the version its client started from, and why."""

    version: int
    reason: str


class VersionedServer:
    """What both servers share: versions, who is too old, and the checkpoint."""

    def __init__(
        self, model: Any, staleness: Staleness, max_staleness: int | None, nan_policy: str, integer_policy: str | None
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
        self._model = fedavg([model], integer_policy=integer_policy, sent=model)
        self._version = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(version={self._version})"

    @property
    def model(self) -> Any:
        """The newest model: a copy, so that nobody who trains it in place changes the server's."""
        return self.latest()[0]

    @property
    def version(self) -> int:
        """How often the model has changed."""
        return self._version

    def latest(self) -> tuple[Any, int]:
        """A copy of the newest model and its version, which belong together whatever other threads add."""
        with self._lock:
            model, version = self._model, self._version
        return copy_of(model), version  # versions are never written again, so no lock is needed while this copies

    def state_dict(self) -> dict[str, Any]:
        """A copy of the model and what is held, for `load_state_dict`; the constructor's arguments are not in it."""
        with self._lock:
            return {
                "format": 1,
                "server": type(self).__name__,
                "version": self._version,
                "model": copy_of(self._model),
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
            where = None if self.nan_policy == "propagate" else nonfinite_leaf(model, self._model)
            if where is not None:
                raise NonFiniteUpdateError(f"the model, {where}: it {NONFINITE}")
            version = as_version(state["version"])
            if version < 0:
                raise ValueError(f"version: expected 0 or more, got {version}")
            return model, version, [_dropped(*dropped) for dropped in state["dropped"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state: damaged, or of another model: {error}") from None

    def _weight(self, version: Any) -> float | None:
        """The staleness weight of an update of a version; None if it is too old, which is reported.

        Raises:
            TypeError, ValueError: there never was such a version, or the weight is out of range.
        """
        version = as_version(version)
        if not 0 <= version <= self._version:
            raise ValueError(f"version: expected 0 to {self._version}, the newest, got {quoted(version)}")
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


def _dropped(version: Any, reason: Any) -> DroppedContribution:
    """A saved update that was left out."""
    if not isinstance(reason, str):
        raise TypeError(f"dropped: expected a reason as text, got {reason!r}")
    return DroppedContribution(as_version(version), reason)


def as_version(version: Any) -> int:
    """A version as an integer; raises TypeError if it is none."""
    if isinstance(version, bool) or not hasattr(version, "__index__"):
        raise TypeError(f"version: expected an integer, got {quoted(version)}")
    return int(version.__index__())


def nonfinite_leaf(model: Any, before: Any) -> str | None:
    """The first leaf with a NaN, or an infinity that the model before does not have, as errors call it."""
    inputs, structure = inputs_of(model), Structure(model)
    known = structure.leaves(before, "the model before")
    for index in infinite_leaves(inputs):
        if not same_infinities(inputs[index].owners[0], known[index]):
            return structure.leaf_name(index)
    return None


def renamed(error: Exception, version: int) -> str:
    """An error about the server's model and an update, as `fedavg` words it of clients 0 and 1."""
    text = str(error).replace("client 1", f"update of version {version}", 1)
    text = text.replace(" (dtype= says what the result shall be)", "")
    return text.replace("the first client's", "the server's").replace("client 0's", "the server's")
