"""Properties that hold for any structure, shape, dtype, weight and order."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import fastagg
from data import any_finite, generator
from reference import (
    FLOATS,
    FORMATS,
    INTEGERS,
    LARGEST_ERROR,
    assert_mean,
    assert_same_bits,
    magnitude,
    mean,
    wide,
)

settings.register_profile("fastagg", deadline=None, max_examples=120, derandomize=True)
settings.load_profile("fastagg")

seeds = st.integers(0, 2**32 - 1)
shapes = st.one_of(st.just(()), st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple))
weight = st.one_of(
    st.integers(0, 5000).map(float),
    st.floats(0, 1),
    st.floats(0, 1e300, allow_subnormal=True),
)
weight_lists = st.lists(weight, min_size=1, max_size=20).filter(any)
float_dtypes = st.sampled_from(list(FLOATS.values()))
dtypes = st.one_of(float_dtypes, st.sampled_from([*INTEGERS, np.dtype(bool)]))


def values(random: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Values of one dtype whose float64 mean neither overflows nor loses bits of its own."""
    if dtype == np.bool_:
        return random.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        return random.integers(0, 100, shape).astype(dtype)
    return np.asarray(random.normal(size=shape) * 2.0 ** random.integers(-10, 10), np.float64).astype(dtype)


@st.composite
def rounds(draw: Any) -> tuple[list[dict[str, np.ndarray]], list[float]]:
    """Some clients' updates of one random structure, and their weights."""
    weights = draw(weight_lists)
    layout = draw(st.dictionaries(st.text(max_size=5), st.tuples(shapes, dtypes), min_size=1, max_size=4))
    random = generator(draw(seeds))
    updates = [
        {name: np.asarray(values(random, shape, dtype)) for name, (shape, dtype) in layout.items()} for _ in weights
    ]
    return updates, weights


@given(rounds())
def test_fedavg_agrees_with_the_reference(case: tuple[list[dict[str, np.ndarray]], list[float]]) -> None:
    updates, weights = case
    result = fastagg.fedavg(updates, weights, integer_policy="max")
    contributing = [k for k, one in enumerate(weights) if one > 0]
    assert list(result) == list(updates[0])
    for name, leaf in result.items():
        columns = [updates[k][name] for k in contributing]
        assert (leaf.dtype, leaf.shape) == (columns[0].dtype, columns[0].shape)
        if leaf.dtype in FLOATS.values():
            assert_mean(leaf, columns, scaled([weights[k] for k in contributing]))
        else:
            assert_same_bits(leaf, np.maximum.reduce(columns).reshape(leaf.shape))


def scaled(weights: list[float]) -> list[float]:
    """Weights divided by a power of two, so that the reference's sum of them stays in range."""
    exponent = int(np.frexp(max(weights))[1])
    return [float(np.ldexp(one, -exponent)) for one in weights]


@given(seeds, weight_lists, st.integers(0, 300), float_dtypes)
def test_the_order_of_clients_changes_no_more_than_the_bound(
    seed: int, weights: list[float], size: int, dtype: np.dtype
) -> None:
    random = generator(seed)
    columns = [values(random, (size,), dtype) for _ in weights]
    order = random.permutation(len(weights))
    one = fastagg.fedavg(columns, weights)
    other = fastagg.fedavg([columns[k] for k in order], [weights[k] for k in order])
    kept = [k for k, one_weight in enumerate(weights) if one_weight > 0]
    usual = scaled([weights[k] for k in kept])
    scale = magnitude([columns[k] for k in kept], usual).astype(np.float64)
    bound = {"float64": 20 * 2.0**-52, "float32": LARGEST_ERROR, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype.name]
    difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
    assert np.all(difference <= bound * scale + (2.0**-24 if dtype == np.float16 else 0))


@given(rounds(), st.integers(1, 5))
def test_the_accumulator_agrees_with_fedavg(case: tuple[list[dict[str, np.ndarray]], list[float]], batch: int) -> None:
    updates, weights = case
    weights = scaled(weights)
    weights = [one if one > 1e-60 else 0.0 for one in weights]
    accumulator = fastagg.Accumulator(batch=batch, integer_policy="max")
    for update, one in zip(updates, weights, strict=True):
        accumulator.add(update, one)
    kept = [k for k, one in enumerate(weights) if one > 0]
    for name, leaf in accumulator.result().items():
        columns = [updates[k][name] for k in kept]
        usual = [weights[k] for k in kept]
        if leaf.dtype == np.float64:
            error = np.abs(wide(leaf) - mean(columns, usual))
            assert np.all(error <= 40 * 2.0**-52 * magnitude(columns, usual))
        elif leaf.dtype in FLOATS.values():
            assert_mean(leaf, columns, usual)
        else:
            assert_same_bits(leaf, np.maximum.reduce(columns).reshape(leaf.shape))
    assert accumulator.count == len(kept)


@given(seeds, st.integers(1, 12), st.integers(0, 600))
def test_equal_clients_keep_their_values(seed: int, clients: int, size: int) -> None:
    random = generator(seed)
    for dtype in (FLOATS["fp32"], FLOATS["fp16"], FLOATS["bf16"]):
        x = any_finite(random, size, dtype)
        weights = (random.integers(1, 100, clients) / 4).tolist()
        assert_same_bits(fastagg.fedavg([x] * clients, weights), x)


@given(seeds, shapes, float_dtypes, st.sampled_from(["int8", "int4", "fp8_e4m3", "fp8_e5m2"]), st.integers(5, 12))
def test_scaled_wires_are_off_by_half_a_step_at_most(
    seed: int, shape: tuple[int, ...], dtype: np.dtype, wire: str, shift: int
) -> None:
    x = np.asarray(values(generator(seed), shape, dtype))
    q = fastagg.quantize(x, wire, block=1 << shift)
    out = np.zeros(shape, np.float64)
    error = np.abs(fastagg.dequantize(q, out=out) - x.astype(np.float64)).reshape(-1)
    scales = np.repeat(q.scales.astype(np.float64), 1 << shift)[: x.size]
    relative, absolute = {"fp8_e4m3": (2.0**-4, 2.0**-10), "fp8_e5m2": (2.0**-3, 2.0**-17)}.get(wire, (0.0, 0.5))
    magnitudes = np.abs(x.astype(np.float64)).reshape(-1)
    # A float64 is narrowed to float32 on the way.
    assert np.all(error <= np.maximum(relative * magnitudes, absolute * scales) * (1 + 2.0**-20))
    assert not q.nonfinite


@given(seeds, st.integers(0, 3000), st.sampled_from(["fp32", "fp16", "bf16"]))
def test_float_wires_are_off_by_half_a_step_at_most(seed: int, size: int, wire: str) -> None:
    x = values(generator(seed), (size,), FLOATS["fp32"])
    error = np.abs(fastagg.dequantize(fastagg.quantize(x, wire)).astype(np.float64) - x)
    fmt = FORMATS[wire]
    relative, absolute = 2.0 ** -(fmt.mantissa + 1), 2.0 ** (fmt.minimum_exponent - fmt.mantissa - 1)
    assert np.all(error <= np.maximum(relative * np.abs(x), absolute))


@given(seeds, st.integers(1, 3000), st.sampled_from(["fp16", "bf16", "int8", "int4", "fp8_e4m3", "fp8_e5m2"]))
def test_encoding_a_decoded_array_changes_nothing(seed: int, size: int, wire: str) -> None:
    x = values(generator(seed), (size,), FLOATS["fp32"])
    once = fastagg.dequantize(fastagg.quantize(x, wire))
    twice = fastagg.dequantize(fastagg.quantize(once, wire))
    assert np.array_equal(once, twice)


@given(seeds, st.integers(1, 500), seeds, st.sampled_from(["fp16", "bf16", "int8", "int4", "fp8_e4m3", "fp8_e5m2"]))
def test_stochastic_rounding_takes_one_of_the_neighbours(seed: int, size: int, key: int, wire: str) -> None:
    x = values(generator(seed), (size,), FLOATS["fp32"])
    q = fastagg.quantize(x, wire, rounding="stochastic", seed=key)
    error = np.abs(fastagg.dequantize(q).astype(np.float64) - x)
    scales = 1.0 if q.scales is None else np.repeat(q.scales.astype(np.float64), 256)[:size]
    relative, absolute = {
        "fp16": (2.0**-10, 2.0**-24),
        "bf16": (2.0**-7, 2.0**-133),
        "fp8_e4m3": (2.0**-3, 2.0**-9),
        "fp8_e5m2": (2.0**-2, 2.0**-16),
    }.get(wire, (0.0, 1.0))
    assert np.all(error <= np.maximum(relative * np.abs(x), absolute * scales))
