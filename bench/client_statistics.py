"""What statistics cost beside the plain mean: `fedavg(..., stats=True)` against `fedavg`.

`python client_statistics.py [--clients 10] [--elements 25000000] [--rounds 15] [--threads 2]` prints both times and
their ratio. The two take turns in one process. The answers are checked first: the mean's bits, and the statistics
against NumPy in float64.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import numpy as np

import fastagg
from cases import Case
from inputs import Inputs

LARGEST_ERROR = 1e-6
TARGET = 1.25


def check(updates: list[np.ndarray], weights: list[float]) -> None:
    """Holds the mean to the plain one's bits, and the first and last client's statistics to their bound."""
    plain = fastagg.fedavg(updates, weights)
    mean, found = fastagg.fedavg(updates, weights, stats=True)
    assert np.array_equal(plain, mean)
    wide_mean = mean.astype(np.float64)
    for client in (0, len(updates) - 1):
        x = updates[client].astype(np.float64)
        norm, distance = np.linalg.norm(x), np.linalg.norm(x - wide_mean)
        assert abs(found.norm[client, 0] - norm) <= LARGEST_ERROR * norm
        assert abs(found.standard_deviation[client, 0] - x.std()) <= LARGEST_ERROR * x.std()
        assert abs(found.distance[client, 0] - distance) <= LARGEST_ERROR * distance
        cosine = x @ wide_mean / (norm * np.linalg.norm(wide_mean))
        assert abs(found.cosine[client, 0] - cosine) <= LARGEST_ERROR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    fastagg.set_num_threads(options.threads)
    inputs = Inputs(Case("fedavg", "array", options.elements, options.elements, options.clients))
    check(inputs.updates, inputs.weights)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.rounds):
        for stats, own in times.items():
            begin = perf_counter()
            fastagg.fedavg(inputs.updates, inputs.weights, out=inputs.out, stats=stats)
            own.append(perf_counter() - begin)
    ratio = median(one / other for one, other in zip(times[True], times[False], strict=True))
    for name, own in (("fedavg", times[False]), ("fedavg(stats=True)", times[True])):
        print(f"{name:20} best {min(own) * 1e3:7.1f} ms, median {median(own) * 1e3:7.1f} ms")
    best = min(times[True]) / min(times[False])
    print(f"ratio: median of the rounds' {ratio:.3f}, of the best times {best:.3f} (target: below {TARGET})")


if __name__ == "__main__":
    main()
