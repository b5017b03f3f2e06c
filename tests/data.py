"""Test data: random arrays whose values, signs and places in memory look like nothing in particular."""

from __future__ import annotations

import numpy as np

from reference import FLOATS


def normal(generator: np.random.Generator, shape: int | tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Values as weights of a model have them."""
    return generator.normal(size=shape).astype(dtype)


def whole(generator: np.random.Generator, shape: int | tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Integers over the whole range of an integer dtype, or bools."""
    if dtype == np.bool_:
        return generator.integers(0, 2, shape).astype(bool)
    info = np.iinfo(dtype)
    return generator.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def any_finite(generator: np.random.Generator, count: int, dtype: np.dtype) -> np.ndarray:
    """Random bit patterns without infinities and NaNs: every exponent, subnormals, both zeros."""
    patterns = generator.integers(0, 256, count * dtype.itemsize, dtype=np.uint8).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return np.where(np.isfinite(patterns.astype(np.float64)), patterns, np.zeros(1, dtype))


def at_offset(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy that starts `offset` elements behind a 64-byte boundary."""
    spare = 64 // array.itemsize
    buffer = np.empty(array.size + 2 * spare + offset, array.dtype)
    start = -(buffer.ctypes.data // array.itemsize) % spare + offset
    place = buffer[start : start + array.size].reshape(array.shape)
    place[...] = array
    return place


def counts(generator: np.random.Generator, clients: int) -> list[float]:
    """Weights as numbers of examples."""
    return [float(count) for count in generator.integers(1, 2000, clients)]


def generator(seed: int = 0) -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(seed)


ALL_FLOATS = list(FLOATS.values())
