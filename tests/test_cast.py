"""`quantize` and `dequantize`: every wire's codes, against NumPy, ml_dtypes, torch and exact arithmetic."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastagg
from backends import Backend, isa, on_scalar, threads
from data import any_finite, at_offset, generator, normal
from fastagg import _core
from philox import philox4x32, random_words, uniforms
from reference import FLOATS, FORMATS, assert_same_bits, round_to

CODES = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
EXTREMES = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0, "int4": 7.0}
SCALED = [*EXTREMES, "sign"]
WIRES = ["fp32", "bf16", "fp16", *SCALED]
STOCHASTIC = ["bf16", "fp16", *EXTREMES]

by_wire = pytest.mark.parametrize("wire", WIRES)
by_scaled = pytest.mark.parametrize("wire", EXTREMES)
by_float = pytest.mark.parametrize("wire", ["fp16", "bf16"])


def encode(backend: Backend, x: np.ndarray, wire: str, **options: Any) -> fastagg.Quantized:
    """`quantize` of a NumPy array on a backend."""
    return fastagg.quantize(backend.put(x), wire, **options)


def decode(backend: Backend, q: fastagg.Quantized) -> np.ndarray:
    """`dequantize` to NumPy."""
    return backend.get(fastagg.dequantize(q))


def codes_of(backend: Backend, q: fastagg.Quantized) -> np.ndarray:
    """A float wire's codes as NumPy's numbers of that format."""
    return backend.get(q.data).view(CODES[q.wire])


def in_pieces(backend: Backend, x: np.ndarray) -> list[np.ndarray]:
    """Arrays small enough for the backend."""
    return np.array_split(x, -(-x.size // (8192 if backend.name == "cuda-on-cpu" else 1 << 20)))


def integers_of(q: fastagg.Quantized) -> np.ndarray:
    """The integers that an int8 or int4 `Quantized` holds."""
    if q.wire == "int8":
        return np.asarray(q.data).reshape(-1).astype(np.int64)
    halves = np.stack([q.data & 15, q.data >> 4], axis=1).reshape(-1)[: int(np.prod(q.shape))].astype(np.int64)
    return halves - 16 * (halves > 7)


def same_as_scalar(backend: Backend, x: np.ndarray, wire: str, **options: Any) -> fastagg.Quantized:
    """Encodes, and holds codes, scales, flag and decoded values to those of the scalar loops."""
    q = encode(backend, x, wire, **options)
    expected = on_scalar(lambda: fastagg.quantize(x, wire, **options))
    assert_same_bits(backend.get(q.data), expected.data)
    if expected.scales is not None:
        assert_same_bits(backend.get(q.scales), expected.scales)
    assert q.nonfinite == expected.nonfinite
    assert_same_bits(decode(backend, q), on_scalar(lambda: fastagg.dequantize(expected)))
    return q


# Floats: every code, every exponent, every tie


@by_float
def test_every_16_bit_code_is_decoded(backend: Backend, wire: str) -> None:
    codes = np.arange(1 << 16, dtype=np.uint16).view(CODES[wire])
    for piece in in_pieces(backend, codes):
        q = fastagg.Quantized(backend.put(piece), None, wire=wire, shape=piece.shape, dtype=dtype_on(backend, "fp32"))
        with np.errstate(invalid="ignore"):
            assert_same_bits(decode(backend, q), piece.astype(np.float32))


@pytest.mark.parametrize("wire", ["fp8_e4m3", "fp8_e5m2"])
def test_every_8_bit_code_is_decoded(backend: Backend, wire: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(CODES[wire]).astype(np.float32)
    for scale in (1.0, 2.0**-20, 2.0**100):
        scales = backend.put(np.full(8, scale, np.float32))
        q = fastagg.Quantized(
            backend.put(codes), scales, wire=wire, shape=(256,), dtype=dtype_on(backend, "fp32"), block=32
        )
        assert_same_bits(decode(backend, q), expected * np.float32(scale))


def dtype_on(backend: Backend, name: str) -> Any:
    """A dtype as the backend's array library spells it."""
    if backend.name != "cuda":
        return FLOATS[name]
    import torch

    return {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def all_ties(wire: str) -> np.ndarray:
    """Every value of a 16-bit float, the halfway points between neighbours, and float32's neighbours of both."""
    with np.errstate(invalid="ignore", over="ignore"):
        values = np.arange(1 << 15, dtype=np.uint16).view(CODES[wire]).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    top = values[-1] + (values[-1] - values[-2])
    ties = np.concatenate([values, (values[:-1] + values[1:]) / 2, [(values[-1] + top) / 2, top]])
    with np.errstate(over="ignore"):
        x = ties.astype(np.float32)
        x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    return np.concatenate([x, -x])


@by_float
def test_every_tie_and_its_neighbours(backend: Backend, wire: str) -> None:
    for piece in in_pieces(backend, all_ties(wire)):
        with np.errstate(over="ignore"):
            expected = piece.astype(CODES[wire])
        assert_same_bits(expected.astype(np.float64), round_to(piece.astype(np.float64), wire))
        q = encode(backend, piece, wire)
        assert_same_bits(codes_of(backend, q), expected)
        assert q.nonfinite == bool(np.isinf(expected.astype(np.float64)).any())


@by_float
def test_random_bit_patterns(backend: Backend, wire: str) -> None:
    count = 1 << 13 if backend.name == "cuda-on-cpu" else 1 << 20
    x = generator(1).integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        assert_same_bits(codes_of(backend, encode(backend, x, wire)), x.astype(CODES[wire]))


@by_float
def test_torch_rounds_alike(wire: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(any_finite(generator(2), 100_000, np.dtype(np.float32)))
    expected = x.to({"fp16": torch.float16, "bf16": torch.bfloat16}[wire])
    q = fastagg.quantize(x, wire)
    assert q.data.dtype == expected.dtype
    assert torch.equal(q.data.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(fastagg.dequantize(q), expected.float())


@by_float
@pytest.mark.parametrize("source", ["fp64", "fp16", "bf16"])
def test_other_sources_are_rounded_once(backend: Backend, wire: str, source: str) -> None:
    random = generator(3)
    x = any_finite(random, 4097, FLOATS[source])
    if source == "fp64":
        ties = all_ties(wire)[::37].astype(np.float64)
        ties = ties[np.isfinite(ties)]
        x = np.concatenate([x[np.abs(x) < 1e300], ties, ties * (1 + 2.0**-40), ties * (1 - 2.0**-40)])
    for piece in in_pieces(backend, x):
        result = codes_of(backend, encode(backend, piece, wire)).astype(np.float64)
        assert_same_bits(result, round_to(piece.astype(np.float64), wire))


def test_fp64_to_fp32_rounds_once(backend: Backend) -> None:
    x = any_finite(generator(4), 4097, np.dtype(np.float64))
    with np.errstate(over="ignore", under="ignore"):
        expected = x.astype(np.float32)
    q = encode(backend, x, "fp32")
    assert_same_bits(backend.get(q.data), expected)
    assert q.nonfinite == bool(np.isinf(expected).any())
    assert_same_bits(decode(backend, q), expected.astype(np.float64))


def test_fp32_wire_is_exact(backend: Backend) -> None:
    x = any_finite(generator(5), 4097, np.dtype(np.float32))
    assert_same_bits(decode(backend, encode(backend, x, "fp32")), x)


@pytest.mark.parametrize("target", ["fp64", "fp32", "fp16", "bf16"])
@by_wire
def test_decoding_rounds_once(backend: Backend, wire: str, target: str) -> None:
    x = normal(generator(6), 1025, np.dtype(np.float32))
    q = encode(backend, x, wire)
    wide = decode(backend, q).astype(np.float64)
    out = backend.put(np.zeros(1025, FLOATS[target]))
    assert fastagg.dequantize(q, out=out) is out
    assert_same_bits(backend.get(out).astype(np.float64), round_to(wide, target))


@pytest.mark.exhaustive
@pytest.mark.parametrize("top", range(256))
def test_all_floats_to_fp16(top: int) -> None:
    # All 2**32 in 256 slices, each on every instruction set: about ten minutes on two busy cores.
    x = (np.arange(1 << 24, dtype=np.uint32) + np.uint32(top << 24)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        expected = x.astype(np.float16)
    numbers = ~np.isnan(x) if top & 0x7F == 0x7F else slice(None)
    for name in _core.available_isas():
        with isa(name):
            result = fastagg.quantize(x, "fp16").data
        assert np.array_equal(result.view(np.uint16)[numbers], expected.view(np.uint16)[numbers]), name
        assert np.array_equal(np.isnan(result), np.isnan(x)), name


# Every size, place and thread count


@by_wire
def test_every_size(backend: Backend, wire: str) -> None:
    random = generator(7)
    for size in backend.sizes:
        same_as_scalar(backend, normal(random, size, np.dtype(np.float32)), wire)


@by_wire
@pytest.mark.parametrize("source", ["fp64", "fp16", "bf16"])
def test_every_source(backend: Backend, wire: str, source: str) -> None:
    q = same_as_scalar(backend, normal(generator(8), 1001, FLOATS[source]), wire)
    assert backend.get(fastagg.dequantize(q)).dtype == FLOATS[source]


@by_wire
def test_arrays_that_start_anywhere(cpu: Backend, wire: str) -> None:
    random = generator(9)
    for offset in range(9):
        x = at_offset(normal(random, 777, np.dtype(np.float32)), offset)
        q = same_as_scalar(cpu, x, wire)
        out = at_offset(np.zeros(779, np.float32), offset)
        fastagg.dequantize(q, out=out[1:-1])
        assert_same_bits(out[1:-1], fastagg.dequantize(q))
        assert (out[0], out[-1]) == (0, 0)


@by_wire
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_threads_and_large_arrays(cpu: Backend, wire: str, rounding: str) -> None:
    if rounding == "stochastic" and wire not in STOCHASTIC:
        pytest.skip(f"{wire} has no stochastic rounding")
    x = normal(generator(10), (9 << 20) // 4 + 4097, np.dtype(np.float32))
    options = {"rounding": rounding, "seed": 5} if rounding == "stochastic" else {}
    expected = on_scalar(lambda: fastagg.quantize(x, wire, **options))
    for count in (1, 2, 3, 7):
        with threads(count):
            q = fastagg.quantize(x, wire, **options)
            assert_same_bits(q.data, expected.data)
            decoded = fastagg.dequantize(q)
        assert_same_bits(decoded, on_scalar(lambda: fastagg.dequantize(expected)))


@by_wire
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 5)])
def test_every_shape(backend: Backend, wire: str, shape: tuple[int, ...]) -> None:
    x = np.asarray(normal(generator(11), shape, np.dtype(np.float32)))
    q = same_as_scalar(backend, x, wire)
    assert q.shape == shape
    assert decode(backend, q).shape == shape
    assert not q.nonfinite


# Scales


def smallest_scale(x: np.ndarray, extreme: float) -> float:
    """The smallest power of two, not below float32's smallest, at which the largest value fits."""
    largest = float(np.max(np.abs(x))) if x.size else 0.0
    if largest == 0:
        return 1.0
    exponent = int(np.frexp(largest / extreme)[1])
    while largest <= extreme * 2.0 ** (exponent - 1):
        exponent -= 1
    return 2.0 ** max(exponent, -149)


@by_scaled
@pytest.mark.parametrize("block", [32, 64, 256, 1024, 4096])
def test_scales_are_the_smallest_powers_of_two_that_fit(backend: Backend, wire: str, block: int) -> None:
    random = generator(12)
    x = normal(random, 1025 if backend.name == "cuda-on-cpu" else 9001, np.dtype(np.float32))
    x *= np.exp2(random.integers(-140, 120, x.size // block + 1)).astype(np.float32).repeat(block)[: x.size]
    q = same_as_scalar(backend, x, wire, block=block)
    scales = backend.get(q.scales)
    expected = [smallest_scale(x[start : start + block], EXTREMES[wire]) for start in range(0, x.size, block)]
    assert scales.tolist() == expected
    assert q.block == block


@by_scaled
def test_the_extreme_is_representable(backend: Backend, wire: str) -> None:
    for scale in (1.0, 2.0**-149, 2.0**-130, 2.0**100):
        for sign in (1, -1):
            x = np.zeros(40, np.float32)
            x[7] = sign * EXTREMES[wire] * scale
            q = encode(backend, x, wire)
            assert backend.get(q.scales).tolist() == [scale]
            assert_same_bits(decode(backend, q), x)


@by_scaled
def test_values_around_a_power_of_two(backend: Backend, wire: str) -> None:
    top = np.float32(EXTREMES[wire])
    for largest in (np.nextafter(top, np.float32(0)), top, np.nextafter(top, np.float32(np.inf))):
        x = np.full(40, largest, np.float32)
        q = encode(backend, x, wire)
        assert backend.get(q.scales).tolist() == [1.0 if largest <= top else 2.0]


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_integers_round_to_nearest_even(cpu: Backend, wire: str) -> None:
    top = EXTREMES[wire]
    for scale in (2.0**-149, 2.0**-140, 2.0**-3, 1.0, 2.0**110):
        x = np.linspace(-top, top, int(8 * top) + 1) * scale
        x = np.concatenate([x, [top * scale]]).astype(np.float32)
        q = fastagg.quantize(x, wire, block=4096)
        expected = np.rint(x.astype(np.float64) / scale)
        assert q.scales.tolist() == [scale]
        assert np.array_equal(integers_of(q), expected)
        assert_same_bits(np.abs(fastagg.dequantize(q)), np.abs((expected * scale).astype(np.float32)))


@pytest.mark.parametrize("wire", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_rounds_to_nearest_even(backend: Backend, wire: str) -> None:
    random = generator(13)
    top = np.float32(EXTREMES[wire])
    with np.errstate(invalid="ignore"):
        values = np.arange(128, dtype=np.uint8).view(CODES[wire]).astype(np.float32)
    values = values[np.isfinite(values)]
    ties = (values[:-1] + values[1:]) / 2
    x = np.concatenate(
        [values, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, top), random.uniform(-top, top, 500)]
    )
    x = np.concatenate([[top], x, -x]).astype(np.float32)
    q = encode(backend, x, wire, block=4096)
    assert backend.get(q.scales).tolist() == [1.0]
    assert_same_bits(codes_of(backend, q).astype(np.float64), round_to(x.astype(np.float64), wire))
    assert_same_bits(decode(backend, q).astype(np.float64), round_to(x.astype(np.float64), wire))


@pytest.mark.parametrize("wire", SCALED)
def test_blocks_of_zeros_stay_zeros(backend: Backend, wire: str) -> None:
    x = np.ones(96, np.float32)
    x[32:64] = 0
    decoded = decode(backend, encode(backend, x, wire, block=32))
    assert np.all(decoded[32:64] == 0)
    assert_same_bits(decoded[:32], x[:32])
    assert np.isfinite(backend.get(encode(backend, np.zeros(5, np.float32), wire).scales)).all()


@by_scaled
def test_blocks_of_subnormals_are_kept(backend: Backend, wire: str) -> None:
    x = (np.arange(-7, 8) * 2.0**-149).astype(np.float32)
    assert_same_bits(np.abs(decode(backend, encode(backend, x, wire))), np.abs(x))


@by_scaled
def test_error_is_at_most_half_a_step(backend: Backend, wire: str) -> None:
    x = normal(generator(14), 1025, np.dtype(np.float32))
    q = encode(backend, x, wire, block=64)
    scales = backend.get(q.scales).repeat(64)[: x.size]
    relative = {"fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3}.get(wire, 0.0)
    smallest = {"fp8_e4m3": 2.0**-10, "fp8_e5m2": 2.0**-17}.get(wire, 0.5)
    assert np.all(np.abs(decode(backend, q) - x) <= np.maximum(relative * np.abs(x), smallest * scales))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wire", SCALED)
@pytest.mark.parametrize("position", [0, 32, 45, 63])
def test_a_bad_value_marks_its_block_and_no_other(backend: Backend, wire: str, bad: float, position: int) -> None:
    x = normal(generator(15), 100, np.dtype(np.float32))
    good = decode(backend, encode(backend, x, wire, block=32))
    x[position] = bad
    q = same_as_scalar(backend, x, wire, block=32)
    assert q.nonfinite
    decoded = decode(backend, q)
    others = np.arange(100) // 32 != position // 32
    assert not np.isfinite(decoded[position])
    assert_same_bits(decoded[others], good[others])
    assert np.isfinite(backend.get(q.scales)[[b for b in range(4) if b != position // 32]]).all()
    inside = ~others & (np.arange(100) != position)
    if wire in ("int8", "int4", "sign"):  # marked, never silently zero
        assert not np.isfinite(backend.get(q.scales)[position // 32])
        assert not np.isfinite(decoded[inside]).any()
    elif wire == "fp8_e4m3":
        assert np.isnan(decoded[position])
        assert np.abs(decoded[inside] - x[inside]).max() < 0.2
    else:
        assert np.isnan(decoded[position]) if np.isnan(bad) else decoded[position] == bad


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("wire", ["int8", "int4", "sign"])
def test_the_mark_is_a_nan_scale(backend: Backend, wire: str, bad: float) -> None:
    # As the docstring of `Quantized` says.
    assert np.isnan(backend.get(encode(backend, np.array([1, bad], np.float32), wire).scales)).all()


@by_float
def test_overflow_becomes_infinity_and_sets_the_flag(backend: Backend, wire: str) -> None:
    largest = FORMATS[wire].largest
    half = largest + (largest - float(np.nextafter(CODES[wire].type(largest), CODES[wire].type(0)))) / 2
    below = float(np.nextafter(np.float32(half), np.float32(0)))
    for value, overflows in ((largest, False), (below, False), (half, True), (-half, True)):
        q = encode(backend, np.array([1, value], np.float32), wire)
        assert q.nonfinite == overflows
        assert np.isinf(decode(backend, q)[1]) == overflows


@by_wire
def test_nan_and_infinity_set_the_flag_wherever_they_are(backend: Backend, wire: str) -> None:
    for position in (0, 7, 255, 1024):
        for bad in (np.nan, np.inf, -np.inf):
            x = np.ones(1025, np.float32)
            x[position] = bad
            q = encode(backend, x, wire)
            assert q.nonfinite
            assert not np.isfinite(decode(backend, q)[position])
    assert not encode(backend, np.ones(1025, np.float32), wire).nonfinite


def test_sign(backend: Backend) -> None:
    x = np.array([1, -2, 3, -0.0, 0.0, -6, 1e-45, -1e-45, 5, -1], np.float32)
    q = encode(backend, x, "sign")
    mean = np.float32(np.abs(x.astype(np.float64)).sum() / 10)
    assert backend.get(q.data).tolist() == [0b10101010, 0b10]
    assert backend.get(q.scales).tolist() == [mean]
    assert_same_bits(decode(backend, q), np.copysign(mean, x))


def test_int4_layout(backend: Backend) -> None:
    q = encode(backend, np.array([7, -7, 3, -1, 2], np.float32), "int4")
    assert backend.get(q.data).tolist() == [0x97, 0xF3, 0x02]
    assert q.data.shape == (3,)
    assert decode(backend, q).tolist() == [7, -7, 3, -1, 2]


# Stochastic rounding


def test_philox_known_answers() -> None:
    # The known-answer vectors that come with Random123 (Salmon et al. 2011), philox4x32 with 10 rounds.
    everything = 0xFFFFFFFF
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    vectors = [
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([everything] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for inputs, answer in vectors:
        words = philox4x32([np.array([word]) for word in inputs[:4]], (inputs[4], inputs[5]))
        assert [int(word[0]) for word in words] == answer


def predicted_integers(units: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Magnitudes in units of the last place, rounded up with the probability of their fraction."""
    floor = np.floor(units)
    return floor + (uniforms(words) < units - floor)


KEYS = [0, 1, (1 << 64) - 1, (0x2545F4914F6CDD1D, 7, 3), (5, (1 << 32) - 1, (1 << 32) - 1)]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_stochastic_integers_are_predicted_exactly(backend: Backend, wire: str, key: Any) -> None:
    x = normal(generator(16), 1025, np.dtype(np.float32))
    q = encode(backend, x, wire, rounding="stochastic", seed=key)
    seed = key if isinstance(key, tuple) else (key, 0, 0)
    assert q.seed == seed
    scales = backend.get(q.scales).astype(np.float64).repeat(256)[:1025]
    magnitude = predicted_integers(np.abs(x) / scales, random_words(1025, *seed))
    assert_same_bits(decode(backend, q), (np.copysign(magnitude, x) * scales + 0.0).astype(np.float32))


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("wire", ["fp16", "fp8_e4m3", "fp8_e5m2"])
def test_stochastic_floats_are_predicted_exactly(backend: Backend, wire: str, key: Any) -> None:
    x = normal(generator(17), 1025, np.dtype(np.float32))
    x[::5] *= np.float32(2.0**-20)  # subnormal codes
    q = encode(backend, x, wire, rounding="stochastic", seed=key)
    seed = key if isinstance(key, tuple) else (key, 0, 0)
    scales = 1.0 if wire == "fp16" else backend.get(q.scales).astype(np.float64).repeat(256)[:1025]
    scaled, fmt = np.abs(x.astype(np.float64)) / scales, FORMATS[wire]
    unit = np.maximum(np.frexp(scaled)[1] - 1, fmt.minimum_exponent) - fmt.mantissa
    units = predicted_integers(np.ldexp(scaled, -unit), random_words(1025, *seed))
    assert_same_bits(decode(backend, q), np.copysign(np.ldexp(units, unit) * scales, x).astype(np.float32))


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_stochastic_bf16_is_predicted_exactly(backend: Backend, key: Any) -> None:
    x = normal(generator(18), 1025, np.dtype(np.float32))
    q = encode(backend, x, "bf16", rounding="stochastic", seed=key)
    words = random_words(1025, *(key if isinstance(key, tuple) else (key,)))
    magnitude = (x.view(np.uint32) & 0x7FFFFFFF) + (words >> 16)
    expected = (magnitude >> 16 | x.view(np.uint32) >> 31 << 15).astype(np.uint16)
    assert_same_bits(codes_of(backend, q), expected.view(CODES["bf16"]))


@pytest.mark.parametrize("wire", STOCHASTIC)
def test_stochastic_rounding_is_unbiased(cpu: Backend, wire: str) -> None:
    # The mean of n draws lies within 5 standard errors; a draw's deviation is at most half a step. Seed fixed.
    count = 1 << 20
    fractions = generator(19).uniform(1, 2, 16).astype(np.float32)
    for x in (*fractions, np.float32(1.001), np.float32(1.999)):
        column = np.full(count, x, np.float32)
        if wire in ("int4", "int8"):
            column[::32] = 4.0  # what the scale is made for
        block = 32 if wire in EXTREMES else None
        q = fastagg.quantize(column, wire, rounding="stochastic", seed=3, block=block)
        decoded = fastagg.dequantize(q)
        chosen = decoded[column == x].astype(np.float64)
        values = np.unique(chosen)
        assert values.size <= 2
        assert values[0] <= x <= values[-1]
        step = values[-1] - values[0]
        assert abs(chosen.mean() - x) <= 5 * 0.5 * step / np.sqrt(chosen.size)


@pytest.mark.parametrize("wire", STOCHASTIC)
def test_stochastic_bytes_depend_on_the_key_and_nothing_else(backend: Backend, wire: str) -> None:
    x = normal(generator(20), 1025, np.dtype(np.float32))
    seen = set()
    for key in (1, 2, 1 + (1 << 32), (1, 1, 0), (1, 0, 1), (1, 1, 1)):
        q = same_as_scalar(backend, x, wire, rounding="stochastic", seed=key)
        again = encode(backend, x, wire, rounding="stochastic", seed=key)
        assert_same_bits(backend.get(q.data), backend.get(again.data))
        seen.add(backend.get(q.data).tobytes())
    assert len(seen) == 6
    plain, full = (encode(backend, x, wire, rounding="stochastic", seed=key) for key in (1, (1, 0, 0)))
    assert_same_bits(backend.get(plain.data), backend.get(full.data))


@pytest.mark.parametrize("wire", STOCHASTIC)
def test_exact_values_are_never_moved(backend: Backend, wire: str) -> None:
    x = np.array([0, 1, -1, 2, 4, -4, 7, -7, 6, 3.5, -0.0] * 90, np.float32)[: 512 if wire == "int4" else None]
    x = np.rint(x) if wire.startswith("int") else x
    for seed in range(4):
        decoded = decode(backend, encode(backend, x, wire, rounding="stochastic", seed=seed))
        assert np.array_equal(decoded, x)


@by_float
def test_stochastic_rounding_beyond_the_largest(backend: Backend, wire: str) -> None:
    largest = FORMATS[wire].largest
    beyond = np.nextafter(np.float32(largest * (1 + 2.0**-13 if wire == "fp16" else 1 + 2.0**-10)), np.float32(np.inf))
    outcomes = set()
    for seed in range(40):
        q = encode(backend, np.array([beyond], np.float32), wire, rounding="stochastic", seed=seed)
        decoded = decode(backend, q)[0]
        assert decoded in (np.float32(largest), np.inf)
        outcomes.add(bool(np.isinf(decoded)))
        assert q.nonfinite == np.isinf(decoded), "the flag says what the codes hold"
    assert False in outcomes


def test_a_drawn_seed_is_kept() -> None:
    x = normal(generator(21), 100, np.dtype(np.float32))
    one, other = (fastagg.quantize(x, "int8", rounding="stochastic") for _ in range(2))
    assert one.seed != other.seed
    assert_same_bits(fastagg.quantize(x, "int8", rounding="stochastic", seed=one.seed).data, one.data)
    assert fastagg.quantize(x, "int8").seed is None


# Quantized objects


def pickled(q: fastagg.Quantized) -> fastagg.Quantized:
    """Through bytes and back."""
    return pickle.loads(pickle.dumps(q))


@by_wire
@pytest.mark.parametrize("save", [pickled, copy.copy, copy.deepcopy])
def test_copies(wire: str, save: Any) -> None:
    torch = pytest.importorskip("torch")
    x = np.arange(-15, 15, dtype=np.float32).reshape(5, 6)
    for array in (x, x.astype(np.float64), torch.from_numpy(x), torch.from_numpy(x).bfloat16()):
        q = fastagg.quantize(array, wire)
        other = save(q)
        for name in ("wire", "shape", "dtype", "block", "nonfinite", "seed", "nbytes"):
            assert getattr(other, name) == getattr(q, name)
        one, two = fastagg.dequantize(q), fastagg.dequantize(other)
        assert type(one) is type(two)
        assert (one == two).all()


def test_nbytes() -> None:
    x = np.ones(1000, np.float32)
    expected = {"fp32": 4000, "bf16": 2000, "fp16": 2000, "fp8_e4m3": 1016, "fp8_e5m2": 1016, "int8": 1016}
    for wire, count in {**expected, "int4": 516, "sign": 141}.items():
        assert fastagg.quantize(x, wire).nbytes == count


@by_wire
def test_out_is_reused(backend: Backend, wire: str) -> None:
    random = generator(22)
    q = encode(backend, normal(random, 301, np.dtype(np.float32)), wire)
    data = q.data
    x = normal(random, 301, np.dtype(np.float32))
    assert fastagg.quantize(backend.put(x), wire, out=q) is q
    assert_same_bits(backend.get(q.data), backend.get(data))
    assert_same_bits(backend.get(q.data), on_scalar(lambda: fastagg.quantize(x, wire)).data)
    x[5] = np.inf
    assert fastagg.quantize(backend.put(x), wire, out=q).nonfinite


def test_an_out_that_does_not_fit() -> None:
    x = np.ones((4, 16), np.float32)
    wrong = [
        fastagg.quantize(x, "int4"),
        fastagg.quantize(x.reshape(-1), "int8"),
        fastagg.quantize(x, "int8", block=32),
    ]
    for out in wrong:
        before = out.data.tobytes()
        with pytest.raises(ValueError, match=r"out"):
            fastagg.quantize(x, "int8", out=out)
        assert out.data.tobytes() == before
    with pytest.raises(TypeError, match=r"out"):
        fastagg.quantize(x, "int8", out=x)
    same = fastagg.quantize(x, "fp32")
    with pytest.raises(ValueError, match=r"overlap"):
        fastagg.quantize(same.data, "fp32", out=same)


def test_a_decoded_out_that_does_not_fit() -> None:
    q = fastagg.quantize(np.ones(8, np.float32), "fp32")
    for out, error in (
        (np.zeros(7, np.float32), ValueError),
        (np.zeros(16, np.float32)[::2], ValueError),
        (np.zeros(8, np.int32), TypeError),
        ([0.0] * 8, TypeError),
        (q.data, ValueError),
    ):
        with pytest.raises(error, match=r"out|writable"):
            fastagg.dequantize(q, out=out)
    with pytest.raises(TypeError, match=r"q: expected"):
        fastagg.dequantize(np.ones(3))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"wire": "fp12"}, ValueError),
        ({"wire": None}, ValueError),
        ({"rounding": "up"}, ValueError),
        ({"wire": "fp32", "rounding": "stochastic"}, ValueError),
        ({"wire": "sign", "rounding": "stochastic"}, ValueError),
        ({"rounding": "stochastic", "seed": -1}, ValueError),
        ({"rounding": "stochastic", "seed": 1 << 64}, ValueError),
        ({"rounding": "stochastic", "seed": (1, 2)}, ValueError),
        ({"rounding": "stochastic", "seed": (1, 1 << 32, 0)}, ValueError),
        ({"rounding": "stochastic", "seed": 1.5}, TypeError),
        ({"rounding": "stochastic", "seed": "a"}, TypeError),
        ({"wire": "fp16", "block": 64}, ValueError),
        ({"wire": "int8", "block": 16}, ValueError),
        ({"wire": "int8", "block": 8192}, ValueError),
        ({"wire": "int8", "block": 48}, ValueError),
        ({"wire": "int8", "block": 64.0}, ValueError),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"wire|rounding|seed|block"):
        fastagg.quantize(np.ones(4, np.float32), **options)


@pytest.mark.parametrize("x", [np.ones(3, np.int32), np.ones(3, complex), np.ones(3, bool), [1.0], None, "a"], ids=repr)
def test_what_has_no_codes(x: Any) -> None:
    with pytest.raises(TypeError, match=r"expected"):
        fastagg.quantize(x, "int8")


def test_wires_in_every_spelling() -> None:
    torch = pytest.importorskip("torch")
    x = np.ones(3, np.float32)
    for wire in (torch.float16, np.float16, np.dtype("f2"), "float16", "half", "fp16"):
        assert fastagg.quantize(x, wire).wire == "fp16"
    assert fastagg.quantize(x, torch.bfloat16).wire == "bf16"
    assert fastagg.quantize(x, torch.float8_e4m3fn).wire == "fp8_e4m3"
    assert fastagg.quantize(x, torch.float8_e5m2).wire == "fp8_e5m2"


@pytest.mark.parametrize("layout", ["strided", "fortran", "big-endian"])
def test_memory_of_every_layout(layout: str) -> None:
    x = normal(generator(23), (6, 8), np.dtype(np.float32))
    other = {"strided": x.repeat(2, 1)[:, ::2], "fortran": np.asfortranarray(x), "big-endian": x.astype(">f4")}[layout]
    for wire in WIRES:
        assert_same_bits(fastagg.quantize(other, wire).data, fastagg.quantize(x, wire).data)


def test_codes_that_were_sent_as_arrays_are_checked() -> None:
    data, scales = np.zeros(8, np.int8), np.ones(1, np.float32)
    fine = {"wire": "int8", "shape": (8,), "dtype": np.dtype(np.float32), "block": 256}
    assert fastagg.dequantize(fastagg.Quantized(data, scales, **fine)).tolist() == [0] * 8
    for wrong in (
        {"data": data[:7]},
        {"data": data.view(np.uint8)},
        {"data": [0] * 8},
        {"scales": None},
        {"scales": np.ones(2, np.float32)},
        {"scales": np.ones(1)},
        {"block": 100},
        {"block": None, "wire": "fp16"},
        {"wire": "nothing"},
    ):
        given = {"data": data, "scales": scales, **fine, **wrong}
        with pytest.raises((TypeError, ValueError), match=r"data|scales|block|wire"):
            fastagg.Quantized(given.pop("data"), given.pop("scales"), **given)


def test_exact_multiples_of_a_power_of_two_come_back() -> None:
    random = generator(24)
    for wire, top in (("int8", 127), ("int4", 7)):
        x = random.integers(-top, top, 5000, endpoint=True) * 2.0**-9
        assert_same_bits(fastagg.dequantize(fastagg.quantize(x, wire)), x + 0.0)


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("wire", ["fp8_e4m3", "fp8_e5m2", "int8", "int4"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_largest_finite_values_stay_finite(backend: Backend, name: str, wire: str, rounding: str) -> None:
    dtype = FLOATS[name]
    largest = np.array(FORMATS[name].largest, np.float64)
    x = (np.array([-1.0, 0.97, 0.5, -0.01] * 20) * largest).astype(dtype)
    quantized = fastagg.quantize(backend.put(x), wire, block=32, rounding=rounding)
    decoded = backend.get(fastagg.dequantize(quantized)).astype(np.float64)
    assert not quantized.nonfinite
    assert np.all(np.isfinite(decoded))
    assert np.all(np.abs(decoded - x.astype(np.float64)) <= largest / 4)
