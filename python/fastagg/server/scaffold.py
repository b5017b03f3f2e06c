"""Scaffold: control variates against the drift of clients whose data differ."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastagg._arrays.registry import adopt
from fastagg._updates.sent import Sent, is_nonfinite
from fastagg._updates.structure import Structure
from fastagg.averaging.mean import copy_of, fedavg, mean_and_dropped
from fastagg.server.optimizer import as_buffers, in_range
from fastagg.server.step import add, interpolate


class ClientControl(NamedTuple):
    """What `client_control` returns: the client keeps `control`, and sends `change` to the server."""

    control: Any
    change: Any


class Scaffold:
    """The server's side of SCAFFOLD (Karimireddy et al. 2020, Algorithm 1).

    ``x = x + learning_rate / |S| * sum_i(y_i - x); c = c + 1 / N * sum_i(change_i)`` over the clients S of a round, y_i
    being their models, N the number of all clients, and c = 0 at first. A client's local step is
    ``y = y - local_rate * (gradient - c_i + c)``; then `client_control` makes its new c_i.

    Buffers are averaged, and have a control of zeros that never changes. Quantised updates count by how far they are
    from the model as their wire rounds it, see `fedavg`'s `sent`.
    """

    def __init__(self, model: Any, clients: int, *, learning_rate: float = 1.0, buffers: Iterable[Any] = ()) -> None:
        """A server with a control of zeros.

        Args:
            model: an array, a sequence or a mapping of arrays, of which only structure, shapes and dtypes count.
            clients: N, 1 or more: all there are, whether or not they take part in a round.
            learning_rate: 0 or more.
            buffers: names of leaves that are averaged as they are, beside those that `FedAvg.step` names.
        """
        if not isinstance(clients, int) or clients < 1:
            raise ValueError(f"clients: expected an integer of 1 or more, got {clients!r}")
        self.clients, self.buffers = clients, as_buffers(buffers)
        self.learning_rate = in_range(learning_rate, "learning_rate")
        self._control = zeros_like(model)

    @property
    def control(self) -> Any:
        """c, in the structure and dtypes of the model: a copy, so that nobody who holds it changes the server's."""
        return copy_of(self._control)

    def __repr__(self) -> str:
        return f"Scaffold(clients={self.clients}, learning_rate={self.learning_rate})"

    def step(
        self,
        model: Any,
        updates: Iterable[Any],
        changes: Iterable[Any],
        *,
        out: Any = None,
        integer_policy: str | None = None,
    ) -> Any:
        """The next model; the control changes with it. As in the paper, all clients weigh the same.

        Args:
            model: what the clients started from; not altered.
            updates: the models that clients of this round have trained.
            changes: what their controls have changed by, in the same order.
            out: as in `FedAvg.step`; may be the model itself.
            integer_policy: as in `fedavg`.

        Raises:
            TypeError, ValueError: as `fedavg` and `FedAvg.step` raise, a NaN or an infinity among them, or there are
                more clients than N, or not as many changes as updates. The control has not changed then.
        """
        updates, changes = list(updates), list(changes)
        if len(changes) != len(updates):
            raise ValueError(f"changes: expected {len(updates)}, one for each update, got {len(changes)}")
        if len(updates) > self.clients:
            raise ValueError(f"updates: expected those of at most {self.clients} clients, got {len(updates)}")
        mean, _ = mean_and_dropped(updates, None, None, "raise", integer_policy, Sent(model, self.buffers))
        try:
            change = fedavg(changes, integer_policy=integer_policy)
        except (TypeError, ValueError) as error:
            raise type(error)(f"changes: {error}") from None
        control = add(self._control, change, len(updates) / self.clients, self.buffers)
        result = interpolate(model, mean, self.learning_rate, out=out, buffers=self.buffers)
        self._control = control
        return result

    def state_dict(self) -> dict[str, Any]:
        """The control, copied, for `load_state_dict`."""
        return {"version": 1, "clients": self.clients, "control": self.control}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved control.

        Raises:
            ValueError: the state is of another number of clients, of another version, or of another model.
        """
        if not isinstance(state, dict) or state.get("version") != 1 or "control" not in state:
            raise ValueError("state: expected what Scaffold.state_dict() returned, version 1")
        if state.get("clients") != self.clients:
            raise ValueError(f"state: expected one of {self.clients} clients, got {state.get('clients')}")
        try:
            self._control = interpolate(self._control, state["control"], 1.0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"state: of another model: {error}") from None


def client_control(
    control: Any,
    server_control: Any,
    model: Any,
    local_model: Any,
    steps: int,
    learning_rate: float,
    *,
    buffers: Iterable[Any] = (),
) -> ClientControl:
    """A client's new control variate, by option II of the paper (Karimireddy et al. 2020, Algorithm 1, line 12).

    ``control + ((model - local_model) / (steps * learning_rate) - server_control)``

    Args:
        control: the client's own, c_i, in the structure and dtypes of the model; None for the first time (zeros).
        server_control: c, as it was sent with the model.
        model: x, what the client started from.
        local_model: y_i, what it has trained.
        steps: its local steps, K.
        learning_rate: of each local step.
        buffers: names of leaves without a control, as the server has them.

    Raises:
        TypeError, ValueError: structures, shapes, dtypes or devices differ, or a number is not positive.
    """
    names = as_buffers(buffers)
    distance = in_range(steps, "steps") * in_range(learning_rate, "learning_rate")
    if distance == 0 or not math.isfinite(1 / distance):
        raise ValueError(f"expected steps and learning_rate above 0, got {steps} and {learning_rate}")
    own = zeros_like(server_control) if control is None else control
    drift = add(local_model, model, -1.0, names, what="model")
    _clear_infinities(drift, model)
    surplus = add(server_control, drift, 1.0 / distance, names, what="local_model")
    new = add(own, surplus, -1.0, names, what="server_control")
    return ClientControl(new, add(new, own, -1.0, names, what="control"))


def zeros_like(model: Any) -> Any:
    """A structure of zeros of the same shapes and dtypes."""
    zeros = copy_of(model)
    for leaf in Structure(zeros).leaves(zeros, "model"):
        leaf[...] = 0
    return zeros


def _clear_infinities(drift: Any, model: Any) -> None:
    """Lets nothing drift from the infinities of a model, such as a causal mask's."""
    structure = Structure(drift)
    for leaf, sent in zip(structure.leaves(drift, "drift"), structure.leaves(model, "model"), strict=True):
        if is_nonfinite(leaf).any():
            leaf[is_nonfinite(adopt(sent)[1])] = 0
