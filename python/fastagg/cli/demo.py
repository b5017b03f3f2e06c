"""A small federated training on real data: digits, clients that differ, and uploads of three precisions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastagg.averaging.mean import fedavg
from fastagg.quantization.cast import quantize
from fastagg.quantization.quantized import Quantized

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Model = list[Floats]
Update = list[Any]  # a model's layers, each an array or a `Quantized`

CLASSES = 10
PIXELS = 64
TEST_SHARE = 0.25
TIMED_REPEATS = 7


@dataclass(frozen=True)
class Settings:
    """What a run of the demo does; two runs of the same settings give the same bits on the same machine.

    Attributes:
        rounds: of training and averaging.
        clients: who hold the training images between them.
        participation: the share of the clients that is drawn each round.
        local_epochs: passes of a client over its own images each round.
        batch_size: images a step.
        learning_rate: of the clients' plain SGD.
        hidden: units of the hidden layer.
        concentration: of the Dirichlet distribution of each digit over the clients; small means unlike clients.
        seed: of everything random.
        wires: precisions of the uploads, one training each.
    """

    rounds: int = 30
    clients: int = 20
    participation: float = 0.5
    local_epochs: int = 5
    batch_size: int = 16
    learning_rate: float = 0.1
    hidden: int = 64
    concentration: float = 0.5
    seed: int = 0
    wires: tuple[str, ...] = ("fp32", "fp16", "int8")

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.clients < 1:
            raise ValueError(f"rounds and clients: expected 1 or more, got {self.rounds} and {self.clients}")
        if not 0 < self.participation <= 1:
            raise ValueError(f"participation: expected more than 0 and at most 1, got {self.participation}")

    @property
    def clients_per_round(self) -> int:
        """How many clients take part in a round."""
        return max(1, round(self.participation * self.clients))


class Images(NamedTuple):
    """Digits as rows of 64 pixels from 0 to 1, and what they show."""

    pixels: Floats
    labels: Integers


@dataclass(frozen=True)
class WireRun:
    """One training, its uploads sent in one precision; the lists hold one entry a round.

    Attributes:
        wire: the precision.
        accuracy: on the test images, after the round.
        upload_bytes: what the round's clients uploaded.
        fastagg_seconds: `fedavg` of the round's uploads, the median of several calls.
        numpy_seconds: the loop over clients and layers that people write by hand, on the same uploads.
        model: the layers at the end.
    """

    wire: str
    accuracy: list[float] = field(default_factory=list)
    upload_bytes: list[int] = field(default_factory=list)
    fastagg_seconds: list[float] = field(default_factory=list)
    numpy_seconds: list[float] = field(default_factory=list)
    model: Model = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """What a run of the demo found.

    Attributes:
        settings: of the run.
        label_counts: images of each digit that each client holds, (clients, 10).
        runs: one training a wire, in the order of the settings.
    """

    settings: Settings
    label_counts: Integers
    runs: list[WireRun]


def run(settings: Settings | None = None, on_round: Callable[[str, int], None] | None = None) -> Results:
    """Trains one classifier for each wire, on the same clients with the same random draws.

    ``model = model + fedavg(uploads, numbers of examples)``, an upload being what local training changed.

    Args:
        settings: None for the defaults.
        on_round: called with the wire and the number of rounds done, after each round.

    Raises:
        ModuleNotFoundError: scikit-learn, which holds the images, is not installed.
        RuntimeError: `fedavg` and the loop by hand disagree.
    """
    settings = settings or Settings()
    train, test = load_digits(settings.seed)
    shares = split(train.labels, settings)
    clients = [Images(train.pixels[share], train.labels[share]) for share in shares]
    label_counts = np.array([np.bincount(client.labels, minlength=CLASSES) for client in clients])
    runs = [_train(wire, clients, test, settings, on_round) for wire in settings.wires]
    return Results(settings, label_counts, runs)


def load_digits(seed: int) -> tuple[Images, Images]:
    """scikit-learn's 1797 handwritten digits, shuffled: those to train on and those to test on."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = Images((pixels[order] / 16).astype(np.float32), labels[order].astype(np.int64))
    tests = round(TEST_SHARE * len(order))
    return Images(images.pixels[tests:], images.labels[tests:]), Images(images.pixels[:tests], images.labels[:tests])


def split(labels: Integers, settings: Settings) -> list[Integers]:
    """Which images each client holds: each digit divided by its own Dirichlet draw, and nobody left empty-handed."""
    random = np.random.default_rng((settings.seed, 1))
    shares: list[list[int]] = [[] for _ in range(settings.clients)]
    for digit in range(CLASSES):
        images = random.permutation(np.flatnonzero(labels == digit))
        portions = random.dirichlet(np.full(settings.clients, settings.concentration))
        cuts = np.round(np.cumsum(portions)[:-1] * len(images)).astype(int)
        for share, part in zip(shares, np.split(images, cuts), strict=True):
            share.extend(part.tolist())
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [np.array(share, np.int64) for share in shares]


def initial_model(settings: Settings) -> Model:
    """Weights and biases of a perceptron with one hidden layer, drawn after He et al. 2015."""
    random = np.random.default_rng((settings.seed, 2))
    sizes = (PIXELS, settings.hidden, CLASSES)
    model: Model = []
    for inputs, outputs in pairwise(sizes):
        model.append(random.normal(0, np.sqrt(2 / inputs), (inputs, outputs)).astype(np.float32))
        model.append(np.zeros(outputs, np.float32))
    return model


def accuracy(model: Model, images: Images) -> float:
    """The share of the images that the model reads right."""
    _, scores = _forward(model, images.pixels)
    return float(np.mean(scores.argmax(axis=1) == images.labels))


def _train(
    wire: str, clients: list[Images], test: Images, settings: Settings, on_round: Callable[[str, int], None] | None
) -> WireRun:
    """Federated averaging (McMahan et al. 2017, Algorithm 1) with uploads in one precision."""
    history = WireRun(wire)
    model = initial_model(settings)
    for number in range(settings.rounds):
        draw = np.random.default_rng((settings.seed, 3, number))
        chosen = np.sort(draw.choice(len(clients), settings.clients_per_round, replace=False)).tolist()
        uploads = [_upload(model, clients[client], wire, settings, (number, client)) for client in chosen]
        examples = [len(clients[client].labels) for client in chosen]
        change = _average_and_time(uploads, examples, history)
        model = [layer + step for layer, step in zip(model, change, strict=True)]
        history.accuracy.append(accuracy(model, test))
        history.upload_bytes.append(sum(leaf.nbytes for upload in uploads for leaf in upload))
        if on_round is not None:
            on_round(wire, number + 1)
    return replace(history, model=model)


def _upload(model: Model, images: Images, wire: str, settings: Settings, key: tuple[int, int]) -> Update:
    """What a client sends: how its own images change the model."""
    trained = [layer.copy() for layer in model]
    random = np.random.default_rng((settings.seed, 4, *key))
    for _ in range(settings.local_epochs):
        order = random.permutation(len(images.labels))
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            _step(trained, images.pixels[batch], images.labels[batch], settings.learning_rate)
    change = [new - old for new, old in zip(trained, model, strict=True)]
    return change if wire == "fp32" else [quantize(layer, wire) for layer in change]


def _forward(model: Model, pixels: Floats) -> tuple[Floats, Floats]:
    """The hidden layer after its rectifier, and a score for each digit."""
    hidden = np.maximum(pixels @ model[0] + model[1], 0)
    return hidden, hidden @ model[2] + model[3]


def _step(model: Model, pixels: Floats, labels: Integers, learning_rate: float) -> None:
    """One step of SGD on the softmax cross entropy, in place."""
    hidden, scores = _forward(model, pixels)
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    error = odds / odds.sum(axis=1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    error /= len(labels)
    hidden_error = (error @ model[2].T) * (hidden > 0)
    gradients = (pixels.T @ hidden_error, hidden_error.sum(axis=0), hidden.T @ error, error.sum(axis=0))
    for layer, gradient in zip(model, gradients, strict=True):
        layer -= learning_rate * gradient


def _average_and_time(uploads: list[Update], examples: list[int], history: WireRun) -> Model:
    """The uploads' weighted mean, by fastagg; timed against the loop by hand once both are seen to agree."""
    mean: Model = fedavg(uploads, examples)
    _check_agreement(mean, average_by_hand(uploads, examples))
    history.fastagg_seconds.append(_median_seconds(lambda: fedavg(uploads, examples)))
    history.numpy_seconds.append(_median_seconds(lambda: average_by_hand(uploads, examples)))
    return mean


def average_by_hand(uploads: Sequence[Update], examples: Sequence[int]) -> Model:
    """The weighted mean as people write it with NumPy: layer by layer, client by client."""
    shares = [count / sum(examples) for count in examples]
    return [
        np.asarray(sum(share * _decode_by_hand(leaf) for share, leaf in zip(shares, leaves, strict=True)))
        for leaves in zip(*uploads, strict=True)
    ]


def _decode_by_hand(leaf: Floats | Quantized) -> Floats:
    """A layer as float32: the codes times the scale of each one's block."""
    if not isinstance(leaf, Quantized):
        return leaf
    values: Floats = leaf.data.astype(np.float32)
    if leaf.scales is None or leaf.block is None:
        return values
    scales: Floats = np.repeat(leaf.scales, leaf.block)[: values.size]
    return values * scales.reshape(values.shape)


def _check_agreement(mean: Model, by_hand: Model) -> None:
    for layer, (ours, theirs) in enumerate(zip(mean, by_hand, strict=True)):
        # float32 sums in another order differ in the last bits of the largest terms.
        if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(np.abs(theirs).max())):
            raise RuntimeError(f"layer {layer}: fedavg and the NumPy loop disagree")


def _median_seconds(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TIMED_REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
