"""Accuracy against the number of hostile clients: plain FedAvg and every robust rule on the handwritten digits.

Twenty clients with equal shares of the images send the difference that their local training makes, and the server adds
what a rule makes of them to its model; for FLTrust it has as large a share itself. f of the clients are hostile and
know all that the honest ones send (attacks.py). Under the default, sign flip, they send honest updates turned around
and five times as long: four of them outweigh sixteen honest clients in a mean.

python examples/robust_digits.py --attack "sign flip" --output robust_digits.png
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, NamedTuple

import attacks
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import fastagg
from fastagg import robust

CLIENTS, SHARE = 20, 68  # images of each client
PIXELS, HIDDEN, CLASSES = 64, 32, 10
EPOCHS, BATCH, RATE = 1, 34, 1.0

TICKS = (0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.97)

Array = np.ndarray


class Images(NamedTuple):
    """Pixels from 0 to 1 in the last axis, and the digits that they show."""

    pixels: Array
    labels: Array


class Digits(NamedTuple):
    """Images to train on, those of each client and last the server's in the first axis, and to test on."""

    train: Images
    test: Images


class Round(NamedTuple):
    """What a rule has to go by.

    Attributes:
        updates: one row a client.
        hostile: how many of them are, at most.
        trusted: the update that the server's own share makes.
        number: of the round.
    """

    updates: list[Array]
    hostile: int
    trusted: Array
    number: int

    @property
    def radius(self) -> float:
        """A usual length of an update."""
        return float(np.nanmedian([np.linalg.norm(update) for update in self.updates]))


class Attack(str, Enum):
    """What the hostile clients do."""

    SIGN_FLIP = "sign flip"
    LARGE_NOISE = "large noise"
    INNER_PRODUCT_MANIPULATION = "inner-product manipulation"
    A_LITTLE_IS_ENOUGH = "a little is enough"
    MIMIC = "mimic"
    LABEL_FLIPPING = "label flipping"
    NOT_A_NUMBER = "not a number"


# A client that sends NaN has no part in a rule, or counts as infinity; FedAvg is shown as it is without a check.
AS_SENT = {"nan_policy": "propagate"}
WITHOUT_NAN = {"nan_policy": "drop"}
FEDAVG = "FedAvg"

PANELS: dict[str, dict[str, Callable[[Round], Array]]] = {
    "Coordinate by coordinate": {
        "median": lambda sent: robust.median(sent.updates, **AS_SENT),
        "trimmed mean": lambda sent: robust.trimmed_mean(sent.updates, sent.hostile, **AS_SENT),
        "meamed": lambda sent: robust.meamed(sent.updates, sent.hostile, **AS_SENT),
        "phocas": lambda sent: robust.phocas(sent.updates, sent.hostile, **AS_SENT),
    },
    "Selecting clients": {
        "Krum": lambda sent: robust.krum(sent.updates, sent.hostile, **AS_SENT),
        "Multi-Krum": lambda sent: robust.multi_krum(sent.updates, sent.hostile, **AS_SENT),
        "Bulyan": lambda sent: robust.bulyan(sent.updates, sent.hostile, **AS_SENT),
    },
    "Weighing clients": {
        "geometric median": lambda sent: robust.geometric_median(sent.updates, **AS_SENT),
        "centered clip": lambda sent: robust.centered_clip(
            sent.updates, sent.radius, center=np.zeros_like(sent.trusted), **AS_SENT
        ),
        "norm clip": lambda sent: robust.norm_clip(sent.updates, sent.radius, **AS_SENT),
        "FLTrust": lambda sent: robust.fltrust(sent.updates, sent.trusted, **AS_SENT),
    },
    "After mixing": {
        "NNM, trimmed mean": lambda sent: robust.trimmed_mean(
            robust.nearest_neighbor_mixing(sent.updates, sent.hostile, **WITHOUT_NAN), sent.hostile, **AS_SENT
        ),
        "buckets, median": lambda sent: robust.median(
            robust.bucketing(sent.updates, 2, seed=sent.number, **WITHOUT_NAN), **AS_SENT
        ),
        "buckets, geometric median": lambda sent: robust.geometric_median(
            robust.bucketing(sent.updates, 2, seed=sent.number, **WITHOUT_NAN), **AS_SENT
        ),
    },
}
RULES: dict[str, Callable[[Round], Array]] = {
    FEDAVG: lambda sent: fastagg.fedavg(sent.updates, **AS_SENT),
    **{name: rule for rules in PANELS.values() for name, rule in rules.items()},
}


def main(
    attack: Annotated[Attack, typer.Option(help="what the hostile clients send")] = Attack.SIGN_FLIP,
    factor: Annotated[float, typer.Option(help="length of sign flip and inner-product manipulation")] = 5.0,
    hostile: Annotated[list[int] | None, typer.Option(help="numbers of hostile clients; 0, 2, 4 and 6 if none")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 80,
    output: Annotated[Path | None, typer.Option(help="file of the plot")] = None,
) -> None:
    """Trains every rule under an attack; prints a table and draws a plot of accuracy against f."""
    warnings.simplefilter("ignore", fastagg.DroppedUpdateWarning)
    digits, numbers = shares(), sorted(set(hostile or (0, 2, 4, 6)))
    table = Table("rule", *(f"f = {f}" for f in numbers), title=f"Accuracy of {CLIENTS} clients under {attack.value}")
    found: dict[str, list[float]] = {}
    for name, rule in RULES.items():
        found[name] = [
            trained(rule, digits, attack, factor, f, rounds) if is_possible(name, f) else np.nan for f in numbers
        ]
        table.add_row(name, *("–" if np.isnan(accuracy) else f"{accuracy:.3f}" for accuracy in found[name]))
    Console().print(table)
    if output is not None:
        draw(found, numbers, attack, output)
        print(f"plot: {output}")


def is_possible(name: str, hostile: int) -> bool:
    """Whether a rule has enough clients; only Bulyan asks for more than four a hostile one."""
    return name != "Bulyan" or 4 * hostile + 3 <= CLIENTS


def shares() -> Digits:
    """scikit-learn's 1797 digits in random order."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels, labels = (found.data[order] / 16).astype(np.float32), found.target[order]
    end = (CLIENTS + 1) * SHARE
    train = Images(pixels[:end].reshape(-1, SHARE, PIXELS), labels[:end].reshape(-1, SHARE))
    return Digits(train, Images(pixels[end:], labels[end:]))


def trained(
    rule: Callable[[Round], Array], digits: Digits, attack: Attack, factor: float, hostile: int, rounds: int
) -> float:
    """The accuracy after some rounds of which f clients are hostile: the first ones."""
    random = np.random.default_rng(1)
    model = initial(random)
    images = digits.train
    if attack is Attack.LABEL_FLIPPING:
        flipped = attacks.flipped_labels(images.labels[:hostile], CLASSES)
        images = Images(images.pixels, np.concatenate([flipped, images.labels[hostile:]]))
    for number in range(rounds):
        *updates, trusted = train(model, images, RATE * (1 - number / rounds), random)
        updates[:hostile] = sent_by_hostile(np.stack(updates), attack, factor, hostile)
        model = model + rule(Round(updates, hostile, trusted, number))
        if not np.isfinite(model).all():
            return 1 / CLASSES  # of a guess
    return accuracy(model, digits.test)


def sent_by_hostile(updates: Array, attack: Attack, factor: float, hostile: int) -> Array:
    """The first f rows, made from the others."""
    honest = updates[hostile:]
    if attack is Attack.SIGN_FLIP:
        return attacks.sign_flip(honest, hostile, factor)
    if attack is Attack.LARGE_NOISE:
        return attacks.large_noise(honest, hostile)
    if attack is Attack.INNER_PRODUCT_MANIPULATION:
        return attacks.inner_product_manipulation(honest, hostile, factor)
    if attack is Attack.A_LITTLE_IS_ENOUGH:
        return attacks.a_little_is_enough(honest, hostile)
    if attack is Attack.MIMIC:
        return attacks.mimic(honest, hostile)
    if attack is Attack.NOT_A_NUMBER:
        return attacks.not_a_number(honest, hostile)
    return updates[:hostile]  # label flipping: an honest update of other labels


def initial(random: np.random.Generator) -> Array:
    """A random network as one vector: its weights and biases one behind the other."""
    hidden = random.normal(scale=(2 / PIXELS) ** 0.5, size=PIXELS * HIDDEN)
    output = random.normal(scale=HIDDEN**-0.5, size=HIDDEN * CLASSES)
    return np.concatenate([hidden, np.zeros(HIDDEN), output, np.zeros(CLASSES)]).astype(np.float32)


def layers(models: Array) -> tuple[Array, Array, Array, Array]:
    """Views of models' layers, one model a row: hidden weights and biases, output weights and biases."""
    hidden, hidden_bias, output, output_bias = np.split(
        models, np.cumsum([PIXELS * HIDDEN, HIDDEN, HIDDEN * CLASSES]), axis=1
    )
    return (
        hidden.reshape(-1, PIXELS, HIDDEN),
        hidden_bias[:, None],
        output.reshape(-1, HIDDEN, CLASSES),
        output_bias[:, None],
    )


def train(model: Array, images: Images, rate: float, random: np.random.Generator) -> Array:
    """What some epochs of SGD add to the model, for all shares at once: one row each."""
    models = np.tile(model, (len(images.labels), 1))
    for _ in range(EPOCHS):
        for chosen in random.permutation(SHARE).reshape(-1, BATCH):
            step(models, images.pixels[:, chosen], images.labels[:, chosen], rate)
    return models - model


@np.errstate(over="ignore", invalid="ignore")  # of a model that hostile clients drive away
def step(models: Array, pixels: Array, labels: Array, rate: float) -> None:
    """One step of SGD on the cross-entropy, in place."""
    hidden_weight, hidden_bias, output_weight, output_bias = layers(models)
    hidden = np.maximum(pixels @ hidden_weight + hidden_bias, 0)
    logits = hidden @ output_weight + output_bias
    error = np.exp(logits - logits.max(axis=-1, keepdims=True))
    error /= error.sum(axis=-1, keepdims=True)
    error -= np.eye(CLASSES, dtype=np.float32)[labels]
    error *= np.float32(rate / labels.shape[1])
    back = (error @ output_weight.swapaxes(1, 2)) * (hidden > 0)
    output_weight -= hidden.swapaxes(1, 2) @ error
    output_bias -= error.sum(axis=1, keepdims=True)
    hidden_weight -= pixels.swapaxes(1, 2) @ back
    hidden_bias -= back.sum(axis=1, keepdims=True)


def accuracy(model: Array, images: Images) -> float:
    """The share of digits that a model reads."""
    hidden_weight, hidden_bias, output_weight, output_bias = layers(model[None])
    hidden = np.maximum(images.pixels @ hidden_weight + hidden_bias, 0)
    return float(((hidden @ output_weight + output_bias)[0].argmax(axis=-1) == images.labels).mean())


def draw(found: dict[str, list[float]], numbers: list[int], attack: Attack, path: Path) -> None:
    """Draws accuracy against f, a panel for each kind of rule, with FedAvg in all of them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, sharey=True, layout="constrained")
    figure.suptitle(f"Digits, {CLIENTS} clients of which f are hostile: {attack.value}")
    for axes, (title, rules) in zip(all_axes.flat, PANELS.items(), strict=True):
        axes.plot(numbers, found[FEDAVG], color="#9aa5b1", linestyle="--", marker="x", label=FEDAVG)
        for name, marker in zip(rules, "osD^", strict=False):
            axes.plot(numbers, found[name], marker=marker, markersize=5, alpha=0.85, label=name)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xticks(numbers)
        axes.set_yscale("logit")  # shows what lies between 0.9 and 1
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.set_ylim(0.07, 0.985)
        axes.minorticks_off()
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False, loc="lower left")
    for axes in all_axes[-1]:
        axes.set_xlabel("hostile clients, f")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("test accuracy")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
