"""Federated averaging by hand: ten clients, one model, and a single line of fastagg.

python examples/hand_written_loop.py
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

import fastagg

CLIENTS, ROUNDS, LOCAL_EPOCHS = 10, 5, 3


def train(model: nn.Module, images: Subset) -> nn.Module:
    """A copy of the model, trained on one client's images."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(LOCAL_EPOCHS):
        for pixels, labels in DataLoader(images, batch_size=16, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
    return model


torch.manual_seed(0)
digits = load_digits()
images = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
test, *clients = random_split(images, [0.2] + [0.8 / CLIENTS] * CLIENTS)
model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

for number in range(1, ROUNDS + 1):
    trained = [train(model, client) for client in clients]
    mean = fastagg.fedavg([client.state_dict() for client in trained], weights=[len(client) for client in clients])
    model.load_state_dict(mean)

    pixels, labels = test[:]
    accuracy = (model.eval()(pixels).argmax(dim=1) == labels).float().mean()
    print(f"round {number}: accuracy {accuracy:.3f}")
    model.train()
