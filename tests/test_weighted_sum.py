"""The weighted mean's numbers: contract items 1 to 4, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import fastagg
from backends import Backend, on_scalar, threads
from data import any_finite, at_offset, counts, generator, normal, whole
from reference import (
    FLOATS,
    INTEGERS,
    LARGEST_ERROR,
    assert_fp64_mean,
    assert_mean,
    assert_rounded_once,
    assert_same_bits,
    magnitude,
    mean,
    round_to,
    wide,
)

by_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
narrow = pytest.mark.parametrize("name", ["fp16", "bf16"])


def average(backend: Backend, columns: list[np.ndarray], weights: list[float], **options: object) -> np.ndarray:
    """`fedavg` on a backend, from NumPy to NumPy."""
    return backend.get(fastagg.fedavg(backend.put_all(columns), weights, **options))


def check(backend: Backend, columns: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """The mean agrees with the reference, and with the scalar loops bit for bit."""
    result = average(backend, columns, weights)
    assert_mean(result, columns, weights)
    assert_same_bits(result, on_scalar(lambda: fastagg.fedavg(columns, weights)))
    return result


@by_dtype
def test_every_size(backend: Backend, dtype: np.dtype) -> None:
    random = generator(1)
    for size in backend.sizes:
        columns = [normal(random, size, dtype) for _ in range(3)]
        check(backend, columns, counts(random, 3))


@by_dtype
def test_every_number_of_clients(backend: Backend, dtype: np.dtype) -> None:
    random = generator(2)
    for clients in [*range(1, 21), 100]:
        columns = [normal(random, 133, dtype) for _ in range(clients)]
        check(backend, columns, counts(random, clients))


@by_dtype
def test_every_number_of_threads(cpu: Backend, dtype: np.dtype) -> None:
    random = generator(3)
    columns, weights = [normal(random, cpu.large, dtype) for _ in range(5)], counts(random, 5)
    expected = on_scalar(lambda: fastagg.fedavg(columns, weights))
    for count in (1, 2, 3, 7):
        with threads(count):
            assert_same_bits(average(cpu, columns, weights), expected)


@by_dtype
def test_results_around_the_cache_have_the_same_bits(cpu: Backend, dtype: np.dtype) -> None:
    # From 4 MiB on, results are stored with streaming stores: every start relative to their alignment.
    random = generator(4)
    size = (4 << 20) // dtype.itemsize + 4097
    columns, weights = [normal(random, size, dtype) for _ in range(2)], [3.0, 5.0]
    expected = on_scalar(lambda: fastagg.fedavg(columns, weights))
    for offset in (0, 1, 5):
        out = at_offset(np.zeros(size, dtype), offset)
        assert_same_bits(fastagg.fedavg(columns, weights, out=out), expected)


@by_dtype
def test_arrays_that_start_anywhere(cpu: Backend, dtype: np.dtype) -> None:
    random = generator(5)
    for size in (1, 17, 257, 4097):
        for offset in range(9):
            columns = [at_offset(normal(random, size, dtype), (offset + k) % 9) for k in range(4)]
            weights = counts(random, 4)
            out = at_offset(np.zeros(size + 2, dtype), offset)
            fastagg.fedavg(columns, weights, out=out[1:-1])
            assert_same_bits(out[1:-1], on_scalar(lambda c=columns, w=weights: fastagg.fedavg(c, w)))
            assert out[0] == 0, "wrote before the first element"
            assert out[-1] == 0, "wrote behind the last element"


@by_dtype
def test_any_finite_values(backend: Backend, dtype: np.dtype) -> None:
    random = generator(6)
    columns = [any_finite(random, 1025, dtype) for _ in range(4)]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        weights = [2.0, 3.0, 0.5, 7.0]
        result = average(backend, columns, weights)
        assert_same_bits(result, on_scalar(lambda: fastagg.fedavg(columns, weights)))
        assert_mean(result, columns, weights)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("policy", ["max", "first", "round"])
def test_integers(backend: Backend, dtype: np.dtype, policy: str) -> None:
    random = generator(7)
    for size in (1, 17, 1025):
        columns = [whole(random, size, dtype) for _ in range(3)]
        if policy == "round":  # float64 is exact below 2**53
            columns = [(column >> max(0, 8 * dtype.itemsize - 48)).astype(dtype) for column in columns]
        weights = [1.0, 2.0, 5.0]
        result = average(backend, columns, weights, integer_policy=policy)
        expected = {
            "max": lambda c: np.maximum.reduce(c),
            "first": lambda c: c[0],
            "round": lambda c: np.array(
                [round(Fraction(int(a) + 2 * int(b) + 5 * int(d), 8)) for a, b, d in zip(*c, strict=True)], dtype
            ),
        }[policy](columns)
        assert_same_bits(result, expected)


@pytest.mark.parametrize("clients", [3, 6, 98, 103, 107, 187])
def test_rounded_integers_are_exact_at_ties(backend: Backend, clients: int) -> None:
    # 1/49 rounded, times 49, is below 1: a mean that is a tie must not fall to the wrong side of it.
    half = [np.array([1, 2, 5], np.int64)] * clients + [np.array([2, 3, 6], np.int64)] * clients
    result = average(backend, half, [1.0] * len(half), integer_policy="round")
    assert result.tolist() == [2, 2, 6]


@by_dtype
def test_mixed_codes_on_one_leaf(backend: Backend, dtype: np.dtype) -> None:
    random = generator(8)
    dtypes = [FLOATS[name] for name in ("fp16", "fp32", "bf16", "fp64", "fp16", "fp16", "bf16")]
    columns = [normal(random, 259, each) for each in dtypes]
    weights = counts(random, len(columns))
    result = average(backend, columns, weights, dtype=dtype)
    assert result.dtype == dtype
    assert_same_bits(result, on_scalar(lambda: fastagg.fedavg(columns, weights, dtype=dtype)))
    if dtype == np.float64:
        assert_fp64_mean(result, columns, weights)
    elif dtype == np.float32:
        assert np.all(np.abs(wide(result) - mean(columns, weights)) <= LARGEST_ERROR * magnitude(columns, weights))
    else:
        assert_rounded_once(result, mean(columns, weights), 2.0**-22 * magnitude(columns, weights))


def test_4096_fp16_clients_of_one_average_to_one(backend: Backend) -> None:
    # Contract item 1; adding up in fp16 gives 0.5 (Flower, NVFlare).
    ones = backend.put(np.ones(5, np.float16))
    assert np.all(backend.get(fastagg.fedavg([ones] * 4096)) == 1.0)


@pytest.mark.parametrize("weight", [1.0, 37.0])
def test_300_bf16_clients_of_one_average_to_one(backend: Backend, weight: float) -> None:
    # Adding up in bf16 gives 0.8516 or 1.0469 (NVFlare).
    ones = backend.put(np.ones(5, ml_dtypes.bfloat16))
    result = backend.get(fastagg.fedavg([ones] * 300, [weight] * 300))
    assert np.all(result.astype(np.float32) == 1.0)


def ten_thousand(kind: str) -> tuple[list[np.ndarray], list[float]]:
    """Ten thousand fp32 clients of one of the kinds that lose bits in a float32 sum."""
    random = generator(9)
    clients, size = 10_000, 67
    values = [(0.5 + 0.02 * random.normal(size=size)).astype(np.float32) for _ in range(clients)]
    weights = random.integers(10, 2000, clients).astype(np.float64)
    if kind == "identical":
        values = [values[0]] * clients
    elif kind == "dominating":
        weights[1234] = 1e9
    elif kind == "tenths":
        weights = random.integers(1, 100, clients) * 0.1
    elif kind == "cancelling":
        values = [value * np.float32((-1) ** k) for k, value in enumerate(values)]
    return values, weights.tolist()


@pytest.mark.parametrize("kind", ["random", "identical", "dominating", "tenths", "cancelling"])
def test_error_bound_for_ten_thousand_clients(backend: Backend, kind: str) -> None:
    columns, weights = ten_thousand(kind)
    result = average(backend, columns, weights)
    error = np.abs(wide(result) - mean(columns, weights)) / magnitude(columns, weights)
    assert error.max() <= LARGEST_ERROR
    assert_same_bits(result, on_scalar(lambda: fastagg.fedavg(columns, weights)))


def test_fp64_is_within_a_unit_in_the_last_place(backend: Backend) -> None:
    random = generator(10)
    for clients in (1, 2, 7, 8, 9, 13, 100, 1000):
        columns = [random.normal(size=65) for _ in range(clients)]
        weights = random.uniform(0.1, 5, clients).tolist()
        result = average(backend, columns, weights)
        assert_fp64_mean(result, columns, weights)
        assert_same_bits(result, on_scalar(lambda c=columns, w=weights: fastagg.fedavg(c, w)))


WEIGHTS = {
    "equal": [1.0] * 10,
    "threes": [3.0] * 49,
    "decimal": [0.1, 0.2, 0.7],
    "thirds": [1 / 3] * 10,
    "far apart": [1e300, 1e-300, 1.0],
    "tiny": [5e-324, 5e-324, 5e-324],
    "huge": [5e307, 6e307, 6e307],
    "many": [0.1 * (k % 7 + 1) for k in range(1000)],
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_equal_fp64_models_of_any_size_and_weight_are_their_own_mean(backend: Backend, weights: list[float]) -> None:
    x = any_finite(generator(12), 133, np.dtype(np.float64))
    largest, smallest = np.finfo(np.float64).max, np.finfo(np.float64).smallest_subnormal
    x[:11] = [largest, -largest, 1e308, smallest, -smallest, 3 * smallest, 2.0**-1022, 7.0, 0.1, -0.0, 0.0]
    assert_same_bits(average(backend, [x] * len(weights), weights), x)


def test_fp64_sums_that_cancel_keep_what_pairs_hold(backend: Backend) -> None:
    random = generator(18)
    columns = [random.normal(size=21) * 10.0 ** random.integers(-20, 20, 21) for _ in range(9)]
    columns += [-column * (1 + 2.0**-40) for column in columns]
    weights = [float(weight) for weight in random.integers(1, 1000, 9)] * 2
    assert_fp64_mean(average(backend, columns, weights), columns, weights)


def test_huge_fp64_values_that_cancel_stay_finite(backend: Backend) -> None:
    columns = [np.full(5, value) for value in (1.7e308, 1.7e308, -1.7e308, 1e308, -1.6e308)]
    result = average(backend, columns, [7.0, 5.0, 11.0, 3.0, 2.0])
    assert_fp64_mean(result, columns, [7.0, 5.0, 11.0, 3.0, 2.0])


@by_dtype
def test_one_client_keeps_its_bits(backend: Backend, dtype: np.dtype) -> None:
    x = any_finite(generator(11), 1025, dtype)
    for weight in (1.0, 3.0, 0.1, 1e300):
        assert_same_bits(average(backend, [x], [weight]), x)


@by_dtype
def test_equal_clients_keep_their_bits(backend: Backend, dtype: np.dtype) -> None:
    x = any_finite(generator(12), 1025, dtype)
    for clients in (2, 4, 8, 49, 98):
        assert_same_bits(average(backend, [x] * clients, [1.0] * clients), x)


@by_dtype
def test_equal_clients_of_weight_three_keep_their_bits(backend: Backend, dtype: np.dtype) -> None:
    # 3 times the largest bf16 is beyond float32, and a third of the smallest is below it.
    largest, smallest = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).smallest_subnormal
    x = np.array([largest, -largest, smallest, -smallest, 1.0], dtype)
    for clients in (2, 3, 5, 10):
        assert_same_bits(average(backend, [x] * clients, [3.0] * clients), x)


@by_dtype
def test_negative_zero_is_kept(backend: Backend, dtype: np.dtype) -> None:
    negative, positive = np.full(37, -0.0, dtype), np.zeros(37, dtype)
    assert np.signbit(average(backend, [negative] * 3, [1.0, 2.0, 3.0])).all()
    assert not np.signbit(average(backend, [negative, positive], [1.0, 1.0])).any()


@by_dtype
@pytest.mark.parametrize("size", [37, 300_000])
def test_subnormals_are_kept(backend: Backend, dtype: np.dtype, size: int) -> None:
    torch = pytest.importorskip("torch")
    size = min(size, backend.large)
    smallest = ml_dtypes.finfo(dtype).smallest_subnormal
    x = (np.arange(1, size + 1) % 100 * 2.0 * float(smallest)).astype(dtype)
    columns = backend.put_all([x] * 4)
    # Threads that stand for CUDA's inherit the caller's setting; a GPU knows nothing of it.
    assert torch.set_flush_denormal(backend.name != "cuda-on-cpu")
    try:
        result = fastagg.fedavg(columns, [1.0] * 4)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(backend.get(result), x)


def test_the_callers_float_environment_is_put_back(cpu: Backend) -> None:
    torch = pytest.importorskip("torch")
    assert torch.set_flush_denormal(True)
    try:
        fastagg.fedavg([np.ones(300_000, np.float32)] * 2)
        flushed = torch.tensor([1e-310], dtype=torch.float64) * 1.0
    finally:
        torch.set_flush_denormal(False)
    assert flushed.item() == 0.0


@narrow
def test_rounded_once_just_beside_a_tie(backend: Backend, name: str) -> None:
    # Above (below) a tie by less than float32 shows: two roundings would fall onto the tie, then to even.
    dtype, step = FLOATS[name], {"fp16": 2.0**-10, "bf16": 2.0**-7}[name]
    for base in (1.0, 1.0 + step):
        for far, beyond in ((2.0, True), (0.5, False)):
            # Eight clients are one float32 run; the ninth's little joins them in float64.
            columns = [np.full(19, value, dtype) for value in (*(base, base + step) * 4, far)]
            result = average(backend, columns, [1.0] * 8 + [2.0**-30])
            expected = base + step if beyond else base
            assert np.all(result.astype(np.float64) == expected)


@narrow
@pytest.mark.parametrize("clients", [1, 3, 49])
def test_ties_go_to_even(backend: Backend, name: str, clients: int) -> None:
    dtype, step = FLOATS[name], {"fp16": 2.0**-10, "bf16": 2.0**-7}[name]
    for base, even in ((1.0, 1.0), (1.0 + step, 1.0 + 2 * step)):
        columns = [np.full(19, value, dtype) for value in (base, base + step)] * clients
        result = average(backend, columns, [1.0] * len(columns))
        assert np.all(result.astype(np.float64) == even)


@narrow
@pytest.mark.parametrize("source", ["fp32", "fp64"])
def test_wider_inputs_are_rounded_once(backend: Backend, name: str, source: str) -> None:
    random = generator(13)
    dtype = FLOATS[name]
    lower = any_finite(random, 999, dtype).astype(np.float64)
    lower = lower[np.abs(lower) < 1e4]
    upper = np.nextafter(lower.astype(dtype), np.array(np.inf, dtype)).astype(np.float64)
    tie = (lower + upper) / 2
    relative = 2.0**-45 if source == "fp64" else 2.0**-22
    for x in (tie, tie * (1 + relative), tie * (1 - relative), tie + 2.0**-149, tie - 2.0**-149):
        x = x.astype(FLOATS[source])
        result = average(backend, [x], [1.0], dtype=dtype)
        assert_same_bits(result.astype(np.float64), round_to(x.astype(np.float64), name))


@by_dtype
@pytest.mark.parametrize("factor", [1e300, 1e-300, 2.0**-1073])
def test_huge_and_tiny_weights(backend: Backend, dtype: np.dtype, factor: float) -> None:
    random = generator(14)
    columns = [normal(random, 133, dtype) for _ in range(3)]
    weights = [4.0 * factor, 2.0 * factor, 8.0 * factor]
    with np.errstate(under="ignore"):
        result = average(backend, columns, weights)
    assert_mean(result, columns, weights)


@by_dtype
def test_weights_of_every_magnitude_at_once(backend: Backend, dtype: np.dtype) -> None:
    random = generator(15)
    columns = [normal(random, 133, dtype) for _ in range(4)]
    result = average(backend, columns, [1e308, 1e-308, 5e-324, 1e308])
    assert_mean(result, [columns[0], columns[3]], [1.0, 1.0])


@by_dtype
def test_large_values_do_not_overflow_on_the_way(backend: Backend, dtype: np.dtype) -> None:
    largest = float(ml_dtypes.finfo(dtype).max)
    columns = [np.full(37, largest / 2, dtype), np.full(37, largest, dtype)]
    for weights in ([1.0, 1.0], [3.0, 3.0], [1000.0, 900.0], [70000.0, 69999.0]):
        result = average(backend, columns, weights).astype(np.float64)
        assert np.isfinite(result).all()
        assert np.all(result >= largest / 2)


@by_dtype
def test_propagate_is_plain_addition(backend: Backend, dtype: np.dtype) -> None:
    infinity, one, nan = np.full(19, np.inf, dtype), np.ones(19, dtype), np.full(19, np.nan, dtype)
    cases: list[tuple[list[np.ndarray], Callable[[np.ndarray], np.ndarray]]] = [
        ([infinity, one], np.isposinf),
        ([-infinity, one], np.isneginf),
        ([infinity, -infinity], np.isnan),
        ([one, nan], np.isnan),
    ]
    for columns, holds in cases:
        result = average(backend, columns, [1.0, 2.0], nan_policy="propagate")
        assert holds(result.astype(np.float64)).all()


@by_dtype
def test_one_bad_element_leaves_the_others(backend: Backend, dtype: np.dtype) -> None:
    random = generator(16)
    columns = [normal(random, 259, dtype) for _ in range(2)]
    expected = average(backend, columns, [1.0, 2.0])
    columns[1][100] = np.nan
    result = average(backend, columns, [1.0, 2.0], nan_policy="propagate")
    assert np.isnan(result[100].astype(np.float64))
    others = np.arange(259) != 100
    assert_same_bits(result[others], expected[others])


@pytest.mark.parametrize("position", [0, 1, 7, 8, 255, 256, 300, 1024])
@by_dtype
def test_a_nan_anywhere_is_found(backend: Backend, dtype: np.dtype, position: int) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        columns = [np.ones(1025, dtype) for _ in range(3)]
        columns[2][position] = bad
        with pytest.raises(ValueError, match=r"client 2"):
            average(backend, columns, [1.0, 1.0, 1.0])


def test_opposite_infinities_are_found(backend: Backend) -> None:
    infinity = np.full(5, np.inf, np.float32)
    with pytest.raises(ValueError, match=r"client 0"):
        average(backend, [infinity, -infinity], [1.0, 1.0])


def test_hundreds_of_leaves(backend: Backend) -> None:
    random = generator(17)
    dtypes = [FLOATS[name] for name in ("fp32", "fp16", "fp64", "bf16")]
    shapes = [(int(size), dtypes[k % 4]) for k, size in enumerate(random.integers(0, 70, 200))]
    updates = [[normal(random, size, dtype) for size, dtype in shapes] for _ in range(3)]
    weights = [5.0, 3.0, 9.0]
    results = fastagg.fedavg([backend.put_all(update) for update in updates], weights)
    expected = on_scalar(lambda: fastagg.fedavg(updates, weights))
    for result, one, *columns in zip(results, expected, *updates, strict=True):
        assert_same_bits(backend.get(result), one)
        assert_mean(backend.get(result), columns, weights)
