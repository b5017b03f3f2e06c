"""FedProx's proximal term, for a client's local training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fastagg.server.optimizer import in_range

if TYPE_CHECKING:
    import torch

    Parameters = Iterable[torch.Tensor] | Mapping[str, torch.Tensor]


def proximal_term(parameters: Parameters, global_parameters: Parameters, mu: float) -> torch.Tensor:
    """FedProx's term, to be added to a client's loss.

    ``mu / 2 * sum((w - w_global)**2)`` (Li et al. 2020, "Federated Optimization in Heterogeneous Networks"). It keeps
    local models near the one that the server sent:

        sent = [parameter.detach().clone() for parameter in model.parameters()]
        loss = criterion(model(inputs), labels) + proximal_term(model.parameters(), sent, mu=0.01)
        loss.backward()

    Args:
        parameters: torch tensors, as `model.parameters()` or dict(model.named_parameters()).
        global_parameters: the same parameters as the server sent them; no gradients flow into them.
        mu: 0 or more.

    Returns:
        A scalar tensor with a gradient towards `parameters`, float32 or wider: squares of fp16 would soon be infinite.

    Raises:
        ValueError: numbers, names or shapes of parameters differ, there are none, or mu is negative.
    """
    pairs = _pairs(parameters, global_parameters)
    factor = in_range(mu, "mu") / 2
    squares = [(_wide(own) - _wide(sent.detach())).square().sum() for own, sent in pairs]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    return factor * total


def add_proximal_gradients(parameters: Parameters, global_parameters: Parameters, mu: float) -> None:
    """Adds the gradient of `proximal_term`, ``mu * (w - w_global)``, to the gradients that a backward pass has left.

    Without a graph, and without memory for it: call it between `loss.backward()` and `optimizer.step()`. Parameters
    without a gradient, frozen ones among them, are left alone.

    Raises:
        ValueError: as for `proximal_term`.
    """
    mu = in_range(mu, "mu")
    for own, sent in _pairs(parameters, global_parameters):
        if own.grad is not None:
            own.grad.add_(own.detach() - sent.detach(), alpha=mu)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float32, or as wide as it is."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _pairs(parameters: Parameters, global_parameters: Parameters) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter with the server's, by name where both have names.

    Raises:
        ValueError: they do not fit.
    """
    if isinstance(parameters, Mapping) and isinstance(global_parameters, Mapping):
        missing = [name for name in parameters if name not in global_parameters]
        if missing:
            raise ValueError(f"global_parameters: missing {missing[0]!r}")
        names: list[str | int] = list(parameters)
        own, sent = list(parameters.values()), [global_parameters[name] for name in parameters]
    elif isinstance(parameters, Mapping) or isinstance(global_parameters, Mapping):
        raise ValueError("expected parameters and global_parameters both with names, or both without")
    else:
        own, sent = list(parameters), list(global_parameters)
        names = list(range(len(own)))
    if len(own) != len(sent) or not own:
        raise ValueError(f"global_parameters: expected {len(own) or 'at least one'}, got {len(sent)}")
    for name, one, other in zip(names, own, sent, strict=True):
        if one.shape != other.shape:
            raise ValueError(
                f"global_parameters, parameter {name!r}: expected shape {tuple(one.shape)}, got {tuple(other.shape)}"
            )
    return list(zip(own, sent, strict=True))
