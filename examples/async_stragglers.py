"""What stragglers cost: synchronous FedAvg, FedAsync and FedBuff on one simulated clock.

Twenty clients with non-IID shares of the handwritten digits; four of them are ten times slower. Whatever the server
does, ten clients train at a time. Needs scikit-learn:

    python examples/async_stragglers.py
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

import fastagg
from fastagg.asynchronous import FedAsync, FedBuff, polynomial

CLIENTS, AT_ONCE, STRAGGLERS = 20, 10, 4
Model = dict[str, np.ndarray]


class Client(NamedTuple):
    """One client's share of the digits, and the simulated seconds that its training takes."""

    images: np.ndarray
    labels: np.ndarray
    seconds: float


def split(images: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> list[Client]:
    """Shares in which each client has mostly a few of the ten digits (Dirichlet, alpha 0.3)."""
    shares: list[list[int]] = [[] for _ in range(CLIENTS)]
    for digit in range(10):
        places = random.permutation(np.nonzero(labels == digit)[0])
        cuts = (np.cumsum(random.dirichlet(np.full(CLIENTS, 0.3)))[:-1] * len(places)).astype(int)
        for share, part in zip(shares, np.split(places, cuts), strict=True):
            share.extend(part)
    slow = [10.0 if client < STRAGGLERS else 1.0 for client in range(CLIENTS)]
    return [
        Client(images[share], labels[share], seconds * random.uniform(0.8, 1.2))
        for share, seconds in zip(shares, slow, strict=True)
    ]


def logits_of(model: Model, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hidden layer and the logits of a network with one hidden layer."""
    hidden = np.maximum(images @ model["hidden.weight"] + model["hidden.bias"], 0)
    return hidden, hidden @ model["output.weight"] + model["output.bias"]


def train(model: Model, client: Client, random: np.random.Generator, epochs: int = 2, rate: float = 0.1) -> Model:
    """The model after a few epochs of SGD on the client's share; the one given stays as it is."""
    model = {name: leaf.copy() for name, leaf in model.items()}
    for _ in range(epochs):
        for batch in np.array_split(random.permutation(len(client.labels)), max(1, len(client.labels) // 16)):
            images, labels = client.images[batch], client.labels[batch]
            hidden, logits = logits_of(model, images)
            error = np.exp(logits - logits.max(axis=1, keepdims=True))
            error /= error.sum(axis=1, keepdims=True)
            error[np.arange(len(labels)), labels] -= 1
            error /= max(1, len(labels))
            back = (error @ model["output.weight"].T) * (hidden > 0)
            model["output.weight"] -= rate * hidden.T @ error
            model["output.bias"] -= rate * error.sum(axis=0)
            model["hidden.weight"] -= rate * images.T @ back
            model["hidden.bias"] -= rate * back.sum(axis=0)
    return model


def synchronous(model: Model, clients: list[Client], random: np.random.Generator) -> Iterator[tuple[float, Model]]:
    """FedAvg: each round takes as long as its slowest client."""
    clock = 0.0
    while True:
        chosen = [clients[client] for client in random.choice(CLIENTS, AT_ONCE, replace=False)]
        updates = [train(model, client, random) for client in chosen]
        model = fastagg.fedavg(updates, [len(client.labels) for client in chosen])
        clock += max(client.seconds for client in chosen)
        yield clock, model


def asynchronous(
    server: FedAsync | FedBuff, clients: list[Client], random: np.random.Generator
) -> Iterator[tuple[float, Model]]:
    """Whenever a client is done, another one starts from the newest model."""
    running: list[tuple[float, int, Model, int]] = []  # when it is done, who, from what model, of which version
    idle = set(range(CLIENTS))

    def start(now: float) -> None:
        client = int(random.choice(sorted(idle)))
        idle.remove(client)
        heapq.heappush(running, (now + clients[client].seconds, client, *server.latest()))

    for _ in range(AT_ONCE):
        start(0.0)
    while True:
        clock, client, model, version = heapq.heappop(running)
        update = train(model, clients[client], random)
        if isinstance(server, FedBuff):
            update = {name: update[name] - model[name] for name in model}
        server.add(update, version)
        idle.add(client)
        start(clock)
        yield clock, server.model


def accuracies(
    progress: Iterator[tuple[float, Model]], moments: list[float], correct: Callable[[Model], float], initial: Model
) -> list[float]:
    """The accuracy that a server's model has at each of these simulated moments."""
    found, model = [], initial
    clock, following = next(progress)
    for moment in moments:
        while clock <= moment:
            model = following
            clock, following = next(progress)
        found.append(correct(model))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80, help="simulated seconds in all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    random = np.random.default_rng(arguments.seed)
    digits = load_digits()
    order = random.permutation(len(digits.target))
    images, labels = (digits.data[order] / 16).astype(np.float32), digits.target[order]
    clients = split(images[:1400], labels[:1400], random)
    initial = {
        "hidden.weight": (random.normal(size=(64, 32)) / 8).astype(np.float32),
        "hidden.bias": np.zeros(32, np.float32),
        "output.weight": (random.normal(size=(32, 10)) / 6).astype(np.float32),
        "output.bias": np.zeros(10, np.float32),
    }

    def correct(model: Model) -> float:
        return float((logits_of(model, images[1400:])[1].argmax(axis=1) == labels[1400:]).mean())

    moments = [arguments.seconds * part for part in (1 / 8, 1 / 4, 1 / 2, 1)]
    fed_async = FedAsync(initial, mixing=0.3, staleness=polynomial(0.5))
    fed_buff = FedBuff(initial, buffer_size=5, staleness=polynomial(0.5))
    contenders = {
        "FedAvg, synchronous": synchronous(initial, clients, random),
        "FedAsync": asynchronous(fed_async, clients, random),
        "FedBuff, 5 updates": asynchronous(fed_buff, clients, random),
    }
    print("accuracy after".ljust(22) + "".join(f"{moment:8.0f} s" for moment in moments))
    for name, progress in contenders.items():
        found = accuracies(progress, moments, correct, initial)
        print(name.ljust(22) + "".join(f"{accuracy:10.1%}" for accuracy in found))
    print(f"FedAsync's model changed {fed_async.version} times, FedBuff's {fed_buff.version} times")


if __name__ == "__main__":
    main()
