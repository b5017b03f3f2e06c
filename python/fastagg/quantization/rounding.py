"""The keys of stochastic rounding."""

from __future__ import annotations

import secrets


def draw_seed() -> int:
    """A fresh seed for stochastic rounding."""
    return secrets.randbits(63)


def random_key(wire: str, rounding: str, seed: int | tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    """The key of stochastic rounding, or None for nearest."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding: expected 'nearest' or 'stochastic', got {rounding!r}")
    if rounding == "nearest":
        return None
    if wire in ("fp32", "sign"):
        raise ValueError(f"rounding: {wire} has no stochastic rounding")
    parts = (draw_seed(),) if seed is None else tuple(seed) if isinstance(seed, (tuple, list)) else (seed,)
    try:
        key = tuple(part.__index__() for part in parts)
    except AttributeError:
        raise TypeError(f"seed: expected an int or (seed, step, tensor), got {seed!r}") from None
    if len(key) not in (1, 3):
        raise ValueError(f"seed: expected an int or (seed, step, tensor), got {seed!r}")
    key = key if len(key) == 3 else (*key, 0, 0)
    if not all(0 <= part < 1 << bits for part, bits in zip(key, (64, 32, 32), strict=True)):
        raise ValueError(f"seed: expected 0 <= seed < 2**64 and 0 <= step, tensor < 2**32, got {seed!r}")
    return key[0], key[1], key[2]
