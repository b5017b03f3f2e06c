"""A rank of the benchmark of training steps: `ddp_steps.py [--quick]`, started by `all_reduce.py`."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from all_reduce_cases import NO_COMMUNICATION, PLAIN_DDP, TORCH_HOOK, fastagg_over
from all_reduce_rows import StepRow
from fastagg.ddp import AllReduceState, all_reduce_hook
from launch import keep, leave, meet
from turns import Limit, seconds

_BATCH = 16  # of each rank
_WARMUP_STEPS = 2  # DDP lays out its buckets anew after the first


def perceptron(width: int) -> torch.nn.Module:
    """25 million parameters at width 4096: more to exchange than to compute."""
    layers = (torch.nn.Linear(1024, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU())
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 1000))


def convolutions() -> torch.nn.Module:
    """A small network for images of 32 x 32: more to compute than to exchange."""
    layers: list[torch.nn.Module] = []
    for channels, more in ((3, 32), (32, 64), (64, 128)):
        layers += [torch.nn.Conv2d(channels, more, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(2048, 100))


class Trainee:
    """A model of one contender's, trained on examples of its rank's own."""

    def __init__(self, name: str, start: torch.nn.Module, examples: torch.Tensor) -> None:
        self.name, self._examples = name, examples
        self._labels = torch.arange(len(examples))
        self.model = DistributedDataParallel(copy.deepcopy(start))
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.seconds: list[float] = []

    def register(self, state: Any, hook: Any) -> Trainee:
        """Averages gradients by a communication hook."""
        self.model.register_comm_hook(state, hook)
        return self

    def step(self) -> None:
        """One step of training."""
        self.backward()
        self._optimizer.step()

    def backward(self) -> None:
        """Computes gradients, and averages them."""
        self._optimizer.zero_grad()
        with self.model.no_sync() if self.name == NO_COMMUNICATION else nullcontext():
            torch.nn.functional.cross_entropy(self.model(self._examples), self._labels).backward()

    def gradients(self) -> torch.Tensor:
        """All of them, of the last step."""
        return torch.cat([parameter.grad.reshape(-1) for parameter in self.model.parameters()])


def trainees(start: torch.nn.Module, examples: torch.Tensor) -> list[Trainee]:
    """One for each contender; the first communicates nothing."""
    return [
        Trainee(NO_COMMUNICATION, start, examples),
        Trainee(PLAIN_DDP, start, examples),
        Trainee(TORCH_HOOK, start, examples).register(None, fp16_compress_hook),
        Trainee(fastagg_over("fp32"), start, examples).register(AllReduceState(wire="fp32"), all_reduce_hook),
        Trainee(fastagg_over("fp16"), start, examples).register(AllReduceState(wire="fp16"), all_reduce_hook),
    ]


def check(own: Trainee, others: list[Trainee]) -> None:
    """Asserts that the others' gradients are the mean of those of all ranks, but for the wire's rounding."""
    for trainee in (own, *others):
        trainee.backward()
    mean = own.gradients()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    for trainee in others:
        error = float((trainee.gradients() - mean).abs().max() / mean.abs().max())
        allowed = 2.0**-10 if "fp16" in trainee.name else 1e-6
        assert error <= allowed, f"{trainee.name}: off by {error:.3g} of the largest gradient"


def measure(model: str, start: torch.nn.Module, examples: torch.Tensor, rounds: int) -> list[StepRow]:
    """The rounds of all contenders with one model."""
    taking_part = trainees(start, examples)
    check(taking_part[0], taking_part[1:])
    parameters = sum(parameter.numel() for parameter in start.parameters())
    limit = Limit(4 * parameters, dist.get_world_size())
    for trainee in taking_part:
        for _ in range(_WARMUP_STEPS):
            trainee.step()
    for _ in range(rounds):
        limit.take_turn()
        for trainee in taking_part:
            trainee.seconds.append(seconds(trainee.step))
    return [StepRow(model, parameters, one.name, one.seconds, limit.processor_shares) for one in taking_part]


def main(*options: str) -> None:
    """Measures both models."""
    quick = "--quick" in options
    rank = meet()
    torch.manual_seed(0)
    models = {"MLP": (perceptron(64 if quick else 4096), (1024,)), "CNN": (convolutions(), (3, 32, 32))}
    torch.manual_seed(1 + rank)
    for model, (start, shape) in models.items():
        for row in measure(model, start, torch.randn(_BATCH, *shape), rounds=3 if quick else 9):
            if rank == 0:
                keep(asdict(row))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
