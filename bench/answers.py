"""The right answers, in float64 with NumPy: every row is held against them before it is timed."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastagg
from inputs import Inputs, leaves_of

_ENDS, _SAMPLES = 64, 4096
# Half a unit in the last place of 1.0: what one rounding to the result's dtype may cost.
HALF_ULPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def check_mean(answer: Any, inputs: Inputs, tolerance: float, integer_rule: bool) -> None:
    """Asserts that an answer is the weighted mean.

    Args:
        answer: a structure like the clients'.
        inputs: the clients' updates and weights.
        tolerance: the error allowed, in weighted means of |x|.
        integer_rule: whether integer leaves must hold the clients' maximum.
    """
    weights = np.asarray(inputs.weights)
    weights = weights / weights.sum()
    columns = zip(*(leaves_of(update) for update in inputs.updates), strict=True)
    for given, column, like in zip(leaves_of(answer), columns, leaves_of(inputs.out), strict=True):
        where = _sample(_count(like))
        clients = np.stack([decode(leaf, where) for leaf in column])
        if "int" in str(like.dtype):
            assert not integer_rule or decode(given, where) == clients.max(axis=0)
            continue
        dtype = str(like.dtype).removeprefix("torch.")
        error = np.abs(decode(given, where) - weights @ clients)
        allowed = tolerance * (weights @ np.abs(clients)) + SMALLEST[dtype]
        if dtype != "float32":
            allowed = allowed + HALF_ULPS[dtype] * np.abs(weights @ clients)
        assert (error <= allowed).all(), f"off by {error.max():.3g} where {allowed[error.argmax()]:.3g} is allowed"


def check_codes(codes: Any, x: Any) -> None:
    """Asserts that codes are what rounding to nearest gives."""
    where = _sample(_count(x))
    values = decode(x, where)
    if not isinstance(codes, fastagg.Quantized):  # another library's fp16
        codes = fastagg.Quantized(codes, None, wire="fp16", shape=tuple(codes.shape), dtype=x.dtype)
    error = np.abs(decode(codes, where) - values)
    if codes.wire == "sign":
        assert (np.signbit(decode(codes, where)) == np.signbit(values)).all()
        first = decode(x, np.arange(codes.block))
        assert np.isclose(float(codes.scales[0]), np.abs(first).mean(), rtol=1e-6)
        return
    scales = 1.0 if codes.scales is None else _as_numpy(codes.scales)[where // codes.block].astype(np.float64)
    relative, absolute = _ROUNDING[codes.wire]
    assert (error <= relative * np.abs(values) + absolute * scales).all(), f"{codes.wire}: off by {error.max():.3g}"


# Half a step of each wire: relative to the value, and absolute in units of the block's scale.
_ROUNDING = {
    "fp16": (2.0**-11, 2.0**-25),
    "bf16": (2.0**-8, 0.0),
    "fp8_e4m3": (2.0**-4, 2.0**-10),
    "fp8_e5m2": (2.0**-3, 2.0**-17),
    "int8": (0.0, 0.5),
    "int4": (0.0, 0.5),
}


def check_values(values: Any, codes: fastagg.Quantized) -> None:
    """Asserts that values are exactly what codes stand for."""
    where = _sample(_count(values))
    assert (decode(values, where) == decode(codes, where)).all()


def decode(leaf: Any, where: np.ndarray) -> np.ndarray:
    """Some elements of an array, a `Quantized` or Flower's `Array`, as float64."""
    if not isinstance(leaf, fastagg.Quantized):
        return _pick(leaf, where)
    if leaf.scales is None:
        return _pick(leaf.data, where)
    scales = _as_numpy(leaf.scales)[where // leaf.block].astype(np.float64)
    if leaf.wire == "int8":
        return np.asarray(_pick(leaf.data, where) * scales)
    data = _as_numpy(leaf.data).reshape(-1)
    if leaf.wire == "int4":
        nibbles = (data[where // 2] >> (4 * (where % 2)).astype(np.uint8)) & 15
        return np.asarray((((nibbles.astype(np.int64) + 8) % 16) - 8) * scales)
    if leaf.wire == "sign":
        return np.asarray(np.where((data[where // 8] >> (where % 8).astype(np.uint8)) & 1, -scales, scales))
    import torch

    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[leaf.wire]
    return np.asarray(torch.from_numpy(data[where]).view(dtype).double().numpy() * scales)


def _pick(array: Any, where: np.ndarray) -> np.ndarray:
    flat = (array if hasattr(array, "reshape") else array.numpy()).reshape(-1)
    if isinstance(flat, np.ndarray):
        return np.asarray(flat[where], np.float64)
    import torch

    picked: np.ndarray = flat[torch.from_numpy(where)].double().numpy()
    return picked


def _as_numpy(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else np.asarray(array.numpy())


def _count(array: Any) -> int:
    return int(np.prod(tuple(array.shape), dtype=np.int64))


def _sample(count: int) -> np.ndarray:
    """Every element of a small array; of a large one both ends and some between."""
    if count <= 2 * _ENDS + _SAMPLES:
        return np.arange(count)
    between = np.random.default_rng(count).integers(0, count, _SAMPLES)
    return np.concatenate([np.arange(_ENDS), between, np.arange(count - _ENDS, count)])
