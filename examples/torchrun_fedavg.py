"""Federated averaging simulated by several processes: each trains clients of its own, and all end with the same mean.

torchrun --nproc-per-node 2 examples/torchrun_fedavg.py
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: optimizers load it, and loaded beside a group it would keep that to the very end
from sklearn.datasets import load_digits
from torch import nn

import fastagg
from fastagg.ranks import merge_over_ranks

TEST_IMAGES = 360
LEARNING_RATE, BATCH, LOCAL_EPOCHS = 0.1, 16, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20, help="of all ranks together")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same model on every rank
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    pixels, labels = digits()
    test = slice(0, TEST_IMAGES)
    clients = torch.arange(TEST_IMAGES, len(labels)).tensor_split(options.clients)
    mine = clients[dist.get_rank() :: dist.get_world_size()]

    accumulator = fastagg.Accumulator()
    for number in range(1, options.rounds + 1):
        accumulator.reset()
        for client in mine:
            accumulator.add(train_locally(model, pixels[client], labels[client]), weight=len(client))
        merge_over_ranks(accumulator)
        model.load_state_dict(accumulator.result())
        if dist.get_rank() == 0:
            print(f"round {number}: accuracy {accuracy(model, pixels[test], labels[test]):.3f}", flush=True)
    if all_ranks_agree(model) and dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks have the same bits, of {accumulator.count} clients")
    dist.destroy_process_group()


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.target))
    return torch.tensor(found.data / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]


def train_locally(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a client sends: the model after its local epochs."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(LOCAL_EPOCHS):
        for chosen in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixels[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.state_dict()


@torch.no_grad()
def accuracy(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    return (model.eval()(pixels).argmax(dim=1) == labels).float().mean().item()


def all_ranks_agree(model: nn.Module) -> bool:
    own = [tensor.numpy().tobytes() for tensor in model.state_dict().values()]
    everyone: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return all(other == own for other in everyone)


if __name__ == "__main__":
    main()
