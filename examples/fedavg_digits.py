"""FedAvg against FedSGD on real images, as in table 2 of McMahan et al. 2017: rounds until a target accuracy.

Each round a share C of the clients trains the model for E local epochs in batches of B images, and the server averages
what they send, weighted by their numbers of images. FedSGD is E = 1 with all of a client's images in one batch. u is
the expected number of steps that a client takes in a round. As in the paper, each entry has the best of several
learning rates; unlike there, clients that are not alike come from a Dirichlet distribution (Hsu et al. 2019).

python examples/fedavg_digits.py
"""

from __future__ import annotations

import argparse
import copy
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import fastagg

CLASSES, TEST_IMAGES = 10, 360


class Images(NamedTuple):
    """Rows of 64 pixels from 0 to 1, and the digits that they show."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, chosen: torch.Tensor | slice) -> Images:
        return Images(self.pixels[chosen], self.labels[chosen])


class LocalTraining(NamedTuple):
    """What a client does in a round."""

    name: str
    epochs: int  # E
    batch: int | None  # B; None: all of a client's images


GRID = [
    LocalTraining("FedSGD", 1, None),
    LocalTraining("FedAvg", 5, None),
    LocalTraining("FedAvg", 1, 10),
    LocalTraining("FedAvg", 5, 10),
    LocalTraining("FedAvg", 20, 10),
]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)  # the model is small
    train, test = digits()
    splits = {
        "IID": split_evenly(len(train.labels), options.clients),
        f"Dirichlet({options.concentration})": split_by_label(train.labels, options.clients, options.concentration),
    }
    print(f"rounds to an accuracy of {options.target}, {options.clients} clients, C = {options.fraction}")
    print(f"{'':8}{'E':>4}{'B':>5}{'u':>7}" + "".join(f"{name:>24}" for name in splits))
    first: dict[str, int | None] = {}
    for local in GRID:
        steps = local.epochs * (len(train.labels) / options.clients / local.batch if local.batch else 1)
        line = f"{local.name:8}{local.epochs:>4}{local.batch or '∞':>5}{steps:>7.1f}"
        for name, shares in splits.items():
            clients = [train[share] for share in shares]
            rounds = min(
                (rounds_to_target(clients, test, local, rate, options) for rate in options.learning_rates),
                key=lambda found: found or options.rounds + 1,
            )
            line += f"{entry(rounds, first.setdefault(name, rounds), options.rounds):>24}"
        print(line, flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.9, help="test accuracy")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--fraction", type=float, default=0.1, help="C, the share of clients in a round")
    parser.add_argument("--concentration", type=float, default=0.3, help="of the Dirichlet split: small is unlike")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--rounds", type=int, default=200, help="after which to give up")
    parser.add_argument("--seed", type=int, default=0, help="of the model and of who takes part")
    return parser.parse_args()


def digits() -> tuple[Images, Images]:
    """scikit-learn's 1797 handwritten digits: those to train on and those to test on."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = Images(torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target))[order]
    return images[TEST_IMAGES:], images[:TEST_IMAGES]


def split_evenly(images: int, clients: int) -> list[torch.Tensor]:
    """Which images each client has, if all clients are alike."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(1))
    return list(order.tensor_split(clients))


def split_by_label(labels: torch.Tensor, clients: int, concentration: float) -> list[torch.Tensor]:
    """Which images each client has, if each digit is divided by a Dirichlet draw; some may have none."""
    random = np.random.default_rng(1)
    parts: list[list[torch.Tensor]] = [[] for _ in range(clients)]
    for digit in range(CLASSES):
        images = torch.nonzero(labels == digit).flatten()
        cuts = np.cumsum(random.dirichlet([concentration] * clients))[:-1] * len(images)
        for part, chosen in zip(parts, images.tensor_split(cuts.astype(int).tolist()), strict=True):
            part.append(chosen)
    return [torch.cat(part) for part in parts]


def rounds_to_target(
    clients: list[Images], test: Images, local: LocalTraining, rate: float, options: argparse.Namespace
) -> int | None:
    """Algorithm 1 of the paper, until the target is met."""
    torch.manual_seed(options.seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    clients = [client for client in clients if len(client.labels)]
    in_a_round = max(1, round(options.fraction * len(clients)))
    for number in range(1, options.rounds + 1):
        chosen = [clients[index] for index in torch.randperm(len(clients))[:in_a_round]]
        updates = [train_locally(model, client, local, rate) for client in chosen]
        model.load_state_dict(fastagg.fedavg(updates, weights=[len(client.labels) for client in chosen]))
        if accuracy(model, test) >= options.target:
            return number
    return None


def train_locally(model: nn.Module, images: Images, local: LocalTraining, rate: float) -> dict[str, torch.Tensor]:
    """What a client sends: the model after its local epochs."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    count = len(images.labels)
    for _ in range(local.epochs):
        for chosen in torch.randperm(count).split(local.batch or count):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.pixels[chosen]), images.labels[chosen]).backward()
            optimizer.step()
    return model.state_dict()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    return (model(images.pixels).argmax(dim=1) == images.labels).float().mean().item()


def entry(rounds: int | None, first: int | None, limit: int) -> str:
    """The rounds, and how many times fewer they are than the first row's."""
    if rounds is None:
        return f"more than {limit}"
    return f"{rounds} ({first / rounds:.1f}x)" if first else f"{rounds}"


if __name__ == "__main__":
    main()
