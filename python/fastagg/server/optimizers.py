"""The optimisers that step from a model towards the clients' mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from fastagg._native.operands import ADAGRAD, ADAM, INTERPOLATE, MOMENTUM, YOGI, OptimizerOperands
from fastagg.server.optimizer import ServerOptimizer, as_tau, in_range


class FedAvg(ServerOptimizer):
    """The clients' mean, or a step towards it (McMahan et al. 2017; Reddi et al. 2021, with SGD as the server's).

    ``x = x + learning_rate * (mean - x)``; with a learning rate of 1 the mean itself.
    """

    _HYPERPARAMETERS = ("learning_rate",)

    def __init__(self, *, learning_rate: float = 1.0, buffers: Iterable[Any] = ()) -> None:
        """An optimiser without state.

        Args:
            learning_rate: 0 or more.
            buffers: names of leaves that take the mean as it is, beside those that `step` names.
        """
        super().__init__(buffers, learning_rate=learning_rate)

    def _operands(self, learning_rate: float | None) -> OptimizerOperands:
        return INTERPOLATE, self._rate(learning_rate), 0.0, 0.0, 0.0


class FedAvgM(ServerOptimizer):
    """Momentum at the server (Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution").

    ``m = momentum * m + (x - mean); x = x - learning_rate * m``, with m = 0 at first.

    The defaults are Flower's, and change nothing: without momentum it is `FedAvg`, and keeps no moments. 0.9 is usual.
    """

    _HYPERPARAMETERS = ("learning_rate", "momentum")
    momentum: float

    def __init__(self, *, learning_rate: float = 1.0, momentum: float = 0.0, buffers: Iterable[Any] = ()) -> None:
        """An optimiser that has made no step.

        Args:
            learning_rate: 0 or more.
            momentum: 0 or more, below 1.
            buffers: names of leaves that take the mean as it is, beside those that `step` names.
        """
        super().__init__(buffers, learning_rate=learning_rate, momentum=momentum)

    def _operands(self, learning_rate: float | None) -> OptimizerOperands:
        momentum = in_range(self.momentum, "momentum", below=1.0)
        return MOMENTUM if momentum else INTERPOLATE, self._rate(learning_rate), momentum, 0.0, 0.0

    def _moment_count(self) -> int:
        return 1 if self.momentum else 0


class _Adaptive(ServerOptimizer):
    """The rules of Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2."""

    _HYPERPARAMETERS: ClassVar[tuple[str, ...]] = ("learning_rate", "beta_1", "beta_2", "tau")
    _RULE: ClassVar[int]
    beta_1: float
    beta_2: float
    tau: float

    def _operands(self, learning_rate: float | None) -> OptimizerOperands:
        beta_1 = in_range(self.beta_1, "beta_1", below=1.0)
        beta_2 = in_range(self.beta_2, "beta_2", below=1.0)
        return self._RULE, self._rate(learning_rate), beta_1, beta_2, as_tau(self.tau)

    def _moment_count(self) -> int:
        return 2


class FedAdam(_Adaptive):
    """Adam at the server (Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2).

    ``delta = mean - x; m = beta_1 * m + (1 - beta_1) * delta; v = beta_2 * v + (1 - beta_2) * delta**2``
    ``x = x + learning_rate * m / (sqrt(v) + tau)``, with m = v = 0 at first and, as in the paper, no bias correction:
    `step(learning_rate=...)` takes a corrected rate.
    """

    _RULE = ADAM

    def __init__(
        self,
        *,
        learning_rate: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        buffers: Iterable[Any] = (),
    ) -> None:
        """An optimiser that has made no step.

        Args:
            learning_rate: 0 or more.
            beta_1: decay of the first moment, 0 or more and below 1.
            beta_2: decay of the second moment, 0 or more and below 1.
            tau: degree of adaptivity, a normal number above 0.
            buffers: names of leaves that take the mean as it is, beside those that `step` names.
        """
        super().__init__(buffers, learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2, tau=tau)


class FedYogi(_Adaptive):
    """Yogi at the server (Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2).

    ``delta = mean - x; m = beta_1 * m + (1 - beta_1) * delta``
    ``v = v - (1 - beta_2) * delta**2 * sign(v - delta**2); x = x + learning_rate * m / (sqrt(v) + tau)``, with
    m = v = 0 at first.
    """

    _RULE = YOGI

    def __init__(
        self,
        *,
        learning_rate: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        buffers: Iterable[Any] = (),
    ) -> None:
        """An optimiser that has made no step; the arguments are those of `FedAdam`."""
        super().__init__(buffers, learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2, tau=tau)


class FedAdagrad(_Adaptive):
    """Adagrad at the server (Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2).

    ``delta = mean - x; m = beta_1 * m + (1 - beta_1) * delta; v = v + delta**2``
    ``x = x + learning_rate * m / (sqrt(v) + tau)``, with m = v = 0 at first.
    """

    _RULE = ADAGRAD
    _HYPERPARAMETERS = ("learning_rate", "beta_1", "tau")
    beta_2 = 0.0

    def __init__(
        self,
        *,
        learning_rate: float = 0.1,
        beta_1: float = 0.0,
        tau: float = 1e-3,
        buffers: Iterable[Any] = (),
    ) -> None:
        """An optimiser that has made no step; the arguments are those of `FedAdam`."""
        super().__init__(buffers, learning_rate=learning_rate, beta_1=beta_1, tau=tau)
