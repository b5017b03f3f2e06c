"""Averages the files of thousands of clients on the workers of a Ray cluster.

Every client has trained a linear classifier on a few of scikit-learn's digits, and saved it. None of them reads digits
well; their mean does. It is the same mean, bit for bit, on any number of workers.

python examples/ray_tree.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
from sklearn.datasets import load_digits

import fastagg.ray
import fastagg.trees

CLASSES, TEST_IMAGES, STEPS, LEARNING_RATE = 10, 360, 30, 0.5

Model = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--fan-in", type=int, default=32, help="files that a task adds up")
    parser.add_argument("--address", help="of a Ray cluster; a new one on this machine otherwise")
    options = parser.parse_args()

    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    test = pixels[:TEST_IMAGES], labels[:TEST_IMAGES]
    with tempfile.TemporaryDirectory() as folder:  # on a cluster, one that all workers see
        files, images, accuracies = [], [], []
        random = np.random.default_rng(0)
        for number in range(options.clients):
            chosen = random.integers(TEST_IMAGES, len(labels), random.integers(5, 30))
            model = train(pixels[chosen], labels[chosen])
            files.append(Path(folder) / f"client-{number:05}.npz")
            np.savez(files[-1], **model)
            images.append(len(chosen))
            accuracies.append(accuracy(model, *test))
        print(f"{options.clients} clients, a median accuracy of {np.median(accuracies):.3f}")

        ray.init(options.address, include_dashboard=False, logging_level="ERROR")
        start = time.perf_counter()
        mean = fastagg.ray.average(files, images, fan_in=options.fan_in)
        seconds = time.perf_counter() - start
        print(f"their mean has an accuracy of {accuracy(mean, *test):.3f}")
        print(f"averaged in {seconds:.1f} s on {ray.cluster_resources()['CPU']:.0f} processors")

        here = fastagg.trees.average(files, images, fan_in=options.fan_in)
        same = all(mean[name].tobytes() == here[name].tobytes() for name in mean)
        print(f"the same tree in this process gives {'the same bits' if same else 'other bits'}")


def train(pixels: np.ndarray, labels: np.ndarray) -> Model:
    """Gradient descent on the softmax cross entropy."""
    model = {"weight": np.zeros((64, CLASSES), np.float32), "bias": np.zeros(CLASSES, np.float32)}
    for _ in range(STEPS):
        odds = np.exp(pixels @ model["weight"] + model["bias"])
        error = odds / odds.sum(axis=1, keepdims=True) - np.eye(CLASSES, dtype=np.float32)[labels]
        model["weight"] -= LEARNING_RATE * pixels.T @ error / len(labels)
        model["bias"] -= LEARNING_RATE * error.mean(axis=0)
    return model


def accuracy(model: Model, pixels: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean((pixels @ model["weight"] + model["bias"]).argmax(axis=1) == labels))


if __name__ == "__main__":
    main()
