"""Philox4x32-10 in NumPy, written from the paper (Salmon et al. 2011): what stochastic rounding must draw."""

from __future__ import annotations

import numpy as np

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
WORD = np.uint64(32)


def philox4x32(counter: list[np.ndarray], key: tuple[int, int], rounds: int = 10) -> list[np.ndarray]:
    """Four words for each counter; counters are four arrays of 32-bit words, held in uint64."""
    words = [np.asarray(word, np.uint64) for word in counter]
    first_key, second_key = key
    for _ in range(rounds):
        first, second = MULTIPLIERS[0] * words[0], MULTIPLIERS[1] * words[2]
        words = [
            (second >> WORD) ^ words[1] ^ np.uint64(first_key),
            second & LOW,
            (first >> WORD) ^ words[3] ^ np.uint64(second_key),
            first & LOW,
        ]
        first_key = (first_key + KEY_STEPS[0]) & 0xFFFFFFFF
        second_key = (second_key + KEY_STEPS[1]) & 0xFFFFFFFF
    return words


def random_words(count: int, seed: int, step: int = 0, tensor: int = 0, rank: int = 0) -> np.ndarray:
    """The 32 random bits of each element: the counter is (element // 4, rank, tensor, step), the key the seed."""
    groups = np.arange(-(-count // 4), dtype=np.uint64)
    rest = [np.full_like(groups, value) for value in (rank, tensor, step)]
    words = philox4x32([groups, *rest], (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(words, axis=1).reshape(-1)[:count].astype(np.uint32)


def uniforms(words: np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1): the midpoints of 2**23 cells, from each word's upper bits."""
    return ((words >> np.uint32(9)).astype(np.float64) + 0.5) / 2**23
