"""FedNova: normalised averaging, for clients that make different numbers of local steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from fastagg._errors import NONFINITE, DroppedUpdateWarning
from fastagg._updates.buffers import is_buffer
from fastagg._updates.sent import Sent
from fastagg._updates.structure import Structure, as_list
from fastagg._updates.weights import as_weights
from fastagg.averaging.mean import mean_and_dropped
from fastagg.server.optimizer import as_buffers, in_range
from fastagg.server.step import interpolate


class FedNova:
    """Normalised averaging (Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous FedOpt").

    ``x = x + learning_rate * tau_eff * sum_i(p_i * (x_i - x) / a_i)``, ``p_i = weights[i] / sum(weights)``,
    ``tau_eff = sum_i(p_i * a_i)`` unless given, over the clients that contribute.

    Computed as one mean and one step: ``x + W * (fedavg(updates, p_i / a_i) - x)`` with
    ``W = learning_rate * tau_eff * sum_i(p_i / a_i)``. Buffers, which are no sums over steps, take the mean weighted by
    p_i. Quantised updates count by how far they are from the model as their wire rounds it, see `fedavg`'s `sent`.
    """

    def __init__(self, *, learning_rate: float = 1.0, buffers: Iterable[Any] = ()) -> None:
        """A server without state.

        Args:
            learning_rate: 0 or more.
            buffers: names of leaves that take the mean by `weights`, beside those that `FedAvg.step` names.
        """
        self.learning_rate, self.buffers = in_range(learning_rate, "learning_rate"), as_buffers(buffers)

    def __repr__(self) -> str:
        return f"FedNova(learning_rate={self.learning_rate})"

    def step(
        self,
        model: Any,
        updates: Iterable[Any],
        weights: Any,
        steps: Any,
        *,
        tau_eff: float | None = None,
        out: Any = None,
        nan_policy: str = "raise",
        integer_policy: str | None = None,
    ) -> Any:
        """The next model; neither the model nor the updates are altered.

        Args:
            model: what the clients started from.
            updates: K models that they have trained, of the same structure, shapes, dtypes and device.
            weights: K numbers of 0 or more, such as numbers of examples; None for equal weights.
            steps: K positive numbers a_i: local steps, or for clients with momentum or a proximal term what
                `local_normalizer` makes of them. Those of clients of weight 0 are not looked at.
            tau_eff: the effective number of steps of the round; None for the clients' weighted mean.
            out: as in `FedAvg.step`; may be the model itself.
            nan_policy: as in `fedavg`; a client that is dropped leaves W too.
            integer_policy: as in `fedavg`, by the clients' `weights`.

        Raises:
            TypeError, ValueError: as `fedavg` and `FedAvg.step` raise, or a number of steps is not positive.
        """
        updates = as_list(updates)
        weights = as_weights(weights, len(updates))
        normalizers = _as_normalizers(steps, weights)
        shares = [weight / steps for weight, steps in zip(weights, normalizers, strict=True)]
        sent = Sent(model, self.buffers)
        mean, dropped = mean_and_dropped(updates, shares, None, nan_policy, integer_policy, sent)
        for client, leaf_name in dropped.items():
            warnings.warn(f"client {client} dropped: {leaf_name} {NONFINITE}", DroppedUpdateWarning, stacklevel=2)
        kept = [client for client in range(len(weights)) if client not in dropped]
        total = math.fsum(weights[client] for client in kept)
        if tau_eff is None:
            tau_eff = math.fsum(weights[client] * normalizers[client] for client in kept) / total
        effective = in_range(tau_eff, "tau_eff") * math.fsum(shares[client] for client in kept) / total
        rate = in_range(self.learning_rate * effective, "learning_rate * W")
        counted = [0.0 if client in dropped else weight for client, weight in enumerate(weights)]
        self._average_buffers(mean, updates, counted, integer_policy)
        return interpolate(model, mean, rate, out=out, buffers=self.buffers)

    def _average_buffers(self, mean: Any, updates: list[Any], weights: list[float], integer_policy: str | None) -> None:
        """Writes the mean of the clients' buffers by their weights, whatever their steps, over that of the shares."""
        structure = Structure(mean)
        leaves = structure.leaves(mean, "mean")
        places = [
            place
            for place, (name, leaf) in enumerate(zip(structure.names or (None,), leaves, strict=True))
            if is_buffer(name, leaf.dtype, self.buffers)
        ]
        if places:
            rows = [structure.leaves(update, client) for client, update in enumerate(updates)]
            columns = [[row[place] for place in places] for row in rows]
            out = [leaves[place] for place in places]
            mean_and_dropped(columns, weights, out, "propagate", integer_policy or "max")


def local_normalizer(steps: int, *, momentum: float = 0.0, proximal: float = 0.0) -> float:
    """FedNova's a_i: the l1 norm of how a client's gradients add up (Wang et al. 2020, section 4.1).

    Plain SGD: ``steps``. Momentum r: ``(steps - r * (1 - r**steps) / (1 - r)) / (1 - r)``. A proximal term, with
    p = local learning rate * mu: ``(1 - (1 - p)**steps) / p``.

    Raises:
        ValueError: steps below 1, momentum or proximal outside [0, 1), or both above 0, for which the paper has no
            formula.
    """
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps}")
    momentum, proximal = in_range(momentum, "momentum", below=1.0), in_range(proximal, "proximal", below=1.0)
    if momentum and proximal:
        raise ValueError(f"expected momentum or proximal, got both: {momentum} and {proximal}")
    if proximal:
        return -math.expm1(steps * math.log1p(-proximal)) / proximal
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def _as_normalizers(steps: Any, weights: list[float]) -> list[float]:
    """The clients' a_i; 1 for those that do not contribute.

    Raises:
        TypeError, ValueError: there are not as many as weights, or one is not positive and finite.
    """
    if not isinstance(steps, Iterable) or isinstance(steps, (str, bytes, Mapping)):
        raise TypeError(f"steps: expected {len(weights)} numbers, got {steps!r}")
    numbers = list(steps)
    if len(numbers) != len(weights):
        raise ValueError(f"steps: expected {len(weights)}, one for each update, got {len(numbers)}")
    for client, (number, weight) in enumerate(zip(numbers, weights, strict=True)):
        if weight == 0:
            numbers[client] = 1.0
        elif in_range(number, f"the steps of client {client}") == 0:
            raise ValueError(f"the steps of client {client}: expected a number above 0, got {number}")
    return [float(number) for number in numbers]
