"""FedAsync: every update changes the model."""

from __future__ import annotations

from typing import Any

from fastagg._errors import NONFINITE, NonFiniteUpdateError
from fastagg._updates.sent import Sent
from fastagg.asynchronous.staleness import INVERSE_ROOT, Staleness
from fastagg.asynchronous.versioned_server import VersionedServer, renamed
from fastagg.averaging.mean import mean_and_dropped
from fastagg.server.optimizer import in_range


class FedAsync(VersionedServer):
    """Asynchronous federated optimisation: every update changes the model (Xie et al. 2019, Algorithm 1).

    ``x = (1 - alpha_t) * x + alpha_t * x_new``, ``alpha_t = mixing * s(version now - version of the client's start)``

    Integer and bool leaves follow `integer_policy`, over the server's and the client's; float buffers are mixed. An
    update's infinity where the model has the same, as in a causal mask, is no reason to leave it out. Of quantised
    updates, leaves that nobody trains move to where the wire rounds them, and stay there.
    Methods may be called from several threads.

    Attributes:
        dropped: the updates that were left out, as (version, reason).
    """

    def __init__(
        self,
        model: Any,
        *,
        mixing: float = 0.6,
        staleness: Staleness = INVERSE_ROOT,
        max_staleness: int | None = None,
        nan_policy: str = "drop",
        integer_policy: str | None = None,
    ) -> None:
        """A server whose model, a copy, is version 0.

        Args:
            model: an array, a sequence or a mapping of arrays.
            mixing: alpha, above 0 and at most 1.
            staleness: s, from the number of versions that an update is behind to a weight above 0, at most 1.
            max_staleness: updates further behind are dropped, with a warning; None takes all.
            nan_policy: for an update with a NaN or an infinity, as in `fedavg`: "drop" leaves it out and warns.
            integer_policy: "max", "first" (the server's stay as they are), "round" or None, as in `fedavg`.
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
                sent = Sent(self._model, unrounded=False)
                mixed, _ = mean_and_dropped(updates, weights, None, policy, self.integer_policy, sent)
            except NonFiniteUpdateError as error:
                if self.nan_policy == "raise":
                    raise NonFiniteUpdateError(renamed(error, version)) from None
                self._drop(version, f"it {NONFINITE}")
                return self._version
            except (TypeError, ValueError) as error:
                raise type(error)(renamed(error, version)) from None
            self._model = mixed
            self._version += 1
            return self._version
