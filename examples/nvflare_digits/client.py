"""What every site runs: trains the digits network on its share of the data, and sends it back."""

from __future__ import annotations

import argparse

import nvflare.client as flare
import torch
from digits import Network, accuracy, share_of
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=2, help="how many sites share the data")
    parser.add_argument("--epochs", type=int, default=2, help="of local training in a round")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the sites of a simulation share the processors
    flare.init()
    site = int(flare.get_site_name().rpartition("-")[2]) - 1  # sites are called site-1, site-2, ...
    images, labels, test_images, test_labels = share_of(site, arguments.sites)
    model = Network()
    while flare.is_running():
        received = flare.receive()
        model.load_state_dict(received.params)
        before = accuracy(model, test_images, test_labels)
        steps = train(model, images, labels, arguments.epochs, seed=received.current_round)
        flare.send(
            flare.FLModel(
                params=model.state_dict(),
                metrics={"accuracy": before},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},
            )
        )


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> int:
    """Some epochs of SGD; returns the number of steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model.train()
    steps = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            steps += 1
    return steps


if __name__ == "__main__":
    main()
