"""What hostile clients send, as the papers on robust aggregation define it.

Every attack knows all that honest clients send, one update a row, and returns as many hostile rows as it is asked for.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

Rows = np.ndarray


def sign_flip(honest: Rows, hostile: int, factor: float = 1.0) -> Rows:
    """Honest updates turned around, `factor` times as long."""
    return -factor * honest[np.arange(hostile) % len(honest)]


def large_noise(honest: Rows, hostile: int, deviation: float = 10.0, seed: int = 0) -> Rows:
    """The honest mean under Gaussian noise of a standard deviation."""
    noise = np.random.default_rng(seed).normal(scale=deviation, size=(hostile, honest.shape[1]))
    return (honest.mean(axis=0) + noise).astype(honest.dtype)


def inner_product_manipulation(honest: Rows, hostile: int, factor: float = 1.0) -> Rows:
    """The honest mean turned around, `factor` times as long (Xie et al. 2020, "Fall of empires")."""
    return np.tile(-factor * honest.mean(axis=0), (hostile, 1))


def a_little_is_enough(honest: Rows, hostile: int) -> Rows:
    """The honest mean, moved by as many standard deviations as stay unseen (ALIE: Baruch et al. 2019).

    z is where the normal distribution leaves as many honest clients further out as the attackers need on their side
    for a majority: Phi(z) = (n - f - s) / (n - f) with s = floor(n/2 + 1) - f supporters.
    """
    clients = len(honest) + hostile
    supporters = clients // 2 + 1 - hostile
    z = NormalDist().inv_cdf((len(honest) - supporters) / len(honest))
    moved = honest.mean(axis=0) - z * honest.std(axis=0)
    return np.tile(moved, (hostile, 1)).astype(honest.dtype)


def mimic(honest: Rows, hostile: int) -> Rows:
    """All copy the honest client that lies furthest out where the honest differ most (Karimireddy et al. 2022)."""
    left, _, _ = np.linalg.svd(honest - honest.mean(axis=0), full_matrices=False)
    return np.tile(honest[np.abs(left[:, 0]).argmax()], (hostile, 1))


def not_a_number(honest: Rows, hostile: int) -> Rows:
    """Nothing but NaN, as a client sends whose training has diverged."""
    return np.full((hostile, honest.shape[1]), np.nan, honest.dtype)


def flipped_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Label flipping: what the hostile clients train on, class c as the class c-th from the end."""
    return classes - 1 - labels
