"""`reduce`, the operation of an all-reduce: against NumPy's float32 and our own quantize, on every instruction set."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import backends
import fastagg
from fastagg import _core
from fastagg._codes import WIRES, Code
from reference import assert_same_bits

ENCODED = ["fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "sign"]
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
SHIFT = 8


def reduced(
    sources: list[fastagg.Quantized],
    wire: str,
    divisor: float = 1.0,
    feedback: tuple[np.ndarray | None, float, np.ndarray | None, float, bool] = (None, 0.0, None, 0.0, False),
    begin: int = 0,
) -> tuple[fastagg.Quantized, bool, float]:
    """The encoded quotient of the sources' sum, whether it is finite, and its sum of squares."""
    count = sources[0].shape[0]
    out = fastagg.quantize(np.zeros(count, np.float32), wire)
    residual, residual_factor, error, error_factor, raises = feedback
    result = (described(sources[0]), WIRES[wire], SHIFT, address(out.data), address(out.scales), count)
    operands = (
        *([described(source) for source in sources], divisor),
        *(address(residual), residual_factor, address(error), error_factor, raises),
        *((*result, False, (0, 0, 0, 0), 1.0), begin, ()),
    )
    finite, squares = _core.reduce(operands, True)
    return out, finite, squares


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def described(source: fastagg.Quantized) -> tuple[int, int, int, int]:
    return address(source.data), address(source.scales), WIRES[source.wire], SHIFT


def values(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


@pytest.mark.parametrize("wire", ENCODED)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_sum_is_float32s_in_the_order_of_the_ranks(cpu: backends.Backend, wire: str, ranks: int) -> None:
    for count in (1, 15, 257, 4097, 70001):
        sources = [fastagg.quantize(values(count, rank), wire) for rank in range(ranks)]
        expected = np.zeros(count, np.float32)
        for source in sources:
            expected += fastagg.dequantize(source).astype(np.float32)
        out, finite, squares = reduced(sources, wire, divisor=ranks)
        expected_out = fastagg.quantize(expected / np.float32(ranks), wire)
        assert_same_bits(out.data, expected_out.data)
        if out.scales is not None:
            assert_same_bits(out.scales, expected_out.scales)
        assert finite
        exact = np.sum(np.square(fastagg.dequantize(expected_out).astype(np.float64)))
        assert squares == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("wire", ENCODED[1:])
def test_feedback_adds_the_residual_and_keeps_what_encoding_took(cpu: backends.Backend, wire: str) -> None:
    count = 5000
    x, residual, error = values(count, 1), values(count, 2) * 0.01, np.full(count, 7, np.float32)
    out, _, _ = reduced([fastagg.quantize(x, "fp32")], wire, 2.0, (residual, 0.5, error, 2.0, False))
    value = (x + residual * np.float32(0.5)) * np.float32(0.5)
    assert_same_bits(out.data, fastagg.quantize(value, wire).data)
    taken = (value - fastagg.dequantize(out).astype(np.float32)) * np.float32(2)
    assert_same_bits(error, taken)
    reduced([fastagg.quantize(x, "fp32")], wire, 2.0, (residual, 0.5, error, 2.0, True))
    assert_same_bits(error, taken + taken)


def test_squares_do_not_depend_on_the_instruction_set_or_the_threads(cpu: backends.Backend) -> None:
    source = fastagg.quantize(values(300_001, 3), "fp16")
    with backends.isa("scalar"):
        expected = reduced([source], "fp16")[2]
    for threads in (1, 2, 3):
        with backends.threads(threads):
            assert reduced([source], "fp16")[2] == expected


def test_not_finite_sums_are_reported(cpu: backends.Backend) -> None:
    for bad, wire in ((np.inf, "fp32"), (np.nan, "fp16"), (7e4, "fp16"), (np.inf, "int8")):
        x = values(3000, 4)
        x[2500] = bad
        assert not reduced([fastagg.quantize(x, "fp32")], wire)[1]
    assert reduced([fastagg.quantize(values(3000, 4), "fp32")], "fp16")[1]


def test_a_later_part_of_an_array_has_the_same_random_numbers(cpu: backends.Backend) -> None:
    x = values(3 * _core.PASS, 5)
    whole = fastagg.quantize(x, "fp16", rounding="stochastic", seed=9)
    part = np.empty(2 * _core.PASS, np.uint16)
    source = (x[_core.PASS :].ctypes.data, 0, Code.FLOAT32, 0)
    result = (source, Code.FLOAT16, SHIFT, part.ctypes.data, 0, len(part), True, (9, 0, 0, 0), 1.0)
    _core.reduce(([source], 1.0, 0, 0.0, 0, 0.0, False, result, _core.PASS, ()), False)
    assert_same_bits(part, whole.data[_core.PASS :].view(np.uint16))


def test_stretches_say_where_random_numbers_come_from(cpu: backends.Backend) -> None:
    x = values(9000, 6)
    whole = fastagg.quantize(x, "bf16", rounding="stochastic", seed=3).data.view(np.uint16)
    # The array's parts in another order, their places with them.
    order = [(5001, 9000), (0, 13), (13, 5001)]
    shuffled = np.concatenate([x[begin:end] for begin, end in order])
    begins = np.cumsum([0, *(end - begin for begin, end in order)])
    stretches = [(int(at), begin) for at, (begin, _) in zip(begins, order, strict=False)]
    out = np.empty(9000, np.uint16)
    source = (shuffled.ctypes.data, 0, Code.FLOAT32, 0)
    result = (source, Code.BFLOAT16, SHIFT, out.ctypes.data, 0, 9000, True, (3, 0, 0, 0), 1.0)
    _core.reduce(([source], 1.0, 0, 0.0, 0, 0.0, False, result, 0, stretches), False)
    assert_same_bits(out, np.concatenate([whole[begin:end] for begin, end in order]))
