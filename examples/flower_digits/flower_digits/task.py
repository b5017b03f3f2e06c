"""The task of every node: a linear model that tells handwritten digits apart."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

Model = dict[str, np.ndarray]

CLASSES, PIXELS = 10, 64
TEST_IMAGES = 400


def load_images(partition: int, partitions: int) -> tuple[np.ndarray, np.ndarray]:
    """A node's own share of the training images, and what they show."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    return pixels[TEST_IMAGES + partition :: partitions], labels[TEST_IMAGES + partition :: partitions]


def new_model() -> Model:
    """A model that knows nothing."""
    return {
        "weight": np.zeros((PIXELS, CLASSES), np.float32),
        "bias": np.zeros(CLASSES, np.float32),
        "steps": np.array(0),
    }


def train(model: Model, pixels: np.ndarray, labels: np.ndarray, seed: int) -> Model:
    """The model after one pass of stochastic gradient descent over a node's images."""
    weight, bias, steps = model["weight"].copy(), model["bias"].copy(), int(model["steps"])
    order = np.random.default_rng(seed).permutation(len(labels))
    for batch in np.array_split(order, len(order) // 16):
        error = _probabilities(weight, bias, pixels[batch]) - np.eye(CLASSES, dtype=np.float32)[labels[batch]]
        weight -= 0.5 / len(batch) * pixels[batch].T @ error
        bias -= 0.5 * error.mean(axis=0)
        steps += 1
    return {"weight": weight, "bias": bias, "steps": np.array(steps)}


def accuracy(model: Model) -> float:
    """The share of test images that the model gets right."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels[:TEST_IMAGES] / 16).astype(np.float32)
    guesses = _probabilities(model["weight"], model["bias"], pixels).argmax(axis=1)
    return float((guesses == labels[:TEST_IMAGES]).mean())


def _probabilities(weight: np.ndarray, bias: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    scores = pixels @ weight + bias
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
